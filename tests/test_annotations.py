"""Cleaning: what each step does, and that no row is lost unseen."""

from __future__ import annotations

import tempfile
import time
from functools import partial
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

import annotations as an
import fileio
from ImageData import InputError, Window


def frame(**columns):
    defaults = {"pixel_x": [50.0, 60.0], "pixel_y": [40.0, 30.0], "diameter": [10.0, 6.0]}
    return pd.DataFrame({**defaults, "label": ["a", "b"], **columns})


def canvas(width=100, height=100, crs=None, transform=(1, 0, 0, 0, 1, 0), name="table.tif"):
    """A handle to a raster that no test reads."""
    return fileio.Raster(
        path=Path(name), source=name, width=width, height=height, bands=(1,), band_count=1,
        dtype="uint8", nodata=(None,), crs=crs, transform=tuple(map(float, transform)),
        block_shape_hw=(256, 256), masked=False,
    )  # fmt: skip


def write(tmp_path, text):
    path = tmp_path / "table.csv"
    path.write_text(text)
    return path


def test_non_numbers_go_and_small_ones_take_the_default():
    df = pd.DataFrame({"diameter": ["3", "x", "", None, "0", "-2", "inf", "4.5"], "k": range(8)})
    out = an.remove_non_numeric_rows(df, "diameter", default_diameter=0.5)
    assert out["k"].tolist() == [0, 4, 5, 7]
    assert out["diameter"].tolist() == [3.0, 0.5, 0.5, 4.5]
    assert out["diameter"].dtype == np.float64


@pytest.mark.parametrize(
    "texts",
    [["7", " 8.50 ", "1e3", "-3", "unknown", "", None, "nan", "inf", "12,5", "0x10", "5 m"],
     ["7", "+5", "1-2", ".5", "3.", "--1", "e", "1e400", "1_000", "\u0663"]],
)  # fmt: skip
def test_text_is_read_as_the_numbers_that_pandas_finds_in_it(texts):
    df = pd.DataFrame({"diameter": pd.Series(texts, dtype="str")})
    expected = pd.to_numeric(df["diameter"], errors="coerce").astype(float)
    expected = expected[np.isfinite(expected)]
    found = an.remove_non_numeric_rows(df, "diameter")["diameter"]
    pd.testing.assert_series_equal(found, expected)
    parts = pd.concat([df, df], ignore_index=True)  # an array of two chunks
    assert len(an.remove_non_numeric_rows(parts, "diameter")) == 2 * len(expected)


def test_the_named_column_is_transformed_whatever_its_name():
    out = an.apply_column_transform(pd.DataFrame({"d": [1.0, 2.0]}), "d", lambda x: 3 * x)
    assert out["d"].tolist() == [3.0, 6.0]
    assert list(out.columns) == ["d"]


def test_steps_leave_their_input_alone():
    df = frame()
    before = df.copy(deep=True)
    df.pipe(an.remove_non_numeric_rows, "diameter", 0.5).pipe(an.generate_bboxes).pipe(
        an.clip_bboxes, 20, 20
    )
    pd.testing.assert_frame_equal(df, before)


def test_boxes_surround_their_centres():
    out = an.generate_bboxes(frame())
    assert out[an.BOX_COLUMNS].to_numpy().tolist() == [[45, 35, 55, 45], [57, 27, 63, 33]]


def test_swapped_corners_are_put_in_order():
    df = pd.DataFrame({"xmin": [5.0, 1], "ymin": [1.0, 9], "xmax": [2.0, 4], "ymax": [8.0, 3]})
    out = an.correct_bounding_boxes(df)
    assert out.to_numpy().tolist() == [[2, 1, 5, 8], [1, 3, 4, 9]]


def test_edge_filters_keep_what_touches_and_drop_what_reaches_over():
    df = an.generate_bboxes(
        frame(pixel_x=[5.0, 4.9, 95.0, 95.1], pixel_y=[50.0] * 4, diameter=[10.0] * 4,
              label=list("abcd"))
    )  # fmt: skip
    out = an.filter_invalid_bboxes(df, 100, 100, an.min_filter, an.max_filter)
    assert out["label"].tolist() == ["a", "c"]


def test_the_diameter_limit_itself_is_too_large():
    df = an.generate_bboxes(frame(diameter=[75.0, 74.9]))
    limit = partial(an.max_diameter_filter, max_diameter=75)
    assert an.filter_invalid_bboxes(df, 500, 500, limit)["diameter"].tolist() == [74.9]


def test_scalar_filters_work_row_by_row(caplog):
    def scalar(x_min, y_min, x_max, y_max, diam, sizex, sizey):
        return 0 <= x_min and diam > 7

    out = an.filter_invalid_bboxes(an.generate_bboxes(frame()), 100, 100, scalar)
    assert out["label"].tolist() == ["a"]
    assert "row by row" in caplog.text


def test_filters_that_do_not_answer_are_refused():
    df = an.generate_bboxes(frame())
    with pytest.raises(InputError, match="must answer True or False"):
        an.filter_invalid_bboxes(df, 100, 100, lambda *a: a[4])


@pytest.mark.parametrize(
    ("percentile", "common"), [(50, ["a"]), (60, ["a"]), (61, ["a", "b"]), (100, ["a", "b", "c"])]
)
def test_common_labels_are_the_smallest_set_that_covers(percentile, common):
    frames = [pd.DataFrame({"label": ["a"] * 4 + ["b"] * 2}), pd.DataFrame({"label": ["a"] * 2})]
    frames.append(pd.DataFrame({"label": ["b", "c"]}))  # a 6, b 3, c 1
    mask = an.gather_common_labels(frames, percentile)
    assert mask.index[mask].tolist() == common
    assert mask.index.tolist() == ["a", "b", "c"]


