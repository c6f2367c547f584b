"""Torch data: tiles read from the rasters as they are needed, in batches.

An item is `(image, target)`. The image is float32 (bands, size, size), stretched. The target holds
tensors only: `boxes` float32 (N, 4), xyxy px of the tile, `labels` int64 (N,), class ids, and, of a
tile with ground that does not count, `counted` bool (size, size); for evaluation also where the
tile lies and which objects it knows:

    ground   int64 ()       block of ground, the unit of evaluation
    window   float32 (4,)   the tile, xyxy px of the raster
    core     float32 (4,)   ground the tile owns, xyxy px of the raster
    truth_boxes   float32 (M, 4)   px of the raster, cut at the block's edge
    truth_labels  int64 (M,)
    truth_ids     int64 (M,)       row of the object in its raster's table
    truth_owned   bool (M,)        the tile owns the object, or merely shows it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

import fileio
import imutils
import splits
import tiling
from ImageData import Window
from ModelConfig import ModelConfig

Target = dict[str, torch.Tensor]
Batch = tuple[torch.Tensor, list[Target]]


def class_ids(labels: Sequence[str]) -> dict[str, int]:
    """Number the distinct labels from 0 in the order of their names."""
    return {label: i for i, label in enumerate(sorted(set(map(str, labels))))}


class BboxDataset(Dataset):
    """The tiles of one split, read window by window.

    Args:
        tiles: Rows of a tile index, see `tiling.read_tiles`.
        boxes: Its boxes.
        rasters: Identifier -> raster.
        ids: Label -> class id.
        radiometry: How raw values become model input.
        transform: `torchvision.transforms.v2` transform of (image, {"boxes", "labels"}), or None.
        evaluation: Whether targets say where the tile lies and what it owns.
    """

    def __init__(
        self,
        tiles: pd.DataFrame,
        boxes: pd.DataFrame,
        rasters: Mapping[str, fileio.Raster],
        ids: Mapping[str, int],
        radiometry: imutils.Radiometry,
        *,
        transform: Callable | None = None,
        evaluation: bool = False,
    ) -> None:
        """Keep the tables as arrays, boxes sorted by window, so that items are slices."""
        boxes = boxes[boxes["window"].isin(tiles["window"])].sort_values("window", kind="stable")
        self.tiles = tiles.reset_index(drop=True)
        self.first = np.searchsorted(boxes["window"], self.tiles["window"], side="left")
        self.last = np.searchsorted(boxes["window"], self.tiles["window"], side="right")
        self.boxes = boxes[tiling.BOX_COLUMNS].to_numpy(dtype=np.float64)
        self.ground_boxes = boxes[tiling.GROUND_BOX_COLUMNS].to_numpy(dtype=np.float32, copy=True)
        self.labels = boxes["label"].astype(str).map(ids).to_numpy(dtype=np.int64, copy=True)
        self.objects = boxes["object"].to_numpy(dtype=np.int64, copy=True)
        self.owned = boxes["owned"].to_numpy(dtype=bool, copy=True)
        self.rasters, self.radiometry = dict(rasters), radiometry
        self.transform, self.evaluation = transform, evaluation

    def __len__(self) -> int:
        """Return the number of tiles."""
        return len(self.tiles)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Target]:
        """Read one tile; see the module for what it holds."""
        tile = self.tiles.iloc[index]
        window = Window(*(int(tile[name]) for name in tiling.WINDOW_COLUMNS))
        angle = int(tile["angle"])
        image, valid, counted = tiling.read_tile(self.rasters[tile["raster"]], window, angle)
        stretched = torch.from_numpy(np.ascontiguousarray(self.radiometry.stretch(image, valid)))
        rows = slice(self.first[index], self.last[index])
        boxes = tiling.boxes_of_tile(self.boxes[rows], angle, window.width, window.height)
        target = {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(self.labels[rows])}
        if not counted.all():
            target["counted"] = tv_tensors.Mask(np.ascontiguousarray(counted))
        if self.transform is not None:
            target["boxes"] = tv_tensors.BoundingBoxes(
                target["boxes"], format="XYXY", canvas_size=(window.height, window.width)
            )
            stretched, target = self.transform(tv_tensors.Image(stretched), target)
            stretched = stretched.as_subclass(torch.Tensor)
            target["boxes"] = target["boxes"].as_subclass(torch.Tensor)
        if "counted" in target:
            target["counted"] = target["counted"].as_subclass(torch.Tensor)
        if self.evaluation:
            core = tile[tiling.CORE_COLUMNS].to_numpy(dtype=np.float32, copy=True)
            target |= {
                "ground": torch.tensor(int(tile["block"])),
                "window": torch.tensor(
                    [window.x, window.y, window.x + window.width, window.y + window.height]
                ).float(),
                "core": torch.from_numpy(core),
                "truth_boxes": torch.from_numpy(self.ground_boxes[rows]),
                "truth_labels": torch.from_numpy(self.labels[rows]),
                "truth_ids": torch.from_numpy(self.objects[rows]),
                "truth_owned": torch.from_numpy(self.owned[rows]),
            }
        return stretched, target


class RandomGain(v2.Transform):
    """Change contrast and brightness of an image, the same for all bands and any number of them.

    Args:
        contrast: Largest relative change of the distance to the image's mean.
        brightness: Largest shift, in units of the stretched range.
    """

    def __init__(self, contrast: float = 0.3, brightness: float = 0.15) -> None:
        """Keep the ranges."""
        super().__init__()
        self.contrast, self.brightness = contrast, brightness

    def make_params(self, flat_inputs: list) -> dict[str, float]:
        """Draw one gain and one shift for all inputs."""
        draw = torch.rand(2).mul(2).sub(1).tolist()
        return {"gain": 1 + self.contrast * draw[0], "shift": self.brightness * draw[1]}

    def transform(self, inpt: object, params: dict[str, float]) -> object:
        """Apply them to images; boxes and labels pass."""
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        mean = inpt.mean()
        return tv_tensors.wrap((inpt - mean) * params["gain"] + mean + params["shift"], like=inpt)


def training_transform() -> v2.Transform:
    """Return the augmentation of training tiles, which come in all quarter turns already."""
    return v2.Compose([v2.RandomHorizontalFlip(0.5), RandomGain()])


def collate(items: list[tuple[torch.Tensor, Target]]) -> Batch:
    """Stack images to (B, bands, size, size); targets stay a list, one dictionary per tile."""
    images, targets = zip(*items, strict=True)
    return torch.stack(images), list(targets)


class TileDataModule(pl.LightningDataModule):
    """The tiles of one trial.

    Args:
        tiles: Tile index of the trial's tile size.
        boxes: Its boxes.
        rasters: Identifier -> raster.
        ids: Label -> class id.
        radiometry: How raw values become model input.
        conf: Batch size, worker processes, seed, augmentation.
        sample_size: Share of the training and validation windows to use.
    """

    def __init__(
        self,
        tiles: pd.DataFrame,
        boxes: pd.DataFrame,
        rasters: Mapping[str, fileio.Raster],
        ids: Mapping[str, int],
        radiometry: imutils.Radiometry,
        conf: ModelConfig,
        *,
        sample_size: float = 1.0,
    ) -> None:
        """Select the tiles; nothing is read yet."""
        super().__init__()
        self.conf = conf
        train, validation, test = splits.split_dataset_train_test(tiles, sample_size, conf.seed)
        _, full_validation, _ = splits.split_dataset_train_test(tiles, 1.0, conf.seed)
        splits.audit_splits(pd.concat([train, full_validation, test]), rasters)
        common = (boxes, rasters, ids, radiometry)
        augment = training_transform() if conf.train.augment else None
        self.train = BboxDataset(train, *common, transform=augment)
        self.validation = BboxDataset(validation, *common, evaluation=True)
        self.full_validation = BboxDataset(full_validation, *common, evaluation=True)
        self.test = BboxDataset(test, *common, evaluation=True)

    def train_dataloader(self) -> DataLoader:
        """Return shuffled training batches; the order depends on the seed only."""
        generator = torch.Generator().manual_seed(self.conf.seed)
        return self._loader(self.train, shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader:
        """Return the validation tiles of the sample, for looking while training."""
        return self._loader(self.validation)

    def full_validation_dataloader(self) -> DataLoader:
        """Return all validation tiles, the same for every trial; thresholds come from them."""
        return self._loader(self.full_validation)

    def test_dataloader(self) -> DataLoader:
        """Return all test tiles."""
        return self._loader(self.test)

    def _loader(self, dataset: BboxDataset, **options: object) -> DataLoader:
        return DataLoader(
            dataset, batch_size=self.conf.batch_size, num_workers=self.conf.workers,
            persistent_workers=self.conf.workers > 0, collate_fn=collate, **options,
        )  # fmt: skip
