"""Artefacts on disk: whole or absent, with a manifest of what they were made from."""

from __future__ import annotations

import glob
import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout

from ImageData import InputError

# ---------------------------------------------------------------------------------------------
# Atomic artefacts
# ---------------------------------------------------------------------------------------------


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its name when the block succeeds.

    Readers therefore see the old file or the whole new one; when the block raises, the temporary
    file is removed and `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def remove_strays(path: Path) -> None:
    """Remove temporary files that processes which were killed left beside a path.

    Nobody else may be writing to the path.
    """
    for stray in path.parent.glob(f".{'[0-9a-f]' * 8}.{glob.escape(path.name)}*"):
        if stray.is_file():
            stray.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def write_json(path: Path, value: object) -> Path:
    """Write a value as JSON atomically; paths and NumPy scalars are converted."""
    return write_text(path, json.dumps(value, indent=2, default=_plain) + "\n")


def write_table(path: Path, df: pd.DataFrame) -> Path:
    """Write a frame atomically, as CSV or Parquet by the path's suffix."""
    with atomic_path(path) as temporary:
        if path.suffix == ".parquet":
            df.to_parquet(temporary, index=False)
        else:
            df.to_csv(temporary, index=False)
    return path


def _plain(value: object) -> object:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


def recreate_directory(directory: Path) -> Path:
    """Empty a directory, or make it; it must not be a root, a home or the working directory."""
    directory = Path(directory).resolve()
    if directory in (Path(directory.anchor), Path.home(), *Path.cwd().parents, Path.cwd()):
        raise InputError(f"{directory} must not be emptied: it holds more than our files")
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    return directory


# ---------------------------------------------------------------------------------------------
# Manifests: what a finished stage was made from
# ---------------------------------------------------------------------------------------------


def fingerprint(value: object) -> str:
    """Digest a value to a short text that is the same in every process.

    A path stands for the file's name, size and modification time; a function for its code, its
    defaults, and the variables and functions of its module that it uses, so that an edited filter
    is another one; functions of libraries for their names.
    """
    text = json.dumps(_identity(value, frozenset()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _identity(value: object, above: frozenset[int]) -> object:
    """Turn a value into JSON; `above` are those around it, as functions may use themselves."""
    if id(value) in above:
        return "itself"
    inner = partial(_identity, above=above | {id(value)})
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Path():
            stat = value.stat() if value.exists() else None
            return [value.name, stat.st_size, stat.st_mtime_ns] if stat else [str(value), None]
        case Mapping():
            return sorted([str(key), inner(item)] for key, item in value.items())
        case list() | tuple():
            return [inner(item) for item in value]
        case set() | frozenset():
            return sorted(map(repr, value))  # their own order changes from process to process
        case pd.DataFrame():
            rows = pd.util.hash_pandas_object(value, index=False)
            return [list(value.columns), hashlib.sha256(rows.to_numpy().tobytes()).hexdigest()]
        case np.generic() | np.ndarray():
            return value.tolist()
        case partial():
            return [inner(value.func), inner(value.args), inner(value.keywords)]
        case MethodType():
            return [inner(value.__func__), inner(value.__self__)]
        case CodeType():
            return [value.co_code.hex(), inner(value.co_consts), inner(value.co_names)]
        case FunctionType():
            defaults = [value.__defaults__, value.__kwdefaults__]
            return [value.__qualname__, inner(value.__code__), inner(defaults), inner(_used(value))]
        case ModuleType():
            return value.__name__
        case type():
            members = {k: m for k, m in vars(value).items() if isinstance(m, FunctionType)}
            return [value.__qualname__, inner(members)]
    if type(value).__repr__ is object.__repr__:  # it would show an address
        return [inner(type(value)), inner(getattr(value, "__dict__", None))]
    return repr(value)


def _used(function: FunctionType) -> dict[str, object]:
    """Return the outer variables that a function uses, those of its inner functions included."""
    codes, names = [function.__code__], set()
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    used = {name: value for name, value in function.__globals__.items() if name in names}
    cells = function.__closure__ or ()
    used |= zip(function.__code__.co_freevars, (c.cell_contents for c in cells), strict=True)
    return {
        name: f"{value.__module__}.{name}"
        if isinstance(value, FunctionType | type) and value.__module__ != function.__module__
        else value
        for name, value in used.items()
    }


def is_finished(path: Path, parameters: Mapping[str, Any]) -> bool:
    """Tell whether a stage with just these parameters left this manifest, and its files."""
    try:
        manifest = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    there = all((Path(path).parent / name).exists() for name in manifest.get("outputs", ()))
    return there and manifest.get("fingerprint") == fingerprint(dict(parameters))


def mark_finished(path: Path, parameters: Mapping[str, Any], outputs: Sequence[str]) -> None:
    """Leave the manifest that `is_finished` reads, when the outputs beside it are written."""
    shown = json.loads(json.dumps(dict(parameters), default=repr))
    value = {"fingerprint": fingerprint(dict(parameters)), "outputs": list(outputs)}
    value["parameters"] = shown
    write_json(path, value)


def hash_rows(df: pd.DataFrame, seed: int) -> np.ndarray:
    """Hash each row's values and a seed to uint64: a random order that depends on nothing else."""
    return pd.util.hash_pandas_object(df.assign(seed=seed), index=False).to_numpy()


@contextmanager
def exclusive(directory: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a directory for one process at a time; the lock ends with the process.

    Args:
        directory: The directory, which is made if need be.
        wait: Wait until nobody holds it.

    Raises:
        InputError: Another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / ".lock", timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"{directory} is in use by another process; wait for it, or write elsewhere "
            "(RUN_NAME, --output)"
        ) from None
    try:
        yield
    finally:
        lock.release()


# ---------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------

_TILE_NAME = re.compile(r"^tile_(?P<identifier>.+)_\d+_(?P<angle>0|90|180|270)$")
_ROTATED_NAME = re.compile(r"^(?P<identifier>.+)_(?P<angle>0|90|180|270)$")


def identifier_from_tilename(name: str | Path) -> str:
    """Return the identifier of the raster that a tile or a rotated raster was made from.

    Raises:
        InputError: The name has neither form: `tile_<identifier>_<number>_<angle>` or
            `<identifier>_<angle>`.
    """
    stem = Path(name).stem
    match = _TILE_NAME.match(stem) or _ROTATED_NAME.match(stem)
    if match is None:
        raise InputError(
            f"{name} is not named as a tile (tile_<identifier>_<number>_<angle>) "
            "nor as a rotated raster (<identifier>_<angle>)"
        )
    return match["identifier"]
