"""Rasters by windows: handles, validity, regions, map coordinates, new files.

A raster is whatever GDAL opens: GeoTIFF, COG, VRT, JPEG 2000, PNG, and files behind `https://`,
`s3://` and GDAL's other virtual file systems. FITS images are read through a VRT made on the fly,
OpenEXR and Radiance HDR images through a tiled GeoTIFF that is made of them once.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import pyproj
import rasterio
import rasterio.features
import rasterio.shutil
import shapely
from pyproj.exceptions import ProjError
from rasterio._err import CPLE_BaseError  # some calls let GDAL's own errors through
from rasterio.enums import ColorInterp, Interleaving, MaskFlags, Resampling
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window as RasterioWindow

from artefacts import (
    address_of,
    atomic_path,
    content_fingerprint,
    exclusive,
    find_full,
    set_time,
)
from hdr import is_hdr, open_hdr
from ImageData import InputError, Window

log = logging.getLogger(__name__)

# A raster without a map reference is an ordinary one here.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)

# GDAL would keep up to a twentieth of the memory full of blocks that were read once.
os.environ.setdefault("GDAL_CACHEMAX", "64")  # MB

FALSE_ALPHA = 0.2  # share of half-transparent pixels from which an alpha band looks like data
MAX_BANDS = 1024  # read at once; a damaged header may promise tens of thousands
MAX_BLOCK_BYTES = 2**29  # decoded at once; a header may declare more than any memory holds
OVERVIEW_CELLS = 8  # px of an overview along a window's side, at least, that tell if it is empty
MAX_OPEN_DATASETS = 32  # per thread; GDAL keeps a file descriptor and buffers for each
# a remote folder is not listed, and no file is looked for beside the raster
REMOTE = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_HTTP_MAX_RETRY": "3",
    "GDAL_HTTP_RETRY_DELAY": "1",
}  # fmt: skip
FITS_TYPES = {8: "Byte", 16: "Int16", 32: "Int32", 64: "Int64", -32: "Float32", -64: "Float64"}
FITS_UNSIGNED = {16: ("UInt16", 2**15), 32: ("UInt32", 2**31)}  # stored signed, with this BZERO

# UnicodeDecodeError: of text in a damaged header
GDAL_ERRORS = (RasterioError, CRSError, CPLE_BaseError, UnicodeDecodeError)

CACHE_VARIABLE = "LARGE_RASTER_CACHE"  # of the environment: the folder of copies of HDR images

SMALLEST_OVERVIEW = 512  # px, longest side; halving ends below it

_open_datasets = threading.local()

_Cells = tuple[np.ndarray, np.ndarray, np.ndarray]  # see `_any_cell`


@dataclass(frozen=True)
class Regions:
    """Which ground of a raster counts: inside an area of interest, outside what is ignored.

    Attributes:
        aoi: Polygons in px of the raster; None: everywhere.
        ignored: Polygons in px of the raster; they win over `aoi`.
    """

    aoi: tuple[shapely.Geometry, ...] | None = None
    ignored: tuple[shapely.Geometry, ...] = ()

    @cached_property
    def _trees(self) -> tuple[shapely.STRtree | None, shapely.STRtree]:
        aoi = None if self.aoi is None else shapely.STRtree(self.aoi)
        return aoi, shapely.STRtree(self.ignored)

    def mask(self, window: Window) -> np.ndarray:
        """Tell which pixels of a window count, by their centres, as bool (height, width)."""
        aoi, ignored = self._trees
        counted = _paint(ignored, window) ^ True
        return counted if aoi is None else counted & _paint(aoi, window)

    def contain(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Tell which points (px) lie on ground that counts, as bool (N,)."""
        points = shapely.points(x, y)
        aoi, ignored = self._trees
        counted = np.full(len(points), aoi is None)
        if aoi is not None:
            counted[aoi.query(points, predicate="intersects")[0]] = True
        counted[ignored.query(points, predicate="intersects")[0]] = False
        return counted

    def digest(self) -> str:
        """Return a text that is the same for the same polygons."""
        parts = [shapely.to_wkb(list(group)).tolist() for group in (self.aoi or (), self.ignored)]
        text = b"|".join([bytes(self.aoi is None), *parts[0], b"|", *parts[1]])
        return hashlib.sha256(text).hexdigest()[:16]

    def reach(self, boxes_xyxy: np.ndarray) -> np.ndarray:
        """Tell which boxes (N, 4) may hold ground that counts, as bool (N,); the others hold none.

        A box that only several ignored polygons together cover is not found out.
        """
        boxes = shapely.box(*np.asarray(boxes_xyxy, dtype=float).T)
        aoi, ignored = self._trees
        inner = shapely.buffer(boxes, -1e-6, cap_style="square", join_style="mitre")
        reached = np.full(len(boxes), aoi is None)
        if aoi is not None:
            reached[aoi.query(inner, predicate="intersects")[0]] = True  # to touch is not enough
        reached[ignored.query(boxes, predicate="covered_by")[0]] = False
        return reached


def _paint(tree: shapely.STRtree, window: Window) -> np.ndarray:
    x, y, width, height = window
    shapes = tree.geometries[tree.query(shapely.box(x, y, x + width, y + height))]
    # a margin keeps the cut edge off the centres of pixels
    shapes = shapely.clip_by_rect(shapes, x - 1, y - 1, x + width + 1, y + height + 1)
    shapes = shapes[~shapely.is_empty(shapes)]
    if not len(shapes):
        return np.zeros((height, width), dtype=bool)
    return rasterio.features.geometry_mask(
        shapes, (height, width), rasterio.Affine.translation(x, y), invert=True
    )


