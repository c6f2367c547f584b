"""Torch data: tiles, targets, augmentation, loaders."""

from __future__ import annotations

import itertools
import pickle
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segments import CLASSES, make_segments, write_band
from torchvision import tv_tensors
from torchvision.transforms import v2

import datasets
import fileio
import masks
import tiling
from datasets import BboxDataset, RandomViews, Targets, TileDataModule, TileSampler
from ImageData import BOX_COLUMNS, IGNORE, ImageData, InputError, Window
from imutils import STRETCHES, Radiometry, measure_radiometry
from ModelConfig import AugmentConfig, HdrLogOptions, ModelConfig


def module_of(prepared, **options):
    data = prepared.data
    conf = options.pop("conf", ModelConfig(batch_size=4))
    return TileDataModule(
        prepared.tiles, prepared.boxes, data.rasters, data.ids, data.radiometry, conf, **options
    )


def test_class_ids_follow_the_names():
    assert datasets.class_ids(["b", "c", "a", "b"]) == {"a": 0, "b": 1, "c": 2}


def test_an_item_is_the_stretched_window_with_its_boxes(prepared):
    module = module_of(prepared)
    dataset = BboxDataset(
        module.train.tiles, prepared.boxes, prepared.data.rasters, prepared.data.ids,
        prepared.data.radiometry,
    )  # fmt: skip
    for index in (0, 1, 2, 3):  # one window in its four turns
        tile = dataset.tiles.iloc[index]
        image, target = dataset[index]
        window = Window(*(int(tile[c]) for c in tiling.WINDOW_COLUMNS))
        raw = np.rot90(
            prepared.data.rasters[tile["raster"]].read(window), tile["angle"] // 90, (1, 2)
        )
        np.testing.assert_allclose(image.numpy(), raw / np.float32(255), rtol=1e-5)
        shown = prepared.boxes[prepared.boxes["window"] == tile["window"]]
        assert len(target["boxes"]) == len(target["labels"]) == len(shown)
        names = sorted(prepared.data.ids)
        assert [names[i] for i in target["labels"]] == shown["label"].tolist()
        assert target["boxes"].dtype == torch.float32


def test_targets_of_evaluation_own_every_object_once(prepared):
    module = module_of(prepared)
    seen = []
    for _, target in module.test:
        owned = target["truth_owned"]
        center = (target["truth_boxes"][:, :2] + target["truth_boxes"][:, 2:]) / 2
        core = target["core"]
        assert (center[owned] >= core[:2] - 40).all()
        seen += [(int(target["ground"]), int(i)) for i in target["truth_ids"][owned]]
    assert len(seen) == len(set(seen)) == module.test.tiles["objects"].sum()


def test_loaders_batch_and_shuffle_by_seed(prepared):
    def first_batch(seed):
        module = module_of(prepared, conf=ModelConfig(batch_size=4, seed=seed))
        torch.manual_seed(0)
        images, targets = next(iter(module.train_dataloader()))
        assert images.shape == (4, 1, 128, 128)
        assert len(targets) == 4
        return [len(t["labels"]) for t in targets]

    assert first_batch(0) == first_batch(0)
    assert first_batch(0) != first_batch(1)


def test_worker_processes_read_the_same_tiles(prepared):
    module = module_of(prepared)
    alone = torch.cat([images for images, _ in module.test_dataloader()])
    module = module_of(prepared, conf=ModelConfig(batch_size=4, workers=1))
    np.testing.assert_array_equal(
        alone, torch.cat([images for images, _ in module.test_dataloader()])
    )


def test_a_sample_thins_training_and_validation_but_not_the_final_measures(prepared):
    whole, half = module_of(prepared), module_of(prepared, sample_size=0.5)
    assert len(half.train) < len(whole.train)
    assert len(half.validation) < len(whole.validation)
    assert len(half.full_validation) == len(whole.full_validation) == len(whole.validation)
    assert len(half.test) == len(whole.test)


# ---------------------------------------------------------------------------------------------
# Augmentation
# ---------------------------------------------------------------------------------------------

OFF = {
    "flips": False, "turns": False, "zoom": 1, "contrast": 0, "brightness": 0, "gamma": 1,
    "noise": 0, "blur": 0, "band_dropout": 0, "mosaic": 0,
}  # fmt: skip
STRONG = {
    "flips": {"flips": True},
    "turns": {"turns": True},
    "gain": {"contrast": 0.3, "brightness": 1.0},
    "gamma": {"gamma": 2.0},
    "noise": {"noise": 0.3, "noise_share": 1.0},
    "blur": {"blur": 1.0, "blur_share": 1.0},
    "dropout": {"band_dropout": 0.5},
    "exposure": {"exposure": 2.0},
    "all": {
        "flips": True, "turns": True, "contrast": 0.3, "brightness": 1.0, "gamma": 1.5,
        "noise": 0.2, "noise_share": 1.0, "blur": 0.8, "blur_share": 1.0, "band_dropout": 0.3,
    },
}  # fmt: skip


