"""Scores: merged detections of blocks of ground against their objects.

The unit is a block of ground, not a tile: detections of its tiles are merged to raster coordinates,
each object counts once, and objects that reach in from a neighbour's ground are neither demanded
nor held against the detector. Numbers are pooled over all blocks of all rasters.

Matching looks only at pairs that touch, so that time and memory grow with those. As a command, the
module measures a file of detections against a file of objects:

python metrics.py catalogue.gpkg objects.csv --raster raster.tif
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import shapely
import torch
from torchvision.ops import batched_nms

import annotations
import fileio
import imutils
import ranks
import tiling
from ImageData import BOX_COLUMNS, CENTER_COLUMNS, IGNORE, InputError

UNMATCHED = -1
IGNORED = -2  # a detection on an ignored object, or on ground that does not count: neither way
# COCO's thresholds to the last digit; its IoU of 1 is reached despite rounding
IOU_THRESHOLDS = np.minimum(np.linspace(0.5, 0.95, 10), 1 - 1e-10)
RECALLS = np.linspace(0, 1, 101)
BOX_VALUES = ("box_precision", "box_recall", "box_f1")
SIZES = ("small", "medium", "large")
CENTER_DISTANCE = 0.5  # of an object's diameter
DIAMETER_FACTOR = 2.0
CONFIDENCE = 0.95
RESAMPLES = 1000
FEW_BLOCKS = 10  # below that, resampling them says little


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
        parts: int64 (N,), the part of the block in which each detection's centre lies, for
            resampling; None: the block is one part.
        truth_parts: int64 (M,), likewise.
        part_count: Number of parts.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    truth_boxes: np.ndarray
    truth_labels: np.ndarray
    truth_ignored: np.ndarray
    stray: np.ndarray
    parts: np.ndarray | None = None
    truth_parts: np.ndarray | None = None
    part_count: int = 1

    @property
    def part_of_boxes(self) -> np.ndarray:
        """Part of each detection, int64 (N,)."""
        return np.zeros(len(self.boxes), np.int64) if self.parts is None else self.parts

    @property
    def part_of_truth(self) -> np.ndarray:
        """Part of each object, int64 (M,)."""
        none = self.truth_parts is None
        return np.zeros(len(self.truth_boxes), np.int64) if none else self.truth_parts


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

    Returns:
        The block, its tiles as parts.
    """
    boxes, scores, labels, stray, parts = [], [], [], [], []
    for tile, (found, target) in enumerate(zip(detections, targets, strict=True)):
        window, core = target["window"], target["core"]
        on_raster = found["boxes"] + window[:2].repeat(2)
        own = torch.from_numpy(
            tiling.keep_detections(on_raster.numpy(), window.numpy(), core.numpy())
        )
        boxes.append(on_raster[own])
        scores.append(found["scores"][own])
        labels.append(found["labels"][own])
        stray.append(found["stray"][own])
        parts.append(torch.full((int(own.sum()),), tile))
    boxes, scores, labels, stray, parts = map(torch.cat, (boxes, scores, labels, stray, parts))
    keep = batched_nms(boxes, scores, labels, nms_threshold)

    ids = torch.cat([t["truth_ids"] for t in targets]).numpy()
    owned = torch.cat([t["truth_owned"] for t in targets]).numpy()
    order = np.lexsort((~owned, ids))  # the owner of an object first
    first = order[np.unique(ids[order], return_index=True)[1]]
    tile_of = np.repeat(np.arange(len(targets)), [len(t["truth_ids"]) for t in targets])
    return Ground(
        boxes[keep].numpy(),
        scores[keep].numpy(),
        labels[keep].numpy(),
        torch.cat([t["truth_boxes"] for t in targets]).numpy()[first],
        torch.cat([t["truth_labels"] for t in targets]).numpy()[first],
        ~owned[first],
        stray[keep].numpy(),
        parts[keep].numpy(),
        tile_of[first],
        len(targets),
    )


class GroundCollector:
    """Collects tiles while they are evaluated and merges them block by block."""

    def __init__(self) -> None:
        """Start empty."""
        self.batches: list[list[tuple[int, dict, dict]]] = []

    def add(self, detections: Iterable[Mapping], targets: Iterable[Mapping]) -> None:
        """Keep the detections and targets of a batch, on the CPU."""
        kept = []
        for batch in zip(detections, targets, strict=True):
            found, target = ({name: v.detach().cpu() for name, v in one.items()} for one in batch)
            stray = torch.zeros_like(found["labels"], dtype=torch.bool)
            if "counted" in target:  # masks are large, and not kept
                stray = ~counted_at_centers(target["counted"], found["boxes"])
                target = {k: v for k, v in target.items() if k != "counted"}
            kept.append((int(target["ground"]), {**found, "stray": stray}, target))
        self.batches.append(kept)

    def merge(self, nms_threshold: float) -> dict[int, Ground]:
        """Return what all ranks collected, per block, and start anew; nothing on ranks above 0.

        Blocks are what is resampled; where there are few, their tiles are.
        """
        shares, self.batches = ranks.collected(self.batches), []
        tiles: dict[int, tuple[list, list]] = {}
        # ranks take the batches in turn: this is the order in which one alone would see them
        in_turn = zip_longest(*shares or [], fillvalue=())
        for block, found, target in chain.from_iterable(chain.from_iterable(in_turn)):
            of_block = tiles.setdefault(block, ([], []))
            of_block[0].append(found)
            of_block[1].append(target)
        grounds = {
            block: merge_tiles(found, targets, nms_threshold)
            for block, (found, targets) in sorted(tiles.items())
        }
        if len(grounds) < FEW_BLOCKS:
            return grounds
        whole = {"parts": None, "truth_parts": None, "part_count": 1}
        return {block: replace(ground, **whole) for block, ground in grounds.items()}


