"""Steps from geometries to boxes: repair, reprojection, points and polygons to pixels.

Frames hold their geometries in the column `geometry`; every step returns a new frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyproj
import shapely

import fileio
from ImageData import BOX_COLUMNS

GIVEN = "given_diameter"  # column: what a point's diameter is after scaling, in m or px
POINT, POLYGON, MULTIPOINT, MULTIPOLYGON, COLLECTION = 0, 3, 4, 6, 7  # shapely's type ids


def from_columns(df: pd.DataFrame, column_names: Sequence[str]) -> pd.DataFrame:
    """Make points of two columns (x, y), or boxes of four (xmin, ymin, xmax, ymax)."""
    values = df[list(column_names)].to_numpy(dtype="float64")
    shapes = shapely.points(values) if len(column_names) == 2 else shapely.box(*values.T)
    return df.assign(geometry=pd.Series(shapes, index=df.index, dtype=object))


def drop_empty(df: pd.DataFrame) -> pd.DataFrame:
    """Drop the rows whose geometry is missing or empty."""
    shapes = df["geometry"].to_numpy()
    return df[~(shapely.is_missing(shapes) | shapely.is_empty(shapes))]


def drop_infinite(df: pd.DataFrame) -> pd.DataFrame:
    """Drop the rows with a coordinate that is no finite number."""
    coordinates, rows = shapely.get_coordinates(df["geometry"].to_numpy(), return_index=True)
    keep = np.ones(len(df), dtype=bool)
    keep[rows[~np.isfinite(coordinates).all(axis=1)]] = False
    return df[keep]


def repair(df: pd.DataFrame) -> pd.DataFrame:
    """Make invalid polygons valid, reduce collections to the polygons in them, and single points.

    A multipoint with one point is that point.
    """
    shapes = df["geometry"].to_numpy().copy()
    kinds = shapely.get_type_id(shapes)
    single = (kinds == MULTIPOINT) & (shapely.get_num_geometries(shapes) == 1)
    shapes[single] = shapely.get_geometry(shapes[single], 0)
    areal = np.isin(shapely.get_type_id(shapes), (POLYGON, MULTIPOLYGON, COLLECTION))
    broken = np.flatnonzero(areal)[~shapely.is_valid(shapes[areal])]
    shapes[broken] = shapely.make_valid(shapes[broken])
    for row in np.flatnonzero(shapely.get_type_id(shapes) == COLLECTION):
        parts = shapely.get_parts(shapely.get_parts(shapes[row]))
        parts = parts[shapely.get_type_id(parts) == POLYGON]
        if len(parts):
            shapes[row] = parts[0] if len(parts) == 1 else shapely.multipolygons(parts)
    return with_geometry(df, shapes)


def drop_other(df: pd.DataFrame) -> pd.DataFrame:
    """Drop the rows whose geometry is neither one point nor polygons: lines, several points."""
    kinds = shapely.get_type_id(df["geometry"].to_numpy())
    return df[np.isin(kinds, (POINT, POLYGON, MULTIPOLYGON))]


def drop_all_but_polygons(df: pd.DataFrame) -> pd.DataFrame:
    """Drop the rows whose geometry is missing, or is no polygons."""
    return df[~shapely.is_missing(polygons_of(df))]


def measure_points(
    df: pd.DataFrame, column_name: str, default_diameter: float, scale: float
) -> pd.DataFrame:
    """Add `given_diameter`, scaled, to points, NaN for polygons; drop points without a number.

    Args:
        df: Frame with `geometry`.
        column_name: The column with diameters; without it, all points have the default.
        default_diameter: Replaces diameters of zero and below.
        scale: What diameters are multiplied by.
    """
    points = shapely.get_type_id(df["geometry"].to_numpy()) == POINT
    values = np.full(len(df), default_diameter)
    if column_name in df.columns:
        values = pd.to_numeric(df[column_name], errors="coerce").astype("float64").to_numpy()
        values = np.where(values <= 0, default_diameter, values)
    values = np.where(points, values * scale, np.nan)
    keep = np.isfinite(values) | ~points
    return df[keep].assign(**{GIVEN: values[keep]})


def move_to_pixels(df: pd.DataFrame, raster: fileio.Raster, crs: pyproj.CRS) -> pd.DataFrame:
    """Move geometries from a CRS to px of the raster; those that have no place there get None."""
    own = pyproj.CRS.from_wkt(raster.crs)
    shapes = df["geometry"].to_numpy().copy()
    coordinates, rows = shapely.get_coordinates(shapes, return_index=True)
    if transformer := find_transformer(crs, own):
        coordinates = np.column_stack(transformer.transform(*coordinates.T))
    inside = np.ones(len(df), dtype=bool)
    inside[rows[~np.isfinite(coordinates).all(axis=1)]] = False
    shapes[~inside] = None
    shapely.set_coordinates(shapes, raster.to_pixel(coordinates[inside[rows]]))
    return with_geometry(df, shapes)


def find_transformer(crs: pyproj.CRS, own: pyproj.CRS) -> pyproj.Transformer | None:
    """Return what takes coordinates, x first, from one CRS to another; None: they are the same."""
    if crs.equals(own, ignore_axis_order=True):
        return None
    return pyproj.Transformer.from_crs(crs, own, always_xy=True)


def add_bounds(df: pd.DataFrame, raster: fileio.Raster, *, in_metres: bool) -> pd.DataFrame:
    """Add the boxes (px) of geometries in px.

    A polygon has its bounds for box. A point has its `given_diameter`; if that is in metres, its
    circle on the ground is an ellipse in pixels, as pixels need not be square there.
    """
    shapes = df["geometry"].to_numpy()
    boxes = shapely.bounds(shapes)
    points = shapely.get_type_id(shapes) == POINT
    if points.any():
        xy = boxes[points, :2]
        extents = df[GIVEN].to_numpy()[points, None] / 2
        if in_metres:
            extents = extents * _pixels_per_metre(raster.metres_per_pixel(xy))
        boxes[points] = np.hstack([xy - extents, xy + extents])
    return df.assign(**dict(zip(BOX_COLUMNS, boxes.T, strict=True)))


def _pixels_per_metre(jacobian: np.ndarray) -> np.ndarray:
    """Return half the extent in px, (N, 2) x and y, of a circle of 1 m under (N, 2, 2) m per px.

    It is the length of the rows of the inverse; NaN or infinite where there is none.
    """
    (a, b), (c, d) = np.moveaxis(jacobian, 0, -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.stack([np.hypot(d, b), np.hypot(c, a)], axis=-1) / abs(a * d - b * c)[:, None]


def drop_infinite_boxes(df: pd.DataFrame) -> pd.DataFrame:
    """Drop the rows whose box has a side that is no finite number."""
    return df[np.isfinite(df[BOX_COLUMNS].to_numpy()).all(axis=1)]


def with_geometry(df: pd.DataFrame, shapes: np.ndarray) -> pd.DataFrame:
    """Set the geometries of a frame, one or None for each row."""
    return df.assign(geometry=pd.Series(shapes, index=df.index, dtype=object))


def polygons_of(df: pd.DataFrame) -> np.ndarray:
    """Return the polygons of a frame, None for rows with anything else or nothing."""
    shapes = np.full(len(df), None)
    if "geometry" in df.columns:
        values = df["geometry"].to_numpy(dtype=object)
        shapes = np.where(shapely.is_geometry(values), values, None)
    areal = np.isin(shapely.get_type_id(shapes), (POLYGON, MULTIPOLYGON))
    return np.where(areal, shapes, None)
