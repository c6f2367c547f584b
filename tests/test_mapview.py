"""The map cell: pictures of any part of a raster, on the ground, with the objects on it."""

from __future__ import annotations

import asyncio
import base64
import io

import ipyleaflet
import numpy as np
import pandas as pd
import pyproj
import pytest
import rasterio
from PIL import Image
from rasterio.warp import Resampling, reproject

import fileio
import mapview
from ImageData import BOX_COLUMNS
from imutils import COLORS

MOON_SOUTH = "+proj=stere +lat_0=-90 +R=1737400 +units=m +no_defs"
PLACES = {
    "north up": ("EPSG:32617", rasterio.Affine(0.5, 0, 5e5, 0, -0.5, 3e6)),
    "south up": ("EPSG:32617", rasterio.Affine(0.5, 0, 5e5, 0, 0.5, 3e6)),
    "turned": ("EPSG:32617", rasterio.Affine(1.732, 1, 5e5, 1, -1.732, 3e6)),
    "degrees": ("EPSG:4326", rasterio.Affine(1e-5, 0, 25, 0, -1e-5, 60)),
    "the Moon": (MOON_SOUTH, rasterio.Affine(100, 0, -1e4, 0, -100, 2e4)),
    "no CRS": (None, rasterio.Affine.identity()),
}


def make_raster(folder, place="north up", pixels=None, **profile):
    crs, transform = PLACES[place]
    if pixels is None:
        pixels = np.random.default_rng(0).integers(1, 255, (3, 120, 160), np.uint8)
    count, height, width = pixels.shape
    profile |= {"width": width, "height": height, "count": count, "dtype": pixels.dtype}
    path = folder / f"{place}.tif"
    with fileio.create_raster(path, crs=crs, transform=transform, **profile) as dst:
        dst.write(pixels)
    return fileio.read_raster(path)


def objects(*boxes, **columns):
    table = pd.DataFrame(boxes, columns=BOX_COLUMNS, dtype=float)
    return table.assign(**({"label": "crater"} | columns))


def pixel_grid(bounds, size_wh):
    """Centres of a picture's pixels on the plane, (N, 2), row by row."""
    (south, west), (north, east) = bounds
    width, height = size_wh
    x = west + (np.arange(width) + 0.5) * (east - west) / width
    y = north - (np.arange(height) + 0.5) * (north - south) / height
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


@pytest.mark.parametrize("place", PLACES)
def test_a_picture_shows_the_pixels_that_lie_there(tmp_path, place):
    raster = make_raster(tmp_path, place)
    picture = mapview.MapPicture(raster, objects())
    (south, west), (north, east) = picture.bounds
    size = round((east - west) / picture.pixel_side), round((north - south) / picture.pixel_side)
    drawn = picture.draw_raster(picture.bounds, (2 * size[0], 2 * size[1]))  # twice as fine
    x, y = picture.to_pixel(pixel_grid(picture.bounds, (2 * size[0], 2 * size[1]))).T
    inside = (x >= 0) & (x < 160) & (y >= 0) & (y < 120)
    np.testing.assert_array_equal(drawn[..., 3].ravel() > 0, inside)
    assert inside.mean() == pytest.approx(160 * 120 / np.prod(size), abs=0.02)
    low, high = np.percentile(raster.preview()[0].reshape(3, -1), [1, 99], axis=1)
    raw = raster.preview()[0][:, y[inside].astype(int), x[inside].astype(int)].T
    expected = ((raw - low) / (high - low)).clip(0, 1) * 255
    assert np.abs(drawn.reshape(-1, 4)[inside, :3] - expected).max() <= 1


@pytest.mark.parametrize("place", ["south up", "turned", "the Moon"])
def test_a_picture_agrees_with_what_gdal_warps_to_the_north(tmp_path, place):
    raster = make_raster(tmp_path, place)
    picture = mapview.MapPicture(raster, objects())
    (south, west), (north, east) = picture.bounds
    size = round((east - west) / picture.pixel_side), round((north - south) / picture.pixel_side)
    # the plane is the CRS, moved to the centre and in metres on the ground
    at = rasterio.Affine(*raster.transform)
    scale = picture.pixel_side / np.sqrt(abs(at.determinant))
    x, y = raster.to_map([[80, 60]])[0] + np.array([west, north]) / scale
    side = (east - west) / size[0] / scale, (north - south) / size[1] / scale
    to = rasterio.Affine(side[0], 0, x, 0, -side[1], y)
    warped, crs = np.zeros((3, size[1], size[0]), np.uint8), raster.crs
    reproject(
        raster.preview()[0], warped, src_transform=at, src_crs=crs, dst_transform=to, dst_crs=crs,
        resampling=Resampling.nearest,
    )  # fmt: skip
    drawn = picture.draw_raster(picture.bounds, size)
    seen = warped.any(axis=0)
    assert (seen == (drawn[..., 3] > 0)).mean() > 0.99
    low, high = np.percentile(raster.preview()[0].reshape(3, -1), [1, 99], axis=1)
    expected = ((warped.transpose(1, 2, 0)[seen] - low) / (high - low)).clip(0, 1) * 255
    assert (np.abs(drawn[seen][:, :3] - expected) <= 1).mean() > 0.98