# ---------------------------------------------------------------------------------------------
# Matching
# ---------------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """Boxes and objects that touch.

    Attributes:
        of_box: int64 (P,).
        of_truth: int64 (P,).
        iou: float64 (P,).
        cover: float64 (P,), share of the box that lies on the object.
    """

    of_box: np.ndarray
    of_truth: np.ndarray
    iou: np.ndarray
    cover: np.ndarray


def find_pairs(boxes_xyxy: np.ndarray, truth_xyxy: np.ndarray) -> Pairs:
    """Find which of the boxes (N, 4) touch which objects (M, 4), in px, and how much they share."""
    boxes, truth = np.asarray(boxes_xyxy, np.float64), np.asarray(truth_xyxy, np.float64)
    of_box, of_truth = np.empty((2, 0), np.int64)
    if len(boxes) and len(truth):
        of_box, of_truth = shapely.STRtree(shapely.box(*truth.T)).query(shapely.box(*boxes.T))
    found, known = boxes[of_box], truth[of_truth]
    area = np.maximum(imutils.box_area(found), 1e-12)
    cover = imutils.shared_area(found, known) / area
    return Pairs(of_box, of_truth, imutils.pair_iou(found, known), cover)


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
    matching serves all score thresholds.

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
    ignored = np.zeros(len(truth_xyxy), bool) if ignored is None else ignored
    return _match_overlapping(
        find_pairs(boxes_xyxy, truth_xyxy), np.asarray(scores), ignored, iou_threshold
    )


def _match_overlapping(
    pairs: Pairs, scores: np.ndarray, ignored: np.ndarray, iou_threshold: float
) -> np.ndarray:
    on_ignored = ignored[pairs.of_truth]
    candidate = (pairs.iou >= iou_threshold) & ~on_ignored
    covered = (pairs.cover >= iou_threshold) & on_ignored
    return _match(pairs, -pairs.iou, candidate, covered, scores, len(ignored))


def match_centers(
    boxes_xyxy: np.ndarray,
    scores: np.ndarray,
    truth_xyxy: np.ndarray,
    distance: float = CENTER_DISTANCE,
    ignored: np.ndarray | None = None,
) -> np.ndarray:
    """Match detections to objects one to one by their centres, as catalogues of craters do.

    In falling order of score, each detection takes the free object whose centre is nearest,
    measured in diameters of the object, among those less than `distance` away whose diameter, the
    longer side, differs by a factor of `DIAMETER_FACTOR` at most.

    Args:
        boxes_xyxy: (N, 4) px.
        scores: (N,).
        truth_xyxy: (M, 4) px.
        distance: Limit, in diameters of the object, > 0.
        ignored: bool (M,); detections that match no other object, and whose centre lies in the box
            of an ignored one, count neither way.

    Returns:
        int64 (N,): the object matched, `UNMATCHED` or `IGNORED`.

    References:
        Silburt et al. 2019, Lunar crater identification via deep learning, whose limits are 0.67
        diameters of the smaller of the two, and the same factor of 2; the distance is ours.
    """
    (center, diameter), (at, across) = _measure(boxes_xyxy), _measure(truth_xyxy)
    ignored = np.zeros(len(at), bool) if ignored is None else ignored
    of_truth, of_box = np.empty((2, 0), np.int64)
    if len(center) and len(at):
        own = np.asarray(truth_xyxy, np.float64)
        reach = np.hstack([at, at]) + distance * across[:, None] * [-1, -1, 1, 1]
        near = shapely.box(*np.where(ignored[:, None], own, reach).T)
        of_truth, of_box = shapely.STRtree(shapely.points(center)).query(near)
    away = np.linalg.norm(center[of_box] - at[of_truth], axis=1) / across[of_truth]
    ratio = diameter[of_box] / across[of_truth]
    alike = (ratio <= DIAMETER_FACTOR) & (ratio * DIAMETER_FACTOR >= 1)
    pairs = Pairs(of_box, of_truth, away, away)
    on_ignored = ignored[of_truth]
    candidate = (away < distance) & alike & ~on_ignored
    return _match(pairs, away, candidate, on_ignored, np.asarray(scores), len(at))


def _measure(boxes_xyxy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the centres (N, 2) and diameters (N,) of boxes, px; no diameter is zero."""
    boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
    low, high = boxes[:, :2], boxes[:, 2:]
    return (low + high) / 2, np.maximum((high - low).max(axis=1, initial=0), 1e-12)


def _match(
    pairs: Pairs,
    cost: np.ndarray,
    candidate: np.ndarray,
    covered: np.ndarray,
    scores: np.ndarray,
    objects: int,
) -> np.ndarray:
    """Match boxes, best score first, to the cheapest free object of their candidate pairs.

    Of those that get none, the boxes of the pairs in `covered` are `IGNORED`.
    """
    order = np.argsort(-scores, kind="stable")
    turn = np.empty_like(order)
    turn[order] = np.arange(len(order))
    mine, of_truth = turn[pairs.of_box[candidate]], pairs.of_truth[candidate]
    by_wish = np.lexsort((of_truth, cost[candidate], mine))
    mine, of_truth = mine[by_wish], of_truth[by_wish]
    got = _take_in_turn(mine, of_truth, len(scores), np.zeros(objects, dtype=bool))
    matches = np.full(len(scores), UNMATCHED, dtype=np.int64)
    happy = got >= 0
    matches[order[happy]] = of_truth[got[happy]]
    left = pairs.of_box[covered]
    matches[left[matches[left] == UNMATCHED]] = IGNORED
    return matches


