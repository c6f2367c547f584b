"""Semantic segmentation as a Lightning module: the class of every pixel, learnt from masks.

Tensors in, losses and class scores out; paths and tables stay outside. The networks are those of
segmentation-models-pytorch, whose encoders are its own or, as `tu-NAME`, timm's.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

import metrics
import ranks
from datasets import Batch
from ImageData import IGNORE, InputError
from learning import VIEWS, TileModel, __version__
from losses import MaskLoss
from ModelConfig import ModelConfig, SegmentationConfig
from networks import SIZE_DIVISOR, DataContract, fit_bands

log = logging.getLogger(__name__)

# Names of encoders that smp still has, and converts itself.
warnings.filterwarnings("ignore", message="`timm-` encoders are deprecated")

ARCHITECTURES = tuple(smp.MODEL_ARCHITECTURES_MAPPING)
DROPOUT = {  # architecture -> the argument that sets it
    "fpn": "decoder_dropout", "pspnet": "psp_dropout", "deeplabv3": "decoder_aspp_dropout",
    "deeplabv3plus": "decoder_aspp_dropout",
}  # fmt: skip
DECODER = ("decoder_", "psp_")  # how the options of decoders begin
# normalise what they pooled to one value per tile by the batch, which must hold several
POOLING = ("deeplabv3", "deeplabv3plus", "pan", "pspnet", "upernet")
LEAST_SIDE = {"pan": 128}  # px of the input, which it halves more often than others
NON_COMMERCIAL = {  # weights of smp -> why they may not be used for everything
    "ssl": "CC BY-NC 4.0", "swsl": "CC BY-NC 4.0", "instagram": "CC BY-NC 4.0",
}  # fmt: skip
NVIDIA_LICENSE = "NVIDIA Source Code License, for research only"  # of the encoders mit_*, code too
# of timm's weights: whoever publishes others than these may restrict their use
FREE_LICENSES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0")


class SegmentationNetwork(nn.Module):
    """A network of segmentation-models-pytorch on stretched tiles of any size and bands.

    Args:
        classes: Number of classes.
        conf: Architecture and encoder.
        contract: Bands, and mean and standard deviation of the input.

    Raises:
        InputError: There is no such architecture, encoder, dropout, option, or no such pair.
    """

    def __init__(self, classes: int, conf: SegmentationConfig, contract: DataContract) -> None:
        """Build it with random weights."""
        super().__init__()
        self.architecture = conf.architecture.lower()
        if self.architecture not in ARCHITECTURES:
            raise InputError(_unknown("architecture", conf.architecture, ARCHITECTURES))
        check_encoder(conf)
        options = check_decoder_options(conf)
        if conf.dropout is not None:
            if self.architecture not in DROPOUT:
                raise InputError(
                    f"segmentation.dropout: {self.architecture} has none; leave it out, or take "
                    f"one of {', '.join(DROPOUT)}"
                )
            if DROPOUT[self.architecture] in options:
                raise InputError(
                    f"segmentation.dropout is {DROPOUT[self.architecture]} of decoder_options; "
                    "give one of them"
                )
            options[DROPOUT[self.architecture]] = conf.dropout
        try:
            self.body = smp.create_model(
                self.architecture, conf.encoder, None, contract.channels, classes, **options
            )
        except Exception as error:  # whatever the libraries raise of a pair that does not fit
            raise InputError(
                f"{self.architecture} cannot be built on the encoder {conf.encoder}"
                f"{f' with {options}' if options else ''} ({error}); take another of them"
            ) from error
        radiometry = contract.radiometry
        for name, values in (("mean", radiometry.mean), ("std", radiometry.std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, C, H, W), float32, of stretched tiles (B, bands, H, W)."""
        height, width = images.shape[-2:]
        batch = (images - self.mean.to(images.dtype)) / self.std.to(images.dtype)
        least = LEAST_SIDE.get(self.architecture, 0)
        bottom, right = (max(-side % SIZE_DIVISOR, least - side) for side in (height, width))
        if bottom or right:  # as the edge goes on, which is less of a surprise than its end
            batch = functional.pad(batch, (0, right, 0, bottom), mode="replicate")
        alone = self.training and len(batch) == 1 and self.architecture in POOLING
        if alone:  # a twin changes no mean, so that what is learnt is the same
            batch = batch.repeat(2, 1, 1, 1)
        logits = self.body(batch.contiguous(memory_format=torch.channels_last))
        return logits[: len(images), :, :height, :width].float()


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name.lower(), known, n=3)
    hint = f"did you mean {', '.join(close)}?" if close else f"known are {', '.join(known)}"
    return f"segmentation.{what}: there is no {name!r}; {hint}"


