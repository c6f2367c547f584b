"""The queue: many workers, each trial once, whatever happens to them."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pandas as pd
import pytest
from test_gridsearch import SPACE, conf, fake_training

import gridsearch
import study
from ImageData import InputError
from logger import get_logging_key

LARGE = SPACE | {"sample_size": [0.25, 0.5, 0.75, 1.0]}  # 8 combinations
PATIENCE = 300  # s, on a machine that is busy with other things


# ---------------------------------------------------------------------------------------------
# Workers: real processes that share a run's folder
# ---------------------------------------------------------------------------------------------


def work(run, log, seconds, heartbeat, grace, deadly, arguments):
    """Be a worker whose trainings only take their time; the last line of a process."""
    study.HEARTBEAT, study.GRACE = heartbeat, grace

    def values_of(hyperparams):
        key = get_logging_key(hyperparams)
        note(log, f"start {key} {os.getpid()}")
        if key == deadly:
            os._exit(9)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.02)
        note(log, f"end {key} {os.getpid()}")
        return os.getpid() / 1e7

    gridsearch.train_iteration = fake_training(values_of)
    sys.exit(gridsearch.main(["--run", str(run), *arguments]))


def note(log, line):
    with log.open("a") as file:
        file.write(line + "\n")


def noted(log, what):
    """Return the keys and processes of the lines of a kind."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [tuple(line.split()[1:]) for line in lines if line.split()[0] == what]


def wait_until(condition, what):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE} s for {what}"
        time.sleep(0.02)


