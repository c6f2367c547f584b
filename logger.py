"""What is remembered: the application's log, and the record of every training.

`configure_logger` decides where the modules' log lines go. A training's record is one object that
satisfies `LoggerProtocol` and is also a Lightning logger: `DefaultModelLogger` writes plain files;
`WandbModelLogger`, `MLFlowModelLogger` and `TensorBoardModelLogger` write the same files, and send
them to Weights & Biases, to MLflow, or to event files for TensorBoard.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import importlib
import inspect
import io
import json
import logging
import math
import os
import re
import shutil
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from typing_extensions import override

from fileio import append_line, atomic_path, write_json, write_text, writing
from ImageData import InputError
from ModelConfig import Record, missing_logger

PROJECT_DIR = Path(__file__).parent
HANDLER_PREFIX = "LargeRasterOR."  # names our handlers, so that a later call finds them
MAX_KEY_LENGTH = 160  # characters of a key before its digest; file systems allow 255 bytes


def configure_logger(log_file: Path | None = None, level: int = logging.INFO) -> logging.Logger:
    """Send the project's log lines, and the warnings of all libraries, to the console and a file.

    The last call decides: calling twice doubles nothing, another file takes over from the first.

    Args:
        log_file: Where lines are appended, with their time; None logs to the console only.
        level: Lowest level of the project's own lines.

    Returns:
        The notebook's logger, `__main__`; modules get theirs by `logging.getLogger(__name__)`.
    """
    modules = {
        path.stem
        for path in PROJECT_DIR.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    } | {"__main__"}
    # notebooks show stderr on red, as if every line were an error
    notebook = type(sys.stdout).__module__ == "ipykernel.iostream"
    stream = sys.stdout if notebook else sys.stderr
    handlers: dict[str, logging.Handler] = {"console": logging.StreamHandler(stream)}
    if log_file is not None:
        with writing(Path(log_file)):
            Path(log_file).parent.mkdir(parents=True, exist_ok=True)
            handlers["file"] = _LogFile(log_file, encoding="utf-8")

    root = logging.getLogger()
    for handler in root.handlers[:]:
        ours = (handler.name or "").startswith(HANDLER_PREFIX)
        console = type(handler) is logging.StreamHandler
        # Someone else's console handler (basicConfig, Colab) would print our lines again.
        if ours or (console and handler.stream in (sys.stdout, sys.stderr)):
            root.removeHandler(handler)
        if ours:
            handler.close()
    for name, handler in handlers.items():
        moment = "%(asctime)s - " if name == "file" else ""
        handler.setFormatter(logging.Formatter(f"{moment}%(name)s - %(levelname)s - %(message)s"))
        handler.set_name(HANDLER_PREFIX + name)
        handler.addFilter(
            lambda r: r.levelno >= logging.WARNING or r.name.partition(".")[0] in modules
        )
        root.addHandler(handler)
    # The level is set here and not on the root, where it would wake every library's INFO.
    for module in modules:
        logging.getLogger(module).setLevel(level)
    # Lightning brings a console of its own, which repeats its hardware report in every trial.
    for library in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(library).handlers.clear()
        logging.getLogger(library).propagate = True
    return logging.getLogger("__main__")


class _LogFile(logging.FileHandler):
    """A file of log lines; where one cannot be written, the console says so once, and work goes on.

    Python would print a traceback for each.
    """

    silent = False

    @override
    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.silent:
            self.silent = True
            sys.stderr.write(f"{self.baseFilename} lacks lines: {error}\n")


@runtime_checkable
class LoggerProtocol(Protocol):
    """What the pipeline asks of a training's record."""

    def log_hyperparams(self, params: Mapping[str, Any] | Namespace) -> None:
        """Add hyperparameters; a name given again takes its new value."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row of measured values."""

    def rewind(self, step: int) -> None:
        """Forget what was measured from a step on, and after the last: it is measured again."""

    def log_message(self, message: str) -> None:
        """Add a line of text, with its time."""

    def log_artifact(self, path: Path, name: str, kind: str, description: str = "") -> None:
        """Add a file; a name given again replaces the file.

        Raises:
            InputError: There is no such file, or the name has other characters than letters,
                digits, `.`, `_` and `-`.
        """

    def log(self, values: Mapping[str, Any]) -> None:
        """Add values of any kind: numbers become metrics, everything else a message."""
        numbers = {name: value for name, value in values.items() if _is_number(value)}
        if numbers:
            self.log_metrics(numbers)
        for name, value in values.items():
            if name not in numbers:
                self.log_message(f"{name}: {value}")

    def close(self, status: str = "success") -> None:
        """End the record; Lightning's `finalize` cannot, as a fit and a test share one record."""


