"""What goes wrong outside: kills, neighbours, hostile files, full disks; nothing is lost by it."""

from __future__ import annotations

import ast
import errno
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import kill
import numpy as np
import pandas as pd
import psutil
import pytest
import rasterio
import torch
from conftest import PROJECT, make_samples
from PIL import Image
from test_gridsearch import SPACE, conf, fake_training
from test_LargeRasterOR import contract_of, small_conf

import annotations
import atlas
import fileio
import gridsearch
import layout
import networks
import predict
import splits
import strips
import tiling
from artefacts import find_full
from ImageData import InputError
from LargeRasterOR import LargeRasterORModel
from logger import DefaultModelLogger, configure_logger
from ModelConfig import RunParameters

AS_ROOT = os.getuid() == 0


def environment():
    return os.environ | {"PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}", "OMP_NUM_THREADS": "1"}


def start(code, *words, **options):
    """Start Python on a piece of code, with the project at hand."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, words)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(command, env=environment(), **options)


def run_to_the_end(processes, seconds=240):
    """Return exit code and error output of each process; none is left behind."""
    try:
        ends = [process.communicate(timeout=seconds) for process in processes]
        return [(p.returncode, errors) for p, (_, errors) in zip(processes, ends, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.wait()


# -- kills --------------------------------------------------------------------------------------


def killed(tmp_path, signals, *stages):
    report = tmp_path / "report.json"
    words = ["--signals", str(signals), "--report", str(report), "--stages", *stages]
    done = subprocess.run(
        [sys.executable, str(PROJECT / "tests" / "kill.py"), *words], env=environment(),
        capture_output=True, text=True, timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(report.read_text())


QUICK = ("layout repair", "cleaning", "statistics", "tiling", "search")


def test_what_is_killed_goes_on_and_leaves_what_an_undisturbed_run_leaves(tmp_path):
    for row in killed(tmp_path, 2, *QUICK):
        assert sum(row["faults"].values()) == 3, "two signals, and two processes at once"


@pytest.mark.long
def test_two_hundred_kills_lose_nothing(tmp_path):
    tally = killed(tmp_path, 26, *QUICK, "prediction", "error atlas")
    tally += killed(tmp_path, 10, "training", "whole run")
    assert sum(sum(row["faults"].values()) for row in tally) >= 200


ORPHANS = """
    import os, sys, time
    import parallel

    def work(number):
        with open(sys.argv[1], "a") as file:
            file.write(f"{os.getpid()}\\n")
        time.sleep(600)

    if __name__ == "__main__":
        parallel.map_ordered(work, range(4), workers=2)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_worker_processes_end_with_the_one_that_started_them(tmp_path, number):
    process, workers = start(ORPHANS, tmp_path / "pids"), []
    try:
        deadline = time.monotonic() + 120
        while len(workers) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
            if (tmp_path / "pids").exists():
                workers = (tmp_path / "pids").read_text().split()
        process.send_signal(number)
        process.wait(timeout=60)
        while any(map(psutil.pid_exists, map(int, workers))) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(workers) == 2
        assert not any(map(psutil.pid_exists, map(int, workers)))
    finally:
        process.kill()
        process.wait()


HELD = """
    import sys, time
    from pathlib import Path
    import fileio

    with fileio.exclusive(Path(sys.argv[1])), fileio.atomic_path(Path(sys.argv[1]) / "a.txt") as t:
        t.write_text("half")
        time.sleep(600)
"""


