"""The cleaning pipeline: from any annotation file to clean boxes, with nothing lost unseen.

Every step takes a frame and returns a new one, so steps chain with `DataFrame.pipe` and a user's
own step is as good as ours. `run_steps` chains them and compares each frame with the one before:
what disappeared goes to the quarantine with the step's name as its reason, what changed is counted.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path, PureWindowsPath

import numpy as np
import pandas as pd
import pyarrow as pa
import pyproj
import shapely
from pyarrow import compute
from pyproj.exceptions import ProjError

import fileio
import geometries
import parallel
from ImageData import BOX_COLUMNS, CENTER_COLUMNS, ImageData, InputError
from imutils import clip_boxes

log = logging.getLogger(__name__)

UNKNOWN = "Unknown"  # the label that stands for all uncommon ones
MIN_SIDE = 0.01  # px; a box thinner than this has no area in float32
LARGE_LOSS = 0.3  # share of the rows that one step may drop before it is worth a warning
ROW_BASE = 2**40  # index of the first row while steps run
QUARANTINE_BOX_COLUMNS = [f"px_{name}" for name in BOX_COLUMNS]
EDGE = 1e-4  # px; what reaches so little over an edge does so by rounding
EARTH_RADIUS = 6_378_137.0  # m; a globe within 1 % of it is the Earth
PARTS = "parts"  # folder of what each raster's cleaning left
SAME_BOX_DIGITS = 6  # digits of px in which duplicates agree

# Reasons why an object is dropped although it is real, and part of it may be seen
OVER_LEFT, OVER_RIGHT = "over the left or upper edge", "over the right or lower edge"
OFF_RASTER = "centre off the raster"
OUTSIDE_AOI, IGNORED = "outside the area of interest", "in an ignored region"
CROWD = "a crowd, not one object"
NO_POLYGON = "no polygon"
REAL = (OVER_LEFT, OVER_RIGHT, OFF_RASTER, OUTSIDE_AOI, IGNORED, CROWD)

# Reasons that are no fault of a row
OTHER_RASTER = "names another raster"
NOT_SELECTED = "not selected by ATTRIBUTE_FILTER"
DUPLICATE = "duplicate"

Step = Callable[[pd.DataFrame], pd.DataFrame]
BoxFilter = Callable[..., object]  # (x_min, y_min, x_max, y_max, diam, sizex, sizey) -> keep


# ---------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------


def remove_non_numeric_rows(
    df: pd.DataFrame, column_name: str, default_diameter: float | None = None
) -> pd.DataFrame:
    """Drop the rows whose value in a column is no finite number, and make the column float64.

    Args:
        df: Any frame with the column.
        column_name: The column.
        default_diameter: What replaces values of zero and below; None leaves them.
    """
    values = _as_numbers(df[column_name])
    finite = np.isfinite(values)
    if not finite.all():
        df, values = df[finite], values[finite]
    if default_diameter is not None:
        values = values.where(values > 0, default_diameter)
    return df.assign(**{column_name: values})


def _as_numbers(column: pd.Series) -> pd.Series:
    """Return a column as float64, with NaN for text that is no finite number."""
    if isinstance(column.dtype, pd.StringDtype):
        # Arrow does not go through a Python object per row, but wants numbers alone
        text = compute.ascii_trim_whitespace(pa.array(column))
        no_number = compute.match_substring_regex(text, r"[^0-9.eE+-]|^$")
        with contextlib.suppress(pa.ArrowInvalid):
            values = compute.if_else(no_number, None, text).cast(pa.float64())
            return pd.Series(values.to_numpy(zero_copy_only=False), column.index, name=column.name)
    return pd.to_numeric(column, errors="coerce").astype("float64")


def apply_column_transform(
    df: pd.DataFrame, column_name: str, transform: Callable[[pd.Series], pd.Series]
) -> pd.DataFrame:
    """Replace a column by a function of it, called once with the whole column."""
    return df.assign(**{column_name: transform(df[column_name])})


def generate_bboxes(df: pd.DataFrame) -> pd.DataFrame:
    """Add the square boxes (px, half-open) around `pixel_x, pixel_y`, `diameter` px wide."""
    x, y, radius = df["pixel_x"], df["pixel_y"], df["diameter"] / 2
    return df.assign(xmin=x - radius, ymin=y - radius, xmax=x + radius, ymax=y + radius)


def correct_bounding_boxes(df: pd.DataFrame) -> pd.DataFrame:
    """Swap the minimum and maximum of a box where they stand the wrong way round."""
    boxes = df[BOX_COLUMNS].to_numpy(dtype="float64")
    low, high = np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])
    return df.assign(xmin=low[:, 0], ymin=low[:, 1], xmax=high[:, 0], ymax=high[:, 1])


def measure_bboxes(df: pd.DataFrame) -> pd.DataFrame:
    """Set `pixel_x, pixel_y, diameter` to the centre and the longer side of each box (px)."""
    width, height = df["xmax"] - df["xmin"], df["ymax"] - df["ymin"]
    return df.assign(
        pixel_x=df["xmin"] + width / 2,
        pixel_y=df["ymin"] + height / 2,
        diameter=np.maximum(width, height),
    )


def clip_bboxes(df: pd.DataFrame, sizex: int, sizey: int) -> pd.DataFrame:
    """Cut the boxes at the raster's edge, (0, 0) to (sizex, sizey).

    Where a polygon in `geometry` (px) reaches over the edge, what is left of its box bounds what is
    left of the polygon; nothing is left of a box if nothing is left of its polygon.
    """
    limits = np.array([0, 0, sizex, sizey], dtype=float)
    before = df[BOX_COLUMNS].to_numpy(dtype="float64")
    boxes = clip_boxes(before, limits)
    shapes = geometries.polygons_of(df)
    cut = ~shapely.is_missing(shapes) & (boxes != before).any(axis=1)
    if cut.any():
        visible = shapely.bounds(shapely.clip_by_rect(shapes[cut], *limits))
        low = np.fmax(boxes[cut, :2], visible[:, :2])
        high = np.where(np.isnan(visible[:, 2:]), low, np.fmin(boxes[cut, 2:], visible[:, 2:]))
        boxes[cut] = np.hstack([low, high])
    return df.assign(**dict(zip(BOX_COLUMNS, boxes.T, strict=True)))


def min_filter(x_min, y_min, x_max, y_max, diam, sizex, sizey):  # noqa: ANN001, ANN201
    """Keep boxes that do not reach over the left or upper edge of the raster."""
    return (x_min >= 0) & (y_min >= 0)


def max_filter(x_min, y_min, x_max, y_max, diam, sizex, sizey):  # noqa: ANN001, ANN201
    """Keep boxes that do not reach over the right or lower edge of the raster."""
    return (x_max <= sizex) & (y_max <= sizey)


def max_diameter_filter(x_min, y_min, x_max, y_max, diam, sizex, sizey, *, max_diameter):  # noqa: ANN001, ANN201
    """Keep objects less than `max_diameter` px wide."""
    return diam < max_diameter


def area_filter(x_min, y_min, x_max, y_max, diam, sizex, sizey):  # noqa: ANN001, ANN201
    """Keep boxes that cover some ground."""
    return (x_max - x_min >= MIN_SIDE) & (y_max - y_min >= MIN_SIDE)


def center_filter(x_min, y_min, x_max, y_max, diam, sizex, sizey):  # noqa: ANN001, ANN201
    """Keep boxes whose centre lies on the raster; the centre decides which tile owns an object."""
    x, y = (x_min + x_max) / 2, (y_min + y_max) / 2
    return (x >= 0) & (y >= 0) & (x < sizex) & (y < sizey)


def filter_invalid_bboxes(
    df: pd.DataFrame, sizex: int, sizey: int, *filters: BoxFilter
) -> pd.DataFrame:
    """Keep the rows whose box passes every filter.

    Args:
        df: Frame with `xmin, ymin, xmax, ymax, diameter` (px).
        sizex: Width of the raster in px.
        sizey: Height of the raster in px.
        filters: Callables of `(x_min, y_min, x_max, y_max, diam, sizex, sizey)`. They are called
            once with whole columns; one that can only compare single numbers (with `and`, `if`) is
            called row by row instead, which is slower.

    Raises:
        InputError: A filter answers with anything but one boolean per row.
    """
    columns = [df[name] for name in (*BOX_COLUMNS, "diameter")]
    keep = np.ones(len(df), dtype=bool)
    for box_filter in filters:
        try:
            answer = box_filter(*columns, sizex, sizey)
        except ValueError as error:
            if "ambiguous" not in str(error):
                raise
            log.warning("filter %s runs row by row; write & for and", name_of(box_filter))
            answer = [bool(box_filter(*row, sizex, sizey)) for row in zip(*columns, strict=True)]
        answer = np.asarray(answer)
        if answer.dtype != bool or answer.shape not in ((), keep.shape):
            raise InputError(
                f"filter {name_of(box_filter)} must answer True or False for each of {len(df)} "
                f"boxes, got {answer.dtype} of shape {answer.shape}"
            )
        keep &= answer
    return df[keep]


# ---------------------------------------------------------------------------------------------
# Steps that choose rows and write labels out
# ---------------------------------------------------------------------------------------------


def select_raster(df: pd.DataFrame, column_name: str, stem: str) -> pd.DataFrame:
    """Keep the rows whose column names a raster, by the stem of a file name or path."""
    names = df[column_name]
    mine = [name for name in names.dropna().unique() if _stem(name) == stem]
    return df[names.isin(mine)]


def _stem(name: object) -> str:
    return PureWindowsPath(str(name)).stem  # it splits at either slash


def select_rows(df: pd.DataFrame, expression: str) -> pd.DataFrame:
    """Keep the rows that an expression for `DataFrame.query` selects.

    Raises:
        InputError: It cannot be evaluated.
    """
    try:
        chosen = df.query(expression, local_dict={}, global_dict={}, engine="python")
    except Exception as error:
        raise InputError(
            f"ATTRIBUTE_FILTER {expression!r} cannot be evaluated: {error}; the columns are "
            f"{list(df.columns)}"
        ) from error
    return chosen


def drop_problem(df: pd.DataFrame, problem: str) -> pd.DataFrame:
    """Drop the rows of which a reader said that they cannot be used, and why."""
    return df[df["problem"] != problem]


def write_labels_out(df: pd.DataFrame, column_name: str) -> pd.DataFrame:
    """Make labels text: 1, also as the float 1.0, becomes "1"; an empty text is a missing label."""
    labels = df[column_name].astype(object).map(_label_text, na_action="ignore")
    return df.assign(**{column_name: labels.where(labels != "")})


def _label_text(label: object) -> str:
    whole = isinstance(label, float) and label.is_integer()
    return str(int(label) if whole else label)


def find_duplicates(df: pd.DataFrame, label_column: str = "label") -> np.ndarray:
    """Tell, as bool (N,), which rows have the label and, to 1e-6 px, the box of an earlier one."""
    keys = df[BOX_COLUMNS].round(SAME_BOX_DIGITS) + 0.0  # no -0.0
    keys = keys.assign(label=pd.factorize(df[label_column])[0])
    digest = np.zeros(len(df), dtype="uint64")
    for name in keys.columns:  # one number per row finds the few rows worth comparing
        digest = digest * np.uint64(31) + pd.util.hash_array(keys[name].to_numpy())
    candidates = pd.Series(digest).duplicated(keep=False).to_numpy()
    duplicated = np.zeros(len(df), dtype=bool)
    duplicated[candidates] = keys[candidates].duplicated().to_numpy()
    return duplicated


# ---------------------------------------------------------------------------------------------
# Labels
# ---------------------------------------------------------------------------------------------


def gather_common_labels(
    dataframes: Iterable[pd.DataFrame], percentile: float, label_column_name: str = "label"
) -> pd.Series:
    """Find the smallest set of labels that covers a percentile of all rows.

    Args:
        dataframes: Tables of objects; one without the column is left out, with a warning.
        percentile: Share of the labelled rows to cover, in percent, 0 < percentile <= 100.
        label_column_name: The column with the labels.

    Returns:
        A boolean series indexed by label, most common first (ties by name): True for the labels in
        the set. The label that crosses the percentile is in.
    """
    counts = []
    for df in dataframes:
        if label_column_name in df.columns:
            counts.append(df[label_column_name].value_counts())
        else:
            log.warning("a table has no column %r; its labels are not counted", label_column_name)
    if not counts or not (total := pd.concat(counts).groupby(level=0).sum()).size:
        return pd.Series(dtype=bool)
    total = total.sort_index().sort_values(ascending=False, kind="stable")
    covered_before = 100 * (total.cumsum() - total) / total.sum()
    return (covered_before < percentile).rename("common")


def filter_label_column(
    df: pd.DataFrame, label_mask: pd.Series, label_column_name: str = "label"
) -> pd.DataFrame:
    """Replace every label that is not True in `label_mask`, or is missing, by "Unknown".

    Raises:
        InputError: The frame has no such column.
    """
    if label_column_name not in df.columns:
        raise InputError(f"column {label_column_name!r} was not found, only {list(df.columns)}")
    labels = df[label_column_name]
    common = labels.isin(label_mask.index[label_mask.to_numpy(dtype=bool)])
    return df.assign(**{label_column_name: labels.where(common, UNKNOWN)})


# ---------------------------------------------------------------------------------------------
# The pipeline
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cleaned:
    """A clean table and the account of how it came about.

    Attributes:
        df: The clean rows.
        quarantine: The dropped rows as they came, with `reason` (a step's name) and `row` (0-based
            position in the table that came).
        report: One row per step: `step, rows_in, dropped, changed, rows_out`.
    """

    df: pd.DataFrame
    quarantine: pd.DataFrame
    report: pd.DataFrame


def run_steps(
    raw: pd.DataFrame, steps: Mapping[str, Step], boxes_from: str | None = None
) -> Cleaned:
    """Pipe a frame through named steps, keeping account of every row.

    Args:
        raw: The frame.
        steps: Name -> callable that returns a frame with some of the rows it was given.
        boxes_from: The step that makes `xmin, ymin, xmax, ymax` (px); before it, columns of these
            names are the file's own. None: the frame brings its boxes.

    Raises:
        InputError: A step fails, or returns rows that it was not given.
    """
    # An index that no step makes by accident tells rows that were given from rows that were made.
    raw = raw.set_axis(pd.RangeIndex(ROW_BASE, ROW_BASE + len(raw)))
    place = np.arange(len(raw))  # of each row of the file in the frame before, -1 where it is gone
    before, dropped, report, boxed = raw, [], [], boxes_from is None
    for name, step in steps.items():
        try:
            after = before.pipe(step)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"cleaning step {name} failed: {error!r}") from error
        if (rows := _rows_of(after, place)) is None:
            raise InputError(
                f"cleaning step {name} must return a frame with rows of the frame it was given, "
                "each at most once and under its index (no reset_index)"
            )
        kept, is_gone = place[rows], place >= 0
        is_gone[rows] = False
        gone = np.flatnonzero(is_gone)
        boxes = _boxes_of(before.iloc[place[gone]], boxed)
        dropped.append(raw.iloc[gone].assign(reason=name, row=gone, **boxes))
        report.append(
            {"step": name, "rows_in": len(before), "dropped": len(gone),
             "changed": _count_changed(before, after, kept), "rows_out": len(after)}
        )  # fmt: skip
        place[:] = -1
        place[rows] = np.arange(len(rows))
        before, boxed = after, boxed or name == boxes_from
    nothing = raw.iloc[:0].assign(reason="", row=0, **_boxes_of(raw.iloc[:0], boxed=False))
    quarantine = pd.concat(dropped) if dropped else nothing
    quarantine = quarantine.sort_index(ignore_index=True)
    return Cleaned(before.reset_index(drop=True), quarantine, pd.DataFrame(report))


def _rows_of(after: object, place: np.ndarray) -> np.ndarray | None:
    """Return which rows of the file a frame holds, or None unless it had them, each once."""
    if not isinstance(after, pd.DataFrame):
        return None
    if not len(after):
        return np.empty(0, dtype=np.int64)
    if not pd.api.types.is_integer_dtype(after.index):
        return None
    rows = after.index.to_numpy() - ROW_BASE
    if ((rows < 0) | (rows >= len(place))).any() or (place[rows] < 0).any():
        return None
    return rows if len(rows) == np.count_nonzero(np.bincount(rows)) else None


def _boxes_of(df: pd.DataFrame, boxed: bool) -> dict[str, np.ndarray]:
    """Return the boxes of rows as columns for the quarantine, NaN where there are none."""
    boxes = np.full((len(df), 4), np.nan)
    if boxed and set(BOX_COLUMNS) <= set(df.columns) and len(df):
        boxes = df[BOX_COLUMNS].apply(pd.to_numeric, errors="coerce").to_numpy(float)
    return dict(zip(QUARANTINE_BOX_COLUMNS, boxes.T, strict=True))


def _count_changed(before: pd.DataFrame, after: pd.DataFrame, kept: np.ndarray) -> int:
    """Count the rows with another value in any column; `kept` says which of `before` they were."""
    columns = after.columns.intersection(before.columns)
    if not np.array_equal(kept, np.arange(len(before))):
        before = before[columns].iloc[kept]
    before, after = before.reset_index(drop=True), after.reset_index(drop=True)
    changed = np.zeros(len(after), dtype=bool)
    for name in columns:
        old, new = before[name], after[name]
        if old.dtype == new.dtype == object:  # objects that stay themselves are not compared
            rows = np.flatnonzero(np.fromiter(map(operator.is_not, old, new), bool, len(new)))
            old, new = old.iloc[rows], new.iloc[rows]
            if shapely.is_valid_input(old).all() and shapely.is_valid_input(new).all():
                changed[rows] |= ~shapely.equals_identical(old.to_numpy(), new.to_numpy())
                continue
        else:
            rows = np.arange(len(new))
        if pd.api.types.is_numeric_dtype(new) and not pd.api.types.is_numeric_dtype(old):
            old = _as_numbers(old)  # "7.0" read as a number is no change
        differing = np.flatnonzero(old.ne(new).to_numpy(dtype=bool, na_value=True))
        both_missing = old.iloc[differing].isna().to_numpy() & new.iloc[differing].isna().to_numpy()
        changed[rows[differing[~both_missing]]] = True
    return int(changed.sum())


# ---------------------------------------------------------------------------------------------
# Reading: from any annotation file to boxes in pixels
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadingOptions:
    """How an annotation file is to be understood.

    Attributes:
        diameter_column: Name of the column with diameters: of tables, and of points in vector
            files, which may lack it. In units of `1 / diameter_scale` px, or metres on the ground
            if the coordinates are those of a map.
        label_column: Name of the column with labels. COCO, VOC and YOLO name their classes
            themselves.
        x_column: Name of a table's column with the x of centres.
        y_column: Name of a table's column with the y of centres.
        box_source: Of a table, "diameter" makes boxes from centre and diameter; "columns" takes
            `xmin, ymin, xmax, ymax` from it; "auto" does so where it has them.
        default_diameter: Replaces diameters of zero and below, in the file's units; points without
            a diameter column have it too.
        diameter_scale: Pixels, or metres, per unit of the diameter column.
        coordinates: "auto", "pixel", "map" (the raster's CRS), "lonlat" (degrees; on the Earth
            EPSG:4326), or any text that names a CRS. "auto" takes vector files in the CRS they
            declare and anything else in pixels; all others hold whatever the file declares.
        layer: Layer of a vector file with several.
        attribute_filter: Which rows are wanted, as text for `DataFrame.query` on the columns of
            the file.
        default_label: The label of rows without one; it also stands in for a missing column.
        drop_duplicates: Drop rows with the label and the box of another, instead of warning.
        image_column: Column of a table or vector file that names the raster of each row; rows of
            others do not count. COCO names its images itself.
        polygons_only: Drop what has no outline: points, and boxes without a polygon.
        extra_steps: Further steps (frame -> frame), run on centres and diameters in px before boxes
            are made of them where a table gives those in px, and otherwise on the boxes in px.
    """

    diameter_column: str = "diameter"
    label_column: str = "label"
    x_column: str = "pixel_x"
    y_column: str = "pixel_y"
    box_source: str = "diameter"
    default_diameter: float = 0.5
    diameter_scale: float = 1.0
    coordinates: str = "auto"
    layer: str | None = None
    attribute_filter: str | None = None
    default_label: str | None = None
    drop_duplicates: bool = False
    image_column: str | None = None
    polygons_only: bool = False
    extra_steps: Sequence[Step] = ()


@dataclass(frozen=True)
class _Reading:
    """What `read_annotations` is going to do, open to further steps.

    Attributes:
        raw: The rows as they are in the file.
        steps: The steps that turn them into boxes (px).
        boxes_from: See `run_steps`.
        label_column: The column with the labels.
        scale: Pixels per unit of the diameter; where the file gives boxes or polygons, `resized`.
        unit: Where diameters belong to points of a map or a vector file, in the column
            `given_diameter`: what they are after scaling, "m" or "px".
        resized: Pixels per pixel of the raster's file, see `fileio.resampled`.
    """

    raw: pd.DataFrame
    steps: dict[str, Step]
    boxes_from: str | None
    label_column: str
    scale: float = 1.0
    unit: str | None = None
    resized: float = 1.0


def read_annotations(path: Path, raster: fileio.Raster, **options: object) -> Cleaned:
    """Turn an annotation file of any format into boxes in pixels of a raster.

    Tables (CSV, Parquet) with centres or boxes, vector files with points or polygons, COCO, Pascal
    VOC and YOLO are understood, see `formats`.

    Args:
        path: The file.
        raster: The raster it annotates.
        options: See `ReadingOptions`.

    Returns:
        The rows with `pixel_x, pixel_y, diameter, label, xmin, ymin, xmax, ymax` (float64, px; the
        diameter is the longer side), `score, iscrowd, category_id` where the file has them, and,
        where it gives polygons, `geometry` (px; None for points); quarantine and report. Nothing is
        said of where the boxes lie: that is up to `preprocess_df`.

    Raises:
        InputError: The file cannot be used, or no row is left.
    """
    reading = _plan_reading(Path(path), raster, ReadingOptions(**options))
    return _carry_out(Path(path), raster, reading, ("score", "iscrowd", "category_id", "geometry"))


def preprocess_df(
    path: Path,
    raster: fileio.Raster,
    *,
    max_diameter: float = np.inf,
    clip_to_raster: bool = False,
    extra_filters: Sequence[BoxFilter] = (),
    **options: object,
) -> Cleaned:
    """Read and clean the annotations of one raster.

    Args:
        path: The annotation file, of any format that `read_annotations` knows.
        raster: The raster it annotates.
        max_diameter: Objects from this diameter on are noise, in the units of the diameter column
            (boxes and polygons: px).
        clip_to_raster: Cut boxes at the raster's edge instead of dropping those that reach over it.
        extra_filters: Further box filters, see `filter_invalid_bboxes`.
        options: See `ReadingOptions`.

    Returns:
        The clean table with `pixel_x, pixel_y, diameter, label, xmin, ymin, xmax, ymax` in px, its
        quarantine and its report.

    Raises:
        InputError: The file cannot be used, or no row is left.
    """
    reading = _plan_reading(Path(path), raster, ReadingOptions(**options))
    steps = dict(reading.steps)
    size = {"sizex": raster.width, "sizey": raster.height}
    filters: list[tuple[str, BoxFilter]] = [
        (OVER_LEFT, min_filter),
        (OVER_RIGHT, max_filter),
        *((name_of(box_filter), box_filter) for box_filter in extra_filters),
        ("no area", area_filter),
    ]
    if "iscrowd" in reading.raw.columns:
        steps[CROWD] = drop_crowds
    limit = max_diameter * reading.scale
    if reading.unit is None:
        too_large = partial(max_diameter_filter, max_diameter=limit)
        steps[f"not under MAX_DIAMETER, {limit:g} px"] = partial(
            _apply_filter, **size, box_filter=too_large
        )
    else:  # polygons of the same file have no diameter but that of their box
        max_px = max_diameter * reading.resized
        name = f"not under MAX_DIAMETER, {limit:g} {reading.unit} (polygons: {max_px:g} px)"
        steps[name] = partial(limit_diameters, max_given=limit, max_px=max_px)
    steps[OFF_RASTER] = partial(_apply_filter, **size, box_filter=center_filter)
    if raster.regions is not None:
        inside = fileio.Regions(aoi=raster.regions.aoi)
        steps[OUTSIDE_AOI] = partial(keep_counted, regions=inside)
        steps[IGNORED] = partial(keep_counted, regions=raster.regions)
    if clip_to_raster:
        steps["cut at the edge"] = partial(clip_bboxes, **size)
    _add(steps, [(name, partial(_apply_filter, **size, box_filter=f)) for name, f in filters])
    return _carry_out(Path(path), raster, replace(reading, steps=steps))


def drop_crowds(df: pd.DataFrame) -> pd.DataFrame:
    """Drop boxes around many objects that were not told apart."""
    return df[df["iscrowd"] != 1]


def keep_counted(df: pd.DataFrame, regions: fileio.Regions) -> pd.DataFrame:
    """Keep objects whose centre lies on ground that counts."""
    return df[regions.contain(df["pixel_x"], df["pixel_y"])]


def limit_diameters(df: pd.DataFrame, max_given: float, max_px: float) -> pd.DataFrame:
    """Keep points by their `given_diameter` and polygons by the longer side of their box (px)."""
    given = df[geometries.GIVEN]
    return df[np.where(given.notna(), given < max_given, df["diameter"] < max_px)]


def _plan_reading(path: Path, raster: fileio.Raster, o: ReadingOptions) -> _Reading:
    """Read a file and choose the steps that turn its rows into boxes."""
    text_columns = [name for name in (o.label_column, o.image_column) if name]
    file = fileio.read_annotation_file(
        path, raster.original or raster, layer=o.layer, text_columns=text_columns
    )
    raw, is_table = file.df, file.kind == "table"
    label = o.label_column if file.kind != "boxes" or o.label_column in raw.columns else "label"
    boxed = o.box_source == "auto" and set(BOX_COLUMNS) <= set(raw.columns)
    from_columns = is_table and (boxed or o.box_source == "columns")
    numeric = BOX_COLUMNS if from_columns else [o.x_column, o.y_column, o.diameter_column]
    if o.polygons_only and "geometry" not in raw.columns:
        raise InputError(
            f"{path} holds no polygons, only {list(raw.columns)}; give a vector file, COCO with "
            "segmentations, or a mask raster"
        )
    _check_columns(path, file, o, [*(numeric if is_table else ()), label])
    crs = _find_crs(path, file, raster, o.coordinates)
    if label not in raw.columns:
        raw = raw.assign(**{label: pd.Series(None, index=raw.index, dtype=object)})

    resized = 1 / math.sqrt(math.prod(raster.pixel_size_xy))
    if crs is None:
        o = replace(o, diameter_scale=o.diameter_scale * resized)
    steps = _choosing_steps(path, file, raster, o)
    steps |= _label_steps(raw, label, o.default_label)
    for name in numeric if is_table else ():
        default = o.default_diameter if name == o.diameter_column else None
        steps[f"{name} not numeric"] = partial(
            remove_non_numeric_rows, column_name=name, default_diameter=default
        )
    if crs is None and raster.original is not None:
        places = [] if file.kind == "vector" else BOX_COLUMNS
        if is_table and not from_columns:
            places = numeric[:2]
        steps["pixels as they are read"] = partial(
            fileio.scale_pixels, scale_xy=1 / np.array(raster.pixel_size_xy), x_names=places[::2],
            y_names=places[1::2],
        )  # fmt: skip
    own_steps = [(name_of(step), step) for step in o.extra_steps]
    boxes_from, scale, unit = "boxes", resized, None
    if is_table and crs is None and not from_columns:
        scale = o.diameter_scale
        steps |= _center_steps(o)
        _add(steps, own_steps)
        steps["boxes"] = generate_bboxes
        steps["swapped corners"] = correct_bounding_boxes
    else:
        if file.kind == "boxes" or (from_columns and crs is None):
            boxes_from = "swapped corners" if is_table else None
            if not is_table and "geometry" in raw.columns:
                steps["invalid geometry repaired"] = geometries.repair
            if o.polygons_only:
                steps[NO_POLYGON] = geometries.drop_all_but_polygons
            steps["swapped corners"] = correct_bounding_boxes
        else:
            has_points = not from_columns
            if is_table:
                steps["geometry"] = partial(
                    geometries.from_columns,
                    column_names=BOX_COLUMNS if from_columns else numeric[:2],
                )
            else:
                kinds = shapely.get_type_id(raw["geometry"].to_numpy())
                points = np.isin(kinds, (geometries.POINT, geometries.MULTIPOINT))
                has_points = bool(points.any()) and not o.polygons_only
                if has_points and o.diameter_column not in raw.columns:
                    log.warning(
                        "%s has no attribute %r, only %s; its points are taken for objects of "
                        "DEFAULT_OBJECT_DIAMETER = %g", path, o.diameter_column,
                        [name for name in raw.columns if name != "geometry"], o.default_diameter,
                    )  # fmt: skip
            if has_points:
                scale, unit = o.diameter_scale, "px" if crs is None else "m"
            steps |= _geometry_steps(raster, o, crs, from_file=not is_table, unit=unit)
        _add(steps, own_steps)
        steps["measure boxes"] = measure_bboxes
    if raster.original is not None:
        steps["edges as they are read"] = partial(_end_with_raster, raster=raster)
    if o.drop_duplicates:
        steps[DUPLICATE] = lambda df: df[~find_duplicates(df, label)]
    return _Reading(raw, steps, boxes_from, label, scale, unit, resized)


def _end_with_raster(df: pd.DataFrame, raster: fileio.Raster) -> pd.DataFrame:
    """Let objects in the last pixels of a file, of which no whole one could be made, end before."""
    sides = {"x": (raster.width, raster.original.width, raster.pixel_size_xy[0]),
             "y": (raster.height, raster.original.height, raster.pixel_size_xy[1])}  # fmt: skip
    cut = {}
    for name in {*BOX_COLUMNS, *CENTER_COLUMNS} & set(df.columns):
        side, of_file, size = sides["x" if name in fileio.X_COLUMNS else "y"]
        inner = side - EDGE if name in CENTER_COLUMNS else side
        near = df[name].between(-EDGE, of_file / size + EDGE)
        cut[name] = df[name].mask(near, df[name].clip(0, inner))
    return df.assign(**cut)


def _check_columns(
    path: Path, file: fileio.AnnotationFile, o: ReadingOptions, needed: Sequence[str]
) -> None:
    columns = list(file.df.columns)
    named = file.kind != "boxes" and o.image_column is not None
    needed = [*needed, o.image_column] if named else needed
    spared = o.label_column if o.default_label is not None else None
    if missing := [name for name in needed if name not in columns and name != spared]:
        remedy = "Set LABEL_COLUMN_NAME, or DEFAULT_LABEL to label all objects alike"
        if file.kind == "table":
            remedy = (
                "Set X_COLUMN_NAME, Y_COLUMN_NAME, DIAMETER_COLUMN_NAME and LABEL_COLUMN_NAME, or "
                f"BOX_SOURCE = 'columns' for a table of boxes {BOX_COLUMNS}"
            )
        near = [n for name in missing for n in difflib.get_close_matches(name, columns, n=1)]
        meant = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
        raise InputError(f"{path} lacks the columns {missing}; it has {columns}{meant} {remedy}")


def _find_crs(
    path: Path, file: fileio.AnnotationFile, raster: fileio.Raster, coordinates: str
) -> pyproj.CRS | None:
    """Return the CRS of a file's coordinates, None for px."""
    declared = file.crs if coordinates == "auto" else None
    if coordinates == "pixel" or (coordinates == "auto" and file.kind != "vector"):
        return None
    if file.kind == "boxes":
        raise InputError(
            f"{path} holds pixels by its format, got COORDINATES = {coordinates!r}; use 'auto'"
        )
    if coordinates == "auto" and declared is None:
        if raster.crs is None:
            return None
        raise InputError(
            f"{path} declares no coordinate reference system; set COORDINATES to 'pixel', 'map' "
            "(the raster's), 'lonlat' or a code such as 'EPSG:4326'"
        )
    if raster.crs is None:
        name = f"the file's own CRS, {declared.name}" if declared is not None else coordinates
        raise InputError(
            f"{raster.path} has no coordinate reference system and so takes pixel coordinates "
            f"only, but those of {path} are in {name}; set COORDINATES = 'pixel' if they are "
            "pixels nevertheless, or georeference the raster"
        )
    try:
        own = pyproj.CRS.from_wkt(raster.crs)
        if coordinates == "map":
            crs = own
        elif coordinates == "lonlat":
            radius = own.ellipsoid.semi_major_metre if own.ellipsoid else 0.0
            on_earth = abs(radius / EARTH_RADIUS - 1) < 0.01
            crs = pyproj.CRS.from_epsg(4326) if on_earth else own.geodetic_crs
        else:
            crs = declared or pyproj.CRS.from_user_input(coordinates)
        if crs is None:
            raise InputError(f"the CRS of {raster.path} ({own.name}) knows no longitude")
        geometries.find_transformer(crs, own)
    except ProjError as error:
        raise InputError(
            f"{path}: its coordinates (COORDINATES = {coordinates!r}) cannot be placed on "
            f"{raster.path}: {error}; set 'pixel', 'map' (the raster's CRS), 'lonlat' or a code "
            "such as 'EPSG:4326'"
        ) from error
    return crs


