import csv
import itertools
import json
import logging
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import DataLoader

from ImageData import InputError
from logger import (
    HANDLER_PREFIX,
    PROJECT_DIR,
    DefaultModelLogger,
    LoggerProtocol,
    WandbModelLogger,
    configure_logger,
    get_logging_key,
    make_model_logger,
)


@pytest.fixture
def root():
    """The root logger, with all loggers put back as they were afterwards."""
    root = logging.getLogger()
    names = ["pytorch_lightning", "lightning_fabric", *logging.Logger.manager.loggerDict]
    loggers = [root, *map(logging.getLogger, names)]
    before = [(one, one.handlers[:], one.level, one.propagate) for one in loggers]
    yield root
    for handler in root.handlers:
        if (handler.name or "").startswith(HANDLER_PREFIX):
            handler.close()
    for one, handlers, level, propagate in before:
        one.handlers[:], one.propagate = handlers, propagate
        one.setLevel(level)


class TinyModel(LightningModule):
    def __init__(self, width=4):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 1)

    def training_step(self, batch, index):
        loss = self.layer(batch).square().mean()
        self.log("train_loss", loss)
        return loss

    def test_step(self, batch, index):
        self.log("box_precision", self.layer(batch).mean() * 0 + 0.25)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.fixture
def train(tmp_path):
    def train(logger):
        loader = DataLoader(torch.ones(8, 4), batch_size=2)
        trainer = Trainer(
            logger=logger, max_epochs=1, accelerator="cpu", log_every_n_steps=1,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            default_root_dir=tmp_path,
        )  # fmt: skip
        model = TinyModel()
        trainer.fit(model, loader)
        trainer.test(model, loader, verbose=False)

    return train


# The application's log


def test_configuring_twice_writes_each_line_once(root, tmp_path, capsys):
    for _ in range(2):
        log = configure_logger(tmp_path / "application.log")
    log.info("kept %d boxes", 3)
    logging.getLogger("tiling").info("cut")
    assert capsys.readouterr().err == "__main__ - INFO - kept 3 boxes\ntiling - INFO - cut\n"
    lines = (tmp_path / "application.log").read_text().splitlines()
    assert [line.split(" - ", 1)[1] for line in lines] == [
        "__main__ - INFO - kept 3 boxes",
        "tiling - INFO - cut",
    ]


def test_a_console_handler_of_the_host_does_not_repeat_our_lines(root, capsys):
    root.addHandler(logging.StreamHandler())
    configure_logger().info("once")
    assert capsys.readouterr().err.count("once") == 1


@pytest.mark.parametrize("library", ["some_library.part", "pytorch_lightning.utilities"])
def test_libraries_are_heard_from_warnings_on(root, tmp_path, capsys, library):
    configure_logger(tmp_path / "application.log")
    other = logging.getLogger(library)
    other.setLevel(logging.DEBUG)
    other.info("chatter")
    other.warning("trouble")
    for text in (capsys.readouterr().err, (tmp_path / "application.log").read_text()):
        assert "chatter" not in text
        assert text.count("trouble") == 1
    other.setLevel(logging.NOTSET)


def test_the_level_holds_for_our_modules(root, capsys):
    configure_logger(level=logging.DEBUG)
    logging.getLogger("fileio").debug("detail")
    configure_logger(level=logging.ERROR)
    logging.getLogger("fileio").warning("minor")
    assert capsys.readouterr().err == "fileio - DEBUG - detail\n"


def test_another_log_file_takes_over(root, tmp_path):
    first, second = tmp_path / "first.log", tmp_path / "new" / "second.log"
    configure_logger(first).info("one")
    handler = next(h for h in root.handlers if h.name == f"{HANDLER_PREFIX}file")
    configure_logger(second).info("two")
    assert handler.stream is None  # closed
    assert "one" in first.read_text()
    assert "two" not in first.read_text()
    assert "two" in second.read_text()
    configure_logger().info("three")
    assert "three" not in second.read_text()


