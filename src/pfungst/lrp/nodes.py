"""Handlers of the linear nodes, for which the preset's rule decides, and of the batch norms merged into them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pfungst.errors import RelevanceError
from pfungst.lrp.calls import as_function_of, as_list, as_tuple, bound, other_operand
from pfungst.lrp.even import EvenLinear
from pfungst.lrp.functions import Entry
from pfungst.lrp.gradients import Linear, LinearNode, Rectify, Threshold
from pfungst.lrp.marks import Mark, map_tensors
from pfungst.lrp.operators import Contraction, Convolution, Dense, Diagonal, LinearOperator
from pfungst.lrp.plan import Step
from pfungst.lrp.products import ProductHandlers
from pfungst.lrp.samples import after_computing


@dataclass
class Source:
    """The linear call that made a tensor: enough to do it again with a batch norm merged in."""

    x: Tensor
    mark: Mark
    op: LinearOperator
    step: Step


@dataclass
class Normed:
    """A batch norm before a linear node, ``x * scale + shift`` per channel; ``active`` where a ReLU let it through."""

    x: Tensor
    scale: Tensor
    shift: Tensor
    step: Step
    active: Tensor | None = None


class LinearNodes(ProductHandlers):
    """Convolutions, products with constants, batch norms."""

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
        if self._marked((weight, bias)):
            if self.preset.gates != "all" or self.marks.get(x) is None or self._marked((bias,)):
                return self._shared(func, name, args, kwargs, [x, weight], False)
            # A kernel made from the input chooses what is done to it: all goes to what it is applied to.
            args, kwargs = map_tensors((args, kwargs), lambda t: t.detach() if t is weight else t)
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

    def _linear_product(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """F.linear, and matrix products of every kind with one constant factor."""
        if name == "linear":
            x, weight, bias = args
            op: LinearOperator = Dense(weight.detach(), None if bias is None else bias.detach())
            return self._linear_node(name, x, op, weight, lambda v: func(v, weight, bias))
        x, weight = self._sides(name, args)
        compute = as_function_of(x, func, args, kwargs)
        if name in ("matmul", "mm") and args[0] is x and weight.dim() == 2 and not kwargs:
            return self._linear_node(name, x, Dense(weight.detach().t(), None), weight, compute)
        if name == "addmm" and args[1] is x and not kwargs:
            return self._linear_node(name, x, Dense(weight.detach().t(), args[0].detach()), weight, compute)

        def product(value: Tensor, factor: Tensor) -> Tensor:
            changed = map_tensors((args, kwargs), lambda t: value if t is x else factor if t is weight else t)
            result: Tensor = func(*changed[0], **changed[1])
            if bias is None:
                return result
            zero = map_tensors((args, kwargs), lambda t: torch.zeros_like(t) if t is x or t is weight else t)
            return result - func(*zero[0], **zero[1])

        bias = None
        if name not in ("matmul", "mm", "bmm", "mv", "einsum", "tensordot", "inner"):
            with torch.no_grad():
                bias = compute(torch.zeros_like(x)).detach()
        return self._linear_node(name, x, Contraction(weight.detach(), bias, compute=product), weight, compute)

    def _sides(self, name: str, args: Any) -> tuple[Tensor, Tensor]:
        """The factor of a product that carries values of the input, and the one that is a constant."""
        factors = self._factors(name, args)
        (x,) = self._marked(factors)
        constants = [factor for factor in factors if factor is not x]
        if len(constants) != 1:
            raise self._unknown(name, f"of {len(factors)} factors has no rule")
        return x, constants[0]

    def _add(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        """A vector added to a product that has no bias is its bias, as in ``x @ w + b`` and decomposed programs."""
        carried = self._marked((args, kwargs))
        x = carried[0]
        source: Source | None = self._mark(x).source
        bias = other_operand(x, args, kwargs, 0)
        if len(carried) > 1 or source is None or source.op.kind != "dense" or source.op.bias is not None:
            return super()._add(func, name, entry, args, kwargs)
        if name != "add" or kwargs.get("alpha", 1) != 1 or not isinstance(bias, Tensor) or bias.shape != x.shape[-1:]:
            return super()._add(func, name, entry, args, kwargs)
        with torch.no_grad():
            value = func(*args, **kwargs)
        source.step.note = "merged with the bias added to it"
        op = replace(source.op, bias=bias.detach())
        y = self._apply(source.x, source.mark, op, source.step, lambda _: value)
        self._mark(y).source = Source(source.x, source.mark, op, source.step)
        self.merged[x] = y
        return y

    def _gradient(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        result = super()._gradient(func, name, entry, args, kwargs)
        if name == "view" and result.shape == args[0].shape:  # as in decomposed programs
            self._mark(result).source = self._mark(args[0]).source
        return result

    def _batch_norm(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        fields: tuple[str, ...] = (
            "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps",
        )  # fmt: skip
        if name != "batch_norm":
            fields = ("input", "weight", "bias", "running_mean", "running_var", "momentum", "eps")
        elif func is not functional.batch_norm:  # torch.batch_norm orders its arguments otherwise
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
            value, *rest = as_list(func(*args, **kwargs))
        parameter = weight if weight is not None else mean
        source = self._mark(x).source
        # Behind a dense layer axis 1 is the channel axis of both only if there is no axis between.
        if source is not None and (source.op.kind == "convolution" or x.dim() == 2):
            source.step.note = f"merged with batch norm {self.names.get(id(parameter), '')}".rstrip()
            y = self._apply(source.x, source.mark, source.op.merged(scale, shift), source.step, lambda _: value)
            self.merged[x] = y
            return (y, *rest) if rest else y
        shape = [1, -1, *[1] * (x.dim() - 2)]
        op = Diagonal(scale.reshape(shape), shift.reshape(shape))
        y = self._linear_node(name, x, op, parameter, lambda _: value)
        if self._mark(x).linear and self.region is None:
            self._mark(y).normed = Normed(x, scale, shift, self.steps[-1])
        return (y, *rest) if rest else y

    def _relu(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        y = args[0]
        mark = self._mark(y)
        normed, node = mark.normed, mark.node
        alone = node is not None and not node.held and mark.uses == 1
        if alone and self.in_place and y._base is None and not y.is_inference():
            result = self._finish(Rectify.apply(y), [y], entry, raw=False, samples=[mark.samples])
        else:
            result = self._gradient(func, name, entry, args, kwargs)
        if alone:
            node.rectify(result)
        if normed is not None:
            self._mark(result).normed = replace(normed, active=result.detach() > 0)
        return result

    def _before_norm(self, x: Tensor, op: LinearOperator, step: Step) -> tuple[Tensor, LinearOperator]:
        """A linear node behind batch norm and ReLU as a node behind a threshold ReLU, with the norm merged into it."""
        normed: Normed | None = self._mark(x).normed
        same_axis = op.kind == "convolution" or x.dim() == 2  # the norm's channels are those of the node
        if self.preset.pre_activation == "diagonal" or normed is None or not same_axis:
            return x, op
        if op.kind not in ("convolution", "dense") or isinstance(op, Contraction):
            return x, op
        step.note = f"merged with {'' if normed.active is None else 'ReLU and '}batch norm {normed.step.name} before it"
        normed.step.rule, normed.step.note = "-", f"merged into {step.name}"
        inner = self._enter(normed.x)
        mark = self._mark(inner)
        if normed.active is None:
            return inner, op.after(normed.scale, normed.shift, x)
        # Channels that the norm makes constants have no threshold: they are relu(shift).
        dead = normed.scale.abs() <= torch.finfo(x.dtype).tiny ** 0.5
        scale, shift = normed.scale.masked_fill(dead, 0), torch.where(dead, normed.shift.relu(), normed.shift)
        merged = op.after(scale, shift, x)
        shape = [1, -1, *[1] * (x.dim() - 2)]
        scale, shift = scale.reshape(shape), shift.reshape(shape)
        absorb, passes = self._absorber(mark.samples), self.preset.pre_activation == "threshold"
        value = Threshold.apply(inner, normed.active, scale, shift, normed.step.name, absorb, passes)
        return self.marks.put(value, Mark(False, mark.linear, samples=mark.samples)), merged

    def _linear_node(
        self,
        function: str,
        x: Tensor,
        op: LinearOperator,
        weight: Tensor,
        compute: Callable[[Tensor], Tensor],
    ) -> Tensor:
        mark = self._mark(x)
        step = self._step(self.names.get(id(weight), function), function, op.kind)
        before, op = self._before_norm(x, op, step)
        if before is not x:
            with torch.no_grad():
                value = compute(x)
            x, mark = before, self._mark(before)
            y = self._apply(x, mark, op, step, lambda _: value)
        else:
            y = self._apply(x, mark, op, step, compute)
        known = self._mark(y)
        # A diagonal node keeps no source: a second batch norm on it stays a node of its own.
        known.source = None if op.kind == "batch_norm" else Source(x, mark, op, step)
        return y

    def _apply(
        self, x: Tensor, mark: Mark, op: LinearOperator, step: Step, compute: Callable[[Tensor], Tensor]
    ) -> Tensor:
        if self.region is not None or id(step) in self.even_steps:
            return self._even_node(x, mark, op, step, compute)
        is_input = not mark.linear
        rule = self.preset.rule_for(op.kind, is_input, step.name)
        rule.check_place(mark.raw, step.name)
        step.rule = rule.label + (" at the input" if is_input else "")
        node = LinearNode(
            step.name, op, rule, mark.raw, mark.nonnegative, mark.bounds, self.absorb, self.scratch, mark.samples
        )
        y: Tensor = Linear.apply(x, compute, node)
        samples = after_computing(y.shape, [(x.shape, mark.samples)])
        self.marks.put(y, Mark(raw=False, linear=True, samples=samples, node=node))
        if step.name in self.keep:
            self.outputs.setdefault(step.name, y)
            node.held = True
        return y

    def _even_node(
        self, x: Tensor, mark: Mark, op: LinearOperator, step: Step, compute: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """A linear call in the even region; a batch norm merged into it may come when the region is over."""
        rule = self.region or self.even_steps[id(step)]
        self.even_steps[id(step)] = rule
        step.rule = f"{rule.label} until {self.border}"
        node = LinearNode(step.name, op, rule, True, mark.nonnegative, mark.bounds, self.absorb, self.scratch)
        y: Tensor = EvenLinear.apply(x, compute, node)
        self.marks.put(y, Mark(raw=True, linear=True))
        if step.name in self.keep:
            self.outputs.setdefault(step.name, y)
        self.end_region(step.name)
        return y
