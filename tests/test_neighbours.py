"""The neighbour graph against scikit-learn's, and what exact duplicates and tiny data do to it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.neighbors import kneighbors_graph

from pfungst.neighbours import find_nearest, join_neighbours, measure_outliers, neighbour_count
from pfungst.vectors import unit_rows


@pytest.mark.parametrize("n", [1, 2, 3, 20, 53, 54, 55, 148, 149, 403, 404, 1300, 50000])
def test_k_is_the_logarithm_of_n_and_at_least_three(n: int) -> None:
    slow = 3
    while math.e ** (slow + 1) <= n:
        slow += 1
    assert neighbour_count(n) == slow


def _reference(vectors: np.ndarray, k: int) -> np.ndarray:
    """Joined in either direction, from scikit-learn's directed graph."""
    directed = kneighbors_graph(vectors, k, mode="connectivity", include_self=False).toarray()
    return np.maximum(directed, directed.T)


@pytest.mark.parametrize(("n", "k"), [(60, None), (60, 1), (60, 7), (300, None), (5, None)])
def test_graph_equals_that_of_scikit_learn(n: int, k: int | None) -> None:
    vectors = unit_rows(np.random.default_rng(n).normal(size=(n, 12)))
    graph = join_neighbours(vectors, k)
    assert np.array_equal(graph.toarray(), _reference(vectors, neighbour_count(n) if k is None else k))


def test_graph_equals_that_of_scikit_learn_where_vectors_are_much_alike() -> None:
    rng = np.random.default_rng(0)
    vectors = unit_rows(np.ones(40) + 1e-3 * rng.normal(size=(150, 40)))
    assert np.array_equal(join_neighbours(vectors).toarray(), _reference(vectors, 5))


def test_joining_goes_either_way() -> None:
    # The last one is nobody's nearest neighbour, yet it has neighbours.
    line = np.array([[0.0], [1.0], [2.1], [3.3], [50.0]])
    graph = join_neighbours(line, 1).toarray()
    joined = {(0, 1), (1, 2), (2, 3), (3, 4)}
    assert {(i, j) for i, j in np.argwhere(graph) if i < j} == joined


@pytest.mark.parametrize("copies", [2, 4, 5, 30])
def test_duplicates_are_no_neighbours_of_themselves(copies: int) -> None:
    vectors = np.repeat(np.random.default_rng(copies).normal(size=(40, 6)), copies, axis=0)
    vectors = vectors[np.random.default_rng(0).permutation(len(vectors))]
    graph = join_neighbours(vectors).toarray()
    k = neighbour_count(len(vectors))
    assert not graph.diagonal().any()
    assert (graph.sum(1) >= k).all()
    assert np.array_equal(graph, graph.T)
    assert set(np.unique(graph)) == {0, 1}
    if copies > k:  # there is a duplicate for every edge
        rows, columns = graph.nonzero()
        assert np.array_equal(vectors[rows], vectors[columns])


def test_all_the_same() -> None:
    graph = join_neighbours(np.ones((50, 4))).toarray()
    assert not graph.diagonal().any()
    assert (graph.sum(1) >= 3).all()


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4])
def test_of_a_few_samples_all_are_joined(n: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(n, 3))
    assert np.array_equal(join_neighbours(vectors).toarray(), np.ones((n, n)) - np.eye(n))


def test_graph_does_not_depend_on_the_order_of_samples() -> None:
    vectors = np.random.default_rng(1).normal(size=(120, 8))
    order = np.random.default_rng(2).permutation(120)
    assert np.array_equal(
        join_neighbours(vectors[order]).toarray(), join_neighbours(vectors).toarray()[order][:, order]
    )


def test_nearest_are_those_of_a_slow_search() -> None:
    vectors = np.random.default_rng(3).normal(size=(90, 7))
    nearest, distances = find_nearest(vectors, 4)
    for i in range(90):
        others = sorted((math.dist(vectors[i], vectors[j]), j) for j in range(90) if j != i)[:4]
        assert nearest[i].tolist() == [j for _, j in others]
        np.testing.assert_allclose(distances[i], [distance for distance, _ in others], rtol=1e-5)


def test_outlier_scores_are_relative_to_the_usual_distance() -> None:
    vectors = np.random.default_rng(4).normal(size=(80, 5))
    vectors[17] *= 20
    slow = np.array([np.mean(sorted(math.dist(a, b) for b in vectors)[1:5]) for a in vectors])
    scores = measure_outliers(vectors)
    np.testing.assert_allclose(scores, slow / np.median(slow), rtol=1e-4)
    assert scores.argmax() == 17
    assert scores[17] > 5
    assert np.median(scores) == pytest.approx(1)
    np.testing.assert_allclose(measure_outliers(1e3 * vectors), scores, rtol=1e-4)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_outlier_scores_of_a_few_samples(n: int) -> None:
    assert np.array_equal(measure_outliers(np.random.default_rng(0).normal(size=(n, 3))), np.ones(n))