@pytest.mark.parametrize("place", ["north up", "degrees", "the Moon"])
def test_the_plane_is_in_metres_on_the_ground(tmp_path, place):
    raster = make_raster(tmp_path, place)
    picture = mapview.MapPicture(raster, objects())
    geod = pyproj.CRS.from_wkt(raster.crs).get_geod()
    for step in ([10.0, 0.0], [0.0, 10.0]):
        ends = raster.to_lonlat(picture.to_pixel([[0, 0], step]))
        assert geod.inv(*ends[0], *ends[1])[2] == pytest.approx(10, rel=1e-3)


def test_ground_without_data_is_transparent_and_the_contrast_is_that_of_the_whole(tmp_path):
    pixels = np.full((1, 100, 100), 7, np.uint16)
    pixels[0, :, 50:] = np.linspace(1000, 3000, 5000).reshape(100, 50)
    raster = make_raster(tmp_path, pixels=pixels, nodata=7)
    picture = mapview.MapPicture(raster, objects())
    whole = picture.draw_raster(picture.bounds, (100, 100))
    assert (whole[:, :50, 3] == 0).all()
    assert (whole[:, 50:, 3] == 255).all()
    north, east = picture.bounds[1]
    part = picture.draw_raster(((0, 0), (north, east)), (50, 50))
    np.testing.assert_array_equal(part, whole[:50, 50:])
    assert not picture.draw_raster(((north, east), (2 * north, 2 * east)), (20, 10)).any()


def test_boxes_are_drawn_where_they_are_and_small_ones_as_dots(tmp_path):
    raster = make_raster(tmp_path)
    table = objects([20, 10, 60, 40], [100, 50, 102, 52], label=["a", "b"])
    picture = mapview.MapPicture(raster, table)
    drawn = picture.draw_objects(picture.bounds, (320, 240))  # two px of the screen for one
    first = (drawn[..., :3] == [0xE6, 0x9F, 0x00]).all(axis=-1) & (drawn[..., 3] > 0)
    rows, cols = np.nonzero(first)
    np.testing.assert_allclose([cols.min(), rows.min()], [40, 20], atol=1)
    np.testing.assert_allclose([cols.max(), rows.max()], [120, 80], atol=1)
    assert not first[24:76, 44:116].any()  # an outline
    rows, cols = np.nonzero((drawn[..., 3] > 0) & ~first)
    assert (len(rows), rows.mean(), cols.mean()) == (9, 102, 202)
    assert picture.colors == {"a": COLORS[0], "b": COLORS[1]}


def test_a_hundred_thousand_objects_are_dots_of_one_pixel(tmp_path):
    raster = make_raster(tmp_path)
    rng = np.random.default_rng(0)
    low = rng.uniform(0, [150, 110], (100_000, 2))
    table = objects(*np.hstack([low, low + 0.5]), label=rng.choice(["a", "b"], 100_000))
    picture = mapview.MapPicture(raster, table)
    drawn = picture.draw_objects(picture.bounds, (160, 120))
    assert (drawn[..., 3] > 0).mean() > 0.8
    near = picture.draw_objects(((0, 0), (2, 2)), (400, 400))  # 4 x 4 px of the raster
    expected = ((low < [84, 60]) & (low + 0.5 > [80, 56])).all(axis=1).sum()
    text = picture.legend(((0, 0), (2, 2)))
    shown = int(text.partition(" of 100,000")[0].rpartition(">")[2])
    assert abs(shown - expected) < 0.5 * expected  # by centres, here
    assert 0 < (near[..., 3] > 0).sum() <= 2 * 4 * 50 * expected


