"""Several processes that train one model: how they are started, and what they tell each other.

Rank 0 is the process that runs the search. The others follow it: they wait for its trainings, take
part in each with a share of the tiles, and write nothing. On one machine rank 0 starts them itself,
from a notebook as well as from a script; where `torchrun` has started all of them, on one machine
or many, `lead_or_follow` tells them apart.

What is to be trained travels through a store, in which followers may wait for days. Every training
has a process group of its own, so that one that failed leaves nothing behind in the next.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import pickle
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch import distributed as dist
from typing_extensions import override

from ImageData import InputError

log = logging.getLogger(__name__)

# Lightning would take the number of a Slurm task for a rank, and a worker of its own would not log
rank_zero_only.rank = 0

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = timedelta(days=365)  # of a follower between two trainings
STUCK = timedelta(hours=1)  # what one rank does while the others wait for it takes less
FAREWELL = 120.0  # s, for the others to end what rank 0 has ended
STARTING = 600.0  # s, for new processes to import what they need
DYING = 5.0  # s, until the end of a process, or of its work, shows


class RankError(RuntimeError):
    """A training ended because another of its processes failed, or is gone."""


@dataclass
class Team:
    """The processes of this and further trainings, seen from one of them.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        local_rank: Number of this process on its machine.
        local_size: Number of processes on its machine.
        store: Holds what is to be trained, and who failed.
        followers: Processes that rank 0 has started; none where torchrun has.
        trainings: Number of trainings begun.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    store: dist.Store
    followers: list[subprocess.Popen] = field(default_factory=list)
    trainings: int = 0


_team: Team | None = None


# ---------------------------------------------------------------------------------------------
# What the ranks of a training tell each other
# ---------------------------------------------------------------------------------------------


def rank() -> int:
    """Return the number of this process among those of the training; 0 where there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def summed(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, in its place."""
    if count() > 1:
        dist.all_reduce(values)
    return values


def average(tensors: Sequence[Tensor]) -> None:
    """Give tensors of one type their mean over all ranks."""
    if count() > 1 and tensors:
        flat = summed(torch.cat([tensor.flatten() for tensor in tensors])) / count()
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def gathered(value: object) -> list[Any]:
    """Return what each rank has, by rank."""
    values = [value] * count()
    if count() > 1:
        dist.all_gather_object(values, value)
    return values


def collected(value: object) -> list[Any] | None:
    """Return on rank 0 what each rank has, by rank, and None on the others."""
    if count() == 1:
        return [value]
    values = [None] * count() if rank() == 0 else None
    dist.gather_object(value, values)
    return values


def told(value: object) -> Any:  # noqa: ANN401 - whatever it is
    """Return what rank 0 has."""
    values = [value]
    if count() > 1:
        dist.broadcast_object_list(values)
    return values[0]


class TeamEnvironment(ClusterEnvironment):
    """Tells Lightning that all processes are there already, and whatever a batch system says."""

    creates_processes_externally = True
    main_address = "localhost"  # not used, as the process group is there, too
    main_port = 0

    @staticmethod
    @override
    def detect() -> bool:
        return False

    @override
    def world_size(self) -> int:
        return count()

    @override
    def set_world_size(self, size: int) -> None:
        pass

    @override
    def global_rank(self) -> int:
        return rank()

    @override
    def set_global_rank(self, rank: int) -> None:
        pass

    @override
    def local_rank(self) -> int:
        return _team.local_rank if count() > 1 else 0

    @override
    def node_rank(self) -> int:
        return rank() // _team.local_size if count() > 1 else 0


def lightning_devices(devices: int | str | list[int]) -> dict[str, Any]:
    """Return what Lightning's Trainer is to be told of devices and processes."""
    plugins = [TeamEnvironment()]
    if count() == 1:
        one = devices[:1] if isinstance(devices, list) else 1
        return {"devices": one, "plugins": plugins}
    strategy = pl.strategies.DDPStrategy(forward_sync_buffers=False)  # `average` makes them agree
    here = devices if isinstance(devices, list) else _team.local_size
    nodes = count() // _team.local_size
    return {"devices": here, "num_nodes": nodes, "strategy": strategy, "plugins": plugins}


