"""Slow oracles of the rules, in float64, that read like the formulas.

A linear node is spelled out as its dense matrix ``J[j, i]`` (one row an output) and bias ``b[j]``; a rule gets every
single contribution ``z[n, i, j] = x[n, i] J[j, i]`` of sample n, input i, output j, and relevance ``R[n, j]``.
Nothing here is shared with the engine.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def matrix(node: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(J, b) of an affine function of one sample of ``shape``; both flattened: (outputs, inputs), (outputs,)."""
    inputs = torch.Size(shape).numel()
    with torch.no_grad():
        bias = node(torch.zeros(1, *shape, dtype=torch.float64)).flatten()
        columns = node(torch.eye(inputs, dtype=torch.float64).reshape(inputs, *shape)).reshape(inputs, -1) - bias
    return columns.T.contiguous(), bias


def reach(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """(outputs, inputs), 1 where the input is in reach of the output whatever the weights, else 0."""
    import copy

    ones = copy.deepcopy(module)
    with torch.no_grad():
        for name, parameter in ones.named_parameters():
            parameter.fill_(0 if name.endswith("bias") else 1)
    return (matrix(ones, shape)[0] != 0).double()


def contributions(x: Tensor, J: Tensor) -> Tensor:
    """z[n, i, j] = x_i J_ji, (n, inputs, outputs)."""
    return x.flatten(1)[:, :, None] * J.T[None]


def plus(z: Tensor) -> Tensor:
    return torch.where(z > 0, z, 0)


def minus(z: Tensor) -> Tensor:
    return torch.where(z < 0, z, 0)


def share(parts: Tensor, whole: Tensor, R: Tensor) -> Tensor:
    """R_i = Σ_j parts_ij / whole_j R_j, where 0 / 0 is 0."""
    ratio = torch.where(whole == 0, 0, R / torch.where(whole == 0, 1, whole))
    return (parts * ratio[:, None, :]).sum(2)


def epsilon(x: Tensor, J: Tensor, b: Tensor, R: Tensor, epsilon: float) -> Tensor:
    z = contributions(x, J)
    y = z.sum(1) + b
    return share(z, torch.where(y >= 0, y + epsilon, y - epsilon), R)


def zero(x: Tensor, J: Tensor, b: Tensor, R: Tensor) -> Tensor:
    return epsilon(x, J, b, R, 0.0)


def alpha_beta(x: Tensor, J: Tensor, b: Tensor, R: Tensor, alpha: float, beta: float) -> Tensor:
    z = contributions(x, J)
    positive = share(plus(z), plus(z).sum(1) + plus(b), R)
    negative = share(minus(z), minus(z).sum(1) + minus(b), R)
    return alpha * positive - beta * negative


def z_plus(x: Tensor, J: Tensor, b: Tensor, R: Tensor) -> Tensor:
    return alpha_beta(x, J, b, R, 1.0, 0.0)


def gamma(x: Tensor, J: Tensor, b: Tensor, R: Tensor, gamma: float) -> Tensor:
    z = contributions(x, J)
    y = z.sum(1) + b
    above, below = z + gamma * plus(z), z + gamma * minus(z)
    b_above, b_below = b + gamma * plus(b), b + gamma * minus(b)
    return share(above, above.sum(1) + b_above, torch.where(y > 0, R, 0)) + share(
        below, below.sum(1) + b_below, torch.where(y < 0, R, 0)
    )


def flat(x: Tensor, reach: Tensor, R: Tensor) -> Tensor:
    parts = reach.T[None].expand(len(x), -1, -1)
    return share(parts, parts.sum(1), R)


def w_square(x: Tensor, J: Tensor, R: Tensor) -> Tensor:
    parts = (J.T**2)[None].expand(len(x), -1, -1)
    return share(parts, parts.sum(1), R)


def z_box(x: Tensor, J: Tensor, R: Tensor, low: Tensor, high: Tensor) -> Tensor:
    parts = contributions(x, J) - contributions(low, plus(J)) - contributions(high, minus(J))
    return share(parts, parts.sum(1), R)