@pytest.fixture
def crew():
    """Start workers quickly: forked from a process that has imported all they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gridsearch", "test_gridsearch"])
    started = []

    def start(run, seconds=0.3, heartbeat=0.3, grace=60.0, deadly=None, arguments=()):
        log = run.parent / "log"
        options = (run, log, seconds, heartbeat, grace, deadly, arguments)
        process = context.Process(target=work, args=options)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        if process.is_alive():
            os.kill(process.pid, signal.SIGCONT)
            process.kill()
        process.join()


@pytest.fixture
def begin(prepared, tmp_path, monkeypatch):
    """Begin a search as a notebook does that is stopped in its first trial."""

    def stop(_):
        raise KeyboardInterrupt

    def begin(space, **options):
        with monkeypatch.context() as patch:
            patch.setattr(gridsearch, "train_iteration", fake_training(stop))
            with pytest.raises(KeyboardInterrupt):
                gridsearch.run_search(prepared.data, space, conf(), tmp_path / "run", **options)
        return tmp_path / "run"

    return begin


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    """A server on a free port, in a folder of its own; the address of its database."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    program = programs[-1].parent if programs else None
    if program is None and (found := shutil.which("initdb")):
        program = Path(found).parent
    if program is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    folder = tmp_path_factory.mktemp("postgres")
    user = []
    if os.geteuid() == 0:  # it refuses to serve root
        user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        os.chown(folder, 65534, 65534)
        for parent in folder.parents[:3]:  # pytest's, which are for us alone
            parent.chmod(parent.stat().st_mode | 0o011)
    data, secret = folder / "data", folder / "secret"
    secret.write_text("s3cret")
    secret.chmod(0o644)
    subprocess.run(
        [*user, program / "initdb", "--pgdata", data, "--username", "searcher", "--no-sync",
         "--auth", "scram-sha-256", "--pwfile", secret, "--encoding", "UTF8"],
        check=True, capture_output=True, cwd=folder,
    )  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [*user, program / "postgres", "-D", data, "-p", str(port), "-k", "", "-h", "127.0.0.1",
         "-c", "fsync=off"],
        cwd=folder, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"postgresql://searcher:s3cret@127.0.0.1:{port}/postgres"
    try:
        ready = [program / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
        wait_until(lambda: subprocess.run(ready, check=False).returncode == 0, "PostgreSQL")
        yield address
    finally:
        server.send_signal(signal.SIGINT)  # it ends its own processes
        server.wait(PATIENCE)


@pytest.fixture(params=["journal", "postgres"])
def storage(request):
    return request.getfixturevalue("postgres") if request.param == "postgres" else None


def options_for(storage):
    return [] if storage is None else ["--storage", storage]


def test_workers_share_a_search_and_train_each_combination_once(begin, crew, storage):
    run = begin(LARGE, storage=storage)
    workers = [crew(run, arguments=options_for(storage)) for _ in range(3)]
    for worker in workers:
        worker.join(PATIENCE)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    starts, ends = (noted(run.parent / "log", what) for what in ("start", "end"))
    assert len(starts) == 8
    assert len({key for key, _ in starts}) == 8
    assert set(ends) == set(starts)
    assert len({pid for _, pid in ends}) >= 2
    board = pd.read_csv(run / "leaderboard.csv")  # by the last worker: there is no notebook
    assert board["state"].tolist() == ["complete"] * 8
    assert (run / "best.ckpt").read_text() == str(board["val_AP50"].max())
    assert not list(run.glob("trials/.*"))


def test_what_a_killed_worker_did_is_done_by_another(begin, crew, storage):
    run = begin(LARGE, storage=storage)
    log = run.parent / "log"
    first = crew(run, seconds=PATIENCE, arguments=options_for(storage))
    wait_until(lambda: noted(log, "start"), "the first trial")
    ((lost, _),) = noted(log, "start")
    second = crew(run, arguments=[*options_for(storage), "--wait"])
    wait_until(lambda: noted(log, "end"), "the second worker")
    first.kill()
    second.join(PATIENCE)
    assert second.exitcode == 0
    starts = Counter(key for key, _ in noted(log, "start"))
    assert starts == {key: 1 + (key == lost) for key in starts}
    assert Counter(key for key, _ in noted(log, "end")) == dict.fromkeys(starts, 1)
    assert len(starts) == 8
    assert pd.read_csv(run / "leaderboard.csv")["state"].tolist() == ["complete"] * 8


def test_a_worker_that_slept_does_not_overwrite_what_another_made(begin, crew, storage):
    one = SPACE | {"sample_size": [1.0], "learning_rate": [1e-3]}
    run = begin(one, storage=storage)
    log, options = run.parent / "log", options_for(storage)
    sleeper = crew(run, seconds=2, arguments=options)
    wait_until(lambda: noted(log, "start"), "the sleeper's trial")
    os.kill(sleeper.pid, signal.SIGSTOP)
    other = crew(run, grace=1.5, arguments=[*options, "--wait"])
    other.join(PATIENCE)
    assert other.exitcode == 0
    (result,) = run.glob("trials/*/result.json")
    before = result.read_bytes(), result.stat().st_mtime_ns, (run / "best.ckpt").read_text()
    os.kill(sleeper.pid, signal.SIGCONT)
    sleeper.join(PATIENCE)
    assert sleeper.exitcode == 0
    assert {pid for _, pid in noted(log, "end")} == {str(sleeper.pid), str(other.pid)}
    (result,) = run.glob("trials/*/result.json")
    after = result.read_bytes(), result.stat().st_mtime_ns, (run / "best.ckpt").read_text()
    assert after == before
    assert json.loads(before[0])["worker"]["pid"] == other.pid
    assert not list(run.glob("trials/.*"))
    board = pd.read_csv(run / "leaderboard.csv")
    assert board["val_AP50"].tolist() == [other.pid / 1e7]


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_worker_that_is_told_to_stop_gives_its_trial_back(begin, crew, kind):
    run = begin(SPACE)
    log = run.parent / "log"
    worker = crew(run, seconds=PATIENCE)
    wait_until(lambda: noted(log, "start"), "the first trial")
    os.kill(worker.pid, kind)
    worker.join(PATIENCE)
    assert worker.exitcode == gridsearch.INTERRUPTED
    queue = open_queue(run)
    assert len(queue.trials(study.TrialState.WAITING)) == 4
    assert not queue.trials(study.TrialState.RUNNING)
    assert max(t.system_attrs["restarts"] for t in queue.trials()) == 0  # nothing is wrong with it


def open_queue(run):
    plan, _, conf = gridsearch._read_search(run)
    return gridsearch._open_queue(plan, conf.seed, run, plan.storage, retry_failed=False)


def test_a_trial_that_kills_its_workers_is_given_up(begin, crew):
    run = begin(SPACE)
    log, deadly = run.parent / "log", next(iter(open_queue(run).planned))
    for death in range(study.MAX_RESTARTS + 1):
        worker = crew(run, seconds=0, deadly=deadly)
        worker.join(PATIENCE)
        assert worker.exitcode == 9
        assert len([key for key, _ in noted(log, "start") if key == deadly]) == death + 1
    worker = crew(run, seconds=0, deadly=deadly)
    worker.join(PATIENCE)
    assert worker.exitcode == 0
    board = pd.read_csv(run / "leaderboard.csv")
    assert board["state"].tolist() == ["complete"] * 3 + ["fail"]
    assert "its workers died 4 times" in board["error"].iloc[-1]


@pytest.mark.parametrize("search", ["grid", "tpe"])
def test_the_leaderboard_tells_of_workers_that_died_before_they_began(
    tmp_path, monkeypatch, search
):
    queue, other = make_queue(tmp_path, search, 4), make_queue(tmp_path, search, 4)
    queue.fill()
    board = gridsearch.read_leaderboard(queue, tmp_path)
    assert len(board) == 0
    assert set(SPACE) | {"selected", "error"} <= set(board)
    monkeypatch.setattr(study, "is_dead", lambda worker: worker is not None)
    monkeypatch.setattr(study.Claim, "suggest", lambda claim: None)
    monkeypatch.setattr(queue, "_is_tried", lambda claim: False)
    while queue.take():
        queue.claim = None
        other.bury()
    board = gridsearch.read_leaderboard(queue, tmp_path)
    assert board["state"].tolist() == ["fail"] * 4
    assert board["error"].str.contains("its workers died 4 times").all()
    if search == "grid":
        assert set(board["learning_rate"]) == set(SPACE["learning_rate"])


def test_a_trial_that_is_lost_is_not_counted_as_done(begin, prepared, monkeypatch):
    run, lost = begin(SPACE), []

    def values_of(hyperparams):
        if not lost:
            lost.append(hyperparams)
            raise study.LostTrialError("it went to another worker")
        return 0.5

    monkeypatch.setattr(gridsearch, "train_iteration", fake_training(values_of))
    assert gridsearch.join_search(run, max_trials=1) == (1, 0)


def test_a_notebook_waits_for_the_trials_of_the_others(begin, crew, prepared, monkeypatch):
    run = begin(SPACE)
    log = run.parent / "log"
    crew(run, seconds=3, arguments=["--max-trials", "1"])
    wait_until(lambda: noted(log, "start"), "the worker's trial")
    monkeypatch.setattr(gridsearch, "train_iteration", fake_training())
    board = gridsearch.run_search(prepared.data, SPACE, conf(), run)
    assert board["state"].tolist() == ["complete"] * 4
    assert len(noted(log, "end")) == 1  # the other three are ours


@pytest.fixture
def quiet(monkeypatch):
    """Commands in this process leave the log to pytest."""
    monkeypatch.setattr(gridsearch, "configure_logger", lambda path: None)


def test_a_worker_refuses_rasters_that_are_others_here(begin, quiet, capsys):
    run = begin(SPACE)
    path = run / "search" / "search.json"
    known = json.loads(path.read_text())
    first, second = known["data"]["rasters"].values()
    first["path"] = second["path"]
    path.write_text(json.dumps(known))
    assert gridsearch.main(["--run", str(run)]) == gridsearch.FAILED
    assert "is not the raster that the search" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--accelerator", "gpuu"], "ACCELERATOR = 'gpuu'"),
        (["--devices", "two"], "DEVICES = 'two'"),
    ],
)
def test_a_worker_that_is_not_fit_takes_no_trial(begin, quiet, capsys, arguments, message):
    run = begin(SPACE)
    assert gridsearch.main(["--run", str(run), *arguments]) == gridsearch.FAILED
    assert message in capsys.readouterr().err
    assert len(open_queue(run).trials(study.TrialState.WAITING)) == 4


