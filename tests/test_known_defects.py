"""Defects measured in other tools for the clustering of relevance maps, each as a test that ours does not have it.

The numbers are those of the list that they were found in: order of eigenvalues (1, 2), similarities taken for
distances (3), division by a signed sum (4), neighbours among duplicates (5), stale results after changed settings (6),
no seeds and no components (7), and a solver that loses a small cluster (ARPACK).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.linalg import eigh

import pfungst
from pfungst.errors import RunError
from pfungst.findings import find_groups, jaccard
from pfungst.neighbours import join_neighbours, measure_outliers
from pfungst.spectra import cluster_samples, decompose, find_components, measure_spectrum
from pfungst.vectors import unit_rows


def two_clusters(seed: int = 0, n: int = 60, d: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Maps of two kinds with noise, and the kind of each."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(2, d))
    kinds = np.repeat([0, 1], n // 2)
    return unit_rows(centres[kinds] + 0.3 * rng.normal(size=(n, d))), kinds


@pytest.mark.parametrize("n", [300, 1300])  # below and above where the dense solver ends
def test_1_and_2_eigenvalues_are_the_smallest_and_ascend(n: int) -> None:
    """Random maps without clusters: the largest in magnitude include oscillating vectors with 1 - λ up to 1.4."""
    graph = join_neighbours(np.random.default_rng(0).normal(size=(n, 50)))
    values, vectors = decompose(graph, 12)
    degree = np.asarray(graph.sum(1)).ravel()
    laplacian = np.eye(n) - graph.toarray() / np.sqrt(np.outer(degree, degree))
    exact = eigh(laplacian, eigvals_only=True)[:12]
    np.testing.assert_allclose(values, exact, atol=1e-9)
    assert (np.diff(values) >= 0).all()
    np.testing.assert_allclose(laplacian @ vectors, vectors * values, atol=1e-7)


def test_3_edges_join_alike_maps() -> None:
    vectors, kinds = two_clusters()
    rows, columns = join_neighbours(vectors).nonzero()
    assert (kinds[rows] == kinds[columns]).all()


def test_4_no_map_changes_its_sign() -> None:
    """Zero-mean maps: divided by their sum, nearly half of them flip, and some become hundreds of times larger."""
    maps = np.random.default_rng(0).normal(size=(200, 400))
    scaled = unit_rows(maps)
    assert ((scaled * maps).sum(1) > 0).all()
    np.testing.assert_allclose(np.linalg.norm(scaled, axis=1), 1)


def test_5_no_sample_is_its_own_neighbour() -> None:
    rng = np.random.default_rng(0)
    vectors = np.repeat(rng.normal(size=(15, 20)), 4, axis=0)
    graph = join_neighbours(vectors)
    assert not graph.diagonal().any()
    assert (np.asarray(graph.sum(1)).ravel() >= 4).all()


def test_6_changed_settings_never_give_old_results(small: Any, finished: Path) -> None:
    with pytest.raises(RunError, match=r"settings\.seed was 0, is now 1"):
        pfungst.audit(small.model, small.photos, out=finished, **{**small.settings, "seed": 1})


def test_7_seeds_decide_everything() -> None:
    vectors, _ = two_clusters(n=90)
    spectra = [measure_spectrum(vectors, seed=0) for _ in range(2)]
    assert spectra[0].p == spectra[1].p
    assert np.array_equal(spectra[0].eigenvectors, spectra[1].eigenvectors)
    assert np.array_equal(cluster_samples(spectra[0], 3, 0), cluster_samples(spectra[1], 3, 0))
    state = np.random.get_state()[1].copy()
    groups = [find_groups({"where": vectors}, seed=0)[0] for _ in range(2)]
    assert [g.members.tolist() for g in groups[0]] == [g.members.tolist() for g in groups[1]]
    assert np.array_equal(np.random.get_state()[1], state)


def test_7_components_and_outliers_are_told() -> None:
    rng = np.random.default_rng(0)
    vectors = np.concatenate([rng.normal(size=(200, 8)), 40 + rng.normal(size=(12, 8)), [np.full(8, -90.0)]])
    components = find_components(join_neighbours(vectors))
    assert np.array_equal(np.flatnonzero(components == 1), np.arange(200, 212))
    assert measure_outliers(vectors).argmax() == 212


def test_the_solver_finds_a_small_cluster() -> None:
    """5,000 maps of 12 kinds, one of them with 30 samples: a loose tolerance finds 10 of the 12 zeros and loses it."""
    rng = np.random.default_rng(0)
    sizes = [452] * 10 + [450, 30]
    centres = 12 * rng.normal(size=(12, 24))
    kinds = np.repeat(np.arange(12), sizes)
    vectors = centres[kinds] + rng.normal(size=(len(kinds), 24))
    spectrum = measure_spectrum(vectors, count=16, null_draws=0)
    assert int((spectrum.eigenvalues < 1e-9).sum()) == int(spectrum.components.max()) + 1 == 12
    small = np.flatnonzero(kinds == 11)
    assert np.array_equal(np.flatnonzero(spectrum.components == 11), small)
    labels = cluster_samples(spectrum, 12)
    assert max(jaccard(np.flatnonzero(labels == label), small) for label in range(12)) == 1
