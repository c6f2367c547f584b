"""Every picture. Functions draw into Axes and return them; none calls `plt.show()`.

Boxes are matplotlib line collections, so that a thousand of them draw at once; colours are those of
Okabe and Ito, which colour-blind people tell apart.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

import fileio
import imutils
import tiling
from ImageData import BOX_COLUMNS, ImageData, Window
from imutils import COLORS, label_colors

log = logging.getLogger(__name__)

SPLIT_COLORS = {"train": "#0072B2", "validation": "#E69F00", "test": "#009E73"}
MAX_SIDE = 1024  # px; larger views are read decimated
WIDTH = 9.0  # inches, a notebook's cell
TRUTH_COLOR, DETECTION_COLOR = COLORS[1], COLORS[4]  # of the boxes of an error
CONTEXT = 3.0  # side of an error's cut-out, in sides of what it shows
LEAST_CUTOUT = 32  # px
CAPTION = 28  # letters of a caption's line


def use_backend(*, interactive: bool) -> bool:
    """Choose how a notebook shows figures: widgets that zoom (ipympl), or pictures.

    Returns:
        Whether figures are interactive; False, with a warning, where ipympl cannot be had.
    """
    try:
        from IPython import get_ipython

        shell = get_ipython()
    except ImportError:
        shell = None
    if shell is None or not hasattr(shell, "kernel"):
        return False
    if interactive:
        try:
            import ipympl  # noqa: F401

            shell.run_line_magic("matplotlib", "widget")
        except Exception as error:
            log.warning("no interactive figures (%s): pip install ipympl; showing pictures", error)
        else:
            return True
    shell.run_line_magic("matplotlib", "inline")
    return False


def _axes(ax: Axes | None, size: tuple[float, float] = (WIDTH, 4.0)) -> Axes:
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def _grid(count: int, columns: int, side: float, caption: float = 0.0) -> tuple[Figure, list[Axes]]:
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(side * columns, (side + caption) * rows + 0.3), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for ax in axes.flat[count:]:
        ax.axis("off")
    return figure, list(axes.flat[:count])


def _draw_boxes(
    ax: Axes, boxes_xyxy: np.ndarray, colors: Sequence[str] | str, **style: object
) -> None:
    x0, y0, x1, y1 = np.asarray(boxes_xyxy, dtype=float).reshape(-1, 4).T
    outline = np.stack(
        [np.stack([x0, x1, x1, x0, x0]), np.stack([y0, y0, y1, y1, y0])], axis=-1
    ).swapaxes(0, 1)
    style = {"linewidths": 1.0} | style
    ax.add_collection(LineCollection(list(outline), colors=colors, **style), autolim=False)


def _draw_labelled(ax: Axes, df: pd.DataFrame, colors: Mapping[str, str], **style: object) -> None:
    _draw_boxes(ax, df[BOX_COLUMNS].to_numpy(), [colors[label] for label in df["label"]], **style)


def _legend(ax: Axes, colors: Mapping[str, str], counts: Mapping[str, int] | None = None) -> None:
    handles = [
        Line2D(
            [], [], color=color, label=f"{name} ({counts[name]})" if counts is not None else name
        )
        for name, color in colors.items()
    ]
    if handles:
        ax.legend(handles=handles, loc="upper left", fontsize="small", framealpha=0.8)


def _legend_above(ax: Axes, handles: Sequence) -> None:
    ax.legend(handles=handles, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0),
              ncols=max(len(handles), 1), frameon=False)  # fmt: skip


def show_window(
    ax: Axes, raster: fileio.Raster, window: Window | None = None, *, gray: bool = False
) -> None:
    """Draw a window of a raster, or all of it decimated, in px of the raster, perhaps in gray."""
    whole = Window(0, 0, raster.width, raster.height)
    window = window or whole
    if window == whole:
        image, valid = raster.preview(MAX_SIDE)
    else:
        image = raster.read(window)
        valid = raster.read_valid(window, image)
    image = image.mean(axis=0, keepdims=True) if gray else image
    extent = (window.x, window.x + window.width, window.y + window.height, window.y)
    ax.imshow(
        imutils.preview_stretch(image, valid), cmap="gray", extent=extent, interpolation="nearest",
        vmin=0, vmax=255,
    )  # fmt: skip
    ax.set(xlim=extent[:2], ylim=extent[2:], xlabel="x (px)", ylabel="y (px)")


def plot_image_with_annotations(
    raster: fileio.Raster,
    annotations: pd.DataFrame,
    window: Window | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a raster, or a window of it, with the boxes of its objects in their labels' colours.

    Args:
        raster: The raster; a large one is shown decimated.
        annotations: `label` and boxes in px of the raster.
        window: What to show; None shows all.
        ax: Where to draw; None makes a figure.
    """
    ax = _axes(ax, (WIDTH, WIDTH * 0.8))
    show_window(ax, raster, window)
    colors = label_colors(annotations["label"])
    _draw_labelled(ax, annotations, colors)
    _legend(ax, colors, annotations["label"].value_counts())
    ax.set_title(
        f"{raster.path.name}: {len(annotations)} objects, {raster.width} x {raster.height}"
    )
    return ax