@given(
    st.lists(st.sampled_from("abcdef"), min_size=1, max_size=60), st.floats(1, 100),
)  # fmt: skip
def test_common_labels_cover_and_no_smaller_set_would(labels, percentile):
    mask = an.gather_common_labels([pd.DataFrame({"label": labels})], percentile)
    counts = pd.Series(labels).value_counts()
    share = 100 * counts[mask.index[mask]].sum() / len(labels)
    assert share >= percentile - 1e-9
    without_last = 100 * counts[mask.index[mask][:-1]].sum() / len(labels)
    assert without_last < percentile


def test_uncommon_and_missing_labels_become_unknown():
    df = pd.DataFrame({"kind": ["a", "b", None, "a"]})
    mask = pd.Series([True, False], index=["a", "b"])
    out = an.filter_label_column(df, mask, "kind")
    assert out["kind"].tolist() == ["a", "Unknown", "Unknown", "a"]
    with pytest.raises(InputError, match="'label' was not found"):
        an.filter_label_column(df, mask, "label")


DIRTY = """pixel_x,pixel_y,diameter,label
50,40,5,a
60,30,unknown,a
70,30,,a
20,20,0,b
30,30,-4,b
10,10,400,b
1,50,5,a
99,50,5,a
x,50,5,a
150,50,5,a
"""


def test_every_dropped_row_is_in_the_quarantine_with_its_reason(tmp_path):
    cleaned = an.preprocess_df(write(tmp_path, DIRTY), canvas(), diameter_scale=3, max_diameter=25)
    assert cleaned.df["diameter"].tolist() == [15.0, 1.5, 1.5]
    reasons = dict(zip(cleaned.quarantine["row"], cleaned.quarantine["reason"], strict=True))
    assert reasons == {
        1: "diameter not numeric", 2: "diameter not numeric", 5: "not under MAX_DIAMETER, 75 px",
        6: "over the left or upper edge", 7: "over the right or lower edge",
        8: "pixel_x not numeric", 9: "centre off the raster",
    }  # fmt: skip
    assert cleaned.quarantine.loc[cleaned.quarantine["row"] == 1, "diameter"].tolist() == [
        "unknown"
    ]


def test_the_report_adds_up(small_sample):
    for raster, table in zip(small_sample.rasters, small_sample.tables, strict=True):
        cleaned = an.preprocess_df(table, raster, diameter_scale=3, max_diameter=25)
        report = cleaned.report
        raw = pd.read_csv(table)
        assert report["rows_in"].iloc[0] == len(raw)
        assert (report["rows_in"] - report["dropped"] == report["rows_out"]).all()
        assert (report["rows_out"].iloc[:-1].to_numpy() == report["rows_in"].iloc[1:]).all()
        assert report["rows_out"].iloc[-1] == len(cleaned.df)
        assert report["dropped"].sum() == len(cleaned.quarantine)
        assert len(cleaned.df) + len(cleaned.quarantine) == len(raw)
        repaired = report.set_index("step").loc["diameter not numeric", "changed"]
        numbers = pd.to_numeric(raw["diameter"], errors="coerce")
        centred = pd.to_numeric(raw["pixel_x"], errors="coerce").notna()
        assert repaired == (numbers[centred] <= 0).sum() > 0


def test_a_large_loss_is_a_warning_that_names_the_setting(tmp_path, caplog):
    text = "pixel_x,pixel_y,diameter,label\n50,50,9,a\n40,40,30,a\n60,60,30,a\n"
    an.preprocess_df(write(tmp_path, text), canvas(), max_diameter=25)
    assert "2 of 3 rows dropped: not under MAX_DIAMETER, 25 px" in caplog.text


def test_clipping_keeps_objects_over_the_edge(tmp_path):
    cleaned = an.preprocess_df(
        write(tmp_path, DIRTY), canvas(), diameter_scale=3, max_diameter=25, clip_to_raster=True
    )
    boxes = cleaned.df[an.BOX_COLUMNS].to_numpy()
    assert len(boxes) == 5  # the centre decides: what lies off the raster goes
    assert boxes.min() >= 0
    assert boxes.max() <= 100


def test_boxes_of_the_table_are_used_when_asked(tmp_path):
    path = write(tmp_path, "xmin,ymin,xmax,ymax,label\n30,10,10,20,a\n5,5,5,9,a\n")
    cleaned = an.preprocess_df(path, canvas(), box_source="columns", max_diameter=99)
    assert cleaned.df[an.BOX_COLUMNS].to_numpy().tolist() == [[10, 10, 30, 20]]
    assert cleaned.df[["pixel_x", "pixel_y", "diameter"]].to_numpy().tolist() == [[20, 15, 20]]
    assert cleaned.quarantine["reason"].tolist() == ["no area"]


def test_columns_may_have_other_names(tmp_path):
    path = write(tmp_path, "pixel_x,pixel_y,size,kind\n50,50,4,a\n")
    cleaned = an.preprocess_df(path, canvas(), diameter_column="size", label_column="kind")
    assert cleaned.df[["diameter", "label"]].to_numpy().tolist() == [[4.0, "a"]]


def test_own_filters_and_steps_are_named_in_the_report(tmp_path):
    def big_enough(x_min, y_min, x_max, y_max, diam, sizex, sizey):
        return diam > 2

    def no_b(df):
        return df[df["label"] != "b"]

    cleaned = an.preprocess_df(
        write(tmp_path, DIRTY), canvas(), diameter_scale=3, max_diameter=25,
        extra_filters=[big_enough], extra_steps=[no_b],
    )  # fmt: skip
    assert {"big_enough", "no_b"} <= set(cleaned.report["step"])
    assert cleaned.df["label"].tolist() == ["a"]
    assert (cleaned.quarantine["reason"] == "no_b").sum() == 3


