"""Time the evaluation of many detections, and its memory, against COCO's own code.

    python benchmarks/bench_metrics.py [--boxes 1000 2000 100000] [--peer-up-to 2000]

All boxes lie in one block of ground, as dense as the lunar craters that the project is tested with.
Each measurement is a process of its own: the median of the runs in it, in seconds of processor
time, which other work on the machine disturbs less than the clock, and the memory that it needed
above what its imports did. `AP family` is what both compute (AP, AP50, AP75, AR and AP of three
sizes); `evaluate` is all, with matching by IoU and by centres and 1,000 resamples of 64 parts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import logging
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import fileio
import metrics

log = logging.getLogger("bench_metrics")
AREA_PER_OBJECT = 640.0  # px^2: 1,000 objects in 800 x 800 px
PARTS = 8  # along each side of the ground, for the intervals


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


def everything(ground: metrics.Ground) -> dict[str, float]:
    """Compute all values."""
    return metrics.evaluate({0: ground}, ["object"], 0.5).values


def peer(ground: metrics.Ground) -> dict[str, float]:
    """Compute the AP family with pycocotools."""
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

    sides = metrics._sides(ground.truth_boxes)
    medium, large = (float(f"{q:.2g}") for q in np.quantile(sides, [1 / 3, 2 / 3]))
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
        edges = [0, medium, large, 1e5]
        ranges = [(0, 1e5), *itertools.pairwise(edges)]
        run.params.areaRng = [[low**2, np.nextafter(high**2, 0)] for low, high in ranges]
        run.params.areaRngLbl = ["all", *metrics.SIZES]
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][:, :, 0, :, 0]
    values = dict(zip(("AP", *(f"AP_{s}" for s in metrics.SIZES)), precision.mean(axis=(0, 1)),
                      strict=True))  # fmt: skip
    return values | {"AP50": precision[0, :, 0].mean(), "AR": run.eval["recall"][:, 0, 0, 0].mean()}


WAYS: dict[str, Callable[[metrics.Ground], dict[str, float]]] = {
    "AP family": family, "evaluate": everything, "pycocotools": peer,
}  # fmt: skip


def measure(way: str, count: int, runs: int) -> dict[str, object]:
    """Run one way in this process and return its figures."""
    ground = make_ground(count, np.random.default_rng(0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(runs):
        start = time.process_time()
        values = WAYS[way](ground)
        times.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "way": way, "boxes": count, "cpu_s": statistics.median(times), "runs": times,
        "added_mb": (peak - before) / 1024, "peak_mb": peak / 1024,
        "values": {name: float(value) for name, value in values.items()},
    }  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--boxes", type=int, nargs="+", default=[1000, 2000, 100_000])
    parser.add_argument(
        "--peer-up-to", type=int, default=2000, metavar="BOXES",
        help="pycocotools compares all with all, 80 GB for 100,000 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "BOXES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        way, count = args.one
        sys.stdout.write(json.dumps(measure(way, int(count), args.runs)))
        return
    records = []
    for count in args.boxes:
        for way in WAYS:
            if way == "pycocotools" and count > args.peer_up_to:
                continue
            command = [sys.executable, __file__, "--one", way, str(count), "--runs", str(args.runs)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            records.append(json.loads(done.stdout))
            log.info(
                "%7d boxes, %-11s median %7.2f s of processor time, %6.0f MB more, peak %5.0f MB",
                count, way, *(records[-1][name] for name in ("cpu_s", "added_mb", "peak_mb")),
            )  # fmt: skip
        ours, *_, last = (r["values"] for r in records if r["boxes"] == count)
        apart = max(abs(ours[name] - last[name]) for name in ours.keys() & last.keys())
        log.info("%7d boxes: the values differ by %.1e at most", count, apart)
    if args.json:
        fileio.write_json(args.json, records)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
