"""Synthetic rasters with annotation catalogues: shaded ground with craters, boulders and cones.

A scene is a height field (smooth noise plus objects) lit by a fixed sun. Every pixel and every
object is a function of the seed and its place alone, so any window can be rendered on its own:
rasters of any size are written in flat memory, and neighbouring windows join without a seam.

The catalogue lists every object that lies whole in the raster, and dirt as found in real tables:
rows without a usable diameter or centre, absurd sizes, one-off labels, objects cut by the edge.

Make the samples of the quickstart: `python sampledata.py --output data --seed 0`.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import rasterio.features
import shapely
from rasterio import Affine
from rasterio.crs import CRS
from rasterio.windows import Window as RasterioWindow

import fileio
from ImageData import BOX_COLUMNS, InputError, Window

log = logging.getLogger(__name__)

LAND_COVER_SAMPLES = {  # px, width and height; the second is for prediction
    "land_cover_1": (2560, 2048),
    "land_cover_2": (1536, 1024),
    "land_cover_coarse": (1024, 1024),
}
SKY_SAMPLES = {  # px, width and height; the last is for prediction
    "sky_1": (2048, 1024), "sky_2": (2048, 1024), "sky_3": (2048, 1024), "sky_4": (2048, 1024),
}  # fmt: skip
LAND_COVER_COARSER = {"land_cover_coarse": 2}  # times the side of a pixel
SAMPLES = {  # px, width and height; the third is for prediction, its catalogue to compare with
    "sample_1": (2048, 1536),
    "sample_2": (1536, 1536),
    "sample_3": (2048, 2048),
}
DENSITY = 250.0  # objects per megapixel
MAX_DENSITY = 400.0  # crowding already suppresses a sixth there
DIAMETER_SCALE = 3.0  # px per unit of the diameter column
BLOCK = 512  # px, side of the windows in which a raster is written
CRS_CODE, PIXEL_SIZE, ORIGIN = 32633, 0.5, (500_000.0, 5_400_000.0)  # UTM 33N; m; easting, northing
SCENE_STEP = 40_000.0  # m; scenes of different seeds lie apart, as the audit of splits demands

SUN_AZIMUTH, SUN_ALTITUDE = np.radians(300.0), np.radians(38.0)  # clockwise from up; above horizon
SUN_XY = np.array([np.sin(SUN_AZIMUTH), -np.cos(SUN_AZIMUTH)])  # unit vector towards the sun
AMBIENT = 0.12  # light that reaches shadowed ground, as a share of full sun
GROUND_LEVEL = 108.0  # digital number of level ground
NOISE_LEVEL = 4.0  # digital numbers, standard deviation of the sensor's noise
TINTS = (1.0, 0.93, 0.84)  # brightness of the bands
OCTAVES = {512: 0.16, 256: 0.14, 128: 0.12, 64: 0.10, 32: 0.10, 16: 0.11, 8: 0.12}  # px: steepness
ELLIPTICITY = 0.05  # largest departure of an outline from a circle, as a share of its radius

CUT_SHARE = 0.25  # of the objects that would cross the raster's edge; the others are left out
DIRT_SHARE = 0.018  # spurious rows per object


class Kind(NamedTuple):
    """A population of objects: one candidate per cell of a lattice, unless a stronger is near."""

    label: str
    per_megapixel: float  # candidates at `DENSITY`
    smallest: float  # px, diameter
    largest: float  # px, diameter
    spacing: float  # radii around the centre into which no other object's spacing reaches
    reach: float  # radii around the centre within which pixels may change


# In order of strength: what comes later gives way.
KINDS = (
    Kind("cone", 7.5, 24.0, 50.0, 1.15, 1.1),
    Kind("crater", 16.0, 38.0, 70.0, 1.2, 1.45),
    Kind("crater", 55.0, 19.0, 38.0, 1.2, 1.45),
    Kind("boulder", 117.0, 12.0, 24.0, 1.6, 2.6),
    Kind("crater", 145.0, 10.0, 19.0, 1.25, 1.45),
)
SPACING_LIMIT = max(kind.largest / 2 * kind.spacing for kind in KINDS)  # px
REACH_LIMIT = max(kind.largest / 2 * kind.reach for kind in KINDS) + 4  # px, see `find_objects`


@dataclass(frozen=True)
class Scene:
    """All that determines a sample's pixels and catalogue; sizes in px."""

    width: int
    height: int
    seed: int
    density: float = DENSITY  # objects per megapixel
    bands: int = 1

    def __post_init__(self) -> None:
        """Check the ranges once."""
        if min(self.width, self.height) < 1 or self.seed < 0:
            raise InputError(f"width and height must be >= 1 px and seed >= 0, got {self}")
        if not 0 < self.density <= MAX_DENSITY:
            raise InputError(f"density must be in (0, {MAX_DENSITY:g}] per Mpx, got {self.density}")
        if self.bands not in (1, len(TINTS)):
            raise InputError(f"bands must be 1 or {len(TINTS)}, got {self.bands}")


def generate(
    directory_images: Path, directory_datasets: Path, *, seed: int = 0, force: bool = False
) -> list[tuple[Path, Path]]:
    """Write the quickstart's samples, except those that are there already.

    Args:
        directory_images: Where the rasters go, as `<name>.tif`.
        directory_datasets: Where the catalogues go, as `<name>.csv`.
        seed: At least 0; each sample draws its own from it.
        force: Overwrite what is there.

    Returns:
        The paths of each sample's raster and catalogue.
    """
    paths = []
    for number, (name, (width, height)) in enumerate(SAMPLES.items()):
        image_path = Path(directory_images) / f"{name}.tif"
        csv_path = Path(directory_datasets) / f"{name}.csv"
        paths.append((image_path, csv_path))
        if image_path.exists() and csv_path.exists() and not force:
            log.info("%s and %s exist and stay; force overwrites them", image_path, csv_path)
            continue
        scene_seed = seed * len(SAMPLES) + number  # no two samples of any seeds are the same
        make_sample(image_path, csv_path, width=width, height=height, seed=scene_seed)
    return paths


