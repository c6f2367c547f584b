"""A raster of two textures, its mask, and tiles of it: what segmentation is tested on."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pandas as pd
import rasterio

import fileio
import splits
import tiling
from ImageData import IGNORE, ImageData, Window
from ModelConfig import ModelConfig

LABELS = ["calm", "rough"]


@dataclass(frozen=True)
class ArrayLabels:
    """The classes of all pixels of a raster, in memory."""

    mask: np.ndarray

    @property
    def made_from(self):
        return self.mask

    def read(self, window: Window) -> np.ndarray:
        out = np.full((window.height, window.width), IGNORE, dtype=np.uint8)
        height, width = self.mask.shape
        x0, y0 = max(window.x, 0), max(window.y, 0)
        x1, y1 = min(window.x + window.width, width), min(window.y + window.height, height)
        out[y0 - window.y : y1 - window.y, x0 - window.x : x1 - window.x] = self.mask[y0:y1, x0:x1]
        return out


def texture(side, seed):
    """Blobs of rough ground, stripes, in calm ground; a strip at the left is not labelled."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    mask = (np.sin(x / 23 + seed) + np.cos(y / 19) > 0.3).astype(np.uint8)
    stripes = 60 * ((x + y) // 3 % 2)
    image = 90 + rng.normal(0, 8, (side, side)) + mask * (stripes - 30)
    mask[:, :5] = IGNORE
    return image.clip(1, 255).astype(np.uint8), mask


def make_segments(folder, side=384, size=64):
    """Write two rasters and index their tiles, with the pixels of each class."""
    images = []
    for seed in range(2):
        pixels, mask = texture(side, seed)
        path = folder / f"ground{seed}.tif"
        with rasterio.open(
            path, "w", driver="GTiff", width=side, height=side, count=1, dtype="uint8",
            tiled=True, blockxsize=128, blockysize=128,
        ) as file:  # fmt: skip
            file.write(pixels, 1)
        objects = pd.DataFrame(
            {"pixel_x": [50.0], "pixel_y": [50.0], "diameter": [20.0], "label": ["rough"],
             "xmin": [40.0], "ymin": [40.0], "xmax": [60.0], "ymax": [60.0]}
        )  # fmt: skip
        images.append(
            ImageData(fileio.read_raster(path), path.stem, objects.iloc[:0], ArrayLabels(mask))
        )
    blocks = splits.ground_blocks(
        [image.raster for image in images], split_by="block", max_tile_size=size,
        block_size=2 * size, test_proportion=0.2, validation_proportion=0.25, seed=0,
    )  # fmt: skip
    return SimpleNamespace(
        images=images, blocks=blocks, tilings=make_tiles(images, blocks, folder, size)
    )


def make_tiles(images, blocks, folder, size):
    """Index tiles as `tiling.make_tiles` does of images with labels."""
    options = tiling.TilingOptions(angles=(90,), evaluation_overlap=16, empty_tile_ratio=100.0)
    (directory,) = tiling.make_tiles(
        images, blocks, [size], folder / "tiles", options, workers=1
    ).values()
    tiles, _ = tiling.read_tiles(directory)
    if "class_0" not in tiles:
        labels = {image.image_identifier: image.labels for image in images}
        counts = [
            np.bincount(labels[t.raster].read(Window(t.x, t.y, t.width, t.height)).ravel(),
                        minlength=256)[: len(LABELS)]
            for t in tiles.itertuples()
        ]  # fmt: skip
        columns = [f"class_{i}" for i in range(len(LABELS))]
        tiles[columns] = np.array(counts)
        tiles["kept"], tiles["reason"] = True, ""
        fileio.write_table(directory / tiling.TILES_NAME, tiles)
    return {size: directory}


def seg_conf(**options):
    conf = ModelConfig(
        task="segmentation", accelerator="cpu", precision="32-true", batch_size=8,
    )  # fmt: skip
    small = {"segmentation.encoder": "mobilenet_v2"}
    conf = conf.with_options(small | options)
    conf.train.lr = 3e-3
    return conf
