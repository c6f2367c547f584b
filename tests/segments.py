"""A raster of two textures, its mask, and tiles of it: what segmentation is tested on."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import rasterio

import fileio
import masks
import splits
import tiling
from ImageData import IGNORE
from ModelConfig import ModelConfig

LABELS = ["calm", "rough"]
CLASSES = {"0": "calm", "1": "rough"}


def texture(side, seed):
    """Blobs of rough ground, stripes, in calm ground; a strip at the left is not labelled."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    mask = (np.sin(x / 23 + seed) + np.cos(y / 19) > 0.3).astype(np.uint8)
    stripes = 60 * ((x + y) // 3 % 2)
    image = 90 + rng.normal(0, 8, (side, side)) + mask * (stripes - 30)
    mask[:, :5] = IGNORE
    return image.clip(1, 255).astype(np.uint8), mask


def write_band(path, pixels):
    height, width = pixels.shape
    with rasterio.open(
        path, "w", driver="GTiff", width=width, height=height, count=1, dtype="uint8",
        tiled=True, blockxsize=128, blockysize=128,
    ) as file:  # fmt: skip
        file.write(pixels, 1)


def make_segments(folder, side=384, size=64):
    """Write two rasters and index their tiles, with the pixels of each class."""
    paths = []
    for seed in range(2):
        pixels, mask = texture(side, seed)
        paths.append((folder / f"ground{seed}.tif", folder / f"mask{seed}.tif"))
        for path, content in zip(paths[-1], (pixels, mask), strict=True):
            write_band(path, content)
    rasters = [fileio.read_raster(path) for path, _ in paths]
    images, _ = masks.label_images(rasters, [path for _, path in paths], classes=CLASSES)
    blocks = splits.ground_blocks(
        [image.raster for image in images], split_by="block", max_tile_size=size,
        block_size=2 * size, test_proportion=0.2, validation_proportion=0.25, seed=0,
    )  # fmt: skip
    return SimpleNamespace(
        images=images, blocks=blocks, tilings=make_tiles(images, blocks, folder, size)
    )


def make_tiles(images, blocks, folder, size):
    """Index tiles as `tiling.make_tiles` does of images with labels."""
    options = tiling.TilingOptions(
        angles=(90,), evaluation_overlap=tiling.evaluation_overlap(images), empty_tile_ratio=100.0
    )
    (directory,) = tiling.make_tiles(
        images, blocks, [size], folder / "tiles", options, workers=1
    ).values()
    return {size: directory}


def seg_conf(**options):
    conf = ModelConfig(
        task="segmentation", accelerator="cpu", precision="32-true", batch_size=8,
    )  # fmt: skip
    small = {"segmentation.encoder": "mobilenet_v2"}
    conf = conf.with_options(small | options)
    conf.train.lr = 3e-3
    return conf
