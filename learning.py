"""What learning has in common whatever is learnt: optimiser, schedule, averaging, records.

A task is a subclass of `TileModel`, which says how a batch is learnt and how ground is measured.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, WeightAveraging
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor, nn
from typing_extensions import override

import fileio
import ranks
from datasets import Batch
from ImageData import InputError
from ModelConfig import ModelConfig, TrainConfig
from networks import DataContract, read_checkpoint
from optimizers import OPTIMIZERS

log = logging.getLogger(__name__)

# Lightning asks torch for tree leaves in a way torch is about to change; nothing a user can mend.
warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
# What is logged at the end of an epoch is the same on all ranks already.
warnings.filterwarnings("ignore", message=".*sync_dist=True.*")

__version__ = "0.1.0"

SWA_SHARE = 0.25  # of the training, at its end
LINE_SECONDS = 60  # s, least time between two lines of progress within an epoch or a measurement
DIVERGED = 1e4  # a loss that no network in its senses has
VIEWS = {  # of tiles -> quarter turns, mirrored
    "none": ((0, False),),
    "flips": ((0, False), (0, True), (2, True), (2, False)),
    "turns": ((0, False), (1, False), (2, False), (3, False)),
    "all": tuple((turns, mirrored) for mirrored in (False, True) for turns in range(4)),
}
STAGES = {"train": "train_", "validation": "val_", "test": "test_"}  # -> prefix of logged names
FUSED = ("adam", "adamw", "sgd")  # have one kernel for all weights on every device
WITH_MOMENTUM = ("rmsprop", "sgd")


class DivergedError(RuntimeError):
    """Training cannot go on: the loss is no number any more.

    Attributes:
        tiles: Rows of the training index that the batch was made of; those that alone give no
            number, or all of them.
    """

    def __init__(self, message: str, tiles: Sequence[int]) -> None:
        """Keep both."""
        super().__init__(message)
        self.tiles = list(tiles)


def resolve_precision(precision: str, accelerator: str, *, measured: bool = True) -> str:
    """Turn "auto" into "bf16-mixed" where the hardware gains by it, else "32-true".

    A processor says whether it computes in bfloat16; whether it learns faster so is measured, once,
    unless the choice is to be the same whenever it is made.
    """
    if precision != "auto":
        return precision
    if accelerator not in ("cpu", "auto", "gpu", "cuda"):
        return "32-true"
    if accelerator != "cpu" and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        flags = torch.cpu.get_capabilities()
        native = bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))
        native = native and (not measured or _bf16_gain() > 1.1)
    return "bf16-mixed" if native else "32-true"


@lru_cache(maxsize=1)
def _bf16_gain() -> float:
    """Measure how many times faster a convolution learns in bfloat16 than in float32."""
    with torch.random.fork_rng(devices=[]):
        convolution = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
        images = torch.rand(4, 64, 64, 64).to(memory_format=torch.channels_last)
    seconds = {"bf16-mixed": [], "32-true": []}
    for _ in range(5):
        for precision, times in seconds.items():
            start = time.perf_counter()
            with autocast("cpu", precision):
                loss = convolution(images).float().mean()
            loss.backward()
            times.append(time.perf_counter() - start)
    # the least of each: what others run meanwhile is not ours
    gain = min(seconds["32-true"]) / min(seconds["bf16-mixed"])
    log.info("this processor learns %.1f times as fast in bfloat16 as in float32", gain)
    return gain


def autocast(device_type: str, precision: str) -> torch.autocast:
    """Return the context in which a precision that `resolve_precision` gave computes."""
    kind = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    return torch.autocast(device_type, kind or torch.bfloat16, enabled=kind is not None)


class TileModel(pl.LightningModule):
    """A network that learns tiles, and how it does so; base of the tasks' models.

    Args:
        labels: Names of the classes, by class id.
        conf: Configuration, or what its `to_dict` returned.
        contract: What the data is like, or that as a dictionary.

    All of it is saved in every checkpoint, so that `load_from_checkpoint(path)` needs nothing else.

    Attributes:
        network: The network; a subclass makes it.
        sums: Of an epoch, by stage: the sums over its tiles of `LOSSES`, tiles, and those among
            them that a subclass counts.
        seconds: Of training, until the last step began; the same on all ranks.
    """

    TASK: ClassVar[str]  # as `ModelConfig.task`
    BEST_BY: ClassVar[str]  # the epoch and the trial that are kept; never by the test's
    RANK_BY: ClassVar[str]  # the test's value by which trials are listed
    LOSSES: ClassVar[tuple[str, ...]]  # the sum, and its parts
    SHOWN: ClassVar[tuple[str, ...]]  # values in the line of an epoch
    network: nn.Module

    def __init__(
        self,
        labels: Iterable[str],
        conf: ModelConfig | Mapping[str, Any],
        contract: DataContract | Mapping[str, Any],
        code_version: str = __version__,
    ) -> None:
        """Keep what a checkpoint says of itself."""
        super().__init__()
        self.labels = list(labels)
        self.conf = conf if isinstance(conf, ModelConfig) else ModelConfig.from_dict(conf)
        self.contract = contract if isinstance(contract, DataContract) else DataContract(**contract)
        self.save_hyperparameters(
            {"label_set": self.labels, "conf": self.conf.to_dict(), "task": self.TASK,
             "contract": _plain(asdict(self.contract)), "code_version": code_version}
        )  # fmt: skip
        sums = len(self.LOSSES) + 2
        self.sums = {stage: torch.zeros(sums, dtype=torch.float64) for stage in STAGES}
        self.seconds = 0.0
        self.rate_drops = 0  # on plateaus, see `RateDrops`
        self.batch_idx = 0  # of the batch that is being measured

    # -- what a task adds ----------------------------------------------------------------------

    def load_pretrained(self) -> None:
        """Load the weights that the configuration starts from, before training."""
        raise NotImplementedError

    def _common_step(self, batch: Batch, stage: str) -> tuple[Tensor, Tensor]:
        """Return the loss, and `LOSSES` with two counts of tiles, float64, on the CPU.

        The counts are of all tiles, and of those that the task wants to know of.
        """
        raise NotImplementedError

    def _loss_of_tile(self, images: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of a single tile (1, bands, H, W)."""
        raise NotImplementedError

    def _measure(self, stage: str) -> None:
        """Measure and log what was collected of a stage."""
        raise NotImplementedError

    def tile_difficulty(self) -> Tensor:
        """Return how wrong the network was on each tile of the last training batch, (B,)."""
        raise NotImplementedError

    def learnt_values(self) -> dict[str, float]:
        """Return numbers that the network has learnt of the data, by name."""
        return {}

    def describe(self) -> str:
        """Say in a line what the network is."""
        raise NotImplementedError

    @staticmethod
    def _architecture(conf: ModelConfig, contract: Mapping[str, Any]) -> dict[str, Any]:
        """Return what decides which weights fit, of a model with these settings."""
        return conf.architecture()

    def _read_start(self, path: str) -> tuple[list[str], dict[str, Tensor]]:
        """Return the classes and weights of the checkpoint to start from.

        Raises:
            InputError: It cannot be read, or is of another task or architecture.
        """
        known, state = read_checkpoint(path)
        if (task := known.get("task", "detection")) != self.TASK:
            raise InputError(
                f"{path} is a model of {task}; INIT_FROM must name one of {self.TASK}, or be None"
            )
        contract, labels = known["contract"], known["label_set"]
        ours = self._architecture(self.conf, _plain(asdict(self.contract)))
        theirs = self._architecture(ModelConfig.from_dict(known["conf"]), contract)
        if differing := [
            f"{name} = {value!r} (INIT_FROM has {theirs[name]!r})"
            for name, value in ours.items()
            if theirs[name] != value
        ]:
            raise InputError(
                f"{path} is of another architecture: {', '.join(differing)}; set what it has, by "
                "parameters or MODEL_OPTIONS, or INIT_FROM = None"
            )
        log.info("starting from %s, of bands %s and classes %s", path, contract["bands"], labels)
        if contract["split_hash"] != self.contract.split_hash:
            log.warning(
                "%s was trained on other blocks of ground than this run splits into; if they are "
                "of the same rasters, it may have seen what is test ground here", path,
            )  # fmt: skip
        return labels, state

    # -- steps ---------------------------------------------------------------------------------

    def _add_to_epoch(self, stage: str, losses: Tensor, tiles: Tensor) -> None:
        self.sums[stage] += torch.cat([losses * tiles[0], tiles])

    def _mean_losses(self, stage: str, after: str = "") -> int:
        """Log the mean losses of the tiles of an epoch; return the second count of tiles."""
        sums = ranks.summed(self.sums[stage].clone()) if stage != "train" else self.sums[stage]
        self.sums[stage] = torch.zeros_like(sums)
        means = (sums[: len(self.LOSSES)] / sums[-2]).tolist()
        names = (f"{STAGES[stage]}{name}{after}" for name in self.LOSSES)
        self.log_dict(dict(zip(names, means, strict=True)))
        return int(sums[-1])

    def _log_values(self, stage: str, values: Mapping[str, float] | None) -> dict[str, float]:
        """Log what rank 0 measured on all ranks; return it."""
        values = ranks.told(values)
        prefix = "" if stage == "test" else STAGES[stage]  # the test's names are the product's
        self.log_dict({f"{prefix}{name}": value for name, value in values.items()})
        return values

    def _measures(self, stage: str) -> bool:
        if stage == "validation" and self.trainer.state.fn == "fit":
            epoch = self.current_epoch + 1
            # the first, so that there is a best one; the last, whatever ends the training
            outermost = epoch in (1, self.trainer.max_epochs) or self.trainer.should_stop
            return outermost or epoch % self.conf.validation.pr_compute_interval == 0
        return stage != "train"

    def _collects(self, stage: str) -> bool:
        """Tell whether a batch is measured; while training, some may be left out."""
        every = self.conf.validation.batch_metrics
        training = stage == "validation" and self.trainer.state.fn == "fit"
        return self._measures(stage) and not (training and self.batch_idx % every)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch.

        Raises:
            DivergedError: It is no number, or grew beyond all measure, on whichever rank.
        """
        loss, values = self._common_step(batch, "train")
        # what ranks must agree on, in one go: losses, so that all stop, and the clock of rank 0
        seconds = 0.0 if ranks.rank() else time.monotonic() - self._started
        values = ranks.summed(torch.cat([values, torch.tensor([seconds], dtype=torch.float64)]))
        self.seconds = float(values[-1])
        losses, tiles = values[:-3] / ranks.count(), values[-3:-1]
        if not losses[0] < DIVERGED:
            raise self._diverged(batch, float(losses[0]))
        self._add_to_epoch("train", losses, tiles)
        named = dict(zip(self.LOSSES, losses.tolist(), strict=True))
        self.log_dict({f"train_{name}_step": value for name, value in named.items()})
        return loss

    def on_after_backward(self) -> None:
        """Make ranks agree on what they learnt without gradients, which those needed until now."""
        ranks.average(self._moving_buffers())

    def _moving_buffers(self) -> list[Tensor]:
        """Return what a network learns from its batches without gradients."""
        norms = [m for m in self.network.modules() if isinstance(m, nn.BatchNorm2d)]
        return [b for norm in norms for b in (norm.running_mean, norm.running_var)]

    @torch.no_grad()
    def _diverged(self, batch: Batch, loss: float) -> DivergedError:
        images, targets = batch
        self.network.eval()  # ranks look on their own
        guilty = []
        for i, target in enumerate(targets):
            if not self._loss_of_tile(images[i : i + 1], target) < DIVERGED:
                guilty.append(i)
        bad_pixels = [i for i in guilty if not images[i].isfinite().all()]
        rows = [int(target.get("tile", i)) for i, target in enumerate(targets)]
        shares = ranks.gathered(
            ([rows[i] for i in bad_pixels], [rows[i] for i in guilty], rows)
        )  # fmt: skip
        bad, guilty, rows = (list(itertools.chain(*part)) for part in zip(*shares, strict=True))
        why = "some pixels are no numbers" if bad else "the learning rate may be too high"
        rate = self.optimizers().param_groups[0]["lr"]
        return DivergedError(
            f"the loss is {loss:.3g} in training step {self.global_step + 1}, at a learning rate "
            f"of {rate:.2g}: {why}",
            bad or guilty or rows,
        )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Take note of the loss of a batch and collect what it shows."""
        self._evaluation_step(batch, "validation", batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Take note of the loss of a batch and collect what it shows."""
        self._evaluation_step(batch, "test", batch_idx)

    def _evaluation_step(self, batch: Batch, stage: str, batch_idx: int) -> None:
        self.batch_idx = batch_idx
        if batch[1]:  # of few tiles, a rank gets none
            _, values = self._common_step(batch, stage)
            self._add_to_epoch(stage, *values.split([len(self.LOSSES), 2]))

    def on_train_start(self) -> None:
        """Say where the training runs, and start the clock of its progress lines."""
        limit = self.conf.train.max_minutes
        log.info(
            "training on %s in %s: %d steps%s",
            self.device, self.trainer.precision, self.trainer.estimated_stepping_batches,
            f", or {limit:g} minutes" if limit else "",
        )  # fmt: skip
        self._started = time.monotonic() - self.seconds

    def on_train_batch_end(self, outputs: object, batch: Batch, batch_idx: int) -> None:
        """Stop when the time is over; validation follows."""
        if self.share_done() >= 1:
            self.trainer.should_stop = True

    def share_done(self, step: int | None = None) -> float:
        """Tell how much of the training is done at a step, by steps or by the clock."""
        step = self.global_step if step is None else step
        done = step / max(1, int(self.trainer.estimated_stepping_batches))
        if limit := self.conf.train.max_minutes:
            done = max(done, self.seconds / (60 * limit))
        return done

    def on_train_epoch_end(self) -> None:
        """Log the losses and a line of progress, and agree on whether to stop."""
        self._mean_losses("train", "_epoch")
        self.trainer.should_stop = ranks.told(self.trainer.should_stop)  # a callback of rank 0's
        done, epochs = self.current_epoch + 1, self.trainer.max_epochs
        elapsed = time.monotonic() - self._started
        known = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        names = ["val_loss", *(self.SHOWN if self._measures("validation") else [])]
        shown = [f"{name} {known[name]:.3f}" for name in names if name in known]
        log.info(
            "epoch %d of %d: %s; %.0f s, about %.0f s to go", done, epochs, ", ".join(shown),
            elapsed, elapsed / self.share_done() * (1 - min(1, self.share_done())),
        )  # fmt: skip

    def on_validation_epoch_end(self) -> None:
        """Measure the validation ground, every `pr_compute_interval` epochs and when asked to."""
        self._mean_losses("validation")
        if self._measures("validation"):
            self._measure("validation")

    def on_test_epoch_end(self) -> None:
        """Measure the test ground."""
        self._mean_losses("test")
        self._measure("test")

    def configure_optimizers(self) -> dict[str, Any]:
        """Make the optimiser, and the schedule of its rate, which changes with every step."""
        train = self.conf.train
        weights = [p for p in self.parameters() if p.requires_grad and p.ndim > 1]
        others = [p for p in self.parameters() if p.requires_grad and p.ndim <= 1]
        # biases and norms are not decayed, they carry no capacity to shrink
        groups = [
            {"params": weights, "weight_decay": train.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        options = {"lr": train.lr}
        if train.optimizer in FUSED:
            # with gradient scaling it would unscale after the clipping
            options["fused"] = self.trainer.precision != "16-mixed"
        if train.optimizer in WITH_MOMENTUM:
            options["momentum"] = train.momentum
        optimizer = OPTIMIZERS[train.optimizer](groups, **options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _rate(self, step: int) -> float:
        """Return the learning rate of a step, as a share of its peak."""
        train, done = self.conf.train, self.share_done(step + 1)
        if train.step_size is None and train.plateau_patience is None:
            return warm_up_and_cosine(done, train.warmup_share)
        drops = self.rate_drops
        if train.step_size is not None:
            total = max(1, int(self.trainer.estimated_stepping_batches))
            drops = step * self.trainer.max_epochs // total // train.step_size
        warm = min(1.0, done / train.warmup_share) if train.warmup_share else 1.0
        return warm * train.gamma**drops

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm; Lightning's own way refuses fused optimisers in mixed precision."""
        nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def create_trainer(
        self,
        logger: Any = None,  # noqa: ANN401 - whatever Lightning takes
        callbacks: Sequence[pl.Callback] = (),
        *,
        progress: bool = False,
        root_dir: Path | None = None,
    ) -> pl.Trainer:
        """Return a trainer set up by the configuration, for the ranks that there are.

        Args:
            logger: One or several Lightning loggers, or None.
            callbacks: Further callbacks.
            progress: Show bars.
            root_dir: Where Lightning may write.
        """
        # measured where it is "auto", and so perhaps not the same on every rank
        precision = ranks.told(resolve_precision(self.conf.precision, self.conf.accelerator))
        train = self.conf.train
        own = [RunningAverage(train)] if train.averaging != "none" else []
        own += [] if train.plateau_patience is None else [RateDrops(train.plateau_patience)]
        own += [] if progress else [ProgressLines()]
        if train.patience is not None:
            # Lightning counts epochs, in which the last measurement still stands
            epochs = train.patience * self.conf.validation.pr_compute_interval
            own.append(EarlyStopping(self.BEST_BY, mode="max", patience=epochs))
        where = ranks.lightning_devices(self.conf.devices)
        where["plugins"].append(AtomicCheckpoints())
        trainer = pl.Trainer(
            **where,
            max_epochs=self.conf.train.epochs,
            accelerator=self.conf.accelerator,
            precision=precision,
            gradient_clip_val=self.conf.train.gradient_clip,
            logger=logger or False,
            callbacks=[*own, *callbacks],
            deterministic="warn",
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            enable_progress_bar=progress,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=root_dir,
        )
        # Lightning's would wait for the end of a step, for other ranks, and for Slurm
        trainer._signal_connector.register_signal_handlers = lambda: None
        return trainer


def warm_up_and_cosine(done: float, warmup: float) -> float:
    """Return the learning rate, as a share of its peak, when a share of the training is done.

    It rises linearly during the warm-up (a share of the training), then falls along half a cosine
    to 0.01.
    """
    if done < warmup:
        return done / warmup
    falling = min(1.0, (done - warmup) / max(1 - warmup, 1e-9))
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * falling))


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, beside where they are to be."""

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Path | str, storage_options: object = None
    ) -> None:
        with fileio.atomic_path(Path(path)) as temporary:
            torch.save(checkpoint, temporary)


class RunningAverage(WeightAveraging):
    """Measures and keeps an average of the weights of many steps, which is better than the last.

    `ema`: exponential, reaching over a share of all steps, less at the beginning. `swa`: equal
    weights, over the last quarter of the training.

    References:
        Izmailov et al. 2018, Averaging weights leads to wider optima; Tarvainen and Valpola 2017,
        Mean teachers, for the exponential one.
    """

    def __init__(self, train: TrainConfig) -> None:
        """Keep what to average."""
        self.ema, self.share = train.averaging == "ema", train.averaging_share
        self.steps, self.weight = 0, 1.0  # how many are averaged; what the next one weighs
        super().__init__(multi_avg_fn=self._update)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Keep the average where the module will be, and know the module."""
        self._device, self.module = trainer.strategy.root_device, pl_module
        super().setup(trainer, pl_module, stage)

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"steps": self.steps}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.steps = state_dict["steps"]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the module the average, and forget it: what is saved later is the module."""
        super().on_train_end(trainer, pl_module)
        self._average_model = None

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Take part after every step, and find out what it weighs."""
        if step_idx is None:
            return False
        done = max(self.module.share_done(), 1e-6)
        if self.ema:
            reach = self.share * (step_idx + 1) / done  # steps that the share of the training has
            self.weight = 1 / max(1.0, min(reach, (step_idx + 10) / 10))
        else:
            self.steps += done > 1 - SWA_SHARE  # until then, what is measured is the last step
            self.weight = 1 / max(1, self.steps)
        return True

    def _update(self, average: list[Tensor], current: list[Tensor], updates: Tensor) -> None:
        if average[0].is_floating_point():
            torch._foreach_lerp_(average, current, self.weight)
        else:  # counters
            torch._foreach_copy_(average, current)


