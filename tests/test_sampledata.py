"""Tests of the synthetic samples: determinism, windows that join, honest catalogues, their dirt."""

import itertools
import logging
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
from rasterio.features import rasterize
from rasterio.windows import Window as RasterioWindow

import annotations
import fileio
import masks
import sampledata
from ImageData import InputError, Window
from sampledata import DIAMETER_SCALE, Scene

SCENE = Scene(width=700, height=500, seed=5)
WHOLE = Window(0, 0, SCENE.width, SCENE.height)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    return sampledata.generate(directory / "images", directory / "datasets", seed=0)


@pytest.fixture(scope="module", params=[0, 1], ids=["sample_1", "sample_2"])
def sample(request, samples):
    """A raster's handle, its table, and of the table the rows that are good, in px."""
    image_path, csv_path = samples[request.param]
    raster, df = fileio.read_raster(image_path), fileio.read_table(csv_path)
    numbers = df[["pixel_x", "pixel_y", "diameter"]].apply(pd.to_numeric, errors="coerce")
    numbers = numbers.rename(columns={"pixel_x": "x", "pixel_y": "y"}).assign(label=df["label"])
    numbers["radius"] = numbers.pop("diameter") * DIAMETER_SCALE / 2
    sized = numbers.dropna()
    sized = sized[sized["radius"].gt(0) & sized["radius"].lt(100)]
    edge = np.minimum.reduce(
        [sized["x"], sized["y"], raster.width - sized["x"], raster.height - sized["y"]]
    )
    inside = edge >= sized["radius"] - 0.02
    good = sized[inside & sized["label"].isin(["crater", "boulder", "cone"])]
    return raster, df, good, sized[~inside]


def _read(raster):
    return raster.read(Window(0, 0, raster.width, raster.height))[0].astype(float)


def _make(directory, **changes):
    settings = {"width": 300, "height": 260, "seed": 1} | changes
    paths = directory / "a.tif", directory / "a.csv"
    sampledata.make_sample(*paths, **settings)
    return [path.read_bytes() for path in paths]


def test_same_seed_gives_identical_files_and_another_seed_others(tmp_path):
    first, again = _make(tmp_path / "first"), _make(tmp_path / "again")
    other = _make(tmp_path / "other", seed=2)
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]


@pytest.mark.parametrize(
    "window",
    [Window(0, 0, 1, 1), Window(699, 499, 1, 1), Window(37, 91, 211, 53), Window(480, 0, 220, 500)],
)
def test_pixels_do_not_depend_on_the_window(window):
    whole = sampledata.render(SCENE, WHOLE)
    x, y, width, height = window
    part = sampledata.render(SCENE, window)
    assert part.shape == (1, height, width)
    np.testing.assert_array_equal(part, whole[:, y : y + height, x : x + width])


def test_small_windows_join_to_the_whole_without_a_seam():
    whole, joined = sampledata.render(SCENE, WHOLE), np.zeros((1, 500, 700), dtype=np.uint8)
    for y, x in itertools.product(range(0, 500, 50), range(0, 700, 70)):
        joined[:, y : y + 50, x : x + 70] = sampledata.render(SCENE, Window(x, y, 70, 50))
    np.testing.assert_array_equal(joined, whole)


def test_raster_is_tiled_uint8_on_a_projected_map(samples):
    sizes = [(2048, 1536), (1536, 1536), (2048, 2048)]
    for (image_path, _), size in zip(samples, sizes, strict=True):
        with rasterio.open(image_path) as src:
            assert (src.width, src.height) == size
            assert src.block_shapes == [(256, 256)]
            assert src.dtypes == ("uint8",)
            assert src.compression.name == "zstd"
            assert src.crs.is_projected
            assert src.res == (0.5, 0.5)
            assert src.read(1).min() >= 1


def test_three_bands_are_tinted_copies(tmp_path):
    _make(tmp_path, bands=3)
    image = fileio.read_raster(tmp_path / "a.tif").read(Window(0, 0, 300, 260)).astype(float)
    assert image.shape == (3, 260, 300)
    red, green, blue = image.mean(axis=(1, 2))
    assert red > green + 3 > blue + 6
    assert np.corrcoef(image.reshape(3, -1)).min() > 0.9


