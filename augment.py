"""What training tiles go through: transforms of images of any bands, and of what lies on them.

They are transforms of `torchvision.transforms.v2`, of tensors: images are float32 (bands, H, W),
stretched, and may reach beyond 0 to 1. All that is random is drawn from torch's generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchvision import tv_tensors
from torchvision.transforms import v2

import imutils
from ImageData import IGNORE, InputError
from ModelConfig import AugmentConfig

# the strong set at strength 1; those that `AugmentConfig` has are at least so large
STRONG = {
    "rotate_limit": 45.0, "shear": 0.15, "shift": 0.1, "contrast": 0.5, "brightness": 1.0,
    "gamma": 1.6, "noise": 0.3, "noise_share": 0.5, "blur": 1.2, "blur_share": 0.3,
}  # fmt: skip
SCALE = 1.25  # largest magnification
ELASTIC = 0.2  # px per px between knots: up to 0.25, what the distortion moves stays in order
KNOTS = 6  # spans of the elastic distortion along a side
CELLS = 5  # of the distorted grid along a side
GRID = 0.4  # largest relative change of a cell's side, before all are fitted into the tile
HOLES, HOLE = 8, 0.2  # most holes of a tile, and the largest side of one, of the tile's
BANDS = 0.3  # of the bands, each on its own: relative change of contrast, and shift in std
SHARE = 0.5  # of the tiles, that each part of the strong set changes
OUTLINE = 32  # points of an object's outline, a multiple of 4: its extremes are among them
LATTICE = 128  # spans along a side, of places whose elastic distortion is known
STEPS = 8  # towards the place that an elastic distortion moves a point to


class RandomQuarterTurn(v2.Transform):
    """Turn images, masks, boxes and points of square tiles by 0, 90, 180 or 270 degrees."""

    def make_params(self, flat_inputs: list) -> dict[str, int]:
        """Draw the angle, the same for all inputs."""
        return {"turns": int(torch.randint(4, ()))}

    def transform(self, inpt: object, params: dict[str, int]) -> object:
        """Turn what lies on the tile; labels pass."""
        turns = params["turns"]
        if isinstance(inpt, tv_tensors.BoundingBoxes):
            height, width = inpt.canvas_size
            turned = imutils.rotate_boxes(inpt.numpy(), 90 * turns, width, height)
            return tv_tensors.wrap(torch.from_numpy(turned), like=inpt)
        if isinstance(inpt, tv_tensors.KeyPoints):
            height, width = inpt.canvas_size
            turned = imutils.rotate_center(*inpt.numpy().T, 90 * turns, width, height)
            return tv_tensors.wrap(torch.from_numpy(np.stack(turned, axis=1)), like=inpt)
        if isinstance(inpt, tv_tensors.Image | tv_tensors.Mask):
            return tv_tensors.wrap(torch.rot90(inpt, turns, (-2, -1)), like=inpt)
        return inpt


@dataclass(frozen=True)
class Warp:
    """Where each place of a tile moves; all places are (x, y) px of the tile, continuous.

    A place is turned, scaled, sheared and shifted, then distorted smoothly, then with the cells of
    a grid. Pixels need the way back, which is exact; the way there is, too, but for the smooth
    distortion, whose inverse is approached step by step.

    Attributes:
        size_hw: Of the tile, px.
        matrix: (2, 2), of the affine part, about the centre.
        shift: (2,), px.
        knots: (2, KNOTS + 3, KNOTS + 3), px, how far the smooth distortion moves x and y at its
            knots, rows along y; None: it does not.
        edges: Per axis, x first, where the edges of the grid's cells are read from, px
            (CELLS + 1,); None: the grid is regular.

    References:
        Simard et al. 2003, Best practices for convolutional neural networks, for elastic
        distortions; ours are cubic B-splines, as Rueckert et al. 1999, Nonrigid registration using
        free-form deformations, so that neighbouring places keep their order.
    """

    size_hw: tuple[int, int]
    matrix: np.ndarray
    shift: np.ndarray
    knots: np.ndarray | None = None
    edges: tuple[np.ndarray, np.ndarray] | None = None

    def sources(self) -> np.ndarray:
        """Return where the centre of each pixel comes from, float32 (H, W, 2)."""
        height, width = self.size_hw
        x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
        if self.edges:
            x, y = (self._regrid(v, axis, back=True) for axis, v in enumerate((x, y)))
        moved = np.zeros((2, 1, 1), dtype=np.float32)
        if self.knots is not None:
            moved = self._elastic(x, y)
        center = np.array([width, height]) / 2
        from_x = x.astype(np.float32) + moved[0] - np.float32(center[0] + self.shift[0])
        from_y = y.astype(np.float32)[:, None] + moved[1] - np.float32(center[1] + self.shift[1])
        back = np.linalg.inv(self.matrix).astype(np.float32)
        sources = np.empty((height, width, 2), dtype=np.float32)
        for i in (0, 1):
            sources[..., i] = back[i, 0] * from_x + back[i, 1] * from_y + np.float32(center[i])
        return sources

    def move(self, points: np.ndarray) -> np.ndarray:
        """Return where points (..., 2) move to, float64."""
        center = np.array(self.size_hw[::-1]) / 2
        moved = np.einsum("...j,ij->...i", points.astype(np.float64) - center, self.matrix)
        moved = moved + (center + self.shift)
        if self.knots is not None:
            moved = self._undo_elastic(moved.reshape(-1, 2)).reshape(points.shape)
        if self.edges:
            moved = np.stack([self._regrid(moved[..., i], i) for i in (0, 1)], axis=-1)
        return moved

    def _elastic(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return how far the smooth distortion moves x and y on a grid, float32 (2, H, W)."""
        # not by matrix products, which would start threads in every process that reads tiles
        rows = np.einsum("hl,clm->chm", self._weights(y, 1), self.knots).astype(np.float32)
        return np.einsum("chm,wm->chw", rows, self._weights(x, 0).astype(np.float32))

    def _undo_elastic(self, wanted: np.ndarray) -> np.ndarray:
        """Approach the places (N, 2) that are moved to those wanted, by what lies between."""
        size = np.array(self.size_hw[::-1])
        x, y = (np.linspace(0, side, LATTICE + 1) for side in size)
        lattice, places = torch.from_numpy(self._elastic(x, y))[None], wanted
        for _ in range(STEPS):
            there = torch.from_numpy((places / size * 2 - 1).astype(np.float32))[None, None]
            moved = functional.grid_sample(
                lattice, there, mode="bilinear", padding_mode="border", align_corners=True
            )
            places = wanted - moved[0, :, 0].numpy().T
        return places

    def _weights(self, places: np.ndarray, axis: int) -> np.ndarray:
        """Return what each knot of an axis weighs at places (N,): cubic B-splines."""
        spacing = self.size_hw[1 - axis] / KNOTS
        away = np.abs(places[:, None] / spacing - np.arange(-1, KNOTS + 2))
        square, far = away * away, (2 - away).clip(0)
        return np.where(away < 1, 2 / 3 - square + square * away / 2, far * far * far / 6)

    def _regrid(self, values: np.ndarray, axis: int, *, back: bool = False) -> np.ndarray:
        regular = np.linspace(0, self.size_hw[1 - axis], CELLS + 1)
        ends = (regular, self.edges[axis]) if back else (self.edges[axis], regular)
        beyond = values - values.clip(0, regular[-1])
        return np.interp(values, *ends) + beyond


