"""The factorial loop: one training per combination of hyperparameters, all on the same ground.

The search is an Optuna study in the run's folder. A trial that is finished is never repeated, one
that was interrupted is; a failed one is recorded with its traceback and the search goes on.

    <run>/study.journal              the search
    <run>/trials/<key>/              record, checkpoints, detections of one training
    <run>/leaderboard.csv            all trials, best test AP50 first
    <run>/best.ckpt, metrics.json    the trial with the best validation AP50
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import shutil
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from filelock import FileLock
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

import fileio
from ImageData import ImageData, InputError
from LargeRasterOR import BEST_BY
from logger import get_logging_key, make_model_logger
from ModelConfig import ModelConfig
from trials import EVALUATION_FILES, SearchData, train_iteration

log = logging.getLogger(__name__)

TRASH = ".trash-"  # prefix of folders that are being deleted
OUTCOMES = {"values", "error"}  # attributes of a trial, one of which tells that it came to an end


def run_search(
    data: SearchData,
    search_space: Mapping[str, Sequence[int | float]],
    conf: ModelConfig,
    run_dir: Path,
    *,
    force: bool = False,
    retry_failed: bool = False,
    parameters: Mapping[str, Any] | None = None,
    wandb_active: bool = False,
    wandb_project: str = "LargeRasterOR",
    progress: bool = False,
) -> pd.DataFrame:
    """Train and test every combination that is not done yet, then rank all of them.

    Args:
        data: What the trials share.
        search_space: `patch_size, n_epochs, sample_size, learning_rate, batch_size` -> values.
        conf: Configuration of all trials, each of which sets its own hyperparameters.
        run_dir: The run's folder.
        force: Forget earlier trials of this run.
        retry_failed: Train once more what failed earlier; a changed grid does so in any case.
        parameters: Recorded as `parameters.json` once the search is known to go ahead.
        wandb_active: Send the records to Weights & Biases as well.
        wandb_project: Its project there.
        progress: Show bars.

    Returns:
        The leaderboard, see `read_leaderboard`.

    Raises:
        InputError: The run holds trials made from other input, or every trial failed.
    """
    run_dir = Path(run_dir)
    with fileio.exclusive(run_dir):
        for folder in (run_dir / "trials", *(run_dir / "trials").glob("*/")):
            fileio.remove_strays(folder)
        marks = _check_same_input(data, conf, run_dir, force=force)
        fileio.write_json(run_dir / "classes.json", dict(data.ids))
        fileio.write_json(run_dir / "radiometry.json", asdict(data.radiometry))
        fileio.write_json(run_dir / "parameters.json", parameters or {})
        grid = {name: list(values) for name, values in sorted(search_space.items())}
        study = _open_study(grid, run_dir, conf.seed)
        full: list[fileio.FullDiskError] = []

        def objective(trial: optuna.Trial) -> float:
            hyperparams = {k: trial.suggest_categorical(k, grid[k]) for k in search_space}
            trial.set_user_attr("key", get_logging_key(hyperparams))
            mark = marks[hyperparams["patch_size"]]
            try:
                values = _known_result(run_dir, hyperparams, mark)
                if values is None:
                    values = _train_trial(
                        hyperparams, data, conf, run_dir, mark,
                        wandb_active=wandb_active, wandb_project=wandb_project, progress=progress,
                    )  # fmt: skip
            except fileio.FullDiskError as error:
                full.append(error)  # no failure of the trial, which is repeated
                raise
            except Exception as error:
                trial.set_user_attr("error", f"{type(error).__name__}: {error}")
                raise
            trial.set_user_attr("values", values)
            return values[BEST_BY]

        to_do = _count_to_do(study, grid, run_dir, retry_failed=retry_failed)
        log.info("search: %d trials to do of %d", to_do, math.prod(map(len, grid.values())))
        for _ in range(to_do):  # one at a time: the sampler stops a study once its grid is visited
            study.optimize(objective, n_trials=1, catch=(Exception,))
            if full:
                raise full[0]
        return _finish(study, run_dir)


def _known_result(
    run_dir: Path, hyperparams: Mapping[str, Any], mark: str
) -> dict[str, float] | None:
    """Return what a trial of the same input ended with, perhaps in a search of another grid."""
    key = get_logging_key(hyperparams)
    path = run_dir / "trials" / key / "result.json"
    if not path.exists() or _read_json(path)["made_from"] != mark:
        return None
    log.info("%s is done already", key)
    return _read_json(path)["values"]


def _train_trial(
    hyperparams: Mapping[str, Any],
    data: SearchData,
    conf: ModelConfig,
    run_dir: Path,
    mark: str,
    *,
    wandb_active: bool,
    wandb_project: str,
    progress: bool,
) -> dict[str, float]:
    key = get_logging_key(hyperparams)
    log.info("trial %s", key)
    trial_dir = fileio.recreate_directory(run_dir / "trials" / key)
    logger = make_model_logger(
        trial_dir, wandb_active=wandb_active, project=wandb_project,
        name=f"{run_dir.name}_{key}", hyperparams=hyperparams,
    )  # fmt: skip
    status = "failed"
    try:
        with fileio.writing(trial_dir):
            values = train_iteration(hyperparams, data, conf, trial_dir, logger, progress=progress)
        result = {"hyperparams": hyperparams, "values": values, "made_from": mark}
        fileio.write_json(trial_dir / "result.json", result)
        status = "success"
    except fileio.FullDiskError:
        raise
    except Exception:
        logger.log_message(traceback.format_exc())
        log.exception("trial %s failed; the search goes on", key)
        raise
    finally:
        logger.close(status)
    return values


def read_leaderboard(study: optuna.Study, run_dir: Path) -> pd.DataFrame:
    """Tabulate the trials of a study, best test AP50 first, failed ones last.

    Returns:
        `trial, state`, the hyperparameters, the test's and validation's values, `training_time`
        (s), `selected` (highest validation AP50), `checkpoint, error`.
    """
    rows = []
    for trial in _latest_trials(study):
        values = trial.user_attrs.get("values", {})
        best = run_dir / "trials" / trial.user_attrs["key"] / "checkpoints" / "best.ckpt"
        rows.append(
            # one that was stopped after its last word is complete all the same
            {"trial": trial.number, "state": "complete" if values else trial.state.name.lower(),
             **trial.params, **values, "selected": False,
             "checkpoint": str(best) if values else "", "error": trial.user_attrs.get("error", "")}
        )  # fmt: skip
    board = pd.DataFrame(rows)
    if "AP50" in board:
        # before the test has a say: of equals, the first that was trained
        board.loc[board.sort_values("trial")[BEST_BY].idxmax(), "selected"] = True
        board = board.sort_values("AP50", ascending=False, ignore_index=True, na_position="last")
    return board


def trial_dir_of(row: pd.Series) -> Path:
    """Return the folder of a trial, given its row of the leaderboard."""
    return Path(row["checkpoint"]).parent.parent


def test_values(trial_dir: Path) -> dict[str, float]:
    """Return what a trial measured on the test ground, see `metrics.evaluate`."""
    values = _read_json(trial_dir / "result.json")["values"]
    return {name: v for name, v in values.items() if not name.startswith(("val_", "test_"))}


def fullest_test_block(
    images: Sequence[ImageData], blocks: pd.DataFrame
) -> tuple[ImageData, pd.Series]:
    """Find the block of test ground with most objects, and its raster."""
    best = None
    for image in images:
        x, y = image.df["pixel_x"], image.df["pixel_y"]
        mine = blocks[(blocks["raster"] == image.image_identifier) & (blocks["split"] == "test")]
        for _, b in mine.iterrows():
            inside = x.between(b["x"], b["x"] + b["width"], inclusive="left")
            inside &= y.between(b["y"], b["y"] + b["height"], inclusive="left")
            if best is None or inside.sum() > best[0]:
                best = int(inside.sum()), image, b
    return best[1:]


def _finish(study: optuna.Study, run_dir: Path) -> pd.DataFrame:
    board = read_leaderboard(study, run_dir)
    fileio.write_table(run_dir / "leaderboard.csv", board)
    if not board["selected"].any():
        raise InputError(
            f"all {len(board)} trials failed; the first said: {board['error'].iloc[0]}\n"
            "Mend the cause and run again with RETRY_FAILED = True"
        )
    best = board[board["selected"]].iloc[0]
    checkpoint, trial_dir = Path(best["checkpoint"]), trial_dir_of(best)
    for source in (checkpoint, *(trial_dir / name for name in EVALUATION_FILES)):
        with fileio.atomic_path(run_dir / source.name) as temporary:
            shutil.copyfile(source, temporary)
    summary = {
        "best_trial": trial_dir.name,
        "ranked_by": BEST_BY,
        **_read_json(trial_dir / "result.json"),
        "trials": board["state"].value_counts().to_dict(),
    }
    fileio.write_json(run_dir / "metrics.json", summary)
    return board


# ---------------------------------------------------------------------------------------------
# The study
# ---------------------------------------------------------------------------------------------


def _check_same_input(
    data: SearchData, conf: ModelConfig, run_dir: Path, *, force: bool
) -> dict[int, str]:
    """Refuse to mix trials of one run that could not be ranked together.

    Returns:
        Tile size -> fingerprint of all that a trial of this size is made from.
    """
    trials, record = run_dir / "trials", run_dir / "trials" / "made_from.json"
    if force:
        (run_dir / "study.journal").unlink(missing_ok=True)
        if trials.exists():  # goes as a whole, whenever the deletion is stopped
            trials.rename(run_dir / f"{TRASH}{secrets.token_hex(4)}")
    for trash in run_dir.glob(f"{TRASH}*"):
        shutil.rmtree(trash)
    configuration = conf.to_dict()
    configuration["validation"].pop("pr_compute_interval")
    # what a trial sets itself, and what only says where it runs, may differ
    for name in ("batch_size", "workers", "accelerator", "devices"):
        configuration.pop(name)
    for name in ("epochs", "lr"):
        configuration["train"].pop(name)
    starts = [name for name in (conf.init_from, conf.weights) if name and Path(name).is_file()]
    common = {
        "classes": dict(data.ids),
        "weights to start from": [fileio.fingerprint(Path(name)) for name in starts],
        "ground": fileio.fingerprint(data.blocks),
        "bands and regions": fileio.fingerprint(
            {name: r.made_from | {"files": None} for name, r in data.rasters.items()}
        ),
        "radiometry": asdict(data.radiometry),
        "configuration": configuration,
    }
    tiles = {str(size): mark for size, mark in data.tile_marks.items()}
    now = json.loads(json.dumps(common | {"tiles": tiles}))
    ranked = record.exists() and any(trials.glob("*/result.json"))
    before = _read_json(record) if ranked else now
    differing = [name for name in common if before.get(name) != now[name]]
    if any(before["tiles"].get(size, mark) != mark for size, mark in tiles.items()):
        differing.append("tiles")
    if differing:
        raise InputError(
            f"run {run_dir} holds trials made with other {', '.join(differing)}; they cannot be "
            "ranked together. Set another RUN_NAME, or FORCE_CREATION = True to start over"
        )
    fileio.write_json(record, now | {"tiles": before["tiles"] | tiles})
    return {size: fileio.fingerprint([common, tiles[str(size)]]) for size in data.tilings}


class StudyJournal(JournalFileBackend):
    """A study in a file whose lines are appended whole or not at all, so that it stays readable."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append operations; see the base class."""
        with self._lock:
            lines = "\n".join(json.dumps(log, separators=(",", ":")) for log in logs)
            fileio.append_line(Path(self._file_path), lines)


