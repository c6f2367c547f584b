"""Experiments that a YAML of six sections describes: read, refused, run."""

from __future__ import annotations

import ast
import json
from types import SimpleNamespace

import geopandas
import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import rasterio
import yaml
from conftest import PROJECT

import oldconfig
import sampledata
from ImageData import InputError
from ModelConfig import RunParameters

YAML = """
global:
  samples_size: 512
  num_classes: 5
  data_path: data
  number_of_bands: 4
  model_name: unet
  mlflow_uri: mlruns
  mlflow_experiment_name: gdl-training
  mlflow_run_name: gdl
  bucket_name:
  task: segmentation
  num_gpus: 2
  max_used_ram: 2000
  max_used_perc: 15
  BGR_to_RGB: True
  scale_data: [0,1]
  aux_vector_file:
  aux_vector_attrib:
  aux_vector_ids:
  aux_vector_dist_maps:
  aux_vector_dist_log:
  aux_vector_scale:
  debug_mode: True
  coordconv_convert: False
  coordvonc_scale:
data_analysis:
  create_csv: True
  optimal_parameters_search : False
  sampling_method:
    'min_annotated_percent': 0
    'class_proportion': {'1':0, '2':0, '3':0, '4':0}
sample:
  prep_csv_file: images.csv
  val_percent: 5
  use_stratification: 2
  overlap: 25
  sampling_method:
    'min_annotated_percent': 0
    'class_proportion': {'1':0, '2':0, '3':0, '4':0}
  mask_reference: False
training:
  state_dict_path: checkpoint.pth.tar
  pretrained: True
  num_trn_samples: 4960
  num_val_samples: 2208
  num_tst_samples: 1000
  batch_size: 32
  eval_batch_size: 16
  num_epochs: 150
  target_size: 128
  loss_fn: Lovasz
  optimizer: adabound
  learning_rate: 0.0001
  weight_decay: 0
  step_size: 4
  gamma: 0.9
  dropout: False
  dropout_prob: False
  class_weights: [1.0, 0.9]
  batch_metrics: 2
  ignore_index: 0
  normalization:
    mean:
    std:
  augmentation:
    rotate_limit: 45
    rotate_prob: 0.5
    hflip_prob: 0.5
    random_radiom_trim_range: [0.1, 2.0]
    brightness_contrast_range:
    noise:
inference:
  img_dir_or_csv_file: images.csv
  working_folder:
  state_dict_path: checkpoint.pth.tar
  chunk_size: 512
  smooth_prediction: True
  overlap: 2
visualization:
  vis_batch_range: [0,200,10]
  vis_at_checkpoint: True
  vis_at_ckpt_min_ep_diff: 0
  vis_at_ckpt_dataset: val
  vis_at_init: True
  vis_at_init_dataset: val
  vis_at_evaluation: True
  vis_at_train: True
  grid: True
  heatmaps: True
  colormap_file: ./colormap.csv
"""


