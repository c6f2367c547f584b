"""Whole rasters: the catalogue of every object in them, or the map of their classes.

A raster is covered with overlapping tiles, whose rows form strips. What the tiles of a strip find
is left in a journal beside the output, so that a prediction that was stopped goes on; strips may be
predicted in any order, by any number of processes or machines. They are merged from top to bottom,
and the catalogue or the map takes its name when it is complete. What the model was trained for
decides which of them is made.

python predict.py RASTER --checkpoint runs/quickstart/best.ckpt --output catalogue.gpkg
python predict.py RASTER --checkpoint runs/landcover/best.ckpt --output map.tif regions.gpkg
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import pandas as pd
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated
from torch import nn

import annotations
import catalogue
import fileio
import imutils
import maps
import masks
import parallel
import strips
import tiling
from catalogue import Detections
from ImageData import InputError, Window
from LargeRasterOR import LargeRasterORModel, __version__, resolve_precision
from ModelConfig import AuxiliaryOptions, Geometry, Positive, Precision, Share, Views
from ModelConfig import Task as TaskName
from networks import DataContract

log = logging.getLogger(__name__)

DETECTION, SEGMENTATION = get_args(TaskName)
RADIOMETRIC_TOLERANCE = 3.0  # standard deviations of the training pixels
CHECKS = ("bands", "dtype", "resolution", "radiometry")
Scale = Annotated[float, Field(ge=0.1, le=8)]
MANIFEST = "manifest.json"
CHUNK = 20_000  # objects written at once: larger ones write faster, but take more memory
TASK_OPTIONS = {  # of `PredictionOptions`, those that only one task has
    DETECTION: ("score_threshold", "scales", "geometry", "density_cell"),
    SEGMENTATION: (
        "smooth_prediction", "probabilities", "uncertainty", "overlay", "least_area", "colormap",
    ),
}  # fmt: skip
BESIDE = {  # further files, named after the first output
    DETECTION: ("density",), SEGMENTATION: ("probabilities", "uncertainty", "overlay"),
}  # fmt: skip
MAP_SUFFIXES, POLYGON_SUFFIXES = (".tif", ".tiff", maps.PNG), (".gpkg", ".geojson", ".parquet")
FAILED, INCOMPLETE, INTERRUPTED = 1, 3, 130  # exit codes; 0: complete, 2: not understood


# ---------------------------------------------------------------------------------------------
# What fits a model
# ---------------------------------------------------------------------------------------------


def open_raster(
    path: Path | str,
    contract: DataContract,
    *,
    resolution_tolerance: float | None = 0.2,
    resample: bool = False,
    bands: Sequence[int] | None = None,
    override: Collection[str] = (),
    region_paths: tuple[Path | None, Path | None] = (None, None),
    aux_vector_file: Path | str | None = None,
    seed: int = 0,
) -> fileio.Raster:
    """Open a raster for a model, with the bands it was trained on, auxiliary ones included.

    Args:
        path: File or address.
        contract: Of the model, see `LargeRasterORModel.contract`.
        resolution_tolerance: Largest relative difference of the ground resolutions; None allows
            any. It cannot be checked where the raster or the training data have no CRS.
        resample: Read the raster in pixels of the training's size.
        bands: One-based indexes of the bands to read, in the model's order; None: the training's.
        override: Checks to leave out, of `CHECKS`.
        region_paths: Files of the area of interest and of ignored regions; pixels outside them are
            not compared.
        aux_vector_file: Of the shapes on this raster, where the model reads a band of them.
        seed: Of the sample of pixels whose range is compared.

    Raises:
        InputError: It cannot be opened, or breaks the contract: the number of bands or their type
            differ, the vector file is missing or needless, the resolution is off, or, after the
            model's stretch, a band's median is more than `RADIOMETRIC_TOLERANCE` standard
            deviations from the mean of the training pixels.
    """
    if strangers := sorted(set(override) - set(CHECKS)):
        raise InputError(f"override names {strangers}, which are no checks; there are {CHECKS}")
    if bands is None and contract.mixed_bands:
        raise InputError(
            f"the model was trained on files of which different bands were read; say which of "
            f"{path} are its {len(contract.bands)} bands, in their order (--bands, bands=)"
        )
    if bands is not None and len(bands) != len(contract.bands):
        raise InputError(f"the model reads {len(contract.bands)} bands, got bands {list(bands)}")
    try:
        raster = fileio.read_raster(path, bands or contract.bands)
    except InputError as error:
        if "BANDS" not in str(error):
            raise
        raise InputError(f"{path} cannot give the bands that the model reads: {error}") from error
    if resample:
        if contract.resolution is None:
            raise InputError(
                "the model's training had no coordinate reference system, so that --resample has "
                "no size of pixels to go to; leave it out"
            )
        raster = fileio.resampled(raster, contract.resolution)
    raster = raster.with_regions(annotations.read_regions(*region_paths, raster, "auto"))
    broken = {}
    if raster.band_count != contract.band_count and bands is None:
        broken["bands"] = f"it has {raster.band_count} bands, training had {contract.band_count}"
    if raster.dtype != contract.dtype:
        broken["dtype"] = f"its pixels are {raster.dtype}, training had {contract.dtype}"
    raster = masks.with_auxiliary_bands(
        raster, _auxiliary_options(contract.auxiliary, aux_vector_file, path)
    )
    trained, found = contract.resolution, raster.resolution
    if trained and found and resolution_tolerance is not None:
        least, most = contract.resolution_range or (trained, trained)
        if not least / (1 + resolution_tolerance) <= found <= most * (1 + resolution_tolerance):
            told = " to ".join(dict.fromkeys(f"{side:.4g}" for side in (least, most)))
            broken["resolution"] = (
                f"its pixels are {found:.4g} m wide, in training they were {told} m "
                f"(RESOLUTION_TOLERANCE {resolution_tolerance:g}); --resample (resample=True) "
                f"reads it in pixels of {trained:.4g} m"
            )
    elif (trained or found) and resolution_tolerance is not None:
        which = path if trained else "the model's training"
        log.warning("%s: resolutions cannot be compared, for %s had no CRS", path, which)
    if "radiometry" not in override:
        broken |= _compare_radiometry(raster, contract, seed)
    broken = {name: text for name, text in broken.items() if name not in override}
    if broken:
        raise InputError(
            f"{path} is not what the model was trained on: {'; '.join(broken.values())}. Convert "
            f"it, or override the check{'s' if len(broken) > 1 else ''} {sorted(broken)} if you "
            f"know better (--override {' '.join(sorted(broken))})"
        )
    return raster


def _auxiliary_options(
    trained: AuxiliaryOptions | None, file: Path | str | None, raster: Path | str
) -> AuxiliaryOptions | None:
    """Return the training's options, with the file of shapes on another raster."""
    if trained is None or trained.aux_vector_file is None:
        if file is not None:
            raise InputError(
                f"the model reads no band that is made of a vector file, got {file}; leave "
                "aux_vector_file (--aux-vector-file) out"
            )
        return trained
    if file is None:
        kind = "distances to" if trained.aux_vector_dist_maps else "a map of"
        some = ""
        if trained.aux_vector_ids is not None:
            some = f" whose {trained.aux_vector_attrib} is in {list(trained.aux_vector_ids)}"
        raise InputError(
            f"the model reads, beside the raster's bands, {kind} shapes{some}, in training of "
            f"{trained.aux_vector_file}; give the vector file of those on {raster}: "
            "aux_vector_file (--aux-vector-file)"
        )
    return replace(trained, aux_vector_file=file)