def _choosing_steps(
    path: Path, file: fileio.AnnotationFile, raster: fileio.Raster, o: ReadingOptions
) -> dict[str, Step]:
    steps: dict[str, Step] = {}
    if file.kind == "boxes":
        for problem in file.df["problem"].dropna().unique():
            steps[problem] = partial(drop_problem, problem=problem)
    elif o.image_column is not None:
        mine = partial(select_raster, column_name=o.image_column, stem=raster.identifier)
        if mine(file.df).empty:
            raise InputError(
                f"no row of {path} names the raster {raster.path.name} in its column "
                f"{o.image_column!r}, but for example "
                f"{file.df[o.image_column].dropna().unique()[:5].tolist()}"
            )
        steps[OTHER_RASTER] = mine
    if o.attribute_filter is not None:
        steps[NOT_SELECTED] = partial(select_rows, expression=o.attribute_filter)
    return steps


def _label_steps(raw: pd.DataFrame, label: str, default: str | None) -> dict[str, Step]:
    steps: dict[str, Step] = {}
    if not pd.api.types.is_string_dtype(raw[label]) or raw[label].eq("").any():
        steps["label as text"] = partial(write_labels_out, column_name=label)
    if default is not None:
        steps["default label"] = partial(
            apply_column_transform,
            column_name=label, transform=lambda labels: labels.where(labels.notna(), default),
        )  # fmt: skip
    return steps


