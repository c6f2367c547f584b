"""Many cores: one ordered, progress-reporting map.

Functions travel by cloudpickle, so a function or lambda written in a notebook cell runs in worker
processes like one from a module. Send paths and windows to the workers, never pixels of a raster.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, as_completed
from typing import TypeVar

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
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int | None = None,
    executor: Executor | None = None,
    description: str = "",
    progress: bool = False,
) -> list[Result]:
    """Apply a function to every item, in worker processes, and return the results in order.

    Args:
        function: Any callable of one item; what it closes over is sent along.
        items: What to work on; each one picklable.
        workers: Number of processes; None takes all cores. Up to one worker, or one item, stays
            in this process.
        executor: Where to run instead of local processes, for example a Dask client's
            `get_executor()`.
        description: What is being done, for progress and errors.
        progress: Show a bar; otherwise a log line at every tenth of the work.

    Raises:
        Exception: What the function raised first, with a note naming the item. Work not yet
            begun is cancelled.
    """
    items = list(items)
    report = _Progress(len(items), description, bar=progress)
    workers = min(cpu_count() if workers is None else workers, len(items))
    if executor is None and workers <= 1:
        results = []
        for item in items:
            try:
                results.append(function(item))
            except Exception as error:
                _name_item(error, description, item)
                raise
            report.advance()
        report.close()
        return results

    executor = executor or get_reusable_executor(max_workers=workers)
    futures = {executor.submit(function, item): i for i, item in enumerate(items)}
    results = [None] * len(items)
    try:
        for future in as_completed(futures):
            index = futures[future]
            try:
                results[index] = future.result()
            except Exception as error:
                _name_item(error, description, items[index])
                raise
            report.advance()
    finally:
        for future in futures:
            future.cancel()
        report.close()
    return results


def _name_item(error: Exception, description: str, item: object) -> None:
    if isinstance(error, InputError):
        return  # it names what it is about itself
    text = repr(item)
    shown = text if len(text) <= 200 else text[:200] + "..."
    error.add_note(f"while {description or 'working'} on {shown}")


class _Progress:
    """A bar for people who watch, ten log lines for logs."""

    def __init__(self, total: int, description: str, *, bar: bool) -> None:
        self.total, self.description, self.done = total, description, 0
        self.bar = tqdm(total=total, desc=description) if bar else None

    def advance(self) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update()
        elif self.total >= 10 and self.done * 10 // self.total > (self.done - 1) * 10 // self.total:
            log.info("%s: %d of %d", self.description or "working", self.done, self.total)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
