"""The detector as a Lightning module: how the network learns, and what it is measured by.

Tensors in, losses and detections out; paths and tables stay outside.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

import imutils
import metrics
import ranks
from catalogue import Detections, fuse_views
from datasets import Batch
from ImageData import InputError
from learning import (
    VIEWS,
    DivergedError,
    ProgressLines,
    TileModel,
    __version__,
    autocast,
    resolve_precision,
)
from ModelConfig import ModelConfig
from networks import (
    LAST_LEVEL,
    Anchors,
    DataContract,
    TileRetinaNet,
    candidates_limit,
    fit_weights,
    freeze_stages,
    make_backbone,
)

__all__ = [  # with what users of the detector need beside it
    "BEST_BY",
    "VIEWS",
    "DivergedError",
    "LargeRasterORModel",
    "ProgressLines",
    "__version__",
    "autocast",
    "detect_views",
    "resolve_precision",
]

log = logging.getLogger(__name__)

BEST_BY = "val_AP50"  # the epoch and the trial that are kept; never by the test's
FUSE_IOU = 0.55  # above which views show the same object; that of the method's authors


def detect_views(
    model: nn.Module,
    tiles: Tensor,
    views: Sequence[tuple[int, bool]],
    scales: Sequence[float] = (1.0,),
    least_score: float = 0.0,
) -> tuple[list[Detections], list[int]]:
    """Detect on views of square tiles (B, bands, side, side), and fuse what they show.

    Args:
        model: Detects on tiles, given their frame; see `TileRetinaNet.forward`.
        tiles: Stretched.
        views: Quarter turns and whether mirrored before, of each.
        scales: Factors by which tiles are enlarged, in every view.
        least_score: From which on detections are counted.

    Returns:
        Per tile the detections, in px of the tile, and the most of that score that a view shows.
    """
    side = tiles.shape[-1]
    by_view = []
    for (turns, mirrored), scale in itertools.product(views, scales):
        seen = torch.rot90(tiles.flip(3) if mirrored else tiles, turns, dims=(2, 3))
        if scale != 1:
            size = (round(side * scale),) * 2
            seen = nn.functional.interpolate(seen, size, mode="bilinear", antialias=True)
        enlarged = seen.shape[-1] / side
        frame = torch.tensor(enlarged * imutils.turn_matrix(90 * turns, mirrored=mirrored))
        by_tile = []
        for found in model(seen, frame):
            boxes = found["boxes"].cpu().double().numpy() / enlarged
            boxes = imutils.rotate_boxes(boxes, -90 * turns % 360, side, side)
            if mirrored:
                boxes[:, [0, 2]] = side - boxes[:, [2, 0]]
            scores, ids = (found[name].cpu().numpy() for name in ("scores", "labels"))
            by_tile.append(Detections(boxes, scores.astype(np.float32), ids))
        by_view.append(by_tile)
    of_tiles = list(zip(*by_view, strict=True))
    most = [max(int((f.scores >= least_score).sum()) for f in found) for found in of_tiles]
    if len(by_view) == 1:
        return by_view[0], most
    return [fuse_views(found, FUSE_IOU) for found in of_tiles], most


class LargeRasterORModel(TileModel):
    """A detector and how it learns.

    Args:
        label_set: Names of the classes; their ids are their places in sorted order.
        conf: Configuration, or what its `to_dict` returned.
        contract: What the data is like, or that as a dictionary.

    All of it is saved in every checkpoint, so that
    `LargeRasterORModel.load_from_checkpoint(path)` needs nothing else.
    """

    TASK = "detection"
    BEST_BY = BEST_BY
    RANK_BY = "AP50"
    LOSSES = ("loss", "classification_loss", "bbox_regression_loss")
    SHOWN = ("val_AP50", "val_box_f1")

    def __init__(
        self,
        label_set: Iterable[str],
        conf: ModelConfig | Mapping[str, Any],
        contract: DataContract | Mapping[str, Any],
        code_version: str = __version__,
    ) -> None:
        """Build the network with random weights; see `load_pretrained`."""
        super().__init__(sorted(label_set), conf, contract, code_version)
        self.network = TileRetinaNet(len(self.labels), self.conf, self.contract)
        self.network = self.network.to(memory_format=torch.channels_last)
        # Score from which a detection counts, found on validation ground; NaN until then.
        self.register_buffer("operating_threshold", torch.tensor(float("nan")))
        self.collector = metrics.GroundCollector()
        # the last evaluation, and what it was computed on; of rank 0 only
        self.evaluation: metrics.Evaluation | None = None
        self.grounds: dict[int, metrics.Ground] = {}

    def load_pretrained(self) -> None:
        """Load the weights that the configuration starts from, before training.

        Raises:
            InputError: See `make_backbone` and `fit_weights`; or the checkpoint to start from
                cannot be read, or is of another architecture.
        """
        if self.conf.init_from:
            self._start_from(self.conf.init_from)
        elif self.conf.weights:
            backbone = make_backbone(
                self.conf, self.contract.channels, self.contract.anchors.finest_level, load=True
            )
            self.network.backbone.load_state_dict(backbone.state_dict())
        freeze_stages(self.network.backbone, self.conf.freeze_stages)

    def _start_from(self, path: str) -> None:
        labels, state = self._read_start(path)
        fit_weights(self.network, state, self.labels, labels)

    @override
    @staticmethod
    def _architecture(conf: ModelConfig, contract: Mapping[str, Any]) -> dict[str, Any]:
        return conf.architecture() | Anchors(**contract["anchors"]).architecture()

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
        self.network.topk_candidates = candidates_limit(limit)
        return limit

    def forward(self, images: Tensor, frame: Tensor | None = None) -> list[dict[str, Tensor]]:
        """Detect objects on stretched tiles (B, bands, H, W): `boxes, scores, labels` per tile.

        Args:
            images: float32.
            frame: See `TileRetinaNet.forward`.
        """
        return self.network(images, frame=frame)[1]

    def _common_step(self, batch: Batch, stage: str) -> tuple[Tensor, Tensor]:
        """Return the loss, and `LOSSES` with the number of tiles, float64, on the CPU."""
        images, targets = batch
        measures = self._collects(stage)
        fused = measures and self.conf.views != "none" and self.trainer.state.fn != "fit"
        losses, detections = self.network(images, targets, detect=measures and not fused)
        loss = torch.stack(list(losses.values())).sum()
        values = torch.stack([loss, *losses.values()]).detach().cpu().double()
        full = 0
        if measures:
            counted = float(self.operating_threshold) if stage == "test" else 0.0
            most = [int((found["scores"] >= counted).sum()) for found in detections]
            if fused:
                views = VIEWS[self.conf.views]
                seen, most = detect_views(self, images, views, least_score=counted)
                detections = [
                    {"boxes": torch.from_numpy(found.boxes).float(),
                     "scores": torch.from_numpy(found.scores),
                     "labels": torch.from_numpy(found.ids)}
                    for found in seen
                ]  # fmt: skip
            self.collector.add(detections, targets)
            full = sum(count >= self.network.detections_per_img for count in most)
        return loss, torch.cat([values, torch.tensor([len(images), full])])

    @override
    def _moving_buffers(self) -> list[Tensor]:
        return [self.network.offset, *super()._moving_buffers()]

    @override
    def _loss_of_tile(self, images: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        losses, _ = self.network(images, [target], detect=False)
        return torch.stack(list(losses.values())).sum()

    @override
    def tile_difficulty(self) -> Tensor:
        return self.network.background_loss

    def on_validation_start(self) -> None:
        """Keep detections from the validation's score threshold on."""
        self.network.score_thresh = self.conf.validation.score_threshold

    def on_test_start(self) -> None:
        """Keep detections from the test's score threshold on."""
        self.network.score_thresh = self.conf.test.score_threshold

    def on_test_epoch_end(self) -> None:
        """Measure the test ground at the threshold found on validation."""
        if np.isnan(float(self.operating_threshold)):
            raise InputError(
                "the model has no operating threshold yet; validate it before testing, so that the "
                "threshold does not come from the test itself"
            )
        if full := self._mean_losses("test"):
            log.warning(
                "%d tiles of the test ground show %d detections of the chosen threshold or above, "
                "and no more are kept; set detections_per_tile in MODEL_OPTIONS",
                full, self.network.detections_per_img,
            )  # fmt: skip
        self._measure("test")

    @override
    def _measure(self, stage: str) -> None:
        threshold = float(self.operating_threshold) if stage == "test" else None
        measured = {"validation": self.conf.validation, "test": self.conf.test}[stage]
        self.grounds, self.evaluation = self.collector.merge(self.conf.nms_threshold), None
        if ranks.rank() == 0:
            self.evaluation = metrics.evaluate(
                self.grounds, self.labels, measured.iou_threshold, threshold,
                resamples=metrics.RESAMPLES if stage == "test" else 0,  # intervals are of the test
            )  # fmt: skip
        values = self._log_values(stage, self.evaluation and self.evaluation.values)
        if stage == "validation" and self.trainer.state.fn != "fit":
            self.operating_threshold.fill_(values["score_threshold"])

    @override
    def learnt_values(self) -> dict[str, float]:
        right, down = self.network.offset.tolist()
        return {"offset_x": right, "offset_y": down}

    @override
    def describe(self) -> str:
        fitted = self.contract.anchors
        return (
            f"{self.conf.backbone}, norm {self.conf.architecture()['norm']}, "
            f"P{fitted.finest_level}-P{LAST_LEVEL} of {self.conf.fpn_channels} channels, input "
            f"enlarged by {fitted.input_scale:g}; anchors of {fitted.sizes} px, ratios "
            f"{fitted.aspect_ratios}; up to {self.contract.detections_per_tile} detections per "
            f"tile, of {self.network.topk_candidates} candidates per level"
        )