class RateDrops(pl.Callback):
    """Counts how often the learning rate is to fall, as measurements stay without a better one.

    torch's own schedule would not know of the warm-up, nor of epochs that are not measured.

    Args:
        patience: Measurements without a better one after which it falls.
    """

    def __init__(self, patience: int) -> None:
        """Begin without any measurement."""
        self.patience, self.best, self.waited, self.drops = patience, -math.inf, 0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: TileModel) -> None:
        """Tell the module what was counted before an interruption."""
        pl_module.rate_drops = self.drops

    def on_validation_end(self, trainer: pl.Trainer, pl_module: TileModel) -> None:
        """Compare a measurement with the best one so far; it is the same on all ranks."""
        if trainer.state.fn != "fit" or not pl_module._measures("validation"):
            return
        value = float(trainer.callback_metrics[pl_module.BEST_BY])
        better = value > self.best
        self.best, self.waited = (value, 0) if better else (self.best, self.waited + 1)
        if self.waited >= self.patience:
            self.waited, self.drops = 0, self.drops + 1
            pl_module.rate_drops = self.drops
            log.info("no better %s in %d measurements: the learning rate falls to %.3g of its peak",
                     pl_module.BEST_BY, self.patience,
                     pl_module.conf.train.gamma**self.drops)  # fmt: skip

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "drops": self.drops}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.waited, self.drops = (
            state_dict[name] for name in ("best", "waited", "drops")
        )