def radiometry_of(bands):
    return Radiometry(
        "none", *(tuple([v] * bands) for v in (0.0, 1.0, 0.1, 0.2))
    )  # low, high, mean, std


def transform_of(bands=1, **options):
    return datasets.training_transform(AugmentConfig(**(OFF | options)), radiometry_of(bands))


def bounds_of(bright):
    ys, xs = torch.nonzero(bright, as_tuple=True)
    return torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()


@pytest.mark.parametrize("bands", [1, 3, 5])
@pytest.mark.parametrize("name", STRONG)
def test_each_transform_keeps_boxes_and_masks_on_their_objects(name, bands):
    transform = transform_of(bands, **STRONG[name]) or v2.Identity()  # one band never drops out
    places = set()
    for seed in range(24):
        torch.manual_seed(seed)
        image = torch.zeros(bands, 40, 40)
        image[:, 8:14, 4:13] = 1.0
        counted = torch.ones(40, 40, dtype=torch.bool)
        counted[8:14, 4:13] = False
        target = {
            "boxes": tv_tensors.BoundingBoxes(
                torch.tensor([[4.0, 8, 13, 14]]), format="XYXY", canvas_size=(40, 40)
            ),
            "labels": torch.tensor([3]),
            "counted": tv_tensors.Mask(counted),
        }
        out, target = transform(tv_tensors.Image(image), target)
        total = out.as_subclass(torch.Tensor).mean(0)
        found = bounds_of(total > (total.min() + total.max()) / 2)
        assert out.shape == image.shape
        assert (found - target["boxes"][0]).abs().max() <= 1, "pixels blurred and noisy by one px"
        assert bounds_of(~target["counted"]).tolist() == target["boxes"][0].tolist()
        assert target["labels"].tolist() == [3]
        places.add(tuple(target["boxes"][0].int().tolist()))
    assert len(places) == {"flips": 2, "turns": 4, "all": len(places)}.get(name, 1)


def test_amplitudes_are_in_units_of_the_input():
    torch.manual_seed(0)
    image = tv_tensors.Image(torch.full((2, 64, 64), 0.5))
    noisy = [transform_of(2, noise=0.5, noise_share=1)(image) for _ in range(50)]
    spread = torch.stack([n.std() for n in noisy])
    assert 0.08 < spread.max() < 0.105, "half of the input's 0.2, drawn from 0 on"
    shifts = torch.stack([transform_of(2, brightness=2)(image).mean() for _ in range(200)]) - 0.5
    assert 0.38 < shifts.max() <= 0.4
    assert -0.4 <= shifts.min() < -0.38
    bent = torch.stack([transform_of(2, gamma=2)(image).mean() for _ in range(200)])
    assert 0.25 <= bent.min() < 0.27
    assert 0.69 < bent.max() <= 0.5**0.5 + 1e-6


def test_gamma_leaves_values_beyond_the_stretch_in_their_order():
    values = torch.linspace(-2, 3, 4096).reshape(1, 64, 64)
    out = datasets.RandomGamma(2.0)(tv_tensors.Image(values)).flatten()
    assert (out.diff() > -1e-6).all()
    assert torch.equal(out[[0, -1]], torch.tensor([-2.0, 3]))


@pytest.mark.parametrize("method", STRETCHES)
def test_exposure_multiplies_what_was_stretched(method):
    rng = np.random.default_rng(0)
    raw = rng.lognormal(0, 2, (3, 32, 32)).astype(np.float32)
    radiometry = measure_radiometry(raw.reshape(3, -1), method, (0, 100))
    transform = datasets.RandomExposure(3.0, radiometry)
    image = tv_tensors.Image(torch.from_numpy(radiometry.stretch(raw)))
    stops = []
    for seed in range(40):
        torch.manual_seed(seed)
        factor = transform.make_params([])["factor"]
        torch.manual_seed(seed)
        out = transform(image)
        assert out.dtype == torch.float32
        expected = radiometry.stretch(raw * np.float32(factor))
        np.testing.assert_allclose(out.numpy(), expected, rtol=1e-3, atol=1e-3)
        stops.append(np.log2(factor))
    assert -3 <= min(stops) < -2
    assert 2 < max(stops) <= 3


