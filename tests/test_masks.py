"""Masks: any window of them is what the whole would be; classes, bad input, auxiliary bands."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import rasterio
import rasterio.features
import shapely
from conftest import REAL_DATA
from hypothesis import given, settings
from hypothesis import strategies as st

import fileio
import masks
import tiling
from ImageData import InputError, Window
from ModelConfig import AuxiliaryOptions

UTM = "EPSG:32633"
TRANSFORM = rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 4_000_000)  # 0.5 m
WIDTH, HEIGHT = 90, 70


def make_raster(folder, name="r", nodata=None, crs=UTM, pixels=None, transform=TRANSFORM):
    if pixels is None:
        pixels = np.full((1, HEIGHT, WIDTH), 7, np.uint8)
    place = {} if crs is None else {"crs": crs, "transform": transform}
    with fileio.create_raster(
        folder / f"{name}.tif", width=pixels.shape[2], height=pixels.shape[1],
        count=len(pixels), dtype=pixels.dtype, nodata=nodata, **place,
    ) as dst:  # fmt: skip
        dst.write(pixels)
    return fileio.read_raster(folder / f"{name}.tif")


def write_shapes(path, shapes, raster, crs=UTM, **columns):
    on_map = [shapely.transform(shape, raster.to_map) for shape in shapes]
    series = gpd.GeoSeries(on_map, crs=UTM)
    if crs is not None and crs != UTM:
        series = series.to_crs(crs)
    gpd.GeoDataFrame(columns, geometry=list(series), crs=crs).to_file(path)
    return path


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A raster, and a writer of labels for it."""
    folder = tmp_path_factory.mktemp("ground")
    raster = make_raster(folder)

    def label(shapes, values, **options):
        path = folder / f"labels_{len(list(folder.iterdir()))}.gpkg"
        write_shapes(path, shapes, raster, kind=values)
        return masks.read_labels(path, raster, attribute="kind", **options)

    return raster, label


def cut(whole, window, outside=masks.IGNORE):
    """Cut a window out of a mask of the whole raster."""
    margin = 2 * max(window.width, window.height, 100)
    padded = np.pad(whole, margin, constant_values=outside)
    return padded[
        window.y + margin : window.y + margin + window.height,
        window.x + margin : window.x + margin + window.width,
    ]


@st.composite
def stars(draw, most=12):
    """A polygon around a point, of whole and half pixels as often as not."""
    count = draw(st.integers(3, most))
    x, y = draw(st.integers(-20, 110)), draw(st.integers(-20, 90))
    seed, step = draw(st.integers(0, 2**31)), draw(st.sampled_from([0.5, 1.0, 0.001]))
    rng = np.random.default_rng(seed)
    angles, radius = np.sort(rng.uniform(0, 2 * np.pi, count)), rng.uniform(2, 80, count)
    corners = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1)
    shape = shapely.make_valid(shapely.Polygon(np.round(corners / step) * step))
    parts = [p for p in shapely.get_parts(shape) if p.geom_type == "Polygon" and p.area > 0]
    return max(parts, key=shapely.area) if parts else shapely.box(x, y, x + 3, y + 2)


windows = st.builds(
    Window, st.integers(-15, 88), st.integers(-15, 68), st.integers(1, 60), st.integers(1, 60)
)


@settings(deadline=None, max_examples=60)
@given(st.lists(stars(), min_size=1, max_size=6), windows, st.booleans())
def test_any_window_is_what_the_whole_raster_has_there(ground, shapes, window, reference):
    raster, _ = ground
    labels = in_memory(raster, shapes, [str(i % 3) for i in range(len(shapes))], reference)
    fill = masks.IGNORE if reference or labels.classes.background is None else 0
    whole = rasterio.features.rasterize(
        [(s, int(i)) for s, i in zip(labels.df["geometry"], labels._ids, strict=True)],
        (HEIGHT, WIDTH), fill=fill, dtype="uint8",
    )  # fmt: skip
    np.testing.assert_array_equal(labels.read(window), cut(whole, window))


def in_memory(raster, shapes, values, reference=False, classes=None):
    df = pd.DataFrame({"label": values, "geometry": pd.Series(list(shapes), dtype=object)})
    counts = df["label"].value_counts(sort=False).to_dict()
    nothing = masks.ClassTable(("x",), {})
    labels = masks.PolygonLabels(
        raster.path, raster, nothing, reference, counts, df, "kind", df.iloc[:0]
    )
    table = masks.make_table(counts, classes, background=labels.uncovered)
    return labels.with_classes(table)


