"""Which ground trains, which validates, which tests: decided once, before any tile exists.

Blocks of ground, or whole rasters, are ranked by a seeded hash of their place and dealt out by
proportion. Neither tile sizes nor annotations nor trials enter, so that all of them are measured on
the same ground. The audit then measures what the tiles of two splits have in common.

python splits.py balance TILES_DIR   class shares of training tiles, and thresholds that even them
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyproj
import shapely
from pyproj.exceptions import ProjError

import fileio
import tiling
from balance import METHODS, MIN_KEPT, preview, read_shares, write_shares
from balance import Balance as Balance  # what is found
from balance import balance as balance  # here is where it is looked for
from ImageData import SPLITS, InputError, RasterHandle

log = logging.getLogger(__name__)

REPROJECTION_SLACK = 0.01  # share of a tile; edges that were straight are curved in another CRS
MIN_BLOCKS = 12  # below this many blocks, the derived block size shrinks
MAX_BLOCKS = 2**22  # a terapixel in blocks of 512 px


def ground_blocks(
    rasters: Sequence[RasterHandle],
    *,
    split_by: str,
    max_tile_size: int,
    block_size: int | None,
    test_proportion: float,
    validation_proportion: float,
    seed: int,
    test_rasters: Collection[str] = (),
    validation_rasters: Collection[str] = (),
) -> pd.DataFrame:
    """Cut the ground of all rasters into blocks and assign each to a split.

    Args:
        rasters: The rasters.
        split_by: "block" cuts each raster into equal blocks; "raster" takes each as one.
        max_tile_size: Largest tile of the run in px; no block is smaller.
        block_size: Least side of a block in px; None takes twice the largest tile, or less where
            that leaves too few blocks.
        test_proportion: Share of the blocks for the test.
        validation_proportion: Share of the remaining blocks for the validation.
        seed: Of the hash that ranks the blocks.
        test_rasters: Identifiers of the rasters that are the test, instead of a share of all.
        validation_rasters: The same for the validation; the other rasters train.

    Returns:
        One row per block: `block` (int), `raster` (identifier), `x, y, width, height` (px), `split`
        ("train", "validation", "test", or "unused" where no ground counts). The blocks of a raster
        partition it.

    Raises:
        InputError: A raster is smaller than a tile, or there are fewer than three blocks, or more
            than `MAX_BLOCKS`.
    """
    for raster in rasters:
        side = min(raster.width, raster.height)
        if max_tile_size > side:
            name = "height" if side == raster.height else "width"
            raise InputError(
                f"tile_size must be <= {side} px (the {name} of {raster.path.name}), "
                f"got {max_tile_size}; lower PATCH_SIZES"
            )
    if split_by == "raster":
        sizes = [None]
    elif block_size is not None:
        sizes = [block_size]
    else:
        sizes = [2 * max_tile_size, 3 * max_tile_size // 2, max_tile_size]
    for size in sizes:
        _check_count(rasters, size)
        blocks = pd.concat([_cut(raster, size) for raster in rasters], ignore_index=True)
        used = blocks[_has_counted_ground(blocks, rasters)]
        if len(used) >= MIN_BLOCKS:
            break
    if len(used) < len(SPLITS):
        unused = len(blocks) - len(used)
        outside = f" ({unused} more lie outside the areas of interest)" if unused else ""
        raise InputError(
            f"the ground falls into {len(used)} blocks{outside}, but training, validation and test "
            "need one each; add rasters, or with SPLIT_BY = 'block' lower BLOCK_SIZE and "
            f"PATCH_SIZES to at most {_largest_block(rasters)} px"
        )
    blocks.insert(0, "block", np.arange(len(blocks)))

    ranked = used.iloc[np.argsort(fileio.hash_rows(used[["raster", "x", "y"]], seed))]
    is_test = _choose("TEST_FILENAMES", ranked, test_rasters, test_proportion, validation_rasters)
    rest = ranked[~is_test]
    is_validation = _choose("VALIDATION_FILENAMES", rest, validation_rasters, validation_proportion)
    blocks["split"] = "unused"
    blocks.loc[ranked.index, "split"] = "train"
    blocks.loc[ranked.index[is_test], "split"] = "test"
    blocks.loc[rest.index[is_validation], "split"] = "validation"
    return blocks


def _choose(
    parameter: str,
    ranked: pd.DataFrame,
    rasters: Collection[str],
    proportion: float,
    others: Collection[str] = (),
) -> np.ndarray:
    """Choose the blocks of a split: those of some rasters, or the first of those not of others."""
    # what must be left: for training, and for the validation where that has no rasters
    least = 1 if others or parameter == "VALIDATION_FILENAMES" else 2
    free = ~ranked["raster"].isin(others).to_numpy()
    if not rasters:
        share = min(max(1, round(proportion * free.sum())), free.sum() - least)
        return free & (np.cumsum(free) <= share)
    chosen = ranked["raster"].isin(rasters).to_numpy()
    if not chosen.any() or (free & ~chosen).sum() < least:
        raise InputError(
            f"{parameter} = {sorted(rasters)} takes {chosen.sum()} of {len(ranked)} blocks of "
            f"ground that counts; it must have one, and leave {least} for other splits. Name "
            "other rasters"
        )
    return chosen


def stratify_validation(
    blocks: pd.DataFrame,
    counts: np.ndarray,
    *,
    validation_percent: float,
    tolerance: float,
    seed: int,
) -> pd.DataFrame:
    """Choose validation blocks anew, so that their classes have the shares that they have all over.

    Whole blocks change sides, so that no ground leaks; the test keeps its ground. Starting from the
    order of a seeded hash, blocks are added, removed and exchanged as long as that brings the
    shares closer; the sum over classes of squared differences relative to the share (chi-square)
    counts a rare class as much as a common one.

    Args:
        blocks: See `ground_blocks`.
        counts: (N, C), px per class of each block, see `tiling.count_blocks`.
        validation_percent: Of the labelled px that are not the test's, those to validate on.
        tolerance: Percent that may be added to it or taken from it, for the sake of the shares.
        seed: Of the hash.

    Returns:
        The blocks with other splits.

    Raises:
        InputError: The percentages make no sense, or there are fewer than two blocks with labels.
    """
    if not 0 < validation_percent < 100 or not 0 <= tolerance < validation_percent:
        raise InputError(
            "the percentage to validate on must be over 0 and under 100, and USE_STRATIFICATION "
            f"under it, got {validation_percent:g} and {tolerance:g}"
        )
    labelled = counts.sum(axis=1) > 0
    mine = np.flatnonzero(blocks["split"].isin(["train", "validation"]).to_numpy() & labelled)
    if len(mine) < 2:
        raise InputError(
            f"{len(mine)} blocks beside the test's have a label, training and validation need one "
            "each; lower BLOCK_SIZE, or label more ground"
        )
    order = np.argsort(fileio.hash_rows(blocks.iloc[mine][["raster", "x", "y"]], seed))
    mine = mine[order]
    px = counts[mine].astype(float)
    limits = px.sum() * (validation_percent + np.array([-tolerance, tolerance])) / 100
    chosen = _stratify(px, limits, px.sum() * validation_percent / 100)
    blocks = blocks.copy()
    blocks.loc[blocks.index[mine], "split"] = np.where(chosen, "validation", "train")
    return blocks


MOST_MOVES = 1000  # exchanges of blocks until the shares are close enough
TRIED = 256  # blocks of each side that an exchange looks at


def _stratify(px: np.ndarray, limits: np.ndarray, wanted: float) -> np.ndarray:
    """Choose rows of (N, C) whose sum has the shares of all, bool (N,)."""
    share = px.sum(axis=0) / px.sum()
    seen = share > 0
    px, share = px[:, seen], share[seen]

    def cost(sums: np.ndarray) -> np.ndarray:
        total = sums.sum(axis=-1)
        off = np.clip(np.maximum(limits[0] - total, total - limits[1]), 0, None) / limits[1]
        shares = sums / np.maximum(total, 1)[..., None]
        apart = ((shares - share) ** 2 / share).sum(axis=-1)
        return apart + 1e3 * off  # the size comes first

    chosen = np.cumsum(px.sum(axis=1)) <= wanted
    chosen[0], chosen[-1] = True, False
    for turn in range(MOST_MOVES):
        sums = px[chosen].sum(axis=0)
        inside, outside = np.flatnonzero(chosen), np.flatnonzero(~chosen)
        # other blocks are looked at in every turn, until all were
        inside = np.roll(inside, -turn * TRIED)[:TRIED]
        outside = np.roll(outside, -turn * TRIED)[:TRIED]
        leave = np.concatenate([[np.zeros(px.shape[1])], px[inside]])
        enter = np.concatenate([[np.zeros(px.shape[1])], px[outside]])
        costs = cost(sums - leave[:, None] + enter[None])
        if chosen.sum() == 1:
            costs[1:, 0] = np.inf  # neither side is left empty
        if (~chosen).sum() == 1:
            costs[0, 1:] = np.inf
        out, into = np.unravel_index(costs.argmin(), costs.shape)
        if costs[out, into] >= costs[0, 0] - 1e-12:
            if (turn + 1) * TRIED >= len(px):
                break
            continue
        if out:
            chosen[inside[out - 1]] = False
        if into:
            chosen[outside[into - 1]] = True
    return chosen


def _has_counted_ground(blocks: pd.DataFrame, rasters: Sequence[RasterHandle]) -> np.ndarray:
    counted = np.ones(len(blocks), dtype=bool)
    for raster in rasters:
        if raster.regions is not None:
            mine = (blocks["raster"] == raster.path.stem).to_numpy()
            x, y, width, height = blocks.loc[mine, ["x", "y", "width", "height"]].to_numpy().T
            boxes = np.stack([x, y, x + width, y + height], axis=1)
            counted[mine] = raster.regions.reach(boxes)
    return counted


def _largest_block(rasters: Sequence[RasterHandle]) -> int:
    """Return the largest block side, in px, that gives every split a block."""
    size = min(min(r.width, r.height) for r in rasters)
    while sum((r.width // size) * (r.height // size) for r in rasters) < len(SPLITS):
        size -= 1
    return size


def _check_count(rasters: Sequence[RasterHandle], size: int | None) -> None:
    """Refuse ground that is cut into more blocks than memory should hold."""
    sides = np.array([[raster.width, raster.height] for raster in rasters], dtype=float)
    count = np.prod(sides // size, axis=1).sum() if size else len(rasters)
    if count > MAX_BLOCKS:
        least = int(np.ceil(np.sqrt(np.prod(sides, axis=1).sum() / MAX_BLOCKS)))
        raise InputError(
            f"{' and '.join(raster.path.name for raster in rasters[:3])} would fall into "
            f"{count:.3g} blocks of {size} px, at most {MAX_BLOCKS} are kept in memory; set "
            f"BLOCK_SIZE to {least} px or more, and check the rasters' size"
        )


def _cut(raster: RasterHandle, size: int | None) -> pd.DataFrame:
    columns = max(1, raster.width // size) if size else 1
    rows = max(1, raster.height // size) if size else 1
    x_edges = np.linspace(0, raster.width, columns + 1).astype(int)
    y_edges = np.linspace(0, raster.height, rows + 1).astype(int)
    y, x = (grid.ravel() for grid in np.meshgrid(y_edges[:-1], x_edges[:-1], indexing="ij"))
    height, width = (
        grid.ravel() for grid in np.meshgrid(np.diff(y_edges), np.diff(x_edges), indexing="ij")
    )
    return pd.DataFrame(
        {"raster": raster.path.stem, "x": x, "y": y, "width": width, "height": height}
    )


def audit_splits(tiles: pd.DataFrame, rasters: Mapping[str, RasterHandle]) -> pd.DataFrame:
    """Measure the ground that tiles of different splits share; there must be none.

    Rasters with a coordinate reference system are compared on the map, so that two scenes of the
    same place cannot be on two sides.

    Args:
        tiles: A tile index with `raster, x, y, width, height, split`.
        rasters: Identifier -> raster.

    Returns:
        One row per pair of splits: `first, second, shared_px`, the summed overlap of their tiles.

    Raises:
        InputError: Two splits share ground.
    """
    windows = tiles.drop_duplicates(["raster", "x", "y", "width", "height", "split"])
    pairs = [("train", "validation"), ("train", "test"), ("validation", "test")]
    shared = dict.fromkeys(pairs, 0.0)
    planes: dict[str, list[tuple[np.ndarray, ...]]] = {}
    for name, group in windows.groupby("raster"):
        plane, footprints, pixel_area = _footprints(group, rasters[name])
        areas = np.full(len(group), pixel_area)
        planes.setdefault(plane, []).append((footprints, areas, group["split"].to_numpy()))
    grounds = {
        plane: tuple(np.concatenate(part) for part in zip(*parts, strict=True))
        for plane, parts in planes.items()
    }
    for ground in grounds.values():
        _add_shared(shared, ground, ground)
    on_map = {raster.crs for raster in rasters.values() if raster.crs} & grounds.keys()
    for here, there in itertools.permutations(sorted(on_map), 2):
        footprints, areas, split = grounds[there]
        try:
            transformer = pyproj.Transformer.from_crs(there, here, always_xy=True)
        except ProjError:  # of another globe
            continue
        moved = shapely.transform(footprints, transformer.transform, interleaved=False)
        _add_shared(shared, grounds[here], (moved, areas, split), least=REPROJECTION_SLACK)
    # map coordinates leave rounding behind, so a tenth of a pixel is none
    rows = [(first, second, round(px, 1)) for (first, second), px in shared.items()]
    audit = pd.DataFrame(rows, columns=["first", "second", "shared_px"])
    if (leaks := audit[audit["shared_px"] > 0]).size:
        raise InputError(
            "splits share ground, so that no number measured on it is honest: "
            + "; ".join(f"{a} and {b} {px:.0f} px" for a, b, px in leaks.itertuples(index=False))
            + "; give rasters that overlap on the map to one run only after cutting the overlap"
        )
    return audit


def _add_shared(
    shared: dict[tuple[str, str], float],
    here: tuple[np.ndarray, ...],
    there: tuple[np.ndarray, ...],
    least: float = 0.0,
) -> None:
    """Add, per pair of splits, the px of tiles of the first here that tiles of the second cover."""
    (footprints, areas, split), (others, _, other_split) = here, there
    for first, second in shared:
        a, b = np.flatnonzero(split == first), np.flatnonzero(other_split == second)
        i, j = shapely.STRtree(others[b]).query(footprints[a])
        common = shapely.area(shapely.intersection(footprints[a[i]], others[b[j]]))
        real = common > least * shapely.area(footprints[a[i]])
        shared[first, second] += float((common / areas[a[i]])[real].sum())


def _footprints(windows: pd.DataFrame, raster: RasterHandle) -> tuple[str, np.ndarray, float]:
    """Return the plane that windows lie in, their polygons there, and the area of a pixel."""
    x, y, width, height = windows[["x", "y", "width", "height"]].to_numpy(dtype=float).T
    corners = np.array([[x, x + width, x + width, x], [y, y, y + height, y + height]])
    plane, (a, b, c, d, e, f) = f"pixels of {raster.path}", (1, 0, 0, 0, 1, 0)
    if raster.crs:
        plane, (a, b, c, d, e, f) = raster.crs, raster.transform
    corners = np.array([a * corners[0] + b * corners[1] + c, d * corners[0] + e * corners[1] + f])
    return plane, shapely.polygons(corners.transpose(2, 1, 0)), abs(a * e - b * d)


def split_dataset_train_test(
    tiles: pd.DataFrame,
    sample_size: float,
    seed: int,
    limits: Sequence[int | None] = (None, None, None),
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Select the tiles of a trial.

    `sample_size` thins the ground windows of training and validation; a smaller sample is part of a
    larger one, and the turned twins of a window stay with it. The test ground is thinned by a limit
    only, and by the same for all trials of its tile size.

    Args:
        tiles: Tile index of one size; only rows with `kept` are used.
        sample_size: Share of the training and validation windows, 0 < sample_size <= 1.
        limits: Most windows of training, validation and test; None: no limit.
        seed: Of the hash that ranks the windows.

    Returns:
        The training, validation and test tiles.

    Raises:
        InputError: A split is left without a tile or without an object.
    """
    kept = tiles[tiles["kept"]]
    selected = []
    for name, limit in zip(SPLITS, limits, strict=True):
        part = kept[kept["split"] == name]
        windows = part.drop_duplicates("window")
        count = len(windows) if name == "test" else int(np.ceil(sample_size * len(windows)))
        count = min(count, limit or count)
        if count < len(windows):
            order = np.argsort(fileio.hash_rows(windows[["raster", "x", "y"]], seed))
            part = part[part["window"].isin(windows["window"].iloc[order[:count]])]
        if part.empty:
            reasons = tiles.loc[tiles["split"] == name, "reason"].value_counts().to_dict()
            raise InputError(
                f"no {name} tile is left after filtering ({reasons}); raise CENSORED_PIXELS_LIMIT "
                "or EMPTY_TILE_RATIO, lower MIN_VALID, widen the area of interest, or relax your "
                "tile filters"
            )
        if "class_0" in part.columns:
            if not tiling.counts_of(part).sum():
                raise InputError(
                    f"the {name} split has {len(part)} tiles but no labelled pixel; change SEED or "
                    "BLOCK_SIZE, raise its proportion or SAMPLE_SIZES, or label more ground"
                )
        elif not part["objects"].sum():
            raise InputError(
                f"the {name} split has {len(part)} tiles but no object; change SEED or BLOCK_SIZE, "
                "raise its proportion or SAMPLE_SIZES, or annotate more ground"
            )
        selected.append(part)
    return tuple(selected)


