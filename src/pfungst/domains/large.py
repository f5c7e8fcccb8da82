"""Pictures larger than a model's input, read by region: TIFF by its tiles, slides through OpenSlide, others as a whole.

Only the tiles that a region touches are decoded, and the last 64 MB of them are kept; PNG, JPEG and TIFF of other kinds
have no regions and are decoded whole (4 bytes a pixel, at most ``decoding.MAX_PIXELS``).
"""

from __future__ import annotations

import importlib.util
import io
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, TiffImagePlugin

from pfungst.domains.decoding import UnreadableImage, open_image, to_rgb
from pfungst.errors import need

SLIDES = (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".dcm")
_KEPT = 64 * 2**20  # bytes of decoded tiles
_MOST_TILE = 64 * 2**20  # bytes of one tile: more is a damaged file, or one large strip, for which this does not pay
_RAW, _DEFLATE, _JPEG = (1,), (8, 32946), (7,)
_GREY, _RGB, _YCBCR = 1, 2, 6
# Tags of TIFF 6.0.
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION, _CHANNELS = 256, 257, 258, 259, 262, 274, 277
_ROWS, _PLANES, _PREDICTOR, _SAMPLE_FORMAT, _TABLES = 278, 284, 317, 339, 347
_STRIPS, _TILES = (273, 279), (324, 325)  # where they begin, how long they are
_TILE_WIDTH, _TILE_HEIGHT = 322, 323


class Region(Protocol):
    """A picture that is read by region.  ``size``: (height, width)."""

    size: tuple[int, int]

    def read(self, top: int, left: int, height: int, width: int) -> Image.Image:
        """The region, which lies inside the picture, as 8-bit RGB."""
        ...


def open_large(path: Path) -> Region:
    """A picture to be read by region; nothing but its header is read yet where its format allows that.

    Raises UnreadableImage with the reason for whatever is wrong with the file; MissingExtra for a slide where OpenSlide
    is not installed.
    """
    suffix = path.suffix.lower()
    if suffix in SLIDES:
        return Slide(path)
    if suffix in (".tif", ".tiff") and path.is_file():
        try:
            return TiledTiff(path)
        except UnreadableImage:
            # Many scanners write TIFF of their own kind.
            if importlib.util.find_spec("openslide") is not None and (found := Slide.if_known(path)):
                return found
    return Whole(path)


class Whole:
    """A picture that is decoded whole."""

    def __init__(self, path: Path) -> None:
        self._image = open_image(path)
        self.size = (self._image.height, self._image.width)

    def read(self, top: int, left: int, height: int, width: int) -> Image.Image:
        """The region as 8-bit RGB."""
        return self._image.crop((left, top, left + width, top + height))


class Slide:
    """A slide of a scanner that OpenSlide reads, at full resolution."""

    def __init__(self, path: Path) -> None:
        openslide = need("openslide", "slides", f"{path.name} needs OpenSlide")
        try:
            self._slide: Any = openslide.OpenSlide(path)
        except (openslide.OpenSlideError, OSError) as error:
            raise UnreadableImage(f"no slide that OpenSlide can read: {error}") from error
        width, height = self._slide.dimensions
        self.size = (height, width)

    @classmethod
    def if_known(cls, path: Path) -> Slide | None:
        """The slide, None where OpenSlide does not know the format."""
        try:
            return cls(path)
        except UnreadableImage:
            return None

    def read(self, top: int, left: int, height: int, width: int) -> Image.Image:
        """The region as 8-bit RGB; what was not scanned is white."""
        try:
            return to_rgb(self._slide.read_region((left, top), 0, (width, height)))
        except Exception as error:  # openslide.OpenSlideError, and what Pillow raises
            raise UnreadableImage(f"damaged: {error}") from error


