"""Layout of rasters: what the doctor finds, what a rewrite keeps, copies in the cache."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
from conftest import PROJECT
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS

import fileio
import layout
from ImageData import InputError, Window
from rasters import Raster, Regions, create_raster

STRIPED = {"tiled": False, "blockxsize": None, "blockysize": 1, "compress": "deflate"}


def write(path, pixels, mask=None, **profile):
    count, height, width = pixels.shape
    profile = {"count": count, "height": height, "width": width, "dtype": pixels.dtype} | profile
    profile = {k: v for k, v in profile.items() if v is not None}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", **{"driver": "GTiff"} | profile) as dst,
    ):
        dst.write(pixels)
        if mask is not None:
            dst.write_mask(mask)
    return path


def noise(count, height, width, dtype="uint8", seed=0):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(size=(count, height, width)).astype(dtype)
    return rng.integers(0, 250, (count, height, width)).astype(dtype)


@pytest.fixture(scope="module")
def striped(tmp_path_factory):
    path = tmp_path_factory.mktemp("striped") / "wide.tif"
    return write(path, noise(3, 1100, 6000), **STRIPED)


# -- diagnosis ----------------------------------------------------------------------------------


def test_strips_are_found_and_their_rewrite_is_faster_by_measure(striped):
    diagnosis = layout.diagnose(Raster.open(striped), seconds=0.5)
    assert [p.partition(":")[0] for p in diagnosis.problems] == ["strips", "no overviews"]
    assert diagnosis.block_shape_hw == (1, 6000)
    assert (diagnosis.compression, diagnosis.interleave) == ("deflate", "pixel")
    assert diagnosis.expected_windows_per_second > 2 * diagnosis.windows_per_second > 0
    assert diagnosis.advisable
    assert "windows per second" in diagnosis.report()


def test_the_expected_rate_is_that_of_the_rewritten_raster(striped, tmp_path):
    diagnosis = layout.diagnose(Raster.open(striped), seconds=0.5)
    after = layout.measure(Raster.open(layout.rewrite(striped, tmp_path / "o.tif")), seconds=0.5)
    assert 0.3 < after / diagnosis.expected_windows_per_second < 3  # a shared machine is noisy


@pytest.mark.parametrize(
    ("name", "profile", "problem"),
    [
        ("s.tif", {"blockysize": 2500, "compress": "deflate"}, "the file is one compressed strip"),
        ("g.tif", {"blockxsize": 2048, "blockysize": 2048, "compress": "deflate"}, "giant blocks"),
        ("p.png", {"driver": "PNG"}, "a PNG file is decoded from its start"),
        ("j.jpg", {"driver": "JPEG"}, "a JPEG file is decoded from its start"),
    ],
)
def test_what_decodes_far_more_than_a_window_is_a_problem(tmp_path, name, profile, problem):
    path = write(tmp_path / name, noise(1, 2500, 2500), **profile)
    diagnosis = layout.diagnose(Raster.open(path), seconds=0.3)
    assert len(diagnosis.problems) == 1
    assert diagnosis.problems[0].startswith(problem)
    assert diagnosis.advisable


@pytest.mark.parametrize(
    "profile",
    [
        {"width": 3000, "height": 3000},
        {"width": 3000, "height": 3000, "blockxsize": 512, "blockysize": 512, "compress": "lzw"},
        {"width": 640, "height": 512, **STRIPED},  # small, any layout will do
        {"width": 40, "height": 30, **STRIPED},  # smaller than a window
    ],
)
def test_healthy_rasters_are_left_alone(tmp_path, profile):
    profile = {k: v for k, v in profile.items() if v is not None}
    drop = {} if profile.get("tiled", True) else {"blockxsize": profile["width"]}
    with create_raster(tmp_path / "h.tif", count=1, dtype="uint8", **profile | drop) as dst:
        dst.write(noise(1, profile["height"], profile["width"]))
    raster = Raster.open(tmp_path / "h.tif")
    diagnosis = layout.diagnose(raster, seconds=0.1)
    assert diagnosis.problems == ()
    assert diagnosis.gain == 1
    assert not diagnosis.advisable
    assert repair(raster, tmp_path / "cache") is raster
    assert not (tmp_path / "cache").exists()


def test_missing_overviews_are_said_but_no_reason_to_rewrite(tmp_path):
    path = tmp_path / "t.tif"
    profile = {"width": 5000, "height": 300, "count": 1, "dtype": "uint8"}
    with create_raster(path, **profile):
        pass
    diagnosis = layout.diagnose(Raster.open(path), seconds=0.1)
    assert [p.partition(":")[0] for p in diagnosis.problems] == ["no overviews"]
    assert not diagnosis.advisable
    with rasterio.open(path, "r+") as dst:
        dst.build_overviews([2, 4, 8, 16])
    assert layout.diagnose(Raster.open(path), seconds=0.1).problems == ()


def test_strips_behind_a_vrt_are_seen(striped, tmp_path):
    vrt = tmp_path / "v.vrt"
    with rasterio.open(striped) as src:
        rasterio.shutil.copy(src, vrt, driver="VRT")
    assert layout.diagnose(Raster.open(vrt), seconds=0.2).problems[0].startswith("strips")


def test_a_diagnosis_of_a_huge_striped_raster_takes_seconds(tmp_path):
    path = tmp_path / "huge.tif"
    profile = {"width": 100_000, "height": 100_000, "count": 3, "dtype": "uint8"}
    with rasterio.open(
        path, "w", driver="GTiff", sparse_ok=True, bigtiff="yes", compress="deflate", **profile
    ):
        pass
    raster, start = Raster.open(path), time.perf_counter()
    assert layout.diagnose(raster, seconds=1.0).problems[0].startswith("strips")
    assert time.perf_counter() - start < 8


def test_files_that_cannot_be_read_are_named(striped, tmp_path):
    cut = tmp_path / "cut.tif"
    cut.write_bytes(striped.read_bytes()[: striped.stat().st_size // 50])
    with pytest.raises(InputError, match=r"cut\.tif"):
        layout.diagnose(Raster.open(cut), seconds=0.2)
    with pytest.raises(InputError, match=r"cut\.tif cannot be rewritten to .*o\.tif"):
        layout.rewrite(cut, tmp_path / "o.tif")
    assert [p.name for p in tmp_path.iterdir()] == ["cut.tif"]


# -- rewrite ------------------------------------------------------------------------------------


def with_holes(pixels, value):
    pixels = pixels.copy()
    pixels[..., 5:40, 7:90] = value
    return pixels


HALF = np.zeros((700, 900), np.uint8)
HALF[:, 300:] = 255
RGBA = noise(4, 700, 900)
RGBA[3] = HALF


@pytest.mark.parametrize(
    ("pixels", "profile"),
    [
        (with_holes(noise(3, 700, 900), 0), {"nodata": 0, "photometric": "RGB"}),
        (noise(5, 700, 900, "uint16"), {"nodata": 65535}),
        (with_holes(noise(1, 700, 900, "float32"), np.nan), {"nodata": np.nan}),
        (with_holes(noise(2, 700, 900, "float64"), -np.inf), {}),
        (noise(12, 200, 300, "int16"), {"nodata": -1}),
        (RGBA, {"photometric": "RGB", "alpha": "YES"}),
        (noise(3, 700, 900), {"mask": HALF}),
        (noise(1, 700, 900) & 1, {"nbits": 1}),
        (noise(1, 700, 900, "uint16"), {"nbits": 12}),
        (noise(1, 700, 900, "int8"), {}),
    ],
    ids=["rgb", "uint16", "nan", "inf", "bands", "rgba", "mask", "bit", "12bit", "int8"],
)
def test_a_rewrite_keeps_pixels_and_masks(tmp_path, pixels, profile):
    source = write(tmp_path / "s.tif", pixels, **STRIPED | profile)
    out = layout.rewrite(source, tmp_path / "o.tif")
    with rasterio.open(source) as old, rasterio.open(out) as new:
        np.testing.assert_array_equal(new.read(), pixels)
        np.testing.assert_array_equal(new.dataset_mask(), old.dataset_mask())
        assert new.mask_flag_enums == old.mask_flag_enums
        assert new.colorinterp == old.colorinterp
        assert new.block_shapes == [(256, 256)] * len(pixels)
        assert new.compression.name == "zstd"
        assert new.overviews(1) == ([2] if max(pixels.shape) > 512 else [])
    before, after = Raster.open(source), Raster.open(out)
    window = Window(-3, 600, 310, 200)
    images = [raster.read(window) for raster in (before, after)]
    np.testing.assert_array_equal(*images)
    np.testing.assert_array_equal(
        before.read_valid(window, images[0]), after.read_valid(window, images[1])
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.tif", "s.tif"]


def test_a_rewrite_keeps_map_reference_descriptions_and_tags(tmp_path):
    moon = CRS.from_wkt(
        'PROJCRS["Moon",BASEGEOGCRS["GCS_Moon",DATUM["D_Moon",ELLIPSOID["Moon",1737400,0]]],'
        'CONVERSION["c",METHOD["Equidistant Cylindrical"],'
        'PARAMETER["Latitude of 1st standard parallel",0]],CS[Cartesian,2],AXIS["e",east],'
        'AXIS["n",north],LENGTHUNIT["metre",1]]'
    )
    transform = rasterio.Affine.translation(1e5, 2e5) @ rasterio.Affine.rotation(20)
    source = write(tmp_path / "s.tif", noise(2, 60, 90), crs=moon, transform=transform, **STRIPED)
    with rasterio.open(source, "r+") as dst:
        dst.descriptions = ("red", "near infrared")
        dst.update_tags(SENSOR="one", ACQUIRED="2020")
        dst.update_tags(2, WAVELENGTH="850")
        dst.scales, dst.offsets, dst.units = (1.0, 0.5), (0.0, 3.0), ("", "K")
    with (
        rasterio.open(source) as old,
        rasterio.open(layout.rewrite(source, tmp_path / "o.tif")) as new,
    ):
        assert new.crs == old.crs
        assert new.crs is not None
        assert new.transform.almost_equals(transform, 1e-9)
        for what in ("descriptions", "scales", "offsets", "units"):
            assert getattr(new, what) == getattr(old, what)
        assert new.tags()["SENSOR"] == "one"
        assert new.tags(2)["WAVELENGTH"] == "850"


def test_a_rewrite_keeps_ground_control_points_and_palettes(tmp_path):
    gcps = [GroundControlPoint(r, c, c / 10, 50 - r / 10) for r, c in [(0, 0), (0, 90), (60, 0)]]
    source = write(tmp_path / "s.tif", noise(1, 60, 90) % 3, **STRIPED)
    colors = {0: (0, 0, 0, 255), 1: (255, 0, 0, 255), 2: (0, 0, 255, 255)}
    with rasterio.open(source, "r+") as dst:
        dst.gcps = (gcps, CRS.from_epsg(4326))
        dst.write_colormap(1, colors)
    with rasterio.open(layout.rewrite(source, tmp_path / "o.tif")) as new:
        points, crs = new.gcps
        assert [(p.row, p.col, p.x, p.y) for p in points] == [
            (p.row, p.col, p.x, p.y) for p in gcps
        ]
        assert crs == CRS.from_epsg(4326)
        assert {i: new.colormap(1)[i] for i in colors} == colors


def test_overviews_are_averages_down_to_a_look_at_the_whole(tmp_path):
    pixels = noise(1, 2100, 1500)
    out = layout.rewrite(write(tmp_path / "s.tif", pixels, **STRIPED), tmp_path / "o.tif")
    with rasterio.open(out) as new:
        assert new.overviews(1) == [2, 4, 8]
        half = new.read(1, out_shape=(1050, 750))
    blocks = pixels[0].reshape(1050, 2, 750, 2).mean(axis=(1, 3))
    assert np.abs(half - blocks).max() <= 0.5


def test_bands_of_different_types_are_refused_with_the_cure(tmp_path):
    parts = [write(tmp_path / f"{t}.tif", noise(1, 8, 8, t)) for t in ("uint8", "float32")]
    bands = "".join(
        f'<VRTRasterBand dataType="{kind}" band="{i + 1}"><SimpleSource>'
        f"<SourceFilename>{part}</SourceFilename></SimpleSource></VRTRasterBand>"
        for i, (part, kind) in enumerate(zip(parts, ("Byte", "Float32"), strict=True))
    )
    vrt = fileio.write_text(
        tmp_path / "v.vrt", f'<VRTDataset rasterXSize="8" rasterYSize="8">{bands}</VRTDataset>'
    )
    with pytest.raises(InputError, match=r"different types .*convert them"):
        layout.rewrite(vrt, tmp_path / "o.tif")


def test_a_raster_does_not_replace_itself(striped, tmp_path):
    link = tmp_path / "link.tif"
    link.symlink_to(striped)
    with pytest.raises(InputError, match="would replace the raster"):
        layout.rewrite(striped, link)
    with pytest.raises(InputError, match="cannot be rewritten"):
        layout.rewrite(striped, "/proc/none/o.tif")


def test_a_fits_image_is_rewritten_as_it_reads(tmp_path):
    fits = pytest.importorskip("astropy.io.fits")
    pixels = noise(1, 300, 400, "uint16")[0]
    fits.PrimaryHDU(pixels).writeto(tmp_path / "f.fits")
    source = Raster.open(tmp_path / "f.fits")
    after = Raster.open(layout.rewrite(source, tmp_path / "f.tif"))
    assert after.dtype == source.dtype == "uint16"
    np.testing.assert_array_equal(after.read(Window(0, 0, 400, 300))[0], pixels)


PEAK = """
import resource, sys, layout
layout.rewrite(sys.argv[1], sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_memory_of_a_rewrite_does_not_grow_with_the_raster(tmp_path):
    peaks = []
    for side in (4096, 16384):
        path = tmp_path / f"{side}.tif"
        with rasterio.open(
            path, "w", driver="GTiff", width=side, height=side, count=1, dtype="uint8",
            compress="lzw", sparse_ok=True,
        ):  # fmt: skip
            pass
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(path), str(tmp_path / "out.tif")],
            cwd=PROJECT, check=True, capture_output=True, text=True,
        )  # fmt: skip
        peaks.append(float(done.stdout))
    assert peaks[1] - peaks[0] < 100, peaks


