"""Tiles: windows, cores, owners, filters, the index on disk, chips and turned copies."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
from conftest import PROJECT
from hypothesis import given, settings
from hypothesis import strategies as st

import fileio
import imutils
import splits
import tiling
from ImageData import ImageData, InputError, Window
from tiling import BOX_COLUMNS, CORE_COLUMNS, WINDOW_COLUMNS


@st.composite
def grids(draw):
    size = draw(st.integers(4, 40))
    extent = Window(
        draw(st.integers(0, 9)), draw(st.integers(0, 9)),
        draw(st.integers(1, 150)), draw(st.integers(1, 150)),
    )  # fmt: skip
    return extent, size, draw(st.integers(0, size // 2))


@given(grids())
def test_cores_partition_the_ground_exactly(case):
    extent, size, overlap = case
    painted = np.zeros((extent.height, extent.width), int)
    for core in tiling.window_grid(extent, size, overlap)[CORE_COLUMNS].itertuples(index=False):
        x0, y0, x1, y1 = core
        painted[y0 - extent.y : y1 - extent.y, x0 - extent.x : x1 - extent.x] += 1
    assert (painted == 1).all()


@given(grids())
def test_windows_are_equal_stay_inside_and_hold_their_core(case):
    extent, size, overlap = case
    grid = tiling.window_grid(extent, size, overlap)
    assert (grid[["width", "height"]] == size).all(axis=None)
    assert (grid["x"] >= extent.x).all()
    assert (grid["y"] >= extent.y).all()
    if extent.width >= size:
        assert (grid["x"] + size <= extent.x + extent.width).all()
        assert (grid["core_xmax"] <= grid["x"] + size).all()
    if extent.height >= size:
        assert (grid["y"] + size <= extent.y + extent.height).all()
        assert (grid["core_ymax"] <= grid["y"] + size).all()
    assert (grid["core_xmin"] >= grid["x"]).all()
    starts = np.unique(grid["x"])
    assert (np.diff(starts) <= size - overlap).all()
    # what lies this far inside the extent has half the overlap around it in its own window
    inner = grid[grid["x"] > extent.x]
    assert (inner["core_xmin"] - inner["x"] >= overlap // 2).all()


def test_an_overlap_as_large_as_the_window_is_refused():
    with pytest.raises(InputError, match="overlap must be"):
        tiling.window_grid(Window(0, 0, 100, 100), 32, 32)


def windows_of(extent, size, overlap):
    grid = tiling.window_grid(extent, size, overlap)
    return grid.assign(
        window=np.arange(len(grid)), block_xmin=extent.x, block_ymin=extent.y,
        block_xmax=extent.x + extent.width, block_ymax=extent.y + extent.height,
    )  # fmt: skip


@settings(deadline=None)
@given(grids(), st.integers(0, 2**32 - 1))
def test_every_object_has_exactly_one_owner(case, seed):
    extent, size, overlap = case
    rng = np.random.default_rng(seed)
    low = [extent.x, extent.y]
    center = rng.uniform(low, [extent.x + extent.width, extent.y + extent.height], (30, 2))
    center[:10] = np.floor(center[:10])  # on the seams, too
    half = rng.uniform(0.5, 30, (30, 2))
    df = pd.DataFrame(np.concatenate([center - half, center + half], 1), columns=BOX_COLUMNS)
    # rounding may push a centre off the very edge, where cleaning drops the object
    off = (df["xmin"] + df["xmax"] < 2 * extent.x) | (df["ymin"] + df["ymax"] < 2 * extent.y)
    df = df[~off].assign(label="a")
    boxes = tiling.assign_boxes(windows_of(extent, size, overlap), df, 0.5)
    owners = boxes[boxes["owned"]].groupby("object").size()
    assert owners.reindex(range(len(df))).tolist() == [1] * len(df)
    assert len(df) >= 20
    clamped = boxes[BOX_COLUMNS].to_numpy()
    assert (clamped >= 0).all()
    assert (clamped <= size).all()
    assert (imutils.box_area(clamped) > 0).all()


def test_a_neighbours_object_is_shown_when_enough_of_it_is_visible():
    df = pd.DataFrame(
        [[20, 10, 30, 20], [28, 40, 40, 50]], columns=BOX_COLUMNS, dtype=float
    ).assign(label=["left", "right"])
    windows = windows_of(Window(0, 0, 64, 64), 32, 0)
    shown = tiling.assign_boxes(windows, df, 0.3)
    assert shown[~shown["owned"]][["window", "label"]].to_numpy().tolist() == [[2, "right"]]
    assert tiling.assign_boxes(windows, df, 0.4)["owned"].all()
    row = shown[~shown["owned"]].iloc[0]
    assert row[BOX_COLUMNS].tolist() == [28, 8, 32, 18]
    assert row[tiling.GROUND_BOX_COLUMNS].tolist() == [28, 40, 40, 50]


def test_black_pixels_are_counted_over_all_bands():
    image = np.ones((10, 10, 3), np.uint8)
    image[:5] = 0
    image[0, 0, 2] = 1
    assert tiling.black_pixel_filter(image, 49)
    assert not tiling.black_pixel_filter(image, 48)


@pytest.fixture
def half_black(tmp_path):
    """A raster of 256 x 128 px whose left half is black, with an object on either half."""
    path = tmp_path / "half.tif"
    pixels = np.full((1, 128, 256), 90, np.uint8)
    pixels[:, :, :128] = 0
    with fileio.create_raster(path, width=256, height=128, count=1, dtype="uint8") as dst:
        dst.write(pixels)
    df = pd.DataFrame(
        {"pixel_x": [32.0, 200.0], "pixel_y": [32.0, 100.0], "diameter": 10.0, "label": "a"}
    )
    x, y = df["pixel_x"], df["pixel_y"]
    df = df.assign(xmin=x - 5, ymin=y - 5, xmax=x + 5, ymax=y + 5)
    image = ImageData(fileio.read_raster(path), "half", df)
    blocks = pd.DataFrame(
        {"block": [0], "raster": ["half"], "x": [0], "y": [0], "width": [256], "height": [128],
         "split": ["train"]}
    )  # fmt: skip
    return image, blocks


@pytest.mark.parametrize("workers", [1, 2])
def test_filters_reject_tiles_and_say_which_did(half_black, tmp_path, workers):
    image, blocks = half_black
    bright = 80

    def bright_enough(pixels, pixel_limit):
        return pixels.mean() > bright

    options = tiling.TilingOptions(
        filters=(tiling.black_pixel_filter, bright_enough), pixel_limit=100, empty_tile_ratio=10
    )
    made = tiling.make_tiles([image], blocks, [64], tmp_path, options, workers=workers)
    tiles, _ = tiling.read_tiles(made[64])
    left = tiles["x"] < 128
    assert (tiles.loc[left, "reason"] == "black_pixel_filter").all()
    assert (tiles.loc[~left, "reason"] == "").all()
    assert (tiles["kept"] == ~left).all()


def test_a_limit_that_cannot_reject_needs_no_reading(half_black, tmp_path, monkeypatch):
    image, blocks = half_black
    monkeypatch.setattr(tiling, "read_tile", None)
    options = tiling.TilingOptions(
        filters=(tiling.black_pixel_filter,), pixel_limit=64 * 64, empty_tile_ratio=10
    )
    tiles, _ = tiling.read_tiles(
        tiling.make_single_size(64, [image], blocks, tmp_path, options, workers=1)
    )
    assert tiles["kept"].all()
    with pytest.raises(TypeError):
        tiling.make_single_size(
            64, [image], blocks, tmp_path, replace(options, pixel_limit=64 * 64 - 1), workers=1
        )


@pytest.mark.parametrize("split", ["validation", "test"])
def test_filters_never_touch_what_is_measured(half_black, tmp_path, split):
    image, blocks = half_black
    options = tiling.TilingOptions(filters=(lambda pixels, limit: False,))
    tiles, _ = tiling.read_tiles(
        tiling.make_single_size(64, [image], blocks.assign(split=split), tmp_path, options)
    )
    assert tiles["kept"].all()


def test_pixels_are_sampled_from_the_given_ground_only(tmp_path):
    path = tmp_path / "two.tif"
    pixels = np.full((1, 64, 128), 10, np.uint8)
    pixels[:, :, 64:] = 250
    with fileio.create_raster(path, width=128, height=64, count=1, dtype="uint8") as dst:
        dst.write(pixels)
    blocks = pd.DataFrame({"raster": "two", "x": [0, 64], "y": 0, "width": 64, "height": 64,
                           "split": ["train", "test"]})  # fmt: skip
    left = blocks[blocks["split"] == "train"]
    sampled = tiling.sample_pixels(left, {"two": fileio.read_raster(path)}, seed=0)
    assert (np.unique(sampled), sampled.dtype) == ([10], np.uint8)


def test_no_data_is_black(tmp_path):
    path = tmp_path / "nodata.tif"
    pixels = np.full((1, 64, 64), -9999, np.float32)
    pixels[:, :, :32] = 5
    with fileio.create_raster(
        path, width=64, height=64, count=1, dtype="float32", nodata=-9999
    ) as dst:
        dst.write(pixels)
    windows = [Window(0, 0, 32, 64), Window(32, 0, 32, 64)]
    reasons = tiling.filter_tiles(
        fileio.read_raster(path), windows, [tiling.black_pixel_filter], 10
    )
    assert reasons == ["", "black_pixel_filter"]


def test_tiles_are_kept_by_their_valid_share(tmp_path):
    path = tmp_path / "nodata.tif"
    pixels = np.full((1, 64, 192), 5, np.int16)
    pixels[:, :, 112:] = -1
    layout = {"width": 192, "height": 64, "count": 1, "dtype": "int16", "nodata": -1}
    with fileio.create_raster(path, **layout) as dst:
        dst.write(pixels)
    ignored = fileio.Regions(ignored=(shapely.box(0, 0, 64, 50),))
    raster = fileio.read_raster(path).with_regions(ignored)
    boxes = [[70.0, 5, 80, 15], [130, 5, 140, 15], [20, 55, 30, 62]]
    df = pd.DataFrame(boxes, columns=tiling.BOX_COLUMNS).assign(label="a")
    block = {"block": 0, "raster": "nodata", "x": 0, "y": 0, "width": 192, "height": 64}
    for split, min_valid, kept in (
        ("train", 0.25, [False, True, False]), ("train", 0.2, [True, True, False]),
        ("test", 0.25, [True] * 3),
    ):  # fmt: skip
        options = tiling.TilingOptions(min_valid=min_valid)
        tiles, _ = tiling.read_tiles(
            tiling.make_single_size(
                64, [ImageData(raster, "nodata", df)], pd.DataFrame([block | {"split": split}]),
                tmp_path / f"{split}{min_valid}", options,
            )
        )  # fmt: skip
        assert tiles["kept"].tolist() == kept


def test_evaluation_knows_objects_that_reach_in_from_other_ground(half_black, tmp_path):
    image, blocks = half_black
    reaching = image.df.assign(xmin=[120.0, 195.0], xmax=[134.0, 205.0], ymin=10.0, ymax=20.0)
    image = ImageData(image.raster, "half", reaching)
    left = blocks.assign(width=128, split="test")
    right = blocks.assign(block=1, x=128, width=128, split="train")
    options = tiling.TilingOptions(min_visible=0.25)
    _, boxes = tiling.read_tiles(
        tiling.make_single_size(
            64, [image], pd.concat([left, right], ignore_index=True), tmp_path, options
        )
    )
    seen = boxes[boxes["object"] == 0]
    assert sorted(seen["owned"]) == [False, True]  # 43 % on the right: shown to the training
    moved = reaching.assign(xmin=[126.0, 195.0], xmax=[146.0, 205.0])  # 10 % on the left
    _, boxes = tiling.read_tiles(
        tiling.make_single_size(
            64, [ImageData(image.raster, "half", moved)],
            pd.concat([left, right], ignore_index=True), tmp_path, options,
        )
    )  # fmt: skip
    seen = boxes[boxes["object"] == 0]
    assert sorted(seen["owned"]) == [False, True]
    assert seen.loc[~seen["owned"], "ground_xmax"].tolist() == [128.0]


def test_a_failing_filter_names_the_window(half_black, tmp_path):
    image, blocks = half_black

    def broken(pixels, pixel_limit):
        return pixels[10_000]

    with pytest.raises(InputError, match=r"tile filter broken failed on window \(0, 0, 64, 64\)"):
        tiling.make_single_size(
            64, [image], blocks, tmp_path, tiling.TilingOptions(filters=(broken,)), workers=1
        )
    assert not (tmp_path / "tiling_64" / "manifest.json").exists()


@pytest.mark.parametrize(("ratio", "kept_empty"), [(0, 0), (0.5, 1), (1, 2), (10, 6)])
def test_empty_tiles_are_kept_by_ratio(half_black, tmp_path, ratio, kept_empty):
    image, blocks = half_black
    options = tiling.TilingOptions(empty_tile_ratio=ratio)
    tiles, _ = tiling.read_tiles(tiling.make_single_size(64, [image], blocks, tmp_path, options))
    assert tiles.loc[tiles["objects"] == 0, "kept"].sum() == kept_empty
    assert tiles.loc[tiles["objects"] > 0, "kept"].all()


def test_the_index_is_reused_until_its_input_changes(half_black, tmp_path):
    image, blocks = half_black
    calls = []

    def make(options, **extra):
        directory = tiling.make_single_size(64, [image], blocks, tmp_path, options, **extra)
        calls.append((directory / "tiles.parquet").stat().st_mtime_ns)

    make(tiling.TilingOptions())
    make(tiling.TilingOptions())
    assert calls[0] == calls[1]
    make(tiling.TilingOptions(min_visible=0.7))
    assert calls[1] != calls[2]
    make(tiling.TilingOptions(min_visible=0.7), force=True)
    assert calls[2] != calls[3]


def test_only_training_tiles_turn_and_twins_share_their_ground(prepared):
    tiles = prepared.tiles
    assert set(tiles.loc[tiles["split"] != "train", "angle"]) == {0}
    train = tiles[tiles["split"] == "train"]
    ground = train.groupby("window")[[*WINDOW_COLUMNS, "split", "kept", "raster"]].nunique()
    assert (ground == 1).all(axis=None)
    assert (train.groupby("window")["angle"].apply(sorted).map(tuple) == (0, 90, 180, 270)).all()


def test_every_object_of_the_sample_lands_in_exactly_one_tile(prepared):
    owned = prepared.boxes[prepared.boxes["owned"]].merge(
        prepared.tiles[prepared.tiles["angle"] == 0][["window", "raster"]], on="window"
    )
    for image in prepared.images:
        objects = owned.loc[owned["raster"] == image.image_identifier, "object"]
        assert sorted(objects) == list(range(len(image.df)))
    assert prepared.tiles.loc[prepared.tiles["angle"] == 0, "objects"].sum() == len(owned)


def test_labels_travel_with_their_boxes(prepared):
    tiles = prepared.tiles[prepared.tiles["angle"] == 0].set_index("window")
    frames = {image.image_identifier: image.df for image in prepared.images}
    for row in prepared.boxes[prepared.boxes["owned"]].sample(50, random_state=0).itertuples():
        tile = tiles.loc[row.window]
        truth = frames[tile["raster"]].iloc[row.object]
        assert row.label == truth["label"]
        assert row.xmin + tile["x"] == pytest.approx(max(truth["xmin"], tile["x"]))


@pytest.mark.parametrize("angle", [0, 90, 180, 270])
def test_turned_boxes_lie_on_their_objects(prepared, angle):
    """A marker painted into the raster is found where the turned box says."""
    tile = prepared.tiles[(prepared.tiles["split"] == "train") & (prepared.tiles["angle"] == angle)]
    tile = tile.sort_values("objects").iloc[-1]
    shown = prepared.boxes[prepared.boxes["window"] == tile["window"]]
    shown = shown.drop_duplicates(BOX_COLUMNS)  # the sample annotates an object or two twice
    window = Window(*(int(tile[c]) for c in WINDOW_COLUMNS))
    image = np.zeros((window.height, window.width), int)
    for i, box in enumerate(shown[BOX_COLUMNS].to_numpy()):
        x, y = int((box[0] + box[2]) / 2), int((box[1] + box[3]) / 2)
        image[y, x] = i + 1
    turned = np.rot90(image, angle // 90)
    boxes = tiling.boxes_of_tile(shown[BOX_COLUMNS].to_numpy(), angle, *turned.shape[::-1])
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        inside = turned[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))]
        assert i + 1 in inside


def test_chips_hold_the_tiles_pixels_and_boxes(prepared, tmp_path):
    raster = prepared.images[0].raster
    kept = prepared.tiles[(prepared.tiles["raster"] == "one") & prepared.tiles["kept"]]
    table = tiling.write_chips(tmp_path, kept, prepared.boxes, prepared.images, workers=1)
    files = {path.name for path in tmp_path.glob("tile_*.png")}
    assert len(files) == len(kept)
    assert set(table["tile_path"]) <= files
    assert set(pd.read_csv(tmp_path / "tile.csv")) == {*BOX_COLUMNS, "label", "tile_path"}
    turned = kept[kept["angle"] == 90].iloc[0]
    name = f"tile_one_{turned['window']}_90.png"
    with rasterio.open(tmp_path / name) as src:
        window = Window(*(int(turned[c]) for c in WINDOW_COLUMNS))
        np.testing.assert_array_equal(src.read(), np.rot90(raster.read(window), axes=(1, 2)))
    assert fileio.identifier_from_tilename(name) == "one"


@pytest.mark.parametrize(
    ("dtype", "bands", "suffix"),
    [("uint8", 1, "png"), ("uint8", 3, "png"), ("uint16", 1, "png"), ("uint16", 3, "tif"),
     ("uint16", 5, "tif"), ("float32", 1, "tif")],
)  # fmt: skip
def test_chips_are_png_where_it_holds_the_pixels(tmp_path, dtype, bands, suffix):
    path = tmp_path / "many.tif"
    pixels = np.random.default_rng(0).integers(1, 250, (bands, 64, 64)).astype(dtype) * 255
    with fileio.create_raster(path, width=64, height=64, count=bands, dtype=dtype) as dst:
        dst.write(pixels)
    raster = fileio.read_raster(path)
    tiles = pd.DataFrame(
        {"window": 0, "raster": "many", "x": 0, "y": 0, "width": 32, "height": 32,
         "angle": [0, 180], "kept": True}
    )  # fmt: skip
    boxes = pd.DataFrame(columns=["window", *BOX_COLUMNS, "label"])
    tiling.write_chips(tmp_path, tiles, boxes, [ImageData(raster, "many", pd.DataFrame())])
    for angle in (0, 180):
        with rasterio.open(tmp_path / f"tile_many_0_{angle}.{suffix}") as src:
            turned = np.rot90(pixels[:, :32, :32], angle // 90, axes=(1, 2))
            np.testing.assert_array_equal(src.read(), turned)


def test_chips_show_the_boxes_where_the_tiles_have_them(prepared, tmp_path):
    kept = prepared.tiles[prepared.tiles["kept"]]
    assert set(kept["angle"]) == {0, 90, 180, 270}
    table = tiling.write_chips(tmp_path, kept, prepared.boxes, prepared.images)
    expected = 0
    for tile in kept.itertuples():
        shown = prepared.boxes[prepared.boxes["window"] == tile.window]
        name = f"tile_{tile.raster}_{tile.window}_{tile.angle}.png"
        mine = table[table["tile_path"] == name]
        turned = tiling.boxes_of_tile(
            shown[BOX_COLUMNS].to_numpy(), tile.angle, tile.width, tile.height
        )
        np.testing.assert_allclose(mine[BOX_COLUMNS], turned, rtol=1e-5)
        assert mine["label"].tolist() == shown["label"].tolist()
        expected += len(shown)
    assert len(table) == expected > 0


def test_whole_rasters_turn_with_their_boxes_and_their_place(prepared, tmp_path):
    image = prepared.images[0]
    frames = tiling.rotate_single_annotation(image, tmp_path, [90, 180, 270])
    assert len(frames) == 4
    whole = Window(0, 0, image.raster.width, image.raster.height)
    original = image.raster.read(whole)
    with rasterio.open(image.raster.path) as src:
        place = src.xy(10, 20, offset="ul")
    for angle, df in zip([90, 180, 270], frames[1:], strict=True):
        with rasterio.open(df["image_path"].iloc[0]) as src:
            np.testing.assert_array_equal(src.read(), np.rot90(original, angle // 90, axes=(1, 2)))
            x, y = imutils.rotate_center(20.0, 10.0, angle, image.raster.width, image.raster.height)
            assert src.xy(float(y), float(x), offset="ul") == pytest.approx(place)
            assert (df[["xmax", "ymax"]].to_numpy() <= [src.width, src.height]).all()
        centers = (df["xmin"] + df["xmax"]) / 2, (df["ymin"] + df["ymax"]) / 2
        np.testing.assert_allclose(df["pixel_x"], centers[0])
        np.testing.assert_allclose(df["pixel_y"], centers[1])
    before = (tmp_path / "one_90.tif").stat().st_mtime_ns
    tiling.rotate_single_annotation(image, tmp_path, [90])
    assert (tmp_path / "one_90.tif").stat().st_mtime_ns == before


def test_memory_does_not_grow_with_the_raster(tmp_path):
    """Index and pixel filter of 4096 and of 8192 px a side, each in a process of its own."""
    peaks = []
    for side in (4096, 8192):
        folder = tmp_path / str(side)
        folder.mkdir()
        with fileio.create_raster(folder / "raster.tif", width=side, height=side, count=3,
                                  dtype="uint8", sparse_ok=True):  # fmt: skip
            pass
        corner = np.random.default_rng(0).uniform(0, side - 30, (1000, 2))
        df = pd.DataFrame(np.hstack([corner, corner + 30]), columns=BOX_COLUMNS)
        df.assign(label="object").to_csv(folder / "objects.csv")
        command = [sys.executable, str(PROJECT / "benchmarks" / "bench_tiling.py"), "--one",
                   "ours, black pixels filtered", str(side), str(folder)]  # fmt: skip
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks.append(json.loads(output.splitlines()[-1])["peak_mb"])
    # the rasters have 48 and 192 MB of pixels, of which GDAL keeps up to 64 MB
    assert peaks[1] - peaks[0] < 40


def test_an_index_of_twenty_thousand_objects_takes_under_three_seconds(tmp_path):
    side, objects = 8192, 20_000
    path = tmp_path / "large.tif"
    with fileio.create_raster(path, width=side, height=side, count=3, dtype="uint8",
                              sparse_ok=True):  # fmt: skip
        pass
    rng = np.random.default_rng(0)
    center, half = rng.uniform(40, side - 40, (objects, 2)), rng.uniform(3, 30, (objects, 1))
    df = pd.DataFrame(np.concatenate([center - half, center + half], 1), columns=BOX_COLUMNS)
    df = df.assign(pixel_x=center[:, 0], pixel_y=center[:, 1], diameter=2 * half, label="a")
    image = ImageData(fileio.read_raster(path), "large", df)
    options = tiling.TilingOptions(angles=(90, 180, 270), evaluation_overlap=60)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        blocks = splits.ground_blocks(
            [image.raster], split_by="block", max_tile_size=256, block_size=None,
            test_proportion=0.2, validation_proportion=0.25, seed=0,
        )  # fmt: skip
        directory = tiling.make_single_size(256, [image], blocks, tmp_path, options, force=True)
        times.append(time.perf_counter() - start)
    tiles, boxes = tiling.read_tiles(directory)
    assert boxes["owned"].sum() == objects
    assert len(tiles) > 1024
    assert min(times) < 3


def test_empty_tiles_without_data_are_replaced_by_others(tmp_path):
    path = tmp_path / "strip.tif"
    pixels = np.full((1, 256, 2048), -1, np.int16)
    pixels[:, :, :512] = 5
    layout = {"width": 2048, "height": 256, "count": 1, "dtype": "int16", "nodata": -1}
    with fileio.create_raster(path, **layout) as dst:
        dst.write(pixels)
    boxes = [[10.0 + 64 * i, 10, 20 + 64 * i, 20] for i in range(8)]  # 8 of the 32 tiles with data
    df = pd.DataFrame(boxes, columns=tiling.BOX_COLUMNS).assign(label="a")
    block = {"block": 0, "raster": "strip", "x": 0, "y": 0, "width": 2048, "height": 256}
    made = tiling.make_single_size(
        64, [ImageData(fileio.read_raster(path), "strip", df)],
        pd.DataFrame([block | {"split": "train"}]), tmp_path / "tiles",
        tiling.TilingOptions(empty_tile_ratio=1.0),
    )  # fmt: skip
    tiles, _ = tiling.read_tiles(made)
    kept = tiles[tiles["kept"]]
    assert (kept["objects"] == 0).sum() == 8
    assert kept["x"].max() < 512


def test_pixels_are_found_on_ground_that_is_mostly_nodata_and_only_where_it_counts(tmp_path):
    path = tmp_path / "sparse.tif"
    pixels = np.full((1, 1024, 4096), -1, np.int16)
    pixels[:, :128, :128] = 7
    pixels[:, :128, 128:192] = 9
    layout = {"width": 4096, "height": 1024, "count": 1, "dtype": "int16", "nodata": -1}
    with fileio.create_raster(path, **layout) as dst:
        dst.write(pixels)
    ignored = fileio.Regions(ignored=(shapely.box(128, 0, 192, 128),))
    raster = fileio.read_raster(path).with_regions(ignored)
    ground = pd.DataFrame([{"raster": "sparse", "x": 0, "y": 0, "width": 4096, "height": 1024}])
    for seed in range(5):
        assert set(tiling.sample_pixels(ground, {"sparse": raster}, seed=seed).ravel()) == {7}
    nothing = raster.with_regions(fileio.Regions(aoi=(shapely.box(2000, 0, 2100, 100),)))
    with pytest.raises(InputError, match="has a valid pixel that counts"):
        tiling.sample_pixels(ground, {"sparse": nothing}, seed=0)


# -- masks ------------------------------------------------------------------------------------


class Stripes:
    """Labels whose class grows by one every 32 columns; the last ones are unknown."""

    classes = SimpleNamespace(names=("background", "a", "b"), values={"a": 1, "b": 2}, background=0)
    made_from: ClassVar = {"stripes": 1}

    def __init__(self, log=None):
        self.log = log

    def read(self, window, counted=None):
        if self.log is not None:
            fileio.append_line(self.log, f"{window.x} {window.y}")
        columns = (window.x + np.arange(window.width)) // 32
        row = np.array([0, 0, 1, 1, 2, 0, 2, 255])[columns.clip(0, 7)]
        return np.broadcast_to(row, (window.height, window.width)).astype("uint8")


def masked(half_black, **options):
    image, blocks = half_black
    return replace(image, df=image.df.iloc[:0], labels=Stripes(**options)), blocks


@pytest.mark.parametrize("workers", [1, 2])
def test_tiles_count_their_classes(half_black, tmp_path, workers):
    image, blocks = masked(half_black)
    made = tiling.make_tiles(
        [image], blocks, [64], tmp_path, tiling.TilingOptions(angles=(90,)), workers=workers
    )
    tiles, boxes = tiling.read_tiles(made[64])
    assert boxes.empty
    counts = tiles[tiles["angle"] == 0].set_index(["x", "y"])[tiling.class_columns(3)]
    assert (counts.dtypes == "int64").all()
    for y in (0, 64):
        rows = counts.loc[[(0, y), (64, y), (128, y), (192, y)]].to_numpy()
        assert rows.tolist() == [[4096, 0, 0], [0, 4096, 0], [2048, 0, 2048], [0, 0, 2048]]
    assert tiles["kept"].all()
    np.testing.assert_array_equal(tiling.counts_of(tiles[tiles["angle"] == 90]), counts)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [1, 1, 1, 1]), ({"min_annotated": 50}, [0, 1, 1, 1]),
        ({"min_annotated": 50.1}, [0, 1, 0, 0]), ({"class_proportion": {2: 50}}, [0, 0, 1, 1]),
        ({"class_proportion": {0: 50, 2: 10}}, [0, 0, 1, 0]),
        ({"min_annotated": 60, "class_proportion": {1: 5}}, [0, 1, 0, 0]),
        ({"filters": (tiling.black_pixel_filter,)}, [0, 0, 1, 1]),
    ],
)  # fmt: skip
def test_training_tiles_are_rejected_by_their_classes(half_black, tmp_path, options, kept):
    image, blocks = masked(half_black)
    for split in ("train", "validation"):
        directory = tiling.make_single_size(
            64, [image], blocks.assign(split=split), tmp_path / split,
            tiling.TilingOptions(**options),
        )  # fmt: skip
        tiles, _ = tiling.read_tiles(directory)
        expected = kept * 2 if split == "train" else [1] * 8
        assert tiles["kept"].astype(int).tolist() == expected
    if options.get("min_annotated") == 50:
        train, _ = tiling.read_tiles(tmp_path / "train" / "tiling_64")
        assert train["reason"][0] == "annotated under min_annotated, 50 %"


def test_counting_goes_on_where_it_was_killed(half_black, tmp_path, monkeypatch):
    log = tmp_path / "log"
    image, blocks = masked(half_black, log=log)
    monkeypatch.setattr(tiling, "JOB_WINDOWS", 2)
    append = fileio.Journal.add

    def add(journal, key, value):
        append(journal, key, value)
        if len(journal.known) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fileio.Journal, "add", add)
        with pytest.raises(KeyboardInterrupt):
            tiling.make_single_size(
                64, [image], blocks, tmp_path, tiling.TilingOptions(), workers=1
            )
    assert len(log.read_text().splitlines()) == 4
    tiling.make_single_size(64, [image], blocks, tmp_path, tiling.TilingOptions(), workers=1)
    lines = log.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 8
    assert not (tmp_path / "tiling_64" / "counted.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_proportion": {3: 5}}, r"names \[3\], the class ids are 0 to 2"),
        ({"class_proportion": {1: 101}}, "0 to 100 percent, got"),
        ({"min_annotated": -1}, "0 to 100 percent, got"),
        ({"class_proportion": {1: 60, 2: 60}}, "sum to more than 100"),
    ],
)
def test_thresholds_that_no_tile_can_meet_are_refused(half_black, tmp_path, options, message):
    image, blocks = masked(half_black)
    with pytest.raises(InputError, match=message):
        tiling.make_single_size(64, [image], blocks, tmp_path, tiling.TilingOptions(**options))


def test_rasters_share_one_table_of_classes(half_black, tmp_path):
    image, blocks = masked(half_black)
    with pytest.raises(InputError, match=r"\['half'\] have none"):
        tiling.make_single_size(
            64, [image, half_black[0]], blocks, tmp_path, tiling.TilingOptions()
        )
    with pytest.raises(InputError, match="need masks, not boxes"):
        tiling.make_single_size(
            64, [half_black[0]], blocks, tmp_path, tiling.TilingOptions(min_annotated=5)
        )
