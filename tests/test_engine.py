"""The engine as a whole: forward values, ledger, composition of functions, the model left alone, clear errors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import import_torchvision
from test_against_others import randomised
from test_rules import randomise
from torch import Tensor, nn
from torch.nn import functional as F

from pfungst.errors import UnknownFunction
from pfungst.lrp import LRP, PRESETS, Preset, Row
from pfungst.lrp.rules import Epsilon

SIGNED = ("epsilon", "epsilon-plus", "epsilon-alpha2-beta1")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    """Three layers whose forward is given: ``body(net, x)``."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 5)
        self.body = body
        randomise(self)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def out(net: Any, h: Tensor) -> Tensor:
    return net.head(h.mean((2, 3)))


def plain(net: Any, x: Tensor) -> Tensor:
    return out(net, net.relu(net.norm(net.second(F.relu(net.first(x))))))


def gap(result: Any) -> float:
    """What the ledger does not account for, relative to the output or the map, whichever is greater."""
    difference = result.explained - result.scores.flatten(1).sum(1, dtype=torch.float64) - result.absorbed
    scale = torch.maximum(result.explained.abs(), result.scores.abs().flatten(1).sum(1))
    return float((difference.abs() / scale).max())


def equal(one: Callable[[Any, Tensor], Any], other: Callable[[Any, Tensor], Any], x: Tensor | None = None) -> None:
    """The two bodies compute one function and one relevance, for every rule; the first also as without the engine."""
    x = drawn(2, 3, 6, 6) if x is None else x
    a, b = Net(one), Net(other)
    for which in SIGNED:
        ours, expected = LRP(a, which)(x, 2, layers=()), LRP(b, which)(x, 2)
        with torch.no_grad():
            assert torch.equal(ours.output, a(x.clone()))
        torch.testing.assert_close(ours.output, expected.output, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(ours.scores, expected.scores, rtol=1e-9, atol=1e-12)
        assert gap(ours) < 1e-9


# ---- real models -------------------------------------------------------------------------------------------------

MODELS = {"vgg16": 32, "resnet50": 64, "inception_v3": 75, "densenet121": 32}


@pytest.fixture(scope="module")
def zoo() -> Callable[[str], tuple[nn.Module, Tensor]]:
    made: dict[str, tuple[nn.Module, Tensor]] = {}

    def make(name: str) -> tuple[nn.Module, Tensor]:
        if name not in made:
            torch.manual_seed(0)
            models = import_torchvision().models
            more = {"aux_logits": False, "init_weights": False} if name == "inception_v3" else {}
            model = getattr(models, name)(weights=None, num_classes=10, **more)
            if name == "vgg16":  # 100 million weights in dense layers of no interest here
                model.avgpool = nn.AdaptiveAvgPool2d(1)
                model.classifier[0], model.classifier[3] = nn.Linear(512, 64), nn.Linear(64, 64)
                model.classifier[6] = nn.Linear(64, 10)
            x = drawn(2, 3, MODELS[name], MODELS[name])
            made[name] = randomised(model, x), x
        return made[name]

    return make


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", MODELS)
def test_real_models(zoo: Any, name: str, dtype: torch.dtype) -> None:
    model, x = zoo(name)
    model, x = model.to(dtype), x.to(dtype)
    with torch.no_grad():
        expected = model(x)
    worst = {}
    for which in PRESETS:
        result = LRP(model, which, bounds=(-6, 6))(x, [1, 7])
        assert torch.equal(result.output, expected)
        worst[which] = gap(result)
    model.double()
    print(f"\n{name} {dtype}: ledger " + ", ".join(f"{k} {v:.0e}" for k, v in worst.items()))
    assert max(worst.values()) < (1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("name", ["resnet50", "densenet121"])
def test_exported_programs(zoo: Any, name: str) -> None:
    model, x = zoo(name)
    _same_when_exported(model, x)


def _same_when_exported(model: nn.Module, x: Tensor, decomposed: bool = False) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (x,))
        program = program.run_decompositions() if decomposed else program
    for which in ("epsilon-plus", "epsilon-gamma-box"):
        eager = LRP(model, which, bounds=(-6, 6))(x, 3)
        exported = LRP(program.module(), which, bounds=(-6, 6))(x, 3)
        torch.testing.assert_close(exported.scores, eager.scores, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(exported.absorbed, eager.absorbed, rtol=1e-9, atol=1e-12)


class Varied(nn.Module):
    """Functions whose arguments look different in an exported program."""

    def __init__(self, assigns: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.assigns = assigns
        self.same, self.even = nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(4, 4, 2, padding="same")
        self.norm, self.up = nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2)
        self.lone, self.head = nn.BatchNorm2d(6), nn.Linear(6, 5)
        self.reflect, self.pad = nn.ReflectionPad2d(1), nn.ConstantPad2d(1, 2.0)
        self.dropout, self.act = nn.Dropout(), nn.ReLU(inplace=True)
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).reshape(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad((x - self.mean) / 0.25, (1, 0, 0, 1))
        y = self.act(self.norm(self.same(x)))
        y = self.pad(self.reflect(F.max_pool2d(self.even(y), 2))).clone()
        if self.assigns:
            y[:, :2] = torch.tanh(y[:, :2])
        y += 0.5 * y.detach()
        y = self.dropout(F.relu_(self.lone(F.leaky_relu(self.up(y)))))
        y = torch.cat([y, y[:, :1] * 0.5], 1)[:, 1:]
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


@pytest.mark.parametrize("decomposed", [False, True])
def test_exported_program_of_many_functions(decomposed: bool) -> None:
    x = drawn(2, 3, 8, 8)
    # Decomposed, an assignment becomes slice_scatter, for which there is no rule yet.
    _same_when_exported(randomised(Varied(assigns=not decomposed), x), x, decomposed)


# ---- composition -------------------------------------------------------------------------------------------------


def test_functional_and_module_forms_are_equal() -> None:
    def modules(net: Any, x: Tensor) -> Tensor:
        h = nn.MaxPool2d(2)(nn.ReLU()(net.first(x)))
        h = nn.AdaptiveAvgPool2d(1)(nn.ReLU(inplace=True)(net.norm(net.second(h))))
        return net.head(nn.Flatten()(h))

    def functions(net: Any, x: Tensor) -> Tensor:
        h = F.max_pool2d(torch.relu(F.conv2d(x, net.first.weight, net.first.bias, padding=1)), 2)
        h = torch.conv2d(input=h, weight=net.second.weight, bias=net.second.bias, padding=1)
        n = net.norm
        h = torch.batch_norm(h, n.weight, n.bias, n.running_mean, n.running_var, False, 0.1, n.eps, False)
        return F.linear(torch.mean(h.relu_(), (2, 3)), net.head.weight, net.head.bias)

    equal(modules, functions)


def test_residual_addition_splits_in_proportion() -> None:
    x = drawn(2, 6)
    w, v = drawn(6, 6, seed=1), drawn(6, 3, seed=2)
    result = LRP(lambda x: (x @ w + x) @ v, Preset("zero", (Row(Epsilon(0.0)),)))(x, 1)
    torch.testing.assert_close(result.scores, x * ((w + torch.eye(6).double()) @ v)[:, 1])
    equal(
        lambda n, x: out(n, n.second(n.first(x).relu()) + n.first(x).relu()),
        lambda n, x: out(n, torch.add(n.first(x).relu(), other=n.second(n.first(x).relu()))),
    )


def test_concatenation_is_addition_of_halves() -> None:
    def concatenated(net: Any, x: Tensor) -> Tensor:
        h = torch.cat([net.first(x).relu(), net.second(net.first(x).relu())], dim=1)
        a, b = h.chunk(2, dim=1)
        return out(net, a + b)

    equal(concatenated, lambda n, x: out(n, n.first(x).relu() + n.second(n.first(x).relu())))


def test_a_module_used_twice_is_the_unrolled_one() -> None:
    def twice(net: Any, x: Tensor) -> Tensor:
        h = net.norm(net.second(net.first(x).relu())).relu()
        return out(net, net.norm(net.second(h)).relu())

    class Unrolled(Net):
        def __init__(self) -> None:
            super().__init__(twice)
            self.second_copy, self.norm_copy = copy.deepcopy(self.second), copy.deepcopy(self.norm)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.second(self.first(x).relu())).relu()
            return out(self, self.norm_copy(self.second_copy(h)).relu())

    x = drawn(2, 3, 6, 6)
    for which in SIGNED:
        shared, unrolled = LRP(Net(twice), which)(x, 1), LRP(Unrolled(), which)(x, 1)
        torch.testing.assert_close(shared.scores, unrolled.scores, rtol=1e-10, atol=1e-13)
        assert shared.ledger["second:2"].allclose(unrolled.ledger["second_copy"])


def test_elementwise_functions_keep_relevance() -> None:
    functions = [
        F.gelu, F.silu, F.elu, F.selu, F.celu, F.mish, F.hardswish, torch.tanh, F.softsign, F.relu6, F.hardtanh,
        F.leaky_relu, F.tanhshrink, F.softshrink, torch.square, lambda x: x.clamp(-0.5, 0.7), F.logsigmoid,
        lambda x: F.prelu(x, torch.tensor([0.1]).double()), lambda x: F.gelu(input=x), torch.abs,
        lambda x: F.elu(x, inplace=True), torch.sigmoid, F.softplus, F.hardsigmoid,
    ]  # fmt: skip
    zero = {torch.sigmoid, F.softplus, F.hardsigmoid, F.logsigmoid}
    x, w = drawn(3, 6), drawn(6, 4, seed=1)
    for function in functions:
        result = LRP(lambda x, f=function: f(x.clone() * 1.0) @ w, Preset("zero", (Row(Epsilon(0.0)),)))(x, 1)
        torch.testing.assert_close(result.scores, function(x.clone()) * w[:, 1])  # each entry has its own
        flat = LRP(lambda x, f=function: f(x) @ w, "epsilon-plus")(torch.zeros_like(x), 1)
        assert bool(flat.scores.isfinite().all())
        assert gap(result) < 1e-9 or function in zero


# ---- in-place functions ------------------------------------------------------------------------------------------


def _views(net: Any, x: Tensor) -> Tensor:
    h = net.first(x)
    left, right = h[:, :2], h[:, 2:]
    left.relu_()  # a write through a view: h sees it, right does not
    right.mul_(0.5)
    flat = h.view(len(h), -1)
    h += 0.25
    flat[:, :3] = 0
    return out(net, net.second(h) + flat.view_as(h))


def _views_pure(net: Any, x: Tensor) -> Tensor:
    h = net.first(x)
    h = torch.cat([h[:, :2].relu(), h[:, 2:] * 0.5], 1) + 0.25
    keep = torch.ones(h[0].numel(), dtype=torch.float64)
    keep[:3] = 0
    h = h * keep.view(1, *h.shape[1:])
    return out(net, net.second(h) + h)


def _buffer(net: Any, x: Tensor) -> Tensor:
    h = net.first(x)
    buffer = torch.zeros_like(h)
    view = buffer[:, 1:]
    view.copy_(h[:, 1:])
    buffer[:, 0] = h[:, 0] * 2
    return out(net, buffer.relu())


IN_PLACE: dict[str, tuple[Callable[[Any, Tensor], Any], Callable[[Any, Tensor], Any]]] = {
    "relu_": (
        lambda n, x: out(n, n.norm(n.second(n.first(x).relu_())).relu_()),
        plain,
    ),
    "result ignored": (
        lambda n, x: (h := n.first(x), n.relu(h), g := n.norm(n.second(h)), n.relu(g), out(n, g))[-1],
        plain,
    ),
    "x += y": (
        lambda n, x: (h := n.first(x).relu(), g := n.second(h), g.__iadd__(h), out(n, g))[-1],
        lambda n, x: (h := n.first(x).relu(), out(n, n.second(h) + h))[-1],
    ),
    "an alias read afterwards": (
        lambda n, x: (h := n.first(x), alias := h.view_as(h), h.add_(1.5), out(n, alias * 2 + h))[-1],
        lambda n, x: (h := n.first(x) + 1.5, out(n, h * 2 + h))[-1],
    ),
    "a view made after the write": (
        lambda n, x: (h := n.first(x), h.relu_(), v := h.flatten(1), v.mul_(3), out(n, n.second(h)))[-1],
        lambda n, x: out(n, n.second(n.first(x).relu() * 3)),
    ),
    "a chunk of one sample": (
        lambda n, x: (h := n.first(x), p := h.chunk(2, 1), p[0].relu_(), out(n, torch.cat(p[::-1], 1)))[-1],
        lambda n, x: (p := n.first(x).chunk(2, 1), out(n, torch.cat([p[1], p[0].relu()], 1)))[-1],
    ),
    "writes through views": (_views, _views_pure),
    "a constant buffer filled": (
        _buffer,
        lambda n, x: (h := n.first(x), out(n, torch.cat([h[:, :1] * 2, h[:, 1:]], 1).relu()))[-1],
    ),
    "a changed shape": (
        lambda n, x: (h := n.first(x).relu().mean((2, 3)), h.unsqueeze_(2), n.head(h[:, :, 0]))[-1],
        lambda n, x: out(n, n.first(x).relu()),
    ),
    "a changed shape and a view": (
        lambda n, x: (
            h := n.first(x),
            h.relu_(),
            h.transpose_(2, 3),
            h[:, :, 1].mul_(2),
            out(n, n.second(h)),
        )[-1],
        lambda n, x: (
            h := n.first(x).relu().mT,
            out(n, n.second(torch.cat([h[:, :, :1], h[:, :, 1:2] * 2, h[:, :, 2:]], 2))),
        )[-1],
    ),
    "setitem": (
        lambda n, x: (h := n.first(x), h.__setitem__((slice(None), 1), h[:, 2] * 2), out(n, h))[-1],
        lambda n, x: (h := n.first(x), out(n, torch.cat([h[:, :1], h[:, 2:3] * 2, h[:, 2:]], 1)))[-1],
    ),
    "detach": (lambda n, x: plain(n, x.detach()), plain),
    "no_grad": (lambda n, x: torch.no_grad()(plain)(n, x), plain),
    "inference_mode": (lambda n, x: torch.inference_mode()(plain)(n, x), plain),
    "requires_grad_": (lambda n, x: plain(n, x.detach().requires_grad_()), plain),
    "dropout in eval mode": (lambda n, x: plain(n, F.dropout(x, 0.5, False)), plain),
    "a constant's type and shape": (lambda n, x: plain(n, x + torch.zeros(1).to(x).expand_as(x)), plain),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("case", IN_PLACE)
def test_in_place_functions(case: str, batch: int) -> None:
    one, other = IN_PLACE[case]
    x = drawn(batch, 3, 6, 6)
    before = x.clone()
    equal(one, other, x)
    assert torch.equal(x, before)


def test_in_place_without_a_rule_is_refused() -> None:
    with pytest.raises(UnknownFunction, match="frac_"):
        LRP(Net(lambda n, x: out(n, n.first(x).frac_())))(drawn(1, 3, 6, 6))
    with pytest.raises(UnknownFunction, match="out"):
        LRP(Net(lambda n, x: out(n, torch.add(n.first(x), 1, out=drawn(1, 4, 6, 6)))))(drawn(1, 3, 6, 6))


# ---- preprocessing inside the model ------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["epsilon-plus-flat", "epsilon-gamma-box", "epsilon"])
def test_preprocessing_inside_the_model(which: str) -> None:
    mean, std = drawn(3, 1, 1, seed=7).abs(), drawn(3, 1, 1, seed=8).abs() + 0.2
    inside = Net(lambda n, x: plain(n, F.pad((x - mean.type_as(x)) / std.to(x), (1, 1, 2, 0))))
    x = drawn(2, 3, 6, 6).sigmoid()
    outer = F.pad((x - mean) / std, (1, 1, 2, 0))
    low, high = (F.pad(((end - mean) / std).expand_as(x), (1, 1, 2, 0)) for end in (0, 1))
    result = LRP(inside, which, bounds=(0, 1))(x, 1)
    expected = LRP(Net(plain), which, bounds=(low, high))(outer, 1)
    torch.testing.assert_close(result.scores, expected.scores[:, :, 2:, 1:-1], rtol=1e-10, atol=1e-13)
    assert gap(result) < 1e-9
    if which == "epsilon-plus-flat":
        lost = expected.scores.sum((1, 2, 3)) - result.scores.sum((1, 2, 3))
        torch.testing.assert_close(result.ledger["pad"], lost, rtol=1e-9, atol=1e-12)