def temporaries(folder):
    return [path for path in folder.iterdir() if path.name not in (".lock", "pids")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_kill_leaves_no_stray_and_a_hint(tmp_path, number):
    process = start(HELD, tmp_path)
    try:
        while process.poll() is None and not temporaries(tmp_path):
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert "KeyboardInterrupt" in errors
    assert "the same call goes on there" in errors
    assert not temporaries(tmp_path)


def test_strays_go_with_the_next_who_works_there_and_those_at_work_stay(tmp_path):
    process = start(HELD, tmp_path)
    try:
        while process.poll() is None and not temporaries(tmp_path):
            time.sleep(0.05)
        fileio.remove_strays(tmp_path)
        assert len(temporaries(tmp_path)) == 1
    finally:
        process.kill()
        process.wait()
    foreign = tmp_path / f".01234567-{os.getpid()}-00000000.txt"  # of another machine
    old = tmp_path / ".01234567-1-00000000.tif-journal"
    for path in (foreign, old):
        path.write_text("")
    os.utime(old, (0, 0))
    with fileio.exclusive(tmp_path):
        assert temporaries(tmp_path) == [foreign]


def test_a_journal_forgets_half_a_line(tmp_path):
    journal = fileio.Journal(tmp_path / "j.jsonl")
    journal.add("a", [1, "x"])
    journal.add("b", None)
    with (tmp_path / "j.jsonl").open("a") as file:
        file.write('["c", [1')
    journal = fileio.Journal(tmp_path / "j.jsonl")
    journal.add("d", 2)
    assert fileio.Journal(tmp_path / "j.jsonl").known == {"a": [1, "x"], "b": None, "d": 2}


@pytest.mark.parametrize("place", [2, -1])
def test_finished_rasters_and_windows_are_not_done_again(
    small_sample, tmp_path, monkeypatch, place
):
    calls, limit = [], None

    def counting(name, function):
        def wrapped(*args, **options):
            calls.append(name)
            if len(calls) == limit:
                raise KeyboardInterrupt
            return function(*args, **options)

        return wrapped

    def stages(folder):
        images, _ = annotations.clean_annotations(
            small_sample.tables, small_sample.rasters, output_dir=folder / "clean",
            **small_sample.cleaning,
        )  # fmt: skip
        blocks = splits.ground_blocks(
            small_sample.rasters, split_by="block", max_tile_size=128, block_size=None,
            test_proportion=0.2, validation_proportion=0.25, seed=0,
        )  # fmt: skip
        options = tiling.TilingOptions(filters=(tiling.black_pixel_filter,), materialize=True)
        tiling.make_tiles(images, blocks, [128], folder / "tiles", options, workers=1)

    monkeypatch.setattr(tiling, "JOB_WINDOWS", 8)
    for module, name in ((pd, "read_csv"), (tiling, "filter_tiles")):
        monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    stages(tmp_path / "undisturbed")
    whole, limit = list(calls), place % len(calls)
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        stages(tmp_path / "killed")
    limit = None
    stages(tmp_path / "killed")
    assert len(calls) == len(whole) + 1, "what was under way is done again, and nothing else"
    stages(tmp_path / "killed")
    assert len(calls) == len(whole) + 1, "what is finished is not done again"
    assert kill.snapshot(tmp_path / "killed") == kill.snapshot(tmp_path / "undisturbed")


# -- neighbours ---------------------------------------------------------------------------------


READER = """
    import sys, tiling
    from pathlib import Path
    while not Path(sys.argv[2]).exists():
        tiles, boxes = tiling.read_tiles(Path(sys.argv[1]))
        assert len(tiles) and len(boxes)
"""


def test_whoever_reads_an_index_while_it_is_made_anew_sees_whole_tables(prepared, tmp_path):
    folder = tmp_path / "tiles"

    def make(seed):
        options = tiling.TilingOptions(evaluation_overlap=16, seed=seed)
        return tiling.make_tiles(prepared.images, prepared.blocks, [128], folder, options)[128]

    process = start(READER, make(0), tmp_path / "stop")
    try:
        for seed in range(1, 8):
            make(seed)
            assert process.poll() is None
            time.sleep(0.1)
    finally:
        (tmp_path / "stop").touch()
        ((code, errors),) = run_to_the_end([process])
    assert code == 0, errors


OTHER_USER = """
    import logging, os, sys
    from pathlib import Path
    import fileio, layout

    logging.basicConfig(level=logging.INFO)
    layout.WORTH_IT, layout.SAMPLE_SIDE = 0.0, 512
    os.setgroups([])
    os.setuid(65534)
    raster = fileio.read_raster(sys.argv[1])
    (checked,) = fileio.check_layout([raster], repair=True, cache_dir=Path(sys.argv[2]))
    print(checked.path)
    try:
        fileio.write_json(Path(sys.argv[2]) / "mine.json", 1)
    except fileio.InputError as error:
        print(error)
"""


@pytest.mark.skipif(not AS_ROOT, reason="only root can become another user")
def test_another_users_cache_is_used_as_far_as_it_can_be(monkeypatch):
    monkeypatch.setattr(layout, "WORTH_IT", 0.0)
    monkeypatch.setattr(layout, "SAMPLE_SIDE", 512)
    folder = Path(tempfile.mkdtemp(prefix="cache_"))
    try:
        folder.chmod(0o755)
        source = folder / "slow.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (1200, 1300), "uint8")).save(
            source
        )
        process = start(OTHER_USER, source, folder / "cache")
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert output.splitlines()[0] == str(source), "read as it is, for the copy cannot be kept"
        assert "cannot be written: Permission denied" in errors
        assert "mine.json cannot be written: Permission denied; choose another place" in output
        raster = fileio.read_raster(source)
        (mine,) = fileio.check_layout([raster], repair=True, cache_dir=folder / "cache")
        process = start(OTHER_USER, source, folder / "cache")
        output, errors = process.communicate(timeout=120)
        assert output.splitlines()[0] == str(mine.path), errors
    finally:
        shutil.rmtree(folder)