def make_sample(
    image_path: Path, csv_path: Path, *,
    width: int, height: int, seed: int, density: float = DENSITY, bands: int = 1,
) -> pd.DataFrame:  # fmt: skip
    """Write one sample, a tiled uint8 GeoTIFF and its CSV; only the table is ever held whole.

    Args:
        image_path: The raster to write.
        csv_path: The catalogue to write; it appears after the raster is whole.
        width: Columns in px.
        height: Rows in px.
        seed: At least 0; the same seed gives the same bytes.
        density: Objects per megapixel, about; at most `MAX_DENSITY`.
        bands: 1 for grey, 3 for slightly tinted copies.

    Returns:
        The catalogue, as `make_catalogue` returns it.

    Raises:
        InputError: A number is out of its range.
    """
    scene = Scene(width, height, seed, density, bands)
    easting = ORIGIN[0] + SCENE_STEP * (seed % 10)
    Path(csv_path).unlink(missing_ok=True)  # a raster without its catalogue is unfinished
    profile = {
        "width": width, "height": height, "count": bands, "dtype": "uint8",
        "crs": CRS.from_epsg(CRS_CODE),
        "transform": Affine(PIXEL_SIZE, 0, easting, 0, -PIXEL_SIZE, ORIGIN[1]),
        "photometric": "RGB" if bands == 3 else "MINISBLACK",
    }  # fmt: skip
    with fileio.create_raster(Path(image_path), **profile) as dst:
        for window in _blocks(scene):
            dst.write(render(scene, window), window=RasterioWindow(*window))
    df = make_catalogue(scene)
    fileio.write_table(Path(csv_path), df)
    log.info("wrote %s (%d x %d px) and %s (%d rows)", image_path, width, height, csv_path, len(df))
    return df


def render(scene: Scene, window: Window) -> np.ndarray:
    """Render a window of a scene as uint8 (bands, height, width), each pixel at least 1.

    Only exactly rounded operations touch the pixels, so a pixel is the same in every window.
    """
    x0, y0 = window.x - 1, window.y - 1  # a pixel's slope takes its neighbours' heights
    rows = np.arange(y0, window.y + window.height + 1)
    cols = np.arange(x0, window.x + window.width + 1)
    height = np.zeros((rows.size, cols.size), dtype=np.float32)
    for period, steepness in OCTAVES.items():
        height += np.float32(period * steepness) * _smooth_noise(scene.seed, period, rows, cols)
    albedo = 1 + np.float32(0.25) * _smooth_noise(scene.seed, 200, rows, cols)

    for row in find_objects(scene, window).itertuples():
        left, top, stamp_height, stamp_albedo = _stamp(row)
        here = np.s_[max(top - y0, 0) : max(top - y0 + len(stamp_height), 0),
                     max(left - x0, 0) : max(left - x0 + len(stamp_height), 0)]  # fmt: skip
        part = height[here].shape
        there = np.s_[max(y0 - top, 0) :, max(x0 - left, 0) :]
        height[here] += stamp_height[there][: part[0], : part[1]]
        albedo[here] *= stamp_albedo[there][: part[0], : part[1]]

    slope_x = (height[1:-1, 2:] - height[1:-1, :-2]) / 2
    slope_y = (height[2:, 1:-1] - height[:-2, 1:-1]) / 2
    towards_sun = slope_x * np.float32(SUN_XY[0]) + slope_y * np.float32(SUN_XY[1])
    sun = np.float32(np.sin(SUN_ALTITUDE)) - np.float32(np.cos(SUN_ALTITUDE)) * towards_sun
    sun /= np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    level = np.float32(GROUND_LEVEL / (AMBIENT + np.sin(SUN_ALTITUDE)))
    grey = level * albedo[1:-1, 1:-1] * (np.float32(AMBIENT) + sun.clip(0))

    image = np.empty((scene.bands, window.height, window.width), dtype=np.uint8)
    for band in range(scene.bands):
        noise = _gaussian(scene.seed, 1 + band, rows[1:-1], cols[1:-1])
        value = grey * np.float32(TINTS[band]) + np.float32(NOISE_LEVEL) * noise
        image[band] = np.rint(value).clip(1, 255)  # 0 often stands for missing pixels
    return image


def find_objects(scene: Scene, window: Window) -> pd.DataFrame:
    """List the objects whose pixels may reach into a window, in an order that is always the same.

    A candidate stays unless one that is stronger (an earlier kind, then a higher draw) comes too
    near, whether or not that one stays: the rule looks no further than the nearest neighbours.

    References: Matérn 1960, the second hard-core process; here with several kinds.

    Returns:
        Columns `x, y, diameter` in px, `label, kind`, the draws `depth, turn` in [0, 1), and
        `reach`, half the side of the square in px whose pixels change.
    """
    margin = REACH_LIMIT + 2 * SPACING_LIMIT
    parts = [_candidates(scene, kind, window, margin) for kind in range(len(KINDS))]
    df = pd.concat(parts, ignore_index=True)
    radius = df["diameter"].to_numpy() / 2
    x, y, strength = (df[name].to_numpy() for name in ("x", "y", "strength"))
    spacing = radius * np.take([k.spacing for k in KINDS], df["kind"])
    near = np.hypot(x[:, None] - x, y[:, None] - y) < spacing[:, None] + spacing
    stays = ~(near & (strength[:, None] < strength)).any(axis=1)
    df["reach"] = np.ceil(radius * np.take([k.reach for k in KINDS], df["kind"])).astype(int) + 1
    reach = df["reach"] + 2  # the centre's own pixel, and the neighbour that a slope takes
    touches = (
        (x + reach > window.x) & (x - reach < window.x + window.width)
        & (y + reach > window.y) & (y - reach < window.y + window.height)
    )  # fmt: skip
    return df[stays & touches].drop(columns="strength").reset_index(drop=True)


