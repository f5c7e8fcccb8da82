"""Norms, gates and elementwise functions, pre-activation batch norm, local response norm: slow oracles, by entry."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import oracles
import oracles_attention as oracle
import pytest
import torch
from test_attention import ATTNLRP, explained, same
from test_engine import drawn, gap
from torch import Tensor, nn
from torch.nn import functional as F

from pfungst.lrp import LRP, Preset, Row
from pfungst.lrp.gradients import Threshold
from pfungst.lrp.operators import Convolution, Dense
from pfungst.lrp.rules import AlphaBeta, Epsilon, Gamma, Rule, ZPlus


def filled(module: Any, seed: int = 3) -> Any:
    """Random parameters, batch norms with random statistics; in eval mode and float64."""
    generator = torch.Generator().manual_seed(seed)
    module.double().eval()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.data = values.abs() + 0.5 if name.endswith("running_var") else values
    return module


# ---- layer, root-mean-square, group and instance norms -------------------------------------------------------------

# Module, shape of one sample, shape of the rows over which it takes statistics, whether it is centred.
NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, int], bool]] = {
    "layer": (lambda: nn.LayerNorm(5), (3, 5), (3, 5), True),
    "layer, large eps": (lambda: nn.LayerNorm(5, eps=0.3), (3, 5), (3, 5), True),
    "layer without weights": (lambda: nn.LayerNorm(5, elementwise_affine=False), (3, 5), (3, 5), True),
    "layer without bias": (lambda: nn.LayerNorm(5, bias=False), (3, 5), (3, 5), True),
    "layer over two axes": (lambda: nn.LayerNorm((3, 4)), (2, 3, 4), (2, 12), True),
    "rms": (lambda: nn.RMSNorm(5), (3, 5), (3, 5), False),
    "rms, eps": (lambda: nn.RMSNorm(5, eps=0.1), (3, 5), (3, 5), False),
    "group": (lambda: nn.GroupNorm(2, 4), (4, 2, 3), (2, 12), True),
    "one group": (lambda: nn.GroupNorm(1, 4, eps=0.2), (4, 3), (1, 12), True),
    "group without weights": (lambda: nn.GroupNorm(2, 4, affine=False), (4, 2, 3), (2, 12), True),
    "instance 1d": (lambda: nn.InstanceNorm1d(3, affine=True), (3, 6), (3, 6), True),
    "instance 2d": (lambda: nn.InstanceNorm2d(3), (3, 2, 3), (3, 6), True),
    "instance 3d": (lambda: nn.InstanceNorm3d(2, affine=True, eps=0.1), (2, 2, 2, 2), (2, 8), True),
}


def each_entry(parameter: Tensor | None, shape: tuple[int, ...], default: float, by_channel: bool) -> np.ndarray:
    """A weight or bias for every entry of a sample."""
    if parameter is None:
        return np.full(shape, default)
    value = parameter.detach()
    value = value.reshape(-1, *[1] * (len(shape) - 1)) if by_channel else value
    return value.expand(shape).numpy().copy()


@pytest.mark.parametrize("norms", ["detached", "identity"])
@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str, norms: str) -> None:
    make, shape, rows, centred = NORMS[name]
    module, x = filled(make()), drawn(3, *shape)
    result, R = explained(module, x, replace(ATTNLRP, norms=norms))
    by_channel = isinstance(module, nn.GroupNorm | nn.modules.instancenorm._InstanceNorm)
    weight = each_entry(getattr(module, "weight", None), shape, 1.0, by_channel).reshape(rows)
    bias = each_entry(getattr(module, "bias", None), shape, 0.0, by_channel).reshape(rows)
    eps = torch.finfo(torch.float64).eps if module.eps is None else module.eps
    for n in range(3):
        values, relevance = x[n].numpy().reshape(rows), R[n].reshape(rows)
        expected = [
            oracle.norm(values[i], weight[i], bias[i], eps, relevance[i], centred=centred, identity=norms == "identity")
            for i in range(rows[0])
        ]
        same(result.scores[n], np.stack(expected).reshape(shape))


def test_instance_norm_with_running_statistics_is_a_batch_norm() -> None:
    module = filled(nn.InstanceNorm2d(3, affine=True, track_running_stats=True))
    x = drawn(3, 3, 2, 3)
    result, R = explained(lambda x: module(torch.tanh(x)), x, ATTNLRP)
    scale = (module.weight / (module.running_var + module.eps).sqrt()).detach().reshape(3, 1, 1)
    for n in range(3):
        value = torch.tanh(x[n])
        same(result.scores[n], value * scale / module(value[None])[0].detach() * torch.from_numpy(R[n]))


SPELLED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "layer": (
        lambda x: (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5),
        lambda x: F.layer_norm(x, (5,)),
    ),
    "layer, by rsqrt": (
        lambda x: (x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5),
        lambda x: F.layer_norm(x, (5,)),
    ),
    "rms": (lambda x: x / (x.pow(2).mean(-1, keepdim=True) + 0.1).sqrt(), lambda x: F.rms_norm(x, (5,), eps=0.1)),
    "rms, by rsqrt": (
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1),
        lambda x: F.rms_norm(x, (5,), eps=0.1),
    ),
    "rms, by power": (
        lambda x: (x.square().mean(-1, keepdim=True) + 0.1).pow(-0.5) * x,
        lambda x: F.rms_norm(x, (5,), eps=0.1),
    ),
    "rms, by reciprocal": (
        lambda x: x * (1 / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()),
        lambda x: F.rms_norm(x, (5,), eps=0.1),
    ),
}


@pytest.mark.parametrize("name", SPELLED)
def test_norms_in_plain_code(name: str) -> None:
    """Whatever the deviation is divided by with is a constant, as in the norms of torch."""
    ours, theirs = (explained(body, drawn(3, 2, 5), ATTNLRP)[0] for body in SPELLED[name])
    same(ours.scores, theirs.scores)


# ---- elementwise functions and gates -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [F.gelu, lambda x: F.gelu(x, approximate="tanh"), F.silu, F.mish,
     lambda x: x * torch.sigmoid(1.702 * x), lambda x: x * x.sigmoid()],
    ids=["gelu", "gelu by tanh", "silu", "mish", "quick gelu", "swish"],
)  # fmt: skip
@pytest.mark.parametrize("gates", ["all", "half"])
def test_activations_hand_relevance_on(function: Callable[[Tensor], Tensor], gates: str) -> None:
    x = drawn(3, 7)
    x[:, 0] = 0.0
    result, R = explained(function, x, replace(ATTNLRP, gates=gates))
    same(result.scores, np.stack(R))


GATES = pytest.mark.parametrize("rule", ["all", "half", "prop", "abs"])
GATED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    # a function of signal and gate, and what the gate becomes
    "glu": (lambda s, g: F.glu(torch.cat([s, g], -1)), torch.sigmoid),
    "glu module": (lambda s, g: nn.GLU(1)(torch.cat([s, g], 1)), torch.sigmoid),
    "sigmoid": (lambda s, g: torch.sigmoid(g) * s, torch.sigmoid),
    "hardsigmoid": (lambda s, g: s.mul(F.hardsigmoid(g)), F.hardsigmoid),
    "in place": (lambda s, g: s.clone().mul_(g.sigmoid()), torch.sigmoid),
    "reshaped": (lambda s, g: s[:, None] * g.sigmoid()[:, None], torch.sigmoid),
}


@GATES
@pytest.mark.parametrize("name", GATED)
def test_gates(name: str, rule: str) -> None:
    body, gate = GATED[name]
    x = drawn(3, 2, 5)
    result, R = explained(lambda x: body(x[:, 0], x[:, 1]), x, replace(ATTNLRP, gates=rule))
    for n in range(3):
        s, g = x[n]
        to_gate, to_signal = oracle.product(gate(g).numpy(), s.numpy(), R[n].reshape(5), rule)
        same(result.scores[n], np.stack([to_signal, to_gate]))  # the sigmoid hands on what it gets


@GATES
def test_swiglu_has_no_gate(rule: str) -> None:
    """silu(a) · b: neither factor lies between 0 and 1, each gets half."""
    x = drawn(3, 2, 5)
    result, R = explained(lambda x: F.silu(x[:, 0]) * x[:, 1], x, replace(ATTNLRP, gates=rule))
    same(result.scores, np.stack([np.stack([r / 2, r / 2]) for r in R]))


@GATES
def test_squeeze_and_excite(rule: str) -> None:
    dense = filled(nn.Linear(3, 3))
    x = drawn(3, 3, 2, 2).abs()

    def body(x: Tensor) -> Tensor:
        return x * torch.sigmoid(dense(x.mean((2, 3))))[:, :, None, None]

    result, R = explained(body, x, replace(ATTNLRP, gates=rule))
    w, b = dense.weight.detach().numpy(), dense.bias.detach().numpy()
    for n in range(3):
        value = x[n].numpy()
        mean = value.mean((1, 2))
        gate = 1 / (1 + np.exp(-(w @ mean + b)))
        to_gate, expected = oracle.product(np.broadcast_to(gate[:, None, None], value.shape), value, R[n], rule)
        R_mean = oracle.linear(mean[None], w, b, to_gate.sum((1, 2))[None])[0]
        for c in range(3):  # the mean: in proportion to its summands
            expected[c] += value[c] / value[c].sum() * R_mean[c]
        same(result.scores[n], expected)


@GATES
def test_highway(rule: str) -> None:
    """g · a + (1 - g) · b: what the 1 takes of 1 - g is booked."""
    x = drawn(3, 3, 4)

    def body(x: Tensor) -> Tensor:
        g = torch.sigmoid(x[:, 0])
        return g * x[:, 1] + (1 - g) * x[:, 2]

    result, R = explained(body, x, replace(ATTNLRP, gates=rule))
    for n in range(3):
        z, a, b = x[n].numpy()
        g = 1 / (1 + np.exp(-z))
        one, two = oracle.residual(g * a, (1 - g) * b, R[n])
        (g_one, R_a), (g_two, R_b) = oracle.product(g, a, one, rule), oracle.product(1 - g, b, two, rule)
        same(result.scores[n], np.stack([g_one - g / (1 - g) * g_two, R_a, R_b]))


# ---- batch norm before ReLU and a linear node ----------------------------------------------------------------------

# Layer, batch norm, shape of one sample.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], nn.Module], tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Conv2d(4, 3, 3), nn.BatchNorm2d, (4, 4, 5)),
    "padded": (lambda: nn.Conv2d(4, 3, 3, padding=(2, 1)), nn.BatchNorm2d, (4, 3, 4)),
    "same": (lambda: nn.Conv2d(4, 2, (2, 4), padding="same"), nn.BatchNorm2d, (4, 3, 4)),
    "strided": (lambda: nn.Conv2d(4, 3, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d, (4, 4, 4)),
    "dilated": (lambda: nn.Conv2d(4, 3, 2, dilation=2, padding=1), nn.BatchNorm2d, (4, 4, 3)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.BatchNorm2d, (4, 3, 3)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 2, groups=4), nn.BatchNorm2d, (4, 3, 3)),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1),
        nn.BatchNorm2d,
        (4, 3, 2),
    ),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), nn.BatchNorm2d, (4, 2, 3)),
    "conv1d": (lambda: nn.Conv1d(4, 3, 3, padding=1), nn.BatchNorm1d, (4, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 3, 3, stride=2), nn.BatchNorm1d, (4, 3)),
    "conv3d": (lambda: nn.Conv3d(4, 2, 2, padding=1), nn.BatchNorm3d, (4, 2, 2, 2)),
    "dense": (lambda: nn.Linear(6, 5), nn.BatchNorm1d, (6,)),
    "dense without bias": (lambda: nn.Linear(6, 5, bias=False), nn.BatchNorm1d, (6,)),
}
SHARES: dict[str, tuple[Rule, Callable[..., Tensor]]] = {
    "epsilon": (Epsilon(0.1), lambda *given: oracles.epsilon(*given, 0.1)),
    "z+": (ZPlus(), oracles.z_plus),
    "alpha2-beta1": (AlphaBeta(2, 1), lambda *given: oracles.alpha_beta(*given, 2, 1)),
    "gamma": (Gamma(0.25), lambda *given: oracles.gamma(*given, 0.25)),
}


def linear(x: Tensor) -> Tensor:
    """x itself, after a linear node: a norm with none before it is the input layer, a node of its own."""
    return x @ torch.eye(x.shape[-1], dtype=x.dtype)


class PreActivated(nn.Module):
    """tanh, batch norm, ReLU (or none), layer."""

    def __init__(self, name: str, relu: bool = True) -> None:
        super().__init__()
        layer, norm, shape = LAYERS[name]
        self.norm, self.layer = filled(norm(shape[0])), filled(layer())
        # A negative weight, and weights of zero and next to it with shifts of both signs.
        self.norm.weight.data[:4] = torch.tensor([-1.3, 0.0, 0.0, 1e-300])
        self.norm.bias.data[:4] = torch.tensor([1.2, 0.8, -0.8, -0.4])
        self.relu = nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.relu(self.norm(torch.tanh(linear(x)))))

    @property
    def affine(self) -> tuple[Tensor, Tensor]:
        norm = self.norm
        scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
        return scale, (norm.bias - norm.running_mean * scale).detach()


def rewritten(model: PreActivated, x: Tensor, relu: bool) -> tuple[Tensor, oracle.Preactivated]:
    """Values before the merged layer and that layer spelled out, for one sample (flat)."""
    J, b = (t.numpy() for t in oracles.matrix(model.layer, tuple(x.shape)))
    scale, shift = (each_entry(t, tuple(x.shape), 0.0, True).ravel() for t in model.affine)
    layer = oracle.Preactivated(J, b, scale, shift)
    if relu:
        T, merged = oracle.thresholds(x.numpy().ravel(), layer)
    else:
        T, merged = x.numpy().ravel(), replace(layer, J=J * scale[None], b=b + J @ shift)
    return torch.from_numpy(T), merged


@pytest.mark.parametrize("form", ["switch", "threshold"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no relu"])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", LAYERS)
def test_pre_activation(name: str, share: str, relu: bool, form: str) -> None:
    """Relevance is that of the rewritten network, in which the norm is part of the layer; a unit that is off takes its
    own or hands it on."""
    model = PreActivated(name, relu)
    x = drawn(3, *LAYERS[name][2])
    rule, slow = SHARES[share]

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x).flatten(1)
            return y @ drawn(y.shape[1], 3, seed=77)

    which = Preset("p", (Row(rule, name="net.layer"), Row(Epsilon(0.0))), pre_activation=form)
    result = LRP(Named(), which)(x, 1)
    with torch.no_grad():
        assert torch.equal(result.output, Named()(x))
        y = model(x).flatten(1)
    assert gap(result) < 1e-9
    R = y * drawn(y.shape[1], 3, seed=77)[:, 1]
    found = []
    for n in range(3):
        T, merged = rewritten(model, torch.tanh(x[n]), relu)
        J, b = torch.from_numpy(merged.J), torch.from_numpy(merged.b)
        torch.testing.assert_close(J @ T + b, y[n], rtol=1e-12, atol=1e-12)  # the same function
        expected = slow(T[None], J, b, R[n][None])[0]
        if relu and form == "switch":
            expected = torch.where(torch.tanh(x[n]).ravel() == T, expected, 0)
        found.append(expected.reshape(x[n].shape))
    same(result.scores, torch.stack(found))


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "same"])
def test_the_threshold_form_is_the_same_function(name: str) -> None:
    """scale T + shift = relu(bn(x)), and the merged layer on T is the layer on relu(bn(x)): the engine's own parts."""
    model, x = PreActivated(name), drawn(3, *LAYERS[name][2])
    scale, shift = model.affine
    shape = [1, -1, *[1] * (x.dim() - 2)]
    with torch.no_grad():
        hidden = F.relu(model.norm(x))
        shift = torch.where(scale.abs() < 1e-100, shift.clamp(min=0), shift)
        scale = torch.where(scale.abs() < 1e-100, 0, scale)
        wide = scale.reshape(shape), shift.reshape(shape)
        T = Threshold.apply(x, hidden > 0, *wide, "t", lambda *_: None)
        torch.testing.assert_close(wide[0] * T + wide[1], hidden, rtol=1e-13, atol=1e-13)
        layer: Any = model.layer
        bias = None if layer.bias is None else layer.bias
        if isinstance(layer, nn.Linear):
            op: Any = Dense(layer.weight, bias)
        else:
            wide_bias = None if bias is None else bias.reshape(shape)
            more = {k: getattr(layer, k) for k in ("stride", "padding", "dilation", "transposed", "output_padding")}
            op = Convolution(layer.weight, wide_bias, groups=layer.groups, **more)
        merged = op.after(scale, shift, x)
        y = merged.forward(T, merged.weight) + merged.bias
        torch.testing.assert_close(y, layer(hidden), rtol=1e-12, atol=1e-12)