@dataclass(frozen=True)
class Raster:
    """A handle to a raster: its shape and kind, and windows of it on demand.

    The handle is small and picklable. Each thread of each process opens the file once and keeps at
    most `MAX_OPEN_DATASETS` open.

    Attributes:
        path: The file; its stem names the raster. Of a remote one, its address.
        source: What GDAL opens: the file, an address in its virtual file systems, a VRT, or the
            copy of an HDR image.
        width: Columns in px.
        height: Rows in px.
        bands: One-based indexes of the bands that `read` returns, in that order.
        band_count: Number of bands of the file that hold pixels; an alpha band is none.
        dtype: NumPy name of the pixels' type.
        nodata: Per band that is read, the value that marks missing pixels, if the file declares
            one that its type can hold.
        crs: Coordinate reference system as WKT, if the file declares one.
        transform: The six affine coefficients from pixels to map units.
        block_shape_hw: Height and width of the file's internal blocks.
        masked: Whether an alpha band or a mask tells valid pixels.
        files: All files on this machine that hold it: masks beside it, the sources of a VRT.
        alpha: One-based index of the alpha band, if there is one and it is not read as data.
        regions: Which ground counts; None: all of it.
        original: The raster in its own pixels, if it is read in larger or smaller ones.
        target_resolution: Side of those on the ground in m; see `resampled`.
    """

    path: Path
    source: str
    width: int
    height: int
    bands: tuple[int, ...]
    band_count: int
    dtype: str
    nodata: tuple[float | None, ...]
    crs: str | None
    transform: tuple[float, ...]
    block_shape_hw: tuple[int, int]
    masked: bool
    files: tuple[str, ...] = ()
    alpha: int | None = None
    regions: Regions | None = None
    original: Raster | None = None
    target_resolution: float | None = None

    @classmethod
    def open(
        cls, path: Path | str, bands: Sequence[int] | None = None, source: str | None = None
    ) -> Raster:
        """Read a raster's header.

        Args:
            path: A file, or an address that starts with `https://`, `s3://`, `gs://`, `az://` or
                `/vsi`.
            bands: One-based indexes of the bands to read, in the order wanted; None takes all but
                an alpha band. An alpha band that is named holds data, and masks nothing.
            source: A VRT of the file that is to be read in its place.

        Raises:
            InputError: The file is missing, or not a raster, or has no such band.
        """
        plain, local = _source(path)
        source = source or plain
        with _opening(path, source, local=local) as src:
            if not src.count:
                raise InputError(f"{path} holds no band of its own, only {src.subdatasets}")
            if src.count > MAX_BANDS and bands is None:
                raise InputError(
                    f"{path} has {src.count} bands, at most {MAX_BANDS} can be read; name those "
                    "wanted with BANDS, or restore the file if it has fewer"
                )
            colored = tuple(
                i for i, kind in zip(src.indexes, src.colorinterp, strict=True)
                if kind != ColorInterp.alpha
            )  # fmt: skip
            bands = colored if bands is None else tuple(bands)
            strangers = [band for band in bands if not 1 <= band <= src.count]
            if strangers or not bands:
                raise InputError(
                    f"{path} has the bands 1 to {src.count}, got {strangers or 'none'} in BANDS "
                    f"{list(bands)}; name those that are there"
                )
            dtypes, nodata, masks = src.dtypes, src.nodatavals, src.mask_flag_enums
            dtype = np.result_type(*(dtypes[band - 1] for band in bands))
            if dtype.kind not in "uif":
                raise InputError(
                    f"{path} holds {dtype} pixels, which are no numbers to order; convert it, for "
                    "example to amplitudes in float32"
                )
            _check_blocks(src, path)
            a, b, _, d, e, _ = tuple(src.transform)[:6]
            if (src.crs and not np.isfinite(a * e - b * d)) or a * e == b * d:
                raise InputError(
                    f"the geotransform of {path}, {tuple(src.transform)[:6]}, maps all pixels onto "
                    "a line; georeference the raster anew"
                )
            alpha = next((i for i in src.indexes if i not in {*colored, *bands}), None)
            flags = {flag for band in bands for flag in masks[band - 1]}
            own_mask = MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags
            return cls(
                path=Path(path), source=source, width=src.width, height=src.height, bands=bands,
                band_count=len({*colored, *bands}), dtype=dtype.name,
                nodata=tuple(_representable(nodata[band - 1], dtype) for band in bands),
                crs=src.crs.to_wkt() if src.crs else None, transform=tuple(src.transform)[:6],
                block_shape_hw=tuple(src.block_shapes[0]),
                masked=own_mask or alpha is not None, alpha=alpha,
                files=_files_of(src, Path(path)),
            )  # fmt: skip

    @property
    def identifier(self) -> str:
        """Name of the raster in every table and file: the stem of its path."""
        return self.path.stem

    @property
    def light(self) -> bool:
        """Whether its values are light of many decades, to be looked at in their logarithm."""
        return is_hdr(self.path)

    @property
    def own(self) -> Raster:
        """The raster without bands that are not of its file; see `masks.AuxiliaryRaster`."""
        return self

    @property
    def pixel_size_xy(self) -> tuple[float, float]:
        """Width and height of a pixel, as it is read, in pixels of the file; see `resampled`."""
        if self.original is None:
            return 1.0, 1.0
        size = ~rasterio.Affine(*self.original.transform) @ rasterio.Affine(*self.transform)
        return size.a, size.e

    @property
    def made_from(self) -> dict[str, object]:
        """What a result that was made from this raster depends on, for manifests."""
        files = [Path(file) for file in self.files]
        shape = [self.width, self.height, self.bands, self.nodata, self.masked]
        regions = self.regions.digest() if self.regions else None
        made_from = {"source": self.path.name, "files": files, "shape": shape, "regions": regions}
        if self.original is not None:
            made_from["resolution"] = self.target_resolution
        return made_from

    def with_regions(self, regions: Regions | None) -> Raster:
        """Return a handle to the same file whose ground counts in these regions only."""
        return replace(self, regions=regions)

    @contextmanager
    def anew(self) -> Iterator[rasterio.DatasetReader]:
        """Open the file apart from the datasets that are kept: none of its blocks is cached.

        Raises:
            InputError: The file cannot be opened, or what is done with it fails.
        """
        with _opening(self.path, self.source, local=not _is_remote(self.source)) as src:
            yield src

    # -- pixels ---------------------------------------------------------------------------------

    def read(self, window: Window) -> np.ndarray:
        """Read a window as (bands, height, width), in the raster's own type.

        What lies outside the raster is filled with nodata, or 0 where the file declares none.

        Raises:
            InputError: The file cannot be read there (names the window).
        """
        inside, (top, left) = self._clip(window)
        if inside == window:
            return self._read_inside(inside)
        image = np.empty((len(self.bands), window.height, window.width), dtype=self.dtype)
        image[:] = np.array([value or 0 for value in self.nodata], self.dtype)[:, None, None]
        if inside.width and inside.height:
            image[:, top : top + inside.height, left : left + inside.width] = self._read_inside(
                inside
            )
        return image

    def read_valid(self, window: Window, image: np.ndarray) -> np.ndarray:
        """Tell the valid pixels of a window as bool (height, width).

        Invalid are pixels outside the raster, those that the file's alpha band or mask excludes,
        those that are nodata in every band, and those that are not finite in any band.

        Args:
            window: The window.
            image: What `read` returned for it.
        """
        inside, (top, left) = self._clip(window)
        if inside == window and not self.masked:
            return self._has_value(image)
        valid = np.zeros((window.height, window.width), dtype=bool)
        if inside.width and inside.height:
            rows, cols = slice(top, top + inside.height), slice(left, left + inside.width)
            if self.masked:
                with self._reading(inside) as src:
                    valid[rows, cols] = src.dataset_mask(window=RasterioWindow(*inside)) > 0
            else:
                valid[rows, cols] = True
        return valid & self._has_value(image)

    def read_counted(self, window: Window, valid: np.ndarray) -> np.ndarray:
        """Tell which pixels of a window are ground that counts: valid, and in the regions.

        Args:
            window: The window.
            valid: What `read_valid` returned for it.
        """
        return valid if self.regions is None else valid & self.regions.mask(window)

    @property
    def all_counted(self) -> bool:
        """Whether every pixel is known to be valid and to count, without reading it."""
        plain = not self.masked and set(self.nodata) == {None} and self.regions is None
        return plain and np.dtype(self.dtype).kind != "f"

    def may_count(self, windows: np.ndarray) -> np.ndarray:
        """Tell which windows may hold ground that counts, without reading their pixels.

        The regions tell, the blocks that a sparse GeoTIFF never got (such ground is deemed empty),
        and, where pixels can be invalid, overviews made by averaging: a pixel of theirs is invalid
        only if all under it are. Windows should lie side by side: all they span is looked at.

        Args:
            windows: (N, 4), x, y, width, height in px.

        Returns:
            bool (N,): False where no pixel counts.
        """
        boxes = np.hstack([windows[:, :2], windows[:, :2] + windows[:, 2:]])
        may = np.ones(len(boxes), bool) if self.regions is None else self.regions.reach(boxes)
        for look in (self._written_cells, self._overview_cells):
            with suppress(InputError):  # what is damaged tells nothing; reading the windows will
                if may.any() and (seen := look(boxes[may])) is not None:
                    may[may] = _any_cell(boxes[may], *seen)
        return may

    def _written_cells(self, boxes: np.ndarray) -> _Cells | None:
        """Tell which blocks of a GeoTIFF were ever written, around boxes (N, 4)."""
        height, width = self.block_shape_hw
        low = (np.maximum(boxes[:, :2].min(axis=0), 0) // [width, height]).astype(int)
        high = np.minimum(boxes[:, 2:].max(axis=0), [self.width, self.height])
        high = np.ceil(high / [width, height]).astype(int)
        with self._reading(Window(0, 0, self.width, self.height)) as src:
            if src.driver != "GTiff":
                return None
            bands = self.bands[:1] if src.interleaving == Interleaving.pixel else self.bands
            written = [
                any(src.get_tag_item(f"BLOCK_OFFSET_{x}_{y}", "TIFF", bidx=b) for b in bands)
                for y in range(low[1], high[1])
                for x in range(low[0], high[0])
            ]
        cells = np.array(written, dtype=bool).reshape(high[1] - low[1], high[0] - low[0])
        return cells, low, np.array([width, height])

    def _overview_cells(self, boxes: np.ndarray) -> _Cells | None:
        """Tell which pixels of an overview hold a valid one, around boxes (N, 4)."""
        if not self.masked and None in self.nodata:
            return None  # NaN beside numbers makes NaN of their average: that tells nothing
        largest = (boxes[0, 2:] - boxes[0, :2]).min() / OVERVIEW_CELLS
        factor = max((f for f in self._averaged_overviews if f <= largest), default=None)
        if factor is None:
            return None
        low = np.maximum(boxes[:, :2].min(axis=0), 0).astype(int)
        high = np.minimum(boxes[:, 2:].max(axis=0), [self.width, self.height]).astype(int)
        low, high = low // factor * factor, -(-high // factor) * factor
        with self._reading(Window(*low, *(high - low))) as src:
            window = RasterioWindow(*low, *(np.minimum(high, [self.width, self.height]) - low))
            shape = tuple(((high - low) // factor)[::-1].tolist())
            valid = np.ones(shape, dtype=bool)
            if None not in self.nodata:
                valid = self._differs_from_nodata(
                    read_bands(src, self.bands, self.dtype, window=window, out_shape=shape)
                )
            if self.masked:
                valid &= src.dataset_mask(window=window, out_shape=shape) > 0
        return valid, low // factor, np.array([factor, factor])

    @cached_property
    def _averaged_overviews(self) -> tuple[int, ...]:
        """Factors of the overviews that were made by averaging; others may skip pixels."""
        averaged = []
        with self._reading(Window(0, 0, self.width, self.height)):
            for level, factor in enumerate(self.overviews):
                with _open(self.source, overview_level=level) as overview:
                    if overview.tags(self.bands[0]).get("RESAMPLING") == "AVERAGE":
                        averaged.append(factor)
        return tuple(averaged)

    def _differs_from_nodata(self, image: np.ndarray) -> np.ndarray:
        return (image != np.array(self.nodata, self.dtype)[:, None, None]).any(axis=0)

    def _has_value(self, image: np.ndarray) -> np.ndarray:
        present = np.ones(image.shape[1:], dtype=bool)
        if None not in self.nodata:
            present = self._differs_from_nodata(image)
        if image.dtype.kind == "f":
            present &= np.isfinite(image).all(axis=0)
        return present

    def preview(self, longest_side: int = 1024) -> tuple[np.ndarray, np.ndarray]:
        """Read the whole raster decimated to at most `longest_side` px, from overviews if any.

        Returns:
            Pixels (bands, height, width) and their validity (height, width).
        """
        scale = min(1.0, longest_side / max(self.width, self.height))
        height, width = (max(1, round(side * scale)) for side in (self.height, self.width))
        return self.read_decimated(Window(0, 0, self.width, self.height), (height, width))

    def read_decimated(
        self, window: Window, shape_hw: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Read a window inside the raster at another size, from the overviews that fit, if any.

        Args:
            window: The window; what it costs to decode follows from `overviews`.
            shape_hw: Height and width of the result in px.

        Returns:
            Pixels (bands, height, width) and their validity (height, width).

        Raises:
            InputError: The file cannot be read there (names the window).
        """
        where = {"window": RasterioWindow(*window), "out_shape": shape_hw}
        plain = not self.masked and set(self.nodata) == {None}
        with self._reading(window) as src:
            image = read_bands(
                src, self.bands, self.dtype, **where,
                resampling=Resampling.average if plain else Resampling.nearest,
            )  # fmt: skip
            valid = self._has_value(image)
            if self.masked:
                valid &= src.dataset_mask(**where) > 0
        return image, valid

    @cached_property
    def overviews(self) -> tuple[int, ...]:
        """Factors by which the file's overviews are smaller than it, rising."""
        with self._reading(Window(0, 0, self.width, self.height)) as src:
            return tuple(src.overviews(self.bands[0]))

    def _clip(self, window: Window) -> tuple[Window, tuple[int, int]]:
        x0, y0 = max(window.x, 0), max(window.y, 0)
        x1 = max(min(window.x + window.width, self.width), x0)
        y1 = max(min(window.y + window.height, self.height), y0)
        return Window(x0, y0, x1 - x0, y1 - y0), (y0 - window.y, x0 - window.x)

    def _read_inside(self, window: Window) -> np.ndarray:
        with self._reading(window) as src:
            return read_bands(src, self.bands, self.dtype, window=RasterioWindow(*window))

    @contextmanager
    def _reading(self, window: Window) -> Iterator[rasterio.DatasetReader]:
        try:
            yield self._dataset()
        except GDAL_ERRORS as error:
            reason = str(error.__cause__ or error)
            raise InputError(
                f"{self.path} cannot be read in window {tuple(window)} (x, y, width, height): "
                f"{reason}; the file may be damaged there, restore or re-encode it"
            ) from error

    def _dataset(self) -> rasterio.DatasetReader:
        # A dataset must not cross a fork, so the process is part of the cache's identity.
        if getattr(_open_datasets, "pid", None) != os.getpid():
            _open_datasets.pid, _open_datasets.cache = os.getpid(), OrderedDict()
        cache: OrderedDict[tuple[str, int], rasterio.DatasetReader] = _open_datasets.cache
        local = not _is_remote(self.source)
        try:
            # a rewritten file is another file
            key = (self.source, self.path.stat().st_mtime_ns if local else 0)
        except FileNotFoundError:
            raise InputError(f"raster {self.path} has disappeared; restore it") from None
        if key not in cache:
            cache[key] = _open(self.source)
            if len(cache) > MAX_OPEN_DATASETS:
                cache.popitem(last=False)[1].close()
        cache.move_to_end(key)
        return cache[key]

    # -- map ------------------------------------------------------------------------------------

    def to_map(self, xy: np.ndarray) -> np.ndarray:
        """Turn points (N, 2) in px into map coordinates of the raster's CRS."""
        a, b, c, d, e, f = self.transform
        return np.asarray(xy, dtype=float) @ np.array([[a, d], [b, e]]) + [c, f]

    def to_pixel(self, xy: np.ndarray) -> np.ndarray:
        """Turn points (N, 2) in map coordinates of the raster's CRS into px."""
        a, b, c, d, e, f = self.transform
        # the origin goes first: map coordinates are large, pixels are small
        return np.linalg.solve([[a, b], [d, e]], (np.asarray(xy, dtype=float) - [c, f]).T).T

    def metres_per_pixel(self, xy: np.ndarray) -> np.ndarray:
        """Measure the ground under pixels, on the ellipsoid of the raster's CRS.

        Args:
            xy: Points (N, 2) in px.

        Returns:
            (N, 2, 2): east and north components, in metres, of a step of one pixel in x (first
            column) and in y (second column).

        Raises:
            InputError: The raster has no CRS, or one without a place on a globe.
        """
        globe, geod = self._globe
        xy = np.asarray(xy, dtype=float).reshape(-1, 2)
        steps = []
        for step in ([0.5, 0.0], [0.0, 0.5]):
            low, high = (globe.transform(*self.to_map(p).T) for p in (xy - step, xy + step))
            azimuth, _, length = geod.inv(*low, *high)
            azimuth = np.radians(azimuth)
            steps.append(np.stack([length * np.sin(azimuth), length * np.cos(azimuth)], axis=-1))
        return np.stack(steps, axis=-1)

    def to_lonlat(self, xy: np.ndarray) -> np.ndarray:
        """Turn points (N, 2) in px into longitude and latitude on the globe of the raster's CRS.

        Raises:
            InputError: The raster has no CRS, or one without a place on a globe.
        """
        return np.stack(self._globe[0].transform(*self.to_map(xy).T), axis=-1)

    @cached_property
    def _globe(self) -> tuple[pyproj.Transformer, pyproj.Geod]:
        if self.crs is None:
            raise InputError(
                f"{self.path} has no coordinate reference system, so that metres mean nothing on "
                "it; give pixel coordinates and diameters in px"
            )
        try:
            crs = pyproj.CRS.from_wkt(self.crs)
            globe = pyproj.Transformer.from_crs(crs, crs.geodetic_crs, always_xy=True)
            return globe, crs.get_geod()
        except (ProjError, AttributeError, TypeError) as error:
            raise InputError(
                f"the coordinate reference system of {self.path} has no place on a globe "
                f"({error}); assign the right one, or give pixel coordinates"
            ) from error

    @property
    def crs_name(self) -> str | None:
        """The CRS as people call it: its authority's code where there is one, else its name."""
        if self.crs is None:
            return None
        try:
            crs = pyproj.CRS.from_wkt(self.crs)
        except ProjError:
            return "unknown"
        authority = crs.to_authority()
        return ":".join(authority) if authority else crs.name

    @cached_property
    def resolution(self) -> float | None:
        """Side of a pixel on the ground in metres, at the raster's centre; None if unknown."""
        if self.crs is None:
            return None
        try:
            (jacobian,) = self.metres_per_pixel(np.array([[self.width / 2, self.height / 2]]))
        except InputError:
            return None
        side = float(np.sqrt(abs(np.linalg.det(jacobian))))
        return side if np.isfinite(side) else None


def _any_cell(
    boxes: np.ndarray, cells: np.ndarray, first_xy: np.ndarray, side_xy: np.ndarray
) -> np.ndarray:
    """Tell for boxes (N, 4) whether any cell under them holds.

    Args:
        boxes: px.
        cells: bool (rows, columns).
        first_xy: Column and row of `cells[0, 0]` in the grid of all cells.
        side_xy: Width and height of a cell in px.
    """
    total = np.pad(cells.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    limit = cells.shape[::-1]
    x0, y0 = (boxes[:, :2] // side_xy - first_xy).astype(int).clip(0, limit).T
    x1, y1 = (np.ceil(boxes[:, 2:] / side_xy) - first_xy).astype(int).clip(0, limit).T
    return total[y1, x1] - total[y0, x1] - total[y1, x0] + total[y0, x0] > 0


def read_bands(
    src: rasterio.DatasetReader, bands: Sequence[int], dtype: str, **options: object
) -> np.ndarray:
    """Read bands of an open dataset as one array; rasterio reads those of different types apart.

    Args:
        src: The dataset.
        bands: One-based indexes.
        dtype: Type of the array.
        options: `window, out_shape, resampling` of rasterio's `read`; `out_shape` is of a band.
    """
    if len(set(src.dtypes)) > 1:
        return np.stack([src.read(band, out_dtype=dtype, **options) for band in bands])
    if "out_shape" in options:
        options["out_shape"] = (len(bands), *options["out_shape"])
    return src.read(list(bands), out_dtype=dtype, **options)


def read_raster(path: Path | str, bands: Sequence[int] | None = None) -> Raster:
    """Open a raster by its handle; the pixels stay on disk until a window is asked for."""
    return Raster.open(path, bands)


def read_rasters(
    paths: Sequence[Path | str],
    bands: Sequence[int] | None = None,
    resolution_tolerance: float | None = None,
    target_resolution: float | None = None,
    cache_dir: Path | None = None,
) -> list[Raster]:
    """Open rasters that one model is to be trained on.

    Args:
        paths: Files or addresses.
        bands: See `Raster.open`.
        resolution_tolerance: Largest relative difference of their ground resolutions; None allows
            any.
        target_resolution: To which all are resampled, see `resampled`; None: they are not.
        cache_dir: Where copies of HDR images are kept from now on, by this process and those that
            it starts; None: see `cache_folder`.

    Raises:
        InputError: One cannot be opened, or they differ in the number of bands, the type or, by
            more than the tolerance, in resolution.
    """
    if cache_dir is not None:
        os.environ[CACHE_VARIABLE] = str(Path(cache_dir).absolute())
    rasters = [resampled(read_raster(path, bands), target_resolution) for path in paths]
    for raster in rasters:
        _warn_of_palette(raster)
        _warn_of_false_alpha(raster)
    check_kinds(
        rasters, "rasters of a run",
        "choose common bands with BANDS, or run those that differ apart",
    )  # fmt: skip
    span = resolution_range(rasters)
    if span and resolution_tolerance is not None:
        smallest, largest = span
        if largest > smallest * (1 + resolution_tolerance):
            shown = {r.path.name: f"{r.resolution:.4g} m" for r in rasters if r.resolution}
            raise InputError(
                f"the rasters of a run need ground resolutions within RESOLUTION_TOLERANCE = "
                f"{resolution_tolerance:g} of each other, got {shown}; set TARGET_RESOLUTION, or "
                "RESOLUTION_TOLERANCE = None if objects look alike at all of them"
            )
    return rasters


def check_kinds(rasters: Sequence[Raster], which: str, remedy: str) -> None:
    """Refuse rasters that differ in the number of bands or the type; say which, and what to do."""
    kinds = {r.path.name: f"{len(r.bands)} x {r.dtype}" for r in rasters}
    if len(set(kinds.values())) > 1:
        raise InputError(
            f"the {which} need the same number of bands and the same type, got {kinds}; {remedy}"
        )


def resolution_range(rasters: Iterable[Raster]) -> tuple[float, float] | None:
    """Return the least and the largest side of a pixel on the ground, m; None: none is known."""
    sides = [raster.resolution for raster in rasters if raster.resolution]
    return (min(sides), max(sides)) if sides else None


def resampled(raster: Raster, resolution: float | None) -> Raster:
    """Return a handle that reads a raster in square pixels of another size, as it is asked for.

    Nothing is written. Values are interpolated linearly, over as many pixels as fall into a new
    one; where nodata or a mask excludes some of them, the others tell.

    Args:
        raster: The raster.
        resolution: Side of the pixels on the ground, at the raster's middle, in m; None: as it is.

    Raises:
        InputError: The raster has no map reference, or is too small for one such pixel.
    """
    if resolution is None:
        return raster
    raster = raster.original or raster
    if raster.resolution is None:
        raise InputError(
            f"{raster.path} cannot be resampled to {resolution:g} m: it has no coordinate "
            "reference system with a place on a globe, so that nothing tells how large its pixels "
            "are; georeference it, or set TARGET_RESOLUTION = None"
        )
    (steps,) = raster.metres_per_pixel(np.array([[raster.width / 2, raster.height / 2]]))
    factors = resolution / np.hypot(*steps)  # old pixels per new one, in x and in y
    width, height = np.floor([raster.width, raster.height] / factors + 1e-6).astype(int).tolist()
    if not (width and height):
        raise InputError(
            f"{raster.path} is smaller than one pixel of {resolution:g} m; lower TARGET_RESOLUTION"
        )
    transform = rasterio.Affine(*raster.transform) @ rasterio.Affine.scale(*factors)
    masked = raster.masked and raster.alpha is None
    view = _warped(
        raster, raster.crs, transform, (width, height), Resampling.bilinear, add_alpha=masked,
        # else it is measured in each window anew, and a pixel depends on the window
        XSCALE=1 / factors[0], YSCALE=1 / factors[1],
    )  # fmt: skip
    return replace(
        view, regions=raster.regions, original=raster, target_resolution=float(resolution)
    )


def on_grid(mask: Raster, raster: Raster) -> Raster:
    """Return a handle that reads a mask on the grid of a raster; a pixel has the nearest value.

    A mask without map reference that has the size of the raster's original lies where that does.

    Raises:
        InputError: The mask has no map reference, and not that size.
    """
    original = raster.original or raster
    same_size = (mask.width, mask.height) == (original.width, original.height)
    place = {}
    if mask.crs is None:
        if not same_size:
            raise InputError(
                f"{mask.path} has no map reference, so that nothing tells where it lies on "
                f"{raster.path}; georeference it, or give one of {original.width} x "
                f"{original.height} px"
            )
        place = {"src_crs": original.crs, "src_transform": rasterio.Affine(*original.transform)}
    grid = raster.crs, rasterio.Affine(*raster.transform), (raster.width, raster.height)
    # what lies off the mask is not to be taken for its value 0, which may be ground
    if mask.alpha is None and mask.nodata[0] in (None, 0):
        place |= {"add_alpha": True, "src_nodata": None, "nodata": None}
    return replace(_warped(mask, *grid, Resampling.nearest, **place), original=mask)


def _warped(
    raster: Raster,
    crs: str,
    transform: rasterio.Affine,
    size_xy: tuple[int, int],
    resampling: Resampling,
    **place: object,
) -> Raster:
    """Return a handle to a raster on another grid, read through a VRT."""
    name = f"/vsimem/{secrets.token_hex(8)}.vrt"
    grid = {"crs": crs, "transform": transform, "width": size_xy[0], "height": size_xy[1]}
    with raster.anew() as src, WarpedVRT(src, **grid, resampling=resampling, **place) as vrt:
        rasterio.shutil.copy(vrt, name, driver="VRT")
    try:
        with rasterio.open(name) as described:
            source = described.tags(ns="xml:VRT")["xml:VRT"]
    finally:
        rasterio.shutil.delete(name)
    view = Raster.open(raster.path, raster.bands, source)
    return replace(view, files=raster.files)


def _files_of(src: rasterio.DatasetReader, path: Path) -> tuple[str, ...]:
    if is_hdr(path):  # its copy is made again when it is gone
        return (str(path),)
    files = {path, *map(Path, src.files)}
    return tuple(sorted(str(file) for file in files if file.is_file()))


def _check_blocks(src: rasterio.DatasetReader, path: Path | str) -> None:
    height, width = src.block_shapes[0]
    together = src.count if src.interleaving == Interleaving.pixel else 1
    size = height * width * np.dtype(src.dtypes[0]).itemsize * together
    if size > MAX_BLOCK_BYTES:
        raise InputError(
            f"{path} has blocks of {width} x {height} px, of which each takes {size / 2**20:,.0f} "
            f"MiB when a window is read, at most {MAX_BLOCK_BYTES / 2**20:.0f} are allowed; write "
            "it in tiles: gdal_translate -co TILED=YES"
        )


def _warn_of_palette(raster: Raster) -> None:
    with raster.anew() as src:
        if ColorInterp.palette in (src.colorinterp[band - 1] for band in raster.bands):
            log.warning(
                "%s holds numbers of colours, not brightness; for a picture expand them first: "
                "gdal_translate -expand rgb", raster.path,
            )  # fmt: skip


def _warn_of_false_alpha(raster: Raster) -> None:
    """Warn of an alpha band that looks like data: writers declare the fourth of any four so."""
    if raster.alpha is None:
        return
    band = read_raster(str(raster.path), [raster.alpha])
    side = 64
    corners = ((x * band.width // 4, y * band.height // 4) for x in range(4) for y in range(4))
    alpha = np.concatenate([band.read(Window(x, y, side, side)).ravel() for x, y in corners])
    between = ((alpha > 0) & (alpha < alpha.max())).mean()
    if between > FALSE_ALPHA:
        bands = list(range(1, raster.band_count + 2))
        log.warning(
            "%s: band %d is declared to be alpha (transparency), but %.0f %% of its values are "
            "neither transparent nor opaque; if it holds data, such as near infrared, set BANDS "
            "= %s", raster.path.name, raster.alpha, 100 * between, bands,
        )  # fmt: skip


def _is_remote(source: str) -> bool:
    return source.startswith("/vsi") or '<SourceDataset relativeToVRT="0">/vsi' in source


def _source(path: Path | str) -> tuple[str, bool]:
    """Return what GDAL is to open, and whether it is a file on this machine."""
    if address := address_of(path):
        return address, False
    text = str(path)
    if not Path(text).exists():
        raise InputError(
            f"raster {text} does not exist; check its name and folder (of a run, IMG_DIR)"
        )
    if Path(text).suffix.lower() in (".fits", ".fit", ".fts"):
        return _fits_as_vrt(Path(text)), True
    if is_hdr(Path(text)):
        return str(_hdr_as_geotiff(Path(text))), True
    return text, True


@contextmanager
def _opening(path: Path | str, source: str, *, local: bool) -> Iterator[rasterio.DatasetReader]:
    opened = False
    try:
        with _open(source) as src:
            opened = True
            yield src
    except GDAL_ERRORS as error:
        there = local and Path(path).exists()
        size = f" ({Path(path).stat().st_size} bytes)" if there else ""
        reason = error.__cause__ or error
        if opened:
            raise InputError(
                f"{path} cannot be read{size}: {reason}; the file may be damaged, restore it"
            ) from error
        raise InputError(f"{path} is not a raster that GDAL can read{size}: {reason}") from error


def _open(source: str, **options: object) -> rasterio.DatasetReader:
    with rasterio.Env(**(REMOTE if _is_remote(source) else {})):
        return rasterio.open(source, **options)


def _representable(value: float | None, dtype: np.dtype) -> float | None:
    """Return a nodata value if pixels of the type can have it (NaN: any way not finite)."""
    if value is None or np.isnan(value):
        return None
    if dtype.kind == "f":
        return float(value)
    limits = np.iinfo(dtype)
    return float(value) if limits.min <= value <= limits.max and value == int(value) else None


def _fits_as_vrt(path: Path) -> str:
    """Describe the first image of a FITS file as a VRT, for builds of GDAL without a FITS driver.

    Rows keep the order of the file, as in the arrays that astronomers see: row 0 is FITS row 1.

    Raises:
        InputError: There is no image, or a compressed one.
    """
    from astropy.io import fits  # slow to import, and few need it

    try:
        with warnings.catch_warnings(action="ignore"), fits.open(path, memmap=True) as units:
            images = [u for u in units if u.is_image and u.header.get("NAXIS", 0) >= 2]
            unit = next((u for u in images if not isinstance(u, fits.CompImageHDU)), None)
            if unit is None:
                found = [type(u).__name__ for u in units]
                raise InputError(
                    f"{path} holds no uncompressed image, only {found}; unpack it with funpack"
                )
            header, start = unit.header, unit.fileinfo()["datLoc"]
            bits, blank = header["BITPIX"], header.get("BLANK")
            bzero, bscale = float(unit._orig_bzero), float(unit._orig_bscale)
            nodata = "" if blank is None else f"<NoDataValue>{blank * bscale + bzero}</NoDataValue>"
            axes = [int(header[f"NAXIS{i + 1}"]) for i in range(header["NAXIS"])]
            plain = FITS_TYPES[bits]
    except (OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a FITS file that can be read: {error}") from error
    (width, height), count = axes[:2], int(np.prod(axes[2:], initial=1))
    size, end = abs(bits) // 8, start + width * height * count * abs(bits) // 8
    if path.stat().st_size < end:
        raise InputError(
            f"{path} is cut short: its header promises {end} bytes, it has {path.stat().st_size}"
        )
    shape = f'rasterXSize="{width}" rasterYSize="{height}"'
    raw = "".join(
        f'<VRTRasterBand dataType="{plain}" band="{i + 1}" subClass="VRTRawRasterBand">'
        f'<SourceFilename relativeToVRT="0">{escape(str(path.resolve()))}</SourceFilename>'
        f"<ImageOffset>{start + i * width * height * size}</ImageOffset>"
        f"<PixelOffset>{size}</PixelOffset><LineOffset>{width * size}</LineOffset>"
        f"<ByteOrder>MSB</ByteOrder></VRTRasterBand>"
        for i in range(count)
    )
    raw = f"<VRTDataset {shape}>{raw}</VRTDataset>"
    if (bzero, bscale) == (0, 1) and blank is None:
        return raw
    unsigned = FITS_UNSIGNED.get(bits, (None, None))
    kinds = {(unsigned[1], 1): unsigned[0], (0, 1): plain}
    kind = kinds.get((bzero, bscale), "Float64")
    scaled = "".join(
        f'<VRTRasterBand dataType="{kind}" band="{i + 1}">{nodata}<ComplexSource>'
        f'<SourceFilename relativeToVRT="0">{escape(raw)}</SourceFilename>'
        f"<SourceBand>{i + 1}</SourceBand><ScaleOffset>{bzero}</ScaleOffset>"
        f"<ScaleRatio>{bscale}</ScaleRatio></ComplexSource></VRTRasterBand>"
        for i in range(count)
    )
    return f"<VRTDataset {shape}>{scaled}</VRTDataset>"


def cache_folder() -> Path:
    """Return where copies of HDR images are: `$LARGE_RASTER_CACHE`, or the user's cache."""
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get(CACHE_VARIABLE) or Path(users).expanduser() / "LargeRasterOR")


def _hdr_as_geotiff(path: Path) -> Path:
    """Return the tiled copy of an HDR image, made if there is none: the same values in float32.

    It is `<cache folder>/<fingerprint>/<stem>.tif`. One process at a time makes it.

    Raises:
        InputError: The image cannot be read, or the copy not be written.
    """
    copy = cache_folder() / content_fingerprint(path) / f"{path.stem}.tif"

    def is_there() -> bool:
        # the fingerprint misses a change between its pieces, the file's time does not
        return copy.exists() and copy.stat().st_mtime_ns >= path.stat().st_mtime_ns

    if not is_there():
        with exclusive(copy.parent, wait=True):
            if not is_there():
                _copy_hdr(path, copy)
    return copy


def _copy_hdr(path: Path, copy: Path) -> None:
    changed = path.stat().st_mtime_ns  # of whatever clock; a change while it is copied is seen
    with open_hdr(path) as image:
        log.info("%s is copied to %s, to be read by windows", path, copy)
        count = len(image.channels)
        with create_raster(
            copy, overviews=Resampling.average, width=image.width, height=image.height,
            count=count, dtype="float32", predictor=3, zstd_level=1, photometric="minisblack",
            interleave="pixel" if count <= 8 else "band", num_threads="all_cpus",
        ) as dst:  # fmt: skip
            dst.descriptions = image.channels
            for block in image.blocks():
                dst.write(image.read(block), window=RasterioWindow(*block))
    set_time(copy, changed)


@contextmanager
def create_raster(
    path: Path, *, overviews: Resampling | None = None, **profile: object
) -> Iterator[rasterio.io.DatasetWriter]:
    """Open a new tiled GeoTIFF for writing by windows; it takes its name when the block succeeds.

    Args:
        path: The file to make.
        overviews: How they are made of the pixels; None: there are none.
        profile: `width, height, count, dtype` and, where known, `crs, transform, nodata`; anything
            else that GDAL's GTiff driver takes overrides the layout (256 px blocks, zstd).
    """
    layout: dict[str, object] = {
        "driver": "GTiff", "tiled": True, "blockxsize": 256, "blockysize": 256,
        "compress": "zstd", "bigtiff": "if_safer",
    }  # fmt: skip
    layout |= profile
    with atomic_path(path) as temporary:
        with rasterio.open(temporary, "w", **layout) as dst:
            yield dst
        if overviews is not None:
            with rasterio.Env(SPARSE_OK_OVERVIEW=bool(layout.get("sparse_ok"))):
                add_overviews(temporary, overviews)
        check_whole(temporary, sparse=bool(layout.get("sparse_ok")))


PNG_SIDE = 1_000_000  # px, the longest that libpng reads and writes
PNG_END = b"IEND\xaeB`\x82"


@contextmanager
def create_png(path: Path, **profile: object) -> Iterator[rasterio.io.DatasetWriter]:
    """Open a new PNG for writing by windows; it takes its name when the block succeeds.

    Windows go to a GeoTIFF beside it, of which the PNG is made row by row at the end.

    Args:
        path: The file to make.
        profile: See `create_raster`; one, three or four bands of bytes, at most `PNG_SIDE` px a
            side.
    """
    with atomic_path(path) as temporary:
        draft = temporary.with_suffix(".tif")
        try:
            with create_raster(draft, **profile) as dst:
                yield dst
            with rasterio.Env(GDAL_PAM_ENABLED="NO"):  # no file of metadata beside it
                rasterio.shutil.copy(draft, temporary, driver="PNG")
        finally:
            draft.unlink(missing_ok=True)
        with temporary.open("rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            if file.read() != PNG_END:
                raise OSError(errno.ENOSPC, "no room for all of it", str(path))


def add_overviews(path: Path, resampling: Resampling) -> None:
    """Add overviews to a GeoTIFF, each half as large as the one before it."""
    with rasterio.open(path, "r+") as dst:
        longest, factors = max(dst.width, dst.height), []
        while longest / (2 ** len(factors)) > SMALLEST_OVERVIEW:
            factors.append(2 ** (len(factors) + 1))
        if factors:
            dst.build_overviews(factors, resampling)


# of TIFF: bytes per value of a type; types of integers; tags of places and sizes of blocks
TIFF_BYTES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
TIFF_INTEGERS = {3: "<u2", 4: "<u4", 16: "<u8"}
TIFF_PLACES, TIFF_SIZES = {273, 324}, {279, 325}


def check_whole(path: Path, *, sparse: bool = False) -> None:
    """Check that all that the directories of a new TIFF name was written, masks and overviews too.

    GDAL does not tell where blocks that threads write, or that go to disk when the file is closed,
    found no room. It may even put later ones in their place, so that a disk that is full by now is
    reason enough. A sparse file lacks blocks on purpose.

    Raises:
        OSError: Something is missing, for the disk was full.

    References:
        TIFF 6.0 and the BigTIFF design, of files in little-endian order, as GDAL writes them here.
    """
    size = path.stat().st_size
    read = partial(np.fromfile, path)  # less than asked for at the end of the file
    big = read("<u2", 2)[1:] == 43
    word, count_type, first = ("<u8", "<u8", 8) if big else ("<u4", "<u2", 4)
    entry = np.dtype([("tag", "<u2"), ("type", "<u2"), ("count", word), ("value", word)])
    inline = np.dtype(word).itemsize
    whole, place = True, read(word, 1, offset=first)
    while whole and place.size and (here := int(place[0])):
        number = read(count_type, 1, offset=here)
        here += number.itemsize
        entries = read(entry, int(number.sum()), offset=here)
        whole = number.size and len(entries) == number[0]
        found = {}
        for index, (tag, kind, count, value) in enumerate(entries.tolist()):
            length = count * TIFF_BYTES.get(kind, 1)
            start = value if length > inline else here + (index + 1) * entry.itemsize - inline
            whole = whole and start + length <= size
            if tag in TIFF_PLACES | TIFF_SIZES:
                found[tag in TIFF_PLACES] = read(TIFF_INTEGERS[kind], count, offset=start)
        if whole and len(found) == 2:
            places, sizes = (found[key].astype(np.uint64) for key in (True, False))
            written = (places > 0) & (sizes > 0) | (sparse & (places + sizes == 0))
            whole = written.all() and (places + sizes <= size).all()
        here += entries.nbytes
        place = read(word, 1, offset=here)
    full = find_full(path)
    if full or not (whole and place.size):
        raise OSError(full or errno.ENOSPC, "no room for all of it", str(path))
