"""The search: one training per combination of hyperparameters, all on the same ground.

The combinations are a queue that any number of processes share (see `study`): notebooks that run
the search, and workers, on any machine that has the run's folder:

    python gridsearch.py --run runs/mine                  work on a search that a notebook began
    python gridsearch.py ledger runs [--where "AP50 > 0.5"]   list all runs and trials, see `ledger`

A trial that is finished is never repeated, one that was interrupted is; a failed one is recorded
with its traceback and the search goes on.

    <run>/search/                    all that a worker needs: settings, ground, labels of pixels
    <run>/study.journal              the queue, unless a database holds it
    <run>/trials/.<key>~<claim>/     where a worker trains; one that lost its trial is alone there
    <run>/trials/<key>/              record, checkpoints, detections of one training, ended
    <run>/leaderboard.csv            all trials, best on the test first
    <run>/best.ckpt, metrics.json    the trial that is best on validation
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import secrets
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytorch_lightning as pl
import shapely
from optuna.trial import FrozenTrial, TrialState
from pydantic import TypeAdapter
from pytorch_lightning.utilities.exceptions import MisconfigurationException

import fileio
import imutils
import ledger
import masks
import ranks
import study
import tiling
from ImageData import ImageData, InputError, Window
from LargeRasterOR import LargeRasterORModel
from learning import TileModel, __version__
from logger import check_logger, configure_logger, make_model_logger
from ModelConfig import (
    HYPERPARAMETERS,
    PLACE,
    AuxiliaryOptions,
    ModelConfig,
    Record,
    Search,
    VisualizationConfig,
)  # fmt: skip
from study import Claim, LostTrialError, Queue
from trials import LAST_CHECKPOINT, SearchData, task_of, train_iteration
from visualization import TileGallery

log = logging.getLogger(__name__)

SCORES = ("AP50", "box_f1", "class_recall", "mean_IoU", "mean_F1", "pixel_accuracy")  # to show
TRASH = ".trash-"  # prefix of folders that are being deleted
FAILED, INCOMPLETE, INTERRUPTED = 1, 3, 130  # exit codes


@dataclass(frozen=True)
class Plan:
    """What a search tries, as its run's folder holds it for all who take part.

    Attributes:
        name: What the names of its studies begin with; another one after each start over.
        made_from: Fingerprint of all that its trials are made from.
        space: Hyperparameter -> values.
        search: How combinations are chosen.
        n_trials: How many, where it is not all of a grid.
        pruning: Whether hopeless trials are stopped.
        storage: The database of the queue, without its password; None: a file in the run's folder.
        logger: Where records go beside their files, see `logger.make_model_logger`.
        logger_options: What it is told.
        visualization: Which tiles are drawn while training, see `ModelConfig.VisualizationConfig`.
    """

    name: str
    made_from: str
    space: dict[str, list[int | float]]
    search: Search
    n_trials: int
    pruning: bool
    storage: str | None
    logger: Record = "default"
    logger_options: dict[str, Any] = field(default_factory=dict)
    visualization: dict[str, Any] = field(default_factory=dict)


def run_search(
    data: SearchData,
    search_space: Mapping[str, Sequence[int | float]],
    conf: ModelConfig,
    run_dir: Path,
    *,
    search: Search = "grid",
    n_trials: int = 20,
    pruning: bool = False,
    storage: str | None = None,
    force: bool = False,
    retry_failed: bool = False,
    parameters: Mapping[str, Any] | None = None,
    logger: Record = "default",
    logger_options: Mapping[str, Any] | None = None,
    visualization: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Train and test every combination that is not done yet, then rank all of them.

    Any number of processes may do so at once, and share the trials out among them.

    Args:
        data: What the trials share.
        search_space: `patch_size, n_epochs, sample_size, learning_rate, batch_size` -> values.
        conf: Configuration of all trials, each of which sets its own hyperparameters.
        run_dir: The run's folder.
        search: grid: all combinations; random: some, drawn by the seed; tpe: some, each chosen
            where the trials so far promise most. The last two draw learning rates from the whole
            range that those of the space span.
        n_trials: How many, where it is not all.
        pruning: Stop trials that are hopeless, see `study.is_hopeless`.
        storage: A database that holds the queue, see `study.open_storage`.
        force: Forget earlier trials of this run.
        retry_failed: Train once more what failed earlier; a changed grid does so in any case.
        parameters: Recorded as `parameters.json` once the search is known to go ahead.
        logger: Where the records go beside their files, see `logger.make_model_logger`.
        logger_options: What it is told.
        visualization: Which tiles are drawn while training, see `ModelConfig.VisualizationConfig`.
        progress: Show bars.

    Returns:
        The leaderboard, see `read_leaderboard`.

    Raises:
        InputError: The run holds trials made from other input, every trial failed, or the space
            lacks a hyperparameter.
    """
    if lacking := [name for name in HYPERPARAMETERS if not len(search_space.get(name, ()))]:
        raise InputError(
            f"search_space needs a list of values of each of {list(HYPERPARAMETERS)}; it lacks "
            f"{lacking}"
        )
    check_logger(logger, logger_options or {})
    run_dir, conf = Path(run_dir), copy.copy(conf)
    for name in ("init_from", "weights"):  # workers may be started elsewhere
        value = getattr(conf, name)
        if value and Path(value).is_file():  # else a name of torchvision's
            setattr(conf, name, str(Path(value).absolute()))
    with fileio.exclusive(run_dir, wait=True):
        for folder in (run_dir / "search", run_dir / "trials", *run_dir.glob("trials/*/")):
            fileio.remove_strays(folder)
        name = _study_prefix(run_dir)
        at_work = bool(name) and not force
        at_work = at_work and study.is_at_work(study.open_storage(storage, run_dir), name)
        marks = _check_same_input(data, conf, run_dir, force=force, joining=at_work)
        fileio.write_json(run_dir / "classes.json", dict(data.ids))
        fileio.write_json(run_dir / "radiometry.json", asdict(data.radiometry))
        recorded = dict(parameters or {})
        if recorded.get("STORAGE"):
            recorded["STORAGE"] = study.public_url(recorded["STORAGE"])
        fileio.write_json(run_dir / "parameters.json", recorded)
        if name and force:
            study.drop_studies(study.open_storage(storage, run_dir), name)
            name = None
        plan = Plan(
            name=name or f"{run_dir.name}-{secrets.token_hex(4)}",
            made_from=fileio.fingerprint(marks),
            space={name: list(values) for name, values in search_space.items()},
            search=search, n_trials=n_trials, pruning=pruning, storage=study.public_url(storage),
            logger=logger, logger_options=dict(logger_options or {}),
            visualization=dict(visualization or {}),
        )  # fmt: skip
        _write_search(run_dir, plan, data, conf)
    conf.devices = _free_devices(conf)
    ranks.processes(conf.accelerator, conf.devices, conf.num_nodes)  # several machines join in
    queue = _open_queue(plan, conf.seed, run_dir, storage, retry_failed=retry_failed)
    _work(queue, plan, data, conf, run_dir, marks, wait=True, progress=progress)
    return _finish(queue, run_dir, conf)


