"""What the benchmarks share: ways to do the same work take turns, each in a process of its own.

A script describes a `Stage` and calls `main`. For each size its input is made once; then every way
runs as often as asked, in turn, so that what else the machine does meets all of them alike. A way
prepares itself untimed, imports included, and returns what is timed. Memory is what the process
needed at most above what it had before, and its children at most (looked at ten times a second).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
from rasterio import Affine

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

import fileio
import splits
import tiling
from ImageData import BOX_COLUMNS, ImageData

log = logging.getLogger("benchmarks")
PACKAGES = (
    "torch", "torchvision", "rasterio", "numpy", "pandas", "pyarrow", "shapely", "deepforest",
    "sahi", "torchgeo", "pycocotools",
)  # fmt: skip
MEGABYTE = 1e6
LOOK_EVERY = 0.1  # s
# Doubling a raster's side makes its area four times as large; what it costs may follow the area
MAX_TIME_GROWTH, MAX_MEMORY_GROWTH = 4.2, 1.05

Work = Callable[[], object]
Way = Callable[[Path, int], Work]


@dataclass(frozen=True)
class Aim:
    """What the project wants to reach, measured at the largest size that both ways did.

    Attributes:
        way: Name of our way.
        against: Name of another.
        speed: At least so many times as fast.
        memory: At most this share of the memory; None: any.
    """

    way: str
    against: str
    speed: float
    memory: float | None = None


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline, and the ways to do its work.

    Attributes:
        title: What is done, for the table.
        size: What the sizes count, with its unit.
        sizes: Of the full benchmark.
        short: Of the short one.
        make: Writes the input of a size into a folder; None: there is nothing to write.
        ways: Name -> way, given the folder and the size. What is timed returns something that tells
            what came of it, such as the number of tiles.
        against: Name of a way -> the way of ours that does the same work.
        agree: Sets of ways whose results must be the same.
        needs: Name of a way -> the package that it needs, without which it is left out.
        largest: Name of a way -> the largest size that it is asked for.
        runs: Of each way, at most.
        once: Ways that run only once, as they take minutes.
        aims: See `Aim`.
        grows_to: Largest side of a raster up to which aims for doubling it hold, px.
        memory: Which memory counts: "added" by the work, or the "peak" of its process, where the
            preparation does the work once to warm it.
    """

    title: str
    size: str
    sizes: tuple[int, ...]
    short: tuple[int, ...]
    make: Callable[[Path, int], None] | None
    ways: Mapping[str, Way]
    against: Mapping[str, str] = field(default_factory=dict)
    agree: tuple[tuple[str, ...], ...] = ()
    needs: Mapping[str, str] = field(default_factory=dict)
    largest: Mapping[str, int] = field(default_factory=dict)
    once: tuple[str, ...] = ()
    runs: int = 5
    aims: tuple[Aim, ...] = ()
    grows_to: int | None = None
    memory: str = "added"


