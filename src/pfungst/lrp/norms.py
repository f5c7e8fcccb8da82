"""Handlers of normalisations by statistics of the sample itself.

y = (x - μ) / σ · w + b.  With σ taken for a constant the rest is a linear map (the preset's ``norms="detached"``, as in
AttnLRP's implementation); with ``norms="identity"`` relevance goes through unchanged (Achtibat et al. 2024, 3.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pfungst.errors import RelevanceError
from pfungst.lrp.calls import as_list, bound
from pfungst.lrp.functions import Entry
from pfungst.lrp.gradients import Absorb, nearly_zero
from pfungst.lrp.nodes import LinearNodes
from pfungst.lrp.operators import channel_dots, quotient


@dataclass(frozen=True)
class Extent:
    """What a normalisation takes its statistics over.

    rows         shape in which the last axis is what one mean and deviation are taken over
    weight       broadcasts against the input, or None; bias the same
    centred      whether the mean is subtracted
    channel_axis that of weight and bias
    parameter    the weight as the model has it, for the node's name
    """

    weight: Tensor | None
    bias: Tensor | None
    rows: tuple[int, ...]
    eps: float
    centred: bool
    channel_axis: int
    parameter: Tensor | None

    def inverse_deviation(self, x: Tensor) -> Tensor:
        """1 / sqrt(σ² + eps) of each row, (..., 1)."""
        x = x.reshape(self.rows)
        square = x.var(-1, keepdim=True, correction=0) if self.centred else x.square().mean(-1, keepdim=True)
        return (square + self.eps).rsqrt()


class Norm(torch.autograd.Function):
    """A normalisation whose value y is the model's own, with σ for a constant.

    ``inverse`` is 1 / σ of each row.  All but the bias is linear in x, so what the node absorbs is c · bias.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, inverse: Tensor, extent: Extent, by_row: bool, name: str, absorb: Absorb
    ) -> Tensor:
        ctx.extent, ctx.by_row, ctx.name, ctx.absorb = extent, by_row, name, absorb
        ctx.save_for_backward(inverse.reshape(*extent.rows[:-1], 1).to(x.dtype))
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        extent: Extent = ctx.extent
        if extent.bias is None:
            ctx.absorb(ctx.name, None)
        else:  # entry by entry where the leading axis is not that of samples
            ctx.absorb(ctx.name, channel_dots(c, extent.bias, extent.channel_axis) if ctx.by_row else c * extent.bias)
        rows = (c if extent.weight is None else c * extent.weight).reshape(extent.rows)
        rows = rows * inverse if extent.weight is None else rows.mul_(inverse)
        if extent.centred:
            rows = rows.sub_(rows.mean(-1, keepdim=True))
        return rows.reshape(c.shape), *[None] * 6


class Identity(torch.autograd.Function):
    """A normalisation through which relevance goes unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, name: str, absorb: Absorb) -> Tensor:
        ctx.name, ctx.absorb = name, absorb
        ctx.save_for_backward(x, y)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        relevance = c * y
        c_x = quotient(relevance, x, nearly_zero(x.dtype))
        ctx.absorb(ctx.name, relevance - c_x * x)
        return c_x, None, None, None


class LocalResponse(torch.autograd.Function):
    """y_c = x_c B_c^-β, B_c = k + (α/n) Σ_{j in N(c)} x_j²: Taylor messages of first order, normalised to y_c.

    From itself x_c (k + (α/n) x_c²)^-β, from each neighbour -2 (α/n) β x_c B_c^(-β-1) x_j².
    Source: Binder et al. 2016 (ICANN), whose messages miss y by the higher orders: here they are divided by their sum.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
        ctx.size, ctx.alpha, ctx.beta, ctx.k = size, alpha, beta, k
        ctx.save_for_backward(x, y)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        share, beta = ctx.alpha / ctx.size, ctx.beta
        square = x.square()
        around = _window_sum(square, ctx.size)
        own = (ctx.k + share * square).pow(-beta)  # of x_c itself, divided by x_c
        slope = -2 * share * beta * (ctx.k + share * around).pow(-beta - 1)  # times x_c x_j² is the message of x_j
        total = own + slope * (around - square)  # Σ of all messages / x_c
        s = c * y / torch.where(total == 0, 1, total) / torch.where(x == 0, 1, x)
        weighted = s * slope * x
        back = _window_sum(weighted, ctx.size, transposed=True) - weighted
        return s * own + x * back, None, None, None, None, None


def _window_sum(x: Tensor, size: int, *, transposed: bool = False) -> Tensor:
    """Sum over the ``size`` neighbours along axis 1 as ``F.local_response_norm`` takes them, or its transpose."""
    before, after = size // 2, (size - 1) // 2
    if transposed:
        before, after = after, before
    rows = x.movedim(1, -1)
    padded = functional.pad(rows, (before, after))
    return padded.unfold(-1, size, 1).sum(-1).movedim(-1, 1)


