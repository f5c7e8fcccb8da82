"""Relevance maximisation: for each channel of a layer, the samples and crops in which it matters most to the model.

What makes a channel relevant says what it stands for in the model's decisions; what makes it active, what it responds
to.  Source: Achtibat et al. 2023 (Nature Machine Intelligence), "RelMax".
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pfungst.errors import RelevanceError, SettingError
from pfungst.lrp.engine import LRP
from pfungst.lrp.even import Reach
from pfungst.lrp.presets import Preset, Row
from pfungst.lrp.rules import Epsilon
from pfungst.lrp.streams import Split, batches, device_of


@dataclass(frozen=True, eq=False)
class Reference:
    """One sample in which a channel is relevant.

    sample  its number in the data, in the loader's order, from 0
    score   the channel's relevance, as ``by`` and ``normalise`` say
    place   the most relevant place of the channel in the layer, () if it has none
    box     the part of the input that reaches that place, one slice an axis behind the channels
    crop    the input there, (channels, ...)
    """

    sample: int
    score: float
    place: tuple[int, ...]
    box: tuple[slice, ...]
    crop: Tensor


def relevance_maximisation(
    lrp: LRP,
    loader: Iterable[Any],
    layer: str,
    channels: Sequence[int] | None = None,
    *,
    target: Any = None,
    k: int = 8,
    by: str = "sum",
    normalise: bool = True,
    split: Split | None = None,
    device: torch.device | str | None = None,
) -> dict[int, list[Reference]]:
    """The ``k`` samples with the greatest relevance of each channel, the greatest first.

    The loader is read once, batch by batch; only what ranks among the k is kept, as a crop.

    channels   of ``layer``, along axis 1 of its output; default: all
    target     as for ``LRP.stream``: "label" takes the batches' labels
    by         a channel's relevance over its places: ``sum``, or ``max``, which does not favour what is large
    normalise  as a share of the layer's absolute relevance, so that samples with great outputs do not fill the list
    """
    if by not in ("sum", "max") or k < 1:
        raise SettingError(f"relevance_maximisation: by={by!r}, k={k}", "by is 'sum' or 'max', k at least 1")
    where = device_of(lrp.model) if device is None else device
    best: dict[int, list[Reference]] = {}
    count = 0
    for x, labels in batches(loader, split, where):
        if isinstance(target, str) and (target != "label" or labels is None):
            raise SettingError(f"target={target!r} for batches without labels", "give 'label' and (x, labels) batches")
        result = lrp(x, labels if isinstance(target, str) else target, layers=[layer])
        scores, places = channel_relevance(result.layers[layer], by, normalise)
        chosen = range(scores.shape[1]) if channels is None else channels
        if not all(0 <= channel < scores.shape[1] for channel in chosen):
            raise SettingError(f"channels {list(chosen)} of {layer!r}", f"it has channels 0 to {scores.shape[1] - 1}")
        new = {channel: _better(scores[:, channel], best.get(channel, []), k) for channel in chosen}
        boxes = _boxes(lrp, x, layer, result.layers[layer].shape, places, new)
        for channel, rows in new.items():
            found = best.get(channel, [])
            for row in rows:
                place, box = tuple(places[row, channel].tolist()), boxes[row, channel]
                crop = _picture(x)[row][(slice(None), *box)].detach().cpu().clone()
                found = [*found, Reference(count + row, float(scores[row, channel]), place, box, crop)]
            best[channel] = sorted(found, key=lambda one: (-one.score, one.sample))[:k]
        count += len(scores)
    if not count:
        raise SettingError("relevance_maximisation: the loader has no batches", "give data")
    return best


def channel_relevance(relevance: Tensor, by: str = "sum", normalise: bool = True) -> tuple[Tensor, Tensor]:
    """Relevance at a layer (n, C, ...) -> that of each channel, (n, C), and its most relevant place, (n, C, axes)."""
    flat = relevance.flatten(2) if relevance.dim() > 2 else relevance[:, :, None]
    greatest, at = flat.max(2)
    scores = flat.sum(2) if by == "sum" else greatest
    if normalise:
        scores = scores / flat.abs().sum((1, 2))[:, None].clamp(min=torch.finfo(flat.dtype).tiny)
    shape = relevance.shape[2:]
    places = torch.stack(torch.unravel_index(at, shape), -1) if shape else at.new_zeros(*at.shape, 0)
    return scores, places


def receptive_fields(lrp: LRP, x: Any, layer: str, seeds: Iterable[Tensor]) -> Iterator[Tensor]:
    """Which entries of the input reach the marked units of a layer, whatever the values: bools of the input's shape.

    seeds  tensors of the shape of the layer's output (n, ...), not zero at the units of each sample

    Only connections count: an input that the present weights ignore is in reach, one that no path joins is not.
    Raises RelevanceError where a function on the way has no even share (``even.py``).
    """
    way = copy.copy(lrp)
    way.preset = Preset("reach", (Row(Epsilon(0.0)),), even=(layer, Reach()))
    trace = way.trace(x, layers=[layer])
    for seed in seeds:
        yield _picture(trace.reach(layer, seed)) != 0


def _better(scores: Tensor, found: Sequence[Reference], k: int) -> list[int]:
    """The rows of a batch that rank among the k greatest so far."""
    least = found[-1].score if len(found) == k else -torch.inf
    order = scores.argsort(descending=True, stable=True)[:k].tolist()
    return [row for row in order if float(scores[row]) > least]


def _boxes(
    lrp: LRP, x: Any, layer: str, shape: torch.Size, places: Tensor, new: dict[int, list[int]]
) -> dict[tuple[int, int], tuple[slice, ...]]:
    """The part of the input that reaches the most relevant place of each (row, channel) that is new.

    The whole input, where a function before the layer does not share evenly, such as attention.
    """
    waiting: dict[int, list[int]] = {}
    for channel, rows in new.items():
        for row in rows:
            waiting.setdefault(row, []).append(channel)
    picture = _picture(x)
    boxes = {(r, c): tuple(slice(0, size) for size in picture.shape[2:]) for r, some in waiting.items() for c in some}
    # One way back serves one channel of every row.
    rounds = [
        {row: some[i] for row, some in waiting.items() if i < len(some)}
        for i in range(max(map(len, waiting.values()), default=0))
    ]

    def seeds() -> Iterator[Tensor]:
        for one in rounds:
            seed = torch.zeros(shape, dtype=picture.dtype, device=picture.device)
            for row, channel in one.items():
                seed[(row, channel, *places[row, channel].tolist())] = 1
            yield seed

    try:
        for one, field in zip(rounds, receptive_fields(lrp, x, layer, seeds()), strict=True):
            boxes.update({(row, channel): bounding_box(field[row].any(0)) for row, channel in one.items()})
    except RelevanceError:
        pass
    return boxes


def bounding_box(touched: Tensor) -> tuple[slice, ...]:
    """The smallest box, one slice an axis, that holds every true entry."""
    box = []
    for axis in range(touched.dim()):
        others = [a for a in range(touched.dim()) if a != axis]
        on = (touched.any(others) if others else touched).nonzero()[:, 0]
        box.append(slice(int(on[0]), int(on[-1]) + 1) if len(on) else slice(0, 0))
    return tuple(box)


def _picture(x: Any) -> Tensor:
    """The one input, (n, channels, ...)."""
    tensors = [x] if isinstance(x, Tensor) else list(x.values() if isinstance(x, dict) else x)
    tensors = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
    if len(tensors) != 1:
        raise SettingError(f"crops of {len(tensors)} inputs", "give a model with one floating-point input")
    return tensors[0]