def _take_in_turn(
    of_box: np.ndarray, of_truth: np.ndarray, boxes: int, endless: np.ndarray
) -> np.ndarray:
    """Let each box, in their order, take the first object of its list that is still free.

    All boxes ask for the first object of their list at once; an object keeps the first box that
    asks, and the others, also one that it kept before, go on to their next. Since all objects
    prefer the boxes in the same order, the outcome is that of taking turns, in a few vectorised
    rounds.

    Args:
        of_box: int64 (P,), rising; the box of each pair.
        of_truth: int64 (P,), its object; the pairs of a box stand in the order of its wishes.
        boxes: Number of boxes.
        endless: bool (M,), objects that any number of boxes may take.

    Returns:
        int64 (boxes,): the pair that each box got, -1 for none.

    References:
        Gale and Shapley 1962, whose stable matching this is.
    """
    ends = np.searchsorted(of_box, np.arange(boxes + 1))
    at, end = ends[:-1].copy(), ends[1:]
    holder = np.full(len(endless), boxes)
    asking = np.flatnonzero(at < end)
    while len(asking):
        asking = asking[~endless[of_truth[at[asking]]]]
        wanted = of_truth[at[asking]]
        before = holder[wanted]
        np.minimum.at(holder, wanted, asking)
        now = holder[wanted]
        displaced = before[(before > now) & (before < boxes)]
        lost = np.unique(np.concatenate([asking[now != asking], displaced]))
        at[lost] += 1
        asking = lost[at[lost] < end[lost]]
    return np.where(at < end, at, -1)


# ---------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------


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
class Reliability:
    """How often detections of like score are right, in bins of about equal count.

    Attributes:
        score_low: Least score of each bin.
        score_high: Highest score.
        score: Mean score.
        precision: Share of the detections that are right; of calibrated scores it is their mean.
        detections: Number of detections.
    """

    score_low: np.ndarray
    score_high: np.ndarray
    score: np.ndarray
    precision: np.ndarray
    detections: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error, 0-1: the mean of |precision - score|; NaN without any."""
        gap = np.abs(self.precision - self.score)
        return float(np.average(gap, weights=self.detections)) if len(gap) else float("nan")


def measure_reliability(scores: np.ndarray, correct: np.ndarray, bins: int = 10) -> Reliability:
    """Compare scores with the share of detections that are right.

    Args:
        scores: (N,), 0-1, any order.
        correct: bool (N,).
        bins: Number of bins; fewer if equal scores, which stay together, fill more than one.

    References:
        Guo et al. 2017, On calibration of modern neural networks, eq. 3; our bins hold equal
        counts, not equal ranges of scores, since most scores of a detector are low.
    """
    order = np.argsort(scores, kind="stable")
    scores, correct = np.asarray(scores, np.float64)[order], correct[order]
    rank = np.searchsorted(scores, scores)
    first = np.unique(rank * bins // max(len(scores), 1), return_index=True)[1]
    if not len(first):
        return Reliability(*np.empty((4, 0)), np.empty(0, np.int64))
    count = np.diff(first, append=len(scores))
    mean_score, precision = (np.add.reduceat(v, first) / count for v in (scores, correct * 1.0))
    last = first + count - 1
    return Reliability(scores[first], scores[last], mean_score, precision, count)


# ---------------------------------------------------------------------------------------------
# COCO's average precision
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pool:
    """All ground side by side: detections by class and, within one, by falling score.

    Attributes:
        labels: int64 (N,).
        sides: float64 (N,), square root of the area, px.
        parts: int64 (N,), counted over all ground.
        truth_labels: int64 (M,).
        truth_sides: float64 (M,).
        truth_parts: int64 (M,).
        crowd: bool (M,), ignored objects.
        of_box: int64 (P,), rising; of the pairs of a class that overlap by half at least.
        of_truth: int64 (P,).
        overlap: float64 (P,), IoU, or for a crowd the share of the detection on it; falling for
            each detection.
        part_count: Number of parts.
    """

    labels: np.ndarray
    sides: np.ndarray
    parts: np.ndarray
    truth_labels: np.ndarray
    truth_sides: np.ndarray
    truth_parts: np.ndarray
    crowd: np.ndarray
    of_box: np.ndarray
    of_truth: np.ndarray
    overlap: np.ndarray
    part_count: int


def _pool(
    grounds: Mapping[int, Ground], pairs: Mapping[int, Pairs], kept: Mapping[int, np.ndarray]
) -> _Pool:
    """Put all ground side by side, with the detections that are kept."""
    every, joined = list(grounds.values()), _concatenate
    boxes_before, truth_before, parts_before = (
        np.cumsum([0, *sizes])
        for sizes in (
            [len(g.boxes) for g in every], [len(g.truth_boxes) for g in every],
            [g.part_count for g in every],
        )
    )  # fmt: skip
    scores = joined((g.scores for g in every), float)
    labels = joined((g.labels for g in every), int)
    order = np.lexsort((-scores, labels))
    order = order[joined((kept[block] for block in grounds), bool)[order]]
    place = np.full(len(scores), -1)
    place[order] = np.arange(len(order))

    crowd = joined((g.truth_ignored for g in every), bool)
    truth_labels = joined((g.truth_labels for g in every), int)
    found = [pairs[block] for block in grounds]
    of_box = joined(map(np.add, (p.of_box for p in found), boxes_before), int)
    of_truth = joined(map(np.add, (p.of_truth for p in found), truth_before), int)
    iou, cover = joined((p.iou for p in found), float), joined((p.cover for p in found), float)
    overlap = np.where(crowd[of_truth], cover, iou)
    chosen = (overlap >= IOU_THRESHOLDS[0]) & (place[of_box] >= 0)
    chosen &= labels[of_box] == truth_labels[of_truth]
    of_box, of_truth, overlap = place[of_box[chosen]], of_truth[chosen], overlap[chosen]
    wish = np.lexsort((-of_truth, -overlap, of_box))  # of equal overlaps, COCO takes the last
    return _Pool(
        labels[order],
        joined((_sides(g.boxes) for g in every), float)[order],
        joined(map(np.add, (g.part_of_boxes for g in every), parts_before), int)[order],
        truth_labels,
        joined((_sides(g.truth_boxes) for g in every), float),
        joined(map(np.add, (g.part_of_truth for g in every), parts_before), int),
        crowd,
        of_box[wish],
        of_truth[wish],
        overlap[wish],
        int(parts_before[-1]),
    )


def _sides(boxes_xyxy: np.ndarray) -> np.ndarray:
    return np.sqrt(imutils.box_area(np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)))


def _concatenate(arrays: Iterable[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *arrays])


@dataclass(frozen=True)
class _Judged:
    """A pool's detections, judged by COCO's rules for objects of some range of sizes.

    Attributes:
        right: bool (10, N), whether a detection found an object, per threshold.
        wrong: bool (10, N); what is neither is ignored.
        wanted: bool (M,), the objects to be found.
        classes: Class id, number of wanted objects, and detections of each class that has some.
    """

    right: np.ndarray
    wrong: np.ndarray
    wanted: np.ndarray
    classes: list[tuple[int, int, slice]]

    def precisions(self) -> np.ndarray:
        """Average precision, (10, classes)."""
        rows = [
            [_interpolate(right[mine], wrong[mine], n) for _, n, mine in self.classes]
            for right, wrong in zip(self.right, self.wrong, strict=True)
        ]
        return np.array(rows)

    def recalls(self) -> np.ndarray:
        """Recall of all detections, (10, classes)."""
        return np.array([self.right[:, mine].sum(axis=1) / n for _, n, mine in self.classes]).T


def _judge(pool: _Pool, low: float, high: float) -> _Judged:
    """Match the detections to objects of `low <= side < high`, px.

    Others are ignored, as are detections of other sizes that find none.
    """
    beyond = (pool.sides < low) | (pool.sides >= high)
    wanted = ~pool.crowd & (pool.truth_sides >= low) & (pool.truth_sides < high)
    # ignored objects only when no other is left
    order = np.argsort(2 * pool.of_box + ~wanted[pool.of_truth], kind="stable")
    of_box, of_truth, overlap = pool.of_box[order], pool.of_truth[order], pool.overlap[order]
    right = np.zeros((len(IOU_THRESHOLDS), len(pool.labels)), dtype=bool)
    wrong = right.copy()
    for i, threshold in enumerate(IOU_THRESHOLDS):
        near = overlap >= threshold
        objects = of_truth[near]
        got = _take_in_turn(of_box[near], objects, len(pool.labels), pool.crowd)
        happy = got >= 0
        right[i, happy] = wanted[objects[got[happy]]]
        wrong[i] = ~happy & ~beyond
    known, count = np.unique(pool.truth_labels[wanted], return_counts=True)
    first, last = (np.searchsorted(pool.labels, known, side) for side in ("left", "right"))
    mine = map(slice, first.tolist(), last.tolist())
    return _Judged(right, wrong, wanted, list(zip(known, count, mine, strict=True)))


def _interpolate(right: np.ndarray, wrong: np.ndarray, objects: int) -> float:
    """Return the mean precision at COCO's 101 recalls, of detections in falling order of score.

    Args:
        right: (N,), how often each detection counts as right.
        wrong: (N,), how often it counts as wrong.
        objects: Number of objects, > 0.
    """
    right, wrong = np.cumsum(right), np.cumsum(wrong)
    precision = right / np.maximum(right + wrong, 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or a higher one
    return float(np.append(best, 0.0)[np.searchsorted(right / objects, RECALLS)].mean())


def _size_edges(pool: _Pool) -> list[float]:
    """Return the terciles of the sides of the objects that count, px, to two digits."""
    sides = pool.truth_sides[~pool.crowd]
    return [float(f"{q:.2g}") for q in np.quantile(sides, [1 / 3, 2 / 3])] if len(sides) else []


def _average_precisions(pool: _Pool, judged: _Judged) -> dict[str, float]:
    """Compute COCO's AP family; where there is nothing to find, it is 0, and of a size absent."""
    nothing = dict.fromkeys(("AP", "AP50", "AP75", "AR"), 0.0)
    if not judged.classes:
        return nothing
    precision = judged.precisions()
    overall = (precision.mean(), precision[0].mean(), precision[5].mean(), judged.recalls().mean())
    values = dict(zip(nothing, overall, strict=True))
    medium, large = edges = _size_edges(pool)
    for name, low, high in zip(SIZES, (0, *edges), (*edges, np.inf), strict=True):
        sized = _judge(pool, low, high)
        if sized.classes:
            values[f"AP_{name}"] = sized.precisions().mean()
    return values | {"medium_from": medium, "large_from": large}


