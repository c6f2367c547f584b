"""Every stage of the data work leaves on a Dask cluster, byte for byte, what it leaves here."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import rasterio

import annotations
import fileio
import layout
import parallel
import tiling
from ImageData import InputError, Window


def contents(folder):
    """Return the files of a folder, by name; its manifests name no place; locks hold nothing."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def assert_same_files(here, there):
    """Compare the files of two folders; return their names."""
    here, there = contents(here), contents(there)
    assert set(here) == set(there)
    assert not [name for name in here if here[name] != there[name]]
    return set(here)


def test_cleaning(small_sample, tmp_path, cluster):
    def not_tiny(x_min, y_min, x_max, y_max, diam, sizex, sizey):
        return diam >= 4

    cleaning = small_sample.cleaning | {"extra_filters": [not_tiny]}
    for name, scheduler in (("here", None), ("there", cluster)):
        annotations.clean_annotations(
            small_sample.tables, small_sample.rasters, output_dir=tmp_path / name,
            scheduler=scheduler, **cleaning,
        )  # fmt: skip
    names = assert_same_files(tmp_path / "here", tmp_path / "there")
    tables = {name for name in names if name.endswith(".csv")}
    quarantines = {"one_quarantine.csv", "two_quarantine.csv"}
    assert tables == {"one.csv", "two.csv", "report.csv", "labels.csv", *quarantines}
    assert "not_tiny" in (tmp_path / "there" / "report.csv").read_text()


def test_tile_index_and_chips(prepared, tmp_path, cluster):
    bright = prepared.images[0].raster.read(Window(0, 0, 640, 512)).mean()
    options = tiling.TilingOptions(
        angles=(90,), filters=(lambda pixels, limit: pixels.mean() > bright,), materialize=True,
        empty_tile_ratio=1.0,
    )  # fmt: skip
    for name, work in (("here", {"workers": 1}), ("there", {"scheduler": cluster})):
        made = tiling.make_tiles(
            prepared.images, prepared.blocks, [64], tmp_path / name, options, **work
        )
    names = assert_same_files(tmp_path / "here", tmp_path / "there")
    tiles, _ = tiling.read_tiles(made[64])
    assert tiles["reason"].eq("<lambda>").any()
    chips = {name for name in names if name.endswith(".png")}
    assert len(chips) == tiles["kept"].sum() > 0
    assert names - chips == {
        f"tiling_64/{name}" for name in ("tiles.parquet", "boxes.parquet", "tile.csv",
                                         "manifest.json")
    }  # fmt: skip


def test_statistics_of_the_pixels(small_sample, cluster):
    rasters = {raster.identifier: raster for raster in small_sample.rasters}
    ground = pd.DataFrame(
        {"raster": list(rasters), "x": [0, 64], "y": [0, 32], "width": 400, "height": 300}
    )
    here, there = (
        tiling.sample_pixels(ground, rasters, seed=1, pixels_per_window=500, scheduler=scheduler)
        for scheduler in (None, cluster)
    )
    assert here.shape == (small_sample.rasters[0].band_count, 128 * 500)
    np.testing.assert_array_equal(here, there)


@pytest.fixture
def striped(small_sample, tmp_path):
    """Two rasters of a compressed strip each, which are worth a copy."""
    rasters = []
    for name in ("first", "second"):
        path = tmp_path / f"{name}.tif"
        pixels = np.random.default_rng(0).integers(0, 40, (1, 2048, 4096)).astype("uint8")
        with fileio.create_raster(
            path, width=4096, height=2048, count=1, dtype="uint8", tiled=False, blockysize=2048,
            compress="deflate",
        ) as dst:  # fmt: skip
            dst.write(pixels)
        rasters.append(fileio.read_raster(path))
    return rasters


def test_layout_repair(striped, tmp_path, cluster):
    copies = {}
    for name, scheduler in (("here", None), ("there", cluster)):
        copies[name] = fileio.check_layout(
            striped, repair=True, cache_dir=tmp_path / name, scheduler=scheduler
        )
        assert [r.path.stem for r in copies[name]] == ["first", "second"]
        assert [r.block_shape_hw for r in copies[name]] == [(256, 256)] * 2
    for here, there in zip(*copies.values(), strict=True):
        assert here.path.read_bytes() == there.path.read_bytes()
        assert (there.path.parent / layout.DIAGNOSIS).exists()


def test_whole_rasters_turn(prepared, tmp_path, cluster):
    frames = {}
    for name, work in (("here", {"workers": 1}), ("there", {"scheduler": cluster})):
        folder = tmp_path / name
        frames[name] = parallel.map_ordered(
            lambda image, folder=folder: tiling.rotate_single_annotation(image, folder, [90]),
            prepared.images, **work,
        )  # fmt: skip
    names = assert_same_files(tmp_path / "here", tmp_path / "there")
    assert names == {"one_90.tif", "one_90.json", "two_90.tif", "two_90.json"}
    with rasterio.open(tmp_path / "there" / "one_90.tif") as src:
        assert (src.width, src.height) == (512, 640)
    for here, there in zip(*frames.values(), strict=True):
        assert here[0].equals(there[0])


def test_a_file_that_a_worker_does_not_find_is_named_with_the_cure(tmp_path, prepared, cluster):
    image = prepared.images[0]
    gone = fileio.read_raster(image.raster.path)
    object.__setattr__(gone, "path", tmp_path / "gone.tif")
    ground = pd.DataFrame([{"raster": "one", "x": 0, "y": 0, "width": 400, "height": 300}])
    with pytest.raises(InputError, match=r"gone\.tif has disappeared") as caught:
        tiling.sample_pixels(ground, {"one": gone}, seed=0, scheduler=cluster)
    assert "find all files under the same paths" in caught.value.__notes__[0]