# ---------------------------------------------------------------------------------------------
# Training together
# ---------------------------------------------------------------------------------------------


def processes(accelerator: str, devices: int | str | list[int], nodes: int = 1) -> int:
    """Return how many processes a training is to have, one per device.

    Args:
        accelerator: Lightning's.
        devices: How many of this machine, or which, or "auto" for all GPUs.
        nodes: Number of machines.

    Raises:
        InputError: There are no such devices, or the processes on the other machines are missing.
    """
    if _team is not None and not _team.followers:
        return _team.size
    if nodes > 1:
        raise InputError(
            f"NUM_NODES = {nodes}, but this process was started alone; start `python gridsearch.py "
            "--run RUN` by torchrun on every machine (see docs/scale.md), or set NUM_NODES = 1"
        )
    if devices == 1:
        return 1
    try:
        # a notebook is no reason to take fewer
        every = devices == "auto" and accelerator != "cpu" and torch.cuda.is_available()
        return pl.Trainer(
            accelerator=accelerator, devices=-1 if every else devices, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, plugins=[TeamEnvironment()],
            strategy="ddp" if accelerator == "cpu" or torch.cuda.is_available() else "auto",
        ).num_devices  # fmt: skip
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise InputError(
            f"ACCELERATOR = {accelerator!r} with DEVICES = {devices!r} cannot be had: {error}"
        ) from error


class GpuUse(NamedTuple):
    """How much a GPU does: its number for torch, MB that are taken, % of the time it is at work."""

    index: int
    used_mb: float
    used_percent: float


def gpu_use() -> list[GpuUse]:
    """Return how much the GPUs do that this process sees; none where there is no `nvidia-smi`."""
    if not torch.cuda.is_available():
        return []
    query = "--query-gpu=uuid,memory.used,utilization.gpu"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        table = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("nvidia-smi does not tell what GPUs are doing: %s", error)
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in table.stdout.splitlines()]
    busy = {uuid.removeprefix("GPU-"): numbers for uuid, *numbers in rows}
    found = []
    for index in range(torch.cuda.device_count()):
        numbers = busy.get(str(torch.cuda.get_device_properties(index).uuid), [])
        if len(numbers) == 2 and all(number.isdecimal() for number in numbers):
            found.append(GpuUse(index, *map(float, numbers)))
    return found


def free_devices(
    accelerator: str,
    devices: int | str | list[int],
    max_used_ram: float | None,
    max_used_perc: float | None,
    table: Sequence[GpuUse] | None = None,
) -> int | str | list[int]:
    """Choose the GPUs that others leave free.

    Args:
        accelerator: Lightning's.
        devices: How many are wanted; "auto": all that are free; a list: only these.
        max_used_ram: MB that others may have taken; None: any.
        max_used_perc: Percent of the time that they may be at work for others; None: any.
        table: What they do; None asks them.

    Returns:
        `devices` as it is if there is no limit; 1 where there is no GPU, of a processor; else the
        numbers of GPUs, those with most free memory first.

    Raises:
        InputError: None of them is free.
    """
    if (max_used_ram is None and max_used_perc is None) or accelerator not in (
        "auto",
        "gpu",
        "cuda",
    ):
        return devices
    table = gpu_use() if table is None else table
    if isinstance(devices, list):
        table = [gpu for gpu in table if gpu.index in devices]
    if not table:
        log.warning("no GPU to choose from; DEVICES = 1")
        return 1
    most_ram, most_perc = (math.inf if limit is None else limit
                           for limit in (max_used_ram, max_used_perc))  # fmt: skip
    free = [gpu for gpu in table if gpu.used_mb <= most_ram and gpu.used_percent <= most_perc]
    if not free:
        uses = ", ".join(f"{g.index}: {g.used_mb:.0f} MB, {g.used_percent:.0f} %" for g in table)
        raise InputError(
            f"no GPU is free: others may use up to {most_ram:g} MB and {most_perc:g} % of one, and "
            f"use {uses}; wait, or raise max_used_ram and max_used_perc (MODEL_OPTIONS)"
        )
    free.sort(key=lambda gpu: (gpu.used_mb, gpu.used_percent))
    wanted = devices if isinstance(devices, int) and devices > 0 else len(table)
    if len(free) < wanted:
        log.warning("%d GPUs are free of the %d wanted", len(free), wanted)
    return sorted(gpu.index for gpu in free[:wanted])


