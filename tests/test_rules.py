"""Every rule against its oracle, entry by entry, over every kind of linear node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor, nn

from pfungst.errors import RelevanceError, SettingError
from pfungst.lrp import LRP, Preset, Row
from pfungst.lrp.rules import AlphaBeta, Epsilon, Flat, Gamma, Pass, Rule, WSquare, ZBox, ZPlus
from pfungst.lrp.unbiased import WithoutBias

LAYERS: dict[str, tuple[Callable[[bool], nn.Module], tuple[int, ...]]] = {
    "dense": (lambda b: nn.Linear(6, 5, bias=b), (6,)),
    "dense over the last axis": (lambda b: nn.Linear(4, 5, bias=b), (3, 4)),
    "conv1d": (lambda b: nn.Conv1d(2, 3, 3, padding=1, bias=b), (2, 7)),
    "conv1d same, even": (lambda b: nn.Conv1d(2, 3, 4, padding="same", bias=b), (2, 7)),
    "conv2d": (lambda b: nn.Conv2d(2, 3, 3, bias=b), (2, 6, 5)),
    "conv2d padded": (lambda b: nn.Conv2d(2, 3, 3, padding=(2, 1), bias=b), (2, 5, 4)),
    "conv2d same": (lambda b: nn.Conv2d(2, 3, 3, padding="same", bias=b), (2, 5, 4)),
    "conv2d same, even, dilated": (
        lambda b: nn.Conv2d(2, 3, (2, 4), padding="same", dilation=(3, 1), bias=b),
        (2, 6, 5),
    ),
    "conv2d valid": (lambda b: nn.Conv2d(2, 3, 2, padding="valid", bias=b), (2, 4, 4)),
    "conv2d strided": (lambda b: nn.Conv2d(2, 3, 3, stride=(2, 3), padding=1, bias=b), (2, 6, 8)),
    "conv2d dilated": (lambda b: nn.Conv2d(2, 3, 3, dilation=2, padding=1, bias=b), (2, 6, 7)),
    "conv2d grouped": (lambda b: nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=b), (4, 5, 4)),
    "conv2d depthwise": (lambda b: nn.Conv2d(3, 6, 3, groups=3, stride=2, bias=b), (3, 6, 5)),
    "conv3d": (lambda b: nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=1, bias=b), (2, 3, 4, 3)),
    "transposed 1d": (lambda b: nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1, bias=b), (2, 5)),
    "transposed 2d, grouped": (
        lambda b: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, bias=b),
        (4, 3, 4),
    ),
    "transposed 2d, dilated": (lambda b: nn.ConvTranspose2d(2, 3, 2, dilation=2, bias=b), (2, 4, 3)),
    "transposed 3d": (lambda b: nn.ConvTranspose3d(2, 2, 2, stride=2, bias=b), (2, 2, 2, 3)),
}
MERGED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d + norm": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3)), (2, 6)),
    "conv2d + norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)),
        (2, 5, 4),
    ),
    "conv2d + norm without weights": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, affine=False)),
        (2, 5, 4),
    ),
    "conv3d + norm": (lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)), (2, 3, 3, 3)),
    "transposed, grouped + norm": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6)),
        (4, 3, 3),
    ),
    "dense + norm": (lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), (6,)),
}


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and norm statistics drawn; biases of both signs and not small."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_var.data = part.running_var.abs() + 0.3  # type: ignore[operator, union-attr]
    return module.eval()


class Weighed(nn.Module):
    """Σ_j v_j y_j of a node's outputs, so that relevance of any size and sign, R_j = v_j y_j, comes to the node.

    ``before`` makes the node's input, so that the node is not the first to see the raw input.
    """

    def __init__(self, node: nn.Module, shape: tuple[int, ...], before: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.node, self.before = node, before
        outputs = node(torch.zeros(1, *shape, dtype=torch.float64)).numel()
        generator = torch.Generator().manual_seed(9)
        self.v = torch.randn(outputs, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return (self.node(self.before(x)).flatten(1) * self.v).sum(1, keepdim=True)


def check(
    node: nn.Module,
    shape: tuple[int, ...],
    rule: Rule,
    oracle: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    before: Callable[[Tensor], Tensor] = lambda x: x,
    bounds: Any = None,
) -> None:
    model = Weighed(node, shape, before)
    inner = before(x)
    with torch.no_grad():
        R = node(inner).flatten(1) * model.v
    expected = oracle(inner, R).reshape(x.shape)
    result = LRP(model, Preset("test", (Row(rule),)), bounds=bounds)(x)
    scale = float(expected.abs().max())
    torch.testing.assert_close(result.scores, expected, rtol=1e-10, atol=1e-10 * scale)
    gap = result.explained - result.scores.flatten(1).sum(1) - result.absorbed
    assert float(gap.abs().max()) < 1e-10 * max(1.0, scale)


def inputs(shape: tuple[int, ...], nonnegative: bool) -> Tensor:
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.relu() if nonnegative else x


BEFORE: dict[str, Callable[[Tensor], Tensor]] = {
    "raw": lambda x: x,
    "after leaky_relu": lambda x: torch.nn.functional.leaky_relu(x, 0.3),
    "after relu": torch.relu,
}


def signed_rules(J: Tensor, b: Tensor) -> list[tuple[Rule, Callable[[Tensor, Tensor], Tensor]]]:
    return [
        (Epsilon(0.0), lambda x, R: oracles.zero(x, J, b, R)),
        (Epsilon(1e-6), lambda x, R: oracles.epsilon(x, J, b, R, 1e-6)),
        (Epsilon(0.5), lambda x, R: oracles.epsilon(x, J, b, R, 0.5)),
        (ZPlus(), lambda x, R: oracles.z_plus(x, J, b, R)),
        (AlphaBeta(2, 1), lambda x, R: oracles.alpha_beta(x, J, b, R, 2, 1)),
        (AlphaBeta(1.5, 0.5), lambda x, R: oracles.alpha_beta(x, J, b, R, 1.5, 0.5)),
        (Gamma(0.25), lambda x, R: oracles.gamma(x, J, b, R, 0.25)),
        (Gamma(0.0), lambda x, R: oracles.gamma(x, J, b, R, 0.0)),
        (Gamma(100.0), lambda x, R: oracles.gamma(x, J, b, R, 100.0)),
    ]


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layer", LAYERS)
def test_contribution_rules(layer: str, bias: bool, before: str) -> None:
    make, shape = LAYERS[layer]
    node = randomise(make(bias))
    J, b = oracles.matrix(node, shape)
    for rule, oracle in signed_rules(J, b):
        check(node, shape, rule, oracle, inputs(shape, False), BEFORE[before])


@pytest.mark.parametrize("nonnegative", [True, False], ids=["pixels >= 0", "signed"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layer", LAYERS)
def test_input_rules(layer: str, bias: bool, nonnegative: bool) -> None:
    make, shape = LAYERS[layer]
    node = randomise(make(bias))
    J, _ = oracles.matrix(node, shape)
    x = inputs(shape, nonnegative)
    near = oracles.reach(node, shape)
    check(node, shape, Flat(), lambda x, R: oracles.flat(x, near, R), x)
    check(node, shape, WSquare(), lambda x, R: oracles.w_square(x, J, R), x)
    # Bounds that differ by entry, as normalised pixels have them by channel.
    low, high = x.amin(0, keepdim=True) - 0.3, x.amax(0, keepdim=True) + 0.2
    low, high = low.expand_as(x), high.expand_as(x)
    check(node, shape, ZBox(), lambda x, R: oracles.z_box(x, J, R, low, high), x, bounds=(low, high))


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("layer", MERGED)
def test_merged_batch_norm(layer: str, before: str) -> None:
    make, shape = MERGED[layer]
    node = randomise(make())
    J, b = oracles.matrix(node, shape)
    for rule, oracle in signed_rules(J, b):
        check(node, shape, rule, oracle, inputs(shape, False), BEFORE[before])
    if before == "raw":
        near = oracles.reach(node[0], shape)  # type: ignore[index]
        x = inputs(shape, False)
        check(node, shape, Flat(), lambda x, R: oracles.flat(x, near, R), x)
        check(node, shape, WSquare(), lambda x, R: oracles.w_square(x, J, R), x)
        low, high = torch.full_like(x, -4), torch.full_like(x, 4)
        check(node, shape, ZBox(), lambda x, R: oracles.z_box(x, J, R, low, high), x, bounds=(-4, 4))


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d, (5,)),
        (nn.BatchNorm1d, (3, 4)),
        (nn.BatchNorm2d, (3, 2, 4)),
        (nn.BatchNorm3d, (2, 2, 3, 2)),
    ],
)
def test_lone_batch_norm(norm: Any, shape: tuple[int, ...], before: str) -> None:
    node = randomise(norm(shape[0]))
    J, b = oracles.matrix(node, shape)
    for rule, oracle in signed_rules(J, b):
        check(node, shape, rule, oracle, inputs(shape, False), BEFORE[before])


def test_a_norm_over_another_axis_than_the_dense_layers_outputs_is_not_merged() -> None:
    """nn.Linear works over the last axis, the norm behind it over axis 1: here both have three channels."""
    node = randomise(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    x = inputs((3, 4), False)
    J1, b1 = oracles.matrix(node[0], (3, 4))  # type: ignore[index]
    J2, b2 = oracles.matrix(node[1], (3, 3))  # type: ignore[index]

    def oracle(x: Tensor, R: Tensor) -> Tensor:
        between = oracles.epsilon(node[0](x), J2, b2, R, 0.1)  # type: ignore[index]
        return oracles.epsilon(x, J1, b1, between, 0.1)

    check(node, (3, 4), Epsilon(0.1), oracle, x)


def test_matrix_products_with_a_constant_are_dense_nodes() -> None:
    w = torch.randn(6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    b = torch.randn(4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x = inputs((6,), False)
    linear = nn.Linear(6, 4).double()
    linear.weight.data, linear.bias.data = w.T.contiguous(), b
    for name, model in {
        "addmm": lambda x: torch.addmm(b, x, w),
        "@": lambda x: x @ w + b,
        "matmul": lambda x: torch.matmul(x, w) + b,
        "keywords": lambda x: torch.nn.functional.linear(input=x, weight=w.T, bias=b),
    }.items():
        preset = "epsilon" if "mm" in name or name == "keywords" else Preset("zero", (Row(Epsilon(0.0)),))
        torch.testing.assert_close(
            LRP(model, preset)(x, 2).scores, LRP(linear, preset)(x, 2).scores, rtol=1e-10, atol=1e-12
        )


def test_pass_hands_on_relevance() -> None:
    node = randomise(nn.Linear(5, 5))
    check(node, (5,), Pass(), lambda x, R: R, inputs((5,), False))
    with pytest.raises(RelevanceError, match="differ in shape"):
        LRP(nn.Linear(5, 4), Preset("pass", (Row(Pass()),)))(torch.ones(1, 5))


def test_dead_and_empty_inputs_stay_finite() -> None:
    """Zero inputs, zero outputs and all-zero weights: no division by zero, and the ledger still closes."""
    for rule in (Epsilon(0.0), Epsilon(1e-6), ZPlus(), AlphaBeta(2, 1), Gamma(), Flat(), WSquare(), ZBox()):
        node = nn.Linear(4, 3, bias=False).double()
        node.weight.data[0] = 0
        node.weight.data[1] = node.weight[1].abs()
        for x in (torch.zeros(1, 4).double(), torch.tensor([[1.0, 0, -1, 0]]).double()):
            for target in range(3):
                result = LRP(node, Preset("test", (Row(rule),)), bounds=(-2, 2))(x, target)
                assert bool(result.scores.isfinite().all())
                gap = result.explained - result.scores.sum(1) - result.absorbed
                assert float(gap.abs().max()) < 1e-12


def test_negative_contributions_near_zero_are_summed_not_subtracted() -> None:
    """In float32, z - z⁺ is rounding noise where z⁻ is small; shares of it would have any size."""
    w = torch.tensor([[1000.0, -1e-6, -2e-6]])
    node = nn.Linear(3, 1, bias=False)
    node.weight.data = w
    scores = LRP(node, Preset("ab", (Row(AlphaBeta(2, 1)),)))(torch.tensor([[1.0, 1, 1]]), 0).scores
    torch.testing.assert_close(scores, torch.tensor([[2000.0, -1000 / 3, -2000 / 3]]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "make", [lambda: Epsilon(-1), lambda: AlphaBeta(2, 2), lambda: AlphaBeta(0.5, -0.5), lambda: Gamma(-1)]
)
def test_parameters_out_of_range(make: Callable[[], Rule]) -> None:
    with pytest.raises(SettingError):
        make()
    AlphaBeta(2.2, 1.2)  # rounding of α - β is no mistake


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("layer", ["dense", "conv2d padded", "transposed 2d, grouped"])
def test_rules_without_bias(layer: str, before: str) -> None:
    make, shape = LAYERS[layer]
    node = randomise(make(True))
    J, b = oracles.matrix(node, shape)
    none = torch.zeros_like(b)
    for (rule, _), (_, oracle) in zip(signed_rules(J, b), signed_rules(J, none), strict=True):
        check(node, shape, WithoutBias(rule), oracle, inputs(shape, False), BEFORE[before])


def test_without_bias_and_merged_norms() -> None:
    make, shape = MERGED["conv2d + norm"]
    node = randomise(make())
    J, b = oracles.matrix(node, shape)
    check(node, shape, WithoutBias(ZPlus()), lambda x, R: oracles.z_plus(x, J, 0 * b, R), inputs(shape, False))
    assert WithoutBias(ZPlus()).label == "ZPlus() without bias"
    with pytest.raises(SettingError, match="WithoutBias"):
        WithoutBias(Flat())
    bias_only = nn.Linear(3, 2).double()
    result = LRP(bias_only, Preset("bias", (Row(WithoutBias(Epsilon(0.1))),)))(torch.zeros(1, 3).double(), 0)
    assert torch.equal(result.absorbed, result.explained)  # nothing to share
