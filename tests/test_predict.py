"""The contract: which rasters a trained model may be used on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import rasterio
from test_LargeRasterOR import contract_of

import fileio
import predict
from ImageData import InputError
from imutils import Radiometry

UTM = {"crs": "EPSG:32617", "transform": (0.1, 0, 404000, 0, -0.1, 3285000)}


def write(path, *, count=3, dtype="uint16", mean=1000, spread=200, scale=1.0, **profile):
    rng = np.random.default_rng(0)
    pixels = rng.normal(mean, spread, (count, 200, 200)).clip(1, 60000).astype(dtype)
    a, b, c, d, e, f = UTM["transform"]
    transform = rasterio.Affine(a * scale, b, c, d, e * scale, f)
    layout = {"width": 200, "height": 200, "count": count, "dtype": dtype}
    with fileio.create_raster(path, **layout, **(UTM | {"transform": transform} | profile)) as dst:
        dst.write(pixels)
    return path


@pytest.fixture
def contract():
    radiometry = Radiometry("percentile", (500.0,) * 2, (1500.0,) * 2, (0.5,) * 2, (0.2,) * 2)
    return replace(
        contract_of(bands=2), bands=(3, 1), band_count=3, dtype="uint16", radiometry=radiometry,
        resolution=0.1,
    )  # fmt: skip


def test_a_raster_like_those_of_the_training_opens_with_its_bands(tmp_path, contract):
    raster = predict.open_raster(write(tmp_path / "a.tif"), contract)
    assert raster.bands == (3, 1)


@pytest.mark.parametrize(
    ("options", "message", "check"),
    [
        ({"count": 4}, "it has 4 bands, training had 3", "bands"),
        ({"dtype": "float32"}, "its pixels are float32, training had uint16", "dtype"),
        (
            {"scale": 1.5},
            r"are 0\.15 m wide, in training they were 0\.1 m",
            "resolution",
        ),
        ({"scale": 0.5}, r"its pixels are 0\.05001 m wide", "resolution"),
        ({"mean": 40}, r"the median of band \d is .*standard deviations from", "radiometry"),
    ],
)
def test_what_breaks_the_contract_is_refused_unless_overridden(
    tmp_path, contract, options, message, check
):
    path = write(tmp_path / "a.tif", **options)
    with pytest.raises(InputError, match=message) as caught:
        predict.open_raster(path, contract)
    assert f"['{check}']" in str(caught.value)
    assert predict.open_raster(path, contract, override=[check]).width == 200


def test_everything_that_differs_is_named_at_once(tmp_path, contract):
    path = write(tmp_path / "a.tif", count=4, dtype="float32", mean=30000, scale=3)
    with pytest.raises(InputError) as caught:
        predict.open_raster(path, contract)
    assert "['bands', 'dtype', 'radiometry', 'resolution']" in str(caught.value)


def test_the_resolution_tolerance_is_a_setting(tmp_path, contract):
    path = write(tmp_path / "a.tif", scale=1.5)
    for tolerance in (0.6, None):
        assert predict.open_raster(path, contract, resolution_tolerance=tolerance)


def test_bands_that_are_not_there_cannot_be_overridden(tmp_path, contract):
    path = write(tmp_path / "a.tif", count=2)
    with pytest.raises(InputError, match=r"cannot give the bands .*bands 1 to 2, got \[3\]"):
        predict.open_raster(path, contract, override=predict.CHECKS)
    with pytest.raises(InputError, match=r"override names \['band'\], which are no checks"):
        predict.open_raster(path, contract, override=["band"])


def test_a_raster_without_crs_is_compared_in_all_but_resolution(tmp_path, contract, caplog):
    path = write(tmp_path / "a.tif", crs=None, transform=None)
    assert predict.open_raster(path, contract)
    assert "its resolution cannot be compared" in caplog.text
