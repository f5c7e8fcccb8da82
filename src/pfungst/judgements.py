"""What people say of findings: cheat, legitimate or unsure, by whom and when, in the run folder's ``judgements.jsonl``.

An experiment says that the model uses a cue; whether it may is for a person to say.  The file only grows, a line a
judgement.  A line is written in one piece and synced; one torn by a crash is passed over by readers and never joined
with the next.  No audit writes to the file, and a judgement names its finding by class and members, so that it is
recognised when the audit is made again and the finding has another number.
"""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pfungst.errors import RunError, SettingError
from pfungst.findings import SAME, jaccard
from pfungst.own_groups import as_finding, list_own
from pfungst.store import JUDGEMENTS, Run, timestamp, writing

ANSWERS = ("cheat", "legitimate", "unsure")
WITHDRAWN = "withdrawn"  # the answer of somebody who takes back what was said last
_OTHER = (("model", "another model"), ("data", "other data"))


@dataclass(frozen=True)
class Judgement:
    """What one person said of one finding.

    answer   one of ``ANSWERS``, or ``WITHDRAWN``
    by, at   who, and when (UTC, ISO 8601)
    finding  the finding's id in the run in which it was judged; class and samples are what it is recognised by
    model, data  digests of what the run was of
    """

    answer: str
    note: str
    by: str
    at: str
    finding: str
    class_name: str
    samples: tuple[str, ...]
    model: str
    data: str

    def about(self, description: dict[str, Any]) -> str:
        """What is not the same in the run of this ``run.json`` as where it was made; "" if model and data are."""
        other = [words for name, words in _OTHER if getattr(self, name) != description[name]["digest"]]
        return f"made on {' and '.join(other)}" if other else ""

    def record(self, description: dict[str, Any]) -> dict[str, Any]:
        """What a reader of the finding is told of it."""
        return {
            "answer": self.answer,
            "note": self.note,
            "by": self.by,
            "at": self.at,
            "about": self.about(description),
        }


def write_judgement(run: Run, finding: str, answer: str, *, note: str = "", by: str | None = None) -> Judgement:
    """Write down what a person says of a finding of the run; ``by``: the user of the system if not given.

    Raises SettingError for an answer that is none of these, RunError where the run has no such finding.
    """
    if answer not in (*ANSWERS, WITHDRAWN):
        raise SettingError(f"{answer!r} is no judgement", f"it is one of {', '.join((*ANSWERS, WITHDRAWN))}")
    record = find_any(run, finding)
    description = run.describe()
    judgement = Judgement(
        answer=answer,
        note=_printable(note),
        by=_printable(_user() if by is None else by),
        at=timestamp(),
        finding=record["id"],
        class_name=record["class"],
        samples=tuple(record["samples"]),
        model=description["model"]["digest"],
        data=description["data"]["digest"],
    )
    _append(run, json.dumps({"version": 1, **asdict(judgement)}, ensure_ascii=False))
    return judgement


def find_record(run: Run, finding: str) -> dict[str, Any]:
    """The entry of ``findings.json`` with this id.  Raises RunError where there is none."""
    run.describe()  # an error of its own for what is no run folder
    known = {record["id"]: record for record in run.read_findings()["findings"]}
    if finding not in known:
        raise RunError(f"{run.path} has no finding {finding!r}", f"its findings are: {', '.join(known) or 'none'}")
    found: dict[str, Any] = known[finding]
    return found


def find_any(run: Run, finding: str) -> dict[str, Any]:
    """The entry with this id, or a person's own finding of this name, which has ``own``.  RunError if there is none."""
    own = {record["name"]: record for record in list_own(run)}
    if finding in own:
        return as_finding(own[finding])
    try:
        return find_record(run, finding)
    except RunError as error:
        if not own:
            raise
        raise RunError(error.args[0], f"{error.remedy}; of your own: {', '.join(own)}") from None


def read_judgements(run: Run) -> tuple[list[Judgement], int]:
    """All judgements in the order they were made, and the number of lines that cannot be read."""
    try:
        lines = (run.path / JUDGEMENTS).read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], 0
    found, torn = [], 0
    for line in filter(bytes.strip, lines):
        try:
            entry = json.loads(line)
            entry.pop("version")
            found.append(Judgement(**{**entry, "samples": tuple(entry["samples"])}))
        except (ValueError, TypeError, KeyError, AttributeError):  # UnicodeDecodeError is a ValueError
            torn += 1
    return found, torn


def match_judgements(records: Sequence[dict[str, Any]], judgements: Sequence[Judgement]) -> dict[str, list[Judgement]]:
    """The judgements of each finding, by id, the latest last.

    A judgement is of the finding of its class that shares most samples with the one it was made on, if the Jaccard
    index of the two is ``SAME`` or more; of none otherwise.
    """
    found: dict[str, list[Judgement]] = {record["id"]: [] for record in records}
    for judgement in judgements:
        samples = np.unique(judgement.samples)
        shared = [
            jaccard(np.unique(record["samples"]), samples) if record["class"] == judgement.class_name else 0.0
            for record in records
        ]
        best = int(np.argmax(shared)) if shared else 0
        if shared and shared[best] >= SAME:
            found[records[best]["id"]].append(judgement)
    return found


def add_judgements(run: Run, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of ``findings.json``, each with its ``judgements``, the latest last."""
    matched = match_judgements(records, read_judgements(run)[0])
    description = run.describe()
    return [{**one, "judgements": [j.record(description) for j in matched[one["id"]]]} for one in records]


def last_answer(record: dict[str, Any]) -> str:
    """What a finding with its ``judgements`` counts as now; "" where nobody judged, or it was taken back."""
    answer = str(record["judgements"][-1]["answer"]) if record.get("judgements") else ""
    return "" if answer == WITHDRAWN else answer


def _append(run: Run, line: str) -> None:
    """Add a line, in one piece, and wait until it is on disk."""
    import fcntl

    path = run.path / JUDGEMENTS
    with writing(run.path), path.open("a+b", buffering=0) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # two people at once
        size = handle.seek(0, os.SEEK_END)
        whole = True
        if size:
            handle.seek(-1, os.SEEK_END)
            whole = handle.read(1) == b"\n"
        rest = memoryview((b"" if whole else b"\n") + line.encode() + b"\n")
        while rest:
            rest = rest[handle.write(rest) :]
        os.fsync(handle.fileno())
        folder = os.open(run.path, os.O_RDONLY)  # a new file is there after a crash only if its folder is synced
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _printable(text: str) -> str:
    """Odd bytes of a command line written out, so that files and pages can hold them."""
    return text.encode("utf-8", "backslashreplace").decode()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for its user
        return "unknown"
