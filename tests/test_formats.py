"""Annotation files: what is written reads back, and what is broken is refused with a word."""

from __future__ import annotations

import dataclasses
import json
import re
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

import defusedxml.ElementTree
import geopandas as gpd
import numpy as np
import pandas as pd
import pyogrio
import pytest
import rasterio.crs
import shapely
from conftest import REAL_DATA
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

import annotations as an
import fileio
import formats
from ImageData import BOX_COLUMNS, InputError

real_data = pytest.mark.skipif(
    not REAL_DATA.exists(), reason="the real rasters are not on this machine"
)
MOON = "+proj=eqc +R=1737400 +lon_0=30 +units=m +no_defs"
SUFFIXES = [".csv", ".gpkg", ".geojson", ".parquet", ".json", ".txt"]
TURNED = (0.43, 0.25, 500_000, 0.25, -0.43, 4_000_000)  # about 30 degrees, 0.5 m
PLACES = {
    "none": (None, (1, 0, 0, 0, 1, 0)),
    "mercator": ("EPSG:3857", (0.0746, 0, 3_628_312.86, 0, -0.0746, 39_135.76)),
    "utm, turned": ("EPSG:32633", TURNED),
    "geographic": ("EPSG:4326", (2.7e-6, 0, -115.24, 0, -2.7e-6, 36.2)),
    "geographic, turned": ("EPSG:4326", (2e-6, 1e-6, 12.5, 1e-6, -2e-6, 60.1)),
    "moon, turned": (MOON, (50, 20, -40_000, 20, -50, 30_000)),
}


def canvas(place="none", width=640, height=480, name="scene.tif"):
    """A handle to a raster that no test reads."""
    crs, transform = PLACES[place]
    return fileio.Raster(
        path=Path(name), source=name, width=width, height=height, bands=(1,), band_count=1,
        dtype="uint8", nodata=(None,), crs=crs and rasterio.crs.CRS.from_user_input(crs).to_wkt(),
        transform=tuple(map(float, transform)), block_shape_hw=(256, 256), masked=False,
    )  # fmt: skip


def boxes_of(cleaned):
    return cleaned.df[BOX_COLUMNS].to_numpy()


def table_of(boxes, labels, **columns):
    return pd.DataFrame(boxes, columns=BOX_COLUMNS, dtype=float).assign(label=labels, **columns)


def features(path, shapes, crs="EPSG:3857", **columns):
    gpd.GeoDataFrame(columns, geometry=shapes, crs=crs).to_file(path)
    return path


# ---------------------------------------------------------------------------------------------
# Written and read again
# ---------------------------------------------------------------------------------------------

coordinate = st.floats(0, 400, allow_subnormal=False)
side = st.floats(0.01, 200)
rows = st.lists(
    st.tuples(
        coordinate, coordinate, side, side,
        st.sampled_from(["a", "b c", "01", "1.0", "Ü, \"x\"", "NA", "[1]"]),
    ),
    min_size=1, max_size=12,
)  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=8, deadline=None)
@given(rows=rows)
def test_what_is_written_reads_back(suffix, place, rows):
    if suffix == ".geojson" and place.startswith("moon"):
        return
    raster = canvas(place)
    df = table_of([(x, y, x + w, y + h) for x, y, w, h, _ in rows], [row[4] for row in rows])
    with tempfile.TemporaryDirectory() as folder:
        path = fileio.write_annotations(Path(folder) / f"scene{suffix}", df, raster)
        cleaned = an.read_annotations(path, raster, box_source="columns")
    assert len(cleaned.quarantine) == 0
    np.testing.assert_allclose(boxes_of(cleaned), df[BOX_COLUMNS], rtol=0, atol=1e-6)
    assert cleaned.df["label"].tolist() == df["label"].tolist()
    size = boxes_of(cleaned)[:, 2:] - boxes_of(cleaned)[:, :2]
    np.testing.assert_allclose(cleaned.df["diameter"], size.max(axis=1))


@pytest.mark.parametrize("place", ["none", "utm, turned", "moon, turned"])
@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".parquet", ".json"])
def test_polygons_and_further_columns_come_back(tmp_path, suffix, place):
    if suffix == ".geojson" and place.startswith("moon"):
        pytest.skip("GeoJSON cannot name this CRS")
    raster = canvas(place)
    ring = shapely.Point(40.3, 30.1).buffer(9.7)
    pair = shapely.MultiPolygon([shapely.box(1, 2, 3, 4), shapely.box(10, 2, 13, 9)])
    other = shapely.box(0, 0, 1, 1)  # is not what the third box bounds
    df = table_of(
        [ring.bounds, pair.bounds, (5, 5, 9, 9)], ["a", "b", "c"],
        geometry=[ring, pair, other], score=[0.25, 0.5, 1 / 3],
    )  # fmt: skip
    path = fileio.write_annotations(tmp_path / f"x{suffix}", df, raster)
    out = an.read_annotations(path, raster).df
    assert out["score"].tolist() == df["score"].tolist()
    expected = [ring, pair, shapely.box(5, 5, 9, 9)]
    assert shapely.hausdorff_distance(out["geometry"].to_numpy(), expected).max() < 1e-6
    np.testing.assert_allclose(out[BOX_COLUMNS], df[BOX_COLUMNS], atol=1e-6)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_object_at_all_can_be_written(tmp_path, suffix):
    df = table_of(np.empty((0, 4)), []).astype({"label": str})
    path = fileio.write_annotations(tmp_path / f"x{suffix}", df, canvas("mercator"))
    assert path.exists()
    with pytest.raises(InputError, match=r"no row|no annotation|is empty"):
        an.read_annotations(path, canvas("mercator"), box_source="columns")


