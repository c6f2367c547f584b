"""Random windows of a raster: bare rasterio, this project, torchgeo, DeepForest's chips.

    .bench-venv/bin/python benchmarks/bench_read.py [--short] [--sizes SIDE ...] [--json FILE]

The raster is tiled and zstd-compressed, of three bands of 8 bits; windows have 256 px. Loaders give
float tensors with boxes, in batches of 8; their workers have started when the clock does.
DeepForest reads PNG chips that are cut beforehand.
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
import splits
import tiling
from ImageData import BOX_COLUMNS, ImageData, Window

SIZE, BATCH = 256, 8  # px, side of a window; windows
WINDOWS = 3_000  # of a measurement
CHIPS = 1_000  # read again and again
OBJECTS_PER_WINDOW = 20


def make(folder: Path, side: int) -> None:
    """Write the raster 256 rows at a time, its objects, and chips of it."""
    rng = np.random.default_rng(0)
    grain = np.tile(rng.integers(0, 24, (3, SIZE, 1024), dtype=np.uint8), -(-side // 1024))
    x = np.arange(side) / side
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(1, 0, 400_000, 0, -1, 5_600_000)}
    layout = {"width": side, "height": side, "count": 3, "dtype": "uint8"}
    with fileio.create_raster(folder / "raster.tif", **layout, **place) as dst:
        for top in range(0, side, SIZE):
            ground = 100 + 100 * np.sin(9 * x) * np.cos(9 * top / side)
            rows = ground.astype(np.uint8) + np.roll(grain, top // 7, axis=2)[..., :side]
            dst.write(rows, window=RasterioWindow(0, top, side, SIZE))
    center = rng.integers(12, side - 12, ((side // SIZE) ** 2 * OBJECTS_PER_WINDOW, 2))
    radius = rng.integers(3, 11, (len(center), 1))
    df = pd.DataFrame(np.hstack([center - radius, center + radius]), columns=BOX_COLUMNS)
    df.assign(label="object").to_csv(folder / "objects.csv", index=False)
    rows = []
    (folder / "chips").mkdir()
    with rasterio.open(folder / "raster.tif") as src:
        for i, window in enumerate(random_windows(side, CHIPS)):
            pixels = src.read(window=RasterioWindow(*window)).transpose(1, 2, 0)
            Image.fromarray(pixels).save(folder / "chips" / f"{i}.png")
            corner = rng.integers(0, SIZE - 24, (OBJECTS_PER_WINDOW, 2))
            boxes = np.hstack([corner, corner + rng.integers(6, 22, (OBJECTS_PER_WINDOW, 1))])
            rows += [[f"{i}.png", *box, "object"] for box in boxes.tolist()]
    table = pd.DataFrame(rows, columns=["image_path", *BOX_COLUMNS, "label"])
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
    raster = fileio.read_raster(folder / "raster.tif")

    def work() -> int:
        return sum(
            raster.read_valid(window, raster.read(window)).shape[0] > 0
            for window in random_windows(side, WINDOWS)
        )

    return work


def our_loader(folder: Path, side: int, workers: int) -> common.Work:
    """Load random training windows, unvaried, with the project."""
    from datasets import TileDataModule
    from imutils import Radiometry
    from ModelConfig import ModelConfig

    raster = fileio.read_raster(folder / "raster.tif")
    boxes = pd.read_csv(folder / "objects.csv")
    low, high = (boxes[BOX_COLUMNS[i : i + 2]].to_numpy() for i in (0, 2))
    center = (low + high) / 2
    df = boxes.assign(pixel_x=center[:, 0], pixel_y=center[:, 1], diameter=(high - low)[:, 0])
    blocks = splits.ground_blocks(
        [raster], split_by="block", max_tile_size=SIZE, block_size=None, test_proportion=0.01,
        validation_proportion=0.01, seed=0,
    )  # fmt: skip
    directory = tiling.make_single_size(
        SIZE, [ImageData(raster, "raster", df)], blocks, folder / f"tiles_{workers}",
        tiling.TilingOptions(evaluation_overlap=0), workers=1,
    )  # fmt: skip
    tiles, boxes = tiling.read_tiles(directory)
    conf = ModelConfig(batch_size=BATCH, workers=workers)
    for name in ("flips", "turns"):
        setattr(conf.train.augment, name, False)
    conf.train.augment.enabled = False
    radiometry = Radiometry("none", (0.0,) * 3, (255.0,) * 3, (0.5,) * 3, (0.25,) * 3)
    module = TileDataModule(
        tiles, boxes, {"raster": raster}, {"object": 0}, radiometry, conf
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


def chip_loader(folder: Path, side: int) -> common.Work:
    """Load DeepForest's dataset of chips with two workers, unvaried."""
    from deepforest.datasets.training import BoxDataset
    from torch.utils.data import DataLoader

    dataset = BoxDataset(
        str(folder / "chips" / "chips.csv"), str(folder / "chips"), augmentations=[],
        label_dict={"object": 0},
    )  # fmt: skip
    loader = DataLoader(
        dataset, batch_size=BATCH, shuffle=True, num_workers=2, collate_fn=dataset.collate_fn,
        persistent_workers=True,
    )  # fmt: skip
    return _take(loader, lambda batch: len(batch[0]))


def torchgeo_loader(folder: Path, side: int) -> common.Work:
    """Load random windows with torchgeo's raster dataset and sampler, two workers; no boxes."""
    from torch.utils.data import DataLoader
    from torchgeo.datasets import RasterDataset, stack_samples
    from torchgeo.samplers import RandomGeoSampler

    dataset = RasterDataset(str(folder / "raster.tif"))
    sampler = RandomGeoSampler(dataset, size=SIZE, length=WINDOWS)
    loader = DataLoader(
        dataset, batch_size=BATCH, sampler=sampler, num_workers=2, collate_fn=stack_samples,
        persistent_workers=True,
    )  # fmt: skip
    return _take(loader, lambda batch: len(batch["image"]))


if __name__ == "__main__":
    common.main(
        common.Stage(
            title=f"Reading {WINDOWS} random windows",
            size="px a side",
            sizes=(4096, 16384),
            short=(4096,),
            make=make,
            ways={
                "ours, loader, 2 workers": partial(our_loader, workers=2),
                "ours, loader, 1 worker": partial(our_loader, workers=1),
                "ours, loader, no workers": partial(our_loader, workers=0),
                "DeepForest, chips, 2 workers": chip_loader,
                "torchgeo, 2 workers, no boxes": torchgeo_loader,
                "rasterio, bare windows": bare,
                "ours, bare windows and validity": ours,
            },
            ours="ours, loader, 2 workers",
            aims=(common.Aim("ours, loader, 2 workers", "DeepForest, chips, 2 workers", 2),),
            needs={
                "DeepForest, chips, 2 workers": "deepforest",
                "torchgeo, 2 workers, no boxes": "torchgeo",
            },
        ),
        __doc__,
    )