def test_two_lambdas_are_two_filters(tmp_path):
    cleaned = an.preprocess_df(
        write(tmp_path, "pixel_x,pixel_y,diameter,label\n50,50,4,a\n50,50,20,a\n50,50,40,a\n"),
        canvas(),
        extra_filters=[
            lambda x0, y0, x1, y1, diam, w, h: diam > 10,
            lambda x0, y0, x1, y1, diam, w, h: diam < 30,
        ],
    )
    assert cleaned.df["diameter"].tolist() == [20.0]
    assert cleaned.quarantine["reason"].tolist() == ["<lambda>", "<lambda> 2"]


def test_labels_stay_as_they_are_written(tmp_path):
    path = write(tmp_path, "pixel_x,pixel_y,diameter,label\n5,5,4,01\n9,9,4,NA\n7,7,4,\n")
    cleaned = an.preprocess_df(path, canvas())
    assert cleaned.df["label"].tolist()[:2] == ["01", "NA"]
    assert cleaned.df["label"].isna().tolist() == [False, False, True]


def test_own_steps_move_objects_with_their_boxes(tmp_path):
    path = write(tmp_path, "pixel_x,pixel_y,diameter,label\n50,50,3,a\n")
    cleaned = an.preprocess_df(
        path, canvas(), diameter_scale=3,
        extra_steps=[lambda df: df.assign(pixel_x=df["pixel_x"] + 10, diameter=2 * df["diameter"])],
    )  # fmt: skip
    assert cleaned.df[an.BOX_COLUMNS].to_numpy().tolist() == [[51, 41, 69, 59]]


@pytest.mark.parametrize(
    "step",
    [lambda df: df.iloc[1:].reset_index(drop=True), lambda df: pd.concat([df, df]), lambda df: 3],
    ids=["reset_index", "doubled", "no frame"],
)
def test_steps_that_lose_track_of_rows_are_refused(tmp_path, step):
    with pytest.raises(InputError, match="must return a frame with rows of the frame it was given"):
        an.preprocess_df(write(tmp_path, DIRTY), canvas(), extra_steps=[step])


@pytest.mark.parametrize("row", [0, 99, -1], ids=["dropped before", "beyond", "before"])
def test_rows_that_a_step_was_not_given_are_refused(row):
    raw = pd.DataFrame({"a": [1, 2, 3]})

    def foreign(df):
        return df.set_axis([an.ROW_BASE + row, *df.index[1:]])

    with pytest.raises(InputError, match="cleaning step foreign must return"):
        an.run_steps(raw, {"first": lambda df: df.iloc[1:], "foreign": foreign})


def test_rows_keep_their_account_in_any_order_and_down_to_none():
    raw = pd.DataFrame(
        {"a": [1, 2, 3, 4], **{name: [1.0, 2.0, 3.0, 4.0] for name in an.BOX_COLUMNS}}
    )
    steps = {
        "turn": lambda df: df.iloc[::-1].assign(xmin=df["xmin"] + 10),
        "drop": lambda df: df[df["a"] != 3],
        "change": lambda df: df.assign(a=df["a"].where(df["a"] > 1, 9)),
        "all": lambda df: pd.DataFrame(columns=df.columns),
    }
    cleaned = an.run_steps(raw, steps)
    report = cleaned.report.set_index("step")
    assert report["changed"].to_dict() == {"turn": 4, "drop": 0, "change": 1, "all": 0}
    assert report["dropped"].tolist() == [0, 1, 0, 3]
    lost = cleaned.quarantine
    assert lost["row"].tolist() == [0, 1, 2, 3]
    assert lost["reason"].tolist() == ["all", "all", "drop", "all"]
    assert lost["px_xmin"].tolist() == [11, 12, 13, 14]
    assert lost["a"].tolist() == [1, 2, 3, 4]  # as they came


def test_what_own_steps_break_is_still_caught(tmp_path):
    def shrink(df):
        return df.assign(diameter=1e-7)

    with pytest.raises(InputError, match="no valid row left"):
        an.preprocess_df(write(tmp_path, DIRTY), canvas(), extra_steps=[shrink])


def test_a_failing_step_is_named(tmp_path):
    def broken(df):
        return df["nothing"]

    with pytest.raises(InputError, match=r"table\.csv: cleaning step broken failed"):
        an.preprocess_df(write(tmp_path, DIRTY), canvas(), extra_steps=[broken])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pixel_x,pixel_y,label\n1,2,a\n", r"lacks the columns \['diameter'\]; it has"),
        ("pixel_x,pixel_y,diameter,label\n1,2,x,a\n", "no valid row left of 1"),
    ],
)
def test_unusable_tables_are_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        an.preprocess_df(write(tmp_path, text), canvas())


def test_rasters_are_cleaned_together_and_files_written(prepared):
    folder = prepared.folder / "clean"
    labels = {label for image in prepared.images for label in image.df["label"]}
    assert labels == {"crater", "boulder", "Unknown"}
    for image in prepared.images:
        written = pd.read_csv(folder / f"{image.image_identifier}.csv")
        pd.testing.assert_frame_equal(written, image.df, check_dtype=False)
        assert (folder / f"{image.image_identifier}_quarantine.csv").exists()
    assert set(prepared.report["raster"]) == {"one", "two"}


