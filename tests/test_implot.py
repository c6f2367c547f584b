"""Pictures: each function draws what it was given, and returns it."""

from __future__ import annotations

import queue
import threading
from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

import fileio
import implot
import imutils
import splits
import study
import trials
from ImageData import BOX_COLUMNS, IGNORE, Window
from masks import ClassTable
from ModelConfig import ModelConfig


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


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_diameters_stand_beside_tiles_and_anchors(prepared):
    ax = implot.plot_diameters(prepared.images, [96, 128], [4.0, 8.0, 16.0])
    objects = sum(len(image.df) for image in prepared.images)
    assert ax.get_title() == f"Diameters of {objects:,} objects"
    lines = {line.get_label(): line.get_xdata() for line in ax.get_lines()}
    assert list(lines.pop("anchors of 4 to 16 px")) == [4, 8, 16]
    assert sorted(x[0] for x in lines.values()) == [96, 128]
    assert "tiles of 96, 128 px" in legend_of(ax)
    assert ax.get_xlim()[0] < 4
    assert ax.get_xlim()[1] > 128
    counted = sum(int(np.diff(patch.get_xy()[:, 1]).clip(0).sum()) > 0 for patch in ax.patches)
    assert counted == len({label for image in prepared.images for label in image.df["label"]})


def test_labels_are_counted_before_and_after_the_rare_ones_merge(prepared):
    labels = pd.read_csv(prepared.folder / "clean" / "labels.csv")
    cleaned = pd.concat([image.df for image in prepared.images])
    assert labels["objects"].sum() == len(cleaned)
    assert labels["objects"].is_monotonic_decreasing
    table = pd.DataFrame(
        {"label": list("abcd"), "objects": [50, 30, 6, 4], "common": [True, True, False, False]}
    )
    ax = implot.plot_common_labels(table)
    assert ax.get_title() == "Labels: 4 before, 3 after"
    assert [text.get_text().strip() for text in ax.texts] == ["50", "30", "6", "4", "10"]
    assert ax.get_yticklabels()[-1].get_text() == "after: Unknown"
    assert [bar.get_width() for bar in ax.patches] == [50, 30, 6, 4, 10]
    many = pd.DataFrame({"label": map(str, range(40)), "objects": 1, "common": False})
    assert "15 rarer labels" in [
        t.get_text() for t in implot.plot_common_labels(many).get_yticklabels()
    ]


def test_many_labels_share_a_gray_and_legends_stay_inside_their_figure(prepared):
    image = prepared.images[0]
    labels = [f"a rather long name of kind {i % 20}" for i in range(len(image.df))]
    df = image.df.assign(label=labels)
    ax = implot.plot_image_with_annotations(image.raster, df)
    assert len(legend_of(ax)) == 7
    assert legend_of(ax)[-1].startswith("14 other labels (")
    ax.figure.canvas.draw()
    box = ax.get_legend().get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= ax.figure.bbox.x1


def test_a_hundred_thousand_boxes_are_dots(prepared):
    image = prepared.images[0]
    df = image.df.iloc[np.arange(100_000) % len(image.df)]
    ax = implot.plot_image_with_annotations(image.raster, df)
    assert not boxes_drawn(ax)
    assert sum(len(dots.get_offsets()) for dots in ax.collections) == 100_000


def test_the_stretch_is_drawn_per_band_with_its_bounds():
    pixels = np.random.default_rng(0).integers(200, 3000, (3, 4000)).astype(np.uint16)
    radiometry = imutils.measure_radiometry(pixels)
    figure = implot.plot_stretch(pixels, radiometry, bands=(4, 1, 2))
    assert len(figure.axes) == 6
    left, right = figure.axes[:2]
    assert left.get_ylabel() == "band 4\n% of pixels"
    assert left.get_lines()[0].get_xdata()[0] == radiometry.low[0]
    assert left.get_lines()[1].get_xdata()[0] == radiometry.high[0]
    assert [line.get_xdata()[0] for line in right.get_lines()[:2]] == [0, 1]
    assert right.get_title() == f"mean {radiometry.mean[0]:.3f}, deviation {radiometry.std[0]:.3f}"
    many = implot.plot_stretch(
        np.repeat(pixels, 5, axis=0), imutils.measure_radiometry(np.repeat(pixels, 5, axis=0))
    )
    assert len(many.axes) == 2 * implot.MAX_BANDS
    assert "the first 8 of 15 bands" in many.get_suptitle()


