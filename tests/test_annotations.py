"""Masks from mask images, COCO, YOLO and VOC, fitted as the model's preprocessing fits pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pfungst.annotations import fit_mask, read_annotations
from pfungst.domains.image import read_images
from pfungst.domains.preprocessing import Preprocess
from pfungst.errors import DataError

SIZE = (20, 30)  # height, width


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", SIZE[::-1], (9, 99, 9)).save(tmp_path / "images" / label / f"{label}{number}.png")
    return tmp_path


def box(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[top:bottom, left:right] = True
    return mask


def test_mask_images_by_name(folder: Path) -> None:
    masks = folder / "masks" / "cat"
    masks.mkdir(parents=True)
    Image.fromarray(box(2, 3, 8, 9).astype(np.uint8) * 7).save(masks / "cat0.png")
    Image.fromarray(np.repeat(np.repeat(box(2, 3, 8, 9).astype(np.uint16), 2, 0), 2, 1) * 300).save(
        folder / "masks" / "dog1_mask.png"
    )
    data = read_images(folder / "images")
    found = read_annotations(folder / "masks", data)
    assert found.notes == ("2 of 4 pictures are not annotated and have no localisation",)
    rows = {Path(name).stem: row for row, name in enumerate(data.ids)}
    for name in ("cat0", "dog1"):
        assert np.array_equal(found.mask(rows[name], SIZE, "cat"), box(2, 3, 8, 9))
    assert found.mask(rows["cat1"], SIZE, "cat") is None


def test_voc_palettes_void_is_no_object(folder: Path) -> None:
    values = box(0, 0, 4, 4).astype(np.uint8) * 5
    values[10] = 255
    picture = Image.fromarray(values)
    picture.putpalette([0, 0, 0] * 256)
    (folder / "masks").mkdir()
    picture.save(folder / "masks" / "cat0.png")
    data = read_images(folder / "images")
    row = [Path(name).stem for name in data.ids].index("cat0")
    assert np.array_equal(read_annotations(folder / "masks", data).mask(row, SIZE, "cat"), box(0, 0, 4, 4))


def test_a_mask_of_other_proportions_is_refused(folder: Path) -> None:
    (folder / "masks").mkdir()
    Image.new("L", (30, 30), 1).save(folder / "masks" / "cat0.png")
    data = read_images(folder / "images")
    with pytest.raises(DataError, match="30 x 30 pixels, its picture 30 x 20"):
        read_annotations(folder / "masks", data).mask(0, SIZE, "cat")


def test_coco_boxes_polygons_and_runs(folder: Path) -> None:
    flat = box(5, 6, 9, 12).T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat, [False]])))
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    content = {
        "images": [{"id": 1, "file_name": "cat/cat0.png"}, {"id": 2, "file_name": "dog0.png"}],
        "categories": [{"id": 7, "name": "Cat"}, {"id": 8, "name": "dog"}],
        "annotations": [
            {"image_id": 1, "category_id": 7, "bbox": [3, 2, 6, 6]},
            {"image_id": 1, "category_id": 8, "bbox": [20, 10, 5, 5]},
            {"image_id": 2, "category_id": 8, "segmentation": [[6, 5, 12, 5, 12, 9, 6, 9]]},
            {"image_id": 2, "category_id": 7, "segmentation": {"size": list(SIZE), "counts": runs}},
        ],
    }
    (folder / "coco.json").write_text(json.dumps(content))
    data = read_images(folder / "images")
    found = read_annotations(folder / "coco.json", data).choose(data.classes)
    rows = {Path(name).stem: row for row, name in enumerate(data.ids)}
    assert np.array_equal(found.mask(rows["cat0"], SIZE, "cat"), box(2, 3, 8, 9))
    assert np.array_equal(found.mask(rows["cat0"], SIZE, "dog"), box(10, 20, 15, 25))
    assert np.array_equal(found.mask(rows["dog0"], SIZE, "cat"), box(5, 6, 9, 12))
    assert np.array_equal(found.mask(rows["dog0"], SIZE, "dog"), box(5, 6, 9, 12))
    only = read_annotations(folder / "coco.json", data).choose(data.classes, ["DOG"])
    assert np.array_equal(only.mask(rows["cat0"], SIZE, "cat"), box(10, 20, 15, 25))
    with pytest.raises(DataError, match="no object is called 'bird'"):
        read_annotations(folder / "coco.json", data).choose(data.classes, ["bird"])


def test_categories_of_no_class_all_count_and_it_is_said(folder: Path) -> None:
    content = {
        "images": [{"id": 1, "file_name": "cat0.png"}],
        "categories": [{"id": 1, "name": "lesion"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 3, 3]}],
    }
    (folder / "coco.json").write_text(json.dumps(content))
    data = read_images(folder / "images")
    found = read_annotations(folder / "coco.json", data).choose(data.classes)
    assert "all objects count" in found.notes[-1]
    row = [Path(name).stem for name in data.ids].index("cat0")
    assert found.mask(row, SIZE, "dog").sum() == 9  # type: ignore[union-attr]


def test_yolo_boxes_and_polygons(folder: Path) -> None:
    labels = folder / "labels"
    labels.mkdir()
    (labels / "classes.txt").write_text("cat\ndog\n")
    (labels / "cat0.txt").write_text("0 0.2 0.25 0.2 0.3\n1 0 0 0.5 0 0.5 0.5 0 0.5\n")
    data = read_images(folder / "images")
    found = read_annotations(labels, data).choose(data.classes)
    row = [Path(name).stem for name in data.ids].index("cat0")
    assert np.array_equal(found.mask(row, SIZE, "cat"), box(2, 3, 8, 9))
    assert np.array_equal(found.mask(row, SIZE, "dog"), box(0, 0, 10, 15))


def test_voc_boxes_count_from_one(folder: Path) -> None:
    (folder / "Annotations").mkdir()
    (folder / "Annotations" / "dog1.xml").write_text(
        "<annotation><filename>dog1.png</filename><object><name>dog</name><bndbox><xmin>4</xmin><ymin>3</ymin>"
        "<xmax>9</xmax><ymax>8</ymax></bndbox></object></annotation>"
    )
    data = read_images(folder / "images")
    found = read_annotations(folder / "Annotations", data).choose(data.classes)
    row = [Path(name).stem for name in data.ids].index("dog1")
    assert np.array_equal(found.mask(row, SIZE, "dog"), box(2, 3, 8, 9))
    assert not found.mask(row, SIZE, "cat").any()  # type: ignore[union-attr]


@pytest.mark.parametrize("damage", ["{", '{"images": 3}', '{"images": [], "annotations": []}'])
def test_damaged_annotations_are_named(folder: Path, damage: str) -> None:
    (folder / "coco.json").write_text(damage)
    with pytest.raises(DataError, match=r"coco\.json"):
        read_annotations(folder / "coco.json", read_images(folder / "images"))
    with pytest.raises(DataError, match="neither a folder"):
        read_annotations(folder / "nothing", read_images(folder / "images"))


@pytest.mark.parametrize("crop", ["center", "squash", "pad"])
def test_masks_are_fitted_as_pictures_are(crop: str) -> None:
    rng = np.random.default_rng(0)
    mask = np.repeat(np.repeat(rng.random((10, 15)) < 0.5, 4, 0), 4, 1)
    preprocess = Preprocess((24, 24), (0.5,) * 3, (1.0,) * 3, 24, crop)
    picture = Image.fromarray(np.repeat(mask[..., None].astype(np.uint8) * 255, 3, 2))
    shown = preprocess.to_pixels(preprocess(picture))[0]
    fitted = fit_mask(mask, preprocess)
    clear = (shown < 0.1) | (shown > 0.9)
    assert bool((fitted == (shown > 0.5))[clear].float().mean() > 0.98)
    if crop == "pad":
        assert not fitted[0].any()  # what is filled up is no object
        assert fit_mask(np.ones((40, 60), bool), preprocess).sum() == 24 * 16


def test_a_callable_of_the_models_own_fits_masks_too() -> None:
    def custom(picture: Image.Image) -> torch.Tensor:
        array = np.asarray(picture.resize((8, 8), Image.Resampling.NEAREST), np.float32)
        return torch.from_numpy(array).permute(2, 0, 1).flip(2) / 50 - 1  # mirrored, and scaled in its own way

    preprocess = Preprocess((8, 8), (0.0,) * 3, (1.0,) * 3, custom=custom)
    mask = np.zeros((8, 8), bool)
    mask[1:3, :2] = True
    assert torch.equal(fit_mask(mask, preprocess), torch.from_numpy(mask).flip(1))
