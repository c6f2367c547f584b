"""Class maps: the same however the raster is cut; what is stopped goes on; regions across seams."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace

import geopandas as gpd
import numpy as np
import pandas as pd
import PIL.Image
import pyogrio
import pytest
import rasterio
import shapely
import torch
from conftest import PROJECT
from hypothesis import given, settings
from hypothesis import strategies as st
from painter import CLASSES, Painter, paint
from test_LargeRasterOR import contract_of

import atlas
import fileio
import implot
import imutils
import maps
import predict
import regions
import strips
import tiling
from ImageData import InputError, Window
from imutils import Radiometry
from regions import RegionFront

OPTIONS = {"device": "cpu", "precision": "32-true", "override": ("radiometry",)}
UTM = {"crs": "EPSG:32617", "transform": rasterio.Affine(0.5, 0, 404000, 0, -0.5, 3285000)}


def unsplit(path):
    """Return the probabilities (C, H, W) of the painter, which sees the raster whole."""
    with rasterio.open(path) as src:
        image = src.read(out_dtype="float32")
    with torch.inference_mode():
        return Painter()(torch.from_numpy(image / 255)[None]).softmax(1)[0].numpy()


def predict_map(path, folder, *, model=None, names=("map.tif",), **options):
    outputs = [folder / name for name in names]
    return predict.predict_raster(model or Painter(), path, outputs, **(OPTIONS | options))


def read(path):
    with rasterio.open(path) as src:
        return src.read()


# -- weights ----------------------------------------------------------------------------------


@given(
    length=st.integers(1, 400), size=st.integers(2, 90), share=st.floats(0, 0.99),
    smooth=st.booleans(),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_weights_sum_to_exactly_one_and_end_with_their_window(length, size, share, smooth):
    axis = maps.share_axis(length, size, int(share * size), smooth=smooth)
    total = np.zeros(axis.starts[-1] + size, np.float32)
    for start, low, high, weights in zip(
        axis.starts, axis.low, axis.high, axis.weights, strict=True
    ):
        total[start : start + size] += weights
        assert start <= low < high <= min(start + size, length)
        outside = np.ones(size, bool)
        outside[low - start : high - start] = False
        assert not weights[outside].any()
    assert (total[:length] == 1).all()
    assert (axis.weights >= 0).all()
    assert (np.diff(axis.low) >= 0).all()
    assert (np.diff(axis.high) >= 0).all()


def test_smooth_weights_rise_and_fall_without_a_step():
    axis = maps.share_axis(96, 64, 32, smooth=True)
    ramp = axis.weights[1][:32]
    assert (np.diff(ramp) > 0).all()
    assert np.abs(np.diff(axis.weights[0])).max() < np.pi / 2 / 32 + 1e-3
    np.testing.assert_array_equal(axis.weights[0][:32], 1)


# -- exactness --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    sides = {(101, 67): 0, (300, 421): 1, (33, 500): 2}
    return [paint(folder / f"{seed}.tif", *side, seed=seed) for side, seed in sides.items()]


@given(
    scene=st.integers(0, 2), size=st.integers(32, 130), share=st.floats(0, 0.95),
    smooth=st.booleans(), batch=st.integers(1, 5),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_a_map_is_that_of_the_unsplit_raster(
    tmp_path_factory, scenes, scene, size, share, smooth, batch
):
    path, folder = scenes[scene], tmp_path_factory.mktemp("maps")
    overlap = min(int(share * size), size - 8)
    result = predict_map(
        path, folder, tile_size=size, overlap=overlap, smooth_prediction=smooth,
        probabilities=True, uncertainty=smooth, batch_size=batch,
    )  # fmt: skip
    truth = unsplit(path)
    found = read(folder / "map.tif")[0]
    np.testing.assert_array_equal(found, truth.argmax(axis=0))
    shares = read(folder / "map_probabilities.tif").astype(float) / maps.SHARES
    assert np.abs(shares - truth).max() <= 0.5 / maps.SHARES + 1e-5
    if smooth:  # tiles that agree leave nothing to doubt
        assert read(folder / "map_uncertainty.tif").max() <= 1
    counts = np.bincount(found.ravel(), minlength=len(CLASSES))
    assert list(result.pixels.values()) == counts.tolist()


def test_sums_are_those_of_the_unsplit_raster_to_float_tolerance(tmp_path, scenes):
    task = predict.prepare(
        Painter(), scenes[1], tmp_path / "map.tif", tile_size=64, overlap=40, **OPTIONS
    )
    task.predictor.journal.mkdir()
    assert len(list(task.predictor.predict(range(len(task.predictor.strip_tops))))) > 2
    journal, truth = maps._Journal(task.predictor), unsplit(scenes[1])
    seam = journal.rows[1]
    assert seam.settled_from > seam.top
    sums = journal._sums(1, seam.top, seam.settled_from, 10, 290)
    expected = truth[:, seam.top : seam.settled_from, 10:290]
    np.testing.assert_allclose(sums[: len(CLASSES)], expected, atol=1e-6)
    np.testing.assert_array_equal(sums[-2:], 1)


class Edgy(Painter):
    """Sees background in the first rows of its tile."""

    def forward(self, images):
        logits = super().forward(images)
        logits[:, 0, :16] += 9
        return logits


def test_overlapping_tiles_that_disagree_are_uncertain_there_and_only_there(tmp_path, scenes):
    predict_map(
        scenes[1], tmp_path, model=Edgy(), tile_size=64, overlap=32, uncertainty=True
    )  # fmt: skip
    doubt = read(tmp_path / "map_uncertainty.tif")[0] / maps.SHARES
    with rasterio.open(scenes[1]) as src:
        starts, _ = tiling.grid_axis(src.height, 64, 32)
    assert doubt[:16].max() < 0.01  # no other tile sees the first rows
    shared = doubt[starts[1] + 8 : starts[1] + 16]
    assert shared.max() > 0.3
    assert doubt[starts[1] + 17 : starts[2] - 1].max() < 0.01


# -- what is written --------------------------------------------------------------------------


def test_the_map_lies_on_the_raster_with_colours_and_names(tmp_path):
    path = paint(tmp_path / "a.tif", 700, 300, **UTM)
    predict_map(path, tmp_path, tile_size=128)
    with rasterio.open(tmp_path / "map.tif") as dst, rasterio.open(path) as src:
        assert (dst.width, dst.height, dst.crs, dst.transform) == (
            src.width, src.height, src.crs, src.transform,
        )  # fmt: skip
        assert dst.dtypes == ("uint8",)
        assert dst.nodata == 255
        assert dst.profile["tiled"]
        assert dst.compression.value == "ZSTD"
        assert dst.overviews(1) == [2]
        assert [dst.tags(1)[f"class_{i}"] for i in range(3)] == list(CLASSES)
        assert dst.colormap(1)[0] == (0xC8, 0xC8, 0xC8, 255)  # the background is gray
        assert dst.colormap(1)[1] == (0xE6, 0x9F, 0x00, 255)
    record = json.loads((tmp_path / "map.tif.provenance.json").read_text())
    assert record["complete"]
    assert sum(record["pixels"].values()) == 700 * 300
    assert record["plan"]["smooth"] is True


def test_nodata_and_ground_outside_the_area_of_interest_stay_nodata(tmp_path):
    path = paint(tmp_path / "a.tif", 260, 200, hole=(40, 150, 90, 180), nodata=0, **UTM)
    x, y = 404000 + 0.5 * np.array([0, 150]), 3285000 - 0.5 * np.array([0, 200])
    area = gpd.GeoSeries([shapely.box(x[0], y[1], x[1], y[0])], crs=UTM["crs"])
    area.to_file(tmp_path / "aoi.gpkg")
    predict_map(path, tmp_path, tile_size=64, probabilities=True, aoi=tmp_path / "aoi.gpkg")
    known = np.zeros((200, 260), bool)
    known[:, :150] = True
    known[150:180, 40:90] = False
    found = read(tmp_path / "map.tif")[0]
    np.testing.assert_array_equal(found != 255, known)
    np.testing.assert_array_equal(found[known], unsplit(path).argmax(axis=0)[known])
    shares = read(tmp_path / "map_probabilities.tif")
    np.testing.assert_array_equal(shares != 255, np.broadcast_to(known, shares.shape))


def test_what_cannot_be_read_is_nodata_and_recorded(tmp_path, monkeypatch, scenes):
    whole, broken = fileio.Raster.read, []

    def read_or_fail(self, window):
        if (window.x, window.y) == (128, 64) and not broken[1:]:
            broken.append(window)
            raise InputError("damaged")
        return whole(self, window)

    monkeypatch.setattr(fileio.Raster, "read", read_or_fail)
    options = {"tile_size": 64, "overlap": 0, "smooth_prediction": False}
    result = predict_map(scenes[1], tmp_path, **options)
    assert not result.complete
    assert result.gaps.to_numpy().tolist() == [[128, 64, 64, 64]]
    found = read(tmp_path / "map.tif")[0]
    assert (found[64:128, 128:192] == 255).all()
    assert (found == 255).sum() == 64 * 64
    broken += [None, None]  # mended: the same call fills the gap
    assert predict_map(scenes[1], tmp_path, **options).complete
    np.testing.assert_array_equal(read(tmp_path / "map.tif")[0], unsplit(scenes[1]).argmax(axis=0))


def test_a_gap_takes_its_core_only_from_blended_tiles(tmp_path, monkeypatch, scenes):
    whole = fileio.Raster.read

    def read_or_fail(self, window):
        if (window.x, window.y) == (96, 96) and window.width == 64:
            raise InputError("damaged")
        return whole(self, window)

    monkeypatch.setattr(fileio.Raster, "read", read_or_fail)
    result = predict_map(scenes[1], tmp_path, tile_size=64, overlap=16, probabilities=True)
    ((x, y, width, height),) = result.gaps.to_numpy().tolist()
    truth = unsplit(scenes[1])
    known = np.ones(truth.shape[1:], bool)
    known[y : y + height, x : x + width] = False
    found = read(tmp_path / "map.tif")[0]
    np.testing.assert_array_equal(found != 255, known)
    np.testing.assert_array_equal(found[known], truth.argmax(axis=0)[known])
    shares = read(tmp_path / "map_probabilities.tif") / maps.SHARES
    assert np.abs(shares - truth)[:, known].max() < 0.5 / maps.SHARES + 1e-3


# -- regions ----------------------------------------------------------------------------------


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 30),
    st.lists(st.integers(1, 29), max_size=6),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_regions_are_the_same_however_the_rows_come(seed, height, width, cuts):
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 3, (height, width)).astype(np.uint8)
    chances = rng.random((height, width)).astype(np.float32)
    whole = RegionFront("abc", (0, 1)).push(classes, chances, last=True)
    front, parts = RegionFront("abc", (0, 1)), []
    edges = sorted({0, *(cut for cut in cuts if cut < height), height})
    for top, end in itertools.pairwise(edges):
        parts.append(front.push(classes[top:end], chances[top:end], last=end == height))
    joined = pd.concat([part for part in parts if len(part)] or parts[:1])
    order = ["ymin", "xmin", "ymax", "xmax", "area_px", "label"]
    whole, joined = (df.sort_values(order, ignore_index=True) for df in (whole, joined))
    columns = [name for name in whole if name != "geometry"]
    pd.testing.assert_frame_equal(whole[columns], joined[columns], check_dtype=False, atol=2e-4)
    shapes = joined["geometry"].to_numpy()
    assert shapely.equals(whole["geometry"].to_numpy(), shapes).all()
    assert (shapely.area(shapes) == joined["area_px"]).all()
    assert joined["area_px"].sum() == (classes < 2).sum()


def test_regions_that_would_fill_the_memory_are_cut(monkeypatch):
    monkeypatch.setattr(regions, "MOST_VERTICES", 400)
    rng = np.random.default_rng(0)
    classes = (rng.random((600, 40)) < 0.2).astype(np.uint8)  # one background full of holes
    chances = np.ones(classes.shape, np.float32)
    front, parts, most = RegionFront("ab", (0,), least_area=100), [], 0
    for top in range(0, 600, 20):
        rows = slice(top, top + 20)
        parts.append(front.push(classes[rows], chances[rows], last=top == 580))
        most = max(most, sum(region.vertices for region in front.open.values()))
    assert most <= 400
    found = pd.concat([part for part in parts if len(part)])
    assert found["cut"].any()
    assert len(found) > 10
    shapes = found["geometry"].to_numpy()
    assert (shapely.area(shapes) == found["area_px"]).all()
    whole = RegionFront("ab", (0,), least_area=100).push(classes, chances, last=True)
    assert not whole["cut"].any()
    assert found["area_px"].sum() == whole["area_px"].sum()
    assert shapely.equals(shapely.union_all(shapes), shapely.union_all(whole["geometry"]))


class Leaning(Painter):
    """Finds more water towards the right of what it sees, so that views differ."""

    def forward(self, images):
        logits = super().forward(images)
        logits[:, 2] += torch.linspace(-2, 2, images.shape[-1])
        return logits


def test_a_map_takes_the_views_that_the_model_was_measured_with(tmp_path):
    path = paint(tmp_path / "a.tif", 200, 130)
    model = Leaning()
    plain = predict_map(
        path, tmp_path, model=model, tile_size=64, overlap=0, smooth_prediction=False
    )
    one = read(plain.outputs[0])[0]
    model.conf.views = "all"
    turned = predict_map(
        path,
        tmp_path,
        model=model,
        names=("b.tif",),
        tile_size=64,
        overlap=0,
        smooth_prediction=False,
    )
    several = read(turned.outputs[0])[0]
    assert (one != several).mean() > 0.01
    raster = fileio.read_raster(path)
    expected = maps.classify_window(model, raster, Window(0, 0, 200, 130))
    np.testing.assert_array_equal(several, expected)


def test_polygons_across_tiles_and_strips_are_one(tmp_path):
    path = paint(tmp_path / "a.tif", 300, 900, **UTM)
    result = predict_map(
        path, tmp_path, names=("map.tif", "map.gpkg"), tile_size=64, overlap=8, least_area=20
    )
    truth = unsplit(path)
    classes = truth.argmax(axis=0).astype(np.uint8)
    expected = RegionFront(CLASSES, range(3), 20).push(classes, truth.max(axis=0), last=True)
    found = gpd.read_file(tmp_path / "map.gpkg", layer="map")
    styles = pyogrio.read_dataframe(tmp_path / "map.gpkg", layer="layer_styles")
    for color in maps.name_colors(CLASSES, {}, imutils.class_colors(CLASSES))[1]:  # the map's
        rgb = ",".join(map(str, bytes.fromhex(color[1:])))
        assert rgb in styles["styleQML"].item()
    assert len(found) == len(expected) == result.count
    assert found["label"].value_counts().to_dict() == result.objects
    assert sorted(found["area_px"]) == sorted(expected["area_px"])
    np.testing.assert_allclose(found.area, found["area_px"] * 0.25, rtol=1e-6)
    np.testing.assert_allclose(found["area_m2"], found.area, rtol=2e-3)  # UTM's scale, squared
    assert found["mean_probability"].between(0.3, 1).all()
    assert (expected["ymax"] - expected["ymin"]).max() > 300  # one spans several strips


# -- pictures ---------------------------------------------------------------------------------


def overlays(path, folder, shares, **options):
    """Return the overlays of these opacities, (4, H, W) each, and the map."""
    found = []
    for share in shares:
        predict_map(path, folder, overlay=share, overwrite=True, **options)
        found.append(read(folder / "map_overlay.tif").astype(int))
    return *found, read(folder / "map.tif")[0]


@pytest.mark.parametrize("shape", [(300, 260), (2300, 90)])
def test_an_overlay_is_the_picture_and_the_colours_in_their_shares(tmp_path, shape):
    path = paint(tmp_path / "a.tif", *shape, hole=(30, 20, 90, 60), nodata=0, **UTM)
    aoi = shapely.box(404000, 3285000 - 100, 404000 + 125, 3285000)  # 250 x 200 px
    gpd.GeoSeries([aoi], crs=UTM["crs"]).to_file(tmp_path / "aoi.gpkg")
    options = {"tile_size": 64, "overlap": 16, "aoi": tmp_path / "aoi.gpkg"}
    picture, half, most, full, classes = overlays(path, tmp_path, (0, 0.5, 0.7, 1), **options)
    raw = read(path)[0]
    assert 30 < len(np.unique(raw)) < 256
    for value in np.unique(raw[raw > 0]):  # the same stretch in all strips
        assert len(np.unique(picture[:3, raw == value])) == 1
    shown = picture[0, raw > 0]
    low, high = np.percentile(raw[raw > 0], (1, 99))
    expected = ((raw[raw > 0] - low) / (high - low) * 255).clip(0, 255)
    assert np.abs(shown - expected).max() < 8
    for layer in (picture, half, most, full):
        np.testing.assert_array_equal(layer[3], 255 * (raw > 0))
        assert not layer[:3, raw == 0].any()
    with rasterio.open(tmp_path / "map.tif") as dst:
        table = np.array([dst.colormap(1)[i][:3] for i in range(256)])
    paint_ = table[classes].transpose(2, 0, 1)
    known, unknown = (classes > 0) & (classes < 255), np.isin(classes, (0, 255)) & (raw > 0)
    assert known.any()
    assert (classes == 0).any()
    assert unknown.any()
    for layer, share in ((half, 0.5), (most, 0.7), (full, 1)):
        blend = (1 - share) * picture[:3] + share * paint_
        assert np.abs(layer[:3] - blend)[:, known].max() <= 0.5 + 1e-4
        np.testing.assert_array_equal(layer[:3, unknown], picture[:3, unknown])
    np.testing.assert_array_equal(full[:3, known], paint_[:, known])


def test_beside_a_png_the_overlay_is_one(tmp_path):
    path = paint(tmp_path / "a.tif", 200, 150, hole=(30, 20, 90, 60), nodata=0)
    for name in ("map.png", "other.tif"):
        predict_map(path, tmp_path, names=(name,), overlay=0.5)
    shown = read(tmp_path / "map_overlay.png")
    assert shown.shape == (4, 150, 200)
    np.testing.assert_array_equal(shown, read(tmp_path / "other_overlay.tif"))
    assert {p.name for p in tmp_path.glob("map*")} == {
        "map.png", "map_overlay.png", "map.png.provenance.json",
    }  # fmt: skip


def test_rasters_of_a_command_do_not_write_over_each_other(tmp_path):
    rasters = [paint(tmp_path / f"{name}.tif", 100, 90) for name in ("a", "a_overlay", "b")]
    out = tmp_path / "out"
    out.mkdir()
    for options, names in (({"overlay": 0.5}, "{raster}.png"), ({}, "same.tif")):
        with pytest.raises(InputError, match=r"(a_overlay\.png|same\.tif) would be written more"):
            predict.prepare_all(Painter(), rasters, [out / names], **(OPTIONS | options))
    tasks = predict.prepare_all(Painter(), rasters, [out / "{raster}.png"], **OPTIONS)
    assert [task.outputs[0].name for task in tasks] == ["a.png", "a_overlay.png", "b.png"]
    assert not list(out.iterdir())


def test_a_background_of_another_name_is_left_as_it_is(tmp_path):
    path = paint(tmp_path / "a.tif", 200, 150)
    (tmp_path / "colors.csv").write_text("0,Hintergrund,#FF0000\n")
    picture, full, classes = overlays(path, tmp_path, (0, 1), colormap=tmp_path / "colors.csv")
    assert (classes == 0).any()
    np.testing.assert_array_equal(full[:3, classes == 0], picture[:3, classes == 0])


def test_an_overlay_lies_on_the_raster_and_shows_its_first_three_bands(tmp_path):
    rng = np.random.default_rng(0)
    pixels = (10 ** rng.uniform(-3, 4, (5, 90, 120))).astype("float32")
    path = tmp_path / "a.tif"
    profile = {"width": 120, "height": 90, "count": 5, "dtype": "float32"}
    with fileio.create_raster(path, **profile, **UTM) as dst:
        dst.write(pixels)
    model = Painter()
    model.forward = lambda images: Painter.forward(model, images[:, :1])
    radiometry = Radiometry("log", *((v,) * 5 for v in (0.0, 1e4, 0.0, 1.0)))
    model.contract = replace(
        model.contract, bands=(1, 2, 3, 4, 5), band_count=5, dtype="float32", radiometry=radiometry
    )
    predict_map(path, tmp_path, model=model, overlay=0)
    with rasterio.open(tmp_path / "map_overlay.tif") as dst, rasterio.open(path) as src:
        assert (dst.crs, dst.transform, dst.shape) == (src.crs, src.transform, src.shape)
        assert [c.name for c in dst.colorinterp] == ["red", "green", "blue", "alpha"]
        shown = dst.read(out_dtype=int)
    logs = radiometry.stretch(pixels)[:3]
    for band, values in zip(shown[:3], logs, strict=True):
        order = np.argsort(values.ravel())
        assert (np.diff(band.ravel()[order]) >= 0).all()
        low, high = np.percentile(values, (1, 99))  # of the logarithms, as the model sees them
        assert np.abs(band - ((values - low) / (high - low) * 255).clip(0, 255)).max() < 8
    assert (shown[3] == 255).all()


@pytest.mark.parametrize("size", [(300, 260), (2600, 70)])
def test_a_png_holds_the_class_ids_of_the_map(tmp_path, size):
    path = paint(tmp_path / "a.tif", *size, hole=(30, 20, 90, 60), nodata=0, **UTM)
    for name in ("map.tif", "mask.png"):
        result = predict_map(path, tmp_path, names=(name,), tile_size=64, overlap=16)
        assert result.outputs == (tmp_path / name,)
    with PIL.Image.open(tmp_path / "mask.png") as picture:
        assert picture.mode == "L"
        found = np.asarray(picture)
    expected = read(tmp_path / "map.tif")[0]
    np.testing.assert_array_equal(found, expected)
    assert set(np.unique(found)) == {0, 1, 2, 255}
    names = {"a.tif", "map.tif", "map.tif.provenance.json", "mask.png", "mask.png.provenance.json"}
    assert {p.name for p in tmp_path.iterdir()} == names  # no draft, no metadata
    figure = implot.plot_class_map(fileio.read_raster(path), tmp_path / "mask.png", labels=CLASSES)
    assert figure.legends[0].get_texts()[1].get_text().startswith("land (")


def test_a_png_that_no_reader_takes_is_refused(tmp_path, scenes, monkeypatch):
    monkeypatch.setattr(fileio, "PNG_SIDE", 100)
    with pytest.raises(InputError, match=r"a PNG is at most 100 px .* name a \.tif"):
        predict_map(scenes[1], tmp_path, names=("mask.png",))
    assert not list(tmp_path.iterdir())


# -- misfits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_threshold": 0.5}, "score_threshold: the checkpoint is for segmentation"),
        ({"scales": (2.0,), "density_cell": 9}, "scales, density_cell: the checkpoint is for seg"),
        ({"names": ("map.gpkg",)}, r"map\.gpkg must end in one of .*\.tif.*the class map"),
        ({"names": ("map.tif", "map.csv")}, r"map\.csv must end in one of .*\.gpkg"),
        ({"overlap": 64, "tile_size": 64}, "overlap must be less than the tiles' 64 px"),
        ({"uncertainty": True, "smooth_prediction": False}, "leave one of the two out"),
        ({"override": ()}, "the median of band 1 is"),
    ],
)
def test_misfits_are_refused_before_any_work(tmp_path, scenes, options, message):
    with pytest.raises(InputError, match=message):
        predict_map(scenes[0], tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_raster_of_other_bands_is_refused(tmp_path):
    path = paint(tmp_path / "a.tif", 80, 80)
    model = Painter()
    model.contract = replace(model.contract, bands=(1, 2), band_count=2)
    with pytest.raises(InputError, match="cannot give the bands that the model reads"):
        predict_map(path, tmp_path, model=model)


def test_a_detector_refuses_the_options_of_maps(tmp_path, scenes):
    from oracle import Oracle

    with pytest.raises(InputError, match="probabilities: the checkpoint is for detection"):
        predict_map(scenes[0], tmp_path, model=Oracle(), names=("a.csv",), probabilities=True)


def test_a_model_whose_output_does_not_fit_its_labels_is_refused(tmp_path, scenes):
    model = Painter()
    model.labels = (*CLASSES, "more")
    with pytest.raises(InputError, match=r"returned an array of shape \(2, 3, 64, 64\)"):
        predict_map(scenes[1], tmp_path, model=model)
    assert not [p for p in (tmp_path / "map.tif.journal").iterdir() if p.suffix in (".tif", ".npz")]


def test_a_contract_needs_no_anchors():
    contract = contract_of()
    values = {
        n: v for n, v in vars(contract).items() if n not in ("anchors", "detections_per_tile")
    }
    assert type(contract)(**values).anchors is None


# -- colours ----------------------------------------------------------------------------------


def test_a_colormap_names_and_paints_classes(tmp_path, scenes):
    (tmp_path / "colors.csv").write_text(
        "Input value,Class name,Html color\n1,vegetation,#00680d\n2,hydro,#b2e0e6\n"
    )
    predict_map(scenes[0], tmp_path, colormap=tmp_path / "colors.csv")
    with rasterio.open(tmp_path / "map.tif") as dst:
        assert dst.tags(1)["class_1"] == "vegetation"
        assert dst.tags(1)["class_0"] == "background"
        assert dst.colormap(1)[2] == (0xB2, 0xE0, 0xE6, 255)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,a,#000000\n2,b\n", r"line 2: expected 3 columns .* got 2"),
        ("1,a,#000000\n1,b,#111111\n", "line 2: the value 1 was given before"),
        (
            "value,name,color\n1,a,red\n",
            "line 2: the colour must be of the form #RRGGBB, got 'red'",
        ),
        ("255,a,#000000\n", "line 1: the value must be a whole number from 0 to 254, got '255'"),
        ("1, ,#000000\n", "line 1: the name is empty"),
        ("value,name,color\n", "names no class"),
    ],
)
def test_errors_of_a_colormap_name_the_line(tmp_path, text, message):
    path = tmp_path / "colors.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        fileio.read_colormap(path)


@pytest.mark.parametrize(
    ("colormap", "message"),
    [
        ({3: ("a", "#000000")}, "has a class 3"),
        ({1: ("water", "#000000")}, "names class 1 'water', but that is the model's class 2"),
        ({1: ("a", "#000000"), 0: ("a", "#000000")}, "two classes one name"),
    ],
)
def test_a_colormap_of_other_classes_is_refused(colormap, message):
    with pytest.raises(InputError, match=message):
        maps.name_colors(CLASSES, colormap, ("#000000",) * 3)


def test_the_picture_of_a_map_has_its_classes_shares_and_colours(tmp_path):
    path = paint(tmp_path / "a.tif", 1500, 900, hole=(0, 0, 300, 300), nodata=0)
    predict_map(path, tmp_path)
    figure = implot.plot_class_map(fileio.read_raster(path), tmp_path / "map.tif")
    figure.canvas.draw()
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    found = read(tmp_path / "map.tif")[0]
    share = (found == 1).sum() / (found < 255).sum()
    assert [text.split(" (")[0] for text in texts] == [*CLASSES, "no class"]
    assert float(texts[1].split("(")[1].rstrip("%)")) == pytest.approx(100 * share, abs=0.5)
    shown = figure.axes[1].images[-1].get_array()
    assert {tuple(color) for color in shown.reshape(-1, 4).tolist()} == {
        (200, 200, 200, 255), (230, 159, 0, 255), (86, 180, 233, 255), (0, 0, 0, 0),
    }  # fmt: skip
    assert [image.get_alpha() for image in figure.axes[2].images][1] == 0.5


def test_a_map_of_another_raster_is_not_drawn(tmp_path, scenes):
    predict_map(scenes[0], tmp_path)
    with pytest.raises(InputError, match="101 x 67 px of uint8, but a class map of"):
        implot.plot_class_map(fileio.read_raster(scenes[1]), tmp_path / "map.tif")


def test_an_array_of_classes_is_drawn_with_the_colours_given(scenes):
    classes = unsplit(scenes[0]).argmax(axis=0).astype(np.uint8)
    colormap = {0: ("none", "#FFFFFF"), 1: ("grass", "#00FF00"), 2: ("sea", "#0000FF")}
    figure = implot.plot_class_map(fileio.read_raster(scenes[0]), classes, colormap=colormap)
    assert figure.legends[0].get_texts()[1].get_text().startswith("grass (")
    assert tuple(figure.axes[1].images[-1].get_array()[classes == 2][0]) == (0, 0, 255, 255)


# -- what is stopped goes on ------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path[:0] = [{project!r}, {project!r} + "/tests"]
import predict
import regions
from painter import Painter
from test_maps import OPTIONS, names
model = Painter(stop_after={stop}, stop=lambda: os.kill(os.getpid(), signal.SIGKILL))
predict.predict_raster(model, {raster!r}, names({folder!r}), **OPTIONS, **{options!r})
"""


