"""Scores: matching, curves, merging across seams, AP against COCO's own implementation."""

# ruff: noqa: PD011 - the values of an evaluation are no frame

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import annotations
import fileio
import metrics
from ImageData import BOX_COLUMNS, InputError
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
    (((_, kept, target),),) = collector.batches
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
    truth = random_boxes(rng, 400, extent=1000)
    found = np.concatenate([truth + rng.normal(0, 0.5, truth.shape), random_boxes(rng, 200, 1000)])
    g = ground(found, rng.uniform(0, 1, 600), np.zeros(600), truth, np.zeros(400))
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


def test_sizes_are_thirds_of_the_objects():
    sides = np.array([4.0, 5, 6, 10, 11, 12, 30, 31, 32])
    corner = np.arange(9)[:, None] * [100.0, 0]
    truth = np.hstack([corner, corner + sides[:, None]])
    small = sides < 7
    g = ground(truth[~small], np.linspace(0.9, 0.5, 6), np.zeros(6), truth, np.zeros(9))
    values = metrics.evaluate({0: g}, ["a"], 0.5, 0.5).values
    assert (values["medium_from"], values["large_from"]) == (8.7, 18.0)
    assert [values[f"AP_{n}"] for n in metrics.SIZES] == pytest.approx([0, 1, 1])
    assert values["AR"] == pytest.approx(2 / 3)


def test_what_is_undefined_is_absent_and_the_rest_is_json():
    alike = [[0, 0, 10, 10], [50, 0, 60, 10]]
    values = metrics.evaluate({0: ground([], [], [], alike, [0, 0])}, ["a", "b"], 0.5).values
    assert not {"AP_small", "position_error", "calibration_error", "AP50_low"} & values.keys()
    assert values["AP_large"] == values["AR"] == values["center_f1"] == 0
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert {type(value) for value in values.values()} == {float}


def brute_force_centers(boxes, scores, truth, distance):
    taken, result = set(), [UNMATCHED] * len(boxes)
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        best = None
        for j, (x0, y0, x1, y1) in enumerate(truth):
            across = max(x1 - x0, y1 - y0)
            a, b, c, d = boxes[i]
            factor = max(c - a, d - b) / across
            away = np.hypot((a + c - x0 - x1) / 2, (b + d - y0 - y1) / 2) / across
            if j not in taken and away < distance and 0.5 <= factor <= 2:
                best = min(best or (away, j), (away, j))
        if best:
            result[i] = best[1]
            taken.add(best[1])
    return result


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(0, 25), st.integers(0, 25), st.floats(0.1, 2))
def test_matching_of_centers_equals_brute_force(seed, n, m, distance):
    rng = np.random.default_rng(seed)
    boxes, truth = (random_boxes(rng, count, 60).astype(float) for count in (n, m))
    scores = rng.uniform(0, 1, n).round(1)
    matched = metrics.match_centers(boxes, scores, truth, distance)
    assert matched.tolist() == brute_force_centers(boxes, scores, truth, distance)


def test_centers_and_diameters_of_what_was_found_by_hand():
    truth = [[0, 0, 10, 10], [50, 50, 70, 70], [100, 0, 110, 10], [200, 0, 210, 10]]
    found = [
        [3, 4, 13, 14],  # 5 px away, half a diameter: no longer near
        [53, 54, 77, 78],  # (5, 6) px away, a fifth too large
        [101, -1, 109, 11],  # at the same place, a fifth too large by its longer side
        [197, -3, 218, 18],  # more than twice as large
        [300, 300, 310, 310],  # on an ignored object
    ]
    ignored = [False] * 4 + [True]
    g = ground(found, [0.9, 0.8, 0.7, 0.6, 0.5], [0] * 5, [*truth, [295, 295, 400, 400]], [0] * 5,
               ignored)  # fmt: skip
    result = metrics.evaluate({0: g}, ["a"], 0.5, 0.0)
    values = result.values
    assert result.center_matches[0].tolist() == [UNMATCHED, 1, 2, UNMATCHED, IGNORED]
    assert values["center_precision"] == values["center_recall"] == values["center_f1"] == 0.5
    assert values["position_error"] == pytest.approx(np.hypot(5, 6) / 2)
    assert values["position_error_share"] == pytest.approx(np.hypot(5, 6) / 20 / 2)
    assert values["diameter_error"] == values["diameter_bias"] == pytest.approx(0.2)


def test_reliability_of_a_small_case_by_hand():
    scores = np.array([0.2, 0.2, 0.2, 0.6, 0.8, 0.9])
    correct = np.array([True, False, False, True, False, True])
    table = metrics.measure_reliability(scores, correct, bins=2)
    assert table.detections.tolist() == [3, 3]
    assert table.precision.tolist() == pytest.approx([1 / 3, 2 / 3])
    assert table.score.tolist() == pytest.approx([0.2, 2.3 / 3])
    assert table.error == pytest.approx((abs(1 / 3 - 0.2) + 0.1) / 2)
    assert np.isnan(metrics.measure_reliability(scores[:0], correct[:0]).error)


