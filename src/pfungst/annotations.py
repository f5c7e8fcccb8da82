"""Where the objects are: masks of pictures from a folder of mask images, COCO, YOLO or VOC XML.

    masks/          one image a picture, of the same name (also NAME_mask, or in the same subfolder): 0 is background
    instances.json  COCO: boxes, polygons, or run lengths
    labels/         YOLO: a .txt a picture, "class x y width height" or polygons, in shares of the picture
    Annotations/    VOC: an .xml a picture, boxes

Of annotations that name categories, those count that are named like the class that is explained; where no category is
named like any class, all count, and a note says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image

from pfungst.domains.image import SUFFIXES, ImageData, Preprocess
from pfungst.errors import DataError, need

Shape = tuple[str, Any]  # ("box", (left, top, right, bottom)), ("polygon", [x, y, ...]), ("runs", {...}), in pixels
_REMEDY = "give a folder of mask images, a COCO .json, a folder of YOLO .txt or of VOC .xml files"


@dataclass(frozen=True)
class Annotations:
    """Shapes by picture.

    ``shapes``: by row of the data, (category, shape) of each object; None: the picture is not annotated.
    ``files``: by row, a mask image in place of shapes.  ``shares``: coordinates are shares of the picture (YOLO).
    ``notes``: what a user should know.
    """

    shapes: dict[int, list[tuple[str, Shape]]] = field(default_factory=dict)
    files: dict[int, Path] = field(default_factory=dict)
    shares: bool = False
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.shapes) + len(self.files)

    @property
    def digest(self) -> str:
        """sha256 (hex) of the shapes, and of name, size and date of mask images."""
        files = [(row, str(path), path.stat().st_size, path.stat().st_mtime_ns) for row, path in self.files.items()]
        return hashlib.sha256(repr((self.shapes, files, self.shares)).encode()).hexdigest()

    def choose(self, classes: Sequence[str], only: Sequence[str] | None = None) -> Annotations:
        """The same with the categories' names compared: ``only`` these, else those named like a class, else all."""
        names = {name for objects in self.shapes.values() for name, _ in objects}
        if only:
            missing = [name for name in only if _plain(name) not in map(_plain, names)]
            if missing:
                raise DataError(f"no object is called {missing[0]!r}", f"there are {', '.join(sorted(names)[:12])}")
            wanted = {_plain(name) for name in only}
            kept = {
                row: [("", s) for name, s in objects if _plain(name) in wanted] for row, objects in self.shapes.items()
            }
            return replace(self, shapes=kept)
        if names and not {part for name in classes for part in _synonyms(name)} & {_plain(name) for name in names}:
            kept = {row: [("", s) for _, s in objects] for row, objects in self.shapes.items()}
            note = f"no annotated category ({', '.join(sorted(names)[:4])}) is named like a class: all objects count"
            return replace(self, shapes=kept, notes=(*self.notes, note))
        return self

    def mask(self, row: int, size: tuple[int, int], category: str) -> np.ndarray | None:
        """(H, W) bool of a picture of ``size`` (height, width), or None where it is not annotated.

        Raises DataError where a mask's shape is not the picture's.
        """
        if row in self.files:
            return _read_mask(self.files[row], size)
        if row not in self.shapes:
            return None
        names = {"", *_synonyms(category)}
        canvas = np.zeros(size, bool)
        for name, shape in self.shapes[row]:
            if _plain(name) in names:
                canvas |= _draw(shape, size, self.shares)
        return canvas


def read_annotations(path: str | Path, data: ImageData) -> Annotations:
    """The annotations of these pictures.  Raises DataError where there are none, or they cannot be read."""
    path = Path(path)
    try:
        found = _reader(path)(path, _rows_by_name(data))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ElementTree.ParseError) as error:
        raise DataError(f"the annotations in {path} cannot be read: {type(error).__name__}: {error}", _REMEDY) from None
    if not len(found):
        raise DataError(f"{path} has no annotation of any of the {len(data)} pictures", "names must be the same")
    missing = len(data) - len(found)
    note = (f"{missing} of {len(data)} pictures are not annotated and have no localisation",) if missing else ()
    return replace(found, notes=(*found.notes, *note))


