"""Evaluation of many detections against COCO's own code and DeepForest's.

    .bench-venv/bin/python benchmarks/bench_metrics.py [--short] [--sizes BOXES ...] [--json FILE]

All boxes lie in one block of ground, as dense as craters on the Moon. The AP family is AP, AP50,
AP75, AR and AP of three sizes; everything is that, matching by IoU and by centres, calibration, and
1,000 resamples of 64 parts. DeepForest matches boxes one to one at one IoU, so that the sum of the
IoUs is largest, whatever the scores; ours matches the best scores first, as COCO does, and so their
recalls differ a little. pycocotools compares all with all.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import common
import numpy as np

import metrics
from ImageData import BOX_COLUMNS

AREA_PER_OBJECT = 640.0  # px^2: 1,000 objects in 800 x 800 px
PARTS = 8  # along each side of the ground, for the intervals
FAMILY = ("AP", "AP50", "AR", *(f"AP_{size}" for size in metrics.SIZES))


def make_ground(count: int, rng: np.random.Generator) -> metrics.Ground:
    """Draw objects, and as many detections: most near an object, some twice, the rest spurious."""
    extent = np.sqrt(count * AREA_PER_OBJECT)
    center = rng.uniform(0, extent, (count, 2))
    radius = np.exp(rng.normal(np.log(5), 0.5, (count, 1)))
    truth = np.hstack([center - radius, center + radius])
    near = rng.integers(0, count, count - count // 4)
    found = truth[near] + rng.normal(0, 0.1, (len(near), 4)) * radius[near]
    spurious = rng.uniform(0, extent, (count // 4, 2))
    found = np.vstack([found, np.hstack([spurious - 5, spurious + 5])])
    scores = np.concatenate([rng.beta(4, 2, len(near)), rng.beta(2, 4, len(spurious))])
    order = np.argsort(-scores)
    found, scores = found[order], scores[order]
    cells = [
        (box[:, :2] // (extent / PARTS)).clip(0, PARTS - 1).astype(int) @ [1, PARTS]
        for box in (found, truth)
    ]
    zeros = np.zeros(count, dtype=np.int64)
    return metrics.Ground(
        found, scores, zeros, truth, zeros, zeros > 0, zeros > 0, *cells, PARTS**2
    )


def family(ground: metrics.Ground) -> dict[str, float]:
    """Compute the AP family alone."""
    pairs = {0: metrics.find_pairs(ground.boxes, ground.truth_boxes)}
    pool = metrics._pool({0: ground}, pairs, {0: ~ground.stray})
    return metrics._average_precisions(pool, metrics._judge(pool, 0, np.inf))


def coco_evaluation(ground: metrics.Ground) -> object:
    """Return pycocotools' evaluation of the same, ready to run."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def entries(boxes: np.ndarray, **columns: np.ndarray) -> list[dict[str, object]]:
        sides = boxes[:, 2:] - boxes[:, :2]
        columns |= {"bbox": np.hstack([boxes[:, :2], sides]), "area": sides.prod(axis=1)}
        common = {"image_id": 0, "category_id": 0, "iscrowd": 0}
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [
            common | {"id": i} | dict(zip(columns, row, strict=True))
            for i, row in enumerate(rows, 1)
        ]

    medium, large = (
        float(f"{q:.2g}") for q in np.quantile(metrics._sides(ground.truth_boxes), [1 / 3, 2 / 3])
    )
    both = []
    with contextlib.redirect_stdout(io.StringIO()):
        for rows in (entries(ground.truth_boxes), entries(ground.boxes, score=ground.scores)):
            both.append(COCO())
            both[-1].dataset = {
                "images": [{"id": 0}], "categories": [{"id": 0}], "annotations": rows,
            }  # fmt: skip
            both[-1].createIndex()
        run = COCOeval(*both, "bbox")
    run.params.maxDets = [len(ground.boxes)]
    ranges = [(0, 1e5), *itertools.pairwise([0, medium, large, 1e5])]
    run.params.areaRng = [[low**2, np.nextafter(high**2, 0)] for low, high in ranges]
    run.params.areaRngLbl = ["all", *metrics.SIZES]
    return run


