"""Findings of a person's own (``own_groups.py``), tested by the experiments of every finding.

A verdict is that of a single test: Holm's correction is over the causes that were tried of this group alone, not over
the run's findings, so that who tests many groups of their own will now and then see one confirmed by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from pfungst.assignments import thin
from pfungst.counterevidence import fit_directions
from pfungst.errors import RunError
from pfungst.evidence import correct, describe_verdict
from pfungst.findings import Group, prepare_view, score_groups
from pfungst.maps import Subject, make_laboratory
from pfungst.own_groups import FOLDER, LEAST, read_own
from pfungst.store import Run, timestamp
from pfungst.strategies import Candidate, view_names
from pfungst.vectors import unit_rows
from pfungst.verdicts import as_tested, draw_finding, make_case, make_standard, try_candidate

STEPS = ("how far apart the group is", "experiments", "pictures")
Tell = Callable[[str, int, int], None]


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
                  "area": verdict.region.area, "source": verdict.region.source, "part": verdict.region.part},
        "exemplars": [position[one["sample"]] for one in drawn["exemplars"]],
        "alteration": alteration,
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
