"""Prediction of a whole raster against DeepForest and SAHI: seconds, and whether they agree.

    .bench-venv/bin/python benchmarks/bench_predict.py [--short] [--work DIR] [--json FILE]

requirements-bench.txt tells how to install the peers. All three run the same weights, on a CPU, on
the same windows. The peers get the network as torchvision runs its own: contiguous, in full
precision. Bare calls of the network, on windows that are read already, bound what any of them can
reach. All take turns, in one process; the first round, which warms, is not timed.

The detector is trained on a synthetic sample, for some minutes, unless --checkpoint names one or
--work holds that of an earlier call.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import common
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms

import annotations
import fileio
import gridsearch
import metrics
import predict
import sampledata
import splits
import strips
import tiling
import trials
from ImageData import Window
from LargeRasterOR import LargeRasterORModel, autocast
from ModelConfig import ModelConfig
from networks import TileRetinaNet

log = logging.getLogger("bench_predict")
TILE_SIZE = 400  # px, DeepForest's own
OVERLAP_SHARE = 0.05  # of the tile, DeepForest's own
OVERLAP = int(TILE_SIZE * OVERLAP_SHARE)  # px
BATCH_SIZE = 4
MAX_DIAMETER = OVERLAP / sampledata.DIAMETER_SCALE  # larger objects are cut at the seams, by all
AGREE_SCORE = 0.3  # detections from it on should be found by the other one, whatever score it gives
AGREE_IOU = 0.9
PEERS = ("deepforest", "sahi")
AIMS = tuple(
    common.Aim(f"ours, {precision}", peer, speed)
    for precision, speed in (("bf16", 2), ("fp32", 1.15))
    for peer in ("DeepForest", "SAHI")
)
AGAINST = {
    "DeepForest": "ours, bf16", "DeepForest, tile by tile": "ours, bf16", "SAHI": "ours, bf16",
    "ours, fp32": "ours, bf16", "network, fp32": "ours, fp32", "network, bf16": "ours, bf16",
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """Detections of a raster: boxes (N, 4) xyxy px, scores (N,), class ids (N,)."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def rows(self, rows: np.ndarray) -> Found:
        """Return some of them."""
        return Found(self.boxes[rows], self.scores[rows], self.labels[rows])

    def in_whole_px(self) -> Found:
        """Cut the fractions off the boxes, as DeepForest does."""
        return Found(np.trunc(self.boxes), self.scores, self.labels)


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        seconds: Median over the rounds.
        rounds: Seconds of each round.
        ratio: Median over the rounds of its seconds for one of the base's.
        found: Number of its detections from `AGREE_SCORE` on.
        precision: Share of them that find an object of the sample at IoU 0.5, whatever its label.
        recall: Share of the sample's objects that they find.
        base_has: Share of them that the base has, see `agreement`.
        right_base_has: The same of those that find an object of the sample.
        has_base: Share of the base's that it has.
    """

    seconds: float
    rounds: list[float]
    ratio: float
    found: int
    precision: float
    recall: float
    base_has: float
    right_base_has: float
    has_base: float


def make_sample(folder: Path, name: str, side: int, seed: int) -> tuple[Path, Path]:
    """Write a sample of three bands, unless it is there; return its raster and its table."""
    image, table = folder / f"{name}.tif", folder / f"{name}.csv"
    if not table.exists():
        sampledata.make_sample(image, table, width=side, height=side, seed=seed, bands=3)
    return image, table


def as_one_class(df: pd.DataFrame) -> pd.DataFrame:
    """Give all objects one label: DeepForest suppresses across classes, the others within them."""
    return df.assign(label="object")


def train(folder: Path, epochs: int) -> Path:
    """Train a ResNet-50 RetinaNet on a sample of 2,400 px a side; return its checkpoint."""
    image, table = make_sample(folder, "training", 2400, seed=1)
    images, _ = annotations.clean_annotations(
        [table], [fileio.read_raster(image)], label_percentile=100, output_dir=folder / "clean",
        diameter_scale=sampledata.DIAMETER_SCALE, max_diameter=MAX_DIAMETER, workers=1,
        extra_steps=[as_one_class],
    )  # fmt: skip
    blocks = splits.ground_blocks(
        [i.raster for i in images], split_by="block", max_tile_size=TILE_SIZE, block_size=None,
        test_proportion=0.1, validation_proportion=0.1, seed=0,
    )  # fmt: skip
    options = tiling.TilingOptions(
        angles=(90, 180, 270), evaluation_overlap=tiling.evaluation_overlap(images)
    )
    tilings = tiling.make_tiles(images, blocks, [TILE_SIZE], folder / "tiles", options, workers=1)
    conf = ModelConfig(backbone="resnet50", fpn_channels=256, head_depth=4, accelerator="cpu")
    conf.validation.pr_compute_interval = epochs
    space = {
        "patch_size": [TILE_SIZE], "n_epochs": [epochs], "sample_size": [1.0],
        "learning_rate": [5e-4], "batch_size": [BATCH_SIZE],
    }  # fmt: skip
    data, _ = trials.prepare_search(images, blocks, tilings, space["sample_size"], conf)
    gridsearch.run_search(data, space, conf, folder / "run")
    return folder / "run" / "best.ckpt"


class ExactStrides(torch.nn.Module):
    """Our anchors for torchvision's forward, whose own stretch coarse levels to the tile."""

    def __init__(self, network: TileRetinaNet) -> None:
        """Keep what makes them."""
        super().__init__()
        self.anchors, self.finest = network.anchor_generator, network.fitted.finest_level
        self.offset = network.offset.repeat(2)

    def forward(self, images: ImageList, features: list[Tensor]) -> list[Tensor]:
        """Return the anchors of each image."""
        grids = [(*f.shape[-2:], 2**level) for level, f in enumerate(features, self.finest)]
        anchors = self.anchors.on_grids(grids, features[0].device) + self.offset
        return [anchors] * len(images.image_sizes)


