"""Relevance as colours: palettes, heatmaps, overlays, colour bars, grids of pictures.  Only numpy and Pillow.

The palettes were chosen in OKLab: in ``diverging`` and ``dark`` a score and its negative have the same lightness, so
neither sign looks stronger, and blue against red stays apart for the common kinds of colour blindness.
"""

from __future__ import annotations

import io
import math
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pfungst.errors import RelevanceError, SettingError
from pfungst.store import writing

# Colours at equal distances, from the negative end over zero to the positive end; ``sequential`` begins at zero.
_ANCHORS = {
    "diverging": "0051a0 036bd0 2988f5 62a8ff 98c5ff c7dfff f5f5f5 ffd0ca ffa79c f9796e e35148 c42a28 9e010e",
    "dark": "3cacfe 048fdf 0472b4 02578a 003d63 07243b 0d0d0d 391712 651e16 90281d b93b2d dc5746 fd7562",
    "sequential": "f5f5f5 eacfa1 e8a152 df6e04 c53f03 a4021c 70012a",
}
PALETTES = tuple(_ANCHORS)
ONE_SIDED = ("sequential",)
# Odd, so that zero has an entry of its own.
_ENTRIES = 255
# What is left of a picture's own colour below an overlay, where red and blue are to mean relevance alone.
_SATURATION = 0.35
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in a grey (ITU-R BT.601, as Pillow's)
# Opacity grows faster than |score|: relevance is so uneven that half of it would otherwise be invisible.
_OPACITY_EXPONENT = 0.6
INK, PAPER, FAINT = (25, 25, 28), (255, 255, 255), (110, 110, 116)
_ACCENT, _QUIET, _GROOVE = (31, 84, 150), (176, 182, 192), (236, 238, 241)
PANEL = 300  # longer side of a picture on a sheet, in pixels


def palette_table(palette: str) -> np.ndarray:
    """The colours of a palette, (255, 3) uint8: from -scale over 0 (entry 127) to scale; one-sided: from 0.

    Raises SettingError for an unknown name.
    """
    if palette not in _ANCHORS:
        raise SettingError(f"there is no palette {palette!r}", f"the palettes are {', '.join(PALETTES)}")
    anchors = np.array([list(bytes.fromhex(code)) for code in _ANCHORS[palette].split()], dtype=float)
    at = np.linspace(0, len(anchors) - 1, _ENTRIES)
    channels = [np.interp(at, np.arange(len(anchors)), anchors[:, i]) for i in range(3)]
    return np.rint(np.stack(channels, 1)).astype(np.uint8)


def as_array(values: Any) -> np.ndarray:
    """Values of a tensor, on whatever device and of whatever precision, or of anything that NumPy takes."""
    if not hasattr(values, "detach"):
        return np.asarray(values)
    tensor = values.detach().cpu()
    array: np.ndarray = (tensor.float() if tensor.element_size() < 4 else tensor).numpy()  # NumPy has no bfloat16
    return array


def pool_channels(relevance: Any) -> np.ndarray:
    """Relevance by place, (H, W) or (n, H, W) float32: the sum over the channels of (C, H, W) or (n, C, H, W)."""
    values = as_array(relevance).astype(np.float32, copy=False)
    if values.ndim not in (3, 4):
        raise SettingError(f"relevance of shape {values.shape}", "give (channels, height, width), or a batch of them")
    return values.sum(-3)


def common_scale(maps: Iterable[Any], quantile: float = 1.0) -> float:
    """One scale for several maps: the ``quantile`` (0 < q <= 1) of all their |score|; 1 is the greatest.

    0.995 keeps a few outliers from making everything else pale.  Where so much of the maps is zero that the quantile
    is zero as well, the greatest |score| is taken.  0.0 if all scores are zero, or there is no map.
    """
    if not 0 < quantile <= 1:
        raise SettingError(f"quantile is {quantile!r}", "it is above 0 and at most 1")
    parts = [np.abs(_finite(one)).ravel() for one in maps]
    values = np.concatenate(parts) if parts else np.empty(0)
    if values.size == 0:
        return 0.0
    return float(np.quantile(values, quantile)) or float(values.max())


def color(scores: Any, scale: float | None = None, palette: str = "diverging") -> np.ndarray:
    """Scores (H, W) as colours (H, W, 3) uint8; zero is exactly the middle colour.

    ``scale``: the |score| that gets the end colour, as do all beyond it; None: the greatest |score|.  One scale
    over several maps (``common_scale``) makes them comparable.

    Raises RelevanceError where a score is not finite; SettingError for an unknown palette, a scale that is negative or
    not finite, or negative scores in a one-sided palette.
    """
    values = _finite(scores)
    table, relative = palette_table(palette), _relative(values, scale)
    if palette in ONE_SIDED:
        if values.size and values.min() < 0:
            raise SettingError(f"negative scores in the palette {palette!r}", "use 'diverging' or 'dark'")
        return table[np.rint(relative * (_ENTRIES - 1)).astype(int)]
    middle = _ENTRIES // 2
    return table[middle + np.rint(relative * middle).astype(int)]


def desaturate(pixels: Any) -> np.ndarray:
    """A picture (H, W, 3) in [0, 1] with most of its colour taken away, uint8: the ground of an overlay."""
    picture = np.clip(np.asarray(pixels, dtype=float), 0, 1)
    if picture.ndim != 3 or picture.shape[2] != 3:
        raise SettingError(f"a picture of shape {picture.shape}", "give (height, width, 3), values in [0, 1]")
    grey = (picture @ np.array(LUMA))[..., None]
    return np.rint((grey + _SATURATION * (picture - grey)) * 255).astype(np.uint8)


def overlay(
    pixels: Any, scores: Any, scale: float | None = None, opacity: float = 0.9, palette: str = "diverging"
) -> np.ndarray:
    """Scores (H, W) laid over their picture (H, W, 3) in [0, 1], as uint8 (H, W, 3).

    Where relevance is zero, the desaturated picture shows; at the scale the colour covers it with ``opacity`` (0..1).
    The colour says the sign and the opacity how much, so faint relevance does not lie over the picture as a haze.
    Raises as ``color`` does.
    """
    if not 0 <= opacity <= 1:
        raise SettingError(f"opacity is {opacity!r}", "it is between 0 and 1")
    ground, values = desaturate(pixels).astype(float), _finite(scores)
    if values.shape != ground.shape[:2]:
        raise SettingError(f"scores {values.shape} for a picture {ground.shape[:2]}", "give one score a pixel")
    relative = _relative(values, scale)
    # The middle of the palette is near white (or black): colours begin at a third of the way to the end.
    strong = np.sign(relative) * (1 + 2 * np.abs(relative)) / 3
    cover = (opacity * np.abs(relative) ** _OPACITY_EXPONENT)[..., None]
    return np.rint((1 - cover) * ground + cover * color(strong, 1.0, palette)).astype(np.uint8)


def enlarge(array: np.ndarray, factor: float | None = None, *, size: int | tuple[int, int] | None = None) -> np.ndarray:
    """A picture (H, W, 3) or (H, W) uint8 at another size: ``factor`` times as large, or ``size`` as its longer side,
    or (height, width).

    From twice the size on, pixels stay sharp squares; below that, and when it becomes smaller, they are blended.
    """
    height, width = array.shape[:2]
    if (factor is None) == (size is None):
        raise SettingError("enlarge takes either a factor or a size", "enlarge(array, 4), enlarge(array, size=224)")
    if isinstance(size, tuple):
        target = size
    else:
        times = factor if factor is not None else size / max(height, width)
        target = (max(1, round(height * times)), max(1, round(width * times)))
    if min(target) < 1:
        raise SettingError(f"a picture of {target[0]} x {target[1]} pixels", "give a size of at least 1")
    if target == (height, width):
        return array
    sharp = target[0] >= 2 * height and target[1] >= 2 * width
    method = Image.Resampling.NEAREST if sharp else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(array).resize((target[1], target[0]), method))


