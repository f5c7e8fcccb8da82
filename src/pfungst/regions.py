"""Findings -> regions: where in the pictures the model sees what sets a group apart.

Two kinds of map lead there.  From pixels: a sample's relevance less the mean relevance of its class outside the
group.  From a layer: relevance by channel, weighted by the direction that tells the group from the rest, so that a
cue may move from picture to picture.  A region is *fixed* (one mask, from the mean map) or *moving* (one a sample).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pfungst.errors import ModelError
from pfungst.lrp import LRP
from pfungst.vectors import unit_rows

_TRANSFORMED = 2**22  # pixels of maps that are transformed at once


@dataclass(frozen=True)
class Laboratory:
    """Everything needed to change pictures of a data set and ask the model again.

    load     rows of the data set -> model inputs (m, C, H, W) on the model's device
    low, high  smallest and greatest input value of each channel, (C,)
    batch    samples asked at once
    given    rows of the data set -> pixel relevance (m, H, W) made elsewhere, which takes the place of one's own
    """

    lrp: LRP
    load: Callable[[Sequence[int]], Tensor]
    low: Tensor
    high: Tensor
    batch: int = 32
    given: Callable[[Sequence[int]], Tensor] | None = None

    def ask(self, inputs: Tensor) -> Tensor:
        """The model's outputs, (m, classes) float64."""
        with torch.no_grad():
            parts = [self.lrp.model(part) for part in inputs.split(self.batch)]
        outputs = torch.cat(parts).double()
        if not bool(torch.isfinite(outputs).all()):
            raise ModelError(
                "the model returns NaN or infinity for a changed picture",
                "make it bear any pixel values between the smallest and the greatest of its input",
            )
        return outputs

    def explain(self, inputs: Tensor, target: int, layers: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixel relevance (m, H, W), channels summed, and relevance at the layers (m, channels, h, w)."""
        pixels, found = [], []
        for part in inputs.split(self.batch):
            result = self.lrp(part, target, layers=layers)
            pixels.append(result.scores.sum(1))
            found.append(result.layers)
        return torch.cat(pixels), {name: torch.cat([one[name] for one in found]) for name in layers}


@dataclass(frozen=True)
class Direction:
    """What tells a group from the rest of its class in the channels of one layer: weights (channels,)."""

    layer: str
    weights: np.ndarray


def find_direction(layer: str, sums: np.ndarray, inside: np.ndarray) -> Direction:
    """Fisher's discriminant between the group (``inside``, (n,) bool) and the rest, on ``sums`` (n, channels)."""
    rows = unit_rows(sums.astype(np.float64))
    a, b = rows[inside], rows[~inside]
    within = np.cov(a.T, bias=True) * len(a) + np.cov(b.T, bias=True) * len(b)
    within = np.atleast_2d(within) / len(rows)
    ridge = 0.1 * np.trace(within) / len(within) + 1e-12
    return Direction(layer, np.linalg.solve(within + ridge * np.eye(len(within)), a.mean(0) - b.mean(0)))


def smooth_maps(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian smoothing of (m, H, W) maps, edges repeated.

    Where the width is many pixels of a large map, the map is made smaller first, so that cost does not grow with it.
    """
    factor = min(int(sigma / 4), min(maps.shape[1:]) // 16)
    if factor > 1:
        small = functional.avg_pool2d(maps[:, None], factor, ceil_mode=True, count_include_pad=False)[:, 0]
        small = smooth_maps(small, sigma / factor)
        return functional.interpolate(small[:, None], maps.shape[1:], mode="bilinear", align_corners=False)[:, 0]
    radius = max(1, round(2.5 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    out = functional.pad(maps[:, None], (radius,) * 4, mode="replicate")
    return functional.conv2d(functional.conv2d(out, kernel[None, None, :, None]), kernel[None, None, None, :])[:, 0]


def pixel_cue_maps(pixels: Tensor, outside: Tensor) -> Tensor:
    """Maps (m, H, W) of what pixel relevance shows beyond the mean of the class outside the group."""
    sigma = max(pixels.shape[1:]) / 40

    def prepared(maps: Tensor) -> Tensor:
        maps = smooth_maps(maps, sigma)
        return maps / maps.flatten(1).norm(dim=1).clamp(min=1e-30)[:, None, None]

    return prepared(pixels) - prepared(outside).mean(0)


def layer_cue_maps(relevance: Tensor, direction: Direction, size: tuple[int, int]) -> Tensor:
    """Maps (m, H, W) of the layer's relevance along the direction, enlarged to the size of the input."""
    norms = relevance.sum((2, 3)).norm(dim=1).clamp(min=1e-30)
    weights = torch.as_tensor(direction.weights, dtype=relevance.dtype, device=relevance.device)
    maps = torch.einsum("mchw,c->mhw", relevance, weights) / norms[:, None, None]
    maps = functional.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    return smooth_maps(maps, max(size) / 40)


def mask_strongest(maps: Tensor, area: float) -> Tensor:
    """(m, H, W) bool: of each map the ``area`` (share of all pixels) with the greatest values above zero."""
    count = max(1, round(area * maps[0].numel()))
    flat = maps.flatten(1)
    limit = flat.topk(count, dim=1).values[:, -1:].clamp(min=1e-30)
    return (flat >= limit).reshape(maps.shape)


def mask_core(maps: Tensor, area: float, share: float = 0.5) -> Tensor:
    """(m, H, W) bool: of each map the fewest pixels that hold ``share`` of its positive sum, at most ``area``."""
    flat = maps.flatten(1).clamp(min=0)
    values, order = flat.sort(dim=1, descending=True)
    before = values.cumsum(1) - values
    core = before < share * values.sum(1, keepdim=True)
    core[:, max(1, round(area * flat.shape[1])) :] = False
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, order, core).reshape(maps.shape)


def control_masks(masks: Tensor, relevance: Tensor, steps: int = 12) -> Tensor:
    """The matched control of a cut: masks (m, H, W) of the same size where positive relevance is not.

    Each mask is moved, wrapping round, to where it covers least relevance and hardly itself.  Where there is no such
    place (a frame always covers the middle when moved), the least relevant blocks of the same total size are taken.
    """
    height, width = masks.shape[1:]
    weight = smooth_maps(relevance.clamp(min=0), max(height, width) / 40)
    weight = weight / weight.flatten(1).sum(1).clamp(min=1e-30)[:, None, None]
    at_once = max(1, _TRANSFORMED // (height * width))
    parts = zip(masks.split(at_once), weight.split(at_once), strict=True)
    return torch.cat([_move_masks(*part, steps) for part in parts])


def _move_masks(masks: Tensor, weight: Tensor, steps: int) -> Tensor:
    """``control_masks`` for some masks, with the relevance to be avoided, which sums to 1.

    What a moved mask covers, for all ways to move it, is a correlation (Fourier transform): 8 times as fast, where
    pictures have 224 pixels, as to move it in one way after the other.
    """
    count, height, width = masks.shape
    covered = masks.double()
    size = covered.flatten(1).sum(1).clamp(min=1)
    spectrum = torch.fft.rfft2(covered).conj()
    dy, dx = (torch.arange(steps, device=masks.device) * side // steps for side in (height, width))

    def cover(maps: Tensor) -> Tensor:
        sums = torch.fft.irfft2(torch.fft.rfft2(maps.double()) * spectrum, s=(height, width))
        return sums[:, dy][:, :, dx].flatten(1)

    cost = cover(weight) + 2 * (cover(covered) / size[:, None] - 0.1).clamp(min=0)
    first = 1e-12 * torch.arange(steps**2, device=masks.device)  # of equal ones, beyond what a transform rounds
    best = (cost + first).argmin(1, keepdim=True)
    rows = (torch.arange(height, device=masks.device) - dy[best // steps]) % height
    columns = (torch.arange(width, device=masks.device) - dx[best % steps]) % width
    moved = masks[torch.arange(count, device=masks.device)[:, None, None], rows[:, :, None], columns[:, None, :]]
    share = size / (height * width)
    return torch.where((cost.gather(1, best)[:, 0] <= share)[:, None, None], moved, _least_relevant(masks, weight))


def _least_relevant(masks: Tensor, weight: Tensor, cells: int = 12) -> Tensor:
    """Blocks of least relevance outside each mask, as many pixels as the mask has."""
    height, width = masks.shape[1:]
    blocks = functional.adaptive_avg_pool2d(weight[:, None], min(cells, height, width))
    cost = functional.interpolate(blocks, size=(height, width), mode="nearest")[:, 0]
    flat = (cost + masks.to(cost.dtype) * (1 + cost.max())).flatten(1)
    order = flat.argsort(dim=1, stable=True)
    position = torch.arange(flat.shape[1], device=flat.device)
    chosen = position < masks.flatten(1).sum(1, keepdim=True)
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, order, chosen).reshape(masks.shape)


@dataclass(frozen=True)
class Region:
    """How to find the finding's region in any picture of the class.

    kind     fixed, moving, or whole: a property of the whole picture
    source   "pixels", or the layer whose channels show it, "border" for a frame, or the property
    area     share of the picture, 0..1
    mask     (H, W) bool, of a fixed region; None for a moving one
    part     what of it is put on other pictures: all pixels, or their fine detail: what shines through, a watermark say
    """

    kind: str
    source: str
    area: float
    mask: Tensor | None = None
    part: str = "all"

    def masks(self, maps: Mapping[str, Tensor]) -> Tensor:
        """(m, H, W) bool for samples with these cue maps, by source."""
        if self.kind == "whole":
            return torch.ones_like(maps["pixels"], dtype=torch.bool)
        if self.mask is not None:
            return self.mask.expand(maps["pixels"].shape)
        return mask_strongest(maps[self.source], self.area)


def touches_border(mask: Tensor, share: float = 0.4) -> bool:
    """Whether a mask (H, W) covers at least this share of the picture's rim (a twelfth of its side wide)."""
    height, width = mask.shape
    rim = max(1, round(min(height, width) / 12))
    edge = torch.ones_like(mask)
    edge[rim : height - rim, rim : width - rim] = False
    return bool(mask[edge].float().mean() >= share)
