"""Pixels of high dynamic range: windows of OpenEXR and Radiance HDR files, by OpenImageIO.

A window is decoded from the tiles that it touches, or, where a file has none, from whole rows. What
is outside the pixels that a file stores is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ImageData import InputError, Window

MAGIC = {".exr": b"", ".hdr": b"#?", ".pic": b"#?"}  # ENVI and Softimage use such names, too
ROWS = 256  # px, least height of a block, and the unit of its sides
BLOCK_BYTES = 2**26  # of decoded pixels; a block is larger only where a row of files is
MAX_PIXELS = 2**34  # of the picture; a damaged header may promise any number
HALF_MAX = 65504.0


def is_hdr(path: Path) -> bool:
    """Tell by its name, and its first bytes if need be, whether a file is read by this module."""
    magic = MAGIC.get(path.suffix.lower())
    if magic is None or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


@dataclass(frozen=True)
class HdrImage:
    """An open file.

    Attributes:
        path: The file.
        width: Columns of the picture, the display window of an EXR, px.
        height: Its rows.
        channels: Names of the channels without alpha.
        stored: The pixels that the file stores, the data window of an EXR; it may reach beyond the
            picture, or leave parts of it out.
        origin: Column and row that the file's own count gives to the picture's first pixel.
        tile_hw: Height and width of the file's tiles; None: it has none.
        greatest: Largest finite value of the file's type; +inf is taken for it.
    """

    path: Path
    width: int
    height: int
    channels: tuple[str, ...]
    stored: Window
    origin: tuple[int, int]
    tile_hw: tuple[int, int] | None
    greatest: float
    _input: Any
    _taken: tuple[int, ...]  # indexes of the channels in the file

    def blocks(self) -> Iterator[Window]:
        """Yield windows that cover the picture, row by row, each cheap to read as a whole."""
        tile_h, tile_w = self.tile_hw or (ROWS, self.width)
        height, width = (-(-side // ROWS) * ROWS for side in (max(tile_h, ROWS), max(tile_w, ROWS)))
        if self.tile_hw:
            fitting = BLOCK_BYTES // (height * 4 * len(self._taken))
            width = max(width, fitting // width * width)
        for y in range(0, self.height, height):
            for x in range(0, self.width, width):
                yield Window(x, y, min(width, self.width - x), min(height, self.height - y))

    def read(self, window: Window) -> np.ndarray:
        """Read a window of the picture as float32 (channels, height, width).

        Raises:
            InputError: The file is damaged there.
        """
        image = np.full((window.height, window.width, len(self._taken)), np.nan, np.float32)
        x0, y0 = (max(a, b) for a, b in zip(window[:2], self.stored[:2], strict=True))
        x1 = min(window.x + window.width, self.stored.x + self.stored.width)
        y1 = min(window.y + window.height, self.stored.y + self.stored.height)
        if x0 < x1 and y0 < y1:
            found, left, top = self._decode(x0, y0, x1, y1)
            inner = found[y0 - top : y1 - top, x0 - left : x1 - left]
            if inner.shape[2] > len(self._taken):
                inner = inner[..., list(self._taken)]
            image[y0 - window.y : y1 - window.y, x0 - window.x : x1 - window.x] = inner
        image[image == np.inf] = self.greatest
        return image.transpose(2, 0, 1)

    def _decode(self, x0: int, y0: int, x1: int, y1: int) -> tuple[np.ndarray, int, int]:
        """Decode what holds some stored pixels; return it with its left column and top row."""
        left, top, width, height = self.stored
        count, (right, down) = max(self._taken) + 1, self.origin
        if self.tile_hw is None:
            found = self._input.read_scanlines(y0 + down, y1 + down, 0, 0, count, "float")
            x0, x1 = left, left + width
        else:
            tile_h, tile_w = self.tile_hw
            x0, y0 = left + (x0 - left) // tile_w * tile_w, top + (y0 - top) // tile_h * tile_h
            x1 = min(left + -(-(x1 - left) // tile_w) * tile_w, left + width)
            y1 = min(top + -(-(y1 - top) // tile_h) * tile_h, top + height)
            found = self._input.read_tiles(
                x0 + right, x1 + right, y0 + down, y1 + down, 0, 1, 0, count, "float"
            )
        if found is None:
            raise InputError(
                f"{self.path} cannot be read ({self.path.stat().st_size} bytes), rows {y0} to {y1}:"
                f" {_reason(self._input.geterror())}; the file may be damaged, restore it"
            )
        return found.reshape(y1 - y0, x1 - x0, count), x0, y0


@contextmanager
def open_hdr(path: Path) -> Iterator[HdrImage]:
    """Open a file of one flat picture of half or float channels, in RGB or others of full size.

    Raises:
        InputError: It is damaged, or something else: parts, deep pixels, subsampled chroma,
            integers, a turned picture.
    """
    try:
        import OpenImageIO as oiio  # noqa: N813  # few need it
    except ImportError as error:
        raise InputError(
            f"{path} is read by OpenImageIO, which is not installed: pip install openimageio"
        ) from error
    source = oiio.ImageInput.open(str(path))
    if source is None:
        raise InputError(_cannot_open(path, oiio.geterror()))
    try:
        yield _described(path, source)
    finally:
        source.close()


def _cannot_open(path: Path, error: str) -> str:
    if "ubsampled" in error:
        return (
            f"{path} stores luminance and subsampled chroma, which are not read; convert it to "
            f"RGB, for example, with an ImageMagick that knows OpenEXR: magick {path} "
            f"{path.stem}_rgb.exr"
        )
    return (
        f"{path} is not an HDR image that OpenImageIO can read ({path.stat().st_size} bytes): "
        f"{_reason(error)}; the file may be damaged, restore it"
    )


def _described(path: Path, source: Any) -> HdrImage:  # noqa: ANN401  # it may not be installed
    spec = source.spec()
    types = [str(kind) for kind in spec.channelformats or [spec.format] * spec.nchannels]
    if trouble := _trouble(source, types):
        found, cure = trouble
        raise InputError(
            f"{path} holds {found}; expected is one flat picture of half or float; {cure}"
        )
    taken = tuple(i for i in range(spec.nchannels) if i != spec.alpha_channel)
    half = {types[i] for i in taken} == {"half"}
    return HdrImage(
        path=path, width=spec.full_width, height=spec.full_height,
        channels=tuple(spec.channelnames[i] for i in taken),
        stored=Window(spec.x - spec.full_x, spec.y - spec.full_y, spec.width, spec.height),
        origin=(spec.full_x, spec.full_y),
        tile_hw=(spec.tile_height, spec.tile_width) if spec.tile_width else None,
        greatest=HALF_MAX if half else float(np.finfo(np.float32).max),
        _input=source, _taken=taken,
    )  # fmt: skip


def _trouble(source: Any, types: list[str]) -> tuple[str, str] | None:  # noqa: ANN401
    """Return what a file holds that is not read, and what to do; None: all is well."""
    spec = source.spec()
    parts, turned = (spec.get_int_attribute(n, 1) for n in ("oiio:subimages", "Orientation"))
    if spec.deep:
        return "deep pixels of several samples", "flatten it: oiiotool IN --flatten -o OUT"
    if parts > 1:
        return f"{parts} parts", "write the one wanted: oiiotool IN --subimage 0 -o OUT"
    if not set(types) <= {"half", "float"}:
        kinds = dict(zip(spec.channelnames, types, strict=True))
        return (
            f"channels of integers, which float32 would round, {kinds}",
            "write the others alone: oiiotool IN --ch R,G,B -o OUT",
        )
    if turned != 1:
        return f"a turned picture (orientation {turned})", "oiiotool IN --reorient -o OUT"
    if spec.full_width * spec.full_height > MAX_PIXELS:
        return (
            f"a picture of {spec.full_width} x {spec.full_height} px by its header",
            "the file may be damaged, restore it",
        )
    if spec.nchannels == 1 and spec.alpha_channel == 0:
        return "alpha only", "write its colours, too"
    return None


def _reason(error: str) -> str:
    return error.strip().partition("\n")[0] or "no reason is given"
