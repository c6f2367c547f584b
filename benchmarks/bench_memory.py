"""Peak memory and time of each stage against the side of the raster.

    python benchmarks/bench_memory.py [--short] [--sizes SIDE ...] [--json FILE]

The rasters are sparse files of one band. Their first megapixels hold noise, so that a small model
with random weights runs and finds a hundred objects a tile; the rest was never written, so that the
largest stays small on disk. Statistics and training read windows all over the ground.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import common
import numpy as np
import pandas as pd

import fileio
import imutils
import tiling
from ImageData import ImageData

TILE_SIZE, OVERLAP = 256, 32  # px
WRITTEN = 8192**2  # px, or all of a smaller raster
OBJECTS = 20_000
TRAINING_READS = 500
RADIOMETRY = imutils.Radiometry("none", (0.0,), (255.0,), (0.5,), (0.3,))


def make(folder: Path, side: int) -> None:
    """Write a sparse raster of one band, noise in its first rows."""
    rng = np.random.default_rng(0)
    rows = min(side, WRITTEN // side)
    with fileio.create_raster(
        folder / "raster.tif", width=side, height=side, count=1, dtype="uint8", sparse_ok=True,
        bigtiff="yes",
    ) as dst:  # fmt: skip
        for x in range(0, side, 4096):
            width = min(4096, side - x)
            noise = rng.integers(0, 256, (1, rows, width), dtype=np.uint8)
            dst.write(noise, window=((0, rows), (x, x + width)))


def _index(folder: Path, side: int) -> tuple[fileio.Raster, pd.DataFrame, Path]:
    boxes = common.with_centers(common.draw_boxes(side, OBJECTS, 60))
    image = ImageData(fileio.read_raster(folder / "raster.tif"), "raster", boxes)
    blocks, directory = common.index_tiles(
        image, TILE_SIZE, folder / f"tiles_{os.getpid()}",
        tiling.TilingOptions(angles=(90, 180, 270), evaluation_overlap=60), shares=(0.2, 0.25),
    )  # fmt: skip
    return image.raster, blocks[blocks["split"] == "train"], directory


def index_tiles(folder: Path, side: int) -> common.Work:
    """Index the tiles."""
    return lambda: len(tiling.read_tiles(_index(folder, side)[2])[0])


def measure_statistics(folder: Path, side: int) -> common.Work:
    """Measure the radiometry of the training ground."""
    raster, ground, _ = _index(folder, side)

    def work() -> int:
        pixels = tiling.sample_pixels(ground, {"raster": raster}, seed=0)
        imutils.measure_radiometry(pixels, "percentile")
        return pixels.shape[1]

    return work


def read_training_windows(folder: Path, side: int) -> common.Work:
    """Read random training windows."""
    from datasets import BboxDataset

    raster, _, directory = _index(folder, side)

    def work() -> int:
        tiles, boxes = tiling.read_tiles(directory)
        train = tiles[(tiles["split"] == "train") & tiles["kept"]]
        dataset = BboxDataset(train, boxes, {"raster": raster}, {"object": 0}, RADIOMETRY)
        rows = np.random.default_rng(0).integers(0, len(dataset), TRAINING_READS)
        return sum(len(dataset[int(row)][0]) for row in rows)

    return work


def _prepare(folder: Path) -> object:
    import predict

    return predict.prepare(
        make_model(), folder / "raster.tif", folder / f"out_{os.getpid()}.gpkg",
        score_threshold=0.005, device="cpu", override=("radiometry",),
    )  # fmt: skip


def predict_raster(folder: Path, side: int) -> common.Work:
    """Predict it to a GeoPackage."""
    import predict

    task = _prepare(folder)
    return lambda: predict.run(task).count


def skip_tiles(folder: Path, side: int) -> common.Work:
    """Find out which tiles were never written."""
    task = _prepare(folder)
    strips = range(len(task.predictor.strip_tops))
    return lambda: sum(tile.skipped for tile in task.predictor.tiles(strips))


def make_model() -> object:
    """Return a small model with random weights."""
    import torch

    from LargeRasterOR import LargeRasterORModel
    from ModelConfig import ModelConfig
    from networks import Anchors, DataContract

    torch.manual_seed(0)
    anchors = Anchors(tuple((8.0 * 2**i, 12.0 * 2**i) for i in range(5)), (1.0,), 2)
    contract = DataContract(
        tile_size=TILE_SIZE, bands=(1,), band_count=1, dtype="uint8", radiometry=RADIOMETRY,
        anchors=anchors, detections_per_tile=100, resolution=None, split_hash="",
        evaluation_overlap=OVERLAP,
    )  # fmt: skip
    conf = ModelConfig(backbone="mobilenet_v3_large", fpn_channels=16)
    return LargeRasterORModel(["a", "b"], conf, contract).eval()


if __name__ == "__main__":
    common.main(
        common.Stage(
            title="Growing with the raster",
            size="px a side",
            sizes=(4096, 8192, 16384, 65536),
            short=(4096, 8192),
            make=make,
            ways={
                "tile index": index_tiles,
                "statistics": measure_statistics,
                f"{TRAINING_READS} training windows": read_training_windows,
                "prediction": predict_raster,
                "empty tiles skipped": skip_tiles,
            },
            grows_to=math.isqrt(WRITTEN),
            memory="peak",
            runs=3,
        ),
        __doc__,
    )
