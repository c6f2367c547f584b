"""The notebook as a person uses it: JupyterLab in a real browser (`make test-browser`)."""

from __future__ import annotations

import numpy as np
import papermill
import pytest
import yaml
from browser import CANVAS, Lab, chromium, find_chromium, jupyter_server, wait_for
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
    figures = {i for i, cell in code_cells(lab) if "implot.plot_" in cell.source}
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
    lab.show(cell, CANVAS)
    lab.page.drag(lab.place(cell, CANVAS, 0.4, 0.4), lab.place(cell, CANVAS, 0.6, 0.6))
    wait_for(lambda: not np.array_equal(lab.pixels(cell), whole), "the zoom")
    zoomed = lab.settled(cell)
    lab.page.screenshot("zoomed")
    lab.click(cell, "button[title^=Reset]")
    wait_for(lambda: not np.array_equal(lab.pixels(cell), zoomed), "the view before the zoom")
    distance = [np.abs(view.astype(int) - whole).mean() for view in (lab.settled(cell), zoomed)]
    assert distance[0] < distance[1] / 2  # a new layout may move all by a pixel


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