def _center_steps(o: ReadingOptions) -> dict[str, Step]:
    steps: dict[str, Step] = {
        "units to pixels": partial(
            apply_column_transform,
            column_name=o.diameter_column, transform=partial(np.multiply, o.diameter_scale),
        )
    }  # fmt: skip
    if [o.x_column, o.y_column] != CENTER_COLUMNS:
        steps["name the centre"] = lambda df: df.assign(
            pixel_x=df[o.x_column], pixel_y=df[o.y_column]
        )
    if o.diameter_column != "diameter":
        steps["name the diameter"] = lambda df: df.assign(diameter=df[o.diameter_column])
    return steps


def _geometry_steps(
    raster: fileio.Raster,
    o: ReadingOptions,
    crs: pyproj.CRS | None,
    *,
    from_file: bool,
    unit: str | None,
) -> dict[str, Step]:
    steps: dict[str, Step] = {}
    if from_file:
        steps["no geometry"] = geometries.drop_empty
        steps["coordinates not finite"] = geometries.drop_infinite
        steps["invalid geometry repaired"] = geometries.repair
        if o.polygons_only:
            steps[NO_POLYGON] = geometries.drop_all_but_polygons
        else:
            steps["neither point nor polygon"] = geometries.drop_other
    if unit is not None:
        steps["point without a diameter"] = partial(
            geometries.measure_points, column_name=o.diameter_column,
            default_diameter=o.default_diameter, scale=o.diameter_scale,
        )  # fmt: skip
    if crs is not None:
        steps["map to pixels"] = partial(geometries.move_to_pixels, raster=raster, crs=crs)
        steps["outside the projection"] = geometries.drop_empty
    steps["boxes"] = partial(geometries.add_bounds, raster=raster, in_metres=crs is not None)
    if unit == "m":
        steps["no size on the ground"] = geometries.drop_infinite_boxes
    return steps


