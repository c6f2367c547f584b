"""Scores: merged detections of blocks of ground against their objects.

The unit is a block of ground, not a tile: detections of its tiles are merged to raster coordinates,
each object counts once, and objects that reach in from a neighbour's ground are neither demanded
nor held against the detector. Numbers are pooled over all blocks of all rasters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import shapely
import torch
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import batched_nms

import imutils
import tiling

UNMATCHED = -1
IGNORED = -2  # a detection on an ignored object, or on ground that does not count: neither way


@dataclass(frozen=True)
class Ground:
    """Detections and truth of one block of ground, in px of its raster.

    Attributes:
        boxes: float32 (N, 4), xyxy.
        scores: float32 (N,), falling.
        labels: int64 (N,), class ids.
        truth_boxes: float32 (M, 4), xyxy, cut at the block's edge.
        truth_labels: int64 (M,).
        truth_ignored: bool (M,); objects whose centre belongs to other ground.
        stray: bool (N,); detections whose centre lies on ground that does not count.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    truth_boxes: np.ndarray
    truth_labels: np.ndarray
    truth_ignored: np.ndarray
    stray: np.ndarray


def counted_at_centers(counted: torch.Tensor, boxes_xyxy: torch.Tensor) -> torch.Tensor:
    """Tell for boxes (N, 4) whether a mask (H, W) holds at their centres; outside it does not."""
    x, y = ((boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2).floor().long().unbind(dim=1)
    height, width = counted.shape
    inside = (x >= 0) & (y >= 0) & (x < width) & (y < height)
    return inside & counted[y.clamp(0, height - 1), x.clamp(0, width - 1)]


def merge_tiles(
    detections: Sequence[Mapping[str, torch.Tensor]],
    targets: Sequence[Mapping[str, torch.Tensor]],
    nms_threshold: float,
) -> Ground:
    """Merge what the tiles of one block found, and what they know.

    Each tile keeps its own, see `tiling.keep_detections`; of those that two tiles keep, class-aware
    non-maximum suppression keeps the better.

    Args:
        detections: Per tile `boxes` (px of the tile), `scores`, `labels`, `stray`.
        targets: Per tile what `datasets` describes, of the same block.
        nms_threshold: IoU above which the weaker of two detections of a class goes.
    """
    boxes, scores, labels, stray = [], [], [], []
    for found, target in zip(detections, targets, strict=True):
        window, core = target["window"], target["core"]
        on_raster = found["boxes"] + window[:2].repeat(2)
        own = torch.from_numpy(
            tiling.keep_detections(on_raster.numpy(), window.numpy(), core.numpy())
        )
        boxes.append(on_raster[own])
        scores.append(found["scores"][own])
        labels.append(found["labels"][own])
        stray.append(found["stray"][own])
    boxes, scores, labels, stray = map(torch.cat, (boxes, scores, labels, stray))
    keep = batched_nms(boxes, scores, labels, nms_threshold)

    ids = torch.cat([t["truth_ids"] for t in targets]).numpy()
    owned = torch.cat([t["truth_owned"] for t in targets]).numpy()
    order = np.lexsort((~owned, ids))  # the owner of an object first
    first = order[np.unique(ids[order], return_index=True)[1]]
    return Ground(
        boxes[keep].numpy(),
        scores[keep].numpy(),
        labels[keep].numpy(),
        torch.cat([t["truth_boxes"] for t in targets]).numpy()[first],
        torch.cat([t["truth_labels"] for t in targets]).numpy()[first],
        ~owned[first],
        stray[keep].numpy(),
    )


class GroundCollector:
    """Collects tiles while they are evaluated and merges them block by block."""

    def __init__(self) -> None:
        """Start empty."""
        self.tiles: dict[int, tuple[list, list]] = {}

    def add(self, detections: Iterable[Mapping], targets: Iterable[Mapping]) -> None:
        """Keep the detections and targets of a batch, on the CPU."""
        for found, target in zip(detections, targets, strict=True):
            mine = self.tiles.setdefault(int(target["ground"]), ([], []))
            stray = torch.zeros_like(found["labels"], dtype=torch.bool)
            if "counted" in target:  # masks are large, and not kept
                stray = ~counted_at_centers(target["counted"], found["boxes"])
                target = {k: v for k, v in target.items() if k != "counted"}
            for kept, values in zip(mine, ({**found, "stray": stray}, target), strict=True):
                kept.append({name: value.detach().cpu() for name, value in values.items()})

    def merge(self, nms_threshold: float) -> dict[int, Ground]:
        """Return what was collected, per block, and start anew."""
        tiles, self.tiles = self.tiles, {}
        return {
            block: merge_tiles(found, targets, nms_threshold)
            for block, (found, targets) in sorted(tiles.items())
        }


def match_boxes(
    boxes_xyxy: np.ndarray,
    scores: np.ndarray,
    truth_xyxy: np.ndarray,
    iou_threshold: float,
    ignored: np.ndarray | None = None,
) -> np.ndarray:
    """Match detections to objects one to one.

    In falling order of score, each detection takes the free object it overlaps best, if their IoU
    reaches the threshold. The match of a detection does not depend on weaker ones, so that one
    matching serves all score thresholds. Time and memory grow with the pairs that overlap.

    Args:
        boxes_xyxy: (N, 4) px.
        scores: (N,).
        truth_xyxy: (M, 4) px.
        iou_threshold: Least IoU of a match, 0 < iou_threshold <= 1.
        ignored: bool (M,); detections that match no other object, and lie to that share on an
            ignored one, count neither way.

    Returns:
        int64 (N,): the object matched, `UNMATCHED` or `IGNORED`.

    References:
        Lin et al. 2014, Microsoft COCO, whose matching this is.
    """
    boxes, truth = np.asarray(boxes_xyxy, np.float64), np.asarray(truth_xyxy, np.float64)
    ignored = np.zeros(len(truth), bool) if ignored is None else ignored
    matches = np.full(len(boxes), UNMATCHED, dtype=np.int64)
    if not len(boxes) or not len(truth):
        return matches
    of_box, of_truth = shapely.STRtree(shapely.box(*truth.T)).query(shapely.box(*boxes.T))
    found, known = boxes[of_box], truth[of_truth]
    iou, shared = imutils.pair_iou(found, known), imutils.shared_area(found, known)

    candidate = (iou >= iou_threshold) & ~ignored[of_truth]
    order = np.lexsort((-iou[candidate], of_box[candidate], -scores[of_box[candidate]]))
    taken = np.zeros(len(truth), dtype=bool)
    for box, obj in zip(of_box[candidate][order], of_truth[candidate][order], strict=True):
        if matches[box] == UNMATCHED and not taken[obj]:
            matches[box], taken[obj] = obj, True

    on_ignored = ignored[of_truth] & (
        shared >= iou_threshold * np.maximum(imutils.box_area(found), 1e-12)
    )
    unmatched = np.unique(of_box[on_ignored])
    unmatched = unmatched[matches[unmatched] == UNMATCHED]
    matches[unmatched] = IGNORED
    return matches


@dataclass(frozen=True)
class Curve:
    """Precision, recall and F1 at every score threshold, falling, pooled over all ground."""

    threshold: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray

    @property
    def best(self) -> int:
        """Index of the highest F1."""
        return int(self.f1.argmax())


def precision_recall_curve(scores: np.ndarray, correct: np.ndarray, objects: int) -> Curve:
    """Sweep the score threshold over matched detections.

    Args:
        scores: (N,), any order.
        correct: bool (N,), whether each detection found an object.
        objects: Number of objects to be found.
    """
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(correct[order])
    last = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # equal scores fall together
    found, kept = found[last], last + 1
    precision, recall = found / kept, found / max(objects, 1)
    f1 = 2 * found / (kept + max(objects, 1))
    return Curve(scores[order][last], precision, recall, f1)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns.

    Attributes:
        values: Name -> number; see `evaluate`.
        curve: Of the boxes whatever their label.
        confusion: int64 (K + 1, K + 1): rows are true classes and, last, background; columns are
            detected classes and, last, missed.
        matches: Block -> what `match_boxes` returned for its detections.
    """

    values: dict[str, float]
    curve: Curve
    confusion: np.ndarray
    matches: dict[int, np.ndarray]


def evaluate(
    grounds: Mapping[int, Ground],
    labels: Sequence[str],
    iou_threshold: float,
    score_threshold: float | None = None,
) -> Evaluation:
    """Measure detections on all ground together.

    Args:
        grounds: Block -> merged detections and truth.
        labels: Names of the classes, by class id.
        iou_threshold: Least IoU at which a detection finds an object.
        score_threshold: Detections from this score on count for everything but the AP family; None
            takes the threshold with the highest F1 on this very ground (right for validation only).

    Returns:
        Values, all shares in 0-1: `AP, AP50, AP75` (COCO, mean over classes), `box_precision,
        box_recall, box_f1` (a detection is right if it finds an object, whatever its label),
        `class_recall` (mean over classes: share of its objects found under their own label),
        `recall_<label>` for each, and `score_threshold, objects, detections`.
    """
    matches = {
        block: match_boxes(g.boxes, g.scores, g.truth_boxes, iou_threshold, g.truth_ignored)
        for block, g in grounds.items()
    }
    for block, g in grounds.items():
        matches[block][g.stray & (matches[block] == UNMATCHED)] = IGNORED
    counted = {block: m != IGNORED for block, m in matches.items()}
    scores = _concatenate(grounds[b].scores[counted[b]] for b in grounds)
    correct = _concatenate(matches[b][counted[b]] != UNMATCHED for b in grounds).astype(bool)
    objects = sum(int((~g.truth_ignored).sum()) for g in grounds.values())
    curve = precision_recall_curve(scores, correct, objects)
    if score_threshold is None:
        score_threshold = float(curve.threshold[curve.best]) if len(curve.f1) else 0.5

    confusion = np.zeros((len(labels) + 1, len(labels) + 1), dtype=np.int64)
    for block, g in grounds.items():
        shown = counted[block] & (g.scores >= score_threshold)
        match, label = matches[block][shown], g.labels[shown]
        hit = match != UNMATCHED
        np.add.at(confusion, (g.truth_labels[match[hit]], label[hit]), 1)
        np.add.at(confusion, (-1, label[~hit]), 1)
        missed = ~g.truth_ignored
        missed[match[hit]] = False
        np.add.at(confusion, (g.truth_labels[missed], -1), 1)

    true_count = confusion[:-1].sum(axis=1)
    found = int(confusion[:-1, :-1].sum())
    detections = found + int(confusion[-1].sum())
    recall_of = {
        name: float(confusion[i, i] / true_count[i])
        for i, name in enumerate(labels)
        if true_count[i]
    }
    values = average_precision(grounds, matches) | {
        "box_precision": found / max(detections, 1),
        "box_recall": found / max(objects, 1),
        "box_f1": 2 * found / max(detections + objects, 1),
        "class_recall": float(np.mean(list(recall_of.values()))) if recall_of else 0.0,
        **{f"recall_{name}": value for name, value in recall_of.items()},
        "score_threshold": score_threshold,
        "objects": float(objects),
        "detections": float(detections),
    }
    return Evaluation(values, curve, confusion, matches)


def average_precision(
    grounds: Mapping[int, Ground], matches: Mapping[int, np.ndarray]
) -> dict[str, float]:
    """Compute COCO's AP family with a detection limit that never truncates.

    Detections on ground that does not count are left out, unless they found an object beside it.
    """
    most = max([100, *(len(g.boxes) for g in grounds.values())])
    metric = MeanAveragePrecision(
        backend="faster_coco_eval",
        # COCO's own thresholds; the library's defaults are rounded to float32, and miss some
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0, 1, 101).tolist(),
        max_detection_thresholds=[1, 100, most + 1],
    )
    metric.warn_on_many_detections = False
    for block, g in grounds.items():
        kept = ~(g.stray & (matches[block] == IGNORED))
        found = {"boxes": g.boxes[kept], "scores": g.scores[kept], "labels": g.labels[kept]}
        truth = {"boxes": g.truth_boxes, "labels": g.truth_labels, "iscrowd": g.truth_ignored * 1}
        metric.update(
            [{name: torch.from_numpy(value) for name, value in found.items()}],
            [{name: torch.from_numpy(value) for name, value in truth.items()}],
        )
    result = metric.compute()
    names = {"map": "AP", "map_50": "AP50", "map_75": "AP75"}
    # COCO answers -1 where there is nothing to find
    return {ours: max(float(result[theirs]), 0.0) for theirs, ours in names.items()}


def _concatenate(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=np.float32), *arrays])