@contextmanager
def together(
    function: Callable, *args: object, accelerator: str, devices: int | str | list[int], nodes: int
) -> Iterator[None]:
    """Let all other ranks call a function, while rank 0 runs the block, in one process group.

    Args:
        function: Of a module; it does what the block does, as far as the ranks meet.
        args: Its arguments; they are pickled.
        accelerator: See `processes`.
        devices: See there.
        nodes: See there.

    Raises:
        RankError: Another rank failed first; it tells why.
    """
    size = processes(accelerator, devices, nodes)
    if size == 1:
        yield
        return
    with _threads_kept():
        team = _assemble(size)
        team.trainings += 1
        on_gpus = accelerator != "cpu" and torch.cuda.is_available()
        task = pickle.dumps((on_gpus, function, args))
        team.store.set(_key(team, "task"), task)
        try:
            _await(team, "here", STARTING)
            with _group(team, on_gpus=on_gpus):
                try:
                    yield
                finally:
                    team.store.set(_key(team, "done", 0), "")
                _await(team, "done", FAREWELL)
        except Exception as error:
            reason = _blame_others(team, error)
            try:
                _await(
                    team, "back", DYING
                )  # they have noticed, and are there for the next training
            except RankError:
                dismiss()
            if reason is None:
                raise
            raise RankError(reason) from error
        except BaseException:
            dismiss()
            raise


@contextmanager
def _threads_kept() -> Iterator[None]:
    """Undo that Lightning shares the cores out among the ranks, for whatever comes after."""
    threads, told = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if told is None:
            os.environ.pop("OMP_NUM_THREADS", None)


@contextmanager
def lead_or_follow() -> Iterator[bool]:
    """Yield whether this process leads, at once where it is alone or rank 0.

    Of several processes that torchrun has started, the others first take part in the trainings of
    rank 0, until it leaves the block.
    """
    global _team
    if not all(name in os.environ for name in LAUNCHED) or os.environ["WORLD_SIZE"] == "1":
        yield True
        return
    store, number, size = next(dist.rendezvous("env://"))
    here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    _team = team = Team(number, size, *here, store)
    log.info("rank %d of %d processes, %d of them on this machine", number, size, here[1])
    try:
        if number:
            _follow(team)
            yield False
            return
        try:
            yield True
        finally:
            team.trainings += 1
            store.set(_key(team, "task"), pickle.dumps(None))
            with suppress(RuntimeError):  # the launcher ends whoever does not
                _await(team, "back", FAREWELL)
    finally:
        _team = None


def dismiss() -> None:
    """End the followers that this process has started."""
    global _team
    if _team is None or not _team.followers:
        return
    for process in _team.followers:
        process.kill()
    for process in _team.followers:
        process.wait()
    _team = None


atexit.register(dismiss)


def _assemble(size: int) -> Team:
    """Return a team of this size, all of it alive; start what is missing."""
    global _team
    if _team is not None and _team.size == size and all(p.poll() is None for p in _team.followers):
        return _team
    dismiss()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # no multiprocessing, which would run an unguarded script again; and Ctrl-C is for rank 0 alone
    code = "import ranks, sys; ranks.follow(*map(int, sys.argv[1:]))"
    paths = [str(Path(__file__).parent), *sys.path]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    followers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(store.port), str(number), str(size)],
            env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
        )
        for number in range(1, size)
    ]  # fmt: skip
    _team = Team(0, size, 0, size, store, followers)
    try:
        _await(_team, "ready", STARTING)
    except RankError:
        dismiss()
        raise
    log.info("started %d processes beside this one, to train together", size - 1)
    return _team


