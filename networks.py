"""The network: a one-stage detector for small objects, and the weights that it starts from.

Images and boxes in, losses and detections out; nothing here knows of epochs, tables or a run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torchvision import models, ops
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import RetinaNetHead

import metrics
import ranks
from datasets import Target
from ImageData import InputError
from imutils import Radiometry
from ModelConfig import AuxiliaryOptions, ModelConfig

log = logging.getLogger(__name__)

LAST_LEVEL = 6  # of the pyramid; the places of level P lie 2**P px of the input apart
GOOD_ANCHOR = 0.5  # IoU of an object with its best anchor from which the fit is a good one
OFFSET_PACE = 0.02  # weight of a training step in the running median of what boxes are missed by
P2_FROM, P3_FROM = 6.0, 32.0  # px of the input, smallest anchor that these levels begin with
SIZE_DIVISOR = 32  # stride of the deepest feature map of a backbone
BACKGROUND, NEITHER = -1, -2  # what an anchor learns that no object has chosen
BOX_LOSSES = {
    "giou": ops.generalized_box_iou_loss,
    "diou": ops.distance_box_iou_loss,
    "ciou": ops.complete_box_iou_loss,
}


@dataclass
class Anchors:
    """What the network compares objects with, and how large it sees the tile.

    Attributes:
        sizes: Sides of the anchors on each level of the pyramid, px of the tile.
        aspect_ratios: Height over width, of every size.
        finest_level: 1 (P1, places 2 px apart), 2 or 3; the coarsest is P6.
        input_scale: Factor by which the network enlarges its input.
    """

    sizes: tuple[tuple[float, ...], ...]
    aspect_ratios: tuple[float, ...]
    finest_level: int
    input_scale: float = 1.0

    def architecture(self) -> dict[str, object]:
        """Return what decides which weights fit."""
        return {"finest_level": self.finest_level, "aspect_ratios": tuple(self.aspect_ratios)}


def fit_anchors(boxes_xyxy: np.ndarray, conf: ModelConfig | None = None) -> Anchors:
    """Fit anchors to the boxes (N, 4) of the training ground, px.

    The smallest anchor meets the smaller objects (second percentile of the square root of the
    area), which also decides the finest level of the pyramid: P2 from 6 px on, as craters of 7 px
    are learnt better on it than on P1 in equal minutes. Each level looks for objects twice as large
    as the one before it, or larger, so that the coarsest meets the larger objects (98th
    percentile). Elongated anchors join when a tenth of the boxes is longer than 1.5 times its
    width, either way.

    Args:
        boxes_xyxy: Of the objects.
        conf: May set the smallest anchor, the finest level, the ratios, the enlargement.

    References: Lin et al. 2017, Focal loss, section 4, who fix the smallest at 32 px and the finest
    level at P3; we take both from the data.
    """
    if not len(boxes_xyxy):
        raise InputError("anchors need at least one training box")
    conf = conf or ModelConfig()
    width, height = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).clip(1e-6).T
    small, large = np.quantile(np.sqrt(width * height), [0.02, 0.98])
    smallest = conf.smallest_anchor or float(max(small, 4.0))
    fitting = 1 + int(np.searchsorted([P2_FROM, P3_FROM], smallest * conf.input_scale, "right"))
    finest = conf.finest_level or fitting
    levels, steps = LAST_LEVEL - finest + 1, conf.anchors_per_level
    growth = max(2.0, (large / smallest) ** (1 / (levels - 1)))
    sizes = tuple(
        tuple(round(smallest * growth ** (level + step / steps), 2) for step in range(steps))
        for level in range(levels)
    )
    elongated = np.abs(np.log(width / height)) > np.log(1.5)
    ratios = conf.aspect_ratios or ((0.5, 1.0, 2.0) if elongated.mean() > 0.1 else (1.0,))
    return Anchors(sizes, ratios, finest, conf.input_scale)


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


def good_anchor_share(anchors: Anchors, boxes_xyxy: np.ndarray) -> float:
    """Return the share of the boxes (N, 4) whose best anchor has an IoU above `GOOD_ANCHOR`."""
    return float((best_anchor_iou(anchors, boxes_xyxy) > GOOD_ANCHOR).mean())


@dataclass
class DataContract:
    """What a checkpoint says of the data it was trained on, and asks of data to come.

    Attributes:
        tile_size: Side of the tiles, px.
        bands: One-based indexes of the bands read of a file, in their order; of the first of the
            training's, where `mixed_bands`.
        band_count: Number of bands of the files, without alpha.
        dtype: Type of the raw pixels.
        radiometry: How they, and auxiliary bands, become input.
        resolution: Side of a pixel on the ground in metres, None without a CRS.
        split_hash: Fingerprint of the ground blocks; the test ground of the same hash is unseen.
        evaluation_overlap: Overlap of neighbouring tiles that fits the largest object, px.
        anchors: Of a detector, see `fit_anchors`.
        detections_per_tile: Of a detector, most detections kept of a tile.
        auxiliary: Which bands are added to those of a file; None: none.
        mixed_bands: Whether other bands were read of some files than of others.
        resolution_range: Least and largest of the training's files; None: they have `resolution`.
    """

    tile_size: Annotated[int, Field(ge=1)]
    bands: tuple[int, ...]
    band_count: int
    dtype: str
    radiometry: Radiometry
    resolution: float | None
    split_hash: str
    evaluation_overlap: int
    anchors: Anchors | None = None
    detections_per_tile: Annotated[int, Field(ge=1)] | None = None
    auxiliary: AuxiliaryOptions | None = None
    mixed_bands: bool = False
    resolution_range: tuple[float, float] | None = None

    @property
    def channels(self) -> int:
        """Number of bands of the input, auxiliary ones included."""
        return len(self.bands) + (self.auxiliary.count if self.auxiliary else 0)


def detections_limit(densest: int) -> int:
    """Return the most detections to keep of a tile, given the objects in the densest one."""
    return max(100, 2 * densest)


def candidates_limit(detections: int) -> int:
    """Return the most candidates to keep on a level, given the most detections of a tile.

    Several anchors find the same object, most of the time on one level.
    """
    return max(1000, 5 * detections)


class ExactAnchors(AnchorGenerator):
    """Torchvision's anchors, whose sides it would round to even pixels: 7 and 9 px both to 8."""

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Return the anchors (A, 4) of a place, xyxy px around it, ratio by ratio."""
        sides = torch.as_tensor(scales, dtype=dtype, device=device)
        ratio = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        half = torch.stack([sides / ratio, sides * ratio], dim=-1).view(-1, 2) / 2
        return torch.cat([-half, half], dim=1)

    def on_grids(self, grids: Sequence[tuple[int, int, float]], device: torch.device) -> Tensor:
        """Return all anchors (A, 4) of levels, in full precision whatever the features have.

        Args:
            grids: See `assign_anchors`.
            device: Where.
        """
        self.set_cell_anchors(torch.float32, device)
        strides = [[torch.tensor(stride, device=device)] * 2 for _, _, stride in grids]
        return torch.cat(self.grid_anchors([grid[:2] for grid in grids], strides))


def assign_anchors(
    boxes: Tensor, anchors: Tensor, grids: Sequence[tuple[int, int, float]]
) -> Tensor:
    """Choose the anchors that learn to find each object, by what the object itself offers.

    Its candidates are, on every level, the anchors at the places around its centre. Those fit whose
    IoU with it is at least mean plus standard deviation of all its candidates', if they are centred
    on it; the best one fits in any case. An anchor that fits several objects goes to the one it
    overlaps best. Time and memory grow with the objects, not with objects times anchors.

    Args:
        boxes: (N, 4), xyxy px.
        anchors: (A, 4), xyxy px, level by level, row by row, all of a place together.
        grids: Per level its rows, columns, and the distance of neighbouring places in px; the first
            place lies at (0, 0).

    Returns:
        int64 (A,): the object that the anchor learns, or `BACKGROUND`.

    References:
        Zhang et al. 2020, Adaptive training sample selection, algorithm 1. Its candidates are the
        nine nearest places of a level, ours the three by three around the nearest.
    """
    match = torch.full((len(anchors),), BACKGROUND, device=anchors.device)
    if not len(boxes):
        return match
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    offsets = torch.arange(-1, 2, device=boxes.device)
    candidates, first = [], 0
    per_place = len(anchors) // sum(rows * columns for rows, columns, _ in grids)
    for rows, columns, stride in grids:
        x, y = (centre / stride).round().long().unbind(dim=1)
        x, y = x[:, None, None] + offsets, y[:, None, None] + offsets[:, None]
        inside = (x >= 0) & (x < columns) & (y >= 0) & (y < rows)
        place = torch.where(inside, y * columns + x, -1).flatten(1)
        index = first + place[..., None] * per_place + torch.arange(per_place, device=place.device)
        candidates.append(torch.where(place[..., None] >= 0, index, -1).flatten(1))
        first += rows * columns * per_place
    index = torch.cat(candidates, dim=1)
    real = index >= 0
    anchor, box = anchors[index.clamp(min=0)], boxes[:, None]
    shared = (
        torch.minimum(anchor[..., 2:], box[..., 2:]) - torch.maximum(anchor[..., :2], box[..., :2])
    ).clamp(min=0).prod(dim=-1)  # fmt: skip
    areas = (anchor[..., 2:] - anchor[..., :2]).prod(-1) + (box[..., 2:] - box[..., :2]).prod(-1)
    iou = torch.where(real, shared / (areas - shared), torch.nan)
    mean = iou.nanmean(dim=1, keepdim=True)
    deviation = (iou - mean).square().nanmean(dim=1, keepdim=True).sqrt()
    at = (anchor[..., :2] + anchor[..., 2:]) / 2
    centred = ((at > box[..., :2]) & (at < box[..., 2:])).all(dim=-1)
    fits = (iou >= mean + deviation) & centred  # never where it is NaN
    iou = iou.nan_to_num(-1.0)
    fits.scatter_(1, iou.argmax(dim=1, keepdim=True), value=True)
    fits &= real  # the centre may lie far off the tile

    obj, place = fits.nonzero(as_tuple=True)
    chosen, value = index[obj, place], iou[obj, place]
    best = anchors.new_full((len(anchors),), -1.0)
    best.scatter_reduce_(0, chosen, value, "amax")
    wins = value == best[chosen]
    match[chosen[wins]] = obj[wins]
    return match


class TileRetinaNet(RetinaNet):
    """Torchvision's RetinaNet on tiles of one size, made for small objects.

    Unlike its parent it takes a batch (B, bands, H, W), enlarges it by a factor of its own, chooses
    anchors by `assign_anchors`, learns boxes by their overlap, and returns losses and detections
    from one pass. All boxes are in px of the tile.

    Attributes:
        offset: Where annotated boxes lie, seen from the objects, (x, y) in px of the raster:
            catalogues count pixels from their corners or their centres, from 0 or from 1, and round
            or cut. It is the running median of what training boxes are missed by, told from the
            looks of objects by staying where it is while tiles are mirrored and turned; where they
            are not, it stays 0 and the box head learns it.
        background_loss: Of the last batch with targets, (B,): how wrong it is off all objects;
            where hard negatives are asked for.
    """

    def __init__(self, classes: int, conf: ModelConfig, contract: DataContract) -> None:
        """Assemble backbone, pyramid, anchors and head."""
        anchors = ExactAnchors(
            contract.anchors.sizes, (contract.anchors.aspect_ratios,) * len(contract.anchors.sizes)
        )
        head = RetinaNetHead(
            conf.fpn_channels,
            anchors.num_anchors_per_location()[0],
            classes,
            norm_layer=_group_norm,
        )
        for branch in (head.classification_head, head.regression_head):
            branch.conv = branch.conv[: conf.head_depth]
        super().__init__(
            make_backbone(conf, contract.channels, contract.anchors.finest_level),
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
            topk_candidates=candidates_limit(contract.detections_per_tile),
        )
        self.conf, self.fitted = conf, contract.anchors
        self.register_buffer("offset", torch.zeros(2))
        augment = conf.train.augment
        self.follows_offset = conf.train.learn_offset and augment.enabled and augment.turns

    def forward(
        self,
        images: Tensor,
        targets: Sequence[Target] | None = None,
        *,
        detect: bool = True,
        frame: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """Return the losses, if there are targets, and the detections, if asked for.

        Args:
            images: float32 (B, bands, H, W), stretched.
            targets: Per tile `boxes` (N, 4) xyxy px, `labels` (N,) and, where some of it is ground
                that does not count, `counted` (H, W); where tiles are not as they lie in the
                raster, `frames` (N, 2, 2), see `datasets`.
            detect: Whether to decode detections.
            frame: Takes a step in px of the raster to the step in px of the tiles to detect on,
                (2, 2); None: they are the same.

        Returns:
            `{"classification", "bbox_regression"}`, or empty; and per tile `boxes, scores, labels`,
            falling by score, or empty.
        """
        size_hw = images.shape[-2:]
        mean, std = (
            torch.as_tensor(values, dtype=images.dtype, device=images.device)[:, None, None]
            for values in (self.transform.image_mean, self.transform.image_std)
        )
        batch = (images - mean) / std
        scale = self.fitted.input_scale
        if scale != 1:
            batch = nn.functional.interpolate(batch, scale_factor=scale, mode="bilinear")
        bottom, right = (-side % SIZE_DIVISOR for side in batch.shape[-2:])
        batch = nn.functional.pad(batch, (0, right, 0, bottom))
        features = list(self.backbone(batch.contiguous(memory_format=torch.channels_last)).values())
        # losses and boxes want full precision, whatever the convolutions run in
        outputs = {name: value.float() for name, value in self.head(features).items()}
        grids = [
            (*f.shape[-2:], 2**level / scale)
            for level, f in enumerate(features, start=self.fitted.finest_level)
        ]
        anchors = self.anchor_generator.on_grids(grids, batch.device)
        losses = {}
        if targets is not None:
            losses = self.compute_loss(list(targets), outputs, anchors, grids)
        if not detect:
            return losses, []
        per_place = self.anchor_generator.num_anchors_per_location()[0]
        counts = [rows * columns * per_place for rows, columns, _ in grids]
        by_level = {name: list(value.split(counts, dim=1)) for name, value in outputs.items()}
        frame = torch.eye(2) if frame is None else frame
        with torch.no_grad():
            # boxes are decoded about the anchors, and cut at the tile's edge after that
            anchors = anchors + self._offset_in(frame.to(self.offset)[None])
            detections = self.postprocess_detections(
                by_level, [list(anchors.split(counts))] * len(batch), [tuple(size_hw)] * len(batch)
            )
        return losses, detections

    def compute_loss(
        self,
        targets: list[Target],
        head_outputs: dict[str, Tensor],
        anchors: Tensor,
        grids: Sequence[tuple[int, int, float]],
    ) -> dict[str, Tensor]:
        """Sum the losses over the anchors of a batch, per anchor that learns an object.

        On ground that does not count, none learns background.

        Args:
            targets: Per tile, see `forward`.
            head_outputs: `cls_logits` (B, A, classes) and `bbox_regression` (B, A, 4).
            anchors: (A, 4), the same for every tile.
            grids: See `assign_anchors`.

        References:
            Lin et al. 2017, Focal loss, which averages per image; we do so over the batch, in
            training those of all ranks, so that an object weighs the same in a full tile and in an
            empty one.
        """
        frames = [_frames_of(target) for target in targets]
        objects = [
            target["boxes"] - self._offset_in(frame)
            for target, frame in zip(targets, frames, strict=True)
        ]
        matches = []
        for target, boxes in zip(targets, objects, strict=True):
            match = assign_anchors(boxes, anchors, grids)
            if "counted" in target:
                stray = ~metrics.counted_at_centers(target["counted"], anchors)
                match[(match == BACKGROUND) & stray] = NEITHER
            matches.append(match)
        match = torch.stack(matches)
        logits, deltas = head_outputs["cls_logits"], head_outputs["bbox_regression"]
        tile, anchor = (match >= 0).nonzero(as_tuple=True)
        firsts = torch.tensor([0, *(len(t["boxes"]) for t in targets)], device=match.device)
        learnt = match[tile, anchor] + firsts.cumsum(0)[tile]
        truth, labels = (torch.cat([t[name] for t in targets]) for name in ("boxes", "labels"))

        wanted = torch.zeros_like(logits)
        wanted[tile, anchor, labels[learnt]] = 1.0
        focal = ops.sigmoid_focal_loss(
            logits, wanted, alpha=self.conf.focal_alpha, gamma=self.conf.focal_gamma
        ).sum(dim=-1)
        if self.conf.train.hard_negatives:
            on_objects = torch.stack([_lie_on(anchors, boxes) for boxes in objects])
            empty = (match == BACKGROUND) & ~on_objects
            self.background_loss = (focal.detach() * empty).sum(dim=1)
        boxes = self.box_coder.decode_single(deltas[tile, anchor], anchors[anchor])
        frame, truth = torch.cat(frames)[learnt], truth[learnt]
        overlap = BOX_LOSSES[self.conf.box_loss](boxes + self._offset_in(frame), truth)
        if self.training and self.follows_offset and len(learnt):
            self._follow_offset((truth - boxes).detach().unflatten(1, (2, 2)).mean(dim=1), frame)
        count = len(learnt)
        if self.training:  # of all ranks, so that together they learn as one would from all tiles
            count = float(ranks.summed(torch.tensor(float(count)))) / ranks.count()
        count = max(1 / ranks.count(), count)
        return {
            "classification": focal[match != NEITHER].sum() / count,
            "bbox_regression": self.conf.box_loss_weight * overlap.sum() / count,
        }

    def _offset_in(self, frames: Tensor) -> Tensor:
        """Return by how much boxes in frames (N, 2, 2) are moved, (N, 4), px of the tile."""
        return (frames * self.offset).sum(dim=-1).repeat(1, 2)  # in full precision, unlike @

    def _follow_offset(self, misses: Tensor, frames: Tensor) -> None:
        """Take note of what boxes in frames (N, 2, 2) were missed by, (N, 2), px of the tile."""
        steps = (torch.linalg.inv_ex(frames).inverse * misses[:, None]).sum(dim=-1)
        self.offset.lerp_(steps.quantile(0.5, dim=0), OFFSET_PACE)


def _frames_of(target: Target) -> Tensor:
    boxes = target["boxes"]
    if "frames" in target:
        return target["frames"]
    return torch.eye(2, device=boxes.device).expand(len(boxes), 2, 2)


def _lie_on(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Tell which anchors (A, 4) have their centre on any of the boxes (N, 4)."""
    centre = (anchors[:, None, :2] + anchors[:, None, 2:]) / 2
    lies = torch.zeros(len(anchors), dtype=torch.bool, device=anchors.device)
    for some in boxes.split(64):  # all at once would fill the memory
        lies |= ((centre > some[:, :2]) & (centre < some[:, 2:])).all(dim=-1).any(dim=-1)
    return lies


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // math.gcd(channels, 16), channels)


