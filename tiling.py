"""The tile grid: windows and cores, objects to tiles, tile filters, the tile index on disk.

A tile is a row of a table, not a file: a window of the raster, the core whose objects it owns, an
angle, a split. Turned tiles are `np.rot90` of the same window. Chips are written only on request.
"""

from __future__ import annotations

import itertools
import logging
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import rasterio
import shapely
from PIL import Image

import fileio
import imutils
import parallel
from ImageData import BOX_COLUMNS, IGNORE, ImageData, InputError, LabelSource, Window

log = logging.getLogger(__name__)

WINDOW_COLUMNS = ["x", "y", "width", "height"]
CORE_COLUMNS = ["core_xmin", "core_ymin", "core_xmax", "core_ymax"]
BLOCK_COLUMNS = ["block_xmin", "block_ymin", "block_xmax", "block_ymax"]
GROUND_BOX_COLUMNS = ["ground_xmin", "ground_ymin", "ground_xmax", "ground_ymax"]
TILES_NAME, BOXES_NAME = "tiles.parquet", "boxes.parquet"
CLASSES_NAME = "classes.json"  # of masks; `masks.ClassTable.load` reads it
UNDER_ANNOTATED, UNDER_PROPORTION = "under min_annotated", "under class_proportion"
PNG_KINDS = {("uint8", 1), ("uint8", 3), ("uint16", 1)}  # types and numbers of bands
ATTEMPTS = 32  # windows drawn at most for each that is to have a valid pixel
MASK_OVERLAP = 64  # px that neighbouring tiles share at least where their edges know too little
JOB_WINDOWS = 256  # windows per worker call: long enough to pay for the call, short enough to share
SAMPLE_WINDOWS = 16  # the same for samples, which are few

TileFilter = Callable[[np.ndarray, int], bool]  # (image (H, W, bands), pixel_limit) -> keep


# ---------------------------------------------------------------------------------------------
# The grid
# ---------------------------------------------------------------------------------------------


def window_grid(
    extent: Window, size: int, overlap: int = 0, rows: slice = slice(None)
) -> pd.DataFrame:
    """Cover an extent with equal windows whose cores partition it.

    Windows stay inside the extent: the last row and column shift back. Where two neighbours
    overlap, their cores meet in the middle. Only an extent smaller than the window is exceeded, to
    the right and below.

    Args:
        extent: The ground to cover, in px of its raster.
        size: Side of the square windows in px.
        overlap: Least overlap of neighbours in px, 0 <= overlap < size.
        rows: Which rows of the grid to return.

    Returns:
        One row per window: `row, col, x, y, width, height` and the half-open core `core_xmin,
        core_ymin, core_xmax, core_ymax`, all in px of the raster.
    """
    x, x_edges = grid_axis(extent.width, size, overlap)
    y, y_edges = grid_axis(extent.height, size, overlap)
    numbers = np.arange(len(y))[rows]
    row, col = np.repeat(numbers, len(x)), np.tile(np.arange(len(x)), len(numbers))
    return pd.DataFrame(
        {
            "row": row, "col": col,
            "x": extent.x + x[col], "y": extent.y + y[row], "width": size, "height": size,
            "core_xmin": extent.x + x_edges[col], "core_ymin": extent.y + y_edges[row],
            "core_xmax": extent.x + x_edges[col + 1], "core_ymax": extent.y + y_edges[row + 1],
        }
    )  # fmt: skip


