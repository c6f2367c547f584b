"""Whole rasters: which ones fit a model; each object once; what is stopped goes on."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pyogrio
import pytest
import pytorch_lightning as pl
import rasterio
import shapely
import torch
from conftest import PROJECT
from oracle import LARGEST, Oracle, assert_same, draw, in_order
from test_LargeRasterOR import contract_of, small_conf

import fileio
import LargeRasterOR
import predict
import strips
import tiling
from ImageData import BOX_COLUMNS, InputError, Window
from imutils import Radiometry
from metrics import UNMATCHED, match_boxes

UTM = {"crs": "EPSG:32617", "transform": (0.1, 0, 404000, 0, -0.1, 3285000)}


def write(path, *, count=3, dtype="uint16", mean=1000, spread=200, scale=1.0, **profile):
    rng = np.random.default_rng(0)
    pixels = rng.normal(mean, spread, (count, 200, 200)).clip(1, 60000).astype(dtype)
    a, b, c, d, e, f = UTM["transform"]
    transform = rasterio.Affine(a * scale, b, c, d, e * scale, f)
    layout = {"width": 200, "height": 200, "count": count, "dtype": dtype}
    with fileio.create_raster(path, **layout, **(UTM | {"transform": transform} | profile)) as dst:
        dst.write(pixels)
    return path


@pytest.fixture
def contract():
    radiometry = Radiometry("percentile", (500.0,) * 2, (1500.0,) * 2, (0.5,) * 2, (0.2,) * 2)
    return replace(
        contract_of(bands=2), bands=(3, 1), band_count=3, dtype="uint16", radiometry=radiometry,
        resolution=0.1,
    )  # fmt: skip


def test_a_raster_like_those_of_the_training_opens_with_its_bands(tmp_path, contract):
    raster = predict.open_raster(write(tmp_path / "a.tif"), contract)
    assert raster.bands == (3, 1)


@pytest.mark.parametrize(
    ("options", "message", "check"),
    [
        ({"count": 4}, "it has 4 bands, training had 3", "bands"),
        ({"dtype": "float32"}, "its pixels are float32, training had uint16", "dtype"),
        (
            {"scale": 1.5},
            r"are 0\.15 m wide, in training they were 0\.1 m",
            "resolution",
        ),
        ({"scale": 0.5}, r"its pixels are 0\.05001 m wide", "resolution"),
        ({"mean": 40}, r"the median of band \d is .*standard deviations from", "radiometry"),
    ],
)
def test_what_breaks_the_contract_is_refused_unless_overridden(
    tmp_path, contract, options, message, check
):
    path = write(tmp_path / "a.tif", **options)
    with pytest.raises(InputError, match=message) as caught:
        predict.open_raster(path, contract)
    assert f"['{check}']" in str(caught.value)
    assert predict.open_raster(path, contract, override=[check]).width == 200


def test_everything_that_differs_is_named_at_once(tmp_path, contract):
    path = write(tmp_path / "a.tif", count=4, dtype="float32", mean=30000, scale=3)
    with pytest.raises(InputError) as caught:
        predict.open_raster(path, contract)
    assert "['bands', 'dtype', 'radiometry', 'resolution']" in str(caught.value)


def test_the_resolution_tolerance_is_a_setting(tmp_path, contract):
    path = write(tmp_path / "a.tif", scale=1.5)
    for tolerance in (0.6, None):
        assert predict.open_raster(path, contract, resolution_tolerance=tolerance)


def test_a_raster_of_another_resolution_is_resampled_on_request(tmp_path, contract):
    path = write(tmp_path / "a.tif", scale=0.5)
    raster = predict.open_raster(path, contract, resample=True, override=["radiometry"])
    assert raster.resolution == pytest.approx(contract.resolution, rel=1e-6)
    assert raster.original.path == path
    assert predict.options_of({"resample": True}).resample


def test_a_training_of_several_sizes_fits_rasters_between_them(tmp_path, contract):
    mixed = replace(contract, resolution_range=(0.1, 0.3))
    for scale in (0.9, 2, 3.5):
        path = write(tmp_path / f"a{scale}.tif", scale=scale)
        assert predict.open_raster(path, mixed).resolution == pytest.approx(0.1 * scale, rel=1e-3)
    with pytest.raises(InputError, match=r"in training they were 0\.1 to 0\.3 m .*--resample"):
        predict.open_raster(write(tmp_path / "b.tif", scale=4), mixed)


def test_a_training_of_several_choices_of_bands_asks_for_one(tmp_path, contract):
    path, mixed = write(tmp_path / "a.tif"), replace(contract, mixed_bands=True)
    with pytest.raises(InputError, match=r"say which of .*a\.tif are its 2 bands.*--bands"):
        predict.open_raster(path, mixed)
    assert predict.open_raster(path, mixed, bands=(2, 1)).bands == (2, 1)
    four = write(tmp_path / "b.tif", count=4)
    assert predict.open_raster(four, mixed, bands=(4, 1)).bands == (4, 1)
    with pytest.raises(InputError, match=r"reads 2 bands, got bands \[1\]"):
        predict.open_raster(path, contract, bands=[1])
    assert predict.options_of({"bands": [2, 1]}).bands == (2, 1)


def test_bands_that_are_not_there_cannot_be_overridden(tmp_path, contract):
    path = write(tmp_path / "a.tif", count=2)
    with pytest.raises(InputError, match=r"cannot give the bands .*bands 1 to 2, got \[3\]"):
        predict.open_raster(path, contract, override=predict.CHECKS)
    with pytest.raises(InputError, match=r"override names \['band'\], which are no checks"):
        predict.open_raster(path, contract, override=["band"])


def test_a_raster_without_crs_is_compared_in_all_but_resolution(tmp_path, contract, caplog):
    path = write(tmp_path / "a.tif", crs=None, transform=None)
    assert predict.open_raster(path, contract)
    assert "resolutions cannot be compared" in caplog.text


# -- each object once -------------------------------------------------------------------------

OPTIONS = {"device": "cpu", "precision": "32-true", "override": ("radiometry",)}


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("scene") / "scene.tif"
    return path, draw(path, 900, 1500)


def catalogue_of(model, path, folder, name="out.csv", read=True, **options):
    result = predict.predict_raster(model, path, folder / name, **(OPTIONS | options))
    return pd.read_csv(folder / name) if read else None, result


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 7, "readers": 5},
        {"tile_size": 96, "overlap": 30},
        {"tile_size": 333},
        {"tile_size": 200, "overlap": 60},
        {"tile_size": 2000},  # larger than the raster
        {"views": "all"},
        {"workers": 2, "batch_size": 3},
    ],
    ids=str,
)
def test_every_object_is_found_once_however_the_raster_is_cut(tmp_path, scene, options):
    path, truth = scene
    df, result = catalogue_of(Oracle(), path, tmp_path, **options)
    assert_same(df, truth)
    assert result.complete
    assert sum(result.objects.values()) == len(truth)


@pytest.mark.parametrize(("left", "top"), [(1, 0), (37, 64), (51, 93)])
def test_the_phase_of_the_tiles_does_not_matter(tmp_path, left, top):
    truth = draw(tmp_path / "a.tif", 500, 700)
    draw(tmp_path / "b.tif", 500, 700, left=left, top=top)
    df, _ = catalogue_of(Oracle(), tmp_path / "b.tif", tmp_path)
    assert_same(df, truth, shift=(left, top))


def test_a_dask_cluster_gives_the_same_catalogue(tmp_path, scene, cluster):
    path, truth = scene
    df, _ = catalogue_of(Oracle(), path, tmp_path, scheduler=cluster)
    assert_same(df, truth)
    catalogue_of(Oracle(), path, tmp_path, "plain.csv")
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "plain.csv").read_bytes()


@pytest.mark.parametrize("scale", [0.5, 1, 2])
@pytest.mark.parametrize("view", LargeRasterOR.VIEWS["all"])
def test_every_view_of_a_tile_shows_objects_where_they_are(view, scale):
    tile = torch.zeros(1, 1, 64, 64)
    tile[..., 12:24, 30:50] = 1.0
    oracle = Oracle(offset=(6.0, -8.0))
    (found,), most = LargeRasterOR.detect_views(oracle, tile, [view], (scale,))
    assert most == [1]
    assert found.boxes == pytest.approx(np.array([[36, 4, 56, 16]]), abs=2.01)  # a blurred edge


def test_fused_views_see_the_same_objects(tmp_path):
    truth = draw(tmp_path / "a.tif", 300, 200)
    large = (truth[["xmax", "ymax"]].to_numpy() - truth[["xmin", "ymin"]].to_numpy()).min(1) > 8
    df, _ = catalogue_of(Oracle(), tmp_path / "a.tif", tmp_path, scales=(1, 2), views="flips")
    matches = match_boxes(
        df[BOX_COLUMNS].to_numpy(),
        df["score"].to_numpy(),
        truth[large][BOX_COLUMNS].to_numpy(),
        0.5,
    )
    assert len(set(matches) - {UNMATCHED}) > 0.9 * large.sum()  # enlarging joins close neighbours


def test_a_model_predicts_with_the_views_that_it_was_measured_with(tmp_path, scene, caplog):
    path, _ = scene
    looked = {}
    for measured, views in (("none", None), ("flips", None), ("flips", "none")):
        model = Oracle()
        model.conf.views = measured
        catalogue_of(model, path, tmp_path, f"{measured}_{views}.csv", views=views)
        looked[measured, views] = model.tiles
    once = looked["none", None]
    assert looked == {("none", None): once, ("flips", None): 4 * once, ("flips", "none"): once}
    assert caplog.text.count("was chosen with views 'flips', and those of 'none'") == 1


# -- which ground -----------------------------------------------------------------------------


def test_nothing_is_predicted_outside_the_area_of_interest(tmp_path, scene):
    path, truth = scene
    aoi = pd.DataFrame([[200, 300, 420, 700, "here"]], columns=[*"abcd", "label"])
    aoi.columns = ["xmin", "ymin", "xmax", "ymax", "label"]
    fileio.write_annotations(tmp_path / "aoi.gpkg", aoi, fileio.read_raster(path))
    model = Oracle()
    df, result = catalogue_of(model, path, tmp_path, aoi=tmp_path / "aoi.gpkg")
    center = truth[["xmin", "ymin"]].to_numpy() / 2 + truth[["xmax", "ymax"]].to_numpy() / 2
    inside = ((center > [200, 300]) & (center < [420, 700])).all(axis=1)
    assert_same(df, truth[inside])
    grid = tiling.window_grid(Window(0, 0, 900, 1500), 128, LARGEST)
    touched = grid["x"].between(200 - 127, 419) & grid["y"].between(300 - 127, 699)
    assert model.tiles == result.predicted == touched.sum()
    assert result.predicted + result.empty == len(grid)


def test_empty_ground_is_not_shown_to_the_model(tmp_path):
    truth = draw(tmp_path / "a.tif", 300, 300, left=700, top=900, nodata=0, sparse_ok=True)
    model = Oracle()
    df, result = catalogue_of(model, tmp_path / "a.tif", tmp_path)
    assert_same(df, truth, shift=(0, 0))
    assert model.tiles < 0.2 * (result.predicted + result.empty)


def test_millions_of_empty_tiles_cost_little(tmp_path):
    path, side = tmp_path / "vast.tif", 200_000
    with fileio.create_raster(
        path, width=side, height=side, count=1, dtype="uint8", sparse_ok=True, bigtiff="yes",
        blockxsize=1024, blockysize=1024,
    ) as dst:  # fmt: skip
        dst.write(
            np.full((1, 20, 20), 200, np.uint8), window=((150_000, 150_020), (90_000, 90_020))
        )
    started = time.monotonic()
    df, result = catalogue_of(Oracle(), path, tmp_path, tile_size=1024)
    assert (time.monotonic() - started) / result.empty < 0.001  # s
    assert result.empty > 39_000
    assert df[["xmin", "ymin"]].to_numpy().tolist() == [[90_000, 150_000]]


# -- what goes wrong --------------------------------------------------------------------------


def damage(path, column, row):
    """Overwrite a block of a compressed raster."""
    with rasterio.open(path) as src:
        offset = int(src.get_tag_item(f"BLOCK_OFFSET_{column}_{row}", "TIFF", bidx=1))
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 40)


def test_what_cannot_be_read_is_a_gap_that_the_same_call_tries_again(tmp_path, scene, caplog):
    path, truth = tmp_path / "scene.tif", scene[1]
    path.write_bytes(scene[0].read_bytes())
    damage(path, 1, 2)
    df, result = catalogue_of(Oracle(), path, tmp_path)
    assert not result.complete
    assert "gaps; the last: " in caplog.text
    record = json.loads(result.provenance.read_text())
    assert not record["complete"]
    assert record["gaps"] == result.gaps.to_numpy().tolist()
    low = result.gaps[["x", "y"]].to_numpy()
    high = low + result.gaps[["width", "height"]].to_numpy()
    center = truth[["xmin", "ymin"]].to_numpy() / 2 + truth[["xmax", "ymax"]].to_numpy() / 2
    lost = ((center[:, None] >= low) & (center[:, None] < high)).all(axis=2).any(axis=1)
    found = in_order(df).merge(truth, on=["xmin", "ymin", "xmax", "ymax"])
    assert len(found) == len(df)
    assert (~lost).sum() <= len(df) < len(truth)

    model = Oracle()
    catalogue_of(model, path, tmp_path)
    assert 0 < model.tiles < result.predicted  # only strips with gaps are tried again
    path.write_bytes(scene[0].read_bytes())  # mended: another file, the work begins anew
    with pytest.raises(InputError, match="unfinished prediction that differs in raster"):
        catalogue_of(Oracle(), path, tmp_path)
    df, result = catalogue_of(Oracle(), path, tmp_path, overwrite=True)
    assert_same(df, truth)
    assert not (tmp_path / "out.csv.journal").exists()


def test_an_output_that_exists_is_replaced_or_kept_only_on_request(tmp_path, scene):
    path, truth = scene
    catalogue_of(Oracle(), path, tmp_path)
    before = (tmp_path / "out.csv").stat().st_mtime_ns
    with pytest.raises(InputError, match=r"already there: .*out\.csv.*overwrite.*resume"):
        catalogue_of(Oracle(), path, tmp_path)
    model = Oracle()
    _, result = catalogue_of(model, path, tmp_path, resume=True)
    assert (model.tiles, sum(result.objects.values())) == (0, len(truth))
    assert (tmp_path / "out.csv").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="made otherwise"):
        catalogue_of(Oracle(), path, tmp_path, resume=True, tile_size=200)
    _, result = catalogue_of(Oracle(), path, tmp_path, overwrite=True, tile_size=200)
    record = json.loads(result.provenance.read_text())
    assert record["plan"]["tile_size"] == 200
    assert record["plan"]["raster"] == fileio.content_fingerprint(path)
    assert record["objects"] == result.objects


def test_what_was_written_otherwise_is_not_taken_for_it(tmp_path, scene):
    path, truth = scene
    catalogue_of(Oracle(), path, tmp_path, "s.gpkg", score_threshold=0.9, read=False)
    catalogue_of(Oracle(), path, tmp_path, "s.csv", score_threshold=0.3)  # its record is its own
    both = {"resume": True, "overwrite": True, "read": False}
    _, result = catalogue_of(Oracle(), path, tmp_path, "s.gpkg", score_threshold=0.3, **both)
    assert result.count == (truth["score"] >= 0.3).sum()
    assert len(pyogrio.read_dataframe(tmp_path / "s.gpkg", layer="s")) == result.count
    options = both | {"geometry": "circle", "density_cell": 50}
    catalogue_of(Oracle(), path, tmp_path, "s.gpkg", score_threshold=0.3, **options)
    shapes = pyogrio.read_dataframe(tmp_path / "s.gpkg", layer="s").geometry
    assert shapely.get_num_coordinates(shapes.to_numpy()).min() > 30
    assert (tmp_path / "s_density.tif").exists()


def test_no_file_is_replaced_that_the_call_did_not_make(tmp_path, scene):
    path = tmp_path / "scene.tif"
    path.write_bytes(scene[0].read_bytes())
    for names in (["scene.tif"], ["a.csv", "a.csv"], []):
        with pytest.raises(
            InputError, match=r"must end in one of|at least one file, and each once"
        ):
            predict.prepare(Oracle(), path, [tmp_path / name for name in names], **OPTIONS)
    (tmp_path / "b_density.tif").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="written over what is read"):
        catalogue_of(Oracle(), tmp_path / "b_density.tif", tmp_path, "b.csv", density_cell=50)

    with pytest.raises(KeyboardInterrupt):
        catalogue_of(Oracle(stop_after=80), path, tmp_path)
    (tmp_path / "precious.csv").write_text("mine")
    outputs = [tmp_path / name for name in ("out.csv", "precious.csv")]
    with pytest.raises(InputError, match=r"already there: .*precious\.csv"):
        predict.prepare(Oracle(), path, outputs, **OPTIONS)

    first, second = (predict.prepare(Oracle(), path, tmp_path / "c.csv", **OPTIONS) for _ in "12")
    predict.run(first)
    with pytest.raises(InputError, match=r"already there: .*c\.csv"):
        predict.run(second)  # hours may lie between plan and run


def test_a_raster_that_is_mostly_empty_is_compared_where_it_is_not(tmp_path, caplog):
    draw(tmp_path / "a.tif", 400, 400, left=9000, top=9000, nodata=0, sparse_ok=True)
    options, model = OPTIONS | {"override": ()}, Oracle()
    dark = Radiometry("none", (0.0,), (255.0,), (0.02,), (0.05,))
    model.contract = replace(model.contract, radiometry=dark)
    with pytest.raises(InputError, match="standard deviations from the mean"):
        predict.prepare(model, tmp_path / "a.tif", tmp_path / "o.csv", **options)
    with fileio.create_raster(
        tmp_path / "b.tif", width=900, height=900, count=1, dtype="uint8", nodata=0, sparse_ok=True
    ):
        pass
    predict.prepare(model, tmp_path / "b.tif", tmp_path / "o.csv", **options)
    assert "typical values were not compared" in caplog.text


def test_a_small_overlap_is_warned_of(tmp_path, scene, caplog):
    predict.prepare(Oracle(), scene[0], tmp_path / "o.csv", overlap=5, **OPTIONS)
    assert "objects of the training are up to 24 px long" in caplog.text


def test_tiles_that_report_all_they_may_are_told(tmp_path, scene, caplog, monkeypatch):
    monkeypatch.setattr(Oracle, "limit_detections", lambda *_: 10)
    catalogue_of(Oracle(), scene[0], tmp_path)
    assert "tiles show as many objects as the model reports" in caplog.text


def test_an_interrupted_call_says_how_it_goes_on_and_does(tmp_path, scene):
    path, truth = scene
    with pytest.raises(KeyboardInterrupt) as caught:
        catalogue_of(Oracle(stop_after=80), path, tmp_path)
    journal = tmp_path / "out.csv.journal"
    assert f"kept in {journal}" in caught.value.__notes__[0]
    assert [p.name for p in tmp_path.iterdir()] == [journal.name]
    with pytest.raises(InputError, match=r"unfinished .* differs in tile_size"):
        catalogue_of(Oracle(), path, tmp_path, tile_size=100)
    model = Oracle()
    df, _ = catalogue_of(model, path, tmp_path)
    assert_same(df, truth)
    assert 0 < model.tiles < 72
    assert not journal.exists()


def test_a_damaged_part_of_the_journal_is_made_anew(tmp_path, scene):
    path, truth = scene
    with pytest.raises(KeyboardInterrupt):
        catalogue_of(Oracle(stop_after=80), path, tmp_path)
    (part,) = (tmp_path / "out.csv.journal").glob("strip_*.npz")
    part.write_bytes(part.read_bytes()[:100])
    df, _ = catalogue_of(Oracle(), path, tmp_path)
    assert_same(df, truth)


def test_two_processes_cannot_write_the_same_catalogue(tmp_path, scene):
    with (
        fileio.exclusive(tmp_path / "out.csv.journal"),
        pytest.raises(InputError, match="in use by another process"),
    ):
        catalogue_of(Oracle(), scene[0], tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile_size": 20}, "tile_size: .*greater than or equal to 32"),
        ({"overlap": 128}, "overlap must be less than the tiles' 128 px, got 128"),
        ({"device": "cuda:9"}, "device 'cuda:9' is not there, expected one of .*, or auto"),
        ({"geometry": "star"}, "geometry: Input should be 'box' or 'circle'"),
        ({"colour": "red"}, "colour: Unexpected keyword argument"),
        ({"aoi": "nowhere.gpkg"}, "nowhere.gpkg"),
        ({"name": "out.docx"}, r"out\.docx must end in one of"),
    ],
)
def test_bad_options_are_refused_before_any_work(tmp_path, scene, options, message):
    model = Oracle()
    with pytest.raises(InputError, match=message):
        catalogue_of(model, scene[0], tmp_path, **options)
    assert model.tiles == 0
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_threshold_asks_for_one(tmp_path, scene):
    model = Oracle()
    model.operating_threshold.fill_(float("nan"))
    with pytest.raises(InputError, match=r"give one \(--score-threshold\)"):
        catalogue_of(model, scene[0], tmp_path)


def test_pixels_in_a_catalogue_of_a_resampled_raster_are_the_files(tmp_path):
    truth = draw(tmp_path / "a.tif", 600, 400, **UTM)
    oracle = Oracle()
    oracle.contract = replace(oracle.contract, resolution=0.2)
    task = predict.prepare(
        oracle, tmp_path / "a.tif", tmp_path / "b.csv", resample=True, device="cpu",
        precision="32-true", override=("radiometry",),
    )  # fmt: skip
    assert task.predictor.raster.width == 300
    predict.run(task)
    found = pd.read_csv(tmp_path / "b.csv")[BOX_COLUMNS].to_numpy()
    assert found.max() > 500
    middle = (truth[BOX_COLUMNS[:2]].to_numpy() + truth[BOX_COLUMNS[2:]].to_numpy()) / 2
    nearest = np.abs(middle[:, None] - (found[:, :2] + found[:, 2:]) / 2).max(axis=2).min(axis=0)
    assert (nearest < 1.5).mean() > 0.7  # of the others the blur makes one


def test_options_are_refused_before_there_is_a_model(tmp_path, checkpoint):
    assert predict.options_of({"score_threshold": 0.3}, "detection", checkpoint)
    with pytest.raises(InputError, match="score_threshold: the checkpoint is for segmentation"):
        predict.options_of({"score_threshold": 0.3}, "segmentation")
    with pytest.raises(InputError, match="is a model of detection, but TASK is 'segmentation'"):
        predict.options_of({}, "segmentation", checkpoint)
    with pytest.raises(InputError, match=r"none\.csv"):
        predict.options_of({"colormap": tmp_path / "none.csv"}, "segmentation")


@pytest.mark.parametrize("window", [(0, 0, 900, 700), (333, 210, 250, 190), (840, 500, 60, 200)])
def test_a_window_shows_what_the_catalogue_has_there(tmp_path, window):
    truth = draw(tmp_path / "a.tif", 900, 700)
    raster = fileio.read_raster(tmp_path / "a.tif")
    found = predict.predict_window(Oracle(), raster, Window(*window))
    x, y, width, height = window
    middle_x, middle_y = ((truth[f"{k}min"] + truth[f"{k}max"]) / 2 for k in "xy")
    inside = (x <= middle_x) & (middle_x < x + width) & (y <= middle_y) & (middle_y < y + height)
    assert inside.sum() > 3
    assert_same(found, truth[inside])


# -- the command ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model with random weights; what it finds is arbitrary, but always the same."""
    torch.manual_seed(0)
    contract = contract_of(tile_size=64, evaluation_overlap=20, detections_per_tile=10)
    model = LargeRasterOR.LargeRasterORModel(
        {"a", "b"}, small_conf(backbone="mobilenet_v3_large"), contract
    )
    model.operating_threshold.fill_(0.0101)
    path = tmp_path_factory.mktemp("model") / "best.ckpt"
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path, weights_only=True)
    return path


