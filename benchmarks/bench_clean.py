"""Time the cleaning of large annotation files: median of five runs, file reading included.

python benchmarks/bench_clean.py [--rows 1000000]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import rasterio
import shapely

sys.path.insert(0, str(Path(__file__).parent.parent))

import annotations
import fileio

log = logging.getLogger("bench_clean")


def write_dirty_table(path: Path, rows: int, rng: np.random.Generator) -> None:
    """Write a table of which one row in fifty is dirty."""
    diameter = np.char.mod("%.2f", rng.uniform(1, 24, rows)).astype(object)
    for dirt in ("unknown", "", "0", "-3", "400"):
        diameter[rng.integers(rows, size=rows // 250)] = dirt
    x, y = rng.uniform(0, 60_000, (2, rows)).round(2)
    label = rng.choice(["crater", "boulder", "cone"], rows)
    df = pd.DataFrame({"pixel_x": x, "pixel_y": y, "diameter": diameter, "label": label})
    df.to_csv(path, index=False)


def make_raster(path: Path) -> fileio.Raster:
    """Make an empty raster of 60,000 px a side on the map."""
    side = 60_000
    layout = {"width": side, "height": side, "count": 1, "dtype": "uint8", "sparse_ok": True}
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(0.5, 0, 400_000, 0, -0.5, 5_600_000)}
    with fileio.create_raster(path, **layout, **place):
        pass
    return fileio.read_raster(path)


def write_polygons(path: Path, raster: fileio.Raster, rows: int, rng: np.random.Generator) -> None:
    """Write polygons of 12 corners, all over a raster, as a GeoPackage in its CRS."""
    center = rng.uniform(20, raster.width - 20, (rows, 1, 2))
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    ring = center + rng.uniform(3, 15, (rows, 1, 1)) * np.stack([np.cos(angle), np.sin(angle)], -1)
    shapes = shapely.polygons(raster.to_map(ring.reshape(-1, 2)).reshape(rows, 12, 2))
    label = rng.choice(["crater", "boulder", "cone"], rows)
    df = gpd.GeoDataFrame({"label": label}, geometry=shapes, crs=raster.crs)
    df.to_file(path, engine="pyogrio", use_arrow=True)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        raster = make_raster(Path(folder) / "raster.tif")
        table, polygons = Path(folder) / "table.csv", Path(folder) / "polygons.gpkg"
        write_dirty_table(table, rows, rng)
        write_polygons(polygons, raster, rows, rng)
        for path, options in ((table, {"diameter_scale": 3, "max_diameter": 25}), (polygons, {})):
            times = []
            for _ in range(5):
                start = time.perf_counter()
                cleaned = annotations.preprocess_df(path, raster, **options)
                times.append(time.perf_counter() - start)
            log.info(
                "%s of %d rows (%.0f MB): median %.2f s of %s; kept %d, quarantine %d",
                path.suffix, rows, path.stat().st_size / 1e6, statistics.median(times),
                [round(t, 2) for t in times], len(cleaned.df), len(cleaned.quarantine),
            )  # fmt: skip


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