# -- hostile files ------------------------------------------------------------------------------


class Marker:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def crafted(path, marker, **changes):
    """Save a checkpoint that would load, but for code in it."""
    model = LargeRasterORModel({"a", "b"}, small_conf(), contract_of())
    state = {
        "state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams),
        "pytorch-lightning_version": "2.6.0", "epoch": 0, "global_step": 0,
    }  # fmt: skip
    torch.save(state | {"more": Marker(marker)} | changes, path)
    return path


def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path):
    marker = tmp_path / "ran"
    path = crafted(tmp_path / "best.ckpt", marker)
    with pytest.raises(InputError, match="is not a checkpoint of a model trained here"):
        strips.load_model(path)
    with pytest.raises(InputError, match="INIT_FROM must name a checkpoint"):
        networks.read_checkpoint(str(path))
    with pytest.raises(InputError, match="is not a file of weights"):
        networks.load_weights("resnet18", str(path))
    with pytest.raises(Exception, match="Weights only load failed"):
        LargeRasterORModel.load_from_checkpoint(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "it would have run"


def test_a_checkpoint_does_not_choose_what_builds_the_model(tmp_path):
    hyper = {"_instantiator": "subprocess.Popen"}
    path = crafted(tmp_path / "best.ckpt", tmp_path / "ran", hyper_parameters=hyper, more=None)
    with pytest.raises(InputError, match="is not a checkpoint of a model trained here"):
        strips.load_model(path)


def test_pickles_are_refused_among_the_parts_of_a_journal(tmp_path):
    marker = tmp_path / "ran"
    with (tmp_path / "strip.npz").open("wb") as file:
        np.savez(file, boxes=np.array([Marker(marker)], dtype=object), scores=1, ids=1)
    assert strips.Part.read(tmp_path / "strip.npz") is None
    assert not marker.exists()


SAFE_LOADERS = {"BaseLoader", "SafeLoader"}
# What one process of ours sends to another; never what lies in a file.
AMONG_OURSELVES = {"parallel": "cloudpickle.loads", "ranks": "pickle.loads"}


@pytest.mark.parametrize("path", sorted(PROJECT.glob("*.py")), ids=lambda path: path.stem)
def test_nothing_that_is_read_can_run_code(path):
    for call in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)):
        name, given = ast.unparse(call.func), {k.arg: k.value for k in call.keywords}
        text = ast.unparse(call)
        assert name not in ("eval", "exec", "compile", "__import__"), text
        assert name not in ("os.system", "os.popen", "pd.read_pickle", "joblib.load"), text
        sent = name.endswith("dumps") or name == AMONG_OURSELVES.get(path.stem)
        assert "pickle." not in f"{name}." or sent, text
        if name in ("torch.load",) or name.endswith("load_from_checkpoint"):
            assert ast.unparse(given["weights_only"]) == "True", text
        if name.startswith("yaml.") and "load" in name and name != "yaml.safe_load":
            assert name == "yaml.load", text
            assert ast.unparse(given["Loader"]).removeprefix("yaml.") in SAFE_LOADERS, text
        assert ast.unparse(given.get("allow_pickle", ast.Constant(False))) == "False", text
        assert ast.unparse(given.get("shell", ast.Constant(False))) == "False", text