def test_a_clipped_sun_darkens_and_never_exceeds_its_clip():
    options = HdrLogOptions(clip=100.0)
    raw = np.array([[[1.0, 99, 5000]]], np.float32)
    radiometry = measure_radiometry(raw.reshape(1, -1), "hdr_log", options=options)
    change = datasets.RandomExposure(2.0, radiometry).change
    image = torch.from_numpy(radiometry.stretch(raw))
    for factor, expected in ((0.5, [0.5, 49.5, 50]), (4, [4.0, 100, 100])):
        seen = radiometry.unstretch(change(image, factor).numpy())
        np.testing.assert_allclose(seen, [[expected]], rtol=1e-4)


@pytest.mark.parametrize("bands", [1, 2, 5])
@pytest.mark.parametrize("probability", [0.5, 1.0])
def test_a_band_always_stays(bands, probability):
    torch.manual_seed(0)
    drop = datasets.BandDropout(probability, [0.1] * bands)
    dropped = torch.zeros(bands)
    for _ in range(200):
        gone = drop(tv_tensors.Image(torch.ones(bands, 4, 4))).mean((1, 2)) < 0.5
        assert not gone.all()
        dropped += gone
    expected = 200 * probability * (bands - 1) / bands
    np.testing.assert_allclose(dropped, expected, atol=30)


def test_every_part_can_be_switched_off():
    assert transform_of() is None
    assert datasets.training_transform(AugmentConfig(enabled=False), radiometry_of(1)) is None
    for name, options in STRONG.items():
        assert len(transform_of(3, **options).transforms) == (7 if name == "all" else 1)


# ---------------------------------------------------------------------------------------------
# Random windows
# ---------------------------------------------------------------------------------------------


def index_of(df, blocks, size, overlap=0):
    """The tile index of one raster "r" with objects and training blocks (x, y, width, height)."""
    blocks = pd.DataFrame(blocks, columns=["x", "y", "width", "height"]).assign(
        block=range(len(blocks)), raster="r", split="train"
    )
    image = ImageData(None, "r", df)
    tiles, boxes = tiling.generate_split_raster_annotation(
        size, image, blocks, tiling.TilingOptions(overlap=overlap, min_visible=0.01)
    )
    return tiles.assign(kept=True, angle=0, tile=tiles["window"]), boxes


def objects_of(rng, count, width, height):
    center = rng.uniform(0, [width, height], (count, 2))
    half = rng.uniform(0.5, 20, (count, 2))
    boxes = np.concatenate([center - half, center + half], axis=1)
    boxes = boxes.clip(0, [width, height, width, height])
    return pd.DataFrame(boxes, columns=BOX_COLUMNS).assign(label=rng.choice(["a", "b"], count))


