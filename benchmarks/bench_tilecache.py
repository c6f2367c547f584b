"""Windows with their masks: views of the raster, and the cache, by how slow the input is to read.

    python benchmarks/bench_tilecache.py [--short] [--sizes SIDE ...] [--json FILE]

The raster has three bands of 8 bits; labels are polygons, one per 10,000 px. Windows have 256 px
and lie anywhere. "strips" is the same raster in zstd strips of 64 rows, as badly laid out files
are; "distances" adds a band of distances to the polygons. Making the cache is measured, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import common
import geopandas as gpd
import numpy as np
import pandas as pd
import rasterio
import shapely

import fileio
import masks
import tilecache
import tiling
from ImageData import LabelSource, Window
from ModelConfig import AuxiliaryOptions

SIZE, WINDOWS = 256, 60


def make(folder: Path, side: int) -> None:
    """Write the raster, once more in strips, and its polygons."""
    common.write_raster(folder / "tiled.tif", side)
    with rasterio.open(folder / "tiled.tif") as src:
        profile = src.profile | {"tiled": False, "blockysize": 64}
        profile.pop("blockxsize")
        with rasterio.open(folder / "strips.tif", "w", **profile) as dst:
            for top in range(0, side, 256):
                window = ((top, min(top + 256, side)), (0, side))
                dst.write(src.read(window=window), window=window)
    rng = np.random.default_rng(0)
    centers = rng.uniform(0, side, (side * side // 10_000, 2))
    shapes = shapely.buffer(shapely.points(centers), rng.uniform(8, 24, len(centers)))
    kinds = rng.choice(["a", "b", "c"], len(shapes))
    gpd.GeoDataFrame({"kind": kinds}, geometry=shapes).to_file(folder / "shapes.gpkg")


def _open(folder: Path, kind: str) -> tuple[fileio.Raster, LabelSource]:
    raster = fileio.read_raster(folder / f"{'strips' if kind == 'strips' else 'tiled'}.tif")
    if kind == "distances":
        raster = masks.with_auxiliary_bands(
            raster,
            AuxiliaryOptions(
                aux_vector_file=folder / "shapes.gpkg", aux_vector_dist_maps=True,
                aux_vector_coordinates="pixel",
            ),
        )  # fmt: skip
    labels = masks.read_labels(
        folder / "shapes.gpkg", raster, attribute="kind", coordinates="pixel"
    )
    return raster, labels


def _cache(folder: Path, raster: fileio.Raster, labels: LabelSource, name: str) -> Path:
    side, key = raster.width, raster.identifier
    blocks = pd.DataFrame(
        {"raster": [key], "x": 0, "y": 0, "width": side, "height": side, "split": "train"}
    )
    return tilecache.cache_tiles({key: raster}, {key: labels}, blocks, folder / name, workers=1)


def _windows(raster: fileio.Raster, labels: LabelSource, side: int) -> int:
    corners = np.random.default_rng(1).integers(0, side - SIZE, (WINDOWS, 2))
    total, everywhere = 0, np.ones((SIZE, SIZE), dtype=bool)
    for x, y in corners.tolist():
        window = Window(x, y, SIZE, SIZE)
        image, _, _ = tiling.read_tile(raster, window, 0)
        total += int(image.sum(dtype=float)) + int(labels.read(window, everywhere).sum())
    return total


def views(kind: str, folder: Path, side: int) -> common.Work:
    """Read windows from the raster and its polygons."""
    raster, labels = _open(folder, kind)
    labels.read(Window(0, 0, SIZE, SIZE))
    return partial(_windows, raster, labels, side)


def cached(kind: str, folder: Path, side: int) -> common.Work:
    """Read the same windows from the cache."""
    raster, labels = _open(folder, kind)
    place = _cache(folder, raster, labels, "cache")
    handles, sources = tilecache.open_cache(
        place, "train", {raster.identifier: raster}, {raster.identifier: labels}
    )
    handle, source = handles[raster.identifier], sources[raster.identifier]
    handle.read(Window(0, 0, SIZE, SIZE))
    return partial(_windows, handle, source, side)


def make_cache(kind: str, folder: Path, side: int) -> common.Work:
    """Make the cache, once more each time."""
    raster, labels = _open(folder, kind)
    number = itertools.count()

    def work() -> str:
        return _cache(folder, raster, labels, f"new_{id(raster)}_{next(number)}").name

    return work


KINDS = ("tiled", "strips", "distances")
WAYS: tuple[tuple[str, Callable[..., common.Work]], ...] = (
    ("views", views), ("cache", cached), ("making the cache", make_cache),
)  # fmt: skip

if __name__ == "__main__":
    common.main(
        common.Stage(
            title="Tiles with masks from a cache",
            size="px a side",
            sizes=(4096,),
            short=(2048,),
            make=make,
            ways={f"{kind}: {name}": partial(way, kind) for kind in KINDS for name, way in WAYS},
            against={f"{kind}: views": f"{kind}: cache" for kind in KINDS},
            agree=tuple((f"{kind}: views", f"{kind}: cache") for kind in KINDS),
            runs=3,
        ),
        __doc__,
    )
