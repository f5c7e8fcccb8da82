"""All classes together: groups of samples that are alike in their relevance whatever their class.

A watermark on a few pictures of many classes makes no group in any one of them.  So the same analysis runs once over
the samples of all classes (a part drawn by lot of many), and every group is told with the classes that it spans.  What
it holds of a class is tested like any other group of that class, if it is no whole class and not found there already.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pfungst.assignments import draw_part
from pfungst.findings import SAME, Group, View, find_groups, jaccard, prepare_view, score_groups
from pfungst.maps import Progress, Subject
from pfungst.store import Run
from pfungst.strategies import OVERALL, read_strategies, set_aside, view_names
from pfungst.vectors import unit_rows

_MOST = 20  # groups that are kept


def find_shared(run: Run, subject: Subject, progress: Progress) -> None:
    """Analyse the samples of all classes together, if the settings ask for it, into ``overall.json``."""
    if not subject.settings.over_classes:
        return
    progress("all classes", 0, 1)
    settings = subject.settings
    rows = np.flatnonzero([not reason for reason in set_aside(run, subject)])
    rows = rows[draw_part(len(rows), settings.seed)]
    if len(rows) >= 2 * settings.min_size:
        views = {name: run.read_view(name, rows) for name in view_names(subject)}
        groups, spectrum = find_groups(
            views, min_size=settings.min_size, null_draws=settings.null_draws, seed=settings.seed
        )
        target = run.read_array("target", rows)
        records = [
            {
                "rows": rows[group.members].tolist(),
                "views": list(group.views),
                "suspicion": round(group.suspicion, 4),
                "classes": _count(subject, target[group.members]),
            }
            for group in groups[:_MOST]
            if group.suspicion >= settings.suspicion
        ]
        run.write_json(
            OVERALL,
            {
                "analysed": len(rows),
                "eigenvalues": [round(float(v), 6) for v in spectrum.eigenvalues],
                "clusters": spectrum.clusters,
                "p": None if np.isnan(spectrum.p) else spectrum.p,
                "groups": records,
                "parts": _parts(run, subject, [np.array(record["rows"]) for record in records]),
            },
        )
    progress("all classes", 1, 1)


def _count(subject: Subject, target: np.ndarray) -> dict[str, int]:
    """Name of each class in a group -> how many samples it has there, the most first."""
    indices, counts = np.unique(target, return_counts=True)
    return {subject.classes[int(indices[i])]: int(counts[i]) for i in np.argsort(-counts, kind="stable")}


def _parts(run: Run, subject: Subject, groups: list[np.ndarray]) -> list[dict[str, Any]]:
    """What each group holds of each class, scored within the class; not whole classes, nor what was found there."""
    found: list[tuple[int, dict[str, Any]]] = []
    for entry in read_strategies(run):  # read once for all groups
        rows = np.array(entry["rows"], dtype=int)
        rows = rows[draw_part(len(rows), subject.settings.seed)]
        known = [np.array(group["rows"]) for group in entry["groups"]]
        views: list[View] = []
        for number, members in enumerate(groups):
            inside = np.flatnonzero(np.isin(rows, members))
            if not subject.settings.min_size <= len(inside) <= 0.6 * len(rows):
                continue
            if any(jaccard(rows[inside], other) >= SAME for other in known):
                continue
            views = views or [
                prepare_view(name, unit_rows(run.read_view(name, rows)), subject.settings.seed)
                for name in view_names(subject)
            ]
            (group,) = score_groups([Group(inside, ())], views)
            part = {
                "class_index": entry["class_index"],
                "rows": rows[inside].tolist(),
                "views": [*group.views, "all classes together"],
                "suspicion": round(group.suspicion, 4),
            }
            found.append((number, part))
    return [part for _, part in sorted(found, key=lambda one: one[0])]