class ProgressLines(pl.Callback):
    """Log how far a long training or measurement is, at about every tenth of it."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start the clock."""
        self._start(0, 0.0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: TileModel) -> None:
        """Start the clock of a training, which may go on from where it was stopped."""
        self._start(trainer.global_step, pl_module.share_done())

    def _start(self, done: int, share: float) -> None:
        self.started = self.told = time.monotonic()
        self.first, self.first_share, self.tenth = done, share, int(10 * share)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: TileModel, *_: object) -> None:
        """Count steps, of which the clock may allow less than all."""
        total = int(trainer.estimated_stepping_batches)
        self._tell("training", trainer.global_step, total, min(1.0, pl_module.share_done()))

    def on_validation_batch_end(
        self, trainer: pl.Trainer, model: pl.LightningModule, outputs: object, batch: Batch,
        batch_idx: int, *_: object,
    ) -> None:  # fmt: skip
        """Count batches, but not those within a training."""
        if trainer.state.fn == "validate":
            self._tell("validation", batch_idx + 1, int(sum(trainer.num_val_batches)))

    def on_test_batch_end(
        self, trainer: pl.Trainer, model: pl.LightningModule, outputs: object, batch: Batch,
        batch_idx: int, *_: object,
    ) -> None:  # fmt: skip
        """Count batches."""
        self._tell("test", batch_idx + 1, int(sum(trainer.num_test_batches)))

    def _tell(self, stage: str, done: int, total: int, share: float | None = None) -> None:
        share = done / total if share is None else share
        now, tenth = time.monotonic(), int(10 * share)
        if tenth == self.tenth or now - self.told < LINE_SECONDS or share <= self.first_share:
            return
        self.told, self.tenth = now, tenth
        elapsed = now - self.started
        log.info(
            "%s: %d of %d batches, %.3g per second, about %.0f s to go", stage, done, total,
            (done - self.first) / elapsed, elapsed * (1 - share) / (share - self.first_share),
        )  # fmt: skip


def _plain(value: object) -> object:
    # checkpoints hold plain containers only, so that they load without running code
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
