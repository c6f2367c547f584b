"""Artefacts on disk: whole or absent, with a manifest of what they were made from."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform
import re
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import pandas as pd
import psutil
from filelock import FileLock, Timeout

from ImageData import InputError

log = logging.getLogger(__name__)

FULL = {errno.ENOSPC: "its disk is full", errno.EDQUOT: "the quota of its disk is used up",
        errno.EFBIG: "files may not grow that large (ulimit -f)"}  # fmt: skip
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR}
PROBE_BYTES = 2**20  # a disk that cannot take them is full
STALE_SECONDS = 86_400.0  # from then on a temporary file of another machine is a stray
LOCK_NAME = ".lock"
SCHEMES = {"https": "vsicurl", "http": "vsicurl", "s3": "vsis3", "gs": "vsigs", "az": "vsiaz"}
COARSEST_TIME = 2_000_000_000  # ns, between two times that a disk tells apart (FAT)
PIECES, PIECE_BYTES = 64, 2**16  # of a file, for its fingerprint

# ---------------------------------------------------------------------------------------------
# Atomic artefacts
# ---------------------------------------------------------------------------------------------


class FullDiskError(InputError):
    """A disk, a quota or a limit is used up: whatever comes next would fail alike."""


@contextmanager
def writing(path: Path, probe: Path | None = None) -> Iterator[None]:
    """Say what a failed write is about: a disk that is full, or a place that may not be written.

    Args:
        path: What is being written, for messages.
        probe: A file that goes in any case. Some libraries tell of a full disk as of any failure,
            or not at all by words; so it is tried whether this file can grow.

    Raises:
        FullDiskError: There is no space left.
        InputError: The file must not be written, or the system does not take its name.
    """
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        named = getattr(error, "filename", None)
        ours = named is None or path.is_relative_to(Path(os.fsdecode(named)).parent)
        if number in REFUSED and ours:
            raise InputError(
                f"{path} cannot be written: {error.strerror}; choose another place or name, or "
                "have the rights changed"
            ) from error
        if number is None and probe is not None and not isinstance(error, InputError):
            number = find_full(probe)
        if number not in FULL:
            raise
        raise FullDiskError(
            f"{path} cannot be written: {FULL[number]}, {_free_space(path)}; make room, or write "
            "elsewhere, and run the same again: what is finished is kept"
        ) from error


def find_full(probe: Path) -> int | None:
    """Return the error, of `FULL`, by which a file cannot grow by `PROBE_BYTES`; it does not."""
    left = PROBE_BYTES
    try:
        with probe.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                while left:
                    left -= file.write(bytes(left))
            finally:
                file.truncate(size)
    except OSError as error:
        return error.errno if error.errno in FULL else None
    return None


def _free_space(path: Path) -> str:
    there = next(folder for folder in path.absolute().parents if folder.exists())
    with suppress(OSError):
        usage = shutil.disk_usage(there)
        return f"{usage.free / 1e6:,.1f} MB of {usage.total / 1e6:,.0f} MB are free"
    return "what is free is unknown"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its name when the block succeeds.

    Readers therefore see the old file or the whole new one; when the block raises, the temporary
    file is removed and `path` stays as it was. The temporary name tells whose it is, and is short,
    as that of `path` may be as long as the system allows.

    Raises:
        FullDiskError: There is no space left; see `writing`.
        InputError: The place must not be written.
    """
    path = Path(path)
    mark = f"{this_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    suffix = path.suffix if len(path.suffix) < 16 else ""
    temporary = path.with_name(f".{mark}{suffix}")
    try:
        with writing(path, probe=temporary):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()


@cache
def this_machine() -> str:
    """Name this machine since it started, and the space of its process numbers."""
    marks = [platform.node()]
    with suppress(OSError):
        marks.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8"))
        marks.append(str(Path("/proc/self/ns/pid").readlink()))  # containers count for themselves
    return hashlib.sha256("|".join(marks).encode()).hexdigest()[:8]


_TEMPORARY = re.compile(r"^\.(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}(\.|-|$)")