def test_missing_labels_stay_missing_or_are_refused(tmp_path):
    df = table_of([(1, 1, 2, 2), (3, 3, 5, 5)], ["a", None])
    for suffix in (".csv", ".gpkg", ".geojson", ".parquet"):
        path = fileio.write_annotations(tmp_path / f"x{suffix}", df, canvas())
        out = an.read_annotations(path, canvas(), box_source="columns").df
        assert out["label"].isna().tolist() == [False, True]
        out = an.read_annotations(path, canvas(), box_source="columns", default_label="rest").df
        assert out["label"].tolist() == ["a", "rest"]
    for suffix in (".json", ".txt"):
        with pytest.raises(InputError, match="1 boxes have none"):
            fileio.write_annotations(tmp_path / f"x{suffix}", df, canvas())
        assert not (tmp_path / f"x{suffix}").exists()


def test_a_crs_without_a_code_is_refused_in_geojson(tmp_path):
    df = table_of([(1, 1, 2, 2)], ["a"])
    with pytest.raises(InputError, match=r"write a GeoPackage"):
        fileio.write_annotations(tmp_path / "x.geojson", df, canvas("moon, turned"))
    assert list(tmp_path.iterdir()) == []


def test_geojson_without_a_crs_says_so(tmp_path):
    df = table_of([(1, 1, 2, 2)], ["a"])
    path = fileio.write_annotations(tmp_path / "x.geojson", df, canvas())
    assert json.loads(path.read_text())["crs"] is None
    assert formats.read_annotation_file(path, canvas()).crs is None
    with pytest.raises(InputError, match="declares no coordinate reference system"):
        an.read_annotations(path, canvas("mercator"))
    out = an.read_annotations(path, canvas("mercator"), coordinates="pixel")
    assert boxes_of(out).tolist() == [[1, 1, 2, 2]]


def test_class_ids_on_disk_are_kept_and_new_ones_appended(tmp_path):
    (tmp_path / "classes.txt").write_text("ship\nbuoy\n")
    df = table_of([(1, 1, 2, 2), (3, 3, 5, 5), (5, 5, 6, 6)], ["reef", "buoy", "ark"])
    path = fileio.write_annotations(tmp_path / "x.txt", df, canvas())
    assert [line.split()[0] for line in path.read_text().splitlines()] == ["3", "1", "2"]
    assert (tmp_path / "classes.txt").read_text() == "ship\nbuoy\nark\nreef\n"
    assert an.read_annotations(path, canvas()).df["label"].tolist() == ["reef", "buoy", "ark"]


