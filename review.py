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
ROUNDING = 0.5  # px, by which sides that are the same may differ in files
NEAR = 0.4  # of the score threshold; detections by so much under it are unsure
MOST_UNSURE = 200  # the surest of them
KNOWN = 0.1  # IoU with an annotation from which on a detection of low score tells nothing new
QUESTIONS = {  # what is asked, what is done if the model is right, and if the annotations are
    "missed": (
        "The model found no {true_label} here. Is the annotation wrong?",
        "Yes, remove it", "No, keep it",
    ),
    "spurious": (
        "Is there a {label} that is not annotated?", "Yes, add it", "No, leave it out",
    ),
    "mislocalised": (
        "Is the {true_label} where the model put it, rather than where it is annotated?",
        "Yes, move it", "No, keep its box",
    ),
    "mislabelled": (
        "Is this a {label}, rather than a {true_label}?", "Yes, relabel it", "No, keep its label",
    ),
    "duplicate": (
        "Is there a second object here, a {label}?", "Yes, add it", "No, leave it out",
    ),
    UNSURE: (
        "The model is not sure: is there a {label}?", "Yes, add it", "No, leave it out",
    ),
}  # fmt: skip
PAUSE = 2.0  # s without a decision, after which the annotation files are written


def find_unsure(
    detections: pd.DataFrame,
    objects: pd.DataFrame,
    score_threshold: float,
    near: float = NEAR,
    most: int = MOST_UNSURE,
) -> pd.DataFrame:
    """List the detections just under the threshold that lie on no object, best first.

    Args:
        detections: `raster, label, score, xmin, ymin, xmax, ymax`, of all scores, and `found` if
            they were measured: those on ground that does not count are left out.
        objects: The objects known so far: `raster, xmin, ymin, xmax, ymax`.
        score_threshold: Detections from this score on are sure.
        near: By which share of the threshold the others may be under it.
        most: How many to list, the surest.

    Returns:
        Rows as `atlas.classify_errors` gives them, of the kind "unsure".
    """
    scores = detections["score"]
    rows = detections[scores.lt(score_threshold) & scores.ge(score_threshold * (1 - near))]
    if "found" in rows:
        rows = rows[rows["found"] == -1]
    known = np.zeros(len(rows), dtype=bool)
    for name, of_raster in objects.groupby("raster"):
        mine = np.flatnonzero(rows["raster"] == name)
        boxes, others = (df[BOX_COLUMNS].to_numpy(float) for df in (rows.iloc[mine], of_raster))
        one, other = shapely.STRtree(shapely.box(*others.T)).query(shapely.box(*boxes.T))
        known[mine[one[imutils.pair_iou(boxes[one], others[other]) >= KNOWN]]] = True
    rows = rows[~known].sort_values("score", ascending=False)
    if len(rows) > most:
        log.info("%d detections are unsure, the %d surest are to be decided on", len(rows), most)
    rows = rows.head(most)
    return rows.assign(kind=UNSURE, true_label=None).reset_index(drop=True)


