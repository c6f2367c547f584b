"""Many cores: one ordered, progress-reporting map, on local processes or on a Dask cluster.

Functions travel by cloudpickle, so a function or lambda written in a notebook cell runs in worker
processes like one from a module. Send paths and windows to the workers, never pixels of a raster.
"""

from __future__ import annotations

import atexit
import heapq
import itertools
import logging
import os
import secrets
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ThreadPoolExecutor,
    wait,
)
from datetime import timedelta
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar
from urllib.parse import urlparse

import cloudpickle
from loky import get_reusable_executor
from tqdm.auto import tqdm

from ImageData import InputError

if TYPE_CHECKING:
    from distributed import Client

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

PROJECT = Path(__file__).absolute().parent
AHEAD = 3  # items per worker that are at work or wait for it, so that it is never idle
KEPT = 16  # items per worker, from the one whose result is awaited to the last that is begun
LARGE = 100_000  # bytes of a function, from which it is worth not to be sent with every item
PATIENCE = 10.0  # s without any result, after which the cluster is looked at
JOINING = 60.0  # s that the first worker of a cluster may take to join it
CURE = (
    "put the project on a disk that all machines share, or start each worker in the project's "
    "folder, with PYTHONPATH=."
)


def cpu_count() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_ordered(
    function: Callable[[Item], Result], items: Iterable[Item], **options: object
) -> list[Result]:
    """Return the results of `imap_ordered`, which says what the options are, as a list."""
    return list(imap_ordered(function, items, **options))


def imap_ordered(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    threads: bool = False,
    description: str = "",
    progress: bool = False,
) -> Iterator[Result]:
    """Apply a function to every item, in worker processes; yield the results in order.

    An item that fails is tried once more, and so is one whose worker dies. Only `AHEAD` items per
    worker are begun at once, and only `KEPT` before their turn, so that results do not pile up
    where one item takes long, or the caller.

    Args:
        function: Any callable of one item; what it closes over is sent along, to a cluster once.
        items: What to work on; each one picklable.
        workers: Number of processes; None takes all cores. Up to one worker, or one item, stays
            in this process.
        scheduler: Address of a Dask scheduler, whose workers take the place of local processes.
            They must find the files to read and to write under the same paths.
        threads: Take threads of this process instead of local processes.
        description: What is being done, for progress and errors.
        progress: Show a bar; otherwise a log line at every tenth of the work.

    Raises:
        InputError: What the function raised, at once; or the cluster cannot be used.
        Exception: What the function raised twice, with a note naming the item. Work not yet begun
            is cancelled.
    """
    items = list(items)
    workers = min(cpu_count() if workers is None else workers, len(items))
    pool: _Pool
    if not items or (scheduler is None and workers <= 1):
        pool = _Pool(function)
    elif scheduler is not None:
        pool = _Cluster(function, scheduler)
    elif threads:
        pool = _Threads(function, workers)
    else:
        pool = _Processes(function, workers)
    with pool, Progress(len(items), description, bar=progress) as report:
        under_way = _UnderWay(items, pool, description)
        results: dict[int, Result] = {}
        try:
            for turn in range(len(items)):
                while turn not in results:
                    under_way.begin(turn)
                    for index, result in under_way.collect():
                        results[index] = result
                        report.advance()
                yield results.pop(turn)
        finally:
            under_way.cancel()


