"""The catalogue: each object once, whatever the strips; on the map; fused; counted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio import Affine
from torchvision.ops import batched_nms

import catalogue
import fileio
from catalogue import DensityMap, Detections, SeamFront
from ImageData import InputError


def detections(count, seed, spread=200.0, largest=40.0):
    """Crowded boxes, some of them twins of others, with scores that are often equal."""
    rng = np.random.default_rng(seed)
    low, side = rng.uniform(0, spread, (count, 2)), rng.uniform(2, largest, (count, 2))
    boxes = np.hstack([low, low + side])
    twins = rng.random(count) < 0.3
    boxes[twins] = (
        boxes[rng.integers(count, size=count)][twins] + rng.normal(0, 1, (count, 4))[twins]
    )
    scores = rng.choice(np.linspace(0.1, 1, 12), count).astype(np.float32)
    return Detections(boxes, scores, rng.integers(0, 3, count))


def rows_of(found):
    return sorted(map(tuple, np.column_stack([found.boxes, found.scores, found.ids]).tolist()))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 120), st.lists(st.floats(1, 199), max_size=6))
def test_the_moving_front_suppresses_as_if_all_were_seen_at_once(seed, count, cuts):
    found = detections(count, seed)
    whole = SeamFront(0.3).push(found, np.inf)

    front, parts, tops = SeamFront(0.3), [], [0.0, *sorted(cuts)]
    order = np.random.default_rng(seed).permutation(count)
    strip_of = np.searchsorted(tops, found.boxes[order, 1], side="right")
    for strip, next_y in enumerate([*tops[1:], np.inf], 1):
        mine = (strip_of == strip) | ((strip == 1) & (strip_of == 0))
        parts.append(front.push(found[order[mine]], next_y))
    assert rows_of(Detections.concatenate(parts)) == rows_of(whole)
    assert len(front.open) == 0


def test_the_front_agrees_with_torchvision():
    found = detections(400, 1)
    found = Detections(found.boxes, np.random.default_rng(1).permutation(400) / 400, found.ids)
    keep = batched_nms(
        torch.from_numpy(found.boxes), torch.from_numpy(found.scores), torch.from_numpy(found.ids),
        0.3,
    )  # fmt: skip
    assert rows_of(SeamFront(0.3).push(found, np.inf)) == rows_of(found[keep.numpy()])


def test_the_front_holds_only_what_the_next_strip_can_touch():
    found = Detections(
        np.array([[0, 0, 9, 9], [0, 5, 9, 99], [50, 80, 60, 110.0]]),
        np.float32([0.9, 0.8, 0.7]), np.array([0, 1, 0]),
    )  # fmt: skip
    front = SeamFront(0.5)
    assert rows_of(front.push(found, next_y=100)) == rows_of(found[np.array([0, 1])])
    assert rows_of(front.open) == rows_of(found[np.array([2])])
    better = Detections(np.array([[50, 100, 60, 110.0]]), np.float32([0.9]), np.array([0]))
    assert len(front.push(better, np.inf)) == 2  # their IoU is only a third


def test_views_are_fused_to_the_mean_of_what_they_show():
    def view(*rows):
        values = np.array(rows, float).reshape(-1, 6)
        return Detections(values[:, :4], values[:, 4].astype(np.float32), values[:, 5].astype(int))

    views = [
        view([0, 0, 10, 10, 0.9, 0], [50, 50, 60, 60, 0.8, 1]),
        view([2, 0, 12, 10, 0.3, 0]),
    ]
    fused = catalogue.fuse_views(views, 0.5)
    assert fused.ids.tolist() == [0, 1]
    assert fused.boxes[0] == pytest.approx([0.5, 0, 10.5, 10])  # weighted by the scores
    assert fused.scores[0] == pytest.approx(0.6)
    assert fused.scores[1] == pytest.approx(0.4)  # only one of two views sees it
    assert len(catalogue.fuse_views([Detections.none()] * 2, 0.5)) == 0


def make_raster(path, **profile):
    place = {"crs": "EPSG:32633", "transform": Affine(0.5, 0, 500_000, 0, -0.5, 5_400_000)}
    size = {"width": 100, "height": 60, "count": 1, "dtype": "uint8"}
    with fileio.create_raster(path, **size, **(place | profile)) as dst:
        dst.write(np.ones((1, 60, 100), np.uint8))
    return fileio.read_raster(path)


FOUND = Detections(
    np.array([[10.00049, 20, 30, 30], [0, 0, 4, 8.0]]), np.float32([0.9, 0.25]), np.array([1, 0])
)


def test_a_catalogue_is_in_pixels_and_on_the_map(tmp_path):
    df = catalogue.to_table(FOUND, ["a", "b"], make_raster(tmp_path / "r.tif"))
    row = df.iloc[0]
    assert row[["xmin", "ymin", "xmax", "ymax"]].tolist() == [10, 20, 30, 30]
    assert (row["pixel_x"], row["pixel_y"], row["diameter"]) == (20, 25, 20)
    assert df["label"].tolist() == ["b", "a"]
    assert df["score"].tolist() == [0.9, 0.25]
    assert (row["map_x"], row["map_y"]) == (500_010, 5_399_987.5)
    assert row["lon"] == pytest.approx(15 + 10 / 73_200, abs=2e-5)
    assert row["lat"] == pytest.approx(48.75, abs=0.01)
    assert row["diameter_m"] == pytest.approx(10, rel=1e-3)


def test_without_a_crs_there_is_no_map(tmp_path):
    raster = make_raster(tmp_path / "r.tif", crs=None, transform=Affine.identity())
    names = ["pixel_x", "pixel_y", "diameter", "label", "score", "xmin", "ymin", "xmax", "ymax"]
    assert list(catalogue.to_table(FOUND, ["a", "b"], raster)) == names
    assert list(catalogue.to_table(Detections.none(), ["a"], raster)) == names


def test_a_crs_without_a_globe_gives_map_coordinates_only(tmp_path):
    local = 'LOCAL_CS["site",UNIT["metre",1]]'
    raster = make_raster(tmp_path / "r.tif", crs=rasterio.CRS.from_wkt(local))
    df = catalogue.to_table(FOUND, ["a", "b"], raster)
    assert "map_x" in df
    assert "lon" not in df


def test_the_density_map_counts_every_object_in_its_cell_on_the_map(tmp_path):
    raster = make_raster(tmp_path / "r.tif")
    density = DensityMap(raster, 16)
    df = catalogue.to_table(FOUND, ["a", "b"], raster)
    for _ in range(3):
        density.add(df)
    with rasterio.open(density.write(tmp_path / "d.tif")) as src:
        counts = src.read(1)
        assert counts.shape == (4, 7)
        assert counts[1, 1] == 3
        assert counts[0, 0] == 3
        assert counts.sum() == 6
        assert src.transform @ (1, 1) == (500_008, 5_399_992)
        assert src.crs == "EPSG:32633"
    with pytest.raises(InputError, match=r"has 65536 x 65536 cells.* take cells of 17 px"):
        DensityMap(replace(raster, width=65536, height=65536), 1)
