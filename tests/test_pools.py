"""Max-pooling with relevance in proportion to the values of each window, against loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from function_cases import CASES
from test_functions import Between, calls, plainly
from torch import Tensor, nn
from torch.nn import functional as F

from pfungst.errors import RelevanceError, SettingError
from pfungst.lrp import LRP, Preset, Row, preset
from pfungst.lrp.rules import Epsilon

PROPORTIONAL = Preset("proportional", (Row(Epsilon(0.0)),), max_pool="proportional")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fixed_windows(size: int, kernel: int, stride: int, padding: int, outputs: int) -> list[range]:
    """Of one axis, without what is padding."""
    starts = [k * stride - padding for k in range(outputs)]
    return [range(max(0, start), min(size, start + kernel)) for start in starts]


def adaptive_windows(size: int, outputs: int) -> list[range]:
    return [range(k * size // outputs, -(-(k + 1) * size // outputs)) for k in range(outputs)]


def places(windows: list[list[range]]) -> Iterator[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
    """Each output with the inputs in its window."""
    for at in product(*(range(len(axis)) for axis in windows)):
        yield at, list(product(*(axis[k] for axis, k in zip(windows, at, strict=True))))


def shared(x: Tensor, R: Tensor, windows: list[list[range]]) -> Tensor:
    out = torch.zeros_like(x)
    for n, c in product(range(x.shape[0]), range(x.shape[1])):
        for at, window in places(windows):
            values = [float(x[(n, c, *p)]) for p in window]
            if max(values) > 0:
                values = [max(v, 0.0) for v in values]
            if max(values) == 0:
                continue
            for p, value in zip(window, values, strict=True):
                out[(n, c, *p)] += value / sum(values) * float(R[(n, c, *at)])
    return out


POOLS: dict[str, tuple[nn.Module, tuple[int, ...], Callable[[Tensor], list[list[range]]]]] = {
    "1d": (nn.MaxPool1d(2), (7,), lambda y: [fixed_windows(7, 2, 2, 0, y.shape[2])]),
    "1d, overlapping, padded": (nn.MaxPool1d(3, 2, 1), (8,), lambda y: [fixed_windows(8, 3, 2, 1, y.shape[2])]),
    "2d": (
        nn.MaxPool2d((3, 2), (2, 1), (1, 0)),
        (6, 5),
        lambda y: [fixed_windows(6, 3, 2, 1, y.shape[2]), fixed_windows(5, 2, 1, 0, y.shape[3])],
    ),
    "2d, ceil": (
        nn.MaxPool2d(2, ceil_mode=True),
        (5, 7),
        lambda y: [fixed_windows(5, 2, 2, 0, 3), fixed_windows(7, 2, 2, 0, 4)],
    ),
    "3d": (nn.MaxPool3d(2, 1), (3, 4, 3), lambda y: [fixed_windows(s, 2, 1, 0, s - 1) for s in (3, 4, 3)]),
    "adaptive 1d": (nn.AdaptiveMaxPool1d(3), (7,), lambda y: [adaptive_windows(7, 3)]),
    "adaptive 2d": (nn.AdaptiveMaxPool2d((3, 1)), (7, 4), lambda y: [adaptive_windows(7, 3), adaptive_windows(4, 1)]),
    "adaptive 3d": (nn.AdaptiveMaxPool3d(2), (3, 4, 5), lambda y: [adaptive_windows(s, 2) for s in (3, 4, 5)]),
}


@pytest.mark.parametrize("before", ["signed", "nonnegative", "below zero"])
@pytest.mark.parametrize("name", POOLS)
def test_relevance_of_each_window_in_proportion(name: str, before: str) -> None:
    pool, shape, windows = POOLS[name]
    x = drawn(2, 3, *shape)
    x = {"signed": x, "nonnegative": x.relu(), "below zero": -x.abs() - 0.1}[before]
    y = pool(x)
    v = drawn(*y.shape[1:], seed=1)
    result = LRP(lambda x: (pool(x) * v).flatten(1).sum(1, keepdim=True), PROPORTIONAL)(x, 0)
    expected = shared(x, y * v, windows(y))
    torch.testing.assert_close(result.scores, expected, rtol=1e-10, atol=1e-12)
    gap = result.explained - result.scores.flatten(1).sum(1) - result.absorbed
    assert float(gap.abs().max()) < 1e-10


def test_every_spelling() -> None:
    """Of the same cases as for the winner: all spellings agree, and values are the model's own."""
    for row in [row for row in CASES if "max_pool" in row and "fractional" not in row]:
        for case in CASES[row]:
            known: list[Any] = []
            for label, call, in_place in calls(row):
                model = Between(case, call, in_place)
                output = plainly(model)
                if output is None:
                    continue
                result = LRP(model, PROPORTIONAL)(drawn_inputs(case), 1)
                assert torch.equal(result.output, output), label
                same = [scores for other, scores in known if torch.equal(other, output)]
                assert not same or torch.allclose(same[0], result.scores, rtol=1e-9, atol=1e-12), label
                known.append((output, result.scores))


def drawn_inputs(case: Any) -> Tensor:
    from test_functions import X

    return X[: case.batch]


def test_the_winner_is_the_default_and_the_first_of_equals() -> None:
    x = torch.tensor([[[1.0, 3, 3, 2]]], dtype=torch.float64)
    body = lambda x: F.max_pool1d(x, 4)[:, 0]  # noqa: E731
    assert LRP(body, "epsilon")(x, 0).scores.tolist() == [[[0, 3, 0, 0]]]
    shares = LRP(body, replace(preset("epsilon"), max_pool="proportional"))(x, 0).scores
    torch.testing.assert_close(shares, x / 9 * 3)
    assert "max_pool=proportional" in PROPORTIONAL.describe()
    with pytest.raises(SettingError, match="winner, proportional"):
        Preset("typo", (), max_pool="all")
    with pytest.raises(RelevanceError, match="dilation"):
        LRP(lambda x: F.max_pool1d(x, 2, dilation=2)[:, 0], PROPORTIONAL)(x, 0)
