"""The review queue: decisions -> files -> the boxes that the next run reads."""

from __future__ import annotations

import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from test_explore import click, make_raster, send

import annotations
import fileio
import implot
import review
from ImageData import BOX_COLUMNS, InputError

CLEAN = [[10, 10, 30, 30, "a"], [100, 100, 140, 140, "b"], [200, 200, 220, 220, "a"],
         [300, 300, 330, 330, "b"]]  # fmt: skip


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def ground(tmp_path):
    """Return a raster, its cleaned annotations on disk, and a folder for a review."""
    raster = make_raster(tmp_path / "r.tif", 600, 500)
    clean = pd.DataFrame(CLEAN, columns=[*BOX_COLUMNS, "label"]).pipe(annotations.measure_bboxes)
    clean[BOX_COLUMNS] = clean[BOX_COLUMNS].astype(float)
    (tmp_path / "clean").mkdir()
    clean[fileio.PIXEL_COLUMNS].to_csv(tmp_path / "clean" / "r.csv", index=False)
    quarantine = pd.DataFrame(
        [["a", annotations.OVER_LEFT, -5, 50, 15, 70], ["a", "x not numeric", *[np.nan] * 4],
         ["b", annotations.CROWD, 400, 400, 450, 450]],
        columns=["label", "reason", *annotations.QUARANTINE_BOX_COLUMNS],
    )  # fmt: skip
    quarantine.to_csv(tmp_path / "clean" / "r_quarantine.csv", index=False)
    return tmp_path, raster


def item(kind, box=None, label=None, true=None, true_label=None, score=0.9):
    box = true if box is None else box
    true = [np.nan] * 4 if true is None else true
    columns = [
        "kind",
        "raster",
        "score",
        "label",
        *BOX_COLUMNS,
        "true_label",
        *review.TRUE_BOX_COLUMNS,
    ]
    return dict(zip(columns, [kind, "r", score, label, *box, true_label, *true], strict=True))


ITEMS = [
    item("missed", None, "a", CLEAN[0][:4], "a", np.nan),
    item("spurious", [400, 10, 420, 30], "a"),
    item("mislocalised", [110, 110, 150, 150], "a", CLEAN[1][:4], "b"),
    item("mislabelled", [201, 200, 221, 220], "b", CLEAN[2][:4], "a"),
    item("duplicate", [303, 300, 333, 330], "a", CLEAN[3][:4], "b"),
]


def open_review(ground, items=ITEMS, user="anna"):
    folder, raster = ground
    return review.Review(
        {"r": raster}, pd.DataFrame(items), folder / "review", folder / "clean", user
    )


def read(ground):
    """Read the annotation file as the next run does."""
    folder, raster = ground
    cleaned = annotations.preprocess_df(folder / "review" / "r.csv", raster, box_source="columns")
    boxes = cleaned.df[BOX_COLUMNS].round(6).to_numpy().tolist()
    return {(*box, label) for box, label in zip(boxes, cleaned.df["label"], strict=True)}


def sources(opened):
    table = opened.tables["r"]
    return dict(zip(table["xmin"], table["source"], strict=True))


UNTOUCHED = {(*map(float, row[:4]), row[4]) for row in CLEAN}


def test_before_any_decision_nothing_is_written(ground):
    opened = open_review(ground)
    opened.save()
    assert not (ground[0] / "review").exists()
    assert set(opened.tables["r"]["source"].head(4)) == {"original"}


def test_ground_under_real_objects_that_were_dropped_does_not_count_in_the_next_run(ground):
    folder, raster = ground
    open_review(ground).reject()
    (image,), _ = annotations.clean_annotations(
        [folder / "review" / "r.csv"], [raster], label_percentile=100, output_dir=folder / "next",
        workers=1, box_source="columns",
    )  # fmt: skip
    assert len(image.df) == len(CLEAN)
    ignored = sorted(shape.bounds for shape in image.raster.regions.ignored)
    assert ignored == [(-5, 50, 15, 70), (400, 400, 450, 450)]


