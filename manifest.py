r"""Data as a manifest lists it: a CSV without a header, one raster with its reference per row.

    path/to/image1.tif,,path/to/reference1.gpkg,attribute,trn
    path\to\image2.tif,,path\to\reference2.gpkg,attribute,val

The fields are the raster, its metadata or nothing, the vector file, the attribute of it that holds
the classes, and what the raster is for: `trn`, `val` or `tst`.
"""

from __future__ import annotations

import csv
import difflib
from pathlib import Path, PureWindowsPath

import pandas as pd

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