@pytest.fixture(scope="module")
def small_scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("scene") / "small.tif"
    draw(path, 300, 900)
    return path


def command(checkpoint, rasters, *outputs, **options):
    words = [*map(str, rasters), "--checkpoint", str(checkpoint), "--output", *map(str, outputs)]
    words += ["--override", "radiometry", "--device", "cpu"]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def test_the_command_predicts_several_rasters_into_files_of_their_own(tmp_path, checkpoint):
    for name in ("one", "two"):
        draw(
            tmp_path / f"{name}.tif", 200, 160, crs="EPSG:32633", transform=rasterio.Affine.scale(2)
        )
    rasters = [tmp_path / "one.tif", tmp_path / "two.tif"]
    words = command(checkpoint, rasters, tmp_path / "{raster}.gpkg", tmp_path / "{raster}.csv")
    words += ["--density-cell", "50", "--geometry", "circle"]
    assert predict.main(words) == 0
    df = pd.read_csv(tmp_path / "two.csv")
    assert len(df) > 10
    table = fileio.read_annotation_file(tmp_path / "two.gpkg", fileio.read_raster(rasters[1]))
    assert len(table.df) == len(df)
    assert table.crs.to_epsg() == 32633
    assert table.df["score"].tolist() == df["score"].tolist()
    assert shapely.area(table.df.geometry.to_numpy()) == pytest.approx(
        np.pi * df["diameter"] ** 2, rel=0.01
    )
    with rasterio.open(tmp_path / "two_density.tif") as src:
        assert src.read(1).sum() == len(df)
    assert predict.main(words) == predict.FAILED
    assert predict.main([*words, "--resume"]) == 0


