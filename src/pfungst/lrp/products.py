"""Handlers of functions in which two values of the input meet: products, gates, attention, quotients.

Relevance of a product a · b of two activations is shared: half each keeps its sum, since each factor times its
gradient is the product (Achtibat et al. 2024, proposition 3.3).  Where one factor is a gate (a sigmoid's or softmax'
result) the preset may give all to the other (Arras et al. 2017; for attention: Ali et al. 2022).
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pfungst.errors import RelevanceError
from pfungst.lrp.calls import as_list, bound
from pfungst.lrp.even import EvenHandlers
from pfungst.lrp.functions import Entry
from pfungst.lrp.gradients import Meter, Product, Replaced, Share
from pfungst.lrp.handlers import QUOTIENTS
from pfungst.lrp.marks import map_tensors
from pfungst.lrp.samples import after_computing

# Positions of the factors of a product; what else a call has is added to it.
_FACTORS = {"addmm": (1, 2), "baddbmm": (1, 2), "addbmm": (1, 2), "addmv": (1, 2), "addcmul": (1, 2)}


class ProductHandlers(EvenHandlers):
    """Products of values that both depend on the input; products with constant weights go to the linear nodes."""

    def _linear_product(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """A product with constant weights: a linear node (see ``nodes.py``)."""
        raise NotImplementedError

    def _product(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        """Matrix products of every kind."""
        if name == "rmatmul":
            func, name, args = torch.matmul, "matmul", (args[1], args[0])
        if name == "linear":
            given = bound(func, args, kwargs, ("input", "weight", "bias"))
            args, kwargs = (given["input"], given["weight"], given.get("bias")), {}
        factors = self._factors(name, args)
        carried = [f for f in factors if self.marks.get(f) is not None]
        others = [t for t in self._marked((args, kwargs)) if not any(t is f for f in factors)]
        if len(carried) == 1 and not others:
            return self._linear_product(func, name, args, kwargs)
        if name == "linear" and self.preset.gates == "all" and self.marks.get(args[0]) is not None and not others:
            # Weights made from the input choose what is done to it: all goes to what they are applied to.
            return self._linear_product(func, name, (args[0], args[1].detach(), args[2]), kwargs)
        return self._shared(func, name, args, kwargs, factors, self.preset.attention == "constant")

    def _factors(self, name: str, args: Any) -> list[Tensor]:
        if name == "einsum":
            operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
            return [t for t in operands if isinstance(t, Tensor)]
        return [args[i] for i in _FACTORS.get(name, (0, 1)) if isinstance(args[i], Tensor)]

    def _shared(self, func: Any, name: str, args: Any, kwargs: Any, factors: list[Tensor], take_all: bool) -> Any:
        """A function linear in each of its factors: equal shares, or nothing for the gates among them."""
        carried = [f for f in factors if self.marks.get(f) is not None]
        gates = [f for f in carried if self._mark(f).gate]
        if not take_all or len(gates) == len(carried):
            gates = []
        share = 1 / max(1, len(carried) - len(gates))
        inputs = [self._enter(t) for t in self._marked((args, kwargs))]
        others = len(inputs) > len(carried) or len(args) > len(factors) + (name == "einsum")
        step = self._step(name, name, note="all to the signal" if gates else f"{share:.2g} of the relevance each")

        def change(tensor: Tensor) -> Tensor:
            mark = self.marks.get(tensor)
            if mark is None:
                return tensor
            if any(tensor is g for g in gates):
                return tensor.detach()
            entered = self._enter(tensor)
            if others:
                entered = Meter.apply(entered, -1, step.name, self._absorber(mark.samples))
            return Share.apply(entered, share) if share < 1 and any(tensor is f for f in carried) else entered

        result = func(*map_tensors(args, change), **map_tensors(kwargs, change))
        samples = after_computing(result.shape, [(t.shape, self._mark(t).samples) for t in inputs])
        if others:
            result = Meter.apply(result, 1, step.name, self._absorber(samples))
        return self._finish(result, inputs, Entry("product"), raw=False, samples=[samples])

    def _scale(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        """a · b and a / b, entry by entry."""
        if kwargs.get("rounding_mode") is not None:
            raise self._unknown(name, "rounds its result; it has no rule")
        carried = self._marked((args, kwargs))
        if len(carried) < 2:
            return super()._scale(func, name, entry, args, kwargs)
        a, b = (self._enter(t) for t in carried)
        if name in QUOTIENTS:
            self._step(name, name, note="the divisor is a constant")
            return self._finish(func(a, b.detach()), [a], Entry("scale"), raw=False)
        inverse = self._mark(a).inverse, self._mark(b).inverse
        if inverse[0] != inverse[1]:
            self._step(name, name, note="the divisor is a constant")
            signal = b if inverse[0] else a
            a, b = (a.detach(), b) if inverse[0] else (a, b.detach())
            return self._finish(func(a, b), [signal], Entry("scale"), raw=False)
        gates = self._mark(a).gate, self._mark(b).gate
        rule = self.preset.gates if gates[0] != gates[1] else "half"
        self._step(name, name, note="all to the signal" if rule == "all" else f"shared: {rule}")
        if rule == "half":
            result = func(Share.apply(a, 0.5), Share.apply(b, 0.5))
        elif rule == "all":
            result = func(a.detach() if gates[0] else a, b.detach() if gates[1] else b)
        else:
            result = Product.apply(a, b, rule) if gates[0] else Product.apply(b, a, rule)
        return self._finish(result, [a, b], Entry("product", "keeps"), raw=False)

    def _combination(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        """addcmul, addcdiv, lerp."""
        if name == "addcmul":
            return self._shared(func, name, args, kwargs, self._factors(name, args), self.preset.gates == "all")
        weight = args[2]  # the divisor, or how far one goes from the first to the second
        if isinstance(weight, Tensor) and self.marks.get(weight) is not None:
            args = (*args[:2], weight.detach(), *args[3:])
        return self._balanced(func, name, entry, args, kwargs)

    def _glu(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        given = bound(func, args, kwargs, ("input", "dim"))
        value = func(*args, **kwargs).detach()
        signal, gate = self._call(torch.chunk, args[0], 2, given.get("dim", -1))
        opened = self._call(torch.mul, signal, self._call(torch.sigmoid, gate))
        return self._finish(Replaced.apply(opened, value), [opened], Entry("glu", "keeps"), raw=False)

    def _call(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One more torch function, with its rule."""
        return self.__torch_function__(func, (), args, kwargs)

    def _open(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        """A function written in Python: the torch functions that it calls come here one by one."""
        with self:
            return _undispatched(func)(*args, **kwargs)

    def _attention(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        """softmax(q kᵀ / √d) v in one call, by its own derivative with other shares.

        AttnLRP: half of the relevance goes to v, the rest through the softmax, again half to q and half to k.
        """
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        given = bound(func, args, kwargs, names)
        # A mask that asks for gradients would make torch choose another kernel, with other rounding.
        for word, value in given.items():
            if isinstance(value, Tensor) and self.marks.get(value) is None:
                given[word] = value.detach()
        if given.get("dropout_p", 0.0) > 0:
            raise RelevanceError("attention has dropout, so relevance would be random", "call model.eval() first")
        shares = self._attention_shares(given)
        attends = shares["value"] < 1
        step = self._step(name, name, note="AttnLRP" if attends else "attention is constant")
        inputs = []
        for word, share in shares.items():
            x = given.get(word)
            if not isinstance(x, Tensor) or self.marks.get(x) is None:
                continue
            if share == 0:
                given[word] = x.detach()
                continue
            given[word] = entered = self._enter(x)
            inputs.append(entered)
            if attends:
                metered = Meter.apply(entered, -1, step.name, self._absorber(self._mark(x).samples))
                given[word] = Share.apply(metered, share)
        first = inputs[0]
        result, *rest = as_list(func(**given))
        mask = given.get("attn_mask")
        if isinstance(mask, Tensor) and mask.requires_grad:  # the same: another kernel
            with torch.no_grad():
                plain, *_ = as_list(func(**map_tensors(given, Tensor.detach)))
            result = Replaced.apply(result, plain)
        samples = after_computing(result.shape, [(first.shape, self._mark(first).samples)])
        if attends:
            result = Meter.apply(result, 1, step.name, self._absorber(samples))
        result = self._finish(result, inputs, Entry("attention"), raw=False, samples=[samples])
        return (result, *rest) if rest else result

    def _attention_shares(self, given: dict[str, Any]) -> dict[str, float]:
        """What each operand gets, as the products in it would share: a constant operand leaves its half to the other.

        The query of attention pooling is learnt, for example; what its keys get is not halved then.
        """
        words = ("query", "key", "value", "attn_mask")
        carried = {w: isinstance(given.get(w), Tensor) and self.marks.get(given[w]) is not None for w in words}
        attends = carried["query"] or carried["key"] or carried["attn_mask"]
        if carried["value"]:
            attends = attends and self.preset.attention != "constant"
        to_value = 0.0 if not carried["value"] else 0.5 if attends else 1.0
        to_scores = 1 - to_value
        each = to_scores / 2 if carried["query"] and carried["key"] else to_scores
        return {"query": each, "key": each, "value": to_value, "attn_mask": to_scores}


@lru_cache(maxsize=64)
def _undispatched(func: Callable[..., Any]) -> Callable[..., Any]:
    """The same Python function, but its body runs at once instead of being handed to overrides of itself."""

    def no(*_: Any) -> bool:
        return False

    names = {name: no for name in func.__globals__ if name.startswith("has_torch_function")}
    body = types.FunctionType(func.__code__, {**func.__globals__, **names}, func.__name__, func.__defaults__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body
