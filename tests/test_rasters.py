"""The raster handle: formats, validity, regions, the map, addresses, threads, damaged files."""

from __future__ import annotations

import dataclasses
import http.server
import pickle
import tempfile
import threading
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyproj
import pytest
import rasterio
import rasterio.shutil
import shapely
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from loky import get_reusable_executor
from rasterio import Affine
from rasterio.vrt import WarpedVRT

import rasters
from artefacts import fingerprint
from ImageData import InputError, Window
from rasters import Raster, Regions

TILED = {"driver": "GTiff", "tiled": True, "blockxsize": 64, "blockysize": 64}
STRIPED = {"driver": "GTiff", "tiled": False, "blockxsize": None, "blockysize": 3}
WINDOWS = [Window(0, 0, 150, 110), Window(60, 61, 70, 9), Window(149, 109, 1, 1)]
UTM = {"crs": "EPSG:32617", "transform": rasterio.Affine(0.1, 0, 5e5, 0, -0.1, 4e6)}


def noise(count=3, height=110, width=150, dtype="uint8"):
    rng = np.random.default_rng(0)
    if np.dtype(dtype).kind == "f":
        return rng.normal(size=(count, height, width)).astype(dtype)
    return rng.integers(0, 120, (count, height, width)).astype(dtype)


def write(path, pixels, mask=None, **profile):
    count, height, width = pixels.shape
    shape = {"count": count, "height": height, "width": width, "dtype": pixels.dtype}
    profile = {name: v for name, v in (TILED | shape | profile).items() if v is not None}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", **profile) as dst,
    ):
        dst.write(pixels)
        if mask is not None:
            dst.write_mask(mask)
    return path


def converted(path, pixels, driver, **options):
    source = write(path.with_name("source.tif"), pixels)
    with rasterio.open(source) as src:
        rasterio.shutil.copy(src, path, driver=driver, **options)
    return path


def crop(pixels, window):
    return pixels[:, window.y : window.y + window.height, window.x : window.x + window.width]


def read_all(raster):
    window = Window(0, 0, raster.width, raster.height)
    image = raster.read(window)
    return image, raster.read_valid(window, image)


# -- formats ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("t.tif", {"driver": "GTiff", "tiled": True}),
        ("s.tif", {"driver": "GTiff", "blockysize": 7, "compress": "lzw"}),
        ("c.tif", {"driver": "COG", "compress": "deflate", "blocksize": 128}),
        ("v.vrt", {"driver": "VRT"}),
        ("j.jp2", {"driver": "JP2OpenJPEG", "quality": 100, "reversible": "YES"}),
        ("p.png", {"driver": "PNG"}),
        ("tiff.jpg", {"driver": "GTiff"}),
    ],
)
def test_windows_of_every_format_equal_the_pixels(tmp_path, name, options):
    pixels = noise()
    raster = Raster.open(converted(tmp_path / name, pixels, **options))
    assert (raster.width, raster.height, raster.bands, raster.dtype) == (
        150, 110, (1, 2, 3), "uint8"
    )  # fmt: skip
    assert raster.identifier == Path(name).stem
    for window in WINDOWS:
        np.testing.assert_array_equal(raster.read(window), crop(pixels, window))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "float64"])
@pytest.mark.parametrize("profile", [TILED, STRIPED], ids=["tiled", "striped"])
def test_pixels_keep_their_type(tmp_path, dtype, profile):
    pixels = noise(2, dtype=dtype)
    raster = Raster.open(write(tmp_path / "r.tif", pixels, **profile))
    assert raster.dtype == dtype
    for window in WINDOWS:
        image = raster.read(window)
        assert image.dtype == dtype
        np.testing.assert_array_equal(image, crop(pixels, window))


@pytest.mark.parametrize(
    ("dtype", "bands"),
    [
        ("uint8", None), ("int16", None), ("uint16", None), ("int32", None), ("uint32", None),
        ("float32", None), ("float64", None), ("float32", 4), ("uint16", 4),
    ],
)  # fmt: skip
def test_fits_images_and_cubes_keep_their_rows_and_types(tmp_path, dtype, bands):
    from astropy.io import fits

    pixels = noise(bands or 1, dtype=dtype)
    if np.dtype(dtype).kind == "u":
        pixels[0, 0, 0] = np.iinfo(dtype).max
    fits.PrimaryHDU(pixels if bands else pixels[0]).writeto(tmp_path / "f.fits")
    raster = Raster.open(tmp_path / "f.fits")
    assert raster.dtype == dtype
    assert len(raster.bands) == (bands or 1)
    for window in WINDOWS:
        np.testing.assert_array_equal(raster.read(window), crop(pixels, window))


def test_blank_pixels_of_fits_images_are_invalid(tmp_path):
    from astropy.io import fits

    pixels = noise(1, dtype="int16")
    pixels[0, 3, 4] = -99
    unit = fits.PrimaryHDU(pixels[0])
    unit.header["BLANK"] = -99
    unit.writeto(tmp_path / "f.fits")
    raster = Raster.open(tmp_path / "f.fits")
    assert (raster.dtype, raster.nodata) == ("int16", (-99.0,))
    image, valid = read_all(raster)
    np.testing.assert_array_equal(image, pixels)
    assert np.argwhere(~valid).tolist() == [[3, 4]]


def test_scaled_fits_pixels_are_their_physical_values(tmp_path):
    from astropy.io import fits

    unit = fits.PrimaryHDU(noise(1, dtype="int16")[0])
    unit.scale("int16", bscale=0.5, bzero=10)
    unit.writeto(tmp_path / "f.fits")
    expected = fits.getdata(tmp_path / "f.fits")
    np.testing.assert_allclose(read_all(Raster.open(tmp_path / "f.fits"))[0][0], expected)