def remove_strays(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder, if there is one.

    Those of this machine go when their process is gone, those of others when they are a day old.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if (mark := _TEMPORARY.match(path.name)) is None:
            continue
        with suppress(OSError):  # another process may remove it, too
            if mark["machine"] == this_machine():
                stray = not psutil.pid_exists(int(mark["pid"]))
            else:
                stray = time.time() - path.stat().st_mtime > STALE_SECONDS
            if stray and path.is_file():
                path.unlink()


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


def address_of(path: Path | str) -> str | None:
    """Return what GDAL is to open of an address; None: it is the path of a file.

    Args:
        path: `https://`, `s3://` and the like, or a path of GDAL's virtual file systems, `/vsi...`.
            A `Path` made of it lacks one of two slashes, which is put back.

    Raises:
        InputError: It has an unknown scheme.
    """
    text = str(path)
    if match := re.match(r"^(\w{2,}):/{1,2}([^/].*)$", text):
        scheme, rest = match.groups()
        if scheme not in SCHEMES:
            raise InputError(f"{text} starts with {scheme}://, expected one of {list(SCHEMES)}")
        prefix = f"{scheme}://" if scheme.startswith("http") else ""
        return f"/{SCHEMES[scheme]}/{prefix}{rest}"
    if not text.startswith("/vsi"):
        return None
    text = re.sub(r"\b(https?|ftp):/(?=[^/])", r"\1://", text)
    if match := re.match(r"^(/vsi(?:zip|tar|gzip|7z|rar)/)((?!vsi)[^/{].*)$", text):
        here, there = (Path(start + match[2]) for start in ("", "/"))
        is_archive = [any(p.is_file() for p in (place, *place.parents)) for place in (here, there)]
        if is_archive == [False, True]:
            return f"{match[1]}/{match[2]}"
    return text


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
        case logging.Logger():  # whatever it tells at the moment
            return value.name
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


def set_time(path: Path, changed: int) -> None:
    """Give a file a time of change (ns), or the next one that its disk can hold."""
    os.utime(path, ns=(changed, changed))
    if path.stat().st_mtime_ns < changed:
        later = changed + COARSEST_TIME
        os.utime(path, ns=(later, later))


def content_fingerprint(path: Path | str) -> str:
    """Digest a file's size, head, tail and pieces evenly between; fast however large it is.

    A copied or touched file keeps its fingerprint. A change between the pieces of a file of the
    same size goes unnoticed.
    """
    path = Path(path)
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= PIECES * PIECE_BYTES:
            digest.update(file.read())
        else:
            for offset in np.linspace(0, size - PIECE_BYTES, PIECES).astype(int):
                file.seek(offset)
                digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()[:16]


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
    shown = json.loads(json.dumps(dict(parameters), default=_named))
    value = {"fingerprint": fingerprint(dict(parameters)), "outputs": list(outputs)}
    value["parameters"] = shown
    write_json(path, value)


def _named(value: object) -> str:
    return getattr(value, "__qualname__", None) or repr(value)  # no address of a function


def hash_rows(df: pd.DataFrame, seed: int) -> np.ndarray:
    """Hash each row's values and a seed to uint64: a random order that depends on nothing else."""
    return pd.util.hash_pandas_object(df.assign(seed=seed), index=False).to_numpy()


@contextmanager
def exclusive(directory: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a directory for one process at a time; the lock ends with the process.

    While it is held, a polite kill (SIGTERM) ends the work as Ctrl-C does, and either is told that
    the work goes on. What was left there by processes that were killed is removed.

    Args:
        directory: The directory, which is made if need be.
        wait: Wait until nobody holds it.

    Raises:
        InputError: Another process holds it, or it must not be written.
    """
    with writing(directory / LOCK_NAME):
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / LOCK_NAME, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            if not wait:
                raise InputError(
                    f"{directory} is in use by another process; wait for it, or write elsewhere "
                    "(RUN_NAME, --output)"
                ) from None
            log.info("%s is in use by another process, which is waited for", directory)
            lock.acquire(timeout=-1)
    try:
        remove_strays(directory)
        with terminable():
            yield
    except KeyboardInterrupt as error:
        if not getattr(error, "__notes__", None):
            error.add_note(f"what is finished is kept in {directory}; the same call goes on there")
        raise
    finally:
        lock.release()


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM, by which batch systems end a job, raise `KeyboardInterrupt` as Ctrl-C does.

    Python would end at once, and leave temporary files. Handlers that somebody else set stay.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Journal:
    """What a stage has done so far, one unit of work per line, for the run after a kill.

    One process at a time may add to it.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there, but for half a line, which a kill may leave."""
        self.path, self.known = path, {}
        with suppress(FileNotFoundError):
            whole, _, _ = path.read_bytes().rpartition(b"\n")
            self.known = dict(map(json.loads, whole.splitlines()))

    def add(self, key: str, value: object) -> None:
        """Note the result, plain values, of a unit of work."""
        append_line(self.path, json.dumps([key, value]))
        self.known[key] = value


def append_line(path: Path, line: str) -> None:
    """Append text and a line feed to a file, whole or not at all.

    Half a line that a process left when it was killed goes.

    Raises:
        FullDiskError: There is no space left; see `writing`.
    """
    with writing(path), path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            size = path.read_bytes().rfind(b"\n") + 1
            file.truncate(size)
        content = memoryview(f"{line}\n".encode())
        try:
            while content:  # the last bytes of a disk take a part of it
                content = content[file.write(content) :]
        except OSError:
            file.truncate(size)
            raise


# ---------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------

_TILE_NAME = re.compile(r"tile_(?P<identifier>.+)_\d+_(?P<angle>0|90|180|270)", re.DOTALL)
_ROTATED_NAME = re.compile(r"(?P<identifier>.+)_(?P<angle>0|90|180|270)", re.DOTALL)


def identifier_from_tilename(name: str | Path) -> str:
    """Return the identifier of the raster that a tile or a rotated raster was made from.

    Raises:
        InputError: The name has neither form: `tile_<identifier>_<number>_<angle>` or
            `<identifier>_<angle>`.
    """
    stem = Path(name).stem
    match = _TILE_NAME.fullmatch(stem) or _ROTATED_NAME.fullmatch(stem)
    if match is None:
        raise InputError(
            f"{name} is not named as a tile (tile_<identifier>_<number>_<angle>) "
            "nor as a rotated raster (<identifier>_<angle>)"
        )
    return match["identifier"]
