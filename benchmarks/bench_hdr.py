"""HDR images: the copy that is made once, overlapping windows of it, and the logarithm.

    python benchmarks/bench_hdr.py [--short] [--sizes HEIGHT ...] [--json FILE]

Panoramas twice as wide as high: one of float in zip rows, one of half in tiles of 64 px. Windows
have 256 px and lie every 100 px, of which a run in the middle is read; "whole" decodes the image
into memory for that. The logarithm is compared with a copy of the same array in memory.
"""

from __future__ import annotations

import itertools
import os
from functools import partial
from pathlib import Path

import common
import numpy as np
import OpenImageIO as oiio  # noqa: N813

import fileio
import imutils
from ImageData import Window
from ModelConfig import HdrLogOptions

SIZE, STRIDE, WINDOWS = 256, 100, 400
TILE = 64
FILES = {"rows": ("float", None), "tiles": ("half", TILE)}


def make(folder: Path, height: int) -> None:
    """Write both images, some rows at a time."""
    width = 2 * height
    rng = np.random.default_rng(0)
    grain = rng.lognormal(0, 0.5, (SIZE, 1024, 3)).astype(np.float32)
    light = np.exp(4 * np.sin(np.arange(width) * 9 / width)).astype(np.float32)[:, None]
    for name, (kind, tile) in FILES.items():
        spec = oiio.ImageSpec(width, height, 3, kind)
        if tile:
            spec.tile_width = spec.tile_height = tile
        spec.attribute("compression", "zip")
        file = oiio.ImageOutput.create(str(folder / f"{name}.exr"))
        file.open(str(folder / f"{name}.exr"), spec)
        for top in range(0, height, SIZE):
            rows = np.tile(np.roll(grain, top // 7, axis=1), (1, width // 1024, 1)) * light
            if tile:
                file.write_tiles(0, width, top, top + SIZE, 0, 1, rows)
            else:
                file.write_scanlines(top, top + SIZE, 0, rows)
        file.close()


def _windows(height: int) -> list[Window]:
    corners = itertools.product(
        range(0, height - SIZE + 1, STRIDE), range(0, 2 * height - SIZE + 1, STRIDE)
    )
    found = [Window(x, y, SIZE, SIZE) for y, x in corners]
    first = max(0, (len(found) - WINDOWS) // 2)
    return found[first : first + WINDOWS]


def copy(name: str, folder: Path, height: int) -> common.Work:
    """Open the image for the first time, with an empty cache."""
    os.environ["LARGE_RASTER_CACHE"] = str(folder / f"cache_{os.getpid()}")
    return lambda: fileio.read_raster(folder / f"{name}.exr").width


def windows(folder: Path, height: int) -> common.Work:
    """Read windows of the copy."""
    os.environ["LARGE_RASTER_CACHE"] = str(folder / "cache")
    raster = fileio.read_raster(folder / "rows.exr")
    return lambda: float(sum(raster.read(w).sum(dtype=float) for w in _windows(height)))


def whole(folder: Path, height: int) -> common.Work:
    """Decode the image, and cut windows out of it."""

    def work() -> float:
        image = oiio.ImageBuf(str(folder / "rows.exr")).get_pixels("float").transpose(2, 0, 1)
        return float(sum(
            np.ascontiguousarray(image[:, y : y + h, x : x + w]).sum(dtype=float)
            for x, y, w, h in _windows(height)
        ))  # fmt: skip

    return work


def in_memory(options: HdrLogOptions | None, folder: Path, height: int) -> common.Work:
    """Transform an array into another, or copy it; both are in memory."""
    row = np.random.default_rng(0).lognormal(0, 2, (1, height, 1024)).astype(np.float32)
    image = np.tile(row, (3, 1, height // 512))
    out = np.zeros_like(image)

    def work() -> str:
        if options is None:
            np.copyto(out, image)
        else:
            imutils.log_transform(image, options, out=out)
        return f"{2 * image.nbytes / 1e9:.3f} GB read and written"

    work()
    return work


if __name__ == "__main__":
    common.main(
        common.Stage(
            title="HDR images",
            size="px high",
            sizes=(4096,),
            short=(1024,),
            make=make,
            ways={
                "copy, rows of float": partial(copy, "rows"),
                "copy, tiles of half": partial(copy, "tiles"),
                "windows": windows,
                "windows, whole": whole,
                "memory, copied": partial(in_memory, None),
                "memory, logarithm": partial(in_memory, HdrLogOptions()),
                "memory, split": partial(in_memory, HdrLogOptions(log_split_around1=True)),
            },
            against={
                "windows, whole": "windows",
                "memory, logarithm": "memory, copied",
                "memory, split": "memory, copied",
            },
            agree=(("windows", "windows, whole"),),
            once=("copy, rows of float", "copy, tiles of half"),
            aims=(common.Aim("memory, logarithm", "memory, copied", 0.9),),
        ),
        __doc__,
    )
