"""Laplacian, eigenvalues and clusters against dense algebra, and against data whose groups are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.sparse import block_diag, csr_matrix
from scipy.sparse.csgraph import connected_components
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import adjusted_rand_score

from pfungst.neighbours import join_neighbours
from pfungst.spectra import (
    _structureless,
    cluster_samples,
    decompose,
    find_components,
    log_ratio_gaps,
    measure_separability,
    measure_spectrum,
)
from pfungst.vectors import unit_rows


def _laplacian(graph: csr_matrix) -> np.ndarray:
    """I - D^-1/2 W D^-1/2, entry by entry."""
    weights = graph.toarray()
    degree = weights.sum(1)
    n = len(weights)
    out = np.eye(n)
    for i, j in np.argwhere(weights):
        out[i, j] -= weights[i, j] / math.sqrt(degree[i] * degree[j])
    return out


def _cloud(n: int, d: int = 20, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return unit_rows(rng.normal(size=d) + rng.normal(size=(n, d)))


def _clusters(sizes: list[int], spread: float, d: int = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = np.eye(d)[: len(sizes)]
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return unit_rows(centres[labels] + spread * rng.normal(size=(len(labels), d))), labels


@pytest.mark.parametrize("n", [40, 599, 600, 601, 750])
def test_eigenvalues_are_those_of_the_dense_laplacian(n: int) -> None:
    graph = join_neighbours(_cloud(n))
    laplacian = _laplacian(graph)
    values, vectors = decompose(graph, 12)
    assert vectors.shape == (n, 12)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(laplacian)[:12], rtol=0, atol=1e-10)
    np.testing.assert_allclose(laplacian @ vectors, vectors * values, rtol=0, atol=1e-8)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(12), rtol=0, atol=1e-8)


@pytest.mark.parametrize("n", [300, 700])
def test_the_smallest_eigenvalues_are_taken_where_others_are_as_far_from_one(n: int) -> None:
    # Two halves with edges between them only: the spectrum is symmetric about 1, from 0 to 2.
    rng = np.random.default_rng(0)
    weights = np.zeros((n, n))
    for i in range(n // 2):
        weights[i, n // 2 + rng.choice(n // 2, 4, replace=False)] = 1
    graph = csr_matrix(np.maximum(weights, weights.T))
    values, _ = decompose(graph, 8)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(_laplacian(graph))[:8], rtol=0, atol=1e-10)
    assert values.max() < 1


@pytest.mark.parametrize("sizes", [[150, 150, 150], [60, 40, 20, 10, 5], [400, 200, 100, 12], [300] * 3, [200] * 5])
def test_zero_eigenvalues_are_as_many_as_components(sizes: list[int]) -> None:
    vectors, labels = _clusters(sizes, 1e-3)
    graph = join_neighbours(vectors)
    pieces, reference = connected_components(graph, directed=False)
    assert pieces >= len(sizes)
    values, _ = decompose(graph, pieces + 3)
    assert (values[:pieces] < 1e-9).all()
    assert (values[pieces:] > 1e-6).all()
    components = find_components(graph)
    assert adjusted_rand_score(components, reference) == 1
    counts = np.bincount(components)
    assert (np.diff(counts) <= 0).all()
    assert all(len(set(labels[components == piece])) == 1 for piece in range(pieces))


def test_components_are_numbered_from_the_greatest() -> None:
    def path(n: int) -> np.ndarray:
        return np.eye(n, k=1) + np.eye(n, k=-1)

    graph = csr_matrix(block_diag([path(2), path(5), path(3)]))
    assert find_components(graph).tolist() == [2, 2, 0, 0, 0, 0, 0, 1, 1, 1]
    assert find_components(csr_matrix(path(4))).tolist() == [0] * 4


def test_gaps_by_hand() -> None:
    gaps = log_ratio_gaps(np.array([0.0, 0.01, 0.1, 0.2, 0.2]))
    np.testing.assert_allclose(gaps, [math.log(10), math.log(2), 0], atol=1e-12)
    # Zeros of further components differ by rounding only, which is no gap.
    gaps = log_ratio_gaps(np.array([0.0, 1e-17, 3e-15, 0.1, 0.3]))
    np.testing.assert_allclose(gaps, [0, math.log(0.1 / 1e-9), math.log(3)], atol=1e-12)


def test_the_gap_speaks_for_the_number_of_clusters() -> None:
    # Three groups that hang together by a few edges: two small eigenvalues beside the 0.
    blocks = csr_matrix(block_diag([np.ones((30, 30)) - np.eye(30)] * 3)).tolil()
    for i, j in ((0, 30), (31, 60), (61, 1)):
        blocks[i, j] = blocks[j, i] = 1
    values, _ = decompose(blocks.tocsr(), 8)
    assert int(log_ratio_gaps(values).argmax()) + 2 == 3


@pytest.mark.parametrize("spread", [0.02, 0.1])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_three_planted_clusters_are_found(spread: float, seed: int) -> None:
    vectors, labels = _clusters([120, 80, 40], spread, seed=seed)
    spectrum = measure_spectrum(vectors, seed=seed)
    assert spectrum.clusters == 3
    assert spectrum.p <= 0.05
    assert adjusted_rand_score(cluster_samples(spectrum, 3), labels) == 1


def test_one_cloud_shows_no_clusters() -> None:
    spectra = [measure_spectrum(_cloud(200, seed=seed), seed=seed) for seed in range(10)]
    assert sum(spectrum.p > 0.05 for spectrum in spectra) >= 8
    for spectrum in spectra:
        if spectrum.p > 0.05:
            assert spectrum.clusters == spectrum.components.max() + 1


@pytest.mark.parametrize(("dimensions", "seed"), [(20, 3), (90, 0)])  # less and more than samples
def test_p_is_that_of_clouds_with_the_same_mean_and_covariance(dimensions: int, seed: int) -> None:
    vectors = _cloud(60, dimensions, seed)
    gap = log_ratio_gaps(decompose(join_neighbours(vectors), 12)[0]).max()
    rng = np.random.default_rng(99)
    draws = rng.multivariate_normal(vectors.mean(0), np.cov(vectors.T, bias=True), (400, 60))
    null = [log_ratio_gaps(decompose(join_neighbours(unit_rows(draw)), 12)[0]).max() for draw in draws]
    p = np.mean([value >= gap for value in null])
    assert 0.1 < p < 0.9
    spectrum = measure_spectrum(vectors, null_draws=199)
    assert spectrum.gap == pytest.approx(gap)
    assert abs(spectrum.p - p) < 4 * math.sqrt(p * (1 - p) * (1 / 199 + 1 / 400))


@pytest.mark.parametrize("dimensions", [12, 60])
def test_null_draws_lie_to_each_other_as_the_cloud_does(dimensions: int) -> None:
    """In other coordinates than the cloud, so lengths and angles are compared: those to the mean, and of all axes."""
    vectors = unit_rows(np.random.default_rng(1).normal(size=(40, dimensions)) * np.geomspace(1, 0.1, dimensions) + 0.2)
    mine = np.concatenate(list(_structureless(vectors, 600, seed=0)))
    rng = np.random.default_rng(99)
    cloud = unit_rows(rng.multivariate_normal(vectors.mean(0), np.cov(vectors.T, bias=True), 24_000))
    np.testing.assert_allclose(np.linalg.norm(mine, axis=1), 1)
    for rows in (mine, cloud):
        assert len(rows) == 24_000
    means = [np.linalg.norm(rows.mean(0)) for rows in (mine, cloud)]
    assert means[0] == pytest.approx(means[1], rel=0.02)
    axes = [np.linalg.eigvalsh(rows.T @ rows / len(rows))[::-1][:10] for rows in (mine, cloud)]
    np.testing.assert_allclose(axes[0], axes[1], rtol=0.08)
    to_mean = [np.quantile(rows @ rows.mean(0), np.linspace(0.05, 0.95, 7)) for rows in (mine, cloud)]
    np.testing.assert_allclose(to_mean[0], to_mean[1], atol=0.02)


def test_p_is_the_share_of_null_draws_with_so_great_a_gap() -> None:
    vectors, _ = _clusters([60, 60], 0.1)
    assert measure_spectrum(vectors, null_draws=39).p == 1 / 40
    p = measure_spectrum(_cloud(60), null_draws=9).p
    assert p * 10 == pytest.approx(round(p * 10))
    without = measure_spectrum(vectors, null_draws=0)
    assert math.isnan(without.p)
    assert without.clusters == without.components.max() + 1


def test_separability_is_that_of_scikit_learns_discriminant() -> None:
    """τ is the ratio of between to within scatter along the first axis of a linear discriminant analysis."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [40, 30, 20])
    rows = rng.normal(size=(90, 4)) + 3 * np.eye(4)[labels]
    axis = LinearDiscriminantAnalysis(solver="eigen").fit(rows, labels).scalings_[:, 0]
    projected = rows @ axis
    within = sum(((projected[labels == k] - projected[labels == k].mean()) ** 2).sum() for k in range(3))
    between = ((projected - projected.mean()) ** 2).sum() - within
    assert measure_separability(rows, labels) == pytest.approx(between / within, rel=0.01)
    assert measure_separability(np.repeat(np.eye(3), 5, axis=0), np.repeat([0, 1, 2], 5)) > 100  # no scatter within
    assert measure_separability(rows, np.zeros(90, int)) == pytest.approx(0, abs=1e-9)


