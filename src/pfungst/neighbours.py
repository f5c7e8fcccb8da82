"""Vectors -> neighbour graph: each sample is joined to its k nearest, by Euclidean distance (SpRAy, step 3)."""

from __future__ import annotations

import math

import numpy as np
from scipy.sparse import csr_matrix


def neighbour_count(n: int) -> int:
    """k = max(3, floor(ln n)): the talk's choice (von Luxburg 2007)."""
    return max(3, math.floor(math.log(max(n, 1))))


def join_neighbours(vectors: np.ndarray, k: int | None = None) -> csr_matrix:
    """The symmetric graph (n, n) with w_ij = 1 if i is among the k nearest of j or the other way round.

    Exact duplicates are safe: a sample is never its own neighbour, whatever its place in the list of the nearest.
    """
    import faiss

    n = len(vectors)
    k = min(neighbour_count(n) if k is None else k, n - 1)
    if k < 1:
        return csr_matrix((n, n))
    data = np.ascontiguousarray(vectors, dtype=np.float32)
    index = faiss.IndexFlatL2(data.shape[1])
    index.add(data)
    _, nearest = index.search(data, k + 1)
    rows, columns = [], []
    for i, found in enumerate(nearest):
        others = found[(found != i) & (found >= 0)][:k]
        rows.append(np.full(len(others), i))
        columns.append(others)
    row, column = np.concatenate(rows), np.concatenate(columns)
    graph = csr_matrix((np.ones(len(row)), (row, column)), shape=(n, n))
    return graph.maximum(graph.T).tocsr()
