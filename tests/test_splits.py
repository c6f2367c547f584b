"""Ground: blocks partition it, nothing leaks, samples nest."""

from __future__ import annotations

import itertools
import time
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
from masks import ClassTable


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


# -- classes of pixels ------------------------------------------------------------------------


TABLE = ClassTable(("background", "a", "b"), {"1": 1, "2": 2})


def tiles_of(counts, side=10, **columns):
    counts = np.asarray(counts)
    table = pd.DataFrame(counts, columns=[f"class_{i}" for i in range(counts.shape[1])])
    places = {"x": np.arange(len(counts)) * side, "y": 0, "width": side, "height": side}
    defaults = {"raster": "r", "split": "train", "angle": 0, "kept": True, "reason": ""}
    numbers = {"window": np.arange(len(counts)), "tile": np.arange(len(counts))}
    return table.assign(**(places | defaults | numbers | columns))


def random_counts(count, classes, side, seed=0):
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.linspace(1.5, 0.2, classes), count)
    return np.floor(shares * side**2).astype("int64")


def test_thresholds_are_the_best_of_all_combinations():
    tiles = tiles_of(random_counts(60, 3, 10))
    found = splits.balance(tiles, TABLE, min_kept=20, step=10)
    best = np.inf, 0, None
    for least, a, b in itertools.product(np.arange(0, 101, 10), repeat=3):
        if a + b > 100:
            continue
        tried = splits.preview(tiles, TABLE, least, {1: a, 2: b})
        if tried.kept >= 12:
            best = min(best, (round(tried.kept_std, 9), -tried.kept))
    coarse = found.curve.query("min_annotated % 10 + class_1 % 10 + class_2 % 10 == 0")
    assert round(found.kept_std, 9) <= best[0] < found.std
    only = splits.balance(tiles, TABLE, min_kept=20, step=10, finest=10)
    assert (round(only.kept_std, 9), -only.kept) == best
    assert (only.step, only.tiles, len(coarse) > 0) == (10, 60, True)
    assert found.shares["kept_percent"].sum() == pytest.approx(100)