def test_every_kind_of_dirt_occurs(sample):
    raster, df, _, cut = sample
    csv_path = raster.path.parents[1] / "datasets" / f"{raster.path.stem}.csv"
    as_text = pd.read_csv(csv_path, dtype=str, keep_default_na=False)["diameter"]
    diameter = pd.to_numeric(df["diameter"], errors="coerce")
    assert {"unknown", "n/a", ""} <= set(as_text)
    assert diameter.eq(0).sum() == 2
    assert diameter.lt(0).sum() >= 2
    assert diameter.ge(400).sum() >= 2
    assert pd.to_numeric(df["pixel_x"], errors="coerce").isna().sum() == 1
    assert df["label"].isin(["dune?", "ridge?"]).sum() == 2
    assert 1 <= len(cut) <= 12


def test_dirt_is_two_to_three_percent_of_rows(sample):
    _, df, good, _ = sample
    assert 0.02 <= 1 - len(good) / len(df) <= 0.03


def test_classes_and_sizes_have_the_promised_shares(sample):
    raster, _, good, _ = sample
    shares = good["label"].value_counts(normalize=True)
    assert 0.60 <= shares["crater"] <= 0.65
    assert 0.32 <= shares["boulder"] <= 0.36
    assert 0.02 <= shares["cone"] <= 0.04
    assert 220 <= len(good) / (raster.width * raster.height / 1e6) <= 280
    diameter = 2 * good["radius"]
    assert diameter.between(10, 70.01).all()
    assert diameter.median() < 20 < 45 < diameter.max()  # many small, few large


def test_every_rendered_object_is_in_the_catalogue():
    objects = sampledata.find_objects(SCENE, WHOLE)
    df = sampledata.make_catalogue(SCENE)
    listed = set(zip(df["pixel_x"], df["pixel_y"], df["label"], strict=True))
    rendered = set(zip(objects["x"].round(2), objects["y"].round(2), objects["label"], strict=True))
    assert len(rendered) == len(objects) > 50
    assert rendered <= listed


def test_objects_do_not_overlap(sample):
    good = sample[2]
    gap = np.hypot(*(good[[c]].to_numpy() - good[c].to_numpy() for c in "xy"))
    gap -= good[["radius"]].to_numpy() + good["radius"].to_numpy()
    assert gap[np.triu_indices(len(good), 1)].min() > 0


def test_doubted_labels_double_a_good_row(sample):
    _, df, _, _ = sample
    columns = ["pixel_x", "pixel_y", "diameter"]
    doubted = df[df["label"].isin(["dune?", "ridge?"])]
    assert (df.merge(doubted[columns], on=columns)["label"].value_counts() <= 2).all()
    assert len(df.merge(doubted[columns], on=columns)) == 2 * len(doubted)


def test_rows_without_a_size_lie_on_empty_ground(sample):
    _, df, good, cut = sample
    objects = pd.concat([good, cut])
    unsized = df[pd.to_numeric(df["diameter"], errors="coerce").le(0)]
    x, y = (unsized[c].astype(float).to_numpy()[:, None] for c in ("pixel_x", "pixel_y"))
    gap = np.hypot(x - objects["x"].to_numpy(), y - objects["y"].to_numpy())
    assert (gap - objects["radius"].to_numpy()).min() > 10


def test_boxes_hold_more_contrast_than_the_ground(sample):
    raster, _, good, _ = sample
    image = _read(raster)

    def contrast(x, y, radius):
        rows, cols = (slice(int(max(c - radius, 0)), int(c + radius)) for c in (y, x))
        return image[rows, cols].std()

    inside = np.array([contrast(*row) for row in good[["x", "y", "radius"]].to_numpy()])
    x, y = np.random.default_rng(0).uniform(20, 1500, (2, 400))
    away = np.hypot(x[:, None] - good["x"].to_numpy(), y[:, None] - good["y"].to_numpy())
    empty = (away > 2.5 * good["radius"].to_numpy() + 10).all(axis=1)
    ground = np.array([contrast(*place, 8) for place in zip(x[empty], y[empty], strict=True)])
    assert empty.sum() >= 30
    for label, least in [("crater", 0.98), ("boulder", 0.95), ("cone", 1.0)]:
        assert (inside[good["label"] == label] > 1.5 * np.median(ground)).mean() >= least