@pytest.fixture
def folder(tmp_path):
    for name in ("a.tif", "b.tif", "c.tif", "a.gpkg", "checkpoint.pth.tar"):
        (tmp_path / name).touch()
    lines = ["a.tif,,a.gpkg,cover,trn", "b.tif,,a.gpkg,cover,trn", "c.tif,,a.gpkg,cover,tst"]
    (tmp_path / "images.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "colormap.csv").write_text("1,vegetation,#00680d\n")
    return tmp_path


def write(folder, changes=(), name="roads.yaml"):
    """Write the YAML with other values of dotted keys."""
    sections = yaml.safe_load(YAML)
    for key, value in dict(changes).items():
        *groups, last = key.split(".")
        place = sections
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    path = folder / name
    path.write_text(yaml.safe_dump(sections))
    return path


def notebook_parameters():
    notebook = nbformat.read(PROJECT / "main.ipynb", as_version=4)
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    return {n.targets[0].id: ast.literal_eval(n.value) for n in ast.parse(cell.source).body}


def test_every_key_becomes_a_parameter(folder):
    path = folder / "roads.yaml"
    path.write_text(YAML)
    run = RunParameters.from_notebook(notebook_parameters() | {"CONFIG_YAML": str(path)})
    assert run.TASK == "segmentation"
    assert run.RUN_NAME == "roads"
    assert str(folder / "data") in str(run.RUNS_DIR) or run.RUNS_DIR.name == "data"
    assert [p.name for p in run.image_paths] == ["a.tif", "b.tif", "c.tif"]
    assert run.label_columns == ["cover"] * 3
    assert [p.name for p in run.predict_paths] == ["c.tif"]
    assert run.predict_checkpoint == folder / "checkpoint.pth.tar"
    assert run.BANDS == [3, 2, 1, 4]
    assert (run.CLASSES, run.STRETCH, run.DEVICES) == (5, "none", 2)
    assert run.search_space == {
        "patch_size": [512], "n_epochs": [150], "sample_size": [1.0], "learning_rate": [0.0001],
        "batch_size": [32],
    }  # fmt: skip
    assert (run.VALIDATION_PROPORTION, run.USE_STRATIFICATION, run.TILE_OVERLAP) == (0.05, 2, 128)
    assert run.PREDICT_OPTIONS == {
        "tile_size": 512, "overlap": 256, "smooth_prediction": True,
        "colormap": str(folder / "colormap.csv"),
    }  # fmt: skip
    assert run.VISUALIZATION == {
        "batch_range": [0, 200, 10], "at_checkpoint": True, "at_ckpt_min_ep_diff": 0,
        "at_ckpt_dataset": "validation", "at_init": True, "at_init_dataset": "validation",
        "at_evaluation": True, "at_train": True, "grid": True, "heatmaps": True,
        "colormap": str(folder / "colormap.csv"),
    }  # fmt: skip
    conf = run.model_config()
    assert conf.init_from == str(folder / "checkpoint.pth.tar")
    assert (conf.max_used_ram, conf.max_used_perc, conf.eval_batch_size) == (2000, 15, 16)
    seg = conf.segmentation
    assert (seg.architecture, seg.loss, seg.target_size, seg.ignore_index) == (
        "unet", "lovasz", 128, 0,
    )  # fmt: skip
    assert seg.class_weights is None  # as lovasz knows none
    train = conf.train
    assert (train.optimizer, train.weight_decay, train.step_size, train.gamma) == (
        "adabound", 0, 4, 0.9,
    )  # fmt: skip
    assert (train.max_tiles, conf.validation.max_tiles, conf.test.max_tiles) == (4960, 2208, 1000)
    assert conf.validation.batch_metrics == 2
    augment = train.augment
    assert (augment.rotate_limit, augment.rotate_share, augment.flip_share) == (45, 0.5, 0.5)
    assert augment.trim_range == (0.1, 2.0)
    assert train.random_windows
    # num_trn_samples is what is trained with, and no tile goes that the YAML keeps
    assert run.ROTATION_ANGLES == []
    assert 512**2 < run.CENSORED_PIXELS_LIMIT
    chosen = {"ROTATION_ANGLES": [90], "CENSORED_PIXELS_LIMIT": 7, "CONFIG_YAML": str(path)}
    run = RunParameters.from_notebook(notebook_parameters() | chosen)
    assert (run.ROTATION_ANGLES, run.CENSORED_PIXELS_LIMIT) == ([90], 7)


def test_a_blank_augmentation_means_none(folder):
    keys = yaml.safe_load(YAML)["training"]["augmentation"]
    path = write(folder, {f"training.augmentation.{key}": None for key in keys})
    run = RunParameters.from_notebook(notebook_parameters() | {"CONFIG_YAML": str(path)})
    train = run.model_config().train
    assert (train.augment.enabled, train.random_windows, run.ROTATION_ANGLES) == (False, False, [])


def test_the_table_says_of_every_key_what_it_became(folder):
    path = write(folder)
    table = oldconfig.read_config(path).table.set_index("key")["here"]
    assert table["global.samples_size"] == "PATCH_SIZES = [512]"
    assert (
        table["training.class_weights"] == "left out: the loss lovasz weighs all classes the same"
    )
    assert table["global.max_used_ram"] == "a limit of the GPUs that num_gpus takes"
    given = [f"{s}.{k}" for s, keys in yaml.safe_load(YAML).items() for k, v in keys.items()
             if v not in (None, False) and not isinstance(v, dict)]  # fmt: skip
    assert set(given) <= set(table.index)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.learn_rate": 0.1}, "learn_rate; did you mean training.learning_rate"),
        ({"global.batch_size": 4}, "key global.batch_size; did you mean training.batch_size"),
        ({"training.augmentation.rotate": 4}, "did you mean training.augmentation.rotate_"),
        ({"trainning": {"batch_size": 4}}, "unknown key trainning; did you mean training"),
        ({"training.augmentation": 5}, "training.augmentation must hold keys, got 5"),
        ({"global.task": "classification"}, "global.task must be segmentation"),
        ({"global.model_name": "unett"}, "there is no 'unett'; did you mean unet"),
        ({"global.number_of_bands": None}, "BGR_to_RGB is True, so that number_of_bands must be"),
        ({"global.aux_vector_file": "gone.gpkg"}, "there is no gone.gpkg"),
        ({"global.coordconv_convert": "yes"}, "coordconv_convert must be True or False"),
        ({"training.loss_fn": "Lovas"}, "loss_fn there is no 'Lovas'; did you mean lovasz?"),
        ({"training.optimizer": "adabond"}, "did you mean adabound?"),
        ({"training.batch_size": 0}, "batch_size must be a whole number from 1 on, got 0"),
        ({"training.dropout": True}, "dropout_prob must be a probability such as 0.5"),
        ({"training.normalization.mean": [0.5]}, "it is measured on the training ground"),
        ({"inference.overlap": 3}, "must be an even number that divides chunk_size 512, got 3"),
        ({"inference.working_folder": "out"}, "leave it blank"),
        ({"sample.val_percent": 0}, "no raster of the CSV is marked val"),
        ({"sample.prep_csv_file": "gone.csv"}, "there is no gone.csv"),
        ({"data_analysis.sampling_method": {"min_annotated_percent": 5}}, "splits.py balance"),
        ({"visualization.vis_at_init_dataset": "all"}, "must be one of trn, val, tst"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(folder, changes, message):
    with pytest.raises(InputError) as caught:
        oldconfig.read_config(write(folder, changes))
    assert message in str(caught.value)


def test_all_that_is_wrong_is_told_at_once(folder):
    changes = {"training.lr": 1, "global.task": "other", "training.batch_size": "many"}
    with pytest.raises(InputError) as caught:
        oldconfig.read_config(write(folder, changes))
    assert all(key in str(caught.value) for key in changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"PATCH_SIZES": [64]}, "PATCH_SIZES = [64], but the YAML says [512]"),
        ({"MODEL_OPTIONS": {"train.gamma": 0.5}}, "MODEL_OPTIONS['train.gamma'] = 0.5, but the"),
    ],
)
def test_a_parameter_that_contradicts_the_yaml_is_named_with_both(folder, changes, message):
    path = write(folder)
    with pytest.raises(InputError) as caught:
        RunParameters.from_notebook(notebook_parameters() | {"CONFIG_YAML": str(path)} | changes)
    assert message in str(caught.value)


