"""Scores: matching, curves, merging across seams, AP against COCO's own implementation."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import metrics
from metrics import IGNORED, UNMATCHED, Ground


def random_boxes(rng, count, extent=100.0):
    corner = rng.uniform(0, extent, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(2, 30, (count, 2))], 1).astype(np.float32)


def brute_force_match(boxes, scores, truth, threshold):
    def iou(a, b):
        w = min(a[2], b[2]) - max(a[0], b[0])
        h = min(a[3], b[3]) - max(a[1], b[1])
        if w <= 0 or h <= 0:
            return 0.0
        areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
        return w * h / (areas - w * h)

    taken, result = set(), [UNMATCHED] * len(boxes)
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        free = [(iou(boxes[i], truth[j]), -j) for j in range(len(truth)) if j not in taken]
        if free and max(free)[0] >= threshold:
            result[i] = -max(free)[1]
            taken.add(result[i])
    return result


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(0, 25), st.integers(0, 25), st.floats(0.05, 0.9))
def test_matching_equals_brute_force(seed, n, m, threshold):
    rng = np.random.default_rng(seed)
    truth = random_boxes(rng, m).astype(np.float64)
    near = truth[rng.integers(m, size=n)] + rng.normal(0, 3, (n, 4)) if m else random_boxes(rng, n)
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
    scores = rng.permutation(n) / max(n, 1)
    matched = metrics.match_boxes(near, scores, truth, threshold)
    assert matched.tolist() == brute_force_match(near, scores, truth, threshold)
    hits = matched[matched != UNMATCHED]
    assert len(hits) == len(set(hits.tolist()))


def test_a_detection_on_ignored_ground_counts_neither_way():
    truth = np.array([[0, 0, 10, 10], [50, 50, 60, 60]], float)
    boxes = np.array([[0, 0, 10, 10], [50, 50, 60, 60], [80, 80, 90, 90]], float)
    matched = metrics.match_boxes(
        boxes, np.array([0.9, 0.8, 0.7]), truth, 0.5, np.array([False, True])
    )
    assert matched.tolist() == [0, IGNORED, UNMATCHED]


def test_the_sweep_counts_equal_scores_together():
    curve = metrics.precision_recall_curve(
        np.array([0.9, 0.5, 0.5, 0.1]), np.array([True, True, False, False]), 2
    )
    assert curve.threshold.tolist() == [0.9, 0.5, 0.1]
    assert curve.precision.tolist() == pytest.approx([1, 2 / 3, 0.5])
    assert curve.recall.tolist() == pytest.approx([0.5, 1, 1])
    assert curve.best == 1
    assert curve.f1[1] == pytest.approx(0.8)


def ground(boxes, scores, labels, truth, truth_labels, ignored=None, stray=None):
    order = np.argsort(-np.asarray(scores, np.float32), kind="stable")
    return Ground(
        np.asarray(boxes, np.float32).reshape(-1, 4)[order],
        np.asarray(scores, np.float32)[order],
        np.asarray(labels, np.int64)[order],
        np.asarray(truth, np.float32).reshape(-1, 4),
        np.asarray(truth_labels, np.int64),
        np.zeros(len(truth), bool) if ignored is None else np.asarray(ignored),
        np.zeros(len(order), bool) if stray is None else np.asarray(stray)[order],
    )


def test_detections_on_ground_that_does_not_count_are_neither_right_nor_wrong():
    found = [[0, 0, 10, 10], [20, 20, 30, 30], [41, 40, 51, 50]]
    truth = [[0, 0, 10, 10], [40, 40, 50, 50]]
    scores, labels = [0.7, 0.9, 0.8], [0, 0, 0]
    strict = ground(found, scores, labels, truth, [0, 0])
    # the second lies on nodata; the third, too, but it found an object that reaches out of it
    loose = ground(found, scores, labels, truth, [0, 0], stray=[False, True, True])
    before, after = (metrics.evaluate({0: g}, ["a"], 0.5, 0.5) for g in (strict, loose))
    assert before.values["box_precision"] == pytest.approx(2 / 3)
    assert after.values["box_precision"] == after.values["box_recall"] == 1
    assert after.values["AP50"] == pytest.approx(1)
    assert before.values["AP50"] < 0.8
    assert after.matches[0].tolist() == [metrics.IGNORED, 1, 0]


def test_the_collector_marks_strays_by_their_centres():
    counted = torch.zeros(10, 10, dtype=torch.bool)
    counted[:, :5] = True
    found = {"boxes": torch.tensor([[0.0, 0, 8, 8], [2, 0, 9, 8], [6, 6, 30, 30]]),
             "scores": torch.ones(3), "labels": torch.zeros(3, dtype=torch.int64)}  # fmt: skip
    collector = metrics.GroundCollector()
    collector.add([found], [{"ground": torch.tensor(0), "counted": counted}])
    (kept,), (target,) = collector.tiles[0]
    assert kept["stray"].tolist() == [False, True, True]
    assert "counted" not in target


def test_values_of_a_small_case_by_hand():
    g = ground(
        boxes=[[0, 0, 10, 10], [20, 20, 30, 30], [70, 70, 80, 80]], scores=[0.9, 0.8, 0.7],
        labels=[0, 0, 1],
        truth=[[0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]], truth_labels=[0, 1, 1],
    )  # fmt: skip
    result = metrics.evaluate({0: g}, ["a", "b"], 0.5, 0.5)
    values = result.values
    assert values["box_precision"] == pytest.approx(2 / 3)
    assert values["box_recall"] == pytest.approx(2 / 3)
    assert values["box_f1"] == pytest.approx(2 / 3)
    assert values["recall_a"] == 1.0
    assert values["recall_b"] == 0.0  # found once, under another label
    assert values["class_recall"] == 0.5
    # rows: a, b, background; columns: a, b, missed
    assert result.confusion.tolist() == [[1, 0, 0], [1, 0, 1], [0, 1, 0]]


def test_the_threshold_moves_detections_not_ap():
    rng = np.random.default_rng(0)
    truth = random_boxes(rng, 30)
    g = ground(truth[:20], rng.uniform(0, 1, 20), np.zeros(20), truth, np.zeros(30))
    low, high = (metrics.evaluate({0: g}, ["a"], 0.5, t).values for t in (0.0, 0.9))
    assert low["AP50"] == high["AP50"]
    assert low["detections"] > high["detections"]
    best = metrics.evaluate({0: g}, ["a"], 0.5).values
    assert best["box_f1"] >= max(low["box_f1"], high["box_f1"])


def test_nothing_detected_and_nothing_there_are_no_accidents():
    nothing = ground([], [], [], [[0, 0, 5, 5]], [0])
    values = metrics.evaluate({0: nothing}, ["a"], 0.5).values
    assert (values["AP50"], values["box_recall"], values["box_precision"]) == (0, 0, 0)
    empty = ground([], [], [], [], [])
    assert metrics.evaluate({0: empty}, ["a"], 0.5).values["box_f1"] == 0


def random_grounds(rng):
    """Draw blocks with classes, ignored objects, duplicates, spurious boxes and equal scores."""
    grounds, classes = {}, int(rng.integers(1, 4))
    for block in range(rng.integers(1, 5)):
        truth = random_boxes(rng, rng.integers(0, 25), extent=rng.choice([40.0, 150.0]))
        copies = rng.integers(0, len(truth), 2 * len(truth)) if len(truth) else []
        near = truth[copies] + rng.normal(0, rng.choice([0.3, 3.0]), (len(copies), 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        found = np.concatenate([near, random_boxes(rng, 5)])
        truth_labels = rng.integers(0, classes, len(truth))
        labels = np.concatenate([truth_labels[copies], rng.integers(0, classes, 5)])
        labels = np.where(rng.random(len(labels)) < 0.1, 0, labels)
        scores = rng.uniform(0, 1, len(found)).round(rng.choice([1, 6]))
        ignored = rng.random(len(truth)) < rng.choice([0, 0.3])
        grounds[block] = ground(found, scores, labels, truth, truth_labels, ignored)
    return grounds


def coco_values(grounds, classes, ranges):
    """Measure AP, AP50, AP75 and AR per range of sides (px) by COCO's code, NaN if undefined."""

    def entries(boxes, labels, block, more):
        sides = boxes[:, 2:] - boxes[:, :2]
        return [
            {"image_id": block, "category_id": int(label), "bbox": [*low.tolist(), *side.tolist()]}
            | {"area": float(side.prod())} | extra
            for low, side, label, extra in zip(boxes[:, :2], sides, labels, more, strict=True)
        ]  # fmt: skip

    truth, found = [], []
    for block, g in grounds.items():
        boxes, known = g.boxes.astype(float), g.truth_boxes.astype(float)
        crowd = [{"iscrowd": int(flag)} for flag in g.truth_ignored]
        truth += entries(known, g.truth_labels, block, crowd)
        scores = [{"score": float(score)} for score in g.scores]
        found += entries(boxes, g.labels, block, scores)
    truth = [entry | {"id": i} for i, entry in enumerate(truth, 1)]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"images": [{"id": block} for block in grounds], "annotations": truth,
                        "categories": [{"id": c} for c in range(classes)]}  # fmt: skip
        coco.createIndex()
        detected = COCO()
        detected.dataset = coco.dataset | {
            "annotations": [e | {"id": i, "iscrowd": 0} for i, e in enumerate(found, 1)]
        }
        detected.createIndex()
        run = COCOeval(coco, detected, "bbox")
        run.params.maxDets = [10**6]
        # a side on an edge belongs to the upper range, COCO's ranges hold both ends
        run.params.areaRng = [[low**2, np.nextafter(high**2, 0)] for low, high in ranges]
        run.params.areaRngLbl = [str(r) for r in ranges]
        run.evaluate()
        run.accumulate()
    precision, recall = run.eval["precision"][..., 0], run.eval["recall"][..., 0]
    valid = precision[0, 0] > -1  # (K, A)
    result = []
    for i in range(len(ranges)):
        p, r = precision[:, :, valid[:, i], i], recall[:, valid[:, i], i]
        result.append(
            [a.mean() if a.size else np.nan for a in (p, p[0], p[5], r)]
        )  # fmt: skip
    return np.array(result)


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 2**32 - 1))
def test_ap_and_ar_equal_cocos_own_code(seed):
    grounds = random_grounds(np.random.default_rng(seed))
    values = metrics.evaluate(grounds, ["a", "b", "c"], 0.5, 0.5, resamples=0).values
    edges = [values.get(name, 1.0) for name in ("medium_from", "large_from")]
    ranges = list(zip((0, 0, *edges), (1e5, *edges, 1e5), strict=True))
    expected = coco_values(grounds, 3, ranges)
    ours = [values[name] for name in ("AP", "AP50", "AP75", "AR")]
    np.testing.assert_allclose(ours, np.nan_to_num(expected[0]), atol=1e-6)
    sized = [values.get(f"AP_{name}", np.nan) for name in ("small", "medium", "large")]
    np.testing.assert_allclose(sized, expected[1:, 0], atol=1e-6)


