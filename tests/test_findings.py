"""Groups within a class: discriminants and valleys against slow formulas, and data whose groups are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from threadpoolctl import threadpool_limits

from pfungst.findings import (
    Group,
    View,
    find_groups,
    held_out_scores,
    jaccard,
    prepare_view,
    principal_coordinates,
    rank_groups,
    score_groups,
    valley_depth,
    valley_of,
)

_RIDGE = 0.2  # share of a sphere in the covariance


def _views(n: int, seed: int, shift: float = 0.0, share: float = 0.1) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Three views without structure; in the second one a share of the samples is shifted."""
    rng = np.random.default_rng(seed)
    members = np.sort(rng.permutation(n)[: round(share * n)])
    views = {name: 3 * rng.normal(size=d) + rng.normal(size=(n, d)) for name, d in (("a", 40), ("b", 20), ("c", 12))}
    views["b"][members, :4] += shift
    return views, members


def _slow_scores(view: View, dimensions: int, inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Fisher's discriminant of one group, sample by sample, from the formula: direction = C^-1 (a - b)."""
    scores = np.empty(len(inside))
    for i in range(len(inside)):
        fit = [j for j in range(len(inside)) if view.fold[j] != view.fold[i]]
        rows = view.rows[fit]
        d = rows.shape[1]
        mean = sum(rows) / len(rows)
        covariance = np.zeros((d, d))
        for row in rows:
            covariance += np.outer(row - mean, row - mean) / len(rows)
        sphere = sum(covariance[j, j] for j in range(d)) / dimensions * np.eye(d)
        a = np.mean([view.rows[j] for j in fit if inside[j]], axis=0)
        b = np.mean([view.rows[j] for j in fit if outside[j]], axis=0)
        direction = np.linalg.solve((1 - _RIDGE) * covariance + _RIDGE * sphere, a - b)
        scores[i] = (view.rows[i] - (a + b) / 2) @ direction / ((a - b) @ direction)
    return scores


@pytest.mark.parametrize("dimensions", [6, 90])
def test_held_out_scores_are_those_of_a_slow_discriminant(dimensions: int) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(80, dimensions))
    inside = np.stack([np.arange(80) < 20, rng.random(80) < 0.3, vectors[:, 0] > 0], 1)
    outside = ~inside
    outside[70:, 1] = False  # samples that are on neither side
    view = prepare_view("v", vectors, seed=1)
    scores = held_out_scores(view, inside, outside)
    for column in range(3):
        slow = _slow_scores(view, dimensions, inside[:, column], outside[:, column])
        np.testing.assert_allclose(scores[:, column], slow, rtol=1e-7, atol=1e-7)


def test_a_sample_has_no_part_in_its_own_score() -> None:
    rng = np.random.default_rng(2)
    view = prepare_view("v", rng.normal(size=(100, 60)))
    inside = rng.random((100, 1)) < 0.5  # a group by lot: nothing to learn
    scores = held_out_scores(view, inside, ~inside)[:, 0]
    gap = scores[inside[:, 0]].mean() - scores[~inside[:, 0]].mean()
    assert abs(gap) < 0.35  # a discriminant that saw its samples scores them 1 apart
    assert sorted(np.bincount(view.fold)) == [20] * 5


def test_total_covariance_gives_the_direction_of_the_one_within() -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(200, 15)) @ rng.normal(size=(15, 15))
    inside = np.arange(200) < 50
    rows[inside, :3] += 4
    difference = rows[inside].mean(0) - rows[~inside].mean(0)
    total = np.cov(rows.T, bias=True)
    within = (np.cov(rows[inside].T, bias=True) * 50 + np.cov(rows[~inside].T, bias=True) * 150) / 200
    assert np.abs(total - within).max() > 1
    ridge = _RIDGE * np.trace(total) / 15 * np.eye(15)
    one, other = (np.linalg.solve((1 - _RIDGE) * matrix + ridge, difference) for matrix in (total, within))
    np.testing.assert_allclose(one / np.linalg.norm(one), other / np.linalg.norm(other), rtol=0, atol=1e-12)
    # Without the ridge it is the direction of scikit-learn.
    plain = np.linalg.solve(total, difference)
    reference = LinearDiscriminantAnalysis(solver="lsqr").fit(rows, inside).coef_[0]
    np.testing.assert_allclose(plain / np.linalg.norm(plain), reference / np.linalg.norm(reference), atol=1e-10)


@pytest.mark.parametrize(("n", "d"), [(50, 12), (12, 50), (30, 30)])
def test_principal_coordinates_are_those_of_the_singular_values(n: int, d: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(n, d)) + 3
    coordinates = principal_coordinates(vectors, 6)
    u, s, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(coordinates), np.abs(u[:, :6] * s[:6]), atol=1e-9)
    assert principal_coordinates(vectors, 99).shape == (n, min(n - 1, d))