def test_a_click_finds_the_smallest_object_there_and_tells_what_is_known(tmp_path):
    raster = make_raster(tmp_path)
    table = objects([20, 10, 60, 40], [30, 20, 34, 24], score=[0.5, 0.875], label=["a", "<b>"])
    picture = mapview.MapPicture(raster, table)
    at = picture.to_plane([[32, 22], [21, 11], [19, 9], [100, 100]])
    assert [picture.find(xy, 0) for xy in at] == [1, 0, None, None]
    assert picture.find(at[2], 1.0) == 0  # two px are a metre
    text = picture.describe(at[0], 1)
    for fact in ("&lt;b&gt;", "0.875", "4.0 px, 2.00", "32.0, 22.0", "500016, 2999989"):
        assert fact in text
    beside = picture.describe(at[3])
    assert "100.0, 100.0" in beside
    assert "label" not in beside


def test_of_a_large_raster_without_overviews_only_small_views_are_read(tmp_path, monkeypatch):
    raster = make_raster(tmp_path)
    monkeypatch.setattr(mapview, "MAX_READ", 60 * 60)
    monkeypatch.setattr(mapview, "OVERVIEW_SIDE", 40)
    picture, windows = mapview.MapPicture(raster, objects()), []
    assert picture._whole[0].shape == (3, 30, 40)
    read = type(raster).read_decimated
    monkeypatch.setattr(
        type(raster), "read_decimated",
        lambda self, window, shape: windows.append(window) or read(self, window, shape),
    )  # fmt: skip
    assert picture.draw_raster(picture.bounds, (320, 240))[..., 3].all()
    assert not windows
    picture.draw_raster(((0, 0), (20, 20)), (80, 80))
    assert [tuple(window) for window in windows] == [(80, 20, 40, 40)]


def picture_of(layer):
    assert layer.url.startswith("data:image/webp;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(layer.url.partition(",")[2]))))


def move(cell, bounds, zoom):
    """Do what the browser does: tell the new view."""
    (south, west), (north, east) = bounds
    view = {"south": south, "west": west, "north": north, "east": east, "zoom": zoom}
    cell.set_state(view)


def test_a_map_needs_no_address_and_follows_the_view(tmp_path):
    raster = make_raster(tmp_path)
    cell = mapview.map_view(raster, objects([80, 48, 100, 68]))
    assert {type(layer) for layer in cell.layers} == {ipyleaflet.ImageOverlay}
    _, shown, marked = cell.layers
    assert shown.name == "north up.tif"
    before = shown.url
    move(cell, ((-5, -10), (5, 10)), 4)  # 16 px of the screen for a metre
    assert shown.url != before
    assert picture_of(shown).shape[:2] == (240, 480)  # a quarter more on each side
    np.testing.assert_allclose(shown.bounds, [(-7.5, -15), (7.5, 15)])
    assert marked.bounds == shown.bounds
    rows, cols = np.nonzero(picture_of(marked)[..., 3])
    np.testing.assert_allclose([cols.min(), cols.max()], [240, 400], atol=1)
    np.testing.assert_allclose([rows.min(), rows.max()], [24, 184], atol=1)
    legend = next(c.widget for c in cell.controls if isinstance(c, ipyleaflet.WidgetControl))
    assert "1 of 1 objects in view" in legend.value


def test_of_many_moves_only_the_last_is_drawn(tmp_path, monkeypatch):
    cell, drawn = mapview.map_view(make_raster(tmp_path), objects()), []
    draw = mapview.MapPicture.draw_raster
    monkeypatch.setattr(
        mapview.MapPicture, "draw_raster",
        lambda self, bounds, size: drawn.append(bounds) or draw(self, bounds, size),
    )  # fmt: skip

    async def drag():
        for x in range(5):
            move(cell, ((-5, x - 10), (5, x + 10)), 4)
        while not drawn:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(drag(), 60))
    np.testing.assert_allclose(drawn, [[(-7.5, -11), (7.5, 19)]])


def test_a_click_opens_one_popup(tmp_path):
    cell = mapview.map_view(make_raster(tmp_path), objects([80, 40, 100, 60], label="ship"))
    for place, found in (((5, 5), True), ((5, -20), False)):
        cell._handle_leaflet_event(
            None, {"event": "interaction", "type": "click", "coordinates": place}, []
        )
        (popup,) = (layer for layer in cell.layers if isinstance(layer, ipyleaflet.Popup))
        assert tuple(popup.location) == place
        assert ("ship" in popup.child.value) is found


def test_a_raster_without_a_crs_is_a_map_in_pixels_without_a_scale(tmp_path):
    cell = mapview.map_view(make_raster(tmp_path, "no CRS"), objects())
    np.testing.assert_allclose(cell.layers[0].bounds, [(-60, -80), (60, 80)])
    assert not any(isinstance(c, ipyleaflet.ScaleControl) for c in cell.controls)