class DefaultModelLogger(Logger, LoggerProtocol):
    """A training's record in plain files, complete on disk after every call.

    `hparams.json`; `metrics.csv`, a row per call with `step, epoch` and a column per metric;
    `metrics.json`, the last value of every metric; `messages.jsonl`; `artifacts.json`, with files
    from elsewhere copied into `artifacts/`. A record that exists is continued, as a resumed
    training wants; start a training anew in a new directory.
    """

    def __init__(
        self, log_save_dir: Path | str, name: str = "model_logging", version: str = ""
    ) -> None:
        """Open the record of a training, named so, in a directory."""
        super().__init__()
        self._dir, self._name, self._version = Path(log_save_dir), name, version
        self._dir.mkdir(parents=True, exist_ok=True)
        self._columns: list[str] = []  # of metrics.csv; empty until this process has written to it
        self.hparams: dict[str, Any] = self._load("hparams.json")
        self.metrics: dict[str, float] = self._load("metrics.json")
        self.artifacts: dict[str, dict[str, str]] = self._load("artifacts.json")

    # What Lightning reads: the training's name and version, and the one directory of all files.
    name = property(lambda self: self._name)
    version = property(lambda self: self._version)
    save_dir = root_dir = log_dir = property(lambda self: str(self._dir))

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace) -> None:
        self.hparams |= vars(params) if isinstance(params, Namespace) else params
        text = json.dumps(self.hparams, indent=2, default=_readable)
        write_text(self._dir / "hparams.json", text + "\n")

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step, "epoch": None}
        row |= {k: v.item() if hasattr(v, "item") else v for k, v in metrics.items()}
        if new := row.keys() - self._columns:
            self._rewrite([name for name in row if name in new])
        line = io.StringIO()
        csv.DictWriter(line, self._columns, lineterminator="").writerow(row)
        append_line(self._dir / "metrics.csv", line.getvalue())
        self.metrics |= {k: v for k, v in row.items() if k not in ("step", "epoch")}
        write_json(self._dir / "metrics.json", self.metrics)

    @override
    @rank_zero_only
    def rewind(self, step: int) -> None:
        path = self._dir / "metrics.csv"
        if not path.exists():
            return
        self._rewrite([], step)
        rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
        values = (pair for row in rows for pair in row.items())
        self.metrics = {k: float(v) for k, v in values if v and k not in ("step", "epoch")}
        write_json(self._dir / "metrics.json", self.metrics)

    @override
    @rank_zero_only
    def log_message(self, message: str) -> None:
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "message": str(message)}
        append_line(self._dir / "messages.jsonl", json.dumps(line))

    @override
    @rank_zero_only
    def log_artifact(self, path: Path, name: str, kind: str, description: str = "") -> None:
        path, home = Path(path).resolve(), self._dir.resolve()
        if not path.is_file():
            raise InputError(f"artifact {name} must be a file, but {path} is none; write it first")
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):  # wandb's rule
            raise InputError(f"an artifact's name must be of A-Z a-z 0-9 . _ -, got {name!r}")
        if not path.is_relative_to(home):
            source, path = path, home / "artifacts" / f"{name}{path.suffix}"
            with atomic_path(path) as temporary:
                shutil.copyfile(source, temporary)
        where = path.relative_to(home).as_posix()
        self.artifacts[name] = {"path": where, "kind": kind, "description": description}
        write_json(home / "artifacts.json", self.artifacts)

    @staticmethod
    def default_artifact_logging(
        logger: LoggerProtocol, filepath: Path | str, name: str, kind: str, description: str
    ) -> None:
        """Record a file with whichever logger is in use."""
        logger.log_artifact(Path(filepath), name, kind, description)

    def _load(self, filename: str) -> dict[str, Any]:
        path = self._dir / filename
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def _rewrite(self, new: Sequence[str], before: float = math.inf) -> None:
        """Rewrite `metrics.csv` with more columns, or only with rows of steps before one.

        It is rare, as metrics appear in the first epoch.
        """
        path = self._dir / "metrics.csv"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        complete = text[: text.rfind("\n") + 1]  # a killed process may leave half a line
        reader = csv.DictReader(complete.splitlines())
        self._columns = list(dict.fromkeys([*(reader.fieldnames or ()), *new]))
        table = io.StringIO()
        writer = csv.DictWriter(table, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row in reader if before == math.inf or _is_before(row, before))
        write_text(path, table.getvalue())


def _is_before(row: Mapping[str, str], step: float) -> bool:
    return bool(row["step"]) and float(row["step"]) < step


class _Mirror:
    """What loggers have in common that mirror the files of a `DefaultModelLogger`.

    It comes before one of Lightning's loggers among the bases.
    """

    record: DefaultModelLogger

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace) -> None:
        self.record.log_hyperparams(params)
        super().log_hyperparams(params)

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.record.log_metrics(metrics, step)
        super().log_metrics(metrics, step)

    @override
    @rank_zero_only
    def rewind(self, step: int) -> None:
        self.record.rewind(step)  # the mirror's run is another one, of the rest


