"""Draw the pipeline, as the notebook and the README show it: `python docs/pipeline.py`."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

HOME = Path(__file__).parent
PICTURE = HOME / "pipeline.png"
INK, STAGE, THING = "#222222", "#D6E6F4", "#F1EDE4"
SPLITS = ("#0072B2", "#E69F00", "#009E73")  # train, validation, test, as in all pictures
WIDTH, HEIGHT = 1.62, 0.8  # of a box

# name: (x, y of the centre, title, what it gives)
BOXES = {
    "annotations": (0, 2.3, "annotations", "tables, polygons"),
    "rasters": (0, 0.7, "rasters", "stay on disk"),
    "clean": (2.1, 2.3, "2 Clean", "boxes, quarantine"),
    "handles": (2.1, 0.7, "1 Rasters", "handles, windows"),
    "ground": (4.2, 1.5, "3 Ground", "blocks, before tiles"),
    "preflight": (4.2, 2.85, "4 Preflight", "checks and plan"),
    "rotate": (6.3, 2.85, "5 Rotate", "quarter turns"),
    "tile": (6.3, 1.5, "6 Tile", "a table of windows"),
    "search": (8.4, 1.5, "7 Search", "trainings, one test"),
    "results": (10.5, 2.3, "8 Results", "scores, errors"),
    "catalogue": (10.5, 0.7, "9 Catalogue", "every object, map"),
    "others": (8.4, 0.15, "other rasters", "of any size"),
}
THINGS = {"annotations", "rasters", "others"}
ARROWS = [
    ("annotations", "clean"), ("rasters", "handles"), ("clean", "ground"), ("handles", "ground"),
    ("ground", "preflight"), ("ground", "tile"), ("rotate", "tile"), ("tile", "search"),
    ("search", "results"), ("search", "catalogue"), ("others", "catalogue"),
]  # fmt: skip


def draw() -> None:
    """Write the picture; its own paper makes it readable on dark pages, too."""
    figure, ax = plt.subplots(figsize=(9.6, 2.75), layout="constrained", facecolor="white")
    ax.set(xlim=(-1.0, 11.5), ylim=(-0.4, 3.4), aspect="equal")
    ax.axis("off")
    for name, (x, y, title, gives) in BOXES.items():
        ax.add_patch(
            FancyBboxPatch((x - WIDTH / 2, y - HEIGHT / 2), WIDTH, HEIGHT,
                           boxstyle="round,pad=0,rounding_size=0.12", linewidth=0.8,
                           facecolor=THING if name in THINGS else STAGE, edgecolor=INK)
        )  # fmt: skip
        ax.text(x, y + 0.14, title, ha="center", va="center", fontsize=9, weight="bold", color=INK)
        ax.text(x, y - 0.18, gives, ha="center", va="center", fontsize=7.5, color=INK)
    x, y, *_ = BOXES["ground"]
    for i, color in enumerate(SPLITS):
        ax.add_patch(Rectangle((x - 0.6 + 0.4 * i, y - 0.62), 0.4, 0.14, color=color, linewidth=0))
    ax.text(x, y - 0.76, "train, validation, test", ha="center", va="center", fontsize=7, color=INK)
    for start, end in ARROWS:
        (x0, y0), (x1, y1) = BOXES[start][:2], BOXES[end][:2]
        if x0 == x1:
            side = HEIGHT / 2 if y0 < y1 else -HEIGHT / 2
            places = (x0, y0 + side), (x1, y1 - side)
        else:
            places = (x0 + WIDTH / 2, y0), (x1 - WIDTH / 2, y1)
        ax.add_patch(FancyArrowPatch(*places, arrowstyle="-|>", mutation_scale=9, color=INK,
                                     linewidth=0.9, shrinkA=1, shrinkB=1))  # fmt: skip
    with BytesIO() as file:
        figure.savefig(file, dpi=110)
        Image.open(file).convert("RGB").quantize(255).save(PICTURE, optimize=True)


def embed() -> None:
    """Put the picture into the notebook's first cell, so that it goes where copies go."""
    path = HOME.parent / "main.ipynb"
    notebook = nbformat.read(path, as_version=4)
    data = base64.b64encode(PICTURE.read_bytes()).decode()
    notebook.cells[0].attachments = {PICTURE.name: {"image/png": data}}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    draw()
    embed()
