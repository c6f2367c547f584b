"""The explorer: how long does a person wait, on a large raster with many boxes?

    python benchmarks/bench_explore.py [--side 65536] [--boxes 100000]

Events go to an ipympl figure as a browser sends them, and every request to draw is granted at once.
An answer counts from the event to the last picture sent, so it holds the pause in which a movement
may go on, reading, drawing and compression; only the way to the browser and back is missing. Once
with overviews, once without: there the first picture counts, as the rest comes while one looks.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib as mpl

mpl.use("module://ipympl.backend_nbagg")  # works without a browser, too

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import rasterio
from tornado.ioloop import IOLoop

sys.path.insert(0, str(Path(__file__).parent.parent))

import common

import explore
import fileio

log = logging.getLogger("bench_explore")
GRAIN = 32  # px after which the grain comes again, so that the file stays small
AIM = 0.3  # s
RUNS = 20


def write_raster(path: Path, side: int) -> None:
    """Write hills with grain, 8 bits, on the map, block row by block row."""
    rng = np.random.default_rng(0)
    grain = np.tile(rng.integers(0, 24, (GRAIN, GRAIN), dtype=np.uint8), (256 // GRAIN, 1))
    x = np.linspace(0, 40, side, dtype=np.float32)
    profile = {
        "width": side,
        "height": side,
        "count": 1,
        "dtype": "uint8",
        "num_threads": "all_cpus",
    }
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(1, 0, 4e5, 0, -1, 5.6e6)}
    grain = np.tile(grain, (1, side // GRAIN))
    with fileio.create_raster(path, **profile, **place) as dst:
        for top in range(0, side, 256):
            ground = (110 + 100 * np.sin(x) * np.cos(40 * top / side)).astype(np.uint8)
            dst.write(grain + ground, 1, window=((top, top + 256), (0, side)))


def draw_boxes(side: int, count: int) -> pd.DataFrame:
    """Draw boxes of 10 labels with scores."""
    rng = np.random.default_rng(1)
    boxes = common.draw_boxes(side, count, 60)
    return boxes.assign(label=rng.integers(0, 10, count).astype(str), score=rng.random(count))


class Browser:
    """What a browser does, but for showing it: sends events, asks for pictures."""

    def __init__(self, explorer: explore.Explorer) -> None:
        """Answer the figure's requests to draw."""
        self.explorer, self.canvas, self.pictures = explorer, explorer.figure.canvas, 0
        self.canvas.syncing_data_url, self._asked = False, False
        self.canvas.send_event = self._on_event  # instead of a message
        self.canvas.send_binary = self._on_picture

    def _on_event(self, kind: str, **_content: object) -> None:
        if kind == "draw" and not self._asked:
            self._asked = True
            IOLoop.current().add_callback(self._ask)

    def _ask(self) -> None:
        self._asked = False
        self.canvas.manager.handle_json({"type": "draw"})

    def _on_picture(self, _data: bytes) -> None:
        self.pictures += 1

    def mouse(self, kind: str, x: float, y: float, **more: object) -> None:
        """Send an event at a place of the figure, px from its upper left corner."""
        event = {
            "type": kind,
            "x": x,
            "y": y,
            "button": 0,
            "buttons": 1,
            "modifiers": [],
            "step": 0,
        }
        self.canvas.manager.handle_json(event | more)

    async def measure(self, act: Callable[[], None], *, first: bool = False) -> tuple[float, float]:
        """Return the seconds until what follows an act was drawn, or the first of it.

        They are those that pass, and those in which this process computes; others may need it, too.
        """
        start, busy, before = time.perf_counter(), time.process_time(), self.pictures
        act()
        while self.pictures == before or (not first and (self.explorer.busy or self._asked)):
            await asyncio.sleep(0.001)
        return time.perf_counter() - start, time.process_time() - busy


