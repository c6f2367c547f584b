"""What the benchmarks claim is judged right; their figures are not tested."""

import importlib.util
import sys

import pytest
from conftest import PROJECT

FOLDER = PROJECT / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _path():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def common(_path):
    return _load("common")


def _load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def row(way, size, runs, added=10.0, peak=100.0):
    return {
        "way": way, "size": size, "runs": runs, "seconds": sorted(runs)[len(runs) // 2],
        "added_mb": added, "peak_mb": peak, "ratio": None, "against": None, "result": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("speed", "memory", "reached"),
    [(10, 0.1, True), (10.5, 0.1, False), (10, 0.05, False), (10, None, True)],
)
def test_an_aim_is_judged_at_the_largest_common_size_by_turns(common, speed, memory, reached):
    rows = [
        row("ours", 1, [9.0]), row("ours", 2, [1.0, 2.0, 3.0]), row("ours", 4, [9.0]),
        row("peer", 1, [1.0]), row("peer", 2, [10.0, 20.0, 90.0], added=100.0),
    ]  # fmt: skip
    found = common.judge(common.Aim("ours", "peer", speed, memory), rows)
    assert (found["size"], found["reached"]) == (2, reached)
    assert found["found"].startswith("10 times as fast")
    assert ("0.1 of the memory" in found["found"]) == (memory is not None)


def test_an_aim_without_a_common_size_is_left_open(common):
    rows = [row("ours", 2, [1.0]), row("peer", 1, [1.0])]
    assert common.judge(common.Aim("ours", "peer", 2), rows) is None


@pytest.mark.parametrize(
    ("seconds", "peak", "reached"), [(4.0, 104.0, True), (4.4, 104.0, False), (4.0, 106.0, False)]
)
def test_growth_is_judged_between_the_two_largest_sides(common, seconds, peak, reached):
    rows = [row("index", 1, [9.0]), row("index", 2, [1.0]), row("index", 4, [seconds], peak=peak)]
    (found,) = common.judge_growth(rows)
    assert found["reached"] == reached


def test_a_way_that_ran_once_is_compared_with_the_median(common):
    assert common.ratio([8.0], [1.0, 2.0, 9.0]) == 4


def test_ways_that_do_the_same_must_agree(common, tmp_path, monkeypatch):
    results = {"a": 3, "b": 3, "c": 4}
    monkeypatch.setattr(
        common, "_run", lambda way, size, folder: common.Measurement(1.0, 1.0, 1.0, results[way])
    )
    ways = dict.fromkeys(results)
    for agree, fails in (((("a", "b"),), False), ((("a", "c"),), True)):
        stage = common.Stage("title", "px", (1,), (1,), None, ways, agree=agree)
        if fails:
            with pytest.raises(RuntimeError, match="differ"):
                common._take_turns(stage, list(ways), 1, tmp_path, 2)
        else:
            assert len(common._take_turns(stage, list(ways), 1, tmp_path, 2)) == 3


def test_the_report_names_what_was_missed_first(common, tmp_path):
    report = _load("report")
    aims = [
        {"what": what, "size": 2, "found": "", "wanted": "", "reached": what == "good"}
        for what in ("good", "bad")
    ]
    record = {
        "title": "Title", "size": "px", "memory": "added_mb", "script": "bench_x.py", "aims": aims,
        "machine": common.machine(),
        "rows": [row("ours", 1, [1.0]), row("ours", 2, [2.0]), row("peer", 2, [3.0])],
    }  # fmt: skip
    common.fileio.write_json(tmp_path / "clean.json", record)
    report.write_report(tmp_path, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert page.index("bad") < page.index("good")
    assert (tmp_path / "benchmarks_clean.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match="none of"):
        report.write_report(tmp_path / "nothing", tmp_path / "page.md")
