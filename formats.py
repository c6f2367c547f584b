"""Annotation files: what each format holds, read into one kind of table and written back.

| suffix | format | kind | places |
|---|---|---|---|
| `.csv`, `.parquet` | a table | table | numbers in columns |
| `.gpkg`, `.geojson`, `.shp`, `.fgb`, GeoParquet, whatever else GDAL reads | features | vector |
    geometries in the CRS that the file declares |
| `.json` | COCO | boxes | px: boxes, polygons, run-length masks |
| `.xml` | Pascal VOC | boxes | px: boxes |
| `.txt` | YOLO | boxes | shares of width and height: boxes, polygons |

Readers convert nothing but units of the format to px, and leave no annotation out: a row that
cannot be used says why in the column `problem`.

Writers take objects chunk by chunk (`annotation_writer`) or all at once (`write_annotations`).
"""

from __future__ import annotations

import errno
import glob
import itertools
import json
import logging
import math
import re
import string
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import defusedxml.ElementTree
import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pyogrio
import pyogrio.util
import pyproj
import rasterio.features
import shapely
import yaml

import imutils
from artefacts import address_of, atomic_path, find_full
from ImageData import BOX_COLUMNS, CENTER_COLUMNS, InputError, RasterHandle

log = logging.getLogger(__name__)

X_COLUMNS, Y_COLUMNS = ["pixel_x", "xmin", "xmax"], ["pixel_y", "ymin", "ymax"]
AREA = "area_px"  # column: of regions
PIXEL_COLUMNS = [*CENTER_COLUMNS, "diameter", "label", *BOX_COLUMNS]
YOLO_NAMES = ("classes.txt", "data.yaml", "dataset.yaml")
TOLERANCE = 1e-6  # px; a polygon whose bounds differ by more from its box does not stand for it
# SQLite rolls back by itself where it runs out of space, which GDAL then cannot
FULL_DISK = re.compile(r"disk I/O error|disk is full|No space left|cannot rollback", re.IGNORECASE)
SHOWN = 5  # names that a message lists
COLORMAP_COLUMNS, COLORMAP_TOP = 3, 254  # value, name, colour; 255 is nodata
MOST_MASKED = 2**28  # px of a run-length mask that are unpacked, a byte each
SHAPES = ("own", "box", "circle")
CIRCLE_SIDES = 32
STYLES = "layer_styles"  # the table of a GeoPackage where QGIS keeps styles
LINE_WIDTH = 0.5  # mm, of the style
REST = "#000000"  # objects without a label, in the style


@dataclass(frozen=True)
class AnnotationFile:
    """What an annotation file holds.

    Attributes:
        df: One row per annotation. "table": the columns of the file. "vector": its attributes and
            `geometry` in `crs`. "boxes": `label, xmin, ymin, xmax, ymax` (px), `geometry` (polygons
            in px or None) where the format knows polygons, `problem` (why a row cannot be used, or
            None), and what else the format says of an object, such as `score` or `iscrowd`.
        kind: "table", "vector" or "boxes".
        crs: The CRS that the file declares, if any.
    """

    df: pd.DataFrame
    kind: str
    crs: pyproj.CRS | None = None


def read_annotation_file(
    path: Path,
    raster: RasterHandle,
    *,
    layer: str | None = None,
    text_columns: Sequence[str] = (),
) -> AnnotationFile:
    """Read an annotation file of any format, by its suffix and content.

    Args:
        path: The file, or the address of a vector file (`https://`, `s3://`, `/vsi...`).
        raster: The raster it annotates, in the pixels of its file; COCO files are searched for its
            name, YOLO files are scaled by its size.
        layer: Layer of a vector file; None takes the only one that holds geometries.
        text_columns: See `read_table`.

    Raises:
        InputError: The file is missing, empty, damaged, of no known format, or annotates another
            raster.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    remote = address_of(path) is not None
    if remote and suffix in (".csv", ".parquet", ".xml", ".txt"):
        raise InputError(
            f"{path} is an address, of which only vector files are read, such as GeoPackage, "
            "FlatGeobuf or GeoJSON; copy it to this machine"
        )
    if suffix == ".csv":
        return AnnotationFile(read_table(path, text_columns), "table")
    if not remote and not path.exists():
        raise InputError(
            f"annotation file {path} does not exist; check its name and folder (of a run, DF_DIR)"
        )
    if path.is_file() and not path.stat().st_size:
        raise InputError(f"{path} is empty (0 bytes); write it again, or leave its raster out")
    if suffix == ".parquet":
        file = _read_parquet(path)
    elif suffix == ".json" and not remote:
        file = _read_json(path, raster, layer)
    elif suffix == ".xml":
        file = _read_voc(path, raster)
    elif suffix == ".txt":
        file = _read_yolo(path, raster)
    else:
        file = _read_vector(path, layer)
    if file.df.empty:
        raise InputError(f"{path} holds no annotation; leave its raster out if it has no object")
    return file


def files_of(path: Path) -> list[Path]:
    """Return the files that reading an annotation file looks at, some of which may not exist."""
    path = Path(path)
    files = {path, *path.parent.glob(f"{glob.escape(path.stem)}.*")}
    if path.suffix.lower() == ".txt":
        folders = (path.parent, *path.parent.resolve().parents[:2])
        files |= {folder / name for folder in folders for name in YOLO_NAMES}
    return sorted(files)


@contextmanager
def _parsing(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Turn whatever a parser raises into an `InputError` that names the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # parsers of foreign files raise anything
        reason = str(error) or type(error).__name__
        raise InputError(f"{path} cannot be read as {what}: {reason}; {remedy}") from error


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


def read_table(path: Path, text_columns: Sequence[str] = (), *, rows: bool = True) -> pd.DataFrame:
    """Read a CSV whose columns may mix numbers and text.

    Args:
        path: The file.
        text_columns: Columns to keep as they are written, so that the label 01 is not 1, and NA
            no missing one; only an empty cell is missing.
        rows: Whether a table without rows is an error.

    Raises:
        InputError: The file is missing, empty, or not a table.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(
            f"annotation table {path} does not exist; check its name and folder (of a run, DF_DIR)"
        )
    try:
        # index_col: cells beyond the header must not shift the columns, but be an error
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
            df = pd.read_csv(
                path, low_memory=False, keep_default_na=False, na_values=[""], index_col=False,
                dtype=dict.fromkeys(text_columns, str),
            )  # fmt: skip
    except pd.errors.EmptyDataError:
        raise InputError(f"{path} is empty; expected a header and a row per object") from None
    except Exception as error:
        raise InputError(
            f"{path} is not a CSV table in UTF-8: {error}; save it with commas, a header, and as "
            "many cells in each row"
        ) from error
    if rows and df.empty:
        raise InputError(f"{path} has the columns {list(df.columns)} but no row")
    return df


