"""Sliding windows: relevance of pictures larger than the model's input (Montavon et al. 2018, section 6.5).

The model sees one window of the picture at a time; the relevance of a place is the mean over the windows that saw it.
A convolutional network is not run over the whole picture instead: its padding would then be elsewhere, and its maps
unreliable.  Windows are read, explained and added one batch after another, so that memory grows with the output map
alone, or with the width of the picture where a journal keeps the map on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pfungst.domains.large import Region
from pfungst.domains.preprocessing import Preprocess
from pfungst.errors import SettingError
from pfungst.journals import Journal
from pfungst.lrp import LRP

Pair = tuple[int, int]

# Inputs (m, C, h, w) and targets to one stack of maps (m, h, w) a target.
Mapper = Callable[[Tensor, Sequence[int]], Iterable[Tensor]]


@dataclass(frozen=True)
class Windows:
    """Where windows lie: ``window`` and ``stride`` are (height, width) in the picture's pixels."""

    window: Pair
    stride: Pair

    def starts(self, size: Pair) -> tuple[list[int], list[int]]:
        """First rows and first columns of the windows of a picture (height, width): all its pixels are covered.

        One window a stride from the top left; the last row and column of windows end with the picture.
        """
        rows, columns = (
            sorted({*range(0, length - side + 1, step), length - side})
            for length, side, step in zip(size, self.window, self.stride, strict=True)
        )
        return rows, columns

    def count(self, size: Pair) -> int:
        """How many windows a picture has; 0 where it is smaller than one."""
        if any(length < side for length, side in zip(size, self.window, strict=True)):
            return 0
        rows, columns = self.starts(size)
        return len(rows) * len(columns)


