"""Pictures: each function draws what it was given, and returns it."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

import fileio
import implot
import study
from ImageData import BOX_COLUMNS, Window


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def boxes_drawn(ax):
    return sum(len(c.get_segments()) for c in ax.collections if isinstance(c, LineCollection))


def test_annotations_are_drawn_over_their_raster(prepared, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: pytest.fail("a picture showed itself"))
    image = prepared.images[0]
    ax = implot.plot_image_with_annotations(image.raster, image.df)
    assert isinstance(ax, Axes)
    assert boxes_drawn(ax) == len(image.df)
    assert ax.get_xlim() == (0, 640)
    assert ax.get_ylim() == (512, 0)
    zoomed = implot.plot_image_with_annotations(image.raster, image.df, Window(100, 50, 64, 32))
    assert zoomed.get_xlim() == (100, 164)
    np.testing.assert_array_equal(zoomed.images[0].get_array().shape[:2], (32, 64))


def test_an_axes_given_is_drawn_into(prepared):
    _, ax = plt.subplots()
    assert implot.plot_diameters(prepared.images, [128], ax=ax) is ax
    assert len(plt.get_fignums()) == 1


def test_split_maps_and_label_counts_show_every_split(prepared):
    ax = implot.plot_split_map(prepared.images[0], prepared.blocks)
    names = [text.get_text().split(" (")[0] for text in ax.get_legend().get_texts()]
    assert names == ["train", "validation", "test"]
    ax = implot.plot_label_counts(prepared.counts)
    assert len(ax.patches) == prepared.counts.size


def test_turned_tiles_carry_turned_boxes(prepared):
    rasters = {image.image_identifier: image.raster for image in prepared.images}
    figure = implot.plot_tiles(prepared.tiles, prepared.boxes, rasters, count=4)
    assert [ax.get_title().split(", ")[1] for ax in figure.axes] == ["0°", "90°", "180°", "270°"]
    assert len({boxes_drawn(ax) for ax in figure.axes}) == 1


def test_the_search_heatmap_shows_the_best_of_each_pair():
    board = pd.DataFrame(
        {"patch_size": 128, "n_epochs": [1, 1, 2, 2, 2], "sample_size": [0.5, 1, 0.5, 1, 1],
         "learning_rate": 1e-3, "batch_size": 4, "AP50": [0.1, 0.2, 0.3, 0.5, 0.4]}
    )  # fmt: skip
    ax = implot.plot_search_heatmap(board)
    assert {ax.get_xlabel(), ax.get_ylabel()} == {"n_epochs", "sample_size"}
    np.testing.assert_allclose(ax.images[0].get_array(), [[0.1, 0.3], [0.2, 0.5]])
    single = implot.plot_search_heatmap(board.head(1))
    assert single.images[0].get_array().shape == (1, 1)


def test_confusion_curve_and_learning_are_drawn():
    confusion = pd.DataFrame(
        {
            "(truth)": ["a", "b", "(background)"],
            "a": [3, 1, 2],
            "b": [0, 4, 0],
            "(missed)": [1, 0, 0],
        }
    )
    ax = implot.plot_confusion(confusion)
    assert [t.get_text() for t in ax.texts] == [*"30114020", ""]
    curve = pd.DataFrame({"recall": [0.2, 0.8], "precision": [1.0, 0.7]})
    values = {"box_recall": 0.8, "box_precision": 0.7, "box_f1": 0.75, "score_threshold": 0.4,
              "AP50": 0.6}  # fmt: skip
    ax = implot.plot_precision_recall(curve, values)
    assert "F1 0.750" in ax.get_legend().get_texts()[0].get_text()
    records = pd.DataFrame(
        {"step": [1, 2, 3, 4], "epoch": [0, 0, 1, 2], "val_loss": [2.0, np.nan, 1.0, 9.0],
         "train_loss_epoch": [np.nan, 1.0, 0.5, np.nan]}
    )  # fmt: skip
    ax = implot.plot_learning_curves(records)
    assert [line.get_ydata().tolist() for line in ax.get_lines()] == [[1.0, 0.5], [2.0, 1.0]]


def test_density_counts_detections_on_test_ground_only(prepared):
    block = prepared.blocks[prepared.blocks["split"] == "test"].iloc[0]
    inside = {"raster": block["raster"], "pixel_x": [block["x"] + 5.0] * 3,
              "pixel_y": [block["y"] + 5.0] * 3}  # fmt: skip
    ax = implot.plot_density(
        pd.DataFrame(inside).assign(block=block["block"]), prepared.blocks, block["raster"], cell=64
    )
    tests = prepared.blocks[prepared.blocks["split"] == "test"]
    drawn = [shown.get_array() for shown in ax.images]
    assert len(drawn) == (tests["raster"] == block["raster"]).sum()
    assert sum(cells.sum() for cells in drawn) == 3


def test_detections_stand_beside_the_truth(prepared):
    block = prepared.blocks[prepared.blocks["split"] == "test"].iloc[0]
    image = next(i for i in prepared.images if i.image_identifier == block["raster"])
    center = (image.df["xmin"] + image.df["xmax"]) / 2, (image.df["ymin"] + image.df["ymax"]) / 2
    inside = center[0].between(block["x"], block["x"] + block["width"])
    inside &= center[1].between(block["y"], block["y"] + block["height"])
    mine = image.df[inside]
    found = mine.head(5).assign(block=block["block"], score=0.9, found=[0, 1, 2, -1, -2])
    objects = mine.head(4).assign(
        block=block["block"], object=range(4), counted=[True, True, True, True]
    )
    figure = implot.plot_detections(image, found, objects, block)
    left, right = figure.axes
    assert boxes_drawn(left) == 4
    assert left.get_title() == "truth: 4, 1 of them missed"
    assert boxes_drawn(right) == 5
    assert right.get_title() == "detections: 5, 1 of them spurious"
    assert left.get_xlim() == right.get_xlim()


def test_a_catalogue_is_drawn_in_detail_and_as_a_whole(prepared):
    image = prepared.images[0]
    figure = implot.plot_catalogue(image.raster, image.df, max_side=200)
    detail, overview = figure.axes[:2]
    (counts,) = (shown.get_array() for shown in overview.images)
    assert counts.sum() == len(image.df)
    assert boxes_drawn(detail) == int(detail.get_title().split()[3])
    x0, x1 = detail.get_xlim()
    y1, y0 = detail.get_ylim()
    assert (x1 - x0, y1 - y0) == (200, 200)
    inside = image.df["pixel_x"].between(x0, x1) & image.df["pixel_y"].between(y0, y1)
    assert boxes_drawn(detail) == inside.sum()
    assert len(implot.plot_catalogue(image.raster, image.df[:0]).axes) == 3


def test_a_session_without_a_notebook_keeps_its_backend():
    assert implot.use_backend(interactive=True) is False


def error_table(raster):
    kinds = ["missed"] * 3 + ["spurious"] * 8
    boxes = np.array(
        [[0, 0, 10, 8], [60, 60, 70, 70], [620, 500, 640, 512]] + [[30, 30, 38, 42]] * 8
    )
    table = pd.DataFrame(boxes, columns=BOX_COLUMNS)
    truth = table.head(3).reindex(table.index).add_prefix("true_")
    return pd.concat([table, truth], axis=1).assign(
        kind=kinds, raster=raster, label="crater", true_label="crater", pixel_x=1, pixel_y=2,
        score=[0.3, np.nan, np.nan, *np.linspace(0.9, 0.6, 8)], iou=0.25,
    )  # fmt: skip


def test_a_contact_sheet_has_a_row_of_cut_outs_for_each_kind(prepared):
    image = prepared.images[0]
    errors = error_table(image.image_identifier)
    figure = implot.plot_errors(errors, {image.image_identifier: image.raster})
    shown = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title().split()[0] for ax in shown] == ["missed"] * 3 + ["spurious"] * 6
    assert figure.get_suptitle() == "3 of 3 missed, 6 of 8 spurious"
    assert shown[0].get_title() == "missed 0.30, IoU 0.25\ncrater"
    assert shown[1].get_title() == "missed never seen\ncrater"
    assert {boxes_drawn(ax) for ax in shown} == {1}
    (y1, y0), (x0, x1) = shown[0].get_ylim(), shown[0].get_xlim()
    assert (x0, x1, y0, y1) == (-11, 21, -12, 20)  # 32 px around its centre, beyond the raster
    np.testing.assert_array_equal(shown[0].images[0].get_array()[:12], 0)
    x0, x1 = shown[2].get_xlim()
    assert x1 - x0 == 60  # three sides of the object
    one = implot.plot_errors(errors, {image.image_identifier: image.raster}, "spurious", count=7)
    assert one.get_suptitle() == "7 of 8 spurious"
    assert sum(bool(ax.images) for ax in one.axes) == 7
    assert not any(ax.images for ax in implot.plot_errors(errors[:0], {}).axes)


def test_a_contact_sheet_reads_cut_outs_of_rasters_of_any_type(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).normal(1e-9, 1e-10, (5, 200, 300)).astype(np.float32)
    pixels[:, :20] = np.nan
    profile = {"width": 300, "height": 200, "count": 5, "dtype": "float32", "nodata": np.nan}
    with fileio.create_raster(tmp_path / "x.tif", **profile) as dst:
        dst.write(pixels)
    raster, sizes = fileio.read_raster(tmp_path / "x.tif"), []
    read = type(raster).read
    monkeypatch.setattr(
        type(raster), "read",
        lambda self, window: sizes.append(window[2:]) or read(self, window),
    )  # fmt: skip
    monkeypatch.setattr(type(raster), "preview", lambda *_: pytest.fail("it was read whole"))
    objects = pd.DataFrame([[20, 30, 45, 40], [100, 100, 110, 110]], columns=BOX_COLUMNS)
    objects = objects.assign(raster="x", counted=[True, True])
    figure = implot.plot_errors(error_table("x")[3:5], {"x": raster}, objects=objects)
    assert sizes == [(36, 36)] * 2
    assert [boxes_drawn(ax) for ax in figure.axes if ax.images] == [2, 2]
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape == (36, 36, 3)
    assert (shown[:2] == 0).all()
    assert shown[2:].std() > 30


def board_of(count, **columns):
    rng = np.random.default_rng(0)
    score = rng.uniform(0.4, 0.9, count)
    table = {
        "state": "complete", "patch_size": rng.choice([128, 256], count), "n_epochs": 4,
        "sample_size": rng.choice([0.5, 1.0], count), "batch_size": 8,
        "learning_rate": 10 ** rng.uniform(-4, -2, count), "val_AP50": score,
    }  # fmt: skip
    board = pd.DataFrame(table | columns)
    return board.assign(selected=board["val_AP50"] == board["val_AP50"].max())


def test_every_trial_is_a_line_through_what_differs():
    state = ["fail", "pruned", "pruned", *["complete"] * 9]
    board = board_of(12, state=state, pruned_val_AP50=0.3)
    board.loc[:2, "val_AP50"] = np.nan
    ax = implot.plot_parallel_coordinates(board)
    names = [text.get_text() for text in ax.get_xticklabels()]
    assert names == ["patch_size", "sample_size", "learning_rate", "validation AP50"]
    (lines,) = ax.collections
    assert len(lines.get_segments()) == 11
    assert {len(line) for line in lines.get_segments()} == {4}
    assert sorted(lines.get_linewidths())[-2:] == [1.3, 3.5]  # the selected one
    lowest = [line for line in lines.get_segments() if line[-1, 1] == pytest.approx(0.05)]
    assert len(lowest) == 2  # the stopped ones


@pytest.mark.parametrize("score", [0.5, 0.0])
def test_trials_that_are_all_alike_are_drawn(score):
    ax = implot.plot_parallel_coordinates(board_of(2, val_AP50=score))
    assert len(ax.collections[0].get_segments()) == 2
    one = board_of(2, state=["complete", "fail"], val_AP50=[0.5, np.nan])
    assert len(implot.plot_parallel_coordinates(one).collections[0].get_segments()) == 1


def test_what_decides_is_the_longest_bar():
    board = board_of(40)
    board["val_AP50"] = 0.5 + 0.3 * (board["patch_size"] == 256) + 0.01 * board["sample_size"]
    shares = study.importances(board)
    assert shares.index[0] == "patch_size"
    assert shares.iloc[0] > 0.5
    assert shares.sum() == pytest.approx(1)
    assert set(shares.index) == {"patch_size", "sample_size", "learning_rate"}
    ax = implot.plot_importance(shares)
    assert [bar.get_width() for bar in ax.patches] == shares.iloc[::-1].tolist()
    assert len(study.importances(board.head(4))) == 0  # too few to tell
