"""The error atlas: every error on the test ground, as a table, on the map, for pictures.

It is made from the tables of an evaluation alone, see `trials.write_detections`, at any time
and without the model. Each error is of one kind, and the kinds add up:

    objects that count = right + mislabelled + mislocalised + missed
    detections shown   = right + mislabelled + mislocalised + duplicate + spurious

`right` are detections that found an object under its own label.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import shapely

import annotations
import fileio
import imutils
import metrics
from ImageData import BOX_COLUMNS, CENTER_COLUMNS, TRUE_BOX_COLUMNS, InputError

log = logging.getLogger(__name__)

KINDS = ("missed", "spurious", "mislocalised", "mislabelled", "duplicate")
COLUMNS = [
    "kind", "raster", "block", "label", "true_label", "score", "iou", *CENTER_COLUMNS, "diameter",
    *BOX_COLUMNS, *TRUE_BOX_COLUMNS, "object", "detection",
]  # fmt: skip
LEAST_IOU = 0.1  # below it, a detection has nothing to do with an object
TOLERANCE = 1e-3  # of an IoU, whose boxes were rounded in a file
MANIFEST = "manifest.json"


def classify_errors(
    detections: pd.DataFrame,
    objects: pd.DataFrame,
    score_threshold: float,
    iou_threshold: float,
) -> pd.DataFrame:
    """List what is wrong in an evaluation, each error as one row of one kind.

    mislabelled: a detection that found an object of another label. duplicate: one that overlaps, by
    `iou_threshold` at least, an object that a better detection has found. mislocalised: one that
    overlaps an object by less, from `LEAST_IOU` on, that no detection has found; an object explains
    one such detection, the best. spurious: every other detection that found nothing. missed: every
    object that no detection has found or is mislocalised on.

    What does not count is never an error: objects that are not `counted`, and detections on those
    or on other ground (`found` is -2).

    Args:
        detections: `detections.csv` of a trial, of all scores: those under the threshold tell how
            nearly a missed object was found.
        objects: `objects.csv` of the same trial.
        score_threshold: Detections from this score on are shown.
        iou_threshold: The IoU from which on a detection has found an object in these tables.

    Returns:
        By kind and falling score, then size: `kind` (categorical, of `KINDS`); `raster, block`;
        `label` of the detection, for a missed object its own; `true_label` of the object, missing
        for a spurious detection; `score` and `iou` of the detection with the object, for a missed
        object those of the detection under the threshold that finds it (NaN: none does), for a
        spurious one the highest IoU with any object; `pixel_x, pixel_y, diameter, xmin, ymin, xmax,
        ymax` (px) of the detection, for a missed object its own; `true_xmin, true_ymin, true_xmax,
        true_ymax` of the object; `object` of the block, and `detection`, its place in `detections`
        (-1: none).

    Raises:
        InputError: The tables are not of one evaluation, or not of this `iou_threshold`.

    References:
        Bolya et al. 2020, TIDE, for the kinds and `LEAST_IOU`. We match as `metrics.match_boxes`
        does, whatever the label: a better detection under a wrong label makes another under the
        right one a duplicate. There is no kind for a wrong label in a wrong place (it is
        mislocalised), and errors on one object are not many: the kinds add up as above.
    """
    found = detections.assign(detection=np.arange(len(detections)))
    found = found[found["found"] != metrics.IGNORED].reset_index(drop=True)
    truth = objects[objects["counted"].astype(bool)].reset_index(drop=True)
    target = _targets(found, truth)
    matched, scores = target >= 0, found["score"].to_numpy(dtype=float)
    finder = np.full(len(truth), -1)  # of each object, under the threshold or not
    finder[target[matched]] = np.flatnonzero(matched)
    shown = scores >= score_threshold
    explained = np.zeros(len(truth), dtype=bool)
    explained[target[shown & matched]] = True

    kind = np.where(matched, "mislabelled", "spurious").astype(object)
    boxes, true_boxes = _side_by_side(found, truth)
    free = np.flatnonzero(shown & ~matched)  # what found nothing is to be explained
    of_box, of_truth = shapely.STRtree(shapely.box(*true_boxes.T)).query(
        shapely.box(*boxes[free].T)
    )
    of_box, iou = free[of_box], np.zeros(len(found))
    pairs_iou = imutils.pair_iou(boxes[of_box], true_boxes[of_truth])
    np.maximum.at(iou, of_box, pairs_iou)
    twins = np.flatnonzero(explained[of_truth] & (pairs_iou >= iou_threshold))
    twins = twins[np.argsort(pairs_iou[twins], kind="stable")]  # what is written last stays
    target[of_box[twins]], kind[of_box[twins]] = of_truth[twins], "duplicate"

    # one to one, so that no object is told of twice
    free, open_ = free[kind[free] == "spurious"], np.flatnonzero(~explained)
    near = metrics.match_boxes(boxes[free], scores[free], true_boxes[open_], LEAST_IOU)
    free, near = free[near >= 0], open_[near[near >= 0]]
    target[free], kind[free], explained[near] = near, "mislocalised", True

    known = target >= 0
    iou[known] = imutils.pair_iou(boxes[known], true_boxes[target[known]])
    if (iou[matched] < iou_threshold - TOLERANCE).any() or (
        iou[free] > iou_threshold + TOLERANCE
    ).any():
        raise InputError(
            f"the detections were not matched to these objects at an IoU of {iou_threshold}; give "
            "the IOU_THRESHOLD of their run"
        )
    right = matched & (_labels(found) == _labels(truth.reindex(target)))
    wrong, missed = np.flatnonzero(shown & ~right), np.flatnonzero(~explained)

    detected = found.assign(iou=iou).reindex(np.concatenate([wrong, finder[missed]]))
    true = truth.reindex(np.concatenate([target[wrong], missed]))
    common = ["raster", "block", "label", *BOX_COLUMNS]
    own = pd.concat([found.loc[wrong, common], truth.loc[missed, common]])
    kinds = np.concatenate([kind[wrong], np.full(len(missed), "missed")])
    errors = annotations.measure_bboxes(own).assign(
        kind=pd.Categorical(kinds, KINDS),
        true_label=true["label"].to_numpy(),
        **{name: detected[name].to_numpy(dtype=float) for name in ("score", "iou")},
        **dict(zip(TRUE_BOX_COLUMNS, true[BOX_COLUMNS].to_numpy(dtype=float).T, strict=True)),
        object=true["object"].fillna(-1).to_numpy(dtype=int),
        detection=detected["detection"].fillna(-1).to_numpy(dtype=int),
    )
    keys = ["kind", "score", "diameter"]
    errors = errors.sort_values(keys, ascending=[True, False, False], ignore_index=True)
    return errors[COLUMNS]


def _targets(found: pd.DataFrame, truth: pd.DataFrame) -> np.ndarray:
    """Return the row of the object that each detection found, -1 for none."""
    keys = (found[["block", "found"]], truth[["block", "object"]])
    of_found, of_truth = (pd.MultiIndex.from_arrays(key.to_numpy(dtype=int).T) for key in keys)
    if of_truth.has_duplicates:
        raise InputError(
            f"the objects {list(of_truth[of_truth.duplicated()][:3])} (block, object) are listed "
            "twice; take the tables of one trial"
        )
    target = of_truth.get_indexer(of_found)
    if strangers := int(((target < 0) & (found["found"] >= 0)).sum()):
        raise InputError(
            f"{strangers} detections found objects that are not listed; take both tables of one "
            "trial, whole"
        )
    return target


def _labels(df: pd.DataFrame) -> np.ndarray:
    return df["label"].astype(str).to_numpy()


def _side_by_side(found: pd.DataFrame, truth: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes moved apart along x block by block, so that one index serves all blocks."""
    blocks, _ = pd.factorize(pd.concat([found["block"], truth["block"]]))
    boxes = np.concatenate([df[BOX_COLUMNS].to_numpy(dtype=float) for df in (found, truth)])
    step = np.ptp(boxes[:, [0, 2]]) + 1 if len(boxes) else 0.0
    boxes[:, [0, 2]] += (blocks * step)[:, None]
    return boxes[: len(found)], boxes[len(found) :]