def test_a_killed_rewrite_leaves_no_file_of_that_name(tmp_path):
    source = tmp_path / "s.tif"
    with rasterio.open(
        source, "w", driver="GTiff", width=30_000, height=30_000, count=3, dtype="uint8",
        compress="lzw", sparse_ok=True, bigtiff="yes",
    ):  # fmt: skip
        pass
    out = tmp_path / "out" / "s.tif"
    command = [sys.executable, "-c", PEAK, str(source), str(out)]
    process = subprocess.Popen(command, cwd=PROJECT)
    try:
        deadline = time.time() + 60
        while not any(p.stat().st_size for p in tmp_path.glob("out/.*.tif")):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.time() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert not out.exists()


# -- repair -------------------------------------------------------------------------------------


def test_a_fingerprint_is_of_the_content(tmp_path):
    rng = np.random.default_rng(0)
    data = bytearray(rng.bytes(6 * 2**20))
    path, copy = tmp_path / "a.bin", tmp_path / "b.bin"
    path.write_bytes(data)
    first = layout.content_fingerprint(path)
    shutil.copy(path, copy)
    os.utime(path, (1, 1))
    assert layout.content_fingerprint(path) == layout.content_fingerprint(copy) == first
    for place in (0, len(data) - 1):
        changed = data.copy()
        changed[place] ^= 1
        copy.write_bytes(changed)
        assert layout.content_fingerprint(copy) != first
    copy.write_bytes(data + b"0")
    assert layout.content_fingerprint(copy) != first
    empty = tmp_path / "empty"
    empty.touch()
    assert layout.content_fingerprint(empty) != first


