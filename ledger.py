"""The ledger: every run and every trial ever made, as one table.

    python gridsearch.py ledger runs --where "AP50 > 0.5 and patch_size == 256" --out ledger.parquet

It reads the folders of the runs, so that nothing has to be kept beside them. What is damaged is
listed, with what is wrong.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import operator
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import fileio
import implot
import predict
import strips
from ImageData import IGNORE, InputError, Window
from LargeRasterOR import BEST_BY, LargeRasterORModel
from LargeRasterSeg import LargeRasterSegModel
from ModelConfig import HYPERPARAMETERS

KEPT_BY = (BEST_BY, LargeRasterSegModel.BEST_BY)
FIRST = ["run", "trial", "state", "problem"]
LAST = ["split_hash", "data", "tiles", "code_version", "host", "started", "seconds", "checkpoint"]
SHOWN = [*FIRST[:3], *HYPERPARAMETERS, "AP50", "box_f1", "mean_IoU", *KEPT_BY, "pixel_accuracy",
         "seconds", "problem"]  # fmt: skip
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.In: lambda a, b: a.isin(b),
    ast.NotIn: lambda a, b: ~a.isin(b),
}  # fmt: skip
FAILED = 1  # exit code


def read_ledger(runs_dir: Path | Sequence[Path], where: str | None = None) -> pd.DataFrame:
    """List all runs and trials in folders of runs.

    Args:
        runs_dir: RUNS_DIR of the notebook, or the folder of one run, or several of either.
        where: Which rows to keep, see `filter_rows`.

    Returns:
        A row for each trial, in the order of their beginning, and one for each run without any:
        `run, trial` (its key), `state` (complete, pruned, fail; unfinished: under way, or cut
        short; damaged: cannot be read; empty: a run without trials), `problem` (why it failed, or
        what is damaged); the hyperparameters; the model's options that differ between rows, by
        their names in `ModelConfig`; the values of the test and, with `val_`, of the validation, as
        in the leaderboard; `split_hash` of the ground; fingerprints of the `data` (content of the
        rasters) and of its `tiles`; `code_version, host, started` (UTC), `seconds` (of all of the
        trial), `checkpoint` (its path, if there is one).

    Raises:
        InputError: There is no such folder, or see `filter_rows`.
    """
    given = [runs_dir] if isinstance(runs_dir, str | Path) else runs_dir
    folders = {}
    for place in map(Path, given):
        if not place.is_dir():
            raise InputError(f"there is no folder of runs {place}; give RUNS_DIR of the notebook")
        runs = [place] if _is_run(place) else sorted(filter(_is_run, place.iterdir()))
        for folder in runs:  # each once, whatever links there are
            folders.setdefault(folder.resolve(), folder)
    names = Counter(folder.name for folder in folders)
    rows, options = [], []
    for resolved, folder in folders.items():
        for row, configuration in _read_run(folder):
            if names[resolved.name] > 1:  # of several machines, say
                row["run"] = f"{resolved.parent.name}/{resolved.name}"
            rows.append(row)
            options.append(configuration)
    table = pd.DataFrame(rows, columns=None if rows else FIRST)
    known = pd.DataFrame(options, index=table.index)
    differing = [n for n in known if len(set(map(repr, known[n]))) > 1 and n not in table]
    table = pd.concat([table, known[differing]], axis=1)
    first = [name for name in [*FIRST, *HYPERPARAMETERS, *differing] if name in table]
    last = [name for name in LAST if name in table]
    values = [name for name in table if name not in {*first, *last}]
    table = table[[*first, *values, *last]]
    if "started" in table:
        table = table.sort_values(["run", "started"], ignore_index=True, na_position="last")
    return table if where is None else filter_rows(table, where)


def load_model(row: pd.Series, device: str = "cpu") -> LargeRasterORModel:
    """Return the model of a trial, ready to detect, given its row of the ledger.

    Raises:
        InputError: The trial is not complete, or its checkpoint is gone or cannot be read.
    """
    found = isinstance(row.get("checkpoint"), str) and row["checkpoint"]
    if row["state"] != "complete" or not found:
        raise InputError(
            f"trial {row['trial']!r} of run {row['run']!r} has {'a' if found else 'no'} checkpoint "
            f"and is {row['state']}; take a row that is complete and has one"
        )
    return strips.load_model(row["checkpoint"], device)


def rank_rows(table: pd.DataFrame, by: str | None = None) -> pd.DataFrame:
    """Return the complete trials that have a value of a column, the best first.

    Args:
        table: See `read_ledger`.
        by: A column of numbers; of one that ends in `loss`, or is `seconds`, the least is best.
            None takes that of the validation by which the task's best model is kept.

    Raises:
        InputError: There is no such column, or no complete trial has a value of it.
    """
    if table.empty:
        raise InputError("no trial meets the condition; loosen it")
    numbers = table.select_dtypes("number").columns.tolist()
    known = table[table["state"] == "complete"].notna().any()
    by = by or next((name for name in KEPT_BY if name in numbers and known[name]), KEPT_BY[0])
    if by not in numbers:
        close = difflib.get_close_matches(by, numbers, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(numbers)}"
        raise InputError(f"trials cannot be ranked by {by!r}, no column of numbers; {hint}")
    ranked = table[(table["state"] == "complete") & table[by].notna()]
    if ranked.empty:
        raise InputError(f"no trial is complete and has a value of {by!r}; rank by another column")
    least = by.endswith("loss") or by == "seconds"
    return ranked.sort_values(by, ascending=least, kind="stable", ignore_index=True)


def compare(
    rows: pd.DataFrame,
    raster: fileio.Raster | Path | str,
    window: Window,
    truth: Mapping[str, pd.DataFrame | np.ndarray] | None = None,
    **opening: object,
) -> Figure:
    """Draw what the models of some trials make of the same part of a raster, side by side.

    Args:
        rows: Of the ledger; trials of the same task. They are named by their number and by the
            run and the hyperparameters in which they differ, one alone by its run.
        raster: One that the models were trained on; or a file or address, which has to fit each.
        window: The part, in px as the models read them, held whole.
        truth: Title -> what is known there, see `implot.plot_comparison`; class ids are those of
            the models, which then have the same classes.
        opening: See `predict.open_raster`.

    Raises:
        InputError: There are no rows, or they differ in task or resolution, or, with class ids as
            truth, in classes; see `load_model` and `predict.open_raster`.
    """
    if rows.empty:
        raise InputError("there are no trials to compare; take rows that are complete")
    models = [load_model(row) for _, row in rows.iterrows()]
    if len(tasks := {model.TASK for model in models}) > 1:
        raise InputError(f"trials to compare must be of one task, got {sorted(tasks)}; filter them")
    names = list(dict.fromkeys(label for model in models for label in model.labels))
    maps_of_truth = any(isinstance(known, np.ndarray) for known in (truth or {}).values())
    if maps_of_truth and len({tuple(model.labels) for model in models}) > 1:
        raise InputError(
            f"the models differ in their classes, {[list(m.labels) for m in models]}; compare "
            "them without the truth, whose class ids are of one of them"
        )
    found: dict[str, pd.DataFrame | np.ndarray] = dict(truth or {})
    sizes: set[tuple[int, int]] = set()
    tellers = ["run", *(name for name in HYPERPARAMETERS if name in rows)]
    tellers = [name for name in tellers if len(set(rows[name])) > 1]
    for number, ((_, row), model) in enumerate(zip(rows.iterrows(), models, strict=True), start=1):
        opened = raster
        if not isinstance(raster, fileio.Raster):
            opened = predict.open_raster(raster, model.contract, **opening)
        sizes.add((opened.width, opened.height))
        if len(sizes) > 1:
            raise InputError(
                f"the models read {opened.path.name} in pixels of different size, so that the "
                "window is other ground for each; compare models of one resolution"
            )
        seen = predict.predict_window(model, opened, window)
        if isinstance(seen, np.ndarray):
            ids = np.full(IGNORE + 1, IGNORE, np.uint8)
            ids[: len(model.labels)] = [names.index(label) for label in model.labels]
            seen = ids[seen]
        title = ", ".join(f"{name} {row[name]}" for name in tellers) or str(row["run"])
        found[f"{number}: {title}"] = seen
    return implot.plot_comparison(opened, window, found, names)


def filter_rows(table: pd.DataFrame, where: str) -> pd.DataFrame:
    """Keep the rows for which a condition holds; nothing in it is executed.

    Args:
        table: Any table.
        where: Comparisons of columns with values, joined by and, or, not and parentheses, such as
            `AP50 > 0.5 and state == "complete" and patch_size in [256, 400]`. A row is not
            kept where it depends on a value that is unknown, with `not` neither.

    Raises:
        InputError: It is something else, or names a column that is not there.
    """
    try:
        keep = _evaluate(ast.parse(where.strip(), mode="eval").body, table)
    except (
        SyntaxError, ValueError, TypeError, AttributeError, RecursionError, MemoryError
    ) as error:  # fmt: skip
        raise InputError(
            f"the condition {where!r} cannot be used ({error}); write comparisons of columns with "
            "values, such as seconds < 600 and state == 'complete'"
        ) from None
    if not isinstance(keep, pd.Series) or not pd.api.types.is_bool_dtype(keep):
        raise InputError(
            f"the condition {where!r} is no comparison; write one, such as seconds < 600"
        )
    return table[keep.fillna(False).astype(bool)].reset_index(drop=True)


def _evaluate(node: ast.expr, table: pd.DataFrame) -> Any:  # noqa: ANN401 - a column or a value
    match node:
        case ast.BoolOp():
            parts = [_evaluate(part, table) for part in node.values]  # noqa: PD011 - no frame's
            result = parts[0]
            for part in parts[1:]:
                result = result & part if isinstance(node.op, ast.And) else result | part
            return result
        case ast.UnaryOp(op=ast.Not()):
            return ~_evaluate(node.operand, table)
        case ast.Compare():
            sides = [_evaluate(side, table) for side in (node.left, *node.comparators)]
            result = pd.Series(True, index=table.index, dtype="boolean")  # or unknown
            for left, comparison, right in zip(sides[:-1], node.ops, sides[1:], strict=True):
                if type(comparison) not in COMPARISONS:
                    raise ValueError("of comparisons there are == != < <= > >= in, not in")
                holds = COMPARISONS[type(comparison)](left, right)
                holds = pd.Series(holds, index=table.index, dtype="boolean")
                for side in (left, right):
                    if isinstance(side, pd.Series):
                        holds = holds.mask(side.isna())
                result &= holds
            return result
        case ast.Name() | ast.Attribute():
            name = ast.unparse(node)
            if not re.fullmatch(r"[\w.]+", name) or name not in table:
                close = difflib.get_close_matches(name, table.columns, n=1)
                hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(table)}"
                raise ValueError(f"there is no column {name!r}; {hint}")
            return table[name]
        case ast.Constant() | ast.UnaryOp(op=ast.USub(), operand=ast.Constant()) | ast.List():
            return ast.literal_eval(node)
    raise ValueError(f"{ast.unparse(node)!r} is neither a column nor a value")


# ---------------------------------------------------------------------------------------------
# Folders of runs
# ---------------------------------------------------------------------------------------------


def _is_run(folder: Path) -> bool:
    """Tell whether a folder is that of a run, however little of it is left."""
    marks = ("parameters.json", "application.log", "search/search.json", "leaderboard.csv")
    if not folder.is_dir():
        return False
    trials = folder / "trials"  # a run may be called so
    return any((folder / m).exists() for m in marks) or (trials.exists() and not _is_run(trials))


def _read_run(folder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the row of each trial of a run, and the options that its model was made with."""
    run, problems = {"run": folder.name}, []

    def read(path: Path) -> dict[str, Any]:
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(value, dict):
                raise ValueError(f"it holds {type(value).__name__}, no table")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            problems.append(f"{path.name} cannot be read ({error})")
            return {}
        return value

    made_from = read(folder / "trials" / "made_from.json")
    search = read(folder / "search" / "search.json")
    configuration = _dotted(_mapping(made_from.get("configuration")))
    rasters = _mapping(_mapping(search.get("data")).get("rasters"))
    contents = {name: _mapping(raster).get("content") for name, raster in rasters.items()}
    run |= {"split_hash": made_from.get("ground"), "data": None}
    if contents:
        run["data"] = fileio.fingerprint(contents)
    tiles = _mapping(made_from.get("tiles"))
    of_run, rows = problems.copy(), []
    try:
        folders = sorted(path for path in (folder / "trials").iterdir() if path.is_dir())
    except OSError as error:
        folders = []
        if not isinstance(error, FileNotFoundError):
            of_run.append(f"trials cannot be read ({error})")
    for trial in folders:
        problems.clear()
        row = run | _read_trial(trial, read)
        row["tiles"] = tiles.get(str(row.get("patch_size")))
        if problems or of_run:
            row["problem"] = "; ".join(filter(None, [row["problem"], *of_run, *problems]))
        if problems:
            row["state"] = "damaged"
        rows.append((row, configuration))
    if not rows:
        state = "damaged" if of_run else "empty"
        rows = [(run | {"trial": "", "state": state, "problem": "; ".join(of_run)}, configuration)]
    return rows


