"""Which sample each entry of a tensor belongs to, while a model moves its sample axis about.

Most tensors keep their samples one after another in memory order: (n, ...), or (n · windows, ...).  That is
``None`` here and costs nothing.  Where a model moves the axis (``x.transpose(0, 1)``, ``qkv.permute(2, 0, 3, 1, 4)``)
an integer tensor says the sample of each entry; it has size 1 along axes on which the sample does not change, so it
is small.  The ledger needs it to know whose relevance a node absorbed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pfungst.lrp.operators import row_sums

Samples = Tensor | None

# Functions after which the first axis can be another one, or another order of it.
_PERMUTING = {
    "transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "T", "mT", "H", "select", "getitem",
    "unbind", "stack", "rot90", "adjoint", "flip", "flipud", "roll", "index", "index_select", "gather",
    "take_along_dim", "meshgrid",
}  # fmt: skip
# Functions that change the length of the first axis, but not the order in memory.
_ORDERLY = {"view", "reshape", "flatten", "unflatten", "ravel", "_reshape_alias", "view_as", "reshape_as", "squeeze"}


def may_permute(name: str, inputs: Sequence[Tensor], result: Any) -> bool:
    """Samples may no longer follow one another: the function orders axes anew, or joins or cuts the first one."""
    if name in _PERMUTING:
        return True
    if name in _ORDERLY:
        return False
    first = {tensor.shape[:1] for tensor in inputs}
    results = result if isinstance(result, list | tuple) else (result,)
    return any(isinstance(r, Tensor) and {r.shape[:1]} != first for r in results)


def spread(shape: Sequence[int], samples: Samples, batch: int, device: Any) -> Tensor | None:
    """The sample of each entry of a tensor of that shape, as a view where possible; None if that is unknown."""
    if samples is not None:
        return samples.expand(shape)
    size = torch.Size(shape).numel()
    if not shape or size == 0 or size % batch:
        return None
    order = torch.arange(batch, dtype=torch.int32, device=device)
    if shape[0] % batch:
        return order.repeat_interleave(size // batch).reshape(shape)
    column = order.repeat_interleave(shape[0] // batch)
    return column.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)


def compressed(index: Tensor, batch: int, shape: torch.Size | None = None) -> Samples:
    """``index`` with size 1 along axes on which it does not change; None if samples follow one another.

    ``shape``: that of the tensor, where ``index`` has fewer entries.
    """
    shape, index = index.shape if shape is None else shape, _once(index)
    for axis, size in enumerate(index.shape):
        if size > 1 and bool((index == index.narrow(axis, 0, 1)).all()):
            index = index.narrow(axis, 0, 1)
    plain = spread(shape, None, batch, index.device)
    if plain is None or (shape[0] % batch == 0 and index.numel() != index.shape[0]):
        return index
    along = plain[(slice(None), *[slice(1)] * (index.dim() - 1))] if shape[0] % batch == 0 else plain
    return None if torch.equal(along, index.expand(along.shape)) else index


def after_moving(func: Callable[..., Any], args: Any, kwargs: Any, result: Any, batch: int) -> Any:
    """Samples of the result(s) of a function that only moves values, from a run on sample numbers instead."""
    return _known(func(*args, **kwargs), result, batch)


def _known(index: Any, value: Any, batch: int) -> Any:
    """Samples from moved sample numbers, for each value of a result."""
    if isinstance(index, list | tuple):
        return [_known(i, v, batch) for i, v in zip(index, value, strict=True)]
    if not isinstance(index, Tensor) or index.dtype != torch.int32:
        return None
    return compressed(filled(_once(index)), batch, index.shape)


def _once(index: Tensor) -> Tensor:
    """Without the repetitions of an expanded tensor."""
    for axis, stride in enumerate(index.stride()):
        if stride == 0 and index.shape[axis] > 1:
            index = index.narrow(axis, 0, 1)
    return index


def filled(index: Tensor) -> Tensor:
    """Constants among the values, such as tokens that a model adds, have the number -1: they go with their row."""
    if not bool((index < 0).any()):
        return index
    for axis in range(index.dim()):
        top = index.amax(axis, keepdim=True)
        if bool(((index == top) | (index < 0)).all()):
            index = top.expand(index.shape)
    return index.clamp(min=0)


def after_computing(shape: Sequence[int], before: Sequence[tuple[Sequence[int], Samples]]) -> Samples:
    """Samples of a result whose axes are those of its inputs, apart from their lengths (sums keep theirs as 1)."""
    for _, samples in before:
        if samples is not None and samples.dim() == len(shape):
            fits = all(s in (1, length) for s, length in zip(samples.shape, shape, strict=True))
            if fits:
                return samples
    return None


def per_sample(relevance: Tensor, samples: Samples, batch: int) -> Tensor:
    """Sum of a tensor's entries over each sample, (batch,) float64."""
    if samples is None:
        if relevance.numel() % batch:  # nothing better is known
            return relevance.sum(dtype=torch.float64).expand(batch) / batch
        return row_sums(relevance.reshape(batch, -1))
    same = [axis for axis, size in enumerate(samples.shape) if size == 1]
    sums = relevance.sum(same, keepdim=True, dtype=torch.float64) if same else relevance.double()
    total = torch.zeros(batch, dtype=torch.float64, device=relevance.device)
    return total.index_add(0, samples.reshape(-1), sums.reshape(-1))