def test_planted_clusters_are_more_separable_than_chance() -> None:
    rng = np.random.default_rng(0)
    cloud = rng.normal(size=(120, 30))
    clusters = np.repeat(4 * rng.normal(size=(3, 30)), 40, axis=0) + cloud
    planted, null = (measure_spectrum(unit_rows(v), null_draws=19) for v in (clusters, cloud))
    assert planted.separability_p == pytest.approx(0.05)
    assert null.separability_p > 0.05
    assert planted.separability > null.separability


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_too_few_samples_are_no_clusters(n: int) -> None:
    spectrum = measure_spectrum(_cloud(n))
    assert math.isnan(spectrum.p)
    assert spectrum.clusters == spectrum.components.max() + 1
    assert cluster_samples(spectrum, 1).tolist() == [0] * n


@pytest.mark.parametrize("seed", range(5))
def test_a_group_of_one_percent_is_not_lost(seed: int) -> None:
    # 12 of 1200, joined to nobody else; a loose solver misses the eigenvalue that it brings.
    vectors, labels = _clusters([600, 400, 188, 12], 0.02, seed=seed)
    spectrum = measure_spectrum(vectors, null_draws=0)
    assert (spectrum.eigenvalues < 1e-9).sum() == spectrum.clusters == 4
    assert np.array_equal(spectrum.components, labels)
    assert adjusted_rand_score(cluster_samples(spectrum, 4), labels) == 1