NAMES = [
    "sp ace 'single\" double", "new\nline", "-rf", "..", "u\u0308 \u00fc \u6f22", "a;b&c|d<e>",
    "{raster} %s $x^{$", "tile_x_0_90", "n" * 200,
]  # fmt: skip
LABELS = [
    "=HYPERLINK(1)",
    "../../x",
    "a\"b';--",
    "<b>&amp;",
    "$\\frac{$ $",
    "new\nline",
    "-1",
    "\u00fc",
]


@pytest.fixture(scope="module")
def badly_named(tmp_path_factory):
    """Rasters with names that no shell loves, with labels alike."""
    folder = tmp_path_factory.mktemp("named")
    make_samples(folder, {"plain": (384, 384)})
    (folder / "in").mkdir()
    table = pd.read_csv(folder / "datasets" / "plain.csv", dtype=str)
    table = table[pd.to_numeric(table["diameter"], errors="coerce") > 0]
    table["label"] = np.resize(LABELS, len(table))
    for name in NAMES:
        shutil.copy(folder / "images" / "plain.tif", folder / "in" / f"{name}.tif")
        table.to_csv(folder / "in" / f"{name}.csv", index=False)
    return folder


def test_no_name_escapes_its_folder_or_breaks_a_stage(badly_named, tmp_path):
    folder, out = badly_named / "in", tmp_path / "deep" / "run"
    rasters = fileio.read_rasters([folder / f"{name}.tif" for name in NAMES])
    images, report = annotations.clean_annotations(
        [folder / f"{name}.csv" for name in NAMES], rasters, output_dir=out / "clean",
        label_percentile=100, diameter_scale=3, max_diameter=25, workers=1,
    )  # fmt: skip
    assert set(images[0].df["label"]) == set(LABELS)
    assert list(dict.fromkeys(report["raster"])) == NAMES
    assert set(pd.read_csv(out / "clean" / f"{NAMES[0]}.csv")["label"]) == set(LABELS)
    blocks = splits.ground_blocks(
        rasters, split_by="raster", max_tile_size=128, block_size=None, test_proportion=0.2,
        validation_proportion=0.25, seed=0,
    )  # fmt: skip
    options = tiling.TilingOptions(evaluation_overlap=16, materialize=True)
    (made,) = tiling.make_tiles(images, blocks, [128], out / "tiles", options).values()
    chips = pd.read_csv(made / "tile.csv")
    assert all((made / name).is_file() for name in chips["tile_path"])
    assert {fileio.identifier_from_tilename(name) for name in chips["tile_path"]} == set(NAMES)
    utm = {"crs": rasterio.CRS.from_epsg(32633).to_wkt(), "transform": (2, 0, 0, 0, -2, 0)}
    for image in images:
        placed = SimpleNamespace(
            path=image.raster.path, width=384, height=384, crs=utm["crs"],
            original=None, pixel_size_xy=(1.0, 1.0), to_map=lambda xy: xy * [2, -2],
        )  # fmt: skip
        for suffix in fileio.ANNOTATION_SUFFIXES:
            path = out / "maps" / f"{image.image_identifier}{suffix}"
            df = image.df[~image.df["label"].str.contains("\n")] if suffix == ".txt" else image.df
            fileio.write_annotations(path, df, placed)
            if set("\n;") & set(path.name) and suffix in (".gpkg", ".geojson"):
                with pytest.raises(InputError, match="would be taken for"):
                    fileio.read_annotation_file(path, placed)
                continue
            read = fileio.read_annotation_file(path, placed, text_columns=["label"])
            assert sorted(read.df["label"]) == sorted(df["label"]), suffix
            (out / "maps" / "classes.txt").unlink(missing_ok=True)
    errors = pd.DataFrame({name: [0] for name in atlas.COLUMNS}).assign(
        kind=pd.Categorical(["missed"], atlas.KINDS), label="a", true_label="a", xmax=5, ymax=5
    )
    for image in images:
        mine = errors.assign(raster=image.image_identifier)
        atlas.write_atlas(mine, {r.identifier: r for r in rasters}, out / "errors")
    assert {path.name for path in tmp_path.rglob("*") if path.parent in (tmp_path, out.parent)} == {
        "deep", "run",
    }  # fmt: skip
    assert not [path for path in (folder.parent).iterdir() if path.name == "x"]


