"""New pictures placed on a finished analysis: whose findings they share, what they resemble, how odd they are.

Nothing of the run changes: groups, clusters and map are those of the run, and each new picture is measured by what
tells them apart there, as the samples of a large class are that were not in the analysed part (``assignments.py``).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from pfungst.assignments import Assignment, assign, draw_part, fit_assignment
from pfungst.domains.image import load_batch, read_images
from pfungst.errors import SettingError
from pfungst.exports.rows import join_lists, new_file
from pfungst.findings import Discriminant, Group, fit_discriminant
from pfungst.maps import UNREADABLE, Progress, Subject, choose_target, explain_batch
from pfungst.neighbours import find_nearest_in
from pfungst.store import READ, Run
from pfungst.strategies import read_strategies, view_names
from pfungst.vectors import unit_rows

_NEAREST = 3
_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "path", "label", "prediction")),
        ("probability", pa.float64()),
        ("class", pa.string()),
        ("score", pa.float64()),
        ("findings", pa.list_(pa.string())),
        ("cluster", pa.int64()),
        ("outlier", pa.float64()),
        ("nearest", pa.list_(pa.string())),
        ("x", pa.float64()),
        ("y", pa.float64()),
        ("reason", pa.string()),
    ]
)
TARGETS = ("auto", "label", "predicted")
_LEAST_MEMBERS = 4  # of a finding in the part of its class that was analysed


@dataclass(frozen=True)
class Placement:
    """Where one new picture lies.

    class_name   the class for which it was explained, and within which it was compared: its label, or what the model
                 takes it for
    score        logit of that class
    findings     ids of the findings whose members it is like
    cluster, outlier  as of the run's samples: the cluster of the nearest one, and the mean distance to the nearest ones
                 as a multiple of what is usual in the class (1: as usual).  None where the class was not analysed
    nearest      ids of the most similar samples of the run, the nearest first
    x, y         on the run's map of the class: the middle of the nearest; None where there is no map
    reason       why it could not be placed; "" if it was
    """

    id: str
    path: str
    label: str | None = None
    prediction: str | None = None
    probability: float | None = None
    class_name: str | None = None
    score: float | None = None
    findings: tuple[str, ...] = ()
    cluster: int | None = None
    outlier: float | None = None
    nearest: tuple[str, ...] = ()
    x: float | None = None
    y: float | None = None
    reason: str = ""

    def record(self) -> dict[str, Any]:
        """Ready for JSON, with the names that ``samples.parquet`` has."""
        return {"class" if name == "class_name" else name: value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class _ByProperty:
    """A finding told by the properties of its pictures: its discriminant, and the spread of each property."""

    finding: str
    discriminant: Discriminant
    spread: np.ndarray


@dataclass(frozen=True)
class _KnownClass:
    """What was learned of a class: ``findings`` are those of the assignment's groups; ``rows`` its part's samples."""

    assignment: Assignment
    findings: tuple[str, ...]
    by_property: tuple[_ByProperty, ...]
    rows: np.ndarray
    places: np.ndarray  # (s, 2), nan where not on the map


def place_samples(
    run: Run, subject: Subject, images: str | Path, progress: Progress | None = None, target: str = "auto"
) -> list[Placement]:
    """Place the pictures of a folder or manifest; in the order in which they are listed.

    subject  the run's, see ``runs.reopen``
    target   within which class each is compared, as of an audit: its ``label``, what it is ``predicted`` to be, or
             ``auto``: the label where there are labels.  A cue of one class on pictures that are labelled as another is
             seen by ``predicted`` alone

    Raises DataError for what is no folder of pictures, or has no labels and is to be placed by them.
    """
    if target not in TARGETS:
        raise SettingError(f"target is {target!r}", f"it is one of {', '.join(TARGETS)}")
    data = read_images(images, subject.classes)
    there = replace(subject, data=data, mode=choose_target(target, data, subject.classes)[0])
    known = {entry["class_index"]: entry for entry in read_strategies(run) if "cluster" in entry}
    learned: dict[int, _KnownClass] = {}
    found: dict[int, Placement] = {}
    size = subject.settings.batch_size
    for start in range(0, len(data), size):
        if progress is not None:
            progress("placing", start, len(data))
        rows = list(range(start, min(len(data), start + size)))
        inputs, ok, bad = load_batch(data, rows, subject.preprocess, subject.settings.workers)
        for row, why in bad.items():
            found[row] = replace(_begin(there, row), reason=f"{UNREADABLE}{why}")
        if not ok:
            continue
        tensors = explain_batch(there, inputs, np.asarray(ok))
        arrays = {name: values.float().cpu().numpy() for name, values in tensors.items()}
        for index in np.unique(arrays["target"]).astype(int).tolist():
            own = np.flatnonzero(arrays["target"] == index)
            if index in known and index not in learned:
                learned[index] = _learn(run, subject, known[index])
            part = {name: values[own] for name, values in arrays.items()}
            chosen = [ok[i] for i in own]
            found |= dict(zip(chosen, _place(there, chosen, part, learned.get(index), subject), strict=True))
    if progress is not None:
        progress("placing", len(data), len(data))
    return [found[row] for row in range(len(data))]


def _begin(subject: Subject, row: int) -> Placement:
    label = int(subject.data.labels[row])
    name = subject.classes[label] if label >= 0 else None
    return Placement(subject.data.ids[row], str(subject.data.paths[row]), name)


def _learn(run: Run, subject: Subject, entry: dict[str, Any]) -> _KnownClass:
    """From the run's samples of the class, which are those that were analysed."""
    seed = subject.settings.seed
    whole = np.array(entry["rows"], dtype=int)
    part = draw_part(len(whole), seed)
    rows = whole[part]
    ids = np.array([subject.data.ids[row] for row in rows])
    groups, names, by_property = [], [], []
    for record in run.read_findings()["findings"]:
        if record["class_index"] != entry["class_index"]:
            continue
        members = np.flatnonzero(np.isin(ids, record["samples"]))
        if not _LEAST_MEMBERS <= len(members) <= len(rows) - 4:
            continue
        if record["views"][0].startswith("property:"):
            values = run.read_view("properties", rows)
            spread = np.where(values.std(0) > 0, values.std(0), 1.0)
            inside = np.isin(np.arange(len(rows)), members)
            discriminant, _ = fit_discriminant(values / spread, inside, seed)
            by_property.append(_ByProperty(record["id"], discriminant, spread))
        else:
            seen = tuple(view for view in record["views"] if not view.startswith("property:"))
            groups.append(Group(members, seen, record["suspicion"]))
            names.append(record["id"])
    views = {name: run.read_view(name, rows) for name in view_names(subject)}
    assignment = fit_assignment(views, groups, np.array(entry["cluster"])[part], seed)
    places = np.full((len(rows), 2), np.nan)
    if "x" in entry:
        xy = np.array([[np.nan if v is None else v for v in entry[axis]] for axis in ("x", "y")])
        places = xy.T[part]
    return _KnownClass(assignment, tuple(names), tuple(by_property), rows, places)


