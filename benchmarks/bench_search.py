"""What further workers gain: the trainings of a search, done by one worker and by several.

    .venv/bin/python benchmarks/bench_search.py [--workers 2] [--rounds 1] [--sleep S] [--json FILE]

The search is that of `params/quickstart.yaml` on its samples, which `make sample` writes. Every
worker is a process of one thread, so that it needs a core of its own to gain anything. They wait
for each other before the clock starts, which ends with the leaderboard: what is measured is the
search, not the start and the end of Python.
With `--sleep`, trainings are replaced by as many seconds of waiting: what is left of a ratio above
one over the number of workers is then what sharing itself costs, on however busy a machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

WORKER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
import gridsearch
torch.set_num_threads(1)
run, seconds = Path(sys.argv[2]), float(sys.argv[4])
if seconds:
    def train_iteration(hyperparams, data, conf, trial_dir, *_, **__):
        time.sleep(seconds)
        (trial_dir / "checkpoints").mkdir(parents=True)
        for name in ("checkpoints/best.ckpt", *gridsearch.EVALUATION_FILES):
            (trial_dir / name).touch()
        return {"AP50": 0.5, "val_AP50": 0.5, "training_time": seconds}
    gridsearch.train_iteration = train_iteration
Path(sys.argv[3]).touch()
while not (run / "go").exists():
    time.sleep(0.01)
sys.exit(gridsearch.main(["--run", str(run), "--accelerator", "cpu"]))
"""


def prepare(runs: Path) -> Path:
    """Prepare the run up to its search, as the notebook does."""
    import annotations
    import fileio
    import gridsearch
    import splits
    import tiling
    import trials
    from ModelConfig import RunParameters

    params = RunParameters.from_files(
        PROJECT / "main.ipynb", PROJECT / "params" / "quickstart.yaml"
    )
    rasters = fileio.read_rasters([PROJECT / path for path in params.image_paths])
    images, _ = annotations.clean_annotations(
        [PROJECT / path for path in params.df_paths], rasters, output_dir=runs / "clean",
        **params.cleaning_options(),
    )  # fmt: skip
    blocks = splits.ground_blocks(
        rasters, max_tile_size=max(params.PATCH_SIZES), **params.split_options()
    )
    options = tiling.TilingOptions(
        evaluation_overlap=tiling.evaluation_overlap(images), **params.tiling_options()
    )
    tilings = tiling.make_tiles(images, blocks, params.PATCH_SIZES, runs / "tiles", options)
    conf = params.model_config()
    data, _ = trials.prepare_search(images, blocks, tilings, params.SAMPLE_SIZES, conf)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt  # before the first training; workers do them all

    gridsearch.train_iteration = stop
    try:
        gridsearch.run_search(data, params.search_space, conf, runs / "prepared")
    except KeyboardInterrupt:
        return runs / "prepared"
    raise AssertionError("the search was not stopped")


def measure(prepared: Path, workers: int, sleep: float) -> dict[str, float]:
    """Let workers do a copy of the search; return the seconds, and the machine's load before."""
    import shutil

    import pandas as pd

    load = os.getloadavg()[0]
    run = Path(tempfile.mkdtemp(dir=prepared.parent)) / "run"
    shutil.copytree(prepared, run)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    marks = [run / f"ready_{i}" for i in range(workers)]
    crew = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(PROJECT), str(run), str(mark), str(sleep)],
            env=environment, stderr=subprocess.DEVNULL,
        )
        for mark in marks
    ]  # fmt: skip
    try:
        while not all(mark.exists() for mark in marks):
            time.sleep(0.05)
        (run / "go").touch()
        start = time.time()
        codes = [worker.wait() for worker in crew]
        seconds = (run / "leaderboard.csv").stat().st_mtime - start
    finally:
        for worker in crew:
            worker.kill()
    board = pd.read_csv(run / "leaderboard.csv")
    assert codes == [0] * workers, codes
    assert (board["state"] == "complete").all()
    logs = "".join(path.read_text() for path in (run / "workers").iterdir())
    begun = logs.count("gridsearch - INFO - trial ")
    assert begun == len(board), f"{begun} trainings of {len(board)} trials"
    trained = board["training_time"].sum()
    return {"seconds": seconds, "load": load, "trials": len(board), "training_s": trained}


def main() -> None:
    """Measure one worker and several in turn, and print both with their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sleep", type=float, default=0.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(Path(folder))
        found = {
            count: [measure(prepared, count, args.sleep) for _ in range(args.rounds)]
            for count in (1, args.workers)
        }
    seconds = {
        count: statistics.median(r["seconds"] for r in rows) for count, rows in found.items()
    }
    result = {
        "cores": len(os.sched_getaffinity(0)), "rounds": found,
        "ratio": seconds[args.workers] / seconds[1],
    }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
