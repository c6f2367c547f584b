"""A map cell: a raster of any size with the objects found in it, as they lie on the ground.

The browser only moves pictures: for the part of the map in view, Python draws the raster and the
objects at the resolution of the screen, and sends both through the widget's own connection. So the
map needs neither internet nor a server whose port a browser would have to reach, and costs as much
for a hundred thousand objects as for ten.

The map is a plane in metres, origin at the raster's centre, the y axis of its CRS upwards. Nothing
is reprojected: it is the raster's own CRS, of whatever body and projection, scaled so that metres
are true at the centre. Where there is no CRS, it is the raster in px.
"""

from __future__ import annotations

import asyncio
import base64
import html
import io
import logging
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

import fileio
import imutils
from explore import preview
from ImageData import BOX_COLUMNS, InputError, Window

if TYPE_CHECKING:
    import ipyleaflet

log = logging.getLogger(__name__)

Bounds = tuple[tuple[float, float], tuple[float, float]]  # (south, west), (north, east) in metres

MARGIN = 0.25  # of the view, drawn on each side of it, so that a short move shows no blank
PAUSE = 0.05  # s without a further move until the view is drawn
MAX_SIDE = 2048  # px of a picture, on the largest screen
OVERVIEW_SIDE = 1024  # px, of the whole raster, which is kept
MAX_READ = 2**26  # px of a raster without overviews that are read for a view
LEAST_BOX = 5  # px on the screen; what is smaller is a dot
CROWDED = 0.1  # share of the picture that dots of 3 px may cover; beyond it they are of one
CLICK = 4  # px on the screen, how near to an object a click means it
LEGEND = 8  # labels that it names
HEIGHT = 520  # px of the map cell
WIDTH = 900  # px, about the width of a cell; the browser knows better


