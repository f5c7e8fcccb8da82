"""Kept maps -> the strategies of each class: spectrum, clusters, candidate groups, and a picture of them.

"Strategy" is SpRAy's word for one way in which a model recognises a class.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pfungst.embeddings import embed
from pfungst.findings import find_groups
from pfungst.maps import READ, Progress, Subject
from pfungst.neighbours import measure_outliers
from pfungst.spectra import cluster_samples
from pfungst.store import Run
from pfungst.vectors import gate_maps, unit_rows


@dataclass(frozen=True)
class Candidate:
    """A group to be tested: ``members`` and ``others`` are rows of the data set."""

    class_index: int
    members: np.ndarray
    others: np.ndarray
    suspicion: float
    views: tuple[str, ...]
    alteration: dict[str, Any] | None = None  # of a group by property: what makes a picture like its members

    @property
    def shown_in(self) -> str:
        """The view of relevance in which to look at the members."""
        return "where" if self.alteration else self.views[0]


def set_aside(run: Run, subject: Subject) -> list[str]:
    """Why a sample takes no part in the clustering, one string a sample; "" for those that do."""
    status = run.read_array("status")
    explained, absorbed = run.read_array("explained"), run.read_array("absorbed")
    target, prediction = run.read_array("target"), run.read_array("prediction")
    reasons = [""] * len(status)
    readable = np.flatnonzero(status == READ)
    maps = run.read_array("where")[readable].reshape(len(readable), -1)  # of all samples: as small as they are kept
    gates = gate_maps(maps, explained[readable], absorbed[readable])
    positive = {int(c): np.median(explained[readable][target[readable] == c]) > 0 for c in np.unique(target[readable])}
    for row, reason in zip(readable, gates, strict=True):
        if not reason and target[row] != prediction[row]:
            reason = "not recognised as its class"
        if not reason and explained[row] <= 0 and positive[int(target[row])]:
            reason = "the model speaks against its class"
        reasons[row] = reason
    unread: dict[str, str] = {}
    for block in run.blocks_done():
        unread.update(run.read_json(f"skipped/{block:06d}.json") or {})
    for row in np.flatnonzero(status != READ):
        reasons[row] = unread.get(subject.data.ids[row], "unreadable: unknown reason")
    return reasons


def find_strategies(run: Run, subject: Subject, progress: Progress) -> None:
    """Analyse every class by itself; each goes into ``classes/NUMBER.json`` as soon as it is done."""
    reasons = set_aside(run, subject)
    good = np.array([not reason for reason in reasons])
    target = run.read_array("target")
    wanted = [subject.only] if subject.only is not None else sorted({int(c) for c in target[good]})
    for done, index in enumerate(wanted):
        progress("strategies", done, len(wanted))
        name = f"classes/{index:04d}.json"
        if run.read_json(name) is None:
            run.write_json(name, _analyse_class(run, subject, index, np.flatnonzero(good & (target == index))))
    progress("strategies", len(wanted), len(wanted))


def _analyse_class(run: Run, subject: Subject, index: int, rows: np.ndarray) -> dict[str, Any]:
    settings = subject.settings
    entry: dict[str, Any] = {"class": subject.classes[index], "class_index": index, "rows": rows.tolist()}
    least = 2 * settings.min_size
    if len(rows) < least:
        note = f"too few samples to look for groups: {len(rows)}, at least {least} are needed"
        return {**entry, "note": note, "groups": []}
    names = ["where", *(f"{kind}:{layer}" for kind in ("what", "strongest") for layer in subject.layers)]
    views = {name: run.read_view(name, rows) for name in names}
    groups, spectrum = find_groups(
        views, min_size=settings.min_size, null_draws=settings.null_draws, seed=settings.seed
    )
    places = unit_rows(views["where"])
    coordinates = embed(places, settings.seed)
    return {
        **entry,
        "eigenvalues": [round(float(v), 6) for v in spectrum.eigenvalues],
        "clusters": spectrum.clusters,
        "gap": spectrum.gap,
        "p": None if np.isnan(spectrum.p) else spectrum.p,
        "cluster": cluster_samples(spectrum, min(spectrum.clusters, 8), settings.seed).tolist(),
        "outlier": [round(float(v), 4) for v in measure_outliers(places)],
        "x": [round(float(v), 4) for v in coordinates[:, 0]],
        "y": [round(float(v), 4) for v in coordinates[:, 1]],
        "groups": [
            {"rows": rows[g.members].tolist(), "views": list(g.views), "suspicion": round(g.suspicion, 4)}
            for g in groups[:20]
        ],
    }


def read_strategies(run: Run) -> Iterator[dict[str, Any]]:
    """The entries of all analysed classes, by class index."""
    for path in sorted((run.path / "classes").glob("*.json")):
        yield run.read_json(f"classes/{path.name}")


def _groups_by_property(run: Run, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """What ``probes.py`` found in a class; nothing where it was not asked."""
    found = run.read_json(f"properties/{entry['class_index']:04d}.json")
    groups: list[dict[str, Any]] = found["groups"] if found else []
    return groups


def rank_candidates(run: Run, subject: Subject) -> tuple[list[Candidate], int]:
    """The groups to be tested, most suspicious first, and how many more were suspicious enough."""
    found = [
        Candidate(
            entry["class_index"],
            np.array(group["rows"]),
            np.setdiff1d(entry["rows"], group["rows"]),
            group["suspicion"],
            tuple(group["views"]),
            group.get("alteration"),
        )
        for entry in read_strategies(run)
        for group in [*entry["groups"], *_groups_by_property(run, entry)]
        if group["suspicion"] >= subject.settings.suspicion
    ]
    found.sort(key=lambda c: (-c.suspicion, c.class_index, c.members[0]))
    most = subject.settings.max_findings
    return found[:most], max(0, len(found) - most)
