"""The whole pipeline, as a user runs it: papermill on a tiny sample."""

from __future__ import annotations

import json
import re
import resource
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import yaml
from conftest import PROJECT, make_samples

import atlas
import fileio
import sampledata
from ImageData import BOX_COLUMNS, Window


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"first": (512, 384), "second": (384, 384)}
    make_samples(folder, sizes)
    annotated = pd.DataFrame([[0, 0, 300, 384, "annotated"]], columns=[*BOX_COLUMNS, "label"])
    second = fileio.read_raster(folder / "images" / "second.tif")
    fileio.write_annotations(folder / "datasets" / "aoi.gpkg", annotated, second)
    parameters = yaml.safe_load((PROJECT / "params" / "tiny.yaml").read_text()) | {
        "DF_FILENAMES": [f"{name}.csv" for name in sizes],
        "IMAGE_FILENAMES": [f"{name}.tif" for name in sizes],
        "DF_DIR": str(folder / "datasets"),
        "IMG_DIR": str(folder / "images"),
        "RUNS_DIR": str(folder / "runs"),
        "IMAGE_OUTPUT_DIRECTORY": str(folder / "turned"),
        "MATERIALIZE_TILES": True,
        "AOI_FILENAMES": [None, "aoi.gpkg"],
        "PREDICT_FILENAMES": ["second.tif"],
        "DENSITY_CELL": 64,
    }
    start = computing_seconds()
    notebook = execute(folder, parameters)
    seconds = computing_seconds() - start
    return SimpleNamespace(folder=folder, parameters=parameters, notebook=notebook, seconds=seconds)


