"""Slow oracles of the rules for transformers and norms, in float64 NumPy loops over relevance R itself.

Written from the formulas of Achtibat et al. 2024 (AttnLRP), Ali et al. 2022 (attention as a constant), Arras et al.
2019 (gates) and Binder et al. 2016 (local response norm).  One sample at a time; nothing is shared with the engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


def entries(shape: tuple[int, ...]) -> itertools.product[tuple[int, ...]]:
    return itertools.product(*map(range, shape))


def linear(x: Array, weight: Array, bias: Array | None, R: Array) -> Array:
    """x (tokens, inputs), weight (outputs, inputs): R_i = Σ_k x_i w_ki / z_k R_k, the bias part of z_k."""
    out = np.zeros_like(x)
    for t, k in entries((len(x), len(weight))):
        z = sum(x[t, i] * weight[k, i] for i in range(x.shape[1])) + (0 if bias is None else bias[k])
        for i in range(x.shape[1]):
            out[t, i] += x[t, i] * weight[k, i] / z * R[t, k]
    return out


def matmul(a: Array, b: Array, R: Array, shares: tuple[float, float]) -> tuple[Array, Array]:
    """z_ij = Σ_k a_ik b_kj: of every contribution's part of R_ij, ``shares`` go to a_ik and b_kj."""
    to_a, to_b = np.zeros_like(a), np.zeros_like(b)
    for i, j in entries(R.shape):
        z = sum(a[i, k] * b[k, j] for k in range(len(b)))
        for k in range(len(b)):
            part = a[i, k] * b[k, j] / z * R[i, j] if z else 0.0
            to_a[i, k] += shares[0] * part
            to_b[k, j] += shares[1] * part
    return to_a, to_b


def softmax_values(x: Array) -> Array:
    power = np.exp(x - x.max())
    return power / power.sum()


def softmax(x: Array, R: Array) -> Array:
    """One row: R_i = x_i (R_i - s_i Σ_j R_j); an entry that is -inf has s = 0 and gets nothing."""
    s, total = softmax_values(x), R.sum()
    return np.array([0.0 if np.isinf(x[i]) else x[i] * (R[i] - s[i] * total) for i in range(len(x))])


@dataclass(frozen=True)
class Carried:
    """Which operands of an attention depend on the input: only those can take relevance."""

    query: bool = True
    key: bool = True
    value: bool = True


def attention_values(q: Array, k: Array, v: Array, mask: Array, scale: float) -> Array:
    return np.stack([softmax_values(row) @ v for row in q @ k.T * scale + mask])


def attention(
    q: Array, k: Array, v: Array, mask: Array, scale: float, R: Array, *, constant: bool, carried: Carried = Carried()
) -> tuple[Array, Array, Array]:
    """softmax(q kᵀ scale + mask) v of one head, step by step; the mask's part of the scores is absorbed."""
    scores = q @ k.T * scale
    weights = np.stack([softmax_values(row) for row in scores + mask])
    attends = (carried.query or carried.key) and not (constant and carried.value)
    to_weights = 0.0 if not attends else 0.5 if carried.value else 1.0
    R_weights, R_v = matmul(weights, v, R, (to_weights, 1 - to_weights))
    R_summed = np.stack([softmax(row, r) for row, r in zip(scores + mask, R_weights, strict=True)])
    R_scores = np.zeros_like(R_summed)
    for i, j in entries(scores.shape):  # scores + mask: in proportion to the summands
        if R_summed[i, j]:
            R_scores[i, j] = scores[i, j] / (scores[i, j] + mask[i, j]) * R_summed[i, j]
    to_q = 0.5 if carried.query and carried.key else float(carried.query)
    R_q, R_k = matmul(q, k.T, R_scores, (to_q, float(carried.key) * (1 - to_q)))
    return R_q, R_k.T, R_v


def product(gate: Array, signal: Array, R: Array, rule: str) -> tuple[Array, Array]:
    """gate · signal by Arras et al. 2019."""
    to_gate = np.zeros_like(gate)
    for at in entries(gate.shape):
        g, s = gate[at], signal[at]
        share = {"all": 0.0, "half": 0.5, "prop": g / (g + s), "abs": abs(g) / (abs(g) + abs(s))}[rule]
        to_gate[at] = share * R[at]
    return to_gate, R - to_gate


def norm(x: Array, weight: Array, bias: Array, eps: float, R: Array, *, centred: bool, identity: bool) -> Array:
    """One row over which statistics are taken: y_i = (x_i - μ) / σ w_i + b_i, σ a constant, μ = Σ_j x_j / n."""
    if identity:
        return R.copy()
    n = len(x)
    mean = sum(x) / n if centred else 0.0
    sigma = np.sqrt(sum((value - mean) ** 2 for value in x) / n + eps)
    out = np.zeros_like(x)
    for i in range(n):
        y = (x[i] - mean) / sigma * weight[i] + bias[i]
        for j in range(n):
            factor = (1.0 if i == j else 0.0) - (1 / n if centred else 0.0)
            out[j] += x[j] * factor / sigma * weight[i] / y * R[i]
    return out


