"""The nouns of the pipeline: a window, an annotated raster, and the error for bad input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    import pandas as pd


BOX_COLUMNS = ["xmin", "ymin", "xmax", "ymax"]
TRUE_BOX_COLUMNS = [f"true_{name}" for name in BOX_COLUMNS]  # of what a detection is compared with
CENTER_COLUMNS = ["pixel_x", "pixel_y"]
SPLITS = ("train", "validation", "test")  # of blocks of ground
IGNORE = 255  # in masks and maps of classes: nothing is known of the pixel, or it does not count


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
    original: RasterHandle | None
    pixel_size_xy: tuple[float, float]
    regions: Any

    def read(self, window: Window) -> np.ndarray:
        """Read a window as an array (bands, height, width)."""


class ClassNames(Protocol):
    """What the pipeline asks of a table of classes; `masks.ClassTable` is the implementation."""

    names: tuple[str, ...]
    values: Mapping[str, int]
    background: int | None
    ignored: int | None


class LabelSource(Protocol):
    """The class of every pixel of a raster, on demand; `masks.read_labels` makes them.

    Attributes:
        classes: The table of the classes, the same for all rasters of a run.
        made_from: What a result that was made from these labels depends on, for manifests.
    """

    classes: ClassNames
    made_from: dict[str, object]

    def read(self, window: Window, counted: np.ndarray | None = None) -> np.ndarray:
        """Read the class ids of a window, uint8 (height, width), `IGNORE` where none is known.

        Args:
            window: Any window; off the raster nothing is known.
            counted: bool (height, width), where it is known already, which pixels of the raster are
                ground that counts; None looks itself.
        """


@dataclass(frozen=True)
class ImageData:
    """An annotated raster: a handle to it (never its pixels), its identifier, its objects.

    Attributes:
        raster: Handle from which windows are read.
        image_identifier: Name of the raster in every table and file, unique within a run.
        df: One row per object: `pixel_x, pixel_y, diameter, label, xmin, ymin, xmax, ymax`, in
            pixels of the raster, boxes half-open. For segmentation the polygons, with `geometry`
            (px); empty where labels are a mask raster.
        labels: For segmentation, the class of every pixel.
    """

    raster: RasterHandle
    image_identifier: str
    df: pd.DataFrame
    labels: LabelSource | None = None
