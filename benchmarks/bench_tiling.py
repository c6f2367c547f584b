"""Time and peak memory of the tile index against the size of the raster, each in its own process.

    python benchmarks/bench_tiling.py [--sides 4096 8192 16384 32768] [--objects 20000] [--filter]

The rasters are sparse files of 3 bands; with --filter every window is read by `black_pixel_filter`.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))

import fileio
import splits
import tiling
from ImageData import ImageData

log = logging.getLogger("bench_tiling")
TILE_SIZE = 256  # px


def measure(path: Path, objects: int, *, with_filter: bool) -> dict[str, float]:
    """Index one raster; return seconds, peak memory in MB, and the number of tiles."""
    raster = fileio.read_raster(path)
    rng = np.random.default_rng(0)
    center = rng.uniform(40, raster.width - 40, (objects, 2))
    radius = rng.uniform(3, 30, (objects, 1))
    boxes = np.concatenate([center - radius, center + radius], axis=1)
    df = pd.DataFrame(boxes, columns=tiling.BOX_COLUMNS).assign(
        pixel_x=center[:, 0], pixel_y=center[:, 1], diameter=2 * radius[:, 0], label="object"
    )
    filters = (tiling.black_pixel_filter,) if with_filter else ()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        blocks = splits.ground_blocks(
            [raster], split_by="block", max_tile_size=TILE_SIZE, block_size=None,
            test_proportion=0.2, validation_proportion=0.25, seed=0,
        )  # fmt: skip
        directory = tiling.make_single_size(
            TILE_SIZE, [ImageData(raster, raster.path.stem, df)], blocks, Path(folder),
            tiling.TilingOptions(
                angles=(90, 180, 270), evaluation_overlap=60, filters=filters, pixel_limit=2500
            ),
            workers=1,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        tiles, _ = tiling.read_tiles(directory)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "peak_mb": peak, "tiles": len(tiles)}


def main() -> None:
    """Run the benchmark, or one measurement of it in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--objects", type=int, default=20_000)
    parser.add_argument("--filter", action="store_true")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        result = measure(args.one, args.objects, with_filter=args.filter)
        sys.stdout.write(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as folder:
        for side in args.sides:
            path = Path(folder) / f"r{side}.tif"
            layout = {"width": side, "height": side, "count": 3, "dtype": "uint8"}
            with fileio.create_raster(path, sparse_ok=True, **layout):
                pass
            command = [sys.executable, __file__, "--one", str(path), "--objects", str(args.objects)]
            command += ["--filter"] if args.filter else []
            results = [
                json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
                for _ in range(args.runs)
            ]
            log.info(
                "%6d px a side: %.2f s, peak %.0f MB, %d tiles", side,
                statistics.median(r["seconds"] for r in results),
                statistics.median(r["peak_mb"] for r in results), results[0]["tiles"],
            )  # fmt: skip


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