@settings(deadline=None, max_examples=40)
@given(stars(most=400), windows)
def test_vertices_beyond_a_window_do_not_matter_to_it(shape, window):
    place = rasterio.Affine.translation(window.x, window.y)
    size = (window.height, window.width)
    hole = shapely.box(20, 20, 40, 35)
    for polygon in (shape, shape.difference(hole), shape.union(shapely.box(200, 0, 210, 9))):
        if polygon.geom_type not in ("Polygon", "MultiPolygon") or polygon.is_empty:
            continue
        expected = rasterio.features.rasterize([polygon], size, transform=place)
        less = masks.shorten(polygon, window)
        if less is None:
            assert not expected.any()
            continue
        assert shapely.get_num_coordinates(less) <= shapely.get_num_coordinates(polygon)
        np.testing.assert_array_equal(
            rasterio.features.rasterize([less], size, transform=place), expected
        )


def test_a_coast_of_a_million_vertices_is_read_by_what_is_near():
    angle = np.linspace(0, 2 * np.pi, 1_000_000, endpoint=False)
    radius = 5000 + 30 * np.sin(angle * 5000)
    coast = shapely.Polygon(np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1))
    window = Window(4950, -50, 100, 100)
    less = masks.shorten(coast, window)
    assert shapely.get_num_coordinates(less) < 40_000
    options = {"out_shape": (100, 100), "transform": rasterio.Affine.translation(4950, -50)}
    expected = rasterio.features.rasterize([coast], **options)
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(rasterio.features.rasterize([less], **options), expected)


@pytest.mark.skipif(not REAL_DATA.exists(), reason="the real rasters are not on this machine")
@pytest.mark.parametrize("side", [500, 128, 97])
def test_real_land_cover_is_its_published_mask_window_by_window(side):
    folder = REAL_DATA / "landcover"
    raster = fileio.read_raster(folder / "tiff_3channel_uint8.tif")
    labels = masks.read_labels(folder / "tiff_3channel_uint8.geojson", raster, attribute="label")
    assert labels.classes.names == ("background", "1", "2", "3")
    published = np.asarray(PIL.Image.open(folder / "mask_tiff_3channel_uint8.png"))
    for y in range(0, raster.height, side):
        for x in range(0, raster.width, side):
            window = Window(x, y, side, side)
            np.testing.assert_array_equal(labels.read(window), cut(published, window))
    drawn = masks.read_labels(folder / "mask_tiff_3channel_uint8.png", raster)
    window = Window(100, 200, 300, 300)
    np.testing.assert_array_equal(drawn.read(window), published[200:500, 100:400])


def test_later_polygons_lie_on_top_and_labels_travel(ground):
    _, label = ground
    shapes = [shapely.box(10, 10, 50, 50), shapely.box(30, 30, 70, 60)]
    labels = label(shapes, ["forest", "water"])
    assert labels.classes == masks.ClassTable(
        ("background", "forest", "water"), {"forest": 1, "water": 2}
    )
    window = Window(-5, 20, 100, 30)
    mask = labels.read(window)
    assert mask.dtype == np.uint8
    assert [mask[0, 0], mask[0, 6], mask[0, 20], mask[15, 40]] == [masks.IGNORE, 0, 1, 2]
    copy = pickle.loads(pickle.dumps(labels))
    np.testing.assert_array_equal(copy.read(window), mask)
    assert copy.made_from == labels.made_from
    assert label(shapes[::-1], ["forest", "water"]).made_from != labels.made_from
    assert set(labels.df) >= {"pixel_x", "diameter", "label", "xmin", "ymax", "geometry"}


def test_ground_without_a_label_may_be_unknown(ground):
    _, label = ground
    labels = label([shapely.box(0, 0, 40, 70)], ["forest"], mask_reference=True)
    assert labels.classes.names == ("forest",)
    assert set(np.unique(labels.read(Window(0, 0, 90, 70)))) == {0, masks.IGNORE}
    assert (labels.read(Window(40, 0, 50, 70)) == masks.IGNORE).all()


def test_ground_that_polygons_cover_whole_needs_no_background(ground):
    _, label = ground
    halves = [shapely.box(-1, -1, 40, 71), shapely.box(40, -1, 91, 71)]
    assert label(halves, [7, 30]).classes == masks.ClassTable(("7", "30"), {"7": 0, "30": 1})


