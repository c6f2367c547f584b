"""Every picture. Functions draw into Axes and return them; none calls `plt.show()`.

Colours are those of Okabe and Ito, which colour-blind people tell apart; labels beyond them share a
gray. Boxes are line collections, which draw a thousand at once; more than `MANY` are dots. A table
without rows makes a picture that says so.
"""

from __future__ import annotations

import io
import logging
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import shapely
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rasterio.enums import ColorInterp

import fileio
import imutils
import tiling
from explore import explore as explore  # with the other pictures
from explore import outlines, preview
from ImageData import BOX_COLUMNS, IGNORE, ImageData, InputError, Window
from imutils import (
    BACKGROUND_NAME,
    COLORS,
    DETECTION_COLOR,
    OTHER,
    TRUTH_COLOR,
    class_colors,
    label_colors,
)  # fmt: skip
from mapview import map_view as map_view
from ModelConfig import HYPERPARAMETERS
from review import review as review

if TYPE_CHECKING:
    from IPython.display import DisplayHandle

    from datasets import TileDataset
    from splits import Balance

log = logging.getLogger(__name__)

SPLIT_COLORS = {"train": "#0072B2", "validation": "#E69F00", "test": "#009E73"}
MAX_SIDE = 1024  # px; larger views are read decimated
MANY = 3000  # boxes of a picture, from which on they are dots
MAX_LABELS = 25  # bars of labels; the rarer ones share one
MAX_BANDS = 8  # of a picture of bands
MAX_BINS = 256  # of a histogram of values
LOOK = 1.0  # s between two looks at a training's record
REST = 20  # times as long as a look took, at least, before the next one
WIDTH = 9.0  # inches, a notebook's cell
CONTEXT = 3.0  # side of an error's cut-out, in sides of what it shows
LEAST_CUTOUT = 32  # px
CAPTION = 28  # letters of a caption's line
MOST_TICKS = 6  # values of a hyperparameter, above which they are taken for a range
HEAT = "inferno"  # colours of probabilities
OVERLAY = 0.5  # of a class map over its raster
EDGE = 2  # px, of a region of a class, where it meets others
UNKNOWN = (255, 255, 255, 170)  # over ground that does not count
PANORAMA = 3  # times as wide as high, from which on pictures lie below each other
PLACE = 24  # letters of a raster's name below a picture


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
            plt.rcParams["figure.max_open_warning"] = 0  # figures that zoom stay open on purpose
        except Exception as error:
            log.warning("no interactive figures (%s): pip install ipympl; showing pictures", error)
        else:
            return True
    shell.run_line_magic("matplotlib", "inline")
    return False


def _axes(ax: Axes | None, size: tuple[float, float] = (WIDTH, 4.0)) -> Axes:
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def _count_bar(ax: Axes, drawn: AxesImage, label: str) -> None:
    """Add a scale of counts, as tall as the map, whatever its shape."""
    cax = ax.inset_axes((1.03, 0, 0.04, 1))
    ax.figure.colorbar(drawn, cax=cax, label=label, ticks=MaxNLocator(integer=True))


