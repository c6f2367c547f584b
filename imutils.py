"""Pure geometry and pixel maths on arrays: turning boxes and centres, box areas, stretching.

One convention for everything that turns: `np.rot90`, counter-clockwise, in an image whose y axis
points down. Boxes are `xyxy` pixels, half-open; points share the continuous coordinates of boxes
(origin at the top-left corner of the top-left pixel). `width` and `height` are always those of the
image *before* it turns. The colours of labels, on pictures and on the map, stand here too.
"""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ImageData import InputError
from ModelConfig import HdrLogOptions

TURNS = (0, 90, 180, 270)  # degrees, counter-clockwise
COLORS = (  # of Okabe and Ito, which colour-blind people tell apart
    "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#F0E442",
)  # fmt: skip
OTHER = "#808080"  # of labels beyond the colours
TRUTH_COLOR, DETECTION_COLOR = COLORS[1], COLORS[4]  # of boxes whose label needs no colour
BACKGROUND_NAME, BACKGROUND_COLOR = "background", "#C8C8C8"  # of maps
GOLDEN = 0.618034  # of the circle of hues, between two colours
STRETCHES = ("none", "minmax", "percentile", "log", "hdr_log")
LOG_STEEPNESS = 1000.0
PIECE = 2**16  # values that `log_transform` takes through all its steps while they are in the cache