# ---------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns.

    Attributes:
        values: Name -> number; see `evaluate`.
        curve: Of the boxes whatever their label.
        confusion: int64 (K + 1, K + 1): rows are true classes and, last, background; columns are
            detected classes and, last, missed.
        matches: Block -> what `match_boxes` returned for its detections.
        center_matches: Block -> what `match_centers` returned for them.
        reliability: Of the scores of all detections that count; right are those that found an
            object of their label.
    """

    values: dict[str, float]
    curve: Curve
    confusion: np.ndarray
    matches: dict[int, np.ndarray]
    center_matches: dict[int, np.ndarray]
    reliability: Reliability


def evaluate(
    grounds: Mapping[int, Ground],
    labels: Sequence[str],
    iou_threshold: float,
    score_threshold: float | None = None,
    *,
    center_distance: float = CENTER_DISTANCE,
    resamples: int = RESAMPLES,
    rng: np.random.Generator | None = None,
) -> Evaluation:
    """Measure detections on all ground together.

    Args:
        grounds: Block -> merged detections and truth.
        labels: Names of the classes, by class id.
        iou_threshold: Least IoU at which a detection finds an object.
        score_threshold: Detections from this score on count for everything but the AP family and
            the calibration; None takes the threshold with the highest F1 on this very ground (right
            for validation only).
        center_distance: See `match_centers`.
        resamples: Number of resamples for the confidence intervals; 0 for none.
        rng: Of the resamples; None gives equal intervals to equal input.

    Returns:
        Values, of which those that are undefined are absent. Shares in 0-1:

        - `AP, AP50, AP75, AR`, by COCO's rules with a label's detections for its objects, mean over
          classes, whatever the number of detections; `AP_small, AP_medium, AP_large` in thirds of
          the objects by the square root of their area: `medium_from, large_from` (px) are the least
          of the upper two.
        - `box_precision, box_recall, box_f1`: a detection is right if it finds an object, whatever
          its label.
        - `class_recall` (mean over classes: share of its objects found under their own label) and
          `recall_<label>` for each.
        - `center_precision, center_recall, center_f1`: the same as of boxes, by `match_centers`;
          `position_error` (px), `position_error_share` (of the object's diameter),
          `diameter_error` (share of it) and `diameter_bias` (the same with its sign, > 0: detected
          too large), medians over the objects found so.
        - `<name>_low, <name>_high` of `AP50, box_precision, box_recall, box_f1`: 95 % confidence
          interval, by resampling blocks of ground (or their parts) with replacement; absent where
          there is only one.
        - `calibration_error`, see `Reliability`.
        - `score_threshold, objects, detections`: the threshold, and counts.

    References:
        Lin et al. 2014, Microsoft COCO, and its API. Efron 1979, Bootstrap methods; percentile
        intervals, of blocks since neighbouring objects are not independent.
    """
    pairs = {block: find_pairs(g.boxes, g.truth_boxes) for block, g in grounds.items()}
    matches = {
        block: _match_overlapping(pairs[block], g.scores, g.truth_ignored, iou_threshold)
        for block, g in grounds.items()
    }
    centers = {
        b: match_centers(g.boxes, g.scores, g.truth_boxes, center_distance, g.truth_ignored)
        for b, g in grounds.items()
    }
    for block, g in grounds.items():
        for found in (matches[block], centers[block]):
            found[g.stray & (found == UNMATCHED)] = IGNORED
    counted = {block: m != IGNORED for block, m in matches.items()}
    scores = _concatenate((grounds[b].scores[counted[b]] for b in grounds), np.float32)
    hits = _concatenate((matches[b][counted[b]] != UNMATCHED for b in grounds), bool)
    objects = sum(int((~g.truth_ignored).sum()) for g in grounds.values())
    curve = precision_recall_curve(scores, hits, objects)
    if score_threshold is None:
        score_threshold = float(curve.threshold[curve.best]) if len(curve.f1) else 0.5

    confusion = np.zeros((len(labels) + 1, len(labels) + 1), dtype=np.int64)
    tallies = []
    for block, g in grounds.items():
        shown = counted[block] & (g.scores >= score_threshold)
        match, label = matches[block][shown], g.labels[shown]
        hit = match != UNMATCHED
        np.add.at(confusion, (g.truth_labels[match[hit]], label[hit]), 1)
        np.add.at(confusion, (-1, label[~hit]), 1)
        missed = ~g.truth_ignored
        missed[match[hit]] = False
        np.add.at(confusion, (g.truth_labels[missed], -1), 1)
        part, truth_part = g.part_of_boxes[shown], g.part_of_truth[~g.truth_ignored]
        tally = [np.bincount(p, minlength=g.part_count) for p in (part[hit], part, truth_part)]
        tallies.append(np.stack(tally, axis=1))

    true_count = confusion[:-1].sum(axis=1)
    found = int(confusion[:-1, :-1].sum())
    detections = found + int(confusion[-1].sum())
    recall_of = {
        name: float(confusion[i, i] / true_count[i])
        for i, name in enumerate(labels)
        if true_count[i]
    }
    own_label = {b: _found_own_label(g, matches[b])[counted[b]] for b, g in grounds.items()}
    reliability = measure_reliability(scores, _concatenate(own_label.values(), bool))
    # detections on ground that does not count are left out, unless they found an object beside it
    kept = {block: ~g.stray | counted[block] for block, g in grounds.items()}
    pool = _pool(grounds, pairs, kept)
    judged = _judge(pool, 0, np.inf)
    values = {
        **_average_precisions(pool, judged),
        **dict(zip(BOX_VALUES, _shares(found, detections, objects), strict=True)),
        "class_recall": float(np.mean(list(recall_of.values()))) if recall_of else 0.0,
        **{f"recall_{name}": value for name, value in recall_of.items()},
        **_center_values(grounds, centers, score_threshold, objects),
        **_intervals(pool, judged, tallies, resamples, rng or np.random.default_rng(0)),
        "calibration_error": reliability.error,
        "score_threshold": score_threshold,
        "objects": objects,
        "detections": detections,
    }
    values = {name: float(value) for name, value in values.items() if np.isfinite(value)}
    return Evaluation(values, curve, confusion, matches, centers, reliability)


def _shares(
    found: np.ndarray | int, detections: np.ndarray | int, objects: np.ndarray | int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return precision, recall and F1 of counts."""
    return (
        found / np.maximum(detections, 1),
        found / np.maximum(objects, 1),
        2 * found / np.maximum(detections + objects, 1),
    )


def _found_own_label(g: Ground, matches: np.ndarray) -> np.ndarray:
    """Tell which detections (N,) found an object of their label."""
    right = matches >= 0
    right[right] = g.truth_labels[matches[right]] == g.labels[right]
    return right


def _center_values(
    grounds: Mapping[int, Ground],
    matches: Mapping[int, np.ndarray],
    score_threshold: float,
    objects: int,
) -> dict[str, float]:
    """Measure positions and diameters of what was found by centres, see `evaluate`."""
    detections, away, known, ratio = 0, [], [], []
    for block, g in grounds.items():
        shown = (matches[block] != IGNORED) & (g.scores >= score_threshold)
        detections += int(shown.sum())
        hit = shown & (matches[block] != UNMATCHED)
        center, diameter = _measure(g.boxes[hit])
        at, across = _measure(g.truth_boxes[matches[block][hit]])
        away.append(np.linalg.norm(center - at, axis=1))
        known.append(across)
        ratio.append(diameter / across)
    away, known, ratio = (_concatenate(part, float) for part in (away, known, ratio))
    shares = _shares(len(away), detections, objects)
    values = dict(zip(("center_precision", "center_recall", "center_f1"), shares, strict=True))
    if not len(away):
        return values
    return values | {
        "position_error": np.median(away),
        "position_error_share": np.median(away / known),
        "diameter_error": np.median(np.abs(ratio - 1)),
        "diameter_bias": np.median(ratio - 1),
    }


def _intervals(
    pool: _Pool,
    judged: _Judged,
    tallies: Sequence[np.ndarray],
    resamples: int,
    rng: np.random.Generator,
) -> dict[str, float]:
    """Return the ends of the confidence intervals; resamples without an object are left out.

    A part that is drawn twice counts twice: nothing is matched again, and the curve behind AP50 is
    summed with weights.

    Args:
        pool: All ground.
        judged: Its detections, for objects of all sizes.
        tallies: Per block, int (parts, 3): detections that found an object, all detections, and
            objects, at the score threshold.
        resamples: Number of resamples.
        rng: Draws the parts.
    """
    if pool.part_count < 2 or not resamples or not judged.classes:
        return {}
    drawn = rng.multinomial(pool.part_count, np.full(pool.part_count, 1 / pool.part_count),
                            resamples)  # fmt: skip
    totals = drawn @ np.concatenate(tallies)
    drawn, totals = drawn[totals[:, 2] > 0], totals[totals[:, 2] > 0]
    precision = np.full((len(judged.classes), len(drawn)), np.nan)
    for i, (label, _, mine) in enumerate(judged.classes):
        own = judged.wanted & (pool.truth_labels == label)
        objects = drawn @ np.bincount(pool.truth_parts[own], minlength=pool.part_count)
        right, wrong, parts = judged.right[0, mine], judged.wrong[0, mine], pool.parts[mine]
        for j in np.flatnonzero(objects):
            times = drawn[j, parts]
            precision[i, j] = _interpolate(times * right, times * wrong, objects[j])
    samples = (np.nanmean(precision, axis=0), *_shares(*totals.T))
    ends = np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=1)
    # where an object lies in one part and what found it in another, a resample may find too many
    ends = ends.clip(0, 1)
    return {
        f"{name}_{end}": value
        for end, row in zip(("low", "high"), ends, strict=True)
        for name, value in zip(("AP50", *BOX_VALUES), row, strict=True)
    }


