"""Runs zennit's own tests of its rules against the rules of pfungst.

A pytest plugin: it puts objects with zennit's interface (``rule().register(module)`` gives a handle with ``remove()``;
the backward pass of the module then returns relevance) in the places of zennit's rules.  See README.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pfungst.errors import SettingError
from pfungst.lrp import LRP, Preset, Row, rules
from pfungst.lrp.unbiased import WithoutBias


class _Explained(torch.autograd.Function):
    """The module's output; the backward pass takes relevance and returns relevance."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, explain: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.explain = explain
        ctx.save_for_backward(x)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.explain(ctx.saved_tensors[0], relevance), None, None


class Rule:
    """One rule of pfungst with the interface of zennit's hooks.

    ``zero_params="bias"`` is our ``WithoutBias``; the rules that never take the bias in are left as they are.
    """

    def __init__(self, rule: rules.Rule, zero_params: Any = None, bounds: Any = None) -> None:
        unbiased = zero_params is not None and "bias" in zero_params and not rule.carries_relevance
        self.rule, self.bounds = WithoutBias(rule) if unbiased else rule, bounds

    def register(self, module: nn.Module) -> Any:
        running = False

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            nonlocal running
            if running:
                return None
            running = True  # the copies and calls below are not to be explained
            try:
                return _Explained.apply(inputs[0], output, lambda x, R: self._explain(module, x, R))
            finally:
                running = False

        return module.register_forward_hook(hook)

    def _explain(self, module: nn.Module, x: Tensor, relevance: Tensor) -> Tensor:
        copied = deepcopy(module)
        copied._forward_hooks.clear()
        y = copied(x).detach()
        v = torch.where(y == 0, 0, relevance / torch.where(y == 0, 1, y))

        def weighed(x: Tensor) -> Tensor:  # Σ v y, so that y has relevance v y
            return (copied(x) * v).flatten(1).sum(1, keepdim=True)

        preset = Preset("zennit", (Row(self.rule),))
        return LRP(weighed, preset, bounds=self.bounds)(x.detach(), 0).scores


class Epsilon(Rule):
    def __init__(self, epsilon: float = 1e-6, zero_params: Any = None) -> None:
        super().__init__(rules.Epsilon(epsilon), zero_params)


class Norm(Rule):
    def __init__(self) -> None:
        super().__init__(rules.Epsilon(1e-6))


class ZPlus(Rule):
    def __init__(self, zero_params: Any = None) -> None:
        super().__init__(rules.ZPlus(), zero_params)


class AlphaBeta(Rule):
    def __init__(self, alpha: float = 2.0, beta: float = 1.0, zero_params: Any = None) -> None:
        try:
            rule = rules.AlphaBeta(alpha, beta)
        except SettingError as error:
            raise ValueError(str(error)) from error
        super().__init__(rule, zero_params)


class Gamma(Rule):
    def __init__(self, gamma: float = 0.25, zero_params: Any = None) -> None:
        super().__init__(rules.Gamma(gamma), zero_params)


class ZBox(Rule):
    def __init__(self, low: float, high: float, zero_params: Any = None) -> None:
        super().__init__(rules.ZBox(), zero_params, (low, high))


class WSquare(Rule):
    def __init__(self, zero_params: Any = None) -> None:
        super().__init__(rules.WSquare(), zero_params)


class Flat(Rule):
    def __init__(self) -> None:
        super().__init__(rules.Flat())


class Pass(Rule):
    """Relevance through a function that is no linear node: what pfungst does there."""

    def __init__(self) -> None:
        super().__init__(rules.Pass())


def _install() -> None:
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from engine import import_torchvision  # zennit imports it, and its build may lack operators

    import_torchvision()
    import zennit.composites  # before, so that its composites keep their own rules
    import zennit.rules

    for rule in (Epsilon, Norm, ZPlus, AlphaBeta, Gamma, ZBox, WSquare, Flat, Pass):
        setattr(zennit.rules, rule.__name__, rule)


_install()  # on import: the tests' conftest.py is read before any hook of this plugin runs


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--stabiliser", type=float, help="of the denominators in the tests' own rules, instead of 1e-6")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    value = config.getoption("--stabiliser")
    for module in {item.module for item in items}:
        if value is not None:
            module.stabilize.__defaults__ = (value,)
