"""The map: ordered, named errors, functions from cells."""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import parallel
from ImageData import InputError


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_items(workers):
    def slow_start(x):
        time.sleep(0.05 * (3 - x))
        return x * x

    assert parallel.map_ordered(slow_start, range(4), workers=workers) == [0, 1, 4, 9]


def test_closures_run_in_other_processes():
    offset = 5
    pids = parallel.map_ordered(lambda x: (os.getpid(), x + offset), [1, 2, 3], workers=2)
    assert [value for _, value in pids] == [6, 7, 8]
    assert os.getpid() not in {pid for pid, _ in pids}


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_names_its_item(workers):
    def fail(x):
        if x == 2:
            raise ValueError("no good")
        return x

    with pytest.raises(ValueError, match="no good") as caught:
        parallel.map_ordered(fail, [1, 2, 3], workers=workers, description="testing")
    assert caught.value.__notes__[-1] == "while testing on 2"


def test_any_executor_will_do():
    with ThreadPoolExecutor(2) as executor:
        assert parallel.map_ordered(abs, [-3, 2], executor=executor) == [3, 2]


def test_no_worker_means_this_process():
    pids = parallel.map_ordered(lambda _: os.getpid(), [1, 2], workers=0)
    assert set(pids) == {os.getpid()}


@pytest.mark.parametrize("workers", [1, 2])
def test_results_can_be_had_one_by_one(workers):
    seen = []
    for value in parallel.imap_ordered(lambda x: x + 1, range(20), workers=workers):
        seen.append(value)
        if value == 5:
            break  # what is not wanted any more is cancelled
    assert seen == [1, 2, 3, 4, 5]


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


def test_without_a_scheduler_there_is_no_cluster():
    with parallel.connect(None) as executor:
        assert executor is None


def test_a_scheduler_that_does_not_answer_is_named():
    started = time.monotonic()
    with (
        pytest.raises(InputError, match=r"no Dask scheduler answers at tcp://127.0.0.1:9"),
        parallel.connect("tcp://127.0.0.1:9", seconds=1),
    ):
        pass
    assert time.monotonic() - started < 20


def test_nothing_to_do_is_done():
    assert parallel.map_ordered(abs, []) == []


def test_headless_progress_is_ten_lines(caplog):
    caplog.set_level(logging.INFO, logger="parallel")
    parallel.map_ordered(abs, range(200), workers=1, description="counting")
    assert len(caplog.records) == 10
    assert caplog.records[-1].message == "counting: 200 of 200"
