"""Options of the model: every field by its name, checked before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import PROJECT

from ImageData import InputError
from ModelConfig import HdrLogOptions, ModelConfig, RunParameters


def test_an_option_sets_a_field_of_any_depth_and_leaves_the_rest():
    conf = ModelConfig()
    changed = conf.with_options({"norm": "batch", "train.augment.zoom": 2, "train.patience": 5})
    assert (changed.norm, changed.train.augment.zoom, changed.train.patience) == ("batch", 2, 5)
    assert conf == ModelConfig()
    assert changed.with_options({"norm": "auto", "train.augment.zoom": 1.4}).train.patience == 5
    assert ModelConfig.from_dict(changed.to_dict()) == changed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train.patiense": 5}, "no option; did you mean train.patience?"),
        ({"train": 5}, "'train', which is no option"),
        ({"train.epochs.more": 5}, "which is no option"),
        ({"train.averaging": "mean"}, "train.averaging: Input should be 'none', 'ema' or 'swa'"),
        ({"train.random_windows": False, "train.augment.zoom": 2}, "need random_windows"),
        ({"train.step_size": 2, "train.plateau_patience": 2}, "are two schedules"),
        ({"train.augment.strength": 1.5}, "train.augment.strength: Input should be less"),
        ({"segmentation.decoder_options.depth": 3}, "which is no option"),
        ({"head_depth": 9}, "head_depth: Input should be less than or equal to 4, got 9"),
    ],
)
def test_a_wrong_option_is_refused_with_what_was_expected(options, message):
    with pytest.raises(InputError) as error:
        ModelConfig().with_options(options)
    assert message in str(error.value)


def test_an_option_that_holds_options_is_set_as_a_whole():
    name, options = "segmentation.decoder_options", {"decoder_attention_type": "scse"}
    conf = ModelConfig(task="segmentation").with_options({name: options})
    assert conf.segmentation.decoder_options == options
    assert conf.with_options({name: None}) == ModelConfig(task="segmentation")
    assert conf.architecture()["decoder_options"] == options
    assert ModelConfig(task="segmentation").architecture()["decoder_options"] == {}


def run_with(tmp_path, text):
    path = tmp_path / "parameters.yaml"
    path.write_text(text)
    return RunParameters.from_files(PROJECT / "main.ipynb", path)


def test_options_of_a_run_reach_its_model(tmp_path):
    run = run_with(tmp_path, "MODEL_OPTIONS: {train.max_minutes: 12}\nMIN_VISIBLE: 0.5")
    conf = run.model_config()
    assert (conf.train.max_minutes, conf.train.min_visible) == (12, 0.5)


def test_constants_of_the_logarithm_are_those_of_the_run(tmp_path):
    run = run_with(tmp_path, "STRETCH: hdr_log\nSTRETCH_OPTIONS: {input_mul: 4, clip: 500}")
    options = run.stretch_options()
    assert options["stretch"] == "hdr_log"
    assert options["stretch_options"] == HdrLogOptions(input_mul=4.0, clip=500.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{input_mull: 2}", r"'input_mull', which is no option; did you mean input_mul\?"),
        ("{log_epsilon: 0}", "log_epsilon: Input should be greater than 0, got 0"),
        ("{clip: 5, clip_percentile: 99}", "clip and clip_percentile exclude each other"),
        ("{clip_percentile: 101}", "less than or equal to 100, got 101"),
        ("{log_pow: .inf}", "log_pow: Input should be a finite number"),
    ],
)
def test_wrong_constants_are_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        run_with(tmp_path, f"STRETCH: hdr_log\nSTRETCH_OPTIONS: {text}")


def test_constants_of_another_stretch_are_refused(tmp_path):
    with pytest.raises(InputError, match="are of STRETCH = 'hdr_log', but STRETCH = 'log'"):
        run_with(tmp_path, "STRETCH: log\nSTRETCH_OPTIONS: {clip: 5}")


def test_an_option_that_has_a_parameter_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"sets train\.lr, .* set LEARNING_RATES"):
        run_with(tmp_path, "MODEL_OPTIONS: {train.lr: 0.1}")
    with pytest.raises(InputError, match="set IOU_THRESHOLD"):
        run_with(tmp_path, "MODEL_OPTIONS: {test.iou_threshold: 0.3}")
    with pytest.raises(InputError, match=r"did you mean train\.optimizer"):
        run_with(tmp_path, "MODEL_OPTIONS: {train.optimiser: sgd}")


def test_with_a_scheduler_all_folders_are_named_from_the_root(tmp_path):
    run = run_with(tmp_path, "SCHEDULER: tcp://127.0.0.1:8786\nIMG_DIR: data/images")
    assert run.image_paths[0] == Path.cwd() / "data" / "images" / "sample_1.tif"
    assert run.run_dir == Path.cwd() / "runs" / "first_run"
    assert run.prediction_options()["scheduler"] == "tcp://127.0.0.1:8786"
    with pytest.raises(InputError, match="SCHEDULER: String should match pattern"):
        run_with(tmp_path, "SCHEDULER: myhost")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("N_EPOCHS: [1, 2, 3]", 3),
        ("SEARCH: random\nN_TRIALS: 2\nN_EPOCHS: [1, 2, 3]", 2),
        ("SEARCH: tpe\nN_TRIALS: 9\nN_EPOCHS: [1, 2, 3]", 3),  # there are no more
        ("SEARCH: tpe\nN_TRIALS: 9\nLEARNING_RATES: [0.001, 0.01]", 9),  # of a range there are
    ],
)
def test_the_trainings_of_a_search_are_counted(tmp_path, text, count):
    assert run_with(tmp_path, text).trial_count == count


def test_a_storage_must_be_postgresql(tmp_path):
    run = run_with(tmp_path, "STORAGE: postgresql://me@host/db")
    assert run.search_options()["storage"] == "postgresql://me@host/db"
    with pytest.raises(InputError, match="STORAGE must be a PostgreSQL database"):
        run_with(tmp_path, "STORAGE: sqlite:///x.db")


@pytest.mark.parametrize(
    ("text", "devices"),
    [("'2'", 2), ("'2,3'", [2, 3]), ("'3,'", [3]), ("auto", "auto"), ("[0, 1]", [0, 1])],
)
def test_devices_are_a_number_or_those_that_are_named(tmp_path, text, devices):
    assert run_with(tmp_path, f"DEVICES: {text}").model_config().devices == devices


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("N_EPOCHS: [0]", "N_EPOCHS = 0 measures the weights that a model starts from"),
        ("PREDICT_FROM: gone.ckpt", "there is no gone.ckpt; None takes this run's best"),
        ("VISUALIZATION: {batch_range: [0, 1, 1]}", "VISUALIZATION is of segmentation"),
        ("BALANCE_SEARCH: [min_annotated]", "BALANCE_SEARCH is of segmentation"),
        ("WANDB_ACTIVE: true\nLOGGER: mlflow", "WANDB_ACTIVE = True stands for LOGGER = 'wandb'"),
        (
            "TASK: segmentation\nVISUALIZATION: {colormap: gone.csv}",
            "there is no colormap gone.csv",
        ),
    ],
    ids=lambda text: text.partition(":")[0],
)
def test_what_contradicts_itself_is_refused(tmp_path, text, message):
    with pytest.raises(InputError) as caught:
        run_with(tmp_path, text)
    assert message in str(caught.value)


def test_a_logger_that_is_not_installed_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("ModelConfig.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="mlflow is not installed: pip install mlflow-skinny"):
        run_with(tmp_path, "LOGGER: mlflow")
    with pytest.raises(InputError, match=r"pip install wandb, or set WANDB_ACTIVE = False"):
        run_with(tmp_path, "WANDB_ACTIVE: true")


def test_wandb_has_two_names_and_one_way(tmp_path):
    runs = [run_with(tmp_path, text) for text in ("WANDB_ACTIVE: true", "LOGGER: wandb")]
    expected = {"logger": "wandb", "logger_options": {"project": "LargeRasterOR"}}
    assert [run.logger_options() for run in runs] == [expected] * 2


def test_values_of_classes_may_be_numbers(tmp_path):
    run = run_with(tmp_path, "TASK: segmentation\nCLASSES: {1: ship, '2': ferry}")
    assert run.CLASSES == {1: "ship", "2": "ferry"}
    assert run_with(tmp_path, "TASK: segmentation\nCLASSES: [1, 2]").CLASSES == [1, 2]


def test_class_proportions_go_by_name_or_by_number(tmp_path):
    run = run_with(tmp_path, "TASK: segmentation\nCLASS_PROPORTION: {'1': 5, road: 10}")
    options = run.tiling_options(["background", "wood", "road"])
    assert options["class_proportion"] == {1: 5, 2: 10}
    with pytest.raises(InputError, match=r"CLASS_PROPORTION names \['1'\]"):
        run.tiling_options(["road"])


def test_auxiliary_bands_are_a_parameter_and_their_file_lies_beside_the_annotations(tmp_path):
    run = run_with(
        tmp_path,
        "DF_DIR: here\nAUXILIARY: {aux_vector_file: roads.gpkg, aux_vector_dist_maps: true}",
    )
    assert run.auxiliary.aux_vector_file == str(Path("here") / "roads.gpkg")
    assert (run.auxiliary.count, run.auxiliary.aux_vector_dist_maps) == (1, True)
    assert run.prediction_options()["aux_vector_file"] == run.auxiliary.aux_vector_file
    assert run_with(tmp_path, "AUXILIARY: null").auxiliary is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("AUXILIARY: {}", "need an aux_vector_file, or coordconv_convert"),
        ("AUXILIARY: {aux_vector_fil: a}", "AUXILIARY.aux_vector_fil: Unexpected"),
        ("AUXILIARY: {coordconv_convert: maybe}", "AUXILIARY.coordconv_convert: Input should be"),
        ("AUXILIARY: {aux_vector_file: a, aux_vector_dist_log: true}", "aux_vector_dist_maps"),
        ("USE_STRATIFICATION: 2", "is of segmentation"),
        ("TASK: segmentation\nUSE_STRATIFICATION: 25", "under VALIDATION_PROPORTION, 25 %, got 25"),
        (
            "TASK: segmentation\nUSE_STRATIFICATION: 2\nVALIDATION_FILENAMES: [sample_1.tif]",
            "set one of both to None",
        ),
    ],
)
def test_wrong_bands_and_stratifications_are_refused(tmp_path, text, message):
    with pytest.raises(InputError) as error:
        run_with(tmp_path, text)
    assert message in str(error.value)


def test_options_of_the_other_task_are_refused():
    masks = ModelConfig(task="segmentation")
    with pytest.raises(
        InputError, match=r"TASK is segmentation; .* mean segmentation.focal_gamma\?"
    ):
        masks.with_options({"focal_gamma": 3.0})
    with pytest.raises(InputError, match=r"'freeze_stages', which does nothing"):
        masks.with_options({"freeze_stages": 1})
    with pytest.raises(InputError, match="TASK is detection; leave it out, or set TASK"):
        ModelConfig().with_options({"segmentation.loss": "dice"})
    assert masks.with_options({"segmentation.loss": "dice"}).segmentation.loss == "dice"
    assert ModelConfig().with_options({"focal_gamma": 3.0}).focal_gamma == 3


def test_annotations_may_lie_at_addresses(tmp_path):
    run = run_with(
        tmp_path, "TASK: segmentation\nIMAGE_FILENAMES: [a.tif, b.tif]\nDF_DIR: data\n"
        "DF_FILENAMES: [a.gpkg, 's3://box/b.gpkg']\nAOI_FILENAMES: [/vsizip/x.zip/y.gpkg, null]\n"
        "AUXILIARY: {aux_vector_file: 'https://host/roads.fgb'}\nIMAGE_COLUMN_NAME: img",
    )  # fmt: skip
    assert run.df_paths == [Path("data/a.gpkg"), "s3://box/b.gpkg"]
    assert run.region_paths == [("/vsizip/x.zip/y.gpkg", None), (None, None)]
    assert run.auxiliary.aux_vector_file == "https://host/roads.fgb"
    assert run.labelling_options()["image_column"] == "img"
