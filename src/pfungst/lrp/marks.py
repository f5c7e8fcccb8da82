"""What the engine knows of each tensor that carries values of the input, and what in-place functions did to it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pfungst.errors import RelevanceError


@dataclass
class Mark:
    """Knowledge of one tensor.

    raw          no arithmetic but fixed preprocessing lies between it and the model's input; its gradient carries
                 relevance R, everywhere else the gradient carries c = R / activation
    linear       a linear node lies before it: the next one is not the input layer
    nonnegative  every entry is known to be >= 0
    bounds       smallest and greatest value, where the preset asks for them (raw tensors only)
    source       the linear call that made it, so that a batch norm can be merged into that call
    current      what in-place functions made of it: later calls use this one instead
    stale        an in-place function changed part of its memory in a way that cannot be followed
    """

    raw: bool = False
    linear: bool = True
    nonnegative: bool = False
    bounds: tuple[Tensor, Tensor] | None = None
    source: Any = None
    current: Tensor | None = None
    stale: str = ""


@dataclass
class Marks:
    """The marks of one forward pass, by tensor; tensors are held weakly."""

    by_tensor: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    by_memory: dict[int, list[weakref.ref[Tensor]]] = field(default_factory=dict)

    def get(self, tensor: Tensor) -> Mark | None:
        mark: Mark | None = self.by_tensor.get(tensor)
        return mark

    def put(self, tensor: Tensor, mark: Mark) -> Tensor:
        self.by_tensor[tensor] = mark
        self.by_memory.setdefault(_memory(tensor), []).append(weakref.ref(tensor))
        return tensor

    def current(self, tensor: Tensor) -> Tensor:
        """The tensor that holds the value which ``tensor`` has by now, after in-place functions."""
        mark = self.get(tensor)
        while mark is not None and mark.current is not None:
            tensor = mark.current
            mark = self.get(tensor)
        if mark is not None and mark.stale:
            raise RelevanceError(
                f"the model reads a tensor whose memory {mark.stale} changed in place through another view",
                "use the out-of-place form of that function in the model",
            )
        return tensor

    def replace(self, tensor: Tensor, result: Tensor, function: str) -> None:
        """Record that an in-place function turned ``tensor`` into ``result``; its other views follow where they can."""
        for alias in self._aliases(tensor):
            mark = self.by_tensor.setdefault(alias, Mark())
            if alias is tensor:
                mark.current = result
            elif alias.numel() == result.numel() and alias.is_contiguous() and tensor.is_contiguous():
                with torch.enable_grad():
                    view = result.reshape(alias.shape)
                if view is result:  # reshape to the same shape returns its argument
                    mark.current = result
                else:
                    known = self.get(result) or Mark()
                    mark.current = self.put(view, Mark(known.raw, known.linear, known.nonnegative))
            else:
                mark.stale = function

    def _aliases(self, tensor: Tensor) -> Iterator[Tensor]:
        self.by_tensor.setdefault(tensor, Mark())
        yield tensor
        for reference in self.by_memory.get(_memory(tensor), []):
            alias = reference()
            if alias is not None and alias is not tensor:
                mark = self.get(alias)
                if mark is not None and mark.current is None and _memory(alias) == _memory(tensor):
                    yield alias


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """``value`` with every tensor in its (nested) lists, tuples and dicts changed; the containers are new."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        items = [map_tensors(item, change) for item in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    return value