def test_light_of_many_decades_is_drawn_in_bins_of_its_logarithm():
    pixels = np.random.default_rng(0).lognormal(0, 3, (3, 4000)).astype(np.float32)
    pixels[:, :50] = 0
    left, right = implot.plot_stretch(pixels, imutils.measure_radiometry(pixels, "hdr_log")).axes[
        :2
    ]
    assert left.get_xscale() == "symlog"
    assert right.get_xscale() == "linear"
    (steps,) = (patch.get_path().vertices for patch in left.patches)
    assert steps[:, 0].max() == pytest.approx(pixels[0].max())
    assert steps[steps[:, 0] < 1e-3, 1].max() > 1, "black is a bin of its own"


def test_ticks_are_written_as_powers_and_labels_with_their_dollars(prepared):
    pixels = np.random.default_rng(0).normal(0.5, 0.1, (1, 1000)).astype(np.float32)
    figure = implot.plot_stretch(pixels, imutils.measure_radiometry(pixels, "minmax"))
    image = replace(prepared.images[0], df=prepared.images[0].df.assign(label="$x$ of $y"))
    (legend,) = (ax.get_legend() for ax in [implot.plot_diameters([image])])
    figure.canvas.draw()
    ticks = [t for ax in figure.axes for t in ax.get_yticklabels() if t.get_text()]
    assert all(t._preprocess_math(t.get_text())[1] for t in ticks)  # drawn as a formula
    text = legend.get_texts()[0]
    assert text._preprocess_math(text.get_text()) == (f"$x$ of $y ({len(image.df)})", False)


def test_a_mosaic_lays_the_tiles_of_a_block_side_by_side_as_they_lie(prepared):
    rasters = {image.image_identifier: image.raster for image in prepared.images}
    tiles = prepared.tiles.copy()
    block = tiles.loc[tiles["split"] == "train", "block"].iloc[0]
    mine = tiles[(tiles["block"] == block) & (tiles["angle"] == 0)]
    out = mine.index[0]
    tiles.loc[out, ["kept", "reason"]] = [False, "black_pixel_filter"]
    figure = implot.plot_tile_mosaic(tiles, prepared.boxes, rasters, block)
    shown = [ax for ax in figure.axes if ax.images]
    assert len(shown) == len(mine)
    assert f"{len(mine)} tiles of 128 px, {len(mine) - 1} kept" in figure.get_suptitle()
    assert shown[0].texts[0].get_text() == "black_pixel_filter"
    expected = prepared.boxes["window"].isin(mine["window"]).sum()
    assert sum(boxes_drawn(ax) for ax in shown) == expected
    places = [(round(-ax.get_position().y0, 3), round(ax.get_position().x0, 3)) for ax in shown]
    assert places == sorted(places)  # by rows, then by columns, as `mine` is


def square_boxes(sides, **columns):
    table = pd.DataFrame({"xmin": 0.0, "ymin": 0.0, "xmax": sides, "ymax": sides})
    return table.assign(raster="x", counted=True, found=0, **columns)


def test_sizes_are_counted_from_above_per_area_with_their_errors():
    blocks = pd.DataFrame(
        {"raster": "x", "width": 1000, "height": [1000, 3000], "split": ["test", "train"]}
    )
    truth = square_boxes([2.0, 4.0, 4.5, 8.0, 16.0])
    truth.loc[4, "counted"] = False
    found = square_boxes([4.0, 8.0], score=0.9)
    raster = SimpleNamespace(resolution=None)
    ax = implot.plot_size_frequency(found, truth, blocks, {"x": raster})
    assert ax.get_xlabel() == "diameter (px)"
    assert ax.get_title() == "Size-frequency on 1 megapixel of test ground"
    assert legend_of(ax) == ["truth (4)", "detections (2)"]
    curve, other = (container.lines[0] for container in ax.containers)
    np.testing.assert_allclose(curve.get_xdata(), 2 ** np.arange(1, 3.1, 0.5))
    np.testing.assert_allclose(curve.get_ydata(), [4, 3, 3, 1, 1])  # per megapixel
    np.testing.assert_allclose(other.get_ydata(), [2, 1, 1])
    bars = ax.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose(bars[0][:, 1], [4 - 2, 4 + 2])
    metric = implot.plot_size_frequency(
        found, truth, blocks, {"x": SimpleNamespace(resolution=2.0)}
    )
    assert metric.get_title() == "Size-frequency on 4 km² of test ground"
    curve = metric.containers[0].lines[0]
    np.testing.assert_allclose([curve.get_xdata()[0], curve.get_ydata()[0]], [4, 1])