def _read_parquet(path: Path) -> AnnotationFile:
    with _parsing(path, "Parquet", "write it again"):
        if b"geo" in (pyarrow.parquet.read_schema(path).metadata or {}):
            return _from_frame(gpd.read_parquet(path))
        return AnnotationFile(pd.read_parquet(path).reset_index(drop=True), "table")


# ---------------------------------------------------------------------------------------------
# Vector files
# ---------------------------------------------------------------------------------------------


def _read_vector(path: Path, layer: str | None) -> AnnotationFile:
    _check_name(path)
    address = address_of(path)
    source = address or path
    remedy = "expected CSV, Parquet, COCO, Pascal VOC, YOLO, or a vector file that GDAL reads"
    with _parsing(path, "annotations", remedy):
        layers = {name: kind for name, kind in pyogrio.list_layers(source) if name != STYLES}
        if layer is None:
            spatial = [name for name, kind in layers.items() if kind is not None] or list(layers)
            if len(spatial) != 1:
                raise InputError(f"{path} has the layers {spatial}; name one with LAYER")
            layer = spatial[0]
        elif layer not in layers:
            raise InputError(f"{path} has no layer {layer!r}, only {list(layers)}; set LAYER")
        df = pyogrio.read_dataframe(
            source, layer=layer, use_arrow=True, on_invalid="ignore",
            arrow_to_pandas_kwargs={"integer_object_nulls": True},  # 1 beside null stays 1
        )  # fmt: skip
        file = _from_frame(df)
    if file.df.empty:
        raise InputError(f"layer {layer!r} of {path} is empty; choose another with LAYER")
    null = not address and path.suffix.lower() in (".geojson", ".json") and _crs_is_null(path)
    return AnnotationFile(file.df, file.kind, None if null else file.crs)


def _check_name(path: Path) -> None:
    """Refuse a name that pyogrio would take for an address, parts of which it would drop."""
    reached = pyogrio.util.vsi_path(path)
    if address_of(path) is None and reached != str(path) and not reached.startswith("/vsi"):
        raise InputError(
            f"{str(path)!r} would be taken for {reached!r}, for the path of a vector file may hold "
            "no tab or line feed, and its name no semicolon; rename it"
        )


def _from_frame(df: pd.DataFrame) -> AnnotationFile:
    """Take the geometries of a frame out of geopandas' hands, whose steps are slower."""
    df = df.reset_index(drop=True)
    if not isinstance(df, gpd.GeoDataFrame):  # a layer without geometries is a table
        return AnnotationFile(df, "table")
    shapes = np.asarray(df.geometry.array)
    shapes = shapely.force_2d(shapes) if shapely.has_z(shapes).any() else shapes
    plain = pd.DataFrame(df.drop(columns=df.geometry.name))
    plain = plain.assign(geometry=pd.Series(shapes, dtype=object))
    crs = None if df.crs is None or df.crs.is_engineering else df.crs
    return AnnotationFile(plain, "vector", crs)


def _crs_is_null(path: Path) -> bool:
    """Tell whether a GeoJSON file says that it has no CRS; GDAL takes that for EPSG:4326."""
    with path.open("rb") as file:
        head = file.read(2**16).partition(b'"features"')[0]
    return re.search(rb'"crs"\s*:\s*null', head) is not None


# ---------------------------------------------------------------------------------------------
# COCO
# ---------------------------------------------------------------------------------------------


def _read_json(path: Path, raster: RasterHandle, layer: str | None) -> AnnotationFile:
    with _parsing(path, "JSON in UTF-8", "write it again"):
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    found = f"a {type(data).__name__}"
    if isinstance(data, dict):
        if data.get("type") == "FeatureCollection":
            return _read_vector(path, layer)
        if {"images", "annotations", "categories"} <= data.keys():
            with _parsing(path, "COCO", "write it again"):
                return _read_coco(path, data, raster)
        found = f"the keys {list(data)[:SHOWN]}"
    raise InputError(
        f"{path} is neither COCO (images, annotations, categories) nor a GeoJSON "
        f"FeatureCollection, it holds {found}"
    )


def _read_coco(path: Path, data: dict[str, Any], raster: RasterHandle) -> AnnotationFile:
    """Take the annotations of one image out of a COCO dataset.

    The file's `bbox` is the box; only where it is missing or flat, the segmentation's bounds are.
    Annotations of other images are none of this raster; those of no image at all are quarantined.
    """
    images = _entries(path, data, "images", "id", "file_name")
    image = _image_of(path, images, raster)
    size = {side: image[side] for side in ("width", "height") if image.get(side) is not None}
    if any(value != getattr(raster, side) for side, value in size.items()):
        raise InputError(
            f"{path} describes {image['file_name']} with {size}, the raster has {raster.width} x "
            f"{raster.height} px; annotate the raster itself, or scale the annotations"
        )
    ids = {image["id"] for image in images}
    names = {c["id"]: str(c["name"]) for c in _entries(path, data, "categories", "id", "name")}
    rows, elsewhere, unread = [], 0, 0
    for index, entry in enumerate(_entries(path, data, "annotations")):
        image_id, category = _id(entry.get("image_id")), _id(entry.get("category_id"))
        if image_id in ids and image_id != image["id"]:
            elsewhere += 1
            continue
        segmentation = entry.get("segmentation")
        shape = _coco_shape(segmentation, raster, f"{path}: annotations[{index}]")
        unread += bool(segmentation) and shape is None
        x, y, width, height = _floats(entry.get("bbox"), 4)
        box = (x, y, x + width, y + height)
        if shape is not None and not width * height > 0:
            box = shape.bounds
        problem = None
        if image_id not in ids:
            problem = "image_id names no image"
        elif category not in names:
            problem = "category_id names no category"
        elif not np.isfinite(box).all():
            problem = "no box"
        others = {k: v for k, v in entry.items() if k not in ("bbox", "segmentation", "image_id")}
        rows.append(
            others | dict(zip(BOX_COLUMNS, box, strict=True))
            | {"label": names.get(category), "geometry": shape, "problem": problem}
        )  # fmt: skip
    log.info("%s: %d annotations, %d of other images", path.name, len(rows), elsewhere)
    if unread:
        log.warning("%s: %d segmentations hold no polygon; their boxes count", path.name, unread)
    return _boxes(rows)


