"""Autograd functions whose backward pass carries relevance instead of derivatives.

Between nodes the "gradient" is c = R / activation; before the input layer it is R (see ``marks.Mark.raw``).
Each reports to ``absorb(node name, absorbed relevance)``, entry by entry or, where samples follow one another, in sums
over all but the leading axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pfungst.lrp.operators import LinearOperator, Scratch, quotient
from pfungst.lrp.rules import LinearCall, Rule
from pfungst.lrp.samples import Samples, after_computing

Absorb = Callable[..., None]  # name, relevance or None, and samples (``interception.Dispatch.absorb``)


class LinearNode:
    """What the backward pass of one linear call needs besides its input.

    ``value`` is its output; or max(0, output) where a ReLU is all that uses it, since no relevance comes back where
    that is 0.  So node and ReLU keep one tensor and not two.  ``held``: the output is needed as it is.
    """

    def __init__(
        self,
        name: str,
        op: LinearOperator,
        rule: Rule,
        raw: bool,
        nonnegative: bool,
        bounds: tuple[Tensor, Tensor] | None,
        absorb: Absorb,
        scratch: Scratch,
        samples: Samples = None,
    ) -> None:
        self.name, self.op, self.rule, self.absorb, self.scratch = name, op, rule, absorb, scratch
        self.samples = samples
        self.value: Tensor | None = None
        self.held = self.rectified = False
        self.raw, self.nonnegative, self.bounds = raw, nonnegative, bounds

    @property
    def reads_input(self) -> bool:
        """Values of x are needed on the way back."""
        return self.raw or self.samples is not None or self.rule.reads_input

    def hold(self, output: Tensor) -> None:
        """The output is used elsewhere too."""
        if self.rectified:
            self.value, self.rectified = output.detach(), False
        self.held = True

    def rectify(self, value: Tensor) -> None:
        """A ReLU made this of the output."""
        self.value, self.rectified = value.detach(), True

    def take(self) -> Tensor:
        """The value; for the last time if relevance goes back only once."""
        assert self.value is not None
        value = self.value
        if self.scratch.once:
            self.value = None
        return value


class Linear(torch.autograd.Function):
    """A linear call: the forward value is the model's own, the backward pass is the node's rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, compute: Callable[[Tensor], Tensor], node: LinearNode) -> Tensor:
        y = compute(x)
        node.value = y.detach()  # not the output itself, which holds this node in turn
        ctx.node = node
        # Where only its shape matters x need not be kept.
        ctx.save_for_backward(x if node.reads_input else x.new_zeros(()).expand(x.shape))
        return y

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        node: LinearNode = ctx.node
        y = node.take()
        op, work = node.op, torch.promote_types(x.dtype, node.op.weight.dtype)
        if not x.dtype == y.dtype == c.dtype == op.weight.dtype:  # under autocast
            x, y, c, op = x.to(work), y.to(work), c.to(work), op.to(work)
        shared = node.rule.share(LinearCall(op, x, y, node.nonnegative, node.bounds, node.rectified, node.scratch), c)
        as_relevance = node.raw or node.samples is not None
        received = shared.input * x if as_relevance and not node.rule.carries_relevance else shared.input
        if node.samples is None:
            node.absorb(node.name, shared.absorbed)
        else:  # the rows that rules sum over are no samples here
            node.absorb(node.name, c * y, after_computing(y.shape, [(x.shape, node.samples)]))
            node.absorb(node.name, -received, node.samples)
        return received if node.raw else shared.input, None, None


class Rectify(torch.autograd.Function):
    """relu in the memory of its argument, which nothing else uses: the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        value = x.detach().relu_()
        ctx.save_for_backward(value)
        return value

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> Tensor:
        (value,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(c, value, 0)


def nearly_zero(dtype: torch.dtype) -> float:
    """Below it f(x) / x has no digits left, and f'(0) is taken: 1e-30 in float32, 6e-5 in float16."""
    limits = torch.finfo(dtype)
    return limits.tiny * 1e8 if limits.tiny * 1e8 < limits.eps else limits.tiny