def fit_mask(mask: np.ndarray, preprocess: Preprocess) -> torch.Tensor:
    """The mask (H, W) bool as the preprocessing fits pictures to the model's input, (height, width) bool."""
    picture = Image.fromarray(mask.astype(np.uint8) * 255).convert("L" if preprocess.channels == "L" else "RGB")
    if preprocess.custom is None:
        fitted = replace(preprocess, interpolation="nearest").fit(picture).convert("L")
        if preprocess.crop == "pad":  # what is filled up has the mean colour, and is no object
            return torch.from_numpy((np.asarray(fitted) > 127) & _within(mask, preprocess))
        return torch.from_numpy(np.asarray(fitted) > 127)
    # A callable of the model's own: what it makes of the mask, between what it makes of black and of white.
    shown = [preprocess(Image.new("RGB", picture.size, colour)) for colour in ("black", "white")]
    result = preprocess(picture.convert("RGB"))
    return ((result - shown[0]).abs() > (result - shown[1]).abs()).float().mean(0) > 0.5


def _within(mask: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """Where the picture itself lies in a padded input."""
    top, left, bottom, right = preprocess.window(*mask.shape)
    rows = np.linspace(top, bottom, 2 * preprocess.size[0] + 1)[1::2]
    columns = np.linspace(left, right, 2 * preprocess.size[1] + 1)[1::2]
    return np.outer((rows >= 0) & (rows < mask.shape[0]), (columns >= 0) & (columns < mask.shape[1])).astype(bool)


# ---- the four forms ------------------------------------------------------------------------------------------------

Find = Callable[[str], list[int]]


def _reader(path: Path) -> Callable[[Path, Find], Annotations]:
    if path.suffix.lower() == ".json" and path.is_file():
        return _read_coco
    if not path.is_dir():
        raise DataError(f"{path} is neither a folder nor a .json file", _REMEDY)
    suffixes = {file.suffix.lower() for file in path.rglob("*") if file.is_file()}
    if ".xml" in suffixes:
        return _read_voc
    if suffixes & SUFFIXES:
        return _read_masks
    if ".txt" in suffixes:
        return _read_yolo
    raise DataError(f"{path} holds no annotations", _REMEDY)


def _rows_by_name(data: ImageData) -> Find:
    """The rows that a name of an annotation means: a path without its ending, or the file's name where it is unique."""
    exact: dict[str, list[int]] = {}
    short: dict[str, list[int]] = {}
    for row, name in enumerate(data.ids):
        exact.setdefault(str(Path(name).with_suffix("")), []).append(row)
        short.setdefault(Path(name).stem, []).append(row)

    def find(name: str) -> list[int]:
        plain = Path(name).with_suffix("") if Path(name).suffix.lower() in {*SUFFIXES, ".txt", ".xml"} else Path(name)
        for stem in (str(plain), str(plain).removesuffix("_mask")):
            if stem in exact:
                return exact[stem]
        for stem in (plain.name, plain.name.removesuffix("_mask")):
            if stem in short:
                if len({str(data.paths[row]) for row in short[stem]}) > 1:
                    raise ValueError(
                        f"{name} may be any of {len(short[stem])} pictures: keep their folders in the name"
                    )
                return short[stem]
        return []

    return find


def _read_masks(path: Path, find: Find) -> Annotations:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    return Annotations(files={row: file for file in files for row in find(str(file.relative_to(path)))})


def _read_coco(path: Path, find: Find) -> Annotations:
    content = json.loads(path.read_text())
    names = {one["id"]: str(one["name"]) for one in content.get("categories", [])}
    rows = {one["id"]: find(one["file_name"]) for one in content["images"]}
    shapes: dict[int, list[tuple[str, Shape]]] = {row: [] for found in rows.values() for row in found}
    for one in content["annotations"]:
        for row in rows.get(one["image_id"], []):
            name, segments = names.get(one.get("category_id"), ""), one.get("segmentation")
            if isinstance(segments, dict):
                shapes[row].append((name, ("runs", segments)))
            elif segments:
                shapes[row] += [(name, ("polygon", points)) for points in segments]
            else:
                left, top, width, height = one["bbox"]
                shapes[row].append((name, ("box", (left, top, left + width, top + height))))
    return Annotations(shapes)


def _read_voc(path: Path, find: Find) -> Annotations:
    shapes: dict[int, list[tuple[str, Shape]]] = {}
    for file in sorted(path.rglob("*.xml")):
        root = ElementTree.parse(file).getroot()
        rows = find(str(file.relative_to(path))) or find(root.findtext("filename") or "")
        objects: list[tuple[str, Shape]] = []
        for one in root.iter("object"):
            box = one.find("bndbox")
            if box is None:
                continue
            # VOC counts pixels from 1, both ends within the box.
            left, top, right, bottom = (float(box.findtext(key) or "nan") for key in ("xmin", "ymin", "xmax", "ymax"))
            objects.append((one.findtext("name") or "", ("box", (left - 1, top - 1, right, bottom))))
        for row in rows:
            shapes[row] = objects
    return Annotations(shapes)


def _read_yolo(path: Path, find: Find) -> Annotations:
    names = _yolo_names(path)
    shapes: dict[int, list[tuple[str, Shape]]] = {}
    for file in sorted(path.rglob("*.txt")):
        rows = find(str(file.relative_to(path)))
        objects: list[tuple[str, Shape]] = []
        for line in file.read_text().splitlines() if rows else ():
            index, *numbers = line.split()
            values = [float(number) for number in numbers]
            if len(values) == 4:
                x, y, width, height = values
                shape: Shape = ("box", (x - width / 2, y - height / 2, x + width / 2, y + height / 2))
            else:
                shape = ("polygon", values)
            objects.append((names.get(int(index), index), shape))
        for row in rows:
            shapes[row] = objects
    return Annotations(shapes, shares=True)


def _yolo_names(path: Path) -> dict[int, str]:
    for folder in (path, path.parent):
        if (folder / "classes.txt").is_file():
            return dict(enumerate((folder / "classes.txt").read_text().split("\n")))
    return {}


# ---- shapes as pixels ----------------------------------------------------------------------------------------------


def _draw(shape: Shape, size: tuple[int, int], shares: bool) -> np.ndarray:
    """The pixels (H, W) bool whose centres lie in the shape."""
    height, width = size
    kind, values = shape
    if kind == "runs":
        return _decode_runs(values, size)
    scale = np.array([width, height]) if shares else np.ones(2)
    points = np.asarray(values, float).reshape(-1, 2) * scale
    canvas = np.zeros(size, bool)
    if kind == "box":
        (left, top), (right, bottom) = np.ceil(points - 0.5).clip(0, (width, height)).astype(int)
        canvas[top:bottom, left:right] = True
        return canvas
    # Even-odd by rows: between the crossings of a row's middle with the outline lie the pixels inside.
    ends = np.roll(points, -1, 0)
    for row in range(max(0, int(points[:, 1].min())), min(height, int(points[:, 1].max()) + 1)):
        y = row + 0.5
        crosses = (points[:, 1] <= y) != (ends[:, 1] <= y)
        (x1, y1), (x2, y2) = points[crosses].T, ends[crosses].T
        at = np.sort(x1 + (y - y1) * (x2 - x1) / (y2 - y1))
        for left, right in np.ceil(at - 0.5).clip(0, width).astype(int).reshape(-1, 2):
            canvas[row, left:right] = True
    return canvas


def _decode_runs(runs: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    if isinstance(runs["counts"], str | bytes):
        coco = need(
            "pycocotools.mask", "masks", "compressed COCO masks are read by pycocotools, which is not installed"
        )
        decoded: np.ndarray = coco.decode(runs).astype(bool)
        return decoded
    height, width = runs["size"]
    ends = np.cumsum(runs["counts"])
    flat = np.zeros(height * width, bool)
    for start, end in zip(ends[::2], ends[1::2], strict=False):
        flat[start:end] = True
    mask = flat.reshape(width, height).T
    return _resized(mask, size, "a COCO mask")


def _read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    with Image.open(path) as picture:
        values = np.asarray(picture.convert("RGB") if picture.mode in ("RGBA", "CMYK") else picture)
        void = picture.mode == "P"
    mask: np.ndarray = np.asarray(values.any(2) if values.ndim == 3 else values != 0)
    if void:
        mask &= values != 255  # VOC's "neither object nor background"
    return _resized(mask, size, str(path))


def _resized(mask: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
    if mask.shape == size:
        return mask
    if abs(mask.shape[0] * size[1] - mask.shape[1] * size[0]) > max(*mask.shape, *size):
        raise DataError(
            f"{name} has {mask.shape[1]} x {mask.shape[0]} pixels, its picture {size[1]} x {size[0]}",
            "masks have the size or the proportions of their picture",
        )
    return np.asarray(Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST)).astype(bool)


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


def _synonyms(name: str) -> set[str]:
    return {_plain(part) for part in (name, *name.split(","))}
