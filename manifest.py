r"""Data as a manifest lists it: a CSV without a header, one raster with its reference per row.

    path/to/image1.tif,,path/to/reference1.gpkg,attribute,trn
    path\to\image2.tif,,path\to\reference2.gpkg,attribute,val

The fields are the raster, its metadata or nothing, the vector file, the attribute of it that holds
the classes, and what the raster is for: `trn`, `val` or `tst`.

A registry is a YAML file of datasets that have names, to be used together in any choice:

    manila:
      images: [manila_1.tif, manila_2.tif]
      masks: [manila_1.gpkg, manila_2.gpkg]  # polygons or mask rasters, one per image
      attribute: kind                        # of the polygons, which tells the class
      bands: [3, 2, 1]
      classes: {1: house, 2: road}           # value: name
      tags: [urban, tropical]
      resolution: 0.5                        # m per px, to which images are resampled
      layer: houses                          # of a mask's file that has several
      coordinates: auto                      # of the masks, as COORDINATES of a run
      mask_reference: false                  # true: ground without a label is unknown
      attribute_filter: area > 10            # which polygons to use
      default_label: house                   # of polygons without one
      weight: 2                              # how often its training patches come
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path, PureWindowsPath
from typing import Any

import pandas as pd
import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ImageData import InputError

SPLIT_OF = {"trn": "train", "val": "validation", "tst": "test"}
COLUMNS = ["image", "metadata", "vector", "attribute", "split"]


def read_manifest(path: Path, bucket: str | None = None) -> pd.DataFrame:
    """Read a manifest.

    Args:
        path: The CSV. Paths in it may have either kind of slash; one that is relative is looked
            for beside the CSV, then in the working directory.
        bucket: Of S3, where all files are; None: on disk, or where their addresses say.

    Returns:
        A row per raster: `image` and `vector` (paths or addresses), `metadata` (None if empty),
        `attribute`, `split` ("train", "validation", "test").

    Raises:
        InputError: Names each line that is wrong, and why.
    """
    path = Path(path)
    lines = _read_lines(path)
    problems = [f"line {i}: {why}" for i, fields in lines if (why := _find_problem(fields))]
    if not lines:
        problems = ["it is empty"]
    if problems:
        raise InputError(
            f"MANIFEST {path}: {'; '.join(problems)}. A line is image,metadata or nothing,vector "
            "file,attribute,trn or val or tst"
        )
    rows, missing = [], []
    for i, (image, metadata, vector, attribute, use) in lines:
        places = [_find(name, path.parent, bucket) for name in (image, vector, metadata) if name]
        missing += [f"line {i}: {name}" for name, found in places if found is None]
        (_, image), (_, vector), *about = places
        rows.append([image, about[0][1] if about else None, vector, attribute, SPLIT_OF[use]])
    if missing:
        raise InputError(
            f"MANIFEST {path} names files that are neither in its folder nor in the working "
            f"directory: {'; '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}"
        )
    table = pd.DataFrame(rows, columns=COLUMNS)
    doubled = table["image"][table["image"].duplicated()].unique()
    if len(doubled):
        raise InputError(
            f"MANIFEST {path} lists rasters more than once: {', '.join(map(str, doubled[:5]))}; "
            "put what annotates a raster into one vector file, and give it one use"
        )
    return table


def list_rasters(path: Path, bucket: str | None = None) -> list[str]:
    """List rasters to be predicted.

    Args:
        path: A folder, of which all TIFFs are taken; or a CSV whose first field is a raster. Of a
            manifest, rasters whose use is `tst` are taken, and no vector file is needed.
        bucket: See `read_manifest`.

    Returns:
        Absolute paths, or addresses.

    Raises:
        InputError: There is none, or one does not exist.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in (".tif", ".tiff"))
        names = [str(p.absolute()) for p in found]
    else:
        rows = [fields for _, fields in _read_lines(path)]
        uses = [fields[-1] if len(fields) == len(COLUMNS) else "tst" for fields in rows]
        names = [fields[0] for fields, use in zip(rows, uses, strict=True) if use == "tst"]
        places = [_find(name, path.parent, bucket) for name in names]
        if missing := [name for name, place in places if place is None]:
            raise InputError(f"{path} names rasters that are nowhere: {', '.join(missing[:5])}")
        names = [str(p.absolute()) if isinstance(p, Path) else p for _, p in places]
    if not names:
        raise InputError(f"{path} holds no raster to predict: no TIFF, or no row with use tst")
    return names