def join_search(
    run_dir: Path,
    *,
    storage: str | None = None,
    retry_failed: bool = False,
    max_trials: int | None = None,
    wait: bool = False,
    accelerator: str | None = None,
    devices: int | str | None = None,
) -> tuple[int, int]:
    """Take part in a search that `run_search` began, perhaps on another machine.

    Args:
        run_dir: The run's folder.
        storage: The database that holds the queue, if its address needs more than the run records.
        retry_failed: Train once more what failed earlier.
        max_trials: How many trials to do at most.
        wait: Stay until the trials of the others are done, in case one of them dies; else until
            none waits and the others show that they live.
        accelerator: Where to train, other than the search says.
        devices: On how many devices, likewise.

    Returns:
        The number of trials done here, and how many of them failed.

    Raises:
        InputError: The folder holds no search, its rasters or tiles are others here, or there are
            no such devices.
    """
    run_dir = Path(run_dir)
    with fileio.exclusive(run_dir, wait=True):
        plan, data, conf = _read_search(run_dir)
        marks = _check_same_input(data, conf, run_dir, joining=True)
    conf.accelerator, conf.devices = accelerator or conf.accelerator, devices or conf.devices
    conf.devices = _free_devices(conf)
    _check_fitness(data, conf)
    queue = _open_queue(
        plan, conf.seed, run_dir, storage or plan.storage, retry_failed=retry_failed
    )
    done = _work(queue, plan, data, conf, run_dir, marks, wait=wait, max_trials=max_trials)
    if all(map(study.outcome_of, queue.latest().values())):
        _finish(queue, run_dir, conf)
    return done


# ---------------------------------------------------------------------------------------------
# The work
# ---------------------------------------------------------------------------------------------