@pytest.mark.parametrize("other", [False, True], ids=["missing", "other"])
def test_a_worker_refuses_tiles_that_are_others_here(begin, quiet, capsys, prepared, other):
    run = begin(SPACE)
    path = run / "search" / "search.json"
    known = json.loads(path.read_text())
    (folder,) = prepared.data.tilings.values()
    moved = run.parent / "tiles"
    known["data"]["tilings"] = {"128": str(moved)}
    path.write_text(json.dumps(known))
    if other:
        shutil.copytree(folder, moved)
        tiles = pd.read_parquet(moved / "tiles.parquet")
        tiles.iloc[1:].to_parquet(moved / "tiles.parquet")
    assert gridsearch.main(["--run", str(run)]) == gridsearch.FAILED
    expected = "are not those that the search" if other else "cannot be read"
    assert f"tiles of 128 px in {moved} {expected}" in capsys.readouterr().err
    assert len(open_queue(run).trials(study.TrialState.WAITING)) == 4


def test_a_worker_needs_a_search_that_a_notebook_began(tmp_path, quiet, capsys):
    assert gridsearch.main(["--run", str(tmp_path)]) == gridsearch.FAILED
    assert "holds no search" in capsys.readouterr().err
    assert gridsearch.main(["--run", str(tmp_path / "none")]) == gridsearch.FAILED
    assert "there is no run" in capsys.readouterr().err


