"""Segmentation: it learns two textures, describes itself, and takes any bands and sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import rasterio
import shapely
import torch
from segments import CLASSES, LABELS, make_segments, make_tiles, seg_conf, write_band
from test_LargeRasterOR import contract_of

import fileio
import gridsearch
import ledger
import maps
import masks
import predict
import resume
import splits
import strips
import tiling
import trials
from datasets import TileDataModule
from ImageData import InputError, Window
from LargeRasterSeg import LargeRasterSegModel, check_encoder, load_encoder, segment_views
from logger import DefaultModelLogger
from ModelConfig import AuxiliaryOptions, SegmentationConfig


@pytest.fixture(scope="module")
def segments(tmp_path_factory):
    made = make_segments(tmp_path_factory.mktemp("segments"))
    made.data, made.counts = trials.prepare_search(
        made.images, made.blocks, made.tilings, [1.0], seg_conf()
    )
    return made


HYPERPARAMETERS = {
    "patch_size": 64, "n_epochs": 3, "sample_size": 1.0, "learning_rate": 3e-3, "batch_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(segments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    values = trials.train_iteration(
        HYPERPARAMETERS, segments.data, seg_conf(), folder, DefaultModelLogger(folder)
    )
    return SimpleNamespace(measured=values, folder=folder)


def model_of(labels=("a", "b", "c"), bands=1, auxiliary=None, **options):
    return LargeRasterSegModel(
        list(labels),
        seg_conf(**options),
        contract_of(bands, anchors=None, detections_per_tile=None, auxiliary=auxiliary),
    )


def write_shape(path, shape):
    """Write a shape, px, to a file without a CRS."""
    feature = {"type": "Feature", "properties": {"kind": 1}, "geometry": shape.__geo_interface__}
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))


def test_two_textures_are_told_apart(trained):
    values = trained.measured
    assert values["mean_IoU"] > 0.8
    assert values["IoU_rough"] > 0.75
    assert values["val_mean_IoU"] > 0.8
    assert values["mean_IoU_low"] < values["mean_IoU"] < values["mean_IoU_high"]


def test_the_tables_of_a_test_say_what_was_measured(trained, segments):
    confusion = pd.read_csv(trained.folder / "confusion.csv")
    assert confusion["(truth)"].tolist() == LABELS
    counts = confusion[LABELS].to_numpy()
    assert np.trace(counts) / counts.sum() == pytest.approx(trained.measured["pixel_accuracy"])
    # every labelled pixel of test ground once
    labelled = 0
    for image in segments.images:
        mine = segments.blocks[segments.blocks["raster"] == image.image_identifier]
        for b in mine[mine["split"] == "test"].itertuples():
            part = image.labels.read(Window(b.x, b.y, b.width, b.height))
            labelled += int((part != 255).sum())
    assert counts.sum() == labelled == trained.measured["pixels"]
    blocks = pd.read_csv(trained.folder / "pixels.csv")
    assert blocks["truth"].sum() == labelled
    assert blocks["right"].sum() == np.trace(counts)


def test_a_checkpoint_describes_itself_and_says_the_same(trained):
    path = trained.folder / "checkpoints" / "best.ckpt"
    known = torch.load(path, weights_only=True)["hyper_parameters"]
    assert known["task"] == "segmentation"
    assert known["label_set"] == LABELS
    model = LargeRasterSegModel.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    model.eval()
    assert model.labels == LABELS
    assert model.contract.anchors is None
    again = model_of(LABELS, **{"init_from": str(path)})
    again.load_pretrained()
    images = torch.rand(2, 1, 50, 70)
    with torch.inference_mode():
        torch.testing.assert_close(again.eval()(images).shape, torch.Size((2, 2, 50, 70)))
    torch.testing.assert_close(again.network.state_dict(), model.network.state_dict())


def test_options_of_a_decoder_are_built_checked_and_decide_which_weights_fit(trained, tmp_path):
    attention = {"segmentation.decoder_options": {"decoder_attention_type": "scse"}}
    plain, attentive = (sum(p.numel() for p in model_of(**options).parameters())
                        for options in ({}, attention))  # fmt: skip
    assert attentive > plain
    images = torch.rand(2, 1, 64, 64)
    options = {"segmentation.decoder_options": {"psp_out_channels": 64}}
    assert model_of(**{"segmentation.architecture": "pspnet"} | options)(images).shape[1] == 3
    path = str(trained.folder / "checkpoints" / "best.ckpt")
    with pytest.raises(InputError, match=r"decoder_options = \{.*scse.* \(INIT_FROM has \{\}"):
        model_of(LABELS, init_from=path, **attention).load_pretrained()
    for architecture, options, message in (
        (
            "unet",
            {"decoder_atention_type": "scse"},
            "mean decoder_attention_type.* of unet",
        ),
        ("linknet", {"classes": 4}, "there is no 'classes'; known are decoder_use_norm of linknet"),
        ("unet", {"decoder_attention_type": "gate"}, "cannot be built .* with .*gate"),
    ):
        with pytest.raises(InputError, match=message):
            model_of(**{"segmentation.architecture": architecture,
                        "segmentation.decoder_options": options})  # fmt: skip
    with pytest.raises(InputError, match="give one of them"):
        model_of(**{"segmentation.architecture": "pspnet", "segmentation.dropout": 0.1,
                    "segmentation.decoder_options": {"psp_dropout": 0.2}})  # fmt: skip


def test_a_training_with_all_extras_runs_and_describes_itself(segments, tmp_path):
    options = {"decoder_attention_type": "scse"}
    conf = seg_conf(**{
        "segmentation.decoder_options": options, "segmentation.loss": "wbce_adaptive+tversky",
        "train.augment.strength": 0.5, "train.augment.fancy_pca": 0.1,
        "train.plateau_patience": 1, "train.averaging": "swa",
    })  # fmt: skip
    hyperparams = HYPERPARAMETERS | {"n_epochs": 1, "sample_size": 0.2}
    values = trials.train_iteration(
        hyperparams, segments.data, conf, tmp_path, DefaultModelLogger(tmp_path)
    )
    assert 0 < values["mean_IoU"] <= 1
    losses = pd.read_csv(tmp_path / "metrics.csv")["train_loss_epoch"].dropna()
    assert 0 < losses.iloc[-1] < 2 * np.log(2) + 1, "no worse than to say nothing"
    model = LargeRasterSegModel.load_from_checkpoint(
        tmp_path / "checkpoints" / "best.ckpt", map_location="cpu", weights_only=True
    )
    assert model.conf.segmentation.decoder_options == options
    assert "SCSEModule" in {type(part).__name__ for part in model.modules()}
    assert model.contract.radiometry == segments.data.radiometry


def test_a_start_keeps_classes_by_name_and_fits_the_bands(trained):
    path = str(trained.folder / "checkpoints" / "best.ckpt")
    old = LargeRasterSegModel.load_from_checkpoint(path, map_location="cpu")
    new = model_of(["new", "rough", "calm"], bands=3, init_from=path)
    new.load_pretrained()
    theirs = old.network.body.segmentation_head[0].bias.detach()
    mine = new.network.body.segmentation_head[0].bias.detach()
    torch.testing.assert_close(mine[1:], theirs[[1, 0]])
    one, three = (next(model.network.body.encoder.parameters()) for model in (old, new))
    torch.testing.assert_close(three, one.expand(-1, 3, -1, -1) / 3)
    with pytest.raises(InputError, match="INIT_FROM has 'unet'"):
        model_of(
            LABELS, init_from=path, **{"segmentation.architecture": "linknet"}
        ).load_pretrained()


@pytest.mark.parametrize("architecture", ["fpn", "linknet", "pan", "deeplabv3plus", "segformer"])
def test_any_size_and_a_lone_tile_are_learnt_from(architecture):
    model = model_of(bands=2, **{"segmentation.architecture": architecture})
    images = torch.rand(1, 2, 45, 70)
    logits = model.train()(images)
    assert logits.shape == (1, 3, 45, 70)
    logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_what_is_padded_changes_nothing_away_from_it():
    torch.manual_seed(0)
    model = model_of().eval()
    images = torch.rand(1, 1, 96, 96)
    with torch.inference_mode():
        assert model(images).shape == (1, 3, 96, 96)
        assert model(images[..., :90, :90]).shape == (1, 3, 90, 90)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segmentation.architecture": "unett"}, "no 'unett'; did you mean unet"),
        ({"segmentation.encoder": "resnet19"}, "no 'resnet19'; did you mean resnet18"),
        ({"segmentation.encoder": "tu-resnet19"}, "did you mean tu-resnet"),
        ({"segmentation.encoder": "mit_b0"}, "NVIDIA Source Code License"),
        ({"segmentation.architecture": "unet", "segmentation.dropout": 0.3}, "unet has none"),
        ({"segmentation.loss": "dise"}, "'dise' is none; did you mean dice"),
        ({"segmentation.class_weights": (1.0, 2.0)}, "each of the 3 classes, got 2"),
        ({"segmentation.architecture": "dpt"}, "cannot be built on the encoder"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused_with_a_remedy(options, message):
    with pytest.raises(InputError, match=message):
        model_of(**options)


def test_licences_that_forbid_commercial_use_need_to_be_allowed():
    conf = seg_conf(**{"segmentation.encoder": "resnet18", "weights": "swsl"})
    with pytest.raises(InputError, match=r"swsl of resnet18 may not be used .* CC BY-NC 4\.0"):
        load_encoder(conf, 3)
    conf = seg_conf(**{"segmentation.encoder": "tu-convnextv2_atto", "weights": "DEFAULT"})
    with pytest.raises(InputError, match=r"cc-by-nc-4\.0"):
        load_encoder(conf, 3)
    check_encoder(SegmentationConfig(encoder="mit_b0", allow_non_commercial=True))
    with pytest.raises(InputError, match=r"one of \['DEFAULT', 'imagenet', 'ssl', 'swsl'\]"):
        load_encoder(seg_conf(**{"segmentation.encoder": "resnet18", "weights": "none"}), 3)


def test_weights_of_an_encoder_come_from_a_file(tmp_path):
    known = model_of(bands=3)
    path = tmp_path / "encoder.pth"
    torch.save(
        {f"encoder.{n}": v for n, v in known.network.body.encoder.state_dict().items()}, path
    )
    model = model_of(bands=1, weights=str(path))
    model.load_pretrained()
    theirs = next(known.network.body.encoder.parameters())
    mine = next(model.network.body.encoder.parameters())
    torch.testing.assert_close(mine, theirs.sum(dim=1, keepdim=True))
    other = model_of(weights=str(path), **{"segmentation.encoder": "resnet18"})
    with pytest.raises(InputError, match="do not fit resnet18"):
        other.load_pretrained()
    state = known.network.body.encoder.state_dict()
    old = {n: v for n, v in state.items() if not n.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    torch.save({"state_dict": old, "epoch": 3}, path)
    again = model_of(bands=3, weights=str(path))
    again.load_pretrained()
    torch.testing.assert_close(next(again.network.body.encoder.parameters()), theirs)


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), {"state_dict": 3}])
def test_a_file_of_other_things_is_no_file_of_weights(tmp_path, content):
    path = tmp_path / "encoder.pth"
    torch.save(content, path)
    with pytest.raises(InputError, match=r"encoder.pth holds a \w+, expected a mapping from names"):
        model_of(bands=3, weights=str(path)).load_pretrained()


def test_dropout_is_set_where_the_architecture_has_it():
    model = model_of(**{"segmentation.architecture": "fpn", "segmentation.dropout": 0.6})
    shares = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout2d)]
    assert shares == [0.6]


def test_views_are_fused_as_the_tiles_lie():
    class Brightness(torch.nn.Module):
        def forward(self, images):
            return torch.cat([images, -images], dim=1)

    tiles = torch.rand(2, 1, 8, 8)
    views = [(turns, mirrored) for turns in range(4) for mirrored in (False, True)]
    fused = segment_views(Brightness(), tiles, views)
    torch.testing.assert_close(fused, Brightness()(tiles).softmax(dim=1))


def test_classes_of_no_training_ground_and_rasters_without_labels_are_refused(segments):
    arguments = segments.blocks, segments.tilings, [1.0], seg_conf()
    images = [replace(image, labels=None) for image in segments.images]
    with pytest.raises(InputError, match=r"rasters \['ground0', 'ground1'\] have no labels"):
        trials.prepare_search(images, *arguments)
    assert list(segments.data.ids) == LABELS
    assert segments.counts.loc[LABELS].to_numpy().min() > 0


def test_a_search_ranks_by_mean_iou_and_workers_find_its_labels(segments, tmp_path):
    space = {
        "patch_size": [64], "n_epochs": [1], "sample_size": [0.5], "learning_rate": [1e-5, 3e-3],
        "batch_size": [8],
    }  # fmt: skip
    board = gridsearch.run_search(segments.data, space, seg_conf(), tmp_path)
    assert board["state"].tolist() == ["complete", "complete"]
    assert board["mean_IoU"].is_monotonic_decreasing
    assert board.loc[board["selected"], "val_mean_IoU"].item() == board["val_mean_IoU"].max()
    assert {"pixels.csv", "confusion.csv", "best.ckpt"} <= {p.name for p in tmp_path.iterdir()}
    assert gridsearch.join_search(tmp_path) == (0, 0)
    _, data, _ = gridsearch._read_search(tmp_path)
    for name, labels in data.labels.items():
        np.testing.assert_array_equal(labels.mask, segments.data.labels[name].mask)
    table = ledger.read_ledger(tmp_path.parent)
    mine = table[table["run"] == tmp_path.name]
    assert sorted(mine["mean_IoU"]) == pytest.approx(sorted(board["mean_IoU"]))
    assert {"val_mean_IoU", "IoU_rough", "pixel_accuracy"} <= set(table)
    best = mine.loc[mine["learning_rate"].idxmax()]
    kept = ledger.read_ledger(tmp_path, where="mean_IoU > 0 and learning_rate == 0.003")
    assert kept["trial"].tolist() == [best["trial"]]
    model = ledger.load_model(best)
    assert (type(model), model.labels) == (LargeRasterSegModel, LABELS)


def test_a_model_without_epochs_is_measured_by_its_own_stretch(segments, trained, tmp_path):
    start = str(trained.folder / "checkpoints" / "best.ckpt")
    train = partial(trials.train_iteration, logger=DefaultModelLogger(tmp_path))
    known = segments.data.radiometry
    other = replace(segments.data, radiometry=replace(
        known, high=tuple(2 * v for v in known.high), std=tuple(3 * v for v in known.std)
    ))  # fmt: skip
    none = HYPERPARAMETERS | {"n_epochs": 0}
    again = train(none, other, seg_conf(init_from=start), trial_dir=tmp_path / "b")
    assert again["mean_IoU"] == pytest.approx(trained.measured["mean_IoU"], abs=1e-6)
    model = strips.load_model(tmp_path / "b" / "checkpoints" / "best.ckpt")
    assert model.contract.radiometry == known
    known = torch.load(start, weights_only=True)
    known["hyper_parameters"]["contract"]["bands"] = [2]
    torch.save(known, tmp_path / "other.ckpt")
    conf = seg_conf(init_from=str(tmp_path / "other.ckpt"))
    with pytest.raises(InputError, match=r"bands \[2, '0 auxiliary'\], and cannot be measured on"):
        train(none, other, conf, trial_dir=tmp_path / "c")


def test_an_interrupted_training_ends_as_an_undisturbed_one(segments, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SAVE_SECONDS", 0.0)
    few = HYPERPARAMETERS | {"n_epochs": 2, "sample_size": 0.3}

    class Interrupt(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 2:
                raise KeyboardInterrupt

    def train(folder, callbacks=()):
        conf = seg_conf(**{"train.hard_negatives": 0.3})
        return trials.train_iteration(
            few, segments.data, conf, folder, DefaultModelLogger(folder), callbacks
        )

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", [Interrupt()])
    cut = train(tmp_path / "cut")
    whole.pop("training_time")
    cut.pop("training_time")
    assert cut == whole


def test_auxiliary_bands_reach_training_checkpoint_workers_and_prediction(segments, tmp_path):
    """Ground that looks the same everywhere: only the auxiliary band tells the classes apart."""
    inputs = tmp_path / "in"
    inputs.mkdir()
    rng = np.random.default_rng(0)
    rasters, mask_paths = [], []
    for image in segments.images:
        path = inputs / f"plain_{image.image_identifier}.tif"
        write_band(path, rng.integers(90, 110, (384, 384), dtype=np.uint8))
        rasters.append(fileio.read_raster(path))
        mask_paths.append(inputs / f"mask_{image.image_identifier}.tif")
        mask = np.zeros((384, 384), np.uint8)
        mask[:, 96:288] = 1
        write_band(mask_paths[-1], mask)
    shapes = inputs / "band.geojson"
    write_shape(shapes, shapely.box(96, 0, 288, 384))
    options = AuxiliaryOptions(aux_vector_file=shapes, aux_vector_coordinates="pixel")
    with_bands = [masks.with_auxiliary_bands(raster, options) for raster in rasters]
    images, _ = masks.label_images(with_bands, mask_paths, classes=CLASSES)
    blocks = segments.blocks.assign(raster="plain_" + segments.blocks["raster"])
    tilings = make_tiles(images, blocks, tmp_path, 64)
    data, _ = trials.prepare_search(images, blocks, tilings, [1.0], seg_conf())
    space = {name: [value] for name, value in (HYPERPARAMETERS | {"n_epochs": 4}).items()}
    run = tmp_path / "run"
    board = gridsearch.run_search(data, space, seg_conf(), run)
    assert board["mean_IoU"].item() > 0.9

    # the checkpoint says which bands, of the file and auxiliary
    model = LargeRasterSegModel.load_from_checkpoint(run / "best.ckpt", weights_only=True)
    contract = model.contract
    assert (contract.bands, contract.dtype, contract.channels) == ((1,), "uint8", 2)
    assert contract.auxiliary == options
    assert model.network.body.encoder.features[0][0].in_channels == 2

    # a worker reads the very same pixels
    assert gridsearch.join_search(run) == (0, 0)
    _, again, _ = gridsearch._read_search(run)
    window = Window(80, 100, 40, 30)
    for name, raster in again.rasters.items():
        np.testing.assert_array_equal(raster.read(window), data.rasters[name].read(window))
        assert raster.made_from == data.rasters[name].made_from
    shapes.rename(tmp_path / "gone.geojson")
    with pytest.raises(InputError, match=r"band\.geojson"):
        gridsearch.join_search(run)
    (tmp_path / "gone.geojson").rename(shapes)

    # another raster gets the bands of its own shapes, across the seams of tiles
    other, elsewhere = inputs / "other.tif", inputs / "elsewhere.geojson"
    write_band(other, rng.integers(90, 110, (200, 300), dtype=np.uint8))
    write_shape(elsewhere, shapely.box(50, 0, 170, 200))
    arguments = ["--checkpoint", str(run / "best.ckpt"), "--output", str(tmp_path / "map.tif"),
                 "--device", "cpu", "--override", "radiometry"]  # fmt: skip
    assert predict.main([str(other), *arguments]) == predict.FAILED
    assert predict.main([str(other), *arguments, "--aux-vector-file", str(elsewhere)]) == 0
    with rasterio.open(tmp_path / "map.tif") as file:
        found = file.read(1)
    truth = np.zeros((200, 300), np.uint8)
    truth[:, 50:170] = 1
    assert (found == truth).mean() > 0.95
    opened = predict.open_raster(
        other, contract, aux_vector_file=elsewhere, override=("radiometry",)
    )
    np.testing.assert_array_equal(opened.read(Window(0, 0, 300, 200))[1], truth)
    half = opened.read(Window(64, 64, 64, 64))
    np.testing.assert_array_equal(half, opened.read(Window(0, 0, 300, 200))[:, 64:128, 64:128])


def test_a_vector_file_is_asked_for_only_where_the_model_reads_one(tmp_path):
    write_band(tmp_path / "r.tif", np.full((100, 100), 9, np.uint8))
    model = model_of(auxiliary={"aux_vector_file": "roads.gpkg", "aux_vector_dist_maps": True})
    with pytest.raises(InputError, match=r"distances to shapes, in training of roads.gpkg; give"):
        predict.prepare(model, tmp_path / "r.tif", tmp_path / "map.tif")
    with pytest.raises(InputError, match="reads no band that is made of a vector file"):
        predict.prepare(
            model_of(), tmp_path / "r.tif", tmp_path / "map.tif", aux_vector_file="roads.gpkg"
        )


def test_regions_that_are_wrong_add_up_to_what_the_test_counted(segments, trained):
    checkpoint = trained.folder / "checkpoints" / "best.ckpt"
    errors = maps.find_errors(checkpoint, segments.images, segments.blocks)
    counted = pd.read_csv(trained.folder / "pixels.csv")
    wrong = counted.groupby("block")[["truth", "right"]].sum().eval("truth - right")
    assert wrong.sum() > 0
    found = errors.groupby("block")["area_px"].sum().reindex(wrong.index, fill_value=0)
    pd.testing.assert_series_equal(found, wrong, check_names=False)
    assert set(errors["kind"]) == {"confused"}  # both textures are classes


def test_ground_that_masks_share_between_splits_is_refused(segments):
    tiles, boxes = tiling.read_tiles(segments.tilings[64])
    data, conf = segments.data, seg_conf(**{"train.augment.zoom": 2.0})

    def module(tiles):
        return TileDataModule(
            tiles, boxes, data.rasters, data.ids, data.radiometry, conf, labels=data.labels
        )

    # windows may zoom and move, but never out of their block
    made = module(tiles)
    used = [made.train.views.reach(made.train.tiles), made.full_validation.tiles, made.test.tiles]
    assert splits.audit_splits(pd.concat(used), data.rasters)["shared_px"].tolist() == [0, 0, 0]
    test = tiles[(tiles["split"] == "test") & tiles["kept"]].iloc[:1]
    leak = test.assign(split="train", window=tiles["window"].max() + 1)
    with pytest.raises(InputError, match=r"splits share ground.* train and test \d+ px"):
        module(pd.concat([tiles, leak], ignore_index=True))
    # blocks that changed sides for their classes are still whole blocks
    counts = tiling.count_blocks(segments.blocks, segments.images, workers=1)
    blocks = splits.stratify_validation(
        segments.blocks, counts, validation_percent=25, tolerance=5, seed=0
    )
    options = tiling.TilingOptions(evaluation_overlap=32)
    windows, _ = tiling.index_windows(64, segments.images, blocks, options)
    assert splits.audit_splits(windows, data.rasters)["shared_px"].sum() == 0
