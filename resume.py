"""A training that was interrupted goes on where it was, and ends as if nothing had happened.

`checkpoints/last.ckpt` holds all that the rest of a training depends on: weights and their average,
optimiser and schedule, the place in the epoch and how the epoch was drawn, what was measured so
far, the clock, random state. It is written between two steps, so that a training that goes on
neither repeats a tile nor leaves one out.
"""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

import fileio
from datasets import TileBatches

log = logging.getLogger(__name__)

# It is meant to be there.
warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")

SAVE_SECONDS = 180.0  # between two checkpoints within an epoch
COUNTERS = ("ready", "started", "processed", "completed")  # Lightning's, of epochs and batches


class LastCheckpoint(pl.Callback):
    """Keeps `last.ckpt`: at every epoch's begin, within long ones every few minutes, at the end.

    Args:
        path: Of the file.
        made_from: What the training is made from; the file is of use to no other.
        batches: Deals out the training tiles.

    Attributes:
        record: What the file said, until the training has gone on; see `read_last`.
    """

    def __init__(self, path: Path, made_from: str, batches: TileBatches) -> None:
        """Begin with the first epoch."""
        self.path, self.made_from, self.batches = path, made_from, batches
        self.record: dict[str, Any] | None = None
        self.saved_at = 0.0  # s of training
        self._place: tuple[int, int] | None = None  # epoch and its next step, while saving

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up where the training was."""
        if self.record is None:
            return
        # Lightning's own way holds for the end of an epoch, and then not for all of its counters
        set_progress(trainer, self.record["epoch"], self.record["step"])
        pl_module.seconds = self.saved_at = self.record["seconds"]
        pl_module.sums["train"] = self.record["losses"]
        trainer.callback_metrics.update(self.record["metrics"])

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, now that all of the epoch before is written down."""
        if self.record is not None:
            if not self.record["place"]:
                self._go_on()
        elif trainer.current_epoch:
            self._save(trainer, pl_module, 0)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Save every few minutes."""
        if self.record is not None:
            fetcher = trainer.fit_loop._data_fetcher
            fetcher.fetched += self.record["place"]
            fetcher.done = fetcher.fetched >= fetcher.length
            progress = trainer.fit_loop.epoch_loop.batch_progress
            progress.is_last_batch = fetcher.done
            for name in COUNTERS:
                now = getattr(progress.current, name)
                setattr(progress.current, name, now + self.record["place"])
            self._go_on()
        elif batch_idx and pl_module.seconds - self.saved_at >= SAVE_SECONDS:
            self._save(trainer, pl_module, batch_idx)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that there is nothing left to train."""
        if trainer.is_global_zero:
            record = {"made_from": self.made_from, "finished": True,
                      "epoch": trainer.current_epoch, "step": trainer.global_step,
                      "seconds": pl_module.seconds}  # fmt: skip
            with fileio.atomic_path(self.path) as temporary:
                torch.save({"resume": record}, temporary)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what Lightning does not know of, or leaves out."""
        if self._place is None:  # the best one, not the last
            return
        epoch, place = self._place
        checkpoint["resume"] = {
            "made_from": self.made_from,
            "finished": False,
            "epoch": epoch,
            "place": place,
            "step": trainer.global_step,
            "seconds": pl_module.seconds,
            "losses": pl_module.sums["train"],
            "metrics": dict(trainer.callback_metrics),
            "batches": self.batches.state_dict(),
            "random": random_state(),
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take note of it."""
        self.record = record = checkpoint["resume"]
        self.batches.resume(record["batches"], record["epoch"], record["place"])
        for name, state in checkpoint["callbacks"].items():
            if name.startswith(ModelCheckpoint.__name__):
                move_best(state, self.path.parent)
        del checkpoint["loops"]  # see `on_train_start`

    def _go_on(self) -> None:
        set_random_state(self.record["random"])
        self.record = None

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule, place: int) -> None:
        self._place = trainer.current_epoch, place
        trainer.save_checkpoint(self.path)
        self._place, self.saved_at = None, pl_module.seconds


def set_progress(trainer: pl.Trainer, epoch: int, step: int) -> None:
    """Tell a trainer how many epochs and steps were made, for its records and schedules."""
    for name in COUNTERS:
        setattr(trainer.fit_loop.epoch_progress.current, name, epoch)
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped = step
    steps = loop.automatic_optimization.optim_progress.optimizer.step.total
    steps.ready = steps.completed = step


def move_best(state: dict[str, Any], folder: Path) -> None:
    """Tell the state of a `ModelCheckpoint` that its folder is another one now."""
    state["dirpath"] = str(folder)
    for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[name] = state[name] and str(folder / Path(state[name]).name)
    state["best_k_models"] = {
        str(folder / Path(path).name): score for path, score in state["best_k_models"].items()
    }


def read_last(path: Path, made_from: str) -> dict[str, Any] | None:
    """Return what `last.ckpt` says of a training, or None where the training has to start over.

    Returns:
        `finished`, numbers of whole epochs, `epoch`, and of steps made, `step`, and `seconds` of
        training.
    """
    fileio.remove_strays(path.parent)
    if not path.exists():
        return None
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)["resume"]
        known = record["made_from"]
    except Exception as error:  # whatever damage does to a file
        log.warning("%s is damaged (%s); the training starts over", path, error)
        return None
    if known != made_from:
        log.warning("%s is of another training; this one starts over", path)
        return None
    return {name: record[name] for name in ("finished", "epoch", "step", "seconds")}


def random_state() -> dict[str, Any]:
    """Return the state of all random generators, in plain containers."""
    kind, keys, *place = np.random.get_state()  # noqa: NPY002 - whoever uses it
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    state["numpy"] = (kind, torch.from_numpy(keys.astype(np.int64)), *place)
    return state | {"cuda": torch.cuda.get_rng_state_all()}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set what `random_state` returned."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    kind, keys, *place = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *place))  # noqa: NPY002
    # another machine, or another worker of this one, may see fewer
    for device, known in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(known, device)