def encoder_names() -> list[str]:
    """Return the names of all encoders, timm's with `tu-` before them."""
    return [*smp.encoders.get_encoder_names(), *(f"tu-{name}" for name in timm.list_models())]


def check_encoder(conf: SegmentationConfig) -> None:
    """Refuse an encoder that does not exist, or that the licence of its code keeps from most users.

    Raises:
        InputError: With the nearest names, or the licence.
    """
    name = conf.encoder.partition(".")[0] if conf.encoder.startswith("tu-") else conf.encoder
    names = encoder_names()
    if name not in names:
        raise InputError(_unknown("encoder", conf.encoder, names))
    if name.startswith("mit_"):
        _check_license(conf, f"the encoder {name}", NVIDIA_LICENSE)


def check_decoder_options(conf: SegmentationConfig) -> dict[str, Any]:
    """Return the options of the decoder, which its architecture must have.

    Raises:
        InputError: With the nearest names of those that it has.
    """
    network = smp.MODEL_ARCHITECTURES_MAPPING[conf.architecture.lower()]
    known = [n for n in inspect.signature(network).parameters if n.startswith(DECODER)]
    for name in conf.decoder_options or {}:
        if name not in known:
            wrong = _unknown("decoder_options", name, known)
            raise InputError(f"{wrong} of {conf.architecture.lower()}")
    return dict(conf.decoder_options or {})


def _check_license(conf: SegmentationConfig, what: str, license_name: str) -> None:
    if not conf.allow_non_commercial:
        raise InputError(
            f"{what} may not be used for everything: {license_name}. Take another, or, if your use "
            "is allowed, set segmentation.allow_non_commercial"
        )


def load_encoder(conf: ModelConfig, bands: int) -> dict[str, Tensor]:
    """Load weights of the encoder, from a file or by a name of segmentation-models-pytorch's.

    "DEFAULT" is the first that it has. A file holds a state dictionary, of the encoder or of the
    network that it is part of; it is loaded without running any code in it.

    Raises:
        InputError: With what to do instead.
    """
    wanted, of = conf.segmentation, conf.segmentation.encoder
    if Path(conf.weights).is_file():
        return _read_encoder(conf, bands)
    known = list(smp.encoders.encoders.get(of, {}).get("pretrained_settings", {}))
    if of.startswith("tu-"):
        published = timm.get_pretrained_cfg(of.removeprefix("tu-"))
        known = ["imagenet"] if published and published.has_weights else []
        license_name = published.license if known else None
        if known and license_name not in FREE_LICENSES:
            _check_license(wanted, f"weights of {of}", license_name or "licence not known")
    if conf.weights not in ("DEFAULT", *known) or not known:
        raise InputError(
            f"WEIGHTS must be a file, or one of {['DEFAULT', *known] if known else 'none'} for the "
            f"encoder {of}, got {conf.weights!r}, which is neither"
        )
    name = known[0] if conf.weights == "DEFAULT" else conf.weights
    if name in NON_COMMERCIAL:
        _check_license(wanted, f"weights {name} of {of}", NON_COMMERCIAL[name])
    try:
        weights = True if of.startswith("tu-") else name
        return smp.encoders.get_encoder(of, bands, weights=weights).state_dict()
    except Exception as error:  # of the hub's client, which has many
        raise InputError(
            f"the weights {name} of {of} could not be downloaded ({error}); set WEIGHTS to a file "
            "of them, or to None"
        ) from error


