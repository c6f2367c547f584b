"""Preflight: what it says of pairs and plans, and what it refuses."""

from __future__ import annotations

import ast
import json

import numpy as np
import pandas as pd
import pytest
import shapely
import yaml
from conftest import PROJECT
from segments import make_segments

import fileio
import preflight
import splits
import tiling
from ImageData import ImageData, InputError, Window
from ModelConfig import RunParameters


@pytest.fixture
def params(small_sample, tmp_path):
    """A file of parameters for the small sample."""
    values = {
        "RUN_NAME": "check", "RUNS_DIR": str(tmp_path / "runs"),
        "IMG_DIR": str(small_sample.folder / "images"),
        "DF_DIR": str(small_sample.folder / "datasets"),
        "IMAGE_FILENAMES": ["one.tif", "two.tif"], "DF_FILENAMES": ["one.csv", "two.csv"],
        "PATCH_SIZES": [128, 96], "N_EPOCHS": [2, 4], "LEARNING_RATES": [0.001, 0.002],
        "FPN_CHANNELS": 16, "WORKERS": 1,
    }  # fmt: skip
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_pairs_say_what_was_read(prepared):
    pairs = preflight.describe_pairs(prepared.images, prepared.report)
    first, image = pairs.iloc[0], prepared.images[0]
    assert pairs.index.tolist() == ["one", "two"]
    assert (first["size"], first["bands"], first["dtype"]) == ("640 x 512", 1, "uint8")
    assert first["objects"] == len(image.df)
    assert first["diameter_px_50%"] == pytest.approx(image.df["diameter"].median())
    assert first["counted"] == 1.0
    assert first["rows"] == len(pd.read_csv(prepared.tables[0]))
    assert first["dropped"] == first["rows"] - first["objects"]
    reasons = first["why_dropped"].split("; ")
    assert sum(int(part.rpartition(": ")[2]) for part in reasons) == first["dropped"]
    for label, count in image.df["label"].value_counts().head(5).items():
        assert f"{label}: {count}" in first["labels"]


def test_the_valid_share_counts_nodata_and_regions(tmp_path):
    path = tmp_path / "half.tif"
    layout = {"width": 512, "height": 256, "count": 1, "dtype": "uint8", "nodata": 0}
    pixels = np.ones((1, 256, 512), np.uint8)
    pixels[..., 256:] = 0
    with fileio.create_raster(path, **layout) as dst:
        dst.write(pixels)
    raster = fileio.read_raster(path)
    assert tiling.counted_share(raster) == 0.5
    aoi = fileio.Regions(aoi=(shapely.box(0, 0, 128, 256),))
    assert tiling.counted_share(raster.with_regions(aoi)) == pytest.approx(0.25, abs=0.02)


def test_the_plan_counts_what_tiling_then_makes(prepared, params, tmp_path):
    run = RunParameters.from_files(PROJECT / "main.ipynb", params)
    options = tiling.TilingOptions(
        evaluation_overlap=tiling.evaluation_overlap(prepared.images), **run.tiling_options()
    )
    plan = preflight.plan_run(run, prepared.images, prepared.blocks, options)
    assert plan.index.tolist() == [128, 96]
    made = tiling.make_tiles(prepared.images, prepared.blocks, [128, 96], tmp_path, options)
    for size, directory in made.items():
        tiles, boxes = tiling.read_tiles(directory)
        kept = tiles[tiles["kept"]]["split"].value_counts()
        assert plan.loc[size, "train_tiles"] == kept["train"]
        assert plan.loc[size, "validation_tiles"] == kept["validation"]
        assert plan.loc[size, "test_tiles"] == kept["test"]
        assert plan.loc[size, "densest"] == boxes["window"].value_counts().max()
    assert (plan["trainings"] == 4).all()  # two epoch counts, two learning rates
    assert (plan["step_s"] > 0).all()
    steps = plan["train_tiles"] / 4
    training = 2 * (2 + 4) * steps * plan["step_s"] / 3600
    assert (plan["hours"] > training).all()  # looking at validation and test takes time, too
    assert (plan["memory_gb"] > 0.2).all()


def test_misfits_are_said_in_sentences():
    fit = {"small": 0.0, "large": 0.0, "anchors_fit": 1.0}
    plan = pd.DataFrame([fit, {"small": 0.2, "large": 0.5, "anchors_fit": 0.5}], index=[256, 64])
    assert preflight.find_misfits(plan.iloc[:1]) == []
    small, large, anchors = preflight.find_misfits(plan)
    assert "20% of the objects are under 4 px" in small
    assert "50.0% of the objects are larger than half a tile of 64 px" in large
    assert "50% of the training objects have no anchor" in anchors


def test_the_command_prints_tables_and_leaves_nothing(params, capsys, tmp_path):
    assert preflight.main(["--params", str(params)]) == 0
    out = capsys.readouterr().out
    for word in (
        "640 x 512",
        "512 x 512",
        "diameter_px_50%",
        "train_tiles",
        "hours",
        "anchors_fit",
    ):
        assert word in out
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_the_same_command_is_reached_through_fileio(params, capfd):
    assert fileio.main(["preflight", "--params", str(params)]) == 0
    assert "train_tiles" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"DF_FILENAMES": ["one.csv", "gone.csv"]}, "gone.csv does not exist"),
        ({"DF_FILENAMES": ["one.csv", "far.csv"]}, "has no valid row left of 2"),
        ({"TILE_SIZES": [64]}, "unknown parameter TILE_SIZES"),
        ({"BANDS": [2]}, "has the bands 1 to 1, got [2]"),
        ({"PATCH_SIZES": [600]}, "tile_size must be <= 512 px"),
    ],
)
def test_what_cannot_work_ends_with_a_message(params, small_sample, capsys, changes, message):
    far = "pixel_x,pixel_y,diameter,label\n90000,50,10,a\n-700,50,10,a\n"
    (small_sample.folder / "datasets" / "far.csv").write_text(far)
    params.write_text(yaml.safe_dump(yaml.safe_load(params.read_text()) | changes))
    assert preflight.main(["--params", str(params)]) == 1
    assert message in capsys.readouterr().err


