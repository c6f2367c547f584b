"""The tile index, with a look at the pixels, and with chips, against DeepForest and SAHI.

    .bench-venv/bin/python benchmarks/bench_tiling.py [--short] [--sizes SIDE ...] [--json FILE]

The raster has three bands of 8 bits, tiled and compressed by zstd, and 20,000 objects; tiles have
256 px and do not overlap. DeepForest's `split_raster` writes chips always, SAHI's `slice_coco` none
here. Ours writes chips with all cores, as it does by default; the others know one.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import common
import rasterio
from rasterio.windows import Window as RasterioWindow

import fileio
import tiling
from ImageData import Window

TILE_SIZE = 256  # px
OBJECTS = 20_000


def make(folder: Path, side: int) -> None:
    """Write a raster, and its objects as tables for all."""
    common.write_raster(folder / "raster.tif", side)
    boxes = common.draw_boxes(side, OBJECTS, 60).assign(image_path="raster.tif")
    boxes.to_csv(folder / "objects.csv", index=False)
    raster = fileio.read_raster(folder / "raster.tif")
    fileio.write_annotations(folder / "objects.json", common.with_centers(boxes), raster)


def ours(folder: Path, side: int, workers: int | None = 1, **options: object) -> common.Work:
    """Index the raster with the project; tell how many tiles there are."""
    image = common.read_image(folder)

    def work() -> int:
        _, directory = common.index_tiles(
            image, TILE_SIZE, folder / f"tiles_{os.getpid()}",
            tiling.TilingOptions(evaluation_overlap=0, **options), workers=workers,
        )  # fmt: skip
        return len(tiling.read_tiles(directory)[0])

    return work


def read_all(folder: Path, side: int) -> common.Work:
    """Read every window once with rasterio."""
    windows = [RasterioWindow(*window) for window in _grid(side)]

    def work() -> int:
        with rasterio.open(folder / "raster.tif") as src:
            for window in windows:
                src.read(window=window)
        return len(windows)

    return work


def filter_all(folder: Path, side: int) -> common.Work:
    """Try every window with the filter, without an index."""
    raster, windows = fileio.read_raster(folder / "raster.tif"), _grid(side)
    options = {"filters": (tiling.black_pixel_filter,), "pixel_limit": 2500}
    return lambda: tiling.filter_tiles(raster, windows, **options).count("")


def _grid(side: int) -> list[Window]:
    corners = range(0, side, TILE_SIZE)
    return [Window(x, y, TILE_SIZE, TILE_SIZE) for y in corners for x in corners]


def deepforest(folder: Path, side: int) -> common.Work:
    """Split the raster with DeepForest."""
    from deepforest import preprocess

    chips = folder / f"chips_{os.getpid()}"
    return lambda: preprocess.split_raster(
        annotations_file=str(folder / "objects.csv"), path_to_raster=str(folder / "raster.tif"),
        root_dir=str(folder), patch_size=TILE_SIZE, patch_overlap=0, save_dir=str(chips),
    )["image_path"].nunique()  # fmt: skip


def sahi(folder: Path, side: int) -> common.Work:
    """Slice the annotations with SAHI."""
    from sahi import slicing

    return lambda: len(
        slicing.slice_coco(
            str(folder / "objects.json"), str(folder), "sliced", slice_height=TILE_SIZE,
            slice_width=TILE_SIZE, overlap_height_ratio=0, overlap_width_ratio=0,
        )[0]["images"]
    )  # fmt: skip


if __name__ == "__main__":
    common.main(
        common.Stage(
            title="Tiling a raster",
            size="px a side",
            sizes=(4096, 8192, 16384),
            short=(4096, 8192),
            make=make,
            ways={
                "ours, index": ours,
                "DeepForest split_raster, chips": deepforest,
                "SAHI slice_coco, no chips": sahi,
                "ours, chips": partial(ours, workers=None, materialize=True),
                "ours, chips, one thread": partial(ours, materialize=True),
                "ours, black pixels filtered": partial(
                    ours, filters=(tiling.black_pixel_filter,), pixel_limit=2500
                ),
                "ours, the filter alone": filter_all,
                "rasterio, every window read": read_all,
            },
            against={
                "DeepForest split_raster, chips": "ours, chips",
                "SAHI slice_coco, no chips": "ours, index",
                "ours, the filter alone": "rasterio, every window read",
            },
            agree=(
                ("ours, index", "ours, chips", "ours, chips, one thread",
                 "DeepForest split_raster, chips", "SAHI slice_coco, no chips",
                 "ours, the filter alone", "rasterio, every window read"),
            ),
            needs={"DeepForest split_raster, chips": "deepforest",
                   "SAHI slice_coco, no chips": "sahi"},
            largest={"DeepForest split_raster, chips": 8192, "SAHI slice_coco, no chips": 8192},
            once=("SAHI slice_coco, no chips",),
            aims=(
                common.Aim("ours, index", "DeepForest split_raster, chips", 50, memory=0.2),
                common.Aim("ours, index", "SAHI slice_coco, no chips", 50, memory=0.2),
                common.Aim("ours, chips", "DeepForest split_raster, chips", 5),
                common.Aim("ours, the filter alone", "rasterio, every window read", 1 / 1.3),
            ),
        ),
        __doc__,
    )  # fmt: skip
