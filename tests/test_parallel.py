"""The map: ordered, bounded, retried, named; here, in threads, in processes, on a cluster."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time

import pytest
from conftest import dask_cluster

import parallel
from ImageData import InputError

PLACES = ["here", "threads", "processes", "cluster"]


@pytest.fixture
def place(request):
    """The options of `imap_ordered` that put the work where a test wants it."""
    match request.param:
        case "here":
            return {"workers": 1}
        case "threads":
            return {"workers": 2, "threads": True}
        case "processes":
            return {"workers": 2}
        case "cluster":
            return {"scheduler": request.getfixturevalue("cluster")}


everywhere = pytest.mark.parametrize("place", PLACES, indirect=True)
in_processes = pytest.mark.parametrize("place", ["processes", "cluster"], indirect=True)


@everywhere
def test_results_come_in_the_order_of_the_items(place):
    def slow_start(x):
        time.sleep(0.05 * (3 - x % 4))
        return x * x

    assert parallel.map_ordered(slow_start, range(12), **place) == [x * x for x in range(12)]


@in_processes
def test_closures_and_lambdas_run_in_other_processes(place):
    offset = 5
    pids = parallel.map_ordered(lambda x: (os.getpid(), x + offset), [1, 2, 3], **place)
    assert [value for _, value in pids] == [6, 7, 8]
    assert os.getpid() not in {pid for pid, _ in pids}


@everywhere
def test_an_item_that_fails_is_tried_once_more_then_named(place, tmp_path):
    def fail(x):
        with (tmp_path / f"{x}").open("a") as file:
            file.write(".")
        if x == 2:
            raise ValueError("no good")
        return x

    with pytest.raises(ValueError, match="no good") as caught:
        parallel.map_ordered(fail, range(40), description="testing", **place)
    assert caught.value.__notes__[-1] == "while testing on 2"
    assert (tmp_path / "2").read_text() == ".."
    assert not (tmp_path / "39").exists(), "what had not begun is cancelled"


@everywhere
def test_an_item_that_fails_once_costs_nothing_else(place, tmp_path, caplog):
    def stumble(x):
        mark = tmp_path / f"{x}"
        if x in (0, 3) and not mark.exists():
            mark.touch()
            raise OSError("the disk is away")
        return x

    assert parallel.map_ordered(stumble, range(6), **place) == list(range(6))
    tried = [r.message for r in caplog.records if "tried once more" in r.message]
    assert sorted(re.findall(r"working: (\d) failed", " ".join(tried))) == ["0", "3"]


@everywhere
def test_bad_input_is_not_tried_again(place, tmp_path):
    def refuse(x):
        with (tmp_path / f"{x}").open("a") as file:
            file.write(".")
        raise InputError(f"{x} is bad")

    with pytest.raises(InputError, match="is bad") as caught:
        parallel.map_ordered(refuse, range(2), **place)
    assert (tmp_path / str(caught.value)[0]).read_text() == "."
    if "scheduler" in place:
        assert "must find all files under the same paths" in caught.value.__notes__[0]


@in_processes
def test_a_killed_worker_loses_nothing(place, tmp_path):
    def work(x):
        mark = tmp_path / f"{x}"
        if x in (5, 21) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
        return x

    assert parallel.map_ordered(work, range(40), **place) == list(range(40))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "place", ["processes", pytest.param("cluster", marks=pytest.mark.long)], indirect=True
)
def test_an_item_that_kills_every_worker_is_named(place, tmp_path):
    def work(x):
        if x == 5:
            os._exit(3)
        time.sleep(0.01)
        return x

    with pytest.raises(Exception, match=r"terminated|died") as caught:
        parallel.map_ordered(work, range(12), description="testing", **place)
    assert caught.value.__notes__ == ["while testing on 5"]


def test_an_item_that_dies_twice_is_tried_by_itself(tmp_path):
    """It may need the memory of all."""
    record = tmp_path / "record"

    def write(line):
        with record.open("a") as file:
            file.write(f"{line}\n")

    def work(x):
        write(f"begin {x}")
        if x == 2 and record.read_text().count("begin 2") < 3:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.1)
        write(f"end {x}")
        return x

    assert parallel.map_ordered(work, range(8), workers=2) == list(range(8))
    lines = record.read_text().splitlines()
    assert lines.count("begin 2") == 3
    assert lines[lines.index("end 2") - 1] == "begin 2"


def test_no_worker_means_this_process():
    pids = parallel.map_ordered(lambda _: os.getpid(), [1, 2], workers=0)
    assert set(pids) == {os.getpid()}


@everywhere
def test_results_can_be_had_one_by_one(place):
    seen = []
    for value in parallel.imap_ordered(lambda x: x + 1, range(20), **place):
        seen.append(value)
        if value == 5:
            break  # what is not wanted any more is cancelled
    assert seen == [1, 2, 3, 4, 5]


def test_results_do_not_pile_up_behind_a_slow_item():
    begun, limit = [], 2 * parallel.KEPT

    def work(x):
        begun.append(x)
        if x == 0:
            deadline = time.monotonic() + 60
            while len(begun) < limit and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(0.2)
            return len(begun)
        return 0

    results = parallel.map_ordered(work, range(5_000), workers=2, threads=True)
    assert results[0] == limit
    assert len(results) == 5_000


def test_results_do_not_pile_up_behind_a_slow_caller():
    begun = []
    for taken, _ in enumerate(
        parallel.imap_ordered(begun.append, range(60), workers=2, threads=True)
    ):
        time.sleep(0.005)
        assert len(begun) <= taken + 1 + 2 * parallel.AHEAD


def test_a_large_function_is_sent_to_a_cluster_once(cluster):
    class Large:
        packed, ballast = 0, bytes(2 * parallel.LARGE)

        def __call__(self, x):
            return len(self.content) + x

        def __getstate__(self):
            Large.packed += 1
            return {"content": self.ballast}

    found = parallel.map_ordered(Large(), range(20), scheduler=cluster)
    assert found == [2 * parallel.LARGE + x for x in range(20)]
    assert Large.packed == 1


def test_threads_keep_the_order_and_do_not_run_ahead():
    begun = []

    def slow(x):
        begun.append(x)
        time.sleep(0.002 * (x % 3))
        return x

    taken = []
    for value in parallel.map_threads(slow, range(50), threads=4, ahead=6):
        taken.append(value)
        assert len(begun) <= len(taken) + 6
    assert taken == list(range(50))
    with pytest.raises(ZeroDivisionError):
        list(parallel.map_threads(lambda x: 1 / x, [1, 0, 2], threads=2, ahead=2))


def test_a_scheduler_that_does_not_answer_is_named():
    with pytest.raises(InputError, match=r"no Dask scheduler answers at tcp://127.0.0.1:9"):
        parallel.map_ordered(abs, [1, 2], scheduler="tcp://127.0.0.1:9")


@pytest.fixture(scope="module")
def doomed(tmp_path_factory):
    with dask_cluster(tmp_path_factory.mktemp("doomed"), workers=1) as made:
        yield made


def test_workers_that_do_not_find_the_project_are_told_where_to_start(
    doomed, tmp_path, monkeypatch
):
    monkeypatch.setattr(parallel, "PROJECT", tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"No module named 'parallel'.*with PYTHONPATH=\.$"):
        parallel.map_ordered(abs, [-1], scheduler=doomed.address)
    monkeypatch.undo()
    assert parallel.map_ordered(abs, [-1], scheduler=doomed.address) == [1]


def test_a_scheduler_that_ends_amid_the_work_is_named(doomed):
    timer = threading.Timer(0.5, doomed.scheduler.kill)
    timer.start()
    with pytest.raises(InputError, match=r"the Dask scheduler at tcp://127.0.0.1:\d+ has gone"):
        parallel.map_ordered(lambda _: time.sleep(0.1), range(10_000), scheduler=doomed.address)


def test_nothing_to_do_is_done():
    assert parallel.map_ordered(abs, []) == []


def test_headless_progress_is_ten_lines_with_rate_and_time_left(caplog):
    caplog.set_level(logging.INFO, logger="parallel")
    parallel.map_ordered(abs, range(200), workers=1, description="counting")
    assert len(caplog.records) == 10
    line = r"counting: 200 of 200, \S+ per second, 0:00:00 left"
    assert re.fullmatch(line, caplog.records[-1].message)
