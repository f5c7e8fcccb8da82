"""Deep zoom: a picture of any size as a pyramid of tiles that viewers (OpenSeadragon, QuPath, ...) load piece by piece.

``NAME.dzi`` describes it and ``NAME_files/LEVEL/COLUMN_ROW.png`` are its tiles; level 0 is one pixel, each next one
twice as large.  Every tile of the largest level is asked for once; coarser ones are means of four, made on the way, so
that memory holds a few tiles whatever the picture's size.
"""

from __future__ import annotations

import io
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from pfungst.errors import SettingError
from pfungst.store import writing

TILE = 256
FORMATS = {"png": "PNG", "jpeg": "JPEG"}


def write_pyramid(
    folder: Path,
    name: str,
    size: tuple[int, int],
    read: Callable[[int, int, int, int], np.ndarray | Image.Image],
    *,
    form: str = "png",
    tile: int = TILE,
) -> Path:
    """Write the pyramid of a picture and return the path of its ``.dzi``.

    size  (height, width)
    read  (top, left, height, width) -> that region, (height, width, 3) uint8 or a picture
    form  ``png``, or ``jpeg`` (quality 90) for photographs
    tile  side of a tile, in pixels; tiles do not overlap

    Tiles are written beside their place first and renamed when all are there; a pyramid of the same name is replaced.
    """
    if form not in FORMATS or tile < 1 or min(size) < 1:
        raise SettingError(f"a pyramid of {size} pixels, {form!r}, tile {tile}", f"use {' or '.join(FORMATS)}")
    height, width = size
    top_level = (max(size) - 1).bit_length()
    beside, place = folder / f".{secrets.token_hex(8)}.part", folder / f"{name}_files"

    def build(level: int, column: int, row: int) -> Image.Image:
        """One tile, with all finer ones below it."""
        shrink = top_level - level
        left, top = column * tile, row * tile
        wide, high = (min(tile, -(-side >> shrink) - first) for side, first in ((width, left), (height, top)))
        if level == top_level:
            found = read(top, left, high, wide)
            image = found if isinstance(found, Image.Image) else Image.fromarray(found)
        else:
            finer = [-(-side >> (shrink - 1)) for side in (width, height)]
            whole = Image.new("RGB", (min(2 * tile, finer[0] - 2 * left), min(2 * tile, finer[1] - 2 * top)))
            for y in range(2):
                for x in range(2):
                    if x * tile < whole.width and y * tile < whole.height:
                        whole.paste(build(level + 1, 2 * column + x, 2 * row + y), (x * tile, y * tile))
            image = whole.reduce(2)
        buffer = io.BytesIO()
        image.save(buffer, FORMATS[form], **({"quality": 90} if form == "jpeg" else {}))
        path = beside / str(level) / f"{column}_{row}.{form}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(buffer.getvalue())
        return image

    description = (
        '<?xml version="1.0" encoding="UTF-8"?>\n<Image xmlns="http://schemas.microsoft.com/deepzoom/2008" '
        f'Format="{form}" Overlap="0" TileSize="{tile}"><Size Width="{width}" Height="{height}"/></Image>\n'
    )
    path = folder / f"{name}.dzi"
    with writing(folder):
        beside.mkdir(parents=True)
        try:
            build(0, 0, 0)
            if path.exists():  # else the folder is nobody's that we know, and stays
                shutil.rmtree(place, ignore_errors=True)
            path.write_text(description, encoding="utf-8")
            beside.rename(place)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return path
