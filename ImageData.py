"""The nouns of the pipeline: a window, an annotated raster, and the error for bad input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import pandas as pd


BOX_COLUMNS = ["xmin", "ymin", "xmax", "ymax"]
TRUE_BOX_COLUMNS = [f"true_{name}" for name in BOX_COLUMNS]  # of what a detection is compared with
CENTER_COLUMNS = ["pixel_x", "pixel_y"]
IGNORE = 255  # in masks of class ids, where no class is known


class InputError(ValueError):
    """Input that cannot be used: the message says what, what was found, and what to do."""


class Window(NamedTuple):
    """A rectangle of a raster in pixels; (x, y) is its top-left corner."""

    x: int
    y: int
    width: int
    height: int


class RasterHandle(Protocol):
    """What the pipeline asks of a raster; `fileio.Raster` is the implementation."""

    path: Path
    width: int
    height: int
    bands: tuple[int, ...]
    band_count: int
    dtype: str
    crs: str | None
    transform: tuple[float, ...]
    resolution: float | None
    regions: Any

    def read(self, window: Window) -> np.ndarray:
        """Read a window as an array (bands, height, width)."""


class LabelSource(Protocol):
    """The class of every pixel of a raster, read window by window; it can be pickled."""

    made_from: Any

    def read(self, window: Window) -> np.ndarray:
        """Read a window as class ids, uint8 (height, width); `IGNORE` where none is known."""


@dataclass(frozen=True)
class ImageData:
    """An annotated raster: a handle to it (never its pixels), its identifier, its objects.

    Attributes:
        raster: Handle from which windows are read.
        image_identifier: Name of the raster in every table and file, unique within a run.
        df: One row per object: `pixel_x, pixel_y, diameter, label, xmin, ymin, xmax, ymax`, in
            pixels of the raster, boxes half-open.
        labels: The class of every pixel, for segmentation.
    """

    raster: RasterHandle
    image_identifier: str
    df: pd.DataFrame
    labels: LabelSource | None = None