def test_bands_beside_those_of_the_raster(folder, caplog):
    (folder / "rivers.gpkg").touch()
    changes = {
        "aux_vector_file": "rivers.gpkg", "aux_vector_attrib": "kind", "aux_vector_ids": [1, 4],
        "aux_vector_dist_maps": True, "aux_vector_dist_log": True, "aux_vector_scale": 0.5,
        "coordvonc_scale": 2.0,
    }  # fmt: skip
    path = write(folder, {f"global.{name}": value for name, value in changes.items()})
    run = RunParameters.from_notebook(notebook_parameters() | {"CONFIG_YAML": str(path)})
    bands = run.auxiliary
    assert bands.aux_vector_file == str(folder / "rivers.gpkg")
    assert (bands.aux_vector_attrib, bands.aux_vector_ids) == ("kind", (1, 4))
    assert (bands.aux_vector_dist_maps, bands.aux_vector_dist_log) == (True, True)
    assert (bands.aux_vector_scale, bands.count) == (0.5, 1)
    assert "coordvonc_scale = 2.0 is left out" in caplog.text


def test_what_the_yaml_leaves_open_the_notebook_decides(folder):
    given = {"CONFIG_YAML": str(write(folder)), "PATCH_SIZES": [512], "RUN_NAME": "again",
             "TEST_PROPORTION": 0.3, "MODEL_OPTIONS": {"train.patience": 3}}  # fmt: skip
    run = RunParameters.from_notebook(notebook_parameters() | given)
    assert run.RUN_NAME == "again"
    assert run.TEST_PROPORTION == 0.3
    assert run.MODEL_OPTIONS["train.patience"] == 3
    assert run.MODEL_OPTIONS["train.gamma"] == 0.9


