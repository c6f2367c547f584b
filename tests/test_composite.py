"""Composites of image and mask: what is added, split, pruned, kept on disk and drawn."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import rasterio.shutil
import shapely
import torch
from conftest import PROJECT
from segments import texture, write_band
from torch.utils.data import DataLoader

import composite
import datasets
import fileio
import imutils
import masks
import sampledata
import tilecache
import tiling
import trials
from composite import CompositeTrainingDataset, PatchOptions, TrainingDataset
from datasets import BlockSampler, PatchDataset, TileBatches
from ImageData import IGNORE, InputError, Window
from ModelConfig import ModelConfig

OPTIONS = PatchOptions(size=64, overlap=32, block_size=128)
SEEN = imutils.Radiometry("none", (0.0,), (255.0,), (0.5,), (0.2,))


def write_pair(folder, name, seed, side=384):
    """Write an image with an empty and a constant corner, and its mask."""
    pixels, mask = texture(side, seed)
    pixels[:128, :128] = 0
    pixels[-128:, -128:] = 77
    paths = folder / f"{name}.tif", folder / f"{name}_mask.tif"
    write_band(paths[0], pixels)
    write_band(paths[1], mask)
    return paths


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    one, two = (write_pair(folder, name, seed) for seed, name in enumerate("ab"))
    return [
        TrainingDataset(*one, classes={"0": "calm", "1": "rough"}, tags=("north",)),
        TrainingDataset(*two, classes={"0": "rough", "1": "calm"}, weight=3.0),
    ]


@pytest.fixture(scope="module")
def made(pairs, tmp_path_factory):
    both = pairs[0] + pairs[1]
    both.options, both.cache_directory = OPTIONS, tmp_path_factory.mktemp("cache")
    both.prepare(workers=1).save_prepared_arrays(workers=1)
    return both


def of(pairs, folder):
    return CompositeTrainingDataset(tuple(pairs), OPTIONS, folder)


def test_the_key_does_not_depend_on_the_order_of_adding(pairs, tmp_path):
    third = TrainingDataset(*write_pair(tmp_path, "c", 5))
    a, b = pairs
    sums = [(a + b) + third, a + (b + third), third + b + a, sum([b, third, a]), a + b + third + a]
    assert len({total.key for total in sums}) == 1
    assert [p.identifier for p in sums[2].constituents] == ["a", "b", "c"]
    assert (a + b).key != sums[0].key
    other = a + b + third
    other.options = dataclasses.replace(other.options, seed=1)
    assert other.key != sums[0].key
    with pytest.raises(InputError, match="need the same options"):
        other + (a + b)


def test_a_mask_in_a_vrt_is_known_by_its_sources(pairs, tmp_path):
    _, mask = write_pair(tmp_path, "v", 7)
    vrt = tmp_path / "v.vrt"
    rasterio.shutil.copy(mask, vrt, driver="VRT")
    pair = dataclasses.replace(pairs[0], mask=vrt)
    before = pair.made_from
    with rasterio.open(mask, "r+") as dst:
        pixels = dst.read(1)
        pixels[200, 200] ^= 1
        dst.write(pixels, 1)
    assert pair.made_from != before


def test_messages_speak_of_the_options_here(pairs, tmp_path):
    wrong = of([dataclasses.replace(pairs[0], classes={"0": "calm", "5": "rough"})], tmp_path)
    with pytest.raises(InputError, match=r"not among classes, .*with attribute_filter") as caught:
        wrong.prepare(workers=1)
    assert not re.search(r"[A-Z_]{5,}", str(caught.value))
    folder = tmp_path / "BANDS"
    gone = of([dataclasses.replace(pairs[0], image=folder / "CLASSES.tif", bands=(7,))], tmp_path)
    with pytest.raises(InputError, match=r"BANDS/CLASSES\.tif does not exist"):
        gone.load_prepared_arrays()
    (image, _), gone = write_pair(tmp_path, "g", 1), gone.constituents[0]
    with pytest.raises(InputError, match=r"got \[7\] in bands"):
        of([dataclasses.replace(gone, image=image)], tmp_path).load_prepared_arrays()


def test_images_of_two_resolutions_are_told(tmp_path, caplog):
    for name, step in (("fine", 1.0), ("coarse", 2.0)):
        for path in write_pair(tmp_path, name, 1):
            with rasterio.open(path, "r+") as dst:
                dst.crs, dst.transform = "EPSG:32633", rasterio.Affine(step, 0, 5e5, 0, -step, 5e6)
    far = [TrainingDataset(tmp_path / f"{n}.tif", tmp_path / f"{n}_mask.tif") for n in
           ("fine", "coarse")]  # fmt: skip
    both = of(far, tmp_path / "cache")
    with pytest.raises(InputError, match="share ground"):
        both.prepare(workers=1)
    with pytest.raises(InputError, match=r"call prepare\(\) first"):
        both.save_prepared_arrays(workers=1)
    assert "have pixels of 1 to 2 m; give every pair the same resolution" in caplog.text


def test_two_images_of_one_name_are_refused(pairs):
    with pytest.raises(InputError, match=r"differ in their stems.*'a'"):
        pairs[0] + dataclasses.replace(pairs[0], bands=(1,))


def test_no_ground_is_on_two_sides_although_patches_overlap(made):
    tiles = made.tiles[made.tiles["kept"]]
    for name, group in tiles.groupby("raster"):
        seen = np.zeros((3, 384, 384), dtype=int)
        for tile in group.itertuples():
            side = ["train", "validation", "test"].index(tile.split)
            seen[side, tile.y : tile.y + tile.height, tile.x : tile.x + tile.width] += 1
        assert ((seen > 0).sum(axis=0) <= 1).all(), name
        assert seen[0].max() > 1  # they do overlap


def test_empty_and_constant_patches_are_left_out_with_the_reason(made):
    tiles = made.tiles
    train = tiles[tiles["split"] == "train"]
    for tile in train.itertuples():
        pixels = fileio.read_raster(
            next(p.image for p in made.constituents if p.identifier == tile.raster)
        ).read(Window(tile.x, tile.y, 64, 64))
        assert tile.kept == (pixels.min() < pixels.max())
        assert tile.reason == ("" if tile.kept else "constant_filter")
    table = made.describe()
    assert {"", "constant_filter"} == set(table["reason"])
    assert table["patches"].sum() == len(tiles)
    np.testing.assert_allclose(table.groupby("raster")["share"].sum(), 1)


def test_an_image_without_patches_of_a_split_is_told(pairs, tmp_path, caplog):
    image, mask = write_pair(tmp_path, "flat", 5)
    with rasterio.open(image, "r+") as dst:
        dst.write(np.full((1, 384, 384), 9, np.uint8))
    both = of([*pairs, TrainingDataset(image, mask)], tmp_path / "cache")
    both.prepare(workers=1)
    (told,) = [r.getMessage() for r in caplog.records if "flat has no patch" in r.getMessage()]
    assert "flat has no patch for train" in told
    caplog.clear()
    both.options = dataclasses.replace(OPTIONS, split_by="raster", filters=())
    both.prepare(workers=1)
    assert "has no patch" not in caplog.text  # each is of one split by wish
    with pytest.raises(AttributeError):
        both.option = OPTIONS  # a misspelt name must not be taken in silence


def test_a_choice_of_bands_per_image_is_told_and_kept(pairs, tmp_path, caplog):
    image, mask = write_pair(tmp_path, "d", 6)
    with rasterio.open(image) as src:
        pixels, profile = src.read(1), src.profile | {"count": 2}
    with rasterio.open(tmp_path / "e.tif", "w", **profile) as dst:
        dst.write(np.stack([255 - pixels, pixels]))
    mixed = of([pairs[0], TrainingDataset(tmp_path / "e.tif", mask, bands=(2,))], tmp_path / "x")
    mixed.prepare(workers=1)
    assert "different bands are read" in caplog.text
    conf = ModelConfig(task="segmentation", batch_size=4)
    data, _ = trials.prepare_search(mixed.images, mixed.blocks, mixed.tilings, [1.0], conf)
    module = trials._module(data, *tiling.read_tiles(data.tilings[64]), conf, 1.0)
    assert trials.make_contract(data, module, 64).mixed_bands


def test_values_of_each_pair_mean_its_own_classes(made):
    assert made.classes.names == ("calm", "rough")
    assert of(made.constituents, made.cache_directory).load_prepared_arrays()["test"].classes == (
        "calm", "rough",
    )  # fmt: skip
    for split, patches in made.load_prepared_arrays().items():
        for row, tile in enumerate(patches.rows.itertuples()):
            own = next(p for p in made.constituents if p.identifier == tile.raster)
            window = Window(tile.x, tile.y, 64, 64)
            truth = fileio.read_raster(own.mask).read(window)[0]
            if tile.raster == "b":
                truth = np.where(truth == IGNORE, truth, 1 - truth)
            patch = patches.read(row)
            np.testing.assert_array_equal(patch.mask, truth, err_msg=split)
            np.testing.assert_array_equal(patch.image, own.raster.read(window))


def test_labels_of_a_composite_travel_through_their_file(made, tmp_path):
    labels = {image.image_identifier: image.labels for image in made.images}
    rasters = {image.image_identifier: image.raster for image in made.images}
    masks.save_labels(tmp_path, labels)
    window = Window(100, 150, 90, 80)
    for name, source in masks.load_labels(tmp_path, rasters).items():
        np.testing.assert_array_equal(source.read(window), labels[name].read(window))


def test_patches_are_the_items_of_the_tiles_themselves(made):
    patches = made.load_prepared_arrays()["train"]
    stored = PatchDataset(patches, SEEN)
    rasters = {image.image_identifier: image.raster for image in made.images}
    labels = {image.image_identifier: image.labels for image in made.images}
    plain = datasets.MaskDataset(patches.rows, rasters, labels, SEEN)
    assert len(stored) == len(plain) == (made.tiles.query("split == 'train'")["kept"]).sum()
    for i in range(len(stored)):
        (image, target), (other, other_target) = stored[i], plain[i]
        torch.testing.assert_close(image, other, rtol=0, atol=0)
        torch.testing.assert_close(target["mask"], other_target["mask"], rtol=0, atol=0)
    turned = patches.rows.assign(patch=np.arange(len(patches)), angle=90)
    twins = PatchDataset(patches, SEEN, tiles=turned)
    expected = datasets.MaskDataset(turned, rasters, labels, SEEN)
    torch.testing.assert_close(twins[3][0], expected[3][0], rtol=0, atol=0)
    torch.testing.assert_close(twins[3][1]["mask"], expected[3][1]["mask"])


def test_nodata_is_remembered(tmp_path):
    image, mask = write_pair(tmp_path, "n", 1)
    with rasterio.open(image, "r+") as dst:
        dst.nodata = 0
    both = of([TrainingDataset(image, mask)], tmp_path / "cache").prepare(workers=1)
    patches = both.save_prepared_arrays(workers=1)["train"]
    edge = patches.rows.index[(patches.rows["x"] < 128) & (patches.rows["y"] < 128)]
    for row, tile in enumerate(patches.rows.itertuples()):
        patch = patches.read(row)
        np.testing.assert_array_equal(patch.valid, patch.image[0] > 0)
        assert (patch.mask[~patch.valid] == IGNORE).all(), tile
    assert "valid share under MIN_VALID, 0.25" in set(both.tiles["reason"]) or not len(edge)
    stretched = PatchDataset(patches, SEEN)
    raster, source = both.images[0].raster, both.images[0].labels
    plain = datasets.MaskDataset(patches.rows, {"n": raster}, {"n": source}, SEEN)
    torch.testing.assert_close(stretched[0][0], plain[0][0], rtol=0, atol=0)


def test_what_changed_is_another_key_and_what_is_deleted_is_gone(tmp_path):
    both = of([TrainingDataset(*write_pair(tmp_path, "d", 3))], tmp_path / "cache")
    with pytest.raises(InputError, match="no arrays are saved in"):
        both.load_prepared_arrays()
    with pytest.raises(InputError, match=r"call prepare\(\) first"):
        both.save_prepared_arrays()
    both.prepare(workers=1).save_prepared_arrays(workers=1)
    again = of([TrainingDataset(*write_pair(tmp_path, "d", 3))], tmp_path / "cache")
    assert len(again.load_prepared_arrays()["train"])  # the same content, without preparing
    before = both.key
    folder = both._folder(before)
    with rasterio.open(both.constituents[0].mask, "r+") as dst:
        pixels = dst.read(1)
        pixels[200, 200] ^= 1
        dst.write(pixels, 1)
    assert both.key != before
    assert folder.exists()
    both.prepare(workers=1).save_prepared_arrays(workers=1)
    after = both._folder(both.key)
    assert after != folder
    assert after.exists()
    both.delete_prepared_arrays()
    assert not after.exists()
    assert folder.exists()
    with pytest.raises(InputError, match="no arrays are saved in"):
        both.load_prepared_arrays()
    assert len(list((tmp_path / "cache").iterdir())) == 2  # index and arrays of the first


def test_what_changed_since_it_was_prepared_is_not_saved(tmp_path):
    image, mask = write_pair(tmp_path, "e", 4)
    both = of([TrainingDataset(image, mask)], tmp_path / "cache").prepare(workers=1)
    both.options = dataclasses.replace(OPTIONS, overlap=0)
    with pytest.raises(InputError, match=r"have changed since prepare\(\); call it again"):
        both.save_prepared_arrays(workers=1)
    assert len(both.tiles)  # those of before
    both.options = OPTIONS
    with rasterio.open(mask, "r+") as dst:
        pixels = dst.read(1)
        pixels[200, 200] ^= 1
        dst.write(pixels, 1)
    with pytest.raises(InputError, match=r"have changed since prepare\(\); call it again"):
        both.save_prepared_arrays(workers=1)


def test_what_was_stopped_can_be_deleted_and_what_was_half_deleted_made(tmp_path, monkeypatch):
    monkeypatch.setattr(tilecache, "BLOCK", 4)
    monkeypatch.setattr(tilecache, "JOB_BLOCKS", 1)
    cache = tmp_path / "cache"
    both = of([TrainingDataset(*write_pair(tmp_path, "f", 4))], cache).prepare(workers=1)
    fill, jobs = tilecache._fill_patches, []

    def stop(job, **handles):
        if len(jobs) == 3:
            raise KeyboardInterrupt
        jobs.append(job)
        fill(job, **handles)

    monkeypatch.setattr(tilecache, "_fill_patches", stop)
    with pytest.raises(KeyboardInterrupt):
        both.save_prepared_arrays(workers=1)
    monkeypatch.setattr(tilecache, "_fill_patches", fill)
    with pytest.raises(InputError, match="no arrays are saved"):
        both.load_prepared_arrays()
    both.delete_prepared_arrays()
    assert not list(cache.glob("*/*"))

    whole = both.prepare(workers=1).save_prepared_arrays(workers=1)["train"].images[:]

    def half(folder):
        remove(folder / "train.zarr" / "image" / "c")
        raise KeyboardInterrupt

    remove = composite.shutil.rmtree
    monkeypatch.setattr(composite.shutil, "rmtree", half)
    with pytest.raises(KeyboardInterrupt):
        both.delete_prepared_arrays()
    monkeypatch.setattr(composite.shutil, "rmtree", remove)
    again = both.prepare(workers=1).save_prepared_arrays(workers=1)["train"].images[:]
    np.testing.assert_array_equal(again, whole)


def test_a_touched_file_is_the_same_file(tmp_path):
    image, mask = write_pair(tmp_path, "t", 4)
    both = of([TrainingDataset(image, mask)], tmp_path / "cache").prepare(workers=1)
    both.save_prepared_arrays(workers=1)
    made = set((tmp_path / "cache").iterdir())
    for path in (image, mask):
        os.utime(path, (1e9, 1e9))
    both.prepare(workers=1).save_prepared_arrays(workers=1)
    assert set((tmp_path / "cache").iterdir()) == made


KILLED = """
import sys, time
import tilecache
from test_composite import OPTIONS, TrainingDataset, of
fill = tilecache._fill_patches
def slow(job, **handles):
    fill(job, **handles)
    time.sleep(0.2)