def test_outputs_of_several_rasters_need_names_of_their_own(tmp_path, checkpoint, capsys):
    words = command(checkpoint, ["a.tif", "b.tif"], tmp_path / "out.gpkg")
    assert predict.main(words) == predict.FAILED
    assert "need {raster} in the name" in capsys.readouterr().err


def test_the_command_says_what_is_no_checkpoint_or_raster(tmp_path, scene, checkpoint, capsys):
    torch.save({"weights": torch.ones(3)}, tmp_path / "other.ckpt")
    (tmp_path / "text.ckpt").write_text("no model")
    cases = {
        (tmp_path / "other.ckpt", scene[0]): "is not a checkpoint of a model trained here",
        (tmp_path / "text.ckpt", scene[0]): "is not a checkpoint of a model trained here",
        (tmp_path / "none.ckpt", scene[0]): "does not exist",
        (checkpoint, tmp_path / "none.tif"): "does not exist",
    }
    for (model, raster), message in cases.items():
        assert predict.main(command(model, [raster], tmp_path / "o.csv")) == predict.FAILED
        assert message in capsys.readouterr().err


def test_the_command_tells_gaps_and_goes_on_with_other_rasters(tmp_path, checkpoint, monkeypatch):
    draw(tmp_path / "bad.tif", 600, 400)
    draw(tmp_path / "good.tif", 200, 100)
    damage(tmp_path / "bad.tif", 1, 0)
    words = command(
        checkpoint, [tmp_path / "bad.tif", tmp_path / "good.tif"], tmp_path / "{raster}.csv"
    )
    assert predict.main(words) == predict.INCOMPLETE
    assert (tmp_path / "good.csv").exists()


