"""Two runs beside each other, before and after a repair, or of two models: findings gained, lost and kept.

A finding is kept if the other run has one of the same class with much the same members (Jaccard index ``SAME`` or
more); each is matched with one at most, the most alike first.  Samples are the same if their ids are, and only those
that both runs have are counted: a run of a part of the pictures can keep a finding of the whole.  A finding that is
lost is one that the other run does not show: the model may have given up the cue, or its group fell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from pfungst.findings import SAME, jaccard
from pfungst.reports import place_in_report
from pfungst.store import Run

CHANGES = 200  # samples with another decision that are named
_LEAST_SHARED = 4  # members in both findings that are one, or all of the smaller one's: fewer may be the same by chance


def compare_runs(left: Run, right: Run) -> dict[str, Any]:
    """What ``right`` has that ``left`` has not, and the other way round, as JSON has it.

    runs         path, model, preset, pictures and verdicts of each
    differences  what the two runs differ in, beside their findings: name, left, right
    kept         left, right (ids), class, jaccard, verdicts, changed (the verdict), sizes, shared (samples of both
                 findings), in_both (how many of each finding's samples both runs have, of which jaccard is)
    lost, gained id, class, verdict, size, place, in_both, and id and Jaccard index of the most alike finding, if any
    samples      see ``compare_samples``
    """
    both = [_open(run) for run in (left, right)]
    records: list[list[dict[str, Any]]] = [content["findings"] for _, content in both]
    common = _find_common((left, right), records)
    pairs = match_findings(records[0], records[1], common)
    matched = ({pair.left for pair in pairs}, {pair.right for pair in pairs})
    return {
        "version": 1,
        "runs": [_head(run, *one) for run, one in zip((left, right), both, strict=True)],
        "differences": list(find_differences(both[0][0], both[1][0])),
        "kept": [_kept(records[0][pair.left], records[1][pair.right], pair, common) for pair in pairs],
        "lost": _lones(records[0], matched[0], records[1], common),
        "gained": _lones(records[1], matched[1], records[0], common),
        "samples": compare_samples(left, right),
    }


@dataclass(frozen=True)
class Pair:
    """Two findings that are one: positions in their lists, and the Jaccard index of their members in both runs."""

    left: int
    right: int
    jaccard: float


def match_findings(
    left: Sequence[Mapping[str, Any]], right: Sequence[Mapping[str, Any]], common: Set[str]
) -> list[Pair]:
    """Pairs of findings of one class and much the same members, in the order of ``left``.

    ``common``: ids of the samples that both runs have; members that are not among them count to nothing.
    """
    members = [[_members(one, common) for one in records] for records in (left, right)]
    pairs = [
        Pair(i, j, jaccard(members[0][i], members[1][j]))
        for i, a in enumerate(left)
        for j, b in enumerate(right)
        if a["class"] == b["class"]
        and len(np.intersect1d(members[0][i], members[1][j]))
        >= min(_LEAST_SHARED, len(a["samples"]), len(b["samples"]))
    ]
    found: list[Pair] = []
    for pair in sorted(pairs, key=lambda pair: (-pair.jaccard, pair.left, pair.right)):
        free = all(pair.left != one.left and pair.right != one.right for one in found)
        if pair.jaccard >= SAME and free:
            found.append(pair)
    return sorted(found, key=lambda pair: pair.left)


def find_differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Model, data, preset, settings and versions (of two ``run.json``) that are not the same."""
    known = [_facts(description) for description in (left, right)]
    names = dict.fromkeys([*known[0], *known[1]])
    pairs = ((name, known[0].get(name), known[1].get(name)) for name in names)
    return [{"name": name, "left": a, "right": b} for name, a, b in pairs if a != b]


def compare_samples(left: Run, right: Run) -> dict[str, Any]:
    """The samples that both have: how many, with how many the decision is another, and which (``CHANGES`` at most).

    repaired, broken  decisions that became right, and that became wrong, where the samples have labels
    accuracy          of the samples that both have and that are labelled, left and right; None if there are none
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    wanted = ["id", "label", "prediction"]
    tables = [pq.read_table(run.path / "samples.parquet", columns=wanted) for run in (left, right)]
    ids = [table.column("id").combine_chunks() for table in tables]
    place = pc.index_in(ids[0], value_set=ids[1])
    here = np.flatnonzero(place.is_valid().to_numpy(zero_copy_only=False))
    there = place.drop_null().to_numpy(zero_copy_only=False)
    rows = [pa.array(here), pa.array(there)]
    before, after = (table.column("prediction").take(r) for table, r in zip(tables, rows, strict=True))
    labels = tables[1].column("label").take(rows[1])
    changed = np.flatnonzero(_true(pc.not_equal(before, after)))
    right_before, right_after = (_true(pc.equal(one, labels)) for one in (before, after))
    labelled = int(labels.is_valid().to_numpy(zero_copy_only=False).sum()) if len(labels) else 0
    named = pa.array(changed[:CHANGES])
    columns = [ids[0].take(pa.array(here)).take(named), labels.take(named), before.take(named), after.take(named)]
    return {
        "common": len(here),
        "only": [len(ids[0]) - len(here), len(ids[1]) - len(here)],
        "changed": len(changed),
        "repaired": int((~right_before & right_after).sum()),
        "broken": int((right_before & ~right_after).sum()),
        "accuracy": [int(one.sum()) / labelled for one in (right_before, right_after)] if labelled else None,
        "first": [
            {"id": name, "label": label, "decisions": [was, now], "rows": [int(here[i]), int(there[i])]}
            for i, name, label, was, now in zip(
                changed[:CHANGES], *(column.to_pylist() for column in columns), strict=True
            )
        ],
    }


def tell_comparison(found: Mapping[str, Any]) -> list[str]:
    """A comparison in lines."""
    lines = [f"{side}: {run['path']}: {run['model']}" for side, run in zip("AB", found["runs"], strict=True)]
    lines += [f"  {one['name']}: {_short(one['left'])} | {_short(one['right'])}" for one in found["differences"]]
    for kind in ("kept", "lost", "gained"):
        confirmed = sum("confirmed" in (one["verdicts"] if kind == "kept" else [one["verdict"]]) for one in found[kind])
        lines.append(
            f"{kind}: {len(found[kind]) or 'none'}" + (f", {confirmed} of them confirmed" if confirmed else "")
        )
        for one in found[kind]:
            if kind == "kept":
                verdicts = " -> ".join(one["verdicts"]) if one["changed"] else one["verdicts"][0]
                text = f"{one['left']} = {one['right']}, {one['class']}: {verdicts} (Jaccard {one['jaccard']:.2f}"
                if one["in_both"] != one["sizes"]:
                    of = " and ".join(map(_tell_part, one["sizes"], one["in_both"]))
                    text += f" of the pictures that both runs have: {of}"
                text += ")"
            else:
                text = f"{one['id']}, {one['class']}: {one['verdict']}, {one['size']} pictures, {one['place']}"
                if one["in_both"] < one["size"]:
                    text += f"; the other run has {one['in_both'] or 'none'} of these pictures"
            lines.append(f"  {text}")
    samples = found["samples"]
    if any(samples["only"]):
        sizes = [samples["common"] + more for more in samples["only"]]
        lines.append(
            f"samples: {samples['common']} in both runs, of {sizes[0]} and {sizes[1]}; by these findings are compared"
        )
    text = f"decisions: {samples['changed']} of the {samples['common']} samples of both are another"
    if samples["accuracy"] is not None:
        text += f"; {samples['repaired']} became right, {samples['broken']} wrong"
        text += f"; accuracy {samples['accuracy'][0]:.1%} -> {samples['accuracy'][1]:.1%}"
    return [*lines, text]


def _open(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """``run.json`` and ``findings.json``.  RunError where the run is not finished."""
    run.check_finished()
    return run.describe(), run.read_findings()


def _head(run: Run, description: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    verdicts = [finding["verdict"] for finding in content["findings"]]
    return {
        "path": str(run.path),
        "name": run.path.name,
        "model": description["model"]["name"],
        "preset": description["preset"],
        "images": description["data"]["root"],
        "samples": description["data"]["samples"],
        "counts": {verdict: verdicts.count(verdict) for verdict in ("confirmed", "open", "refuted")},
    }


def _kept(left: Mapping[str, Any], right: Mapping[str, Any], pair: Pair, common: Set[str]) -> dict[str, Any]:
    return {
        "left": left["id"],
        "right": right["id"],
        "class": left["class"],
        "jaccard": pair.jaccard,
        "verdicts": [left["verdict"], right["verdict"]],
        "changed": left["verdict"] != right["verdict"],
        "sizes": [left["size"], right["size"]],
        "places": [left["where"]["place"], right["where"]["place"]],
        "shared": len(np.intersect1d(left["samples"], right["samples"])),
        "in_both": [len(_members(one, common)) for one in (left, right)],
    }


def _lones(
    records: Sequence[Mapping[str, Any]],
    matched: set[int],
    others: Sequence[Mapping[str, Any]],
    common: Set[str],
) -> list[dict[str, Any]]:
    """Those of the findings that have no match, in the order of a report: what is confirmed first."""
    alone = [record for i, record in enumerate(records) if i not in matched]
    known = [(one, _members(one, common)) for one in others] if alone else []
    return [_lone(record, known, common) for record in sorted(alone, key=place_in_report)]


def _lone(
    record: Mapping[str, Any], others: Sequence[tuple[Mapping[str, Any], np.ndarray]], common: Set[str]
) -> dict[str, Any]:
    own = _members(record, common)
    alike = [(jaccard(own, members), one["id"]) for one, members in others if one["class"] == record["class"]]
    best = max(alike, default=(0.0, ""))
    return {
        "id": record["id"],
        "class": record["class"],
        "verdict": record["verdict"],
        "size": record["size"],
        "place": record["where"]["place"],
        "in_both": len(own),
        "nearest": {"id": best[1], "jaccard": best[0]} if best[0] > 0 else None,
    }


def _members(record: Mapping[str, Any], common: Set[str]) -> np.ndarray:
    """Ids of a finding's samples that both runs have, ascending."""
    return np.unique([name for name in record["samples"] if name in common])


def _find_common(runs: Sequence[Run], records: Sequence[Sequence[Mapping[str, Any]]]) -> set[str]:
    """Ids that both runs have, among those of the findings' samples."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    named = pa.array(sorted({name for side in records for one in side for name in one["samples"]}), pa.string())
    for run in runs:
        known = pq.read_table(run.path / "samples.parquet", columns=["id"]).column("id").combine_chunks()
        named = named.filter(pc.is_in(named, value_set=known))
    return set(named.to_pylist())


def _tell_part(size: int, in_both: int) -> str:
    return f"{size}" if size == in_both else f"{in_both} of {size}"


def _facts(description: Mapping[str, Any]) -> dict[str, Any]:
    """What one run was of, flat, by a name for each."""
    data, model = description["data"], description["model"]
    return {
        "model": model["name"],
        "model's digest": model["digest"],
        "layers": model["layers"],
        "preprocessing": model["preprocess"],
        "preset": description["preset"],
        "pictures": data["root"],
        "pictures' digest": data["digest"],
        "samples": data["samples"],
        "classes": data["classes"],
        "explained": data["target"],
        # A preset of a file stands there whole, and above in words.
        **{f"setting {k}": v["name"] if isinstance(v, dict) else v for k, v in description["settings"].items()},
        **{f"version of {name}": value for name, value in description["versions"].items()},
    }


def _true(values: Any) -> np.ndarray:
    """A column of truths; what is not known is not true."""
    found: np.ndarray = values.fill_null(False).to_numpy().astype(bool)
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:40]} ... {text[-14:]}"