def _grid(count: int, columns: int, side: float, caption: float = 0.0) -> tuple[Figure, list[Axes]]:
    rows = -(-max(count, 1) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(side * columns, (side + caption) * rows + 0.3), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for ax in axes.flat[count:]:
        ax.axis("off")
    return figure, list(axes.flat[:count])


def _cut(text: object, most: int = CAPTION) -> str:
    return imutils.shorten(text, most)


def _say(ax: Axes, message: str) -> Axes:
    """Write into an empty picture why it is empty."""
    ax.text(0.5, 0.5, message, transform=ax.transAxes, ha="center", va="center", color="0.4")
    return ax


def _named(colors: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the entries of a legend: what it says, and the labels that are meant."""
    other = [label for label, color in colors.items() if color == OTHER]
    entries = {label: [label] for label in colors if label not in other}
    return entries | ({f"{len(other)} other labels": other} if other else {})


def _handles(colors: Mapping[str, str], counts: Mapping[str, int] | None = None) -> list[Line2D]:
    handles = []
    for name, labels in _named(colors).items():
        count = "" if counts is None else f" ({sum(counts[label] for label in labels):,})"
        handles.append(Line2D([], [], color=colors[labels[0]], label=_cut(name) + count))
    return handles


def _draw_boxes(
    ax: Axes, boxes_xyxy: np.ndarray, colors: Sequence[str] | str, **style: object
) -> None:
    lines = outlines(np.asarray(boxes_xyxy, dtype=float).reshape(-1, 4))
    style = {"linewidths": 1.0} | style
    ax.add_collection(LineCollection(list(lines), colors=colors, **style), autolim=False)


def _draw_labelled(ax: Axes, df: pd.DataFrame, colors: Mapping[str, str], **style: object) -> None:
    boxes, painted = df[BOX_COLUMNS].to_numpy(), [colors[label] for label in df["label"]]
    if len(df) > MANY:
        x, y = ((boxes[:, i] + boxes[:, i + 2]) / 2 for i in (0, 1))
        ax.scatter(x, y, s=2, c=painted, linewidths=0, rasterized=True)
    else:
        _draw_boxes(ax, boxes, painted, **{"linewidths": 1.0 if len(df) < 300 else 0.7} | style)


def _patches(colors: Mapping[str, str]) -> list[Patch]:
    return [
        Patch(facecolor=color, edgecolor="0.3", linewidth=0.5, label=_cut(name))
        for name, color in colors.items()
    ]


def _columns(figure: Figure, handles: Sequence) -> int:
    """Return how many entries of a legend fit side by side into a figure."""
    longest = max((len(h.get_label()) for h in handles), default=0)
    wide = 0.6 + 0.075 * longest  # inches: a line, its gap, and small letters
    return max(1, min(len(handles), int(figure.get_figwidth() / wide)))


def _legend_above(ax: Axes, handles: Sequence, title: str) -> None:
    """Put a legend between an Axes and its title."""
    columns = _columns(ax.figure, handles)
    ax.legend(handles=handles, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0),
              ncols=columns, frameon=False)  # fmt: skip
    ax.set_title(title, pad=10 + 16 * -(-len(handles) // columns))


def _legend_below(figure: Figure, handles: Sequence) -> None:
    figure.legend(handles=handles, fontsize="small", loc="outside lower center",
                  ncols=_columns(figure, handles), frameon=False)  # fmt: skip


def show_window(
    ax: Axes, raster: fileio.Raster, window: Window | None = None, *, gray: bool = False
) -> None:
    """Draw a window of a raster, or all of it decimated, in px; perhaps in pale gray."""
    whole = Window(0, 0, raster.width, raster.height)
    window = window or whole
    if window == whole:
        image, valid = preview(raster, MAX_SIDE)
    else:
        image = raster.read(window)
        valid = raster.read_valid(window, image)
    image = image.mean(axis=0, keepdims=True) if gray else image
    extent = (window.x, window.x + window.width, window.y + window.height, window.y)
    ax.imshow(
        imutils.preview_stretch(image, valid, light=raster.light),
        cmap="gray", extent=extent, interpolation="nearest",
        vmin=-150 if gray else 0, vmax=255,  # a gray one is a background, on which colours show
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
    if window is not None:
        low, high = (annotations[k].to_numpy() for k in (BOX_COLUMNS[:2], BOX_COLUMNS[2:]))
        end = [window.x + window.width, window.y + window.height]
        annotations = annotations[(low < end).all(axis=1) & (high > window[:2]).all(axis=1)]
    colors = label_colors(annotations["label"])
    _draw_labelled(ax, annotations, colors)
    _legend_above(
        ax, _handles(colors, annotations["label"].value_counts()),
        f"{_cut(raster.path.name)}: {len(annotations):,} objects, "
        f"{raster.width} x {raster.height} px",
    )  # fmt: skip
    return ax


def plot_diameters(
    images: Sequence[ImageData],
    patch_sizes: Sequence[int] = (),
    anchors: Sequence[float] = (),
    ax: Axes | None = None,
) -> Axes:
    """Draw how diameters are distributed per label, beside the tiles and anchors they have to fit.

    Args:
        images: The annotated rasters.
        patch_sizes: Sides of tiles, px.
        anchors: Sides of anchors, px.
        ax: Where to draw; None makes a figure.
    """
    ax = _axes(ax)
    df = pd.concat([image.df for image in images])
    ax.set(xscale="log", xlabel="diameter (px)", ylabel="objects")
    if df.empty:
        ax.set_title("Object diameters")
        return _say(ax, "no objects")
    smallest, largest = max(df["diameter"].min(), 0.5), df["diameter"].max()
    count = int(np.clip(1.5 * np.sqrt(len(df)), 10, 40))
    bins = np.geomspace(smallest * 0.95, largest * 1.05, count + 1)
    colors = label_colors(df["label"])
    for labels in _named(colors).values():
        mine = df.loc[df["label"].isin(labels), "diameter"]
        ax.hist(mine, bins, histtype="step", color=colors[labels[0]], linewidth=1.6)
    handles = _handles(colors, df["label"].value_counts())
    if len(patch_sizes):
        for size in patch_sizes:
            ax.axvline(size, color="black", linestyle=":", linewidth=1.2)
        label = f"tiles of {', '.join(map(str, patch_sizes))} px"
        handles.append(Line2D([], [], color="black", linestyle=":", label=label))
    if len(anchors):
        # on the axis itself: where the network has something to start from
        label = f"anchors of {min(anchors):.3g} to {max(anchors):.3g} px"
        handles += ax.plot(
            anchors, np.zeros(len(anchors)), "^", color="black", markersize=7, clip_on=False,
            transform=ax.get_xaxis_transform(), label=label, zorder=3,
        )  # fmt: skip
    low, high = min([bins[0], *anchors]), max([bins[-1], *patch_sizes, *anchors])
    _plain_log_ticks(ax, low, high)
    ax.set(xlim=(low / 1.1, high * 1.1))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_above(ax, handles, f"Diameters of {len(df):,} objects")
    return ax


def _plain_log_ticks(ax: Axes, low: float, high: float) -> None:
    steps = [m * 10.0**e for e in range(-6, 9) for m in (1, 2, 5)]
    steps = steps if high / low < 300 else steps[::3]
    ticks = [t for t in steps if low <= t <= high]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()


def plot_common_labels(labels: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw how many objects each label has, and which labels become "Unknown".

    Args:
        labels: `label, objects, common` of all labels, the most frequent first, as `labels.csv` of
            the cleaning has them.
        ax: Where to draw; None makes a figure.
    """
    shown, rest = labels.head(MAX_LABELS), labels[MAX_LABELS:]
    bars = [
        (_cut(row.label), row.objects, COLORS[5] if row.common else OTHER)
        for row in shown.itertuples()
    ]
    if len(rest):
        bars.append((f"{len(rest)} rarer labels", rest["objects"].sum(), OTHER))
    merged = labels[~labels["common"].astype(bool)]
    if len(merged):
        bars.append(("after: Unknown", merged["objects"].sum(), COLORS[4]))
    ax = _axes(ax, (WIDTH, 1.2 + 0.3 * len(bars)))
    ax.set(xlabel="objects")
    if not bars:
        ax.set_title("Labels")
        return _say(ax, "no labels")
    names, counts, colors = zip(*bars, strict=True)
    _write_bars(ax, names, [counts], [colors])
    handles = [Rectangle((0, 0), 1, 1, color=COLORS[5], label="kept")]
    if len(merged):
        handles += [
            Rectangle((0, 0), 1, 1, color=OTHER, label='becomes "Unknown"'),
            Rectangle((0, 0), 1, 1, color=COLORS[4], label='"Unknown" afterwards'),
        ]
    kept = labels["common"].sum()
    _legend_above(ax, handles, f"Labels: {len(labels)} before, {kept + bool(len(merged))} after")
    return ax


def _write_bars(
    ax: Axes, names: Sequence[str], parts: Sequence[Sequence[float]], colors: Sequence
) -> None:
    """Draw stacked horizontal bars, the first name on top, with their totals."""
    left = np.zeros(len(names))
    for values, color in zip(parts, colors, strict=True):
        ax.barh(range(len(names)), values, left=left, color=color)
        left += np.asarray(values)
    for i, total in enumerate(left):
        ax.annotate(f" {total:,.0f}", (total, i), va="center", fontsize="small")
    ax.set_yticks(range(len(names)), names)
    ax.set(xlim=(0, max(left.max(), 1) * 1.12), ylim=(len(names) - 0.5, -0.5))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_label_counts(counts: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the objects per label and split, a frame as `splits.check_labels` returns it."""
    ax = _axes(ax, (WIDTH, 1.2 + 0.35 * len(counts)))
    ax.set(xlabel="objects")
    if counts.empty:
        ax.set_title("Objects per label and split")
        return _say(ax, "no objects")
    counts = counts.loc[counts.sum(axis=1).sort_values(ascending=False, kind="stable").index]
    names = [_cut(label) for label in counts.index]
    _write_bars(ax, names, [counts[split] for split in SPLIT_COLORS], SPLIT_COLORS.values())
    handles = [
        Rectangle((0, 0), 1, 1, color=color, label=f"{split} ({counts[split].sum():,})")
        for split, color in SPLIT_COLORS.items()
    ]
    _legend_above(ax, handles, "Objects per label and split")
    return ax


def plot_class_balance(found: Balance, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """Draw the class shares of training tiles, of all and of those kept, and the trade-off.

    Args:
        found: What `splits.balance` found, or `splits.preview` told, which has no trade-off.
        axes: Where to draw shares, and the trade-off; None makes a figure.

    Returns:
        The Axes, one or two.
    """
    shares, curve = found.shares, found.curve
    if axes is None:
        count, height = (1 if curve is None else 2), 1.6 + 0.45 * min(len(shares), MAX_LABELS)
        _, axes = plt.subplots(
            1, count, figsize=(WIDTH, max(height, 3.2)), layout="constrained", squeeze=False
        )
        axes = axes[0]
    shown, ax = shares.head(MAX_LABELS), axes[0]
    rows = np.arange(len(shown))
    kept = f"{found.kept:,} tiles kept"
    for column, shift, color, name in (
        ("percent", -0.2, OTHER, f"all {found.tiles:,} tiles"),
        ("kept_percent", 0.2, COLORS[5], kept),
    ):
        ax.barh(rows + shift, shown[column], height=0.38, color=color, label=name)
        for row, value in zip(rows, shown[column], strict=True):
            ax.annotate(f" {value:.3g}", (value, row + shift), va="center", fontsize="small")
    even, most = 100 / len(shares), shown[["percent", "kept_percent"]].max(axis=None)
    ax.axvline(even, color="0.4", linestyle=":", linewidth=1, label="even")
    ax.set_yticks(rows, [_cut(name) for name in shown["name"]])
    ax.set(xlabel="% of the labelled pixels", xlim=(0, most * 1.15), ylim=(len(shown) - 0.5, -0.5))
    more = f", {len(shares) - len(shown)} more" if len(shares) > len(shown) else ""
    ax.set_title(f"Class shares{more}")
    ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside lower left", ncols=3)
    if curve is not None and len(axes) > 1:
        ax = axes[1]
        ax.plot(curve["kept_percent"], curve["std"], color=COLORS[5], drawstyle="steps-post")
        place = 100 * found.kept / found.tiles, found.kept_std
        ax.plot(*place, "o", color=COLORS[4], label=kept)
        # the curve rises to the right, so that this corner is empty
        ax.text(
            0.97, 0.04, _thresholds(found), transform=ax.transAxes, fontsize="small", va="bottom",
            ha="right", color=COLORS[4],
        )  # fmt: skip
        ax.set(xlabel="% of the tiles kept", ylabel="std of the class shares, %")
        ax.set(xlim=(0, 102), ylim=(0, curve["std"].max() * 1.08 + 1e-9))
        ax.set_title(f"Balance against tiles kept, steps of {found.step:g} %")
    return axes


def _thresholds(found: Balance) -> str:
    """Write the thresholds that were found, one a line."""
    names = found.shares["name"]
    lines = [f"min_annotated {found.min_annotated:g} %"] if found.min_annotated else []
    lines += [f"{_cut(names[i])} {least:g} %" for i, least in found.class_proportion.items()]
    return "\n".join(lines) or "no threshold"


def plot_split_map(image: ImageData, blocks: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw which ground of a raster trains, validates and tests, and where its objects are."""
    ax = _axes(ax, (WIDTH, WIDTH * 0.75))
    mine = _draw_split(ax, image, blocks)
    title = f"Ground of {_cut(image.image_identifier)} (blocks per split)"
    _legend_above(ax, _split_handles(mine, len(image.df)), title)
    return ax


def plot_split_maps(
    images: Sequence[ImageData], blocks: pd.DataFrame, count: int = 12, columns: int = 3
) -> Figure:
    """Draw the first rasters of a run as `plot_split_map` does, side by side."""
    shown = images[:count]
    columns = min(columns, len(shown))
    figure, axes = _grid(len(shown), columns, WIDTH / columns)
    drawn = []
    for ax, image in zip(axes, shown, strict=True):
        drawn.append(_draw_split(ax, image, blocks))
        ax.set(xlabel="", ylabel="")
        ax.set_title(_cut(image.image_identifier), fontsize="small")
        ax.tick_params(labelsize="small")
    _legend_below(figure, _split_handles(pd.concat(drawn), sum(len(i.df) for i in shown)))
    more = f", the first {len(shown)} of {len(images)} rasters" if len(images) > count else ""
    figure.suptitle(f"Ground in px of each raster (blocks per split){more}", fontsize="medium")
    return figure


def _draw_split(ax: Axes, image: ImageData, blocks: pd.DataFrame) -> pd.DataFrame:
    show_window(ax, image.raster, gray=True)
    mine = blocks[blocks["raster"] == image.image_identifier]
    for b in mine.itertuples():
        color = SPLIT_COLORS.get(b.split, OTHER)  # unused ground
        ax.add_patch(Rectangle((b.x, b.y), b.width, b.height, facecolor=color, alpha=0.35))
        ax.add_patch(
            Rectangle((b.x, b.y), b.width, b.height, edgecolor="white", linewidth=1.2, fill=False)
        )
    side = 3 if len(image.df) < 500 else 1.5 if len(image.df) < MANY else 1
    ax.plot(image.df["pixel_x"], image.df["pixel_y"], "o", color="white", markersize=side,
            markeredgecolor="black", markeredgewidth=0.4, rasterized=True)  # fmt: skip
    return mine


def _split_handles(blocks: pd.DataFrame, objects: int) -> list:
    counts = blocks["split"].value_counts()
    handles = [
        Rectangle((0, 0), 1, 1, color=color, label=f"{split} ({counts.get(split, 0)})")
        for split, color in (SPLIT_COLORS | {"unused": OTHER}).items()
        if split in SPLIT_COLORS or split in counts
    ]
    dot = Line2D([], [], marker="o", color="white", markeredgecolor="black", linestyle="",
                 label=f"object ({objects:,})")  # fmt: skip
    return [*handles, dot]


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
    figure, axes = _grid(len(shown), min(columns, max(len(shown), 1)), WIDTH / columns)
    for ax, tile in zip(axes, shown.itertuples(), strict=True):
        _draw_tile(ax, tile, boxes, rasters, colors)
        ax.set_title(f"window {tile.window}, {tile.angle}°", fontsize="small")
    if shown.empty:
        _say(figure.axes[0], "no training tiles")
    _legend_of_tiles(figure, colors)
    figure.suptitle("Training tiles in their turns", fontsize="medium")
    return figure


def plot_tile_mosaic(
    tiles: pd.DataFrame,
    boxes: pd.DataFrame,
    rasters: Mapping[str, fileio.Raster],
    block: int | None = None,
    most: int = 5,
) -> Figure:
    """Draw the tiles of a block of ground side by side, as they lie, with the objects they own.

    Tiles that overlap show the same ground more than once. Those that are left out are pale, with
    the reason.

    Args:
        tiles: Tile index of one size, see `tiling.read_tiles`.
        boxes: The boxes of it.
        rasters: Identifier -> raster.
        block: Number of the block; None: the one with most objects in its tiles.
        most: Rows and columns at most; of a larger block, those at its upper left.
    """
    upright = tiles[tiles["angle"] == 0]
    if block is None and len(upright):
        block = upright.groupby("block")["objects"].sum().idxmax()
    mine = upright[upright["block"] == block]
    mine = mine[(mine["row"] - mine["row"].min() < most) & (mine["col"] - mine["col"].min() < most)]
    rows, cols = (mine[k].rank(method="dense").astype(int) - 1 for k in ("row", "col"))
    shape = (int(rows.max()) + 1, int(cols.max()) + 1) if len(mine) else (1, 1)
    side = min(WIDTH / shape[1], WIDTH / 4)
    figure, axes = plt.subplots(
        *shape, figsize=(side * shape[1], side * shape[0] + 0.9), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
    colors = label_colors(boxes["label"])
    for ax in axes.flat:
        ax.axis("off")
    for row, col, tile in zip(rows, cols, mine.itertuples(), strict=True):
        ax = axes[row, col]
        ax.axis("on")
        _draw_tile(ax, tile, boxes, rasters, colors)
        if not tile.kept:
            ax.images[0].set_alpha(0.35)
            ax.text(0.5, 0.5, "\n".join(str(tile.reason).split(": ")), transform=ax.transAxes,
                    ha="center", va="center", fontsize="small",
                    bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none"})  # fmt: skip
    if mine.empty:
        _say(axes[0, 0], "no tiles")
        figure.suptitle("Tiles", fontsize="medium")
        return figure
    _legend_of_tiles(figure, colors)
    first = mine.iloc[0]
    figure.suptitle(
        f"{len(mine)} tiles of {first['width']} px, {mine['kept'].sum()} kept, of block {block} "
        f"({first['split']}) of {_cut(first['raster'])}",
        fontsize="medium",
    )
    return figure


def plot_augmentations(
    dataset: TileDataset, labels: Sequence[str], count: int = 4, views: int = 5, seed: int = 0
) -> Figure:
    """Draw training tiles as they lie, and beside each some of the random views of it.

    All pictures of a row share one stretch, so that changes of colour show. Boxes have the colours
    of their labels; of a segmentation, edges of regions have those of their classes. Ground that
    does not count is pale.

    Args:
        dataset: Training tiles; those with most objects are drawn, or whose classes mix most.
        labels: Names, by class id.
        count: Tiles.
        views: Of each tile.
        seed: Of the first view; others follow.
    """
    shown = _richest(dataset.tiles, count)
    masked = bool(tiling.counts_of(dataset.tiles).shape[1])
    colors = class_colors(labels) if masked else [label_colors(labels)[label] for label in labels]
    figure, axes = _grid(len(shown) * (views + 1), views + 1, WIDTH / (views + 1))
    for row, tile in enumerate(shown):
        drawn = axes[row * (views + 1) : (row + 1) * (views + 1)]
        seeds = range(seed + row * views, seed + (row + 1) * views)
        items = [dataset[tile], *(dataset[tile, number] for number in seeds)]
        # crops may be smaller than the tile
        values = np.hstack([image.numpy().reshape(len(image), -1) for image, _ in items])[:, None]
        bounds = imutils.preview_bounds(values, np.ones(values.shape[1:], dtype=bool))
        for ax, (image, target) in zip(drawn, items, strict=True):
            side = image.shape[-1]
            everywhere = np.ones((side, side), dtype=bool)
            picture = imutils.preview_stretch(image.numpy(), everywhere, bounds)
            ax.imshow(picture, cmap="gray", vmin=0, vmax=255, extent=(0, side, side, 0))
            _draw_target(ax, {name: value.numpy() for name, value in target.items()}, colors, side)
            ax.set(xticks=[], yticks=[])
        axes[row * (views + 1)].set_ylabel(f"tile {tile}", fontsize="small")
    for view, ax in enumerate(axes[: views + 1]):
        ax.set_title(f"view {view}" if view else "as it lies", fontsize="small")
    if not shown:
        _say(figure.axes[0], "no training tiles")
    named = dict(zip(labels, colors, strict=True))
    _legend_below(figure, [*_handles(named), Patch(facecolor="0.85", label="does not count")])
    figure.suptitle("Training tiles, and what varies in each visit", fontsize="medium")
    return figure


def _richest(tiles: pd.DataFrame, count: int) -> list[int]:
    """Return rows of tiles, each window once: most objects first, or pixels of rarer classes."""
    pixels = tiling.counts_of(tiles)
    if pixels.shape[1]:
        richness = pixels.sum(axis=1) - pixels.max(axis=1)
    else:
        richness = tiles["objects"].to_numpy()
    order = tiles.iloc[np.argsort(-richness, kind="stable")]
    return order.drop_duplicates("window").index[:count].tolist()


def _draw_target(
    ax: Axes, target: Mapping[str, np.ndarray], colors: Sequence[str], side: int
) -> None:
    """Draw what lies on a tile: boxes, or edges of classes, and what does not count."""
    paint = np.zeros((side, side, 4), np.uint8)
    if "mask" in target:
        mask = target["mask"]
        near = np.pad(mask, EDGE, mode="edge")
        edge = np.zeros(mask.shape, dtype=bool)
        for shift in (0, 2 * EDGE):
            edge |= near[shift : shift + side, EDGE:-EDGE] != mask
            edge |= near[EDGE:-EDGE, shift : shift + side] != mask
        paint[edge] = _paint_table(dict(enumerate(colors)))[mask[edge]]
        paint[mask == IGNORE] = UNKNOWN
    else:
        _draw_boxes(ax, target["boxes"], [colors[label] for label in target["labels"]])
        if "counted" in target:
            paint[~target["counted"]] = UNKNOWN
    ax.imshow(paint, extent=(0, side, side, 0), interpolation="nearest")


def _draw_tile(
    ax: Axes,
    tile: NamedTuple,
    boxes: pd.DataFrame,
    rasters: Mapping[str, fileio.Raster],
    colors: Mapping[str, str],
) -> None:
    window = Window(tile.x, tile.y, tile.width, tile.height)
    raster = rasters[tile.raster]
    image, valid, _ = tiling.read_tile(raster, window, tile.angle)
    ax.imshow(imutils.preview_stretch(image, valid, light=raster.light), cmap="gray", vmin=0,
              vmax=255, extent=(0, tile.width, tile.height, 0))  # fmt: skip
    mine = boxes[boxes["window"] == tile.window]
    turned = tiling.boxes_of_tile(mine[BOX_COLUMNS].to_numpy(), tile.angle, tile.width, tile.height)
    styles = np.where(mine["owned"], "-", ":")
    _draw_boxes(ax, turned, [colors[label] for label in mine["label"]], linestyles=list(styles))
    ax.set(xticks=[], yticks=[])


def _legend_of_tiles(figure: Figure, colors: Mapping[str, str]) -> None:
    neighbour = Line2D([], [], color="0.5", linestyle=":", label="owned by a neighbour")
    _legend_below(figure, [*_handles(colors), neighbour])


def plot_stretch(
    pixels: np.ndarray, radiometry: imutils.Radiometry, bands: Sequence[int] | None = None
) -> Figure:
    """Draw for each band how raw values are distributed, and what the stretch makes of them.

    Args:
        pixels: Raw values (bands, N), N > 0, see `tiling.sample_pixels`.
        radiometry: The stretch.
        bands: Numbers of the bands, for the titles; None counts from 1.
    """
    count = min(len(pixels), MAX_BANDS)
    figure, axes = plt.subplots(
        count, 2, figsize=(WIDTH, 0.9 + 1.5 * count), squeeze=False, layout="constrained",
        sharex="col" if count > 1 else False,
    )  # fmt: skip
    stretched = radiometry.stretch(pixels[:, None])[:, 0]
    numbers = list(bands or range(1, len(pixels) + 1))
    for i, (left, right) in enumerate(axes):
        low, high = radiometry.low[i], radiometry.high[i]
        for ax, values, marks in (
            (left, pixels[i].astype(float), (low, high)),
            (right, stretched[i].astype(float), (0, 1)),
        ):
            few = np.unique(values)
            whole = pixels.dtype.kind in "ui" and ax is left and np.ptp(few) < MAX_BINS
            edges = np.arange(few[0] - 0.5, few[-1] + 1) if whole else MAX_BINS // 4
            if radiometry.options and ax is left:  # of light there are many decades
                step = radiometry.options.log_epsilon / radiometry.options.input_mul
                most = max(few[-1], 2 * step)
                edges = np.r_[min(few[0], 0), np.geomspace(step, most, MAX_BINS // 4)]
                ax.set_xscale("symlog", linthresh=step)
            ax.hist(values, edges, weights=np.full(len(values), 100 / len(values)),
                    histtype="stepfilled", color=COLORS[5])  # fmt: skip
            ax.set_yscale("log")  # the background outweighs what objects are made of
            for mark in marks:
                ax.axvline(mark, color=COLORS[4], linewidth=1.2)
        left.set_ylabel(f"band {numbers[i]}\n% of pixels")
        places = ",.0f" if abs(low) + abs(high) >= 100 else ".4g"
        left.set_title(f"{low:{places}} becomes 0, {high:{places}} becomes 1", fontsize="small")
        right.axvline(stretched[i].mean(), color="black", linestyle="--", linewidth=1)
        right.set_title(
            f"mean {stretched[i].mean():.3f}, deviation {stretched[i].std():.3f}", fontsize="small"
        )
    axes[-1, 0].set_xlabel(f"raw value ({pixels.dtype})")
    axes[-1, 1].set_xlabel("model's input")
    more = f", the first {count} of {len(pixels)} bands" if len(pixels) > count else ""
    figure.suptitle(
        f'Stretch "{radiometry.method}" of {pixels.shape[1]:,} pixels of training ground{more}',
        fontsize="medium",
    )
    return figure


@contextmanager
def live_curves(trials_dir: Path, *, active: bool = True) -> Iterator[None]:
    """Show the learning curves of the training that runs, drawn anew after each epoch.

    The training is not touched: its record is read, by a thread that rests `REST` times as long as
    it reads and draws, whichever process writes it. Those of earlier trainings are not shown.

    Args:
        trials_dir: Folder of the trials' folders.
        active: False shows nothing; so does a session without a notebook.
    """
    handle = _display_handle() if active else None
    if handle is None:
        yield
        return
    done = threading.Event()
    old = _record_times(Path(trials_dir))  # what earlier trainings wrote is not live
    watch = threading.Thread(target=_watch, args=(Path(trials_dir), handle.update, done, old))
    watch.start()
    try:
        yield
    finally:
        done.set()
        watch.join()


def _display_handle() -> DisplayHandle | None:
    try:
        from IPython import get_ipython
        from IPython.display import DisplayHandle, Markdown
    except ImportError:
        return None
    if not hasattr(get_ipython(), "kernel"):
        return None
    handle = DisplayHandle()
    handle.display(Markdown("*the first epoch*"))
    return handle


def _record_times(trials_dir: Path) -> dict[Path, int]:
    times = {}
    for path in trials_dir.glob("*/metrics.csv"):
        with suppress(OSError):  # a folder takes another name when its training ends
            times[path] = path.stat().st_mtime_ns
    return times


def _watch(
    trials_dir: Path,
    show: Callable[[object], None],
    done: threading.Event,
    old: Mapping[Path, int],
) -> None:
    from IPython.display import Image

    shown, pause, last = None, 0.0, False
    while not last:
        last = done.wait(pause)
        start = time.monotonic()
        with suppress(OSError, ValueError, KeyError):  # none yet, or half a line
            times = _record_times(trials_dir)
            path = max((p for p in times if times[p] != old.get(p)), key=times.get)
            records = pd.read_csv(path)
            epochs = path, int(records["train_loss_epoch"].notna().sum())
            if epochs != shown and epochs[1]:
                show(Image(_print_curves(records, path.parent.name)))
                shown = epochs
        pause = max(LOOK, REST * (time.monotonic() - start))


def _print_curves(records: pd.DataFrame, folder: str) -> bytes:
    """Draw the learning curves of a trial as a PNG, in any thread."""
    figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")  # pyplot has but one thread
    name = folder.removeprefix(".").partition("~")[0]  # while it runs, it is .name~worker
    plot_learning_curves(records, figure.subplots(), title=_cut(name, 80))
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def plot_learning_curves(
    records: pd.DataFrame, ax: Axes | None = None, title: str = "Learning curves"
) -> Axes:
    """Draw the losses of a training and, on the right, its validation scores, over the epochs.

    Args:
        records: `metrics.csv` of a trial.
        ax: Where to draw the losses; None makes a figure.
        title: Of the picture.
    """
    ax = _axes(ax)
    ax.set(xlabel="epoch", ylabel="loss")
    columns = {
        "train_loss_epoch": ("training loss", COLORS[5], "o-"),
        "val_loss": ("validation loss", COLORS[4], "s-"),
        "val_AP50": ("validation AP50", COLORS[2], "^--"),
        "val_box_f1": ("validation F1", COLORS[3], "v--"),
        "val_mean_IoU": ("validation mean IoU", COLORS[2], "^--"),
        "val_mean_F1": ("validation mean F1", COLORS[3], "v--"),
    }
    records = records.reindex(columns=["epoch", *columns])
    # the last validation, after the training, is of another model on other tiles
    last = records["epoch"][records["train_loss_epoch"].notna()].max()
    records = records[records["epoch"] <= last]
    if records.empty:
        ax.set_title(title)
        return _say(ax, "no epoch yet")
    right = ax.twinx()
    for column, (label, color, style) in columns.items():
        known = records.dropna(subset=[column])
        target = ax if column.endswith(("loss", "epoch")) else right
        if len(known):
            target.plot(
                known["epoch"] + 1, known[column], style, color=color, markersize=4, label=label
            )
    ax.set(ylim=(0, None))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set(ylabel="score (0 to 1)", ylim=(0, 1.02))
    _legend_above(ax, [*ax.get_lines(), *right.get_lines()], title)
    return ax


def _score_of(leaderboard: pd.DataFrame) -> str:
    """Return the test's score by which trials of a task are listed; `val_` selects."""
    return "mean_IoU" if "mean_IoU" in leaderboard else "AP50"


def plot_search_heatmap(
    leaderboard: pd.DataFrame,
    x: str | None = None,
    y: str | None = None,
    value: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the best score reached for each pair of values of two parameters.

    Args:
        leaderboard: See `gridsearch.read_leaderboard`.
        x: Column of the leaderboard that goes across; None takes the hyperparameter with the most
            values.
        y: The one that goes down; None takes the next one.
        value: The score; None takes the test's by which trials are listed.
        ax: Where to draw; None makes a figure.
    """
    value = value or _score_of(leaderboard)
    varied = sorted(HYPERPARAMETERS, key=lambda name: -leaderboard[name].nunique())
    x = x or next(name for name in varied if name != y)
    y = y or next(name for name in varied if name != x)
    known = leaderboard.dropna(subset=[value])
    table = known.pivot_table(value, y, x, aggfunc="max", dropna=False, observed=True)
    ax = _axes(ax, (WIDTH * 0.75, 1.6 + 0.6 * max(len(table), 1)))
    ax.set(xlabel=x, ylabel=y, title=f"Best {value} of {len(known)} trainings")
    if table.empty:
        return _say(ax, "no training is complete")
    values = table.to_numpy(dtype=float)
    # close scores are told apart, but not by noise alone
    middle, half = (np.nanmax(values) + np.nanmin(values)) / 2, max(np.ptp(known[value]) / 2, 0.025)
    drawn = ax.imshow(values, cmap="cividis", aspect="auto", vmin=middle - half, vmax=middle + half)
    ax.set_facecolor("0.9")
    ax.set_xticks(range(len(table.columns)), map(_short, table.columns))
    ax.set_yticks(range(len(table.index)), map(_short, table.index))
    if len(table.columns) > 8:
        ax.tick_params("x", rotation=45)
    _write_cells(ax, values, "{:.3f}", light_below=middle + 0.2 * half)
    ax.figure.colorbar(drawn, ax=ax, label=value)
    return ax


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float | int) else str(value)


def plot_importance(importances: pd.Series, ax: Axes | None = None) -> Axes:
    """Draw how much each hyperparameter decides whether a trial is good.

    Args:
        importances: See `study.importances`.
        ax: Where to draw; None makes a figure.
    """
    ax = _axes(ax, (WIDTH * 0.75, 1.2 + 0.4 * len(importances)))
    shares = importances.iloc[::-1]
    bars = ax.barh(shares.index, shares, color=COLORS[5], height=0.6)
    ax.bar_label(bars, [f"{share:.0%}" for share in shares], padding=4, fontsize="small")
    ax.set(xlim=(0, 1.08), xlabel="importance for being among the best quarter, by validation",
           title="Search: what decides")  # fmt: skip
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def plot_parallel_coordinates(leaderboard: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw every trial as a line through its hyperparameters to its validation score.

    Only hyperparameters that differ have an axis. Learning rates are spaced by their logarithm;
    lines of the same value lie side by side, the best on top. The selected trial is bold, stopped
    ones are dotted to what they had reached; failed ones are not drawn.

    Args:
        leaderboard: See `gridsearch.read_leaderboard`.
        ax: Where to draw; None makes a figure.
    """
    board = leaderboard[leaderboard["state"] != "fail"]
    pruned = (board["state"] == "pruned").to_numpy()
    selected = board["selected"].to_numpy(dtype=bool)
    by = _score_of(board)
    score = board[f"val_{by}"].to_numpy(dtype=float)
    if pruned.any():
        score = np.where(pruned, board[f"pruned_val_{by}"], score)
    names = [name for name in HYPERPARAMETERS if len(set(board[name])) > 1]
    ax = _axes(ax, (WIDTH, 4.2))
    rank = score.argsort().argsort() / max(len(score) - 1, 1)
    low, high = score.min(), max(score.max(), score.min() + 1e-6)
    columns = []
    for i, name in enumerate(names):
        values = board[name].to_numpy(dtype=float)
        shown = np.unique(values)
        places = np.log(values) if name == "learning_rate" else values
        places = (places - places.min()) / np.ptp(places)
        spread = 0.09 if len(shown) <= MOST_TICKS else 0.0
        columns.append(0.05 + 0.9 * places + spread * (rank - 0.5))
        if len(shown) > MOST_TICKS:  # a range
            shown = shown[[0, len(shown) // 2, -1]]
        for value in shown:
            place = 0.05 + 0.9 * places[values == value][0]
            box = {"boxstyle": "round,pad=0.2", "fc": "white", "ec": "none"}
            ax.annotate(f"{value:g}", (i, place), xytext=(-7, 0), textcoords="offset points",
                        ha="right", va="center", fontsize="small", zorder=4, bbox=box)  # fmt: skip
    lines = np.stack([*columns, 0.05 + 0.9 * (score - low) / (high - low)], axis=1)
    shades = Normalize(*np.quantile(score[~pruned], [0, 1]) if not pruned.all() else (low, high))
    colors = [(0.6, 0.6, 0.6, 0.9) if stopped else plt.colormaps["cividis_r"](shades(value))
              for stopped, value in zip(pruned, score, strict=True)]  # fmt: skip
    order = np.lexsort([score, selected])  # the selected one on top
    ax.add_collection(
        LineCollection(
            [np.column_stack([np.arange(lines.shape[1]), lines[k]]) for k in order],
            colors=[colors[k] for k in order],
            linewidths=[3.5 if selected[k] else 1.3 for k in order],
            linestyles=[":" if pruned[k] else "-" for k in order],
        )
    )
    for i in range(len(names) + 1):
        ax.axvline(i, color="0.35", linewidth=1, zorder=1)
    for value in np.linspace(low, high, 5):
        ax.annotate(f"{value:.3f}", (len(names), 0.05 + 0.9 * (value - low) / (high - low)),
                    xytext=(7, 0), textcoords="offset points", va="center",
                    fontsize="small")  # fmt: skip
    ax.set_xticks(range(len(names) + 1), [*names, f"validation {by.replace('_', ' ')}"])
    ax.set(xlim=(-0.35, len(names) + 0.35), ylim=(-0.02, 1.02), yticks=[],
           title="Search: every trial a line")  # fmt: skip
    ax.spines[:].set_visible(False)
    ax.tick_params(axis="x", length=0)
    kinds = [("complete", "-", 1.3, True), ("selected", "-", 3.5, selected.any()),
             ("stopped as hopeless", ":", 1.3, pruned.any())]  # fmt: skip
    handles = [Line2D([], [], color="0.3", linestyle=style, linewidth=width, label=label)
               for label, style, width, there in kinds if there]  # fmt: skip
    ax.legend(handles=handles, fontsize="small", loc="upper center", ncols=len(handles),
              bbox_to_anchor=(0.5, -0.08), frameon=False)  # fmt: skip
    return ax


def _write_cells(ax: Axes, values: np.ndarray, text: str, light_below: float) -> None:
    for (i, j), value in np.ndenumerate(values):
        color = "white" if value < light_below else "black"  # nothing is known: black on gray
        shown = "none" if np.isnan(value) else text.format(value)
        ax.annotate(shown, (j, i), ha="center", va="center", color=color, fontsize="small")


def plot_confusion(confusion: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the confusion matrix of `confusion.csv`: counts, coloured by share of the row."""
    counts = confusion.set_index("(truth)")
    values = counts.to_numpy(dtype=float)
    rows, columns = values.shape
    ax = _axes(ax, (np.clip(1.8 + 0.7 * columns, 5.4, WIDTH), 2.0 + 0.4 * rows))
    shares = values / np.maximum(values.sum(axis=1, keepdims=True), 1)
    drawn = ax.imshow(100 * shares, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    objects = counts.columns[-1] not in counts.index  # not pixels: background may go unseen
    for (i, j), count in np.ndenumerate(values):
        nothing = objects and i == rows - 1 and j == columns - 1  # background, not detected
        quiet = nothing or (columns > 12 and not count)
        ax.annotate("" if quiet else f"{count:.0f}", (j, i), ha="center", va="center",
                    fontsize="small", color="black" if shares[i, j] > 0.6 else "white")  # fmt: skip
    names = [_cut(name, 18) for name in counts.columns]
    steep = 90 if columns > 12 else 35  # degrees
    ax.set_xticks(range(columns), names, rotation=steep, ha="right", va="center",
                  rotation_mode="anchor")  # fmt: skip
    ax.set_yticks(range(rows), [_cut(name, 18) for name in counts.index])
    ax.set(xlabel="detected as", ylabel="truth", title="Confusion on the test ground")
    ax.figure.colorbar(drawn, ax=ax, label="% of the row")
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
    ax.set(xlim=(0, 1.0), ylim=(0, 1.01), xlabel="recall (0 to 1)", ylabel="precision (0 to 1)")
    title = f"Precision and recall on the test ground (AP50 {values['AP50']:.3f})"
    ax.set_title(title)
    for f1 in (0.2, 0.4, 0.6, 0.8):
        recall = np.linspace(f1 / (2 - f1) + 1e-6, 1, 100)
        ax.plot(recall, f1 * recall / (2 * recall - f1), color="0.8", linewidth=0.8, zorder=0)
        ax.annotate(f"F1 {f1}", (1.02, f1 / (2 - f1)), fontsize="small", color="0.45", va="center",
                    annotation_clip=False)  # fmt: skip
    if curve.empty:
        return _say(ax, "no detections")
    ax.plot(curve["recall"], curve["precision"], color=COLORS[5])
    label = f"score >= {values['score_threshold']:.2f}: F1 {values['box_f1']:.3f}"
    marked = ax.plot(values["box_recall"], values["box_precision"], "o", color=COLORS[4],
                     label=label, clip_on=False)  # fmt: skip
    _legend_above(ax, marked, title)
    return ax


def plot_f1_threshold(
    curve: pd.DataFrame, values: Mapping[str, float], ax: Axes | None = None
) -> Axes:
    """Draw F1, precision and recall over the score threshold, and mark the one validation chose.

    Args:
        curve: `curve.csv` of a trial.
        values: The trial's values: `score_threshold, box_f1`.
        ax: Where to draw; None makes a figure.
    """
    ax = _axes(ax, (WIDTH * 0.6, WIDTH * 0.5))
    ax.set(xlim=(0, 1), ylim=(0, 1.01), xlabel="score threshold (0 to 1)", ylabel="0 to 1")
    if curve.empty:
        ax.set_title("F1 at each threshold")
        return _say(ax, "no detections")
    for column, label, color, style in (
        ("f1", "F1", COLORS[5], "-"),
        ("precision", "precision", COLORS[2], "--"),
        ("recall", "recall", COLORS[3], ":"),
    ):
        ax.plot(curve["threshold"], curve[column], style, color=color, label=label)
    chosen = values["score_threshold"]
    ax.axvline(chosen, color=COLORS[4], linewidth=1.2, label=f"chosen: {chosen:.2f}")
    best = curve.loc[curve["f1"].idxmax()]
    title = (
        f"F1 {values['box_f1']:.3f} as chosen, {best['f1']:.3f} at best ({best['threshold']:.2f})"
    )
    _legend_above(ax, ax.get_legend_handles_labels()[0], title)
    return ax


def plot_size_frequency(
    detections: pd.DataFrame,
    objects: pd.DataFrame,
    blocks: pd.DataFrame,
    rasters: Mapping[str, fileio.Raster],
    ax: Axes | None = None,
) -> Axes:
    """Draw how many objects of a diameter or larger the test ground holds per area, and was found.

    Diameters are the longer sides of boxes, in bins that grow by the square root of 2; bars are the
    square root of the count. In metres and per km2 if all rasters have a resolution, else in px and
    per megapixel. Where curves part, detections of that size lack, or are too many: an AP does not
    tell which. The area is that of the test blocks, whether or not all of it counts.

    Args:
        detections: `detections.csv` of a trial, without those below the threshold.
        objects: `objects.csv` of the trial.
        blocks: Ground blocks.
        rasters: Identifier -> raster.
        ax: Where to draw; None makes a figure.

    References:
        Crater Analysis Techniques Working Group 1979, Icarus 37, 467-474, for bins, errors and axes
        of the cumulative plot.
    """
    ax = _axes(ax, (WIDTH * 0.75, WIDTH * 0.5))
    test = blocks[blocks["split"] == "test"]
    sides = {name: rasters[name].resolution for name in test["raster"].unique()}
    metric = bool(sides) and None not in sides.values()
    sides = sides if metric else dict.fromkeys(sides, 1.0)
    area = (test["width"] * test["height"] * test["raster"].map(sides) ** 2).sum() / 1e6
    unit, per = ("m", "km²") if metric else ("px", "megapixel")
    ax.set(xscale="log", xlabel=f"diameter ({unit})", ylabel=f"objects of it or larger per {per}")
    ax.set_yscale("log", nonpositive="clip")
    drawn = []
    for df, name, color, style in (
        (objects[objects["counted"].astype(bool)], "truth", COLORS[5], "o"),
        (detections[detections["found"] != -2], "detections", COLORS[4], "s"),
    ):
        box = df[BOX_COLUMNS].to_numpy(dtype=float)
        diameter = (box[:, 2:] - box[:, :2]).max(axis=1, initial=0)
        diameter = np.sort(diameter * df["raster"].map(sides).to_numpy(dtype=float))
        if not len(diameter):
            continue
        first, last = np.floor(2 * np.log2(diameter[[0, -1]])).astype(int)
        edges = 2.0 ** (np.arange(first, last + 1) / 2)
        count = len(diameter) - np.searchsorted(diameter, edges)
        ax.errorbar(edges, count / area, np.sqrt(count) / area, color=color, fmt=style + "-",
                    markersize=4, capsize=2, linewidth=1,
                    label=f"{name} ({len(df):,})")  # fmt: skip
        drawn += [edges[0], edges[-1]]
    title = f"Size-frequency on {area:,.3g} {per} of test ground"
    if not drawn:
        ax.set_title(title)
        return _say(ax, "no objects, no detections")
    _plain_log_ticks(ax, min(drawn), max(drawn))
    ax.grid(color="0.9")
    _legend_above(ax, ax.get_legend_handles_labels()[0], title)
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
    ax.set(xlabel="x (px)", ylabel="y (px)", facecolor="0.9", aspect="equal",
           xlim=(0, width), ylim=(height, 0))  # fmt: skip
    ax.set_title(f"{len(mine):,} detections on the test ground of {_cut(raster, PLACE)}")
    if not counts:
        return _say(ax, "no test ground on this raster")
    _count_bar(ax, drawn, f"detections per cell\n(about {cell} px)")
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
        ax.set_title(f"{title}: {len(df):,}, {wrong.sum():,} of them {word}", fontsize="medium")
    handles = _handles(colors)
    handles.append(Line2D([], [], color="0.5", linestyle="--", label="missed or spurious"))
    _legend_below(figure, handles)
    figure.suptitle(
        f"{_cut(image.image_identifier)}, test block {block['block']}", fontsize="medium"
    )
    return figure


def plot_errors(
    errors: pd.DataFrame,
    rasters: Mapping[str, fileio.Raster],
    kind: str | None = None,
    count: int | None = None,
    columns: int = 5,
    objects: pd.DataFrame | None = None,
) -> Figure:
    """Draw the first errors of each kind as cut-outs of their rasters, a contact sheet.

    Only the cut-outs are read. Each is stretched on its own; ground beyond the raster is black.

    Args:
        errors: See `atlas.classify_errors`, or of a segmentation `maps.find_errors`; shown in this
            order, by falling confidence or area.
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
    figure, axes = _grid(slots, columns, WIDTH / columns, caption=0.95)
    figure.get_layout_engine().set(h_pad=0.08)  # inches, between the captions of two rows
    for ax in axes:
        ax.axis("off")
    for k, mine in shown.items():
        place, axes = axes[: columns * rows[k]], axes[columns * rows[k] :]
        for ax, error in zip(place, mine.itertuples(), strict=False):
            if "geometry" in errors:
                _draw_region(ax, error, rasters[error.raster])
            else:
                _draw_error(ax, error, rasters[error.raster], objects)
    handles = [
        Line2D([], [], color=TRUTH_COLOR, label="truth"),
        Line2D([], [], color=DETECTION_COLOR, linestyle="--", label="detection"),
    ]
    if "geometry" not in errors:
        _legend_below(figure, handles)
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
    ax.set_title("\n".join(map(_cut, [f"{error.kind} {seen}", label])), fontsize="small")
    ax.axis("on")
    ax.set(xticks=[], yticks=[], ylabel="")
    name = _cut(error.raster, PLACE)
    ax.set_xlabel(f"{error.pixel_x:.0f}, {error.pixel_y:.0f}\n{name}", fontsize="small")


def _draw_region(ax: Axes, error: NamedTuple, raster: fileio.Raster) -> None:
    """Draw a region that is wrong, its outline on the raster."""
    low, high = (np.array([getattr(error, name) for name in names])
                 for names in (BOX_COLUMNS[:2], BOX_COLUMNS[2:]))  # fmt: skip
    side = int(np.ceil(max(LEAST_CUTOUT, CONTEXT * (high - low).max())))
    x, y = np.floor((low + high - side) / 2).astype(int).tolist()
    show_window(ax, raster, Window(x, y, side, side))
    for ring in shapely.get_rings(error.geometry):
        ax.plot(*shapely.get_coordinates(ring).T, color=DETECTION_COLOR, linewidth=1.2)
    ax.set(xlim=(x, x + side), ylim=(y + side, y))
    label = error.label if error.kind != "confused" else f"{error.label}, is {error.true_label}"
    size = f"{error.area_px} px, {error.share_wrong:.0%} of its region"
    ax.set_title("\n".join(map(_cut, [f"{error.kind} {label}", size])), fontsize="small")
    ax.axis("on")
    ax.set(xticks=[], yticks=[], ylabel="")
    name = _cut(error.raster, PLACE)
    ax.set_xlabel(f"{error.pixel_x:.0f}, {error.pixel_y:.0f}\n{name}", fontsize="small")


def plot_catalogue(raster: fileio.Raster, catalogue: pd.DataFrame, max_side: int = 512) -> Figure:
    """Draw a raster's catalogue: where it is densest, and how its objects spread over all of it.

    Args:
        raster: The raster.
        catalogue: `pixel_x, pixel_y, label` and boxes in px of the raster.
        max_side: Px of the window that is shown in detail.
    """
    width, height = raster.width, raster.height
    cell = max(max_side // 8, max(width, height) // 64)
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
    detail.set_title(f"the densest window: {inside.sum():,} objects", fontsize="medium")
    drawn = overview.imshow(
        counts, cmap="cividis", extent=(0, edges[1][-1], edges[0][-1], 0), vmin=0,
        vmax=max(counts.max(), 1),
    )  # fmt: skip
    _count_bar(overview, drawn, f"objects per cell\n({cell} px)")
    overview.add_patch(
        Rectangle((x, y), window.width, window.height, fill=False, color="white", linewidth=1.5)
    )
    overview.set(xlim=(0, width), ylim=(height, 0), xlabel="x (px)", ylabel="y (px)")
    overview.set_title("all of it (white: that window)", fontsize="medium")
    _legend_below(figure, _handles(colors, catalogue["label"].value_counts()))
    figure.suptitle(f"{_cut(raster.path.name)}: {len(catalogue):,} objects", fontsize="medium")
    return figure


def plot_class_map(
    raster: fileio.Raster,
    class_map: Path | str | np.ndarray,
    *,
    labels: Sequence[str] | None = None,
    colormap: Mapping[int, tuple[str, str]] | None = None,
    window: Window | None = None,
) -> Figure:
    """Draw a raster, its class map, and the classes but the background over the raster.

    Args:
        raster: The raster.
        class_map: A GeoTIFF that `predict` wrote, of the raster's size, read decimated where it is
            large; or class ids, uint8 (H, W), of the window or of all of the raster; 255 is
            ground that has no class.
        labels: Names of the classes by class id; None takes those that the file has.
        colormap: Class id -> name and colour (#RRGGBB), see `fileio.read_colormap`; None takes the
            file's colours, or `imutils.class_colors`.
        window: Part of the raster to show, px; None shows all of it.
    """
    window = window or Window(0, 0, raster.width, raster.height)
    if isinstance(class_map, np.ndarray):
        classes, known = class_map, {}
    else:
        classes, known = _read_class_map(Path(class_map), raster, window)
    count = max([classes[classes < IGNORE].max(initial=0) + 1, len(labels or ())])
    names = [str(i) for i in range(count)] if labels is None else list(labels)
    paint = dict(enumerate(zip(names, class_colors(names), strict=True)))
    paint |= {i: (names[i] if labels else name, color) for i, (name, color) in known.items()}
    bare = {i for i, (name, _) in paint.items() if name == BACKGROUND_NAME}
    paint |= dict(colormap or {})
    pixels = np.bincount(classes.ravel(), minlength=IGNORE + 1)
    known_pixels = max(pixels[:IGNORE].sum(), 1)
    colors = {number: color for number, (_, color) in paint.items()}
    seen = {i: color for i, color in colors.items() if i not in bare}
    slope = window.height / window.width
    wide = slope < 1 / PANORAMA  # one above the other
    shape, high = ((3, 1), 3 * slope * WIDTH + 2) if wide else ((1, 3), slope * WIDTH / 3 + 1.2)
    figure, axes = plt.subplots(
        *shape, figsize=(WIDTH, min(high, 2 * WIDTH)), layout="constrained",
        sharex=True, sharey=True,
    )  # fmt: skip
    extent = (window.x, window.x + window.width, window.y + window.height, window.y)
    for ax, title, alpha, painted in zip(
        axes, ("raster", "classes", "both"), (0.0, 1.0, OVERLAY), ({}, colors, seen), strict=True
    ):
        if alpha < 1:
            show_window(ax, raster, window, gray=alpha > 0)
        else:
            ax.set(xlabel="x (px)", ylabel="y (px)", facecolor="white")
        if alpha > 0:
            picture = _paint_table(painted)[classes]
            ax.imshow(picture, extent=extent, alpha=alpha, interpolation="nearest")
        ax.set_title(title, fontsize="medium")
        ax.label_outer()
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    handles = [
        Patch(facecolor=paint[i][1], edgecolor="0.3", linewidth=0.5,
              label=f"{_cut(paint[i][0])} ({pixels[i] / known_pixels:.1%})")
        for i in sorted(paint) if pixels[i] or i < count
    ]  # fmt: skip
    if pixels[IGNORE]:
        handles.append(Patch(facecolor="white", edgecolor="0.3", linewidth=0.5, label="no class"))
    _legend_below(figure, handles)
    figure.suptitle(_cut(raster.path.name), fontsize="medium")
    return figure


def plot_class_errors(
    raster: fileio.Raster,
    truth: np.ndarray,
    found: np.ndarray,
    labels: Sequence[str],
    window: Window,
) -> Figure:
    """Draw a part of a raster, its true classes, those that were found, and where they differ.

    Args:
        raster: The raster.
        truth: Class ids, uint8 (H, W); 255 is ground that does not count.
        found: The same, of a model.
        labels: Names of the classes by class id.
        window: The part, px.
    """
    colors = class_colors(labels)
    table = _paint_table(dict(enumerate(colors)))
    known = truth != IGNORE
    wrong = known & (truth != found)
    figure, axes = plt.subplots(
        2, 2, figsize=(WIDTH, WIDTH * window.height / window.width + 1), layout="constrained",
        sharex=True, sharey=True,
    )  # fmt: skip
    extent = (window.x, window.x + window.width, window.y + window.height, window.y)
    share = wrong.sum() / max(known.sum(), 1)
    panels = {
        "raster": None, "truth": table[truth], "found": table[np.where(known, found, IGNORE)],
        f"wrong, in the true class's colour: {share:.1%}": table[np.where(wrong, truth, IGNORE)],
    }  # fmt: skip
    for ax, (title, picture) in zip(axes.flat, panels.items(), strict=True):
        if title.startswith(("raster", "wrong")):
            show_window(ax, raster, window, gray=title != "raster")
        if picture is not None:
            ax.imshow(picture, extent=extent, interpolation="nearest")
        ax.set_title(title, fontsize="medium")
        ax.label_outer()
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    shown = np.unique(np.concatenate([truth[known], found[known]]))
    _legend_below(
        figure, _patches({labels[i]: colors[i] for i in shown.tolist() if i < len(labels)})
    )
    return figure


def plot_comparison(
    raster: fileio.Raster,
    window: Window,
    found: Mapping[str, pd.DataFrame | np.ndarray],
    labels: Sequence[str] = (),
) -> Figure:
    """Draw a part of a raster, and beside it what each of some models makes of it.

    Args:
        raster: The raster.
        window: The part, px.
        found: Title -> boxes in px of the raster with their `label`, or class ids, uint8 (H, W) of
            the window; 255 is ground that has no class. The truth may be one of them.
        labels: Names of the classes by class id, where there are class ids.
    """
    boxes = {
        title: df[df["xmax"].gt(window.x) & df["xmin"].lt(window.x + window.width)
                  & df["ymax"].gt(window.y) & df["ymin"].lt(window.y + window.height)]
        for title, df in found.items() if isinstance(df, pd.DataFrame)
    }  # fmt: skip
    colors = dict(zip(labels, class_colors(labels), strict=True))
    if boxes:
        colors = label_colors(pd.concat([df["label"] for df in boxes.values()]), colors)
    columns = min(len(found) + 1, 3)
    rows = -(-(len(found) + 1) // columns)
    side = WIDTH / columns
    figure, axes = plt.subplots(
        rows, columns, layout="constrained", sharex=True, sharey=True, squeeze=False,
        figsize=(WIDTH, min(rows * (side * window.height / window.width + 0.3) + 0.7, 2 * WIDTH)),
    )  # fmt: skip
    extent = (window.x, window.x + window.width, window.y + window.height, window.y)
    panels = {_cut(raster.path.name): None, **found, **boxes}
    paint = _paint_table(dict(enumerate(colors.values())))
    for ax, (title, content) in zip(axes.flat, panels.items(), strict=False):
        show_window(ax, raster, window, gray=isinstance(content, np.ndarray))
        if isinstance(content, np.ndarray):
            ax.imshow(paint[content], extent=extent, interpolation="nearest")
        elif content is not None:
            _draw_labelled(ax, content, colors)
            title = f"{title}: {len(content):,}"
        ax.set_title(textwrap.fill(title, 110 // columns), fontsize="small")
        ax.label_outer()
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    if boxes:
        _legend_below(figure, _handles(colors))
    else:
        known = np.unique(np.concatenate([classes.ravel() for classes in found.values()]))
        _legend_below(figure, _patches({labels[i]: colors[labels[i]]
                                        for i in known[known < len(labels)].tolist()}))  # fmt: skip
    return figure


class TilePictures(NamedTuple):
    """A tile as pictures, uint8 (H, W, 3), see `draw_tile`.

    Attributes:
        input: What the network sees.
        label: Its true classes; white where nothing is known.
        prediction: The class that the network finds most probable.
        heatmaps: By class id, the probability of the class, dark for 0 to bright for 1.
    """

    input: np.ndarray
    label: np.ndarray
    prediction: np.ndarray
    heatmaps: tuple[np.ndarray, ...]


def draw_tile(
    image: np.ndarray, truth: np.ndarray, probabilities: np.ndarray, colors: Sequence[str]
) -> TilePictures:
    """Turn a tile and what a network says of it into pictures, each of a pixel per pixel.

    Args:
        image: (bands, H, W), stretched; the first three bands are red, green and blue.
        truth: Class ids (H, W), 255 where nothing is known.
        probabilities: Of the classes, (C, H, W).
        colors: Of the classes, #RRGGBB.
    """
    bands = image[:3] if len(image) >= 3 else image[:1]
    seen = imutils.preview_stretch(bands, np.ones(image.shape[1:], bool))
    seen = seen if seen.ndim == 3 else np.repeat(seen[..., None], 3, axis=2)
    paint = _paint_table(dict(enumerate(colors)))[:, :3]
    paint[IGNORE] = 255
    heat = (plt.get_cmap(HEAT)(probabilities)[..., :3] * 255).round().astype(np.uint8)
    found = probabilities.argmax(axis=0)
    return TilePictures(seen.astype(np.uint8), paint[truth], paint[found], tuple(heat))


def plot_tile_prediction(
    pictures: TilePictures,
    labels: Sequence[str],
    colors: Sequence[str],
    *,
    heatmaps: bool = True,
    title: str = "",
) -> Figure:
    """Draw a tile, its true and its predicted classes, and how probable each class is.

    Args:
        pictures: See `draw_tile`.
        labels: Names of the classes, by class id.
        colors: Their colours, #RRGGBB.
        heatmaps: Whether to draw the probabilities.
        title: Of all.
    """
    panels = [("input", pictures.input), ("label", pictures.label),
              ("prediction", pictures.prediction)]  # fmt: skip
    if heatmaps:
        panels += [(_cut(name), heat) for name, heat in zip(labels, pictures.heatmaps, strict=True)]
    columns = min(len(panels), 3 if len(panels) <= 9 else 5)
    figure, axes = _grid(len(panels), columns, WIDTH / columns, 0.25)
    # for what lies below: a scale of the probabilities, and the legend
    figure.set_figheight(figure.get_figheight() + (1.0 if heatmaps else 0.5))
    for ax, (name, picture) in zip(axes, panels, strict=True):
        ax.imshow(picture, interpolation="nearest")
        ax.set_title(name, fontsize="medium")
        ax.set(xticks=[], yticks=[])
    if heatmaps:
        scale = ScalarMappable(Normalize(0, 1), HEAT)
        figure.colorbar(
            scale, ax=axes, location="bottom", label="probability of a class", shrink=0.5,
            aspect=40, pad=0.02,
        )  # fmt: skip
    patches = _patches(dict(zip(labels, colors, strict=True)))
    if (pictures.label == 255).all(axis=2).any():
        patches.append(Patch(facecolor="white", edgecolor="0.3", linewidth=0.5, label="unknown"))
    _legend_below(figure, patches)
    figure.suptitle(_cut(title, 2 * CAPTION), fontsize="medium")
    return figure


def _paint_table(colors: Mapping[int, str]) -> np.ndarray:
    """Return the colours of all class ids, uint8 (256, 4) RGBA; those without one are clear."""
    table = np.zeros((IGNORE + 1, 4), np.uint8)
    for number, color in colors.items():
        table[number] = (*bytes.fromhex(color[1:]), 255)
    return table


def _read_class_map(
    path: Path, raster: fileio.Raster, window: Window
) -> tuple[np.ndarray, dict[int, tuple[str, str]]]:
    """Return the classes of a window, perhaps decimated, and what the file calls and paints them.

    Raises:
        InputError: The map is not one of that raster.
    """
    handle = fileio.Raster.open(path)
    if (handle.width, handle.height) != (raster.width, raster.height) or handle.dtype != "uint8":
        raise InputError(
            f"{path} has {handle.width} x {handle.height} px of {handle.dtype}, but a class map of "
            f"{raster.path} has {raster.width} x {raster.height} px of uint8; give that raster's"
        )
    scale = max(1.0, max(window.width, window.height) / MAX_SIDE)
    shape_hw = tuple(max(1, round(side / scale)) for side in (window.height, window.width))
    image, valid = handle.read_decimated(window, shape_hw)
    with handle.anew() as src:
        names = {k: v for k, v in src.tags(1).items() if k.startswith("class_")}
        colors = src.colormap(1) if ColorInterp.palette in src.colorinterp else {}
    known = {}
    for key, name in names.items():
        number = int(key.removeprefix("class_"))
        if number in colors:
            known[number] = (name, "#{:02X}{:02X}{:02X}".format(*colors[number]))
    return np.where(valid, image[0], np.uint8(IGNORE)), known