def test_mlflow_is_used_where_it_is_installed(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    run = RunParameters.from_notebook(notebook_parameters() | {"CONFIG_YAML": str(write(folder))})
    assert run.logger == "mlflow"
    assert run.LOGGER_OPTIONS.pop("uri").endswith("/mlruns")
    assert run.LOGGER_OPTIONS == {"experiment_name": "gdl-training", "run_name": "gdl"}


def test_rasters_marked_val_are_the_validation(folder):
    with (folder / "images.csv").open("a") as file:
        (folder / "d.tif").touch()
        file.write("d.tif,,a.gpkg,cover,val\n")
    run = RunParameters.from_notebook(
        notebook_parameters() | {"CONFIG_YAML": str(write(folder))}
    )  # fmt: skip
    assert [name.rpartition("/")[2] for name in run.VALIDATION_FILENAMES] == ["d.tif"]
    assert run.USE_STRATIFICATION is None


@pytest.mark.parametrize(
    ("name", "architecture", "encoder", "weights"),
    [
        ("unet", "unet", "resnet18", None),
        ("deeplabv3_resnet101", "deeplabv3", "resnet101", "DEFAULT"),
        ("deeplabv3+_pretrained", "deeplabv3plus", "resnet18", "DEFAULT"),
        ("ternausnet", "unet", "vgg11", "DEFAULT"),
    ],
)
def test_models_go_by_their_names_of_old(folder, name, architecture, encoder, weights):
    changes = {"global.model_name": name, "training.state_dict_path": None}
    run = RunParameters.from_notebook(
        notebook_parameters() | {"CONFIG_YAML": str(write(folder, changes))}
    )
    assert run.MODEL_OPTIONS["segmentation.architecture"] == architecture
    assert (run.BACKBONE, run.WEIGHTS) == (encoder, weights)


def test_values_that_nobody_touched_are_those_of_the_notebook():
    parameters = notebook_parameters()
    assert {name: parameters[name] for name in oldconfig.UNTOUCHED} == oldconfig.UNTOUCHED


def test_every_key_is_in_the_documentation():
    text = (PROJECT / "docs" / "own_data.md").read_text()
    missing = [key for key in (*oldconfig.KEYS, *oldconfig.REFUSED)
               if f"`{key.rpartition('.')[2]}`" not in text]  # fmt: skip
    assert not missing


def test_architectures_are_those_that_can_be_built():
    from LargeRasterSeg import ARCHITECTURES, DROPOUT, encoder_names

    assert set(oldconfig.ARCHITECTURES) == set(ARCHITECTURES)
    assert set(oldconfig.WITH_DROPOUT) == set(DROPOUT)
    encoders = {name.partition("_")[2] for name in oldconfig.MODELS.values()} - {""}
    assert encoders <= set(encoder_names())


def test_losses_and_optimisers_are_those_that_there_are():
    from losses import LOSSES
    from optimizers import OPTIMIZERS

    assert set(oldconfig.LOSSES.values()) == set(LOSSES)
    assert set(oldconfig.OPTIMIZERS) == set(OPTIMIZERS)


# A CSV and a YAML, from samples to the map


COVER = ["crop", "forest", "water", "road", "building"]
COLORMAP = "Input value,Class name,Html color\n" + "".join(
    f"{i},{name},#{40 * i:02x}{255 - 40 * i:02x}80\n" for i, name in enumerate(COVER, start=1)
)


@pytest.fixture(scope="module")
def old_run(tmp_path_factory):
    """Images, GeoPackages, a CSV and a YAML as they were written for other software; run."""
    folder = tmp_path_factory.mktemp("old")
    for seed, (name, side) in enumerate({"one": 384, "two": 256, "three": 192}.items()):
        image, polygons = folder / f"{name}.tif", folder / f"{name}.gpkg"
        sampledata.make_land_cover(image, polygons, width=side, height=side, seed=seed + 3)
        shapes = geopandas.read_file(polygons, layer=name)
        shapes["cover"] = [COVER.index(label) + 1 for label in shapes["label"]]
        shapes[["cover", "geometry"]].to_file(polygons)
    uses = {"one": "trn", "two": "trn", "three": "tst"}
    rows = [f"{n}.tif,,{n}.gpkg,cover,{use}" for n, use in uses.items()]
    (folder / "images.csv").write_text("\n".join(rows) + "\n")
    (folder / "colormap.csv").write_text(COLORMAP)
    changes = {
        "global.data_path": str(folder / "data"), "global.samples_size": 64,
        "sample.val_percent": 25, "sample.use_stratification": 5,
        "training.state_dict_path": None, "training.num_trn_samples": 60,
        "training.num_val_samples": 4, "training.num_tst_samples": 6, "training.batch_size": 12,
        "training.target_size": 32, "training.num_epochs": 1, "inference.chunk_size": 64,
        "training.eval_batch_size": 2, "visualization.vis_batch_range": [1, 2, 1],
        "visualization.heatmaps_inf": True,
    }  # fmt: skip
    path = write(folder, changes, "cover.yaml")
    papermill.execute_notebook(
        PROJECT / "main.ipynb", folder / "out.ipynb", cwd=PROJECT, progress_bar=False,
        parameters={"CONFIG_YAML": str(path), "WORKERS": 1},
    )  # fmt: skip
    return SimpleNamespace(folder=folder, path=path, run=folder / "data" / "cover")


def test_an_experiment_of_old_runs_from_samples_to_map(old_run):
    run = old_run.run
    board = pd.read_csv(run / "leaderboard.csv")
    assert board["state"].tolist() == ["complete"]
    assert 0 <= board["mean_IoU"].iloc[0] <= 1
    with (
        rasterio.open(run / "catalogues" / "three.tif") as found,
        rasterio.open(old_run.folder / "three.tif") as source,
    ):
        assert (found.shape, found.transform, found.crs) == (
            source.shape, source.transform, source.crs,
        )  # fmt: skip
        tags = found.tags(1)
        assert [tags[f"class_{i}"] for i in range(6)] == ["background", *COVER]
        assert found.colormap(1)[2] == (80, 175, 128, 255)
        classes = found.read(1)
    with rasterio.open(run / "catalogues" / "three_probabilities.tif") as heat:
        assert (heat.count, heat.transform) == (6, source.transform)
        shares = heat.read()
    best = np.take_along_axis(shares, classes[None], axis=0)[0]
    assert (best == shares.max(axis=0)).all()
    assert len(geopandas.read_file(run / "catalogues" / "three.gpkg", layer="three"))


def test_a_run_keeps_its_yaml_and_what_it_stands_for(old_run):
    run = old_run.run
    assert (run / "config.yaml").read_text() == old_run.path.read_text()
    table = pd.read_csv(run / "config.csv").set_index("key")["here"]
    assert table["sample.overlap"] == "TILE_OVERLAP = 16"
    resolved = json.loads((run / "parameters.json").read_text())
    assert resolved["PATCH_SIZES"] == [64]
    assert resolved["OPTIMIZER"] == "adabound"
    assert resolved["TEST_FILENAMES"] == [str(old_run.folder / "three.tif")]
    blocks = pd.read_csv(run / "blocks.csv").groupby("raster")["split"].agg(set)
    assert blocks["three"] == {"test"}
    assert blocks["one"] | blocks["two"] == {"train", "validation"}
    shares = pd.read_csv(run / "class_shares.csv")
    assert {"background", "1", "5"} <= set(shares)


def test_the_tiles_of_a_run_are_drawn(old_run):
    (folder,) = old_run.run.glob("trials/*/visualization")
    occasions = {path.name.partition("_")[0] for path in folder.glob("*.png")}
    assert occasions == {"init", "train", "validation", "checkpoint", "test"}
    assert len(list(folder.glob("validation_*"))) == 2