def as_torchvision_has_it(network: TileRetinaNet) -> RetinaNet:
    """Return a copy that runs torchvision's own forward: lists of images in 0-1, contiguous.

    It resizes tiles to the size that they have, which costs a little and changes nothing.
    """
    plain = copy.deepcopy(network).to(memory_format=torch.contiguous_format).eval()
    plain.__class__ = RetinaNet
    plain.anchor_generator = ExactStrides(network)
    # SAHI's torchvision model leaves gradients on; without this it would be slower still
    return plain.requires_grad_(False)


def deepforest_runner(
    plain: RetinaNet, labels: Sequence[str], raster: Path, batch_size: int
) -> Callable[[], Found]:
    """Return a function that runs DeepForest."""
    from deepforest import main

    ids = {label: i for i, label in enumerate(labels)}
    config = {
        "workers": 0, "batch_size": batch_size, "accelerator": "cpu", "devices": 1,
        "num_classes": len(ids), "nms_thresh": plain.nms_thresh, "score_thresh": plain.score_thresh,
    }  # fmt: skip
    detector = main.deepforest(model=plain, config_args=config)  # a model given is not downloaded
    detector.set_labels(ids)
    detector.create_trainer(logger=False, enable_progress_bar=False, enable_model_summary=False)

    def run() -> Found:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its counts
            df = detector.predict_tile(
                path=str(raster), patch_size=TILE_SIZE, patch_overlap=OVERLAP_SHARE,
                iou_threshold=plain.nms_thresh, dataloader_strategy="single",
            )  # fmt: skip
        boxes = df[tiling.BOX_COLUMNS].to_numpy(np.float64)
        return Found(boxes, df["score"].to_numpy(np.float64), df["label"].map(ids).to_numpy())

    return run


