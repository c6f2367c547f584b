"""The network: anchors and their objects, any bands, weights from elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import REAL_DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from test_LargeRasterOR import contract_of, small_conf
from torchvision.models import resnet18

import fileio
import imutils
from ImageData import BOX_COLUMNS, InputError
from LargeRasterOR import LargeRasterORModel
from ModelConfig import ModelConfig
from networks import (
    BACKGROUND,
    Anchors,
    ExactAnchors,
    assign_anchors,
    best_anchor_iou,
    fit_anchors,
    fit_bands,
    fit_weights,
    freeze_stages,
    load_weights,
    make_backbone,
)

CPU = torch.device("cpu")


def test_anchors_meet_the_objects():
    rng = np.random.default_rng(0)
    side = np.exp(rng.uniform(np.log(10), np.log(70), 500))
    boxes = np.stack([np.zeros(500), np.zeros(500), side, side], 1)
    anchors = fit_anchors(boxes)
    sizes = np.array(anchors.sizes).ravel()
    ratio = np.abs(np.log2(side[:, None] / sizes[None])).min(axis=1)
    assert (ratio <= 1 / 2 + 0.05).mean() > 0.95  # half a step of an octave
    assert anchors.aspect_ratios == (1.0,)
    assert sizes.min() == pytest.approx(np.quantile(side, 0.02), rel=0.01)


@pytest.mark.parametrize(("side", "finest"), [(5, 1), (6, 2), (13, 2), (31, 2), (32, 3), (200, 3)])
def test_small_objects_get_a_finer_level(side, finest):
    anchors = fit_anchors(np.array([[0.0, 0, side, side]]))
    assert anchors.finest_level == finest
    assert len(anchors.sizes) == 7 - finest
    assert fit_anchors(np.array([[0.0, 0, 5, 5]]), ModelConfig(finest_level=2)).finest_level == 2
    doubled = fit_anchors(np.array([[0.0, 0, 5, 5]]), ModelConfig(input_scale=2))
    assert (doubled.finest_level, doubled.input_scale) == (2, 2)
    assert doubled.sizes[0] == (5,)  # px of the tile


def test_elongated_objects_get_elongated_anchors():
    boxes = np.array([[0, 0, 30, 10]] * 3 + [[0, 0, 10, 10]] * 7, float)
    assert fit_anchors(boxes).aspect_ratios == (0.5, 1.0, 2.0)


def test_anchors_need_objects():
    with pytest.raises(InputError, match="at least one training box"):
        fit_anchors(np.zeros((0, 4)))


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "mobilenet_v3_large"])
@pytest.mark.parametrize(("bands", "finest"), [(1, 1), (5, 2), (3, 3)])
def test_backbones_take_any_bands_and_give_levels_down_to_the_finest(backbone, bands, finest):
    body = make_backbone(small_conf(backbone=backbone), bands, finest)
    features = body(torch.rand(2, bands, 64, 64))
    assert [f.shape[-1] for f in features.values()] == [32, 16, 8, 4, 2, 1][finest - 1 :]
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


def test_the_best_anchor_iou_is_that_of_shapes():
    anchors = Anchors(((8.0,), (16.0,)), (1.0, 4.0), 2)
    # the square of 8; 32 x 8 px high, the tall anchor of 16; a wide box; one far too large
    boxes = np.array([[0.0, 0, 8, 8], [5, 5, 13, 37], [0, 0, 16, 4], [0, 0, 64, 64]])
    expected = [1.0, 1.0, 32 / (64 + 64 - 32), 256 / 4096]
    np.testing.assert_allclose(best_anchor_iou(anchors, boxes), expected, rtol=1e-6)


def test_the_offset_of_the_annotations_follows_the_frames_of_the_tiles():
    torch.manual_seed(0)
    model = LargeRasterORModel(["a"], small_conf(), contract_of()).eval()
    model.network.score_thresh = 0.0
    image = torch.rand(1, 1, 64, 64)
    boxes = torch.tensor([[4.0, 4, 20, 20], [30, 34, 40, 43]])
    labels = torch.zeros(2, dtype=torch.int64)
    frames = torch.stack([torch.eye(2) * 2, torch.tensor([[0.0, 1], [-1, 0]])])

    def losses_of(target):
        losses, _ = model.network(image, [{"labels": labels} | target], detect=False)
        return {name: float(value) for name, value in losses.items()}

    plain = losses_of({"boxes": boxes})
    (before,) = model(image)
    step = torch.tensor([0.75, -0.5])
    model.network.offset.copy_(step)
    moved = boxes + torch.tensor([[1.5, -1], [-0.5, -0.75]]).repeat(1, 2)
    assert losses_of({"boxes": moved, "frames": frames}) == pytest.approx(plain, rel=1e-5)
    assert losses_of({"boxes": boxes}) != pytest.approx(plain, rel=1e-3)
    (after,), (turned,) = model(image), model(image, frames[1])
    inner = ((before["boxes"] > 2) & (before["boxes"] < 62)).all(1)
    assert inner.sum() > 5
    for found, by in ((after, step), (turned, torch.tensor([-0.5, -0.75]))):
        moved = before["boxes"][inner] + by.repeat(2)
        distance = (moved[:, None] - found["boxes"]).abs().amax(dim=2)
        assert distance.min(dim=1).values.max() < 1e-3
        assert (found["boxes"] == 0).any(), "what the tile's edge cuts stays at the edge"
        assert found["boxes"].min() >= 0


def test_the_offset_is_followed_in_training_alone_and_only_where_tiles_are_turned():
    torch.manual_seed(0)
    target = {
        "boxes": torch.tensor([[4.0, 4, 20, 20]]), "labels": torch.tensor([0]),
        "frames": torch.tensor([[[0.0, 1], [-1, 0]]]),
    }  # fmt: skip

    def offset_after(*, training=True, **options):
        conf = small_conf().with_options(options)
        network = LargeRasterORModel(["a"], conf, contract_of()).network.train(training)
        network(torch.rand(1, 1, 64, 64), [target], detect=False)
        return network.offset.abs().max()

    assert offset_after() > 0
    assert offset_after(training=False) == 0
    for name in ("train.augment.turns", "train.augment.enabled", "train.learn_offset"):
        assert offset_after(**{name: False}) == 0


def test_the_offset_is_what_boxes_are_missed_by_in_the_raster_whatever_the_view():
    network = LargeRasterORModel(["a"], small_conf(), contract_of()).network
    rng = np.random.default_rng(0)
    true = torch.tensor([0.6, -0.4])
    for _ in range(200):
        turns = [imutils.turn_matrix(90 * i, mirrored=m) for i in range(4) for m in (True, False)]
        frames = torch.tensor(np.stack(turns)[rng.integers(8, size=300)]).float()
        frames *= torch.rand(300, 1, 1).add(0.5)
        looks = torch.tensor([2.0, 1.0])  # what the network gets wrong itself turns with the tiles
        noise = torch.tensor(rng.normal(0, 2, (300, 2))).float()
        network._follow_offset(frames @ true + looks + noise, frames)
    assert network.offset.tolist() == pytest.approx(true.tolist(), abs=0.1)


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


def iou_of(a, b):
    shared = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    return shared / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared)


def assign_one_by_one(boxes, anchors, grids):
    """Zhang et al.'s algorithm in plain loops, one anchor at a place."""
    match, held = np.full(len(anchors), BACKGROUND), np.zeros(len(anchors))
    for obj, box in enumerate(boxes):
        candidates, first = [], 0
        for rows, columns, stride in grids:
            x, y = np.round((box[:2] + box[2:]) / 2 / stride).astype(int)
            candidates += [
                first + r * columns + c
                for r in range(y - 1, y + 2) for c in range(x - 1, x + 2)
                if 0 <= r < rows and 0 <= c < columns
            ]  # fmt: skip
            first += rows * columns
        if not candidates:
            continue
        iou = np.array([iou_of(box, anchors[i]) for i in candidates])
        least = iou.mean() + iou.std()
        best = candidates[iou.argmax()]
        for i, value in zip(candidates, iou, strict=True):
            centre = (anchors[i][:2] + anchors[i][2:]) / 2
            inside = (centre > box[:2]).all() and (centre < box[2:]).all()
            fits = (value >= least and inside) or i == best
            if fits and (value > held[i] or match[i] == BACKGROUND):
                match[i], held[i] = obj, value
    return match


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(0, 12))
def test_objects_choose_their_anchors_as_plain_loops_do(seed, count):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-5, 60, (count, 2))
    boxes = np.hstack([corner, corner + rng.uniform(3, 30, (count, 2))])
    anchors = ExactAnchors(((7.3,), (14.6,), (29.2,)), ((1.0,),) * 3)
    grids = [(16, 16, 4.0), (8, 8, 8.0), (4, 4, 16.0)]
    places = anchors.on_grids(grids, CPU).double()
    match = assign_anchors(torch.from_numpy(boxes), places, grids).numpy()
    expected = assign_one_by_one(boxes, places.numpy(), grids)
    assert ((match >= 0) == (expected >= 0)).all()
    for i in np.flatnonzero(match != expected):  # of two objects it fits as well, either
        held = [iou_of(boxes[j], places[i].numpy()) for j in (match[i], expected[i])]
        assert held[0] == pytest.approx(held[1], abs=1e-9)


