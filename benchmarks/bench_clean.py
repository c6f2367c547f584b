"""Cleaning of large tables of objects, reading included, against a plain loop over rows.

    python benchmarks/bench_clean.py [--short] [--sizes ROWS ...] [--json FILE]

One row in fifty is dirty. The loop does what the pipeline was first described as: numbers coerced,
boxes generated, corners put in order row by row, filters called for every row.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import common
import geopandas as gpd
import numpy as np
import pandas as pd
import rasterio
import shapely

import annotations
import fileio

SIDE = 60_000  # px, of the raster
SCALE, MAX_DIAMETER = 3, 25  # of the diameters in the table
LABELS = ("crater", "boulder", "cone")


def make(folder: Path, rows: int) -> None:
    """Write an empty raster on the map, a dirty table, and as many polygons of 12 corners."""
    rng = np.random.default_rng(0)
    layout = {"width": SIDE, "height": SIDE, "count": 1, "dtype": "uint8", "sparse_ok": True}
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(0.5, 0, 400_000, 0, -0.5, 5_600_000)}
    with fileio.create_raster(folder / "raster.tif", **layout, **place):
        pass
    diameter = np.char.mod("%.2f", rng.uniform(1, 24, rows)).astype(object)
    for dirt in ("unknown", "", "0", "-3", "400"):
        diameter[rng.integers(rows, size=rows // 250)] = dirt
    x, y = rng.uniform(0, SIDE, (2, rows)).round(2)
    label = rng.choice(LABELS, rows)
    df = pd.DataFrame({"pixel_x": x, "pixel_y": y, "diameter": diameter, "label": label})
    df.to_csv(folder / "table.csv", index=False)
    raster = fileio.read_raster(folder / "raster.tif")
    center = rng.uniform(20, SIDE - 20, (rows, 1, 2))
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    ring = center + rng.uniform(3, 15, (rows, 1, 1)) * np.stack([np.cos(angle), np.sin(angle)], -1)
    shapes = shapely.polygons(raster.to_map(ring.reshape(-1, 2)).reshape(rows, 12, 2))
    polygons = gpd.GeoDataFrame({"label": label}, geometry=shapes, crs=raster.crs)
    polygons.to_file(folder / "polygons.gpkg", engine="pyogrio", use_arrow=True)


def ours(folder: Path, rows: int, name: str, **options: object) -> common.Work:
    """Clean with the project; tell how many objects are left."""
    raster = fileio.read_raster(folder / "raster.tif")
    return lambda: len(annotations.preprocess_df(folder / name, raster, **options).df)


def by_rows(folder: Path, rows: int) -> common.Work:
    """Clean with a loop over rows."""
    keep = (
        lambda x0, y0, x1, y1, d: x0 >= 0 and y0 >= 0,
        lambda x0, y0, x1, y1, d: x1 <= SIDE and y1 <= SIDE,
        lambda x0, y0, x1, y1, d: d < MAX_DIAMETER * SCALE,
    )

    def work() -> int:
        df = pd.read_csv(folder / "table.csv")
        df["diameter"] = pd.to_numeric(df["diameter"], errors="coerce")
        df = df.dropna(subset=["diameter"])
        df.loc[df["diameter"] <= 0, "diameter"] = 0.5
        df["diameter"] = df["diameter"].apply(lambda d: SCALE * d)
        for axis in "xy":
            df[f"{axis}min"] = df[f"pixel_{axis}"] - df["diameter"] / 2
            df[f"{axis}max"] = df[f"pixel_{axis}"] + df["diameter"] / 2
        for index, row in df.iterrows():
            for low, high in (("xmin", "xmax"), ("ymin", "ymax")):
                if row[low] > row[high]:
                    df.loc[index, [low, high]] = row[high], row[low]

        def is_kept(row: pd.Series) -> bool:
            box = row["xmin"], row["ymin"], row["xmax"], row["ymax"], row["diameter"]
            return all(condition(*box) for condition in keep)

        return len(df[df.apply(is_kept, axis=1)])

    return work


if __name__ == "__main__":
    table = {"diameter_scale": SCALE, "max_diameter": MAX_DIAMETER}
    common.main(
        common.Stage(
            title="Cleaning a table",
            size="rows",
            sizes=(1_000_000,),
            short=(100_000, 1_000_000),
            make=make,
            ways={
                "ours, CSV": partial(ours, name="table.csv", **table),
                "row by row, CSV": by_rows,
                "ours, GeoPackage of polygons": partial(ours, name="polygons.gpkg"),
            },
            against={"row by row, CSV": "ours, CSV"},
            agree=(("ours, CSV", "row by row, CSV"),),
            once=("row by row, CSV",),
            aims=(common.Aim("ours, CSV", "row by row, CSV", 100),),
        ),
        __doc__,
    )