def _entries(path: Path, data: dict[str, Any], key: str, *required: str) -> list[dict[str, Any]]:
    """Return a list of a COCO dataset when its entries have what is required of them."""
    if not isinstance(data[key], list):
        raise InputError(f"{path}: {key} must be a list, got a {type(data[key]).__name__}")
    for index, entry in enumerate(data[key]):
        if not isinstance(entry, dict):
            raise InputError(f"{path}: {key}[{index}] must be an object, got {entry!r:.80}")
        if missing := [name for name in required if name not in entry]:
            raise InputError(f"{path}: {key}[{index}] lacks {missing}, it has {list(entry)}")
        if "id" in required and _id(entry["id"]) is None:
            raise InputError(f"{path}: {key}[{index}] has no usable id, got {entry['id']!r:.80}")
    return data[key]


def read_colormap(path: Path | str) -> dict[int, tuple[str, str]]:
    """Read names and colours of classes from a CSV of three columns: value, name, HTML colour.

    The first line may be a heading. Commas, semicolons, tabs or bars separate the columns.

    Args:
        path: The file.

    Returns:
        Pixel value (0 to 254) of a class -> its name and its colour (`#RRGGBB`), in the file's
        order.

    Raises:
        InputError: The file cannot be read, or a line is not understood (names it).
    """
    path = Path(path)
    with _parsing(path, "a table of colours", "give a CSV of value, name, colour"):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    classes: dict[int, tuple[str, str]] = {}
    for number, line in enumerate(lines, start=1):
        cells = [cell.strip() for cell in re.split(r"[,;\t|]", line)]
        if number == 1 and not cells[0].isdigit() and len(cells) == COLORMAP_COLUMNS:
            continue
        if not any(cells):
            continue
        try:
            value, name, color = cells
        except ValueError:
            raise InputError(
                f"{path}, line {number}: expected 3 columns (value, name, colour such as "
                f"1,roads,#990000), got {len(cells)}: {line!r}"
            ) from None
        wrong = None
        if not value.isdecimal() or int(value) > COLORMAP_TOP:
            wrong = f"the value must be a whole number from 0 to {COLORMAP_TOP}, got {value!r}"
        elif int(value) in classes:
            wrong = f"the value {value} was given before; each class needs one line"
        elif not name:
            wrong = "the name is empty; give one"
        elif not re.fullmatch(r"#[0-9A-Fa-f]{6}", color):
            wrong = f"the colour must be of the form #RRGGBB, got {color!r}"
        if wrong:
            raise InputError(f"{path}, line {number}: {wrong}")
        classes[int(value)] = (name, color.upper())
    if not classes:
        raise InputError(f"{path} names no class; give a CSV of value, name, colour")
    return classes


def _id(value: object) -> int | str | None:
    return value if isinstance(value, int | str) else None


def _image_of(path: Path, images: list[dict[str, Any]], raster: RasterHandle) -> dict[str, Any]:
    names = [re.split(r"[/\\]", str(image["file_name"]))[-1] for image in images]
    for wanted, found in (
        (raster.path.name, names), (raster.path.stem, [Path(name).stem for name in names]),
    ):  # fmt: skip
        matches = [image for image, name in zip(images, found, strict=True) if name == wanted]
        if len(matches) > 1:
            raise InputError(f"{path} has {len(matches)} images called {wanted}; keep one of them")
        if matches:
            return matches[0]
    raise InputError(
        f"{path} is a COCO file whose images do not name the raster {raster.path.name}, but "
        f"{names[:SHOWN]} ({len(names)} in all); give the image the raster's name"
    )


def _coco_shape(segmentation: object, raster: RasterHandle, place: str) -> shapely.Geometry | None:
    """Turn a segmentation, polygons or a run-length mask, into a geometry in px."""
    match segmentation:
        case {"counts": counts, "size": size}:
            if size != [raster.height, raster.width]:
                raise InputError(
                    f"{place} has a mask of size {size}, the raster has [height, width] "
                    f"{[raster.height, raster.width]}; annotate the raster itself"
                )
            return polygon_from_runs(_runs(counts), raster.height, raster.width)
        case [_, *_]:
            parts = [np.asarray(_floats(part)) for part in segmentation]
            parts = [p for p in parts if p.size >= 6 and p.size % 2 == 0 and np.isfinite(p).all()]
            return _merge([shapely.polygons(part.reshape(-1, 2)) for part in parts])
    return None


def _merge(polygons: Sequence[shapely.Geometry]) -> shapely.Geometry | None:
    if len(polygons) < 2:
        return polygons[0] if len(polygons) else None
    return shapely.multipolygons(polygons)


