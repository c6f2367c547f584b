"""What training tiles go through: transforms of images of any bands, and of what lies on them.

They are transforms of `torchvision.transforms.v2`, of tensors: images are float32 (bands, H, W),
stretched, and may reach beyond 0 to 1. All that is random is drawn from torch's generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

import imutils
from ImageData import IGNORE, InputError
from ModelConfig import AugmentConfig


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


def training_transform(
    augment: AugmentConfig,
    radiometry: imutils.Radiometry,
    *,
    masks: bool = False,
    target_size: int | None = None,
) -> v2.Transform | None:
    """Return what happens to the tensors of training tiles, or None if nothing does.

    Args:
        augment: What to draw from which range; windows are zoomed when they are read.
        radiometry: Mean and standard deviation of the input, per band.
        masks: Whether tiles have masks, not boxes.
        target_size: Side of random crops, px; None: none.

    Raises:
        InputError: Boxes are to be rotated by any angle.
    """
    if augment.rotate_limit and not masks:
        raise InputError(
            "train.augment.rotate_limit needs masks: turned boxes would no longer fit their "
            "objects; set it to 0, and see train.augment.turns"
        )
    crop = [v2.RandomCrop(target_size)] if target_size else []
    if not augment.enabled:
        return v2.Compose(crop) if crop else None
    steps: list[v2.Transform] = []
    if augment.flips:
        steps.append(v2.RandomHorizontalFlip(augment.flip_share))
    if augment.turns:
        steps.append(RandomQuarterTurn())
    if augment.rotate_limit and augment.rotate_share:
        fill = {tv_tensors.Image: list(radiometry.mean), tv_tensors.Mask: IGNORE}
        bilinear = v2.InterpolationMode.BILINEAR
        rotation = v2.RandomRotation(augment.rotate_limit, interpolation=bilinear, fill=fill)
        steps.append(v2.RandomApply([rotation], augment.rotate_share))
    steps += crop
    if augment.trim_range:
        steps.append(RandomTrim(*sorted(augment.trim_range)))
    if augment.gamma > 1:
        steps.append(RandomGamma(augment.gamma))
    if augment.contrast or augment.brightness:
        steps.append(RandomGain(augment.contrast, augment.brightness, radiometry.std))
    if augment.blur and augment.blur_share:
        kernel = 2 * math.ceil(3 * augment.blur) + 1
        blur = v2.GaussianBlur(kernel, (augment.blur / 10, augment.blur))
        steps.append(v2.RandomApply([blur], augment.blur_share))
    if augment.noise and augment.noise_share:
        noise = RandomNoise(augment.noise, radiometry.std)
        steps.append(v2.RandomApply([noise], augment.noise_share))
    if augment.band_dropout and len(radiometry.mean) > 1:
        steps.append(BandDropout(augment.band_dropout, radiometry.mean))
    return v2.Compose(steps) if steps else None
