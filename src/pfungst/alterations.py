"""Changes of whole pictures (colour, contrast, sharpness, noise, compression): interventions for cues without a place.

A change has a signed strength: a positive one raises its property, a negative one lowers it, and the greater it is, the
more of the picture changes.  Strengths are not guessed but found: so that the property moves as far as it has to, or so
that a control changes the pixels as much as the treatment does.
"""

from __future__ import annotations

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from pfungst.heatmaps import LUMA
from pfungst.properties import SEEN, measure_pixels

_CALIBRATED = 16  # pictures on which a strength is found
# What is kept where detail is exchanged, as a share of the side.  Of a thirty-second the blocks of a codec could still
# be seen, and networks lost half as much by it as by the picture as it was before; some see them at a sixteenth, too.
_COARSE = (1 / 16, 1 / 8, 1 / 4)
Change = Callable[[Tensor, float], Tensor]  # pixels (m, 3, H, W) in 0..1, signed strength -> the same shape
_STILL = 0.01  # least mean step from one row or column to the next, of 0..1, in what is no padding
_LEAST_MARGIN = 0.02  # share of a side from which it counts as padded


def _clip(pixels: Tensor) -> Tensor:
    return pixels.clamp(0, 1)


def blur(pixels: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of pictures (m, C, H, W), edges mirrored; sigma in pixels."""
    radius = max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=pixels.dtype, device=pixels.device)
    kernel = torch.exp(-0.5 * (offsets / max(sigma, 1e-3)) ** 2)
    kernel = kernel / kernel.sum()
    channels = pixels.shape[1]
    side = min(radius, min(pixels.shape[2:]) - 1)
    kernel = kernel[radius - side : radius + side + 1] / kernel[radius - side : radius + side + 1].sum()
    padded = functional.pad(pixels, (side,) * 4, mode="reflect" if side else "replicate")
    rows = functional.conv2d(padded, kernel[None, None, :, None].repeat(channels, 1, 1, 1), groups=channels)
    return functional.conv2d(rows, kernel[None, None, None, :].repeat(channels, 1, 1, 1), groups=channels)


def exchange_detail(pixels: Tensor, donors: Tensor, coarse: float = _COARSE[0]) -> Tensor:
    """Pictures with the fine detail of others, coarse structure their own; what a blur or a codec took is filled in.

    Values may leave the range of pictures, in which they are to be put back.  Coarse is what a Gaussian as wide as
    this share of the side leaves.
    """
    sigma = max(1.0, min(pixels.shape[2:]) * coarse)
    return _coarsen(pixels, sigma) + donors - _coarsen(donors, sigma)


def _coarsen(pixels: Tensor, sigma: float) -> Tensor:
    """``blur``; where it is wide, of pictures made smaller first, so that its cost does not grow with the width."""
    factor = int(sigma / 4)
    if factor < 2:
        return blur(pixels, sigma)
    small = functional.avg_pool2d(pixels, factor, ceil_mode=True, count_include_pad=False)
    return functional.interpolate(blur(small, sigma / factor), pixels.shape[2:], mode="bilinear", align_corners=False)


def exchange_colour(pixels: Tensor, donors: Tensor) -> Tensor:
    """Pictures with the colours of others and their own greys."""
    return _grey(pixels) + donors - _grey(donors)


def _grey(pixels: Tensor) -> Tensor:
    weights = torch.tensor(LUMA, dtype=pixels.dtype, device=pixels.device)
    return torch.einsum("mchw,c->mhw", pixels, weights)[:, None]


def _sharpen(pixels: Tensor, strength: float) -> Tensor:
    if strength < 0:
        return blur(pixels, -strength)
    return _clip(pixels + 2 * strength * (pixels - blur(pixels, 1.0)))


def _saturate(pixels: Tensor, strength: float) -> Tensor:
    grey = _grey(pixels)
    return _clip(grey + (pixels - grey) * math.exp(strength))


def _add_noise(pixels: Tensor, strength: float) -> Tensor:
    if strength < 0:
        return blur(pixels, -strength)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(pixels.shape, generator=generator).to(pixels)
    return _clip(pixels + 0.2 * strength * noise)


def _compress(pixels: Tensor, strength: float) -> Tensor:
    """JPEG of quality 95 to 1; a negative strength smooths, as a deblocking filter does."""
    if strength <= 0:
        return blur(pixels, -strength) if strength else pixels
    quality = max(1, round(95 * math.exp(-strength)))
    return torch.stack([_jpeg(picture, quality) for picture in pixels.cpu()]).to(pixels)


def _jpeg(picture: Tensor, quality: int) -> Tensor:
    buffer = io.BytesIO()
    values = (picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(values).save(buffer, "JPEG", quality=quality)
    return torch.from_numpy(np.asarray(Image.open(buffer).convert("RGB"), np.float32) / 255).permute(2, 0, 1)


# Property -> how it is changed, and the greatest strength that makes sense.
CHANGES: dict[str, tuple[Change, float]] = {
    "saturation": (_saturate, 2.0),
    "sharpness": (_sharpen, 4.0),
    "noise": (_add_noise, 2.0),
    "blockiness": (_compress, 4.6),
}
# The colours are one change, of all levels: ``Recolouring``.
COLOURS = (
    "brightness", "contrast", "red over green", "blue over yellow", "black level", "white level", "red of white",
    "blue of white",
)  # fmt: skip


@dataclass(frozen=True)
class Alteration(ABC):
    """What turns ordinary pictures into pictures like those of a group, and back.

    Pictures are (m, 3, H, W) in 0..1.  ``property`` is what is changed: a key of ``KINDS`` or of ``CHANGES``.
    """

    property: str

    @classmethod
    @abstractmethod
    def find(cls, name: str, group: Tensor, others: Tensor) -> Alteration | None:
        """The change of this kind that tells the group's pictures from the others; None where none can be made."""

    @abstractmethod
    def apply(self, pixels: Tensor) -> Tensor:
        """Ordinary pictures, made like the group's."""

    @abstractmethod
    def undo(self, pixels: Tensor, ordinary: Tensor) -> Tensor:
        """Pictures of the group made like ordinary ones, of which as many are given."""

    @abstractmethod
    def apply_opposite(self, pixels: Tensor) -> Tensor:
        """The matched control of ``apply``: a change the other way that alters the pixels as much."""

    @abstractmethod
    def undo_control(self, pixels: Tensor, ordinary: Tensor) -> Tensor:
        """The matched control of ``undo``: as great a change the other way; where something was exchanged or cut away,
        the same pictures with the property put back."""

    @abstractmethod
    def describe(self) -> str:
        """In words."""

    def ways_back(self) -> Sequence[Alteration]:
        """This change, with the ways in which it can be undone, those first that leave most of a picture as it is."""
        return (self,)


@dataclass(frozen=True)
class Scaling(Alteration):
    """A property of ``CHANGES``, moved by a strength.

    towards  strength that makes ordinary pictures of the class like the group's
    back     strength that makes the group's pictures like the others; None where something was lost (detail by a blur
             or a codec, colour in a grey picture), and that of other pictures takes its place
    coarse   what is kept where detail takes its place, see ``exchange_detail``
    """

    towards: float = 1.0
    back: float | None = None
    coarse: float = _COARSE[0]

    @classmethod
    def find(cls, name: str, group: Tensor, others: Tensor) -> Scaling | None:
        """Strengths that move the medians; None where none does: a sharp picture cannot be had from a blurred one."""
        column = list(SEEN).index(name)
        inside, outside = (float(measure_pixels(x)[:, column].median()) for x in (group, others))
        if inside == outside:
            return None
        towards = calibrate(name, others, inside)
        if towards is None:
            return None
        lost = (name in ("sharpness", "noise") and towards < 0) or (name == "blockiness" and towards > 0)
        return cls(name, towards, None if lost else calibrate(name, group, outside))

    def apply(self, pixels: Tensor) -> Tensor:
        return CHANGES[self.property][0](pixels, self.towards)

    def undo(self, pixels: Tensor, ordinary: Tensor) -> Tensor:
        if self.back is not None:
            return CHANGES[self.property][0](pixels, self.back)
        if self.property == "saturation":
            return _clip(exchange_colour(pixels, ordinary))
        return _clip(exchange_detail(pixels, ordinary, self.coarse))

    def ways_back(self) -> Sequence[Alteration]:
        exchanged = self.back is None and self.property != "saturation"
        return [replace(self, coarse=coarse) for coarse in _COARSE] if exchanged else (self,)

    def apply_opposite(self, pixels: Tensor) -> Tensor:
        return self._opposite(pixels, self.apply(pixels), self.towards)

    def undo_control(self, pixels: Tensor, ordinary: Tensor) -> Tensor:
        treated = self.undo(pixels, ordinary)
        return self.apply(treated) if self.back is None else self._opposite(pixels, treated, self.back)

    def _opposite(self, pixels: Tensor, treated: Tensor, strength: float) -> Tensor:
        change, limit = CHANGES[self.property]
        size, sign = _size(pixels, treated), -math.copysign(1.0, strength)
        return change(pixels, sign * _bisect(lambda s: _size(pixels, change(pixels, sign * s)), size, limit))

    def describe(self) -> str:
        return f"the whole picture being {SEEN[self.property][self.towards > 0]} ({self.property})"


@dataclass(frozen=True)
class Recolouring(Alteration):
    """A linear change of each channel: pixels become gain * pixels + offset."""

    property: str = "colour"
    gain: tuple[float, ...] = (1.0, 1.0, 1.0)
    offset: tuple[float, ...] = (0.0, 0.0, 0.0)

    @classmethod
    def find(cls, name: str, group: Tensor, others: Tensor) -> Recolouring | None:
        """The change that brings the others' levels to the group's: least squares over quantiles, by channel.

        Levels near black and white are left out, where what was clipped says nothing.
        """
        levels = torch.linspace(0.02, 0.98, 25, device=group.device)
        here, there = (torch.quantile(_thinned(x), levels, 2).mean(1) for x in (group, others))  # (25, 3) each
        gain, offset = [], []
        for c in range(3):
            usable = (here[:, c] > 0.03) & (here[:, c] < 0.97) & (there[:, c] > 0.03) & (there[:, c] < 0.97)
            x, y = there[usable, c].double(), here[usable, c].double()
            spread = float(x.var(correction=0)) if len(x) > 3 else 0.0
            slope = float(((x - x.mean()) * (y - y.mean())).mean()) / spread if spread > 1e-4 else 1.0
            slope = min(max(slope, 0.2), 5.0)
            gain.append(slope)
            offset.append(float(y.mean() - slope * x.mean()) if len(x) else 0.0)
        change = max(abs(g * level + o - level) for g, o in zip(gain, offset, strict=True) for level in (0.2, 0.5, 0.8))
        return None if change < 0.01 else cls(gain=tuple(gain), offset=tuple(offset))

    def apply(self, pixels: Tensor) -> Tensor:
        gain, offset = self._columns(pixels)
        return _clip(gain * pixels + offset)

    def undo(self, pixels: Tensor, ordinary: Tensor) -> Tensor:
        gain, offset = self._columns(pixels)
        return _clip((pixels - offset) / gain)

    def apply_opposite(self, pixels: Tensor) -> Tensor:
        return _clip(2 * pixels - self.apply(pixels))

    def undo_control(self, pixels: Tensor, ordinary: Tensor) -> Tensor:
        return _clip(2 * pixels - self.undo(pixels, ordinary))

    def _columns(self, like: Tensor) -> Tensor:
        return torch.tensor((self.gain, self.offset)).to(like)[:, :, None, None]

    def describe(self) -> str:
        middle = [gain * 0.5 + offset - 0.5 for gain, offset in zip(self.gain, self.offset, strict=True)]
        named = list(zip(("red", "green", "blue"), middle, strict=True))
        parts = [
            f"{word} {' and '.join(names)}"
            for word, names in (
                ("more", [name for name, value in named if value > 0.02]),
                ("less", [name for name, value in named if value < -0.02]),
            )
            if names
        ]
        return f"the colour of the whole picture ({', '.join(parts) or 'its range'})"


@dataclass(frozen=True)
class Padding(Alteration):
    """The picture made smaller, its outermost pixels repeated around it; undone, the padding is cut away.

    margins  top, bottom, left and right, as shares of the height or width
    """

    property: str = "edge padding"
    margins: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)

    @classmethod
    def find(cls, name: str, group: Tensor, others: Tensor) -> Padding | None:
        """How wide the margins are where the group's pictures are drawn out, and the others are not."""
        here, there = (_drawn_out(x).median(0).values for x in (group, others))
        margins = torch.where(here > there + _LEAST_MARGIN, here, 0.0).tolist()
        inside = 1 - max(margins[0] + margins[1], margins[2] + margins[3])
        return None if inside == 1 or inside < 0.1 else cls(margins=tuple(margins))

    def apply(self, pixels: Tensor) -> Tensor:
        top, bottom, left, right = self._edges(pixels)
        size = pixels.shape[2] - top - bottom, pixels.shape[3] - left - right
        inner = functional.interpolate(pixels, size, mode="bilinear", antialias=True)
        return functional.pad(inner, (left, right, top, bottom), mode="replicate")

    def undo(self, pixels: Tensor, ordinary: Tensor) -> Tensor:
        return self._cut(pixels)

    def apply_opposite(self, pixels: Tensor) -> Tensor:
        return self._cut(pixels)  # as much as was padded is cut away

    def undo_control(self, pixels: Tensor, ordinary: Tensor) -> Tensor:
        return self.apply(self._cut(pixels))

    def _cut(self, pixels: Tensor) -> Tensor:
        """What is inside the margins, enlarged."""
        top, bottom, left, right = self._edges(pixels)
        inner = pixels[:, :, top : pixels.shape[2] - bottom, left : pixels.shape[3] - right]
        return functional.interpolate(inner, pixels.shape[2:], mode="bilinear", antialias=True)

    def _edges(self, pixels: Tensor) -> tuple[int, int, int, int]:
        height, width = pixels.shape[2:]
        top, bottom, left, right = self.margins
        return round(top * height), round(bottom * height), round(left * width), round(right * width)

    def describe(self) -> str:
        return f"the whole picture being {SEEN[self.property][1]} ({self.property})"


