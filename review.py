"""The review queue: where model and annotations disagree, a person decides, one place at a time.

Each item proposes a change of the annotations: to add what the model found, to remove what it did
not find, to move a box, to take another label. Every decision is on disk before the next question:
`journal.csv` holds them all, with who took them and when, and what stood there before; beside it,
written in pauses, one annotation file per raster, which is the cleaned annotations with the journal
carried out, and says of each object in `source` where it comes from. A run reads these files as
they are. Several people may decide at the same time: each decision is added to what stands in the
journal by then.
"""

from __future__ import annotations

import getpass
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import shapely

import annotations
import explore
import fileio
import imutils
from ImageData import BOX_COLUMNS, TRUE_BOX_COLUMNS, InputError

log = logging.getLogger(__name__)

NEW_BOX_COLUMNS = [f"new_{name}" for name in BOX_COLUMNS]
JOURNAL = [
    "time", "user", "raster", "kind", "decision", "score", "label", *BOX_COLUMNS,
    "true_label", *TRUE_BOX_COLUMNS, "new_label", *NEW_BOX_COLUMNS,
]  # fmt: skip
UNSURE, BY_HAND = "unsure", "by hand"
ORIGINAL = "original"
ADDING = ("spurious", "duplicate", UNSURE)  # kinds that propose an object to add
SAME_OBJECT = 0.9  # IoU from which on a box of an evaluation is that of an annotation
NEAR = 0.2  # of the score under the threshold; detections down to there are unsure
KNOWN = 0.1  # IoU with an annotation from which on a detection of low score tells nothing new
QUESTIONS = {  # what is asked, what is done if the model is right, and if the annotations are
    "missed": ("The model found nothing where there is a {true_label}", "Remove it", "Keep it"),
    "spurious": ("The model found a {label} where there is nothing", "Add it", "Leave it out"),
    "mislocalised": ("The model put this {true_label} elsewhere", "Move it", "Keep its box"),
    "mislabelled": ("The model takes this {true_label} for a {label}", "Relabel it", "Keep it"),
    "duplicate": ("The model found a second object here: {label}", "Add it", "Leave it out"),
    UNSURE: ("The model is not sure of this {label}", "Add it", "Leave it out"),
}
PAUSE = 2.0  # s without a decision, after which the annotation files are written


def find_unsure(
    detections: pd.DataFrame, objects: pd.DataFrame, score_threshold: float, near: float = NEAR
) -> pd.DataFrame:
    """List the detections just under the threshold that lie on no object, best first.

    Args:
        detections: `raster, label, score, xmin, ymin, xmax, ymax`, of all scores, and `found` if
            they were measured: those on ground that does not count are left out.
        objects: The objects known so far: `raster, xmin, ymin, xmax, ymax`.
        score_threshold: Detections from this score on are sure.
        near: How far under it the others may be.

    Returns:
        Rows as `atlas.classify_errors` gives them, of the kind "unsure".
    """
    scores = detections["score"]
    rows = detections[scores.lt(score_threshold) & scores.ge(score_threshold - near)]
    if "found" in rows:
        rows = rows[rows["found"] == -1]
    known = np.zeros(len(rows), dtype=bool)
    for name, of_raster in objects.groupby("raster"):
        mine = np.flatnonzero(rows["raster"] == name)
        boxes, others = (df[BOX_COLUMNS].to_numpy(float) for df in (rows.iloc[mine], of_raster))
        one, other = shapely.STRtree(shapely.box(*others.T)).query(shapely.box(*boxes.T))
        known[mine[one[imutils.pair_iou(boxes[one], others[other]) >= KNOWN]]] = True
    rows = rows[~known].sort_values("score", ascending=False)
    return rows.assign(kind=UNSURE, true_label=None).reset_index(drop=True)


