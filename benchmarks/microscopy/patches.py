"""Annotated cells and nuclei, and the patches that networks are trained on.

blood   364 smears (BCCD, MIT licence) with boxes of white cells, red cells and platelets, reduced five times to
        128 x 96: a white cell is about 40 pixels wide, a red one 21, a platelet 8.  Boxes become ellipses.  Not every
        cell has a box; red cells at the edges and some platelets have none.
tissue  70 pictures of stained tissue (DSB 2018, CC0) with outlined nuclei, 320 x 256; a nucleus is 8 to 90 pixels wide.
        There are no cancer labels, so that the class is "nucleus" and what is not of it are discs of the background.

A patch is ``SIZE`` pixels square.  It is of the class if the class's cells have at least half a typical cell's pixels
in it, not of the class if they have none; patches in between are not used.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from scipy.ndimage import distance_transform_edt

from pfungst.quality.cells import draw_cells

SIZE = 48
SHRINK = 5  # of the blood smears
ROOT = Path(os.environ.get("PFUNGST_DATA", Path(__file__).parents[3] / "shared" / "data"))
KINDS = {"WBC": "white", "RBC": "red", "Platelets": "platelet"}
BACKGROUND_DRAWS = 60  # places tried for the background disc of a nucleus


@dataclass(frozen=True)
class Picture:
    """A picture and its cells: pixels (H, W, 3) uint8, label image (H, W), ``kinds`` (K,) of the cells 1 ... K."""

    name: str
    pixels: np.ndarray
    cells: np.ndarray
    kinds: np.ndarray

    def mask(self, *kinds: str) -> np.ndarray:
        """(H, W) bool: where cells of these kinds are."""
        return np.concatenate([[False], np.isin(self.kinds, kinds)])[self.cells]


def read_blood(root: Path = ROOT, limit: int | None = None) -> list[Picture]:
    """The blood smears in the order of their names; ``limit``: the first ones."""
    folder, pictures = root / "bccd-blood-cells", []
    for file in sorted((folder / "Annotations").glob("*.xml"))[:limit]:
        smear = Image.open(folder / "JPEGImages" / f"{file.stem}.jpg").convert("RGB").reduce(SHRINK)
        found = list(ElementTree.parse(file).iter("object"))
        boxes = np.array([_box(one) for one in found]).reshape(-1, 4) / SHRINK
        kinds = np.array([KINDS[one.findtext("name") or ""] for one in found], dtype="U10")
        pixels = np.asarray(smear)
        pictures.append(Picture(file.stem, pixels, draw_cells(boxes, pixels.shape[:2]), kinds))
    return pictures


def read_tissue(root: Path = ROOT, limit: int | None = None) -> list[Picture]:
    """The tissue pictures in the order of their names; all cells are nuclei."""
    folder, pictures = root / "dsb2018-he-nuclei", []
    for file in sorted((folder / "images").glob("*.png"))[:limit]:
        cells = np.asarray(Image.open(folder / "labels" / file.name)).astype(np.int32)
        kinds = np.full(cells.max(), "nucleus", dtype="U10")
        pictures.append(Picture(file.stem, np.asarray(Image.open(file).convert("RGB")), cells, kinds))
    return pictures


def _box(found: ElementTree.Element) -> list[float]:
    return [float(found.findtext(f"bndbox/{side}") or 0) for side in ("xmin", "ymin", "xmax", "ymax")]


def split(pictures: Sequence[Picture], share: float = 0.35, seed: int = 0) -> tuple[list[Picture], list[Picture]]:
    """Pictures to train on and, ``share`` of them, to test on."""
    order = np.random.default_rng(seed).permutation(len(pictures))
    held = round(share * len(pictures))
    return [pictures[i] for i in sorted(order[held:])], [pictures[i] for i in sorted(order[:held])]


def add_background(picture: Picture, rng: np.random.Generator) -> Picture:
    """Beside each nucleus a disc of background of the same area and, of those tried, the most similar darkness.

    Discs touch neither nuclei nor each other, so that in a crowded picture there are fewer of them than nuclei.
    """
    grey = picture.pixels.mean(2)
    cells, kinds = picture.cells.copy(), list(picture.kinds)
    areas = np.bincount(cells.ravel(), minlength=len(kinds) + 1)[1:]
    darkness = np.bincount(cells.ravel(), grey.ravel(), len(kinds) + 1)[1:] / np.maximum(areas, 1)
    rows, columns = np.mgrid[: cells.shape[0], : cells.shape[1]]
    for number in rng.permutation(len(areas)):
        radius = np.sqrt(areas[number] / np.pi)
        clearance = distance_transform_edt(np.pad(cells == 0, 1))[1:-1, 1:-1]  # to cells and to the picture's edge
        places = np.argwhere(clearance > radius + 1)
        if not len(places) or not areas[number]:
            continue
        tried = places[rng.integers(len(places), size=BACKGROUND_DRAWS)]
        discs = [(rows - y) ** 2 + (columns - x) ** 2 <= radius**2 for y, x in tried]
        best = min(discs, key=lambda disc: abs(grey[disc].mean() - darkness[number]))
        kinds.append("background")
        cells[best] = len(kinds)
    return replace(picture, cells=cells, kinds=np.array(kinds, dtype="U10"))


# ---- places of patches ----------------------------------------------------------------------------------------------


def count_pixels(mask: np.ndarray, size: int = SIZE) -> np.ndarray:
    """(H - size + 1, W - size + 1): how many pixels of the mask each patch has, by its top left corner."""
    sums = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    return sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]


def typical_area(pictures: Sequence[Picture], kind: str) -> float:
    """The median area of the cells of a kind, in pixels."""
    areas = [np.bincount(p.cells.ravel(), minlength=len(p.kinds) + 1)[1:][p.kinds == kind] for p in pictures]
    return float(np.median(np.concatenate(areas)))


@dataclass(frozen=True)
class Group:
    """Places of patches that are drawn alike: their label, and for each picture (m, 2) top left corners."""

    label: int
    places: tuple[np.ndarray, ...]


def with_cells(pictures: Sequence[Picture], kind: str, label: int = 1, without: Sequence[str] = ()) -> Group:
    """Patches with at least half a typical cell of the kind, and without any pixel of the kinds ``without``."""
    least = typical_area(pictures, kind) / 2
    return Group(label, tuple(
        np.argwhere((count_pixels(p.mask(kind)) >= least) & (count_pixels(p.mask(*without)) == 0)) for p in pictures
    ))  # fmt: skip


def without_cells(pictures: Sequence[Picture], *kinds: str) -> Group:
    """Patches without any pixel of these kinds, label 0."""
    return Group(0, tuple(np.argwhere(count_pixels(p.mask(*kinds)) == 0) for p in pictures))


def by_centre(pictures: Sequence[Picture], kind: str, clear: int = 4) -> tuple[Group, Group]:
    """Patches labelled by their centre alone: it lies in a cell, or at least ``clear`` pixels from any.

    All of them have half a typical cell or more in them, wherever.
    """
    least, half = typical_area(pictures, kind) / 2, SIZE // 2
    inside, outside = [], []
    for picture in pictures:
        mask = picture.mask(kind)
        crowded = count_pixels(mask) >= least
        height, width = crowded.shape
        away = distance_transform_edt(~mask)[half : half + height, half : half + width] if mask.any() else crowded
        inside.append(np.argwhere(crowded & mask[half : half + height, half : half + width]))
        outside.append(np.argwhere(crowded & (away >= clear)))
    return Group(1, tuple(inside)), Group(0, tuple(outside))


def draw_patches(
    pictures: Sequence[Picture], groups: Sequence[Group], count: int, rng: np.random.Generator, size: int = SIZE
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patches (count, size, size, 3) uint8, labels (count,), and where from: (count, 3) picture, top, left.

    Groups come in turn; within a group each picture that has places comes equally often.
    """
    able = [[i for i, places in enumerate(group.places) if len(places)] for group in groups]
    patches, labels, origins = np.empty((count, size, size, 3), np.uint8), np.empty(count, np.int64), []
    for row in range(count):
        group = groups[row % len(groups)]
        number = able[row % len(groups)][rng.integers(len(able[row % len(groups)]))]
        top, left = group.places[number][rng.integers(len(group.places[number]))]
        patches[row] = pictures[number].pixels[top : top + size, left : left + size]
        labels[row] = group.label
        origins.append((number, top, left))
    return patches, labels, np.array(origins)
