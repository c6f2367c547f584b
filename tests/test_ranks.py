"""Several processes that train one model: as one would, or not at all."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from conftest import PROJECT, small_conf, train_small
from hypothesis import given
from hypothesis import strategies as st
from segments import make_segments, seg_conf

import ranks
import tiling
import trials
from datasets import TileBatches, TileDataModule, TileSampler
from ImageData import InputError
from LargeRasterOR import LargeRasterORModel
from LargeRasterSeg import LargeRasterSegModel
from logger import DefaultModelLogger

pytestmark = pytest.mark.filterwarnings("ignore:.*sync_dist=True", "ignore:.*LeafSpec")
TWO = {"accelerator": "cpu", "devices": 2, "nodes": 1}


@pytest.fixture(scope="module", autouse=True)
def _followers():
    yield
    ranks.dismiss()


class Kill(pl.Callback):
    """Kills the other process of a training after a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            ranks._team.followers[0].kill()


def test_two_processes_learn_as_one_does_also_when_one_is_killed(prepared, tmp_path, undisturbed):
    with pytest.raises(ranks.RankError, match=r"process of rank 1 ended \(exit code -9\)"):
        train_small(prepared.data, tmp_path, [Kill(4)], devices=2)
    values = train_small(prepared.data, tmp_path, devices=2)  # goes on with the second epoch
    table, known = (
        pd.read_csv(folder / "metrics.csv") for folder in (tmp_path, undisturbed[1])
    )  # fmt: skip
    assert table["step"].equals(known["step"])
    columns = [name for name in known if "loss" in name]
    # the same tiles give the same first step; from then on AdamW, which makes steps of one size
    # from gradients however small, tells apart what rounding has made of their sum
    pd.testing.assert_frame_equal(table.loc[:0, columns], known.loc[:0, columns], rtol=1e-5)
    pd.testing.assert_frame_equal(table[columns], known[columns], rtol=0.03)
    assert values["objects"] == undisturbed[0]["objects"]
    state = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert float(state["state_dict"]["operating_threshold"]) == pytest.approx(
        values["val_score_threshold"]
    )


@pytest.mark.long
def test_two_processes_learn_exactly_what_one_does_where_rounding_stays_small(prepared, tmp_path):
    tables = []
    for devices in (1, 2):
        conf = small_conf(devices)
        conf.train.optimizer, conf.train.learn_offset = "sgd", False
        train_small(prepared.data, tmp_path / str(devices), conf=conf, devices=devices)
        tables.append(pd.read_csv(tmp_path / str(devices) / "metrics.csv").filter(like="train_"))
    pd.testing.assert_frame_equal(*tables, rtol=1e-4)


def measure(path, data, batch_size):
    """Validate and test a model on all ranks; return what the first one knows."""
    conf = small_conf(ranks.count())
    conf.batch_size = batch_size
    tiles, boxes = tiling.read_tiles(data.tilings[128])
    module = TileDataModule(tiles, boxes, data.rasters, data.ids, data.radiometry, conf)
    model = LargeRasterORModel.load_from_checkpoint(path, map_location="cpu")
    model.conf.devices = conf.devices
    trainer = model.create_trainer()
    values = trainer.validate(model, module.full_validation_dataloader(), verbose=False)
    values += trainer.test(model, module.test_dataloader(), verbose=False)
    shared = ranks.gathered(values)
    assert all(one == shared[0] for one in shared)
    return values, model


@pytest.mark.parametrize("batch_size", [2, 1000])
def test_two_processes_measure_exactly_what_one_does(prepared, undisturbed, batch_size):
    """A batch of all tiles leaves nothing for the second process."""
    path = undisturbed[1] / "checkpoints" / "best.ckpt"
    known, alone = measure(path, prepared.data, batch_size)
    with ranks.together(measure, path, prepared.data, batch_size, **TWO):
        values, together = measure(path, prepared.data, batch_size)
    for mine, other in zip(values, known, strict=True):
        assert mine == pytest.approx(other, abs=1e-6)
        assert mine.keys() == other.keys()
    assert known[1]["AP50"] > 0
    assert {"AP50_low", "AP50_high", "AP_small", "class_recall"} <= known[1].keys()
    np.testing.assert_array_equal(together.evaluation.confusion, alone.evaluation.confusion)
    assert together.grounds.keys() == alone.grounds.keys()
    for block, ground in alone.grounds.items():
        for name, value in asdict(ground).items():
            np.testing.assert_array_equal(getattr(together.grounds[block], name), value)


