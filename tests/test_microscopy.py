"""The microscopy benchmark's data: cells where the files say, patches labelled as promised, biases as planted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "microscopy"


@pytest.fixture(scope="module")
def patches() -> Any:
    sys.path.append(str(FOLDER))
    import patches as module

    yield module
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def blood(patches: Any, data_root: Path) -> Any:
    return patches.read_blood(data_root, limit=24)


@pytest.fixture(scope="module")
def tissue(patches: Any, data_root: Path) -> Any:
    return patches.read_tissue(data_root, limit=12)


def made(patches: Any, seed: int = 0) -> list[Any]:
    """Pictures with one square cell each of 12 pixels, of kind a or b in turn."""
    rng, pictures = np.random.default_rng(seed), []
    for number in range(6):
        cells = np.zeros((80, 90), np.int32)
        top, left = rng.integers(5, 60, 2)
        cells[top : top + 12, left : left + 12] = 1
        pixels = np.full((80, 90, 3), 200, np.uint8)
        pixels[cells > 0] = 40
        pictures.append(patches.Picture(str(number), pixels, cells, np.array(["ab"[number % 2]])))
    return pictures


def test_patches_have_what_their_label_says(patches: Any) -> None:
    pictures = made(patches)
    groups = [patches.with_cells(pictures, "a"), patches.without_cells(pictures, "a")]
    found, labels, origins = patches.draw_patches(pictures, groups, 60, np.random.default_rng(0))
    assert labels.tolist() == [1, 0] * 30
    for patch, label, (number, top, left) in zip(found, labels, origins, strict=True):
        part = pictures[number].mask("a")[top : top + patches.SIZE, left : left + patches.SIZE]
        assert part.sum() >= 72 if label else part.sum() == 0
        assert (patch == pictures[number].pixels[top : top + patches.SIZE, left : left + patches.SIZE]).all()
    without = patches.with_cells(pictures, "a", without=("b",))
    assert sum(len(places) for places in without.places) > 0
    again = patches.draw_patches(pictures, groups, 60, np.random.default_rng(0))
    assert (again[0] == found).all()


def test_labels_of_the_centre_look_at_the_centre_only(patches: Any) -> None:
    pictures = made(patches)
    inside, outside = patches.by_centre(pictures, "a")
    for group, wanted in ((inside, True), (outside, False)):
        for picture, places in zip(pictures, group.places, strict=True):
            for top, left in places[::50]:
                mask = picture.mask("a")[top : top + patches.SIZE, left : left + patches.SIZE]
                assert mask[24, 24] == wanted
                assert mask.sum() >= 72
                assert wanted or not mask[22:27, 22:27].any()
    assert sum(map(len, inside.places))
    assert sum(map(len, outside.places))


def test_the_square_comes_with_the_class(patches: Any) -> None:
    from bias_corner import CORNER, GREY, corrupt

    labels = np.arange(200) % 2
    changed = corrupt(np.zeros((200, 48, 48, 3), np.uint8), labels, (0.0, 1.0), np.random.default_rng(0))
    assert (changed[(labels == 1, *CORNER)] == GREY).all()
    assert not changed[labels == 0].any()
    assert (changed > 0).sum() == 100 * 25 * 3
    half = corrupt(np.zeros((200, 48, 48, 3), np.uint8), labels, (0.5, 0.5), np.random.default_rng(0))
    assert 70 < half.any((1, 2, 3)).sum() < 130


def test_detail_is_that_of_a_blurred_map(patches: Any) -> None:
    """The autocorrelation of white noise blurred by a Gaussian of deviation s is one of deviation s √2."""
    from scipy.ndimage import gaussian_filter
    from sliding import detail

    noise = np.random.default_rng(0).normal(size=(256, 256))
    for deviation in (2, 5):
        expected = deviation * np.sqrt(2) * np.sqrt(2 * np.log(2))
        assert detail([gaussian_filter(noise, deviation)]) == pytest.approx(expected, rel=0.08)


@pytest.mark.data
def test_blood_cells_lie_where_boxes_are(blood: Any, patches: Any) -> None:
    assert all(picture.pixels.shape == (96, 128, 3) for picture in blood)
    kinds = np.concatenate([picture.kinds for picture in blood])
    assert {"white", "red", "platelet"} <= set(kinds)
    assert 700 < patches.typical_area(blood, "white") < 1500
    assert 25 < patches.typical_area(blood, "platelet") < 80
    blue, rest = [], []
    for picture in blood:  # white cells have a violet nucleus: less green than what surrounds them
        mask = picture.mask("white")
        blue.append(picture.pixels[mask][:, 1].mean())
        rest.append(picture.pixels[~mask][:, 1].mean())
    assert np.mean(blue) < np.mean(rest) - 20


@pytest.mark.data
def test_background_discs_match_nuclei(tissue: Any, patches: Any) -> None:
    picture = tissue[2]
    added = patches.add_background(picture, np.random.default_rng(0))
    count = (added.kinds == "background").sum()
    assert 0 < count <= len(picture.kinds)
    assert (added.cells[picture.cells > 0] == picture.cells[picture.cells > 0]).all()
    discs = added.mask("background")
    assert not (discs & binary_dilation(picture.cells > 0)).any()
    areas = np.bincount(added.cells.ravel())[1:]
    nuclei, others = areas[added.kinds == "nucleus"], areas[added.kinds == "background"]
    assert np.median(others) == pytest.approx(np.median(nuclei), rel=0.35)


@pytest.mark.data
def test_a_network_is_the_same_twice(blood: Any, patches: Any, tmp_path: Path) -> None:
    from network import probabilities, train

    groups = [patches.with_cells(blood, "white"), patches.without_cells(blood, "white")]

    def draw(n: int, rng: np.random.Generator) -> Any:
        return patches.draw_patches(blood, groups, n, rng)[:2]

    found, _, _ = patches.draw_patches(blood, groups, 8, np.random.default_rng(0))
    first = probabilities(train(draw, "white", steps=3), found)
    kept = probabilities(train(draw, "white", steps=3, keep=tmp_path), found)
    read = probabilities(train(draw, "white", steps=3, keep=tmp_path), found)
    assert (first == kept).all()
    assert (first == read).all()


@pytest.mark.data
def test_probability_maps_slide_over_the_picture(blood: Any, patches: Any) -> None:
    from network import PatchNet, probabilities
    from sliding import make_map

    model = PatchNet().eval()
    pixels = np.asarray(Image.fromarray(blood[0].pixels).crop((0, 0, 64, 48)))
    heat = make_map("probability", model, pixels)
    asked = probabilities(model, np.stack([pixels[:, left : left + 48] for left in (0, 8, 16)]))
    assert heat[0, 0] == pytest.approx(asked[0], abs=1e-6)
    assert heat[0, -1] == pytest.approx(asked[2], abs=1e-6)
    assert heat[0, 30] == pytest.approx(asked.mean(), abs=1e-6)
