"""What archives of rasters would cost, and what saturates first, from rates measured here.

    python benchmarks/plan_scale.py [--rates FILE] [--pixels GREY RGB] [--json FILE]
        [--picture FILE]

Rates are measured on one core of this machine, and on a Dask scheduler with two workers; medians.
--rates takes those of an earlier call. What cannot be measured here is in `Assumptions`: what a GPU
computes, what a shared storage delivers, what goes wrong how often. The plans are arithmetic;
`simulate.py` tells what failures, slow workers and the order of merging add. --pixels names a grey
and a coloured raster whose pixels fill those that are read, as what they compress to matters.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import operator
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import cloudpickle
import common
import matplotlib as mpl
import numpy as np
import psutil
import rasterio
from distributed import Client

mpl.use("agg")
from matplotlib import pyplot as plt
from simulate import Outcome, Scenario, draw_lengths, simulate

import fileio
import imutils
import tiling
from ImageData import ImageData, Window
from imutils import COLORS

log = logging.getLogger("plan_scale")

TILE, OVERLAP = 512, 64  # px
CORE_PX = (TILE - OVERLAP) ** 2  # that a tile adds
KINDS = {"uint8, 1 band": ("uint8", 1), "uint8, 3 bands": ("uint8", 3),
         "float32, 1 band": ("float32", 1)}  # fmt: skip
WIDTH, ROWS = 8192, 4  # px, tiles: of the rasters that are read
FORMATS = ("gpkg", "parquet", "csv")
MERGED = 100, 2000  # strips, objects in each
TASKS = 2_000  # that do nothing
DAY, HOUR = 86_400.0, 3_600.0  # s
GIGA = 1e9


# ---------------------------------------------------------------------------------------------
# Measured
# ---------------------------------------------------------------------------------------------


def measure(pixels: Sequence[Path], runs: int = 5) -> dict[str, float]:
    """Measure what the plans need; core-seconds are a process's own, so that others do not count.

    Returns:
        Name with its unit -> value.
    """
    rates: dict[str, float] = {}
    for stage in (measure_reading, measure_network, measure_raster, measure_merging,
                  measure_index, measure_scheduler):  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            options = {"pixels": pixels} if stage is measure_reading else {}
            found = stage(Path(folder), runs=runs, **options)
        for name, value in found.items():
            log.info("%s: %.4g", name, value)
        rates |= found
    return rates


def _core_seconds(work: Callable[[], object], runs: int) -> float:
    """Return the median of what a piece of work takes of the cores, s; once it is warm."""
    work()
    taken = []
    for _ in range(runs):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def measure_reading(folder: Path, runs: int, pixels: Sequence[Path]) -> dict[str, float]:
    """Read rows of tiles as a prediction does, stretched; every strip from a file of its own."""
    rates, height = {}, TILE + (ROWS - 1) * (TILE - OVERLAP)
    for kind, (dtype, bands) in KINDS.items():
        path = folder / "0.tif"
        common.write_raster(path, WIDTH)  # pixels that nobody gave
        with rasterio.open(pixels[bands > 1] if pixels else path) as src:
            window = rasterio.windows.Window(0, 0, min(src.width, WIDTH), min(src.height, height))
            image = src.read(list(range(1, bands + 1)), window=window)
        repeats = (1, -(-height // image.shape[1]), -(-WIDTH // image.shape[2]))
        image = np.tile(image, repeats)[:, :height, :WIDTH].astype(dtype)
        if dtype == "float32":  # calibrated values fill their mantissa
            image += np.random.default_rng(0).normal(0, 1, image.shape).astype(dtype)
        layout = {"width": WIDTH, "height": height, "count": bands, "dtype": dtype}
        with fileio.create_raster(path, **layout) as dst:
            dst.write(image)
        radiometry = imutils.Radiometry(
            "minmax", (0.0,) * bands, (255.0,) * bands, (0.5,) * bands, (0.3,) * bands
        )
        extent, seconds, moved = Window(0, 0, WIDTH, height), [], []
        for row in range(ROWS):  # no block is in a cache from the row above, as on another worker
            copy = shutil.copy(path, folder / f"{kind}_{row}.tif")
            raster = fileio.read_raster(copy)
            grid = tiling.window_grid(extent, TILE, OVERLAP, slice(row, row + 1))
            windows = [Window(*values) for values in grid[tiling.WINDOW_COLUMNS].to_numpy()]
            bytes_before, start = _bytes_read(), time.process_time()
            for window in windows:
                read, valid, _ = tiling.read_tile(raster, window, 0)
                radiometry.stretch(read, valid)
            seconds.append((time.process_time() - start) / len(windows))
            moved.append((_bytes_read() - bytes_before) / (WIDTH * (TILE - OVERLAP)))
        rates[f"{kind}: read, core-s/tile"] = statistics.median(seconds)
        rates[f"{kind}: read, bytes/px"] = statistics.mean(moved)
        rates[f"{kind}: on disk, bytes/px"] = path.stat().st_size / (WIDTH * height)
    return rates


def _model(bands: int = 1) -> object:
    """Return the default model with random weights, for objects of 12 to 60 px."""
    import torch

    from LargeRasterOR import LargeRasterORModel
    from ModelConfig import ModelConfig
    from networks import DataContract, fit_anchors

    torch.manual_seed(0)
    sides = np.linspace(12, 60, 100)
    boxes = np.stack([0 * sides, 0 * sides, sides, sides], axis=1)
    contract = DataContract(
        tile_size=TILE, bands=tuple(range(1, bands + 1)), band_count=bands, dtype="uint8",
        radiometry=imutils.Radiometry("none", (0.0,), (255.0,), (0.5,), (0.3,)),
        anchors=fit_anchors(boxes), detections_per_tile=200, resolution=None, split_hash="",
        evaluation_overlap=OVERLAP,
    )  # fmt: skip
    model = LargeRasterORModel(["object"], ModelConfig(), contract).eval()
    model.operating_threshold.fill_(0.5)
    return model


def measure_network(folder: Path, runs: int) -> dict[str, float]:
    """Run the default network on one core, with detections and what it takes to sort them out."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import strips
    from LargeRasterOR import VIEWS, autocast, detect_views, resolve_precision

    model, tiles = _model(), torch.rand(strips.CPU_BATCH, 1, TILE, TILE)
    model.limit_detections(TILE, 0.05)
    before = torch.get_num_threads()
    torch.set_num_threads(1)

    def detect(precision: str) -> None:
        with torch.inference_mode(), autocast("cpu", precision):
            detect_views(model, tiles, VIEWS["none"])

    try:
        rates = {
            f"network, {precision}: core-s/tile":
                _core_seconds(partial(detect, precision), runs) / len(tiles)
            for precision in dict.fromkeys(["32-true", resolve_precision("auto", "cpu")])
        }  # fmt: skip
        with FlopCounterMode(display=False) as counter:
            detect("32-true")
    finally:
        torch.set_num_threads(before)
    return rates | {"network: FLOP/tile": counter.get_total_flops() / len(tiles)}


