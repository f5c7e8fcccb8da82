"""One picture from disk as upright RGB, or the reason why not.

Nothing here changes Pillow's global settings: the size is read from the header, before any pixel is decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# Pillow's own limit (twice MAX_IMAGE_PIXELS) lies a little above; ours holds even where a user switched
# that off.
MAX_PIXELS = 178_000_000
# A JPEG may be decoded at a half, a quarter or an eighth, if that still leaves this many pixels for each
# needed one a side: then the resize that follows gives the same picture to within one grey level, several
# times faster.
_OVERSAMPLING = 4
_ORIENTATION = 274  # EXIF's tag
_DARK = 64  # of 256 levels: 16-bit pixels that use fewer hold 8 to 13 bits of data, and come out almost black
# What is decided, in words.
_DEEP = "of 16-bit pixels the upper 8 bits are used"
_CLEAR = "transparent pixels are laid over white"
_FIRST = "of several frames or pages only the first is used"
_TURNED = "turned upright as their EXIF data say"
_INK = "CMYK is converted to RGB without a colour profile"


@dataclass(frozen=True)
class Conversions:
    """What ``open_image`` decides for a picture that a model's training may have decided otherwise.

    told    in words
    levels  of the 256 levels of a channel, those up to the greatest value; None where pixels have 8 bits
    """

    told: tuple[str, ...] = ()
    levels: int | None = None

    @property
    def dark(self) -> bool:
        """Whether 16-bit pixels use so little of their range that hardly anything of them is left."""
        return self.levels is not None and self.levels < _DARK

    def tell_dark(self) -> str:
        """What is wrong with a ``dark`` picture, and what to do."""
        return (
            f"16-bit pixels use {self.levels} of the 256 levels that are left of them, so that the model sees an "
            "almost black picture: save such pictures with 8 bits, scaled as for its training"
        )


class UnreadableImage(ValueError):
    """This picture cannot be used; the message is the reason that a run reports."""


def open_image(path: Path, needed: int | None = None) -> Image.Image:
    """The first frame of a picture, turned upright (EXIF), as 8-bit RGB.

    Transparency is laid over white.  16-bit grey keeps its upper 8 bits, CMYK and palettes are converted.
    ``needed``: pixels a side that the next step asks for; lets big JPEGs decode at a fraction.  None: full size.

    Raises UnreadableImage with the reason, for whatever is wrong with the file.
    """
    try:
        if not path.is_file():
            raise UnreadableImage("the file does not exist" if not path.exists() else "not a regular file")
        if path.stat().st_size == 0:
            raise UnreadableImage("the file is empty (0 bytes)")
        with Image.open(path) as image:
            pixels = image.width * image.height
            if pixels > MAX_PIXELS:
                raise UnreadableImage(_too_large(f"{image.width} x {image.height} = {pixels:,}"))
            if needed is not None and image.format == "JPEG":
                image.draft(None, (_OVERSAMPLING * needed, _OVERSAMPLING * needed))
            image.load()
            return to_rgb(_upright(image))
    except UnreadableImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(_too_large(str(error))) from error
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage("not an image that Pillow can read") from error
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files.
        raise UnreadableImage(f"damaged: {error or type(error).__name__}") from error


def list_conversions(path: Path) -> Conversions:
    """What ``open_image`` decides for this picture; nothing where it cannot be read.

    The header is read; pixels only where they have 16 bits or may be transparent.
    """
    try:
        with Image.open(path) as image:
            deep = image.mode.startswith("I") or any(";16" in str(tile) for tile in image.tile)
            clear = _may_be_clear(image)
            told = {
                _DEEP: deep,
                _FIRST: getattr(image, "is_animated", False),
                _TURNED: image.getexif().get(_ORIENTATION, 1) in range(2, 9),
                _INK: image.mode == "CMYK",
            }
            if clear and image.width * image.height <= MAX_PIXELS:
                told[_CLEAR] = bool((np.asarray(image.convert("RGBA"))[..., 3] < 255).any())
        levels = int(np.asarray(open_image(path)).max()) + 1 if deep else None
    except Exception:  # whatever is wrong with it, reading it will tell
        return Conversions()
    return Conversions(tuple(text for text, applies in told.items() if applies), levels)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of a loaded picture of any mode.  Raises UnreadableImage where its range of values is unknown."""
    mode = image.mode
    if mode == "F":
        raise UnreadableImage("floating-point pixels have no stated range: convert the picture to 8 or 16 bits")
    if mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UnreadableImage("32-bit pixels outside 0 to 65535: convert the picture to 8 or 16 bits")
        return Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if _may_be_clear(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if mode == "RGB" else image.convert("RGB")


def _may_be_clear(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Damaged EXIF data: viewers show such a picture as it is stored, and so do we.
        return image.copy()


def _too_large(detail: str) -> str:
    return f"too large: more than {MAX_PIXELS:,} pixels ({detail})"
