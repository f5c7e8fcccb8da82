"""What is explained: every target's start by hand, entry by entry; which of several outputs."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from test_engine import Net, drawn, out, plain
from torch import Tensor, nn

from pfungst.errors import PfungstError, RelevanceError, SettingError
from pfungst.lrp import LRP, Contrast, Logit, LogOdds, Margin, Region, Several, Similarity, Unit, Weights

X = drawn(3, 3, 6, 6)
K = 5


def ledger_gap(result: Any, scores: list[Tensor] | None = None) -> float:
    """By how much f and Σ scores + absorbed differ, relative to the greater of f and Σ |scores|."""
    scores = [result.scores] if scores is None else scores
    total = sum(s.flatten(1).sum(1, dtype=torch.float64) for s in scores)
    size = sum(s.flatten(1).abs().sum(1) for s in scores) + result.explained.abs()
    assert torch.equal(sum(result.ledger.values()), result.absorbed)
    return float(((result.explained - total - result.absorbed).abs() / size.clamp(min=1e-30)).max())


def by_class(x: Tensor = X, body: Any = plain) -> Tensor:
    """The map of each output, (outputs, n, ...): LRP is linear in the relevance with which it starts."""
    return torch.stack([LRP(Net(body))(x, k).scores for k in range(K)])


def combined(c: list[list[float]]) -> Tensor:
    return torch.einsum("nk,kn...->n...", torch.tensor(c, dtype=torch.float64), by_class())


def outputs() -> list[list[float]]:
    with torch.no_grad():
        return Net(plain)(X).tolist()


# Each case: the target, and by hand in plain Python f and c = R / y at the output, from one sample's outputs y.
def _log_odds(y: list[float], k: int) -> tuple[float, list[float]]:
    total = sum(math.exp(v) for j, v in enumerate(y) if j != k)
    return y[k] - math.log(total), [1.0 if j == k else -math.exp(v) / total for j, v in enumerate(y)]


def _margin(y: list[float], a: int, b: int) -> tuple[float, list[float]]:
    return y[a] - y[b], [float(j == a) - float(j == b) for j in range(K)]


def _runner_up(y: list[float], a: int) -> int:
    return max((j for j in range(K) if j != a), key=lambda j: y[j])


def _contrast(y: list[float], k: int) -> tuple[float, list[float]]:
    rest = sum(v for j, v in enumerate(y) if j != k) / (K - 1)
    return y[k] - rest, [1.0 if j == k else -1 / (K - 1) for j in range(K)]


REFERENCE = [0.5, -1.0, 2.0, 0.25, 1.5]


def _dot(y: list[float], scale: float) -> tuple[float, list[float]]:
    return scale * sum(a * b for a, b in zip(y, REFERENCE, strict=True)), [scale * r for r in REFERENCE]


def _cosine(y: list[float]) -> tuple[float, list[float]]:
    return _dot(y, 1 / (math.hypot(*y) * math.hypot(*REFERENCE)))


CASES: dict[str, tuple[Any, Any]] = {
    "logit": (Logit(2), lambda y, i: (y[2], [0, 0, 1, 0, 0])),
    "logit of each": (Logit([0, 4, 2]), lambda y, i: (y[[0, 4, 2][i]], [float(j == [0, 4, 2][i]) for j in range(K)])),
    "log-odds": (LogOdds(3), lambda y, i: _log_odds(y, 3)),
    "log-odds of the greatest": (LogOdds(), lambda y, i: _log_odds(y, y.index(max(y)))),
    "log-odds of a sigmoid": (LogOdds(1, of="sigmoid"), lambda y, i: (y[1], [0, 1, 0, 0, 0])),
    "margin": (Margin(1, 4), lambda y, i: _margin(y, 1, 4)),
    "margin to the next": (Margin(1), lambda y, i: _margin(y, 1, _runner_up(y, 1))),
    "contrast": (Contrast(0), lambda y, i: _contrast(y, 0)),
    "a set of labels": (Weights(torch.tensor([1, 0, 0, 1, 1])), lambda y, i: (y[0] + y[3] + y[4], [1, 0, 0, 1, 1])),
    "cosine": (Similarity(torch.tensor(REFERENCE)), lambda y, i: _cosine(y)),
    "dot product": (Similarity(torch.tensor(REFERENCE), cosine=False), lambda y, i: _dot(y, 1)),
    "unit": (Unit((-2,)), lambda y, i: (y[3], [0, 0, 0, 1, 0])),
    "a function": (
        lambda y: (y[:, 0] * y[:, 1]).tanh(),
        lambda y, i: (
            math.tanh(y[0] * y[1]),
            [(1 - math.tanh(y[0] * y[1]) ** 2) * v for v in (y[1], y[0], 0, 0, 0)],
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_targets_by_hand(case: str) -> None:
    target, by_hand = CASES[case]
    expected = [by_hand(y, i) for i, y in enumerate(outputs())]
    result = LRP(Net(plain))(X, target)
    torch.testing.assert_close(result.explained, torch.tensor([f for f, _ in expected], dtype=torch.float64))
    torch.testing.assert_close(result.scores, combined([c for _, c in expected]), rtol=1e-9, atol=1e-12)
    assert ledger_gap(result) < 1e-12
    rest = [f - sum(a * b for a, b in zip(c, y, strict=True)) for (f, c), y in zip(expected, outputs(), strict=True)]
    if max(map(abs, rest)) > 1e-9:
        torch.testing.assert_close(result.ledger["target"], torch.tensor(rest, dtype=torch.float64))
    else:
        assert "target" not in result.ledger


def test_several_targets_share_one_forward_pass() -> None:
    calls: list[int] = []
    net = Net(lambda n, x: (calls.append(1), plain(n, x))[1])
    targets = [0, [1, 2, 3], Margin(0, 3), lambda y: y.square().sum(1), None]
    results = LRP(net)(X, Several(targets), layers=["second"])
    assert len(calls) == 1
    assert len(results) == len(targets)
    for target, result in zip(targets, results, strict=True):
        alone = LRP(net)(X, target, layers=["second"])
        assert torch.equal(result.scores, alone.scores)
        assert torch.equal(result.absorbed, alone.absorbed)
        assert torch.equal(result.at("second"), alone.at("second"))
        torch.testing.assert_close(result.at("first"), LRP(net)(X, target, layers=["first"]).at("first"))


def test_regression() -> None:
    for body in (lambda n, x: plain(n, x)[:, 1], lambda n, x: plain(n, x)[:, 1:2]):
        result = LRP(Net(body))(X)
        torch.testing.assert_close(result.scores, by_class()[1])
        torch.testing.assert_close(result.explained, torch.tensor(outputs(), dtype=torch.float64)[:, 1])
        torch.testing.assert_close(LRP(Net(body))(X, LogOdds()).scores, by_class()[1])
        assert "absorbs" in str(LRP(Net(body)).plan(X))
        with pytest.raises(SettingError, match="one output"):
            LRP(Net(body))(X, Contrast(0))


def dense(n: Any, x: Tensor) -> Tensor:
    """(n, 4, 6, 6): a class for every pixel."""
    return n.norm(n.second(n.first(x).relu()))


def test_regions_of_a_dense_output() -> None:
    lrp = LRP(Net(dense))
    pixel = [[lrp(X, Unit((2, i, j))).scores for j in range(6)] for i in range(6)]
    mask = drawn(6, 6, seed=3) > 0.3
    weights = drawn(3, 6, 6, seed=4)
    inside = [(i, j) for i in range(6) for j in range(6) if mask[i, j]]
    for where, expected in (
        (mask, sum(pixel[i][j] for i, j in inside)),
        ((slice(1, 3), 4), pixel[1][4] + pixel[2][4]),
        (None, sum(map(sum, pixel))),
        (weights, sum(weights[:, i, j, None, None, None] * pixel[i][j] for i in range(6) for j in range(6))),
    ):
        result = lrp(X, Region(2, where))
        torch.testing.assert_close(result.scores, expected, rtol=1e-9, atol=1e-12)
        assert ledger_gap(result) < 1e-12
    with torch.no_grad():
        y = Net(dense)(X)
    each = lrp(X, Region(where=mask))
    assert torch.equal(each.explained.argmax(), (y * mask).sum((2, 3)).amax(1).argmax())
    torch.testing.assert_close(each.explained, (y * mask).sum((2, 3)).amax(1))
    last = LRP(Net(lambda n, x: dense(n, x).permute(0, 2, 3, 1)))
    torch.testing.assert_close(last(X, Region(2, mask, axis=-1)).scores, lrp(X, Region(2, mask)).scores)
    places = torch.tensor([[0, 1, 2], [3, 0, 0], [1, 5, 5]])
    mixed = lrp(X, Unit(places))
    for i, place in enumerate(places.tolist()):
        torch.testing.assert_close(mixed.scores[i], lrp(X, Unit(place)).scores[i])
    with pytest.raises(RelevanceError, match=r"expected(.|\n)*Region"):
        lrp(X, 2)
    assert lrp.plan(X, Region(1)).total == pytest.approx(
        float((lrp(X, Region(1)).absorbed / lrp(X, Region(1)).explained).mean())
    )


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Weights(torch.ones(4)), "Weights has shape"),
        (Unit((0, 1)), "one for each axis"),
        (Unit((5,)), "outside"),
        (Region(0, (slice(0, 2), 3, 4)), "Region"),
        (Margin(0, 9), "outside the model's 5 outputs"),
        (lambda y: y, "one number a sample"),
        (lambda y: torch.zeros(len(y)), "does not depend"),
        (lambda y: 3.0, "one number a sample"),
        ("cat", "none that can be explained"),
        (Several([]), "at least one"),
    ],
)
def test_targets_that_do_not_fit(target: Any, message: str) -> None:
    with pytest.raises(PfungstError, match=message):
        LRP(Net(plain))(X, target)
    with pytest.raises(SettingError, match="'softmax' or 'sigmoid'"):
        LogOdds(0, of="probit")


# ---- which output ------------------------------------------------------------------------------------------------


class Both(NamedTuple):
    loss: Tensor
    logits: Tensor
    hidden: Tensor


@dataclass
class Answer:
    logits: Tensor
    steps: int = 3


def _both(n: Any, x: Tensor) -> Both:
    h = n.norm(n.second(n.first(x).relu())).relu()
    return Both(h.mean(), out(n, h), h)


STRUCTURES: dict[str, tuple[Any, Any]] = {
    "a tuple, by place": (lambda n, x: tuple(_both(n, x)), 1),
    "a tuple, from the end": (lambda n, x: tuple(_both(n, x)), -2),
    "a named tuple, by name": (_both, "logits"),
    "a dict, by key": (lambda n, x: _both(n, x)._asdict(), "logits"),
    "an ordered dict": (lambda n, x: OrderedDict(_both(n, x)._asdict()), "logits"),
    "a function": (_both, lambda answer: answer.logits),
    "the only one of a tuple": (lambda n, x: (_both(n, x).logits, 7, None, x.argmax()), None),
    "the only one of a dict": (lambda n, x: {"logits": _both(n, x).logits, "loss": _both(n, x).loss}, None),
    "the only one of an object": (lambda n, x: Answer(_both(n, x).logits), None),
}


@pytest.mark.parametrize("case", STRUCTURES)
def test_outputs(case: str) -> None:
    body, choice = STRUCTURES[case]
    result = LRP(Net(body), output=choice)(X, 2)
    expected = LRP(Net(plain))(X, 2)
    assert torch.equal(result.output, expected.output)
    torch.testing.assert_close(result.scores, expected.scores)
    assert ledger_gap(result) < 1e-12


def test_outputs_that_cannot_be_told() -> None:
    with pytest.raises(RelevanceError, match=r"Both with 2 tensors of scores: 1, 2"):
        LRP(Net(_both))(X)
    with pytest.raises(SettingError, match=r"no output 'scores'(.|\n)*'logits'"):
        LRP(Net(lambda n, x: _both(n, x)._asdict()), output="scores")(X)
    with pytest.raises(RelevanceError, match=r"shape \(\) for 3"):
        LRP(Net(_both), output="loss")(X)
    with pytest.raises(RelevanceError, match="is a int"):
        LRP(Net(_both), output=lambda answer: 3)(X)


def test_an_embedding_is_explained_wholly() -> None:
    """The cosine's own gradient is at right angles to the embedding: its relevance would add up to nothing."""
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    x = drawn(5, 4)
    with torch.no_grad():
        y, r = net(x), drawn(5, 3, seed=2)
    result = LRP(net, "epsilon")(x, Similarity(r))
    torch.testing.assert_close(result.explained, torch.cosine_similarity(y, r))
    torch.testing.assert_close(result.scores.sum(1), result.explained, rtol=1e-4, atol=1e-6)