def _work(
    queue: Queue,
    plan: Plan,
    data: SearchData,
    conf: ModelConfig,
    run_dir: Path,
    marks: Mapping[int, str],
    *,
    wait: bool,
    max_trials: int | None = None,
    progress: bool = False,
) -> tuple[int, int]:
    """Do trials until none is left; return how many were done here, and how many failed."""
    done, failed, waiting = 0, 0, False
    with ExitStack() as stack:
        for context in (fileio.terminable(), queue.watching(), _giving_back(queue)):
            stack.enter_context(context)
        stack.callback(ranks.dismiss)  # they hold memory that a prediction may want
        while max_trials is None or done < max_trials:
            try:
                claim = queue.take()
            except LostTrialError:  # at once: the search was started over, as the queue will say
                continue
            if claim is not None:
                outcome = _do_trial(claim, plan, data, conf, run_dir, marks, progress=progress)
                done, failed = done + (outcome != "lost"), failed + (outcome == "fail")
                continue
            others = queue.bury()
            queue.fill()  # perhaps one that died had not yet put it back
            if queue.trials(TrialState.WAITING):
                continue
            if not others:
                break
            if not wait and queue.is_heard(others):
                log.info("trials left to the workers that have them: %d", len(others))
                break
            if not waiting:
                why = "waiting for them" if wait else "seeing whether those live"
                log.info("trials that other workers have: %d; %s", len(others), why)
            waiting = True
            time.sleep(min(1.0, study.HEARTBEAT))
    return done, failed


def _do_trial(
    claim: Claim,
    plan: Plan,
    data: SearchData,
    conf: ModelConfig,
    run_dir: Path,
    marks: Mapping[int, str],
    *,
    progress: bool,
) -> str:
    """Bring a trial to its end, whichever that is; return it."""
    mark, best_by = marks[claim.hyperparams["patch_size"]], task_of(conf).model.BEST_BY
    try:
        try:
            result = _known_result(run_dir, claim.key, mark, plan)
            if result is None:
                result = _train_trial(claim, plan, data, conf, run_dir, mark, progress=progress)
        except (LostTrialError, fileio.FullDiskError):  # the latter is no failure of the trial
            raise
        except Exception as error:
            outcome = "fail"
            claim.end(TrialState.FAIL, "error", f"{type(error).__name__}: {error}")
        else:
            if pruned := result.get("pruned"):
                outcome = "pruned"
                claim.end(TrialState.PRUNED, "pruned", pruned, pruned[best_by])
            else:
                outcome, values = "complete", result["values"]
                claim.end(TrialState.COMPLETE, "values", values, values[best_by])
        _publish(run_dir, claim.key, claim.folder)
    except LostTrialError as lost:
        log.warning("%s; what was made of it here is dropped", lost)
        shutil.rmtree(_claim_dir(run_dir, claim.key, claim.folder), ignore_errors=True)
        return "lost"
    return outcome


@contextmanager
def _giving_back(queue: Queue) -> Iterator[None]:
    """Put the trial back into the queue if the work on it is broken off."""
    try:
        yield
    except BaseException:
        try:
            if queue.claim is not None:
                queue.claim.release()
        except Exception as error:  # others find it when this process is gone
            log.warning("the trial cannot be put back into the queue: %s", error)
        raise


def _known_result(run_dir: Path, key: str, mark: str, plan: Plan) -> dict[str, Any] | None:
    """Return what a trial of the same input ended with, perhaps in a search of another grid."""
    try:
        result = _read_json(run_dir / "trials" / key / "result.json")
    except (OSError, ValueError):  # there is none, or it is damaged
        return None
    if result.get("made_from") != mark or ("pruned" in result and not plan.pruning):
        return None
    log.info("%s is done already", key)
    return result


