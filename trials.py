"""One training: what all trials of a search share, and a trial from its tiles to its test."""

from __future__ import annotations

import copy
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

import annotations
import fileio
import imutils
import masks
import ranks
import splits
import tilecache
import tiling
from datasets import HardTiles, TileDataModule, TileDataset, class_ids
from ImageData import BOX_COLUMNS, CENTER_COLUMNS, ImageData, InputError, LabelSource
from LargeRasterOR import LargeRasterORModel
from LargeRasterSeg import LargeRasterSegModel
from learning import DivergedError, TileModel
from logger import LoggerProtocol
from ModelConfig import PLACE, HdrLogOptions, ModelConfig
from networks import (
    GOOD_ANCHOR,
    DataContract,
    detections_limit,
    fit_anchors,
    good_anchor_share,
    read_checkpoint,
)
from resume import LastCheckpoint, read_last, set_progress

log = logging.getLogger(__name__)

LAST_CHECKPOINT = "checkpoints/last.ckpt"  # in a trial's folder, while it is not done
EVALUATION_FILES = ("detections.csv", "objects.csv", "curve.csv", "confusion.csv")  # a detector's


@dataclass(frozen=True)
class Task:
    """What is of one task.

    Attributes:
        model: Its model.
        contract: Gives its part of the contract of a trial's tiles.
        describe: Says what a trained model is like.
        write: Writes the model's last evaluation to a folder, given the ground blocks.
        files: What it writes.
    """

    model: type[TileModel]
    contract: Callable[[TileDataModule], dict[str, Any]]
    describe: Callable[[TileModel, Mapping[str, float]], str]
    write: Callable[[Path, TileModel, pd.DataFrame], None]
    files: tuple[str, ...]


@dataclass(frozen=True)
class SearchData:
    """What all trials of a search share.

    Attributes:
        tilings: Tile size -> folder of its index.
        rasters: Identifier -> raster.
        ids: Label -> class id.
        radiometry: How raw values become model input.
        blocks: Ground blocks.
        evaluation_overlap: Overlap of evaluation windows in px.
        tile_marks: Tile size -> fingerprint of its index.
        labels: Of a segmentation, identifier -> the classes of its raster's pixels.
        cache: Folder of a cache of the tiles, see `tilecache`; it changes nothing but the speed.
        patches: Tile size -> folder of its patches, in place of the cache: tiles are the same, and
            an epoch goes from block to block of them.
    """

    tilings: Mapping[int, Path]
    rasters: Mapping[str, fileio.Raster]
    ids: Mapping[str, int]
    radiometry: imutils.Radiometry
    blocks: pd.DataFrame
    evaluation_overlap: int
    tile_marks: Mapping[int, str]
    labels: Mapping[str, LabelSource] | None = None
    cache: Path | None = None
    patches: Mapping[int, Path] | None = None

    @property
    def label_marks(self) -> dict[str, Any]:
        """What the labels of each raster were made from; nothing in a detection."""
        return {name: source.made_from for name, source in (self.labels or {}).items()}


