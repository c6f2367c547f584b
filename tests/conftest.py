"""Shared fixtures: a small sample, cleaned, split and tiled once for all tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import matplotlib as mpl
import pytest
from distributed import Client

mpl.use("Agg")
os.environ.setdefault("WANDB_MODE", "offline")

import annotations
import fileio
import parallel
import sampledata
import splits
import tiling
import trials
from logger import DefaultModelLogger
from ModelConfig import ModelConfig

PROJECT = Path(__file__).parent.parent
REAL_DATA = PROJECT.parent / "shared" / "data"
LONGEST = ("notebook", "predict", "reliability", "resume", "ranks", "gridsearch", "LargeRasterOR")


def pytest_collection_modifyitems(items):
    """Begin with the files that take minutes, so that no process is left alone with one of them."""
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def make_samples(folder, sizes):
    """Write `images/NAME.tif` and `datasets/NAME.csv` for each name and its (width, height)."""
    for seed, (name, (width, height)) in enumerate(sizes.items()):
        image, table = folder / "images" / f"{name}.tif", folder / "datasets" / f"{name}.csv"
        sampledata.make_sample(image, table, width=width, height=height, seed=seed)


@contextmanager
def dask_cluster(folder, workers):
    """Start a scheduler and workers as a user would, but anywhere; yield the former's address."""
    # the tests' own modules are found, the project's only as the work tells where they are
    environment = os.environ | {"PYTHONPATH": str(PROJECT / "tests"), "OMP_NUM_THREADS": "1"}

    def start(*words):
        return subprocess.Popen(
            [sys.executable, "-m", "dask", *words, "--no-dashboard"],
            cwd=folder, env=environment, start_new_session=True,
            stderr=(folder / f"{words[0]}.log").open("w"),
        )  # fmt: skip

    place, processes = folder / "scheduler.json", []
    try:
        processes.append(
            start("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(place))
        )
        deadline, address = time.monotonic() + 120, None
        while address is None and time.monotonic() < deadline:
            time.sleep(0.05)
            with suppress(OSError, ValueError):
                address = json.loads(place.read_text())["address"]
        processes.append(
            start("worker", address, "--nworkers", str(workers), "--nthreads", "1",
                  "--local-directory", str(folder))
        )  # fmt: skip
        with Client(address, timeout=60, set_as_default=False) as client:
            client.wait_for_workers(workers, timeout=120)
        yield SimpleNamespace(address=address, scheduler=processes[0])
    finally:
        with suppress(KeyError):
            parallel._clients.pop(address).close(timeout=10)
        for process in reversed(processes):
            with suppress(ProcessLookupError):  # and what it started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Address of a Dask scheduler with two workers, processes of their own."""
    with dask_cluster(tmp_path_factory.mktemp("cluster"), workers=2) as made:
        yield made.address


@pytest.fixture(scope="session")
def small_sample(tmp_path_factory):
    """Two rasters of a few hundred pixels, one not square, with their tables."""
    folder = tmp_path_factory.mktemp("sample")
    sizes = {"one": (640, 512), "two": (512, 512)}
    make_samples(folder, sizes)
    return SimpleNamespace(
        folder=folder,
        rasters=[fileio.read_raster(folder / "images" / f"{name}.tif") for name in sizes],
        tables=[folder / "datasets" / f"{name}.csv" for name in sizes],
        cleaning={"label_percentile": 80, "diameter_scale": 3, "max_diameter": 25, "workers": 1},
    )


@pytest.fixture(scope="session")
def prepared(small_sample, tmp_path_factory):
    """The small sample, ready to train on 128 px tiles."""
    folder = tmp_path_factory.mktemp("prepared")
    images, report = annotations.clean_annotations(
        small_sample.tables, small_sample.rasters, output_dir=folder / "clean",
        **small_sample.cleaning,
    )  # fmt: skip
    blocks = splits.ground_blocks(
        small_sample.rasters, split_by="block", max_tile_size=128, block_size=None,
        test_proportion=0.2, validation_proportion=0.25, seed=0,
    )  # fmt: skip
    tilings = tiling.make_tiles(
        images, blocks, [128], folder / "tiles",
        tiling.TilingOptions(
            angles=(90, 180, 270), evaluation_overlap=tiling.evaluation_overlap(images)
        ),
        workers=1,
    )  # fmt: skip
    conf = ModelConfig(fpn_channels=16, accelerator="cpu")
    data, counts = trials.prepare_search(images, blocks, tilings, [1.0], conf)
    tiles, boxes = tiling.read_tiles(tilings[128])
    return SimpleNamespace(
        folder=folder, tables=small_sample.tables, images=images, report=report, blocks=blocks,
        tilings=tilings, data=data,
        counts=counts, tiles=tiles, boxes=boxes,
    )  # fmt: skip


def small_conf(devices=1):
    """Return a configuration whose trainings depend on all that they carry from step to step."""
    conf = ModelConfig(
        backbone="mobilenet_v3_large", fpn_channels=16, accelerator="cpu", precision="32-true",
        devices=devices,
    )  # fmt: skip
    conf.train.hard_negatives = 0.3  # epochs depend on what was learnt before
    conf.train.patience = 5
    conf.validation.pr_compute_interval = 3  # an epoch without a measurement needs the last one
    for stage in (conf.validation, conf.test):
        stage.score_threshold = 0.0  # a few steps make no model sure of anything
    return conf


def train_small(data, folder, callbacks=(), *, devices=1, conf=None, **changes):
    """Train for 3 epochs of 3 steps of 8 tiles, whatever the number of devices."""
    hyperparams = {
        "patch_size": 128, "n_epochs": 3, "sample_size": 0.24, "learning_rate": 1e-3,
        "batch_size": 8 // devices,
    }  # fmt: skip
    return trials.train_iteration(
        hyperparams | changes, data, conf or small_conf(devices), folder,
        DefaultModelLogger(folder), callbacks,
    )  # fmt: skip


@pytest.fixture(scope="session")
def undisturbed(prepared, tmp_path_factory):
    """What such a training ends with, when nothing happens to it: its values, and its folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return train_small(prepared.data, folder), folder
