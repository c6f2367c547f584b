"""The cleaning pipeline: from a raw annotation table to clean boxes, with nothing lost unseen.

Every step takes a frame and returns a new one, so steps chain with `DataFrame.pipe` and a user's
own step is as good as ours. `run_steps` chains them and compares each frame with the one before:
what disappeared goes to the quarantine with the step's name as its reason, what changed is counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

import fileio
import parallel
from ImageData import BOX_COLUMNS, CENTER_COLUMNS, ImageData, InputError

log = logging.getLogger(__name__)

UNKNOWN = "Unknown"  # the label that stands for all uncommon ones
MIN_SIDE = 0.01  # px; a box thinner than this has no area in float32
LARGE_LOSS = 0.3  # share of the rows that one step may drop before it is worth a warning
ROW_BASE = 2**40  # index of the first row while steps run

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
    values = pd.to_numeric(df[column_name], errors="coerce").astype("float64")
    finite = np.isfinite(values)
    values = values[finite]
    if default_diameter is not None:
        values = values.where(values > 0, default_diameter)
    return df[finite].assign(**{column_name: values})


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
    """Cut the boxes at the raster's edge, (0, 0) to (sizex, sizey)."""
    return df.assign(
        xmin=df["xmin"].clip(0, sizex), xmax=df["xmax"].clip(0, sizex),
        ymin=df["ymin"].clip(0, sizey), ymax=df["ymax"].clip(0, sizey),
    )  # fmt: skip


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


def run_steps(raw: pd.DataFrame, steps: Mapping[str, Step]) -> Cleaned:
    """Pipe a frame through named steps, keeping account of every row.

    Args:
        raw: The frame.
        steps: Name -> callable that returns a frame with some of the rows it was given.

    Raises:
        InputError: A step fails, or returns rows that it was not given.
    """
    # An index that no step makes by accident tells rows that were given from rows that were made.
    raw = raw.set_axis(pd.RangeIndex(ROW_BASE, ROW_BASE + len(raw)))
    before, dropped, report = raw, [], []
    for name, step in steps.items():
        try:
            after = before.pipe(step)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"cleaning step {name} failed: {error!r}") from error
        given = isinstance(after, pd.DataFrame) and after.index.isin(before.index).all()
        if not given or not after.index.is_unique:
            raise InputError(
                f"cleaning step {name} must return a frame with rows of the frame it was given, "
                "each at most once and under its index (no reset_index)"
            )
        gone = before.index.difference(after.index, sort=False)
        dropped.append(raw.loc[gone].assign(reason=name, row=gone - ROW_BASE))
        report.append(
            {"step": name, "rows_in": len(before), "dropped": len(gone),
             "changed": _count_changed(before, after), "rows_out": len(after)}
        )  # fmt: skip
        before = after
    quarantine = pd.concat(dropped) if dropped else raw.iloc[:0].assign(reason="", row=0)
    quarantine = quarantine.sort_index(ignore_index=True)
    return Cleaned(before.reset_index(drop=True), quarantine, pd.DataFrame(report))


def _count_changed(before: pd.DataFrame, after: pd.DataFrame) -> int:
    before = before if before.index.equals(after.index) else before.loc[after.index]
    changed = np.zeros(len(after), dtype=bool)
    for name in after.columns.intersection(before.columns):
        old, new = before[name], after[name]
        if pd.api.types.is_numeric_dtype(new) and not pd.api.types.is_numeric_dtype(old):
            old = pd.to_numeric(old, errors="coerce")  # "7.0" read as a number is no change
        rows = np.flatnonzero(old.ne(new).to_numpy(dtype=bool, na_value=True))
        both_missing = old.iloc[rows].isna().to_numpy() & new.iloc[rows].isna().to_numpy()
        changed[rows[~both_missing]] = True
    return int(changed.sum())


