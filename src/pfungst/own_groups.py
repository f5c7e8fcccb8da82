"""Groups of samples that somebody picked: findings of a person's own, before and after they were tested.

Each is ``own/NAME.json`` of the run folder, with its pictures in ``own/NAME/``; no audit writes there.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from pfungst.errors import RunError, SettingError
from pfungst.store import READ, Run, timestamp

FOLDER = "own"
LEAST = 6  # members, and others of their class: three choose the region, three are tested
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_FINDING = re.compile(r"f\d+")  # what an audit calls its findings


def write_own(run: Run, name: str, rows: Sequence[int], class_name: str = "", note: str = "") -> dict[str, Any]:
    """Keep a group as a finding of one's own, not tested yet; its record.

    name        letters, digits, "-" and "_", 64 at most
    rows        members, as rows of ``samples.parquet``, all explained as one class
    class_name  that class; may be left out

    Raises SettingError for a name that is none or is taken, and for rows that make no group.
    """
    _check_name(name)
    if _FINDING.fullmatch(name):
        raise SettingError(f"{name!r} is what the audit calls its own findings", "choose another name")
    if _path(run, name).exists():
        raise SettingError(f"there is a finding {name!r} already", "choose another name, or delete it")
    members = np.unique(np.asarray(rows, dtype=np.int64))
    ids, names = _read_ids(run), run.describe()["data"]["classes"]
    if not len(members):
        raise SettingError("no rows are given, so there is no group", f"choose at least {LEAST} samples")
    outside = members[(members < 0) | (members >= len(ids))]
    if len(outside):
        told = ", ".join(map(str, outside[:3].tolist())) + ", ..." * (len(outside) > 3)
        raise SettingError(
            f"the run has no rows {told}: its {len(ids)} samples are 0 to {len(ids) - 1}",
            "give rows of samples.parquet",
        )
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


def as_finding(record: dict[str, Any]) -> dict[str, Any]:
    """A record in the words of ``findings.json``; ``own`` tells it from those, and it has no ``rank``.

    Before it was tested it is open, and has no ``evidence``.
    """
    count, note = len(record["samples"]), f": {record['note']}" if record["note"] else ""
    head = {
        "id": record["name"],
        "own": True,
        "class": record["class"],
        "class_index": record["class_index"],
        "size": count,
        "samples": record["samples"],
        "summary": f"{count} pictures of {record['class']} that a person picked{note}",
    }
    return {**head, **(record["result"] or {"verdict": "open", "reason": "not tested yet"})}


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
