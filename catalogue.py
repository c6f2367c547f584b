"""The catalogue of a raster: each object once, on the map.

Detections come from overlapping tiles, strip by strip, from top to bottom. What two tiles report is
thinned out on a moving front, so that memory depends on what lies along one seam, never on the
raster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import rasterio
import shapely

import fileio
import imutils
from ImageData import BOX_COLUMNS, InputError

MAX_CELLS = 2**24  # of a density map, 64 MiB
OPEN, ALIVE, DEAD = 0, 1, 2  # what is known of a detection: nothing yet, it stays, it goes


@dataclass(frozen=True)
class Detections:
    """Detections on one raster.

    Attributes:
        boxes: float64 (N, 4), xyxy px of the raster.
        scores: float32 (N,), 0-1.
        ids: int64 (N,), class ids.
    """

    boxes: np.ndarray
    scores: np.ndarray
    ids: np.ndarray

    @classmethod
    def none(cls) -> Detections:
        """Return no detections."""
        return cls(np.empty((0, 4)), np.empty(0, np.float32), np.empty(0, np.int64))

    @classmethod
    def concatenate(cls, parts: Sequence[Detections]) -> Detections:
        """Join detections, in their order."""
        parts = [cls.none(), *parts]
        return cls(*(np.concatenate([getattr(p, n) for p in parts]) for n in vars(parts[0])))

    def __len__(self) -> int:
        """Return their number."""
        return len(self.scores)

    def __getitem__(self, rows: np.ndarray | slice) -> Detections:
        """Return those of some rows."""
        return Detections(self.boxes[rows], self.scores[rows], self.ids[rows])


class SeamFront:
    """Class-aware non-maximum suppression of detections that come strip by strip.

    The result is that of suppressing all of a raster's detections at once: one that overlaps a
    better one of its class goes, unless that one goes itself. A detection leaves the front as soon
    as nothing to come can change its fate.

    Args:
        iou_threshold: IoU above which the weaker of two detections of a class goes.
    """

    def __init__(self, iou_threshold: float) -> None:
        """Start without detections."""
        self.iou_threshold = iou_threshold
        self.open = Detections.none()

    def push(self, found: Detections, next_y: float) -> Detections:
        """Take what the next strip found; return what is certain by now, from top to bottom.

        Args:
            found: Its detections.
            next_y: No detection to come reaches above this row of the raster; infinity at the end.
        """
        d = Detections.concatenate([self.open, found])
        # ties are broken by place, so that the order of arrival does not matter
        d = d[np.lexsort((d.boxes[:, 0], d.boxes[:, 1], d.ids, -d.scores))]
        state = np.where(d.boxes[:, 3] > next_y, OPEN, ALIVE)
        for better, worse in _rivals(d, self.iou_threshold):
            # pairs come in the order of the better one, whose own fate is settled by then
            if state[better] == ALIVE:
                state[worse] = DEAD
            elif state[better] == OPEN and state[worse] == ALIVE:
                state[worse] = OPEN
        self.open = d[state == OPEN]
        certain = d[state == ALIVE]
        return certain[np.lexsort((certain.boxes[:, 0], certain.boxes[:, 1]))]


def _rivals(d: Detections, iou_threshold: float) -> list[tuple[int, int]]:
    """Return the pairs (better, worse) of a class that overlap; the best come first in `d`."""
    shapes = shapely.box(*d.boxes.T)
    first, second = shapely.STRtree(shapes).query(shapes)
    rivals = (first < second) & (d.ids[first] == d.ids[second])
    first, second = first[rivals], second[rivals]
    rivals = imutils.pair_iou(d.boxes[first], d.boxes[second]) > iou_threshold
    first, second = first[rivals], second[rivals]
    order = np.lexsort((second, first))
    return list(zip(first[order].tolist(), second[order].tolist(), strict=True))


def fuse_views(views: Sequence[Detections], iou_threshold: float) -> Detections:
    """Fuse what several views of the same ground show, by weighted box fusion.

    Detections of a class, best first, join the cluster whose fused box they overlap best, or found
    one of their own. A cluster's box is the mean of its members', weighted by their scores; its
    score their mean score times the share of the views that see it.

    Args:
        views: The detections of each view, in the same pixels.
        iou_threshold: IoU above which a detection joins a cluster.

    References:
        Solovyev et al. 2021, Weighted boxes fusion; all views weigh the same.
    """
    d = Detections.concatenate(views)
    d = d[np.argsort(-d.scores, kind="stable")]
    parts = []
    for label in np.unique(d.ids):
        mine = d[d.ids == label]
        shape = (len(mine), 4)  # as many clusters at most
        sums, fused, weights, members = np.zeros(shape), np.zeros(shape), *np.zeros((2, len(mine)))
        count = 0
        for box, score in zip(mine.boxes, mine.scores.astype(float), strict=True):
            iou = imutils.pair_iou(fused[:count], box)
            cluster = int(iou.argmax()) if count and iou.max() > iou_threshold else count
            count = max(count, cluster + 1)
            sums[cluster] += score * box
            weights[cluster] += score
            members[cluster] += 1
            fused[cluster] = sums[cluster] / weights[cluster]
        scores = weights[:count] / members[:count] * np.minimum(members[:count] / len(views), 1)
        parts.append(Detections(fused[:count], scores.astype(np.float32), np.full(count, label)))
    fused = Detections.concatenate(parts)
    return fused[np.argsort(-fused.scores, kind="stable")]


def to_table(found: Detections, labels: Sequence[str], raster: fileio.Raster) -> pd.DataFrame:
    """Describe detections in pixels and, where the raster has a CRS, on the map.

    Returns:
        `pixel_x, pixel_y, diameter, label, score, xmin, ymin, xmax, ymax`, in px to thousandths;
        the diameter is the box's longer side. With a CRS also the centre as `map_x, map_y` in its
        units; where the CRS lies on a globe, as `lon, lat` in degrees, and `diameter_m` in metres.
    """
    boxes = found.boxes.round(3)
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    diameter = (boxes[:, 2:] - boxes[:, :2]).max(axis=1, initial=0)
    df = pd.DataFrame(
        {
            "pixel_x": center[:, 0].round(4), "pixel_y": center[:, 1].round(4),
            "diameter": diameter.round(3), "label": np.asarray(labels, dtype=object)[found.ids],
            "score": found.scores.astype(float).round(6),
            **dict(zip(BOX_COLUMNS, boxes.T, strict=True)),
        }
    )  # fmt: skip
    if raster.crs is None:
        return df
    df[["map_x", "map_y"]] = raster.to_map(center)
    if raster.resolution is not None:
        place = raster.to_lonlat(center)
        df[["lon", "lat"]] = np.where(np.isfinite(place), place, np.nan)  # off the globe's limb
        steps = raster.metres_per_pixel(center)
        df["diameter_m"] = (diameter * np.sqrt(np.abs(np.linalg.det(steps)))).round(4)
    return df


class DensityMap:
    """Counts of objects per square cell of a raster.

    Args:
        raster: The raster.
        cell: Side of a cell, px, > 0.

    Raises:
        InputError: There would be more than `MAX_CELLS`.
    """

    def __init__(self, raster: fileio.Raster, cell: int) -> None:
        """Start with nothing counted."""
        rows, columns = -(-raster.height // cell), -(-raster.width // cell)
        if rows * columns > MAX_CELLS:
            least = int(np.ceil(np.sqrt(raster.width * raster.height / MAX_CELLS)))
            raise InputError(
                f"a density map of {raster.path} with cells of {cell} px has {columns} x {rows} "
                f"cells, at most {MAX_CELLS} are counted in memory; take cells of {least + 1} px"
            )
        self.raster, self.cell = raster, cell
        self.counts = np.zeros((rows, columns), np.uint32)

    def add(self, df: pd.DataFrame) -> None:
        """Count objects by `pixel_x, pixel_y`."""
        cells = df[["pixel_y", "pixel_x"]].to_numpy() // self.cell
        row, col = cells.astype(int).clip(0, np.array(self.counts.shape) - 1).T
        np.add.at(self.counts, (row, col), 1)

    def write(self, path: Path) -> Path:
        """Write the counts as a GeoTIFF of one band, on the map where the raster is."""
        transform = rasterio.Affine(*self.raster.transform) @ rasterio.Affine.scale(self.cell)
        place = {"crs": self.raster.crs, "transform": transform} if self.raster.crs else {}
        height, width = self.counts.shape
        with fileio.create_raster(
            path, width=width, height=height, count=1, dtype="uint32", **place
        ) as dst:
            dst.write(self.counts, 1)
            dst.set_band_description(1, f"objects per cell of {self.cell} px")
        return path