def test_a_sparse_raster_of_terapixels_reads_anywhere(tmp_path):
    path, side = tmp_path / "big.tif", 1_000_000
    with rasterio.open(
        path, "w", **TILED | {"blockxsize": 512, "blockysize": 512}, width=side, height=side,
        count=1, dtype="uint8", bigtiff="yes", sparse_ok=True, compress="zstd",
    ) as dst:  # fmt: skip
        dst.write(noise(1), window=rasterio.windows.Window(side - 150, side - 110, 150, 110))
    raster = Raster.open(path)
    window = Window(side - 150, side - 110, 150, 110)
    np.testing.assert_array_equal(raster.read(window), noise(1))
    assert not raster.read(Window(500_000, 500_000, 256, 256)).any()


def grid_of(raster, size=64):
    """Windows of a whole raster, edges included, as `may_count` takes them."""
    x, y = np.meshgrid(np.arange(0, raster.width, size), np.arange(0, raster.height, size))
    return np.stack([x.ravel(), y.ravel(), *np.full((2, x.size), size)], axis=1)


def counted_in(raster, windows):
    """What `may_count` may say no to: where no pixel counts."""
    found = []
    for window in (Window(*row) for row in windows.tolist()):
        valid = raster.read_valid(window, raster.read(window))
        found.append(raster.read_counted(window, valid).any())
    return np.array(found)


@pytest.mark.parametrize("layout", ["written", "unwritten", "striped", "by band"])
def test_blocks_that_were_never_written_need_no_reading(tmp_path, layout):
    options = {"sparse_ok": True, "compress": "zstd"}
    options |= {"striped": STRIPED, "by band": {"interleave": "band"}}.get(layout, {})
    path = write(tmp_path / "r.tif", np.zeros((3, 500, 700), np.uint8), **options)
    with rasterio.open(path, "r+") as dst:  # the second band, so that one band is not enough
        if layout != "unwritten":
            dst.write(noise(1, 70, 90)[0], 2, window=rasterio.windows.Window(200, 300, 90, 70))
    raster = Raster.open(path)
    windows = grid_of(raster)
    may = raster.may_count(windows)
    filled = [raster.read(Window(*row)).any() for row in windows.tolist()]
    assert may[filled].all()
    assert any(filled) == may.any() == (layout != "unwritten")
    assert may.mean() < 0.3


@pytest.mark.parametrize("resampling", ["average", "nearest"])
@pytest.mark.parametrize("kind", ["nodata", "mask", "alpha", "nan"])
@pytest.mark.parametrize("phase", range(0, 8, 3))
def test_overviews_tell_where_nothing_counts(tmp_path, kind, resampling, phase):
    pixels, hole = noise(1, 600, 900, "float32"), np.ones((600, 900), bool)
    hole[70:300, 130:500] = False
    hole[516 + phase, 621 + phase] = False  # a single pixel of ground
    if kind in ("nodata", "nan"):
        pixels[:, hole] = -7 if kind == "nodata" else np.nan
        path = write(tmp_path / "r.tif", pixels, nodata=-7 if kind == "nodata" else None)
    elif kind == "alpha":
        alpha = np.where(hole, 0, 255).astype("uint8")[None]
        pixels = np.concatenate([noise(3, 600, 900), alpha])
        path = write(tmp_path / "r.tif", pixels, photometric="RGB", alpha="unspecified")
    else:
        path = write(tmp_path / "r.tif", pixels, mask=~hole)
    raster = Raster.open(path)
    windows = grid_of(raster)
    assert raster.may_count(windows).all()  # there is no overview yet
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as dst:
        dst.build_overviews([2, 4, 8, 16], rasterio.enums.Resampling[resampling])
    raster = Raster.open(path)
    may, counted = raster.may_count(windows), counted_in(raster, windows)
    assert may[counted].all()
    if resampling == "average" and kind != "nan":
        np.testing.assert_array_equal(may, counted)
    else:
        assert may.all()  # what skips pixels, or mixes NaN in, tells nothing
    assert raster.may_count(windows[:0]).tolist() == []


def test_regions_tell_where_nothing_counts(tmp_path):
    raster = Raster.open(write(tmp_path / "r.tif", noise(1, 300, 300)))
    raster = raster.with_regions(Regions((shapely.box(70, 70, 120, 180),)))
    windows = grid_of(raster)
    np.testing.assert_array_equal(raster.may_count(windows), counted_in(raster, windows))


@pytest.mark.parametrize("bands", [(2,), (3, 1), (4, 4, 2), (5, 4, 3, 2, 1)])
def test_bands_come_in_the_order_asked_for(tmp_path, bands):
    pixels = noise(5, dtype="uint16")
    raster = Raster.open(write(tmp_path / "r.tif", pixels), bands)
    assert (raster.bands, raster.band_count) == (bands, 5)
    image = raster.read(WINDOWS[1])
    np.testing.assert_array_equal(image, crop(pixels, WINDOWS[1])[[b - 1 for b in bands]])


@pytest.mark.parametrize("bands", [(0,), (1, 4), (-1,), ()])
def test_bands_that_are_not_there_are_named(tmp_path, bands):
    path = write(tmp_path / "r.tif", noise())
    with pytest.raises(InputError, match=r"r\.tif has the bands 1 to 3, got .* in BANDS"):
        Raster.open(path, bands)


