"""A prediction on very many workers, simulated event by event.

One scheduler hands shards (strips of a raster) to workers, which read from a storage that they
share while they compute; one process merges what is done from the first shard to the last, as
`predict` does. Workers die and come back, shards fail and are tried again, some workers are slow,
and whoever merges may die, too: the same call then finds finished shards in the journal, but merges
from the top. Nothing is measured here; `plan_scale.py` gives the figures. The same seed gives the
same events.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Scenario:
    """What is to be done, by whom, and what goes wrong.

    Attributes:
        shards: Number of shards.
        seconds: Mean time of a sound worker for a shard, s, reading apart.
        workers: Number of workers, each with one shard at a time.
        dispatch: Time of the scheduler for a task, s.
        read_bytes: Bytes that a shard reads while it is computed.
        bandwidth: Of the storage for all workers together, B/s.
        link: Of one worker, B/s.
        merge: Time for merging a shard, s.
        window: Shards that may be begun before the first of them is merged; None: all.
        spread: Sigma of the logarithm of a shard's time, whose mean stays.
        slow_share: Share of the workers (0-1) that are slow.
        slow_factor: How many times as long these take.
        kills: Times at which some worker dies, s.
        worker_mtbf: Mean time between further deaths of a worker, s.
        worker_repair: Time until another one takes its place, s.
        failure_share: Share of the attempts (0-1) that end in an error.
        retries: Errors of a shard after which it is tried again; one more stops the run.
        merger_mtbf: Mean time between the deaths of the process that merges, s.
        restart: Time until a run that stopped is called again, s.
        scan: Time that the call then takes to look at a finished shard, s.
        speculate: Whether idle workers repeat shards that take `late` times the mean. The
            software does not.
        late: See `speculate`.
        seed: Of all that is drawn.
    """

    shards: int = 100_000
    seconds: float = 1.0
    workers: int = 1_000
    dispatch: float = 0.0
    read_bytes: float = 0.0
    bandwidth: float = math.inf
    link: float = math.inf
    merge: float = 0.0
    window: int | None = None
    spread: float = 0.0
    slow_share: float = 0.0
    slow_factor: float = 1.0
    kills: tuple[float, ...] = ()
    worker_mtbf: float = math.inf
    worker_repair: float = 0.0
    failure_share: float = 0.0
    retries: int = 1
    merger_mtbf: float = math.inf
    restart: float = 0.0
    scan: float = 0.0
    speculate: bool = False
    late: float = 2.0
    seed: int = 0

    @property
    def limits(self) -> dict[str, float]:
        """Part -> least time that it needs if nothing goes wrong and nothing else is slow, s."""
        flow = min(self.bandwidth, self.workers * self.link)
        return {
            "workers": self.shards * self.seconds / self.workers,
            "scheduler": self.shards * self.dispatch,
            "storage": self.shards * self.read_bytes / flow,
            "merging": self.shards * self.merge,
        }


@dataclass
class Outcome:
    """What became of it.

    Attributes:
        makespan: Time from the start to the last merged shard, s.
        done: How often each shard was left in the journal.
        merged: Shards merged into the final catalogue, in this order.
        busy: Part -> share (0-1) of the makespan that it worked.
        held: Time of workers on attempts, s.
        lost: Time of workers on attempts that came to nothing, s.
        deaths: Of workers.
        failures: Attempts that ended in an error.
        stops: Ends of the run before it was complete.
        copies: Attempts at what somebody else was at already.
    """

    makespan: float = 0.0
    done: list[int] = field(default_factory=list)
    merged: list[int] = field(default_factory=list)
    busy: dict[str, float] = field(default_factory=dict)
    held: float = 0.0
    lost: float = 0.0
    deaths: int = 0
    failures: int = 0
    stops: int = 0
    copies: int = 0

    @property
    def lost_share(self) -> float:
        """Share of the workers' time that came to nothing."""
        return self.lost / self.held if self.held else 0.0


@dataclass(eq=False)
class _Attempt:
    shard: int
    worker: int
    start: float | None = None  # s; None: on the way to the worker
    waits: int = 2  # for its computation, and for what it reads
    reading: bool = False
    over: bool = False


