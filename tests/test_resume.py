"""Interrupted trainings: they go on where they were, and end as if nothing had happened."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from conftest import PROJECT, small_conf, train_small

import gridsearch
import resume
import trials

STEPS = 9  # of `train_small`, three in an epoch
PATIENCE = 300  # s, for another process


class Interrupt(pl.Callback):
    """Interrupts a training after a step, or before a stage after it."""

    def __init__(self, step=None, *, stage=None):
        self.step, self.stage = step, stage

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt

    def on_validation_start(self, trainer, module):
        if self.stage == "validate" and trainer.state.fn == "validate":
            raise KeyboardInterrupt

    def on_test_start(self, trainer, module):
        if self.stage == "test":
            raise KeyboardInterrupt


class NoTraining(pl.Callback):
    def on_train_start(self, trainer, module):
        raise AssertionError("it was trained already")


def last(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["resume"]


def results(folder):
    state = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    table = pd.read_csv(folder / "metrics.csv").drop(columns="training_time")
    return state["state_dict"], table, (folder / "detections.csv").read_text()


def check_same(undisturbed, values, folder):
    known, untouched = undisturbed
    assert {k: v for k, v in values.items() if k != "training_time"} == {
        k: v for k, v in known.items() if k != "training_time"
    }
    for mine, other in zip(results(folder), results(untouched), strict=True):
        if isinstance(mine, dict):
            assert mine.keys() == other.keys()
            for name, value in mine.items():
                torch.testing.assert_close(value, other[name], rtol=0, atol=0, equal_nan=True)
        elif isinstance(mine, pd.DataFrame):
            pd.testing.assert_frame_equal(mine, other, check_like=True)
        else:
            assert mine == other


@pytest.fixture
def at_every_step(monkeypatch):
    monkeypatch.setattr(resume, "SAVE_SECONDS", 0.0)


def test_an_interrupted_training_ends_as_an_undisturbed_one(
    prepared, tmp_path, undisturbed, at_every_step
):
    """Within the first epoch, at the first step of the third, and when all steps are done.

    Its folder is moved between.
    """
    tmp_path = tmp_path / "before"
    for step, epoch, place in ((2, 0, 1), (7, 2, 0)):
        with pytest.raises(KeyboardInterrupt):
            train_small(prepared.data, tmp_path, [Interrupt(step)])
        record = last(tmp_path)
        assert (record["step"], record["epoch"], record["place"]) == (step - 1, epoch, place)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        tmp_path = tmp_path.rename(tmp_path.with_name(f"after_{step}"))
    path = tmp_path / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    state["resume"]["seconds"] += 1000
    torch.save(state, path)
    for callbacks in ([Interrupt(stage="validate")], [NoTraining(), Interrupt(stage="test")]):
        with pytest.raises(KeyboardInterrupt):
            train_small(prepared.data, tmp_path, callbacks)
        assert last(tmp_path)["finished"]
    assert path.stat().st_size < 10_000
    values = train_small(prepared.data, tmp_path, [NoTraining()])
    assert values["training_time"] > 1000
    check_same(undisturbed, values, tmp_path)


class Rates(pl.Callback):
    def __init__(self):
        self.rates = {}

    def on_train_batch_start(self, trainer, *args):
        self.rates[trainer.global_step] = trainer.optimizers[0].param_groups[0]["lr"]


@pytest.mark.long
def test_a_rate_that_fell_on_a_plateau_stays_low_after_an_interruption(
    prepared, tmp_path, at_every_step
):
    conf = small_conf().with_options(
        {"train.plateau_patience": 1, "train.gamma": 0.25, "train.warmup_share": 0.0,
         "train.augment.strength": 1.0, "train.augment.fancy_pca": 0.2,
         "validation.pr_compute_interval": 1}
    )  # fmt: skip
    options = {"conf": conf, "learning_rate": 1e-9}  # nothing is learnt
    whole, cut, again = Rates(), Rates(), Rates()
    values = train_small(prepared.data, tmp_path / "whole", [whole], **options)
    with pytest.raises(KeyboardInterrupt):
        train_small(prepared.data, tmp_path / "cut", [cut, Interrupt(8)], **options)
    found = train_small(prepared.data, tmp_path / "cut", [again], **options)
    assert whole.rates[0] == 4 * whole.rates[STEPS - 1]
    assert cut.rates | again.rates == whole.rates
    assert min(again.rates) == 7, "it went on from there"
    check_same((values, tmp_path / "whole"), found, tmp_path / "cut")


@pytest.mark.long
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("averaging", ["none", "swa"])
def test_wherever_a_training_is_interrupted_it_ends_the_same(
    prepared, tmp_path, at_every_step, averaging, seed
):
    conf = small_conf()
    conf.train.averaging, conf.workers = averaging, seed % 2
    whole = train_small(prepared.data, tmp_path / "whole", conf=conf), tmp_path / "whole"
    done, folder = 0, tmp_path / "cut"
    for step in sorted(random.Random(seed).sample(range(2, STEPS), 3)):
        with pytest.raises(KeyboardInterrupt):
            train_small(prepared.data, folder, [Interrupt(step)], conf=conf)
        assert last(folder)["step"] >= done
        done = last(folder)["step"]
    check_same(whole, train_small(prepared.data, folder, conf=conf), folder)


def test_what_cannot_be_gone_on_from_starts_over(prepared, tmp_path, caplog):
    folder = tmp_path / "checkpoints"

    class AtTheStart(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            assert trainer.global_step == 0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_small(prepared.data, tmp_path, [Interrupt(4)])
    files = {path: path.read_bytes() for path in folder.iterdir()}
    assert {path.name for path in files} == {"best.ckpt", "last.ckpt"}
    whole = files[folder / "last.ckpt"]
    cases = [
        ("last.ckpt is damaged", {"last.ckpt": whole[: len(whole) // 2]}, 1e-3),
        ("last.ckpt is damaged", {"last.ckpt": b""}, 1e-3),
        ("last.ckpt is of another training", {}, 2e-3),
        ("best.ckpt is gone", {"best.ckpt": None}, 1e-3),
    ]
    for expected, changed, rate in cases:
        for path, content in files.items():
            content = changed.get(path.name, content)
            path.unlink(missing_ok=True) if content is None else path.write_bytes(content)
        caplog.clear()
        with pytest.raises(KeyboardInterrupt):
            train_small(prepared.data, tmp_path, [AtTheStart()], learning_rate=rate)
        assert expected in caplog.text
        assert not list(folder.iterdir())
        assert len(pd.read_csv(tmp_path / "metrics.csv")) == 0


KILLED = """
    import pickle, sys
    from pathlib import Path
    sys.path[:0] = [{project!r}, {tests!r}]
    import resume
    from conftest import train_small

    resume.SAVE_SECONDS = 0.0
    train_small(pickle.loads(Path({data!r}).read_bytes()), Path({folder!r}))