class Review:
    """Decisions on a list of items, kept in a folder; opened again, it goes on where it was.

    Attributes:
        items: All items, see `__init__`.
        folder: Where journal and annotation files are.
        journal: The decisions, in order; columns `JOURNAL`.
        tables: Identifier -> the annotations as decided, with `source`.
        deferred: Whether annotation files wait for `save`; the journal never waits.
        kind: The only kind that is asked about; None: all.
        raster: The only raster that is asked about; None: all.
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
        self.kind, self.raster = None, None
        self._chosen = self._of(None, None)
        self._passed: list[int] = []
        self._open = list(range(len(self.items)))  # in the order in which they are asked
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
    def remaining(self) -> int:
        """How many items are to decide, chosen or not."""
        return len(self._open)

    @property
    def pending(self) -> list[int]:
        """Places in `items` of those to decide, of the kind and raster chosen, the next first."""
        return [i for i in self._open if self._chosen[i]]

    def choose(self, kind: str | None = None, raster: str | None = None) -> None:
        """Ask about items of one kind or on one raster only; None: of all.

        Raises:
            InputError: There is no such kind or raster.
        """
        for what, name, known in (("kind", kind, QUESTIONS), ("raster", raster, self.rasters)):
            if name is not None and name not in known:
                raise InputError(f"{what} must be one of {sorted(known)} or None, got {name!r}")
        self.kind, self.raster = kind, raster
        self._chosen = self._of(kind, raster)
        self._skip_stale()

    def count(self, by: str) -> pd.Series:
        """Count the items to decide by "kind" or "raster", within what is chosen of the other."""
        kind, raster = (None, self.raster) if by == "kind" else (self.kind, None)
        chosen = self._of(kind, raster)
        left = [i for i in self._open if chosen[i]]
        return self.items.loc[left, by].value_counts()

    def _of(self, kind: str | None, raster: str | None) -> np.ndarray:
        chosen = np.ones(len(self.items), dtype=bool)
        for name, value in (("kind", kind), ("raster", raster)):
            if value is not None:
                chosen &= (self.items[name] == value).to_numpy()
        return chosen

    @property
    def place(self) -> int | None:
        """Place in `items` of the one to decide; None: all of the kind and raster chosen are."""
        return next((i for i in self._open if self._chosen[i]), None)

    @property
    def current(self) -> pd.Series | None:
        """The item to decide, if any."""
        return None if self.place is None else self.items.loc[self.place]

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
        self._open.append(self._take())
        self._skip_stale()

    def add(
        self, raster: str, center_xy: tuple[float, float], rim_xy: tuple[float, float], label: str
    ) -> None:
        """Add an object that neither the model nor the annotations have, as a square box.

        What of it reaches over the edge of the raster is cut off.

        Args:
            raster: Identifier of its raster.
            center_xy: Its centre, px.
            rim_xy: Any point on its rim, px.
            label: Its label.

        Raises:
            InputError: The label is empty, the two points are the same, or the centre is not on
                the raster.
        """
        self.check_center(raster, center_xy)
        radius = float(np.hypot(*np.subtract(rim_xy, center_xy)))
        if radius < annotations.MIN_SIDE:
            raise InputError(
                f"centre and rim must lie {annotations.MIN_SIDE} px apart at least, got "
                f"{radius:.1f} px; click the centre, then a point on the rim"
            )
        size = self.rasters[raster].width, self.rasters[raster].height
        low = [max(c - radius, 0.0) for c in center_xy]
        high = [min(c + radius, float(side)) for c, side in zip(center_xy, size, strict=True)]
        box = [*low, *high]
        place = {"raster": raster, "kind": BY_HAND}
        new = dict(zip(NEW_BOX_COLUMNS, box, strict=True)) | {"new_label": _checked(label)}
        self._record(place | {"decision": "add"} | new)

    def check_center(self, raster: str, center_xy: tuple[float, float]) -> None:
        """Refuse a centre (px) that is not on its raster.

        Raises:
            InputError: It is not.
        """
        size = self.rasters[raster].width, self.rasters[raster].height
        if not all(0 <= c < side for c, side in zip(center_xy, size, strict=True)):
            raise InputError(
                f"the centre must be on the raster of {size[0]} x {size[1]} px, got "
                f"{center_xy[0]:.1f}, {center_xy[1]:.1f}; click on the picture"
            )

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
            item = self._keys.index(_key(last))
            self._open.insert(0, item)
            if not self._chosen[item]:
                self.choose()
        self._open[1:1], self._passed = self._passed, []  # their objects may be back
        self._skip_stale()

    def _item(self) -> pd.Series:
        if self.current is None:
            raise InputError("nothing is left to decide; undo takes the last decision back")
        return self.current

    @staticmethod
    def _as_it_is(item: pd.Series) -> dict[str, object]:
        return {"new_label": item["true_label"], **_boxes(item, TRUE_BOX_COLUMNS, NEW_BOX_COLUMNS)}

    def _decide(self, item: pd.Series, decision: str, new: dict[str, object]) -> None:
        boxes = self.tables[item["raster"]][BOX_COLUMNS].to_numpy(dtype=float)
        true = item[TRUE_BOX_COLUMNS].to_numpy(dtype=float)
        if item["kind"] not in ADDING and _find(boxes, true) is None:
            raise InputError(
                f"there is no annotation at {true.round(1).tolist()} of {item['raster']} any more; "
                "skip it (s)"
            )
        entry = {name: item[name] for name in JOURNAL if name in item.index}
        self._record(entry | {"decision": decision} | new)
        self._take()
        self._skip_stale()

    def _take(self) -> int:
        """Take the current item out of the queue."""
        item = self.place
        self._open.remove(item)
        return item

    def _skip_stale(self) -> None:
        """Pass over items on objects that an earlier decision has removed or moved."""
        kinds, names = self.items["kind"].to_numpy(), self.items["raster"].to_numpy()
        boxes = self.items[TRUE_BOX_COLUMNS].to_numpy(dtype=float)
        there: dict[str, np.ndarray] = {}  # of the rasters that are met
        stale = []
        for i in self.pending:
            if kinds[i] in ADDING:
                break
            if names[i] not in there:
                there[names[i]] = self.tables[names[i]][BOX_COLUMNS].to_numpy(dtype=float)
            if _find(there[names[i]], boxes[i]) is not None:
                break
            stale.append(i)
        for i in stale:
            self._open.remove(i)
        self._passed += stale
        if stale:
            log.info("%d items are passed over, their objects are not there any more", len(stale))

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
        known = {*self._open, *self._passed}
        taken_back = [i for i in range(len(self.items)) if i not in known]
        items = (*self._open, *self._passed, *taken_back)
        self._passed, self._open = [], [i for i in items if self._keys[i] not in decided]

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
            if entry["decision"] == "relabel" and new != entry["label"]:
                how += f", relabelled from {entry['label']}"
            added = dict(zip(BOX_COLUMNS, box, strict=True))
            added |= {"label": new, "source": f"{how}, {by}"}
            added = annotations.measure_bboxes(pd.DataFrame([added]))
            self.tables[entry["raster"]] = pd.concat([table, added], ignore_index=True)
            return
        boxes, box_before = table[BOX_COLUMNS], row[TRUE_BOX_COLUMNS]
        place = _find(boxes.to_numpy(dtype=float), box_before.to_numpy(dtype=float))
        if place is None:
            raise InputError(
                f"{self.folder / 'journal.csv'}: an object at {box_before.tolist()} of "
                f"{entry['raster']} was decided on, but is not in the annotations, which have "
                f"changed since; move {self.folder} away, then a new review begins"
            )
        index = table.index[place]
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


def _find(boxes: np.ndarray, box: np.ndarray) -> int | None:
    """Return the place among boxes (N, 4) of one (4,), rounded by files, cut by a ground block."""
    if not len(boxes):
        return None
    iou = imutils.pair_iou(boxes, np.broadcast_to(box, boxes.shape))
    reach = (boxes - box) * (1, 1, -1, -1)  # px, how far over a side of it: not more than 0
    cut = (reach <= ROUNDING).all(axis=1) & ((abs(reach) <= ROUNDING).sum(axis=1) >= 2)
    if cut.any() and iou.max() < SAME_OBJECT:
        iou = np.where(cut, iou, 0)
    best = int(iou.argmax())
    return best if iou[best] >= SAME_OBJECT or cut[best] else None


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
    takes back, 1 to 9 relabel. `a` adds an object by two clicks on its centre and its rim; until
    then 1 to 9 choose its label, `u` goes a step back, `escape` leaves off. Nothing is answered
    before it was drawn, nor while the figure shows something else.

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
            detections: Those to show beside the one that is asked about; None shows no others.
        """
        self.review, self.message = review, ""
        self.label = next(iter(review.labels), "")
        self._found = review.items[:0] if detections is None else detections
        self._center: tuple[float, float] | None = None
        self._adding, self._controls, self._shown, self._counting = False, None, None, False
        self._away = False  # from what is asked, at an object that was added
        self.explorer = explore.Explorer(review.rasters, review.tables)
        self.explorer.stepping = False  # what comes next is the queue's affair
        self.explorer.on_click, self.explorer.on_key = self._click, self._key
        self.explorer.on_close = review.save
        canvas = self.explorer.figure.canvas
        canvas.mpl_connect("draw_event", self._enable)
        self._timer = canvas.new_timer(interval=int(1000 * PAUSE))
        self._timer.single_shot = True
        self._timer.add_callback(review.save)
        (self._mark,) = self.explorer.ax.plot([], [], "+", color="white", markersize=14, zorder=9)
        self.refresh()

    def refresh(self, note: str = "") -> None:
        """Show the current item, and the annotations as they are now.

        Args:
            note: What to tell beside.
        """
        item, review = self.review.current, self.review
        self._shown, self._away = review.place, False
        self._adding, self._center = False, None
        if item is not None:
            of_model = item["kind"] in (*ADDING, "mislabelled")
            self.label = str(item["label" if of_model else "true_label"])
        self._show_boxes(review.raster if item is None else item["raster"])
        if item is None:
            review.save()
            self.explorer.select(None)
        else:
            self.explorer.show_row(item, item["kind"])
        self._tell(note)

    def _show_boxes(self, raster: str | None) -> None:
        """Show the boxes of a raster; None: of the one that is shown already."""
        here = self.explorer.ground.raster.identifier
        there, found = here if raster is None else raster, self._found
        found = found[found["raster"].astype(str) == there]
        if self._shown is not None:  # an unsure one may not be among those to show
            row = self.review.items.loc[[self._shown]]
            same = (found[BOX_COLUMNS].to_numpy(float) == row[BOX_COLUMNS].to_numpy(float)).all(1)
            if row["kind"].item() != "missed" and not same.any():
                found = pd.concat([found, row]) if len(found) else row
        self.explorer.show_boxes(self.review.tables, found, None if there == here else there)

    def act(self, name: str, *values: object) -> None:
        """Call a method of the review and show what follows; what cannot be is said."""
        known, note = set(self.review.labels), ""
        try:
            getattr(self.review, name)(*values)
        except InputError as error:
            self.refresh(f"{error}.")
        else:
            for label in set(self.review.labels) - known:
                note = f"{label} is new: the next run needs some on training ground, too (a)."
            self.refresh(note)
            self._save_later()

    def _save_later(self) -> None:
        self._timer.stop()  # the pause begins anew
        self._timer.start()

    def answer(self, name: str, *values: object) -> None:
        """Do as `act`, but only if what is asked is what has been drawn."""
        if self._adding or not self.explorer.drawn:
            return
        if self._away or self.review.place != self._shown:  # by a cell of the notebook
            self.refresh()
        else:
            self.act(name, *values)

    def undo(self) -> None:
        """Go one step back: from the rim to the centre, from an addition, from a decision."""
        if self._adding:
            self._adding, self._center = self._center is not None, None
            self._tell()
        else:
            self.act("undo")

    def toggle_adding(self) -> None:
        """Begin, or leave off, to add an object."""
        self._adding, self._center = not self._adding, None
        if self._adding or self._away:
            self._tell()
        else:
            self.refresh()

    def _click(self, x: float, y: float) -> bool:
        if not self._adding:
            return False
        raster, note = self.explorer.ground.raster.identifier, ""
        try:
            if self._center is None:
                self.review.check_center(raster, (x, y))
                self._center = x, y
            elif np.hypot(x - self._center[0], y - self._center[1]) > self.explorer.reach:
                self.review.add(raster, self._center, (x, y), self.label)
                self._adding, self._center, self._away = False, None, True
                self._show_boxes(raster)
                self._save_later()
            else:
                note = "That is the centre itself."
        except InputError as error:
            self._center, note = None, f"{error}."
        self._tell(note)
        return True

    def _key(self, key: str) -> bool:
        if key.isdigit() and 0 < int(key) <= len(self.review.labels):
            label = self.review.labels[int(key) - 1]
            if self._adding:
                self.label = label
                self._tell()
            else:
                self.answer("relabel", label)
        elif key == "a" or (key == "escape" and self._adding):
            self.toggle_adding()
        elif key == "u":
            self.undo()
        elif key in ANSWERS:
            self.answer(ANSWERS[key])
        else:
            return False
        return True

    def _tell(self, note: str = "") -> None:
        """Write what is asked, or what to do, and let the buttons follow."""
        item, review = self.review.current, self.review
        done, left, names = len(review.journal), len(review.pending), ()
        if item is None:
            others = review.remaining - left
            text = f"All is decided: {done} decisions are in {review.folder}"
            if others:
                text = f"Nothing is to ask here, a adds an object; {others} others are to go"
        else:
            question, *names = QUESTIONS[item["kind"]]
            question = question.format(label=item["label"], true_label=item["true_label"])
            score = "" if pd.isna(item["score"]) else f", score {item['score']:.2f}"
            text = f"{question} y: {names[0]}. x: {names[1]}. ({item['kind']}{score}; "
            text += f"{done} decided, {left} to go)"
        if self._adding:
            where = "the rim" if self._center else "the centre"
            text = f"Click {where} of the {self.label} to add (u: a step back, a: not now)"
        elif self._away:
            text = f"The {self.label} is added. a: one more, u: take it back, y: on with the review"
        self.message = f"{note} {text}".strip()
        self.explorer.say(self.message)
        self._mark.set_data(*([[v] for v in self._center] if self._center else [[], []]))
        if self._controls is not None:
            (accept, reject, *_), label, _ = self._controls
            label.options, label.value = self.review.labels, self.label
            for button, name, key in zip((accept, reject), names, "yx", strict=False):
                button.description = f"{name} ({key})"
            self._count_choices()
            self._enable()

    # -- widgets --------------------------------------------------------------------------------

    def add_controls(self) -> None:
        """Show the figure in the notebook, with buttons."""
        import ipywidgets as widgets

        def button(text: str, tip: str, answer: object) -> widgets.Button:
            made = widgets.Button(description=text, tooltip=tip, layout={"width": "auto"})
            made.on_click(lambda _: answer())
            return made

        accept = button("", "key y: the model is right", lambda: self.answer("accept"))
        reject = button("", "key x: the annotations are right", lambda: self.answer("reject"))
        accept.button_style, reject.button_style = "success", "warning"
        skip = button("Skip", "key s", lambda: self.answer("skip"))
        label = widgets.Combobox(
            value=self.label, options=self.review.labels, ensure_option=False,
            placeholder="label, also a new one", layout={"width": "160px"},
        )  # fmt: skip
        label.observe(lambda change: setattr(self, "label", change["new"]), "value")
        keys = ", ".join(f"{i} {name}" for i, name in enumerate(self.review.labels[:9], start=1))
        relabel = button("Relabel", f"the object gets this label; keys: {keys}",
                         lambda: self.answer("relabel", self.label))  # fmt: skip
        choices = {
            name: widgets.Dropdown(layout={"width": "180px"}, tooltip=f"which {name} to ask about")
            for name in (("kind", "raster") if len(self.review.rasters) > 1 else ("kind",))
        }
        self._controls = (accept, reject, skip, relabel), label, choices
        self._count_choices()
        for choice in choices.values():
            choice.observe(self._choose, "value")
        row = [
            accept, reject, skip, button("Undo", "key u", self.undo), label, relabel,
            button("Add a missing one", "key a: with this label, click its centre and its rim",
                   self.toggle_adding), *choices.values(),
        ]  # fmt: skip
        self.review.deferred = True  # to a pause, of which only such a figure knows
        row = widgets.Box(row, layout=widgets.Layout(flex_flow="row wrap"))
        self.explorer.add_controls(row)
        self.refresh()

    def _count_choices(self) -> None:
        """Say how many there are to decide of each kind, and on each raster."""
        review, (*_, choices) = self.review, self._controls
        for name, choice in choices.items():
            chosen, counts = getattr(review, name), review.count(name)
            known = review.rasters if name == "raster" else QUESTIONS
            options = [(f"all {name}s ({counts.sum():,})", "")]  # None would be no choice at all
            options += [
                (f"{value} ({counts.get(value, 0):,})", value)
                for value in known if name == "raster" or value in counts or value == chosen
            ]  # fmt: skip
            if choice.options != tuple(options):
                self._counting = True  # new options choose the first of them
                choice.options, choice.value = options, chosen or ""
                self._counting = False

    def _choose(self, _change: object) -> None:
        if not self._counting:
            choices = self._controls[-1]
            self.act("choose", *(c.value or None for c in choices.values()))

    def _enable(self, _event: object = None) -> None:
        if self._controls is not None:
            waits = self.review.current is None or self._adding or not self.explorer.drawn
            for button in self._controls[0]:
                button.disabled = waits


ANSWERS = {"y": "accept", "x": "reject", "s": "skip"}


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
        detections: Those to show beside the one that is asked about; None shows no others.
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