def _place(
    there: Subject, rows: list[int], arrays: dict[str, np.ndarray], known: _KnownClass | None, subject: Subject
) -> Iterator[Placement]:
    """The pictures ``rows`` of the new data, all explained for one class; ``subject``: the run's."""
    views = {name: arrays[name].reshape(len(rows), -1) for name in view_names(subject)}
    if known is not None:
        members, cluster, outlier = assign(known.assignment, views)
        vectors = unit_rows(views[known.assignment.views[0]].astype(np.float64))
        nearest, _ = find_nearest_in(vectors, known.assignment.part, min(_NEAREST, len(known.rows)))
        also = [
            one.discriminant.score(arrays["properties"][:, : len(one.spread)] / one.spread) > one.discriminant.valley
            for one in known.by_property
        ]
    for i, row in enumerate(rows):
        target, prediction = int(arrays["target"][i]), int(arrays["prediction"][i])
        placed = replace(
            _begin(there, row),
            prediction=subject.classes[prediction],
            probability=float(arrays["probability"][i]),
            class_name=subject.classes[target],
            score=float(arrays["explained"][i]),
        )
        if arrays["status"][i] != READ:
            yield replace(placed, reason="the model returns NaN or infinity")
        elif known is None:
            yield replace(placed, reason=f"the run did not analyse the class {subject.classes[target]!r}")
        else:
            findings = [name for name, inside in zip(known.findings, members[i], strict=True) if inside]
            findings += [one.finding for one, inside in zip(known.by_property, also, strict=True) if inside[i]]
            at = known.places[nearest[i]]
            x, y = (None, None) if np.isnan(at).any() else at.mean(0).round(4).tolist()
            yield replace(
                placed,
                findings=tuple(sorted(findings)),
                cluster=int(cluster[i]),
                outlier=round(float(outlier[i]), 4),
                nearest=tuple(subject.data.ids[known.rows[k]] for k in nearest[i]),
                x=x,
                y=y,
            )


def find_taken_for_others(placed: Sequence[Placement]) -> dict[str, int]:
    """How many were compared within another class than they are recognised as, by that class, most first.

    Where these are labelled pictures that carry a cue of that class, its finding does not name them.
    """
    away = Counter(one.prediction for one in placed if one.prediction and one.class_name != one.prediction)
    return dict(sorted(away.items(), key=lambda item: (-item[1], item[0])))


# ---- tables ----------------------------------------------------------------------------------------------------------


def check_table(out: str | Path) -> Path:
    """The path of a table to be written.  Raises SettingError where it is there already, or of an unknown kind."""
    out = Path(out)
    if out.suffix not in (".csv", ".parquet", ".json"):
        raise SettingError(f"{out} is of no kind of table", "name a .csv, .parquet or .json file")
    if out.exists():
        raise SettingError(f"{out} exists", "give --out another file, or remove it")
    return out


def write_table(placed: list[Placement], out: str | Path) -> None:
    """One row a picture; in CSV, several findings or neighbours are joined by ";"."""
    out = check_table(out)
    records = [one.record() for one in placed]
    with new_file(out) as part:
        if out.suffix == ".json":
            part.write_text(json.dumps(records, indent=1))
            return
        table = pa.Table.from_pylist(records, schema=_SCHEMA)
        if out.suffix == ".csv":
            pyarrow.csv.write_csv(join_lists(table), part)
        else:
            pyarrow.parquet.write_table(table, part)