def names(folder):
    return [f"{folder}/map.tif", f"{folder}/map.gpkg"]


def test_what_is_killed_goes_on_and_ends_the_same(tmp_path):
    raster = paint(tmp_path / "a.tif", 500, 900, **UTM)
    options = {"tile_size": 64, "overlap": 12, "probabilities": True, "overlay": 0.5}
    for folder in ("once", "killed"):
        (tmp_path / folder).mkdir()
    predict.predict_raster(Painter(), raster, names(tmp_path / "once"), **OPTIONS, **options)
    killed = tmp_path / "killed"
    for stop in (60, 60):
        script = KILLED.format(
            project=str(PROJECT), stop=stop, raster=str(raster), folder=str(killed),
            options=options,
        )  # fmt: skip
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        ended = subprocess.run([sys.executable, "-c", script], timeout=120, env=environment)
        assert ended.returncode == -9
        assert sorted(p.name for p in killed.iterdir() if p.name[0] != ".") == ["map.tif.journal"]
    done = len(list((killed / "map.tif.journal").glob("*.npz")))
    assert done >= 2
    model = Painter()
    result = predict.predict_raster(model, raster, names(killed), **OPTIONS, **options)
    assert model.tiles < result.predicted
    for name in ("map.tif", "map_probabilities.tif", "map_overlay.tif"):
        assert (killed / name).read_bytes() == (tmp_path / "once" / name).read_bytes(), name
    kept = sorted(p.name for p in killed.iterdir())
    assert kept == sorted(p.name for p in (tmp_path / "once").iterdir())
    frames = [gpd.read_file(tmp_path / folder / "map.gpkg") for folder in ("once", "killed")]
    pd.testing.assert_frame_equal(*frames)