def test_one_norm_before_two_layers() -> None:
    """As in pre-activated ResNets: the shortcut and the first convolution start from the same ReLU."""
    torch.manual_seed(0)
    parts = [
        filled(m) for m in (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(4, 5, 1))
    ]
    first, norm, conv, shortcut = parts

    def body(x: Tensor) -> Tensor:
        h = F.relu(norm(torch.tanh(first(x))))
        return conv(h) + shortcut(h) + h.mean(1, keepdim=True)

    for which in ("epsilon-plus", "epsilon-alpha2-beta1", "attnlrp-gamma", "cp-lrp-gamma"):
        explained(body, drawn(3, 3, 6, 6), which)


def test_norms_before_and_behind_one_layer() -> None:
    """Batch norm, ReLU, convolution, batch norm, as in DenseNet: both are part of the convolution."""
    parts = [
        filled(m)
        for m in (nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(3, 4, 3, padding=1))
    ]
    before, conv, behind, single = parts
    x = drawn(3, 3, 4, 4)
    scale = (behind.weight / (behind.running_var + behind.eps).sqrt()).detach()
    single.weight.data = conv.weight.data * scale[:, None, None, None]
    single.bias.data = (conv.bias.data - behind.running_mean) * scale + behind.bias.data
    for which in ("epsilon", "epsilon-plus", "attnlrp-gamma"):
        two = explained(lambda x: behind(conv(F.relu(before(torch.tanh(linear(x)))))), x, which)[0]
        one = explained(lambda x: single(F.relu(before(torch.tanh(linear(x))))), x, which)[0]
        same(two.scores, one.scores)


