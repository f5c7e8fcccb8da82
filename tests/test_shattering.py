"""Measures of noise in maps (``benchmarks/shattering.py``): values known by hand, and what a rerun replaces."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import shattering

SIDE = 64
CHECKERBOARD = np.indices((SIDE, SIDE)).sum(0) % 2 * 2.0 - 1
RAMP = np.add.outer(np.arange(SIDE), np.arange(SIDE)).astype(float)
NOISE = np.random.default_rng(0).standard_normal((SIDE, SIDE))


def test_neighbours() -> None:
    assert shattering.correlate_neighbours(CHECKERBOARD) == pytest.approx(-1)
    assert shattering.correlate_neighbours(RAMP) == pytest.approx(1)
    assert abs(shattering.correlate_neighbours(NOISE)) < 4 / SIDE, "four standard deviations of r"
    assert math.isnan(shattering.correlate_neighbours(np.full((SIDE, SIDE), 0.1, np.float32)))
    rows = np.repeat(NOISE[:, :1], SIDE, 1)  # alike along a row, noise along a column
    assert shattering.correlate_neighbours(rows) == pytest.approx(0.5, abs=0.1)


def test_total_variation() -> None:
    pairs, n = 2 * SIDE * (SIDE - 1), SIDE * SIDE
    assert shattering.total_variation(CHECKERBOARD) == pytest.approx(2 * pairs / n)
    assert shattering.total_variation(-7 * CHECKERBOARD) == pytest.approx(2 * pairs / n), "at unit L1 norm"
    assert shattering.total_variation(np.ones((SIDE, SIDE))) == 0
    assert math.isnan(shattering.total_variation(np.zeros((SIDE, SIDE))))
    # Of half -1 and half 1 without replacement two differ with probability n / 2 / (n - 1), neighbours always.
    assert shattering.relative_variation(CHECKERBOARD) == pytest.approx(2 * (n - 1) / n)
    assert shattering.relative_variation(NOISE) == pytest.approx(1, abs=0.03)
    assert math.isnan(shattering.relative_variation(np.full((SIDE, SIDE), 0.1)))


def test_the_mean_over_shuffles_is_exact() -> None:
    scores = np.random.default_rng(1).standard_cauchy((7, 5))
    rng = np.random.default_rng(2)
    drawn = [shattering.total_variation(rng.permutation(scores.ravel()).reshape(7, 5)) for _ in range(4000)]
    expected = shattering.total_variation(scores) / np.mean(drawn)
    assert shattering.relative_variation(scores) == pytest.approx(expected, rel=0.01)


def test_autocorrelation() -> None:
    rng = np.random.default_rng(0)
    white = rng.standard_normal((33, 40, 40))
    assert shattering.autocorrelate(white, 1) == pytest.approx(-1 / 32, abs=0.02)
    wave = np.sin(2 * np.pi * np.arange(32) / 8)[:, None, None] * np.ones((1, 3, 3))
    assert shattering.autocorrelate(wave, 4) == pytest.approx(-1), "half a period later"
    brownian = white.cumsum(0)
    falls = [shattering.autocorrelate(brownian, lag) for lag in (1, 2, 4)]
    assert falls == sorted(falls, reverse=True)
    assert falls[0] > 0.8
    assert math.isnan(shattering.autocorrelate(np.ones((5, 3, 3)), 1))


def test_agreement_counts_what_stays() -> None:
    rng = np.random.default_rng(3)
    constant = np.broadcast_to(NOISE, (5, SIDE, SIDE))
    assert shattering.agree_at_lag(constant, 2) == pytest.approx(1)
    fresh = rng.standard_normal((5, SIDE, SIDE))
    assert shattering.agree_at_lag(fresh, 1) == pytest.approx(0, abs=0.05)
    assert shattering.agree_at_lag(constant + fresh, 1) == pytest.approx(0.5, abs=0.05), "half of the variance stays"
    assert shattering.agree_when_shifted(NOISE, np.roll(NOISE, -1, 1)) == pytest.approx(1)


def test_the_interval_leaves_out_what_is_not_defined() -> None:
    mean, low, high = shattering.bootstrap(np.array([1.0, 2.0, 3.0, math.nan]))
    assert mean == 2
    assert 1 <= low < 2 < high <= 3
    assert all(map(math.isnan, shattering.bootstrap(np.array([math.nan]))))


def test_the_guide_has_the_tables_of_the_stored_results() -> None:
    with shattering.RESULTS.open(newline="") as file:
        tables = shattering.write_tables(list(csv.DictReader(file)))
    text = shattering.GUIDE.read_text()
    assert tables in text
    assert shattering.replace_between(text, "tables of benchmarks/shattering.py", tables) == text, (
        "a rerun changes nothing"
    )
    with pytest.raises(SystemExit, match="no marks"):
        shattering.replace_between("", "tables", "")
