"""Disk: rasters by windows, atomic artefacts, manifests, names."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
from conftest import PROJECT, REAL_DATA

import annotations
import fileio
from ImageData import InputError, Window


@pytest.fixture
def raster_file(tmp_path):
    pixels = np.arange(3 * 50 * 70, dtype=np.uint16).reshape(3, 50, 70) + 1
    path = tmp_path / "r.tif"
    with fileio.create_raster(
        path, width=70, height=50, count=3, dtype="uint16", nodata=0, blockxsize=16, blockysize=16
    ) as dst:
        dst.write(pixels)
    return path, pixels


@pytest.mark.parametrize("window", [(0, 0, 70, 50), (10, 20, 5, 7), (69, 49, 1, 1)])
def test_windows_read_what_was_written(raster_file, window):
    path, pixels = raster_file
    x, y, w, h = window
    np.testing.assert_array_equal(
        fileio.read_raster(path).read(Window(*window)), pixels[:, y : y + h, x : x + w]
    )


@pytest.mark.parametrize("window", [(-5, -7, 20, 20), (60, 40, 20, 20), (200, 200, 4, 4)])
def test_what_lies_outside_is_nodata_and_invalid(raster_file, window):
    path, pixels = raster_file
    raster = fileio.read_raster(path)
    image = raster.read(Window(*window))
    valid = raster.read_valid(Window(*window), image)
    x, y, w, h = window
    expected = np.zeros((3, h, w), np.uint16)
    rows, cols = np.arange(y, y + h), np.arange(x, x + w)
    inside = ((rows >= 0) & (rows < 50))[:, None] & ((cols >= 0) & (cols < 70))[None]
    expected[:, inside] = pixels[:, rows.clip(0, 49)][:, :, cols.clip(0, 69)][:, inside]
    np.testing.assert_array_equal(image, expected)
    np.testing.assert_array_equal(valid, inside)


def test_rasters_of_different_kinds_do_not_go_together(raster_file, tmp_path):
    path, _ = raster_file
    with fileio.create_raster(tmp_path / "b.tif", width=8, height=8, count=1, dtype="uint8"):
        pass
    with pytest.raises(InputError, match=r"'r\.tif': '3 x uint16', 'b\.tif': '1 x uint8'"):
        fileio.read_rasters([path, tmp_path / "b.tif"])


def test_nodata_and_nan_are_invalid(tmp_path):
    path = tmp_path / "f.tif"
    pixels = np.ones((1, 4, 4), np.float32)
    pixels[0, 0, 0], pixels[0, 1, 1], pixels[0, 2, 2] = -9999, np.nan, -np.inf
    with fileio.create_raster(
        path, width=4, height=4, count=1, dtype="float32", nodata=-9999
    ) as dst:
        dst.write(pixels)
    raster = fileio.read_raster(path)
    window = Window(0, 0, 4, 4)
    valid = raster.read_valid(window, raster.read(window))
    assert not valid[0, 0]
    assert not valid[1, 1]
    assert not valid[2, 2]
    assert valid.sum() == 13


def test_an_alpha_band_is_no_band_but_a_mask(tmp_path):
    path = tmp_path / "rgba.tif"
    pixels = np.full((4, 8, 8), 200, np.uint8)
    pixels[3, :, :4] = 0
    with fileio.create_raster(
        path, width=8, height=8, count=4, dtype="uint8", photometric="RGB", alpha="YES",
        blockxsize=16, blockysize=16,
    ) as dst:  # fmt: skip
        dst.write(pixels)
    raster = fileio.read_raster(path)
    window = Window(0, 0, 8, 8)
    assert raster.bands == (1, 2, 3)
    image = raster.read(window)
    assert image.shape == (3, 8, 8)
    valid = raster.read_valid(window, image)
    assert not valid[:, :4].any()
    assert valid[:, 4:].all()


def test_a_handle_travels_without_pixels(raster_file):
    path, pixels = raster_file
    raster = fileio.read_raster(path)
    raster.read(Window(0, 0, 4, 4))  # an open dataset must not travel with it
    data = pickle.dumps(raster)
    assert len(data) < 2000
    np.testing.assert_array_equal(pickle.loads(data).read(Window(0, 0, 70, 50)), pixels)


def test_a_rewritten_file_is_read_anew(raster_file):
    path, _ = raster_file
    raster = fileio.read_raster(path)
    before = raster.read(Window(0, 0, 2, 2))
    with fileio.create_raster(
        path, width=70, height=50, count=3, dtype="uint16", nodata=0, blockxsize=16, blockysize=16
    ) as dst:
        dst.write(np.full((3, 50, 70), 9, np.uint16))
    assert (before != 9).all()
    assert (raster.read(Window(0, 0, 2, 2)) == 9).all()


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.tif does not exist"):
        fileio.read_raster(tmp_path / "none.tif")
    text = tmp_path / "text.tif"
    text.write_text("no pixels")
    with pytest.raises(InputError, match=r"text\.tif is not a raster that GDAL can read"):
        fileio.read_raster(text)


def test_a_corrupt_block_names_the_window(tmp_path):
    path = tmp_path / "c.tif"
    rng = np.random.default_rng(0)
    with fileio.create_raster(path, width=512, height=512, count=1, dtype="uint8") as dst:
        dst.write(rng.integers(0, 255, (1, 512, 512), dtype=np.uint8))
    data = bytearray(path.read_bytes())
    with rasterio.open(path) as src:
        offset = int(src.get_tag_item("BLOCK_OFFSET_1_1", "TIFF", bidx=1))
    data[offset : offset + 30000] = bytes(30000)
    path.write_bytes(bytes(data))
    raster = fileio.read_raster(path)
    with pytest.raises(InputError, match=r"c\.tif cannot be read in window \(256, 256, 64, 64\)"):
        raster.read(Window(256, 256, 64, 64))


def test_a_failed_write_leaves_nothing_and_keeps_the_old(tmp_path):
    path = fileio.write_text(tmp_path / "a.txt", "old")

    def interrupted():
        with fileio.atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_manifest_holds_for_the_same_input_only(tmp_path):
    source = tmp_path / "in.csv"
    source.write_text("1")
    path = tmp_path / "stage" / "manifest.json"
    made_from = {"size": 256, "source": source, "table": pd.DataFrame({"a": [1, 2]})}
    assert not fileio.is_finished(path, made_from)
    fileio.write_text(path.parent / "out.parquet", "")
    fileio.mark_finished(path, made_from, ["out.parquet"])
    assert fileio.is_finished(path, made_from)
    (path.parent / "out.parquet").unlink()
    assert not fileio.is_finished(path, made_from)
    (path.parent / "out.parquet").touch()
    assert not fileio.is_finished(path, made_from | {"size": 250})
    assert not fileio.is_finished(path, made_from | {"table": pd.DataFrame({"a": [1, 3]})})
    source.write_text("22")
    assert not fileio.is_finished(path, made_from)
    path.write_text("{half a manif")
    assert not fileio.is_finished(path, made_from)


LIMIT = 3


def uses_a_global(image):
    return image.sum() > LIMIT


def test_an_edited_filter_is_another_one(monkeypatch):
    def make(limit):
        return lambda image: image.sum() > limit

    def at_least(image, limit):
        return image.sum() >= limit

    same = [make(3), make(3)]
    assert fileio.fingerprint(same[0]) == fileio.fingerprint(same[1])
    assert fileio.fingerprint(make(3)) != fileio.fingerprint(make(4))
    assert fileio.fingerprint(partial(at_least, limit=1)) != fileio.fingerprint(
        partial(at_least, limit=2)
    )

    code = "import fileio; print(fileio.fingerprint(lambda x: x in {'alpha', 'beta', 'gamma'}))"
    prints = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=PROJECT, env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True, check=True, text=True,
        ).stdout
        for seed in "123"
    }  # fmt: skip
    assert len(prints) == 1  # from process to process, too

    def uses_a_global_inside(image):
        return any(v > LIMIT for v in image)

    def calls_a_helper(image):
        return uses_a_global(image)

    class Brighter:
        def __init__(self, limit):
            self.limit = limit

        def __call__(self, image):
            return image.mean() > self.limit

        def method(self, image):
            return self(image)

    with_dict = lambda image: {(1, 2): 3, 1: 4}.get(image)  # noqa: E731
    filters = [uses_a_global_inside, calls_a_helper, Brighter(3), Brighter(3).method, with_dict]
    before = [fileio.fingerprint(f) for f in filters]
    again = [uses_a_global_inside, calls_a_helper, Brighter(3), Brighter(3).method, with_dict]
    assert [fileio.fingerprint(f) for f in again] == before
    monkeypatch.setitem(globals(), "LIMIT", 7)
    assert [fileio.fingerprint(f) == b for f, b in zip(filters, before, strict=True)] == [
        False, False, True, True, True
    ]  # fmt: skip
    assert fileio.fingerprint(Brighter(4)) != before[2]

    def recursive(n):
        return n and recursive(n - 1)

    assert fileio.fingerprint(recursive) == fileio.fingerprint(recursive)
    assert fileio.fingerprint(uses_a_global) == fileio.fingerprint(uses_a_global)
    monkeypatch.setitem(globals(), "LIMIT", 4)
    after = fileio.fingerprint(uses_a_global)
    monkeypatch.setitem(globals(), "LIMIT", 5)
    assert fileio.fingerprint(uses_a_global) != after
    assert fileio.fingerprint([lambda i: i > 1]) != fileio.fingerprint([lambda i: i < 1])
    log, level = annotations.log, annotations.log.level
    before = fileio.fingerprint(annotations.preprocess_df)
    log.setLevel("ERROR" if level != logging.ERROR else "INFO")
    try:  # what is logged changes no result
        assert fileio.fingerprint(annotations.preprocess_df) == before
    finally:
        log.setLevel(level)


@pytest.mark.parametrize(
    ("name", "identifier"),
    [
        ("tile_sample_1_17_90.png", "sample_1"),
        ("some/folder/tile_a_b_c_0_0.tif", "a_b_c"),
        ("sample_1_270.tif", "sample_1"),
        (Path("tile_x_3_180.png"), "x"),
    ],
)
def test_identifiers_come_back_from_names(name, identifier):
    assert fileio.identifier_from_tilename(name) == identifier


def test_foreign_names_are_refused():
    with pytest.raises(InputError, match="not named as a tile"):
        fileio.identifier_from_tilename("photo.png")


def test_directories_that_hold_more_are_not_emptied(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for directory in (Path.cwd(), tmp_path, Path("/"), Path.home()):
        with pytest.raises(InputError, match="must not be emptied"):
            fileio.recreate_directory(directory)
    inner = Path("inner")
    (inner / "old").mkdir(parents=True)
    assert list(fileio.recreate_directory(inner).iterdir()) == []


def test_tables_that_are_none_are_named(tmp_path):
    empty = tmp_path / "empty.csv"
    empty.write_text("")
    with pytest.raises(InputError, match=r"empty\.csv is empty"):
        fileio.read_table(empty)
    header = tmp_path / "header.csv"
    header.write_text("a,b\n")
    with pytest.raises(InputError, match="but no row"):
        fileio.read_table(header)
    assert list(fileio.read_table(header, rows=False)) == ["a", "b"]
    with pytest.raises(InputError, match="does not exist"):
        fileio.read_table(tmp_path / "none.csv")


@pytest.mark.skipif(not REAL_DATA.exists(), reason="the real rasters are not on this machine")
@pytest.mark.parametrize(
    ("name", "bands", "dtype"),
    [
        ("lunar_craters/train_M115143943_mosaic_train_small.tif", 1, "uint8"),
        ("ships/busan.tif", 5, "uint16"),
        ("stars/sep_emmi_256.tif", 1, "float32"),
        ("trees/OSBS_029.tif", 3, "uint8"),
    ],
)
def test_real_rasters_open_and_read(name, bands, dtype):
    raster = fileio.read_raster(REAL_DATA / name)
    assert (len(raster.bands), raster.dtype) == (bands, dtype)
    image = raster.read(Window(-16, -16, 64, 64))
    valid = raster.read_valid(Window(-16, -16, 64, 64), image)
    assert image.shape == (bands, 64, 64)
    assert not valid[:16].any()
    assert valid[16:, 16:].mean() > 0.5