def _carry_out(
    path: Path, raster: fileio.Raster, reading: _Reading, further: Sequence[str] = ()
) -> Cleaned:
    """Run the steps, say what they lost, and keep the columns of a clean table."""
    raw = reading.raw
    try:
        cleaned = run_steps(raw, reading.steps, reading.boxes_from)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if cleaned.df.empty:
        reasons = cleaned.quarantine["reason"].value_counts()
        places = (OFF_RASTER, OUTSIDE_AOI, "no size on the ground", "outside the projection")
        remedy = (
            "Check the units (DIAMETER_SCALE, MAX_DIAMETER) and the columns "
            "(DIAMETER_COLUMN_NAME, BOX_SOURCE)"
        )
        if reasons.index[0] in places:
            remedy = (
                f"Do this file and {raster.path.name} belong together? If so, check COORDINATES, "
                "the CRS of both, and whether x and y (longitude and latitude) are swapped"
            )
        raise InputError(
            f"{path} has no valid row left of {len(raw)}; dropped were {reasons.to_dict()}, for "
            f"example {str(raw.iloc[0].to_dict())[:300]}. {remedy}"
        )
    _warn_of_losses(path, cleaned, reading.label_column)
    df = cleaned.df.assign(label=cleaned.df[reading.label_column])
    columns = fileio.PIXEL_COLUMNS
    further = [name for name in further if name in raw.columns]
    if "geometry" in further:
        df = geometries.with_geometry(df, geometries.polygons_of(df))
        further = further if df["geometry"].notna().any() else [*set(further) - {"geometry"}]
    return Cleaned(df[[*columns, *further]], cleaned.quarantine, cleaned.report)