def test_a_search_is_read_as_it_was_written(begin, prepared):
    plan, data, read = gridsearch._read_search(begin(LARGE, search="random", n_trials=3))
    assert plan.space == LARGE
    assert (plan.search, plan.n_trials) == ("random", 3)
    assert read == conf()
    given = prepared.data
    assert data.radiometry == given.radiometry
    assert data.tile_marks == given.tile_marks
    pd.testing.assert_frame_equal(data.blocks, given.blocks)
    assert {n: r.made_from for n, r in data.rasters.items()} == {
        n: r.made_from for n, r in given.rasters.items()
    }


def test_workers_find_the_weights_to_start_from_wherever_they_are_started(
    prepared, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "start.ckpt").write_text("weights")
    monkeypatch.setattr(gridsearch, "train_iteration", fake_training())
    given = conf()
    given.init_from = "start.ckpt"
    gridsearch.run_search(prepared.data, SPACE, given, tmp_path / "run")
    assert given.init_from == "start.ckpt"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert gridsearch._read_search(tmp_path / "run")[2].init_from == str(tmp_path / "start.ckpt")
    assert gridsearch.join_search(tmp_path / "run") == (0, 0)


def test_a_search_that_is_started_over_leaves_the_others_nothing(
    begin, crew, prepared, monkeypatch
):
    run = begin(SPACE)
    log = run.parent / "log"
    old = crew(run, seconds=2)
    wait_until(lambda: noted(log, "start"), "the old search's trial")
    monkeypatch.setattr(gridsearch, "train_iteration", fake_training())
    board = gridsearch.run_search(prepared.data, SPACE, conf(), run, force=True)
    old.join(PATIENCE)
    assert old.exitcode == gridsearch.FAILED
    (log_of_worker,) = (run / "workers").iterdir()
    assert "the search was started over by another process" in log_of_worker.read_text()
    assert sorted(board["val_AP50"]) == pytest.approx([0.05, 0.1, 0.1, 0.2])
    assert not list(run.glob("trials/.*"))


def test_searches_of_other_input_share_no_queue(begin, prepared, monkeypatch):
    queue, other = open_queue(run := begin(SPACE)), conf()
    other.backbone = "resnet34"
    claim = queue.take()  # nothing has a result yet
    monkeypatch.setattr(gridsearch, "train_iteration", fake_training())
    with pytest.raises(InputError, match="trials made with other configuration"):
        gridsearch.run_search(prepared.data, SPACE, other, run)
    claim.release()
    board = gridsearch.run_search(prepared.data, SPACE, other, run)
    assert board["state"].tolist() == ["complete"] * 4
    assert len(queue.trials(study.TrialState.WAITING)) == 4