def follow(port: int, number: int, size: int) -> None:
    """Take part in the trainings of the process that has started this one."""
    global _team
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    _team = Team(number, size, number, size, store)
    store.set(_key(_team, "ready", number), "")
    with suppress(RuntimeError):  # rank 0 is gone
        _follow(_team)


def _follow(team: Team) -> None:
    logging.disable(logging.CRITICAL)  # rank 0 says it all
    warnings.simplefilter("ignore")
    rank_zero_only.rank = team.rank
    while True:
        team.trainings += 1
        team.store.wait([_key(team, "task")], PATIENCE)
        task = pickle.loads(team.store.get(_key(team, "task")))
        if task is None:
            team.store.set(_key(team, "back", team.rank), "")
            return
        team.store.set(_key(team, "here", team.rank), "")
        on_gpus, function, args = task
        try:
            with _group(team, on_gpus=on_gpus):
                function(*args)
                team.store.set(_key(team, "done", team.rank), "")
                team.store.wait([_key(team, "done", 0)], PATIENCE)
        except Exception:
            log.debug("a training failed, as rank 0 has been told")
        team.store.set(_key(team, "back", team.rank), "")


@contextmanager
def _group(team: Team, *, on_gpus: bool) -> Iterator[None]:
    if on_gpus:
        torch.cuda.set_device(team.local_rank)
    hook = sys.excepthook  # which the group would wrap once more
    dist.distributed_c10d._world.group_count = 0  # a group that could not form would leave a gap
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
        store=dist.PrefixStore(_key(team, "group"), team.store),
        rank=team.rank, world_size=team.size, timeout=STUCK,
    )  # fmt: skip
    try:
        dist.barrier()  # nobody leaves while others are still finding each other
        yield
    except BaseException:
        with suppress(RuntimeError):  # before the others notice, and fail, too
            team.store.set(_key(team, "error", team.rank), traceback.format_exc())
            team.store.compare_set(_key(team, "failed"), "", str(team.rank))
        raise
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


def _await(team: Team, word: str, seconds: float) -> None:
    """Wait until all followers have said a word.

    Raises:
        RankError: One of them is gone, or silent.
    """
    words, give_up = [_key(team, word, r) for r in range(1, team.size)], time.monotonic() + seconds
    while not team.store.check(words):
        if gone := _gone(team):
            raise RankError(gone)
        if time.monotonic() > give_up:
            raise RankError(
                f"processes that were to train with this one have not answered for {seconds:g} s; "
                "their messages are where this one writes its own"
            )
        time.sleep(0.02)


def _gone(team: Team) -> str | None:
    for number, process in enumerate(team.followers, start=1):
        if process.poll() is not None:
            return (
                f"the process of rank {number} ended (exit code {process.returncode}), as it does "
                "when memory runs out; fewer DEVICES, a smaller batch or fewer WORKERS take less"
            )
    return None


def _key(team: Team, *names: object) -> str:
    return "/".join(map(str, (team.trainings, *names)))


def _blame_others(team: Team, error: Exception) -> str | None:
    """Tell which other rank failed before this one, and why; None: this one was the first."""
    if not isinstance(error, RuntimeError):  # all ranks fail so, or this one alone
        return None
    with suppress(RuntimeError):
        first = team.store.compare_set(_key(team, "failed"), "", "0").decode()
        if first != "0":
            text = team.store.get(_key(team, "error", first)).decode()
            return f"rank {first} failed first:\n{text}"
    give_up = time.monotonic() + DYING
    while (gone := _gone(team)) is None and time.monotonic() < give_up:
        time.sleep(0.02)
    return gone