def coco_family(run: object) -> dict[str, float]:
    """Run pycocotools' evaluation."""
    with contextlib.redirect_stdout(io.StringIO()):
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][:, :, 0, :, 0]
    values = dict(zip(("AP", *(f"AP_{s}" for s in metrics.SIZES)), precision.mean(axis=(0, 1)),
                      strict=True))  # fmt: skip
    return values | {"AP50": precision[0, :, 0].mean(), "AR": run.eval["recall"][:, 0, 0, 0].mean()}


def deepforest(folder: Path, count: int) -> common.Work:
    """Match with DeepForest; tell the recall."""
    import geopandas as gpd
    import shapely
    from deepforest import evaluate

    ground = _ground(count)

    def table(boxes: np.ndarray, **columns: object) -> gpd.GeoDataFrame:
        columns |= dict(zip(BOX_COLUMNS, boxes.T, strict=True))
        values = {"image_path": "a.tif", "label": "object", **columns}
        return gpd.GeoDataFrame(values, geometry=shapely.box(*boxes.T), index=range(len(boxes)))

    found = table(ground.boxes, score=ground.scores)
    truth = table(ground.truth_boxes)
    return lambda: float(evaluate.evaluate_boxes(found, truth, iou_threshold=0.5)["box_recall"])


def _ground(count: int) -> metrics.Ground:
    return make_ground(count, np.random.default_rng(0))


def ours(folder: Path, count: int, evaluate: Callable[[metrics.Ground], object]) -> common.Work:
    """Evaluate with the project, after a little that warms."""
    evaluate(_ground(PARTS**2))
    ground = _ground(count)
    return lambda: evaluate(ground)


def matched_share(ground: metrics.Ground) -> float:
    """Match one to one at IoU 0.5; return the recall."""
    matches = metrics.match_boxes(ground.boxes, ground.scores, ground.truth_boxes, 0.5)
    return float((matches >= 0).sum() / len(ground.truth_boxes))


def everything(ground: metrics.Ground) -> float:
    """Compute all values; return the recall."""
    return float(metrics.evaluate({0: ground}, ["object"], 0.5, 0.0).values["box_recall"])


def shown(values: Mapping[str, float]) -> list[float]:
    """Return what both families have, in one order."""
    return [float(values[name]) for name in FAMILY]


def coco(folder: Path, count: int) -> common.Work:
    """Compute the AP family with pycocotools."""
    coco_family(coco_evaluation(_ground(PARTS**2)))
    run = coco_evaluation(_ground(count))
    return lambda: shown(coco_family(run))


if __name__ == "__main__":
    common.main(
        common.Stage(
            title="Evaluating detections",
            size="boxes",
            sizes=(1_000, 10_000, 100_000),
            short=(1_000, 10_000, 100_000),
            make=None,
            ways={
                "ours, matching": partial(ours, evaluate=matched_share),
                "ours, AP family": partial(ours, evaluate=lambda ground: shown(family(ground))),
                "ours, everything": partial(ours, evaluate=everything),
                "pycocotools, AP family": coco,
                "DeepForest evaluate_boxes": deepforest,
            },
            against={
                "pycocotools, AP family": "ours, AP family",
                "DeepForest evaluate_boxes": "ours, matching",
            },
            agree=(
                ("ours, AP family", "pycocotools, AP family"),
                ("ours, matching", "ours, everything"),
            ),
            needs={
                "DeepForest evaluate_boxes": "deepforest",
                "pycocotools, AP family": "pycocotools",
            },
            aims=(
                common.Aim("ours, matching", "DeepForest evaluate_boxes", 50, memory=0.1),
                common.Aim("ours, AP family", "pycocotools, AP family", 50, memory=0.2),
            ),
            largest={"pycocotools, AP family": 1_000, "DeepForest evaluate_boxes": 10_000},
        ),
        __doc__,
    )
