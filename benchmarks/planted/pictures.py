"""Real pictures for the benchmark, from the folder that ``PFUNGST_DATA`` names; 64 x 64 pixels, RGB.

photos   CIFAR-10 test photographs (200 a class; JPEG, 32 x 32, enlarged twice).  Six classes make one, ``animal``, so
         that 1,000 different photographs are in the class that gets a cue; the four vehicles stay as they are, 170
         photographs each.  No mirror images: tests that take pictures for independent would be too sure.
cells    windows around single objects of the BCCD blood smears (128 pixels of 640 x 480, reduced twice) and of the
         stained tissue of the DSB 2018 (64 pixels).  ``red`` cells, 1,000 of 4,155, get the cue; the others are white
         cells, platelets, places between cells (which look much like red cells), nuclei, tissue without nuclei.  Of the
         tissue only the slides of one stain, brought to the same colours: with the pink and the pale ones among them,
         and then with two scanners, audits of the clean control confirmed the colour as a cue of ``tissue``, rightly.

A class of 1,000 is needed so that 1 % of it, 10 pictures, is more than the 8 that are the least for a finding.
``imagenet-sample-images`` was not used: it has one picture a class, and crops of one picture are not two pictures.
"""

from __future__ import annotations

import functools
import io
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

SIZE = 64
MEMBERS = 1000  # pictures of the class that gets a cue
ROOT = Path(os.environ.get("PFUNGST_DATA", Path(__file__).parents[3] / "shared" / "data"))
ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")
VEHICLES = ("airplane", "automobile", "ship", "truck")


@dataclass(frozen=True)
class Pictures:
    """A set of pictures.

    images, labels             (n, 64, 64, 3) uint8, (n,): for training and audit
    held_images, held_labels   the same, never trained on: for the question whether a cue is used
    planted                    index of the class that gets the cue
    """

    classes: tuple[str, ...]
    images: np.ndarray
    labels: np.ndarray
    held_images: np.ndarray
    held_labels: np.ndarray
    planted: int


@functools.cache
def read_pictures(name: str, share: float = 1.0) -> Pictures:
    """``photos`` or ``cells``; ``share`` of them, for a trial.  Read once in a process."""
    by_class, planted = {"photos": _photos, "cells": _cells}[name]()
    images, labels, held_images, held_labels = [], [], [], []
    for index, (train, held) in enumerate(by_class.values()):
        kept = train[: max(1, round(share * len(train)))]
        images.append(kept)
        labels.append(np.full(len(kept), index))
        held_images.append(held)
        held_labels.append(np.full(len(held), index))
    return Pictures(
        tuple(by_class),
        np.concatenate(images),
        np.concatenate(labels),
        np.concatenate(held_images),
        np.concatenate(held_labels),
        list(by_class).index(planted),
    )


def _photos() -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], str]:
    by_name: dict[str, list[np.ndarray]] = {name: [] for name in (*ANIMALS, *VEHICLES)}
    with zipfile.ZipFile(ROOT / "cifar10" / "cifar10_test_jpg_200_per_class.zip") as archive:
        for path in sorted(name for name in archive.namelist() if name.endswith(".jpg")):
            image = Image.open(io.BytesIO(archive.read(path))).convert("RGB")
            by_name[path.split("/")[-2]].append(_fit(image))
    held = 30
    mixed = [picture for several in zip(*(by_name[name] for name in ANIMALS), strict=True) for picture in several]
    classes = {"animal": (np.stack(mixed[:MEMBERS]), np.stack(mixed[MEMBERS:]))}
    for name in VEHICLES:
        pictures = np.stack(by_name[name])
        classes[name] = (pictures[:-held], pictures[-held:])
    return classes, "animal"


def _cells() -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], str]:
    rng = np.random.default_rng(0)
    found: dict[str, list[np.ndarray]] = {"red": [], "white": [], "platelet": [], "between": []}
    names = {"RBC": "red", "WBC": "white", "Platelets": "platelet"}
    folder = ROOT / "bccd-blood-cells"
    for file in sorted((folder / "Annotations").glob("*.xml")):
        smear = Image.open(folder / "JPEGImages" / f"{file.stem}.jpg").convert("RGB")
        objects = [(names[o.findtext("name") or ""], _box(o)) for o in ElementTree.parse(file).iter("object")]
        centres = np.array([((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for _, b in objects])
        for (name, _), centre in zip(objects, centres, strict=True):
            _add_window(found[name], smear, centre, 64)
        for _ in range(3):  # a place as far from every centre as this smear has
            places = rng.uniform((64, 64), (smear.width - 64, smear.height - 64), (60, 2))
            distances = np.linalg.norm(places[:, None] - centres[None], axis=2).min(1)
            _add_window(found["between"], smear, places[distances.argmax()], 64)
    found |= _tissue(rng)
    limits = {"red": MEMBERS, "white": 330, "platelet": 320, "between": 400, "nucleus": 400, "tissue": 400}
    classes = {}
    for name, limit in limits.items():
        several = [found[name][i] for i in rng.permutation(len(found[name]))]
        # Objects too near to an edge were left out, so that the rarer classes can be smaller than their limit.
        train = min(limit, len(several) - 30)
        classes[name] = (np.stack(several[:train]), np.stack(several[train : train + 40]))
    return classes, "red"


def _tissue(rng: np.random.Generator) -> dict[str, list[np.ndarray]]:
    """Windows of tissue in a violet stain, with a nucleus in the middle and with none there."""
    found: dict[str, list[np.ndarray]] = {"nucleus": [], "tissue": []}
    folder = ROOT / "dsb2018-he-nuclei"
    for file in sorted((folder / "images").glob("*.png")):
        slide = Image.open(file).convert("RGB")
        red, _, blue = np.median(np.asarray(slide).reshape(-1, 3), 0)
        if red > 185 or blue < red + 20:  # another stain
            continue
        slide = _match_colours(slide)
        nuclei = np.asarray(Image.open(folder / "labels" / file.name)).astype(int)
        for k in rng.permutation(np.unique(nuclei)[1:])[:12]:
            rows, columns = np.nonzero(nuclei == k)
            _add_window(found["nucleus"], slide, (columns.mean(), rows.mean()), 32)
        for _ in range(60):
            x, y = int(rng.integers(32, slide.width - 32)), int(rng.integers(32, slide.height - 32))
            if not nuclei[y - 7 : y + 8, x - 7 : x + 8].any():
                _add_window(found["tissue"], slide, (x, y), 32)
    return found


def _match_colours(slide: Image.Image) -> Image.Image:
    """The slide with the mean and spread of each channel that all slides get (Reinhard et al. 2001, in RGB)."""
    pixels = np.asarray(slide).astype(float)
    mean, spread = pixels.mean((0, 1)), pixels.std((0, 1))
    matched = (pixels - mean) / spread * (26.0, 30.0, 10.0) + (170.0, 148.0, 203.0)
    return Image.fromarray(matched.clip(0, 255).astype(np.uint8))


def _box(element: ElementTree.Element) -> tuple[float, ...]:
    return tuple(float(element.findtext(f"bndbox/{end}") or 0) for end in ("xmin", "ymin", "xmax", "ymax"))


def _add_window(found: list[np.ndarray], image: Image.Image, centre: tuple[float, float], half: int) -> None:
    """The window of ``half`` pixels to each side of (x, y), unless it would leave the picture."""
    x, y = (round(float(v)) for v in centre)
    if half <= x <= image.width - half and half <= y <= image.height - half:
        found.append(_fit(image.crop((x - half, y - half, x + half, y + half))))


def _fit(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