def _read_encoder(conf: ModelConfig, bands: int) -> dict[str, Tensor]:
    try:
        state = torch.load(conf.weights, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{conf.weights} is not a file of weights: {error}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise InputError(
            f"{conf.weights} holds a {type(state).__name__}, expected a mapping from names to "
            "tensors; save the state_dict() of an encoder"
        )
    state = {str(n): v for n, v in state.items() if isinstance(v, Tensor)}
    inner = [n for n in state if ".encoder." in f".{n}"]
    if inner:
        state = {n[n.index("encoder.") + len("encoder.") :]: state[n] for n in inner}
    encoder = smp.encoders.get_encoder(conf.segmentation.encoder, bands, weights=None)
    own = encoder.state_dict()
    first = f"{_first_convolution(encoder, bands)}.weight"
    if first in state:
        state[first] = fit_bands(state[first], bands)
    # older files leave out how many batches a normalisation has seen, which matters to none of ours
    state = {n: v for n, v in own.items() if n.endswith(".num_batches_tracked")} | state
    wrong = [n for n, v in own.items() if n not in state or state[n].shape != v.shape]
    if wrong:
        raise InputError(
            f"weights {conf.weights} do not fit {conf.segmentation.encoder}: {len(wrong)} tensors "
            f"are missing or of another shape, such as {wrong[:3]}; give weights of that very "
            "encoder"
        )
    return {name: state[name] for name in own}


def _first_convolution(module: nn.Module, bands: int) -> str:
    return next(
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.Conv2d) and part.in_channels == bands
    )


def segment_views(model: nn.Module, tiles: Tensor, views: Sequence[tuple[int, bool]]) -> Tensor:
    """Return the mean of what a model says of views of square tiles (B, bands, side, side).

    Args:
        model: Gives logits of tiles.
        tiles: Stretched.
        views: Quarter turns and whether mirrored before, of each.

    Returns:
        Probabilities, float32 (B, C, side, side), as the tiles lie.
    """
    total = 0.0
    for turns, mirrored in views:
        seen = torch.rot90(tiles.flip(3) if mirrored else tiles, turns, dims=(2, 3))
        found = torch.rot90(model(seen).float().softmax(dim=1), -turns, dims=(2, 3))
        total = total + (found.flip(3) if mirrored else found)
    return total / len(views)


