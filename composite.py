"""Many pairs of image and mask as one training set, and its patches in a store that reads fast.

    pair = TrainingDataset("a.tif", "a.gpkg", attribute="kind", classes={"1": "house"})
    both = pair + TrainingDataset("b.tif", "b_mask.tif", bands=(3, 2, 1), weight=2)
    both.options = PatchOptions(size=128)
    try:
        both.load_prepared_arrays()
    except InputError:
        both.prepare().save_prepared_arrays()

Each pair has its own bands, names of classes, resolution and weight; together they have one table
of classes. Ground is split before anything is cut, so that patches may overlap and yet no ground is
on two sides. `datasets.PatchDataset` reads the patches, `datasets.BlockSampler` draws them.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

import fileio
import masks
import splits
import tilecache
import tiling
from ImageData import SPLITS, ImageData, InputError
from manifest import DATASET_PARAMETERS, NamedDataset, select_datasets
from manifest import get_dataset as get_dataset  # here is where it is looked for
from manifest import read_registry as read_registry

log = logging.getLogger(__name__)

LABEL_OPTIONS = (  # of a pair and of a named dataset, as `masks.read_labels` has them
    "attribute", "classes", "mask_reference", "layer", "coordinates", "attribute_filter",
    "default_label",
)  # fmt: skip
ARRAYS = "arrays.txt"  # names the folder of the patches, which other indexes may share
RESOLUTION_TOLERANCE = 0.2  # relative difference of pixels' sides from which on a warning tells
OWN_WORDS = {  # for parameters of a run, of which messages speak
    **{parameter: name for name, parameter in DATASET_PARAMETERS.items()},
    "LABEL_COLUMN_NAME": "attribute", "CLASSES": "classes", "PATCH_SIZES": "PatchOptions.size",
    "BLOCK_SIZE": "PatchOptions.block_size", "SPLIT_BY": "PatchOptions.split_by",
    "TEST_PROPORTION": "PatchOptions.test_proportion",
    "VALIDATION_PROPORTION": "PatchOptions.validation_proportion",
    "MIN_VALID": "PatchOptions.min_valid", "CENSORED_PIXELS_LIMIT": "PatchOptions.pixel_limit",
    "SEED": "PatchOptions.seed",
}  # fmt: skip
PARAMETER = re.compile(r"(?<![\w/'\"])[A-Z_]{4,}(?![\w/'\"]|\.\w)")  # in no path or quoted value


@dataclass(frozen=True)
class TrainingDataset:
    """An image with the classes of its pixels; `+` makes a composite, `sum` one of any number.

    Attributes:
        image: A raster, see `fileio.Raster.open`.
        mask: Polygons or a mask raster, see `masks.read_labels`.
        bands: One-based indexes of the bands, in order; None: all but alpha.
        attribute: Of the polygons, which tells their class.
        classes: What the values mean, see `masks.make_table`; classes of different pairs that have
            the same name are one.
        mask_reference: Whether ground without a label is unknown, instead of background.
        layer: Of the mask's file, where it has several.
        coordinates: See `annotations.ReadingOptions`.
        attribute_filter: Likewise.
        default_label: Likewise.
        resolution: Side of the pixels in which it is read, on the ground in m, see
            `fileio.resampled`; None: as they are.
        tags: Words that describe it.
        weight: How often its training patches come, relative to those of other pairs, > 0.
    """

    image: Path | str
    mask: Path | str
    bands: tuple[int, ...] | None = None
    attribute: str | None = None
    classes: Mapping[str, str] | tuple[str, ...] | None = None
    mask_reference: bool = False
    layer: str | None = None
    coordinates: str = "auto"
    attribute_filter: str | None = None
    default_label: str | None = None
    resolution: float | None = None
    tags: tuple[str, ...] = ()
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Find the files from any folder, for other processes; refuse a weight that is none."""
        for name in ("image", "mask"):
            if (path := Path(getattr(self, name))).exists():
                object.__setattr__(self, name, path.absolute())
        if not (np.isfinite(self.weight) and self.weight > 0):
            raise InputError(f"weight must be > 0, got {self.weight:g}; leave the pair out instead")

    @property
    def identifier(self) -> str:
        """Name of the image in every table."""
        return Path(self.image).stem

    @cached_property
    def raster(self) -> fileio.Raster:
        """Handle of the image."""
        return fileio.resampled(fileio.read_raster(self.image, self.bands), self.resolution)

    @property
    def made_from(self) -> dict[str, object]:
        """What patches of the pair depend on: the content of its files, and how they are read."""
        plain = {
            f.name: getattr(self, f.name) for f in fields(self)
            if f.name not in ("image", "mask", "tags", "weight")
        }  # fmt: skip
        mask = Path(self.mask)
        if mask.suffix.lower() in masks.MASK_SUFFIXES:
            content: object = fileio.raster_fingerprint(fileio.read_raster(self.mask))
        else:
            files = [path for path in fileio.files_of(mask) if path.is_file()]
            content = [[path.name, fileio.content_fingerprint(path)] for path in files]
            content = content or str(self.mask)  # remote
        image = fileio.raster_fingerprint(self.raster)
        return plain | {"bands": self.raster.bands, "image": image, "mask": content}

    def read_labels(self, workers: int | None = 1) -> masks.Labels:
        """Read the labels, with classes of this pair only."""
        return masks.read_labels(
            self.mask, self.raster, **{name: getattr(self, name) for name in LABEL_OPTIONS},
            workers=workers,
        )  # fmt: skip

    def __add__(
        self, other: TrainingDataset | CompositeTrainingDataset
    ) -> CompositeTrainingDataset:
        """Return both together."""
        return CompositeTrainingDataset((self,)) + other

    def __radd__(self, nothing: int) -> CompositeTrainingDataset:
        """Let `sum` begin with nothing."""
        return CompositeTrainingDataset((self,)) if nothing == 0 else NotImplemented


