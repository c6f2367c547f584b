"""Disk: rasters by windows, tables, directories, and artefacts that are whole or absent."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import pandas as pd
import rasterio
from filelock import FileLock, Timeout
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window as RasterioWindow

from ImageData import InputError, Window

log = logging.getLogger(__name__)

# A raster without a map reference is an ordinary one here.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)

# GDAL would keep up to a twentieth of the memory full of blocks that were read once.
os.environ.setdefault("GDAL_CACHEMAX", "64")  # MB

MAX_OPEN_DATASETS = 32  # per thread; GDAL keeps a file descriptor and buffers for each

# ---------------------------------------------------------------------------------------------
# Atomic artefacts
# ---------------------------------------------------------------------------------------------


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its name when the block succeeds.

    Readers therefore see the old file or the whole new one; when the block raises, the temporary
    file is removed and `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: Path, text: str) -> Path:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def write_json(path: Path, value: object) -> Path:
    """Write a value as JSON atomically; paths and NumPy scalars are converted."""
    return write_text(path, json.dumps(value, indent=2, default=_plain) + "\n")


def write_table(path: Path, df: pd.DataFrame) -> Path:
    """Write a frame atomically, as CSV or Parquet by the path's suffix."""
    with atomic_path(path) as temporary:
        if path.suffix == ".parquet":
            df.to_parquet(temporary, index=False)
        else:
            df.to_csv(temporary, index=False)
    return path


def _plain(value: object) -> object:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


def recreate_directory(directory: Path) -> Path:
    """Empty a directory, or make it; it must not be a root, a home or the working directory."""
    directory = Path(directory).resolve()
    if directory in (Path(directory.anchor), Path.home(), *Path.cwd().parents, Path.cwd()):
        raise InputError(f"{directory} must not be emptied: it holds more than our files")
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    return directory


# ---------------------------------------------------------------------------------------------
# Manifests: what a finished stage was made from
# ---------------------------------------------------------------------------------------------