def test_jaccard() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = (np.flatnonzero(rng.random(30) < share) for share in rng.random(2))
        union = set(a.tolist()) | set(b.tolist())
        assert jaccard(a, b) == len(set(a.tolist()) & set(b.tolist())) / max(1, len(union))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_piece_cut_off_one_cloud_has_no_valley(share: float, seed: int) -> None:
    scores = np.random.default_rng(seed).normal(size=500)
    inside = scores > np.quantile(scores, 1 - share)
    assert valley_depth(scores, inside, ~inside) < 0.2


@pytest.mark.parametrize("share", [0.03, 0.2, 0.5])
def test_far_modes_have_a_deep_valley(share: float) -> None:
    rng = np.random.default_rng(0)
    inside = np.arange(600) < share * 600
    scores = rng.normal(size=600) + np.where(inside, 12.0, 0.0)
    assert valley_depth(scores, inside, ~inside) > 0.95
    assert valley_depth(3 * scores - 7, inside, ~inside) == pytest.approx(valley_depth(scores, inside, ~inside))
    near = rng.normal(size=600) + np.where(inside, 3.0, 0.0)
    assert valley_depth(near, inside, ~inside) < valley_depth(scores, inside, ~inside)
    assert valley_depth(scores, ~inside, inside) == 0  # the group scores lower than the rest
    assert valley_depth(np.zeros(600), inside, ~inside) == 0
    assert valley_depth(-scores, ~inside, inside) == pytest.approx(valley_depth(scores, inside, ~inside))


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
def test_valleys_are_those_of_the_plain_sum_over_samples(scale: float) -> None:
    """With samples so far out that what they add is 0, and on neither side."""
    rng = np.random.default_rng(5)
    for _ in range(200):
        n = int(rng.integers(30, 300))
        inside = rng.random(n) < rng.uniform(0.1, 0.6)
        outside = ~inside & (rng.random(n) < 0.9)
        scores = rng.standard_t(2, size=n) + inside * rng.uniform(0, 8)
        scores[:2] = (1e5, -1e5)
        depth, bottom = valley_of(scale * scores, inside, outside)
        assert (depth, bottom / scale) == pytest.approx(_slow_valley(scores, inside, outside), rel=1e-9, abs=1e-9)


def _slow_valley(scores: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> tuple[float, float]:
    high, low = np.median(scores[inside]), np.median(scores[outside])
    if high <= low:
        return 0.0, 0.0
    width = max(0.5 * min(scores[inside].std(), scores[outside].std(), high - low), 0.05 * (high - low))
    points = [low + (high - low) * i / 40 for i in range(41)]
    density = [sum(math.exp(-(((p - s) / width) ** 2) / 2) for s in scores[inside | outside]) for p in points]
    left, right = max(range(20), key=density.__getitem__), max(range(21, 41), key=density.__getitem__)
    bottom = min(range(left, right + 1), key=density.__getitem__)
    beyond = scores > points[bottom]
    fills = [
        np.sum(own & side) / np.sum(own | (side & (inside | outside)))
        for own, side in ((inside, beyond), (outside, ~beyond))
    ]
    lower = min(density[left], density[right])
    return (1 - density[bottom] / lower) * min(fills) if lower > 0 else 0.0, points[bottom]


def test_medians_that_nearly_coincide_are_no_valley() -> None:
    scores = np.array([-1, -0.5, 0.5, 1, -1, -0.4, 0.402, 1])  # medians 0 and 0.001, and no sample near them
    inside = np.arange(8) >= 4
    assert valley_depth(scores, inside, ~inside) == 0


def test_samples_on_neither_side_do_not_fill_the_valley() -> None:
    scores = np.concatenate([np.linspace(-1, 0, 50), np.linspace(5, 6, 50), np.linspace(0, 5, 50)])
    inside, outside = np.arange(150) // 50 == 1, np.arange(150) // 50 == 0
    assert valley_depth(scores, inside, outside) > 0.95
    assert valley_depth(scores, inside, ~inside) < 0.8


@pytest.mark.parametrize(("n", "share", "seed"), [(200, 0.1, 0), (200, 0.3, 1), (150, 0.08, 2), (400, 0.05, 3)])
def test_a_group_planted_in_one_of_three_views_comes_first(n: int, share: float, seed: int) -> None:
    views, members = _views(n, seed, shift=6, share=share)
    groups, spectrum = find_groups(views, null_draws=0, seed=seed)
    assert jaccard(groups[0].members, members) >= 0.9
    assert groups[0].views == ("b",)
    # Two of the three views say nothing, and suspicion is the mean over three.
    assert 0.25 < groups[0].suspicion < 0.5
    assert all(group.suspicion < groups[0].suspicion / 2 for group in groups[1:])
    assert len(spectrum.components) == n


@pytest.mark.parametrize(("n", "share", "seed"), [(200, 0.1, 0), (200, 0.3, 1), (150, 0.08, 2), (400, 0.05, 3)])
def test_a_group_that_three_of_five_views_show_is_suspicious(n: int, share: float, seed: int) -> None:
    views, members = _views(n, seed, shift=6, share=share)
    views |= {"d": views["b"][:, ::-1][:, 8:] * 2, "e": views["b"][:, :10] - 1}
    groups, _ = find_groups(views, null_draws=0, seed=seed)
    assert groups[0].suspicion > 0.8
    assert jaccard(groups[0].members, members) >= 0.9
    assert set(groups[0].views) == {"b", "d", "e"}
    rounded = [round(group.suspicion, 3) for group in groups]
    assert rounded == sorted(rounded, reverse=True)
    assert all(group.suspicion < 0.3 for group in groups[1:])
    for group in groups:
        assert 8 <= len(group.members) <= 0.6 * n
        assert (np.diff(group.members) > 0).all()
    for i, group in enumerate(groups):
        assert all(jaccard(group.members, other.members) < 0.6 for other in groups[:i])


def test_two_planted_groups_are_both_found() -> None:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1, 2], [220, 50, 30]))
    centres = np.zeros((3, 30))
    centres[1, :3], centres[2, 3:6] = 6, 6
    groups, _ = find_groups({"a": centres[labels] + rng.normal(size=(300, 30)) + 2}, null_draws=0)
    found = [group for group in groups if group.suspicion > 0.5]
    assert len(found) == 2
    for label in (1, 2):
        assert max(jaccard(group.members, np.flatnonzero(labels == label)) for group in found) >= 0.9