def _floats(values: object, count: int | None = None) -> list[float]:
    """Return a list of numbers as floats; as NaN, `count` of them, if it is anything else."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    return [float("nan")] * count if count not in (None, len(numbers)) else numbers


def _runs(counts: object) -> np.ndarray:
    """Return the lengths of a mask's runs; nothing if they are unreadable.

    References: `rleFrString` of the COCO API: five bits a character, lowest first, the sixth says
    that more follow; from the fourth number on differences to the last but one.
    """
    if not isinstance(counts, str):
        numbers = np.asarray(_floats(counts))
        whole = np.isfinite(numbers).all() and (numbers == np.floor(numbers)).all()
        return numbers.astype("int64") if whole else np.empty(0, "int64")
    runs, value, shift = [], 0, 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 50:
            return np.empty(0, "int64")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits >> 4 & 1) << shift  # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if runs and not -(2**62) < min(runs) <= max(runs) < 2**62:
        return np.empty(0, "int64")
    return np.array(runs, dtype="int64")


def polygon_from_runs(runs: np.ndarray, height: int, width: int) -> shapely.Geometry | None:
    """Outline a run-length mask along the edges of its pixels.

    Only the columns that the mask spans are ever unpacked.

    Args:
        runs: Lengths of the runs of zeros and ones in turn, zeros first, down the columns.
        height: Of the whole image in px.
        width: Of the whole image in px.

    Returns:
        A polygon or a multi-polygon in px; None for runs without ones, or that do not fit, or that
        span more than `MOST_MASKED` px.
    """
    ends = np.cumsum(runs)
    fits = len(runs) and runs.min() >= 0 and runs.max() <= height * width >= ends[-1] >= 0
    starts, ends = (ends - runs)[1::2], ends[1::2]
    starts, ends = starts[ends > starts], ends[ends > starts]
    if not fits or not len(starts):
        return None
    left, right = starts[0] // height, (ends[-1] - 1) // height + 1
    if (right - left) * height > MOST_MASKED:
        return None
    pixels = np.zeros((right - left) * height, dtype="uint8")
    for start, end in zip(starts - left * height, ends - left * height, strict=True):
        pixels[start:end] = 1
    mask = pixels.reshape(right - left, height)
    rows = np.flatnonzero(mask.any(axis=0))
    mask = np.ascontiguousarray(mask[:, rows[0] : rows[-1] + 1].T)
    origin = rasterio.Affine.translation(left, rows[0])
    shapes = rasterio.features.shapes(mask, mask=mask.view(bool), transform=origin)
    return _merge([shapely.geometry.shape(shape) for shape, _ in shapes])


def _boxes(rows: list[dict[str, Any]]) -> AnnotationFile:
    df = pd.DataFrame(rows)
    if len(df):
        df[BOX_COLUMNS] = df[BOX_COLUMNS].astype("float64")
    for name in {"geometry", "problem"} & set(df.columns):
        df[name] = pd.Series([row[name] for row in rows], dtype=object)
    return AnnotationFile(df, "boxes")


# ---------------------------------------------------------------------------------------------
# Pascal VOC and YOLO
# ---------------------------------------------------------------------------------------------


def _read_voc(path: Path, raster: RasterHandle) -> AnnotationFile:
    """Read a Pascal VOC file; a DTD or an entity in it is refused.

    Boxes are taken as corner coordinates, as the tools of today write them (LabelImg, CVAT,
    Roboflow). In the data of the challenge itself pixels count from 1 and `xmax` is the last one:
    take 1 from `xmin` and `ymin` there.
    """
    with _parsing(path, "Pascal VOC", "write it again as plain XML without DTD and entities"):
        root = defusedxml.ElementTree.parse(path, forbid_dtd=True).getroot()
    if root.tag != "annotation":
        raise InputError(f"{path} is not Pascal VOC: expected <annotation>, got <{root.tag}>")
    size = [root.findtext(f"size/{side}", "").strip() for side in ("width", "height")]
    if all(size) and size != ["0", "0"] and size != [str(raster.width), str(raster.height)]:
        raise InputError(
            f"{path} describes an image of {size[0]} x {size[1]} px, the raster has "
            f"{raster.width} x {raster.height}; annotate the raster itself"
        )
    rows = []
    for entry in root.findall("object"):
        corners = [_floats([entry.findtext(f"bndbox/{name}")], 1)[0] for name in BOX_COLUMNS]
        rows.append(
            {child.tag: child.text for child in entry if not len(child)}
            | dict(zip(BOX_COLUMNS, corners, strict=True))
            | {"label": (entry.findtext("name") or "").strip() or None,
               "problem": None if np.isfinite(corners).all() else "no box"}
        )  # fmt: skip
    return _boxes(rows)


def _read_yolo(path: Path, raster: RasterHandle) -> AnnotationFile:
    """Read a YOLO file: `class cx cy w h [score]`, or `class x1 y1 x2 y2 x3 y3 ... [score]`."""
    with _parsing(path, "YOLO", "write it again as text in UTF-8"):
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    names = _yolo_names(path.parent)
    size = np.array([raster.width, raster.height], dtype=float)
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        values = np.array(_floats(line.split()))
        row = dict.fromkeys(BOX_COLUMNS, np.nan) | {"label": None, "geometry": None}
        row |= {"problem": None, "line": number, "text": line.strip()}
        count = len(values) - 1 - (len(values) % 2 == 0)  # an even length ends in a score
        if not len(values) or not np.isfinite(values).all():
            row["problem"] = "line holds something else than numbers"
        elif count < 4:
            row["problem"] = "line is too short for a box or polygon"
        elif values[0] < 0 or values[0] % 1 or (names and int(values[0]) not in names):
            row["problem"] = "class is none of those named" if names else "class is no number"
        else:
            if count == 4:
                center, side = values[1:3] * size, values[3:5] * size
                box = (*(center - side / 2), *(center + side / 2))
            else:
                row["geometry"] = shapely.polygons(values[1 : 1 + count].reshape(-1, 2) * size)
                box = row["geometry"].bounds
            row |= zip(BOX_COLUMNS, box, strict=True)
            row["label"] = names[int(values[0])] if names else str(int(values[0]))
            row |= {"score": values[-1]} if len(values) % 2 == 0 else {}
        rows.append(row)
    return _boxes(rows)


def _yolo_names(folder: Path) -> dict[int, str]:
    """Find the names of a YOLO folder's classes: beside its files, or in YAML up to two above."""
    for place in (folder, *folder.resolve().parents[:2]):
        for path in (place / name for name in YOLO_NAMES[place != folder :]):
            if not path.is_file():
                continue
            with _parsing(path, "class names", "expected one name a line, or YAML with `names`"):
                text = path.read_text(encoding="utf-8-sig")
                if path.suffix == ".txt":
                    return dict(enumerate(re.split(r"\r?\n", text.rstrip("\r\n"))))
                # the base loader leaves 01 and yes as they are written
                names = (yaml.load(text, Loader=yaml.BaseLoader) or {}).get("names", {})
                kind = type(names).__name__
                if not isinstance(names, Mapping | list):
                    raise InputError(f"{path}: names must be a list or a mapping, got a {kind}")
                pairs = list(names.items() if isinstance(names, Mapping) else enumerate(names))
                # lists of aliases of lists are short in the file, and endless as text
                if strangers := [key for key, name in pairs if not isinstance(name, str)]:
                    raise InputError(f"{path}: names must be texts, {strangers[:SHOWN]} are none")
                if pairs:
                    return {int(key): name for key, name in pairs}
    return {}


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


