"""Autograd functions whose backward pass carries relevance instead of derivatives.

Between nodes the "gradient" is c = R / activation; before the input layer it is R (see ``marks.Mark.raw``).
Each reports to ``absorb(node name, tensor of the absorbed relevance)``, entry by entry, where it absorbs any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pfungst.lrp.operators import LinearOperator
from pfungst.lrp.rules import LinearCall, Rule

Absorb = Callable[[str, Tensor], None]


class LinearNode:
    """What the backward pass of one linear call needs besides its input and output."""

    def __init__(
        self,
        name: str,
        op: LinearOperator,
        rule: Rule,
        raw: bool,
        nonnegative: bool,
        bounds: tuple[Tensor, Tensor] | None,
        absorb: Absorb,
    ) -> None:
        self.name, self.op, self.rule, self.absorb = name, op, rule, absorb
        self.raw, self.nonnegative, self.bounds = raw, nonnegative, bounds


class Linear(torch.autograd.Function):
    """A linear call: the forward value is the model's own, the backward pass is the node's rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, compute: Callable[[Tensor], Tensor], node: LinearNode) -> Tensor:
        y = compute(x)
        ctx.node = node
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        node: LinearNode = ctx.node
        nonnegative = node.nonnegative or bool((x >= 0).all())
        shared = node.rule.share(LinearCall(node.op, x, y, nonnegative, node.bounds), c)
        node.absorb(node.name, c * y - shared.reached)
        if node.raw and not node.rule.carries_relevance:
            return shared.input * x, None, None
        return shared.input, None, None


class Elementwise(torch.autograd.Function):
    """y = f(x), entry by entry: c_x = c_y f(x) / x, and f'(0) where x is 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], name: str, absorb: Absorb) -> Tensor:
        y = function(x)
        ctx.function, ctx.name, ctx.absorb = function, name, absorb
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        small = x.abs() <= torch.finfo(x.dtype).tiny * 1e8
        ratio = y / x.masked_fill(small, 1)
        if bool(small.any()):
            with torch.enable_grad():
                point = x.detach().requires_grad_()
                slope = torch.autograd.grad(ctx.function(point).sum(), point)[0]
            ratio = torch.where(small, slope, ratio)
        c_x = c * ratio
        ctx.absorb(ctx.name, c * y - c_x * x)
        return c_x, None, None, None


def gate_share(rule: str, gate: Tensor, signal: Tensor) -> Tensor | float:
    """The part of the relevance of gate * signal that goes to the gate, by one of the rules of ``Product``."""
    if rule in ("all", "half"):
        return 0.5 if rule == "half" else 0.0
    g, s = (gate, signal) if rule == "prop" else (gate.abs(), signal.abs())
    total = g + s
    return torch.where(total == 0, 0.5, g / total.masked_fill(total == 0, 1))


class Product(torch.autograd.Function):
    """gate * signal, of shapes that broadcast; the relevance of the product is shared by ``rule``.

    ``all``: all to the signal; ``half``: half to each; ``prop``: in proportion to the two values, g / (g + s);
    ``abs``: in proportion to their absolute values.  Source: Arras et al. 2019, section 3.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, signal: Tensor, rule: str) -> Tensor:
        ctx.rule = rule
        ctx.save_for_backward(gate, signal)
        return gate * signal

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        gate, signal = ctx.saved_tensors
        if ctx.rule == "all":
            return None, (c * gate).sum_to_size(signal.shape), None
        share = gate_share(ctx.rule, gate, signal)
        to_gate, to_signal = c * signal * share, c * gate * (1 - share)
        return to_gate.sum_to_size(gate.shape), to_signal.sum_to_size(signal.shape), None


class Constant(torch.autograd.Function):
    """Reports what a constant part of ``out`` absorbs: c times that part (or R times its mask, if raw)."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, part: Tensor, name: str, absorb: Absorb) -> Tensor:
        ctx.name, ctx.absorb = name, absorb
        ctx.save_for_backward(part)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        (part,) = ctx.saved_tensors
        ctx.absorb(ctx.name, c * part)
        return c, None, None, None


class Preprocessing(torch.autograd.Function):
    """Fixed elementwise arithmetic on raw values (subtract a mean, divide by a scale): R passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        return compute(x)

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        return relevance, None


class Enter(torch.autograd.Function):
    """Where raw values meet arithmetic that needs c: the border between R (before) and c (after)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return c * x