def test_no_limit_truncates_the_detections_of_dense_ground():
    rng = np.random.default_rng(3)
    truth = random_boxes(rng, 1500, extent=3000)
    found = np.concatenate([truth + rng.normal(0, 0.5, truth.shape), random_boxes(rng, 700, 3000)])
    g = ground(found, rng.uniform(0, 1, 2200), np.zeros(2200), truth, np.zeros(1500))
    values = metrics.evaluate({0: g}, ["a"], 0.5, 0.5).values
    expected = coco_values({0: g}, 1, [(0, 1e5)])[0]
    assert [values[n] for n in ("AP", "AP50", "AP75", "AR")] == pytest.approx(expected, abs=1e-6)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.integers(1, 12))
def test_asking_all_at_once_ends_as_taking_turns_does(seed, boxes, objects):
    rng = np.random.default_rng(seed)
    wishes = [rng.permutation(objects)[: rng.integers(0, objects + 1)] for _ in range(boxes)]
    endless = rng.random(objects) < 0.2
    taken, expected = set(), []
    for wish in wishes:
        free = [obj for obj in wish if endless[obj] or obj not in taken]
        expected.append(free[0] if free else -1)
        taken |= set(free[:1])
    of_box = np.repeat(np.arange(boxes), [len(wish) for wish in wishes])
    of_truth = np.concatenate([np.empty(0, int), *wishes])
    pair = metrics._take_in_turn(of_box, of_truth, boxes, endless)
    got = np.append(of_truth, -1)[pair]
    assert got.tolist() == expected


