"""Turn what the benchmarks wrote into docs/benchmarks.md, with a picture per stage that grows.

python benchmarks/report.py FOLDER [--output docs/benchmarks.md]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import common
import matplotlib as mpl
import pandas as pd

mpl.use("agg")
from matplotlib import pyplot as plt

from imutils import COLORS

INTRODUCTION = """
`make bench` writes this page. Every way to do a piece of work runs in a process of its own, by
turns with the others, on the same input (predictions: all in one process). Seconds and memory are
medians of three runs, or of one where it takes minutes; a ratio is the median over the turns.
Memory is what a process and its children needed above what imports and preparation had taken.
[measurements.md](measurements.md) holds what takes longer, or a look.
""".strip()
ORDER = ("clean", "tiling", "read", "train", "predict", "metrics", "memory")
MARKERS = "os^Dv<>"


def write_report(folder: Path, output: Path) -> None:
    """Write the page and its pictures."""
    paths = {path.stem: path for path in folder.glob("*.json")}
    records = {
        name: json.loads(paths[name].read_text(encoding="utf-8")) for name in ORDER if name in paths
    }
    if not records:
        raise SystemExit(f"{folder} holds none of {', '.join(f'{n}.json' for n in ORDER)}")
    machine = next(iter(records.values()))["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts: list[str] = [
        "# Benchmarks",
        INTRODUCTION,
        f"{machine['cores']} cores of {machine['processor']}, Python {machine['python']}, "
        f"{versions}; commit {machine['commit']}.",
    ]
    parts += ["## What was to be reached", _aims(records.values())]
    for name, record in records.items():
        rows = pd.DataFrame(record["rows"])
        parts += [f"## {record['title']}", f"`benchmarks/{record['script']}`", _table(rows, record)]
        if len(set(rows["size"])) > 1:
            picture = output.parent / f"benchmarks_{name}.png"
            _draw(rows, record, picture)
            parts.append(f"![time and memory against {record['size']}]({picture.name})")
    output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _aims(records: Iterable[Mapping[str, object]]) -> str:
    """Return a table of the aims, those that were missed first."""
    lines = ["| | | size | measured | wanted |", "|---|---|---|---|---|"]
    aims = [(aim, record) for record in records for aim in record["aims"]]
    for aim, record in sorted(aims, key=lambda pair: pair[0]["reached"]):
        word = "reached" if aim["reached"] else "**missed**"
        lines.append(
            f"| {word} | {record['title']}: {aim['what']} | {aim['size']:,} {record['size']} "
            f"| {aim['found']} | {aim['wanted']} |"
        )
    return "\n".join(lines)


def _table(rows: pd.DataFrame, record: Mapping[str, object]) -> str:
    lines = [
        f"| {record['size']} | | seconds | times that of *{record['ours']}* | memory (MB) "
        "| result |",
        "|---|---|---|---|---|---|",
    ]
    compared = rows["way"].str.startswith("ours").any()
    for row in rows.to_dict("records"):
        is_peer = compared and not row["way"].startswith("ours") and row["ratio"] is not None
        ratio = f"{row['ratio']:.3g}" if is_peer else ""
        memory = "" if row["added_mb"] is None else f"{row['added_mb']:,.0f}"
        result = row["result"]
        shown = f"{result:.4g}" if isinstance(result, float) else result
        lines.append(
            f"| {row['size']:,} | {row['way']} | {row['seconds']:.3g} | {ratio} "
            f"| {memory} | {shown} |"
        )
    return "\n".join(lines)


def _draw(rows: pd.DataFrame, record: Mapping[str, object], path: Path) -> None:
    """Draw time and memory against the size, a line per way."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    ways, sizes = list(dict.fromkeys(rows["way"])), sorted(set(rows["size"]))
    for i, way in enumerate(ways):
        mine = rows[rows["way"] == way]
        style = {
            "color": COLORS[i % len(COLORS)],
            "marker": MARKERS[i % len(MARKERS)],
            "label": way,
        }
        axes[0].plot(mine["size"], mine["seconds"], **style)
        axes[1].plot(mine["size"], mine["added_mb"].clip(lower=1), **style)
    for ax, label in zip(axes, ("seconds", "memory (MB)"), strict=True):
        ax.set(xscale="log", yscale="log", xlabel=record["size"], ylabel=label)
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
        ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        ax.grid(visible=True, which="both", alpha=0.3)
    axes[0].set_title(record["title"], loc="left")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="with a JSON file per stage")
    parser.add_argument("--output", type=Path, default=common.PROJECT / "docs" / "benchmarks.md")
    args = parser.parse_args()
    write_report(args.folder, args.output)
