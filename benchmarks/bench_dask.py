"""Tiling with a pixel filter by local processes, and by the workers of a Dask cluster.

    .bench-venv/bin/python benchmarks/bench_dask.py [--short] [--sizes SIDE ...] [--json FILE]

The raster has three bands of 8 bits, tiled and compressed by zstd, and 20,000 objects; tiles have
256 px. Two processes each, on this machine, which have done some such work before: what is compared
is how the work is handed out, not how Python starts.
"""

from __future__ import annotations

import atexit
import tempfile
from functools import partial
from pathlib import Path

import bench_tiling
import common
import numpy as np
from distributed import LocalCluster

import tiling

WORKERS = 2
BRIGHT = 90  # of the 95th percentile


def bright_enough(image: np.ndarray, pixel_limit: int) -> bool:
    """Keep tiles with bright places: a filter as users write them, which takes its time."""
    return bool(np.percentile(image, 95) > BRIGHT)


def ours(folder: Path, side: int, *, on_cluster: bool) -> common.Work:
    """Index the raster with a look at every tile; tell how many there are, and how many stay."""
    image = common.read_image(folder)
    options = tiling.TilingOptions(
        filters=(tiling.black_pixel_filter, bright_enough), pixel_limit=2500, empty_tile_ratio=1.0
    )
    workers: dict[str, object] = {"workers": WORKERS}
    if on_cluster:
        cluster = LocalCluster(
            n_workers=WORKERS, threads_per_worker=1, processes=True, dashboard_address=":0"
        )
        atexit.register(cluster.close)
        workers = {"scheduler": cluster.scheduler_address}

    def work() -> list[int]:
        _, directory = common.index_tiles(
            image, bench_tiling.TILE_SIZE, Path(tempfile.mkdtemp(dir=folder)), options, **workers
        )
        tiles, _ = tiling.read_tiles(directory)
        return [len(tiles), int(tiles["kept"].sum())]

    work()  # the workers import, and open the raster
    return work


if __name__ == "__main__":
    common.main(
        common.Stage(
            title="Tiling with a filter on a cluster",
            size="px a side",
            sizes=(4096, 8192, 16384),
            short=(8192, 16384),
            make=bench_tiling.make,
            ways={
                "ours, 2 processes": partial(ours, on_cluster=False),
                "ours, 2 Dask workers": partial(ours, on_cluster=True),
            },
            against={"ours, 2 Dask workers": "ours, 2 processes"},
            agree=(("ours, 2 processes", "ours, 2 Dask workers"),),
            aims=(common.Aim("ours, 2 Dask workers", "ours, 2 processes", 1 / 1.1),),
        ),
        __doc__,
    )  # fmt: skip