class Review:
    """Decisions on a list of items, kept in a folder; opened again, it goes on where it was.

    Attributes:
        items: All items, see `__init__`.
        folder: Where journal and annotation files are.
        journal: The decisions, in order; columns `JOURNAL`.
        tables: Identifier -> the annotations as decided, with `source`.
        deferred: Whether annotation files wait for `save`; the journal never waits.
        pending: Places in `items` of those to decide, the current one first.
    """

    def __init__(
        self,
        rasters: Mapping[str, fileio.Raster],
        items: pd.DataFrame,
        folder: Path,
        clean_dir: Path | None = None,
        user: str | None = None,
    ) -> None:
        """Open a review, or one that was begun.

        Args:
            rasters: Identifier -> raster; each gets its annotation file.
            items: What to decide, in this order: rows of `atlas.classify_errors`, `find_unsure`.
            folder: Where journal and annotation files go.
            clean_dir: Folder with the cleaned annotations and their quarantine, see
                `annotations.clean_annotations`; a raster without any begins with none.
            user: Who decides; None asks the system.

        Raises:
            InputError: Items lie on rasters that are not given, or are of no known kind, or the
                journal cannot be carried out on these annotations.
        """
        if unknown := sorted(set(items["raster"]) - set(rasters)):
            raise InputError(f"items lie on {unknown}, got the rasters {sorted(rasters)}; add them")
        if unknown := sorted(set(items["kind"].astype(str)) - set(QUESTIONS)):
            raise InputError(f"items must be of the kinds {list(QUESTIONS)}, got {unknown}")
        self.rasters, self.folder = dict(rasters), Path(folder)
        self.user = _user() if user is None else user
        needed = ["score", "true_label", *TRUE_BOX_COLUMNS]
        self.items = items.reset_index(drop=True)
        for name in needed:
            if name not in self.items:
                self.items[name] = np.nan
        self.items["kind"] = self.items["kind"].astype(str)
        for name in ("label", "true_label"):  # 1, read from a file, is the label "1"
            known = self.items[name].notna()
            self.items[name] = self.items[name].astype(object).where(known, None)
            self.items.loc[known, name] = self.items.loc[known, name].map(str)
        self._clean = {name: _read_clean(name, clean_dir) for name in rasters}
        self._keys = [_key(row) for row in self.items.to_dict("records")]
        self._passed: list[int] = []
        self.pending = list(range(len(self.items)))
        self.deferred, self._unsaved = False, set()
        self._journal_path = self.folder / "journal.csv"
        self._read_journal()
        if len(self.journal):  # a kill may have come between it and the files
            self.save()
        self._skip_stale()

    def save(self) -> None:
        """Write the annotation files that differ from what is decided, and those that lack."""
        if not self._unsaved:
            return
        with fileio.exclusive(self.folder, wait=True):
            if self._stamp() != self._read:
                return  # who has decided since then writes what both decided
            for name, raster in self.rasters.items():
                path = self.folder / f"{name}.csv"
                if name in self._unsaved or not path.exists():
                    fileio.write_annotations(path, self.tables[name], raster)
        self._unsaved.clear()

    # -- the queue ------------------------------------------------------------------------------

    @property
    def current(self) -> pd.Series | None:
        """The item to decide; None: all are."""
        return self.items.loc[self.pending[0]] if self.pending else None

    @property
    def labels(self) -> list[str]:
        """All labels that are in use, or were."""
        return sorted(self._labels)

    def accept(self) -> None:
        """Follow the model: add what it found, remove what it did not, take its box or label."""
        item = self._item()
        new = {"new_label": item["label"], **_boxes(item, BOX_COLUMNS, NEW_BOX_COLUMNS)}
        match item["kind"]:
            case "missed":
                new = {}
            case "mislocalised":
                new["new_label"] = item["true_label"]
            case "mislabelled":
                new |= _boxes(item, TRUE_BOX_COLUMNS, NEW_BOX_COLUMNS)
        self._decide(item, "accept", new)

    def reject(self) -> None:
        """Leave the annotations as they are; an object that was doubted counts as confirmed."""
        item = self._item()
        self._decide(item, "reject", {} if item["kind"] in ADDING else self._as_it_is(item))

    def relabel(self, label: str) -> None:
        """Give the object another label; one that is not annotated is added with it.

        Args:
            label: Any text, also one that no object had so far.

        Raises:
            InputError: The label is empty.
        """
        item, label = self._item(), _checked(label)
        new = self._as_it_is(item)
        if item["kind"] in ADDING:
            new = _boxes(item, BOX_COLUMNS, NEW_BOX_COLUMNS)
        self._decide(item, "relabel", new | {"new_label": label})

    def skip(self) -> None:
        """Leave the item for later: it comes again after all others."""
        self._item()
        self.pending.append(self.pending.pop(0))

    def add(
        self, raster: str, center_xy: tuple[float, float], rim_xy: tuple[float, float], label: str
    ) -> None:
        """Add an object that neither the model nor the annotations have, as a square box.

        Args:
            raster: Identifier of its raster.
            center_xy: Its centre, px.
            rim_xy: Any point on its rim, px.
            label: Its label.

        Raises:
            InputError: The label is empty, the two points are the same, or the object reaches over
                the edge of the raster.
        """
        (x, y), radius = center_xy, float(np.hypot(*np.subtract(rim_xy, center_xy)))
        size = self.rasters[raster].width, self.rasters[raster].height
        box = [x - radius, y - radius, x + radius, y + radius]
        if radius < annotations.MIN_SIDE or min(box) < 0 or box[2] > size[0] or box[3] > size[1]:
            raise InputError(
                f"an object must lie on the raster, 0 to {size} px, got the box {np.round(box, 1)};"
                " click its centre, then its rim"
            )
        place = {"raster": raster, "kind": BY_HAND}
        new = dict(zip(NEW_BOX_COLUMNS, box, strict=True)) | {"new_label": _checked(label)}
        self._record(place | {"decision": "add"} | new)

    def undo(self) -> None:
        """Take back the last decision, whoever took it, and ask its item again."""
        if not len(self.journal):
            return
        with self._current_journal():
            last = self.journal.iloc[-1].to_dict()
            self._save_journal(self.journal.iloc[:-1])
        self._carry_out()
        self._changed(last["raster"])
        if last["kind"] != BY_HAND and _key(last) in self._keys:
            self.pending.insert(0, self._keys.index(_key(last)))
        self.pending[1:1], self._passed = self._passed, []  # their objects may be back
        self._skip_stale()

    def _item(self) -> pd.Series:
        if self.current is None:
            raise InputError("nothing is left to decide; undo takes the last decision back")
        return self.current

    @staticmethod
    def _as_it_is(item: pd.Series) -> dict[str, object]:
        return {"new_label": item["true_label"], **_boxes(item, TRUE_BOX_COLUMNS, NEW_BOX_COLUMNS)}

    def _decide(self, item: pd.Series, decision: str, new: dict[str, object]) -> None:
        entry = {name: item[name] for name in JOURNAL if name in item.index}
        self._record(entry | {"decision": decision} | new)
        self.pending.pop(0)
        self._skip_stale()

    def _skip_stale(self) -> None:
        """Pass over items on objects that an earlier decision has removed or moved."""
        while self.current is not None and self.current["kind"] not in ADDING:
            item = self.current
            if _find(self.tables[item["raster"]], item[TRUE_BOX_COLUMNS]) is not None:
                return
            log.info("%s: the object of an item is not there any more", item["raster"])
            self._passed.append(self.pending.pop(0))

    # -- what is decided ------------------------------------------------------------------------

    def _record(self, entry: dict[str, object]) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        entry = {"time": now, "user": self.user} | entry
        row = pd.DataFrame([entry]).reindex(columns=JOURNAL)
        with self._current_journal():
            # first: what stands in it can be carried out again
            known = [self.journal] if len(self.journal) else []
            self._save_journal(pd.concat([*known, row], ignore_index=True))
        self._carry_out_one(entry)
        self._changed(entry["raster"])

    @contextmanager
    def _current_journal(self) -> Iterator[None]:
        """Hold the journal, as it is on disk.

        Raises:
            InputError: Somebody else has written to it; it has been read again.
        """
        with fileio.exclusive(self.folder, wait=True):
            if self._stamp() == self._read:
                yield
                return
            before = len(self.journal)
            self._read_journal()
        others = sorted(set(self.journal["user"][before:])) or [self.user]
        self._skip_stale()
        raise InputError(
            f"{', '.join(others)} decided here meanwhile, {len(self.journal)} decisions are known "
            "now; look again, then decide"
        )

    def _stamp(self) -> tuple[int, int] | None:
        if not self._journal_path.exists():
            return None
        stat = self._journal_path.stat()  # each writing is another file
        return stat.st_ino, stat.st_mtime_ns

    def _read_journal(self) -> None:
        """Read the decisions, carry them out, and ask no more of what is decided."""
        texts = ["time", "user", "raster", "kind", "decision", "label", "true_label", "new_label"]
        self._read, self.journal = self._stamp(), pd.DataFrame(columns=JOURNAL)
        if self._read is not None:
            self.journal = fileio.read_table(self._journal_path, texts, rows=False)
        self._carry_out()
        self._unsaved |= set(self.journal["raster"])
        decided = set(map(_key, self.journal.to_dict("records")))
        known = {*self.pending, *self._passed}
        taken_back = [i for i in range(len(self.items)) if i not in known]
        self._passed, self.pending = (
            [],
            [
                i
                for i in (*self.pending, *self._passed, *taken_back)
                if self._keys[i] not in decided
            ],
        )

    def _save_journal(self, journal: pd.DataFrame) -> None:
        fileio.write_table(self._journal_path, journal)
        self.journal, self._read = journal, self._stamp()

    def _changed(self, name: str) -> None:
        self._unsaved.add(name)
        if not self.deferred:
            self.save()

    def _carry_out(self) -> None:
        self.tables = {name: table.copy() for name, table in self._clean.items()}
        tables = [table["label"] for table in self.tables.values()]
        used = pd.concat([*tables, self.items["label"], self.items["true_label"]]).dropna()
        self._labels = set(used.astype(str))
        for entry in self.journal.to_dict("records"):
            self._carry_out_one(entry)

    def _carry_out_one(self, entry: Mapping[str, object]) -> None:
        """Change the annotations as an entry of the journal says."""
        if entry["raster"] not in self.tables:
            return
        table = self.tables[entry["raster"]]
        row, new = pd.Series(entry), entry.get("new_label")
        self._labels |= set() if pd.isna(new) else {new}
        by = f"{entry['user']} {entry['time']}"
        box = [entry.get(name, np.nan) for name in NEW_BOX_COLUMNS]
        if entry["kind"] in (*ADDING, BY_HAND):
            if pd.isna(new):
                return
            how = f"added {BY_HAND}" if entry["kind"] == BY_HAND else f"added ({entry['kind']})"
            if entry["decision"] == "relabel":
                how += f", relabelled from {entry['label']}"
            added = dict(zip(BOX_COLUMNS, box, strict=True))
            added |= {"label": new, "source": f"{how}, {by}"}
            added = annotations.measure_bboxes(pd.DataFrame([added]))
            self.tables[entry["raster"]] = pd.concat([table, added], ignore_index=True)
            return
        index = _find(table, row[TRUE_BOX_COLUMNS])
        if index is None:
            raise InputError(
                f"{self.folder / 'journal.csv'}: an object at {list(row[TRUE_BOX_COLUMNS])} of "
                f"{entry['raster']} was decided on, but is not in the annotations, which have "
                f"changed since; move {self.folder} away, then a new review begins"
            )
        if pd.isna(new):
            self.tables[entry["raster"]] = table.drop(index=index).reset_index(drop=True)
            return
        before = table.loc[index]
        how = [f"relabelled from {before['label']}"] if new != before["label"] else []
        if entry["decision"] == "accept" and entry["kind"] == "mislocalised":
            how.append("moved")
        source = f"{before['source']}; {' and '.join(how) or 'confirmed'} ({entry['kind']}), {by}"
        if entry["kind"] == "mislocalised" and entry["decision"] == "accept":
            table.loc[index, BOX_COLUMNS] = box
            measured = annotations.measure_bboxes(table.loc[[index]])
            table.loc[index, measured.columns] = measured.iloc[0]
        table.loc[index, ["label", "source"]] = [new, source]


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may not know who it is run by
        return "unknown"