ACCEPTED = [
    UNTOUCHED - {(10, 10, 30, 30, "a")},
    UNTOUCHED | {(400, 10, 420, 30, "a")},
    UNTOUCHED - {(100, 100, 140, 140, "b")} | {(110, 110, 150, 150, "b")},
    UNTOUCHED - {(200, 200, 220, 220, "a")} | {(200, 200, 220, 220, "b")},
    UNTOUCHED | {(303, 300, 333, 330, "a")},
]
RELABELLED = [
    UNTOUCHED - {(10, 10, 30, 30, "a")} | {(10, 10, 30, 30, "new")},
    UNTOUCHED | {(400, 10, 420, 30, "new")},
    UNTOUCHED - {(100, 100, 140, 140, "b")} | {(100, 100, 140, 140, "new")},
    UNTOUCHED - {(200, 200, 220, 220, "a")} | {(200, 200, 220, 220, "new")},
    UNTOUCHED | {(303, 300, 333, 330, "new")},
]
SOURCES = {
    "accept": [None, "added (spurious), ", "original; moved (mislocalised), ",
               "original; relabelled from a (mislabelled), ", "added (duplicate), "],
    "reject": ["original; confirmed (missed), ", None, "original; confirmed (mislocalised), ",
               "original; confirmed (mislabelled), ", None],
    "relabel": ["original; relabelled from a (missed), ",
                "added (spurious), relabelled from a, ",
                "original; relabelled from b (mislocalised), ",
                "original; relabelled from a (mislabelled), ",
                "added (duplicate), relabelled from a, "],
}  # fmt: skip


@pytest.mark.parametrize("number", range(5), ids=[row["kind"] for row in ITEMS])
@pytest.mark.parametrize("decision", SOURCES)
def test_the_next_run_reads_what_was_decided(ground, number, decision):
    opened = open_review(ground, ITEMS[number : number + 1])
    getattr(opened, decision)(*(["new"] if decision == "relabel" else []))
    expected = {"accept": ACCEPTED, "reject": [UNTOUCHED] * 5, "relabel": RELABELLED}
    assert read(ground) == expected[decision][number]
    assert opened.current is None
    changed = set(opened.tables["r"]["source"]) - {"original"}
    changed = {source for source in changed if "does not count" not in source}
    start = SOURCES[decision][number]
    assert len(changed) == (start is not None)
    for source in changed:
        assert source.startswith(f"{start}anna 20")
    opened.undo()
    assert read(ground) == UNTOUCHED
    assert opened.current["kind"] == ITEMS[number]["kind"]
    assert not len(opened.journal)


def test_labels_that_look_like_numbers_stay_what_they_are(ground):
    folder, _ = ground
    table = folder / "clean" / "r.csv"
    table.write_text(table.read_text().replace(",a,", ",01,").replace(",b,", ",NA,"))
    quarantine = folder / "clean" / "r_quarantine.csv"
    quarantine.write_text(quarantine.read_text().replace("\na,", "\n01,").replace("\nb,", "\nNA,"))
    items = [item("mislabelled", CLEAN[0][:4], 2, CLEAN[0][:4], "01"),
             item("missed", None, "NA", CLEAN[1][:4], "NA", np.nan)]  # fmt: skip
    opened = open_review(ground, items)
    opened.accept()
    opened.reject()
    again = open_review(ground, items)
    assert again.current is None
    assert again.labels == ["01", "2", "NA"]
    assert sorted(again.tables["r"]["label"]) == ["01", "01", "2", "NA", "NA", "NA"]


def test_a_review_goes_on_where_it_was(ground):
    opened = open_review(ground)
    opened.skip()
    opened.accept()  # spurious
    opened.reject()  # mislocalised
    assert [opened.items["kind"][i] for i in opened.pending] == [
        "mislabelled",
        "duplicate",
        "missed",
    ]
    again = open_review(ground, user="bert")
    assert [again.items["kind"][i] for i in again.pending] == ["missed", "mislabelled", "duplicate"]
    pd.testing.assert_frame_equal(again.tables["r"], opened.tables["r"])
    again.accept()
    assert again.journal["user"].tolist() == ["anna", "anna", "bert"]
    assert again.journal[["kind", "decision"]].to_numpy().tolist()[-1] == ["missed", "accept"]
    removed = again.journal.iloc[-1]
    assert removed[review.TRUE_BOX_COLUMNS].tolist() == CLEAN[0][:4]  # nothing is lost
    again.undo()
    again.undo()
    assert again.current["kind"] == "mislocalised"
    assert read(ground) == ACCEPTED[1]