def test_bands_of_different_types_share_one_that_holds_all(tmp_path):
    kinds = {"uint8": "Byte", "int16": "Int16", "float32": "Float32"}
    parts = [write(tmp_path / f"{kind}.tif", noise(1, dtype=kind)) for kind in kinds]
    bands = "".join(
        f'<VRTRasterBand dataType="{kind}" band="{i + 1}"><SimpleSource>'
        f"<SourceFilename>{part}</SourceFilename></SimpleSource></VRTRasterBand>"
        for i, (part, kind) in enumerate(zip(parts, kinds.values(), strict=True))
    )
    vrt = tmp_path / "mixed.vrt"
    vrt.write_text(f'<VRTDataset rasterXSize="150" rasterYSize="110">{bands}</VRTDataset>')
    assert Raster.open(vrt).dtype == "float32"
    raster = Raster.open(vrt, [2, 1])
    assert raster.dtype == "int16"
    image = raster.read(WINDOWS[1])
    for i, kind in enumerate(["int16", "uint8"]):
        np.testing.assert_array_equal(image[i], crop(noise(1, dtype=kind), WINDOWS[1])[0])
    image, valid = raster.preview(75)
    assert image.shape == (2, 55, 75)
    assert image.dtype == "int16"
    assert valid.all()


def test_pixels_that_are_no_numbers_to_order_are_refused(tmp_path):
    path = write(tmp_path / "sar.tif", noise(1, dtype="float32").astype("complex64"))
    with pytest.raises(InputError, match=r"sar\.tif holds complex64 pixels.*convert it"):
        Raster.open(path)


# -- validity -----------------------------------------------------------------------------------


def halves(pixels, value, bands=slice(None)):
    pixels = pixels.copy()
    pixels[bands, :, :75] = value
    return pixels


LEFT = np.zeros((110, 150), bool)
LEFT[:, :75] = True
MASK = np.where(LEFT, 0, 255).astype("uint8")


@pytest.mark.parametrize(
    ("pixels", "profile", "invalid"),
    [
        (np.concatenate([noise(), MASK[None]]), {"photometric": "RGB", "alpha": "YES"}, LEFT),
        (halves(noise() + 1, 0), {"nodata": 0}, LEFT),
        (halves(noise() + 1, 0, slice(2)), {"nodata": 0}, ~LEFT & False),  # a dark band is a value
        (halves(noise(), 0), {}, ~LEFT & False),
        (halves(noise(dtype="int16"), -9999), {"nodata": -9999}, LEFT),
        (halves(noise(dtype="float32"), np.nan, 1), {"nodata": np.nan}, LEFT),
        (halves(noise(dtype="float32"), np.inf, 0), {}, LEFT),
        (halves(noise(dtype="float32"), -9999), {"nodata": -9999}, LEFT),
        (noise(), {"mask": MASK}, LEFT),
        (noise(1), {"mask": MASK}, LEFT),
    ],
    ids=["alpha", "nodata", "one-band", "none", "int16", "nan", "inf", "float", "mask", "mask1"],
)
def test_invalid_is_what_the_file_excludes(tmp_path, pixels, profile, invalid):
    raster = Raster.open(write(tmp_path / "r.tif", pixels, **profile))
    _, valid = read_all(raster)
    np.testing.assert_array_equal(valid, ~invalid)
    assert raster.all_counted == (not profile and pixels.dtype.kind != "f")
    # the same, and nothing beside, past every edge
    for x, y in [(-20, -30), (100, -30), (-20, 90), (100, 90), (-20, -30)]:
        window = Window(x, y, 200 if x < 0 else 90, 60)
        part = raster.read(window)
        padded = np.pad(~invalid, 100)[
            y + 100 : y + 100 + window.height, x + 100 : x + 100 + window.width
        ]
        np.testing.assert_array_equal(raster.read_valid(window, part), padded)
        inside = np.pad(np.ones((110, 150), bool), 100)[
            y + 100 : y + 100 + window.height, x + 100 : x + 100 + window.width
        ]
        fill = np.array([value or 0 for value in raster.nodata], raster.dtype)
        assert (part[:, ~inside] == fill[:, None]).all()
    far = raster.read(Window(1000, -500, 8, 8))
    assert not raster.read_valid(Window(1000, -500, 8, 8), far).any()


@pytest.mark.parametrize(("dtype", "nodata"), [("Byte", -9999), ("Byte", 1.5), ("UInt16", 1e9)])
def test_nodata_that_the_type_cannot_hold_excludes_nothing(tmp_path, dtype, nodata):
    part = write(tmp_path / "p.tif", noise(1, dtype="uint8" if dtype == "Byte" else "uint16"))
    vrt = tmp_path / "r.vrt"
    vrt.write_text(
        f'<VRTDataset rasterXSize="150" rasterYSize="110"><VRTRasterBand dataType="{dtype}" '
        f'band="1"><NoDataValue>{nodata}</NoDataValue><SimpleSource><SourceFilename>{part}'
        "</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    image, valid = read_all(Raster.open(vrt))
    np.testing.assert_array_equal(image, noise(1))
    assert valid.all()


def test_nodata_per_band_excludes_where_every_band_has_its_own(tmp_path):
    part = write(tmp_path / "p.tif", halves(halves(noise(2) + 10, 1, 0), 2, 1))
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{i}"><NoDataValue>{i}</NoDataValue><SimpleSource>'
        f"<SourceFilename>{part}</SourceFilename><SourceBand>{i}</SourceBand></SimpleSource>"
        "</VRTRasterBand>"
        for i in (1, 2)
    )
    vrt = tmp_path / "r.vrt"
    vrt.write_text(f'<VRTDataset rasterXSize="150" rasterYSize="110">{bands}</VRTDataset>')
    assert Raster.open(vrt, [2, 1]).nodata == (2.0, 1.0)
    for chosen in ([1, 2], [2, 1], [2]):
        np.testing.assert_array_equal(read_all(Raster.open(vrt, chosen))[1], ~LEFT)
    # the other way round the values are no nodata
    window = Window(0, 0, 150, 110)
    raster = Raster.open(vrt)
    assert raster.read_valid(window, Raster.open(vrt, [2, 1]).read(window)).all()