@settings(deadline=None, max_examples=30)
@given(
    st.integers(24, 60), st.integers(0, 20), st.floats(1, 3), st.floats(0.01, 1),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_random_windows_stay_in_their_block_and_show_what_tiles_would(
    size, overlap, zoom, min_visible, seed
):
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    widths = rng.integers(size, 4 * size, 2).tolist()
    height = int(rng.integers(size, 4 * size))
    grounds = [(0, 0, widths[0], height), (widths[0], 0, widths[1], height)]
    df = objects_of(rng, 60, sum(widths), height)
    tiles, boxes = index_of(df, grounds, size, overlap)
    views = RandomViews(tiles, boxes, {"a": 0, "b": 1}, zoom=zoom, min_visible=min_visible)
    block_of = tiles.set_index("window")["block"]
    reach = views.reach(tiles)[tiling.WINDOW_COLUMNS]
    for row in rng.integers(len(tiles), size=4):
        tile = tiles.iloc[row]
        x, y, width, height = grounds[tile["block"]]
        core = tile[tiling.CORE_COLUMNS].to_numpy(dtype=float)
        own = Window(*tile[tiling.WINDOW_COLUMNS])
        window = views.draw(tile["block"], core, own)
        assert x <= window.x <= window.x + window.width <= x + width
        assert y <= window.y <= window.y + window.height <= y + height
        reached = Window(*reach.iloc[row])
        assert reached.x <= window.x <= window.x + window.width <= reached.x + reached.width
        assert reached.y <= window.y <= window.y + window.height <= reached.y + reached.height
        assert size / zoom - 1 <= window.width == window.height <= size * zoom + 1

        # the oracle knows the objects of the index, cut at their block
        known = boxes.loc[boxes["window"].map(block_of) == tile["block"], "object"].unique()
        cut = df.loc[np.sort(known)].copy()
        cut[["xmin", "xmax"]] = cut[["xmin", "xmax"]].clip(x, x + width)
        sides = {"x": window.x, "y": window.y, "width": window.width, "height": window.height}
        ends = dict(zip(tiling.CORE_COLUMNS, [window.x, window.y, window.x + window.width,
                        window.y + window.height], strict=True))  # fmt: skip
        block = dict(zip(tiling.BLOCK_COLUMNS, [x, y, x + width, y + height], strict=True))
        one = pd.DataFrame([{"window": 0, **sides, **ends, **block}])
        expected = tiling.assign_boxes(one, cut, min_visible).replace({"label": {"a": 0, "b": 1}})
        expected = expected[[*BOX_COLUMNS, "label"]].to_numpy(dtype=float)
        found, labels = views.boxes_in(tile["block"], window)
        found = np.hstack([found, labels[:, None]])
        np.testing.assert_allclose(
            found[np.lexsort(found.T)], expected[np.lexsort(expected.T)], atol=1e-9
        )


@pytest.mark.parametrize(("overlap", "height", "slack"), [(0, 160, 0.15), (8, 152, 0.2)])
def test_random_windows_see_all_ground_about_equally(overlap, height, slack):
    width = 192 if overlap == 0 else 200  # the grid fits without a remainder
    df = objects_of(np.random.default_rng(0), 5, width, height)
    tiles, boxes = index_of(df, [(7, 3, width, height)], 32, overlap)
    views = RandomViews(tiles, boxes, {"a": 0, "b": 1}, zoom=1.4)
    torch.manual_seed(0)
    seen, sides = np.zeros((3 + height, 7 + width)), []
    cores = tiles[tiling.CORE_COLUMNS].to_numpy(dtype=float)
    windows = [Window(*row) for row in tiles[tiling.WINDOW_COLUMNS].to_numpy().tolist()]
    for _ in range(30000 // len(tiles)):
        for core, own in zip(cores, windows, strict=True):
            x, y, side, _ = views.draw(0, core, own)
            seen[y : y + side, x : x + side] += 1
            sides.append(side)
    edge = 45  # the largest window; one moved off the edge is seen twice up to there
    inner = seen[3 + edge : -edge, 7 + edge : -edge]
    assert 1 - slack < inner.min() / inner.mean()
    assert inner.max() / inner.mean() < 1 + slack
    assert seen[3:, 7:].min() > 0.15 * inner.mean(), "a corner is seen about a quarter as often"
    assert seen.max() < 2.5 * inner.mean(), "1.5 per axis, a window away from the edges"
    assert seen[3:, 7:].mean() == pytest.approx(inner.mean(), rel=0.2)
    assert np.mean(np.log(np.array(sides) / 32)) == pytest.approx(0, abs=0.02)
    assert (min(sides), max(sides)) == (23, 45)


def test_a_block_smaller_than_the_tile_is_padded_not_moved():
    df = objects_of(np.random.default_rng(0), 5, 40, 20)
    tiles, boxes = index_of(df, [(0, 0, 40, 20)], 32)
    views = RandomViews(tiles, boxes, {"a": 0, "b": 1}, zoom=2.0)
    own = Window(*tiles.iloc[1][tiling.WINDOW_COLUMNS])
    core = tiles.iloc[1][tiling.CORE_COLUMNS].to_numpy(dtype=float)
    assert views.draw(0, core, own) == own == Window(8, 0, 32, 32)


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """A raster of black float ground with a bright marker in each of its 20 px cells.

    A corner of it has no data, and one marker in five bears the rare label.
    """
    path = tmp_path_factory.mktemp("marked") / "r.tif"
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:240:20, 0:300:20].reshape(2, -1)
    low = np.stack([x, y], 1) + rng.integers(2, 8, (len(x), 2))
    df = pd.DataFrame(np.hstack([low, low + rng.integers(5, 10, low.shape)]), columns=BOX_COLUMNS)
    df = df.astype(float)[~((x >= 260) & (y >= 200))]
    df["label"] = np.where(np.arange(len(df)) % 5, "a", "b")
    pixels = np.zeros((2, 240, 300), np.float32)
    for box in df[BOX_COLUMNS].astype(int).to_numpy():
        pixels[:, box[1] : box[3], box[0] : box[2]] = 1.0
    pixels[:, 200:, 260:] = -9.0
    options = {"width": 300, "height": 240, "count": 2, "dtype": "float32", "nodata": -9.0}
    with fileio.create_raster(path, **options) as dst:
        dst.write(pixels)
    tiles, boxes = index_of(df, [(0, 0, 140, 240), (140, 0, 160, 240)], 64)
    tiles = pd.concat([tiles.assign(angle=angle) for angle in (0, 90)], ignore_index=True)
    return SimpleNamespace(
        tiles=tiles, boxes=boxes, rasters={"r": fileio.read_raster(path)}, ids={"a": 0, "b": 1},
        radiometry=Radiometry("none", (0.0,) * 2, (1.0,) * 2, (0.25,) * 2, (0.4,) * 2),
    )  # fmt: skip


def views_of(marked, *, mosaic=0.0, **options):
    views = RandomViews(
        marked.tiles, marked.boxes, marked.ids, zoom=1.5, mosaic=mosaic, min_visible=1e-6
    )
    return BboxDataset(
        marked.tiles, marked.boxes, marked.rasters, marked.ids, marked.radiometry,
        transform=transform_of(2, **options), views=views,
    )  # fmt: skip


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
@pytest.mark.parametrize("turned", [False, True])
def test_boxes_of_random_views_lie_on_the_markers(marked, mosaic, turned):
    dataset = views_of(marked, mosaic=mosaic, flips=turned, turns=turned)
    sides, gone = [], []
    for index in range(len(dataset)):
        image, target = dataset[index, 1000 + index]
        assert image.shape == (2, 64, 64)
        assert target["tile"] == index
        counted = target.get("counted", torch.ones(64, 64, dtype=torch.bool))
        boxes = target["boxes"]
        assert len(boxes) == len(target["labels"]) > 0
        assert boxes.min() >= 0
        assert boxes.max() <= 64
        inner, outer = (torch.zeros(64, 64, dtype=torch.bool) for _ in range(2))
        for x0, y0, x1, y1 in boxes.tolist():
            right, bottom = max(round(x1 - 1), 0), max(round(y1 - 1), 0)
            inner[round(y0 + 1) : bottom, round(x0 + 1) : right] = True
            low, high = (max(int(v - 1), 0) for v in (x0, y0)), (int(v + 2) for v in (x1, y1))
            (left, top), (right, bottom) = low, high
            outer[top:bottom, left:right] = True
        assert (image[:, inner] > 0.5).all()
        assert (image[:, counted & ~outer] < 0.45).all(), "no marker is without a box"
        gone.append(image[:, ~counted].flatten())
        whole = ((boxes > 0) & (boxes < 64)).all(1)
        if whole.any():
            sides.append((boxes[:, 2:] - boxes[:, :2])[whole].mean())
    gone = torch.cat(gone)
    assert len(gone) > 500
    assert ((gone - 0.25).abs() < 0.13).float().mean() > 0.9, "no data is the mean"
    scale = torch.stack(sides) / 7.0  # markers of 5 to 9 px
    assert scale.max() / scale.min() > 1.6
    assert scale.mean() == pytest.approx(0.5 if mosaic else 1.0, rel=0.15)


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_frames_tell_where_a_step_in_the_raster_leads_in_the_view(marked, mosaic):
    step = torch.tensor([1.0, 2.0])
    named = marked.boxes.assign(label=marked.boxes["object"].astype(str))  # each its own
    moved = named.copy()
    moved[tiling.GROUND_BOX_COLUMNS] += step.repeat(2).numpy()
    ids = {label: i for i, label in enumerate(named["label"].unique())}
    before, after = (
        views_of(
            SimpleNamespace(**{**vars(marked), "boxes": boxes, "ids": ids}),
            mosaic=mosaic, flips=True, turns=True,
        )
        for boxes in (named, moved)
    )  # fmt: skip
    compared, kinds = 0, set()
    for index, seed in itertools.product(range(len(before)), range(4)):
        (_, old), (_, new) = (dataset[index, 10 * index + seed] for dataset in (before, after))
        if not torch.equal(old["labels"], new["labels"]):
            continue  # one left the window, or came
        whole = ((torch.cat([old["boxes"], new["boxes"]], 1) % 32) > 0).all(1)  # not cut
        found = (new["boxes"] - old["boxes"])[whole]
        torch.testing.assert_close(
            found, (old["frames"][whole] @ step).repeat(1, 2), atol=1e-4, rtol=0
        )
        compared += int(whole.sum())
        kinds |= {tuple(torch.sign(f.round(decimals=3)).flatten().tolist()) for f in old["frames"]}
    assert compared > 100
    assert len(kinds) == 8, "every turn, mirrored or not"


def test_a_tile_as_it_lies_knows_its_angle(marked):
    dataset = BboxDataset(marked.tiles, marked.boxes, marked.rasters, marked.ids, marked.radiometry)
    for index, angle in ((0, 0), (len(dataset) - 1, 90)):
        frames = dataset[index][1]["frames"]
        assert dataset.angles[index] == angle
        assert len(frames) > 0
        # counter-clockwise: what was to the right is above, what was below to the right
        expected = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]) if angle else torch.eye(2)
        assert torch.equal(frames, expected.expand(len(frames), 2, 2))


