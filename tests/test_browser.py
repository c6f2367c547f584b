"""The notebook as a person uses it: JupyterLab in a real browser (`make test-browser`)."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import papermill
import pytest
import yaml
from browser import CANVAS, CELLS, Lab, chromium, find_chromium, jupyter_server, wait_for
from conftest import PROJECT, make_samples

pytestmark = pytest.mark.browser
PICTURES = PROJECT / "runs" / "browser"  # screenshots, for people to look at


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The notebook, interactive, all of it run on a tiny sample."""
    if find_chromium() is None:
        pytest.skip("no Chromium starts: make chromium")
    folder = tmp_path_factory.mktemp("lab")
    sizes = {"first": (512, 384), "second": (384, 384)}
    make_samples(folder, sizes)
    parameters = yaml.safe_load((PROJECT / "params" / "tiny.yaml").read_text()) | {
        "DF_FILENAMES": [f"{name}.csv" for name in sizes],
        "IMAGE_FILENAMES": [f"{name}.tif" for name in sizes],
        "DF_DIR": "datasets",
        "IMG_DIR": "images",
        "PREDICT_FILENAMES": ["second.tif"],
        "INTERACTIVE": True,
    }
    notebook = folder / "main.ipynb"
    papermill.execute_notebook(
        PROJECT / "main.ipynb", notebook, parameters=parameters, prepare_only=True,
        progress_bar=False,
    )  # fmt: skip
    home = tmp_path_factory.mktemp("chromium")
    with jupyter_server(folder) as server, chromium(home, PICTURES) as page:
        lab = Lab(page, server, notebook)
        page.screenshot("opened")
        lab.run_all()
        yield lab


def code_cells(lab):
    return [(i, cell) for i, cell in enumerate(lab.saved().cells) if cell.cell_type == "code"]


def test_every_cell_runs_in_order_and_none_fails(lab):
    cells = [cell for _, cell in code_cells(lab)]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]


def test_nothing_is_shown_on_red(lab):
    streams = [o for _, cell in code_cells(lab) for o in cell.outputs if o.output_type == "stream"]
    assert not [o.text for o in streams if o.name == "stderr"]


def test_each_picture_is_a_canvas_that_fits_the_page(lab):
    others = ("plot_class_balance", "plot_class_errors")
    figures = {
        i for i, cell in code_cells(lab)
        if "implot.plot_" in cell.source and not any(name in cell.source for name in others)
    }  # fmt: skip
    for i in figures:
        lab.show(i, CANVAS)
        width = lab.page.js(f"{lab.find(i, CANVAS)}.clientWidth")
        room = lab.page.js(f"{lab.find(i, '.jp-OutputArea')}.clientWidth")
        assert 0 < width <= room
    assert len(figures) >= 9


def test_a_zoom_changes_the_pixels_and_home_ends_it(lab):
    cell = lab.index("implot.plot_image_with_annotations(")
    lab.show(cell, CANVAS)
    whole = lab.settled(cell)
    lab.click(cell, "button[title^=Zoom]")
    lab.page.wait(f"{lab.find(cell, 'button.mod-active')} !== null")
    lab.show(cell, CANVAS)

    def zooms():  # on a busy machine a figure may miss the press
        lab.page.drag(lab.place(cell, CANVAS, 0.3, 0.3), lab.place(cell, CANVAS, 0.7, 0.7))
        return far_from_whole() > 0

    def far_from_whole():
        return np.abs(lab.settled(cell).astype(int) - whole).mean()

    wait_for(zooms, "the zoom")
    zoomed = far_from_whole()
    lab.page.screenshot("zoomed")
    lab.click(cell, "button[title^=Reset]")
    # a new layout may move all by a pixel
    wait_for(lambda: far_from_whole() < zoomed / 2, "the view before the zoom")


def alike(view, other):
    return view.shape == other.shape and np.abs(view.astype(int) - other).mean() < 2


def changed(lab, cell, before):
    """Return the figure in a cell, at rest, after it has come to differ from what it was."""
    wait_for(lambda: not np.array_equal(lab.pixels(cell), before), f"a change in cell {cell}")
    return lab.settled(cell)


def take_keys(lab, cell):
    """Give the keyboard to the figure in a cell, by a click under its axes."""
    place = lab.place(cell, CANVAS, 0.4, 0.99)
    lab.page.drag(place, place)


def test_wheel_key_label_and_score_change_what_the_explorer_shows(lab):
    cell = lab.index("implot.explore(")
    lab.show(cell, CANVAS)
    take_keys(lab, cell)
    lab.page.key("h")
    whole = lab.settled(cell)
    lab.page.screenshot("explorer_whole")
    lab.page.wheel(lab.place(cell, CANVAS, 0.4, 0.4), steps=3)
    zoomed = changed(lab, cell, whole)
    lab.page.screenshot("explorer_zoomed")
    take_keys(lab, cell)
    lab.page.key("n")
    changed(lab, cell, zoomed)
    lab.page.screenshot("explorer_next")
    lab.page.key("Escape")  # no pointer, no values
    lab.page.key("h")
    wait_for(lambda: alike(lab.pixels(cell), whole), "the whole raster")
    shown = lab.settled(cell)
    lab.click(cell, ".widget-toggle-button")
    hidden = changed(lab, cell, shown)
    lab.page.screenshot("explorer_label_hidden")
    lab.click(cell, ".widget-toggle-button")
    shown = changed(lab, cell, hidden)
    lab.click(cell, ".noUi-handle")
    lab.page.key("End")
    unsure = changed(lab, cell, shown)
    lab.page.screenshot("explorer_no_score")
    lab.page.key("Home")
    changed(lab, cell, unsure)


