"""Maps to vectors: pooling by area, unit rows, layers to look at, and the gate against blown-up maps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pfungst.lrp.plan import Step
from pfungst.vectors import area_matrix, choose_layers, gate_maps, pool_channels, pool_maps, unit_rows


def _pool_slowly(scores: np.ndarray, grid: int) -> np.ndarray:
    """Every pixel shares its relevance among the cells by the area in which they overlap."""
    n, channels, height, width = scores.shape
    out = np.zeros((n, grid, grid))
    for row in range(grid):
        for column in range(grid):
            top, bottom = row * height / grid, (row + 1) * height / grid
            left, right = column * width / grid, (column + 1) * width / grid
            for y in range(height):
                for x in range(width):
                    tall = max(0.0, min(bottom, y + 1) - max(top, y))
                    wide = max(0.0, min(right, x + 1) - max(left, x))
                    for c in range(channels):
                        out[:, row, column] += tall * wide * scores[:, c, y, x]
    return out.reshape(n, -1)


@pytest.mark.parametrize(("height", "width", "grid"), [(12, 12, 4), (13, 7, 4), (9, 16, 5), (3, 5, 7), (1, 8, 3)])
def test_pooling_equals_a_slow_loop_by_area(height: int, width: int, grid: int) -> None:
    scores = torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pooled = pool_maps(scores, grid)
    assert pooled.shape == (2, grid * grid)
    # The shares of the area are float32.
    np.testing.assert_allclose(pooled.numpy(), _pool_slowly(scores.numpy(), grid), rtol=0, atol=2e-6)
    np.testing.assert_allclose(pooled.sum(1), scores.sum((1, 2, 3)), rtol=0, atol=2e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_pooling_keeps_signs(sign: float) -> None:
    scores = sign * torch.rand(1, 1, 11, 17, generator=torch.Generator().manual_seed(1))
    assert (sign * pool_maps(scores, 4) > 0).all()
    spot = torch.zeros(1, 1, 10, 10)
    spot[0, 0, 9, 0] = sign
    pooled = pool_maps(spot, 5)[0].reshape(5, 5)
    assert pooled[4, 0] == pytest.approx(sign, abs=1e-6)
    assert (pooled != 0).sum() == 1


@pytest.mark.parametrize(("pixels", "cells"), [(224, 20), (7, 20), (20, 20), (31, 4)])
def test_every_pixel_is_shared_out_wholly(pixels: int, cells: int) -> None:
    shares = area_matrix(pixels, cells)
    assert shares.shape == (cells, pixels)
    assert (shares >= 0).all()
    np.testing.assert_allclose(shares.sum(0), 1, atol=1e-6)
    np.testing.assert_allclose(shares.sum(1), pixels / cells, rtol=1e-5)


def test_channels_are_summed_and_their_greatest_place_is_kept() -> None:
    relevance = np.random.default_rng(0).normal(size=(3, 4, 5, 6)) - 2  # mostly negative: the greatest is signed
    sums, strongest = pool_channels(torch.from_numpy(relevance))
    for i in range(3):
        for c in range(4):
            assert float(sums[i, c]) == pytest.approx(math.fsum(relevance[i, c].ravel()))
            assert float(strongest[i, c]) == max(relevance[i, c].ravel())
    flat = torch.from_numpy(relevance[:, :, 0, 0])
    assert all(torch.equal(part, flat) for part in pool_channels(flat))


def test_unit_rows_keep_signs_where_the_sum_is_negative() -> None:
    rows = np.random.default_rng(0).normal(size=(200, 30))
    assert (rows.sum(1) < 0).sum() > 50
    scaled = unit_rows(rows)
    np.testing.assert_allclose([math.sqrt(math.fsum(v * v for v in row)) for row in scaled], 1, rtol=1e-12)
    assert np.array_equal(np.sign(scaled), np.sign(rows))
    np.testing.assert_allclose(unit_rows(rows * 1e-9), scaled, rtol=1e-9)
    assert np.array_equal(unit_rows(np.array([[0.0, 0.0], [0.0, -2.0]])), [[0, 0], [0, -1]])


def test_layers_are_spread_from_the_first_convolution_to_the_last() -> None:
    kinds = ["convolution", "batch_norm", "", "convolution", "dense"] * 5
    steps = [Step(f"s{i}", "f", kind) for i, kind in enumerate(kinds)]
    names = [step.name for step in steps if step.kind == "convolution"]
    assert len(names) == 10
    assert choose_layers(steps) == (names[0], names[3], names[6], names[9])
    assert choose_layers(steps, 2) == (names[0], names[-1])
    assert choose_layers(steps, 10) == choose_layers(steps, 99) == tuple(names)
    assert choose_layers([Step("fc", "linear", "dense")]) == ()
    for count in range(2, 10):
        chosen = choose_layers(steps, count)
        assert len(set(chosen)) == count
        assert list(chosen) == [name for name in names if name in chosen]


def _good_maps() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Twenty maps whose sum and absorbed part make up the output."""
    rng = np.random.default_rng(0)
    pooled = rng.normal(size=(20, 16)).astype(np.float32)
    absorbed = rng.normal(size=20)
    return pooled, pooled.sum(1, dtype=np.float64) + absorbed, absorbed


def test_good_maps_pass_the_gate() -> None:
    pooled, explained, absorbed = _good_maps()
    assert gate_maps(pooled, explained, absorbed) == [""] * 20
    assert gate_maps(pooled[:0], explained[:0], absorbed[:0]) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_gate_stops_what_is_not_finite(bad: float) -> None:
    for place in ("map", "output"):
        pooled, explained, absorbed = _good_maps()
        if place == "map":
            pooled[3, 5] = bad
        else:
            explained[3] = bad
        reasons = gate_maps(pooled, explained, absorbed)
        assert reasons[3] == "relevance is not finite"
        assert [i for i, reason in enumerate(reasons) if reason] == [3]


def test_gate_gives_every_other_reason() -> None:
    pooled, explained, absorbed = _good_maps()
    pooled[1] = 0
    explained[1] = absorbed[1]
    totals = np.abs(pooled).sum(1)
    typical = np.median(totals[totals > 0])
    explained[2] += 0.02 * max(totals[2], abs(explained[2]))
    explained[4] += 0.005 * totals[4]  # within what rounding may cost
    for row, factor in ((5, 1200), (6, 800)):
        pooled[row] *= factor * typical / totals[row]
        explained[row] = pooled[row].sum(dtype=np.float64) + absorbed[row]
    reasons = gate_maps(pooled, explained, absorbed)
    assert {i: reason for i, reason in enumerate(reasons) if reason} == {
        1: "relevance is zero everywhere",
        2: "relevance does not add up to the output",
        5: "relevance is 1000 times stronger than usual",
    }


def test_gate_of_nothing_but_empty_maps() -> None:
    assert set(gate_maps(np.zeros((3, 4)), np.zeros(3), np.zeros(3))) == {"relevance is zero everywhere"}