def sahi_runner(plain: RetinaNet, labels: Sequence[str], raster: Path) -> Callable[[], Found]:
    """Return a function that runs SAHI."""
    from sahi.models.torchvision import TorchVisionDetectionModel
    from sahi.predict import get_sliced_prediction

    detector = TorchVisionDetectionModel(
        model=plain, device="cpu", confidence_threshold=plain.score_thresh,
        category_mapping={str(i): label for i, label in enumerate(labels)},
    )  # fmt: skip

    def run() -> Found:
        result = get_sliced_prediction(
            str(raster), detector, slice_height=TILE_SIZE, slice_width=TILE_SIZE,
            overlap_height_ratio=OVERLAP_SHARE, overlap_width_ratio=OVERLAP_SHARE,
            perform_standard_pred=False,  # of the whole raster, shrunk to one tile
            postprocess_type="NMS", postprocess_match_metric="IOU",
            postprocess_match_threshold=plain.nms_thresh, batch_size=BATCH_SIZE, verbose=0,
        )  # fmt: skip
        found = result.object_prediction_list
        return Found(
            np.array([f.bbox.to_xyxy() for f in found], np.float64).reshape(-1, 4),
            np.array([f.score.value for f in found], np.float64),
            np.array([f.category.id for f in found], np.int64),
        )

    return run


def our_runner(model: LargeRasterORModel, raster: Path, precision: str) -> Callable[[], Found]:
    """Return a function that runs this project; writing and reading the catalogue counts."""
    ids, threshold = {label: i for i, label in enumerate(model.labels)}, model.network.score_thresh
    model = copy.deepcopy(model)  # whose limits the prediction sets

    def run() -> Found:
        with tempfile.TemporaryDirectory() as folder:  # there is nothing that could be resumed
            output = Path(folder) / "catalogue.csv"
            predict.predict_raster(
                model, raster, output, tile_size=TILE_SIZE, overlap=OVERLAP,
                precision=precision, device="cpu", score_threshold=threshold,
            )  # fmt: skip
            df = pd.read_csv(output)
        boxes = df[tiling.BOX_COLUMNS].to_numpy(np.float64)
        return Found(boxes, df["score"].to_numpy(), df["label"].map(ids).to_numpy())

    return run


def bare_runner(
    call: Callable[[Tensor], list[dict[str, Tensor]]],
    windows: pd.DataFrame,
    tiles: Tensor,
    nms_threshold: float,
    precision: str = "32-true",
    batch_size: int = BATCH_SIZE,
) -> Callable[[], Found]:
    """Return a function that calls a network on tiles (N, bands, size, size), and suppresses."""
    corners = torch.from_numpy(windows[["x", "y", "x", "y"]].to_numpy(np.float32, copy=True))

    def run() -> Found:
        with torch.inference_mode(), autocast("cpu", precision):
            found = [one for batch in tiles.split(batch_size) for one in call(batch)]
        boxes = torch.cat([f["boxes"] + c for f, c in zip(found, corners, strict=True)])
        scores, labels = (torch.cat([f[name] for f in found]) for name in ("scores", "labels"))
        keep = batched_nms(boxes, scores, labels, nms_threshold)
        return Found(*(values[keep].numpy() for values in (boxes, scores, labels)))

    return run


def read_tiles(path: Path, model: LargeRasterORModel) -> tuple[pd.DataFrame, Tensor]:
    """Return the windows of a raster and its stretched pixels there, (N, bands, size, size)."""
    raster = fileio.read_raster(path)
    windows = tiling.window_grid(Window(0, 0, raster.width, raster.height), TILE_SIZE, OVERLAP)
    stretch = model.contract.radiometry.stretch
    places = windows[["x", "y", "width", "height"]].itertuples(index=False)
    tiles = [stretch(raster.read(Window(*place))) for place in places]
    return windows, torch.from_numpy(np.stack(tiles))