tilecache._fill_patches, tilecache.BLOCK, tilecache.JOB_BLOCKS = slow, 4, 1
both = of([TrainingDataset(*sys.argv[1:3])], sys.argv[3])
both.prepare(workers=1).save_prepared_arrays(workers=1)
"""


def test_what_is_killed_goes_on(tmp_path, monkeypatch):
    paths, cache = write_pair(tmp_path, "k", 2), tmp_path / "cache"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *map(str, paths), str(cache)],
        env=os.environ | {"PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}"},
    )
    deadline, noted = time.monotonic() + 60, []
    while len(noted) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
        noted = [line for p in cache.glob("*/done.jsonl") for line in p.read_text().splitlines()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(noted) >= 3
    monkeypatch.setattr(tilecache, "BLOCK", 4)
    monkeypatch.setattr(tilecache, "JOB_BLOCKS", 1)
    both, jobs, fill = of([TrainingDataset(*paths)], cache), [], tilecache._fill_patches
    with pytest.raises(InputError, match="no arrays are saved in"):
        both.load_prepared_arrays()

    def count(job, **handles):
        jobs.append(f"{job[0].stem} {job[1]}")
        fill(job, **handles)

    monkeypatch.setattr(tilecache, "_fill_patches", count)
    patches = both.prepare(workers=1).save_prepared_arrays(workers=1)
    total = sum(-(-len(part) // 4) for part in patches.values())
    assert len(jobs) <= total - 3
    raster = both.images[0].raster
    for part in patches.values():
        for row, tile in enumerate(part.rows.itertuples()):
            expected = raster.read(Window(tile.x, tile.y, 64, 64))
            np.testing.assert_array_equal(part.read(row).image, expected)


def test_processes_write_what_one_does(made, tmp_path):
    other = of(made.constituents, tmp_path).prepare(workers=2)
    for split, patches in other.save_prepared_arrays(workers=2).items():
        mine = made.load_prepared_arrays()[split]
        np.testing.assert_array_equal(patches.images[:], mine.images[:])
        np.testing.assert_array_equal(patches.masks[:], mine.masks[:])


def test_a_cluster_writes_what_is_written_here(made, tmp_path, cluster):
    other = of(made.constituents, tmp_path).prepare(scheduler=cluster)
    for split, patches in other.save_prepared_arrays(scheduler=cluster).items():
        mine = made.load_prepared_arrays()[split]
        np.testing.assert_array_equal(patches.images[:], mine.images[:])
        np.testing.assert_array_equal(patches.masks[:], mine.masks[:])


def test_a_search_trains_on_the_arrays_that_are_there(made):
    conf = ModelConfig(task="segmentation", batch_size=4, train={"random_windows": False})
    given = made.images, made.blocks, made.tilings, [1.0]
    with pytest.raises(InputError, match=r"a class for every pixel.*set task = 'segmentation'"):
        trials.prepare_search(*given, dataclasses.replace(conf, task="detection"))
    before = set(made.cache_directory.iterdir())
    data, _ = trials.prepare_search(*given, conf, cache_dir=made.cache_directory)
    assert set(made.cache_directory.iterdir()) == before
    tiles = trials.training_tiles(data, conf, 64)
    assert isinstance(tiles, PatchDataset)
    assert tiles.patches.store == made.load_prepared_arrays()["train"].store


def test_what_the_documentation_shows_trains_a_model(tmp_path, monkeypatch):
    text = (PROJECT / "docs" / "own_data.md").read_text()
    shown, loop = (part.removeprefix("python") for part in text.split("```")
                   if "TrainingDataset(" in part or "BlockSampler(" in part)  # fmt: skip
    corners = np.random.default_rng(0).integers(0, 480, (60, 2)) * [2, 1]
    for place, name in enumerate(("north", "south")):
        mask = np.zeros((512, 1024), np.uint8)
        for x, y in corners:
            mask[y : y + 24, x : x + 24] = 7
        layout = {
            "width": 1024, "height": 512, "dtype": "uint8", "crs": "EPSG:32633",
            "transform": rasterio.Affine(1, 0, 1e4 * place, 0, -1, 512),
        }  # fmt: skip
        with fileio.create_raster(tmp_path / f"{name}.tif", count=3, **layout) as dst:
            dst.write(np.repeat(20 + 20 * mask[None], 3, axis=0))
        with fileio.create_raster(tmp_path / f"{name}_mask.tif", count=1, **layout) as dst:
            dst.write(mask[None])
    houses = shapely.box(corners[:, 0], 488 - corners[:, 1],
                         corners[:, 0] + 24, 512 - corners[:, 1])  # fmt: skip
    frame = gpd.GeoDataFrame({"kind": [1] * 60}, geometry=houses, crs="EPSG:32633")
    frame.to_file(tmp_path / "north.gpkg")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(shown.replace("[20]", "[1]"), names)
    assert names["both"].classes.names == ("background", "house")
    assert names["leaderboard"]["state"].tolist() == ["complete"]
    assert (tmp_path / "runs" / "both" / "best.ckpt").exists()
    exec(loop, names)
    assert sum(len(images) for images, _ in names["loader"]) == len(names["train"])


def test_images_of_two_resolutions_are_read_in_one(tmp_path):
    pairs = []
    for seed, coarser in enumerate((1, 2)):
        paths = tmp_path / f"c{coarser}.tif", tmp_path / f"c{coarser}.gpkg"
        sampledata.make_land_cover(
            *paths, width=640 // coarser, height=640 // coarser, seed=seed, bands=3, coarser=coarser
        )
        pairs.append(TrainingDataset(*paths, attribute="label", resolution=0.8))
    both = CompositeTrainingDataset(tuple(pairs), OPTIONS, tmp_path / "cache").prepare(workers=1)
    for image, pair in zip(both.images, both.constituents, strict=True):
        raster = image.raster
        assert raster.resolution == pytest.approx(0.8, rel=1e-6)
        assert abs(raster.width - 400) <= 1
        plain = fileio.read_raster(pair.image)
        truth = masks.read_labels(pair.mask, plain, attribute="label")
        truth = truth.with_classes(both.classes).read(Window(0, 0, plain.width, plain.height))
        x, y = np.meshgrid(*(np.arange(n) + 0.5 for n in (raster.width, raster.height)))
        there = plain.to_pixel(raster.to_map(np.stack([x, y], axis=-1).reshape(-1, 2)))
        col, row = np.floor(there).astype(int).T
        found = image.labels.read(Window(0, 0, raster.width, raster.height))
        assert (found.ravel() == truth[row, col]).mean() > 0.97
    patches = both.save_prepared_arrays(workers=1)["test"]
    tile = patches.rows.iloc[0]
    image = next(i for i in both.images if i.image_identifier == tile["raster"])
    window = Window(*map(int, tile[["x", "y", "width", "height"]]))
    np.testing.assert_array_equal(patches.read(0).image, image.raster.read(window))
    other = dataclasses.replace(both.constituents[0], resolution=0.9)
    assert other.made_from != both.constituents[0].made_from


# ---------------------------------------------------------------------------------------------
# Epochs
# ---------------------------------------------------------------------------------------------


def epoch(sampler, number=0):
    sampler.set_epoch(number)
    return list(sampler)


def test_an_epoch_visits_each_patch_once_and_each_block_once():
    blocks = np.arange(1000) // 64
    sampler = BlockSampler(blocks, np.ones(1000), seed=3)
    one, two = (np.array([row for row, _ in epoch(sampler, n)]) for n in (0, 1))
    for rows in (one, two):
        np.testing.assert_array_equal(np.sort(rows), np.arange(1000))
        assert np.count_nonzero(np.diff(blocks[rows])) == blocks.max()
    first = [blocks[rows[0]] for rows in (one, two)]
    assert (one != two).any()
    assert first[0] != first[1]
    within = one[blocks[one] == first[0]]
    assert (np.diff(within) < 0).any()
    assert epoch(sampler, 0) == epoch(BlockSampler(blocks, np.ones(1000), seed=3), 0)
    assert epoch(sampler, 0) != epoch(BlockSampler(blocks, np.ones(1000), seed=4), 0)


def test_weights_of_pairs_bring_patches_more_often(made):
    patches = made.load_prepared_arrays()["train"]
    weights = made.weights(patches.rows)
    assert set(weights) == {1.0, 3.0}
    sampler = BlockSampler(np.arange(len(patches)) // patches.block, weights)
    rows = np.concatenate([[row for row, _ in epoch(sampler, n)] for n in range(20)])
    visits = np.bincount(rows, minlength=len(patches)) / 20
    heavy, light = (visits[weights == w].mean() for w in (3.0, 1.0))
    assert heavy / light == pytest.approx(3, rel=0.02)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_each_worker_reads_blocks_of_its_own(workers):
    blocks = np.arange(640) // 64
    sampler = BlockSampler(blocks, np.ones(640))
    batches = list(TileBatches(sampler, 16, workers))
    rows = np.array(sorted(row for batch in batches for row, _ in batch))
    np.testing.assert_array_equal(rows, np.arange(640))
    read = 0
    for worker in range(workers):  # what a DataLoader hands to each
        seen = [blocks[row] for batch in batches[worker::workers] for row, _ in batch]
        read += 1 + np.count_nonzero(np.diff(seen))
    assert read <= 10 + workers - 1  # a block at the edge of two runs is read twice


def test_blocks_are_read_once_through_a_loader(made, tmp_path, monkeypatch):
    monkeypatch.setattr(tilecache, "BLOCK", 8)
    other = of(made.constituents, tmp_path).prepare(workers=1)
    patches = other.save_prepared_arrays(workers=1)["train"]
    store = PatchDataset(patches, SEEN)
    sampler = BlockSampler(store.blocks_of_tiles, np.ones(len(store)))
    loader = DataLoader(store, batch_sampler=TileBatches(sampler, 7), collate_fn=datasets.collate)
    before = tilecache._block.cache_info().misses
    assert sum(len(images) for images, _ in loader) == len(store)
    assert tilecache._block.cache_info().misses - before == -(-len(store) // 8)


# ---------------------------------------------------------------------------------------------
# Registry
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def registry(pairs, tmp_path):
    path = tmp_path / "datasets.yaml"
    a, b = ({"image": str(p.image), "mask": str(p.mask)} for p in pairs)
    path.write_text(
        f"""
