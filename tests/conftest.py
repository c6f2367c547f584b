"""Shared fixtures: a small sample, cleaned, split and tiled once for all tests."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import matplotlib as mpl
import pytest

mpl.use("Agg")
os.environ.setdefault("WANDB_MODE", "offline")

import annotations
import fileio
import sampledata
import splits
import tiling
import trials
from logger import DefaultModelLogger
from ModelConfig import ModelConfig

PROJECT = Path(__file__).parent.parent
REAL_DATA = PROJECT.parent / "shared" / "data"


def make_samples(folder, sizes):
    """Write `images/NAME.tif` and `datasets/NAME.csv` for each name and its (width, height)."""
    for seed, (name, (width, height)) in enumerate(sizes.items()):
        image, table = folder / "images" / f"{name}.tif", folder / "datasets" / f"{name}.csv"
        sampledata.make_sample(image, table, width=width, height=height, seed=seed)


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
