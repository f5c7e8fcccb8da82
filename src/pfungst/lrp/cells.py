"""LSTM, GRU and RNN opened into their elementary steps, forwards and, with relevance, backwards.

Every linear map has the total pre-activation W x + U h + b in its denominator; nonlinearities hand relevance on; a
product of a gate and a signal is shared by the preset's gate rule; the accumulations f·c + i·g of an LSTM and
(1 - z)·n + z·h of a GRU are sums, which the rule ``Recurrent`` stabilises.
Sources: Arras et al. 2017 and 2019 for the LSTM; the GRU follows the same principles.
Slow float64 oracle: ``tests/oracles_recurrent.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pfungst.lrp.gradients import gate_share
from pfungst.lrp.operators import Dense
from pfungst.lrp.rules import Epsilon, LinearCall, Recurrent, Rule, Shared


@dataclass(frozen=True)
class Flow:
    """Relevance on its way back through a tensor of some value: R = c · value + extra.

    ``extra`` is relevance that a value of zero could not carry: shares of a bias, and what sigmoids hand on, whose
    value does not vanish with their argument.  None stands for zero.
    """

    c: Tensor
    extra: Tensor | None = None

    def relevance(self, value: Tensor) -> Tensor:
        """R, where the tensor holds ``value``."""
        return self.c * value if self.extra is None else self.c * value + self.extra

    def through(self, ratio: Tensor, share: Tensor | float = 1.0) -> Flow:
        """The part ``share`` of the relevance, at the lower value: ``ratio`` is value / lower value."""
        return Flow(self.c * (ratio * share), None if self.extra is None else self.extra * share)

    def divided(self, value: Tensor) -> Tensor:
        """c with the extra part in it; 0 of it where the value is 0."""
        return self.c if self.extra is None else self.c + Epsilon(0).ratio(self.extra, value)

    def plus(self, extra: Tensor) -> Flow:
        """The same with more relevance, which broadcasts."""
        extra = extra.expand_as(self.c)
        return Flow(self.c, extra if self.extra is None else self.extra + extra)

    def __add__(self, other: Flow) -> Flow:
        extras = [extra for extra in (self.extra, other.extra) if extra is not None]
        return Flow(self.c + other.c, sum(extras[1:], extras[0]) if extras else None)

    def __getitem__(self, index: Any) -> Flow:
        return Flow(self.c[index], None if self.extra is None else self.extra[index])


def join(flows: Sequence[Flow], dim: int) -> Flow:
    """Flows side by side along an axis."""
    if len(flows) == 1:
        return flows[0]
    extra = None
    if any(flow.extra is not None for flow in flows):
        extra = torch.cat([torch.zeros_like(f.c) if f.extra is None else f.extra for f in flows], dim)
    return Flow(torch.cat([flow.c for flow in flows], dim), extra)


@dataclass(frozen=True)
class Rules:
    """What shares relevance out in one layer.

    input        rule of the map of the layer's input, where that differs from ``inner`` (input layer of the network)
    inner        rule of all other linear maps
    gates        rule of the products, see ``presets.Preset.gates``
    nonnegative  every entry of the layer's input is >= 0
    """

    input: Rule
    inner: Rule
    gates: str
    nonnegative: bool = False


Bounds = tuple[Tensor, Tensor] | None


class Inputs(NamedTuple):
    """One step's input (n, features) and, where z^B asks for them, its bounds."""

    x: Tensor
    bounds: Bounds = None