@pytest.mark.parametrize("gap", ["nodata", "ignored", "aoi", "sliver"])
@pytest.mark.parametrize("drawn_as", ["polygons", "mask"])
def test_ground_that_does_not_count_needs_no_background(tmp_path, gap, drawn_as):
    pixels = np.full((1, HEIGHT, WIDTH), 7, np.uint8)
    edge = 89.7 if gap == "sliver" else 60  # no pixel has its centre beyond
    if gap == "nodata":
        pixels[:, :, 60:] = 0
    raster = make_raster(tmp_path, nodata=0 if gap == "nodata" else None, pixels=pixels)
    side = shapely.box(60, 0, 90, 70)
    regions = {
        "ignored": fileio.Regions(ignored=(side,)),
        "aoi": fileio.Regions(aoi=(shapely.box(0, 0, 60, 70),)),
    }
    raster = raster.with_regions(regions.get(gap))
    halves = [shapely.box(-1, -1, 40, 71), shapely.box(40, -1, edge, 71)]
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[:, :40], values[:, 40 : 90 if gap == "sliver" else 60] = 1, 2

    def names(on):
        if drawn_as == "mask":
            return masks.read_labels(drawn(tmp_path, values), on).classes.names
        path = write_shapes(tmp_path / "l.gpkg", halves, raster, kind=[1, 2])
        return masks.read_labels(path, on, attribute="kind").classes.names

    assert names(raster) == ("1", "2")
    if gap in regions:
        assert names(raster.with_regions(None)) == ("background", "1", "2")


def test_polygons_without_a_value_are_unknown_ground(ground, caplog):
    _, label = ground
    labels = label([shapely.box(0, 0, 9, 9), shapely.box(20, 0, 29, 9)], ["a", None])
    assert labels.read(Window(0, 0, 30, 1))[0, [0, 15, 25]].tolist() == [1, 0, masks.IGNORE]
    assert "1 polygons have no kind" in caplog.text


def test_classes_given_the_wrong_way_round_are_told():
    with pytest.raises(InputError, match=r"did you mean \{'1': 'road', '2': 'house'\}\?"):
        masks.make_table(["1", "2"], {"road": 1, "house": 2}, background=True)
    with pytest.raises(InputError, match=r"1 of the values, \['3'\].* \(\['33'\] of CLASSES occur"):
        masks.make_table(["1", "3"], {1: "a", 33: "b"}, background=True)


def test_a_class_that_is_ignored_is_unknown_wherever_labels_are_read(tmp_path):
    raster = make_raster(tmp_path, crs=None)
    path = tmp_path / "m.tif"
    values = np.zeros((raster.height, raster.width), np.uint8)
    values[:, 10:20], values[:, 20:25] = 1, 2
    with fileio.create_raster(
        path, width=raster.width, height=raster.height, count=1, dtype="uint8"
    ) as dst:
        dst.write(values[None])
    window = Window(0, 0, 30, 4)
    (image,), table = masks.label_images([raster], [path], classes=["0", "1", "2"], ignored=0)
    assert table.ignored == 0
    read = image.labels.read(window)
    assert (read[:, :10] == masks.IGNORE).all()
    assert (read[:, 10:20] == 1).all()
    masks.save_labels(tmp_path, {"r": image.labels})
    again = masks.load_labels(tmp_path, {"r": raster})["r"]
    np.testing.assert_array_equal(again.read(window), read)
    (other,), _ = masks.label_images([raster], [path], classes=["0", "1", "2"])
    assert fileio.fingerprint(other.labels.made_from) != fileio.fingerprint(image.labels.made_from)
    with pytest.raises(InputError, match=r"ignore_index must be < 3, the number of classes"):
        masks.label_images([raster], [path], classes=["0", "1", "2"], ignored=3)


def test_missing_pixels_and_ground_that_does_not_count_are_ignored(tmp_path):
    pixels = np.full((1, HEIGHT, WIDTH), 7, np.uint8)
    pixels[:, :, :10] = 0
    regions = fileio.Regions(ignored=(shapely.box(80, 0, 90, 70),))
    raster = make_raster(tmp_path, nodata=0, pixels=pixels).with_regions(regions)
    path = write_shapes(tmp_path / "l.gpkg", [shapely.box(0, 0, 90, 35)], raster, kind=["a"])
    mask = masks.read_labels(path, raster, attribute="kind").read(Window(0, 0, 95, 70))
    assert mask[0, [0, 9, 10, 79, 80, 92]].tolist() == [255, 255, 1, 1, 255, 255]
    assert mask[60, [5, 10]].tolist() == [255, 0]
    counted = np.ones((70, 90), bool)
    known = masks.read_labels(path, raster, attribute="kind").read(Window(0, 0, 90, 70), counted)
    assert masks.IGNORE not in known


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3857"])
@pytest.mark.parametrize("suffix", ["gpkg", "geojson", "shp"])
def test_polygons_of_any_file_and_crs_are_placed(ground, tmp_path, crs, suffix):
    raster, label = ground
    shape = shapely.Polygon([(10.2, 10.3), (60.7, 20.1), (40.4, 55.6)])
    expected = label([shape], [4]).read(Window(0, 0, 90, 70))
    path = write_shapes(tmp_path / f"l.{suffix}", [shape], raster, crs, kind=[4])
    labels = masks.read_labels(path, raster, attribute="kind")
    np.testing.assert_array_equal(labels.read(Window(0, 0, 90, 70)), expected)


