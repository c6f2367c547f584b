"""Rate of random windows against bare rasterio, and peak memory against the size of the raster.

    python benchmarks/bench_read.py [--side 16384] [--windows 500] [--runs 5]

Both readers read the same windows of a zstd-tiled raster of 3 bands in one process, by turns, with
the same size of GDAL's cache. Memory is that of a process of its own that reads 1,000 windows of a
sparse raster.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rasterio
from rasterio.windows import Window as RasterioWindow

sys.path.insert(0, str(Path(__file__).parent.parent))

import fileio
from ImageData import Window

log = logging.getLogger("bench_read")
SIZE = 256  # px, side of a window


def make_raster(path: Path, side: int) -> None:
    """Write a tiled raster of tiled noise over a smooth ground, 256 rows at a time."""
    rng = np.random.default_rng(0)
    grain = np.tile(rng.integers(0, 24, (3, SIZE, 1024), dtype=np.uint8), -(-side // 1024))
    x = np.arange(side) / side
    with fileio.create_raster(path, width=side, height=side, count=3, dtype="uint8") as dst:
        for top in range(0, side, SIZE):
            ground = 100 + 100 * np.sin(9 * x) * np.cos(9 * top / side)
            rows = ground.astype(np.uint8) + np.roll(grain, top // 7, axis=2)[..., :side]
            dst.write(rows, window=RasterioWindow(0, top, side, SIZE))


def random_windows(raster: fileio.Raster, count: int, seed: int) -> list[Window]:
    """Draw windows inside a raster."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, (raster.width - SIZE, raster.height - SIZE), (count, 2))
    return [Window(int(x), int(y), SIZE, SIZE) for x, y in corners]


def compare(path: Path, count: int, runs: int) -> dict[str, list[float]]:
    """Return windows per second of each reader, one figure per run."""
    raster = fileio.read_raster(path)

    def read(window: Window) -> None:
        raster.read(window)

    def read_and_check(window: Window) -> None:
        raster.read_valid(window, raster.read(window))

    with rasterio.open(path) as src:

        def bare(window: Window) -> None:
            src.read(window=RasterioWindow(*window))

        readers: dict[str, Callable[[Window], None]] = {
            "rasterio": bare, "read": read, "read + read_valid": read_and_check
        }  # fmt: skip
        rates = {name: [] for name in readers}
        for run in range(runs + 1):
            windows = random_windows(raster, count, run)
            order = list(readers)[run % 3 :] + list(readers)[: run % 3]  # nobody is always first
            for name in order:
                start = time.perf_counter()
                for window in windows:
                    readers[name](window)
                if run:  # the first one warms the disk's cache
                    rates[name].append(count / (time.perf_counter() - start))
    return rates


def peak_of(path: Path, count: int) -> float:
    """Read windows; return the peak memory of this process in MB."""
    raster = fileio.read_raster(path)
    for window in random_windows(raster, count, 0):
        raster.read_valid(window, raster.read(window))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Run the benchmark, or one measurement of memory in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=16384)
    parser.add_argument("--windows", type=int, default=500)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        sys.stdout.write(json.dumps(peak_of(args.peak, 1000)))
        return
    log.info("GDAL_CACHEMAX %s MB, %d cores", os.environ["GDAL_CACHEMAX"], os.cpu_count())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiled.tif"
        make_raster(path, args.side)
        log.info("%d px a side, %.0f MB", args.side, path.stat().st_size / 1e6)
        rates = compare(path, args.windows, args.runs)
        for name, values in rates.items():
            ratio = statistics.median(
                value / peer for value, peer in zip(values, rates["rasterio"], strict=True)
            )
            log.info(
                "%-18s %.0f windows/s, ratio to rasterio %.3f", name, statistics.median(values),
                ratio,
            )  # fmt: skip
        path.unlink()
        peaks = {}
        for side in (4096, 65536):
            path = Path(folder) / f"{side}.tif"
            layout = {"width": side, "height": side, "count": 3, "dtype": "uint8"}
            with fileio.create_raster(path, sparse_ok=True, **layout):
                pass
            command = [sys.executable, __file__, "--peak", str(path)]
            found = [
                json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
                for _ in range(args.runs)
            ]
            peaks[side] = statistics.median(found)
            log.info("%6d px a side: peak %.0f MB after 1,000 windows", side, peaks[side])
        log.info("difference %.0f MB", peaks[65536] - peaks[4096])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