class _Storage:
    """Transfers that share a bandwidth equally; its level is the bytes that each one got."""

    def __init__(self, bandwidth: float, link: float) -> None:
        self.bandwidth, self.link = bandwidth, link
        self.time = self.level = self.moved = 0.0
        self.active = 0
        self.queue: list[tuple[float, int, _Attempt]] = []
        self.number = itertools.count()

    @property
    def rate(self) -> float:
        return min(self.link, self.bandwidth / max(self.active, 1))

    def advance(self, now: float) -> None:
        if self.active:
            step = (now - self.time) * self.rate
            self.level, self.moved = self.level + step, self.moved + step * self.active
        self.time = now

    def begin(self, attempt: _Attempt, size: float) -> None:
        self.active += 1
        attempt.reading = True
        heapq.heappush(self.queue, (self.level + size, next(self.number), attempt))

    def leave(self, attempt: _Attempt) -> None:
        self.active -= attempt.reading
        attempt.reading = False

    def next_end(self) -> float:
        while self.queue and not self.queue[0][2].reading:
            heapq.heappop(self.queue)
        if not self.queue:
            return math.inf
        return self.time + max(self.queue[0][0] - self.level, 0.0) / self.rate

    def end(self) -> _Attempt:
        self.level, _, attempt = heapq.heappop(self.queue)
        self.leave(attempt)
        return attempt


def draw_lengths(scenario: Scenario) -> list[float]:
    """Draw how many times the mean each shard takes when it is first tried."""
    rng = random.Random(scenario.seed)
    return [_draw_length(rng, scenario.spread) for _ in range(scenario.shards)]


def _draw_length(rng: random.Random, sigma: float) -> float:
    return math.exp(rng.gauss(0, sigma) - sigma**2 / 2) if sigma else 1.0


def simulate(scenario: Scenario) -> Outcome:
    """Let a scenario happen, until the last shard is merged."""
    return _Simulation(scenario).run()