def write_annotations(path: Path, df: pd.DataFrame, raster: RasterHandle) -> Path:
    """Write pixel boxes as an annotation file, whole or not at all, by the path's suffix.

    What is written reads back as the same boxes and labels in the same order. Pixels in files are
    those of the raster's file, whatever pixels it is read in (`fileio.resampled`). Vector files
    (`.gpkg`, `.geojson`, `.parquet`) are in the raster's CRS, in px if it has none; a feature is
    the row's polygon if that has the box for its bounds, and the box otherwise, and its attribute
    `diameter` stays in px. COCO (`.json`) holds polygons without their holes; CSV (`.csv`; read it
    with `box_source="columns"`) and YOLO (`.txt`) hold boxes only. YOLO files share the
    `classes.txt` beside them, which keeps its ids and grows by new labels. A GeoPackage carries a
    style, by which QGIS draws each label in a colour of its own.

    Args:
        path: The file to make.
        df: `label, xmin, ymin, xmax, ymax` (px) and, if wanted, `geometry` (px), `score` and
            further columns; YOLO keeps none but the score.
        raster: The raster the boxes lie on.

    Returns:
        The path.

    Raises:
        InputError: The suffix is unknown, a column or a label that the format needs is missing, or
            the format cannot hold the raster's CRS or a column.
    """
    labels = df["label"].dropna().unique() if "label" in df.columns else []
    with annotation_writer(path, raster, labels) as append:
        append(df)
    return Path(path)


@contextmanager
def annotation_writer(
    path: Path,
    raster: RasterHandle,
    labels: Iterable[object],
    *,
    shape: str = "own",
    layer: str | None = None,
    layer_column: str | None = None,
    colors: Mapping[str, str] | None = None,
) -> Iterator[Callable[[pd.DataFrame], None]]:
    """Open an annotation file that is written chunk by chunk, in memory for one chunk.

    The file appears when the block ends; if the block raises, nothing does. All chunks have the
    columns of the first that holds rows, and GeoPackage and GeoParquet hold them in its types.
    Without any row the file is valid and empty, with the columns of an empty chunk if one came.

    Args:
        path: The file to make; see `write_annotations` for the formats.
        raster: The raster the boxes lie on.
        labels: All labels that the chunks may hold.
        shape: What vector files and COCO polygons are: "own" (the row's polygon if that has the
            box for its bounds, and the box otherwise), "box", or "circle" (of `CIRCLE_SIDES` sides,
            around the centre `pixel_x, pixel_y` with `diameter`, which by default are the box's).
        layer: Name of the layer in GeoPackage and GeoJSON; None takes the file's, but for special
            characters that begin it.
        layer_column: Column of the chunks whose values name the layers of a GeoPackage, each drawn
            in a colour of its own; a categorical one makes a layer of every category. Other formats
            have one layer.
        colors: Label -> colour (#RRGGBB) in QGIS, of a GeoPackage with one layer; None: by name.

    Yields:
        A function that writes a chunk: a frame like that of `write_annotations`.

    Raises:
        InputError: See `write_annotations`; or a chunk has other columns than the first, values
            that its types do not hold, or a label that is none of `labels`.
    """
    path = Path(path)
    opened = _WRITERS.get(path.suffix.lower())
    if opened is None:
        raise InputError(f"{path} must end in one of {list(_WRITERS)}")
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {SHAPES}, got {shape!r}")
    labels = sorted(set(map(str, labels)))
    empty = pd.DataFrame({name: pd.Series(dtype=float) for name in BOX_COLUMNS} | {"label": []})
    columns: list[str] = []
    size_xy = raster.pixel_size_xy
    with (
        atomic_path(path) as temporary,
        opened(
            _Output(
                path,
                temporary,
                raster.original or raster,
                labels,
                shape,
                layer or _layer_of(path),
                layer_column,
                colors,
            )
        ) as write,
    ):

        def append(df: pd.DataFrame) -> None:
            nonlocal empty, columns
            df = _in_file(df, size_xy)
            if df.empty:
                empty = df
                return
            columns = columns or list(df.columns)
            if set(df.columns) != set(columns):
                raise InputError(f"{path}: all chunks need {columns}, got {list(df.columns)}")
            found = set(map(str, df["label"].dropna().unique()))
            if strangers := sorted(found - set(labels)):
                raise InputError(f"{path}: the labels {strangers[:SHOWN]} were not announced")
            write(df[columns])

        yield append
        if not columns:
            write(_in_file(empty, size_xy))


def _in_file(df: pd.DataFrame, size_xy: tuple[float, float]) -> pd.DataFrame:
    """Return boxes in pixels of the raster's file, with centres and diameters.

    A diameter that is the longer side of its box stays so, another one is scaled as a length is.

    Args:
        df: Boxes in pixels as the raster is read.
        size_xy: Width and height of one of those in pixels of the file.
    """
    if size_xy == (1, 1):
        return _measured(df)
    _check_boxes(df)
    places = [[name for name in names if name in df] for names in (X_COLUMNS, Y_COLUMNS)]
    moved, area = scale_pixels(df, size_xy, *places), math.prod(size_xy)
    if AREA in df.columns:
        moved = moved.assign(**{AREA: df[AREA] * area})
    if "diameter" in df.columns:
        is_side = np.isclose(df["diameter"], _longer_side(df))
        scaled = df["diameter"] * math.sqrt(area)
        moved = moved.assign(diameter=np.where(is_side, _longer_side(moved), scaled))
    return _measured(moved)


