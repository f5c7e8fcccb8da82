"""Neighbour graph -> Laplacian -> eigenvalues -> clusters (SpRAy, steps 3 and 4; Lapuschkin et al. 2019).

L = I - D^-1/2 W D^-1/2.  Its small eigenvalues tell how many groups the graph falls into.  The plain largest gap is
near chance at that, so gaps are measured as log ratios from the second eigenvalue on, against a null made from the
class's own maps: one cloud with the same mean and covariance.  One cluster is a good answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.linalg import eigh
from scipy.sparse import csr_matrix, diags
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import LinearOperator, eigsh

from pfungst.neighbours import join_neighbours
from pfungst.vectors import unit_rows

_KEPT = 20_000_000  # normal numbers up to which those of one class are kept for the next: 160 MB
_DENSE = 600  # up to this many samples all eigenvalues at once are quicker, and exact


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues and what follows from them.

    eigenvalues   the smallest ones of the Laplacian, ascending, in 0..2
    eigenvectors  (n, count), columns to match
    components    connected component of each sample, (n,), numbered from the greatest to the smallest
    clusters      how many clusters the gaps tell, >= 1
    p             probability that one structureless cloud shows so great a gap (nan without null draws)
    separability  how separable the clusters are, by which classes are ranked (``measure_separability``), and the
                  probability that as many clusters of a structureless cloud are as separable
    """

    eigenvalues: np.ndarray
    eigenvectors: np.ndarray
    components: np.ndarray
    clusters: int
    gap: float
    p: float
    separability: float = 0.0
    separability_p: float = float("nan")