def main(stage: Stage, description: str) -> None:
    """Run the benchmark, or one measurement of it in a process of its own."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(
        "--sizes", type=int, nargs="+", help=f"{stage.size} (default: {stage.sizes})"
    )
    parser.add_argument("--short", action="store_true", help=f"sizes {stage.short}, three runs")
    parser.add_argument("--ways", nargs="+", choices=stage.ways, help="only these")
    parser.add_argument("--runs", type=int)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--one", nargs=3, metavar=("WAY", "SIZE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.one:
        way, size, folder = args.one
        _measure(stage.ways[way](Path(folder), int(size)))
        return
    sizes = tuple(args.sizes or (stage.short if args.short else stage.sizes))
    runs = args.runs or (min(3, stage.runs) if args.short else stage.runs)
    ways = [way for way in args.ways or stage.ways if _is_there(stage.needs.get(way))]
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            if stage.make is not None:
                stage.make(Path(folder), size)
            rows += _take_turns(stage, ways, size, Path(folder), runs)
    aims = [found for aim in stage.aims if (found := judge(aim, rows, f"{stage.memory}_mb"))]
    if stage.grows_to is not None:
        aims += judge_growth([row for row in rows if row["size"] <= stage.grows_to])
    log.info("%s\n%s", stage.title, "\n".join(describe(row, stage) for row in rows))
    for aim in aims:
        log.info("%s", ", ".join(f"{name} {value}" for name, value in aim.items()))
    if args.json:
        record = {
            "title": stage.title, "size": stage.size, "memory": f"{stage.memory}_mb",
            "script": Path(sys.argv[0]).name, "machine": machine(), "rows": rows, "aims": aims,
        }  # fmt: skip
        fileio.write_json(args.json, record)


def judge(
    aim: Aim, rows: Sequence[Mapping[str, object]], memory: str = "added_mb"
) -> dict[str, object] | None:
    """Tell what was reached of an aim; None where its ways have no size in common."""
    mine, other = ({row["size"]: row for row in rows if row["way"] == way}
                   for way in (aim.way, aim.against))  # fmt: skip
    if not mine.keys() & other.keys():
        return None
    size = max(mine.keys() & other.keys())
    mine, other = mine[size], other[size]
    speed, share = 1 / ratio(mine["runs"], other["runs"]), None
    if aim.memory is not None:
        share = mine[memory] / max(other[memory], 1)
    return {
        "what": f"{aim.way}, against {aim.against}", "size": size,
        "found": f"{speed:.3g} times as fast" + _share(share),
        "wanted": f"{aim.speed:.3g}" + _share(aim.memory),
        "reached": speed >= aim.speed and (share is None or share <= aim.memory),
    }  # fmt: skip


def _share(memory: float | None) -> str:
    return "" if memory is None else f", {memory:.3g} of the memory"


def ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """Return the median ratio over the turns; one that ran once is compared with the median."""
    if len(seconds) == len(others):
        return statistics.median(a / b for a, b in zip(seconds, others, strict=True))
    return statistics.median(seconds) / statistics.median(others)


def judge_growth(rows: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Tell how time and peak memory grow as a side doubles, between the two largest sizes."""
    aims = []
    for way in dict.fromkeys(row["way"] for row in rows):
        sizes = [row for row in rows if row["way"] == way][-2:]
        if len(sizes) < 2:
            continue
        small, large = sizes
        doublings = math.log2(large["size"] / small["size"])
        seconds, memory = (
            (large[name] / small[name]) ** (1 / doublings) for name in ("seconds", "peak_mb")
        )
        aims.append({
            "what": f"{way}, side doubled", "size": large["size"],
            "found": f"{seconds:.3g} times the time, {memory:.3g} times the memory",
            "wanted": f"{MAX_TIME_GROWTH}, {MAX_MEMORY_GROWTH}",
            "reached": seconds <= MAX_TIME_GROWTH and memory <= MAX_MEMORY_GROWTH,
        })  # fmt: skip
    return aims


def describe(row: Mapping[str, object], stage: Stage) -> str:
    """Return a line of the table."""
    text = (
        f"{row['size']:>9} {stage.size:<12} {row['way']:<34} {row['seconds']:9.3f} s "
        f"{row[f'{stage.memory}_mb']:8.0f} MB"
    )
    if row["ratio"] is not None:
        text += f"   {row['ratio']:8.2f} times the time of {row['against']}"
    return f"{text}   ({row['result']})"


def machine() -> dict[str, object]:
    """Return what the figures depend on."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    commit = subprocess.run(
        ["git", "-C", str(PROJECT), "describe", "--always", "--dirty", "--abbrev=7"],
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    return {
        "processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9), "commit": commit,
        "versions": versions,
    }  # fmt: skip


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _is_there(package: str | None) -> bool:
    there = package is None or importlib.util.find_spec(package) is not None
    if not there:
        log.warning("%s is not installed and left out; requirements-bench.txt tells how", package)
    return there


@dataclass(frozen=True)
class Measurement:
    """One run of a way; memory in MB."""

    seconds: float
    added_mb: float
    peak_mb: float
    result: object


def _take_turns(
    stage: Stage, ways: Sequence[str], size: int, folder: Path, runs: int
) -> list[dict[str, object]]:
    ways = [way for way in ways if size <= stage.largest.get(way, size)]
    found: dict[str, list[Measurement]] = {way: [] for way in ways}
    for turn in range(runs):
        shift = turn % max(len(ways), 1)  # nobody is always first
        for way in ways[shift:] + ways[:shift]:
            if (way in stage.once and turn) or (turn and not found[way]):
                continue
            try:
                found[way].append(_run(way, size, folder))
            except subprocess.CalledProcessError as error:
                log.warning("%s %d: %s failed: %s", stage.title, size, way, error)
                continue
            log.info("%s %d: %s %s", stage.title, size, way, asdict(found[way][-1]))
    results = {way: measured[0].result for way, measured in found.items() if measured}
    for together in stage.agree:
        several = {way: results[way] for way in together if way in results}
        if not all(_is_close(a, b) for a in several.values() for b in several.values()):
            raise RuntimeError(f"{stage.title}, {size}: ways that do the same differ: {several}")
    seconds = {way: [one.seconds for one in found[way]] for way in results}
    rows = []
    for way, result in results.items():
        against = stage.against.get(way)
        rows.append({
            "size": size, "way": way, "seconds": statistics.median(seconds[way]),
            "runs": seconds[way], "result": result, "against": against,
            "added_mb": statistics.median(one.added_mb for one in found[way]),
            "peak_mb": statistics.median(one.peak_mb for one in found[way]),
            "ratio": ratio(seconds[way], seconds[against]) if against in seconds else None,
        })  # fmt: skip
    return rows


def _is_close(a: object, b: object) -> bool:
    return np.allclose(a, b, rtol=1e-9, atol=0) if isinstance(a, float | list) else a == b


def _run(way: str, size: int, folder: Path) -> Measurement:
    """Measure a way in a process of its own, and watch its children from here."""
    command = [sys.executable, sys.argv[0], "--one", way, str(size), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        watched, children = psutil.Process(process.pid), 0
        while True:
            try:
                output, _ = process.communicate(timeout=LOOK_EVERY)
                break
            except subprocess.TimeoutExpired:
                children = max(children, _used_by_children(watched))
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    # what a way prints itself comes before
    one = json.loads(output.splitlines()[-1])
    for name in ("added_mb", "peak_mb"):
        one[name] += children / MEGABYTE
    return Measurement(**one)


def _used_by_children(process: psutil.Process) -> int:
    """Return the bytes that the children of a process do not share with others."""
    used = 0
    with contextlib.suppress(psutil.Error):
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                used += child.memory_full_info().uss
    return used


def _measure(work: Work) -> None:
    before = psutil.Process().memory_info().rss
    peak_memory()  # from here on
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    peak = peak_memory() or psutil.Process().memory_info().rss
    one = Measurement(seconds, (peak - before) / MEGABYTE, peak / MEGABYTE, result)
    sys.stdout.write("\n" + json.dumps(asdict(one)) + "\n")
    sys.stdout.flush()


def peak_memory() -> int | None:
    """Return the peak of this process since the last call, bytes, as Linux counts it."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    lines = status.read_text(encoding="ascii", errors="replace").splitlines()
    reset.write_text("5", encoding="ascii")
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