def test_a_lambda_from_a_cell_runs_in_worker_processes(small_sample, tmp_path):
    limit = 20.0
    images, _ = an.clean_annotations(
        small_sample.tables, small_sample.rasters, output_dir=tmp_path,
        extra_filters=[lambda x0, y0, x1, y1, diam, w, h: diam > limit],
        **(small_sample.cleaning | {"workers": 2}),
    )  # fmt: skip
    assert all((image.df["diameter"] > limit).all() for image in images)


def test_a_million_rows_are_clean_within_three_seconds(tmp_path):
    rng = np.random.default_rng(0)
    n = 1_000_000
    diameter = np.char.mod("%.2f", rng.uniform(1, 24, n)).astype(object)
    diameter[rng.integers(n, size=5000)] = "unknown"
    path = tmp_path / "m.csv"
    fileio.write_table(
        path,
        pd.DataFrame(
            {"pixel_x": rng.uniform(0, 60000, n).round(2),
             "pixel_y": rng.uniform(0, 60000, n).round(2),
             "diameter": diameter, "label": rng.choice(["crater", "boulder"], n)}
        ),
    )  # fmt: skip
    times = []
    for _ in range(3):
        start = time.process_time()  # s of computing, whatever else the machine does
        cleaned = an.preprocess_df(path, canvas(60000, 60000), diameter_scale=3, max_diameter=25)
        times.append(time.process_time() - start)
    assert len(cleaned.df) + len(cleaned.quarantine) == n
    assert min(times) < 3


# ---------------------------------------------------------------------------------------------
# Any annotation: coordinates, geometries, choices
# ---------------------------------------------------------------------------------------------

NORTH_UP = (0.5, 0, 500_000, 0, -0.5, 4_000_000)  # 0.5 m
MOON = "+proj=eqc +R=1737400 +lon_0=30 +units=m +no_defs"


def located(crs="EPSG:32633", transform=NORTH_UP, **size):
    wkt = rasterio.crs.CRS.from_user_input(crs).to_wkt()
    return canvas(crs=wkt, transform=transform, **size)


def features(path, shapes, crs="EPSG:32633", **columns):
    gpd.GeoDataFrame(columns, geometry=shapes, crs=crs).to_file(path, index=False)
    return path


def on_map(raster, shape, crs=None):
    """Move a shape from px to the raster's CRS, or to another."""
    series = gpd.GeoSeries([shapely.transform(shape, raster.to_map)], crs=raster.crs)
    return (series if crs is None else series.to_crs(crs))[0]


def boxes_of(cleaned):
    return cleaned.df[an.BOX_COLUMNS].to_numpy()


@pytest.mark.filterwarnings("ignore:'crs' was not provided")
@pytest.mark.parametrize("suffix", ["gpkg", "shp", "fgb", "geojson"])
@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:4326", "EPSG:3857"])
def test_polygons_in_any_crs_land_on_their_pixels(tmp_path, suffix, crs):
    raster = located(transform=(0.4, 0.3, 500_000, 0.3, -0.4, 4_000_000))
    shape = shapely.Polygon([(10, 20), (30, 25), (15, 60)])
    path = features(tmp_path / f"x.{suffix}", [on_map(raster, shape, crs)], crs, label=["a"])
    cleaned = an.read_annotations(path, raster)
    tolerance = 1e-2 if suffix == "geojson" and crs == "EPSG:4326" else 1e-5  # GDAL's 7 digits
    np.testing.assert_allclose(boxes_of(cleaned), [[10, 20, 30, 60]], atol=3 * tolerance)
    assert shapely.hausdorff_distance(cleaned.df["geometry"][0], shape) < 3 * tolerance
    row = cleaned.df.loc[0, ["pixel_x", "pixel_y", "diameter", "label"]].tolist()
    assert row[:3] == pytest.approx([20, 40, 40], abs=3 * tolerance)
    assert row[3] == "a"


@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:4326"])
def test_points_have_their_diameter_in_metres(tmp_path, crs):
    raster = located()
    point = on_map(raster, shapely.Point(40, 30), crs)
    path = features(tmp_path / "x.gpkg", [point] * 3, crs, label=list("abc"), diameter=[4.0, 0, 1])
    cleaned = an.read_annotations(path, raster, default_diameter=1.5, diameter_scale=2)
    # 2 px a metre, and the projection's scale of 0.9996
    np.testing.assert_allclose(cleaned.df["diameter"], [16, 6, 4], rtol=1e-3)
    np.testing.assert_allclose(cleaned.df[["pixel_x", "pixel_y"]], [[40, 30]] * 3, atol=1e-5)
    assert "geometry" not in cleaned.df
    limited = an.preprocess_df(
        path, raster, default_diameter=1.5, diameter_scale=2, max_diameter=1.5
    )
    assert limited.df["label"].tolist() == ["c"]
    assert set(limited.quarantine["reason"]) == {"not under MAX_DIAMETER, 3 m (polygons: 1.5 px)"}


def test_points_without_diameters_take_the_default(tmp_path):
    path = features(tmp_path / "x.gpkg", [on_map(located(), shapely.Point(9, 9))], label=[1])
    cleaned = an.read_annotations(path, located(), default_diameter=3)
    np.testing.assert_allclose(cleaned.df["diameter"], 6, rtol=1e-3)
    assert cleaned.df["label"].tolist() == ["1"]


