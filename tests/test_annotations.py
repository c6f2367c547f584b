"""Cleaning: what each step does, and that no row is lost unseen."""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import annotations as an
import fileio
from ImageData import InputError


def frame(**columns):
    defaults = {"pixel_x": [50.0, 60.0], "pixel_y": [40.0, 30.0], "diameter": [10.0, 6.0]}
    return pd.DataFrame({**defaults, "label": ["a", "b"], **columns})


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
    cleaned = an.preprocess_df(
        write(tmp_path, DIRTY), (100, 100), diameter_scale=3, max_diameter=25
    )
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
        cleaned = an.preprocess_df(
            table, (raster.height, raster.width), diameter_scale=3, max_diameter=25
        )
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
    an.preprocess_df(write(tmp_path, text), (100, 100), max_diameter=25)
    assert "2 of 3 rows dropped: not under MAX_DIAMETER, 25 px" in caplog.text


def test_clipping_keeps_objects_over_the_edge(tmp_path):
    cleaned = an.preprocess_df(
        write(tmp_path, DIRTY), (100, 100), diameter_scale=3, max_diameter=25, clip_to_raster=True
    )
    boxes = cleaned.df[an.BOX_COLUMNS].to_numpy()
    assert len(boxes) == 5  # the centre decides: what lies off the raster goes
    assert boxes.min() >= 0
    assert boxes.max() <= 100


def test_boxes_of_the_table_are_used_when_asked(tmp_path):
    path = write(tmp_path, "xmin,ymin,xmax,ymax,label\n30,10,10,20,a\n5,5,5,9,a\n")
    cleaned = an.preprocess_df(path, (100, 100), box_source="columns", max_diameter=99)
    assert cleaned.df[an.BOX_COLUMNS].to_numpy().tolist() == [[10, 10, 30, 20]]
    assert cleaned.df[["pixel_x", "pixel_y", "diameter"]].to_numpy().tolist() == [[20, 15, 20]]
    assert cleaned.quarantine["reason"].tolist() == ["no area"]


def test_columns_may_have_other_names(tmp_path):
    path = write(tmp_path, "pixel_x,pixel_y,size,kind\n50,50,4,a\n")
    cleaned = an.preprocess_df(path, (100, 100), diameter_column="size", label_column="kind")
    assert cleaned.df[["diameter", "label"]].to_numpy().tolist() == [[4.0, "a"]]


def test_own_filters_and_steps_are_named_in_the_report(tmp_path):
    def big_enough(x_min, y_min, x_max, y_max, diam, sizex, sizey):
        return diam > 2

    def no_b(df):
        return df[df["label"] != "b"]

    cleaned = an.preprocess_df(
        write(tmp_path, DIRTY), (100, 100), diameter_scale=3, max_diameter=25,
        extra_filters=[big_enough], extra_steps=[no_b],
    )  # fmt: skip
    assert {"big_enough", "no_b"} <= set(cleaned.report["step"])
    assert cleaned.df["label"].tolist() == ["a"]
    assert (cleaned.quarantine["reason"] == "no_b").sum() == 3


def test_two_lambdas_are_two_filters(tmp_path):
    cleaned = an.preprocess_df(
        write(tmp_path, "pixel_x,pixel_y,diameter,label\n50,50,4,a\n50,50,20,a\n50,50,40,a\n"),
        (100, 100),
        extra_filters=[
            lambda x0, y0, x1, y1, diam, w, h: diam > 10,
            lambda x0, y0, x1, y1, diam, w, h: diam < 30,
        ],
    )
    assert cleaned.df["diameter"].tolist() == [20.0]
    assert cleaned.quarantine["reason"].tolist() == ["<lambda>", "<lambda> 2"]


def test_labels_stay_as_they_are_written(tmp_path):
    path = write(tmp_path, "pixel_x,pixel_y,diameter,label\n5,5,4,01\n9,9,4,NA\n7,7,4,\n")
    cleaned = an.preprocess_df(path, (100, 100))
    assert cleaned.df["label"].tolist()[:2] == ["01", "NA"]
    assert cleaned.df["label"].isna().tolist() == [False, False, True]


def test_own_steps_move_objects_with_their_boxes(tmp_path):
    path = write(tmp_path, "pixel_x,pixel_y,diameter,label\n50,50,3,a\n")
    cleaned = an.preprocess_df(
        path, (100, 100), diameter_scale=3,
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
        an.preprocess_df(write(tmp_path, DIRTY), (100, 100), extra_steps=[step])


def test_what_own_steps_break_is_still_caught(tmp_path):
    def shrink(df):
        return df.assign(diameter=1e-7)

    with pytest.raises(InputError, match="no valid row left"):
        an.preprocess_df(write(tmp_path, DIRTY), (100, 100), extra_steps=[shrink])


def test_a_failing_step_is_named(tmp_path):
    def broken(df):
        return df["nothing"]

    with pytest.raises(InputError, match=r"table\.csv: cleaning step broken failed"):
        an.preprocess_df(write(tmp_path, DIRTY), (100, 100), extra_steps=[broken])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pixel_x,pixel_y,label\n1,2,a\n", r"lacks the columns \['diameter'\]; it has"),
        ("pixel_x,pixel_y,diameter,label\n1,2,x,a\n", "no valid row left of 1"),
    ],
)
def test_unusable_tables_are_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        an.preprocess_df(write(tmp_path, text), (100, 100))


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
        start = time.perf_counter()
        cleaned = an.preprocess_df(path, (60000, 60000), diameter_scale=3, max_diameter=25)
        times.append(time.perf_counter() - start)
    assert len(cleaned.df) + len(cleaned.quarantine) == n
    assert min(times) < 3