def test_tables_without_rows_make_pictures_that_say_so(prepared):
    image = prepared.images[0]
    none = image.df[:0]
    values = {"score_threshold": 0.5, "box_f1": 0, "AP50": 0}
    curve = pd.DataFrame(columns=["threshold", "precision", "recall", "f1"])
    labels = pd.DataFrame(columns=["label", "objects", "common"])
    missing = square_boxes([1.0])[:0]
    blocks = prepared.blocks
    rasters = {i.image_identifier: i.raster for i in prepared.images}
    for drawn, text in (
        (implot.plot_diameters([replace(image, df=none)], [128], [4, 8]), "no objects"),
        (implot.plot_common_labels(labels), "no labels"),
        (implot.plot_label_counts(prepared.counts[:0]), "no objects"),
        (implot.plot_learning_curves(pd.DataFrame({"step": [0], "epoch": [0]})), "no epoch yet"),
        (implot.plot_precision_recall(curve, values), "no detections"),
        (implot.plot_f1_threshold(curve, values), "no detections"),
        (
            implot.plot_size_frequency(missing, missing, blocks, rasters),
            "no objects, no detections",
        ),
        (
            implot.plot_density(missing, blocks[blocks["split"] != "test"], "one"),
            "no test ground on this raster",
        ),
        (implot.plot_tiles(prepared.tiles[:0], prepared.boxes, rasters), "no training tiles"),
        (implot.plot_tile_mosaic(prepared.tiles[:0], prepared.boxes, rasters), "no tiles"),
    ):
        ax = drawn.axes[0] if hasattr(drawn, "axes") and hasattr(drawn, "savefig") else drawn
        assert text in [t.get_text() for t in ax.texts]
        ax.figure.canvas.draw()


def test_curves_grow_while_a_training_writes_its_record(tmp_path, monkeypatch):
    monkeypatch.setattr(implot, "LOOK", 0.05)
    monkeypatch.setattr(implot, "REST", 0)
    header = "step,epoch,train_loss_step,train_loss_epoch,val_loss\n"
    record, earlier = (tmp_path / name / "metrics.csv" for name in (".size-4~ab", "size-2"))
    earlier.parent.mkdir()
    earlier.write_text(f"{header}0,0,,0.5,0.4\n")
    pictures, done, titles = queue.Queue(), threading.Event(), []
    draw = implot.plot_learning_curves
    monkeypatch.setattr(
        implot, "plot_learning_curves",
        lambda records, ax, title: titles.append(title) or draw(records, ax, title),
    )  # fmt: skip
    old = implot._record_times(tmp_path)
    watch = threading.Thread(target=implot._watch, args=(tmp_path, pictures.put, done, old))
    watch.start()
    try:
        record.parent.mkdir()
        record.write_text(f"{header}0,0,1.0,,\n")
        for epoch in range(2):
            with record.open("a") as file:
                file.write(f"{epoch},{epoch},,0.5,0.4\n")
            assert pictures.get(timeout=60).data.startswith(b"\x89PNG")
        with record.open("a") as file:
            file.write('2,2,0.3,,\n3,2,,0.25,"0.')  # a step, and half a line
    finally:
        done.set()
        watch.join(60)
    assert not watch.is_alive()
    assert pictures.empty()
    assert titles == ["size-4"] * 2  # and nothing of the training before