@pytest.mark.parametrize(
    ("name", "df", "message"),
    [
        ("x.kmz", table_of([(1, 1, 2, 2)], ["a"]), "must end in one of"),
        ("x.csv", pd.DataFrame({"label": ["a"]}), r"need the columns \['xmin'"),
        ("layer_styles.gpkg", table_of([(1, 1, 2, 2)], ["a"]), "give the layer another name"),
        ("x.txt", table_of([(1, 1, 2, 2)], ["a\nb"]), "no class can be called"),
        ("x.gpkg", table_of([(1, 1, 2, 2)], ["a"], LABEL=["b"]), "cannot hold the columns"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, name, df, message):
    with pytest.raises(InputError, match=message):
        fileio.write_annotations(tmp_path / name, df, canvas())
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------
# Written chunk by chunk
# ---------------------------------------------------------------------------------------------

FURTHER = {
    ".csv": [*BOX_COLUMNS, "pixel_x", "score"], ".gpkg": ["score", "geometry"],
    ".parquet": ["score", "geometry"], ".geojson": [], ".json": [], ".txt": [],
}  # fmt: skip  # columns that an empty file of the format can have


def mixed(count=9):
    """Return boxes of three labels, of which every other is a pair of polygons."""
    low = np.stack([np.arange(count) * 11.3, np.arange(count) % 4 * 7.1], axis=1)
    corners = np.hstack([low, low + np.array([8.5, 6.25])])
    shapes = [
        shapely.MultiPolygon([shapely.box(a, b, a + 2, d), shapely.box(c - 2, b, c, d)])
        if number % 2 else None
        for number, (a, b, c, d) in enumerate(corners)
    ]  # fmt: skip
    return table_of(
        corners, [("a", "b c", "01")[i % 3] for i in range(count)], geometry=shapes,
        score=np.linspace(0, 1, count), number=np.arange(count),
    )  # fmt: skip


def write_chunks(path, chunks, raster, labels=("01", "a", "b c"), **options):
    with fileio.annotation_writer(path, raster, labels, **options) as append:
        for chunk in chunks:
            append(chunk)
    return path


@pytest.mark.parametrize("place", ["none", "utm, turned"])
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("size", [2, 5, 9])
def test_chunks_read_back_as_the_whole(tmp_path, suffix, place, size):
    raster, df = canvas(place), mixed()
    whole = fileio.write_annotations(tmp_path / "whole" / f"x{suffix}", df, raster)
    chunks = [df[start : start + size] for start in range(0, len(df), size)]
    path = write_chunks(tmp_path / f"x{suffix}", [df[:0], *chunks, df[:0]], raster)
    expected, found = (formats.read_annotation_file(p, raster) for p in (whole, path))
    assert found.crs == expected.crs
    if "geometry" in expected.df:
        np.testing.assert_allclose(
            shapely.bounds(found.df.pop("geometry").to_numpy()),
            shapely.bounds(expected.df.pop("geometry").to_numpy()), atol=1e-6,
        )  # fmt: skip
    pd.testing.assert_frame_equal(found.df, expected.df)
    assert {p.name for p in tmp_path.iterdir()} <= {"whole", path.name, "classes.txt"}


@pytest.mark.parametrize("chunks", [[], [mixed(0)]], ids=["no chunk", "an empty chunk"])
@pytest.mark.parametrize("place", ["none", "mercator"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_without_objects_is_valid(tmp_path, suffix, place, chunks):
    path = write_chunks(tmp_path / f"x{suffix}", chunks, canvas(place))
    read = {
        ".csv": pd.read_csv, ".parquet": gpd.read_parquet,
        ".gpkg": lambda path: gpd.read_file(path, layer="x"), ".geojson": gpd.read_file,
        ".json": lambda path: json.loads(path.read_text())["annotations"],
        ".txt": lambda path: path.read_text(),
    }[suffix]  # fmt: skip
    found = read(path)
    assert len(found) == 0
    if FURTHER[suffix]:
        assert set(FURTHER[suffix]) - set(found.columns) == (set() if chunks else {"score"})
    if suffix in (".gpkg", ".parquet"):
        assert found.crs == PLACES[place][0]
    with pytest.raises(InputError, match=r"no row|no annotation|is empty"):
        formats.read_annotation_file(path, canvas(place))


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_broken_block_leaves_the_folder_as_it_was(tmp_path, suffix, count):
    path = tmp_path / f"x{suffix}"
    path.write_text("old")
    chunks = ({"x": table_of([(1, 1, 2, 2)], ["a"])}[key] for key in [*"x" * count, "y"])
    with pytest.raises(KeyError):
        write_chunks(path, chunks, canvas())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (table_of([(1, 1, 2, 2)], ["a"]), "all chunks need"),
        (table_of([(1, 1, 2, 2)], ["z"], n=1), r"the labels \['z'\] were not announced"),
        (pd.DataFrame({"label": ["a"]}), "need the columns"),
        (table_of([(1, 1, 2, 2)], ["a"], n=0.5), "cannot hold the columns"),
        (table_of([(1, 1, 2, 2)], ["a"], n="x"), "cannot hold the columns"),
    ],
)
@pytest.mark.parametrize("suffix", [".gpkg", ".parquet"])
def test_a_chunk_that_does_not_fit_the_first_is_refused(tmp_path, suffix, chunk, message):
    first = table_of([(1, 1, 2, 2)], ["a"], n=1)
    with pytest.raises(InputError, match=message):
        write_chunks(tmp_path / f"x{suffix}", [first, chunk], canvas(), ["a"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".gpkg", ".parquet"])
def test_the_first_chunk_decides_on_the_types(tmp_path, suffix):
    box = [(1, 1, 2, 2)]
    chunks = [
        table_of(box, [None], whole=1, text=[None], real=0.5),
        table_of(box, pd.Categorical(["a"]), whole=[np.nan], text=2, real=3),
        table_of(box, ["b"], whole=pd.array([3], dtype="Int64"), text=[Path("c")], real=[None]),
    ]
    df = formats.read_annotation_file(
        write_chunks(tmp_path / f"x{suffix}", chunks, canvas(), "ab"), canvas()
    ).df
    text = df[["label", "text"]].astype(object).where(df[["label", "text"]].notna(), None)
    assert text["label"].tolist() == [None, "a", "b"]
    assert text["text"].tolist() == [None, "2", "c"]
    assert df["whole"].isna().tolist() == [False, True, False]
    assert df["whole"].dropna().tolist() == [1, 3]
    np.testing.assert_array_equal(df["real"], [0.5, 3, np.nan])


@pytest.mark.parametrize("place", ["none", "utm, turned"])
@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".parquet", ".json"])
def test_circles_have_the_centre_and_diameter_of_their_row(tmp_path, suffix, place):
    raster = canvas(place)
    df = table_of([(10, 20, 40, 60), (100, 50, 110, 60)], ["a", "a"], diameter=[30.0, 12.0])
    path = write_chunks(tmp_path / f"x{suffix}", [df[:1], df[1:]], raster, "a", shape="circle")
    shapes = an.read_annotations(path, raster).df["geometry"].to_numpy()
    np.testing.assert_allclose(
        shapely.bounds(shapes), [(10, 25, 40, 55), (99, 49, 111, 61)], atol=1e-6
    )
    np.testing.assert_allclose(shapely.area(shapes), np.pi * np.array([15, 6]) ** 2, rtol=0.01)
    center = shapely.get_coordinates(shapely.centroid(shapes))
    np.testing.assert_allclose(center, [(25, 40), (105, 55)], atol=1e-6)
    assert (shapely.get_num_coordinates(shapes) == formats.CIRCLE_SIDES + 1).all()


