"""Views of a class -> candidate groups -> findings, ranked by suspicion.

A finding is a group of samples of one class that the model recognises in its own way.  Groups come from the spectra
of every view and from mixtures in its leading directions; groups that are much the same are merged, and each is
scored by how deep a valley separates it from the rest of its class, on samples that did not choose the direction.
A finding is a suspicion; only ``interventions.py`` turns it into a verdict.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from threadpoolctl import threadpool_limits

from pfungst.spectra import Spectrum, cluster_samples, measure_spectrum
from pfungst.vectors import unit_rows

_LEADING = 15  # principal coordinates in which groups are sought, of the ``_SCORED``
_DIRECTIONS = 5  # the first of them, in which mixtures are sought
_SCORED = 60  # principal coordinates in which groups are scored
_FOLDS = 5
_RIDGE = 0.2  # share of a sphere in the covariance of the discriminant
SAME = 0.6  # Jaccard index from which two groups count as one
_VIEWS_THAT_COUNT = 3
_CLEAR = 0.5  # valley depth from which a view is said to show the group, and from which its members are taken out


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


def is_clear(group: Group) -> bool:
    """Whether the group is so clearly apart that its members are taken out of the class (see ``rank_groups``)."""
    return group.suspicion >= _CLEAR


def find_groups(
    views: Mapping[str, np.ndarray], *, min_size: int = 8, max_share: float = 0.6, null_draws: int = 19, seed: int = 0
) -> tuple[list[Group], Spectrum]:
    """Candidate groups of one class, most suspicious first, and the spectrum of its first view.

    views     name -> (n, d), rows aligned; see ``vectors.py``
    min_size  smaller groups are not tested; outliers are not findings
    """
    with threadpool_limits(1):  # matrices this small are slower on several threads
        rows = {name: unit_rows(np.asarray(matrix, dtype=np.float64)) for name, matrix in views.items()}
        first = next(iter(rows))
        n = len(rows[first])
        spectrum = measure_spectrum(rows[first], null_draws=null_draws, seed=seed)
        groups: list[Group] = []
        prepared = [prepare_view(name, matrix, seed) for name, matrix in rows.items()]
        for view in prepared:
            leading = view.rows[:, :_LEADING]
            shape = spectrum if view.name == first else measure_spectrum(leading, null_draws=0, seed=seed)
            for members in _partitions(leading, shape, seed):
                if min_size <= len(members) <= max_share * n:
                    groups.append(Group(members, (view.name,)))
        return rank_groups(_unique(groups), prepared, min_size), spectrum


def principal_coordinates(vectors: np.ndarray, dimensions: int) -> np.ndarray:
    """Coordinates of (n, d) vectors along their leading principal directions, unscaled, (n, at most ``dimensions``)."""
    centred = vectors - vectors.mean(0)
    kept = min(dimensions, len(vectors) - 1, vectors.shape[1])
    if len(centred) <= centred.shape[1]:
        values, u = np.linalg.eigh(centred @ centred.T)
        return u[:, ::-1][:, :kept] * np.sqrt(np.maximum(values[::-1][:kept], 0))
    _, v = np.linalg.eigh(centred.T @ centred)
    return centred @ v[:, ::-1][:, :kept]


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


# ---- suspicion -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """One view, ready to score any group in it.

    rows       (n, d) principal coordinates
    fold       (n,) the fold in which a sample is held out
    precision  by fold: (d, d) inverse of the covariance of the other folds, with a ridge
    """

    name: str
    rows: np.ndarray
    fold: np.ndarray
    precision: tuple[np.ndarray, ...]


def prepare_view(name: str, vectors: np.ndarray, seed: int = 0) -> View:
    """A view for ``score_groups``.  The costly part of a discriminant, its covariance, is the same for all groups."""
    rows = principal_coordinates(vectors, _SCORED)
    fold = np.random.default_rng(seed).permutation(len(rows)) % _FOLDS
    precision = tuple(_precision(rows[fold != held], vectors.shape[1]) for held in range(_FOLDS))
    return View(name, rows, fold, precision)


def fit_discriminants(vectors: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The discriminants of ``held_out_scores``, fitted on all samples: (d, groups) and offsets (groups,).

    For vectors (n, d) like these, ``vectors @ directions - offsets`` is about +0.5 inside and -0.5 outside.
    """
    rows = principal_coordinates(vectors, _SCORED)
    mean = vectors.mean(0)
    lengths = (rows**2).sum(0)
    axes = (vectors - mean).T @ rows / np.where(lengths > 0, lengths, 1)  # (d, coordinates), orthonormal
    precision = _precision(rows, vectors.shape[1])
    a, b = (part.T.astype(float) @ rows / np.maximum(part.sum(0), 1)[:, None] for part in (inside, outside))
    directions = (a - b) @ precision
    gap = np.maximum(((a - b) * directions).sum(1), 1e-12)
    weights = axes @ (directions / gap[:, None]).T
    return weights, ((a + b) * directions).sum(1) / 2 / gap + mean @ weights