def _compare_radiometry(raster: fileio.Raster, contract: DataContract, seed: int) -> dict[str, str]:
    sample = partial(
        tiling.sample_pixels, rasters={raster.identifier: raster}, seed=seed, max_windows=32
    )
    try:
        pixels = sample(_cells(raster, 1))
    except InputError:  # hardly any ground, or a damaged place
        try:
            pixels = sample(_cells(raster, 64))
        except InputError as error:
            log.warning("%s: typical values were not compared: %s", raster.path, error)
            return {}
    radiometry = contract.radiometry
    median = np.median(radiometry.stretch(pixels[:, None])[:, 0], axis=1)
    off = np.abs(median - radiometry.mean) / radiometry.std
    if (off <= RADIOMETRIC_TOLERANCE).all():
        return {}
    worst = int(off.argmax())
    return {
        "radiometry": f"the median of band {raster.bands[worst]} is "
        f"{np.median(pixels[worst]):.4g}, {off[worst]:.1f} standard deviations from the mean of "
        "the training pixels"
    }


def _cells(raster: fileio.Raster, count: int) -> pd.DataFrame:
    """Cut a raster into at most `count` x `count` equal cells; return those that may count."""
    side = max(-(-max(raster.width, raster.height) // count), 128)
    grid = tiling.window_grid(Window(0, 0, raster.width, raster.height), side)
    grid = grid[raster.may_count(grid[tiling.WINDOW_COLUMNS].to_numpy())]
    width, height = grid["core_xmax"] - grid["x"], grid["core_ymax"] - grid["y"]
    return grid.assign(raster=raster.identifier, width=width, height=height)


# ---------------------------------------------------------------------------------------------
# What is wanted
# ---------------------------------------------------------------------------------------------


@validated(config=ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True))
class PredictionOptions:
    """How a raster is predicted.

    Attributes:
        tile_size: Side of the tiles in px; None takes the training's.
        overlap: Minimum overlap of neighbouring tiles in px; None takes the longest side of any
            object of the training, at most half a tile; for a map at least an eighth of a tile.
        batch_size: Tiles that the model sees at once; None: 2 on a CPU, 16 on a GPU.
        precision: See `resolve_precision`; "auto" takes bfloat16 where the hardware has it.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        score_threshold: Least score of an object (0-1); None takes the one that validation chose.
        aoi: File of polygons outside which nothing is predicted.
        ignore: File of polygons inside which nothing is predicted.
        aux_vector_file: Of a model that was trained with a band made of shapes, those on this
            raster.
        views: Turned and mirrored views of each tile that are fused, of `LargeRasterOR.VIEWS`; None
            takes those that the model was measured with.
        scales: Factors (0.1-8) by which tiles are enlarged; what several show is fused, too.
        geometry: "box", or "circle" around the centre, in the files that hold polygons.
        density_cell: Side in px of the cells of a density map, written beside the first output with
            the ending `_density.tif`; None: no map.
        smooth_prediction: Of a map: blend overlapping tiles; otherwise each pixel is taken from the
            tile whose core owns it. None: blend.
        probabilities: Of a map: write the probability of each class, as a GeoTIFF of bytes beside
            the map with the ending `_probabilities.tif`; 0 to 254 stand for 0 to 1, 255 is nodata.
        uncertainty: Of a map: write how much overlapping tiles disagree, likewise with the ending
            `_uncertainty.tif`: the root of the weighted variances of all classes' probabilities.
        overlay: Of a map: how much of a picture, 0-1, the colours of the classes but the background
            are over the raster, written likewise with the ending `_overlay.tif`, beside a PNG
            `_overlay.png`. None: no picture.
        least_area: Of a map: smaller regions are left out of the files of polygons, px.
        colormap: Of a map: CSV of value, name and colour of its classes.
        readers: Threads that read ahead.
        workers: Processes that share the strips; None: one for each GPU in use, or one.
        scheduler: Address of a Dask scheduler whose workers share the strips.
        resume: Leave an output that is complete as it is.
        overwrite: Replace outputs that exist, and drop what a differing call left unfinished.
        override: Checks of `open_raster` to leave out.
        resolution_tolerance: See `open_raster`.
        resample: Likewise.
        bands: Likewise.
    """

    tile_size: Annotated[int, Field(ge=32)] | None = None
    overlap: Annotated[int, Field(ge=0)] | None = None
    batch_size: Positive | None = None
    precision: Precision = "auto"
    device: str = "auto"
    score_threshold: Share | None = None
    aoi: Path | None = None
    ignore: Path | None = None
    aux_vector_file: Path | None = None
    views: Views | None = None
    scales: Annotated[tuple[Scale, ...], Field(min_length=1)] = (1.0,)
    geometry: Geometry = "box"
    density_cell: Positive | None = None
    smooth_prediction: bool | None = None
    probabilities: bool = False
    uncertainty: bool = False
    overlay: Share | None = None
    least_area: Positive = 1
    colormap: Path | None = None
    readers: Positive = 2
    workers: Positive | None = None
    scheduler: str | None = None
    resume: bool = False
    overwrite: bool = False
    override: tuple[str, ...] = ()
    resolution_tolerance: Annotated[float, Field(ge=0)] | None = 0.2
    resample: bool = False
    bands: tuple[Positive, ...] | None = None


def options_of(
    values: dict[str, object], task: str | None = None, checkpoint: Path | str | None = None
) -> PredictionOptions:
    """Check options of a prediction, long before it begins.

    Args:
        values: Names and values.
        task: Of the model; None: not known yet.
        checkpoint: The model, if it is there already.

    Raises:
        InputError: An option is unknown, or of another task, or its value out of range; the
            checkpoint is none, or of another task.
    """
    try:
        wanted = TypeAdapter(PredictionOptions).validate_python(values)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}"
            for e in error.errors()
        ]
        raise InputError(f"options of the prediction: {'; '.join(lines)}") from None
    if task is not None:
        _check_options(wanted, task)
    if wanted.colormap:
        fileio.read_colormap(wanted.colormap)
    if (
        task is not None
        and checkpoint is not None
        and (model := strips.load_model(checkpoint)).TASK != task
    ):
        raise InputError(
            f"{checkpoint} is a model of {model.TASK}, but TASK is {task!r}; PREDICT_FROM must "
            "name one of the same task"
        )
    return wanted