def test_nothing_that_others_decide_meanwhile_is_lost(ground):
    one, other = open_review(ground, user="anna"), open_review(ground, user="bert")
    one.accept()  # missed
    one.accept()  # spurious
    with pytest.raises(InputError, match="anna decided here meanwhile, 2 decisions"):
        other.reject()
    assert other.current["kind"] == "mislocalised"
    other.reject()
    with pytest.raises(InputError, match="bert decided here meanwhile"):
        one.undo()
    assert one.journal["user"].tolist() == ["anna", "anna", "bert"]
    one.undo()
    with pytest.raises(InputError, match="2 decisions are known"):
        other.add("r", (250, 250), (253, 254), "new")
    assert other.current["kind"] == "mislabelled"  # first what was to come, then what is open again
    assert [other.items["kind"][i] for i in other.pending][-1] == "mislocalised"
    assert read(ground) == ACCEPTED[0] | {(400, 10, 420, 30, "a")}


def test_a_decision_that_was_only_journalled_is_carried_out_at_the_next_opening(ground):
    folder, _ = ground
    before = (folder / "clean" / "r.csv").read_bytes()
    opened = open_review(ground)
    opened.accept()
    (folder / "review" / "r.csv").write_bytes(before)  # killed between the two files
    open_review(ground)
    assert read(ground) == ACCEPTED[0]
    assert (folder / "clean" / "r.csv").read_bytes() == before


def test_a_review_of_annotations_that_changed_since_says_what_to_do(ground):
    folder, _ = ground
    open_review(ground).accept()
    table = folder / "clean" / "r.csv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join([lines[0], *lines[2:]]))
    with pytest.raises(InputError, match=r"changed since; move .*review away"):
        open_review(ground)


def test_missing_objects_are_added_by_centre_and_rim(ground):
    opened = open_review(ground)
    opened.add("r", (250, 250), (253, 254), "new")
    assert read(ground) == UNTOUCHED | {(245, 245, 255, 255, "new")}
    assert sources(opened)[245].startswith("added by hand, anna 20")
    assert opened.current["kind"] == "missed"  # nothing else is decided by it
    for center, rim, label in (
        ((250, 250), (250, 250), "new"), ((600, 250), (590, 250), "new"),
        ((250, -0.1), (250, 9), "new"), ((250, 250), (253, 254), " "),
    ):  # fmt: skip
        with pytest.raises(InputError):
            opened.add("r", center, rim, label)
    opened.undo()
    assert read(ground) == UNTOUCHED


@pytest.mark.parametrize("decision", ["accept", "reject", "relabel"])
@pytest.mark.parametrize("kind", ["missed", "mislocalised", "mislabelled"])
def test_an_object_that_a_block_of_ground_cuts_is_found(ground, kind, decision):
    cut = [100, 120, 140, 140]  # half of it lies on the block
    items = [item(kind, [105, 118, 139, 139], "a", cut, "b")]
    opened = open_review(ground, items)
    assert opened.current is not None
    getattr(opened, decision)(*(["c"] if decision == "relabel" else []))
    assert len(opened.journal) == 1
    again = open_review(ground, items)
    assert again.current is None
    whole = (100, 100, 140, 140)
    expected = {
        ("missed", "accept"): set(), ("mislabelled", "accept"): {(*whole, "a")},
        ("mislocalised", "accept"): {(105, 118, 139, 139, "b")},
    }.get((kind, decision), {(*whole, "c" if decision == "relabel" else "b")})  # fmt: skip
    assert read(ground) == UNTOUCHED - {(*whole, "b")} | expected


def test_what_cannot_be_carried_out_is_not_journalled(ground):
    opened = open_review(ground, ITEMS[:1])
    opened.tables["r"] = opened.tables["r"].iloc[1:]
    with pytest.raises(InputError, match=r"no annotation at \[10.0, 10.0, 30.0, 30.0\] of r any"):
        opened.reject()
    assert not len(opened.journal)
    assert not (ground[0] / "review").exists()


