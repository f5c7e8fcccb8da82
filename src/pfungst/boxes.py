"""Regions of pictures: which outputs of a convolution or pooling see a region, and which inputs those see."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

WHOLE = 0.7  # share of a layer's area from which it is computed as a whole


@dataclass(frozen=True)
class Box:
    """A region of the same size in each picture: its first row and column, (n,) each, its height and width."""

    tops: np.ndarray
    lefts: np.ndarray
    height: int
    width: int

    def holds(self, other: Box) -> bool:
        """Whether each region of the other lies in the one of this."""
        down, across = other.tops - self.tops, other.lefts - self.lefts
        return bool(
            ((down >= 0) & (down + other.height <= self.height)).all()
            and ((across >= 0) & (across + other.width <= self.width)).all()
        )

    def around(self, other: Box) -> Box:
        """The smallest box that holds both."""
        tops, lefts = np.minimum(self.tops, other.tops), np.minimum(self.lefts, other.lefts)
        bottoms = np.maximum(self.tops + self.height, other.tops + other.height)
        rights = np.maximum(self.lefts + self.width, other.lefts + other.width)
        return Box(tops, lefts, int((bottoms - tops).max()), int((rights - lefts).max()))

    def within(self, height: int, width: int) -> Box | None:
        """The box moved into a picture of this size; None if it is most of it."""
        if self.height * self.width > WHOLE * height * width or self.height > height or self.width > width:
            return None
        tops, lefts = self.tops.clip(0, height - self.height), self.lefts.clip(0, width - self.width)
        return Box(tops, lefts, self.height, self.width)


@dataclass(frozen=True)
class Window:
    """A window that moves over rows and columns: sizes, steps, padding and spacing, (rows, columns) each."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def output(self, height: int, width: int, ceil: bool = False) -> tuple[int, int]:
        """Height and width of what comes out."""
        sizes = []
        for axis, size in enumerate((height, width)):
            k, s, p, d = self.kernel[axis], self.stride[axis], self.padding[axis], self.dilation[axis]
            room = size + 2 * p - d * (k - 1) - 1
            count = (-(-room // s) if ceil else room // s) + 1
            if ceil and (count - 1) * s >= size + p:  # a window that would start in the padding behind the picture
                count -= 1
            sizes.append(count)
        return sizes[0], sizes[1]

    def reach(self, box: Box | None, height: int, width: int) -> Box | None:
        """Which outputs see a box of the inputs; None if most of them do.  ``height``, ``width``: of the output."""
        if box is None:
            return None
        starts, sizes = [], []
        for axis, (first, size) in enumerate(((box.tops, box.height), (box.lefts, box.width))):
            k, s, p, d = self.kernel[axis], self.stride[axis], self.padding[axis], self.dilation[axis]
            starts.append(-((d * (k - 1) - p - first) // s))  # ceil((first + p - d (k - 1)) / s)
            sizes.append((size - 1 + d * (k - 1)) // s + 1)
        return Box(starts[0], starts[1], min(sizes[0], height), min(sizes[1], width)).within(height, width)

    def needs(self, box: Box) -> Box:
        """Which inputs a box of the outputs sees, padding with them."""
        tops, lefts = (
            start * s - p for start, s, p in zip((box.tops, box.lefts), self.stride, self.padding, strict=True)
        )
        height, width = (
            (size - 1) * s + d * (k - 1) + 1
            for size, s, d, k in zip((box.height, box.width), self.stride, self.dilation, self.kernel, strict=True)
        )
        return Box(tops, lefts, height, width)


def list_places(box: Box, height: int, width: int) -> tuple[Tensor, Tensor | None]:
    """Places of the box's values among all pictures' pixels, (n h w,), and which of them lie outside, if any."""
    rows = box.tops[:, None] + np.arange(box.height)
    columns = box.lefts[:, None] + np.arange(box.width)
    beyond = None
    if rows.min() < 0 or columns.min() < 0 or rows.max() >= height or columns.max() >= width:
        out = ((rows < 0) | (rows >= height))[:, :, None] | ((columns < 0) | (columns >= width))[:, None, :]
        beyond = torch.from_numpy(out.reshape(-1))
        rows, columns = rows.clip(0, height - 1), columns.clip(0, width - 1)
    starts = np.arange(len(rows))[:, None] * height + rows
    return torch.from_numpy((starts[:, :, None] * width + columns[:, None, :]).reshape(-1)), beyond
