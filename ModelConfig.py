"""Validated configuration: the parameters of a notebook run and of the model it trains.

Everything is checked once, here; the rest of the project trusts it. Assigning a bad value to a
field raises just as constructing with one does.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import math
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ImageData import InputError
from manifest import DATASET_PARAMETERS, NamedDataset, read_manifest, read_registry, select_datasets
from oldconfig import OldConfig, merge, read_config

Backbone = Literal["resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v3_large"]
Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed"]
Geometry = Literal["box", "circle"]
Task = Literal["detection", "segmentation"]
Optimizer = Literal[  # torch's, and adabound
    "adabound", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "asgd", "nadam",
    "radam", "rmsprop", "sgd",
]  # fmt: skip
Views = Literal["none", "flips", "turns", "all"]
Search = Literal["grid", "random", "tpe"]
CatalogueFormat = Literal["gpkg", "geojson", "parquet", "csv", "json", "txt"]
Record = Literal["default", "wandb", "mlflow", "tensorboard"]
Dataset = Literal["train", "validation", "test"]
Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]  # of a whole
SampleShare = Annotated[float, Field(gt=0, le=1)]
Percent = Annotated[float, Field(ge=0, le=100)]
Proportion = Annotated[float, Field(gt=0, lt=1)]
FileName = Annotated[str, Field(min_length=1)]
FilePath = Annotated[FileName, BeforeValidator(lambda v: str(v) if isinstance(v, Path) else v)]


def _place(folder: Path, name: str) -> Path | str:
    """Return where a file is: in the folder, or at its address (`https://...`, `/vsi...`)."""
    return name if "://" in name or name.startswith("/vsi") else folder / name


def _devices(value: object) -> object:
    """Read text as a command line gives it: "2" as a number of devices, "2,3" or "2," as which."""
    if isinstance(value, str) and re.fullmatch(r"\d+(,\d+)*,?", value):
        which = [int(number) for number in value.rstrip(",").split(",")]
        return which if "," in value else which[0]
    return value


Devices = Annotated[int | str | list[int], BeforeValidator(_devices)]
HYPERPARAMETERS = ("patch_size", "n_epochs", "sample_size", "learning_rate", "batch_size")


def _wrong(error: Mapping[str, Any]) -> str:
    """Say what is wrong, and what was given, in short: YAML can hold endless values."""
    return f"{error['msg']}, got {reprlib.repr(error['input'])}"


# Parameters that the next execution of a run may change: what the search spans, where and how it
# runs, what it shows. All others decide whether its trials can be ranked together.
MAY_CHANGE = {
    "RUN_NAME", "PR_COMPUTE_INTERVAL", "PATCH_SIZES", "BATCH_SIZES", "N_EPOCHS", "SAMPLE_SIZES",
    "LEARNING_RATES", "SEARCH", "N_TRIALS", "PRUNING", "STORAGE", "RETRY_FAILED",
    "REPAIR_LAYOUT", "CACHE_DIR", "CACHE_TILES", "RESOLUTION_TOLERANCE", "DATASET_REGISTRY",
    "FORCE_CREATION", "ACCELERATOR", "DEVICES", "NUM_NODES", "WORKERS", "RUNS_DIR", "DF_DIR",
    "IMG_DIR", "TILING_DIRECTORY", "IMAGE_OUTPUT_DIRECTORY", "MATERIALIZE_TILES", "WANDB_ACTIVE",
    "WANDB_PROJECT", "PLOT_IMAGE", "INTERACTIVE", "PREDICT_FILENAMES", "CATALOGUE_FORMATS",
    "CATALOGUE_GEOMETRY", "DENSITY_CELL", "SCHEDULER", "LOGGER", "LOGGER_OPTIONS", "CONFIG_YAML",
    "BALANCE_SEARCH", "VISUALIZATION", "PREDICT_FROM", "PREDICT_OPTIONS",
}  # fmt: skip
# fields of the model's configuration that say where it is trained, not what comes of it
PLACE = ("workers", "accelerator", "devices", "num_nodes", "max_used_ram", "max_used_perc")
PARAMETER_OF = {  # field of the model's configuration -> parameter of a run
    "batch_size": "BATCH_SIZES", "train.epochs": "N_EPOCHS", "train.lr": "LEARNING_RATES",
    "train.optimizer": "OPTIMIZER", "train.min_visible": "MIN_VISIBLE", "workers": "WORKERS",
    "accelerator": "ACCELERATOR", "devices": "DEVICES", "num_nodes": "NUM_NODES",
    "precision": "PRECISION", "seed": "SEED",
    "task": "TASK", "segmentation.encoder": "BACKBONE",
    "backbone": "BACKBONE", "weights": "WEIGHTS", "init_from": "INIT_FROM",
    "fpn_channels": "FPN_CHANNELS", "views": "VIEWS",
    "validation.pr_compute_interval": "PR_COMPUTE_INTERVAL",
    "validation.iou_threshold": "IOU_THRESHOLD", "test.iou_threshold": "IOU_THRESHOLD",
    "validation.score_threshold": "SCORE_THRESHOLD", "test.score_threshold": "SCORE_THRESHOLD",
}  # fmt: skip
OF_DETECTORS = {  # fields of the model's configuration that say nothing of masks
    "backbone", "fpn_channels", "nms_threshold", "freeze_stages", "norm", "head_depth",
    "finest_level", "input_scale", "smallest_anchor", "anchors_per_level", "aspect_ratios",
    "detections_per_tile", "box_loss", "box_loss_weight", "focal_alpha", "focal_gamma",
    "train.learn_offset", "train.min_visible",
}  # fmt: skip
STORAGE_SCHEMES = ("postgresql://", "postgresql+psycopg://")
LONGEST_NAME = 200  # bytes of a raster's stem; systems allow 255, and names of files add to it
Options = TypeVar("Options")
_STRICT = ConfigDict(validate_assignment=True, extra="forbid", allow_inf_nan=False)


@dataclass(config=_STRICT)
class AugmentConfig:
    """How training tiles are varied, anew at each visit; amplitudes are the largest drawn.

    One standard deviation (std) is that of the stretched training ground, band by band.
    """

    enabled: bool = True  # False: pixels and boxes as they are read
    flips: bool = True  # half of the tiles mirrored
    turns: bool = True  # by 0, 90, 180 or 270 degrees, whatever the tile's own angle
    # of random windows, 1/zoom to zoom; 1: none, as annotators have a least size in mind
    zoom: Annotated[float, Field(ge=1, le=4)] = 1.0
    contrast: Share = 0.3  # relative change of the distance to the tile's mean; 0: none
    brightness: NotNegative = 0.75  # shift, std; 0: none
    gamma: Annotated[float, Field(ge=1, le=4)] = 1.25  # exponent, 1/gamma to gamma; 1: none
    exposure: NotNegative = 0.0  # factor on raw values, EV (stops) either way; 0: none
    noise: NotNegative = 0.1  # Gaussian, in its own std per std of the input; 0: none
    noise_share: Share = 0.25  # of the tiles with noise
    blur: Annotated[float, Field(ge=0, le=8)] = 0.7  # Gaussian, sigma in px of the tile; 0: none
    blur_share: Share = 0.1  # of the tiles that are blurred
    band_dropout: Share = 0.02  # of the bands, set to their mean, never all of a tile; 0: none
    mosaic: Share = 0.0  # of the tiles, put together of four random windows at half scale; 0: none
    flip_share: Share = 0.5  # of the tiles that are mirrored, with flips
    # degrees, either way; what comes in from beyond the tile is unknown and does not count; 0: none
    rotate_limit: Annotated[float, Field(ge=0, le=180)] = 0.0
    rotate_share: Share = 0.5  # of the tiles that are rotated so
    # tiles are trimmed at a percentile drawn from it, at both ends of each band; None: none
    trim_range: (
        tuple[Annotated[float, Field(ge=0, lt=50)], Annotated[float, Field(ge=0, lt=50)]] | None
    ) = None
    shear: Share = 0.0  # px sideways per px, either way; half of the tiles; 0: none
    shift: Share = 0.0  # of the tile's side, either way, as beyond it is unknown; half of the tiles
    fancy_pca: NotNegative = 0.0  # std of shifts along the principal axes of the bands; 0: none
    # 0: no more than above; 1: strong: turned by any angle, scaled, sheared, distorted, with holes,
    # and colours, noise and blur at least as much as the strong set has: docs/own_data.md
    strength: Share = 0.0


@dataclass(config=_STRICT)
class TrainConfig:
    """How the weights are learned."""

    epochs: Annotated[int, Field(ge=0)] = 3  # 0: none, the weights of init_from are measured
    lr: PositiveFloat = 1e-3  # peak learning rate, reached after the warm-up
    optimizer: Optimizer = "adamw"
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    momentum: Share = 0.9  # SGD and RMSprop only
    warmup_share: Share = 0.1  # of all steps, learning rate rising linearly
    # epochs after each of which the rate is multiplied by gamma; None: it falls along half a cosine
    step_size: Positive | None = None
    # measurements without a better one, after which the rate is multiplied by gamma; None: not so
    plateau_patience: Positive | None = None
    gamma: SampleShare = 0.9  # with step_size or plateau_patience only
    gradient_clip: PositiveFloat = 5.0  # largest L2 norm of all gradients together
    max_minutes: PositiveFloat | None = None  # training ends then, its rate falls accordingly
    patience: Positive | None = None  # measurements without a better one after which it ends
    averaging: Literal["none", "ema", "swa"] = "ema"  # of the weights that are measured and kept
    averaging_share: Proportion = 0.03  # of all steps, over which ema reaches
    max_tiles: Positive | None = None  # at most so many, beside their turned twins; None: all
    # how often tiles of a raster, by its stem, come relative to those of others; None: all 1
    raster_weights: tuple[tuple[str, PositiveFloat], ...] | None = None
    random_windows: bool = True  # each visit of a tile moves and zooms it within its block
    min_visible: SampleShare = 0.25  # of an object's area, for a random window to show it
    repeat_threshold: Share = 0.1  # labels in a smaller share of the tiles come more often; 0: none
    learn_offset: bool = True  # of all boxes from what shows objects; needs augment.turns
    hard_negatives: Share = 0.0  # of an epoch, drawn by how wrong the model is there; 0: none
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        """Refuse what would do nothing."""
        augment = self.augment
        if augment.enabled and not self.random_windows and (augment.zoom > 1 or augment.mosaic):
            raise ValueError("zoom and mosaic need random_windows")
        if self.step_size is not None and self.plateau_patience is not None:
            raise ValueError("step_size and plateau_patience are two schedules; give one of them")


@dataclass(config=_STRICT)
class EvaluationConfig:
    """How detections are compared with the truth."""

    iou_threshold: SampleShare = 0.5  # a detection finds an object from this IoU on
    score_threshold: Share = 0.05  # detections below it are never kept
    max_tiles: Positive | None = None  # at most so many are measured; None: all


@dataclass(config=_STRICT)
class ValidationConfig(EvaluationConfig):
    """The same, and how often it happens while training."""

    pr_compute_interval: Positive = 1  # epochs between two measurements of AP, precision and recall
    # while training, one in so many batches is measured, the first at least
    batch_metrics: Positive = 1


@dataclass(config=_STRICT)
class SegmentationConfig:
    """The network that names the class of every pixel, and what it learns by."""

    architecture: str = "unet"  # of segmentation-models-pytorch
    encoder: str = "resnet18"  # of it, or tu- with a name of timm's; WEIGHTS names its weights
    allow_non_commercial: bool = False  # encoders and weights whose licences forbid other use
    dropout: Share | None = None  # before the last layers; None: as the architecture has it
    # arguments of the architecture's decoder, as {"decoder_attention_type": "scse"}; None: defaults
    decoder_options: dict[str, Any] | None = None
    loss: str = "cross_entropy"  # a name, or a sum such as 0.5*cross_entropy+0.5*dice
    class_weights: tuple[NotNegative, ...] | None = None  # by class id, in the loss; None: all 1
    ignore_index: Annotated[int, Field(ge=0, le=253)] | None = None  # class that does not count
    focal_gamma: NotNegative = 2.0  # how little an easy pixel weighs; focal only
    tversky_alpha: NotNegative = 0.3  # weight of false positives; tversky only
    tversky_beta: NotNegative = 0.7  # of false negatives; tversky only
    ohem_share: SampleShare = 0.25  # of the pixels, the hardest, that are learnt; ohem only
    target_size: Annotated[int, Field(ge=32)] | None = None  # px, random crops of training tiles


@dataclass(config=ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True))
class AuxiliaryOptions:
    """Which bands a raster is to have beside its own: of shapes, and of the place of a pixel."""

    aux_vector_file: FilePath | None = None  # shapes: polygons, lines, points; None: no such band
    aux_vector_attrib: FileName | None = None  # attribute that chooses shapes by aux_vector_ids
    aux_vector_ids: tuple[int | float | str, ...] | None = None  # its values that count; None: all
    # distances to the nearest shape (0 in polygons), instead of 1 on shapes, else 0; lines count as
    # 1 px wide, points as a pixel
    aux_vector_dist_maps: bool = False
    aux_vector_dist_log: bool = False  # logarithm of 1 + distance
    aux_vector_scale: float = 1.0  # the band is multiplied by it
    aux_vector_unit: Literal["px", "m"] = "px"  # of distances; m: on the ground
    aux_vector_layer: FileName | None = None  # of a file that has several
    aux_vector_coordinates: FileName = "auto"  # as COORDINATES
    coordconv_convert: bool = False  # two bands, x and y of a pixel, -1 to 1 from edge to edge
    coordconv_scale: float = 1.0  # they are multiplied by it

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.aux_vector_file is None and not self.coordconv_convert:
            raise InputError(
                "auxiliary bands need an aux_vector_file, or coordconv_convert; give one of both"
            )
        if self.aux_vector_dist_log and not self.aux_vector_dist_maps:
            raise InputError(
                "aux_vector_dist_log needs aux_vector_dist_maps: binary maps have no distances"
            )
        if self.aux_vector_ids is not None and self.aux_vector_attrib is None:
            raise InputError("aux_vector_ids needs aux_vector_attrib, the attribute that has them")

    @property
    def count(self) -> int:
        """Number of bands."""
        return (self.aux_vector_file is not None) + 2 * self.coordconv_convert


@dataclass(config=_STRICT)
class ModelConfig:
    """Everything that decides how a model is built, trained and measured.

    `train`, `validation` and `test` hold the parts that belong to one stage.
    """

    # objects and their boxes, or the class of every pixel
    task: Task = "detection"
    batch_size: Positive = 4  # tiles per optimiser step, of each device
    eval_batch_size: Positive | None = None  # tiles measured at once; None: as in training
    workers: Annotated[int, Field(ge=0)] = 0  # processes that read tiles; 0 reads in the main one
    accelerator: str = "auto"  # Lightning's: auto, cpu, gpu, mps, ...
    devices: Devices = 1  # of this machine: how many, or which; "auto": all GPUs
    num_nodes: Positive = 1  # machines that train together, by torchrun
    # of GPUs that may be taken, what others use at most; then `devices` is how many are taken of
    # those, or fewer where there are fewer, and one processor where the machine has no GPU
    max_used_ram: NotNegative | None = None  # MB
    max_used_perc: Percent | None = None  # of the time
    precision: Precision = "auto"  # auto: bf16-mixed where hardware has it and is faster by it
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    backbone: Backbone = "resnet18"
    weights: str | None = None  # torchvision's name of weights, or a file; None: from scratch
    fpn_channels: Annotated[int, Field(ge=8, multiple_of=8)] = 128  # width of pyramid and head
    nms_threshold: Share = 0.3  # IoU above which the weaker of two same-label detections goes
    # turned and mirrored ones of each tile, whose detections are fused when a trained model is
    # measured and predicts: flips and turns are four each, all are eight
    views: Views = "none"
    init_from: str | None = None  # checkpoint of this product to start from
    freeze_stages: Annotated[int, Field(ge=0, le=4)] = 0  # of the backbone, kept as they start
    # of the backbone: groups of channels, which batches of few tiles bear, the batch, or frozen
    # statistics of the weights; auto: frozen with weights, else group
    norm: Literal["auto", "group", "batch", "frozen"] = "auto"
    head_depth: Annotated[int, Field(ge=1, le=4)] = 2  # convolutions before each prediction
    finest_level: Annotated[int, Field(ge=1, le=3)] | None = None  # of the pyramid; None: by sizes
    input_scale: Annotated[float, Field(ge=0.5, le=4)] = 1.0  # the network enlarges its input
    smallest_anchor: PositiveFloat | None = None  # px of the tile; None: by the objects' sizes
    anchors_per_level: Annotated[int, Field(ge=1, le=4)] = 1  # sizes
    aspect_ratios: tuple[PositiveFloat, ...] | None = None  # height over width; None: by the boxes
    detections_per_tile: Positive | None = None  # at most; None: twice the objects of the densest
    box_loss: Literal["giou", "diou", "ciou"] = "giou"  # of the overlap
    box_loss_weight: PositiveFloat = 1.0  # against the classification's
    focal_alpha: Share = 0.25  # weight of objects against background
    focal_gamma: Annotated[float, Field(ge=0)] = 2.0  # how little an easy anchor weighs; 0: as any
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    test: EvaluationConfig = field(default_factory=EvaluationConfig)

    def architecture(self) -> dict[str, Any]:
        """Return the fields that decide which weights fit."""
        norm = self.norm if self.norm != "auto" else "frozen" if self.weights else "group"
        if self.task == "segmentation":
            known = self.segmentation
            return {
                "architecture": known.architecture,
                "encoder": known.encoder,
                "decoder_options": known.decoder_options or {},
            }
        names = ("backbone", "fpn_channels", "head_depth", "anchors_per_level")
        return {name: getattr(self, name) for name in names} | {"norm": norm}

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain nested dictionaries, fit for JSON."""
        return asdict(self)

    def with_options(self, options: Mapping[str, Any]) -> ModelConfig:
        """Return a copy with other values of fields, by dotted names such as "train.patience".

        Raises:
            InputError: A field is unknown, or of the other task, or its value out of range.
        """
        values, known = self.to_dict(), _dotted(ModelConfig().to_dict())
        for name, value in options.items():
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
                raise InputError(f"MODEL_OPTIONS names {name!r}, which is no option; {hint}")
            masks = options.get("task", self.task) == "segmentation"
            if name in OF_DETECTORS if masks else name.startswith("segmentation."):
                close = difflib.get_close_matches(f"segmentation.{name}", known, n=1, cutoff=0.9)
                hint = f"; did you mean {close[0]}?" if close and masks else ""
                raise InputError(
                    f"MODEL_OPTIONS names {name!r}, which does nothing where TASK is "
                    f"{'segmentation' if masks else 'detection'}; leave it out, or set TASK{hint}"
                )
            *groups, last = name.split(".")
            place = values
            for group in groups:
                place = place[group]
            place[last] = value
        try:
            return self.from_dict(values)
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, e['loc']))}: {_wrong(e)}"
                     for e in error.errors()]  # fmt: skip
            raise InputError("MODEL_OPTIONS: " + "\n".join(lines)) from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Rebuild what `to_dict` returned."""
        return TypeAdapter(cls).validate_python(dict(values))


@dataclass(config=_STRICT)
class VisualizationConfig:
    """Which tiles are drawn while a model of pixels' classes is trained, and when."""

    batch_range: list[int] = field(default_factory=list)  # first, last (excluded), step; []: none
    at_checkpoint: bool = True  # whenever a better model was kept
    at_ckpt_min_ep_diff: Annotated[int, Field(ge=0)] = 0  # epochs between two such drawings
    at_ckpt_dataset: Dataset = "validation"
    at_init: bool = True  # before the first epoch
    at_init_dataset: Dataset = "validation"
    at_evaluation: bool = True  # validation tiles in every epoch, test tiles at the end
    at_train: bool = True  # training tiles, as they are learnt
    grid: bool = True  # one picture per tile; False: a file for each of its parts
    heatmaps: bool = True  # the probability of every class, too
    colormap: str | None = None  # CSV of value, name and colour of the classes

    def __post_init__(self) -> None:
        """Refuse a range that is none."""
        numbers = self.batch_range
        if numbers and (len(numbers) != 3 or numbers[0] < 0 or numbers[2] < 1):
            raise ValueError(
                "batch_range must be [first, last, step] with a step of at least 1, or [], got "
                f"{numbers}"
            )
        if self.colormap and not Path(self.colormap).is_file():
            raise ValueError(f"there is no colormap {self.colormap}")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> VisualizationConfig:
        """Read what VISUALIZATION holds.

        Raises:
            InputError: An option is unknown, or its value out of range.
        """
        return _read_options(cls, "VISUALIZATION", options, prefix="vis_")


