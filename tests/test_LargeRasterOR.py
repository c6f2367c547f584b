"""The detector: it learns, describes itself, and takes any bands."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import ConcatDataset, DataLoader
from torchvision.models import resnet18

import gridsearch
import trials
from datasets import BboxDataset, HardTiles, TileDataModule, collate
from ImageData import InputError
from imutils import Radiometry
from LargeRasterOR import DivergedError, LargeRasterORModel, ProgressLines, resolve_precision
from learning import RateDrops
from ModelConfig import ModelConfig
from networks import (
    Anchors,
    DataContract,
)


def contract_of(bands=1, **changes):
    anchors = Anchors(tuple((8.0 * 2**i, 10.0 * 2**i, 13.0 * 2**i) for i in range(5)), (1.0,), 2)
    radiometry = Radiometry(
        "none", (0.0,) * bands, (255.0,) * bands, (0.4,) * bands, (0.2,) * bands
    )
    contract = DataContract(
        tile_size=64, bands=tuple(range(1, bands + 1)), band_count=bands, dtype="uint8",
        radiometry=radiometry, anchors=anchors,
        detections_per_tile=50, resolution=None, split_hash="x", evaluation_overlap=20,
    )  # fmt: skip
    return replace(contract, **changes)


def small_conf(**options):
    return ModelConfig(fpn_channels=32, accelerator="cpu", precision="32-true", **options)


@pytest.fixture(scope="module")
def overfitted(prepared, tmp_path_factory):
    """A model trained for 80 steps on the fullest training window, without augmentation."""
    data = prepared.data
    conf = small_conf(batch_size=1)
    conf.train.epochs, conf.train.augment.enabled, conf.train.lr = 1, False, 2e-3
    tiles = prepared.tiles
    train = tiles[(tiles["split"] == "train") & (tiles["angle"] == 0)]

    # whole objects only: those that a block's edge cuts to a sliver are another story
    sides = prepared.boxes["xmax"] - prepared.boxes["xmin"]
    whole = prepared.boxes[prepared.boxes["owned"] & (sides > 8)]["window"].value_counts()
    fullest = train.set_index("window")["tile"][whole.reindex(train["window"]).idxmax()]
    keep = (tiles["split"] != "train") | (tiles["tile"] == fullest)
    module = TileDataModule(
        tiles[keep], prepared.boxes, data.rasters, data.ids, data.radiometry, conf
    )
    torch.manual_seed(0)
    contract = trials.make_contract(data, module, 128)
    model = LargeRasterORModel(data.ids, conf, contract)
    trainer = model.create_trainer(root_dir=tmp_path_factory.mktemp("fit"))
    steps = DataLoader(ConcatDataset([module.train] * 80), collate_fn=collate)
    trainer.fit(model, train_dataloaders=steps)
    return model.eval(), module, trainer


def test_a_few_steps_overfit_one_window(overfitted):
    model, module, _ = overfitted
    image, target = module.train[0]
    with torch.inference_mode():
        (found,) = model(image[None])
    sure = found["boxes"][found["scores"] > 0.3]
    truth = target["boxes"]
    truth = truth[(truth[:, 2:] - truth[:, :2]).min(dim=1).values > 6]  # dirt of the sample aside
    low = torch.maximum(sure[:, None, :2], truth[None, :, :2])
    high = torch.minimum(sure[:, None, 2:], truth[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    area = lambda b: (b[:, 2:] - b[:, :2]).prod(-1)  # noqa: E731
    iou = shared / (area(sure)[:, None] + area(truth)[None] - shared)
    assert len(truth) >= 5
    assert (iou.max(dim=0).values > 0.5).float().mean() >= 0.9
    assert len(sure) <= len(target["boxes"]) + 2


def test_a_checkpoint_describes_itself_and_detects_the_same(overfitted, tmp_path):
    model, module, trainer = overfitted
    model.operating_threshold.fill_(0.4)
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    torch.load(tmp_path / "m.ckpt", weights_only=True)  # holds plain values only
    again = LargeRasterORModel.load_from_checkpoint(tmp_path / "m.ckpt", map_location="cpu").eval()
    assert again.labels == ["Unknown", "boulder", "crater"]
    assert asdict(again.contract) == asdict(model.contract)
    assert again.conf == model.conf
    assert float(again.operating_threshold) == pytest.approx(0.4)
    image, _ = module.train[0]
    with torch.inference_mode():
        (a,), (b,) = model(image[None]), again(image[None])
    for name in ("boxes", "scores", "labels"):
        torch.testing.assert_close(a[name], b[name])


def test_a_trained_model_is_measured_with_its_views(overfitted, monkeypatch):
    model, module, trainer = overfitted
    loader = module.full_validation_dataloader()
    (plain,) = trainer.validate(model, loader, verbose=False)
    frames, forward = [], model.forward

    def remember(images, frame=None):
        frames.append(frame)
        return forward(images, frame)

    monkeypatch.setattr(model, "forward", remember)
    monkeypatch.setattr(model.conf, "views", "flips")
    (fused,) = trainer.validate(model, loader, verbose=False)
    assert len(frames) == 4 * len(loader)
    assert len({tuple(frame.flatten().tolist()) for frame in frames}) == 4
    assert fused["val_loss"] == pytest.approx(plain["val_loss"])
    assert fused["val_AP50"] != plain["val_AP50"]


@pytest.mark.parametrize("views", ["none", "flips"])
def test_the_limit_of_a_tile_is_warned_of_where_it_cuts_what_counts(
    overfitted, monkeypatch, caplog, views
):
    model, module, trainer = overfitted
    monkeypatch.setattr(model.conf, "views", views)
    monkeypatch.setattr(model.network, "detections_per_img", 1)
    monkeypatch.setitem(model._buffers, "operating_threshold", torch.tensor(1.0))
    trainer.test(model, module.test_dataloader(), verbose=False)
    assert "no more are kept" not in caplog.text
    model.operating_threshold.fill_(0.0)
    trainer.test(model, module.test_dataloader(), verbose=False)
    assert "show 1 detections of the chosen threshold or above" in caplog.text


def test_testing_before_validating_is_refused(prepared, tmp_path):
    data, conf = prepared.data, small_conf(batch_size=8)
    module = TileDataModule(
        prepared.tiles, prepared.boxes, data.rasters, data.ids, data.radiometry, conf
    )
    model = LargeRasterORModel(data.ids, conf, trials.make_contract(data, module, 128))
    trainer = model.create_trainer(root_dir=tmp_path)
    with pytest.raises(InputError, match="validate it before testing"):
        trainer.test(model, module.test_dataloader(), verbose=False)


def test_a_checkpoint_does_not_need_the_weights_it_began_with(tmp_path):
    path = tmp_path / "resnet18.pth"
    torch.save(resnet18(weights=None).state_dict(), path)
    model = LargeRasterORModel(["a"], small_conf(weights=str(path)), contract_of())
    model.load_pretrained()
    trainer = model.create_trainer(root_dir=tmp_path)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "m.ckpt", weights_only=True)
    path.unlink()
    again = LargeRasterORModel.load_from_checkpoint(tmp_path / "m.ckpt")
    torch.testing.assert_close(
        again.network.backbone.state_dict(), model.network.backbone.state_dict()
    )


def test_a_batch_system_does_not_decide_how_a_training_runs(monkeypatch):
    """Tasks of Slurm may be workers of a search, each of which trains and logs alone."""
    slurm = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_JOB_ID": "7",
             "SLURM_JOB_NAME": "search", "SLURM_NODEID": "0"}  # fmt: skip
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    model = LargeRasterORModel(["a"], small_conf(devices=2), contract_of())
    trainer = model.create_trainer()
    assert (trainer.world_size, trainer.global_rank, trainer.is_global_zero) == (1, 0, True)
    assert rank_zero_only.rank == 0


def test_precision_is_decided_by_the_hardware(monkeypatch):
    assert resolve_precision("16-mixed", "cpu") == "16-mixed"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr("learning._bf16_gain", lambda: 1.5)
    assert resolve_precision("auto", "cpu") == "bf16-mixed"
    monkeypatch.setattr("learning._bf16_gain", lambda: 0.9)
    assert resolve_precision("auto", "cpu") == "32-true"
    monkeypatch.setattr("learning._bf16_gain", lambda: 1.5)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert resolve_precision("auto", "cpu") == "32-true"


def test_the_rate_rises_then_falls(prepared, tmp_path):
    data, conf = prepared.data, small_conf(batch_size=16)
    conf.train.epochs, conf.train.optimizer = 2, "sgd"
    module = TileDataModule(
        prepared.tiles, prepared.boxes, data.rasters, data.ids, data.radiometry, conf
    )
    model = LargeRasterORModel(data.ids, conf, trials.make_contract(data, module, 128))
    rates = []
    original = model.training_step

    def spy(batch, batch_idx):
        rates.append(model.trainer.optimizers[0].param_groups[0]["lr"])
        return original(batch, batch_idx)

    model.training_step = spy
    model.create_trainer(root_dir=tmp_path).fit(model, train_dataloaders=module.train_dataloader())
    peak = int(np.argmax(rates))
    assert 0.95 * conf.train.lr < max(rates) <= conf.train.lr
    assert peak <= len(rates) * 0.2
    assert (np.diff(rates[peak:]) <= 0).all()
    assert rates[-1] < 0.1 * max(rates)
    assert isinstance(model.trainer.optimizers[0], torch.optim.SGD)


def fit(prepared, folder, conf, callbacks=(), sample_size=1.0):
    data = prepared.data
    module = TileDataModule(
        prepared.tiles, prepared.boxes, data.rasters, data.ids, data.radiometry, conf,
        sample_size=sample_size,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LargeRasterORModel(data.ids, conf, trials.make_contract(data, module, 128))
    model.load_pretrained()
    trainer = model.create_trainer(
        callbacks=[HardTiles(module.sampler), *callbacks], root_dir=folder
    )
    trainer.fit(model, datamodule=module)
    return model, module, trainer


@pytest.mark.parametrize("averaging", ["ema", "swa"])
def test_what_is_kept_is_an_average_of_the_steps(prepared, tmp_path, averaging):
    conf = small_conf(batch_size=8)
    conf.train.epochs, conf.train.averaging, conf.train.averaging_share = 2, averaging, 0.3
    seen, measured = [], []

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append(module.network.head.regression_head.bbox_reg.bias.detach().clone())

        def on_validation_batch_start(self, trainer, module, *args):
            measured.append(module.network.head.regression_head.bbox_reg.bias.detach().clone())

    model, _, _ = fit(prepared, tmp_path, conf, [Spy()], sample_size=0.4)
    kept = model.network.head.regression_head.bbox_reg.bias.detach()
    steps = len(seen)
    if averaging == "swa":
        torch.testing.assert_close(kept, torch.stack(seen[steps * 3 // 4 :]).mean(dim=0))
        # what is measured before has learnt, too
        torch.testing.assert_close(measured[0], seen[steps // 2 - 1])
    else:
        expected = seen[0]
        for n, weights in enumerate(seen):
            reach = max(1.0, min(0.3 * steps, (n + 10) / 10))
            expected = expected + (weights - expected) / reach
        torch.testing.assert_close(kept, expected)


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_every_norm_learns_under_an_average(prepared, tmp_path, norm):
    conf = small_conf(batch_size=16, norm=norm)
    conf.train.epochs = 1
    model, _, trainer = fit(prepared, tmp_path, conf, sample_size=0.3)
    assert torch.isfinite(trainer.callback_metrics["train_loss_epoch"])
    counters = [v for n, v in model.state_dict().items() if n.endswith("num_batches_tracked")]
    assert bool(counters) == (norm == "batch")
    assert all(int(v) == trainer.global_step for v in counters)


def test_the_rate_falls_on_plateaus_of_what_is_measured(prepared, tmp_path):
    conf = small_conf(batch_size=16).with_options(
        {"train.plateau_patience": 1, "train.gamma": 0.5, "train.warmup_share": 0.0}
    )
    conf.train.epochs, conf.train.lr, conf.train.optimizer = 6, 1e-9, "sgd"  # nothing is learnt
    conf.validation.pr_compute_interval = 2  # 1, 2, 4 and 6 are measured
    rates, kept = [], []

    class Spy(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"] / conf.train.lr)
            kept.append(trainer.callbacks[[type(c).__name__ for c in trainer.callbacks]
                                          .index("RateDrops")].state_dict())  # fmt: skip

    fit(prepared, tmp_path, conf, [Spy()], sample_size=0.5)
    np.testing.assert_allclose(rates, [1, 1, 0.5, 0.5, 0.25, 0.25])
    assert [state["drops"] for state in kept] == [0, 1, 1, 2, 2, 3]
    again = RateDrops(1)
    again.load_state_dict(kept[-1])
    module = SimpleNamespace(rate_drops=0)
    again.on_train_start(None, module)
    assert module.rate_drops == kept[-1]["drops"]


def test_the_clock_ends_a_training_and_its_rate_falls_until_then(prepared, tmp_path):
    conf = small_conf(batch_size=2)
    conf.train.epochs, conf.train.max_minutes = 1000, 0.1
    rates, start = [], time.monotonic()

    class Spy(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    _, _, trainer = fit(prepared, tmp_path, conf, [Spy()])
    assert 6 <= time.monotonic() - start < 30
    assert trainer.current_epoch < 900
    assert rates[-1] < 0.2 * max(rates)
    assert "val_AP50" in trainer.callback_metrics  # what it ends with is measured


def test_long_work_tells_at_every_tenth_how_far_it_is(prepared, tmp_path, monkeypatch, caplog):
    conf = small_conf(batch_size=4)
    conf.train.epochs = 2
    monkeypatch.setattr("learning.LINE_SECONDS", 0)
    with caplog.at_level("INFO"):
        model, module, trainer = fit(prepared, tmp_path, conf, sample_size=0.5)
        trainer.validate(model, module.full_validation_dataloader(), verbose=False)
    lines = [line for line in caplog.messages if " batches, " in line]
    steps = [line for line in lines if line.startswith("training: ")]
    assert len(steps) == 10
    assert steps[-1].startswith(f"training: {trainer.global_step} of {trainer.global_step} batches")
    assert steps[-1].endswith(", about 0 s to go")
    assert lines[-1].startswith("validation: ")  # only the one after the training


def test_progress_counts_from_where_a_training_goes_on_and_by_its_clock(monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr("learning.time.monotonic", lambda: now[0])
    share = {"done": 0.5}
    model = SimpleNamespace(share_done=lambda: share["done"])
    trainer = SimpleNamespace(global_step=50, estimated_stepping_batches=1000)
    lines = ProgressLines()
    lines.setup(SimpleNamespace(global_step=0), model, "fit")  # before the state is restored
    now[0] += 1000
    lines.on_train_start(trainer, model)
    now[0], trainer.global_step, share["done"] = now[0] + 100, 60, 0.6
    with caplog.at_level("INFO"):
        lines.on_train_batch_end(trainer, model)
    assert caplog.messages == ["training: 60 of 1000 batches, 0.1 per second, about 400 s to go"]


@pytest.mark.parametrize(("interval", "epochs"), [(1, 3), (2, 5)])
def test_patience_counts_measurements_that_are_no_better(prepared, tmp_path, interval, epochs):
    conf = small_conf(batch_size=32)
    conf.train.epochs, conf.train.patience, conf.train.lr = 50, 2, 1e-12
    conf.validation.pr_compute_interval = interval
    _, _, trainer = fit(prepared, tmp_path, conf, sample_size=0.1)
    assert trainer.current_epoch == epochs  # the first measurement, and two that are no better


def test_a_confident_mistake_is_harder_than_many_found_objects():
    torch.manual_seed(0)
    conf = small_conf()
    conf.train.hard_negatives = 0.5
    network = LargeRasterORModel(["a"], conf, contract_of()).network
    boxes = torch.tensor(
        [[x, y, x + 9.0, y + 9] for x in range(0, 60, 10) for y in range(0, 60, 10)]
    )
    full = {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64)}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    grids = [(16 >> i, 16 >> i, 4.0 * 2**i) for i in range(5)]
    anchors = network.anchor_generator.on_grids(grids, torch.device("cpu"))
    logits = torch.full((2, len(anchors), 1), -6.0)
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    on_objects = (
        ((centre[:, None] > boxes[:, :2]) & (centre[:, None] < boxes[:, 2:])).all(-1).any(1)
    )
    logits[0, on_objects] = 3.0  # sure of its objects, all around their centres
    logits[1, 40] = 3.0  # and of nothing
    outputs = {"cls_logits": logits, "bbox_regression": torch.zeros(2, len(anchors), 4)}
    network.compute_loss([full, empty], outputs, anchors, grids)
    found, mistaken = network.background_loss
    assert mistaken > 3 * found


def test_tiles_that_are_hard_come_more_often(prepared, tmp_path):
    conf = small_conf(batch_size=8)
    conf.train.epochs, conf.train.hard_negatives = 1, 0.5
    _, module, _ = fit(prepared, tmp_path, conf, sample_size=0.5)
    difficulty, visits = module.sampler.difficulty, module.sampler.expected_visits()
    assert np.isfinite(difficulty).mean() > 0.9  # every tile of the epoch was told of
    assert visits[np.nanargmax(difficulty)] == visits.max() > 1


def test_a_loss_that_is_no_number_stops_and_names_the_tile(prepared, tmp_path, monkeypatch):
    original = BboxDataset.__getitem__

    def poisoned(dataset, index):
        image, target = original(dataset, index)
        if index[0] == 5:
            image[:, 7, 7] = torch.nan
        return image, target

    monkeypatch.setattr(BboxDataset, "__getitem__", poisoned)
    conf = small_conf(batch_size=8)
    conf.train.epochs = 1
    with pytest.raises(DivergedError, match=r"the loss is nan in .* some pixels are no") as e:
        fit(prepared, tmp_path, conf)
    assert e.value.tiles == [5]


def test_a_learning_rate_without_measure_ends_the_trial_not_the_search(prepared, tmp_path):
    conf = ModelConfig(fpn_channels=16, accelerator="cpu", precision="32-true")
    space = {
        "patch_size": [128], "n_epochs": [1], "sample_size": [1.0],
        "learning_rate": [1e6, 1e-3], "batch_size": [8],
    }  # fmt: skip
    conf.train.gradient_clip = 1e9
    board = gridsearch.run_search(prepared.data, space, conf, tmp_path / "run")
    assert sorted(board["state"]) == ["complete", "fail"]
    error = board.set_index("state").loc["fail", "error"]
    assert "Tiles of 128 px: " in error
    assert "lower LEARNING_RATES" in error


def save(model, path):
    trainer = model.create_trainer(root_dir=path.parent)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path, weights_only=True)
    return str(path)


def test_a_training_starts_from_a_checkpoint_of_other_classes_and_bands(tmp_path):
    torch.manual_seed(0)
    old = LargeRasterORModel(["crater", "pit"], small_conf(), contract_of(3))
    path = save(old, tmp_path / "old.ckpt")
    conf = small_conf(init_from=path, freeze_stages=1)
    new = LargeRasterORModel(["boulder", "crater"], conf, contract_of(5))
    new.load_pretrained()
    first = new.network.backbone.body["conv1"].weight
    torch.testing.assert_close(first[:, :3], old.network.backbone.body["conv1"].weight)
    assert not first.requires_grad
    assert new.network.head.classification_head.cls_logits.weight.requires_grad


def test_starting_from_a_model_of_another_split_is_warned_of(tmp_path, caplog):
    old = LargeRasterORModel(["a"], small_conf(), contract_of())
    path = save(old, tmp_path / "old.ckpt")
    for split, warned in (("x", False), ("y", True)):
        caplog.clear()
        contract = contract_of(split_hash=split)
        LargeRasterORModel(["a"], small_conf(init_from=path), contract).load_pretrained()
        assert ("it may have seen what is test ground here" in caplog.text) == warned


def test_a_checkpoint_of_another_architecture_is_refused_with_what_differs(tmp_path):
    path = save(LargeRasterORModel(["a"], small_conf(), contract_of()), tmp_path / "old.ckpt")
    conf = ModelConfig(fpn_channels=64, head_depth=4, accelerator="cpu", init_from=path)
    with pytest.raises(InputError, match=r"fpn_channels = 64 \(INIT_FROM has 32\), head_depth = 4"):
        LargeRasterORModel(["a"], conf, contract_of()).load_pretrained()
    anchors = Anchors(((8.0,) * 3,) * 6, (1.0,), 1)
    with pytest.raises(InputError, match=r"finest_level = 1 \(INIT_FROM has 2\); set what it has"):
        LargeRasterORModel(
            ["a"], small_conf(init_from=path), contract_of(anchors=anchors)
        ).load_pretrained()
    (tmp_path / "no.ckpt").write_bytes(b"nothing")
    for name in ("no.ckpt", "absent.ckpt"):
        conf = small_conf(init_from=str(tmp_path / name))
        with pytest.raises(InputError, match="INIT_FROM must name a checkpoint"):
            LargeRasterORModel(["a"], conf, contract_of()).load_pretrained()