@pytest.mark.parametrize(
    ("shape", "kind"), [("own", "Unknown"), ("box", "Polygon"), ("circle", "Polygon")]
)
def test_polygons_are_left_out_where_boxes_or_circles_are_wanted(tmp_path, shape, kind):
    path = write_chunks(tmp_path / "x.gpkg", [mixed()], canvas(), shape=shape, layer="ships")
    assert dict(pyogrio.list_layers(path))["ships"] == kind
    kinds = shapely.get_type_id(formats.read_annotation_file(path, canvas()).df["geometry"])
    assert (kinds == shapely.GeometryType.MULTIPOLYGON).sum() == (4 if shape == "own" else 0)
    with pytest.raises(ValueError, match="shape must be one of"):
        write_chunks(path, [], canvas(), shape="star")


def test_geojson_is_refused_before_anything_is_detected(tmp_path):
    with (
        pytest.raises(InputError, match="write a GeoPackage"),
        fileio.annotation_writer(tmp_path / "x.geojson", canvas("moon, turned"), ["a"]),
    ):
        pytest.fail("the block must not begin")


def test_class_names_that_change_meanwhile_are_not_overwritten(tmp_path):
    df = table_of([(1, 1, 2, 2)], ["b"])
    with fileio.annotation_writer(tmp_path / "x.txt", canvas(), ["b"]) as append:
        append(df)
        (tmp_path / "classes.txt").write_text("b\nc\n")  # begins with the same names
    assert (tmp_path / "classes.txt").read_text() == "b\nc\n"
    with (
        pytest.raises(InputError, match="were changed meanwhile"),
        fileio.annotation_writer(tmp_path / "y.txt", canvas(), ["b", "d"]) as append,
    ):
        (tmp_path / "classes.txt").write_text("b\nc\ne\n")
    assert not (tmp_path / "y.txt").exists()


@pytest.mark.parametrize("place", ["none", "moon, turned"])
def test_a_geopackage_has_a_style_with_a_colour_per_label(tmp_path, place):
    labels = ["a", "b & <c>", "01", 'Ü, "x"', *map(str, range(20, 26))]
    df = table_of([(1, 1, 2, 2)] * 2, labels[:2])
    path = write_chunks(tmp_path / "craters.gpkg", [df], canvas(place), labels)
    assert dict(pyogrio.list_layers(path)) == {"craters": "Polygon", "layer_styles": None}
    with closing(sqlite3.connect(path)) as database:
        database.row_factory = sqlite3.Row
        (style,) = map(dict, database.execute("SELECT * FROM layer_styles"))
        (column,) = database.execute("SELECT column_name FROM gpkg_geometry_columns").fetchone()
        kinds = dict(database.execute("SELECT table_name, data_type FROM gpkg_contents").fetchall())
    assert list(style) == [
        "id", "f_table_catalog", "f_table_schema", "f_table_name", "f_geometry_column",
        "styleName", "styleQML", "styleSLD", "useAsDefault", "description", "owner", "ui",
        "update_time",
    ]  # fmt: skip
    assert (style["f_table_name"], style["f_geometry_column"]) == ("craters", column)
    assert style["f_table_schema"] == ""
    assert style["useAsDefault"] == 1
    assert kinds == {"craters": "features", "layer_styles": "attributes"}
    renderer = defusedxml.ElementTree.fromstring(style["styleQML"]).find("renderer-v2")
    assert (renderer.get("type"), renderer.get("attr")) == ("categorizedSymbol", "label")
    categories = {c.get("value"): c.get("symbol") for c in renderer.iter("category")}
    assert list(categories) == sorted(labels)
    colors = {
        symbol.get("name"): option.get("value")
        for symbol in renderer.iter("symbol")
        for option in symbol.iter("Option") if option.get("name") == "line_color"
    }  # fmt: skip
    assert colors[categories["01"]] == "230,159,0,255"  # imutils.COLORS[0]
    assert len(set(list(colors.values())[:7])) == 7
    out = formats.read_annotation_file(path, canvas(place))
    assert out.df["label"].tolist() == labels[:2]
    with pytest.raises(InputError, match="has no layer 'layer_styles'"):
        formats.read_annotation_file(path, canvas(place), layer="layer_styles")


@pytest.mark.parametrize("place", ["none", "moon, turned"])
def test_a_column_names_the_layers_of_a_geopackage(tmp_path, place):
    kinds = pd.CategoricalDtype(["wet", "dry", "never"])
    first, second = (
        table_of([(1, 1, 2, 2), (3, 3, 5, 6)], ["a", "b"], n=n, kind=pd.Series(kind, dtype=kinds))
        for n, kind in (([1.5, np.nan], ["wet", "wet"]), ([2.5, 3.5], ["dry", "wet"]))
    )
    path = write_chunks(
        tmp_path / "x.gpkg", [first, second], canvas(place), ["a", "b"], layer_column="kind"
    )
    layers = dict(pyogrio.list_layers(path))
    assert layers == dict.fromkeys(kinds.categories, "Polygon") | {"layer_styles": None}
    read = {
        layer: formats.read_annotation_file(path, canvas(place), layer=layer)
        for layer in ("wet", "dry")
    }
    np.testing.assert_array_equal(read["wet"].df["n"], [1.5, np.nan, 3.5])
    assert read["dry"].df[["label", "n"]].to_numpy().tolist() == [["a", 2.5]]
    assert {len(layer.df.columns) for layer in read.values()} == {5}
    assert len(pyogrio.read_dataframe(path, layer="never")) == 0
    with closing(sqlite3.connect(path)) as database:
        styles = dict(database.execute("SELECT f_table_name, styleQML FROM layer_styles"))
    assert set(styles) == set(kinds.categories)
    colors = {re.search(r'line_color" value="([^"]+)', qml)[1] for qml in styles.values()}
    assert len(colors) == 3