def test_what_reaches_over_the_edge_is_cut_off(ground):
    opened = open_review(ground)
    opened.add("r", (597, 4), (592, 4), "new")
    assert read(ground) == UNTOUCHED | {(592, 0, 600, 9, "new")}


def test_one_kind_or_raster_can_be_chosen(ground):
    opened = open_review(ground)
    opened.choose(kind="mislabelled")
    assert opened.current["kind"] == "mislabelled"
    assert (len(opened.pending), opened.remaining) == (1, 5)
    opened.accept()
    assert opened.current is None
    assert opened.count("kind").to_dict() == dict.fromkeys(
        ("missed", "spurious", "mislocalised", "duplicate"), 1
    )
    assert opened.count("raster").empty  # of this kind
    with pytest.raises(InputError, match="nothing is left"):
        opened.skip()
    opened.undo()
    assert opened.current["kind"] == "mislabelled"
    opened.choose("spurious", "r")
    opened.accept()
    opened.choose("missed")
    opened.undo()  # of another kind: all are asked about again
    assert (opened.kind, opened.current["kind"], len(opened.pending)) == (None, "spurious", 5)
    with pytest.raises(InputError, match="kind must be one of"):
        opened.choose("odd")
    with pytest.raises(InputError, match=r"raster must be one of \['r'\] or None, got 's'"):
        opened.choose(raster="s")


def test_items_on_objects_that_are_gone_are_passed_over(ground):
    twice = [ITEMS[0], item("mislabelled", CLEAN[0][:4], "b", CLEAN[0][:4], "a"), ITEMS[1]]
    opened = open_review(ground, twice)
    opened.accept()
    assert opened.current["kind"] == "spurious"
    opened.undo()
    opened.reject()
    assert opened.current["kind"] == "mislabelled"


def test_an_empty_queue_and_strangers_are_told(ground):
    folder, raster = ground
    opened = open_review(ground, ITEMS[:1])
    opened.accept()
    with pytest.raises(InputError, match="nothing is left"):
        opened.accept()
    with pytest.raises(InputError, match=r"items lie on \['r'\], got the rasters \['s'\]"):
        review.Review({"s": raster}, pd.DataFrame(ITEMS), folder / "other")
    with pytest.raises(InputError, match="got \\['odd'\\]"):
        review.Review({"r": raster}, pd.DataFrame([item("odd", [0, 0, 1, 1])]), folder / "other")


def test_detections_that_are_not_sure_and_lie_on_nothing_come_best_first():
    boxes = [[0, 0, 10, 10], [50, 50, 60, 60], [80, 80, 90, 90], [20, 0, 30, 10], [40, 0, 50, 10]]
    found = pd.DataFrame(boxes, columns=BOX_COLUMNS).assign(
        raster="r", label="a", score=[0.4, 0.35, 0.45, 0.1, 0.7], found=[-1, -1, -1, -1, -1]
    )
    objects = pd.DataFrame([[2, 0, 12, 10]], columns=BOX_COLUMNS).assign(raster="r")
    unsure = review.find_unsure(found, objects, 0.5)
    assert unsure["score"].tolist() == [0.45, 0.35]
    assert set(unsure["kind"]) == {"unsure"}
    assert review.find_unsure(found, objects, 0.5, most=1)["score"].tolist() == [0.45]
    assert len(review.find_unsure(found, objects, 0.5, near=0.9)) == 3
    none = review.find_unsure(found.assign(found=-2), objects, 0.5)
    assert none.empty


def test_a_raster_without_annotations_gets_them_by_review(tmp_path):
    raster = make_raster(tmp_path / "r.tif", 600, 500)
    found = pd.DataFrame([[50, 50, 60, 60], [80, 80, 90, 90]], columns=BOX_COLUMNS).assign(
        raster="r", label="a", score=[0.6, 0.9]
    )
    items = review.find_unsure(found, found[:0], 1.0, near=1.0)
    opened = review.Review({"r": raster}, items, tmp_path / "review", user="anna")
    opened.accept()
    opened.reject()
    df = annotations.read_annotations(
        tmp_path / "review" / "r.csv", raster, box_source="columns"
    ).df
    assert df[[*BOX_COLUMNS, "label"]].to_numpy().tolist() == [[80, 80, 90, 90, "a"]]