class RandomWarp(v2.Transform):
    """Turn, scale, shear, shift and distort tiles, in one resampling, with all that lies on them.

    Each part is drawn for a share of the tiles; a tile that draws none stays as it is. Ground that
    comes in from beyond the tile is unknown: the mean in images, `IGNORE` in masks of classes,
    False in those of truth values.

    A box becomes the bounds of what is in it, which is taken for the ellipse that fits in: bounds
    of a turned box would swell. A box that the tile's edge cuts is taken whole, as the cut shows
    no more than a part of the ellipse. Boxes may then reach over the edge.

    Args:
        mean: Of the input, per band.
        rotation: Largest angle, degrees, either way.
        rotated: Share of the tiles that are rotated.
        scale: Largest magnification, >= 1; its logarithm is drawn from both sides of 0.
        shear: Largest displacement of x per px of y.
        shift: Largest, along both axes, in sides of the tile.
        elastic: See `ELASTIC`.
        grid: See `GRID`.

    References: Kalra et al. 2021, Towards rotation invariance in object detection, for ellipses.
    """

    def __init__(
        self,
        mean: Sequence[float],
        *,
        rotation: float = 0.0,
        rotated: float = SHARE,
        scale: float = 1.0,
        shear: float = 0.0,
        shift: float = 0.0,
        elastic: float = 0.0,
        grid: float = 0.0,
    ) -> None:
        """Keep the ranges."""
        super().__init__()
        self.mean = torch.tensor(mean)[:, None, None]
        self.rotation, self.rotated, self.scale = rotation, rotated, scale
        self.shear, self.shift, self.elastic, self.grid = shear, shift, elastic, grid

    def make_params(self, flat_inputs: list) -> dict[str, object]:
        """Draw the warp, the same for all inputs, and find where its pixels come from."""
        image = next(value for value in flat_inputs if isinstance(value, tv_tensors.Image))
        warp = self._draw(tuple(image.shape[-2:]))
        if warp is None:
            return {"warp": None, "sources": None, "known": None}
        sources = torch.from_numpy(warp.sources())
        size = torch.tensor(warp.size_hw[::-1])
        known = ((sources >= 0) & (sources < size)).all(dim=-1)
        return {"warp": warp, "sources": sources, "known": known}

    def _draw(self, size_hw: tuple[int, int]) -> Warp | None:
        drawn = torch.rand(6).tolist()
        angle, scale, shear, *shift = (torch.rand(5) * 2 - 1).tolist()
        shares = (self.rotated, *[SHARE] * 5)
        amplitudes = (
            self.rotation, math.log(self.scale), self.shear, self.shift, self.elastic, self.grid
        )  # fmt: skip
        rotation, zoom, sheared, moved, elastic, grid = (
            amplitude * (chance < share)
            for amplitude, chance, share in zip(amplitudes, drawn, shares, strict=True)
        )
        if not any((rotation, zoom, sheared, moved, elastic, grid)):
            return None
        cos, sin = (f(math.radians(angle * rotation)) for f in (math.cos, math.sin))
        turn = np.array([[cos, -sin], [sin, cos]]) * math.exp(scale * zoom)
        sides = np.array(size_hw[::-1])
        knots = edges = None
        if elastic:
            spread = (torch.rand(2, KNOTS + 3, KNOTS + 3) * 2 - 1).numpy().astype(np.float64)
            knots = spread * (elastic * sides / KNOTS)[:, None, None]
        if grid:
            cells = 1 + grid * (torch.rand(2, CELLS) * 2 - 1).numpy().astype(np.float64)
            ends = np.cumsum(cells, axis=1) / cells.sum(axis=1, keepdims=True) * sides[:, None]
            edges = tuple(np.hstack([np.zeros((2, 1)), ends]))
        return Warp(
            size_hw, turn @ [[1, shear * sheared], [0, 1]], np.array(shift) * moved * sides, knots,
            edges,
        )  # fmt: skip

    def transform(self, inpt: object, params: dict[str, object]) -> object:
        """Move what lies on the tile; labels pass."""
        warp, sources, known = (params[name] for name in ("warp", "sources", "known"))
        if warp is None or not isinstance(inpt, tv_tensors.TVTensor):
            return inpt
        if isinstance(inpt, tv_tensors.Image):
            moved = self._image(inpt.as_subclass(Tensor), sources, known)
        elif isinstance(inpt, tv_tensors.Mask):
            size = torch.tensor(warp.size_hw[::-1])
            x, y = sources.long().clamp(torch.zeros(2).long(), size - 1).unbind(-1)
            unknown = False if inpt.dtype == torch.bool else IGNORE
            moved = torch.where(known, inpt.as_subclass(Tensor)[y, x], unknown)
        else:
            places = inpt.as_subclass(Tensor).numpy()
            boxes = isinstance(inpt, tv_tensors.BoundingBoxes)
            moved = _move_boxes(warp, places) if boxes else warp.move(places)
            moved = torch.from_numpy(moved.astype(np.float32))
        return tv_tensors.wrap(moved, like=inpt)

    def _image(self, image: Tensor, sources: Tensor, known: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        places = sources / torch.tensor([width, height]) * 2 - 1
        moved = functional.grid_sample(
            image[None], places[None], mode="bilinear", padding_mode="border", align_corners=False
        )[0]
        return torch.where(known, moved, self.mean)


def _move_boxes(warp: Warp, boxes: np.ndarray) -> np.ndarray:
    """Return the bounds (N, 4) of what is in boxes (N, 4), moved; see `RandomWarp`."""
    if not len(boxes):
        return boxes
    around = np.linspace(0, 2 * np.pi, OUTLINE, endpoint=False)
    ellipse = np.stack([np.cos(around), np.sin(around)], axis=1)
    rectangle = ellipse / np.abs(ellipse).max(axis=1, keepdims=True)  # corners are among them
    height, width = warp.size_hw
    cut = ((boxes <= 0) | (boxes >= [width, height, width, height])).any(axis=1)
    outlines = np.where(cut[:, None, None], rectangle, ellipse)
    low, high = boxes[:, None, :2].astype(np.float64), boxes[:, None, 2:].astype(np.float64)
    moved = warp.move((low + high) / 2 + outlines * (high - low) / 2)
    return np.concatenate([moved.min(axis=1), moved.max(axis=1)], axis=1)


class RandomHoles(v2.Transform):
    """Cut rectangles out of tiles: the mean in images, and in masks ground that is unknown.

    What is cut out can no longer be seen, and so does not count: `IGNORE` in masks of classes,
    False in those of truth values.

    Args:
        mean: Of the input, per band.
        side: Largest side, in sides of the tile.
        most: Largest number, of each tile that has holes.
        share: Of the tiles that have.

    References:
        DeVries and Taylor 2017, Improved regularization of convolutional neural networks with
        cutout; ours are several, of several shapes.
    """

    def __init__(
        self, mean: Sequence[float], side: float, most: int = HOLES, share: float = SHARE
    ) -> None:
        """Keep the ranges."""
        super().__init__()
        self.mean, self.side = torch.tensor(mean)[:, None, None], side
        self.most, self.share = most, share

    def make_params(self, flat_inputs: list) -> dict[str, list[tuple[slice, slice]]]:
        """Draw the holes, the same for all inputs; they may reach over the edge."""
        if torch.rand(()) >= self.share:
            return {"holes": []}
        image = next(value for value in flat_inputs if isinstance(value, tv_tensors.Image))
        sides = torch.tensor(image.shape[-2:])
        count = int(torch.randint(1, self.most + 1, ()))
        half = torch.rand(count, 2) * self.side * sides / 2
        center = torch.rand(count, 2) * sides
        low, high = (v.round().clamp(min=0).int().tolist() for v in (center - half, center + half))
        return {
            "holes": [
                (slice(top, bottom), slice(left, right))
                for (top, left), (bottom, right) in zip(low, high, strict=True)
            ]
        }

    def transform(self, inpt: object, params: dict[str, list[tuple[slice, slice]]]) -> object:
        """Cut images and masks; all else passes."""
        if not params["holes"] or not isinstance(inpt, tv_tensors.Image | tv_tensors.Mask):
            return inpt
        cut = inpt.as_subclass(Tensor).clone()
        unknown = False if cut.dtype == torch.bool else IGNORE
        for rows, columns in params["holes"]:
            cut[..., rows, columns] = self.mean if cut.is_floating_point() else unknown
        return tv_tensors.wrap(cut, like=inpt)


class PixelTransform(v2.Transform):
    """Base of transforms that change the pixels of images (bands, H, W); all else passes."""

    def transform(self, inpt: object, params: dict[str, object]) -> object:
        """Change images only."""
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        return tv_tensors.wrap(self.change(inpt.as_subclass(Tensor), **params), like=inpt)

    def change(self, image: Tensor, **params: object) -> Tensor:
        """Return the changed image, given what `make_params` drew."""
        raise NotImplementedError


class RandomGain(PixelTransform):
    """Change contrast and brightness, the same for all bands and any number of them.

    Args:
        contrast: Largest relative change of the distance to the image's mean.
        brightness: Largest shift, in units of `std`.
        std: Standard deviation of the input, per band.
    """

    def __init__(self, contrast: float, brightness: float, std: Sequence[float]) -> None:
        """Keep the ranges."""
        super().__init__()
        self.contrast = contrast
        self.brightness = brightness * torch.tensor(std)[:, None, None]

    def make_params(self, flat_inputs: list) -> dict[str, object]:
        """Draw one gain and one shift for all inputs."""
        gain, shift = torch.rand(2).mul(2).sub(1)
        return {"gain": 1 + self.contrast * float(gain), "shift": self.brightness * shift}

    def change(self, image: Tensor, gain: float, shift: Tensor) -> Tensor:
        """Apply them about the image's mean."""
        mean = float(image.numpy().mean())  # torch's depends on the number of threads
        return image * gain + (shift + mean * (1 - gain))


class RandomGamma(PixelTransform):
    """Raise what lies between 0 and 1 to a power; what lies beyond keeps its distance to it.

    Args:
        gamma: Largest exponent, >= 1; its logarithm is drawn from -log(gamma) to log(gamma).
    """

    def __init__(self, gamma: float) -> None:
        """Keep the range."""
        super().__init__()
        self.gamma = gamma

    def make_params(self, flat_inputs: list) -> dict[str, float]:
        """Draw the exponent."""
        return {"exponent": self.gamma ** (1 - 2 * float(torch.rand(())))}

    def change(self, image: Tensor, exponent: float) -> Tensor:
        """Apply it."""
        inside = image.clamp(0, 1)
        return image - inside + inside**exponent


class RandomBands(PixelTransform):
    """Change contrast and brightness of each band on its own, about its mean over the image.

    Args:
        amount: Largest relative change of the distance to the mean, and largest shift in std.
        std: Standard deviation of the input, per band.
    """

    def __init__(self, amount: float, std: Sequence[float]) -> None:
        """Keep the ranges."""
        super().__init__()
        self.amount, self.std = amount, torch.tensor(std)[:, None, None]

    def make_params(self, flat_inputs: list) -> dict[str, Tensor]:
        """Draw a gain and a shift of each band."""
        gain, shift = torch.rand(2, *self.std.shape).mul(2).sub(1)
        return {"gain": 1 + self.amount * gain, "shift": self.amount * self.std * shift}

    def change(self, image: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        """Apply them."""
        mean = torch.from_numpy(image.numpy().mean(axis=(1, 2), keepdims=True))
        return image * gain + (shift + mean * (1 - gain))


class FancyPCA(PixelTransform):
    """Shift all pixels along the principal axes of the bands, as the light on the ground does.

    Args:
        std: Of the shift along each axis, in standard deviations of the input along it.
        covariance: Of the bands of the input, (bands, bands).

    References:
        Krizhevsky et al. 2012, ImageNet classification with deep convolutional neural networks,
        section 4.1. They scale the axes by variances, which depend on the unit of the pixels; ours
        by standard deviations.
    """

    def __init__(self, std: float, covariance: np.ndarray) -> None:
        """Find the axes, each as long as the input deviates along it."""
        super().__init__()
        variances, axes = np.linalg.eigh(covariance)
        lengths = np.sqrt(variances.clip(0))  # rounding may leave less than nothing
        self.axes = torch.from_numpy(std * axes * lengths).float()

    def make_params(self, flat_inputs: list) -> dict[str, Tensor]:
        """Draw how far to go along each axis."""
        along = torch.randn(len(self.axes))
        return {"shift": (self.axes * along).sum(dim=1)[:, None, None]}

    def change(self, image: Tensor, shift: Tensor) -> Tensor:
        """Go there."""
        return image + shift


class RandomExposure(PixelTransform):
    """Multiply the raw values that the input was stretched of, and stretch them again.

    What the stretch has cut stays cut: a sun that was clipped darkens with all else.

    Args:
        exposure: Largest change either way, EV: each doubles or halves.
        radiometry: The stretch.
    """

    def __init__(self, exposure: float, radiometry: imutils.Radiometry) -> None:
        """Keep the range and the stretch."""
        super().__init__()
        self.exposure, self.radiometry = exposure, radiometry

    def make_params(self, flat_inputs: list) -> dict[str, float]:
        """Draw the factor, the same for all bands."""
        return {"factor": 2 ** (self.exposure * (2 * float(torch.rand(())) - 1))}

    def change(self, image: Tensor, factor: float) -> Tensor:
        """Apply it."""
        raw = self.radiometry.unstretch(image.numpy())
        raw *= factor
        return torch.from_numpy(self.radiometry.stretch(raw))


class RandomNoise(PixelTransform):
    """Add Gaussian noise, independent for all pixels and bands.

    Args:
        noise: Largest standard deviation of the noise, in units of `std`.
        std: Standard deviation of the input, per band.
    """

    def __init__(self, noise: float, std: Sequence[float]) -> None:
        """Keep the range."""
        super().__init__()
        self.noise = noise * torch.tensor(std)[:, None, None]

    def make_params(self, flat_inputs: list) -> dict[str, Tensor]:
        """Draw how strong it is."""
        return {"noise": self.noise * torch.rand(())}

    def change(self, image: Tensor, noise: Tensor) -> Tensor:
        """Draw and add it."""
        return image + noise * torch.randn(image.shape)


class BandDropout(PixelTransform):
    """Set bands to their mean, each with the same probability, but never all bands.

    Args:
        probability: Of each band, 0-1.
        mean: Mean of the input, per band; the network sees it as 0.
    """

    def __init__(self, probability: float, mean: Sequence[float]) -> None:
        """Keep the values that bands are set to."""
        super().__init__()
        self.probability, self.mean = probability, torch.tensor(mean)[:, None, None]

    def make_params(self, flat_inputs: list) -> dict[str, Tensor]:
        """Draw the bands that go; one that stays is drawn first."""
        dropped = torch.rand(len(self.mean)) < self.probability
        dropped[torch.randint(len(self.mean), ())] = False
        return {"dropped": dropped}

    def change(self, image: Tensor, dropped: Tensor) -> Tensor:
        """Set them to their mean."""
        return torch.where(dropped[:, None, None], self.mean, image) if dropped.any() else image


class RandomTrim(PixelTransform):
    """Trim both ends of each band at a percentile, and stretch what is left to its old range.

    Args:
        low: Least percentile, 0 <= low <= high.
        high: Largest, < 50.
    """

    def __init__(self, low: float, high: float) -> None:
        """Keep the range."""
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list) -> dict[str, float]:
        """Draw the percentile, the same for all bands and both ends."""
        return {"percentile": self.low + (self.high - self.low) * float(torch.rand(()))}

    def change(self, image: Tensor, percentile: float) -> Tensor:
        """Trim and stretch; a band of one value stays."""
        values = image.numpy()
        at = [0, percentile, 100 - percentile, 100]
        ends = np.percentile(values, at, axis=(1, 2), keepdims=True)
        least, low, high, most = ends.astype(np.float32)
        room = np.where(high > low, high - low, 1)
        trimmed = least + (np.clip(values, low, high) - low) / room * (most - least)
        return torch.from_numpy(np.where(high > low, trimmed, values).astype(np.float32))


def strengthen(augment: AugmentConfig) -> AugmentConfig:
    """Raise the amplitudes to those of the strong set, scaled by its strength, where they are less.

    At strength 0 nothing changes.
    """
    least = {name: augment.strength * amount for name, amount in STRONG.items()}
    least["gamma"] = 1 + augment.strength * (STRONG["gamma"] - 1)
    return replace(augment, **{n: max(getattr(augment, n), v) for n, v in least.items()})


def training_transform(
    augment: AugmentConfig, radiometry: imutils.Radiometry, *, target_size: int | None = None
) -> v2.Transform | None:
    """Return what happens to the tensors of training tiles, or None if nothing does.

    Args:
        augment: What to draw from which range; windows are zoomed when they are read.
        radiometry: Mean, standard deviation and covariance of the input's bands.
        target_size: Side of random crops, px; None: none.

    Raises:
        InputError: The radiometry has no covariance, which fancy_pca needs.
    """
    crop = [v2.RandomCrop(target_size)] if target_size else []
    if not augment.enabled:
        return v2.Compose(crop) if crop else None
    strength, augment = augment.strength, strengthen(augment)
    mean, std = radiometry.mean, radiometry.std
    steps: list[v2.Transform] = []
    if augment.flips:
        steps.append(v2.RandomHorizontalFlip(augment.flip_share))
    if augment.turns:
        steps.append(RandomQuarterTurn())
    rotated = augment.rotate_share if augment.rotate_limit else 0.0
    if strength or rotated or augment.shear or augment.shift:
        warp = RandomWarp(
            mean, rotation=augment.rotate_limit, rotated=rotated, scale=SCALE**strength,
            shear=augment.shear, shift=augment.shift, elastic=strength * ELASTIC,
            grid=strength * GRID,
        )  # fmt: skip
        steps.append(warp)
    steps += crop
    if augment.exposure:
        steps.append(RandomExposure(augment.exposure, radiometry))
    if augment.trim_range:
        steps.append(RandomTrim(*sorted(augment.trim_range)))
    if augment.gamma > 1:
        steps.append(RandomGamma(augment.gamma))
    if augment.contrast or augment.brightness:
        steps.append(RandomGain(augment.contrast, augment.brightness, std))
    if strength and len(mean) > 1:
        steps.append(v2.RandomApply([RandomBands(strength * BANDS, std)], SHARE))
    if augment.fancy_pca:
        steps.append(FancyPCA(augment.fancy_pca, _covariance(radiometry)))
    if augment.blur and augment.blur_share:
        kernel = 2 * math.ceil(3 * augment.blur) + 1
        blur = v2.GaussianBlur(kernel, (augment.blur / 10, augment.blur))
        steps.append(v2.RandomApply([blur], augment.blur_share))
    if augment.noise and augment.noise_share:
        steps.append(v2.RandomApply([RandomNoise(augment.noise, std)], augment.noise_share))
    if augment.band_dropout and len(mean) > 1:
        steps.append(BandDropout(augment.band_dropout, mean))
    if strength:
        steps.append(RandomHoles(mean, strength * HOLE))
    return v2.Compose(steps) if steps else None


def _covariance(radiometry: imutils.Radiometry) -> np.ndarray:
    bands = len(radiometry.mean)
    if len(radiometry.covariance) != bands**2:
        raise InputError(
            f"train.augment.fancy_pca needs the covariance of the {bands} bands, and this "
            "radiometry has none, as it was measured by an earlier version; measure it anew"
        )
    return np.reshape(radiometry.covariance, (bands, bands))