def _read_trial(folder: Path, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    record = read(folder / "result.json")
    failure = {} if record else read(folder / "failure.json")
    pruned = _mapping(record.get("pruned"))
    hyperparams = record.get("hyperparams") or failure.get("hyperparams")
    if not hyperparams:
        hyperparams = read(folder / "hparams.json")
    checkpoint = folder / "checkpoints" / "best.ckpt"
    # a folder that a worker has not yet given its place
    key = folder.name.removeprefix(".").partition("~")[0]
    row = {"trial": key, "state": "unfinished", "problem": ""}
    if failure:
        row |= {"state": "fail", "problem": str(failure.get("error", ""))}
    elif pruned:
        score = next((n for n in pruned if n.startswith("val_")), BEST_BY)
        problem = f"stopped after epoch {pruned.get('epoch')}, {score} {pruned.get(score)}"
        row |= {"state": "pruned", "problem": problem}
    elif record:
        row["state"] = "complete"
    row |= {n: v for n, v in _numbers(hyperparams).items() if n in HYPERPARAMETERS}
    row |= _numbers(record.get("values"))
    ended = record or failure
    row |= {
        "code_version": _text(ended.get("code_version")),
        "host": _text(_mapping(ended.get("worker")).get("host")),
        "started": _text(ended.get("started")) or _time_of(folder / "hparams.json"),
        "seconds": _numbers(ended).get("seconds", row.get("training_time")),
        "checkpoint": str(checkpoint) if checkpoint.is_file() else None,
    }
    return row


def _time_of(path: Path) -> str | None:
    """Return when a file was written; older records do not tell when a trial began."""
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
    except OSError:
        return None


def _numbers(values: object) -> dict[str, int | float]:
    return {name: v for name, v in _mapping(values).items() if isinstance(v, int | float)}


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _dotted(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _dotted(value, f"{before}{name}.")
        else:
            flat[before + name] = tuple(value) if isinstance(value, list) else value
    return flat


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Write or show the ledger, as a command; see its `--help`."""
    parser = argparse.ArgumentParser(
        prog="gridsearch.py ledger", allow_abbrev=False,
        description="List every trial of every run: parameters, measures, where its model is.",
    )  # fmt: skip
    add = parser.add_argument
    add(
        "runs_dir",
        type=Path,
        nargs="+",
        metavar="RUNS_DIR",
        help="the folder of all runs, or one run's",
    )
    add("--where", metavar="CONDITION", help='rows to keep, such as "AP50 > 0.5"')
    add(
        "--best",
        metavar="COLUMN",
        help="complete trials only, the best first by a column such as "
        "val_AP50 or val_mean_IoU (the least of a loss)",
    )
    add("--out", type=Path, metavar="FILE", help="write all columns to a .parquet or .csv")
    args = parser.parse_args(argv)
    try:
        if args.out is not None and args.out.suffix not in (".parquet", ".csv"):
            raise InputError(f"--out must end in .parquet or .csv, got {args.out}")
        table = read_ledger(args.runs_dir, args.where)
        table = table if args.best is None else rank_rows(table, args.best)
        names = dict.fromkeys([*SHOWN[:-1], *filter(None, [args.best]), SHOWN[-1]])
        shown = table[[name for name in names if name in table]].dropna(axis=1, how="all")
        told = "no run here" if args.where is None else "no trial meets the condition"
        if len(table):
            told = shown.to_string(index=False, na_rep="", float_format="%.4g")
        if args.best is not None:
            best = table["checkpoint"].iloc[0]
            told += f"\nthe best model: {best if isinstance(best, str) else 'its file is gone'}"
            if len(set(table["split_hash"].dropna())) > 1:
                told += "\nnote: these were measured on different ground (split_hash)"
        if args.out is not None:
            fileio.write_table(args.out, table)
            told += f"\nrows written to {args.out}: {len(table)}"
        sys.stdout.write(f"{told}\n")
    except (InputError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return FAILED
    return 0
