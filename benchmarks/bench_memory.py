"""Peak memory of a prediction against the side of the raster, and the cost of empty ground.

    python benchmarks/bench_memory.py [--sides 4096 65536] [--json FILE]

A small model with random weights predicts sparse rasters, each in a process of its own. Their first
megapixels hold noise, so that the model runs and finds a hundred objects a tile; the rest was never
written.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import fileio
import predict
from imutils import Radiometry
from LargeRasterOR import LargeRasterORModel
from ModelConfig import ModelConfig
from networks import Anchors, DataContract

log = logging.getLogger("bench_memory")
TILE_SIZE, OVERLAP = 256, 32  # px
WRITTEN = 4096**2 * 3  # px, or all of a smaller raster


def make_raster(path: Path, side: int) -> None:
    """Write a sparse raster of one band, noise in its first rows."""
    rng = np.random.default_rng(0)
    rows = min(side, WRITTEN // side)
    with fileio.create_raster(
        path, width=side, height=side, count=1, dtype="uint8", sparse_ok=True, bigtiff="yes"
    ) as dst:
        for x in range(0, side, 4096):
            width = min(4096, side - x)
            noise = rng.integers(0, 256, (1, rows, width), dtype=np.uint8)
            dst.write(noise, window=((0, rows), (x, x + width)))


def make_model() -> LargeRasterORModel:
    """Return a small model with random weights."""
    torch.manual_seed(0)
    anchors = Anchors(tuple((8.0 * 2**i, 12.0 * 2**i) for i in range(5)), (1.0,), 2)
    radiometry = Radiometry("none", (0.0,), (255.0,), (0.5,), (0.3,))
    contract = DataContract(
        tile_size=TILE_SIZE, bands=(1,), band_count=1, dtype="uint8", radiometry=radiometry,
        anchors=anchors, detections_per_tile=100, resolution=None, split_hash="",
        evaluation_overlap=OVERLAP,
    )  # fmt: skip
    conf = ModelConfig(backbone="mobilenet_v3_large", fpn_channels=16)
    return LargeRasterORModel(["a", "b"], conf, contract).eval()


def measure(raster: Path) -> dict[str, float]:
    """Predict one raster in this process."""
    model = make_model()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        result = predict.predict_raster(
            model, raster, Path(folder) / "out.gpkg", score_threshold=0.005, device="cpu",
            override=("radiometry",),
        )  # fmt: skip
        seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "predicted": result.predicted, "empty": result.empty, "seconds": seconds,
        "objects": result.count,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6,
    }  # fmt: skip


def measure_skipping(path: Path) -> float:
    """Return the milliseconds per window of finding out that the lower half was never written."""
    task = predict.prepare(
        make_model(), path, path.with_name("none.csv"), score_threshold=0.5,
        override=("radiometry",),
    )  # fmt: skip
    strips = len(task.predictor.strip_tops)
    start = time.perf_counter()
    tiles = sum(t.skipped for t in task.predictor.tiles(range(strips // 2, strips)))
    return 1000 * (time.perf_counter() - start) / max(tiles, 1)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.one:
        sys.stdout.write(json.dumps(measure(args.one)))
        return
    record = {}
    with tempfile.TemporaryDirectory() as folder:
        for side in args.sides:
            path = Path(folder) / f"{side}.tif"
            make_raster(path, side)
            done = subprocess.run(
                [sys.executable, __file__, "--one", str(path)], check=True, stdout=subprocess.PIPE
            )
            record[side] = json.loads(done.stdout.decode().splitlines()[-1])
            if side * side > 2 * WRITTEN:
                record[side]["skip_ms_per_window"] = measure_skipping(path)
            log.info("%6d px: %s", side, record[side])
    if args.json:
        fileio.write_json(args.json, record)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("parallel", "predict", "pyogrio"):
        logging.getLogger(name).setLevel(logging.WARNING)
    main()