def _precision(rows: np.ndarray, dimensions: int) -> np.ndarray:
    """Inverse of the covariance of ``rows``, with the ridge that ``_RIDGE`` says, of vectors of ``dimensions``."""
    covariance = np.atleast_2d(np.cov(rows.T, bias=True))
    ridge = _RIDGE * np.trace(covariance) / dimensions + 1e-12
    inverse: np.ndarray = np.linalg.inv((1 - _RIDGE) * covariance + ridge * np.eye(rows.shape[1]))
    return inverse


def held_out_scores(view: View, inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Scores of all samples along the discriminant of each group, fitted without the sample's own fold, (n, groups).

    ``inside``, ``outside``: (n, groups) bool.  A score is about +0.5 inside and -0.5 outside.  The covariance of all
    samples stands in for the one within the groups: the direction is the same (Sherman-Morrison), as long as every
    sample is in one of the two.
    """
    scores = np.zeros(inside.shape)
    groups = inside.shape[1]
    parts = np.hstack([inside, outside]).astype(float)
    sums, sizes = parts.T @ view.rows, parts.sum(0)
    for held, precision in enumerate(view.precision):
        out = view.fold == held
        rows = view.rows[out]
        means = (sums - parts[out].T @ rows) / np.maximum(sizes - parts[out].sum(0), 1)[:, None]
        a, b = means[:groups], means[groups:]
        directions = (a - b) @ precision
        gap = np.maximum(((a - b) * directions).sum(1), 1e-12)
        middle = ((a + b) * directions).sum(1) / 2
        scores[out] = (rows @ directions.T - middle) / gap
    return scores


def valley_depth(scores: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> float:
    """How deep a valley of density lies between the group and the rest, 0 (none: one cloud) to 1 (a clean gap).

    1 - (lowest density between the two modes) / (lower of the densities at the modes), for scores (n,) of samples,
    times the Jaccard index of the group, or of the rest if that is less, with the samples on its side of the valley.
    A group that only cuts a piece off one cloud has no valley, however well it can be told apart; a part of a group
    that stands apart has one, but does not fill its side.
    """
    return valley_of(scores, inside, outside)[0]


def valley_of(scores: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> tuple[float, float]:
    """The depth of the valley, as ``valley_depth`` has it, and the score at its bottom (0, halfway, if there is none).

    Scores are scaled as those of ``held_out_scores``.
    """
    high, low = np.median(scores[inside]), np.median(scores[outside])
    if not high > low:
        return 0.0, 0.0
    width = max(0.5 * min(scores[inside].std(), scores[outside].std(), high - low), 0.05 * (high - low))
    points = np.linspace(low, high, 41)
    density = _densities(scores[inside | outside], points, width)
    left, right = int(density[:20].argmax()), 21 + int(density[21:].argmax())
    lower = min(density[left], density[right])
    if not lower > 0:
        return 0.0, 0.0
    bottom = left + int(density[left : right + 1].argmin())
    beyond = scores > points[bottom]
    fills = min(
        (inside & beyond).sum() / (inside | (beyond & outside)).sum(),
        (outside & ~beyond).sum() / (outside | (~beyond & inside)).sum(),
    )
    return float((1 - density[bottom] / lower) * fills), float(points[bottom])


def _densities(scores: np.ndarray, points: np.ndarray, width: float) -> np.ndarray:
    """Σ exp(-((point - score) / width)² / 2) over the scores, at each of 41 evenly spaced points.

    With point 8a + b at c_a + b·h, in widths from the middle, and a score t, the exponent is -(c_a - t)²/2 + b·h·t -
    b·h·c_a - (b·h)²/2: what depends on t is a product of one of 6 and one of 8 numbers, so a third of the exponentials
    will do.  Scores 40 widths beyond the points are put there: they add nothing, and nothing overflows.
    """
    step = (points[-1] - points[0]) / 40 / width
    t = np.clip((scores - points[20]) / width, -20 * step - 40, 20 * step + 40)
    coarse, fine = (np.arange(6) * 8 - 20) * step, np.arange(8) * step
    near = np.exp(-0.5 * (coarse[:, None] - t) ** 2)
    sums = near @ np.exp(fine[:, None] * t).T
    whole: np.ndarray = (sums * np.exp(-fine * coarse[:, None] - 0.5 * fine**2)).ravel()[:41]
    return whole


@dataclass(frozen=True)
class Discriminant:
    """What tells a group from the rest of its class in one view, for samples that the view did not have, too.

    A vector's score is vector . direction - offset, about +0.5 inside and -0.5 outside.  ``valley``: the score from
    which a sample is on the group's side; ``depth``: how clear that is, 0 to 1 (``valley_of``).
    """

    direction: np.ndarray
    offset: float
    valley: float
    depth: float

    def score(self, vectors: np.ndarray) -> np.ndarray:
        """Scores (m,) of vectors (m, d), prepared as those of the view were."""
        scores: np.ndarray = vectors @ self.direction - self.offset
        return scores


def fit_discriminant(vectors: np.ndarray, inside: np.ndarray, seed: int = 0) -> tuple[Discriminant, np.ndarray]:
    """The discriminant of ``score_groups`` from all samples (n, d), and their own scores (n,), each held out.

    ``inside``: (n,) bool.  The valley is that of the held-out scores, which new samples' scores are like.
    """
    with threadpool_limits(1):
        one, rest = inside[:, None], ~inside[:, None]
        held_out = held_out_scores(prepare_view("", vectors, seed), one, rest)[:, 0]
        directions, offsets = fit_discriminants(vectors, one, rest)
        depth, valley = valley_of(held_out, inside, ~inside)
    return Discriminant(directions[:, 0], float(offsets[0]), valley, depth), held_out


def score_groups(groups: Sequence[Group], views: Sequence[View], without: np.ndarray | None = None) -> list[Group]:
    """The groups with their suspicion: the mean valley depth over the views that separate each best.

    ``without``: rows that count to nothing, because another group has them; no group may have members among them.
    """
    if not groups:
        return []
    n = len(views[0].rows)
    inside = np.zeros((n, len(groups)), dtype=bool)
    for column, group in enumerate(groups):
        inside[group.members, column] = True
    outside = ~inside
    if without is not None:
        outside[without] = False
    depths = np.zeros((len(views), len(groups)))
    usable = np.flatnonzero((inside.sum(0) >= 4) & (outside.sum(0) >= 4))
    for row, view in enumerate(views):
        scores = held_out_scores(view, inside[:, usable], outside[:, usable])
        for i, column in enumerate(usable.tolist()):
            depths[row, column] = valley_depth(scores[:, i], inside[:, column], outside[:, column])
    scored = []
    for column, group in enumerate(groups):
        order = np.argsort(-depths[:, column], kind="stable").tolist()
        best = depths[order[:_VIEWS_THAT_COUNT], column]
        clear = [views[i].name for i in order if depths[i, column] > _CLEAR] or [views[order[0]].name]
        scored.append(replace(group, suspicion=float(best.mean()), views=tuple(clear)))
    return scored


def rank_groups(groups: list[Group], views: Sequence[View], min_size: int = 8) -> list[Group]:
    """Groups scored, most suspicious first, each kind once.

    A group that is much like a more suspicious one, or mostly a part of it, is left out.  A group that is clearly
    apart also sets apart whatever holds some of its members, and the rest of its class; so its members are taken out
    of the class, and the other groups go on with what they have left.
    """
    left = score_groups(groups, views)
    kept: list[Group] = []
    taken: np.ndarray = np.array([], dtype=int)
    while left:
        # Of a group and its complement, which are equally separate, the smaller one is the peculiar one.
        left.sort(key=lambda g: (-round(g.suspicion, 3), len(g.members), g.members.tolist()))
        first = left.pop(0)
        kept.append(first)
        left = [group for group in left if not repeats(group.members, first.members)]
        if not is_clear(first):
            continue
        taken = np.union1d(taken, first.members)
        rest = [replace(group, members=np.setdiff1d(group.members, taken)) for group in left]
        rest = [group for group in rest if len(group.members) >= min_size]
        left = [
            replace(again, suspicion=min(before.suspicion, again.suspicion))
            for before, again in zip(rest, score_groups(rest, views, taken), strict=True)
        ]
    return kept


def repeats(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two groups are much the same, or one is mostly a part of the other."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return jaccard(a, b) >= SAME or both >= 0.8 * min(len(a), len(b))