def _train_trial(
    claim: Claim,
    plan: Plan,
    data: SearchData,
    conf: ModelConfig,
    run_dir: Path,
    mark: str,
    *,
    progress: bool,
) -> dict[str, Any]:
    """Train in a folder of the claim's own, which holds the record of it from then on.

    Returns:
        What its `result.json` holds.
    """
    key, hyperparams = claim.key, claim.hyperparams
    ended = [study.outcome_of(trial) is not None for trial in claim.queue.latest().values()]
    log.info("trial %s; %d of %d are done", key, sum(ended), len(ended))
    trial_dir = _work_dir(run_dir, claim, mark)
    if (trial_dir / "result.json").exists():  # its worker died before it could say so
        return _read_json(trial_dir / "result.json")
    logger = make_model_logger(
        trial_dir, plan.logger, plan.logger_options, name=f"{run_dir.name}_{key}",
        hyperparams=hyperparams,
    )  # fmt: skip
    status, start = "failed", time.monotonic()
    record = {"hyperparams": hyperparams, "made_from": mark, "values": {},
              "started": datetime.now(UTC).isoformat(timespec="seconds"),
              "code_version": __version__, "worker": study.this_worker(),
              "processes": ranks.processes(conf.accelerator, conf.devices)}  # fmt: skip
    name = "result.json"
    try:
        judge = _Judge(claim, pruning=plan.pruning)
        watchers = [judge, *_gallery(plan, trial_dir)]
        with fileio.writing(trial_dir):
            record["values"] = train_iteration(
                hyperparams, data, conf, trial_dir, logger, watchers, progress=progress
            )
        status = "success"
    except optuna.TrialPruned:
        record["pruned"] = {"epoch": judge.epoch, task_of(conf).model.BEST_BY: judge.score}
        log.info("trial %s is stopped after epoch %d, hopeless", key, judge.epoch)
    except (LostTrialError, fileio.FullDiskError):
        name = ""
        raise
    except Exception as error:
        name, record["error"] = "failure.json", f"{type(error).__name__}: {error}"
        logger.log_message(traceback.format_exc())
        log.exception("trial %s failed; the search goes on", key)
        raise
    except BaseException:
        name = ""
        raise
    finally:
        if name:
            record["seconds"] = round(time.monotonic() - start, 1)
            fileio.write_json(trial_dir / name, record)
            (trial_dir / LAST_CHECKPOINT).unlink(missing_ok=True)
        logger.close(status)
    return record


def _gallery(plan: Plan, trial_dir: Path) -> list[pl.Callback]:
    """Return what draws tiles while training, if it is to."""
    conf = VisualizationConfig.of(plan.visualization)
    return [TileGallery(conf, trial_dir / "visualization")] if conf.batch_range else []


class _Judge(pl.Callback):
    """Tells the queue how a training does, and ends one that is hopeless or lost."""

    def __init__(self, claim: Claim, *, pruning: bool) -> None:
        """Judge the trial of a claim; stop it as hopeless only if there is pruning."""
        self.claim, self.pruning = claim, pruning
        self.epoch, self.score = 0, 0.0  # the last measurement

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the epoch's score."""
        if trainer.state.fn != "fit" or not pl_module._measures("validation"):
            return
        self.epoch = trainer.current_epoch + 1
        self.score = float(trainer.callback_metrics[pl_module.BEST_BY])
        try:
            self.claim.report(self.epoch, self.score)
            hopeless = self.pruning and self.claim.is_hopeless()
        except (LostTrialError, fileio.FullDiskError):
            raise
        except Exception as error:  # no fault of the training; the next epoch may reach it
            log.warning("the queue of the search cannot be reached: %s", error)
            return
        if hopeless:
            raise optuna.TrialPruned

    def _check(self, *_: object, **__: object) -> None:
        self.claim.check()

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = _check


def _claim_dir(run_dir: Path, key: str, folder: str) -> Path:
    return run_dir / "trials" / f".{key}~{folder}"


def _work_dir(run_dir: Path, claim: Claim, mark: str) -> Path:
    """Make the folder of a claim, from that of an earlier attempt if it got somewhere.

    The folder takes another name, so that a worker which lost the trial without knowing finds it no
    more.
    """
    mine = _claim_dir(run_dir, claim.key, claim.folder)
    for folder, scores in claim.earlier.items():
        theirs = _claim_dir(run_dir, claim.key, folder)
        with suppress(OSError, ValueError):
            got_far = any((theirs / n).exists() for n in ("result.json", LAST_CHECKPOINT))
            if got_far and _read_json(theirs / "claim.json")["made_from"] == mark:
                theirs.rename(mine)
                claim.take_over(scores)
                log.info("trial %s goes on where it was stopped", claim.key)
                break
    else:
        fileio.recreate_directory(mine)
    fileio.write_json(mine / "claim.json", {"made_from": mark})
    return mine


def _publish(run_dir: Path, key: str, folder: str) -> None:
    """Give the folder of a trial that has ended its place; what was there before goes."""
    mine, final = _claim_dir(run_dir, key, folder), run_dir / "trials" / key
    trash = run_dir / f"{TRASH}{secrets.token_hex(4)}"
    with fileio.exclusive(run_dir, wait=True):
        if (mine / "claim.json").exists():
            if final.exists():
                final.rename(trash)
            mine.rename(final)
    for gone in (trash, mine):  # without its claim, it is what a late writer left of a lost one
        shutil.rmtree(gone, ignore_errors=True)


