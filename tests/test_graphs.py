"""Properties over drawn models: relevance is that of a brute-force walk, and what must hold whatever the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import oracles
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from test_rules import randomise
from torch import Tensor, nn
from torch.nn import functional as F
from walks import OPERATIONS, SHAPE, Line, Model, Walk, constant

from pfungst.errors import UnknownFunction
from pfungst.lrp import LRP, Preset, Row
from pfungst.lrp.rules import AlphaBeta, Epsilon, Flat, Gamma, Rule, WSquare, ZPlus

# The same draws every time, and few: each of them is a whole model.
drawn = partial(settings, derandomize=True, deadline=None, database=None)
RULES: dict[str, tuple[Rule, Any]] = {
    "zero": (Epsilon(0.0), oracles.zero),
    "epsilon": (Epsilon(0.1), partial(oracles.epsilon, epsilon=0.1)),
    "z+": (ZPlus(), oracles.z_plus),
    "alpha-beta": (AlphaBeta(2, 1), partial(oracles.alpha_beta, alpha=2, beta=1)),
    "gamma": (Gamma(0.5), partial(oracles.gamma, gamma=0.5)),
}
PROGRAMS = st.lists(
    st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=9
)


def _first(name: str) -> tuple[Row, ...]:
    return (Row({"flat": Flat(), "w²": WSquare()}[name], position="input"),) if name else ()


def _oracle_of_the_first(name: str, model: Model) -> Any:
    if name == "flat":
        near = oracles.reach(model.parts["conv"], SHAPE)
        return lambda x, J, b, R: oracles.flat(x, near, R)
    return (lambda x, J, b, R: oracles.w_square(x, J, R)) if name == "w²" else None


@drawn(max_examples=300)
@example([("max_pool", 0, 0)] * 2, "zero", "zero", "", "all", 0)  # ties
@given(
    program=PROGRAMS,
    convolution=st.sampled_from(sorted(RULES)),
    dense=st.sampled_from(sorted(RULES)),
    first=st.sampled_from(["", "flat", "w²"]),
    gates=st.sampled_from(["all", "half", "prop", "abs"]),
    seed=st.integers(0, 3),
)
def test_relevance_of_drawn_models_is_that_of_a_walk(
    program: list[Line], convolution: str, dense: str, first: str, gates: str, seed: int
) -> None:
    model, x = Model(program), constant(2, *SHAPE, seed=20 + seed)
    rows = (*_first(first), Row(RULES[convolution][0], "convolution"), Row(RULES[dense][0]))
    with torch.no_grad():
        expected = model(x)
        walk = Walk(RULES[convolution][1], RULES[dense][1], model.parts, _oracle_of_the_first(first, model), gates)
        output, R, scale = walk(program, x, 1)
    assume(not walk.cancels)
    result = LRP(model, Preset("drawn", rows, gates=gates))(x, 1)
    assert torch.equal(result.output, expected)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.scores, R, rtol=1e-8, atol=1e-10 * scale)
    gap = result.explained - result.scores.flatten(1).sum(1) - result.absorbed
    assert float(gap.abs().max()) < 1e-10 * scale


# ---- the same model in other words -------------------------------------------------------------------------------


def _explain(model: nn.Module, x: Tensor, which: str, layers: tuple[str, ...] = ()) -> Any:
    return LRP(model, Preset("drawn", (Row(RULES[which][0]),)))(x, 1, layers=layers)


@drawn(max_examples=60)
@given(program=PROGRAMS, which=st.sampled_from(sorted(RULES)))
def test_modules_functions_and_copies_are_explained_alike(program: list[Line], which: str) -> None:
    x = constant(2, *SHAPE, seed=20)
    expected = _explain(Model(program), x, which)
    for options in ({"modules": True}, {"unrolled": True}):
        model = Model(program, **options)
        with torch.no_grad():
            model(x.clone())  # makes the copies
        ours = _explain(model, x, which)
        assert torch.equal(ours.output, expected.output)
        assert torch.equal(ours.scores, expected.scores)
        assert torch.equal(ours.absorbed, expected.absorbed)


@drawn(max_examples=60)
@given(program=PROGRAMS, which=st.sampled_from(sorted(RULES)))
def test_a_sample_is_explained_as_if_alone(program: list[Line], which: str) -> None:
    model, x = Model(program), constant(3, *SHAPE, seed=20)
    together = _explain(model, x, which)
    scale = float(together.scores.abs().max())
    for i in range(3):
        alone = _explain(model, x[i : i + 1], which)
        torch.testing.assert_close(together.scores[i : i + 1], alone.scores, rtol=1e-7, atol=1e-9 * scale)
        torch.testing.assert_close(together.absorbed[i : i + 1], alone.absorbed, rtol=1e-7, atol=1e-9 * scale)


def _state(model: nn.Module) -> list[Any]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        [(name, id(t), t._version, t.requires_grad, t.grad, t.tolist()) for name, t in tensors],
        [(id(m), m.training, [len(getattr(m, hook)) for hook in hooks]) for m in model.modules()],
        torch.get_rng_state().tolist(),
    ]


@drawn(max_examples=40)
@given(program=PROGRAMS, which=st.sampled_from(sorted(RULES)), fails=st.sampled_from(["", "frac", "raise"]))
def test_the_model_is_the_same_afterwards(program: list[Line], which: str, fails: str) -> None:
    model, x = Model(program), constant(2, *SHAPE, seed=20)
    with torch.no_grad():
        expected = model(x.clone())

    def broken(module: nn.Module, inputs: Any) -> Any:
        if fails == "raise":
            raise ZeroDivisionError
        return inputs[0].frac()  # no rule

    handle = model.parts["head"].register_forward_pre_hook(broken) if fails else None
    before, given_x = _state(model), x.clone()
    if fails:
        with pytest.raises((ZeroDivisionError, UnknownFunction)):
            _explain(model, x, which, ("parts.conv",))
    else:
        _explain(model, x, which, ("parts.conv",))
    assert _state(model) == before
    assert torch.equal(x, given_x)
    if handle is not None:
        handle.remove()
    with torch.no_grad():
        assert torch.equal(model(x.clone()), expected)


# ---- what must hold for ReLU networks ----------------------------------------------------------------------------


class Rectifier(nn.Module):
    """Convolutions and ReLU, some with a shortcut, with pooling between; a dense head."""

    def __init__(self, widths: list[int], pools: list[str], shortcuts: bool, bias: bool, seed: int) -> None:
        super().__init__()
        self.pools, self.shortcuts = pools, shortcuts
        channels = [2, *widths]
        self.layers = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1, bias=bias) for i, o in pairwise(channels))
        self.head = nn.Linear(channels[-1], 3, bias=bias)
        randomise(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        for layer, pool in zip(self.layers, self.pools, strict=False):
            y = F.relu(layer(x))
            x = y + x if self.shortcuts and x.shape == y.shape else y
            x = F.max_pool2d(x, 2, 1) if pool == "max" else F.avg_pool2d(x, 2, 1) if pool == "mean" else x
        return self.head(x.mean((2, 3)))


NETS = st.builds(
    partial,
    st.just(Rectifier),
    st.lists(st.integers(2, 4), min_size=1, max_size=3),
    st.lists(st.sampled_from(["", "max", "mean"]), min_size=3, max_size=3),
    st.booleans(),
    seed=st.integers(0, 50),
)
Maker = Callable[..., Rectifier]
PICTURES = constant(2, 2, 6, 5, seed=30)


@drawn(max_examples=40)
@given(make=NETS)
def test_lrp_0_is_the_input_times_the_gradient(make: Maker) -> None:
    net = make(bias=True)
    x = PICTURES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(x)[:, 1].sum(), x)
    ours = _explain(net, PICTURES, "zero")
    torch.testing.assert_close(ours.scores, PICTURES * gradient, rtol=1e-9, atol=1e-12 * float(ours.output.abs().max()))


@drawn(max_examples=40)
@given(make=NETS, which=st.sampled_from(["zero", "z+", "gamma"]))
def test_without_biases_every_layer_keeps_all_relevance(make: Maker, which: str) -> None:
    net = make(bias=False)
    layers = tuple(f"layers.{i}" for i in range(len(net.layers))) if not net.shortcuts else ()
    rows = (Row(RULES[which][0], "convolution"), Row(Epsilon(0.0)))
    result = LRP(net, Preset("conserving", rows))(PICTURES, 1, layers=layers)
    assume(bool((result.explained != 0).all()))
    scale = float(result.scores.abs().sum(1).max()) + float(result.output.abs().max())
    for R in (result.scores, *result.layers.values()):
        assert float((R.flatten(1).sum(1) - result.explained).abs().max()) < 1e-10 * scale
    assert float(result.absorbed.abs().max()) < 1e-10 * scale


@drawn(max_examples=40)
@given(
    make=NETS,
    which=st.sampled_from(["zero", "z+", "alpha-beta", "gamma"]),
    first=st.sampled_from(["", "flat", "w²"]),
    factor=st.sampled_from([0.001, 0.3, 7.0, 1e4]),
)
def test_relevance_grows_with_the_input(make: Maker, which: str, first: str, factor: float) -> None:
    """R(λ x) = λ R(x) where there are no biases."""
    lrp = LRP(make(bias=False), Preset("scaled", (*_first(first), Row(RULES[which][0]))))
    once, scaled = lrp(PICTURES, 1).scores, lrp(factor * PICTURES, 1).scores
    torch.testing.assert_close(scaled, factor * once, rtol=1e-9, atol=1e-11 * factor * float(once.abs().max()))


@drawn(max_examples=40)
@given(make=NETS, which=st.sampled_from(sorted(RULES)), first=st.sampled_from(["", "flat", "w²"]))
def test_a_batch_norm_behind_a_convolution_is_explained_as_if_merged(make: Maker, which: str, first: str) -> None:
    net, merged = make(bias=True), make(bias=True)
    for i, layer in enumerate(merged.layers):
        norm, scale, shift = _norm(layer.out_channels, i)
        net.layers[i] = nn.Sequential(net.layers[i], norm)
        _replace(layer, layer.weight * scale[:, None, None, None], layer.bias * scale + shift)
    _alike(net, merged, Preset("merged", (*_first(first), Row(RULES[which][0]))))


@drawn(max_examples=40)
@given(make=NETS, which=st.sampled_from(sorted(RULES)))
def test_a_batch_norm_before_a_convolution_is_explained_as_if_merged(make: Maker, which: str) -> None:
    """Padding would be zero behind the norm, so there is none; the first layer has no linear node before its norm."""
    net, merged = make(bias=True), make(bias=True)
    net.shortcuts = merged.shortcuts = False
    net.pools = merged.pools = [""] * 3
    for i, layer in enumerate(merged.layers):
        if i == 0:
            continue
        norm, scale, shift = _norm(layer.in_channels, i)
        layer.padding = net.layers[i].padding = (0, 0)
        net.layers[i] = nn.Sequential(norm, net.layers[i])
        weight = layer.weight * scale[None, :, None, None]
        _replace(layer, weight, layer.bias + (layer.weight * shift[None, :, None, None]).sum((1, 2, 3)))
    _alike(net, merged, Preset("merged", (Row(RULES[which][0]),), pre_activation="threshold"))


def _norm(channels: int, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    norm: Any = randomise(nn.BatchNorm2d(channels), seed=seed)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return norm, scale, norm.bias - scale * norm.running_mean


def _replace(layer: Any, weight: Tensor, bias: Tensor) -> None:
    layer.weight.data, layer.bias.data = weight.detach(), bias.detach()


def _alike(net: nn.Module, merged: nn.Module, preset: Preset) -> None:
    ours, expected = LRP(net, preset)(PICTURES, 1), LRP(merged, preset)(PICTURES, 1)
    scale = float(expected.scores.abs().max() + expected.output.abs().max())
    torch.testing.assert_close(ours.output, expected.output, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.scores, expected.scores, rtol=1e-8, atol=1e-10 * scale)
    torch.testing.assert_close(ours.absorbed, expected.absorbed, rtol=1e-8, atol=1e-10 * scale)