def test_broken_polygons_are_repaired_and_points_are_left_out(ground, tmp_path):
    raster, _ = ground
    bow = shapely.Polygon([(10, 10), (30, 30), (30, 10), (10, 30)])
    path = write_shapes(tmp_path / "l.gpkg", [bow, shapely.Point(50, 50)], raster, kind=["a", "a"])
    labels = masks.read_labels(path, raster, attribute="kind")
    assert labels.quarantine["reason"].tolist() == ["no polygon"]
    mask = labels.read(Window(0, 0, 90, 70))
    assert mask[20, [12, 28]].tolist() == [1, 1]
    assert (mask.sum(), mask[50, 50]) == (shapely.make_valid(bow).area, 0)


def test_coco_polygons_are_labels(ground, tmp_path):
    raster, _ = ground
    coco = {
        "images": [{"id": 1, "file_name": "r.tif", "width": WIDTH, "height": HEIGHT}],
        "categories": [{"id": 3, "name": "roof"}, {"id": 5, "name": "road"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 3, "bbox": [5, 5, 10, 10],
             "segmentation": [[5, 5, 15, 5, 15, 15, 5, 15]]},
            {"id": 2, "image_id": 1, "category_id": 5, "bbox": [50, 50, 10, 10]},
            {"id": 3, "image_id": 1, "category_id": 5, "bbox": [20, 5, 10, 10],
             "segmentation": [[20, 5, 30, 5, 30, 15, 20, 15]]},
        ],
    }  # fmt: skip
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(coco))
    labels = masks.read_labels(path, raster)
    mask = labels.read(Window(0, 0, 90, 70))
    assert labels.classes.names == ("background", "road", "roof")
    assert np.bincount(mask.ravel()).tolist() == [6100, 100, 100]
    assert labels.quarantine["reason"].tolist() == ["no polygon"]


def test_rows_of_other_rasters_do_not_count(tmp_path):
    rasters = [make_raster(tmp_path, name) for name in ("a", "b")]
    shapes = [shapely.box(0, 0, 40, 70), shapely.box(40, 0, 60, 70)]
    path = write_shapes(tmp_path / "l.gpkg", shapes, rasters[0], img=["a", "b"], kind=["x", "y"])
    images, table = masks.label_images(rasters, [path, path], attributes="kind", image_column="img")
    seen = [image.labels.read(Window(0, 0, WIDTH, 1))[0, [20, 50]].tolist() for image in images]
    assert seen == [[table.names.index("x"), 0], [0, table.names.index("y")]]


@pytest.mark.parametrize("as_path", [False, True])
def test_vector_files_are_read_at_their_addresses(ground, tmp_path, as_path):
    raster, label = ground
    shape = shapely.box(10, 10, 30, 20)
    expected = label([shape], ["a"]).read(Window(0, 0, 90, 70))
    path = write_shapes(tmp_path / "l.gpkg", [shape], raster, kind=["a"])
    with zipfile.ZipFile(tmp_path / "l.zip", "w") as archive:
        archive.write(path, "in/l.gpkg")
    path.unlink()
    address = f"/vsizip/{tmp_path}/l.zip/in/l.gpkg"
    address = Path(address) if as_path else address
    labels = masks.read_labels(address, raster, attribute="kind")
    np.testing.assert_array_equal(labels.read(Window(0, 0, 90, 70)), expected)
    band = masks.with_auxiliary_bands(raster, AuxiliaryOptions(aux_vector_file=str(address)))
    np.testing.assert_array_equal(band.read(Window(0, 0, 90, 70))[-1], expected)
    with pytest.raises(InputError, match=r"none\.gpkg cannot be read as annotations"):
        masks.read_labels(f"/vsizip/{tmp_path}/l.zip/none.gpkg", raster)
    with pytest.raises(InputError, match="is an address, of which only vector files"):
        masks.read_labels(f"/vsizip/{tmp_path}/l.zip/l.csv", raster)