class WandbModelLogger(_Mirror, WandbLogger, LoggerProtocol):
    """The record of `DefaultModelLogger`, sent to Weights & Biases as well."""

    def __init__(
        self, log_save_dir: Path | str, name: str, project: str = "LargeRasterOR", **init: object
    ) -> None:
        """Prepare a run; it begins with the first thing recorded.

        Args:
            log_save_dir: Directory of the files; wandb's own go to `wandb/` in it.
            name: Name of the training, and of wandb's run.
            project: wandb's project.
            init: Anything else that `wandb.init` takes: `entity`, `tags`, `mode="offline"`.

        Raises:
            ModuleNotFoundError: wandb is not installed.
        """
        _import_package("wandb")
        self.record = DefaultModelLogger(log_save_dir, name)
        self._messages: list[str] = []
        # Every training is a run of its own, even after one that was not closed.
        init = {"reinit": "create_new"} | init
        WandbLogger.__init__(self, name=name, save_dir=log_save_dir, project=project, **init)

    @override
    @rank_zero_only
    def log_message(self, message: str) -> None:
        self.record.log_message(message)
        self._messages.append(str(message))
        self.experiment.summary["messages"] = "\n".join(self._messages)

    @override
    @rank_zero_only
    def log_artifact(self, path: Path, name: str, kind: str, description: str = "") -> None:
        self.record.log_artifact(path, name, kind, description)
        artifact = _import_package("wandb").Artifact(name=name, type=kind, description=description)
        artifact.add_file(str(path))
        self.experiment.log_artifact(artifact)

    @override
    @rank_zero_only
    def close(self, status: str = "success") -> None:
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(status != "success"))


