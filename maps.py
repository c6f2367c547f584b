"""The class map of a raster: what a model takes every pixel for, however large the raster is.

Overlapping tiles see the same ground. Their probabilities are blended by weights that sum to one,
so that no seam shows, or each pixel is taken from the tile whose core owns it. Tiles go from left
to right through a strip of a few rows of them; a pixel is settled as soon as no tile to come sees
it. So memory depends on the tiles that overlap, never on the raster. What two strips see is left
beside the settled rows of each, as sums, and is settled when both are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import ClassVar
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import rasterio
import torch
from rasterio.enums import ColorInterp, Resampling
from rasterio.windows import Window as RasterioWindow
from torch import nn

import fileio
import imutils
import parallel
import regions
import tiling
from ImageData import IGNORE, ImageData, InputError, Window
from imutils import Radiometry
from LargeRasterOR import VIEWS, autocast
from ModelConfig import Views
from strips import Tile, TilePredictor, batch_of, find_devices, load_model

SHARES = 254  # steps of a probability or an uncertainty, which is kept as a whole number
LEAST_ROWS = 4  # of tiles in a strip: what two strips see is kept by both, so that few are better
WEIGHT_STEPS = 4096  # weights of an axis are multiples of 1 / 4096: products add up without error
BLOCK = 256  # px, side of what is written at once
CHUNK_COLUMNS = 8 * BLOCK  # px that are put together at once
CLASS, CONFIDENCE, UNCERTAINTY = "class", "confidence", "uncertainty"  # planes of a map
ERROR_SIDE = 4096  # px of the windows in which errors are looked for
PNG = ".png"  # of a class map that any reader of pictures takes
PICTURE = {"nodata": None, "photometric": "RGB", "alpha": "YES", "interleave": "pixel"}
PIXELS_PER_PUSH = 2**22  # of rows whose regions are looked for at once


# ---------------------------------------------------------------------------------------------
# Which tile counts how much, and where
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """How the windows of a grid share the pixels along one axis.

    Attributes:
        starts: int64 (N,), of the windows, px.
        low: int64 (N,), from where a window counts, px; never falling.
        high: int64 (N,), up to where, px; never falling.
        weights: float32 (N, size), of a window's pixels; those of all windows sum to one at every
            pixel of the axis.
    """

    starts: np.ndarray
    low: np.ndarray
    high: np.ndarray
    weights: np.ndarray


def share_axis(length: int, size: int, overlap: int, *, smooth: bool) -> Axis:
    """Share the pixels of an axis among the windows of `tiling.grid_axis`.

    Smooth weights rise and fall as raised cosines over what a window shares with the one before it
    and the one after it, divided by the sum over all windows. Otherwise a pixel is all that of the
    window whose core it lies in.

    Args:
        length: Of the axis, px.
        size: Side of the windows, px.
        overlap: Least overlap of neighbours, px.
        smooth: Whether to blend.
    """
    starts, edges = tiling.grid_axis(length, size, overlap)
    ends = np.minimum(starts + size, length)
    pixels = starts[:, None] + np.arange(size)
    if not smooth:
        weights = (pixels >= edges[:-1, None]) & (pixels < edges[1:, None])
        return Axis(starts, edges[:-1], edges[1:], weights.astype(np.float32))
    rise, fall = np.ones(pixels.shape), np.ones(pixels.shape)
    shared = ends[:-1] - starts[1:]
    for number, width in enumerate(shared.tolist()):
        if width > 0:
            ramp = 0.5 - 0.5 * np.cos(np.pi * (np.arange(width) + 0.5) / width)
            rise[number + 1, :width] = ramp
            fall[number, starts[number + 1] - starts[number] :][:width] = ramp[::-1]
    tapers = np.where(pixels < length, rise * fall, 0.0)
    total = np.zeros(starts[-1] + size)
    for start, taper in zip(starts, tapers, strict=True):
        total[start : start + size] += taper
    steps = np.floor(tapers / np.maximum(total[pixels], 1e-12) * WEIGHT_STEPS + 0.5)
    # what rounding leaves goes to the heaviest window of each pixel
    heaviest, owner, given = np.zeros(len(total)), np.zeros(len(total), int), np.zeros(len(total))
    for number, start in enumerate(starts.tolist()):
        here = slice(start, start + size)
        given[here] += steps[number]
        owner[here] = np.where(steps[number] > heaviest[here], number, owner[here])
        heaviest[here] = np.maximum(heaviest[here], steps[number])
    left = np.where(np.arange(len(total)) < length, WEIGHT_STEPS - given, 0)
    mine = owner[pixels] == np.arange(len(starts))[:, None]
    steps += np.where(mine, left[pixels], 0)
    return Axis(starts, starts, ends, (steps / WEIGHT_STEPS).astype(np.float32))


@lru_cache(maxsize=4)
def _axis(length: int, size: int, overlap: int, smooth: bool) -> Axis:
    return share_axis(length, size, overlap, smooth=smooth)


@dataclass(frozen=True)
class Rows:
    """The rows of the raster that a strip's tiles see, px.

    Attributes:
        top: The first one.
        settled_from: From here on no strip above sees them.
        next_top: From here on the strip below sees them, too; they are its own.
        end: The strip's tiles end here.
    """

    top: int
    settled_from: int
    next_top: int
    end: int

    @property
    def settled(self) -> np.ndarray:
        """Tell which of the rows from `top` to `end` this strip alone sees, as bool."""
        rows = np.arange(self.top, self.end)
        return (rows >= self.settled_from) & (rows < self.next_top)


# ---------------------------------------------------------------------------------------------
# A strip
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MapPredictor(TilePredictor):
    """Classifies the pixels of strips of one raster and leaves each strip in the journal.

    Attributes:
        classes: Number of classes.
        smooth: Whether overlapping tiles are blended.
        planes: What is kept of each pixel: `CLASS`, perhaps `CONFIDENCE` (the probability of its
            class) and `UNCERTAINTY`.
        probabilities: Whether the probabilities of all classes are kept, too.
        views: Which views of a tile are averaged, of `LargeRasterOR.VIEWS`.
    """

    classes: int
    smooth: bool
    planes: tuple[str, ...]
    probabilities: bool
    views: Views

    least_rows: ClassVar[int] = LEAST_ROWS
    least_windows: ClassVar[int] = 1  # a strip's sums are held: a narrow raster's are few, too
    order: ClassVar[tuple[str, str]] = ("col", "row")

    @property
    def axis_x(self) -> Axis:
        """How tiles share columns."""
        return _axis(self.raster.width, self.tile_size, self.overlap, self.smooth)

    @property
    def axis_y(self) -> Axis:
        """How tiles share rows."""
        return _axis(self.raster.height, self.tile_size, self.overlap, self.smooth)

    @property
    def bands(self) -> int:
        """Number of planes, those of the classes included, which are the last."""
        return len(self.planes) + self.classes * self.probabilities

    @property
    def sums(self) -> int:
        """Number of sums of a pixel that is not settled: see `settle`."""
        return self.classes + (UNCERTAINTY in self.planes) + 2

    def rows_of(self, strip: int) -> Rows:
        """Return which rows of the raster a strip sees."""
        axis, first = self.axis_y, strip * self.strip_rows
        after = min(first + self.strip_rows, len(axis.starts))
        top, end = int(axis.low[first]), int(axis.high[after - 1])
        next_top = int(axis.low[after]) if after < len(axis.starts) else self.raster.height
        return Rows(top, int(axis.high[first - 1]) if first else 0, next_top, end)

    def settled_path(self, strip: int) -> Path:
        """Return where the settled rows of a strip are left, as a GeoTIFF of `bands`."""
        return self.part_path(strip).with_suffix(".tif")

    def seam_path(self, strip: int) -> Path:
        """Return where the sums of the other rows are left, as a GeoTIFF."""
        return self.part_path(strip).with_suffix(".seam.tif")

    def read_counts(self, strip: int) -> dict[str, np.ndarray] | None:
        """Read the numbers of tiles and the gaps of a strip; None if it is not there whole."""
        try:
            with np.load(self.part_path(strip)) as values:
                counts = {name: values[name] for name in ("predicted", "empty", "gaps")}
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return None
        settled, shown = self.rows_of(strip).settled, bool(counts["predicted"])
        wanted = {
            self.settled_path(strip): shown and settled.any(),
            self.seam_path(strip): shown and not settled.all(),
        }
        return counts if all(path.exists() for path, want in wanted.items() if want) else None

    def is_done(self, strip: int) -> bool:
        """Tell whether a strip is left whole and without gaps."""
        counts = self.read_counts(strip)
        return counts is not None and not len(counts["gaps"])

    def settle(self, sums: np.ndarray) -> np.ndarray:
        """Turn sums into the planes of a map.

        Args:
            sums: float32 (sums, H, W): of the weighted probabilities of each class; for the
                uncertainty of the weighted squares of all of them; of the weights; whether the
                pixel counts.

        Returns:
            uint8 (bands, H, W).
        """
        classes, (weight, counted) = sums[: self.classes], sums[-2:]
        known = (counted > 0) & (weight > 0)
        best, of_class = classes[0].copy(), np.zeros(known.shape, np.uint8)
        for number in range(1, self.classes):
            better = classes[number] > best
            of_class[better] = number
            np.maximum(best, classes[number], out=best)
        planes = np.empty((self.bands, *known.shape), np.uint8)
        planes[0] = np.where(known, of_class, IGNORE)
        if self.bands == 1:
            return planes
        scale = 1 / np.where(known, weight, 1)  # other than 1 only beside a gap
        for number, plane in enumerate(self.planes[1:], start=1):
            if plane == CONFIDENCE:
                share = best * scale
            else:
                mean_square = sums[self.classes] * scale
                square_of_mean = ((classes * scale) ** 2).sum(axis=0)
                share = np.sqrt(np.maximum(mean_square - square_of_mean, 0))
            planes[number] = _to_steps(share, known)
        for number, band in enumerate(classes[: self.bands - len(self.planes)]):
            planes[len(self.planes) + number] = _to_steps(band * scale, known)
        return planes

    def _collector(self, strip: int) -> _MappedStrip:
        return _MappedStrip(self, strip)

    def _look(self, images: torch.Tensor, device: torch.device) -> np.ndarray:
        """Return the probabilities of the classes, float32 (B, C, H, W)."""
        from LargeRasterSeg import segment_views  # detectors do without it

        model = self._model_on(device)
        with torch.inference_mode(), autocast(device.type, self.precision):
            shares = segment_views(model, images, VIEWS[self.views])
        expected = (len(images), self.classes, *images.shape[-2:])
        if tuple(shares.shape) != expected:
            raise InputError(
                f"the model returned an array of shape {tuple(shares.shape)}, expected {expected}: "
                "one value for each of its labels and each pixel"
            )
        return shares.cpu().numpy()


def classify_window(
    checkpoint: Path | str | nn.Module, raster: fileio.Raster, window: Window
) -> np.ndarray:
    """Classify a part of a raster, to look at; each pixel by the tile whose core owns it.

    Args:
        checkpoint: Of a model of segmentation, or the model, ready to predict.
        raster: The raster.
        window: The part, px, held whole.

    Returns:
        uint8 (H, W), class ids, `IGNORE` where no ground counts.
    """
    from LargeRasterSeg import segment_views  # detectors do without it

    model = _ready(checkpoint)
    size, classes = model.contract.tile_size, np.full((window.height, window.width), IGNORE, "u1")
    device = next(model.parameters(), torch.empty(0)).device
    grid = tiling.window_grid(window, size, model.contract.evaluation_overlap)
    rows = grid[[*tiling.WINDOW_COLUMNS, *tiling.CORE_COLUMNS]].to_numpy().tolist()
    step = batch_of(device)
    for batch in (rows[i : i + step] for i in range(0, len(rows), step)):
        tiles = [tiling.read_tile(raster, Window(*row[:4]), 0) for row in batch]
        stretch = model.contract.radiometry.stretch
        pixels = np.stack([stretch(image, valid) for image, valid, _ in tiles])
        with torch.inference_mode():
            shares = segment_views(
                model, torch.from_numpy(pixels).to(device), VIEWS[model.conf.views]
            )
        found = shares.argmax(dim=1).cpu().numpy()
        for row, (*_, counted), ids in zip(batch, tiles, found, strict=True):
            x, y, _, _, left, top, right, bottom = row
            own = np.where(counted, ids, IGNORE)[top - y : bottom - y, left - x : right - x]
            classes[top - window.y : bottom - window.y, left - window.x : right - window.x] = own
    return classes


def _ready(checkpoint: Path | str | nn.Module) -> nn.Module:
    if isinstance(checkpoint, nn.Module):
        return checkpoint
    return load_model(checkpoint, find_devices("auto")[0])


def find_errors(
    checkpoint: Path | str | nn.Module,
    images: Sequence[ImageData],
    blocks: pd.DataFrame,
    *,
    progress: bool = False,
) -> pd.DataFrame:
    """List where a model is wrong on the test ground, connected region by connected region.

    Blocks are looked at one by one, large ones in windows of `ERROR_SIDE` px, whose edges cut
    regions. The tiles are those of a test, so that the areas add up to the errors it counts, but
    for what rounding decides.

    Args:
        checkpoint: Of a model of segmentation, or the model, ready to predict.
        images: The labelled rasters.
        blocks: Ground blocks.
        progress: Show a bar.

    Returns:
        See `regions.find_errors`, with `raster, block`, and `area_m2` where rasters have a CRS.
    """
    model = _ready(checkpoint)
    labelled = {image.image_identifier: image for image in images}
    places = []
    for block in blocks[blocks["split"] == "test"].itertuples():
        grid = tiling.window_grid(Window(block.x, block.y, block.width, block.height), ERROR_SIDE)
        for x, y, right, bottom in grid[tiling.CORE_COLUMNS].to_numpy().astype(int).tolist():
            places.append((block, Window(x, y, right - x, bottom - y)))
    parts = []
    with parallel.Progress(len(places), "errors on the test ground", bar=progress) as report:
        for block, window in places:
            image = labelled[block.raster]
            truth = image.labels.read(window)
            found = classify_window(model, image.raster, window)
            classes = image.labels.classes
            part = regions.find_errors(
                truth, found, model.labels, classes.background, (window.x, window.y)
            )
            part = _measure_ground(part, image.raster)
            parts.append(part.assign(raster=block.raster, block=block.block))
            report.advance()
    return regions.sort_errors(pd.concat(parts, ignore_index=True))


def _to_steps(share: np.ndarray, known: np.ndarray) -> np.ndarray:
    return np.where(known, np.rint(share.clip(0, 1) * SHARES), IGNORE).astype(np.uint8)


class _Columns:
    """Writes a raster from left to right, each block once; what is passed over stays unwritten."""

    def __init__(self, dst: rasterio.io.DatasetWriter, fill: float) -> None:
        self.dst, self.fill = dst, fill
        self.cells = np.full((dst.count, dst.height, BLOCK), fill, dst.dtypes[0])
        self.block: int | None = None

    def write(self, x: int, values: np.ndarray) -> None:
        """Write columns from x on, (bands, H, W)."""
        while values.shape[-1]:
            block, at = divmod(x, BLOCK)
            if block != self.block:
                self.flush()
                self.block = block
            width = min(BLOCK - at, values.shape[-1])
            self.cells[..., at : at + width] = values[..., :width]
            x, values = x + width, values[..., width:]

    def flush(self) -> None:
        """Write what waits for its block to be full."""
        if self.block is None or (self.cells == self.fill).all():
            return
        x = self.block * BLOCK
        width = min(BLOCK, self.dst.width - x)
        window = ((0, self.dst.height), (x, x + width))
        self.dst.write(self.cells[..., :width], window=window)
        self.cells[:] = self.fill


class _DroppedError(Exception):
    """A strip is not to be left."""


class _MappedStrip:
    """The sums of a strip's tiles, from left to right."""

    def __init__(self, predictor: MapPredictor, strip: int) -> None:
        self.predictor, self.strip = predictor, strip
        self.rows = predictor.rows_of(strip)
        self.settled = self.rows.settled
        shape = (predictor.sums, self.rows.end - self.rows.top, predictor.tile_size)
        self.sums, self.x = np.zeros(shape, np.float32), 0
        self.files, self.writers = ExitStack(), []

    def _open(self) -> None:
        """Open the files, once there is something for them: most of a raster may be empty."""
        predictor, strip = self.predictor, self.strip
        layout = {
            "width": predictor.raster.width, "sparse_ok": True, "interleave": "band",
            "blockxsize": BLOCK, "blockysize": BLOCK, "zstd_level": 1,
        }  # fmt: skip
        for path, rows, bands, dtype, fill in (
            (predictor.settled_path(strip), self.settled, predictor.bands, "uint8", IGNORE),
            (predictor.seam_path(strip), ~self.settled, predictor.sums, "float32", 0),
        ):
            height = int(rows.sum())
            if height:
                dst = self.files.enter_context(
                    fileio.create_raster(
                        path, height=height, count=bands, dtype=dtype, nodata=fill, **layout
                    )
                )
            self.writers.append(_Columns(dst, fill) if height else None)

    def add(self, tiles: Sequence[Tile], counted: Sequence[np.ndarray], seen: np.ndarray) -> None:
        for tile, mask, probabilities in zip(tiles, counted, seen, strict=True):
            self._add_one(tile, mask, probabilities)

    def _add_one(self, tile: Tile, counted: np.ndarray, probabilities: np.ndarray) -> None:
        p = self.predictor
        spans = [
            _span(axis, start)
            for axis, start in ((p.axis_y, tile.window.y), (p.axis_x, tile.window.x))
        ]
        (low_y, high_y, weights_y), (low_x, high_x, weights_x) = spans
        self._advance(low_x)
        here = probabilities[
            :, low_y - tile.window.y : high_y - tile.window.y,
            low_x - tile.window.x : high_x - tile.window.x,
        ]  # fmt: skip
        weights = weights_y[:, None] * weights_x
        y, x = low_y - self.rows.top, low_x - self.x
        sums = self.sums[:, y : y + high_y - low_y, x : x + high_x - low_x]
        sums[: p.classes] += weights * here
        if UNCERTAINTY in p.planes:
            sums[p.classes] += weights * (here**2).sum(axis=0)
        sums[-2] += weights
        x0, y0, x1, y1 = tile.core
        own = counted[y0 - tile.window.y : y1 - tile.window.y, x0 - tile.window.x :]
        y, x = y0 - self.rows.top, x0 - self.x
        self.sums[-1, y : y + y1 - y0, x : x + x1 - x0] = own[:, : x1 - x0]

    def _advance(self, x: int) -> None:
        """Settle the columns before x: no tile to come sees them."""
        step = x - self.x
        if step <= 0:
            return
        size = self.sums.shape[-1]
        width = min(step, size, self.predictor.raster.width - self.x)
        ready = self.sums[..., :width]
        if ready[-2].any():
            if not self.writers:
                self._open()
            settled, seam = self.writers
            if settled is not None:
                settled.write(self.x, self.predictor.settle(ready[:, self.settled]))
            if seam is not None:
                seam.write(self.x, ready[:, ~self.settled])
        kept = max(size - step, 0)
        self.sums[..., :kept] = self.sums[..., size - kept :].copy()
        self.sums[..., kept:] = 0
        self.x = x

    def finish(self, predicted: int, empty: int, gaps: np.ndarray) -> Path:
        self._advance(self.predictor.raster.width)
        for writer in self.writers:
            if writer is not None:
                writer.flush()
        self.files.close()
        path = self.predictor.part_path(self.strip)  # it comes last: with it the strip is whole
        with fileio.atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(file, predicted=predicted, empty=empty, gaps=gaps)
        return path

    def drop(self) -> None:
        with suppress(_DroppedError), self.files:
            raise _DroppedError  # so that no file takes its name