def test_circles_on_the_ground_are_ellipses_of_geographic_pixels():
    """At 60 degrees a degree of longitude is half as long, so the box is twice as wide."""
    raster = located("EPSG:4326", (1e-5, 0, 12, 0, -1e-5, 60))
    table = pd.DataFrame(
        {"pixel_x": [12.0005], "pixel_y": [59.9995], "diameter": [10.0], "label": ["a"]}
    )
    with tempfile.TemporaryDirectory() as folder:
        path = fileio.write_table(Path(folder) / "x.csv", table)
        cleaned = an.read_annotations(path, raster, coordinates="map")
    ((xmin, ymin, xmax, ymax),) = boxes_of(cleaned)
    assert (xmin + xmax, ymin + ymax) == pytest.approx((100, 100), abs=1e-6)
    assert ymax - ymin == pytest.approx(10 / 1.11412, rel=1e-3)  # m per 1e-5 degrees at 60 N
    assert xmax - xmin == pytest.approx(10 / 0.5580, rel=1e-3)
    assert cleaned.df["diameter"].tolist() == [xmax - xmin]


@settings(max_examples=25, deadline=None)
@given(st.floats(-170, 170), st.floats(0.2, 3))
def test_boxes_touch_the_ellipse_of_a_turned_raster(turn, stretch):
    angle = np.radians(turn)
    cos, sin = np.cos(angle), np.sin(angle)
    raster = located(transform=(cos, stretch * sin, 5e5, sin, -stretch * cos, 4e6))
    circle = shapely.Point(raster.to_map(np.array([[50.0, 40.0]]))[0]).buffer(5, quad_segs=256)
    expected = shapely.transform(circle, raster.to_pixel).bounds
    with tempfile.TemporaryDirectory() as folder:
        path = features(Path(folder) / "x.gpkg", [circle.centroid], label=["a"], diameter=[10])
        cleaned = an.read_annotations(path, raster)
    np.testing.assert_allclose(boxes_of(cleaned), [expected], rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("coordinates", "crs"),
    [("map", None), ("lonlat", "EPSG:4326"), ("EPSG:3857", "EPSG:3857"), ("pixel", "px")],
)
@pytest.mark.parametrize("box_source", ["diameter", "columns"])
def test_tables_may_hold_map_coordinates(tmp_path, coordinates, crs, box_source):
    raster = located()
    corners = shapely.MultiPoint([(10, 20), (12, 24)])
    corners = corners if crs == "px" else on_map(raster, corners, crs)
    (x0, y1, x1, y0), center = corners.bounds, corners.centroid
    table = pd.DataFrame({
        "lon": [center.x], "lat": [center.y], "diameter": [1.0], "label": ["a"], "xmin": [x0],
        "ymin": [y0], "xmax": [x1], "ymax": [y1],
    })  # fmt: skip
    path = fileio.write_table(tmp_path / "x.csv", table)
    cleaned = an.read_annotations(
        path, raster, coordinates=coordinates, box_source=box_source, x_column="lon",
        y_column="lat",
    )  # fmt: skip
    half = 0.5 if crs == "px" else 1
    expected = [10, 20, 12, 24] if box_source == "columns" else (
        [11 - half, 22 - half, 11 + half, 22 + half]
    )  # fmt: skip
    np.testing.assert_allclose(boxes_of(cleaned), [expected], atol=0.06)
    assert "geometry" not in cleaned.df


def test_lonlat_on_the_moon_is_the_moons_own(tmp_path):
    raster = located(MOON, (100, 0, 0, 0, -100, 0))
    path = write(tmp_path, "pixel_x,pixel_y,diameter,label\n30.01,-0.01,1000,a\n")
    cleaned = an.read_annotations(path, raster, coordinates="lonlat")
    expected = np.radians(0.01) * 1_737_400 / 100
    np.testing.assert_allclose(cleaned.df[["pixel_x", "pixel_y"]], [[expected] * 2], rtol=1e-6)
    np.testing.assert_allclose(cleaned.df["diameter"], 10, rtol=1e-6)


@pytest.mark.parametrize(
    ("raster", "coordinates", "message"),
    [
        (canvas(), "map", "has no coordinate reference system and so takes pixel coordinates"),
        (canvas(), "EPSG:4326", "takes pixel coordinates only"),
        (located(), "EPSG:nothing", "cannot be placed"),
        (located(), "longlat", "cannot be placed"),
        (located(MOON), "EPSG:4326", "cannot be placed"),
    ],
)
def test_coordinates_that_have_no_place_are_refused(tmp_path, raster, coordinates, message):
    with pytest.raises(InputError, match=message):
        an.read_annotations(write(tmp_path, DIRTY), raster, coordinates=coordinates)


def test_a_vector_file_with_a_crs_needs_a_raster_with_one(tmp_path):
    path = features(tmp_path / "x.gpkg", [shapely.box(1, 2, 3, 4)], label=["a"])
    with pytest.raises(InputError, match="or georeference the raster"):
        an.read_annotations(path, canvas())
    assert boxes_of(an.read_annotations(path, canvas(), coordinates="pixel")).tolist() == [
        [1, 2, 3, 4]
    ]