class _Simulation:
    def __init__(self, scenario: Scenario) -> None:
        s = self.scenario = scenario
        self.rng = random.Random(s.seed + 1)
        # drawn here, so that they do not depend on who does them
        self.length = draw_lengths(s)
        slow = [self.rng.random() < s.slow_share for _ in range(s.workers)]
        self.slowness = [s.slow_factor if is_slow else 1.0 for is_slow in slow]
        self.now = self.scheduler_free = 0.0
        self.spent = {"scheduler": 0.0, "merging": 0.0}
        self.events: list[tuple[float, int, Callable[..., None], tuple]] = []
        self.number = itertools.count()
        self.storage = _Storage(s.bandwidth, s.link)
        self.idle = deque(range(s.workers))
        self.down: set[int] = set()
        self.running: dict[_Attempt, None] = {}  # in the order of their start
        self.work_of: dict[int, _Attempt] = {}  # worker -> what it is at
        self.attempts_at: dict[int, list[_Attempt]] = {}  # shard -> who is at it
        self.again: list[int] = []  # a heap of shards that come once more
        self.tried = bytearray(s.shards)
        self.errors: dict[int, int] = {}
        self.next_shard = self.call = 0
        self.merging = self.paused = self.watched = False
        self.outcome = Outcome(done=[0] * s.shards)

    def run(self) -> Outcome:
        s, outcome = self.scenario, self.outcome
        for time in s.kills:
            self._at(time, self._lose_worker)
        self._expect(s.worker_mtbf / s.workers, self._lose_worker)
        self._expect(s.merger_mtbf, self._stop)
        self._dispatch()
        while len(outcome.merged) < s.shards:
            ends = self.storage.next_end()
            self.now = min(ends, self.events[0][0] if self.events else math.inf)
            self.storage.advance(self.now)
            if ends <= self.now:
                self._need_one_less(self.storage.end())
            else:
                _, _, action, values = heapq.heappop(self.events)
                action(*values)
            self._merge()
            self._dispatch()
        outcome.makespan = self.now
        spent = self.spent | {
            "workers": outcome.held / s.workers,
            "storage": self.storage.moved / min(s.bandwidth, s.workers * s.link),
        }
        outcome.busy = {part: spent[part] / self.now if self.now else 0.0 for part in s.limits}
        return outcome

    def _at(self, time: float, action: Callable[..., None], *values: object) -> None:
        heapq.heappush(self.events, (time, next(self.number), action, values))

    def _expect(self, mean: float, accident: Callable[[], None]) -> None:
        if math.isfinite(mean):
            self._at(self.now + self.rng.expovariate(1 / mean), self._suffer, mean, accident)

    def _suffer(self, mean: float, accident: Callable[[], None]) -> None:
        accident()
        self._expect(mean, accident)

    # --- from the scheduler to the catalogue ---

    def _dispatch(self) -> None:
        s = self.scenario
        while self.idle and not self.paused and (shard := self._choose()) is not None:
            self.scheduler_free = max(self.now, self.scheduler_free) + s.dispatch
            self.spent["scheduler"] += s.dispatch
            attempt = _Attempt(shard, self.idle.popleft())
            self.running[attempt] = None
            self.work_of[attempt.worker] = attempt
            self.attempts_at.setdefault(shard, []).append(attempt)
            self._at(self.scheduler_free, self._begin, attempt)

    def _choose(self) -> int | None:
        s, done = self.scenario, self.outcome.done
        while self.again:
            shard = heapq.heappop(self.again)
            if not done[shard]:
                return shard
        limit = s.shards if s.window is None else len(self.outcome.merged) + s.window
        while self.next_shard < min(limit, s.shards):
            self.next_shard += 1
            if not done[self.next_shard - 1]:  # else it is in the journal
                return self.next_shard - 1
        return self._choose_late() if s.speculate else None

    def _choose_late(self) -> int | None:
        s = self.scenario
        alone = (a for a in self.running if len(self.attempts_at[a.shard]) == 1)
        first = next(alone, None)
        if first is None or first.start is None:
            return None
        if self.now >= first.start + s.late * s.seconds:
            self.outcome.copies += 1
            return first.shard
        if not self.watched:
            self.watched = True
            self._at(first.start + s.late * s.seconds, self._look)
        return None

    def _look(self) -> None:
        self.watched = False

    def _begin(self, attempt: _Attempt) -> None:
        if attempt.over:
            return
        s, attempt.start = self.scenario, self.now
        length = self.length[attempt.shard]
        if self.tried[attempt.shard]:
            length = _draw_length(self.rng, s.spread)
        self.tried[attempt.shard] = 1
        seconds = s.seconds * length * self.slowness[attempt.worker]
        self._at(self.now + seconds, self._need_one_less, attempt)
        if s.read_bytes and math.isfinite(min(s.bandwidth, s.link)):
            self.storage.begin(attempt, s.read_bytes)
        else:
            attempt.waits -= 1

    def _need_one_less(self, attempt: _Attempt) -> None:
        attempt.waits -= 1
        if attempt.over or attempt.waits:
            return
        s, shard = self.scenario, attempt.shard
        failed = self.rng.random() < s.failure_share
        self._end(attempt, lost=failed)
        self.idle.append(attempt.worker)
        if not failed:
            self.outcome.done[shard] += 1
            for copy in list(self.attempts_at[shard]):
                self._end(copy, lost=True)
                self.idle.append(copy.worker)
            return
        self.outcome.failures += 1
        self.errors[shard] = self.errors.get(shard, 0) + 1
        if self.errors[shard] > s.retries:
            self._stop()
        elif not self.attempts_at[shard]:
            heapq.heappush(self.again, shard)

    def _end(self, attempt: _Attempt, *, lost: bool) -> None:
        held = 0.0 if attempt.start is None else self.now - attempt.start
        self.outcome.held += held
        self.outcome.lost += held * lost
        attempt.over = True
        self.storage.leave(attempt)
        del self.running[attempt], self.work_of[attempt.worker]
        self.attempts_at[attempt.shard].remove(attempt)

    def _merge(self) -> None:
        merged = self.outcome.merged
        if self.merging or self.paused or len(merged) == self.scenario.shards:
            return
        if self.outcome.done[len(merged)]:
            self.merging = True
            self._at(self.now + self.scenario.merge, self._merged, self.call)

    def _merged(self, call: int) -> None:
        if call == self.call:
            self.spent["merging"] += self.scenario.merge
            self.merging = False
            self.outcome.merged.append(len(self.outcome.merged))

    # --- what goes wrong ---

    def _lose_worker(self) -> None:
        worker = self.rng.randrange(self.scenario.workers)
        if worker in self.down:
            return
        self.outcome.deaths += 1
        self.down.add(worker)
        self._at(self.now + self.scenario.worker_repair, self._replace, worker)
        attempt = self.work_of.get(worker)
        if attempt is None:
            self.idle.remove(worker)
            return
        self._end(attempt, lost=True)
        if not self.attempts_at[attempt.shard]:
            heapq.heappush(self.again, attempt.shard)

    def _replace(self, worker: int) -> None:
        self.down.remove(worker)
        self.idle.append(worker)

    def _stop(self) -> None:
        """Whoever merges dies, or a shard failed too often: the same call begins anew."""
        if self.paused:
            return
        s, outcome = self.scenario, self.outcome
        outcome.stops += 1
        for attempt in list(self.running):
            self._end(attempt, lost=True)
            self.idle.append(attempt.worker)
        self.call += 1
        self.paused, self.merging = True, False
        self.again, self.errors, self.next_shard = [], {}, 0
        outcome.merged = []
        self._at(self.now + s.restart + s.scan * sum(outcome.done), self._resume)

    def _resume(self) -> None:
        self.paused = False
        self.scheduler_free = self.now