def test_importing_and_configuring_in_a_fresh_process_prints_each_line_once():
    code = (
        "import logging; from logger import configure_logger; log = configure_logger(); "
        "log = configure_logger(); log.info('ours'); "
        "logging.getLogger('pytorch_lightning').info('noise'); "
        "logging.getLogger('pytorch_lightning').warning('heard')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=PROJECT_DIR,
    )
    lines = [line for line in run.stderr.splitlines() if " - " in line or "noise" in line]
    assert lines == ["__main__ - INFO - ours", "pytorch_lightning - WARNING - heard"]


# The record in files


def test_a_training_leaves_its_hyperparameters_and_metrics(tmp_path, train):
    logger = make_model_logger(tmp_path, name="trial", hyperparams={"batch_size": 2})
    assert isinstance(logger, DefaultModelLogger)
    assert isinstance(logger, LoggerProtocol)
    train(logger)
    logger.log({"training_time": 1.5, "error_message": "none"})
    logger.close()
    assert json.loads((tmp_path / "hparams.json").read_text()) == {"batch_size": 2, "width": 4}
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert list(table)[:3] == ["step", "epoch", "train_loss"]
    losses = table.dropna(subset="train_loss")
    assert losses["step"].tolist() == [0, 1, 2, 3]
    assert losses["train_loss"].is_monotonic_decreasing
    assert losses["epoch"].tolist() == [0, 0, 0, 0]
    last = json.loads((tmp_path / "metrics.json").read_text())
    assert set(last) == {"train_loss", "box_precision", "training_time"}
    assert last["train_loss"] == losses["train_loss"].iloc[-1]
    assert last["box_precision"] == 0.25
    message = json.loads((tmp_path / "messages.jsonl").read_text())
    assert message["message"] == "error_message: none"


def test_numbers_become_metrics_and_the_rest_messages(tmp_path):
    logger = DefaultModelLogger(tmp_path)
    logger.log({"a": np.float32(0.5), "b": torch.tensor(2), "c": "text", "d": [1, 2], "e": None})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": 0.5, "b": 2}
    lines = (tmp_path / "messages.jsonl").read_text().splitlines()
    assert [json.loads(line)["message"] for line in lines] == ["c: text", "d: [1, 2]", "e: None"]


def test_a_new_metric_widens_the_table_and_keeps_its_rows(tmp_path):
    logger = DefaultModelLogger(tmp_path)
    logger.log_metrics({"loss": 0.5}, step=1)
    logger.log_metrics({"recall": 0.25, "epoch": 0}, step=2)
    rows = list(csv.reader((tmp_path / "metrics.csv").open()))
    assert rows == [
        ["step", "epoch", "loss", "recall"],
        ["1", "", "0.5", ""],
        ["2", "0", "", "0.25"],
    ]


def test_a_record_cut_off_by_a_kill_is_continued(tmp_path):
    DefaultModelLogger(tmp_path).log_metrics({"loss": 0.5, "recall": 0.1}, step=1)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("2,,0.2")  # the process died here
    logger = DefaultModelLogger(tmp_path)
    logger.log_metrics({"loss": 0.125}, step=2)
    assert pd.read_csv(tmp_path / "metrics.csv")["loss"].tolist() == [0.5, 0.125]
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"loss": 0.125, "recall": 0.1}


def test_hyperparameters_of_any_type_are_recorded(tmp_path):
    from ModelConfig import ModelConfig

    logger = DefaultModelLogger(tmp_path)
    logger.log_hyperparams({"conf": ModelConfig(), "path": tmp_path, "rate": np.float64(0.5)})
    logger.log_hyperparams({"rate": 0.25})
    hparams = json.loads((tmp_path / "hparams.json").read_text())
    assert hparams["conf"]["train"]["optimizer"] == "adamw"
    assert (hparams["path"], hparams["rate"]) == (str(tmp_path), 0.25)