def test_a_tile_with_5000_objects_is_learnt_from():
    rng = torch.Generator().manual_seed(0)
    corner = torch.rand(5000, 2, generator=rng) * 500
    boxes = torch.hstack([corner, corner + 3 + torch.rand(5000, 2, generator=rng) * 6])
    model = LargeRasterORModel(["a"], small_conf(), contract_of(tile_size=512))
    target = {"boxes": boxes, "labels": torch.zeros(5000, dtype=torch.int64)}
    losses, _ = model.network(torch.rand(1, 1, 512, 512), [target], detect=False)
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_anchors_keep_their_sides_to_a_fraction_of_a_pixel():
    anchors = ExactAnchors(((7.0, 8.8), (15.5, 19.0)), ((1.0, 2.0),) * 2)
    boxes = anchors.on_grids([(2, 3, 4.0), (1, 2, 8.0)], CPU)
    assert boxes.shape == ((6 + 2) * 4, 4)
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    assert width[:2].tolist() == pytest.approx([7.0, 8.8])
    assert (height / width)[:4].tolist() == pytest.approx([1, 1, 2, 2])
    assert (width * height).sqrt()[-4:].tolist() == pytest.approx([15.5, 19.0, 15.5, 19.0])
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert centre[::4].tolist() == [[0, 0], [4, 0], [8, 0], [0, 4], [4, 4], [8, 4], [0, 0], [8, 0]]


