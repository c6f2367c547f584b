"""Strips of tiles: what a model makes of some rows of a raster's tiles.

Strips are predicted in any order, by any process; each is left in a journal, whole or not at all.
No batch holds tiles of two strips, so that what is found does not depend on who predicts which.
"""

from __future__ import annotations

import logging
import multiprocessing
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol, get_args
from zipfile import BadZipFile

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

import fileio
import imutils
import parallel
import tiling
from catalogue import Detections
from ImageData import InputError, Window
from LargeRasterOR import VIEWS, LargeRasterORModel, autocast, detect_views
from ModelConfig import Task, Views

log = logging.getLogger(__name__)

CPU_BATCH, GPU_BATCH = 2, 16  # tiles at once: what fits the caches; what fills the device
STRIP_WINDOWS = 64  # at least, so that a strip is worth its part of the journal


def load_model(checkpoint: Path | str, device: str = "cpu") -> pl.LightningModule:
    """Load a trained model of any task, ready to predict.

    Raises:
        InputError: The file is missing, or no checkpoint of this software.
    """
    path = Path(checkpoint)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"checkpoint {path} {found}; a run leaves its best model as best.ckpt")
    return _load_model(path, path.stat().st_mtime_ns, device)


@lru_cache(maxsize=2)  # a worker process predicts one strip after the other
def _load_model(path: Path, _mtime_ns: int, device: str) -> pl.LightningModule:
    try:
        # the weights stay on disk here; what is looked at is what the model was made with
        known = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        kind = _model_class(known["hyper_parameters"].get("task", LargeRasterORModel.TASK))
        model = kind.load_from_checkpoint(path, map_location=device, weights_only=True)
    except Exception as error:
        raise InputError(
            f"{path} ({path.stat().st_size} bytes) is not a checkpoint of a model trained here: "
            f"{(str(error) or repr(error)).splitlines()[0][:120]}; give the best.ckpt of a run"
        ) from error
    return model.to(device).eval()


def _model_class(task: str) -> type[pl.LightningModule]:
    if task == LargeRasterORModel.TASK:
        return LargeRasterORModel
    if task in get_args(Task):
        from LargeRasterSeg import LargeRasterSegModel  # detectors do without it

        return LargeRasterSegModel
    raise InputError(f"its task is {task!r}, expected one of {get_args(Task)}")