def colorbar(
    scale: float, palette: str = "diverging", width: int = 320, *, clipped: bool = False, font_size: int = 13
) -> Image.Image:
    """A strip of the palette with its scores below: -scale, 0 and +scale (one-sided: 0 and scale).

    ``clipped``: scores beyond the scale exist and have the end colours, so the labels say "or more".
    """
    table, font = palette_table(palette), load_font(font_size)
    one_sided = palette in ONE_SIDED
    # Pillow's font has no minus sign and no "at most".
    low, high = ("0" if one_sided else f"-{scale:.3g}"), f"+{scale:.3g}"
    if clipped:
        low, high = low if one_sided else f"{low} or less", f"{high} or more"
    labels = [(low, 0.0), (high, 1.0)] if one_sided else [(low, 0.0), ("0", 0.5), (high, 1.0)]
    thick = font_size
    image = Image.new("RGB", (width, thick + 5 + line_height(font)), PAPER)
    strip = np.repeat(table[None, np.linspace(0, _ENTRIES - 1, width - 2).round().astype(int)], thick - 2, 0)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, width - 1, thick - 1), outline=FAINT)
    image.paste(Image.fromarray(np.ascontiguousarray(strip)), (1, 1))
    for text, at in labels:
        length = draw.textlength(text, font)
        draw.line((round(at * (width - 1)), thick, round(at * (width - 1)), thick + 3), fill=FAINT)
        draw.text((min(max(0, at * width - length / 2), width - length), thick + 4), text, INK, font)
    return image