def test_artifacts_are_copied_unless_they_lie_within_the_record(tmp_path):
    home = tmp_path / "record"
    logger = DefaultModelLogger(home)
    outside, inside = tmp_path / "evaluation.txt", home / "checkpoints" / "best.ckpt"
    inside.parent.mkdir()
    outside.write_text("0.5")
    inside.write_text("weights")
    DefaultModelLogger.default_artifact_logging(
        logger, outside, "evaluation_logs", "log_file", "Results"
    )
    logger.log_artifact(inside, "model", "checkpoint")
    assert json.loads((home / "artifacts.json").read_text()) == {
        "evaluation_logs": {
            "path": "artifacts/evaluation_logs.txt", "kind": "log_file", "description": "Results",
        },
        "model": {"path": "checkpoints/best.ckpt", "kind": "checkpoint", "description": ""},
    }  # fmt: skip
    assert (home / "artifacts" / "evaluation_logs.txt").read_text() == "0.5"
    assert [p.name for p in (home / "artifacts").iterdir()] == ["evaluation_logs.txt"]


@pytest.mark.parametrize(("name", "exists"), [("../name", True), ("", True), ("fine", False)])
def test_an_impossible_artifact_is_refused(tmp_path, name, exists):
    path = tmp_path / "file.txt"
    if exists:
        path.touch()
    with pytest.raises(InputError, match=r"must be"):
        DefaultModelLogger(tmp_path / "record").log_artifact(path, name, "kind")


def test_only_the_first_process_of_many_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = DefaultModelLogger(tmp_path)
    logger.log_hyperparams({"batch_size": 2})
    logger.log({"loss": 0.5, "note": "text"})
    assert not list(tmp_path.iterdir())


# The record in Weights & Biases


def test_wandb_offline_keeps_a_run_and_the_files(tmp_path, train, monkeypatch):
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    logger = make_model_logger(
        tmp_path / "a", "wandb", {"project": "p"}, name="a", hyperparams={"batch_size": 2}
    )
    assert isinstance(logger, WandbModelLogger)
    assert isinstance(logger, LoggerProtocol)
    report = tmp_path / "report.txt"
    report.write_text("text")
    # The first run is still open when the second begins: they must not mix.
    other = make_model_logger(tmp_path / "b", "wandb", {"project": "p"}, name="b", hyperparams={})
    try:
        train(logger)
        logger.log({"training_time": 1.5, "error_message": "all is well"})
        logger.log_artifact(report, "evaluation_logs", "log_file", "Results")
        other.log({"other_metric": 1.0})
    finally:
        logger.close()
        other.close(status="failed")
    a, b = (next((tmp_path / run).glob("wandb/offline-run-*/*.wandb")).read_bytes() for run in "ab")
    for text in (b"batch_size", b"train_loss", b"box_precision", b"training_time", b"all is well",
                 b"evaluation_logs"):  # fmt: skip
        assert text in a, text
    assert b"other_metric" in b
    assert b"other_metric" not in a
    last = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert set(last) == {"train_loss", "box_precision", "training_time"}


def test_missing_wandb_names_the_cure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    cure = r"wandb is not installed: pip install wandb, or set WANDB_ACTIVE = False"
    with pytest.raises(ModuleNotFoundError, match=cure):
        make_model_logger(tmp_path, "wandb", {"project": "p"}, name="t", hyperparams={})


# Keys


def test_a_key_reads_as_its_hyperparameters():
    hyperparams = {"patch_size": 256, "learning_rate": 1e-05, "backbone": "resnet18"}
    assert get_logging_key(hyperparams) == "backbone-resnet18_learning_rate-1e-05_patch_size-256"


VALUES = [1, 2, -1, 1.5, 1e-5, True, None, "1", "true", "x", "X", "x_b-1", "a/b", "a b", "ä", "",
          [1, 2], (1,), "long" * 100, float("nan"), np.float64(0.1)]  # fmt: skip


