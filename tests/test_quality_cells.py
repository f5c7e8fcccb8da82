"""Cell-level ROC against scikit-learn, a slow loop and cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from pfungst.errors import DataError, SettingError
from pfungst.quality.cells import Cells, auc, cell_roc, draw_cells, gather_cells, pool_cells


def some_cells(seed: int, ties: bool = False, pictures: int = 12) -> Cells:
    rng = np.random.default_rng(seed)
    n = 300
    positive = rng.random(n) < 0.4
    score = rng.normal(size=n) + 0.7 * positive
    if ties:
        score = score.round(1)
    return Cells(score, positive, rng.integers(pictures, size=n), rng.integers(20, 400, n))


@pytest.mark.parametrize("ties", [False, True])
def test_auc_and_curve_are_those_of_scikit_learn(ties: bool) -> None:
    cells = some_cells(1, ties)
    roc = cell_roc(cells, draws=50)
    assert roc.auc == pytest.approx(roc_auc_score(cells.positive, cells.score), abs=1e-12)
    assert auc(cells.score, cells.positive) == roc.auc
    false, true, _ = roc_curve(cells.positive, cells.score, drop_intermediate=False)
    assert np.allclose(roc.false_positive_rate, false)
    assert np.allclose(roc.true_positive_rate, true)
    assert roc.sensitivity(1.0) == 1.0
    assert (roc.positives, roc.others, roc.pictures) == (cells.positive.sum(), (~cells.positive).sum(), 12)


def test_terciles_of_size_are_held_against_all_others() -> None:
    cells = some_cells(2)
    roc = cell_roc(cells, draws=20)
    assert sum(part.cells for part in roc.by_size) == roc.positives
    for part in roc.by_size:
        kept = ~cells.positive | (cells.positive & (cells.area >= part.low) & (cells.area <= part.high))
        assert kept.sum() - roc.others == part.cells
        assert part.auc == pytest.approx(roc_auc_score(cells.positive[kept], cells.score[kept]), abs=1e-12)
    assert max(part.cells for part in roc.by_size) - min(part.cells for part in roc.by_size) <= 4


def test_sensitivity_falls_where_small_cells_are_missed() -> None:
    """Relevance lies on large cells only: AUC 1 in the last tercile, chance in the first."""
    rng = np.random.default_rng(0)
    area = np.tile(np.arange(1, 301), 2)
    positive = np.arange(600) < 300
    score = np.where(positive & (area > 200), 5.0, 0.0) + rng.normal(size=600) * 0.1
    small, _, large = cell_roc(Cells(score, positive, np.arange(600) % 7, area), draws=20).by_size
    assert large.auc == 1.0
    assert abs(small.auc - 0.5) < 0.1


def by_loop(relevance: np.ndarray, labels: np.ndarray, pool: str, sign: str) -> list[float]:
    scores = []
    for k in range(1, labels.max() + 1):
        values = relevance[labels == k]
        values = np.maximum(values, 0) if sign == "positive" else values
        scores.append(float(values.mean() if pool == "mean" else values.sum()) if len(values) else np.nan)
    return scores


@pytest.mark.parametrize("pool", ["mean", "sum"])
@pytest.mark.parametrize("sign", ["signed", "positive"])
def test_pooling_is_that_of_a_slow_loop(pool: str, sign: str) -> None:
    rng = np.random.default_rng(3)
    labels, relevance = rng.integers(0, 9, (20, 31)), rng.normal(size=(20, 31))
    labels[labels == 5] = 0
    scores, areas = pool_cells(relevance, labels, pool, sign)
    assert scores == pytest.approx(by_loop(relevance, labels, pool, sign), abs=1e-12, nan_ok=True)
    assert areas.tolist() == [int((labels == k).sum()) for k in range(1, 9)]
    assert len(gather_cells([relevance], [labels], [np.ones(8, bool)]).score) == 7  # cell 5 has no pixel


def test_planted_relevance_gives_one_and_shuffled_classes_one_half() -> None:
    rng = np.random.default_rng(4)
    maps, labels, kinds = [], [], []
    for _ in range(20):
        picture = np.kron(np.arange(1, 26).reshape(5, 5), np.ones((6, 6), int))
        picture[::6] = 0
        kind = rng.random(25) < 0.5
        maps.append(rng.normal(size=picture.shape) * 0.01 + np.concatenate([[False], kind])[picture])
        labels.append(picture)
        kinds.append(kind)
    roc = cell_roc(gather_cells(maps, labels, kinds), draws=100)
    assert roc.auc == 1.0
    assert roc.interval == (1.0, 1.0)
    shuffled = cell_roc(gather_cells(maps, labels, [rng.permutation(kind) for kind in kinds]), draws=200)
    assert shuffled.interval[0] < 0.5 < shuffled.interval[1]
    assert abs(shuffled.auc - 0.5) < 0.08


def test_intervals_know_that_cells_of_a_picture_go_together() -> None:
    """The same scores, with a shift that all cells of a picture share: wider than if each were a picture of its own."""
    rng = np.random.default_rng(5)
    picture = np.repeat(np.arange(10), 30)
    positive = (picture % 2 == 0) ^ (rng.random(300) < 0.2)
    score = rng.normal(size=300) * 0.3 + rng.normal(size=10)[picture]
    together = cell_roc(Cells(score, positive, picture, np.ones(300, int)), draws=300).interval
    alone = cell_roc(Cells(score, positive, np.arange(300), np.ones(300, int)), draws=300).interval
    assert together[1] - together[0] > 1.5 * (alone[1] - alone[0])
    again = cell_roc(Cells(score, positive, picture, np.ones(300, int)), draws=300).interval
    assert again == together


def test_the_interval_covers_what_is_true() -> None:
    """AUC of two normal distributions one apart is 0.760; of 40 intervals of 95 % about two may miss it."""
    hits = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        positive = rng.random(400) < 0.5
        cells = Cells(rng.normal(size=400) + positive, positive, np.repeat(np.arange(40), 10), np.ones(400, int))
        low, high = cell_roc(cells, draws=200, seed=seed).interval
        hits += low <= 0.7602 <= high
    assert hits >= 35


def test_boxes_become_discs_or_boxes() -> None:
    boxes = np.array([[2, 1, 12, 7], [10, 1, 20, 7], [5, 5, 5, 9]])
    full = draw_cells(boxes, (10, 24), "box")
    assert (full == 1).sum() + (full == 2).sum() == 18 * 6
    assert full[3, 10] == 1
    assert full[3, 11] == 2  # the overlap is shared out
    assert not (full == 3).any()
    disc = draw_cells(boxes[:1], (10, 24))
    assert (disc == 1).sum() == pytest.approx(np.pi / 4 * 60, rel=0.1)
    assert disc[1, 2] == 0
    assert disc[4, 6] == 1


def test_wrong_calls_are_told() -> None:
    one = np.zeros((4, 4))
    with pytest.raises(SettingError, match="pool"):
        pool_cells(one, one.astype(int), "max")
    with pytest.raises(SettingError, match="shape"):
        draw_cells(np.zeros((1, 4)), (4, 4), "star")
    with pytest.raises(DataError, match="label image"):
        pool_cells(one[None], one.astype(int))
    with pytest.raises(DataError, match="NaN"):
        pool_cells(one * np.nan, one.astype(int))
    with pytest.raises(DataError, match="negative"):
        pool_cells(one, one.astype(int) - 1)
    with pytest.raises(DataError, match="classes for 0"):
        gather_cells([one], [one.astype(int) + 1], [np.zeros(0, bool)])
    with pytest.raises(DataError, match="both kinds"):
        cell_roc(Cells(np.ones(3), np.ones(3, bool), np.zeros(3, int), np.ones(3, int)))