def _checked(label: str) -> str:
    if not (label := str(label).strip()):
        raise InputError("a label must be a text, got an empty one; choose or write one")
    return label


def _boxes(row: pd.Series, names: list[str], new_names: list[str]) -> dict[str, float]:
    return {new: float(row[name]) for name, new in zip(names, new_names, strict=True)}


def _key(row: Mapping[str, object]) -> tuple[object, ...]:
    """Return what makes an item itself, in a table and in the journal."""
    box = (round(float(row[name]), 2) for name in BOX_COLUMNS)
    return (row["raster"], str(row["kind"]), str(row["label"]), *box)


def _find(table: pd.DataFrame, box: pd.Series) -> int | None:
    """Return the index of the annotation with a box, which files may have rounded."""
    if table.empty:
        return None
    box = np.broadcast_to(box.to_numpy(dtype=float), (len(table), 4))
    iou = imutils.pair_iou(table[BOX_COLUMNS].to_numpy(dtype=float), box)
    best = int(iou.argmax())
    return table.index[best] if iou[best] >= SAME_OBJECT else None


def _read_clean(name: str, clean_dir: Path | None) -> pd.DataFrame:
    """Read a raster's cleaned annotations, and the real objects that were dropped from them.

    The latter are dropped by the next run, too, which must know of them: the ground under them does
    not count.
    """
    columns = [*fileio.PIXEL_COLUMNS, "source"]
    empty = pd.DataFrame({name: pd.Series(dtype=float) for name in columns})
    empty = empty.astype({"label": object, "source": object})
    path = None if clean_dir is None else Path(clean_dir) / f"{name}.csv"
    if path is None or not path.exists():
        return empty
    table = fileio.read_table(path, ["label"]).assign(source=ORIGINAL)
    quarantine = path.with_name(f"{name}_quarantine.csv")
    quarantine = fileio.read_table(quarantine, ["label"], rows=False)
    real = quarantine[quarantine["reason"].isin(annotations.REAL)]
    boxes = real[annotations.QUARANTINE_BOX_COLUMNS].set_axis(BOX_COLUMNS, axis=1)
    boxes = boxes[(boxes.to_numpy()[:, 2:] > boxes.to_numpy()[:, :2]).all(axis=1)]
    if boxes.empty:
        return table[columns]
    real = real.loc[boxes.index]
    labels = real["label"] if "label" in real else pd.Series(np.nan, real.index)
    further = annotations.measure_bboxes(boxes.astype(float)).assign(
        label=labels.fillna(annotations.UNKNOWN).astype(str),
        source=f"{ORIGINAL}, does not count: " + real["reason"],
    )
    if (real["reason"] == annotations.CROWD).any():
        columns.append("iscrowd")
        further["iscrowd"] = (real["reason"] == annotations.CROWD).astype(int)
        table["iscrowd"] = 0
    return pd.concat([table, further], ignore_index=True)[columns]


