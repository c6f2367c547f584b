"""The error atlas: every error once, by kind, on the map."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import pyogrio
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st

import atlas
import fileio
import metrics
from ImageData import BOX_COLUMNS, InputError

THRESHOLD, IOU = 0.5, 0.5


def tables_of(boxes, scores, labels, truth, truth_labels, counted=None, block=0, raster="r"):
    """Match as an evaluation does, and tabulate as `trials.write_detections` does."""
    boxes, truth = (np.asarray(b, float).reshape(-1, 4) for b in (boxes, truth))
    counted = np.ones(len(truth), bool) if counted is None else np.asarray(counted)
    place = {"raster": raster, "block": block}
    found = metrics.match_boxes(boxes, np.asarray(scores), truth, IOU, ~counted)
    detections = pd.DataFrame(boxes, columns=BOX_COLUMNS).assign(
        **place, label=labels, score=scores, found=found
    )
    objects = pd.DataFrame(truth, columns=BOX_COLUMNS).assign(
        **place, object=np.arange(len(truth)), label=truth_labels, counted=counted
    )
    return detections, objects


def classify(*tables):
    return atlas.classify_errors(*tables, THRESHOLD, IOU)


def at(x, width=10):
    return [x, 0, x + width, 10]


CASES = {
    # name: detections (box, score, label), objects (box, label, counted) -> kind, score, IoU, true
    "right": ([(at(0), 0.9, "a")], [(at(0), "a", True)], []),
    "unseen": ([], [(at(0), "a", True)], [("missed", np.nan, np.nan, "a")]),
    "seen at a low score": (
        [(at(1), 0.2, "a")], [(at(0), "a", True)], [("missed", 0.2, 9 / 11, "a")],
    ),
    "other label": ([(at(0), 0.9, "b")], [(at(0), "a", True)], [("mislabelled", 0.9, 1, "a")]),
    "half off": ([(at(6), 0.9, "b")], [(at(0), "a", True)], [("mislocalised", 0.9, 0.25, "a")]),
    "far off": (
        [(at(9), 0.9, "a")], [(at(0), "a", True)],
        [("missed", np.nan, np.nan, "a"), ("spurious", 0.9, 1 / 19, None)],
    ),
    "found twice": (
        [(at(0), 0.9, "a"), (at(1), 0.8, "b")], [(at(0), "a", True)],
        [("duplicate", 0.8, 9 / 11, "a")],
    ),
    "half off an object that is found": (
        [(at(0), 0.9, "a"), (at(6), 0.8, "a")], [(at(0), "a", True)],
        [("spurious", 0.8, 0.25, None)],
    ),
    "half off twice": (
        [(at(6), 0.9, "a"), (at(-6), 0.8, "a")], [(at(0), "a", True)],
        [("spurious", 0.8, 0.25, None), ("mislocalised", 0.9, 0.25, "a")],
    ),
    "half off, and found at a low score": (
        [(at(6), 0.9, "a"), (at(0), 0.2, "a")], [(at(0), "a", True)],
        [("mislocalised", 0.9, 0.25, "a")],
    ),
    "twin of the nearer of two": (
        [(at(0), 0.9, "a"), (at(2), 0.8, "b"), (at(1.5), 0.7, "b")],
        [(at(0), "a", True), (at(2), "b", True)],
        [("duplicate", 0.7, 9.5 / 10.5, "b")],
    ),
    "on ground that does not count": ([(at(0), 0.9, "b")], [(at(0), "a", False)], []),
    "an object that does not count": ([], [(at(0), "a", False)], []),
    "nothing at all": ([], [], []),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_error_is_of_one_kind(case):
    found, known, expected = CASES[case]
    boxes, scores, labels = map(list, zip(*found, strict=True)) if found else ([], [], [])
    truth, names, counted = map(list, zip(*known, strict=True)) if known else ([], [], [])
    errors = classify(*tables_of(boxes, scores, labels, truth, names, np.array(counted, bool)))
    assert list(errors.columns) == atlas.COLUMNS
    assert errors["kind"].tolist() == [kind for kind, *_ in expected]
    for name, values in zip(["score", "iou"], list(zip(*expected, strict=True))[1:3], strict=False):
        np.testing.assert_allclose(errors[name], values)
    assert errors["true_label"].astype(object).replace(np.nan, None).tolist() == [
        true for *_, true in expected
    ]


def test_an_error_refers_to_both_its_boxes():
    first = tables_of([at(0), at(6)], [0.6, 0.9], ["a", "b"], [at(0), at(50)], ["a", "c"], block=3)
    second = tables_of([at(0)], [0.1], ["a"], [at(4)], ["c"], block=8, raster="s")
    tables = [pd.concat(parts, ignore_index=True) for parts in zip(first, second, strict=True)]
    # the object of `s` lies where one of `r` does, but is one of its own
    errors = classify(*tables).set_index("kind")
    assert errors.index.tolist() == ["missed", "missed", "spurious"]
    assert errors["raster"].tolist() == ["r", "s", "r"]
    assert errors["block"].tolist() == [3, 8, 3]
    assert errors["object"].tolist() == [1, 0, -1]
    assert errors["detection"].tolist() == [-1, -1, 1]
    assert errors["label"].tolist() == ["c", "c", "b"]
    assert errors[["pixel_x", "pixel_y", "diameter"]].to_numpy().tolist() == [
        [55, 5, 10], [9, 5, 10], [11, 5, 10],
    ]  # fmt: skip
    missed, spurious = errors.iloc[0], errors.iloc[2]
    assert missed[atlas.TRUE_BOX_COLUMNS].tolist() == missed[BOX_COLUMNS].tolist() == at(50)
    assert spurious[BOX_COLUMNS].tolist() == at(6)
    assert spurious[atlas.TRUE_BOX_COLUMNS].isna().all()


def scattered(seed, objects, detections, blocks=1, extent=100.0):
    """Tables of objects, and detections near some of them, in blocks that lie on each other."""
    rng = np.random.default_rng(seed)
    parts = []
    for block in range(blocks):
        corner = rng.uniform(0, extent, (objects, 2))
        truth = np.hstack([corner, corner + rng.uniform(4, 20, (objects, 2))])
        boxes = np.empty((0, 4))
        if objects:
            boxes = truth[rng.integers(objects, size=detections)]
            boxes = boxes + rng.normal(0, 3, boxes.shape)
            boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        labels, names = (rng.choice(["a", "b"], n) for n in (len(boxes), objects))
        scores = rng.permutation(len(boxes)) / max(len(boxes), 1)
        counted = rng.random(objects) < 0.9
        parts.append(tables_of(boxes, scores, labels, truth, names, counted, block, f"r{block}"))
    return [pd.concat(tables, ignore_index=True) for tables in zip(*parts, strict=True)]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(0, 30), st.integers(0, 60), st.integers(1, 3))
def test_the_kinds_add_up_to_all_objects_and_all_detections(seed, objects, count, blocks):
    detections, truth = scattered(seed, objects, count, blocks)
    errors = classify(detections, truth)
    of = errors.groupby("kind", observed=False).size()
    shown = detections[(detections["score"] >= THRESHOLD) & (detections["found"] != -2)]
    hits = shown.merge(
        truth, left_on=["block", "found"], right_on=["block", "object"], suffixes=("", "_true")
    )
    right = (hits["label"] == hits["label_true"]).sum()
    wrong = of["mislabelled"] + of["mislocalised"]
    assert right + wrong + of["missed"] == truth["counted"].sum()
    assert right + wrong + of["duplicate"] + of["spurious"] == len(shown)
    # and one by one: no detection and no object is told of twice
    own = errors[errors["kind"] != "missed"]
    assert own["detection"].is_unique
    assert set(own["detection"]) <= set(shown.index)
    lost = errors[errors["kind"].isin(["missed", "mislocalised", "mislabelled"])]
    assert not lost.duplicated(["block", "object"]).any()
    unfound = set(map(tuple, truth.loc[truth["counted"], ["block", "object"]].to_numpy()))
    unfound -= set(map(tuple, shown[["block", "found"]].to_numpy()))
    kinds = lost[lost["kind"] != "mislabelled"]
    assert set(map(tuple, kinds[["block", "object"]].to_numpy())) == unfound


def test_a_hundred_thousand_objects_take_seconds():
    detections, truth = scattered(1, 25_000, 30_000, blocks=4, extent=4000.0)
    start = time.process_time()
    errors = classify(detections, truth)
    assert time.process_time() - start < 10
    assert len(errors) > 10_000


def test_tables_that_do_not_belong_together_are_refused():
    detections, objects = tables_of([at(0), at(55)], [0.9, 0.8], "ab", [at(0), at(50)], "ab")
    with pytest.raises(InputError, match="1 detections found objects that are not listed"):
        classify(detections, objects[1:])
    with pytest.raises(InputError, match="listed twice"):
        classify(detections, pd.concat([objects, objects]))
    for threshold in (0.2, 0.99):
        with pytest.raises(InputError, match=f"at an IoU of {threshold}"):
            atlas.classify_errors(detections.assign(xmin=[0.2, 55]), objects, THRESHOLD, threshold)


def raster_at(path, crs=None, width=64, height=48, **profile):
    transform = rasterio.Affine(2, 0, 500_000, 0, -2, 4_000_000)
    place = {"crs": crs, "transform": transform} if crs else {}
    profile = {"width": width, "height": height, "count": 1, "dtype": "uint8"} | profile
    with fileio.create_raster(path, **profile, **place) as dst:
        dst.write(np.zeros((profile["count"], height, width), profile["dtype"]))
    return fileio.read_raster(path)


def errors_of_two_rasters():
    parts = [
        tables_of(
            [at(0), at(1), at(20), at(46)], [0.9, 0.8, 0.7, 0.6], ["b", "a", "a", "a"],
            [at(0), at(40), at(54)], ["a", "a", "b"], block=block, raster=raster,
        )
        for block, raster in enumerate(["mapped", "plain"])
    ]  # fmt: skip
    return classify(*(pd.concat(tables, ignore_index=True) for tables in zip(*parts, strict=True)))


def test_errors_are_counted_by_kind_and_label():
    counts = atlas.count_errors(errors_of_two_rasters())
    assert counts.index.tolist() == list(atlas.KINDS)
    assert counts["(all)"].tolist() == [2, 2, 2, 2, 2]
    assert counts.loc["missed", ["a", "b"]].tolist() == [0, 2]
    assert atlas.count_errors(classify(*tables_of([], [], [], [], [])))["(all)"].tolist() == [0] * 5


def test_an_atlas_has_a_layer_of_each_kind_on_the_map(tmp_path):
    errors = errors_of_two_rasters()
    rasters = {
        "mapped": raster_at(tmp_path / "mapped.tif", "EPSG:32633"),
        "plain": raster_at(tmp_path / "plain.tif"),
        "flawless": raster_at(tmp_path / "flawless.tif"),
    }
    paths = atlas.write_atlas(errors, rasters, tmp_path / "errors")
    assert [path.name for path in paths] == ["mapped.gpkg", "plain.csv"]
    layers = dict(pyogrio.list_layers(paths[0]))
    assert layers == dict.fromkeys(atlas.KINDS, "Polygon") | {"layer_styles": None}
    missed = pyogrio.read_dataframe(paths[0], layer="missed")
    assert missed.crs.to_epsg() == 32633
    assert missed["score"].isna().all()
    assert missed[["kind", "label", "object"]].to_numpy().tolist() == [["missed", "b", 2]]
    x, y = 500_000, 4_000_000
    assert missed.total_bounds.tolist() == [x + 108, y - 20, x + 128, y]
    nearly = pyogrio.read_dataframe(paths[0], layer="mislocalised")
    assert nearly[["true_label", "score", "iou"]].to_numpy().tolist() == [["a", 0.6, 0.25]]
    assert not {*BOX_COLUMNS, *atlas.TRUE_BOX_COLUMNS} & set(nearly.columns)
    table = pd.read_csv(paths[1])
    assert set(table.columns) == set(atlas.COLUMNS)
    expected = errors[errors["raster"] == "plain"].reset_index(drop=True)
    pd.testing.assert_frame_equal(
        table[atlas.COLUMNS], expected.astype({"kind": str}), check_dtype=False
    )


def test_notes_in_an_atlas_stay_until_the_errors_change(tmp_path):
    errors = errors_of_two_rasters()
    rasters = {name: raster_at(tmp_path / f"{name}.tif") for name in ("mapped", "plain")}
    folder = tmp_path / "errors"
    first, second = atlas.write_atlas(errors, rasters, folder)
    first.write_text(noted := first.read_text() + "a note")
    assert atlas.write_atlas(errors, rasters, folder) == [first, second]
    assert first.read_text() == noted
    fewer = errors[errors["raster"] == "mapped"]
    assert atlas.write_atlas(fewer, rasters, folder) == [first]
    assert "a note" not in first.read_text()
    assert not second.exists()
    with pytest.raises(InputError, match=r"errors lie on \['mapped'\]"):
        atlas.write_atlas(errors, {"plain": rasters["plain"]}, folder)
    assert atlas.write_atlas(errors[:0], rasters, folder) == []
