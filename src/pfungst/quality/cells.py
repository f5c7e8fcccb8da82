"""Cell-level ROC: does relevance pooled over each annotated cell tell the cells of the class from the others?

A classifier of patches knows patches only; whether its maps single out the right cells is asked of cells that somebody
outlined: the relevance of each is pooled to one score, and the scores of the class's cells are held against those of
all others.  Cells of one picture share its stain, focus and thickness, so that intervals come from drawing pictures
first and cells of these pictures then.

Source:   Hägele et al. 2020, "Resolving challenges in deep learning-based analyses of histopathological images using
          explanation methods", Scientific Reports 10:6423 (nuclei-level ROC, sensitivity).
Controls: a random map, a centre Gaussian and the edges of the same pictures (``methods.CONTROLS``).  What they reach
          is what place, size and contrast of cells give away: only more than that speaks for the explanation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pfungst.errors import DataError, SettingError

POOLS = ("mean", "sum")
SIGNS = ("signed", "positive")
SHAPES = ("disc", "box")


@dataclass(frozen=True)
class Cells:
    """Cells of several pictures and their pooled relevance, all (n,).

    score     pooled relevance, float64
    positive  whether the cell is of the class that was explained
    picture   number of the picture it lies in
    area      its pixels
    """

    score: np.ndarray
    positive: np.ndarray
    picture: np.ndarray
    area: np.ndarray


@dataclass(frozen=True)
class SizeClass:
    """AUC of the class's cells of ``low`` to ``high`` pixels of area against all cells that are not of the class."""

    low: int
    high: int
    cells: int
    auc: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class CellROC:
    """How well relevance tells cells of the class from others.

    auc                  share of pairs (a cell of the class, another cell) in which the first has more; ties count half
    interval             95 %, bootstrap: pictures drawn again, then cells within each
    false_positive_rate  points of the ROC curve, (points,) from 0 to 1
    true_positive_rate   the same: the sensitivity at each
    by_size              the class's cells in terciles of their area, the smallest first
    positives, others    how many cells of the class and not of it; ``pictures``: how many pictures they come from
    """

    auc: float
    interval: tuple[float, float]
    false_positive_rate: np.ndarray
    true_positive_rate: np.ndarray
    by_size: tuple[SizeClass, ...]
    positives: int
    others: int
    pictures: int

    def sensitivity(self, false_positive_rate: float) -> float:
        """Share of the class's cells that is found where at most this share of the others is taken for it too."""
        at = np.searchsorted(self.false_positive_rate, false_positive_rate, side="right") - 1
        return float(self.true_positive_rate[at])


def pool_cells(
    relevance: np.ndarray, labels: np.ndarray, pool: str = "mean", sign: str = "signed"
) -> tuple[np.ndarray, np.ndarray]:
    """Scores (K,) float64 and areas (K,) of the cells 1 to K of a label image.

    relevance  (H, W): a map, its channels summed
    labels     (H, W) integers: 0 outside of cells, k in the k-th; K is the greatest
    pool       ``mean`` over the cell's pixels, or their ``sum``, which favours large cells
    sign       ``signed`` relevance, or its ``positive`` part only: what speaks against the class is then left out

    A number with no pixel has area 0 and score NaN; ``gather_cells`` leaves it out.
    """
    if pool not in POOLS or sign not in SIGNS:
        raise SettingError(f"pool={pool!r}, sign={sign!r}", f"pool is one of {POOLS}, sign one of {SIGNS}")
    if relevance.shape != labels.shape or labels.ndim != 2:
        raise DataError(
            f"a map of shape {relevance.shape} and a label image of {labels.shape}",
            "both are (height, width) of the picture: sum a map's channels, resize the label image with nearest pixels",
        )
    if not np.isfinite(relevance).all():
        raise DataError("the map has NaN or infinite values", "leave this picture out, or look at the model's output")
    if labels.min() < 0:
        raise DataError("the label image has negative values", "cells are 1, 2, ..., what is no cell is 0")
    values = relevance.clip(0) if sign == "positive" else relevance
    flat = labels.ravel()
    areas = np.bincount(flat)[1:]
    sums = np.bincount(flat, weights=values.ravel().astype(np.float64))[1:]
    with np.errstate(invalid="ignore"):
        return (sums / areas if pool == "mean" else np.where(areas, sums, np.nan)), areas


def gather_cells(
    maps: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    positive: Sequence[np.ndarray],
    pool: str = "mean",
    sign: str = "signed",
) -> Cells:
    """The cells of several pictures.  ``positive``: for each picture (K,), whether cell 1 ... K is of the class."""
    parts = []
    for number, (one, cells, kinds) in enumerate(zip(maps, labels, positive, strict=True)):
        scores, areas = pool_cells(one, cells, pool, sign)
        if len(kinds) < len(areas):
            raise DataError(
                f"picture {number} has {len(areas)} cells, but classes for {len(kinds)}", "give one entry a cell"
            )
        there = np.flatnonzero(areas)
        parts.append((scores[there], np.asarray(kinds, bool)[there], np.full(len(there), number), areas[there]))
    score, kind, picture, area = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Cells(score, kind, picture, area)