def make_windows(window: int | Pair, stride: int | Pair | None) -> Windows:
    """Windows of this size; ``stride`` None: half of it.  Raises SettingError where pixels would be left out."""
    sides = (window, window) if isinstance(window, int) else tuple(window)
    if len(sides) != 2 or any(side < 1 for side in sides):
        raise SettingError(f"window is {window!r}", "give a side of at least 1 pixel, or (height, width)")
    steps = tuple(max(1, side // 2) for side in sides) if stride is None else stride
    steps = (steps, steps) if isinstance(steps, int) else tuple(steps)
    if len(steps) != 2 or any(not 1 <= step <= side for step, side in zip(steps, sides, strict=True)):
        raise SettingError(
            f"stride is {stride!r} with a window of {sides[0]} x {sides[1]}",
            "give at least 1 and at most the window, so that every pixel is seen",
        )
    return Windows((sides[0], sides[1]), (steps[0], steps[1]))


def window_preprocess(preprocess: Preprocess) -> Preprocess:
    """The same for windows: a window of the input's size is not resized, any other is, whole.

    Raises SettingError for a model's own function, of which nobody knows which pixels it keeps.
    """
    if preprocess.custom is not None:
        raise SettingError(
            "the model's own preprocess is a function, which may crop or resize windows",
            "give --size, --mean and --std, or leave --window out",
        )
    return replace(preprocess, resize=preprocess.size, crop="squash")


@dataclass(frozen=True)
class Slid:
    """Relevance of one picture by sliding windows.

    maps     (targets, H, W) float32: the mean relevance of each pixel, channels summed, over the windows that saw it
    totals   by target, the mean over windows of the sum of their relevance; if not finite, the maps are not complete
    """

    maps: np.ndarray
    totals: tuple[float, ...]


def mean_output(
    model: Callable[[Tensor], Tensor],
    picture: Region,
    preprocess: Preprocess,
    windows: Windows,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    tell: Callable[[int], None] = lambda done: None,
    journal: Journal | None = None,
) -> Tensor:
    """The model's outputs (outputs,) float64, mean over the windows.

    ``tell``: called with how many windows were just done.  ``journal``: what is done already, and is not done again.
    """
    rows, columns = windows.starts(picture.size)
    journal = journal or Journal()
    state, _ = journal.read("output")
    total, done = torch.tensor(state.get("total", 0.0), dtype=torch.float64), state.get("done", 0)
    tell(done * len(columns))
    for number, top in enumerate(rows[done:], done + 1):
        for lefts, inputs in _batches(picture, preprocess, windows, top, columns, batch_size):
            with torch.no_grad():
                total = total + model(inputs.to(device)).double().sum(0).cpu()
            tell(len(lefts))
        if not bool(torch.isfinite(total).all()):  # whatever the other windows give
            return total
        journal.write("output", {"done": number, "total": total.tolist()}, last=number == len(rows))
    return total / (len(rows) * len(columns))


def lrp_maps(lrp: LRP) -> Mapper:
    """Maps by LRP, channels summed: one forward pass for all targets."""

    def explain(inputs: Tensor, targets: Sequence[int]) -> Iterator[Tensor]:
        trace = lrp.trace(inputs)
        for k, target in enumerate(targets):
            yield trace.relevance(target, last=k == len(targets) - 1).scores.detach().double().sum(1)

    return explain


def slide(
    lrp: LRP | Mapper,
    picture: Region,
    preprocess: Preprocess,
    windows: Windows,
    targets: Sequence[int],
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    tell: Callable[[int], None] = lambda done: None,
    journal: Journal | None = None,
) -> Slid:
    """Relevance of every pixel for these outputs.  ``preprocess``: as ``window_preprocess`` makes it.

    ``lrp``: or any other function from windows and targets to maps, one stack a target; each method of ``methods.py``
    is one as ``lambda x, targets: [method(x, target) for target in targets]``.
    Only the band of rows that one row of windows sees is summed up in memory; what no later window sees goes to the
    output map, which is a file of the ``journal`` if that has a folder.
    """
    rows, columns = windows.starts(picture.size)
    height, width = windows.window
    seen = [_times_seen(*sides) for sides in zip((rows, columns), windows.window, picture.size, strict=True)]
    to_rows, to_columns = (_spreading(*sides) for sides in zip(preprocess.size, windows.window, strict=True))
    explain = lrp_maps(lrp) if isinstance(lrp, LRP) else lrp
    journal = journal or Journal()
    state, band = journal.read("maps")
    if state.get("targets") != list(targets):
        state, band = {}, None
    done, totals = state.get("done", 0), np.array(state.get("totals", [0.0] * len(targets)))
    maps = journal.open_array("map", (len(targets), *picture.size), go_on=bool(state))
    if band is None:
        band = np.zeros((len(targets), height, picture.size[1]), np.float32)
    tell(done * len(columns))
    for number, top in enumerate(rows[done:], done + 1):
        for lefts, inputs in _batches(picture, preprocess, windows, top, columns, batch_size):
            for k, maps_of_one in enumerate(explain(inputs.to(device), targets)):
                scores = maps_of_one.detach().double()
                totals[k] += float(scores.sum())
                for left, one in zip(lefts, scores.cpu().numpy(), strict=True):
                    band[k, :, left : left + width] += to_rows @ one @ to_columns.T
            tell(len(lefts))
        if not np.isfinite(totals).all():
            break
        ready = (rows[number] if number < len(rows) else top + height) - top
        maps[:, top : top + ready] = band[:, :ready] / (seen[0][top : top + ready, None] * seen[1])
        band = np.concatenate([band[:, ready:], np.zeros_like(band[:, :ready])], axis=1)
        told = {"targets": list(targets), "done": number, "totals": totals.tolist()}
        journal.write("maps", told, band, last=number == len(rows))
    return Slid(maps, tuple(float(total) / (len(rows) * len(columns)) for total in totals))


def shrink_picture(picture: Region, factor: int) -> np.ndarray:
    """The picture ``factor`` times smaller, each pixel the mean of a square, as uint8; read in pieces."""
    side = 64 * factor
    height, width = picture.size
    rows = [
        np.concatenate(
            [
                np.asarray(picture.read(y, x, min(side, height - y), min(side, width - x)).reduce(factor))
                for x in range(0, width, side)
            ],
            axis=1,
        )
        for y in range(0, height, side)
    ]
    return np.concatenate(rows)


def shrink_maps(maps: np.ndarray, factor: int) -> np.ndarray:
    """Maps (n, H, W) ``factor`` times smaller: the mean relevance of a pixel in each square."""
    if factor == 1:
        return maps
    for axis in (1, 2):
        starts = np.arange(0, maps.shape[axis], factor)
        lengths = np.diff([*starts, maps.shape[axis]]).reshape((-1, 1) if axis == 1 else -1)
        maps = (np.add.reduceat(maps, starts, axis) / lengths).astype(np.float32)
    return maps


def _batches(
    picture: Region, preprocess: Preprocess, windows: Windows, top: int, columns: Sequence[int], batch_size: int
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """The windows of one row, as their first columns and inputs (m, C, H, W)."""
    for start in range(0, len(columns), batch_size):
        part = columns[start : start + batch_size]
        yield part, torch.stack([preprocess(picture.read(top, left, *windows.window)) for left in part])


def _spreading(given: int, wanted: int) -> np.ndarray:
    """(wanted, given): how one side of a map is cut into another number of equal parts; its columns add up to 1."""
    ends, edges = np.arange(given + 1) / given, np.arange(wanted + 1) / wanted
    low, high = np.maximum(edges[:-1, None], ends[None, :-1]), np.minimum(edges[1:, None], ends[None, 1:])
    return np.clip(high - low, 0, None) * given


def _times_seen(starts: Sequence[int], side: int, length: int) -> np.ndarray:
    """How many windows along one side saw each pixel, (length,)."""
    changes = np.zeros(length + 1, int)
    np.add.at(changes, starts, 1)
    np.add.at(changes, np.array(starts) + side, -1)
    return changes.cumsum()[:-1]