def rotate_bbox_90(
    xmin: np.ndarray, ymin: np.ndarray, xmax: np.ndarray, ymax: np.ndarray, width: int, height: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Turn boxes by 90 degrees counter-clockwise with their (height, width) image."""
    return ymin, width - xmax, ymax, width - xmin


def rotate_bbox_180(
    xmin: np.ndarray, ymin: np.ndarray, xmax: np.ndarray, ymax: np.ndarray, width: int, height: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Turn boxes by 180 degrees with their (height, width) image."""
    return width - xmax, height - ymax, width - xmin, height - ymin


def rotate_bbox_270(
    xmin: np.ndarray, ymin: np.ndarray, xmax: np.ndarray, ymax: np.ndarray, width: int, height: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Turn boxes by 270 degrees counter-clockwise with their (height, width) image."""
    return height - ymax, xmin, height - ymin, xmax


def rotate_boxes(boxes_xyxy: np.ndarray, angle: int, width: int, height: int) -> np.ndarray:
    """Turn boxes (N, 4) by `angle`, one of `TURNS`, with their (height, width) image.

    Raises:
        ValueError: `angle` is no quarter turn.
    """
    turn = {
        0: lambda *box: box[:4],
        90: rotate_bbox_90,
        180: rotate_bbox_180,
        270: rotate_bbox_270,
    }.get(angle)
    if turn is None:
        raise ValueError(f"angle must be one of {TURNS} degrees, got {angle}")
    return np.stack(turn(*np.asarray(boxes_xyxy).T, width, height), axis=1)


def turn_matrix(angle: int, *, mirrored: bool = False) -> np.ndarray:
    """Return the linear part (2, 2) of a turn by `angle`, one of `TURNS`, of points (x, y).

    Args:
        angle: Degrees.
        mirrored: Whether x is mirrored before.
    """
    x, y = rotate_center(np.array([0.0, 1, 0]), np.array([0.0, 0, 1]), angle, 0, 0)
    turned = np.stack([x[1:] - x[0], y[1:] - y[0]])
    return turned * [-1.0, 1.0] if mirrored else turned


def rotate_center(
    x: np.ndarray, y: np.ndarray, angle: int, width: int, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """Turn points by `angle`, one of `TURNS`, with their (height, width) image."""
    x, y = np.asarray(x), np.asarray(y)
    turned = rotate_boxes(
        np.stack([x, y, x, y], axis=-1).reshape(-1, 4), angle, width, height
    ).reshape(*x.shape, 4)
    return turned[..., 0], turned[..., 1]


def box_area(boxes_xyxy: np.ndarray) -> np.ndarray:
    """Area of boxes (..., 4) in px^2; an inverted box has none."""
    return (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clip(0).prod(axis=-1)


def shared_area(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Area in px^2 that boxes (..., 4) share with others, row by row."""
    low, high = np.maximum(one[..., :2], other[..., :2]), np.minimum(one[..., 2:], other[..., 2:])
    return (high - low).clip(0).prod(axis=-1)


def pair_iou(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """IoU of boxes (..., 4) with others, row by row."""
    shared = shared_area(one, other)
    return shared / np.maximum(box_area(one) + box_area(other) - shared, 1e-12)


def clip_boxes(boxes_xyxy: np.ndarray, limits_xyxy: np.ndarray) -> np.ndarray:
    """Clamp boxes (N, 4) to limits (4,) or (N, 4); a box outside them collapses to zero area."""
    limits = np.asarray(limits_xyxy)
    low, high = limits[..., [0, 1, 0, 1]], limits[..., [2, 3, 2, 3]]
    return np.clip(boxes_xyxy, low, high)


def log_transform(
    x: np.ndarray, options: HdrLogOptions, out: np.ndarray | None = None
) -> np.ndarray:
    """Take linear values of any range to logarithmic ones that suit a network.

    Of `v = min(max(x, 0), clip) * input_mul + log_epsilon` the logarithm is taken; where the values
    are split around 1, of those from there on `v ** (1 / log_pow) - 1` instead. What comes is
    shifted by `output_bias`, then scaled by `output_scale`. It rises strictly between 0 and `clip`.

    Args:
        x: Values of any shape; what is not finite stays so, but for +inf under a clip.
        options: The constants.
        out: Where to put the result, contiguous, of its type; `x` itself changes it in place.

    Returns:
        float32, of float64 and wide integers float64, of the shape of `x`.
    """
    kind = np.result_type(x.dtype, np.float32)
    out = np.empty(x.shape, kind) if out is None else out
    if not x.flags.c_contiguous:
        np.copyto(out, x)
        x = out
    values, result = x.reshape(-1), out.reshape(-1)
    split, most = options.log_split_around1, np.inf if options.clip is None else options.clip
    powers = np.empty(min(PIECE, values.size), out.dtype) if split else None
    for first in range(0, values.size, PIECE):
        part = result[first : first + PIECE]
        np.clip(values[first : first + PIECE], 0, most, out=part, casting="unsafe")
        if options.input_mul != 1:
            part *= options.input_mul
        part += options.log_epsilon
        np.log(part, out=part)
        if split:
            power = np.divide(part, options.log_pow, out=powers[: part.size])
            np.exp(power, out=power)  # many times faster than expm1 and power of float32
            power -= 1
            np.minimum(part, 0, out=part)  # one of the two is 0: faster than to choose
            part += np.maximum(power, 0, out=power)
        part += options.output_bias
        part *= options.output_scale
    return out


def invert_log_transform(y: np.ndarray, options: HdrLogOptions) -> np.ndarray:
    """Return the linear values of which `log_transform` makes `y`, float32 or float64 as `y`."""
    logs = y / options.output_scale - options.output_bias
    if options.log_split_around1:
        logs = np.minimum(logs, 0) + options.log_pow * np.log(1 + np.maximum(logs, 0))
    x = np.exp(logs, out=logs)
    x -= options.log_epsilon
    x /= options.input_mul
    return x


@dataclass(frozen=True)
class Radiometry:
    """How raw pixel values become the model's input, per band; recorded in every checkpoint.

    `low` becomes 0 and `high` becomes 1, in float and never clipped at the top. The stretch `log`
    raises faint values between the two, and takes those below `low` for it; `hdr_log` is
    `log_transform`, the same for all bands; the others are linear.

    Attributes:
        method: One of `STRETCHES`, by which `low` and `high` were found.
        low: Raw value that becomes 0, per band.
        high: Raw value that becomes 1, per band.
        mean: Mean of the stretched valid pixels of the training ground, per band.
        std: Their standard deviation, per band.
        covariance: Of their bands, row by row; empty where it was not measured.
        options: The constants of `hdr_log`; None of the others.

    References:
        Joye and Mandel 2003, SAOImage DS9, for the logarithm and its steepness of 1000.
    """

    method: str
    low: tuple[float, ...]
    high: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    covariance: tuple[float, ...] = ()
    options: HdrLogOptions | None = None

    def stretch(self, image: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
        """Stretch an image (bands, H, W) to float32; invalid pixels become the mean."""
        stretched = self._stretch_all(image).astype(np.float32, copy=False)
        if valid is not None and not valid.all():
            mean = np.asarray(self.mean, dtype=np.float32)[:, None, None]
            np.copyto(stretched, mean, where=~valid)
        return stretched

    def _stretch_all(self, image: np.ndarray) -> np.ndarray:
        """Stretch all pixels, valid or not, into an array of their own."""
        if self.method == "hdr_log":
            return log_transform(image, self.options)
        # float32 holds 16-bit integers exactly, wider types need more until the offset is gone
        work = np.result_type(image.dtype, np.float32)
        low, high = (np.asarray(v, dtype=work)[:, None, None] for v in (self.low, self.high))
        with np.errstate(over="ignore", invalid="ignore"):  # where pixels are invalid
            stretched = ((image.astype(work) - low) / (high - low)).astype(np.float32, copy=False)
            if self.method == "log":
                stretched = np.log1p(LOG_STEEPNESS * stretched.clip(0)) / np.log1p(LOG_STEEPNESS)
        return stretched

    def unstretch(self, stretched: np.ndarray) -> np.ndarray:
        """Return the raw values (bands, H, W), in float, that were stretched; cuts are lost."""
        if self.method == "hdr_log":
            return invert_log_transform(stretched, self.options)
        if self.method == "log":
            stretched = np.expm1(stretched * np.log1p(LOG_STEEPNESS)) / LOG_STEEPNESS
        low, high = (np.asarray(v, stretched.dtype)[:, None, None] for v in (self.low, self.high))
        return stretched * (high - low) + low


def measure_radiometry(
    pixels: np.ndarray,
    method: str = "auto",
    percentiles: tuple[float, float] = (0.5, 99.5),
    options: HdrLogOptions | None = None,
) -> Radiometry:
    """Fit a `Radiometry` to valid pixels.

    Args:
        pixels: Finite raw values (bands, N), N > 0, in the raster's own type.
        method: "none" takes the range of an integer type from 0 on, so that dark and bright rasters
            stay comparable, and floats as they are; "minmax" the least and largest value;
            "percentile" and "log" the percentiles; "auto" is "none" for 8 bits, else "percentile";
            "hdr_log" measures nothing but a `clip_percentile`.
        percentiles: Lower and upper percentile (0-100) that become 0 and 1.
        options: The constants of "hdr_log", None: as they are by default. A `clip_percentile`
            becomes the `clip` of the band where it is highest.

    Raises:
        InputError: The constants make 0 or 1 of what no float can hold.
    """
    if method == "auto":
        method = "none" if pixels.dtype == np.uint8 else "percentile"
    if method == "hdr_log":
        options = _fixed_clip(options or HdrLogOptions(), pixels)
        with np.errstate(over="ignore"):
            ends = invert_log_transform(np.array([0.0, 1.0]), options)
        if not np.isfinite(ends.astype(np.float32)).all():
            raise InputError(
                "STRETCH_OPTIONS must make 0 and 1 of raw values that float32 can hold, got "
                f"output_scale {options.output_scale:g} and output_bias {options.output_bias:g}; "
                "raise the one, or change the other"
            )
        low, high = (np.full(len(pixels), end) for end in ends)
    elif method == "none":
        top = np.iinfo(pixels.dtype).max if pixels.dtype.kind in "ui" else 1
        low, high = np.zeros(len(pixels)), np.full(len(pixels), float(top))
    else:
        bounds = (0, 100) if method == "minmax" else percentiles
        low, high = np.percentile(pixels.astype(np.float64), bounds, axis=1)
        # a constant band carries nothing, but must not divide by zero
        high = np.where(high > low, high, low + np.maximum(1.0, np.abs(low) * 1e-6))
    bounds = tuple(low.tolist()), tuple(high.tolist())
    zeros, ones = (tuple(np.full(len(pixels), v).tolist()) for v in (0.0, 1.0))
    options = options if method == "hdr_log" else None
    scaled = Radiometry(method, *bounds, zeros, ones, options=options).stretch(pixels[:, None])
    scaled = scaled.astype(np.float64)
    mean, std = scaled.mean(axis=(1, 2)), scaled.std(axis=(1, 2)).clip(1e-3)
    covariance = np.cov(scaled[:, 0], bias=True).ravel()
    measured = (tuple(values.tolist()) for values in (mean, std, covariance))
    return Radiometry(method, *bounds, *measured, options=options)


def _fixed_clip(options: HdrLogOptions, pixels: np.ndarray) -> HdrLogOptions:
    """Return constants whose clip is a raw value, given valid pixels (bands, N)."""
    if options.clip_percentile is None:
        return options
    # the same for all bands, or the sun would take another colour
    clip = float(np.percentile(pixels, options.clip_percentile, axis=1).max())
    if clip <= 0:
        raise InputError(
            f"STRETCH_OPTIONS clip_percentile {options.clip_percentile:g} of the training ground "
            f"is {clip:g}, it must be above 0; raise it, or set clip"
        )
    return replace(options, clip=clip, clip_percentile=None)


def preview_bounds(
    image: np.ndarray, valid: np.ndarray, percentiles: tuple[float, float] = (1.0, 99.0)
) -> np.ndarray:
    """Return the raw values (1 or 3, 2) that `preview_stretch` shows as black and as full colour.

    They are percentiles of the valid pixels (H, W) of each shown band of an image (bands, H, W).
    """
    bands = _shown_bands(image)
    if not valid.any():
        return np.tile([0.0, 1.0], (len(bands), 1))
    return np.percentile(bands[:, valid].astype(np.float64), percentiles, axis=1).T


def preview_stretch(
    image: np.ndarray,
    valid: np.ndarray,
    bounds: np.ndarray | None = None,
    *,
    light: bool = False,
) -> np.ndarray:
    """Stretch an image (bands, H, W) of any type to uint8 (H, W) or (H, W, 3) for looking at it.

    Invalid pixels (H, W) become black. The bounds are those of the image itself unless they are
    given, see `preview_bounds`. Light is shown in its logarithm, by the formula of the stretch
    `log`, the steeper the more decades the bounds span.
    """
    bands = _shown_bands(image)
    bounds = preview_bounds(image, valid) if bounds is None else bounds
    least, most = max(bounds.min(), 1e-12), bounds.max()
    steepness = min(max(most / least, 1.0), LOG_STEEPNESS)
    planes = []
    for band, (lo, hi) in zip(bands.astype(np.float64), bounds, strict=True):
        scaled = np.where(valid, (band - lo) / max(hi - lo, 1e-12), 0.0)
        if light:
            scaled = np.log1p(steepness * scaled.clip(0)) / np.log1p(steepness)
        planes.append((scaled.clip(0, 1) * 255).astype(np.uint8))
    return np.stack(planes, axis=-1) if len(planes) == 3 else planes[0]


def _shown_bands(image: np.ndarray) -> np.ndarray:
    return image[:3] if image.shape[0] >= 3 else image[:1]


def label_colors(labels: Iterable[str], known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Give labels their colours, by name; where there are too many, the rarest share `OTHER`.

    Args:
        labels: The labels, each as often as it occurs.
        known: Label -> colour of those that keep theirs.

    Returns:
        Label -> colour (#RRGGBB), the known ones first.
    """
    colors = dict(known or {})
    free = [color for color in COLORS if color not in colors.values()]
    counts = Counter(label for label in labels if label not in colors)
    if len(counts) > len(free):
        free = free[:-1]
    common = sorted(label for label, _ in counts.most_common(len(free)))
    colors |= dict(zip(common, free, strict=False))
    return colors | {label: OTHER for label in sorted(counts) if label not in colors}


def class_colors(names: Sequence[str]) -> tuple[str, ...]:
    """Give the classes of a map their colours (#RRGGBB), by class id.

    The background is gray, the others take `COLORS`, then dark and light shades of them, and beyond
    those hues around the circle: no eye tells so many apart, but neighbours in the list differ.
    """
    shades = [*COLORS]
    for share, end in ((0.45, 0), (0.5, 255)):  # how far to black, and to white
        shades += [_mix(color, end, share) for color in COLORS]
    colors = []
    for name in names:
        number = sum(other != BACKGROUND_NAME for other in names[: len(colors)])
        if name == BACKGROUND_NAME:
            colors.append(BACKGROUND_COLOR)
        elif number < len(shades):
            colors.append(shades[number])
        else:
            rgb = colorsys.hsv_to_rgb(number * GOLDEN % 1, 0.6, 0.85)
            colors.append("#" + "".join(f"{round(255 * v):02X}" for v in rgb))
    return tuple(colors)


def _mix(color: str, end: int, share: float) -> str:
    return "#" + "".join(
        f"{round(v + share * (end - v)):02X}" for v in bytes.fromhex(color.removeprefix("#"))
    )


def shorten(text: object, most: int) -> str:
    """Write a text into a picture: at most so many letters, and dollars that are no formula."""
    text = str(text)
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return text.replace("$", r"\$")
