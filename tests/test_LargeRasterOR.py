"""The detector: it learns, describes itself, and takes any bands."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader
from torchvision.models import resnet18

import gridsearch
from datasets import TileDataModule, collate
from ImageData import InputError
from imutils import Radiometry
from LargeRasterOR import LargeRasterORModel, resolve_precision
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
    contract = gridsearch.make_contract(data, module, 128)
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


def test_testing_before_validating_is_refused(prepared, tmp_path):
    data, conf = prepared.data, small_conf(batch_size=8)
    module = TileDataModule(
        prepared.tiles, prepared.boxes, data.rasters, data.ids, data.radiometry, conf
    )
    model = LargeRasterORModel(data.ids, conf, gridsearch.make_contract(data, module, 128))
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


def test_several_devices_are_refused_until_they_measure_exactly():
    model = LargeRasterORModel(["a"], small_conf(devices=2), contract_of())
    with pytest.raises(InputError, match="set DEVICES = 1"):
        model.create_trainer()


def test_precision_is_decided_by_the_hardware(monkeypatch):
    assert resolve_precision("16-mixed", "cpu") == "16-mixed"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert resolve_precision("auto", "cpu") == "bf16-mixed"
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert resolve_precision("auto", "cpu") == "32-true"


def test_the_rate_rises_then_falls(prepared, tmp_path):
    data, conf = prepared.data, small_conf(batch_size=16)
    conf.train.epochs, conf.train.optimizer = 2, "sgd"
    module = TileDataModule(
        prepared.tiles, prepared.boxes, data.rasters, data.ids, data.radiometry, conf
    )
    model = LargeRasterORModel(data.ids, conf, gridsearch.make_contract(data, module, 128))
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