def test_a_full_disk_leaves_the_journal(tmp_path, small_scene, checkpoint, monkeypatch, capsys):
    write, failing = strips.Part.write, []

    def fail(part, path):
        if path.name.startswith("strip_000001"):
            failing.append(path.name)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(part, path)

    words = command(checkpoint, [small_scene], tmp_path / "out.csv")
    with monkeypatch.context() as patch:
        patch.setattr(strips.Part, "write", fail)
        assert predict.main(words) == predict.FAILED
    message = capsys.readouterr().err
    assert "cannot be written: its disk is full" in message
    assert "the same call goes on" in message
    journal = tmp_path / "out.csv.journal"
    first = failing[0].replace("000001", "000000")
    assert [p.name for p in journal.glob("*.npz")] == [first]
    assert predict.main(words) == 0


KILLED = """
import os, signal, sys, threading
sys.path.insert(0, {tests!r})
import predict
words = sys.argv[1:]
for delay in {delays}:
    if not (pid := os.fork()):
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        os._exit(predict.main(words))
    os.waitpid(pid, 0)
"""


def test_what_is_killed_goes_on_and_ends_the_same_byte_for_byte(tmp_path, small_scene, checkpoint):
    words = [command(checkpoint, [small_scene], tmp_path / name) for name in ("a.csv", "b.csv")]
    assert predict.main(words[0]) == 0
    delays = np.random.default_rng(int(time.time())).uniform(0.05, 1.5, 3).round(3).tolist()
    script = KILLED.format(tests=str(PROJECT), delays=delays)
    subprocess.run([sys.executable, "-c", script, *words[1]], check=True, timeout=120)
    assert predict.main([*words[1], "--resume"]) == 0
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes(), delays
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.csv", "a.csv.provenance.json", "b.csv", "b.csv.provenance.json",
    ]  # fmt: skip