def check_labels(tiles: pd.DataFrame, boxes: pd.DataFrame) -> pd.DataFrame:
    """Count the objects per label and split, and refuse labels that the training never sees.

    Args:
        tiles: The tiles of a trial, of all splits.
        boxes: The boxes of their index, see `tiling.read_tiles`.

    Returns:
        One row per label, one column per split.

    Raises:
        InputError: A label has no object on training ground.
    """
    owned = boxes[boxes["owned"]]
    windows = tiles.drop_duplicates("window").set_index("window")["split"]
    split = owned["window"].map(windows)
    counts = pd.crosstab(owned["label"], split).reindex(columns=list(SPLITS), fill_value=0)
    unseen = counts.index[(counts["train"] == 0) & (counts.sum(axis=1) > 0)]
    if len(unseen):
        places = {label: counts.loc[label].drop("train").to_dict() for label in unseen}
        raise InputError(
            f"labels without an object on training ground: {places}; change SEED or BLOCK_SIZE, "
            "raise SAMPLE_SIZES, annotate more of them, or lower LABEL_PERCENTILE to merge rare "
            "labels into Unknown"
        )
    return counts


def check_classes(
    tiles: pd.DataFrame, names: Sequence[str], ignored: int | None = None
) -> pd.DataFrame:
    """Count the pixels per class and split, and refuse classes that the training never sees.

    Tiles that overlap count their common ground as often as they show it.

    Args:
        tiles: The tiles of a trial, of all splits.
        names: Of the classes, by class id.
        ignored: Class id of ground that does not count; None: there is none.

    Returns:
        One row per class, named by it, one column per split, in px.

    Raises:
        InputError: A class that some ground has is not on training ground, or a split has one class
            only.
    """
    ground = tiles.drop_duplicates("window")
    columns = tiling.class_columns(len(names))
    counts = ground.groupby("split")[columns].sum().reindex(list(SPLITS), fill_value=0).T
    counts = counts.set_axis(pd.Index(names, name="label"))
    unseen = counts.index[(counts["train"] == 0) & (counts.sum(axis=1) > 0)]
    if len(unseen):
        places = {name: counts.loc[name].drop("train").to_dict() for name in unseen}
        raise InputError(
            f"classes without a pixel on training ground: {places}; change SEED or BLOCK_SIZE, "
            "lower min_annotated and class_proportion, raise SAMPLE_SIZES or train.max_tiles, or "
            "label more of them"
        )
    there = counts[counts.sum(axis=1) > 0]
    nowhere = counts.index.difference(
        [*there.index, *([] if ignored is None else [names[ignored]])]
    )
    if len(nowhere):
        log.warning(
            "NO PIXEL of any tile is of %s; the model has a place for what it never sees: leave it "
            "out of CLASSES, or, if it is background, set MASK_REFERENCE = True or restrict "
            "AOI_FILENAMES to ground that counts", list(nowhere),
        )  # fmt: skip
    held = (there > 0).sum()
    if single := [name for name in SPLITS if held[name] < min(2, len(there))]:
        raise InputError(
            f"there is nothing to tell apart on the ground of {single}, px per class: "
            f"{there.to_dict('index')}; change SEED, lower BLOCK_SIZE, set USE_STRATIFICATION (for "
            "the validation), or label more"
        )
    for name in there.index[(there[["validation", "test"]] == 0).any(axis=1)]:
        log.warning(
            "class %s is not on the ground of every split: %s px; means over classes leave it out "
            "there", name, there.loc[name].to_dict(),
        )  # fmt: skip
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; `python splits.py --help` tells all."""
    args = _parser().parse_args(argv)
    try:
        tiles, classes = read_shares(args.tiles_dir)
        if args.csv is not None:
            write_shares(args.csv, tiles, classes)
        if args.search:
            found = balance(
                tiles, classes, methods=args.search, class_ids=args.classes,
                min_kept=args.min_kept, step=args.step,
            )  # fmt: skip
            if args.curve is not None:
                fileio.write_table(args.curve, found.curve)
        else:
            found = preview(tiles, classes, args.min_annotated, dict(args.class_proportion))
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(found.report())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="splits.py", description="Look at the ground of a run.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shares = commands.add_parser(
        "balance", help="class shares of training tiles, and thresholds that make them even",
        description="Tell how much of the training tiles each class has, and what is left if tiles "
        "are kept by thresholds: those given, or those that make the classes most even.",
    )  # fmt: skip
    shares.add_argument("tiles_dir", type=Path, metavar="TILES_DIR", help="a folder tiling_<size>")
    shares.add_argument(
        "--search", nargs="+", choices=METHODS, metavar="METHOD",
        help="search for the best thresholds of these kinds: min_annotated, class_proportion",
    )  # fmt: skip
    shares.add_argument(
        "--classes", nargs="+", type=int, metavar="ID",
        help="class ids that may have a threshold (all but the background)",
    )  # fmt: skip
    shares.add_argument(
        "--min-kept", type=float, default=MIN_KEPT, metavar="PERCENT",
        help="least part of the tiles that a search keeps (default: %(default)g)",
    )  # fmt: skip
    shares.add_argument("--step", type=float, metavar="PERCENT", help="between thresholds")
    shares.add_argument(
        "--min-annotated", type=float, default=0.0, metavar="PERCENT",
        help="without a search: least part of a tile with a class other than the background",
    )  # fmt: skip
    shares.add_argument(
        "--class-proportion", nargs="+", type=_proportion, default=[], metavar="ID=PERCENT",
        help="without a search: least part of a tile with a class",
    )  # fmt: skip
    shares.add_argument("--csv", type=Path, help="write the class shares of every tile")
    shares.add_argument("--curve", type=Path, help="write the trade-offs that a search found (CSV)")
    return parser


def _proportion(text: str) -> tuple[int, float]:
    class_id, _, percent = text.partition("=")
    return int(class_id), float(percent)


if __name__ == "__main__":
    sys.exit(main())