# -- at the desk ----------------------------------------------------------------------------------


def open_desk(ground, items=ITEMS):
    folder, raster = ground
    opened = implot.review(
        {"r": raster}, pd.DataFrame(items), folder / "review", folder / "clean", user="anna"
    )
    (number,) = plt.get_fignums()
    return opened, plt.figure(number).axes[0].desk


def press(desk, keys):
    for key in keys:
        desk.explorer.settle()  # what is asked is drawn
        send(desk.explorer, "key_press_event", key=key)


def test_keys_and_clicks_decide(ground):
    opened, desk = open_desk(ground)
    assert desk.message == (
        "The model found no a here. Is the annotation wrong? y: Yes, remove it. x: No, keep it. "
        "(missed; 0 decided, 5 to go)"
    )
    x0, y0, x1, y1 = desk.explorer.view
    assert ((x0 + x1) / 2, (y0 + y1) / 2) == (20, 20)
    for key in "np":  # the queue alone goes on
        press(desk, key)
        assert desk.explorer.view == (x0, y0, x1, y1)
    press(desk, "yxs2u")
    assert opened.journal[["kind", "decision"]].to_numpy().tolist() == [
        ["missed", "accept"], ["spurious", "reject"],
    ]  # fmt: skip
    desk.label = "c"
    press(desk, "a")
    assert desk.message.startswith("Click the centre of the c")
    desk.explorer.look_at(250, 250, 60, 60)
    desk.explorer.settle()
    view = desk.explorer.view
    click(desk.explorer, (250, 250))
    assert desk.explorer.view == view
    click(desk.explorer, (250, 260))
    assert desk.message.startswith("The c is added")
    assert desk.explorer.view == view  # where it can be seen
    (added,) = read(ground) - UNTOUCHED
    np.testing.assert_allclose(added[:4], [240, 240, 260, 260], atol=0.5)
    assert added[4] == "c"
    assert len(desk.explorer.truth.df) == 4 + 2  # three and the new one, and what does not count


def test_nothing_is_answered_before_it_was_drawn(ground):
    opened, desk = open_desk(ground)
    for key in "yyxs12":
        send(desk.explorer, "key_press_event", key=key)
    assert opened.journal["kind"].tolist() == ["missed"]
    assert opened.pending == [1, 2, 3, 4]
    press(desk, "y")
    assert opened.journal["kind"].tolist() == ["missed", "spurious"]
    send(desk.explorer, "key_press_event", key="u")  # needs no looking
    assert opened.journal["kind"].tolist() == ["missed"]


def test_an_addition_is_left_step_by_step_and_by_every_decision(ground):
    opened, desk = open_desk(ground)
    press(desk, "x")
    press(desk, "a")
    click(desk.explorer, (410, 40))
    assert desk.message.startswith("Click the rim")
    press(desk, "u")
    assert desk.message.startswith("Click the centre")
    press(desk, "u")
    assert "y: Yes" in desk.message
    assert len(opened.journal) == 1  # an earlier decision stays
    press(desk, "a")
    click(desk.explorer, (410, 40))
    press(desk, "yxs2")
    assert desk.message.startswith("Click the rim of the b")  # which 2 has chosen
    assert len(opened.journal) == 1
    press(desk, ["escape"])
    assert "y: Yes" in desk.message
    click(desk.explorer, (410, 50))
    assert desk.label == "a"  # of the item
    desk.explorer.look_at(20, 40, 60, 60)
    press(desk, "a")
    click(desk.explorer, (-3, 50))
    assert desk.message.startswith("the centre must be on the raster of 600 x 500 px, got -3.0")
    assert desk.message.endswith("a: not now)")
    click(desk.explorer, (30, 40))
    click(desk.explorer, (30.1, 40))
    assert desk.message.startswith("That is the centre itself. Click the rim")
    click(desk.explorer, (35, 40))
    assert opened.journal["decision"].tolist() == ["reject", "add"]
    press(desk, "y")  # back to the question, which is not in view
    assert "y: Yes" in desk.message
    assert len(opened.journal) == 2
    press(desk, "y")
    assert opened.journal["decision"].tolist() == ["reject", "add", "accept"]


