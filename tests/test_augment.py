"""Transforms of training tiles: what lies on a tile follows its pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

import augment
from augment import FancyPCA, RandomHoles, RandomWarp
from ImageData import IGNORE, InputError
from imutils import STRETCHES, Radiometry, measure_radiometry
from ModelConfig import AugmentConfig, HdrLogOptions

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
    "exposure": {"exposure": 2.0},
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


# ---------------------------------------------------------------------------------------------
# The strong set
# ---------------------------------------------------------------------------------------------

FULL = {
    "rotation": 45.0, "rotated": 1.0, "scale": 1.25, "shear": 0.15, "shift": 0.1, "elastic": 0.2,
    "grid": 0.4,
}  # fmt: skip


def warps(count, size_hw=(96, 96), **options):
    transform = RandomWarp([0.5], **(FULL | options))
    for seed in range(count):
        torch.manual_seed(seed)
        if warp := transform._draw(size_hw):
            yield seed, warp


@pytest.mark.parametrize("size_hw", [(96, 96), (64, 160)])
def test_a_warp_leads_each_pixel_back_to_where_it_came_from(size_hw):
    kinds = set()
    for _, warp in warps(60, size_hw):
        x, y = np.meshgrid(np.arange(size_hw[1]) + 0.5, np.arange(size_hw[0]) + 0.5)
        sources = warp.sources()
        assert sources.shape == (*size_hw, 2)
        # neighbours keep their order: the plane is nowhere folded
        right, down = sources[:-1, 1:] - sources[:-1, :-1], sources[1:, :-1] - sources[:-1, :-1]
        assert (right[..., 0] * down[..., 1] - right[..., 1] * down[..., 0] > 0).all()
        np.testing.assert_allclose(warp.move(sources), np.stack([x, y], axis=-1), atol=0.02)
        kinds.add((warp.knots is None, warp.edges is None))
    assert len(kinds) == 4


def test_a_distortion_at_its_largest_keeps_the_order_of_places():
    spacing = 96 / augment.KNOTS
    signs = np.indices((augment.KNOTS + 3, augment.KNOTS + 3)).sum(axis=0) % 2 * 2 - 1.0
    knots = augment.ELASTIC * spacing * np.stack([signs, -signs])
    warp = augment.Warp((96, 96), np.eye(2), np.zeros(2), knots)
    moved = warp.sources()
    assert (np.diff(moved[..., 0], axis=1) > 0).all()
    assert (np.diff(moved[..., 1], axis=0) > 0).all()


def test_a_grid_at_its_largest_stays_on_the_tile():
    for _, warp in warps(20, rotated=0.0, scale=1.0, shear=0.0, shift=0.0, elastic=0.0):
        corners = np.array([[0.0, 0], [96, 0], [96, 96], [0, 96]])
        np.testing.assert_allclose(warp.move(corners), corners, atol=1e-9)
        assert np.abs(warp.move(np.array([[48.0, 48.0]])) - 48).max() > 0.1


def test_moved_boxes_are_the_bounds_of_the_objects_in_them():
    """Ellipses are drawn, the picture is warped, and their bounds are measured on it."""
    off, swollen, turned = [], [], []
    y, x = np.mgrid[:192, :192] + 0.5
    for seed, warp in warps(80, (192, 192)):
        rng = np.random.default_rng(seed)
        center, half = rng.uniform(60, 132, 2), rng.uniform(6, 30, 2)
        inside = np.hypot((x - center[0]) / half[0], (y - center[1]) / half[1]) - 1
        image = torch.from_numpy((0.5 - inside * half.mean()).clip(0, 1)).float()[None]
        torch.manual_seed(seed)
        box = tv_tensors.BoundingBoxes(
            torch.from_numpy(np.hstack([center - half, center + half])).float()[None],
            format="XYXY", canvas_size=(192, 192),
        )  # fmt: skip
        out, moved = RandomWarp([0.0], **FULL)(tv_tensors.Image(image), box)
        moved = moved.as_subclass(torch.Tensor)[0]
        if moved.min() < 1 or moved.max() > 191:
            continue
        off.append(float((bounds_of(out[0] > 0.5) - moved).abs().max()))
        corners = center + half * [[-1, -1], [-1, 1], [1, -1], [1, 1]]
        outer = np.ptp(warp.move(corners), axis=0)
        swollen.append(np.prod(outer) / float((moved[2:] - moved[:2]).prod()))
        turned.append(abs(np.degrees(np.arctan2(warp.matrix[1, 0], warp.matrix[0, 0]))))
    assert len(off) > 50
    assert max(off) < 1.5, "the ends of a box are measured on whole pixels"
    assert np.mean(off) < 0.8
    assert np.mean(swollen) > 1.25, "bounds of the box itself would be too large by so much"
    assert max(turned) > 40


def test_masks_are_warped_as_their_images():
    rng = np.random.default_rng(0)
    classes = np.kron(rng.integers(0, 2, (12, 12)), np.ones((8, 8), dtype=int))
    image = tv_tensors.Image(torch.from_numpy(classes).float()[None])
    mask, truth = (tv_tensors.Mask(torch.from_numpy(m)) for m in (classes, classes == 1))
    outside = 0
    for seed in range(40):
        torch.manual_seed(seed)
        out, found, counted = RandomWarp([0.25], **FULL)(image, mask, truth)
        known = found != IGNORE
        assert (out[0][~known] == 0.25).all()
        assert not counted[~known].any()
        assert torch.equal(counted[known], found[known] == 1)
        sure = known & ((out[0] < 0.01) | (out[0] > 0.99))
        assert torch.equal(out[0][sure].round().long(), found[sure])
        assert sure.sum() > 0.5 * known.sum()
        assert (((out[0] > 0.5) == (found == 1))[known]).float().mean() > 0.97
        outside += int((~known).sum())
    assert outside > 0


def test_a_warp_that_draws_nothing_changes_nothing():
    image = tv_tensors.Image(torch.rand(2, 32, 32))
    same = RandomWarp([0.5, 0.5], rotation=45.0, rotated=0.0)(image)
    assert torch.equal(same, image)
    found = {torch.equal(RandomWarp([0.5] * 2, shift=0.2)(image), image) for _ in range(40)}
    assert found == {True, False}, "of a part, half of the tiles"


def test_holes_show_the_mean_and_do_not_count():
    torch.manual_seed(0)
    image = tv_tensors.Image(torch.ones(2, 64, 64))
    mask = tv_tensors.Mask(torch.ones(64, 64, dtype=torch.int64))
    seen = tv_tensors.Mask(torch.ones(64, 64, dtype=torch.bool))
    cut, without = [], 0
    for _ in range(60):
        out, found, left = RandomHoles([0.2, 0.4], 0.25)(image, mask, seen)
        hole = found == IGNORE
        assert torch.equal(hole, ~left)
        assert torch.equal(out[0] != 1, hole)
        assert torch.allclose(out[:, hole], torch.tensor([[0.2], [0.4]]))
        without += not hole.any()
        cut.append(float(hole.float().mean()))
    assert 15 < without < 45
    assert 0.03 < max(cut) < 8 * 0.25**2
    assert (image == 1).all(), "the tile itself is left alone"


def test_strength_raises_amplitudes_and_lowers_none():
    own = AugmentConfig(contrast=0.9, noise=0.0, rotate_limit=10.0)
    assert augment.strengthen(own) == own
    half, full = (augment.strengthen(AugmentConfig(contrast=0.9, strength=s)) for s in (0.5, 1))
    assert (half.contrast, full.contrast) == (0.9, 0.9)
    assert (half.rotate_limit, full.rotate_limit) == (22.5, 45.0)
    assert (half.gamma, full.gamma) == pytest.approx((1.3, 1.6))
    names = [type(t).__name__ for t in transform_of(3).transforms] if transform_of(3) else []
    strong = [type(t).__name__ for t in transform_of(3, strength=1.0).transforms]
    assert names == []
    assert {"RandomWarp", "RandomHoles", "RandomGain", "RandomGamma"} <= set(strong)
    assert transform_of(3, strength=1.0, enabled=False) is None


def test_what_is_random_follows_from_torchs_generator_alone():
    image, transform = tv_tensors.Image(torch.rand(5, 64, 64) * 3 - 1), transform_of(5, strength=1)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        np.random.default_rng()  # of no account
        draws.append(transform(image))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].isfinite().all()


def test_fancy_pca_shifts_as_the_bands_vary_together():
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(3, 3))
    covariance = mixed @ mixed.T
    torch.manual_seed(0)
    image = tv_tensors.Image(torch.zeros(3, 4, 4))
    shifts = torch.stack([FancyPCA(0.3, covariance)(image) for _ in range(4000)])
    assert (shifts.amax((2, 3)) == shifts.amin((2, 3))).all(), "the same for all pixels"
    found = np.cov(shifts[:, :, 0, 0].T.numpy(), bias=True)
    np.testing.assert_allclose(found, 0.3**2 * covariance, atol=0.08 * 0.09 * covariance.max())


def test_fancy_pca_needs_a_covariance():
    with pytest.raises(InputError, match="fancy_pca needs the covariance of the 2 bands"):
        transform_of(2, fancy_pca=0.1)


@pytest.mark.parametrize("method", STRETCHES)
def test_exposure_multiplies_what_was_stretched(method):
    rng = np.random.default_rng(0)
    raw = rng.lognormal(0, 2, (3, 32, 32)).astype(np.float32)
    radiometry = measure_radiometry(raw.reshape(3, -1), method, (0, 100))
    transform = augment.RandomExposure(3.0, radiometry)
    image = tv_tensors.Image(torch.from_numpy(radiometry.stretch(raw)))
    stops = []
    for seed in range(40):
        torch.manual_seed(seed)
        factor = transform.make_params([])["factor"]
        torch.manual_seed(seed)
        out = transform(image)
        assert out.dtype == torch.float32
        expected = radiometry.stretch(raw * np.float32(factor))
        np.testing.assert_allclose(out.numpy(), expected, rtol=1e-3, atol=1e-3)
        stops.append(np.log2(factor))
    assert -3 <= min(stops) < -2
    assert 2 < max(stops) <= 3


def test_a_clipped_sun_darkens_and_never_exceeds_its_clip():
    options = HdrLogOptions(clip=100.0)
    raw = np.array([[[1.0, 99, 5000]]], np.float32)
    radiometry = measure_radiometry(raw.reshape(1, -1), "hdr_log", options=options)
    change = augment.RandomExposure(2.0, radiometry).change
    image = torch.from_numpy(radiometry.stretch(raw))
    for factor, expected in ((0.5, [0.5, 49.5, 50]), (4, [4.0, 100, 100])):
        seen = radiometry.unstretch(change(image, factor).numpy())
        np.testing.assert_allclose(seen, [[expected]], rtol=1e-4)