# ---------------------------------------------------------------------------------------------
# At the desk
# ---------------------------------------------------------------------------------------------


class Desk:
    """A figure that shows the current item of a review, with keys and buttons to decide it.

    Keys beside those of the explorer: `y` follows the model, `x` the annotations, `s` skips, `u`
    takes back, `a` adds an object by two clicks on its centre and its rim, 1 to 9 relabel.

    Attributes:
        review: The review.
        explorer: The figure.
        label: The label for objects that are added or relabelled.
        message: What is asked, or what went wrong.
    """

    def __init__(self, review: Review, detections: pd.DataFrame | None = None) -> None:
        """Open the figure.

        Args:
            review: The review.
            detections: Those to show beside the unsure ones; None shows those of the items.
        """
        item = review.current
        self.label = next(iter(review.labels), "") if item is None else str(item["label"])
        self.review, self.message = review, ""
        found = review.items[review.items["kind"] != "missed"]
        if detections is not None:  # they may end where the unsure ones begin
            found = pd.concat([detections, found[found["kind"] == UNSURE]], ignore_index=True)
        self._detections, self._stops = found, found[:0]  # what comes next is the queue's affair
        self._center: tuple[float, float] | None = None
        self._adding, self._controls = False, None
        self._raster = next(iter(review.rasters))
        self.explorer = explore.Explorer(review.rasters[self._raster], *self._boxes(), self._stops)
        self.explorer.on_click, self.explorer.on_key = self._click, self._key
        self.explorer.on_close = review.save
        self._timer = self.explorer.figure.canvas.new_timer(interval=int(1000 * PAUSE))
        self._timer.single_shot = True
        self._timer.add_callback(review.save)
        (self._mark,) = self.explorer.ax.plot([], [], "+", color="white", markersize=14, zorder=9)
        self.refresh()

    def _boxes(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        return self.review.tables[self._raster], self._detections

    def refresh(self) -> None:
        """Show the current item, and the annotations as they are now."""
        item, review = self.review.current, self.review
        if item is not None and item["raster"] != self._raster:
            self._raster = item["raster"]
            self.explorer.open(review.rasters[self._raster], *self._boxes(), self._stops)
        else:
            self.explorer.show_boxes(*self._boxes())
        done, names = len(review.journal), ("Follow the model", "Keep")
        self._shown = None if item is None else review.pending[0]
        if item is None:
            review.save()
            self.message = f"All is decided: {done} decisions are in {review.folder}"
            self.explorer.select(None)
        else:
            question, *names = QUESTIONS[item["kind"]]
            text = {name: item[name] for name in ("label", "true_label")}
            score = "" if pd.isna(item["score"]) else f", score {item['score']:.2f}"
            self.message = f"{question.format(**text)} ({item['kind']}{score}). "
            self.message += f"{done} decided, {len(review.pending)} to go"
            self.explorer.show_row(item, item["kind"])
        if self._adding:
            where = "the rim" if self._center else "the centre"
            self.message = f"Click {where} of the {self.label} to add (a: not now)"
        self._mark.set_data(*([[v] for v in self._center] if self._center else [[], []]))
        self._tell(names)

    def act(self, name: str, *values: object) -> None:
        """Call a method of the review and show what follows; what cannot be is said."""
        try:
            getattr(self.review, name)(*values)
        except InputError as error:
            if self.review.current is not None and self.review.pending[0] != self._shown:
                self.refresh()  # others have decided
            self.message = str(error)
            self._tell(None)
        else:
            self.refresh()
            self._timer.stop()  # the pause begins anew
            self._timer.start()

    def toggle_adding(self) -> None:
        """Begin, or leave off, to add an object."""
        self._adding, self._center = not self._adding, None
        self.refresh()

    def _click(self, x: float, y: float) -> bool:
        if not self._adding:
            return False
        if self._center is None:
            self._center = (x, y)
            self.refresh()
        else:
            center, self._center, self._adding = self._center, None, False
            self.act("add", self._raster, center, (x, y), self.label)
        return True

    def _key(self, key: str) -> bool:
        if key.isdigit() and 0 < int(key) <= len(self.review.labels):
            self.act("relabel", self.review.labels[int(key) - 1])
        elif key == "a":
            self.toggle_adding()
        elif key in ACTIONS:
            self.act(ACTIONS[key])
        else:
            return False
        return True

    # -- widgets --------------------------------------------------------------------------------

    def add_controls(self) -> None:
        """Show the figure in the notebook, with buttons."""
        import ipywidgets as widgets

        def button(text: str, tip: str, answer: object) -> widgets.Button:
            made = widgets.Button(description=text, tooltip=tip, layout={"width": "auto"})
            made.on_click(lambda _: answer())
            return made

        accept = button("", "key y: the model is right", lambda: self.act("accept"))
        reject = button("", "key x: the annotations are right", lambda: self.act("reject"))
        accept.button_style, reject.button_style = "success", "warning"
        label = widgets.Combobox(
            value=self.label, options=self.review.labels, ensure_option=False,
            placeholder="label, also a new one", layout={"width": "160px"},
        )  # fmt: skip
        label.observe(lambda change: setattr(self, "label", change["new"]), "value")
        row = [
            accept, reject, button("Skip", "key s", lambda: self.act("skip")),
            button("Undo", "key u", lambda: self.act("undo")), label,
            button("Relabel", "the object gets this label; keys 1 to 9: that label",
                   lambda: self.act("relabel", self.label)),
            button("Add a missing one", "key a: with this label, click its centre and its rim",
                   self.toggle_adding),
        ]  # fmt: skip
        self._controls = accept, reject, label
        self.review.deferred = True  # to a pause, of which only such a figure knows
        row = widgets.Box(row, layout=widgets.Layout(flex_flow="row wrap"))
        self.explorer.add_controls(row)
        self.refresh()

    def _tell(self, names: tuple[str, str] | None) -> None:
        self.explorer.say(self.message)
        if self._controls is not None:
            *buttons, label = self._controls
            label.options = self.review.labels
            for button, name in zip(buttons, names or (), strict=False):
                button.description = name
                button.disabled = self.review.current is None


ACTIONS = {"y": "accept", "x": "reject", "s": "skip", "u": "undo"}


def review(
    rasters: Mapping[str, fileio.Raster],
    items: pd.DataFrame,
    folder: Path,
    clean_dir: Path | None = None,
    detections: pd.DataFrame | None = None,
    user: str | None = None,
) -> Review:
    """Go through the items of a review, in the notebook with ipympl, or by its methods.

    Every decision is in the journal at once, see `Review`; the annotation files in `folder` follow
    in pauses, and are read by a run with `DF_DIR` = that folder and `BOX_SOURCE = "columns"`.
    Without ipympl the first item is drawn.

    Args:
        rasters: Identifier -> raster.
        items: See `Review`.
        folder: Where journal and annotation files go.
        clean_dir: See `Review`.
        detections: Those to show beside the unsure ones; None shows those of the items.
        user: Who decides; None asks the system.

    Returns:
        The review.
    """
    opened = Review(rasters, items, folder, clean_dir, user)
    with_widgets = explore.has_widgets()
    with plt.ioff() if with_widgets else nullcontext():
        desk = Desk(opened, detections)
    desk.explorer.ax.desk = desk  # lives as long as its figure
    if with_widgets:
        desk.add_controls()
    else:
        desk.explorer.settle(explore.STATIC_PATIENCE)
    return opened