def test_distinct_hyperparameters_have_distinct_keys_fit_for_files(tmp_path):
    names = ["a", "A", "b", "a-1_b", "a_b", "../a"]
    trials = [{}, *({n: v} for n in names for v in VALUES)]
    trials += [{"a": v, "b": w} for v, w in itertools.product(VALUES, VALUES)]
    keys = [get_logging_key(trial) for trial in trials]
    assert len({key.lower() for key in keys}) == len(trials)
    for key in keys:
        assert set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789._+-")
        assert 0 < len(key) < 180
        assert key[0] not in ".-"
        assert key[-1] != "."


@given(
    st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.floats(), st.text())),
    st.randoms(),
)
def test_order_does_not_change_a_key(hyperparams, random):
    items = list(hyperparams.items())
    random.shuffle(items)
    assert get_logging_key(dict(items)) == get_logging_key(hyperparams)


# The record in TensorBoard and MLflow


def test_tensorboard_has_the_metrics_and_the_files_stay(tmp_path, train):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = make_model_logger(tmp_path, "tensorboard", name="t", hyperparams={"batch_size": 2})
    assert isinstance(logger, LoggerProtocol)
    train(logger)
    logger.log({"training_time": 1.5, "error_message": "all is well"})
    logger.close()
    names = sorted(path.name for path in (tmp_path / "tensorboard").iterdir())
    assert [name.partition(".")[0] for name in names] == ["events", "hparams"]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = pd.read_csv(tmp_path / "metrics.csv").dropna(subset="train_loss")
    scalars = events.Scalars("train_loss")
    assert [event.step for event in scalars] == losses["step"].tolist()
    assert [event.value for event in scalars] == pytest.approx(losses["train_loss"].tolist())
    assert json.loads((tmp_path / "hparams.json").read_text()) == {"batch_size": 2, "width": 4}
    assert "messages/text_summary" in events.Tags()["tensors"]


def test_mlflow_has_the_metrics_and_the_files_stay(tmp_path, train):
    mlflow = pytest.importorskip("mlflow")
    options = {"uri": str(tmp_path / "mlruns"), "experiment_name": "cover", "run_name": "first"}
    logger = make_model_logger(
        tmp_path / "a", "mlflow", options, name="trial", hyperparams={"batch_size": 2}
    )
    assert isinstance(logger, LoggerProtocol)
    report = tmp_path / "report.txt"
    report.write_text("text")
    train(logger)
    logger.log_hyperparams({"batch_size": 3})  # MLflow's stay as they were
    logger.log({"training_time": 1.5, "error_message": "all is well"})
    logger.log_artifact(report, "evaluation_logs", "log_file", "Results")
    logger.close()
    client = mlflow.tracking.MlflowClient((tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("cover").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.runName"] == "first_trial"
    assert run.data.params["batch_size"] == "2"
    assert run.data.metrics["training_time"] == 1.5
    losses = pd.read_csv(tmp_path / "a" / "metrics.csv").dropna(subset="train_loss")
    history = client.get_metric_history(run.info.run_id, "train_loss")
    assert [entry.value for entry in history] == pytest.approx(losses["train_loss"].tolist())
    kept = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert kept == {"log_file", "messages.jsonl"}


@pytest.mark.parametrize(
    ("kind", "cure"),
    [
        ("mlflow", "pip install mlflow-skinny, or set LOGGER = 'default'"),
        ("tensorboard", "pip install tensorboard, or set LOGGER = 'default'"),
    ],
)
def test_a_missing_logger_names_the_cure(tmp_path, monkeypatch, kind, cure):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(ModuleNotFoundError, match=f"{kind} is not installed: {cure}"):
        make_model_logger(tmp_path, kind, name="t", hyperparams={})


def test_an_option_that_a_logger_lacks_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"names \['url'\], which the logger 'mlflow' does not"):
        make_model_logger(tmp_path, "mlflow", {"url": "x"}, name="t", hyperparams={})