@pytest.mark.parametrize("seed", range(5, 13))
def test_without_structure_nothing_is_suspicious(seed: int) -> None:
    views, _ = _views(200, seed)
    groups, _ = find_groups(views, null_draws=0, seed=seed)
    assert all(group.suspicion < 0.5 for group in groups)


def test_of_a_group_and_its_complement_the_smaller_one_is_kept() -> None:
    views, members = _views(200, 5, shift=8, share=0.45)
    rest = np.setdiff1d(np.arange(200), members)
    prepared = [prepare_view("b", views["b"])]
    for order in ([members, rest], [rest, members]):
        both = score_groups([Group(rows, ("b",)) for rows in order], prepared)
        assert both[0].suspicion == pytest.approx(both[1].suspicion, abs=1e-9)
        ranked = rank_groups([Group(rows, ("b",)) for rows in order], prepared)
        assert np.array_equal(ranked[0].members, members)
        # With the group taken out, nothing is left beside the rest.
        assert all(group.suspicion == 0 for group in ranked[1:])
    groups, _ = find_groups({"b": views["b"]}, null_draws=0)
    assert jaccard(groups[0].members, members) >= 0.9


def test_suspicion_is_the_mean_of_the_three_deepest_valleys() -> None:
    views, members = _views(150, 7, shift=6, share=0.2)
    inside = np.isin(np.arange(150), members)
    prepared = [prepare_view(name, m) for name, m in [*views.items(), ("d", views["b"][:, :10])]]
    scores = [held_out_scores(view, inside[:, None], ~inside[:, None])[:, 0] for view in prepared]
    depths = {view.name: valley_depth(s, inside, ~inside) for view, s in zip(prepared, scores, strict=True)}
    (group,) = score_groups([Group(members, ("a",))], prepared)
    assert group.suspicion == pytest.approx(np.mean(sorted(depths.values())[1:]))
    assert group.views == tuple(sorted((v for v in depths if depths[v] > 0.5), key=lambda v: -depths[v]))
    assert score_groups([], prepared) == []


@pytest.mark.parametrize("count", [1, 2, 3])
def test_groups_too_small_to_score_are_not_suspicious(count: int) -> None:
    views, _ = _views(60, 0)
    (group,) = score_groups([Group(np.arange(count), ("a",))], [prepare_view("b", views["b"])])
    assert group.suspicion == 0


def test_the_same_seed_gives_the_same_result_on_any_number_of_threads() -> None:
    views, _ = _views(150, 9, shift=5, share=0.15)
    results = []
    for threads in (1, 2, 1):
        with threadpool_limits(threads):
            groups, spectrum = find_groups(views, null_draws=5, seed=4)
        found = [(group.members.tolist(), group.views, group.suspicion) for group in groups]
        results.append((found, spectrum.eigenvalues.tolist(), spectrum.p))
    assert results[0] == results[1] == results[2]


def test_single_precision_and_scale_of_rows_do_not_matter() -> None:
    views, members = _views(150, 11, shift=6, share=0.15)
    factor = np.exp(np.random.default_rng(0).normal(size=(150, 1)))
    scaled = {name: (matrix * factor).astype(np.float32) for name, matrix in views.items()}
    one, other = (find_groups(v, null_draws=0)[0][0] for v in (views, scaled))
    assert np.array_equal(one.members, other.members)
    assert one.suspicion == pytest.approx(other.suspicion, abs=1e-4)
    assert jaccard(one.members, members) >= 0.9


def test_a_part_of_a_separate_group_is_less_suspicious_than_the_whole() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 6))
    vectors[:60, 0] += 12
    view = prepare_view("where", vectors)
    whole, part = score_groups([Group(np.arange(60), ("a",)), Group(np.arange(40), ("a",))], [view])
    assert whole.suspicion > 0.95
    assert part.suspicion < 0.75
