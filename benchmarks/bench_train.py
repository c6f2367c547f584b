"""Training steps of the same network, ResNet-50 RetinaNet on tiles of 400 px, by fours.

    .bench-venv/bin/python benchmarks/bench_train.py [--short] [--json FILE]

Five steps on images of noise with thirty boxes each, after five that warm: forward, loss, backward,
optimiser. The peer is the network that DeepForest builds: torchvision's, with norms and the first
two of five stages frozen, in float32, with SGD. It enlarges tiles to 800 px unless told otherwise;
both are measured. Ours has the same backbone, frozen likewise, the same width and depth of the
head, and as many anchors a place, on levels P3 to P6; torchvision adds P7, 16 of 3,350 places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import common
import numpy as np

if TYPE_CHECKING:
    import torch

BATCH, STEPS, OBJECTS = 4, 5, 30


def _batch(size: int) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Return images and targets, on the device that there is."""
    import torch

    rng = np.random.default_rng(0)
    images = rng.random((BATCH, 3, size, size), dtype=np.float32)
    corner = rng.uniform(0, size - 40, (BATCH, OBJECTS, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(8, 40, (BATCH, OBJECTS, 2))], axis=2)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    labels = torch.zeros(OBJECTS, dtype=torch.int64, device=device)
    boxes = torch.tensor(boxes, dtype=torch.float32, device=device)
    return torch.tensor(images, device=device), [{"boxes": b, "labels": labels} for b in boxes]


def ours(folder: Path, size: int, precision: str) -> common.Work:
    """Train with the project, in a precision of `resolve_precision`."""
    import torch

    from imutils import Radiometry
    from LargeRasterOR import LargeRasterORModel, autocast, resolve_precision
    from ModelConfig import ModelConfig
    from networks import DataContract, fit_anchors, freeze_stages

    images, targets = _batch(size)
    boxes = torch.cat([target["boxes"] for target in targets]).cpu().numpy()
    conf = ModelConfig(
        backbone="resnet50", fpn_channels=256, head_depth=4, finest_level=3, anchors_per_level=3,
        aspect_ratios=(0.5, 1.0, 2.0), norm="frozen", freeze_stages=1,
    )  # fmt: skip
    contract = DataContract(
        tile_size=size, bands=(1, 2, 3), band_count=3, dtype="uint8",
        radiometry=Radiometry("none", (0.0,) * 3, (1.0,) * 3, (0.5,) * 3, (0.3,) * 3),
        anchors=fit_anchors(boxes, conf), detections_per_tile=100, resolution=None,
        split_hash="", evaluation_overlap=40,
    )  # fmt: skip
    model = LargeRasterORModel(["object"], conf, contract)
    freeze_stages(model.network.backbone, conf.freeze_stages)
    network, device = model.network.to(images.device).train(), images.device.type
    precision = resolve_precision(precision, device)

    def losses() -> dict[str, torch.Tensor]:
        with autocast(device, precision):
            return network(images, targets, detect=False)[0]

    return _training(losses, torch.optim.AdamW(network.parameters(), fused=True))


def deepforest(folder: Path, size: int, enlarged: int | None) -> common.Work:
    """Train with DeepForest's module, at the size that its network enlarges tiles to."""
    import torch
    from deepforest import main
    from torchvision.models import resnet50
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.ops import FrozenBatchNorm2d
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    images, targets = _batch(size)
    # what `retinanet_resnet50_fpn(weights="COCO_V1").backbone` is, without the download
    backbone = _resnet_fpn_extractor(
        resnet50(weights=None, norm_layer=FrozenBatchNorm2d), trainable_layers=3,
        returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(2048, 256),
    )  # fmt: skip
    sides = {"min_size": enlarged, "max_size": enlarged} if enlarged else {}
    network = RetinaNet(backbone, num_classes=1, **sides)
    detector = main.deepforest(model=network, config_args={"num_classes": 1})
    network, images = detector.model.to(images.device).train(), list(images)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    return _training(lambda: network(images, targets), optimizer)


def _training(
    losses: Callable[[], Mapping[str, torch.Tensor]], optimizer: torch.optim.Optimizer
) -> common.Work:
    """Return what makes some steps, after as many that warm: libraries choose their kernels then.

    Each loss is waited for, so that a device has done its work.
    """

    def step() -> float:
        loss = sum(losses().values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    def work() -> str:
        finite = np.isfinite([step() for _ in range(STEPS)]).all()
        return f"{STEPS * BATCH} images, finite: {bool(finite)}"

    work()
    return work


if __name__ == "__main__":
    common.main(
        common.Stage(
            title=f"Training, {STEPS} steps of {BATCH} tiles",
            size="px a tile",
            sizes=(400,),
            short=(400,),
            make=None,
            ways={
                "ours, automatic precision": partial(ours, precision="auto"),
                "ours, float32": partial(ours, precision="32-true"),
                "DeepForest, as it is": partial(deepforest, enlarged=None),
                "DeepForest, tiles not enlarged": partial(deepforest, enlarged=400),
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