# ---- local response norm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "after a ReLU"])
def test_local_response_norm(size: int, signed: bool) -> None:
    x = drawn(3, 6, 4) if signed else drawn(3, 6, 4).relu()
    alpha, beta, k = 0.7, 0.75, 1.3
    result, R = explained(lambda x: F.local_response_norm(x, size, alpha, beta, k), x, ATTNLRP)
    total = 0.0
    for n in range(3):
        expected = oracle.local_response(x[n].numpy(), size, alpha, beta, k, R[n])
        same(result.scores[n], expected)
        total = max(total, abs(float(result.scores[n].sum()) - R[n].sum()))
    assert total < 1e-12
    assert not any("local_response" in name for name in result.ledger)


def test_nothing_of_a_response_is_lost_on_dead_units() -> None:
    x = torch.zeros(2, 4, 3, dtype=torch.float64)
    x[:, 1] = 1.5
    result, R = explained(lambda x: F.local_response_norm(x, 3), x, ATTNLRP)
    same(result.scores, np.stack(R))


class SmallAlexNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU(inplace=True), nn.LocalResponseNorm(5, alpha=0.5, k=2.0), nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1, groups=2), nn.ReLU(inplace=True), nn.LocalResponseNorm(4, 0.5),
            nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(48, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


@pytest.mark.parametrize("which", ["epsilon", "epsilon-plus", "epsilon-alpha2-beta1"])
def test_small_alexnet(which: str) -> None:
    torch.manual_seed(0)
    model = SmallAlexNet().double().eval()
    unbiased = copy.deepcopy(model)
    for name, parameter in unbiased.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    x = drawn(3, 3, 16, 16)
    for net in (model, unbiased):
        result = LRP(net, which)(x, [1, 4, 0])
        with torch.no_grad():
            assert torch.equal(result.output, net(x))
        assert gap(result) < 1e-9
    if which != "epsilon":  # nothing but ε absorbs, in one dense layer
        torch.testing.assert_close(result.scores.sum((1, 2, 3)), result.explained, rtol=1e-4, atol=1e-6)