def prepare_search(
    images: Sequence[ImageData],
    blocks: pd.DataFrame,
    tilings: Mapping[int, Path],
    sample_sizes: Sequence[float],
    conf: ModelConfig,
    *,
    stretch: str = "auto",
    percentiles: tuple[float, float] = (0.5, 99.5),
    stretch_options: HdrLogOptions | None = None,
    scheduler: str | None = None,
    cache_dir: Path | None = None,
) -> tuple[SearchData, pd.DataFrame]:
    """Fix what all trials share, and refuse what would fail after hours of training.

    Args:
        images: The annotated rasters.
        blocks: Ground blocks.
        tilings: Tile size -> folder of its index.
        sample_sizes: All sample sizes of the search.
        conf: Configuration of all trials.
        stretch: See `imutils.measure_radiometry`.
        percentiles: See there.
        stretch_options: See there.
        scheduler: Of a Dask cluster that is to read the pixels for it.
        cache_dir: Where all tiles are to be cached, see `tilecache`; None: they are not. Those
            with masks are, one by one, if training takes them as they are (`random_windows`); those
            of a composite in its `cache_directory` are taken as they are there.

    Returns:
        The shared data, and the number of objects, or pixels, per label and split (of the last tile
        size and the largest sample).

    Raises:
        InputError: Splits share ground, a split has no tile or object, a label is never seen in
            training, or a model as configured cannot be built.
    """
    if conf.task == "detection" and any(image.labels is not None for image in images):
        raise InputError(
            "the images have a class for every pixel, but the configuration's task is detection; "
            "set task = 'segmentation'"
        )
    rasters = {image.image_identifier: image.raster for image in images}
    indexes = {size: tiling.read_tiles(directory) for size, directory in tilings.items()}
    ground = blocks[blocks["split"] == "train"]
    pixels = tiling.sample_pixels(ground, rasters, seed=conf.seed, scheduler=scheduler)
    labels = None
    if conf.task == "segmentation":
        ids, labels = _mask_classes(images, conf.segmentation.ignore_index)
    else:
        ids = class_ids([label for image in images for label in image.df["label"].unique()])
    data = SearchData(
        tilings=dict(tilings),
        rasters=rasters,
        ids=ids,
        radiometry=imutils.measure_radiometry(pixels, stretch, percentiles, stretch_options),
        blocks=blocks,
        evaluation_overlap=tiling.evaluation_overlap(images),
        tile_marks={size: fileio.fingerprint(index) for size, index in indexes.items()},
        labels=labels,
    )
    counts = None
    for size, (tiles, boxes) in indexes.items():
        for sample_size in sorted(sample_sizes):
            try:
                module = _module(data, tiles, boxes, conf, sample_size)
                used = [module.train.tiles, module.full_validation.tiles, module.test.tiles]
                used = pd.concat(used)
                counts = (
                    splits.check_labels(used, boxes) if labels is None
                    else splits.check_classes(used, list(ids), conf.segmentation.ignore_index)
                )  # fmt: skip
            except InputError as error:
                raise InputError(
                    f"tiles of {size} px, sample size {sample_size}: {error}"
                ) from error
    model = task_of(conf).model(data.ids, conf, make_contract(data, module, size))
    model.load_pretrained()
    model.create_trainer()
    ranks.processes(conf.accelerator, conf.devices)
    if cache_dir is not None and labels is not None and not conf.train.random_windows:
        folders = {
            size: tilecache.cache_patches(
                tiles,
                rasters,
                labels,
                tilecache.patches_folder(tiles, rasters, labels, cache_dir),
                scheduler=scheduler,
            )
            for size, (tiles, _) in indexes.items()
        }
        data = replace(data, patches=folders)
    elif cache_dir is not None:
        folder = tilecache.cache_tiles(rasters, labels, blocks, cache_dir, scheduler=scheduler)
        data = replace(data, cache=folder)
    return data, counts


def training_tiles(data: SearchData, conf: ModelConfig, tile_size: int) -> TileDataset:
    """Return the tiles that trials of a tile size learn from; see `datasets.TileDataset`."""
    return _module(data, *tiling.read_tiles(data.tilings[tile_size]), conf, 1.0).train


def _module(
    data: SearchData, tiles: pd.DataFrame, boxes: pd.DataFrame, conf: ModelConfig, sample: float
) -> TileDataModule:
    patches = (data.patches or {}).get(int(tiles["width"].iloc[0]))
    return TileDataModule(
        tiles, boxes, data.rasters, data.ids, data.radiometry, conf, sample_size=sample,
        labels=data.labels, cache=data.cache, patches=patches,
    )  # fmt: skip


def _mask_classes(
    images: Sequence[ImageData], ignored: int | None
) -> tuple[dict[str, int], dict[str, LabelSource]]:
    """Return the class ids, and the labels of the rasters, which must all have some.

    Args:
        images: The labelled rasters.
        ignored: Class id that the configuration leaves out.
    """
    labels = {image.image_identifier: image.labels for image in images}
    if without := [name for name, source in labels.items() if source is None]:
        raise InputError(
            f"segmentation needs the class of every pixel, and rasters {without} have no labels; "
            "give polygons or a mask raster of each, or set task to 'detection'"
        )
    table = images[0].labels.classes  # all rasters of a run share it
    if table.ignored != ignored:
        raise InputError(
            f"segmentation.ignore_index is {ignored}, but the labels were read with "
            f"{table.ignored}; give masks.label_images the same (`ignored`)"
        )
    return {name: i for i, name in enumerate(table.names)}, labels