def test_a_fingerprint_of_a_huge_file_is_fast(tmp_path):
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate(30 * 2**30)
    start = time.perf_counter()
    layout.content_fingerprint(path)
    assert time.perf_counter() - start < 2


def repair(raster, cache_dir):
    (checked,) = layout.check_layout([raster], repair=True, cache_dir=cache_dir)
    return checked


def test_a_repaired_raster_has_the_name_bands_and_regions_and_is_made_once(striped, tmp_path):
    regions = Regions(aoi=(shapely.box(0, 0, 100, 100),))
    raster = Raster.open(striped, [3, 1]).with_regions(regions)
    mended = repair(raster, tmp_path)
    assert mended.path == tmp_path / layout.content_fingerprint(striped) / "wide.tif"
    assert mended.identifier == raster.identifier
    assert (mended.bands, mended.regions) == ((3, 1), regions)
    assert mended.block_shape_hw == (256, 256)
    window = Window(100, 200, 300, 300)
    np.testing.assert_array_equal(mended.read(window), raster.read(window))
    made = mended.path.stat().st_mtime_ns
    assert repair(raster, tmp_path).path.stat().st_mtime_ns == made
    os.utime(striped)  # the fingerprint may have missed what was written
    assert repair(raster, tmp_path).path.stat().st_mtime_ns > made
    os.utime(striped, (2**32, 2**32))  # of a clock that was wrong
    once = repair(raster, tmp_path).path.stat().st_ino
    assert repair(raster, tmp_path).path.stat().st_ino == once
    assert repair(mended, tmp_path) is mended


