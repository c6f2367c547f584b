"""Accuracy after equal minutes of training from scratch, on ground that nobody has seen.

    python benchmarks/bench_accuracy.py params/lunar_craters.yaml --minutes 12 [--plain SCRIPT]
    .bench-venv/bin/python benchmarks/bench_accuracy.py params/trees.yaml \
        --set IMAGE_FILENAMES='[A.tif]' --set DF_FILENAMES='[A.csv]' --minutes 10 --deepforest
    python benchmarks/bench_accuracy.py params/buildings_seg.yaml --minutes 10 --unet

The file of parameters is what the notebook would run; a time limit replaces its epochs. All train
one after the other on the same machine. SCRIPT trains another detector: it is called with the
folder of the rasters, `--test` and parts of the names of the test rasters, and `--minutes`; its
output is shown and recorded as it is. requirements-bench.txt tells how to install DeepForest: its
ResNet-50 RetinaNet without weights and its own defaults learn our tiles as PNG files, and find
objects on the windows that measure ours, merged and matched by the same code.

Of a segmentation, a plain loop is the other: the same U-Net of segmentation-models-pytorch with
random weights learns the same tiles, neither turned nor changed, by Adam (0.001) and cross-entropy,
and is measured on the same ground, each pixel by the tile whose core owns it; of its epochs the
last counts.

The threshold of F1 comes from validation ground, for both. AP is COCO's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import annotations
import fileio
import gridsearch
import masks
import metrics
import splits
import tiling
import trials
from datasets import BboxDataset, MaskDataset, TileDataModule, collate
from ImageData import IGNORE
from logger import configure_logger
from ModelConfig import RunParameters

PROJECT = Path(__file__).parent.parent
OF_MASKS = ("mean_IoU", "mean_IoU_low", "mean_IoU_high", "mean_F1", "pixel_accuracy", "pixels")
SHOWN = ("AP50", "AP50_low", "AP50_high", "AP", "box_f1", "box_precision", "box_recall", "objects")
MANY = 10_000  # epochs, which the clock cuts short


def prepare(params: RunParameters) -> tuple[trials.SearchData, TileDataModule]:
    """Clean, split and tile as the notebook does."""
    rasters = fileio.read_rasters(params.image_paths, **params.raster_options())
    classes = ()
    if params.TASK == "segmentation":
        images, table = masks.label_images(rasters, params.df_paths, **params.labelling_options())
        classes = table.names
    else:
        images, _ = annotations.clean_annotations(
            params.df_paths, rasters, output_dir=params.run_dir / "clean",
            region_paths=params.region_paths, workers=1, **params.cleaning_options(),
        )  # fmt: skip
    blocks = splits.ground_blocks(
        rasters, max_tile_size=max(params.PATCH_SIZES), **params.split_options()
    )
    options = tiling.TilingOptions(
        evaluation_overlap=tiling.evaluation_overlap(images), **params.tiling_options(classes)
    )
    tilings = tiling.make_tiles(
        images, blocks, params.PATCH_SIZES, params.tiling_dir, options, workers=1
    )
    conf = params.model_config()
    conf.batch_size = params.BATCH_SIZES[0]
    data, _ = trials.prepare_search(
        images, blocks, tilings, params.SAMPLE_SIZES, conf, **params.stretch_options()
    )
    tiles, boxes = tiling.read_tiles(tilings[params.PATCH_SIZES[0]])
    module = TileDataModule(
        tiles, boxes, data.rasters, data.ids, data.radiometry, conf, labels=data.labels
    )
    return data, module


def train_ours(params: RunParameters, data: trials.SearchData) -> dict[str, float]:
    """Search the one trial; its values are of the test ground."""
    board = gridsearch.run_search(data, params.search_space, params.model_config(), params.run_dir)
    names = [n for n in (*SHOWN, *OF_MASKS, "val_AP50", "training_time") if n in board]
    return board.iloc[0][names].astype(float).to_dict()


def write_chips(dataset: BboxDataset, labels: Sequence[str], folder: Path) -> Path:
    """Write tiles as PNG files, and their boxes as DeepForest reads them; return that table."""
    folder.mkdir(parents=True)
    rows = []
    for i in range(len(dataset)):
        image, target = dataset[i]
        pixels = (image[:3].clamp(0, 1) * 255).round().byte().expand(3, -1, -1)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            rows.append([f"{i}.png", *box, labels[label]])
    columns = ["image_path", "xmin", "ymin", "xmax", "ymax", "label"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "tiles.csv", index=False)
    return folder / "tiles.csv"


def train_deepforest(
    params: RunParameters, module: TileDataModule, labels: Sequence[str], minutes: float
) -> dict[str, float]:
    """Train DeepForest's RetinaNet on our training tiles, and measure it as ours is."""
    from deepforest import main
    from torchvision.models.detection import retinanet_resnet50_fpn

    ids = {label: i for i, label in enumerate(labels)}
    with tempfile.TemporaryDirectory() as folder:
        table = write_chips(module.train, labels, Path(folder) / "chips")
        plain = retinanet_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=len(ids), score_thresh=0.05,
            nms_thresh=0.05,
        )  # fmt: skip
        config = {
            "accelerator": "cpu", "devices": 1, "num_classes": len(ids), "log_root": folder,
            "train": {"csv_file": str(table), "root_dir": str(table.parent), "epochs": MANY},
        }  # fmt: skip
        detector = main.deepforest(model=plain, config_args=config)
        detector.set_labels(ids)
        detector.create_trainer(
            logger=False, enable_progress_bar=False, enable_model_summary=False,
            max_time={"seconds": 60 * minutes},
        )  # fmt: skip
        start = time.monotonic()
        detector.trainer.fit(detector)
        seconds = time.monotonic() - start
    plain.eval()
    validation = measure(plain, module.full_validation, labels, params, None)
    threshold = validation["score_threshold"]
    values = measure(plain, module.test, labels, params, threshold)
    return {name: values[name] for name in SHOWN if name in values} | {"training_time": seconds}


