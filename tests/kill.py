"""Kill every stage at random moments, again and again, and compare what it leaves in the end.

A process that has imported everything, and itself computes nothing, forks one child per attempt. A
stage is attempted in a folder, each attempt stopped by a signal, until one gets through; what lies
in the folder then must be what an undisturbed run leaves there, to the byte, or to the value where
a format holds times.

PYTHONPATH=. python tests/kill.py --signals 25 --report runs/reliability.json
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import logging
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib as mpl
import nbformat
import numpy as np
import pandas as pd
import psutil
import pyogrio
import rasterio
import torch
import yaml
from conftest import PROJECT, make_samples
from PIL import Image
from test_gridsearch import SPACE, conf, fake_training

import annotations
import atlas
import fileio
import gridsearch
import imutils
import layout
import predict
import splits
import tiling
import trials

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
KILLS_IN_A_ROW = 4  # then an attempt is left alone
TIMES = {"seconds", "started", "training_time", "windows_per_second", "step_seconds"}
TIMES |= {"trial"}  # one that is repeated has another number
TIMES |= {"model"}  # a digest of a checkpoint, which holds times
TIMES |= {"worker"}  # who trained
VOLATILE = {".lock", "application.log", "messages.jsonl", "study.journal", "plan.csv"}
VOLATILE |= {"study.journal.lock", "search.json"}  # the latter names the queue at random
PATIENCE = 300  # s, for an attempt that is left alone

log = logging.getLogger("kill")


# ---------------------------------------------------------------------------------------------
# Stages: what each does in its folder
# ---------------------------------------------------------------------------------------------


def make_inputs(folder, stages):
    """Make what some stages start from, once."""
    names = ["one", "two", "three", "four"]
    make_samples(folder, dict(zip(names, [(512, 384), (384, 384)] * 2, strict=True)))
    names = names[:2]
    rasters = [fileio.read_raster(folder / "images" / f"{name}.tif") for name in names]
    tables = [folder / "datasets" / f"{name}.csv" for name in names]
    pixels = np.random.default_rng(0).integers(0, 255, (1200, 1300), dtype="uint8")
    Image.fromarray(pixels).save(folder / "slow.png")
    images, _ = annotations.clean_annotations(
        tables, rasters, output_dir=folder / "clean", **CLEANING
    )
    blocks = splits.ground_blocks(
        rasters, split_by="block", max_tile_size=128, block_size=None, test_proportion=0.2,
        validation_proportion=0.25, seed=0,
    )  # fmt: skip
    made = SimpleNamespace(folder=folder, images=images, blocks=blocks)
    tilings = make_tiles(made, folder)
    made.data, _ = trials.prepare_search(images, blocks, tilings, [1.0], conf())
    if {"prediction", "error atlas"} & set(stages):
        space = SPACE | {"sample_size": [0.5], "learning_rate": [1e-3]}
        gridsearch.run_search(made.data, space, conf(), folder / "run")
        made.checkpoint = folder / "run" / "best.ckpt"
    return made


CLEANING = {"label_percentile": 80, "diameter_scale": 3, "max_diameter": 25, "workers": 1}


def repair(made, folder):
    """Repair the layout of a raster in a cache."""
    layout.WORTH_IT, layout.SAMPLE_SIDE = 0.0, 512  # whatever is measured on a busy machine
    raster = fileio.read_raster(made.folder / "slow.png")
    fileio.check_layout([raster], repair=True, cache_dir=folder)


def clean(made, folder):
    """Clean the annotations of four rasters."""
    names = ["one", "two", "three", "four"]
    rasters = [fileio.read_raster(made.folder / "images" / f"{name}.tif") for name in names]
    tables = [made.folder / "datasets" / f"{name}.csv" for name in names]
    annotations.clean_annotations(tables, rasters, output_dir=folder, **CLEANING)


def measure(made, folder):
    """Measure the stretch of the training ground."""
    rasters = {image.image_identifier: image.raster for image in made.images}
    train = made.blocks[made.blocks["split"] == "train"]
    pixels = tiling.sample_pixels(train, rasters, seed=0, max_windows=256)
    found = imutils.measure_radiometry(pixels, "percentile", (0.5, 99.5))
    with fileio.exclusive(folder):
        fileio.write_json(folder / "radiometry.json", vars(found))


def make_tiles(made, folder):
    """Make a tile index, with a filter that looks at pixels, and chips."""
    tiling.JOB_WINDOWS = 4
    options = tiling.TilingOptions(
        angles=(90, 180, 270), evaluation_overlap=tiling.evaluation_overlap(made.images),
        filters=(tiling.black_pixel_filter,), pixel_limit=128**2 - 1, materialize=True,
    )  # fmt: skip
    return tiling.make_tiles(made.images, made.blocks, [128], folder, options, workers=1)


def search(made, folder):
    """Search among four trainings that are stood in for."""

    def values_of(hyperparams):
        time.sleep(0.05)
        return hyperparams["sample_size"] * (hyperparams["learning_rate"] * 100 + 0.01)

    gridsearch.train_iteration = fake_training(values_of)
    gridsearch.run_search(made.data, SPACE, conf(), folder)


def train(made, folder):
    """Search among two real trainings of an epoch."""
    space = SPACE | {"sample_size": [1.0]}
    gridsearch.run_search(made.data, space, conf(), folder)


def find(made, folder):
    """Predict a raster into every format."""
    outputs = [folder / f"found{suffix}" for suffix in fileio.ANNOTATION_SUFFIXES]
    predict.predict_raster(
        made.checkpoint, made.images[0].raster.path, outputs, device="cpu", workers=1,
        score_threshold=0.011, tile_size=64, density_cell=64, resume=True,
    )  # fmt: skip


def explain(made, folder):
    """Write the atlas of errors of a test."""
    run = made.folder / "run"
    tables = (pd.read_csv(run / name) for name in ("detections.csv", "objects.csv"))
    errors = atlas.classify_errors(*tables, 0.02, 0.5)
    atlas.write_atlas(errors, made.data.rasters, folder)


def whole_run(made, folder):
    """Run the cells of the notebook."""
    mpl.use("Agg")
    notebook = nbformat.read(PROJECT / "main.ipynb", as_version=4)
    given = yaml.safe_load((PROJECT / "params" / "tiny.yaml").read_text()) | {
        "DF_FILENAMES": ["one.csv", "two.csv"], "IMAGE_FILENAMES": ["one.tif", "two.tif"],
        "DF_DIR": str(made.folder / "datasets"), "IMG_DIR": str(made.folder / "images"),
        "RUNS_DIR": str(folder), "IMAGE_OUTPUT_DIRECTORY": str(folder / "turned"),
        "MATERIALIZE_TILES": True, "PREDICT_FILENAMES": ["two.tif"], "DENSITY_CELL": 64,
        "PLOT_IMAGE": False, "ACCELERATOR": "cpu", "CACHE_DIR": str(folder / "cache"),
    }  # fmt: skip
    space = {"display": str, "__name__": "__main__"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            exec(cell.source, space)  # the project's own notebook
            if "parameters" in cell.metadata.get("tags", []):
                space |= given


STAGES = {
    "layout repair": repair, "cleaning": clean, "statistics": measure, "tiling": make_tiles,
    "search": search, "training": train, "prediction": find, "error atlas": explain,
    "whole run": whole_run,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------
# What a stage leaves
# ---------------------------------------------------------------------------------------------


def snapshot(folder):
    """Return what lies in a folder: relative path -> digest of its content, times left out."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(_content(path)).hexdigest()[:12]
        for path in files
        if path.name not in VOLATILE
    }