def train_iteration(
    hyperparams: Mapping[str, Any],
    data: SearchData,
    conf: ModelConfig,
    trial_dir: Path,
    logger: LoggerProtocol,
    callbacks: Sequence[pl.Callback] = (),
    *,
    progress: bool = False,
) -> dict[str, float]:
    """Train one model, choose its threshold on all validation ground, test it on the test ground.

    Writes to `trial_dir`: `checkpoints/best.ckpt` (highest `BEST_BY` of the task's model, with the
    threshold of a detector); of the test what `write_detections` or `write_masks` says. While
    `checkpoints/last.ckpt` is there, the same training goes on where it was interrupted, or, if
    training itself was done, with the rest; who keeps the result deletes the file.

    Args:
        hyperparams: `patch_size, n_epochs, sample_size, learning_rate, batch_size`.
        data: What all trials share.
        conf: Configuration; a copy takes the hyperparameters. It says how many devices share the
            work, see `ranks`.
        trial_dir: The trial's folder.
        logger: Its record.
        callbacks: Further Lightning callbacks. Of several ranks only the first has them; they may
            raise, or at the end of a validation set `trainer.should_stop`.
        progress: Show bars.

    Returns:
        The test's values by the names of `metrics.evaluate`, the validation's with `val_` before
        them, and `training_time` in s.

    Raises:
        InputError: The tiles changed, or the loss is no number any more.
        RankError: A process that trains together with this one failed.
    """
    trial_dir = Path(trial_dir).resolve()
    shared = (hyperparams, data, conf, trial_dir)
    where = {"accelerator": conf.accelerator, "devices": conf.devices, "nodes": conf.num_nodes}
    with _promptly_interrupted(), ranks.together(_train, *shared, **where):
        return _train(*shared, logger, callbacks, progress=progress)


