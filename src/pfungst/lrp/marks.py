"""What the engine knows of each tensor that carries values of the input, and what in-place functions did to it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass
class Mark:
    """Knowledge of one tensor.

    raw          no arithmetic but fixed preprocessing lies between it and the model's input; its gradient carries
                 relevance R, everywhere else the gradient carries c = R / activation
    linear       a linear node lies before it: the next one is not the input layer
    nonnegative  every entry is known to be >= 0
    gate         it weighs what it is multiplied with: the result of a sigmoid or softmax, or a mean or copy of one
    samples      the sample of each entry (``samples.py``), None if samples follow one another in memory order
    bounds       smallest and greatest value, where the preset asks for them (raw tensors only)
    source       the linear call that made it, so that a batch norm can be merged into that call
    normed       of a batch norm that no linear node precedes, and of the ReLU behind it: its input, scale and shift
    node         the linear node whose output it is, while that may still be kept in less memory (``LinearNode.value``)
    uses         in how many calls it was an argument
    current      what in-place functions made of it: later calls use this one instead
    writes_seen  how many of the writes to its memory ``current`` has in it
    inverse      it is one over a value of the input, such as 1 / σ of a norm written in plain code
    """

    raw: bool = False
    linear: bool = True
    nonnegative: bool = False
    gate: bool = False
    samples: Tensor | None = None
    bounds: tuple[Tensor, Tensor] | None = None
    source: Any = None
    normed: Any = None
    node: Any = None
    uses: int = 0
    current: Tensor | None = None
    writes_seen: int = 0
    inverse: bool = False


@dataclass(frozen=True)
class Write:
    """An in-place function would have written ``result`` into the memory of ``tensor``; it ran out of place."""

    tensor: Tensor  # as the model holds it; this reference also keeps its memory from being used again
    result: Tensor

    def covers(self, other: Tensor) -> bool:
        """``other`` is the same view of the same memory."""
        mine, its = self.tensor, other
        return (mine.shape, mine.stride(), mine.storage_offset()) == (
            its.shape,
            its.stride(),
            its.storage_offset(),
        )

    def reaches(self, other: Tensor) -> Tensor:
        """For each entry of ``other`` the flat index of the written entry in the same place of memory, else -1."""
        size = other.untyped_storage().nbytes() // other.element_size()
        places = torch.arange(size, device=other.device)

        def seen_by(view: Tensor) -> Tensor:
            return places.as_strided(view.shape, view.stride(), view.storage_offset())

        written = torch.full_like(places, -1)
        written[seen_by(self.tensor).flatten()] = torch.arange(self.tensor.numel(), device=other.device)
        return written[seen_by(other)]


@dataclass
class Marks:
    """The marks of one forward pass, by tensor (held weakly), and its in-place writes, by memory.

    ``_by_id``: the mark, and a weak reference that takes the entry away with the tensor.  Looked up several times in
    every call; ``WeakTensorKeyDictionary`` takes ten times as long.
    """

    _by_id: dict[int, tuple[Mark, Any]] = field(default_factory=dict)
    writes: dict[int, list[Write]] = field(default_factory=dict)
    views: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    def get(self, tensor: Tensor) -> Mark | None:
        entry = self._by_id.get(id(tensor))
        return None if entry is None else entry[0]

    def put(self, tensor: Tensor, mark: Mark) -> Tensor:
        mark.writes_seen = len(self._writes(tensor))
        marks, key = self._by_id, id(tensor)

        def forget(reference: Any) -> None:
            entry = marks.get(key)
            if entry is not None and entry[1] is reference:
                del marks[key]

        marks[key] = mark, weakref.ref(tensor, forget)
        return tensor

    def unseen(self, tensor: Tensor) -> Sequence[Write]:
        """The writes to the memory of ``tensor`` that its mark does not know of, oldest first."""
        writes = self._writes(tensor)
        mark = self.get(tensor) if writes else None
        return writes[mark.writes_seen :] if mark is not None else writes

    def know(self, tensor: Tensor, value: Tensor) -> None:
        """``value`` is what ``tensor`` holds by now."""
        mark = self.get(tensor)
        if mark is None:
            mark = Mark()
            self.put(tensor, mark)
        mark.current = None if value is tensor else value
        mark.writes_seen = len(self._writes(tensor))

    def write(self, tensor: Tensor, result: Tensor) -> None:
        """An in-place function turned ``tensor`` into ``result``."""
        self.writes.setdefault(_memory(tensor), []).append(Write(tensor, result))
        self.know(tensor, result)

    def settle(self) -> None:
        """The forward pass is over: let go what only later calls would have asked for.

        It would keep the memory of what in-place functions changed, and, as marks are reached from the graph that
        they hold, that of the whole pass for ever.
        """
        self.writes.clear()
        self.views.clear()
        for mark, _ in list(self._by_id.values()):
            mark.current = mark.source = mark.normed = None

    def reshape(self, tensor: Tensor, view: Tensor) -> None:
        """An in-place function like ``unsqueeze_`` made ``tensor`` another view of its memory."""
        if view is not tensor:
            self.views[tensor] = view

    def reshaped(self, tensor: Tensor) -> Tensor:
        """The view that ``tensor`` is by now."""
        while self.views and tensor in self.views:
            tensor = self.views[tensor]
        return tensor

    def _writes(self, tensor: Tensor) -> Sequence[Write]:
        return self.writes.get(_memory(tensor), ()) if self.writes else ()


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def share_memory(one: Tensor, other: Tensor) -> bool:
    """The two tensors are views of one piece of memory."""
    return one.layout == other.layout == torch.strided and _memory(one) == _memory(other)


_PLAIN = frozenset((int, float, bool, str, type(None)))


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """``value`` with every tensor in its (nested) lists, tuples and dicts changed; the containers are new."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in _PLAIN:
        return value
    if isinstance(value, list):
        return [map_tensors(item, change) for item in value]
    if isinstance(value, tuple):
        items = [map_tensors(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    return value