@dataclass(frozen=True)
class Joint:
    """The linear map ``x Wᵀ + h Uᵀ + b`` with one denominator; without W a map of h alone."""

    W: Tensor | None
    U: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor | None, h: Tensor) -> Tensor:
        total = torch.nn.functional.linear(h, self.U, self.bias)
        return total if self.W is None or x is None else total + torch.nn.functional.linear(x, self.W)

    def rows(self, which: slice) -> Joint:
        """The map to some of the units."""
        W, bias = (None if part is None else part[which] for part in (self.W, self.bias))
        return Joint(W, self.U[which], bias)

    def share(
        self, flow: Flow, inputs: Inputs | None, h: Tensor, total: Tensor, rules: Rules
    ) -> tuple[Any, Flow, Tensor]:
        """Relevance of x (None without one) and h from that of ``total``, and what is absorbed, (n,) float64."""
        rule, absorbed, extra = rules.inner, flow.relevance(total), None
        if isinstance(rule, Epsilon) and rule.epsilon:
            c = rule.ratio(absorbed, total)
        else:
            c = flow.divided(total)
        if isinstance(rule, Recurrent) and rule.bias_factor:
            spread = c * rule.bias_share(total, self.bias)
            absorbed = absorbed - spread
            extra = spread.sum(1, keepdim=True) / (h.shape[1] + (0 if inputs is None else inputs.x.shape[1]))
        to_x: Flow | None
        if inputs is not None and rules.input != rule:
            to_x, to_h, reached = self._apart(c, inputs, h, rules)
        elif isinstance(rule, Epsilon):
            to_x = None if inputs is None or self.W is None else Flow(c @ self.W)
            to_h = Flow(c @ self.U)
            reached = (c * (total if self.bias is None else total - self.bias)).sum(1, dtype=torch.float64)
        else:
            to_x, to_h, reached = self._together(c, inputs, h, total, rule)
        if extra is not None:
            to_x, to_h = None if to_x is None else to_x.plus(extra), to_h.plus(extra)
        return to_x, to_h, absorbed.sum(1, dtype=torch.float64) - reached

    def _together(
        self, c: Tensor, inputs: Inputs | None, h: Tensor, total: Tensor, rule: Rule
    ) -> tuple[Flow | None, Flow, Tensor]:
        """Any rule, with x and h as one vector of inputs."""
        weight, lower = self.U, h
        if inputs is not None and self.W is not None:
            weight, lower = torch.cat([self.W, self.U], 1), torch.cat([inputs.x, h], 1)
        shared = rule.share(LinearCall(Dense(weight, self.bias), lower, total, False), c)
        to_x = None if inputs is None else Flow(shared.input[:, : -h.shape[1]])
        return to_x, Flow(shared.input[:, -h.shape[1] :]), _reached(c, total, shared)

    def _apart(self, c: Tensor, inputs: Inputs, h: Tensor, rules: Rules) -> tuple[Flow, Flow, Tensor]:
        """The input layer's rule for x and another for h: first the sum is shared in proportion to its parts."""
        assert self.W is not None
        x, rule = inputs.x, rules.input
        op = Dense(self.W, None)
        z_x, z_h = op.forward(x, self.W), torch.nn.functional.linear(h, self.U)
        shared = rule.share(LinearCall(op, x, z_x, rules.nonnegative, inputs.bounds), c)
        inner = Epsilon(0) if isinstance(rules.inner, Epsilon) else rules.inner  # ε: stabilised at the total
        shared_h = inner.share(LinearCall(Dense(self.U, None), h, z_h, False), c)
        to_x = Flow(torch.zeros_like(x), shared.input) if rule.carries_relevance else Flow(shared.input)
        return to_x, Flow(shared_h.input), _reached(c, z_x, shared) + _reached(c, z_h, shared_h)


def _reached(c: Tensor, z: Tensor, shared: Shared) -> Tensor:
    """What a rule sent on of the relevance c z, (n,) float64."""
    reached = (c * z).sum(1, dtype=torch.float64)
    return reached if shared.absorbed is None else reached - shared.absorbed


