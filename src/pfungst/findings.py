"""Views of a class -> candidate groups -> findings, ranked by suspicion.

A finding is a group of samples of one class that the model recognises in its own way.  Groups come from the spectra
of every view and from mixtures in its leading directions; groups that are much the same are merged, and each is
scored by how deep a valley separates it from the rest of its class, on samples that did not choose the direction.
A finding is a suspicion; only ``interventions.py`` turns it into a verdict.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from pfungst.spectra import Spectrum, cluster_samples, measure_spectrum
from pfungst.vectors import unit_rows

_DIRECTIONS = 5  # leading principal directions in which mixtures are sought
_SAME = 0.6  # Jaccard index from which two groups count as one
_VIEWS_THAT_COUNT = 3
SUSPICIOUS = 0.5  # valley depth from which a group is a finding; clean data stay below (see the benchmarks)


@dataclass(frozen=True)
class Group:
    """A candidate group within one class.

    members    row numbers within the class, ascending
    views      the views in which it was found, the most separate one first
    suspicion  0..1: mean depth of the valley between the group and the rest, over its best views
    """

    members: np.ndarray
    views: tuple[str, ...]
    suspicion: float = 0.0


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Size of the intersection over size of the union of two sets of numbers."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(1, len(a) + len(b) - both)


def find_groups(
    views: Mapping[str, np.ndarray], *, min_size: int = 8, max_share: float = 0.6, null_draws: int = 19, seed: int = 0
) -> tuple[list[Group], Spectrum]:
    """Candidate groups of one class, most suspicious first, and the spectrum of its first view.

    views     name -> (n, d), rows aligned; see ``vectors.py``
    min_size  smaller groups are not tested; outliers are not findings
    """
    prepared = {name: _leading(unit_rows(np.asarray(matrix, dtype=np.float64))) for name, matrix in views.items()}
    n = len(next(iter(prepared.values())))
    spectrum = measure_spectrum(
        unit_rows(next(iter(views.values())).astype(np.float64)), null_draws=null_draws, seed=seed
    )
    groups: list[Group] = []
    for name, matrix in prepared.items():
        shape = spectrum if name == next(iter(views)) else measure_spectrum(matrix, null_draws=0, seed=seed)
        for members in _partitions(matrix, shape, seed):
            if min_size <= len(members) <= max_share * n:
                groups.append(Group(members, (name,)))
    return rank_groups(_unique(groups), prepared, seed), spectrum


def _leading(vectors: np.ndarray, dimensions: int = 15) -> np.ndarray:
    """Coordinates along the leading principal directions, unscaled."""
    centred = vectors - vectors.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    return (u * s)[:, : min(dimensions, len(vectors) - 1)]


def _partitions(matrix: np.ndarray, spectrum: Spectrum, seed: int) -> Iterator[np.ndarray]:
    """Groups of one view: graph components, spectral clusters, and Gaussian mixtures in the leading directions."""
    from sklearn.mixture import GaussianMixture

    for component in range(1, int(spectrum.components.max()) + 1):
        yield np.flatnonzero(spectrum.components == component)
    for clusters in sorted({2, 3, 4, 5, spectrum.clusters}):
        if 1 < clusters < len(spectrum.eigenvalues):
            labels = cluster_samples(spectrum, clusters, seed)
            yield from (np.flatnonzero(labels == label) for label in range(clusters))
    leading = matrix[:, :_DIRECTIONS]
    spread = leading.var(0).mean()
    if not spread > 0:
        return
    for modes in (2, 3, 4):
        if len(leading) > 10 * modes:
            mixture = GaussianMixture(modes, reg_covar=1e-4 * spread, n_init=2, random_state=seed)
            labels = mixture.fit_predict(leading)
            yield from (np.flatnonzero(labels == label) for label in range(modes))


def _unique(groups: list[Group]) -> list[Group]:
    """Exactly equal groups once, with all their views."""
    by_members: dict[bytes, Group] = {}
    for group in groups:
        key = group.members.tobytes()
        known = by_members.get(key)
        views = group.views if known is None else tuple(dict.fromkeys(known.views + group.views))
        by_members[key] = replace(group, views=views)
    return list(by_members.values())


def score_group(
    group: Group, prepared: Mapping[str, np.ndarray], without: np.ndarray | None = None, seed: int = 0
) -> Group:
    """The group with its suspicion: the mean valley depth over the views that separate it best.

    ``without``: rows that do not count to the rest of the class, because another group has them.
    """
    n = len(next(iter(prepared.values())))
    inside, counts = np.zeros(n, dtype=bool), np.ones(n, dtype=bool)
    inside[group.members] = True
    if without is not None:
        counts[without] = False
        counts |= inside
    if counts.sum() - inside.sum() < 4:
        return replace(group, suspicion=0.0)
    depths = {name: valley_depth(matrix[counts], inside[counts], seed) for name, matrix in prepared.items()}
    ranked = sorted(depths, key=lambda name: -depths[name])
    best = [depths[name] for name in ranked[:_VIEWS_THAT_COUNT]]
    seen = tuple(name for name in ranked if depths[name] > 0.5) or (ranked[0],)
    return replace(group, suspicion=float(np.mean(best)), views=seen)


def valley_depth(matrix: np.ndarray, inside: np.ndarray, seed: int = 0) -> float:
    """How deep a valley of density lies between the group and the rest, 0 (none: one cloud) to 1 (a clean gap).

    The discriminant direction (Fisher's) is fitted on one half of the samples, the density is that of the other half.
    """
    rng = np.random.default_rng(seed)
    fold = np.empty(len(inside), dtype=int)
    for part in (np.flatnonzero(inside), np.flatnonzero(~inside)):
        fold[rng.permutation(part)] = np.arange(len(part)) % 2
    scores = np.empty(len(inside))
    for half in (0, 1):
        fit, apply = fold != half, fold == half
        a, b = matrix[fit & inside], matrix[fit & ~inside]
        if len(a) < 2 or len(b) < 2:
            return 0.0
        within = ((a - a.mean(0)).T @ (a - a.mean(0)) + (b - b.mean(0)).T @ (b - b.mean(0))) / (len(a) + len(b) - 2)
        ridge = 0.1 * np.trace(within) / len(within) + 1e-12
        direction = np.linalg.solve(within + ridge * np.eye(len(within)), a.mean(0) - b.mean(0))
        middle = (a.mean(0) + b.mean(0)) @ direction / 2
        gap = (a.mean(0) - b.mean(0)) @ direction
        scores[apply] = (matrix[apply] @ direction - middle) / max(gap, 1e-12)  # about +0.5 inside, -0.5 outside
    return _valley(scores, inside)


def _valley(scores: np.ndarray, inside: np.ndarray) -> float:
    """1 - (lowest density between the two means) / (lower of the densities at the means)."""
    high, low = np.median(scores[inside]), np.median(scores[~inside])
    if high <= low:
        return 0.0
    width = 0.5 * min(scores[inside].std(), scores[~inside].std(), high - low) + 1e-9
    points = np.linspace(low, high, 41)
    density = np.exp(-0.5 * ((points[:, None] - scores) / width) ** 2).sum(1)
    return float(1 - density.min() / min(density[0], density[-1]))


def rank_groups(groups: list[Group], prepared: Mapping[str, np.ndarray], seed: int = 0) -> list[Group]:
    """Groups scored, most suspicious first, each kind once.

    A group that is much like a more suspicious one, or mostly a part of it, is left out.  What splits a class also
    sets the rest of it apart, so each group is scored against its class without the members of the groups before it.
    """
    left = [score_group(group, prepared, seed=seed) for group in groups]
    kept: list[Group] = []
    taken: np.ndarray = np.array([], dtype=int)
    while left:
        left.sort(key=lambda g: (-g.suspicion, -len(g.members), g.members.tolist()))
        first = left.pop(0)
        kept.append(first)
        left = [group for group in left if not _same(group.members, first.members)]
        if first.suspicion < SUSPICIOUS:
            continue
        taken = np.union1d(taken, first.members)
        left = [replace(group, suspicion=min(group.suspicion, again.suspicion)) for group, again in zip(
            left, [score_group(group, prepared, taken, seed) for group in left], strict=True
        )]  # fmt: skip
    return kept


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two groups are much the same, or one is mostly a part of the other."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return jaccard(a, b) >= _SAME or both >= 0.8 * min(len(a), len(b))