def test_a_group_of_one_percent_beside_one_cloud() -> None:
    rng = np.random.default_rng(0)
    cloud = rng.normal(size=(1188, 20)) + 3 * np.eye(20)[0]
    vectors = unit_rows(np.concatenate([cloud, 6 * np.eye(20)[5] + 0.3 * rng.normal(size=(12, 20))]))
    spectrum = measure_spectrum(vectors, null_draws=0)
    planted = np.arange(1200) >= 1188
    best = max(
        len(np.flatnonzero((labels == label) & planted)) / len(np.flatnonzero((labels == label) | planted))
        for clusters in (2, 3, 4)
        for labels in [cluster_samples(spectrum, clusters)]
        for label in range(clusters)
    )
    assert best >= 0.9


def test_clusters_and_spectra_are_the_same_again() -> None:
    vectors, _ = _clusters([300, 250, 150], 0.35, seed=3)
    first, second = (measure_spectrum(vectors, null_draws=3, seed=5) for _ in range(2))
    assert np.array_equal(first.eigenvalues, second.eigenvalues)
    assert np.array_equal(first.eigenvectors, second.eigenvectors)
    assert (first.p, first.gap, first.clusters) == (second.p, second.gap, second.clusters)
    assert np.array_equal(cluster_samples(first, 4, seed=1), cluster_samples(second, 4, seed=1))


@pytest.mark.parametrize("sizes", [[80] * 11, [108] * 11 + [12], [108] * 6 + [552]])
def test_every_component_of_a_large_graph_has_its_zero(sizes: list[int]) -> None:
    """An iterative solver with one start vector misses copies of a multiple eigenvalue, whatever its tolerance."""
    vectors, labels = _clusters(sizes, 0.02)
    graph = join_neighbours(vectors)
    values, eigenvectors = decompose(graph, 14)
    assert (values < 1e-9).sum() == len(sizes) == find_components(graph).max() + 1
    np.testing.assert_allclose(values, np.linalg.eigvalsh(_laplacian(graph))[:14], rtol=0, atol=1e-10)
    np.testing.assert_allclose(eigenvectors.T @ eigenvectors, np.eye(14), rtol=0, atol=1e-10)
    spectrum = measure_spectrum(vectors, count=14, null_draws=0)
    assert adjusted_rand_score(labels, cluster_samples(spectrum, len(sizes))) == 1
