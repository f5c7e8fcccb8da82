"""What reading a picture decides that a model's training may have decided otherwise: told, and only then."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import Console, Small
from PIL import Image

from pfungst.domains.decoding import Conversions, list_conversions
from pfungst.domains.image import read_images
from pfungst.errors import PfungstWarning

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray = PIXELS, **how: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)  # type: ignore[arg-type]
    return path


def deep(greatest: int) -> np.ndarray:
    """16-bit pixels up to ``greatest``."""
    return np.linspace(0, greatest, 24 * 24).astype(np.uint16).reshape(24, 24)


def clear(least: int) -> np.ndarray:
    """A picture with an alpha channel that is ``least`` in one corner."""
    alpha = np.full((24, 24, 1), 255, np.uint8)
    alpha[0, 0] = least
    return np.concatenate([PIXELS, alpha], -1)


def test_plain_pictures_are_not_spoken_of(tmp_path: Path) -> None:
    upright = Image.Exif()
    upright[274] = 1
    save(tmp_path / "a.png")
    save(tmp_path / "grey.png", PIXELS[..., 0])
    save(tmp_path / "opaque.png", clear(255))
    save(tmp_path / "a.jpg", exif=upright)
    Image.fromarray(PIXELS).quantize(16).save(tmp_path / "palette.gif")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "empty.png").write_bytes(b"")
    for path in tmp_path.iterdir():
        assert list_conversions(path) == Conversions(), path.name
    assert read_images(tmp_path).notes == ()
    assert list_conversions(tmp_path / "missing.png") == Conversions()


def test_each_decision_is_told(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[274] = 6
    frames = [Image.fromarray(PIXELS[..., i]) for i in range(3)]
    frames[0].save(tmp_path / "stack.tif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(PIXELS).convert("CMYK").save(tmp_path / "ink.jpg")
    save(tmp_path / "turned.jpg", exif=turned)
    save(tmp_path / "clear.png", clear(0))
    Image.fromarray(PIXELS).quantize(16).save(tmp_path / "hole.png", transparency=int(PIXELS[0, 0, 0]) % 16)
    told = {path.name: list_conversions(path).told for path in tmp_path.iterdir()}
    first = ("of several frames or pages only the first is used",)
    assert told.pop("stack.tif") == told.pop("moves.gif") == first
    assert told.pop("ink.jpg") == ("CMYK is converted to RGB without a colour profile",)
    assert told.pop("turned.jpg") == ("turned upright as their EXIF data say",)
    assert told.pop("clear.png") == told.pop("hole.png") == ("transparent pixels are laid over white",)
    assert told == {}


@pytest.mark.parametrize(("greatest", "levels"), [(4095, 16), (255, 1), (65535, 256)])
def test_levels_that_are_left_of_sixteen_bits(tmp_path: Path, greatest: int, levels: int) -> None:
    save(tmp_path / "grey.png", deep(greatest))
    save(tmp_path / "grey.tif", deep(greatest))
    Image.fromarray(deep(greatest).astype(np.int32)).save(tmp_path / "int.tif")
    for path in tmp_path.iterdir():
        found = list_conversions(path)
        assert (found.told, found.levels) == (("of 16-bit pixels the upper 8 bits are used",), levels)
        assert found.dark == (levels < 64)


def test_a_folder_tells_how_many_and_one_of_them(tmp_path: Path) -> None:
    for i in range(50):
        save(tmp_path / "rose" / f"{i:02d}.png", clear(0) if i == 7 else PIXELS)
    for i in range(10):
        save(tmp_path / "leaf" / f"{i:02d}.png", deep(65535))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notes = read_images(tmp_path).notes
    assert notes == (
        "10 of 60 pictures: of 16-bit pixels the upper 8 bits are used (such as leaf/00.png)",
        "1 of 60 pictures: transparent pixels are laid over white (such as rose/07.png)",
    )
    for i in range(50, 90):
        save(tmp_path / "rose" / f"{i:02d}.png")
    first = read_images(tmp_path).notes[0]
    assert first.startswith("10 of 64 pictures looked at: of 16-bit")  # all ten: evenly from the classes


def test_an_audit_of_almost_black_pictures_says_so_before_any_work(
    small: Small, tmp_path: Path, console: Console
) -> None:
    for path in sorted(small.photos.rglob("*.png")):
        grey = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 16  # 12 bits of 16
        save(tmp_path / "photos" / path.relative_to(small.photos), grey)
    model = ["--weights", small.weights, "--size", "24", "--mean", "0", "--std", "1", "--max-findings", "1"]
    run = tmp_path / "run"
    code, out, error = console("audit", small.model, tmp_path / "photos", "--out", run, *model)
    assert code == 0
    dark = (
        "16-bit pixels use 16 of the 256 levels that are left of them, so that the model sees an almost black picture"
    )
    out, error = (" ".join(text.split()) for text in (out, error))
    assert f"Warning: {dark}: save such pictures with 8 bits" in error
    assert f"note: {dark}" in out
    assert "note: 64 of 64 pictures looked at: of 16-bit pixels the upper 8 bits are used (such as " in out
    notes = json.loads((run / "run.json").read_text())["data"]["notes"]
    assert len(notes) == 2
    html = (run / "report.html").read_text()
    assert all(note in html for note in notes)


def test_a_sheet_tells_what_was_decided_for_its_picture(
    small: Small, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    from pfungst import heatmaps

    draw = heatmaps.draw_sheet
    monkeypatch.setattr(heatmaps, "draw_sheet", lambda *given: (told.extend(given[-1]), draw(*given))[1])
    picture = save(tmp_path / "scan.png", deep(4095))
    model = ["--weights", small.weights, "--size", "24", "--mean", "0", "--std", "1"]
    code, _, error = console("explain", small.model, picture, "--out", tmp_path / "maps", *model)
    assert code == 0, error
    assert "of 16-bit pixels the upper 8 bits are used" in told
    assert any(note.startswith("16-bit pixels use 16 of the 256 levels") for note in told)


def test_a_warning_is_one_of_ours(tmp_path: Path) -> None:
    save(tmp_path / "a.png", deep(1023))
    with pytest.warns(PfungstWarning, match="16-bit pixels use 4 of the 256 levels"):
        read_images(tmp_path)