class _UnderWay(Generic[Item, Result]):
    """Items that wait, those at work, and those that failed before."""

    def __init__(self, items: Sequence[Item], pool: _Pool, description: str) -> None:
        self.items, self.pool, self.description = items, pool, description
        self.waiting = [*range(len(items))]  # a heap: what is tried again comes first
        self.running: dict[Future[Result], int] = {}  # in the order of their submission
        self.done: SimpleQueue[Future[Result]] = SimpleQueue()
        self.failures: Counter[int] = Counter()
        self.deaths: Counter[int] = Counter()  # of workers that may have been at work on an item

    def begin(self, turn: int) -> None:
        """Begin what may be begun while the result of item `turn` is awaited."""
        while self.waiting and self.waiting[0] < turn + KEPT * self.pool.size:
            index = self.waiting[0]
            alone = self.deaths and max(self.deaths[i] for i in (index, *self.running.values())) > 1
            if len(self.running) >= (1 if alone else self.pool.limit):
                break
            heapq.heappop(self.waiting)
            future = self.pool.submit(self.items[index])
            self.running[future] = index
            future.add_done_callback(self.done.put)

    def collect(self) -> Iterator[tuple[int, Result]]:
        """Yield the next result, unless there is none for some time, or the item failed."""
        try:
            future = self.done.get(timeout=PATIENCE)
        except Empty:
            self.pool.check()
            return
        if future not in self.running:
            return  # its pool died, and it is tried again
        try:
            result = future.result()
        except BrokenExecutor as error:
            self._bury(error)
        except Exception as error:
            if isinstance(error, CancelledError):
                self.pool.check()
            index = self.running.pop(future)
            self.failures[index] += 1
            if isinstance(error, self.pool.final) or self.failures[index] > 1:
                self._name(error, index)
                raise
            log.warning(
                "%s: %s failed and is tried once more: %r", self.description or "working",
                _shown(self.items[index]), error,
            )  # fmt: skip
            heapq.heappush(self.waiting, index)
        else:
            yield self.running.pop(future), result

    def _bury(self, error: BrokenExecutor) -> None:
        """Try again what a worker process that died took along with its pool.

        Which item it was at work on is not known, but that items are begun in order. Those that may
        have been are tried again among the others, and if that ends so, too, each by itself: then
        the guilty one is known, and the others have the memory of all.
        """
        wait(self.running)
        lost = [
            future for future in self.running
            if isinstance(None if future.cancelled() else future.exception(), BrokenExecutor)
        ]  # fmt: skip
        indexes = [self.running.pop(future) for future in lost]
        suspects = indexes[: self.pool.size]
        for index in suspects:
            self.deaths[index] += 1
            if self.deaths[index] > 2:
                self._name(error, index)
                raise error
        log.warning(
            "%s: a worker process died; tried again: %s", self.description or "working",
            ", ".join(_shown(self.items[index]) for index in suspects),
        )  # fmt: skip
        self.waiting = sorted([*indexes, *self.waiting])

    def _name(self, error: BaseException, index: int) -> None:
        if not isinstance(error, InputError):  # which names what it is about itself
            error.add_note(f"while {self.description or 'working'} on {_shown(self.items[index])}")

    def cancel(self) -> None:
        """Let nothing begin that has not begun."""
        for future in self.running:
            future.cancel()


def _shown(item: object) -> str:
    text = repr(item)
    return text if len(text) <= 200 else text[:200] + "..."


# ---------------------------------------------------------------------------------------------
# Where the work is done
# ---------------------------------------------------------------------------------------------


class _Pool:
    """This process, which does one item after the other."""

    final: tuple[type[Exception], ...] = (InputError,)  # errors that trying again does not mend

    def __init__(self, function: Callable, size: int = 1) -> None:
        self.function, self.size, self.limit = function, size, size * AHEAD if size > 1 else 1

    def submit(self, item: object) -> Future:
        """Begin an item."""
        future = Future()
        try:
            future.set_result(self.function(item))
        except Exception as error:
            future.set_exception(error)
        return future

    def check(self) -> None:
        """See why no result comes."""

    def __enter__(self) -> _Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        """Let go of the workers."""


class _Threads(_Pool):
    """Threads of this process."""

    def __enter__(self) -> _Threads:
        self.executor = ThreadPoolExecutor(self.size)
        return self

    def submit(self, item: object) -> Future:
        return self.executor.submit(self.function, item)

    def __exit__(self, *_: object) -> None:
        self.executor.shutdown(cancel_futures=True)


class _Processes(_Pool):
    """Local worker processes; all of them are replaced when one dies."""

    def submit(self, item: object) -> Future:
        try:
            return self._executor().submit(self.function, item)
        except BrokenExecutor:  # at this very moment
            return self._executor().submit(self.function, item)

    def _executor(self) -> Executor:
        return get_reusable_executor(
            max_workers=self.size, initializer=_end_with, initargs=(os.getpid(),)
        )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._executor().shutdown(kill_workers=True)


