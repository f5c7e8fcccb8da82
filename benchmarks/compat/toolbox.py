"""Compares pfungst with the LRP Toolbox's NumPy modules: signed inputs, biases, every rule that both have.

    python benchmarks/compat/toolbox.py CLONE/python

prints, for each node and rule, the greatest difference of two entries over the greatest entry.  See README.md.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pfungst.lrp import LRP, Preset, Row, rules

# The toolbox' rule and its parameter (its β is 1 - α), and ours.
RULES: dict[str, tuple[str, Any, rules.Rule]] = {
    "simple": ("simple", None, rules.Epsilon(0.0)),
    "epsilon 0.01": ("epsilon", 0.01, rules.Epsilon(0.01)),
    "epsilon 1": ("epsilon", 1.0, rules.Epsilon(1.0)),
    "alpha 2 beta 1": ("alphabeta", 2.0, rules.AlphaBeta(2, 1)),
    "alpha 1 beta 0": ("alphabeta", 1.0, rules.ZPlus()),
    "flat": ("flat", None, rules.Flat()),
    "w squared": ("ww", None, rules.WSquare()),
}


def toolbox(folder: str) -> Callable[[str], Any]:
    """The toolbox' modules; what it imports that Python and NumPy no longer have is put there first."""
    sys.path.insert(0, folder)
    np.float = float  # type: ignore[attr-defined]
    absent = types.ModuleType("imp")
    absent.find_spec = lambda name: None  # type: ignore[attr-defined]  # no cupy
    sys.modules.setdefault("imp", absent)
    return lambda name: importlib.import_module(f"modules.{name}")


class Last(nn.Module):
    """Flat in the order (row, column, channel), as the toolbox has its values."""

    def __init__(self, node: nn.Module) -> None:
        super().__init__()
        self.node = node

    def forward(self, x: Tensor) -> Tensor:
        y = self.node(x)
        return (y.movedim(1, -1) if y.dim() > 2 else y).flatten(1)


def ours(node: nn.Module, x: Tensor, rule: rules.Rule) -> np.ndarray:
    """Relevance of all outputs together, each starting from its value."""
    preset = Preset("toolbox", (Row(rule),))
    scores = LRP(lambda x: Last(node)(x).sum(1, keepdim=True), preset)(x, 0).scores
    return (scores.movedim(1, -1) if scores.dim() > 2 else scores).numpy()


def main() -> None:
    """Two kinds of nodes, with and without bias, signed inputs; then pooling without ties and with."""
    load = toolbox(sys.argv[1])
    rng = np.random.default_rng(0)
    linear, convolution = load("linear").Linear, load("convolution").Convolution
    dense = linear(12, 7)
    filters = convolution(filtersize=(3, 2, 4, 5), stride=(1, 2))
    for bias in (1.0, 0.0):
        W, B = rng.normal(size=(12, 7)), bias * rng.normal(size=7)
        dense.W, dense.B, node = W, B, nn.Linear(12, 7).double()
        node.weight.data, node.bias.data = torch.from_numpy(W.T.copy()), torch.from_numpy(B)
        _compare(f"dense, bias {bias:g}", dense, node, rng.normal(size=(3, 12)))
        W, B = rng.normal(size=(3, 2, 4, 5)), bias * rng.normal(size=5)
        filters.W, filters.B, conv = W, B, nn.Conv2d(4, 5, (3, 2), (1, 2)).double()
        conv.weight.data, conv.bias.data = torch.from_numpy(W).permute(3, 2, 0, 1), torch.from_numpy(B)  # type: ignore
        _compare(f"convolution, bias {bias:g}", filters, conv, rng.normal(size=(3, 6, 6, 4)))
    x = rng.normal(size=(3, 6, 6, 4))
    _pool("max-pool without ties", load, x)
    _pool("max-pool with ties", load, np.round(x))


def _compare(title: str, theirs: Any, node: nn.Module, x: np.ndarray) -> None:
    for name, (word, parameter, rule) in RULES.items():
        y = theirs.forward(x, lrp_aware=False)
        expected = theirs.lrp(y, word, parameter)
        own = torch.from_numpy(np.moveaxis(x, -1, 1).copy() if x.ndim > 2 else x)
        print(f"{title:24} {name:16} {_relative(ours(node, own, rule), expected):.1e}")


def _pool(title: str, load: Callable[[str], Any], x: np.ndarray) -> None:
    pool = load("maxpool").MaxPool(pool=(2, 2), stride=(2, 2))
    y = pool.forward(x)
    own = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
    result = ours(nn.MaxPool2d(2), own, rules.Epsilon(0.0))
    print(f"{title:24} {'':16} {_relative(result, pool.lrp(y, 'simple')):.1e}")


def _relative(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


if __name__ == "__main__":
    main()
