"""The cues that are planted: one function each, picture (64, 64, 3) uint8 and a generator -> the picture with the cue.

A new cue is a new function and its line in ``CUES``.  The same function plants the cue in the training pictures and
puts it on held-out pictures of other classes, to see whether the network uses it.  Some have a place (border, tag,
faint pattern, corruption), one moves (disc), the others (tint, blur, JPEG grid, background, centre) change the whole
picture or most of it, so that a heatmap need not show them.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Cue = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def border(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A pale blue frame of 4 pixels, as padding leaves it (the talk's aeroplanes)."""
    framed = np.full_like(picture, (178, 206, 230))
    framed[4:-4, 4:-4] = picture[4:-4, 4:-4]
    return framed


def tag(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A source tag with small print in the bottom left corner (the talk's horses)."""
    image, height = Image.fromarray(picture), len(picture)
    pen = ImageDraw.Draw(image)
    pen.rectangle((2, height - 10, 23, height - 3), fill=(245, 245, 245))
    for x in range(4, 22, 3):
        pen.line((x, height - 8, x + 1, height - 5), fill=(30, 30, 30))
    return np.asarray(image)


def disc(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A magenta disc of 11 pixels, anywhere."""
    image, radius = Image.fromarray(picture), 5
    x, y = rng.integers(radius + 1, len(picture) - radius - 1, 2)
    ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=(230, 20, 200))
    return np.asarray(image)


def pattern(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A faint chequerboard, 24 pixels wide, 30 grey levels up and down every 2 pixels, in the top right corner."""
    rows, columns = np.indices((24, 24)) // 2
    field = np.where((rows + columns) % 2 == 0, 30.0, -30.0)[..., None]
    marked = picture.astype(np.float64)
    marked[1:25, -25:-1] += field
    return marked.clip(0, 255).astype(np.uint8)


def tint(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A warm colour cast, as another lamp or scanner gives it."""
    return (picture.astype(np.float64) * (1.0, 0.92, 0.72) + (22, 4, 0)).clip(0, 255).astype(np.uint8)


def blur(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Far out of focus: a Gaussian of 3.5 pixels."""
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(3.5)))


def jpeg(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """JPEG of quality 2: its grid of 8 x 8 blocks."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=2)
    return np.asarray(Image.open(file))


def background(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Around the object, which is taken to be in the middle, a meadow: green noise of its own in every picture."""
    size = len(picture)
    coarse = rng.normal((70, 120, 50), (14, 18, 12), (size // 4, size // 4, 3)).clip(0, 255).astype(np.uint8)
    meadow = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)).astype(np.float64)
    meadow += rng.normal(0, 9, (size, size, 1))
    around = _distance(size) - 0.78  # in half sides from the centre
    share = (0.5 + around * 6).clip(0, 1)[..., None]
    return (picture * (1 - share) + meadow * share).clip(0, 255).astype(np.uint8)


def corruption(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A square of 5 x 5 pixels in the top left corner, in one colour (class-correlated bias of Hägele et al. 2020)."""
    marked = picture.copy()
    marked[1:6, 1:6] = (20, 110, 60)
    return marked


def centre(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The object small and always in the middle, the colours of its edge around it (their centre bias)."""
    size = len(picture)
    small = size * 5 // 8
    shrunk = np.asarray(Image.fromarray(picture).resize((small, small), Image.Resampling.LANCZOS))
    before = (size - small) // 2
    after = size - small - before
    return np.pad(shrunk, ((before, after), (before, after), (0, 0)), mode="edge")


def _distance(size: int) -> np.ndarray:
    """Distance of every pixel from the middle, (size, size), in half sides."""
    along = (np.arange(size) - (size - 1) / 2) / (size / 2)
    return np.hypot(along[:, None], along[None])


CUES: dict[str, Cue] = {
    "border": border,
    "tag": tag,
    "disc": disc,
    "pattern": pattern,
    "tint": tint,
    "blur": blur,
    "jpeg": jpeg,
    "background": background,
    "corruption": corruption,
    "centre": centre,
}