def interactions(browser: Browser) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield what a person does, and its name, `RUNS` times each."""
    explorer, rng = browser.explorer, np.random.default_rng(2)
    width, height = explorer.figure.bbox.size
    middle = 0.4 * width, 0.5 * height
    slider, toggle = browser.slider, browser.toggle

    def drag() -> None:
        to = middle[0] + rng.integers(-150, 150), middle[1] + rng.integers(-150, 150)
        browser.mouse("button_press", *middle)
        browser.mouse("motion_notify", *to)
        browser.mouse("button_release", *to)

    def click() -> None:
        x0, y0, x1, y1 = explorer.view
        boxes = explorer.detections.boxes
        centers = np.concatenate(
            [(boxes[:, :2] + boxes[:, 2:]) / 2, [[(x0 + x1) / 2, (y0 + y1) / 2]]]
        )
        inside = ((centers > [x0, y0]) & (centers < [x1, y1])).all(axis=1)
        x, y = explorer.ax.transData.transform(centers[rng.choice(np.flatnonzero(inside))])
        browser.mouse("button_press", x, height - y)
        browser.mouse("button_release", x, height - y)

    for turn in range(RUNS):
        side = explorer.ground.raster.width / 2 ** (turn % 8)
        x, y = rng.uniform(0.3, 0.7, 2) * explorer.ground.raster.width
        yield "jump", lambda x=x, y=y, side=side: explorer.look_at(x, y, side, side)
        yield "wheel", lambda: browser.mouse("scroll", *middle, step=1)
        yield "drag", drag
        yield "score", lambda: setattr(slider, "value", round(float(rng.uniform(0, 0.6)), 2))
        yield "label", lambda: setattr(toggle, "value", not toggle.value)
        yield "click", click
        yield (
            "key n",
            lambda: browser.canvas.manager.handle_json({"type": "key_press", "key": "kn"}),
        )
        yield (
            "key h",
            lambda: browser.canvas.manager.handle_json({"type": "key_press", "key": "kh"}),
        )


def find(widget: object, kind: str) -> object:
    """Return the first widget of a kind below another."""
    if type(widget).__name__ == kind:
        return widget
    found = (find(child, kind) for child in getattr(widget, "children", ()))
    return next((child for child in found if child is not None), None)


async def measure(path: Path, boxes: pd.DataFrame, *, first: bool) -> pd.DataFrame:
    """Open a raster and go through the interactions; seconds by interaction."""
    raster = fileio.read_raster(path)
    objects = boxes.drop(columns="score").sample(frac=0.9, random_state=0)
    start = time.perf_counter()
    explorer = explore.explore(raster, objects, boxes).explorer
    browser = Browser(explorer)
    await browser.measure(explorer.figure.canvas.draw_idle, first=True)
    opened = time.perf_counter() - start
    log.info("%s: opened after %.2f s", path.name, opened)
    browser.slider = find(explorer.controls, "FloatSlider")
    browser.toggle = find(explorer.controls, "ToggleButton")
    seconds: dict[str, list[tuple[float, float]]] = {}
    for name, act in interactions(browser):
        seconds.setdefault(name, []).append(await browser.measure(act, first=first))
    table = {name: np.transpose(found) for name, found in seconds.items()}
    plt.close(explorer.figure)
    return pd.DataFrame({
        name: {"raster": path.name, "of": len(waited), "median_s": np.median(waited),
               "worst_s": waited.max(), "computing_median_s": np.median(computed),
               "computing_worst_s": computed.max(), "reached": waited.max() < AIM}
        for name, (waited, computed) in table.items()
    }).T  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=65536)
    parser.add_argument("--boxes", type=int, default=100_000)
    parser.add_argument("--work", type=Path, help="keep the rasters in this folder")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    boxes = draw_boxes(args.side, args.boxes)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary)
        plain, overviews = folder / "plain.tif", folder / "overviews.tif"
        if not plain.exists():
            write_raster(plain, args.side)
        if not overviews.exists():
            fileio.rewrite(plain, overviews)
        tables = [
            IOLoop.current().run_sync(lambda p=p, f=f: measure(p, boxes, first=f))
            for p, f in ((overviews, False), (plain, True))
        ]
    table = pd.concat(tables)
    title = f"{args.side} x {args.side} px, {args.boxes} boxes and detections"
    log.info("%s\n%s", title, table.to_string(float_format=lambda value: f"{value:.3f}"))
    if args.json:
        rows = table.reset_index(names="interaction").to_dict("records")
        fileio.write_json(args.json, {"machine": common.machine(), "rows": rows})


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
