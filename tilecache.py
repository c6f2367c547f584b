"""Tiles from a cache, on request: the pixels and classes of each split's ground, as Zarr stores.

What is slow to read (remote or badly laid out files, auxiliary bands, masks of many polygons) is
read once and then taken from `<cache_dir>/tiles-<key>/<split>.zarr` (Zarr format 3). The key is of
the content of the rasters and labels and of the ground, so that what changed is another cache. A
store has, of each raster, `image` (bands, H, W), `known` (H, W; bits: valid, counts) and `mask`
(H, W). Only chunks that hold ground of the split are written, in shards that come whole or not at
all, so that what is killed goes on. Handles read from it the very values of the rasters.

Where training takes tiles as they are, `<cache_dir>/patches-<key>/<split>.zarr` has them one by
one: `image` (N, bands, H, W), `mask` (N, H, W) and, where pixels may be invalid, `valid` (N, H, W),
shuffled once and for all. A chunk is a block of tiles, read at once: an epoch that goes from block
to block reads each file once, from its beginning to its end, and decodes little or nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

import fileio
import parallel
import tiling
from ImageData import IGNORE, SPLITS, ClassNames, InputError, LabelSource, Window

if TYPE_CHECKING:
    import zarr

log = logging.getLogger(__name__)

CHUNK = 256  # px, side of what is read at once
SHARD = 2048  # px, side of what is written at once, a file
VALID, COUNTED = 1, 2  # bits of `known`
MANIFEST, DONE, ROWS = "manifest.json", "done.jsonl", "rows.parquet"
BLOCK, BLOCK_BYTES = 64, 2**24  # patches, and bytes of pixels, that are read at once, a file
# in keys of patches
PATCH_LAYOUT = [BLOCK, BLOCK_BYTES, "training in an order of its own, with names of classes"]
JOB_BLOCKS = 4  # that a worker fills at a call: it is sent the handles and labels of all rasters
KEPT_BLOCKS = 2  # in memory, per process; a batch may lie across an edge
Handles = tuple[dict[str, fileio.Raster], dict[str, LabelSource] | None]


@dataclass(frozen=True)
class CachedRaster(fileio.Raster):
    """A raster whose ground of one split is read from a cache; away from it nothing is valid.

    Attributes:
        store: The Zarr store.
    """

    store: Path | None = None

    def read(self, window: Window) -> np.ndarray:
        """See `fileio.Raster.read`."""
        fill = np.array([value or 0 for value in self.nodata], self.dtype)[:, None, None]
        return _read(self.store, f"{self.identifier}/image", window, fill, len(self.bands))

    def read_valid(self, window: Window, image: np.ndarray) -> np.ndarray:
        """See `fileio.Raster.read_valid`."""
        return (_known(self.store, f"{self.identifier}/known", window) & VALID) > 0

    def read_counted(self, window: Window, valid: np.ndarray) -> np.ndarray:
        """See `fileio.Raster.read_counted`."""
        return (_known(self.store, f"{self.identifier}/known", window) & COUNTED) > 0


@dataclass(frozen=True)
class CachedLabels:
    """The classes of a raster's pixels, of the ground of one split; see `ImageData.LabelSource`.

    Attributes:
        store: The Zarr store.
        name: Of the raster.
        classes: Table of the classes.
        made_from: Of the labels that were cached.
    """

    store: Path
    name: str
    classes: ClassNames
    made_from: dict[str, object]

    def read(self, window: Window, counted: np.ndarray | None = None) -> np.ndarray:
        """See `ImageData.LabelSource`; what does not count is unknown in any case."""
        mask = _read(self.store, f"{self.name}/mask", window, IGNORE)
        return mask if counted is None else np.where(counted, mask, np.uint8(IGNORE))


@lru_cache(maxsize=256)
def _array(store: Path, name: str) -> zarr.Array:
    import zarr  # it takes a while, and most runs do without

    return zarr.open_array(store=str(store), path=name, mode="r")


def _read(
    store: Path, name: str, window: Window, fill: object, bands: int | None = None
) -> np.ndarray:
    """Read a window; what lies off the array is filled."""
    array = _array(store, name)
    height, width = array.shape[-2:]
    x0, y0 = max(window.x, 0), max(window.y, 0)
    x1, y1 = min(window.x + window.width, width), min(window.y + window.height, height)
    whole = (x0, y0, x1 - x0, y1 - y0) == tuple(window)
    if whole:
        return array[..., y0:y1, x0:x1]
    lead = () if bands is None else (bands,)
    values = np.empty((*lead, window.height, window.width), array.dtype)
    values[:] = fill
    if x0 < x1 and y0 < y1:
        rows, cols = slice(y0 - window.y, y1 - window.y), slice(x0 - window.x, x1 - window.x)
        values[..., rows, cols] = array[..., y0:y1, x0:x1]
    return values


@lru_cache(maxsize=1)  # what is asked for valid pixels is next asked for those that count
def _known(store: Path, name: str, window: Window) -> np.ndarray:
    return _read(store, name, window, 0)


def cache_tiles(
    rasters: Mapping[str, fileio.Raster],
    labels: Mapping[str, LabelSource] | None,
    blocks: pd.DataFrame,
    cache_dir: Path,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    progress: bool = False,
) -> Path:
    """Fill the cache of a run's ground with what is not there yet.

    Args:
        rasters: Identifier -> raster.
        labels: Of a segmentation, identifier -> the classes of its pixels.
        blocks: Ground blocks.
        cache_dir: Folder of all caches.
        workers: Processes that read; None: all cores.
        scheduler: Of a Dask cluster that is to read.
        progress: Show a bar.

    Returns:
        The folder of the cache, for `open_cache`.

    Raises:
        InputError: A raster or label cannot be read.
    """
    made_from = _made_from(rasters, labels) | {"blocks": blocks, "layout": [CHUNK, SHARD]}
    folder = Path(cache_dir).absolute() / f"tiles-{fileio.fingerprint(made_from)}"

    def plan() -> dict[str, tuple]:
        jobs = {}
        for split in SPLITS:
            store = folder / f"{split}.zarr"
            for name, raster in rasters.items():
                _create(store, raster, masks=labels is not None)
                source = labels and labels[name]
                for shard in _shards(raster, blocks[blocks["split"] == split]):
                    jobs[_key(store, raster, shard[0])] = (store, raster, source, *shard)
        return jobs

    work = {"workers": workers, "scheduler": scheduler, "progress": progress}
    return _complete(folder, plan, _fill, [f"{s}.zarr" for s in SPLITS], work)


def _complete(
    folder: Path,
    plan: Callable[[], Mapping[str, object]],
    fill: Callable[[object], None],
    outputs: Sequence[str],
    work: Mapping[str, object],
) -> Path:
    """Do what is left to do of a cache, one process at a time; return its folder.

    Args:
        folder: Of the cache, named after what it is made from.
        plan: Makes the arrays that are not there, and returns the jobs by name.
        fill: Does a job.
        outputs: What is there in the end.
        work: `workers, scheduler, progress` of `parallel.imap_ordered`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with fileio.exclusive(folder, wait=True):
        if fileio.is_finished(folder / MANIFEST, {"key": folder.name}):
            log.info("the cache %s is complete", folder)
            return folder
        done = fileio.Journal(folder / DONE)
        jobs = {name: job for name, job in plan().items() if name not in done.known}
        filled = parallel.imap_ordered(fill, jobs.values(), description="caching tiles", **work)
        for name, _ in zip(jobs, filled, strict=True):
            done.add(name, None)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        log.info("%.1f MB in the cache %s", size / 1e6, folder)
        fileio.mark_finished(folder / MANIFEST, {"key": folder.name}, outputs)
    return folder