def _draw_parts(rows: np.ndarray, width: int, objects: int) -> Iterable[object]:
    """Draw what strips found, a tenth of it twice."""
    import strips
    from catalogue import Detections

    rng = np.random.default_rng(0)
    for top in rows:
        first = int(objects / 1.1)
        center = rng.uniform((10, top + 10), (width - 10, top + TILE - OVERLAP), (first, 2))
        radius = rng.uniform(4, 10, (first, 1))
        boxes = np.hstack([center - radius, center + radius])
        boxes = np.concatenate([boxes, boxes[: objects - first] + 1.0])
        scores = rng.uniform(0.5, 1, objects).astype(np.float32)
        found = Detections(boxes, scores, np.zeros(objects, np.int64))
        yield strips.Part(found, width // (TILE - OVERLAP), 0, 0, np.empty((0, 4), np.int64))


def _task(folder: Path, suffix: str, strip_count: int) -> object:
    """Plan a prediction of an empty raster on the map, whose strips are rows of 64 tiles."""
    import predict

    path = folder / "raster.tif"
    if not path.exists():
        side = 64 * (TILE - OVERLAP) + OVERLAP
        height = strip_count * (TILE - OVERLAP) + OVERLAP
        place = {"crs": "EPSG:32633", "transform": rasterio.Affine(1, 0, 4e5, 0, -1, 5.6e6)}
        layout = {"width": side, "height": height, "count": 1, "dtype": "uint8"}
        with fileio.create_raster(path, sparse_ok=True, **layout, **place):
            pass
    return predict.prepare(
        _saved_model(folder), path, folder / f"{time.monotonic_ns()}.{suffix}", device="cpu",
        override=("radiometry",),
    )  # fmt: skip


def _saved_model(folder: Path, bands: int = 1) -> Path:
    import pytorch_lightning as pl

    path = folder / "best.ckpt"
    if not path.exists():
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False,
                             enable_model_summary=False)  # fmt: skip
        trainer.strategy.connect(_model(bands))
        trainer.save_checkpoint(path, weights_only=True)
    return path


