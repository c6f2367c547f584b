"""Class maps of whole rasters: time beside the bare model's, and peak memory, by the raster's side.

    python benchmarks/bench_maps.py [--short] [--sizes SIDE ...] [--json FILE]

The rasters are sparse files of one band. Their first megapixels hold noise, so that a small network
with random weights has work; the rest was never written, so that the largest stays small on disk.
The bare model sees as many tiles of noise, in memory, in batches of the same size.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import bench_memory
import common
import torch
from bench_memory import RADIOMETRY, WRITTEN
from torch import nn

import predict
import strips
from ModelConfig import ModelConfig
from networks import DataContract

TILE_SIZE, OVERLAP = 256, 32  # px
LABELS = ("background", "a", "b", "c")
CHANNELS = 24  # of a network that takes as long for a tile as a small U-Net


class Network(nn.Module):
    """Some convolutions with random weights."""

    TASK, labels = "segmentation", LABELS

    def __init__(self) -> None:
        """Draw the weights."""
        super().__init__()
        torch.manual_seed(0)
        self.conf = ModelConfig()
        self.contract = DataContract(
            tile_size=TILE_SIZE, bands=(1,), band_count=1, dtype="uint8", radiometry=RADIOMETRY,
            resolution=None, split_hash="", evaluation_overlap=OVERLAP,
        )  # fmt: skip
        wide = [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(6)]
        layers = [nn.Conv2d(1, CHANNELS, 3, padding=1), *wide]
        self.layers = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
        self.head = nn.Conv2d(CHANNELS, len(LABELS), 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (B, C, H, W)."""
        return self.head(self.layers(images))


def _prepare(folder: Path, **options: object) -> predict.Task:
    return predict.prepare(
        Network(), folder / "raster.tif", folder / f"map_{os.getpid()}.tif", device="cpu",
        precision="32-true", override=("radiometry",), **options,
    )  # fmt: skip


def _windows(task: predict.Task) -> int:
    numbers = range(len(task.predictor.strip_tops))
    return sum(tile.window is not None for tile in task.predictor.tiles(numbers))


def map_raster(folder: Path, side: int) -> common.Work:
    """Map it; return how many tiles the model saw."""
    task = _prepare(folder)
    return lambda: predict.run(task).predicted


def map_with_extras(folder: Path, side: int) -> common.Work:
    """Map it, with probabilities and uncertainty."""
    task = _prepare(folder, probabilities=True, uncertainty=True)
    return lambda: predict.run(task).predicted


def map_unblended(folder: Path, side: int) -> common.Work:
    """Map it, each pixel from one tile of the same grid."""
    task = _prepare(folder, smooth_prediction=False)
    return lambda: predict.run(task).predicted


def run_model(folder: Path, side: int) -> common.Work:
    """Show the bare model as many tiles."""
    task = _prepare(folder)
    count, model = _windows(task), task.predictor.model
    images = torch.rand(strips.CPU_BATCH, 1, TILE_SIZE, TILE_SIZE)

    def work() -> int:
        with torch.inference_mode():
            for start in range(0, count, strips.CPU_BATCH):
                model(images[: count - start])
        return count

    return work


if __name__ == "__main__":
    common.main(
        common.Stage(
            title="Class maps",
            size="px a side",
            sizes=(4096, 8192, 65536),
            short=(2048, 4096),
            make=bench_memory.make,
            ways={
                "map": map_raster,
                "map, probabilities, uncertainty": map_with_extras,
                "map, not blended": map_unblended,
                "bare model": run_model,
            },
            against={"bare model": "map"},
            agree=(("map", "map, probabilities, uncertainty", "map, not blended", "bare model"),),
            aims=(common.Aim("map", "bare model", speed=0.9),),
            grows_to=math.isqrt(WRITTEN),
            memory="peak",
            runs=3,
        ),
        __doc__,
    )
