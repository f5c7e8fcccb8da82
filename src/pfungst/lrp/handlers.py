"""Handlers of the functions that move, add, scale or bend values, one entry at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pfungst.errors import RelevanceError
from pfungst.lrp.calls import as_function_of, as_list, bound, is_nonnegative, other_operand, padding_of
from pfungst.lrp.functions import Entry
from pfungst.lrp.gradients import Constant, Elementwise, Meter, Preprocessing, Share
from pfungst.lrp.interception import Dispatch
from pfungst.lrp.marks import map_tensors
from pfungst.lrp.pools import Proportional, average_of
from pfungst.lrp.samples import after_computing

QUOTIENTS = {"div", "divide", "true_divide"}
# Functions whose result is one over their argument, or a constant over it.
_INVERSES = {"rsqrt", "reciprocal", "rdiv", *QUOTIENTS}


class ValueHandlers(Dispatch):
    """One method for each word in the table's second column; linear nodes are in ``nodes.py``."""

    def _identity(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        # detach() and .data cut derivatives, not the flow of values: relevance goes through.
        return self._gradient(lambda x: x.view_as(x), name, entry, (args[0],), {})

    def _constant(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        """Functions that take the shape and type of a tensor, not its values."""
        with torch.no_grad():
            return func(*args, **kwargs)

    def _first(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        """Functions that take the values of their first argument and only the shape or type of the others."""
        if self.marks.get(args[0]) is None:
            return self._constant(func, name, entry, args, kwargs)
        others = map_tensors((args[1:], kwargs), lambda t: t.detach() if self.marks.get(t) else t)
        return self._gradient(func, name, entry, (args[0], *others[0]), others[1])

    def _dropout(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        given = bound(func, args, kwargs, () if hasattr(func, "__code__") else ("input", "p", "train"))
        if given.get("training", given.get("train", False)) and float(given.get("p", 0.5)) > 0:
            raise RelevanceError("the model is in training mode: dropout would be random", "call model.eval() first")
        return self._identity(func, name, entry, args, kwargs)

    def _padding(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        given = padding_of(func, name, args, kwargs)
        result = self._gradient(func, name, entry, args, kwargs)
        mark, x, value = self._mark(result), args[0], given.get("value") or 0
        if given.get("mode", "constant") != "constant" or not (mark.raw or value):
            return result
        with torch.no_grad():
            # In the raw region it is R itself that falls on the padding; later on it is c times the padded value.
            pad = functional.pad
            part = 1 - pad(torch.ones_like(x), given["pad"]) if mark.raw else (
                pad(torch.zeros_like(x), given["pad"], value=value)
            )  # fmt: skip
        step = self._step(name, name, note="padding absorbs its relevance")
        padded = Constant.apply(result, part, step.name, self._absorber(mark.samples))
        return self.marks.put(padded, replace(mark, nonnegative=mark.nonnegative and value >= 0))

    def _add(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        if len(self._marked((args, kwargs))) > 1:
            sums = entry if name == "add" else Entry("add")
            args, kwargs = map_tensors((args, kwargs), self._enter)
            return self._finish(func(*args, **kwargs), self._marked((args, kwargs)), sums, raw=False)
        (x,) = self._marked((args, kwargs))
        constant = other_operand(x, args, kwargs, 0)
        compute = as_function_of(x, func, args, kwargs)
        keeps = name == "add" and is_nonnegative(constant) and kwargs.get("alpha", 1) >= 0
        plain = self._preprocessing(x, compute, keeps)
        if plain is not None:
            return plain
        x_entered = self._enter(x)
        out = compute(x_entered)
        part = compute(x.new_zeros([1] * x.dim())).detach().expand(out.shape)
        step = self._step(name, name, note="the constant summand absorbs its part")
        samples = after_computing(out.shape, [(x.shape, self._mark(x).samples)])
        result = Constant.apply(out, part, step.name, self._absorber(samples))
        # A gate and a constant, such as 1 - g, are still a gate.
        kind = Entry("add", "keeps" if keeps else "unknown", gate=self._mark(x_entered).gate)
        return self._finish(result, [x_entered], kind, raw=False)

    def _scale(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        """A product or quotient with a constant; two values of the input are in ``products.py``."""
        (x,) = self._marked((args, kwargs))
        if name in QUOTIENTS and args[0] is not x:
            return self._elementwise(func, name, Entry("elementwise"), args, kwargs)
        constant = other_operand(x, args, kwargs, 1)
        compute = as_function_of(x, func, args, kwargs)
        keeps = name not in ("neg", "negative") and is_nonnegative(constant)
        plain = self._preprocessing(x, compute, keeps)
        if plain is not None:
            return plain
        entered = self._enter(x)
        return self._finish(compute(entered), [entered], Entry("scale", "keeps" if keeps else "unknown"), False)

    def _preprocessing(self, x: Tensor, compute: Callable[[Tensor], Tensor], keeps: bool) -> Tensor | None:
        """Arithmetic with a constant on raw values, where R passes unchanged; None if that is not the case."""
        mark = self._mark(x)
        if not mark.raw or mark.linear:
            return None
        result = Preprocessing.apply(x, compute)
        if result.shape != x.shape:
            return None
        bounds = None
        if mark.bounds is not None:
            with torch.no_grad():
                ends = compute(mark.bounds[0]), compute(mark.bounds[1])
            bounds = torch.minimum(*ends), torch.maximum(*ends)
        return self.marks.put(result, replace(mark, nonnegative=mark.nonnegative and keeps, gate=False, bounds=bounds))

    def _elementwise(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        x, *others = self._marked((args, kwargs))
        if others:  # a power whose exponent, or a bound that depends on the input, is a constant
            if name not in ("pow", "clamp", "clamp_min", "clamp_max", "clip") or args[0] is not x:
                raise self._unknown(name, "takes several values that depend on the input; it has no rule")
            args, kwargs = map_tensors((args, kwargs), lambda t: t.detach() if any(t is o for o in others) else t)
        mark = self._mark(x)
        entered = self._enter(x)
        step = self._step(name, name)
        compute = as_function_of(x, func, args, kwargs)
        result = Elementwise.apply(entered, compute, step.name, self._absorber(mark.samples))
        result = self._finish(result, [entered], entry, raw=False)
        self._mark(result).inverse = name in _INVERSES or (name == "pow" and _is_negative(args, kwargs))
        return result

    def _balanced(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        """The gradient, and what it does not carry is absorbed: for softmax this is the rule of AttnLRP."""
        args, kwargs = map_tensors((args, kwargs), self._enter)
        inputs = self._marked((args, kwargs))
        step = self._step(name, name)

        def metered(tensor: Tensor) -> Tensor:
            mark = self.marks.get(tensor)
            return tensor if mark is None else Meter.apply(tensor, -1, step.name, self._absorber(mark.samples))

        result = func(*map_tensors(args, metered), **map_tensors(kwargs, metered))
        if not isinstance(result, Tensor):  # as max(x, dim) of values and indices
            return self._finish(result, inputs, entry, raw=False)
        samples = self._one(self._samples(func, name, entry, args, kwargs, result), result, inputs)
        result = Meter.apply(result, 1, step.name, self._absorber(samples))
        return self._finish(result, inputs, entry, raw=False, samples=[samples])

    def _extremum(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        """The greatest of several values: the winner takes all, a constant among them absorbs what it wins."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        constants = any(self.marks.get(tensor) is None for tensor in tensors)
        if constants:
            entry = Entry(entry.handler, "keeps" if name in ("max", "maximum", "fmax") else "unknown")
        return (self._balanced if constants else self._gradient)(func, name, entry, args, kwargs)

    def _instead(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        """Functions that refuse to be part of a graph, by others that do the same."""
        if name == "deepcopy":
            return self._gradient(torch.clone, "clone", entry, args[:1], {})
        return self._gradient(torch.channel_shuffle, "channel_shuffle", entry, args, kwargs)

    def _max_pool(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        if self.preset.max_pool == "winner":
            return self._gradient(func, name, entry, args, kwargs)
        x = self._enter(args[0])
        with torch.no_grad():
            result = func(*args, **kwargs)
        value, *rest = as_list(result)
        self._step(name, name, note="max_pool: proportional")
        y = self._finish(Proportional.apply(x, value, average_of(func, name, args, kwargs)), [x], entry, raw=False)
        return (y, *rest) if rest else y

    def _variance(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        # Homogeneous of degree 2: by Euler's theorem the gradient would carry twice the relevance.
        x = self._enter(args[0])
        half = self.marks.put(Share.apply(x, 0.5), replace(self._mark(x)))
        return self._gradient(func, name, entry, (half, *args[1:]), kwargs)

    def _fill(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        value = args[1] if len(args) > 1 else kwargs.get("value", 0)
        everywhere = torch.ones_like(args[0], dtype=torch.bool)
        return self._gradient(torch.masked_fill, "masked_fill", entry, (args[0], everywhere, value), {})

    def _assign(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        """x[index] = value and x.copy_(value), out of place."""
        target, value = self._enter(args[0]), args[-1] if name == "setitem" else args[1]
        if isinstance(value, Tensor):
            value = self._enter(value)

        def assigned(base: Tensor, new: Any) -> Tensor:
            if name == "copy":
                # The old values stay in the graph, so that relevance of a constant has a way back to the ledger.
                return torch.where(torch.ones_like(base, dtype=torch.bool), new.to(base.dtype), base)
            result = base.clone()
            result[args[1]] = new
            return result

        def constant(tensor: Any) -> Any:
            return torch.zeros_like(tensor) if isinstance(tensor, Tensor) and self.marks.get(tensor) else tensor

        inputs = self._marked((target, value))
        result = assigned(target, value)
        step = self._step(name, name)
        part = assigned(constant(target), constant(value)).detach()
        samples = self._mark(target).samples if self.marks.get(target) is not None else None
        result = Constant.apply(result, part, step.name, self._absorber(samples))
        return self._finish(result, inputs, Entry("assign"), raw=False)


def _is_negative(args: Any, kwargs: Any) -> bool:
    exponent = args[1] if len(args) > 1 else kwargs.get("exponent")
    return isinstance(exponent, int | float) and exponent < 0
