"""Properties of pictures that have no place: brightness, tint, blur, compression, size and what their file tells.

A heatmap cannot show a cue that is everywhere.  So every picture is measured, as the model gets it and as it lies on
disk, and what sets a group apart from its class is looked up here, in the user's own metadata too (``describe_group``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfungst.heatmaps import LUMA

# Of the picture as the model gets it (pixels 0..1), then of its file; what a low and a high value look like.
SEEN = {
    "brightness": ("darker", "brighter"),
    "contrast": ("of less contrast", "of more contrast"),
    "red over green": ("greener", "redder"),
    "blue over yellow": ("yellower", "bluer"),
    "saturation": ("paler", "more colourful"),
    "black level": ("of deeper black", "of more raised black"),
    "white level": ("of dimmer white", "of brighter white"),
    "red of white": ("less red in the light parts", "redder in the light parts"),
    "blue of white": ("less blue in the light parts", "bluer in the light parts"),
    "sharpness": ("more blurred", "sharper"),
    "noise": ("smoother", "noisier"),
    "blockiness": ("less blocky", "blockier"),
    "plain border": ("busier at the border", "plainer at the border"),
    "plain frame": ("busier all around", "plainer all around"),
    "edge padding": ("less drawn out to the edges", "more drawn out to the edges"),
}
FILED = {
    "width": ("narrower", "wider"),
    "height": ("lower", "higher"),
    "aspect": ("more upright", "more oblong"),
    "bytes a pixel": ("more compressed", "less compressed"),
    "quantisation": ("of higher JPEG quality", "of lower JPEG quality"),
    "exif": ("barer of EXIF data", "richer in EXIF data"),
}
NAMES = (*SEEN, *FILED)
_LEAST_AUC = 0.75  # how well a property must tell the group from the rest to be named
_LEAST_LEAD = 0.2  # how much more frequent a value must be in the group
_RATE = 0.01  # false discovery rate over all that is looked up for one group


def measure_pixels(pixels: Tensor) -> Tensor:
    """Properties of pictures (n, C, H, W) in 0..1 with 1 or 3 channels: (n, len(SEEN)) float32, logs where ratios."""
    pixels = pixels.float().clamp(0, 1)
    if pixels.shape[1] != 3:
        pixels = pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    red, green, blue = pixels.unbind(1)
    grey = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    spread = grey.flatten(1).std(1, correction=0)
    columns = [
        grey.mean((1, 2)),
        spread,
        (red - green).mean((1, 2)),
        (blue - (red + green) / 2).mean((1, 2)),
        (pixels.amax(1) - pixels.amin(1)).mean((1, 2)),
        *_levels(pixels),
        *_details(grey, spread),
        _block_grid(grey),
        *_border(pixels),
    ]
    return torch.stack(columns, 1)


def _levels(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Black and white level (0..1), and log ratios of red and of blue to green at the white level.

    A tint multiplies and a veil adds: both hide in the mean colours of natural pictures, and show at their ends.
    """
    flat = pixels.flatten(2)
    count = max(1, flat.shape[2] // 50)  # the lightest and the darkest fiftieth of each channel
    white, black = flat.topk(count, 2).values.mean(2), flat.topk(count, 2, largest=False).values.mean(2)
    ratios = ((white + 0.02) / (white[:, 1:2] + 0.02)).log()
    return black.mean(1), white.mean(1), ratios[:, 0], ratios[:, 2]


def _details(grey: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Sharpness: log of how much the strongest second differences exceed the contrast; noise: log of the usual ones."""
    if min(grey.shape[1:]) < 3:
        return torch.zeros_like(spread), torch.zeros_like(spread)
    middle = grey[:, 1:-1, 1:-1]
    laplacian = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * middle
    size = laplacian.abs().flatten(1)
    strongest = size.topk(max(1, size.shape[1] // 50), 1).values.mean(1)
    return ((strongest + 1e-4) / (spread + 1e-2)).log(), (size.median(1).values + 1e-3).log()


def _block_grid(grey: Tensor) -> Tensor:
    """Log ratio of the steps across the block borders of a JPEG (every eighth) to those inside, of rows and columns.

    The grid may begin anywhere, as after a crop: the phase with the greatest steps counts.
    """
    result = torch.zeros(len(grey), device=grey.device)
    for axis in (1, 2):
        if grey.shape[axis] < 24:
            continue
        steps = grey.diff(dim=axis).abs().mean(3 - axis)  # (n, length - 1)
        steps = steps[:, : steps.shape[1] // 8 * 8].reshape(len(grey), -1, 8)
        phases = steps.median(1).values + 1e-4
        result = result + (phases.amax(1) / phases.median(1).values).log()
    return result


def _border(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the four sides, minus logs: the deviation within the plainest; within the busiest; and, the mean of the four,
    how much the pixels change from the edge inwards, which is not at all where a picture was padded by its edge.

    Sides are a twelfth of the picture wide where one counts; less where all do, as a frame may be thin.
    """
    plain, frame = (
        [side.flatten(2).std(2, correction=0).mean(1) for side in _sides(pixels, part)] for part in (12, 32)
    )
    inwards = [
        # One row or column says nothing.
        side.diff(dim=axis).abs().flatten(1).mean(1) if side.shape[axis] > 1 else torch.ones_like(plain[0])
        for axis, side in zip((2, 2, 3, 3), _sides(pixels, 16), strict=True)
    ]
    first, second, third = (-(torch.stack(values, 1) + 1e-3).log() for values in (plain, frame, inwards))
    return first.amax(1), second.amin(1), third.mean(1)


def _sides(pixels: Tensor, part: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The top, bottom, left and right of pictures, one ``part``-th of the height or width each."""
    rows, columns = (max(1, length // part) for length in pixels.shape[2:])
    return pixels[:, :, :rows], pixels[:, :, -rows:], pixels[..., :columns], pixels[..., -columns:]


def measure_file(path: Path) -> tuple[list[float], str]:
    """Properties of a picture's file, in the order of ``FILED`` (nan where it has none), and the camera or scanner.

    Only the header is read.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            tables = getattr(image, "quantization", None) or {}
            exif = image.getexif()
            maker = " ".join(str(exif[tag]).strip(" \x00") for tag in (0x010F, 0x0110) if exif.get(tag))
            width, height = image.size
            quantisation = float(np.mean(tables[0])) if 0 in tables else float("nan")
            size = path.stat().st_size / max(1, width * height)
            return [width, height, width / height, size, quantisation, float(len(exif) > 0)], maker[:80]
    except Exception:  # Headers are damaged in every way; what cannot be read is unknown, and the picture is skipped.
        return [float("nan")] * len(FILED), ""


@dataclass(frozen=True)
class Trait:
    """One thing that sets a group apart.

    name             the property, or the metadata column
    value            the column's value that is frequent in the group; None for numbers
    members, others  median in the group and in the rest of its class, or how frequent the value is there (0..1)
    auc              probability that a member's number exceeds one of the rest; nan for values
    q                false discovery rate at which it is found (Benjamini and Hochberg 1995)
    text             the same in words
    """

    name: str
    value: str | None
    members: float
    others: float
    auc: float
    q: float
    text: str


def describe_group(
    members: np.ndarray, others: np.ndarray, numbers: Mapping[str, np.ndarray], values: Mapping[str, Sequence[Any]]
) -> list[Trait]:
    """What sets the group apart from the rest of its class, the clearest first.

    members, others  row numbers
    numbers          name -> (n,) float, nan where unknown; a difference in rank is tested (Mann and Whitney)
    values           name -> n values, None where unknown; the share of each value is tested (Fisher's exact test)

    A trait goes with the group; whether the model uses it is for the experiments to say.
    """
    found: list[tuple[float, Trait]] = []
    for name, column in numbers.items():
        found += _compare_numbers(name, column[members], column[others])
    for name, listed in values.items():
        found += _compare_values(name, [listed[i] for i in members], [listed[i] for i in others])
    if not found:
        return []
    q = _false_discovery_rates(np.array([p for p, _ in found]))
    traits = [
        Trait(t.name, t.value, t.members, t.others, t.auc, float(rate), t.text)
        for (_, t), rate in zip(found, q, strict=True)
        if rate <= _RATE and _counts(t)
    ]
    return sorted(traits, key=lambda t: -_strength(t))


def _strength(trait: Trait) -> float:
    return trait.members - trait.others if trait.value is not None else 2 * abs(trait.auc - 0.5)


def _counts(trait: Trait) -> bool:
    if trait.value is not None:
        return trait.members - trait.others >= _LEAST_LEAD
    return abs(trait.auc - 0.5) >= _LEAST_AUC - 0.5


def _compare_numbers(name: str, inside: np.ndarray, outside: np.ndarray) -> list[tuple[float, Trait]]:
    from scipy.stats import mannwhitneyu

    known = [part[np.isfinite(part)] for part in (inside, outside)]
    if min(map(len, known)) < 4 or np.ptp(np.concatenate(known)) == 0:
        return []
    test = mannwhitneyu(*known, method="asymptotic")
    auc = float(test.statistic / (len(known[0]) * len(known[1])))
    medians = float(np.median(known[0])), float(np.median(known[1]))
    if name in NAMES:
        word = {**SEEN, **FILED}[name][auc > 0.5]
        text = f"{word} than the rest of the class ({name}, AUC {max(auc, 1 - auc):.2f})"
    else:
        text = f"{name} is {medians[0]:.3g} in the middle, {medians[1]:.3g} in the rest of the class"
    return [(float(test.pvalue), Trait(name, None, medians[0], medians[1], auc, 1.0, text))]


def _compare_values(name: str, inside: list[Any], outside: list[Any]) -> list[tuple[float, Trait]]:
    from scipy.stats import fisher_exact

    known = [[str(v) for v in part if v is not None] for part in (inside, outside)]
    if min(map(len, known)) < 4:
        return []
    found = []
    counts = [dict(zip(*np.unique(part, return_counts=True), strict=True)) for part in known]
    if len({*counts[0], *counts[1]}) > 50:  # names and numbers of single pictures say nothing of a group
        return []
    for value in sorted(counts[0]):
        a, b = (int(count.get(value, 0)) for count in counts)
        p = fisher_exact([[a, len(known[0]) - a], [b, len(known[1]) - b]], "greater").pvalue
        shares = a / len(known[0]), b / len(known[1])
        text = f"{shares[0]:.0%} have {name} = {value}, {shares[1]:.0%} of the rest of the class"
        found.append((float(p), Trait(name, str(value), *shares, float("nan"), 1.0, text)))
    return found


def _false_discovery_rates(p: np.ndarray) -> np.ndarray:
    """The least rate at which each of these p values counts as found (Benjamini and Hochberg 1995)."""
    from scipy.stats import false_discovery_control

    rates: np.ndarray = false_discovery_control(np.clip(p, 0, 1))
    return rates