def test_calibrated_scores_have_no_calibration_error():
    rng = np.random.default_rng(0)
    scores = rng.uniform(0, 1, 100_000)
    calibrated = metrics.measure_reliability(scores, rng.uniform(0, 1, 100_000) < scores)
    assert calibrated.error < 0.01
    assert len(calibrated.score) == 10
    overconfident = metrics.measure_reliability(scores, rng.uniform(0, 1, 100_000) < scores / 2)
    assert overconfident.error == pytest.approx(0.25, abs=0.01)


class Draws:
    """Stands in for a generator, to know what it draws."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def multinomial(self, *args):
        self.drawn = self.rng.multinomial(*args)
        return self.drawn


@pytest.mark.parametrize("seed", [1, 5, 9])
def test_a_resample_is_the_evaluation_of_its_blocks_as_often_as_they_were_drawn(seed):
    rng = np.random.default_rng(seed)
    grounds = {}
    for block in range(5):
        truth, labels = random_boxes(rng, 12), rng.integers(0, 2, 12)
        found = np.concatenate([truth + rng.normal(0, 1, truth.shape), random_boxes(rng, 6)])
        scores = rng.uniform(0, 1, 18)
        grounds[block] = ground(found, scores, np.append(labels, [0] * 6), truth, labels)
    draws = Draws(seed)
    values = metrics.evaluate(grounds, ["a", "b"], 0.5, 0.4, resamples=12, rng=draws).values
    names = ("AP50", "box_precision", "box_recall", "box_f1")
    expected = []
    for times in draws.drawn:
        drawn = enumerate(np.repeat(np.arange(5), times))
        again = {new: grounds[block] for new, block in drawn}
        result = metrics.evaluate(again, ["a", "b"], 0.5, 0.4, resamples=0).values
        expected.append([result[name] for name in names])
    low, high = np.quantile(expected, [0.025, 0.975], axis=0)
    assert [values[f"{name}_low"] for name in names] == pytest.approx(low)
    assert [values[f"{name}_high"] for name in names] == pytest.approx(high)
    for name in names:
        assert values[f"{name}_low"] < values[name] < values[f"{name}_high"]


def test_equal_input_has_equal_intervals_and_one_block_has_none():
    rng = np.random.default_rng(2)
    grounds = {i: random_grounds(rng)[0] for i in range(6)}
    first, second = (metrics.evaluate(grounds, ["a", "b", "c"], 0.5, 0.5).values for _ in range(2))
    assert first == second
    assert first["AP50_low"] <= first["AP50_high"]
    alone = metrics.evaluate({0: grounds[0]}, ["a", "b", "c"], 0.5, 0.5).values
    assert not [name for name in alone if name.endswith(("_low", "_high"))]


@pytest.fixture
def scene(tmp_path):
    """A raster of 200 x 160 px, objects in a table, and detections: two right, one wrong."""
    path = tmp_path / "scene.tif"
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(0.5, 0, 400_000, 0, -0.5, 5_600_000)}
    with fileio.create_raster(path, width=200, height=160, count=1, dtype="uint8", **place) as dst:
        dst.write(np.full((1, 160, 200), 9, np.uint8))
    raster = fileio.read_raster(path)
    # one lies on a border of the blocks; the last but one reaches over the edge; the last is off
    boxes = [[10, 10, 22, 22], [95, 75, 107, 88], [188, 150, 208, 165], [230, 10, 250, 30]]
    truth = pd.DataFrame(boxes, columns=BOX_COLUMNS).astype(float).pipe(annotations.measure_bboxes)
    truth = truth.assign(label="crater")
    truth.to_csv(tmp_path / "truth.csv", index=False)
    found = pd.DataFrame([[10, 10, 22, 23], [96, 75, 107, 88], [60, 20, 70, 30]],
                         columns=BOX_COLUMNS).astype(float)  # fmt: skip
    found = annotations.measure_bboxes(found).assign(label="crater", score=[0.8, 0.9, 0.3])
    return raster, found, tmp_path


@pytest.mark.parametrize("suffix", [".csv", ".gpkg", ".geojson", ".parquet", ".json", ".txt"])
def test_the_command_measures_files_of_any_format(scene, suffix, capsys):
    raster, found, folder = scene
    detections = fileio.write_annotations(folder / f"found{suffix}", found, raster)
    table = folder / "table.json"
    arguments = [detections, folder / "truth.csv", "--raster", raster.path, "--output", table]
    assert metrics.main(list(map(str, arguments))) == 0
    result = json.loads(table.read_text())
    values = result["values"]
    assert (values["objects"], values["detections"]) == (3, 2)  # the one off the raster is none
    assert values["box_recall"] == pytest.approx(2 / 3)
    assert values["box_precision"] == 1
    assert values["score_threshold"] == pytest.approx(0.8)
    assert values["AP50"] == pytest.approx(67 / 101)
    assert 0 <= values["box_recall_low"] <= values["box_recall_high"] <= 1
    printed = capsys.readouterr().out
    assert "best F1 on this very ground" in printed
    assert "over 56 blocks of ground" in printed
    assert printed.splitlines()[1].split()[:2] == ["AP", f"{values['AP']:.4g}"]


def test_the_command_takes_a_threshold_and_writes_a_table(scene, capsys):
    raster, found, folder = scene
    fileio.write_annotations(folder / "found.csv", found, raster)
    arguments = [folder / "found.csv", folder / "truth.csv", "--raster", raster.path,
                 "--score-threshold", 0.1, "--output", folder / "table.csv"]  # fmt: skip
    assert metrics.main(list(map(str, arguments))) == 0
    table = pd.read_csv(folder / "table.csv").set_index("name")
    assert list(table.columns) == ["value", "low", "high"]
    assert table.loc["box_precision", "value"] == pytest.approx(2 / 3)
    assert table.loc["box_precision", "low"] <= table.loc["box_precision", "high"]
    assert "very ground" not in capsys.readouterr().out


def test_what_the_command_cannot_use_is_said(scene, capsys):
    raster, found, folder = scene
    fileio.write_annotations(folder / "found.csv", found.drop(columns="score"), raster)
    files = [str(folder / "found.csv"), str(folder / "truth.csv"), "--raster", str(raster.path)]
    assert metrics.main(files) == 1
    assert "3 of 3 detections have no score" in capsys.readouterr().err
    assert metrics.main([*files, "--output", "table.xlsx"]) == 1
    assert ".csv or .json" in capsys.readouterr().err
    with pytest.raises(SystemExit) as refused:
        metrics.main([*files, "--score-threshold", "7"])
    assert refused.value.code == 2
    with pytest.raises(InputError, match="no label"):
        metrics.read_ground(
            fileio.write_annotations(folder / "unnamed.csv", found.assign(label=None), raster),
            folder / "truth.csv", raster,
        )  # fmt: skip


def test_ground_outside_the_area_of_interest_counts_neither_way(scene):
    raster, found, folder = scene
    regions = fileio.Regions(aoi=(metrics.shapely.box(0, 0, 50, 160),))
    path = fileio.write_annotations(folder / "found.csv", found, raster)
    ground, labels = metrics.read_ground(path, folder / "truth.csv", raster.with_regions(regions))
    values = metrics.evaluate({0: ground}, labels, 0.5, 0.0).values
    assert (values["objects"], values["detections"]) == (1, 1)


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


# ---------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------


def test_masks_are_counted_once_within_cores_and_by_hand():
    """Two windows that overlap by 4 px; each counts its core."""
    truth = np.array([[0, 0, 1, 1, 1, 255, 0, 0]] * 2)
    found = np.array([[0, 1, 1, 1, 0, 0, 0, 0]] * 2)
    collector = metrics.ConfusionCollector(2)
    for x, core in ((0, (0, 0, 3, 2)), (2, (3, 0, 8, 2))):
        part = slice(x, x + 6)
        target = {"ground": torch.tensor(7), "core": torch.tensor(core).float(),
                  "window": torch.tensor([x, 0, x + 6, 2]).float()}  # fmt: skip
        predicted, known = (
            torch.from_numpy(found[None, :, part]),
            torch.from_numpy(truth[None, :, part]),
        )
        collector.add(predicted, known, [target])
    measured = metrics.evaluate_masks(collector.merge(), ["calm", "rough"], resamples=0)
    # of 7 known columns: calm 4, of which 3 found; rough 3, of which 2 found
    np.testing.assert_array_equal(measured.confusion, 2 * np.array([[3, 1], [1, 2]]))
    values = measured.values
    assert values["pixel_accuracy"] == pytest.approx(5 / 7)
    assert values["IoU_calm"] == pytest.approx(3 / 5)
    assert values["IoU_rough"] == pytest.approx(2 / 4)
    assert values["mean_IoU"] == pytest.approx((3 / 5 + 2 / 4) / 2)
    assert values["F1_rough"] == pytest.approx(2 / 3)
    assert values["mean_precision"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert values["mean_recall"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert values["pixels"] == 14
    assert not collector.merge()


def test_classes_that_the_ground_does_not_show_are_left_out_of_means():
    confusion = np.array([[[6, 0, 2], [0, 0, 0], [4, 0, 0]]])
    values = metrics.evaluate_masks({0: confusion}, ["a", "b", "c"]).values
    assert "IoU_b" not in values
    assert values["mean_IoU"] == pytest.approx(6 / 12 / 2)
    assert values["precision_c"] == 0
    assert "mean_IoU_low" not in values  # there is one part only
    none = metrics.evaluate_masks({}, ["a"]).values
    assert none == {"pixels": 0}


def test_intervals_of_masks_hold_the_value_and_narrow_with_blocks():
    rng = np.random.default_rng(0)

    def width(count):
        blocks = {}
        for block in range(count):
            right = rng.integers(60, 90)
            blocks[block] = np.array([[[right, 100 - right], [10, 90]]])
        values = metrics.evaluate_masks(blocks, ["a", "b"]).values
        assert values["mean_IoU_low"] < values["mean_IoU"] < values["mean_IoU_high"]
        return values["mean_IoU_high"] - values["mean_IoU_low"]

    assert width(400) < width(20) / 2
