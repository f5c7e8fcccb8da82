"""One picture from disk as upright RGB, or the reason why not.

Nothing here changes Pillow's global settings: the size is read from the header, before any pixel is decoded.
"""

from __future__ import annotations

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
    if mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Damaged EXIF data: viewers show such a picture as it is stored, and so do we.
        return image.copy()


def _too_large(detail: str) -> str:
    return f"too large: more than {MAX_PIXELS:,} pixels ({detail})"