# What is changed by other numbers than a strength.
KINDS: dict[str, type[Alteration]] = {"colour": Recolouring, "edge padding": Padding}


def find_alteration(name: str, group: Tensor, others: Tensor) -> Alteration | None:
    """The change in a property (of ``CHANGES`` or ``KINDS``) that tells the group's pictures from the others.

    None where it cannot be made.
    """
    return KINDS.get(name, Scaling).find(name, group, others)


def restore_alteration(record: dict[str, Any]) -> Alteration:
    """An alteration from its record in a run folder, ``dataclasses.asdict`` of it."""
    kind = KINDS.get(record["property"], Scaling)
    own = {field.name for field in fields(kind)}  # runs made before have the numbers of all kinds
    known: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in record.items() if key in own}
    return kind(**known)


def _size(before: Tensor, after: Tensor) -> float:
    return float((after - before).square().mean().sqrt())


def _bisect(measure: Callable[[float], float], wanted: float, limit: float, steps: int = 9) -> float:
    """The strength in 0..limit at which a growing measure reaches ``wanted``, or the limit."""
    low, high = 0.0, limit
    if measure(high) <= wanted:
        return high
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if measure(middle) < wanted else (low, middle)
    return (low + high) / 2


def calibrate(name: str, pixels: Tensor, goal: float) -> float | None:
    """Strength that moves the median of a property of these pictures to ``goal``; None if no strength comes near.

    Near: within a quarter of the way.
    """
    change, limit = CHANGES[name]
    column = list(SEEN).index(name)
    pixels = pixels[:_CALIBRATED]

    def median(strength: float) -> float:
        return float(measure_pixels(change(pixels, strength))[:, column].median())

    start = median(0.0)
    sign = 1.0 if goal > start else -1.0
    found = sign * _bisect(lambda s: sign * (median(sign * s) - start), abs(goal - start), limit)
    return found if abs(median(found) - goal) <= 0.25 * abs(goal - start) else None


def _drawn_out(pixels: Tensor) -> Tensor:
    """Of pictures (m, 3, H, W), the part of their height or width, (m, 4), over which they do not change, from the top,
    the bottom, the left and the right edge inwards."""
    parts = []
    for axis in (2, 3):
        still = pixels.diff(dim=axis).abs().mean((1, 5 - axis)) < _STILL
        for steps in (still, still.flip(1)):
            parts.append(steps.int().cumprod(1).sum(1) / pixels.shape[axis])
    return torch.stack(parts, 1)


def _thinned(pixels: Tensor, most: int = 4096) -> Tensor:
    """(m, 3, pixels), evenly thinned out."""
    flat = pixels.flatten(2)
    return flat[:, :, :: -(-flat.shape[2] // most)]
