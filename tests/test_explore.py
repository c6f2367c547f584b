"""The explorer: what is read, what is drawn, what events do; without a browser."""

from __future__ import annotations

import gc
import weakref

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.backend_bases import CloseEvent, KeyEvent, MouseEvent
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

import explore
import fileio
import implot
import imutils
from ImageData import BOX_COLUMNS, ImageData, InputError, Window


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def make_raster(path, width=1200, height=900, block=(64, 64), bands=1, **profile):
    """Write a raster whose value, 0 to 200, tells the place."""
    x, y = np.arange(width), np.arange(height)[:, None]
    pixels = np.stack([100 * (x / width + y / height)] * bands).astype(np.uint8)
    layout = {"width": width, "height": height, "count": bands, "dtype": "uint8"}
    layout |= {"blockysize": block[0], "blockxsize": block[1]} | profile
    if layout["blockxsize"] == width:
        layout |= {"tiled": False}
        del layout["blockxsize"]
    with fileio.create_raster(path, **layout) as dst:
        dst.write(pixels)
    return fileio.read_raster(path)


def frame(boxes, label="a", **columns):
    return pd.DataFrame(boxes, columns=BOX_COLUMNS, dtype=float).assign(label=label, **columns)


def send(explorer, name, at=None, **more):
    """Send an event as a browser does; `at` is in px of the raster."""
    canvas = explorer.figure.canvas
    x, y = (0, 0) if at is None else explorer.ax.transData.transform(at)
    if name == "key_press_event":
        event = KeyEvent(name, canvas, more["key"], x, y)
    else:
        event = MouseEvent(name, canvas, x, y, **more)
    canvas.callbacks.process(name, event)


def click(explorer, at):
    send(explorer, "button_press_event", at, button=1)
    send(explorer, "button_release_event", at, button=1)


# -- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(64, 64), (1, 1200)], ids=["tiled", "striped"])
@pytest.mark.parametrize(
    "window", [Window(0, 0, 1200, 900), Window(333, 111, 801, 650)], ids=["all", "part"]
)
def test_a_file_without_overviews_gets_better_until_it_is_exact(
    tmp_path, monkeypatch, block, window
):
    raster = make_raster(tmp_path / "r.tif", block=block)
    monkeypatch.setattr(explore, "BUDGET", 1000)
    monkeypatch.setattr(explore, "STEP", 0.0)
    shape = window.height // 10, window.width // 10
    pieces = [
        (image.copy(), valid.copy(), last)
        for image, valid, last in explore.read_progressively(raster, window, shape)
    ]
    expected = raster.read_decimated(window, shape)[0].astype(float)
    image = pieces[-1][0].astype(float)
    assert np.abs(image - expected).mean() < 1  # blocks do not end where px of the screen do
    assert pieces[-1][1].all()
    assert [last for *_, last in pieces] == [False] * (len(pieces) - 1) + [True]
    shares = [valid.mean() for _, valid, _ in pieces]
    assert min(np.diff(shares)) >= 0


