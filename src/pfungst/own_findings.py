"""Findings of a person's own: a group of samples that somebody picked, tested by the experiments of every finding.

Each is ``own/NAME.json`` of the run folder, with its pictures in ``own/NAME/``; no audit writes there.  A verdict is
that of a single test: Holm's correction is over the causes that were tried of this group alone, not over the run's
findings, so that who tests many groups of their own will now and then see one confirmed by chance.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pfungst.assignments import thin
from pfungst.counterevidence import fit_directions
from pfungst.errors import RunError, SettingError
from pfungst.evidence import correct, describe_verdict
from pfungst.findings import Group, prepare_view, score_groups
from pfungst.maps import READ, Subject, make_laboratory
from pfungst.store import Run, timestamp
from pfungst.strategies import Candidate, view_names
from pfungst.vectors import unit_rows
from pfungst.verdicts import as_tested, draw_finding, make_case, make_standard, try_candidate

FOLDER = "own"
LEAST = 6  # members, and others of their class: three choose the region, three are tested
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
STEPS = ("how far apart the group is", "experiments", "pictures")
Tell = Callable[[str, int, int], None]


def write_own(run: Run, name: str, rows: Sequence[int], class_name: str = "", note: str = "") -> dict[str, Any]:
    """Keep a group as a finding of one's own, not tested yet; its record.

    name        letters, digits, "-" and "_", 64 at most
    rows        members, as rows of ``samples.parquet``, all explained as one class
    class_name  that class; may be left out

    Raises SettingError for a name that is none or is taken, and for rows that make no group.
    """
    _check_name(name)
    if _path(run, name).exists():
        raise SettingError(f"there is a finding {name!r} already", "choose another name, or delete it")
    members = np.unique(np.asarray(rows, dtype=np.int64))
    ids, names = _read_ids(run), run.describe()["data"]["classes"]
    if not len(members) or members[0] < 0 or members[-1] >= len(ids):
        raise SettingError(f"rows are to be 0 to {len(ids) - 1}", "give rows of samples.parquet")
    if len(members) < LEAST:
        raise SettingError(f"{len(members)} samples are too few to be tested", f"choose at least {LEAST}")
    if not (run.read_array("status", members) == READ).all():
        raise SettingError("some of these pictures could not be read", "leave them out")
    targets = np.unique(run.read_array("target", members)).tolist()
    if len(targets) > 1:
        told = ", ".join(names[index] for index in targets[:6])
        raise SettingError(f"the samples are explained as several classes: {told}", "choose samples of one class")
    index = int(targets[0])
    if class_name and class_name != names[index]:
        raise SettingError(f"the samples are explained as {names[index]!r}, not {class_name!r}", "choose others")
    record = {
        "version": 1,
        "name": name,
        "class": names[index],
        "class_index": index,
        "note": note,
        "at": timestamp(),
        "rows": members.tolist(),
        "samples": [ids[row] for row in members.tolist()],
        "result": None,
    }
    run.write_json(f"{FOLDER}/{name}.json", record)
    return record


def read_own(run: Run, name: str) -> dict[str, Any]:
    """The record of one.  Raises RunError where there is none of this name."""
    _check_name(name)
    record = run.read_json(f"{FOLDER}/{name}.json")
    if record is None:
        raise RunError(f"there is no finding of your own named {name!r}", "see which there are")
    return dict(record)


def list_own(run: Run) -> list[dict[str, Any]]:
    """The records of all, by name."""
    names = sorted(path.stem for path in (run.path / FOLDER).glob("*.json") if _NAME.fullmatch(path.stem))
    return [read_own(run, name) for name in names]


def delete_own(run: Run, name: str) -> None:
    """Remove one, with its pictures.  Raises RunError where there is none of this name."""
    read_own(run, name)
    _path(run, name).unlink(missing_ok=True)
    shutil.rmtree(run.path / FOLDER / name, ignore_errors=True)


def confirm_own(run: Run, subject: Subject, name: str, tell: Tell | None = None) -> dict[str, Any]:
    """Test one by the experiments that a finding of the audit gets, and keep what comes out in its record.

    tell  is called with (step, done, total)

    Raises RunError where members or the rest of their class are fewer than ``LEAST``.
    """
    told = tell or (lambda step, done, total: None)
    record = read_own(run, name)
    settings, standard = subject.settings, make_standard(subject.settings)
    if list(subject.classes) != run.describe()["data"]["classes"]:
        raise RunError(
            f"{subject.model.name} has other classes than the run's model", "ask a model of the same classes"
        )
    told(STEPS[0], 0, len(STEPS))
    candidate = make_candidate(run, subject, record)
    told(STEPS[1], 1, len(STEPS))
    lab = make_laboratory(subject)
    same = subject.model.digest == run.describe()["model"]["digest"]
    case = make_case(run, subject if same else replace(subject, layers=()), candidate)
    if not same:  # what the run kept of channels is of another model's
        case = replace(case, directions=fit_directions(lab, case, subject.layers, 2 * settings.samples, settings.seed))
    raw, alteration, before, tries = try_candidate(run, subject, lab, case, candidate)
    verdict = correct([raw], [candidate.suspicion], standard, [tries])[0]
    told(STEPS[2], 2, len(STEPS))
    tested = as_tested(candidate, {"alteration": alteration})
    drawn = draw_finding(run, subject, lab, case, verdict, f"{FOLDER}/{name}", tested)
    position = {sample: row for row, sample in zip(record["rows"], record["samples"], strict=True)}
    result = {
        **describe_verdict(verdict),
        "suspicion": candidate.suspicion,
        "views": list(tested.views),
        "where": {"kind": verdict.region.kind, "place": drawn["place"], "box": drawn["box"],
                  "area": verdict.region.area, "source": verdict.region.source},
        "exemplars": [position[one["sample"]] for one in drawn["exemplars"]],
        "before": before,
        "tries": tries,
        "others": len(candidate.others),
        "seed": settings.seed,
        "model": {"name": subject.model.name, "digest": subject.model.digest, "same": same},
        "at": timestamp(),
    }  # fmt: skip
    record = {**read_own(run, name), "result": result}
    run.write_json(f"{FOLDER}/{name}.json", record)
    told(STEPS[2], len(STEPS), len(STEPS))
    return record


def make_candidate(run: Run, subject: Subject, record: dict[str, Any]) -> Candidate:
    """The group as the experiments want it, with the suspicion that an audit would have given it.

    Others are the samples of the class that take part in the clustering and are no members.
    """
    members = np.array(record["rows"], dtype=int)
    if [subject.data.ids[row] for row in members] != record["samples"]:
        raise RunError(f"{run.path} no longer holds the samples of {record['name']}", "delete it and make it again")
    entry = run.read_json(f"classes/{record['class_index']:04d}.json") or {"rows": []}
    others = np.setdiff1d(np.array(entry["rows"], dtype=int), members)
    if min(len(members), len(others)) < LEAST:
        raise RunError(
            f"{len(members)} members and {len(others)} others of class {record['class']!r} are too few to test",
            f"choose at least {LEAST} members, and leave at least {LEAST} others",
        )
    some = thin(members)
    rows = np.sort(np.concatenate([some, thin(others)]))
    inside = np.flatnonzero(np.isin(rows, some))
    views = [
        prepare_view(name, unit_rows(run.read_view(name, rows)), subject.settings.seed) for name in _views(run, subject)
    ]
    (scored,) = score_groups([Group(inside, ())], views)
    return Candidate(record["class_index"], members, others, round(scored.suspicion, 4), scored.views)


def _views(run: Run, subject: Subject) -> list[str]:
    """The views of the run that it kept: those of its own layers, whatever model is asked now."""
    return view_names(replace(subject, layers=tuple(run.describe()["model"]["layers"])))


def _read_ids(run: Run) -> list[str]:
    import pyarrow.parquet as pq

    ids: list[str] = pq.read_table(run.path / "samples.parquet", columns=["id"]).column(0).to_pylist()
    return ids


def _check_name(name: str) -> None:
    """Names become names of files, so few characters are allowed in them."""
    if not _NAME.fullmatch(name):
        raise SettingError(f"{name!r} is no name", "use letters, digits, - and _, beginning with a letter or digit")


def _path(run: Run, name: str) -> Any:
    return run.path / FOLDER / f"{name}.json"
