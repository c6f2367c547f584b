"""Geometry: boxes, centres and pixels turn together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import imutils

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


def test_radiometry_keeps_bytes_comparable_and_fits_other_types():
    rng = np.random.default_rng(0)
    bytes_ = rng.integers(50, 100, 1000).astype(np.uint8)
    shorts = rng.integers(100, 60000, 1000).astype(np.uint16)
    fitted = imutils.measure_radiometry([bytes_, shorts.astype(np.uint16)], (0.5, 99.5))
    assert (fitted.low[0], fitted.high[0]) == (0.0, 255.0)
    assert 100 <= fitted.low[1] < 1500
    assert 58000 < fitted.high[1] <= 60000
    image = np.stack([bytes_[:100].reshape(10, 10).astype(np.uint16), shorts[:100].reshape(10, 10)])
    stretched = fitted.stretch(image)
    assert stretched.dtype == np.float32
    np.testing.assert_allclose(stretched[0], image[0] / 255, rtol=1e-5)


def test_invalid_pixels_become_the_mean():
    fitted = imutils.Radiometry((0.0,), (10.0,), (0.4,), (0.1,))
    image = np.array([[[1.0, np.nan], [5.0, 10.0]]])
    stretched = fitted.stretch(image, ~np.isnan(image[0]))
    np.testing.assert_allclose(stretched, [[[0.1, 0.4], [0.5, 1.0]]], rtol=1e-6)


def test_a_constant_band_does_not_divide_by_zero():
    fitted = imutils.measure_radiometry([np.full(10, 7.0)], (0.5, 99.5))
    assert np.isfinite(fitted.stretch(np.full((1, 2, 2), 7.0))).all()
    assert fitted.std[0] > 0
