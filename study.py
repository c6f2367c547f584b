"""The queue of a search: trials that any number of processes, on any number of machines, share.

The queue is an Optuna study in a journal file or a database. A trial of it waits, runs and ends,
and never goes back; the storage lets one process alone take each of these steps. A trial that is
cut short fails, and another one takes its *slot*, with the same hyperparameters, as the next
*attempt*. Whoever finds a slot without a trial may add one: of several that stand for the same
attempt the first counts, and the others are dropped when they are taken. So nothing is lost when a
process dies between two steps, and nothing is done twice.

A worker shows that it lives by a number that grows in its trial. Whoever sees the number stand
still for `GRACE` s takes the trial away; clocks of machines are never compared. A worker that slept
so long finds out at the latest when it ends its trial, which the storage then refuses.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import numpy as np
import optuna
import pandas as pd
import psutil
from filelock import FileLock
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
)
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

import fileio
from ImageData import InputError
from LargeRasterOR import LargeRasterORModel
from LargeRasterSeg import LargeRasterSegModel
from logger import get_logging_key
from ModelConfig import HYPERPARAMETERS, Search, check_storage, count_trials

log = logging.getLogger(__name__)

HEARTBEAT = 20.0  # s between two signs of life
GRACE = 120.0  # s without one after which a trial is taken from its worker
LEAVE = 5.0  # s in which the thread that watches should end, unless the storage does not answer
PAUSES = (1.0, 5.0, 25.0)  # s between attempts to tell how a trial ended
MAX_RESTARTS = 3  # of a trial whose workers died; one that kills them all is not worth more
PEERS = 4  # trials that must have come as far before one is called hopeless
WARM_UP = 1 / 3  # of a training, in which none is
LEAST_TRIALS = 6  # below which nothing can be said of what decides
MANY_VALUES = 8  # of a learning rate, from which on they are taken for a range
SAME_START = 60  # s by which the start of one process may seem to differ

Hyperparams = dict[str, int | float]


class StartedOverError(InputError):
    """The study is gone, and with it all its trials."""


class LostTrialError(Exception):
    """Another worker has this one's trial; nothing that is made of it here counts any more."""


# ---------------------------------------------------------------------------------------------
# What there is to try
# ---------------------------------------------------------------------------------------------


def span(space: Mapping[str, Sequence[int | float]], search: Search) -> dict[str, BaseDistribution]:
    """Return what each hyperparameter is drawn from: its values, or a range of learning rates."""
    drawn: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(tuple(values)) for name, values in space.items()
    }
    rates = space.get("learning_rate", ())
    if search != "grid" and len(rates) > 1:
        drawn["learning_rate"] = FloatDistribution(min(rates), max(rates), log=True)
    return drawn


def draw_combinations(
    drawn: Mapping[str, BaseDistribution], rng: np.random.Generator
) -> Iterator[Hyperparams]:
    """Yield combinations in random order, each once; without end where there is a range."""
    lists = {
        name: values.choices
        for name, values in drawn.items()
        if isinstance(values, CategoricalDistribution)
    }
    combinations = list(itertools.product(*lists.values()))
    ranges = {name: values for name, values in drawn.items() if name not in lists}
    seen = set()
    while True:
        for index in rng.permutation(len(combinations)):
            found = dict(zip(lists, combinations[index], strict=True))
            for name, values in ranges.items():
                exponent = rng.uniform(math.log(values.low), math.log(values.high))
                found[name] = _rounded(math.exp(exponent), values)
            if (key := get_logging_key(found)) not in seen:
                seen.add(key)
                yield {name: found[name] for name in drawn}
        if not ranges:
            return


def _rounded(value: float, values: BaseDistribution) -> float:
    """Round a value of a range to three digits, which make a name of a trial that can be read."""
    if not isinstance(values, FloatDistribution):
        return value
    return min(max(float(f"{value:.3g}"), values.low), values.high)