def find_components(graph: csr_matrix) -> np.ndarray:
    """Connected component of each node, numbered by size, greatest first."""
    _, labels = connected_components(graph, directed=False)
    order = np.argsort(-np.bincount(labels), kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[labels]


def decompose(graph: csr_matrix, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` smallest eigenvalues of the graph's normalised Laplacian and their eigenvectors, ascending.

    A loose tolerance loses clusters of under a percent, so the solver runs to machine precision.  Even so, from one
    start vector it misses copies of a multiple eigenvalue; each connected component has its eigenvalue 0 with a known
    eigenvector, so these are written down and taken out before the solver looks for the others.
    """
    n = graph.shape[0]
    count = min(count, n)
    degree = np.asarray(graph.sum(1)).ravel()
    scale = diags(1 / np.sqrt(np.where(degree > 0, degree, 1)))
    affinity = scale @ graph @ scale
    if n <= _DENSE:
        values, vectors = eigh(affinity.toarray(), subset_by_index=[n - count, n - 1])
    else:
        values, vectors = _solve_large(affinity, find_components(graph), np.sqrt(degree), count)
    order = np.argsort(-values, kind="stable")[:count]
    return np.clip(1 - values[order], 0, 2), vectors[:, order]


def _solve_large(
    affinity: csr_matrix, components: np.ndarray, root: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The greatest eigenvalues of a sparse affinity: a 1 for each component with edges, then those of what is left."""
    n = len(components)
    indicator = csr_matrix((root, (np.arange(n), components)))
    norms = np.sqrt(np.asarray(indicator.power(2).sum(0)).ravel())
    known = (indicator @ diags(1 / np.where(norms > 0, norms, 1)))[:, norms > 0]
    pieces = known.shape[1]
    if pieces >= count:
        return np.ones(count), known[:, :count].toarray()
    known = known.toarray()
    # A - 2 U Uᵀ turns the known eigenvalues 1 into -1, the very end that the solver does not look at.
    turned = known.T
    rest = LinearOperator((n, n), lambda v: affinity @ v - 2 * (known @ (turned @ v)), dtype=np.float64)
    start = np.random.default_rng(0).normal(size=n)
    values, vectors = eigsh(rest, k=min(count, n - 1) - pieces, which="LA", tol=0, v0=start)
    return np.concatenate([np.ones(pieces), values]), np.hstack([known, vectors])


def log_ratio_gaps(eigenvalues: np.ndarray) -> np.ndarray:
    """log(λ_{i+1} / λ_i) from the second eigenvalue on: entry j speaks for j + 2 clusters."""
    values = np.maximum(eigenvalues[1:], 1e-9)
    return np.diff(np.log(values))


def measure_spectrum(vectors: np.ndarray, count: int = 12, null_draws: int = 19, seed: int = 0) -> Spectrum:
    """Neighbour graph, components, eigenvalues, and the number of clusters with its p-value, for (n, d) vectors."""
    graph = join_neighbours(vectors)
    components = find_components(graph)
    eigenvalues, eigenvectors = decompose(graph, count)
    pieces = int(components.max()) + 1
    if len(vectors) < 8 or len(eigenvalues) < 4:
        return Spectrum(eigenvalues, eigenvectors, components, pieces, 0.0, float("nan"))
    gaps = log_ratio_gaps(eigenvalues)
    gap = float(gaps.max())
    told = int(gaps.argmax()) + 2  # clusters that the greatest gap speaks for, whether or not it is beyond chance
    separability = _separability_of(eigenvectors, told, seed)
    null = []
    for draw in _structureless(vectors, null_draws, seed):
        values, its = decompose(join_neighbours(draw), count)
        null.append((float(log_ratio_gaps(values).max()), _separability_of(its, told, seed)))
    p, separability_p = (
        (1 + sum(one[i] >= mine for one in null)) / (1 + len(null)) if null else float("nan")
        for i, mine in enumerate((gap, separability))
    )
    clusters = told if p <= 0.05 else pieces
    return Spectrum(eigenvalues, eigenvectors, components, clusters, gap, p, separability, separability_p)


def _separability_of(eigenvectors: np.ndarray, clusters: int, seed: int) -> float:
    from sklearn.cluster import KMeans

    rows = unit_rows(eigenvectors[:, :clusters])
    labels = KMeans(clusters, n_init=2, max_iter=50, random_state=seed).fit_predict(rows)
    return measure_separability(rows, labels)


def measure_separability(rows: np.ndarray, labels: np.ndarray) -> float:
    """τ = max_w (wᵀ S_b w) / (wᵀ S_w w): Fisher's discriminant between clusters of rows (n, d), >= 0.

    By it Anders et al. 2022 (section 3.1) rank classes over the spectral embedding.  S_w has a ridge of a thousandth of
    the total scatter, so that clusters of one point each have a finite value.
    """
    mean = rows.mean(0)
    within, between = np.zeros((rows.shape[1], rows.shape[1])), np.zeros((rows.shape[1], rows.shape[1]))
    for label in np.unique(labels):
        cluster = rows[labels == label]
        centred, offset = cluster - cluster.mean(0), cluster.mean(0) - mean
        within += centred.T @ centred
        between += len(cluster) * np.outer(offset, offset)
    ridge = 1e-3 * np.trace(within + between) / len(within) + 1e-300
    values = eigh(between, within + ridge * np.eye(len(within)), eigvals_only=True)
    return float(max(values[-1], 0.0))


def _structureless(vectors: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Samples of one Gaussian cloud with the mean and covariance of ``vectors``, scaled like them to unit norm.

    Their coordinates are those along the principal directions, and one more for what of the mean lies across all of
    them: distances, all that a neighbour graph goes by, are those of the cloud itself.
    """
    if draws == 0:
        return
    n, mean = len(vectors), vectors.mean(0)
    centred = (vectors - mean) / np.sqrt(n)
    if n > vectors.shape[1]:  # quicker than singular values
        squares, axes = np.linalg.eigh(centred.T @ centred)
        lengths, directions = np.sqrt(np.maximum(squares, 0)), axes.T
    else:
        _, lengths, directions = np.linalg.svd(centred, full_matrices=False)
    along = directions @ mean
    across = np.linalg.norm(mean - along @ directions)
    for normals in _draw_normals(n, len(lengths), draws, seed):
        yield unit_rows(np.column_stack([along + normals * lengths, np.full(n, across)]))


def _draw_normals(n: int, d: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """``draws`` matrices (n, d) of normal numbers.  The same numbers serve all classes, so those of many small classes
    are drawn once."""
    count = draws * math.prod(-(-size // 128) * 128 for size in (n, d))
    if count > _KEPT:
        rng = np.random.default_rng(seed)
        yield from (rng.normal(size=(n, d)) for _ in range(draws))
        return
    numbers = _normals(count, seed)
    yield from (numbers[k * n * d : (k + 1) * n * d].reshape(n, d) for k in range(draws))


@lru_cache(maxsize=1)
def _normals(count: int, seed: int) -> np.ndarray:
    numbers = np.random.default_rng(seed).normal(size=count)
    numbers.flags.writeable = False
    return numbers


def cluster_samples(spectrum: Spectrum, clusters: int, seed: int = 0) -> np.ndarray:
    """k-means on the row-normalised eigenvectors: the cluster of each sample, (n,)."""
    from sklearn.cluster import KMeans

    if clusters <= 1:
        return np.zeros(len(spectrum.components), dtype=int)
    rows = unit_rows(spectrum.eigenvectors[:, :clusters])
    labels: np.ndarray = KMeans(clusters, n_init=10, random_state=seed).fit_predict(rows)
    return labels