class MLFlowModelLogger(_Mirror, MLFlowLogger, LoggerProtocol):
    """The record of `DefaultModelLogger`, sent to MLflow as well: to a server, or to a folder."""

    def __init__(
        self,
        log_save_dir: Path | str,
        name: str,
        uri: str = "./mlruns",
        experiment_name: str = "LargeRasterOR",
        run_name: str = "",
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare a run; it begins with the first thing recorded.

        Args:
            log_save_dir: Directory of the files.
            name: Name of the training.
            uri: MLflow's server or database, or a folder, which is made.
            experiment_name: Of MLflow.
            run_name: Of MLflow's run, before the training's name.
            tags: Of the run.

        Raises:
            ModuleNotFoundError: mlflow is not installed.
        """
        _import_package("mlflow")
        self.record = DefaultModelLogger(log_save_dir, name)
        self._told: set[str] = set()
        if "://" not in uri:
            uri = Path(uri.removeprefix("file:")).absolute().as_uri()
        if uri.startswith("file:"):  # which newer MLflow refuses, unless this is said
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        MLFlowLogger.__init__(
            self, experiment_name, run_name="_".join(filter(None, [run_name, name])),
            tracking_uri=uri, tags=dict(tags or {}),
        )  # fmt: skip

    # what is written beside, as Lightning asks a logger for one directory
    save_dir = root_dir = log_dir = property(lambda self: self.record.save_dir)

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace) -> None:
        self.record.log_hyperparams(params)
        params = vars(params) if isinstance(params, Namespace) else params
        new = {name: value for name, value in params.items() if name not in self._told}
        self._told |= new.keys()  # MLflow's have one value, the first
        MLFlowLogger.log_hyperparams(self, new)

    @override
    @rank_zero_only
    def log_message(self, message: str) -> None:
        self.record.log_message(message)
        text = (Path(self.record.save_dir) / "messages.jsonl").read_text(encoding="utf-8")
        self.experiment.log_text(self.run_id, text, "messages.jsonl")

    @override
    @rank_zero_only
    def log_artifact(self, path: Path, name: str, kind: str, description: str = "") -> None:
        self.record.log_artifact(path, name, kind, description)
        self.experiment.log_artifact(self.run_id, str(path), kind)

    @override
    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Wait: a fit and a test share one record, which `close` ends."""

    @override
    @rank_zero_only
    def close(self, status: str = "success") -> None:
        if self._initialized:
            self.experiment.set_terminated(
                self.run_id, "FINISHED" if status == "success" else "FAILED"
            )


class TensorBoardModelLogger(_Mirror, TensorBoardLogger, LoggerProtocol):
    """The record of `DefaultModelLogger`, and event files for TensorBoard beside it."""

    def __init__(self, log_save_dir: Path | str, name: str, **init: object) -> None:
        """Prepare the event files; they go to `tensorboard/` in the directory.

        Args:
            log_save_dir: Directory of the files.
            name: Name of the training.
            init: Anything else that torch's `SummaryWriter` takes, such as `flush_secs`.

        Raises:
            ModuleNotFoundError: tensorboard is not installed.
        """
        _import_package("tensorboard")
        self.record = DefaultModelLogger(log_save_dir, name)
        TensorBoardLogger.__init__(
            self, log_save_dir, name="tensorboard", version="", default_hp_metric=False, **init
        )

    # what is written beside, as Lightning asks a logger for one directory
    save_dir = root_dir = property(lambda self: self.record.save_dir)
    log_dir = property(lambda self: str(Path(self.record.save_dir) / "tensorboard"))

    @override
    @rank_zero_only
    def log_message(self, message: str) -> None:
        self.record.log_message(message)
        self.experiment.add_text("messages", str(message))

    @override
    @rank_zero_only
    def log_artifact(self, path: Path, name: str, kind: str, description: str = "") -> None:
        self.record.log_artifact(path, name, kind, description)
        self.experiment.add_text(f"{kind}/{name}", str(path))

    @override
    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Write down what there is; a fit and a test share one record, which `close` ends."""
        self.experiment.flush()

    @override
    @rank_zero_only
    def close(self, status: str = "success") -> None:
        self.save()
        self.experiment.close()


LOGGERS: dict[Record, type[DefaultModelLogger | _Mirror]] = {
    "default": DefaultModelLogger, "wandb": WandbModelLogger, "mlflow": MLFlowModelLogger,
    "tensorboard": TensorBoardModelLogger,
}  # fmt: skip


def check_logger(kind: Record, options: Mapping[str, Any]) -> None:
    """Refuse options that a logger does not have.

    Raises:
        InputError: Names them, and those that it has.
    """
    known = inspect.signature(LOGGERS[kind].__init__).parameters
    own = [n for n in known if n not in ("self", "log_save_dir", "name", "init", "version")]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    if strange := [n for n in options if n not in own and not open_ended]:
        raise InputError(
            f"LOGGER_OPTIONS names {strange}, which the logger {kind!r} does not have; it has "
            f"{own or 'none'}"
        )


def make_model_logger(
    save_dir: Path,
    kind: Record = "default",
    options: Mapping[str, Any] | None = None,
    *,
    name: str,
    hyperparams: Mapping[str, Any],
) -> DefaultModelLogger | WandbModelLogger | MLFlowModelLogger | TensorBoardModelLogger:
    """Open the record of a training.

    It is one object, for the Trainer and for the training's own messages. The files are always
    written; other records mirror them, by a logger that holds a `DefaultModelLogger`, since a list
    of two loggers would make every caller loop.

    Args:
        save_dir: Where the files go.
        kind: Where the record goes as well.
        options: Further arguments of that logger.
        name: Of the training.
        hyperparams: Its first entries.

    Raises:
        InputError: The logger has no such option.
        ModuleNotFoundError: Its package is not installed.
    """
    options = dict(options or {})
    check_logger(kind, options)
    logger = LOGGERS[kind](save_dir, name=name, **options)
    logger.log_hyperparams(hyperparams)
    return logger


def get_logging_key(hyperparams: Mapping[str, Any]) -> str:
    """Name a trial after its hyperparameters, whatever their order: a name for files and tables.

    Distinct hyperparameters have distinct keys, also where upper and lower case are one. A key that
    would be ambiguous, too long or unfit for a file ends in a digest of the exact values.

    >>> get_logging_key({"learning_rate": 0.001, "batch_size": 4})
    'batch_size-4_learning_rate-0.001'
    """
    exact = {
        name: json.dumps(hyperparams[name], sort_keys=True, default=_readable)
        for name in sorted(hyperparams)
    }
    # Words lose their quotes, unless they would then read as JSON's true, false or null.
    word = r'"(?!(?:true|false|null)")([a-z][a-z0-9]*)"'
    pairs = {name: re.sub(word, r"\1", text) for name, text in exact.items()}
    key = "_".join(f"{name}-{text}" for name, text in pairs.items())
    # No - in a name and no _ in a value: the key reads in one way only.
    plain = all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in pairs) and all(
        re.fullmatch(r"[a-z0-9.+-]+", text) for text in pairs.values()
    )
    if plain and 0 < len(key) <= MAX_KEY_LENGTH:
        return key
    safe = re.sub(r"[^a-z0-9._+-]+", "-", key.lower())[:MAX_KEY_LENGTH].strip(".-")
    digest = hashlib.sha256(json.dumps(exact).encode()).hexdigest()[:8]
    return f"{safe or 'trial'}-{digest}"


def _is_number(value: object) -> bool:
    scalar = isinstance(value, Real) or getattr(value, "ndim", None) == 0
    return scalar and not isinstance(value, str)  # NumPy's strings have ndim 0


def _import_package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ModuleNotFoundError(missing_logger(name)) from None


def _readable(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value.tolist() if hasattr(value, "tolist") else str(value)