def test_outlines_sit_where_brightness_steps(sample):
    raster, _, good, _ = sample
    image = _read(raster)
    for label, sign in [("crater", -1), ("boulder", 1), ("cone", 1)]:  # on the sun's side
        rows = good[(good["label"] == label) & good["radius"].ge(6)]
        scales = np.arange(0.6, 1.5, 0.02)
        sun_x, sun_y = sampledata.SUN_XY
        x, y = (rows[[c]].to_numpy() for c in "xy")
        reach = rows[["radius"]].to_numpy() * scales
        cols = np.floor(x + reach * sun_x).astype(int).clip(0, raster.width - 1)
        lines = np.floor(y + reach * sun_y).astype(int).clip(0, raster.height - 1)
        profile = sign * image[lines, cols].mean(axis=0)
        steepest = scales[2:-2][np.argmin(profile[4:] - profile[:-4])]
        assert steepest == pytest.approx(1.0, abs=0.07)


def test_existing_samples_stay_unless_forced(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sampledata, "SAMPLES", {"small": (128, 96)})
    arguments = ["--output", str(tmp_path)]
    sampledata.main(arguments)
    image_path, csv_path = tmp_path / "images/small.tif", tmp_path / "datasets/small.csv"
    before = image_path.read_bytes(), csv_path.read_bytes()

    with caplog.at_level(logging.INFO, logger="sampledata"):
        sampledata.main([*arguments, "--seed", "3"])
    assert (image_path.read_bytes(), csv_path.read_bytes()) == before
    assert "exist and stay" in caplog.text

    sampledata.main([*arguments, "--seed", "3", "--force"])
    assert image_path.read_bytes() != before[0]
    assert csv_path.read_bytes() != before[1]


def test_sample_without_its_catalogue_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sampledata, "SAMPLES", {"small": (128, 96)})
    [(_, csv_path)] = sampledata.generate(tmp_path, tmp_path)
    before = csv_path.read_bytes()
    csv_path.unlink()
    sampledata.generate(tmp_path, tmp_path)
    assert csv_path.read_bytes() == before


def test_memory_does_not_grow_with_the_raster(tmp_path):
    def peak(height):
        tracemalloc.start()
        _make(tmp_path, width=512, height=height)
        _, size = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return size

    assert peak(3072) < 1.2 * peak(1024)