def test_every_geometry_is_used_or_quarantined_with_its_reason(tmp_path):
    raster = located()
    bow = shapely.Polygon([(0, 0), (10, 10), (10, 0), (0, 10)])
    shapes = [
        shapely.box(10, 10, 20, 30), bow, shapely.Point(50, 50), None, shapely.Polygon(),
        shapely.LineString([(0, 0), (5, 5)]), shapely.MultiPoint([(0, 0), (5, 5)]),
        shapely.Polygon([(0, 0), (5, 5), (0, 0)]), shapely.Point(5, 5),
        shapely.GeometryCollection([shapely.Point(0, 0), shapely.box(40, 40, 44, 46)]),
    ]  # fmt: skip
    moved = [shape and on_map(raster, shape) for shape in shapes]
    path = tmp_path / "x.parquet"
    gpd.GeoDataFrame(
        {"label": list("abcdefghij"), "diameter": [2.0] * 8 + [None, 2.0]},
        geometry=moved, crs=raster.crs,
    ).to_parquet(path)  # fmt: skip
    cleaned = an.read_annotations(path, raster)
    assert cleaned.df["label"].tolist() == ["a", "b", "c", "j"]
    np.testing.assert_allclose(
        boxes_of(cleaned), [[10, 10, 20, 30], [0, 0, 10, 10], [48, 48, 52, 52], [40, 40, 44, 46]],
        atol=2e-3,
    )  # fmt: skip
    assert dict(zip(cleaned.quarantine["label"], cleaned.quarantine["reason"], strict=True)) == {
        "d": "no geometry", "e": "no geometry", "f": "neither point nor polygon",
        "g": "neither point nor polygon", "h": "neither point nor polygon",
        "i": "point without a diameter",
    }  # fmt: skip
    report = cleaned.report.set_index("step")
    assert report.loc["invalid geometry repaired", "changed"] == 3  # the bow, the needle, the set
    assert cleaned.df["geometry"].isna().tolist() == [False, False, True, False]
    assert cleaned.df["geometry"].iloc[1].geom_type == "MultiPolygon"


def test_what_lies_outside_the_projection_is_quarantined(tmp_path):
    shapes = [shapely.Point(15, 36.1), shapely.Point(15, 95), shapely.Point(np.inf, 3)]
    path = tmp_path / "x.parquet"
    gpd.GeoDataFrame({"label": list("abc")}, geometry=shapes, crs=4326).to_parquet(path)
    cleaned = an.read_annotations(path, located())
    assert cleaned.df["label"].tolist() == ["a"]
    assert cleaned.quarantine["reason"].tolist() == [
        "outside the projection", "coordinates not finite",
    ]  # fmt: skip


def test_layers_are_chosen_by_name(tmp_path):
    path = tmp_path / "x.gpkg"
    for number, name in enumerate(["one", "two"]):
        frame = gpd.GeoDataFrame(
            {"label": [name]}, geometry=[shapely.box(0, 0, 1 + number, 1)], crs=32633
        )
        frame.to_file(path, layer=name)
    frame.iloc[:0].to_file(path, layer="none")
    cleaned = an.read_annotations(path, located(), layer="two")
    assert cleaned.df["label"].tolist() == ["two"]
    for layer, message in (
        (None, r"\['one', 'two', 'none'\]; name one with LAYER"),
        ("three", r"no layer 'three', only \['one', 'two', 'none'\]"),
        ("none", "layer 'none' of .* is empty"),
    ):
        with pytest.raises(InputError, match=message):
            an.read_annotations(path, located(), layer=layer)


