"""Ground: blocks partition it, nothing leaks, samples nest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyproj
import pytest
import shapely
from hypothesis import assume, given
from hypothesis import strategies as st

import fileio
import splits
import tiling
from ImageData import InputError


def raster(name="r", width=1000, height=800):
    return SimpleNamespace(path=Path(f"{name}.tif"), width=width, height=height, regions=None)


def blocks_of(rasters, **options):
    defaults = {
        "split_by": "block", "max_tile_size": 100, "block_size": None, "test_proportion": 0.2,
        "validation_proportion": 0.25, "seed": 0,
    }  # fmt: skip
    return splits.ground_blocks(rasters, **(defaults | options))


@given(st.integers(100, 700), st.integers(100, 700), st.integers(30, 100), st.integers(0, 99))
def test_blocks_partition_the_ground_and_fit_a_tile(width, height, size, seed):
    assume((width // size) * (height // size) >= 3)
    blocks = blocks_of([raster(width=width, height=height)], max_tile_size=size, seed=seed)
    painted = np.zeros((height, width), int)
    for b in blocks.itertuples():
        painted[b.y : b.y + b.height, b.x : b.x + b.width] += 1
    assert (painted == 1).all()
    assert blocks[["width", "height"]].min(axis=None) >= size
    assert set(blocks["split"]) == set(splits.SPLITS)


def test_proportions_are_met():
    blocks = blocks_of([raster(width=5000, height=5000)], block_size=100)
    share = blocks["split"].value_counts(normalize=True)
    assert share["test"] == pytest.approx(0.2, abs=0.001)
    assert share["validation"] == pytest.approx(0.8 * 0.25, abs=0.001)


def test_the_split_depends_on_place_and_seed_only():
    rasters = [raster("a"), raster("b", 600, 900)]
    first = blocks_of(rasters, block_size=200)
    again = blocks_of(rasters, block_size=200, max_tile_size=64)
    pd.testing.assert_frame_equal(first, again)
    assert (first["split"] != blocks_of(rasters, block_size=200, seed=1)["split"]).any()


def test_whole_rasters_can_be_the_ground():
    rasters = [raster(name) for name in "abcdef"]
    blocks = blocks_of(rasters, split_by="raster", test_rasters=["b", "e"])
    assert len(blocks) == 6
    assert set(blocks.loc[blocks["split"] == "test", "raster"]) == {"b", "e"}
    with pytest.raises(InputError, match="takes 2 of 3 blocks"):
        blocks_of(rasters[:3], split_by="raster", test_rasters=["a", "b"])


@pytest.mark.parametrize("test", [(), ["b"]])
def test_rasters_can_be_named_for_a_split_and_the_others_dealt_out(test):
    rasters = [raster(name) for name in "abc"]
    blocks = blocks_of(rasters, block_size=200, test_rasters=test, validation_rasters=["c"])
    of = blocks.groupby("raster")["split"].agg(set).to_dict()
    assert of["c"] == {"validation"}
    assert of["a"] == ({"train", "test"} if not test else {"train"})
    assert of["b"] == ({"train", "test"} if not test else {"test"})
    if not test:
        assert (blocks["split"] == "test").sum() == round(0.2 * (blocks["raster"] != "c").sum())


def test_naming_all_rasters_leaves_nothing_to_train():
    with pytest.raises(InputError, match=r"TEST_FILENAMES = \['a'\] takes 16 of 32"):
        blocks_of([raster("a", 800, 800), raster("b", 800, 800)], block_size=200,
                  test_rasters=["a"], validation_rasters=["b"])  # fmt: skip


def test_a_tile_larger_than_the_raster_is_refused():
    with pytest.raises(InputError, match=r"tile_size must be <= 800 px \(the height of r\.tif\)"):
        blocks_of([raster()], max_tile_size=900)


def test_too_little_ground_is_refused():
    with pytest.raises(InputError, match="falls into 2 blocks"):
        blocks_of([raster("a"), raster("b")], split_by="raster")
    with pytest.raises(InputError, match=r"falls into 1 blocks.* most 400 px"):
        blocks_of([raster()], max_tile_size=600)


def test_nothing_leaks_between_splits_rotations_included(prepared):
    audit = splits.audit_splits(prepared.tiles, prepared.data.rasters)
    assert audit["shared_px"].tolist() == [0, 0, 0]
    painted = {}
    for t in prepared.tiles.itertuples():
        canvas = painted.setdefault(t.raster, np.zeros((512, 640), dtype=object))
        area = canvas[t.y : t.y + t.height, t.x : t.x + t.width]
        assert set(np.unique(area.astype(str))) <= {"0", t.split}
        area[...] = t.split


def test_the_audit_finds_shared_ground(prepared):
    tiles = prepared.tiles.copy()
    intruder = tiles[tiles["split"] == "test"].iloc[[0]].assign(split="train", angle=90)
    with pytest.raises(InputError, match=r"train and test \d+ px"):
        splits.audit_splits(pd.concat([tiles, intruder]), prepared.data.rasters)


def test_rasters_of_the_same_place_cannot_be_on_two_sides(prepared):
    """A second file of the ground of the first, shifted by 30 px: only the map can tell."""
    one = prepared.data.rasters["one"]
    a, b, c, d, e, f = one.transform
    twin = replace(one, path=one.path.with_name("twin.tif"), transform=(a, b, c + 30 * a, d, e, f))
    tiles = prepared.tiles[(prepared.tiles["raster"] == "one")]
    other = tiles.assign(raster="twin", split="test")
    with pytest.raises(InputError, match="share ground"):
        splits.audit_splits(pd.concat([tiles, other]), {"one": one, "twin": twin})
    far = replace(twin, transform=(a, b, c + 9000 * a, d, e, f))
    audit = splits.audit_splits(pd.concat([tiles, other]), {"one": one, "twin": far})
    assert audit["shared_px"].sum() == 0


def test_smaller_samples_are_part_of_larger_ones_and_the_test_stays(prepared):
    parts = {
        size: splits.split_dataset_train_test(prepared.tiles, size, seed=0)
        for size in (0.3, 0.6, 1.0)
    }
    for small, large in ((0.3, 0.6), (0.6, 1.0)):
        for i in (0, 1):
            assert set(parts[small][i]["tile"]) < set(parts[large][i]["tile"])
        assert set(parts[small][2]["tile"]) == set(parts[large][2]["tile"])
    for train, _, _ in parts.values():
        assert (train.groupby("window").size() == 4).all()  # twins stay together


def test_a_split_without_tiles_or_objects_is_refused(prepared):
    tiles = prepared.tiles
    emptied = tiles.assign(kept=tiles["kept"] & (tiles["split"] != "train"), reason="black")
    with pytest.raises(InputError, match="no train tile is left after filtering"):
        splits.split_dataset_train_test(emptied, 1.0, 0)
    bare = tiles.assign(objects=tiles["objects"].where(tiles["split"] != "validation", 0))
    with pytest.raises(InputError, match=r"the validation split has .* no object"):
        splits.split_dataset_train_test(bare, 1.0, 0)


def test_a_label_that_training_never_sees_is_refused(prepared):
    kept = prepared.tiles[prepared.tiles["kept"]]
    counts = splits.check_labels(kept, prepared.boxes)
    owned = prepared.boxes[prepared.boxes["owned"]]
    assert counts.sum(axis=None) == len(owned)
    test_windows = prepared.tiles.loc[prepared.tiles["split"] == "test", "window"]
    boxes = prepared.boxes.copy()
    boxes.loc[boxes["window"].isin(test_windows) & (boxes["label"] == "crater"), "label"] = "new"
    with pytest.raises(InputError, match=r"without an object on training ground: \{'new'"):
        splits.check_labels(kept, boxes)


def test_every_tile_size_sees_the_same_test_ground(prepared, tmp_path):
    options = tiling.TilingOptions(evaluation_overlap=40)
    made = tiling.make_tiles(prepared.images, prepared.blocks, [96, 128], tmp_path, options)
    canvases = []
    for size in (96, 128):
        tiles, _ = tiling.read_tiles(made[size])
        canvas = np.zeros((2, 512, 640), bool)
        for t in tiles[tiles["split"] == "test"].itertuples():
            canvas[int(t.raster == "two"), t.y : t.y + t.height, t.x : t.x + t.width] = True
        canvases.append(canvas)
    np.testing.assert_array_equal(*canvases)


def test_ground_outside_the_area_of_interest_is_not_dealt_out():
    scene = raster(width=1000, height=1000)
    scene.regions = fileio.Regions(aoi=(shapely.box(0, 0, 1000, 400),))
    blocks = blocks_of([scene], block_size=200, test_proportion=0.5)
    outside = blocks["y"] >= 400
    assert (blocks.loc[outside, "split"] == "unused").all()
    assert blocks.loc[~outside, "split"].value_counts().to_dict() == {
        "test": 5, "train": 4, "validation": 1
    }  # fmt: skip
    assert (blocks["width"] * blocks["height"]).sum() == 1000 * 1000
    scene.regions = fileio.Regions(aoi=(shapely.box(0, 0, 10, 10),))
    with pytest.raises(InputError, match="24 more lie outside the areas of interest"):
        blocks_of([scene], block_size=200)


def test_the_same_ground_is_found_under_another_coordinate_reference_system():
    def scene(name, epsg, x0, y0):
        place = raster(name, 1000, 1000)
        place.crs = pyproj.CRS.from_epsg(epsg).to_wkt()
        place.transform = (1.0, 0, x0, 0, -1.0, y0)
        return place

    there = pyproj.Transformer.from_crs(32633, 3035, always_xy=True).transform(500_000, 5_400_000)
    rasters = {
        "a": scene("a", 32633, 500_000, 5_400_000), "b": scene("b", 3035, *there),
        "far": scene("far", 3035, there[0] + 5000, there[1]),
    }  # fmt: skip
    tile = {"x": 100, "y": 100, "width": 200, "height": 200}
    rows = [{"raster": "a", "split": "train"}, {"raster": "far", "split": "test"}]
    tiles = pd.DataFrame([row | tile for row in rows])
    assert (splits.audit_splits(tiles, rasters)["shared_px"] == 0).all()
    rows[1]["raster"] = "b"
    with pytest.raises(InputError, match="train and test"):
        splits.audit_splits(pd.DataFrame([row | tile for row in rows]), rasters)