def _span(axis: Axis, start: int) -> tuple[int, int, np.ndarray]:
    """Return where the window that starts there counts, and how much."""
    number = int(np.searchsorted(axis.starts, start))
    low, high = int(axis.low[number]), int(axis.high[number])
    return low, high, axis.weights[number, low - start : high - start]


# ---------------------------------------------------------------------------------------------
# All strips
# ---------------------------------------------------------------------------------------------


class _Journal:
    """Puts windows of the map together from what the strips left."""

    def __init__(self, predictor: MapPredictor) -> None:
        self.predictor = predictor
        self.rows = [predictor.rows_of(i) for i in range(len(predictor.strip_tops))]
        self.ends = np.array([rows.end for rows in self.rows])
        self.tops = np.array([rows.top for rows in self.rows])
        self.open = lru_cache(maxsize=8)(rasterio.open)  # files come one after the other
        # a strip without ground leaves none
        self.shows = cache(lambda strip: predictor.settled_path(strip).exists()
                               or predictor.seam_path(strip).exists())  # fmt: skip

    def read(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """Return the planes of a window of the map, uint8 (bands, H, W)."""
        planes = np.full((self.predictor.bands, y1 - y0, x1 - x0), IGNORE, np.uint8)
        first, last = np.searchsorted(self.tops, [y0, y1 - 1], "right") - 1
        for strip in range(first, last + 1):
            rows = self.rows[strip]
            seam_end = min(max(rows.settled_from, rows.top), rows.next_top)
            for low, high, settled in (
                (rows.top, seam_end, False),
                (seam_end, rows.next_top, True),
            ):
                low, high = max(low, y0), min(high, y1)
                if low >= high:
                    continue
                if settled and self.shows(strip):
                    path, skipped = self.predictor.settled_path(strip), seam_end
                    part = self._window(path, low - skipped, high - skipped, x0, x1)
                elif not settled and any(map(self.shows, self._above(strip, low))):
                    part = self.predictor.settle(self._sums(strip, low, high, x0, x1))
                else:
                    continue
                planes[:, low - y0 : high - y0] = part
        return planes

    def _above(self, strip: int, row: int) -> range:
        """Return a strip and those above it that see a row, too."""
        return range(int(np.searchsorted(self.ends, row, "right")), strip + 1)

    def _window(self, path: Path, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        return self.open(path).read(window=((y0, y1), (x0, x1)))

    def _sums(self, strip: int, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """Add up what a strip and those above it saw of rows that several see."""
        total = np.zeros((self.predictor.sums, y1 - y0, x1 - x0), np.float32)
        for number in filter(self.shows, self._above(strip, y0)):
            rows = self.rows[number]
            places = np.flatnonzero(~rows.settled)  # the rows that its file holds, from its top on
            low, high = max(y0, rows.top), min(y1, rows.end)
            if low >= high:
                continue
            at = int(np.searchsorted(places, low - rows.top))
            path = self.predictor.seam_path(number)
            total[:, low - y0 : high - y0] += self._window(path, at, at + high - low, x0, x1)
        return total

    def close(self) -> None:
        """Let go of the files."""
        self.open.cache_clear()


@dataclass(frozen=True)
class MapFiles:
    """What is written of a map.

    Attributes:
        classes: The class map, a GeoTIFF, or a PNG whose gray levels are the class ids.
        regions: Files of polygons, of any suffix that `fileio.write_annotations` knows.
        probabilities: GeoTIFF of one band per class, if wanted.
        uncertainty: GeoTIFF of one band, if wanted.
        overlay: GeoTIFF of the raster's picture under the colours of all classes but the
            background, if wanted.
        opacity: How much of that the colours are, 0-1.
        least_area: Least area of a polygon, px.
        names: Of the classes, by class id.
        colors: Of the classes, `#RRGGBB`.
        background: Class id of the background; None: there is none.
    """

    classes: Path
    regions: tuple[Path, ...]
    probabilities: Path | None
    uncertainty: Path | None
    overlay: Path | None
    opacity: float
    least_area: int
    names: tuple[str, ...]
    colors: tuple[str, ...]
    background: int | None


def write_map(
    predictor: MapPredictor, files: MapFiles, made: Iterator[int]
) -> dict[str, dict[str, int]]:
    """Put the strips of a journal together, from top to bottom, as they are made.

    Args:
        predictor: Whose strips they are.
        files: What to write.
        made: Comes to its next item when the next strip is there, in order.

    Returns:
        `pixels` of every class and, where there are polygons, `regions`.
    """
    with ExitStack() as stack:
        sheets = _Sheets(predictor, files, stack)
        journal = _Journal(predictor)
        stack.callback(journal.close)
        done = 0
        for strip in made:
            ready = journal.rows[strip].next_top
            whole = ready == predictor.raster.height
            end = ready if whole else ready - ready % BLOCK
            for top in range(done, end, BLOCK):
                sheets.write_rows(journal, top, min(top + BLOCK, end))
            done = max(done, end)
        sheets.finish()
    found = {"pixels": dict(zip(files.names, sheets.pixels.tolist(), strict=True))}
    return found | ({"regions": sheets.regions} if files.regions else {})


class _Sheets:
    """The files of a map, open for writing."""

    def __init__(self, predictor: MapPredictor, files: MapFiles, stack: ExitStack) -> None:
        self.predictor, self.files = predictor, files
        self.pixels = np.zeros(len(files.names), np.int64)
        self.regions = dict.fromkeys(files.names, 0)
        count = len(files.names)
        self.classes = self._open(stack, files.classes, 1, Resampling.nearest)
        if files.classes.suffix.lower() != PNG:  # its palette would hide the ids from most readers
            self.classes.write_colormap(1, _color_table(files.colors))
        self.classes.set_band_description(1, "class")
        names = {f"class_{i}": name for i, name in enumerate(files.names)}
        self.classes.update_tags(1, **names)
        self.probabilities = self.uncertainty = None
        if files.probabilities is not None:
            self.probabilities = self._open(stack, files.probabilities, count, Resampling.average)
            for number, name in enumerate(files.names, start=1):
                self.probabilities.set_band_description(number, f"probability of {name}")
        if files.uncertainty is not None:
            self.uncertainty = self._open(stack, files.uncertainty, 1, Resampling.average)
            self.uncertainty.set_band_description(1, "disagreement of overlapping tiles")
        self.overlay = None
        if files.overlay is not None:
            dst = self._open(stack, files.overlay, 4, Resampling.average, **PICTURE)
            self.overlay = _Overlay(predictor.raster, predictor.radiometry, files, dst)
        self.appends: list[Callable[[pd.DataFrame], None]] = [
            stack.enter_context(
                fileio.annotation_writer(
                    path,
                    predictor.raster,
                    files.names,
                    shape="own",
                    colors=dict(zip(files.names, files.colors, strict=True)),
                )
            )
            for path in files.regions
        ]
        self.front = regions.RegionFront(files.names, range(count), files.least_area)

    def _open(
        self, stack: ExitStack, path: Path, count: int, overviews: Resampling, **layout: object
    ) -> rasterio.io.DatasetWriter:
        raster = self.predictor.raster
        profile = {
            "width": raster.width, "height": raster.height, "count": count, "dtype": "uint8",
            "nodata": IGNORE, "sparse_ok": True, "interleave": "band", "blockxsize": BLOCK,
            "blockysize": BLOCK, "crs": raster.crs, "transform": rasterio.Affine(*raster.transform),
        } | layout  # fmt: skip
        if path.suffix.lower() == PNG:
            return stack.enter_context(fileio.create_png(path, **profile))
        dst = stack.enter_context(fileio.create_raster(path, overviews=overviews, **profile))
        if overviews is Resampling.average and not layout:  # shares: shown from 0 to 1
            dst.scales = (1 / SHARES,) * count
            dst.colorinterp = [ColorInterp.gray] + [ColorInterp.undefined] * (count - 1)
        return dst

    def write_rows(self, journal: _Journal, y0: int, y1: int) -> None:
        """Write rows of the map, from block to block."""
        width, named = self.predictor.raster.width, len(self.predictor.planes)
        kept = []
        for x0 in range(0, width, CHUNK_COLUMNS):
            x1 = min(x0 + CHUNK_COLUMNS, width)
            planes = journal.read(y0, y1, x0, x1)
            self.pixels += np.bincount(planes[0].ravel(), minlength=256)[: len(self.pixels)]
            layers = dict(zip(self.predictor.planes, planes, strict=False))
            window = ((y0, y1), (x0, x1))
            for dst, values in (
                (self.classes, layers[CLASS][None]),
                (self.probabilities, planes[named:]),
                (self.uncertainty, planes[[self._place(UNCERTAINTY)]]),
            ):
                if dst is not None and (values != IGNORE).any():
                    dst.write(values, window=window)
            if self.overlay is not None:
                self.overlay.write(Window(x0, y0, x1 - x0, y1 - y0), layers[CLASS])
            if self.appends:
                kept.append(planes[[0, self._place(CONFIDENCE)]])
        if self.appends:
            classes, shares = np.concatenate(kept, axis=2)
            self._find_regions(classes, shares, last=y1 == self.predictor.raster.height)

    def _place(self, plane: str) -> int:
        planes = self.predictor.planes
        return planes.index(plane) if plane in planes else 0

    def _find_regions(self, classes: np.ndarray, shares: np.ndarray, *, last: bool) -> None:
        step = int(np.clip(PIXELS_PER_PUSH // classes.shape[1], 16, len(classes)))
        for top in range(0, len(classes), step):
            end = last and top + step >= len(classes)
            rows = slice(top, top + step)
            df = self.front.push(classes[rows], shares[rows].astype(np.float32) / SHARES, last=end)
            if df.empty:
                continue
            for label, number in df["label"].value_counts().items():
                self.regions[label] += number
            df = _measure_ground(df, self.predictor.raster)
            for append in self.appends:
                append(df)

    def finish(self) -> None:
        """Give empty files of polygons their columns."""
        if self.appends and not sum(self.regions.values()):
            nothing = np.full((1, 1), IGNORE, np.uint8)
            df = regions.RegionFront(self.files.names, ()).push(
                nothing, nothing / SHARES, last=True
            )
            for append in self.appends:
                append(_measure_ground(df, self.predictor.raster))


class _Overlay:
    """The picture of a raster under the colours of its classes, stretched the same everywhere."""

    def __init__(
        self, raster: fileio.Raster, radiometry: Radiometry, files: MapFiles,
        dst: rasterio.io.DatasetWriter,
    ) -> None:  # fmt: skip
        self.raster, self.dst, self.opacity = raster.own, dst, np.float32(files.opacity)
        own = {n: getattr(radiometry, n)[: len(self.raster.bands)]
               for n in ("low", "high", "mean", "std")}  # fmt: skip
        self.radiometry = replace(radiometry, **own)
        colors = _color_table(files.colors)
        self.colors = np.zeros((IGNORE + 1, 3), np.float32)
        self.colors[list(colors)] = [color[:3] for color in colors.values()]
        self.painted = ~np.isin(np.arange(IGNORE + 1), [files.background, IGNORE])
        ground = pd.DataFrame([(self.raster.identifier, 0, 0, raster.width, raster.height)],
                              columns=["raster", *tiling.WINDOW_COLUMNS])  # fmt: skip
        try:
            pixels = tiling.sample_pixels(ground, {self.raster.identifier: self.raster}, seed=0)
        except InputError:  # hardly any ground, or a damaged place
            pixels = np.array([own["low"], own["high"]]).T
        shown = self.radiometry.stretch(pixels[:, None])
        self.bounds = imutils.preview_bounds(shown, np.ones(shown.shape[1:], bool))

    def write(self, window: Window, classes: np.ndarray) -> None:
        """Write a window, given its classes (H, W)."""
        try:
            image = self.raster.read(window)
            valid = self.raster.read_valid(window, image)
        except InputError:  # a gap, of which the record of the prediction tells
            return
        if not valid.any():
            return
        shown = self.radiometry.stretch(image, valid)
        picture = imutils.preview_stretch(shown, valid, self.bounds).astype(np.float32)
        picture = np.broadcast_to(picture.reshape(*classes.shape, -1), (*classes.shape, 3))
        blended = picture + self.opacity * (self.colors[classes] - picture)
        picture = np.where(self.painted[classes][..., None], blended, picture)
        pixels = np.concatenate([np.rint(picture), 255 * valid[..., None]], axis=2)
        pixels = pixels.astype(np.uint8).transpose(2, 0, 1)
        self.dst.write(pixels, window=RasterioWindow(*window))


def _measure_ground(df: pd.DataFrame, raster: fileio.Raster) -> pd.DataFrame:
    """Add the regions' areas on the ground in square metres, where there is a globe."""
    if raster.resolution is None:
        return df
    center = df[["xmin", "ymin"]].to_numpy(float) / 2 + df[["xmax", "ymax"]].to_numpy(float) / 2
    pixel = np.abs(np.linalg.det(raster.metres_per_pixel(center)))
    return df.assign(area_m2=(df["area_px"] * pixel).round(4))


def _color_table(colors: Sequence[str]) -> dict[int, tuple[int, int, int, int]]:
    table = {i: (*bytes.fromhex(color[1:]), 255) for i, color in enumerate(colors)}
    return table | {IGNORE: (0, 0, 0, 0)}


def name_colors(
    labels: Sequence[str], colormap: Mapping[int, tuple[str, str]], default: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names and colours of classes, those of a colormap first.

    Raises:
        InputError: The colormap gives a class another class's name, or a class that there is not.
    """
    for value, (name, _) in colormap.items():
        if value >= len(labels):
            raise InputError(
                f"the colormap has a class {value} ({name}), but the model's {len(labels)} classes "
                f"are {dict(enumerate(labels))}; remove that line"
            )
        if name in labels and labels[value] != name:
            raise InputError(
                f"the colormap names class {value} {name!r}, but that is the model's class "
                f"{list(labels).index(name)}; its classes are {dict(enumerate(labels))}"
            )
    known = {i: (label, default[i]) for i, label in enumerate(labels)} | dict(colormap)
    names, colors = zip(*(known[i] for i in range(len(labels))), strict=True)
    if len(set(names)) < len(names):
        raise InputError(f"the colormap gives two classes one name: {names}; tell them apart")
    return names, colors