def describe_scale(scale: float, quantile: float, same: bool) -> str:
    """What the colours mean.  ``quantile``: share of the pixels within the scale.  ``same``: in all pictures."""
    within = f", {quantile:.1%} of the pixels lie within" if quantile < 1 else ""
    whose = "the same scale in all pictures" if same else "this picture's own scale"
    full = f"Full colour from a relevance of ±{scale:.3g} a pixel on{within}; {whose}."
    return f"Red speaks for the class, blue against it. {full}"


def grid(
    images: Sequence[np.ndarray | Image.Image],
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    *,
    gap: int = 8,
    font_size: int = 13,
    lines: int = 2,
    least_width: int = 0,
) -> Image.Image:
    """Pictures in rows of ``columns`` (None: as square as it gets), each with its caption below.

    Every cell is as large as the largest picture and at least ``least_width`` wide; captions are broken into at most
    ``lines`` lines of that width (a line feed in a caption begins a new one) and end in "…" where they are longer.
    """
    pictures = [one if isinstance(one, Image.Image) else Image.fromarray(one) for one in images]
    if not pictures:
        raise SettingError("a grid of no pictures", "give at least one")
    if captions is not None and len(captions) != len(pictures):
        raise SettingError(f"{len(captions)} captions for {len(pictures)} pictures", "give one a picture")
    if columns is not None and columns < 1:
        raise SettingError(f"columns is {columns!r}", "give at least 1")
    columns = min(columns or math.ceil(math.sqrt(len(pictures))), len(pictures))
    width, height = max(least_width, *(one.width for one in pictures)), max(one.height for one in pictures)
    font = load_font(font_size)
    texts = [break_lines(text, font, width, lines) for text in captions or [""] * len(pictures)]
    rows = [range(start, min(start + columns, len(texts))) for start in range(0, len(texts), columns)]
    below = [max(len(texts[i]) for i in row) * line_height(font) for row in rows]
    total = gap + sum(height + (4 if text else 0) + text + gap for text in below)
    sheet = Image.new("RGB", (gap + columns * (width + gap), total), PAPER)
    draw, top = ImageDraw.Draw(sheet), gap
    for row, text in zip(rows, below, strict=True):
        for column, i in enumerate(row):
            left = gap + column * (width + gap)
            one = pictures[i]
            sheet.paste(one.convert("RGB"), (left, top + (height - one.height) // 2))
            for k, line in enumerate(texts[i]):
                draw.text((left, top + height + 4 + k * line_height(font)), line, INK, font)
        top += height + (4 if text else 0) + text + gap
    return sheet


@dataclass(frozen=True)
class Bar:
    """One line of a sheet's list: a name, what is said of it, its share 0..1 as a bar (None: no bar), dark or pale."""

    name: str
    told: str
    share: float | None
    dark: bool


def draw_sheet(
    title: str,
    pixels: np.ndarray,
    overlays: Sequence[np.ndarray],
    captions: Sequence[tuple[str, str]],
    bars: Sequence[Bar],
    legend: Image.Image,
    notes: Sequence[str],
) -> Image.Image:
    """One picture's sheet: the input and its overlays, the outputs beside, the colour bar and notes below.

    ``pixels``, ``overlays``: (H, W, 3) uint8.  ``captions``: (name, what is said of it) of each overlay.
    ``legend``: the ``colorbar`` of the overlays.
    """
    longer = max(pixels.shape[:2])
    sharp = {"factor": PANEL // longer} if 2 * longer <= PANEL else {"size": PANEL}
    panels = [enlarge(one, **sharp) for one in (pixels, *overlays)]
    font, head, small = load_font(15), load_font(20), load_font(14)
    # The name gets two lines at most, so that what is said of it is never cut off.
    under = ["\n".join([*break_lines(name, font, PANEL, 2), told]) for name, told in captions]
    columns = min(len(panels), 3)
    left = grid(panels, ["input", *under], columns, gap=16, font_size=15, lines=3, least_width=PANEL)
    right = _draw_bars(bars)
    width = left.width + right.width
    room = width - legend.width - 52
    lines = [line for note in notes for line in break_lines(note, small, room, 3)]
    header, middle, step = line_height(head) + 14, max(left.height, right.height), line_height(small)
    sheet = Image.new("RGB", (width, header + middle + max(legend.height, len(lines) * step) + 20), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((16, 12), shorten_text(title, head, width - 32), INK, head)
    for part, place in ((left, (0, header)), (right, (left.width, header)), (legend, (16, header + middle + 4))):
        sheet.paste(part, place)
    for k, line in enumerate(lines):
        draw.text((16 + legend.width + 20, header + middle + 2 + k * step), line, INK, small)
    return sheet


def _draw_bars(bars: Sequence[Bar]) -> Image.Image:
    font, small = load_font(15), load_font(13)
    width, top, row = 320, 22 + line_height(small), line_height(font) + line_height(small) + 16
    image = Image.new("RGB", (width, top + len(bars) * row), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((0, 14), "greatest outputs (dark bar: explained here)", FAINT, small)
    for k, one in enumerate(bars):
        y = top + k * row
        draw.text((0, y), shorten_text(one.name, font, width - 16), INK, font)
        draw.text((0, y + line_height(font)), shorten_text(one.told, small, width - 16), FAINT, small)
        y += line_height(font) + line_height(small) + 1
        if one.share is not None:
            draw.rectangle((0, y, width - 17, y + 4), fill=_GROOVE)
            if length := round(one.share * (width - 17)):
                draw.rectangle((0, y, length, y + 4), fill=_ACCENT if one.dark else _QUIET)
    return image


def load_font(size: int) -> Any:
    """Pillow's own font at this size in pixels; it is part of Pillow, so pictures look the same everywhere."""
    return ImageFont.load_default(size)


def line_height(font: Any) -> int:
    """Pixels from one line to the next."""
    box = font.getbbox("Ågjy")
    return math.ceil(box[3]) + 3


def break_lines(text: str, font: Any, width: float, lines: int) -> list[str]:
    """``text`` in at most ``lines`` lines no wider than ``width`` pixels; the last ends in "…" if words are left."""
    found: list[str] = []
    for paragraph in text.split("\n") if text else []:
        current = ""
        for word in paragraph.split():
            longer = f"{current} {word}".strip()
            if current and font.getlength(longer) > width:
                found.append(current)
                longer = word
            current = longer
        found.append(current)
    if len(found) > lines:
        found = [*found[: lines - 1], found[lines - 1] + " …"]
    return [shorten_text(line, font, width) for line in found]


def shorten_text(text: str, font: Any, width: float) -> str:
    """``text`` cut so that it is no wider than ``width`` pixels, with "…" in place of the rest."""
    if font.getlength(text) <= width:
        return text
    kept = text.rstrip(" …")
    while kept and font.getlength(kept + "…") > width:
        kept = kept[:-1]
    return kept.rstrip() + "…"


def encode_png(picture: np.ndarray | Image.Image) -> bytes:
    """A picture as the content of a PNG file."""
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, "PNG")
    return buffer.getvalue()


def save_png(picture: np.ndarray | Image.Image, path: str | Path) -> None:
    """Write a PNG, whole or not at all: beside its place first, then renamed.  Raises RunError where it cannot."""
    content, path = encode_png(picture), Path(path)
    beside = path.with_name(f".{secrets.token_hex(8)}.part")  # short: a long name may leave no room for more
    with writing(path.parent):
        try:
            beside.write_bytes(content)
            os.replace(beside, path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise


def _finite(scores: Any) -> np.ndarray:
    values = as_array(scores).astype(float, copy=False)
    if values.ndim != 2:
        raise SettingError(f"scores of shape {values.shape}", "give (height, width): pool_channels sums the channels")
    if not np.isfinite(values).all():
        raise RelevanceError(
            f"{int((~np.isfinite(values)).sum())} of {values.size} scores are NaN or infinite",
            "look at the ledger of the explanation: a rule divided by zero, or the model's weights are not finite",
        )
    return values


def _relative(values: np.ndarray, scale: float | None) -> np.ndarray:
    """Scores over their scale, within -1 to 1; all zero where the scale is zero."""
    if scale is None:
        scale = float(np.abs(values).max()) if values.size else 0.0
    if not (math.isfinite(scale) and scale >= 0):
        raise SettingError(f"scale is {scale!r}", "give a positive number")
    # Clipped before the division, which then cannot overflow however small the scale is.
    return np.clip(values, -scale, scale) / scale if scale else np.zeros_like(values)