def test_objects_without_a_label_are_drawn_too(tmp_path):
    df = table_of([(1, 1, 2, 2)] * 2, ["a", None])
    path = fileio.write_annotations(tmp_path / "x.gpkg", df, canvas())
    with closing(sqlite3.connect(path)) as database:
        (qml,) = database.execute("SELECT styleQML FROM layer_styles").fetchone()
    found = defusedxml.ElementTree.fromstring(qml).iter("category")
    assert [category.get("value") for category in found] == ["a", ""]


# ---------------------------------------------------------------------------------------------
# COCO, VOC, YOLO
# ---------------------------------------------------------------------------------------------


def coco(annotations=({"image_id": 7, "category_id": 1, "bbox": [10, 20, 30, 40]},), **changes):
    return {
        "images": [
            {"id": 3, "file_name": "other.tif", "width": 9, "height": 9},
            {"id": 7, "file_name": "images/scene.tif", "width": 640, "height": 480},
        ],
        "categories": [{"id": 1, "name": "ship"}, {"id": 2, "name": "01"}],
        "annotations": list(annotations),
    } | changes


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_coco_gives_the_objects_of_the_raster(tmp_path):
    square = [100.0, 50.0, 120.0, 50.0, 120.0, 80.0, 100.0, 80.0]
    entries = [
        {"image_id": 7, "category_id": 1, "bbox": [10, 20, 30, 40], "iscrowd": 1},
        {"image_id": 3, "category_id": 1, "bbox": [1, 1, 2, 2]},
        {"image_id": 7, "category_id": 2, "segmentation": [square, [200, 60, 210, 60, 210, 70]]},
        {"image_id": 7, "category_id": 2, "bbox": [0, 0, 5, 5], "segmentation": [square]},
        {"image_id": 7, "category_id": 9, "bbox": [1, 1, 2, 2]},
        {"image_id": 8, "category_id": 1, "bbox": [1, 1, 2, 2]},
        {"image_id": 7, "category_id": 1, "bbox": [1, "x", 2, 2]},
    ]
    cleaned = an.read_annotations(write(tmp_path / "c.json", coco(entries)), canvas())
    assert boxes_of(cleaned).tolist() == [[10, 20, 40, 60], [100, 50, 210, 80], [0, 0, 5, 5]]
    assert cleaned.df["label"].tolist() == ["ship", "01", "01"]
    assert cleaned.df["iscrowd"].tolist()[0] == 1
    assert shapely.area(cleaned.df["geometry"].to_numpy()).tolist()[1:] == [650, 600]
    assert cleaned.quarantine["reason"].tolist() == [
        "category_id names no category", "image_id names no image", "no box",
    ]  # fmt: skip
    assert cleaned.quarantine["px_xmax"].tolist()[:2] == [3, 3]


@pytest.mark.parametrize("compressed", [True, False])
@settings(max_examples=30, deadline=None)
@given(data=st.data(), height=st.integers(1, 12), width=st.integers(1, 12))
def test_masks_become_their_outlines(compressed, data, height, width):
    bits = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.array(bits).reshape(height, width)
    if compressed:
        counts = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
        counts = counts.decode() if isinstance(counts, bytes) else counts
    else:
        flat = np.concatenate([[False], mask.T.ravel(), [False]])
        edges = np.flatnonzero(flat[1:] != flat[:-1])
        counts = np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
    entry = {"image_id": 7, "category_id": 1}
    entry["segmentation"] = {"counts": counts, "size": [height, width]}
    dataset = coco([entry])
    dataset["images"][1] |= {"width": width, "height": height}
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "c.json", dataset)
        raster = canvas(width=width, height=height)
        if not mask.any():
            with pytest.raises(InputError, match="no box"):
                an.read_annotations(path, raster)
            return
        cleaned = an.read_annotations(path, raster)
    (shape,) = cleaned.df["geometry"]
    ys, xs = np.nonzero(mask)
    assert boxes_of(cleaned).tolist() == [[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]]
    assert shape.is_valid
    assert shape.area == mask.sum()
    assert shapely.contains_xy(shape, xs + 0.5, ys + 0.5).all()