def test_a_password_is_written_nowhere(begin, postgres):
    run = begin(SPACE, storage=postgres, parameters={"STORAGE": postgres})
    shown = study.public_url(postgres)
    assert "s3cret" not in shown
    assert shown.startswith("postgresql://searcher@127.0.0.1:")
    assert json.loads((run / "parameters.json").read_text())["STORAGE"] == shown
    written = [path for path in run.rglob("*") if path.is_file()]
    assert not [path for path in written if b"s3cret" in path.read_bytes()]
    with pytest.raises(InputError, match="cannot be opened") as caught:
        study.open_storage(postgres.replace("s3cret", "t0psecret"), run)
    assert "t0psecret" not in str(caught.value)


@pytest.mark.parametrize("url", ["sqlite:///x.db", "mysql://a:s3cret@b/c", "runs/x"])
def test_other_databases_are_refused(url, tmp_path):
    with pytest.raises(InputError, match="must be a PostgreSQL database") as caught:
        study.open_storage(url, tmp_path)
    assert "s3cret" not in str(caught.value)


# ---------------------------------------------------------------------------------------------
# The queue
# ---------------------------------------------------------------------------------------------


def make_queue(folder, search="grid", n_trials=20, space=SPACE):
    return study.Queue(study.open_storage(None, folder), "test", space, search, n_trials, seed=0)


def test_trials_that_two_processes_add_at_once_are_taken_once(tmp_path):
    queue, other = make_queue(tmp_path), make_queue(tmp_path)
    before = other.latest  # as seen before the first one added anything
    queue.fill()
    other.latest = dict
    other.fill()
    other.latest = before
    assert len(queue.trials()) == 8
    taken = [queue.take().key for _ in range(4)]
    assert len(set(taken)) == 4
    assert other.take() is None
    assert queue.take() is None


def test_many_threads_take_each_trial_once(tmp_path):
    space = SPACE | {"batch_size": list(range(1, 11))}
    make_queue(tmp_path, space=space).fill()

    def take_all(_):
        queue, taken = make_queue(tmp_path, space=space), []
        while (claim := queue.take()) is not None:
            taken.append(claim.key)
        return taken

    with ThreadPoolExecutor(4) as pool:
        taken = [key for keys in pool.map(take_all, range(4)) for key in keys]
    assert len(taken) == len(set(taken)) == 40


def test_half_a_line_of_the_journal_is_dropped(tmp_path):
    make_queue(tmp_path).fill()
    journal = tmp_path / "study.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + whole[:20])
    queue = make_queue(tmp_path)
    assert journal.read_bytes().startswith(whole + b"{")
    queue.take().end(study.TrialState.COMPLETE, "values", {}, 0.5)
    assert len(make_queue(tmp_path).trials(study.TrialState.WAITING)) == 3


def test_a_beat_that_stands_still_is_counted_by_those_who_look(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "HEARTBEAT", 1.0)
    monkeypatch.setattr(study, "GRACE", 3.0)
    monkeypatch.setattr(study, "is_dead", lambda worker: False)
    queue, other = make_queue(tmp_path), make_queue(tmp_path)
    queue.fill()
    claim = queue.take()
    assert len(other.bury()) == 1  # merely to ask counts nothing
    for _ in range(3):  # the first look is no miss
        assert len(other.bury(watching=True)) == 1
    assert not other.is_heard(other.trials(study.TrialState.RUNNING))
    claim.beat()
    for _ in range(3):
        assert len(other.bury(watching=True)) == 1
    assert other.is_heard(other.trials(study.TrialState.RUNNING))
    assert other.bury(watching=True) == []
    with pytest.raises(study.LostTrialError):
        claim.beat()
    with pytest.raises(study.LostTrialError):
        claim.end(study.TrialState.COMPLETE, "values", {}, 1.0)
    assert len(other.trials(study.TrialState.WAITING)) == 4