class NormHandlers(LinearNodes):
    """Batch norm is a linear map and lives with the linear nodes."""

    def _norm(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        x = args[0]
        if name == "instance_norm" and not self._own_statistics(func, args, kwargs):
            return self._as_batch_norm(func, args, kwargs)
        extent = self._extent(func, name, args, kwargs)
        with torch.no_grad():
            value, inverse, rest = _normalised(func, name, args, kwargs, extent)
        step = self._step(self.names.get(id(extent.parameter), name), name, note=f"norm: {self.preset.norms}")
        if self.locate and x.dim() == 3 and ("layer" in name or "rms" in name):
            self.tokens = step.name, torch.linalg.vector_norm(x.detach().double(), dim=2)
        entered = self._enter(x)
        samples = self._mark(x).samples
        absorb = self._absorber(samples)
        if self.preset.norms == "identity":
            y = Identity.apply(entered, value, step.name, absorb)
        else:
            if inverse is None:
                inverse = extent.inverse_deviation(x.detach())
            y = Norm.apply(entered, value, inverse, extent, samples is None, step.name, absorb)
        y = self._finish(y, [entered], Entry("norm"), raw=False)
        return (y, *rest) if rest else y

    def _extent(self, func: Any, name: str, args: Any, kwargs: Any) -> Extent:
        x = args[0]
        if "layer" in name or "rms" in name:
            fields = ("input", "normalized_shape", "weight", *(("bias",) if "layer" in name else ()), "eps")
            given = bound(func, args, kwargs, fields)
            rows = (*x.shape[: x.dim() - len(given["normalized_shape"])], -1)
            eps = given.get("eps")
            default = torch.finfo(x.dtype).eps if "rms" in name else 1e-5
            weight, bias = given.get("weight"), given.get("bias") if "layer" in name else None
            # Scale and shift made from the input, as in adaptive norms, are gates.
            scale, shift = (None if t is None else t.detach() for t in (weight, bias))
            return Extent(scale, shift, rows, default if eps is None else eps, "rms" not in name, -1, weight)
        if name == "native_group_norm":
            given = bound(func, args, kwargs, ("input", "weight", "bias", "N", "C", "HxW", "group", "eps"))
            groups = given["group"]
        elif name == "group_norm":
            given = bound(func, args, kwargs, ("input", "num_groups", "weight", "bias", "eps"))
            groups = given["num_groups"]
        else:
            given = bound(func, args, kwargs, _instance_fields(func))
            groups = x.shape[1]
        weight, bias = given.get("weight"), given.get("bias")
        shape = [1, -1, *[1] * (x.dim() - 2)]
        scale, shift = (None if t is None else t.detach().reshape(shape) for t in (weight, bias))
        return Extent(scale, shift, (x.shape[0], groups, -1), given.get("eps", 1e-5), True, 1, weight)

    def _own_statistics(self, func: Any, args: Any, kwargs: Any) -> bool:
        given = bound(func, args, kwargs, _instance_fields(func))
        return bool(given.get("use_input_stats", True))

    def _as_batch_norm(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = bound(func, args, kwargs, _instance_fields(func))
        values = (given["input"], given["running_mean"], given["running_var"], given.get("weight"), given.get("bias"))
        call = functional.batch_norm
        return self._batch_norm(call, "batch_norm", Entry("batch_norm"), values, {"eps": given.get("eps", 1e-5)})

    def _local_response_norm(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        given = bound(func, args, kwargs)
        x = self._enter(args[0])
        if x.dim() < 3:
            raise RelevanceError(f"local response norm of shape {tuple(x.shape)}", "give it (n, channels, ...)")
        with torch.no_grad():
            value = func(*args, **kwargs)
        self._step(name, name, note="Taylor messages (Binder 2016), normalised")
        parameters = given["size"], given.get("alpha", 1e-4), given.get("beta", 0.75), given.get("k", 1.0)
        return self._finish(LocalResponse.apply(x, value, *parameters), [x], Entry("norm", "keeps"), raw=False)


def _normalised(
    func: Any, name: str, args: Any, kwargs: Any, extent: Extent
) -> tuple[Tensor, Tensor | None, list[Any]]:
    """Value of the call, 1 / σ where torch returns it too, and what else the call returns."""
    x = args[0]
    if name == "layer_norm" and not torch.is_autocast_enabled(x.device.type):
        # Its own kernel, which knows σ: torch's var would cost five times as much.
        shape = x.shape[len(extent.rows) - 1 :]
        value, _, inverse = torch.native_layer_norm(x, shape, extent.weight, extent.bias, extent.eps)
        return value, inverse, []
    value, *rest = as_list(func(*args, **kwargs))
    return value, rest[1] if name in ("native_layer_norm", "native_group_norm") else None, rest


def _instance_fields(func: Any) -> tuple[str, ...]:
    """Arguments of instance norm, which torch.nn.functional and torch order differently."""
    if func is functional.instance_norm:
        return ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    return ("input", "weight", "bias", "running_mean", "running_var", "use_input_stats", "momentum", "eps")