@pytest.mark.parametrize("last", [0, 1], ids=["object first", "object last"])
@pytest.mark.parametrize(
    ("attribute", "classes"),
    [("label", {"sky": "sky", "bird": "background"}), ("category_id", {1: 1, 2: 0})],
)
def test_a_coco_object_in_the_sky_is_cut_out_of_it_in_any_order(
    ground, tmp_path, last, attribute, classes
):
    raster, _ = ground
    outlines = [(1, [0, 0, 90, 0, 90, 40, 0, 40]), (2, [20, 10, 30, 10, 30, 15, 20, 15])]
    entries = [
        {"id": i, "image_id": 7, "category_id": category, "bbox": [], "segmentation": [outline]}
        for i, (category, outline) in enumerate(outlines if last else outlines[::-1])
    ]
    elsewhere = {"id": 9, "image_id": 8, "category_id": 1, "bbox": [],
                 "segmentation": [[0, 40, 90, 40, 90, 70, 0, 70]]}  # fmt: skip
    names = [(8, "other.tif"), (7, "r.jpg")]  # the annotator was shown a picture of the raster
    coco = {
        "images": [{"id": i, "file_name": f"upload/{name}"} for i, name in names],
        "categories": [{"id": 1, "name": "sky"}, {"id": 2, "name": "bird"}],
        "annotations": [elsewhere, *entries],
    }
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(coco))
    labels = masks.read_labels(path, raster, attribute=attribute, classes=classes)
    assert labels.classes.background == 0
    assert len(labels.classes.names) == 2
    assert len(labels.df) == 2
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[:40], expected[10:15, 20:30] = 1, 0
    np.testing.assert_array_equal(labels.read(Window(0, 0, WIDTH, HEIGHT)), expected)


# -- classes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "background", "names", "values"),
    [
        (None, True, ("background", "2", "10"), {"2": 1, "10": 2}),
        (None, False, ("2", "10"), {"2": 0, "10": 1}),
        ([10, 2, 7], False, ("10", "2", "7"), {"10": 0, "2": 1, "7": 2}),
        ({10: "wood", "2": "wet"}, True, ("background", "wood", "wet"), {"10": 1, "2": 2}),
        ({2: "a", 10: "a"}, False, ("a",), {"2": 0, "10": 0}),
        ({"2": 1, "10": 0}, False, ("10", "2"), {"10": 0, "2": 1}),
        ({"2": 2, "10": 1}, True, ("background", "10", "2"), {"10": 1, "2": 2}),
        ({"2": 2, "10": 1}, False, ("10", "2"), {"10": 0, "2": 1}),
        ({2: 1, 10: 1, 7: 2}, True, ("background", "2+10", "7"), {"2": 1, "10": 1, "7": 2}),
        ({2: 0, 7: 1, 10: 1}, True, ("background", "7+10"), {"2": 0, "7": 1, "10": 1}),
        ({2: 0, 7: 1, 10: 0}, False, ("2+10", "7"), {"2": 0, "10": 0, "7": 1}),
        ({2: "wood", 10: "background"}, True, ("background", "wood"), {"2": 1, "10": 0}),
    ],
)
def test_values_get_their_class_ids(classes, background, names, values):
    table = masks.make_table([10.0, 2, "2"], classes, background=background)
    assert (table.names, dict(table.values)) == (names, values)
    assert table.background == (0 if "background" in names else None)


def test_values_that_no_class_has_are_refused(ground):
    _, label = ground
    with pytest.raises(InputError, match=r"\['lake'\], .*not among CLASSES, \['forest'"):
        label([shapely.box(0, 0, 9, 9)], ["lake"], classes=["forest", "water"])
    with pytest.raises(InputError, match="1 to 254 classes, got 300"):
        masks.make_table(range(300), None, background=False)


@pytest.mark.parametrize("numbers", [(0, 5), (1, 3), (2, 3), (-1, 0)])
def test_class_numbers_with_gaps_are_refused(numbers):
    classes = dict(zip((2, 10), numbers, strict=True))
    with pytest.raises(InputError, match=r"CLASSES must .* 0, 1, 2 and so on, .* got \[-?\d, \d\]"):
        masks.make_table([2, 10], classes, background=True)


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_tables_of_classes_are_saved(tmp_path, suffix):
    table = masks.ClassTable(("background", "wet", "001"), {"7": 1, "8": 1, "001": 2})
    path = table.save(tmp_path / f"classes.{suffix}")
    assert masks.ClassTable.load(path) == table


def test_classes_are_fixed_over_all_rasters(tmp_path, caplog):
    rasters = [make_raster(tmp_path, name) for name in ("one", "two")]
    whole = shapely.box(-1, -1, 100, 100)
    paths = [
        write_shapes(tmp_path / "a.gpkg", [whole], rasters[0], kind=["wood"]),
        write_shapes(tmp_path / "b.gpkg", [shapely.box(5, 5, 9, 9)], rasters[1], sort=["alder"]),
    ]
    with caplog.at_level("INFO"):
        images, table = masks.label_images(rasters, paths, attributes=["kind", "sort"])
    assert table.names == ("background", "alder", "wood")
    assert "class 2 is wood: value 'wood', 1 polygons" in caplog.text
    assert [image.labels.classes for image in images] == [table, table]
    assert (images[0].labels.read(Window(0, 0, 9, 9)) == 2).all()
    assert len(images[1].df) == 1


# -- bad input --------------------------------------------------------------------------------