def _warn_of_losses(path: Path, cleaned: Cleaned, label_column: str) -> None:
    report = cleaned.report
    lost = report[report["dropped"] > LARGE_LOSS * report["rows_in"]]
    wanted = [OTHER_RASTER, NOT_SELECTED, DUPLICATE, OUTSIDE_AOI, IGNORED, CROWD]
    for step in lost[~lost["step"].isin(wanted)].itertuples():
        log.warning(
            "%s: %d of %d rows dropped: %s; is that meant?", path.name, step.dropped, step.rows_in,
            step.step,
        )  # fmt: skip
    dropped = int((cleaned.quarantine["reason"] == DUPLICATE).sum())
    if dropped:
        log.warning("%s: %d duplicates dropped", path.name, dropped)
    elif kept := int(find_duplicates(cleaned.df, label_column).sum()):
        log.warning(
            "%s: %d objects have the label and box of another; set DROP_DUPLICATES to drop them",
            path.name, kept,
        )  # fmt: skip


def _add(steps: dict[str, Step], more: Iterable[tuple[str, Step]]) -> None:
    """Add steps under their names; of two lambdas the second becomes "<lambda> 2"."""
    for name, step in more:
        taken = sum(1 for other in steps if other == name or other.startswith(f"{name} "))
        steps[f"{name} {taken + 1}" if taken else name] = step