def test_an_index_without_seed_is_the_tile_as_it_lies(marked):
    dataset = views_of(marked, flips=True, turns=True, gamma=2.0)
    plain = BboxDataset(marked.tiles, marked.boxes, marked.rasters, marked.ids, marked.radiometry)
    for index in (0, 5, len(plain) - 1):
        assert torch.equal(dataset[index][0], plain[index][0])
        assert torch.equal(dataset[index][1]["boxes"], plain[index][1]["boxes"])
        assert torch.equal(plain[index, 7][0], plain[index][0]), "nothing to draw"


def test_an_item_follows_from_its_seed_and_leaves_the_generator_alone(marked):
    dataset = views_of(marked, **STRONG["all"])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, _ = dataset[3, 11]
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(100)
    assert torch.equal(first, dataset[3, 11][0])
    assert not torch.equal(first, dataset[3, 12][0])


def test_boxes_too_thin_for_float32_are_left_out(marked):
    boxes = np.array([[0, 0, 5, 5], [100, 3, 100.000001, 9]], dtype=np.float32)
    counted = np.ones((64, 64), dtype=bool)
    frames = np.stack([np.eye(2, dtype=np.float32)] * 2)
    parts = datasets.Parts(torch.zeros(1, 64, 64), counted, boxes, np.array([4, 5]), frames)
    _, target = BboxDataset._item(parts)
    assert target["boxes"].tolist() == [[0, 0, 5, 5]]
    assert target["labels"].tolist() == [4]
    assert target["frames"].tolist() == [[[1, 0], [0, 1]]]