class Weights(NamedTuple):
    """Parameters of one layer in one direction, in torch's order and layout; None where there are none."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None

    @property
    def bias(self) -> Tensor | None:
        return None if self.b_ih is None or self.b_hh is None else self.b_ih + self.b_hh


class State(NamedTuple):
    """What a cell hands on: h, and c of an LSTM; tensors or flows, (n, units)."""

    h: Any
    c: Any = None


class Cell:
    """One layer in one direction: a step forwards, and the same step backwards with relevance."""

    def __init__(self, weights: Weights, rules: Rules) -> None:
        self.rules = rules
        self.total = Joint(weights.w_ih, weights.w_hh, weights.bias)

    def forward(self, inputs: Inputs, state: State) -> tuple[Any, State]:
        """What the way back needs, and the next state."""
        raise NotImplementedError

    def backward(self, record: Any, flow: State, absorbed: Tensor) -> tuple[Flow, State]:
        """Relevance of the step's input and of the state before it; adds to ``absorbed``, (n,) float64."""
        raise NotImplementedError

    def _linear(
        self, node: Joint, flow: Flow, inputs: Inputs | None, h: Tensor, total: Tensor, absorbed: Tensor
    ) -> tuple[Any, Flow]:
        to_x, to_h, took = node.share(flow, inputs, h, total, self.rules)
        absorbed += took
        return to_x, to_h

    def _product(self, flow: Flow, gate: Tensor, signal: Tensor) -> tuple[Flow | None, Flow]:
        """Relevance of a gate's pre-activation (None: it gets none) and of the signal, from that of gate · signal."""
        if self.rules.gates == "all":
            return None, flow.through(gate)
        share = gate_share(self.rules.gates, gate, signal)
        relevance = flow.through(signal, share).relevance(gate)
        return Flow(torch.zeros_like(relevance), relevance), flow.through(gate, 1 - share)

    def _sum(self, flow: Flow, parts: tuple[Tensor, Tensor], total: Tensor, absorbed: Tensor) -> Flow:
        """Relevance of either summand from that of their sum, unit by unit."""
        rule = self.rules.inner
        if not isinstance(rule, Recurrent) or not rule.epsilon:
            c = flow.divided(total)
            absorbed += (flow.relevance(total) - c * total).sum(1, dtype=torch.float64)
            return Flow(c)
        c = rule.ratio(flow.relevance(total), total)
        reached, extra = c * (parts[0] + parts[1]), None
        if rule.bias_factor:
            spread = c * rule.bias_share(total, None)
            reached = reached + spread
            # As the source has it: every summand of every unit is a lower unit of each sum.
            extra = (spread.sum(1, keepdim=True) / (2 * total.shape[1])).expand_as(total)
        absorbed += (flow.relevance(total) - reached).sum(1, dtype=torch.float64)
        return Flow(c, extra)


def _tanh_ratio(y: Tensor, x: Tensor) -> Tensor:
    """tanh(x) / x, 1 at 0."""
    return torch.where(x == 0, 1, y / torch.where(x == 0, 1, x))


