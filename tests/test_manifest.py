"""Manifests: what they list, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import PROJECT

import manifest
from ImageData import InputError
from ModelConfig import RunParameters


@pytest.fixture
def folder(tmp_path):
    for name in ("a.tif", "b.tif", "c.tif", "ref.gpkg", "about.yaml"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).touch()
    return tmp_path


def write(folder, *lines):
    path = folder / "images.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_either_slash_and_an_empty_metadata_field_are_read(folder):
    path = write(
        folder, "in/a.tif,,in/ref.gpkg,kind,trn", "", "in\\b.tif, ,in\\ref.gpkg,kind,val",
        f"{folder}/in/c.tif,in/about.yaml,in/ref.gpkg,other,tst",
    )  # fmt: skip
    table = manifest.read_manifest(path)
    assert table["image"].map(lambda p: Path(p).name).tolist() == ["a.tif", "b.tif", "c.tif"]
    assert all(Path(p).exists() for p in [*table["image"], *table["vector"]])
    assert table["split"].tolist() == ["train", "validation", "test"]
    assert table["attribute"].tolist() == ["kind", "kind", "other"]
    assert table["metadata"].isna().tolist() == [True, True, False]


def test_files_of_a_bucket_are_addresses(folder):
    path = write(folder, "in/a.tif,,in/ref.gpkg,kind,trn", "s3://other/b.tif,,/x/r.gpkg,kind,val")
    table = manifest.read_manifest(path, bucket="mine")
    assert table["image"].tolist() == ["/vsis3/mine/in/a.tif", "s3://other/b.tif"]
    assert table["vector"].tolist() == ["/vsis3/mine/in/ref.gpkg", "/vsis3/mine/x/r.gpkg"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("in/a.tif,in/ref.gpkg,kind,trn", "line 2: 4 fields, expected 5"),
        ("in/b.tif,,in/ref.gpkg,,val", "line 2: no attribute"),
        ("in/b.tif,,in/ref.gpkg,kind,train", "line 2: use 'train' is none.*perhaps trn"),
        ("in/b.tif,,in/nowhere.gpkg,kind,val", "line 2: in/nowhere.gpkg"),
        ("in/a.tif,,in/ref.gpkg,kind,val", "more than once: .*a.tif"),
    ],
)
def test_a_bad_line_is_named(folder, line, message):
    with pytest.raises(InputError, match=message):
        manifest.read_manifest(write(folder, "in/a.tif,,in/ref.gpkg,kind,trn", line))


def test_an_absent_or_empty_manifest_is_refused(folder):
    with pytest.raises(InputError, match="No such file"):
        manifest.read_manifest(folder / "none.csv")
    with pytest.raises(InputError, match="it is empty"):
        manifest.read_manifest(write(folder, ""))


def test_a_run_takes_rasters_tables_classes_and_uses_from_a_manifest(folder):
    path = write(
        folder, "in/a.tif,,in/ref.gpkg,kind,trn", "in/b.tif,,in/ref.gpkg,kind,val",
        "in/c.tif,,in/ref.gpkg,other,tst",
    )  # fmt: skip
    given = folder / "run.yaml"
    given.write_text(f"MANIFEST: {path}\nTASK: segmentation\n")
    params = RunParameters.from_files(PROJECT / "main.ipynb", given)
    assert params.image_paths == [folder / "in" / f"{name}.tif" for name in "abc"]
    assert params.df_paths == [folder / "in" / "ref.gpkg"] * 3
    assert params.label_columns == ["kind", "kind", "other"]
    options = params.split_options()
    assert (options["validation_rasters"], options["test_rasters"]) == (["b"], ["c"])
    given.write_text(f"MANIFEST: {path}\n")
    with pytest.raises(InputError, match="one column"):
        RunParameters.from_files(PROJECT / "main.ipynb", given)


def test_rasters_to_predict_come_from_a_folder_or_a_csv(folder):
    inside = str(folder / "in")
    names = [f"{inside}/{name}.tif" for name in "abc"]
    assert manifest.list_rasters(folder / "in") == names
    listed = write(folder, "in/b.tif,,,,", r"in\a.tif", "s3://far/d.tif,,in/ref.gpkg")
    assert manifest.list_rasters(listed) == [names[0], "s3://far/d.tif"]  # the first has no use
    marked = write(folder, "in/a.tif,,in/ref.gpkg,x,trn", "in/b.tif,,in/ref.gpkg,x,tst")
    assert manifest.list_rasters(marked) == [names[1]]


def test_a_list_without_a_raster_is_refused(folder):
    marked = write(folder, "in/a.tif,,in/ref.gpkg,x,trn")
    with pytest.raises(InputError, match=r"holds no raster to predict: .* no row with use tst"):
        manifest.list_rasters(marked)
    with pytest.raises(InputError, match=r"names rasters that are nowhere: in/z.tif"):
        manifest.list_rasters(write(folder, "in/z.tif"))


REGISTRY = """
north: {images: in/a.tif, masks: in/ref.gpkg, attribute: kind, tags: [cold], bands: [2, 1],
        classes: {1: house}, weight: 3}
