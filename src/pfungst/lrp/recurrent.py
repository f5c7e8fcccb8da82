"""Handlers of torch's recurrent functions and of packed sequences.

The model gets the native function's own values; only the backward pass uses the opened cells (``cells.py``), which are
computed anew when relevance comes back, so nothing but inputs and first states is kept in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pfungst.errors import RelevanceError
from pfungst.lrp.calls import bound
from pfungst.lrp.cells import CELLS, Flow, Inputs, Rules, State, Unrolled, Weights
from pfungst.lrp.functions import Entry
from pfungst.lrp.gradients import Constant
from pfungst.lrp.marks import Mark, map_tensors
from pfungst.lrp.norms import NormHandlers
from pfungst.lrp.rules import Epsilon
from pfungst.lrp.samples import compressed

_OPTIONS = ("has_biases", "num_layers", "dropout", "train", "bidirectional")


@dataclass(frozen=True)
class Call:
    """One call of a recurrent function, whatever its form: ``torch.lstm`` padded or packed, ``torch.lstm_cell``, ...

    kind         key of ``cells.CELLS``
    weights      by layer and direction
    rules        by layer
    sizes        number of sequences at each step
    batch_first  sequences in the leading axis of a padded input, None for rows of a packed one or of a single step
    single       one step of a cell: states without the axis of layers, and no output but the state
    bounds       smallest and greatest input, where the preset asks for them
    """

    kind: str
    weights: Sequence[Sequence[Weights]]
    rules: Sequence[Rules]
    sizes: Sequence[int]
    batch_first: bool | None
    single: bool
    bounds: tuple[Tensor, Tensor] | None = None

    def rows(self, values: Tensor) -> Tensor:
        """Values of all steps as rows, one step after the other, in at least single precision."""
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        if self.batch_first is None:
            return values
        return (values.transpose(0, 1) if self.batch_first else values).flatten(0, 1)

    def unrows(self, rows: Tensor) -> Tensor:
        """The same backwards."""
        if self.batch_first is None:
            return rows
        steps = rows.unflatten(0, (len(self.sizes), -1))
        return steps.transpose(0, 1) if self.batch_first else steps

    def states(self, *parts: Tensor | None) -> State:
        """h and c with their axis of layers."""
        wide = [None if part is None else part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts]
        return State(*(part[None] if part is not None and self.single else part for part in wide))

    def unrolled(self, x: Tensor, h: Tensor, c: Tensor | None) -> Unrolled:
        """The call, opened."""
        rows = self.rows(x)
        bounds = None if self.bounds is None else (self.rows(self.bounds[0]), self.rows(self.bounds[1]))

        def wide(weights: Weights) -> Weights:
            return Weights(*(None if part is None else part.detach().to(rows.dtype) for part in weights))  # type: ignore[arg-type]

        cells = [
            [CELLS[self.kind](wide(weights), rules) for weights in directions]
            for directions, rules in zip(self.weights, self.rules, strict=True)
        ]
        return Unrolled(cells, self.sizes, Inputs(rows, bounds), self.states(h, c))


class Recurrence(torch.autograd.Function):
    """A recurrent call: the values are the native function's, the way back is that of the opened cells.

    ``marks``: those of x, h and c, None where one does not depend on the input and so absorbs what it gets;
    ``absorb``: gets what each sequence absorbed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        marks: Sequence[Mark | None],
        absorb: Callable[[Tensor], None],
        values: tuple[Tensor, ...],
        *inputs: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.call, ctx.marks, ctx.absorb = call, marks, absorb
        ctx.save_for_backward(*inputs)
        return values

    @staticmethod
    def backward(ctx: Any, *c: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        unrolled = call.unrolled(*ctx.saved_tensors)
        output = torch.zeros_like(unrolled.output) if call.single else call.rows(c[0])
        last = call.states(*(c if call.single else c[1:]))
        flows = State(*(None if part is None else Flow(part) for part in last))
        to_x, first, absorbed = unrolled.backward(Flow(output), flows)
        device = absorbed.device
        each_step = torch.cat([torch.arange(size, device=device) for size in call.sizes])
        every_layer = torch.arange(unrolled.sequences, device=device).expand(len(first.h.c), -1).flatten()
        flat = [to_x, *(None if flow is None else Flow(*_flat(flow)) for flow in first)]
        results: list[Tensor | None] = []
        for number, (flow, x, mark) in enumerate(zip(flat, ctx.saved_tensors, ctx.marks, strict=True)):
            if flow is None:
                results.append(None)
                continue
            value = call.rows(x) if number == 0 else x.to(flow.c.dtype).reshape(flow.c.shape)
            back, lost = _leave(flow, value, mark)
            if lost is not None:
                absorbed.index_add_(0, every_layer if number else each_step, lost.sum(1, dtype=torch.float64))
            if back is not None:
                back = (call.unrows(back) if number == 0 else back).reshape(x.shape).to(x.dtype)
            results.append(back)
        ctx.absorb(absorbed)
        return None, None, None, None, *results


def _flat(flow: Flow) -> tuple[Tensor, Tensor | None]:
    return flow.c.flatten(0, -2), None if flow.extra is None else flow.extra.flatten(0, -2)


def _leave(flow: Flow, value: Tensor, mark: Mark | None) -> tuple[Tensor | None, Tensor | None]:
    """What goes back to a tensor (c, or R if it is raw), and what cannot."""
    if mark is None:
        return None, flow.relevance(value)
    if mark.raw:
        return flow.relevance(value), None
    if flow.extra is None:
        return flow.c, None
    more = Epsilon(0).ratio(flow.extra, value)
    return flow.c + more, flow.extra - more * value


class Interception(NormHandlers):
    """Runs the model's torch functions with the backward passes of the table; collects marks, steps and ledger.

    The handlers here: LSTM, GRU, RNN, their cells, and packed sequences.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Packing sorts the sequences by length: the sample of each, by the batch_sizes that go with packed data.
        self._packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def _recurrent(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        packed = "batch_sizes" in kwargs or (len(args) > 3 and isinstance(args[3], list | tuple))
        front = ("data", "batch_sizes", "hx", "params") if packed else ("input", "hx", "params")
        given = bound(func, args, kwargs, (*front, *_OPTIONS, "batch_first"))
        layers, ways = int(given["num_layers"]), 2 if given["bidirectional"] else 1
        if given["train"] and given["dropout"] and layers > 1:
            raise RelevanceError("the model is in training mode: dropout would be random", "call model.eval() first")
        x, hx, params = given[front[0]], given["hx"], list(given["params"])
        weights = _by_layer(params, layers, ways, bool(given["has_biases"]))
        if packed:
            sizes, batch_first, source, axis = given["batch_sizes"].tolist(), None, given["batch_sizes"], 0
        else:
            batch_first = bool(given["batch_first"])
            axis = 0 if batch_first else 1
            sizes, source = [x.shape[axis]] * x.shape[1 - axis], x
        samples = self._whose(source, axis, sizes[0])
        call = Call(name, weights, (), sizes, batch_first, single=False)
        return self._recurrent_node(func, name, call, x, hx, samples, args, kwargs)

    def _recurrent_cell(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        given = bound(func, args, kwargs, ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh"))
        x = given["input"]
        weights = Weights(given["w_ih"], given["w_hh"], given.get("b_ih"), given.get("b_hh"))
        kind = name.removesuffix("_cell")
        call = Call(kind, [[weights]], (), [len(x)], None, single=True)
        samples = self._whose(x, 0, len(x))
        return self._recurrent_node(func, name, call, x, given["hx"], samples, args, kwargs)

    def _recurrent_node(
        self, func: Any, name: str, call: Call, x: Tensor, hx: Any, samples: Tensor | None, args: Any, kwargs: Any
    ) -> Any:
        for part in [part for directions in call.weights for weights in directions for part in weights]:
            if part is not None and self.marks.get(part) is not None:
                raise self._unknown(name, "has weights that depend on the input; it has no rule")
        inputs = [x, *(hx if isinstance(hx, list | tuple) else [hx])]
        marks = [self.marks.get(tensor) for tensor in inputs]
        mark = marks[0]
        is_input = mark is not None and not mark.linear
        step = self._step(self.names.get(id(call.weights[0][0].w_ih), name), name, "recurrent")
        inner = self.preset.rule_for("recurrent", False, step.name)
        first = self.preset.rule_for("recurrent", True, step.name) if is_input else inner
        inner.check_place(False, step.name)
        first.check_place(mark is not None and mark.raw, step.name)
        step.rule = inner.label if not is_input else f"{first.label} at the input"
        if first != inner:
            step.rule += f", {inner.label} between the steps"
        step.note = f"gates={self.preset.gates}" if call.kind in ("lstm", "gru") else ""
        rules = [
            Rules(first, inner, self.preset.gates, mark is not None and mark.nonnegative),
            *[Rules(inner, inner, self.preset.gates)] * (len(call.weights) - 1),
        ]
        call = Call(
            call.kind,
            call.weights,
            rules,
            call.sizes,
            call.batch_first,
            call.single,
            None if mark is None else mark.bounds,
        )

        def absorb(by_sequence: Tensor) -> None:
            if samples is None:  # nothing says whose sequences they are
                self.absorb(step.name, by_sequence.sum()[None])
            else:
                self.absorb(step.name, by_sequence, samples)

        # Parameters as they are: matmul picks its kernel by requires_grad, and the last bit with it.
        plain = map_tensors((args, kwargs), lambda t: t.detach() if self.marks.get(t) is not None else t)
        with torch.no_grad():
            result = func(*plain[0], **plain[1])
        values = (result,) if isinstance(result, Tensor) else tuple(result)
        given = [tensor if known is not None else tensor.detach() for tensor, known in zip(inputs, marks, strict=True)]
        if len(given) == 2:
            given, marks = [*given, None], [*marks, None]
        outputs = Recurrence.apply(call, marks, absorb, values, *given)
        for number, output in enumerate(outputs):
            self.marks.put(output, Mark(raw=False, linear=True, nonnegative=call.kind == "rnn_relu"))
            if call.single:
                self._belong(output, 0, samples)
            elif number:
                self._belong(output, 1, samples)
            elif call.batch_first is None:
                each = None if samples is None else torch.cat([samples[:size] for size in call.sizes])
                self._belong(output, 0, each)
            else:
                self._belong(output, 0 if call.batch_first else 1, samples)
        if step.name in self.keep:
            self.outputs[step.name] = outputs[0]
        return outputs[0] if isinstance(result, Tensor) else outputs

    # ---- packed sequences ----------------------------------------------------------------------------------------

    def _whose(self, source: Tensor | None, axis: int, count: int) -> Tensor | None:
        """The sample of each of ``count`` sequences along an axis of ``source``; None if there is no telling."""
        if source is not None and source in self._packed:
            known: Tensor = self._packed[source]
            return known
        mark = None if source is None else self.marks.get(source)
        if mark is not None and source is not None and mark.samples is not None:
            return mark.samples.expand(source.shape).movedim(axis, 0).reshape(count, -1)[:, 0]
        return None if count % self.batch else torch.arange(count) // (count // self.batch)

    def _belong(self, tensor: Tensor, axis: int, samples: Tensor | None) -> None:
        """Along ``axis`` a tensor's entries belong to these samples."""
        mark = self.marks.get(tensor)
        if mark is None or samples is None or self.batch == 1:
            return
        along = samples.to(tensor.device, torch.int32).reshape(-1, *[1] * (tensor.dim() - 1)).movedim(0, axis)
        mark.samples = compressed(along.expand(tensor.shape), self.batch)

    def _index_select(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        given = bound(func, args, kwargs, ("input", "dim", "index"))
        result = self._gradient(func, name, entry, args, kwargs)
        x = given.get("input", args[0])
        axis = given["dim"] % x.dim()
        if axis == 0 or self._mark(x).samples is not None:
            samples = self._whose(x, axis, x.shape[axis])
            self._belong(result, axis, None if samples is None else samples[given["index"].to(samples.device)])
        return result

    def _pack(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        given = bound(func, args, kwargs, ("input", "lengths", "batch_first"))
        x, axis = given["input"], 0 if given["batch_first"] else 1
        data, sizes = self._gradient(func, name, entry, args, kwargs)
        samples = self._whose(x, axis, x.shape[axis])
        if samples is not None:
            self._packed[sizes] = samples
            self._belong(data, 0, torch.cat([samples[:size] for size in sizes.tolist()]))
        bounds = self._mark(x).bounds
        if bounds is not None:
            with torch.no_grad():
                low, high = (func(end, given["lengths"], given["batch_first"])[0] for end in bounds)
            self._mark(data).bounds = low, high
        return data, sizes

    def _unpack(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        names = ("data", "batch_sizes", "batch_first", "padding_value", "total_length")
        given = bound(func, args, kwargs, names)
        padded, lengths = self._gradient(func, name, entry, args, kwargs)
        axis, value = 0 if given["batch_first"] else 1, float(given["padding_value"])
        samples = self._whose(given["batch_sizes"], 0, padded.shape[axis])

        def pad(data: Tensor) -> Tensor:
            result: Tensor = func(data, *(given[key] for key in names[1:3]), 0.0, given["total_length"])[0]
            return result

        padded = self._padded(padded, pad, [given["data"]], value, name, axis, samples)
        return padded, lengths

    def _pad_sequence(self, func: Any, name: str, entry: Entry, args: Any, kwargs: Any) -> Any:
        given = bound(func, args, kwargs, ("sequences", "batch_first", "padding_value", "padding_side"))
        given["sequences"] = args[0]
        padded = self._gradient(func, name, entry, args, kwargs)
        sequences, axis = args[0], 0 if given.get("batch_first") else 1
        if any(self.marks.get(sequence) is None for sequence in sequences):
            return padded  # then all that is constant has been seen to
        side = given.get("padding_side", "right")

        def pad(*parts: Tensor) -> Tensor:
            result: Tensor = func(list(parts), axis == 0, 0.0, side)
            return result

        value = float(given.get("padding_value", 0))
        return self._padded(padded, pad, sequences, value, name, axis, self._whose(None, axis, len(sequences)))

    def _padded(
        self,
        padded: Tensor,
        pad: Callable[..., Tensor],
        parts: Sequence[Tensor],
        value: float,
        name: str,
        axis: int,
        samples: Tensor | None,
    ) -> Tensor:
        """What falls on padding goes to the ledger: R itself in the raw region, later c times the padded value."""
        self._belong(padded, axis, samples)
        mark = self._mark(padded)
        if not (mark.raw or value):
            return padded
        with torch.no_grad():
            # Where the value is infinite, as before a maximum, no relevance arrives.
            part = (1 - pad(*(torch.ones_like(p) for p in parts))) * (1 if mark.raw else value)
            part = torch.nan_to_num(part, posinf=0, neginf=0)

        def spread(node: str, relevance: Tensor) -> None:
            self.absorb(node, relevance.sum()[None])  # nothing says whose it is

        absorb = spread if samples is None else self._absorber(mark.samples)
        step = self._step(name, name, note="padding absorbs its relevance")
        result: Tensor = Constant.apply(padded, part, step.name, absorb)
        return self.marks.put(result, replace(mark, nonnegative=mark.nonnegative and value >= 0))


def _by_layer(params: list[Tensor], layers: int, ways: int, has_biases: bool) -> list[list[Weights]]:
    """torch's flat list of parameters by layer and direction: w_ih, w_hh, [b_ih, b_hh], [w_hr] of each."""
    each = len(params) // (layers * ways)
    weights = []
    for start in range(0, len(params), each):
        part = params[start : start + each]
        biases: tuple[Tensor | None, Tensor | None] = (part[2], part[3]) if has_biases else (None, None)
        rest = part[4 if has_biases else 2 :]
        weights.append(Weights(part[0], part[1], *biases, rest[0] if rest else None))
    return [weights[i : i + ways] for i in range(0, len(weights), ways)]