def count_errors(errors: pd.DataFrame) -> pd.DataFrame:
    """Count errors: a row for each kind, a column for each label, and last `(all)` labels."""
    counts = pd.crosstab(errors["kind"].astype(str), errors["label"])
    counts = counts.reindex(pd.Index(KINDS, name="kind"), fill_value=0)
    return counts.assign(**{"(all)": counts.sum(axis=1)})


def write_atlas(
    errors: pd.DataFrame, rasters: Mapping[str, fileio.Raster], folder: Path
) -> list[Path]:
    """Write the errors of each raster to a file of their own, whole or not at all.

    Where the raster has a CRS, a GeoPackage in it: a layer of boxes for each kind, in a colour of
    its own, with the other columns but those in px. Without, a CSV of all columns, in px. A file of
    an earlier call goes if its raster has no error any more. What is up to date already stays as it
    is, with whatever was noted in it since.

    Args:
        errors: See `classify_errors`, or of a segmentation `maps.find_errors`, whose regions are
            then written as polygons; further columns are written as they are.
        rasters: Identifier -> raster.
        folder: Where `<identifier>.gpkg` or `<identifier>.csv` go.

    Returns:
        The files.

    Raises:
        InputError: Errors lie on a raster that is not given.
    """
    if unknown := sorted(set(errors["raster"]) - set(rasters)):
        raise InputError(
            f"errors lie on {unknown}, but the rasters are {sorted(rasters)}; add them"
        )
    folder = Path(folder)
    paths = {
        name: folder / f"{name}{'.csv' if raster.crs is None else '.gpkg'}"
        for name, raster in rasters.items()
    }
    with_errors = [name for name in rasters if (errors["raster"] == name).any()]
    places = {
        name: [rasters[name].crs, rasters[name].transform, rasters[name].pixel_size_xy]
        for name in with_errors
    }
    made_from = {"errors": fileio.fingerprint(errors), "places": places}
    if not fileio.is_finished(folder / MANIFEST, made_from):
        with fileio.exclusive(folder, wait=True):
            (folder / MANIFEST).unlink(missing_ok=True)
            for name, path in paths.items():
                mine = errors[errors["raster"] == name]
                if mine.empty:
                    path.unlink(missing_ok=True)
                    continue
                if path.suffix == ".gpkg":
                    mine = mine.drop(columns=TRUE_BOX_COLUMNS, errors="ignore")
                else:
                    mine = mine.drop(columns="geometry", errors="ignore")
                labels, layers = mine["label"].dropna().unique(), {"layer_column": "kind"}
                with fileio.annotation_writer(path, rasters[name], labels, **layers) as append:
                    append(mine)
            outputs = [paths[name].name for name in with_errors]
            fileio.mark_finished(folder / MANIFEST, made_from, outputs)
    log.info("%d errors on %d rasters in %s", len(errors), len(with_errors), folder)
    return [paths[name] for name in with_errors]