NORMS = {"group": _group_norm, "batch": nn.BatchNorm2d, "frozen": ops.FrozenBatchNorm2d}


def make_backbone(
    conf: ModelConfig, bands: int, finest_level: int = 2, *, load: bool = False
) -> BackboneWithFPN:
    """Build the feature pyramid on a torchvision backbone for any number of bands.

    Args:
        conf: Names backbone, width and weights.
        bands: Number of input bands.
        finest_level: First level of the pyramid, see `Anchors`; the last is P6.
        load: Whether to load the weights that are named; a checkpoint brings its own.

    Raises:
        InputError: The weights are neither a file nor known, or cannot be downloaded.
    """
    norm_layer = NORMS[conf.architecture()["norm"]]
    body = getattr(models, conf.backbone)(weights=None, norm_layer=norm_layer)
    first = "features.0.0" if hasattr(body, "features") else "conv1"
    _set_bands(body, first, bands)
    if conf.weights and load:
        state = load_weights(conf.backbone, conf.weights)
        if f"{first}.weight" in state:
            state[f"{first}.weight"] = fit_bands(state[f"{first}.weight"], bands)
        own = body.state_dict().items()
        wanted = {n: v.shape for n, v in own if not n.startswith(("fc.", "classifier."))}
        wanted = {n: v for n, v in wanted.items() if not n.endswith("num_batches_tracked")}
        given = {name: value.shape for name, value in state.items()}
        if wrong := [name for name, shape in wanted.items() if given.get(name) != shape]:
            raise InputError(
                f"weights {conf.weights} do not fit {conf.backbone}: {len(wrong)} tensors are "
                f"missing or of another shape, such as {wrong[:3]}; give weights of that "
                "very architecture"
            )
        body.load_state_dict({name: state[name] for name in wanted}, strict=False)
    # the last module of each stride from 2 to 32, and its channels
    if conf.backbone.startswith("mobilenet"):
        body = body.features
        halving = [i for i, module in enumerate(body) if getattr(module, "_is_cn", False)]
        last = [*(i - 1 for i in halving), len(body) - 1]
        levels = {str(i): body[i].out_channels for i in last}
    else:
        levels = {"relu": body.conv1.out_channels}
        levels |= {f"layer{i + 1}": body.inplanes // 8 * 2**i for i in range(4)}
    used = dict(list(levels.items())[finest_level - 1 :])
    names = {name: str(i) for i, name in enumerate(used)}
    pyramid = BackboneWithFPN(body, names, list(used.values()), conf.fpn_channels)
    pyramid.stages = list(levels)[1:]
    return pyramid


def freeze_stages(backbone: BackboneWithFPN, stages: int) -> None:
    """Keep the first stages of a backbone as they are.

    Args:
        backbone: What `make_backbone` returned.
        stages: 0 for none; 1 for all up to the features of stride 4, the stem with it; 2 up to
            stride 8; 4 for all.

    Raises:
        InputError: What is frozen would still follow the statistics of the batches.
    """
    for name, module in backbone.body.named_children():
        if stages == 0:
            break
        if any(isinstance(m, nn.BatchNorm2d) for m in module.modules()):
            raise InputError(
                "frozen stages must not be normalised by the batch; set the option norm to "
                "'frozen' or 'group', or freeze_stages to 0"
            )
        module.requires_grad_(requires_grad=False)
        stages -= name in backbone.stages


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


def fit_bands(weight: Tensor, bands: int) -> Tensor:
    """Fit the filters (out, in, h, w) of a first convolution to another number of bands.

    Further bands start at zero, so that the response to the first ones stays what it was. One band
    takes the sum of all filters, and one filter is shared out among all bands, so that a grey image
    answers as its copy in all bands does.
    """
    known = weight.shape[1]
    if bands == known:
        return weight
    log.info("first convolution adapted from %d to %d bands", known, bands)
    if bands == 1:
        return weight.sum(dim=1, keepdim=True)
    if known == 1:
        return weight.expand(-1, bands, -1, -1) / bands
    fitted = weight.new_zeros(weight.shape[0], bands, *weight.shape[2:])
    fitted[:, :known] = weight[:, :bands]
    return fitted


def _set_bands(body: nn.Module, path: str, bands: int) -> None:
    old = body.get_submodule(path)
    if bands == old.in_channels:
        return
    new = nn.Conv2d(
        bands, old.out_channels, old.kernel_size, old.stride, old.padding,
        bias=old.bias is not None,
    )  # fmt: skip
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    body.set_submodule(path, new)


def read_checkpoint(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a checkpoint of this product, without running any code in it.

    Returns:
        `label_set, conf, contract`, and the weights of its network.

    Raises:
        InputError: It cannot be read, or is no such checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        known, state = checkpoint["hyper_parameters"], checkpoint["state_dict"]
        ModelConfig.from_dict(known["conf"])
    except Exception as error:
        raise InputError(
            f"INIT_FROM must name a checkpoint of this version of the product, {path} is none "
            f"({type(error).__name__}: {error})"
        ) from error
    prefix = "network."
    network = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    return known, network


def fit_weights(
    network: TileRetinaNet,
    state: Mapping[str, Tensor],
    labels: Sequence[str],
    known_labels: Sequence[str],
) -> None:
    """Start a network from the weights of another one, of the same architecture.

    The first convolution is fitted to the bands, see `fit_bands`. What the head knows of a class it
    keeps by the class's name; of new classes it knows nothing yet.

    Args:
        network: Changed in place.
        state: The other one's `state_dict`.
        labels: Names of the classes, by class id.
        known_labels: Those of the other one.

    Raises:
        InputError: Names the tensors that do not fit.
    """
    own = network.state_dict()
    state = dict(state) | {"offset": own["offset"]}  # the other's is that of other annotations
    first = next(name for name in own if name.endswith(("conv1.weight", "body.0.0.weight")))
    if first in state:
        state[first] = fit_bands(state[first], own[first].shape[1])
    shared = [name for name in labels if name in known_labels]
    to, of = ([list(names).index(name) for name in shared] for names in (labels, known_labels))
    for kind in ("weight", "bias"):
        name = f"head.classification_head.cls_logits.{kind}"
        if name not in state:
            continue
        mine, theirs = (
            values.unflatten(0, (-1, len(names)))
            for values, names in ((own[name].clone(), labels), (state[name], known_labels))
        )
        if mine.shape[0] == theirs.shape[0] and mine.shape[2:] == theirs.shape[2:]:
            mine[:, to] = theirs[:, of]
            state[name] = mine.flatten(0, 1)
    wrong = [name for name, value in own.items() if name not in state
             or state[name].shape != value.shape]  # fmt: skip
    if wrong or state.keys() - own.keys():
        wrong += sorted(state.keys() - own.keys())
        raise InputError(
            f"{len(wrong)} tensors of the checkpoint to start from are missing, of another shape, "
            f"or not known, such as {wrong[:3]}; its architecture is another"
        )
    if fresh := [name for name in labels if name not in known_labels]:
        log.info("the head is re-made: it keeps %s, and starts anew with %s", shared, fresh)
    network.load_state_dict(state)
