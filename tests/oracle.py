"""A detector without weights, whose output depends on the pixels only, and ground for it."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pandas as pd
import rasterio.features
import shapely
import torch
from test_LargeRasterOR import contract_of

import fileio
from imutils import Radiometry
from ModelConfig import ModelConfig

LARGEST = 24  # px
CONTRACT = replace(
    contract_of(), tile_size=128, evaluation_overlap=LARGEST,
    radiometry=Radiometry("none", (0.0,), (255.0,), (0.0,), (1.0,)),
)  # fmt: skip


class Oracle(torch.nn.Module):
    """Finds bright rectangles as far as they lie in the tile; the score is their brightness."""

    TASK, labels = "detection", ("bright", "dim")

    def __init__(self, pause=0.0, stop_after=None, offset=(0.0, 0.0)):
        super().__init__()
        self.offset = np.array(offset)  # of the boxes, px of the raster
        self.contract, self.conf = CONTRACT, ModelConfig()
        self.pause, self.stop_after = pause, stop_after
        self.register_buffer("operating_threshold", torch.tensor(0.1))
        self.tiles = 0

    def limit_detections(self, tile_size, score_threshold):
        assert tile_size >= 32
        assert 0 <= score_threshold < 1
        return 1000

    def forward(self, images, frame=None):
        time.sleep(self.pause)
        if self.stop_after is not None and self.tiles >= self.stop_after:
            raise KeyboardInterrupt
        self.tiles += len(images)
        found = [self.find(image[0].numpy()) for image in images]
        if frame is not None:
            for one in found:
                one["boxes"] += (frame @ torch.tensor(self.offset)).float().repeat(2)
        return found

    def find(self, image):
        mask = image > 0.1
        found = rasterio.features.shapes(mask.astype("uint8"), mask=mask, connectivity=8)
        boxes = np.array([shapely.geometry.shape(s).bounds for s, _ in found]).reshape(-1, 4)
        rows = boxes.astype(int).tolist()
        bright = np.array([image[y0:y1, x0:x1].mean() for x0, y0, x1, y1 in rows], np.float32)
        return {
            "boxes": torch.from_numpy(boxes.astype(np.float32)),
            "scores": torch.from_numpy(bright),
            "labels": torch.from_numpy((bright < 0.599).astype(np.int64)),
        }


def draw(path, width, height, *, seed=0, left=0, top=0, **profile):
    """Write bright rectangles that do not touch, `left` and `top` px into empty ground.

    Returns:
        Their boxes, scores and labels, from top to bottom.
    """
    rng = np.random.default_rng(seed)
    cell, rows = LARGEST + 2, []
    pixels = np.zeros((height + top, width + left), np.uint8)
    for y in range(0, height - cell, cell):
        for x in range(0, width - cell, cell):
            if rng.random() < 0.6:
                size = rng.integers(3, LARGEST + 1, 2)
                x0, y0 = np.array([x + left, y + top]) + rng.integers(0, cell - size)
                value = rng.integers(60, 256)
                pixels[y0 : y0 + size[1], x0 : x0 + size[0]] = value
                rows.append([x0, y0, x0 + size[0], y0 + size[1], value / 255, value / 255 < 0.599])
    shape = {"width": width + left, "height": height + top, "count": 1, "dtype": "uint8"}
    with fileio.create_raster(path, **shape, **profile) as dst:
        dst.write(pixels[None])
    df = pd.DataFrame(rows, columns=["xmin", "ymin", "xmax", "ymax", "score", "label"])
    return df.assign(label=np.where(df["label"], "dim", "bright"))


def in_order(df):
    """Sort a catalogue by place, its columns as `draw` has them."""
    columns = ["xmin", "ymin", "xmax", "ymax", "score", "label"]
    return df[columns].sort_values(["ymin", "xmin"], ignore_index=True)


def assert_same(df, truth, shift=(0, 0)):
    """Compare catalogues: the same objects and labels, scores to 1e-4."""
    df = in_order(df)
    df[["xmin", "xmax"]] -= shift[0]
    df[["ymin", "ymax"]] -= shift[1]
    pd.testing.assert_frame_equal(
        df, in_order(truth), check_dtype=False, atol=1e-4, rtol=0, check_column_type=False
    )