def test_names_of_runs_and_of_files_stay_in_their_place(badly_named, tmp_path):
    notebook = json.loads((PROJECT / "main.ipynb").read_text())
    cell = next(c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", []))
    values = {}
    for node in ast.parse("".join(cell["source"])).body:
        values[node.targets[0].id] = ast.literal_eval(node.value)
    for name in ("../../x", "..", "/tmp/x", "a/b", "a\\b", "", "-x", "x\n", ".x"):
        with pytest.raises(InputError, match="RUN_NAME"):
            RunParameters.from_notebook(values | {"RUN_NAME": name})
    with pytest.raises(InputError, match=r"IMAGE_FILENAMES must have stems of at most 200 bytes"):
        RunParameters.from_notebook(
            values | {"IMAGE_FILENAMES": ["\u00fc" * 101 + ".tif"], "DF_FILENAMES": ["a.csv"]}
        )
    with pytest.raises(InputError, match="would be taken for"):
        fileio.write_annotations(tmp_path / "a\nb" / "x.gpkg", TABLE, PLACE)
    assert not list(tmp_path.rglob("*.gpkg"))
    with pytest.raises(InputError, match="cannot be written: File name too long; choose another"):
        fileio.write_text(tmp_path / ("n" * 256), "x")
    long = fileio.write_text(tmp_path / ("n" * 255), "x")
    assert long.read_text() == "x"


# -- bombs --------------------------------------------------------------------------------------


def tiff(path, width, height, *, tile=None, rows=2**32 - 1, samples=1, compression=1, blocks=1):
    """Write a TIFF of 100 KB whose header declares whatever it likes."""
    shape = [(322, tile), (323, tile)] if tile else [(278, rows)]
    places, sizes = (324, 325) if tile else (273, 279)
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, compression),
               (262, 3, 1, 1), (277, 3, 1, samples), (places, 4, blocks, 300),
               (sizes, 4, blocks, 90_000)]  # fmt: skip
    entries += [(tag, 4, 1, value) for tag, value in shape]
    body = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    path.write_bytes((head + body + bytes(4)).ljust(100_000, b"\0"))
    return path


SIDE = 2**31 - 1
MOST_MB = 400  # that a bomb may cost, beside what the modules take; a block of 16k px is 268

MEASURED = """
    import json, os, resource, signal, sys, tempfile
    from pathlib import Path
    from types import SimpleNamespace
    import psutil
    import annotations, fileio, splits, tiling
    from ImageData import Window
    from ModelConfig import RunParameters

    def look(path):
        raster = fileio.read_raster(path)
        raster.read(Window(raster.width - 256, raster.height - 256, 256, 256))

    def cut(path):
        splits.ground_blocks(
            [fileio.read_raster(path)], split_by="block", max_tile_size=256, block_size=None,
            test_proportion=0.2, validation_proportion=0.25, seed=0)

    def survey(path):
        raster = fileio.read_raster(path)
        fileio.raster_fingerprint(raster)
        fileio.check_layout([raster], repair=False, cache_dir=tempfile.mkdtemp())
        tiling.counted_share(raster, seconds=0.1)

    def annotate(path):
        raster = SimpleNamespace(
            path=Path("huge.tif"), identifier="huge", crs=None, width=2**31 - 1, height=2**31 - 1)
        fileio.read_annotation_file(Path(path), raster)

    def configure(path):
        RunParameters.from_files(Path("main.ipynb"), Path(path))

    def measured(action, path):
        own = psutil.Process().memory_info()
        resource.setrlimit(resource.RLIMIT_AS, (own.vms + 2**31,) * 2)  # what is declared is more
        signal.alarm(120)
        try:
            globals()[action](path)
            said = "fine"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return said[:500], (peak - own.rss) / 1e6

    for line in sys.stdin:
        action, path = json.loads(line)
        read, write = os.pipe()
        if not (pid := os.fork()):
            os.write(write, json.dumps(measured(action, path)).encode())
            os._exit(0)
        os.close(write)
        answer = os.fdopen(read).read() or json.dumps(["died", 0])
        os.waitpid(pid, 0)
        print(answer, flush=True)
"""