def is_hopeless(
    values: Mapping[int, float], others: Sequence[Mapping[int, float]], epochs: int
) -> bool:
    """Tell whether a training is not worth its remaining epochs.

    It is, if the best score that it has reached lies below the median of what the others had
    reached by the same epoch. Only trainings of as many epochs are asked, as the learning rate
    follows the length of the training: in the same epoch, a long one has it still high where a
    short one is almost done. The first third of a training, and its last epoch, are never judged.
    Tile and batch sizes do not matter, as an epoch is the same ground for all; a training on a
    smaller sample sees less in an epoch, and is judged by what it makes of it.

    Args:
        values: Epoch, counted from 1 -> its score, of the training in question.
        others: The same of other trainings of as many epochs, ended or stopped.
        epochs: Their number.

    References:
        Golovin et al. 2017, Google Vizier, 3.2.2, the median stopping rule; there of running means.
    """
    epoch = max(values)
    reached = [
        max(score for at, score in other.items() if at <= epoch)
        for other in others
        if other and min(other) <= epoch <= max(other)
    ]
    if len(reached) < PEERS or not WARM_UP * epochs < epoch < epochs:
        return False
    return max(values.values()) < float(np.median(reached))


# ---------------------------------------------------------------------------------------------
# Where the queue is
# ---------------------------------------------------------------------------------------------


def open_storage(url: str | None, run_dir: Path) -> BaseStorage:
    """Open what holds the queues of a run.

    Args:
        url: A PostgreSQL database, `postgresql://user@host/name`; None: a file in the run's folder.
        run_dir: The run's folder.

    Raises:
        InputError: There is no such database, or what is needed to talk to it.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # we log what happens to a trial
    if url is None:
        journal = run_dir / "study.journal"
        # Optuna's own locks outlive their process, and stop all others for 30 s
        return JournalStorage(_Journal(str(journal), FileLock(f"{journal}.lock")))
    check_storage(url)
    try:
        import psycopg  # noqa: F401
    except ImportError:
        raise InputError(
            "psycopg is not installed, which STORAGE needs: pip install 'psycopg[binary]', or set "
            "STORAGE = None"
        ) from None
    driver = "postgresql+psycopg" + url[url.index("://") :]
    for attempt in range(3):  # two processes may be making the tables of a new database
        try:
            return RDBStorage(driver, engine_kwargs={"pool_pre_ping": True})
        except Exception as error:
            reason = str(error).partition("\n")[0]
        time.sleep(attempt)
    raise InputError(
        f"the STORAGE {public_url(url)} cannot be opened ({reason}); check that the server runs, "
        "the database exists and the password is right (PGPASSWORD or ~/.pgpass)"
    )


class _Journal(JournalFileBackend):
    """A file whose lines are appended whole or not at all, so that it stays readable."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with self._lock:
            lines = "\n".join(json.dumps(entry, separators=(",", ":")) for entry in logs)
            fileio.append_line(Path(self._file_path), lines)


def public_url(url: str | None) -> str | None:
    """Return the address of a database without its password, for records and messages."""
    if url is None:
        return None
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    user = user.partition(":")[0]
    query = [(k, v) for k, v in parse_qsl(parts.query) if "pass" not in k.lower()]
    place = f"{user}@{host}" if user else host
    return urlunsplit(parts._replace(netloc=place, query=urlencode(query)))


# ---------------------------------------------------------------------------------------------
# Who works
# ---------------------------------------------------------------------------------------------


def this_worker() -> dict[str, Any]:
    """Describe this process so that others can tell whether it is still there."""
    started = psutil.Process().create_time()
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": started,
            "machine": fileio.this_machine()}  # fmt: skip


def is_dead(worker: Mapping[str, Any] | None) -> bool:
    """Tell whether a worker is known to be gone; nobody knows that of another machine's."""
    if worker is None or worker["machine"] != fileio.this_machine():
        return False
    try:
        process = psutil.Process(worker["pid"])
        another = abs(process.create_time() - worker["started"]) > SAME_START
        return another or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


# ---------------------------------------------------------------------------------------------
# The queue
# ---------------------------------------------------------------------------------------------


def outcome_of(trial: FrozenTrial) -> str | None:
    """Return how a trial ended: complete, pruned or fail; None while its slot is to be done."""
    if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
        return trial.state.name.lower()
    return "fail" if trial.state == TrialState.FAIL and error_of(trial) else None


