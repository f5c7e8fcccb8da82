"""Handlers of the functions that move, add, scale or bend values, one entry at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pfungst.errors import RelevanceError
from pfungst.lrp.calls import as_function_of, bound, is_nonnegative, other_operand
from pfungst.lrp.functions import Entry
from pfungst.lrp.gradients import Constant, Elementwise, Preprocessing
from pfungst.lrp.interception import Dispatch
from pfungst.lrp.marks import Mark, map_tensors


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
        given = bound(func, args, kwargs, ("input", "pad", "value") if name == "constant_pad_nd" else ())
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
        padded = Constant.apply(result, part, step.name, self.absorb)
        nonnegative = mark.nonnegative and value >= 0
        return self.marks.put(padded, Mark(mark.raw, mark.linear, nonnegative, mark.bounds))

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
        part = compute(torch.zeros_like(x)).detach().expand(out.shape)
        step = self._step(name, name, note="the constant summand absorbs its part")
        result = Constant.apply(out, part, step.name, self.absorb)
        return self._finish(result, [x_entered], Entry("add", "keeps" if keeps else "unknown"), raw=False)

    def _scale(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        inputs = self._marked((args, kwargs))
        if len(inputs) > 1:
            raise self._unknown(name, "multiplies or divides two values that both depend on the input; it has no rule")
        (x,) = inputs
        if name in ("div", "divide", "true_divide"):
            if args[0] is not x:
                raise self._unknown(name, "divides by a value that depends on the input; it has no rule")
            if kwargs.get("rounding_mode") is not None:
                raise self._unknown(name, "rounds its result; it has no rule")
        constant = other_operand(x, args, kwargs, 1)
        compute = as_function_of(x, func, args, kwargs)
        keeps = name not in ("neg", "negative") and is_nonnegative(constant)
        plain = self._preprocessing(x, compute, keeps)
        if plain is not None:
            return plain
        x = self._enter(x)
        kind = Entry("scale", "keeps" if keeps else "unknown")
        return self._finish(func(*map_tensors(args, self._enter), **map_tensors(kwargs, self._enter)), [x], kind, False)

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
        return self.marks.put(result, Mark(True, mark.linear, mark.nonnegative and keeps, bounds))

    def _elementwise(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        if len(self._marked((args, kwargs))) > 1:
            raise self._unknown(name, "takes several values that depend on the input; it has no rule")
        x = self._enter(args[0])
        step = self._step(name, name)
        result = Elementwise.apply(x, lambda value: func(value, *args[1:], **kwargs), step.name, self.absorb)
        return self._finish(result, [x], entry, raw=False)

    def _assign(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        """x[index] = value and x.copy_(value), out of place."""
        target, value = self._enter(args[0]), args[-1] if name == "setitem" else args[1]
        if isinstance(value, Tensor):
            value = self._enter(value)

        def assigned(base: Tensor, new: Any) -> Tensor:
            if name == "copy":
                return new.to(base.dtype).expand(base.shape).clone()
            result = base.clone()
            result[args[1]] = new
            return result

        def constant(tensor: Any) -> Any:
            return torch.zeros_like(tensor) if isinstance(tensor, Tensor) and self.marks.get(tensor) else tensor

        inputs = self._marked((target, value))
        result = assigned(target, value)
        step = self._step(name, name)
        part = assigned(constant(target), constant(value)).detach()
        return self._finish(Constant.apply(result, part, step.name, self.absorb), inputs, Entry("assign"), raw=False)