@dataclass(config=_STRICT)
class HdrLogOptions:
    """The constants of the stretch `hdr_log`, see `imutils.log_transform`."""

    input_mul: PositiveFloat = 1.0  # of linear values, before the logarithm; 2**8: 8 EV brighter
    log_epsilon: PositiveFloat = 1e-3  # added before the logarithm, so that black is a number
    log_split_around1: bool = False  # True: from 1 on a root, which tells bright values better
    log_pow: PositiveFloat = 7.5  # of that root
    output_bias: float = 2.5  # added to the logarithm
    output_scale: PositiveFloat = 1 / 2.2 / 2  # by which the sum is multiplied
    clip: PositiveFloat | None = None  # raw value of which all brighter ones are taken; None: none
    # % of the pixels of the training ground of which `clip` is taken, such as 99.9 without the sun
    clip_percentile: Annotated[float, Field(gt=0, le=100)] | None = None

    def __post_init__(self) -> None:
        """Refuse two ways to say one thing."""
        if None not in (self.clip, self.clip_percentile):
            raise ValueError("clip and clip_percentile exclude each other")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> HdrLogOptions:
        """Read what STRETCH_OPTIONS holds.

        Raises:
            InputError: An option is unknown, or its value out of range.
        """
        return _read_options(cls, "STRETCH_OPTIONS", options)