def test_curves_show_nothing_without_a_notebook(tmp_path):
    before = threading.active_count()
    with implot.live_curves(tmp_path):
        assert threading.active_count() == before


def test_split_maps_and_label_counts_show_every_split(prepared):
    ax = implot.plot_split_map(prepared.images[0], prepared.blocks)
    names = [text.get_text().split(" (")[0] for text in ax.get_legend().get_texts()]
    assert names == ["train", "validation", "test", "object"]
    figure = implot.plot_split_maps(prepared.images, prepared.blocks)
    assert [ax.get_title() for ax in figure.axes] == ["one", "two"]
    patches = [sum(patch.get_fill() for patch in ax.patches) for ax in figure.axes]
    assert patches == prepared.blocks["raster"].value_counts()[["one", "two"]].tolist()
    ax = implot.plot_label_counts(prepared.counts)
    assert len(ax.patches) == prepared.counts.size
    totals = prepared.counts.sum(axis=1).sort_values(ascending=False)
    assert [text.get_text() for text in ax.texts] == [f" {total}" for total in totals]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == totals.index.tolist()


def test_turned_tiles_carry_turned_boxes(prepared):
    rasters = {image.image_identifier: image.raster for image in prepared.images}
    figure = implot.plot_tiles(prepared.tiles, prepared.boxes, rasters, count=4)
    assert [ax.get_title().split(", ")[1] for ax in figure.axes] == ["0°", "90°", "180°", "270°"]
    assert len({boxes_drawn(ax) for ax in figure.axes}) == 1