def test_anchors_do_not_lose_digits_to_the_precision_of_the_features():
    model = LargeRasterORModel(["a"], small_conf(), contract_of(tile_size=1024))
    image = torch.rand(1, 1, 1024, 1024)
    model.network.score_thresh = 0.0
    torch.nn.init.zeros_(model.network.head.regression_head.bbox_reg.weight)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        (found,) = model(image)
    assert found["boxes"].dtype == torch.float32
    # this head moves no box: each lies on its anchor, at a multiple of four pixels
    centre = (found["boxes"][:, :2] + found["boxes"][:, 2:]) / 2
    inner = ((found["boxes"] > 0) & (found["boxes"] < 1024)).all(dim=1)
    assert inner.sum() > 20
    assert (centre[inner] / 4 - (centre[inner] / 4).round()).abs().max() < 1e-3


@pytest.mark.parametrize("scale", [1.5, 2.0])
def test_an_enlarged_input_gives_boxes_of_the_tile(scale):
    contract = contract_of(tile_size=64)
    contract.anchors = Anchors(contract.anchors.sizes, (1.0,), 2, scale)
    torch.manual_seed(0)
    model = LargeRasterORModel(["a"], small_conf(), contract)
    model.network.score_thresh = 0.0
    target = {"boxes": torch.tensor([[40.0, 8, 56, 24]]), "labels": torch.tensor([0])}
    image = torch.rand(1, 1, 64, 64)
    losses, (found,) = model.network(image, [target])
    assert 0 <= found["boxes"].min() < found["boxes"].max() <= 64
    assert losses["bbox_regression"] < 1.5  # the best anchor lies on the object
    assert len(model.network(image)[1][0]["boxes"]) > 0


@pytest.mark.parametrize("box_loss", ["giou", "diou", "ciou"])
def test_boxes_are_learnt_by_their_overlap(box_loss):
    torch.manual_seed(0)
    conf = small_conf(box_loss=box_loss)
    conf.train.learn_offset = False  # a tile that is never turned cannot tell it
    model = LargeRasterORModel(["a"], conf, contract_of())
    image = torch.rand(1, 1, 64, 64)
    target = {"boxes": torch.tensor([[21.0, 13, 37, 24]]), "labels": torch.tensor([0])}
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(100):
        losses, _ = model.network(image, [target], detect=False)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    _, (found,) = model.network(image, [target])
    assert iou_of(found["boxes"][0].numpy(), target["boxes"][0].numpy()) > 0.8


def test_anchors_cover_the_objects_of_the_sample(prepared):
    boxes = prepared.boxes[prepared.boxes["owned"]][BOX_COLUMNS].to_numpy()
    assert (best_anchor_iou(fit_anchors(boxes), boxes) > 0.5).mean() > 0.9


@pytest.mark.skipif(not REAL_DATA.exists(), reason="no real data beside the project")
@pytest.mark.parametrize("folder", ["lunar_craters", "trees", "ships", "stars"])
def test_anchors_cover_real_objects(folder):
    tables = [fileio.read_table(path) for path in sorted((REAL_DATA / folder).glob("*.csv"))]
    sides = np.concatenate(
        [np.ptp(df[BOX_COLUMNS].to_numpy(float).reshape(-1, 2, 2), axis=1)
         if "xmin" in df else df[["diameter"] * 2].to_numpy(float) for df in tables]
    )  # fmt: skip
    boxes = np.hstack([np.zeros_like(sides), sides])
    assert (best_anchor_iou(fit_anchors(boxes), boxes) > 0.5).mean() > 0.95


