"""Vectors -> neighbour graph: each sample is joined to its k nearest, by Euclidean distance (SpRAy, step 3)."""

from __future__ import annotations

import math

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components


def neighbour_count(n: int) -> int:
    """k = max(3, floor(ln n)): the talk's choice (von Luxburg 2007)."""
    return max(3, math.floor(math.log(max(n, 1))))


def join_neighbours(vectors: np.ndarray, k: int | None = None) -> csr_matrix:
    """The symmetric graph (n, n) with w_ij = 1 if i is among the k nearest of j or the other way round.

    Exact duplicates are safe: a sample is never its own neighbour, whatever its place in the list of the nearest.
    """
    n = len(vectors)
    k = min(neighbour_count(n) if k is None else k, n - 1)
    if k < 1:
        return csr_matrix((n, n))
    nearest, _ = find_nearest(vectors, k)
    graph = csr_matrix((np.ones(nearest.size), (np.repeat(np.arange(n), k), nearest.ravel())), shape=(n, n))
    return graph.maximum(graph.T).tocsr()


def find_nearest(vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k < n nearest others of each sample, nearest first, and their Euclidean distances, each (n, k)."""
    import faiss

    data = np.ascontiguousarray(vectors, dtype=np.float32)
    index = faiss.IndexFlatL2(data.shape[1])
    index.add(data)
    squares, nearest = index.search(data, k + 1)
    own = nearest == np.arange(len(data))[:, None]
    own[~own.any(1), -1] = True  # more than k duplicates: the sample itself is not in its list, the last goes
    distances = np.sqrt(np.maximum(squares[~own].reshape(len(data), k), 0))
    return nearest[~own].reshape(len(data), k), distances


def find_nearest_in(queries: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of ``vectors`` (n, d) to each of other ``queries`` (m, d), nearest first, and their distances."""
    import faiss

    asked, among = (np.ascontiguousarray(rows, dtype=np.float32) for rows in (queries, vectors))
    squares, nearest = faiss.knn(asked, among, k)
    return nearest, np.sqrt(np.maximum(squares, 0))


def distances_to_nearest(vectors: np.ndarray) -> np.ndarray:
    """Mean distance of each sample to its k nearest others, (n,); 0 where there is no other."""
    k = min(neighbour_count(len(vectors)), len(vectors) - 1)
    if k < 1:
        return np.zeros(len(vectors))
    means: np.ndarray = find_nearest(vectors, k)[1].mean(1)
    return means


def measure_outliers(vectors: np.ndarray) -> np.ndarray:
    """Outlier score of each sample, (n,): mean distance to its k nearest over the median of that; about 1 is usual."""
    if len(vectors) == 0:
        return np.ones(0)
    means = distances_to_nearest(vectors)
    middle = float(np.median(means))
    return means / middle if middle > 0 else np.ones(len(vectors))


def find_duplicates(vectors: np.ndarray, distance: float = 0.02) -> list[np.ndarray]:
    """Groups of rows (n, d), of unit norm, that are the same but for trifles: nearer than ``distance`` in a chain."""
    n = len(vectors)
    k = min(max(8, neighbour_count(n)), n - 1)
    if k < 1:
        return []
    nearest, distances = find_nearest(vectors, k)
    close = distances <= distance
    graph = csr_matrix((np.ones(int(close.sum())), (np.nonzero(close)[0], nearest[close])), shape=(n, n))
    _, labels = connected_components(graph, directed=False)
    order = np.argsort(labels, kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(labels))[:-1])
    return [group for group in groups if len(group) > 1]