def _check_options(wanted: PredictionOptions, task: str) -> None:
    """Refuse what the task does not have."""
    defaults = PredictionOptions()
    other = next(name for name in TASK_OPTIONS if name != task)
    strange = [n for n in TASK_OPTIONS[other] if getattr(wanted, n) != getattr(defaults, n)]
    if strange:
        raise InputError(
            f"{', '.join(strange)}: the checkpoint is for {task}, which has no such option (it is "
            f"of {other}); leave it out"
        )


# ---------------------------------------------------------------------------------------------
# A raster from header to catalogue
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """What came of predicting a raster.

    Attributes:
        raster: The raster.
        outputs: The files that hold the catalogue or the map.
        provenance: The record of how it was made.
        objects: Label -> number of objects, or of the regions that a map's polygons outline.
        predicted: Number of tiles that the model saw.
        empty: Number of tiles without ground that counts.
        gaps: Ground that could not be read: `x, y, width, height`, px.
        seconds: Time that this call took.
        pixels: Label -> number of pixels, of a map.
    """

    raster: fileio.Raster = field(repr=False)
    outputs: tuple[Path, ...]
    provenance: Path
    objects: dict[str, int]
    predicted: int
    empty: int
    gaps: pd.DataFrame
    seconds: float
    pixels: dict[str, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of all objects."""
        return sum(self.objects.values())

    @property
    def complete(self) -> bool:
        """Whether all of the raster was read."""
        return self.gaps.empty


@dataclass(frozen=True)
class Task:
    """A prediction that was checked and can begin."""

    predictor: strips.TilePredictor
    labels: tuple[str, ...]
    outputs: tuple[Path, ...]
    options: PredictionOptions
    plan: dict[str, object]  # what the detections depend on

    @property
    def provenance(self) -> Path:
        """Where the record of the result goes."""
        return self.outputs[0].with_name(f"{self.outputs[0].name}.provenance.json")

    @property
    def files(self) -> list[Path]:
        """All files that it leaves."""
        return [*self.outputs, self.provenance, *self.further]

    @property
    def further(self) -> list[Path]:
        """Files beside the outputs, named after the first."""
        raise NotImplementedError

    @property
    def form(self) -> dict[str, object]:
        """What is written, and how."""
        raise NotImplementedError

    def merge(self, made: Iterator[int]) -> dict[str, object]:
        """Write the outputs from top to bottom; return what they hold, for the record.

        Args:
            made: Comes to its next item when the next strip is there, in order.
        """
        raise NotImplementedError


class DetectionTask(Task):
    """The catalogue of a raster."""

    predictor: strips.StripPredictor

    @property
    def density(self) -> Path | None:
        """Where the density map goes, if there is to be one."""
        return _beside(self.outputs[0], "density") if self.options.density_cell else None

    @property
    def further(self) -> list[Path]:
        """Files beside the outputs, named after the first."""
        return [self.density] if self.density else []

    @property
    def form(self) -> dict[str, object]:
        """What is written of the detections, and how."""
        names = [str(path) for path in self.outputs]
        wanted = self.options
        return {"outputs": names, "geometry": wanted.geometry, "density_cell": wanted.density_cell}

    def merge(self, made: Iterator[int]) -> dict[str, object]:
        """Write the catalogue; see `Task`."""
        predictor, raster = self.predictor, self.predictor.raster
        tops = predictor.strip_tops
        counts, gaps = {"predicted": 0, "empty": 0, "full": 0}, []
        numbers = np.zeros(len(self.labels), dtype=np.int64)
        front, certain = catalogue.SeamFront(predictor.nms_threshold), []
        cell = self.options.density_cell
        density = catalogue.DensityMap(raster, cell) if cell else None
        with ExitStack() as stack:
            appends = [
                stack.enter_context(
                    fileio.annotation_writer(path, raster, self.labels, shape=self.options.geometry)
                )
                for path in self.outputs
            ]
            for strip, next_y in zip(made, [*tops[1:], np.inf], strict=True):
                part = strips.Part.read(predictor.part_path(strip))
                certain.append(front.push(part.found, next_y))
                counts = {name: number + getattr(part, name) for name, number in counts.items()}
                gaps += part.gaps.tolist()
                if sum(map(len, certain)) < CHUNK and strip < len(tops) - 1:
                    continue
                found, certain = Detections.concatenate(certain), []
                numbers += np.bincount(found.ids, minlength=len(numbers))
                for start in range(0, max(len(found), 1), CHUNK):  # no row is a chunk, too
                    df = catalogue.to_table(found[start : start + CHUNK], self.labels, raster)
                    for append in appends:
                        append(df)
                    if density is not None:
                        density.add(df)
        if density is not None:
            density.write(self.density)
        objects = dict(zip(self.labels, numbers.tolist(), strict=True))
        return {"gaps": gaps, "objects": objects, **counts}


class MapTask(Task):
    """The class map of a raster."""

    predictor: maps.MapPredictor

    @property
    def map_files(self) -> maps.MapFiles:
        """What is written of the map."""
        path, wanted = self.outputs[0], self.options
        return maps.MapFiles(
            path, self.outputs[1:],
            _beside(path, "probabilities") if wanted.probabilities else None,
            _beside(path, "uncertainty") if wanted.uncertainty else None,
            None if wanted.overlay is None else _beside(path, "overlay"), wanted.overlay or 0.0,
            wanted.least_area, *_names_and_colors(self.labels, wanted),
            masks.ClassTable(self.labels, {}).background,
        )  # fmt: skip

    @property
    def further(self) -> list[Path]:
        """Files beside the outputs, named after the first."""
        files = self.map_files
        paths = (files.probabilities, files.uncertainty, files.overlay)
        return [path for path in paths if path is not None]

    @property
    def form(self) -> dict[str, object]:
        """What is written of the map, and how."""
        files = self.map_files
        return {
            "outputs": [str(path) for path in self.outputs],
            "further": [str(path) for path in self.further],
            "least_area": files.least_area,
            "classes": [list(pair) for pair in zip(files.names, files.colors, strict=True)],
        } | ({"opacity": files.opacity} if files.overlay else {})

    def merge(self, made: Iterator[int]) -> dict[str, object]:
        """Write the map and what goes with it; see `Task`."""
        numbers = {"predicted": 0, "empty": 0}
        gaps: list[list[int]] = []

        def counted() -> Iterator[int]:
            for strip in made:
                counts = self.predictor.read_counts(strip)
                for name in numbers:
                    numbers[name] += int(counts[name])
                gaps.extend(counts["gaps"].tolist())
                yield strip

        found = maps.write_map(self.predictor, self.map_files, counted())
        return {"gaps": gaps, **found, **numbers}


def _names_and_colors(
    labels: Sequence[str], wanted: PredictionOptions
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what the classes of a map are called and how they are painted."""
    known = fileio.read_colormap(wanted.colormap) if wanted.colormap else {}
    return maps.name_colors(labels, known, imutils.class_colors(labels))


def _beside(output: Path, what: str) -> Path:
    # a picture is a picture beside a picture
    suffix = ".png" if what == "overlay" and output.suffix.lower() == ".png" else ".tif"
    return output.with_name(f"{output.stem}_{what}{suffix}")


def predict_raster(
    checkpoint: Path | str | nn.Module,
    raster: Path | str,
    outputs: Path | str | Sequence[Path | str],
    *,
    progress: bool = False,
    **options: object,
) -> Prediction:
    """Find every object of a raster, or the class of every pixel, and write the catalogue or map.

    The call goes on where an earlier one with the same model, raster and options was stopped; its
    journal lies beside the first output, and is deleted when that is complete.

    Args:
        checkpoint: A checkpoint, or a model, which is put into evaluation mode, on the device, and
            keeps the limits that the prediction sets; several processes get copies of it.
        raster: File or address.
        outputs: Files to write, of any suffix that `fileio.write_annotations` knows; of a map first
            the GeoTIFF or PNG of class ids, and perhaps files for the polygons of its regions. A
            file named as the first one and `.provenance.json` tells how they were made.
        progress: Show a bar.
        options: See `PredictionOptions`.

    Raises:
        InputError: Before any long work, if something does not fit, or an output exists.
    """
    return run(prepare(checkpoint, raster, outputs, **options), progress=progress)


def predict_window(
    model: nn.Module, raster: fileio.Raster, window: Window
) -> pd.DataFrame | np.ndarray:
    """Predict a part of a raster, to look at.

    Args:
        model: Ready to predict, see `strips.load_model`.
        raster: Opened for the model, see `open_raster`.
        window: The part, px, held whole; objects belong to it by their centres.

    Returns:
        Of a detector, see `catalogue.to_table`; else class ids, see `maps.classify_window`.

    Raises:
        InputError: The model was never validated, or the raster cannot be read.
    """
    if model.TASK == SEGMENTATION:
        return maps.classify_window(model, raster, window)
    contract, wanted = model.contract, PredictionOptions()
    device = next(model.parameters(), torch.empty(0)).device
    predictor = strips.StripPredictor(
        model=model, radiometry=contract.radiometry, raster=raster, journal=Path(), key="",
        precision="32-true", batch_size=None, readers=1, device=str(device), threads=None,
        **_grid_settings(contract, wanted, DETECTION), **_detection_settings(model, wanted, ()),
    )  # fmt: skip
    margin = predictor.overlap  # so that objects at the edge are seen whole
    x0, y0 = max(window.x - margin, 0), max(window.y - margin, 0)
    x1 = min(window.x + window.width + margin, raster.width)
    y1 = min(window.y + window.height + margin, raster.height)
    seen = Window(x0, y0, x1 - x0, y1 - y0)
    grid = tiling.window_grid(seen, predictor.tile_size, predictor.overlap)
    columns = [*tiling.WINDOW_COLUMNS, *tiling.CORE_COLUMNS]
    tiles = [strips.Tile(0, Window(*row[:4]), tuple(row[4:])) for row in grid[columns].to_numpy()]
    found = Detections.concatenate(list(predictor.look_at(tiles, device)))
    found = catalogue.SeamFront(predictor.nms_threshold).push(found, np.inf)
    low, high = np.array(window[:2]), np.array(window[:2]) + window[2:]
    centers = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2
    inside = ((centers >= low) & (centers < high)).all(axis=1)
    return catalogue.to_table(found[inside], model.labels, raster)


def prepare(
    checkpoint: Path | str | nn.Module,
    raster: Path | str,
    outputs: Path | str | Sequence[Path | str],
    **options: object,
) -> Task:
    """Check all that `predict_raster` is given, and plan the work."""
    wanted = options_of(options)
    model = checkpoint
    if not isinstance(checkpoint, nn.Module):
        model, checkpoint = strips.load_model(checkpoint), Path(checkpoint).absolute()
    model.eval()
    contract, kind = model.contract, model.TASK
    _check_options(wanted, kind)
    if Path(raster).exists():
        raster = Path(raster).absolute()  # other processes may work elsewhere
    opened = open_raster(
        raster, contract, resolution_tolerance=wanted.resolution_tolerance,
        resample=wanted.resample, bands=wanted.bands,
        override=wanted.override, region_paths=(wanted.aoi, wanted.ignore),
        aux_vector_file=wanted.aux_vector_file,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:  # warns of layouts that read slowly
        fileio.check_layout([opened], repair=False, cache_dir=folder)
    paths = _check_names(outputs, opened, model.labels, wanted, [checkpoint], kind)
    if opened.original is not None and kind == SEGMENTATION and paths[0].suffix.lower() == ".png":
        log.warning(
            "%s: a PNG has no map reference; its pixels are those that are read, of %.4g m, not "
            "those of the raster's file", paths[0], opened.resolution,
        )  # fmt: skip
    settings = _grid_settings(contract, wanted, kind)
    if wanted.scheduler is None:
        devices = strips.find_devices(wanted.device)
        hardware = torch.device(devices[0]).type
        workers = wanted.workers or len(devices)
    else:  # what other machines have is not known here
        hardware = torch.device(wanted.device).type if wanted.device != "auto" else "cpu"
        workers = 1
    share = workers > 1 and hardware == "cpu"
    of_task = _map_settings if kind == SEGMENTATION else _detection_settings
    settings |= of_task(model, wanted, paths)
    settings["precision"] = resolve_precision(wanted.precision, hardware, measured=False)
    states = {file: Path(file).stat() for file in opened.files}
    plan = settings | {
        "software": __version__,
        "model": _digest(checkpoint, model),
        "raster": fileio.raster_fingerprint(opened),
        # the fingerprint is of samples; a change between them shows here
        "files": {file: [state.st_size, state.st_mtime_ns] for file, state in states.items()},
        "size": [opened.width, opened.height],
        "bands": opened.bands,
        "regions": opened.regions.digest() if opened.regions else None,
        "auxiliary": opened.made_from.get("auxiliary"),
    }
    if opened.original is not None:  # of whose pixels the files are to tell
        plan["pixel_size_xy"] = opened.pixel_size_xy
    plan = json.loads(json.dumps(plan))
    predictor, task = {
        DETECTION: (strips.StripPredictor, DetectionTask),
        SEGMENTATION: (maps.MapPredictor, MapTask),
    }[kind]
    predictor = predictor(
        model=checkpoint, radiometry=contract.radiometry, raster=opened,
        journal=paths[0].with_name(f"{paths[0].name}.journal"), key=fileio.fingerprint(plan)[:8],
        batch_size=wanted.batch_size, readers=wanted.readers, device=wanted.device,
        threads=max(1, parallel.cpu_count() // workers) if share else None, **settings,
    )  # fmt: skip
    task = task(predictor, tuple(model.labels), paths, replace(wanted, workers=workers), plan)
    if not _is_done(task):
        _check_outputs(task)
    return task


def _grid_settings(
    contract: DataContract, wanted: PredictionOptions, kind: str
) -> dict[str, object]:
    """Return the size and the overlap of the tiles."""
    size = wanted.tile_size or contract.tile_size
    least = contract.evaluation_overlap
    overlap = min(least, size // 2)
    if kind == SEGMENTATION:
        smooth = wanted.smooth_prediction is not False
        overlap = max(overlap, size // 8) if smooth else overlap
    if wanted.overlap is not None:
        overlap = wanted.overlap
    if overlap >= size:
        raise InputError(f"overlap must be less than the tiles' {size} px, got {overlap}")
    if overlap < least and kind == DETECTION:
        log.warning(
            "tiles overlap by %d px, but objects of the training are up to %d px long: those that "
            "no tile shows whole may be cut or doubled", overlap, least,
        )  # fmt: skip
    return {"tile_size": size, "overlap": overlap}


def _detection_settings(
    model: LargeRasterORModel, wanted: PredictionOptions, _paths: Sequence[Path]
) -> dict[str, object]:
    """Return what `StripPredictor` is told beside what all predictors are."""
    threshold = wanted.score_threshold
    if threshold is None:
        threshold = float(model.operating_threshold)
        if np.isnan(threshold):
            raise InputError(
                "the model was never validated, so that it knows no score from which a detection "
                "counts; give one (--score-threshold)"
            )
        if wanted.views not in (None, model.conf.views):
            log.warning(
                "the score from which a detection counts was chosen with views %r, and those of "
                "%r score otherwise; better give one (--score-threshold)",
                model.conf.views, wanted.views,
            )  # fmt: skip
    return {
        "score_threshold": threshold, "nms_threshold": model.conf.nms_threshold,
        "views": wanted.views or model.conf.views, "scales": wanted.scales,
    }  # fmt: skip


def _map_settings(
    model: nn.Module, wanted: PredictionOptions, paths: Sequence[Path]
) -> dict[str, object]:
    """Return what `MapPredictor` is told beside what all predictors are."""
    smooth = wanted.smooth_prediction is not False
    if wanted.uncertainty and not smooth:
        raise InputError(
            "uncertainty is how much overlapping tiles disagree, and smooth_prediction = False "
            "takes each pixel from one of them; leave one of the two out"
        )
    _names_and_colors(model.labels, wanted)
    planes = {
        maps.CLASS: True, maps.CONFIDENCE: len(paths) > 1, maps.UNCERTAINTY: wanted.uncertainty,
    }  # fmt: skip
    return {
        "classes": len(model.labels), "smooth": smooth, "probabilities": wanted.probabilities,
        "planes": tuple(name for name, kept in planes.items() if kept),
        "views": wanted.views or model.conf.views,
    }  # fmt: skip


def _check_names(
    outputs: Path | str | Sequence[Path | str],
    raster: fileio.Raster,
    labels: Sequence[str],
    wanted: PredictionOptions,
    inputs: Sequence[object],
    kind: str,
) -> tuple[Path, ...]:
    """Return absolute paths of the outputs, if they can hold what is found and are no input."""
    several = [outputs] if isinstance(outputs, Path | str) else outputs
    paths = [Path(path).absolute() for path in several]
    if not paths or len({path.resolve() for path in paths}) < len(paths):
        raise InputError(f"outputs must name at least one file, and each once, got {outputs!r}")
    used = [*raster.files, wanted.aoi, wanted.ignore, wanted.aux_vector_file, wanted.colormap,
            *inputs]  # fmt: skip
    # the layer of a file is named after it
    used = {Path(str(p).partition("|")[0]).resolve() for p in used if isinstance(p, Path | str)}
    tables = paths
    if kind == SEGMENTATION:
        first, *tables = paths
        if first.suffix.lower() not in MAP_SUFFIXES:
            raise InputError(
                f"{first} must end in one of {list(MAP_SUFFIXES)}: the checkpoint is for "
                "segmentation, and the first output is the class map; polygons may follow"
            )
        if first.suffix.lower() == maps.PNG and max(raster.width, raster.height) > fileio.PNG_SIDE:
            raise InputError(
                f"a PNG is at most {fileio.PNG_SIDE:,} px wide and high, {raster.path} has "
                f"{raster.width:,} x {raster.height:,}; name a .tif"
            )
    for path in tables:
        suffixes = POLYGON_SUFFIXES if kind == SEGMENTATION else fileio.ANNOTATION_SUFFIXES
        if path.suffix.lower() not in suffixes:
            after = " after the class map, one .tif or .png" if kind == SEGMENTATION else ""
            raise InputError(f"{path} must end in one of {list(suffixes)}{after}")
    beside = [_beside(path, what) for path in paths for what in BESIDE[kind]]
    if several := {path.resolve() for path in paths} & {path.resolve() for path in beside}:
        raise InputError(
            f"{sorted(map(str, several))} may be written beside another output; give other names"
        )
    for path in paths:
        if path.is_dir():
            raise InputError(f"{path} is a folder; name a file to write")
        if {path.resolve(), *(_beside(path, what).resolve() for what in BESIDE[kind])} & used:
            raise InputError(f"{path} would be written over what is read; give another name")
    if wanted.density_cell:
        catalogue.DensityMap(raster, wanted.density_cell)
    with tempfile.TemporaryDirectory() as folder:  # a rehearsal: can these files hold it?
        for path in tables:
            with fileio.annotation_writer(Path(folder) / path.name, raster, labels):
                pass
    return tuple(paths)


def prepare_all(
    checkpoint: Path | str,
    rasters: Sequence[Path | str],
    patterns: Sequence[Path | str],
    **options: object,
) -> list[Task]:
    """Check several rasters, before the first is predicted.

    Args:
        checkpoint: A checkpoint.
        rasters: Files or addresses.
        patterns: Names of the outputs; each raster's identifier stands for `{raster}` in them.
        options: See `PredictionOptions`.

    Raises:
        InputError: See `predict_raster`; or two rasters would write the same file.
    """
    outputs = [
        [Path(str(pattern).replace("{raster}", Path(raster).stem)) for pattern in patterns]
        for raster in rasters
    ]
    _check_apart(itertools.chain(*outputs))
    tasks = [
        prepare(checkpoint, raster, paths, **options)
        for raster, paths in zip(rasters, outputs, strict=True)
    ]
    _check_apart(path for task in tasks for path in (*task.outputs, *task.further))
    return tasks


def _check_apart(paths: Iterable[Path]) -> None:
    flat = [path.absolute() for path in paths]
    if doubled := sorted({str(path) for path in flat if flat.count(path) > 1}):
        raise InputError(
            f"{', '.join(doubled)} would be written more than once; rasters that share a command "
            "need {raster} in the name of the output, such as maps/{raster}.gpkg, and names of "
            "their own"
        )


@lru_cache(maxsize=2)  # many rasters are prepared for one checkpoint
def _file_digest(path: Path, _mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(checkpoint: Path | nn.Module, model: nn.Module) -> str:
    if isinstance(checkpoint, Path):
        return _file_digest(checkpoint, checkpoint.stat().st_mtime_ns)
    digest = hashlib.sha256(repr((model.labels, asdict(model.contract))).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_outputs(task: Task) -> None:
    """Refuse to replace or to mix what is there already."""
    if task.options.overwrite:
        return
    begun = _read_json(task.predictor.journal / MANIFEST) or {"plan": task.plan, "files": []}
    before, now = begun["plan"], task.plan
    if differing := [name for name in now if before.get(name) != now[name]]:
        shown = [f"{name} ({before.get(name)}, now {now[name]})" for name in differing]
        raise InputError(
            f"{task.predictor.journal} holds an unfinished prediction that differs in "
            f"{', '.join(shown)}; finish that one, or drop it with --overwrite (overwrite=True)"
        )
    mine = {Path(file) for file in begun["files"]}
    if there := [str(path) for path in task.files if path.exists() and path not in mine]:
        raise InputError(
            f"already there: {', '.join(there)}; give another name, or --overwrite (overwrite=True)"
            + (", for it was made otherwise and cannot be kept" if task.options.resume
               else ", or --resume (resume=True) to keep what is complete")
        )  # fmt: skip


def _is_done(task: Task) -> bool:
    """Tell whether all is there already, and may stay."""
    record = _read_json(task.provenance) or {}
    wanted = {"complete": True, "plan": task.plan, "form": task.form}
    same = all(record.get(name) == value for name, value in wanted.items())
    # what was killed while it deleted its journal is done, too
    asked = task.options.resume or task.predictor.journal.exists()
    return asked and same and all(path.exists() for path in task.files)


def _read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def run(task: Task, *, progress: bool = False) -> Prediction:
    """Do what `prepare` planned; see `predict_raster`."""
    predictor, journal = task.predictor, task.predictor.journal
    if _is_done(task):
        log.info("%s is complete", task.outputs[0])
        shutil.rmtree(journal, ignore_errors=True)
        return _prediction(task, _read_json(task.provenance), 0.0)
    started, clock = datetime.now(UTC), time.monotonic()
    with fileio.exclusive(journal):
        _check_outputs(task)  # since it was planned, another process may have written them
        for part in journal.glob("strip_*"):
            if part.name.split(".")[1] != predictor.key:
                part.unlink()
        manifest = {"plan": task.plan, "files": [str(path) for path in task.files]}
        fileio.write_json(journal / MANIFEST, manifest)
        for folder in {path.parent for path in task.files}:
            fileio.remove_strays(folder)
        with _keeping(journal), closing(_strips_in_order(task, progress)) as made:
            found = task.merge(made)
        gaps = found["gaps"]
        seconds = time.monotonic() - clock
        record = {
            "complete": not gaps,
            **found,
            "raster": str(predictor.raster.path),
            "checkpoint": str(predictor.model) if isinstance(predictor.model, Path) else None,
            "form": task.form,
            "plan": task.plan,
            "options": asdict(task.options),
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "torch": torch.__version__,
        }
        fileio.write_json(task.provenance, record)
        if not gaps:
            shutil.rmtree(journal, ignore_errors=True)
    result = _prediction(task, record, seconds)
    held = f"{result.count} objects"
    if result.pixels:
        total = sum(result.pixels.values())
        shares = (f"{name} {n / max(total, 1):.1%}" for name, n in result.pixels.items())
        held = f"{total} pixels ({', '.join(shares)})"
    log.info(
        "%s: %s in %s; %d tiles predicted, %d empty ones skipped, %.1f s",
        predictor.raster.path, held, task.outputs[0], result.predicted, result.empty, seconds,
    )  # fmt: skip
    if record.get("full"):
        log.warning(
            "%s: %d tiles show as many objects as the model reports of a tile, so that weaker ones "
            "may be missing; raise the score threshold, or take smaller tiles", task.outputs[0],
            record["full"],
        )  # fmt: skip
    if gaps:
        log.warning(
            "%s has %d gaps that could not be read, listed in %s; the same call tries them again, "
            "a raster that was mended is another one and needs overwrite", task.outputs[0],
            len(gaps), task.provenance,
        )  # fmt: skip
    return result


def _prediction(task: Task, record: dict, seconds: float) -> Prediction:
    gaps = pd.DataFrame(record["gaps"], columns=tiling.WINDOW_COLUMNS)
    return Prediction(
        task.predictor.raster, task.outputs, task.provenance,
        record.get("objects", record.get("regions", {})),
        record["predicted"], record["empty"], gaps, seconds, record.get("pixels", {}),
    )  # fmt: skip


@contextmanager
def _keeping(journal: Path) -> Iterator[None]:
    """Tell whoever stops the work how it goes on."""
    try:
        yield
    except BaseException as error:
        if any(journal.glob("strip_*.npz")):
            error.add_note(f"finished strips are kept in {journal}; the same call goes on there")
        raise


def _strips_in_order(task: Task, progress: bool) -> Iterator[int]:
    """Predict what the journal lacks; yield every strip, from top to bottom, when it is there."""
    predictor = task.predictor
    count = len(predictor.strip_tops)
    waiting = {strip for strip in range(count) if not predictor.is_done(strip)}
    if len(waiting) < count:
        log.info("%d of %d strips are there already", count - len(waiting), count)
    with closing(_predict_strips(task, sorted(waiting), progress)) as made:
        for strip in range(count):
            if strip in waiting:
                next(made)
            yield strip


def _predict_strips(task: Task, numbers: list[int], progress: bool) -> Iterator[Path]:
    predictor, wanted = task.predictor, task.options
    description = f"predicting {predictor.raster.identifier}"
    if wanted.scheduler is None and wanted.workers == 1:
        # tiles of the next strip are read while the last ones of this strip are predicted
        with parallel.Progress(len(numbers), description, bar=progress) as report:
            for path in predictor.predict(numbers):
                report.advance()
                yield path
        return
    yield from parallel.imap_ordered(
        predictor.predict_one, numbers, workers=wanted.workers, scheduler=wanted.scheduler,
        description=description, progress=progress,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Predict rasters as a command; see its `--help` for the exit codes."""
    args = vars(_parser().parse_args(argv))
    rasters, patterns = args.pop("rasters"), args.pop("output")
    checkpoint, progress = args.pop("checkpoint"), sys.stderr.isatty()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    for logger in (log, parallel.log):
        logger.setLevel(logging.INFO)
    try:
        tasks = prepare_all(checkpoint, rasters, patterns, **args)
    except (InputError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    code = 0
    for task in tasks:  # all were checked; what fails now must not stop the others
        try:
            result = run(task, progress=progress)
        except KeyboardInterrupt as error:
            sys.stderr.write("\n".join(["interrupted", *getattr(error, "__notes__", [])]) + "\n")
            return INTERRUPTED
        except Exception as error:
            if not isinstance(error, InputError | OSError):  # not foreseen: show where
                log.exception("%s", task.outputs[0])
            notes = getattr(error, "__notes__", [])
            sys.stderr.write("\n".join([f"{task.outputs[0]}: {error}", *notes]) + "\n")
            code = FAILED
        else:
            code = code or (0 if result.complete else INCOMPLETE)
    return code


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"a share is a number from 0 to 1, got {text!r}; rasters come first in the command"
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="predict.py", allow_abbrev=False,
        description="Find every object of whole rasters, or map their classes, with a trained "
        "model; its checkpoint tells which.",
        epilog=f"Exit code: 0 complete; {FAILED} a raster could not be predicted, the message says "
        f"why; 2 the command is not understood; {INCOMPLETE} predicted, but for gaps that could "
        f"not be read; {INTERRUPTED} interrupted. The same command goes on where it was stopped.",
    )  # fmt: skip
    # fmt: off
    add = parser.add_argument
    add("rasters", nargs="+", metavar="RASTER", help="a file, or an address (https://, s3://, ...)")
    add("--checkpoint", type=Path, required=True, help="the model, such as runs/mine/best.ckpt")
    add("--output", nargs="+", action="extend", required=True, metavar="OUT",
        help="catalogues to write: .gpkg, .geojson, .parquet, .csv, .json (COCO), .txt (YOLO); "
        "of a map first its .tif or .png, and perhaps .gpkg, .geojson, .parquet for the polygons "
        "of its regions; "
        "{raster} in the name stands for the raster's own. The rasters come first in the command")
    add("--tile-size", "--chunk-size", type=int, metavar="PX",
        help="side of the tiles (default: the training's)")
    add("--overlap", type=int, metavar="PX",
        help="minimum overlap of tiles (default: the largest object of the training; of a blended "
        "map at least an eighth of a tile)")
    add("--batch-size", type=int, help="tiles at once (default: 2 on a CPU, 16 on a GPU)")
    add("--precision", choices=get_args(Precision), default="auto",
        help="default: bf16-mixed where the hardware computes in it, else 32-true")
    add("--device", default="auto", help="auto, cpu, cuda (all GPUs), cuda:1, mps")
    add("--score-threshold", type=float, metavar="SCORE",
        help="least score of an object, 0-1 (default: the one that validation chose)")
    add("--aoi", type=Path, metavar="FILE", help="polygons outside which nothing is predicted")
    add("--ignore", type=Path, metavar="FILE", help="polygons inside which nothing is predicted")
    add("--aux-vector-file", type=Path, metavar="FILE",
        help="of a model trained with a band made of shapes: those on these rasters")
    add("--views", choices=get_args(Views),
        help="fuse turned and mirrored views of every tile (default: as the model was measured)")
    add("--scales", type=float, nargs="+", default=[1.0], metavar="FACTOR",
        help="fuse tiles enlarged by these factors (default: 1)")
    add("--geometry", choices=get_args(Geometry), default="box",
        help="shape of an object in files that hold polygons (default: %(default)s)")
    add("--density-cell", type=int, metavar="PX",
        help="also write OUT_density.tif, the number of objects per cell of that side")
    add("--smooth-prediction", action=argparse.BooleanOptionalAction,
        help="of a map: blend overlapping tiles (default), or take each pixel from one tile")
    add("--probabilities", action="store_true",
        help="of a map: also write OUT_probabilities.tif, a band per class, 0-254 for 0 to 1")
    add("--uncertainty", action="store_true",
        help="of a map: also write OUT_uncertainty.tif, how much overlapping tiles disagree")
    add("--overlay", type=_share, nargs="?", const=0.5, metavar="SHARE",
        help="of a map: also write OUT_overlay.tif (.png beside a .png), the raster under the "
        "classes' colours, which are that share of it, 0-1 (if not given: 0.5); background is "
        "left as it is")
    add("--least-area", type=int, default=1, metavar="PX",
        help="of a map: smaller regions get no polygon (default: %(default)s)")
    add("--colormap", type=Path, metavar="CSV",
        help="of a map: value, name and colour (#RRGGBB) of its classes")
    add("--readers", type=int, default=2, help="threads that read ahead (default: %(default)s)")
    add("--workers", type=int,
        help="processes that share a raster (default: one, or one for each GPU)")
    add("--scheduler", metavar="ADDRESS",
        help="a Dask scheduler whose workers share a raster, such as tcp://host:8786")
    add("--override", nargs="+", choices=CHECKS, default=[],
        help="what of the raster may differ from the training's")
    add("--resolution-tolerance", type=float, default=0.2, metavar="SHARE",
        help="largest relative difference of the pixels' sides (default: %(default)s)")
    add("--resample", action="store_true",
        help="read the raster in pixels of the training's size, whatever its own are")
    add("--bands", type=int, nargs="+", metavar="BAND",
        help="which bands to read, counted from 1, in the model's order (default: the training's)")
    add("--resume", action="store_true", help="keep outputs that are complete")
    add("--overwrite", action="store_true",
        help="replace outputs that exist, and drop what a differing command left unfinished")
    # fmt: on
    return parser


if __name__ == "__main__":
    sys.exit(main())