def test_a_small_mask_on_a_huge_raster_is_cheap(tmp_path):
    width, height = 200_000, 100_000
    start = 150_000 * height + 70_000
    counts = [start, 10, height - 10, 10, width * height - start - height - 10]
    entry = {"image_id": 7, "category_id": 1}
    entry["segmentation"] = {"counts": counts, "size": [height, width]}
    dataset = coco([entry])
    dataset["images"][1] |= {"width": width, "height": height}
    raster = canvas(width=width, height=height)
    cleaned = an.read_annotations(write(tmp_path / "c.json", dataset), raster)
    assert boxes_of(cleaned).tolist() == [[150_000, 70_000, 150_002, 70_010]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (coco(images=[{"id": 1, "file_name": "a.tif"}]), r"do not name the raster scene\.tif"),
        (coco(images=[{"id": 1, "file_name": "scene.png", "width": 5}]), "raster has 640 x 480"),
        (coco(images=[{"id": 1, "file_name": "a/scene.tif"}, {"id": 2, "file_name": "scene.tif"}]),
         "2 images called"),
        (coco(images=3), "images must be a list"),
        (coco(images=[3]), r"images\[0\] must be an object"),
        (coco(categories=[{"id": 1}]), r"categories\[0\] lacks \['name'\]"),
        (coco(categories=[{"id": [], "name": "a"}]), r"categories\[0\] has no usable id"),
        (coco([]), "holds no annotation"),
        (coco([3]), r"annotations\[0\] must be an object"),
        (coco([{"image_id": 7, "segmentation": {"size": [2, 2], "counts": [4]}}]),
         r"annotations\[0\] has a mask of size \[2, 2\]"),
        ([1, 2], "holds a list"),
        ({"a": 1}, r"holds the keys \['a'\]"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"images": [', "line 1 column"),
        ("", r"is empty \(0 bytes\)"),
    ],
)  # fmt: skip
def test_json_that_is_no_annotation_is_refused(tmp_path, value, message):
    with pytest.raises(InputError, match=message):
        an.read_annotations(write(tmp_path / "c.json", value), canvas())


VOC = """<annotation><filename>scene.tif</filename>
<size><width>640</width><height>480</height><depth>1</depth></size>
<object><name>01</name><difficult>1</difficult>
<bndbox><xmin>10</xmin><ymin>20.5</ymin><xmax>40</xmax><ymax>60</ymax></bndbox></object>
<object><name>b</name><bndbox><xmin>x</xmin><ymin>1</ymin><xmax>2</xmax></bndbox></object>
</annotation>"""


def test_voc_boxes_are_corners(tmp_path):
    cleaned = an.read_annotations(write(tmp_path / "a.xml", VOC), canvas())
    assert boxes_of(cleaned).tolist() == [[10, 20.5, 40, 60]]
    assert cleaned.df["label"].tolist() == ["01"]
    assert cleaned.quarantine["reason"].tolist() == ["no box"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (VOC.replace(">640<", ">641<"), "describes an image of 641 x 480 px"),
        (VOC[:-20], "cannot be read as Pascal VOC"),
        ("<kml/>", "expected <annotation>, got <kml>"),
        ("<annotation/>", "holds no annotation"),
        ('<!DOCTYPE a [<!ENTITY b "c">]>' + VOC, "without DTD"),
    ],
)
def test_xml_that_is_no_voc_is_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        an.read_annotations(write(tmp_path / "a.xml", text), canvas())


YOLO = """0 0.5 0.5 0.25 0.125
1 0.5 0.5 0.25 0.125 0.75

1 0.25 0.25 0.5 0.25 0.5 0.5
5 0.5 0.5 0.1 0.1
0 0.5 0.5
0 a b c d
"""


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("classes.txt", "ship\r\n01\n"), ("data.yaml", "names: [ship, 01]\n"),
        ("../dataset.yaml", "names: {0: ship, 1: 01}\n"),
    ],
)  # fmt: skip
def test_yolo_lines_are_boxes_and_polygons(tmp_path, place, text):
    folder = tmp_path / "labels"
    folder.mkdir()
    (folder / place).write_text(text)
    cleaned = an.read_annotations(write(folder / "a.txt", YOLO), canvas())
    box = [240, 210, 400, 270]
    assert boxes_of(cleaned).tolist() == [box, box, [160, 120, 320, 240]]
    assert cleaned.df["label"].tolist() == ["ship", "01", "01"]
    assert cleaned.df["score"].isna().tolist() == [True, False, True]
    assert cleaned.df["geometry"].isna().tolist() == [True, True, False]
    assert cleaned.quarantine.set_index("line")["reason"].to_dict() == {
        5: "class is none of those named", 6: "line is too short for a box or polygon",
        7: "line holds something else than numbers",
    }  # fmt: skip


def test_yolo_without_names_has_numbers_for_labels(tmp_path):
    cleaned = an.read_annotations(write(tmp_path / "a.txt", YOLO), canvas())
    assert cleaned.df["label"].tolist() == ["0", "1", "1", "5"]


@pytest.mark.parametrize("text", ["names: 5", "names: [", "- 1", "names: {a: b}"])
def test_broken_class_names_are_refused(tmp_path, text):
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(
        InputError, match=r"data\.yaml(: names must| cannot be read as class names)"
    ):
        an.read_annotations(write(tmp_path / "a.txt", YOLO), canvas())


# ---------------------------------------------------------------------------------------------
# Broken files
# ---------------------------------------------------------------------------------------------

