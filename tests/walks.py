"""Small programs of many kinds of calls, run by a model and, apart from it, node by node with relevance by hand.

A program is a list of (operation, operand, operand).  ``Model`` runs it with torch as a user's model would, in place
where an operation says so.  ``walk`` runs it again over an explicit list of nodes and sends relevance R back from
node to node, by each function's own formula in R; it shares nothing with the engine, which carries R / activation
through autograd.  Values have shape (n, 4, 6) throughout.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import oracles
import torch
from test_rules import randomise
from torch import Tensor, nn
from torch.nn import functional as F

SHAPE = (4, 6)
Line = tuple[str, int, int]
NodeRule = Callable[..., Tensor]  # (x, J, b, R) -> R at x


def constant(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(bias: bool = True) -> nn.ModuleDict:
    """The modules that programs use, as often as they like."""
    made = nn.ModuleDict(
        {
            "conv": nn.Conv1d(4, 4, 3, padding=1, bias=bias),
            "wide": nn.Conv1d(4, 4, 3, padding=2, dilation=2, groups=2, bias=bias),
            "normed": nn.Sequential(nn.Conv1d(4, 4, 3, padding=1, bias=False), nn.BatchNorm1d(4)),
            "dense": nn.Linear(6, 6, bias=bias),
            "layer_norm": nn.LayerNorm(6),
            "head": nn.Linear(24, 3, bias=bias),
        }
    )
    return nn.ModuleDict({name: randomise(module, seed) for seed, (name, module) in enumerate(made.items())})


# ---- the model ---------------------------------------------------------------------------------------------------

MODULES: dict[str, nn.Module] = {
    "relu": nn.ReLU(), "leaky_relu": nn.LeakyReLU(0.3), "tanh": nn.Tanh(), "gelu": nn.GELU(),
    "avg_pool": nn.AvgPool1d(3, 1, 1), "max_pool": nn.MaxPool1d(3, 1, 1),
}  # fmt: skip
SCALE, SHIFT = constant(4, 1, seed=11), constant(6, seed=12)


class Model(nn.Module):
    """Runs a program.  ``modules``: functions as modules.  ``unrolled``: a copy of its module for every call."""

    def __init__(
        self, program: Sequence[Line], modules: bool = False, unrolled: bool = False, bias: bool = True
    ) -> None:
        super().__init__()
        self.program, self.as_modules, self.unrolled = program, modules, unrolled
        self.parts, self.copies = parts(bias), nn.ModuleList()
        self.used = 0

    def part(self, name: str) -> nn.Module:
        module: nn.Module = self.parts[name]
        if not self.unrolled:
            return module
        if self.used == len(self.copies):
            self.copies.append(copy.deepcopy(module))
        self.used += 1
        return self.copies[self.used - 1]

    def forward(self, x: Tensor) -> Tensor:
        self.used = 0
        values = [self.part("conv")(x)]
        for operation, i, j in self.program:
            values.append(self.run(operation, values[-1 - i % len(values)], values[-1 - j % len(values)]))
        return self.part("head")((values[-1] + values[len(values) // 2]).flatten(1))

    def run(self, operation: str, a: Tensor, b: Tensor) -> Tensor:
        if operation in self.parts:
            return self.part(operation)(a)
        if operation in MODULES and self.as_modules:
            return MODULES[operation](a)
        call: Any = CALLS[operation]
        result: Tensor = call(a, b)
        return result


def _write_half(a: Tensor, b: Tensor) -> Tensor:
    half = a[:, :2]
    half.mul_(0.5)
    return a


def _write_rows(a: Tensor, b: Tensor) -> Tensor:
    a[:, 1] = torch.tanh(a[:, 3])
    return a


def _cut(a: Tensor, b: Tensor) -> Tensor:
    first, _ = a.chunk(2, 1)
    return torch.cat([b[:, 2:], first], dim=1)


CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda a, b: F.relu(a),
    "leaky_relu": lambda a, b: F.leaky_relu(a, 0.3),
    "tanh": lambda a, b: torch.tanh(a),
    "gelu": lambda a, b: F.gelu(a),
    "avg_pool": lambda a, b: F.avg_pool1d(a, 3, 1, 1),
    "max_pool": lambda a, b: F.max_pool1d(a, 3, 1, 1),
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "maximum": torch.maximum,
    "gate": lambda a, b: a * torch.sigmoid(b.mean(2, keepdim=True)),
    "product": lambda a, b: a * b,
    "attend": lambda a, b: torch.softmax(a, -1) + a,
    "matrix": lambda a, b: torch.matmul(torch.matmul(a, b.transpose(1, 2)) / 20, a),
    "scale": lambda a, b: a * SCALE,
    "shift": lambda a, b: a + SHIFT,
    "cut": _cut,
    "turn": lambda a, b: a.transpose(1, 2).reshape(len(a), *SHAPE).roll(1, 2),
    "alias": lambda a, b: a.view_as(a),
    "relu_": lambda a, b: a.relu_(),
    "add_": lambda a, b: a.add_(b),
    "write half": _write_half,
    "write rows": _write_rows,
}  # fmt: skip
OPERATIONS = ("conv", "wide", "normed", "dense", "layer_norm", *CALLS)


# ---- the walk ----------------------------------------------------------------------------------------------------


@dataclass
class Node:
    """``back(R)`` is the relevance of each parent."""

    value: Tensor
    parents: tuple[Node, ...] = ()
    back: Callable[[Tensor], Sequence[Tensor]] = lambda R: ()
    R: Tensor | None = None


@dataclass
class Cell:
    """Memory: what aliases share."""

    node: Node


@dataclass
class Walk:
    """Nodes in the order in which they were made.

    rules    the rule of a convolution and of a dense node; of the input layer (None: as elsewhere)
    gates    what a gate gets: ``all`` to the signal, ``half``, ``prop``, ``abs``
    cancels  two summands that are not 0 made a sum that is 0
    """

    convolution: NodeRule
    dense: NodeRule
    parts: nn.ModuleDict
    first: NodeRule | None = None
    gates: str = "all"
    cancels: bool = False
    nodes: list[Node] = field(default_factory=list)

    def make(self, value: Tensor, parents: tuple[Node, ...], back: Callable[[Tensor], Sequence[Tensor]]) -> Node:
        self.nodes.append(Node(value, parents, back))
        return self.nodes[-1]

    def linear(self, a: Node, module: Any, rule: NodeRule) -> Node:
        J, b = oracles.matrix(module, tuple(a.value.shape[1:]))

        def back(R: Tensor) -> list[Tensor]:
            return [rule(a.value, J, b, R.flatten(1)).reshape(a.value.shape)]

        return self.make(module(a.value), (a,), back)

    def elementwise(self, a: Node, value: Tensor) -> Node:
        return self.make(value, (a,), lambda R: [R])

    def fixed(self, a: Node, function: Any) -> Node:
        """A linear function without a rule of its own: in proportion to contributions."""
        return self.linear(a, function, oracles.zero)

    def sum(self, a: Node, b: Node, sign: float = 1.0) -> Node:
        y = a.value + sign * b.value
        # R at y is 0 and so tells nothing; R / y still does, whose limit is what the engine hands on.
        self.cancels = self.cancels or bool(((y == 0) & (a.value != 0)).any() and a is not b)
        return self.make(y, (a, b), lambda R: [_share(a.value, y, R), _share(sign * b.value, y, R)])

    def plus(self, a: Node, constant: Tensor) -> Node:
        y = a.value + constant
        return self.make(y, (a,), lambda R: [_share(a.value, y, R)])

    def winner(self, a: Node, b: Node) -> Node:
        takes = a.value >= b.value
        y = torch.where(takes, a.value, b.value)
        return self.make(y, (a, b), lambda R: [torch.where(takes, R, 0), torch.where(takes, 0, R)])

    def max_pool(self, a: Node) -> Node:
        """Three neighbours; the first of the greatest takes all."""
        n, channels, width = a.value.shape
        y, at = torch.empty_like(a.value), {}
        for s in range(n):
            for c in range(channels):
                for k in range(width):
                    near = range(max(0, k - 1), min(width, k + 2))
                    at[s, c, k] = max(near, key=lambda i: (float(a.value[s, c, i]), -i))
                    y[s, c, k] = a.value[s, c, at[s, c, k]]

        def back(R: Tensor) -> list[Tensor]:
            out = torch.zeros_like(R)
            for (s, c, k), i in at.items():
                out[s, c, i] += R[s, c, k]
            return [out]

        return self.make(y, (a,), back)

    def moved(self, nodes: tuple[Node, ...], function: Callable[..., Tensor]) -> Node:
        """A function that moves and copies entries, found out by numbering them."""
        sizes = [node.value.numel() for node in nodes]
        numbers = torch.arange(sum(sizes)).split(sizes)
        numbers = tuple(n.reshape(node.value.shape) for n, node in zip(numbers, nodes, strict=True))
        source = function(*numbers).flatten()
        y = function(*(node.value.clone() for node in nodes))

        def back(R: Tensor) -> list[Tensor]:
            flat = torch.zeros(sum(sizes), dtype=R.dtype)
            for entry, where in enumerate(source.tolist()):
                flat[where] += R.flatten()[entry]
            return [p.reshape(node.value.shape) for p, node in zip(flat.split(sizes), nodes, strict=True)]

        return self.make(y, nodes, back)

    def gate(self, signal: Node, gate: Node) -> Node:
        g, s = gate.value.expand(signal.value.shape), signal.value
        if self.gates == "all":
            to_gate: Any = torch.zeros_like(s)
        elif self.gates == "half":
            to_gate = torch.full_like(s, 0.5)
        else:
            a, b = (g, s) if self.gates == "prop" else (g.abs(), s.abs())
            to_gate = a / (a + b)

        def back(R: Tensor) -> list[Tensor]:
            return [R * (1 - to_gate), (R * to_gate).sum(2, keepdim=True)]

        return self.make(s * g, (signal, gate), back)

    def matrix(self, a: Node, b: Node) -> Node:
        """y = a b, a product of two matrices: half to each, in proportion to contributions."""
        y = a.value @ b.value

        def back(R: Tensor) -> list[Tensor]:
            z = a.value[:, :, :, None] * b.value[:, None, :, :]  # (n, i, k, j)
            messages = z * _share(torch.ones_like(y), y, R)[:, :, None, :] / 2
            return [messages.sum(3), messages.sum(1)]

        return self.make(y, (a, b), back)

    def attention(self, a: Node, b: Node) -> Node:
        scores = self.matrix(a, self.moved((b,), lambda v: v.transpose(1, 2)))
        return self.matrix(self.elementwise(scores, scores.value / 20), a)

    def softmax(self, a: Node) -> Node:
        """R_i = x_i (R_i - s_i Σ R)."""
        s = torch.softmax(a.value, -1)
        return self.make(s, (a,), lambda R: [a.value * (_share(R, s, s) - s * R.sum(-1, keepdim=True))])

    def layer_norm(self, a: Node) -> Node:
        """(x - μ) / σ · w + b with σ a constant: a linear map, in proportion to contributions."""
        norm: Any = self.parts["layer_norm"]
        x = a.value
        deviation = ((x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + norm.eps).sqrt()
        y = (x - x.mean(-1, keepdim=True)) / deviation * norm.weight + norm.bias
        centre = torch.eye(6, dtype=x.dtype) - 1 / 6

        def back(R: Tensor) -> list[Tensor]:
            z = x[..., :, None] * centre / deviation[..., None] * norm.weight  # (n, c, i, k)
            return [(z * _share(torch.ones_like(y), y, R)[..., None, :]).sum(-1)]

        return self.make(y, (a,), back)

    # ---- the program ---------------------------------------------------------------------------------------------

    def __call__(self, program: Sequence[Line], x: Tensor, target: int) -> tuple[Tensor, Tensor, float]:
        """Output, relevance of x, and the greatest relevance anywhere."""
        source = self.make(x, (), lambda R: [])
        cells = [Cell(self.linear(source, self.parts["conv"], self.first or self.convolution))]
        for operation, i, j in program:
            cells.append(self.run(operation, cells[-1 - i % len(cells)], cells[-1 - j % len(cells)]))
        joined = self.sum(cells[-1].node, cells[len(cells) // 2].node)
        flat = self.moved((joined,), lambda v: v.flatten(1))
        out = self.linear(flat, self.parts["head"], self.dense)
        out.R = torch.zeros_like(out.value)
        out.R[:, target] = out.value[:, target]
        for node in reversed(self.nodes):
            if node.R is None:
                continue
            for parent, R in zip(node.parents, node.back(node.R), strict=True):
                parent.R = R if parent.R is None else parent.R + R
        assert source.R is not None
        return out.value, source.R, max(float(node.R.abs().max()) for node in self.nodes if node.R is not None)

    def run(self, operation: str, a: Cell, b: Cell) -> Cell:
        if operation == "alias":
            return a
        if operation in ("relu_", "add_", "write half", "write rows"):
            a.node = self.written(operation, a.node, b.node)
            return a
        return Cell(self.pure(operation, a.node, b.node))

    def written(self, operation: str, a: Node, b: Node) -> Node:
        if operation == "relu_":
            return self.elementwise(a, a.value.clamp(min=0))
        if operation == "add_":
            return self.sum(a, b)
        if operation == "write half":
            return self.elementwise(a, torch.cat([a.value[:, :2] * 0.5, a.value[:, 2:]], 1))
        row = self.moved((a,), lambda v: v[:, 3])
        row = self.elementwise(row, torch.tanh(row.value))

        def put(v: Tensor, r: Tensor) -> Tensor:
            return torch.cat([v[:, :1], r[:, None], v[:, 2:]], 1)

        return self.moved((a, row), put)

    def pure(self, operation: str, a: Node, b: Node) -> Node:
        x = a.value
        functions = {"relu": F.relu, "leaky_relu": lambda v: F.leaky_relu(v, 0.3), "tanh": torch.tanh, "gelu": F.gelu}
        if operation in functions:
            return self.elementwise(a, functions[operation](x))
        if operation in self.parts and operation != "layer_norm":
            rule = self.dense if operation == "dense" else self.convolution
            return self.linear(a, self.parts[operation], rule)
        makes: dict[str, Callable[[], Node]] = {
            "layer_norm": lambda: self.layer_norm(a),
            "avg_pool": lambda: self.fixed(a, nn.AvgPool1d(3, 1, 1)),
            "max_pool": lambda: self.max_pool(a),
            "add": lambda: self.sum(a, b),
            "sub": lambda: self.sum(a, b, -1.0),
            "maximum": lambda: self.winner(a, b),
            "gate": lambda: self.gate(a, self._sigmoid(self.fixed(b, lambda v: v.mean(2, keepdim=True)))),
            "product": lambda: self.make(x * b.value, (a, b), lambda R: [R / 2, R / 2]),
            "attend": lambda: self.sum(self.softmax(a), a),
            "matrix": lambda: self.attention(a, b),
            "scale": lambda: self.elementwise(a, x * SCALE),
            "shift": lambda: self.plus(a, SHIFT),
            "cut": lambda: self.moved((a, b), lambda v, w: torch.cat([w[:, 2:], v[:, :2]], 1)),
            "turn": lambda: self.moved((a,), lambda v: v.mT.reshape(v.shape).roll(1, 2)),
        }
        return makes[operation]()

    def _sigmoid(self, a: Node) -> Node:
        return self.elementwise(a, 1 / (1 + torch.exp(-a.value)))


def _share(part: Tensor, whole: Tensor, R: Tensor) -> Tensor:
    """part / whole · R, and 0 where the whole is 0."""
    return torch.where(whole == 0, 0, part * R / torch.where(whole == 0, 1, whole))