def _apply_filter(df: pd.DataFrame, sizex: int, sizey: int, box_filter: BoxFilter) -> pd.DataFrame:
    return filter_invalid_bboxes(df, sizex, sizey, box_filter)


def name_of(function: Callable) -> str:
    """Return a name to show for any callable."""
    inner = function.func if isinstance(function, partial) else function
    return getattr(inner, "__name__", type(inner).__name__)


def clean_annotations(
    df_paths: Sequence[Path],
    rasters: Sequence[fileio.Raster],
    *,
    label_percentile: float,
    output_dir: Path,
    region_paths: Sequence[tuple[Path | None, Path | None]] | None = None,
    force: bool = False,
    workers: int | None = None,
    scheduler: str | None = None,
    progress: bool = False,
    **options: object,
) -> tuple[list[ImageData], pd.DataFrame]:
    """Clean the annotations of all rasters in parallel, and merge uncommon labels over all of them.

    An object that reaches over the edge of the raster or of its area of interest is dropped, and
    so is a crowd, but they are real: the ground under such a box does not count.

    Writes, per raster, `<identifier>.csv` and `<identifier>_quarantine.csv` to `output_dir`;
    `report.csv` over all; and `labels.csv`: all labels, the most frequent first, with the number of
    `objects` and whether they are `common`, or become "Unknown". What a raster's cleaning left in
    `output_dir/parts` is used again as long as it was made from the same input, so that one that
    was killed goes on.

    Args:
        df_paths: The annotation files, in the order of the rasters.
        rasters: The rasters they annotate.
        label_percentile: See `gather_common_labels`.
        output_dir: Where clean tables, quarantine and report go.
        region_paths: Per raster, see `read_regions`.
        force: Clean all anew in any case.
        workers: Processes; None takes all cores.
        scheduler: Of a Dask cluster that takes their place, see `parallel.imap_ordered`.
        progress: Show a bar.
        options: Passed to `preprocess_df`.

    Returns:
        The annotated rasters, with their regions, and the report with one row per raster and step.
    """
    if region_paths is not None:
        coordinates = str(options.get("coordinates", "auto"))
        rasters = [
            raster.with_regions(read_regions(*paths, raster, coordinates))
            for paths, raster in zip(region_paths, rasters, strict=True)
        ]
    output_dir = Path(output_dir)
    with fileio.exclusive(output_dir, wait=True):
        fileio.remove_strays(output_dir / PARTS)
        parts = parallel.map_ordered(
            partial(_clean_one, output_dir=output_dir, force=force, options=options),
            list(zip(df_paths, rasters, strict=True)),
            workers=workers, scheduler=scheduler, description="cleaning", progress=progress,
        )  # fmt: skip
        return _merge_labels(df_paths, rasters, parts, label_percentile, output_dir)


