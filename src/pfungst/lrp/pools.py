"""Max-pooling whose relevance is shared out in proportion to the values in each window, instead of to the greatest."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pfungst.errors import RelevanceError
from pfungst.lrp.calls import bound
from pfungst.lrp.operators import quotient

_FIELDS = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
_AVERAGES: dict[int, Any] = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}
_ADAPTIVE: dict[int, Any] = {
    1: functional.adaptive_avg_pool1d,
    2: functional.adaptive_avg_pool2d,
    3: functional.adaptive_avg_pool3d,
}
# One name for all: torch.nn.functional makes these of two functions each.
_DIMS = {functional.max_pool1d: 1, functional.max_pool2d: 2, functional.max_pool3d: 3,
         functional.adaptive_max_pool1d: 1, functional.adaptive_max_pool2d: 2,
         functional.adaptive_max_pool3d: 3}  # fmt: skip


class Proportional(torch.autograd.Function):
    """y = max of each window; relevance of y goes to all of the window, R_i = Σ_k x_i / Σ_{j in k} x_j R_k.

    Inputs below 0 get nothing from windows whose greatest value is above 0.  ``average`` is the pooling with the same
    windows by equal weights, which cancel.  Source: Montavon et al. 2018, section 5.3 (for x >= 0).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, average: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.average = average
        ctx.save_for_backward(x, y)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        above = _back(ctx.average, x.clamp(min=0), torch.where(y > 0, c * y, 0))
        c_x = torch.where(x > 0, above, 0)
        if bool((y < 0).any()):
            c_x = c_x + _back(ctx.average, x, torch.where(y < 0, c * y, 0))
        return c_x, None, None


def _back(average: Callable[[Tensor], Tensor], x: Tensor, relevance: Tensor) -> Tensor:
    """Relevance of the windows over their sums, sent back to their entries."""
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        total = average(point)
    back: Tensor = torch.autograd.grad(total, point, quotient(relevance, total.detach(), limit=0))[0]
    return back


def average_of(func: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Callable[[Tensor], Tensor]:
    """The average pooling that has the windows of a call of max-pooling."""
    digit = re.search("[123]", name)
    dims = _DIMS.get(func) or int(digit.group() if digit else 0)
    if name.startswith("adaptive"):
        size = bound(func, args, kwargs, ("input", "output_size"))["output_size"]
        return lambda x: _ADAPTIVE[dims](x, size)
    given = bound(func, args, kwargs, _FIELDS)
    dilation = given.get("dilation", 1)
    if any(d != 1 for d in (dilation if isinstance(dilation, list | tuple) else [dilation])):
        raise RelevanceError(f"{name} with dilation {dilation}", "the preset's max_pool='winner' explains it")
    stride = given.get("stride")
    settings = given["kernel_size"], stride if stride else None, given.get("padding", 0), given.get("ceil_mode", False)
    return lambda x: _AVERAGES[dims](x, *settings)
