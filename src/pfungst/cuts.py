"""Changes of a part of a picture: what is masked is filled in one of several ways, or comes from another picture.

Pictures are model inputs (m, C, H, W), masks (m, H, W) bool.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pfungst.alterations import exchange_detail
from pfungst.regions import smooth_maps


def fill_noise(inputs: Tensor, masks: Tensor, low: Tensor, high: Tensor, seed: int) -> Tensor:
    """The masked pixels become uniform noise between the channel's smallest and greatest value."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(inputs.shape, generator=generator).to(inputs)
    noise = low[:, None, None] + noise * (high - low)[:, None, None]
    return torch.where(masks[:, None], noise, inputs)


def fill_colour(inputs: Tensor, masks: Tensor) -> Tensor:
    """The masked pixels take the smoothed colours of what lies around the mask."""
    keep = (~masks).to(inputs.dtype)
    height, width = inputs.shape[2:]
    filled = torch.zeros_like(inputs)
    missing = torch.ones_like(keep)
    for sigma in (max(height, width) / 24, max(height, width) / 6, float(max(height, width))):
        weight = smooth_maps(keep, sigma)
        colours = [smooth_maps(inputs[:, c] * keep, sigma) for c in range(inputs.shape[1])]
        usable = ((weight > 0.05) & (missing > 0)).to(inputs.dtype)
        filled = filled + usable[:, None] * torch.stack(colours, 1) / weight.clamp(min=1e-6)[:, None]
        missing = missing * (1 - usable)
    return torch.where(masks[:, None], filled, inputs)


def fill_blur(inputs: Tensor, masks: Tensor) -> Tensor:
    """The masked pixels are blurred, by a sixteenth of the picture's side, their surround with them."""
    sigma = max(inputs.shape[2:]) / 16
    blurred = smooth_maps(inputs.flatten(0, 1), sigma).reshape(inputs.shape)
    return torch.where(masks[:, None], blurred, inputs)


def fill_harmonic(inputs: Tensor, masks: Tensor) -> Tensor:
    """Inpainting: the masked pixels become the smoothest surface that meets the picture at the mask's rim.

    Laplace's equation with the rim for its boundary, by relaxation from coarse to fine; no seam is left to be seen.
    """
    keep = (~masks[:, None]).to(inputs.dtype)
    levels = [(inputs, keep)]
    while min(levels[-1][0].shape[2:]) > 8:
        picture, known = levels[-1]
        weight = functional.avg_pool2d(known, 2, ceil_mode=True)
        colour = functional.avg_pool2d(picture * known, 2, ceil_mode=True) / weight.clamp(min=1e-6)
        levels.append((colour, (weight > 0).to(inputs.dtype)))
    filled = fill_colour(levels[-1][0], levels[-1][1][:, 0] == 0)
    for picture, known in reversed(levels):
        if filled.shape != picture.shape:
            filled = functional.interpolate(filled, picture.shape[2:], mode="bilinear", align_corners=False)
        filled = torch.where(known > 0, picture, filled)
        for _ in range(60 if max(picture.shape[2:]) <= 64 else 20):  # what is left is smooth; seams go in a few rounds
            around = functional.pad(filled, (1, 1, 1, 1), mode="replicate")
            mean = (around[..., :-2, 1:-1] + around[..., 2:, 1:-1] + around[..., 1:-1, :-2] + around[..., 1:-1, 2:]) / 4
            filled = torch.where(known > 0, picture, mean)
    return filled


def paste(donors: Tensor, receivers: Tensor, masks: Tensor) -> Tensor:
    """The masked pixels of the donors on the receivers, all (m, C, H, W)."""
    return torch.where(masks[:, None], donors, receivers)


def paste_detail(donors: Tensor, receivers: Tensor, masks: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The receivers with the fine detail of the donors under the masks, coarse structure and colours their own.

    Values stay between ``low`` and ``high`` of each channel, (C,).
    """
    detailed = exchange_detail(receivers, donors)
    column = (1, -1, 1, 1)
    return paste(detailed.maximum(low.view(column)).minimum(high.view(column)), receivers, masks)


def frame_mask(height: int, width: int, inner: int, outer: int) -> Tensor:
    """(H, W) bool: the frame between ``outer`` and ``inner`` pixels from the border."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[outer : height - outer, outer : width - outer] = True
    mask[inner : height - inner, inner : width - inner] = False
    return mask
