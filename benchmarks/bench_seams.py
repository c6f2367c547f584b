"""Seams of a catalogue: are objects lost, doubled or crowded where tiles meet?

    python benchmarks/bench_seams.py --checkpoint runs/quickstart/best.ckpt [--side 6144]

Predicts a synthetic raster that the model never saw, and compares the ground near the edges of the
tiles' cores with all other ground: objects per megapixel, share of the sample's objects found, and
objects that the catalogue holds twice. Where seams do not show, the ratio of the densities is 1
within the noise of counting, whose standard deviation is given.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))

import annotations
import fileio
import metrics
import predict
import sampledata
import tiling
from ImageData import BOX_COLUMNS, CENTER_COLUMNS

log = logging.getLogger("bench_seams")
NEAR = 8  # px from an edge of a core


def near_edges(centers: np.ndarray, width: int, height: int, plan: dict) -> np.ndarray:
    """Tell which points (N, 2) lie within `NEAR` px of an inner edge of a core."""
    near = np.zeros(len(centers), dtype=bool)
    for axis, length in enumerate((width, height)):
        _, edges = tiling.grid_axis(length, plan["tile_size"], plan["overlap"])
        inner = edges[1:-1]
        distance = np.abs(centers[:, axis, None] - inner).min(axis=1, initial=np.inf)
        near |= distance < NEAR
    return near


def measure(checkpoint: Path, side: int, folder: Path, **options: object) -> dict[str, float]:
    """Predict a sample of some px a side and return the figures."""
    image, table = folder / "unseen.tif", folder / "unseen.csv"
    if not table.exists():
        sampledata.make_sample(image, table, width=side, height=side, seed=77)
    raster = fileio.read_raster(image)
    output = folder / "catalogue.csv"
    predict.predict_raster(checkpoint, image, output, overwrite=True, **options)
    found = pd.read_csv(output)
    plan = predict.prepare(checkpoint, image, folder / "none.csv", **options).plan
    truth = annotations.preprocess_df(
        table, raster, diameter_scale=sampledata.DIAMETER_SCALE, max_diameter=25
    ).df

    x, y = (g.ravel() + 0.5 for g in np.meshgrid(np.arange(side), np.arange(0, side, 61)))
    share = near_edges(np.stack([x, y], axis=1), side, side, plan).mean()
    boxes, scores = found[BOX_COLUMNS].to_numpy(), found["score"].to_numpy()
    found_near = near_edges(found[CENTER_COLUMNS].to_numpy(), side, side, plan)
    truth_near = near_edges(truth[CENTER_COLUMNS].to_numpy(), side, side, plan)
    matches = metrics.match_boxes(boxes, scores, truth[BOX_COLUMNS].to_numpy(), 0.5)
    hit = np.isin(np.arange(len(truth)), matches)
    spare = matches < 0  # of these, the ones that lie on an object are doubles
    again = metrics.match_boxes(boxes[spare], scores[spare], truth[BOX_COLUMNS].to_numpy(), 0.5)
    doubled = np.zeros(len(found), dtype=bool)
    doubled[np.flatnonzero(spare)[again >= 0]] = True
    near, far = found_near.sum(), (~found_near).sum()
    ratio = (near / share) / (far / (1 - share))
    expected = (truth_near.sum() / share) / ((~truth_near).sum() / (1 - share))
    return {
        "tile_size": plan["tile_size"], "overlap": plan["overlap"], "objects": len(found),
        "near_share_of_ground": share, "near": int(near), "density_ratio": ratio,
        "density_ratio_of_truth": expected, "noise": float(ratio * np.sqrt(1 / near + 1 / far)),
        "recall_near": hit[truth_near].mean(), "recall_far": hit[~truth_near].mean(),
        "doubled_near": doubled[found_near].mean(), "doubled_far": doubled[~found_near].mean(),
    }  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--side", type=int, default=6144)
    parser.add_argument("--work", type=Path, help="keep the sample in this folder")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        record = measure(args.checkpoint, args.side, folder)
    for name, value in record.items():
        log.info("%-24s %.4g", name, value)
    if args.json:
        fileio.write_json(args.json, record)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
