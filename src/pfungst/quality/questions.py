"""What a measure is asked about, and what it answers: a batch of pictures with their maps, one number a picture."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pfungst.baselines import sum_content
from pfungst.errors import SettingError
from pfungst.lrp.modules import ask_model
from pfungst.methods import Method

MASKS, METHOD = "masks", "method"


@dataclass(frozen=True, eq=False)
class Question:
    """A batch of pictures, their maps, and whom to ask.

    model       gives outputs (n, classes); logits, or probabilities that sum to 1
    x, target   inputs (n, C, H, W) and the class of each whose score is explained, (n,)
    maps        (n, H, W), what is judged
    method      what made them, for measures that need maps of other pictures, classes or models; None where unknown
    masks       (n, H, W) bool, where the object is; None where nobody knows
    low, high   least and greatest input value, by channel (C, 1, 1); by default those of the batch
    chunk       so many pictures are asked at once; by default what suits their size (``choose_chunk``)
    known       the model's outputs for the pictures, if they are known
    """

    model: Callable[[Tensor], Any]
    x: Tensor
    target: Tensor
    maps: Tensor
    method: Method | None = None
    masks: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    chunk: int | None = None
    known: Tensor | None = None

    def __post_init__(self) -> None:
        if self.x.dim() != 4 or self.maps.shape != (len(self.x), *self.x.shape[2:]) or len(self.target) != len(self.x):
            shapes = f"{tuple(self.x.shape)}, {tuple(self.maps.shape)}, {tuple(self.target.shape)}"
            raise SettingError(f"inputs, maps and targets of shapes {shapes}", "give (n, C, H, W), (n, H, W), (n,)")
        if self.masks is not None and self.masks.shape != self.maps.shape:
            raise SettingError(f"masks of shape {tuple(self.masks.shape)}", "give one for each map, of its shape")

    def about(self, maps: Tensor, **other: Any) -> Question:
        """The same pictures with other maps; ``other`` fields may differ as well, but for ``model`` and ``x``: what
        the model said is not asked again."""
        return replace(self, maps=maps, known=self.outputs, **other)

    @functools.cached_property
    def outputs(self) -> Tensor:
        """The model's outputs for the pictures as they are, (n, classes)."""
        return ask(self.model, self.x, self.chunk) if self.known is None else self.known

    @functools.cached_property
    def layout(self) -> torch.memory_format:
        """How inputs lie in memory when the model is asked many times: with channels last convolutions on a CPU take
        two thirds of the time.  Only where the model takes such inputs, and says the same of them."""
        if self.x.device.type != "cpu":
            return torch.contiguous_format
        try:
            other = ask(self.model, self.x.contiguous(memory_format=torch.channels_last), self.chunk)
        except RuntimeError:  # .view() of what does not lie in one piece
            return torch.contiguous_format
        same = torch.allclose(other, self.outputs, rtol=1e-4, atol=1e-5 * float(self.outputs.abs().max()))
        return torch.channels_last if same else torch.contiguous_format

    @functools.cached_property
    def ends(self) -> tuple[Tensor, Tensor]:
        """Least and greatest input value by channel, each (C, 1, 1)."""
        low = self.x.amin((0, 2, 3))[:, None, None] if self.low is None else self.low
        high = self.x.amax((0, 2, 3))[:, None, None] if self.high is None else self.high
        return low, high


@dataclass(frozen=True)
class Scores:
    """One number a picture, (n,), by the name of the figure; NaN where it is not defined.

    ``curves``: what figures were made of, (n, steps), by name, with the share of the picture at each step, (steps,).
    """

    figures: Mapping[str, Tensor]
    curves: Mapping[str, Tensor] = field(default_factory=dict)
    shares: Tensor | None = None


def choose_chunk(x: Tensor) -> int:
    """Pictures of this size that are best asked at once: on a CPU as few as keep it busy, since what they need must fit
    its caches (SqueezeNet at 225 pixels: 8 at once take 55 % of the time of 64); on a GPU a hundred of 224 pixels."""
    numbers = max(1, x[0].numel())
    if x.device.type == "cpu":
        return min(32, max(8, 1_200_000 // numbers))
    return min(2048, max(64, 20_000_000 // numbers))


@torch.inference_mode()
def ask(model: Callable[[Tensor], Any], x: Tensor, chunk: int | None = None) -> Tensor:
    """The model's outputs, (n, classes), asked in chunks."""
    parts = [ask_model(model, part) for part in x.split(chunk or choose_chunk(x))]
    output = parts[0] if len(parts) == 1 else torch.cat(parts)
    if output.dim() != 2:
        raise SettingError(f"outputs of shape {tuple(output.shape)}", "measures need a classifier: (n, classes)")
    return output


def probabilities(outputs: Tensor) -> Tensor:
    """Softmax over classes; outputs that are probabilities already stay, and a single one gets a sigmoid."""
    if outputs.shape[1] == 1:
        return outputs.sigmoid()
    ready = bool((outputs >= 0).all()) and bool(((outputs.double().sum(1) - 1).abs() < 1e-3).all())
    return outputs if ready else outputs.softmax(1)


def seeded(x: Tensor, salt: int = 0) -> Iterator[torch.Generator]:
    """A generator for each picture, from its content and ``salt``: no batch changes what is drawn."""
    for one in x:
        # Into the sum itself: torch's generator looks at the last 32 bits of a seed only.
        yield torch.Generator().manual_seed(zlib.crc32(salt.to_bytes(8, "little"), sum_content(one)))


def ranks(values: Tensor) -> Tensor:
    """The place of each value in its row in ascending order, (n, m); equal values share their mean place."""
    order = values.argsort(dim=1, stable=True)
    ordered = values.gather(1, order)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = new.long().cumsum(1) - 1
    place = torch.arange(values.shape[1], device=values.device, dtype=torch.double).expand_as(values)
    total = torch.zeros_like(values, dtype=torch.double).scatter_add_(1, group, place)
    count = torch.zeros_like(total).scatter_add_(1, group, torch.ones_like(total))
    return torch.empty_like(total).scatter_(1, order, (total / count.clamp(min=1)).gather(1, group))


def correlate(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of each row of a with that of b, (n,); NaN where one of them is constant."""
    a, b = (t.flatten(1).double() - t.flatten(1).double().mean(1, keepdim=True) for t in (a, b))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each row of a with that of b, (n,); NaN where one of them is zero."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