def _settle(queue: Queue, run_dir: Path) -> None:
    """Bring the folders of trials that have ended to their place, if nobody did; drop all others.

    What may go on stays.
    """
    latest = queue.latest()
    for trial in queue.trials():
        key, folder = trial.user_attrs.get("key"), trial.system_attrs.get("folder")
        if key is None or folder is None or not _claim_dir(run_dir, key, folder).exists():
            continue
        last = latest.get(trial.system_attrs["slot"], trial)
        outcome = study.outcome_of(last)
        if outcome and last.number == trial.number:
            if outcome == "fail" and "error" not in trial.user_attrs:  # its workers died
                record = {"hyperparams": trial.user_attrs["hyperparams"],
                          "error": study.error_of(trial)}  # fmt: skip
                fileio.write_json(_claim_dir(run_dir, key, folder) / "failure.json", record)
            _publish(run_dir, key, folder)
        elif outcome:
            shutil.rmtree(_claim_dir(run_dir, key, folder), ignore_errors=True)


# ---------------------------------------------------------------------------------------------
# The results
# ---------------------------------------------------------------------------------------------


def read_leaderboard(
    queue: Queue, run_dir: Path, model: type[TileModel] = LargeRasterORModel
) -> pd.DataFrame:
    """Tabulate the trials that have ended, best on the test first, stopped and failed ones last.

    Args:
        queue: Of the search.
        run_dir: The run's folder.
        model: Says by which value trials are ranked, and one is selected.

    Returns:
        `trial, state` (complete, pruned, fail), the hyperparameters, the test's and validation's
        values, `training_time` (s), `selected` (highest `BEST_BY`), `checkpoint, error`; if
        trials were stopped, `pruned_epoch` and `pruned_val_...`, measured then.
    """
    rows = []
    for slot, trial in queue.latest().items():
        state = study.outcome_of(trial)
        if state is None:
            continue
        values = trial.user_attrs.get("values", {}) if state == "complete" else {}
        pruned = trial.user_attrs.get("pruned", {})
        checkpoint = ""
        if values:
            place = run_dir / "trials" / trial.user_attrs["key"]
            checkpoint = str(place / "checkpoints" / "best.ckpt")
        # its workers may have died before they knew
        hyperparams = trial.user_attrs.get("hyperparams") or queue.planned[slot] or {}
        rows.append(
            {"trial": trial.number, "state": state, **hyperparams, **values,
             **{f"pruned_{name}": value for name, value in pruned.items()},
             "selected": False, "checkpoint": checkpoint, "error": study.error_of(trial)}
        )  # fmt: skip
    always = ["trial", "state", *HYPERPARAMETERS, "selected", "checkpoint", "error"]
    board = pd.DataFrame(rows, columns=None if rows else always)
    # by what they are, for numbers depend on who trained what when, and on what was interrupted
    known = [name for name in HYPERPARAMETERS if name in board]  # none, if no worker came to begin
    board = board.sort_values([*known, "trial"], ignore_index=True)
    if model.RANK_BY in board:
        # before the test has a say: of equals, the first
        board.loc[board[model.BEST_BY].idxmax(), "selected"] = True
        board = board.sort_values(
            model.RANK_BY, ascending=False, ignore_index=True, na_position="last", kind="stable"
        )
    return board


def trial_dir_of(row: pd.Series) -> Path:
    """Return the folder of a trial, given its row of the leaderboard."""
    return Path(row["checkpoint"]).parent.parent


def test_values(trial_dir: Path) -> dict[str, float]:
    """Return what a trial measured on the test ground, see `metrics.evaluate`."""
    values = _read_json(trial_dir / "result.json")["values"]
    return {name: v for name, v in values.items() if not name.startswith(("val_", "test_"))}


