"""One forward pass of the untouched model under interception: every torch function goes through here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from pfungst.errors import RelevanceError, UnknownFunction
from pfungst.lrp.calls import bound, out_of_place, padding_of, where
from pfungst.lrp.functions import TABLE, Entry, plain_name
from pfungst.lrp.gradients import Absorb, Constant, Enter
from pfungst.lrp.marks import Mark, Marks, Write, map_tensors, share_memory
from pfungst.lrp.operators import Scratch
from pfungst.lrp.plan import Step
from pfungst.lrp.presets import Preset
from pfungst.lrp.samples import Samples, after_computing, after_moving, compressed, may_permute, per_sample, spread

# Functions through which Python reads a value; what the model does with it is a constant to us, and plan says so.
_READS = {"item", "tolist", "numpy", "__array__", "__float__", "__int__"}
# Functions of several values that are linear in all of them together, some of which may be constants.
_JOINS = {
    "cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "write", "where", "masked_fill",
    "masked_scatter", "scatter", "index_put", "index_copy", "index_fill", "index_add", "scatter_add", "slice_scatter",
    "select_scatter", "fill", "pad_sequence",
}  # fmt: skip
# Those of them that also take numbers.
_WITH_NUMBERS = {"where", "masked_fill", "index_fill", "fill", "scatter"}
# Functions that drop or shorten axes but keep their order.
_REDUCTIONS = {
    "mean", "sum", "amax", "amin", "max", "min", "norm", "vector_norm", "logsumexp", "topk", "prod", "std", "var",
}  # fmt: skip
# Functions that move nothing, listed with those that do.
_CASTS = {"float", "double", "half", "bfloat16", "cuda", "cpu", "to", "type", "type_as", "contiguous", "clone"}
# What a layer asks of its input before it works: no values, so nothing to intercept.
_ASKS = frozenset(
    (
        *(torch.Tensor.dim, torch.Tensor.size, torch.Tensor.numel, torch.Tensor.is_floating_point),
        *(getattr(torch.Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "is_cuda")),
    )
)
_WRITE = Entry("gradient", "keeps", moves=True)  # an in-place write seen through another view of its memory


class Dispatch(TorchFunctionMode):
    """Sends each torch function of the model to its handler; collects marks, steps and the ledger."""

    def __init__(self, preset: Preset, names: dict[int, str], on_unknown: str, batch: int, locate: bool) -> None:
        super().__init__()
        self.preset, self.names, self.on_unknown = preset, names, on_unknown
        self.batch, self.locate = batch, locate
        self.marks = Marks()
        self.steps: list[Step] = []
        self.outputs: dict[str, Tensor] = {}  # node name -> its output, kept for the layers asked for
        self.keep: frozenset[str] = frozenset()
        # Output of a linear call -> what a batch norm merged into it made of it.
        self.merged = WeakTensorKeyDictionary()
        self.ledger: dict[str, Tensor] = {}
        self.scratch = Scratch()
        self.device = torch.device("cpu")
        self.tokens: tuple[str, Tensor] | None = None  # norms of what entered the last layer norm, for the plan
        self.in_place = False  # the call that is handled would change its argument
        self._counts: dict[str, int] = {}

    # ---- entry point -------------------------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _ASKS and not self.marks.views:
            return func(*args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        for first_name in ("input", "tensors", "self"):
            if not args and first_name in kwargs:
                args = (kwargs.pop(first_name),)
        held = args[0] if args else None
        marks = self.marks
        if marks.views:
            args, kwargs = map_tensors(args, marks.reshaped), map_tensors(kwargs, marks.reshaped)
        found: dict[Tensor, Tensor] = {}  # tensors that carry values of the input -> what they hold by now

        def current(tensor: Tensor) -> Tensor:
            value = self.current(tensor) if marks.writes else tensor  # nothing written: all is as the model has it
            mark = marks.get(tensor)
            if mark is not None:
                found[tensor] = value
                mark.uses += 1
                if mark.node is not None and mark.uses > 1 and value is tensor:
                    mark.node.hold(tensor)
            return value

        given = args, kwargs
        args = map_tensors(args, current)
        kwargs = map_tensors(kwargs, current) if kwargs else kwargs
        if not found:
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled():  # its tensors could not be kept for the way back
            with torch.inference_mode(False):
                return self._dispatch(func, args, kwargs, held, given, found)
        return self._dispatch(func, args, kwargs, held, given, found)

    def _dispatch(self, func: Any, args: Any, kwargs: Any, held: Any, given: Any, found: dict[Tensor, Tensor]) -> Any:
        """``args``: the values; ``given``: the tensors in whose memory they would be; ``held``: the model's."""
        name, in_place = plain_name(func)
        entry = TABLE.get(name)
        if entry is None or getattr(func, "namespace", "aten") not in ("aten", "prim", "prims"):
            return self._without_row(func, name, in_place, args, kwargs)
        if kwargs.get("out") is not None:
            raise self._unknown(name, "writes its result into an 'out' tensor; it has no rule")
        if name not in ("setitem", "copy"):
            func, args, kwargs, asked = out_of_place(func, name, in_place, args, kwargs)
            in_place = in_place or asked
        self.in_place = in_place
        with torch.enable_grad():
            result = self._handle(func, name, entry, args, kwargs)
        replaced = {original: value for original, value in found.items() if value is not original}
        if replaced and (entry.moves or not in_place) and name not in _JOINS:  # which copy: no view comes out
            result = self._as_views(func, entry, given, replaced, result)
        if not in_place:
            return result
        if entry.moves:  # unsqueeze_, t_ and the like write nothing
            self.marks.reshape(held, result)
        else:
            self.marks.write(given[0][0], result)
        return None if name == "setitem" else held

    def _handle(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        return getattr(self, f"_{entry.handler}")(func, name, entry, args, kwargs)

    def _as_views(self, func: Any, entry: Entry, given: Any, replaced: dict[Tensor, Tensor], result: Any) -> Any:
        """Let a result that views a tensor which in-place functions changed be a view of the model's own memory.

        So a later write through either of them reaches the other, as it would without interception.
        """
        for original, value in replaced.items():
            if result is value:
                return original
        if not entry.moves or not any(isinstance(v, Tensor) for v in given[0][:1]):
            return result
        with torch.no_grad():
            views = func(*given[0], **given[1])

        return self._known(views, result, replaced)

    def _known(self, view: Any, value: Any, replaced: dict[Tensor, Tensor]) -> Any:
        # A method, since a function in a function that calls itself would keep all of this alive.
        if isinstance(view, list | tuple) and isinstance(value, list | tuple):
            return type(value)(self._known(a, b, replaced) for a, b in zip(view, value, strict=True))
        if isinstance(view, Tensor) and any(share_memory(view, original) for original in replaced):
            self.marks.know(view, value)
            return view
        return value

    # ---- what a tensor holds after in-place functions ----------------------------------------------------------

    def current(self, tensor: Tensor) -> Tensor:
        """The tensor that holds the value which ``tensor`` would have by now without interception."""
        tensor = self.marks.reshaped(tensor)
        unseen = self.marks.unseen(tensor)
        mark = self.marks.get(tensor)
        value = tensor if mark is None or mark.current is None else mark.current
        if not unseen:
            return value
        # Called from hooks of the model too, where this mode would catch its own functions.
        with torch._C.DisableTorchFunction(), torch.enable_grad():
            for write in unseen:
                value = self._after(write, tensor, value)
        self.marks.know(tensor, value)
        return value

    def _after(self, write: Write, tensor: Tensor, value: Tensor) -> Tensor:
        if write.covers(tensor):
            return write.result
        source = write.reaches(tensor)
        if not bool((source >= 0).any()):
            return value

        def merge(both: list[Tensor]) -> Tensor:
            taken = both[1].reshape(-1)[source.clamp(min=0)].to(both[0].dtype)
            return torch.where(source >= 0, taken, both[0])

        result: Tensor = self._gradient(merge, "write", _WRITE, ([value, write.result],), {})
        return result

    def output(self, tensor: Tensor) -> Tensor:
        """The model's output as the backward pass starts from it."""
        mark = self.marks.get(tensor)
        if mark is None or not tensor.requires_grad:
            raise RelevanceError(
                "the model's output does not depend on the input through torch functions: the graph is in pieces",
                "look for .numpy(), .item(), torch.tensor(x) or a cache in the model's forward",
            )
        self.hold(tensor)
        with torch.enable_grad():
            return Enter.apply(tensor) if mark.raw else tensor

    def settle(self) -> None:
        """The forward pass is over: let go what served it only."""
        self.marks.settle()
        self.outputs.clear()
        self.merged.clear()

    def hold(self, tensor: Tensor) -> None:
        """Relevance can start or be read at this tensor."""
        mark = self.marks.get(tensor)
        if mark is not None and mark.node is not None:
            mark.node.hold(tensor)

    def absorb(self, name: str, relevance: Tensor | None, samples: Samples = None) -> None:
        """Add what a node absorbed to the ledger, per sample in float64.

        ``relevance`` has any shape, None is nothing; ``samples`` tells whose its entries are (None: samples follow one
        another).
        """
        if relevance is None:
            if name not in self.ledger:
                self.ledger[name] = torch.zeros(self.batch, dtype=torch.float64, device=self.device)
            return
        total = per_sample(relevance, samples, self.batch).to(self.device)
        self.ledger[name] = self.ledger[name] + total if name in self.ledger else total

    def _absorber(self, samples: Samples) -> Absorb:
        """``absorb`` for tensors whose entries belong to these samples."""
        return self.absorb if samples is None else partial(self.absorb, samples=samples)

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
        entered = Mark(False, mark.linear, mark.nonnegative, mark.gate, mark.samples, inverse=mark.inverse)
        return self.marks.put(Enter.apply(tensor), entered)

    def _step(self, name: str, function: str, kind: str = "", rule: str = "", note: str = "") -> Step:
        count = self._counts[name] = self._counts.get(name, 0) + 1
        unique = name if count == 1 else f"{name}:{count}"
        step = Step(unique, function, kind, rule, note, where() if self.locate else "")
        self.steps.append(step)
        return step

    def _finish(self, result: Any, inputs: Sequence[Tensor], entry: Entry, raw: bool, samples: Any = ()) -> Any:
        """Mark every floating-point tensor of a result; ``samples`` are theirs, where known better than by shape."""
        marks = [self._mark(tensor) for tensor in inputs]
        linear = any(mark.linear for mark in marks)
        nonnegative = entry.sign == "nonnegative" or (entry.sign == "keeps" and all(mark.nonnegative for mark in marks))
        gate = entry.gate or (entry.sign == "keeps" and all(mark.gate for mark in marks))
        inverse = entry.moves and all(mark.inverse for mark in marks)
        before = [(tensor.shape, mark.samples) for tensor, mark in zip(inputs, marks, strict=True)]
        known = list(_flat(samples))

        def mark(tensor: Tensor) -> Tensor:
            its = known.pop(0) if known else after_computing(tensor.shape, before)
            if self.marks.get(tensor) is None and tensor.is_floating_point():
                self.marks.put(tensor, Mark(raw, linear, nonnegative, gate, its, inverse=inverse))
            return tensor

        map_tensors(result, mark)
        return result

    def _one(self, samples: Any, result: Tensor, inputs: Sequence[Tensor]) -> Samples:
        """The one entry of what ``_samples`` returned, or what the shape says."""
        known = list(_flat(samples))
        if known:
            one: Samples = known[0]
            return one
        return after_computing(result.shape, [(tensor.shape, self._mark(tensor).samples) for tensor in inputs])

    def _samples(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any, result: Any) -> Any:
        """Samples of the result(s), for ``_finish``."""
        nothing = [None] * len(list(_flat(result)))
        if self.batch == 1:
            return nothing
        inputs = self._marked((args, kwargs))
        if not any(self._mark(t).samples is not None for t in inputs) and not may_permute(name, inputs, result):
            return nothing

        def number(tensor: Tensor) -> Tensor:
            mark = self.marks.get(tensor)
            if mark is None:
                return torch.full_like(tensor, -1, dtype=torch.int32) if tensor.is_floating_point() else tensor
            index = spread(tensor.shape, mark.samples, self.batch, tensor.device)
            return tensor if index is None else index

        if name in _REDUCTIONS:
            given = bound(func, args, kwargs, ("input", "dim", "keepdim"))
            dim = given.get("dim", given.get("axis"))
            if not isinstance(dim, int | list | tuple):
                return ()
            reduced = number(args[0]).amax(dim, keepdim=bool(given.get("keepdim", False)))
            return [compressed(reduced, self.batch)] * len(nothing)
        if entry.handler == "padding":  # the padding is nobody's, whatever its value
            given = padding_of(func, name, args, kwargs)
            if given.get("mode", "constant") == "constant":
                func, args, kwargs = functional.pad, (args[0], given["pad"]), {"value": -1}
        if entry.moves and name not in _CASTS:
            numbers = map_tensors((args, kwargs), number)
            for dense in (False, True):  # a view() may need them in memory one by one
                try:
                    whose = map_tensors(numbers, Tensor.contiguous) if dense else numbers
                    return after_moving(func, whose[0], whose[1], result, self.batch)
                except (RuntimeError, TypeError):
                    continue
        return ()

    # ---- functions without a row -------------------------------------------------------------------------------

    def _without_row(
        self,
        func: Callable[..., Any],
        name: str,
        in_place: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A function that is not in the table: harmless if no floating-point tensor comes out."""
        if in_place:
            raise self._unknown(f"{name}_", "has no relevance rule")
        # Detached, as the model has it under no_grad: numpy() refuses a tensor that is part of a graph.
        with torch.no_grad():
            plain = map_tensors((args, kwargs), lambda t: t.detach() if self.marks.get(t) else t)
            result = func(*plain[0], **plain[1])
        if not _floats(result):
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
            return self._finish(func(*args, **kwargs), self._marked((args, kwargs)), Entry("gradient"), raw=False)

    def _unknown(self, name: str, why: str) -> UnknownFunction:
        return UnknownFunction(
            f"torch function {name!r} {why} (called at {where() or 'an unknown place'})",
            "on_unknown='gradient' takes the plain gradient there, and the plan then says so; "
            "for a softmax or another normalisation at the end of the model, explain the values before it",
        )

    # ---- the handler of most functions -------------------------------------------------------------------------

    def _gradient(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        inputs = self._marked((args, kwargs))
        constants = name in _JOINS and any(self.marks.get(t) is None for t in _floats((args, kwargs)))
        constants = constants or name in _WITH_NUMBERS
        raw = entry.moves and not constants and all(self._mark(t).raw for t in inputs)
        if not raw:
            args, kwargs = map_tensors((args, kwargs), self._enter)
            inputs = self._marked((args, kwargs))
        result = func(*args, **kwargs)
        if any(result is tensor for tensor in inputs):
            return result
        samples = self._samples(func, name, entry, args, kwargs, result)
        if constants:
            zeroed = map_tensors((args, kwargs), lambda t: torch.zeros_like(t) if self.marks.get(t) is not None else t)
            part = func(*zeroed[0], **zeroed[1]).detach()
            absorb = self._absorber(self._one(samples, result, inputs))
            result = Constant.apply(result, part, self._step(name, name).name, absorb)
            entry = entry if bool((part >= 0).all()) else Entry(entry.handler)
        result = self._finish(result, inputs, entry, raw, samples)
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


def _floats(values: Any) -> list[Tensor]:
    """The tensors that can carry relevance (complex ones carry values too)."""
    found: list[Tensor] = []
    map_tensors(values, lambda t: found.append(t) if t.is_floating_point() or t.is_complex() else None)
    return found


def _flat(values: Any) -> Iterator[Any]:
    """The leaves of nested lists and tuples."""
    if isinstance(values, list | tuple):
        for value in values:
            yield from _flat(value)
    else:
        yield values