@dataclass(frozen=True)
class _Part:
    """What cleaning one raster leaves, beside its quarantine.

    Attributes:
        df: The clean rows, with all labels.
        report: See `Cleaned`.
        real: Boxes (px) of rows that were dropped although they are real.
    """

    df: pd.DataFrame
    report: pd.DataFrame
    real: pd.DataFrame


def _clean_one(
    job: tuple[Path, fileio.Raster], output_dir: Path, force: bool, options: dict[str, object]
) -> _Part:
    """Clean the annotations of one raster, unless that was done before."""
    path, raster = job
    name, folder = raster.identifier, output_dir / PARTS
    files = {field.name: f"{name}.{field.name}.parquet" for field in fields(_Part)}
    quarantine = output_dir / f"{name}_quarantine.csv"
    made_from = {
        "annotations": fileio.files_of(path), "raster": raster.made_from, "options": options,
        "code": [preprocess_df, fileio.read_annotation_file],
    }  # fmt: skip
    manifest = folder / f"{name}.json"
    if force or not quarantine.exists() or not fileio.is_finished(manifest, made_from):
        manifest.unlink(missing_ok=True)  # before what it speaks of is replaced
        cleaned = preprocess_df(path, raster, **options)
        dropped = cleaned.quarantine
        real = dropped.loc[dropped["reason"].isin(REAL), QUARANTINE_BOX_COLUMNS].astype("float64")
        fileio.write_table(quarantine, dropped)
        part = _Part(cleaned.df, cleaned.report, real.reset_index(drop=True))
        for field, file in files.items():
            fileio.write_table(folder / file, getattr(part, field))
        fileio.mark_finished(manifest, made_from, list(files.values()))
    return _Part(**{field: pd.read_parquet(folder / file) for field, file in files.items()})


