"""Softmax, products of activations, attention in all its forms: relevance against slow oracles, entry by entry."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import oracles_attention as oracle
import pytest
import torch
from test_engine import drawn, gap
from torch import Tensor, nn
from torch.nn import functional as F

from pfungst.errors import RelevanceError
from pfungst.lrp import LRP, Preset
from pfungst.lrp.presets import attnlrp, cp_lrp

# ε = 0: the slow oracles are exact, so every entry can be compared to the last digits.
ATTNLRP, CP = attnlrp(epsilon=0.0), cp_lrp(epsilon=0.0)
BOTH = pytest.mark.parametrize("which", [ATTNLRP, CP], ids=["attnlrp", "cp-lrp"])
TARGETS = (1, 0, 2)


def readout(size: int) -> Tensor:
    """(size, 3): the scores are fixed weighted sums of what is tested, so relevance arrives there in every entry."""
    return drawn(size, 3, seed=77)


def same(ours: Tensor, theirs: Any) -> None:
    theirs = torch.as_tensor(theirs, dtype=torch.float64)
    assert ours.shape == theirs.shape
    assert float(theirs.abs().max()) > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11 * float(theirs.abs().max()))


def explained(
    body: Callable[[Tensor], Tensor], x: Tensor, which: Preset | str, *, fused: bool = False
) -> tuple[Any, list[np.ndarray]]:
    """The engine's result for body(x) · readout, and per sample the relevance at the values of ``body``.

    ``fused``: without gradients torch runs this module as one fused call, whose rounding is another.
    """

    def model(x: Tensor) -> Tensor:
        y = body(x).flatten(1)
        return y @ readout(y.shape[1])

    result = LRP(model, which)(x, TARGETS[: len(x)])
    with torch.set_grad_enabled(fused):
        plain = model(x.clone().requires_grad_()).detach()
        y = body(x.clone().requires_grad_()).detach()
    assert torch.equal(result.output, plain)
    assert gap(result) < 1e-9
    R = [y[n] * readout(y[n].numel())[:, TARGETS[n]].reshape(y[n].shape) for n in range(len(x))]
    return result, [r.numpy() for r in R]


# ---- softmax and products ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelling",
    [
        lambda x: F.softmax(x, -1),
        lambda x: torch.softmax(x, dim=2),
        lambda x: x.softmax(-1),
        nn.Softmax(-1),
        lambda x: torch.special.softmax(x, -1),
        lambda x: F.softmin(-x, -1),
        lambda x: x.transpose(1, 2).softmax(1).transpose(1, 2),
    ],
)
def test_softmax(spelling: Callable[[Tensor], Tensor]) -> None:
    x = drawn(3, 2, 5)
    result, R = explained(spelling, x, ATTNLRP)
    for n in range(3):
        same(result.scores[n], np.stack([oracle.softmax(x[n, t].numpy(), R[n][t]) for t in range(2)]))


@pytest.mark.parametrize(
    "spelling",
    [
        torch.matmul,
        torch.bmm,
        lambda a, b: a @ b,
        lambda a, b: torch.einsum("nik,nkj->nij", a, b),
        lambda a, b: torch.einsum("nik,nkj->nij", [a, b]),
        lambda a, b: torch.baddbmm(torch.zeros(3, 2, 3, dtype=a.dtype), a, b),
        lambda a, b: (a[:, :, :, None] * b[:, None]).sum(2),
    ],
)
@BOTH
def test_products_of_activations(which: Preset, spelling: Callable[..., Tensor]) -> None:
    """No factor is a gate here: half to each, whatever the preset does with gates."""
    x = drawn(3, 5, 4)
    result, R = explained(lambda x: spelling(x[:, :2], x[:, 2:, :3].new_zeros(()) + x[:, :4, 1:]), x, which)
    for n in range(3):
        value = x[n].numpy()
        to_a, to_b = oracle.matmul(value[:2], value[:4, 1:], R[n], (0.5, 0.5))
        expected = np.zeros_like(value)
        expected[:2] += to_a
        expected[:4, 1:] += to_b
        same(result.scores[n], expected)


@pytest.mark.parametrize("constant", [False, True], ids=["half", "constant"])
@pytest.mark.parametrize(
    "spelling",
    [
        torch.matmul,
        torch.bmm,
        lambda a, v: a.clone().contiguous() @ v,
        lambda a, v: F.dropout(a, 0.1, training=False) @ v,
        lambda a, v: torch.einsum("nik,nkj->nij", a, v),
        lambda a, v: (v.transpose(1, 2) @ a.transpose(1, 2)).transpose(1, 2),
    ],
)
def test_weights_times_values(spelling: Callable[..., Tensor], constant: bool) -> None:
    x = drawn(3, 5, 3)
    which = CP if constant else ATTNLRP
    result, R = explained(lambda x: spelling(x[:, :2].softmax(-1), x[:, 2:]), x, which)
    for n in range(3):
        scores, v = x[n, :2].numpy(), x[n, 2:].numpy()
        a = np.stack([oracle.softmax_values(row) for row in scores])
        R_a, R_v = oracle.matmul(a, v, R[n], (0.0, 1.0) if constant else (0.5, 0.5))
        R_scores = np.stack([oracle.softmax(row, r) for row, r in zip(scores, R_a, strict=True)])
        same(result.scores[n], np.concatenate([R_scores, R_v]))


# ---- scaled dot product attention --------------------------------------------------------------------------------

L, S, E = 3, 4, 4  # queries, keys, width of a head
WIDTH, HEADS = 6, 2


def explicit(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attention in plain matrix products, as most code outside torch spells it."""
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        ones = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        scores = scores.masked_fill(~ones, -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ v


KEEP = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "float mask": {"attn_mask": drawn(L, S, seed=5)},
    "bool mask": {"attn_mask": KEEP},
    "mask of -inf": {"attn_mask": torch.zeros(L, S, dtype=torch.float64).masked_fill(~KEEP, -torch.inf)},
    "mask and scale": {"attn_mask": drawn(L, S, seed=6), "scale": 2.0},
}