def _open_study(grid: Mapping[str, list], run_dir: Path, seed: int) -> optuna.Study:
    # A study cannot change its grid; another grid is another study in the same file, and finds the
    # trials that both share by their results.
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # we log what happens to a trial
    journal = str(run_dir / "study.journal")
    return optuna.create_study(
        storage=JournalStorage(StudyJournal(journal, FileLock(f"{journal}.lock"))),
        study_name=fileio.fingerprint(dict(grid)),
        sampler=optuna.samplers.GridSampler(grid, seed=seed),
        direction="maximize",
        load_if_exists=True,
    )


def _count_to_do(
    study: optuna.Study, grid: Mapping[str, list], run_dir: Path, *, retry_failed: bool
) -> int:
    """Count the trials to train, after putting those that are to be repeated into the queue."""
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        # its process was stopped; `tell` would fail, as the sampler wants to end a search that is
        # not under way when it hears of the last place of its grid
        study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    # the last word on each place in the grid
    latest = {t.system_attrs["grid_id"]: t for t in study.trials if "grid_id" in t.system_attrs}
    queued = [trial for trial in latest.values() if trial.state == TrialState.WAITING]
    for trial in latest.values():
        result = run_dir / "trials" / trial.user_attrs.get("key", "") / "result.json"
        lost = "values" in trial.user_attrs and not result.exists()
        open_ended = not trial.user_attrs.keys() & OUTCOMES
        cut_short = trial.state != TrialState.WAITING and (open_ended or lost)
        if cut_short:
            log.warning("trial %d has no result; it starts over", trial.number)
        if cut_short or (retry_failed and "error" in trial.user_attrs):
            # under its place in the grid, as Optuna's own retry callback does
            place = {name: trial.system_attrs[name] for name in ("grid_id", "search_space")}
            again = optuna.trial.create_trial(state=TrialState.WAITING, system_attrs=place)
            study.add_trial(again)
            queued.append(again)
    return math.prod(map(len, grid.values())) - len(latest) + len(queued)


def _latest_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the last finished trial of every combination; one that was cut short is none."""
    latest = {
        trial.user_attrs["key"]: trial
        for trial in study.trials
        if trial.user_attrs.keys() & OUTCOMES
    }
    return list(latest.values())


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