def _read_options(
    cls: type[Options], parameter: str, options: Mapping[str, Any], prefix: str = ""
) -> Options:
    """Read a parameter that holds options by name, which may begin with a prefix of old."""
    known = [f.name for f in fields(cls)]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name.removeprefix(prefix), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise InputError(f"{parameter} names {name!r}, which is no option; {hint}")
    try:
        return TypeAdapter(cls).validate_python(dict(options))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {_wrong(e)}" for e in error.errors()]
        raise InputError(f"{parameter}: " + "\n".join(lines)) from None


def _dotted(values: Mapping[str, Any], before: str = "") -> list[str]:
    names = []
    for name, value in values.items():
        inner = _dotted(value, f"{before}{name}.") if isinstance(value, dict) else None
        names += inner or [before + name]
    return names


def _listed(manifest: object, bucket: str | None) -> dict[str, Any]:
    """Return the parameters that a manifest stands for."""
    rows = read_manifest(Path(str(manifest)), bucket)
    images = rows["image"].map(_absolute)
    return {
        "IMAGE_FILENAMES": images.tolist(),
        "DF_FILENAMES": rows["vector"].map(_absolute).tolist(),
        "LABEL_COLUMN_NAME": rows["attribute"].tolist(),
        "TEST_FILENAMES": images[rows["split"] == "test"].tolist() or None,
        "VALIDATION_FILENAMES": images[rows["split"] == "validation"].tolist() or None,
    }