def test_what_others_decide_meanwhile_is_looked_at_first(ground):
    opened, desk = open_desk(ground)
    opened.accept()  # in a cell
    press(desk, "y")
    assert opened.journal["kind"].tolist() == ["missed"]
    assert desk.message.startswith("Is there a a that is not annotated?")
    other = open_review(ground, user="bert")
    other.accept()
    press(desk, "y")
    assert desk.message.startswith("bert decided here meanwhile")
    assert "Is the b where the model put it" in desk.message
    assert opened.journal["user"].tolist() == ["anna", "bert"]


def test_thousands_of_items_that_went_stale_are_passed_over_in_a_moment(ground):
    stale = [item("mislabelled", [i, 0, i + 9, 9], "b", [i, 380, i + 9, 389], "a")
             for i in range(500)] * 4  # fmt: skip
    start = time.thread_time()
    opened = open_review(ground, [*stale, ITEMS[1]])
    assert opened.current["kind"] == "spurious"
    assert time.thread_time() - start < 5


def test_only_the_item_and_what_is_sure_is_drawn(ground):
    folder, raster = ground
    sure = pd.DataFrame([item("", [400, 10, 420, 30], "a"), item("", [9, 9, 31, 31], "a")])
    items = pd.DataFrame([ITEMS[1], item("unsure", [50, 60, 70, 80], "a", score=0.1)])
    opened = implot.review({"r": raster}, items, folder / "review", detections=sure, user="anna")
    desk = plt.figure(plt.get_fignums()[0]).axes[0].desk
    assert len(desk.explorer.detections.df) == 2
    opened.skip()
    desk.refresh()
    assert desk.explorer.detections.scores.tolist() == [0.9, 0.9, 0.1]


def test_what_cannot_be_decided_is_said(ground):
    opened, desk = open_desk(ground, ITEMS[:1])
    desk.act("relabel", " ")
    assert desk.message.startswith("a label must be a text")
    desk.act("accept")
    assert desk.message.startswith("All is decided: 1 decisions")
    desk.act("accept")
    assert desk.message.startswith("nothing is left to decide")
    assert len(opened.journal) == 1


def test_the_desk_has_buttons(ground, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    before = plt.get_backend()
    plt.switch_backend("module://ipympl.backend_nbagg")
    try:
        opened, desk = open_desk(ground)
        (whole, *_), row = shown[0].children[0].children, shown[0].children[2]
        assert whole.description == "All"
        accept, reject, skip, undo, label, relabel, add, kind = row.children
        assert accept.disabled  # until it is drawn

        def press(button):
            desk.explorer.figure.canvas.draw()
            assert not button.disabled
            button.click()

        assert (accept.description, reject.description) == ("Yes, remove it (y)", "No, keep it (x)")
        assert kind.options[:2] == (("all kinds (5)", ""), ("missed (1)", "missed"))
        press(reject)
        assert (accept.description, reject.description) == (
            "Yes, add it (y)", "No, leave it out (x)",
        )  # fmt: skip
        assert kind.options[0][0] == "all kinds (4)"
        label.value = "brand new"
        press(relabel)
        assert "brand new" in label.options
        assert label.value == "b"  # of the next item
        toggles = shown[0].children[1].children
        assert [toggle.description for toggle in toggles] == ["a", "b", "brand new"]
        press(skip)
        press(undo)
        assert [t.description for t in shown[0].children[1].children] == ["a", "b"]
        press(undo)
        assert not len(opened.journal)
        assert not (ground[0] / "review" / "r.csv").exists()  # until a pause
        kind.value = "mislabelled"
        assert accept.description == "Yes, relabel it (y)"
        kind.value = ""
        press(accept)
        label.value = "another"
        press(add)
        assert desk.message.startswith("Click the centre of the another")
        plt.close(desk.explorer.figure)
        assert read(ground) == ACCEPTED[0]
        assert accept.comm is None
    finally:
        plt.switch_backend(before)
