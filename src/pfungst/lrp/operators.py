"""Linear operators of a network: what a call multiplies, kept apart from the weights it multiplies with.

A rule needs a linear node several times with changed weights (their positive part, their square, ones) and
backwards.  Each class here gives just that: ``forward(x, weight, bias)``, and ``transpose(s, weight, x)``, the
transposed map (the gradient of ``forward`` to ``x`` for the output gradient ``s``).

Changed weights are made anew at every call, in memory that the nodes of a trace share (``Scratch``).  Kept for good
they would double the model, and be wrong, in silence, after ``weight.data.copy_(...)``, which leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


class Scratch:
    """Memory for changed weights, used again by node after node; as large as the largest weight of each slot.

    Not to be shared by threads.  A tensor taken from a slot is good until the slot is taken again.
    ``once``: relevance goes back for the last time, what nodes have kept can go.
    """

    def __init__(self) -> None:
        self.once = False
        self._held: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, slot: str, like: Tensor) -> Tensor:
        """A tensor of the shape, type and memory format of ``like``, with any values."""
        key = (slot, like.dtype, like.device)
        held = self._held.get(key)
        if held is None or held.numel() < like.numel():
            held = self._held[key] = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
        if like.is_contiguous():
            return held[: like.numel()].view(like.shape)
        return held.as_strided(like.shape, torch.empty_like(like, device="meta").stride())


@dataclass(frozen=True)
class LinearOperator:
    """``y = forward(x, weight * scale, bias)``, every tensor detached.

    ``kind`` is the word that presets match: ``convolution``, ``dense`` or ``batch_norm``.
    ``bias`` broadcasts against the output, or is None.
    ``scale`` is that of a batch norm that was merged in, one a channel, or None.
    """

    weight: Tensor
    bias: Tensor | None
    kind: str = "dense"
    scale: Tensor | None = None

    channel_axis = 1  # of the output
    joins = False  # Wx + Vy is best computed as one call on inputs and weights joined along axis 1

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The output for input ``x``; ``bias`` broadcasts against it."""
        raise NotImplementedError

    def transpose(self, s: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """The transposed operator applied to ``s`` (shape of the output); result of the shape of ``x``."""
        raise NotImplementedError

    def channel_vector(self, values: Tensor) -> Tensor:
        """``values``, one an output channel, shaped to broadcast against the output."""
        raise NotImplementedError

    def channel_weight(self, values: Tensor) -> Tensor:
        """``values``, one an output channel, shaped to broadcast against ``weight``."""
        raise NotImplementedError

    def merged(self, scale: Tensor, shift: Tensor) -> LinearOperator:
        """This operator followed by ``y * scale + shift`` per output channel, as one operator."""
        bias = self.channel_vector(shift)
        if self.bias is not None:
            bias = bias + self.bias * self.channel_vector(scale)
        return replace(self, scale=scale if self.scale is None else self.scale * scale, bias=bias)

    def input_weight(self, values: Tensor) -> Tensor:
        """``values``, one an input channel, shaped to broadcast against ``weight``."""
        raise NotImplementedError

    def after(self, scale: Tensor, shift: Tensor, x: Tensor) -> LinearOperator:
        """This operator applied to ``x * scale + shift`` per input channel, as one operator on ``x``.

        Its bias varies in space where there is padding, since padding is zero and not ``shift``.
        """
        shape = [1, -1, *[1] * (x.dim() - 2)]
        bias = self.forward(shift.reshape(shape).expand(1, *x.shape[1:]), self.weight)
        bias = bias if self.bias is None else bias + self.bias
        return replace(self, weight=self.weight * self.input_weight(scale), bias=bias)

    def to(self, dtype: torch.dtype) -> LinearOperator:
        """The same in another floating-point type."""
        tensors = {"weight": self.weight, "bias": self.bias, "scale": self.scale}
        return replace(self, **{k: None if t is None else t.to(dtype) for k, t in tensors.items()})  # type: ignore

    def effective(self, scratch: Scratch) -> Tensor:
        """The weights, with a merged scale in them (then in slot ``effective``)."""
        if self.scale is None:
            return self.weight
        return torch.mul(self.weight, self.channel_weight(self.scale), out=scratch.take("effective", self.weight))

    def part(self, sign: int, scratch: Scratch) -> Tensor:
        """Positive (sign 1) or negative (-1) part of the effective weights, in a slot of its own."""
        out = scratch.take("positive" if sign > 0 else "negative", self.weight)
        if self.scale is None:
            return torch.clamp(self.weight, **_bound(sign), out=out)
        return torch.mul(self.weight, self.channel_weight(self.scale), out=out).clamp_(**_bound(sign))

    def transpose_effective(self, s: Tensor, x: Tensor, scratch: Scratch, spent: bool = False) -> Tensor:
        """``transpose`` with the effective weights, in new memory; ``s`` may be written over if it is ``spent``.

        A merged scale goes to what is smaller, weights or ``s``.
        """
        if self.scale is not None and s.numel() < self.weight.numel():
            scale = self.channel_vector(self.scale)
            return self.transpose(s.mul_(scale) if spent else s * scale, self.weight, x)
        return self.transpose(s, self.effective(scratch), x)

    def dot_bias(self, s: Tensor, bias: Tensor) -> Tensor:
        """Σ s · bias over all but the leading axis of ``s`` (shape of the output); (rows,) float64."""
        return channel_dots(s, bias, self.channel_axis)


def quotient(numerator: Tensor, denominator: Tensor, limit: float | None = None) -> Tensor:
    """The quotient, and 0 where |denominator| <= ``limit`` (by default so small that the quotient would overflow)."""
    limit = torch.finfo(denominator.dtype).tiny if limit is None else limit
    small = denominator.abs() <= limit
    return torch.where(small, 0, numerator / denominator.masked_fill(small, 1))


def row_sums(values: Tensor) -> Tensor:
    """Sums over all but the leading axis, (rows,) float64."""
    if values.dim() == 1:
        return values.double()
    return values.sum(list(range(1, values.dim())), dtype=_summed_as(values)).double()


def channel_dots(s: Tensor, values: Tensor, axis: int) -> Tensor:
    """Sums of s · values over all but the leading axis, (rows,) float64.

    ``values`` broadcast against s; one a channel of ``axis`` they cost next to nothing.
    """
    axis %= s.dim()
    if axis == 0 or values.numel() != s.shape[axis]:
        return row_sums(s * values)
    others = [a for a in range(1, s.dim()) if a != axis]
    by_channel = s.sum(others, dtype=_summed_as(s)) if others else s.to(_summed_as(s))
    return (by_channel @ values.flatten().to(by_channel.dtype)).double()


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Sums of a · b over all but the leading axis, (rows,) float64; on a CPU without the products in memory.

    In blocks, since a dot product of float32 adds one after another and so loses digits.
    """
    plain = a.device.type == "cpu" and a.dtype in (torch.float32, torch.float64)
    if not plain or len(a) > 64 or not (a.is_contiguous() and b.is_contiguous()):
        return row_sums(a * b)
    rows = zip(a.view(len(a), -1), b.view(len(b), -1), strict=True)
    dots = [[torch.dot(*both) for both in zip(x.split(1 << 16), y.split(1 << 16), strict=True)] for x, y in rows]
    return torch.stack([torch.stack(row).sum(dtype=torch.float64) for row in dots])


def _summed_as(values: Tensor) -> torch.dtype:
    """Sums of float32 stay float32: torch adds pairwise, and a cast would copy everything."""
    return values.dtype if values.dtype in (torch.float32, torch.float64) else torch.float32


def _bound(sign: int) -> dict[str, int]:
    return {"min": 0} if sign > 0 else {"max": 0}


@dataclass(frozen=True)
class Dense(LinearOperator):
    """``y = x Wᵀ + b`` over the last axis; ``weight`` (outputs, inputs)."""

    channel_axis = -1

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is None or bias.shape == weight.shape[:1]:
            return torch.nn.functional.linear(x, weight, bias)
        return torch.nn.functional.linear(x, weight) + bias

    def transpose(self, s: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return torch.matmul(s, weight)

    def channel_vector(self, values: Tensor) -> Tensor:
        return values

    def channel_weight(self, values: Tensor) -> Tensor:
        return values[:, None]

    def input_weight(self, values: Tensor) -> Tensor:
        return values[None, :]


@dataclass(frozen=True)
class Contraction(LinearOperator):
    """Any product with a constant ``weight``, such as a matrix from the left, a batch of matrices or an einsum.

    ``compute(x, weight)`` is the product without a bias, linear in both.
    """

    compute: Callable[[Tensor, Tensor], Tensor] = torch.matmul

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self.compute(x, weight)
        return y if bias is None else y + bias

    def dot_bias(self, s: Tensor, bias: Tensor) -> Tensor:
        return row_sums(s * bias)

    def transpose(self, s: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            back: Tensor = torch.autograd.grad(self.compute(point, weight), point, s)[0]
        return back


@dataclass(frozen=True)
class Diagonal(LinearOperator):
    """``y = x * weight + b`` per channel (axis 1): a batch norm that no linear node precedes."""

    kind: str = "batch_norm"

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return x * weight if bias is None else torch.addcmul(bias, x, weight)

    def transpose(self, s: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return s * weight

    def transpose_effective(self, s: Tensor, x: Tensor, scratch: Scratch, spent: bool = False) -> Tensor:
        return s * self.effective(scratch)

    def channel_vector(self, values: Tensor) -> Tensor:
        return values.reshape(self.weight.shape)

    channel_weight = channel_vector


@dataclass(frozen=True)
class Convolution(LinearOperator):
    """A convolution of any dimension, transposed or not; the arguments are those of ``aten::convolution``.

    ``extra`` are zeros put at the end of each spatial axis before all else: ``padding="same"`` with an even kernel.
    """

    kind: str = "convolution"
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    transposed: bool = False
    output_padding: tuple[int, ...] = (0, 0)
    groups: int = 1
    extra: tuple[int, ...] = ()

    @property
    def joins(self) -> bool:  # type: ignore[override]
        """Few input channels, as in first layers, do not fill the processor's registers: twice as many cost little."""
        return self.groups == 1 and not self.transposed and self.weight.shape[1] <= 8

    def _arguments(self) -> tuple[Any, ...]:
        return (
            list(self.stride),
            list(self.padding),
            list(self.dilation),
            self.transposed,
            list(self.output_padding),
            self.groups,
        )

    def _padded(self, x: Tensor, sign: int = 1) -> Tensor:
        if not any(self.extra):
            return x
        return torch.nn.functional.pad(x, [end for e in reversed(self.extra) for end in (0, sign * e)])

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is None or bias.shape[2:].numel() == 1:
            bias = None if bias is None else bias.flatten()
            return torch.ops.aten.convolution(self._padded(x), weight, bias, *self._arguments())
        # A bias that varies in space: that of a batch norm before padding.
        y: Tensor = torch.ops.aten.convolution(self._padded(x), weight, None, *self._arguments())
        return y.add_(bias)

    def transpose(self, s: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        # With padding some inputs may lie outside every window; convolution_backward knows the input's shape.
        back = torch.ops.aten.convolution_backward(
            s, self._padded(x), weight, None, *self._arguments(), [True, False, False]
        )[0]
        return self._padded(back, -1)

    def channel_vector(self, values: Tensor) -> Tensor:
        return values.reshape(1, -1, *[1] * len(self.stride))

    def channel_weight(self, values: Tensor) -> Tensor:
        if not self.transposed:
            return values.reshape(-1, 1, *[1] * len(self.stride))
        # A transposed convolution keeps its output channels in axis 1, group by group (inputs in axis 0).
        out_per_group = self.weight.shape[1]
        in_per_group = self.weight.shape[0] // self.groups
        by_group = values.reshape(self.groups, 1, out_per_group).expand(-1, in_per_group, -1)
        return by_group.reshape(self.weight.shape[0], out_per_group, *[1] * len(self.stride))

    def input_weight(self, values: Tensor) -> Tensor:
        axes = [1] * len(self.stride)
        if self.transposed:
            return values.reshape(-1, 1, *axes)
        outputs = self.weight.shape[0] // self.groups
        by_group = values.reshape(self.groups, 1, -1).expand(-1, outputs, -1)
        return by_group.reshape(self.weight.shape[0], -1, *axes)
