"""A classifier of pixels without weights, whose output depends on each pixel only, and ground."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from test_LargeRasterOR import contract_of

import fileio
from imutils import Radiometry
from ModelConfig import ModelConfig

CLASSES = ("background", "land", "water")
CONTRACT = replace(
    contract_of(), tile_size=64, evaluation_overlap=0, anchors=None, detections_per_tile=None,
    radiometry=Radiometry("none", (0.0,), (255.0,), (0.0,), (1e-3,)),
)  # fmt: skip


def interrupt():
    raise KeyboardInterrupt


class Painter(torch.nn.Module):
    """Takes dark pixels for background, gray ones for land, and bright ones for water."""

    TASK, labels = "segmentation", CLASSES

    def __init__(self, stop_after=None, stop=interrupt):
        super().__init__()
        self.contract, self.conf = CONTRACT, ModelConfig()
        self.stop_after, self.stop, self.tiles = stop_after, stop, 0

    def forward(self, images):
        self.tiles += len(images)
        if self.stop_after is not None and self.tiles > self.stop_after:
            self.stop()
        middles = torch.tensor([0.2, 0.51, 0.8])[None, :, None, None]
        return -((10 * (images - middles).abs()) ** 1.3)


def paint(path, width, height, *, seed=0, hole=None, **profile):
    """Write smooth ground of one band with grain; a hole (x0, y0, x1, y1) is 0."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.sin(x / 37 + seed) + np.cos(y / 130) + np.sin((x + y) / 61)
    pixels = (128 + 38 * waves + rng.normal(0, 6, (height, width))).clip(1, 255).astype(np.uint8)
    if hole is not None:
        x0, y0, x1, y1 = hole
        pixels[y0:y1, x0:x1] = 0
    shape = {"width": width, "height": height, "count": 1, "dtype": "uint8"}
    with fileio.create_raster(path, **shape, **profile) as dst:
        dst.write(pixels[None])
    return path
