"""Random windows of a raster: bare rasterio, this project, torchgeo, DeepForest's chips.

    .bench-venv/bin/python benchmarks/bench_read.py [--short] [--sizes SIDE ...] [--json FILE]

The raster is tiled and zstd-compressed, of three bands of 8 bits; windows have 256 px, and lie
anywhere. Loaders give float tensors with boxes, in batches of 8; their workers have started when
the clock does. DeepForest reads PNG chips that are cut beforehand. All have GDAL's block cache as
the project sets it, 64 MB.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import common
import numpy as np
import pandas as pd
import rasterio
from PIL import Image
from rasterio.windows import Window as RasterioWindow

import fileio
import tiling
from ImageData import BOX_COLUMNS, Window

SIZE, BATCH = 256, 8  # px, side of a window; windows
WINDOWS = 3_000  # of a measurement
CHIPS = 1_000  # read again and again
OBJECTS_PER_WINDOW = 20


def make(folder: Path, side: int) -> None:
    """Write the raster 256 rows at a time, its objects, and chips of it."""
    common.write_raster(folder / "raster.tif", side)
    boxes = common.draw_boxes(side, (side // SIZE) ** 2 * OBJECTS_PER_WINDOW, 20)
    boxes.to_csv(folder / "objects.csv", index=False)
    rng = np.random.default_rng(0)
    lines = []
    (folder / "chips").mkdir()
    with rasterio.open(folder / "raster.tif") as src:
        for i, window in enumerate(random_windows(side, CHIPS)):
            pixels = src.read(window=RasterioWindow(*window)).transpose(1, 2, 0)
            Image.fromarray(pixels).save(folder / "chips" / f"{i}.png")
            corner = rng.integers(0, SIZE - 24, (OBJECTS_PER_WINDOW, 2))
            boxes = np.hstack([corner, corner + rng.integers(6, 22, (OBJECTS_PER_WINDOW, 1))])
            lines += [[f"{i}.png", *box, "object"] for box in boxes.tolist()]
    table = pd.DataFrame(lines, columns=["image_path", *BOX_COLUMNS, "label"])
    table.to_csv(folder / "chips" / "chips.csv", index=False)


def random_windows(side: int, count: int) -> list[Window]:
    """Draw windows inside the raster."""
    corners = np.random.default_rng(1).integers(0, side - SIZE, (count, 2))
    return [Window(int(x), int(y), SIZE, SIZE) for x, y in corners]


def bare(folder: Path, side: int) -> common.Work:
    """Read with one open dataset of rasterio."""
    src = rasterio.open(folder / "raster.tif")
    windows = [RasterioWindow(*window) for window in random_windows(side, WINDOWS)]
    return lambda: sum(src.read(window=window).shape[1] > 0 for window in windows)


def ours(folder: Path, side: int) -> common.Work:
    """Read with the project's raster, pixels and which of them are valid."""
    raster, windows = fileio.read_raster(folder / "raster.tif"), random_windows(side, WINDOWS)
    return lambda: sum(raster.read_valid(w, raster.read(w)).shape[0] > 0 for w in windows)


def our_loader(folder: Path, side: int, workers: int) -> common.Work:
    """Load random training windows, unvaried, with the project."""
    from datasets import TileDataModule
    from imutils import Radiometry
    from ModelConfig import ModelConfig

    image = common.read_image(folder)
    options = tiling.TilingOptions(evaluation_overlap=0)
    _, directory = common.index_tiles(image, SIZE, folder / f"tiles_{workers}", options)
    tiles, boxes = tiling.read_tiles(directory)
    conf = ModelConfig(batch_size=BATCH, workers=workers)
    conf.train.augment.enabled = False
    radiometry = Radiometry("none", (0.0,) * 3, (255.0,) * 3, (0.5,) * 3, (0.25,) * 3)
    module = TileDataModule(
        tiles, boxes, {"raster": image.raster}, {"object": 0}, radiometry, conf
    )  # fmt: skip
    return _take(module.train_dataloader(), lambda batch: len(batch[0]))


def _take(loader: Iterable[object], count: Callable[[object], int]) -> common.Work:
    """Return what loads until `WINDOWS` have come, epoch after epoch; the first batch is here."""
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    next(batches)

    def work() -> int:
        loaded = 0
        while loaded < WINDOWS:
            loaded += count(next(batches))
        return loaded

    return work


def chip_loader(folder: Path, side: int, workers: int) -> common.Work:
    """Load DeepForest's dataset of chips, unvaried."""
    from deepforest.datasets.training import BoxDataset
    from torch.utils.data import DataLoader

    dataset = BoxDataset(
        str(folder / "chips" / "chips.csv"), str(folder / "chips"), augmentations=[],
        label_dict={"object": 0},
    )  # fmt: skip
    loader = DataLoader(
        dataset, batch_size=BATCH, shuffle=True, num_workers=workers, collate_fn=dataset.collate_fn,
        persistent_workers=workers > 0,
    )  # fmt: skip
    return _take(loader, lambda batch: len(batch[0]))


def torchgeo_loader(folder: Path, side: int, workers: int) -> common.Work:
    """Load random windows with torchgeo's raster dataset and sampler; no boxes."""
    from torch.utils.data import DataLoader
    from torchgeo.datasets import RasterDataset, stack_samples
    from torchgeo.samplers import RandomGeoSampler

    dataset = RasterDataset(str(folder / "raster.tif"))
    sampler = RandomGeoSampler(dataset, size=SIZE, length=WINDOWS)
    loader = DataLoader(
        dataset, batch_size=BATCH, sampler=sampler, num_workers=workers, collate_fn=stack_samples,
        persistent_workers=workers > 0,
    )  # fmt: skip
    return _take(loader, lambda batch: len(batch["image"]))


if __name__ == "__main__":
    common.main(
        common.Stage(
            title=f"Reading {WINDOWS} random windows",
            size="px a side",
            sizes=(8192, 16384),
            short=(8192,),
            make=make,
            ways={
                "ours, loader, 2 workers": partial(our_loader, workers=2),
                "ours, loader, 1 worker": partial(our_loader, workers=1),
                "ours, loader, no workers": partial(our_loader, workers=0),
                "DeepForest, chips, 2 workers": partial(chip_loader, workers=2),
                "DeepForest, chips, no workers": partial(chip_loader, workers=0),
                "torchgeo, no boxes, 2 workers": partial(torchgeo_loader, workers=2),
                "torchgeo, no boxes, no workers": partial(torchgeo_loader, workers=0),
                "rasterio, bare windows": bare,
                "ours, bare windows and validity": ours,
            },
            against={
                "DeepForest, chips, 2 workers": "ours, loader, 2 workers",
                "DeepForest, chips, no workers": "ours, loader, no workers",
                "torchgeo, no boxes, 2 workers": "ours, loader, 2 workers",
                "torchgeo, no boxes, no workers": "ours, loader, no workers",
                "rasterio, bare windows": "ours, bare windows and validity",
            },
            aims=(
                common.Aim("ours, loader, 2 workers", "DeepForest, chips, 2 workers", 2),
                common.Aim("ours, loader, no workers", "DeepForest, chips, no workers", 2),
            ),
            needs={
                "DeepForest, chips, 2 workers": "deepforest",
                "DeepForest, chips, no workers": "deepforest",
                "torchgeo, no boxes, 2 workers": "torchgeo",
                "torchgeo, no boxes, no workers": "torchgeo",
            },
        ),
        __doc__,
    )