KILLED_AT = """
import os, pathlib, sys
sys.path.insert(0, {project!r})
import predict

def killer(call, left):
    def wrapped(*args, **options):
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)
        return call(*args, **options)
    return wrapped

def run(step, words, kill):
    if not (pid := os.fork()):  # this process never computes, so that its children can
        left = [step]
        for place, name in ((pathlib.Path, "replace"), (os, "unlink"), (os, "rmdir")) * kill:
            setattr(place, name, killer(getattr(place, name), left))
        os._exit(predict.main(words))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

for step in range(100):
    words = [word.replace("STEP", str(step)) for word in sys.argv[1:]]
    if run(step, words, True) == 0:
        break
    assert run(step, words, False) == 0, step
pathlib.Path({steps!r}).write_text(str(step))
"""


def test_a_kill_before_any_step_on_disk_loses_nothing(tmp_path, checkpoint):
    draw(tmp_path / "a.tif", 200, 700)
    words = command(checkpoint, [tmp_path / "a.tif"], tmp_path / "s_STEP.csv", density_cell=50)
    script = KILLED_AT.format(project=str(PROJECT), steps=str(tmp_path / "steps"))
    subprocess.run([sys.executable, "-c", script, *words], check=True, timeout=200)
    steps = int((tmp_path / "steps").read_text())
    assert steps > 8
    assert len({(tmp_path / f"s_{step}.csv").read_bytes() for step in range(steps + 1)}) == 1
    ends = {".csv", ".csv.provenance.json", "_density.tif"}
    for step in range(steps + 1):
        names = {path.name for path in tmp_path.glob(f"*s_{step}[._]*")}
        assert names == {f"s_{step}{end}" for end in ends}, "no journal, nothing temporary"


def test_ctrl_c_ends_the_command_with_a_hint(tmp_path, small_scene, checkpoint):
    words = command(checkpoint, [small_scene], tmp_path / "out.csv", batch_size=1)
    process = subprocess.Popen(
        [sys.executable, str(PROJECT / "predict.py"), *words], stderr=subprocess.PIPE, text=True
    )
    journal = tmp_path / "out.csv.journal"
    while process.poll() is None and not list(journal.glob("strip_*.npz")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == predict.INTERRUPTED, message
    assert f"kept in {journal}" in message
    assert not (tmp_path / "out.csv").exists()
