"""The search: every trial once, failures recorded, kills survived, honest selection."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import optuna
import pandas as pd
import pytest
import torch
from conftest import PROJECT

import fileio
import gridsearch
import ledger
import masks
import study
import trials
from ImageData import InputError
from LargeRasterOR import LargeRasterORModel
from logger import get_logging_key
from ModelConfig import ModelConfig

SPACE = {
    "patch_size": [128], "n_epochs": [1], "sample_size": [0.5, 1.0], "learning_rate": [1e-3, 2e-3],
    "batch_size": [8],
}  # fmt: skip


def conf():
    conf = ModelConfig(fpn_channels=16, accelerator="cpu", precision="32-true")
    conf.test.score_threshold = 0.0  # an epoch on little ground makes no model sure of anything
    return conf


def fake_training(values_of=lambda h: h["sample_size"] * h["learning_rate"] * 100):
    """Stand in for a training where only the search's book-keeping is looked at."""

    def train_iteration(hyperparams, data, conf, trial_dir, logger, callbacks=(), *, progress):
        value = values_of(hyperparams)
        (trial_dir / "checkpoints").mkdir(parents=True)
        (trial_dir / "checkpoints" / "best.ckpt").write_text(str(value))
        for name in trials.EVALUATION_FILES:
            (trial_dir / name).write_text(f"value\n{value}\n")
        return {"AP50": 1 - value, "val_AP50": value, "box_f1": value}

    return train_iteration


@pytest.fixture
def counted(monkeypatch):
    trained = Counter()

    def count(hyperparams):
        trained[hyperparams["sample_size"], hyperparams["learning_rate"]] += 1
        return hyperparams["sample_size"] * hyperparams["learning_rate"] * 100

    monkeypatch.setattr(gridsearch, "train_iteration", fake_training(count))
    return trained


