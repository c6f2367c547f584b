"""Write an executed notebook as one page that needs no other file, no network and no script.

`python docs/sample_run.py runs/quickstart/main.ipynb` writes `docs/sample_run.html`, and the
picture of detections in the README, `docs/detections.png`.
"""

from __future__ import annotations

import base64
import io
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter
from PIL import Image

HOME = Path(__file__).parent
SIDE = 900  # px, of a picture at most
QUALITY = 80  # of JPEG, which pictures become where that is smaller


def shrink(png: str) -> tuple[str, str]:
    """Return the type and the base64 text of a picture, made smaller."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.thumbnail((SIDE, 2 * SIDE))
    made = {}
    for kind, image, options in (
        ("png", picture.quantize(128), {"optimize": True}),
        ("jpeg", picture, {"quality": QUALITY, "optimize": True}),
    ):
        file = io.BytesIO()
        image.save(file, kind, **options)
        made[f"image/{kind}"] = base64.b64encode(file.getvalue()).decode()
    return min(made.items(), key=lambda item: len(item[1]))


def render(path: Path) -> str:
    """Return an executed notebook as HTML, its pictures within."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                kind, text = shrink(data.pop("image/png"))
                data[kind] = text
            if "text" in output:  # where the project lies on this machine is of no interest
                output.text = output.text.replace(f"{HOME.parent.resolve()}/", "")
    page, _ = HTMLExporter().from_notebook_node(notebook)
    page = re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)  # of mathematics, from afar
    return re.sub(r'href="docs/', 'href="', page)


def picture_of(path: Path, call: str) -> bytes:
    """Return the first picture, PNG, of the cell of an executed notebook that makes a call."""
    (cell,) = (c for c in nbformat.read(path, as_version=4).cells if f"{call}(" in c.source)
    png = next(o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {}))
    return base64.b64decode(png)


if __name__ == "__main__":
    executed = Path(sys.argv[1])
    (HOME / "detections.png").write_bytes(picture_of(executed, "implot.plot_detections"))
    (HOME / "sample_run.html").write_text(render(executed), encoding="utf-8")