def _end_with(parent: int) -> None:
    """Let this worker process end when the one that started it is gone, even if it was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Cluster(_Pool):
    """The workers of a Dask cluster; its scheduler gives what a dead one was at to others."""

    def __init__(self, function: Callable, scheduler: str) -> None:
        from distributed import KilledWorker

        self.final = (InputError, KilledWorker)  # the latter took four workers along
        self.scheduler, self.client = scheduler, _client_of(scheduler)
        self.looked, self.threads = -PATIENCE, 0
        # All goes as bytes, for the scheduler unpacks tasks, too, and need not know our modules.
        self.function = cloudpickle.dumps(partial(_on_worker, function))
        if len(self.function) > LARGE:  # sent once; workers pass it on to each other
            import dask

            with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 TiB"}):
                self.function = self.client.submit(bytes, self.function, pure=False)
        # keys of one group: the scheduler hands out its tasks when workers are free, not before
        self.keys = zip(itertools.repeat(f"largeraster-{secrets.token_hex(4)}"), itertools.count())

    @property
    def size(self) -> int:
        if time.monotonic() > self.looked + PATIENCE:
            self.check()
        return self.threads

    @property
    def limit(self) -> int:
        return AHEAD * self.size

    def submit(self, item: object) -> Future:
        def unpack(function: bytes, packed: bytes) -> object:
            import cloudpickle

            try:
                call, item = cloudpickle.loads(function), cloudpickle.loads(packed)
            except ImportError as error:  # a worker that has joined since we looked
                error.add_note(CURE)
                raise
            return call(item)

        return self.client.submit(
            unpack, self.function, cloudpickle.dumps(item), key=next(self.keys)
        )

    def check(self) -> None:
        if self.client.status != "running":
            raise InputError(
                f"the Dask scheduler at {self.scheduler} has gone; what is finished is kept, start "
                "it and its workers again, and then the same run"
            )
        self.threads = sum(self.client.nthreads().values())
        self.looked = time.monotonic()
        if not self.threads:
            log.warning("no worker is left at %s; waiting for one", self.scheduler)


def _on_worker(function: Callable[[Item], Result], item: Item) -> Result:
    """Do an item on a worker of a cluster."""
    try:
        return function(item)
    except Exception as error:
        error.add_note(
            f"on {socket.gethostname()}, a worker of the cluster; it must find all files under the "
            "same paths as the machine that the work was started on"
        )
        raise


_clients: dict[str, Client] = {}


def _client_of(scheduler: str) -> Client:
    """Return the connection of this process to a Dask cluster whose workers are ready to work."""
    client = _clients.get(scheduler)
    if client is None or client.status != "running":
        client = _clients[scheduler] = _connect(scheduler)
    return client


def _connect(scheduler: str) -> Client:
    """Connect to the scheduler with an address.

    Raises:
        InputError: Dask is not installed, the scheduler does not answer, it has no worker, or one
            that does not find the project's modules.
    """
    try:
        from distributed import Client
    except ImportError:
        raise InputError(
            f"Dask is not installed, which {scheduler} needs: pip install distributed"
        ) from None
    place = urlparse(scheduler)
    try:
        socket.create_connection((place.hostname, place.port), timeout=PATIENCE).close()
        client = Client(scheduler, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"no Dask scheduler answers at {scheduler} ({error}); start one with `dask scheduler`, "
            "and give the address that it prints, such as tcp://host:8786"
        ) from error
    atexit.register(client.close, timeout=3)
    try:
        client.wait_for_workers(1, timeout=JOINING)
    except TimeoutError:
        client.close()
        raise InputError(
            f"no worker has joined the Dask scheduler at {scheduler}; start one with `dask worker "
            f"{scheduler}` in the project's folder"
        ) from None
    _show_modules(client, scheduler)
    return client


def _show_modules(client: Client, scheduler: str) -> None:
    """Tell the workers, those to come included, where the project's modules are."""
    folder, name = str(PROJECT), __name__

    def look() -> None:  # inner functions are sent as they are, by workers they cannot be imported
        import sys
        from importlib.util import find_spec

        if folder not in sys.path and find_spec(name) is None:
            sys.path.insert(0, folder)

        # Dask's nannies have malloc give arrays back to the system at once, and ask for the next
        # ones page by page; these are the sizes that it comes to by itself in other processes
        import ctypes

        if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # of glibc
            mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
            mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD

    def load() -> None:
        import importlib

        importlib.import_module(name)

    client.register_worker_callbacks(look)
    for worker, error in client.run(load, on_error="return").items():
        if isinstance(error, Exception):
            client.close()
            raise InputError(
                f"worker {worker} of the Dask scheduler at {scheduler} does not find the project's "
                f"modules ({error}), for {folder} is not there; {CURE}"
            )


# ---------------------------------------------------------------------------------------------
# Threads
# ---------------------------------------------------------------------------------------------


def map_threads(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, ahead: int
) -> Iterator[Result]:
    """Apply a function to items in threads; yield the results in order.

    At most `ahead` items are begun before their turn, so that results do not pile up.
    """
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class Progress:
    """A bar for people who watch, ten log lines for logs."""

    def __init__(self, total: int, description: str, *, bar: bool) -> None:
        """Begin with nothing done."""
        self.total, self.description, self.done = total, description, 0
        self.started = time.monotonic()
        self.bar = tqdm(total=total, desc=description) if bar else None

    def advance(self) -> None:
        """Note that one more item is done."""
        self.done += 1
        if self.bar is not None:
            self.bar.update()
        elif self.total >= 10 and self.done * 10 // self.total > (self.done - 1) * 10 // self.total:
            rate = self.done / max(time.monotonic() - self.started, 1e-6)
            left = timedelta(seconds=round((self.total - self.done) / rate))
            log.info(
                "%s: %d of %d, %.3g per second, %s left", self.description or "working", self.done,
                self.total, rate, left,
            )  # fmt: skip

    def __enter__(self) -> Progress:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
