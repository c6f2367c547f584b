"""The house: layers, the notebook's form, names, the README's promises."""

from __future__ import annotations

import ast
import base64
import html
import json
import re
import tomllib
from dataclasses import fields

import nbformat
import pytest
import torch
import yaml
from conftest import PROJECT
from torchvision.ops import nms

from ModelConfig import RunParameters

LAYERS = [
    ["ImageData"],
    ["manifest"],
    ["oldconfig"],
    ["ModelConfig"],
    ["artefacts", "imutils", "parallel"],
    ["hdr"],
    ["rasters", "formats"],
    ["layout"],
    ["fileio"],
    ["geometries"],
    ["sampledata", "annotations", "tiling", "catalogue", "regions"],
    ["masks"],
    ["balance", "tilecache"],
    ["splits"],
    ["composite"],
    ["explore", "ranks", "augment"],
    ["review", "mapview"],
    ["datasets", "metrics", "logger"],
    ["implot", "networks", "atlas", "optimizers"],
    ["learning", "losses"],
    ["LargeRasterOR", "LargeRasterSeg"],
    ["strips", "study", "resume"],
    ["maps"],
    ["trials", "predict", "preflight", "visualization"],
    ["ledger"],
    ["gridsearch"],
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
WITHOUT_TORCH = LEVEL["composite"]  # the highest layer that worker processes import
DISK = {"artefacts", "hdr", "rasters", "formats", "layout"}
TORCH = {"torch", "torchvision", "torchmetrics", "pytorch_lightning", "lightning"}
MODULES = sorted(path.stem for path in PROJECT.glob("*.py"))


def imported_names(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_strictly_downward(module):
    assert module in LEVEL, f"{module}.py has no layer; give it one"
    names = imported_names(ast.parse((PROJECT / f"{module}.py").read_text()))
    too_high = {name for name in names if LEVEL.get(name, -1) >= LEVEL[module]}
    assert not too_high
    if LEVEL[module] <= WITHOUT_TORCH:
        assert not names & TORCH
    if module not in {*DISK, "fileio"}:
        assert not names & DISK, "what is on disk is reached through fileio"


@pytest.mark.parametrize("module", MODULES)
def test_modules_do_not_print(module):
    tree = ast.parse((PROJECT / f"{module}.py").read_text())
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert "print" not in {call.id for call in calls if isinstance(call, ast.Name)}


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(PROJECT / "main.ipynb", as_version=4)


def cells_tagged(notebook, tag):
    return [c for c in notebook.cells if tag in c.metadata.get("tags", [])]


def test_notebook_defines_nothing_outside_the_filters_cell(notebook):
    forbidden = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    for cell in notebook.cells:
        if cell.cell_type == "code" and "your-filters" not in cell.metadata.get("tags", []):
            found = [n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, forbidden)]
            assert not found, cell.source
    assert len(cells_tagged(notebook, "your-filters")) == 1


def test_notebook_is_stripped_and_its_cells_are_short(notebook):
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        assert not cell.outputs
        assert cell.execution_count is None
        if not {"parameters"} & set(cell.metadata.get("tags", [])):
            assert len(cell.source.splitlines()) <= 20, cell.source  # the imports are the longest


def test_contents_lead_to_every_section(notebook):
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    headings = {h.replace(" ", "-") for h in re.findall(r"^## (.+)$", text, re.MULTILINE)}
    links = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert links == headings


def test_parameters_are_literals_and_just_those_that_are_validated(notebook):
    (cell,) = cells_tagged(notebook, "parameters")
    values = {}
    for node in ast.parse(cell.source).body:
        assert isinstance(node, ast.Assign)
        values[node.targets[0].id] = ast.literal_eval(node.value)
    json.dumps(values)
    assert set(values) == {f.name for f in fields(RunParameters)}
    assert RunParameters.from_notebook(values).trial_count == 1
    for line in cell.source.splitlines():
        if " = " in line and not line.startswith("#"):
            assert "  # " in line, f"a parameter explains itself: {line}"


PARAMS = [path for path in (PROJECT / "params").glob("*.yaml") if path.stem != "datasets"]


@pytest.mark.parametrize("path", sorted(PARAMS), ids=lambda p: p.stem)
def test_parameter_files_fit_the_notebook(path, notebook):
    (cell,) = cells_tagged(notebook, "parameters")
    values = {}
    exec(cell.source, values)  # the project's own literals, checked above
    given = yaml.safe_load(path.read_text())
    run = RunParameters.from_notebook({k: v for k, v in (values | given).items() if k.isupper()})
    if path.stem == "factorial":
        assert run.trial_count == 162
    if path.stem == "tiny":
        assert run.trial_count == 2


def test_the_notebook_carries_the_picture_of_the_pipeline(notebook):
    picture = notebook.cells[0].attachments["pipeline.png"]["image/png"]
    assert base64.b64decode(picture) == (PROJECT / "docs" / "pipeline.png").read_bytes()
    assert "(attachment:pipeline.png)" in notebook.cells[0].source


def test_the_rendered_run_is_of_this_notebook(notebook):
    page = (PROJECT / "docs" / "sample_run.html").read_text()
    cells = re.findall(r'<div class="highlight hl-ipython3"><pre>(.*?)</pre>', page, re.DOTALL)
    shown = html.unescape(re.sub(r"<[^>]+>", "", "\n".join(cells)))
    written = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    calls = [set(re.findall(r"\b[a-z]+\.[a-z_]+(?=\()", text)) for text in (shown, written)]
    assert calls[0] == calls[1], "make sample-run"


PAGES = [PROJECT / "README.md", PROJECT / "data" / "README.md", *(PROJECT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_links_lead_to_files_and_to_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("http"):
            path, _, heading = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            if heading:
                names = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
                assert heading in {
                    re.sub(r"[^\w -]", "", n).lower().replace(" ", "-") for n in names
                }


def test_unknown_parameter_is_named_with_its_likeness(notebook):
    (cell,) = cells_tagged(notebook, "parameters")
    values = {}
    exec(cell.source, values)
    given = {k: v for k, v in values.items() if k.isupper()} | {"PATCH_SIZE": [64]}
    with pytest.raises(ValueError, match="unknown parameter PATCH_SIZE; did you mean PATCH_SIZES"):
        RunParameters.from_notebook(given)


def test_torch_and_torchvision_fit_each_other():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [50, 50, 60, 60]])
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist() == [0, 2]


def test_requirements_are_pinned_by_the_constraints():
    def names(file):
        lines = (PROJECT / file).read_text().splitlines()
        lines = [line.partition("#")[0].strip() for line in lines]
        return {re.split(r"[<>=!~ ]", line)[0].lower().replace("_", "-") for line in lines if line}

    assert names("requirements.txt") <= names("constraints.txt")


def test_ruff_rules_are_those_agreed():
    ruff = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["ruff"]
    agreed = [
        "A",
        "ANN",
        "B",
        "C4",
        "D",
        "E",
        "F",
        "G",
        "I",
        "N",
        "NPY",
        "PD",
        "PT",
        "PTH",
        "RUF",
        "SIM",
        "T20",
        "UP",
        "W",
    ]
    assert set(agreed) <= set(ruff["lint"]["select"])
    assert ruff["line-length"] == 100