def test_worker_processes_do_not_change_random_views(prepared):
    def epoch(workers):
        conf = ModelConfig(batch_size=8, workers=workers, seed=3)
        conf.train.augment = AugmentConfig(**STRONG["all"], mosaic=0.3)
        module = module_of(prepared, conf=conf)
        module.sampler.set_epoch(2)
        torch.manual_seed(workers)
        return list(module.train_dataloader())

    for (images, targets), (again, others) in zip(epoch(0), epoch(2), strict=True):
        assert torch.equal(images, again)
        for target, other in zip(targets, others, strict=True):
            assert target.keys() == other.keys()
            assert all(torch.equal(target[name], other[name]) for name in target)


def test_training_without_random_windows_keeps_the_grid(prepared):
    conf = ModelConfig(batch_size=4)
    conf.train.random_windows, conf.train.augment.enabled = False, False
    module = module_of(prepared, conf=conf)
    for row, seed in list(module.sampler)[:5]:
        assert torch.equal(module.train[row, seed][0], module.train[row][0])


# ---------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------


def visits_of(sampler):
    return np.bincount([row for row, _ in sampler], minlength=len(sampler.weights))


@pytest.mark.parametrize("weight", [1.0, 0.3, 1e-3])
@pytest.mark.parametrize("count", [1, 2, 1000, 4099])
def test_with_equal_weights_an_epoch_visits_each_tile_once(count, weight):
    sampler = TileSampler(np.full(count, weight), seed=1)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert (visits_of(sampler) == 1).all()
        orders.append(list(sampler))
        assert orders[-1] == list(sampler), "an epoch can be drawn again"
    assert count < 3 or orders[0] != orders[1] != orders[2]
    assert list(TileSampler(np.full(count, weight), seed=2)) != orders[0]


@settings(deadline=None)
@given(st.lists(st.floats(1, 50), min_size=1, max_size=200), st.integers(0, 2**32 - 1))
def test_visits_are_what_is_due_rounded_up_or_down(weights, seed):
    sampler = TileSampler(np.array(weights), seed=seed)
    visits, due = visits_of(sampler), sampler.expected_visits()
    assert visits.sum() == len(weights) == len(sampler)
    assert due.sum() == pytest.approx(len(weights))
    assert (np.abs(visits - due) < 1 + 1e-6).all()


