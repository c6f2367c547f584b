"""The connected regions of a class map, as polygons, while the map comes some rows at a time.

What ends within the rows that have come is finished; what touches their lower edge waits for the
rows below. So memory depends on the regions that are open, never on the raster.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import rasterio.features
import shapely
from rasterio import Affine

from ImageData import BOX_COLUMNS


@dataclass
class _Open:
    """A region that may go on below."""

    value: int
    pieces: list[shapely.Geometry] = field(default_factory=list)
    area: int = 0
    total: float = 0.0  # of the probabilities of its pixels

    def take(self, other: _Open) -> None:
        self.pieces += other.pieces
        self.area += other.area
        self.total += other.total


class RegionFront:
    """Joins the regions of rows that come from top to bottom; pixels that share a side connect.

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
            `label, area_px, mean_probability, xmin, ymin, xmax, ymax` and `geometry`, in px.
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
        return self._to_table([joined[n] for n in sorted(joined) if n not in still])

    def _find(
        self, classes: np.ndarray, probabilities: np.ndarray
    ) -> tuple[np.ndarray, list[_Open]]:
        """Return which region of these rows each pixel belongs to (-1: none), and the regions."""
        place = Affine.translation(0, self.top)
        mask = self.wanted[classes]
        shapes = list(rasterio.features.shapes(classes, mask=mask, connectivity=4, transform=place))
        numbers = np.full(classes.shape, -1, dtype=np.int32)
        if not shapes:
            return numbers, []
        rasterio.features.rasterize(
            ((shape, number) for number, (shape, _) in enumerate(shapes)), out=numbers,
            transform=place,
        )  # fmt: skip
        flat, count = numbers[mask], len(shapes)
        areas = np.bincount(flat, minlength=count).tolist()
        totals = np.bincount(flat, weights=probabilities[mask], minlength=count).tolist()
        return numbers, [
            _Open(int(value), [shapely.geometry.shape(shape)], area, total)
            for (shape, value), area, total in zip(shapes, areas, totals, strict=True)
        ]

    def _to_table(self, regions: Sequence[_Open]) -> pd.DataFrame:
        regions = [region for region in regions if region.area >= self.least_area]
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
                **dict(zip(BOX_COLUMNS, bounds.T, strict=True)),
                "geometry": np.array(shapes, dtype=object),
            }
        )  # fmt: skip


def _root(root: list[int], number: int) -> int:
    while root[number] != number:
        root[number] = root[root[number]]
        number = root[number]
    return number


def _unite(root: list[int], one: int, other: int) -> None:
    one, other = sorted((_root(root, one), _root(root, other)))
    root[other] = one