# ---------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------


class ConfusionCollector:
    """Counts pixels by true and predicted class while tiles are evaluated, block by block.

    Of a tile its core counts, so that ground is counted once. A block has parts, for resampling
    where blocks are few; a tile belongs to one by its place, whoever counts it.

    Args:
        classes: Number of classes.
    """

    PARTS = 8  # of a block

    def __init__(self, classes: int) -> None:
        """Start empty."""
        self.classes = classes
        self.counts: dict[tuple[int, int], np.ndarray] = {}

    def add(
        self,
        predicted: torch.Tensor,
        truth: torch.Tensor,
        targets: Iterable[Mapping[str, torch.Tensor]],
    ) -> None:
        """Count a batch.

        Args:
            predicted: Class ids (B, H, W).
            truth: Likewise, and `IGNORE`.
            targets: Per tile `ground`, `window`, `core`, see `datasets`.
        """
        for found, known, target in zip(predicted, truth, targets, strict=True):
            window, core = target["window"].tolist(), target["core"].tolist()
            # a pixel lies where its centre does
            left, top, right, bottom = (math.ceil(core[i] - window[i % 2] - 0.5) for i in range(4))
            inside = (slice(max(top, 0), bottom), slice(max(left, 0), right))
            found, known = found[inside], known[inside].long()
            counted = known != IGNORE
            pairs = known[counted] * self.classes + found[counted]
            count = torch.bincount(pairs, minlength=self.classes**2).cpu().numpy()
            part = hash((int(window[0]), int(window[1]))) % self.PARTS
            key = int(target["ground"]), part
            before = self.counts.get(key, np.zeros((self.classes,) * 2, dtype=np.int64))
            self.counts[key] = before + count.reshape(before.shape)

    def merge(self) -> dict[int, np.ndarray]:
        """Return what all ranks counted, and start anew; nothing on ranks above 0.

        Returns:
            Block -> int64 (parts, C, C), rows are true classes, columns predicted ones; one part
            where there are blocks enough to resample them.
        """
        shares, self.counts = ranks.collected(self.counts), {}
        totals: dict[tuple[int, int], np.ndarray] = {}
        for key, count in chain.from_iterable(share.items() for share in shares or []):
            totals[key] = totals.get(key, 0) + count
        blocks: dict[int, list[np.ndarray]] = {}
        for (block, _), count in sorted(totals.items(), key=lambda item: item[0]):
            blocks.setdefault(block, []).append(count)
        stacked = {block: np.stack(parts) for block, parts in blocks.items()}
        if len(stacked) < FEW_BLOCKS:
            return stacked
        return {block: parts.sum(axis=0, keepdims=True) for block, parts in stacked.items()}


