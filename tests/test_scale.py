"""The simulation of very many workers: what must hold whatever happens, and known limits."""

import importlib.util
import math
import sys
from dataclasses import replace

import pytest
from conftest import PROJECT

SPEC = importlib.util.spec_from_file_location("simulate", PROJECT / "benchmarks" / "simulate.py")
SIMULATION = sys.modules["simulate"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(SIMULATION)
Scenario, simulate = SIMULATION.Scenario, SIMULATION.simulate

CALM = Scenario(shards=1_000, seconds=10.0, workers=20)
WILD = replace(
    CALM, spread=0.5, slow_share=0.1, slow_factor=5, worker_mtbf=2_000, worker_repair=60,
    failure_share=0.02, merger_mtbf=200, restart=30, scan=0.001, dispatch=0.01, merge=0.05,
    read_bytes=1e6, bandwidth=5e6, link=1e6, window=100,
)  # fmt: skip


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("changes", [{}, {"speculate": True}, {"window": None}], ids=str)
def test_every_shard_is_done_and_merged_once_whatever_fails(seed, changes):
    scene = replace(WILD, seed=seed, **changes)
    outcome = simulate(scene)
    assert outcome.deaths > 2
    assert outcome.failures > 5
    assert outcome.stops > 0
    assert outcome.done == [1] * scene.shards
    assert outcome.merged == list(range(scene.shards))
    assert 0 < outcome.lost < outcome.held
    assert outcome.held - outcome.lost >= 0.9 * scene.shards * scene.seconds  # slow workers add
    assert outcome.makespan >= max(scene.limits.values())
    assert all(0 <= share <= 1 + 1e-9 for share in outcome.busy.values())


def test_the_same_seed_gives_the_same_events():
    assert simulate(WILD) == simulate(WILD)
    assert simulate(WILD).makespan != simulate(replace(WILD, seed=1)).makespan


@pytest.mark.parametrize("workers", [1, 7, 100, 5_000])
def test_where_nothing_goes_wrong_the_ideal_is_met_within_a_task(workers):
    scene = replace(CALM, workers=workers)
    ideal = scene.limits["workers"]
    assert ideal <= simulate(scene).makespan <= ideal + scene.seconds
    assert simulate(scene).lost_share == 0


def test_more_workers_never_take_longer_and_the_slowest_part_decides():
    scene = replace(CALM, dispatch=0.02, merge=0.03, read_bytes=1e6, bandwidth=2e7, link=1e6)
    times = [simulate(replace(scene, workers=n)).makespan for n in (1, 3, 10, 30, 100, 1000)]
    assert times == sorted(times, reverse=True)
    slowest = max(scene.limits["storage"], scene.limits["merging"])
    assert slowest <= times[-1] <= slowest + 2 * scene.seconds  # until the first shard is done


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("merging", {"merge": 2.0}),
        ("scheduler", {"dispatch": 2.0}),
        ("storage", {"read_bytes": 1e9, "bandwidth": 5e8}),
        ("storage", {"read_bytes": 1e9, "link": 1e6}),
    ],
)
def test_a_part_that_saturates_takes_what_its_closed_form_says(part, changes):
    scene = replace(CALM, **changes)
    outcome = simulate(scene)
    assert max(scene.limits, key=scene.limits.get) == part
    assert scene.limits[part] <= outcome.makespan <= scene.limits[part] + 2 * scene.seconds + 2
    assert outcome.busy[part] > 0.98


def test_a_worker_that_dies_costs_its_share_and_what_it_was_at():
    scene = replace(CALM, workers=2, kills=(2_000.0,), worker_repair=math.inf)
    outcome = simulate(scene)
    assert outcome.deaths == 1
    assert outcome.makespan == pytest.approx(2_000 + 6_000, abs=2 * scene.seconds)
    assert outcome.lost <= scene.seconds


def test_a_window_smaller_than_a_straggler_stalls_the_others_and_copies_do_not():
    scene = replace(CALM, shards=2_000, slow_share=0.05, slow_factor=30)
    free, narrow, copied = (
        simulate(replace(scene, **changes)).makespan
        for changes in ({}, {"window": 4 * scene.workers}, {"speculate": True})
    )
    assert narrow > 1.5 * free
    assert copied < free


def test_errors_beyond_the_retries_stop_the_run_and_the_journal_keeps_what_is_done():
    scene = replace(CALM, failure_share=0.1, restart=100)
    outcome = simulate(scene)
    assert outcome.stops >= 1
    assert outcome.done == [1] * scene.shards
    assert simulate(replace(scene, retries=9)).stops == 0


def test_lengths_keep_their_mean():
    lengths = SIMULATION.draw_lengths(replace(CALM, shards=20_000, spread=0.7))
    assert sum(lengths) / len(lengths) == pytest.approx(1, abs=0.03)