def test_a_missing_attribute_is_told_with_the_nearest(ground, tmp_path):
    raster, _ = ground
    path = write_shapes(tmp_path / "l.gpkg", [shapely.box(0, 0, 9, 9)], raster, class_id=[1])
    with pytest.raises(InputError, match=r"lacks the columns \['clas_id'\].*mean 'class_id'"):
        masks.read_labels(path, raster, attribute="clas_id")


def test_labels_of_other_places_are_refused(ground, tmp_path):
    raster, _ = ground
    path = write_shapes(tmp_path / "l.gpkg", [shapely.box(900, 0, 909, 9)], raster, kind=[1])
    with pytest.raises(InputError, match=r"no polygon of .*l\.gpkg lies on .*\[900"):
        masks.read_labels(path, raster, attribute="kind")


def test_labels_without_a_crs_are_refused_until_it_is_named(ground, tmp_path):
    raster, _ = ground
    corners = shapely.transform(shapely.box(0, 0, 9, 9), raster.to_map)
    frame = gpd.GeoDataFrame({"kind": [1]}, geometry=[corners])
    frame.to_file(tmp_path / "l.gpkg")
    with pytest.raises(InputError, match="declares no coordinate reference system"):
        masks.read_labels(tmp_path / "l.gpkg", raster, attribute="kind")
    labels = masks.read_labels(tmp_path / "l.gpkg", raster, attribute="kind", coordinates="map")
    assert (labels.read(Window(0, 0, 9, 9)) == 1).all()


def test_files_without_polygons_are_refused(ground, tmp_path):
    raster, _ = ground
    (tmp_path / "l.csv").write_text("pixel_x,pixel_y,diameter,label\n1,1,1,a\n")
    with pytest.raises(InputError, match="holds no polygons"):
        masks.read_labels(tmp_path / "l.csv", raster)


# -- mask rasters -----------------------------------------------------------------------------


def drawn(folder, values, **options):
    return make_raster(folder, "mask", pixels=np.asarray(values)[None], **options).path


def test_a_mask_raster_is_read_by_its_values(ground, tmp_path):
    raster, _ = ground
    values = np.zeros((HEIGHT, WIDTH), np.uint16)
    values[:, 30:] = 300
    values[40:, :] = 20
    labels = masks.read_labels(drawn(tmp_path, values, crs=None), raster)
    assert labels.classes.names == ("background", "20", "300")
    window = Window(20, 30, 80, 50)
    expected = np.select([values == 20, values == 300], [1, 2], 0).astype("uint8")
    np.testing.assert_array_equal(labels.read(window), cut(expected, window))
    assert pickle.loads(pickle.dumps(labels)).made_from == labels.made_from
    reference = masks.read_labels(labels.path, raster, mask_reference=True)
    assert reference.classes.names == ("20", "300")
    assert reference.read(Window(0, 0, 1, 1)) == masks.IGNORE
    named = masks.read_labels(labels.path, raster, classes={0: "sea", 20: "land", 300: "ice"})
    assert named.classes.names == ("sea", "land", "ice")
    assert named.read(Window(0, 0, 1, 1)) == 0


def test_nodata_of_a_mask_is_unknown(ground, tmp_path):
    raster, _ = ground
    values = np.ones((HEIGHT, WIDTH), np.uint8)
    values[:10], values[10:20], values[20:30] = 9, 255, 0
    labels = masks.read_labels(drawn(tmp_path, values, nodata=9), raster)
    assert labels.read(Window(0, 0, 1, HEIGHT))[[5, 15, 25, 35], 0].tolist() == [255, 255, 0, 1]
    assert dict(labels.counts) == {"1": 40 * WIDTH}


def test_255_is_a_class_like_any_other_in_a_mask_of_16_bits(ground, tmp_path):
    raster, _ = ground
    values = np.full((HEIGHT, WIDTH), 254, np.uint16)
    values[:, 40:] = 255
    labels = masks.read_labels(drawn(tmp_path, values), raster)
    assert labels.classes.names == ("254", "255")
    np.testing.assert_array_equal(labels.read(Window(0, 0, WIDTH, HEIGHT)), values - 254)