def scale_pixels(
    df: pd.DataFrame,
    scale_xy: Sequence[float],
    x_names: Sequence[str] = (),
    y_names: Sequence[str] = (),
) -> pd.DataFrame:
    """Return places in pixels of another size, to a millionth of one.

    Args:
        df: Frame with places in the columns named, and in `geometry` if it holds geometries.
        scale_xy: New pixels per old one, in x and in y.
        x_names: Columns that count pixels to the right.
        y_names: Columns that count pixels down.
    """
    named = {name: scale for names, scale in zip((x_names, y_names), scale_xy, strict=True)
             for name in names}  # fmt: skip
    df = df.assign(**{name: (df[name] * scale).round(6) for name, scale in named.items()})
    if "geometry" in df.columns:
        shapes = df["geometry"].to_numpy(object, copy=True)
        there = shapely.is_geometry(shapes)
        shapes[there] = shapely.transform(shapes[there], lambda xy: xy * [*scale_xy])
        df = df.assign(geometry=pd.Series(shapes, index=df.index, dtype=object))
    return df


def _layer_of(path: Path) -> str:
    """Name a layer after its file; GDAL wants no special character to begin it."""
    return path.stem.lstrip(string.punctuation.replace("_", "")) or "objects"


def _check_boxes(df: pd.DataFrame) -> None:
    if missing := [name for name in (*BOX_COLUMNS, "label") if name not in df.columns]:
        raise InputError(f"boxes to write need the columns {missing}, got {list(df.columns)}")


def _longer_side(df: pd.DataFrame) -> np.ndarray:
    x0, y0, x1, y1 = df[BOX_COLUMNS].to_numpy(float).T
    return np.maximum(x1 - x0, y1 - y0)


def _measured(df: pd.DataFrame) -> pd.DataFrame:
    """Return boxes with their centres and diameters, where these are not given."""
    _check_boxes(df)
    df = df.reset_index(drop=True)
    low, high = df[BOX_COLUMNS[:2]].to_numpy(float), df[BOX_COLUMNS[2:]].to_numpy(float)
    center = low + (high - low) / 2
    measured = {"pixel_x": center[:, 0], "pixel_y": center[:, 1], "diameter": _longer_side(df)}
    return df.assign(**{name: v for name, v in measured.items() if name not in df.columns})


@dataclass(frozen=True)
class _Output:
    """What a writer is told when it opens; it writes to `temporary` and speaks of `path`."""

    path: Path
    temporary: Path
    raster: RasterHandle
    labels: list[str]
    shape: str
    layer: str
    layer_column: str | None
    colors: Mapping[str, str] | None


@contextmanager
def _csv_writer(out: _Output) -> Iterator[Callable[[pd.DataFrame], None]]:
    with out.temporary.open("w", encoding="utf-8", newline="") as file:
        yield lambda df: _further(df, PIXEL_COLUMNS).to_csv(
            file, index=False, header=not file.tell()
        )


def _further(df: pd.DataFrame, first: Sequence[str]) -> pd.DataFrame:
    """Return some columns, and after them those that are neither of pixels nor polygons."""
    others = [name for name in df.columns if name not in (*PIXEL_COLUMNS, "geometry")]
    return df[[*first, *others]]


@contextmanager
def _gpkg_writer(out: _Output) -> Iterator[Callable[[pd.DataFrame], None]]:
    if out.layer == STYLES:
        raise InputError(f"{out.path}: QGIS keeps styles in {STYLES}; give the layer another name")
    _check_name(out.temporary)
    crs = _crs(out)
    code = crs and crs.to_epsg()
    described = f"EPSG:{code}" if code else crs and crs.to_wkt("WKT1_GDAL")
    as_table = _tables(out)
    unlabelled, layers = False, set()

    def append(df: pd.DataFrame) -> None:
        nonlocal unlabelled
        unlabelled |= bool(df["label"].isna().any())
        single = out.shape != "own" or "geometry" not in df.columns
        parts = _layers(df, out)
        layers.update(parts)
        with _writing(out), warnings.catch_warnings(action="ignore", category=UserWarning):
            table = as_table(df)
            for layer, rows in parts.items():
                pyogrio.write_arrow(  # warns that a raster without CRS makes a file without CRS
                    table.filter(pyarrow.array(rows)), out.temporary, layer=layer, driver="GPKG",
                    crs=described, geometry_name="geometry", append=out.temporary.exists(),
                    geometry_type="Polygon" if single else "Unknown",
                )  # fmt: skip

    try:
        yield append
        if layers == {out.layer}:
            colors = dict(out.colors or imutils.label_colors(out.labels))
            colors |= {"": REST} if unlabelled else {}
            styles = [_style(out, out.layer, "label", colors)] if colors else []
        else:
            colors = imutils.label_colors(layers)
            styles = [_style(out, name, out.layer_column, {name: colors[name]}) for name in colors]
        _write_styles(out, styles)
        if full := find_full(out.temporary):  # GDAL would not tell that an index found no room
            raise OSError(full, "no room for all of it", str(out.path))
    finally:
        for suffix in ("-journal", "-wal", "-shm"):  # of SQLite, where a transaction broke
            out.temporary.with_name(out.temporary.name + suffix).unlink(missing_ok=True)


def _layers(df: pd.DataFrame, out: _Output) -> dict[str, np.ndarray]:
    """Return the layers of a chunk, and the rows (bool) of each."""
    if out.layer_column not in df.columns:
        return {out.layer: np.ones(len(df), dtype=bool)}
    names = pd.Categorical(df[out.layer_column])
    return {str(name): names == name for name in names.categories}


def _style(out: _Output, layer: str, column: str, colors: Mapping[str, str]) -> dict[str, object]:
    return {
        "f_table_catalog": "", "f_table_schema": "", "f_table_name": layer,
        "f_geometry_column": pyogrio.read_info(out.temporary, layer=layer)["geometry_name"],
        "styleName": f"{column}s", "styleQML": _qml(column, colors), "styleSLD": "",
        "useAsDefault": True, "description": f"one colour per {column}", "owner": "", "ui": "",
        "update_time": pd.Timestamp.now("UTC"),
    }  # fmt: skip


def _write_styles(out: _Output, styles: Sequence[Mapping[str, object]]) -> None:
    """Add the table in which QGIS keeps the styles of a GeoPackage's layers, all as defaults."""
    if not styles:
        return
    with _writing(out):
        pyogrio.write_dataframe(
            pd.DataFrame(styles), out.temporary, layer=STYLES, driver="GPKG",
            layer_options={"FID": "id"},
        )  # fmt: skip