def test_a_decision_holds_from_run_to_run(striped, tmp_path, monkeypatch):
    raster = Raster.open(striped)
    first = repair(raster, tmp_path)
    monkeypatch.setattr(layout, "measure", lambda *args, **options: pytest.fail("measured again"))
    assert repair(raster, tmp_path) == first


def test_what_cannot_be_repaired_is_read_as_it_is(striped, tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise InputError("the disk is full")

    monkeypatch.setattr(layout, "rewrite", refuse)
    raster = Raster.open(striped)
    assert repair(raster, tmp_path) is raster
    assert "cannot be repaired: the disk is full" in caplog.text


def test_a_changed_source_of_a_vrt_is_copied_anew(striped, tmp_path):
    source, vrt = tmp_path / "s.tif", tmp_path / "v.vrt"
    shutil.copy(striped, source)
    with rasterio.open(source) as src:
        rasterio.shutil.copy(src, vrt, driver="VRT")
    before = repair(Raster.open(vrt), tmp_path / "cache")
    write(source, noise(3, 1100, 6000, seed=9), **STRIPED)
    after = repair(Raster.open(vrt), tmp_path / "cache")
    assert before.path.name == after.path.name == "v.tif"
    assert before.path != after.path


def test_bad_layouts_are_warned_of_once_each_or_repaired(striped, tmp_path, caplog):
    with create_raster(tmp_path / "ok.tif", width=300, height=300, count=3, dtype="uint8"):
        pass
    rasters = [Raster.open(striped), Raster.open(tmp_path / "ok.tif")]
    with caplog.at_level(logging.WARNING):
        checked = layout.check_layout(rasters, repair=False, cache_dir=tmp_path / "cache")
    assert checked == rasters
    (record,) = caplog.records
    message = record.getMessage()
    for part in (str(striped), "windows per second", "times", "strips", "REPAIR_LAYOUT = True"):
        assert part in message
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        checked = layout.check_layout(rasters, repair=True, cache_dir=tmp_path / "cache")
    assert not caplog.records
    assert [r.identifier for r in checked] == ["wide", "ok"]
    assert checked[0].path.parent.parent == tmp_path / "cache"
    assert checked[1] is rasters[1]


# -- command ------------------------------------------------------------------------------------


def run(*arguments):
    command = [sys.executable, str(PROJECT / "fileio.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path.home())


def test_the_doctor_reports_and_rewrites(striped, tmp_path):
    report = run("doctor", striped, "--seconds", 0.3)
    assert report.returncode == fileio.DOCTOR_EXIT, report.stderr
    for part in (str(striped), "6000 x 1100 px", "deflate", "strips", "--rewrite"):
        assert part in report.stdout
    done = run("doctor", striped, "--rewrite", tmp_path / "o.tif", "--seconds", 0.3)
    assert done.returncode == 0, done.stderr
    assert "before" in done.stdout
    assert "after" in done.stdout
    healthy = run("doctor", tmp_path / "o.tif", "--seconds", 0.3)
    assert healthy.returncode == 0
    assert "healthy" in healthy.stdout


def test_the_doctor_takes_several_rasters_into_a_folder(striped, tmp_path, capsys):
    small = write(tmp_path / "small.tif", noise(1, 40, 50))
    arguments = ["doctor", str(striped), str(small), "--seconds", "0.2"]
    assert fileio.main([*arguments, "--rewrite", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["small.tif", "wide.tif"]
    assert capsys.readouterr().out.count("rewritten to") == 2


def test_the_doctor_says_in_one_line_what_it_cannot_read(tmp_path):
    done = run("doctor", tmp_path / "none.tif")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "none.tif does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_complete():
    assert {"doctor", "preflight"} <= set(run("--help").stdout.replace(",", " ").split())
    shown = run("doctor", "--help").stdout
    for part in ("RASTER", "--rewrite", "--seconds", "Exit code"):
        assert part in shown
    assert run("doctor").returncode == 2


def test_preflight_is_the_program_beside_with_the_remaining_arguments(tmp_path, monkeypatch):
    fileio.write_text(
        tmp_path / "preflight.py",
        "import sys\nassert __name__ == '__main__'\nopen(sys.argv[1], 'w').write(sys.argv[2])\n"
        "sys.exit(4)\n",
    )
    monkeypatch.setattr(fileio, "__file__", str(tmp_path / "fileio.py"))
    before = sys.argv
    assert fileio.main(["preflight", str(tmp_path / "told"), "--help"]) == 4
    assert (tmp_path / "told").read_text() == "--help"
    assert sys.argv is before