def test_repeat_factors_balance_the_classes_of_an_epoch(marked):
    boxes = marked.boxes[(marked.boxes["label"] == "a") | (marked.boxes["window"] == 4)]
    dataset = BboxDataset(marked.tiles, boxes, marked.rasters, marked.ids, marked.radiometry)
    shows = [1 in dataset[i][1]["labels"] for i in range(len(dataset))]
    share = np.mean(shows)
    assert 0 < share < 0.1
    assert (dataset.repeat_factors(0.0) == 1).all()
    factors = dataset.repeat_factors(0.5)
    np.testing.assert_allclose(factors, np.where(shows, np.sqrt(0.5 / share), 1))

    sampler = TileSampler(factors, seed=0)
    visits = np.zeros(len(dataset))
    for epoch in range(200):
        sampler.set_epoch(epoch)
        visits += visits_of(sampler)
    seen = visits[shows].sum() / visits.sum()
    expected = share * np.sqrt(0.5 / share) / (1 - share + share * np.sqrt(0.5 / share))
    assert seen == pytest.approx(expected, rel=0.03)
    assert seen > 1.9 * share


def test_difficult_tiles_take_their_share_of_an_epoch():
    sampler = TileSampler(np.ones(100), seed=0, hard_negatives=0.4)
    assert (visits_of(sampler) == 1).all(), "no difficulty is known yet"
    sampler.update(torch.arange(100), torch.cat([torch.full((10,), 3.0), torch.zeros(90)]))
    due = sampler.expected_visits()
    np.testing.assert_allclose(due, np.where(np.arange(100) < 10, 0.6 + 4.0, 0.6))
    visits = visits_of(sampler)
    assert visits.sum() == 100
    assert visits[:10].sum() == pytest.approx(46, abs=5)
    off = TileSampler(np.ones(100), seed=0)
    off.update([0], [9.0])
    assert (visits_of(off) == 1).all()


def test_difficulty_is_a_moving_mean_and_unknown_tiles_get_the_mean():
    sampler = TileSampler(np.ones(4), hard_negatives=1.0)
    sampler.update([0, 1], [1.0, 3.0])
    np.testing.assert_allclose(sampler.expected_visits(), [0.5, 1.5, 1, 1])
    sampler.update(torch.tensor([1]), torch.tensor([0.0], requires_grad=True))
    assert sampler.difficulty[1] == pytest.approx(0.7 * 3)
    with pytest.raises(InputError, match="must be finite and >= 0"):
        sampler.update([2], [float("nan")])