@dataclass(frozen=True)
class MaskEvaluation:
    """What `evaluate_masks` returns.

    Attributes:
        values: Name -> number; see `evaluate_masks`.
        confusion: int64 (C, C), pixels; rows are true classes, columns predicted ones.
        blocks: Block -> its confusion.
    """

    values: dict[str, float]
    confusion: np.ndarray
    blocks: dict[int, np.ndarray]


def evaluate_masks(
    blocks: Mapping[int, np.ndarray],
    labels: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    rng: np.random.Generator | None = None,
) -> MaskEvaluation:
    """Measure classes of pixels on all ground together.

    Args:
        blocks: Block -> pixels by true and predicted class, see `ConfusionCollector.merge`.
        labels: Names of the classes, by class id.
        resamples: Number of resamples for the confidence interval; 0 for none.
        rng: Of the resamples; None gives equal intervals to equal input.

    Returns:
        Values, shares in 0-1:

        - `pixel_accuracy`: share of the pixels that have their class.
        - `IoU_<label>`, `F1_<label>`, `precision_<label>`, `recall_<label>` of the classes that the
          ground shows, and `mean_IoU, mean_F1, mean_precision, mean_recall` over these; what is
          predicted of others counts against those whose ground it is. A class that is never
          predicted has the precision 0.
        - `mean_IoU_low, mean_IoU_high`: 95 % confidence interval, by resampling blocks of ground
          (or their parts) with replacement; absent where there is only one.
        - `pixels`: how many were counted.

        Where no pixel has a class, only the last.

    References:
        Everingham et al. 2010, PASCAL VOC, for IoU over all ground; Efron 1979, Bootstrap methods.
    """
    none = np.zeros((0, len(labels), len(labels)), dtype=np.int64)
    parts = np.concatenate([none, *blocks.values()])
    confusion = parts.sum(axis=0)
    hit, known, found = _class_counts(parts)
    shares = _class_shares(hit.sum(axis=0), known.sum(axis=0), found.sum(axis=0))
    pixels = int(confusion.sum())
    values: dict[str, float] = {"pixels": float(pixels)}
    if pixels:
        values["pixel_accuracy"] = float(np.trace(confusion) / pixels)
        for name, of_classes in shares.items():
            values[f"mean_{name}"] = float(np.nanmean(of_classes))
            values |= {
                f"{name}_{label}": float(value)
                for label, value in zip(labels, of_classes, strict=True)
                if not np.isnan(value)
            }
    if pixels and resamples and len(parts) > 1:
        rng = rng or np.random.default_rng(0)
        drawn = rng.multinomial(len(parts), np.full(len(parts), 1 / len(parts)), resamples)
        drawn = drawn[drawn @ known.sum(axis=1) > 0]
        samples = _class_shares(drawn @ hit, drawn @ known, drawn @ found)["IoU"]
        ends = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
        low, high = np.quantile(np.nanmean(samples, axis=1), ends)
        values |= {"mean_IoU_low": float(low), "mean_IoU_high": float(high)}
    of_blocks = {block: counts.sum(axis=0) for block, counts in blocks.items()}
    return MaskEvaluation(values, confusion, of_blocks)


