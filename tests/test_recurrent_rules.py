"""Rules in recurrent nodes: Recurrent in ordinary layers, other rules inside cells, rules of the input layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from test_engine import drawn, gap
from test_recurrent import FEATURES, KINDS, SAMPLES, STEPS, UNITS, network
from test_rules import LAYERS, check, randomise
from torch import Tensor, nn

from pfungst.errors import RelevanceError, SettingError
from pfungst.lrp import LRP, Preset, Row
from pfungst.lrp.rules import AlphaBeta, Epsilon, Flat, Gamma, Recurrent, Rule, WSquare, ZBox, ZPlus

Shares = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_shared_bias_in_ordinary_layers(name: str, bias: bool) -> None:
    """R_i = Σ_k (x_i w_ik + δ (b_k + ε sign z_k) / N_k) / (z_k + ε sign z_k) R_k over the N_k inputs in reach."""
    make, shape = LAYERS[name]
    node = randomise(make(bias))
    J, b = oracles.matrix(node, shape)
    reach = oracles.reach(node, shape)
    x = drawn(2, *shape)
    x.view(2, -1)[:, 1] = 0  # behind another layer its share is in the ledger

    def oracle(x: Tensor, R: Tensor) -> Tensor:
        z = oracles.contributions(x, J)
        y = z.sum(1) + b
        stable = torch.where(y >= 0, y + 0.3, y - 0.3)
        parts = z + 0.7 * (stable - z.sum(1))[:, None, :] * (reach / reach.sum(1, keepdim=True).clamp(min=1)).T
        return oracles.share(parts, stable, R) * (x.flatten(1) != 0)

    check(node, shape, Recurrent(0.3, 0.7), oracle, x)


# ---- other rules inside a cell -------------------------------------------------------------------------------------

INNER: dict[str, tuple[Rule, Shares]] = {
    "epsilon": (Epsilon(0.1), lambda x, J, b, R: oracles.epsilon(x, J, b, R, 0.1)),
    "zero": (Epsilon(0), oracles.zero),
    "z+": (ZPlus(), oracles.z_plus),
    "alpha 2 beta 1": (AlphaBeta(2, 1), lambda x, J, b, R: oracles.alpha_beta(x, J, b, R, 2, 1)),
    "gamma": (Gamma(0.4), lambda x, J, b, R: oracles.gamma(x, J, b, R, 0.4)),
}
LOW, HIGH = -4.0, 5.0
INPUT: dict[str, tuple[Rule, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "flat": (Flat(), lambda x, J, R: oracles.flat(x, torch.ones_like(J), R)),
    "w square": (WSquare(), oracles.w_square),
    "z box": (ZBox(), lambda x, J, R: oracles.z_box(x, J, R, torch.full_like(x, LOW), torch.full_like(x, HIGH))),
    "z+": (ZPlus(), lambda x, J, R: oracles.z_plus(x, J, torch.zeros(len(J)).double(), R)),
}


def simple(net: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """W, U and the whole bias."""
    p = {name: value.detach() for name, value in net.named_parameters()}
    return p["weight_ih_l0"], p["weight_hh_l0"], p["bias_ih_l0"] + p["bias_hh_l0"]


def states(net: nn.Module, x: Tensor) -> list[Tensor]:
    """h before every step, and after the last."""
    W, U, b = simple(net)
    h = [torch.zeros(len(x), UNITS).double()]
    for t in range(x.shape[1]):
        h.append(torch.tanh(x[:, t] @ W.T + h[-1] @ U.T + b))
    return h


@pytest.mark.parametrize("rule", INNER)
def test_other_rules_take_input_and_state_as_one(rule: str) -> None:
    ours, shares = INNER[rule]
    net, x = network("rnn_tanh"), drawn(SAMPLES, STEPS, FEATURES)
    W, U, b = simple(net)
    h = states(net, x)
    R, expected = torch.zeros(SAMPLES, UNITS).double(), torch.zeros_like(x)
    R[:, 1] = h[-1][:, 1]
    for t in reversed(range(STEPS)):
        lower = shares(torch.cat([x[:, t], h[t]], 1), torch.cat([W, U], 1), b, R)
        expected[:, t], R = lower[:, :FEATURES], lower[:, FEATURES:]
    result = LRP(lambda v: net(v)[0][:, -1], Preset("inner", (Row(ours),)))(x, 1)
    torch.testing.assert_close(result.scores, expected, rtol=1e-9, atol=1e-10 * float(expected.abs().max()))
    assert gap(result) < 1e-9


@pytest.mark.parametrize("first", INPUT)
@pytest.mark.parametrize("inner", ["epsilon", "shared bias", "z+"])
def test_rules_of_the_input_layer(inner: str, first: str) -> None:
    """First the sum W x + U h + b is shared in proportion to its parts (ε at the total), then each by its rule."""
    rule = {"epsilon": Epsilon(0.1), "shared bias": Recurrent(0.1, 1), "z+": ZPlus()}[inner]
    ours, shares = INPUT[first]
    net, x = network("rnn_tanh"), drawn(SAMPLES, STEPS, FEATURES)
    W, U, b = simple(net)
    h = states(net, x)
    R, expected = torch.zeros(SAMPLES, UNITS).double(), torch.zeros_like(x)
    R[:, 1] = h[-1][:, 1]
    zero = torch.zeros(UNITS).double()
    for t in reversed(range(STEPS)):
        z_x, z_h = x[:, t] @ W.T, h[t] @ U.T
        total = z_x + z_h + b
        if inner == "z+" and first == "z+":  # one rule for both: no need to part them
            lower = oracles.z_plus(torch.cat([x[:, t], h[t]], 1), torch.cat([W, U], 1), b, R)
            expected[:, t], R = lower[:, :FEATURES], lower[:, FEATURES:]
            continue
        stable = total if inner == "z+" else torch.where(total >= 0, total + 0.1, total - 0.1)
        expected[:, t] = shares(x[:, t], W, z_x / stable * R)
        below = (oracles.z_plus if inner == "z+" else oracles.zero)(h[t], U, zero, z_h / stable * R)
        if inner == "shared bias":
            every = ((stable - z_x - z_h) / stable * R).sum(1, keepdim=True) / (FEATURES + UNITS)
            expected[:, t] += every
            below = below + every
        R = below
    preset = Preset("first", (Row(ours, position="input"), Row(rule)))
    result = LRP(lambda v: net(v)[0][:, -1], preset, bounds=(LOW, HIGH))(x, 1)
    torch.testing.assert_close(result.scores, expected, rtol=1e-9, atol=1e-10 * float(expected.abs().max()))
    assert gap(result) < 1e-9


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gates", ["all", "half", "abs"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_in_every_cell_closes_the_ledger(kind: str, gates: str, packed: bool) -> None:
    net, x = network(kind, bidirectional=True, num_layers=2), drawn(SAMPLES, STEPS, FEATURES)

    def model(v: Tensor) -> Tensor:
        if packed:
            sequence = nn.utils.rnn.pack_padded_sequence(v, torch.tensor([2, 5, 4]), True, enforce_sorted=False)
            return nn.utils.rnn.pad_packed_sequence(net(sequence)[0], True)[0].sum(1)
        return net(v)[0][:, -1]

    for inner in (Epsilon(0), ZPlus(), AlphaBeta(2, 1), Gamma(0.3)):
        for first in (Flat(), WSquare(), ZBox(), inner):
            preset = Preset("some", (Row(first, position="input"), Row(inner)), gates=gates)
            result = LRP(model, preset, bounds=(LOW, HIGH))(x, 1)
            assert gap(result) < 1e-7, (inner.label, first.label)


def test_input_rules_where_they_cannot_be() -> None:
    net, x = network("lstm"), drawn(SAMPLES, STEPS, FEATURES)
    with pytest.raises(RelevanceError, match="zero"):
        LRP(lambda v: net(v)[0][:, -1], Preset("flat", (Row(Flat()),)))(x)
    preset: Any = Preset("flat", (Row(Flat(), position="input"), Row(Epsilon())))
    with pytest.raises(RelevanceError, match="arithmetic"):
        LRP(lambda v: net(torch.tanh(v))[0][:, -1], preset)(x)


@pytest.mark.parametrize("factor", [-0.1, 1.1, float("nan")])
def test_bias_factors_out_of_range(factor: float) -> None:
    with pytest.raises(SettingError, match="between 0 and 1"):
        Recurrent(1e-3, factor)