def test_targets_cross_processes_as_they_are():
    targets = Targets([
        {"boxes": torch.rand(3, 4), "labels": torch.arange(3), "tile": torch.tensor(7),
         "counted": torch.rand(5, 5) > 0.5},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ])  # fmt: skip
    again = pickle.loads(ForkingPickler.dumps(targets))
    assert type(again) is Targets
    for before, after in zip(targets, again, strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            torch.testing.assert_close(after[name], value, rtol=0, atol=0)
    assert b"rebuild" not in bytes(ForkingPickler.dumps(targets))  # no tensor is shared


# ---------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def segments(tmp_path_factory):
    made = make_segments(tmp_path_factory.mktemp("segments"))
    made.tiles, made.boxes = tiling.read_tiles(made.tilings[64])
    made.rasters = {image.image_identifier: image.raster for image in made.images}
    made.labels = {image.image_identifier: image.labels for image in made.images}
    return made


def masks_of(segments, **augment):
    conf = ModelConfig(task="segmentation", batch_size=4)
    conf.train.augment = AugmentConfig(**(OFF | augment))
    return TileDataModule(
        segments.tiles, segments.boxes, segments.rasters, {"calm": 0, "rough": 1},
        radiometry_of(1), conf, labels=segments.labels,
    )  # fmt: skip


def test_a_mask_is_the_window_of_its_labels_turned_as_the_tile(segments):
    dataset = masks_of(segments).train
    for index in (0, 1):
        tile = dataset.tiles.iloc[index]
        window = Window(*(int(tile[c]) for c in tiling.WINDOW_COLUMNS))
        _, target = dataset[index]
        expected = segments.labels[tile["raster"]].read(window)
        np.testing.assert_array_equal(
            target["mask"].numpy(), np.rot90(expected, tile["angle"] // 90)
        )
        assert target["mask"].dtype == torch.int64
        assert int(target["tile"]) == index


@pytest.mark.parametrize(
    "augment", [{"flips": True}, {"turns": True}, {"rotate_limit": 40.0, "rotate_share": 1.0},
                {"zoom": 2.0}, {"mosaic": 1.0}],
    ids=lambda augment: next(iter(augment)),
)  # fmt: skip
def test_masks_follow_their_images_exactly(segments, augment, tmp_path):
    """Images that show their own mask: where a pixel is no mixture, it has the mask's class."""
    rasters, labels = {}, {}
    for name, source in segments.labels.items():
        classes = source.read(Window(0, 0, source.raster.width, source.raster.height))
        picture, mask = tmp_path / f"{name}.tif", tmp_path / f"mask_{name}.tif"
        write_band(picture, np.where(classes == 1, 200, 10).astype(np.uint8))
        write_band(mask, np.where(classes == IGNORE, 0, classes).astype(np.uint8))
        rasters[name] = fileio.read_raster(picture)
        labels[name] = masks.read_labels(mask, rasters[name], classes=CLASSES)
    changed = {"labels": labels, "rasters": rasters}
    module = masks_of(SimpleNamespace(**vars(segments) | changed), **augment)
    dataset, exact = module.train, not augment.keys() & {"rotate_limit", "zoom", "mosaic"}
    low, high = (dataset.radiometry.stretch(np.full((1, 1, 1), v, np.uint8)).item()
                 for v in (10, 200))  # fmt: skip
    for seed in range(24):
        image, target = dataset[seed, seed]
        known = target["mask"] != IGNORE
        pure = [(image[0] - value).abs() < 1e-3 * (high - low) for value in (low, high)]
        assert not (pure[0] & known & (target["mask"] != 0)).any()
        assert not (pure[1] & known & (target["mask"] != 1)).any()
        share = float(((pure[0] | pure[1]) & known).sum() / known.sum())
        assert share == 1 if exact else share > 0.75


def test_ground_that_a_rotation_brings_in_is_unknown(segments):
    dataset = masks_of(segments, rotate_limit=45.0, rotate_share=1.0).train
    unknown = [float((dataset[0, seed][1]["mask"] == IGNORE).float().mean()) for seed in range(20)]
    assert max(unknown) > 0.1
    with pytest.raises(InputError, match="rotate_limit needs masks"):
        datasets.training_transform(AugmentConfig(rotate_limit=10.0), radiometry_of(1))


def test_crops_of_training_tiles_have_their_size_and_no_others(segments):
    conf = ModelConfig(task="segmentation", batch_size=4).with_options(
        {"segmentation.target_size": 48, "eval_batch_size": 3}
    )
    arguments = (segments.tiles, segments.boxes, segments.rasters, {"calm": 0, "rough": 1},
                 radiometry_of(1))  # fmt: skip
    module = TileDataModule(*arguments, conf, labels=segments.labels)
    images, targets = next(iter(module.train_dataloader()))
    assert images.shape == (4, 1, 48, 48)
    assert targets[0]["mask"].shape == (48, 48)
    images, _ = next(iter(module.test_dataloader()))
    assert images.shape == (3, 1, 64, 64)
    conf.segmentation.target_size = 65
    with pytest.raises(InputError, match=r"target_size must be <= the side of the tiles \(64 px\)"):
        TileDataModule(*arguments, conf, labels=segments.labels)


def test_trimming_stretches_what_is_left_to_the_old_range():
    image = torch.linspace(0, 1, 10_000).view(1, 100, 100)
    trim = datasets.RandomTrim(10.0, 10.0)
    out = trim(tv_tensors.Image(image))
    assert (float(out.min()), float(out.max())) == (0.0, 1.0)
    assert float((out == 0).float().mean()) == pytest.approx(0.1, abs=1e-3)
    assert float(out[0, 50, 0]) == pytest.approx(0.5, abs=1e-3)
    torch.testing.assert_close(
        trim(tv_tensors.Image(torch.ones(1, 4, 4))), tv_tensors.Image(torch.ones(1, 4, 4))
    )


def test_tiles_of_rare_classes_come_more_often(segments):
    tiles = segments.tiles.copy()
    rare = tiles.index[(tiles["split"] == "train") & tiles["kept"]][:2]
    tiles["class_1"] = np.where(tiles.index.isin(rare), 100, 0)
    tiles.loc[tiles["split"] != "train", "class_1"] = 1
    module = masks_of(SimpleNamespace(**vars(segments) | {"tiles": tiles}))
    share = 2 / len(module.train)
    assert sorted(module.sampler.weights)[-2:] == pytest.approx([(0.1 / share) ** 0.5] * 2)