def open_cache(
    folder: Path | None,
    split: str,
    rasters: Mapping[str, fileio.Raster],
    labels: Mapping[str, LabelSource] | None,
) -> Handles:
    """Return handles that read the ground of a split from a cache.

    Args:
        folder: What `cache_tiles` returned; None, or one that is not there on this machine: the
            rasters and labels are returned as they are.
        split: "train", "validation" or "test".
        rasters: Identifier -> raster.
        labels: Identifier -> the classes of its pixels.
    """
    if folder is None or not is_complete(folder):
        return dict(rasters), None if labels is None else dict(labels)
    store = Path(folder) / f"{split}.zarr"
    plain = [field.name for field in fields(fileio.Raster)]
    cached = {
        name: CachedRaster(**{n: getattr(raster, n) for n in plain}, store=store)
        for name, raster in rasters.items()
    }
    if labels is None:
        return cached, None
    return cached, {
        name: CachedLabels(store, name, source.classes, source.made_from)
        for name, source in labels.items()
    }


def _key(store: Path, raster: fileio.Raster, window: Window) -> str:
    return f"{store.stem} {raster.identifier} {window.x} {window.y}"


def _shards(raster: fileio.Raster, blocks: pd.DataFrame) -> list[tuple[Window, list[Window]]]:
    """Return the shards that hold ground of some blocks of a raster, and their chunks that do."""
    mine = blocks[blocks["raster"] == raster.identifier]
    cells = {
        (row, column)
        for b in mine.itertuples()
        for row in range(b.y // CHUNK, -(-(b.y + b.height) // CHUNK))
        for column in range(b.x // CHUNK, -(-(b.x + b.width) // CHUNK))
    }
    shards: dict[tuple[int, int], list[Window]] = {}
    for row, column in sorted(cells):
        place = (row * CHUNK // SHARD, column * CHUNK // SHARD)
        shards.setdefault(place, []).append(_square(raster, row, column, CHUNK))
    return [(_square(raster, *place, SHARD), chunks) for place, chunks in sorted(shards.items())]


def _square(raster: fileio.Raster, row: int, column: int, side: int) -> Window:
    x, y = column * side, row * side
    return Window(x, y, min(side, raster.width - x), min(side, raster.height - y))


def _create(store: Path, raster: fileio.Raster, *, masks: bool) -> None:
    """Make the arrays of a raster, if they are not there; nothing of them is written yet."""
    import zarr

    group, size = zarr.open_group(store=str(store), mode="a"), (raster.height, raster.width)
    kinds = {"image": (raster.dtype, 0), "known": ("uint8", 0), "mask": ("uint8", IGNORE)}
    for kind, (dtype, fill) in kinds.items():
        name = f"{raster.identifier}/{kind}"
        if name in group or (kind == "mask" and not masks):
            continue
        lead = (len(raster.bands),) if kind == "image" else ()
        group.create_array(
            name, shape=(*lead, *size), dtype=dtype, fill_value=fill,
            chunks=(*lead, CHUNK, CHUNK), shards=(*lead, SHARD, SHARD),
        )  # fmt: skip


def _fill(job: tuple[Path, fileio.Raster, LabelSource | None, Window, list[Window]]) -> None:
    """Write a shard of a raster, read chunk by chunk."""
    import zarr

    store, raster, source, shard, chunks = job
    size = (shard.height, shard.width)
    image = np.zeros((len(raster.bands), *size), raster.dtype)
    known, mask = np.zeros(size, np.uint8), np.full(size, IGNORE, np.uint8)
    for chunk in chunks:
        top, left = chunk.y - shard.y, chunk.x - shard.x
        place = (..., slice(top, top + chunk.height), slice(left, left + chunk.width))
        pixels = raster.read(chunk)
        valid = raster.read_valid(chunk, pixels)
        counted = raster.read_counted(chunk, valid)
        image[place], known[place] = pixels, VALID * valid + COUNTED * counted
        if source is not None:
            mask[place] = source.read(chunk, counted)
    group = zarr.open_group(store=str(store), mode="r+")
    place = (..., slice(shard.y, shard.y + size[0]), slice(shard.x, shard.x + size[1]))
    group[f"{raster.identifier}/image"][place] = image
    if source is not None:
        group[f"{raster.identifier}/mask"][place] = mask
    group[f"{raster.identifier}/known"][place] = known  # last: without it nothing is valid


# ---------------------------------------------------------------------------------------------
# Patches: tiles one by one, in blocks
# ---------------------------------------------------------------------------------------------


class Patch(NamedTuple):
    """A tile as it lies in its raster.

    Attributes:
        image: (bands, H, W), in the raster's own type.
        valid: bool (H, W); None: all pixels are.
        mask: uint8 (H, W), class ids, `IGNORE` where nothing is known or counts.
    """

    image: np.ndarray
    valid: np.ndarray | None
    mask: np.ndarray


@dataclass(frozen=True)
class Patches:
    """The patches of one split, in a store that `cache_patches` made; small and picklable.

    Attributes:
        store: The Zarr store.
        rows: A row per patch, in the order of the store: those of the tile index.
    """

    store: Path
    rows: pd.DataFrame

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the masks, by class id."""
        import zarr

        return tuple(zarr.open_group(store=str(self.store), mode="r").attrs["classes"])

    def __len__(self) -> int:
        """Return the number of patches."""
        return len(self.rows)

    @property
    def images(self) -> zarr.Array:
        """All images (N, bands, H, W), on disk."""
        return _array(self.store, "image")

    @property
    def masks(self) -> zarr.Array:
        """All masks, uint8 (N, H, W), on disk."""
        return _array(self.store, "mask")

    @property
    def block(self) -> int:
        """Number of patches that are read at once."""
        return self.images.chunks[0]

    def read(self, row: int) -> Patch:
        """Return a patch; the block that it is in is read, unless it was among the last."""
        number, place = divmod(row, self.block)
        images, valid, masks = _block(self.store, number)
        return Patch(images[place], None if valid is None else valid[place], masks[place])

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the images and masks of block after block."""
        for first in range(0, len(self), self.block):
            rows = slice(first, first + self.block)
            yield self.images[rows], self.masks[rows]


@lru_cache(maxsize=KEPT_BLOCKS)
def _block(store: Path, number: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    images = _array(store, "image")
    rows = slice(number * images.chunks[0], (number + 1) * images.chunks[0])
    valid = _array(store, "valid")[rows] if (store / "valid").exists() else None
    return images[rows], valid, _array(store, "mask")[rows]


def cache_patches(
    tiles: pd.DataFrame,
    rasters: Mapping[str, fileio.Raster],
    labels: Mapping[str, LabelSource],
    folder: Path,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    progress: bool = False,
) -> Path:
    """Write the tiles of an index that are kept, as they lie, in an order drawn once.

    Args:
        tiles: Tile index of one size; turned twins are left out.
        rasters: Identifier -> raster; all have the same bands and type.
        labels: Identifier -> the classes of its pixels.
        folder: Of the cache, as `patches_folder` names it.
        workers: Processes that read; None: all cores.
        scheduler: Of a Dask cluster that is to read.
        progress: Show a bar.

    Returns:
        The folder, for `open_patches`.

    Raises:
        InputError: A raster or label cannot be read.
    """
    kept = _whole_tiles(tiles)
    names = next(iter(labels.values())).classes.names

    def plan() -> dict[str, tuple]:
        jobs, parts = {}, []
        for split in SPLITS:
            part = kept[kept["split"] == split]
            if split == "train":  # the others are read in the order of the index
                part = part.iloc[np.argsort(fileio.hash_rows(part[["raster", "x", "y"]], 0))]
            block = _create_patches(folder / f"{split}.zarr", part, rasters, names)
            step = block * JOB_BLOCKS
            for first in range(0, len(part), step):
                some = part.iloc[first : first + step]
                jobs[f"{split} {first}"] = (folder / f"{split}.zarr", first, block, some)
            parts.append(part)
        fileio.write_table(folder / ROWS, pd.concat(parts, ignore_index=True))
        return jobs

    fill = partial(_fill_patches, rasters=dict(rasters), labels=dict(labels))
    work = {"workers": workers, "scheduler": scheduler, "progress": progress}
    return _complete(folder, plan, fill, [ROWS, *(f"{s}.zarr" for s in SPLITS)], work)


def patches_folder(
    tiles: pd.DataFrame,
    rasters: Mapping[str, fileio.Raster],
    labels: Mapping[str, LabelSource],
    cache_dir: Path,
) -> Path:
    """Return the folder of the patches of an index, in that of all caches, by their content."""
    made_from = _made_from(rasters, labels) | {
        "tiles": _whole_tiles(tiles)[["window", "raster", *tiling.WINDOW_COLUMNS, "split"]],
        "layout": PATCH_LAYOUT,
    }
    return Path(cache_dir).absolute() / f"patches-{fileio.fingerprint(made_from)}"


def _whole_tiles(tiles: pd.DataFrame) -> pd.DataFrame:
    """Return the tiles that are kept, without turned twins."""
    return tiles[tiles["kept"] & (tiles["angle"] == 0)]


def _made_from(
    rasters: Mapping[str, fileio.Raster], labels: Mapping[str, LabelSource] | None
) -> dict[str, object]:
    """Return what a cache is made of: the content of files, whenever they were written."""
    given = {
        "rasters": {n: [r.made_from, fileio.raster_fingerprint(r)] for n, r in rasters.items()},
        "labels": {name: source.made_from for name, source in (labels or {}).items()},
    }
    return _by_content(given)


def _by_content(value: object) -> object:
    match value:
        case Path():
            return fileio.content_fingerprint(value) if value.is_file() else str(value)
        case Mapping():
            return {key: _by_content(item) for key, item in value.items()}
        case list() | tuple():
            return [_by_content(item) for item in value]
    return value


def is_complete(folder: Path) -> bool:
    """Tell whether all of a cache is there."""
    return (Path(folder) / MANIFEST).exists()


def open_patches(folder: Path, split: str) -> Patches:
    """Return the patches of a split.

    Args:
        folder: What `cache_patches` returned.
        split: "train", "validation" or "test".

    Raises:
        InputError: There are none, or they are not complete.
    """
    folder = Path(folder)
    if not is_complete(folder):
        raise InputError(
            f"{folder} holds no complete patches; make them, which goes on where it was stopped"
        )
    rows = pd.read_parquet(folder / ROWS)
    return Patches(folder / f"{split}.zarr", rows[rows["split"] == split].reset_index(drop=True))


def _create_patches(
    store: Path,
    part: pd.DataFrame,
    rasters: Mapping[str, fileio.Raster],
    classes: Sequence[str],
) -> int:
    """Make the arrays of a split, if they are not there; return how many patches a block has."""
    import zarr

    group, raster = zarr.open_group(store=str(store), mode="a"), next(iter(rasters.values()))
    group.attrs["classes"] = list(classes)
    height, width = part[["height", "width"]].max() if len(part) else (1, 1)
    size, count = (int(height), int(width)), len(raster.bands)
    patch_bytes = count * size[0] * size[1] * np.dtype(raster.dtype).itemsize
    block = int(np.clip(BLOCK_BYTES // patch_bytes, 1, BLOCK))
    kinds = {"image": ((count,), raster.dtype, None), "mask": ((), "uint8", "auto")}
    if not all(r.all_counted for r in rasters.values()):
        kinds["valid"] = ((), "bool", "auto")
    for name, (lead, dtype, compressors) in kinds.items():
        if name not in group:
            group.create_array(
                name, shape=(len(part), *lead, *size), chunks=(block, *lead, *size), dtype=dtype,
                compressors=compressors,
            )  # fmt: skip
    return block


def _fill_patches(
    job: tuple[Path, int, int, pd.DataFrame],
    rasters: Mapping[str, fileio.Raster],
    labels: Mapping[str, LabelSource],
) -> None:
    """Write some blocks of patches, read in the order of the ground."""
    import zarr

    store, start, block, tiles = job
    group = zarr.open_group(store=str(store), mode="r+")
    for first in range(0, len(tiles), block):
        some = tiles.iloc[first : first + block]
        arrays = {
            name: np.empty((len(some), *array.shape[1:]), array.dtype)
            for name, array in group.arrays()
        }
        ground = some.assign(place=np.arange(len(some))).sort_values(["raster", "y", "x"])
        for tile in ground.itertuples():
            window = Window(*(int(getattr(tile, name)) for name in tiling.WINDOW_COLUMNS))
            image, valid, counted = tiling.read_tile(rasters[tile.raster], window, 0)
            arrays["image"][tile.place] = image
            arrays["mask"][tile.place] = labels[tile.raster].read(window, counted)
            if "valid" in arrays:
                arrays["valid"][tile.place] = valid
        for name, values in arrays.items():
            group[name][start + first : start + first + len(some)] = values