def added(case: dict[str, Any]) -> np.ndarray:
    """The case's mask as what is added to the scores, (queries, keys)."""
    mask = case.get("attn_mask", torch.zeros(L, S, dtype=torch.float64))
    if mask.dtype == torch.bool:
        mask = torch.zeros(L, S, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    if case.get("is_causal"):
        mask = mask.masked_fill(~torch.ones(L, S, dtype=torch.bool).tril(), -torch.inf)
    return mask.numpy()


@pytest.mark.parametrize("constant", [False, True], ids=["attnlrp", "cp-lrp"])
@pytest.mark.parametrize("call", [F.scaled_dot_product_attention, explicit], ids=["fused", "explicit"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_scaled_dot_product(case: dict[str, Any], call: Callable[..., Tensor], constant: bool) -> None:
    heads = 2
    x = drawn(3, heads, L + 2 * S, E)

    def body(x: Tensor) -> Tensor:
        q, k, v = x.split([L, S, S], 2)
        return call(q, k, v, **case)

    result, R = explained(body, x, CP if constant else ATTNLRP)
    scale = case.get("scale", E**-0.5)
    for n, h in np.ndindex(3, heads):
        q, k, v = np.split(x[n, h].numpy(), [L, L + S])
        expected = oracle.attention(q, k, v, added(case), scale, R[n][h], constant=constant)
        same(result.scores[n, h], np.concatenate(expected))


@pytest.mark.parametrize("constant", [False, True], ids=["attnlrp", "cp-lrp"])
@pytest.mark.parametrize("call", [F.scaled_dot_product_attention, explicit], ids=["fused", "explicit"])
@pytest.mark.parametrize(
    "fixed", [{"query"}, {"key"}, {"value"}, {"query", "key"}, {"query", "value"}, {"key", "value"}], ids="-".join
)
def test_constant_operands_take_nothing(fixed: set[str], call: Callable[..., Tensor], constant: bool) -> None:
    """As in attention pooling, whose query is learnt: the others share what it would have got."""
    x = drawn(3, 1, L + 2 * S, E)
    sizes = {"query": L, "key": S, "value": S}
    learnt = {name: drawn(1, 1, size, E, seed=9 + i) for i, (name, size) in enumerate(sizes.items())}

    def body(x: Tensor) -> Tensor:
        parts = dict(zip(sizes, x.split(list(sizes.values()), 2), strict=True))
        for name in fixed:
            parts[name] = learnt[name].expand(len(x), -1, -1, -1)
        return call(*parts.values())

    result, R = explained(body, x, CP if constant else ATTNLRP)
    carried = oracle.Carried(**{name: name not in fixed for name in sizes})
    zeros = np.zeros((L, S))
    for n in range(3):
        parts = dict(zip(sizes, np.split(x[n, 0].numpy(), [L, L + S]), strict=True))
        parts |= {name: learnt[name][0, 0].numpy() for name in fixed}
        shared = oracle.attention(*parts.values(), zeros, E**-0.5, R[n][0], constant=constant, carried=carried)
        expected = [0 * r if name in fixed else r for name, r in zip(sizes, shared, strict=True)]
        same(result.scores[n, 0], np.concatenate(expected))


@BOTH
def test_grouped_queries(which: Preset) -> None:
    x = drawn(3, 8, L, E)

    def grouped(call: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: call(x[:, :4], x[:, 4:6], x[:, 6:], enable_gqa=True)

    result, R = explained(grouped(F.scaled_dot_product_attention), x, which)
    spelled, _ = explained(grouped(explicit), x, which)
    same(result.scores, spelled.scores)
    for n in range(3):
        expected = np.zeros((8, L, E))
        for h in range(4):
            q, k, v = (x[n, i].numpy() for i in (h, 4 + h // 2, 6 + h // 2))
            shared = oracle.attention(q, k, v, np.zeros((L, L)), E**-0.5, R[n][h], constant=which is CP)
            for i, r in zip((h, 4 + h // 2, 6 + h // 2), shared, strict=True):
                expected[i] += r
        same(result.scores[n], expected)


def test_a_bias_made_from_the_input_takes_its_part() -> None:
    """Relative positions that depend on the queries, as in SAM: fused as explicit."""
    x = drawn(2, 1, L + 2 * S, E)
    table = drawn(E, S, seed=3)

    def body(call: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        def attend(x: Tensor) -> Tensor:
            q, k, v = x.split([L, S, S], 2)
            return call(q, k, v, attn_mask=q @ table)

        return attend

    fused, _ = explained(body(F.scaled_dot_product_attention), x, ATTNLRP)
    spelled, _ = explained(body(explicit), x, ATTNLRP)
    same(fused.scores, spelled.scores)


def test_dropout_in_attention_is_refused() -> None:
    with pytest.raises(RelevanceError, match="dropout"):
        explained(lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), drawn(2, 1, L, E), ATTNLRP)


# ---- windows -----------------------------------------------------------------------------------------------------


class Windows(nn.Module):
    """Attention within windows that are shifted by a roll, with a relative position bias, as in Swin."""

    def __init__(self, side: int = 4, window: int = 2, shift: int = 1) -> None:
        super().__init__()
        self.side, self.window, self.shift = side, window, shift
        tokens = window * window
        generator = torch.Generator().manual_seed(8)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH).double()
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, HEADS, generator=generator, dtype=torch.float64))
        place = torch.stack(torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij")).flatten(1)
        relative = (place[:, :, None] - place[:, None]) + window - 1
        self.register_buffer("index", relative[0] * (2 * window - 1) + relative[1])
        region = torch.zeros(side, side)
        for i, rows in enumerate((slice(0, -window), slice(-window, -shift), slice(-shift, None))):
            for j, columns in enumerate((slice(0, -window), slice(-window, -shift), slice(-shift, None))):
                region[rows, columns] = 3 * i + j
        parts = self.cut(region[None, :, :, None])[..., 0]
        apart = parts[:, :, None] != parts[:, None]
        assert apart.shape[-1] == tokens
        self.register_buffer("mask", torch.zeros(apart.shape, dtype=torch.float64).masked_fill(apart, -100.0))

    def cut(self, x: Tensor) -> Tensor:
        n, c, w = len(x), x.shape[-1], self.window
        x = x.view(n, self.side // w, w, self.side // w, w, c).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(-1, w * w, c)

    def bias(self) -> Tensor:
        """What is added to the scores, (windows, heads, tokens, tokens)."""
        return self.table[self.index].permute(2, 0, 1)[None] + self.mask[:, None]

    def forward(self, x: Tensor, call: Callable[..., Tensor] = explicit) -> Tensor:
        """x (n, side, side, WIDTH)."""
        n, w = len(x), self.window
        rolled = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        qkv = self.qkv(self.cut(rolled)).reshape(-1, w * w, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        bias = self.bias().repeat(n, 1, 1, 1)
        y = call(qkv[0], qkv[1], qkv[2], attn_mask=bias).transpose(1, 2).reshape(-1, w * w, WIDTH)
        y = y.view(n, self.side // w, self.side // w, w, w, WIDTH).permute(0, 1, 3, 2, 4, 5)
        return torch.roll(y.reshape(n, self.side, self.side, WIDTH), (self.shift, self.shift), (1, 2))


@BOTH
@pytest.mark.parametrize("call", [F.scaled_dot_product_attention, explicit], ids=["fused", "explicit"])
def test_windows(call: Callable[..., Tensor], which: Preset) -> None:
    model = Windows()
    x = drawn(3, 4, 4, WIDTH)
    result, R = explained(lambda x: model(x, call), x, which)
    w, b = (t.detach().numpy() for t in (model.qkv.weight, model.qkv.bias))
    bias = model.bias().detach().numpy()
    for n in range(3):
        expected = np.zeros((4, 4, WIDTH))
        for i, (down, right) in enumerate(np.ndindex(2, 2)):
            # The places of a window in the picture before the roll, in the order of its tokens.
            places = [((2 * down + r + 1) % 4, (2 * right + c + 1) % 4) for r, c in np.ndindex(2, 2)]
            tokens = np.stack([x[n].numpy()[place] for place in places])
            q, k, v = np.split(tokens @ w.T + b, 3, axis=1)
            R_qkv = np.zeros((4, 3 * WIDTH))
            for h in range(HEADS):
                s = slice(3 * h, 3 * h + 3)
                R_head = np.stack([R[n][place][s] for place in places])
                shared = oracle.attention(q[:, s], k[:, s], v[:, s], bias[i, h], 3**-0.5, R_head, constant=which is CP)
                for part, r in enumerate(shared):
                    R_qkv[:, WIDTH * part + 3 * h : WIDTH * part + 3 * h + 3] = r
            for place, r in zip(places, oracle.linear(tokens, w, b, R_qkv), strict=True):
                expected[place] += r
        same(result.scores[n], expected)


# ---- the ledger of each sample -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        lambda t: torch.cat([t, drawn(1, 1, WIDTH, seed=4).repeat(1, t.shape[1], 1)]),
        lambda t: torch.cat([drawn(2, 3, WIDTH, seed=4), t]),
        lambda t: F.pad(t, (0, 0, 0, 0, 1, 2), value=0.7),
        lambda t: F.pad(t, (1, 0, 0, 0, 1, 0), value=-0.2)[..., :WIDTH],
        lambda t: torch.stack([t, drawn(4, 3, WIDTH, seed=4)], 0).flatten(0, 1),
    ],
    ids=["one token", "tokens before", "padding", "padding of two axes", "stack"],
)
def test_constants_beside_samples_on_another_axis(more: Callable[[Tensor], Tensor]) -> None:
    """(tokens, n, width), as MultiheadAttention has it: what added tokens take is booked to the right sample."""
    linear = nn.Linear(WIDTH, 4).double()

    def body(x: Tensor) -> Tensor:
        return linear(more(torch.tanh(x.transpose(0, 1)))).softmax(-1).transpose(0, 1)

    explained(body, drawn(3, 4, WIDTH), ATTNLRP)