def test_several_processes_make_the_same_map(tmp_path):
    raster = paint(tmp_path / "a.tif", 500, 600)
    options = {"tile_size": 64, "overlap": 20, "probabilities": True, "overlay": 0.5}
    for folder, workers in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        predict_map(raster, tmp_path / folder, workers=workers, **options)
    for name in ("map.tif", "map_probabilities.tif", "map_overlay.tif"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_stopped_map_leaves_no_half_strip_and_refuses_another_call(tmp_path):
    raster = paint(tmp_path / "a.tif", 500, 900)
    options = {"tile_size": 64, "overlap": 12}
    with pytest.raises(KeyboardInterrupt) as caught:
        predict_map(raster, tmp_path, model=Painter(stop_after=150), **options)
    assert any("the same call goes on" in note for note in caught.value.__notes__)
    journal = tmp_path / "map.tif.journal"
    left = {path.name.split(".")[0] for path in journal.glob("strip_*")}
    assert left == {path.name.split(".")[0] for path in journal.glob("*.npz")} != set()
    assert not [
        path for path in journal.iterdir() if path.name.startswith(".") and "-" in path.name
    ]
    with pytest.raises(InputError, match=r"differs in .*overlap \(12, now 16\)"):
        predict_map(raster, tmp_path, tile_size=64, overlap=16)
    assert predict_map(raster, tmp_path, **options).complete
    assert not journal.exists()
    with pytest.raises(InputError, match="already there"):
        predict_map(raster, tmp_path, **options)
    assert predict_map(raster, tmp_path, resume=True, **options).predicted > 0


# -- memory -----------------------------------------------------------------------------------


def test_memory_follows_the_tiles_never_the_raster(tmp_path):
    sizes = []
    for side in (2048, 65536):
        path = tmp_path / f"{side}.tif"
        with fileio.create_raster(
            path, width=side, height=side, count=1, dtype="uint8", sparse_ok=True
        ):
            pass
        task = predict.prepare(Painter(), path, tmp_path / f"{side}_map.tif", **OPTIONS)
        task.predictor.journal.mkdir()
        collector = task.predictor._collector(1)
        collector._open()
        cells = [writer.cells.nbytes for writer in collector.writers if writer is not None]
        sizes.append(collector.sums.nbytes + sum(cells))
        collector.drop()
        assert not list(task.predictor.journal.glob("*.tif"))
    assert sizes[1] == sizes[0] < 10e6


def test_checkpoints_of_unknown_tasks_are_refused(tmp_path):
    torch.save({"hyper_parameters": {"task": "dance"}, "state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="its task is 'dance'"):
        strips.load_model(tmp_path / "a.ckpt")


# -- errors -----------------------------------------------------------------------------------


def ground_with_errors():
    """Background 0, a pond (1) of which half is missed, a field (2) taken for a pond, a ghost."""
    truth, found = np.zeros((40, 60), np.uint8), np.zeros((40, 60), np.uint8)
    truth[5:15, 5:15], found[5:15, 5:10] = 1, 1  # 100 px, the right half is missed
    truth[20:30, 30:40], found[20:30, 30:40] = 2, 1  # 100 px, all of it confused
    found[33:37, 2:7] = 2  # 20 px of nothing
    truth[:, 50:], found[0:4, 52:56] = 255, 1  # does not count
    return truth, found


def test_errors_are_connected_regions_whose_areas_add_up():
    truth, found = ground_with_errors()
    errors = regions.find_errors(truth, found, ["background", "pond", "field"], 0, (100, 200))
    shown = errors[["kind", "label", "true_label", "area_px", "share_wrong"]]
    assert shown.to_numpy().tolist() == [
        ["missed", "pond", "pond", 50, 0.5],
        ["spurious", "field", "background", 20, 1.0],
        ["confused", "pond", "field", 100, 1.0],
    ]
    assert errors["area_px"].sum() == ((truth != found) & (truth != 255)).sum()
    boxes = errors[["xmin", "ymin", "xmax", "ymax"]].to_numpy().tolist()
    assert boxes == [[110, 205, 115, 215], [102, 233, 107, 237], [130, 220, 140, 230]]
    np.testing.assert_array_equal([g.area for g in errors["geometry"]], errors["area_px"])
    places = shapely.points(errors["pixel_x"], errors["pixel_y"])
    assert shapely.contains(errors["geometry"].to_numpy(), places).all()
    table = regions.count_errors(errors)
    assert table.loc["confused"].to_dict() == {"field": 0, "pond": 100, "(all)": 100,
                                               "(regions)": 1}  # fmt: skip
    assert table["(all)"].tolist() == [50, 20, 100]


def test_ground_without_background_or_errors_has_only_what_it_has():
    truth, found = ground_with_errors()
    errors = regions.find_errors(truth, found, ["a", "b", "c"], None)
    assert set(errors["kind"]) == {"confused"}
    none = regions.find_errors(truth, truth, ["a", "b", "c"], 0)
    assert none.empty
    assert regions.count_errors(none)["(regions)"].tolist() == [0, 0, 0]


def test_regions_that_are_wrong_are_polygons_on_the_map_and_pictures(tmp_path):
    """As many px as rows and columns say, in map units where the raster has a CRS."""
    truth, found = ground_with_errors()
    path = tmp_path / "r.tif"
    with fileio.create_raster(path, width=60, height=40, count=1, dtype="uint8", **UTM) as dst:
        dst.write(truth[None])
    raster = fileio.read_raster(path)
    errors = regions.find_errors(truth, found, ["background", "pond", "field"], 0)
    errors = maps._measure_ground(errors, raster).assign(raster="r", block=3)
    (written,) = atlas.write_atlas(errors, {"r": raster}, tmp_path / "errors")
    layers = gpd.list_layers(written)["name"].tolist()
    assert set(layers) >= {"missed", "spurious", "confused"}
    confused = gpd.read_file(written, layer="confused")
    assert confused.geometry.area.item() == pytest.approx(100 * 0.25)
    assert confused["area_m2"].item() == pytest.approx(25, rel=0.01)
    assert confused.geometry.bounds.iloc[0].tolist() == [404015, 3284985, 404020, 3284990]
    plain = replace(raster, crs=None)
    (table,) = atlas.write_atlas(errors, {"r": plain}, tmp_path / "plain")
    assert pd.read_csv(table)["area_px"].tolist() == [50, 20, 100]
    figure = implot.plot_errors(errors, {"r": raster})
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles == [
        "missed pond\n50 px, 50% of its region", "spurious field\n20 px, 100% of its region",
        "confused pond, is field\n100 px, 100% of its region",
    ]  # fmt: skip