def draw_cells(boxes: np.ndarray, size: tuple[int, int], shape: str = "disc") -> np.ndarray:
    """A label image (H, W) int32 of boxes (K, 4) as left, top, right, bottom in pixels; box k becomes k + 1.

    ``disc``: the ellipse in the box, which is nearer to a cell's outline; ``box``: all of it.  Where cells overlap a
    pixel belongs to the one whose centre is nearer, in units of half the box.
    """
    if shape not in SHAPES:
        raise SettingError(f"shape={shape!r}", f"it is one of {SHAPES}")
    left, top, right, bottom = (side[:, None] for side in np.asarray(boxes, float).reshape(-1, 4).T)
    with np.errstate(divide="ignore", invalid="ignore"):  # a box without width has no pixels
        rows = np.abs(2 * np.arange(size[0]) + 1 - top - bottom) / (bottom - top)
        columns = np.abs(2 * np.arange(size[1]) + 1 - left - right) / (right - left)
    labels, nearest = np.zeros(size, np.int32), np.full(size, np.inf)
    for number, (row, column) in enumerate(zip(rows, columns, strict=True), 1):
        inside = row[:, None] ** 2 + column[None] ** 2
        distance = inside if shape == "disc" else np.maximum(row[:, None], column[None])
        mine = (distance <= 1) & (distance < nearest)
        labels[mine], nearest[mine] = number, distance[mine]
    return labels


def cell_roc(cells: Cells, draws: int = 1000, seed: int = 0) -> CellROC:
    """ROC of the cells, with intervals from ``draws`` draws.  Raises DataError unless there are cells of both kinds."""
    if cells.positive.all() or not cells.positive.any():
        raise DataError(
            f"of {len(cells.score)} cells, {int(cells.positive.sum())} are of the class", "give cells of both kinds"
        )
    order = np.argsort(cells.picture, kind="stable")
    score, positive, picture, area = (
        values[order] for values in (cells.score, cells.positive, cells.picture, cells.area)
    )
    terciles = np.quantile(area[positive], [1 / 3, 2 / 3])
    third = np.where(positive, np.searchsorted(terciles, area, side="left"), -1)
    drawn = _draw(picture, draws, np.random.default_rng(seed))
    aucs = np.array([_aucs(score[rows], third[rows]) for rows in drawn]).reshape(-1, 4)
    plain = _aucs(score, third)
    by_size = tuple(
        SizeClass(
            int(area[third == k].min()),
            int(area[third == k].max()),
            int((third == k).sum()),
            float(plain[k + 1]),
            _interval(aucs[:, k + 1]),
        )
        for k in range(3)
        if (third == k).any()
    )
    false, true = _curve(score, positive)
    others = int((~positive).sum())
    return CellROC(
        float(plain[0]), _interval(aucs[:, 0]), false, true, by_size, len(score) - others, others,
        len(np.unique(picture)),
    )  # fmt: skip


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve of scores (n,), by ranks (Mann-Whitney); NaN unless there are both kinds."""
    return float(_aucs(scores, np.where(positive, 0, -1))[0])


def _aucs(scores: np.ndarray, third: np.ndarray) -> np.ndarray:
    """AUC of all cells of the class, and of those of each tercile, against the others (``third`` -1); (4,)."""
    others = np.sort(scores[third < 0])
    low, high = (np.searchsorted(others, scores, side=side) for side in ("left", "right"))
    won = low + high  # in half pairs, as integers: the sum does not depend on the order
    with np.errstate(invalid="ignore", divide="ignore"):
        kinds = [third >= 0, *(third == k for k in range(3))]
        return np.array([won[kind].sum() / np.float64(2 * len(others) * kind.sum()) for kind in kinds])


def _draw(picture: np.ndarray, draws: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Rows of each draw: pictures with replacement, then as many cells of each, with replacement."""
    _, starts, counts = np.unique(picture, return_index=True, return_counts=True)
    drawn = []
    for _ in range(draws):
        chosen = rng.integers(len(starts), size=len(starts))
        many = counts[chosen]
        drawn.append(np.repeat(starts[chosen], many) + (rng.random(many.sum()) * np.repeat(many, many)).astype(int))
    return drawn


def _interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 %; draws without cells of both kinds count for nothing."""
    values = values[np.isfinite(values)]
    if not len(values):
        return (float("nan"), float("nan"))
    low, high = np.quantile(values, [0.025, 0.975])
    return (float(low), float(high))


def _curve(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates where the threshold falls from above all scores to below them."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.diff(scores[order], append=np.nan) != 0)  # the last of each run of equal scores
    true, false = (np.concatenate([[0], np.cumsum(kind[order])[ends]]) for kind in (positive, ~positive))
    return false / false[-1], true / true[-1]