def measure_masks(path, data):
    """Validate and test a model of masks on all ranks; return what the first one knows."""
    conf = seg_conf(devices=ranks.count(), batch_size=3)
    tiles, boxes = tiling.read_tiles(data.tilings[64])
    module = TileDataModule(
        tiles, boxes, data.rasters, data.ids, data.radiometry, conf, labels=data.labels
    )
    model = LargeRasterSegModel.load_from_checkpoint(path, map_location="cpu")
    model.conf.devices = conf.devices
    trainer = model.create_trainer()
    values = trainer.validate(model, module.full_validation_dataloader(), verbose=False)
    return values + trainer.test(model, module.test_dataloader(), verbose=False), model


def test_two_processes_learn_and_measure_masks_as_one_does(tmp_path):
    made = make_segments(tmp_path)
    tables, boards = [], []
    data, _ = trials.prepare_search(made.images, made.blocks, made.tilings, [1.0], seg_conf())
    for devices in (1, 2):
        folder = tmp_path / f"ranks_{devices}"
        conf = seg_conf(devices=devices, **{"train.optimizer": "sgd"})
        hyperparams = {"patch_size": 64, "n_epochs": 2, "sample_size": 0.5,
                       "learning_rate": 1e-2, "batch_size": 8 // devices}  # fmt: skip
        logger = DefaultModelLogger(folder)
        boards.append(trials.train_iteration(hyperparams, data, conf, folder, logger))
        logger.close("success")
        tables.append(pd.read_csv(folder / "metrics.csv"))
    assert tables[0]["step"].equals(tables[1]["step"])
    losses = [table["train_loss_epoch"].dropna() for table in tables]
    # what they make of the same weights is the same; batch statistics are of each rank's own tiles
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.2)
    path = tmp_path / "ranks_1" / "checkpoints" / "best.ckpt"
    known, alone = measure_masks(path, data)
    with ranks.together(measure_masks, path, data, **TWO):
        values, together = measure_masks(path, data)
    for mine, other in zip(values, known, strict=True):
        assert mine == pytest.approx(other, abs=1e-6)
        assert mine.keys() == other.keys()
    assert known[1]["mean_IoU"] == pytest.approx(boards[0]["mean_IoU"], abs=1e-6)
    np.testing.assert_array_equal(together.evaluation.confusion, alone.evaluation.confusion)
    assert together.evaluation.blocks.keys() == alone.evaluation.blocks.keys()
    for block, counts in alone.evaluation.blocks.items():
        np.testing.assert_array_equal(together.evaluation.blocks[block], counts)


def quarrel(who, error):
    if ranks.rank() == who:
        raise error
    return ranks.summed(torch.ones(1))


@pytest.mark.parametrize("who", [0, 1])
def test_an_error_of_one_rank_ends_the_training_of_all(who):
    error = OSError("tile 7 cannot be read")
    expected = ranks.RankError if who else OSError
    start = time.monotonic()
    with (
        pytest.raises(expected, match="tile 7 cannot be read"),
        ranks.together(quarrel, who, error, **TWO),
    ):
        quarrel(who, error)
    assert time.monotonic() - start < 120  # and not the hour of a time-out
    with ranks.together(quarrel, None, None, **TWO):
        assert quarrel(None, None) == 2


def test_a_loss_that_is_no_number_ends_the_training_of_all(prepared, tmp_path):
    conf = small_conf(2)
    conf.train.gradient_clip = 1e9
    with pytest.raises(InputError, match=r"the loss is .* Tiles of 128 px: .* lower LEARNING"):
        train_small(prepared.data, tmp_path, conf=conf, devices=2, learning_rate=1e6)


LAUNCHED = """
    import pickle, sys
    from pathlib import Path
    sys.path[:0] = [{project!r}, {tests!r}]
    import gridsearch, ranks
    from conftest import small_conf

    space = {{"patch_size": [128], "n_epochs": [1], "sample_size": [0.3],
              "learning_rate": [1e6, 1e-3], "batch_size": [4]}}
    with ranks.lead_or_follow() as leads:
        if leads:
            data, conf = pickle.loads(Path({data!r}).read_bytes()), small_conf()
            conf.train.gradient_clip = 1e9
            gridsearch.run_search(data, space, conf, Path({run!r}))
"""