def _content(path):
    match "" if path.name.startswith(".") else path.suffix:  # a stray may be anything
        case ".json":
            return json.dumps(_timeless(json.loads(path.read_text()))).encode()
        case ".csv":
            df = pd.read_csv(path, dtype=str)
            return df[[name for name in df if not TIMES & {name}]].to_csv().encode()
        case ".ckpt" if (
            path.stat().st_size > 1000
        ):  # those of trainings that are stood in for are not
            state = torch.load(path, weights_only=True)["state_dict"]
            return b"".join(n.encode() + t.numpy().tobytes() for n, t in state.items())
        case ".gpkg":
            layers = pyogrio.list_layers(path)[:, 0]
            tables = (pyogrio.read_dataframe(path, layer=name) for name in layers)
            return "".join(
                df.drop(columns="update_time", errors="ignore").to_csv() for df in tables
            ).encode()
        case ".tif":
            with rasterio.open(path) as src:
                return src.read().tobytes() + repr(sorted(src.meta.items())).encode()
    return path.read_bytes()


def _timeless(value):
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if not any(k.endswith(t) for t in TIMES)}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


# ---------------------------------------------------------------------------------------------
# Attempts
# ---------------------------------------------------------------------------------------------


def start(function, report):
    """Fork a child, with a process group of its own, that does something; return its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        with report.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def result_of(function, *args):
    """Return what a function returns, computed in a child."""
    with tempfile.TemporaryDirectory() as folder:
        answer, report = Path(folder) / "answer", Path(folder) / "report"

        def work():
            answer.write_bytes(pickle.dumps(function(*args)))

        if os.waitstatus_to_exitcode(os.waitpid(start(work, report), 0)[1]):
            raise RuntimeError(report.read_text())
        return pickle.loads(answer.read_bytes())


def attempt(function, report, moment=None, number=None, watched=None):
    """Do something in a child, and send it a signal at a moment; return its exit code.

    The moment is in seconds, or, if a folder is watched, the number of changes seen in it: more
    often than by chance a file is being written then.

    Processes that outlive the child are an error: what it started must end with it.
    """
    begun, pid = time.monotonic(), start(function, report)
    deadline = begun + (moment if moment is not None and watched is None else PATIENCE)
    state, changes = None, 0
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        if watched is None:
            time.sleep(min(0.005, max(deadline - time.monotonic(), 0)))
        elif (now := _files(watched)) != state:
            state, changes = now, changes + 1
            if changes > moment:
                break
    if ended[0] == 0:
        os.kill(pid, signal.SIGKILL if moment is None else number)
        ended = os.waitpid(pid, 0)
    deadline = time.monotonic() + 20
    while left := [p.pid for p in psutil.process_iter() if _group(p.pid) == pid]:
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            raise AssertionError(f"processes {left} outlived the one that started them")
        time.sleep(0.05)
    return os.waitstatus_to_exitcode(ended[1])


def _files(folder):
    """Return the files of a folder that is being written to, and their sizes."""
    try:
        return [(path, path.stat().st_size) for path in folder.rglob("*")]
    except OSError:
        return []


def _group(pid):
    try:
        return os.getpgid(pid)
    except OSError:
        return None


def renew(work):
    """Empty a folder."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()


