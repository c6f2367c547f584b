"""Geometry: boxes, centres and pixels turn together."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import imutils
from ImageData import InputError
from ModelConfig import HdrLogOptions

sides = st.integers(1, 40)
shares = st.floats(0, 1, allow_nan=False)


@st.composite
def boxes_on_canvas(draw):
    width, height = draw(sides), draw(sides)
    x = sorted(draw(st.tuples(shares, shares)))
    y = sorted(draw(st.tuples(shares, shares)))
    return np.array([[x[0] * width, y[0] * height, x[1] * width, y[1] * height]]), width, height


def turned_sides(angle, width, height):
    return (height, width) if angle in (90, 270) else (width, height)


@given(boxes_on_canvas())
def test_four_quarter_turns_restore_boxes(case):
    boxes, width, height = case
    turned = boxes
    for _ in range(4):
        turned = imutils.rotate_boxes(turned, 90, width, height)
        width, height = height, width
    np.testing.assert_allclose(turned, boxes, atol=1e-9)


@given(boxes_on_canvas(), st.sampled_from([90, 180, 270]))
def test_turned_boxes_stay_on_the_turned_canvas_and_keep_their_area(case, angle):
    boxes, width, height = case
    turned = imutils.rotate_boxes(boxes, angle, width, height)
    new_width, new_height = turned_sides(angle, width, height)
    assert (turned >= -1e-9).all()
    assert (turned[:, [0, 2]] <= new_width + 1e-9).all()
    assert (turned[:, [1, 3]] <= new_height + 1e-9).all()
    assert (turned[:, 2:] >= turned[:, :2]).all()
    np.testing.assert_allclose(imutils.box_area(turned), imutils.box_area(boxes), atol=1e-6)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("angle", imutils.TURNS)
def test_the_matrix_of_a_turn_takes_steps_as_points_go(angle, mirrored):
    start, step, width, height = np.array([5.0, 7.0]), np.array([2.0, -3.0]), 20, 30
    points = np.stack([start, start + step])
    if mirrored:
        points[:, 0] = width - points[:, 0]
    x, y = imutils.rotate_center(*points.T, angle, width, height)
    gone = np.array([x[1] - x[0], y[1] - y[0]])
    np.testing.assert_allclose(imutils.turn_matrix(angle, mirrored=mirrored) @ step, gone)


@given(boxes_on_canvas(), st.sampled_from([0, 90, 180, 270]))
def test_the_centre_of_a_turned_box_is_the_turned_centre(case, angle):
    boxes, width, height = case
    x, y = imutils.rotate_center(
        boxes[:, ::2].mean(1), boxes[:, 1::2].mean(1), angle, width, height
    )
    turned = imutils.rotate_boxes(boxes, angle, width, height)
    np.testing.assert_allclose(x, turned[:, ::2].mean(1), atol=1e-9)
    np.testing.assert_allclose(y, turned[:, 1::2].mean(1), atol=1e-9)


@given(sides, sides, st.data(), st.sampled_from([0, 90, 180, 270]))
def test_boxes_turn_with_the_pixels_they_mark(width, height, data, angle):
    x0, x1 = sorted(data.draw(st.lists(st.integers(0, width), min_size=2, max_size=2, unique=True)))
    y0, y1 = sorted(
        data.draw(st.lists(st.integers(0, height), min_size=2, max_size=2, unique=True))
    )
    image = np.zeros((height, width), np.uint8)
    image[y0:y1, x0:x1] = 1
    turned_image = np.rot90(image, angle // 90)
    (box,) = imutils.rotate_boxes(np.array([[x0, y0, x1, y1]]), angle, width, height)
    a, b, c, d = box.astype(int)
    assert turned_image[b:d, a:c].all()
    assert turned_image.sum() == (c - a) * (d - b)


def test_other_angles_are_refused():
    with pytest.raises(ValueError, match="angle must be one of"):
        imutils.rotate_boxes(np.zeros((1, 4)), 45, 10, 10)


def test_no_boxes_turn_into_no_boxes():
    assert imutils.rotate_boxes(np.zeros((0, 4)), 90, 5, 7).shape == (0, 4)


def test_the_default_keeps_bytes_comparable_and_fits_other_types():
    rng = np.random.default_rng(0)
    bytes_ = rng.integers(50, 100, (1, 1000)).astype(np.uint8)
    shorts = rng.integers(100, 60000, (1, 1000)).astype(np.uint16)
    fitted = imutils.measure_radiometry(bytes_)
    assert (fitted.method, fitted.low, fitted.high) == ("none", (0.0,), (255.0,))
    fitted = imutils.measure_radiometry(shorts, percentiles=(0.5, 99.5))
    assert fitted.method == "percentile"
    assert 100 <= fitted.low[0] < 1500
    assert 58000 < fitted.high[0] <= 60000


@pytest.mark.parametrize(
    ("method", "low", "high"),
    [("none", 0, 65535), ("minmax", 64, 1600), ("percentile", 64, 1600), ("log", 64, 1600)],
)
def test_every_stretch_maps_its_bounds_to_zero_and_one_and_never_wraps(method, low, high):
    pixels = np.array([[64, 100, 1600], [64, 1600, 200]], np.uint16)
    fitted = imutils.measure_radiometry(pixels, method, (0, 100))
    assert fitted.low == (low, low)
    assert fitted.high == (high, high)
    raw = np.array([low, high, 65535], np.uint16)
    stretched = fitted.stretch(np.stack([raw, raw])[:, None])
    assert stretched.dtype == np.float32
    np.testing.assert_allclose(stretched[:, 0, :2], [[0, 1], [0, 1]], atol=1e-6)
    assert (stretched[:, 0, 2] >= 1).all()  # brighter than anything seen stays brighter
    values = fitted.stretch(pixels[:, None])
    np.testing.assert_allclose(values.mean(axis=(1, 2)), fitted.mean, rtol=1e-5)
    covariance = np.reshape(fitted.covariance, (2, 2))
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), fitted.std, atol=1e-3)
    expected = ((values - values.mean(axis=(1, 2), keepdims=True)).prod(axis=0)).mean()
    np.testing.assert_allclose(covariance[[0, 1], [1, 0]], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("method", imutils.STRETCHES)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float32", "float64"])
def test_order_survives_every_stretch_of_every_type(method, dtype):
    steps = np.arange(1000).astype(dtype) if dtype != "uint8" else np.arange(250).astype(dtype)
    steps = steps + (np.dtype(dtype).type(2**30) if dtype == "int32" else 0)
    fitted = imutils.measure_radiometry(steps[None], method)
    stretched = fitted.stretch(steps[None, None])[0, 0]
    inside = stretched > 0  # the logarithm takes what is below its low for it
    assert inside.sum() > 0.9 * len(steps)
    # of int32 without a stretch, 1 in 2**31 is less than float32 tells apart
    assert (np.diff(stretched[inside]) >= 0).all()
    if method not in ("none", "hdr_log") or dtype != "int32":
        assert (np.diff(stretched[inside]) > 0).all()


def test_negative_floats_stretch():
    pixels = np.array([[-120.0, -3.0, 0.0, 8.0, 4000.0]], np.float32)
    for method in imutils.STRETCHES:
        assert np.isfinite(
            imutils.measure_radiometry(pixels, method).stretch(pixels[:, None])
        ).all()


CONSTANTS = st.builds(
    HdrLogOptions,
    input_mul=st.floats(2**-12, 2**12),
    log_epsilon=st.floats(1e-6, 1),
    log_split_around1=st.booleans(),
    log_pow=st.floats(1, 20),
    output_bias=st.floats(-10, 10),
    output_scale=st.floats(0.01, 10),
    clip=st.none() | st.floats(0.5, 1e6),
)


def written_out(x, options):
    """Take one value through the document's formula, in Python's own floats."""
    most = math.inf if options.clip is None else options.clip
    value = min(max(x, 0), most) * options.input_mul + options.log_epsilon
    y = math.log(value)
    if options.log_split_around1 and value >= 1:
        y = value ** (1 / options.log_pow) - 1
    return (y + options.output_bias) * options.output_scale


@given(CONSTANTS, st.lists(st.floats(-10, 1e6), min_size=1, max_size=20))
def test_the_log_transform_is_the_formula_and_its_inverse_is_exact(options, values):
    x = np.array(values)
    y = imutils.log_transform(x, options)
    expected = np.array([written_out(value, options) for value in values])
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-9)
    kept = x.clip(0, options.clip)
    back = imutils.invert_log_transform(y, options)
    # an epsilon that is large beside the values costs them digits, as does any addition
    lost = options.log_epsilon / options.input_mul
    np.testing.assert_allclose(back, kept, rtol=1e-9, atol=1e-9 * (1 + lost))
    again = imutils.log_transform(back, options)
    np.testing.assert_allclose(again, y, rtol=1e-6, atol=1e-6)


def test_hdr_pixels_are_stretched_in_float32_and_come_back():
    x = np.exp(np.linspace(np.log(1e-3), np.log(65504), 90_000, dtype=np.float32))
    image = x.reshape(3, 300, 100)
    before = image.copy()
    for split in (False, True):
        options = HdrLogOptions(log_split_around1=split)
        fitted = imutils.measure_radiometry(image.reshape(3, -1), "hdr_log", options=options)
        stretched = fitted.stretch(image)
        assert stretched.dtype == fitted.unstretch(stretched).dtype == np.float32
        np.testing.assert_allclose(fitted.unstretch(stretched), image, rtol=1e-4)
        turned = fitted.stretch(image[:, ::-1, ::-1])
        np.testing.assert_array_equal(turned, stretched[:, ::-1, ::-1])
        np.testing.assert_array_equal(image, before)
        ends = np.array([fitted.low, fitted.high]).T[:, None]
        np.testing.assert_allclose(fitted.stretch(ends), np.tile([0, 1], (3, 1, 1)), atol=1e-6)


def test_the_sun_is_clipped_alike_in_all_bands():
    pixels = np.ones((2, 1000), np.float32)
    pixels[0, :10], pixels[1, :10] = 40_000, 60_000
    options = HdrLogOptions(clip_percentile=98.9)
    fitted = imutils.measure_radiometry(pixels, "hdr_log", options=options)
    assert (fitted.options.clip, fitted.options.clip_percentile) == (1, None)
    options = HdrLogOptions(clip_percentile=100)
    fitted = imutils.measure_radiometry(pixels, "hdr_log", options=options)
    assert fitted.options.clip == 60_000
    given = imutils.measure_radiometry(pixels, "hdr_log", options=HdrLogOptions(clip=2.0))
    seen = given.stretch(np.array([[[1.0, 2.0, 50.0, np.inf]]] * 2, np.float32))
    assert seen[0, 0, 0] < seen[0, 0, 1] == seen[0, 0, 2] == seen[0, 0, 3]
    with pytest.raises(InputError, match="clip_percentile 50 of the training ground is 0"):
        imutils.measure_radiometry(0 * pixels, "hdr_log", options=HdrLogOptions(clip_percentile=50))


def test_constants_that_no_float_holds_are_refused():
    options = HdrLogOptions(output_scale=0.001)
    with pytest.raises(InputError, match=r"got output_scale 0\.001 and output_bias 2\.5"):
        imutils.measure_radiometry(np.ones((1, 3)), "hdr_log", options=options)


@pytest.mark.parametrize("method", imutils.STRETCHES)
def test_raw_values_come_back(method):
    rng = np.random.default_rng(0)
    pixels = rng.uniform(10, 500, (2, 1000)).astype(np.float32)
    fitted = imutils.measure_radiometry(pixels, method, (0, 100))
    back = fitted.unstretch(fitted.stretch(pixels[:, None]))
    np.testing.assert_allclose(back[:, 0], pixels, rtol=1e-3)


def test_invalid_pixels_become_the_mean():
    fitted = imutils.Radiometry("minmax", (0.0,), (10.0,), (0.4,), (0.1,))
    image = np.array([[[1.0, np.nan], [-3.4e38, 10.0]]], np.float32)
    stretched = fitted.stretch(image, np.array([[True, False], [False, True]]))
    np.testing.assert_allclose(stretched, [[[0.1, 0.4], [0.4, 1.0]]], rtol=1e-6)


def test_light_is_looked_at_in_its_logarithm():
    valid = np.ones((20, 50), bool)
    light = np.geomspace(0.01, 100, 1000, dtype=np.float32).reshape(1, 20, 50)
    seen = imutils.preview_stretch(light, valid, light=True)
    assert 80 < np.median(seen) < 160, "the middle of the decades is gray"
    assert (np.diff(seen.ravel().astype(int)) >= 0).all()
    assert (seen.min(), seen.max()) == (0, 255)
    assert np.median(imutils.preview_stretch(light, valid)) < 10
    same = np.full((3, 20, 50), 0.0, np.float32)
    assert (imutils.preview_stretch(same, valid, light=True) == 0).all()


def test_a_constant_band_does_not_divide_by_zero():
    for value in (7.0, 0.0, 1e12):
        fitted = imutils.measure_radiometry(np.full((1, 10), value))
        assert np.isfinite(fitted.stretch(np.full((1, 2, 2), value))).all()
        assert fitted.std[0] > 0


def test_labels_keep_their_colours_and_the_rarest_share_a_gray():
    assert imutils.label_colors("ba") == imutils.label_colors("aab") == {
        "a": imutils.COLORS[0], "b": imutils.COLORS[1],
    }  # fmt: skip
    more = imutils.label_colors("abc", {"b": imutils.COLORS[0]})
    assert list(more.items()) == [*zip("bac", imutils.COLORS[:3], strict=True)]
    many = imutils.label_colors("zz" + "abcdefgh")
    assert many["z"] in imutils.COLORS
    assert [many[name] for name in "gh"] == [imutils.OTHER] * 2
    assert len(set(many.values())) == len(imutils.COLORS)
