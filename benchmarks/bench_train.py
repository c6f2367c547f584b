"""Training steps of the same network, ResNet-50 RetinaNet on tiles of 400 px, by fours.

    .bench-venv/bin/python benchmarks/bench_train.py [--short] [--json FILE]

Five steps on images of noise with thirty boxes each, after five that warm: forward, loss, backward,
optimiser. The peer is the network that DeepForest builds: torchvision's, with norms and the first
two of five stages frozen, in float32, with SGD. It enlarges tiles to 800 px unless told otherwise;
both are measured. Ours has the same backbone, frozen likewise, the same width and depth of the
head, and as many anchors a place, on levels P3 to P6; torchvision adds P7, 16 of 3,350 places.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import common
import numpy as np

BATCH, STEPS, OBJECTS = 4, 5, 30


def make(folder: Path, size: int) -> None:
    """Write nothing: the images are noise."""


def _batch(size: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.random((BATCH, 3, size, size), dtype=np.float32)
    corner = rng.uniform(0, size - 40, (BATCH, OBJECTS, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(8, 40, (BATCH, OBJECTS, 2))], axis=2)
    return images, boxes.astype(np.float32)


def ours(folder: Path, size: int, precision: str) -> common.Work:
    """Train with the project, in a precision of `resolve_precision`."""
    import torch

    from imutils import Radiometry
    from LargeRasterOR import LargeRasterORModel, autocast, resolve_precision
    from ModelConfig import ModelConfig
    from networks import DataContract, fit_anchors, freeze_stages

    images, boxes = _batch(size)
    conf = ModelConfig(
        backbone="resnet50", fpn_channels=256, head_depth=4, finest_level=3, anchors_per_level=3,
        aspect_ratios=(0.5, 1.0, 2.0), norm="frozen", freeze_stages=1,
    )  # fmt: skip
    contract = DataContract(
        tile_size=size, bands=(1, 2, 3), band_count=3, dtype="uint8",
        radiometry=Radiometry("none", (0.0,) * 3, (1.0,) * 3, (0.5,) * 3, (0.3,) * 3),
        anchors=fit_anchors(boxes.reshape(-1, 4), conf), detections_per_tile=100, resolution=None,
        split_hash="", evaluation_overlap=40,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LargeRasterORModel(["object"], conf, contract)
    freeze_stages(model.network.backbone, conf.freeze_stages)
    network = model.network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    labels = torch.zeros(OBJECTS, dtype=torch.int64, device=device)
    targets = [{"boxes": torch.tensor(b, device=device), "labels": labels} for b in boxes]
    batch, precision = torch.tensor(images, device=device), resolve_precision(precision, device)

    def step() -> float:
        with autocast(device, precision):
            losses, _ = network(batch, targets, detect=False)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return partial(_repeat, step)


def deepforest(folder: Path, size: int, enlarged: int | None) -> common.Work:
    """Train with DeepForest's module, at the size that its network enlarges tiles to."""
    import torch
    from deepforest import main
    from torchvision.models import resnet50
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.ops import FrozenBatchNorm2d
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    images, boxes = _batch(size)
    # what `retinanet_resnet50_fpn(weights="COCO_V1").backbone` is, without the download
    backbone = _resnet_fpn_extractor(
        resnet50(weights=None, norm_layer=FrozenBatchNorm2d), trainable_layers=3,
        returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(2048, 256),
    )  # fmt: skip
    sides = {"min_size": enlarged, "max_size": enlarged} if enlarged else {}
    network = RetinaNet(backbone, num_classes=1, **sides)
    detector = main.deepforest(model=network, config_args={"num_classes": 1})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = detector.model.to(device).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    labels = torch.zeros(OBJECTS, dtype=torch.int64, device=device)
    targets = [{"boxes": torch.tensor(b, device=device), "labels": labels} for b in boxes]
    batch = [torch.tensor(image, device=device) for image in images]

    def step() -> float:
        loss = sum(network(batch, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return partial(_repeat, step)


def _repeat(step: common.Work) -> str:
    """Run the steps; the losses are waited for, so that a device has done its work."""
    losses = [step() for _ in range(STEPS)]
    return f"{STEPS * BATCH} images, finite: {bool(np.isfinite(losses).all())}"


def warmed(way: common.Way) -> common.Way:
    """Return a way whose first steps are not timed: libraries choose their kernels then."""

    def prepare(folder: Path, size: int) -> common.Work:
        work = way(folder, size)
        work()
        return work

    return prepare


if __name__ == "__main__":
    common.main(
        common.Stage(
            title=f"Training, {STEPS} steps of {BATCH} tiles",
            size="px a tile",
            sizes=(400,),
            short=(400,),
            make=make,
            ways={
                "ours, automatic precision": warmed(partial(ours, precision="auto")),
                "ours, float32": warmed(partial(ours, precision="32-true")),
                "DeepForest, as it is": warmed(partial(deepforest, enlarged=None)),
                "DeepForest, tiles not enlarged": warmed(partial(deepforest, enlarged=400)),
            },
            against=dict.fromkeys(
                ("ours, float32", "DeepForest, as it is", "DeepForest, tiles not enlarged"),
                "ours, automatic precision",
            ),
            memory="peak",
            once=("DeepForest, as it is",),
            aims=(
                common.Aim("ours, automatic precision", "DeepForest, tiles not enlarged", 1.5),
                common.Aim("ours, automatic precision", "DeepForest, as it is", 1.5),
            ),
            needs=dict.fromkeys(
                ("DeepForest, as it is", "DeepForest, tiles not enlarged"), "deepforest"
            ),
        ),
        __doc__,
    )
