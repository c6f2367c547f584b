"""The ledger: all runs and trials in one table, damaged ones included."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
from oracle import Oracle, draw
from painter import Painter, paint
from test_gridsearch import SPACE, conf, fake_training

import fileio
import gridsearch
import ledger
from ImageData import InputError, Window


@pytest.fixture(scope="module")
def runs(prepared, tmp_path_factory):
    """Three runs: one of another backbone, one with failures, one of a single trial."""
    folder = tmp_path_factory.mktemp("runs")

    def sometimes(hyperparams):
        if hyperparams["sample_size"] == 0.5:
            raise RuntimeError("out of memory")
        return 0.5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gridsearch, "train_iteration", fake_training())
        other = conf()
        other.backbone = "resnet34"
        gridsearch.run_search(prepared.data, SPACE, other, folder / "deep")
        patch.setattr(gridsearch, "train_iteration", fake_training(sometimes))
        gridsearch.run_search(prepared.data, SPACE, conf(), folder / "flat")
        patch.setattr(gridsearch, "train_iteration", fake_training())
        one = SPACE | {"sample_size": [0.5], "learning_rate": [1e-3]}
        gridsearch.run_search(prepared.data, one, conf(), folder / "single")
    (folder / "bench").mkdir()  # no run
    return folder


@pytest.fixture
def damaged(runs, tmp_path):
    """A copy of the runs, to spoil."""
    return shutil.copytree(runs, tmp_path / "runs")


def test_every_trial_of_every_run_is_a_row(runs, prepared):
    table = ledger.read_ledger(runs)
    assert table["run"].value_counts().to_dict() == {"deep": 4, "flat": 4, "single": 1}
    assert table["state"].value_counts().to_dict() == {"complete": 7, "fail": 2}
    failed = table[table["state"] == "fail"]
    assert (failed["problem"] == "RuntimeError: out of memory").all()
    assert (failed["sample_size"] == 0.5).all()
    assert failed["checkpoint"].isna().all()
    assert set(table["split_hash"]) == {fileio.fingerprint(prepared.blocks)}
    assert len(set(table["data"])) == len(set(table["tiles"])) == 1
    assert (pd.to_datetime(table["started"]) <= pd.Timestamp.now("UTC")).all()
    single = table[table["run"] == "single"].iloc[0]
    board = pd.read_csv(runs / "single" / "leaderboard.csv").iloc[0]
    assert single["AP50"] == board["AP50"]
    assert single["val_AP50"] == board["val_AP50"]
    assert single["seconds"] >= 0
    assert single["checkpoint"] == board["checkpoint"]
    assert list(table)[:3] == ["run", "trial", "state"]


def test_only_options_of_the_model_that_differ_are_columns(runs):
    table = ledger.read_ledger(runs)
    assert table.groupby("run")["backbone"].unique().map(list).to_dict() == {
        "deep": ["resnet34"], "flat": ["resnet18"], "single": ["resnet18"]
    }  # fmt: skip
    assert "fpn_channels" not in table
    assert "backbone" not in ledger.read_ledger(runs / "flat")


def test_a_trial_without_a_model_says_so(runs):
    failed = ledger.read_ledger(runs, "state == 'fail'").iloc[0]
    with pytest.raises(InputError, match="has no checkpoint and is fail"):
        ledger.load_model(failed)
    stopped = failed.copy()
    stopped["state"], stopped["checkpoint"] = "pruned", "best.ckpt"  # of its best epoch
    with pytest.raises(InputError, match="has a checkpoint and is pruned"):
        ledger.load_model(stopped)


@pytest.mark.parametrize("name", ["trials", "search"])
def test_a_run_may_have_any_name(damaged, name):
    (damaged / "single").rename(damaged / name)
    assert set(ledger.read_ledger(damaged)["run"]) == {"deep", "flat", name}
    assert set(ledger.read_ledger(damaged / name)["run"]) == {name}


def test_damaged_and_half_written_runs_are_listed_with_what_is_wrong(damaged):
    results = sorted((damaged / "deep" / "trials").glob("*/result.json"))
    results[0].write_text('{"hyperparams": {"patch_')
    results[1].write_text("[]")
    results[2].write_bytes(b"\xff\xfe\x00")
    (damaged / "flat" / "trials" / "made_from.json").write_text("no JSON")
    (damaged / "flat" / "search" / "search.json").unlink()
    shutil.rmtree(damaged / "single" / "trials")
    (damaged / "single" / "trials").write_text("a file")
    (damaged / "begun").mkdir()
    (damaged / "begun" / "application.log").write_text("")
    working = damaged / "deep" / "trials" / ".batch_size-8~0badf00d"
    working.mkdir()
    (working / "hparams.json").write_text('{"batch_size": 8, "patch_size": 128}')
    table = ledger.read_ledger(damaged)
    deep = table[table["run"] == "deep"]
    assert sorted(deep["state"]) == ["complete", "damaged", "damaged", "damaged", "unfinished"]
    problems = deep[deep["state"] == "damaged"]["problem"]
    assert problems.str.contains("result.json cannot be read").all()
    assert deep[deep["state"] == "unfinished"]["trial"].tolist() == ["batch_size-8"]
    flat = table[table["run"] == "flat"]
    assert sorted(flat["state"]) == ["complete", "complete", "fail", "fail"]
    assert flat["problem"].str.contains("made_from.json cannot be read").all()
    assert flat["split_hash"].isna().all()
    single = table[table["run"] == "single"].iloc[0]
    assert (single["state"], single["trial"]) == ("damaged", "")
    assert "trials cannot be read" in single["problem"]
    assert table[table["run"] == "begun"]["state"].tolist() == ["empty"]


@pytest.mark.parametrize("name", ["result.json", "failure.json", "hparams.json"])
def test_whatever_a_record_holds_the_table_is_made(damaged, name):
    (result,) = (damaged / "single" / "trials").glob("*/result.json")
    result.unlink()
    for content in (
        b"", b"null", b"{}", b'{"values": 3}', b'{"hyperparams": []}', b'{"pruned": {}}',
        b'{"pruned": {"epoch": "x", "val_AP50": "y"}}', b"\x80\x04.", b'{"worker": 3}',
        b'{"values": {"AP50": "x"}}', b'{"error": [1]}', b'{"started": 3, "seconds": "x"}',
        b'{"hyperparams": {"batch_size": "x"}, "code_version": 3}',
    ):  # fmt: skip
        (result.parent / name).write_bytes(content)
        table = ledger.read_ledger(damaged)
        assert len(table) == 9, content
        fileio.write_table(damaged / "table.parquet", table)
        assert len(pd.read_parquet(damaged / "table.parquet")) == 9, content


def test_conditions_keep_rows():
    table = pd.DataFrame(
        {"AP50": [0.2, 0.6, np.nan], "state": ["fail", "complete", "pruned"],
         "patch_size": [256, 400, 256], "train.epochs": [1, 2, 3]}
    )  # fmt: skip

    def kept(where):
        return ledger.filter_rows(table, where)["patch_size"].tolist()

    assert kept("AP50 > 0.5") == [400]
    assert kept("not AP50 > 0.5") == [256]
    assert kept("AP50 != 0.6") == [256]
    assert kept("AP50 not in [0.6]") == [256]
    assert kept("not (AP50 > 0.5 and patch_size == 400)") == [256, 256]  # whatever it is
    assert kept("0.1 < AP50 <= 0.6 and state == 'fail'") == [256]
    assert kept("state in ['complete', 'pruned'] or AP50 < 0.3") == [256, 400, 256]
    assert kept("state not in ['fail']") == [400, 256]
    assert kept("train.epochs >= 2 and (AP50 > -1)") == [400]


@pytest.mark.parametrize(
    "where",
    [
        "__import__('os').system('touch {path}')", "@pd", "AP50.__class__", "state.str.len() > 1",
        "(lambda: 1)()", "[x for x in AP50]", "AP50 > open('{path}', 'w')", "AP60 > 1", "AP50",
        "'a' * 10**9 == state", "state < 3", "AP50 >", "AP50 := 1", "f'{state}' == 'x'",
        "AP50[0] > 1", "(" * 5000, "AP50 is 3", "state in 5", "'fail' in state",
    ],
)  # fmt: skip
def test_conditions_execute_nothing(where, tmp_path):
    table = pd.DataFrame({"AP50": [0.2], "state": ["fail"]})
    where = where.replace("{path}", str(tmp_path / "made"))
    with pytest.raises(InputError, match="condition"):
        ledger.filter_rows(table, where)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_and_shows_the_ledger(runs, tmp_path, capsys):
    out = tmp_path / "ledger.parquet"
    arguments = ["ledger", str(runs), "--where", "AP50 > 0.85 and run == 'deep'"]
    assert gridsearch.main([*arguments, "--out", str(out)]) == 0
    written = pd.read_parquet(out)
    assert (written["AP50"] > 0.85).all()
    assert len(written) == len(ledger.read_ledger(runs, arguments[3])) > 0
    told = capsys.readouterr().out
    assert gridsearch.main(arguments) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) == 1 + len(written)
    assert told == f"{shown}rows written to {out}: {len(written)}\n"
    assert gridsearch.main(["ledger", str(tmp_path / "none")]) == ledger.FAILED
    assert "there is no folder of runs" in capsys.readouterr().err
    assert gridsearch.main([*arguments, "--out", "x.pkl"]) == ledger.FAILED
    assert "must end in .parquet or .csv" in capsys.readouterr().err


def test_trials_are_ranked_by_any_number(runs):
    table = ledger.read_ledger(runs)
    ranked = ledger.rank_rows(table, "AP50")
    assert len(ranked) == 7
    assert ranked["AP50"].is_monotonic_decreasing
    assert ranked["AP50"].iloc[0] == table["AP50"].max()
    assert ledger.rank_rows(table, "seconds")["seconds"].is_monotonic_increasing
    with pytest.raises(InputError, match=r"'AP5', no column of numbers; did you mean AP50\?"):
        ledger.rank_rows(table, "AP5")
    with pytest.raises(InputError, match="no trial meets the condition"):
        ledger.rank_rows(table[:0], "AP50")
    with pytest.raises(InputError, match=r"no column 'AP5'; did you mean AP50\?"):
        ledger.filter_rows(table, "AP5 > 0.1")
    with pytest.raises(InputError, match="no trial is complete and has a value of 'AP50'"):
        ledger.rank_rows(table[table["state"] == "fail"], "AP50")


def test_folders_of_several_machines_are_one_table(runs, tmp_path, capsys):
    other = shutil.copytree(runs / "deep", tmp_path / "other" / "deep")
    table = ledger.read_ledger([runs, other, runs / "single"])
    names = {f"{runs.name}/deep": 4, "other/deep": 4, "flat": 4, "single": 1}
    assert table["run"].value_counts().to_dict() == names
    (tmp_path / "other" / "latest").symlink_to(other)
    assert set(ledger.read_ledger(tmp_path / "other")["run"]) == {"deep"}
    arguments = ["ledger", str(runs), str(other), "--best", "AP50", "--where", "AP50 > 0.1"]
    assert gridsearch.main(arguments) == 0
    _, first, second, *_, last = capsys.readouterr().out.splitlines()
    best = ledger.rank_rows(table, "AP50").iloc[0]
    assert f"{best['AP50']:.4g}" in first
    assert best["trial"] in first
    assert best["trial"] in second  # of the copy
    assert last == f"the best model: {best['checkpoint']}"
    apart = runs.parent / "apart"
    shutil.copytree(runs / "deep", apart / "elsewhere")
    record = apart / "elsewhere" / "trials" / "made_from.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"ground": "other"}))
    assert gridsearch.main(["ledger", str(runs), str(apart), "--best", "AP50"]) == 0
    assert "measured on different ground" in capsys.readouterr().out
    path = Path(best["checkpoint"])
    content = path.read_bytes()
    path.unlink()
    only = ["--where", f"trial == '{best['trial']}'"]
    assert gridsearch.main(["ledger", str(runs), str(other), "--best", "AP50", *only]) == 0
    path.write_bytes(content)  # which others compare
    assert capsys.readouterr().out.splitlines()[-1] == "the best model: its file is gone"


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_models_are_compared_on_one_window(tmp_path, monkeypatch, task):
    rows = pd.DataFrame(
        {"run": "r", "trial": ["one", "two"], "state": "complete", "patch_size": [64, 64],
         "n_epochs": [3, 5]}
    )  # fmt: skip
    window = Window(100, 60, 200, 150)
    if task == "detection":
        draw(tmp_path / "a.tif", 400, 300)
        models = {"one": Oracle(), "two": Oracle(offset=(5.0, 0.0))}
        truth = {"truth": pd.DataFrame({"label": ["dim"], "xmin": 110.0, "ymin": 70.0,
                                        "xmax": 120.0, "ymax": 90.0})}  # fmt: skip
    else:
        paint(tmp_path / "a.tif", 400, 300)
        models = {"one": Painter(), "two": Painter()}
        models["two"].labels = ("background", "sea", "water")
        truth = None
    monkeypatch.setattr(ledger, "load_model", lambda row: models[row["trial"]])
    figure = ledger.compare(rows, tmp_path / "a.tif", window, truth, override=["radiometry"])
    titles = [ax.get_title() for ax in figure.axes]
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    figure.canvas.draw()
    if task == "detection":
        assert titles[:2] == ["a.tif", "truth: 1"]
        one, two = (int(title.rpartition(" ")[2]) for title in titles[2:])
        assert one > 10
        assert abs(one - two) < one / 2
        assert shown == ["bright", "dim"]
    else:
        assert titles == ["a.tif", "1: n_epochs 3", "2: n_epochs 5"]
        assert shown == ["background", "land", "water", "sea"]  # of both
        pictures = [ax.images[-1].get_array() for ax in figure.axes[1:]]
        same = (pictures[0] == pictures[1]).all(axis=-1)
        assert 0.2 < same.mean() < 0.9  # land and sea have other colours
        with pytest.raises(InputError, match="the models differ in their classes"):
            ledger.compare(rows, tmp_path / "a.tif", window, {"truth": np.zeros((150, 200), "u1")})
    alone = ledger.compare(rows[:1], tmp_path / "a.tif", window, override=["radiometry"])
    assert alone.axes[1].get_title().startswith("1: r")
    for number, model in enumerate(models.values(), start=1):
        model.contract = dataclasses.replace(model.contract, resolution=0.2 * number)
    with rasterio.open(tmp_path / "a.tif", "r+") as dst:
        dst.crs, dst.transform = "EPSG:32617", rasterio.Affine(0.1, 0, 404000, 0, -0.1, 3285000)
    with pytest.raises(InputError, match="compare models of one resolution"):
        ledger.compare(
            rows, tmp_path / "a.tif", Window(10, 10, 50, 50), override=["radiometry"], resample=True
        )
    with pytest.raises(InputError, match="there are no trials to compare"):
        ledger.compare(rows[:0], tmp_path / "a.tif", window)


def test_a_folder_without_runs_is_an_empty_table(tmp_path):
    table = ledger.read_ledger(tmp_path)
    assert len(table) == 0
    assert json.loads(table.to_json(orient="records")) == []
