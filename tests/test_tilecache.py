"""The cache of tiles: the very same values, made once, whole or not at all."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import shapely
import torch
import zarr
from segments import make_segments, seg_conf
from torch.utils.data import DataLoader

import datasets
import fileio
import gridsearch
import tilecache
import trials
from datasets import TileDataModule
from ImageData import Window


@pytest.fixture(scope="module")
def segments(tmp_path_factory):
    made = make_segments(tmp_path_factory.mktemp("segments"))
    made.data, _ = trials.prepare_search(
        made.images, made.blocks, made.tilings, [1.0], seg_conf(),
        cache_dir=tmp_path_factory.mktemp("cache"),
    )  # fmt: skip
    return made


def modules(made, **options):
    """Return tiles read from the rasters, and from the cache."""
    conf = seg_conf(**{"train.augment.zoom": 1.5, "train.augment.mosaic": 0.3} | options)
    tiles, boxes = datasets.tiling.read_tiles(made.tilings[64])
    data = made.data
    return [
        TileDataModule(
            tiles, boxes, data.rasters, data.ids, data.radiometry, conf, labels=data.labels,
            cache=cache,
        )
        for cache in (None, data.cache)
    ]  # fmt: skip


def same(one, other):
    for (image, target), (other_image, other_target) in zip(one, other, strict=True):
        torch.testing.assert_close(image, other_image, rtol=0, atol=0)
        assert target.keys() == other_target.keys()
        for name in target:
            torch.testing.assert_close(target[name], other_target[name], rtol=0, atol=0)


def test_tiles_from_the_cache_are_those_of_the_rasters(segments):
    plain, cached = modules(segments)
    assert isinstance(cached.train.rasters["ground0"], tilecache.CachedRaster)
    for name in ("train", "validation", "test"):
        one, other = getattr(plain, name), getattr(cached, name)
        items = [(i, i) if name == "train" else i for i in range(len(one))]
        same([one[i] for i in items], [other[i] for i in items])


def test_worker_processes_read_the_cache(segments):
    plain, cached = modules(segments)
    loaders = [
        DataLoader(module.test, batch_size=4, num_workers=2, collate_fn=datasets.collate)
        for module in (plain, cached)
    ]
    for (images, targets), (others, other_targets) in zip(*loaders, strict=True):
        torch.testing.assert_close(images, others, rtol=0, atol=0)
        same(list(zip(images, targets, strict=True)), list(zip(others, other_targets, strict=True)))


def test_nodata_regions_edges_and_bands_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(tilecache, "SHARD", 64)
    monkeypatch.setattr(tilecache, "CHUNK", 32)
    pixels = np.random.default_rng(0).normal(size=(3, 150, 200)).astype(np.float32)
    pixels[:, :, :20], pixels[1, 70, 70] = -9, np.nan
    path = tmp_path / "r.tif"
    layout = {"width": 200, "height": 150, "count": 3, "dtype": "float32", "nodata": -9}
    with fileio.create_raster(path, **layout) as dst:
        dst.write(pixels)
    raster = fileio.read_raster(path, [3, 1])
    raster = raster.with_regions(fileio.Regions(ignored=(shapely.box(100, 0, 120, 150),)))
    blocks = pd.DataFrame(
        {"raster": "r", "x": [0, 100], "y": 0, "width": 100, "height": 150,
         "split": ["train", "test"]}
    )  # fmt: skip
    folder = tilecache.cache_tiles({"r": raster}, None, blocks, tmp_path / "cache", workers=1)
    handles, labels = tilecache.open_cache(folder, "train", {"r": raster}, None)
    assert labels is None
    for window in (Window(10, 5, 40, 60), Window(-7, 100, 60, 60), Window(60, 60, 40, 30)):
        known = [datasets.tiling.read_tile(r, window, 90) for r in (raster, handles["r"])]
        for mine, other in zip(*known, strict=True):
            np.testing.assert_array_equal(mine, other)
    test, _ = tilecache.open_cache(folder, "test", {"r": raster}, None)
    valid = test["r"].read_valid(Window(66, 0, 30, 40), pixels)
    assert not valid.any()  # ground of the training is not in the store of the test
    group = zarr.open_group(str(folder / "train.zarr"), mode="r")
    assert group["r/image"].metadata.zarr_format == 3
    assert group["r/image"].shards == (2, 64, 64)


def test_what_is_killed_goes_on_and_what_changes_is_made_anew(segments, tmp_path, monkeypatch):
    monkeypatch.setattr(tilecache, "SHARD", 256)
    arguments = segments.data.rasters, segments.data.labels
    written, fill = [], tilecache._fill

    def killed(job):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(job)
        fill(job)

    monkeypatch.setattr(tilecache, "_fill", killed)
    with pytest.raises(KeyboardInterrupt):
        tilecache.cache_tiles(*arguments, segments.blocks, tmp_path, workers=1)
    (folder,) = tmp_path.glob("tiles-*")
    plain, _ = tilecache.open_cache(folder, "train", *arguments)
    assert plain["ground0"] is segments.data.rasters["ground0"]  # half a cache is none
    before = len((folder / tilecache.DONE).read_text().splitlines())
    assert before >= 4
    monkeypatch.setattr(tilecache, "_fill", lambda job: written.append(job) or fill(job))
    assert tilecache.cache_tiles(*arguments, segments.blocks, tmp_path, workers=1) == folder
    places = [tilecache._key(*job[:2], job[3]) for job in written]
    assert len(places) - len(set(places)) <= 5 - before  # none that was noted is read again
    count = len(written)
    assert tilecache.cache_tiles(*arguments, segments.blocks, tmp_path, workers=1) == folder
    assert len(written) == count
    moved = segments.blocks.assign(split=segments.blocks["split"].replace("test", "unused"))
    assert tilecache.cache_tiles(*arguments, moved, tmp_path, workers=1) != folder


def test_a_search_with_a_cache_ends_as_one_without(segments, tmp_path):
    space = {"patch_size": [64], "n_epochs": [1], "sample_size": [0.3], "learning_rate": [3e-3],
             "batch_size": [8]}  # fmt: skip
    boards = []
    for name, cache in (("with", segments.data.cache), ("without", None)):
        data = trials.replace(segments.data, cache=cache)
        board = gridsearch.run_search(data, space, seg_conf(), tmp_path / name)
        boards.append(board.drop(columns=["training_time", "checkpoint"]))
    pd.testing.assert_frame_equal(*boards)
    _, data, _ = gridsearch._read_search(tmp_path / "with")
    assert data.cache == segments.data.cache
    record = json.loads((tmp_path / "with" / "trials" / "made_from.json").read_text())
    assert "cache" not in record  # trials with and without it can be ranked together


@pytest.fixture(scope="module")
def patches(segments, tmp_path_factory):
    conf = seg_conf(**{"train.random_windows": False})
    data, _ = trials.prepare_search(
        segments.images, segments.blocks, segments.tilings, [1.0], conf,
        cache_dir=tmp_path_factory.mktemp("patches"),
    )  # fmt: skip
    return data


def test_tiles_taken_as_they_are_come_from_patches(segments, patches):
    assert patches.cache is None
    conf = seg_conf(**{"train.random_windows": False, "workers": 2})
    tiles, boxes = datasets.tiling.read_tiles(segments.tilings[64])
    plain, stored = (
        TileDataModule(
            tiles, boxes, patches.rasters, patches.ids, patches.radiometry, conf,
            labels=patches.labels, patches=folder,
        )
        for folder in (None, patches.patches[64])
    )  # fmt: skip
    for name in ("train", "validation", "full_validation", "test"):
        one, other = getattr(plain, name), getattr(stored, name)
        assert isinstance(other, datasets.PatchDataset)
        items = [(i, i) if name == "train" else i for i in range(len(one))]  # turned twins, too
        same([one[i] for i in items], [other[i] for i in items])
    assert isinstance(stored.sampler, datasets.BlockSampler)
    assert not isinstance(plain.sampler, datasets.BlockSampler)
    rows = [
        sorted(row for batch in module.batches for row, _ in batch) for module in (plain, stored)
    ]
    assert rows[0] == rows[1]
    gone = TileDataModule(
        tiles, boxes, patches.rasters, patches.ids, patches.radiometry, conf,
        labels=patches.labels, patches=patches.patches[64] / "nowhere",
    )  # fmt: skip
    assert isinstance(gone.train.rasters["ground0"], fileio.Raster)


def test_a_search_learns_from_patches_and_its_workers_find_them(patches, tmp_path):
    space = {"patch_size": [64], "n_epochs": [1], "sample_size": [0.3], "learning_rate": [3e-3],
             "batch_size": [8]}  # fmt: skip
    conf = seg_conf(**{"train.random_windows": False})
    board = gridsearch.run_search(patches, space, conf, tmp_path)
    assert board["state"].tolist() == ["complete"]
    _, data, _ = gridsearch._read_search(tmp_path)
    assert data.patches == patches.patches


def test_rasters_are_drawn_by_their_weights(segments):
    options = {"train.raster_weights": [["ground1", 3.0]], "train.repeat_threshold": 0.0}
    plain, _ = modules(segments, **options)
    names = plain.train.tiles["raster"].to_numpy()
    weights = plain.sampler.weights
    assert set(weights[names == "ground1"]) == {3.0}
    assert set(weights[names == "ground0"]) == {1.0}
