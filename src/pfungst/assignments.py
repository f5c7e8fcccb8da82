"""Groups found on a random part of a large class -> all of its samples.

A class of more than ``LARGE`` samples is analysed on a part drawn by lot; each other sample then gets its groups, its
cluster and its outlier score from that part, block by block, so the whole class is never held.  What is approximated:

- A group must have ``min_size`` members in the part, or it is not found: 8 of 5000 are 0.16 % of the class, and one
  sample in 300 is found nearly always.
- Other samples join a group where the group's discriminant, fitted on the part, puts them beyond the valley of the
  part's held-out scores.  They had no part in the fit, so they are held out by construction.
- The suspicion of a group, the spectrum and its p-value are those of the part.
- Cluster: that of the nearest sample of the part.  Outlier score: by the distance to the nearest of the part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pfungst.findings import Group, fit_discriminants, held_out_scores, is_clear, prepare_view, valley_of
from pfungst.neighbours import distances_to_nearest, find_nearest_in, neighbour_count
from pfungst.vectors import unit_rows

LARGE = 5000  # samples of a class up to which everything is exact
_VIEWS = 3  # views whose mean score decides, as for suspicion


def draw_part(count: int, seed: int) -> np.ndarray:
    """Which of ``count`` samples of a class are analysed: all, or ``LARGE`` by lot, ascending."""
    if count <= LARGE:
        return np.arange(count)
    return np.sort(np.random.default_rng([seed, count]).permutation(count)[:LARGE])


def thin(rows: np.ndarray) -> np.ndarray:
    """These rows, or ``LARGE`` of them by lot, ascending: what is read where a mean or an order is wanted."""
    return rows[draw_part(len(rows), 0)]


@dataclass(frozen=True)
class Assignment:
    """What ``assign`` has to know of the part.

    weights    view -> (d, groups): discriminants over the number of views, 0 where a group does not go by the view
    limits     (groups,) score from which a sample is a member
    clear      (groups,) whether the group's members are in no later group
    part       (s, d) unit rows of the first view; ``cluster`` of each, (s,)
    usual      median of the part's mean distances to its nearest
    """

    weights: Mapping[str, np.ndarray]
    limits: np.ndarray
    clear: np.ndarray
    part: np.ndarray
    cluster: np.ndarray
    usual: float

    @property
    def views(self) -> list[str]:
        """Names of the views that ``assign`` needs, the first one first."""
        return list(self.weights)


def fit_assignment(
    views: Mapping[str, np.ndarray], groups: Sequence[Group], cluster: np.ndarray, seed: int = 0
) -> Assignment:
    """Learn from the part: ``views`` name -> (s, d), its groups in their order of rank, its clusters (s,)."""
    first = next(iter(views))
    size = len(cluster)
    inside = np.zeros((size, len(groups)), dtype=bool)
    outside = np.ones_like(inside)
    taken = np.zeros(size, dtype=bool)
    for column, group in enumerate(groups):
        inside[group.members, column] = True
        outside[:, column] = ~inside[:, column] & ~taken
        if is_clear(group):
            taken |= inside[:, column]
    scores, shifts = np.zeros(inside.shape), np.zeros(len(groups))
    weights = {}
    for name, matrix in views.items():
        shares = np.array([(name in group.views[:_VIEWS]) / min(len(group.views), _VIEWS) for group in groups])
        if name != first and not shares.any():
            continue
        rows = unit_rows(np.asarray(matrix, dtype=np.float64))
        scores += shares * held_out_scores(prepare_view(name, rows, seed), inside, outside)
        directions, offsets = fit_discriminants(rows, inside, outside)
        weights[name] = shares * directions
        shifts += shares * offsets
    valleys = np.array([valley_of(scores[:, i], inside[:, i], outside[:, i])[1] for i in range(len(groups))])
    part = unit_rows(np.asarray(views[first], dtype=np.float64)).astype(np.float32)
    return Assignment(
        weights,
        valleys + shifts,
        np.array([is_clear(group) for group in groups], dtype=bool),
        part,
        cluster,
        float(np.median(distances_to_nearest(part))),
    )


def assign(known: Assignment, views: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of other samples of the class, (m, d) a view: members (m, groups) bool, cluster (m,), outlier score (m,)."""
    rows = {name: unit_rows(np.asarray(views[name], dtype=np.float64)) for name in known.views}
    places = rows[known.views[0]]
    scores = np.zeros((len(places), len(known.limits)))
    for name, weights in known.weights.items():
        scores += rows[name] @ weights
    members = scores > known.limits
    taken = np.zeros(len(places), dtype=bool)
    for column, clear in enumerate(known.clear):
        members[taken, column] = False
        if clear:
            taken |= members[:, column]
    nearest, distances = find_nearest_in(places, known.part, min(neighbour_count(len(known.part)), len(known.part)))
    means = distances.mean(1)
    outlier = means / known.usual if known.usual > 0 else np.ones(len(means))
    return members, known.cluster[nearest[:, 0]], outlier
