"""An epoch of training patches with masks: views of compressed rasters, and prepared arrays.

    python benchmarks/bench_composite.py [--short] [--sizes PATCHES ...] [--json FILE]

Two rasters of three bands of 8 bits with their mask rasters, as people have them: tiles of 256 px,
deflate with predictor 2; and once more in zstd. Patches have 128 px and overlap by half. What is
timed is one epoch of items as a training takes them: stretched to float32, with the mask as int64.
Views are visited in random order, prepared arrays block by block. "arrays only" is the part of that
which is reading: nothing is made of the pixels. Making the arrays is measured, too.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import common
import numpy as np
import rasterio

import imutils
import tilecache
from composite import CompositeTrainingDataset, PatchOptions, TrainingDataset
from datasets import BlockSampler, MaskDataset, PatchDataset, TileSampler

SIZE, GROUND = 128, 512  # px, sides of patches and of ground blocks
CODECS = {"deflate": {"compress": "deflate", "predictor": 2}, "zstd": {"compress": "zstd"}}
SEEN = imutils.Radiometry("none", (0.0,) * 3, (255.0,) * 3, (0.5,) * 3, (0.2,) * 3)


def make(folder: Path, count: int) -> None:
    """Write two rasters and their masks in every codec, and the prepared arrays of one of them."""
    per_block = (GROUND // SIZE * 2 - 1) ** 2
    side = GROUND * math.ceil(math.sqrt(count / per_block / 2 / 0.96))  # two, and the other splits
    common.write_raster(folder / "plain.tif", side)
    for codec, layout in CODECS.items():
        (folder / codec).mkdir()
        for name, phase in (("a", 0.0), ("b", 1.0)):
            with rasterio.open(folder / "plain.tif") as src:
                profile = src.profile | layout
                with (
                    rasterio.open(folder / codec / f"{name}.tif", "w", **profile) as image,
                    rasterio.open(
                        folder / codec / f"{name}_mask.tif", "w", **profile | {"count": 1}
                    ) as mask,
                ):
                    x = np.arange(side)
                    for top in range(0, side, 256):
                        window = ((top, top + 256), (0, side))
                        image.write(src.read(window=window), window=window)
                        y = top + np.arange(256)[:, None]
                        kind = np.sin(x / 40 + phase) + np.cos(y / 30) > 0.3
                        mask.write(1 + kind.astype(np.uint8), 1, window=window)
            # apart on the map, for ground that two splits share is refused
            if name == "b":
                for file in (f"{name}.tif", f"{name}_mask.tif"):
                    with rasterio.open(folder / codec / file, "r+") as dst:
                        dst.transform = rasterio.Affine(1, 0, 500_000, 0, -1, 5_600_000)
    (folder / "plain.tif").unlink()
    for codec in CODECS:
        composite(folder, codec).prepare()
    composite(folder, "deflate").prepare().save_prepared_arrays()


def composite(folder: Path, codec: str) -> CompositeTrainingDataset:
    """Return both pairs."""
    both = sum(TrainingDataset(folder / codec / f"{n}.tif", folder / codec / f"{n}_mask.tif")
               for n in "ab")  # fmt: skip
    both.cache_directory = folder / "cache"
    both.options = PatchOptions(
        size=SIZE, overlap=SIZE // 2, block_size=GROUND, test_proportion=0.02,
        validation_proportion=0.02,
    )  # fmt: skip
    return both


def views(folder: Path, count: int, codec: str) -> common.Work:
    """Read items from the rasters, in random order."""
    both = composite(folder, codec).prepare()
    tiles = both.tiles[both.tiles["kept"] & (both.tiles["split"] == "train")]
    rasters = {image.image_identifier: image.raster for image in both.images}
    labels = {image.image_identifier: image.labels for image in both.images}
    dataset = MaskDataset(tiles, rasters, labels, SEEN)
    return partial(_epoch, dataset, TileSampler(np.ones(len(dataset))), count)


def blocks(folder: Path, count: int) -> common.Work:
    """Read items from the prepared arrays, block by block."""
    dataset = PatchDataset(composite(folder, "deflate").load_prepared_arrays()["train"], SEEN)
    sampler = BlockSampler(dataset.blocks_of_tiles, np.ones(len(dataset)))
    return partial(_epoch, dataset, sampler, count)


def at_random(folder: Path, count: int) -> common.Work:
    """Read items from the prepared arrays, in random order: each costs a block."""
    dataset = PatchDataset(composite(folder, "deflate").load_prepared_arrays()["train"], SEEN)
    return partial(_epoch, dataset, TileSampler(np.ones(len(dataset))), count)


def arrays(folder: Path, count: int) -> common.Work:
    """Read the prepared arrays only, and make no items of them."""
    patches = composite(folder, "deflate").load_prepared_arrays()["train"]

    def work() -> int:
        total = 0
        for number in np.random.default_rng(0).permutation(-(-len(patches) // patches.block)):
            images, _, masks = tilecache._block(patches.store, int(number))
            total += min(len(images), len(masks))
        return min(total, count)

    return work


def making(folder: Path, count: int) -> common.Work:
    """Prepare the arrays, once more each time, from deflate; the index is there already."""
    number = itertools.count()
    both = composite(folder, "deflate").prepare()
    rasters = {image.image_identifier: image.raster for image in both.images}
    labels = {image.image_identifier: image.labels for image in both.images}

    def work() -> int:
        place = folder / f"new_{next(number)}"
        given = both.tiles, rasters, labels
        tilecache.cache_patches(*given, tilecache.patches_folder(*given, place), workers=1)
        shutil.rmtree(place)
        return count

    return work


def _epoch(dataset: MaskDataset, sampler: TileSampler, count: int) -> int:
    """Take the items of an epoch, up to some number; return how many."""
    total, known = 0, 0
    for visit in itertools.islice(sampler, count):
        image, target = dataset[visit]
        total += image.shape[-1] == SIZE
        known += int(target["mask"][0, 0])
    return total


WAYS: dict[str, Callable[..., common.Work]] = {
    "deflate: views": partial(views, codec="deflate"),
    "zstd: views": partial(views, codec="zstd"),
    "prepared: blocks": blocks,
    "prepared: arrays only": arrays,
    "prepared: random order": at_random,
    "making the arrays": making,
}

if __name__ == "__main__":
    common.main(
        common.Stage(
            title="An epoch of patches with masks",
            size="patches",
            sizes=(20_000,),
            short=(2000,),
            make=make,
            ways=WAYS,
            against=dict.fromkeys(("deflate: views", "zstd: views"), "prepared: blocks"),
            agree=(("deflate: views", "zstd: views", "prepared: blocks"),),
            largest={"prepared: random order": 2000},
            once=("making the arrays",),
            aims=(
                common.Aim("prepared: blocks", "deflate: views", 3),
                common.Aim("prepared: blocks", "zstd: views", 3),
            ),
            runs=3,
        ),
        __doc__,
    )
