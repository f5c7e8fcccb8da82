"""Runs Captum's own tests of its LRP against pfungst.

A pytest plugin: ``captum.attr.LRP`` becomes a class of the same interface that reads ``module.rule`` as Captum does
and explains with pfungst.  See README.md.
"""

from __future__ import annotations

from typing import Any

import captum.attr
import torch
from captum.attr._utils import lrp_rules
from torch import Tensor, nn

from pfungst.lrp import LRP, Preset, Row, rules

# Captum's own list of layers whose rule it chooses itself; any other without ``rule`` is an error there.
_LINEAR = (nn.Linear, nn.modules.conv._ConvNd)


class LRPOfPfungst:
    """``LRP(model).attribute(inputs, target)`` as of Captum."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        rows = []
        for name, module in model.named_modules():
            rule = getattr(module, "rule", None)
            if rule is None:
                continue
            if not isinstance(rule, lrp_rules.PropagationRule):
                raise TypeError(f"{name} has the rule {rule!r}, which is no rule of Captum's")
            if isinstance(module, _LINEAR):
                rows.append(Row(_rule(rule), name=name))
        self.preset = Preset("captum", (*rows, Row(rules.Epsilon(1e-9))))

    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        verbose: bool = False,
    ) -> Any:
        given = tuple(x.float() for x in inputs) if isinstance(inputs, tuple) else inputs.float()

        def chosen(output: Tensor) -> Tensor:
            """The sum of what Captum selects: all of the output, or all that has this index along axis 1."""
            part = output if target is None else output[:, target]
            return part.reshape(len(output), -1).sum(1)

        lrp = LRP(self.model, self.preset)
        return lrp.attribute(given, chosen, additional_forward_args, return_convergence_delta=return_convergence_delta)

    def attribute_future(self) -> None:
        raise NotImplementedError("attribute_future")


def _rule(rule: Any) -> rules.Rule:
    if isinstance(rule, lrp_rules.Alpha1_Beta0_Rule):
        return rules.ZPlus()
    if isinstance(rule, lrp_rules.GammaRule):
        return rules.Gamma(rule.gamma)
    if isinstance(rule, lrp_rules.IdentityRule):
        return rules.Pass()
    return rules.Epsilon(rule.STABILITY_FACTOR)


def _install() -> None:
    captum.attr.LRP = LRPOfPfungst  # type: ignore[misc]
    torch.set_default_dtype(torch.float32)


_install()  # on import: before the tests import captum.attr