class Elementwise(torch.autograd.Function):
    """y = f(x), entry by entry: c_x = c_y f(x) / x, and f'(0) where x is 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], name: str, absorb: Absorb) -> Tensor:
        ctx.function, ctx.name, ctx.absorb = function, name, absorb
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        y = ctx.function(x)  # kept, it would cost a transformer a fifth more memory
        ratio = y / x
        limit = nearly_zero(x.dtype)
        # One look at a sum finds zeros; float16 loses digits at values that are not so small.
        exact = x.abs().amin() > limit if x.dtype == torch.float16 else ratio.sum().isfinite()
        if bool(exact):
            ctx.absorb(ctx.name, None)  # all of c y goes to x
            return ratio.mul_(c), None, None, None
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            slope = torch.autograd.grad(ctx.function(point).sum(), point)[0]
        c_x = torch.where(x.abs() <= limit, slope, ratio).mul_(c)
        ctx.absorb(ctx.name, (c * y).sub_(c_x * x))
        return c_x, None, None, None


class Threshold(torch.autograd.Function):
    """The threshold ReLU T with relu(scale x + shift) = scale T(x) + shift: x where the unit is active, else t.

    t = -shift / scale, where the unit switches.  Where the unit is off, T does not depend on x: its relevance is
    absorbed; or, with ``passes``, it passes as through any activation function, c_x = c T / x, and grows without bound
    as x nears 0.
    Source: Binder's notes on canonisation, equations 16 to 19, where it passes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        active: Tensor,
        scale: Tensor,
        shift: Tensor,
        name: str,
        absorb: Absorb,
        passes: bool = False,
    ) -> Tensor:
        at = torch.where(scale == 0, 0, -shift / scale.masked_fill(scale == 0, 1))
        on = active & (scale != 0)
        value = torch.where(on, x, at)
        ctx.name, ctx.absorb, ctx.passes = name, absorb, passes
        ctx.save_for_backward(x, value, on)
        return value

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        x, value, on = ctx.saved_tensors
        relevance = c * value
        c_off = quotient(relevance, x, nearly_zero(x.dtype)) if ctx.passes else 0
        c_x = torch.where(on, c, c_off)
        ctx.absorb(ctx.name, relevance - c_x * x)
        return c_x, *[None] * 6


def gate_share(rule: str, gate: Tensor, signal: Tensor) -> Tensor | float:
    """The part of the relevance of gate * signal that goes to the gate.

    ``all``: all to the signal; ``half``: half to each; ``prop``: in proportion to the two values, g / (g + s);
    ``abs``: in proportion to their absolute values.  Source: Arras et al. 2019, section 3.
    """
    if rule in ("all", "half"):
        return 0.5 if rule == "half" else 0.0
    g, s = (gate, signal) if rule == "prop" else (gate.abs(), signal.abs())
    total = g + s
    return torch.where(total == 0, 0.5, g / total.masked_fill(total == 0, 1))


class Product(torch.autograd.Function):
    """gate * signal, of shapes that broadcast; the relevance of the product is shared by ``gate_share``."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, signal: Tensor, rule: str) -> Tensor:
        ctx.rule = rule
        ctx.save_for_backward(gate, signal)
        return gate * signal

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        gate, signal = ctx.saved_tensors
        share = gate_share(ctx.rule, gate, signal)
        to_gate, to_signal = c * signal * share, c * gate * (1 - share)
        return to_gate.sum_to_size(gate.shape), to_signal.sum_to_size(signal.shape), None


class Share(torch.autograd.Function):
    """The value unchanged; only this share of the relevance goes on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        return c * ctx.share, None


class Meter(torch.autograd.Function):
    """The value unchanged; the relevance that passes, times ``sign``, is reported as absorbed.

    With +1 behind a function and -1 before each of its inputs the ledger gets what the function itself absorbs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sign: int, name: str, absorb: Absorb) -> Tensor:
        ctx.sign, ctx.name, ctx.absorb = sign, name, absorb
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.absorb(ctx.name, ctx.sign * _relevance(c, x))
        return c, None, None, None


def _relevance(c: Tensor, x: Tensor) -> Tensor:
    """c x, and 0 where c is 0 although x is infinite, as masked attention scores are."""
    relevance = c * x
    if not bool(torch.isfinite(relevance.sum())):
        relevance = relevance.masked_fill(c == 0, 0)
    return relevance


class Replaced(torch.autograd.Function):
    """The model's own value in the place of one that was computed in other steps (they differ by rounding only)."""

    @staticmethod
    def forward(ctx: Any, opened: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        return c, None


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
        ctx.absorb(ctx.name, _relevance(c, part))
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