class LSTM(Cell):
    """i, f, o = σ(...), g = tanh(...), c' = f·c + i·g, h' = o·tanh(c'), or its projection."""

    class Record(NamedTuple):
        """Values of one step."""

        inputs: Inputs
        state: State
        total: Tensor
        gates: tuple[Tensor, ...]
        c: Tensor
        squashed: Tensor
        h: Tensor

    def __init__(self, weights: Weights, rules: Rules) -> None:
        super().__init__(weights, rules)
        self.units = weights.w_hh.shape[0] // 4
        self.projection = None if weights.w_hr is None else Joint(None, weights.w_hr, None)

    def forward(self, inputs: Inputs, state: State) -> tuple[Record, State]:
        total = self.total.forward(inputs.x, state.h)
        i, f, g, o = total.chunk(4, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * state.c + i * g
        squashed = c.tanh()
        h = o * squashed if self.projection is None else self.projection.forward(None, o * squashed)
        return self.Record(inputs, state, total, (i, f, g, o), c, squashed, h), State(h, c)

    def backward(self, record: Record, flow: State, absorbed: Tensor) -> tuple[Flow, State]:
        i, f, g, o = record.gates
        before = record.state
        to_h: Flow = flow.h
        if self.projection is not None:
            _, to_h = self._linear(self.projection, to_h, None, o * record.squashed, record.h, absorbed)
        to_o, to_squashed = self._product(to_h, o, record.squashed)
        to_c = flow.c + to_squashed.through(_tanh_ratio(record.squashed, record.c))
        part = self._sum(to_c, (f * before.c, i * g), record.c, absorbed)
        to_f, to_c = self._product(part, f, before.c)
        to_i, to_g = self._product(part, i, g)
        candidate = slice(2 * self.units, 3 * self.units)
        to_g = to_g.through(_tanh_ratio(g, record.total[:, candidate]))
        if to_i is None or to_f is None or to_o is None:
            node, total = self.total.rows(candidate), record.total[:, candidate]
        else:
            node, total, to_g = self.total, record.total, join([to_i, to_f, to_g, to_o], 1)
        to_x, to_h = self._linear(node, to_g, record.inputs, before.h, total, absorbed)
        return to_x, State(to_h, to_c)


class GRU(Cell):
    """r, z = σ(...), m = U h + b, n = tanh(W x + b + r·m), h' = (1 - z)·n + z·h.

    1 - z is σ of the negative pre-activation: one more nonlinearity of the same unit, which hands its relevance on.
    The map to n has x and r·m as its lower units, that to m has h.
    """

    class Record(NamedTuple):
        """Values of one step."""

        inputs: Inputs
        h_before: Tensor
        total: Tensor
        r: Tensor
        z: Tensor
        m: Tensor
        candidate: Tensor
        n: Tensor
        h: Tensor

    def __init__(self, weights: Weights, rules: Rules) -> None:
        super().__init__(weights, rules)
        units = weights.w_hh.shape[0] // 3
        gates, last = slice(0, 2 * units), slice(2 * units, None)
        self.gates = self.total.rows(gates)
        self.memory = Joint(None, weights.w_hh[last], None if weights.b_hh is None else weights.b_hh[last])
        one = torch.eye(units, dtype=weights.w_hh.dtype, device=weights.w_hh.device)
        self.candidate = Joint(weights.w_ih[last], one, None if weights.b_ih is None else weights.b_ih[last])

    def forward(self, inputs: Inputs, state: State) -> tuple[Record, State]:
        total = self.gates.forward(inputs.x, state.h)
        r, z = total.sigmoid().chunk(2, 1)
        m = self.memory.forward(None, state.h)
        candidate = self.candidate.forward(inputs.x, r * m)
        n = candidate.tanh()
        h = (1 - z) * n + z * state.h
        return self.Record(inputs, state.h, total, r, z, m, candidate, n, h), State(h)

    def backward(self, record: Record, flow: State, absorbed: Tensor) -> tuple[Flow, State]:
        inputs, h, total, r, z, m, candidate, n, _ = record
        part = self._sum(flow.h, ((1 - z) * n, z * h), record.h, absorbed)
        to_z, to_h = self._product(part, z, h)
        to_not_z, to_n = self._product(part, 1 - z, n)
        to_n = to_n.through(_tanh_ratio(n, candidate))
        to_x, to_rm = self._linear(self.candidate, to_n, inputs, r * m, candidate, absorbed)
        to_r, to_m = self._product(to_rm, r, m)
        _, more = self._linear(self.memory, to_m, None, h, m, absorbed)
        to_h = to_h + more
        if to_r is not None and to_z is not None and to_not_z is not None:
            gates = join([to_r, to_z + to_not_z], 1)
            more_x, more = self._linear(self.gates, gates, inputs, h, total, absorbed)
            to_x, to_h = to_x + more_x, to_h + more
        return to_x, State(to_h)


class RNN(Cell):
    """h' = tanh(W x + U h + b)."""

    class Record(NamedTuple):
        """Values of one step."""

        inputs: Inputs
        h_before: Tensor
        total: Tensor
        h: Tensor

    def forward(self, inputs: Inputs, state: State) -> tuple[Record, State]:
        total = self.total.forward(inputs.x, state.h)
        h = self.bend(total)
        return self.Record(inputs, state.h, total, h), State(h)

    def backward(self, record: Record, flow: State, absorbed: Tensor) -> tuple[Flow, State]:
        to_total = flow.h.through(self.ratio(record.h, record.total))
        to_x, to_h = self._linear(self.total, to_total, record.inputs, record.h_before, record.total, absorbed)
        return to_x, State(to_h)

    def bend(self, total: Tensor) -> Tensor:
        """The nonlinearity."""
        return total.tanh()

    def ratio(self, y: Tensor, x: Tensor) -> Tensor:
        """The nonlinearity over its argument."""
        return _tanh_ratio(y, x)


class ReluRNN(RNN):
    """h' = relu(W x + U h + b)."""

    def bend(self, total: Tensor) -> Tensor:
        return total.relu()

    def ratio(self, y: Tensor, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)


CELLS: dict[str, type[Cell]] = {"lstm": LSTM, "gru": GRU, "rnn_tanh": RNN, "rnn_relu": ReluRNN}


class Unrolled:
    """All layers, directions and steps of one call.

    cells   by layer and direction; the second direction runs backwards in time
    sizes   number of sequences that go on at each step, never growing: torch's ``batch_sizes``
    inputs  (rows, features): the steps one after the other, as in a ``PackedSequence``
    state   (layers · directions, sequences, units)

    After it: ``output`` (rows, directions · units), ``state``: the last of each sequence.
    """

    def __init__(self, cells: Sequence[Sequence[Cell]], sizes: Sequence[int], inputs: Inputs, state: State) -> None:
        self.cells, self.sequences = cells, len(state.h[0])
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self.steps = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        self.records: list[list[list[Any]]] = []
        last: list[State] = []
        for layer, directions in enumerate(cells):
            outputs, kept = [], []
            for way, cell in enumerate(directions):
                number = layer * len(directions) + way
                first = State(*(None if part is None else part[number] for part in state))
                output, records, end = self._run(cell, self._order(way), inputs, first)
                outputs.append(output)
                kept.append(records)
                last.append(end)
            self.records.append(kept)
            inputs = Inputs(torch.cat(outputs, 1))
        self.output = inputs.x
        self.state = State(
            torch.stack([end.h for end in last]),
            None if state.c is None else torch.stack([end.c for end in last]),
        )

    def _order(self, way: int) -> list[int]:
        steps = list(range(len(self.steps)))
        return steps[::-1] if way else steps

    def _run(self, cell: Cell, order: list[int], inputs: Inputs, state: State) -> tuple[Tensor, list[Any], State]:
        outputs: list[Any] = [None] * len(order)
        records: list[Any] = [None] * len(order)
        for t in order:
            rows, n = self.steps[t], self.steps[t].stop - self.steps[t].start
            bounds = None if inputs.bounds is None else (inputs.bounds[0][rows], inputs.bounds[1][rows])
            running = State(*(None if part is None else part[:n] for part in state))
            records[t], new = cell.forward(Inputs(inputs.x[rows], bounds), running)
            outputs[t] = new.h
            state = State(
                *(
                    old if part is None else part if n == self.sequences else torch.cat([part, old[n:]])
                    for part, old in zip(new, state, strict=True)
                )
            )
        return torch.cat(outputs), records, state

    def backward(self, output: Flow, state: State) -> tuple[Flow, State, Tensor]:
        """Relevance of inputs and first states from that of the outputs and last states, and what was absorbed.

        Flows of the shapes of those tensors; ``absorbed`` is (sequences,) float64.
        """
        absorbed = torch.zeros(self.sequences, dtype=torch.float64, device=output.c.device)
        first: list[State] = []
        for layer in reversed(range(len(self.cells))):
            directions = self.cells[layer]
            parts = output.c.shape[1] // len(directions)
            lower, ends = [], []
            for way, cell in enumerate(directions):
                number = layer * len(directions) + way
                flow = State(*(None if part is None else part[number] for part in state))
                mine = output[:, way * parts : (way + 1) * parts]
                to_x, end = self._back(cell, self.records[layer][way], self._order(way), mine, flow, absorbed)
                lower.append(to_x)
                ends.append(end)
            output = lower[0] if len(lower) == 1 else lower[0] + lower[1]
            first = ends + first
        return output, self._stacked(first), absorbed

    def _back(
        self, cell: Cell, records: list[Any], order: list[int], output: Flow, flow: State, absorbed: Tensor
    ) -> tuple[Flow, State]:
        inputs: list[Any] = [None] * len(order)
        for t in reversed(order):
            n = self.steps[t].stop - self.steps[t].start
            h = flow.h[:n] + output[self.steps[t]]
            inputs[t], before = cell.backward(
                records[t], State(h, None if flow.c is None else flow.c[:n]), absorbed[:n]
            )
            flow = State(
                *(
                    None if part is None else part if n == self.sequences else join([part, old[n:]], 0)
                    for part, old in zip(before, flow, strict=True)
                )
            )
        return join(inputs, 0), flow

    @staticmethod
    def _stacked(states: list[State]) -> State:
        def stack(flows: list[Any]) -> Any:
            return None if flows[0] is None else join([flow[None] for flow in flows], 0)

        return State(stack([state.h for state in states]), stack([state.c for state in states]))