def error_of(trial: FrozenTrial) -> str:
    """Return why a trial failed; nothing if it did not, or was only cut short."""
    if "error" in trial.user_attrs:
        return trial.user_attrs["error"]
    given_back = trial.system_attrs.keys() & {"released", "repeats"}
    restarts = trial.system_attrs["restarts"]
    if trial.state != TrialState.FAIL or given_back or restarts < MAX_RESTARTS:
        return ""
    worker = trial.system_attrs.get("worker", {"pid": "?", "host": "?"})
    return (
        f"its workers died {restarts + 1} times, the last one was process {worker['pid']} on "
        f"{worker['host']}; look for what kills them, such as too little memory"
    )


class Claim:
    """A trial that this process has taken.

    Attributes:
        hyperparams: What it is to try.
        key: Their name.
        folder: A name for where this attempt works, apart from all others.
        earlier: Those of the slot's earlier attempts, the last first, and of what other searches of
            the run left of the same trial -> epoch -> its score.
        lost: Whether another worker has the trial by now, as far as is known.
    """

    def __init__(self, queue: Queue, trial: FrozenTrial) -> None:
        """Record who works on a trial that runs from now on."""
        self.queue, self._id, self.number = queue, trial._trial_id, trial.number
        self.slot, self.attempt = (trial.system_attrs[name] for name in ("slot", "attempt"))
        self.hyperparams: Hyperparams = {}
        self.key, self.folder = "", secrets.token_hex(4)
        self.earlier: dict[str, Mapping[int, float]] = {}
        self._epoch = 0  # the last one reported
        self.lost, self._beats = threading.Event(), 0
        self._note("worker", this_worker())
        self._note("folder", self.folder)

    def check(self) -> None:
        """Raise `LostTrialError` if another worker is known to have the trial."""
        if self.lost.is_set():
            raise LostTrialError(f"trial {self.number} went to another worker")

    def beat(self) -> None:
        """Show that the worker lives."""
        self._beats += 1
        self._note("beat", self._beats)

    def report(self, epoch: int, score: float) -> None:
        """Record the score of an epoch, counted from 1."""
        with self._owning():
            self.queue.storage.set_trial_intermediate_value(self._id, epoch, score)
        self._epoch = epoch

    def take_over(self, scores: Mapping[int, float]) -> None:
        """Record what an earlier attempt reported, where this one goes on with its training."""
        try:
            for epoch, score in scores.items():
                self.report(epoch, score)
        except (LostTrialError, fileio.FullDiskError):
            raise
        except Exception as error:  # the trial is judged by less
            log.warning("the queue of the search cannot be reached: %s", error)

    def is_hopeless(self) -> bool:
        """Compare what was reported with other trials, see `is_hopeless`."""
        with self._owning():
            trials, epochs = self.queue.trials(), self.hyperparams["n_epochs"]
        others = [
            trial.intermediate_values
            for trial in trials
            if trial.number != self.number
            and outcome_of(trial) in ("complete", "pruned")
            and trial.user_attrs["hyperparams"]["n_epochs"] == epochs
        ]
        mine = next(t for t in trials if t.number == self.number).intermediate_values
        # of an attempt that was taken over, but started over, there may be more
        mine = {epoch: score for epoch, score in mine.items() if epoch <= self._epoch}
        return is_hopeless(mine, others, epochs)

    def end(self, state: TrialState, outcome: str, content: object, score: float = 0.0) -> None:
        """End the trial; from then on nobody takes it away.

        Raises:
            LostTrialError: Somebody has.
        """
        storage, values = self.queue.storage, None if state == TrialState.FAIL else [score]
        for tried, pause in enumerate((*PAUSES, None)):
            try:
                with self._owning():
                    storage.set_trial_user_attr(self._id, outcome, content)
                    storage.set_trial_state_values(self._id, state, values)
                break
            except LostTrialError:
                # a try whose answer got lost may have ended it
                if not (tried and self._has_ended(state, outcome)):
                    raise
                break
            except Exception as error:
                if pause is None:
                    raise
                log.warning("the queue cannot be told how trial %d ended: %s", self.number, error)
                time.sleep(pause)
        self.queue.claim = None

    def _has_ended(self, state: TrialState, outcome: str) -> bool:
        with suppress(KeyError):
            trial = self.queue.storage.get_trial(self._id)
            return trial.state == state and outcome in trial.user_attrs
        return False

    def release(self, why: str = "released") -> None:
        """Give the trial back to the queue."""
        try:
            self._note(why, True)
            self.queue.storage.set_trial_state_values(self._id, TrialState.FAIL)
        except LostTrialError:
            pass
        self.queue.claim = None
        self.queue.fill()

    def suggest(self) -> None:
        """Find the hyperparameters: those of the slot, or what the sampler thinks best."""
        with self._owning():
            trial = optuna.Trial(self.queue.study, self._id)
            for name, values in self.queue.span.items():
                if isinstance(values, FloatDistribution):
                    value = trial.suggest_float(name, values.low, values.high, log=True)
                else:
                    value = trial.suggest_categorical(name, values.choices)
                self.hyperparams[name] = _rounded(value, values)
            self.key = get_logging_key(self.hyperparams)
            self.queue.storage.set_trial_user_attr(self._id, "hyperparams", self.hyperparams)
            self.queue.storage.set_trial_user_attr(self._id, "key", self.key)

    def _note(self, name: str, value: object) -> None:
        with self._owning():
            self.queue.storage.set_trial_system_attr(self._id, name, value)

    @contextmanager
    def _owning(self) -> Iterator[None]:
        try:
            yield
        except (UpdateFinishedTrialError, KeyError, StartedOverError):  # KeyError: so it is
            self.lost.set()
            self.check()