# -- regions ------------------------------------------------------------------------------------

REGIONS = Regions(
    aoi=(shapely.box(10, 10, 60, 60), shapely.box(100, 20, 140, 80)),
    ignored=(shapely.box(30, 30, 50, 50),),
)


def counted_px():
    expected = np.zeros((110, 150), bool)
    expected[10:60, 10:60] = expected[20:80, 100:140] = True
    expected[30:50, 30:50] = False
    return expected


@pytest.mark.parametrize("window", [*WINDOWS, Window(25, 25, 40, 40), Window(62, 0, 20, 100)])
def test_regions_count_inside_the_area_and_outside_what_is_ignored(window):
    x, y, width, height = window
    expected = counted_px()[y : y + height, x : x + width]
    np.testing.assert_array_equal(REGIONS.mask(window), expected)


def test_points_and_boxes_agree_with_the_pixels():
    expected = counted_px()
    rows, cols = np.indices(expected.shape).reshape(2, -1)
    np.testing.assert_array_equal(REGIONS.contain(cols + 0.5, rows + 0.5), expected.ravel())
    boxes = np.array([[0, 0, 150, 110], [20, 20, 40, 40], [61, 0, 99, 100], [35, 35, 45, 45]])
    reached = [expected[y0:y1, x0:x1].any() for x0, y0, x1, y1 in boxes]
    np.testing.assert_array_equal(REGIONS.reach(boxes), reached)
    assert REGIONS.reach(np.zeros((0, 4))).shape == (0,)
    nowhere = Regions(aoi=())
    assert not nowhere.mask(Window(0, 0, 9, 9)).any()
    assert not nowhere.contain(np.array([1.0]), np.array([1.0])).any()
    assert Regions().mask(Window(0, 0, 9, 9)).all()


def test_a_handle_with_regions_travels_before_and_after_use(tmp_path):
    plain = Raster.open(write(tmp_path / "r.tif", noise()))
    raster = plain.with_regions(REGIONS)
    assert raster.made_from != plain.made_from
    for _ in range(2):
        travelled = pickle.loads(pickle.dumps(raster))
        assert travelled == raster
        assert travelled.made_from == raster.made_from
        valid = np.ones((110, 150), bool)
        counted = travelled.read_counted(Window(0, 0, 150, 110), valid)
        np.testing.assert_array_equal(counted, counted_px())
        raster.read_counted(Window(0, 0, 150, 110), valid)
        _ = raster.resolution
        read_all(raster)


