"""Explanations of clusters and outliers against the formulas written out one vector and one rival at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pfungst.clusters import explain_membership, explain_outlier

RNG = np.random.default_rng(0)


def slow_membership(x: np.ndarray, centres: np.ndarray, cluster: int, beta: float) -> tuple[float, np.ndarray]:
    rivals = [m for k, m in enumerate(centres) if k != cluster]
    centre = centres[cluster]
    h = [float(((x - m) ** 2).sum() - ((x - centre) ** 2).sum()) for m in rivals]
    f = -math.log(sum(math.exp(-beta * v) for v in h)) / beta
    shares = np.zeros(len(x))
    for value, m in zip(h, rivals, strict=True):
        part = math.exp(-beta * value) / sum(math.exp(-beta * v) for v in h) * f
        for i in range(len(x)):
            shares[i] += part * (x[i] - (centre[i] + m[i]) / 2) * 2 * (centre[i] - m[i]) / value
    return f, shares


@pytest.mark.parametrize("clusters", [2, 3, 5])
def test_shares_of_membership(clusters: int) -> None:
    centres, x = RNG.normal(size=(clusters, 6)), RNG.normal(size=(20, 6))
    evidence, shares = explain_membership(x, centres, 1, 0.7)
    for row in range(len(x)):
        f, expected = slow_membership(x[row], centres, 1, 0.7)
        assert evidence[row] == pytest.approx(f, rel=1e-10)
        np.testing.assert_allclose(shares[row], expected, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(shares.sum(1), evidence, rtol=1e-9, atol=1e-12)


def test_membership_is_positive_inside_and_names_the_feature_that_differs() -> None:
    centres = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    x = np.concatenate([centres[:1] + RNG.normal(0, 0.1, (30, 3)), centres[1:] + RNG.normal(0, 0.1, (30, 3))])
    evidence, shares = explain_membership(x, centres, 0)
    assert (evidence[:30] > 0).all()
    assert (evidence[30:] < 0).all()
    assert (np.abs(shares).argmax(1) == 0).all()


def test_a_vector_midway_has_evidence_shared_out_evenly() -> None:
    """h = 0 for one of two rivals: nothing to divide by, and the sum still holds."""
    centres = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 3.0]])
    evidence, shares = explain_membership(np.zeros((1, 2)), centres, 0, 1.0)
    assert np.isfinite(shares).all()
    assert shares.sum() == pytest.approx(evidence[0])


def test_shares_of_an_outlier() -> None:
    inliers, x = RNG.normal(size=(15, 4)), RNG.normal(0, 3, size=(8, 4))
    scores, shares = explain_outlier(x, inliers, 1.3)
    gamma = 1 / 1.3**2
    for row in range(len(x)):
        distances = [float(((x[row] - u) ** 2).sum()) for u in inliers]
        o = -math.log(sum(math.exp(-gamma * d) for d in distances) / len(inliers)) / gamma
        weights = [math.exp(-gamma * d) / sum(math.exp(-gamma * e) for e in distances) for d in distances]
        expected = sum(w * o * (x[row] - u) ** 2 / d for w, u, d in zip(weights, inliers, distances, strict=True))
        assert scores[row] == pytest.approx(o, rel=1e-10)
        np.testing.assert_allclose(shares[row], expected, rtol=1e-8)
    np.testing.assert_allclose(shares.sum(1), scores, rtol=1e-9)


def test_an_outlier_in_one_feature_is_explained_by_it() -> None:
    inliers = RNG.normal(0, 0.1, (50, 5))
    x = inliers[:3].copy()
    x[:, 2] += 4
    scores, shares = explain_outlier(x, inliers)
    assert (scores > 10 * explain_outlier(inliers, inliers)[0].max()).all()
    assert (shares[:, 2] > 0.9 * scores).all()


def test_an_inlier_itself_and_equal_inliers_are_no_trouble() -> None:
    inliers = np.zeros((4, 3))
    scores, shares = explain_outlier(np.array([[0.0, 0, 0], [1, 0, 0]]), inliers)
    np.testing.assert_allclose(scores, [0, 1])
    np.testing.assert_allclose(shares, [[0, 0, 0], [1, 0, 0]])