def write_bombs(folder):
    """Return what is to be done with which file, and what it must say (None: it works)."""
    rows = {"rows": 1, "blocks": SIDE}
    png = b"IHDR" + struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    png = struct.pack(">I", 13) + png + struct.pack(">I", zlib.crc32(png))
    (folder / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png)
    (folder / "itself.vrt").write_text(
        f'<VRTDataset rasterXSize="{SIDE}" rasterYSize="{SIDE}"><VRTRasterBand dataType="Byte" '
        'band="1"><SimpleSource><SourceFilename relativeToVRT="1">itself.vrt</SourceFilename>'
        "<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    with rasterio.open(
        folder / "sparse.tif", "w", driver="GTiff", width=2**20, height=2**20, count=1,
        dtype="uint8", tiled=True, blockxsize=16384, blockysize=16384, sparse_ok=True,
    ):  # fmt: skip
        pass
    strip = tiff(folder / "strip.tif", SIDE, SIDE)
    bombs = [
        ("look", strip, "write it in tiles"),
        ("cut", folder / "itself.vrt", "set BLOCK_SIZE to"),
        ("look", tiff(folder / "zip.tif", SIDE, SIDE, compression=8), "write it in tiles"),
        ("look", tiff(folder / "rows.tif", SIDE, SIDE, **rows), "write it in tiles"),
        ("look", tiff(folder / "tile.tif", SIDE, SIDE, tile=2**30, blocks=4), "write it in tiles"),
        ("look", tiff(folder / "tiles.tif", SIDE, SIDE, tile=256, blocks=2**31), "is not a raster"),
        ("look", tiff(folder / "bands.tif", 999, 999, samples=65535), "at most 1024"),
        ("look", folder / "huge.png", "is not a raster"),
        ("look", folder / "itself.vrt", "Recursion"),
        ("look", folder / "sparse.tif", None),
        ("survey", folder / "sparse.tif", None),
    ]  # fmt: skip
    coco = {"images": [{"id": 1, "file_name": "huge.tif"}], "categories": [{"id": 1, "name": "a"}]}
    masks = [[0, 2**62 - 1], [2**62, 2**62], "o" * 100_000, [-1, 5], [0, 10, 2**61, 10]]
    coco["annotations"] = [
        {"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5],
         "segmentation": {"counts": counts, "size": [SIDE, SIDE]}} for counts in masks
    ]  # fmt: skip
    aliases = "a0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 20)
    )
    texts = {
        "masks.json": (json.dumps(coco), None),
        "deep.json": ("[" * 200_000, "recursion depth"),
        "deep.geojson": (
            '{"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": '
            + '{"type": "GeometryCollection", "geometries": [' * 50_000, "cannot be read"),
        "deep.xml": ("<annotation>" * 100_000, "cannot be read as Pascal VOC"),
        "line.csv": ("pixel_x,pixel_y,diameter,label\n1,2,3,\"" + "x" * 50_000_000, "not a CSV"),
    }  # fmt: skip
    for name, (text, said) in texts.items():
        (folder / name).write_text(text)
        bombs.append(("annotate", folder / name, said))
    for name, names in (("list", "[*a19]"), ("text", "*a19")):
        (folder / name).mkdir()
        (folder / name / "data.yaml").write_text(f"{aliases}names: {names}\n")
        (folder / name / "huge.txt").write_text("0 0.5 0.5 0.1 0.1\n")
        bombs.append(("annotate", folder / name / "huge.txt", "names must be texts"))
    for name, value in (
        ("type", "*a19"),
        ("unknown", "1\nNO_PARAMETER: *a19"),
        ("any", "{x: *a19}"),
    ):
        parameter = {"type": "IMAGE_FILENAMES", "unknown": "SEED", "any": "MODEL_OPTIONS"}[name]
        (folder / f"{name}.yaml").write_text(f"{aliases}{parameter}: {value}\n")
        said = {"type": "valid string", "unknown": "unknown parameter", "any": "MODEL_OPTIONS"}[
            name
        ]
        bombs.append(("configure", folder / f"{name}.yaml", said))
    return bombs


def test_bombs_cost_no_memory_and_end_with_a_clear_error(tmp_path):
    bombs = write_bombs(tmp_path)
    process = start(MEASURED, stdin=subprocess.PIPE, cwd=PROJECT)
    lines = "".join(json.dumps([action, str(path)]) + "\n" for action, path, _ in bombs)
    try:
        output, errors = process.communicate(lines, timeout=500)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors
    for (action, path, expected), line in zip(bombs, output.splitlines(), strict=True):
        said, megabytes = json.loads(line)
        place = f"{action} {path.parent.name}/{path.name}: {said}, {megabytes:.0f} MB"
        assert megabytes < MOST_MB, place
        if expected is None:
            assert said == "fine", place
        else:
            assert said.startswith("InputError: "), place
            assert expected in said, place


