"""HDR images: every value as written, whatever the layout; what is not read is named."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import OpenImageIO as oiio  # noqa: N813
import pandas as pd
import pytest
import rasterio
import shapely
import torch
from conftest import PROJECT, REAL_DATA
from painter import Painter
from segments import make_tiles, seg_conf, write_band

import fileio
import gridsearch
import hdr
import layout
import masks
import predict
import rasters
import splits
import tiling
import trials
from ImageData import InputError, Window
from imutils import log_transform, measure_radiometry
from learning import _plain
from ModelConfig import HdrLogOptions
from networks import DataContract

RGBA = ("R", "G", "B", "A")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(rasters.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def light(height, width, count, kind="float"):
    """Draw values over nine decades that the type holds, as float32 (height, width, channels)."""
    drawn = np.random.default_rng(0).lognormal(0, 3, (height, width, count)).clip(1e-4, 6e4)
    return drawn.astype(np.float16 if kind == "half" else np.float32).astype(np.float32)


def write(path, pixels, kind="float", *, tile=None, names=None, at=(0, 0), picture=None, **more):
    """Write an image by OpenImageIO; `picture` is x, y, width, height of the display window."""
    height, width, count = pixels.shape
    spec = oiio.ImageSpec(width, height, count, kind)
    spec.channelnames = names or RGBA[:count]
    spec.x, spec.y = at
    if picture:
        spec.full_x, spec.full_y, spec.full_width, spec.full_height = picture
    if tile:
        spec.tile_width, spec.tile_height = tile
    for name, value in more.items():
        spec.attribute(name, value)
    file = oiio.ImageOutput.create(str(path))
    assert file.open(str(path), spec), file.geterror()
    assert file.write_image(pixels), file.geterror()
    assert file.close(), file.geterror()
    return path


def read_all(path):
    raster = fileio.read_raster(path)
    return raster, raster.read(Window(0, 0, raster.width, raster.height)).transpose(1, 2, 0)


def write_plain_exr(path, channels, width, height):
    """Write an EXR as no library would, of channels by name: type, sampling and values (H, W)."""
    names = sorted(channels)
    table = b"".join(
        name.encode()
        + b"\0"
        + struct.pack("<iB3xii", channels[name][0], 0, *[channels[name][1]] * 2)
        for name in names
    )
    window = struct.pack("<4i", 0, 0, width - 1, height - 1)
    attributes = {
        ("channels", "chlist"): table + b"\0", ("compression", "compression"): b"\0",
        ("dataWindow", "box2i"): window, ("displayWindow", "box2i"): window,
        ("lineOrder", "lineOrder"): b"\0", ("pixelAspectRatio", "float"): struct.pack("<f", 1),
        ("screenWindowCenter", "v2f"): struct.pack("<2f", 0, 0),
        ("screenWindowWidth", "float"): struct.pack("<f", 1),
    }  # fmt: skip
    head = struct.pack("<ii", 20000630, 2)
    for (name, kind), value in attributes.items():
        head += (
            name.encode() + b"\0" + kind.encode() + b"\0" + struct.pack("<i", len(value)) + value
        )
    rows = []
    for y in range(height):
        parts = [
            values[y // step].tobytes()
            for _, step, values in map(channels.get, names)
            if not y % step
        ]
        row = b"".join(parts)
        rows.append(struct.pack("<ii", y, len(row)) + row)
    place, offsets = len(head) + 1 + 8 * height, b""
    for row in rows:
        offsets += struct.pack("<Q", place)
        place += len(row)
    path.write_bytes(head + b"\0" + offsets + b"".join(rows))
    return path


@pytest.mark.parametrize("compression", ["none", "zip", "piz"])
@pytest.mark.parametrize("kind", ["half", "float"])
@pytest.mark.parametrize("tile", [None, (64, 64), (96, 32), (700, 700)])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_every_value_is_read_as_it_was_written(tmp_path, count, tile, kind, compression):
    pixels = light(300, 530, count, kind)
    names = ("Y",) if count == 1 else None
    path = write(tmp_path / "a.exr", pixels, kind, tile=tile, names=names, compression=compression)
    raster, found = read_all(path)
    assert (raster.path, raster.identifier, raster.files) == (path, "a", (str(path),))
    assert (raster.width, raster.height, raster.dtype) == (530, 300, "float32")
    assert raster.block_shape_hw == (256, 256)
    assert raster.alpha is None
    np.testing.assert_array_equal(found, pixels[..., :3], "alpha is dropped")
    window = Window(200, 100, 150, 120)
    np.testing.assert_array_equal(
        raster.read(window).transpose(1, 2, 0), pixels[100:220, 200:350, :3]
    )


def test_channels_keep_their_names_and_bands_choose_them(tmp_path):
    pixels = light(40, 50, 5)
    names = ("R", "G", "B", "A", "Z")
    path = write(tmp_path / "a.exr", pixels, names=names)
    raster, found = read_all(path)
    np.testing.assert_array_equal(found, pixels[..., [0, 1, 2, 4]])
    with raster.anew() as src:
        assert src.descriptions == ("R", "G", "B", "Z")
    depth = fileio.read_raster(path, [4]).read(Window(0, 0, 50, 40))
    np.testing.assert_array_equal(depth[0], pixels[..., 4])


@pytest.mark.parametrize("tile", [None, (64, 48)])
@pytest.mark.parametrize(
    ("at", "picture"),
    [
        ((10, 20), (0, 0, 600, 700)),  # a part of the picture
        ((-7, -300), (0, 0, 200, 150)),  # beyond it on all sides
        ((130, 40), (100, 30, 500, 400)),  # a picture that does not begin at 0
        ((900, 900), (0, 0, 300, 300)),  # nothing of it
    ],
)
def test_pixels_stand_where_the_data_window_has_them_in_the_picture(tmp_path, at, picture, tile):
    pixels = light(500, 320, 3)
    raster, found = read_all(write(tmp_path / "a.exr", pixels, tile=tile, at=at, picture=picture))
    x, y, width, height = picture
    expected = np.full((height, width, 3), np.nan, np.float32)
    for row in range(height):
        for column in range(width):
            source = (row + y - at[1], column + x - at[0])
            if 0 <= source[0] < 500 and 0 <= source[1] < 320:
                expected[row, column] = pixels[source]
    np.testing.assert_array_equal(found, expected)
    valid = raster.read_valid(Window(0, 0, width, height), found.transpose(2, 0, 1))
    np.testing.assert_array_equal(valid, np.isfinite(expected[..., 0]))


@pytest.mark.parametrize(("kind", "most"), [("half", 65504), ("float", np.finfo(np.float32).max)])
def test_an_infinite_sun_is_the_brightest_number_and_nan_stays_invalid(tmp_path, kind, most):
    pixels = light(10, 10, 3, kind)
    pixels[0, 0], pixels[1, 1, 2], pixels[2, 2, 0] = np.inf, np.nan, -np.inf
    raster, found = read_all(write(tmp_path / "a.exr", pixels, kind))
    np.testing.assert_array_equal(found[0, 0], most)
    valid = raster.read_valid(Window(0, 0, 10, 10), found.transpose(2, 0, 1))
    assert np.argwhere(~valid).tolist() == [[1, 1], [2, 2]]


@pytest.mark.parametrize("suffix", [".hdr", ".HDR", ".pic"])
def test_radiance_images_are_what_their_own_decoding_gives(tmp_path, suffix):
    pixels = light(300, 517, 3)
    path = write(tmp_path / "a.hdr", pixels).rename(tmp_path / f"b{suffix}")
    _, found = read_all(path)
    np.testing.assert_array_equal(found, decode_radiance(path.read_bytes()))
    largest = pixels.max(axis=2, keepdims=True)
    assert (np.abs(found - pixels) <= largest / 128).all()


def decode_radiance(data):
    """Decode runs and shared exponents (Ward 1991, mantissas as they are); float32 (H, W, 3)."""
    head, _, rest = data.partition(b"\n\n")
    assert head.startswith(b"#?")
    size, _, rest = rest.partition(b"\n")
    height, width = int(size.split()[1]), int(size.split()[3])
    rows, place = [], 0
    for _ in range(height):
        assert rest[place : place + 2] == b"\2\2"
        place += 4
        row = bytearray()
        while len(row) < 4 * width:
            count = rest[place]
            if count > 128:
                row += rest[place + 1 : place + 2] * (count - 128)
                place += 2
            else:
                row += rest[place + 1 : place + 1 + count]
                place += 1 + count
        rows.append(np.frombuffer(bytes(row), np.uint8).reshape(4, width).T)
    stored = np.stack(rows).astype(np.float64)
    scale = np.where(stored[..., 3:] > 0, np.exp2(stored[..., 3:] - 136), 0)
    return (stored[..., :3] * scale).astype(np.float32)


def test_what_is_not_read_is_named(tmp_path):
    half = np.ones((8, 8), np.float16)
    small = np.ones((4, 4), np.float16)
    whole = np.full((8, 8), 2**24 + 1, np.uint32)
    chroma = {"Y": (1, 1, half), "BY": (1, 2, small), "RY": (1, 2, small)}
    path = write_plain_exr(tmp_path / "chroma.exr", chroma, 8, 8)
    with pytest.raises(InputError, match=r"chroma\.exr stores luminance and subsampled chroma"):
        fileio.read_raster(path)
    mixed = {"G": (1, 1, half), "id": (0, 1, whole)}
    path = write_plain_exr(tmp_path / "ids.exr", mixed, 8, 8)
    with pytest.raises(InputError, match=r"ids\.exr holds channels of integers, .*'id': 'uint"):
        fileio.read_raster(path)
    plain = write_plain_exr(tmp_path / "plain.exr", {"G": (1, 1, half)}, 8, 8)
    assert (read_all(plain)[1] == 1).all(), "the writer of this test is right but for them"

    parts = oiio.ImageOutput.create(str(tmp_path / "parts.exr"))
    specs = (oiio.ImageSpec(8, 8, 3, "half"),) * 2
    assert parts.open(str(tmp_path / "parts.exr"), specs), parts.geterror()
    for index, spec in enumerate(specs):
        if index:
            assert parts.open(str(tmp_path / "parts.exr"), spec, "AppendSubimage")
        assert parts.write_image(light(8, 8, 3))
    parts.close()
    with pytest.raises(InputError, match=r"parts\.exr holds 2 parts; .* --subimage 0"):
        fileio.read_raster(tmp_path / "parts.exr")

    spec = oiio.ImageSpec(8, 8, 1, "float")
    spec.deep = True
    deep = oiio.ImageOutput.create(str(tmp_path / "deep.exr"))
    assert deep.open(str(tmp_path / "deep.exr"), spec), deep.geterror()
    samples = oiio.DeepData()
    samples.init(64, 1, [oiio.TypeFloat], ["Z"])
    assert deep.write_deep_image(samples), deep.geterror()
    deep.close()
    with pytest.raises(InputError, match=r"deep\.exr holds deep pixels"):
        fileio.read_raster(tmp_path / "deep.exr")

    path = write(tmp_path / "large.exr", light(8, 8, 3), picture=(0, 0, 2**20, 2**20))
    with pytest.raises(InputError, match="1048576 x 1048576 px by its header"):
        fileio.read_raster(path)
    path = write(tmp_path / "alpha.exr", light(8, 8, 1), names=("A",))
    with pytest.raises(InputError, match="alpha only"):
        fileio.read_raster(path)
    turned = write(tmp_path / "turned.hdr", light(8, 8, 3))
    turned.write_bytes(turned.read_bytes().replace(b"-Y 8 +X 8", b"+Y 8 +X 8"))
    with pytest.raises(InputError, match=r"turned picture \(orientation 4\)"):
        fileio.read_raster(turned)


@pytest.mark.parametrize("tile", [None, (64, 64)])
@pytest.mark.parametrize("name", ["a.exr", "a.hdr"])
@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, 0.97])
def test_damaged_files_are_refused_and_leave_no_copy(tmp_path, cache, name, tile, kept):
    if tile and name == "a.hdr":
        pytest.skip("Radiance files have no tiles")
    path = write(tmp_path / name, light(300, 300, 3), tile=tile)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(InputError, match=rf"{name} (is not|cannot be read)"):
        fileio.read_raster(path)
    assert not list(cache.rglob("*.tif"))


def test_other_files_of_the_same_suffix_are_left_to_gdal(tmp_path):
    (tmp_path / "a.hdr").write_text("ENVI\nsamples = 4\n")
    assert not hdr.is_hdr(tmp_path / "a.hdr")
    with pytest.raises(InputError, match="not a raster that GDAL can read"):
        fileio.read_raster(tmp_path / "a.hdr")
    with pytest.raises(InputError, match="does not exist"):
        fileio.read_raster(tmp_path / "none.exr")


def test_a_copy_is_made_once_and_again_when_the_file_changes(tmp_path, cache):
    path = write(tmp_path / "a.exr", light(40, 50, 3))
    first = Path(fileio.read_raster(path).source)
    assert first == cache / fileio.content_fingerprint(path) / "a.tif"
    stamp = first.stat().st_mtime_ns
    assert fileio.read_raster(path).source == str(first)
    assert first.stat().st_mtime_ns == stamp
    write(path, light(40, 50, 3) + 1)
    raster, found = read_all(path)
    assert raster.source != str(first)
    np.testing.assert_array_equal(found, light(40, 50, 3) + 1)
    stamp = Path(raster.source).stat().st_mtime_ns
    os.utime(path, ns=(stamp + 10**9, stamp + 10**9))
    assert Path(fileio.read_raster(path).source).stat().st_mtime_ns > stamp


def test_where_copies_are_kept(tmp_path, monkeypatch):
    assert rasters.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv(rasters.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert rasters.cache_folder() == tmp_path / "user" / "LargeRasterOR"
    path = write(tmp_path / "a.exr", light(40, 50, 3))
    (raster,) = fileio.read_rasters([path], cache_dir=tmp_path / "named")
    assert Path(raster.source).parents[1] == tmp_path / "named" == rasters.cache_folder()


def test_processes_that_open_a_file_at_once_share_one_copy(tmp_path, cache):
    pixels = light(1024, 2048, 3)
    path = write(tmp_path / "a.exr", pixels, compression="none")
    code = (
        "import sys, fileio; from ImageData import Window; r = fileio.read_raster(sys.argv[1]); "
        "print(r.read(Window(0, 0, r.width, r.height)).sum(dtype=float))"
    )
    command = [sys.executable, "-c", code, str(path)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=PROJECT) for _ in range(2)
    ]
    sums = [float(process.communicate(timeout=120)[0]) for process in running]
    assert [process.returncode for process in running] == [0, 0]
    np.testing.assert_allclose(sums, pixels.sum(dtype=float), rtol=1e-6)
    assert [file.name for file in cache.rglob("*.tif")] == ["a.tif"]
    assert not [file for file in cache.rglob("*") if file.name.startswith(".") and file.suffix]


@pytest.mark.parametrize("tile", [None, (64, 64), (512, 2048)])
def test_blocks_cover_the_picture_once_and_are_bounded(tmp_path, tile, monkeypatch):
    monkeypatch.setattr(hdr, "BLOCK_BYTES", 2**22)
    path = write(tmp_path / "a.exr", light(1100, 1500, 3), tile=tile)
    with hdr.open_hdr(path) as image:
        seen = np.zeros((1100, 1500), int)
        for x, y, width, height in image.blocks():
            seen[y : y + height, x : x + width] += 1
            assert height * width * 12 <= 2**22 or tile != (64, 64)
        assert (seen == 1).all()


def test_the_memory_of_a_copy_follows_the_rows_not_the_file(tmp_path):
    code = (
        "import sys, resource, fileio; from pathlib import Path\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "fileio.read_raster(sys.argv[1]); before = peak()\n"
        "fileio.read_raster(sys.argv[2]); print((peak() - before) * 1024)"
    )
    small = write(tmp_path / "small.exr", light(512, 1024, 3), compression="none")
    large = write(tmp_path / "large.exr", np.tile(light(512, 1024, 3), (12, 1, 1)),
                  compression="none")  # fmt: skip
    command = [sys.executable, "-c", code, str(small), str(large)]
    added = int(subprocess.run(command, check=True, capture_output=True, text=True,
                               cwd=PROJECT).stdout)  # fmt: skip
    assert large.stat().st_size > 70e6
    assert added < 75e6, "GDAL's cache of 64 MB fills, and no more"


def test_the_doctor_and_the_tiles_take_it_as_any_raster(tmp_path, caplog):
    pixels = light(600, 700, 3, "half")
    path = write(tmp_path / "sky.exr", pixels, "half")
    raster = fileio.read_raster(path)
    caplog.clear()
    (checked,) = fileio.check_layout([raster], repair=True, cache_dir=tmp_path / "cache")
    assert checked == raster
    assert not caplog.records
    assert layout.raster_fingerprint(raster) == fileio.content_fingerprint(path)
    assert raster.made_from["source"] == "sky.exr"
    image, valid, _ = tiling.read_tile(raster, Window(300, 200, 256, 256), 90)
    np.testing.assert_array_equal(image.transpose(1, 2, 0), np.rot90(pixels[200:456, 300:556]))
    assert valid.all()
    blocks = pd.DataFrame({"raster": ["sky"], "x": 0, "y": 0, "width": 700, "height": 600})
    sample = tiling.sample_pixels(blocks, {"sky": raster}, seed=0)
    assert sample.shape[0] == 3
    assert np.isin(sample[0], pixels[..., 0]).all()
    regions = fileio.Regions((shapely.box(0, 0, 10, 10),), ())
    assert raster.with_regions(regions).made_from["regions"] != raster.made_from["regions"]
    fileio.rewrite(raster, tmp_path / "sky.tif")
    np.testing.assert_array_equal(read_all(tmp_path / "sky.tif")[1], pixels)


def test_a_map_of_an_image_is_that_of_its_logarithm(tmp_path, cache):
    pixels = light(200, 300, 1, "half")
    pixels[:5, :7], pixels[9, 9] = np.inf, np.nan
    path = write(tmp_path / "sky.exr", pixels, "half", names=("Y",))
    options = HdrLogOptions(clip=5000.0)
    fitted = measure_radiometry(light(10, 10, 1).reshape(1, -1), "hdr_log", options=options)
    model = Painter()
    model.contract = replace(model.contract, dtype="float32", radiometry=fitted)
    chosen = {"device": "cpu", "precision": "32-true", "override": ("radiometry",)}
    predict.predict_raster(model, path, [tmp_path / "map.tif"], **chosen)
    with rasterio.open(tmp_path / "map.tif") as src:
        found, valid = src.read(1), src.dataset_mask() > 0
    seen = log_transform(pixels[None, ..., 0], options)
    with torch.inference_mode():
        expected = model(torch.from_numpy(seen)[None]).argmax(1)[0].numpy()
    assert np.argwhere(~valid).tolist() == [[9, 9]]
    assert (found == expected)[valid].mean() > 0.9999  # but for what rounding decides
    assert len(np.unique(expected[valid])) == 3
    record = json.loads((tmp_path / "map.tif.provenance.json").read_text())
    assert record["plan"]["raster"] == fileio.content_fingerprint(path)
    assert str(cache) not in json.dumps(record), "a result depends on the image, not on its copy"


def test_a_search_and_a_checkpoint_keep_the_constants(tmp_path):
    paths, names = [], {"0": "ground", "1": "sky"}
    for number in range(2):
        path = write(tmp_path / f"sky{number}.exr", light(256, 256, 3, "half"), "half")
        write_band(tmp_path / f"mask{number}.tif", np.tril(np.ones((256, 256), np.uint8)))
        paths.append(path)
    opened = fileio.read_rasters(paths)
    table = [tmp_path / f"mask{number}.tif" for number in range(2)]
    images, _ = masks.label_images(opened, table, classes=names)
    blocks = splits.ground_blocks(
        opened, split_by="block", max_tile_size=64, block_size=64, test_proportion=0.2,
        validation_proportion=0.25, seed=0,
    )  # fmt: skip
    tilings, conf = make_tiles(images, blocks, tmp_path, 64), seg_conf()
    options = HdrLogOptions(log_split_around1=True, clip_percentile=99)
    data, _ = trials.prepare_search(
        images, blocks, tilings, [1.0], conf, stretch="hdr_log", stretch_options=options
    )
    constants = data.radiometry.options
    assert constants.log_split_around1
    assert 100 < constants.clip < 60_000
    plan = gridsearch.Plan("a", "b", {"learning_rate": [0.1]}, "grid", 1, False, None)
    gridsearch._write_search(tmp_path / "run", plan, data, conf)
    _, again, _ = gridsearch._read_search(tmp_path / "run")
    assert again.radiometry == data.radiometry
    contract = replace(Painter().contract, radiometry=data.radiometry)
    assert DataContract(**_plain(asdict(contract))) == contract
    before = _plain(asdict(Painter().contract))
    assert before["radiometry"].pop("options") is None
    assert DataContract(**before) == Painter().contract, "checkpoints from before the constants"


def test_real_panoramas_are_read_and_the_photograph_is_refused_by_name():
    folder = REAL_DATA / "hdr"
    if not folder.exists():
        pytest.skip("the real HDR images are not here")
    for name, width, height, half in (("Kerner", 1024, 512, 4), ("Stage", 1000, 500, 3)):
        path = folder / f"{name}EnvLatLong.exr"
        _, found = read_all(path)
        expected = oiio.ImageBuf(str(path)).get_pixels("float")
        assert expected.shape == (height, width, half)
        np.testing.assert_array_equal(found, expected[..., :3])
        assert found.max() > 1000
    with pytest.raises(InputError, match=r"CrissyField\.exr stores luminance and subsampled"):
        fileio.read_raster(folder / "CrissyField.exr")