def residual(a: Array, b: Array, R: Array) -> tuple[Array, Array]:
    """a + b: in proportion to the summands."""
    return a / (a + b) * R, b / (a + b) * R


def local_response(x: Array, size: int, alpha: float, beta: float, k: float, R: Array) -> Array:
    """x (channels, places): first-order messages of each channel's neighbours, divided by their sum."""
    out = np.zeros_like(x)
    channels, places = x.shape
    for c, p in entries((channels, places)):
        # As torch: padded by size // 2 channels in front, so an even window reaches further back than forward.
        near = [j for j in range(c - size // 2, c - size // 2 + size) if 0 <= j < channels]
        base = k + alpha / size * sum(x[j, p] ** 2 for j in near)
        messages = {
            j: x[c, p] * (k + alpha / size * x[c, p] ** 2) ** -beta
            if j == c
            else -2 * alpha / size * beta * x[c, p] * base ** (-beta - 1) * x[j, p] ** 2
            for j in near
        }
        total = sum(messages.values())
        for j, message in messages.items():
            out[j, p] += message / total * R[c, p] if total else 0.0
    return out


@dataclass(frozen=True)
class Projections:
    """Weights (outputs, inputs) and biases of a multi-head attention, and the tokens added to keys and values."""

    q: tuple[Array, Array | None]
    k: tuple[Array, Array | None]
    v: tuple[Array, Array | None]
    out: tuple[Array, Array | None]
    heads: int
    extra_k: Array  # (extra tokens, width): bias_k, then zeros of add_zero_attn
    extra_v: Array


def multi_head(
    query: Array, key: Array, value: Array, p: Projections, mask: Array, *, constant: bool
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """The attention's values (tokens, width), and relevance of query, key, value for relevance of these values.

    ``mask`` (heads, queries, keys + extra) is added to the scores.
    """

    def affine(x: Array, pair: tuple[Array, Array | None]) -> Array:
        return x @ pair[0].T + (0 if pair[1] is None else pair[1])

    q, k, v = affine(query, p.q), affine(key, p.k), affine(value, p.v)
    keys, values = np.concatenate([k, p.extra_k]), np.concatenate([v, p.extra_v])
    width = q.shape[1] // p.heads
    parts = [slice(h * width, (h + 1) * width) for h in range(p.heads)]
    scale = width**-0.5
    heads = [attention_values(q[:, s], keys[:, s], values[:, s], mask[h], scale) for h, s in enumerate(parts)]
    joined = np.concatenate(heads, 1)

    def relevance(R: Array) -> tuple[Array, Array, Array]:
        R_joined = linear(joined, *p.out, R)
        R_q, R_k, R_v = np.zeros_like(q), np.zeros_like(keys), np.zeros_like(values)
        for h, s in enumerate(parts):
            R_q[:, s], R_k[:, s], R_v[:, s] = attention(
                q[:, s], keys[:, s], values[:, s], mask[h], scale, R_joined[:, s], constant=constant
            )
        # What the extra tokens get is absorbed: they are constants.
        return linear(query, *p.q, R_q), linear(key, *p.k, R_k[: len(k)]), linear(value, *p.v, R_v[: len(v)])

    return affine(joined, p.out), relevance


@dataclass(frozen=True)
class Preactivated:
    """A linear layer of one sample, spelled out: y_o = Σ_i J_oi h_i + b_o, where h = relu(scale x + shift)."""

    J: Array
    b: Array
    scale: Array  # one an input, as are all that follow
    shift: Array


def thresholds(x: Array, layer: Preactivated) -> tuple[Array, Preactivated]:
    """The same function rewritten: T(x), and the layer y = J' T + b' on it.

    For scale ≠ 0 relu(scale x + shift) = scale T + shift with T = x where the unit is active and -shift / scale where
    it is not; for scale = 0, or so small that T would overflow, it is the constant relu(shift).
    """
    T, scale, shift = np.zeros_like(x), layer.scale.copy(), layer.shift.copy()
    for i, value in enumerate(x):
        if abs(scale[i]) < 1e-154:
            scale[i], shift[i] = 0.0, max(shift[i], 0.0)
        else:
            T[i] = value if scale[i] * value + shift[i] > 0 else -shift[i] / scale[i]
    return T, replace(layer, J=layer.J * scale[None], b=layer.b + layer.J @ shift)
