"""What the benchmarks share: ways to do the same work take turns, each in a process of its own.

A script describes a `Stage` and calls `main`. For each size its input is made once; then every way
runs as often as asked, in turn, so that what else the machine does meets all of them alike. A way
prepares itself untimed, imports included, and returns what is timed. Memory is what the process
needed at most above what it had before, and its children at most (looked at every 20 ms).
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
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

log = logging.getLogger("benchmarks")
PROJECT = Path(__file__).parent.parent
PACKAGES = ("torch", "torchvision", "rasterio", "numpy", "pandas", "deepforest", "sahi", "torchgeo")
MEGABYTE = 1e6
LOOK_EVERY = 0.02  # s

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


# Doubling a raster's side makes its area four times as large; what it costs may follow the area
MAX_TIME_GROWTH, MAX_MEMORY_GROWTH = 4.2, 1.05


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline, and the ways to do its work.

    Attributes:
        title: What is done, for the table.
        size: What the sizes count, with its unit.
        sizes: Of the full benchmark.
        short: Of the short one.
        make: Writes the input of a size into a folder.
        ways: Name -> way, given the folder and the size. What is timed returns something that tells
            whether all did the same, such as the number of tiles.
        ours: Name of the way that the others are compared with.
        needs: Name of a way -> the package that it needs, without which it is left out.
        largest: Name of a way -> the largest size that it is asked for.
        runs: Of each way, at most.
        once: Ways that run only once, as they take minutes.
        aims: See `Aim`.
        grows: Whether the sizes are sides of rasters, so that aims for doubling them hold.
    """

    title: str
    size: str
    sizes: tuple[int, ...]
    short: tuple[int, ...]
    make: Callable[[Path, int], None]
    ways: Mapping[str, Way]
    ours: str
    needs: Mapping[str, str] = field(default_factory=dict)
    largest: Mapping[str, int] = field(default_factory=dict)
    once: tuple[str, ...] = ()
    runs: int = 5
    aims: tuple[Aim, ...] = ()
    grows: bool = False


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
            stage.make(Path(folder), size)
            rows += _take_turns(stage, ways, size, Path(folder), runs)
    log.info("%s\n%s", stage.title, "\n".join(describe(row, stage) for row in rows))
    aims = [judge(aim, rows) for aim in stage.aims if {aim.way, aim.against} <= {*ways}]
    if stage.grows and len(sizes) > 1:
        aims += judge_growth(rows)
    for aim in aims:
        log.info("%s", ", ".join(f"{name} {value}" for name, value in aim.items()))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        record = {"title": stage.title, "size": stage.size, "ours": stage.ours,
                  "script": Path(sys.argv[0]).name, "machine": machine(), "rows": rows,
                  "aims": aims}  # fmt: skip
        args.json.write_text(json.dumps(record, indent=1), encoding="utf-8")


def judge(aim: Aim, rows: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Tell what was reached of an aim."""
    by_way = {way: {row["size"]: row for row in rows if row["way"] == way}
              for way in (aim.way, aim.against)}  # fmt: skip
    size = max(set(by_way[aim.way]) & set(by_way[aim.against]))
    mine, other = (found[size] for found in by_way.values())
    pairs = zip(mine["runs"], other["runs"], strict=False)
    speed = statistics.median(b / a for a, b in pairs)
    memory = None
    if aim.memory is not None:
        memory = mine["added_mb"] / max(other["added_mb"], 1)
    return {
        "what": f"{aim.way}, against {aim.against}", "size": size,
        "found": f"{speed:.3g} times as fast" + _share(memory),
        "wanted": f"{aim.speed:.3g}" + _share(aim.memory),
        "reached": speed >= aim.speed and (memory is None or memory <= aim.memory),
    }  # fmt: skip


def _share(memory: float | None) -> str:
    return "" if memory is None else f", {memory:.3g} of the memory"


def judge_growth(rows: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Tell how time and peak memory grow as a side doubles, between the two largest sizes."""
    aims = []
    for way in dict.fromkeys(row["way"] for row in rows):
        small, large = [row for row in rows if row["way"] == way][-2:]
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
        f"{row['added_mb']:8.0f} MB"
    )
    if row["ratio"] is not None and row["way"] != stage.ours:
        text += f"   {row['ratio']:8.2f} times the time of {stage.ours}"
    return f"{text}   ({row['result']})"


def machine() -> dict[str, object]:
    """Return what the figures depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "-C", str(PROJECT), "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    return {
        "processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version(),
        "commit": commit, "versions": versions,
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


def _take_turns(
    stage: Stage, ways: list[str], size: int, folder: Path, runs: int
) -> list[dict[str, object]]:
    ways = [way for way in ways if size <= stage.largest.get(way, size)]
    found = {way: [] for way in ways}
    for turn in range(runs):
        shift = turn % len(ways)  # nobody is always first
        for way in ways[shift:] + ways[:shift]:
            if way in stage.once and turn:
                continue
            command = [sys.executable, sys.argv[0], "--one", way, str(size), str(folder)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
            log.info("%s %d: %s %s", stage.title, size, way, found[way][-1])
    ours = [one["seconds"] for one in found.get(stage.ours, [])]
    rows = []
    for way, figures in found.items():
        seconds = [one["seconds"] for one in figures]
        pairs = list(zip(seconds, ours, strict=False))
        rows.append({
            "size": size, "way": way, "seconds": statistics.median(seconds), "runs": seconds,
            "added_mb": statistics.median(one["added_mb"] for one in figures),
            "peak_mb": statistics.median(one["peak_mb"] for one in figures),
            "ratio": statistics.median(a / b for a, b in pairs) if pairs else None,
            "result": figures[0]["result"],
        })  # fmt: skip
    return rows


def _measure(work: Work) -> None:
    with Memory() as memory:
        start = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - start
    # what a way prints itself comes before
    sys.stdout.write("\n" + json.dumps(
        {"seconds": seconds, "added_mb": memory.peak_mb - memory.before_mb,
         "peak_mb": memory.peak_mb, "result": result}
    ) + "\n")  # fmt: skip
    sys.stdout.flush()


class Memory:
    """Peak memory, MB, of this process and its children while in the context.

    The kernel knows the peak of this process (Linux; elsewhere, and for children, it is looked at
    every `LOOK_EVERY`). Of children counts what they do not share.
    """

    def __enter__(self) -> Memory:
        """Start over."""
        self._process, self._done = psutil.Process(), threading.Event()
        self._own = self._children = 0
        self.before_mb = self._process.memory_info().rss / MEGABYTE
        reset = Path("/proc/self/clear_refs")
        if reset.exists():
            reset.write_text("5", encoding="ascii")  # the peak is now what is in use
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Take the peak."""
        self._done.set()
        self._thread.join()
        status = Path("/proc/self/status")
        if status.exists():
            lines = status.read_text(encoding="ascii", errors="replace").splitlines()
            kilobytes = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
            self._own = int(kilobytes) * 1024
        self.peak_mb = (self._own + self._children) / MEGABYTE

    def _look(self) -> None:
        while not self._done.wait(LOOK_EVERY):
            self._own = max(self._own, self._process.memory_info().rss)
            used = 0
            for child in self._process.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    used += child.memory_full_info().uss
            self._children = max(self._children, used)