class LargeRasterSegModel(TileModel):
    """A network that names the class of every pixel, and how it learns.

    Args:
        label_set: Names of the classes, by class id.
        conf: Configuration, or what its `to_dict` returned.
        contract: What the data is like, or that as a dictionary.

    All of it is saved in every checkpoint, so that
    `LargeRasterSegModel.load_from_checkpoint(path)` needs nothing else.

    Attributes:
        evaluation: The last one, and with it what it was computed on; of rank 0 only.
    """

    TASK = "segmentation"
    BEST_BY = "val_mean_IoU"
    RANK_BY = "mean_IoU"
    LOSSES = ("loss",)
    SHOWN = ("val_mean_IoU", "val_pixel_accuracy")

    def __init__(
        self,
        label_set: Iterable[str],
        conf: ModelConfig | Mapping[str, Any],
        contract: DataContract | Mapping[str, Any],
        code_version: str = __version__,
    ) -> None:
        """Build the network with random weights; see `load_pretrained`.

        Raises:
            InputError: See `SegmentationNetwork` and `MaskLoss`.
        """
        super().__init__(label_set, conf, contract, code_version)
        self.network = SegmentationNetwork(
            len(self.labels), self.conf.segmentation, self.contract
        ).to(memory_format=torch.channels_last)
        self.loss = MaskLoss(self.conf.segmentation, len(self.labels))
        self.collector = metrics.ConfusionCollector(len(self.labels))
        self.evaluation: metrics.MaskEvaluation | None = None
        self._difficulty: Tensor | None = None

    @override
    def load_pretrained(self) -> None:
        if self.conf.init_from:
            self._start_from(self.conf.init_from)
        elif self.conf.weights:
            state = load_encoder(self.conf, self.contract.channels)
            self.network.body.encoder.load_state_dict(state)

    def _start_from(self, path: str) -> None:
        labels, state = self._read_start(path)
        bands = self.contract.channels
        first = f"{_first_convolution(self.network, bands)}.weight"
        state[first] = fit_bands(state[first], bands)
        own = self.network.state_dict()
        shared = [name for name in self.labels if name in labels]
        to, of = ([names.index(name) for name in shared] for names in (self.labels, labels))
        for name, mine in own.items():
            theirs = state.get(name)
            if ".segmentation_head." not in name or theirs is None or theirs.ndim == 0:
                continue
            # of the last layer, what it knows of a class goes by the class's name
            if len(mine) == len(self.labels) and len(theirs) == len(labels):
                state[name] = mine.clone()
                state[name][to] = theirs[of]
        if fresh := [name for name in self.labels if name not in labels]:
            log.info("the head is re-made: it keeps %s, and starts anew with %s", shared, fresh)
        wrong = [n for n, v in own.items() if n not in state or state[n].shape != v.shape]
        if wrong:
            raise InputError(
                f"{len(wrong)} tensors of {path} are missing or of another shape, such as "
                f"{wrong[:3]}; its architecture is another"
            )
        self.network.load_state_dict({name: state[name] for name in own})

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, C, H, W) of stretched tiles (B, bands, H, W)."""
        return self.network(images)

    @override
    def _common_step(self, batch: Batch, stage: str) -> tuple[Tensor, Tensor]:
        images, targets = batch
        mask = torch.stack([target["mask"] for target in targets])
        logits = self.network(images)
        loss = self.loss(logits, mask)
        if stage == "train" and self.conf.train.hard_negatives:
            self._difficulty = _loss_by_tile(logits.detach(), mask)
        if self._collects(stage):
            seen = logits
            if self.conf.views != "none" and self.trainer.state.fn != "fit":
                seen = segment_views(self, images, VIEWS[self.conf.views])
            self.collector.add(seen.argmax(dim=1), mask, targets)
        values = torch.tensor([float(loss.detach()), len(images), 0.0], dtype=torch.float64)
        return loss, values

    @override
    def _loss_of_tile(self, images: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        return self.loss(self.network(images), target["mask"][None])

    @override
    def tile_difficulty(self) -> Tensor:
        return self._difficulty

    @override
    def _measure(self, stage: str) -> None:
        blocks, self.evaluation = self.collector.merge(), None
        if ranks.rank() == 0:
            self.evaluation = metrics.evaluate_masks(
                blocks, self.labels,
                resamples=metrics.RESAMPLES if stage == "test" else 0,  # intervals are of the test
            )  # fmt: skip
        self._log_values(stage, self.evaluation and self.evaluation.values)

    @override
    def describe(self) -> str:
        known = self.conf.segmentation
        count = sum(p.numel() for p in self.network.parameters())
        start = self.conf.init_from or self.conf.weights
        return (
            f"{known.architecture} on {known.encoder}, {count / 1e6:.1f} million weights, "
            f"{f'begun with {start}' if start else 'from scratch (WEIGHTS, INIT_FROM)'}; "
            f"loss {known.loss}; classes {', '.join(self.labels)}"
        )


def _loss_by_tile(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the mean cross entropy of the known pixels of each tile, (B,)."""
    per_pixel = functional.cross_entropy(logits, mask.long(), ignore_index=IGNORE, reduction="none")
    return per_pixel.sum(dim=(1, 2)) / (mask != IGNORE).sum(dim=(1, 2)).clamp(min=1)
