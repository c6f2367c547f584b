"""Before any long work: does the input fit together, what will the run take, will the model fit?

As a command it reads the parameters as the notebook would, and leaves nothing on disk but copies of
HDR images, which the notebook will read:

    python preflight.py --params params/mine.yaml
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import annotations
import fileio
import imutils
import masks
import ranks
import splits
import tiling
from ImageData import BOX_COLUMNS, ImageData, InputError, Window
from LargeRasterOR import VIEWS, LargeRasterORModel, autocast, resolve_precision
from learning import TileModel
from ModelConfig import RunParameters
from networks import GOOD_ANCHOR, DataContract, detections_limit, fit_anchors, good_anchor_share

log = logging.getLogger(__name__)

SMALL = 4  # px; objects below it are hardly more than noise to a convolution
NOTABLE = 0.05  # share of the objects from which a misfit is worth a warning
RARE = 0.005  # share of the training ground from which on a class is not rare
MIDDLE = 1024  # px of the middle of a block in which classes are counted
READS = 32  # tiles that are read to tell how long it takes
FULL_STEP_LIMIT = 3.0  # s; a step that would take longer is measured on one tile and scaled


def describe_pairs(images: Sequence[ImageData], report: pd.DataFrame) -> pd.DataFrame:
    """Tabulate what each pair of raster and annotations is like.

    Args:
        images: The annotated rasters.
        report: Of their cleaning, see `annotations.clean_annotations`.

    Returns:
        One row per raster: `size` (px), `bands, dtype, crs, metres_per_px, layout, counted` (share
        of a sample of its pixels that is valid ground that counts), `rows` of the annotation file,
        those `dropped, objects` left, quantiles of the diameter in px, `why_dropped`, and the
        `labels` with their counts.

    Raises:
        InputError: A raster cannot be read where it is sampled.
    """
    rows = {}
    for image in images:
        df = image.df
        diameter = df["diameter"].quantile([0.05, 0.5, 0.95])
        counts = df["label"].value_counts()
        shown = ", ".join(f"{label}: {count}" for label, count in counts.head(5).items())
        steps = report[report["raster"] == image.image_identifier]
        lost = steps[steps["dropped"] > 0]
        why = "; ".join(f"{s.step}: {s.dropped}" for s in lost.itertuples())
        rows[image.image_identifier] = {
            **_describe_raster(image.raster),
            "rows": steps["rows_in"].max(),
            "dropped": int(lost["dropped"].sum()),
            "objects": len(df),
            **{f"diameter_px_{q:.0%}": value for q, value in diameter.items()},
            "diameter_px_max": df["diameter"].max(),
            "why_dropped": why,
            "labels": shown + (f" and {len(counts) - 5} more" if len(counts) > 5 else ""),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("raster")


def describe_masks(images: Sequence[ImageData], shares: pd.DataFrame) -> pd.DataFrame:
    """Tabulate what each pair of raster and labels of its pixels is like.

    Args:
        images: The labelled rasters.
        shares: Of their classes, see `class_shares`.

    Returns:
        One row per raster: see `describe_pairs` up to `counted`; `polygons` (0: a mask raster),
        those `dropped`, and `labels_of_all`, with their shares over all rasters.
    """
    shown = ", ".join(f"{row.Index}: {row.all:.1%}" for row in shares.itertuples())
    rows = {
        image.image_identifier: {
            **_describe_raster(image.raster),
            "polygons": len(image.df),
            "dropped": len(getattr(image.labels, "quarantine", ())),
            "labels_of_all": shown,
        }
        for image in images
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("raster")


def class_shares(images: Sequence[ImageData], blocks: pd.DataFrame, **work: object) -> pd.DataFrame:
    """Estimate how much of the ground each class has, from the middle of each block.

    Args:
        images: The labelled rasters.
        blocks: Ground blocks.
        work: See `tiling.count_classes`.

    Returns:
        One row per class: its shares (0-1) of the labelled px of `train, validation, test` and
        `all` blocks, `blocks` (training blocks that show it in their middle) and `of_blocks` (that
        show any).
    """
    used = blocks[blocks["split"] != "unused"]
    width, height = (used[name].clip(upper=MIDDLE) for name in ("width", "height"))
    middles = used.assign(
        x=used["x"] + (used["width"] - width) // 2, y=used["y"] + (used["height"] - height) // 2,
        width=width, height=height,
    )  # fmt: skip
    counts = tiling.count_blocks(middles, images, side=MIDDLE, **work)
    names = pd.Index(images[0].labels.classes.names, name="class")
    table = pd.DataFrame(index=names)
    for split in (*splits.SPLITS, "all"):
        px = counts[(used["split"] == split) | (split == "all")].sum(axis=0)
        table[split] = px / max(px.sum(), 1)
    train = counts[used["split"] == "train"] > 0
    return table.assign(blocks=train.sum(axis=0), of_blocks=int(train.any(axis=1).sum()))


def _describe_raster(raster: fileio.Raster) -> dict[str, object]:
    return {
        "size": f"{raster.width} x {raster.height}",
        "bands": len(raster.bands),
        "dtype": raster.dtype,
        "crs": raster.crs_name or "none",
        "metres_per_px": raster.resolution,
        "layout": _layout_name(raster),
        "counted": tiling.counted_share(raster),
    }


def _layout_name(raster: fileio.Raster) -> str:
    height, width = raster.block_shape_hw
    if width >= raster.width:
        return "one block" if height >= raster.height else f"strips of {height} rows"
    return f"tiles of {width} x {height}"


def plan_run(
    params: RunParameters,
    images: Sequence[ImageData],
    blocks: pd.DataFrame,
    options: tiling.TilingOptions,
) -> pd.DataFrame:
    """Tabulate what each tile size means: tiles, fit to the objects, time, memory, disk.

    Tiles are counted before filters look at pixels. Time and memory come from one training step of
    the very model on this machine, with the largest batch of the search.

    Returns:
        One row per tile size: `train_tiles` (turned ones included), `validation_tiles, test_tiles,
        densest` (objects in the fullest), `small` and `large` (shares of the objects under 4 px,
        and over half a tile), `anchors` (their sides, px), `anchors_fit` (share of the training
        objects whose best anchor has an IoU above 0.5), `trainings, step_s, hours` (all trainings,
        evaluation included, shared out evenly among all devices that train together), `memory_gb`
        (peak of this process until then), `disk_mb` (checkpoints, and chips where asked for).
    """
    sides = np.concatenate([np.ptp(i.df[BOX_COLUMNS].to_numpy().reshape(-1, 2, 2), axis=1)
                            for i in images]).max(axis=1)  # fmt: skip
    rows = {}
    for size in dict.fromkeys(params.PATCH_SIZES):
        windows, boxes = tiling.index_windows(size, images, blocks, options)
        split = windows.groupby("split").size().reindex(splits.SPLITS, fill_value=0)
        shown = boxes["window"].value_counts()
        train = windows[windows["split"] == "train"]
        filled = train["window"].isin(shown.index).sum()
        empty = min(len(train) - filled, int(options.empty_tile_ratio * filled))
        owned = boxes[boxes["owned"] & boxes["window"].isin(train["window"])]
        if owned.empty:
            raise InputError(
                "no object lies on training ground; change SEED or BLOCK_SIZE, lower "
                "TEST_PROPORTION, or annotate more ground"
            )
        train_boxes = owned[BOX_COLUMNS].to_numpy()
        densest = int(shown.max())
        contract = _contract(
            images[0].raster, size, anchors=fit_anchors(train_boxes, params.model_config()),
            detections_per_tile=detections_limit(densest),
        )  # fmt: skip
        tiles = int((filled + empty) * (1 + len(options.angles)))
        row = {
            "train_tiles": tiles,
            "validation_tiles": int(split["validation"]),
            "test_tiles": int(split["test"]),
            "densest": densest,
            "small": float((sides < SMALL).mean()),
            "large": float((sides > size / 2).mean()),
            "anchors": sorted(np.concatenate(contract.anchors.sizes).tolist()),
            "anchors_fit": good_anchor_share(contract.anchors, train_boxes),
        }
        labels = sorted({label for image in images for label in image.df["label"].unique()})
        model = LargeRasterORModel(labels, params.model_config(), contract)
        rows[size] = row | _measure_cost(params, model, row)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("tile_size")


def plan_masks(
    params: RunParameters,
    images: Sequence[ImageData],
    blocks: pd.DataFrame,
    options: tiling.TilingOptions,
) -> pd.DataFrame:
    """Tabulate what each tile size means for a segmentation: tiles, time, memory, disk.

    Returns:
        One row per tile size: `train_tiles` (turned ones included, before any is left out),
        `validation_tiles, test_tiles`, `read_s` (to read a tile and its mask, measured in this
        process), and the rest as `plan_run` has it.
    """
    from LargeRasterSeg import LargeRasterSegModel  # detectors do without it

    rows, labels = {}, images[0].labels.classes.names
    for size in dict.fromkeys(params.PATCH_SIZES):
        windows, _ = tiling.index_windows(size, images, blocks, options)
        split = windows.groupby("split").size().reindex(splits.SPLITS, fill_value=0)
        row = {
            "train_tiles": int(split["train"]) * (1 + len(options.angles)),
            "validation_tiles": int(split["validation"]),
            "test_tiles": int(split["test"]),
            "read_s": _time_reading(images, windows[windows["split"] == "train"], params.SEED),
        }
        contract = _contract(images[0].raster, size)
        model = LargeRasterSegModel(labels, params.model_config(), contract)
        rows[size] = row | _measure_cost(params, model, row)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("tile_size")


def find_class_misfits(shares: pd.DataFrame) -> list[str]:
    """Say in sentences which classes will hardly be learnt or measured; see `class_shares`."""
    found = []
    for name, row in shares.iterrows():
        nowhere = [split for split in splits.SPLITS if not row[split]]
        if len(nowhere) == len(splits.SPLITS):
            found.append(
                f"class {name} is not seen in the middle of any block; leave it out of CLASSES if "
                "nothing has it, or label more of it"
            )
        elif nowhere:
            found.append(
                f"class {name} is not seen in the middle of any {' and any '.join(nowhere)} block; "
                "another SEED, a smaller BLOCK_SIZE or USE_STRATIFICATION may put it there"
            )
        elif row["train"] < RARE:
            found.append(
                f"class {name} has {row['train']:.2%} of the training ground, on "
                f"{row['blocks']:.0f} of {row['of_blocks']:.0f} blocks, and will hardly be learnt; "
                "CLASS_PROPORTION, or segmentation.class_weights, may help"
            )
    return found


def _time_reading(images: Sequence[ImageData], windows: pd.DataFrame, seed: int) -> float:
    """Return the median of the seconds that reading a tile with its mask takes."""
    labelled = {image.image_identifier: image for image in images}
    some = windows.sample(min(READS, len(windows)), random_state=seed)
    seconds, deadline = [], time.monotonic() + FULL_STEP_LIMIT
    for name, *place in some[["raster", *tiling.WINDOW_COLUMNS]].itertuples(index=False):
        start, window = time.perf_counter(), Window(*map(int, place))
        tiling.read_tile(labelled[name].raster, window, 0)
        labelled[name].labels.read(window, np.ones((window.height, window.width), dtype=bool))
        seconds.append(time.perf_counter() - start)
        if time.monotonic() > deadline:
            break
    if not seconds:
        raise InputError("there is no training ground; change SEED or lower TEST_PROPORTION")
    return float(np.median(seconds))


def find_misfits(plan: pd.DataFrame) -> list[str]:
    """Say in sentences where tile sizes and anchors do not fit the objects of a plan."""
    found = []
    for size, row in plan.iterrows():
        if row["small"] > NOTABLE:
            found.append(
                f"{row['small']:.0%} of the objects are under {SMALL} px and will hardly be found; "
                "a finer raster, or dropping them, is more honest"
            )
        if row["large"]:
            found.append(
                f"{row['large']:.1%} of the objects are larger than half a tile of {size} px and "
                "may be cut at a seam; larger PATCH_SIZES see them whole"
            )
        if row["anchors_fit"] < 1 - NOTABLE:
            found.append(
                f"tiles of {size} px: {1 - row['anchors_fit']:.0%} of the training objects have no "
                f"anchor of IoU above {GOOD_ANCHOR}; very elongated ones, or sizes spread wide"
            )
    return list(dict.fromkeys(found))


def _contract(raster: fileio.Raster, size: int, **of_detector: object) -> DataContract:
    ones, zeros, own = (1.0,) * len(raster.bands), (0.0,) * len(raster.bands), raster.own
    return DataContract(
        tile_size=size, bands=own.bands, band_count=own.band_count, dtype=own.dtype,
        radiometry=imutils.Radiometry("none", zeros, ones, zeros, ones),
        resolution=raster.resolution, split_hash="", evaluation_overlap=0,
        auxiliary=masks.auxiliary_of(raster), **of_detector,
    )  # fmt: skip


def _measure_cost(
    params: RunParameters, model: TileModel, tiles: dict[str, float]
) -> dict[str, float]:
    grid = params.search_space
    batch = max(grid["batch_size"])
    model.load_pretrained()  # raises where what it is to start from does not fit
    step_s, look_s = _time_step(model, batch)
    per_tile, look_tile, read_s = step_s / batch, look_s / batch, tiles.get("read_s", 0.0)
    if workers := model.conf.workers:  # they read meanwhile
        per_tile, look_tile = (max(s, read_s / workers) for s in (per_tile, look_tile))
    else:
        per_tile, look_tile = per_tile + read_s, look_tile + read_s
    seconds = 0.0
    for epochs in grid["n_epochs"]:
        for sample in grid["sample_size"]:
            learning = epochs * sample * tiles["train_tiles"] * per_tile
            limit = model.conf.train.max_minutes
            seconds += min(learning, 60 * limit) if limit else learning
            final = len(VIEWS[model.conf.views]) * (tiles["validation_tiles"] + tiles["test_tiles"])
            looks = epochs * sample * tiles["validation_tiles"] + final
            seconds += looks * look_tile
    # devices share both out, as long as nothing else waits, such as the disk
    seconds /= ranks.processes(params.ACCELERATOR, params.DEVICES) * params.NUM_NODES
    trainings = math.ceil(params.trial_count / len(grid["patch_size"]))
    # of those of a grid; a search that draws them takes as long as their mean
    same = params.trial_count / math.prod(map(len, grid.values()))
    same *= len(grid["learning_rate"]) * len(grid["batch_size"])
    weights = sum(p.numel() for p in model.parameters()) * 4
    chips = 0
    if params.MATERIALIZE_TILES:
        contract = model.contract
        item = np.dtype(contract.dtype).itemsize * contract.channels
        chips = tiles["train_tiles"] * contract.tile_size**2 * item
    disk = trainings * weights + chips  # the best weights of each
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "trainings": trainings,
        "step_s": step_s,
        "hours": same * seconds / 3600,
        "memory_gb": peak * unit / 1e9,
        "disk_mb": disk / 1e6,
    }


def _time_step(model: TileModel, batch: int) -> tuple[float, float]:
    """Return the seconds of a training step and of a look at tiles, both of a whole batch."""
    conf, size = model.conf, model.contract.tile_size
    on_gpu = conf.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    precision = resolve_precision(conf.precision, conf.accelerator)
    network = copy.deepcopy(model.network).to(device)
    box = torch.tensor([[0.0, 0.0, size / 4, size / 4]], device=device)
    target = {"boxes": box, "labels": torch.zeros(1, dtype=torch.int64, device=device)}

    def detect(images: torch.Tensor, *, learn: bool) -> torch.Tensor | None:
        losses, _ = network(images, [target] * len(images) if learn else None, detect=not learn)
        return torch.stack(list(losses.values())).sum() if learn else None

    def classify(images: torch.Tensor, *, learn: bool) -> torch.Tensor | None:
        logits = network.train(learn)(images)
        classes = torch.randint(len(model.labels), (len(images), size, size), device=device)
        return model.loss(logits, classes) if learn else None

    pass_ = detect if isinstance(model, LargeRasterORModel) else classify

    def run(count: int, *, learn: bool) -> float:
        images = torch.rand(count, model.contract.channels, size, size, device=device)
        start = time.perf_counter()
        with autocast(device.type, precision):
            loss = pass_(images, learn=learn)
        if learn:
            loss.backward()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def settled(count: int, *, learn: bool) -> float:
        run(count, learn=learn)  # the first time, libraries choose their kernels
        return min(run(count, learn=learn) for _ in range(3))  # what others run is not ours

    single = run(1, learn=True)
    count = batch if single * batch < FULL_STEP_LIMIT else 1
    step = settled(count, learn=True) * batch / count
    with torch.inference_mode():
        look = settled(1, learn=False) * batch
    return step, look


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks as a command; 0: the run can begin, 1: it cannot, and stderr says why."""
    parser = argparse.ArgumentParser(
        prog="preflight", description="Check the input of a run, and plan it; nothing is written."
    )
    parser.add_argument("--params", type=Path, help="file of parameters, as for papermill -f")
    parser.add_argument(
        "--notebook", type=Path, default=Path(__file__).with_name("main.ipynb"),
        help="whose first cell holds the defaults (default: %(default)s)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        params = RunParameters.from_files(args.notebook, args.params)
        of_task = check if params.TASK == "detection" else check_masks
        pairs, *plans, misfits = of_task(params)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    misfits = "".join(f"- {sentence}\n" for sentence in misfits)
    with pd.option_context("display.max_colwidth", None, "display.precision", 3):
        shown = (pairs.drop(columns="why_dropped", errors="ignore"), *plans)
        tables = [df.astype(object).T.to_string() for df in shown]
    lost = pairs[pairs["dropped"] > 0].get("why_dropped", pd.Series(dtype=object))
    lines = "".join(f"- of {name}, dropped: {why}\n" for name, why in lost.items())
    sys.stdout.write("\n\n".join([*tables, lines + (misfits or "- no misfit found\n")]))
    return 0


def _open_rasters(params: RunParameters, folder: Path) -> list[fileio.Raster]:
    paths = [*params.image_paths, *params.predict_paths]
    rasters = fileio.read_rasters(paths, **params.raster_options())
    rasters = rasters[: len(params.image_paths)]
    rasters = fileio.check_layout(rasters, repair=False, cache_dir=folder)
    return [masks.with_auxiliary_bands(raster, params.auxiliary) for raster in rasters]


def _blocks(params: RunParameters, images: Sequence[ImageData]) -> pd.DataFrame:
    return splits.ground_blocks(
        [image.raster for image in images], max_tile_size=max(params.PATCH_SIZES),
        **params.split_options(),
    )  # fmt: skip


def check(params: RunParameters) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Do what the notebook does up to its plan; of files it leaves but copies of HDR images.

    Returns:
        What `describe_pairs`, `plan_run` and `find_misfits` return.
    """
    with tempfile.TemporaryDirectory() as folder:
        images, report = annotations.clean_annotations(
            params.df_paths, _open_rasters(params, Path(folder)), output_dir=Path(folder),
            region_paths=params.region_paths, workers=params.WORKERS, **params.cleaning_options(),
        )  # fmt: skip
    pairs = describe_pairs(images, report)
    options = tiling.TilingOptions(
        evaluation_overlap=tiling.evaluation_overlap(images), **params.tiling_options()
    )
    plan = plan_run(params, images, _blocks(params, images), options)
    return pairs, plan, find_misfits(plan)


def check_masks(
    params: RunParameters,
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, list[str]]:
    """Do the same for a segmentation.

    Returns:
        What `describe_masks`, `plan_masks`, `class_shares` and `find_class_misfits` return.
    """
    with tempfile.TemporaryDirectory() as folder:
        rasters = _open_rasters(params, Path(folder))
    images, table = masks.label_images(rasters, params.df_paths, **params.labelling_options())
    blocks, work = _blocks(params, images), {"workers": params.WORKERS}
    if params.USE_STRATIFICATION is not None:
        counts = tiling.count_blocks(blocks, images, **work)
        blocks = splits.stratify_validation(blocks, counts, **params.stratification_options())
    shares = class_shares(images, blocks, **work)
    options = tiling.TilingOptions(
        evaluation_overlap=tiling.evaluation_overlap(images), **params.tiling_options(table.names)
    )
    plan = plan_masks(params, images, blocks, options)
    return describe_masks(images, shares), plan, shares, find_class_misfits(shares)


if __name__ == "__main__":
    sys.exit(main())