def preprocess_df(
    path: Path,
    shape_hw: tuple[int, int],
    *,
    diameter_column: str = "diameter",
    label_column: str = "label",
    box_source: str = "diameter",
    default_diameter: float = 0.5,
    diameter_scale: float = 1.0,
    max_diameter: float = np.inf,
    clip_to_raster: bool = False,
    extra_filters: Sequence[BoxFilter] = (),
    extra_steps: Sequence[Step] = (),
) -> Cleaned:
    """Read and clean the annotation table of one raster.

    Args:
        path: A CSV with `pixel_x, pixel_y` (px), a diameter and a label, or with box columns.
        shape_hw: Height and width of the raster in px.
        diameter_column: Name of the column with diameters, in units of `1 / diameter_scale` px.
        label_column: Name of the column with labels.
        box_source: "diameter" makes square boxes from centre and diameter; "columns" takes
            `xmin, ymin, xmax, ymax` (px) from the table.
        default_diameter: Replaces diameters of zero and below, in the table's units.
        diameter_scale: Pixels per unit of the diameter column.
        max_diameter: Objects from this diameter on are noise, in the table's units (boxes: px).
        clip_to_raster: Cut boxes at the raster's edge instead of dropping those that reach over it.
        extra_filters: Further box filters, see `filter_invalid_bboxes`.
        extra_steps: Further steps (frame -> frame), run on centres and diameters in px before boxes
            are made of them, or on the boxes of the table.

    Returns:
        The clean table with `pixel_x, pixel_y, diameter, label, xmin, ymin, xmax, ymax` in px, its
        quarantine and its report.

    Raises:
        InputError: The file is missing, empty, or lacks a column, or no row is left.
    """
    height, width = shape_hw
    raw = fileio.read_table(path, text_columns=[label_column])
    from_columns = box_source == "columns"
    numeric = BOX_COLUMNS if from_columns else [*CENTER_COLUMNS, diameter_column]
    if missing := [name for name in (*numeric, label_column) if name not in raw.columns]:
        raise InputError(
            f"{path} lacks the columns {missing}; it has {list(raw.columns)}. Set "
            "DIAMETER_COLUMN_NAME and LABEL_COLUMN_NAME, or BOX_SOURCE = 'columns' for a table of "
            f"boxes {BOX_COLUMNS}"
        )

    steps: dict[str, Step] = {
        f"{name} not numeric": partial(
            remove_non_numeric_rows,
            column_name=name,
            default_diameter=default_diameter if name == diameter_column else None,
        )
        for name in numeric
    }
    own_steps = [(name_of(step), step) for step in extra_steps]
    if from_columns:
        steps["swapped corners"] = correct_bounding_boxes
        _add(steps, own_steps)
        steps["measure boxes"] = measure_bboxes
    else:
        steps["units to pixels"] = partial(
            apply_column_transform,
            column_name=diameter_column,
            transform=partial(np.multiply, diameter_scale),
        )
        if diameter_column != "diameter":
            steps["name the diameter"] = lambda df: df.assign(diameter=df[diameter_column])
        _add(steps, own_steps)
        steps["boxes"] = generate_bboxes
        steps["swapped corners"] = correct_bounding_boxes
    size = {"sizex": width, "sizey": height}
    limit_px = max_diameter if from_columns else max_diameter * diameter_scale
    filters: list[tuple[str, BoxFilter]] = [
        ("over the left or upper edge", min_filter),
        ("over the right or lower edge", max_filter),
        *((name_of(box_filter), box_filter) for box_filter in extra_filters),
        ("no area", area_filter),
    ]
    too_large = partial(max_diameter_filter, max_diameter=limit_px)
    limit_name = f"not under MAX_DIAMETER, {limit_px:g} px"
    for name, box_filter in (("centre off the raster", center_filter), (limit_name, too_large)):
        steps[name] = partial(_apply_filter, **size, box_filter=box_filter)
    if clip_to_raster:
        steps["cut at the edge"] = partial(clip_bboxes, **size)
    _add(steps, [(name, partial(_apply_filter, **size, box_filter=f)) for name, f in filters])

    try:
        cleaned = run_steps(raw, steps)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if cleaned.df.empty:
        reasons = cleaned.quarantine["reason"].value_counts().to_dict()
        raise InputError(
            f"{path} has no valid row left of {len(raw)}; dropped were {reasons}, for example "
            f"{raw.iloc[0].to_dict()}. Check the units (DIAMETER_SCALE, MAX_DIAMETER) and the "
            "columns (DIAMETER_COLUMN_NAME, BOX_SOURCE)"
        )
    lost = cleaned.report[cleaned.report["dropped"] > LARGE_LOSS * cleaned.report["rows_in"]]
    for step in lost.itertuples():
        log.warning(
            "%s: %d of %d rows dropped: %s; is that meant?", path.name, step.dropped, step.rows_in,
            step.step,
        )  # fmt: skip
    df = cleaned.df.assign(label=cleaned.df[label_column])
    return Cleaned(
        df[[*CENTER_COLUMNS, "diameter", "label", *BOX_COLUMNS]], cleaned.quarantine, cleaned.report
    )


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
    workers: int | None = None,
    progress: bool = False,
    **options: object,
) -> tuple[list[ImageData], pd.DataFrame]:
    """Clean the tables of all rasters in parallel and merge uncommon labels over all of them.

    Writes, per raster, `<identifier>.csv` and `<identifier>_quarantine.csv` to `output_dir`, and
    `report.csv` over all.

    Args:
        df_paths: The tables, in the order of the rasters.
        rasters: The rasters they annotate.
        label_percentile: See `gather_common_labels`.
        output_dir: Where clean tables, quarantine and report go.
        workers: Processes; None takes all cores.
        progress: Show a bar.
        options: Passed to `preprocess_df`.

    Returns:
        The annotated rasters, and the report with one row per raster and step.
    """
    jobs = [
        (path, (raster.height, raster.width))
        for path, raster in zip(df_paths, rasters, strict=True)
    ]
    cleaned = parallel.map_ordered(
        partial(_preprocess_job, options=options), jobs,
        workers=workers, description="cleaning", progress=progress,
    )  # fmt: skip
    common = gather_common_labels([c.df for c in cleaned], label_percentile)
    merged = sorted(common.index[~common])
    log.info("common labels %s; merged into %s: %s", sorted(common.index[common]), UNKNOWN, merged)

    images, reports = [], []
    for path, raster, first in zip(df_paths, rasters, cleaned, strict=True):
        identifier = raster.path.stem
        last = run_steps(
            first.df,
            {"uncommon label": partial(filter_label_column, label_mask=common)},
        )
        report = pd.concat([first.report, last.report], ignore_index=True)
        report.insert(0, "raster", identifier)
        fileio.write_table(output_dir / f"{identifier}.csv", last.df)
        fileio.write_table(output_dir / f"{identifier}_quarantine.csv", first.quarantine)
        images.append(ImageData(raster, identifier, last.df))
        reports.append(report)
        log.info(
            "%s: kept %d of %d rows, %d in quarantine", path.name, len(last.df),
            len(last.df) + len(first.quarantine), len(first.quarantine),
        )  # fmt: skip
    report = pd.concat(reports, ignore_index=True)
    fileio.write_table(output_dir / "report.csv", report)
    return images, report


def _preprocess_job(job: tuple[Path, tuple[int, int]], options: dict[str, object]) -> Cleaned:
    path, shape_hw = job
    return preprocess_df(path, shape_hw, **options)


def summarize_report(report: pd.DataFrame) -> pd.DataFrame:
    """Sum a cleaning report over rasters: one row per step that dropped or changed anything."""
    steps = report.groupby("step", sort=False)[["rows_in", "dropped", "changed", "rows_out"]].sum()
    return steps[(steps["dropped"] > 0) | (steps["changed"] > 0)]