def test_the_first_sample_of_a_file_without_overviews_reads_few_blocks(tmp_path, monkeypatch):
    raster = make_raster(tmp_path / "r.tif", 2048, 1024)
    reads = []
    read = fileio.Raster.read_decimated
    monkeypatch.setattr(
        fileio.Raster, "read_decimated",
        lambda self, window, shape: reads.append(window) or read(self, window, shape),
    )  # fmt: skip
    monkeypatch.setattr(explore, "STEP", 1e9)
    monkeypatch.setattr(explore, "BUDGET", 2**18)
    first = explore.FIRST_BLOCKS
    reading = explore.read_progressively(raster, Window(0, 0, 2048, 1024), (256, 512))
    ((_, valid, last),) = list(reading)
    assert last
    assert valid.all()
    assert len(reads) == len(set(reads)) == 32 * 16  # each block once
    start = {(w.x // 256, w.y // 256) for w in reads[: first * first // 2]}
    assert len(start) == first * first // 2  # and at first far apart


@pytest.mark.parametrize(("most", "read"), [(1, 8 * 4), (127, 8 * 4), (200, 16 * 8), (2000, 512)])
def test_a_preview_reads_a_bounded_number_of_blocks(tmp_path, monkeypatch, most, read):
    raster = make_raster(tmp_path / "r.tif", 2048, 1024)
    monkeypatch.setattr(explore, "BUDGET", 2**18)
    monkeypatch.setattr(explore, "PREVIEW_BLOCKS", most)
    reads, whole = [], fileio.Raster.read_decimated
    monkeypatch.setattr(
        fileio.Raster, "read_decimated",
        lambda self, window, shape: reads.append(window) or whole(self, window, shape),
    )  # fmt: skip
    image, valid = explore.preview(raster, 512)
    assert len(reads) == read
    assert image.shape == (1, 256, 512)
    assert valid.all()
    exact = whole(raster, Window(0, 0, 2048, 1024), (256, 512))[0].astype(float)
    assert np.abs(image - exact).max() < 200 / 4  # at most as far off as blocks lie apart


def test_overviews_make_a_view_one_reading(tmp_path):
    plain = make_raster(tmp_path / "r.tif", 2048, 2048)
    raster = fileio.read_raster(fileio.rewrite(plain, tmp_path / "o.tif"))
    assert raster.overviews == (2, 4)
    whole = Window(0, 0, 2048, 2048)
    ((image, _, last),) = explore.read_progressively(raster, whole, (256, 256))
    assert last
    np.testing.assert_array_equal(image, raster.read_decimated(whole, (256, 256))[0])


def test_what_cannot_be_read_stays_as_it_is(tmp_path, monkeypatch):
    raster = make_raster(tmp_path / "r.tif")
    read = fileio.Raster.read_decimated

    def broken(self, window, shape):
        if window.x == 128 and window.y == 128:
            raise InputError("damaged")
        return read(self, window, shape)

    monkeypatch.setattr(fileio.Raster, "read_decimated", broken)
    monkeypatch.setattr(explore, "BUDGET", 1000)
    *_, (_, valid, last) = explore.read_progressively(raster, Window(0, 0, 1200, 900), (900, 1200))
    assert last
    hole = np.zeros_like(valid)
    hole[128:192, 128:192] = True
    assert not valid[hole].any() or valid.all()  # black, or what a coarser block said
    assert valid[~hole].all()


# -- what is shown --------------------------------------------------------------------------------


def test_the_stretch_does_not_change_with_the_view(tmp_path):
    raster = make_raster(tmp_path / "r.tif", 2400, 1800)
    explorer = implot.explore(raster).explorer
    before = explorer._picture.get_array().astype(int)
    assert before.std() > 30
    explorer.look_at(600, 450, 300, 225)
    explorer.settle()
    image, extent = explorer._picture.get_array().astype(int), explorer._picture.get_extent()
    assert extent[0] <= 450
    assert extent[1] >= 750
    row, col = round(450 * len(before) / 1800), round(600 * before.shape[1] / 2400)
    inside = image[len(image) // 2, image.shape[1] // 2]
    assert np.abs(inside - before[row, col]).max() <= 4


def test_a_view_is_read_at_the_resolution_of_the_screen(tmp_path):
    raster = make_raster(tmp_path / "r.tif", 2000, 2000, bands=4)
    explorer = implot.explore(raster).explorer
    assert max(explorer._picture.get_array().shape) == explore.PICTURE_SIDE
    width, height = explorer.ax.bbox.width, explorer.ax.bbox.height
    explorer.look_at(1000, 1000, 900, 700)
    explorer.settle()
    x0, y0, x1, y1 = explorer.view
    assert (x1 - x0) / width == pytest.approx((y1 - y0) / height)  # a px is square
    assert x1 - x0 >= 900
    assert y1 - y0 >= 700
    shape = explorer._picture.get_array().shape
    assert shape[2] == 3
    assert abs(shape[1] - width) <= 2
    explorer.look_at(1000, 1000, 30, 30)
    explorer.settle()
    x0, x1, y1, y0 = explorer._picture.get_extent()
    assert explorer._picture.get_array().shape[:2] == (y1 - y0, x1 - x0)  # no px is made up


def test_only_boxes_in_view_are_drawn_and_very_many_become_points(tmp_path, monkeypatch):
    raster = make_raster(tmp_path / "r.tif")
    at = np.arange(0, 900, 30.0)
    boxes = np.array([[x, y, x + 10, y + 10] for x in at for y in at])
    ax = implot.explore(raster, frame(boxes), frame(boxes[:100], "b", score=0.5))
    explorer = ax.explorer
    assert len(explorer._lines[0].get_segments()) == 900
    assert len(explorer._lines[1].get_segments()) == 400  # four corners each
    explorer.look_at(100, 100, 60, 60)
    explorer.settle()
    x0, y0, x1, y1 = explorer.view
    inside = (boxes[:, 2] > x0) & (boxes[:, 0] < x1) & (boxes[:, 3] > y0) & (boxes[:, 1] < y1)
    assert len(explorer._lines[0].get_segments()) == inside.sum() < 30
    monkeypatch.setattr(explore, "MAX_BOXES", 500)
    explorer.home()
    explorer.settle()
    assert not explorer._lines[0].get_visible()
    assert len(explorer._points[0].get_offsets()) == 900
    monkeypatch.setattr(explore, "MAX_POINTS", 300)
    explorer.set_score(0.4)
    explorer.settle()
    assert len(explorer._points[0].get_offsets()) == 225
    assert explorer._counts["objects"].get_text() == "900 of 900 objects, 1 of 4 drawn"


def test_scores_and_labels_choose_what_is_drawn(tmp_path):
    raster = make_raster(tmp_path / "r.tif")
    boxes = [[10, 10, 40, 40], [110, 110, 140, 140], [210, 210, 240, 240]]
    found = frame(boxes, ["a", "b", "a"], score=[0.2, 0.6, 0.9])
    explorer = implot.explore(raster, frame(boxes, "a"), found).explorer
    explorer.set_score(0.5)
    explorer.settle()
    assert len(explorer._lines[1].get_segments()) == 8
    assert len(explorer._lines[0].get_segments()) == 3  # the truth has no score
    explorer.show_label("a", shown=False)
    explorer.settle()
    assert len(explorer._lines[0].get_segments()) == 0
    assert len(explorer._lines[1].get_segments()) == 4
    assert explorer._counts["detections"].get_text() == "1 of 3 detections"
    np.testing.assert_allclose(explorer._lines[1].get_segments()[0][1], [110, 110])


def test_a_score_to_begin_with_hides_nothing_for_good(tmp_path):
    raster = make_raster(tmp_path / "r.tif")
    found = frame([[10, 10, 30, 30], [50, 50, 70, 70]], score=[0.9, 0.3])
    explorer = explore.explore(raster, None, found, score=0.5).explorer
    assert len(explorer._lines[1].get_segments()) == 4  # corners
    explorer.set_score(0.2)
    explorer.settle()
    assert len(explorer._lines[1].get_segments()) == 8


def test_rows_of_other_rasters_are_left_out(tmp_path):
    raster = make_raster(tmp_path / "r.tif")
    boxes = frame([[10, 10, 40, 40]] * 2, raster=["r", "s"])
    assert len(implot.explore(raster, boxes).explorer.truth.df) == 1
    with pytest.raises(InputError, match=r"need the columns \['label'\]"):
        implot.explore(raster, boxes.drop(columns="label"))


def test_pixels_rule_whatever_the_map_says(tmp_path):
    south_up = {"crs": "EPSG:32633", "transform": (0.3, 0.4, 5e5, 0.4, -0.3, 5e6)}
    raster = make_raster(tmp_path / "r.tif", **south_up)
    ax = implot.explore(raster, frame([[100, 50, 110, 60]]))
    assert ax.yaxis_inverted()
    assert ax.get_xlim()[0] <= 0
    assert ax.format_coord(100, 50) == "x 100.0, y 50.0 px    EPSG:32633 500050.0, 5000025.0"
    assert "px = " in ax.explorer._bar_text.get_text()
    text = ax.explorer._bar_text.get_text()
    length, metres = (float(part.split()[0]) for part in text.split(" = "))
    assert metres == pytest.approx(0.5 * length, rel=0.01)


# -- events ---------------------------------------------------------------------------------------


def test_the_wheel_zooms_around_the_place_under_it(tmp_path):
    raster = make_raster(tmp_path / "r.tif")
    explorer = implot.explore(raster).explorer
    x0, _, x1, _ = explorer.view
    before = explorer.ax.transData.transform((300, 200))
    send(explorer, "scroll_event", (300, 200), step=4)
    a0, _, a1, _ = explorer.view
    assert (x1 - x0) / (a1 - a0) == pytest.approx(explore.ZOOM**4)
    np.testing.assert_allclose(explorer.ax.transData.transform((300, 200)), before, atol=0.5)
    assert explorer.busy
    explorer.figure.canvas.draw()  # a drawing reads what it shows
    assert explorer._picture.get_extent()[0] == max(0, np.floor(a0))


def test_a_click_shows_the_values_of_the_smallest_box_there(tmp_path):
    raster = make_raster(tmp_path / "r.tif")
    objects = frame([[100, 100, 300, 300]], "big")
    found = frame([[150, 150, 180, 180], [160, 160, 400, 400]], "small", score=[0.875, 0.1])
    explorer = implot.explore(raster, objects, found).explorer
    click(explorer, (165, 165))
    assert explorer.selected["score"] == 0.875
    assert "score      0.875" in explorer._values.get_text().splitlines()
    click(explorer, (110, 110))
    assert explorer.selected["label"] == "big"
    send(explorer, "button_press_event", (165, 165), button=1)
    send(explorer, "button_release_event", (265, 165), button=1)  # a drag chooses nothing
    assert explorer.selected["label"] == "big"
    click(explorer, (800, 800))
    assert explorer.selected is None
    assert explorer._values.get_text() == ""


def test_keys_go_through_errors_and_back_home(tmp_path):
    raster = make_raster(tmp_path / "r.tif")
    errors = frame(
        [[100, 100, 120, 120], [500, 500, 540, 520], [0, 0, 9, 9]], kind="missed",
        raster=["r", "r", "other"], true_xmin=[np.nan, 520, 0], true_ymin=[np.nan, 500, 0],
        true_xmax=[np.nan, 560, 0], true_ymax=[np.nan, 520, 0],
    )  # fmt: skip
    explorer = implot.explore(raster, errors=errors).explorer
    home = explorer.view
    centers = []
    for key in "nnpn":
        send(explorer, "key_press_event", key=key)
        x0, y0, x1, y1 = explorer.view
        centers.append(((x0 + x1) / 2, (y0 + y1) / 2))
    np.testing.assert_allclose(centers, [(110, 110), (530, 510), (110, 110), (530, 510)])
    assert explorer._values.get_text().startswith("2 of 2\n")
    send(explorer, "key_press_event", key="h")
    np.testing.assert_allclose(explorer.view, home)
    send(explorer, "key_press_event", key="right")
    assert explorer.view[0] == pytest.approx(home[0] + 0.25 * (home[2] - home[0]))


def test_several_rasters_are_gone_through_one_after_the_other(tmp_path):
    rasters = [make_raster(tmp_path / f"{name}.tif") for name in "rs"]
    images = [
        ImageData(raster, raster.identifier, frame([[10, 10, 30, 30]] * n))
        for n, raster in enumerate(rasters, start=1)
    ]
    errors = frame([[x, x, x + 20, x + 20] for x in (100, 200, 300)], kind="missed",
                   raster=["s", "r", "s"], score=[np.nan, 0.9, 0.8])  # fmt: skip
    blocks = pd.DataFrame(
        [["r", 0, 0, 600, 900, "test"], ["s", 600, 0, 600, 900, "test"], ["s", 0, 0, 9, 9, ""]],
        columns=["raster", "x", "y", "width", "height", "split"],
    )  # fmt: skip
    explorer = implot.explore(images, None, None, errors, blocks=blocks).explorer
    assert list(explorer.rasters) == ["s", "r"]  # the one with the most errors first
    ((corner, *_),) = explorer._outlines[1].get_segments()
    assert corner.tolist() == [600, 0]
    assert explorer._counts["errors"].get_text() == "2 of 2 errors"  # without a score, too
    places = []
    for _ in range(4):
        explorer.go(1)
        places.append((explorer.ground.raster.identifier, int(explorer.selected["xmin"])))
    assert places == [("s", 100), ("s", 300), ("r", 200), ("s", 100)]
    explorer.settle()
    assert (len(explorer.truth.df), len(explorer._marks.get_offsets())) == (2, 1)
    explorer.home()
    explorer.settle()
    np.testing.assert_allclose(explorer._marks.get_offsets(), [[110, 100], [310, 300]])
    explorer.toggle_layer("errors")
    explorer.settle()
    assert not len(explorer._marks.get_offsets())
    explorer.open("r")
    explorer.go(-1)
    assert explorer.selected["xmin"] == 200  # the last of the raster that was turned to


def test_one_label_leaves_colour_to_objects_and_detections(tmp_path):
    raster = make_raster(tmp_path / "r.tif")
    boxes = [[10, 10, 40, 40], [110, 110, 140, 140]]
    explorer = implot.explore(raster, frame(boxes), frame(boxes, score=0.9)).explorer
    colors = [to_hex(lines.get_colors()[0]).upper() for lines in explorer._lines]
    assert colors == [imutils.TRUTH_COLOR, imutils.DETECTION_COLOR]
    explorer = implot.explore(raster, frame(boxes, ["a", "b"]), frame(boxes, score=0.9)).explorer
    colors = [to_hex(lines.get_colors()[0]) for lines in explorer._lines]
    assert colors[0] == colors[1] == explorer.colors["a"].lower()


def test_the_walk_begins_anew_on_another_raster_and_with_another_score(tmp_path):
    rasters = [make_raster(tmp_path / f"{name}.tif") for name in "rs"]
    images = [ImageData(raster, raster.identifier, frame([])) for raster in rasters]
    found = frame([[x, x, x + 20, x + 20] for x in (100, 200, 300)] * 2,
                  raster=[*"rrrsss"], score=[0.9, 0.8, 0.7] * 2)  # fmt: skip
    explorer = implot.explore(images, None, found).explorer
    explorer.go(1)
    explorer.go(1)
    explorer.open("s")
    explorer.go(1)
    assert (explorer.selected["raster"], explorer.selected["score"]) == ("s", 0.9)
    explorer.set_score(0.75)
    explorer.go(-1)
    assert explorer.selected["score"] == 0.8
    with pytest.raises(InputError, match="bring their annotations"):
        implot.explore(images, found)
    with pytest.raises(InputError, match="got 0 rasters; give one"):
        implot.explore([])
    with pytest.raises(InputError, match="detections of several rasters need a column raster"):
        implot.explore(images, None, found.drop(columns="raster"))


def test_colours_do_not_depend_on_what_was_looked_at(tmp_path):
    rasters = [make_raster(tmp_path / f"{name}.tif") for name in "rs"]
    boxes = [[10, 10, 40, 40], [110, 110, 140, 140]]
    tables = [frame(boxes), frame(boxes, ["a", "b"])]
    images = [ImageData(raster, raster.identifier, df)
              for raster, df in zip(rasters, tables, strict=True)]  # fmt: skip
    explorer = implot.explore(images).explorer
    before = explorer._lines[0].get_colors()[0].tolist()
    for name in "sr":
        explorer.open(name)
        explorer.settle()
    assert explorer._lines[0].get_colors()[0].tolist() == before
    texts = [text.get_text() for text in explorer.ax.get_legend().get_texts()]
    assert texts[2:] == ["a"]
    # one that comes to a label alone gets another colour, and none changes its own
    explorer = implot.explore(rasters[0], frame(boxes), frame(boxes, score=0.9)).explorer
    explorer.show_boxes({"r": frame(boxes, ["a", "new"])}, frame(boxes, score=0.9))
    explorer.settle()
    colors = [[to_hex(c).upper() for c in lines.get_colors()] for lines in explorer._lines]
    assert colors[0][0] == imutils.TRUTH_COLOR
    assert set(colors[1]) == {imutils.DETECTION_COLOR}
    assert colors[0][1] not in (imutils.TRUTH_COLOR, imutils.OTHER)


def test_very_many_test_blocks_are_outlined_once_few_are_in_view(tmp_path, monkeypatch):
    raster = make_raster(tmp_path / "r.tif")
    places = [
        ["r", x, y, 100, 100, "test"] for x in range(0, 1200, 100) for y in range(0, 900, 100)
    ]
    blocks = pd.DataFrame(places, columns=["raster", "x", "y", "width", "height", "split"])
    monkeypatch.setattr(explore, "MAX_BLOCKS", 50)
    explorer = implot.explore(raster, blocks=blocks).explorer
    assert not len(explorer._outlines[1].get_segments())
    explorer.look_at(150, 150, 20, 20)
    explorer.settle()
    assert len(explorer._outlines[1].get_segments()) == 1


def test_without_errors_the_surest_detection_comes_first(tmp_path):
    raster = make_raster(tmp_path / "r.tif")
    boxes = [[x, x, x + 20, x + 20] for x in (100, 200, 300)]
    explorer = implot.explore(raster, None, frame(boxes, score=[0.5, 0.9, 0.1])).explorer
    explorer.set_score(0.4)
    found = []
    for _ in range(3):
        explorer.go(1)
        found.append(explorer.selected["score"])
    assert found == [0.9, 0.5, 0.9]


def test_a_newer_view_is_never_painted_over_by_an_older_one(tmp_path, monkeypatch):
    raster = make_raster(tmp_path / "r.tif", 1200, 900, block=(128, 128))
    monkeypatch.setattr(explore, "BUDGET", 100)
    monkeypatch.setattr(explore, "STEP", 0.0)
    explorer = implot.explore(raster).explorer
    explorer.look_at(200, 200, 100, 100)
    explorer.advance()
    assert explorer.ground.busy  # half read
    explorer.look_at(900, 600, 100, 100)
    extents = []
    while explorer.busy:
        explorer.advance()
        explorer._read_on()
        extents.append(explorer._picture.get_extent())
    assert min(extent[0] for extent in extents) > 800


def test_drawing_asks_for_no_further_drawing_once_all_is_read(tmp_path, monkeypatch):
    raster = make_raster(tmp_path / "r.tif")
    asked = []
    monkeypatch.setattr(FigureCanvasAgg, "draw_idle", lambda _: asked.append(1))
    explorer = implot.explore(raster, frame([[10, 10, 40, 40]])).explorer
    asked.clear()
    explorer.look_at(200, 200, 100, 100)
    assert asked
    explorer.figure.canvas.draw()
    asked.clear()
    explorer.figure.canvas.draw()
    assert not asked


def test_nothing_is_left_of_a_closed_explorer(tmp_path):
    raster = make_raster(tmp_path / "r.tif")
    ax = implot.explore(raster, frame([[10, 10, 40, 40]]))
    explorer, figure = weakref.ref(ax.explorer), ax.figure
    figure.canvas.callbacks.process("close_event", CloseEvent("close_event", figure.canvas))
    assert not explorer()._timer.callbacks
    plt.close(figure)
    del ax, figure
    gc.collect()
    assert explorer() is None


def test_the_controls_do_what_the_methods_do(tmp_path, monkeypatch):
    widgets = pytest.importorskip("ipywidgets")
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    raster = make_raster(tmp_path / "r.tif")
    boxes = [[10, 10, 40, 40], [110, 110, 140, 140]]
    before = plt.get_backend()
    plt.switch_backend("module://ipympl.backend_nbagg")
    try:
        ax = implot.explore(raster, None, frame(boxes, ["a", "b"], score=[0.2, 0.6]))
        explorer, (box,) = ax.explorer, shown
        buttons, toggles, hint, canvas = box.children
        assert "Keys work" in hint.value
        assert canvas is explorer.figure.canvas
        slider = next(c for c in buttons.children if isinstance(c, widgets.FloatSlider))
        slider.value = 0.5
        assert explorer.score == 0.5
        assert [toggle.description for toggle in toggles.children] == ["a", "b"]
        toggles.children[1].value = False
        assert explorer.hidden == {"b"}
        explorer.settle()
        assert len(explorer._lines[1].get_segments()) == 0
        named = {b.description: b for b in buttons.children}
        named["Next"].click()
        assert explorer.selected["label"] == "b"
        toggles.children[1].value = True
        toggles.children[1].value = False
        assert explorer.selected is None  # no pointer at what is hidden
        send(explorer, "key_press_event", key="d")
        assert (named["detections"].value, explorer.hidden_layers) == (False, {"detections"})
        named["detections"].value = True
        assert not explorer.hidden_layers
        plt.close(explorer.figure)
        assert explorer.controls is None
        assert slider.comm is None  # closed
    finally:
        plt.switch_backend(before)