def _qml(column: str, colors: Mapping[str, str]) -> str:
    """Describe outlines in the colour of a column's value as QGIS does; "" is every other one."""
    root = ElementTree.Element("qgis", version="3.22", styleCategories="Symbology")
    add = ElementTree.SubElement
    renderer = add(root, "renderer-v2", type="categorizedSymbol", attr=column)
    categories, symbols = add(renderer, "categories"), add(renderer, "symbols")
    for number, (label, color) in enumerate(colors.items()):
        names = {"value": label, "label": label, "type": "string"}
        add(categories, "category", names, symbol=str(number), render="true")
        symbol = add(symbols, "symbol", type="fill", name=str(number))
        options = add(add(symbol, "layer", {"class": "SimpleLine"}), "Option", type="Map")
        rgba = ",".join(map(str, (*bytes.fromhex(color[1:]), 255)))
        line = {"line_color": rgba, "line_width": str(LINE_WIDTH), "line_width_unit": "MM"}
        for name, value in line.items():
            add(options, "Option", name=name, value=value, type="QString")
    return ElementTree.tostring(root, encoding="unicode")


@contextmanager
def _parquet_writer(out: _Output) -> Iterator[Callable[[pd.DataFrame], None]]:
    """Write GeoParquet, a row group per chunk.

    References:
        GeoParquet 1.1.0: no geometry types listed means any; a CRS of null means none is known.
    """
    crs = _crs(out)
    column = {"encoding": "WKB", "geometry_types": [], "crs": crs and crs.to_json_dict()}
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
    as_table = _tables(out)
    with ExitStack() as stack:
        writer = None

        def append(df: pd.DataFrame) -> None:
            nonlocal writer
            with _writing(out):
                table = as_table(df)
                if writer is None:
                    metadata = table.schema.metadata | {b"geo": json.dumps(geo).encode()}
                    schema = table.schema.with_metadata(metadata)
                    writer = pyarrow.parquet.ParquetWriter(out.temporary, schema)
                    stack.enter_context(writer)
                writer.write_table(table)

        yield append


@contextmanager
def _writing(out: _Output) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, RuntimeError, pyarrow.ArrowException) as error:
        full = find_full(out.temporary)
        if full or FULL_DISK.search(str(error)):
            raise OSError(full or errno.ENOSPC, str(error), str(out.path)) from error
        raise InputError(
            f"{out.path} cannot hold the columns: {error}; rename or drop them"
        ) from error


def _tables(out: _Output) -> Callable[[pd.DataFrame], pyarrow.Table]:
    """Return a function that turns chunks into tables of attributes and WKB in map coordinates.

    The first chunk decides on the types. What has none in Arrow, such as numbers mixed with words,
    is text.
    """
    schema = None

    def as_table(df: pd.DataFrame) -> pyarrow.Table:
        nonlocal schema
        table = _further(df, ["label", "diameter"]).rename(columns=str)
        schema = schema or _schema(table)
        texts = [field.name for field in schema if pyarrow.types.is_string(field.type)]
        table = table.astype(dict.fromkeys(texts, "string")).astype(dict.fromkeys(texts, object))
        return pyarrow.Table.from_pandas(
            table.assign(geometry=shapely.to_wkb(_features(df, out))), schema, preserve_index=False
        )

    return as_table


def _schema(df: pd.DataFrame) -> pyarrow.Schema:
    types = {}
    for name, column in df.items():
        try:
            kind = pyarrow.array(column).type
        except pyarrow.ArrowException:
            kind = pyarrow.string()
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if pyarrow.types.is_null(kind) or pyarrow.types.is_large_string(kind):
            kind = pyarrow.string()
        elif kind == pyarrow.uint64():
            kind = pyarrow.int64()  # GeoPackages would round it to a float
        types[name] = kind
    return pyarrow.schema(types | {"label": pyarrow.string(), "geometry": pyarrow.binary()})


def _crs(out: _Output) -> pyproj.CRS | None:
    return None if out.raster.crs is None else pyproj.CRS(out.raster.crs)


def _features(df: pd.DataFrame, out: _Output) -> np.ndarray:
    """Return what stands for each row in vector files, in map coordinates if there are any."""
    shapes, _ = _shapes(df, out.shape)
    return shapes if out.raster.crs is None else shapely.transform(shapes, out.raster.to_map)


def _shapes(df: pd.DataFrame, shape: str) -> tuple[np.ndarray, np.ndarray]:
    """Return what stands for each row (px), and which of them have nothing but a box."""
    if shape == "circle":
        return _circles(df), np.zeros(len(df), dtype=bool)
    boxes = shapely.box(*df[BOX_COLUMNS].to_numpy(dtype=float).T)
    if shape == "box" or "geometry" not in df.columns:
        return boxes, np.ones(len(df), dtype=bool)
    boxed = df["geometry"].isna().to_numpy()
    own = np.where(boxed, None, df["geometry"].to_numpy(dtype=object))
    differing = np.abs(shapely.bounds(own) - df[BOX_COLUMNS].to_numpy(float)).max(axis=1)
    return np.where(differing <= TOLERANCE, own, boxes), boxed  # NaN: there is no polygon


def _circles(df: pd.DataFrame) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, CIRCLE_SIDES, endpoint=False)
    unit = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    center, diameter = df[CENTER_COLUMNS].to_numpy(float), df["diameter"].to_numpy(float)
    return shapely.polygons(center[:, None] + diameter[:, None, None] / 2 * unit)


@contextmanager
def _geojson_writer(out: _Output) -> Iterator[Callable[[pd.DataFrame], None]]:
    """Write GeoJSON with all digits of the coordinates, which GDAL would round."""
    name = None if out.raster.crs is None else _crs_name(out)
    crs = name and {"type": "name", "properties": {"name": name}}
    head = {"type": "FeatureCollection", "name": out.layer, "crs": crs}
    with _json_lines(out.temporary, head, "features") as extend:

        def append(df: pd.DataFrame) -> None:
            records = _records(_further(df, ["label", "diameter"]))
            shapes = shapely.to_geojson(_features(df, out))
            extend(
                f'{{"type": "Feature", "properties": {_dumps(record)}, "geometry": {shape}}}'
                for record, shape in zip(records, shapes, strict=True)
            )

        yield append