@torch.inference_mode()
def measure(
    plain: torch.nn.Module, dataset: BboxDataset, labels: Sequence[str], params: RunParameters,
    threshold: float | None,
) -> dict[str, float]:  # fmt: skip
    """Measure a torchvision detector on evaluation tiles."""
    collector = metrics.GroundCollector()
    for i in range(len(dataset)):
        image, target = dataset[i]
        collector.add(plain([image[:3].expand(3, -1, -1)]), [target])
    grounds = collector.merge(params.model_config().nms_threshold)
    evaluation = metrics.evaluate(grounds, labels, params.IOU_THRESHOLD, threshold)
    return evaluation.values  # noqa: PD011 - not those of a frame


def train_unet(
    params: RunParameters, module: TileDataModule, data: trials.SearchData, minutes: float
) -> dict[str, float]:
    """Train a U-Net by a plain loop on our training tiles, and measure it as ours is."""
    import segmentation_models_pytorch as smp
    from torch.nn.functional import cross_entropy

    labels, tiles = sorted(data.ids, key=data.ids.get), module.train.tiles
    dataset = MaskDataset(tiles[tiles["angle"] == 0], data.rasters, data.labels, data.radiometry)
    torch.manual_seed(0)
    network = smp.Unet(params.BACKBONE, encoder_weights=None, classes=len(labels),
                       in_channels=dataset[0][0].shape[0])  # fmt: skip
    optimizer = torch.optim.Adam(network.parameters(), lr=0.001)
    loader = torch.utils.data.DataLoader(
        dataset, params.BATCH_SIZES[0], shuffle=True, drop_last=True, collate_fn=collate
    )
    start, steps = time.monotonic(), 0
    while time.monotonic() < start + 60 * minutes:
        for images, targets in loader:
            truth = torch.stack([target["mask"] for target in targets]).long()
            loss = cross_entropy(network(images), truth, ignore_index=IGNORE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
            if time.monotonic() > start + 60 * minutes:
                break
    seconds = time.monotonic() - start
    network.eval()
    collector = metrics.ConfusionCollector(len(labels))
    with torch.inference_mode():
        for i in range(len(module.test)):
            image, target = module.test[i]
            found = network(image[None]).argmax(dim=1)
            collector.add(found, target["mask"][None].long(), [target])
    values = metrics.evaluate_masks(collector.merge(), labels).values  # noqa: PD011
    return {n: values[n] for n in OF_MASKS if n in values} | {
        "training_time": seconds, "steps": steps
    }  # fmt: skip


def run_plain(script: Path, params: RunParameters, minutes: float) -> str:
    """Run another detector's own script; return what it printed."""
    names = [Path(name).stem for name in params.TEST_FILENAMES or []]
    command = [sys.executable, str(script), str(params.IMG_DIR), "--test", *names,
               "--minutes", str(minutes)]  # fmt: skip
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def read_parameters(path: Path, changes: Mapping[str, Any], folder: Path) -> RunParameters:
    """Read a file of parameters, its paths seen from the project, and change some."""
    values = yaml.safe_load(path.read_text(encoding="utf-8")) | dict(changes)
    for name in ("DF_DIR", "IMG_DIR"):
        if name in values:
            values[name] = str((PROJECT / values[name]).resolve())
    values |= {"RUNS_DIR": str(folder), "TILING_DIRECTORY": str(folder / "tiles")}
    file = folder / "parameters.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return RunParameters.from_files(PROJECT / "main.ipynb", file)


def main() -> None:
    """Train, measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parameters", type=Path, help="a file of params/")
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="another value of a parameter, in YAML")  # fmt: skip
    parser.add_argument("--plain", type=Path, help="script of another detector")
    parser.add_argument("--deepforest", action="store_true")
    parser.add_argument("--unet", action="store_true", help="a plain loop, of a segmentation")
    parser.add_argument("--work", type=Path, help="folder to keep; an earlier training is taken")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    configure_logger()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        changes = {n: yaml.safe_load(v) for n, v in (item.split("=", 1) for item in args.set)}
        params = read_parameters(args.parameters, changes, folder)
        options = params.MODEL_OPTIONS | {"train.max_minutes": args.minutes}
        params = replace(params, N_EPOCHS=[MANY], MODEL_OPTIONS=options)
        if params.trial_count > 1:
            parser.error("the parameters span several trainings; --set them to one value each")
        if args.plain and not params.TEST_FILENAMES:
            parser.error("--plain needs parameters with TEST_FILENAMES")
        data, module = prepare(params)
        table = {"ours": train_ours(params, data)}
        if args.deepforest:
            labels = sorted(data.ids)
            table["DeepForest"] = train_deepforest(params, module, labels, args.minutes)
        if args.unet:
            table["plain loop"] = train_unet(params, module, data, args.minutes)
    sys.stdout.write(pd.DataFrame(table).T.astype(float).round(3).to_string() + "\n")
    printed = run_plain(args.plain, params, args.minutes) if args.plain else ""
    sys.stdout.write(printed)
    if args.json:
        record = {"minutes": args.minutes, "parameters": args.parameters.name, **table,
                  "plain": printed}  # fmt: skip
        args.json.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