def measure_merging(folder: Path, runs: int) -> dict[str, float]:
    """Merge strips that the journal holds already, as a prediction that goes on does."""
    import catalogue
    import predict
    import strips

    count, objects = MERGED
    rates: dict[str, float] = {}

    def merge(suffix: str, parts: Sequence[strips.Part]) -> tuple[float, int, int]:
        task = _task(folder, suffix, len(parts))
        for number, part in enumerate(parts):
            part.write(task.predictor.part_path(number))
        start = time.process_time()
        result = predict.run(task)
        return time.process_time() - start, result.count, task.outputs[0].stat().st_size

    task = _task(folder, "csv", count)
    if len(task.predictor.strip_tops) != count:
        raise RuntimeError(f"{len(task.predictor.strip_tops)} strips, expected {count}")
    full = list(_draw_parts(task.predictor.strip_tops, task.predictor.raster.width, objects))
    empty = [replace(part, found=catalogue.Detections.none()) for part in full]
    for suffix in FORMATS:
        few = statistics.median(merge(suffix, empty)[0] for _ in range(3))
        many, found, size = zip(*(merge(suffix, full) for _ in range(3)), strict=True)
        rates[f"merging, {suffix}: core-s/object"] = (statistics.median(many) - few) / found[0]
        rates[f"catalogue, {suffix}: bytes/object"] = size[0] / found[0]
        if suffix == "gpkg":
            rates["merging: core-s/strip"] = few / count

    def push() -> None:
        front = catalogue.SeamFront(0.3)
        for part, next_y in zip(full, [*task.predictor.strip_tops[1:], np.inf], strict=True):
            front.push(part.found, next_y)

    rates["seams alone: core-s/object"] = _core_seconds(push, 3) / (count * objects)
    path = full[0].write(folder / "part.npz")
    rates["journal: bytes/object"] = path.stat().st_size / objects
    rates["journal: look, core-s/strip"] = _core_seconds(partial(strips.Part.read, path), runs)
    return rates


def measure_raster(folder: Path, runs: int) -> dict[str, float]:
    """Take what each raster costs, however small: checks, typical values, an empty catalogue."""
    import predict
    import strips
    from catalogue import Detections

    path, model = folder / "small.tif", _saved_model(folder, bands=3)
    common.write_raster(path, 1024)
    nothing = strips.Part(Detections.none(), 9, 0, 0, np.empty((0, 4), np.int64))
    number = iter(range(runs + 1))

    def predict_one() -> None:
        task = predict.prepare(model, path, folder / f"{next(number)}.gpkg", device="cpu")
        for strip in range(len(task.predictor.strip_tops)):
            nothing.write(task.predictor.part_path(strip))
        predict.run(task)

    raster = fileio.read_raster(path)
    ground = predict._cells(raster, 1)
    sample = partial(tiling.sample_pixels, ground, {raster.identifier: raster}, seed=0)
    return {
        "statistics: core-s/raster": _core_seconds(sample, runs),
        "checks and outputs: core-s/raster": _core_seconds(predict_one, runs),
    }


def measure_index(folder: Path, runs: int) -> dict[str, float]:
    """Index the tiles of an empty raster for training."""
    side, objects = 65_536, 100_000
    layout = {"width": side, "height": side, "count": 1, "dtype": "uint8", "sparse_ok": True}
    with fileio.create_raster(folder / "raster.tif", **layout):
        pass
    boxes = common.with_centers(common.draw_boxes(side, objects, 60))
    image = ImageData(fileio.read_raster(folder / "raster.tif"), "raster", boxes)
    number, rows, size = iter(range(runs + 1)), 0, 0

    def index() -> None:
        nonlocal rows, size
        options = tiling.TilingOptions(angles=(90, 180, 270), evaluation_overlap=OVERLAP)
        _, made = common.index_tiles(image, TILE, folder / f"{next(number)}", options)
        rows = len(tiling.read_tiles(made)[0])
        size = (made / tiling.TILES_NAME).stat().st_size

    seconds = _core_seconds(index, runs)
    return {"tile index: core-s/row": seconds / rows, "tile index: bytes/row": size / rows}


