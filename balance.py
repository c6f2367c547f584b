"""How even classes are in the training tiles, and which thresholds make them most even.

Nothing is read but the tile index, which has the pixels per class of every tile. The search looks
at all combinations of thresholds on a grid at once, so that what it finds is the best of them.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

import fileio
import tiling
from ImageData import ClassNames, InputError
from masks import ClassTable

log = logging.getLogger(__name__)

METHODS = ("min_annotated", "class_proportion")
STEPS = (1, 2, 2.5, 4, 5, 10, 20, 25, 50)  # percent, between thresholds that are tried
MAX_NUMBERS = 12_000_000  # held at once by a search, 8 bytes each
MIN_KEPT = 10.0  # percent of the tiles


@dataclass(frozen=True)
class Balance:
    """Class shares of the training tiles, all of them and those that thresholds keep.

    Attributes:
        shares: One row per class: `class_id, name, px, percent` over all tiles, `kept_px,
            kept_percent` over those kept.
        min_annotated: Threshold, see `tiling.TilingOptions`.
        class_proportion: Likewise.
        tiles: Number of tiles.
        kept: Of those that are kept.
        step: Percent between the thresholds that a search tried; None: none was made.
        curve: Of a search, the best trade-offs, most tiles first: `kept, kept_percent, std` and the
            thresholds, `min_annotated` and `class_<id>` in percent. Whatever keeps more tiles than
            one of them is less even.
    """

    shares: pd.DataFrame
    min_annotated: float
    class_proportion: Mapping[int, float]
    tiles: int
    kept: int
    step: float | None = None
    curve: pd.DataFrame | None = None

    @property
    def std(self) -> float:
        """Standard deviation of the class shares of all tiles, percent."""
        return float(self.shares["percent"].std(ddof=0))

    @property
    def kept_std(self) -> float:
        """The same of the tiles kept."""
        return float(self.shares["kept_percent"].std(ddof=0))

    def report(self) -> str:
        """Tell all of it in a few lines."""
        table = self.shares[["class_id", "name", "percent", "kept_percent"]]
        found: dict[str, object] = {"min_annotated": self.min_annotated}
        found["class_proportion"] = {i: float(v) for i, v in self.class_proportion.items()}
        lines = [
            f"{self.tiles} training tiles, {self.kept} kept with {found}",
            f"standard deviation of the class shares: {self.std:.2f} % of all, "
            f"{self.kept_std:.2f} % of those kept",
            table.to_string(index=False, float_format=lambda value: f"{value:.2f}"),
        ]
        if self.step is not None:
            lines.insert(1, f"the best of all thresholds that are multiples of {self.step:g} %")
        return "\n".join(lines) + "\n"


def read_shares(directory: Path) -> tuple[pd.DataFrame, ClassTable]:
    """Read the tiles of an index whose classes are to be balanced, and the table of classes.

    These are the training tiles, each once, with any label, which no filter has rejected;
    thresholds that the index was made with are forgotten.

    Args:
        directory: A folder `tiling_<size>`, or one that holds a single such folder.

    Raises:
        InputError: There is no index there, or it is not one of masks.
    """
    directory = Path(directory)
    if not (directory / tiling.TILES_NAME).exists():
        inner = sorted(path.parent for path in directory.glob(f"tiling_*/{tiling.TILES_NAME}"))
        if len(inner) != 1:
            raise InputError(f"{directory} holds {len(inner)} tile indexes; name the folder of one")
        directory = inner[0]
    tiles = pd.read_parquet(directory / tiling.TILES_NAME)
    if "class_0" not in tiles.columns:
        raise InputError(
            f"the tiles of {directory} have boxes, no classes of pixels; make them anew"
        )
    under = tiles["reason"].str.contains(f"{tiling.UNDER_ANNOTATED}|{tiling.UNDER_PROPORTION}")
    mine = (tiles["split"] == "train") & (tiles["angle"] == 0) & (tiles["kept"] | under)
    tiles = tiles[mine & (tiling.counts_of(tiles).sum(axis=1) > 0)]
    return tiles.reset_index(drop=True), ClassTable.load(directory / tiling.CLASSES_NAME)


def write_shares(path: Path, tiles: pd.DataFrame, classes: ClassNames) -> Path:
    """Write what percent of each tile each class has, as a table (CSV)."""
    counts, areas = tiling.counts_of(tiles), _areas(tiles)
    annotated, shares = tiling.shares_of(counts, areas, classes.background)
    table = tiles[["raster", "split", *tiling.WINDOW_COLUMNS]].assign(annotated=annotated)
    table[list(classes.names)] = shares
    return fileio.write_table(path, table)


def preview(
    tiles: pd.DataFrame,
    classes: ClassNames,
    min_annotated: float = 0.0,
    class_proportion: Mapping[int, float] | None = None,
) -> Balance:
    """Tell what thresholds would do, without making tiles.

    Args:
        tiles: See `read_shares`.
        classes: Their classes.
        min_annotated: See `tiling.TilingOptions`.
        class_proportion: Likewise.
    """
    proportion = dict(class_proportion or {})
    tiling.check_thresholds(len(classes.names), min_annotated, proportion)
    counts = tiling.counts_of(tiles)
    annotated, shares = tiling.shares_of(counts, _areas(tiles), classes.background)
    keep = annotated >= min_annotated
    for i, least in proportion.items():
        keep &= shares[:, i] >= least
    table = pd.DataFrame({"class_id": range(len(classes.names)), "name": classes.names})
    for prefix, part in (("", counts), ("kept_", counts[keep])):
        px = part.sum(axis=0)
        table[f"{prefix}px"] = px
        table[f"{prefix}percent"] = 100 * px / max(px.sum(), 1)
    return Balance(table, float(min_annotated), proportion, len(tiles), int(keep.sum()))


def balance(
    tiles: pd.DataFrame,
    classes: ClassNames,
    *,
    methods: Collection[str] = METHODS,
    class_ids: Sequence[int] | None = None,
    min_kept: float = MIN_KEPT,
    step: float | None = None,
) -> Balance:
    """Find the thresholds that make the classes of the kept tiles most even.

    The standard deviation of the class shares is least over all combinations of thresholds that are
    multiples of a step. Of those that are equally even, the one that keeps most tiles is taken.

    Args:
        tiles: See `read_shares`.
        classes: Their classes.
        methods: Which thresholds to search: "min_annotated", "class_proportion" or both.
        class_ids: Classes that may have a threshold; None: all but the background.
        min_kept: Least percent of the tiles to keep; else one even tile would be best.
        step: Percent between thresholds; None: 1, or more where that makes too many combinations.

    Raises:
        InputError: There are no tiles, or more combinations than memory should hold.
    """
    if strangers := set(methods) - set(METHODS):
        raise InputError(f"sampling_method is any of {list(METHODS)}, got {sorted(strangers)}")
    if tiles.empty or not methods:
        raise InputError("there is nothing to balance: no training tile has a label, or no method")
    counts = tiling.counts_of(tiles)
    annotated, shares = tiling.shares_of(counts, _areas(tiles), classes.background)
    names, values = [], []
    if "min_annotated" in methods:
        names.append("min_annotated")
        values.append(annotated)
    if "class_proportion" in methods:
        others = [i for i in range(len(classes.names)) if i != classes.background]
        chosen = others if class_ids is None else list(class_ids)
        tiling.check_thresholds(len(classes.names), 0.0, dict.fromkeys(chosen, 0.0))
        names += [f"class_{i}" for i in chosen]
        values += [shares[:, i] for i in chosen]
    step = _choose_step(values, counts.shape[1], step)
    sums = _sum_above([np.floor(v / step + 1e-12).astype(int) for v in values], counts)
    curve = _trade_offs(sums, names, step, len(tiles))
    least = min_kept / 100 * len(tiles)
    best = curve[curve["kept"] >= least].iloc[-1]  # the most even that keeps enough
    found = preview(
        tiles, classes, best.get("min_annotated", 0.0),
        {int(n.removeprefix("class_")): float(best[n]) for n in names
         if n != "min_annotated" and best[n]},
    )  # fmt: skip
    log.info(
        "thresholds of %s: std of class shares %.2f %%, before %.2f %%; %d of %d tiles kept",
        names, found.kept_std, found.std, found.kept, found.tiles,
    )  # fmt: skip
    return Balance(**{**vars(found), "step": step, "curve": curve})


def _areas(tiles: pd.DataFrame) -> np.ndarray:
    return (tiles["width"] * tiles["height"]).to_numpy()


def _choose_step(values: Sequence[np.ndarray], count: int, step: float | None) -> float:
    for candidate in STEPS if step is None else (step,):
        cells = np.prod([np.floor(v.max() / candidate) + 1 for v in values])
        if cells * (count + 1) <= MAX_NUMBERS:
            return candidate
    raise InputError(
        f"thresholds of {len(values)} kinds make {cells:.3g} combinations even in steps of "
        f"{candidate} %; search fewer classes at once (class_ids), or in larger steps"
    )


def _sum_above(places: Sequence[np.ndarray], counts: np.ndarray) -> np.ndarray:
    """Sum tiles, and their px per class, that reach each combination of thresholds.

    Args:
        places: Per kind of threshold, int (N,), the highest that each tile reaches.
        counts: (N, C).

    Returns:
        float64 (1 + C, *thresholds): tiles, and px per class.
    """
    shape = tuple(place.max() + 1 for place in places)
    flat = np.ravel_multi_index(tuple(places), shape)
    weights = [np.ones(len(counts)), *counts.T]
    sums = np.stack([np.bincount(flat, w, int(np.prod(shape))).reshape(shape) for w in weights])
    for axis in range(1, sums.ndim):
        np.cumsum(np.flip(sums, axis), axis=axis, out=np.flip(sums, axis))
    return sums


def _trade_offs(sums: np.ndarray, names: Sequence[str], step: float, total: int) -> pd.DataFrame:
    """Return the combinations of which none other keeps as many tiles and is as even."""
    shape, count = sums.shape[1:], sums.shape[0] - 1
    sums = sums.reshape(count + 1, -1)
    there = np.flatnonzero(sums[0] > 0)
    kept, px = sums[0, there], sums[1:, there]
    std = np.round(100 * np.std(px / px.sum(axis=0), axis=0), 9)
    order = np.lexsort((there, std, -kept))  # low thresholds first, of those that do the same
    lowest = np.minimum.accumulate(std[order])
    first = np.concatenate([[True], lowest[1:] < lowest[:-1]])
    chosen = order[first]
    table = pd.DataFrame(
        {"kept": kept[chosen].astype(int), "kept_percent": 100 * kept[chosen] / total,
         "std": std[chosen]}
    )  # fmt: skip
    for name, place in zip(names, np.unravel_index(there[chosen], shape), strict=True):
        table[name] = np.round(place * step, 9)
    return table