def fingerprint(value: object) -> str:
    """Digest a value to a short text that is the same in every process.

    A path stands for the file's name, size and modification time; a function for its code, its
    defaults, and the variables and functions of its module that it uses, so that an edited filter
    is another one; functions of libraries for their names.
    """
    text = json.dumps(_identity(value, frozenset()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _identity(value: object, above: frozenset[int]) -> object:
    """Turn a value into JSON; `above` are those around it, as functions may use themselves."""
    if id(value) in above:
        return "itself"
    inner = partial(_identity, above=above | {id(value)})
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Path():
            stat = value.stat() if value.exists() else None
            return [value.name, stat.st_size, stat.st_mtime_ns] if stat else [str(value), None]
        case Mapping():
            return sorted([str(key), inner(item)] for key, item in value.items())
        case list() | tuple():
            return [inner(item) for item in value]
        case set() | frozenset():
            return sorted(map(repr, value))  # their own order changes from process to process
        case pd.DataFrame():
            rows = pd.util.hash_pandas_object(value, index=False)
            return [list(value.columns), hashlib.sha256(rows.to_numpy().tobytes()).hexdigest()]
        case np.generic() | np.ndarray():
            return value.tolist()
        case partial():
            return [inner(value.func), inner(value.args), inner(value.keywords)]
        case MethodType():
            return [inner(value.__func__), inner(value.__self__)]
        case CodeType():
            return [value.co_code.hex(), inner(value.co_consts), inner(value.co_names)]
        case FunctionType():
            defaults = [value.__defaults__, value.__kwdefaults__]
            return [value.__qualname__, inner(value.__code__), inner(defaults), inner(_used(value))]
        case ModuleType():
            return value.__name__
        case type():
            members = {k: m for k, m in vars(value).items() if isinstance(m, FunctionType)}
            return [value.__qualname__, inner(members)]
    if type(value).__repr__ is object.__repr__:  # it would show an address
        return [inner(type(value)), inner(getattr(value, "__dict__", None))]
    return repr(value)


def _used(function: FunctionType) -> dict[str, object]:
    """Return the outer variables that a function uses, those of its inner functions included."""
    codes, names = [function.__code__], set()
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    used = {name: value for name, value in function.__globals__.items() if name in names}
    cells = function.__closure__ or ()
    used |= zip(function.__code__.co_freevars, (c.cell_contents for c in cells), strict=True)
    return {
        name: f"{value.__module__}.{name}"
        if isinstance(value, FunctionType | type) and value.__module__ != function.__module__
        else value
        for name, value in used.items()
    }


def is_finished(path: Path, parameters: Mapping[str, Any]) -> bool:
    """Tell whether a stage with just these parameters left this manifest, and its files."""
    try:
        manifest = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    there = all((Path(path).parent / name).exists() for name in manifest.get("outputs", ()))
    return there and manifest.get("fingerprint") == fingerprint(dict(parameters))


def mark_finished(path: Path, parameters: Mapping[str, Any], outputs: Sequence[str]) -> None:
    """Leave the manifest that `is_finished` reads, when the outputs beside it are written."""
    shown = json.loads(json.dumps(dict(parameters), default=repr))
    value = {"fingerprint": fingerprint(dict(parameters)), "outputs": list(outputs)}
    value["parameters"] = shown
    write_json(path, value)


def hash_rows(df: pd.DataFrame, seed: int) -> np.ndarray:
    """Hash each row's values and a seed to uint64: a random order that depends on nothing else."""
    return pd.util.hash_pandas_object(df.assign(seed=seed), index=False).to_numpy()


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold a directory for one process at a time; the lock ends with the process.

    Raises:
        InputError: Another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"{directory} is in use by another process; wait for it, or set another RUN_NAME"
        ) from None
    try:
        yield
    finally:
        lock.release()


# ---------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------

_TILE_NAME = re.compile(r"^tile_(?P<identifier>.+)_\d+_(?P<angle>0|90|180|270)$")
_ROTATED_NAME = re.compile(r"^(?P<identifier>.+)_(?P<angle>0|90|180|270)$")


def identifier_from_tilename(name: str | Path) -> str:
    """Return the identifier of the raster that a tile or a rotated raster was made from.

    Raises:
        InputError: The name has neither form: `tile_<identifier>_<number>_<angle>` or
            `<identifier>_<angle>`.
    """
    stem = Path(name).stem
    match = _TILE_NAME.match(stem) or _ROTATED_NAME.match(stem)
    if match is None:
        raise InputError(
            f"{name} is not named as a tile (tile_<identifier>_<number>_<angle>) "
            "nor as a rotated raster (<identifier>_<angle>)"
        )
    return match["identifier"]


# ---------------------------------------------------------------------------------------------
# Rasters
# ---------------------------------------------------------------------------------------------

_open_datasets = threading.local()


@dataclass(frozen=True)
class Raster:
    """A handle to a raster file: its shape and kind, and windows of it on demand.

    The handle is small and picklable. Each thread of each process opens the file once and keeps at
    most `MAX_OPEN_DATASETS` open.

    Attributes:
        path: The file.
        width: Columns in px.
        height: Rows in px.
        bands: One-based indexes of the bands that `read` returns; an alpha band is not among them.
        dtype: NumPy name of the pixels' type.
        nodata: Value that marks missing pixels, if the file declares one.
        crs: Coordinate reference system as WKT, if the file declares one.
        transform: The six affine coefficients from pixels to map units.
        block_shape_hw: Height and width of the file's internal blocks.
    """

    path: Path
    width: int
    height: int
    bands: tuple[int, ...]
    dtype: str
    nodata: float | None
    crs: str | None
    transform: tuple[float, ...]
    block_shape_hw: tuple[int, int]
    masked: bool  # the file itself tells valid pixels: nodata, an alpha band or a mask

    @classmethod
    def open(cls, path: Path | str) -> Raster:
        """Read a raster's header.

        Raises:
            InputError: The file is missing, or not a raster.
        """
        path = Path(path)
        with _opening(path), rasterio.open(path) as src:
            if not src.count:
                raise InputError(f"{path} holds no band of its own, only {src.subdatasets}")
            bands = tuple(
                i for i, kind in zip(src.indexes, src.colorinterp, strict=True)
                if kind != ColorInterp.alpha
            )  # fmt: skip
            masked = any(MaskFlags.all_valid not in flags for flags in src.mask_flag_enums)
            return cls(
                path=path, width=src.width, height=src.height, bands=bands,
                dtype=src.dtypes[bands[0] - 1], nodata=src.nodata,
                crs=src.crs.to_wkt() if src.crs else None, transform=tuple(src.transform)[:6],
                block_shape_hw=tuple(src.block_shapes[0]), masked=masked,
            )  # fmt: skip

    @property
    def resolution(self) -> float | None:
        """Side of a pixel in units of the CRS; None without a CRS."""
        a, b, _, d, e, _ = self.transform
        return float(np.sqrt(abs(a * e - b * d))) if self.crs else None

    def read(self, window: Window) -> np.ndarray:
        """Read a window as (bands, height, width), in the raster's own type.

        What lies outside the raster is filled with nodata, or 0 where the file declares none.

        Raises:
            InputError: The file cannot be read there (names the window).
        """
        inside, (top, left) = self._clip(window)
        shape = (len(self.bands), window.height, window.width)
        if inside == window:
            return self._read_inside(inside)
        image = np.full(shape, self.nodata if self.nodata is not None else 0, dtype=self.dtype)
        if inside.width and inside.height:
            image[:, top : top + inside.height, left : left + inside.width] = self._read_inside(
                inside
            )
        return image

    def read_valid(self, window: Window, image: np.ndarray) -> np.ndarray:
        """Tell the valid pixels of a window as bool (height, width).

        Invalid are pixels outside the raster, those the file's nodata value, alpha band or mask
        excludes, and those that are not finite in any band.

        Args:
            window: The window.
            image: What `read` returned for it.
        """
        inside, (top, left) = self._clip(window)
        valid = np.zeros((window.height, window.width), dtype=bool)
        if inside.width and inside.height:
            rows, cols = slice(top, top + inside.height), slice(left, left + inside.width)
            if self.masked:
                with self._reading(inside) as src:
                    valid[rows, cols] = src.dataset_mask(window=RasterioWindow(*inside)) > 0
            else:
                valid[rows, cols] = True
        if np.issubdtype(image.dtype, np.floating):
            valid &= np.isfinite(image).all(axis=0)
        return valid

    def preview(self, longest_side: int = 1024) -> tuple[np.ndarray, np.ndarray]:
        """Read the whole raster decimated to at most `longest_side` px, from overviews if any.

        Returns:
            Pixels (bands, height, width) and their validity (height, width).
        """
        scale = min(1.0, longest_side / max(self.width, self.height))
        height, width = (max(1, round(side * scale)) for side in (self.height, self.width))
        window = Window(0, 0, self.width, self.height)
        resampling = Resampling.average if not self.masked else Resampling.nearest
        with self._reading(window) as src:
            image = src.read(
                list(self.bands), out_shape=(len(self.bands), height, width), resampling=resampling
            )
            valid = src.dataset_mask(out_shape=(height, width)) > 0
        return image, valid & np.isfinite(image).all(axis=0)

    def _clip(self, window: Window) -> tuple[Window, tuple[int, int]]:
        x0, y0 = max(window.x, 0), max(window.y, 0)
        x1 = max(min(window.x + window.width, self.width), x0)
        y1 = max(min(window.y + window.height, self.height), y0)
        return Window(x0, y0, x1 - x0, y1 - y0), (y0 - window.y, x0 - window.x)

    def _read_inside(self, window: Window) -> np.ndarray:
        with self._reading(window) as src:
            return src.read(list(self.bands), window=RasterioWindow(*window))

    @contextmanager
    def _reading(self, window: Window) -> Iterator[rasterio.DatasetReader]:
        try:
            yield _dataset(self.path)
        except RasterioError as error:
            reason = str(error.__cause__ or error)
            raise InputError(
                f"{self.path} cannot be read in window {tuple(window)} (x, y, width, height): "
                f"{reason}; the file may be damaged there, restore or re-encode it"
            ) from error


def read_raster(path: Path | str) -> Raster:
    """Open a raster by its handle; the pixels stay on disk until a window is asked for."""
    return Raster.open(path)


def read_rasters(paths: Sequence[Path]) -> list[Raster]:
    """Open rasters that one model is to be trained on.

    Raises:
        InputError: One cannot be opened, or they differ in the number of bands or the type.
    """
    rasters = [read_raster(path) for path in paths]
    kinds = {raster.path.name: f"{len(raster.bands)} x {raster.dtype}" for raster in rasters}
    if len(set(kinds.values())) > 1:
        raise InputError(
            f"the rasters of a run need the same number of bands and the same type, got {kinds}; "
            "run those that differ apart"
        )
    return rasters


@contextmanager
def _opening(path: Path) -> Iterator[None]:
    if not path.exists():
        raise InputError(f"raster {path} does not exist; check IMG_DIR and IMAGE_FILENAMES")
    try:
        yield
    except RasterioError as error:
        raise InputError(
            f"{path} is not a raster that GDAL can read ({path.stat().st_size} bytes): {error}"
        ) from error


def _dataset(path: Path) -> rasterio.DatasetReader:
    # A dataset must not cross a fork, so the process is part of the cache's identity.
    if getattr(_open_datasets, "pid", None) != os.getpid():
        _open_datasets.pid, _open_datasets.cache = os.getpid(), OrderedDict()
    cache: OrderedDict[tuple[str, int], rasterio.DatasetReader] = _open_datasets.cache
    try:
        key = (str(path), path.stat().st_mtime_ns)  # a rewritten file is another file
    except FileNotFoundError:
        raise InputError(f"raster {path} has disappeared; restore it") from None
    if key not in cache:
        cache[key] = rasterio.open(path)
        if len(cache) > MAX_OPEN_DATASETS:
            cache.popitem(last=False)[1].close()
    cache.move_to_end(key)
    return cache[key]


@contextmanager
def create_raster(path: Path, **profile: object) -> Iterator[rasterio.io.DatasetWriter]:
    """Open a new tiled GeoTIFF for writing by windows; it takes its name when the block succeeds.

    Args:
        path: The file to make.
        profile: `width, height, count, dtype` and, where known, `crs, transform, nodata`; anything
            else that GDAL's GTiff driver takes overrides the layout (256 px blocks, zstd).
    """
    layout: dict[str, object] = {
        "driver": "GTiff", "tiled": True, "blockxsize": 256, "blockysize": 256,
        "compress": "zstd", "bigtiff": "if_safer",
    }  # fmt: skip
    layout |= profile
    with atomic_path(path) as temporary, rasterio.open(temporary, "w", **layout) as dst:
        yield dst


def read_table(path: Path, text_columns: Sequence[str] = ()) -> pd.DataFrame:
    """Read a CSV whose columns may mix numbers and text.

    Args:
        path: The file.
        text_columns: Columns to keep as they are written, so that the label 01 is not 1, and NA
            no missing one; only an empty cell is missing.

    Raises:
        InputError: The file is missing, empty, or not a table.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"annotation table {path} does not exist; check DF_DIR and DF_FILENAMES")
    try:
        df = pd.read_csv(
            path, low_memory=False, keep_default_na=False, na_values=[""],
            dtype=dict.fromkeys(text_columns, str),
        )  # fmt: skip
    except pd.errors.EmptyDataError:
        raise InputError(f"{path} is empty; expected a header and a row per object") from None
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a CSV table in UTF-8: {error}") from error
    if df.empty:
        raise InputError(f"{path} has the columns {list(df.columns)} but no row")
    return df