def measure_scheduler(folder: Path, runs: int) -> dict[str, float]:
    """Let two workers do tasks that do nothing; count what each costs scheduler and sender."""
    function, taken = cloudpickle.dumps(_task(folder, "csv", 2).predictor.part_path), []
    with cluster(folder, workers=2) as (scheduler, _), _connect(folder) as client:
        sender, process = psutil.Process(), psutil.Process(scheduler.pid)
        for _ in range(3):
            before = [sum(p.cpu_times()[:2]) for p in (process, sender)]
            sent = client.submit(cloudpickle.loads, function, pure=False)
            futures = [client.submit(operator.call, sent, i, pure=False) for i in range(TASKS)]
            client.gather(futures)
            after = [sum(p.cpu_times()[:2]) for p in (process, sender)]
            taken.append(np.subtract(after, before) / TASKS)
    of_scheduler, of_sender = np.median(taken, axis=0).tolist()
    return {"scheduler: core-s/task": of_scheduler, "sending: core-s/task": of_sender}


@contextmanager
def cluster(folder: Path, workers: int) -> Iterator[tuple[subprocess.Popen, list]]:
    """Start a scheduler and workers that nobody starts again, as processes of their own."""
    place = folder / "scheduler.json"
    options = [["scheduler", "--port", "0", "--dashboard-address", "127.0.0.1:0"]]
    options += [["worker", "--no-nanny", "--nthreads", "1", "--no-dashboard"]] * workers
    processes = []
    try:
        for words in options:
            command = [sys.executable, "-m", "dask", *words, "--scheduler-file", str(place)]
            processes.append(
                subprocess.Popen(command, cwd=common.PROJECT, stderr=subprocess.DEVNULL,
                                 env=os.environ | {"PYTHONPATH": str(common.PROJECT)})
            )  # fmt: skip
        with _connect(folder) as client:
            client.wait_for_workers(workers, timeout=300)
        yield processes[0], processes[1:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _connect(folder: Path) -> Client:
    place = folder / "scheduler.json"
    while not place.exists():
        time.sleep(0.1)
    return Client(scheduler_file=str(place), timeout=300, set_as_default=False)


# ---------------------------------------------------------------------------------------------
# Assumed, planned
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Assumptions:
    """What was not measured here.

    Attributes:
        gpu_flops: What a GPU computes of the network, FLOP/s, in 16 bits.
        readers: Cores that read for a GPU, as `--readers`.
        bandwidth: Of the storage for all workers together, B/s.
        link: Of one worker, B/s.
        worker_mtbf: Mean time between the deaths of a worker, s.
        worker_repair: Time until another one takes its place, s.
        failure_share: Of the attempts at a shard.
        merger_mtbf: Mean time between the deaths of the process that merges, s.
        restart: Time until a run that stopped is called again, s.
        spread: Sigma of the logarithm of a shard's time.
        slow_share: Of the workers.
        slow_factor: How many times as long these take.
        window: Shards per worker that may be begun before the first of them is merged.
    """

    gpu_flops: float = 40e12
    readers: int = 2
    bandwidth: float = 10e9
    link: float = 1e9
    worker_mtbf: float = 30 * DAY
    worker_repair: float = 300.0
    failure_share: float = 1e-4
    merger_mtbf: float = 30 * DAY
    restart: float = 600.0
    spread: float = 0.3
    slow_share: float = 0.01
    slow_factor: float = 3.0
    window: int = 16


@dataclass(frozen=True)
class Archive:
    """Rasters to search.

    Attributes:
        name: What it is.
        gigapixels: Of all.
        rasters: Number of files; 1: a mosaic, whose strips are one row of tiles.
        kind: Of `KINDS`; one of four bands counts as three and a third of it.
        bands: Number of bands.
        density: Objects per gigapixel.
    """

    name: str
    gigapixels: float
    rasters: int
    kind: str
    bands: int
    density: float


ARCHIVES = (
    # 3.79e7 km2 at 0.62 m; the twelve lunar scenes of measurements.md hold 1.75e6 per gigapixel
    Archive("the Moon, one mosaic", 1e5, 1, "uint8, 1 band", 1, 1e6),
    Archive("the Moon, 10,000 rasters", 1e5, 10_000, "uint8, 1 band", 1, 1e6),
    # 357,600 km2 at 0.2 m, a file for each km2; a tree or house on every 400 m2
    Archive("orthophotos of Germany", 357_600 / 0.2**2 / 1e3, 357_600, "uint8, 3 bands", 4, 1e5),
)


@dataclass(frozen=True)
class Costs:
    """What a tile costs whom.

    Attributes:
        core: Time of one core that does all of it, s.
        gpu: Time of one GPU and what reads for it, s.
        read_bytes: From the storage.
        objects: Number of objects.
        merge: Time of the process that merges, s.
    """

    core: float
    gpu: float
    read_bytes: float
    objects: float
    merge: float


def cost(
    rates: Mapping[str, float], assumed: Assumptions, kind: str, bands: int, density: float,
    output: str = "gpkg",
) -> Costs:  # fmt: skip
    """Say what a tile costs, on the ground that it adds."""
    more = bands / KINDS[kind][1]
    read = rates[f"{kind}: read, core-s/tile"] * more
    network = min(v for n, v in rates.items() if n.startswith("network, "))
    objects = density * CORE_PX / GIGA
    return Costs(
        core=network + read,
        gpu=max(rates["network: FLOP/tile"] / assumed.gpu_flops, read / assumed.readers),
        read_bytes=rates[f"{kind}: read, bytes/px"] * more * CORE_PX,
        objects=objects, merge=objects * rates[f"merging, {output}: core-s/object"],
    )  # fmt: skip


def scenario(
    rates: Mapping[str, float], assumed: Assumptions, costs: Costs, *,
    tiles: float, workers: int, on_gpu: bool = False, mergers: int = 1, **changes: object,
) -> Scenario:  # fmt: skip
    """Describe 100,000 shards of so many tiles, merged by so many processes at once."""
    shared = ("bandwidth", "link", "worker_mtbf", "worker_repair", "failure_share", "merger_mtbf",
              "restart", "spread", "slow_share", "slow_factor")  # fmt: skip
    values = {name: getattr(assumed, name) for name in shared} | {
        "seconds": tiles * (costs.gpu if on_gpu else costs.core), "workers": workers,
        "read_bytes": tiles * costs.read_bytes, "window": assumed.window * workers,
        "dispatch": max(rates["scheduler: core-s/task"], rates["sending: core-s/task"]),
        "merge": (tiles * costs.merge + rates["merging: core-s/strip"]) / mergers,
        "scan": rates["journal: look, core-s/strip"],
    }  # fmt: skip
    return Scenario(**values | changes)


def plan(
    archive: Archive, rates: Mapping[str, float], assumed: Assumptions, *, cores: int, gpus: int
) -> dict[str, object]:
    """Add up an archive; nothing goes wrong, and every part works alone."""
    costs = cost(rates, assumed, archive.kind, archive.bands, archive.density)
    tiles = archive.gigapixels * GIGA / CORE_PX
    side = math.sqrt(archive.gigapixels * GIGA / archive.rasters)  # px, of a raster
    strips = tiles / max(64, side / (TILE - OVERLAP))
    objects = tiles * costs.objects
    seconds = {
        "cores": tiles * costs.core / cores, "GPUs": tiles * costs.gpu / gpus,
        "storage": tiles * costs.read_bytes / assumed.bandwidth,
        "merging": tiles * costs.merge + strips * rates["merging: core-s/strip"],
        "scheduler": strips * max(rates["scheduler: core-s/task"], rates["sending: core-s/task"]),
        "checks": archive.rasters * rates["checks and outputs: core-s/raster"],
    }  # fmt: skip
    alone = ("merging", "scheduler", "checks")  # one process does them, unless there are jobs
    found = {"archive": archive.name, "tiles": tiles, "strips": strips, "objects": objects}
    found |= {
        "core_hours": tiles * costs.core / HOUR, "gpu_hours": tiles * costs.gpu / HOUR,
        "merging_core_hours": seconds["merging"] / HOUR, "checks_hours": seconds["checks"] / HOUR,
        "read_bytes": tiles * costs.read_bytes,
        "journal_bytes": objects * rates["journal: bytes/object"],
        "catalogue_bytes": objects * rates["catalogue, gpkg: bytes/object"],
    }  # fmt: skip
    for who, number in (("cores", cores), ("GPUs", gpus)):
        for jobs in (1, number):
            parts = {n: seconds[n] / (jobs if n in alone else 1) for n in (who, "storage", *alone)}
            limiting = max(parts, key=parts.get)
            found[f"{number} {who}, {jobs} merging"] = (parts[limiting] / DAY, limiting)
    return found


# ---------------------------------------------------------------------------------------------
# Simulated
# ---------------------------------------------------------------------------------------------

SHARD = GIGA / CORE_PX  # tiles of a gigapixel
MANY_MERGERS = 100
WORKERS = (10, 30, 100, 300, 1_000, 3_000, 10_000)


def cases(base: Scenario) -> dict[str, Scenario]:
    """Return what is to be compared with 1,000 workers whose merging is shared out."""
    calm = replace(base, worker_mtbf=math.inf, merger_mtbf=math.inf, failure_share=0.0,
                   spread=0.0, slow_share=0.0)  # fmt: skip
    alone = {"merge": base.merge * MANY_MERGERS}
    failing = {"worker_mtbf": base.worker_mtbf / 10, "merger_mtbf": base.merger_mtbf / 10,
               "failure_share": base.failure_share * 10}  # fmt: skip
    crawling = replace(base, slow_factor=base.slow_factor * 10)
    return {
        "nothing goes wrong": calm,
        "the same, one process merges": replace(calm, **alone),
        "as assumed": base,
        "the same, one process merges ": replace(base, **alone),
        "failures x 10": replace(base, **failing),
        "errors in 1 % of the attempts": replace(base, failure_share=0.01),
        "the same, two more attempts (not built)": replace(base, failure_share=0.01, retries=3),
        "slow workers x 10 as many": replace(base, slow_share=base.slow_share * 10),
        "slow workers x 10 as slow": crawling,
        "the same, 64 per worker ahead": replace(crawling, window=64 * base.workers),
        "the same, and late ones repeated (not built)": replace(
            crawling, window=64 * base.workers, speculate=True
        ),
    }


def describe_outcome(scene: Scenario, outcome: Outcome) -> dict[str, object]:
    """Return a row of the table."""
    if set(outcome.done) != {1} or outcome.merged != list(range(scene.shards)):
        raise RuntimeError(f"shards were lost, or done twice: {scene}")
    return {
        "makespan_days": outcome.makespan / DAY,
        "against_ideal": outcome.makespan / scene.limits["workers"],
        "lost_share": outcome.lost_share, "deaths": outcome.deaths, "errors": outcome.failures,
        "stops": outcome.stops, "busy": outcome.busy,
        "busiest": max(outcome.busy, key=outcome.busy.get),
    }  # fmt: skip


def validate(folder: Path) -> dict[str, float]:
    """Let two real workers sleep, kill one, and compare with the simulation of just that.

    An undisturbed round before it tells what a task takes beyond its sleep on this machine.
    """
    calm = Scenario(shards=80, seconds=0.2, workers=2, spread=0.5, merge=0.01)
    with cluster(folder, calm.workers) as (_, workers), _connect(folder) as client:
        _sleep(client, replace(calm, shards=10))  # warm
        beyond = calm.seconds * (_sleep(client, calm) / simulate(calm).makespan - 1)
        scene = replace(calm, shards=160, seed=1, kills=(5.0,), worker_repair=math.inf)
        threading.Timer(scene.kills[0], workers[0].kill).start()
        real = _sleep(client, scene)
    told = simulate(replace(scene, seconds=scene.seconds + beyond)).makespan
    return {"real_s": real, "simulated_s": told, "off": told / real - 1, "beyond_sleep_s": beyond}


def _sleep(client: Client, scene: Scenario) -> float:
    """Let workers sleep as long as each shard takes; return the seconds until all is merged."""
    executor = client.get_executor(pure=False)  # it fetches results before a worker can die
    start = time.perf_counter()
    group = f"sleep-{start}"  # whose tasks are handed out when a worker is free
    futures = [
        executor.submit(time.sleep, scene.seconds * length, key=(group, i))
        for i, length in enumerate(draw_lengths(scene))
    ]
    for future in futures:
        future.result()
        time.sleep(scene.merge)
    return time.perf_counter() - start


# ---------------------------------------------------------------------------------------------
# Shown
# ---------------------------------------------------------------------------------------------

PART_COLORS = {"merging": COLORS[4], "storage": COLORS[5], "scheduler": COLORS[3]}
MERGER_COLORS = {1: COLORS[4], MANY_MERGERS: COLORS[2]}


def simulate_growth(rates: Mapping[str, float], assumed: Assumptions) -> list[dict[str, object]]:
    """Simulate the mosaic with more and more workers; whoever merges stays alive."""
    moon, curves = ARCHIVES[0], []
    costs = cost(rates, assumed, moon.kind, moon.bands, moon.density)
    for on_gpu, mergers in itertools.product((False, True), MERGER_COLORS):
        scenes = [
            scenario(rates, assumed, costs, tiles=SHARD, workers=workers, on_gpu=on_gpu,
                     mergers=mergers, merger_mtbf=math.inf)
            for workers in WORKERS
        ]  # fmt: skip
        limits = dict(scenes[-1].limits)
        work = limits.pop("workers") * WORKERS[-1]
        full = max(limits, key=limits.get)
        curves.append({
            "on_gpu": on_gpu, "mergers": mergers, "workers": WORKERS,
            "days": [simulate(scene).makespan / DAY for scene in scenes],
            "ideal_days": [work / workers / DAY for workers in WORKERS],
            "full": full, "full_at": work / limits[full], "full_days": limits[full] / DAY,
        })  # fmt: skip
        log.info("%s", curves[-1])
    return curves


def draw(
    rates: Mapping[str, float], assumed: Assumptions, curves: Sequence[Mapping], path: Path
) -> None:
    """Draw days against workers, and how many workers a part feeds against the size of shards."""
    fig, axes = plt.subplots(1, 3, figsize=(12.5, 4), layout="constrained")
    for curve in curves:
        ax, color = axes[int(curve["on_gpu"])], MERGER_COLORS[curve["mergers"]]
        if curve["mergers"] == 1:
            ax.plot(curve["workers"], curve["ideal_days"], "k:", label="workers alone: the ideal")
        word = "process merges" if curve["mergers"] == 1 else "processes merge"
        ax.plot(curve["workers"], curve["days"], "o-", color=color, markersize=4,
                label=f"{curve['mergers']} {word}")  # fmt: skip
        text = f"{curve['full']} full at {curve['full_at']:,.2g}"
        if WORKERS[0] <= curve["full_at"] <= WORKERS[-1]:
            text = f"{curve['full']} full at {curve['full_at']:,.0f}"
            ax.plot(curve["full_at"], curve["full_days"], "*", color=color, markersize=13, mec="k")
        above = curve["mergers"] == 1
        ax.text(130, curve["full_days"] * (1.1 if above else 0.9), text, fontsize=8, color=color,
                va="bottom" if above else "top")  # fmt: skip
        ax.axhline(curve["full_days"], color=color, linewidth=0.7, linestyle="--")
    for ax, who in zip(axes, ("cores", "GPUs of an assumed speed"), strict=False):
        ax.set(xscale="log", yscale="log", xlabel=who, ylabel="days", ylim=(0.1, 300))
        ax.set_title(f"100,000 gigapixels on {who.split()[0]}, simulated", fontsize=10)
        ax.grid(visible=True, alpha=0.3)
    axes[0].legend(fontsize=8, loc="upper right")
    moon, sizes = ARCHIVES[0], np.geomspace(64, 20_000, 30)
    costs = cost(rates, assumed, moon.kind, moon.bands, moon.density)
    for on_gpu, style, word in ((False, "-", "cores"), (True, "--", "GPUs")):
        limits = [scenario(rates, assumed, costs, tiles=tiles, workers=1, on_gpu=on_gpu,
                           link=math.inf).limits for tiles in sizes]  # fmt: skip
        for part, color in PART_COLORS.items():
            fed = [limit["workers"] / limit[part] for limit in limits]
            axes[2].plot(sizes, fed, style, color=color)
            below = part == "storage"  # beside merging for cores
            axes[2].annotate(f"{part}, {word}", (sizes[-1], fed[-1]), fontsize=8, color=color,
                             xytext=(0, -11 if below else 4), textcoords="offset points",
                             ha="right", va="bottom")  # fmt: skip
    axes[2].set(xscale="log", yscale="log", xlabel="tiles of 512 px in a shard", ylabel="workers")
    axes[2].set_title("how many workers one of each part feeds", fontsize=10)
    axes[2].set_ylim(top=2e7)
    axes[2].grid(visible=True, alpha=0.3)
    fig.savefig(path, dpi=85)
    plt.close(fig)


def describe_rates(rates: Mapping[str, float]) -> str:
    """Return the rates as a table."""
    return _table(["measured", "value"], [[name, f"{v:.3g}"] for name, v in rates.items()])


def describe_plans(plans: Sequence[Mapping[str, object]]) -> str:
    """Return the plans as a table, an archive each column."""
    rows = [
        ["tiles of 512 px, strips", *(f"{p['tiles']:.2g}, {p['strips']:.2g}" for p in plans)],
        ["objects", *(f"{p['objects']:.2g}" for p in plans)],
        ["core-hours", *(f"{p['core_hours']:,.0f}" for p in plans)],
        ["or GPU-hours (assumed)", *(f"{p['gpu_hours']:,.0f}" for p in plans)],
        ["core-hours of merging", *(f"{p['merging_core_hours']:,.0f}" for p in plans)],
        ["hours of checks, one by one", *(f"{p['checks_hours']:,.1f}" for p in plans)],
        ["read", *(_bytes(p["read_bytes"]) for p in plans)],
        ["journal, catalogue",
         *(f"{_bytes(p['journal_bytes'])}, {_bytes(p['catalogue_bytes'])}" for p in plans)],
    ]  # fmt: skip
    for name, value in plans[0].items():
        if isinstance(value, tuple):
            found = [p[name] for p in plans]
            rows.append([f"days with {name}", *(f"{days:.2g} ({part})" for days, part in found)])
    return _table(["", *(p["archive"] for p in plans)], rows)


def _bytes(size: float) -> str:
    return f"{size / 1e12:,.1f} TB" if size >= 1e12 else f"{size / 1e9:,.0f} GB"


def describe_cases(rows: Mapping[str, Mapping[str, object]]) -> str:
    """Return what was simulated as a table."""
    head = ["1,000 cores, 100,000 shards", "time, of the ideal", "work lost", "deaths", "errors",
            "stops", "busiest"]  # fmt: skip
    return _table(head, [
        [name.strip(), f"{r['against_ideal']:.2f}", f"{r['lost_share']:.2%}", f"{r['deaths']:,}",
         f"{r['errors']:,}", str(r["stops"]), f"{r['busiest']} {r['busy'][r['busiest']]:.2f}"]
        for name, r in rows.items()
    ])  # fmt: skip


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measure, plan, simulate, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", type=Path, help="of an earlier call, or where to keep them")
    parser.add_argument("--pixels", type=Path, nargs=2, default=(), metavar=("GREY", "RGB"))
    parser.add_argument("--gpu-tflops", type=float, default=Assumptions.gpu_flops / 1e12,
                        help="assumed of a GPU (default: %(default)g)")  # fmt: skip
    parser.add_argument("--bandwidth-gb", type=float, default=Assumptions.bandwidth / 1e9,
                        help="assumed of the storage, GB/s (default: %(default)g)")  # fmt: skip
    parser.add_argument("--cores", type=int, default=1_000)
    parser.add_argument("--gpus", type=int, default=100)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--picture", type=Path, help="draw what saturates")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    if args.rates and args.rates.exists():
        rates = json.loads(args.rates.read_text(encoding="utf-8"))
    else:
        rates = measure(args.pixels)
        if args.rates:
            fileio.write_json(args.rates, rates)
    assumed = Assumptions(gpu_flops=args.gpu_tflops * 1e12, bandwidth=args.bandwidth_gb * 1e9)
    plans = [plan(a, rates, assumed, cores=args.cores, gpus=args.gpus) for a in ARCHIVES]
    moon = ARCHIVES[0]
    costs = cost(rates, assumed, moon.kind, moon.bands, moon.density)
    base = scenario(rates, assumed, costs, tiles=SHARD, workers=1_000, mergers=MANY_MERGERS)
    rows = {name: describe_outcome(s, simulate(s)) for name, s in cases(base).items()}
    with tempfile.TemporaryDirectory() as folder:
        checked = validate(Path(folder))
    curves = simulate_growth(rates, assumed)
    if args.picture:
        draw(rates, assumed, curves, args.picture)
    page = [describe_rates(rates), describe_plans(plans), describe_cases(rows), str(checked)]
    sys.stdout.write("\n\n".join(page) + "\n")
    if args.json:
        record = {
            "machine": common.machine(), "rates": rates, "assumed": asdict(assumed),
            "archives": [asdict(a) for a in ARCHIVES], "plans": plans, "simulated": rows,
            "real": checked, "curves": curves,
        }  # fmt: skip
        fileio.write_json(args.json, record)


if __name__ == "__main__":
    main()
