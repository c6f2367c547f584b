"""Many cores: one ordered, progress-reporting map.

Functions travel by cloudpickle, so a function or lambda written in a notebook cell runs in worker
processes like one from a module. Send paths and windows to the workers, never pixels of a raster.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import urlparse

from loky import get_reusable_executor
from tqdm.auto import tqdm

from ImageData import InputError

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


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
    executor: Executor | None = None,
    description: str = "",
    progress: bool = False,
) -> Iterator[Result]:
    """Apply a function to every item, in worker processes; yield the results in order.

    Args:
        function: Any callable of one item; what it closes over is sent along.
        items: What to work on; each one picklable.
        workers: Number of processes; None takes all cores. Up to one worker, or one item, stays
            in this process.
        executor: Where to run instead of local processes, see `connect`.
        description: What is being done, for progress and errors.
        progress: Show a bar; otherwise a log line at every tenth of the work.

    Raises:
        Exception: What the function raised first, with a note naming the item. Work not yet
            begun is cancelled.
    """
    items = list(items)
    workers = min(cpu_count() if workers is None else workers, len(items))
    with Progress(len(items), description, bar=progress) as report:
        if executor is None and workers <= 1:
            for item in items:
                with _naming(description, item):
                    result = function(item)
                report.advance()
                yield result
            return

        own = executor is None
        executor = executor or get_reusable_executor(
            max_workers=workers, initializer=_end_with, initargs=(os.getpid(),)
        )
        futures = {executor.submit(function, item): i for i, item in enumerate(items)}
        results, next_one = {}, 0
        try:
            for future in as_completed(futures):
                index = futures[future]
                with _naming(description, items[index]):
                    results[index] = future.result()
                report.advance()
                while next_one in results:
                    yield results.pop(next_one)
                    next_one += 1
        except KeyboardInterrupt:
            if own:
                executor.shutdown(kill_workers=True)
            raise
        finally:
            for future in futures:
                future.cancel()


def _end_with(parent: int) -> None:
    """Let this worker process end when the one that started it is gone, even if it was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def connect(scheduler: str | None, seconds: float = 10) -> Iterator[Executor | None]:
    """Yield an executor on the Dask cluster whose scheduler has an address, or None without one.

    Its workers must find the project's modules, and the files that they are to read and write,
    where this process does.

    Raises:
        InputError: Dask is not installed, or the scheduler does not answer.
    """
    if scheduler is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError:
        raise InputError(
            f"Dask is not installed, which {scheduler} needs: pip install distributed"
        ) from None
    place = urlparse(scheduler)
    try:
        socket.create_connection((place.hostname, place.port), timeout=seconds).close()
        client = Client(scheduler, timeout=seconds, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"no Dask scheduler answers at {scheduler} ({error}); start one with `dask scheduler`, "
            "and give the address that it prints, such as tcp://host:8786"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=seconds)
        except TimeoutError:
            raise InputError(
                f"no worker has joined the Dask scheduler at {scheduler}; start one with `dask "
                f"worker {scheduler}` in the project's folder, with PYTHONPATH=."
            ) from None
        yield client.get_executor(retries=1, pure=False)


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


@contextmanager
def _naming(description: str, item: object) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise  # it names what it is about itself
    except Exception as error:
        text = repr(item)
        shown = text if len(text) <= 200 else text[:200] + "..."
        error.add_note(f"while {description or 'working'} on {shown}")
        raise


class Progress:
    """A bar for people who watch, ten log lines for logs."""

    def __init__(self, total: int, description: str, *, bar: bool) -> None:
        """Begin with nothing done."""
        self.total, self.description, self.done = total, description, 0
        self.bar = tqdm(total=total, desc=description) if bar else None

    def advance(self) -> None:
        """Note that one more item is done."""
        self.done += 1
        if self.bar is not None:
            self.bar.update()
        elif self.total >= 10 and self.done * 10 // self.total > (self.done - 1) * 10 // self.total:
            log.info("%s: %d of %d", self.description or "working", self.done, self.total)

    def __enter__(self) -> Progress:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