manila: {{images: ["{a["image"]}"], masks: "{a["mask"]}", tags: [urban, north], weight: 2}}
hanoi:
  images: ["{b["image"]}"]
  masks: ["{b["mask"]}"]
  classes: {{0: calm, 1: rough}}
  tags: urban
"""
    )
    return path


def test_named_datasets_are_chosen_by_name_and_by_tag(registry):
    named = composite.read_registry(registry)
    assert composite.get_dataset(named, "hanoi").classes == {0: "calm", 1: "rough"}
    chosen = [
        [p.identifier for p in CompositeTrainingDataset.of_registry(named, names).constituents]
        for names in (["manila"], ["tag:urban"], ["tag:north", "hanoi", "manila"])
    ]
    assert chosen == [["a"], ["a", "b"], ["a", "b"]]
    both = CompositeTrainingDataset.of_registry(named, ["tag:urban"])
    assert both.constituents[0].weight == 2
    assert both.constituents[0].tags == ("manila", "urban", "north")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["manilla"], "no dataset 'manilla'; did you mean manila"),
        (["tag:urbn"], "no tag 'urbn'; did you mean urban"),
        (["tag:xyz"], r"no tag 'xyz', only \['north', 'urban'\]"),
    ],
)
def test_unknown_names_are_told_with_the_nearest(registry, names, message):
    with pytest.raises(InputError, match=message):
        composite.CompositeTrainingDataset.of_registry(composite.read_registry(registry), names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold"),
        ("a: [", "cannot be read as YAML"),
        ("a: 3", "a must hold images and masks, got 3"),
        ("a: {images: [x.tif]}", "masks"),
        ("a: {images: [x.tif], masks: [x.tif], wieght: 2}", r"wieght: .* did you mean weight\?"),
        ("a: {images: [x.tif, y.tif], masks: [x.gpkg]}", "2 images and 1 masks"),
        ("a: {images: [x.tif], masks: [x.gpkg], weight: 0}", "weight"),
    ],
)
def test_a_registry_that_is_wrong_is_refused(tmp_path, text, message):
    path = tmp_path / "registry.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        composite.read_registry(path)


def test_files_that_are_not_there_are_told_when_they_are_opened(tmp_path):
    path = tmp_path / "registry.yaml"
    path.write_text("a: {images: [x.tif], masks: [x.gpkg]}")
    named = composite.read_registry(path)
    both = CompositeTrainingDataset.of_registry(named, ["a"])
    with pytest.raises(InputError, match=r"raster x\.tif does not exist"):
        both.prepare()