def test_attributes_choose_rows_in_every_format(tmp_path):
    raster = located()
    shapes = [on_map(raster, shapely.Point(i, i)) for i in (10, 20, 30)]
    vector = features(tmp_path / "x.gpkg", shapes, label=list("abc"), size=[1, 2, None])
    rows = [f"{i},{i},3,{label},{i // 10}" for i, label in ((10, "a"), (20, "b"))]
    table = write(tmp_path, "\n".join(["pixel_x,pixel_y,diameter,label,size", *rows]))
    for path in (vector, table):
        cleaned = an.read_annotations(path, raster, attribute_filter="size > 1 and label != 'q'")
        assert cleaned.df["label"].tolist() == ["b"]
        assert set(cleaned.quarantine["reason"]) == {"not selected by ATTRIBUTE_FILTER"}
        for bad in ("sise > 1", "size >", "1", "size + 1", "@raster", "import os"):
            with pytest.raises(InputError, match=r"ATTRIBUTE_FILTER .* columns are \['"):
                an.read_annotations(path, raster, attribute_filter=bad)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2], ["1", "2"]), ([1.0, 2.5], ["1", "2.5"]), ([1.0, None], ["1", "rest"]),
        (["01", ""], ["01", "rest"]), ([True, False], ["True", "False"]),
        (pd.array([2**60 + 1, None], dtype="Int64"), [str(2**60 + 1), "rest"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["gpkg", "parquet"])
def test_labels_of_any_type_become_text(tmp_path, values, expected, suffix):
    frame = gpd.GeoDataFrame({"kind": values}, geometry=[shapely.box(0, 0, 1, 1)] * 2, crs=32633)
    path = tmp_path / f"x.{suffix}"
    frame.to_parquet(path) if suffix == "parquet" else frame.to_file(path)
    cleaned = an.read_annotations(path, located(), label_column="kind", default_label="rest")
    assert cleaned.df["label"].tolist() == expected


def test_a_file_without_labels_needs_a_default(tmp_path):
    path = features(tmp_path / "x.gpkg", [shapely.box(0, 0, 1, 1)], kind=["a"])
    with pytest.raises(InputError, match=r"lacks the columns \['label'\]; it has \['kind', 'geom"):
        an.read_annotations(path, located())
    cleaned = an.read_annotations(path, located(), default_label="building")
    assert cleaned.df["label"].tolist() == ["building"]


def test_duplicates_are_told_and_dropped_when_asked(tmp_path, caplog):
    rows = ["5,5,4,a", "5,5.0000001,4,a", "5,5,4,b", "5,5,4,", "5,5,4,", "5,5,5,a"]
    path = write(tmp_path, "\n".join(["pixel_x,pixel_y,diameter,label", *rows]))
    assert len(an.read_annotations(path, canvas()).df) == 6
    assert "2 objects have the label and box of another" in caplog.text
    cleaned = an.preprocess_df(path, canvas(), drop_duplicates=True)
    assert len(cleaned.df) == 4
    assert cleaned.quarantine[["reason", "row"]].to_numpy().tolist() == [
        ["duplicate", 1], ["duplicate", 4],
    ]  # fmt: skip
    assert "2 duplicates dropped" in caplog.text


def test_rows_of_other_rasters_do_not_count(tmp_path):
    rows = ["01.tif,5,5,4,a", r"c:\data\01.png,6,6,4,a", "1.tif,7,7,4,a", ",8,8,4,a"]
    path = write(tmp_path, "\n".join(["image,pixel_x,pixel_y,diameter,label", *rows]))
    cleaned = an.read_annotations(path, canvas(name="d/01.tif"), image_column="image")
    assert cleaned.df["pixel_x"].tolist() == [5, 6]
    assert cleaned.quarantine["reason"].tolist() == ["names another raster"] * 2
    with pytest.raises(InputError, match=r"no row of .* names the raster x\.tif"):
        an.read_annotations(path, canvas(name="x.tif"), image_column="image")
    with pytest.raises(InputError, match=r"lacks the columns \['picture'\]"):
        an.read_annotations(path, canvas(), image_column="picture")


def test_the_quarantine_tells_where_a_row_would_have_been(tmp_path):
    """A column of the file that is called xmin is no box in pixels."""
    text = DIRTY.replace("label", "label,xmin,ymin,xmax,ymax").replace(",a", ",a,1,1,2,2")
    cleaned = an.preprocess_df(
        write(tmp_path, text.replace(",b", ",b,1,1,2,2")), canvas(), diameter_scale=3,
        max_diameter=25,
    )  # fmt: skip
    boxes = cleaned.quarantine.set_index("row")[["px_xmin", "px_ymin", "px_xmax", "px_ymax"]]
    assert boxes.loc[6].tolist() == [-6.5, 42.5, 8.5, 57.5]
    assert boxes.loc[5].tolist() == [-590, -590, 610, 610]
    assert boxes.loc[[1, 2, 8]].isna().all(axis=None)


def test_geometries_are_counted_as_changed_only_when_they_change():
    df = pd.DataFrame({"geometry": [shapely.Point(0, 0), shapely.Point(1, 1), None]})
    moved = {
        "move": lambda df: df.assign(geometry=[df["geometry"].iloc[0], shapely.Point(2, 1), None])
    }
    assert an.run_steps(df, moved).report["changed"].tolist() == [1]


real_data = pytest.mark.skipif(
    not REAL_DATA.exists(), reason="the real rasters are not on this machine"
)


@real_data
def test_real_buildings_agree_with_their_published_boxes():
    folder = REAL_DATA / "buildings"
    raster = fileio.read_raster(folder / "fair_oam_z21_mosaic.tif")
    cleaned = an.read_annotations(
        folder / "fair_oam_buildings_z21.gpkg", raster, default_label="building"
    )
    assert len(cleaned.df) == 108
    assert cleaned.report.set_index("step").loc["invalid geometry repaired", "changed"] == 1
    boxes = an.clip_bboxes(cleaned.df, raster.width, raster.height)[an.BOX_COLUMNS].to_numpy()
    table = an.read_annotations(folder / "fair_oam_z21.csv", raster, box_source="columns")
    published = boxes_of(table)
    nearest = np.abs(boxes[:, None] - published[None]).max(axis=2)
    assert nearest.min(axis=0).max() < 0.02  # the boxes are rounded to 0.01 px
    assert len(set(nearest.argmin(axis=0))) == len(published)


@real_data
def test_real_land_cover_paints_its_published_mask():
    folder = REAL_DATA / "landcover"
    raster = fileio.read_raster(folder / "tiff_3channel_uint8.tif")
    cleaned = an.read_annotations(folder / "tiff_3channel_uint8.geojson", raster)
    assert len(cleaned.df) == 56
    assert set(cleaned.df["label"]) == {"1", "2", "3"}
    painted = rasterio.features.rasterize(
        zip(cleaned.df["geometry"], cleaned.df["label"].astype(int), strict=True),
        out_shape=(raster.height, raster.width),
    )
    mask = np.asarray(PIL.Image.open(folder / "mask_tiff_3channel_uint8.png"))
    assert (painted == mask).mean() == 1


def test_a_polygon_cut_at_the_edge_is_bound_by_what_is_left_of_it(tmp_path):
    raster = located()
    wedge = shapely.Polygon([(12, 10), (-8, 40), (12, 20)])
    hook = shapely.Polygon([(-9, 50), (20, 50), (20, 49), (-10, 49), (-10, 90), (-9, 90)])
    path = features(tmp_path / "x.gpkg", [on_map(raster, s) for s in (wedge, hook)], label=[1, 2])
    cleaned = an.preprocess_df(path, raster, clip_to_raster=True)
    np.testing.assert_allclose(boxes_of(cleaned), [[0, 10, 12, 32], [0, 49, 20, 50]], atol=1e-6)


def place(tmp_path, name, side=200, **profile):
    path = tmp_path / name
    with fileio.create_raster(path, width=side, height=side, count=1, dtype="uint8", **profile):
        pass
    return fileio.read_raster(path)


def test_objects_outside_the_area_of_interest_go_and_their_ground_does_not_count(tmp_path):
    raster = place(tmp_path, "r.tif")
    table = write(tmp_path, "pixel_x,pixel_y,diameter,label\n" + "\n".join([
        "50,50,10,a", "101,50,10,a", "150,50,10,a", "30,30,10,a", "80,80,4000,a", "198,60,8,a",
        "41,41,6,a",
    ]) + "\n")  # fmt: skip
    for name, box in (("aoi", (0, 0, 100, 200)), ("ignore", (25, 25, 40, 40))):
        df = gpd.GeoDataFrame(geometry=[shapely.box(*box)])
        df.to_file(tmp_path / f"{name}.gpkg")
    images, _ = an.clean_annotations(
        [table], [raster], label_percentile=100, output_dir=tmp_path / "clean", max_diameter=100,
        region_paths=[(tmp_path / "aoi.gpkg", tmp_path / "ignore.gpkg")],
    )  # fmt: skip
    assert images[0].df["pixel_x"].tolist() == [50, 41]
    quarantine = pd.read_csv(tmp_path / "clean" / "r_quarantine.csv")
    assert dict(zip(quarantine["pixel_x"], quarantine["reason"], strict=True)) == {
        101: an.OUTSIDE_AOI, 150: an.OUTSIDE_AOI, 30: an.IGNORED,
        80: "not under MAX_DIAMETER, 100 px", 198: an.OUTSIDE_AOI,
    }  # fmt: skip
    regions = images[0].raster.regions
    # 97 is inside, but under the box of the object whose centre lies at 101
    asked = {(50, 100): True, (97, 50): False, (97, 70): True, (30, 30): False, (150, 50): False}
    assert regions.contain(*np.transpose(list(asked))).tolist() == list(asked.values())
    mask = regions.mask(Window(90, 45, 20, 10))
    assert mask[:, :6].all()
    assert not mask[:, 6:].any()


def test_the_ground_of_objects_over_the_edge_does_not_count_unless_they_are_noise(tmp_path):
    raster = place(tmp_path, "r.tif")
    rows = "50,50,20,a\n2,100,10,a\n-3,30,12,a\n-1000,20,2100,a\n100,199,300,a\n20,140,60,a\n"
    table = write(tmp_path, "pixel_x,pixel_y,diameter,label\n" + rows)
    options = {"label_percentile": 100, "output_dir": tmp_path / "clean", "max_diameter": 100}
    images, _ = an.clean_annotations([table], [raster], **options)
    regions = images[0].raster.regions
    edge = (-10, 110, 50, 170)  # larger than any object that is kept
    assert [part.bounds for part in regions.ignored] == [(-3, 95, 7, 105), (-9, 24, 3, 36), edge]
    images, _ = an.clean_annotations([table], [raster], **options, clip_to_raster=True)
    assert [part.bounds for part in images[0].raster.regions.ignored] == [(-9, 24, 3, 36)]


def test_the_ground_of_a_crowd_does_not_count(tmp_path):
    raster = place(tmp_path, "r.tif")
    one = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 10, 20, 20], "iscrowd": 0}
    crowd = one | {"id": 2, "bbox": [100, 100, 50, 60], "iscrowd": 1}
    coco = {
        "images": [{"id": 7, "file_name": "r.tif", "width": 200, "height": 200}],
        "categories": [{"id": 3, "name": "boulder"}], "annotations": [one, crowd],
    }  # fmt: skip
    path = fileio.write_json(tmp_path / "coco.json", coco)
    images, _ = an.clean_annotations(
        [path], [raster], label_percentile=100, output_dir=tmp_path / "clean"
    )
    assert images[0].df["xmin"].tolist() == [10]
    assert [part.bounds for part in images[0].raster.regions.ignored] == [(100, 100, 150, 160)]
    quarantine = pd.read_csv(tmp_path / "clean" / "r_quarantine.csv")
    assert quarantine["reason"].tolist() == [an.CROWD]