def _named(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that named datasets stand for."""
    chosen = select_datasets(read_registry(given["DATASET_REGISTRY"]), given["DATASETS"])
    weights = {Path(i).stem: d.weight for d in chosen for i in d.images if d.weight != 1}
    options = {"train.raster_weights": [*map(list, weights.items())]} if weights else {}
    bare = [d.name for d in chosen if d.attribute is None]
    if bare and not isinstance(given["LABEL_COLUMN_NAME"], str):
        raise InputError(
            f"of named datasets LABEL_COLUMN_NAME is one name, got {given['LABEL_COLUMN_NAME']}; "
            f"write the attribute of {bare} to {given['DATASET_REGISTRY']}"
        )
    return {
        "IMAGE_FILENAMES": [_absolute_name(i) for d in chosen for i in d.images],
        "DF_FILENAMES": [_absolute_name(m) for d in chosen for m in d.masks],
        "LABEL_COLUMN_NAME": [
            d.attribute or given["LABEL_COLUMN_NAME"] for d in chosen for _ in d.images
        ],
        **{
            parameter: _common(chosen, name, given[parameter], parameter)
            for name, parameter in DATASET_PARAMETERS.items()
        },
        "CLASSES": _merged_classes(chosen) or given["CLASSES"],
        "MODEL_OPTIONS": options | given["MODEL_OPTIONS"],
    }


def _common(chosen: Sequence[NamedDataset], name: str, wanted: object, parameter: str) -> object:
    """Return what all datasets have as a field, unless a parameter that was set says otherwise."""
    values, default = {d.name: getattr(d, name) for d in chosen}, getattr(NamedDataset, name, None)
    if wanted != default or set(values.values()) == {default}:
        return wanted
    if len(set(values.values())) > 1:
        for_all = f"set {parameter} for all of them" if default is None else "write the same to all"
        raise InputError(
            f"the datasets of a run need the same {name}, got {values}; {for_all}, or put them "
            "together with composite.CompositeTrainingDataset"
        )
    value = next(iter(values.values()))
    return list(value) if isinstance(value, tuple) else value


def _merged_classes(chosen: Sequence[NamedDataset]) -> dict[str | int, str | int]:
    """Put the classes of datasets together; a value must mean the same in all."""
    merged: dict[str | int, str | int] = {}
    for named in chosen:
        for value, name in (named.classes or {}).items():
            if merged.setdefault(value, name) != name:
                raise InputError(
                    f"value {value!r} means {merged[value]!r} in one dataset and {name!r} in "
                    f"{named.name}; put them together with composite.CompositeTrainingDataset, "
                    "where each has its own"
                )
    return merged


def _absolute_name(name: str) -> str:
    return name if "://" in name or name.startswith("/vsi") else str(Path(name).absolute())


def _absolute(place: str | Path) -> str:
    return str(place.absolute()) if isinstance(place, Path) else place


def count_trials(space: Mapping[str, Sequence[int | float]], search: Search, n_trials: int) -> int:
    """Count the trials of a search: all combinations of a grid, else `n_trials` distinct ones."""
    combinations = math.prod(map(len, space.values()))
    if search == "grid":
        return combinations
    return n_trials if len(space["learning_rate"]) > 1 else min(n_trials, combinations)


def missing_logger(name: str) -> str:
    """Say how to have a logger whose package is not installed, or how to do without."""
    package = {"mlflow": "mlflow-skinny"}.get(name, name)
    without = "WANDB_ACTIVE = False" if name == "wandb" else "LOGGER = 'default'"
    return f"{name} is not installed: pip install {package}, or set {without}"


def check_storage(url: str) -> None:
    """Refuse an address of a database that cannot hold a search.

    Raises:
        InputError: It is not PostgreSQL's. SQLite's locks do not hold on shared disks.
    """
    if not url.startswith(STORAGE_SCHEMES):
        raise InputError(
            "STORAGE must be a PostgreSQL database, postgresql://user@host/name, or None for a "
            f"file in the run's folder, which shared disks bear, got {url.partition(':')[0]}:..."
        )


@dataclass(config=ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True))
class RunParameters:
    """The parameters of one run of the notebook, named as in its `parameters` cell.

    The notebook holds the defaults and the explanations; this class holds the types and ranges.
    """

    TASK: Task
    CONFIG_YAML: FileName | None
    MANIFEST: FileName | None
    DATASETS: list[FileName]
    DATASET_REGISTRY: Path
    BUCKET: FileName | None
    DF_FILENAMES: list[FileName]
    IMAGE_FILENAMES: list[FileName]
    DF_DIR: Path
    IMG_DIR: Path
    AOI_FILENAMES: list[FileName | None] | None
    IGNORE_FILENAMES: list[FileName | None] | None
    BANDS: Annotated[list[Positive], Field(min_length=1)] | None
    AUXILIARY: AuxiliaryOptions | None
    RESOLUTION_TOLERANCE: Annotated[float, Field(ge=0)] | None
    TARGET_RESOLUTION: PositiveFloat | None
    REPAIR_LAYOUT: bool
    CACHE_DIR: Path
    CACHE_TILES: bool
    BOX_SOURCE: Literal["diameter", "columns"]
    COORDINATES: FileName
    X_COLUMN_NAME: FileName
    Y_COLUMN_NAME: FileName
    DIAMETER_COLUMN_NAME: FileName
    LABEL_COLUMN_NAME: FileName | list[FileName]
    DEFAULT_LABEL: FileName | None
    IMAGE_COLUMN_NAME: FileName | None
    LAYER: FileName | None
    ATTRIBUTE_FILTER: FileName | None
    DEFAULT_OBJECT_DIAMETER: PositiveFloat
    DIAMETER_SCALE: PositiveFloat
    MAX_DIAMETER: PositiveFloat
    CLIP_TO_RASTER: bool
    DROP_DUPLICATES: bool
    LABEL_PERCENTILE: Annotated[float, Field(gt=0, le=100)]
    CLASSES: Positive | list[FileName | int] | dict[FileName | int, FileName | int] | None
    MASK_REFERENCE: bool
    ROTATION_ANGLES: list[Literal[90, 180, 270]]
    IMAGE_OUTPUT_DIRECTORY: Path | None
    SPLIT_BY: Literal["block", "raster"]
    BLOCK_SIZE: Positive | None
    TEST_PROPORTION: Proportion
    VALIDATION_PROPORTION: Proportion
    USE_STRATIFICATION: Percent | None
    TEST_FILENAMES: list[FileName] | None
    VALIDATION_FILENAMES: list[FileName] | None
    PATCH_SIZES: Annotated[list[Annotated[int, Field(ge=32)]], Field(min_length=1)]
    TILING_DIRECTORY: Path
    TILE_OVERLAP: Annotated[int, Field(ge=0)]
    MIN_VISIBLE: SampleShare
    EMPTY_TILE_RATIO: Annotated[float, Field(ge=0)]
    MIN_VALID: Share
    CENSORED_PIXELS_LIMIT: Annotated[int, Field(ge=0)]
    MIN_ANNOTATED: Percent
    CLASS_PROPORTION: dict[FileName, Percent]
    BALANCE_SEARCH: list[Literal["min_annotated", "class_proportion"]]
    MATERIALIZE_TILES: bool
    FORCE_CREATION: bool
    BATCH_SIZES: Annotated[list[Positive], Field(min_length=1)]
    N_EPOCHS: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    SAMPLE_SIZES: Annotated[list[SampleShare], Field(min_length=1)]
    LEARNING_RATES: Annotated[list[PositiveFloat], Field(min_length=1)]
    SEARCH: Search
    N_TRIALS: Positive
    PRUNING: bool
    STORAGE: FileName | None
    RETRY_FAILED: bool
    STRETCH: Literal["auto", "none", "minmax", "percentile", "log", "hdr_log"]
    STRETCH_PERCENTILES: Annotated[list[Percent], Field(min_length=2, max_length=2)]
    STRETCH_OPTIONS: dict[str, Any]
    BACKBONE: FileName
    WEIGHTS: str | None
    INIT_FROM: str | None
    FPN_CHANNELS: Annotated[int, Field(ge=8, multiple_of=8)]
    OPTIMIZER: Optimizer
    VIEWS: Views
    MODEL_OPTIONS: dict[str, Any]
    PR_COMPUTE_INTERVAL: Positive
    IOU_THRESHOLD: SampleShare
    SCORE_THRESHOLD: Share
    VISUALIZATION: dict[str, Any]
    PREDICT_FILENAMES: list[FileName]
    PREDICT_FROM: FileName | None
    PREDICT_OPTIONS: dict[str, Any]
    CATALOGUE_FORMATS: Annotated[list[CatalogueFormat], Field(min_length=1)]
    CATALOGUE_GEOMETRY: Geometry
    DENSITY_CELL: Positive | None
    ACCELERATOR: str
    DEVICES: Devices
    NUM_NODES: Positive
    PRECISION: Precision
    WORKERS: Annotated[int, Field(ge=0)] | None
    SCHEDULER: Annotated[str, Field(pattern=r"^[a-z]+://\S+:\d+$")] | None
    SEED: Annotated[int, Field(ge=0, lt=2**32)]
    RUN_NAME: Annotated[str, Field(pattern=r"^[\w][\w.+-]*$")]
    RUNS_DIR: Path
    LOGGER: Record
    LOGGER_OPTIONS: dict[str, Any]
    WANDB_ACTIVE: bool
    WANDB_PROJECT: str
    PLOT_IMAGE: bool
    INTERACTIVE: bool

    def __post_init__(self) -> None:
        """Check what no single field can tell."""
        rasters, tables = len(self.IMAGE_FILENAMES), len(self.DF_FILENAMES)
        if rasters != tables:
            raise InputError(
                f"IMAGE_FILENAMES and DF_FILENAMES pair up by position, but name {rasters} rasters "
                f"and {tables} tables; give each raster its table"
            )
        for name in ("AOI_FILENAMES", "IGNORE_FILENAMES"):
            files = getattr(self, name)
            if files is not None and len(files) != rasters:
                raise InputError(
                    f"{name} pairs up with IMAGE_FILENAMES by position, but names {len(files)} "
                    f"files for {rasters} rasters; write None for a raster without one"
                )
        if len(self.label_columns) != rasters:
            raise InputError(
                f"LABEL_COLUMN_NAME names {len(self.label_columns)} columns for {rasters} tables; "
                "give one for all, or one for each"
            )
        if self.TASK == "detection" and self.BACKBONE not in (known := get_args(Backbone)):
            raise InputError(f"BACKBONE must be one of {', '.join(known)}, got {self.BACKBONE!r}")
        if self.TASK == "detection" and len(set(self.label_columns)) > 1:
            raise InputError(
                "detection reads labels from one column, but LABEL_COLUMN_NAME names "
                f"{self.label_columns}"
            )
        if self.USE_STRATIFICATION is not None:
            self._check_stratification()
        if self.STRETCH_PERCENTILES[0] >= self.STRETCH_PERCENTILES[1]:
            raise InputError(
                "STRETCH_PERCENTILES must rise, such as [0.5, 99.5], "
                f"got {self.STRETCH_PERCENTILES}"
            )
        if not rasters:
            raise InputError("IMAGE_FILENAMES is empty; name at least one raster and its table")
        for parameter in ("IMAGE_FILENAMES", "PREDICT_FILENAMES"):
            names = [Path(name).stem for name in getattr(self, parameter)]
            if long := [name for name in names if len(os.fsencode(name)) > LONGEST_NAME]:
                raise InputError(
                    f"{parameter} must have stems of at most {LONGEST_NAME} bytes, for files are "
                    f"named after them, got {long[0]!r}; rename it, or link to it"
                )
            if doubled := sorted({name for name in names if names.count(name) > 1}):
                raise InputError(
                    f"{parameter} must differ in their stems, which name the rasters; "
                    f"{doubled} occur more than once"
                )
        if self.WANDB_ACTIVE and self.LOGGER not in ("default", "wandb"):
            raise InputError(
                f"WANDB_ACTIVE = True stands for LOGGER = 'wandb', but LOGGER = {self.LOGGER!r}; a "
                "training has one record beside its files, choose"
            )
        if self.logger != "default" and importlib.util.find_spec(self.logger) is None:
            raise InputError(missing_logger(self.logger))
        if 0 in self.N_EPOCHS and self.INIT_FROM is None:
            raise InputError(
                "N_EPOCHS = 0 measures the weights that a model starts from, and INIT_FROM is "
                "None; name a checkpoint there, or train"
            )
        if self.TASK == "detection":
            for name in ("VISUALIZATION", "BALANCE_SEARCH"):
                if getattr(self, name):
                    raise InputError(
                        f"{name} is of segmentation; leave it as it was, or set TASK = "
                        "'segmentation'"
                    )
        VisualizationConfig.of(self.VISUALIZATION)
        if self.STRETCH_OPTIONS and self.STRETCH != "hdr_log":
            raise InputError(
                f"STRETCH_OPTIONS are of STRETCH = 'hdr_log', but STRETCH = {self.STRETCH!r}; set "
                "it so, or leave them empty"
            )
        HdrLogOptions.of(self.STRETCH_OPTIONS)
        if self.STRETCH == "hdr_log" and self.AUXILIARY is not None:
            raise InputError(
                "STRETCH 'hdr_log' is of light, which the bands of AUXILIARY are not; leave them "
                "out, or take another STRETCH"
            )
        if self.PREDICT_FROM and not Path(self.PREDICT_FROM).is_file():
            raise InputError(
                f"PREDICT_FROM must name a checkpoint, there is no {self.PREDICT_FROM}; None takes "
                "this run's best"
            )
        if self.STORAGE is not None:
            check_storage(self.STORAGE)
        if self.BLOCK_SIZE is not None and max(self.PATCH_SIZES) > self.BLOCK_SIZE:
            raise InputError(
                f"BLOCK_SIZE must be >= the largest of PATCH_SIZES ({max(self.PATCH_SIZES)} px), "
                f"got {self.BLOCK_SIZE}; a tile lies within one block"
            )
        if min(self.PATCH_SIZES) <= self.TILE_OVERLAP:
            raise InputError(
                f"TILE_OVERLAP must be < the smallest of PATCH_SIZES ({min(self.PATCH_SIZES)} px), "
                f"got {self.TILE_OVERLAP}"
            )
        for name in sorted(PARAMETER_OF.keys() & self.MODEL_OPTIONS.keys()):
            raise InputError(
                f"MODEL_OPTIONS sets {name}, which has a parameter of its own; set "
                f"{PARAMETER_OF[name]}"
            )
        self.model_config()  # raises where an option is wrong
        if self.SCHEDULER:  # its workers may work in other folders
            for name in ("DF_DIR", "IMG_DIR", "CACHE_DIR", "RUNS_DIR", "IMAGE_OUTPUT_DIRECTORY"):
                if (path := getattr(self, name)) is not None:
                    object.__setattr__(self, name, path.absolute())
        test, validation = (set(names or []) for names in
                            (self.TEST_FILENAMES, self.VALIDATION_FILENAMES))  # fmt: skip
        if strangers := sorted((test | validation) - set(self.IMAGE_FILENAMES)):
            raise InputError(
                "TEST_FILENAMES and VALIDATION_FILENAMES must be among IMAGE_FILENAMES, these are "
                f"not: {strangers}"
            )
        if both := sorted(test & validation):
            raise InputError(f"{both} are in TEST_FILENAMES and in VALIDATION_FILENAMES; choose")

    def _check_stratification(self) -> None:
        if self.TASK == "detection":
            raise InputError("USE_STRATIFICATION is of segmentation; set it to None")
        if self.VALIDATION_FILENAMES:
            raise InputError(
                "USE_STRATIFICATION chooses validation blocks, and VALIDATION_FILENAMES names "
                "them; set one of both to None"
            )
        if self.USE_STRATIFICATION >= (percent := 100 * self.VALIDATION_PROPORTION):
            raise InputError(
                f"USE_STRATIFICATION must be under VALIDATION_PROPORTION, {percent:g} %, got "
                f"{self.USE_STRATIFICATION:g}"
            )

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any]) -> RunParameters:
        """Collect the parameters from a notebook's global names.

        Every upper-case name is taken for a parameter, so that a misspelt one is found.

        Raises:
            InputError: A name is unknown, missing, or its value is out of range.
        """
        known = {f.name for f in fields(cls)}
        given = {k: v for k, v in namespace.items() if k.isupper() and not k.startswith("_")}
        problems = []
        for name in sorted(set(given) - known):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "own variables go in lower case"
            problems.append(f"unknown parameter {name}; {hint}")
        problems += [f"parameter {name} is missing" for name in sorted(known - set(given))]
        if given.get("CONFIG_YAML") and not problems:
            given = merge(given, read_config(given["CONFIG_YAML"]))
        if given.get("MANIFEST"):
            given |= _listed(given["MANIFEST"], given.get("BUCKET"))
        if given.get("DATASETS") and not problems:
            given |= _named(given)
        problems += [
            f"{name} holds the text 'None'; in YAML, nothing is written null"
            for name, value in given.items()
            if value == "None" or (isinstance(value, list) and "None" in value)
        ]
        if problems:
            raise InputError("\n".join(problems))
        try:
            return cls(**given)
        except ValidationError as error:
            lines = [
                f"{'.'.join(map(str, e['loc'])) or 'parameters'}: {_wrong(e)}"
                for e in error.errors()
                if not isinstance(e.get("ctx", {}).get("error"), InputError)
            ]
            lines += [
                str(e["ctx"]["error"])
                for e in error.errors()
                if isinstance(e.get("ctx", {}).get("error"), InputError)
            ]
            raise InputError("\n".join(lines)) from None

    @classmethod
    def from_files(cls, notebook: Path, parameters: Path | None = None) -> RunParameters:
        """Collect the parameters as papermill would: the notebook's defaults, then a YAML file.

        Raises:
            InputError: A file cannot be read, or see `from_notebook`.
        """
        try:
            cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
            cell = next(c for c in cells if "parameters" in c["metadata"].get("tags", []))
            values = {
                node.targets[0].id: ast.literal_eval(node.value)
                for node in ast.parse("".join(cell["source"])).body
            }
        except (OSError, ValueError, KeyError, StopIteration, SyntaxError) as error:
            raise InputError(f"{notebook} is no notebook with a parameters cell: {error}") from None
        if parameters is not None:
            try:
                given = yaml.safe_load(Path(parameters).read_text(encoding="utf-8")) or {}
            except OSError as error:
                raise InputError(f"file of parameters {parameters}: {error.strerror}") from None
            except (ValueError, yaml.YAMLError) as error:
                raise InputError(f"{parameters} cannot be read as YAML: {error}") from None
            if not isinstance(given, dict):
                raise InputError(
                    f"{parameters} must hold lines `NAME: value`, got a {type(given).__name__}"
                )
            values |= given
        return cls.from_notebook(values)

    def check_unchanged(self) -> None:
        """Refuse to go on with a run whose trials were made with other parameters.

        Raises:
            InputError: Names the parameters that differ from those in the run's `parameters.json`.
        """
        record = self.run_dir / "parameters.json"
        if self.FORCE_CREATION or not record.exists():
            return
        if not any(self.run_dir.glob("trials/*/result.json")):
            return
        before = json.loads(record.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(asdict(self), default=str))
        changed = [
            f"{name} = {before[name]!r} (now {value!r})"
            for name, value in now.items()
            if name not in MAY_CHANGE and name in before and before[name] != value
        ]
        blocks_follow = self.SPLIT_BY == "block" and self.BLOCK_SIZE is None
        largest = max(before.get("PATCH_SIZES", self.PATCH_SIZES))
        if blocks_follow and max(self.PATCH_SIZES) != largest:
            changed.append(
                f"tiles of up to {largest} px (now {max(self.PATCH_SIZES)}), from which the ground "
                "blocks follow while BLOCK_SIZE is None"
            )
        if changed:
            raise InputError(
                f"the results in {self.run_dir} were made with {', '.join(changed)}; set another "
                "RUN_NAME, or FORCE_CREATION = True to start over"
            )

    @property
    def logger(self) -> str:
        """Where trainings are recorded beside their files; "default": nowhere."""
        return "wandb" if self.WANDB_ACTIVE else self.LOGGER

    def logger_options(self) -> dict[str, Any]:
        """Return the arguments of `gridsearch.run_search` that say where trainings are recorded."""
        project = {"project": self.WANDB_PROJECT} if self.logger == "wandb" else {}
        return {"logger": self.logger, "logger_options": project | self.LOGGER_OPTIONS}

    @property
    def config(self) -> OldConfig:
        """What the YAML of CONFIG_YAML says, in our words."""
        return read_config(self.CONFIG_YAML)

    @property
    def predict_checkpoint(self) -> Path:
        """Checkpoint of the model that predicts other rasters."""
        return Path(self.PREDICT_FROM) if self.PREDICT_FROM else self.run_dir / "best.ckpt"

    @property
    def run_dir(self) -> Path:
        """Directory of all results of this run."""
        return self.RUNS_DIR / self.RUN_NAME

    @property
    def tiling_dir(self) -> Path:
        """Directory of the tile indexes; a relative path lies in the run's directory."""
        return self.run_dir / self.TILING_DIRECTORY

    @property
    def image_paths(self) -> list[Path | str]:
        """Paths of the rasters, or their addresses (`https://...`)."""
        return self._raster_paths(self.IMAGE_FILENAMES)

    @property
    def predict_paths(self) -> list[Path | str]:
        """Paths or addresses of the rasters that the best model is to predict."""
        return self._raster_paths(self.PREDICT_FILENAMES)

    def _raster_paths(self, names: Sequence[str]) -> list[Path | str]:
        return [_place(self.IMG_DIR, name) for name in names]

    @property
    def auxiliary(self) -> AuxiliaryOptions | None:
        """Which bands the rasters get beside their own; the vector file is in `DF_DIR`."""
        if self.AUXILIARY is None or self.AUXILIARY.aux_vector_file is None:
            return self.AUXILIARY
        path = str(_place(self.DF_DIR, self.AUXILIARY.aux_vector_file))
        return replace(self.AUXILIARY, aux_vector_file=path)

    @property
    def catalogue_paths(self) -> list[Path]:
        """Patterns of the catalogues' paths; `{raster}` stands for the raster's identifier."""
        folder = self.run_dir / "catalogues"
        suffixes = self.CATALOGUE_FORMATS
        if self.TASK == "segmentation":  # the map, and its polygons
            suffixes = ["tif", *(s for s in suffixes if s in ("gpkg", "geojson", "parquet"))]
        return [folder / f"{{raster}}.{suffix}" for suffix in dict.fromkeys(suffixes)]

    @property
    def region_paths(self) -> list[tuple[Path | str | None, Path | str | None]]:
        """Return the files of the area of interest and of ignored regions of each raster."""
        nothing = [None] * len(self.IMAGE_FILENAMES)
        return [
            tuple(_place(self.DF_DIR, name) if name else None for name in names)
            for names in zip(
                self.AOI_FILENAMES or nothing, self.IGNORE_FILENAMES or nothing, strict=True
            )
        ]

    @property
    def df_paths(self) -> list[Path | str]:
        """Paths, or addresses, of the annotation files, in the order of the rasters."""
        return [_place(self.DF_DIR, name) for name in self.DF_FILENAMES]

    @property
    def label_columns(self) -> list[str]:
        """Column or attribute of each table that holds the labels."""
        given = self.LABEL_COLUMN_NAME
        return [given] * len(self.DF_FILENAMES) if isinstance(given, str) else given

    @property
    def search_space(self) -> dict[str, list[int | float]]:
        """What the search spans: hyperparameter -> its distinct values."""
        lists = (
            self.PATCH_SIZES, self.N_EPOCHS, self.SAMPLE_SIZES, self.LEARNING_RATES,
            self.BATCH_SIZES,
        )  # fmt: skip
        return {
            name: list(dict.fromkeys(values))
            for name, values in zip(HYPERPARAMETERS, lists, strict=True)
        }

    @property
    def trial_count(self) -> int:
        """Number of trainings of the search."""
        return count_trials(self.search_space, self.SEARCH, self.N_TRIALS)

    def raster_options(self) -> dict[str, Any]:
        """Return the arguments of `fileio.read_rasters` that are parameters."""
        return {
            "bands": self.BANDS,
            "resolution_tolerance": self.RESOLUTION_TOLERANCE,
            "target_resolution": self.TARGET_RESOLUTION,
            "cache_dir": self.CACHE_DIR,
        }

    def search_options(self) -> dict[str, Any]:
        """Return the arguments of `gridsearch.run_search` that are parameters of the search."""
        return {
            "search": self.SEARCH,
            "n_trials": self.N_TRIALS,
            "pruning": self.PRUNING,
            "storage": self.STORAGE,
            "force": self.FORCE_CREATION,
            "retry_failed": self.RETRY_FAILED,
        }

    def cleaning_options(self) -> dict[str, Any]:
        """Return the arguments of `annotations.clean_annotations` that are parameters."""
        return {
            "box_source": self.BOX_SOURCE,
            "coordinates": self.COORDINATES,
            "x_column": self.X_COLUMN_NAME,
            "y_column": self.Y_COLUMN_NAME,
            "diameter_column": self.DIAMETER_COLUMN_NAME,
            "label_column": self.label_columns[0],
            "default_label": self.DEFAULT_LABEL,
            "image_column": self.IMAGE_COLUMN_NAME,
            "layer": self.LAYER,
            "attribute_filter": self.ATTRIBUTE_FILTER,
            "drop_duplicates": self.DROP_DUPLICATES,
            "default_diameter": self.DEFAULT_OBJECT_DIAMETER,
            "diameter_scale": self.DIAMETER_SCALE,
            "max_diameter": self.MAX_DIAMETER,
            "clip_to_raster": self.CLIP_TO_RASTER,
            "label_percentile": self.LABEL_PERCENTILE,
        }

    def labelling_options(self) -> dict[str, Any]:
        """Return the arguments of `masks.label_images` that are parameters."""
        return {
            "attributes": self.label_columns,
            "classes": self.CLASSES,
            "mask_reference": self.MASK_REFERENCE,
            "ignored": self.model_config().segmentation.ignore_index,
            "region_paths": self.region_paths,
            "coordinates": self.COORDINATES,
            "layer": self.LAYER,
            "image_column": self.IMAGE_COLUMN_NAME,
            "attribute_filter": self.ATTRIBUTE_FILTER,
            "default_label": self.DEFAULT_LABEL,
            "workers": self.WORKERS,
        }

    def split_options(self) -> dict[str, Any]:
        """Return the arguments of `splits.ground_blocks` that are parameters."""
        return {
            "split_by": self.SPLIT_BY,
            "block_size": self.BLOCK_SIZE,
            "test_proportion": self.TEST_PROPORTION,
            "validation_proportion": self.VALIDATION_PROPORTION,
            "test_rasters": [Path(name).stem for name in self.TEST_FILENAMES or []],
            "validation_rasters": [Path(name).stem for name in self.VALIDATION_FILENAMES or []],
            "seed": self.SEED,
        }

    def stratification_options(self) -> dict[str, Any]:
        """Return the arguments of `splits.stratify_validation` that are parameters."""
        return {
            "validation_percent": 100 * self.VALIDATION_PROPORTION,
            "tolerance": self.USE_STRATIFICATION,
            "seed": self.SEED,
        }

    def tiling_options(self, classes: Sequence[str] = ()) -> dict[str, Any]:
        """Return the fields of `tiling.TilingOptions` that are parameters.

        Args:
            classes: Of a segmentation, names by class id; CLASS_PROPORTION may name either.

        Raises:
            InputError: CLASS_PROPORTION names a class that is none.
        """
        known = {str(i): i for i in range(len(classes))} | {n: i for i, n in enumerate(classes)}
        if strangers := sorted(set(self.CLASS_PROPORTION) - set(known)):
            raise InputError(
                f"CLASS_PROPORTION names {strangers}, which are no classes; there are "
                f"{list(classes) or 'none, as TASK is detection'}"
            )
        return {
            "angles": tuple(sorted(set(self.ROTATION_ANGLES))),
            "overlap": self.TILE_OVERLAP,
            "min_visible": self.MIN_VISIBLE,
            "empty_tile_ratio": self.EMPTY_TILE_RATIO,
            "min_valid": self.MIN_VALID,
            "pixel_limit": self.CENSORED_PIXELS_LIMIT,
            "materialize": self.MATERIALIZE_TILES,
            "seed": self.SEED,
            "min_annotated": self.MIN_ANNOTATED,
            "class_proportion": {
                known[name]: least for name, least in self.CLASS_PROPORTION.items()
            },
        }

    def stretch_options(self) -> dict[str, Any]:
        """Return the arguments of `imutils.measure_radiometry` that are parameters."""
        return {
            "stretch": self.STRETCH,
            "percentiles": tuple(self.STRETCH_PERCENTILES),
            "stretch_options": HdrLogOptions.of(self.STRETCH_OPTIONS),
        }

    def prediction_options(self) -> dict[str, Any]:
        """Return the arguments of `predict.prepare` that are parameters."""
        shapes = {"geometry": self.CATALOGUE_GEOMETRY, "density_cell": self.DENSITY_CELL}
        options = {
            "aux_vector_file": self.auxiliary and self.auxiliary.aux_vector_file,
            "device": "cuda" if self.ACCELERATOR == "gpu" else self.ACCELERATOR,
            "scheduler": self.SCHEDULER,
            "precision": self.PRECISION,
            "resolution_tolerance": self.RESOLUTION_TOLERANCE,
            "resample": self.TARGET_RESOLUTION is not None,
        }
        return (shapes if self.TASK == "detection" else {}) | options | self.PREDICT_OPTIONS

    def model_config(self) -> ModelConfig:
        """Return what all trials share; each trial then sets its own hyperparameters."""
        conf = ModelConfig(
            workers=self.WORKERS or 0,
            accelerator=self.ACCELERATOR,
            devices=self.DEVICES,
            num_nodes=self.NUM_NODES,
            precision=self.PRECISION,
            seed=self.SEED,
            task=self.TASK,
            weights=self.WEIGHTS,
            init_from=self.INIT_FROM,
            fpn_channels=self.FPN_CHANNELS,
            views=self.VIEWS,
        )
        if self.TASK == "detection":
            conf.backbone = self.BACKBONE
        else:
            conf.segmentation.encoder = self.BACKBONE
        conf.train.optimizer = self.OPTIMIZER
        conf.train.min_visible = self.MIN_VISIBLE
        conf.validation.pr_compute_interval = self.PR_COMPUTE_INTERVAL
        for stage in (conf.validation, conf.test):
            stage.iou_threshold = self.IOU_THRESHOLD
            stage.score_threshold = self.SCORE_THRESHOLD
        return conf.with_options(self.MODEL_OPTIONS)
