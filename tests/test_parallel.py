"""The map: ordered, named errors, functions from cells."""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import parallel


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


def test_nothing_to_do_is_done():
    assert parallel.map_ordered(abs, []) == []


def test_headless_progress_is_ten_lines(caplog):
    caplog.set_level(logging.INFO, logger="parallel")
    parallel.map_ordered(abs, range(200), workers=1, description="counting")
    assert len(caplog.records) == 10
    assert caplog.records[-1].message == "counting: 200 of 200"