def test_trade_offs_fall_from_all_tiles_to_the_most_even():
    tiles = tiles_of(random_counts(500, 3, 10))
    curve = splits.balance(tiles, TABLE).curve
    assert curve["kept"].iloc[0] == 500
    assert (np.diff(curve["kept"]) < 0).all()
    assert (np.diff(curve["std"]) < 0).all()
    for row in curve.iloc[:: max(1, len(curve) // 10)].itertuples():
        proportion = {1: row.class_1, 2: row.class_2}
        again = splits.preview(tiles, TABLE, row.min_annotated, proportion)
        assert (again.kept, again.kept_std) == (row.kept, pytest.approx(row.std, abs=1e-6))


@pytest.mark.parametrize(("methods", "columns"), [
    (["min_annotated"], ["min_annotated"]), (["class_proportion"], ["class_1", "class_2"]),
])  # fmt: skip
def test_a_search_uses_the_methods_it_is_given(methods, columns):
    tiles = tiles_of(random_counts(200, 3, 10))
    found = splits.balance(tiles, TABLE, methods=methods)
    assert list(found.curve) == ["kept", "kept_percent", "std", *columns]
    assert ("min_annotated" in methods) or found.min_annotated == 0
    some = splits.balance(tiles, TABLE, methods=["class_proportion"], class_ids=[2])
    assert set(some.class_proportion) <= {2}
    with pytest.raises(InputError, match=r"got \['greedy'\]"):
        splits.balance(tiles, TABLE, methods=["greedy"])


@pytest.mark.parametrize("percent", [101, -1, float("nan")])
def test_a_percentage_of_tiles_to_keep_is_one(percent):
    with pytest.raises(InputError, match="min_kept must be a percentage of the tiles, 0 to 100"):
        splits.balance(tiles_of([[5, 5, 0], [5, 0, 5]]), TABLE, min_kept=percent)


def test_a_hundred_thousand_tiles_are_balanced_in_seconds():
    names = ("background", "a", "b", "c", "d")
    tiles = tiles_of(random_counts(100_000, 5, 512), side=512)
    started = time.monotonic()
    found = splits.balance(tiles, ClassTable(names, {}))
    assert time.monotonic() - started < 10
    assert found.kept >= 10_000
    assert found.kept_std < 0.25 * found.std
    row = found.curve[found.curve["kept"] == found.kept].iloc[0]
    assert row["std"] == pytest.approx(found.kept_std, abs=1e-6)


def test_too_many_combinations_are_refused():
    tiles = tiles_of(random_counts(5000, 30, 512), side=512)
    names = tuple(map(str, range(30)))
    with pytest.raises(InputError, match="search fewer classes at once"):
        splits.balance(tiles, ClassTable(names, {}), step=1)


def test_shares_are_told_by_the_command(tmp_path, capsys):
    tiles = tiles_of(
        [[60, 40, 0], [50, 0, 50], [100, 0, 0], [0, 0, 0], [10, 10, 10]],
        split=["train"] * 4 + ["test"],
        kept=[True, False, True, False, True],
        reason=["", "b under class_proportion, 60 %", "", "nothing is labelled", ""],
    )
    folder = tmp_path / "tiling_10"
    fileio.write_table(folder / "tiles.parquet", tiles)
    TABLE.save(folder / "classes.json")
    shares, curve = tmp_path / "shares.csv", tmp_path / "curve.csv"
    assert splits.main(["balance", str(tmp_path), "--csv", str(shares)]) == 0
    assert "3 training tiles, 3 kept" in capsys.readouterr().out
    table = pd.read_csv(shares)
    assert table[["annotated", "background", "a", "b"]].to_numpy().tolist() == [
        [40, 60, 40, 0], [50, 50, 0, 50], [0, 100, 0, 0],
    ]  # fmt: skip
    words = ["balance", str(folder), "--search", "min_annotated", "--curve", str(curve)]
    assert splits.main(words) == 0
    out = capsys.readouterr().out
    assert "2 kept with {'min_annotated': 1.0" in out or "1 kept" in out
    assert pd.read_csv(curve)["kept"].iloc[0] == 3
    words = ["balance", str(folder), "--min-annotated", "45", "--class-proportion", "2=50"]
    assert splits.main(words) == 0
    assert "1 kept" in capsys.readouterr().out
    assert splits.main(["balance", str(tmp_path / "none")]) == 1
    assert "holds 0 tile indexes" in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(5))
def test_validation_ground_has_the_shares_of_all_ground(seed):
    blocks = blocks_of([raster(width=4000, height=3000)], block_size=200, seed=seed)
    rng = np.random.default_rng(seed)
    counts = (rng.dirichlet([2, 1, 0.5], len(blocks)) * 40_000).astype("int64")
    counts[rng.random(len(blocks)) < 0.7, 2] = 0  # rare
    made = splits.stratify_validation(blocks, counts, validation_percent=20, tolerance=2, seed=seed)
    pd.testing.assert_frame_equal(
        made, splits.stratify_validation(
            blocks, counts, validation_percent=20, tolerance=2, seed=seed
        )
    )  # fmt: skip
    test = (blocks["split"] == "test").to_numpy()
    assert ((made["split"] == "test") == test).all()
    rest, mine = counts[~test].sum(axis=0), counts[made["split"] == "validation"].sum(axis=0)
    assert 0.18 <= mine.sum() / rest.sum() <= 0.22
    np.testing.assert_allclose(mine / mine.sum(), rest / rest.sum(), rtol=0.05)
    plain = counts[blocks["split"] == "validation"].sum(axis=0)
    apart = [np.abs(part / part.sum() - rest / rest.sum()).max() for part in (mine, plain)]
    assert apart[0] < apart[1]
    assert set(made["split"]) == set(splits.SPLITS)


def test_percentages_of_a_stratification_that_make_no_sense_are_refused():
    blocks = blocks_of([raster()], block_size=200)
    counts = np.ones((len(blocks), 2), dtype="int64")
    for percent, tolerance in ((5, 5), (0, 0), (100, 1), (5, -1)):
        with pytest.raises(InputError, match="USE_STRATIFICATION under it"):
            splits.stratify_validation(
                blocks, counts, validation_percent=percent, tolerance=tolerance, seed=0
            )
    with pytest.raises(InputError, match="0 blocks beside the test's have a label"):
        splits.stratify_validation(blocks, 0 * counts, validation_percent=20, tolerance=0, seed=0)


def test_classes_that_training_never_sees_are_refused(caplog):
    tiles = tiles_of([[5, 5, 0], [5, 0, 5], [5, 5, 0]], split=["train", "validation", "test"])
    with pytest.raises(InputError, match=r"\{'b': \{'validation': 5, 'test': 0\}\}"):
        splits.check_classes(tiles, TABLE.names)
    tiles["class_2"] = [7, 1, 0]
    counts = splits.check_classes(tiles, TABLE.names)
    assert counts.loc["b"].tolist() == [7, 1, 0]
    assert "class b is not on the ground of every split" in caplog.text
    with pytest.raises(InputError, match=r"nothing to tell apart on the ground of \['test'\]"):
        splits.check_classes(tiles.assign(class_1=[5, 5, 0]), TABLE.names)
    tiles["class_1"] = [5, 5, 5]
    counts = splits.check_classes(tiles.assign(class_2=0), TABLE.names)  # one that is nowhere
    assert counts.loc["b"].tolist() == [0, 0, 0]
    assert "NO PIXEL of any tile is of ['b']" in caplog.text
    splits.check_classes(tiles.assign(class_0=0, class_2=[7, 1, 2]), TABLE.names, 0)
    assert "['background']" not in caplog.text
    with pytest.raises(InputError, match="has 1 tiles but no labelled pixel"):
        splits.split_dataset_train_test(tiles.assign(class_0=[0, 0, 0], class_1=[1, 0, 1],
                                                     class_2=[0, 0, 1]), 1.0, 0)  # fmt: skip