def broken(monkeypatch, storage, name, times, *, deaf=False):
    """Let a storage fail, or do as told but not say so, some times."""
    method, left = getattr(storage, name), [times]

    def fail(*args, **options):
        if left[0] > 0:
            left[0] -= 1
            if deaf:
                method(*args, **options)
            raise ConnectionError("the database is restarted")
        return method(*args, **options)

    monkeypatch.setattr(storage, name, fail)


@pytest.mark.parametrize("deaf", [False, True])
@pytest.mark.parametrize("state", ["COMPLETE", "FAIL"])
def test_the_end_of_a_trial_is_told_until_it_is_heard(tmp_path, monkeypatch, deaf, state):
    monkeypatch.setattr(study, "PAUSES", (0.0, 0.0))
    queue = make_queue(tmp_path)
    queue.fill()
    claim = queue.take()
    broken(monkeypatch, queue.storage, "set_trial_state_values", 1 if deaf else 2, deaf=deaf)
    claim.end(study.TrialState[state], "error", "none", 0.5)
    assert make_queue(tmp_path).trials()[0].state.name == state


def test_a_queue_that_does_not_answer_is_no_failure_of_a_trial(tmp_path, monkeypatch, caplog):
    queue = make_queue(tmp_path)
    queue.fill()
    claim = queue.take()
    broken(monkeypatch, queue.storage, "set_trial_intermediate_value", 1)
    judge = gridsearch._Judge(claim, pruning=True)
    measure(judge, 0, 0.5)
    assert "the database is restarted" in caplog.text
    measure(judge, 1, 0.6)
    assert queue.trials()[0].intermediate_values == {2: 0.6}
    study.drop_studies(queue.storage, "test")
    with pytest.raises(study.LostTrialError):
        measure(judge, 2, 0.7)
    with pytest.raises(study.LostTrialError):
        claim.is_hopeless()


@pytest.mark.parametrize("changed", [{}, {"batch_size": [8, 16]}], ids=["same", "other grid"])
def test_an_attempt_that_goes_on_is_judged_by_what_the_earlier_reached(
    prepared, tmp_path, monkeypatch, changed
):
    stopped = []

    def train_iteration(hyperparams, data, conf, trial_dir, logger, callbacks=(), *, progress):
        measure(callbacks[0], 3 if stopped else 0, 0.5 - 0.1 * len(stopped))
        if not stopped:
            stopped.append(True)
            (trial_dir / "checkpoints").mkdir()
            (trial_dir / "checkpoints" / "last.ckpt").touch()
            raise KeyboardInterrupt
        shutil.rmtree(trial_dir / "checkpoints", ignore_errors=True)
        return fake_training()(hyperparams, data, conf, trial_dir, logger, progress=progress)

    monkeypatch.setattr(gridsearch, "train_iteration", train_iteration)
    one = SPACE | {"sample_size": [1.0], "learning_rate": [1e-3]}
    with pytest.raises(KeyboardInterrupt):
        gridsearch.run_search(prepared.data, one, conf(), tmp_path)
    again = one | changed
    gridsearch.run_search(prepared.data, again, conf(), tmp_path)
    trials = open_queue(tmp_path).trials()
    (found,) = (t for t in trials if t.params["batch_size"] == 8 and t.state.name == "COMPLETE")
    assert found.intermediate_values == {1: 0.5, 4: 0.4}
    assert not list(tmp_path.glob("trials/.*"))


def measure(judge, epoch, score):
    """End a validation of a training."""
    trainer = SimpleNamespace(
        state=SimpleNamespace(fn="fit"), current_epoch=epoch, callback_metrics={"val_AP50": score}
    )
    module = SimpleNamespace(_measures=lambda stage: True, BEST_BY="val_AP50")
    judge.on_validation_end(trainer, module)


def after(monkeypatch, thing, name, meanwhile):
    """Let something happen each time when a method has done its work."""
    method = getattr(thing, name)

    def do(*args, **options):
        result = method(*args, **options)
        meanwhile()
        return result

    monkeypatch.setattr(thing, name, do)


