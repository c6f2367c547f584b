"""Transforms of training tiles: what lies on a tile follows its pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

import augment
from imutils import Radiometry
from ModelConfig import AugmentConfig

OFF = {
    "flips": False, "turns": False, "zoom": 1, "contrast": 0, "brightness": 0, "gamma": 1,
    "noise": 0, "blur": 0, "band_dropout": 0, "mosaic": 0,
}  # fmt: skip
STRONG = {
    "flips": {"flips": True},
    "turns": {"turns": True},
    "gain": {"contrast": 0.3, "brightness": 1.0},
    "gamma": {"gamma": 2.0},
    "noise": {"noise": 0.3, "noise_share": 1.0},
    "blur": {"blur": 1.0, "blur_share": 1.0},
    "dropout": {"band_dropout": 0.5},
    "all": {
        "flips": True, "turns": True, "contrast": 0.3, "brightness": 1.0, "gamma": 1.5,
        "noise": 0.2, "noise_share": 1.0, "blur": 0.8, "blur_share": 1.0, "band_dropout": 0.3,
    },
}  # fmt: skip


def radiometry_of(bands):
    return Radiometry(
        "none", *(tuple([v] * bands) for v in (0.0, 1.0, 0.1, 0.2))
    )  # low, high, mean, std


def transform_of(bands=1, **options):
    return augment.training_transform(AugmentConfig(**(OFF | options)), radiometry_of(bands))


def bounds_of(bright):
    ys, xs = torch.nonzero(bright, as_tuple=True)
    return torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()


@pytest.mark.parametrize("bands", [1, 3, 5])
@pytest.mark.parametrize("name", STRONG)
def test_each_transform_keeps_boxes_and_masks_on_their_objects(name, bands):
    transform = transform_of(bands, **STRONG[name]) or v2.Identity()  # one band never drops out
    places = set()
    for seed in range(24):
        torch.manual_seed(seed)
        image = torch.zeros(bands, 40, 40)
        image[:, 8:14, 4:13] = 1.0
        counted = torch.ones(40, 40, dtype=torch.bool)
        counted[8:14, 4:13] = False
        target = {
            "boxes": tv_tensors.BoundingBoxes(
                torch.tensor([[4.0, 8, 13, 14]]), format="XYXY", canvas_size=(40, 40)
            ),
            "labels": torch.tensor([3]),
            "counted": tv_tensors.Mask(counted),
        }
        out, target = transform(tv_tensors.Image(image), target)
        total = out.as_subclass(torch.Tensor).mean(0)
        found = bounds_of(total > (total.min() + total.max()) / 2)
        assert out.shape == image.shape
        assert (found - target["boxes"][0]).abs().max() <= 1, "pixels blurred and noisy by one px"
        assert bounds_of(~target["counted"]).tolist() == target["boxes"][0].tolist()
        assert target["labels"].tolist() == [3]
        places.add(tuple(target["boxes"][0].int().tolist()))
    assert len(places) == {"flips": 2, "turns": 4, "all": len(places)}.get(name, 1)


def test_amplitudes_are_in_units_of_the_input():
    torch.manual_seed(0)
    image = tv_tensors.Image(torch.full((2, 64, 64), 0.5))
    noisy = [transform_of(2, noise=0.5, noise_share=1)(image) for _ in range(50)]
    spread = torch.stack([n.std() for n in noisy])
    assert 0.08 < spread.max() < 0.105, "half of the input's 0.2, drawn from 0 on"
    shifts = torch.stack([transform_of(2, brightness=2)(image).mean() for _ in range(200)]) - 0.5
    assert 0.38 < shifts.max() <= 0.4
    assert -0.4 <= shifts.min() < -0.38
    bent = torch.stack([transform_of(2, gamma=2)(image).mean() for _ in range(200)])
    assert 0.25 <= bent.min() < 0.27
    assert 0.69 < bent.max() <= 0.5**0.5 + 1e-6


def test_gamma_leaves_values_beyond_the_stretch_in_their_order():
    values = torch.linspace(-2, 3, 4096).reshape(1, 64, 64)
    out = augment.RandomGamma(2.0)(tv_tensors.Image(values)).flatten()
    assert (out.diff() > -1e-6).all()
    assert torch.equal(out[[0, -1]], torch.tensor([-2.0, 3]))


@pytest.mark.parametrize("bands", [1, 2, 5])
@pytest.mark.parametrize("probability", [0.5, 1.0])
def test_a_band_always_stays(bands, probability):
    torch.manual_seed(0)
    drop = augment.BandDropout(probability, [0.1] * bands)
    dropped = torch.zeros(bands)
    for _ in range(200):
        gone = drop(tv_tensors.Image(torch.ones(bands, 4, 4))).mean((1, 2)) < 0.5
        assert not gone.all()
        dropped += gone
    expected = 200 * probability * (bands - 1) / bands
    np.testing.assert_allclose(dropped, expected, atol=30)


def test_every_part_can_be_switched_off():
    assert transform_of() is None
    assert augment.training_transform(AugmentConfig(enabled=False), radiometry_of(1)) is None
    for name, options in STRONG.items():
        assert len(transform_of(3, **options).transforms) == (7 if name == "all" else 1)


def test_trimming_stretches_what_is_left_to_the_old_range():
    image = torch.linspace(0, 1, 10_000).view(1, 100, 100)
    trim = augment.RandomTrim(10.0, 10.0)
    out = trim(tv_tensors.Image(image))
    assert (float(out.min()), float(out.max())) == (0.0, 1.0)
    assert float((out == 0).float().mean()) == pytest.approx(0.1, abs=1e-3)
    assert float(out[0, 50, 0]) == pytest.approx(0.5, abs=1e-3)
    torch.testing.assert_close(
        trim(tv_tensors.Image(torch.ones(1, 4, 4))), tv_tensors.Image(torch.ones(1, 4, 4))
    )