def grid_axis(length: int, size: int, overlap: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where the windows of a grid start along one axis, and the edges of their cores, px."""
    if not 0 <= overlap < size:
        raise InputError(f"overlap must be >= 0 and < the window's {size} px, got {overlap}")
    starts = np.append(np.arange(0, length - size, size - overlap), max(length - size, 0))
    middles = (starts[1:] + starts[:-1] + size) // 2
    return starts, np.concatenate([[0], middles, [length]])


def keep_detections(boxes: np.ndarray, windows: np.ndarray, cores: np.ndarray) -> np.ndarray:
    """Tell which detections the tile that found them keeps.

    A detection is kept if its centre lies in the tile's core. Two tiles may each see the centre on
    the other's side of the seam, and none would keep it; so it is also kept up to half the way to
    the tile's edge, unless it touches an edge beyond which another tile sees more of it. What two
    tiles keep, non-maximum suppression is to thin out.

    Args:
        boxes: Detections (N, 4), xyxy px of the raster.
        windows: The tile of each (N, 4), or one of all (4,), likewise.
        cores: Their cores.

    Returns:
        bool (N,).
    """
    windows, cores = np.broadcast_to(windows, boxes.shape), np.broadcast_to(cores, boxes.shape)
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    own = ((center >= cores[:, :2]) & (center < cores[:, 2:])).all(axis=1)
    low, high = np.split((cores + windows) / 2, 2, axis=1)
    near = ((center >= low) & (center <= high)).all(axis=1)
    cut = ((np.abs(boxes - windows) < 1) & (cores != windows)).any(axis=1)
    return own | (near & ~cut)


def assign_boxes(
    windows: pd.DataFrame, df: pd.DataFrame, min_visible: float | np.ndarray
) -> pd.DataFrame:
    """Find which objects each window owns or shows.

    The window whose core holds an object's centre owns it. A window also shows a neighbour's object
    of which at least `min_visible` of the area lies inside it, so that training does not teach it
    as background.

    Args:
        windows: Grid of one raster with `window`, its windows and cores (px of the raster), and the
            extents of their blocks as `block_xmin, block_ymin, block_xmax, block_ymax`.
        df: Objects of the raster with `label` and boxes.
        min_visible: Share of a box's area, 0-1; one for all windows, or one for each.

    Returns:
        One row per window and object: `window`, `object` (row of `df`), `label`, `owned`, the box
        clamped to the window in its pixels, and the box clamped to the block in pixels of the
        raster as `ground_xmin` to `ground_ymax`.
    """
    boxes = df[BOX_COLUMNS].to_numpy(dtype="float64")
    ground = windows[WINDOW_COLUMNS].to_numpy()
    ground = np.concatenate([ground[:, :2], ground[:, :2] + ground[:, 2:]], axis=1)
    of_object, of_window = shapely.STRtree(shapely.box(*ground.T)).query(shapely.box(*boxes.T))
    boxes, ground = boxes[of_object], ground[of_window]
    core = windows[CORE_COLUMNS].to_numpy()[of_window]
    block = windows[BLOCK_COLUMNS].to_numpy()[of_window]

    least = np.broadcast_to(min_visible, len(windows))[of_window]
    clamped, owned, shown = show_boxes(boxes, ground, core, least)
    in_window = clamped - ground[:, [0, 1, 0, 1]]
    return pd.DataFrame(
        {
            "window": windows["window"].to_numpy()[of_window],
            "object": of_object,
            "label": df["label"].to_numpy()[of_object],
            "owned": owned,
            **dict(zip(BOX_COLUMNS, in_window.T, strict=True)),
            **dict(zip(GROUND_BOX_COLUMNS, imutils.clip_boxes(boxes, block).T, strict=True)),
        }
    )[shown].sort_values(["window", "object"], ignore_index=True)


def show_boxes(
    boxes: np.ndarray, windows: np.ndarray, cores: np.ndarray, min_visible: float | np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Apply the rule of `assign_boxes` to boxes (N, 4), row by row or against one window (4,).

    Args:
        boxes: The objects, xyxy px of the raster.
        windows: The windows, likewise.
        cores: Their cores, likewise.
        min_visible: See `assign_boxes`.

    Returns:
        The boxes clamped to the windows (N, 4), px of the raster; whether the window owns each; and
        whether it shows it, which those it owns it does wherever an area is left of them.
    """
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    owned = ((center >= cores[..., :2]) & (center < cores[..., 2:])).all(axis=1)
    clamped = imutils.clip_boxes(boxes, windows)
    area = imutils.box_area(clamped)
    visible = area >= min_visible * imutils.box_area(boxes)
    return clamped, owned, (owned | visible) & (area > 0)


# ---------------------------------------------------------------------------------------------
# Tile filters
# ---------------------------------------------------------------------------------------------


def black_pixel_filter(image_array: np.ndarray, pixel_limit: int) -> bool:
    """Keep tiles (H, W, bands) with at most `pixel_limit` pixels that are 0 in all bands."""
    return np.count_nonzero((image_array == 0).all(axis=-1)) <= pixel_limit


def constant_filter(image_array: np.ndarray, pixel_limit: int) -> bool:
    """Keep tiles (H, W, bands) of which more than `pixel_limit` pixels differ from the first."""
    return np.count_nonzero((image_array != image_array[0, 0]).any(axis=-1)) > pixel_limit


def filter_tiles(
    raster: fileio.Raster,
    windows: Sequence[Window],
    filters: Sequence[TileFilter],
    pixel_limit: int,
    min_valid: float = 0.0,
) -> list[str]:
    """Try windows of a raster, one in memory at a time; invalid pixels are 0 to the filters.

    Args:
        raster: The raster.
        windows: What to try.
        filters: See `TileFilter`.
        pixel_limit: Handed to every filter.
        min_valid: Least share (0-1) of a window that is valid ground that counts.

    Returns:
        For each window, the name of the first filter that rejects it, or "".

    Raises:
        InputError: A filter fails (names the window).
    """
    rejected_by = []
    for window in windows:
        image, valid, counted = read_tile(raster, window, 0)
        if np.count_nonzero(counted) < min_valid * counted.size:
            rejected_by.append(f"valid share under MIN_VALID, {min_valid:g}")
            continue
        if not valid.all():
            image = np.where(valid, image, 0)  # no data is black
        image = np.moveaxis(image, 0, -1)
        reason = ""
        for tile_filter in filters:
            name = getattr(tile_filter, "__name__", type(tile_filter).__name__)
            try:
                keep = bool(tile_filter(image, pixel_limit))
            except Exception as error:
                raise InputError(
                    f"tile filter {name} failed on window {tuple(window)} of {raster.path}, an "
                    f"array {image.shape} of {image.dtype}: {error!r}"
                ) from error
            if not keep:
                reason = name
                break
        rejected_by.append(reason)
    return rejected_by


# ---------------------------------------------------------------------------------------------
# Making the index
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TilingOptions:
    """What a tile index depends on, beside rasters, annotations and ground blocks.

    Attributes:
        angles: Quarter turns of training tiles in degrees, beside 0.
        overlap: Least overlap of training tiles in px.
        evaluation_overlap: The same for validation and test, at most half the tile; the largest
            object should fit in.
        min_visible: See `assign_boxes`.
        empty_tile_ratio: Training tiles without any object, per training tile with one.
        filters: Tile filters; they apply to training only, for validation and test ground must
            not depend on the tile size.
        pixel_limit: Handed to every filter.
        min_valid: Least share of a training tile that is valid ground that counts.
        materialize: Write chips too.
        seed: Of the hash that picks empty tiles.
        min_annotated: With masks, least part of a training tile's pixels, in percent, that a class
            other than the background has.
        class_proportion: With masks, class id -> least part, in percent, of a training tile.
    """

    angles: tuple[int, ...] = ()
    overlap: int = 0
    evaluation_overlap: int = 0
    min_visible: float = 0.25
    empty_tile_ratio: float = 0.25
    filters: tuple[TileFilter, ...] = ()
    pixel_limit: int = 0
    min_valid: float = 0.25
    materialize: bool = False
    seed: int = 0
    min_annotated: float = 0.0
    class_proportion: Mapping[int, float] = field(default_factory=dict)

    def evaluation_overlap_of(self, size: int) -> int:
        """Return the overlap in px that evaluation windows of a size get."""
        return min(self.evaluation_overlap, size // 2)


def make_tiles(
    images: Sequence[ImageData],
    blocks: pd.DataFrame,
    sizes: Sequence[int],
    tiling_directory: Path,
    options: TilingOptions,
    *,
    force: bool = False,
    workers: int | None = None,
    scheduler: str | None = None,
    progress: bool = False,
) -> dict[int, Path]:
    """Make the tile index of every size, or reuse what was made from the same input.

    Args:
        images: The annotated rasters.
        blocks: Ground blocks, see `splits.ground_blocks`.
        sizes: Tile sides in px.
        tiling_directory: Each index goes to its folder `tiling_{size}`.
        options: See `TilingOptions`.
        force: Make them anew in any case.
        workers: Processes for filters, threads for chips; None takes all cores.
        scheduler: Of a Dask cluster that takes their place, see `parallel.imap_ordered`.
        progress: Show bars.

    Returns:
        The folder of each size; `read_tiles` reads it.
    """
    return {
        size: make_single_size(
            size, images, blocks, tiling_directory, options,
            force=force, workers=workers, scheduler=scheduler, progress=progress,
        )
        for size in sizes
    }  # fmt: skip


def make_single_size(
    size: int,
    images: Sequence[ImageData],
    blocks: pd.DataFrame,
    tiling_directory: Path,
    options: TilingOptions,
    *,
    force: bool = False,
    workers: int | None = None,
    scheduler: str | None = None,
    progress: bool = False,
) -> Path:
    """Make the tile index of one size; see `make_tiles`.

    One process at a time makes it, the others wait. One that is killed leaves the answers of the
    filters, the counts of classes and its chips to the next.
    """
    if options.pixel_limit >= size**2:  # it cannot reject, so that no tile need be read for it
        able = tuple(f for f in options.filters if f is not black_pixel_filter)
        options = replace(options, filters=able)
    classes = _classes_of(images, options)
    directory = Path(tiling_directory) / f"tiling_{size}"
    made_from = {
        "size": size,
        "options": vars(options),
        "blocks": blocks,
        "rasters": [image.raster.made_from for image in images],
        "annotations": [image.df for image in images],
    }
    if classes:
        # the labels' own fingerprint speaks for polygons, too
        made_from["annotations"] = [image.labels.made_from for image in images]
    manifest, begun = directory / "manifest.json", directory / "begun.json"
    filtered, counted = directory / "filtered.jsonl", directory / "counted.jsonl"
    if not force and fileio.is_finished(manifest, made_from):  # readers need no lock
        log.info("tiles of %d px are up to date in %s", size, directory)
        return directory
    with fileio.exclusive(directory, wait=True):
        if not force and fileio.is_finished(manifest, made_from):
            log.info("tiles of %d px were made by another process in %s", size, directory)
            return directory
        manifest.unlink(missing_ok=True)
        if force or not fileio.is_finished(begun, made_from):
            begun.unlink(missing_ok=True)
            for path in (filtered, counted, *directory.glob("tile[._]*")):  # the chips
                path.unlink(missing_ok=True)
            fileio.mark_finished(begun, made_from, [])
        windows, boxes = index_windows(size, images, blocks, options)
        work = {"workers": workers, "scheduler": scheduler, "progress": progress}
        journal = fileio.Journal(filtered)
        if classes:
            columns = class_columns(len(classes))
            windows[columns] = count_classes(windows, images, fileio.Journal(counted), **work)
            windows = _reject_masks(windows, images, options, journal, work)
            meant = dict(images[0].labels.classes.values)
            fileio.write_json(directory / CLASSES_NAME, {"names": list(classes), "values": meant})
        else:
            windows = _reject(windows, boxes, images, options, journal, work)
        tiles = _turn(windows, options.angles)
        # the old tables are replaced, not deleted: whoever reads them sees whole ones
        fileio.write_table(directory / TILES_NAME, tiles)
        fileio.write_table(directory / BOXES_NAME, boxes)
        if options.materialize:
            write_chips(directory, tiles, boxes, images, keep=True, **work)
        fileio.mark_finished(manifest, made_from, [TILES_NAME, BOXES_NAME])
        for path in (begun, filtered, counted):
            path.unlink(missing_ok=True)
    log.info(
        "tiles of %d px: %d of %d windows kept, %d tiles with turned ones", size,
        windows["kept"].sum(), len(windows), tiles["kept"].sum(),
    )  # fmt: skip
    return directory


def read_tiles(directory: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read a tile index.

    Returns:
        The tiles: `tile` (int), `window` (int, the same for all angles of a window), `raster,
        block, row, col, x, y, width, height`, the core, `angle, split, objects` (owned), with masks
        `class_0, class_1, ...` (valid px of each class), `kept, reason`; and the boxes, see
        `assign_boxes`, at angle 0.
    """
    return (
        pd.read_parquet(Path(directory) / TILES_NAME),
        pd.read_parquet(Path(directory) / BOXES_NAME),
    )


def generate_split_raster_annotation(
    size: int, image: ImageData, blocks: pd.DataFrame, options: TilingOptions
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Lay the grid over every block of one raster and assign its objects; reads no pixel.

    Returns:
        The ground windows, numbered from 0, with `objects` (owned); and the boxes, see
        `assign_boxes`.
    """
    mine = blocks[(blocks["raster"] == image.image_identifier) & (blocks["split"] != "unused")]
    mine = mine.assign(
        overlap=np.where(
            mine["split"] == "train", options.overlap, options.evaluation_overlap_of(size)
        )
    )
    grids = []
    # blocks of one shape share their grid
    for (width, height, overlap), group in mine.groupby(["width", "height", "overlap"]):
        grid = window_grid(Window(0, 0, int(width), int(height)), size, int(overlap))
        x, y = (np.repeat(group[name].to_numpy(), len(grid)) for name in ("x", "y"))
        windows = grid.iloc[np.tile(np.arange(len(grid)), len(group))].assign(
            block=np.repeat(group["block"].to_numpy(), len(grid)),
            split=np.repeat(group["split"].to_numpy(), len(grid)),
            block_xmin=x, block_ymin=y, block_xmax=x + width, block_ymax=y + height,
        )  # fmt: skip
        windows[["x", "core_xmin", "core_xmax"]] += x[:, None]
        windows[["y", "core_ymin", "core_ymax"]] += y[:, None]
        grids.append(windows)
    windows = pd.concat(grids).sort_values(["block", "row", "col"], ignore_index=True)
    windows["raster"] = image.image_identifier
    windows["window"] = np.arange(len(windows))
    # Evaluation knows all that reaches in, to ignore detections of it; training shows what helps.
    least = np.where(windows["split"] == "train", options.min_visible, 0.0)
    boxes = assign_boxes(windows, image.df, least)
    owned = boxes["window"][boxes["owned"]]
    windows["objects"] = np.bincount(owned, minlength=len(windows))
    columns = ["window", "raster", "block", "row", "col", *WINDOW_COLUMNS, *CORE_COLUMNS]
    return windows[[*columns, "split", "objects"]], boxes


def index_windows(
    size: int, images: Sequence[ImageData], blocks: pd.DataFrame, options: TilingOptions
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Index the windows and boxes of all rasters, numbered through; reads no pixel."""
    all_windows, all_boxes, first = [], [], 0
    for image in images:
        windows, boxes = generate_split_raster_annotation(size, image, blocks, options)
        all_windows.append(windows.assign(window=windows["window"] + first))
        all_boxes.append(boxes.assign(window=boxes["window"] + first))
        first += len(windows)
    return pd.concat(all_windows, ignore_index=True), pd.concat(all_boxes, ignore_index=True)


def _reject(
    windows: pd.DataFrame,
    boxes: pd.DataFrame,
    images: Sequence[ImageData],
    options: TilingOptions,
    journal: fileio.Journal,
    work: Mapping[str, object],
) -> pd.DataFrame:
    reason = pd.Series("", index=windows.index, dtype=object)
    train = windows["split"] == "train"
    rasters = {image.image_identifier: image.raster for image in images}
    attempt = partial(_try_windows, rasters=rasters, options=options, journal=journal, work=work)
    empty = train & ~windows["window"].isin(boxes["window"])
    filled = windows.index[train & ~empty]
    reason[filled] = attempt(windows.loc[filled])

    # empty tiles fill their quota in the order of a hash; those that are rejected are replaced
    wanted = int(options.empty_tile_ratio * len(filled))
    order = np.argsort(fileio.hash_rows(windows.loc[empty, ["raster", "x", "y"]], options.seed))
    waiting = windows.index[empty][order]
    while wanted and len(waiting):
        count = max(wanted, JOB_WINDOWS)
        tried, waiting = waiting[:count], waiting[count:]
        reason[tried] = attempt(windows.loc[tried])
        good = tried[reason[tried] == ""]
        waiting = good[wanted:].append(waiting)
        wanted -= len(good[:wanted])
    reason[waiting] = "empty, beyond EMPTY_TILE_RATIO"
    return windows.assign(kept=(reason == "").to_numpy(), reason=reason.to_numpy())


def _classes_of(images: Sequence[ImageData], options: TilingOptions) -> tuple[str, ...]:
    """Return the names of the classes of masks; none where objects are boxes.

    Raises:
        InputError: The images do not share one table of classes, or the options do not fit it.
    """
    labelled = [image.labels is not None for image in images]
    if not any(labelled):
        if options.min_annotated or options.class_proportion:
            raise InputError("min_annotated and class_proportion need masks, not boxes")
        return ()
    if not all(labelled):
        missing = [i.image_identifier for i in images if i.labels is None]
        raise InputError(f"all rasters of a run need labels, {missing} have none")
    tables = [image.labels.classes for image in images]
    if any(table.names != tables[0].names for table in tables):
        raise InputError(
            "the rasters of a run need the same classes, got "
            f"{[list(table.names) for table in tables[:3]]}; see masks.resolve_classes"
        )
    check_thresholds(len(tables[0].names), options.min_annotated, options.class_proportion)
    return tables[0].names


def check_thresholds(
    count: int, min_annotated: float, class_proportion: Mapping[int, float]
) -> None:
    """Check thresholds, in percent, for masks with so many classes.

    Raises:
        InputError: One is no percentage, or is of no class.
    """
    if strangers := [i for i in class_proportion if i not in range(count)]:
        raise InputError(f"class_proportion names {strangers}, the class ids are 0 to {count - 1}")
    if wrong := [v for v in (min_annotated, *class_proportion.values()) if not 0 <= v <= 100]:
        raise InputError(f"min_annotated and class_proportion are 0 to 100 percent, got {wrong}")
    if sum(class_proportion.values()) > 100:
        raise InputError(
            f"no tile can have {dict(class_proportion)} percent of its classes: they sum to more "
            "than 100; lower class_proportion"
        )


def class_columns(count: int) -> list[str]:
    """Return the names of the columns with the pixels per class."""
    return [f"class_{i}" for i in range(count)]


def counts_of(tiles: pd.DataFrame) -> np.ndarray:
    """Return the pixels per class of tiles, int64 (N, C); (N, 0) without masks."""
    count = 0
    while f"class_{count}" in tiles.columns:
        count += 1
    return tiles[class_columns(count)].to_numpy(dtype="int64")


def shares_of(
    counts: np.ndarray, areas: np.ndarray, background: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return what parts of tiles, in percent, are annotated (N,), and are of each class (N, C).

    Annotated is what has a class other than the background; the rest of a tile is background, or
    unknown. Both are rounded to 1e-9, so that a threshold means the same everywhere.
    """
    shares = np.round(100 * counts / areas[:, None], 9)
    annotated = counts.sum(axis=1) - (0 if background is None else counts[:, background])
    return np.round(100 * annotated / areas, 9), shares


def count_classes(
    windows: pd.DataFrame,
    images: Sequence[ImageData],
    journal: fileio.Journal | None = None,
    **work: object,
) -> np.ndarray:
    """Count the pixels per class of windows, in parallel.

    Args:
        windows: `raster, x, y, width, height` (px).
        images: The labelled rasters.
        journal: Where what is counted is kept for the next process, if this one is killed.
        work: `workers, scheduler, progress` of `parallel.imap_ordered`.

    Returns:
        int64 (N, C): valid px that count of each class.
    """
    labels = {image.image_identifier: image.labels for image in images}
    count = len(images[0].labels.classes.names)
    known = {} if journal is None else journal.known
    jobs, places = {}, {}
    order = np.arange(len(windows))
    for name, group in windows.assign(order=order).groupby("raster", sort=False):
        for start in range(0, len(group), JOB_WINDOWS):
            part = group.iloc[start : start + JOB_WINDOWS]
            key = fileio.fingerprint([name, part[WINDOW_COLUMNS].to_numpy()])
            places[key] = part["order"].to_numpy()
            if key not in known:
                jobs[key] = (name, _windows(part))
    answers = parallel.imap_ordered(
        partial(_count_job, labels=labels, count=count), jobs.values(),
        description="counting classes", **work,
    )  # fmt: skip
    found = dict(known)
    for key, answer in zip(jobs, answers, strict=True):
        found[key] = answer
        if journal is not None:
            journal.add(key, answer)
    counts = np.zeros((len(windows), count), dtype="int64")
    for key, place in places.items():
        counts[place] = found[key]
    return counts


def count_blocks(
    blocks: pd.DataFrame, images: Sequence[ImageData], *, side: int = 1024, **work: object
) -> np.ndarray:
    """Count the pixels per class of ground blocks, in parallel, in windows of at most `side` px.

    Args:
        blocks: See `splits.ground_blocks`.
        images: The labelled rasters.
        side: Of the windows that are read.
        work: See `count_classes`.

    Returns:
        int64 (N, C).
    """
    parts = []
    for number, block in enumerate(blocks.itertuples()):
        grid = window_grid(Window(block.x, block.y, block.width, block.height), side)
        core = grid[CORE_COLUMNS].to_numpy()
        part = pd.DataFrame(np.hstack([core[:, :2], core[:, 2:] - core[:, :2]]))
        parts.append(part.set_axis(WINDOW_COLUMNS, axis=1).assign(raster=block.raster, of=number))
    windows = pd.concat(parts, ignore_index=True)
    counts = count_classes(windows, images, **work)
    total = np.zeros((len(blocks), counts.shape[1]), dtype="int64")
    np.add.at(total, windows["of"].to_numpy(), counts)
    return total


def _count_job(
    job: tuple[str, list[Window]], labels: Mapping[str, LabelSource], count: int
) -> list[list[int]]:
    name, windows = job
    masks = (labels[name].read(window) for window in windows)
    return [np.bincount(mask[mask != IGNORE], minlength=count).tolist() for mask in masks]


def _reject_masks(
    windows: pd.DataFrame,
    images: Sequence[ImageData],
    options: TilingOptions,
    journal: fileio.Journal,
    work: Mapping[str, object],
) -> pd.DataFrame:
    """Reject training tiles by their classes, and then by their pixels."""
    table = images[0].labels.classes
    counts = windows[class_columns(len(table.names))].to_numpy()
    areas = (windows["width"] * windows["height"]).to_numpy()
    annotated, shares = shares_of(counts, areas, table.background)
    tests = [("nothing is labelled", counts.sum(axis=1) == 0)]
    if least := options.min_annotated:
        tests.append((f"annotated {UNDER_ANNOTATED}, {least:g} %", annotated < least))
    for i, least in options.class_proportion.items():
        tests.append((f"{table.names[i]} {UNDER_PROPORTION}, {least:g} %", shares[:, i] < least))
    reason = pd.Series("", index=windows.index, dtype=object)
    train = (windows["split"] == "train").to_numpy()
    for name, fails in tests:
        reason[train & fails & (reason == "").to_numpy()] = name
    rasters = {image.image_identifier: image.raster for image in images}
    rest = train & (reason == "").to_numpy()
    if not options.filters:  # what has a class counts: enough of it, and no pixel matters
        rest &= counts.sum(axis=1) < options.min_valid * areas
    rest = windows[rest]
    reason[rest.index] = _try_windows(rest, rasters, options, journal, work)
    return windows.assign(kept=(reason == "").to_numpy(), reason=reason.to_numpy())


def _try_windows(
    windows: pd.DataFrame,
    rasters: Mapping[str, fileio.Raster],
    options: TilingOptions,
    journal: fileio.Journal,
    work: Mapping[str, object],
) -> pd.Series:
    """Look at the pixels of windows where they can matter; return why each is rejected, or ""."""
    reason = pd.Series("", index=windows.index, dtype=object)
    jobs, places = {}, {}
    for name, group in windows.groupby("raster", sort=False):
        if options.filters or not rasters[name].all_counted:
            for start in range(0, len(group), JOB_WINDOWS):
                part = group.iloc[start : start + JOB_WINDOWS]
                key = fileio.fingerprint([name, part[WINDOW_COLUMNS].to_numpy()])
                places[key] = part.index
                if key not in journal.known:
                    jobs[key] = (rasters[name].own, _windows(part))
    options_of = {name: getattr(options, name) for name in ("filters", "pixel_limit", "min_valid")}
    answers = parallel.imap_ordered(
        partial(_filter_job, **options_of), jobs.values(), description="filtering tiles", **work
    )
    for key, answer in zip(jobs, answers, strict=True):
        journal.add(key, answer)
    for key, place in places.items():
        reason[place] = journal.known[key]
    return reason


def _filter_job(job: tuple[fileio.Raster, list[Window]], **options: object) -> list[str]:
    return filter_tiles(*job, **options)


def _windows(df: pd.DataFrame) -> list[Window]:
    return [Window(*map(int, row)) for row in df[WINDOW_COLUMNS].itertuples(index=False)]


def _turn(windows: pd.DataFrame, angles: Sequence[int]) -> pd.DataFrame:
    # Only training tiles turn: evaluation is to see the ground as it lies.
    train = windows[windows["split"] == "train"]
    turned = [train.assign(angle=angle) for angle in angles if angle]
    tiles = pd.concat([windows.assign(angle=0), *turned], ignore_index=True)
    tiles = tiles.sort_values(["window", "angle"], ignore_index=True)
    tiles.insert(0, "tile", np.arange(len(tiles)))
    return tiles


def boxes_of_tile(boxes_xyxy: np.ndarray, angle: int, width: int, height: int) -> np.ndarray:
    """Turn the boxes (N, 4) of a window, as float32, with its tile."""
    turned = imutils.rotate_boxes(boxes_xyxy, angle, width, height)
    return np.ascontiguousarray(turned, dtype=np.float32)


def read_tile(
    raster: fileio.Raster, window: Window, angle: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read a tile's pixels, turned by `angle`.

    Returns:
        The pixels (bands, H, W), whether each is valid (H, W), and whether it is ground that counts
        (H, W).
    """
    image = raster.read(window)
    valid = raster.read_valid(window, image)
    counted = raster.read_counted(window, valid)
    turns = angle // 90
    return np.rot90(image, turns, axes=(1, 2)), np.rot90(valid, turns), np.rot90(counted, turns)


def _random_windows(
    ground: pd.DataFrame, count: int, rng: np.random.Generator, side: int = 128
) -> Iterator[tuple[str, Window]]:
    """Draw windows of at most `side` px from rectangles `raster, x, y, width, height`, by area."""
    areas = (ground["width"] * ground["height"]).to_numpy(dtype=float)
    for row in rng.choice(len(ground), size=count, p=areas / areas.sum()):
        b = ground.iloc[row]
        width, height = min(side, int(b["width"])), min(side, int(b["height"]))
        x = b["x"] + rng.integers(b["width"] - width + 1)
        y = b["y"] + rng.integers(b["height"] - height + 1)
        yield b["raster"], Window(int(x), int(y), width, height)


def sample_pixels(
    ground: pd.DataFrame,
    rasters: Mapping[str, fileio.Raster],
    *,
    seed: int,
    max_windows: int = 128,
    pixels_per_window: int = 4096,
    scheduler: str | None = None,
) -> np.ndarray:
    """Read some valid pixels that count, from windows all over the ground.

    Args:
        ground: Rectangles `raster, x, y, width, height` (px).
        rasters: Identifier -> raster; all have the same bands and type.
        seed: Of the places.
        max_windows: Windows of up to 128 px that are to give pixels; windows without any are
            replaced, up to `ATTEMPTS` times as many.
        pixels_per_window: Most pixels to take from each.
        scheduler: Of a Dask cluster that is to read them; here they take a moment, unless rasters
            are remote.

    Returns:
        Raw values (bands, N), in the rasters' own type.

    Raises:
        InputError: No sampled pixel is valid.
    """
    if ground.empty:
        raise InputError("there is no ground to sample: nothing of it is written, or counts")
    places = _random_windows(ground, ATTEMPTS * max_windows, np.random.default_rng(seed))
    jobs = ((rasters[name], window, [seed, i]) for i, (name, window) in enumerate(places))
    samples: list[np.ndarray] = []
    while len(samples) < max_windows and (some := list(itertools.islice(jobs, max_windows))):
        found = parallel.map_ordered(
            partial(_sample_windows, most=pixels_per_window),
            [some[i : i + SAMPLE_WINDOWS] for i in range(0, len(some), SAMPLE_WINDOWS)],
            workers=1, scheduler=scheduler, description="sampling pixels",
        )  # fmt: skip
        samples += itertools.chain(*found)
    if not samples:
        raise InputError(
            f"none of {ATTEMPTS * max_windows} windows sampled from "
            f"{sorted(set(ground['raster']))} has a valid pixel that counts; check the nodata "
            "value and the masks of these files, and their area of interest"
        )
    return np.concatenate(samples[:max_windows], axis=1)


def _sample_windows(
    jobs: Sequence[tuple[fileio.Raster, Window, Sequence[int]]], most: int
) -> list[np.ndarray]:
    """Read at most so many of the pixels that count of each window that has any."""
    samples = []
    for raster, window, seed in jobs:
        image, _, counted = read_tile(raster, window, 0)
        pixels = image[:, counted]
        if pixels.shape[1] > most:  # each window draws for itself, whoever reads the others
            drawn = np.random.default_rng(seed).integers(pixels.shape[1], size=most)
            pixels = pixels[:, drawn]
        if pixels.size:
            samples.append(pixels)
    return samples


def counted_share(raster: fileio.Raster, side: int = 64, seconds: float = 3.0) -> float:
    """Estimate the share (0-1) of a raster that is valid and counts.

    Windows of `side` px are read at the nodes of a grid, from the end of the file, where a damaged
    one is cut short, and no longer than some seconds.

    Raises:
        InputError: A window cannot be read.
    """
    width, height = min(side, raster.width), min(side, raster.height)
    corners = [
        np.linspace(0, length - part, 8).astype(int)
        for length, part in ((raster.width, width), (raster.height, height))
    ]
    shares, deadline = [], time.monotonic() + seconds
    for y, x in itertools.product(corners[1][::-1], corners[0][::-1]):
        window = Window(int(x), int(y), width, height)
        shares.append(read_tile(raster, window, 0)[2].mean())
        if time.monotonic() > deadline:
            break
    return float(np.mean(shares))


# ---------------------------------------------------------------------------------------------
# Files, on request
# ---------------------------------------------------------------------------------------------


def write_chips(
    directory: Path,
    tiles: pd.DataFrame,
    boxes: pd.DataFrame,
    images: Sequence[ImageData],
    *,
    keep: bool = False,
    workers: int | None = None,
    scheduler: str | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Write every kept tile as an image file, and `tile.csv` with the boxes they show.

    Chips are `tile_{raster}_{window}_{angle}.png`, or `.tif` where Pillow's PNG cannot hold the
    pixels: it can one or three bands of 8 bits, and one of 16. With `keep` those that are there
    already stay: they are whole.

    Returns:
        What `tile.csv` holds: `xmin, ymin, xmax, ymax` (px of the chip), `label`, `tile_path`.
    """
    rasters = {image.image_identifier: image.raster for image in images}
    kept, names, jobs = tiles[tiles["kept"]], [], []
    for tile, window in zip(kept.itertuples(), _windows(kept), strict=True):
        raster = rasters[tile.raster]
        suffix = "png" if (raster.dtype, len(raster.bands)) in PNG_KINDS else "tif"
        names.append(f"tile_{tile.raster}_{tile.window}_{tile.angle}.{suffix}")
        jobs.append((raster, window, tile.angle, directory / names[-1]))
    places = kept[["window", "angle", "width", "height"]].assign(tile_path=names)
    shown = places.merge(boxes, on="window")
    for (angle, width, height), group in shown.groupby(["angle", "width", "height"]):
        corners = group[BOX_COLUMNS].to_numpy()
        shown.loc[group.index, BOX_COLUMNS] = imutils.rotate_boxes(corners, angle, width, height)
    count = parallel.cpu_count() if workers is None else max(workers, 1)
    if keep:
        there = {path.name for path in directory.glob("tile_*")}
        jobs = [job for job in jobs if job[-1].name not in there]
    step = max(1, min(JOB_WINDOWS, len(jobs) // (8 * count)))
    parallel.map_ordered(
        split_and_save_tiles,
        [jobs[i : i + step] for i in range(0, len(jobs), step)],
        workers=count, scheduler=scheduler, threads=True,  # encoders free the GIL
        description="writing chips", progress=progress,
    )  # fmt: skip
    table = shown[[*BOX_COLUMNS, "label", "tile_path"]]
    fileio.write_table(directory / "tile.csv", table)
    return table


def split_and_save_tiles(jobs: Sequence[tuple[fileio.Raster, Window, int, Path]]) -> None:
    """Write tiles, given as (raster, window, angle, path), as image files of the raster's type."""
    for raster, window, angle, path in jobs:
        image = np.rot90(raster.read(window), angle // 90, axes=(1, 2))
        if path.suffix == ".png":
            pixels = image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)
            with fileio.atomic_path(path) as temporary:
                # runs alone, as in natural images little else repeats: half the time, no larger
                Image.fromarray(np.ascontiguousarray(pixels)).save(
                    temporary, "PNG", compress_type=zlib.Z_RLE
                )
        else:
            count, height, width = image.shape
            with fileio.create_raster(
                path, count=count, height=height, width=width, dtype=image.dtype,
                nodata=raster.nodata[0],
            ) as dst:  # fmt: skip
                dst.write(image)


def rotate_single_annotation(
    data: ImageData,
    output_directory: Path,
    angles: Sequence[int] = (90, 180, 270),
    *,
    force: bool = False,
) -> list[pd.DataFrame]:
    """Write turned copies of a whole raster, block by block, and turn its annotations with them.

    The pipeline itself never needs these copies; they are for looking, and for other tools. A
    georeferenced raster keeps its place: the copies carry a turned geotransform.

    Args:
        data: The annotated raster.
        output_directory: Copies go to `{identifier}_{angle}.tif`.
        angles: Quarter turns in degrees, counter-clockwise.
        force: Write them anew in any case.

    Returns:
        The annotations of the raster itself, then those of each copy; column `image_path` names the
        file they belong to.
    """
    raster, width, height = data.raster, data.raster.width, data.raster.height
    frames = [data.df.assign(image_path=str(raster.path))]
    fileio.remove_strays(Path(output_directory))
    for angle in angles:
        path = Path(output_directory) / f"{data.image_identifier}_{angle}.tif"
        manifest = path.with_suffix(".json")
        made_from = {"raster": raster.made_from, "angle": angle}
        if force or not fileio.is_finished(manifest, made_from):
            _write_turned(raster, angle, path)
            fileio.mark_finished(manifest, made_from, [path.name])
        x, y = imutils.rotate_center(
            data.df["pixel_x"].to_numpy(), data.df["pixel_y"].to_numpy(), angle, width, height
        )
        boxes = imutils.rotate_boxes(data.df[BOX_COLUMNS].to_numpy(), angle, width, height)
        frames.append(
            data.df.assign(
                pixel_x=x, pixel_y=y, **dict(zip(BOX_COLUMNS, boxes.T, strict=True)),
                image_path=str(path),
            )
        )  # fmt: skip
    return frames


def _write_turned(raster: fileio.Raster, angle: int, path: Path) -> None:
    width, height = raster.width, raster.height
    turned_width, turned_height = (height, width) if angle in (90, 270) else (width, height)
    profile: dict[str, object] = {}
    if raster.crs:
        # Where the corners (0, 0), (1, 0), (0, 1) of the copy lie on the original, then on the map.
        x, y = imutils.rotate_center(
            np.array([0, 1, 0]), np.array([0, 0, 1]), -angle % 360, turned_width, turned_height
        )
        (ox, ux, vx), (oy, uy, vy) = np.reshape(raster.transform, (2, 3)) @ [x, y, [1, 1, 1]]
        transform = rasterio.Affine(ux - ox, vx - ox, ox, uy - oy, vy - oy, oy)
        profile = {"crs": raster.crs, "transform": transform}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        fileio.create_raster(
            path, width=turned_width, height=turned_height, count=len(raster.bands),
            dtype=raster.dtype, nodata=raster.nodata[0], **profile,
        ) as dst,
    ):  # fmt: skip
        for _, out in dst.block_windows(1):
            box = np.array([[out.col_off, out.row_off, out.col_off + out.width,
                             out.row_off + out.height]])  # fmt: skip
            x0, y0, x1, y1 = imutils.rotate_boxes(box, -angle % 360, turned_width, turned_height)[0]
            source = Window(int(x0), int(y0), int(x1 - x0), int(y1 - y0))
            image, valid, _ = read_tile(raster, source, angle)
            dst.write(image, window=out)
            if raster.masked:  # an alpha band or a mask turns, too
                dst.write_mask(valid, window=out)


def evaluation_overlap(images: Sequence[ImageData]) -> int:
    """Derive the overlap of evaluation windows: the longest side of any object, in px.

    Windows overlap by half at most; objects too large for that may be cut at a seam. Of the classes
    of pixels it is what a network needs to see around a pixel.
    """
    if any(image.labels is not None for image in images):
        return MASK_OVERLAP
    boxes = np.concatenate([image.df[BOX_COLUMNS].to_numpy() for image in images])
    return int(np.ceil((boxes[:, 2:] - boxes[:, :2]).max()))


def describe_tiles(directories: Mapping[int, Path]) -> pd.DataFrame:
    """Count windows, kept tiles and owned objects per tile size and split."""
    rows = []
    for size, directory in directories.items():
        tiles, _ = read_tiles(directory)
        for split, group in tiles.groupby("split", sort=False):
            ground = group[group["angle"] == 0]
            rows.append(
                {"size": size, "split": split, "windows": len(ground),
                 "kept": int(ground["kept"].sum()), "tiles": int(group["kept"].sum()),
                 "objects": int(ground.loc[ground["kept"], "objects"].sum())}
            )  # fmt: skip
    return pd.DataFrame(rows)