def tile_of(core, offset, boxes, scores, truth, ids, owned, size=64):
    found = {
        "boxes": torch.tensor(boxes).float().reshape(-1, 4),
        "scores": torch.tensor(scores).float(),
        "stray": torch.zeros(len(scores), dtype=torch.bool),
        "labels": torch.zeros(len(scores), dtype=torch.long),
    }
    target = {
        "core": torch.tensor(core).float(),
        "window": torch.tensor([*offset, offset[0] + size, offset[1] + size]).float(),
        "truth_boxes": torch.tensor(truth).float().reshape(-1, 4),
        "truth_labels": torch.zeros(len(ids), dtype=torch.long),
        "truth_ids": torch.tensor(ids, dtype=torch.long),
        "truth_owned": torch.tensor(owned, dtype=torch.bool),
        "ground": torch.tensor(7),
    }  # fmt: skip
    return found, target


def test_an_object_on_a_seam_is_reported_and_demanded_once():
    """Two windows of 64 px overlap by 32; the object's centre lies at the seam, x = 48."""
    box = [40.0, 10, 56, 26]
    left = tile_of([0, 0, 48, 64], [0, 0], [box], [0.8], [box], [3], [False])
    moved = [40.0 - 32 + 1, 10, 56 - 32 + 1, 26]  # the right window sees it a pixel further
    right = tile_of([48, 0, 96, 64], [32, 0], [moved], [0.9], [box], [3], [True])
    collector = metrics.GroundCollector()
    for found, target in (left, right):
        collector.add([found], [target])
    merged = collector.merge(0.3)[7]
    assert len(merged.boxes) == 1
    assert merged.scores[0] == pytest.approx(0.9)
    assert merged.boxes[0].tolist() == [41, 10, 57, 26]
    assert merged.truth_ignored.tolist() == [False]
    assert metrics.evaluate({7: merged}, ["a"], 0.5, 0.5).values["box_f1"] == 1.0