def _read_lines(path: Path) -> list[tuple[int, list[str]]]:
    """Return the number and the fields of each line that is not blank."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = [(i, [field.strip() for field in row])
                     for i, row in enumerate(csv.reader(file), start=1)]  # fmt: skip
    except OSError as error:
        raise InputError(f"MANIFEST {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"MANIFEST {path} is no CSV in UTF-8: {error}") from None
    return [(i, fields) for i, fields in lines if any(fields)]


def _find_problem(fields: list[str]) -> str | None:
    if len(fields) != len(COLUMNS):
        return f"{len(fields)} fields, expected {len(COLUMNS)}"
    image, _, vector, attribute, use = fields
    empty = [n for n, v in zip(("image", "vector file", "attribute"), (image, vector, attribute),
                               strict=True) if not v]  # fmt: skip
    if empty:
        return f"no {' and no '.join(empty)}"
    if use not in SPLIT_OF:
        close = difflib.get_close_matches(use.lower(), [*SPLIT_OF, *SPLIT_OF.values()], n=1)
        meant = {**{v: k for k, v in SPLIT_OF.items()}, **{k: k for k in SPLIT_OF}}
        hint = f", perhaps {meant[close[0]]}" if close else ""
        return f"use {use!r} is none of trn, val, tst{hint}"
    return None


def _find(name: str, folder: Path, bucket: str | None) -> tuple[str, str | Path | None]:
    """Return a file as it was given, and where it is; None: nowhere."""
    if "://" in name or name.startswith("/vsi"):
        return name, name
    plain = PureWindowsPath(name).as_posix() if "\\" in name else name
    if bucket:
        return name, f"/vsis3/{bucket}/{plain.lstrip('/')}"
    for place in (folder / plain, Path(plain)):
        if place.exists():
            return name, place
    return name, None


# ---------------------------------------------------------------------------------------------
# Registry of named datasets
# ---------------------------------------------------------------------------------------------

DATASET_PARAMETERS = {  # field of a dataset -> the parameter of a run that says so for all of them
    "bands": "BANDS", "resolution": "TARGET_RESOLUTION", "coordinates": "COORDINATES",
    "mask_reference": "MASK_REFERENCE", "attribute_filter": "ATTRIBUTE_FILTER",
    "default_label": "DEFAULT_LABEL", "layer": "LAYER",
}  # fmt: skip
TAG = "tag:"  # before a tag, where names of datasets are chosen


@dataclass(config=ConfigDict(extra="forbid", frozen=True))
class NamedDataset:
    """A dataset of a registry; see the module for the fields.

    Attributes:
        name: Its name.
        images: Paths or addresses.
        masks: Of each image.
        bands: None: all but alpha.
        attribute: None: "label".
        classes: Value -> name, or number as in `masks.make_table`; None: all values are classes.
        tags: Words to choose it by.
        resolution: m per px to which images are resampled; None: as they are.
        layer: Of the masks' files, where they have several.
        coordinates: Of the masks, see `annotations.ReadingOptions`.
        mask_reference: Whether ground without a label is unknown, instead of background.
        attribute_filter: Which polygons to use; None: all.
        default_label: Of polygons without one.
        weight: How often its training patches come, relative to those of others.
    """

    name: str
    images: tuple[str, ...] = Field(min_length=1)
    masks: tuple[str, ...] = Field(min_length=1)
    bands: tuple[int, ...] | None = None
    attribute: str | None = None
    classes: dict[str | int, str | int] | None = None
    tags: tuple[str, ...] = ()
    resolution: float | None = Field(default=None, gt=0)
    layer: str | None = None
    coordinates: str = "auto"
    mask_reference: bool = False
    attribute_filter: str | None = None
    default_label: str | None = None
    weight: float = Field(default=1.0, gt=0)


def read_registry(path: Path | str) -> dict[str, NamedDataset]:
    """Read a registry.

    Args:
        path: The YAML. A path in it that is relative is looked for beside the file, then in the
            working directory; whether files are there is seen when they are opened.

    Raises:
        InputError: The file cannot be read, or a dataset is not described as it should be.
    """
    path = Path(path)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"registry {path}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"registry {path} cannot be read as YAML: {error}") from None
    if not isinstance(given, dict) or not given:
        raise InputError(f"registry {path} must hold `name: {{images: [...], masks: [...]}}`")
    return {str(name): _named_dataset(path, str(name), value) for name, value in given.items()}


def _named_dataset(path: Path, name: str, value: object) -> NamedDataset:
    if not isinstance(value, dict):
        raise InputError(f"registry {path}: {name} must hold images and masks, got {value!r}")
    listed = {
        key: [item] if key in ("images", "masks", "tags") and isinstance(item, str) else item
        for key, item in value.items()
    }
    try:
        named = TypeAdapter(NamedDataset).validate_python({"name": name} | listed)
    except ValidationError as error:
        wrong = "; ".join(map(_told, error.errors()))
        raise InputError(f"registry {path}: {name}: {wrong}") from None
    if len(named.images) != len(named.masks):
        raise InputError(
            f"registry {path}: {name} has {len(named.images)} images and {len(named.masks)} masks; "
            "give each image its mask"
        )
    places = {
        key: tuple(str(_find(item, path.parent, None)[1] or item) for item in getattr(named, key))
        for key in ("images", "masks")
    }
    return TypeAdapter(NamedDataset).validate_python({"name": name} | listed | places)


def _told(error: Mapping[str, Any]) -> str:
    """Say what is wrong with a field, and of an unknown one which might be meant."""
    name, message = ".".join(map(str, error["loc"])), error["msg"]
    if error["type"] == "unexpected_keyword_argument":
        known = [field.name for field in fields(NamedDataset)]
        close = difflib.get_close_matches(name, known, n=1)
        message = f"no such field; did you mean {close[0]}?" if close else f"fields are {known}"
    return f"{name}: {message}"


def get_dataset(registry: Mapping[str, NamedDataset], name: str) -> NamedDataset:
    """Return a dataset by its name.

    Raises:
        InputError: There is none; the nearest names are told.
    """
    (named,) = select_datasets(registry, [name.removeprefix(TAG)])
    return named


def select_datasets(
    registry: Mapping[str, NamedDataset], names: Sequence[str]
) -> list[NamedDataset]:
    """Choose datasets by name, or by tag as `tag:urban`; each comes once.

    Raises:
        InputError: A name or tag is unknown; the nearest ones are told.
    """
    chosen: dict[str, NamedDataset] = {}
    for name in names:
        tag = name.removeprefix(TAG) if name.startswith(TAG) else None
        found = [d for d in registry.values() if (tag in d.tags if tag else d.name == name)]
        if not found:
            known = {tag for d in registry.values() for tag in d.tags} if tag else set(registry)
            kind = "tag" if tag else "dataset"
            close = difflib.get_close_matches(tag or name, sorted(known), n=3)
            meant = f"; did you mean {' or '.join(close)}?" if close else f", only {sorted(known)}"
            raise InputError(f"the registry has no {kind} {tag or name!r}{meant}")
        chosen |= {d.name: d for d in found}
    return list(chosen.values())