def agreement(found: Found, reference: Found) -> float:
    """Return the share of a reference's detections from `AGREE_SCORE` on that others found, too.

    One to one, under the same label, at `AGREE_IOU`; the scores of the others do not matter.
    """
    wanted, met = reference.scores >= AGREE_SCORE, 0
    for label in np.unique(reference.labels[wanted]):
        truth = reference.boxes[wanted & (reference.labels == label)]
        mine = found.labels == label
        matches = metrics.match_boxes(found.boxes[mine], found.scores[mine], truth, AGREE_IOU)
        met += (matches >= 0).sum()
    return float(met / max(wanted.sum(), 1))


def check_same_network(model: LargeRasterORModel, plain: RetinaNet, tiles: Tensor) -> None:
    """Compare what both forwards detect on the tile that shows most.

    Raises:
        RuntimeError: They differ.
    """
    with torch.inference_mode():
        mine, theirs = model.network(tiles)[1], plain(list(tiles))
    for one, other in zip(mine, theirs, strict=True):
        if len(one["boxes"]) != len(other["boxes"]) or not all(
            torch.allclose(one[name].float(), other[name].float(), rtol=1e-3, atol=1e-2)
            for name in one
        ):
            raise RuntimeError("torchvision's forward does not detect what ours does")
    log.info("both forwards detect the same: %s on tiles", [len(one["boxes"]) for one in mine])


def measure(runners: dict[str, Callable[[], Found]], rounds: int) -> tuple[dict, dict]:
    """Run all by turns; return the seconds of each round, and what they found in the first."""
    times, found = {name: [] for name in runners}, {}
    for number in range(rounds + 1):
        shift = number % len(runners)  # nobody is always first
        for name in [*runners][shift:] + [*runners][:shift]:
            start = time.perf_counter()
            result = runners[name]()
            seconds = time.perf_counter() - start
            if number:
                times[name].append(seconds)
            else:
                found[name] = result
            log.info("round %d: %-36s %6.2f s", number, name, seconds)
    return times, found


def truth_of(table: Path, raster: Path) -> np.ndarray:
    """Return the boxes of a sample's objects, cleaned as for training."""
    cleaned = annotations.preprocess_df(
        table, fileio.read_raster(raster), diameter_scale=sampledata.DIAMETER_SCALE,
        max_diameter=MAX_DIAMETER,
    )  # fmt: skip
    return cleaned.df[tiling.BOX_COLUMNS].to_numpy(np.float64)


def compare(
    times: dict[str, list[float]], found: dict[str, Found], base: str, truth: np.ndarray
) -> dict[str, Line]:
    """Turn times and detections into the lines of the table; the boxes of the truth are (N, 4)."""
    lines = {}
    for name, mine in found.items():
        # DeepForest cuts fractions off, so that small boxes of its own are not quite the base's
        theirs = found[base].in_whole_px() if name.startswith("DeepForest") else found[base]
        shown = mine.scores >= AGREE_SCORE
        hits = metrics.match_boxes(mine.boxes[shown], mine.scores[shown], truth, 0.5) >= 0
        lines[name] = Line(
            seconds=statistics.median(times[name]),
            rounds=times[name],
            ratio=common.ratio(times[name], times[base]),
            found=int(shown.sum()),
            precision=float(hits.sum() / max(shown.sum(), 1)),
            recall=float(hits.sum() / len(truth)),
            base_has=agreement(theirs, mine),
            right_base_has=agreement(theirs, mine.rows(np.flatnonzero(shown)[hits])),
            has_base=agreement(mine, theirs),
        )
    return lines