def plot_diameters(
    images: Sequence[ImageData], patch_sizes: Sequence[int] = (), ax: Axes | None = None
) -> Axes:
    """Draw how diameters are distributed per label, beside the tile sizes they have to fit into."""
    ax = _axes(ax)
    df = pd.concat([image.df for image in images])
    top = max([df["diameter"].max(), *patch_sizes]) * 1.1
    bins = np.geomspace(max(df["diameter"].min(), 0.5), df["diameter"].max() * 1.1, 40)
    for label, color in label_colors(df["label"]).items():
        ax.hist(
            df.loc[df["label"] == label, "diameter"], bins, histtype="step", color=color,
            label=label, linewidth=1.6,
        )  # fmt: skip
    for size in patch_sizes:
        ax.axvline(size, color="black", linestyle=":", linewidth=1)
        ax.annotate(f"tile {size}", (size, 1), xycoords=("data", "axes fraction"), rotation=90,
                    va="top", ha="right", fontsize="small")  # fmt: skip
    ax.set(xscale="log", xlabel="diameter (px)", ylabel="objects", title="Object diameters")
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if bins[0] <= t <= top]
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.minorticks_off()
    ax.legend(fontsize="small")
    return ax


def plot_label_counts(counts: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the objects per label and split, a frame as `splits.check_labels` returns it."""
    ax = _axes(ax, (WIDTH, 0.9 + 0.5 * len(counts)))
    left = np.zeros(len(counts))
    for split, color in SPLIT_COLORS.items():
        ax.barh(counts.index, counts[split], left=left, color=color, label=split)
        left += counts[split].to_numpy()
    for i, total in enumerate(left):
        ax.annotate(f" {total:.0f}", (total, i), va="center", fontsize="small")
    ax.set(xlabel="objects", xlim=(0, left.max() * 1.1))
    ax.set_title("Objects per label and split", pad=26)
    _legend_above(ax, ax.get_legend_handles_labels()[0])
    return ax


def plot_split_map(image: ImageData, blocks: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw which ground of a raster trains, validates and tests, and where its objects are."""
    ax = _axes(ax, (WIDTH, WIDTH * 0.75))
    show_window(ax, image.raster, gray=True)
    mine = blocks[blocks["raster"] == image.image_identifier]
    for b in mine.itertuples():
        color = SPLIT_COLORS.get(b.split, "0.5")  # unused ground
        ax.add_patch(Rectangle((b.x, b.y), b.width, b.height, facecolor=color, alpha=0.35))
        ax.add_patch(Rectangle((b.x, b.y), b.width, b.height, edgecolor="black", fill=False))
    ax.plot(image.df["pixel_x"], image.df["pixel_y"], "o", color="white", markersize=3,
            markeredgecolor="black", markeredgewidth=0.4)  # fmt: skip
    handles = [
        Line2D(
            [], [], color=color, linewidth=6, label=f"{split} ({(mine['split'] == split).sum()})"
        )
        for split, color in SPLIT_COLORS.items()
    ]
    _legend_above(ax, handles)
    ax.set_title(f"Ground of {image.image_identifier} (blocks per split)", pad=26)
    return ax


def plot_tiles(
    tiles: pd.DataFrame,
    boxes: pd.DataFrame,
    rasters: Mapping[str, fileio.Raster],
    count: int = 8,
    columns: int = 4,
) -> Figure:
    """Draw training tiles, the fullest windows in all their turns, with the boxes they show."""
    kept = tiles[tiles["kept"] & (tiles["split"] == "train")]
    fullest = kept.sort_values(["objects", "window", "angle"], ascending=[False, True, True])
    shown = fullest.head(count)
    colors = label_colors(boxes["label"])
    figure, axes = _grid(len(shown), min(columns, len(shown)), WIDTH / columns)
    for ax, tile in zip(axes, shown.itertuples(), strict=True):
        window = Window(tile.x, tile.y, tile.width, tile.height)
        image, valid, _ = tiling.read_tile(rasters[tile.raster], window, tile.angle)
        ax.imshow(imutils.preview_stretch(image, valid), cmap="gray",
                  extent=(0, tile.width, tile.height, 0))  # fmt: skip
        mine = boxes[boxes["window"] == tile.window]
        turned = tiling.boxes_of_tile(
            mine[BOX_COLUMNS].to_numpy(), tile.angle, tile.width, tile.height
        )
        styles = np.where(mine["owned"], "-", ":")
        _draw_boxes(ax, turned, [colors[label] for label in mine["label"]], linestyles=list(styles))
        ax.set_title(f"window {tile.window}, {tile.angle}°", fontsize="small")
        ax.set(xticks=[], yticks=[])
    figure.suptitle("Training tiles (dotted: shown, but owned by a neighbour)", fontsize="medium")
    return figure


def plot_learning_curves(records: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the losses of a training and, on the right, its validation scores, over the steps.

    Args:
        records: `metrics.csv` of a trial.
        ax: Where to draw the losses; None makes a figure.
    """
    ax = _axes(ax)
    # the last validation, after the training, is of another model on other tiles
    records = records[
        records["epoch"] <= records["epoch"][records["train_loss_epoch"].notna()].max()
    ]
    series = [("train_loss_epoch", "training loss", COLORS[5], "-"),
              ("val_loss", "validation loss", COLORS[4], "-")]  # fmt: skip
    scores = [("val_AP50", "validation AP50", COLORS[2], "--"),
              ("val_box_f1", "validation F1", COLORS[3], "--")]  # fmt: skip
    right = ax.twinx()
    for target, lines in ((ax, series), (right, scores)):
        for column, label, color, style in lines:
            if column in records:
                known = records.dropna(subset=[column])
                target.plot(known["step"], known[column], style, marker="o", markersize=3,
                            color=color, label=label)  # fmt: skip
    ax.set(xlabel="optimiser step", ylabel="loss", ylim=(0, None))
    ax.set_title("Learning curves", pad=26)
    right.set(ylabel="score", ylim=(0, 1.02))
    handles = [*ax.get_lines(), *right.get_lines()]
    _legend_above(ax, handles)
    return ax


def plot_search_heatmap(
    leaderboard: pd.DataFrame,
    x: str | None = None,
    y: str | None = None,
    value: str = "AP50",
    ax: Axes | None = None,
) -> Axes:
    """Draw the best score reached for each pair of values of two hyperparameters.

    Args:
        leaderboard: See `gridsearch.read_leaderboard`.
        x: Hyperparameter of the columns; None takes the one with the most values.
        y: Hyperparameter of the rows; None takes the next one.
        value: The score.
        ax: Where to draw; None makes a figure.
    """
    names = ["patch_size", "n_epochs", "sample_size", "learning_rate", "batch_size"]
    varied = sorted(names, key=lambda name: -leaderboard[name].nunique())
    x = x or next(name for name in varied if name != y)
    y = y or next(name for name in varied if name != x)
    table = leaderboard.pivot_table(value, y, x, aggfunc="max", dropna=False)
    ax = _axes(ax, (WIDTH * 0.75, 1.6 + 0.6 * len(table)))
    values = table.to_numpy(dtype=float)
    drawn = ax.imshow(values, cmap="cividis", aspect="auto", vmin=0, vmax=1)
    ax.set_xticks(range(len(table.columns)), [f"{v:g}" for v in table.columns])
    ax.set_yticks(range(len(table.index)), [f"{v:g}" for v in table.index])
    _write_cells(ax, values, "{:.3f}", light_below=0.6)
    ax.figure.colorbar(drawn, ax=ax, label=value)
    ax.set(xlabel=x, ylabel=y, title=f"Search: best {value}")
    return ax


def _write_cells(ax: Axes, values: np.ndarray, text: str, light_below: float) -> None:
    for (i, j), value in np.ndenumerate(values):
        color = "white" if np.isnan(value) or value < light_below else "black"
        shown = "-" if np.isnan(value) else text.format(value)
        ax.annotate(shown, (j, i), ha="center", va="center", color=color, fontsize="small")


def plot_confusion(confusion: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the confusion matrix of `confusion.csv`: counts, coloured by share of the row."""
    counts = confusion.set_index("(truth)")
    ax = _axes(ax, (WIDTH * 0.6, 1.6 + 0.55 * len(counts)))
    values = counts.to_numpy(dtype=float)
    shares = values / np.maximum(values.sum(axis=1, keepdims=True), 1)
    ax.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (i, j), count in np.ndenumerate(values):
        nothing = i == values.shape[0] - 1 and j == values.shape[1] - 1  # background, not detected
        ax.annotate("" if nothing else f"{count:.0f}", (j, i), ha="center", va="center",
                    fontsize="small", color="black" if shares[i, j] > 0.6 else "white")  # fmt: skip
    ax.set_xticks(range(values.shape[1]), counts.columns, rotation=30, ha="right")
    ax.set_yticks(range(values.shape[0]), counts.index)
    ax.set(xlabel="detected as", ylabel="truth", title="Confusion on the test ground")
    return ax


def plot_precision_recall(
    curve: pd.DataFrame, values: Mapping[str, float], ax: Axes | None = None
) -> Axes:
    """Draw precision over recall, and mark the threshold that validation chose.

    Args:
        curve: `curve.csv` of a trial.
        values: The trial's values: `box_precision, box_recall, box_f1, score_threshold, AP50`.
        ax: Where to draw; None makes a figure.
    """
    ax = _axes(ax, (WIDTH * 0.6, WIDTH * 0.5))
    ax.plot(curve["recall"], curve["precision"], color=COLORS[5])
    label = f"score >= {values['score_threshold']:.2f}: F1 {values['box_f1']:.3f}"
    ax.plot(values["box_recall"], values["box_precision"], "o", color=COLORS[4], label=label)
    for f1 in (0.5, 0.7, 0.8, 0.9):
        recall = np.linspace(f1 / (2 - f1) + 1e-6, 1, 100)
        ax.plot(recall, f1 * recall / (2 * recall - f1), color="0.8", linewidth=0.8, zorder=0)
        ax.annotate(f"F1 {f1}", (1, f1 / (2 - f1)), fontsize="x-small", color="0.5", ha="right")
    ax.set(xlim=(0, 1.01), ylim=(0, 1.01), xlabel="recall", ylabel="precision")
    ax.set_title(f"Precision and recall on the test ground (AP50 {values['AP50']:.3f})")
    ax.legend(fontsize="small", loc="lower left")
    return ax


def plot_density(
    detections: pd.DataFrame,
    blocks: pd.DataFrame,
    raster: str,
    cell: int = 64,
    ax: Axes | None = None,
) -> Axes:
    """Draw how many detections lie in each cell of a raster's test ground.

    Args:
        detections: `detections.csv` of a trial, without those below the threshold.
        blocks: Ground blocks; ground that is not test stays blank.
        raster: Identifier of the raster.
        cell: About the side of the cells in px; each block is cut into equal ones.
        ax: Where to draw; None makes a figure.
    """
    ground = blocks[blocks["raster"] == raster]
    width, height = (ground["x"] + ground["width"]).max(), (ground["y"] + ground["height"]).max()
    mine = detections[detections["raster"] == raster]
    counts = []
    for b in ground[ground["split"] == "test"].itertuples():
        edges_x = np.linspace(b.x, b.x + b.width, max(1, round(b.width / cell)) + 1)
        edges_y = np.linspace(b.y, b.y + b.height, max(1, round(b.height / cell)) + 1)
        inside = mine[mine["block"] == b.block]
        found, _, _ = np.histogram2d(inside["pixel_y"], inside["pixel_x"], bins=(edges_y, edges_x))
        counts.append((found, (b.x, b.x + b.width, b.y + b.height, b.y)))
    ax = _axes(ax, (WIDTH * 0.75, WIDTH * 0.6))
    most = max([1.0, *(found.max() for found, _ in counts)])
    for found, extent in counts:
        drawn = ax.imshow(found, cmap="cividis", extent=extent, vmin=0, vmax=most)
    if counts:
        ax.figure.colorbar(drawn, ax=ax, label=f"detections per cell of about {cell} px")
    ax.set(xlabel="x (px)", ylabel="y (px)", facecolor="0.9", xlim=(0, width), ylim=(height, 0),
           title=f"Density of detections on the test ground of {raster}")  # fmt: skip
    return ax


def plot_detections(
    image: ImageData,
    detections: pd.DataFrame,
    objects: pd.DataFrame,
    block: pd.Series,
    max_side: int = 512,
) -> Figure:
    """Draw a block of test ground twice: with its objects, and with what was detected there.

    Args:
        image: The annotated raster.
        detections: `detections.csv` of a trial, without those below the threshold.
        objects: `objects.csv` of the trial.
        block: The row of the block in the ground blocks.
        max_side: Px of the block to show at most; the middle of a larger one is.
    """
    width, height = min(block["width"], max_side), min(block["height"], max_side)
    x, y = (int(block[k] + (block[s] - side) // 2)
            for k, s, side in (("x", "width", width), ("y", "height", height)))  # fmt: skip
    window = Window(x, y, int(width), int(height))
    found, truth = (
        df[(df["block"] == block["block"])
           & ((df["xmin"] + df["xmax"]) / 2).between(x, x + width)
           & ((df["ymin"] + df["ymax"]) / 2).between(y, y + height)]
        for df in (detections, objects)
    )  # fmt: skip
    missed = truth["counted"] & ~truth["object"].isin(
        detections["found"][detections["block"] == block["block"]]
    )
    spurious = found["found"] == -1

    figure, axes = plt.subplots(
        1, 2, figsize=(WIDTH, WIDTH / 2 + 0.9), sharex=True, sharey=True, layout="constrained"
    )
    colors = label_colors([*truth["label"], *found["label"]])
    sides = (("truth", truth, missed, "missed"), ("detections", found, spurious, "spurious"))
    for ax, (title, df, wrong, word) in zip(axes, sides, strict=True):
        show_window(ax, image.raster, window)
        _draw_labelled(ax, df[~wrong], colors)
        _draw_labelled(ax, df[wrong], colors, linestyles="--", linewidths=1.6)
        ax.set_title(f"{title}: {len(df)}, {wrong.sum()} of them {word}", fontsize="medium")
    handles = [Line2D([], [], color=color, label=label) for label, color in colors.items()]
    handles.append(Line2D([], [], color="0.5", linestyle="--", label="missed or spurious"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.suptitle(f"{image.image_identifier}, test block {block['block']}", fontsize="medium")
    return figure


def plot_errors(
    errors: pd.DataFrame,
    rasters: Mapping[str, fileio.Raster],
    kind: str | None = None,
    count: int | None = None,
    columns: int = 6,
    objects: pd.DataFrame | None = None,
) -> Figure:
    """Draw the first errors of each kind as cut-outs of their rasters, a contact sheet.

    Only the cut-outs are read. Each is stretched on its own; ground beyond the raster is black.

    Args:
        errors: See `atlas.classify_errors`; shown in this order, there by falling confidence.
        rasters: Identifier -> raster.
        kind: The kind to show; None shows all.
        count: Cut-outs of a kind; None shows one row of each kind, or five of the one.
        columns: Cut-outs in a row.
        objects: `objects.csv` of the trial; those around an error are then drawn dotted.
    """
    kinds = [k for k in errors["kind"].unique() if kind in (None, k)]
    count = count or columns * (1 if kind is None else 5)
    shown = {k: errors[errors["kind"] == k].head(count) for k in kinds}
    rows = {k: -(-len(mine) // columns) for k, mine in shown.items()}
    slots = columns * max(sum(rows.values()), 1)
    figure, axes = _grid(slots, columns, WIDTH / columns, caption=0.45)
    figure.get_layout_engine().set(h_pad=0.08)  # inches, between the captions of two rows
    for ax in axes:
        ax.axis("off")
    for k, mine in shown.items():
        place, axes = axes[: columns * rows[k]], axes[columns * rows[k] :]
        for ax, error in zip(place, mine.itertuples(), strict=False):
            _draw_error(ax, error, rasters[error.raster], objects)
    handles = [
        Line2D([], [], color=TRUTH_COLOR, label="truth"),
        Line2D([], [], color=DETECTION_COLOR, linestyle="--", label="detection"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    counts = [f"{len(mine)} of {(errors['kind'] == k).sum()} {k}" for k, mine in shown.items()]
    figure.suptitle(", ".join(counts) or "no errors", fontsize="medium")
    return figure


def _draw_error(
    ax: Axes, error: NamedTuple, raster: fileio.Raster, objects: pd.DataFrame | None
) -> None:
    box = np.array([getattr(error, name) for name in BOX_COLUMNS])
    truth = np.array([getattr(error, f"true_{name}") for name in BOX_COLUMNS])
    low, high = np.fmin(box, truth)[:2], np.fmax(box, truth)[2:]
    side = int(np.ceil(max(LEAST_CUTOUT, CONTEXT * (high - low).max())))
    x, y = np.floor((low + high - side) / 2).astype(int).tolist()
    show_window(ax, raster, Window(x, y, side, side))
    if objects is not None:
        near = objects[(objects["raster"] == error.raster) & objects["counted"]]
        near = near[near["xmin"].lt(x + side) & near["xmax"].gt(x)
                    & near["ymin"].lt(y + side) & near["ymax"].gt(y)]  # fmt: skip
        _draw_boxes(ax, near[BOX_COLUMNS], TRUTH_COLOR, linestyles=":")
    if np.isfinite(truth).all():
        _draw_boxes(ax, truth, TRUTH_COLOR, linewidths=1.5)
    if error.kind != "missed":
        _draw_boxes(ax, box, DETECTION_COLOR, linestyles="--", linewidths=1.5)
    known = error.kind == "spurious" or error.label == error.true_label
    seen = "never seen" if np.isnan(error.score) else f"{error.score:.2f}, IoU {error.iou:.2f}"
    label = str(error.label) if known else f"{error.label}, is {error.true_label}"
    ax.set_title("\n".join(map(_shorten, [f"{error.kind} {seen}", label])), fontsize="x-small")
    ax.axis("on")
    ax.set(xticks=[], yticks=[], ylabel="")
    ax.set_xlabel(
        _shorten(f"{error.pixel_x:.0f}, {error.pixel_y:.0f} {error.raster}"), fontsize="xx-small"
    )


def _shorten(line: str) -> str:
    return line if len(line) <= CAPTION else f"{line[: CAPTION - 1]}…"


def plot_catalogue(raster: fileio.Raster, catalogue: pd.DataFrame, max_side: int = 512) -> Figure:
    """Draw a raster's catalogue: where it is densest, and how its objects spread over all of it.

    Args:
        raster: The raster.
        catalogue: `pixel_x, pixel_y, label` and boxes in px of the raster.
        max_side: Px of the window that is shown in detail.
    """
    width, height = raster.width, raster.height
    cell = max(max_side // 4, max(width, height) // 128)
    edges = [np.arange(0, side + cell, cell) for side in (height, width)]
    counts, _, _ = np.histogram2d(catalogue["pixel_y"], catalogue["pixel_x"], bins=edges)
    row, col = np.unravel_index(counts.argmax(), counts.shape)
    x, y = (
        int(np.clip((i + 0.5) * cell - max_side / 2, 0, max(side - max_side, 0)))
        for i, side in ((col, width), (row, height))
    )
    window = Window(x, y, min(max_side, width), min(max_side, height))
    figure, (detail, overview) = plt.subplots(
        1, 2, figsize=(WIDTH, WIDTH / 2 + 0.6), layout="constrained"
    )
    inside = catalogue["pixel_x"].between(x, x + window.width)
    inside &= catalogue["pixel_y"].between(y, y + window.height)
    show_window(detail, raster, window)
    colors = label_colors(catalogue["label"])
    _draw_labelled(detail, catalogue[inside], colors)
    detail.set_title(
        f"the densest window: {inside.sum()} of {len(catalogue)} objects", fontsize="medium"
    )
    drawn = overview.imshow(
        counts, cmap="cividis", extent=(0, edges[1][-1], edges[0][-1], 0), vmin=0,
    )  # fmt: skip
    figure.colorbar(drawn, ax=overview, label=f"objects per cell of {cell} px", shrink=0.8)
    overview.add_patch(Rectangle((x, y), window.width, window.height, fill=False, color="white"))
    overview.set(xlim=(0, width), ylim=(height, 0), xlabel="x (px)", ylabel="y (px)")
    overview.set_title("all of it", fontsize="medium")
    handles = [Line2D([], [], color=color, label=label) for label, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=max(len(handles), 1))
    figure.suptitle(raster.path.name, fontsize="medium")
    return figure