@pytest.fixture(scope="module")
def real_run(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "real"
    space = SPACE | {"sample_size": [1.0], "learning_rate": [1e-3]}
    board = gridsearch.run_search(prepared.data, space, conf(), folder)
    return folder, board


def test_a_real_trial_leaves_its_record(real_run, prepared):
    folder, board = real_run
    row = board.iloc[0]
    assert row["state"] == "complete"
    assert row["selected"]
    for name in ("AP", "AP50", "AP75", "box_precision", "box_recall", "box_f1", "class_recall"):
        assert 0 <= row[name] <= 1
        assert 0 <= row[f"val_{name}"] <= 1
    trial = gridsearch.trial_dir_of(row)
    recorded = pd.read_csv(trial / "metrics.csv")
    assert {"train_loss_step", "train_loss_epoch", "val_loss", "val_AP50", "AP50"} <= set(recorded)
    steps = recorded["train_loss_step"].notna().sum()
    assert steps == -(-(prepared.tiles["split"] == "train").sum() // 8)
    assert json.loads((trial / "hparams.json").read_text())["batch_size"] == 8
    assert [path.name for path in (trial / "checkpoints").iterdir()] == ["best.ckpt"]
    summary = json.loads((folder / "metrics.json").read_text())
    assert summary["values"]["AP50"] == row["AP50"]
    assert json.loads((folder / "classes.json").read_text()) == prepared.data.ids


def test_every_epoch_of_a_trial_is_reported_to_the_search(real_run):
    folder, board = real_run
    storage = study.open_storage(None, folder)
    (name,) = optuna.get_all_study_names(storage)
    (trial,) = optuna.load_study(study_name=name, storage=storage).trials
    recorded = pd.read_csv(gridsearch.trial_dir_of(board.iloc[0]) / "metrics.csv")
    assert trial.intermediate_values == {1: recorded["val_AP50"].dropna().iloc[0]}


def test_a_row_of_the_ledger_becomes_a_model(real_run):
    folder, board = real_run
    (row,) = (row for _, row in ledger.read_ledger(folder).iterrows())
    assert row["AP50"] == board["AP50"].iloc[0]
    assert row["seconds"] >= row["training_time"] > 0
    model = ledger.load_model(row)
    assert not model.training
    with torch.no_grad():
        (found,) = model(torch.zeros(1, len(model.contract.bands), 128, 128))
    assert set(found) >= {"boxes", "scores", "labels"}


def test_detections_lie_on_the_test_ground_of_their_raster(real_run, prepared):
    folder, _ = real_run
    df = pd.read_csv(folder / "detections.csv")
    assert len(df) > 0
    blocks = prepared.blocks.set_index("block")
    assert set(blocks.loc[df["block"].unique(), "split"]) == {"test"}
    mine = blocks.loc[df["block"]].reset_index(drop=True)
    assert (df["raster"] == mine["raster"]).all()
    assert (df["xmin"] >= mine["x"]).all()
    assert (df["xmax"] <= mine["x"] + mine["width"]).all()
    assert (df["ymin"] >= mine["y"]).all()
    assert (df["ymax"] <= mine["y"] + mine["height"]).all()
    assert df["score"].between(0, 1).all()
    assert set(df["label"]) <= set(prepared.data.ids)


def test_the_best_checkpoint_carries_the_validated_threshold(real_run):
    folder, board = real_run
    model = LargeRasterORModel.load_from_checkpoint(folder / "best.ckpt", map_location="cpu")
    assert float(model.operating_threshold) == pytest.approx(board.iloc[0]["score_threshold"])
    assert board.iloc[0]["score_threshold"] == board.iloc[0]["val_score_threshold"]
    state = torch.load(folder / "best.ckpt", weights_only=True)
    contract = state["hyper_parameters"]["contract"]
    assert contract["tile_size"] == 128
    assert contract["split_hash"]
    assert contract["resolution"] == pytest.approx(0.5, rel=1e-3)  # m on the ground


def test_the_same_seed_gives_the_same_model(prepared, tmp_path):
    space = SPACE | {"sample_size": [0.5], "learning_rate": [1e-3]}
    boards = [
        gridsearch.run_search(prepared.data, space, conf(), tmp_path / str(i)) for i in range(2)
    ]
    for name in ("val_loss", "test_loss", "AP50"):
        assert boards[0][name].iloc[0] == pytest.approx(boards[1][name].iloc[0], rel=1e-4)


def test_the_grid_is_trained_once_and_then_left_alone(prepared, tmp_path, counted):
    board = gridsearch.run_search(prepared.data, SPACE, conf(), tmp_path)
    assert len(board) == 4
    assert set(counted.values()) == {1}
    again = gridsearch.run_search(prepared.data, SPACE, conf(), tmp_path)
    assert set(counted.values()) == {1}
    pd.testing.assert_frame_equal(board, again)


def test_a_space_without_a_hyperparameter_is_refused_before_anything_is_written(prepared, tmp_path):
    space = {name: values for name, values in SPACE.items() if name != "patch_size"}
    with pytest.raises(InputError, match=r"it lacks \['patch_size', 'n_epochs'\]"):
        gridsearch.run_search(
            prepared.data, space | {"n_epochs": [], "learning_rate": np.geomspace(1e-4, 1e-2, 3)},
            conf(), tmp_path / "run",
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_the_board_is_sorted_by_test_and_the_best_chosen_by_validation(prepared, tmp_path, counted):
    board = gridsearch.run_search(prepared.data, SPACE, conf(), tmp_path)
    assert board["AP50"].is_monotonic_decreasing
    best = board[board["selected"]].iloc[0]
    assert best["val_AP50"] == board["val_AP50"].max()
    assert not board["selected"].iloc[0]  # here the two disagree, on purpose
    assert float((tmp_path / "best.ckpt").read_text()) == best["val_AP50"]
    assert json.loads((tmp_path / "metrics.json").read_text())["values"]["AP50"] == best["AP50"]
    assert len(pd.read_csv(tmp_path / "leaderboard.csv")) == 4


def test_a_larger_grid_trains_what_is_missing_only(prepared, tmp_path, counted):
    gridsearch.run_search(prepared.data, SPACE | {"sample_size": [1.0]}, conf(), tmp_path)
    board = gridsearch.run_search(prepared.data, SPACE, conf(), tmp_path)
    assert len(board) == 4
    assert set(counted.values()) == {1}


def test_a_failed_trial_is_recorded_and_the_search_goes_on(prepared, tmp_path, monkeypatch):
    broken = {"yes": True}

    def values_of(hyperparams):
        if hyperparams["sample_size"] == 0.5 and broken["yes"]:
            raise RuntimeError("out of memory")
        return 0.5

    monkeypatch.setattr(gridsearch, "train_iteration", fake_training(values_of))
    board = gridsearch.run_search(prepared.data, SPACE, conf(), tmp_path)
    assert board["state"].tolist() == ["complete", "complete", "fail", "fail"]
    assert board["error"].iloc[-1] == "RuntimeError: out of memory"
    key = get_logging_key({name: values[0] for name, values in SPACE.items()})
    assert "Traceback" in (tmp_path / "trials" / key / "messages.jsonl").read_text()

    broken["yes"] = False
    board = gridsearch.run_search(prepared.data, SPACE, conf(), tmp_path)
    assert (board["state"] == "fail").sum() == 2  # not repeated unasked
    board = gridsearch.run_search(prepared.data, SPACE, conf(), tmp_path, retry_failed=True)
    assert board["state"].tolist() == ["complete"] * 4


def test_a_search_killed_between_two_retries_goes_on(prepared, tmp_path, monkeypatch):
    state = {"broken": True, "calls": 0}

    def values_of(hyperparams):
        state["calls"] += 1
        if state["broken"]:
            raise RuntimeError("out of memory")
        if state["calls"] == 6:
            raise KeyboardInterrupt  # in the second retry, with two more in the queue
        return 0.5

    monkeypatch.setattr(gridsearch, "train_iteration", fake_training(values_of))
    with pytest.raises(InputError, match="all 4 trials failed"):
        gridsearch.run_search(prepared.data, SPACE, conf(), tmp_path)
    state["broken"] = False
    with pytest.raises(KeyboardInterrupt):
        gridsearch.run_search(prepared.data, SPACE, conf(), tmp_path, retry_failed=True)
    board = gridsearch.run_search(prepared.data, SPACE, conf(), tmp_path)
    assert board["state"].tolist() == ["complete"] * 4
    assert state["calls"] == 4 + 2 + 3


def test_among_equal_validations_the_test_has_no_say(prepared, tmp_path, monkeypatch):
    chosen = []
    for name, values in (("rising", [0.1, 0.5, 0.7, 0.9]), ("falling", [0.9, 0.7, 0.5, 0.1])):
        tests = iter(values)

        def train_iteration(*args, tests=tests, **options):
            return fake_training(lambda _: 0.25)(*args, **options) | {"AP50": next(tests)}

        monkeypatch.setattr(gridsearch, "train_iteration", train_iteration)
        board = gridsearch.run_search(prepared.data, SPACE, conf(), tmp_path / name)
        chosen.append(board[board["selected"]][list(SPACE)].to_numpy().tolist())
    assert chosen[0] == chosen[1]


def test_results_of_other_input_are_not_trusted(prepared, tmp_path, counted):
    """Half a deletion may leave results without the record of what they were made from."""
    gridsearch.run_search(prepared.data, SPACE, conf(), tmp_path)
    (tmp_path / "trials" / "made_from.json").unlink()
    (tmp_path / "study.journal").unlink()
    other = conf()
    other.backbone = "resnet34"
    gridsearch.run_search(prepared.data, SPACE, other, tmp_path)
    assert set(counted.values()) == {2}


def test_a_search_begins_when_nobody_else_prepares_it(prepared, tmp_path, counted):
    with ThreadPoolExecutor(1) as pool:
        with fileio.exclusive(tmp_path):
            board = pool.submit(gridsearch.run_search, prepared.data, SPACE, conf(), tmp_path)
            wait([board], timeout=0.5)
            assert not board.done()
            assert not counted
        assert len(board.result()) == 4


def test_weights_and_biases_record_a_search_offline(prepared, tmp_path, counted):
    one = SPACE | {"sample_size": [1.0], "learning_rate": [1e-3]}
    gridsearch.run_search(prepared.data, one, conf(), tmp_path, logger="wandb")
    assert list(tmp_path.glob("trials/*/wandb/offline-run-*/*.wandb"))


def test_models_that_cannot_be_built_show_before_the_search(prepared):
    bad = conf()
    bad.weights = "/no/such/file.pth"
    with pytest.raises(InputError, match="WEIGHTS must be a file"):
        trials.prepare_search(prepared.images, prepared.blocks, prepared.tilings, [1.0], bad)


def test_a_search_in_which_all_fail_says_why(prepared, tmp_path, monkeypatch):
    def values_of(hyperparams):
        raise RuntimeError("no such device")

    monkeypatch.setattr(gridsearch, "train_iteration", fake_training(values_of))
    with pytest.raises(InputError, match=r"all 4 trials failed.*no such device"):
        gridsearch.run_search(prepared.data, SPACE, conf(), tmp_path)
    assert len(pd.read_csv(tmp_path / "leaderboard.csv")) == 4


def test_trials_of_other_input_are_not_mixed(prepared, tmp_path, counted):
    gridsearch.run_search(prepared.data, SPACE, conf(), tmp_path)
    other = conf()
    other.backbone = "resnet34"
    with pytest.raises(InputError, match="trials made with other configuration"):
        gridsearch.run_search(prepared.data, SPACE, other, tmp_path)
    assert len(pd.read_csv(tmp_path / "leaderboard.csv")) == 4
    gridsearch.run_search(prepared.data, SPACE, other, tmp_path, force=True)
    assert set(counted.values()) == {2}


def test_an_interrupted_trial_starts_over(prepared, tmp_path, monkeypatch):
    calls = []

    def values_of(hyperparams):
        calls.append((hyperparams["sample_size"], hyperparams["learning_rate"]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 0.5

    monkeypatch.setattr(gridsearch, "train_iteration", fake_training(values_of))
    with pytest.raises(KeyboardInterrupt):
        gridsearch.run_search(prepared.data, SPACE, conf(), tmp_path)
    board = gridsearch.run_search(prepared.data, SPACE, conf(), tmp_path)
    assert board["state"].tolist() == ["complete"] * 4
    assert Counter(calls)[calls[1]] == 2
    assert sum(Counter(calls).values()) == 5


KILLED = """
    import sys, time, json, pickle
    from pathlib import Path
    sys.path[:0] = [{project!r}, {tests!r}]
    import gridsearch
    from test_gridsearch import SPACE, conf, fake_training

    def values_of(hyperparams):
        with open({log!r}, "a") as file:
            file.write(f"start {{hyperparams['sample_size']}} {{hyperparams['learning_rate']}}\\n")
        time.sleep(0.4)
        return 0.5

    gridsearch.train_iteration = fake_training(values_of)
    data = pickle.loads(Path({data!r}).read_bytes())
    gridsearch.run_search(data, SPACE, conf(), Path({run!r}))
"""


def test_a_killed_search_resumes_without_repeating_or_losing_a_trial(prepared, tmp_path):
    import pickle

    data, log, run = tmp_path / "data.pkl", tmp_path / "log", tmp_path / "run"
    data.write_bytes(pickle.dumps(prepared.data))
    code = textwrap.dedent(KILLED).format(
        project=str(PROJECT), tests=str(PROJECT / "tests"), log=str(log), data=str(data),
        run=str(run),
    )  # fmt: skip
    finished = 0
    for kill_during in (2, 3):
        process = subprocess.Popen([sys.executable, "-c", code])
        while process.poll() is None:
            started = log.read_text().count("start") if log.exists() else 0
            if started >= kill_during + (kill_during > 2):  # the killed one starts again
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.02)
        process.wait()
        finished = len(list(run.glob("trials/*/result.json")))
        assert finished < 4
    subprocess.run([sys.executable, "-c", code], check=True)
    board = pd.read_csv(run / "leaderboard.csv")
    assert board["state"].tolist() == ["complete"] * 4
    starts = Counter(log.read_text().splitlines())
    assert len(starts) == 4
    assert sum(starts.values()) == 6  # four trials, two of them killed once
    assert np.isfinite(board["AP50"]).all()
    assert finished >= 1


def test_problems_of_the_splits_show_before_the_search(prepared, tmp_path):
    train = prepared.tiles["split"] == "train"
    tiles = prepared.tiles.assign(kept=~train, reason="black_pixel_filter")
    tiles.to_parquet(tmp_path / "tiles.parquet")
    prepared.boxes.to_parquet(tmp_path / "boxes.parquet")
    with pytest.raises(InputError, match="no train tile is left after filtering"):
        trials.prepare_search(prepared.images, prepared.blocks, {128: tmp_path}, [1.0], conf())


def test_labels_and_rasters_of_an_evaluation_are_texts(tmp_path):
    header = "raster,block,label,score"
    (tmp_path / "detections.csv").write_text(f"{header}\n20230101,0,01,0.5\n20230101,1,NA,\n")
    (tmp_path / "objects.csv").write_text(f"{header}\n")
    found, objects = gridsearch.read_evaluation(tmp_path)
    assert found[["raster", "label"]].to_numpy().tolist() == [
        ["20230101", "01"],
        ["20230101", "NA"],
    ]
    assert found["score"].isna().tolist() == [False, True]
    assert objects.empty


def test_of_equal_trials_the_same_is_selected_whatever_was_interrupted(
    prepared, tmp_path, monkeypatch
):
    equals, attempts = fake_training(lambda _: 0.5), []

    def interrupted_at_first(*args, **options):
        attempts.append(args)
        if len(attempts) == 1:
            raise KeyboardInterrupt
        return equals(*args, **options)

    boards = []
    for train, name in ((interrupted_at_first, "interrupted"), (equals, "undisturbed")):
        monkeypatch.setattr(gridsearch, "train_iteration", train)
        with suppress(KeyboardInterrupt):
            gridsearch.run_search(prepared.data, SPACE, conf(), tmp_path / name)
        boards.append(gridsearch.run_search(prepared.data, SPACE, conf(), tmp_path / name))
    assert boards[0]["trial"].tolist() != boards[1]["trial"].tolist()
    compared = [*SPACE, "selected"]
    assert boards[0][compared].equals(boards[1][compared])


def test_the_fullest_block_of_a_map_is_that_with_most_pixels_of_classes(tmp_path):
    images = [SimpleNamespace(image_identifier=name, df=masks.empty_table()) for name in "ab"]
    blocks = pd.DataFrame(
        {"block": [0, 1, 2], "raster": ["a", "b", "b"], "split": "test", "x": [0, 0, 9], "y": 0,
         "width": 9, "height": 9},
    )  # fmt: skip
    pixels = pd.DataFrame(
        {"raster": ["a", "a", "b", "b", "b"], "block": [0, 0, 1, 1, 2],
         "label": ["background", "x", "x", "y", "background"], "truth": [80, 1, 20, 20, 81]},
    )  # fmt: skip
    pixels.to_csv(tmp_path / "pixels.csv", index=False)
    image, block = gridsearch.fullest_test_block(images, blocks, tmp_path)
    assert (image, block["block"]) == (images[1], 1)
