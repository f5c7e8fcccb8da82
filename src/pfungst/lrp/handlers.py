"""One forward pass of the untouched model under interception: every torch function goes through here."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pfungst.errors import RelevanceError, UnknownFunction
from pfungst.lrp.functions import TABLE, Entry, plain_name
from pfungst.lrp.gradients import Constant, Elementwise, Enter, Linear, LinearNode, Preprocessing
from pfungst.lrp.marks import Mark, Marks, map_tensors
from pfungst.lrp.operators import Convolution, Dense, Diagonal, LinearOperator
from pfungst.lrp.plan import Step
from pfungst.lrp.presets import Preset

# Functions through which Python reads a value; what the model does with it is a constant to us, and plan says so.
_READS = {"item", "tolist", "numpy", "__array__", "__float__", "__int__"}


@dataclass
class Source:
    """The linear call that made a tensor: enough to do it again with a batch norm merged in."""

    x: Tensor
    mark: Mark
    op: LinearOperator
    step: Step


class Interception(TorchFunctionMode):
    """Runs the model's torch functions with the backward passes of the table; collects marks, steps and ledger."""

    def __init__(
        self, preset: Preset, names: dict[int, str], on_unknown: str, batch: int, locate: bool
    ) -> None:
        super().__init__()
        self.preset, self.names, self.on_unknown, self.batch, self.locate = (
            preset,
            names,
            on_unknown,
            batch,
            locate,
        )
        self.marks = Marks()
        self.steps: list[Step] = []
        self.outputs: dict[str, Tensor] = {}  # node name -> its output, kept for the layers asked for
        self.keep: frozenset[str] = frozenset()
        self.ledger: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    # ---- entry point -------------------------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        found: list[Tensor] = []

        def current(tensor: Tensor) -> Tensor:
            if self.marks.get(tensor) is None:
                return tensor
            found.append(tensor)
            return self.marks.current(tensor)

        first = args[0] if args else None
        args, kwargs = map_tensors(args, current), map_tensors(kwargs, current)
        if not found:
            return func(*args, **kwargs)
        name, in_place = plain_name(func)
        entry = TABLE.get(name)
        if entry is None or getattr(func, "namespace", "aten") not in ("aten", "prim", "prims"):
            return self._without_row(func, name, in_place, args, kwargs)
        if name not in ("setitem", "copy"):
            func, args, kwargs, asked = _out_of_place(func, name, in_place, args, kwargs)
            in_place = in_place or asked
        with torch.enable_grad():
            result = getattr(self, f"_{entry.handler}")(func, name, entry, args, kwargs)
        if in_place and isinstance(first, Tensor):
            self.marks.replace(first, result, f"{name}_")
            return None if name == "setitem" else first
        return result

    def output(self, tensor: Tensor) -> Tensor:
        """The model's output as the backward pass starts from it."""
        tensor = self.marks.current(tensor)
        mark = self.marks.get(tensor)
        if mark is None or not tensor.requires_grad:
            raise RelevanceError(
                "the model's output does not depend on the input through torch functions: the graph is in pieces",
                "look for .numpy(), .item(), torch.tensor(x) or a cache in the model's forward",
            )
        with torch.enable_grad():
            return Enter.apply(tensor) if mark.raw else tensor

    def absorb(self, name: str, relevance: Tensor) -> None:
        """Add what a node absorbed (any shape, samples in the leading axis) to the ledger, per sample in float64."""
        if relevance.numel() % self.batch:
            total = relevance.sum(dtype=torch.float64).expand(self.batch) / self.batch
        else:
            total = relevance.reshape(self.batch, -1).sum(1, dtype=torch.float64)
        self.ledger[name] = self.ledger[name] + total if name in self.ledger else total

    # ---- small steps that several handlers share ---------------------------------------------------------------

    def _mark(self, tensor: Tensor) -> Mark:
        mark = self.marks.get(tensor)
        if mark is None:
            raise KeyError("tensor without a mark")
        return mark

    def _marked(self, values: Any) -> list[Tensor]:
        found: list[Tensor] = []
        map_tensors(values, lambda t: found.append(t) if self.marks.get(t) is not None else None)
        return found

    def _enter(self, tensor: Tensor) -> Tensor:
        """A tensor whose gradient carries c: itself, or raw values taken over the border."""
        mark = self.marks.get(tensor)
        if mark is None or not mark.raw:
            return tensor
        return self.marks.put(Enter.apply(tensor), Mark(False, mark.linear, mark.nonnegative))

    def _step(self, name: str, function: str, kind: str = "", rule: str = "", note: str = "") -> Step:
        count = self._counts[name] = self._counts.get(name, 0) + 1
        unique = name if count == 1 else f"{name}:{count}"
        step = Step(unique, function, kind, rule, note, _where() if self.locate else "")
        self.steps.append(step)
        return step

    def _finish(self, result: Any, inputs: Sequence[Tensor], entry: Entry, raw: bool) -> Any:
        """Mark every floating-point tensor of a result."""
        marks = [self._mark(tensor) for tensor in inputs]
        linear = any(mark.linear for mark in marks)
        nonnegative = entry.sign == "nonnegative" or (
            entry.sign == "keeps" and all(mark.nonnegative for mark in marks)
        )

        def mark(tensor: Tensor) -> Tensor:
            if self.marks.get(tensor) is None and tensor.is_floating_point():
                self.marks.put(tensor, Mark(raw, linear, nonnegative))
            return tensor

        map_tensors(result, mark)
        return result

    def _without_row(
        self,
        func: Callable[..., Any],
        name: str,
        in_place: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A function that is not in the table: harmless if no floating-point tensor comes out."""
        if not in_place:
            with torch.no_grad():
                result = func(*args, **kwargs)
            floats: list[Tensor] = []
            map_tensors(result, lambda t: floats.append(t) if t.is_floating_point() else None)
            if not floats:
                if name in _READS:
                    self._step(name, name, note="read by Python; a constant from there on")
                return result
            if self.on_unknown == "gradient":
                return self._gradient_unknown(func, name, args, kwargs)
        raise self._unknown(name, "has no relevance rule")

    def _gradient_unknown(self, func: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
        with torch.enable_grad():
            args, kwargs = map_tensors((args, kwargs), self._enter)
            self._step(name, name, note="UNKNOWN: plain gradient, as accepted by on_unknown='gradient'")
            return self._finish(
                func(*args, **kwargs), self._marked((args, kwargs)), Entry("gradient"), raw=False
            )

    def _unknown(self, name: str, why: str) -> UnknownFunction:
        return UnknownFunction(
            f"torch function {name!r} {why} (called at {_where() or 'an unknown place'})",
            "on_unknown='gradient' takes the plain gradient there, and the plan then says so; "
            "for a softmax or another normalisation at the end of the model, explain the values before it",
        )

    # ---- handlers, one for each word in the table's second column ----------------------------------------------

    def _gradient(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        inputs = self._marked((args, kwargs))
        constants = name in _JOINS and any(self.marks.get(t) is None for t in args[0])
        raw = entry.moves and not constants and all(self._mark(t).raw for t in inputs)
        if not raw:
            args, kwargs = map_tensors((args, kwargs), self._enter)
            inputs = self._marked((args, kwargs))
        result = func(*args, **kwargs)
        if any(result is tensor for tensor in inputs):
            return result
        if constants:
            zeroed = [torch.zeros_like(t) if self.marks.get(t) is not None else t for t in args[0]]
            step = self._step(name, name)
            result = Constant.apply(
                result, func(zeroed, *args[1:], **kwargs).detach(), step.name, self.absorb
            )
        result = self._finish(result, inputs, entry, raw)
        if raw:
            self._move_bounds(result, inputs, func, args, kwargs)
        return result

    def _move_bounds(self, result: Any, inputs: list[Tensor], func: Any, args: Any, kwargs: Any) -> None:
        if not isinstance(result, Tensor) or any(self._mark(t).bounds is None for t in inputs):
            return

        def bound(which: int) -> Tensor:
            def swap(tensor: Tensor) -> Tensor:
                mark = self.marks.get(tensor)
                return tensor if mark is None or mark.bounds is None else mark.bounds[which]

            with torch.no_grad():
                moved: Tensor = func(*map_tensors(args, swap), **map_tensors(kwargs, swap))
            return moved

        low, high = bound(0), bound(1)
        self._mark(result).bounds = (torch.minimum(low, high), torch.maximum(low, high))

    def _identity(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        # detach() and .data cut derivatives, not the flow of values: relevance goes through.
        return self._gradient(lambda x: x.view_as(x), name, entry, (args[0],), {})

    def _dropout(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        bound = _bind(func, args, kwargs)
        training = bound.get(
            "training", bound.get("train", args[2] if len(args) > 2 else kwargs.get("train", False))
        )
        if training and float(bound.get("p", args[1] if len(args) > 1 else 0.5)) > 0:
            raise RelevanceError(
                "the model is in training mode: dropout would be random", "call model.eval() first"
            )
        return self._identity(func, name, entry, args, kwargs)

    def _padding(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        bound = _bind(func, args, kwargs)
        if bound.get("mode", "constant") != "constant":
            return self._gradient(func, name, entry, args, kwargs)
        x = args[0]
        raw = self._mark(x).raw
        value = bound.get("value") or 0
        result = self._gradient(func, name, entry, args, kwargs)
        mark = self._mark(result)
        if not raw and not value:
            return result
        with torch.no_grad():
            # In the raw region it is R itself that falls on the padding; later on it is c times the padded value.
            part = func(torch.zeros_like(x), *args[1:], **kwargs)
            if raw:
                zero_padded = {**kwargs, "value": 0.0} if "value" in kwargs else kwargs
                part = 1 - func(
                    torch.ones_like(x), *args[1:3], **{k: v for k, v in zero_padded.items() if k != "value"}
                )
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
        constant = next((v for v in (*args, kwargs.get("other")) if v is not x and v is not None), 0)

        def compute(value: Tensor) -> Tensor:
            swap = {id(x): value}
            result: Tensor = func(
                *[swap.get(id(v), v) for v in args], **{k: swap.get(id(v), v) for k, v in kwargs.items()}
            )
            return result

        keeps = name == "add" and _nonnegative(constant) and kwargs.get("alpha", 1) >= 0
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
            raise self._unknown(
                name, "multiplies or divides two values that both depend on the input; it has no rule"
            )
        (x,) = inputs
        if name in ("div", "divide", "true_divide") and args[0] is not x:
            raise self._unknown(name, "divides by a value that depends on the input; it has no rule")
        constant = next((v for v in (*args, kwargs.get("other")) if v is not x and v is not None), 1)

        def compute(value: Tensor) -> Tensor:
            swap = {id(x): value}
            result: Tensor = func(
                *[swap.get(id(v), v) for v in args], **{k: swap.get(id(v), v) for k, v in kwargs.items()}
            )
            return result

        keeps = name not in ("neg", "negative") and _nonnegative(constant)
        plain = self._preprocessing(x, compute, keeps)
        if plain is not None:
            return plain
        x = self._enter(x)
        kind = Entry("scale", "keeps" if keeps else "unknown")
        return self._finish(
            func(*map_tensors(args, self._enter), **map_tensors(kwargs, self._enter)), [x], kind, False
        )

    def _preprocessing(self, x: Tensor, compute: Callable[[Tensor], Tensor], keeps: bool) -> Tensor | None:
        """Arithmetic with a constant on raw values, where R passes unchanged; None if that is not the case."""
        mark = self._mark(x)
        if not mark.raw:
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
            return (
                torch.zeros_like(tensor) if isinstance(tensor, Tensor) and self.marks.get(tensor) else tensor
            )

        inputs = self._marked((target, value))
        result = assigned(target, value)
        step = self._step(name, name)
        part = assigned(constant(target), constant(value)).detach()
        return self._finish(
            Constant.apply(result, part, step.name, self.absorb), inputs, Entry("assign"), raw=False
        )

    # ---- linear nodes ------------------------------------------------------------------------------------------

    def _convolution(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        fields = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = {**dict(zip(fields, args, strict=False)), **kwargs}
        x, weight = given["input"], given["weight"]
        self._check_constant(name, weight, given.get("bias"))
        dims = weight.dim() - 2
        dilation = _tuple(given.get("dilation", 1), dims)
        padding = given.get("padding", 0)
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            if any(t % 2 for t in total):
                # torch pads the odd one at the end; as a separate step the operator stays symmetric.
                ends = [end for t in reversed(total) for end in (t // 2, t - t // 2)]
                x = self._padding(functional.pad, "pad", TABLE["pad"], (x, ends), {})
                return self._convolution(func, name, entry, (), {**given, "input": x, "padding": 0})
            padding = [t // 2 for t in total]
        op = Convolution(
            weight.detach(),
            None if given.get("bias") is None else given["bias"].detach().reshape(1, -1, *[1] * dims),
            stride=_tuple(given.get("stride", 1), dims),
            padding=_tuple(0 if padding == "valid" else padding, dims),
            dilation=dilation,
            output_padding=(0,) * dims,
            groups=given.get("groups", 1),
        )
        rest = {key: value for key, value in given.items() if key != "input"}
        return self._linear_node(name, x, op, weight, lambda value: func(value, **rest) if kwargs or not args
                                 else func(value, *args[1:]))  # fmt: skip

    def _transposed_convolution(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        fields = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
        given = {**dict(zip(fields, args, strict=False)), **kwargs}
        x, weight, bias = given["input"], given["weight"], given.get("bias")
        self._check_constant(name, weight, bias)
        dims = weight.dim() - 2
        op = Convolution(
            weight.detach(),
            None if bias is None else bias.detach().reshape(1, -1, *[1] * dims),
            stride=_tuple(given.get("stride", 1), dims),
            padding=_tuple(given.get("padding", 0), dims),
            dilation=_tuple(given.get("dilation", 1), dims),
            transposed=True,
            output_padding=_tuple(given.get("output_padding", 0), dims),
            groups=given.get("groups", 1),
        )
        return self._linear_node(name, x, op, weight, lambda v: func(v, *args[1:], **kwargs))

    def _dense(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        """F.linear, and matrix products whose second factor is a constant matrix."""
        if name == "linear":
            given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
            x, weight, bias = given["input"], given["weight"], given.get("bias")
            self._check_constant(name, weight, bias)
            op = Dense(weight.detach(), None if bias is None else bias.detach())
            return self._linear_node(name, x, op, weight, lambda v: func(v, weight, bias))
        bias, x, weight = (args[0], args[1], args[2]) if name == "addmm" else (None, args[0], args[1])
        self._check_constant(name, weight, bias)
        if weight.dim() != 2 or kwargs:
            raise self._unknown(
                name, "with a constant that is not one matrix, or with beta/alpha, has no rule"
            )
        op = Dense(weight.detach().t(), None if bias is None else bias.detach())
        compute = (lambda v: func(bias, v, weight)) if name == "addmm" else (lambda v: func(v, weight))
        return self._linear_node(name, x, op, weight, compute)

    def _batch_norm(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        fields = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        if func is not functional.batch_norm:  # torch.batch_norm and aten order their arguments otherwise
            fields = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
        given = {**dict(zip(fields, args, strict=False)), **kwargs}
        x, mean, variance = given["input"], given["running_mean"], given["running_var"]
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
            value = func(*args, **kwargs)  # the model's own value; below only the backward pass is ours
        parameter = weight if weight is not None else mean
        source = self._mark(x).source
        if source is not None:
            source.step.note = f"merged with batch norm {self.names.get(id(parameter), '')}".rstrip()
            return self._merged(name, source, source.op.merged(scale, shift), x, value)
        shape = [1, -1, *[1] * (x.dim() - 2)]
        op = Diagonal(scale.reshape(shape), shift.reshape(shape))
        return self._linear_node(name, x, op, parameter, lambda _: value)

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

    def _merged(
        self, function: str, source: Source, op: LinearOperator, before: Tensor, value: Tensor
    ) -> Tensor:
        y = self._apply(source.x, source.mark, op, source.step, lambda _: value)
        self._mark(before).current = None  # the unmerged output stays usable as itself
        return y

    def _apply(
        self, x: Tensor, mark: Mark, op: LinearOperator, step: Step, compute: Callable[[Tensor], Tensor]
    ) -> Tensor:
        is_input = not mark.linear
        rule = self.preset.rule_for(op.kind, is_input, step.name)
        if rule.carries_relevance and not mark.raw:
            raise RelevanceError(
                f"rule {rule.label} at node {step.name!r}: it gives relevance to inputs that are zero, "
                "which only the input layer can hand on",
                "use it at position 'input' only, and let the model do no arithmetic but normalisation before it",
            )
        step.rule = rule.label + (" at the input" if is_input else "")
        node = LinearNode(step.name, op, rule, mark.raw, mark.nonnegative, mark.bounds, self.absorb)
        y: Tensor = Linear.apply(x, compute, node)
        self.marks.put(y, Mark(raw=False, linear=True))
        if step.name in self.keep:
            self.outputs[step.name] = y
        return y


_JOINS = {"cat", "concat", "concatenate", "stack", "hstack", "vstack"}


def _nonnegative(value: Any) -> bool:
    """A constant operand whose entries are all >= 0."""
    if isinstance(value, Tensor):
        return bool((value >= 0).all())
    return isinstance(value, int | float) and value >= 0


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list | tuple | torch.Size) else (value,)
    return tuple(int(v) for v in (values * dims if len(values) == 1 else values))


@lru_cache(maxsize=256)
def _signature(func: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(func)
    except (TypeError, ValueError):  # built in
        return None


def _bind(func: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by name, as far as the function has a signature."""
    signature = _signature(func)
    if signature is None:
        return dict(kwargs)
    return dict(signature.bind(*args, **kwargs).arguments)


def _out_of_place(
    func: Callable[..., Any], name: str, in_place: bool, args: Any, kwargs: Any
) -> tuple[Callable[..., Any], Any, Any, bool]:
    """The same call without its in-place effect, and whether ``inplace=True`` was among its arguments."""
    if in_place:
        packet = getattr(func, "overloadpacket", None)
        if packet is not None:
            plain = getattr(getattr(torch.ops.aten, name), func._overloadname)  # type: ignore[attr-defined]
        else:
            owners = [o for o in (torch.Tensor, functional, torch) if hasattr(o, name)]
            plain = getattr(owners[0], name)
        return plain, args, kwargs, True
    signature = _signature(func)
    if signature is None or "inplace" not in signature.parameters:
        return func, args, kwargs, False
    bound = signature.bind(*args, **kwargs)
    asked = bool(bound.arguments.get("inplace", False))
    bound.arguments["inplace"] = False
    return func, bound.args, bound.kwargs, asked


def _where() -> str:
    """File and line of the model's own code that made the present call."""
    frame = sys._getframe(1)
    here, library = (f.rsplit("/", 1)[0] + "/" for f in (__file__, torch.__file__))
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((here, library, "<")):
            return f"{file.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
