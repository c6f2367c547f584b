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
MAX_NUMBERS = 25_000_000  # held at once by a search, 8 bytes each
MIN_KEPT = 10.0  # percent of the tiles
FINEST = 1.0  # percent, between thresholds around the best


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
        step: Percent between the thresholds all of which a search tried, before it looked closer
            around the best; None: none was made.
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
            lines.insert(1, f"the best of all in steps of {self.step:g} %, then refined around it")
        return "\n".join(lines) + "\n"


def read_shares(directory: Path) -> tuple[pd.DataFrame, ClassTable]:
    """Read the tiles of an index whose classes are to be balanced, and the table of classes.

    These are the training tiles, each once, with any label, which nothing but a threshold of the
    index has left out. What a threshold left out no filter has looked at: it counts here, although
    an index without that threshold may lose it to a filter.

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
    finest: float = FINEST,
) -> Balance:
    """Find the thresholds that make the classes of the kept tiles most even.

    The standard deviation of the class shares is least over all combinations of thresholds that are
    multiples of a step. Of those that are equally even, the one that keeps most tiles is taken.
    Where the step is a large one, smaller ones are then tried around the best.

    Args:
        tiles: See `read_shares`.
        classes: Their classes.
        methods: Which thresholds to search: "min_annotated", "class_proportion" or both.
        class_ids: Classes that may have a threshold; None: all but the background.
        min_kept: Least percent of the tiles to keep; else one even tile would be best.
        step: Percent between thresholds; None: 1, or more where that makes too many combinations.
        finest: Percent between those that are tried around the best.

    Raises:
        InputError: There are no tiles, a percentage is none, or there are more combinations than
            memory should hold.
    """
    if strangers := set(methods) - set(METHODS):
        raise InputError(f"sampling_method is any of {list(METHODS)}, got {sorted(strangers)}")
    if tiles.empty or not methods:
        raise InputError("there is nothing to balance: no training tile has a label, or no method")
    if not 0 <= min_kept <= 100:
        raise InputError(f"min_kept must be a percentage of the tiles, 0 to 100, got {min_kept:g}")
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
    step, least = _choose_step(values, counts.shape[1], step), min_kept / 100 * len(tiles)
    curve, fine, low = pd.DataFrame(), step, np.zeros(len(values))
    high = np.array([v.max() for v in values])
    while True:
        some = _try_grid(values, counts, low, high, fine, names)
        curve = _front(pd.concat([curve, some], ignore_index=True))
        best = curve[curve["kept"] >= least].iloc[-1]  # the most even that keeps enough
        if fine <= finest:
            break
        low, high = (best[names].to_numpy(float) + sign * fine for sign in (-1, 1))
        fine, low = max(fine / 5, finest), np.maximum(low, 0)
        while not _fits(low, high, fine, counts.shape[1]):
            low, high = (low + (high - low) / 4, high - (high - low) / 4)  # nearer around the best
    curve.insert(1, "kept_percent", 100 * curve["kept"] / len(tiles))
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


def _fits(low: np.ndarray, high: np.ndarray, step: float, count: int) -> bool:
    cells = np.prod(np.floor((high - low) / step) + 1)
    return cells * (count + 1) <= MAX_NUMBERS


def _choose_step(values: Sequence[np.ndarray], count: int, step: float | None) -> float:
    high = np.array([v.max() for v in values])
    for candidate in STEPS if step is None else (step,):
        if _fits(np.zeros(len(values)), high, candidate, count):
            return candidate
    raise InputError(
        f"thresholds of {len(values)} kinds make too many combinations even in steps of "
        f"{candidate} %; search fewer classes at once (class_ids), or in larger steps"
    )


def _try_grid(
    values: Sequence[np.ndarray],
    counts: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    step: float,
    names: Sequence[str],
) -> pd.DataFrame:
    """Try all combinations of thresholds from `low` to `high` in steps; see `_front`."""
    places = []
    for v, start, end in zip(values, low, high, strict=True):
        place = np.floor((v - start) / step + 1e-9)
        places.append(place.clip(max=np.floor((end - start) / step + 1e-9)).astype(int))
    inside = np.all([place >= 0 for place in places], axis=0)
    if not inside.any():
        return pd.DataFrame()
    sums = _sum_above([place[inside] for place in places], counts[inside])
    table = _trade_offs(sums, names, step)
    for name, start in zip(names, low, strict=True):
        table[name] = np.round(start + table[name], 9)
    return table


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
    sums = np.empty((1 + counts.shape[1], *shape))
    for part, weights in zip(sums, [np.ones(len(counts)), *counts.T], strict=True):
        part[:] = np.bincount(flat, weights, int(np.prod(shape))).reshape(shape)
    for axis in range(1, sums.ndim):
        np.cumsum(np.flip(sums, axis), axis=axis, out=np.flip(sums, axis))
    return sums


def _trade_offs(sums: np.ndarray, names: Sequence[str], step: float) -> pd.DataFrame:
    """Return the best combinations of a grid, see `_front`, with thresholds from 0 on."""
    shape = sums.shape[1:]
    sums = sums.reshape(len(sums), -1)
    there = np.flatnonzero(sums[0] > 0)
    px = sums[1:, there]
    std = np.round(100 * np.std(px / px.sum(axis=0), axis=0), 9)
    chosen = _front_rows(sums[0, there], std)
    table = pd.DataFrame({"kept": sums[0, there[chosen]].astype(int), "std": std[chosen]})
    for name, place in zip(names, np.unravel_index(there[chosen], shape), strict=True):
        table[name] = place * step
    return table


def _front(table: pd.DataFrame) -> pd.DataFrame:
    """Keep the combinations of which none other keeps as many tiles and is as even."""
    rows = _front_rows(table["kept"].to_numpy(), table["std"].to_numpy())
    return table.iloc[rows].reset_index(drop=True)


def _front_rows(kept: np.ndarray, std: np.ndarray) -> np.ndarray:
    order = np.lexsort((np.arange(len(kept)), std, -kept))  # low thresholds first, of equals
    lowest = np.minimum.accumulate(std[order])
    return order[np.concatenate([[True], lowest[1:] < lowest[:-1]])]
