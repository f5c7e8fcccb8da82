"""The even region: from a chosen layer down to the input, relevance is shared by what can reach what, not by values.

Bach et al. 2016 (ICIP), "resolution": at and below the layer every linear node has the rule Flat (or WSquare), so the
map shows where the layer's evidence comes from, in pieces as large as its receptive fields.  In the region the gradient
carries relevance R itself (``Mark.raw``), since units whose value is zero get some too:

- activation functions and arithmetic with constants hand R on; functions that move values move it
- pooling, maximum pooling too, means and interpolation share R evenly among the values in reach
- a sum of n values gives R / n to each

Where the region ends is a matter of time: it holds all calls up to the end of the layer's first call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pfungst.errors import RelevanceError, SettingError
from pfungst.lrp.calls import as_function_of, as_tuple, other_operand
from pfungst.lrp.functions import Entry
from pfungst.lrp.gradients import Absorb, LinearNode, Preprocessing
from pfungst.lrp.handlers import ValueHandlers
from pfungst.lrp.marks import Mark
from pfungst.lrp.operators import Convolution
from pfungst.lrp.rules import LinearCall, Rule, Shared

_ACTIVATIONS = {"relu", "leaky_relu", "prelu", "rrelu", "abs"}
_LINEAR = {"convolution", "any_convolution", "transposed_convolution", "product", "batch_norm"}
_PASSED = {"identity", "constant", "first", "dropout", "padding"}


class Reach(Rule):
    """Not relevance but what can reach what: 1 for every input that a marked output depends on, whatever its value."""

    carries_relevance = True

    def share(self, call: LinearCall, c: Tensor) -> Shared:
        marked = (c * call.y != 0).to(c)
        touched = call.op.transpose(marked, torch.ones_like(call.op.weight), call.x) > 0.5
        return Shared(touched.to(c), None)


class EvenLinear(torch.autograd.Function):
    """A linear call in the region: R comes in and R goes out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, compute: Callable[[Tensor], Tensor], node: LinearNode) -> Tensor:
        y = compute(x)
        ctx.node = node
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        node: LinearNode = ctx.node
        # A rule takes c and y, and R = c y; here R is known, and y may be zero.
        call = LinearCall(node.op, x, torch.ones_like(relevance), node.nonnegative, node.bounds, scratch=node.scratch)
        shared = node.rule.share(call, relevance)
        node.absorb(node.name, shared.absorbed)
        return shared.input, None, None


class Evenly(torch.autograd.Function):
    """A linear function with weights >= 0: the R of each output is shared in proportion to the weights alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, compute: Callable[[Tensor], Tensor], spread: Callable[[Tensor], Tensor], name: str,
        absorb: Absorb,
    ) -> Tensor:  # fmt: skip
        ctx.spread, ctx.name, ctx.absorb = spread, name, absorb
        ctx.save_for_backward(x)
        return compute(x)

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            ones = torch.ones_like(x).requires_grad_()
            total = ctx.spread(ones)
            share = torch.where(total > 0, relevance / total.masked_fill(total <= 0, 1), 0)
            (given,) = torch.autograd.grad(total, ones, share.detach())
        ctx.absorb(ctx.name, torch.where(total > 0, 0, relevance).detach())
        return given, None, None, None, None


class Halves(torch.autograd.Function):
    """The sum of two values: half of R to each."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.shapes = a.shape, b.shape
        return compute(a, b)

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.shapes
        return (relevance / 2).sum_to_size(a), (relevance / 2).sum_to_size(b), None