@pytest.mark.parametrize(
    "wrong", [{"width": 0}, {"seed": -1}, {"density": 0}, {"density": 1e4}, {"bands": 2}]
)
def test_numbers_out_of_range_are_refused(tmp_path, wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        _make(tmp_path, **wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("density", [25.0, 100.0, 400.0])
def test_density_sets_the_number_of_objects(density):
    scene = Scene(width=1024, height=1024, seed=1, density=density)
    found = len(sampledata.find_objects(scene, Window(0, 0, 1024, 1024)))
    assert found / 1.024**2 == pytest.approx(density, rel=0.35)


@pytest.fixture(scope="module")
def land_cover(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cover")
    paths = folder / "a.tif", folder / "a.gpkg"
    return *paths, sampledata.make_land_cover(*paths, width=900, height=700, seed=3)


def test_land_cover_shows_what_its_polygons_say(land_cover):
    image, vector, df = land_cover
    read = annotations.read_annotations(vector, fileio.read_raster(image))
    assert read.df["label"].tolist() == df["label"].tolist()
    assert set(df["label"]) == set(sampledata.COVERS) - {"grass"}
    with rasterio.open(image) as src:
        infrared = src.read(4)
    kinds = list(sampledata.COVERS)
    truth = rasterize(
        zip(df["geometry"], df["label"].map(kinds.index), strict=True), infrared.shape
    )
    for kind, levels in sampledata.COVERS.items():
        shown = infrared[truth == kinds.index(kind)]
        assert shown.size > 500
        assert abs(np.median(shown) - levels[3]) < 12


def test_land_cover_is_the_same_in_every_window_and_again(land_cover, tmp_path):
    image, _, df = land_cover
    with rasterio.open(image) as src:
        window = Window(301, 203, 257, 199)
        touching = df[
            shapely.intersects(df["geometry"].to_numpy(), shapely.box(301, 203, 558, 402))
        ]
        part = sampledata._render_cover(touching, window, 3, 4)
        assert (src.read(window=RasterioWindow(*window)) == part).all()
        again = tmp_path / "b.tif"
        sampledata.make_land_cover(again, tmp_path / "b.gpkg", width=900, height=700, seed=3)
        with rasterio.open(again) as other:
            assert (src.read() == other.read()).all()


@pytest.fixture(scope="module")
def skies(tmp_path_factory):
    """Two small skies, their masks and polygons."""
    folder = tmp_path_factory.mktemp("sky")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampledata, "SKY_SAMPLES", {"sky_1": (700, 560), "sky_2": (600, 512)})
        sampledata.generate_sky(folder, folder)
        before = (folder / "sky.json").stat().st_mtime_ns
        sampledata.generate_sky(folder, folder)
        assert (folder / "sky.json").stat().st_mtime_ns == before
    return folder


@pytest.mark.parametrize("name", ["sky_1", "sky_2"])
@pytest.mark.parametrize(
    ("attribute", "classes"),
    [("label", {"sky": "sky", "object": "background"}), ("label", {"sky": 1, "object": 0}),
     ("category_id", {1: 1, 2: 0})],
)  # fmt: skip
def test_polygons_of_a_sky_are_its_mask_in_every_window(skies, name, attribute, classes):
    raster = fileio.read_raster(skies / f"{name}.tif")
    labels = masks.read_labels(skies / "sky.json", raster, attribute=attribute, classes=classes)
    assert labels.classes.names[0] == "background"
    assert len(labels.classes.names) == 2
    truth = fileio.read_raster(skies / f"{name}_mask.tif")
    for window in (Window(0, 0, raster.width, raster.height), Window(131, 77, 257, 301)):
        np.testing.assert_array_equal(labels.read(window), truth.read(window)[0])


def test_a_sky_is_float_radiance_with_a_sun_and_dark_shapes_before_it(skies):
    with rasterio.open(skies / "sky_1.tif") as src, rasterio.open(skies / "sky_1_mask.tif") as mask:
        assert src.block_shapes == [(256, 256)] * 3
        assert set(src.dtypes) == {"float32"}
        image, is_sky = src.read(), mask.read(1).astype(bool)
    assert np.isfinite(image).all()
    assert image.min() > 0
    assert 5_000 < image.max() <= sampledata.SUN_RADIANCE
    assert 0.25 < is_sky.mean() < 0.5
    assert is_sky[:100].all()
    assert not is_sky[-150:].any()
    thin = is_sky[1:-1, :-2] & ~is_sky[1:-1, 1:-1] & is_sky[1:-1, 2:]  # poles and twigs of 1 px
    assert thin.sum() > 20
    assert image[2][~is_sky].max() < 0.01 * image.max()
    assert np.median(image[2][is_sky]) > 2 * np.median(image[2][~is_sky])


def test_a_sky_is_the_same_again_and_another_with_another_seed(tmp_path):
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        paths = tmp_path / f"{name}.tif", tmp_path / f"{name}_mask.tif"
        sampledata.make_sky(*paths, width=300, height=256, seed=seed)
        files.append([path.read_bytes() for path in paths])
    assert files[0] == files[1]
    assert files[0][0] != files[2][0]
    assert files[0][1] != files[2][1]


def test_a_sky_takes_the_memory_of_a_block(tmp_path):
    def peak(**size):
        tracemalloc.start()
        sampledata.make_sky(tmp_path / "a.tif", tmp_path / "m.tif", seed=0, **size)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(width=512, height=2048) < 1.3 * peak(width=512, height=512)


def test_coarser_land_cover_is_the_mean_of_the_finer(tmp_path):
    shapes = []
    for coarser, side in ((1, 512), (2, 256)):
        paths = tmp_path / f"{coarser}.tif", tmp_path / f"{coarser}.gpkg"
        shapes.append(
            sampledata.make_land_cover(*paths, width=side, height=side, seed=3, coarser=coarser)
        )
    with rasterio.open(tmp_path / "1.tif") as fine, rasterio.open(tmp_path / "2.tif") as coarse:
        mean = fine.read().reshape(4, 256, 2, 256, 2).mean(axis=(2, 4))
        assert (coarse.read() == np.rint(mean)).all()
        assert coarse.bounds == fine.bounds
        assert coarse.res == (2 * sampledata.PIXEL_SIZE,) * 2
    for fine, coarse in zip(*(df["geometry"] for df in shapes), strict=True):
        assert shapely.area(fine) == pytest.approx(4 * shapely.area(coarse))