class MapPicture:
    """A raster and its objects on a plane in metres, and pictures of any part of it.

    Attributes:
        bounds: Of the whole raster.
        colors: Label -> colour.
    """

    def __init__(self, raster: fileio.Raster, catalogue: pd.DataFrame) -> None:
        """Lay out a raster and its objects: `label` and boxes in px."""
        self.raster, self.catalogue = raster, catalogue.reset_index(drop=True)
        center = np.array([raster.width, raster.height]) / 2
        # (2, 2): a step of one px in x (first column) and in y (second), in metres east and north
        if raster.crs is None:
            self._steps = np.diag([1.0, -1.0])
        else:
            a, b, _, d, e, _ = raster.transform
            affine, scale = np.array([[a, b], [d, e]]), np.ones(2)
            if raster.resolution is not None:
                ground = raster.metres_per_pixel(center)[0]
                scale = np.linalg.norm(ground @ np.linalg.inv(affine), axis=0)
            self._steps = scale[:, None] * affine
        self._center = center
        corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * [raster.width, raster.height]
        self.bounds = _bounds_of(self.to_plane(corners))

        self.colors = imutils.label_colors(self.catalogue["label"])
        boxes = self.catalogue[BOX_COLUMNS].to_numpy(dtype=float)
        self._corners = self.to_plane(boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2))
        self._corners = self._corners.reshape(-1, 4, 2)
        self._low, self._high = self._corners.min(axis=1), self._corners.max(axis=1)
        painted = {k: tuple(bytes.fromhex(v[1:])) for k, v in self.colors.items()}
        self._paint = np.array([painted[k] for k in self.catalogue["label"]], np.uint8)
        self._paint = self._paint.reshape(-1, 3)

        self._whole = preview(raster, OVERVIEW_SIDE)
        self._limits = imutils.preview_bounds(*self._whole)

    def to_plane(self, xy: np.ndarray) -> np.ndarray:
        """Turn points (N, 2) in px into metres east and north of the raster's centre."""
        return (np.asarray(xy, dtype=float) - self._center) @ self._steps.T

    def to_pixel(self, xy: np.ndarray) -> np.ndarray:
        """Turn points (N, 2) of the plane into px of the raster."""
        return np.asarray(xy, dtype=float) @ np.linalg.inv(self._steps).T + self._center

    @property
    def pixel_side(self) -> float:
        """Side of a pixel of the raster on the plane, metres."""
        return float(np.sqrt(abs(np.linalg.det(self._steps))))

    def draw_raster(self, bounds: Bounds, size_wh: tuple[int, int]) -> np.ndarray:
        """Draw a part of the raster as uint8 (height, width, 4); what holds no data is transparent.

        The contrast is the same in all pictures. Of a raster without overviews, large parts come
        from one look at the whole.
        """
        (south, west), (north, east) = bounds
        width, height = size_wh
        picture = np.zeros((height, width, 4), np.uint8)
        across = west + (np.arange(width) + 0.5) * (east - west) / width
        down = north - (np.arange(height) + 0.5) * (north - south) / height
        inverse = np.linalg.inv(self._steps)
        x, y = (
            inverse[i, 0] * across[None] + inverse[i, 1] * down[:, None] + self._center[i]
            for i in (0, 1)
        )
        inside = (x >= 0) & (x < self.raster.width) & (y >= 0) & (y < self.raster.height)
        if not inside.any():
            return picture
        x, y = x[inside], y[inside]
        window = Window(
            int(x.min()), int(y.min()), *(int(np.ptp(v.astype(int))) + 1 for v in (x, y))
        )
        step = (east - west) / width / self.pixel_side  # px of the raster per px of the screen
        window, image, valid = self._read(window, step)
        rows = ((y - window.y) * image.shape[1] / window.height).astype(int)
        cols = ((x - window.x) * image.shape[2] / window.width).astype(int)
        shown = imutils.preview_stretch(image, valid, self._limits, light=self.raster.light)
        shown = shown if shown.ndim == 3 else np.repeat(shown[..., None], 3, axis=2)
        picture[inside, :3] = shown[rows, cols]
        picture[inside, 3] = valid[rows, cols] * np.uint8(255)
        return picture

    def _read(self, window: Window, step: float) -> tuple[Window, np.ndarray, np.ndarray]:
        whole = Window(0, 0, self.raster.width, self.raster.height)
        coarse = max(whole[2:]) / OVERVIEW_SIDE <= step
        much = not self.raster.overviews and window.width * window.height > MAX_READ
        if coarse or much:
            return whole, *self._whole
        shape = tuple(max(1, round(side / max(step, 1))) for side in (window.height, window.width))
        return window, *self.raster.read_decimated(window, shape)

    def draw_objects(self, bounds: Bounds, size_wh: tuple[int, int]) -> np.ndarray:
        """Draw the outlines of the objects in a part of the map as uint8 (height, width, 4).

        An object too small to be outlined is a dot.
        """
        (south, west), (north, east) = bounds
        scale = np.array([size_wh[0] / (east - west), -size_wh[1] / (north - south)])
        seen = (self._high >= [west, south]).all(axis=1) & (self._low <= [east, north]).all(axis=1)
        corners = (self._corners[seen] - [west, north]) * scale
        paint = self._paint[seen]
        small = np.ptp(corners, axis=1).max(axis=1, initial=0) < LEAST_BOX
        picture = np.zeros((size_wh[1], size_wh[0], 4), np.uint8)
        dots = np.floor(corners[small].mean(axis=1)).astype(int)
        crowded = 9 * len(dots) > CROWDED * picture[..., 0].size
        for step in np.ndindex((1, 1) if crowded else (3, 3)):
            x, y = (dots + step - (not crowded)).T
            inside = (x >= 0) & (x < size_wh[0]) & (y >= 0) & (y < size_wh[1])
            picture[y[inside], x[inside], :3] = paint[small][inside]
            picture[y[inside], x[inside], 3] = 255
        image = Image.fromarray(picture)
        pen = ImageDraw.Draw(image)
        for outline, color in zip(corners[~small].round(), paint[~small], strict=True):
            pen.polygon(outline.ravel().tolist(), outline=(*color.tolist(), 255), width=2)
        return np.asarray(image)

    def find(self, xy: tuple[float, float], reach: float) -> int | None:
        """Return the row of the smallest object within `reach` metres of a point of the plane."""
        point = np.asarray(xy, dtype=float)
        near = (self._low - reach <= point).all(axis=1) & (self._high + reach >= point).all(axis=1)
        rows = np.flatnonzero(near)
        sides = np.ptp(self._corners[rows], axis=1).max(axis=1, initial=0)
        return int(rows[sides.argmin()]) if len(rows) else None

    def describe(self, xy: tuple[float, float], row: int | None = None) -> str:
        """Describe an object, or else a point of the plane, as a table in HTML."""
        facts: dict[str, str] = {}
        if row is None:
            pixel = self.to_pixel([xy])
        else:
            found = self.catalogue.loc[row]
            box = found[BOX_COLUMNS].to_numpy(dtype=float)
            pixel = (box[None, :2] + box[None, 2:]) / 2
            diameter = (box[2:] - box[:2]).max()
            facts["label"] = str(found["label"])
            facts |= {"score": f"{found['score']:.3f}"} if "score" in found else {}
            facts["diameter"] = f"{diameter:.1f} px"
            if self.raster.resolution is not None:
                steps = self.raster.metres_per_pixel(pixel)
                on_ground = diameter * np.sqrt(abs(np.linalg.det(steps[0])))
                facts["diameter"] += f", {on_ground:,.4g} m"
        facts["px"] = "{:.1f}, {:.1f}".format(*pixel[0])
        if self.raster.crs is not None:
            facts["map"] = "{:.8g}, {:.8g}".format(*self.raster.to_map(pixel)[0])
        if self.raster.resolution is not None:
            facts["lon, lat"] = "{:.6f}°, {:.6f}°".format(*self.raster.to_lonlat(pixel)[0])
        cells = (f"<tr><td>{k}&ensp;</td><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
        return f"<table>{''.join(cells)}</table>"

    def legend(self, view: Bounds) -> str:
        """Name the labels with their colours, and how many objects of each are in view, in HTML."""
        (south, west), (north, east) = view
        center = (self._low + self._high) / 2
        seen = ((center >= [west, south]) & (center <= [east, north])).all(axis=1)
        counts = self.catalogue["label"][seen].value_counts()
        rows = [
            f'<tr><td style="color:{self.colors[label]}">&#9632;&ensp;</td>'
            f"<td>{html.escape(str(label))}&ensp;</td><td align=right>{counts.get(label, 0):,}</td>"
            for label in list(self.colors)[:LEGEND]
        ]
        if len(self.colors) > LEGEND:
            rows.append(f"<tr><td></td><td>and {len(self.colors) - LEGEND} labels more</td>")
        total = f"{seen.sum():,} of {len(self.catalogue):,} objects in view"
        return f'<div style="padding:2px 8px">{total}<table>{"".join(rows)}</table></div>'


def _bounds_of(xy: np.ndarray) -> Bounds:
    (west, south), (east, north) = xy.min(axis=0).tolist(), xy.max(axis=0).tolist()
    return (south, west), (north, east)


def to_url(picture: np.ndarray, *, lossless: bool = False) -> str:
    """Return a picture (height, width, 4) as a `data:` URL; lines and dots are better lossless."""
    file = io.BytesIO()
    Image.fromarray(picture).save(
        file, "webp", quality=0 if lossless else 90, method=0, lossless=lossless
    )
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def map_view(raster: fileio.Raster, catalogue: pd.DataFrame) -> ipyleaflet.Map:
    """Make a map cell of a raster and the objects found in it.

    Drag and scroll to move; layers switch off and on at the upper right; a click on an object shows
    its label, score, diameter and place, a click beside it the place.

    Args:
        raster: Of any size, type and CRS; a large one should have overviews (the doctor makes
            them).
        catalogue: `label`, boxes in px of the raster and, where known, `score`.

    Raises:
        ModuleNotFoundError: ipyleaflet is not installed.
    """
    return _Cell(MapPicture(raster, catalogue)).map


class _Cell:
    """What keeps a map and its pictures together; the map's callbacks keep it alive."""

    def __init__(self, picture: MapPicture) -> None:
        leaflet, widgets = _import_widgets()
        self._picture, self._pending = picture, None
        (south, west), (north, east) = picture.bounds
        fit = np.log2(min(WIDTH / (east - west), HEIGHT / (north - south)) * 0.95)
        overview = leaflet.ImageOverlay(name="overview", bounds=picture.bounds)
        self._raster = leaflet.ImageOverlay(name=picture.raster.path.name, bounds=picture.bounds)
        self._objects = leaflet.ImageOverlay(name="objects", bounds=picture.bounds)
        scale = OVERVIEW_SIDE / 2 / max(east - west, north - south)
        size = tuple(max(1, round(side * scale)) for side in (east - west, north - south))
        overview.url = to_url(picture.draw_raster(picture.bounds, size))
        self.map = leaflet.Map(
            crs=leaflet.projections.Simple, layers=(overview, self._raster, self._objects),
            center=(0.0, 0.0), zoom=fit, min_zoom=fit - 2,
            max_zoom=max(5 - np.log2(picture.pixel_side), fit + 1),
            zoom_snap=0, scroll_wheel_zoom=True, attribution_control=False,
            layout=widgets.Layout(height=f"{HEIGHT}px"),
        )  # fmt: skip
        self._legend, self._facts = widgets.HTML(), widgets.HTML()
        self._popup = leaflet.Popup(child=self._facts, max_width=400)
        self.map.add(leaflet.WidgetControl(widget=self._legend, position="bottomright"))
        self.map.add(leaflet.LayersControl(position="topright"))
        if picture.raster.resolution is not None:
            self.map.add(leaflet.ScaleControl(position="bottomleft", imperial=False))
        self.map.observe(self._move, ["bounds", "zoom"])
        self.map.on_interaction(self._click)
        half = np.array([HEIGHT, WIDTH]) / 2 / 2**fit
        self.draw(((-half[0], -half[1]), (half[0], half[1])))  # until the browser tells its size

    def _move(self, _change: object) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.draw(self.map.bounds)
            return
        if self._pending:
            self._pending.cancel()  # only the last of many moves is drawn
        self._pending = loop.call_later(PAUSE, lambda: self.draw(self.map.bounds))

    def draw(self, view: Bounds) -> None:
        """Draw what is in view, and somewhat more."""
        low, high = np.array(view)
        low, high = low - MARGIN * (high - low), high + MARGIN * (high - low)
        scale = 2**self.map.zoom
        height, width = (int(side) for side in ((high - low) * scale).clip(1, MAX_SIDE))
        bounds = tuple(low.tolist()), tuple(high.tolist())
        try:
            shown = self._picture.draw_raster(bounds, (width, height))
        except InputError as error:
            log.warning("%s", error)
            return
        marked = to_url(self._picture.draw_objects(bounds, (width, height)), lossless=True)
        for layer, url in ((self._raster, to_url(shown)), (self._objects, marked)):
            with layer.hold_sync():
                layer.url, layer.bounds = url, bounds
        self._legend.value = self._picture.legend(view)

    def _click(self, **event: object) -> None:
        if event.get("type") != "click":
            return
        y, x = event["coordinates"]
        row = self._picture.find((x, y), CLICK / 2**self.map.zoom)
        self._facts.value = self._picture.describe((x, y), row)
        if self._popup in self.map.layers:
            self.map.remove(self._popup)
        self._popup.location = y, x
        self.map.add(self._popup)


def _import_widgets() -> tuple[ModuleType, ModuleType]:
    try:
        import ipyleaflet
        import ipywidgets
    except ImportError:
        raise ModuleNotFoundError(
            "ipyleaflet is not installed: pip install ipyleaflet, or set INTERACTIVE = False"
        ) from None
    return ipyleaflet, ipywidgets