"""


def test_a_killed_training_ends_as_an_undisturbed_one(prepared, tmp_path, undisturbed):
    """First as batch systems do it, then as nobody should; each time it gets further."""
    data, folder = tmp_path / "data.pkl", tmp_path / "trial"
    data.write_bytes(pickle.dumps(prepared.data))
    code = textwrap.dedent(KILLED).format(
        project=str(PROJECT), tests=str(PROJECT / "tests"), data=str(data), folder=str(folder)
    )
    path, written = folder / "checkpoints" / "last.ckpt", 0
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        try:
            give_up = time.monotonic() + PATIENCE
            while not path.exists() or path.stat().st_mtime_ns == written:
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < give_up
                time.sleep(0.02)
            os.kill(process.pid, number)
            _, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == -number or "KeyboardInterrupt" in errors
        assert 0 < last(folder)["step"] < STEPS
        written = path.stat().st_mtime_ns
    check_same(undisturbed, train_small(prepared.data, folder), folder)
    assert not list(path.parent.glob(".*"))


def test_a_search_takes_up_the_trial_that_was_interrupted(prepared, tmp_path, monkeypatch):
    space = {
        "patch_size": [128], "n_epochs": [2], "sample_size": [0.3], "learning_rate": [1e-3],
        "batch_size": [8],
    }  # fmt: skip
    original, begun = trials.train_iteration, []

    def train_iteration(*args, progress):
        class Watch(pl.Callback):
            def on_train_batch_end(self, trainer, *args):
                begun.append(trainer.global_step)
                if len(begun) == 5:
                    raise KeyboardInterrupt

        *shared, callbacks = args
        return original(*shared, [*callbacks, Watch()], progress=progress)

    monkeypatch.setattr(gridsearch, "train_iteration", train_iteration)
    with pytest.raises(KeyboardInterrupt):
        gridsearch.run_search(prepared.data, space, small_conf(), tmp_path)
    board = gridsearch.run_search(prepared.data, space, small_conf(), tmp_path)
    assert board["state"].tolist() == ["complete"]
    assert begun == [1, 2, 3, 4, 5, *range(5, 9)]  # from the second epoch on
    (folder,) = (tmp_path / "trials").glob("*/checkpoints")
    assert [path.name for path in folder.iterdir()] == ["best.ckpt"]
    table = pd.read_csv(folder.parent / "metrics.csv")
    steps = table.loc[table["train_loss_step"].notna(), "step"].to_numpy()
    np.testing.assert_array_equal(steps, range(8))
