"""What a finding is like, in facts a person can check: how the model does on it, whom it shows, what goes with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pfungst.assignments import thin
from pfungst.clusters import explain_membership
from pfungst.maps import Subject
from pfungst.neighbours import find_duplicates
from pfungst.properties import FILED, NAMES, SEEN, describe_group
from pfungst.store import Run
from pfungst.strategies import Candidate
from pfungst.vectors import unit_rows

_SHOWN = 6  # samples of each role that are named
_CHANNELS = 5


@dataclass(frozen=True)
class Columns:
    """What is known of every sample besides its relevance: numbers (n,) with nan, and values with None, by name."""

    numbers: dict[str, np.ndarray]
    values: dict[str, Sequence[Any]]


def read_columns(run: Run, subject: Subject) -> Columns:
    """Measured properties of the pictures, cameras, and the manifest's own columns."""
    import pyarrow as pa

    properties = {
        name: column
        for array, names in (("properties", SEEN), ("file", FILED))
        # New properties come last, and a run that was made before has fewer.
        for name, column in zip(names, run.read_array(array).T.astype(np.float64), strict=False)
    }
    values: dict[str, Sequence[Any]] = {}
    cameras: list[str | None] = [None] * len(subject.data)
    for block in run.blocks_done():
        for row, camera in (run.read_json(f"cameras/{block:06d}.json") or {}).items():
            cameras[int(row)] = camera
    if any(cameras):
        values["camera"] = [camera or "unknown" for camera in cameras]
    table = subject.data.metadata
    if table is None:
        return Columns(properties, values)
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
        key = name if name not in properties else f"metadata:{name}"
        if number:
            properties[key] = np.array([np.nan if v is None else float(v) for v in column.to_pylist()])
        if not pa.types.is_floating(column.type):
            values[key] = column.to_pylist()
    return Columns(properties, values)


def draw_portrait(run: Run, subject: Subject, candidate: Candidate, columns: Columns) -> dict[str, Any]:
    """The facts of one finding, for ``findings.json``.

    traits      what sets the members apart from the rest of their class in properties and metadata
    accuracy, probability  share recognised rightly (where labelled), mean probability of the class
    distinct    how many members are left when near-duplicates count once; duplicates: groups of them, largest first
    central, rim  members that belong most and least clearly; nearest: others that come closest
    channels    by layer: the channels that make the members a cluster, with their share of the evidence

    Of more than ``assignments.LARGE`` members or others, all but traits and accuracy are of as many drawn by lot.
    """
    members, others = candidate.members, candidate.others
    traits = describe_group(members, others, columns.numbers, columns.values)
    ids = subject.data.ids
    view = candidate.shown_in
    some, rest = thin(members), thin(others)
    inside, outside = (unit_rows(run.read_view(view, rows)) for rows in (some, rest))
    centres = np.stack([inside.mean(0), outside.mean(0)])
    evidence, _ = explain_membership(inside, centres, 0)
    order = np.argsort(-evidence, kind="stable")
    near = np.argsort(-explain_membership(outside, centres, 0)[0], kind="stable")
    alike = sorted(find_duplicates(inside), key=lambda group: (-len(group), int(group[0])))
    probability = run.read_array("target_probability")
    return {
        "traits": [_plain(asdict(trait)) for trait in traits[:12]],
        "accuracy": {"members": _accuracy(run, subject, members), "others": _accuracy(run, subject, others)},
        "probability": {"members": float(probability[members].mean()), "others": float(probability[others].mean())},
        "distinct": len(members) - sum(len(group) - 1 for group in alike),
        "duplicates": [[ids[some[i]] for i in group] for group in alike[:_SHOWN]],
        "central": [ids[some[i]] for i in order[:_SHOWN]],
        "rim": [ids[some[i]] for i in order[::-1][:_SHOWN]],
        "nearest": [ids[rest[i]] for i in near[:_SHOWN]],
        "channels": _channels(run, subject, some, rest),
    }


def describe_portrait(portrait: dict[str, Any], size: int) -> list[str]:
    """The facts that a person should not miss, a sentence each."""
    sentences = []
    if portrait["distinct"] < 0.8 * size:
        sentences.append(f"Only {portrait['distinct']} of them are no near-duplicates.")
    inside, outside = portrait["accuracy"]["members"], portrait["accuracy"]["others"]
    if inside is not None and outside is not None and abs(inside - outside) >= 0.1:
        sentences.append(f"The model is right on {inside:.0%} of them, on {outside:.0%} of the others.")
    traits = portrait["traits"]
    named = [trait["text"] for trait in traits if trait["value"] is not None][:1]
    named += [f"they are {t['text']}" if t["name"] in NAMES else t["text"] for t in traits if t["value"] is None][:1]
    return [*sentences, *(f"{text[0].upper()}{text[1:]}." for text in named)]


def explain_place(run: Run, candidate: Candidate) -> np.ndarray:
    """The cells (grid, grid) that make the members a cluster: mean shares of its evidence in the pooled maps."""
    groups = thin(candidate.members), thin(candidate.others)
    inside, outside = (unit_rows(run.read_view("where", rows)) for rows in groups)
    _, shares = explain_membership(inside, np.stack([inside.mean(0), outside.mean(0)]), 0)
    side = round(shares.shape[1] ** 0.5)
    return shares.mean(0).reshape(side, side)


def _channels(run: Run, subject: Subject, members: np.ndarray, others: np.ndarray) -> list[dict[str, Any]]:
    found = []
    for layer in subject.layers:
        inside, outside = (unit_rows(run.read_view(f"what:{layer}", rows)) for rows in (members, others))
        evidence, shares = explain_membership(inside, np.stack([inside.mean(0), outside.mean(0)]), 0)
        mean, whole = shares.mean(0), float(evidence.mean())
        if whole <= 0:  # in this layer the members are no cluster
            continue
        for channel in np.argsort(-mean, kind="stable")[:_CHANNELS]:
            share = float(mean[channel]) / whole
            if share >= 0.05:
                found.append({"layer": layer, "channel": int(channel), "share": round(share, 3)})
    return found


def _accuracy(run: Run, subject: Subject, rows: np.ndarray) -> float | None:
    labels = subject.data.labels[rows]
    known = labels >= 0
    if not known.any():
        return None
    return float((run.read_array("prediction", rows)[known] == labels[known]).mean())


def _plain(trait: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it: no nan."""
    return {key: None if isinstance(value, float) and np.isnan(value) else value for key, value in trait.items()}
