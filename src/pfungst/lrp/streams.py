"""Batches of a data loader, taken apart into what the model is called with and the labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pfungst.errors import DataError
from pfungst.lrp.marks import map_tensors

Split = Callable[[Any], tuple[Any, Any]]


def batches(loader: Iterable[Any], split: Split | None, device: torch.device | str | None) -> Iterator[tuple[Any, Any]]:
    """(x, labels) of every batch, on ``device``; labels are None where there are none."""
    for batch in loader:
        x, labels = split(batch) if split is not None else split_batch(batch)
        if device is not None:
            x, labels = map_tensors((x, labels), lambda t: t.to(device))
        yield x, labels


def split_batch(batch: Any) -> tuple[Any, Any]:
    """A tensor or a dict is x; of a list or tuple the first is x and the second, if there is one, the labels."""
    if isinstance(batch, Tensor | dict):
        return batch, None
    if isinstance(batch, list | tuple) and len(batch) in (1, 2):
        x = tuple(batch[0]) if isinstance(batch[0], list) else batch[0]
        return x, batch[1] if len(batch) == 2 else None
    raise DataError(
        f"a batch is {type(batch).__name__}"
        + (f" of {len(batch)}" if isinstance(batch, list | tuple) else "")
        + ", not x or (x, labels)",
        "give split=, a function from a batch to (x, labels); x is a tensor, a tuple or a dict",
    )


def device_of(model: Any) -> torch.device | None:
    """Where the model's parameters are; None if it has none."""
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return None if first is None else first.device
