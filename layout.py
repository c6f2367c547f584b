"""Layout of rasters on disk: how fast do windows read, what would a rewrite bring, the rewrite.

A window of a tiled file costs the tiles that it touches. A window of a striped file costs rows as
wide as the raster, and one of a PNG or a single strip half of the file. `diagnose` measures that,
`rewrite` makes a tiled copy without holding the raster, `check_layout` says or mends it.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.enums import ColorInterp, Resampling
from rasterio.windows import Window as RasterioWindow

import parallel
from artefacts import (
    FullDiskError,
    atomic_path,
    content_fingerprint,
    fingerprint,
    remove_strays,
    set_time,
    write_json,
)
from ImageData import InputError, Window
from rasters import (
    GDAL_ERRORS,
    Raster,
    add_overviews,
    check_whole,
    create_raster,
    read_bands,
    resampled,
)

log = logging.getLogger(__name__)

SEQUENTIAL = {"PNG", "JPEG", "GIF", "WEBP"}  # drivers that decode from the start of the file
OVERVIEWS_FROM = 4096  # px, longest side; smaller rasters are looked at whole
MANY_BLOCKS = 16  # a block of more windows than this is a giant
WIDE_STRIP = 8  # strips wider than this many windows cost more than tiles
WORTH_IT = 2.0  # least gain that pays for a copy
SAMPLE_SIDE = 2048  # px, largest side of the piece that is rewritten to measure the gain
MOST_WINDOWS = 200  # per measurement
SWATH_BYTES = 2**28  # most that a rewrite holds of the raster at once
DIAGNOSIS = "layout.json"  # beside a repaired copy


@dataclass(frozen=True)
class Diagnosis:
    """How a raster reads, and how it would after a rewrite.

    Attributes:
        raster: Its path or address.
        kind: Format, size, bands and type in words.
        compression: As GDAL names it; `none` if the pixels are plain.
        interleave: `pixel`, `band` or `line`.
        block_shape_hw: Height and width in px of what is decoded at once.
        overviews: Their factors.
        problems: What is wrong, one sentence each; empty if healthy.
        slow_layout: Whether one of the problems makes windows slow.
        windows_per_second: Measured on the file.
        expected_windows_per_second: Measured on a rewritten sample; equal to the former if nothing
            makes windows slow.
    """

    raster: str
    kind: str
    compression: str
    interleave: str
    block_shape_hw: tuple[int, int]
    overviews: tuple[int, ...]
    problems: tuple[str, ...]
    slow_layout: bool
    windows_per_second: float
    expected_windows_per_second: float

    @property
    def gain(self) -> float:
        """How many times faster windows would read after a rewrite."""
        return self.expected_windows_per_second / self.windows_per_second

    @property
    def advisable(self) -> bool:
        """Whether a rewrite pays: the layout makes windows slow, and the gain is large."""
        return self.slow_layout and self.gain >= WORTH_IT

    def report(self) -> str:
        """Return the findings as a few lines of text."""
        height, width = self.block_shape_hw
        lines = [
            f"{self.raster}: {self.kind}",
            f"  blocks {width} x {height} px, compression {self.compression}, interleave "
            f"{self.interleave}, overviews {list(self.overviews) or 'none'}",
            f"  {self.windows_per_second:.3g} windows per second",
        ]
        if self.slow_layout:
            lines.append(
                f"  {self.expected_windows_per_second:.3g} expected after a rewrite "
                f"({self.gain:.1f} times as many)"
            )
        lines += [f"  problem: {problem}" for problem in self.problems] or ["  healthy"]
        if self.advisable:
            lines.append(f"  remedy: python fileio.py doctor {self.raster} --rewrite OUT.tif")
        return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------
# Diagnosis
# ---------------------------------------------------------------------------------------------


def diagnose(
    raster: Raster, *, window_size: int = 256, seconds: float = 1.0, seed: int = 0
) -> Diagnosis:
    """Measure how windows of a raster read, and find out why, if slowly.

    Args:
        raster: The raster; the bands that the handle names are read.
        window_size: Side of the windows in px.
        seconds: For how long to read; a window that has begun is read to its end.
        seed: Of the places of the windows.

    Raises:
        InputError: The file cannot be read.
    """
    with raster.anew() as src:
        structure = src.tags(ns="IMAGE_STRUCTURE")
        slow, others = _problems(src, window_size)
        overviews = tuple(src.overviews(1))
        kind = (
            f"{src.driver}, {src.width} x {src.height} px, {src.count} band(s) of {src.dtypes[0]}"
        )
        block, count = _block_shape(src), src.count
    rate = expected = measure(raster, window_size=window_size, seconds=seconds, seed=seed)
    if slow:
        # of a striped file, rows take the time, and a band that is not asked for takes its share
        rows = seconds * rate * window_size * len(raster.bands) / count
        with _rewritten_sample(raster, int(rows)) as sample:
            expected = measure(sample, window_size=window_size, seconds=seconds, seed=seed)
    return Diagnosis(
        raster=str(raster.path), kind=kind,
        compression=structure.get("COMPRESSION", "none").lower(),
        interleave=structure.get("INTERLEAVE", "none").lower(),
        block_shape_hw=block, overviews=overviews, problems=(*slow, *others),
        slow_layout=bool(slow), windows_per_second=rate, expected_windows_per_second=expected,
    )  # fmt: skip


def measure(
    raster: Raster, *, window_size: int = 256, seconds: float = 1.0, seed: int = 0
) -> float:
    """Return how many windows per second are read at random places, none from GDAL's cache.

    Raises:
        InputError: The file cannot be read.
    """
    rng = np.random.default_rng(seed)
    width, height = min(window_size, raster.width), min(window_size, raster.height)
    spent, count, deadline = 0.0, 0, time.perf_counter() + seconds
    while not count or (time.perf_counter() < deadline and count < MOST_WINDOWS):
        window = Window(
            int(rng.integers(raster.width - width + 1)),
            int(rng.integers(raster.height - height + 1)), width, height,
        )  # fmt: skip
        with raster.anew() as src:  # blocks that were decoded before would hide the cost
            start = time.perf_counter()
            read_bands(src, raster.bands, raster.dtype, window=RasterioWindow(*window))
            spent += time.perf_counter() - start
        count += 1
    return count / spent


def _block_shape(src: rasterio.DatasetReader) -> tuple[int, int]:
    """Return the height and width of what is decoded at once; behind a VRT that of a source."""
    others = [file for file in src.files if file != src.name]
    if src.driver == "VRT" and others:
        # GDAL's blocks of a VRT say nothing of the files that it reads
        with suppress(*GDAL_ERRORS), rasterio.open(others[0]) as first:
            return tuple(first.block_shapes[0])
    return tuple(src.block_shapes[0])


def _problems(src: rasterio.DatasetReader, window_size: int) -> tuple[list[str], list[str]]:
    """Name what makes windows slow, and what else is wrong, by the header alone."""
    slow, others = [], []
    height, width = _block_shape(src)
    limit = MANY_BLOCKS * window_size**2
    if src.width * src.height > limit:
        if src.driver in SEQUENTIAL:
            slow.append(f"a {src.driver} file is decoded from its start for every window")
        elif _is_one_strip(src):
            slow.append("the file is one compressed strip, decoded from its start for every window")
        elif width * height > limit:
            slow.append(
                f"giant blocks: {width} x {height} px are decoded for a window of {window_size} x "
                f"{window_size} px"
            )
        elif height < window_size and width > WIDE_STRIP * window_size:
            slow.append(
                f"strips: {width} px wide rows are decoded for a window of {window_size} px"
            )
    if max(src.width, src.height) > OVERVIEWS_FROM and not src.overviews(1):
        others.append("no overviews: a look at the whole raster reads every pixel")
    return slow, others


def _is_one_strip(src: rasterio.DatasetReader) -> bool:
    """Tell a TIFF of a single compressed strip, which GDAL shows as blocks of one row."""
    if src.driver != "GTiff" or src.block_shapes[0] != (1, src.width) or not src.compression:
        return False
    offsets = [src.get_tag_item(f"BLOCK_OFFSET_0_{row}", "TIFF", bidx=1) for row in (0, 1)]
    return offsets[0] is not None and offsets[1] is None


@contextmanager
def _rewritten_sample(raster: Raster, most_rows: int) -> Iterator[Raster]:
    """Rewrite a piece from the middle of a raster, of at most so many rows, to a temporary file."""
    rows = min(max(most_rows, 64), SAMPLE_SIDE)
    width, height = min(SAMPLE_SIDE, raster.width), min(rows, raster.height)
    window = Window((raster.width - width) // 2, (raster.height - height) // 2, width, height)
    with raster.anew() as src:
        pixels = read_bands(src, src.indexes, raster.dtype, window=RasterioWindow(*window))
    # few rows repeat, so that windows of the sample touch as many tiles as those of the raster
    pixels = np.tile(pixels, (1, -(-min(SAMPLE_SIDE, raster.height) // height), 1))
    with tempfile.TemporaryDirectory(prefix="layout_") as folder:
        path = Path(folder) / "sample.tif"
        options = _creation_options(raster.dtype, len(pixels))
        with create_raster(
            path, count=len(pixels), height=pixels.shape[1], width=width, dtype=raster.dtype,
            **options,
        ) as dst:  # fmt: skip
            dst.write(pixels)
        yield Raster.open(path, raster.bands)


# ---------------------------------------------------------------------------------------------
# Rewrite
# ---------------------------------------------------------------------------------------------


def rewrite(raster: Raster | Path | str, out: Path | str, *, block_size: int = 256) -> Path:
    """Copy a raster to a tiled, compressed GeoTIFF with overviews; streamed and atomic.

    Kept are all bands, masks, nodata, color interpretation, map reference, descriptions and tags.
    At most `SWATH_BYTES` of pixels are held at once, beside GDAL's cache.

    Args:
        raster: A handle, a file or an address.
        out: The file to make.
        block_size: Side of the tiles in px, a multiple of 16.

    Raises:
        InputError: The raster cannot be read, its bands differ in type, or `out` is the raster
            itself or cannot be written.
    """
    raster = raster if isinstance(raster, Raster) else Raster.open(raster)
    out = Path(out)
    if out.exists() and raster.path.exists() and out.samefile(raster.path):
        raise InputError(f"{out} would replace the raster it is made from; name another file")
    with raster.anew() as src:
        if len(set(src.dtypes)) > 1:
            raise InputError(
                f"{raster.path} has bands of different types {list(src.dtypes)}, which a GeoTIFF "
                "cannot hold; convert them to one, for example with gdal_translate -ot"
            )
        options = _creation_options(src.dtypes[0], src.count, block_size)
        if "NBITS" in src.tags(1, ns="IMAGE_STRUCTURE"):  # no predictor for odd numbers of bits
            options["nbits"] = 8 * np.dtype(src.dtypes[0]).itemsize
        swath = src.width * block_size * src.count * np.dtype(src.dtypes[0]).itemsize
        average = ColorInterp.palette not in src.colorinterp  # between two classes is no third
        settings = {
            "GDAL_TIFF_INTERNAL_MASK": True,
            "GDAL_SWATH_SIZE": min(max(swath, 2**24), SWATH_BYTES),  # whole rows: strips read once
            "GDAL_NUM_THREADS": "ALL_CPUS",
        }
        try:
            with rasterio.Env(**settings), atomic_path(out) as temporary:
                try:
                    rasterio.shutil.copy(src, temporary, driver="GTiff", **options)
                    add_overviews(temporary, Resampling.average if average else Resampling.nearest)
                    check_whole(temporary)
                    _take_sidecar(temporary, out)
                finally:
                    _sidecar(temporary).unlink(missing_ok=True)
        except (*GDAL_ERRORS, OSError) as error:
            raise InputError(
                f"{raster.path} cannot be rewritten to {out}: {error.__cause__ or error}; it may "
                "be damaged, or the disk full or not writable"
            ) from error
    return out


def _creation_options(dtype: str, count: int, block_size: int = 256) -> dict[str, object]:
    return {
        "tiled": True, "blockxsize": block_size, "blockysize": block_size, "bigtiff": "if_safer",
        "compress": "zstd",
        "zstd_level": 3,  # level 9 takes three times as long for files 4 % smaller
        "predictor": 3 if np.dtype(dtype).kind == "f" else 2,
        # the bands of a window come together, but of very many only some are wanted
        "interleave": "pixel" if count <= 8 else "band",
        "num_threads": "all_cpus",
    }  # fmt: skip


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.aux.xml")


def _take_sidecar(temporary: Path, out: Path) -> None:
    """Let the file in which GDAL leaves what a GeoTIFF cannot hold follow, or an old one go."""
    if _sidecar(temporary).exists():
        _sidecar(temporary).replace(_sidecar(out))
    else:
        _sidecar(out).unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------
# Repair: copies in the cache
# ---------------------------------------------------------------------------------------------


def raster_fingerprint(raster: Raster) -> str:
    """Digest the content of all files that hold a raster; of a remote one, its address only."""
    if not raster.path.is_file():
        return fingerprint(raster.source)
    prints = [content_fingerprint(file) for file in raster.files]
    return prints[0] if len(prints) == 1 else fingerprint(prints)


def check_layout(
    rasters: Sequence[Raster],
    *,
    repair: bool,
    cache_dir: Path | str,
    scheduler: str | None = None,
    progress: bool = False,
) -> list[Raster]:
    """Repair the rasters that are laid out badly, or warn of each, with measured figures.

    A copy is made once, as `cache_dir/<fingerprint>/<stem>.tif`: its name is the raster's. The
    diagnosis is kept beside it, so that the decision does not change from run to run. Remote
    rasters are not copied, as a change of theirs would go unnoticed.

    Args:
        rasters: The rasters of a run.
        repair: Whether to make copies.
        cache_dir: Where copies and diagnoses are kept.
        scheduler: Of a Dask cluster that is to measure and to copy; here it is one raster after
            the other, for a measurement wants the machine for itself, and a copy takes all cores.
        progress: Show bars.

    Returns:
        Handles to read from, in the same order, with the bands and regions of those given.
    """
    cache_dir, work = Path(cache_dir), {"scheduler": scheduler, "progress": progress}
    known = parallel.map_ordered(
        partial(_known_diagnosis, cache_dir=cache_dir), rasters,
        workers=1, description="measuring layouts", **work,
    )  # fmt: skip
    slow = [i for i, diagnosis in enumerate(known) if diagnosis and diagnosis.advisable]
    bad = [i for i in slow if repair and rasters[i].path.is_file()]
    copies = parallel.map_ordered(
        partial(_cached_copy, cache_dir=cache_dir), [rasters[i] for i in bad],
        workers=1, description="rewriting rasters", **work,
    )  # fmt: skip
    checked = list(rasters)
    for i, copy in zip(bad, copies, strict=True):
        if isinstance(copy, Raster):
            checked[i] = copy
            slow.remove(i)
        else:
            log.warning("%s is read as it is, it cannot be repaired: %s", rasters[i].path, copy)
    for i in slow:
        log.warning(
            "%s reads %.3g windows per second, %.1f times as many are expected of a tiled copy on "
            "this machine (%s); set REPAIR_LAYOUT = True, or run: python fileio.py doctor %s "
            "--rewrite OUT.tif", rasters[i].path, known[i].windows_per_second, known[i].gain,
            "; ".join(known[i].problems), rasters[i].path,
        )  # fmt: skip
    return checked


def _cached_copy(raster: Raster, cache_dir: Path) -> Raster | InputError:
    """Return a handle to a raster's tiled copy, made if there is none, or why it cannot be made."""
    copy = cache_dir / raster_fingerprint(raster) / f"{raster.identifier}.tif"
    try:
        # the fingerprint misses a change between its pieces, the file's time does not
        changed = max(Path(file).stat().st_mtime_ns for file in raster.files)
        if not copy.exists() or copy.stat().st_mtime_ns < changed:
            log.info("%s is being rewritten to %s", raster.path, copy)
            remove_strays(copy.parent)
            rewrite(raster.original or raster, copy)
            if copy.stat().st_mtime_ns < changed:  # of another clock
                set_time(copy, changed)
        found = Raster.open(copy, raster.bands).with_regions(raster.regions)
        return resampled(found, raster.target_resolution)
    except FullDiskError:
        raise
    except InputError as error:
        return error


def _known_diagnosis(raster: Raster, cache_dir: Path, **measuring: float) -> Diagnosis | None:
    """Return a raster's diagnosis, measured once; None if its header is fine."""
    raster = raster.original or raster
    with raster.anew() as src:
        slow, _ = _problems(src, measuring.get("window_size", 256))
    if not slow:
        return None
    record = cache_dir / raster_fingerprint(raster) / DIAGNOSIS
    with suppress(OSError, ValueError, TypeError):
        values = json.loads(record.read_text(encoding="utf-8"))
        lists = {name: tuple(v) for name, v in values.items() if isinstance(v, list)}
        return Diagnosis(**values | lists)
    diagnosis = diagnose(raster, **measuring)
    remove_strays(record.parent)
    try:
        write_json(record, asdict(diagnosis))
    except FullDiskError:
        raise
    except InputError as error:  # somebody else's cache
        log.warning("what was measured is not kept: %s", error)
    return diagnosis
