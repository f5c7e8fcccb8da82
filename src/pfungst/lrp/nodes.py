"""Handlers of the linear nodes, for which the preset's rule decides, and of the batch norms merged into them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pfungst.errors import RelevanceError
from pfungst.lrp.calls import as_tuple, bound
from pfungst.lrp.functions import Entry
from pfungst.lrp.gradients import Linear, LinearNode
from pfungst.lrp.marks import Mark
from pfungst.lrp.operators import Convolution, Dense, Diagonal, LinearOperator
from pfungst.lrp.plan import Step
from pfungst.lrp.recurrent import RecurrentHandlers


@dataclass
class Source:
    """The linear call that made a tensor: enough to do it again with a batch norm merged in."""

    x: Tensor
    mark: Mark
    op: LinearOperator
    step: Step


class Interception(RecurrentHandlers):
    """Runs the model's torch functions with the backward passes of the table; collects marks, steps and ledger."""

    def _convolution(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        fields = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = bound(func, args, kwargs, fields)
        dims = given["weight"].dim() - 2
        padding, extra = given.get("padding", 0), ()
        if padding == "same":
            dilation = as_tuple(given.get("dilation", 1), dims)
            total = [d * (k - 1) for d, k in zip(dilation, given["weight"].shape[2:], strict=True)]
            # As torch does it: the odd one of an even kernel at the end.
            padding, extra = [t // 2 for t in total], tuple(t % 2 for t in total)
        padding = 0 if padding == "valid" else padding
        return self._convolution_node(func, name, {**given, "padding": padding}, args, kwargs, extra)

    def _transposed_convolution(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        fields = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
        given = bound(func, args, kwargs, fields)
        return self._convolution_node(func, name, {**given, "transposed": True}, args, kwargs)

    def _any_convolution(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        """``aten.convolution``, of which decomposed exported programs consist."""
        fields = (
            "input",
            "weight",
            "bias",
            "stride",
            "padding",
            "dilation",
            "transposed",
            "output_padding",
            "groups",
        )
        return self._convolution_node(func, name, bound(func, args, kwargs, fields), args, kwargs)

    def _convolution_node(
        self, func: Any, name: str, given: dict[str, Any], args: Any, kwargs: Any, extra: tuple[int, ...] = ()
    ) -> Any:
        x, weight, bias = args[0], given["weight"], given.get("bias")
        self._check_constant(name, weight, bias)
        dims = weight.dim() - 2
        if x.dim() != dims + 2:
            raise RelevanceError(
                f"{name} gets an input of shape {tuple(x.shape)}, which has no axis for the samples",
                "let the model keep the sample axis (x[:1], not x[0]), so that samples stay apart",
            )
        op = Convolution(
            weight.detach(),
            None if bias is None else bias.detach().reshape(1, -1, *[1] * dims),
            stride=as_tuple(given.get("stride", 1), dims),
            padding=as_tuple(given.get("padding", 0), dims),
            dilation=as_tuple(given.get("dilation", 1), dims),
            transposed=bool(given.get("transposed", False)),
            output_padding=as_tuple(given.get("output_padding", 0), dims),
            groups=int(given.get("groups", 1)),
            extra=extra,
        )
        return self._linear_node(name, x, op, weight, lambda value: func(value, *args[1:], **kwargs))

    def _dense(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        """F.linear, and matrix products whose second factor is a constant matrix."""
        if name == "linear":
            given = bound(func, args, kwargs, ("input", "weight", "bias"))
            x, weight, bias = args[0], given["weight"], given.get("bias")
            self._check_constant(name, weight, bias)
            op = Dense(weight.detach(), None if bias is None else bias.detach())
            return self._linear_node(name, x, op, weight, lambda v: func(v, *args[1:], **kwargs))
        bias, x, weight = (args[0], args[1], args[2]) if name == "addmm" else (None, args[0], args[1])
        self._check_constant(name, weight, bias)
        if weight.dim() != 2 or kwargs:
            raise self._unknown(name, "with a constant that is not one matrix, or with beta/alpha, has no rule")
        op = Dense(weight.detach().t(), None if bias is None else bias.detach())
        compute = (lambda v: func(bias, v, weight)) if name == "addmm" else (lambda v: func(v, weight))
        return self._linear_node(name, x, op, weight, compute)

    def _batch_norm(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        fields = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        if func is not functional.batch_norm:  # torch.batch_norm orders its arguments otherwise
            fields = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
        given = bound(func, args, kwargs, fields)
        x, mean, variance = args[0], given["running_mean"], given["running_var"]
        if given.get("training") or mean is None:
            raise RelevanceError(
                "a batch norm uses the statistics of the batch, so relevance would mix samples",
                "call model.eval() first (a batch norm without running statistics cannot be explained)",
            )
        weight, bias = given.get("weight"), given.get("bias")
        scale = (variance.detach() + given.get("eps", 1e-5)).rsqrt()
        scale = scale if weight is None else scale * weight.detach()
        shift = -mean.detach() * scale
        shift = shift if bias is None else shift + bias.detach()
        with torch.no_grad():
            # The model's own value; below only the backward pass is ours.
            value, *rest = _as_list(func(*args, **kwargs))
        parameter = weight if weight is not None else mean
        source = self._mark(x).source
        # Behind a dense layer axis 1 is the channel axis of both only if there is no axis between.
        if source is not None and (source.op.kind == "convolution" or x.dim() == 2):
            source.step.note = f"merged with batch norm {self.names.get(id(parameter), '')}".rstrip()
            y = self._apply(source.x, source.mark, source.op.merged(scale, shift), source.step, lambda _: value)
            return (y, *rest) if rest else y
        shape = [1, -1, *[1] * (x.dim() - 2)]
        op = Diagonal(scale.reshape(shape), shift.reshape(shape))
        y = self._linear_node(name, x, op, parameter, lambda _: value)
        return (y, *rest) if rest else y

    def _check_constant(self, name: str, *tensors: Tensor | None) -> None:
        if any(t is not None and self.marks.get(t) is not None for t in tensors):
            raise self._unknown(name, "has weights that depend on the input; it has no rule")

    def _linear_node(
        self,
        function: str,
        x: Tensor,
        op: LinearOperator,
        weight: Tensor,
        compute: Callable[[Tensor], Tensor],
    ) -> Tensor:
        mark = self.marks.get(x)
        if mark is None:
            raise self._unknown(function, "has weights that depend on the input; it has no rule")
        step = self._step(self.names.get(id(weight), function), function, op.kind)
        y = self._apply(x, mark, op, step, compute)
        known = self._mark(y)
        # A diagonal node keeps no source: a second batch norm on it stays a node of its own.
        known.source = None if op.kind == "batch_norm" else Source(x, mark, op, step)
        return y

    def _apply(
        self, x: Tensor, mark: Mark, op: LinearOperator, step: Step, compute: Callable[[Tensor], Tensor]
    ) -> Tensor:
        is_input = not mark.linear
        rule = self.preset.rule_for(op.kind, is_input, step.name)
        rule.check_place(mark.raw, step.name)
        step.rule = rule.label + (" at the input" if is_input else "")
        node = LinearNode(step.name, op, rule, mark.raw, mark.nonnegative, mark.bounds, self.absorb)
        y: Tensor = Linear.apply(x, compute, node)
        self.marks.put(y, Mark(raw=False, linear=True))
        if step.name in self.keep:
            self.outputs[step.name] = y
        return y


def _as_list(result: Any) -> list[Tensor]:
    """The tensors of a result that is one tensor, or several as from ``_native_batch_norm_legit_no_training``."""
    return [result] if isinstance(result, Tensor) else list(result)