# -- addresses ----------------------------------------------------------------------------------


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Serve files, or ranges of them, and count the bytes sent."""

    protocol_version = "HTTP/1.1"

    def send_head(self):
        path = Path(self.translate_path(urllib.parse.urlparse(self.path).path))
        if not path.is_file():
            self.send_error(404)
            return None
        data = path.read_bytes()
        first, last = 0, len(data) - 1
        ranged = self.headers.get("Range")
        if ranged:
            start, _, end = ranged.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(end or last), last)
        self.send_response(206 if ranged else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(max(0, last + 1 - first)))
        if ranged:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[first : last + 1])
            self.server.sent += last + 1 - first
        return None

    def do_GET(self):
        self.send_head()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("GDAL_HTTP_PROXY", "")
    handler = partial(RangeHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.sent, server.daemon_threads = 0, True
        server.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_window_of_a_remote_raster_takes_a_small_share_of_its_bytes(server, tmp_path):
    pixels = noise(3, 1500, 1500)
    path = write(tmp_path / "x.tif", pixels, **UTM)
    raster = Raster.open(f"{server.address}/x.tif")
    assert raster.identifier == "x"
    assert raster.resolution == pytest.approx(0.1, rel=1e-3)
    window = Window(700, 800, 64, 64)
    np.testing.assert_array_equal(raster.read(window), crop(pixels, window))
    assert 0 < server.sent < path.stat().st_size / 10
    # the handle's path is an address as well
    assert Raster.open(raster.path).source == raster.source
    assert pickle.loads(pickle.dumps(raster)).read(window).shape == (3, 64, 64)


def test_a_remote_raster_that_is_not_there_is_named(server, tmp_path):
    (tmp_path / "text.tif").write_text("no pixels")
    for name in ("none.tif", "text.tif"):
        with pytest.raises(InputError, match=rf"{name} is not a raster that GDAL can read"):
            Raster.open(f"{server.address}/{name}")
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match="other.tif".replace(".", r"\.")):
        Raster.open(f"{server.address}/other.tif")


def test_a_remote_raster_that_vanishes_names_the_window(server, tmp_path):
    path = write(tmp_path / "gone.tif", noise(3, 1500, 1500))
    raster = Raster.open(f"{server.address}/gone.tif")
    path.unlink()
    window = Window(1400, 1400, 64, 64)
    with pytest.raises(InputError, match=r"gone\.tif"):
        raster.read(window)


def test_buckets_are_read_by_their_addresses(server, tmp_path, monkeypatch):
    for name, value in {
        "AWS_S3_ENDPOINT": server.address.removeprefix("http://"), "AWS_HTTPS": "NO",
        "AWS_VIRTUAL_HOSTING": "FALSE", "AWS_NO_SIGN_REQUEST": "YES",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    (tmp_path / "bucket" / "deep").mkdir(parents=True)
    write(tmp_path / "bucket" / "deep" / "key.tif", noise())
    raster = Raster.open("s3://bucket/deep/key.tif")
    assert raster.source == "/vsis3/bucket/deep/key.tif"
    assert raster.identifier == "key"
    np.testing.assert_array_equal(raster.read(WINDOWS[1]), crop(noise(), WINDOWS[1]))
    assert Raster.open(raster.path).source == raster.source


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("https://host/a/b.tif?x=1", "/vsicurl/https://host/a/b.tif?x=1"),
        ("gs://bucket/b.tif", "/vsigs/bucket/b.tif"),
        ("az://box/b.tif", "/vsiaz/box/b.tif"),
        ("/vsizip/a.zip/b.tif", "/vsizip/a.zip/b.tif"),
        (Path("/vsicurl/https://host/b.tif"), "/vsicurl/https://host/b.tif"),
    ],
)
def test_addresses_are_those_of_gdal(address, source):
    assert rasters._source(address) == (source, False)
    assert rasters._source(Path(address)) == (source, False)


def test_unknown_schemes_are_named():
    with pytest.raises(InputError, match="starts with ftp://, expected one of"):
        Raster.open("ftp://host/x.tif")


# -- threads and processes ----------------------------------------------------------------------


def test_each_thread_has_its_own_dataset(tmp_path):
    pixels = noise()
    raster = Raster.open(write(tmp_path / "r.tif", pixels))
    barrier = threading.Barrier(4)

    def work(seed):
        barrier.wait()
        rng = np.random.default_rng(seed)
        for _ in range(50):
            x, y = rng.integers(0, 100, 2)
            window = Window(int(x), int(y), 10, 10)
            np.testing.assert_array_equal(raster.read(window), crop(pixels, window))
        return raster._dataset()

    with ThreadPoolExecutor(4) as pool:
        datasets = list(pool.map(work, range(4)))
    assert len({id(dataset) for dataset in datasets}) == 4


def test_a_thread_keeps_a_limited_number_open(tmp_path, monkeypatch):
    monkeypatch.setattr(rasters, "MAX_OPEN_DATASETS", 3)
    handles = [Raster.open(write(tmp_path / f"{i}.tif", noise())) for i in range(6)]

    def work():
        datasets = [handle._dataset() for handle in handles]
        assert handles[5]._dataset() is datasets[5]
        return [dataset.closed for dataset in datasets]

    with ThreadPoolExecutor(1) as pool:  # a thread of its own: no dataset of other tests
        assert pool.submit(work).result() == [True] * 3 + [False] * 3


def test_worker_processes_read_what_this_one_reads(tmp_path):
    raster = Raster.open(write(tmp_path / "r.tif", noise()))
    here = [raster.read(window) for window in WINDOWS]
    there = list(get_reusable_executor(max_workers=2).map(raster.read, WINDOWS))
    for a, b in zip(here, there, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_opens_the_file_anew(tmp_path):
    import multiprocessing

    raster = Raster.open(write(tmp_path / "r.tif", noise()))
    mine = raster._dataset()
    queue = multiprocessing.get_context("fork").SimpleQueue()

    def work():
        queue.put((raster._dataset() is mine, raster.read(WINDOWS[1])))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    same, image = queue.get()
    process.join(10)
    assert not same
    np.testing.assert_array_equal(image, crop(noise(), WINDOWS[1]))


# -- damaged files ------------------------------------------------------------------------------


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def read_everything(path):
    raster = Raster.open(path)
    for window in (Window(0, 0, 16, 16), Window(-5, 3, 20, 20), Window(14, 14, 16, 16)):
        raster.read_valid(window, raster.read(window))
    assert raster.resolution is None or raster.resolution >= 0
    if raster.crs is not None:
        raster.metres_per_pixel(np.array([[0.0, 0], [3, 4]]))
    raster.preview(8)
    return read_all(raster)


def test_empty_and_foreign_files_are_named_with_their_size(tmp_path):
    for name, content in {"empty.tif": b"", "text.tif": b"no pixels", "x.png": b"\x89PNG"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name} is not a raster.*\({len(content)} bytes\)"):
            Raster.open(tmp_path / name)
    with pytest.raises(InputError, match="not a raster"):
        Raster.open(tmp_path)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9])
@pytest.mark.parametrize("profile", [TILED, STRIPED], ids=["tiled", "striped"])
def test_truncated_tiffs_are_refused_or_name_the_window(tmp_path, profile, share):
    path = cut(write(tmp_path / "c.tif", noise(dtype="uint16"), **profile), share)
    with pytest.raises(InputError, match=r"c\.tif (is not a raster|cannot be read in window)"):
        read_everything(path)


def test_truncated_pngs_and_fits_images_are_refused(tmp_path):
    from astropy.io import fits

    png = cut(converted(tmp_path / "p.png", noise(), "PNG"), 0.5)
    with pytest.raises(InputError, match=r"p\.png .*(restore|not a raster)"):
        read_everything(png)
    fits.PrimaryHDU(noise(1, dtype="float32")[0]).writeto(tmp_path / "f.fits")
    with pytest.raises(InputError, match=r"f\.fits is cut short: its header promises 68880 bytes"):
        Raster.open(cut(tmp_path / "f.fits", 0.5))


def test_a_raster_that_disappears_is_named(tmp_path):
    path = write(tmp_path / "r.tif", noise())
    raster = Raster.open(path)
    path.unlink()
    with pytest.raises(InputError, match=r"r\.tif has disappeared"):
        raster.read(WINDOWS[0])


def test_headers_that_promise_tens_of_thousands_of_bands_are_refused_at_once(tmp_path):
    path = write(tmp_path / "r.tif", noise(2, 30, 40))
    data = bytearray(path.read_bytes())
    entry = data.index(b"\x15\x01\x03\x00\x01\x00\x00\x00\x02\x00")  # 277: samples per pixel
    data[entry + 8 : entry + 10] = (50_000).to_bytes(2, "little")
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"r\.tif (has 50000 bands, at most 1024|is not a raster)"):
        read_everything(path)


def small_tiffs():
    files = []
    with tempfile.TemporaryDirectory() as folder:
        for layout in (TILED | {"blockxsize": 16, "blockysize": 16}, {"blockysize": 4}):
            for compress in ("none", "deflate", "zstd", "lzw"):
                for dtype, crs in (("uint8", "EPSG:32617"), ("float32", "EPSG:4326")):
                    path = Path(folder) / "x.tif"
                    with rasterio.open(
                        path, "w", **{"driver": "GTiff"} | layout, compress=compress, count=2,
                        width=30, height=20, dtype=dtype, nodata=0, crs=crs,
                        transform=rasterio.Affine(1e-4, 0, 17, 0, -1e-4, 50),
                    ) as dst:  # fmt: skip
                        dst.write(noise(2, 20, 30, dtype))
                    files.append(path.read_bytes())
    return files


SMALL_TIFFS = small_tiffs()


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    which=st.integers(0, len(SMALL_TIFFS) - 1),
    flips=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 255)), min_size=1, max_size=4),
    length=st.one_of(st.none(), st.integers(0, 900)),
)
@example(which=0, flips=[(12, 255), (13, 255)], length=None)
@example(which=9, flips=[(20, 255), (30, 255)], length=None)
def test_damaged_tiffs_are_read_or_refused_with_a_message(which, flips, length):
    data = bytearray(SMALL_TIFFS[which])
    for place, value in flips:
        data[place % len(data)] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "damaged.tif"
        path.write_bytes(data[:length])
        try:
            image, valid = read_everything(path)
        except InputError as error:
            refused = str(error)
        else:
            refused = None
    if refused is None:
        assert image.shape[1:] == valid.shape
    else:
        assert "damaged.tif" in refused


# -- map ----------------------------------------------------------------------------------------


def placed(tmp_path, crs, transform, side=100):
    path = tmp_path / "m.tif"
    return Raster.open(write(path, noise(1, side, side), crs=crs, transform=transform))


@pytest.mark.parametrize("angle", [0, 17, 90, 211])
def test_pixels_come_back_from_the_map(tmp_path, angle):
    turn = rasterio.Affine.rotation(angle) @ rasterio.Affine.scale(0.3, -0.2)
    raster = placed(tmp_path, "EPSG:32617", rasterio.Affine.translation(6e5, 4e6) @ turn)
    xy = np.random.default_rng(0).uniform(-50, 1e4, (200, 2))
    np.testing.assert_allclose(raster.to_pixel(raster.to_map(xy)), xy, rtol=0, atol=1e-8)
    near = np.random.default_rng(0).uniform(0, 100, (200, 2))
    exact = rasterio.Affine(*raster.transform)
    np.testing.assert_allclose(raster.to_map(near[:1])[0], exact @ tuple(near[0]))


def test_pixels_come_back_to_a_billionth_where_the_map_can_tell(tmp_path):
    turn = rasterio.Affine.rotation(31) @ rasterio.Affine.scale(0.3, -0.2)
    raster = placed(tmp_path, None, rasterio.Affine.translation(100, -40) @ turn)
    xy = np.random.default_rng(0).uniform(0, 100, (200, 2))
    np.testing.assert_allclose(raster.to_pixel(raster.to_map(xy)), xy, rtol=0, atol=1e-9)


def test_utm_pixels_are_as_large_as_they_say(tmp_path):
    raster = placed(tmp_path, **UTM)
    (jacobian,) = raster.metres_per_pixel(np.array([[50.0, 50.0]]))
    np.testing.assert_allclose(jacobian, np.diag([0.1, -0.1]), atol=1e-4)
    assert raster.resolution == pytest.approx(0.1, rel=1e-3)


def test_web_mercator_metres_are_half_as_long_at_60_degrees(tmp_path):
    x, y = pyproj.Transformer.from_crs(4326, 3857, always_xy=True).transform(10, 60)
    raster = placed(tmp_path, "EPSG:3857", rasterio.Affine(2, 0, x, 0, -2, y))
    (jacobian,) = raster.metres_per_pixel(np.array([[0.0, 0.0]]))
    np.testing.assert_allclose(jacobian, np.diag([1.0, -1.0]), atol=0.01)


def test_geographic_pixels_are_narrower_than_high(tmp_path):
    raster = placed(tmp_path, "EPSG:4326", rasterio.Affine(1e-5, 0, 10, 0, -1e-5, 60))
    (jacobian,) = raster.metres_per_pixel(np.array([[0.0, 0.0]]))
    assert jacobian[0, 0] == pytest.approx(0.558, abs=0.002)  # cos 60 degrees, on an ellipsoid
    assert jacobian[1, 1] == pytest.approx(-1.114, abs=0.002)


def test_rotated_rasters_step_in_both_directions(tmp_path):
    turn = rasterio.Affine.translation(5e5, 4e6) @ rasterio.Affine.rotation(90)
    raster = placed(tmp_path, "EPSG:32617", turn)
    (jacobian,) = raster.metres_per_pixel(np.array([[10.0, 10.0]]))
    np.testing.assert_allclose(jacobian, [[0, -1], [1, 0]], atol=2e-3)


def test_metres_are_those_of_the_moon(tmp_path):
    moon = "+proj=eqc +lat_ts=0 +lon_0=0 +R=1737400 +units=m +no_defs"
    raster = placed(tmp_path, moon, rasterio.Affine(5, 0, 1000, 0, -5, 2000))
    (jacobian,) = raster.metres_per_pixel(np.array([[0.0, 0.0]]))
    np.testing.assert_allclose(jacobian, np.diag([5.0, -5.0]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("crs", [None, 'LOCAL_CS["desk",UNIT["metre",1]]'])
def test_metres_need_a_place_on_a_globe(tmp_path, crs):
    raster = placed(tmp_path, crs, rasterio.Affine(5, 0, 1000, 0, -5, 2000))
    assert raster.resolution is None
    with pytest.raises(InputError, match="coordinate reference system"):
        raster.metres_per_pixel(np.array([[0.0, 0.0]]))


def test_resolutions_further_apart_than_tolerated_are_named(tmp_path):
    fine = write(tmp_path / "fine.tif", noise(), **UTM)
    coarse = write(
        tmp_path / "coarse.tif", noise(), crs="EPSG:32617",
        transform=rasterio.Affine(0.2, 0, 5e5, 0, -0.2, 4e6),
    )  # fmt: skip
    assert len(rasters.read_rasters([fine, coarse])) == 2
    assert len(rasters.read_rasters([fine, coarse], resolution_tolerance=1.5)) == 2
    with pytest.raises(InputError, match=r"'fine\.tif': '0\.1 m', 'coarse\.tif': '0\.2\d* m'"):
        rasters.read_rasters([fine, coarse], resolution_tolerance=0.5)


def write_rgba(path, fourth):
    pixels = np.random.default_rng(0).integers(1, 255, (4, 300, 300), dtype=np.uint8)
    pixels[3] = fourth(pixels[3])
    layout = {"width": 300, "height": 300, "count": 4, "dtype": "uint8", "photometric": "rgb",
              "alpha": "yes"}  # fmt: skip
    with rasters.create_raster(path, **layout) as dst:
        dst.write(pixels)
    return pixels


def test_a_fourth_band_that_is_named_holds_data_whatever_its_colour(tmp_path):
    path = tmp_path / "nir.tif"
    pixels = write_rgba(path, lambda band: np.where(band < 40, 0, band))
    raster = rasters.read_raster(path, [4, 1, 2, 3])
    image = raster.read(window := Window(0, 0, 300, 300))
    np.testing.assert_array_equal(image, pixels[[3, 0, 1, 2]])
    assert raster.read_valid(window, image).all()
    assert (raster.band_count, raster.masked, raster.alpha) == (4, False, None)
    masked = rasters.read_raster(path)
    assert (masked.bands, masked.band_count, masked.alpha) == ((1, 2, 3), 3, 4)
    assert (masked.read_valid(window, masked.read(window)) == (pixels[3] > 0)).all()


def test_an_alpha_band_that_looks_like_data_is_reported(tmp_path, caplog):
    write_rgba(tmp_path / "nir.tif", lambda band: band)
    write_rgba(tmp_path / "alpha.tif", lambda band: np.where(band < 40, 0, 255))
    rasters.read_rasters([tmp_path / "alpha.tif"])
    assert not caplog.records
    rasters.read_rasters([tmp_path / "nir.tif"])
    assert "band 4 is declared to be alpha" in caplog.text
    assert "set BANDS = [1, 2, 3, 4]" in caplog.text
    caplog.clear()
    rasters.read_rasters([tmp_path / "nir.tif"], bands=[1, 2, 3, 4])
    assert not caplog.records


def test_a_result_depends_on_masks_bands_and_regions_beside_the_pixels(tmp_path):
    path = tmp_path / "m.tif"
    with rasters.create_raster(path, width=64, height=64, count=2, dtype="uint8") as dst:
        dst.write(np.ones((2, 64, 64), np.uint8))
    plain = Raster.open(path)
    marks = [fingerprint(plain.made_from), fingerprint(Raster.open(path, [2, 1]).made_from),
             fingerprint(plain.with_regions(REGIONS).made_from)]  # fmt: skip
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as dst:
        dst.write_mask(np.zeros((64, 64), np.uint8))
    masked = Raster.open(path)
    assert str(tmp_path / "m.tif.msk") in masked.files
    marks.append(fingerprint(masked.made_from))
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as dst:
        dst.write_mask(np.full((64, 64), 255, np.uint8))
    marks.append(fingerprint(Raster.open(path).made_from))
    assert len(set(marks)) == 5


def test_a_transform_onto_a_line_is_refused(tmp_path):
    path = tmp_path / "line.tif"
    transform = rasterio.Affine(1, 2, 5, 2, 4, 5)
    layout = {"width": 8, "height": 8, "count": 1, "dtype": "uint8", "crs": "EPSG:32633"}
    with rasters.create_raster(path, transform=transform, **layout):
        pass
    with pytest.raises(InputError, match="maps all pixels onto a line"):
        Raster.open(path)


def test_paletted_rasters_are_reported(tmp_path, caplog):
    path = tmp_path / "palette.tif"
    layout = {"width": 8, "height": 8, "count": 1, "dtype": "uint8", "photometric": "palette"}
    with rasters.create_raster(path, **layout) as dst:
        dst.write_colormap(1, {0: (255, 0, 0, 255), 1: (0, 255, 0, 255)})
    rasters.read_rasters([path])
    assert "holds numbers of colours" in caplog.text


# ---------------------------------------------------------------------------------------------
# Pixels of another size
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def on_map(tmp_path):
    """A raster of two bands, 1 m a pixel, with a mask of blocks of 8 px."""
    rng = np.random.default_rng(0)
    place = {"crs": "EPSG:32633", "transform": Affine(1, 0, 4e5, 0, -1, 5e6)}
    blocks = np.kron(rng.integers(1, 5, (32, 40)), np.ones((8, 8))).astype(np.uint8)
    pixels = np.stack([40 * blocks, rng.integers(1, 255, blocks.shape, dtype=np.uint8)])
    for name, values in (("r", pixels), ("mask", blocks[None])):
        layout = {"count": len(values), "height": 256, "width": 320, "dtype": "uint8", **place}
        with rasters.create_raster(tmp_path / f"{name}.tif", **layout) as dst:
            dst.write(values)
    return tmp_path


@pytest.mark.parametrize("resolution", [2.5, 0.7])
def test_a_resampled_view_is_what_rasterio_warps_in_any_window(on_map, resolution):
    plain = rasters.read_raster(on_map / "r.tif", [2, 1])
    view = pickle.loads(pickle.dumps(rasters.resampled(plain, resolution)))
    assert view.resolution == pytest.approx(resolution, rel=1e-6)
    assert (view.path, view.bands, view.identifier) == (plain.path, (2, 1), "r")
    factor = resolution / plain.resolution
    assert (view.width, view.height) == (int(320 / factor), int(256 / factor))
    with (
        rasterio.open(on_map / "r.tif") as src,
        WarpedVRT(
            src, crs=src.crs, transform=Affine(*view.transform), width=view.width,
            height=view.height, resampling=rasterio.enums.Resampling.bilinear,
        ) as vrt,
    ):  # fmt: skip
        expected = vrt.read([2, 1]).astype(int)
    whole = view.read(Window(0, 0, view.width, view.height))
    for window in (Window(0, 0, view.width, view.height), Window(17, 33, 40, 50)):
        rows = slice(window.y, window.y + window.height)
        cols = slice(window.x, window.x + window.width)
        np.testing.assert_allclose(view.read(window), expected[:, rows, cols], atol=1)
        np.testing.assert_array_equal(view.read(window), whole[:, rows, cols])
    corner = view.to_map(np.array([[view.width, view.height]]))
    np.testing.assert_allclose(corner, plain.to_map([[320, 256]]), atol=resolution)
    assert rasters.resampled(view, resolution).original == plain
    assert rasters.resampled(plain, None) is plain
    assert view.made_from != plain.made_from != rasters.resampled(plain, 2).made_from


def test_the_mask_of_a_resampled_view_stays_aligned(on_map):
    view = rasters.resampled(rasters.read_raster(on_map / "r.tif"), 2.0)
    mask = rasters.on_grid(rasters.read_raster(on_map / "mask.tif"), view)
    assert (mask.width, mask.height, mask.transform) == (view.width, view.height, view.transform)
    window = Window(20, 30, 100, 90)
    values, image = mask.read(window)[0], view.read(window)[0]
    assert set(np.unique(values)) <= {1, 2, 3, 4}
    inner = np.zeros(values.shape, dtype=bool)  # away from edges of blocks, which are interpolated
    y, x = (np.arange(n) + at for n, at in zip(values.shape, (30, 20), strict=True))
    inner[np.ix_(np.isin(y % 4, [1, 2]), np.isin(x % 4, [1, 2]))] = True
    np.testing.assert_array_equal(image[inner], 40 * values[inner])


def test_a_mask_that_covers_a_part_is_unknown_beyond_it(on_map):
    place = {"crs": "EPSG:32633", "transform": Affine(1, 0, 4e5 + 64, 0, -1, 5e6)}
    layout = {"count": 1, "height": 256, "width": 128, "dtype": "uint8", **place}
    with rasters.create_raster(on_map / "part.tif", **layout) as dst:
        dst.write(np.full((1, 256, 128), 3, dtype=np.uint8))
    view = rasters.resampled(rasters.read_raster(on_map / "r.tif"), 2.0)
    part = rasters.on_grid(rasters.read_raster(on_map / "part.tif"), view)
    window = Window(0, 0, view.width, view.height)
    valid = part.read_valid(window, part.read(window))
    assert valid[:, 32:95].all()
    assert not valid[:, :31].any()
    assert not valid[:, 97:].any()


def test_what_cannot_be_resampled_is_refused(on_map):
    with rasters.create_raster(
        on_map / "bare.tif", count=1, height=256, width=320, dtype="uint8"
    ) as dst:
        dst.write(np.ones((1, 256, 320), dtype=np.uint8))
    bare = rasters.read_raster(on_map / "bare.tif")
    with pytest.raises(InputError, match=r"cannot be resampled to 2 m.*georeference it"):
        rasters.resampled(bare, 2.0)
    plain = rasters.read_raster(on_map / "r.tif")
    with pytest.raises(InputError, match="smaller than one pixel of 1000 m"):
        rasters.resampled(plain, 1000.0)
    mask = rasters.on_grid(bare, rasters.resampled(plain, 2.0))  # of the size of the original
    assert (mask.read(Window(5, 5, 20, 20)) == 1).all()
    small = rasters.resampled(rasters.read_raster(on_map / "mask.tif"), 2.0)
    with pytest.raises(InputError, match="nothing tells where it lies"):
        rasters.on_grid(dataclasses.replace(small, crs=None, original=None), plain)


def test_rasters_of_two_resolutions_are_read_in_one(on_map):
    coarse = {"crs": "EPSG:32633", "transform": Affine(3, 0, 5e5, 0, -3, 5e6)}
    layout = {"count": 2, "height": 90, "width": 90, "dtype": "uint8", **coarse}
    with rasters.create_raster(on_map / "coarse.tif", **layout) as dst:
        dst.write(np.ones((2, 90, 90), dtype=np.uint8))
    paths = [on_map / "r.tif", on_map / "coarse.tif"]
    with pytest.raises(InputError, match="RESOLUTION_TOLERANCE"):
        rasters.read_rasters(paths, resolution_tolerance=0.2)
    read = rasters.read_rasters(paths, resolution_tolerance=0.2, target_resolution=2.0)
    assert [raster.width for raster in read] == [160, 135]
