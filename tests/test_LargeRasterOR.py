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
from LargeRasterOR import (
    Anchors,
    DataContract,
    LargeRasterORModel,
    best_anchor_iou,
    fit_anchors,
    load_weights,
    make_backbone,
    resolve_precision,
)
from ModelConfig import ModelConfig


def contract_of(bands=1, **changes):
    anchors = Anchors(tuple((8.0 * 2**i, 10.0 * 2**i, 13.0 * 2**i) for i in range(5)), (1.0,))
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


def test_anchors_meet_the_objects():
    rng = np.random.default_rng(0)
    side = np.exp(rng.uniform(np.log(10), np.log(70), 500))
    boxes = np.stack([np.zeros(500), np.zeros(500), side, side], 1)
    anchors = fit_anchors(boxes)
    sizes = np.array(anchors.sizes).ravel()
    ratio = np.abs(np.log2(side[:, None] / sizes[None])).min(axis=1)
    assert (ratio <= 1 / 6 + 0.05).mean() > 0.95  # half a step of a third of an octave
    assert anchors.aspect_ratios == (1.0,)
    assert sizes.min() == pytest.approx(np.quantile(side, 0.02), rel=0.01)


def test_elongated_objects_get_elongated_anchors():
    boxes = np.array([[0, 0, 30, 10]] * 3 + [[0, 0, 10, 10]] * 7, float)
    assert fit_anchors(boxes).aspect_ratios == (0.5, 1.0, 2.0)


def test_anchors_need_objects():
    with pytest.raises(InputError, match="at least one training box"):
        fit_anchors(np.zeros((0, 4)))


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "mobilenet_v3_large"])
@pytest.mark.parametrize("bands", [1, 5])
def test_backbones_take_any_bands_and_give_five_levels(backbone, bands):
    body = make_backbone(small_conf(backbone=backbone), bands)
    features = body(torch.rand(2, bands, 64, 64))
    assert [f.shape[-1] for f in features.values()] == [16, 8, 4, 2, 1]
    assert {f.shape[1] for f in features.values()} == {32}


@pytest.mark.parametrize("size", [64, 50])
def test_one_pass_gives_losses_and_boxes_on_the_tile(size):
    torch.manual_seed(0)
    model = LargeRasterORModel(["a", "b"], small_conf(), contract_of(tile_size=size))
    targets = [
        {"boxes": torch.tensor([[5.0, 5, 25, 25]]), "labels": torch.tensor([1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},
    ]
    model.network.score_thresh = 0.0
    losses, detections = model.network(torch.rand(2, 1, size, size), targets)
    assert set(losses) == {"classification", "bbox_regression"}
    assert all(torch.isfinite(loss) for loss in losses.values())
    for found in detections:
        assert len(found["boxes"]) > 0
        assert found["boxes"].min() >= 0
        assert found["boxes"].max() <= size
        assert (found["scores"].diff() <= 0).all()
    assert model.network(torch.rand(1, 1, size, size))[0] == {}


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


def test_weights_come_from_a_file_and_fit_other_bands(tmp_path):
    torch.manual_seed(0)
    donor = resnet18(weights=None)
    path = tmp_path / "resnet18.pth"
    torch.save(donor.state_dict(), path)
    conf = small_conf(weights=str(path))
    five = make_backbone(conf, 5, load=True).body["conv1"].weight
    torch.testing.assert_close(five[:, :3], donor.conv1.weight)
    one = make_backbone(conf, 1, load=True).body["conv1"].weight
    torch.testing.assert_close(one, donor.conv1.weight.sum(dim=1, keepdim=True))
    three = make_backbone(conf, 3, load=True)
    torch.testing.assert_close(three.body["layer1"][0].conv1.weight, donor.layer1[0].conv1.weight)


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


def test_unusable_weights_are_refused_with_the_cure(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="WEIGHTS must be a file, or one of"):
        load_weights("resnet18", "IMAGENET")
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"nothing")
    with pytest.raises(InputError, match="is not a file of weights"):
        load_weights("resnet18", str(bad))
    torch.save({"fc.bias": torch.zeros(3)}, bad)
    with pytest.raises(InputError, match=r"do not fit resnet18: .* tensors are"):
        make_backbone(small_conf(weights=str(bad)), 3, load=True)

    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(InputError, match=r"could not be downloaded from http.*set WEIGHTS to its"):
        load_weights("resnet18", "DEFAULT")


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
    assert max(rates) == pytest.approx(conf.train.lr)
    assert peak <= len(rates) * 0.2
    assert (np.diff(rates[peak:]) <= 0).all()
    assert rates[-1] < 0.1 * max(rates)
    assert isinstance(model.trainer.optimizers[0], torch.optim.SGD)


def test_the_best_anchor_iou_is_that_of_shapes():
    anchors = Anchors(((8.0,), (16.0,)), (1.0, 4.0))
    # the square of 8; 32 x 8 px high, the tall anchor of 16; a wide box; one far too large
    boxes = np.array([[0.0, 0, 8, 8], [5, 5, 13, 37], [0, 0, 16, 4], [0, 0, 64, 64]])
    expected = [1.0, 1.0, 32 / (64 + 64 - 32), 256 / 4096]
    np.testing.assert_allclose(best_anchor_iou(anchors, boxes), expected, rtol=1e-6)


def test_ground_that_does_not_count_teaches_no_background():
    model = LargeRasterORModel(["a"], small_conf(), contract_of())
    torch.manual_seed(0)
    image = torch.rand(1, 1, 64, 64)
    target = {"boxes": torch.tensor([[4.0, 4, 20, 20]]), "labels": torch.tensor([0])}
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    counted = torch.zeros(64, 64, dtype=torch.bool)

    def gradient_of_background(target):
        model.zero_grad()
        losses, _ = model.network(image, [target], detect=False)
        sum(losses.values()).backward()
        return model.network.head.classification_head.cls_logits.bias.grad.abs().sum().item()

    assert gradient_of_background(none) > 0
    assert gradient_of_background(none | {"counted": counted}) == 0
    # an object still teaches what it is, and where
    assert gradient_of_background(target | {"counted": counted}) > 0
    half = counted.clone()
    half[:, :32] = True
    assert 0 < gradient_of_background(none | {"counted": half}) < gradient_of_background(none)
