"""Torch data: tiles read from the rasters as they are needed, in batches.

An item is `(image, target)`. The image is float32 (bands, size, size), stretched. The target holds
tensors only: `boxes` float32 (N, 4), xyxy px of the tile, `labels` int64 (N,), class ids, and, of a
tile with ground that does not count, `counted` bool (size, size). `frames` float32 (N, 2, 2) take,
at each object, a step (x, y) in px of the raster to the step in px of the tile. For training it
also holds `tile` int64 (), the row of the tile in its dataset; for evaluation where the tile lies
and which objects it knows:

    ground   int64 ()       block of ground, the unit of evaluation
    window   float32 (4,)   the tile, xyxy px of the raster
    core     float32 (4,)   ground the tile owns, xyxy px of the raster
    truth_boxes   float32 (M, 4)   px of the raster, cut at the block's edge
    truth_labels  int64 (M,)
    truth_ids     int64 (M,)       row of the object in its raster's table
    truth_owned   bool (M,)        the tile owns the object, or merely shows it

Of a segmentation the target holds `mask` int64 (size, size), class ids and `IGNORE`, in place of
boxes and all that is of objects; the rest is the same.

Training draws its items with `TileSampler`, which gives each a seed. All that is random in an item
follows from that seed, so that it is the same whichever process reads it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from typing_extensions import override

import fileio
import imutils
import ranks
import splits
import tilecache
import tiling
from augment import training_transform
from ImageData import IGNORE, InputError, LabelSource, Window
from ModelConfig import ModelConfig

Target = dict[str, Tensor]

ITEM_TENSORS = ("boxes", "labels", "frames")  # a row per object
LEAST_SIDE = 0.01  # px; a thinner box has no area left in float32
MEMORY = 0.7  # share of a tile's earlier difficulty that a new measurement leaves


def class_ids(labels: Sequence[str]) -> dict[str, int]:
    """Number the distinct labels from 0 in the order of their names."""
    return {label: i for i, label in enumerate(sorted(set(map(str, labels))))}


class RandomViews:
    """Windows about a tile, moved and zoomed at random, with all objects of the tile's block.

    The centre of a window is drawn from the tile's core, half a step of the grid to each side. The
    cores partition the block, so that an epoch sees its ground about equally. The window is then
    moved into its block, off the ground of other splits, so that along the block's edge pixels are
    seen half as often, and a window away from it up to 1.5 times. Objects are known as far as they
    lie in the block.

    Args:
        tiles: All training tiles of an index, also those that are not kept: together they tell
            the blocks.
        boxes: The boxes of the index.
        ids: Label -> class id.
        zoom: Largest magnification, >= 1; its logarithm is drawn from -log(zoom) to log(zoom). A
            tile shrinks no further than its block reaches.
        mosaic: Share of the items that are put together of four windows, at half their scale.
        min_visible: Share of an object's area that a window must hold to show it, unless it holds
            its centre; see `tiling.assign_boxes`.
    """

    def __init__(
        self,
        tiles: pd.DataFrame,
        boxes: pd.DataFrame,
        ids: Mapping[str, int],
        *,
        zoom: float = 1.0,
        mosaic: float = 0.0,
        min_visible: float = 0.25,
    ) -> None:
        """Sort the objects of the blocks by their upper edge, so that a window looks at few."""
        self.zoom, self.mosaic, self.min_visible = zoom, mosaic, min_visible
        by_block = tiles.groupby("block")[tiling.CORE_COLUMNS]
        low, high = by_block.min(), by_block.max()
        self.blocks = low.index.to_numpy()
        self.extents = np.hstack([low.iloc[:, :2], high.iloc[:, 2:]]).astype(np.int64)
        block_of = tiles.drop_duplicates("window").set_index("window")["block"]
        objects = boxes[boxes["window"].isin(block_of.index)]
        objects = objects.assign(block=objects["window"].map(block_of))
        objects = objects.drop_duplicates(["block", "object"]).sort_values(
            ["block", "ground_ymin", "object"]
        )
        self.boxes = objects[tiling.GROUND_BOX_COLUMNS].to_numpy(dtype=np.float64)
        self.labels = objects["label"].astype(str).map(ids).to_numpy(dtype=np.int64, copy=True)
        self.first = np.searchsorted(objects["block"], self.blocks, side="left")
        self.last = np.searchsorted(objects["block"], self.blocks, side="right")
        height = pd.Series(self.boxes[:, 3] - self.boxes[:, 1])
        tallest = height.groupby(objects["block"].to_numpy()).max()
        self.tallest = tallest.reindex(self.blocks, fill_value=0.0).to_numpy()

    def draw(self, block: int, core_xyxy: np.ndarray, window: Window) -> Window:
        """Draw a window about a tile, from torch's generator.

        A tile that is larger than its block stays as it is.
        """
        left, top, right, bottom = self.extents[np.searchsorted(self.blocks, block)].tolist()
        room = min(right - left, bottom - top)
        if room < window.width:
            return window
        zoom, *place = torch.rand(3).tolist()
        side = min(round(window.width * self.zoom ** (1 - 2 * zoom)), room)
        x, y = (core_xyxy[:2] + place * (core_xyxy[2:] - core_xyxy[:2]) - side / 2).tolist()
        x, y = min(max(round(x), left), right - side), min(max(round(y), top), bottom - side)
        return Window(x, y, side, side)

    def reach(self, tiles: pd.DataFrame) -> pd.DataFrame:
        """Return tiles with all the ground that windows about them may see as `x` to `height`."""
        cores, own = tiles[tiling.CORE_COLUMNS].to_numpy(), tiles[tiling.WINDOW_COLUMNS].to_numpy()
        extents = self.extents[np.searchsorted(self.blocks, tiles["block"])]
        side = np.ceil(own[:, 2:] * self.zoom) + 2  # for the rounding of size and place
        low = np.minimum(cores[:, :2] - side / 2, extents[:, 2:] - side)
        high = np.maximum(cores[:, 2:] + side / 2, extents[:, :2] + side)
        low = np.maximum(np.floor(low), extents[:, :2])
        high = np.maximum(np.minimum(np.ceil(high), extents[:, 2:]), own[:, :2] + own[:, 2:])
        ground = np.hstack([low, high - low]).astype(np.int64)
        return tiles.assign(**dict(zip(tiling.WINDOW_COLUMNS, ground.T, strict=True)))

    def boxes_in(self, block: int, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """Return the boxes that a window of a block shows.

        Returns:
            float64 (N, 4), xyxy px of the window, cut at its edges; and their class ids (N,).
        """
        at = np.searchsorted(self.blocks, block)
        mine = slice(self.first[at], self.last[at])
        tops = self.boxes[mine, 1]
        near = slice(
            self.first[at] + np.searchsorted(tops, window.y - self.tallest[at], side="left"),
            self.first[at] + np.searchsorted(tops, window.y + window.height, side="left"),
        )
        corner = np.array([window.x, window.y] * 2)
        ground = corner + np.array([0, 0, window.width, window.height])
        clamped, _, shown = tiling.show_boxes(self.boxes[near], ground, ground, self.min_visible)
        return clamped[shown] - corner, self.labels[near][shown]


class Parts(NamedTuple):
    """What an item is made of.

    Attributes:
        image: float32 (bands, size, size), stretched.
        counted: bool (size, size).
        boxes: float32 (N, 4), xyxy px of the image.
        labels: int64 (N,), class ids.
        frames: float32 (N, 2, 2), see the module.
    """

    image: Tensor
    counted: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    frames: np.ndarray


def _frames(count: int, angle: int) -> np.ndarray:
    return np.tile(imutils.turn_matrix(angle).astype(np.float32), (count, 1, 1))


class TileDataset(Dataset):
    """The tiles of one split, read window by window; base of those with boxes and with masks.

    An index gives the tile as it lies. An index with a seed, as `TileSampler` draws it, gives a
    random view of it: moved, zoomed and transformed.

    Args:
        tiles: Rows of a tile index, see `tiling.read_tiles`.
        rasters: Identifier -> raster.
        radiometry: How raw values become model input.
        transform: `torchvision.transforms.v2` transform of (image, target), or None; it draws from
            torch's generator.
        views: Draws windows about the tiles, or None for the tiles themselves.
        evaluation: Whether targets say where the tile lies and what it owns.
    """

    def __init__(
        self,
        tiles: pd.DataFrame,
        rasters: Mapping[str, fileio.Raster],
        radiometry: imutils.Radiometry,
        *,
        transform: Callable | None = None,
        views: RandomViews | None = None,
        evaluation: bool = False,
    ) -> None:
        """Keep the table as arrays."""
        self.tiles = tiles.reset_index(drop=True)
        self.windows = self.tiles[tiling.WINDOW_COLUMNS].to_numpy(dtype=np.int64)
        self.cores = self.tiles[tiling.CORE_COLUMNS].to_numpy(dtype=np.float64, copy=True)
        self.blocks, self.angles = self.tiles["block"].tolist(), self.tiles["angle"].tolist()
        self.raster_names = self.tiles["raster"].tolist()
        self.rasters, self.radiometry = dict(rasters), radiometry
        self.transform, self.views, self.evaluation = transform, views, evaluation

    def __len__(self) -> int:
        """Return the number of tiles."""
        return len(self.tiles)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, Target]:
        """Read one tile, or with (index, seed) a random view of it; see the module for both."""
        if isinstance(index, tuple):
            index, seed = index
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                image, target = self._view(index)
        else:
            image, target = self._item(self._tile(index))
        target |= self._place(index) if self.evaluation else {"tile": torch.tensor(index)}
        return image, target

    def repeat_factors(self, threshold: float) -> np.ndarray:
        """Return how often each tile is to be visited relative to others, float64 (N,), >= 1.

        A label that is in a share f of the tiles, f below the threshold t, has the factor
        sqrt(t / f), any other 1. A tile has the largest factor of the labels it shows.

        References: Gupta et al. 2019, LVIS, section 4.2; their t is 0.001 for a thousand labels.
        """
        factors = np.ones(len(self))
        for shows in self._showing():
            factors[shows] = np.maximum(factors[shows], math.sqrt(threshold / shows.mean()))
        return factors

    def _showing(self) -> Iterator[np.ndarray]:
        """Tell for each label that there is which tiles show it, bool (N,)."""
        raise NotImplementedError

    def _tile(self, index: int) -> Parts | MaskParts:
        """Read a tile."""
        raise NotImplementedError

    def _window(self, index: int, size: int) -> Parts | MaskParts:
        """Read a random window about a tile, as an image of `size` px."""
        raise NotImplementedError

    def _join(self, parts: Sequence, size: int, places: Sequence[tuple[int, int]]) -> object:
        """Put four parts together, at these places (x, y)."""
        raise NotImplementedError

    @staticmethod
    def _item(parts: Parts | MaskParts) -> tuple[Tensor, Target]:
        """Make an item of its parts."""
        raise NotImplementedError

    def _transformed(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        """Apply the transform to an item."""
        raise NotImplementedError

    def _read(self, index: int, window: Window, size: int) -> tuple[Tensor, np.ndarray]:
        """Read a square window at the angle of a tile, as an image of `size` px, and `counted`."""
        raster = self.rasters[self.raster_names[index]]
        pixels, valid, counted = tiling.read_tile(raster, window, self.angles[index])
        image = torch.from_numpy(np.ascontiguousarray(self.radiometry.stretch(pixels, valid)))
        if window.width != size:
            image = functional.interpolate(
                image[None], size=(size, size), mode="bilinear", antialias=True
            )[0]
        return image, _resized(counted, size)

    def _view(self, index: int) -> tuple[Tensor, Target]:
        """Read a random view of a tile, drawn from torch's generator."""
        views, size = self.views, int(self.windows[index, 2])
        if views is None:
            parts = self._tile(index)
        elif views.mosaic and torch.rand(()) < views.mosaic:
            parts = self._mosaic(index, size)
        else:
            parts = self._window(index, size)
        image, target = self._item(parts)
        return (image, target) if self.transform is None else self._transformed(image, target)

    def _draw(self, index: int) -> Window:
        """Draw a random window about a tile."""
        tile = Window(*self.windows[index].tolist())
        return self.views.draw(self.blocks[index], self.cores[index], tile)

    def _mosaic(self, index: int, size: int) -> Parts | MaskParts:
        """Put random windows about a tile and three others together.

        References: Bochkovskiy et al. 2020, YOLOv4, section 3.3; our four parts are of equal size.
        """
        half = math.ceil(size / 2)
        others = torch.randint(len(self), (3,)).tolist()
        parts = [self._window(row, half) for row in (index, *others)]
        places = [((size - half) * (i % 2), (size - half) * (i // 2)) for i in range(4)]
        return self._join(parts, size, places)

    def _place(self, index: int) -> Target:
        x, y, width, height = self.windows[index].tolist()
        return {
            "ground": torch.tensor(self.blocks[index]),
            "window": torch.tensor([x, y, x + width, y + height]).float(),
            "core": torch.from_numpy(self.cores[index]).float(),
        }


def _resized(mask: np.ndarray, size: int) -> np.ndarray:
    """Return a square mask in another size, each pixel that of the nearest place."""
    if len(mask) == size:
        return mask
    nearest = ((np.arange(size) + 0.5) * len(mask) / size).astype(int)
    return mask[np.ix_(nearest, nearest)]


def _joined(
    parts: Sequence[np.ndarray], size: int, places: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Put arrays (..., H, W) together in one of (..., size, size), at places (x, y)."""
    whole = np.empty((*parts[0].shape[:-2], size, size), dtype=parts[0].dtype)
    for part, (x, y) in zip(parts, places, strict=True):
        whole[..., y : y + part.shape[-2], x : x + part.shape[-1]] = part
    return whole


class BboxDataset(TileDataset):
    """The tiles of one split with their boxes; see `TileDataset`.

    Args:
        tiles: Rows of a tile index, see `tiling.read_tiles`.
        boxes: Its boxes.
        rasters: Identifier -> raster.
        ids: Label -> class id.
        radiometry: How raw values become model input.
        min_visible: Share of an object's area that a transform must leave visible to show it,
            unless its centre is.
        options: See `TileDataset`.
    """

    def __init__(
        self,
        tiles: pd.DataFrame,
        boxes: pd.DataFrame,
        rasters: Mapping[str, fileio.Raster],
        ids: Mapping[str, int],
        radiometry: imutils.Radiometry,
        *,
        min_visible: float = 0.25,
        **options: object,
    ) -> None:
        """Keep the boxes sorted by window, so that items are slices."""
        super().__init__(tiles, rasters, radiometry, **options)
        self.min_visible = min_visible
        boxes = boxes[boxes["window"].isin(tiles["window"])].sort_values("window", kind="stable")
        self.first = np.searchsorted(boxes["window"], self.tiles["window"], side="left")
        self.last = np.searchsorted(boxes["window"], self.tiles["window"], side="right")
        self.boxes = boxes[tiling.BOX_COLUMNS].to_numpy(dtype=np.float64)
        self.ground_boxes = boxes[tiling.GROUND_BOX_COLUMNS].to_numpy(dtype=np.float32, copy=True)
        self.labels = boxes["label"].astype(str).map(ids).to_numpy(dtype=np.int64, copy=True)
        self.objects = boxes["object"].to_numpy(dtype=np.int64, copy=True)
        self.owned = boxes["owned"].to_numpy(dtype=bool, copy=True)

    @override
    def _showing(self) -> Iterator[np.ndarray]:
        for label in np.unique(self.labels):
            before = np.concatenate([[0], np.cumsum(self.labels == label)])
            yield before[self.last] > before[self.first]

    @override
    def _tile(self, index: int) -> Parts:
        window, angle = Window(*self.windows[index].tolist()), self.angles[index]
        rows = slice(self.first[index], self.last[index])
        boxes = tiling.boxes_of_tile(self.boxes[rows], angle, window.width, window.height)
        image, counted = self._read(index, window, window.width)
        return Parts(image, counted, boxes, self.labels[rows], _frames(len(boxes), angle))

    @override
    def _window(self, index: int, size: int) -> Parts:
        angle, window = self.angles[index], self._draw(index)
        boxes, labels = self.views.boxes_in(self.blocks[index], window)
        scale = size / window.width
        boxes = tiling.boxes_of_tile(boxes * scale, angle, size, size)
        image, counted = self._read(index, window, size)
        return Parts(image, counted, boxes, labels, scale * _frames(len(boxes), angle))

    @override
    def _join(self, parts: Sequence[Parts], size: int, places: Sequence[tuple[int, int]]) -> Parts:
        image = torch.from_numpy(_joined([part.image.numpy() for part in parts], size, places))
        counted = _joined([part.counted for part in parts], size, places)
        boxes = [
            part.boxes + np.array([x, y, x, y], dtype=np.float32)
            for part, (x, y) in zip(parts, places, strict=True)
        ]
        labels, frames = (np.concatenate([getattr(p, n) for p in parts]) for n in ITEM_TENSORS[1:])
        return Parts(image, counted, np.concatenate(boxes), labels, frames)

    @staticmethod
    @override
    def _item(parts: Parts) -> tuple[Tensor, Target]:
        boxes = parts.boxes
        thick = (boxes[:, 2:] - boxes[:, :2] >= LEAST_SIDE).all(axis=1)
        target = {n: torch.from_numpy(getattr(parts, n)[thick]) for n in ITEM_TENSORS}
        if not parts.counted.all():
            target["counted"] = torch.from_numpy(np.ascontiguousarray(parts.counted))
        return parts.image, target

    @override
    def _transformed(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        canvas = tuple(image.shape[-2:])
        boxes = target["boxes"]
        # whole numbers, so that a step of 1 px is exact
        centers = ((boxes[:, :2] + boxes[:, 2:]) / 2).round()
        steps = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        points = (centers[:, None] + steps).reshape(-1, 2)
        target["boxes"] = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=canvas)
        target["steps"] = tv_tensors.KeyPoints(points, canvas_size=canvas)
        target["seen"] = tv_tensors.Mask(torch.ones(canvas, dtype=torch.bool))
        if "counted" in target:
            target["counted"] = tv_tensors.Mask(target["counted"])
        image, target = self.transform(tv_tensors.Image(image), target)
        plain = {name: value.as_subclass(Tensor) for name, value in target.items()}
        moved = plain.pop("steps").reshape(-1, 3, 2)
        plain["frames"] = (moved[:, 1:] - moved[:, :1]).mT @ plain["frames"]
        image, seen = image.as_subclass(Tensor).contiguous(), plain.pop("seen")
        limits = torch.tensor([*canvas[::-1]] * 2)
        if seen.all() and ((plain["boxes"] >= 0) & (plain["boxes"] <= limits)).all():
            return image, plain
        return image, self._visible(plain, seen)

    def _visible(self, target: Target, seen: Tensor) -> Target:
        """Leave out the objects that a transform moved or cut off the tile, as the tiling would.

        Args:
            target: What is left of it is cut at the edges.
            seen: Ground that the image still shows, bool (H, W).
        """
        height, width = seen.shape
        boxes, ground = target["boxes"].numpy(), np.array([0, 0, width, height], dtype=np.float32)
        clamped, inside, _ = tiling.show_boxes(boxes, ground, ground, 0.0)
        sums = np.pad(seen.numpy().cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
        (left, top), (right, bottom) = (
            np.floor(clamped[:, :2]).astype(int).T,
            np.ceil(clamped[:, 2:]).astype(int).T,
        )
        count = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        share = count / np.maximum((right - left) * (bottom - top), 1)
        x, y = ((boxes[:, :2] + boxes[:, 2:]) / 2).astype(int).clip(0, [width - 1, height - 1]).T
        enough = share * imutils.box_area(clamped) >= self.min_visible * imutils.box_area(boxes)
        shown = (inside & seen.numpy()[y, x]) | enough
        shown &= (clamped[:, 2:] - clamped[:, :2] >= LEAST_SIDE).all(axis=1)
        target["boxes"] = torch.from_numpy(clamped)
        if not seen.all():
            target["counted"] = seen & target["counted"] if "counted" in target else seen
        return target | {name: target[name][torch.from_numpy(shown)] for name in ITEM_TENSORS}

    @override
    def _place(self, index: int) -> Target:
        rows = slice(self.first[index], self.last[index])
        return super()._place(index) | {
            "truth_boxes": torch.from_numpy(self.ground_boxes[rows]),
            "truth_labels": torch.from_numpy(self.labels[rows]),
            "truth_ids": torch.from_numpy(self.objects[rows]),
            "truth_owned": torch.from_numpy(self.owned[rows]),
        }


class MaskParts(NamedTuple):
    """What an item with a mask is made of.

    Attributes:
        image: float32 (bands, size, size), stretched.
        mask: uint8 (size, size), class ids and `IGNORE`.
    """

    image: Tensor
    mask: np.ndarray


class MaskDataset(TileDataset):
    """The tiles of one split with the class of every pixel; see `TileDataset`.

    Args:
        tiles: Rows of a tile index, see `tiling.read_tiles`.
        rasters: Identifier -> raster.
        labels: Identifier -> the classes of its pixels.
        radiometry: How raw values become model input.
        options: See `TileDataset`.
    """

    def __init__(
        self,
        tiles: pd.DataFrame,
        rasters: Mapping[str, fileio.Raster],
        labels: Mapping[str, LabelSource],
        radiometry: imutils.Radiometry,
        **options: object,
    ) -> None:
        """Keep the labels beside the rasters."""
        super().__init__(tiles, rasters, radiometry, **options)
        self.labels = dict(labels)

    @override
    def _showing(self) -> Iterator[np.ndarray]:
        counts = tiling.counts_of(self.tiles) > 0
        yield from counts[:, counts.any(axis=0)].T

    def _parts(self, index: int, window: Window, size: int) -> MaskParts:
        """Read a square window at the angle of a tile; ground that does not count is unknown."""
        image, counted = self._read(index, window, size)
        everywhere = np.ones((window.height, window.width), dtype=bool)  # what counts is known
        mask = self.labels[self.raster_names[index]].read(window, everywhere)
        mask = _resized(np.rot90(mask, self.angles[index] // 90), size)
        return MaskParts(image, np.where(counted, mask, np.uint8(IGNORE)))

    @override
    def _tile(self, index: int) -> MaskParts:
        window = Window(*self.windows[index].tolist())
        return self._parts(index, window, window.width)

    @override
    def _window(self, index: int, size: int) -> MaskParts:
        return self._parts(index, self._draw(index), size)

    @override
    def _join(
        self, parts: Sequence[MaskParts], size: int, places: Sequence[tuple[int, int]]
    ) -> MaskParts:
        image = _joined([part.image.numpy() for part in parts], size, places)
        mask = _joined([part.mask for part in parts], size, places)
        return MaskParts(torch.from_numpy(image), mask)

    @staticmethod
    @override
    def _item(parts: MaskParts) -> tuple[Tensor, Target]:
        return parts.image, {"mask": torch.from_numpy(parts.mask.astype(np.int64))}

    @override
    def _transformed(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        target = {"mask": tv_tensors.Mask(target["mask"])}
        image, target = self.transform(tv_tensors.Image(image), target)
        mask = target["mask"].as_subclass(Tensor).contiguous()
        return image.as_subclass(Tensor).contiguous(), {"mask": mask}


class PatchDataset(MaskDataset):
    """The patches of a split, see `tilecache.Patches`: items as `MaskDataset` gives them.

    Nothing but the store is read. It is fast where one block is read after the other, as
    `BlockSampler` draws them.

    Args:
        patches: The patches, or some of them: `tiles` has the column `patch`.
        tiles: Which of the patches, with turned twins if any; `patch` is the row of the store.
        radiometry: How raw values become model input.
        options: See `TileDataset`; there are no `views`, for a store has no ground beside a tile.
    """

    def __init__(
        self,
        patches: tilecache.Patches,
        radiometry: imutils.Radiometry,
        *,
        tiles: pd.DataFrame | None = None,
        **options: object,
    ) -> None:
        """Keep the store; take all patches if no tiles are named."""
        if tiles is None:
            tiles = patches.rows.assign(patch=np.arange(len(patches)))
        super().__init__(tiles, {}, {}, radiometry, **options)
        self.patches, self.places = patches, self.tiles["patch"].to_numpy(dtype=np.int64)

    @property
    def blocks_of_tiles(self) -> np.ndarray:
        """Which block of the store each tile is in, int64 (N,)."""
        return self.places // self.patches.block

    @override
    def _parts(self, index: int, window: Window, size: int) -> MaskParts:
        patch, turns = self.patches.read(int(self.places[index])), self.angles[index] // 90
        pixels, mask = np.rot90(patch.image, turns, axes=(1, 2)), np.rot90(patch.mask, turns)
        valid = None if patch.valid is None else np.rot90(patch.valid, turns)
        image = np.ascontiguousarray(self.radiometry.stretch(pixels, valid))
        return MaskParts(torch.from_numpy(image), np.ascontiguousarray(mask))


class TileSampler(Sampler[tuple[int, int]]):
    """Draws the tiles of an epoch, by weight and by difficulty, as many as there are.

    Yields (row of the tile, seed of its view). An epoch depends on the seed, its number and the
    difficulties known when it begins, and on nothing else. A tile that is due 2.3 times comes two
    or three times (systematic sampling), so that with equal weights each comes exactly once.

    Args:
        weights: Of the tiles (N,), > 0.
        seed: Of all epochs.
        hard_negatives: Share (0-1) of an epoch's items that is drawn by difficulty instead of
            weight, once a difficulty is known.
    """

    def __init__(
        self,
        weights: np.ndarray,
        *,
        seed: int = 0,
        hard_negatives: float = 0.0,
    ) -> None:
        """Start at epoch 0, with all difficulties unknown."""
        self.weights = np.asarray(weights, dtype=np.float64)
        self.difficulty = np.full(len(self.weights), np.nan)
        self.seed, self.hard_negatives, self.epoch = seed, hard_negatives, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next epoch to draw; Lightning does so."""
        self.epoch = epoch

    def update(self, tiles: Sequence[int] | Tensor, difficulty: Sequence[float] | Tensor) -> None:
        """Take note of how wrong the model was on tiles, from the next epoch on.

        A tile keeps an exponential moving mean.

        Args:
            tiles: Rows (B,), `tile` of the targets.
            difficulty: Evidence against the model (B,), >= 0, of any scale.

        Raises:
            InputError: A difficulty is negative or not finite.
        """
        rows = torch.as_tensor(tiles).cpu().numpy()
        new = torch.as_tensor(difficulty).detach().double().cpu().numpy()
        if not (np.isfinite(new) & (new >= 0)).all():
            raise InputError(
                f"difficulty of tiles must be finite and >= 0, got {new.tolist()}; a loss that is "
                "not a number must stop the training before"
            )
        before = self.difficulty[rows]
        self.difficulty[rows] = np.where(
            np.isnan(before), new, MEMORY * before + (1 - MEMORY) * new
        )

    def expected_visits(self) -> np.ndarray:
        """Return how often each tile is due in an epoch, float64 (N,); the sum is N."""
        shares = self.weights / self.weights.sum()
        known = ~np.isnan(self.difficulty)
        if self.hard_negatives and self.difficulty[known].sum() > 0:
            hard = np.where(known, self.difficulty, self.difficulty[known].mean())
            shares = (1 - self.hard_negatives) * shares + self.hard_negatives * hard / hard.sum()
        return len(shares) * shares

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Draw the epoch."""
        rng = np.random.default_rng([self.seed, self.epoch])
        count = len(self.weights)
        order = rng.permutation(count)
        due = np.cumsum(self.expected_visits()[order])
        due[-1:] = count  # whatever rounding made of it
        # off 0 and 1, where the rounding of the sums would move a tile over its bound
        visits = np.diff(np.floor(due + rng.uniform(1e-6, 1 - 1e-6)), prepend=0).astype(int)
        rows = rng.permutation(np.repeat(order, visits))
        seeds = rng.integers(2**63, size=count)
        yield from zip(rows.tolist(), seeds.tolist(), strict=True)

    def __len__(self) -> int:
        """Return the number of items of an epoch."""
        return len(self.weights)


class BlockSampler(TileSampler):
    """Draws what `TileSampler` does, but block by block, so that each block is read once an epoch.

    Blocks come in a random order, and so do the tiles of a block, whatever the order in the store.

    Args:
        blocks: Which block each tile is in (N,).
        weights: See `TileSampler`.
        options: Likewise.
    """

    def __init__(self, blocks: np.ndarray, weights: np.ndarray, **options: object) -> None:
        """Keep the blocks, numbered from 0."""
        super().__init__(weights, **options)
        _, self.blocks = np.unique(blocks, return_inverse=True)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Draw the epoch."""
        visits = list(super().__iter__())
        rng = np.random.default_rng([self.seed, self.epoch, 1])
        turn = rng.permutation(self.blocks.max(initial=-1) + 1)
        rows = np.array([row for row, _ in visits], dtype=np.int64)
        yield from (visits[i] for i in np.argsort(turn[self.blocks[rows]], kind="stable"))


class TileBatches(Sampler[list[tuple[int, int]]]):
    """Deals the items of an epoch out to steps and ranks, in chunks of nearly equal size.

    All ranks draw the same epoch; at each step each takes a chunk of its own, so that all make the
    same number of steps and every item comes exactly once. What all ranks learn from at a step does
    not depend on how many they are, if their batches have the same size together.

    Args:
        sampler: Draws the epochs.
        batch_size: Most items of a chunk (where it is hardly more than 1, one more may come).
        workers: Processes that read in turn, each chunks that follow one another in the epoch; 0:
            they are dealt out as they come.
    """

    def __init__(self, sampler: TileSampler, batch_size: int, workers: int = 0) -> None:
        """Start at the beginning of an epoch."""
        self.sampler, self.batch_size, self.workers = sampler, batch_size, workers
        self.epoch: int | None = None  # that was drawn last, by the difficulties known then
        self.first = 0  # step from which on it is dealt
        self.streams = workers  # of the epoch that is dealt
        self.drawn_by, self.visits = sampler.difficulty, []

    def __len__(self) -> int:
        """Return the number of steps of an epoch.

        Raises:
            InputError: There are fewer items than ranks.
        """
        items, size = len(self.sampler), ranks.count()
        if items < size:
            raise InputError(
                f"{items} training tiles cannot be shared out among {size} devices; lower DEVICES, "
                "or raise SAMPLE_SIZES"
            )
        return min(math.ceil(items / (size * self.batch_size)), items // size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Deal the epoch; once more, and it is the same."""
        if self.epoch != self.sampler.epoch:
            self.first, self.streams = 0, self.workers
            self._draw()
        chunks = len(self) * ranks.count()
        for step in range(self.first, len(self)):
            chunk = step * ranks.count() + ranks.rank()
            if self.streams:
                chunk = _in_streams(chunk, chunks, ranks.count() * self.streams)
            low, high = (len(self.visits) * i // chunks for i in (chunk, chunk + 1))
            yield self.visits[low:high]

    def _draw(self) -> None:
        self.epoch, self.drawn_by = self.sampler.epoch, self.sampler.difficulty.copy()
        self.visits = list(self.sampler)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what an epoch that was begun depends on, beside its number."""
        known = {
            "difficulty": self.sampler.difficulty, "drawn_by": self.drawn_by,
            "streams": np.array(self.streams),
        }  # fmt: skip
        return {name: torch.from_numpy(values.copy()) for name, values in known.items()}

    def resume(self, state: Mapping[str, Tensor], epoch: int, step: int) -> None:
        """Go on at a step of an epoch, given what `state_dict` returned there."""
        self.sampler.set_epoch(epoch)
        self.epoch = None
        if step:
            self.sampler.difficulty = state["drawn_by"].numpy().copy()
            self._draw()
            self.first, self.streams = step, int(state.get("streams", self.workers))
        self.sampler.difficulty = state["difficulty"].numpy().copy()


def _in_streams(number: int, count: int, streams: int) -> int:
    """Return where the number-th of so many items lies, if streams take turns to give their next.

    A stream is a run of items; they are of nearly equal length.
    """
    stream = number % streams
    before = sum(len(range(i, count, streams)) for i in range(stream))
    return before + number // streams


class HardTiles(pl.Callback):
    """Tells a sampler, after each training step, how wrong the model was on the batch's tiles."""

    def __init__(self, sampler: TileSampler) -> None:
        """Keep the sampler, which may not want to know."""
        self.sampler = sampler

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: Batch,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Pass on how wrong it was, on the batches of all ranks."""
        if self.sampler.hard_negatives:
            rows = [int(target["tile"]) for target in batch[1]]
            losses = pl_module.tile_difficulty().tolist()
            pairs = itertools.chain.from_iterable(ranks.gathered([*zip(rows, losses, strict=True)]))
            self.sampler.update(*zip(*pairs, strict=True))


class Targets(list[Target]):
    """The targets of a batch, one dictionary per tile.

    Between processes they travel as arrays: torch would make a file of shared memory for each of
    their tensors, which takes longer than all else that a worker does.
    """

    def __reduce__(self) -> tuple[Callable, tuple]:
        """Return what makes them again."""
        arrays = [{name: value.numpy() for name, value in target.items()} for target in self]
        return Targets.of_arrays, (arrays,)

    @classmethod
    def of_arrays(cls, targets: list[dict[str, np.ndarray]]) -> Targets:
        """Make them of arrays."""
        return cls({name: torch.from_numpy(a) for name, a in target.items()} for target in targets)


Batch = tuple[Tensor, Targets]


def collate(items: list[tuple[Tensor, Target]]) -> Batch:
    """Stack images to (B, bands, size, size); of targets there is one dictionary per tile."""
    if not items:
        return torch.empty(0), Targets()
    images, targets = zip(*items, strict=True)
    return torch.stack(images), Targets(targets)


class TileDataModule(pl.LightningDataModule):
    """The tiles of one trial.

    Args:
        tiles: Tile index of the trial's tile size.
        boxes: Its boxes.
        rasters: Identifier -> raster.
        ids: Label -> class id.
        radiometry: How raw values become model input.
        conf: Batch size, worker processes, seed, sampling, augmentation.
        sample_size: Share of the training and validation windows to use.
        labels: Of a segmentation, identifier -> the classes of its raster's pixels.
        cache: Folder of a cache of all tiles, see `tilecache`; None: there is none.
        patches: Folder of the tiles one by one, see `tilecache.cache_patches`, for tiles with masks
            that are taken as they are; None, or not there on this machine: there are none.

    Attributes:
        sampler: Draws the training tiles; a training loop tells it how difficult they were.
        batches: Deals them out; of every step each rank reads its share only.
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
        labels: Mapping[str, LabelSource] | None = None,
        cache: Path | None = None,
        patches: Path | None = None,
    ) -> None:
        """Select the tiles; nothing is read yet."""
        super().__init__()
        self.conf, masks = conf, labels is not None
        limits = (conf.train.max_tiles, conf.validation.max_tiles, conf.test.max_tiles)
        select = partial(splits.split_dataset_train_test, tiles, seed=conf.seed, limits=limits)
        train, validation, test = select(sample_size)
        _, full_validation, _ = select(1.0)
        target_size = conf.segmentation.target_size if masks else None
        if target_size and target_size > train["width"].min():
            raise InputError(
                f"segmentation.target_size must be <= the side of the tiles "
                f"({train['width'].min()} px), got {target_size}; lower it"
            )
        if masks:
            boxes = boxes.iloc[:0]  # of the objects that masks were made of, if any

        stored = patches is not None and tilecache.is_complete(patches)

        def dataset(split: str, part: pd.DataFrame, **options: object) -> TileDataset:
            if stored and options.get("views") is None:
                store = tilecache.open_patches(patches, split)
                places = pd.Series(np.arange(len(store)), index=store.rows["window"])
                part = part.assign(patch=part["window"].map(places))
                return PatchDataset(store, radiometry, tiles=part, **options)
            handles, classes = tilecache.open_cache(cache, split, rasters, labels)
            if masks:
                return MaskDataset(part, handles, classes, radiometry, **options)
            visible = conf.train.min_visible
            return BboxDataset(
                part, boxes, handles, ids, radiometry, min_visible=visible, **options
            )

        augment, views, seen = conf.train.augment, None, train
        if conf.train.random_windows:
            views = RandomViews(
                tiles[tiles["split"] == "train"], boxes, ids,
                zoom=augment.zoom if augment.enabled else 1.0,
                mosaic=augment.mosaic if augment.enabled else 0.0,
                min_visible=conf.train.min_visible,
            )  # fmt: skip
            seen = views.reach(train)
        splits.audit_splits(pd.concat([seen, full_validation, test]), rasters)
        transform = training_transform(augment, radiometry, target_size=target_size)
        self.train = dataset("train", train, transform=transform, views=views)
        weight_of = dict(conf.train.raster_weights or ())
        weights = train["raster"].map(weight_of).fillna(1.0).to_numpy()
        weights = weights * self.train.repeat_factors(conf.train.repeat_threshold)
        draws = {"seed": conf.seed, "hard_negatives": conf.train.hard_negatives}
        in_blocks = isinstance(self.train, PatchDataset)
        if in_blocks:
            self.sampler = BlockSampler(self.train.blocks_of_tiles, weights, **draws)
        else:
            self.sampler = TileSampler(weights, **draws)
        self.batches = TileBatches(self.sampler, conf.batch_size, conf.workers if in_blocks else 0)
        self.validation = dataset("validation", validation, evaluation=True)
        self.full_validation = dataset("validation", full_validation, evaluation=True)
        self.test = dataset("test", test, evaluation=True)

    def train_dataloader(self) -> DataLoader:
        """Return the training batches, in the order and of the tiles that `sampler` draws."""
        return self._loader(self.train, self.batches)

    def val_dataloader(self) -> DataLoader:
        """Return the validation tiles of the sample, for looking while training."""
        return self._evaluation_loader(self.validation)

    def full_validation_dataloader(self) -> DataLoader:
        """Return all validation tiles, the same for every trial; thresholds come from them."""
        return self._evaluation_loader(self.full_validation)

    def test_dataloader(self) -> DataLoader:
        """Return all test tiles."""
        return self._evaluation_loader(self.test)

    def _evaluation_loader(self, dataset: TileDataset) -> DataLoader:
        rows = range(len(dataset))
        size = self.conf.eval_batch_size or self.conf.batch_size
        batches = [list(rows[first : first + size]) for first in rows[::size]]
        # ranks take them in turn; one without any sees an empty one, and so the end of the epoch
        return self._loader(dataset, batches[ranks.rank() :: ranks.count()] or [[]])

    def _loader(self, dataset: TileDataset, batches: Iterable[list]) -> DataLoader:
        return DataLoader(
            dataset, batch_sampler=batches, num_workers=self.conf.workers,
            persistent_workers=self.conf.workers > 0, collate_fn=collate,
        )  # fmt: skip
