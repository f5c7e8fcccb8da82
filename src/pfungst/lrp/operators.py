"""Linear operators of a network: what a call multiplies, kept apart from the weights it multiplies with.

A rule needs a linear node several times with changed weights (their positive part, their square, ones) and
backwards.  Each class here gives just that: ``forward(x, weight)`` without the bias, and
``transpose(s, weight, x)``, the transposed map (the gradient of ``forward`` to ``x`` for the output gradient ``s``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearOperator:
    """``y = forward(x, weight) + bias``, every tensor detached.

    ``kind`` is the word that presets match: ``convolution``, ``dense`` or ``batch_norm``.
    ``bias`` broadcasts against the output, or is None.
    """

    weight: Tensor
    bias: Tensor | None
    kind: str = "dense"

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """The output for input ``x`` without the bias."""
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
        return replace(self, weight=self.weight * self.channel_weight(scale), bias=bias)

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


@dataclass(frozen=True)
class Dense(LinearOperator):
    """``y = x Wᵀ + b`` over the last axis; ``weight`` (outputs, inputs)."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight)

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

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.compute(x, weight)

    def transpose(self, s: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            back: Tensor = torch.autograd.grad(self.compute(point, weight), point, s)[0]
        return back


@dataclass(frozen=True)
class Diagonal(LinearOperator):
    """``y = x * weight + b`` per channel (axis 1): a batch norm that no linear node precedes."""

    kind: str = "batch_norm"

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * weight

    def transpose(self, s: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return s * weight

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

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.aten.convolution(self._padded(x), weight, None, *self._arguments())

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