def undisturbed(function, work, report):
    """Return what a stage leaves in a new folder, and the seconds that it takes."""
    renew(work)
    begun = time.monotonic()
    assert attempt(function, report) == 0, f"undisturbed:\n{report.read_text()}"
    duration = time.monotonic() - begun
    expected = result_of(snapshot, work)
    assert expected, "nothing is left"
    return expected, duration


def disturb(name, made, folder, signals, rng):
    """Run a stage under so many signals; return a row per signal, and one per run that ended.

    Raises:
        AssertionError: A run did not end, or left something else than an undisturbed one.
    """
    work, report = folder / "work", folder / "report.txt"
    function, rows = partial(STAGES[name], made, work), []
    expected, duration = undisturbed(function, work, report)
    while len(rows) < signals:
        renew(work)
        history = []
        while len(history) < KILLS_IN_A_ROW and len(rows) + len(history) < signals:
            number, moment, watched = rng.choice(SIGNALS), rng.uniform(0, 1.05 * duration), None
            if rng.random() < 0.5:
                moment, watched = rng.randrange(20), work
            code = attempt(function, report, moment, number, watched)
            if code == 0:
                break  # it was done before the signal came
            history.append((number.name, round(moment, 3)))
        place = f"{name} after {history}"
        code = attempt(function, report)
        assert code == 0, f"{place} does not go on:\n{report.read_text()}"
        found = result_of(snapshot, work)
        differing = sorted(p for p in expected | found if expected.get(p) != found.get(p))
        assert not differing, f"{place} left something else: {differing}"
        rows += [{"stage": name, "fault": fault, "moment": moment} for fault, moment in history]
    return rows


def accompany(name, made, folder, rounds, rng):
    """Run a stage in two processes at once, in one folder, for some rounds; see `disturb`.

    Both may succeed, or one is told that the other works there.
    """
    work, reports = folder / "work", [folder / "first.txt", folder / "second.txt"]
    function, rows = partial(STAGES[name], made, work), []
    expected, duration = undisturbed(function, work, reports[0])
    for turn in range(rounds):
        renew(work)
        pids = [start(function, reports[0])]
        time.sleep(rng.choice([0, rng.uniform(0, duration)]))
        pids.append(start(function, reports[1]))
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        texts = [report.read_text() for report in reports]
        found = result_of(snapshot, work)
        assert 0 in codes, f"{name}, round {turn}: neither was done:\n{texts}"
        for code, text in zip(codes, texts, strict=True):
            assert code == 0 or "is in use by another process" in text, text
        differing = sorted(p for p in expected | found if expected.get(p) != found.get(p))
        assert not differing, f"{name}, round {turn}: two left something else: {differing}"
        rows.append({"stage": name, "fault": "second process"})
    return rows


def main(argv=None):
    """Disturb the stages and write the tally."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--signals", type=int, default=3, help="for each stage")
    parser.add_argument("--rounds", type=int, default=1, help="of two processes at once, for each")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--report", type=Path, required=True)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)
    log.info("seed %d", args.seed)
    rng, tally = random.Random(args.seed), []
    with tempfile.TemporaryDirectory(prefix="kill_") as folder:
        made = result_of(make_inputs, Path(folder), args.stages)
        for name in args.stages:
            begun, faults, outcome = time.monotonic(), collections.Counter(), "same as undisturbed"
            try:
                place = Path(folder) / name.replace(" ", "_")
                place.mkdir()
                rows = disturb(name, made, place, args.signals, rng) if args.signals else []
                rows += accompany(name, made, place, args.rounds, rng) if args.rounds else []
                faults.update(row["fault"] for row in rows)
            except AssertionError as error:
                outcome = str(error)
            seconds = round(time.monotonic() - begun, 1)
            log.info("%s: %s in %s s: %s", name, dict(faults), seconds, outcome)
            tally.append(
                {"stage": name, "faults": dict(faults), "outcome": outcome, "seconds": seconds,
                 "seed": args.seed}
            )  # fmt: skip
            args.report.parent.mkdir(parents=True, exist_ok=True)
            args.report.write_text(json.dumps(tally, indent=2) + "\n")
    return int(any(row["outcome"] != "same as undisturbed" for row in tally))


if __name__ == "__main__":
    sys.exit(main())