def test_processes_that_torchrun_starts_do_one_search_together(prepared, tmp_path):
    data, run, script = tmp_path / "data.pkl", tmp_path / "run", tmp_path / "search.py"
    data.write_bytes(pickle.dumps(prepared.data))
    script.write_text(
        textwrap.dedent(LAUNCHED).format(
            project=str(PROJECT), tests=str(PROJECT / "tests"), data=str(data), run=str(run)
        )
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*launch, str(script)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    board = pd.read_csv(run / "leaderboard.csv").set_index("state")
    assert set(board.index) == {"complete", "fail"}  # one that failed does not spoil the next
    assert "lower LEARNING_RATES" in board.loc["fail", "error"]
    steps = pd.read_csv(next(run.glob("trials/*learning_rate-0.001*")) / "metrics.csv")
    tiles = ((prepared.tiles["split"] == "train").sum() * 0.3).round()
    assert steps["train_loss_step"].notna().sum() == -(-tiles // 8)
    assert json.loads((run / "metrics.json").read_text())["trials"] == {"complete": 1, "fail": 1}


@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 5), st.integers(0, 3))
def test_an_epoch_is_dealt_out_without_repeating_or_dropping_a_tile(items, batch, size, epoch):
    sampler = TileSampler(np.ones(items), seed=1)
    sampler.set_epoch(epoch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "count", lambda: size)
        if items < size:
            with pytest.raises(InputError, match="cannot be shared out among"):
                len(TileBatches(sampler, batch))
            return
        shares = []
        for number in range(size):
            patch.setattr(ranks, "rank", lambda number=number: number)
            batches = TileBatches(sampler, batch)
            shares.append(list(batches))
            assert len(shares[-1]) == len(batches)
            batches.resume(batches.state_dict(), epoch, len(batches) // 2)
            assert list(batches) == shares[-1][len(batches) // 2 :]
    lengths = [len(chunk) for share in shares for chunk in share]
    assert max(lengths) <= max(batch, 2)
    assert max(lengths) - min(lengths) <= 1
    dealt = [visit for step in zip(*shares, strict=True) for chunk in step for visit in chunk]
    assert dealt == list(sampler)


def test_machines_that_are_not_there_are_asked_for():
    with pytest.raises(InputError, match=r"NUM_NODES = 2, but .* by torchrun"):
        ranks.processes("cpu", 1, nodes=2)
    with pytest.raises(InputError, match="cannot be had"):
        ranks.processes("cuda", 64)
    assert ranks.processes("cpu", 3) == 3


# GPUs that others leave free

BUSY = [
    ranks.GpuUse(0, 30_000, 95),
    ranks.GpuUse(1, 900, 5),
    ranks.GpuUse(2, 400, 60),
    ranks.GpuUse(3, 12, 0),
]


@pytest.mark.parametrize(
    ("devices", "limits", "expected"),
    [
        (1, (2000, 15), [3]),
        (2, (2000, 15), [1, 3]),
        (3, (2000, 15), [1, 3]),  # fewer than wanted
        (1, (None, 100), [3]),
        ("auto", (2000, None), [1, 2, 3]),
        ([0, 1], (2000, 15), [1]),
        (2, (None, None), 2),  # no limit, no choice
    ],
)
def test_free_gpus_are_taken_those_with_most_memory_first(devices, limits, expected):
    assert ranks.free_devices("auto", devices, *limits, BUSY) == expected


def test_without_a_gpu_one_processor_trains(caplog):
    assert ranks.free_devices("auto", 2, 2000, 15, []) == 1
    assert "no GPU to choose from" in caplog.text
    assert ranks.free_devices("cpu", 2, 2000, 15, BUSY) == 2


def test_gpus_that_are_all_busy_are_named():
    with pytest.raises(InputError, match=r"0: 30000 MB, 95 %, 1: 900 MB.*raise max_used_ram"):
        ranks.free_devices("gpu", 1, 10, 0, BUSY)


def test_nvidia_smi_is_understood(monkeypatch):
    table = "GPU-aa, 1024, 7\nGPU-bb, 0, 0\nGPU-cc, [N/A], 3\n"
    done = subprocess.CompletedProcess([], 0, stdout=table)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)  # torch has an order of its own
    uuids = dict(enumerate(["bb", "aa", "cc"]))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=uuids[i])
    )
    assert ranks.gpu_use() == [ranks.GpuUse(0, 0, 0), ranks.GpuUse(1, 1024, 7)]