def make_catalogue(scene: Scene) -> pd.DataFrame:
    """List a scene's objects and its dirt, shuffled.

    Returns:
        Columns `pixel_x, pixel_y` in px, `diameter` in units of `DIAMETER_SCALE` px, `label`; the
        dirty rows put text, NaN and nonsense among them.
    """
    parts = []
    for window in _blocks(scene):
        df = find_objects(scene, window)
        own_x = df["x"].between(window.x, window.x + window.width, inclusive="left")
        own_y = df["y"].between(window.y, window.y + window.height, inclusive="left")
        parts.append(df[own_x & own_y])
    objects = pd.concat(parts, ignore_index=True)
    df = pd.DataFrame(
        {
            "pixel_x": objects["x"].round(2),
            "pixel_y": objects["y"].round(2),
            "diameter": (objects["diameter"] / DIAMETER_SCALE).round(3),
            "label": objects["label"],
        }
    )
    rng = np.random.default_rng([scene.seed, scene.width, scene.height])
    df = pd.concat([df.astype(object), _make_dirt(scene, df, rng)], ignore_index=True)
    return df.iloc[rng.permutation(len(df))].reset_index(drop=True)


def _make_dirt(scene: Scene, good: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Invent rows that a cleaning must find: on empty ground, or doubling a good row."""
    often = ["unknown", -2.0, 400.0, "n/a", np.nan, -0.5, 1250.0]  # in units, like the column
    once = [0.0, 0.0, 5.0]
    count = max(len(often), round(DIRT_SHARE * len(good)) - len(once))
    diameters = once + [often[i % len(often)] for i in range(count)]

    places = rng.uniform(0, (scene.width, scene.height), size=(8 * len(diameters), 2)).round(2)
    if len(good):
        tree = shapely.STRtree(shapely.points(good[["pixel_x", "pixel_y"]].to_numpy()))
        _, distance = tree.query_nearest(
            shapely.points(places), return_distance=True, all_matches=False
        )
        places = places[np.argsort(-distance, kind="stable")]
    dirt = pd.DataFrame(places[: len(diameters)], columns=["pixel_x", "pixel_y"]).astype(object)
    dirt["diameter"] = pd.Series(diameters, dtype=object)
    dirt["label"] = rng.choice(["crater", "boulder"], size=len(dirt))
    dirt.loc[len(once) - 1, "pixel_x"] = "see map"

    doubts = good.sample(min(2, len(good)), random_state=rng)
    doubts["label"] = ["dune?", "ridge?"][: len(doubts)]
    return pd.concat([dirt, doubts.astype(object)], ignore_index=True)


def _candidates(scene: Scene, number: int, window: Window, margin: float) -> pd.DataFrame:
    """Draw a kind's candidates around a window, one per cell of its lattice."""
    kind = KINDS[number]
    cell = 1000.0 / np.sqrt(kind.per_megapixel * scene.density / DENSITY)  # px
    rows, cols = (
        np.arange((start - margin) // cell, (start + length + margin) // cell + 1)
        for start, length in ((window.y, window.height), (window.x, window.width))
    )
    draws = [_uniform(scene.seed, 1000 + 10 * number + i, rows, cols).ravel() for i in range(7)]
    narrowing = 1 - (kind.smallest / kind.largest) ** 2
    df = pd.DataFrame(
        {
            "x": (np.tile(cols, rows.size) + draws[0]) * cell,
            "y": (np.repeat(rows, cols.size) + draws[1]) * cell,
            # Truncated power law: four times fewer objects at twice the size.
            "diameter": kind.smallest / np.sqrt(1 - narrowing * draws[2]),
            "label": kind.label,
            "kind": number,
            "depth": draws[3],
            "turn": draws[4],
            "strength": draws[5] - number,
        }
    )
    radius = df["diameter"] / 2
    edge = np.minimum.reduce([df["x"], df["y"], scene.width - df["x"], scene.height - df["y"]])
    return df[(edge >= radius) | ((edge > radius / 4) & (draws[6] < CUT_SHARE))]


def _stamp(row: NamedTuple) -> tuple[int, int, np.ndarray, np.ndarray]:
    """Shape one object: left and top in px, added height and albedo factor, float32 (side, side).

    The annotated diameter is the crater's rim from crest to crest, the bright blob of a boulder
    without its shadow, and the foot of a cone.
    """
    radius, half = row.diameter / 2, row.reach
    left, top = int(np.floor(row.x)) - half, int(np.floor(row.y)) - half
    dx = (np.arange(left, left + 2 * half + 1) + 0.5 - row.x)[None, :]
    dy = (np.arange(top, top + 2 * half + 1) + 0.5 - row.y)[:, None]
    square = dx * dx + dy * dy
    cosine, sine = np.cos(2 * np.pi * row.turn), np.sin(2 * np.pi * row.turn)
    oval = ((dx * dx - dy * dy) * cosine + 2 * dx * dy * sine) / np.maximum(square, 1e-9)
    t = np.sqrt(square) / (radius * (1 + ELLIPTICITY * oval))  # 1 on the outline
    albedo = np.ones_like(t)

    if row.label == "crater":
        depth, rim = radius * (0.24 + 0.28 * row.depth), radius * 0.14
        bowl = t * t * (depth + rim) - depth
        apron = rim * np.square(((1.35 - t) / 0.35).clip(0))
        height = np.where(t < 1, bowl, apron)
        albedo += 0.12 * ((1.25 - t) / 0.3).clip(0, 1)
    elif row.label == "cone":
        height = radius * (0.60 + 0.15 * row.depth) * ((1 - t).clip(0) - 2 * (0.35 - t).clip(0))
    else:
        height = 0.12 * radius * (1 - t * t).clip(0)
        length = radius * (1.0 + 0.4 * row.depth)
        along = -(dx * SUN_XY[0] + dy * SUN_XY[1])  # px, away from the sun
        across = np.square(dx * SUN_XY[1] - dy * SUN_XY[0])
        tip = np.square(along - along.clip(0, length))
        shadow = (radius * 0.95 - np.sqrt(across + tip) + 0.5).clip(0, 1)
        blob = ((1 - t) * radius + 0.5).clip(0, 1)
        albedo = (1 - 0.65 * shadow) * (1 - blob) + (1.35 + 0.4 * row.depth) * blob
    return left, top, height.astype(np.float32), albedo.astype(np.float32)


def _blocks(scene: Scene) -> Iterator[Window]:
    for y in range(0, scene.height, BLOCK):
        for x in range(0, scene.width, BLOCK):
            yield Window(x, y, min(BLOCK, scene.width - x), min(BLOCK, scene.height - y))


def _smooth_noise(seed: int, period: int, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Noise in (-1, 1), float32 (rows, cols): a cubic B-spline over a lattice of random values."""
    row_cells, col_cells = (np.arange(i[0] // period, i[-1] // period + 4) for i in (rows, cols))
    lattice = (2 * _uniform(seed, period, row_cells, col_cells) - 1).astype(np.float32)
    by_row = sum(
        weight[:, None] * lattice[rows // period - row_cells[0] + k]
        for k, weight in enumerate(_spline_weights(rows, period))
    )
    return sum(
        weight * by_row[:, cols // period - col_cells[0] + k]
        for k, weight in enumerate(_spline_weights(cols, period))
    )


def _spline_weights(index: np.ndarray, period: int) -> tuple[np.ndarray, ...]:
    t = ((index % period) / period).astype(np.float32)
    s = 1 - t
    t2, s2 = t * t, s * s
    return s * s2 / 6, (4 - 6 * t2 + 3 * t * t2) / 6, (4 - 6 * s2 + 3 * s * s2) / 6, t * t2 / 6


def _gaussian(seed: int, stream: int, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Nearly normal noise, mean 0, variance 1, float32 (rows, cols): a sum of four uniforms."""
    bits = _hash(seed, stream, rows, cols)
    total = sum(((bits >> shift) & 0xFFFF).astype(np.float32) for shift in (0, 16, 32, 48))
    return (total / np.float32(65536) - 2) * np.float32(np.sqrt(3))


def _uniform(seed: int, stream: int, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Draws in [0, 1), float64 (rows, cols), one for each place."""
    return (_hash(seed, stream, rows, cols) >> 11) * 2.0**-53


def _hash(seed: int, stream: int, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Random bits, uint64 (rows, cols), that depend on nothing but the arguments' values."""
    bits = _mix(np.full((1, 1), seed, dtype=np.uint64)) ^ stream
    bits = _mix(bits) ^ rows.astype(np.int64).astype(np.uint64)[:, None]
    return _mix(_mix(bits) ^ cols.astype(np.int64).astype(np.uint64)[None, :])


def _mix(bits: np.ndarray) -> np.ndarray:
    """Scramble uint64 words. References: Steele et al. 2014, SplitMix64."""
    bits = bits + 0x9E3779B97F4A7C15
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


# ---------------------------------------------------------------------------------------------
# Land cover
# ---------------------------------------------------------------------------------------------

COVERS = {  # class -> digital numbers of blue, green, red, near infrared
    "grass": (62, 92, 70, 150), "crop": (66, 98, 84, 142), "forest": (42, 66, 44, 138),
    "water": (58, 52, 36, 22), "road": (104, 106, 108, 98), "building": (132, 128, 138, 112),
}  # fmt: skip
FIELD, SHORE = 230.0, 480.0  # px, side of the lattices of fields and of lakes
HOUSES = 26.0  # per megapixel


def make_land_cover(
    image_path: Path,
    vector_path: Path,
    *,
    width: int,
    height: int,
    seed: int,
    bands: int = 4,
    coarser: int = 1,
) -> pd.DataFrame:
    """Write a raster of fields, woods, lakes, roads and houses, and the polygons of all of them.

    Grass has no polygon. Where polygons overlap, the later one is on top. Crops and grass differ by
    the furrows more than by colour, woods by their crowns.

    Args:
        image_path: The raster to write, uint8, window by window.
        vector_path: The polygons to write, of any suffix of `fileio.write_annotations`.
        width: Columns in px.
        height: Rows in px.
        seed: At least 0; the same seed gives the same ground.
        bands: The first of blue, green, red, near infrared, 1 to 4.
        coarser: How many times the pixels are as wide as otherwise, with the mean of what they
            cover; columns, rows and px are those of the raster.

    Returns:
        The polygons: `label`, `geometry` (px), and their boxes.
    """
    rng = np.random.default_rng(seed)
    fine_width, fine_height = width * coarser, height * coarser
    extent = shapely.box(0, 0, fine_width, fine_height)
    parts = {"crop": [], "forest": [], **_lay_cover(rng, fine_width, fine_height)}
    for field in _lay_fields(rng, fine_width, fine_height):
        if (kind := rng.choice(["crop", "forest", "grass"], p=[0.42, 0.3, 0.28])) != "grass":
            parts[kind].append(field)
    df = pd.DataFrame([(kind, shape) for kind, shapes in parts.items() for shape in shapes],
                      columns=["label", "geometry"])  # fmt: skip
    shapes = shapely.intersection(df["geometry"].to_numpy(), extent)
    df = df.assign(geometry=pd.Series(shapes, dtype=object))[shapely.area(shapes) > 1]
    boxes = shapely.bounds(df["geometry"].to_numpy())
    df = df.assign(**dict(zip(BOX_COLUMNS, boxes.T, strict=True))).reset_index(drop=True)
    profile = {
        "width": width, "height": height, "count": bands, "dtype": "uint8",
        "crs": CRS.from_epsg(CRS_CODE), "photometric": "MINISBLACK",
        "transform": Affine(PIXEL_SIZE, 0, ORIGIN[0] + SCENE_STEP * (seed % 10), 0, -PIXEL_SIZE,
                            ORIGIN[1]) * Affine.scale(coarser),
    }  # fmt: skip
    Path(vector_path).unlink(missing_ok=True)
    tree = shapely.STRtree(df["geometry"].to_numpy())
    with fileio.create_raster(Path(image_path), **profile) as dst:
        for window in _blocks(Scene(width, height, seed)):
            fine = Window(*(coarser * number for number in window))
            found = np.sort(tree.query(shapely.box(*_bounds(fine))))
            pixels = _render_cover(df.iloc[found], fine, seed, bands)
            if coarser > 1:
                cells = pixels.reshape(bands, window.height, coarser, window.width, coarser)
                pixels = np.rint(cells.mean(axis=(2, 4))).astype(np.uint8)
            dst.write(pixels, window=RasterioWindow(*window))
    df["geometry"] = shapely.transform(df["geometry"].to_numpy(), lambda xy: xy / coarser)
    df[BOX_COLUMNS] /= coarser
    fileio.write_annotations(Path(vector_path), df, fileio.read_raster(image_path))
    log.info("wrote %s (%d x %d px) and %s (%d polygons)", image_path, width, height, vector_path,
             len(df))  # fmt: skip
    return df


def generate_land_cover(
    directory_images: Path, directory_datasets: Path, *, seed: int = 0, force: bool = False
) -> None:
    """Write the samples of land cover, rasters and GeoPackages, except those that are there."""
    for shift, (name, (width, height)) in enumerate(LAND_COVER_SAMPLES.items()):
        image = Path(directory_images) / f"{name}.tif"
        vector = Path(directory_datasets) / f"{name}.gpkg"
        if force or not (image.exists() and vector.exists()):
            coarser = LAND_COVER_COARSER.get(name, 1)
            make_land_cover(
                image, vector, width=width, height=height, seed=seed + shift, coarser=coarser
            )


def _bounds(window: Window) -> tuple[int, int, int, int]:
    x, y, width, height = window
    return x, y, x + width, y + height


def _lay_fields(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Cut the ground into cells around the jittered nodes of a lattice, with paths between."""
    x, y = np.meshgrid(np.arange(-FIELD, width + FIELD, FIELD),
                       np.arange(-FIELD, height + FIELD, FIELD))  # fmt: skip
    nodes = np.stack([x, y], axis=-1).reshape(-1, 2)
    nodes += rng.uniform(-0.4, 0.4, nodes.shape) * FIELD
    cells = shapely.voronoi_polygons(shapely.multipoints(nodes), ordered=True)
    return shapely.buffer(shapely.get_parts(cells), -3, join_style="mitre")


def _lay_cover(rng: np.random.Generator, width: int, height: int) -> dict[str, list]:
    """Place lakes, roads across the ground, and houses that stand on neither."""
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    lakes = []
    for _ in range(max(1, round(width * height / SHORE**2 * 0.6))):
        center, radius = rng.uniform((0, 0), (width, height)), rng.uniform(35, 110)
        shift = rng.uniform(0, 2 * np.pi, 2)
        reach = 1 + 0.25 * np.sin(2 * angles + shift[0]) + 0.15 * np.sin(3 * angles + shift[1])
        rim = np.stack([np.cos(angles), np.sin(angles)], axis=1) * (radius * reach)[:, None]
        lakes.append(shapely.Polygon(center + rim))
    roads = []
    for turned, (length, across) in enumerate([(height, width), (width, height)]):
        along = np.arange(-50, length + 200, 120.0)
        for place in np.arange(rng.uniform(100, 300), across, 420.0):
            line = np.stack([place + np.cumsum(rng.normal(0, 18, along.size)), along], axis=1)
            line = line[:, ::-1] if turned else line
            roads.append(shapely.LineString(line).buffer(rng.uniform(4, 6), cap_style="flat"))
    houses = []
    taken = shapely.union_all([*lakes, *roads]).buffer(4)
    shapely.prepare(taken)
    for _ in range(max(1, round(width * height / 1e6 * HOUSES * 2))):
        sides, turn = rng.uniform(12, 40, 2), rng.uniform(0, np.pi / 2)
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * sides / 2
        matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        house = shapely.Polygon(corners @ matrix.T + rng.uniform((0, 0), (width, height)))
        if not shapely.intersects(taken, house):
            houses.append(house)
    return {"water": lakes, "road": roads, "building": houses}


def _render_cover(df: pd.DataFrame, window: Window, seed: int, bands: int) -> np.ndarray:
    """Render a window, uint8 (bands, height, width), given the polygons that touch it."""
    names, x0, y0 = list(COVERS), window.x, window.y
    shape_hw = (window.height, window.width)
    kind = np.zeros(shape_hw, dtype=np.uint8)  # grass
    own = np.zeros(shape_hw, dtype=np.int32)  # which polygon
    if len(df):
        moved = shapely.transform(df["geometry"].to_numpy(), lambda xy: xy - (x0, y0))
        kinds = df["label"].map(names.index)
        for values, into in ((kinds, kind), (df.index + 1, own)):
            rasterio.features.rasterize(zip(moved, values, strict=True), out=into)
    rows, cols = np.arange(y0, y0 + shape_hw[0]), np.arange(x0, x0 + shape_hw[1])
    sway = _smooth_noise(seed, 96, rows, cols)
    turn = (own % 7) * np.float32(0.45)  # of the furrows of a field
    furrows = np.sin((cols * np.cos(turn) + rows[:, None] * np.sin(turn)) * np.float32(0.9))
    crowns = _smooth_noise(seed + 1, 7, rows, cols)
    texture = np.select(
        [kind == names.index(name) for name in ("crop", "forest", "building", "grass")],
        [16 * furrows, 30 * crowns, ((own * 37) % 60 - 30).astype(np.float32), 7 * crowns],
        default=np.float32(0),
    )
    image = np.empty((bands, *shape_hw), dtype=np.uint8)
    for band in range(bands):
        levels = np.array([COVERS[name][band] for name in names], dtype=np.float32)
        noise = _gaussian(seed, 11 + band, rows, cols)
        value = (levels[kind] + texture) * (1 + np.float32(0.12) * sway) + 5 * noise
        image[band] = np.rint(value).clip(1, 255)
    return image


# ---------------------------------------------------------------------------------------------
# Sky
# ---------------------------------------------------------------------------------------------

SKY, OBJECT = "sky", "object"  # categories 1 and 2 of the polygons; an object stands before the sky
SUN_RADIANCE = 65_504.0  # the largest number of 16-bit floats: where such pictures are cut off
SUN_RADIUS, HALO = 0.009, 0.05  # radians; the halo is where the sun outshines the sky by far
GRID = 8  # steps per px at which the outlines' vertices lie: exact in binary, and in the file
SURFACES = {  # what is no sky -> reflectance of red, green, blue
    "ground": (0.20, 0.21, 0.13), "building": (0.42, 0.38, 0.34), "tree": (0.07, 0.11, 0.04),
    "wood": (0.08, 0.06, 0.05),
}  # fmt: skip


class Panorama(NamedTuple):
    """All that determines a picture of the sky; sizes in px, angles in radians, y points down."""

    width: int
    height: int
    seed: int
    sun_azimuth: float
    sun_altitude: float
    exposure: float  # factor of all radiances
    cover: float  # 0-1, how much of the sky is cloud


def make_sky(
    image_path: Path, mask_path: Path, *, width: int, height: int, seed: int
) -> pd.DataFrame:
    """Write a float32 panorama of linear radiance, and the mask of its sky: 1, all else 0.

    Clouds belong to the sky. Hills and houses bound it; trees, poles, wires and twigs stand before
    it. The sun is as bright as 16-bit floats can tell, ten thousand times the sky around it.

    Args:
        image_path: The raster to write, three bands, window by window.
        mask_path: The mask to write, one band of bytes.
        width: Columns in px, the whole circle of directions.
        height: Rows in px, from the zenith to the nadir.
        seed: At least 0; the same seed gives the same pixels.

    Returns:
        The polygons whose pixels are the mask: `label` (`SKY`, then `OBJECT` on top of it) and
        `geometry` (px), without holes.

    Raises:
        InputError: A number is out of its range.
    """
    scene = Scene(width, height, seed)
    rng = np.random.default_rng([seed, width, height])
    turn = rng.uniform(0.1, 0.9) * 2 * np.pi
    view = Panorama(width, height, seed, turn, rng.uniform(0.15, 0.8),
                    2.0 ** rng.uniform(-1, 1), rng.uniform(0.35, 0.65))  # fmt: skip
    surfaces, objects = _lay_skyline(rng, width, height)
    skies = _cut_sky(surfaces["geometry"].to_numpy(), width, height)
    df = pd.concat([surfaces, pd.DataFrame({"surface": SKY, "geometry": skies}), objects],
                   ignore_index=True)  # fmt: skip
    tree = shapely.STRtree(df["geometry"].to_numpy())
    size = {"width": width, "height": height}
    picture = {"count": 3, "dtype": "float32", "photometric": "RGB", "predictor": 3}
    Path(mask_path).unlink(missing_ok=True)  # a picture without its mask is unfinished
    with (
        fileio.create_raster(Path(image_path), **size, **picture) as image,
        fileio.create_raster(Path(mask_path), **size, count=1, dtype="uint8") as mask,
    ):
        for window in _blocks(scene):
            found = np.sort(tree.query(shapely.box(*_bounds(window))))
            pixels, is_sky = _render_sky(df.iloc[found], window, view)
            image.write(pixels, window=RasterioWindow(*window))
            mask.write(is_sky[None], window=RasterioWindow(*window))
    log.info("wrote %s (%d x %d px) and %s", image_path, width, height, mask_path)
    labels = np.where(df["surface"] == SKY, SKY, OBJECT)
    return (
        df.assign(label=labels).iloc[len(surfaces) :][["label", "geometry"]].reset_index(drop=True)
    )


def generate_sky(
    directory_images: Path, directory_datasets: Path, *, seed: int = 0, force: bool = False
) -> None:
    """Write the samples of skies, their masks, and the polygons of all, `sky.json` (COCO).

    What is there already stays, unless one of the files is missing.
    """
    images = [Path(directory_images) / f"{name}.tif" for name in SKY_SAMPLES]
    masks = [Path(directory_datasets) / f"{name}_mask.tif" for name in SKY_SAMPLES]
    coco = Path(directory_datasets) / "sky.json"
    if not force and all(path.exists() for path in (*images, *masks, coco)):
        log.info("%s and its pictures exist and stay; force overwrites them", coco)
        return
    coco.unlink(missing_ok=True)
    shown, entries = [], []
    for number, (image, mask, (width, height)) in enumerate(
        zip(images, masks, SKY_SAMPLES.values(), strict=True), start=1
    ):
        own = seed * len(SKY_SAMPLES) + number
        df = make_sky(image, mask, width=width, height=height, seed=own)
        shown.append({"id": number, "file_name": image.name, "width": width, "height": height})
        for label, shape in zip(df["label"], df["geometry"], strict=True):
            x0, y0, x1, y1 = shape.bounds
            entries.append({
                "id": len(entries) + 1, "image_id": number, "iscrowd": 0, "area": shape.area,
                "category_id": 1 + (label == OBJECT), "bbox": [x0, y0, x1 - x0, y1 - y0],
                "segmentation": [shapely.get_coordinates(shape)[:-1].ravel().tolist()],
            })  # fmt: skip
    categories = [{"id": 1, "name": SKY}, {"id": 2, "name": OBJECT}]
    data = {"images": shown, "categories": categories, "annotations": entries}
    fileio.write_json(coco, data)


def _on_grid(shapes: list | np.ndarray) -> np.ndarray:
    return shapely.transform(
        np.asarray(shapes, dtype=object), lambda xy: np.round(xy * GRID) / GRID
    )


def _cut_sky(surfaces: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return the parts of the picture that no surface covers, as polygons without holes."""
    rest = shapely.difference(shapely.box(0, 0, width, height), shapely.union_all(surfaces))
    parts = _on_grid(shapely.get_parts(rest))
    return parts[(shapely.area(parts) > 1) & shapely.is_valid(parts)]


def _lay_skyline(
    rng: np.random.Generator, width: int, height: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Place hills and houses, which reach down to the ground, and what stands before the sky."""
    unit = height / 1024  # px; all sizes are those of 2048 x 1024 px
    x = np.arange(-16 * unit, width + 17 * unit, 8 * unit)
    hills = np.zeros_like(x)
    for size, step in ((26, 300 * unit), (9, 90 * unit), (2.5, 24 * unit)):
        knots = np.arange(-2 * step, width + 2 * step, step) + rng.uniform(0, step)
        hills += size * unit * np.interp(x, knots, rng.normal(0, 1, knots.size))
    rim = height / 2 - 24 * unit - hills
    ground = shapely.Polygon([(x[0], height + 1), *zip(x, rim, strict=True), (x[-1], height + 1)])

    def foot(place: float) -> float:
        return float(np.interp(place, x, rim)) + 30 * unit

    houses, trees, wood = [], [], []
    for place in np.cumsum(rng.exponential(75 * unit, int(width / (75 * unit)))):
        w, h = rng.uniform(28, 110) * unit, rng.uniform(40, 190) * unit * rng.uniform(0.5, 1)
        base, roof = foot(place), rng.uniform(0, 0.45) * w * (rng.uniform() < 0.6)
        houses.append(shapely.Polygon([
            (place, base + 60 * unit), (place, base - h), (place + w / 2, base - h - roof),
            (place + w, base - h), (place + w, base + 60 * unit),
        ]))  # fmt: skip
        if rng.uniform() < 0.5:  # a chimney, or an aerial
            at, thick = place + rng.uniform(0.15, 0.3) * w, rng.choice([1.6, 9.0]) * unit
            houses.append(shapely.box(at, base - h - roof - 22 * unit, at + thick, base))
    for place in np.cumsum(rng.exponential(95 * unit, int(width / (95 * unit)))):
        bare = rng.uniform() < 0.3
        tall = rng.uniform(60, 230) * unit
        if bare:
            wood += _grow(rng, (place, foot(place)), -np.pi / 2, tall * 0.34, 5 * unit, 6)
            continue
        crown = (place, foot(place) - 0.68 * tall)
        trees.append(_crown(rng, crown, tall * rng.uniform(0.24, 0.36), 0.40 * tall))
        wood.append(shapely.LineString([(place, foot(place)), crown]).buffer(tall * 0.025))
    places = np.arange(rng.uniform(0, 200), width, rng.uniform(260, 380)) * 1.0
    tops = [(place, foot(place) - rng.uniform(150, 190) * unit) for place in places]
    for top in tops:
        wood.append(shapely.box(top[0] - 2 * unit, top[1], top[0] + 2 * unit, foot(top[0])))
        wood.append(shapely.box(top[0] - 17 * unit, top[1] + 9 * unit, top[0] + 17 * unit,
                                top[1] + 12 * unit))  # fmt: skip
    t = np.linspace(0, 1, 24)
    for one, other in itertools.pairwise(tops):
        for side in (-14 * unit, 14 * unit):
            low = 9 * unit + 26 * unit * 4 * t * (1 - t)
            along = one[0] + side + t * (other[0] - one[0])
            line = np.stack([along, one[1] + low + t * (other[1] - one[1])], axis=1)
            wood.append(shapely.LineString(line).buffer(0.75, cap_style="flat"))
    frames = []
    for groups in ({"ground": [ground], "building": houses}, {"wood": wood, "tree": trees}):
        rows = [(name, shape) for name, shapes in groups.items() for shape in shapes]
        df = pd.DataFrame(rows, columns=["surface", "geometry"])
        df["geometry"] = pd.Series(_on_grid(df["geometry"].to_numpy()), dtype=object)
        shapes = df["geometry"].to_numpy()
        seen = shapely.intersects(shapes, shapely.box(0, 0, width, height))
        frames.append(df[shapely.is_valid(shapes) & seen].reset_index(drop=True))
    return frames[0], frames[1]


def _crown(
    rng: np.random.Generator, center: tuple[float, float], wide: float, high: float
) -> shapely.Polygon:
    """Outline a tree's crown: an oval with leaves."""
    angles = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    waves = sum(rng.normal(0, 0.34 / n) * np.sin(n * angles + rng.uniform(0, 2 * np.pi))
                for n in (3, 5, 7, 9, 12, 16, 23))  # fmt: skip
    reach = (1 + 0.8 * waves).clip(0.45, 1.5) + rng.uniform(-0.06, 0.06, angles.size)
    rim = np.stack([wide * np.cos(angles), high * np.sin(angles)], axis=1) * reach[:, None]
    return shapely.Polygon(np.array(center) + rim)


def _grow(
    rng: np.random.Generator, start: tuple[float, float], angle: float, length: float,
    thick: float, depth: int,
) -> list[shapely.Polygon]:  # fmt: skip
    """Grow a bare branch and those that fork from it."""
    end = start[0] + length * np.cos(angle), start[1] + length * np.sin(angle)
    branch = shapely.LineString([start, end]).buffer(max(thick, 0.9), quad_segs=2)
    if depth == 1:
        return [branch]
    forks = [angle + side * rng.uniform(0.2, 0.55) for side in (-1, 1)]
    return [branch, *(
        twig for fork in forks
        for twig in _grow(rng, end, fork, length * rng.uniform(0.62, 0.82), thick * 0.62, depth - 1)
    )]  # fmt: skip


def _render_sky(df: pd.DataFrame, window: Window, view: Panorama) -> tuple[np.ndarray, np.ndarray]:
    """Render a window, float32 (3, height, width), and its mask, from polygons that touch it."""
    shape_hw, names = (window.height, window.width), list(SURFACES)
    kind, own = np.zeros(shape_hw, dtype=np.uint8), np.zeros(shape_hw, dtype=np.int32)
    if len(df):
        moved = shapely.transform(df["geometry"].to_numpy(), lambda xy: xy - (window.x, window.y))
        kinds = df["surface"].map({name: i for i, name in enumerate([*names, SKY])})
        for values, into in ((kinds, kind), (df.index + 1, own)):
            rasterio.features.rasterize(zip(moved, values, strict=True), out=into)
    is_sky = kind == len(names)
    rows = np.arange(window.y, window.y + window.height)
    cols = np.arange(window.x, window.x + window.width)
    altitude = ((0.5 - (rows + 0.5) / view.height) * np.pi).astype(np.float32)[:, None]
    azimuth = ((cols + 0.5) / view.width * 2 * np.pi).astype(np.float32)
    cosine = (np.sin(altitude) * np.sin(np.float32(view.sun_altitude))
              + np.cos(altitude) * np.cos(np.float32(view.sun_altitude))
              * np.cos(azimuth - np.float32(view.sun_azimuth)))  # fmt: skip
    away = np.arccos(cosine.clip(-1, 1))  # from the sun
    glow = np.exp(-away / np.float32(0.35)) * 2 + 60 * np.exp(-np.square(away / HALO))
    clouds = _cloud_cover(view, rows, cols)
    haze = np.exp(-altitude.clip(0) / np.float32(0.22))
    lit = np.float32(0.25) + np.float32(0.75) * np.exp(-away / np.float32(0.9))
    detail = _smooth_noise(view.seed + 7, 5, rows, cols)
    rough = _smooth_noise(view.seed + 8, 40, rows, cols)
    sun = np.where(away < SUN_RADIUS, SUN_RADIANCE, 0) * (1 - np.float32(0.97) * clouds)
    image = np.empty((3, *shape_hw), dtype=np.float32)
    for band in range(3):
        blue = np.float32((0.10, 0.22, 0.55)[band]) * (1 - haze) + np.float32(
            (0.85, 0.9, 0.95)[band]) * haze  # fmt: skip
        cloud = np.float32((1.0, 0.98, 0.95)[band]) * (
            np.float32(0.35) + np.float32(1.6) * lit + np.float32(0.3) * rough
        )
        heaven = blue * (1 + glow) * (1 - clouds) + cloud * (1 + glow * np.float32(0.4)) * clouds
        color = np.array([SURFACES[name][band] for name in names] + [0], dtype=np.float32)[kind]
        shade = 1 + np.float32(0.35) * detail + np.float32(0.25) * rough
        shade *= np.float32(0.35) + np.float32(0.09) * (own * 7 % 13).astype(np.float32)
        shade *= _facades(kind == names.index("building"), own, rows, cols)
        earth = color * shade * (np.float32(0.8) + lit) + np.float32(0.004) * glow
        value = np.where(is_sky, heaven + sun, earth) * np.float32(view.exposure)
        grain = 1 + np.float32(0.02) * _gaussian(view.seed, 31 + band, rows, cols)
        image[band] = (value * grain).clip(1e-4, SUN_RADIANCE)
    return image, is_sky.astype(np.uint8)


def _cloud_cover(view: Panorama, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Return how much of each pixel is cloud, 0-1: wide and flat, the flatter the lower."""
    unit = max(view.height // 64, 1)  # px
    noise = np.zeros((rows.size, cols.size), dtype=np.float32)
    for i, (period, share) in enumerate([(160, 1.0), (80, 0.6), (40, 0.35), (16, 0.2), (6, 0.1)]):
        own = max(period * unit // 16, 1)
        noise += np.float32(share) * _smooth_noise(view.seed + 20 + i, own, rows * 2, cols)
    return ((noise + np.float32(view.cover) - np.float32(0.5)) * np.float32(2.2)).clip(0, 1)


def _facades(where: np.ndarray, own: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Return the brightness of houses, whose windows are darker, or mirror the sky; else 1."""
    pane = (rows[:, None] % 13 < 6) & ((cols + own) % 11 < 5)
    bright = np.where(own % 3 == 0, np.float32(2.6), np.float32(0.45))
    return np.where(where & pane, bright, np.float32(1))


def main(arguments: list[str] | None = None) -> None:
    """Write the samples from the command line."""
    parser = argparse.ArgumentParser(description="Write the synthetic sample rasters.")
    parser.add_argument(
        "--output", type=Path, default=Path("data"), help="parent of images/, datasets/"
    )
    parser.add_argument("--seed", type=int, default=0, help="at least 0")
    parser.add_argument("--force", action="store_true", help="overwrite existing samples")
    other = parser.add_mutually_exclusive_group()
    other.add_argument(
        "--land-cover", action="store_true", help="write those of params/landcover.yaml instead"
    )
    other.add_argument(
        "--sky", action="store_true", help="write those of params/hdr_sky.yaml instead"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write = generate_land_cover if options.land_cover else generate
    write = generate_sky if options.sky else write
    write(
        options.output / "images", options.output / "datasets",
        seed=options.seed, force=options.force,
    )  # fmt: skip


if __name__ == "__main__":
    main()
