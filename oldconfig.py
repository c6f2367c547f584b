"""Experiments as a YAML of six sections describes them: what each of its keys is here.

The sections are `global`, `data_analysis`, `sample`, `training`, `inference`, `visualization`.
`KEYS` says of every key which parameter of the notebook it is; what has no counterpart is refused
by name, with what to use instead. A key that is left blank is one that is not there.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import pandas as pd
import yaml

from ImageData import InputError
from manifest import list_rasters, read_manifest

log = logging.getLogger(__name__)

# What the notebook's parameters cell holds of all that a YAML may set, so that a value which
# somebody chose there is known from one that nobody did.
UNTOUCHED: dict[str, Any] = {
    "TASK": "detection", "MANIFEST": None, "BUCKET": None, "BANDS": None, "CLASSES": None,
    "MASK_REFERENCE": False, "VALIDATION_PROPORTION": 0.25, "USE_STRATIFICATION": None,
    "AUXILIARY": None, "TILE_OVERLAP": 0, "MIN_ANNOTATED": 0, "CLASS_PROPORTION": {},
    "BALANCE_SEARCH": [], "PATCH_SIZES": [256], "BATCH_SIZES": [4], "N_EPOCHS": [4],
    "LEARNING_RATES": [0.001], "STRETCH": "auto", "BACKBONE": "resnet18", "WEIGHTS": None,
    "INIT_FROM": None, "ROTATION_ANGLES": [90, 180, 270], "CENSORED_PIXELS_LIMIT": 2500,
    "OPTIMIZER": "adamw", "MODEL_OPTIONS": {}, "PREDICT_FILENAMES": [], "PREDICT_FROM": None,
    "PREDICT_OPTIONS": {}, "VISUALIZATION": {}, "RUN_NAME": "first_run", "RUNS_DIR": "runs",
    "ACCELERATOR": "auto", "DEVICES": 1, "LOGGER": "default", "LOGGER_OPTIONS": {},
}  # fmt: skip
# What an experiment of a YAML has where no key says so, and the notebook may: no turned twins of
# training tiles, which would multiply num_trn_samples, and no tile left out for being black.
SILENT: dict[str, Any] = {"ROTATION_ANGLES": [], "CENSORED_PIXELS_LIMIT": 10**9}
ARCHITECTURES = (
    "unet", "unetplusplus", "manet", "linknet", "fpn", "pspnet", "deeplabv3", "deeplabv3plus",
    "pan", "upernet", "segformer", "dpt",
)  # fmt: skip
MODELS = {  # other names -> architecture, or architecture_encoder
    "ternausnet": "unet_vgg11", "checkpointed_unet": "unet", "unet_small": "unet",
    "unetsmall": "unet", "deeplabv3+": "deeplabv3plus",
}  # fmt: skip
WITH_DROPOUT = ("fpn", "pspnet", "deeplabv3", "deeplabv3plus")
LOSSES = {  # names without case, signs and "loss" -> ours
    "crossentropy": "cross_entropy", "lovasz": "lovasz", "lovaszsoftmax": "lovasz",
    "focal": "focal", "dice": "dice", "jaccard": "jaccard", "iou": "jaccard", "tversky": "tversky",
    "ohem": "ohem", "ohemcrossentropy": "ohem", "wbceadaptive": "wbce_adaptive",
}  # fmt: skip
OPTIMIZERS = (
    "adabound", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "asgd", "nadam",
    "radam", "rmsprop", "sgd",
)  # fmt: skip
GPU_LIMITS = {"max_used_ram": 2000, "max_used_perc": 15}  # MB, %; where a YAML leaves them out
DATASETS = {"trn": "train", "val": "validation", "tst": "test"}
METHODS = {"min_annotated_percent": "min_annotated", "class_proportion": "class_proportion"}


@dataclass(frozen=True)
class OldConfig:
    """What a YAML says, in our words.

    Attributes:
        parameters: Parameter of the notebook -> value.
        table: One row per key that is not blank: `key, value, here` (what it became).
        text: The YAML itself.
    """

    parameters: dict[str, Any]
    table: pd.DataFrame
    text: str


@dataclass(frozen=True)
class Source:
    """The YAML that a value is of.

    Attributes:
        path: The file.
        given: Dotted key -> value, of those that are not blank.
        marked: Which uses the rasters of the manifest have.
    """

    path: Path
    given: Mapping[str, Any]
    marked: frozenset[str] = frozenset()

    def get(self, key: str, default: object = None) -> Any:  # noqa: ANN401 - what YAML holds
        """Return the value of a key."""
        return self.given.get(key, default)

    def find(self, name: object) -> str:
        """Return where a file or folder is: beside the YAML, or in the working directory.

        Raises:
            ValueError: It is in neither.
        """
        text = str(name)
        if "://" in text or text.startswith("/vsi"):
            return text
        plain = PureWindowsPath(text).as_posix() if "\\" in text else text
        for place in (self.path.parent / plain, Path(plain)):
            if place.exists():
                return str(place.absolute())
        raise ValueError(f"there is no {text}, neither beside the YAML nor in {Path.cwd()}")


Convert = Callable[[Any, Source], Any]  # the value of a key, and its YAML -> the value here


class _Noted(str):
    """Says what a key is here, where it becomes no value."""


class _LeftOut(_Noted):
    """Says why a key has no part in this experiment, which is also logged."""


# ---------------------------------------------------------------------------------------------
# Conversions
# ---------------------------------------------------------------------------------------------


def _check(value: object, kind: type | tuple[type, ...], what: str, *, least: float = 0) -> Any:  # noqa: ANN401
    wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
    if wrong or (kind is not bool and isinstance(value, int | float) and value < least):
        raise ValueError(f"must be {what}, got {value!r}")
    return value


def _same(value: object, _: Source) -> object:
    return value


def _flag(value: object, _: Source) -> bool:
    return _check(value, bool, "True or False")


def _whole(value: object, _: Source) -> int:
    return _check(value, int, "a whole number from 1 on", least=1)


def _number(value: object, _: Source) -> float:
    return float(_check(value, (int, float), "a number from 0 on"))


def _listed(convert: Convert) -> Convert:
    return lambda value, source: [convert(value, source)]


def _percent(value: object, _: Source) -> float:
    if _check(value, (int, float), "a percentage, 0 to 100") > 100:
        raise ValueError(f"must be a percentage, 0 to 100, got {value!r}")
    return value


def _file(value: object, source: Source) -> str:
    return source.find(value)


def _text(value: object, _: Source) -> str:
    return str(value)


def _values(value: object, _: Source) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _auxiliary(of: str, convert: Convert) -> Convert:
    """Leave out what says how a band is to be, of "file" or "coordconv", where there is none."""
    switch = {"file": "global.aux_vector_file", "coordconv": "global.coordconv_convert"}[of]

    def converted(value: object, source: Source) -> object:
        value = convert(value, source)
        return value if source.get(switch) else _LeftOut(f"there is no {switch}")

    return converted


def _folder(value: object, source: Source) -> str:
    text = str(value)
    plain = PureWindowsPath(text).as_posix() if "\\" in text else text
    here = source.path.parent / plain
    return str((here if here.exists() else Path(plain)).absolute())


def _task(value: object, _: Source) -> str:
    if value != "segmentation":
        raise ValueError(
            f"must be segmentation, got {value!r}; classification of tiles is not done"
        )
    return value


def _bands(value: object, source: Source) -> dict[str, Any]:
    bands = list(range(1, _whole(value, source) + 1))
    if source.get("global.BGR_to_RGB", False):
        if len(bands) < 3:
            raise ValueError(f"BGR_to_RGB needs three bands, number_of_bands is {value}")
        bands[:3] = bands[2::-1]
    return {"BANDS": bands}


def _reversed(value: object, source: Source) -> _Noted:
    if _flag(value, source) and "global.number_of_bands" not in source.given:
        raise ValueError("is True, so that number_of_bands must be given, too, 3 or more")
    return _Noted(f"BANDS, reversed: {value}")


def _model(value: object, source: Source) -> dict[str, Any]:
    name = str(value).lower()
    plain = name.removesuffix("_pretrained")
    architecture, _, encoder = MODELS.get(plain, plain).partition("_")
    if architecture not in ARCHITECTURES:
        known = [*ARCHITECTURES, *MODELS]
        close = difflib.get_close_matches(plain, known, n=3)
        near = f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(known)}"
        raise ValueError(
            f"there is no {value!r}; {near} An encoder may follow, as in unet_resnet34"
        )
    values: dict[str, Any] = {"MODEL_OPTIONS/segmentation.architecture": architecture}
    if encoder:
        values["BACKBONE"] = encoder
    # of the others, models that come with weights are those that name an encoder
    wanted = source.get("training.pretrained", "training.state_dict_path" not in source.given)
    if wanted and (encoder or name != plain) and "training.state_dict_path" not in source.given:
        values["WEIGHTS"] = "DEFAULT"
    return values


def _pretrained(value: object, source: Source) -> _Noted:
    _flag(value, source)
    return _Noted("WEIGHTS, of models that name an encoder or end in _pretrained")


def _gpus(value: object, source: Source) -> dict[str, Any]:
    count = _check(value, int, "a whole number from 0 on")
    if not count:
        return {"ACCELERATOR": "cpu"}
    limits = {f"MODEL_OPTIONS/{name}": _number(source.get(f"global.{name}", default), source)
              for name, default in GPU_LIMITS.items()}  # fmt: skip
    return {"DEVICES": count, **limits}


def _gpu_limit(value: object, source: Source) -> _Noted:
    _number(value, source)
    return _Noted("a limit of the GPUs that num_gpus takes")


def _logger(option: str) -> Convert:
    def convert(value: object, source: Source) -> dict[str, Any] | _Noted:
        if importlib.util.find_spec("mlflow") is None:
            return _LeftOut(
                "mlflow is not installed, records stay in the run's folder; to have them in mlflow "
                "as well: pip install mlflow-skinny"
            )
        text = str(value)
        if option == "uri" and ":" not in text:
            text = _folder(text, source)
        return {"LOGGER": "mlflow", f"LOGGER_OPTIONS/{option}": text}

    return convert


def _scale(value: object, _: Source) -> str:
    pair = isinstance(value, list | tuple) and len(value) == 2
    if not pair or not all(isinstance(v, int | float) for v in value) or value[0] >= value[1]:
        raise ValueError(f"must be two rising numbers such as [0, 1], got {value!r}")
    return "none"  # whatever they are: the network takes mean and deviation out of its input


def _thresholds(value: object, source: Source) -> dict[str, Any]:
    least = _percents(value, source)
    proportion = {str(name): p for name, p in least.pop("class_proportion", {}).items() if p}
    values: dict[str, Any] = {"CLASS_PROPORTION": proportion} if proportion else {}
    if annotated := least.pop("min_annotated_percent", 0):
        values["MIN_ANNOTATED"] = annotated
    return values


def _percents(value: object, source: Source) -> dict[str, Any]:
    given = _check(value, dict, "a dictionary of min_annotated_percent and class_proportion")
    if strange := [name for name in given if name not in METHODS]:
        raise ValueError(f"has {strange}; there are {', '.join(METHODS)}")
    _percent(given.get("min_annotated_percent") or 0, source)
    proportion = given.get("class_proportion") or {}
    for part in _check(proportion, dict, "class_proportion a dictionary of percentages").values():
        _percent(part, source)
    return {name: part for name, part in given.items() if part}


def _search(value: object, source: Source) -> dict[str, Any]:
    if not _flag(value, source):
        return {}
    methods = source.get("data_analysis.sampling_method") or METHODS
    return {"BALANCE_SEARCH": [METHODS[name] for name in methods if name in METHODS]}


def _methods(value: object, source: Source) -> _Noted:
    given = _percents(value, source)
    wanted = [v for n, v in given.items() if n == "min_annotated_percent"]
    wanted += [v for v in given.get("class_proportion", {}).values() if v]
    if wanted and not source.get("data_analysis.optimal_parameters_search"):
        raise ValueError(
            "thresholds that are only to be looked at: python splits.py balance FOLDER, or set "
            "them in sample.sampling_method"
        )
    return _Noted("BALANCE_SEARCH, which thresholds optimal_parameters_search looks for")


def _validation(value: object, source: Source) -> dict[str, Any] | _Noted:
    percent = _percent(value, source)
    if "validation" in source.marked:
        return _LeftOut("rasters of the CSV that are marked val are the validation")
    if not 0 < percent < 100:
        raise ValueError(f"must be over 0, as no raster of the CSV is marked val, got {value!r}")
    return {"VALIDATION_PROPORTION": percent / 100}


def _stratification(value: object, source: Source) -> dict[str, Any] | _Noted:
    within = _percent(value, source)
    if "validation" in source.marked:
        return _LeftOut("rasters of the CSV that are marked val are the validation")
    if not within:
        return {}
    if within >= source.get("sample.val_percent", 25):
        raise ValueError(f"must be less than val_percent, got {value!r}")
    return {"USE_STRATIFICATION": within}


def _overlap(value: object, source: Source) -> int:
    if _percent(value, source) >= 100:
        raise ValueError(f"must be less than 100 %, got {value!r}")
    return round(source.get("global.samples_size", 256) * value / 100)


def _epochs(value: object, _: Source) -> list[int]:
    return [_check(value, int, "a whole number from 0 on")]


def _loss(value: object, source: Source) -> dict[str, Any]:
    text = str(value)
    name = re.sub(r"[^a-z]|loss", "", text.lower())
    if name not in LOSSES and not set(text) & set("+*"):
        known = dict.fromkeys(LOSSES.values())
        close = difflib.get_close_matches(name, LOSSES, n=1)
        near = f"did you mean {LOSSES[close[0]]}?" if close else f"there are {', '.join(known)}"
        raise ValueError(f"there is no {value!r}; {near}")
    return {"MODEL_OPTIONS/segmentation.loss": LOSSES.get(name, text)}


def _weights(value: object, source: Source) -> dict[str, Any] | _Noted:
    weights = _check(value, list, "a list of a weight for each class")
    loss = re.sub(r"[^a-z]|loss", "", str(source.get("training.loss_fn")).lower())
    if LOSSES.get(loss) == "lovasz":
        return _LeftOut("the loss lovasz weighs all classes the same")
    return {"MODEL_OPTIONS/segmentation.class_weights": weights}


def _optimizer(value: object, _: Source) -> str:
    name = str(value).lower()
    if name not in OPTIMIZERS:
        close = difflib.get_close_matches(name, OPTIMIZERS, n=1)
        near = f"did you mean {close[0]}?" if close else f"there are {', '.join(OPTIMIZERS)}"
        raise ValueError(f"there is no {value!r}; {near}")
    return name


def _steps(value: object, source: Source) -> dict[str, Any]:
    # the rate begins with what it is set to
    return {"MODEL_OPTIONS/train.step_size": _whole(value, source),
            "MODEL_OPTIONS/train.warmup_share": 0.0}  # fmt: skip


def _gamma(value: object, source: Source) -> dict[str, Any]:
    if "training.step_size" not in source.given:
        raise ValueError("is what the rate is multiplied by after every step_size; give that, too")
    return {"MODEL_OPTIONS/train.gamma": _number(value, source)}


def _dropout(value: object, source: Source) -> dict[str, Any] | _Noted:
    name = str(source.get("global.model_name", "unet")).lower().removesuffix("_pretrained")
    has = MODELS.get(name, name).partition("_")[0] in WITH_DROPOUT
    share = source.get("training.dropout_prob")
    if _flag(value, source) and (isinstance(share, bool) or share is None):
        raise ValueError("is True, so that dropout_prob must be a probability such as 0.5")
    if not has:
        models = f"{name} has none; models that do: {', '.join(WITH_DROPOUT)}"
        return _LeftOut(models) if value else _Noted(f"{name} has none")
    return {"MODEL_OPTIONS/segmentation.dropout": float(share) if value else 0.0}


def _dropout_share(value: object, source: Source) -> _Noted:
    if value is not False and not 0 <= _number(value, source) <= 1:
        raise ValueError(f"must be a probability or False, got {value!r}")
    return _Noted("segmentation.dropout, with dropout: True")


def _ignored(value: object, _: Source) -> dict[str, Any]:
    number = _check(value, int, "a class number", least=-(10**9))
    # beyond the numbers that classes have, it is what we call unknown in any case
    return {"MODEL_OPTIONS/segmentation.ignore_index": number} if 0 <= number <= 253 else {}


def _rotation(value: object, _: Source) -> float:
    if isinstance(value, list) and len(value) == 2 and value[0] == -value[1]:
        value = value[1]
    return float(_check(value, (int, float), "degrees, the same to both sides"))


def _working_folder(value: object, _: Source) -> None:
    raise ValueError(
        f"is out of use, got {value!r}; leave it blank: maps are written to `catalogues` in the "
        "run's folder, or by predict.py wherever you like"
    )


def _predictor(value: object, source: Source) -> dict[str, Any] | _Noted:
    try:
        return {"PREDICT_FROM": source.find(value)}
    except ValueError:
        log.warning(
            "inference.state_dict_path %s is not there; the run's best model predicts", value
        )
        return {}


def _smoothing(value: object, source: Source) -> dict[str, Any]:
    size = source.get("inference.chunk_size", source.get("global.samples_size", 256))
    parts = _check(value, int, "an even number that divides chunk_size", least=2)
    if parts % 2 or size % parts:
        raise ValueError(f"must be an even number that divides chunk_size {size}, got {parts}")
    smooth = source.get("inference.smooth_prediction", True)
    return {"PREDICT_OPTIONS/overlap": size - size // parts} if smooth else {}


def _batch_range(value: object, _: Source) -> dict[str, Any]:
    numbers = _check(value, list, "[first, last, step], or []")
    return {"VISUALIZATION/batch_range": numbers}


def _dataset(value: object, _: Source) -> str:
    if value not in DATASETS:
        raise ValueError(f"must be one of {', '.join(DATASETS)}, got {value!r}")
    return DATASETS[value]


def _colormap(value: object, source: Source) -> dict[str, Any]:
    path = source.find(value)
    return {"VISUALIZATION/colormap": path, "PREDICT_OPTIONS/colormap": path}


# ---------------------------------------------------------------------------------------------
# The keys
# ---------------------------------------------------------------------------------------------

# key -> what it is here, and how its value is converted. PARAMETER, or PARAMETER/option of it;
# a conversion may also return several of them, or what is to be said where there is no value.
KEYS: dict[str, tuple[str, Convert]] = {
    "global.samples_size": ("PATCH_SIZES", _listed(_whole)),
    "global.num_classes": ("CLASSES", _whole),
    "global.data_path": ("RUNS_DIR", _folder),
    "global.number_of_bands": ("BANDS", _bands),
    "global.model_name": ("MODEL_OPTIONS/segmentation.architecture", _model),
    "global.mlflow_uri": ("LOGGER_OPTIONS/uri", _logger("uri")),
    "global.mlflow_experiment_name": ("LOGGER_OPTIONS/experiment_name", _logger("experiment_name")),
    "global.mlflow_run_name": ("LOGGER_OPTIONS/run_name", _logger("run_name")),
    "global.bucket_name": ("BUCKET", _same),
    "global.task": ("TASK", _task),
    "global.num_gpus": ("DEVICES", _gpus),
    "global.max_used_ram": ("MODEL_OPTIONS/max_used_ram", _gpu_limit),
    "global.max_used_perc": ("MODEL_OPTIONS/max_used_perc", _gpu_limit),
    "global.BGR_to_RGB": ("BANDS", _reversed),
    "global.scale_data": ("STRETCH", _scale),
    "global.aux_vector_file": ("AUXILIARY/aux_vector_file", _file),
    "global.aux_vector_attrib": ("AUXILIARY/aux_vector_attrib", _auxiliary("file", _text)),
    "global.aux_vector_ids": ("AUXILIARY/aux_vector_ids", _auxiliary("file", _values)),
    "global.aux_vector_dist_maps": ("AUXILIARY/aux_vector_dist_maps", _auxiliary("file", _flag)),
    "global.aux_vector_dist_log": ("AUXILIARY/aux_vector_dist_log", _auxiliary("file", _flag)),
    "global.aux_vector_scale": ("AUXILIARY/aux_vector_scale", _auxiliary("file", _number)),
    "global.coordconv_convert": ("AUXILIARY/coordconv_convert", lambda v, s: _flag(v, s) or None),
    **dict.fromkeys(  # the document spells it in both ways
        ("global.coordconv_scale", "global.coordvonc_scale"),
        ("AUXILIARY/coordconv_scale", _auxiliary("coordconv", _number)),
    ),
    "global.debug_mode": (
        "application.log", lambda v, s: _Noted("the log tells it anyway") if _flag(v, s) else None,
    ),
    "data_analysis.create_csv": (
        "class_shares.csv", lambda v, s: _Noted("written in any case") if _flag(v, s) else None,
    ),
    "data_analysis.optimal_parameters_search": ("BALANCE_SEARCH", _search),
    "data_analysis.sampling_method": ("BALANCE_SEARCH", _methods),
    "sample.prep_csv_file": ("MANIFEST", _file),
    "sample.val_percent": ("VALIDATION_PROPORTION", _validation),
    "sample.use_stratification": ("USE_STRATIFICATION", _stratification),
    "sample.overlap": ("TILE_OVERLAP", _overlap),
    "sample.sampling_method": ("MIN_ANNOTATED, CLASS_PROPORTION", _thresholds),
    "sample.mask_reference": ("MASK_REFERENCE", _flag),
    "training.state_dict_path": ("INIT_FROM", _file),
    "training.pretrained": ("WEIGHTS", _pretrained),
    "training.num_trn_samples": ("MODEL_OPTIONS/train.max_tiles", _whole),
    "training.num_val_samples": ("MODEL_OPTIONS/validation.max_tiles", _whole),
    "training.num_tst_samples": ("MODEL_OPTIONS/test.max_tiles", _whole),
    "training.batch_size": ("BATCH_SIZES", _listed(_whole)),
    "training.eval_batch_size": ("MODEL_OPTIONS/eval_batch_size", _whole),
    "training.num_epochs": ("N_EPOCHS", _epochs),
    "training.target_size": ("MODEL_OPTIONS/segmentation.target_size", _whole),
    "training.loss_fn": ("MODEL_OPTIONS/segmentation.loss", _loss),
    "training.optimizer": ("OPTIMIZER", _optimizer),
    "training.learning_rate": ("LEARNING_RATES", _listed(_number)),
    "training.weight_decay": ("MODEL_OPTIONS/train.weight_decay", _number),
    "training.step_size": ("MODEL_OPTIONS/train.step_size", _steps),
    "training.gamma": ("MODEL_OPTIONS/train.gamma", _gamma),
    "training.dropout": ("MODEL_OPTIONS/segmentation.dropout", _dropout),
    "training.dropout_prob": ("MODEL_OPTIONS/segmentation.dropout", _dropout_share),
    "training.class_weights": ("MODEL_OPTIONS/segmentation.class_weights", _weights),
    "training.batch_metrics": ("MODEL_OPTIONS/validation.batch_metrics", _whole),
    "training.ignore_index": ("MODEL_OPTIONS/segmentation.ignore_index", _ignored),
    "training.augmentation.rotate_limit": ("MODEL_OPTIONS/train.augment.rotate_limit", _rotation),
    "training.augmentation.rotate_prob": ("MODEL_OPTIONS/train.augment.rotate_share", _number),
    "training.augmentation.hflip_prob": ("MODEL_OPTIONS/train.augment.flip_share", _number),
    "training.augmentation.random_radiom_trim_range": (
        "MODEL_OPTIONS/train.augment.trim_range", _same,
    ),
    "training.augmentation.noise": ("MODEL_OPTIONS/train.augment.noise", _number),
    "inference.img_dir_or_csv_file": (
        "PREDICT_FILENAMES",
        lambda v, s: list_rasters(Path(s.find(v)), s.get("global.bucket_name")),
    ),
    "inference.working_folder": ("", _working_folder),
    "inference.state_dict_path": ("PREDICT_FROM", _predictor),
    "inference.chunk_size": ("PREDICT_OPTIONS/tile_size", _whole),
    "inference.smooth_prediction": ("PREDICT_OPTIONS/smooth_prediction", _flag),
    "inference.overlap": ("PREDICT_OPTIONS/overlap", _smoothing),
    "visualization.vis_batch_range": ("VISUALIZATION/batch_range", _batch_range),
    "visualization.vis_at_checkpoint": ("VISUALIZATION/at_checkpoint", _flag),
    "visualization.vis_at_ckpt_min_ep_diff": (
        "VISUALIZATION/at_ckpt_min_ep_diff", lambda v, _: _check(v, int, "a number of epochs"),
    ),
    "visualization.vis_at_ckpt_dataset": ("VISUALIZATION/at_ckpt_dataset", _dataset),
    "visualization.vis_at_init": ("VISUALIZATION/at_init", _flag),
    "visualization.vis_at_init_dataset": ("VISUALIZATION/at_init_dataset", _dataset),
    "visualization.vis_at_evaluation": ("VISUALIZATION/at_evaluation", _flag),
    "visualization.vis_at_train": ("VISUALIZATION/at_train", _flag),
    "visualization.grid": ("VISUALIZATION/grid", _flag),
    "visualization.heatmaps": ("VISUALIZATION/heatmaps", _flag),
    "visualization.heatmaps_inf": ("PREDICT_OPTIONS/probabilities", _flag),
    "visualization.colormap_file": ("VISUALIZATION/colormap, PREDICT_OPTIONS/colormap", _colormap),
}  # fmt: skip
REFUSED = {  # key -> what to use instead; blank, or False, they are welcome
    "training.normalization.mean": "leave it blank: it is measured on the training ground",
    "training.normalization.std": "leave it blank: it is measured on the training ground",
    "training.augmentation.brightness_contrast_range":
        "MODEL_OPTIONS train.augment.brightness and train.augment.contrast vary both",
}  # fmt: skip
AUGMENTATION = "training.augmentation"
LEFT_OUT = "left out: "


def read_config(path: Path | str) -> OldConfig:
    """Read a YAML of the six sections.

    Args:
        path: The file. Paths in it are looked for beside it, then in the working directory.

    Returns:
        The parameters that it stands for. The run is named after the file.

    Raises:
        InputError: Names every key that is unknown, refused, or has a value that makes no sense.
    """
    path = Path(path).absolute()
    text, sections = _load(path)
    given, problems = _flatten(sections)
    source = Source(path, {key: value for key, value in given.items() if not _is_blank(value)})
    values: dict[str, Any] = {
        "TASK": "segmentation", "RUN_NAME": re.sub(r"[^\w.+-]", "_", path.stem), **SILENT,
    }  # fmt: skip
    bucket = source.get("global.bucket_name")
    if "sample.prep_csv_file" not in source.given:
        problems.append("sample.prep_csv_file is missing: the CSV of rasters and polygons")
    else:
        try:
            rows = read_manifest(Path(source.find(source.get("sample.prep_csv_file"))), bucket)
            source = Source(path, source.given, frozenset(rows["split"]))
        except (ValueError, InputError) as error:
            problems.append(f"sample.prep_csv_file: {error}")
            source = Source(path, {k: v for k, v in source.given.items()
                                   if k != "sample.prep_csv_file"})  # fmt: skip
    rows = []
    for key, value in source.given.items():
        if key in REFUSED:
            if value not in (False, [], {}):
                problems.append(f"{key} = {value!r} is not used here; {REFUSED[key]}")
            continue
        target, convert = KEYS[key]
        try:
            found = convert(value, source)
        except (ValueError, InputError) as error:
            problems.append(f"{key} {error}")
            continue
        became = _added(values, target, found)
        rows.append((key, repr(value), became or "nothing to do"))
    if any(key.startswith(f"{AUGMENTATION}.") for key in given) and not any(
        key.startswith(f"{AUGMENTATION}.") for key in source.given
    ):
        for option in ("train.augment.enabled", "train.random_windows"):
            values.setdefault("MODEL_OPTIONS", {})[option] = False
            rows.append((AUGMENTATION, "blank", f"MODEL_OPTIONS {option} = False"))
    if problems:
        raise InputError(f"CONFIG_YAML {path}:\n" + "\n".join(problems))
    return OldConfig(values, pd.DataFrame(rows, columns=["key", "value", "here"]), text)


def merge(given: Mapping[str, Any], config: OldConfig) -> dict[str, Any]:
    """Put the values of a YAML where the parameters cell has what nobody touched.

    Options of a dictionary are put beside those that are there. A name that was given to the run
    stays.

    Raises:
        InputError: A parameter was set in the notebook, and to another value by the YAML; both are
            named.
    """
    for row in config.table.itertuples():
        if row.here.startswith(LEFT_OUT):
            log.warning("%s = %s is %s", row.key, row.value, row.here)
    merged, clashes = dict(given), []
    for name, value in config.parameters.items():
        here, untouched = given.get(name), UNTOUCHED[name]
        if isinstance(value, dict) and isinstance(here, dict):
            both = [f"{name}[{k!r}] = {here[k]!r}, but the YAML says {value[k]!r}"
                    for k in value.keys() & here.keys() if here[k] != value[k]]  # fmt: skip
            clashes += sorted(both)
            merged[name] = {**here, **value}
        elif name in ("RUN_NAME", *SILENT) and here != untouched:
            continue  # no key says it
        elif here not in (untouched, value):
            clashes.append(f"{name} = {here!r}, but the YAML says {value!r}")
        else:
            merged[name] = value
    if clashes:
        raise InputError(
            "parameters contradict CONFIG_YAML: " + "; ".join(clashes) + ". Change one of each, or "
            "leave the parameter as the notebook has it"
        )
    return merged


def _added(values: dict[str, Any], target: str, found: object) -> str:
    """Add what a conversion returned; return what to say of it."""
    if isinstance(found, _LeftOut):
        return f"{LEFT_OUT}{found}"
    if isinstance(found, _Noted):
        return str(found)
    if found is None:
        return ""
    several = found if isinstance(found, dict) else {target: found}
    said = []
    for place, value in several.items():
        name, _, option = place.partition("/")
        if option:
            values.setdefault(name, {})[option] = value
        else:
            values[name] = value
        said.append(f"{name}{' ' + option if option else ''} = {value!r}")
    return ", ".join(said)


def _is_blank(value: object) -> bool:
    return value is None or value == ""


def _load(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        loaded = yaml.safe_load(text) or {}
    except OSError as error:
        raise InputError(f"CONFIG_YAML {path}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"CONFIG_YAML {path} cannot be read as YAML: {error}") from None
    if not isinstance(loaded, dict):
        raise InputError(f"CONFIG_YAML {path} must hold sections, got a {type(loaded).__name__}")
    return text, loaded


def _flatten(sections: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return dotted key -> value, and what is wrong with keys."""
    known = {**KEYS, **REFUSED}
    groups = {key.rpartition(".")[0] for key in known}
    flat: dict[str, Any] = {}
    problems: list[str] = []

    def visit(prefix: str, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            key = f"{prefix}{name}"
            if key in known:
                flat[key] = value
            elif key in groups and (value is None or isinstance(value, dict)):
                if value is None:  # a section that is blank
                    flat.update({k: None for k in known if k.startswith(f"{key}.")})
                visit(f"{key}.", value or {})
            elif key in groups:
                problems.append(f"{key} must hold keys, got {value!r}")
            else:
                problems.append(f"unknown key {key}; {_hint(key, [*known, *groups])}")

    visit("", sections)
    return flat, problems


def _hint(key: str, known: list[str]) -> str:
    section, _, last = key.lower().rpartition(".")
    ends: dict[str, list[str]] = {}
    for name in known:
        ends.setdefault(name.lower().rpartition(".")[2], []).append(name)
    close = [name for end in difflib.get_close_matches(last, ends, n=3) for name in ends[end]]
    close.sort(key=lambda name: not name.startswith(f"{section}."))  # those of the section first
    close = close or difflib.get_close_matches(key, known, n=2)
    if not close:
        return "there is nothing like it; docs/own_data.md lists all"
    return f"did you mean {' or '.join(close[:3])}?"