def benchmark(
    checkpoint: Path, folder: Path, side: int, rounds: int, *, with_ours: bool
) -> dict[str, object]:
    """Measure all on one raster; log the table and return what it says."""
    model = LargeRasterORModel.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    image, table = make_sample(folder, f"unseen_{side}", side, seed=2)
    windows, tiles = read_tiles(image, model)
    plain = as_torchvision_has_it(model.network)
    check_same_network(model, plain, tiles[:BATCH_SIZE])
    call = partial(bare_runner, windows=windows, tiles=tiles, nms_threshold=plain.nms_thresh)
    runners = {
        "DeepForest": deepforest_runner(plain, model.labels, image, BATCH_SIZE),
        "DeepForest, tile by tile": deepforest_runner(plain, model.labels, image, 1),
        "SAHI": sahi_runner(plain, model.labels, image),
        "network, fp32, contiguous": call(lambda batch: plain(list(batch))),
        "network, fp32": call(model, batch_size=strips.CPU_BATCH),
        "network, bf16": call(model, precision="bf16-mixed", batch_size=strips.CPU_BATCH),
    }
    if with_ours:
        runners["ours, fp32"] = our_runner(model, image, "32-true")
        runners["ours, bf16"] = our_runner(model, image, "bf16-mixed")
    base = "ours, fp32" if with_ours else "network, fp32"
    times, found = measure(runners, rounds)
    lines = compare(times, found, base, truth_of(table, image))
    agree = {
        name: {other: agreement(theirs, mine) for other, theirs in found.items()}
        for name, mine in found.items()
    }
    settings = {
        "side": side, "windows": len(windows), "tile_size": TILE_SIZE, "overlap": OVERLAP,
        "batch_size": BATCH_SIZE, "rounds": rounds, "base": base,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    log.info("%s", ", ".join(f"{name} {value}" for name, value in settings.items()))
    columns = [f.name for f in fields(Line) if f.name != "rounds"]
    log.info("%-26s%s", "", "".join(f"{name:>15}" for name in columns))
    for name, line in lines.items():
        values = (getattr(line, column) for column in columns)
        shown = (f"{v:>15}" if isinstance(v, int) else f"{v:>15.3f}" for v in values)
        log.info("%-26s%s", name, "".join(shown))
    rows = []
    for name, line in lines.items():
        against = AGAINST.get(name) if with_ours else None
        rows.append({
            "size": side, "way": name, "seconds": line.seconds, "runs": line.rounds,
            "added_mb": None, "peak_mb": None, "against": against,
            "ratio": common.ratio(line.rounds, times[against]) if against else None,
            "result": f"precision {line.precision:.3f}, recall {line.recall:.3f}",
        })  # fmt: skip
    return {
        "title": "Predicting a raster",
        "size": "px a side",
        "memory": "peak_mb",
        "script": Path(__file__).name,
        "machine": common.machine(),
        "rows": rows,
        "aims": [common.judge(aim, rows) for aim in AIMS if with_ours],
        "settings": settings,
        "lines": {name: asdict(line) for name, line in lines.items()},
        "agreement": agree,  # [a][b]: share of a's detections that b has
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="keep samples and checkpoint in this folder")
    parser.add_argument("--checkpoint", type=Path, help="of three bands of 8 bits, tiles of 400 px")
    parser.add_argument("--epochs", type=int, default=5, help="of the training, 208 tiles each")
    parser.add_argument("--side", type=int, default=2048, help="of the raster, px")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="one epoch, two rounds")
    parser.add_argument("--no-ours", action="store_true", help="only the peers and bare calls")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if args.short:
        args.epochs, args.rounds = 1, 2
    if missing := [name for name in PEERS if importlib.util.find_spec(name) is None]:
        parser.error(f"{', '.join(missing)} not installed; requirements-bench.txt tells how")
    for name in ("pytorch_lightning", "predict"):  # hints at hardware; every catalogue written
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning")  # of too few workers
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = args.checkpoint or folder / "run" / "best.ckpt"
        if not args.checkpoint and not checkpoint.exists():
            train(folder, args.epochs)
        record = benchmark(checkpoint, folder, args.side, args.rounds, with_ours=not args.no_ours)
    if args.json:
        fileio.write_json(args.json, record)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