# -- full disks ---------------------------------------------------------------------------------


TABLE = pd.DataFrame(np.random.default_rng(0).uniform(0, 90, (400, 2)), columns=["xmin", "ymin"])
TABLE = TABLE.assign(xmax=TABLE["xmin"] + 2, ymax=TABLE["ymin"] + 2, label="a", score=0.5)
PIXELS = np.random.default_rng(0).integers(0, 255, (1, 300, 300), dtype="uint8")
PLACE = SimpleNamespace(
    path=Path("r.tif"), crs=None, width=100, height=100, original=None, pixel_size_xy=(1.0, 1.0)
)


def write_raster(path):
    with fileio.create_raster(path, width=300, height=300, count=1, dtype="uint8") as dst:
        dst.write(PIXELS)


def write_masked(path):
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        fileio.create_raster(path, width=300, height=300, count=1, dtype="uint8") as dst,
    ):
        dst.write(PIXELS)
        dst.write_mask(PIXELS[0] > 3)


def write_part(path):
    found = predict.Detections(np.ones((999, 4)), np.ones(999), np.ones(999))
    strips.Part(found, 1, 1, 1, np.empty((0, 4))).write(path)


def write_state(path):
    with fileio.atomic_path(path) as temporary:
        torch.save({"a": torch.arange(9999.0)}, temporary)


def write_rewritten(path):
    source = path.with_name("source.png")
    if not source.exists():
        Image.fromarray(PIXELS[0]).save(source)
    fileio.rewrite(source, path)


WRITERS = {
    "raster.tif": write_raster, "mask.tif": write_masked, "copy.tif": write_rewritten,
    "part.npz": write_part, "state.ckpt": write_state,
    "table.csv": lambda path: fileio.write_table(path, TABLE),
    "table.parquet": lambda path: fileio.write_table(path, TABLE),
    "plain.json": lambda path: fileio.write_json(path, TABLE.to_numpy()),
    **{
        f"objects{suffix}": lambda path: fileio.write_annotations(path, TABLE, PLACE)
        for suffix in fileio.ANNOTATION_SUFFIXES
    },
}  # fmt: skip


def limited(write, path, limit):
    """Write in a child whose files may grow up to a limit; return what it said, "" if nothing."""
    read, answer = os.pipe()
    if not (pid := os.fork()):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        said = ""
        try:
            write(path)
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(answer, said.encode())
        os._exit(0)
    os.close(answer)
    with os.fdopen(read) as file:
        said = file.read()
    return said if os.waitpid(pid, 0)[1] == 0 else "it died"


LIMITED = """
    import json, sys
    from pathlib import Path
    from test_reliability import WRITERS, limited

    for line in sys.stdin:
        name, path, limit = json.loads(line)
        print(json.dumps(limited(WRITERS[name], Path(path), limit)), flush=True)
"""