class Queue:
    """The trials of one search, in the order in which they are taken.

    Attributes:
        study: The study that holds them.
        span: What each hyperparameter is drawn from.
        claim: The trial that this process works on.
        planned: Slot -> what is to be tried there; None: chosen when it is taken.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        space: Mapping[str, Sequence[int | float]],
        search: Search,
        n_trials: int,
        seed: int,
    ) -> None:
        """Open a search's queue, or make it; see `fill`.

        Args:
            storage: See `open_storage`.
            name: Of the study; a study cannot change what its hyperparameters are drawn from.
            space: Hyperparameter -> values.
            search: How combinations are chosen; tpe chooses when a trial is taken.
            n_trials: How many, where it is not all.
            seed: Of the order, or the choice.
        """
        self.study = optuna.create_study(
            storage=storage, study_name=name, direction="maximize", load_if_exists=True,
            sampler=optuna.samplers.RandomSampler(seed),
        )  # fmt: skip
        self.storage, self.seed, self.search = self.study._storage, seed, search
        self.span = span(space, search)
        self.claim: Claim | None = None
        number = count_trials(space, search, n_trials)
        self.planned: dict[str, Hyperparams | None] = {}
        if search == "tpe":
            self.planned = {f"{i:06d}": None for i in range(number)}
        else:
            chosen = draw_combinations(self.span, np.random.default_rng(seed))
            for hyperparams in itertools.islice(chosen, number):
                self.planned[get_logging_key(hyperparams)] = hyperparams
        self._beats: dict[int, tuple[object, int]] = {}  # trial -> last beat, times it stood still
        self._heard: set[int] = set()  # trials whose beat has moved since this process looks

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Return the trials of all attempts, in some states or all.

        Raises:
            StartedOverError: It was.
        """
        with self._there():
            return self.study.get_trials(deepcopy=False, states=states or None)

    @contextmanager
    def _there(self) -> Iterator[None]:
        try:
            yield
        except KeyError:
            raise StartedOverError(
                "the search was started over by another process (FORCE_CREATION); start this one "
                "again to take part"
            ) from None

    def latest(self) -> dict[str, FrozenTrial]:
        """Return the trial that stands for each slot: of the last attempt the first."""
        latest: dict[str, FrozenTrial] = {}
        for trial in self.trials():
            slot, attempt = (trial.system_attrs[name] for name in ("slot", "attempt"))
            if slot not in latest or attempt > latest[slot].system_attrs["attempt"]:
                latest[slot] = trial
        return {slot: latest[slot] for slot in self.planned if slot in latest}

    def fill(self, again: Callable[[FrozenTrial], bool] = lambda _: False) -> None:
        """Add a trial to each slot that has none, or whose last one was cut short.

        Args:
            again: Tells which trials that came to an end are to be repeated.
        """
        latest = self.latest()
        for slot, hyperparams in self.planned.items():
            trial = latest.get(slot)
            if trial is None:
                self._add(slot, 0, 0, hyperparams)
                continue
            attempt, restarts = (trial.system_attrs[n] for n in ("attempt", "restarts"))
            params = trial.params if trial.params.keys() == self.span.keys() else hyperparams
            if "repeats" in trial.system_attrs:
                params = self._untried(slot, attempt)
            if outcome_of(trial) is not None:
                if again(trial):
                    self._add(slot, attempt + 1, 0, params)
            elif trial.state == TrialState.FAIL:
                died = not trial.system_attrs.keys() & {"released", "repeats"}
                self._add(slot, attempt + 1, restarts + died, params)

    def take(self) -> Claim | None:
        """Take the first trial that waits, for this process alone; None if none does."""
        for trial in self.trials(TrialState.WAITING):
            taken = False
            with self._there(), suppress(UpdateFinishedTrialError):
                taken = self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
            if not taken:
                continue
            claim = Claim(self, trial)
            same = [t for t in self.trials() if t.system_attrs["slot"] == claim.slot]
            if any(t.number < claim.number and t.system_attrs["attempt"] == claim.attempt
                   for t in same):  # fmt: skip
                claim.release("doubled")
                continue
            self.claim = claim
            claim.earlier = {
                t.system_attrs["folder"]: t.intermediate_values
                for t in reversed(same)
                if t.number < claim.number and "folder" in t.system_attrs
            }
            if self.search == "tpe":
                # anew: studies remember the trials they saw, and of one seed all would choose alike
                sampler = optuna.samplers.TPESampler(
                    seed=(self.seed + claim.number) % 2**32, constant_liar=True
                )
                with self._there():
                    self.study = optuna.load_study(
                        study_name=self.study.study_name, storage=self.storage, sampler=sampler
                    )
            claim.suggest()
            if self._is_tried(claim):
                claim.release("repeats")
                return self.take()
            claim.earlier |= self._cut_short_elsewhere(claim.key)
            return claim
        return None

    def bury(self, *, watching: bool = False) -> list[FrozenTrial]:
        """Fail the trials of dead workers, and put them back into the queue.

        Args:
            watching: Called every `HEARTBEAT` s, so that beats that stand still are counted.

        Returns:
            The trials of other workers that live, or may.
        """
        others, buried = [], False
        for trial in self.trials(TrialState.RUNNING):
            if self.claim is not None and trial.number == self.claim.number:
                continue
            worker, beat = (trial.system_attrs.get(name) for name in ("worker", "beat"))
            last, misses = self._beats.get(trial.number, (beat, -1))
            if beat != last:
                self._heard.add(trial.number)
            # misses are counted, not time: whoever slept has not looked; the first look is none
            misses = misses + watching if beat == last else watching - 1
            self._beats[trial.number] = (beat, misses)
            if not is_dead(worker) and misses * HEARTBEAT < GRACE:
                others.append(trial)
                continue
            try:
                with self._there():
                    self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            except UpdateFinishedTrialError:
                continue  # it ended, or another one buried it
            buried = True
            at = f"process {worker['pid']} on {worker['host']}" if worker else "its worker"
            log.warning(
                "trial %d is taken from %s, which %s", trial.number, at,
                "is gone" if is_dead(worker) else f"gave no sign of life for {GRACE:.0f} s",
            )  # fmt: skip
        if buried:
            self.fill()
        return others

    def is_heard(self, trials: Sequence[FrozenTrial]) -> bool:
        """Tell whether all of these trials have shown that their workers live."""
        return self._heard >= {trial.number for trial in trials}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Show that this process lives, and look after the others, while the block runs."""
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(HEARTBEAT):
                claim = self.claim
                try:
                    if claim is not None and not claim.lost.is_set():
                        claim.beat()
                    self.bury(watching=True)
                except LostTrialError as lost:
                    if claim is self.claim:  # else it has ended
                        log.warning("%s", lost)
                except InputError as gone:
                    log.warning("%s", gone)
                    if claim is not None:
                        claim.lost.set()
                    return
                except Exception as error:  # the next beat may reach it
                    log.warning("the queue of the search cannot be reached: %s", error)

        thread = threading.Thread(target=watch, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(LEAVE)

    def _add(self, slot: str, attempt: int, restarts: int, params: Hyperparams | None) -> None:
        place = {"slot": slot, "attempt": attempt, "restarts": restarts}
        drawn = self.span if params else {}
        trial = optuna.create_trial(
            state=TrialState.WAITING, params=params or {}, distributions=dict(drawn),
            system_attrs=place,
        )  # fmt: skip
        with self._there():
            self.study.add_trial(trial)

    def _keys(self, but: str) -> set[str]:
        """Return the keys of the other slots' trials."""
        return {
            trial.user_attrs["key"]
            for trial in self.trials()
            if trial.system_attrs["slot"] != but
            and "key" in trial.user_attrs
            and "repeats" not in trial.system_attrs
        }

    def _cut_short_elsewhere(self, key: str) -> dict[str, Mapping[int, float]]:
        name = self.study.study_name
        with self._there():
            return {
                trial.system_attrs["folder"]: trial.intermediate_values
                for other in self.storage.get_all_studies()
                if other.study_name != name and other.study_name.startswith(name.rpartition("-")[0])
                for trial in self.storage.get_all_trials(
                    other._study_id, deepcopy=False, states=(TrialState.FAIL,)
                )
                # one that has ended is about to get its place
                if trial.user_attrs.get("key") == key
                and "folder" in trial.system_attrs
                and outcome_of(trial) is None
            }

    def _is_tried(self, claim: Claim) -> bool:
        # Of two workers that choose the same at once, the one that looks last sees the other; if
        # both do, both choose anew.
        return claim.key in self._keys(but=claim.slot)

    def _untried(self, slot: str, attempt: int) -> Hyperparams:
        tried = self._keys(but=slot)
        rng = np.random.default_rng([self.seed, int(slot), attempt])
        return next(h for h in draw_combinations(self.span, rng) if get_logging_key(h) not in tried)