def test_files_that_are_no_parameters_are_named(tmp_path):
    notebook = PROJECT / "main.ipynb"
    for text, message in (("[1, 2]", "must hold lines"), ("a: [", "cannot be read as YAML")):
        path = tmp_path / "p.yaml"
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            RunParameters.from_files(notebook, path)
    with pytest.raises(InputError, match="no notebook with a parameters cell"):
        RunParameters.from_files(path)
    cells = json.loads(notebook.read_text())["cells"]
    source = "".join(
        next(c for c in cells if "parameters" in c["metadata"].get("tags", []))["source"]
    )
    seed = next(n for n in ast.parse(source).body if n.targets[0].id == "SEED")
    assert RunParameters.from_files(notebook).SEED == ast.literal_eval(seed.value)


def test_a_training_ground_without_objects_is_refused(prepared, params):
    run = RunParameters.from_files(PROJECT / "main.ipynb", params)
    blocks = prepared.blocks.assign(split=["train"] + ["test"] * (len(prepared.blocks) - 1))
    b = blocks.iloc[0]
    images = [
        ImageData(i.raster, i.image_identifier,
                  i.df[~(i.df["pixel_x"].between(b.x, b.x + b.width)
                         & i.df["pixel_y"].between(b.y, b.y + b.height))])
        for i in prepared.images
    ]  # fmt: skip
    with pytest.raises(InputError, match="no object lies on training ground"):
        preflight.plan_run(run, images, blocks, tiling.TilingOptions())


def test_a_raster_that_is_cut_short_does_not_pass(params, small_sample, capsys):
    whole = (small_sample.folder / "images" / "one.tif").read_bytes()
    cut = small_sample.folder / "images" / "cut.tif"
    cut.write_bytes(whole[: len(whole) * 3 // 4])
    values = yaml.safe_load(params.read_text()) | {"IMAGE_FILENAMES": ["cut.tif", "two.tif"]}
    params.write_text(yaml.safe_dump(values))
    assert preflight.main(["--params", str(params)]) == 1
    assert "cut.tif cannot be read" in capsys.readouterr().err


@pytest.fixture
def cover(tmp_path):
    """A file of parameters for a segmentation of two rasters."""
    made = make_segments(tmp_path)
    values = {
        "TASK": "segmentation", "RUN_NAME": "check", "RUNS_DIR": str(tmp_path / "runs"),
        "IMG_DIR": str(tmp_path), "DF_DIR": str(tmp_path),
        "IMAGE_FILENAMES": ["ground0.tif", "ground1.tif"],
        "DF_FILENAMES": ["mask0.tif", "mask1.tif"], "CLASSES": {"0": "calm", "1": "rough"},
        "PATCH_SIZES": [64, 96], "BATCH_SIZES": [2], "BACKBONE": "mobilenet_v2", "WORKERS": 1,
        "BLOCK_SIZE": 128, "USE_STRATIFICATION": 5,
    }  # fmt: skip
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(values))
    return path, made


def test_a_segmentation_is_planned_by_its_tiles_and_classes(cover, capsys):
    path, made = cover
    run = RunParameters.from_files(PROJECT / "main.ipynb", path)
    pairs, plan, shares, misfits = preflight.check_masks(run)
    assert misfits == []
    assert pairs["size"].tolist() == ["384 x 384"] * 2
    assert pairs["labels_of_all"].str.startswith("calm: ").all()
    # blocks are no larger than what is looked at of each: the shares are exact
    px = np.zeros(2)
    for image in made.images:
        mask = image.labels.read(Window(0, 0, 384, 384))
        px += np.bincount(mask[mask != 255], minlength=2)
    np.testing.assert_allclose(shares["all"], px / px.sum())
    np.testing.assert_allclose(shares[["train", "validation", "test"]].sum(), 1)
    assert shares["validation"].to_numpy() == pytest.approx(shares["train"].to_numpy(), abs=0.05)
    blocks = preflight._blocks(run, made.images)
    counts = tiling.count_blocks(blocks, made.images, workers=1)
    blocks = splits.stratify_validation(blocks, counts, **run.stratification_options())
    assert shares["of_blocks"].eq((blocks["split"] == "train").sum()).all()
    options = tiling.TilingOptions(evaluation_overlap=64, **run.tiling_options(["calm", "rough"]))
    windows, _ = tiling.index_windows(64, made.images, blocks, options)
    assert plan.loc[64, "test_tiles"] == (windows["split"] == "test").sum()
    assert plan.loc[64, "trainings"] == 1
    assert plan[["read_s", "step_s", "hours", "memory_gb", "disk_mb"]].gt(0).all(axis=None)
    assert preflight.main(["--params", str(path)]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("read_s", "of_blocks", "rough", "no misfit found"))


def test_classes_that_are_nowhere_or_rare_are_told():
    shares = pd.DataFrame(
        {"train": [0.997, 0.003, 0.0], "validation": [0.9, 0.1, 0.0], "test": [0.9, 0.05, 0.05],
         "blocks": [9, 2, 0], "of_blocks": 9}, index=["field", "road", "ice"],
    )  # fmt: skip
    rare, nowhere = preflight.find_class_misfits(shares)
    assert "class road has 0.30% of the training ground, on 2 of 9 blocks" in rare
    assert "class ice is not seen in the middle of any train and any validation block" in nowhere