def test_a_mask_on_the_rasters_grid_lies_where_it_lies(ground, tmp_path):
    raster, _ = ground
    values = np.full((20, 30), 3, np.uint8)
    moved = TRANSFORM @ rasterio.Affine.translation(40, 10)
    labels = masks.read_labels(drawn(tmp_path, values, transform=moved), raster)
    mask = labels.read(Window(0, 0, WIDTH, HEIGHT))
    assert np.unique(mask[10:30, 40:70]).tolist() == [labels.classes.names.index("3")]
    assert (mask == masks.IGNORE).sum() == WIDTH * HEIGHT - 600


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (np.ones((20, 30), np.uint8), {"crs": None}, "30 x 20 px, .* has 90 x 70, and without"),
        (np.ones((20, 30), np.uint8), {"transform": TRANSFORM @ TRANSFORM.scale(2)}, "grid"),
        (
            np.ones((20, 30), np.uint8),
            {"transform": TRANSFORM @ TRANSFORM.translation(500, 0)},
            "lies off",
        ),
        (np.ones((70, 90), np.float32), {}, "one band of whole numbers"),
        (np.zeros((70, 90), np.uint8), {}, "no pixel of the mask"),
        (np.arange(6300, dtype=np.uint16).reshape(70, 90), {}, "more than 254 values"),
    ],
)
def test_masks_that_do_not_fit_are_refused(ground, tmp_path, values, options, message):
    with pytest.raises(InputError, match=message):
        masks.read_labels(drawn(tmp_path, values, **options), ground[0])


# -- auxiliary bands --------------------------------------------------------------------------


SHAPES = [
    shapely.box(20, 20, 35, 30), shapely.LineString([(-300, -40), (60, 65), (200, 66)]),
    shapely.Point(70.2, 10.7),
]  # fmt: skip


def auxiliary(folder, raster, shapes=SHAPES, **options):
    path = write_shapes(folder / "aux.gpkg", shapes, raster, kind=[1, 2, 3][: len(shapes)])
    return masks.with_auxiliary_bands(raster, masks.AuxiliaryOptions(path, **options))


@pytest.fixture(scope="module")
def with_shapes(ground, tmp_path_factory):
    """Rasters with a band of distances, and with a binary one."""
    folders = [tmp_path_factory.mktemp("aux") for _ in range(2)]
    return (
        auxiliary(folders[0], ground[0], aux_vector_dist_maps=True),
        auxiliary(folders[1], ground[0], aux_vector_scale=0.5),
    )


@settings(deadline=None, max_examples=30)
@given(windows)
def test_distances_are_exact_in_every_window(with_shapes, window):
    made, _ = with_shapes
    x, y = np.meshgrid(np.arange(-20, 160) + 0.5, np.arange(-20, 140) + 0.5)
    points = shapely.points(x, y)
    expected = np.min([shapely.distance(points, shape) for shape in made.auxiliary.shapes], axis=0)
    expected = expected[
        window.y + 20 : window.y + 20 + window.height, window.x + 20 : window.x + 20 + window.width
    ]
    np.testing.assert_allclose(made.read(window)[-1], expected, atol=1e-5)
    whole = made.read(Window(-20, -20, 180, 160))[-1]
    np.testing.assert_array_equal(
        made.read(window)[-1],
        whole[
            window.y + 20 : window.y + 20 + window.height,
            window.x + 20 : window.x + 20 + window.width,
        ],
    )


@settings(deadline=None, max_examples=30)
@given(windows)
def test_binary_maps_are_the_same_in_every_window(with_shapes, window):
    _, made = with_shapes
    whole = made.read(Window(0, 0, WIDTH, HEIGHT))[-1]
    padded = np.pad(whole, 100, constant_values=-1)
    part = padded[
        window.y + 100 : window.y + 100 + window.height,
        window.x + 100 : window.x + 100 + window.width,
    ]
    read = made.read(window)[-1]
    np.testing.assert_array_equal(read[part >= 0], part[part >= 0])
    assert set(np.unique(whole)) == {0.0, 0.5}
    assert whole[10, 70] == whole[25, 25] == whole[65, 60] == 0.5


def test_distances_are_scaled_in_metres_and_as_logarithms(ground, tmp_path):
    raster, _ = ground
    px = auxiliary(tmp_path, raster, aux_vector_dist_maps=True).read(Window(0, 0, 40, 40))[-1]
    (folder := tmp_path / "m").mkdir()
    m = auxiliary(
        folder, raster, aux_vector_dist_maps=True, aux_vector_unit="m", aux_vector_scale=2
    ).read(Window(0, 0, 40, 40))[-1]
    np.testing.assert_allclose(m, px * raster.resolution * 2, rtol=1e-3)
    (folder := tmp_path / "aux_vector_dist_log").mkdir()
    log = auxiliary(folder, raster, aux_vector_dist_maps=True, aux_vector_dist_log=True).read(
        Window(0, 0, 40, 40)
    )[-1]
    np.testing.assert_allclose(log, np.log1p(px), rtol=1e-5)


def test_ids_choose_shapes(ground, tmp_path):
    raster, _ = ground
    made = auxiliary(tmp_path, raster, aux_vector_attrib="kind", aux_vector_ids=(1.0,))
    assert made.read(Window(0, 0, WIDTH, HEIGHT))[-1].sum() == 150
    with pytest.raises(InputError, match=r"no shape of .* has kind in \[9\], there are \['1'"):
        auxiliary(tmp_path, raster, aux_vector_attrib="kind", aux_vector_ids=(9,))
    with pytest.raises(InputError, match="did you mean 'kind'"):
        auxiliary(tmp_path, raster, aux_vector_attrib="kin", aux_vector_ids=(1,))


