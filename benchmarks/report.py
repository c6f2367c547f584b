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

import fileio
from imutils import COLORS

INTRODUCTION = """
`make bench` writes this page. Every way to do a piece of work runs in a process of its own, by
turns with the others, on the same input (predictions: all in one process, after a round that
warms). Seconds and memory are medians of so many runs, a ratio is the median over the turns.
Memory is what a process needed at most above what it held before the work, imports included, and
what its children needed at most; where it says peak, all that the process held.
[measurements.md](measurements.md) holds what takes longer or has to be looked at.
""".strip()
ORDER = (
    "clean", "tiling", "dask", "read", "train", "predict", "metrics", "memory", "hdr", "composite",
)  # fmt: skip
MARKERS = "os^Dv<>"


def write_report(folder: Path, output: Path) -> None:
    """Write the page and its pictures."""
    paths = {path.stem: path for path in folder.glob("*.json")}
    records = {
        name: json.loads(paths[name].read_text(encoding="utf-8")) for name in ORDER if name in paths
    }
    if not records:
        raise SystemExit(f"{folder} holds none of {', '.join(f'{n}.json' for n in ORDER)}")
    parts = ["# Benchmarks", INTRODUCTION, *_machines(records)]
    parts += ["## What was to be reached", _aims(records.values())]
    for name, record in records.items():
        rows = pd.DataFrame(record["rows"])
        parts += [f"## {record['title']}", f"`benchmarks/{record['script']}`", _table(rows, record)]
        picture = output.parent / f"benchmarks_{name}.png"
        _draw(rows, record, picture)
        parts.append(f"![time and memory against {record['size']}]({picture.name})")
    fileio.write_text(output, "\n\n".join(parts) + "\n")


def _machines(records: Mapping[str, Mapping[str, object]]) -> list[str]:
    """Return a line per machine, with the versions of software, and what was measured on it."""
    by_machine: dict[str, list[str]] = {}
    for name, record in records.items():
        m = record["machine"]
        versions = ", ".join(f"{package} {version}" for package, version in m["versions"].items())
        line = (
            f"{m['cores']} cores of {m['processor']}, {m['memory_gb']} GB, Python {m['python']}, "
            f"{versions}; commit {m['commit']}."
        )
        by_machine.setdefault(line, []).append(name)
    if len(by_machine) == 1:
        return [*by_machine]
    return [f"{', '.join(names)}: {line}" for line, names in by_machine.items()]


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
    peak = " at peak" if record["memory"] == "peak_mb" else ""
    lines = [
        f"| {record['size']} | | runs | seconds | ratio | memory{peak} (MB) | result |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows.to_dict("records"):
        ratio = "" if pd.isna(row["ratio"]) else f"{row['ratio']:.3g} x *{row['against']}*"
        memory = "" if pd.isna(row[record["memory"]]) else f"{max(row[record['memory']], 0):,.0f}"
        lines.append(
            f"| {row['size']:,} | {row['way']} | {len(row['runs'])} | {row['seconds']:.3g} "
            f"| {ratio} | {memory} | {_shown(row['result'])} |"
        )
    return "\n".join(lines)


def _shown(result: object) -> str:
    if isinstance(result, list):
        return ", ".join(map(_shown, result))
    return f"{result:.4g}" if isinstance(result, float) else str(result)


def _draw(rows: pd.DataFrame, record: Mapping[str, object], path: Path) -> None:
    """Draw time and memory against the size, a line per way; of one size, bars."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    labels = {"seconds": "seconds", record["memory"]: "memory (MB)"}
    rows = rows.astype(dict.fromkeys(labels, float))
    rows[record["memory"]] = rows[record["memory"]].clip(lower=1)
    sizes, ways = sorted(set(rows["size"])), list(dict.fromkeys(rows["way"]))[::-1]
    for ax, (column, label) in zip(axes, labels.items(), strict=True):
        if len(sizes) > 1:
            for i, (way, mine) in enumerate(rows.groupby("way", sort=False)):
                style = ("-", "--")[i // len(COLORS)] + MARKERS[i % len(MARKERS)]
                color = COLORS[i % len(COLORS)]
                ax.plot(mine["size"], mine[column], style, color=color, label=way)
            ax.set(xscale="log", yscale="log", xlabel=record["size"], ylabel=label)
            ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
            ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        else:
            values = rows.set_index("way").loc[ways, column]
            ax.barh(ways, values, color=[COLORS[way.startswith("ours")] for way in ways])
            ax.set(xlabel=label)
            ax.tick_params(axis="y", labelleft=ax is axes[0])
        ax.grid(visible=True, which="both", alpha=0.3)
        ax.set_axisbelow(True)
        if rows[column].isna().all():
            ax.remove()
    axes[0].set_title(record["title"], loc="left")
    if len(sizes) > 1:
        handles = axes[0].get_legend_handles_labels()
        fig.legend(*handles, loc="outside right upper", fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="with a JSON file per stage")
    parser.add_argument("--output", type=Path, default=common.PROJECT / "docs" / "benchmarks.md")
    args = parser.parse_args()
    write_report(args.folder, args.output)