# ---------------------------------------------------------------------------------------------
# Rasters and objects
# ---------------------------------------------------------------------------------------------


def write_raster(path: Path, side: int, rows: int = 256) -> None:
    """Write hills with grain, three bands of 8 bits on the map, some rows at a time."""
    rng = np.random.default_rng(0)
    grain = np.tile(rng.integers(0, 24, (3, rows, 1024), dtype=np.uint8), -(-side // 1024))
    x = np.arange(side) / side
    place = {"crs": "EPSG:32633", "transform": Affine(1, 0, 400_000, 0, -1, 5_600_000)}
    layout = {"width": side, "height": side, "count": 3, "dtype": "uint8"}
    with fileio.create_raster(path, **layout, **place) as dst:
        for top in range(0, side, rows):
            ground = 100 + 100 * np.sin(9 * x) * np.cos(9 * top / side)
            strip = ground.astype(np.uint8) + np.roll(grain, top // 7, axis=2)[..., :side]
            dst.write(strip, window=((top, top + rows), (0, side)))


def draw_boxes(side: int, count: int, largest: int) -> pd.DataFrame:
    """Draw squares of whole px, 6 to `largest` wide, as `xmin, ymin, xmax, ymax, label`."""
    rng = np.random.default_rng(0)
    center = rng.integers(largest, side - largest, (count, 2))
    radius = rng.integers(3, largest // 2 + 1, (count, 1))
    df = pd.DataFrame(np.hstack([center - radius, center + radius]), columns=BOX_COLUMNS)
    return df.assign(label="object")


def read_image(folder: Path) -> ImageData:
    """Return raster.tif of a folder with the boxes of its objects.csv."""
    boxes = pd.read_csv(folder / "objects.csv")
    return ImageData(fileio.read_raster(folder / "raster.tif"), "raster", with_centers(boxes))


def with_centers(boxes: pd.DataFrame) -> pd.DataFrame:
    """Add `pixel_x, pixel_y, diameter` to square boxes."""
    low, high = (boxes[BOX_COLUMNS[i : i + 2]].to_numpy() for i in (0, 2))
    center = (low + high) / 2
    return boxes.assign(pixel_x=center[:, 0], pixel_y=center[:, 1], diameter=(high - low)[:, 0])


def index_tiles(
    image: ImageData,
    size: int,
    directory: Path,
    options: tiling.TilingOptions,
    *,
    shares: tuple[float, float] = (0.01, 0.01),
    workers: int | None = 1,
    scheduler: str | None = None,
) -> tuple[pd.DataFrame, Path]:
    """Split a raster's ground and index its tiles; `shares` are of test and validation.

    Returns:
        The blocks of ground, and the folder of the index.
    """
    blocks = splits.ground_blocks(
        [image.raster], split_by="block", max_tile_size=size, block_size=None,
        test_proportion=shares[0], validation_proportion=shares[1], seed=0,
    )  # fmt: skip
    return blocks, tiling.make_single_size(
        size, [image], blocks, directory, options, workers=workers, scheduler=scheduler
    )