@pytest.fixture(scope="module")
def ask():
    """A function that lets a child of a process that itself writes nothing write a file."""
    process = start(LIMITED, stdin=subprocess.PIPE, stderr=None)

    def ask(name, path, limit=resource.RLIM_INFINITY):
        process.stdin.write(json.dumps([name, str(path), int(limit)]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    try:
        yield ask
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_does_not_fit_never_appears_and_the_old_one_stays(name, tmp_path, ask):
    path = tmp_path / "out" / name
    path.parent.mkdir()
    assert ask(name, path) == ""
    size, before = path.stat().st_size, path.read_bytes()
    names = sorted(p.name for p in path.parent.iterdir())
    rng = np.random.default_rng(0)
    for limit in (size - 1, size - 8, *rng.integers(64, size - 8, 4)):
        said = ask(name, path, limit)
        assert said.startswith("FullDiskError: "), f"{limit} of {size} bytes: {said or 'fine'}"
        assert "cannot be written: files may not grow that large (ulimit -f)" in said
        assert "run the same again" in said
        assert path.read_bytes() == before
        assert sorted(p.name for p in path.parent.iterdir()) == names
    assert ask(name, path) == ""


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 8 MB."""
    if not AS_ROOT:
        pytest.skip("only root can mount a small disk")
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder, leave):
    """Fill a disk but for some bytes; return the file that does."""
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(max(shutil.disk_usage(folder).free - leave, 0)))
    return ballast


def full_stages(prepared, small_sample):
    """Return what writes to a folder, stage by stage, with the bytes that it is left at first."""

    def clean(folder):
        annotations.clean_annotations(
            small_sample.tables, small_sample.rasters, output_dir=folder / "clean",
            **small_sample.cleaning,
        )  # fmt: skip

    def tile(folder):
        options = tiling.TilingOptions(evaluation_overlap=16, materialize=True)
        tiling.make_tiles(prepared.images, prepared.blocks, [128], folder / "tiles", options)

    def search(folder):
        gridsearch.run_search(prepared.data, SPACE, conf(), folder / "run")

    def repair(folder):
        raster = fileio.read_raster(small_sample.folder / "slow.png")
        fileio.check_layout([raster], repair=True, cache_dir=folder / "cache")

    def explain(folder):
        errors = pd.DataFrame({name: np.zeros(5000) for name in atlas.COLUMNS}).assign(
            kind=pd.Categorical(["missed"] * 5000, atlas.KINDS), label="a", raster="one", xmax=5.0
        )
        rasters = {r.identifier: r for r in small_sample.rasters}
        atlas.write_atlas(errors, rasters, folder / "errors")

    return {"clean": clean, "tile": tile, "search": search, "repair": repair, "explain": explain}


@pytest.mark.parametrize("stage", ["clean", "tile", "search", "repair", "explain"])
def test_a_stage_on_a_full_disk_says_so_and_completes_with_room(
    stage, small_disk, prepared, small_sample, monkeypatch, tmp_path
):
    monkeypatch.setattr(layout, "WORTH_IT", 0.0)
    monkeypatch.setattr(layout, "SAMPLE_SIDE", 512)
    monkeypatch.setattr(gridsearch, "train_iteration", fake_training())
    pixels = np.random.default_rng(0).integers(0, 255, (1200, 1300), dtype="uint8")
    Image.fromarray(pixels).save(small_sample.folder / "slow.png")
    run = full_stages(prepared, small_sample)[stage]
    run(tmp_path / "roomy")
    expected = kill.snapshot(tmp_path / "roomy")
    for leave in (0, 4096, 20_000):
        ballast = fill(small_disk, leave)
        with pytest.raises(
            fileio.FullDiskError, match=r"cannot be written: its disk is full, 0\.\d"
        ):
            run(small_disk)
        ballast.unlink()
    run(small_disk)
    if stage != "search":  # whose leaderboard names its folder
        assert kill.snapshot(small_disk) == expected
    else:
        board = pd.read_csv(small_disk / "run" / "leaderboard.csv")
        assert board["state"].tolist() == ["complete"] * 4


def test_a_record_on_a_full_disk_keeps_whole_lines(small_disk):
    record = DefaultModelLogger(small_disk / "record")
    record.log_metrics({"loss": 1.0}, step=0)
    ballast = fill(small_disk, 0)

    def log_on():
        for step in range(1, 2000):
            record.log_metrics({"loss": 1.0}, step=step)

    with pytest.raises(fileio.FullDiskError, match="is full"):
        log_on()
    ballast.unlink()
    text = (small_disk / "record" / "metrics.csv").read_text()
    assert text.endswith("\n")
    record.log_metrics({"loss": 2.0}, step=9999)
    df = pd.read_csv(small_disk / "record" / "metrics.csv")
    assert df["step"].iloc[-1] == 9999
    assert (df.iloc[:-1]["loss"] == 1.0).all()


def test_a_log_file_on_a_full_disk_is_told_of_once(small_disk, capsys):
    log = configure_logger(small_disk / "application.log")
    try:
        log.info("first")
        ballast = fill(small_disk, 0)
        for _ in range(200):
            log.info("x" * 100)
        ballast.unlink()
        log.info("last")
    finally:
        configure_logger()
    assert capsys.readouterr().err.count("lacks lines: [Errno 28]") == 1
    lines = (small_disk / "application.log").read_text().splitlines()
    assert lines[0].endswith("first")
    assert lines[-1].endswith("last")


def test_whether_a_disk_is_full_is_tried(small_disk, tmp_path):
    fill(small_disk, 4096)
    assert find_full(small_disk / "probe") == errno.ENOSPC
    assert find_full(tmp_path / "probe") is None