def test_places_of_pixels_run_from_edge_to_edge(ground):
    raster, _ = ground
    made = masks.with_auxiliary_bands(
        raster, masks.AuxiliaryOptions(coordconv_convert=True, coordconv_scale=3)
    )
    x, y = made.read(Window(0, 0, WIDTH, HEIGHT))[1:]
    assert (x[:, 0] == np.float32(3 * (1 / WIDTH - 1))).all()
    assert (y[0] == -y[-1]).all()
    part = made.read(Window(30, 40, 20, 10))[1:]
    np.testing.assert_array_equal(part, np.stack([x, y])[:, 40:50, 30:50])


def test_a_raster_with_auxiliary_bands_is_a_raster(tmp_path):
    pixels = np.full((2, HEIGHT, WIDTH), 7, np.uint16)
    pixels[:, :, :10] = 0
    raster = make_raster(tmp_path, nodata=0, pixels=pixels)
    made = masks.with_auxiliary_bands(raster, masks.AuxiliaryOptions(coordconv_convert=True))
    made = pickle.loads(pickle.dumps(made))
    assert (made.dtype, len(made.bands), made.band_count) == ("float32", 4, 4)
    window = Window(-5, 0, 40, 30)
    image, valid, _ = tiling.read_tile(made, window, 90)
    own, own_valid, _ = tiling.read_tile(raster, window, 90)
    np.testing.assert_array_equal(image[:2], own)
    np.testing.assert_array_equal(valid, own_valid)
    assert (image.dtype, valid.sum()) == (np.float32, 25 * 30)
    made = made.with_regions(fileio.Regions(ignored=(shapely.box(20, 0, 90, 70),)))
    assert tiling.read_tile(made, window, 0)[2].sum() == 10 * 30
    preview, seen = made.preview(30)
    assert (preview.shape[0], seen.mean()) == (4, pytest.approx(8 / 9, abs=0.04))
    assert made.made_from != raster.made_from
    assert made.identifier == "r"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "need an aux_vector_file"),
        ({"aux_vector_file": "a.gpkg", "aux_vector_dist_log": True}, "needs aux_vector_dist_maps"),
        ({"aux_vector_file": "a.gpkg", "aux_vector_ids": (1,)}, "needs aux_vector_attrib"),
        ({"aux_vector_file": "a.gpkg", "aux_vector_unit": "ft"}, "input_value='ft'"),
    ],
)
def test_auxiliary_bands_without_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        masks.AuxiliaryOptions(**options)


@pytest.mark.parametrize(
    ("values", "count", "names", "ids"),
    [
        (["1", "2", "4"], 5, ["background", "1", "2", "3", "4"], {"1": 1, "4": 4}),
        (["1", "5"], 5, ["background", "1", "2", "3", "4", "5"], {"5": 5}),
        (["0", "2"], 2, ["background", "1", "2"], {"0": 0, "2": 2}),
        (["wood", "lake"], 3, ["background", "lake", "wood"], {"lake": 1, "wood": 2}),
    ],
)
def test_of_a_number_of_classes_the_values_are_the_numbers(values, count, names, ids):
    table = masks.make_table(values, count, background=False)
    assert list(table.names) == names
    known = table.values  # noqa: PD011
    assert {value: known[value] for value in ids} == ids


@pytest.mark.parametrize("values", [["1", "7"], ["-1"], ["a", "b", "c", "d"]])
def test_values_beyond_the_number_of_classes_are_named(values):
    with pytest.raises(InputError, match=r"there are to be 3 classes, but the values are"):
        masks.make_table(values, 3, background=True)


def test_ground_outside_the_area_of_interest_is_unknown_to_a_run(ground, tmp_path):
    raster, _ = ground
    labels = write_shapes(tmp_path / "l.gpkg", [shapely.box(0, 0, 60, 40)], raster, label=["a"])
    aoi = write_shapes(tmp_path / "aoi.gpkg", [shapely.box(10, 0, 50, 70)], raster)
    ignored = write_shapes(tmp_path / "no.gpkg", [shapely.box(20, 10, 30, 20)], raster)
    (image,), _ = masks.label_images([raster], [labels], region_paths=[(aoi, ignored)])
    mask = image.labels.read(Window(0, 0, WIDTH, HEIGHT))
    assert mask[15, [5, 15, 25, 35, 55]].tolist() == [255, 1, 255, 1, 255]
    assert image.raster.regions is not None