@pytest.mark.parametrize("search", ["grid", "tpe"])
@pytest.mark.parametrize(
    "moment", ["get_all_trials", "set_trial_state_values", "set_trial_system_attr"]
)
def test_a_search_that_is_started_over_at_any_moment_is_told_from_a_bug(
    tmp_path, monkeypatch, search, moment
):
    queue = make_queue(tmp_path, search, n_trials=3)
    queue.fill()
    other = study.open_storage(None, tmp_path)
    after(monkeypatch, queue.storage, moment, lambda: study.drop_studies(other, "test"))
    for act in (queue.take, queue.bury, queue.fill):
        with pytest.raises((study.StartedOverError, study.LostTrialError)):
            act()


@pytest.mark.parametrize("search", ["grid", "tpe"])
def test_a_trial_that_is_buried_while_it_is_taken_is_lost(tmp_path, monkeypatch, search):
    queue = make_queue(tmp_path, search, n_trials=3)
    queue.fill()
    monkeypatch.setattr(study, "is_dead", lambda worker: worker is not None)
    after(monkeypatch, queue.storage, "set_trial_system_attr", make_queue(tmp_path).bury)
    with pytest.raises(study.LostTrialError):
        queue.take()


def test_a_storage_that_does_not_answer_keeps_nobody_from_leaving(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "HEARTBEAT", 0.01)
    monkeypatch.setattr(study, "LEAVE", 0.1)
    queue, asked, answer = make_queue(tmp_path), threading.Event(), threading.Event()

    def get_all_trials(*args, **options):
        asked.set()
        answer.wait(PATIENCE)
        return []

    monkeypatch.setattr(queue.storage, "get_all_trials", get_all_trials)
    try:
        with queue.watching():
            assert asked.wait(PATIENCE)
        assert not answer.is_set()
    finally:
        answer.set()


def test_who_is_dead_is_known_of_this_machine_only():
    me = study.this_worker()
    assert not study.is_dead(me)
    assert study.is_dead(me | {"started": me["started"] - 1000})  # the id is another process's now
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert study.is_dead(me | {"pid": gone.pid})
    assert not study.is_dead(me | {"pid": gone.pid, "machine": "another"})
    assert not study.is_dead(None)


def test_a_random_search_draws_distinct_trials_from_the_whole_range(
    prepared, tmp_path, monkeypatch
):
    trained = Counter()

    def values_of(hyperparams):
        trained[get_logging_key(hyperparams)] += 1
        return hyperparams["learning_rate"]

    monkeypatch.setattr(gridsearch, "train_iteration", fake_training(values_of))
    options = {"search": "random", "n_trials": 5}
    board = gridsearch.run_search(prepared.data, SPACE, conf(), tmp_path / "run", **options)
    rates = board["learning_rate"]
    assert len(board) == rates.nunique() == 5
    assert rates.between(1e-3, 2e-3).all()
    assert not set(rates) & set(SPACE["learning_rate"])
    options["n_trials"] = 8
    more = gridsearch.run_search(prepared.data, SPACE, conf(), tmp_path / "run", **options)
    assert set(rates) < set(more["learning_rate"])
    assert len(more) == len(trained) == 8
    assert set(trained.values()) == {1}
    again = gridsearch.run_search(prepared.data, SPACE, conf(), tmp_path / "again", **options)
    assert list(again["learning_rate"]) == list(more["learning_rate"])  # the seed decides


def test_tpe_goes_where_the_results_are_good(prepared, tmp_path, monkeypatch):
    space = SPACE | {"learning_rate": [1e-5, 1e-1]}

    def values_of(hyperparams):
        return 1 - abs(np.log10(hyperparams["learning_rate"]) + 3) / 2  # best at 0.001

    monkeypatch.setattr(gridsearch, "train_iteration", fake_training(values_of))
    board = gridsearch.run_search(
        prepared.data, space, conf(), tmp_path, search="tpe", n_trials=40
    ).sort_values("trial")
    assert len(board) == 40
    distance = np.abs(np.log10(board["learning_rate"]) + 3)
    assert distance.iloc[20:].median() < distance.iloc[:10].median() / 2