south: {images: [in/b.tif, in/c.tif], masks: [in/ref.gpkg, in/ref.gpkg], tags: [warm],
        bands: [2, 1], classes: {2: road}, resolution: 0.5}
"""


def run_with(folder, names, registry=REGISTRY, more=""):
    (folder / "registry.yaml").write_text(registry)
    given = folder / "run.yaml"
    given.write_text(
        f"DATASETS: {names}\nDATASET_REGISTRY: {folder}/registry.yaml\nTASK: segmentation\n{more}"
    )
    return RunParameters.from_files(PROJECT / "main.ipynb", given)


def test_a_run_takes_named_datasets(folder):
    params = run_with(folder, '["tag:warm", north, south]', more="TARGET_RESOLUTION: 0.7")
    assert params.image_paths == [folder / "in" / f"{name}.tif" for name in "bca"]
    assert params.df_paths == [folder / "in" / "ref.gpkg"] * 3
    assert params.label_columns == ["label", "label", "kind"]
    assert params.BANDS == [2, 1]
    assert params.CLASSES == {2: "road", 1: "house"}
    assert params.TARGET_RESOLUTION == 0.7
    assert params.model_config().train.raster_weights == (("a", 3.0),)
    assert params.prediction_options()["resample"]
    alone = run_with(folder, "[south]")
    assert (alone.TARGET_RESOLUTION, alone.MODEL_OPTIONS) == (0.5, {})


def test_how_masks_of_named_datasets_are_read_goes_to_the_run(folder):
    more = (
        "layer: l, mask_reference: true, coordinates: map, attribute_filter: area > 3, "
        "default_label: x"
    )
    registry = REGISTRY.replace("weight: 3", f"weight: 3, {more}")
    params = run_with(folder, "[north]", registry)
    assert params.MASK_REFERENCE
    assert (params.COORDINATES, params.ATTRIBUTE_FILTER, params.DEFAULT_LABEL, params.LAYER) == (
        "map", "area > 3", "x", "l",
    )  # fmt: skip
    assert run_with(folder, "[north]", registry, "COORDINATES: lonlat").COORDINATES == "lonlat"
    plain = run_with(folder, "[north]", more="MASK_REFERENCE: true")
    assert (plain.MASK_REFERENCE, plain.COORDINATES) == (True, "auto")


@pytest.mark.parametrize(
    ("names", "registry", "message"),
    [
        ("[nort]", REGISTRY, "no dataset 'nort'; did you mean north"),
        ("[north, south]", REGISTRY, "need the same resolution.*set TARGET_RESOLUTION"),
        ("[north, south]", REGISTRY.replace("[2, 1]", "[1]", 1), "need the same bands"),
        (
            "[north, south]",
            REGISTRY.replace("resolution: 0.5", "mask_reference: true"),
            "need the same mask_reference.*write the same to all",
        ),
        (
            "[north, south]",
            REGISTRY.replace("2: road", "1: road").replace(", resolution: 0.5", ""),
            "value 1 means 'house' in one dataset and 'road' in south",
        ),
    ],
)
def test_datasets_that_are_unknown_or_differ_are_refused(folder, names, registry, message):
    with pytest.raises(InputError, match=message):
        run_with(folder, names, registry)


def test_named_datasets_take_one_name_of_the_attribute(folder):
    with pytest.raises(InputError, match=r"is one name, got .*write the attribute of \['south'\]"):
        run_with(folder, "[south]", more="LABEL_COLUMN_NAME: [a, b]")
    assert run_with(folder, "[north]", more="LABEL_COLUMN_NAME: [a]").label_columns == ["kind"]
