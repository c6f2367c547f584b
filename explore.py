"""The raster explorer: a raster of any size at any zoom, with the boxes that are in view.

A picture of the whole raster lies below; over it, a reading of just the ground in view, at the
resolution of the screen. Readings come in pieces, between which the session answers: a reading that
the view has left is dropped, so it never paints over a newer one, and nothing needs a thread.
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from time import perf_counter

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase, KeyEvent, MouseEvent, RendererBase
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba_array
from matplotlib.lines import Line2D
from matplotlib.path import Path as Outline
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

import fileio
import imutils
from ImageData import BOX_COLUMNS, TRUE_BOX_COLUMNS, ImageData, InputError, Window

log = logging.getLogger(__name__)

FIGURE_SIZE = (9.0, 6.2)  # inches, a notebook's cell
PICTURE_SIDE = 1024  # px, longest side of the picture of the whole raster
BUDGET = 2**23  # px that a reading decodes at once at most; larger ones come block by block
FIRST_BLOCKS = 8  # blocks along a side of the first, coarse sample of such a reading
PREVIEW_BLOCKS = 1024  # of a large raster without overviews that a preview reads
STEP = 0.1  # s of reading between two answers
REPAINT = 0.6  # s of reading before what there is of it is drawn
STATIC_PATIENCE = 10.0  # s of reading for a figure that cannot be refined later
OVERVIEW_SLACK = 1.2  # GDAL takes an overview up to this much coarser than what is asked for
MAX_BOXES = 2500  # in view; beyond, objects are drawn as points
MAX_POINTS = 8000  # in view; beyond, every n-th object is drawn
POINTER = 0.3, 1.2  # of a box's half side beyond it, from where to where what points at it reaches
CONTEXT = 8.0  # side of the view of one box, in its sides
LEAST_VIEW = 48  # px, side of that view
LEAST_SIDE = 4  # px, of any view
ZOOM = 1.25  # by which a wheel's step enlarges
CLICK = 4  # px of the screen within which a press and its release are a click
LEGEND_ENTRIES = 12
ROW_LINES, VALUE_LETTERS = 20, 18  # of the values of a row
TITLE_LETTERS, TITLE_LINES = 105, 3  # above the picture
SLIDER_STEP = 0.01  # of scores
MAX_BLOCKS = 500  # in view; more are not outlined
SURE = (0.8, 2.2)  # width of a detection's corners at scores of 0 and 1, points
HALO = [withStroke(linewidth=2.5, foreground="black")]
ERROR_STYLE = {"markerfacecolor": "white", "markeredgecolor": "black"}
BLOCK_STYLE = {"color": "white", "linestyle": "--", "linewidth": 1.0}
CORNERS = Outline(
    [(-1, -0.3), (-1, -1), (-0.3, -1), (0.3, -1), (1, -1), (1, -0.3),
     (1, 0.3), (1, 1), (0.3, 1), (-0.3, 1), (-1, 1), (-1, 0.3)],
    [Outline.MOVETO, Outline.LINETO, Outline.LINETO] * 4,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Pixels
# ---------------------------------------------------------------------------------------------


def read_progressively(
    raster: fileio.Raster,
    window: Window,
    shape_hw: tuple[int, int],
    base: tuple[np.ndarray, np.ndarray] | None = None,
    most_blocks: float = np.inf,
) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Read a window at the size of the screen: at once, or better and better.

    What overviews make cheap comes as one reading. Of a file without them, blocks are read in the
    order of an interlaced picture, each once: the first, far apart, stand for the ground around
    them. Blocks that lie closer than the pixels of the result are left out, and those that cannot
    be read stay as they are.

    Args:
        raster: The raster.
        window: A window inside it.
        shape_hw: Height and width of the result in px, at most the window's.
        base: A coarser picture of the window in the same shape to start from, if there is one.
        most_blocks: How many blocks to read at most; the first, coarse sample is read in any case.

    Yields:
        Pixels (bands, height, width), their validity (height, width), and whether that was all;
        about every `STEP` s the same arrays, with more in them.
    """
    step_yx = window.height / shape_hw[0], window.width / shape_hw[1]
    factor = max((f for f in raster.overviews if f <= OVERVIEW_SLACK * min(step_yx)), default=1)
    if window.width * window.height / factor**2 <= BUDGET:
        yield *raster.read_decimated(window, shape_hw), True
        return
    bands = len(raster.bands)
    image, valid = base or (np.zeros((bands, *shape_hw), raster.dtype), np.zeros(shape_hw, bool))
    image, valid = image.copy(), valid.copy()
    sides, start = raster.block_shape_hw, (window.y, window.x)
    ends = (window.y + window.height, window.x + window.width)
    first = [low // side for low, side in zip(start, sides, strict=True)]
    last = [-(-high // side) for high, side in zip(ends, sides, strict=True)]
    # strips of a row or so are closer than the pixels of the result
    every = [max(1, int(step // side)) for step, side in zip(step_yx, sides, strict=True)]
    most = max((high - low) / n for low, high, n in zip(first, last, every, strict=True))
    stride = 2 ** max(0, int(np.ceil(np.log2(max(most / FIRST_BLOCKS, 1)))))
    coarsest, due = stride, perf_counter() + 3 * STEP
    counts = [-(-(high - low) // n) for low, high, n in zip(first, last, every, strict=True)]

    def place(axis: int, low: int, high: int) -> slice:
        """Return where pixels from `low` to `high` of the raster lie in the result."""
        low, high = (max(int((v - start[axis]) / step_yx[axis] + 1e-6), 0) for v in (low, high))
        return slice(low, max(high, low + 1))  # so that those of neighbours do not overlap

    # each sample has four times the blocks of the one before
    while stride == coarsest or (stride and np.prod(counts) / stride**2 <= most_blocks):
        rows, cols = (
            range(low // (stride * n) * stride * n, high, stride * n)
            for low, high, n in zip(first, last, every, strict=True)
        )
        for row in rows:
            for col in cols:
                seen = row % (2 * stride * every[0]) == 0 and col % (2 * stride * every[1]) == 0
                if seen and stride < coarsest:
                    continue
                y0, x0 = max(row * sides[0], start[0]), max(col * sides[1], start[1])
                y1 = min((row + 1) * sides[0], ends[0])
                x1 = min((col + 1) * sides[1], ends[1])
                if y1 <= y0 or x1 <= x0:  # the lattice starts before the window
                    continue
                own = place(0, y0, y1), place(1, x0, x1)
                shape = valid[own].shape
                try:
                    pixels, has_value = raster.read_decimated(
                        Window(x0, y0, x1 - x0, y1 - y0), shape
                    )
                except InputError:
                    continue
                if base is None and stride > 1:
                    around = (
                        place(0, y0, (row + stride * every[0]) * sides[0]),
                        place(1, x0, (col + stride * every[1]) * sides[1]),
                    )
                    valid[around] = has_value.any()
                    if has_value.any():
                        image[:, *around] = np.median(pixels[:, has_value], axis=1)[:, None, None]
                image[:, *own], valid[own] = pixels, has_value
                if perf_counter() > due:
                    yield image, valid, False
                    due = perf_counter() + STEP
        stride //= 2
    yield image, valid, True


def preview(
    raster: fileio.Raster, longest_side: int = PICTURE_SIDE
) -> tuple[np.ndarray, np.ndarray]:
    """Read the whole raster decimated, in a second or two whatever its size.

    Of a large one without overviews only some blocks are read, which stand for the ground around
    them.

    Returns:
        Pixels (bands, height, width) and their validity (height, width).
    """
    window = Window(0, 0, raster.width, raster.height)
    shape_hw = _shape(window, max(1.0, max(window) / longest_side))
    *_, (image, valid, _) = read_progressively(raster, window, shape_hw, most_blocks=PREVIEW_BLOCKS)
    return image, valid


def _shape(window: Window, scale: float) -> tuple[int, int]:
    return tuple(min(side, max(1, round(side / scale))) for side in (window.height, window.width))


class _Picture:
    """A window that is being read; `pixels` are what there is of it, and their validity."""

    def __init__(
        self,
        raster: fileio.Raster,
        window: Window,
        shape_hw: tuple[int, int],
        base: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        self.window, self.pixels, self.busy = window, None, True
        self._pieces = read_progressively(raster, window, shape_hw, base)

    def advance(self) -> None:
        try:
            *pixels, last = next(self._pieces)
        except InputError as error:
            log.warning("%s", error)
            self.busy = False
        else:
            self.pixels, self.busy = tuple(pixels), not last

    def cut(
        self, window: Window, shape_hw: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Return what there is of a smaller window, enlarged to a shape."""
        if self.pixels is None:
            return None
        image, valid = self.pixels
        rows, cols = (
            ((low - from_ + (np.arange(n) + 0.5) * side / n) * of / whole).astype(int)
            for low, from_, side, n, of, whole in (
                (window.y, self.window.y, window.height, shape_hw[0], valid.shape[0],
                 self.window.height),
                (window.x, self.window.x, window.width, shape_hw[1], valid.shape[1],
                 self.window.width),
            )
        )  # fmt: skip
        return image[:, rows[:, None], cols], valid[rows[:, None], cols]


class Ground:
    """The pictures of a raster: all of it, and what is in view, in one stretch.

    Attributes:
        raster: The raster, with the bands that are shown.
    """

    def __init__(self, raster: fileio.Raster) -> None:
        """Begin with the whole raster; `advance` reads it."""
        shown = 3 if len(raster.bands) >= 3 else 1
        self.raster = replace(raster, bands=raster.bands[:shown], nodata=raster.nodata[:shown])
        self._scale = max(raster.width, raster.height, PICTURE_SIDE) / PICTURE_SIDE
        whole = Window(0, 0, raster.width, raster.height)
        self._whole = _Picture(self.raster, whole, _shape(whole, self._scale))
        self._view: _Picture | None = None
        self._bounds: np.ndarray | None = None

    def look(
        self, view_xyxy: tuple[float, float, float, float], screen_wh: tuple[float, float]
    ) -> None:
        """Turn to a view, and drop what was being read of another.

        Args:
            view_xyxy: The ground in view, px of the raster; it may reach beyond.
            screen_wh: Its width and height on the screen, px.
        """
        x0, y0, x1, y1 = view_xyxy
        low = max(int(np.floor(x0)), 0), max(int(np.floor(y0)), 0)
        high = (
            min(int(np.ceil(x1)), self.raster.width), min(int(np.ceil(y1)), self.raster.height),
        )  # fmt: skip
        scale = max((x1 - x0) / screen_wh[0], (y1 - y0) / screen_wh[1])
        self._view = None
        if scale < 0.8 * self._scale and high[0] > low[0] and high[1] > low[1]:
            window = Window(*low, high[0] - low[0], high[1] - low[1])
            shape = _shape(window, max(scale, 1.0))
            self._view = _Picture(self.raster, window, shape, self._whole.cut(window, shape))

    @property
    def busy(self) -> bool:
        """Whether there is more to read."""
        return (self._view is not None and self._view.busy) or self._whole.busy

    def advance(self) -> bool:
        """Read one piece more, of the view before the whole raster.

        Returns:
            Whether `shown` may have changed.
        """
        if self._view is not None and self._view.busy:
            self._view.advance()
            return True
        self._whole.advance()
        return self._view is None or self._view.pixels is None

    def shown(self) -> tuple[np.ndarray, tuple[float, float, float, float]] | None:
        """Return the picture of the view as far as it is read.

        Returns:
            The picture as uint8 (H, W, 3); its left, right, bottom and top in px of the raster.
            None: nothing is read yet.
        """
        view = self._view
        picture = self._whole if view is None or view.pixels is None else view
        if picture.pixels is None:
            return None
        image, valid = picture.pixels
        if self._bounds is None and valid.any():
            # once, so that the same ground looks the same wherever the view is
            self._bounds = imutils.preview_bounds(image, valid)
        shown = imutils.preview_stretch(image, valid, self._bounds, light=self.raster.light)
        if shown.ndim == 2:  # colours are drawn in half the time of values
            shown = np.repeat(shown[:, :, None], 3, axis=2)
        x, y, width, height = picture.window
        return shown, (x, x + width, y + height, y)

    def format_place(self, x: float, y: float) -> str:
        """Tell where a point (px) is: in the raster, and on the map where there is one."""
        text = f"x {x:.1f}, y {y:.1f} px"
        if self.raster.crs is None:
            return text
        ((east, north),) = self.raster.to_map(np.array([[x, y]]))
        digits = (
            6 if abs(np.linalg.det(np.reshape(self.raster.transform, (2, 3))[:, :2])) < 1e-4 else 1
        )
        return f"{text}    {self._crs_name} {east:.{digits}f}, {north:.{digits}f}"

    @cached_property
    def _crs_name(self) -> str | None:
        return self.raster.crs_name

    def measure_step(self, x: float, y: float) -> float | None:
        """Return the metres on the ground of a step of one px in x at a point; None: unknown."""
        try:
            step = np.hypot(*self.raster.metres_per_pixel(np.array([[x, y]]))[0, :, 0])
        except InputError:
            return None
        return float(step) if np.isfinite(step) and step > 0 else None


# ---------------------------------------------------------------------------------------------
# Boxes
# ---------------------------------------------------------------------------------------------


class Layer:
    """Boxes of one kind, truth or detections, and which of them are to be seen.

    Attributes:
        df: The rows, in their order.
        boxes: (N, 4), xyxy px.
        scores: (N,); 1 where the table has none.
        labels: (N,), text.
    """

    def __init__(self, df: pd.DataFrame | None, raster: str) -> None:
        """Take the rows of a table, of one raster if it has a column `raster`."""
        df = pd.DataFrame(columns=[*BOX_COLUMNS, "label"]) if df is None else df
        if missing := [name for name in (*BOX_COLUMNS, "label") if name not in df.columns]:
            raise InputError(
                f"boxes to show need the columns {missing}, got {list(df.columns)}; read the file "
                "with annotations.read_annotations"
            )
        df = df[df["raster"].astype(str) == raster] if "raster" in df.columns else df
        self.df = df.reset_index(drop=True)
        self.boxes = self.df[BOX_COLUMNS].to_numpy(dtype=float)
        self.labels = self.df["label"].astype(str).to_numpy(dtype=object)
        self.codes, self.names = pd.factorize(self.labels)
        self.scores = np.ones(len(df))
        if "score" in df.columns:
            self.scores = self.df["score"].to_numpy(dtype=float)

    def chosen(self, least_score: float, hidden: Collection[str]) -> np.ndarray:
        """Tell which boxes have the score, if any, and a label that is not hidden, as bool (N,)."""
        shown = np.array([name not in hidden for name in self.names], dtype=bool)
        return ~(self.scores < least_score) & shown[self.codes] if len(shown) else self.scores > 1

    def within(self, view_xyxy: tuple[float, float, float, float]) -> np.ndarray:
        """Tell which boxes touch a view, as bool (N,)."""
        return touching(self.boxes, view_xyxy)

    def colors(self, of_label: Mapping[str, str]) -> np.ndarray:
        """Return the colours of the boxes, as RGBA (N, 4)."""
        return to_rgba_array([of_label[name] for name in self.names])[self.codes]

    def at(self, x: float, y: float, reach: float, among: np.ndarray) -> int | None:
        """Return the row of the smallest box around a point.

        Args:
            x: Px.
            y: Px.
            reach: Px by which a box may miss the point.
            among: Rows to choose from, int (M,).
        """
        rows = among[self.within((x - reach, y - reach, x + reach, y + reach))[among]]
        return int(rows[imutils.box_area(self.boxes[rows]).argmin()]) if len(rows) else None


def _shorten(value: object) -> str:
    """Write a value so that it fits beside the picture."""
    if isinstance(value, float):  # a row of several types makes floats of whole numbers
        return f"{value:.1f}".removesuffix(".0") if abs(value) >= 100 else f"{value:.3g}"
    return imutils.shorten(value, VALUE_LETTERS)


def _round_length(longest: float) -> float:
    """Return the largest of 1, 2, 5, 10, 20, ... up to a length."""
    power = 10.0 ** np.floor(np.log10(longest))
    return max(digit * power for digit in (1, 2, 5) if digit * power <= longest)


def touching(boxes_xyxy: np.ndarray, view_xyxy: tuple[float, float, float, float]) -> np.ndarray:
    """Tell which boxes (N, 4) touch a view, as bool (N,)."""
    # 100,000 boxes take less than a millisecond without any index
    x0, y0, x1, y1 = boxes_xyxy.T
    return (x1 > view_xyxy[0]) & (y1 > view_xyxy[1]) & (x0 < view_xyxy[2]) & (y0 < view_xyxy[3])


def outlines(boxes_xyxy: np.ndarray) -> np.ndarray:
    """Return the closed outlines (N, 5, 2) of boxes (N, 4)."""
    x0, y0, x1, y1 = boxes_xyxy.T
    return np.stack([x0, y0, x1, y0, x1, y1, x0, y1, x0, y0], axis=1).reshape(-1, 5, 2)


def corners(boxes_xyxy: np.ndarray) -> np.ndarray:
    """Return the corners of boxes (N, 4) as lines (4 N, 3, 2), three tenths of a side long."""
    low, high = boxes_xyxy[:, :2], boxes_xyxy[:, 2:]
    center, half = (low + high) / 2, (high - low) / 2
    unit = CORNERS.vertices.reshape(4, 3, 2)
    return (center[:, None, None] + half[:, None, None] * unit).reshape(-1, 3, 2)


def pointers(box_xyxy: np.ndarray) -> np.ndarray:
    """Return lines (4, 2, 2) from outside a box (4,) towards the middles of its sides."""
    center, half = (box_xyxy[:2] + box_xyxy[2:]) / 2, (box_xyxy[2:] - box_xyxy[:2]) / 2
    sides, length = np.array([[-1, 0], [1, 0], [0, -1], [0, 1]]), half.max()
    near, far = (half + share * length for share in POINTER)
    return center + np.stack([sides * near, sides * far], axis=1)


# ---------------------------------------------------------------------------------------------
# The figure
# ---------------------------------------------------------------------------------------------


class MapAxes(Axes):
    """Axes on which a px is as wide as it is high: the larger of two scales asked for wins.

    Attributes:
        before_draw: Called before everything in it is drawn, with the limits as they will be.
    """

    name = "map"
    before_draw: Callable[[], None] | None = None

    def apply_aspect(self, position: Bbox | None = None) -> None:
        """Enlarge the limits of one axis, around its middle, so that both have one scale."""
        super().apply_aspect(position)
        (x0, x1), (y0, y1) = self.get_xlim(), self.get_ylim()
        _, _, width, height = self.bbox.bounds
        scale = max(abs(x1 - x0) / width, abs(y1 - y0) / height)
        for low, high, side, set_limits in (
            (x0, x1, width, self.set_xlim), (y0, y1, height, self.set_ylim),
        ):  # fmt: skip
            half = np.sign(high - low) * scale * side / 2
            if not np.isclose(high - low, 2 * half, rtol=1e-9, atol=0):
                set_limits((low + high) / 2 - half, (low + high) / 2 + half, emit=False)

    def draw(self, renderer: RendererBase) -> None:
        """Let the content follow the limits, and draw it."""
        self.apply_aspect()
        if self.before_draw is not None:
            self.before_draw()
        super().draw(renderer)


class Explorer:
    """A figure in which rasters are explored, one at a time; `explore` makes one.

    Everything but the controls works on any canvas of matplotlib: the wheel zooms, a drag pans,
    a click shows the values of a row, keys go on (see `KEYS`).

    Attributes:
        rasters: Identifier -> raster.
        ax: The Axes, in px of the raster that is shown.
        ground: Its pictures.
        truth: Its objects.
        detections: Its detections.
        errors: Its errors.
        score: Detections from this score on are shown.
        hidden: Labels that are not shown.
        hidden_layers: What else is not shown, of "objects", "detections" and "errors".
        selected: The row whose values are shown, if any.
        stepping: Whether controls go from error to error, to other rasters and scores.
        on_click: Called with x and y (px) of a click before a row is chosen; True: that is all.
        on_key: Called with a key before `KEYS`; True: that is all.
        on_close: Called when the figure is closed.
    """

    def __init__(
        self,
        rasters: Mapping[str, fileio.Raster],
        objects: Mapping[str, pd.DataFrame],
        detections: pd.DataFrame | None = None,
        errors: pd.DataFrame | None = None,
        blocks: pd.DataFrame | None = None,
    ) -> None:
        """Open a figure on the first raster; see `explore`.

        Args:
            rasters: Identifier -> raster.
            objects: Identifier -> its objects, of those that have some.
            detections: See `explore`; so `errors`, `blocks`.
            errors: None: `n` and `p` go through the detections.
            blocks: None: no ground is outlined.
        """
        self.on_click: Callable[[float, float], bool] = lambda _x, _y: False
        self.on_key: Callable[[str], bool] = lambda _key: False
        self.on_close: Callable[[], None] = lambda: None
        self.score, self.selected = 0.0, None
        self.hidden, self.hidden_layers = set(), set()
        self.controls, self.colors, self._labels, self._plain = None, {}, set(), None
        self.rasters, self._errors, self._blocks = dict(rasters), errors, blocks
        if errors is not None and "raster" in errors:  # all of one, then those of the next
            place = errors["raster"].astype(str).map({name: i for i, name in enumerate(rasters)})
            self._errors = errors.iloc[np.argsort(place, kind="stable")[: place.count()]]
        self._switches, self._toggles, self.stepping = {}, {}, True
        self.figure = plt.figure(figsize=FIGURE_SIZE)
        canvas, manager = self.figure.canvas, self.figure.canvas.manager
        # no layout engine: measuring texts anew would take longer than all else
        self.ax = self.figure.add_axes((0.075, 0.075, 0.655, 0.82), axes_class=MapAxes)
        self.ax.set(xlabel="x (px)", ylabel="y (px)", facecolor="0.15")
        self.ax.autoscale(enable=False)
        self.ax.locator_params(nbins=5)  # texts take long to draw
        blank, style = np.zeros((1, 1, 3), np.uint8), {"interpolation": "nearest", "aspect": "auto"}
        self._picture = self.ax.imshow(blank, zorder=0, extent=(0, 0, 0, 0), **style)
        self._picture.mouseover = False  # its values are stretched
        self._lines = [LineCollection([], zorder=z) for z in (3, 4)]
        self._points = [
            self.ax.scatter([], [], s=5, linewidths=0, zorder=3),
            self.ax.scatter([], [], s=10, linewidths=0.8, facecolors="none", zorder=4),
        ]
        self._marks = self.ax.scatter([], [], s=36, marker="v", zorder=5, facecolors="white",
                                     edgecolors="black")  # fmt: skip
        # lines that point at the middle of its sides: a frame would look like one more box
        pointers = [withStroke(linewidth=4.5, foreground="black")]
        self._pointers = LineCollection([], colors="white", linewidths=2, zorder=5,
                                        path_effects=pointers)  # fmt: skip
        self._chosen = [LineCollection([], zorder=4.5, linewidths=3) for _ in range(2)]
        self._outlines = [
            LineCollection([], zorder=2, colors="black", linewidths=2),
            LineCollection([], zorder=2, **BLOCK_STYLE),
        ]
        for lines in (*self._lines, *self._chosen, self._pointers, *self._outlines):
            self.ax.add_collection(lines, autolim=False)
        (self._bar,) = self.ax.plot([], [], color="white", linewidth=3, zorder=6,
                                    solid_capstyle="butt", path_effects=HALO)  # fmt: skip
        self._bar_text = self.ax.text(0, 0, "", color="white", fontsize=9, ha="left", va="bottom",
                                      zorder=6, path_effects=HALO)  # fmt: skip
        self._title = self.figure.text(0.075, 0.905, "", fontsize=10, parse_math=False)
        self._values = self.figure.text(0.745, 0.075, "", fontsize=8, family="monospace",
                                        va="bottom")  # fmt: skip
        self._timer = canvas.new_timer(interval=1)
        self._timer.single_shot = True
        self._timer.add_callback(self._read_on)
        for name, answer in (
            ("button_press_event", self._press), ("button_release_event", self._release),
            ("scroll_event", self._scroll), ("key_press_event", self._key),
            ("draw_event", self._paint), ("close_event", self._close),
        ):  # fmt: skip
            canvas.mpl_connect(name, answer)
        if manager is not None and manager.key_press_handler_id is not None:
            # p, o, l and others would do what they do in plots
            canvas.mpl_disconnect(manager.key_press_handler_id)
            canvas.mpl_disconnect(manager.scroll_handler_id)
        self._pressed, self._drawn, self._version = None, None, 0
        self._unseen, self._painted = False, 0.0
        self._stop = -1
        self.show_boxes(objects, detections, next(iter(self.rasters)))
        # whatever is set while drawing must not ask for a drawing
        self.figure.stale_callback = None
        self.ax.before_draw = self.advance
        for limits in ("xlim_changed", "ylim_changed"):
            self.ax.callbacks.connect(limits, self._redraw)

    def open(self, name: str) -> None:
        """Show another raster, all of it.

        Args:
            name: Its identifier.
        """
        raster = self.rasters[name]
        self.ground, self._drawn = Ground(raster), None
        if self._errors is None:
            self._stop = -1
        self.ax.format_coord = self.ground.format_place
        self._title.set_text(f"{raster.path.name}, {raster.width} x {raster.height} px")
        if "raster" in self._switches:
            self._switches["raster"].value = name
        self._choose_boxes()
        self.home()

    def show_boxes(
        self,
        objects: Mapping[str, pd.DataFrame],
        detections: pd.DataFrame | None,
        raster: str | None = None,
    ) -> None:
        """Show these boxes instead of those before.

        Args:
            objects: Identifier -> the objects of a raster.
            detections: Those of all rasters.
            raster: Identifier of the raster to turn to; None: stay.
        """
        self._objects, self._detections = objects, detections
        tables = [t for t in (*objects.values(), detections) if t is not None and "label" in t]
        self._labels = {str(name) for table in tables for name in table["label"].unique()}
        if self._labels - set(self.colors):
            # a label keeps its colour when others come
            if not self.colors and len(self._labels) == 1:
                (self._plain,) = self._labels
            labels = pd.concat([table["label"] for table in tables]).astype(str)
            known = self.colors or ({self._plain: imutils.TRUTH_COLOR} if self._plain else {})
            self.colors = imutils.label_colors(labels, known)
        if raster is None:
            self._choose_boxes()
        else:
            self.open(raster)

    def _choose_boxes(self) -> None:
        name = self.ground.raster.identifier
        self.truth = Layer(self._objects.get(name), name)
        self.detections, self.errors = Layer(self._detections, name), Layer(self._errors, name)
        self.select(None)
        self._test = self._test_ground(name)
        self._draw_legend()
        self._change()

    def _test_ground(self, name: str) -> np.ndarray:
        """Return the test blocks of a raster, xyxy (N, 4)."""
        if self._blocks is None:
            return np.empty((0, 4))
        test = self._blocks[(self._blocks["raster"] == name) & (self._blocks["split"] == "test")]
        low, size = test[["x", "y"]].to_numpy(float), test[["width", "height"]].to_numpy(float)
        return np.concatenate([low, low + size], axis=1)

    # -- the view -------------------------------------------------------------------------------

    @property
    def view(self) -> tuple[float, float, float, float]:
        """The ground in view: xmin, ymin, xmax, ymax, px of the raster."""
        self.ax.apply_aspect()
        (x0, x1), (y1, y0) = self.ax.get_xlim(), self.ax.get_ylim()
        return x0, y0, x1, y1

    def look_at(self, x: float, y: float, width: float, height: float) -> None:
        """Show a rectangle of ground around a point, px, and what is beside it on the screen."""
        self.ax.set_xlim(x - width / 2, x + width / 2)
        self.ax.set_ylim(y + height / 2, y - height / 2)

    def home(self) -> None:
        """Show the whole raster."""
        width, height = self.ground.raster.width, self.ground.raster.height
        self.look_at(width / 2, height / 2, width, height)

    def zoom(self, factor: float, x: float | None = None, y: float | None = None) -> None:
        """Enlarge by a factor around a point (px) that stays where it is; None: the middle."""
        x0, y0, x1, y1 = self.view
        x, y = (x0 + x1) / 2 if x is None else x, (y0 + y1) / 2 if y is None else y
        side, largest = x1 - x0, 4 * max(self.ground.raster.width, self.ground.raster.height)
        factor = side / np.clip(side / factor, LEAST_SIDE, largest)
        self.ax.set_xlim(x - (x - x0) / factor, x + (x1 - x) / factor)
        self.ax.set_ylim(y + (y1 - y) / factor, y - (y - y0) / factor)

    def pan(self, right: float, down: float) -> None:
        """Move the view by shares of its sides."""
        x0, y0, x1, y1 = self.view
        right, down = right * (x1 - x0), down * (y1 - y0)
        self.ax.set_xlim(x0 + right, x1 + right)
        self.ax.set_ylim(y1 + down, y0 + down)

    def go(self, step: int) -> None:
        """Go to the next error (1) or the one before (-1); without errors, to detections."""
        name, rows = self.ground.raster.identifier, self._errors
        if rows is None:
            layer = self.detections if len(self.detections.df) else self.truth
            rows = layer.df.iloc[np.argsort(-layer.scores, kind="stable")]
            rows = rows[rows["score"] >= self.score] if "score" in rows else rows
        names = rows["raster"].to_numpy(str) if "raster" in rows else np.full(len(rows), name)
        if not len(rows):
            return
        at, here = self._stop, np.flatnonzero(names == name)
        if len(here) and not (0 <= at < len(rows) and names[at] == name):
            # of the raster that was turned to, the first, or the last
            at = here[0] - 1 if step > 0 else here[-1] + 1
        self._stop = int(max(at, 0 if step < 0 else -1) + step) % len(rows)
        if names[self._stop] != name:
            self.open(names[self._stop])
        self.show_row(rows.iloc[self._stop], f"{self._stop + 1} of {len(rows)}")

    def show_row(self, row: pd.Series, heading: str = "") -> None:
        """Look at the box of a row, of the atlas or of the boxes shown, and list its values."""
        boxes = row.reindex([*BOX_COLUMNS, *TRUE_BOX_COLUMNS]).to_numpy(dtype=float).reshape(2, 4)
        x0, y0, x1, y1 = *np.nanmin(boxes[:, :2], axis=0), *np.nanmax(boxes[:, 2:], axis=0)
        side = max(CONTEXT * max(x1 - x0, y1 - y0), LEAST_VIEW)
        self.look_at((x0 + x1) / 2, (y0 + y1) / 2, side, side)
        self.select(row, heading)

    # -- what is shown --------------------------------------------------------------------------

    def set_score(self, score: float) -> None:
        """Show detections from this score on."""
        self.score = score
        if self._errors is None:
            self._stop = -1
        self._change()

    def show_label(self, label: str, *, shown: bool) -> None:
        """Show or hide the boxes of a label."""
        (self.hidden.discard if shown else self.hidden.add)(label)
        if not shown and self.selected is not None and self.selected.get("label") == label:
            self.select(None)
        self._change()

    def show_layer(self, name: str, *, shown: bool) -> None:
        """Show or hide all "objects", all "detections", or the marks of all "errors"."""
        (self.hidden_layers.discard if shown else self.hidden_layers.add)(name)
        if not shown and name != "errors":
            self.select(None)
        if name in self._switches:
            self._switches[name].value = shown
        self._change()

    def toggle_layer(self, name: str) -> None:
        """Hide what is shown of `show_layer`, or show it again."""
        self.show_layer(name, shown=name in self.hidden_layers)

    def select(self, row: pd.Series | None, heading: str = "") -> None:
        """Point at the box of a row and list its values; None: of no row."""
        self.selected, lines, marks = row, [], []
        if row is not None:
            marks = pointers(row[BOX_COLUMNS].to_numpy(dtype=float))
            known = row.drop(["geometry", "kind"] if heading == row.get("kind") else ["geometry"],
                             errors="ignore").dropna()  # fmt: skip
            if row.get("kind") == "missed":  # whose box is the object's
                known = known.drop(["true_label", *TRUE_BOX_COLUMNS], errors="ignore")
            lines = [heading, *(f"{name:<10.14} {_shorten(v)}" for name, v in known.items())]
            if len(lines) > ROW_LINES:
                lines = [*lines[: ROW_LINES - 1], f"... {len(lines) - ROW_LINES + 1} more"]
        self._pointers.set_segments(marks)
        self._emphasize(row)
        self._values.set_text("\n".join(lines))
        self._redraw()

    def _emphasize(self, row: pd.Series | None) -> None:
        """Draw the object and the detection of a row, where it has them, with thicker lines."""
        boxes = {}
        if row is not None:
            own, true = (row.reindex(names).to_numpy(dtype=float)
                         for names in (BOX_COLUMNS, TRUE_BOX_COLUMNS))  # fmt: skip
            if not np.isnan(true).any():
                boxes["objects"] = true, row.get("true_label")
            if row.get("kind") != "missed":
                detected = "kind" in row.index or "score" in row.index
                boxes["detections" if detected else "objects"] = own, row.get("label")
        for name, lines, draw in zip(
            ("objects", "detections"), self._chosen, (outlines, corners), strict=True
        ):
            box, label = boxes.get(name, (None, None))
            lines.set_segments([] if box is None else draw(box[None]))
            lines.set_color(self._colors_of(name).get(str(label), "white"))

    def say(self, text: str) -> None:
        """Write up to three lines above the picture."""
        lines = textwrap.wrap(text, TITLE_LETTERS, max_lines=TITLE_LINES, placeholder=" ...")
        self._title.set_text("\n".join(lines))
        self._redraw()

    def _draw_legend(self) -> None:
        labels = pd.Series([*self.truth.labels, *self.detections.labels]).value_counts()
        names = [name for name in self.colors if name in labels.index[:LEGEND_ENTRIES]]
        counted = ["objects", "detections", *(["errors"] if self._errors is not None else [])]
        handles = []
        for name, marker in zip(counted, ("s", CORNERS, "v"), strict=False):
            style = {"markersize": 6, **ERROR_STYLE}
            if name != "errors":
                color = self._colors_of(name)[self._plain] if self._plain else "0.3"
                style = {"markersize": 9, "color": color, "fillstyle": "none"}
            handles.append(Line2D([], [], linestyle="", marker=marker, label=" ", **style))
        if len(self._test):
            handles.append(Line2D([], [], label="test ground", path_effects=HALO, **BLOCK_STYLE))
        if self.controls is not None:  # the buttons tell, and texts take long to draw
            self._add_toggles()
            names = list(labels.index)
        elif len(self.colors) > 1:
            handles += [
                Line2D([], [], color=self.colors[name], linewidth=3, label=_shorten(name))
                for name in names
            ]
        if hidden := len(labels) - len(names):
            handles.append(Line2D([], [], linestyle="", label=f"... {hidden} more labels"))
        if self.ax.get_legend() is not None:
            self.ax.get_legend().remove()
        legend = self.ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.01),
                                fontsize=9, frameon=False)  # fmt: skip
        self._counts = dict(zip(counted, legend.get_texts(), strict=False))

    def _colors_of(self, layer: str) -> dict[str, str]:
        """Return label -> colour: a label alone has one as an object and one as a detection."""
        if self._plain is None or layer == "objects":
            return self.colors
        return self.colors | {self._plain: imutils.DETECTION_COLOR}

    @property
    def _layers(self) -> dict[str, Layer]:
        return {"objects": self.truth, "detections": self.detections, "errors": self.errors}

    def _in_view(self, name: str) -> np.ndarray:
        """Return the rows of a layer that are to be seen."""
        layer, least = self._layers[name], self.score if name == "detections" else -np.inf
        seen = layer.chosen(least, self.hidden) & layer.within(self.view)
        return np.flatnonzero(seen & (name not in self.hidden_layers))

    def _draw_boxes(self) -> None:
        rows = {name: self._in_view(name) for name in self._counts}
        wrong = rows.pop("errors", [])
        total = sum(map(len, rows.values()))
        as_boxes, every = total <= MAX_BOXES, max(1, -(-total // MAX_POINTS))
        for name, count in self._counts.items():
            part = f", 1 of {every} drawn" if every > 1 and name in rows else ""
            seen = len(rows.get(name, wrong))
            count.set_text(f"{seen} of {len(self._layers[name].df)} {name}{part}")
        layers = [(self._layers[name], at[::every], name) for name, at in rows.items()]
        colors = [layer.colors(self._colors_of(name))[at] for layer, at, name in layers]
        boxes = [layer.boxes[at] for layer, at, _ in layers]
        errors = self.errors.boxes[wrong[:: max(1, len(wrong) // MAX_BOXES)]]
        test = self._test[touching(self._test, self.view)]
        for lines in self._outlines:
            lines.set_segments(outlines(test if len(test) <= MAX_BLOCKS else test[:0]))
        self._marks.set_offsets(np.stack([errors[:, [0, 2]].mean(axis=1), errors[:, 1]], axis=1))
        for artists, visible in ((self._lines, as_boxes), (self._points, not as_boxes)):
            for artist in artists:
                artist.set_visible(visible)
        if as_boxes:
            widths = np.interp(self.detections.scores[layers[1][1]], (0, 1), SURE)
            self._lines[0].set(segments=outlines(boxes[0]), colors=colors[0])
            self._lines[1].set(segments=corners(boxes[1]), colors=np.repeat(colors[1], 4, axis=0),
                               linewidths=np.repeat(widths, 4))  # fmt: skip
        else:
            for points, of_boxes in zip(self._points, boxes, strict=True):
                points.set_offsets(of_boxes.reshape(-1, 2, 2).mean(axis=1))
            self._points[0].set_facecolors(colors[0])
            self._points[1].set_edgecolors(colors[1])

    def _draw_scale(self) -> None:
        x0, y0, x1, y1 = self.view
        left, bottom = x0 + 0.03 * (x1 - x0), y1 - 0.03 * (y1 - y0)
        length = _round_length(0.25 * (x1 - x0))
        text, metres = f"{length:g} px", self.ground.measure_step((x0 + x1) / 2, (y0 + y1) / 2)
        if metres is not None:
            ground = metres * length
            text += f" = {ground / 1000:.3g} km" if ground >= 1000 else f" = {ground:.3g} m"
        self._bar.set_data([left, left + length], [bottom, bottom])
        self._bar_text.set(position=(left, bottom - 0.012 * (y1 - y0)), text=text)

    # -- readings -------------------------------------------------------------------------------

    def _redraw(self, _axes: object = None) -> None:
        canvas = self.figure.canvas
        # one that cannot wait is drawn when it is saved, and not between two limits
        if type(canvas).draw_idle is not FigureCanvasBase.draw_idle:
            canvas.draw_idle()

    def _change(self) -> None:
        """Let the next drawing choose anew what is shown."""
        self._version += 1
        self._redraw()

    def _state(self) -> tuple[object, ...]:
        return self.view, tuple(self.ax.bbox.size), self._version

    def advance(self) -> None:
        """Take up the view as it is now, and read one piece of what it shows; before a drawing."""
        if (state := self._state()) != self._drawn:
            if self._drawn is None or state[:2] != self._drawn[:2]:
                self._unseen = True
                self.ground.look(*state[:2])
                if self.ground.busy:
                    self.ground.advance()
            self._drawn = state
            self._draw_boxes()
            self._draw_scale()
        if self._unseen and (shown := self.ground.shown()) is not None:
            self._picture.set_data(shown[0])
            self._picture.set_extent(shown[1])
        self._unseen = False
        if self.ground.busy:
            self._timer.start()

    def _paint(self, _event: object) -> None:
        self._painted = perf_counter()  # the pause counts from the end of a drawing

    def _read_on(self) -> None:
        """Read one piece more, and ask for a drawing when there is enough that is new."""
        if self.ground.busy:
            self._unseen |= self.ground.advance()
        enough = perf_counter() > self._painted + REPAINT or not self.ground.busy
        if self._unseen and enough:
            self._redraw()
        elif self.ground.busy:
            self._timer.start()

    @property
    def drawn(self) -> bool:
        """Whether the view and the boxes as they are now have been drawn."""
        return self._state() == self._drawn

    @property
    def busy(self) -> bool:
        """Whether something is still to be drawn or read."""
        return not self.drawn or self.ground.busy

    def settle(self, patience: float = np.inf) -> None:
        """Do all work at once, for at most some seconds."""
        end = perf_counter() + patience
        while self.busy and perf_counter() < end:
            self.advance()
            if self.ground.busy:
                self._unseen |= self.ground.advance()
        self.advance()
        self._timer.stop()
        self._redraw()

    # -- controls -------------------------------------------------------------------------------

    def add_controls(self, *more: object) -> None:
        """Show the figure in the notebook with its controls, and further widgets above it."""
        import ipywidgets as widgets
        from IPython.display import display

        canvas = self.figure.canvas
        canvas.header_visible, canvas.capture_scroll = False, True
        canvas.toolbar_position = "right"
        canvas.observe(self._close, "comm")  # ipympl has no event for a figure that is closed
        canvas.toolbar.pan()  # a drag moves the ground, as on any map
        buttons = []
        if len(self.rasters) > 1 and self.stepping:
            choice = widgets.Dropdown(
                options=list(self.rasters), value=self.ground.raster.identifier,
                tooltip="which raster to show", layout={"width": "200px"},
            )  # fmt: skip
            choice.observe(self._choose_raster, "value")
            self._switches["raster"] = choice
            buttons.append(choice)
        steps = [
            ("Previous", "key p", lambda _: self.go(-1)), ("Next", "key n", lambda _: self.go(1)),
        ]  # fmt: skip
        whole = ("All", "key h: the whole raster", lambda _: self.home())
        for text, tip, answer in (*(steps if self.stepping else []), whole):
            button = widgets.Button(description=text, tooltip=tip, layout={"width": "80px"})
            button.on_click(answer)
            buttons.append(button)
        for name in self._counts:
            switch = widgets.ToggleButton(
                value=name not in self.hidden_layers, description=name, layout={"width": "auto"},
                tooltip=f"key {name[0]}: show or hide all {name}",
            )  # fmt: skip
            switch.observe(
                lambda change, name=name: self.show_layer(name, shown=change["new"]), "value"
            )
            self._switches[name] = switch
            buttons.append(switch)
        if "score" in self.detections.df and self.stepping:
            slider = widgets.FloatSlider(
                self.score, min=0, max=1, step=SLIDER_STEP, description="score from",
                readout_format=".2f", layout={"width": "320px"},
            )  # fmt: skip
            slider.observe(self._slide, "value")
            buttons.append(slider)
        wrap = widgets.Layout(flex_flow="row wrap")
        self._toggle_box = widgets.Box(layout=wrap)
        hint = widgets.HTML("<small>Keys work once the picture was clicked.</small>")
        self.controls = widgets.VBox(
            [widgets.Box(buttons, layout=wrap), self._toggle_box, *more, hint, canvas]
        )
        self._draw_legend()
        self._change()
        display(self.controls)

    def _slide(self, change: Mapping[str, float]) -> None:
        if abs(change["new"] - self.score) >= SLIDER_STEP / 2:  # else what it was set to, rounded
            self.set_score(change["new"])

    def _choose_raster(self, change: Mapping[str, str]) -> None:
        if change["new"] != self.ground.raster.identifier:
            self.open(change["new"])

    def _add_toggles(self) -> None:
        """Let there be a button for each label, the same as before where it was there."""
        import ipywidgets as widgets

        for name in self._labels:
            if name in self._toggles:
                continue
            toggle = widgets.ToggleButton(
                value=name not in self.hidden, description=name, tooltip="show or hide",
                layout={"width": "auto", "border_left": f"8px solid {self.colors[name]}"},
            )  # fmt: skip
            toggle.observe(
                lambda change, name=name: self.show_label(name, shown=change["new"]), "value"
            )
            self._toggles[name] = toggle
        shown = tuple(self._toggles[name] for name in self.colors if name in self._labels)
        # one label is shown by the switches of objects and detections
        self._toggle_box.children = shown if len(shown) > 1 else ()

    # -- events ---------------------------------------------------------------------------------

    def _press(self, event: MouseEvent) -> None:
        self._pressed = (
            (event.x, event.y) if event.inaxes is self.ax and event.button == 1 else None
        )

    def _release(self, event: MouseEvent) -> None:
        # whatever tool is on: what did not move is a click
        if self._pressed is None or event.inaxes is not self.ax:
            return
        if np.hypot(event.x - self._pressed[0], event.y - self._pressed[1]) > CLICK:
            return
        x, y = event.xdata, event.ydata
        if not self.on_click(x, y):
            self.click(x, y)

    @property
    def reach(self) -> float:
        """How far apart places may be on the ground and are the same to who clicks, px."""
        x0, _, x1, _ = self.view
        return CLICK * (x1 - x0) / self.ax.bbox.width

    def click(self, x: float, y: float) -> None:
        """Select the smallest box around a point (px), a detection before an object."""
        for name in ("detections", "objects"):
            row = self._layers[name].at(x, y, self.reach, self._in_view(name))
            if row is not None:
                self.select(self._layers[name].df.iloc[row], name.removesuffix("s"))
                return
        self.select(None)

    def _scroll(self, event: MouseEvent) -> None:
        if event.inaxes is self.ax:
            self.zoom(ZOOM**event.step, event.xdata, event.ydata)

    def _key(self, event: KeyEvent) -> None:
        key = event.key or ""
        if not self.on_key(key) and key in KEYS and (self.stepping or key not in "np"):
            KEYS[key](self)

    def _close(self, _event: object) -> None:
        self.on_close()
        self._timer.stop()
        self._timer.callbacks.clear()
        if self.controls is not None:
            controls, self.controls = self.controls, None
            _close_widgets(controls)


def _close_widgets(widget: object) -> None:
    for child in getattr(widget, "children", ()):
        _close_widgets(child)
    widget.close()


# What keys do
KEYS: dict[str, Callable[[Explorer], None]] = {
    "n": lambda e: e.go(1), "p": lambda e: e.go(-1), "h": Explorer.home,
    "+": lambda e: e.zoom(ZOOM), "=": lambda e: e.zoom(ZOOM), "-": lambda e: e.zoom(1 / ZOOM),
    "left": lambda e: e.pan(-0.25, 0), "right": lambda e: e.pan(0.25, 0),
    "up": lambda e: e.pan(0, -0.25), "down": lambda e: e.pan(0, 0.25),
    "o": lambda e: e.toggle_layer("objects"), "d": lambda e: e.toggle_layer("detections"),
    "e": lambda e: e.toggle_layer("errors"),
    "escape": lambda e: e.select(None),
}  # fmt: skip


def explore(
    raster: fileio.Raster | Sequence[ImageData],
    annotations: pd.DataFrame | None = None,
    detections: pd.DataFrame | None = None,
    errors: pd.DataFrame | None = None,
    score: float = 0.0,
    blocks: pd.DataFrame | None = None,
) -> Axes:
    """Explore rasters of any size: pan, zoom, objects and detections, the values of each.

    With ipympl (`use_backend`) there are controls: which raster, a score from which on detections
    are shown, buttons for objects, detections, errors and labels, the next and the previous error.
    In the figure the wheel zooms and a drag pans; a click on a box lists the values of its row; `n`
    and `p` go to the next and the previous error, on whichever raster it is, `h` shows all of the
    raster, `+`, `-` and the arrows move, `o`, `d` and `e` hide or show objects, detections and the
    marks of errors. Without ipympl it is a picture of a whole raster. Objects are thin outlines and
    detections corners, the thicker the surer, in the colour of their label, if there are several;
    where very many are in view, points. A triangle stands above each error.

    A raster is read as far as it is looked at: of overviews where it has them, otherwise coarsely
    at once and then better and better.

    Args:
        raster: The raster, or annotated ones; the one with the most errors is shown first.
        annotations: The objects of the raster: `label, xmin, ymin, xmax, ymax` (px) and whatever is
            to be seen of them. With a column `raster`, only rows of this raster are taken; so in
            the others. Annotated rasters bring their own.
        detections: The detections, with a `score`.
        errors: The rows that `n` and `p` go through, see `atlas.classify_errors`; None: the
            detections of the raster shown, by falling score.
        score: From which on detections are shown at first.
        blocks: Ground blocks; those of the test are outlined.

    Returns:
        The Axes, in px of the raster: whatever moves its limits moves the view. Its attribute
        `explorer` is the `Explorer`.

    Raises:
        InputError: A table lacks columns, or annotated rasters come with annotations beside them.
    """
    if not isinstance(raster, Sequence):
        rasters, objects = {raster.identifier: raster}, {raster.identifier: annotations}
    else:
        for name, df in (("detections", detections), ("errors", errors), ("blocks", blocks)):
            if df is not None and "raster" not in df:
                raise InputError(
                    f"{name} of several rasters need a column raster, got {list(df.columns)}"
                )
        wrong = pd.Series(dtype=str) if errors is None else errors["raster"].astype(str)
        first = sorted(raster, key=lambda image: -(wrong == image.image_identifier).sum())
        if annotations is not None or not first:
            raise InputError(
                f"annotated rasters bring their annotations; got {len(first)} rasters"
                + (" and a table of annotations; leave it out" if first else "; give one at least")
            )
        rasters = {image.image_identifier: image.raster for image in first}
        objects = {image.image_identifier: image.df for image in first}
    with_widgets = has_widgets()
    with plt.ioff() if with_widgets else nullcontext():
        explorer = Explorer(rasters, objects, detections, errors, blocks)
    explorer.set_score(score)
    explorer.ax.explorer = explorer  # lives as long as its figure; events hold it weakly
    if with_widgets:
        explorer.add_controls()
    else:
        explorer.settle(STATIC_PATIENCE)
    return explorer.ax


def has_widgets() -> bool:
    """Tell whether figures are widgets of a notebook."""
    return any(name in mpl.get_backend().lower() for name in ("ipympl", "widget"))
