"""Masks: which class every pixel of a raster has, rasterised window by window, never whole.

Labels are polygons of a vector file, or a mask raster. Both answer `read(window)` with class ids,
and with `IGNORE` where nothing is known. Auxiliary bands, made of a vector file or of the place of
a pixel, are read with a raster as if they were bands of it.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import rasterio
import rasterio.features
import shapely

import annotations
import fileio
import geometries
import parallel
import tiling
from ImageData import IGNORE as IGNORE  # a word of masks
from ImageData import ImageData, InputError, Window
from ModelConfig import AuxiliaryOptions

log = logging.getLogger(__name__)

BACKGROUND = "background"  # the class of ground that no polygon covers
MAX_CLASSES = 254  # in a byte, beside IGNORE
MASK_SUFFIXES = {".tif", ".tiff", ".png", ".vrt", ".jp2", ".img", ".bmp"}
SNAP = 2.0**20  # per px: vertices lie on this grid, so that moving them to a window is exact
MANY_VERTICES = 256  # of a polygon, from which on only what matters to a window is drawn
SCAN_SIDE = 1024  # px of the windows in which a mask raster's values are looked for
SHOWN = 8  # values that a message lists

Classes = "ClassTable | Mapping[object, object] | Sequence[object] | int | None"


# ---------------------------------------------------------------------------------------------
# Classes
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassTable:
    """The classes of a run, and which values of an attribute, or of a mask raster, mean them.

    Attributes:
        names: Of the classes; the place of a name is its class id.
        values: Value, as text -> class id. Ground under no polygon is `background`.
        ignored: Class id of ground that does not count, as if nothing were known there; None: all
            classes count.
    """

    names: tuple[str, ...]
    values: Mapping[str, int]
    ignored: int | None = None

    def __post_init__(self) -> None:
        """Refuse tables that are none."""
        if not 1 <= len(self.names) <= MAX_CLASSES:
            raise InputError(
                f"a mask has 1 to {MAX_CLASSES} classes, got {len(self.names)}, for example "
                f"{list(self.names[:SHOWN])}; is that the attribute with the classes? Merge values "
                "by giving several the same name"
            )
        if wrong := {v: i for v, i in self.values.items() if not 0 <= i < len(self.names)}:
            raise InputError(f"class ids must be 0 to {len(self.names) - 1}, got {wrong}")
        if self.ignored is not None and not 0 <= self.ignored < len(self.names):
            raise InputError(
                f"segmentation.ignore_index must be < {len(self.names)}, the number of classes "
                f"{list(self.names[:SHOWN])}, got {self.ignored}"
            )

    @property
    def background(self) -> int | None:
        """Class id of ground that no polygon covers; None: nothing is known there."""
        return self.names.index(BACKGROUND) if BACKGROUND in self.names else None

    def frame(self) -> pd.DataFrame:
        """Return the table as `value, class_id, name`; the background may have no value."""
        rows = [(value, i, self.names[i]) for value, i in self.values.items()]
        rows += [
            ("", i, name) for i, name in enumerate(self.names) if i not in {*self.values.values()}
        ]
        df = pd.DataFrame(rows, columns=["value", "class_id", "name"])
        return df.sort_values("class_id", kind="stable", ignore_index=True)

    def save(self, path: Path) -> Path:
        """Write the table as CSV or JSON, by the suffix; `load` reads either."""
        if Path(path).suffix.lower() == ".json":
            return fileio.write_json(path, {"names": list(self.names), "values": dict(self.values)})
        return fileio.write_table(path, self.frame())

    @classmethod
    def load(cls, path: Path) -> ClassTable:
        """Read a table that `save` wrote."""
        if Path(path).suffix.lower() == ".json":
            data = pd.read_json(path, typ="series", dtype=False)
            return cls(tuple(map(str, data["names"])), dict(data["values"]))
        df = fileio.read_table(path, text_columns=["value", "name"])
        names = df.drop_duplicates("class_id").sort_values("class_id")["name"]
        known = df[df["value"].notna()]
        return cls(
            tuple(names), dict(zip(known["value"], map(int, known["class_id"]), strict=True))
        )


def make_table(values: Iterable[object], classes: Classes, *, background: bool) -> ClassTable:
    """Give every value of an attribute a class id.

    Args:
        values: All values there are.
        classes: What they mean. None: each is a class, ids in the order of their numbers if all are
            whole numbers, else of the names. A sequence: these values are the classes, in this
            order. A mapping value -> name: values of one name are one class, in the order in which
            the names come first. A mapping value -> number: values of one number are one class, of
            the numbers 0, 1, 2 and so on; 0 is the background, where there is one, and without one
            the numbers may begin with 1, which is class id 0 then.
            A number: of how many classes there are, with or without the background, which is
            number 0 in any case; values that are whole numbers are the classes' own numbers, others
            are numbered by name. A table stays as it is.
        background: Whether ground that no polygon covers is a class; it is number 0, and a value
            or name "background" means it, too.

    Raises:
        InputError: A value is not among `classes`, or there are too many.
    """
    found = list(dict.fromkeys(text_of(value) for value in values))
    if isinstance(classes, int):
        return _numbered(found, classes)
    if isinstance(classes, ClassTable):
        _check_values(found, classes.values)
        return classes
    if classes is None:
        whole = all(value.lstrip("-").isdecimal() for value in found)
        named = {value: value for value in sorted(found, key=int if whole else str)}
    elif isinstance(classes, Mapping):
        meanings = {text_of(value): meaning for value, meaning in classes.items()}
        if not meanings.keys() & set(found) and set(found) <= set(map(text_of, meanings.values())):
            turned = {text_of(meaning): value for value, meaning in meanings.items()}
            raise InputError(
                f"CLASSES says what values mean, {{value: name}}, and the values are "
                f"{found[:SHOWN]}, got {meanings}; did you mean {turned}? (A DEFAULT_LABEL is a "
                "value, too)"
            )
        if all(isinstance(m, int) and not isinstance(m, bool) for m in meanings.values()):
            named = _named_by_number(meanings, background)
        else:
            named = {value: str(meaning) for value, meaning in meanings.items()}
    else:
        named = {text_of(value): text_of(value) for value in classes}
    _check_values(found, named)
    names = list(dict.fromkeys(named.values()))
    if background:
        names = [BACKGROUND, *(name for name in names if name != BACKGROUND)]
    return ClassTable(tuple(names), {value: names.index(name) for value, name in named.items()})


def _named_by_number(numbers: Mapping[str, int], background: bool) -> dict[str, str]:
    """Give values, in the order of their numbers, the name of all that share the number."""
    groups: dict[int, list[str]] = {}
    for value, number in sorted(numbers.items(), key=lambda item: item[1]):
        groups.setdefault(number, []).append(value)
    first = min(groups, default=0)
    if first not in (0, 1) or list(groups) != list(range(first, first + len(groups))):
        raise InputError(
            "class numbers in CLASSES must be 0, 1, 2 and so on, without a gap (0 is the "
            f"background), got {list(groups)}; number anew, or give names instead"
        )
    names = {number: "+".join(values) for number, values in groups.items()}
    if background and 0 in names:
        names[0] = BACKGROUND
    return {value: names[number] for number, values in groups.items() for value in values}


def _numbered(found: Sequence[str], count: int) -> ClassTable:
    """Give values the numbers 1 to `count`, or to one less, where the background is counted."""
    values = [value for value in found if value not in ("0", BACKGROUND)]
    if all(map(_is_whole, values)):
        last = max([count - 1, *map(int, values)])
        named = {str(number): number for number in range(1, last + 1)}
        wrong = last > count or any(int(value) < 1 for value in values)
    else:
        named = {value: number for number, value in enumerate(sorted(values), start=1)}
        wrong = len(values) > count
    if wrong:
        raise InputError(
            f"there are to be {count} classes, but the values are {found[: 2 * SHOWN]} "
            f"({len(found)} in all); set that number right (CLASSES, num_classes), or leave "
            "polygons out with ATTRIBUTE_FILTER"
        )
    ids = named | {value: 0 for value in found if value in ("0", BACKGROUND)}
    return ClassTable((BACKGROUND, *named), ids)


def text_of(value: object) -> str:
    """Write a value of an attribute out: 1 and 1.0 are both "1"."""
    whole = isinstance(value, float | np.floating) and float(value).is_integer()
    return str(int(value) if whole else value)


def _check_values(found: Iterable[str], known: Mapping[str, object]) -> None:
    if strangers := [value for value in found if value not in known]:
        unused = [value for value in known if value not in set(found)]
        hint = f" ({unused[:SHOWN]} of CLASSES occur nowhere)" if unused else ""
        raise InputError(
            f"{len(strangers)} of the values, {strangers[:SHOWN]}, are not among CLASSES, "
            f"{list(known)[: 2 * SHOWN]}{hint}; add them, or leave their polygons out with "
            "ATTRIBUTE_FILTER"
        )


def resolve_classes(labels: Sequence[Labels], classes: Classes = None) -> ClassTable:
    """Fix the classes of a run over the labels of all its rasters together.

    Args:
        labels: The labels of all rasters; `with_classes` gives them the table.
        classes: See `make_table`.

    Returns:
        The table, which is also logged. Uncovered ground is the class "background" if there is any
        and the labels are no reference that masks it.

    Raises:
        InputError: See `make_table`; the message names the files.
    """
    counts: Counter[str] = Counter()
    for source in labels:
        counts.update(source.counts)
    try:
        table = make_table(counts, classes, background=any(source.uncovered for source in labels))
    except InputError as error:
        files = ", ".join(dict.fromkeys(source.path.name for source in labels))
        raise InputError(f"{files}: {error}") from error
    for row in table.frame().itertuples():
        unit = "px" if any(isinstance(source, MaskLabels) for source in labels) else "polygons"
        count = f"{counts[row.value]} {unit}" if row.value else "ground that nothing covers"
        log.info("class %d is %s: value %r, %s", row.class_id, row.name, row.value, count)
    return table


# ---------------------------------------------------------------------------------------------
# Labels
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """What polygons and mask rasters have in common; see `ImageData.LabelSource`.

    Attributes:
        path: The file.
        raster: The raster it labels.
        classes: Table of the classes.
        mask_reference: Whether ground without a label is unknown, instead of background.
        counts: Polygons, or pixels, per value of the attribute.
    """

    path: Path
    raster: fileio.Raster
    classes: ClassTable
    mask_reference: bool
    counts: Mapping[str, int]

    @cached_property
    def uncovered(self) -> bool:
        """Whether some pixel that counts is background; windows are looked at until one is."""
        if self.mask_reference or not self._may_leave_ground():
            return False
        extent = Window(0, 0, self.raster.width, self.raster.height)
        rows = -(-extent.height // SCAN_SIDE)
        for row in np.random.default_rng(0).permutation(rows):  # ground is rare at the edges
            grid = tiling.window_grid(extent, SCAN_SIDE, rows=slice(row, row + 1))
            places = grid[tiling.WINDOW_COLUMNS].to_numpy()
            for place in places[self.raster.may_count(places)].tolist():
                bare = self._bare(Window(*place))
                with suppress(InputError):  # what is damaged does not count
                    if bare.any() and (bare & read_counted(self.raster, Window(*place))).any():
                        return True
        return False

    def _may_leave_ground(self) -> bool:
        """Tell, without reading pixels, whether some ground may have no label."""
        raise NotImplementedError

    def _bare(self, window: Window) -> np.ndarray:
        """Tell which pixels (H, W) no polygon covers, or are known to have no class."""
        raise NotImplementedError

    @property
    def made_from(self) -> dict[str, object]:
        """What a result that was made from these labels depends on, for manifests."""
        return {
            "raster": self.raster.made_from, "names": self.classes.names,
            "values": dict(self.classes.values), "mask_reference": self.mask_reference,
            "ignored": self.classes.ignored,
        }  # fmt: skip

    def with_classes(self, classes: ClassTable) -> Labels:
        """Return the same labels with the class ids of another table.

        Raises:
            InputError: They have a value that it lacks.
        """
        _check_values(self.counts, classes.values)
        if self.uncovered and classes.background is None:
            log.warning(
                "%s leaves ground without a label, but %s are all classes; nothing is known there",
                self.path.name, list(classes.names),
            )  # fmt: skip
        labels = replace(self, classes=classes)
        labels.__dict__["uncovered"] = self.uncovered  # which may have been long work
        return labels

    def read(self, window: Window, counted: np.ndarray | None = None) -> np.ndarray:
        """Read the class ids of a window, see `ImageData.LabelSource`."""
        mask = self._paint(window)
        mask[~(read_counted(self.raster, window) if counted is None else counted)] = IGNORE
        if self.classes.ignored is not None:
            mask[mask == self.classes.ignored] = IGNORE
        return mask

    def _paint(self, window: Window) -> np.ndarray:
        raise NotImplementedError

    @property
    def _fill(self) -> int:
        """Class id of ground without a label."""
        background = self.classes.background
        return IGNORE if self.mask_reference or background is None else background


def read_counted(raster: fileio.Raster, window: Window) -> np.ndarray:
    """Tell which pixels of a window are ground that counts, bool (H, W), false off the raster.

    Pixels are read only where they can be invalid.
    """
    raster = raster.own
    plain = not raster.masked and set(raster.nodata) == {None}
    if plain and np.dtype(raster.dtype).kind != "f":
        x, y = window.x + np.arange(window.width), window.y + np.arange(window.height)
        valid = ((y >= 0) & (y < raster.height))[:, None] & ((x >= 0) & (x < raster.width))
    else:
        valid = raster.read_valid(window, raster.read(window))
    return raster.read_counted(window, valid)


@dataclass(frozen=True)
class PolygonLabels(Labels):
    """Polygons of a vector file. The later one in the file lies on top, of COCO the smaller one.

    Attributes:
        df: The polygons, with `label` (the attribute's value), `geometry` and boxes, px.
        attribute: Where the values come from.
        quarantine: Rows that are not used, with `reason`, see `annotations.Cleaned`.
    """

    df: pd.DataFrame
    attribute: str
    quarantine: pd.DataFrame

    def __getstate__(self) -> dict[str, object]:
        """Leave out what each process builds for itself, and all but the polygons."""
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        wkb = pd.Series(shapely.to_wkb(self._shapes), dtype=object)
        df = self.df[["label"]].reset_index(drop=True).assign(geometry=wkb)
        return state | {"df": df, "quarantine": self.quarantine.iloc[:0]}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take the polygons out of their bytes; their boxes stay behind."""
        self.__dict__.update(state)
        shapes = shapely.from_wkb(self.df["geometry"].to_numpy())
        self.__dict__["df"] = geometries.with_geometry(self.df, shapes)

    @property
    def made_from(self) -> dict[str, object]:
        """See `Labels`."""
        return super().made_from | {"polygons": fileio.fingerprint(self._digest)}

    @cached_property
    def _digest(self) -> list[str]:
        return [shapely.to_wkb(shape, hex=True) for shape in self._shapes] + list(
            self.df["label"].astype(str)
        )

    def _may_leave_ground(self) -> bool:
        ground = shapely.box(0, 0, self.raster.width, self.raster.height)
        shapes = self._shapes[self._tree.query(ground)]
        seen = shapely.clip_by_rect(shapes, *ground.bounds)
        least = ground.area * (1 - 1e-9)
        if shapely.area(seen).sum() < least:
            return True
        return shapely.union_all(seen).area < least

    @property
    def _shapes(self) -> np.ndarray:
        return self.df["geometry"].to_numpy(dtype=object)

    @cached_property
    def _tree(self) -> shapely.STRtree:
        return shapely.STRtree(self._shapes)

    @cached_property
    def _vertices(self) -> np.ndarray:
        return shapely.get_num_coordinates(self._shapes)

    @cached_property
    def _ids(self) -> np.ndarray:
        """Class ids; a polygon without a value says that the ground is something unknown."""
        ids = self.df["label"].map(self.classes.values)
        return ids.fillna(IGNORE).to_numpy(dtype="uint8")

    def _paint(self, window: Window) -> np.ndarray:
        return self._draw(window, self._fill, self._ids)

    def _bare(self, window: Window) -> np.ndarray:
        return self._draw(window, 0, np.ones(len(self._shapes), dtype="uint8")) == 0

    def _draw(self, window: Window, fill: int, numbers: np.ndarray) -> np.ndarray:
        """Give the pixels of a window the number of the polygon that lies on top."""
        mask = np.full((window.height, window.width), fill, dtype="uint8")
        x, y, width, height = window
        rows = np.sort(self._tree.query(shapely.box(x, y, x + width, y + height)))
        shapes = [
            shorten(shape, window) if count >= MANY_VERTICES else shape
            for shape, count in zip(self._shapes[rows], self._vertices[rows], strict=True)
        ]
        burnt = [(s, int(i)) for s, i in zip(shapes, numbers[rows], strict=True) if s is not None]
        if burnt:
            rasterio.features.rasterize(
                burnt, out=mask, transform=rasterio.Affine.translation(x, y)
            )
        return mask


def shorten(polygon: shapely.Geometry, window: Window) -> shapely.Geometry | None:
    """Leave out the vertices of a polygon that do not matter to the pixels of a window.

    A run of vertices beyond one side of the window is as good as its two ends: between them the
    outline passes as often to each side of every pixel. Other than a cut at the window's edge, this
    moves no line, so that the pixels are exactly those of the whole polygon.

    Returns:
        What is left, whose rings may cross one another outside the window; None if nothing is.
    """
    low = np.array([window.x, window.y], dtype=float) - 1
    high = np.array([window.x + window.width, window.y + window.height], dtype=float) + 1
    parts = []
    for part in shapely.get_parts(polygon):
        rings = [
            _shorten_ring(shapely.get_coordinates(r), low, high) for r in shapely.get_rings(part)
        ]
        rings = [ring for ring in rings if ring is not None]
        if rings:
            parts.append(shapely.polygons(rings[0], holes=rings[1:] or None))
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else shapely.multipolygons(parts)


def _shorten_ring(ring: np.ndarray, low: np.ndarray, high: np.ndarray) -> shapely.Geometry | None:
    ring = ring[:-1]  # the end is the start
    for axis, sign, limit in ((0, -1, -low[0]), (0, 1, high[0]), (1, -1, -low[1]), (1, 1, high[1])):
        beyond = sign * ring[:, axis] > limit  # side by side: a run lies beyond one of them
        ring = ring[~(beyond & np.roll(beyond, 1) & np.roll(beyond, -1))]
        if len(ring) < 3:
            return None
    return shapely.linearrings(ring)


@dataclass(frozen=True)
class MaskLabels(Labels):
    """A raster whose pixels are values of classes.

    Attributes:
        mask: Its handle.
        offset_xy: Column and row of the labelled raster at which its first pixel lies.
        zeros: Its pixels that are 0, where that is no class of its own.
    """

    mask: fileio.Raster
    offset_xy: tuple[int, int]
    zeros: int

    @property
    def made_from(self) -> dict[str, object]:
        """See `Labels`."""
        return super().made_from | {"mask": self.mask.made_from, "offset": self.offset_xy}

    def _may_leave_ground(self) -> bool:
        return self.zeros > 0

    def _bare(self, window: Window) -> np.ndarray:
        pixels, known = self._pixels(window)
        return known & (pixels == 0)

    def _pixels(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """See `_read_mask`; the window is the labelled raster's."""
        left, top = self.offset_xy
        return _read_mask(self.mask, window._replace(x=window.x - left, y=window.y - top))

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """Values, sorted, and their class ids."""
        meant = dict(self.classes.values)
        known = {int(value): i for value, i in meant.items() if _is_whole(value)}
        known.setdefault(0, self._fill)
        values = np.array(sorted(known))
        return values, np.array([known[value] for value in values], dtype="uint8")

    def _paint(self, window: Window) -> np.ndarray:
        pixels, known = self._pixels(window)
        values, ids = self._table
        place = np.searchsorted(values, pixels).clip(max=len(values) - 1)
        mask = np.where(known, ids[place], IGNORE).astype("uint8")
        if (strange := known & (values[place] != pixels)).any():
            raise InputError(
                f"{self.path} has the values {np.unique(pixels[strange])[:SHOWN].tolist()} in "
                f"window {tuple(window)}, which are not among CLASSES; was it written anew?"
            )
        return mask


def _is_whole(value: str) -> bool:
    return value.lstrip("-").isdecimal()


def _read_mask(mask: fileio.Raster, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Read the values of a mask raster, and where they are known.

    Unknown is what lies off it, is excluded by its own mask, is nodata other than 0, which commonly
    is background, or is `IGNORE` in a byte, unless that is nodata.
    """
    image = mask.read(window)
    x, y = window.x + np.arange(window.width), window.y + np.arange(window.height)
    inside = ((y >= 0) & (y < mask.height))[:, None] & ((x >= 0) & (x < mask.width))
    if mask.masked or mask.nodata[0] not in (None, 0):
        inside &= mask.read_valid(window, image)
    if np.dtype(mask.dtype).itemsize == 1:
        inside &= image[0] != IGNORE
    return image[0], inside


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def read_labels(
    path: Path | str,
    raster: fileio.Raster,
    *,
    attribute: str | None = None,
    classes: Classes = None,
    mask_reference: bool = False,
    coordinates: str = "auto",
    layer: str | None = None,
    image_column: str | None = None,
    attribute_filter: str | None = None,
    default_label: str | None = None,
    workers: int | None = 1,
) -> PolygonLabels | MaskLabels:
    """Read the labels of one raster.

    Args:
        path: Polygons in any file (or at any address) that `annotations.read_annotations` reads, or
            a mask raster with one band of whole numbers, of the raster's size or on its grid. Of a
            mask, 0 is background, and unknown is nodata, and 255 in a mask of bytes.
        raster: The raster.
        attribute: Of the polygons, which tells their class. COCO names its classes itself.
        classes: See `make_table`; for several rasters, `resolve_classes` fixes them together.
        mask_reference: Ground without a label is unknown, instead of background.
        coordinates: See `annotations.ReadingOptions`.
        layer: Layer of a vector file with several.
        image_column: See `annotations.ReadingOptions`.
        attribute_filter: See `annotations.ReadingOptions`.
        default_label: Likewise, of polygons.
        workers: Processes that look for the values of a mask raster; None takes all cores.

    Raises:
        InputError: The file cannot be used: no such attribute (the nearest names are told), no CRS
            or one that does not fit, no polygon on the raster, a value outside `classes`, a mask of
            another size.
    """
    path = Path(path)
    if path.suffix.lower() in MASK_SUFFIXES:
        named = () if isinstance(classes, int | None) else classes
        if isinstance(classes, ClassTable):
            named = classes.values  # noqa: PD011
        zero_is_class = "0" in map(text_of, named)
        labels = _open_mask(path, raster, mask_reference, zero_is_class, workers)
    else:
        cleaned = annotations.read_annotations(
            path, raster, label_column=attribute or "label", coordinates=coordinates, layer=layer,
            image_column=image_column, attribute_filter=attribute_filter,
            default_label=default_label, polygons_only=True,
        )  # fmt: skip
        labels = _place_polygons(path, raster, cleaned, attribute or "label", mask_reference)
    try:
        table = make_table(labels.counts, classes, background=labels.uncovered)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return labels.with_classes(table)


def _place_polygons(
    path: Path,
    raster: fileio.Raster,
    cleaned: annotations.Cleaned,
    attribute: str,
    mask_reference: bool,
) -> PolygonLabels:
    shapes = cleaned.df["geometry"].to_numpy(dtype=object)
    shapes = shapely.transform(shapes, lambda xy: np.round(xy * SNAP) / SNAP)
    ground = shapely.box(0, 0, raster.width, raster.height)
    here = shapely.intersects(shapely.box(*shapely.bounds(shapes).T), ground)
    if not here.any():
        box = np.round(shapely.total_bounds(shapes)).tolist()
        raise InputError(
            f"no polygon of {path} lies on {raster.path}: they span {box} px (xmin, ymin, xmax, "
            f"ymax) of its {raster.width} x {raster.height}; check that they belong together, "
            "COORDINATES, and the CRS of both"
        )
    if not here.all():
        log.info("%s: %d of %d polygons lie off the raster", path.name, (~here).sum(), len(here))
    df = geometries.with_geometry(cleaned.df, shapes)[here].reset_index(drop=True)
    if path.suffix.lower() == ".json" and "category_id" in df.columns:
        # the order of COCO's annotations means nothing, and what hides a smaller one is no object
        areas = shapely.area(df["geometry"].to_numpy(dtype=object))
        df = df.iloc[np.argsort(-areas, kind="stable")].reset_index(drop=True)
    if nameless := int(df["label"].isna().sum()):
        log.warning(
            "%s: %d polygons have no %s; nothing is known of their ground", path.name, nameless,
            attribute,
        )  # fmt: skip
    counts = {str(k): int(v) for k, v in df["label"].value_counts(sort=False).items()}
    if not counts:
        raise InputError(f"no polygon of {path} on {raster.path} has a value of {attribute!r}")
    nothing = ClassTable(tuple(counts)[:MAX_CLASSES], {})  # until the caller makes the table
    return PolygonLabels(
        path, raster, nothing, mask_reference, counts, df, attribute, cleaned.quarantine
    )


def _open_mask(
    path: Path,
    raster: fileio.Raster,
    mask_reference: bool,
    zero_is_class: bool,
    workers: int | None,
) -> MaskLabels:
    mask = _on_grid(path, raster)
    if len(mask.bands) > 1 or np.dtype(mask.dtype).kind not in "ui":
        raise InputError(
            f"a mask has one band of whole numbers, {path} has {len(mask.bands)} of {mask.dtype}; "
            "write the class numbers to one band"
        )
    offset = _offset(mask, raster)
    counts = _count_values(mask, workers)
    zeros = 0 if zero_is_class else counts.pop("0", 0)
    if not counts:
        raise InputError(
            f"no pixel of the mask {path} has a class, {zeros} are 0, which is background; check "
            "its nodata value"
        )
    nothing = ClassTable(tuple(counts)[:MAX_CLASSES], {})
    return MaskLabels(path, raster, nothing, mask_reference, counts, mask, offset, zeros)


def _on_grid(path: Path, raster: fileio.Raster) -> fileio.Raster:
    """Open a mask; that of a raster that is resampled is resampled with it."""
    mask = fileio.read_raster(path)
    return fileio.on_grid(mask, raster) if raster.original is not None else mask


def _offset(mask: fileio.Raster, raster: fileio.Raster) -> tuple[int, int]:
    """Return where a mask lies on a raster, px.

    Raises:
        InputError: It has another size and is not on the raster's grid, or lies elsewhere.
    """
    same_size = (mask.width, mask.height) == (raster.width, raster.height)
    sizes = (
        f"the mask {mask.path} has {mask.width} x {mask.height} px, {raster.path} has "
        f"{raster.width} x {raster.height}"
    )
    if mask.crs is None or raster.crs is None:
        if same_size:
            return 0, 0
        raise InputError(
            f"{sizes}, and without a CRS of both nothing tells where it lies; give a mask of the "
            "raster's size"
        )
    if same_size and np.allclose(mask.transform, raster.transform, rtol=1e-9, atol=0):
        return 0, 0
    crs, own = (rasterio.crs.CRS.from_wkt(r.crs) for r in (mask, raster))
    corners = np.array([[0, 0], [mask.width, 0], [0, mask.height]], dtype=float)
    placed = raster.to_pixel(mask.to_map(corners))
    first = np.round(placed[0])
    if crs != own or np.abs(placed - corners - first).max() > 0.05:
        raise InputError(
            f"{sizes}, and it is not on the raster's grid: its corners lie at "
            f"{np.round(placed, 2).tolist()} px of it, CRS {mask.crs_name} and {raster.crs_name}; "
            "warp the mask to the raster's grid: gdalwarp -r near"
        )
    x, y = map(int, first)
    if x >= raster.width or y >= raster.height or x + mask.width <= 0 or y + mask.height <= 0:
        raise InputError(f"{sizes}, and it lies off the raster, at {x}, {y} px; give its own mask")
    return x, y


def _count_values(mask: fileio.Raster, workers: int | None) -> dict[str, int]:
    grid = tiling.window_grid(Window(0, 0, mask.width, mask.height), SCAN_SIDE)
    core = grid[tiling.CORE_COLUMNS].to_numpy()
    windows = [
        Window(*map(int, (*low, *(high - low))))
        for low, high in zip(core[:, :2], core[:, 2:], strict=True)
    ]
    jobs = [(mask, windows[i : i + 64]) for i in range(0, len(windows), 64)]
    total: Counter[int] = Counter()
    for counts in parallel.imap_ordered(
        _count_job, jobs, workers=workers, description=f"values of {mask.path.name}"
    ):
        total.update(counts)
    return {str(value): total[value] for value in sorted(total)}


def _count_job(job: tuple[fileio.Raster, Sequence[Window]]) -> dict[int, int]:
    mask, windows = job
    total: Counter[int] = Counter()
    for window in windows:
        pixels, known = _read_mask(mask, window)
        values, counts = np.unique(pixels[known], return_counts=True)
        total.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        if len(total) > MAX_CLASSES + 1:
            raise InputError(
                f"the mask {mask.path} has more than {MAX_CLASSES} values, for example "
                f"{sorted(total)[:SHOWN]}; a mask holds class numbers"
            )
    return dict(total)


def label_images(
    rasters: Sequence[fileio.Raster],
    paths: Sequence[Path | str],
    *,
    attributes: str | Sequence[str | None] | None = None,
    classes: Classes = None,
    ignored: int | None = None,
    region_paths: Sequence[tuple[Path | None, Path | None]] = (),
    coordinates: str = "auto",
    workers: int | None = 1,
    **options: object,
) -> tuple[list[ImageData], ClassTable]:
    """Read the labels of all rasters of a run and fix its classes.

    Args:
        rasters: The rasters.
        paths: The file of each, see `read_labels`.
        attributes: The attribute of each, or that of all.
        classes: See `make_table`.
        ignored: See `ClassTable`.
        region_paths: Per raster, see `annotations.read_regions`; none: all ground counts.
        coordinates: See `annotations.ReadingOptions`.
        workers: Processes that look for the values of mask rasters.
        options: Passed to `read_labels`.

    Returns:
        The labelled rasters, and the table of classes, which all of them share.

    Raises:
        InputError: A file cannot be used, or its values are not among `classes`.
    """
    if attributes is None or isinstance(attributes, str):
        attributes = [attributes] * len(rasters)
    if any(path for paths in region_paths for path in paths):
        rasters = [
            raster.with_regions(annotations.read_regions(*paths, raster, coordinates))
            for raster, paths in zip(rasters, region_paths, strict=True)
        ]
    options |= {"classes": classes, "coordinates": coordinates, "workers": workers}
    labels = [
        read_labels(path, raster, attribute=attribute, **options)
        for raster, path, attribute in zip(rasters, paths, attributes, strict=True)
    ]
    table = replace(resolve_classes(labels, classes), ignored=ignored)
    images = []
    for raster, source in zip(rasters, labels, strict=True):
        df = source.df if isinstance(source, PolygonLabels) else empty_table()
        images.append(ImageData(raster, raster.identifier, df, source.with_classes(table)))
    return images, table


def save_labels(folder: Path, labels: Mapping[str, PolygonLabels | MaskLabels]) -> None:
    """Write what other processes need to read the same masks; `load_labels` reads it.

    Args:
        folder: Gets a file of polygons per raster that has some, and `labels.json`.
        labels: Identifier of a raster -> its labels; all have the same classes.
    """
    entries = []
    for number, (name, source) in enumerate(labels.items()):
        address = fileio.address_of(source.path)
        entry = {
            "raster": name, "path": address or str(Path(source.path).absolute()),
            "mask_reference": source.mask_reference, "counts": dict(source.counts),
            "values": dict(source.classes.values),
        }  # fmt: skip
        if isinstance(source, PolygonLabels):
            entry |= {"attribute": source.attribute, "polygons": f"polygons_{number}.parquet"}
            table = source.df[["label"]].assign(geometry=shapely.to_wkb(source._shapes))
            fileio.write_table(Path(folder) / entry["polygons"], table)
        else:
            entry |= {"offset_xy": list(source.offset_xy), "zeros": source.zeros}
        entries.append(entry)
    table = next(iter(labels.values())).classes
    classes = {
        "names": list(table.names), "values": dict(table.values), "ignored": table.ignored
    }  # fmt: skip
    fileio.write_json(Path(folder) / "labels.json", {"classes": classes, "labels": entries})


def load_labels(
    folder: Path, rasters: Mapping[str, fileio.Raster]
) -> dict[str, PolygonLabels | MaskLabels]:
    """Read the labels that `save_labels` wrote, for the same rasters."""
    known = json.loads((Path(folder) / "labels.json").read_text(encoding="utf-8"))
    classes = known["classes"]
    labels = {}
    for entry in known["labels"]:
        values = entry.get("values", classes["values"])  # rasters may name them otherwise
        table = ClassTable(tuple(classes["names"]), values, classes["ignored"])
        path, raster = Path(entry["path"]), rasters[entry["raster"]]
        common = (path, raster, table, entry["mask_reference"], entry["counts"])
        if "polygons" in entry:
            df = pd.read_parquet(Path(folder) / entry["polygons"])
            df = geometries.with_geometry(df, shapely.from_wkb(df["geometry"].to_numpy()))
            source = PolygonLabels(*common, df, entry["attribute"], df.iloc[:0])
        else:
            offset = tuple(entry["offset_xy"])
            source = MaskLabels(*common, _on_grid(path, raster), offset, entry["zeros"])
        labels[entry["raster"]] = source
    return labels


def empty_table() -> pd.DataFrame:
    """Return the table of objects of a raster whose labels are a mask."""
    df = pd.DataFrame({name: pd.Series(dtype="float64") for name in fileio.PIXEL_COLUMNS})
    return df.assign(label=pd.Series(dtype=object), geometry=pd.Series(dtype=object))


# ---------------------------------------------------------------------------------------------
# Auxiliary bands
# ---------------------------------------------------------------------------------------------


def with_auxiliary_bands(raster: fileio.Raster, options: AuxiliaryOptions | None) -> fileio.Raster:
    """Return a raster that reads with auxiliary bands after its own, all in float32.

    Args:
        raster: The raster.
        options: Which bands; None: none, the raster stays as it is.

    Raises:
        InputError: The vector file cannot be used, or holds none of the shapes.
    """
    if options is None:
        return raster
    shapes, steps = np.empty(0, dtype=object), np.eye(2)
    if options.aux_vector_file is not None:
        shapes = _read_chosen(raster, options)
        if options.aux_vector_unit == "m":
            (steps,) = raster.metres_per_pixel(np.array([[raster.width / 2, raster.height / 2]]))
    bands = AuxiliaryBands(options, shapes, steps, (raster.width, raster.height))
    own = {field.name: getattr(raster, field.name) for field in fields(fileio.Raster)}
    last = max(raster.bands)
    own |= {
        "bands": (*raster.bands, *range(last + 1, last + 1 + bands.count)), "dtype": "float32",
        "band_count": raster.band_count + bands.count,
        "nodata": (*raster.nodata, *[None] * bands.count),
    }  # fmt: skip
    return AuxiliaryRaster(**own, base=raster, auxiliary=bands)


def auxiliary_of(raster: fileio.Raster) -> AuxiliaryOptions | None:
    """Return which auxiliary bands a raster has; None: none."""
    return raster.auxiliary.options if isinstance(raster, AuxiliaryRaster) else None


def _read_chosen(raster: fileio.Raster, options: AuxiliaryOptions) -> np.ndarray:
    path = Path(options.aux_vector_file)
    df, _ = annotations.read_shapes(
        path, raster, coordinates=options.aux_vector_coordinates, layer=options.aux_vector_layer
    )
    if options.aux_vector_attrib is not None:
        if options.aux_vector_attrib not in df.columns:
            columns = [name for name in df.columns if name != "geometry"]
            close = difflib.get_close_matches(options.aux_vector_attrib, columns, n=1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(
                f"{path} has no attribute {options.aux_vector_attrib!r}, only {columns}{meant}"
            )
        if options.aux_vector_ids is not None:
            found = df[options.aux_vector_attrib].map(text_of, na_action="ignore")
            df = df[found.isin([text_of(value) for value in options.aux_vector_ids])]
            if df.empty:
                raise InputError(
                    f"no shape of {path} has {options.aux_vector_attrib} in "
                    f"{list(options.aux_vector_ids)}, there are "
                    f"{found.dropna().unique()[:SHOWN].tolist()}"
                )
    if df.empty:
        raise InputError(f"{path} holds no shape that can be placed on {raster.path}")
    shapes = shapely.get_parts(df["geometry"].to_numpy(dtype=object))
    return shapely.transform(shapes, lambda xy: np.round(xy * SNAP) / SNAP)


CELL = 16  # px; side of the cells of a window whose pixels share the shapes that may be nearest
SLACK = 1e-6  # px, or m; more than rounding can move a distance


@dataclass(frozen=True)
class AuxiliaryBands:
    """Bands made of shapes, exact in every window, and of the place of a pixel.

    Attributes:
        options: Which.
        shapes: Polygons, lines and points (px).
        steps: What a step of 1 px in x, and in y, is in the unit of distances: columns of (2, 2).
        size_xy: Width and height of the raster, px.
    """

    options: AuxiliaryOptions
    shapes: np.ndarray
    steps: np.ndarray
    size_xy: tuple[int, int]

    @property
    def count(self) -> int:
        """Number of bands."""
        return self.options.count

    @property
    def made_from(self) -> dict[str, object]:
        """What they depend on, for manifests."""
        shapes = shapely.to_wkb(self.shapes, hex=True).tolist()
        options = asdict(self.options) | {"aux_vector_file": None}  # its shapes, wherever it lies
        return {"options": options, "shapes": fileio.fingerprint(shapes)}

    def __getstate__(self) -> dict[str, object]:
        """Leave out what each process builds for itself."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def read(self, window: Window, shape_hw: tuple[int, int] | None = None) -> np.ndarray:
        """Compute the bands of a window, float32 (bands, H, W), at the centres of pixels.

        Args:
            window: The window; distances and places are known off the raster, too.
            shape_hw: Rows and columns of the result, if not the window's own.
        """
        height, width = shape_hw or (window.height, window.width)
        x = window.x + (np.arange(width) + 0.5) * (window.width / width)
        y = window.y + (np.arange(height) + 0.5) * (window.height / height)
        bands = []
        if self.options.aux_vector_file is not None:
            bands.append(self._vector_band(x, y))
        if self.options.coordconv_convert:
            factor = self.options.coordconv_scale
            along = [
                (2 * p / side - 1) * factor for p, side in zip((x, y), self.size_xy, strict=True)
            ]
            bands.append(np.broadcast_to(along[0], (height, width)))
            bands.append(np.broadcast_to(along[1][:, None], (height, width)))
        return np.stack(bands).astype("float32")

    def _vector_band(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        inside = self._paint(x, y)
        if not self.options.aux_vector_dist_maps:
            return inside * self.options.aux_vector_scale
        away = np.where(inside, 0.0, self._distances(x, y))
        away = np.log1p(away) if self.options.aux_vector_dist_log else away
        return away * self.options.aux_vector_scale

    # -- what the pixels lie in -----------------------------------------------------------------

    @cached_property
    def _kinds(self) -> np.ndarray:
        return shapely.get_dimensions(self.shapes)

    @cached_property
    def _tree(self) -> shapely.STRtree:
        return shapely.STRtree(self.shapes)

    def _paint(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Tell which pixels, by the places (px) of their columns and rows, lie in a shape."""
        step_x, step_y = _step(x), _step(y)
        left, top = x[0] - step_x / 2, y[0] - step_y / 2
        right, bottom = x[-1] + step_x / 2, y[-1] + step_y / 2
        here = np.sort(self._tree.query(shapely.box(left - 1, top - 1, right + 1, bottom + 1)))
        mask = np.zeros((len(y), len(x)), dtype="uint8")
        polygons = self.shapes[here[self._kinds[here] == 2]]
        if len(polygons):
            place = rasterio.Affine(step_x, 0, left, 0, step_y, top)
            rasterio.features.rasterize(polygons, out=mask, transform=place, default_value=1)
        painted = mask > 0
        if not self.options.aux_vector_dist_maps:
            self._paint_points(painted, self.shapes[here[self._kinds[here] == 0]], x, y)
            self._paint_lines(painted, x, y)
        return painted

    @staticmethod
    def _paint_points(
        painted: np.ndarray, points: np.ndarray, x: np.ndarray, y: np.ndarray
    ) -> None:
        """Paint points into the pixels that hold them."""
        xy = shapely.get_coordinates(points)
        cols = np.floor((xy[:, 0] - x[0]) / _step(x) + 0.5).astype(int)
        rows = np.floor((xy[:, 1] - y[0]) / _step(y) + 0.5).astype(int)
        inside = (cols >= 0) & (cols < len(x)) & (rows >= 0) & (rows < len(y))
        painted[rows[inside], cols[inside]] = True

    @cached_property
    def _lines(self) -> tuple[np.ndarray, np.ndarray, shapely.STRtree]:
        return _tree_of(*_segments_of(self.shapes[self._kinds == 1]))

    def _paint_lines(self, painted: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
        """Paint lines into the pixels whose centre is at most half a pixel away."""
        start, end, tree = self._lines
        reach = 0.5 * max(_step(x), _step(y))
        for rows, cols in _cells(len(y), len(x)):
            low, high = [x[cols][0], y[rows][0]], [x[cols][-1], y[rows][-1]]
            some = tree.query(shapely.box(*np.subtract(low, reach), *np.add(high, reach)))
            if len(some):
                grid = np.stack(np.meshgrid(x[cols], y[rows]), axis=-1)
                near = _nearest_distance(grid.reshape(-1, 2), start[some], end[some])
                painted[rows, cols] |= near.reshape(grid.shape[:2]) <= reach

    # -- how far the nearest shape is -----------------------------------------------------------

    @cached_property
    def _segments(self) -> tuple[np.ndarray, np.ndarray, shapely.STRtree]:
        """Both ends (N, 2) of all segments, in the unit of distances, and a tree of them."""
        return _tree_of(*(ends @ self.steps.T for ends in _segments_of(self.shapes)))

    def _distances(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the distance (H, W) of pixels to the nearest outline, line or point.

        What is nearest to a pixel is at most as far from its cell's centre as what is nearest to
        that, and the cell's diameter more.
        """
        start, end, tree = self._segments
        away = np.empty((len(y), len(x)))
        for rows, cols in _cells(len(y), len(x)):
            grid = np.stack(np.meshgrid(x[cols], y[rows]), axis=-1)
            points = grid.reshape(-1, 2) @ self.steps.T
            middle = points.mean(axis=0)
            radius = np.hypot(*(points - middle).T).max()
            center = shapely.points(*middle)
            _, nearest = tree.query_nearest(center, return_distance=True, all_matches=False)
            reach = nearest[0] + 2 * radius + SLACK
            some = tree.query(center, predicate="dwithin", distance=reach)
            near = _nearest_distance(points, start[some], end[some])
            away[rows, cols] = near.reshape(grid.shape[:2])
        return away


def _step(places: np.ndarray) -> float:
    return places[1] - places[0] if len(places) > 1 else 1.0


def _cells(height: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Yield the rows and columns of the cells of a window."""
    for top in range(0, height, CELL):
        for left in range(0, width, CELL):
            yield slice(top, top + CELL), slice(left, left + CELL)


def _tree_of(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray, shapely.STRtree]:
    return start, end, shapely.STRtree(shapely.linestrings(np.stack([start, end], axis=1)))


def _segments_of(shapes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both ends (N, 2) of the segments of outlines and lines; of a point they are one."""
    thin = np.concatenate([shapely.get_rings(shapes), shapes[shapely.get_dimensions(shapes) < 2]])
    xy, of = shapely.get_coordinates(thin, return_index=True)
    joined = np.flatnonzero(of[1:] == of[:-1])
    single = np.flatnonzero(np.bincount(of, minlength=len(thin))[of] == 1)
    return (
        np.concatenate([xy[joined], xy[single]]),
        np.concatenate([xy[joined + 1], xy[single]]),
    )


def _nearest_distance(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Return the distance of points (P, 2) to the nearest of segments, (P,)."""
    along = end - start
    length = np.maximum((along**2).sum(axis=1), np.finfo(float).tiny)
    best = np.full(len(points), np.inf)
    step = max(1, 2**20 // len(points))  # segments at once, so that memory stays small
    for first in range(0, len(start), step):
        a, d, n = (part[first : first + step] for part in (start, along, length))
        to = points[:, None] - a
        share = ((to * d).sum(axis=2) / n).clip(0, 1)
        rest = to - share[..., None] * d
        best = np.minimum(best, np.sqrt((rest**2).sum(axis=2)).min(axis=1))
    return best


@dataclass(frozen=True)
class AuxiliaryRaster(fileio.Raster):
    """A raster with auxiliary bands behind its own; it reads, and is read, like any other.

    Attributes:
        base: The raster itself.
        auxiliary: The further bands.
    """

    base: fileio.Raster | None = None
    auxiliary: AuxiliaryBands | None = None

    @property
    def own(self) -> fileio.Raster:
        """See `fileio.Raster.own`."""
        return self.base

    @property
    def made_from(self) -> dict[str, object]:
        """See `fileio.Raster.made_from`."""
        return super().made_from | {"auxiliary": self.auxiliary.made_from}

    @property
    def all_counted(self) -> bool:
        """See `fileio.Raster.all_counted`; the further bands are known everywhere."""
        return self.base.all_counted

    def with_regions(self, regions: fileio.Regions | None) -> AuxiliaryRaster:
        """Return a handle to the same whose ground counts in these regions only."""
        return replace(self, regions=regions, base=self.base.with_regions(regions))

    def read(self, window: Window) -> np.ndarray:
        """Read a window as float32 (bands, height, width), the auxiliary bands last."""
        own = self.base.read(window).astype("float32")
        return np.concatenate([own, self.auxiliary.read(window)])

    def read_valid(self, window: Window, image: np.ndarray) -> np.ndarray:
        """See `fileio.Raster.read_valid`; the raster's own bands tell."""
        own = image[: len(self.base.bands)]
        if np.can_cast(self.base.dtype, "float32"):
            return self.base.read_valid(window, own.astype(self.base.dtype))
        return self.base.read_valid(window, self.base.read(window))  # float32 blurs nodata

    def may_count(self, windows: np.ndarray) -> np.ndarray:
        """See `fileio.Raster.may_count`."""
        return self.base.may_count(windows)

    def read_decimated(
        self, window: Window, shape_hw: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `fileio.Raster.read_decimated`; the auxiliary bands are those of the centres."""
        image, valid = self.base.read_decimated(window, shape_hw)
        further = self.auxiliary.read(window, shape_hw)
        return np.concatenate([image.astype("float32"), further]), valid

    @cached_property
    def overviews(self) -> tuple[int, ...]:
        """See `fileio.Raster.overviews`."""
        return self.base.overviews