def find_devices(device: str) -> tuple[str, ...]:
    """Return the devices that a name stands for: "auto" and "cuda" are all GPUs there are.

    Raises:
        InputError: There is no such device.
    """
    gpus = tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()))
    if device == "auto":
        return gpus or (("mps",) if torch.backends.mps.is_available() else ("cpu",))
    if device == "cuda" and gpus:
        return gpus
    known = {"cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])}
    if device not in known:
        raise InputError(
            f"device {device!r} is not there, expected one of {sorted(known)}, or auto"
        )
    return (device,)


def own_device(device: str) -> str:
    """Return the one of several devices that this process is to use: local workers have numbers."""
    devices = find_devices(device)
    number = re.search(r"(\d+)$", multiprocessing.current_process().name)
    return devices[(int(number[1]) - 1 if number else 0) % len(devices)]


def batch_of(device: torch.device) -> int:
    """Return how many tiles a model on a device sees at once."""
    return CPU_BATCH if device.type == "cpu" else GPU_BATCH


class Tile(NamedTuple):
    """A tile to predict; without a window it stands for the end of its strip."""

    strip: int
    window: Window | None = None
    core: tuple[int, int, int, int] | None = None
    skipped: int = 0  # tiles of the strip that were not looked at


@dataclass
class Part:
    """What a strip left in the journal.

    Attributes:
        found: Detections that its tiles keep.
        predicted: Number of tiles that the model saw.
        empty: Number of tiles without ground that counts.
        full: Number of tiles of which the model reported as many detections as it may.
        gaps: int64 (N, 4), x, y, width, height in px: cores that could not be read.
    """

    found: Detections
    predicted: int
    empty: int
    full: int
    gaps: np.ndarray

    def write(self, path: Path) -> Path:
        """Write it, whole or not at all."""
        with fileio.atomic_path(path) as temporary, temporary.open("wb") as file:
            counts = {name: value for name, value in vars(self).items() if name != "found"}
            np.savez(file, **vars(self.found), **counts)
        return path

    @classmethod
    def read(cls, path: Path) -> Part | None:
        """Read it; None if it is not there, or damaged."""
        try:
            with np.load(path) as values:
                found = Detections(values["boxes"], values["scores"], values["ids"])
                counts = (int(values[name]) for name in ("predicted", "empty", "full"))
                return cls(found, *counts, values["gaps"])
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return None


class Pixels(NamedTuple):
    """What the model is shown of a tile.

    Attributes:
        image: float32 (bands, H, W), stretched.
        counted: bool (H, W), ground that counts.
    """

    image: np.ndarray
    counted: np.ndarray


class Collector(Protocol):
    """What gathers the tiles of one strip."""

    def add(self, tiles: Sequence[Tile], _counted: Sequence[np.ndarray], seen: object) -> None:
        """Take some tiles, in their order, where they count, and what the model made of them."""

    def finish(self, predicted: int, empty: int, gaps: np.ndarray) -> Path:
        """Leave the strip in the journal; see `Part` for what is counted."""

    def drop(self) -> None:
        """Leave nothing, for the work was stopped."""


@dataclass(frozen=True)
class TilePredictor:
    """Shows a model the tiles of a raster, strip by strip; small enough to be sent.

    What becomes of them is up to those that inherit: `_look` calls the model, `_collector` gathers.

    Attributes:
        model: The checkpoint, or the model itself.
        radiometry: How raw values become its input.
        raster: The raster, with its regions.
        journal: Folder of the parts.
        key: Names what the parts depend on, so that those of another prediction are told apart.
        tile_size: Side of the tiles, px.
        overlap: Least overlap of neighbours, px.
        precision: "32-true", "bf16-mixed" or "16-mixed".
        batch_size: Tiles that the model sees at once; None: `CPU_BATCH` or `GPU_BATCH`.
        readers: Threads that read ahead.
        device: See `find_devices`; each process takes one of those that it has.
        threads: Of the CPU, for the model; None leaves the number as it is.
    """

    model: Path | nn.Module
    radiometry: imutils.Radiometry
    raster: fileio.Raster
    journal: Path
    key: str
    tile_size: int
    overlap: int
    precision: str
    batch_size: int | None
    readers: int
    device: str
    threads: int | None

    least_rows: ClassVar[int] = 1  # of tiles, in a strip
    least_windows: ClassVar[int] = STRIP_WINDOWS
    order: ClassVar[tuple[str, str]] = ("row", "col")  # in which tiles are looked at

    @property
    def strip_rows(self) -> int:
        """Rows of tiles that form a strip; they follow from the grid alone."""
        columns = len(tiling.grid_axis(self.raster.width, self.tile_size, self.overlap)[0])
        return max(-(-self.least_windows // columns), self.least_rows)

    @property
    def strip_tops(self) -> np.ndarray:
        """Where each strip starts, px."""
        starts, _ = tiling.grid_axis(self.raster.height, self.tile_size, self.overlap)
        return starts[:: self.strip_rows]

    def part_path(self, strip: int) -> Path:
        """Return where a strip is left."""
        return self.journal / f"strip_{strip:06d}.{self.key}.npz"

    def is_done(self, strip: int) -> bool:
        """Tell whether a strip is left whole and without gaps."""
        raise NotImplementedError

    def predict_one(self, strip: int) -> Path:
        """Predict one strip, in a worker process."""
        if self.threads and multiprocessing.parent_process() is not None:
            torch.set_num_threads(self.threads)
        return next(self.predict([strip]))

    def predict(self, strips: Iterable[int]) -> Iterator[Path]:
        """Predict strips one after the other; yield the part of each as soon as it is written."""
        device = torch.device(own_device(self.device))
        size = self.batch_size or batch_of(device)
        batch, collector, predicted, empty, gaps, why = [], None, 0, 0, [], None
        try:
            for tile, content in parallel.map_threads(
                self._read, self.tiles(strips), threads=self.readers,
                ahead=self.readers + 2 * size,
            ):  # fmt: skip
                collector = collector or self._collector(tile.strip)
                match content:
                    case Pixels():
                        batch.append((tile, content))
                    case InputError():
                        why = content
                        x0, y0, x1, y1 = tile.core
                        gaps.append([x0, y0, x1 - x0, y1 - y0])
                    case int():
                        empty += content
                if len(batch) == size or (tile.window is None and batch):
                    # no batch holds tiles of two strips
                    tiles, pixels = zip(*batch, strict=True)
                    seen = self._look(self._on_device(pixels, device), device)
                    collector.add(tiles, [p.counted for p in pixels], seen)
                    predicted, batch = predicted + len(tiles), []
                if tile.window is None:
                    if gaps:
                        log.warning(
                            "strip %d has %d gaps; the last: %s", tile.strip, len(gaps), why
                        )
                    found = np.array(gaps, dtype=np.int64).reshape(-1, 4)
                    yield collector.finish(predicted, empty, found)
                    collector, predicted, empty, gaps = None, 0, 0, []
        except BaseException:
            if collector is not None:
                collector.drop()
            raise

    def tiles(self, strips: Iterable[int]) -> Iterator[Tile]:
        """Yield the tiles of strips that may hold ground that counts, and the end of each strip."""
        extent = Window(0, 0, self.raster.width, self.raster.height)
        for strip in strips:
            rows = slice(strip * self.strip_rows, (strip + 1) * self.strip_rows)
            grid = tiling.window_grid(extent, self.tile_size, self.overlap, rows)
            windows = grid[tiling.WINDOW_COLUMNS].to_numpy()
            cores = grid[tiling.CORE_COLUMNS].to_numpy()
            may = self.raster.may_count(windows)
            looked_at = np.lexsort([grid[name] for name in reversed(self.order)])
            kept = looked_at[may[looked_at]]
            for window, core in zip(windows[kept].tolist(), cores[kept].tolist(), strict=True):
                yield Tile(strip, Window(*window), tuple(core))
            yield Tile(strip, skipped=int((~may).sum()))

    def _read(self, tile: Tile) -> tuple[Tile, Pixels | InputError | int]:
        """Return the pixels of a tile, why there are none, or how many tiles are empty."""
        if tile.window is None:
            return tile, tile.skipped
        try:
            image, valid, counted = tiling.read_tile(self.raster, tile.window, 0)
        except InputError as error:
            if self.raster.files and not self.raster.path.exists():
                raise
            return tile, error
        if not counted.any():
            return tile, 1
        return tile, Pixels(self.radiometry.stretch(image, valid), counted)

    @staticmethod
    def _on_device(pixels: Sequence[Pixels], device: torch.device) -> torch.Tensor:
        images = torch.from_numpy(np.stack([p.image for p in pixels]))
        if device.type == "cuda":
            images = images.pin_memory().to(device, non_blocking=True)
        return images.to(device)

    def _model_on(self, device: torch.device) -> nn.Module:
        model = self.model
        return (model if isinstance(model, nn.Module) else load_model(model, str(device))).to(
            device
        )

    def _collector(self, strip: int) -> Collector:
        """Begin to gather a strip."""
        raise NotImplementedError

    def _look(self, images: torch.Tensor, device: torch.device) -> object:
        """Return what the model makes of images (B, bands, H, W)."""
        raise NotImplementedError


@dataclass(frozen=True)
class StripPredictor(TilePredictor):
    """Finds the objects in strips of one raster and leaves each strip in the journal.

    Attributes:
        score_threshold: Least score that counts.
        nms_threshold: IoU above which detections stand for the same object.
        views: Which views of a tile are fused, of `LargeRasterOR.VIEWS`.
        scales: Factors by which tiles are enlarged.
    """

    score_threshold: float
    nms_threshold: float
    views: Views
    scales: tuple[float, ...]

    def is_done(self, strip: int) -> bool:
        """Tell whether a strip is left whole and without gaps."""
        part = Part.read(self.part_path(strip))
        return part is not None and not len(part.gaps)

    def _collector(self, strip: int) -> _FoundInStrip:
        return _FoundInStrip(self, strip)

    def _look(
        self, images: torch.Tensor, device: torch.device
    ) -> tuple[list[Detections], list[bool]]:
        """Return what each image shows, in its px, and whether it is full."""
        model = self._model_on(device)
        # what fusing is to raise over the threshold, it must see
        least = self.score_threshold
        if self.views != "none" or len(self.scales) > 1:
            least = min(least, model.conf.test.score_threshold)
        least = float(np.nextafter(np.float32(least), -1))
        limit = model.limit_detections(self.tile_size, least)
        with torch.inference_mode(), autocast(device.type, self.precision):
            seen, most = detect_views(
                model, images, VIEWS[self.views], self.scales, least_score=self.score_threshold
            )
        return seen, [count >= limit for count in most]

    def look_at(self, tiles: Sequence[Tile], device: torch.device) -> Iterator[Detections]:
        """Return what each tile keeps, one tile after the other, in px of the raster.

        Raises:
            InputError: A tile cannot be read.
        """
        for tile in tiles:
            _, content = self._read(tile)
            if isinstance(content, InputError):
                raise content
            if isinstance(content, Pixels):
                seen, _ = self._look(self._on_device([content], device), device)
                yield self.keep(tile, seen[0])

    def keep(self, tile: Tile, found: Detections) -> Detections:
        """Return what a tile keeps of the detections on it, in px of the raster."""
        x, y, width, height = tile.window
        window = np.array([x, y, x + width, y + height])
        boxes = found.boxes + np.array([x, y, x, y])
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        size = np.array([self.raster.width, self.raster.height])
        keep = tiling.keep_detections(boxes, window, np.array(tile.core))
        keep &= (found.scores >= self.score_threshold) & (centers < size).all(axis=1)
        if self.raster.regions is not None:
            keep &= self.raster.regions.contain(*centers.T)
        boxes = imutils.clip_boxes(boxes, np.minimum(window, np.tile(size, 2)))
        keep &= imutils.box_area(boxes) > 0
        return replace(found, boxes=boxes)[keep]


class _FoundInStrip:
    """The detections of a strip's tiles."""

    def __init__(self, predictor: StripPredictor, strip: int) -> None:
        self.predictor, self.strip = predictor, strip
        self.found: list[Detections] = []
        self.full = 0

    def add(
        self,
        tiles: Sequence[Tile],
        _counted: Sequence[np.ndarray],  # the regions tell of each detection
        seen: tuple[list[Detections], list[bool]],
    ) -> None:
        detections, full = seen
        self.found += [self.predictor.keep(*pair) for pair in zip(tiles, detections, strict=True)]
        self.full += sum(full)

    def finish(self, predicted: int, empty: int, gaps: np.ndarray) -> Path:
        part = Part(Detections.concatenate(self.found), predicted, empty, self.full, gaps)
        return part.write(self.predictor.part_path(self.strip))

    def drop(self) -> None:
        self.found = []