def test_an_object_is_not_lost_when_each_window_sees_it_on_the_others_side():
    left = tile_of([0, 0, 48, 64], [0, 0], [[40.4, 10, 56.4, 26]], [0.8], [[40, 10, 56, 26]], [3],
                   [True])  # fmt: skip
    right = tile_of([48, 0, 96, 64], [32, 0], [[7.6, 10, 23.6, 26]], [0.7], [[40, 10, 56, 26]], [3],
                    [False])  # fmt: skip
    merged = metrics.merge_tiles([left[0], right[0]], [left[1], right[1]], 0.3)
    assert merged.scores.tolist() == pytest.approx([0.8])


def test_a_fragment_at_the_tiles_edge_does_not_displace_the_whole():
    """256 px windows that overlap by 64 px; the object is twice as wide as the overlap."""
    whole = [218.0, 40, 338, 160]
    fragment = [218.0, 40, 256, 160]
    left = tile_of([0, 0, 224, 256], [0, 0], [fragment], [0.9], [], [], [], size=256)
    right = tile_of([224, 0, 448, 256], [192, 0], [[26.0, 40, 146, 160]], [0.8], [whole], [1],
                    [True], size=256)  # fmt: skip
    merged = metrics.merge_tiles([left[0], right[0]], [left[1], right[1]], 0.3)
    assert merged.boxes.tolist() == [whole]


def test_an_object_of_other_ground_is_ignored():
    box = [56.0, 10, 64, 18]
    found, target = tile_of([0, 0, 64, 64], [0, 0], [box], [0.8], [box], [5], [False])
    merged = metrics.merge_tiles([found], [target], 0.3)
    assert merged.truth_ignored.tolist() == [True]
    values = metrics.evaluate({0: merged}, ["a"], 0.5, 0.5).values
    assert (values["objects"], values["detections"]) == (0, 0)