def test_tpe_trains_no_combination_twice(prepared, tmp_path, monkeypatch):
    space = SPACE | {"learning_rate": [1e-3], "batch_size": [1, 2, 4, 8]}
    trained = Counter()

    def values_of(hyperparams):
        trained[get_logging_key(hyperparams)] += 1
        return hyperparams["batch_size"] / 8

    monkeypatch.setattr(gridsearch, "train_iteration", fake_training(values_of))
    options = {"search": "tpe", "n_trials": 20}
    board = gridsearch.run_search(prepared.data, space, conf(), tmp_path, **options)
    assert len(board) == 8  # there are no more
    assert len(trained) == 8
    assert set(trained.values()) == {1}


# ---------------------------------------------------------------------------------------------
# Hopeless trials
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mine", "hopeless"),
    [
        ({1: 0.1, 2: 0.1, 4: 0.3}, True),
        ({1: 0.1, 2: 0.1, 4: 0.6}, False),  # above the median
        ({1: 0.1, 2: 0.6, 4: 0.3}, False),  # it was above once, and the best epoch is kept
        ({1: 0.1, 2: 0.0}, False),  # in the first third
        ({1: 0.1, 5: 0.1, 10: 0.1}, False),  # the last epoch
    ],
)
def test_a_training_below_the_median_of_its_peers_is_hopeless(mine, hopeless):
    others = [{1: 0.2, 4: score, 10: 0.9} for score in (0.4, 0.5, 0.5, 0.6)]
    assert study.is_hopeless(mine, others, 10) == hopeless
    assert not study.is_hopeless(mine, others[1:], 10)  # too few to tell
    stopped = [{1: 0.9}] * 9
    assert study.is_hopeless(mine, [*others, *stopped], 10) == hopeless  # they did not get here


def test_hopeless_trials_stop_and_are_never_selected_nor_trained_again(
    prepared, tmp_path, monkeypatch
):
    epochs, reached = 6, Counter()

    def train_iteration(hyperparams, data, conf, trial_dir, logger, callbacks=(), *, progress):
        goal = hyperparams["sample_size"] * hyperparams["learning_rate"] * 100
        for epoch in range(epochs):
            reached[get_logging_key(hyperparams)] += 1
            measure(callbacks[0], epoch, goal * (epoch + 1) / epochs)
        options = {"progress": progress}
        return fake_training(lambda h: goal)(hyperparams, data, conf, trial_dir, logger, **options)

    monkeypatch.setattr(gridsearch, "train_iteration", train_iteration)
    space = LARGE | {"learning_rate": [1e-3, 2e-3, 3e-3, 4e-3], "n_epochs": [epochs]}
    options = {"pruning": True}
    board = gridsearch.run_search(prepared.data, space, conf(), tmp_path, **options)
    pruned = board[board["state"] == "pruned"]
    assert 2 <= len(pruned) <= 12
    assert board["state"].value_counts().to_dict() == {
        "complete": 16 - len(pruned), "pruned": len(pruned)
    }  # fmt: skip
    assert pruned["pruned_epoch"].between(3, epochs - 1).all()
    assert (pruned["pruned_val_AP50"] < 0.2).all()
    assert not pruned["selected"].any()
    assert set(reached.values()) == {*pruned["pruned_epoch"], epochs}
    assert board[board["selected"]]["val_AP50"].tolist() == [0.4]
    before = reached.copy()
    again = gridsearch.run_search(prepared.data, space, conf(), tmp_path, **options)
    pd.testing.assert_frame_equal(again, board)
    wider = space | {"batch_size": [8, 16]}
    gridsearch.run_search(prepared.data, wider, conf(), tmp_path, **options)
    assert {key: reached[key] for key in before} == before
    before = reached.copy()
    options = {"pruning": False}
    board = gridsearch.run_search(prepared.data, space, conf(), tmp_path, **options)
    assert board["state"].tolist() == ["complete"] * 16
    assert reached.total() == before.total() + epochs * len(pruned)
    queue = open_queue(tmp_path)
    assert {t.state for t in queue.trials()} == {optuna.trial.TrialState.COMPLETE,
                                                 optuna.trial.TrialState.PRUNED}  # fmt: skip
