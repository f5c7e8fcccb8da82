"""What is explained: which output of the model the relevance starts from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pfungst.errors import RelevanceError, SettingError

Target = int | Sequence[int] | Tensor | None


def check_output(output: object, batch: int) -> Tensor:
    """The model's output if it is one (n, outputs) floating-point tensor; otherwise an error with the remedy."""
    if not isinstance(output, Tensor):
        kind = type(output).__name__
        raise RelevanceError(
            f"the model returns a {kind}, not one tensor of scores",
            "wrap it in a module whose forward returns the scores alone, e.g. `return self.model(x)[0]`",
        )
    if output.dim() != 2 or output.shape[0] != batch:
        raise RelevanceError(
            f"the model returns shape {tuple(output.shape)} for {batch} inputs, expected ({batch}, number of outputs)",
            "wrap the model so that it returns one row of scores a sample",
        )
    if not output.is_floating_point():
        raise RelevanceError(
            f"the model returns {output.dtype} values", "explain its scores, before argmax or rounding"
        )
    return output


def target_indices(target: Target, output: Tensor) -> Tensor:
    """One output index a sample, (n,) int64: given as one number, one number a sample, or None for the greatest."""
    n, outputs = output.shape
    if target is None:
        return output.detach().argmax(1)
    indices = torch.as_tensor(target, device=output.device)
    if indices.is_floating_point() or indices.dtype == torch.bool:
        raise SettingError(f"target has type {indices.dtype}", "give class indices as integers")
    indices = indices.long()
    if indices.dim() == 0:
        indices = indices.expand(n)
    if indices.shape != (n,):
        raise SettingError(
            f"target has shape {tuple(indices.shape)} for {n} inputs", "give one index, or one index an input"
        )
    if bool(((indices < 0) | (indices >= outputs)).any()):
        raise SettingError(
            f"target {int(indices.min())}..{int(indices.max())} is outside the model's {outputs} outputs",
            f"give indices from 0 to {outputs - 1}",
        )
    return indices