CSV = "pixel_x,pixel_y,diameter,label\n50,40,5,a\n60,30,7,01\n"
GEOJSON = json.dumps(
    {"type": "FeatureCollection", "crs": None, "features": [
        {"type": "Feature", "properties": {"label": "a", "diameter": 3.5},
         "geometry": {"type": kind, "coordinates": places}}
        for kind, places in (("Point", [9.5, 8]), ("Polygon", [[[1, 2], [3, 2], [3, 9], [1, 2]]]))
    ]}
)  # fmt: skip
RLE = {"image_id": 7, "category_id": 1, "segmentation": {"counts": "04", "size": [480, 640]}}
POLYGON = {"image_id": 7, "category_id": 2, "segmentation": [[1, 2, 3, 2, 3, 9]], "iscrowd": 0}
WHOLE = {
    "a.csv": CSV, "a.geojson": GEOJSON, "a.json": json.dumps(coco([RLE, POLYGON])),
    "a.txt": YOLO, "a.xml": VOC,
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 6), st.binary(max_size=4)), min_size=1, max_size=4
    )
)
@example(edits=[(0.0, 6, b"")])
@example(edits=[(0.5, 2, b"\xff\x00")])
def test_a_damaged_file_is_read_or_refused(name, edits):
    content = WHOLE[name].encode()
    for place, cut, put in edits:
        start = int(place * len(content))
        content = content[:start] + put + content[start + cut :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            outcome = len(an.read_annotations(path, canvas()).df)
        except InputError as error:
            outcome = str(path) in str(error)
    assert outcome


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".xml", ".shp", ".fgb", ".kml", ".doc"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 40, b"\xff\xfe nonsense", b"PK\x03\x04", b"[]"])
def test_rubbish_of_any_suffix_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=path.name):
        an.read_annotations(path, canvas())
    with pytest.raises(InputError, match="does not exist"):
        an.read_annotations(tmp_path / f"none{suffix}", canvas())


@pytest.mark.parametrize("suffix", [".gpkg", ".parquet"])
def test_a_truncated_binary_file_is_refused(tmp_path, suffix):
    df = table_of([(1, 1, 2, 2)] * 500, ["a"] * 500)
    path = fileio.write_annotations(tmp_path / f"a{suffix}", df, canvas())
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=path.name):
        an.read_annotations(path, canvas())


def test_cells_beyond_the_header_do_not_shift_the_columns(tmp_path):
    text = "pixel_x,pixel_y,diameter,label\n1,2,2,a,\n4,5,2,b,\n"
    cleaned = an.read_annotations(write(tmp_path / "a.csv", text), canvas())
    assert boxes_of(cleaned).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]
    with pytest.raises(InputError, match="as many cells in each row"):
        an.read_annotations(write(tmp_path / "a.csv", text.replace("a,", "a,7")), canvas())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("place", ["mercator", "utm, turned"])
def test_pixels_in_files_are_those_of_the_raster_not_of_a_view(tmp_path, place, suffix):
    plain = canvas(place)
    scale = rasterio.Affine.scale(2.5, 1.25)
    view = dataclasses.replace(
        plain, width=256, height=384, original=plain, target_resolution=1.0,
        transform=tuple(rasterio.Affine(*plain.transform) @ scale)[:6],
    )  # fmt: skip
    assert view.pixel_size_xy == pytest.approx((2.5, 1.25))
    boxes = np.array([[10, 20, 30, 50], [0, 0, 256, 384.0]])
    shape = shapely.Polygon([(10, 20), (30, 20), (20, 50)])
    df = table_of(boxes, ["a", "b"], geometry=[shape, None])
    path = fileio.write_annotations(tmp_path / f"x{suffix}", df, view)
    of_file = an.read_annotations(path, plain, box_source="columns")
    np.testing.assert_allclose(boxes_of(of_file), boxes * ([2.5, 1.25] * 2), atol=1e-6)
    of_view = an.read_annotations(path, view, box_source="columns")
    np.testing.assert_allclose(boxes_of(of_view), boxes, atol=1e-6)
    if suffix in (".gpkg", ".json"):
        (found, *_) = of_view.df["geometry"]
        assert shapely.normalize(found).equals_exact(shapely.normalize(shape), 1e-6)