class EvenHandlers(ValueHandlers):
    """What functions do in the region; outside of it, nothing.

    region   the rule of linear nodes while the region lasts, else None
    border   the layer with whose call it ends
    """

    region: Rule | None = None
    border: str | None = None

    def begin_region(self, border: str | None, rule: Rule | None) -> None:
        """Before the forward pass: the region holds until ``border`` has run; None: there is none."""
        self.border, self.region = border, None if border is None else rule
        self.even_steps: dict[int, Rule] = {}  # id of a step in the region -> its rule

    def end_region(self, name: str) -> None:
        """The call of a layer or linear node is over; the region with it, if it was the one."""
        if name == self.border:
            self.region = None

    def check_region(self) -> None:
        """After the forward pass: the region came to its end."""
        if self.region is not None:
            known = [step.name for step in self.steps if step.kind]
            raise SettingError(
                f"flat until {self.border!r}: no layer of that name ran",
                f"give a module's path as in named_modules(); some nodes: {', '.join(known[:10])}",
            )

    def _handle(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        inputs = self._marked((args, kwargs)) if self.region is not None else []
        if self.region is None or (entry.handler in _LINEAR and len(inputs) == 1):
            return super()._handle(func, name, entry, args, kwargs)
        if all(self._mark(t).raw for t in inputs):
            if entry.handler in _PASSED or (entry.moves and entry.handler == "gradient"):
                return super()._handle(func, name, entry, args, kwargs)
            if len(inputs) == 1:
                return self._even_function(func, name, entry, args, kwargs, inputs[0])
            if entry.handler == "add" and len(inputs) == 2 and len({id(t) for t in inputs}) == 2:
                a, b = inputs
                result = Halves.apply(a, b, lambda u, v: _call_with({id(a): u, id(b): v}, func, args, kwargs))
                return self._even_result(result, inputs, name == "add" and self._nonnegative(inputs))
        raise self._uneven(name)

    def _uneven(self, name: str) -> RelevanceError:
        after = f", after node {self.steps[-1].name!r}" if self.steps else ""
        return RelevanceError(
            f"flat until {self.border!r}: function {name!r}{after} has no even share",
            "choose a layer before it, or another preset",
        )

    def _even_function(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any, x: Tensor) -> Any:
        compute = as_function_of(x, func, args, kwargs)
        nonnegative = entry.sign == "nonnegative" or (entry.sign == "keeps" and self._mark(x).nonnegative)
        if entry.handler == "elementwise" or name in _ACTIVATIONS:
            return self._even_result(Preprocessing.apply(x, compute), [x], nonnegative)
        if entry.handler in ("add", "scale"):
            constant = other_operand(x, args, kwargs, 1)
            result = Preprocessing.apply(x, compute)
            if result.shape != x.shape or (entry.handler == "scale" and args[0] is not x and "div" in name):
                raise self._uneven(name)
            signs = constant if isinstance(constant, Tensor) else torch.as_tensor(constant)
            keeps = name in ("add", "mul", "multiply", "div") and bool((signs >= 0).all())
            return self._even_result(result, [x], keeps and self._mark(x).nonnegative)
        if "max_pool" in name and "adaptive" not in name and not kwargs.get("return_indices"):
            spread = _window(func, name, args, kwargs)
        elif entry.handler == "gradient" and "max" not in name and "amin" not in name:
            spread = compute
        else:
            raise self._uneven(name)
        step = self._step(name, name)
        result = Evenly.apply(x, compute, spread, step.name, self.absorb)
        return self._even_result(result, [x], nonnegative)

    def _nonnegative(self, inputs: list[Tensor]) -> bool:
        return all(self._mark(t).nonnegative for t in inputs)

    def _even_result(self, result: Tensor, inputs: list[Tensor], nonnegative: bool) -> Tensor:
        linear = any(self._mark(t).linear for t in inputs)
        return self.marks.put(result, Mark(raw=True, linear=linear, nonnegative=nonnegative))


def _call_with(values: dict[int, Tensor], func: Any, args: Any, kwargs: Any) -> Tensor:
    result: Tensor = func(*(values.get(id(v), v) for v in args), **{k: values.get(id(v), v) for k, v in kwargs.items()})
    return result


def _window(func: Any, name: str, args: Any, kwargs: Any) -> Callable[[Tensor], Tensor]:
    """The sum over each window of a maximum pooling, in the place of its maximum."""
    fields = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    given = {**dict(zip(fields, args, strict=False)), **kwargs}
    dims = next(d for d in (1, 2, 3) if f"pool{d}d" in name)
    kernel = as_tuple(given["kernel_size"], dims)
    stride = as_tuple(given.get("stride") or kernel, dims)
    padding, dilation = as_tuple(given.get("padding", 0), dims), as_tuple(given.get("dilation", 1), dims)
    x = args[0]
    size = func(*args, **kwargs).shape[2:]
    needed = [(o - 1) * s + d * (k - 1) + 1 for o, s, d, k in zip(size, stride, dilation, kernel, strict=True)]
    extra = tuple(max(0, n - i - 2 * p) for n, i, p in zip(needed, x.shape[2:], padding, strict=True))
    weight = torch.ones(x.shape[1], 1, *kernel, dtype=x.dtype, device=x.device)
    op = Convolution(
        weight, None, stride=stride, padding=padding, dilation=dilation, groups=x.shape[1], extra=extra,
        output_padding=(0,) * dims,
    )  # fmt: skip
    return lambda ones: op.forward(ones, weight)
