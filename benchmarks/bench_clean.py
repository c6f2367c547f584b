"""Time the cleaning of a large annotation table: median of five runs, file reading included.

python benchmarks/bench_clean.py [--rows 1000000]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))

import annotations

log = logging.getLogger("bench_clean")


def write_dirty_table(path: Path, rows: int, rng: np.random.Generator) -> None:
    """Write a table of which one row in fifty is dirty."""
    diameter = np.char.mod("%.2f", rng.uniform(1, 24, rows)).astype(object)
    for dirt in ("unknown", "", "0", "-3", "400"):
        diameter[rng.integers(rows, size=rows // 250)] = dirt
    x, y = rng.uniform(0, 60_000, (2, rows)).round(2)
    label = rng.choice(["crater", "boulder", "cone"], rows)
    df = pd.DataFrame({"pixel_x": x, "pixel_y": y, "diameter": diameter, "label": label})
    df.to_csv(path, index=False)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.csv"
        write_dirty_table(path, rows, np.random.default_rng(0))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            cleaned = annotations.preprocess_df(
                path, (60_000, 60_000), diameter_scale=3, max_diameter=25
            )
            times.append(time.perf_counter() - start)
        megabytes = path.stat().st_size / 1e6
    log.info(
        "%d rows (%.0f MB): median %.2f s of %s; kept %d, quarantine %d", rows, megabytes,
        statistics.median(times), [round(t, 2) for t in times], len(cleaned.df),
        len(cleaned.quarantine),
    )  # fmt: skip


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
