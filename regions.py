"""The connected regions of a class map, as polygons, and those where it is wrong.

A map may come some rows at a time: what ends within the rows that have come is finished; what
touches their lower edge waits for the rows below. So memory depends on the regions that are open,
never on the raster.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import rasterio.features
import shapely
from rasterio import Affine

from ImageData import BOX_COLUMNS, CENTER_COLUMNS, IGNORE

ERROR_KINDS = ("missed", "spurious", "confused")
MOST_VERTICES = 2**17  # of all open regions together; the largest are cut where there are more


@dataclass
class _Open:
    """A region that may go on below."""

    value: int
    pieces: list[shapely.Geometry] = field(default_factory=list)
    area: int = 0
    total: float = 0.0  # of the probabilities of its pixels
    vertices: int = 0
    cut: bool = False  # whether there is more of it elsewhere

    def take(self, other: _Open) -> None:
        self.pieces += other.pieces
        self.area += other.area
        self.total += other.total
        self.vertices += other.vertices
        self.cut |= other.cut


class RegionFront:
    """Joins the regions of rows that come from top to bottom; pixels that share a side connect.

    Regions that would fill the memory, such as a background full of holes, are cut: what has come
    of them is complete, and the rest is a region of its own.

    Args:
        labels: Of the classes, by class id.
        wanted: Class ids whose regions count.
        least_area: Smaller regions are left out, px.
    """

    def __init__(self, labels: Sequence[str], wanted: Iterable[int], least_area: int = 1) -> None:
        """Start without rows."""
        self.labels, self.least_area = tuple(labels), least_area
        self.wanted = np.isin(np.arange(256), list(wanted))
        self.top = 0
        self.open: dict[int, _Open] = {}
        self.edge: np.ndarray | None = None  # of the last row: numbers of open regions, or -1

    def push(
        self, classes: np.ndarray, probabilities: np.ndarray, *, last: bool = False
    ) -> pd.DataFrame:
        """Take the next rows; return the regions that are complete by now.

        Args:
            classes: uint8 (H, W), class ids.
            probabilities: float32 (H, W), of those classes.
            last: Whether no rows follow.

        Returns:
            `label, area_px, mean_probability, cut` (whether it is a part of a larger region),
            `xmin, ymin, xmax, ymax` and `geometry`, in px.
        """
        numbers, found = self._find(classes, probabilities)
        regions = dict(enumerate(found))
        root, known = list(range(len(found))), {}  # known: number of an open region -> the one here
        if self.edge is not None:
            for old, region in self.open.items():
                known[old] = len(root)
                regions[len(root)] = region
                root.append(len(root))
            both = (self.edge >= 0) & (numbers[0] >= 0)
            pairs = np.stack([self.edge[both], numbers[0][both]], axis=1)
            for old, new in np.unique(pairs, axis=0).tolist():
                if self.open[old].value == found[new].value:
                    _unite(root, known[old], new)
        joined: dict[int, _Open] = {}
        for number, region in regions.items():
            into = _root(root, number)
            joined.setdefault(into, _Open(region.value)).take(region)
        going_on = [] if last else np.unique(numbers[-1][numbers[-1] >= 0]).tolist()
        still = {_root(root, number) for number in going_on}
        self.open = {number: joined[number] for number in still}
        names = np.array([_root(root, i) for i in range(len(found))], dtype=np.int64)
        self.edge = np.append(names, -1)[numbers[-1]]
        self.top += len(classes)
        complete = [joined[n] for n in sorted(joined) if n not in still]
        return self._to_table(complete + self._cut_largest())

    def _cut_largest(self) -> list[_Open]:
        """Complete the largest open regions until the others are small enough together."""
        cut, held = [], sum(region.vertices for region in self.open.values())
        if held > MOST_VERTICES:
            by_size = sorted(self.open, key=lambda number: -self.open[number].vertices)
            for number in by_size:
                if held <= MOST_VERTICES // 2:
                    break
                region = self.open[number]
                region.cut = True
                held -= region.vertices
                cut.append(region)
                self.open[number] = _Open(region.value, cut=True)
        return cut

    def _find(
        self, classes: np.ndarray, probabilities: np.ndarray
    ) -> tuple[np.ndarray, list[_Open]]:
        """Return which region of these rows each pixel belongs to (-1: none), and the regions."""
        mask = self.wanted[classes]
        numbers, shapes = number_regions(classes, mask, (0, self.top))
        if not shapes:
            return numbers, []
        flat, count = numbers[mask], len(shapes)
        areas = np.bincount(flat, minlength=count).tolist()
        totals = np.bincount(flat, weights=probabilities[mask], minlength=count).tolist()
        return numbers, [
            _Open(
                int(value), [shapely.geometry.shape(shape)], area, total,
                vertices=sum(map(len, shape["coordinates"])),
            )
            for (shape, value), area, total in zip(shapes, areas, totals, strict=True)
        ]  # fmt: skip

    def _to_table(self, regions: Sequence[_Open]) -> pd.DataFrame:
        regions = [
            region for region in regions
            if region.area and (region.cut or region.area >= self.least_area)
        ]  # fmt: skip
        shapes = [
            # where pieces met, corners that bend nothing are left
            region.pieces[0] if len(region.pieces) == 1
            else shapely.simplify(shapely.union_all(region.pieces), 0)
            for region in regions
        ]  # fmt: skip
        area = np.array([region.area for region in regions], dtype=np.int64)
        total = np.array([region.total for region in regions])
        bounds = shapely.bounds(np.array(shapes, dtype=object)).reshape(-1, 4)
        return pd.DataFrame(
            {
                "label": [self.labels[region.value] for region in regions],
                "area_px": area, "mean_probability": (total / area.clip(1)).round(4),
                "cut": np.array([region.cut for region in regions], dtype=bool),
                **dict(zip(BOX_COLUMNS, bounds.T, strict=True)),
                "geometry": np.array(shapes, dtype=object),
            }
        )  # fmt: skip


def number_regions(
    values: np.ndarray, mask: np.ndarray, corner_xy: tuple[int, int] = (0, 0)
) -> tuple[np.ndarray, list[tuple[dict, float]]]:
    """Number the connected regions of equal values; pixels that share a side connect.

    Args:
        values: uint8 or uint16 (H, W).
        mask: bool (H, W), the pixels that count.
        corner_xy: Column and row of the first pixel, px.

    Returns:
        int32 (H, W), the number of each pixel's region, -1 for none; and of each region its outline
        (px, as GeoJSON) and value.
    """
    place = Affine.translation(*corner_xy)
    shapes = list(rasterio.features.shapes(values, mask=mask, connectivity=4, transform=place))
    numbers = np.full(values.shape, -1, dtype=np.int32)
    if shapes:
        rasterio.features.rasterize(
            ((shape, number) for number, (shape, _) in enumerate(shapes)), out=numbers,
            transform=place,
        )  # fmt: skip
    return numbers, shapes


def find_errors(
    truth: np.ndarray,
    found: np.ndarray,
    labels: Sequence[str],
    background: int | None,
    corner_xy: tuple[int, int] = (0, 0),
) -> pd.DataFrame:
    """List where a class map is wrong: each connected region of one true and one found class.

    missed: the true class was taken for background. spurious: background was taken for a class.
    confused: one class was taken for another. The areas of all add up to the pixels that are wrong.

    Args:
        truth: uint8 (H, W), class ids; `IGNORE` does not count.
        found: The same, of a model.
        labels: Names of the classes, by class id.
        background: Class id of the background; None: there is none, all errors are `confused`.
        corner_xy: Column and row of the first pixel, px.

    Returns:
        By kind and falling area: `kind` (categorical, of `ERROR_KINDS`); `label` that was found, of
        what is missed its own; `true_label`; `area_px`; `share_wrong`, of the connected region of
        the true class that it lies in (of what is spurious: of the found class) the share that is
        wrong in whatever way: 1 where all of it is; `pixel_x, pixel_y`, a place in it, `xmin, ymin,
        xmax, ymax` and `geometry`, px.
    """
    known = (truth != IGNORE) & (found != IGNORE)
    wrong = known & (truth != found)
    pairs = truth.astype(np.uint16) * 256 + found
    numbers, shapes = number_regions(pairs, wrong, corner_xy)
    of_pair = np.array([value for _, value in shapes], dtype=np.int64)
    true, seen = of_pair // 256, of_pair % 256
    place = np.flatnonzero(wrong)
    inside = np.zeros(len(shapes), dtype=np.int64)  # a pixel of each
    inside[numbers.flat[place]] = place
    share = _wrong_shares(truth, known, wrong)[inside]
    spurious, missed = true == background, seen == background
    share = np.where(spurious, _wrong_shares(found, known, wrong)[inside], share)
    polygons = np.array([shapely.geometry.shape(shape) for shape, _ in shapes], dtype=object)
    centers = shapely.get_coordinates(shapely.point_on_surface(polygons)).reshape(-1, 2)
    names = np.asarray(labels, dtype=object)
    errors = pd.DataFrame(
        {
            "kind": pd.Categorical(
                np.select([missed, spurious], ERROR_KINDS[:2], ERROR_KINDS[2]), ERROR_KINDS
            ),
            "label": names[np.where(missed, true, seen)], "true_label": names[true],
            "area_px": np.bincount(numbers[wrong], minlength=len(shapes)), "share_wrong": share,
            **dict(zip(CENTER_COLUMNS, centers.T, strict=True)),
            **dict(zip(BOX_COLUMNS, shapely.bounds(polygons).reshape(-1, 4).T, strict=True)),
            "geometry": polygons,
        }
    )  # fmt: skip
    return sort_errors(errors)


def sort_errors(errors: pd.DataFrame) -> pd.DataFrame:
    """Order errors by kind and falling area."""
    return errors.sort_values(["kind", "area_px"], ascending=[True, False], ignore_index=True)


def _wrong_shares(classes: np.ndarray, known: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Return of each pixel (N,) which share of its region is wrong, NaN where nothing is known."""
    numbers, shapes = number_regions(classes, known)
    area = np.bincount(numbers[known], minlength=len(shapes))
    return np.append(
        np.bincount(numbers[wrong], minlength=len(shapes)) / area.clip(1), np.nan
    )[numbers.ravel()]  # fmt: skip


def count_errors(errors: pd.DataFrame) -> pd.DataFrame:
    """Sum errors, px: a row for each kind, a column for each label, all, and how many there are."""
    table = errors.pivot_table(
        index="kind", columns="label", values="area_px", aggfunc="sum", observed=False, fill_value=0
    ).reindex(pd.Index(ERROR_KINDS, name="kind"), fill_value=0)
    number = errors["kind"].value_counts().reindex(ERROR_KINDS, fill_value=0)
    return table.assign(**{"(all)": table.sum(axis=1), "(regions)": number.to_numpy()})


def _root(root: list[int], number: int) -> int:
    while root[number] != number:
        root[number] = root[root[number]]
        number = root[number]
    return number


def _unite(root: list[int], one: int, other: int) -> None:
    one, other = sorted((_root(root, one), _root(root, other)))
    root[other] = one
