"""Torch data: tiles, targets, augmentation, loaders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

import datasets
import tiling
from datasets import BboxDataset, TileDataModule
from ImageData import Window
from ModelConfig import ModelConfig


def module_of(prepared, **options):
    data = prepared.data
    conf = options.pop("conf", ModelConfig(batch_size=4))
    return TileDataModule(
        prepared.tiles, prepared.boxes, data.rasters, data.ids, data.radiometry, conf, **options
    )


def test_class_ids_follow_the_names():
    assert datasets.class_ids(["b", "c", "a", "b"]) == {"a": 0, "b": 1, "c": 2}


def test_an_item_is_the_stretched_window_with_its_boxes(prepared):
    module = module_of(prepared)
    dataset = BboxDataset(
        module.train.tiles, prepared.boxes, prepared.data.rasters, prepared.data.ids,
        prepared.data.radiometry,
    )  # fmt: skip
    for index in (0, 1, 2, 3):  # one window in its four turns
        tile = dataset.tiles.iloc[index]
        image, target = dataset[index]
        window = Window(*(int(tile[c]) for c in tiling.WINDOW_COLUMNS))
        raw = np.rot90(
            prepared.data.rasters[tile["raster"]].read(window), tile["angle"] // 90, (1, 2)
        )
        np.testing.assert_allclose(image.numpy(), raw / np.float32(255), rtol=1e-5)
        shown = prepared.boxes[prepared.boxes["window"] == tile["window"]]
        assert len(target["boxes"]) == len(target["labels"]) == len(shown)
        names = sorted(prepared.data.ids)
        assert [names[i] for i in target["labels"]] == shown["label"].tolist()
        assert target["boxes"].dtype == torch.float32


@pytest.mark.parametrize("seed", range(6))
def test_augmentation_keeps_boxes_on_their_objects(seed):
    torch.manual_seed(seed)
    image = torch.zeros(5, 40, 40)
    image[:, 8:12, 4:10] = 1.0
    boxes = tv_tensors.BoundingBoxes(
        torch.tensor([[4.0, 8, 10, 12]]), format="XYXY", canvas_size=(40, 40)
    )
    target = {"boxes": boxes, "labels": torch.tensor([3])}
    out, target = datasets.training_transform()(tv_tensors.Image(image), target)
    x0, y0, x1, y1 = target["boxes"][0].int().tolist()
    bright = out > out.mean()
    assert bright[:, y0:y1, x0:x1].all()
    assert bright.sum() == 5 * 24
    assert target["labels"].tolist() == [3]


def test_targets_of_evaluation_own_every_object_once(prepared):
    module = module_of(prepared)
    seen = []
    for _, target in module.test:
        owned = target["truth_owned"]
        center = (target["truth_boxes"][:, :2] + target["truth_boxes"][:, 2:]) / 2
        core = target["core"]
        assert (center[owned] >= core[:2] - 40).all()
        seen += [(int(target["ground"]), int(i)) for i in target["truth_ids"][owned]]
    assert len(seen) == len(set(seen)) == module.test.tiles["objects"].sum()


def test_loaders_batch_and_shuffle_by_seed(prepared):
    def first_batch(seed):
        module = module_of(prepared, conf=ModelConfig(batch_size=4, seed=seed))
        torch.manual_seed(0)
        images, targets = next(iter(module.train_dataloader()))
        assert images.shape == (4, 1, 128, 128)
        assert len(targets) == 4
        return [len(t["labels"]) for t in targets]

    assert first_batch(0) == first_batch(0)
    assert first_batch(0) != first_batch(1)


def test_worker_processes_read_the_same_tiles(prepared):
    module = module_of(prepared)
    alone = torch.cat([images for images, _ in module.test_dataloader()])
    module = module_of(prepared, conf=ModelConfig(batch_size=4, workers=1))
    np.testing.assert_array_equal(
        alone, torch.cat([images for images, _ in module.test_dataloader()])
    )


def test_a_sample_thins_training_and_validation_but_not_the_final_measures(prepared):
    whole, half = module_of(prepared), module_of(prepared, sample_size=0.5)
    assert len(half.train) < len(whole.train)
    assert len(half.validation) < len(whole.validation)
    assert len(half.full_validation) == len(whole.full_validation) == len(whole.validation)
    assert len(half.test) == len(whole.test)
