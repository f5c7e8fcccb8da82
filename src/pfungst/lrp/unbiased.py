"""Rules with the bias left out of their sums: relevance that a bias would absorb goes to the inputs instead."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pfungst.errors import SettingError
from pfungst.lrp.operators import quotient, row_sums
from pfungst.lrp.rules import AlphaBeta, Epsilon, Gamma, LinearCall, Recurrent, Rule, Shared


@dataclass(frozen=True)
class WithoutBias(Rule):
    """A rule of contributions on z - b instead of z; the relevance to share is that of the true output z.

    Where z - b is 0 there is nothing to share and the relevance is absorbed.  The signed rules take the sign of
    z - b, the sum that they divide by.

    Source: the default of Binder's implementation ("Biases in denominators can be omitted during the backward pass").
    """

    rule: Rule

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Epsilon | AlphaBeta | Gamma) or isinstance(self.rule, Recurrent):
            raise SettingError(f"WithoutBias({self.rule!r})", "give Epsilon, AlphaBeta, ZPlus or Gamma")

    @property
    def label(self) -> str:
        return f"{self.rule.label} without bias"

    def share(self, call: LinearCall, c: Tensor) -> Shared:
        bias = call.op.bias
        if bias is None:
            return self.rule.share(call, c)
        relevance, y = c * call.y, call.y - bias
        empty = y.abs() <= torch.finfo(y.dtype).tiny
        shared = self.rule.share(
            replace(call, op=replace(call.op, bias=None), y=y),
            quotient(relevance, y),
        )
        lost = row_sums(torch.where(empty, relevance, 0))
        return Shared(shared.input, lost if shared.absorbed is None else shared.absorbed + lost)