def _class_counts(confusions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return right, true and predicted pixels (N, C) per class of confusions (N, C, C)."""
    right = np.diagonal(confusions, axis1=1, axis2=2)
    return right, confusions.sum(axis=2), confusions.sum(axis=1)


def _class_shares(hit: np.ndarray, known: np.ndarray, found: np.ndarray) -> dict[str, np.ndarray]:
    """Return measures (..., C) of counts; NaN of classes that the ground does not show."""
    shown = np.where(known > 0, 1.0, np.nan)
    return {
        "IoU": shown * hit / np.maximum(known + found - hit, 1),
        "F1": shown * 2 * hit / np.maximum(known + found, 1),
        "precision": shown * hit / np.maximum(found, 1),
        "recall": shown * hit / np.maximum(known, 1),
    }


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def read_ground(
    detections: Path | str,
    truth: Path | str,
    raster: fileio.Raster,
    block_size: int | None = None,
    **options: object,
) -> tuple[Ground, list[str]]:
    """Read a file of detections and one of objects as one block of ground, the whole raster.

    Crowds, and objects whose centre lies off the raster or on ground that does not count, are
    ignored; detections there are stray. Boxes without area are left out.

    Args:
        detections: Annotation file of any format, with scores.
        truth: Annotation file of any format.
        raster: The raster of both, with its regions.
        block_size: Side of the square parts for resampling, px; None: an eighth of the longer side.
        options: For the objects' file, see `annotations.ReadingOptions`; a table that holds boxes
            is read as such unless `box_source` says otherwise.

    Returns:
        The ground, and the labels of its class ids.

    Raises:
        InputError: A file cannot be used, a detection has no score, or a box no label.
    """
    found = _read_boxes(Path(detections), raster, {})
    known = _read_boxes(Path(truth), raster, options)
    if "score" not in found or found["score"].isna().any():
        missing = int(found["score"].isna().sum()) if "score" in found else len(found)
        raise InputError(
            f"{detections}: {missing} of {len(found)} detections have no score; expected a number "
            "in the column or attribute `score` of each, as predict.py writes it. If the files are "
            "swapped: the detections come first"
        )
    found = found.assign(score=found["score"].astype(float))
    found = found.sort_values("score", ascending=False, kind="stable")
    labels = sorted({*found["label"], *known["label"]})
    side = block_size or -(-max(raster.width, raster.height) // 8)
    columns, rows = -(-raster.width // side), -(-raster.height // side)
    extent = np.array([0, 0, raster.width, raster.height])  # nothing beyond it can be seen

    def describe(df: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        x, y = df[CENTER_COLUMNS].to_numpy(float).T
        counted = (x >= 0) & (y >= 0) & (x < raster.width) & (y < raster.height)
        if raster.regions is not None:
            counted &= raster.regions.contain(x, y)
        column, row = ((v // side).clip(0, n - 1) for v, n in ((x, columns), (y, rows)))
        ids = pd.Categorical(df["label"], labels).codes.astype(np.int64)
        boxes = imutils.clip_boxes(df[BOX_COLUMNS].to_numpy(float), extent)
        return boxes, ids, ~counted, (row * columns + column).astype(int)

    boxes, ids, stray, parts = describe(found)
    truth_boxes, truth_ids, ignored, truth_parts = describe(known)
    if "iscrowd" in known:
        ignored |= (known["iscrowd"] == 1).to_numpy(bool)
    scores = found["score"].to_numpy()
    ground = Ground(
        boxes, scores, ids, truth_boxes, truth_ids, ignored, stray, parts, truth_parts,
        columns * rows,
    )  # fmt: skip
    return ground, labels


def _read_boxes(path: Path, raster: fileio.Raster, options: dict[str, object]) -> pd.DataFrame:
    df = annotations.read_annotations(path, raster, **{"box_source": "auto"} | options).df
    df = annotations.filter_invalid_bboxes(df, raster.width, raster.height, annotations.area_filter)
    if unnamed := int(df["label"].isna().sum()):
        raise InputError(
            f"{path}: {unnamed} of {len(df)} boxes have no label; name them, or give the objects' "
            "with --default-label"
        )
    return df


def tabulate(values: Mapping[str, float]) -> pd.DataFrame:
    """Put values in rows `name, value, low, high`, with NaN where there is no interval."""
    ends = {f"{name}_{end}" for name in ("AP50", *BOX_VALUES) for end in ("low", "high")}
    rows = [
        (name, value, values.get(f"{name}_low", np.nan), values.get(f"{name}_high", np.nan))
        for name, value in values.items()
        if name not in ends
    ]
    return pd.DataFrame(rows, columns=["name", "value", "low", "high"])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure detections as a command; see its `--help` for the exit codes."""
    args = vars(_parser().parse_args(argv))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        sys.stdout.write(_report(**args))
    except (InputError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _report(
    detections: Path,
    truth: Path,
    raster: str,
    output: Path | None,
    aoi: Path | None,
    ignore: Path | None,
    block_size: int | None,
    iou_threshold: float,
    score_threshold: float | None,
    center_distance: float,
    resamples: int,
    seed: int,
    **reading: object,
) -> str:
    """Measure, write the output, and return the text to print."""
    if output is not None and output.suffix not in (".csv", ".json"):
        raise InputError(f"the output must end in .csv or .json, got {output}; rename it")
    opened = fileio.read_raster(raster)
    opened = opened.with_regions(annotations.read_regions(aoi, ignore, opened, "auto"))
    given = {name: value for name, value in reading.items() if value is not None}
    ground, labels = read_ground(detections, truth, opened, block_size, **given)
    evaluation = evaluate(
        {0: ground}, labels, iou_threshold, score_threshold, center_distance=center_distance,
        resamples=resamples, rng=np.random.default_rng(seed),
    )  # fmt: skip
    values = evaluation.values  # noqa: PD011 - no frame
    table = tabulate(values)
    if output is not None and output.suffix == ".csv":
        fileio.write_table(output, table)
    elif output is not None:
        chosen = "best F1 on this ground" if score_threshold is None else "given"
        made_from = {"detections": detections, "truth": truth, "raster": raster}
        fileio.write_json(output, made_from | {"threshold": chosen, "values": values})

    shown = table.set_index("name").map(lambda v: "" if np.isnan(v) else f"{v:.4g}")
    confusion = pd.DataFrame(
        evaluation.confusion, index=[*labels, "(background)"], columns=[*labels, "(missed)"]
    )
    notes = [
        "Precision, recall, F1, errors and counts are those of the detections from score "
        f"{values['score_threshold']:.4g} on."
    ]
    if score_threshold is None:
        notes.append(
            "That threshold has the best F1 on this very ground, which flatters the detector; give "
            "--score-threshold, chosen on other ground, for an honest number."
        )
    interval = f"low and high: {CONFIDENCE:.0%} interval over {ground.part_count} blocks of ground."
    notes.append(interval if "AP50_low" in values else "No intervals: they need several blocks.")
    heading = "Rows: objects; columns: detections that found them."
    parts = [shown.rename_axis(None).to_string(), heading, confusion.to_string(), *notes]
    return "\n".join([parts[0], "", *parts[1:3], "", *parts[3:], ""])


def _number(kind: type, low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must lie in {low:g} to {high:g}, got {text}")
        return value

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="metrics.py", allow_abbrev=False,
        description="Measure detections of a raster against its objects.",
        epilog="Exit code: 0 measured; 1 a file cannot be used, the message says why; 2 the "
        "command is not understood.",
    )  # fmt: skip
    # fmt: off
    add = parser.add_argument
    add("detections", type=Path, metavar="DETECTIONS",
        help="boxes with scores, as predict.py writes them: .gpkg, .geojson, .parquet, .csv, .json "
        "(COCO), .txt (YOLO)")
    add("truth", type=Path, metavar="TRUTH", help="the objects: an annotation file of any format")
    add("--raster", required=True, help="the raster of both: a file, or an address")
    add("--output", type=Path, metavar="FILE", help="also write the table, as .csv or .json")
    add("--iou-threshold", type=_number(float, 0.01, 1), default=0.5, metavar="IOU",
        help="least IoU at which a detection finds an object (default: %(default)s)")
    add("--score-threshold", type=_number(float, 0, 1), metavar="SCORE",
        help="detections from this score on count for all but the AP family (default: the one with "
        "the best F1 on this very ground)")
    add("--center-distance", type=_number(float, 1e-9, 1e9), default=CENTER_DISTANCE,
        metavar="SHARE",
        help="largest distance of the centres, in diameters of the object (default: %(default)s)")
    add("--aoi", type=Path, metavar="FILE", help="polygons outside which nothing counts")
    add("--ignore", type=Path, metavar="FILE", help="polygons inside which nothing counts")
    add("--block-size", type=_number(int, 1, 1e9), metavar="PX",
        help="side of the blocks of ground that are resampled for the intervals (default: an "
        "eighth of the raster's longer side); matching does not see them")
    add("--resamples", type=_number(int, 0, 1e9), default=RESAMPLES, metavar="N",
        help="resamples for the intervals; 0: no intervals (default: %(default)s)")
    add("--seed", type=_number(int, 0, 1e9), default=0,
        help="of the resamples (default: %(default)s)")
    reading = parser.add_argument_group("how TRUTH is to be understood").add_argument
    reading("--layer", help="layer of a vector file with several")
    reading("--label-column", metavar="NAME", help="column with the labels (default: label)")
    reading("--default-label", metavar="LABEL", help="label of objects without one")
    reading("--box-source", choices=("diameter", "columns"),
        help="of a table: boxes from centre and diameter, or from xmin, ymin, xmax, ymax (default: "
        "columns where it has them)")
    reading("--x-column", metavar="NAME", help="x of centres (default: pixel_x)")
    reading("--y-column", metavar="NAME", help="y of centres (default: pixel_y)")
    reading("--diameter-column", metavar="NAME", help="diameters (default: diameter)")
    reading("--diameter-scale", type=_number(float, 1e-9, 1e9), metavar="FACTOR",
        help="px, or metres on a map, per unit of the diameters (default: 1)")
    reading("--coordinates", metavar="CRS",
        help="auto, pixel, map (the raster's), lonlat, or a CRS such as EPSG:4326 (default: auto)")
    reading("--attribute-filter", metavar="EXPRESSION",
        help="which rows count, such as \"status == 'checked'\"")
    reading("--image-column", metavar="NAME", help="column that names the raster of each row")
    # fmt: on
    return parser


if __name__ == "__main__":
    sys.exit(main())