class TiledTiff:
    """The first page of a TIFF of 8-bit grey or RGB whose tiles or strips are raw, deflated or JPEG."""

    def __init__(self, path: Path) -> None:
        try:
            # Not Image.open: its limit of pixels is one for pictures that are decoded whole.
            with TiffImagePlugin.TiffImageFile(path) as image:
                tags = dict(image.tag_v2)
            self._read_tags(tags)
        except UnreadableImage:
            raise
        except Exception as error:  # Pillow raises almost anything on damaged files
            raise UnreadableImage(f"damaged: {error or type(error).__name__}") from error
        self._path = path
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()

    def _read_tags(self, tags: dict[int, Any]) -> None:
        bits, self._channels = tags.get(_BITS, (1,)), int(tags.get(_CHANNELS, 1))
        self._compression, photometric = int(tags.get(_COMPRESSION, 1)), int(tags.get(_PHOTOMETRIC, -1))
        self._predictor = int(tags.get(_PREDICTOR, 1))
        colours = {1: (_GREY,), 3: (_YCBCR,) if self._compression in _JPEG else (_RGB,)}
        fits = (
            set(bits) == {8}
            and photometric in colours.get(self._channels, ())
            and self._compression in (*_RAW, *_DEFLATE, *_JPEG)
            and self._predictor in (1, 2)
            and tags.get(_PLANES, 1) == 1
            and tags.get(_ORIENTATION, 1) == 1
            and set(np.ravel(tags.get(_SAMPLE_FORMAT, 1)).tolist()) == {1}
        )
        if not fits:
            raise UnreadableImage("a TIFF that is not read by tiles")
        self.size = (int(tags[_HEIGHT]), int(tags[_WIDTH]))
        tiled = _TILES[0] in tags
        height, width = (
            (int(tags[_TILE_HEIGHT]), int(tags[_TILE_WIDTH]))
            if tiled
            else (min(int(tags.get(_ROWS, self.size[0])), self.size[0]), self.size[1])
        )
        self._tile, self._tiled = (height, width), tiled
        self._across = -(-self.size[1] // width)
        self._places, self._lengths = (tuple(tags[tag]) for tag in (_TILES if tiled else _STRIPS))
        count = self._across * -(-self.size[0] // height)
        if len(self._places) != count or len(self._lengths) != count:
            raise UnreadableImage(f"damaged: {len(self._places)} tiles instead of {count}")
        if height * width * self._channels > _MOST_TILE:
            raise UnreadableImage("a TIFF that is not read by tiles")
        self._tables: bytes = tags.get(_TABLES, b"")

    def read(self, top: int, left: int, height: int, width: int) -> Image.Image:
        """The region as 8-bit RGB, from the tiles that it touches."""
        out = np.empty((height, width, self._channels), np.uint8)
        rows, columns = self._tile
        with self._path.open("rb") as handle:
            for y in range(top // rows, -(-(top + height) // rows)):
                for x in range(left // columns, -(-(left + width) // columns)):
                    tile = self._decoded(y * self._across + x, handle)
                    first = max(top, y * rows), max(left, x * columns)
                    last = min(top + height, (y + 1) * rows), min(left + width, (x + 1) * columns)
                    out[first[0] - top : last[0] - top, first[1] - left : last[1] - left] = tile[
                        first[0] - y * rows : last[0] - y * rows, first[1] - x * columns : last[1] - x * columns
                    ]
        return Image.fromarray(out if self._channels == 3 else out[..., 0]).convert("RGB")

    def _decoded(self, number: int, handle: Any) -> np.ndarray:
        """One tile (rows, columns, channels), kept for the next region."""
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        handle.seek(self._places[number])
        try:
            tile = self._decode(handle.read(self._lengths[number]), number)
        except Exception as error:  # zlib's and Pillow's errors, and tiles that are too short
            raise UnreadableImage(f"damaged: tile {number}: {error or type(error).__name__}") from error
        self._kept[number] = tile
        while len(self._kept) > 1 and len(self._kept) * tile.nbytes > _KEPT:
            self._kept.popitem(last=False)
        return tile

    def _decode(self, content: bytes, number: int) -> np.ndarray:
        rows, columns = self._tile
        if not self._tiled:  # the last strip ends with the picture, while tiles are filled up
            rows = min(rows, self.size[0] - number * rows)
        if self._compression in _JPEG:
            # An abbreviated JPEG stream: its tables stand in a tag, from which the markers of the ends are left out.
            whole = self._tables[:-2] + content[2:] if self._tables else content
            with Image.open(io.BytesIO(whole)) as image:
                if image.size != (columns, rows):
                    raise UnreadableImage(f"{image.size} instead of {(columns, rows)} pixels")
                return np.asarray(image.convert("RGB" if self._channels == 3 else "L")).reshape(rows, columns, -1)
        length = rows * columns * self._channels
        if self._compression in _DEFLATE:
            content = zlib.decompressobj().decompress(content, length)
        tile = np.frombuffer(content, np.uint8, length).reshape(rows, columns, self._channels)
        # Horizontal differencing, modulo 256.
        return np.cumsum(tile, 1, dtype=np.uint8) if self._predictor == 2 else tile