def _merge_labels(
    df_paths: Sequence[Path],
    rasters: Sequence[fileio.Raster],
    parts: Sequence[_Part],
    label_percentile: float,
    output_dir: Path,
) -> tuple[list[ImageData], pd.DataFrame]:
    """Merge uncommon labels over all rasters, and write the clean tables; see the caller."""
    common = gather_common_labels([part.df for part in parts], label_percentile)
    counts = pd.concat([part.df["label"] for part in parts]).value_counts()
    labels = pd.DataFrame({"objects": counts.reindex(common.index), "common": common})
    fileio.write_table(output_dir / "labels.csv", labels.rename_axis("label").reset_index())
    merged = sorted(common.index[~common])
    log.info("common labels %s; merged into %s: %s", sorted(common.index[common]), UNKNOWN, merged)

    images, reports = [], []
    for path, raster, part in zip(df_paths, rasters, parts, strict=True):
        identifier, dropped = raster.identifier, int(part.report["dropped"].sum())
        last = run_steps(
            part.df,
            {"uncommon label": partial(filter_label_column, label_mask=common)},
        )
        report = pd.concat([part.report, last.report], ignore_index=True)
        report.insert(0, "raster", identifier)
        fileio.write_table(output_dir / f"{identifier}.csv", last.df)
        images.append(ImageData(_ignore_real(raster, part.real), identifier, last.df))
        reports.append(report)
        log.info(
            "%s: kept %d of %d rows, %d in quarantine", Path(path).name, len(last.df),
            len(last.df) + dropped, dropped,
        )  # fmt: skip
    report = pd.concat(reports, ignore_index=True)
    fileio.write_table(output_dir / "report.csv", report)
    return images, report


def read_regions(
    aoi_path: Path | None, ignore_path: Path | None, raster: fileio.Raster, coordinates: str
) -> fileio.Regions | None:
    """Read the area of interest and the ignored regions of a raster.

    Args:
        aoi_path: File of polygons outside which nothing counts, of any format that has polygons; a
            layer of it as `file.gpkg|layer`.
        ignore_path: File of polygons inside which nothing counts.
        raster: The raster.
        coordinates: Of the annotations; "pixel" holds for these files, too. Otherwise each is in
            the CRS that it declares, and in that of the annotations if it declares none.

    Returns:
        The regions in px, or None where there are no files.

    Raises:
        InputError: A file cannot be used, or no part of the area of interest lies on the raster.
    """
    if aoi_path is None and ignore_path is None:
        return None
    aoi, ignored = (
        None if path is None else _read_polygons(path, raster, coordinates)
        for path in (aoi_path, ignore_path)
    )  # fmt: skip
    if aoi is not None and not aoi:
        raise InputError(
            f"no polygon of {aoi_path} lies on {raster.path}, so that nothing of it would count; "
            "check that they belong together, and the CRS of both"
        )
    if ignored is not None and not ignored:
        log.warning("no polygon of %s lies on %s; nothing is ignored", ignore_path, raster.path)
    return fileio.Regions(aoi, ignored or ()) if aoi or ignored else None


def _read_polygons(
    path: Path, raster: fileio.Raster, coordinates: str
) -> tuple[shapely.Geometry, ...]:
    """Return the parts of a file's polygons that touch a raster, in px."""
    name, _, layer = str(path).partition("|")
    df, rows = read_shapes(Path(name), raster, coordinates=coordinates, layer=layer or None)
    polygons = geometries.polygons_of(df)
    polygons = polygons[~shapely.is_missing(polygons)]
    if len(polygons) < rows:
        log.warning(
            "%s: %d of %d features are no polygons that can be placed on %s",
            path.name, rows - len(polygons), rows, raster.path.name,
        )  # fmt: skip
    parts = shapely.get_parts(polygons)
    return tuple(parts[shapely.intersects(parts, shapely.box(0, 0, raster.width, raster.height))])


def read_shapes(
    path: Path, raster: fileio.Raster, *, coordinates: str = "auto", layer: str | None = None
) -> tuple[pd.DataFrame, int]:
    """Read the geometries of a file, of any kind, as they lie on a raster.

    Args:
        path: The file, of any format that has geometries.
        raster: The raster.
        coordinates: "pixel", or the CRS of files that declare none, see `ReadingOptions`.
        layer: Layer of a vector file with several.

    Returns:
        The columns of the file with `geometry` (px), without the rows whose geometry is empty, not
        finite or None on the raster's map; and how many rows the file has.

    Raises:
        InputError: The file cannot be used.
    """
    file = fileio.read_annotation_file(path, raster.original or raster, layer=layer)
    if "geometry" not in file.df.columns:
        raise InputError(f"{path} holds no polygons, only {list(file.df.columns)}")
    declared = file.crs is not None or file.kind == "boxes"
    place = coordinates if coordinates == "pixel" or not declared else "auto"
    crs = _find_crs(path, file, raster, place)
    df = geometries.drop_empty(file.df).pipe(geometries.drop_infinite).pipe(geometries.repair)
    if crs is not None:
        df = geometries.move_to_pixels(df, raster, crs).pipe(geometries.drop_empty)
    elif raster.original is not None:
        df = fileio.scale_pixels(df, 1 / np.array(raster.pixel_size_xy))
    return df, len(file.df)


def _ignore_real(raster: fileio.Raster, real: pd.DataFrame) -> fileio.Raster:
    """Let the ground under objects that were dropped although they are real not count."""
    boxes = real.to_numpy()
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(axis=1)]
    shapes = shapely.box(*boxes.T)
    shapes = shapes[shapely.intersects(shapes, shapely.box(0, 0, raster.width, raster.height))]
    if not len(shapes):
        return raster
    regions = raster.regions or fileio.Regions()
    return raster.with_regions(replace(regions, ignored=(*regions.ignored, *shapes)))


def summarize_report(report: pd.DataFrame) -> pd.DataFrame:
    """Sum a cleaning report over rasters: one row per step that dropped or changed anything."""
    steps = report.groupby("step", sort=False)[["rows_in", "dropped", "changed", "rows_out"]].sum()
    return steps[(steps["dropped"] > 0) | (steps["changed"] > 0)]