def read_evaluation(run_dir: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read what the best model found on the test ground, at any score, and what was to be found.

    Returns:
        `detections.csv` and `objects.csv`, see `trials.write_detections`; labels and rasters as
        they are written, so that the label 01 is not 1.
    """
    found, objects = (
        fileio.read_table(Path(run_dir) / name, ["raster", "label"], rows=False)
        for name in ("detections.csv", "objects.csv")
    )
    return found, objects


def fullest_test_block(
    images: Sequence[ImageData], blocks: pd.DataFrame, run_dir: Path
) -> tuple[ImageData, pd.Series]:
    """Find the block of test ground with most objects, and its raster.

    Of a segmentation, whose best model's `pixels.csv` is in `run_dir`, it is the block with most
    pixels of classes other than the background.
    """
    pixels = Path(run_dir) / "pixels.csv"
    if pixels.exists():
        table = fileio.read_table(pixels, ["raster", "label"])
        counts = table["truth"].where(table["label"] != masks.BACKGROUND, 0)
        fullest = counts.groupby(table["block"]).sum().idxmax()
        block = blocks[blocks["block"] == fullest].iloc[0]
        return next(i for i in images if i.image_identifier == block["raster"]), block
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


def middle_of(block: pd.Series, side: int = 1024) -> Window:
    """Return the middle of a block of ground, at most `side` px wide and high."""
    width, height = (int(min(side, block[name])) for name in ("width", "height"))
    x = int(block["x"] + (block["width"] - width) // 2)
    y = int(block["y"] + (block["height"] - height) // 2)
    return Window(x, y, width, height)


def _finish(queue: Queue, run_dir: Path, conf: ModelConfig) -> pd.DataFrame:
    """Rank the trials, and give the best one's files their place in the run's folder."""
    task = task_of(conf)
    _settle(queue, run_dir)
    with fileio.exclusive(run_dir, wait=True):
        board = read_leaderboard(queue, run_dir, task.model)
        fileio.write_table(run_dir / "leaderboard.csv", board)
        if not board["selected"].any():
            raise InputError(
                f"all {len(board)} trials failed; the first said: {board['error'].iloc[0]}\n"
                "Mend the cause and run again with RETRY_FAILED = True"
            )
        best = board[board["selected"]].iloc[0]
        checkpoint, trial_dir = Path(best["checkpoint"]), trial_dir_of(best)
        for source in (checkpoint, *(trial_dir / name for name in task.files)):
            with fileio.atomic_path(run_dir / source.name) as temporary:
                shutil.copyfile(source, temporary)
        summary = {
            "best_trial": trial_dir.name,
            "ranked_by": task.model.BEST_BY,
            **_read_json(trial_dir / "result.json"),
            "trials": board["state"].value_counts().to_dict(),
        }
        fileio.write_json(run_dir / "metrics.json", summary)
    return board


# ---------------------------------------------------------------------------------------------
# What all who take part must agree on
# ---------------------------------------------------------------------------------------------


def _check_same_input(
    data: SearchData,
    conf: ModelConfig,
    run_dir: Path,
    *,
    force: bool = False,
    joining: bool = False,
) -> dict[int, str]:
    """Refuse to mix trials of one run that could not be ranked together.

    Args:
        data: What the trials share.
        conf: Their configuration.
        run_dir: The run's folder.
        force: Forget all trials.
        joining: Others may be at work, so that nothing may differ even without any result.

    Returns:
        Tile size -> fingerprint of all that a trial of this size is made from.
    """
    trials, record = run_dir / "trials", run_dir / "trials" / "made_from.json"
    if force and trials.exists():  # goes as a whole, whenever the deletion is stopped
        trials.rename(run_dir / f"{TRASH}{secrets.token_hex(4)}")
    for trash in run_dir.glob(f"{TRASH}*"):
        shutil.rmtree(trash, ignore_errors=True)  # another process may be at it, too
    configuration = conf.to_dict()
    configuration["validation"].pop("pr_compute_interval")
    # what a trial sets itself, and what only says where it runs, may differ
    for name in ("batch_size", *PLACE):
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
    if data.labels:
        common["labels"] = fileio.fingerprint(data.label_marks)
    tiles = {str(size): mark for size, mark in data.tile_marks.items()}
    now = json.loads(json.dumps(common | {"tiles": tiles}))
    ranked = record.exists() and (joining or any(trials.glob("*/result.json")))
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


def _free_devices(conf: ModelConfig) -> int | str | list[int]:
    return ranks.free_devices(conf.accelerator, conf.devices, conf.max_used_ram, conf.max_used_perc)


def _check_fitness(data: SearchData, conf: ModelConfig) -> None:
    """Refuse to take trials where all would fail: no such device, no such tiles."""
    try:
        ranks.processes(conf.accelerator, conf.devices, conf.num_nodes)
        pl.Trainer(  # one device is not looked for before
            accelerator=conf.accelerator, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
            **ranks.lightning_devices(conf.devices),
        )  # fmt: skip
    except InputError:
        raise
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"ACCELERATOR = {conf.accelerator!r} with DEVICES = {conf.devices!r} cannot be had "
            f"here ({error}); give --accelerator and --devices that can"
        ) from error
    for size, folder in data.tilings.items():
        try:
            found = fileio.fingerprint(tiling.read_tiles(folder))
        except (OSError, ValueError) as error:
            raise InputError(
                f"the tiles of {size} px in {folder} cannot be read ({error}); a worker must find "
                "the same files under the same paths"
            ) from error
        if found != data.tile_marks[size]:
            raise InputError(
                f"the tiles of {size} px in {folder} are not those that the search was made for "
                f"(fingerprint {found}, expected {data.tile_marks[size]}); run its notebook again"
            )


def _open_queue(
    plan: Plan, seed: int, run_dir: Path, storage: str | None, *, retry_failed: bool
) -> Queue:
    """Open the queue, with all that is to be done in it, and nothing that is done."""
    # A study cannot change what its hyperparameters are drawn from; another space is another study,
    # and finds the trials that both share by their results. So is other input, and shares none.
    drawn = [plan.search, plan.space, plan.made_from]
    queue = Queue(
        study.open_storage(storage, run_dir), f"{plan.name}-{fileio.fingerprint(drawn)}",
        plan.space, plan.search, plan.n_trials, seed,
    )  # fmt: skip
    _settle(queue, run_dir)

    def again(trial: FrozenTrial) -> bool:
        outcome = study.outcome_of(trial)
        if outcome == "fail":
            return retry_failed
        if outcome == "pruned" and not plan.pruning:
            return True
        key, folder = trial.user_attrs["key"], trial.system_attrs.get("folder", "")
        # in this order: meanwhile its worker may be giving the one the other's name
        there = _claim_dir(run_dir, key, folder).exists()
        there = there or (run_dir / "trials" / key / "result.json").exists()
        if not there:
            log.warning("trial %d has no result; it starts over", trial.number)
        return not there

    queue.bury()
    queue.fill(again)
    latest = queue.latest().values()
    to_do = sum(study.outcome_of(trial) is None for trial in latest)
    log.info("search: %d trials to do of %d", to_do, len(latest))
    return queue


def _write_search(run_dir: Path, plan: Plan, data: SearchData, conf: ModelConfig) -> None:
    """Write what a worker needs, so that it can do without the notebook.

    `search/blocks.parquet`: the ground blocks. `search/search.json`: `plan, conf`, and of `data`
    the paths of rasters and tile indexes, with fingerprints of what they held.
    """
    if data.labels:
        masks.save_labels(run_dir / "search", data.labels)
    rasters = {}
    for name, raster in data.rasters.items():
        local, original = raster.path.is_file(), raster.original or raster
        regions = raster.regions and {
            "aoi": raster.regions.aoi and [g.wkb_hex for g in raster.regions.aoi],
            "ignored": [g.wkb_hex for g in raster.regions.ignored],
        }
        rasters[name] = {
            "path": str(raster.path.absolute()) if local else original.source,
            "resolution": raster.target_resolution,
            "bands": raster.own.bands, "regions": regions,
            "auxiliary": _auxiliary_record(raster),
            "content": fileio.raster_fingerprint(raster),
        }  # fmt: skip
    shared = {
        "tilings": {size: str(Path(folder).absolute()) for size, folder in data.tilings.items()},
        "tile_marks": dict(data.tile_marks),
        "rasters": rasters,
        "ids": dict(data.ids),
        "radiometry": asdict(data.radiometry),
        "evaluation_overlap": data.evaluation_overlap,
        "labels": data.labels and fileio.fingerprint(data.label_marks),
        "cache": data.cache and str(data.cache),
        "patches": {size: str(folder) for size, folder in (data.patches or {}).items()},
    }
    fileio.write_table(run_dir / "search" / "blocks.parquet", data.blocks)
    fileio.write_json(
        run_dir / "search" / "search.json",
        {"plan": asdict(plan), "conf": conf.to_dict(), "data": shared},
    )


def _auxiliary_record(raster: fileio.Raster) -> dict[str, Any] | None:
    """Return which auxiliary bands a raster has, with where their vector file is for a worker."""
    options = masks.auxiliary_of(raster)
    if options is None:
        return None
    file = options.aux_vector_file
    if file and not fileio.address_of(file):
        file = str(Path(file).absolute())
    return asdict(options) | {"aux_vector_file": file}


def _load_search(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "search" / "search.json"
    try:
        return _read_json(path)
    except OSError:
        raise InputError(
            f"{run_dir} holds no search ({path} is missing); run its notebook first, up to section "
            "7, which prepares it and may then be stopped"
        ) from None
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); run the notebook again") from None


def _study_prefix(run_dir: Path) -> str | None:
    with suppress(InputError, KeyError):
        return _load_search(run_dir)["plan"]["name"]
    return None


def _read_search(run_dir: Path) -> tuple[Plan, SearchData, ModelConfig]:
    """Read what `_write_search` wrote, and refuse rasters that hold something else here."""
    known = _load_search(run_dir)
    shared, rasters = known["data"], {}
    for name, place in known["data"]["rasters"].items():
        raster = fileio.read_raster(place["path"], place["bands"])
        raster = fileio.resampled(raster, place.get("resolution"))
        content = fileio.raster_fingerprint(raster)
        if content != place["content"]:
            raise InputError(
                f"{place['path']} is not the raster that the search in {run_dir} was made for "
                f"(fingerprint {content}, expected {place['content']}); a worker must find the "
                "same files under the same paths"
            )
        if auxiliary := place.get("auxiliary"):
            raster = masks.with_auxiliary_bands(raster, AuxiliaryOptions(**auxiliary))
        if regions := place["regions"]:
            aoi = regions["aoi"] and tuple(shapely.from_wkb(regions["aoi"]))
            raster = raster.with_regions(
                fileio.Regions(aoi, tuple(shapely.from_wkb(regions["ignored"])))
            )
        rasters[name] = raster
    labels = None
    if shared.get("labels"):
        labels = masks.load_labels(run_dir / "search", rasters)
    data = SearchData(
        tilings={int(size): Path(folder) for size, folder in shared["tilings"].items()},
        rasters=rasters,
        ids=shared["ids"],
        radiometry=TypeAdapter(imutils.Radiometry).validate_python(shared["radiometry"]),
        blocks=pd.read_parquet(run_dir / "search" / "blocks.parquet"),
        evaluation_overlap=shared["evaluation_overlap"],
        tile_marks={int(size): mark for size, mark in shared["tile_marks"].items()},
        labels=labels,
        cache=Path(shared["cache"]) if shared.get("cache") else None,
        patches={int(size): Path(folder) for size, folder in shared.get("patches", {}).items()},
    )
    if labels and fileio.fingerprint(data.label_marks) != shared["labels"]:
        raise InputError(
            f"the labels of the search in {run_dir} are others here; a worker must find the same "
            "files under the same paths"
        )
    return Plan(**known["plan"]), data, ModelConfig.from_dict(known["conf"])


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Work on a search, or list all, as a command; see its `--help` for the exit codes."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["ledger"]:
        return ledger.main(argv[1:])
    args = vars(_parser().parse_args(argv))
    run_dir = args.pop("run")
    worker = study.this_worker()
    try:
        if not run_dir.is_dir():
            raise InputError(
                f"there is no run {run_dir}; see RUNS_DIR and RUN_NAME of the notebook"
            )
        with ranks.lead_or_follow() as leads:
            if not leads:
                return 0
            configure_logger(run_dir / "workers" / f"{worker['host']}-{worker['pid']}.log")
            _, failed = join_search(run_dir, **args)
    except (InputError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return FAILED
    except (KeyboardInterrupt, SystemExit):  # Lightning makes one of the other
        sys.stderr.write("interrupted; the trial is in the queue again\n")
        return INTERRUPTED
    return INCOMPLETE if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gridsearch.py", allow_abbrev=False,
        description="Work on the search of a run: train trials that wait, until none is left. Any "
        "number of workers may do so, on all machines that have the run's folder and its rasters "
        "under the same paths.",
        epilog=f"Exit code: 0 nothing is left; {FAILED} the search cannot be worked on, the "
        f"message says why; 2 the command is not understood; {INCOMPLETE} trials failed here; "
        f"{INTERRUPTED} interrupted. `gridsearch.py ledger RUNS_DIR` lists all runs and trials.",
    )  # fmt: skip
    # fmt: off
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="DIR", help="the run's folder")
    add("--storage", metavar="URL",
        help="the database that holds the queue, where its address needs more than the run records")
    add("--max-trials", type=int, metavar="N", help="do so many at most")
    add("--retry-failed", action="store_true", help="train once more what failed earlier")
    add("--wait", action="store_true",
        help="stay until the trials of the other workers are done, in case one of them dies")
    add("--accelerator", help="auto, cpu, gpu, mps (default: as the run says)")
    add("--devices", help="how many, or which (default: as the run says)")
    # fmt: on
    return parser


if __name__ == "__main__":
    sys.exit(main())