def view_of(plain, size):
    """Return a handle that reads a raster in pixels so many times as wide."""
    width, height = int(plain.width / size + 1e-6), int(plain.height / size + 1e-6)
    return dataclasses.replace(
        plain, width=width, height=height, original=plain, target_resolution=1.0,
        transform=tuple(rasterio.Affine(*plain.transform) @ rasterio.Affine.scale(size))[:6],
    )  # fmt: skip


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_objects_at_the_edges_survive_pixels_of_another_size(tmp_path, suffix):
    for size in np.linspace(0.27, 3.7, 40):
        plain = canvas("mercator")
        view = view_of(plain, size)
        boxes = [[view.width - 20, view.height - 17, view.width, view.height], [0, 0, 20, 9]]
        df = table_of(np.array(boxes, float), ["a", "b"])
        path = fileio.write_annotations(tmp_path / f"x{suffix}", df, view)
        back = an.preprocess_df(path, view, box_source="columns")
        np.testing.assert_allclose(boxes_of(back), boxes, atol=1e-4, err_msg=str(size))
    (tmp_path / "y.csv").write_text("xmin,ymin,xmax,ymax,label\n630,470,640,480,a\n")
    view = view_of(plain, 3)  # whose last pixel ends before that of the file
    back = an.preprocess_df(tmp_path / "y.csv", view, box_source="columns")
    np.testing.assert_allclose(boxes_of(back), [[210, 470 / 3, 213, 160]])
    (tmp_path / "y.csv").write_text("xmin,ymin,xmax,ymax,label\n600,470,643,480,a\n1,1,9,9,a\n")
    back = an.preprocess_df(tmp_path / "y.csv", view, box_source="columns")
    assert back.quarantine["reason"].tolist() == [an.OVER_RIGHT]
    (tmp_path / "z.csv").write_text(
        "pixel_x,pixel_y,diameter,label\n620,460,40,a\n639.5,479.5,1,a\n638,470,30,a\n"
    )
    back = an.preprocess_df(tmp_path / "z.csv", view)
    np.testing.assert_allclose(back.df["xmax"], 213, atol=1e-3)
    reasons = set(back.quarantine["reason"])  # the second is in what is not read at all
    assert reasons == {an.OFF_RASTER, an.OVER_RIGHT}
    shapes = gpd.GeoDataFrame({"label": ["a"]}, geometry=[shapely.box(600, 440, 640, 480)])
    shapes.to_file(tmp_path / "px.gpkg")
    shapes.set_geometry(
        shapely.transform(shapes.geometry.to_numpy(), plain.to_map), crs="EPSG:3857"
    ).to_file(tmp_path / "map.gpkg")
    for name, place in (("px", "pixel"), ("map", "auto")):
        back = an.preprocess_df(tmp_path / f"{name}.gpkg", view, coordinates=place)
        np.testing.assert_allclose(boxes_of(back), [[200, 440 / 3, 213, 160]], atol=1e-4)


def test_a_diameter_that_is_given_is_kept(tmp_path):
    view = view_of(canvas("mercator"), 3)
    boxes = np.array([[0.0, 5, 20, 45], [30, 30, 50, 40]])
    df = table_of(boxes, ["cut", "whole"], diameter=[60.0, 20.0])
    fileio.write_annotations(tmp_path / "x.csv", df, view)
    assert pd.read_csv(tmp_path / "x.csv")["diameter"].tolist() == pytest.approx([180, 60])


def test_what_only_looks_like_a_geometry_is_left_alone(tmp_path):
    view = view_of(canvas("mercator"), 4)
    text = "xmin,ymin,xmax,ymax,label,geometry\n8,8,16,16,a,POINT (1 2)\n"
    (tmp_path / "x.csv").write_text(text)
    found = an.read_annotations(tmp_path / "x.csv", view, box_source="columns")
    np.testing.assert_allclose(boxes_of(found), [[2, 2, 4, 4]])
    df = table_of(np.array([[2.0, 2, 4, 4]]), ["a"], geometry=[np.nan], area_px=[4])
    path = fileio.write_annotations(tmp_path / "y.csv", df, view)
    written = pd.read_csv(path)
    assert written[["area_px", "diameter"]].to_numpy() == pytest.approx(np.array([[64, 8]]))
    shapes = gpd.GeoDataFrame(
        {"label": ["a"], "xmin": ["west"]}, geometry=[shapely.box(8, 8, 16, 16)]
    )
    shapes.to_file(tmp_path / "z.gpkg")
    found = an.read_annotations(tmp_path / "z.gpkg", view, coordinates="pixel")
    np.testing.assert_allclose(boxes_of(found), [[2, 2, 4, 4]])


def test_diameters_of_a_view_are_in_pixels_of_the_file(tmp_path):
    plain = canvas("mercator")
    view = view_of(plain, 4)
    path = tmp_path / "x.csv"
    path.write_text("pixel_x,pixel_y,diameter,label\n100,80,10,a\n200,80,20,a\n")
    cleaned = an.preprocess_df(path, view, max_diameter=19, diameter_scale=2)
    np.testing.assert_allclose(boxes_of(cleaned), [[22.5, 17.5, 27.5, 22.5]])
    assert cleaned.quarantine["reason"].tolist() == ["not under MAX_DIAMETER, 9.5 px"]
    path.write_text("xmin,ymin,xmax,ymax,label\n100,80,120,100,a\n100,80,140,100,a\n")
    cleaned = an.preprocess_df(path, view, max_diameter=39, box_source="columns")
    np.testing.assert_allclose(boxes_of(cleaned), [[25, 20, 30, 25]])
    shapes = gpd.GeoDataFrame(
        {"label": ["a"] * 3, "diameter": [8.0, np.nan, np.nan]},
        geometry=[shapely.Point(40, 40), shapely.box(8, 8, 24, 24), shapely.box(8, 8, 48, 24)],
    )
    shapes.to_file(tmp_path / "x.gpkg")
    cleaned = an.preprocess_df(tmp_path / "x.gpkg", view, max_diameter=39, coordinates="pixel")
    np.testing.assert_allclose(boxes_of(cleaned), [[9, 9, 11, 11], [2, 2, 6, 6]])
    shapes.set_geometry(
        shapely.transform(shapes.geometry.to_numpy(), plain.to_map), crs="EPSG:3857"
    ).iloc[1:].to_file(tmp_path / "map.gpkg")
    cleaned = an.preprocess_df(tmp_path / "map.gpkg", view, max_diameter=39)
    np.testing.assert_allclose(boxes_of(cleaned), [[2, 2, 6, 6]], atol=1e-6)