def test_points_without_a_diameter_are_reported_and_single_multipoints_are_points(tmp_path, caplog):
    raster = place(tmp_path, "r.tif")
    shapes = [shapely.MultiPoint([(20, 30)]), shapely.Point(50, 60)]
    df = gpd.GeoDataFrame({"diam": [5, 6], "label": ["a", "b"]}, geometry=shapes)
    df.to_file(tmp_path / "points.gpkg")
    cleaned = an.read_annotations(tmp_path / "points.gpkg", raster, default_diameter=4)
    assert cleaned.df["diameter"].tolist() == [4, 4]
    assert "has no attribute 'diameter', only ['diam', 'label']" in caplog.text
    caplog.clear()
    options = {"default_diameter": 4, "diameter_column": "diam"}
    assert an.read_annotations(tmp_path / "points.gpkg", raster, **options).df[
        "diameter"
    ].tolist() == [5, 6]
    assert not caplog.records


def test_regions_that_cannot_belong_to_the_raster_are_refused(tmp_path):
    raster = place(
        tmp_path, "r.tif", crs="EPSG:32633", transform=rasterio.Affine(1, 0, 5e5, 0, -1, 5e6)
    )
    far = gpd.GeoDataFrame(geometry=[shapely.box(0, 0, 10, 10)], crs="EPSG:32633")
    far.to_file(tmp_path / "far.gpkg")
    with pytest.raises(InputError, match=r"no polygon of .*far\.gpkg lies on .*r\.tif"):
        an.read_regions(tmp_path / "far.gpkg", None, raster, "auto")
    table = write(tmp_path, "a,b\n1,2\n")
    with pytest.raises(InputError, match="holds no polygons"):
        an.read_regions(None, table, raster, "auto")
    near = far.set_geometry([shapely.box(500_010, 4_999_950, 500_030, 4_999_990)])
    near.to_crs("EPSG:4326").to_file(tmp_path / "near.geojson")
    regions = an.read_regions(tmp_path / "near.geojson", None, raster, "auto")
    assert regions.aoi[0].bounds == pytest.approx((10, 10, 30, 50), abs=0.01)
