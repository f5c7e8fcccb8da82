"""The map of samples: groups stay together, and the same data give the same picture."""

from __future__ import annotations

import numpy as np
import pytest

from pfungst import embeddings
from pfungst.embeddings import embed


def _groups(sizes: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return 8 * np.eye(len(sizes), 15)[labels] + rng.normal(size=(len(labels), 15)), labels


def _alike(coordinates: np.ndarray, labels: np.ndarray) -> float:
    """Share of samples whose nearest one in the picture is of their own group."""
    distances = np.linalg.norm(coordinates[:, None] - coordinates, axis=2)
    np.fill_diagonal(distances, np.inf)
    return float((labels[distances.argmin(1)] == labels).mean())


def test_groups_stay_together() -> None:
    vectors, labels = _groups([60, 60, 30])
    coordinates = embed(vectors)
    assert coordinates.shape == (150, 2)
    assert np.isfinite(coordinates).all()
    assert _alike(coordinates, labels) == 1


def test_the_same_seed_gives_the_same_picture() -> None:
    vectors, _ = _groups([40, 40])
    assert np.array_equal(embed(vectors, seed=3), embed(vectors, seed=3))
    assert np.array_equal(embed(vectors.astype(np.float32), seed=3), embed(vectors.astype(np.float32), seed=3))


def test_of_too_many_samples_the_rest_is_placed_beside_its_like(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "MOST", 100)
    vectors, labels = _groups([90, 90])
    coordinates = embed(vectors)
    assert np.isfinite(coordinates).all()
    assert _alike(coordinates, labels) == 1
    assert len(np.unique(coordinates.round(9), axis=0)) == 180
    assert np.array_equal(coordinates, embed(vectors))


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 20])
def test_a_few_samples_have_places_too(n: int) -> None:
    coordinates = embed(np.random.default_rng(0).normal(size=(n, 5)))
    assert coordinates.shape == (n, 2)
    assert np.isfinite(coordinates).all()
    assert len(np.unique(coordinates, axis=0)) == n


def test_duplicates_are_placed() -> None:
    vectors, _ = _groups([20, 20])
    coordinates = embed(np.repeat(vectors, 3, axis=0))
    assert np.isfinite(coordinates).all()


@pytest.mark.parametrize("vectors", [np.zeros((20, 5)), np.ones((9, 3)), np.arange(20.0)[:, None]])
def test_flat_data_have_places(vectors: np.ndarray) -> None:
    coordinates = embed(vectors)
    assert coordinates.shape == (len(vectors), 2)
    assert np.isfinite(coordinates).all()


def test_progress_is_told_and_changes_nothing() -> None:
    vectors = np.random.default_rng(0).normal(size=(30, 5))
    told: list[tuple[int, int]] = []
    assert np.array_equal(embed(vectors), embed(vectors, progress=lambda done, total: told.append((done, total))))
    assert told[-1] == (750, 750)
    assert told == sorted(told)
