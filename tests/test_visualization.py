"""Pictures of tiles while a model is trained: which, of what, and that they change nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from segments import LABELS, make_segments, seg_conf

import implot
import trials
from ImageData import InputError
from logger import DefaultModelLogger
from ModelConfig import VisualizationConfig
from visualization import TileGallery

HYPERPARAMETERS = {
    "patch_size": 64, "n_epochs": 2, "sample_size": 1.0, "learning_rate": 3e-3, "batch_size": 8,
}  # fmt: skip
FEW = {"train.max_tiles": 8, "validation.max_tiles": 3, "test.max_tiles": 3}


@pytest.fixture(scope="module")
def segments(tmp_path_factory):
    made = make_segments(tmp_path_factory.mktemp("segments"))
    made.data, _ = trials.prepare_search(made.images, made.blocks, made.tilings, [1.0], seg_conf())
    return made


def train(segments, folder, *callbacks, n_epochs=2, **options):
    folder.mkdir()
    return trials.train_iteration(
        HYPERPARAMETERS | {"n_epochs": n_epochs}, segments.data, seg_conf(**FEW, **options),
        folder, DefaultModelLogger(folder), callbacks,
    )  # fmt: skip


@pytest.fixture(scope="module")
def drawn(segments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    colors = folder / "colors.csv"
    colors.write_text("value,name,colour\n0,still water,#0000FF\n1,rough,#FF0000\n")
    conf = VisualizationConfig(batch_range=[0, 9, 2], colormap=str(colors), grid=False)
    gallery = TileGallery(conf, folder / "pictures")
    values = train(segments, folder / "with", gallery)
    return folder, values


def test_every_occasion_is_drawn(drawn):
    folder, _ = drawn
    names = [path.stem for path in (folder / "pictures").glob("*_input.png")]
    occasions = Counter((*name.split("_")[:1], int(name.split("_")[2])) for name in names)
    assert occasions["init", 0] == occasions["validation", 0] == occasions["validation", 1] == 3
    assert occasions["test", 2] == 3
    assert occasions["checkpoint", 0] == 3  # the first measurement is the best so far
    assert occasions["train", 0] == occasions["train", 1] > 0
    batches = {int(name.split("_")[4]) for name in names if name.startswith("train")}
    assert batches <= {0, 2, 4, 6, 8}
    assert 0 in batches


def test_a_tile_has_a_file_of_each_part(drawn):
    folder, _ = drawn
    stem = "test_epoch_002_batch_0000_tile_00"
    parts = {p.stem.removeprefix(f"{stem}_") for p in (folder / "pictures").glob(f"{stem}*")}
    assert parts == {
        "input", "label", "prediction", "heatmap_0_still_water", "heatmap_1_rough",
    }  # fmt: skip
    label = np.asarray(Image.open(folder / "pictures" / f"{stem}_label.png"))
    assert label.shape == (64, 64, 3)
    colors = {tuple(color) for color in label.reshape(-1, 3).tolist()}
    assert colors <= {(0, 0, 255), (255, 0, 0), (255, 255, 255)}


def test_pictures_change_nothing_of_a_training(drawn, segments):
    folder, values = drawn
    plain = train(segments, folder / "without")
    for name in ("mean_IoU", "val_mean_IoU", "val_loss"):
        assert plain[name] == values[name]
    states = [torch.load(folder / run / "checkpoints" / "best.ckpt", weights_only=True)
              for run in ("with", "without")]  # fmt: skip
    torch.testing.assert_close(states[0]["state_dict"], states[1]["state_dict"], rtol=0, atol=0)


def test_without_a_range_nothing_is_drawn(segments, tmp_path):
    train(segments, tmp_path / "run", TileGallery(VisualizationConfig(), tmp_path / "pictures"))
    assert not (tmp_path / "pictures").exists()


def test_a_grid_shows_all_parts_and_the_classes():
    rng = np.random.default_rng(0)
    shares = rng.dirichlet([1, 1, 1], (32, 32)).transpose(2, 0, 1)
    truth = rng.integers(0, 3, (32, 32)).astype(np.uint8)
    truth[:4] = 255
    colors = ["#FF0000", "#00FF00", "#0000FF"]
    pictures = implot.draw_tile(rng.random((4, 32, 32)), truth, shares, colors)
    assert pictures.label[0, 0].tolist() == [255, 255, 255]
    where = np.unravel_index(shares[0].argmax(), (32, 32))
    assert pictures.prediction[where].tolist() == [255, 0, 0]
    heat = pictures.heatmaps[0].astype(int).sum(axis=2)
    assert np.unravel_index(heat.argmax(), heat.shape) == where
    figure = implot.plot_tile_prediction(pictures, ["a", "b", "c"], colors, title="tile")
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[:6] == ["input", "label", "prediction", "a", "b", "c"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["a", "b", "c", "unknown"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vis_at_init": True}, "'vis_at_init', which is no option; did you mean at_init?"),
        ({"batch_range": [0, 5]}, "must be [first, last, step]"),
        ({"at_ckpt_dataset": "val"}, "at_ckpt_dataset: Input should be 'train'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(InputError) as caught:
        VisualizationConfig.of(options)
    assert message in str(caught.value)


# What else a training may be told


def test_no_epoch_measures_the_model_that_it_starts_from(drawn, segments, tmp_path):
    folder, values = drawn
    best = str(folder / "with" / "checkpoints" / "best.ckpt")
    again = train(segments, tmp_path / "again", n_epochs=0, init_from=best)
    assert again["training_time"] == 0
    for name in ("mean_IoU", "IoU_rough", "pixel_accuracy", "val_mean_IoU"):
        assert again[name] == values[name]
    kept = torch.load(tmp_path / "again" / "checkpoints" / "best.ckpt", weights_only=True)
    assert kept["hyper_parameters"]["label_set"] == LABELS


def test_limits_thin_every_split_and_keep_turned_twins(segments):
    conf = seg_conf(**FEW)
    tiles, boxes = trials.tiling.read_tiles(segments.data.tilings[64])
    module = trials._module(segments.data, tiles, boxes, conf, 1.0)
    assert module.train.tiles["window"].nunique() == 8
    assert len(module.train.tiles) > 8
    assert (len(module.validation), len(module.full_validation), len(module.test)) == (3, 3, 3)


def test_few_batches_may_be_measured_while_training(segments, tmp_path):
    options = {"eval_batch_size": 1, "validation.batch_metrics": 2}
    train(segments, tmp_path / "some", n_epochs=1, **options)
    rows = (tmp_path / "some" / "metrics.csv").read_text()
    header, *lines = [line.split(",") for line in rows.splitlines()]
    pixels = [float(line[header.index("val_pixels")]) for line in lines
              if line[header.index("val_pixels")]]  # fmt: skip
    measured, whole = pixels  # two of three tiles while training, then all of them
    assert 0 < measured < whole