def computing_seconds():
    """Those of processes that have ended; the clock's depend on the machine's other work."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def execute(folder, parameters):
    return papermill.execute_notebook(
        PROJECT / "main.ipynb", folder / "out.ipynb", parameters=parameters, cwd=PROJECT,
        progress_bar=False,
    )  # fmt: skip


def test_the_leaderboard_is_complete_and_in_range(tiny_run):
    folder, parameters = tiny_run.folder, tiny_run.parameters
    board = pd.read_csv(folder / "runs" / "tiny" / "leaderboard.csv")
    assert board["state"].tolist() == ["complete", "complete"]
    assert sorted(board["learning_rate"]) == parameters["LEARNING_RATES"]
    assert board["selected"].sum() == 1
    shares = board[["AP", "AP50", "box_precision", "box_recall", "box_f1", "class_recall"]]
    assert ((shares >= 0) & (shares <= 1)).all(axis=None)
    assert (
        board["objects"] == board["objects"].iloc[0]
    ).all()  # every trial is measured on the same ground


def test_two_trials_on_a_tiny_sample_take_less_than_a_minute(tiny_run):
    assert 5 < tiny_run.seconds < 60


def test_nothing_outside_the_area_of_interest_is_taught_or_measured(tiny_run):
    run = tiny_run.folder / "runs" / "tiny"
    clean, quarantine = (pd.read_csv(run / "clean" / f"second{s}.csv") for s in ("", "_quarantine"))
    assert clean["pixel_x"].max() <= 300
    outside = quarantine[quarantine["reason"] == "outside the area of interest"]
    assert outside["pixel_x"].astype(float).min() > 300
    detections = pd.read_csv(run / "detections.csv")
    detections = detections[(detections["raster"] == "second") & (detections["found"] == -1)]
    assert detections["pixel_x"].max() < 301


def test_the_preflight_tables_are_kept(tiny_run):
    run = tiny_run.folder / "runs" / "tiny"
    pairs, plan = pd.read_csv(run / "pairs.csv"), pd.read_csv(run / "plan.csv")
    assert pairs["raster"].tolist() == ["first", "second"]
    assert pairs["counted"].tolist() == [
        pytest.approx(1, abs=0.1),
        pytest.approx(300 / 384, abs=0.1),
    ]
    assert plan["tile_size"].tolist() == tiny_run.parameters["PATCH_SIZES"]


def test_the_artefacts_are_there_and_agree(tiny_run):
    folder = tiny_run.folder
    run = folder / "runs" / "tiny"
    board = pd.read_csv(run / "leaderboard.csv")
    summary = json.loads((run / "metrics.json").read_text())
    best = board[board["selected"]].iloc[0]
    assert summary["values"]["AP50"] == pytest.approx(best["AP50"])
    assert (run / "best.ckpt").stat().st_size > 1e6
    detections = pd.read_csv(run / "detections.csv")
    sides = {"first": (512, 384), "second": (384, 384)}
    for name, group in detections.groupby("raster"):
        assert group[["xmin", "ymin"]].min(axis=None) >= 0
        assert group["xmax"].max() <= sides[name][0]
        assert group["ymax"].max() <= sides[name][1]
    quarantine = pd.read_csv(run / "clean" / "first_quarantine.csv")
    clean = pd.read_csv(run / "clean" / "first.csv")
    assert len(clean) + len(quarantine) == len(pd.read_csv(folder / "datasets" / "first.csv"))
    assert (run / "application.log").read_text().count("gridsearch - INFO - trial ") == 2
    assert json.loads((run / "parameters.json").read_text())["RUN_NAME"] == "tiny"


def test_a_run_with_results_refuses_other_parameters_before_it_writes(tiny_run):
    clean = tiny_run.folder / "runs" / "tiny" / "clean" / "first.csv"
    before = clean.stat().st_mtime_ns
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        execute(tiny_run.folder, tiny_run.parameters | {"MAX_DIAMETER": 20.0})
    assert "were made with MAX_DIAMETER = 25.0 (now 20.0)" in caught.value.evalue
    assert clean.stat().st_mtime_ns == before


def test_objects_and_detections_tell_the_same_story(tiny_run):
    run = tiny_run.folder / "runs" / "tiny"
    values = json.loads((run / "metrics.json").read_text())["values"]
    objects, detections = (pd.read_csv(run / f"{n}.csv") for n in ("objects", "detections"))
    kept = detections[detections["score"] >= values["score_threshold"]]
    assert objects["counted"].sum() == values["objects"]
    assert (kept["found"] != -2).sum() == values["detections"]
    found = (objects["found_score"] >= values["score_threshold"]).sum()
    assert found == (kept["found"] >= 0).sum()
    assert values["box_recall"] == pytest.approx(found / values["objects"], abs=1e-5)


def test_the_error_atlas_adds_up_to_the_confusion(tiny_run):
    run = tiny_run.folder / "runs" / "tiny"
    values = json.loads((run / "metrics.json").read_text())["values"]
    detections, objects = (pd.read_csv(run / f"{n}.csv") for n in ("detections", "objects"))
    errors = atlas.classify_errors(detections, objects, values["score_threshold"], 0.5)
    counts = atlas.count_errors(errors)["(all)"]
    confusion = pd.read_csv(run / "confusion.csv", index_col="(truth)")
    assert counts[["missed", "mislocalised"]].sum() == confusion["(missed)"].sum()
    background = counts[["spurious", "mislocalised", "duplicate"]].sum()
    assert background == confusion.loc["(background)"].sum()
    written = {path.stem for path in (run / "errors").iterdir()} - {"manifest", ".lock"}
    assert written == set(errors["raster"])


def test_rasters_and_chips_are_written_when_asked(tiny_run):
    folder = tiny_run.folder
    turned = {path.name for path in (folder / "turned").glob("*.tif")}
    assert turned == {f"{n}_{a}.tif" for n in ("first", "second") for a in (90, 180, 270)}
    chips = folder / "runs" / "tiny" / "tiling_dir" / "tiling_128"
    table = pd.read_csv(chips / "tile.csv")
    files = {path.name for path in chips.glob("tile_*.png")}
    tiles = pd.read_parquet(chips / "tiles.parquet")
    assert len(files) == tiles["kept"].sum()
    assert set(table["tile_path"]) <= files
    assert table["xmax"].max() <= 128


def test_other_rasters_get_their_catalogue(tiny_run):
    folder = tiny_run.folder / "runs" / "tiny" / "catalogues"
    names = ["second.csv", "second.gpkg", "second.gpkg.provenance.json", "second_density.tif"]
    assert sorted(path.name for path in folder.iterdir()) == names
    record = json.loads((folder / "second.gpkg.provenance.json").read_text())
    assert record["complete"]
    assert record["predicted"] > 4
    assert sum(record["objects"].values()) == len(pd.read_csv(folder / "second.csv"))


def test_the_executed_notebook_has_pictures_and_log_lines_only(tiny_run):
    notebook = tiny_run.notebook
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 10
    streams = [output for output in outputs if output.output_type == "stream"]
    assert not [s.text for s in streams if s.name == "stderr"]  # where warnings go, and is red
    lines = "".join(s.text for s in streams).splitlines()
    assert not [line for line in lines if not re.match(r"\w+ - (INFO|WARNING) - ", line)]
    nbformat.validate(notebook)


def test_a_second_run_trains_nothing_anew(tiny_run):
    folder, parameters = tiny_run.folder, tiny_run.parameters
    run = folder / "runs" / "tiny"
    before = {p: p.stat().st_mtime_ns for p in run.glob("trials/*/checkpoints/*.ckpt")}
    tiles = (run / "tiling_dir" / "tiling_128" / "tiles.parquet").stat().st_mtime_ns
    catalogue = (run / "catalogues" / "second.gpkg").stat().st_mtime_ns
    execute(folder, parameters)
    assert (run / "catalogues" / "second.gpkg").stat().st_mtime_ns == catalogue
    assert {p: p.stat().st_mtime_ns for p in run.glob("trials/*/checkpoints/*.ckpt")} == before
    assert (run / "tiling_dir" / "tiling_128" / "tiles.parquet").stat().st_mtime_ns == tiles


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"PATCH_SIZE": [64]}, "unknown parameter PATCH_SIZE; did you mean PATCH_SIZES"),
        ({"PREDICT_FILENAMES": ["far.tif"]}, "far.tif does not exist"),
        ({"DF_FILENAMES": ["first.csv"]}, "name 2 rasters and 1 tables"),
        ({"IMAGE_FILENAMES": ["first.tif", "gone.tif"]}, "gone.tif does not exist"),
        ({"IMAGE_FILENAMES": ["first.tif", "fake.tif"]}, "fake.tif is not a raster"),
        ({"DF_FILENAMES": ["first.csv", "empty.csv"]}, "empty.csv is empty"),
        ({"DF_FILENAMES": ["first.csv", "short.csv"]}, "lacks the columns ['diameter']"),
        ({"PATCH_SIZES": [450]}, "tile_size must be <= 384 px"),
        ({"LEARNING_RATES": [-1]}, "LEARNING_RATES.0: Input should be greater than 0, got -1"),
        ({"MAX_DIAMETER": 0.01}, "has no valid row left of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_stops_the_run_at_once_with_a_message(tiny_run, changes, message):
    folder, parameters = tiny_run.folder, tiny_run.parameters
    (folder / "images" / "fake.tif").write_text("not a raster")
    (folder / "datasets" / "empty.csv").write_text("")
    (folder / "datasets" / "short.csv").write_text("pixel_x,pixel_y,label\n1,2,a\n")
    changed = parameters | {"RUN_NAME": "bad"} | changes
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        execute(folder, changed)
    assert message in caught.value.evalue
    assert not list((folder / "runs" / "bad").glob("trials/*/checkpoints"))


def test_skies_are_learnt_from_coco_mapped_and_overlaid(tmp_path, monkeypatch):
    sizes = {f"sky_{i}": (384, 128) for i in (1, 2, 3, 4)}
    monkeypatch.setattr(sampledata, "SKY_SAMPLES", sizes)
    sampledata.generate_sky(tmp_path, tmp_path)
    parameters = yaml.safe_load((PROJECT / "params" / "hdr_sky.yaml").read_text()) | {
        "IMG_DIR": str(tmp_path), "DF_DIR": str(tmp_path), "RUNS_DIR": str(tmp_path / "runs"),
        "PATCH_SIZES": [64], "TILE_OVERLAP": 16, "N_EPOCHS": [1], "WORKERS": 1,
    }  # fmt: skip
    execute(tmp_path, parameters)
    run = tmp_path / "runs" / "hdr_sky"
    board = pd.read_csv(run / "leaderboard.csv")
    assert board["state"].tolist() == ["complete"]
    assert board["mean_IoU"].between(0.1, 1).all()
    classes = pd.read_csv(run / "classes.csv")
    assert classes.groupby("class_id")["name"].first().tolist() == ["background", "sky"]
    found = fileio.read_raster(run / "catalogues" / "sky_4.tif").read(Window(0, 0, 384, 128))[0]
    assert set(np.unique(found)) <= {0, 1}
    overlay = fileio.read_raster(run / "catalogues" / "sky_4_overlay.tif")
    assert (overlay.width, overlay.height, overlay.dtype) == (384, 128, "uint8")
    picture = overlay.read(Window(0, 0, 384, 128))  # without its alpha
    assert picture.shape == (3, 128, 384)
    assert (picture.std(axis=(1, 2)) > 10).all()
