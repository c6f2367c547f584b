"""The detector: a RetinaNet for small objects on tiles, as a Lightning module.

Tensors in, losses and detections out; paths and tables stay outside.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytorch_lightning as pl
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torchvision import models
from torchvision.models.detection import RetinaNet
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import (
    BackboneWithFPN,
)
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FrozenBatchNorm2d, box_iou

import metrics
from datasets import Batch, Target
from ImageData import InputError
from imutils import Radiometry
from ModelConfig import ModelConfig

log = logging.getLogger(__name__)

# Lightning asks torch for tree leaves in a way torch is about to change; nothing a user can mend.
warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)

__version__ = "0.1.0"

PYRAMID_LEVELS = 5  # P2 to P6
SIZE_DIVISOR = 32  # stride of the deepest feature map of a backbone
STAGES = {"train": "train_", "validation": "val_", "test": "test_"}  # -> prefix of logged names


@dataclass
class Anchors:
    """Side lengths (px) of the anchors on each pyramid level, and their width-to-height ratios."""

    sizes: tuple[tuple[float, ...], ...]
    aspect_ratios: tuple[float, ...]


def fit_anchors(boxes_xyxy: np.ndarray) -> Anchors:
    """Fit anchors to the boxes (N, 4) of the training ground, px.

    The smallest anchor meets the smaller objects (second percentile of the square root of the
    area); from there three sizes an octave over five octaves reach 25 times as far. Elongated
    anchors join when a tenth of the boxes is longer than 1.5 times its width, either way.

    References: Lin et al. 2017, Focal loss, section 4, for the three scales an octave; they fix the
    smallest at 32 px, we take it from the data.
    """
    if not len(boxes_xyxy):
        raise InputError("anchors need at least one training box")
    width, height = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).clip(1e-6).T
    smallest = float(max(np.quantile(np.sqrt(width * height), 0.02), 4.0))
    sizes = tuple(
        tuple(round(smallest * 2 ** (level + step / 3), 2) for step in range(3))
        for level in range(PYRAMID_LEVELS)
    )
    elongated = np.abs(np.log(width / height)) > np.log(1.5)
    return Anchors(sizes, (0.5, 1.0, 2.0) if elongated.mean() > 0.1 else (1.0,))


def best_anchor_iou(anchors: Anchors, boxes_xyxy: np.ndarray) -> np.ndarray:
    """Return for each box (N, 4) the IoU (N,) with the anchor that fits it best, centre on centre.

    Real anchors stand on a grid, so that this is what a box can reach, not what it gets.
    """
    sizes = np.concatenate(anchors.sizes)
    ratios = np.sqrt(anchors.aspect_ratios)[:, None]
    height, width = (sizes * ratios).ravel(), (sizes / ratios).ravel()
    sides = boxes_xyxy[:, None, 2:] - boxes_xyxy[:, None, :2]
    shared = np.minimum(sides[..., 0], width) * np.minimum(sides[..., 1], height)
    return (shared / (sides.prod(axis=-1) + width * height - shared)).max(axis=1)


@dataclass
class DataContract:
    """What a checkpoint says of the data it was trained on, and asks of data to come.

    Attributes:
        tile_size: Side of the tiles, px.
        bands: One-based indexes of the bands read, in their order.
        band_count: Number of bands of the files, without alpha.
        dtype: Type of the raw pixels.
        radiometry: How they become input.
        anchors: See `fit_anchors`.
        detections_per_tile: Most detections kept of a tile.
        resolution: Side of a pixel on the ground in metres, None without a CRS.
        split_hash: Fingerprint of the ground blocks; the test ground of the same hash is unseen.
        evaluation_overlap: Overlap of neighbouring tiles that fits the largest object, px.
    """

    tile_size: Annotated[int, Field(ge=1)]
    bands: tuple[int, ...]
    band_count: int
    dtype: str
    radiometry: Radiometry
    anchors: Anchors
    detections_per_tile: Annotated[int, Field(ge=1)]
    resolution: float | None
    split_hash: str
    evaluation_overlap: int


def detections_limit(densest: int) -> int:
    """Return the most detections to keep of a tile, given the objects in the densest one."""
    return max(100, 2 * densest)


class TileRetinaNet(RetinaNet):
    """Torchvision's RetinaNet on tiles of one size, without its resizing.

    Unlike its parent it takes a batch (B, bands, H, W), does not scale it, and returns losses and
    detections from one pass.
    """

    def __init__(self, classes: int, conf: ModelConfig, contract: DataContract) -> None:
        """Assemble backbone, pyramid, anchors and head."""
        anchors = AnchorGenerator(
            contract.anchors.sizes, (contract.anchors.aspect_ratios,) * PYRAMID_LEVELS
        )
        head = RetinaNetHead(
            conf.fpn_channels,
            anchors.num_anchors_per_location()[0],
            classes,
            norm_layer=_group_norm,
        )
        super().__init__(
            make_backbone(conf, len(contract.bands)),
            classes,
            min_size=contract.tile_size,
            max_size=contract.tile_size,
            image_mean=list(contract.radiometry.mean),
            image_std=list(contract.radiometry.std),
            anchor_generator=anchors,
            head=head,
            score_thresh=conf.test.score_threshold,
            nms_thresh=conf.nms_threshold,
            detections_per_img=contract.detections_per_tile,
            topk_candidates=max(1000, 2 * contract.detections_per_tile),
            fg_iou_thresh=conf.fg_iou_threshold,
            bg_iou_thresh=conf.bg_iou_threshold,
        )

    def forward(
        self, images: Tensor, targets: Sequence[Target] | None = None, *, detect: bool = True
    ) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """Return the losses, if there are targets, and the detections, if asked for.

        Args:
            images: float32 (B, bands, H, W), stretched.
            targets: Per tile `boxes` (N, 4) xyxy px, `labels` (N,) and, where some of it is ground
                that does not count, `counted` (H, W).
            detect: Whether to decode detections.

        Returns:
            `{"classification", "bbox_regression"}`, or empty; and per tile `boxes, scores, labels`,
            falling by score, or empty.
        """
        size_hw = images.shape[-2:]
        mean, std = (
            torch.as_tensor(values, dtype=images.dtype, device=images.device)[:, None, None]
            for values in (self.transform.image_mean, self.transform.image_std)
        )
        bottom, right = (-side % SIZE_DIVISOR for side in size_hw)
        batch = nn.functional.pad((images - mean) / std, (0, right, 0, bottom))
        features = list(self.backbone(batch.contiguous(memory_format=torch.channels_last)).values())
        # losses and boxes want full precision, whatever the convolutions run in
        outputs = {name: value.float() for name, value in self.head(features).items()}
        anchors = self.anchor_generator(ImageList(batch, [tuple(size_hw)] * len(batch)), features)
        losses = self.compute_loss(list(targets), outputs, anchors) if targets is not None else {}
        if not detect:
            return losses, []
        per_location = self.anchor_generator.num_anchors_per_location()[0]
        counts = [f.shape[-2] * f.shape[-1] * per_location for f in features]
        by_level = {name: list(value.split(counts, dim=1)) for name, value in outputs.items()}
        with torch.no_grad():
            detections = self.postprocess_detections(
                by_level, [list(a.split(counts)) for a in anchors], [tuple(size_hw)] * len(batch)
            )
        return losses, detections

    def compute_loss(
        self, targets: list[Target], head_outputs: dict[str, Tensor], anchors: list[Tensor]
    ) -> dict[str, Tensor]:
        """Match anchors as the parent does; on ground that does not count, none is background."""
        matches = []
        for mine, target in zip(anchors, targets, strict=True):
            match = torch.full((len(mine),), Matcher.BELOW_LOW_THRESHOLD, device=mine.device)
            if len(target["boxes"]):
                match = self.proposal_matcher(box_iou(target["boxes"], mine))
            if "counted" in target:
                stray = ~metrics.counted_at_centers(target["counted"], mine)
                background = match == Matcher.BELOW_LOW_THRESHOLD
                match[background & stray] = Matcher.BETWEEN_THRESHOLDS
            matches.append(match)
        return self.head.compute_loss(targets, head_outputs, anchors, matches)


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // math.gcd(channels, 16), channels)


def make_backbone(conf: ModelConfig, bands: int, *, load: bool = False) -> BackboneWithFPN:
    """Build the feature pyramid (P2-P6) on a torchvision backbone for any number of bands.

    From scratch it is normalised by groups of channels, which does not depend on the batch size;
    with pretrained weights by their own frozen statistics.

    Args:
        conf: Names backbone, width and weights.
        bands: Number of input bands.
        load: Whether to load the weights that are named; a checkpoint brings its own.

    Raises:
        InputError: The weights are neither a file nor known, or cannot be downloaded.
    """
    norm_layer = FrozenBatchNorm2d if conf.weights else _group_norm
    body = getattr(models, conf.backbone)(weights=None, norm_layer=norm_layer)
    if conf.weights and load:
        state = load_weights(conf.backbone, conf.weights)
        wanted = {name: value.shape for name, value in body.state_dict().items()}
        given = {name: value.shape for name, value in state.items()}
        if wrong := [name for name, shape in wanted.items() if given.get(name) != shape]:
            raise InputError(
                f"weights {conf.weights} do not fit {conf.backbone}: {len(wrong)} tensors are "
                f"missing or of another shape, such as {wrong[:3]}; give weights of that "
                "very architecture"
            )
        body.load_state_dict(state, strict=False)
    _adapt_first_convolution(body, bands, pretrained=bool(conf.weights) and load)
    if conf.backbone.startswith("mobilenet"):
        halving = [i for i, m in enumerate(body.features) if getattr(m, "_is_cn", False)]
        levels = [*(i - 1 for i in halving[1:]), len(body.features) - 1]  # last of each stride
        channels = [body.features[i].out_channels for i in levels]
        return BackboneWithFPN(
            body.features, {str(i): str(n) for n, i in enumerate(levels)}, channels,
            conf.fpn_channels,
        )  # fmt: skip
    channels = [body.inplanes // 8 * 2**i for i in range(4)]
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    return BackboneWithFPN(body, layers, channels, conf.fpn_channels)


def load_weights(backbone: str, weights: str) -> dict[str, Tensor]:
    """Load pretrained weights from a file, or by torchvision's name ("DEFAULT", "IMAGENET1K_V2").

    A name is downloaded once, by torch's hub. A file holds a state dictionary; it is loaded
    without running any code in it.

    Raises:
        InputError: With what to do instead.
    """
    if Path(weights).is_file():
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        except Exception as error:
            raise InputError(f"{weights} is not a file of weights: {error}") from error
        return state.get("state_dict", state)
    known = models.get_model_weights(backbone)
    if weights != "DEFAULT" and weights not in known.__members__:
        raise InputError(
            f"WEIGHTS must be a file, or one of {['DEFAULT', *known.__members__]} for {backbone}, "
            f"got {weights!r}, which is neither"
        )
    entry = known[weights]
    try:
        return entry.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise InputError(
            f"the weights {entry} could not be downloaded from {entry.url} ({error}); fetch that "
            "file on a machine with internet access and set WEIGHTS to its path, or to None"
        ) from error


def _adapt_first_convolution(body: nn.Module, bands: int, *, pretrained: bool) -> None:
    # The first three bands keep their pretrained filters; further ones start at their mean, one
    # band takes their sum, so that a grey image answers as its three-band copy would.
    path = "features.0.0" if hasattr(body, "features") else "conv1"
    old = body.get_submodule(path)
    if bands == old.in_channels:
        return
    new = nn.Conv2d(
        bands, old.out_channels, old.kernel_size, old.stride, old.padding,
        bias=old.bias is not None,
    )  # fmt: skip
    if pretrained:
        weight = old.weight.detach()
        with torch.no_grad():
            if bands == 1:
                new.weight.copy_(weight.sum(dim=1, keepdim=True))
            else:
                new.weight.copy_(weight.mean(dim=1, keepdim=True).expand_as(new.weight))
                shared = min(bands, 3)
                new.weight[:, :shared] = weight[:, :shared]
        log.info("first convolution adapted from %d to %d bands", old.in_channels, bands)
    else:
        nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    parent = body.get_submodule(path.rpartition(".")[0])
    setattr(parent, path.rpartition(".")[2], new)


def resolve_precision(precision: str, accelerator: str) -> str:
    """Turn "auto" into "bf16-mixed" where the hardware computes in bfloat16, else "32-true"."""
    if precision != "auto":
        return precision
    if accelerator not in ("cpu", "auto", "gpu", "cuda"):
        return "32-true"
    if accelerator != "cpu" and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        flags = torch.cpu.get_capabilities()
        native = bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))
    return "bf16-mixed" if native else "32-true"


def autocast(device_type: str, precision: str) -> torch.autocast:
    """Return the context in which a precision that `resolve_precision` gave computes."""
    kind = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    return torch.autocast(device_type, kind or torch.bfloat16, enabled=kind is not None)


class LargeRasterORModel(pl.LightningModule):
    """A detector and how it learns.

    Args:
        label_set: Names of the classes; their ids are their places in sorted order.
        conf: Configuration, or what its `to_dict` returned.
        contract: What the data is like, or that as a dictionary.

    All of it is saved in every checkpoint, so that
    `LargeRasterORModel.load_from_checkpoint(path)` needs nothing else.
    """

    def __init__(
        self,
        label_set: Iterable[str],
        conf: ModelConfig | Mapping[str, Any],
        contract: DataContract | Mapping[str, Any],
        code_version: str = __version__,
    ) -> None:
        """Build the network with random weights; see `load_pretrained`."""
        super().__init__()
        self.labels = sorted(label_set)
        self.conf = conf if isinstance(conf, ModelConfig) else ModelConfig.from_dict(conf)
        self.contract = contract if isinstance(contract, DataContract) else DataContract(**contract)
        self.save_hyperparameters(
            {"label_set": self.labels, "conf": self.conf.to_dict(),
             "contract": _plain(asdict(self.contract)), "code_version": code_version}
        )  # fmt: skip
        self.network = TileRetinaNet(len(self.labels), self.conf, self.contract)
        self.network = self.network.to(memory_format=torch.channels_last)
        # Score from which a detection counts, found on validation ground; NaN until then.
        self.register_buffer("operating_threshold", torch.tensor(float("nan")))
        self.collector = metrics.GroundCollector()
        self.evaluation: metrics.Evaluation | None = None  # the last one
        self.grounds: dict[int, metrics.Ground] = {}  # what it was computed on

    def load_pretrained(self) -> None:
        """Load the backbone's weights that the configuration names, before training.

        Raises:
            InputError: See `make_backbone`.
        """
        if self.conf.weights:
            backbone = make_backbone(self.conf, len(self.contract.bands), load=True)
            self.network.backbone.load_state_dict(backbone.state_dict())

    def limit_detections(self, tile_size: int, score_threshold: float) -> int:
        """Set which detections of a tile are returned: those above a score, at most so many.

        A tile of another size than the training's may hold more objects, or fewer.

        Returns:
            The most detections of a tile.
        """
        share = (tile_size / self.contract.tile_size) ** 2
        limit = max(100, math.ceil(self.contract.detections_per_tile * share))
        self.network.score_thresh = score_threshold
        self.network.detections_per_img = limit
        self.network.topk_candidates = max(1000, 2 * limit)
        return limit

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        """Detect objects on stretched tiles (B, bands, H, W): `boxes, scores, labels` per tile."""
        return self.network(images)[1]

    def _common_step(self, batch: Batch, stage: str) -> Tensor:
        images, targets = batch
        losses, detections = self.network(images, targets, detect=self._measures(stage))
        loss = torch.stack(list(losses.values())).sum()
        values = {"loss": loss, **{f"{name}_loss": value for name, value in losses.items()}}
        self.log_dict(
            {f"{STAGES[stage]}{name}": value.detach() for name, value in values.items()},
            on_step=stage == "train", on_epoch=True, batch_size=len(images), prog_bar=False,
        )  # fmt: skip
        if self._measures(stage):
            self.collector.add(detections, targets)
        return loss

    def _measures(self, stage: str) -> bool:
        if stage == "validation" and self.trainer.state.fn == "fit":
            return (self.current_epoch + 1) % self.conf.validation.pr_compute_interval == 0
        return stage != "train"

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self._common_step(batch, "train")

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Log the loss of a batch and collect its detections."""
        return self._common_step(batch, "validation")

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Log the loss of a batch and collect its detections."""
        return self._common_step(batch, "test")

    def on_train_start(self) -> None:
        """Say where the training runs, and start the clock of its progress lines."""
        log.info(
            "training on %s in %s: %d steps",
            self.device, self.trainer.precision, self.trainer.estimated_stepping_batches,
        )  # fmt: skip
        self._started = time.monotonic()

    def on_train_epoch_end(self) -> None:
        """Log a line of progress."""
        done, epochs = self.current_epoch + 1, self.trainer.max_epochs
        elapsed = time.monotonic() - self._started
        known = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        names = ["val_loss", *(["val_AP50", "val_box_f1"] if self._measures("validation") else [])]
        shown = [f"{name} {known[name]:.3f}" for name in names if name in known]
        log.info(
            "epoch %d of %d: %s; %.0f s, about %.0f s to go", done, epochs, ", ".join(shown),
            elapsed, elapsed / done * (epochs - done),
        )  # fmt: skip

    def on_validation_start(self) -> None:
        """Keep detections from the validation's score threshold on."""
        self.network.score_thresh = self.conf.validation.score_threshold

    def on_test_start(self) -> None:
        """Keep detections from the test's score threshold on."""
        self.network.score_thresh = self.conf.test.score_threshold

    def on_validation_epoch_end(self) -> None:
        """Measure the validation ground, every `pr_compute_interval` epochs and when asked to."""
        if not self._measures("validation"):
            return
        self._evaluate("validation", self.conf.validation.iou_threshold, None)
        if self.trainer.state.fn != "fit":
            self.operating_threshold.fill_(self.evaluation.values["score_threshold"])

    def on_test_epoch_end(self) -> None:
        """Measure the test ground at the threshold found on validation."""
        threshold = float(self.operating_threshold)
        if np.isnan(threshold):
            raise InputError(
                "the model has no operating threshold yet; validate it before testing, so that the "
                "threshold does not come from the test itself"
            )
        self._evaluate("test", self.conf.test.iou_threshold, threshold)

    def _evaluate(self, stage: str, iou_threshold: float, score_threshold: float | None) -> None:
        self.grounds = self.collector.merge(self.conf.nms_threshold)
        self.evaluation = metrics.evaluate(
            self.grounds, self.labels, iou_threshold, score_threshold
        )
        values = self.evaluation.values.items()
        prefix = "" if stage == "test" else STAGES[stage]  # the test's names are the product's
        self.log_dict({f"{prefix}{name}": value for name, value in values})

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW or SGD, the rate rising linearly, then falling along a half cosine, per step."""
        train = self.conf.train
        weights = [p for p in self.parameters() if p.requires_grad and p.ndim > 1]
        others = [p for p in self.parameters() if p.requires_grad and p.ndim <= 1]
        # biases and norms are not decayed, they carry no capacity to shrink
        groups = [
            {"params": weights, "weight_decay": train.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        # one kernel for all weights; with gradient scaling it would unscale after the clipping
        fused = self.trainer.precision != "16-mixed"
        if train.optimizer == "adamw":
            optimizer = torch.optim.AdamW(groups, lr=train.lr, fused=fused)
        else:
            optimizer = torch.optim.SGD(groups, train.lr, train.momentum, fused=fused)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = partial(_warm_up_and_cosine, steps=steps, warmup=train.warmup_share)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm; Lightning's own way refuses fused optimisers in mixed precision."""
        nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def create_trainer(
        self,
        logger: Any = None,  # noqa: ANN401 - whatever Lightning takes
        callbacks: Sequence[pl.Callback] = (),
        *,
        progress: bool = False,
        root_dir: Path | None = None,
    ) -> pl.Trainer:
        """Return a trainer set up by the configuration.

        Args:
            logger: One or several Lightning loggers, or None.
            callbacks: Further callbacks.
            progress: Show bars.
            root_dir: Where Lightning may write.
        """
        precision = resolve_precision(self.conf.precision, self.conf.accelerator)
        trainer = pl.Trainer(
            max_epochs=self.conf.train.epochs,
            accelerator=self.conf.accelerator,
            devices=self.conf.devices,
            precision=precision,
            gradient_clip_val=self.conf.train.gradient_clip,
            logger=logger or False,
            callbacks=list(callbacks),
            deterministic="warn",
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            enable_progress_bar=progress,
            enable_model_summary=False,
            default_root_dir=root_dir,
        )
        if trainer.world_size > 1:
            raise InputError(
                f"training on {trainer.world_size} devices would measure each device's share of "
                "the ground on its own; set DEVICES = 1"
            )
        return trainer


def _warm_up_and_cosine(step: int, *, steps: int, warmup: float) -> float:
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return 0.01 + 0.99 * 0.5 * (1 + float(np.cos(np.pi * min(done, 1.0))))


def _plain(value: object) -> object:
    # checkpoints hold plain containers only, so that they load without running code
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