def is_at_work(storage: BaseStorage, prefix: str) -> bool:
    """Tell whether a worker that may live has a trial of a study whose name begins so."""
    return any(
        not is_dead(trial.system_attrs.get("worker"))
        for study in storage.get_all_studies()
        if study.study_name.startswith(prefix)
        for trial in storage.get_all_trials(
            study._study_id, deepcopy=False, states=(TrialState.RUNNING,)
        )
    )


def drop_studies(storage: BaseStorage, prefix: str) -> None:
    """Delete all studies whose name begins so; their workers find that they lost their trials."""
    for name in optuna.get_all_study_names(storage):
        if name.startswith(prefix):
            optuna.delete_study(study_name=name, storage=storage)


def importances(leaderboard: pd.DataFrame) -> pd.Series:
    """Measure how much each hyperparameter decides whether a trial is among the best quarter.

    Args:
        leaderboard: See `gridsearch.read_leaderboard`.

    Returns:
        Hyperparameter -> its share of all, 0 to 1, the largest first; those that never differ are
        left out. Empty below `LEAST_TRIALS` complete trials, which tell nothing.

    References:
        Watanabe et al. 2023, PED-ANOVA, as Optuna has it.
    """
    done = leaderboard[leaderboard["state"] == "complete"]
    names = [name for name in HYPERPARAMETERS if len(set(done[name])) > 1]
    tasks = [LargeRasterORModel.BEST_BY, LargeRasterSegModel.BEST_BY]
    best_by = next((name for name in tasks if name in done), "")
    if len(done) < LEAST_TRIALS or not names:
        return pd.Series(dtype=float, name="importance")
    drawn = {name: sorted(done[name].unique().tolist()) for name in names}
    spans: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(values) for name, values in drawn.items()
    }
    if len(rates := drawn.get("learning_rate", [])) > MANY_VALUES:  # of a range
        spans["learning_rate"] = FloatDistribution(rates[0], rates[-1], log=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    measured = optuna.create_study(direction="maximize")
    measured.add_trials(
        [
            optuna.create_trial(
                params={name: row[name] for name in names}, distributions=spans, value=row[best_by]
            )
            for row in done[[*names, best_by]].to_dict("records")
        ]
    )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
    shares = optuna.importance.get_param_importances(measured, evaluator=evaluator)
    return pd.Series(shares, name="importance")