def test_the_sheet_of_augmentations_shows_tiles_and_the_views_that_are_learnt(prepared):
    conf = ModelConfig().with_options({"train.augment.strength": 1.0})
    tiles = trials.training_tiles(prepared.data, conf, 128)
    names = list(prepared.data.ids)
    figure = implot.plot_augmentations(tiles, names, count=2, views=3, seed=5)
    axes = figure.axes
    assert [ax.get_title() for ax in axes[:4]] == ["as it lies", "view 1", "view 2", "view 3"]
    rows = [int(ax.get_ylabel().removeprefix("tile ")) for ax in axes[::4]]
    assert len({tiles.tiles["window"][row] for row in rows}) == 2, "no turned twins"
    assert tiles.tiles["objects"][rows[0]] == tiles.tiles["objects"].max()
    items = [tiles[rows[0]], *(tiles[rows[0], 5 + i] for i in range(3)), tiles[rows[1]],
             *(tiles[rows[1], 8 + i] for i in range(3))]  # fmt: skip
    pictures = []
    for ax, (_, target) in zip(axes, items, strict=True):
        assert boxes_drawn(ax) == len(target["boxes"])
        counted = target.get("counted", np.ones((128, 128), dtype=bool))
        assert ((ax.images[1].get_array()[..., 3] == 0) == np.asarray(counted)).all()
        pictures.append(ax.images[0].get_array())
    assert all(np.ptp(picture) > 20 for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == 8


def test_edges_of_classes_follow_them_on_a_sheet():
    mask = np.zeros((16, 16), dtype=np.int64)
    mask[:, 8:], mask[12:] = 1, IGNORE
    _, ax = plt.subplots()
    implot._draw_target(ax, {"mask": mask}, ["#FF0000", "#0000FF"], 16)
    paint = np.asarray(ax.images[0].get_array())
    assert (paint[:8, 6:8] == [255, 0, 0, 255]).all()
    assert (paint[:8, 8:10] == [0, 0, 255, 255]).all()
    assert (paint[:8, :6, 3] == 0).all(), "inside there is nothing to see but the image"
    assert (paint[12:] == implot.UNKNOWN).all()


def test_the_search_heatmap_shows_the_best_of_each_pair():
    board = pd.DataFrame(
        {"patch_size": 128, "n_epochs": [1, 1, 2, 2, 2], "sample_size": [0.5, 1, 0.5, 1, 1],
         "learning_rate": 1e-3, "batch_size": 4, "AP50": [0.1, 0.2, 0.3, 0.5, 0.4]}
    )  # fmt: skip
    ax = implot.plot_search_heatmap(board)
    assert {ax.get_xlabel(), ax.get_ylabel()} == {"n_epochs", "sample_size"}
    np.testing.assert_allclose(ax.images[0].get_array(), [[0.1, 0.3], [0.2, 0.5]])
    assert [text.get_text() for text in ax.texts] == ["0.100", "0.300", "0.200", "0.500"]
    single = implot.plot_search_heatmap(board.head(1))
    assert single.images[0].get_array().shape == (1, 1)
    two = implot.plot_search_heatmap(board.assign(box_f1=0.5), "batch_size", "n_epochs", "box_f1")
    assert (two.get_xlabel(), two.get_ylabel(), two.get_title()) == (
        "batch_size", "n_epochs", "Best box_f1 of 5 trainings",
    )  # fmt: skip


def test_the_search_heatmap_says_what_was_never_trained():
    board = pd.DataFrame(
        {"patch_size": 128, "n_epochs": [1, 1, 2], "sample_size": [0.5, 1, 1],
         "learning_rate": 1e-3, "batch_size": 4, "AP50": [0.1, 0.2, np.nan]}
    )  # fmt: skip
    ax = implot.plot_search_heatmap(board[:2], "sample_size", "n_epochs")
    assert [text.get_text() for text in ax.texts] == ["0.100", "0.200"]
    wide = pd.concat([board[:2], board[:1].assign(n_epochs=2, AP50=0.3)])
    ax = implot.plot_search_heatmap(wide, "sample_size", "n_epochs")
    missing = next(text for text in ax.texts if text.get_text() == "none")
    assert (missing.xy, missing.get_color()) == ((1, 1), "black")  # on gray
    assert [t.get_text() for t in implot.plot_search_heatmap(board[2:]).texts] == [
        "no training is complete"
    ]


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
    pixels = pd.DataFrame({"(truth)": ["a", "b"], "a": [3, 1], "b": [0, 4]})
    assert [t.get_text() for t in implot.plot_confusion(pixels).texts] == [*"3014"]
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
    assert ax.get_lines()[0].get_xdata().tolist() == [1, 2]  # epochs count from 1


def test_f1_is_drawn_over_the_threshold_with_the_chosen_and_the_best():
    curve = pd.DataFrame(
        {"threshold": [0.9, 0.6, 0.3], "precision": [1, 0.9, 0.4], "recall": [0.2, 0.8, 0.9],
         "f1": [0.333, 0.847, 0.554]}
    )  # fmt: skip
    ax = implot.plot_f1_threshold(curve, {"score_threshold": 0.3, "box_f1": 0.554})
    assert ax.get_title() == "F1 0.554 as chosen, 0.847 at best (0.60)"
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert lines["F1"].get_ydata().tolist() == [0.333, 0.847, 0.554]
    assert lines["chosen: 0.30"].get_xdata() == [0.3, 0.3]


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
    assert len(implot.plot_catalogue(image.raster, image.df[:0]).axes) == 2


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
    assert [ax.get_title().split()[0] for ax in shown] == ["missed"] * 3 + ["spurious"] * 5
    assert figure.get_suptitle() == "3 of 3 missed, 5 of 8 spurious"
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


def test_class_shares_stand_beside_the_trade_off():
    rng = np.random.default_rng(0)
    counts = np.floor(rng.dirichlet([3, 1, 0.2], 400) * 100).astype(int)
    tiles = pd.DataFrame(counts, columns=["class_0", "class_1", "class_2"])
    tiles = tiles.assign(width=10, height=10)
    classes = ClassTable(("background", "roof", "road"), {})
    found = splits.balance(tiles, classes)
    shares, trade = implot.plot_class_balance(found)
    bars = [bar.get_width() for bar in shares.patches]
    np.testing.assert_allclose(bars, [*found.shares["percent"], *found.shares["kept_percent"]])
    assert [t.get_text() for t in shares.get_yticklabels()] == ["background", "roof", "road"]
    np.testing.assert_allclose(trade.lines[0].get_ydata(), found.curve["std"])
    assert trade.lines[1].get_ydata()[0] == found.kept_std
    (alone,) = implot.plot_class_balance(splits.preview(tiles, classes, 50))
    assert len(alone.patches) == 6