def test_another_raster_is_chosen_and_keys_are_not_those_of_the_notebook(lab):
    cell = lab.index("implot.explore(")
    lab.show(cell, CANVAS)
    before, cells = lab.settled(cell), lab.page.js(f"{CELLS}.length")
    choice = lab.find(cell, ".widget-dropdown select")
    told = "new Event('change', {bubbles: true})"
    lab.page.js(f"(s => {{ s.selectedIndex = 1; s.dispatchEvent({told}) }})({choice})")
    shown = changed(lab, cell, before)
    lab.page.screenshot("explorer_other_raster")
    take_keys(lab, cell)
    for key in "oedd":  # the last two delete a cell elsewhere
        lab.page.key(key)
        shown = changed(lab, cell, shown)
    assert lab.page.js(f"{CELLS}.length") == cells
    lab.click(cell, ".cm-content")
    lab.page.key("Escape")
    for key in "bdd":  # as here: one below, and away with it
        lab.page.key(key)
        lab.page.wait(f"{CELLS}.length == {cells + (key == 'b')} || {key!r} == 'd'")
    lab.page.wait(f"{CELLS}.length == {cells}")


def test_a_decision_in_the_review_is_a_line_of_its_journal(lab):
    cell = lab.index("implot.review(")
    journal = lab.path.parent / "runs" / "tiny" / "review" / "journal.csv"
    lines = len(journal.read_text().splitlines()) if journal.exists() else 1  # the header
    lab.show(cell, CANVAS)
    asked = lab.settled(cell)
    lab.page.screenshot("review")
    take_keys(lab, cell)
    lab.page.key("y")
    wait_for(lambda: journal.exists() and len(journal.read_text().splitlines()) > lines, "a line")
    changed(lab, cell, asked)  # the next question
    lab.page.screenshot("review_next")
    decisions = pd.read_csv(journal)
    assert len(decisions) == lines
    assert decisions["user"].notna().all()


def test_an_object_is_added_in_the_review_by_two_clicks(lab):
    cell, cells = lab.index("implot.review("), lab.page.js(f"{CELLS}.length")
    journal = lab.path.parent / "runs" / "tiny" / "review" / "journal.csv"
    lab.show(cell, CANVAS)
    shown = lab.settled(cell)
    take_keys(lab, cell)
    for key in "aa":  # begun and left, by the keys that add cells elsewhere
        lab.page.key(key)
        shown = changed(lab, cell, shown)
    lab.click(cell, "button[title^='key a']")
    changed(lab, cell, shown)
    lab.show(cell, CANVAS)
    for across in (0.35, 0.4):
        place = lab.place(cell, CANVAS, across, 0.6)
        lab.page.drag(place, place)
        lab.settled(cell)
        lab.page.screenshot(f"review_add_{across}")

    def added():
        return journal.exists() and (pd.read_csv(journal)["kind"] == "by hand").sum() == 1

    wait_for(added, "the object")
    assert lab.page.js(f"{CELLS}.length") == cells


def test_a_catalogue_is_a_map_with_the_raster_on_it(lab):
    cell = lab.index("implot.map_view(")
    lab.show(cell, ".leaflet-container")
    map_cell = lab.find(cell, ".leaflet-container")
    images = f"[...{map_cell}.querySelectorAll('img.leaflet-image-layer')]"
    lab.page.wait(f"{images}.filter(i => i.complete && i.naturalWidth > 1).length == 3")
    width = f"{images}[0].getBoundingClientRect().width"
    legend = f"{map_cell}.querySelector('.leaflet-bottom.leaflet-right').innerText"
    before, counts = lab.page.js(width), lab.page.js(legend)
    lab.page.screenshot("map")
    lab.page.wheel(lab.place(cell, ".leaflet-container"), steps=3)
    lab.page.wait(f"{width} > {1.5 * before}")
    lab.page.wait(f"{legend} !== {json.dumps(counts)}")  # fewer objects are in view
    lab.page.screenshot("map_zoomed")


def test_the_bar_of_finished_work_is_full(lab):
    cell = lab.index("annotations.clean_annotations(")
    lab.show(cell, ".progress-bar")
    assert lab.page.js(f"{lab.find(cell, '.progress-bar')}.style.width") == "100%"


def test_every_output_is_there_to_be_looked_at(lab):
    for i, cell in code_cells(lab):
        if cell.outputs:
            lab.show(i)
            lab.settled(i)
            assert lab.page.screenshot(f"cell_{i:02d}").stat().st_size > 10_000
