"""Whole rasters: what a trained model may be used on.

A checkpoint carries the contract of the data it was trained on; a raster that breaks it is refused
before anything is predicted.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd

import fileio
import tiling
from ImageData import InputError
from LargeRasterOR import DataContract

log = logging.getLogger(__name__)

RADIOMETRIC_TOLERANCE = 3.0  # standard deviations of the training pixels
CHECKS = ("bands", "dtype", "resolution", "radiometry")


def open_raster(
    path: Path | str,
    contract: DataContract,
    *,
    resolution_tolerance: float | None = 0.2,
    override: Collection[str] = (),
    seed: int = 0,
) -> fileio.Raster:
    """Open a raster for a model, with the bands it was trained on.

    Args:
        path: File or address.
        contract: Of the model, see `LargeRasterORModel.contract`.
        resolution_tolerance: Largest relative difference of the ground resolutions; None allows
            any. It cannot be checked where the raster or the training data have no CRS.
        override: Checks to leave out, of `CHECKS`.
        seed: Of the sample of pixels whose range is compared.

    Raises:
        InputError: It cannot be opened, or breaks the contract: the number of bands or their type
            differ, the resolution is off, or, after the model's stretch, a band's median is more
            than `RADIOMETRIC_TOLERANCE` standard deviations from the mean of the training pixels.
    """
    if strangers := sorted(set(override) - set(CHECKS)):
        raise InputError(f"override names {strangers}, which are no checks; there are {CHECKS}")
    try:
        raster = fileio.read_raster(path, contract.bands)
    except InputError as error:
        raise InputError(f"{path} cannot give the bands that the model reads: {error}") from error
    broken = {}
    if raster.band_count != contract.band_count:
        broken["bands"] = f"it has {raster.band_count} bands, training had {contract.band_count}"
    if raster.dtype != contract.dtype:
        broken["dtype"] = f"its pixels are {raster.dtype}, training had {contract.dtype}"
    trained, found = contract.resolution, raster.resolution
    if trained and found and resolution_tolerance is not None:
        if max(trained, found) > min(trained, found) * (1 + resolution_tolerance):
            broken["resolution"] = (
                f"its pixels are {found:.4g} m wide, in training they were {trained:.4g} m "
                f"(RESOLUTION_TOLERANCE {resolution_tolerance:g})"
            )
    elif trained and resolution_tolerance is not None:
        log.warning("%s has no CRS; its resolution cannot be compared with training's", path)
    if "radiometry" not in override:
        broken |= _compare_radiometry(raster, contract, seed)
    broken = {name: text for name, text in broken.items() if name not in override}
    if broken:
        raise InputError(
            f"{path} is not what the model was trained on: {'; '.join(broken.values())}. Convert "
            f"it, or override the check{'s' if len(broken) > 1 else ''} {sorted(broken)} if you "
            "know better"
        )
    return raster


def _compare_radiometry(raster: fileio.Raster, contract: DataContract, seed: int) -> dict[str, str]:
    place = {"raster": raster.identifier, "x": 0, "y": 0}
    extent = place | {"width": raster.width, "height": raster.height}
    pixels = tiling.sample_pixels(
        pd.DataFrame([extent]), {raster.identifier: raster}, seed=seed, max_windows=32
    )
    radiometry = contract.radiometry
    median = np.median(radiometry.stretch(pixels[:, None])[:, 0], axis=1)
    off = np.abs(median - radiometry.mean) / radiometry.std
    if (off <= RADIOMETRIC_TOLERANCE).all():
        return {}
    worst = int(off.argmax())
    return {
        "radiometry": f"the median of band {raster.bands[worst]} is "
        f"{np.median(pixels[worst]):.4g}, {off[worst]:.1f} standard deviations from the mean of "
        "the training pixels"
    }