@contextmanager
def _json_lines(
    path: Path, head: Mapping[str, object], key: str
) -> Iterator[Callable[[Iterable[str]], None]]:
    """Write an object of JSON whose last member is a list, one line per item."""
    with path.open("w", encoding="utf-8") as file:
        file.write(f'{_dumps(head)[:-1]}, "{key}": [')
        separator = "\n"

        def extend(items: Iterable[str]) -> None:
            nonlocal separator
            for item in items:
                file.write(separator + item)
                separator = ",\n"

        yield extend
        file.write("\n]}\n")


def _crs_name(out: _Output) -> str:
    """Return the URN of a raster's CRS; longitude stands first in GeoJSON of any kind."""
    crs = _crs(out)
    if crs.equals(pyproj.CRS("OGC:CRS84"), ignore_axis_order=True) or crs == pyproj.CRS(4326):
        return "urn:ogc:def:crs:OGC:1.3:CRS84"
    if authority := crs.to_authority():
        name = "urn:ogc:def:crs:{}::{}".format(*authority)
        member = {"type": "name", "properties": {"name": name}}
        probe = {"type": "FeatureCollection", "crs": member, "features": []}
        found = pyogrio.read_info(json.dumps(probe).encode())["crs"]
        # what counts is what readers make of the name
        if found and pyproj.CRS(found).equals(crs, ignore_axis_order=True):
            return name
    raise InputError(
        f"{out.path}: GeoJSON names a CRS by its code, which that of {out.raster.path} "
        f"({crs.name}) lacks; write a GeoPackage (.gpkg) instead"
    )


@contextmanager
def _coco_writer(out: _Output) -> Iterator[Callable[[pd.DataFrame], None]]:
    raster = out.raster
    ids = {name: number for number, name in enumerate(out.labels, 1)}
    image = {"file_name": raster.path.name, "width": raster.width, "height": raster.height}
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    head = {"images": [{"id": 1} | image], "categories": categories}
    numbers = itertools.count(1)
    with _json_lines(out.temporary, head, "annotations") as extend:

        def append(df: pd.DataFrame) -> None:
            labels = _required_labels(out.path, df)
            shapes, boxed = _shapes(df, out.shape)
            corners = df[BOX_COLUMNS].to_numpy(dtype=float)
            boxes = np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]])
            others = df.drop(columns={*PIXEL_COLUMNS, "geometry", "id"} & set(df.columns))
            rows = zip(
                _records(others), labels, boxes.tolist(), shapely.area(shapes).tolist(), boxed,
                shapes, strict=True,
            )  # fmt: skip
            extend(
                _dumps(
                    {"iscrowd": 0}
                    | other
                    | {"id": next(numbers), "image_id": 1, "category_id": ids[label], "bbox": box,
                       "area": area, "segmentation": [] if only_box else _outlines(shape)}
                )
                for other, label, box, area, only_box, shape in rows
            )  # fmt: skip

        yield append


def _outlines(shape: shapely.Geometry) -> list[list[float]]:
    return [
        shapely.get_coordinates(part.exterior)[:-1].ravel().tolist()
        for part in shapely.get_parts(shape)
    ]


@contextmanager
def _yolo_writer(out: _Output) -> Iterator[Callable[[pd.DataFrame], None]]:
    if broken := [label for label in out.labels if re.search(r"[\r\n]", label) or not label]:
        raise InputError(f"{out.path}: no class can be called {broken[:SHOWN]}; rename the labels")
    known = _yolo_names(out.path.parent)
    names = [known.get(number, str(number)) for number in range(max(known, default=-1) + 1)]
    names += sorted(set(out.labels) - set(names))
    ids = {name: number for number, name in reversed(list(enumerate(names)))}
    with out.temporary.open("w", encoding="utf-8") as file:

        def append(df: pd.DataFrame) -> None:
            labels = _required_labels(out.path, df)
            size = np.tile([out.raster.width, out.raster.height], 2)
            boxes = df[BOX_COLUMNS].to_numpy(dtype=float) / size
            low, side = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
            values = np.hstack([low + side / 2, side])
            scores = df["score"].to_numpy(float) if "score" in df else np.full(len(df), np.nan)
            file.writelines(
                " ".join([str(ids[label]), *map(repr, row), *([] if np.isnan(s) else [repr(s)])])
                + "\n"
                for label, row, s in zip(labels, values.tolist(), scores.tolist(), strict=True)
            )

        yield append
    _extend_classes(out.path, names)


def _extend_classes(path: Path, names: Sequence[str]) -> None:
    """Write the class names beside a YOLO file before it appears: no id without its name."""
    now = _yolo_names(path.parent)
    if any(now.get(number, name) != name for number, name in enumerate(names)):
        raise InputError(f"{path}: the class names beside it were changed meanwhile; write again")
    if names and max(now, default=-1) < len(names):
        with atomic_path(path.parent / "classes.txt") as classes:
            classes.write_text("".join(f"{n}\n" for n in names), encoding="utf-8", newline="")


def _required_labels(path: Path, df: pd.DataFrame) -> list[str]:
    if missing := int(df["label"].isna().sum()):
        raise InputError(f"{path}: the format needs labels, {missing} boxes have none; name them")
    return [str(label) for label in df["label"]]


def _records(df: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows as objects of JSON, which knows neither NaN nor infinity."""
    if df.columns.empty:
        return [{} for _ in range(len(df))]
    df = df.astype(object)
    return df.where(df.notna() & ~df.isin([np.inf, -np.inf]), None).to_dict("records")


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


_WRITERS: dict[str, Callable[[_Output], AbstractContextManager[Callable[[pd.DataFrame], None]]]] = {
    ".csv": _csv_writer, ".gpkg": _gpkg_writer, ".geojson": _geojson_writer, ".json": _coco_writer,
    ".parquet": _parquet_writer, ".txt": _yolo_writer,
}  # fmt: skip
ANNOTATION_SUFFIXES = tuple(_WRITERS)
