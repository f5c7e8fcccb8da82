"""Places of a forward pass, the outputs of layers, at which relevance is read, masked or started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from pfungst.errors import SettingError


@dataclass(frozen=True, eq=False)
class Place:
    """The output of one call of a layer.

    tensors  the tensor, and for a convolution into which a batch norm was merged also what the batch norm made of it:
             relevance comes by either.  The value of the place is the last one.
    raw      for each: its gradient carries relevance R, not c = R / activation
    """

    name: str
    tensors: tuple[Tensor, ...]
    raw: tuple[bool, ...]

    @property
    def value(self) -> Tensor:
        return self.tensors[-1].detach()

    def relevance(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """R at this place from the gradients at its tensors."""
        total = torch.zeros_like(self.value)
        for tensor, raw, g in zip(self.tensors, self.raw, gradients, strict=True):
            if g is not None:
                total = total + (g if raw else (g * tensor).detach())
        return total

    def start(self, c: Tensor) -> Tensor:
        """The gradient with which relevance c · value starts here, at the last tensor."""
        return c * self.value if self.raw[-1] else c

    def depends_on(self, other: Place) -> bool:
        """``other`` lies between the input and this place."""
        wanted = {get_gradient_edge(tensor).node for tensor in other.tensors}
        todo = [get_gradient_edge(tensor).node for tensor in self.tensors]
        if other is self or any(node in wanted for node in todo):
            return False
        seen: set[Any] = set()
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in wanted:
                return True
            todo.extend(upper for upper, _ in node.next_functions if upper is not None)
        return False


@dataclass(frozen=True, eq=False)
class Channels:
    """Some channels of a layer: ``indices`` along ``axis`` of its output (1; -1 in transformers)."""

    indices: int | Sequence[int]
    axis: int = 1


Part = int | Sequence[int] | Channels | Tensor
Condition = Mapping[str, Part]


def mask_for(part: Part, place: Place) -> Tensor:
    """What of the relevance at a place goes on, as factors that broadcast against its value.

    A number or list of numbers: these channels, along axis 1.  A tensor: factors or bools for the channels (C,), for
    the channels of each sample (n, C), or for every entry.
    """
    value = place.value
    if isinstance(part, Tensor) and (part.dtype == torch.bool or part.is_floating_point()):
        mask = part.to(value)
        for shape in (value.shape, value.shape[1:]):
            if mask.shape == shape:
                return mask.expand(value.shape)
        ones = [1] * (value.dim() - 2)
        if mask.shape in (value.shape[1:2], value.shape[:2]):
            return mask.reshape(-1 if mask.dim() == 2 else 1, value.shape[1], *ones)
        raise SettingError(
            f"the mask for {place.name!r} has shape {tuple(part.shape)}, its output {tuple(value.shape)}",
            "give factors for its channels, (C,) or (n, C), or for every entry",
        )
    channels = part if isinstance(part, Channels) else Channels(part)  # type: ignore[arg-type]
    indices = torch.as_tensor(channels.indices, device=value.device).reshape(-1).long()
    axis = channels.axis % value.dim()
    if axis == 0 or bool(((indices < 0) | (indices >= value.shape[axis])).any()):
        raise SettingError(
            f"channels {channels.indices} along axis {channels.axis} of {place.name!r}, whose output is "
            f"{tuple(value.shape)}",
            f"its channels are 0 to {value.shape[axis] - 1}; axis 0 holds the samples",
        )
    mask = torch.zeros(value.shape[axis], dtype=value.dtype, device=value.device)
    mask[indices] = 1
    return mask.reshape([-1 if i == axis else 1 for i in range(value.dim())])


def order(places: Sequence[Place]) -> list[list[Place]]:
    """Places from the output to the input, in groups: members of a group lie beside each other."""
    left, groups = list(places), []
    while left:
        group = [p for p in left if not any(q.depends_on(p) for q in left)]
        groups.append(group)
        left = [p for p in left if p not in group]
    return groups