def network_of(labels, bands=3, **options):
    torch.manual_seed(bands + len(labels))
    return LargeRasterORModel(labels, small_conf(**options), contract_of(bands)).network


def test_more_bands_keep_the_response_to_the_first():
    three, five = network_of(["a"], 3), network_of(["a"], 5)
    fit_weights(five, three.state_dict(), ["a"], ["a"])
    images = torch.rand(2, 5, 64, 64)
    for network in (three, five):
        network.score_thresh = 0.0
    expected, given = three(images[:, :3])[1], five(images)[1]
    for mine, theirs in zip(given, expected, strict=True):
        for name in ("boxes", "scores", "labels"):
            torch.testing.assert_close(mine[name], theirs[name])


@pytest.mark.parametrize(("known", "bands"), [(1, 3), (3, 1)])
def test_a_grey_image_answers_as_its_copy_in_all_bands(known, bands):
    weight, grey = torch.rand(8, known, 3, 3), torch.rand(1, 1, 9, 9)
    before, after = (
        torch.nn.functional.conv2d(grey.expand(-1, n, -1, -1), w)
        for n, w in ((known, weight), (bands, fit_bands(weight, bands)))
    )
    torch.testing.assert_close(after, before)


def test_a_new_head_keeps_what_it_knows_of_old_classes():
    old, new = network_of(["crater", "pit"]), network_of(["boulder", "crater"])
    fresh = new.head.classification_head.cls_logits.weight.detach().clone().unflatten(0, (-1, 2))
    fit_weights(new, old.state_dict(), ["boulder", "crater"], ["crater", "pit"])
    mine, theirs = (
        n.head.classification_head.cls_logits.weight.detach().unflatten(0, (-1, 2))
        for n in (new, old)
    )
    torch.testing.assert_close(mine[:, 1], theirs[:, 0])  # crater
    torch.testing.assert_close(mine[:, 0], fresh[:, 0])  # boulder
    torch.testing.assert_close(
        new.head.regression_head.state_dict(), old.head.regression_head.state_dict()
    )


def test_weights_of_another_architecture_are_refused():
    wide = network_of(["a"])
    deep = network_of(["a"], head_depth=4)
    with pytest.raises(InputError, match="tensors of the checkpoint"):
        fit_weights(deep, wide.state_dict(), ["a"], ["a"])


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v3_large"])
@pytest.mark.parametrize(("stages", "finest"), [(0, 2), (1, 1), (1, 2), (1, 3), (3, 2), (4, 1)])
def test_frozen_stages_do_not_learn_wherever_the_pyramid_begins(backbone, stages, finest):
    pyramid = make_backbone(small_conf(backbone=backbone), 3, finest)
    freeze_stages(pyramid, stages)
    features = pyramid(torch.rand(2, 3, 64, 64))
    sum(f.sum() for f in features.values()).backward()
    learns = {
        name: all(p.grad is not None for p in module.parameters())
        for name, module in pyramid.body.named_children() if list(module.parameters())
    }  # fmt: skip
    assert [learns[name] for name in pyramid.stages] == [i >= stages for i in range(4)]
    assert next(iter(learns.values())) == (stages == 0)  # the stem
    assert all(p.grad is not None for p in pyramid.fpn.parameters())


def test_frozen_stages_refuse_statistics_of_the_batch():
    with pytest.raises(InputError, match="frozen stages must not be normalised by the batch"):
        freeze_stages(make_backbone(small_conf(norm="batch"), 3), 1)


def test_weights_without_a_classifier_are_as_good(tmp_path):
    donor = resnet18(weights=None, num_classes=10)
    torch.save(donor.state_dict(), tmp_path / "ten.pth")
    state = {n: v for n, v in donor.state_dict().items() if not n.startswith("fc.")}
    torch.save(state, tmp_path / "none.pth")
    for name in ("ten.pth", "none.pth"):
        body = make_backbone(small_conf(weights=str(tmp_path / name)), 3, load=True).body
        torch.testing.assert_close(body["conv1"].weight, donor.conv1.weight)


def test_anchors_reach_from_the_smaller_to_the_larger_objects():
    sides = np.geomspace(5, 500, 200)[:, None]
    boxes = np.hstack([np.zeros((200, 2)), sides, sides])
    anchors = fit_anchors(boxes)
    sizes = [level[0] for level in anchors.sizes]
    assert sizes[0] == pytest.approx(np.quantile(sides, 0.02), rel=0.01)
    assert sizes[-1] == pytest.approx(np.quantile(sides, 0.98), rel=0.01)
    np.testing.assert_allclose(np.diff(np.log(sizes)), np.log(sizes[1] / sizes[0]), rtol=0.01)
    chosen = fit_anchors(boxes, ModelConfig(smallest_anchor=9, aspect_ratios=(1, 3)))
    assert (chosen.sizes[0], chosen.aspect_ratios) == ((9,), (1, 3))