@contextmanager
def _promptly_interrupted() -> Iterator[None]:
    """Let SIGTERM, which batch systems send, end a training at once, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with fileio.terminable():
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # what Lightning made of it
                raise error.__context__ from None
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _train(
    hyperparams: Mapping[str, Any],
    data: SearchData,
    conf: ModelConfig,
    trial_dir: Path,
    logger: LoggerProtocol | None = None,
    callbacks: Sequence[pl.Callback] = (),
    *,
    progress: bool = False,
) -> dict[str, float] | None:
    """Do what `train_iteration` says, on one of its ranks; only the first has a logger."""
    conf = copy.deepcopy(conf)
    conf.batch_size = hyperparams["batch_size"]
    conf.train.epochs = hyperparams["n_epochs"]
    conf.train.lr = hyperparams["learning_rate"]
    pl.seed_everything(conf.seed, workers=True, verbose=False)

    size = hyperparams["patch_size"]
    tiles, boxes = tiling.read_tiles(data.tilings[size])
    if fileio.fingerprint((tiles, boxes)) != data.tile_marks[size]:
        raise InputError(
            f"the tiles in {data.tilings[size]} changed while the search ran; another run must not "
            "write to them. Run all again, or give each run a TILING_DIRECTORY of its own"
        )
    if conf.init_from and not conf.train.epochs:  # the model is measured by what it was trained on
        data = replace(data, radiometry=_radiometry_of(conf.init_from, data))
    module = _module(data, tiles, boxes, conf, hyperparams["sample_size"])
    contract = make_contract(data, module, size)
    task = task_of(conf)
    model = task.model(data.ids, conf, contract)
    model.load_pretrained()
    best, last = trial_dir / "checkpoints" / "best.ckpt", trial_dir / LAST_CHECKPOINT
    made_from = _made_from(hyperparams, data, conf)
    known = _known_progress(last, best, made_from, logger) if logger else None
    known = ranks.told(known)
    checkpoint = ModelCheckpoint(
        best.parent, filename=best.stem, monitor=task.model.BEST_BY, mode="max",
        enable_version_counter=False,
    )  # fmt: skip
    trainer = model.create_trainer(
        logger,
        [LastCheckpoint(last, made_from, module.batches), HardTiles(module.sampler), checkpoint,
         *callbacks],
        progress=progress, root_dir=trial_dir,
    )  # fmt: skip
    log.info(
        "%d training tiles, %d of validation, %d of test; network: %s",
        len(module.train), len(module.validation), len(module.test), model.describe(),
    )  # fmt: skip
    if contract.anchors:
        covered = good_anchor_share(contract.anchors, module.train.boxes[module.train.owned])
        log.info(
            "%.0f %% of the objects have an anchor of IoU above %g", 100 * covered, GOOD_ANCHOR
        )
    if not conf.train.epochs:
        # Lightning takes the model, and leaves it as it is
        trainer.fit(model, datamodule=module, weights_only=True)
        trainer.save_checkpoint(best)
    elif known and known["finished"]:
        set_progress(trainer, known["epoch"], known["step"])
        model.seconds = known["seconds"]
    else:
        try:
            trainer.fit(
                model, datamodule=module, ckpt_path=last if known else None, weights_only=True
            )
        except DivergedError as error:
            named = module.train.tiles.iloc[error.tiles][["raster", *tiling.WINDOW_COLUMNS]]
            places = "; ".join(f"{t.raster} at x {t.x}, y {t.y}" for t in named.itertuples())
            raise InputError(
                f"{error}. Tiles of {size} px: {places}. Look at them, or lower LEARNING_RATES; "
                f"the best epoch until then, if there was one, is in {best.parent}"
            ) from error
        steps = trainer.estimated_stepping_batches
        if conf.train.max_minutes is not None and trainer.global_step < steps:
            log.warning(
                "train.max_minutes ended the training after %d of %d steps",
                trainer.global_step, steps,
            )  # fmt: skip
    training_time = model.seconds
    if logger:
        logger.log({"training_time": training_time})
        state = torch.load(best, map_location="cpu", weights_only=True)
        model.load_state_dict(state["state_dict"])
    # the other ranks take the weights from the first, as Lightning begins to measure
    (validated,) = trainer.validate(model, module.full_validation_dataloader(), verbose=False)
    if logger:
        # what was found on all validation ground, such as a threshold
        own = dict(model.named_buffers(recurse=False))
        state["state_dict"] |= {name: value.cpu() for name, value in own.items()}
        state |= {"optimizer_states": [], "lr_schedulers": []}  # most of a file that only detects
        for training in ("current_model_state", "averaging_state"):
            state.pop(training, None)
        with fileio.atomic_path(best) as temporary:
            torch.save(state, temporary)
    (tested,) = trainer.test(model, module.test_dataloader(), verbose=False)
    if not logger:
        return None

    values = {**tested, **validated, **model.learnt_values(), "training_time": training_time}
    task.write(trial_dir, model, data.blocks)
    for name in task.files:
        logger.log_artifact(trial_dir / name, name, "evaluation", "of the test ground")
    log.info(
        "test, views %r: %s; %.0f s of training", conf.views, task.describe(model, values),
        training_time,
    )  # fmt: skip
    return values


def _describe_detector(model: LargeRasterORModel, values: Mapping[str, float]) -> str:
    right, down = values["offset_x"], values["offset_y"]
    return (
        f"AP50 {values['AP50']:.3f}, F1 {values['box_f1']:.3f} (precision "
        f"{values['box_precision']:.3f}, recall {values['box_recall']:.3f} at score "
        f"{values['score_threshold']:.2f}); annotated boxes lie {abs(right):.2f} px "
        f"{'right of' if right > 0 else 'left of'} and {abs(down):.2f} px "
        f"{'below' if down > 0 else 'above'} what shows objects"
    )


def _describe_masks(model: LargeRasterSegModel, values: Mapping[str, float]) -> str:
    known = [(name, values.get(f"IoU_{name}")) for name in model.labels]
    of_classes = ", ".join(f"{name} {value:.3f}" for name, value in known if value is not None)
    return (
        f"mean IoU {values['mean_IoU']:.3f} ({of_classes}), pixel accuracy "
        f"{values['pixel_accuracy']:.3f}"
    )


def _made_from(hyperparams: Mapping[str, Any], data: SearchData, conf: ModelConfig) -> str:
    """Digest all that the steps of a training depend on, the number of its ranks included."""
    settings = conf.to_dict()
    for name in PLACE:
        settings.pop(name)
    tiles = data.tile_marks[hyperparams["patch_size"]]
    ground = [dict(data.ids), asdict(data.radiometry), data.blocks]
    if data.labels:
        ground.append(data.label_marks)
    return fileio.fingerprint([hyperparams, settings, tiles, ground, ranks.count()])


def _known_progress(
    last: Path, best: Path, made_from: str, logger: LoggerProtocol
) -> dict[str, Any] | None:
    """Return where an earlier try was interrupted, and forget what was recorded after it."""
    known = read_last(last, made_from)
    if known and known["epoch"] and not best.exists():
        log.warning("%s is gone; the training starts over", best)
        known = None
    if known is None:
        last.unlink(missing_ok=True)
        best.unlink(missing_ok=True)
        logger.rewind(0)
        return None
    where = "measures" if known["finished"] else f"goes on in epoch {known['epoch'] + 1}"
    log.info("interrupted after %d steps; it %s", known["step"], where)
    logger.rewind(known["step"])
    return known


def _radiometry_of(checkpoint: str, data: SearchData) -> imutils.Radiometry:
    """Return how a model's input is made of raw pixels.

    Raises:
        InputError: It cannot be read, or is of other bands than these rasters have.
    """
    known, _ = read_checkpoint(checkpoint)
    contract = DataContract(**known["contract"])
    raster = next(iter(data.rasters.values()))
    ours, theirs = (
        [*bands, f"{more.count if more else 0} auxiliary"]
        for bands, more in (
            (raster.own.bands, masks.auxiliary_of(raster)), (contract.bands, contract.auxiliary)
        )
    )  # fmt: skip
    if ours != theirs:
        raise InputError(
            f"{checkpoint} was trained on the bands {theirs}, and cannot be measured on {ours}; "
            "set BANDS and AUXILIARY as they were, or train (N_EPOCHS)"
        )
    return contract.radiometry


def make_contract(data: SearchData, module: TileDataModule, tile_size: int) -> DataContract:
    """Derive what depends on the training tiles of a trial, for its model and its checkpoint."""
    raster = next(iter(data.rasters.values()))
    return DataContract(
        tile_size=tile_size,
        bands=raster.own.bands,
        band_count=raster.own.band_count,
        dtype=raster.own.dtype,
        auxiliary=masks.auxiliary_of(raster),
        radiometry=data.radiometry,
        resolution=raster.resolution,
        mixed_bands=len({other.own.bands for other in data.rasters.values()}) > 1,
        resolution_range=fileio.resolution_range(data.rasters.values()),
        split_hash=fileio.fingerprint(data.blocks),
        evaluation_overlap=min(data.evaluation_overlap, tile_size // 2),
        **task_of(module.conf).contract(module),
    )


def _detector_contract(module: TileDataModule) -> dict[str, Any]:
    # of all tiles, so that no limit cuts what is measured; their labels are not looked at
    tiles = (module.train, module.full_validation, module.test)
    densest = max(int(np.max(t.last - t.first, initial=0)) for t in tiles)
    return {
        # neighbours are cut
        "anchors": fit_anchors(module.train.boxes[module.train.owned], module.conf),
        "detections_per_tile": module.conf.detections_per_tile or detections_limit(densest),
    }


def write_detections(trial_dir: Path, model: LargeRasterORModel, blocks: pd.DataFrame) -> None:
    """Write the model's last evaluation as tables; places are in px of the raster.

    `detections.csv`, of all scores: `raster, block, pixel_x, pixel_y, diameter, label, score, xmin,
    ymin, xmax, ymax, found`; `found` is the `object` of the block that the detection found, -1 for
    none, -2 for one on an object of other ground, or on ground that does not count.
    `objects.csv`: `raster, block, object, label, xmin, ymin, xmax, ymax, counted, found_score`;
    `counted` unless the centre lies on other ground; the score of the detection that found it.
    `curve.csv`: `threshold, precision, recall, f1`. `confusion.csv`: counts.
    """
    raster_of = blocks.set_index("block")["raster"]
    labels = np.asarray(model.labels, dtype=object)
    detections, objects = [], []
    for block, ground in model.grounds.items():
        place = {"raster": raster_of[block], "block": block}
        matches = model.evaluation.matches[block]
        boxes = dict(zip(BOX_COLUMNS, ground.boxes.T, strict=True))
        found = annotations.measure_bboxes(pd.DataFrame(boxes)).assign(
            **place, label=labels[ground.labels], score=ground.scores.astype(float), found=matches
        )
        columns = [*place, *CENTER_COLUMNS, "diameter", "label", "score", *BOX_COLUMNS, "found"]
        detections.append(found[columns])

        score = np.full(len(ground.truth_boxes), np.nan)
        score[matches[matches >= 0]] = ground.scores[matches >= 0]
        boxes = dict(zip(BOX_COLUMNS, ground.truth_boxes.T, strict=True))
        first = place | {"object": np.arange(len(score)), "label": labels[ground.truth_labels]}
        last = {"counted": ~ground.truth_ignored, "found_score": score}
        objects.append(pd.DataFrame(first | boxes | last))
    fileio.write_table(trial_dir / "detections.csv", pd.concat(detections, ignore_index=True))
    fileio.write_table(trial_dir / "objects.csv", pd.concat(objects, ignore_index=True))
    fileio.write_table(trial_dir / "curve.csv", pd.DataFrame(vars(model.evaluation.curve)))
    confusion = pd.DataFrame(model.evaluation.confusion, columns=[*model.labels, "(missed)"])
    confusion.insert(0, "(truth)", [*model.labels, "(background)"])
    fileio.write_table(trial_dir / "confusion.csv", confusion)


def write_masks(trial_dir: Path, model: LargeRasterSegModel, blocks: pd.DataFrame) -> None:
    """Write the model's last evaluation as tables of pixels.

    `confusion.csv`: a row per true class, a column per predicted one. `pixels.csv`: of each block
    of ground `raster, block, x, y, width, height` (px), and per class that it shows or was found
    there `label, truth, predicted, right`.
    """
    labels = np.asarray(model.labels, dtype=object)
    confusion = pd.DataFrame(model.evaluation.confusion, columns=model.labels)
    confusion.insert(0, "(truth)", model.labels)
    fileio.write_table(trial_dir / "confusion.csv", confusion)
    places, rows = blocks.set_index("block"), []
    for block, counts in model.evaluation.blocks.items():
        place = places.loc[block]
        table = pd.DataFrame(
            {"raster": place["raster"], "block": block, "x": place["x"], "y": place["y"],
             "width": place["width"], "height": place["height"], "label": labels,
             "truth": counts.sum(axis=1), "predicted": counts.sum(axis=0),
             "right": np.diag(counts)}
        )  # fmt: skip
        rows.append(table[(table["truth"] > 0) | (table["predicted"] > 0)])
    fileio.write_table(trial_dir / "pixels.csv", pd.concat(rows, ignore_index=True))


_ALL = (
    Task(
        LargeRasterORModel, _detector_contract, _describe_detector, write_detections,
        EVALUATION_FILES,
    ),
    Task(
        LargeRasterSegModel, lambda module: {}, _describe_masks, write_masks,
        ("pixels.csv", "confusion.csv"),
    ),
)  # fmt: skip
TASKS = {task.model.TASK: task for task in _ALL}


def task_of(conf: ModelConfig) -> Task:
    """Return what is of the task that a configuration is for."""
    return TASKS[conf.task]
