"""Handlers of normalisations by statistics of the sample itself.

y = (x - μ) / σ · w + b.  With σ taken for a constant the rest is a linear map (the preset's ``norms="detached"``, as in
AttnLRP's implementation); with ``norms="identity"`` relevance goes through unchanged (Achtibat et al. 2024, 3.4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pfungst.errors import RelevanceError
from pfungst.lrp.calls import as_list, bound
from pfungst.lrp.functions import Entry
from pfungst.lrp.gradients import Absorb, nearly_zero
from pfungst.lrp.nodes import LinearNodes
from pfungst.lrp.operators import quotient


class Norm(torch.autograd.Function):
    """A normalisation over all entries of each row of x seen as ``rows``; the value is the model's own.

    x, y    any shape
    rows    shape in which the last axis is what one mean and deviation are taken over
    weight  broadcasts against x, or None; bias the same
    centred whether the mean is subtracted

    With σ for a constant all but the bias is linear in x, so what the node absorbs is c · bias.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, rows: tuple[int, ...],
                eps: float, centred: bool, identity: bool, name: str, absorb: Absorb) -> Tensor:  # fmt: skip
        ctx.rows, ctx.eps, ctx.centred, ctx.identity, ctx.name, ctx.absorb = rows, eps, centred, identity, name, absorb
        ctx.save_for_backward(x, y if identity else None, weight, bias)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, bias = ctx.saved_tensors
        if ctx.identity:
            relevance = c * y
            c_x = quotient(relevance, x, nearly_zero(x.dtype))
            ctx.absorb(ctx.name, relevance - c_x * x)
            return c_x, *[None] * 9
        ctx.absorb(ctx.name, None if bias is None else c * bias)
        rows = x.reshape(ctx.rows)
        square = rows.var(-1, keepdim=True, correction=0) if ctx.centred else rows.square().mean(-1, keepdim=True)
        c_rows = (c if weight is None else c * weight).reshape(ctx.rows) * (square + ctx.eps).rsqrt()
        if ctx.centred:
            c_rows = c_rows.sub_(c_rows.mean(-1, keepdim=True))
        return c_rows.reshape(x.shape), *[None] * 9


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
        with torch.no_grad():
            value, *rest = as_list(func(*args, **kwargs))
        weight, bias, rows, eps, centred = self._extent(func, name, args, kwargs)
        parameter = weight if weight is not None else x
        step = self._step(self.names.get(id(parameter), name), name, note=f"norm: {self.preset.norms}")
        if self.locate and x.dim() == 3 and ("layer" in name or "rms" in name):
            self.tokens = step.name, torch.linalg.vector_norm(x.detach().double(), dim=2)
        entered = self._enter(x)
        identity = self.preset.norms == "identity"
        absorb = self._absorber(self._mark(x).samples)
        # Scale and shift made from the input, as in adaptive norms, are gates.
        scale, shift = (None if part is None else part.detach() for part in (weight, bias))
        y = Norm.apply(entered, value, scale, shift, rows, eps, centred, identity, step.name, absorb)
        y = self._finish(y, [entered], Entry("norm"), raw=False)
        return (y, *rest) if rest else y

    def _extent(
        self, func: Any, name: str, args: Any, kwargs: Any
    ) -> tuple[Tensor | None, Tensor | None, tuple[int, ...], float, bool]:
        """Weight and bias (broadcast against x), shape of rows, epsilon, and whether the mean is subtracted."""
        x = args[0]
        if "layer" in name or "rms" in name:
            fields = ("input", "normalized_shape", "weight", *(("bias",) if "layer" in name else ()), "eps")
            given = bound(func, args, kwargs, fields)
            axes = len(given["normalized_shape"])
            rows = (*x.shape[: x.dim() - axes], -1)
            eps = given.get("eps")
            default = torch.finfo(x.dtype).eps if "rms" in name else 1e-5
            bias = given.get("bias") if "layer" in name else None
            return given.get("weight"), bias, rows, default if eps is None else eps, "rms" not in name
        if name == "native_group_norm":
            given = bound(func, args, kwargs, ("input", "weight", "bias", "N", "C", "HxW", "group", "eps"))
            groups = given["group"]
        elif name == "group_norm":
            given = bound(func, args, kwargs, ("input", "num_groups", "weight", "bias", "eps"))
            groups = given["num_groups"]
        else:
            given = bound(func, args, kwargs, _instance_fields(func))
            groups = x.shape[1]
        parts = (given.get("weight"), given.get("bias"))
        weight, bias = (None if t is None else t.reshape(1, -1, *[1] * (x.dim() - 2)) for t in parts)
        return weight, bias, (x.shape[0], groups, -1), given.get("eps", 1e-5), True

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


def _instance_fields(func: Any) -> tuple[str, ...]:
    """Arguments of instance norm, which torch.nn.functional and torch order differently."""
    if func is functional.instance_norm:
        return ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    return ("input", "weight", "bias", "running_mean", "running_var", "use_input_stats", "momentum", "eps")
