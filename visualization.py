"""Tiles of segmentation as pictures, drawn while a model is trained: what it sees and says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

import fileio
import implot
import imutils
import maps
from datasets import Batch, collate
from LargeRasterSeg import LargeRasterSegModel
from ModelConfig import VisualizationConfig


class TileGallery(pl.Callback):
    """Draws tiles of some batches, with labels, predictions and the probability of every class.

    A picture is named after the occasion, the epoch, the batch, and the tile in it. Nothing random
    is drawn and no weight is touched, so that a training is the same with pictures and without.

    Args:
        conf: Which tiles, and when.
        folder: Where the pictures go.
    """

    def __init__(self, conf: VisualizationConfig, folder: Path) -> None:
        """Keep both; the folder is made with the first picture."""
        self.conf, self.folder = conf, Path(folder)
        self.batches = range(*conf.batch_range) if conf.batch_range else range(0)
        self.drawn_at = -1  # epoch of the last checkpoint that was drawn
        self.best: Tensor | None = None  # score of the best checkpoint so far

    def setup(self, trainer: pl.Trainer, pl_module: LargeRasterSegModel, stage: str) -> None:
        """Learn what the classes are called and painted."""
        labels, path = pl_module.labels, self.conf.colormap
        known = fileio.read_colormap(path) if path else {}
        self.names, self.colors = maps.name_colors(labels, known, imutils.class_colors(labels))

    def on_train_start(self, trainer: pl.Trainer, pl_module: LargeRasterSegModel) -> None:
        """Draw what a model says that has learnt nothing yet."""
        if self.conf.at_init and trainer.global_step == 0:
            self._draw_dataset("init", self.conf.at_init_dataset, trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: LargeRasterSegModel,
        outputs: object,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Draw training tiles, as they were turned and varied."""
        if self.conf.at_train:
            self._draw("train", batch, batch_idx, trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: LargeRasterSegModel,
        outputs: object,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw validation tiles in every epoch."""
        if self.conf.at_evaluation and trainer.state.fn == "fit":
            self._draw("validation", batch, batch_idx, trainer, pl_module)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: LargeRasterSegModel,
        outputs: object,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw test tiles, at the end of the training."""
        if self.conf.at_evaluation:
            self._draw("test", batch, batch_idx, trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: LargeRasterSegModel) -> None:
        """Draw by the weights of a checkpoint that was kept in the epoch before."""
        self._draw_checkpoint(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: LargeRasterSegModel) -> None:
        """Do the same after the last epoch."""
        self._draw_checkpoint(trainer, pl_module)

    def _draw_checkpoint(self, trainer: pl.Trainer, model: LargeRasterSegModel) -> None:
        (keeper,) = [c for c in trainer.checkpoint_callbacks if type(c) is ModelCheckpoint]
        score = keeper.best_model_score
        if not (self.conf.at_checkpoint and self.batches) or score is None or score == self.best:
            return
        self.best = score
        kept = torch.load(keeper.best_model_path, map_location="cpu", weights_only=True)
        epoch, gap = kept["epoch"], self.conf.at_ckpt_min_ep_diff
        if self.drawn_at >= 0 and epoch - self.drawn_at < gap:
            return
        self.drawn_at = epoch
        prefix = "network."
        state = {n.removeprefix(prefix): v.to(model.device)
                 for n, v in kept["state_dict"].items() if n.startswith(prefix)}  # fmt: skip
        name = self.conf.at_ckpt_dataset
        self._draw_dataset("checkpoint", name, trainer, model, state, epoch)

    def state_dict(self) -> dict[str, object]:
        """Return what a training that goes on needs to know."""
        return {"drawn_at": self.drawn_at, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Take it."""
        self.drawn_at, self.best = state_dict["drawn_at"], state_dict["best"]

    def _draw_dataset(
        self,
        occasion: str,
        name: str,
        trainer: pl.Trainer,
        model: LargeRasterSegModel,
        state: Mapping[str, Tensor] | None = None,
        epoch: int | None = None,
    ) -> None:
        """Draw batches of a split, as they lie on the ground."""
        dataset, conf = getattr(trainer.datamodule, name), model.conf
        size = conf.batch_size if name == "train" else conf.eval_batch_size or conf.batch_size
        for number in self.batches:
            rows = range(len(dataset))[number * size : (number + 1) * size]
            if not rows:
                break
            images, targets = collate([dataset[row] for row in rows])
            self._draw(occasion, (images, targets), number, trainer, model, state, epoch)

    def _draw(
        self,
        occasion: str,
        batch: Batch,
        batch_idx: int,
        trainer: pl.Trainer,
        model: LargeRasterSegModel,
        state: Mapping[str, Tensor] | None = None,
        epoch: int | None = None,
    ) -> None:
        images, targets = batch
        if batch_idx not in self.batches or not len(images):
            return
        found = _probabilities(model, images, state)
        epoch = trainer.current_epoch if epoch is None else epoch
        stem = f"{occasion}_epoch_{epoch:03}_batch_{batch_idx:04}"
        for number, (image, target, shares) in enumerate(
            zip(images.float().cpu().numpy(), targets, found, strict=True)
        ):
            truth = target["mask"].cpu().numpy().astype(np.uint8)
            pictures = implot.draw_tile(image, truth, shares, self.colors)
            title = f"{occasion}, epoch {epoch}, batch {batch_idx}, tile {number}"
            self._write(f"{stem}_tile_{number:02}", title, pictures)

    def _write(self, stem: str, title: str, pictures: implot.TilePictures) -> None:
        if self.conf.grid:
            figure = implot.plot_tile_prediction(
                pictures, self.names, self.colors, heatmaps=self.conf.heatmaps, title=title
            )
            with fileio.atomic_path(self.folder / f"{stem}.png") as temporary:
                figure.savefig(temporary, format="png", dpi=100)
            plt.close(figure)
            return
        for name, picture in _single(pictures, self.names, heatmaps=self.conf.heatmaps):
            with fileio.atomic_path(self.folder / f"{stem}_{name}.png") as temporary:
                Image.fromarray(picture).save(temporary, format="png")


def _single(
    pictures: implot.TilePictures, names: Sequence[str], *, heatmaps: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the pictures of a tile with their names, which are fit for files."""
    yield from zip(("input", "label", "prediction"), pictures[:3], strict=True)
    for number, (name, heat) in enumerate(zip(names, pictures.heatmaps, strict=True)):
        if heatmaps:
            yield f"heatmap_{number}_{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}", heat


@torch.no_grad()
def _probabilities(
    model: LargeRasterSegModel, images: Tensor, state: Mapping[str, Tensor] | None
) -> np.ndarray:
    """Return what a model, perhaps with other weights, says of tiles, float32 (B, C, H, W)."""
    training, network = model.network.training, model.network
    network.eval()  # else batches would move the statistics of its norms
    try:
        seen = images.to(model.device)
        logits = network(seen) if state is None else (
            torch.func.functional_call(network, dict(state), (seen,))
        )  # fmt: skip
    finally:
        network.train(training)
    return logits.softmax(dim=1).float().cpu().numpy()