@dataclass(frozen=True)
class PatchOptions:
    """How ground is split and cut into patches.

    Attributes:
        size: Side of the patches in px.
        overlap: Least overlap of neighbouring training patches in px.
        split_by: "block": blocks of every image; "raster": whole images.
        block_size: Least side of a block in px; None: see `splits.ground_blocks`.
        test_proportion: Of all blocks.
        validation_proportion: Of the blocks that are not test.
        filters: Training patches that one of them rejects are left out, with its name as reason.
        pixel_limit: Handed to every filter.
        min_valid: Least share of a training patch that is valid ground.
        min_annotated: Least percentage of a training patch with a class other than background.
        seed: Of the split.
    """

    size: int = 256
    overlap: int = 0
    split_by: str = "block"
    block_size: int | None = None
    test_proportion: float = 0.2
    validation_proportion: float = 0.25
    filters: tuple[tiling.TileFilter, ...] = (tiling.constant_filter,)
    pixel_limit: int = 0
    min_valid: float = 0.25
    min_annotated: float = 0.0
    seed: int = 0


class Prepared(NamedTuple):
    """What is prepared, and the key of what it was made of."""

    key: str
    images: list[ImageData]
    blocks: pd.DataFrame
    tilings: dict[int, Path]


@dataclass(slots=True)
class CompositeTrainingDataset:
    """Pairs of image and mask that are trained on together.

    Attributes:
        constituents: The pairs, in the order of their names, whatever order they were added in.
        options: See `PatchOptions`.
        cache_directory: Folder of all prepared arrays and tile indexes.
        prepared: What `prepare` made; None: nothing yet.
    """

    constituents: tuple[TrainingDataset, ...]
    options: PatchOptions = PatchOptions()
    cache_directory: Path = Path("data/cache")
    prepared: Prepared | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Put the pairs in order; equal ones are one."""
        distinct = {repr(pair): pair for pair in self.constituents}
        self.constituents = tuple(
            sorted(distinct.values(), key=lambda pair: (pair.identifier, repr(pair)))
        )
        names = [pair.identifier for pair in self.constituents]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(
                f"images must differ in their stems, which name them; {doubled} occur more than "
                "once. Rename them, or link to them"
            )

    @classmethod
    def of_registry(
        cls,
        registry: Mapping[str, NamedDataset],
        names: Sequence[str],
        options: PatchOptions | None = None,
    ) -> CompositeTrainingDataset:
        """Make one of named datasets.

        Args:
            registry: See `read_registry`.
            names: Of datasets, or `tag:` with a tag; see `manifest.select_datasets`.
            options: See `PatchOptions`.
        """
        same = (*LABEL_OPTIONS, "bands", "resolution", "weight")
        pairs = [
            TrainingDataset(
                image, mask, tags=(named.name, *named.tags),
                **{name: getattr(named, name) for name in same},
            )
            for named in select_datasets(registry, names)
            for image, mask in zip(named.images, named.masks, strict=True)
        ]  # fmt: skip
        return cls(tuple(pairs), options or PatchOptions())

    def __add__(
        self, other: TrainingDataset | CompositeTrainingDataset
    ) -> CompositeTrainingDataset:
        """Return all pairs of both together, with nothing prepared.

        Raises:
            InputError: They have different options.
        """
        if isinstance(other, TrainingDataset):
            other = CompositeTrainingDataset((other,), self.options, self.cache_directory)
        if (self.options, self.cache_directory) != (other.options, other.cache_directory):
            raise InputError(
                f"datasets that are added need the same options, got {self.options} in "
                f"{self.cache_directory} and {other.options} in {other.cache_directory}; set them "
                "on the sum"
            )
        pairs = (*self.constituents, *other.constituents)
        return CompositeTrainingDataset(pairs, self.options, self.cache_directory)

    def __radd__(self, nothing: int) -> CompositeTrainingDataset:
        """Let `sum` begin with nothing."""
        return self if nothing == 0 else NotImplemented

    @property
    def key(self) -> str:
        """Name of what is prepared: of the content of all files, and of all options."""
        with _in_own_words():
            pairs = [[pair.identifier, pair.made_from] for pair in self.constituents]
        return fileio.fingerprint(
            {"pairs": pairs, "options": vars(self.options), "layout": tilecache.PATCH_LAYOUT}
        )

    def _folder(self, key: str) -> Path:
        """Return where the tile index is, and the name of the folder with the prepared arrays."""
        return Path(self.cache_directory).absolute() / f"composite-{key}"

    # -- preparing ------------------------------------------------------------------------------

    def prepare(
        self,
        *,
        workers: int | None = None,
        scheduler: str | None = None,
        progress: bool = False,
    ) -> CompositeTrainingDataset:
        """Open all files, split the ground, cut it into patches and prune them.

        Args:
            workers: Processes that look at pixels; None: all cores.
            scheduler: Of a Dask cluster that is to do it.
            progress: Show bars.

        Returns:
            Itself.

        Raises:
            InputError: A file cannot be used, the images do not fit together, or splits would share
                ground.
        """
        with _in_own_words():
            self._prepare(workers=workers, scheduler=scheduler, progress=progress)
        return self

    def _prepare(self, *, workers: int | None, scheduler: str | None, progress: bool) -> None:
        options, key = self.options, self.key
        rasters = [pair.raster for pair in self.constituents]
        span = fileio.resolution_range(rasters)
        if span and span[1] > (1 + RESOLUTION_TOLERANCE) * span[0]:
            log.warning(
                "the images have pixels of %.3g to %.3g m; give every pair the same resolution to "
                "read them in one", *span,
            )  # fmt: skip
        if len({raster.bands for raster in rasters}) > 1:
            log.warning(
                "different bands are read of the images, so that a prediction has to be told which "
                "to read (bands, --bands)"
            )
        fileio.check_kinds(rasters, "images of a composite", "choose bands of each")
        labels = [pair.read_labels(workers) for pair in self.constituents]
        images = [
            ImageData(raster, raster.identifier, masks.empty_table(), source)
            for raster, source in zip(rasters, _with_common_classes(labels), strict=True)
        ]
        blocks = splits.ground_blocks(
            rasters, split_by=options.split_by, max_tile_size=options.size,
            block_size=options.block_size, test_proportion=options.test_proportion,
            validation_proportion=options.validation_proportion, seed=options.seed,
        )  # fmt: skip
        tiled = tiling.TilingOptions(
            overlap=options.overlap, filters=options.filters, pixel_limit=options.pixel_limit,
            min_valid=options.min_valid, min_annotated=options.min_annotated, seed=options.seed,
            evaluation_overlap=tiling.evaluation_overlap(images),
        )  # fmt: skip
        tilings = tiling.make_tiles(
            images, blocks, [options.size], self._folder(key) / "index", tiled,
            workers=workers, scheduler=scheduler, progress=progress,
        )  # fmt: skip
        tiles, _ = tiling.read_tiles(tilings[options.size])
        splits.audit_splits(tiles[tiles["kept"]], {raster.identifier: raster for raster in rasters})
        self.prepared = Prepared(key, images, blocks, tilings)
        self._warn_of_splits()

    @property
    def tiles(self) -> pd.DataFrame:
        """The tile index, with `kept` and the `reason` why not; see `tiling.read_tiles`."""
        (index,) = self.tilings.values()
        tiles, _ = tiling.read_tiles(index)
        return tiles

    @property
    def images(self) -> list[ImageData]:
        """The labelled rasters."""
        return self._made.images

    @property
    def blocks(self) -> pd.DataFrame:
        """Blocks of ground, see `splits.ground_blocks`."""
        return self._made.blocks

    @property
    def tilings(self) -> dict[int, Path]:
        """Size -> folder of the tile index; `trials.prepare_search` takes it as the notebook's."""
        return self._made.tilings

    @property
    def classes(self) -> masks.ClassTable:
        """The classes of all pairs."""
        return self.images[0].labels.classes

    def describe(self) -> pd.DataFrame:
        """Count patches per image and split, those kept and those left out, with their reasons.

        Returns:
            A row per image, split and reason ("" for those kept): `raster, split, reason, patches`,
            and `share` of all patches of the image.
        """
        tiles = self.tiles
        table = tiles.groupby(["raster", "split", "reason"]).size().rename("patches").reset_index()
        total = table.groupby("raster")["patches"].transform("sum")
        return table.assign(share=table["patches"] / total)

    def weights(self, tiles: pd.DataFrame) -> np.ndarray:
        """Return how often each of some tiles is due, by the weight of its pair, float64 (N,)."""
        return tiles["raster"].map(dict(self.raster_weights)).to_numpy(dtype=np.float64)

    @property
    def raster_weights(self) -> tuple[tuple[str, float], ...]:
        """The weights of all pairs, as `train.raster_weights` of a configuration has them."""
        return tuple((pair.identifier, pair.weight) for pair in self.constituents)

    @property
    def _made(self) -> Prepared:
        if self.prepared is None:
            raise InputError("nothing is prepared yet; call prepare() first")
        return self.prepared

    def _warn_of_splits(self) -> None:
        tiles = self.tiles
        kept = tiles[tiles["kept"]]
        for name in (pair.identifier for pair in self.constituents):
            seen = set(kept["split"][kept["raster"] == name])
            lacking = [split for split in SPLITS if split not in seen]
            if not seen:
                log.warning("%s has no patch; describe() tells why each was left out", name)
            elif lacking and self.options.split_by == "block":
                log.warning(
                    "%s has no patch for %s; a lower PatchOptions.block_size, or another seed, "
                    "spreads it", name, " and ".join(lacking),
                )  # fmt: skip

    # -- prepared arrays ------------------------------------------------------------------------

    def save_prepared_arrays(
        self,
        *,
        workers: int | None = None,
        scheduler: str | None = None,
        progress: bool = False,
    ) -> dict[str, tilecache.Patches]:
        """Write the patches to disk, or what of them is not there yet.

        Args:
            workers: Processes that read; None: all cores.
            scheduler: Of a Dask cluster that is to read.
            progress: Show a bar.

        Returns:
            The patches of each split.
        """
        made = self._made
        if self.key != made.key:
            raise InputError("files or options have changed since prepare(); call it again")
        given = (
            self.tiles,
            {image.image_identifier: image.raster for image in made.images},
            {image.image_identifier: image.labels for image in made.images},
        )
        folder = tilecache.patches_folder(*given, Path(self.cache_directory))
        fileio.write_text(self._folder(made.key) / ARRAYS, folder.name)
        tilecache.cache_patches(
            *given, folder, workers=workers, scheduler=scheduler, progress=progress
        )
        return {split: tilecache.open_patches(folder, split) for split in SPLITS}

    def load_prepared_arrays(self) -> dict[str, tilecache.Patches]:
        """Return the patches of each split that were saved for the same files and options.

        Raises:
            InputError: There are none.
        """
        folder = self._arrays(self.key)
        if folder is None or not tilecache.is_complete(folder):
            raise InputError(
                f"no arrays are saved in {self.cache_directory} for these files and options; call "
                "prepare() and save_prepared_arrays(), which go on where they were stopped"
            )
        return {split: tilecache.open_patches(folder, split) for split in SPLITS}

    def delete_prepared_arrays(self) -> None:
        """Delete what was prepared, or else what is there of these files and options.

        The files stay. Composites with the very same patches lose theirs.
        """
        key = self.key if self.prepared is None else self.prepared.key
        for folder in (self._arrays(key), self._folder(key)):
            if folder is not None and folder.is_dir():
                with fileio.exclusive(folder):
                    for name in (tilecache.MANIFEST, tilecache.DONE):  # what is left is nothing
                        (folder / name).unlink(missing_ok=True)
                    shutil.rmtree(folder)
        self.prepared = None

    def _arrays(self, key: str) -> Path | None:
        """Return the folder of the patches, complete or not; None: there is none."""
        try:
            name = (self._folder(key) / ARRAYS).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        return self._folder(key).with_name(name)


@contextmanager
def _in_own_words() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        told = PARAMETER.sub(lambda found: OWN_WORDS.get(found[0], found[0]), str(error))
        raise InputError(told) from error


def _with_common_classes(labels: Sequence[masks.Labels]) -> list[masks.Labels]:
    """Give labels, each with classes of its own, one table; names say which classes are one."""
    names = {name for source in labels for name in source.classes.names}
    common = [masks.BACKGROUND] * (masks.BACKGROUND in names)
    common = (*common, *sorted(names - {masks.BACKGROUND}))
    return [
        source.with_classes(
            masks.ClassTable(
                common,
                {
                    value: common.index(source.classes.names[i])
                    for value, i in source.classes.values.items()  # noqa: PD011
                },
            )
        )
        for source in labels
    ]
