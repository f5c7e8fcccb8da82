"""Colours of relevance: palettes, overlays, grids, files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pfungst import heatmaps
from pfungst.errors import RelevanceError, RunError, SettingError


def _lightness(rgb: np.ndarray) -> np.ndarray:
    """OKLab L of sRGB 0..255."""
    c = rgb / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array(
        [[0.4122214708, 0.2119034982, 0.0883024619], [0.5363325363, 0.6806995451, 0.2817188376],
         [0.0514459929, 0.1073969566, 0.6299787005]]
    )  # fmt: skip
    return np.cbrt(cones) @ np.array([0.2104542553, 0.7936177850, -0.0040720468])


@pytest.mark.parametrize("palette", ["diverging", "dark"])
def test_zero_is_the_middle_colour(palette: str) -> None:
    table = heatmaps.palette_table(palette)
    image = heatmaps.color(np.array([[-3.0, 0.0, 1.0]]), palette=palette)
    assert len(table) % 2 == 1
    assert (image[0, 1] == table[len(table) // 2]).all()
    assert (image[0, 0] == table[0]).all()
    assert (heatmaps.color(np.zeros((2, 3)), palette=palette) == table[len(table) // 2]).all()


@pytest.mark.parametrize("palette", ["diverging", "dark"])
def test_signs_are_treated_alike(palette: str) -> None:
    table = heatmaps.palette_table(palette).astype(int)
    scores = np.linspace(-1, 1, 41)[None]
    middle = len(table) // 2
    place = [int(np.flatnonzero((table == c).all(1))[0]) for c in heatmaps.color(scores, palette=palette)[0]]
    assert np.array_equal(np.array(place) - middle, -(np.array(place)[::-1] - middle))
    light = _lightness(table)
    assert np.abs(light - light[::-1]).max() < 0.01
    steps = np.diff(light[middle:])
    assert (steps < 0.004).all() if palette == "diverging" else (steps > -0.004).all()


def test_sequential_runs_from_light_to_dark_and_refuses_negative_scores() -> None:
    light = _lightness(heatmaps.palette_table("sequential").astype(int))
    assert (np.diff(light) < 0.004).all()
    assert light[0] > 0.9
    assert light[-1] < 0.4
    with pytest.raises(SettingError, match="negative"):
        heatmaps.color(np.array([[-1.0]]), palette="sequential")


def test_scale_is_given_or_the_greatest_score() -> None:
    scores = np.array([[0.5, -0.25]])
    assert np.array_equal(heatmaps.color(scores), heatmaps.color(scores * 1e-300))
    assert np.array_equal(heatmaps.color(scores, 0.5), heatmaps.color(scores))
    assert np.array_equal(heatmaps.color(scores, 0.25)[0, 0], heatmaps.color(scores)[0, 0])
    assert not np.array_equal(heatmaps.color(scores, 5.0), heatmaps.color(scores))
    for scale in (-1.0, np.nan, np.inf):
        with pytest.raises(SettingError):
            heatmaps.color(scores, scale)


def test_common_scale() -> None:
    maps = [np.full((10, 10), 1.0), np.full((10, 10), -2.0)]
    maps[0][0, 0] = 50
    assert heatmaps.common_scale(maps) == 50
    assert heatmaps.common_scale(maps, 0.99) == 2
    sparse = np.zeros((10, 10))
    sparse[0, 0] = -3
    assert heatmaps.common_scale([sparse], 0.5) == 3
    assert heatmaps.common_scale([]) == 0
    with pytest.raises(SettingError):
        heatmaps.common_scale(maps, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_an_error(bad: float) -> None:
    with pytest.raises(RelevanceError, match="1 of 2"):
        heatmaps.color(np.array([[bad, 1.0]]))
    with pytest.raises(RelevanceError):
        heatmaps.overlay(np.zeros((1, 2, 3)), np.array([[bad, 1.0]]))
    with pytest.raises(RelevanceError):
        heatmaps.common_scale([np.array([[bad, 1.0]])])


def test_overlay_of_nothing_is_the_desaturated_picture() -> None:
    pixels = np.random.default_rng(0).random((6, 5, 3))
    ground = heatmaps.desaturate(pixels)
    assert np.array_equal(heatmaps.overlay(pixels, np.zeros((6, 5))), ground)
    assert np.array_equal(heatmaps.overlay(pixels, np.ones((6, 5)), opacity=0), ground)
    assert np.ptp(ground.astype(int), 2).mean() < np.ptp(pixels * 255, 2).mean() / 2
    grey = np.full((2, 2, 3), 0.4)
    assert np.array_equal(heatmaps.desaturate(grey), np.full((2, 2, 3), 102))


def test_overlay_covers_more_where_relevance_is_greater() -> None:
    pixels = np.full((1, 4, 3), 0.5)
    image = heatmaps.overlay(pixels, np.array([[0.0, 0.2, 1.0, -1.0]])).astype(int)
    distance = np.abs(image - image[0, 0]).sum(2)[0]
    assert 0 == distance[0] < distance[1] < distance[2]
    assert image[0, 2, 0] > image[0, 2, 2] + 50
    assert image[0, 3, 2] > image[0, 3, 0] + 50
    full = heatmaps.overlay(pixels, np.array([[1.0, -1.0, 0, 0]]), opacity=1)
    assert np.array_equal(full[0, :2], heatmaps.color(np.array([[1.0, -1.0]]))[0])


def test_wrong_shapes_are_errors() -> None:
    with pytest.raises(SettingError):
        heatmaps.color(np.zeros((3, 4, 5)))
    with pytest.raises(SettingError):
        heatmaps.overlay(np.zeros((4, 4, 3)), np.zeros((3, 4)))
    with pytest.raises(SettingError):
        heatmaps.overlay(np.zeros((4, 4)), np.zeros((4, 4)))
    with pytest.raises(SettingError):
        heatmaps.pool_channels(np.zeros((4, 4)))
    with pytest.raises(SettingError, match="no palette"):
        heatmaps.color(np.zeros((4, 4)), palette="jet")


def test_pool_channels_sums() -> None:
    relevance = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    assert np.array_equal(heatmaps.pool_channels(relevance), relevance.sum(1))
    assert np.array_equal(heatmaps.pool_channels(relevance[0]), relevance[0].sum(0))


def test_enlarge() -> None:
    array = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert np.array_equal(heatmaps.enlarge(array, 3), np.kron(array, np.ones((3, 3, 1), np.uint8)))
    assert heatmaps.enlarge(np.zeros((20, 40, 3), np.uint8), size=10).shape == (5, 10, 3)
    assert heatmaps.enlarge(np.zeros((20, 40), np.uint8), size=(30, 80)).shape == (30, 80)
    with pytest.raises(SettingError):
        heatmaps.enlarge(array)
    with pytest.raises(SettingError):
        heatmaps.enlarge(array, 2, size=4)


def test_grid_dimensions() -> None:
    images = [np.zeros((30, 40, 3), np.uint8)] * 5
    assert heatmaps.grid(images, columns=2, gap=10).size == (10 + 2 * 50, 10 + 3 * 40)
    assert heatmaps.grid(images, gap=0).size == (120, 60)
    one_line = heatmaps.line_height(heatmaps.load_font(13))
    assert heatmaps.grid(images, ["a"] * 5, columns=5, gap=10).size == (10 + 5 * 50, 10 + 30 + 4 + one_line + 10)
    with pytest.raises(SettingError):
        heatmaps.grid(images, ["a"])
    with pytest.raises(SettingError):
        heatmaps.grid([])
    with pytest.raises(SettingError):
        heatmaps.grid(images, columns=0)


def test_text_fits() -> None:
    font = heatmaps.load_font(13)
    words = "great white shark, white shark, man-eater, Carcharodon carcharias"
    for text, lines in ((words, 2), ("x" * 200, 2), (words, 1), ("", 2), ("a\nb\nc", 2)):
        broken = heatmaps.break_lines(text, font, 90, lines)
        assert len(broken) <= lines
        assert all(font.getlength(line) <= 90 for line in broken)
    assert heatmaps.break_lines(words, font, 90, 2)[-1].endswith("…")
    assert heatmaps.break_lines("a\nb", font, 90, 2) == ["a", "b"]


@pytest.mark.parametrize("palette", heatmaps.PALETTES)
def test_colorbar_shows_the_whole_palette(palette: str) -> None:
    bar = np.asarray(heatmaps.colorbar(0.0123, palette, width=257, clipped=True))
    table = heatmaps.palette_table(palette)
    assert np.array_equal(bar[5, 1:-1], table)


def test_save_png_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    heatmaps.save_png(array, tmp_path / "a.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), array)
    with pytest.raises(RunError):
        heatmaps.save_png(array, tmp_path / "none" / "a.png")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pfungst.heatmaps.os.replace", full)
    with pytest.raises(RunError, match="No space left"):
        heatmaps.save_png(array * 0, tmp_path / "a.png")
    assert [one.name for one in tmp_path.iterdir()] == ["a.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), array)
