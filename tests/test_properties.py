"""Properties of pictures move as what they are named for does, and what sets a group apart is told with its rate."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter
from sklearn.metrics import roc_auc_score

from pfungst.properties import FILED, NAMES, SEEN, describe_group, measure_file, measure_pixels

RNG = np.random.default_rng(0)


def photographs(count: int = 8, size: int = 64) -> list[Image.Image]:
    """Pictures with smooth colours, edges and a little noise."""
    rng = np.random.default_rng(1)
    made = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(40, 216, (6, 6, 3), dtype=np.uint8)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        pixels = np.asarray(coarse).astype(float)
        x, y = rng.integers(8, size // 2, 2)
        pixels[y : y + 20, x : x + 20] = rng.integers(0, 255, 3)
        made.append(Image.fromarray((pixels + rng.normal(0, 3, pixels.shape)).clip(0, 255).astype(np.uint8)))
    return made


def measured(pictures: list[Image.Image]) -> dict[str, np.ndarray]:
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2) / 255
    return dict(zip(SEEN, measure_pixels(pixels).numpy().T, strict=True))


def compressed(picture: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def tinted(picture: Image.Image, channel: int, amount: int) -> Image.Image:
    pixels = np.asarray(picture).astype(int)
    pixels[..., channel] += amount
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def scaled(picture: Image.Image, channel: int) -> Image.Image:
    """The other two channels at four fifths."""
    pixels = np.asarray(picture).astype(float) * np.where(np.arange(3) == channel, 1, 0.8)
    return Image.fromarray(pixels.astype(np.uint8))


def framed(picture: Image.Image) -> Image.Image:
    pixels = np.asarray(picture).copy()
    pixels[:8] = 120
    return Image.fromarray(pixels)


def framed_all_around(picture: Image.Image) -> Image.Image:
    pixels = np.full_like(np.asarray(picture), 120)
    pixels[6:-6, 6:-6] = np.asarray(picture)[6:-6, 6:-6]
    return Image.fromarray(pixels)


def padded(picture: Image.Image) -> Image.Image:
    inner = np.asarray(picture.resize((40, 40)))
    return Image.fromarray(np.pad(inner, ((8, 16), (12, 12), (0, 0)), mode="edge")).resize(picture.size)


def noisy(picture: Image.Image) -> Image.Image:
    pixels = np.asarray(picture) + RNG.normal(0, 15, (*picture.size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


CHANGES = {
    "brightness": lambda p: ImageEnhance.Brightness(p).enhance(1.2),
    "contrast": lambda p: ImageEnhance.Contrast(p).enhance(1.4),
    "red over green": lambda p: tinted(p, 0, 20),
    "blue over yellow": lambda p: tinted(p, 2, 20),
    "saturation": lambda p: ImageEnhance.Color(p).enhance(1.5),
    "black level": lambda p: Image.eval(p, lambda v: 20 + v * 235 // 255),
    "white level": lambda p: Image.eval(p, lambda v: min(255, v * 5 // 4)),
    "red of white": lambda p: scaled(p, 0),
    "blue of white": lambda p: scaled(p, 2),
    "sharpness": lambda p: p.filter(ImageFilter.UnsharpMask(1, 300)),
    "noise": noisy,
    "blockiness": lambda p: compressed(p, 8),
    "plain border": framed,
    "plain frame": framed_all_around,
    "edge padding": padded,
}


@pytest.mark.parametrize("name", SEEN)
def test_a_property_grows_with_what_it_is_named_for(name: str) -> None:
    before = photographs()
    after = [CHANGES[name](p) for p in before]
    assert (measured(after)[name] > measured(before)[name]).all()


def test_blur_lowers_sharpness_by_more_than_pictures_differ() -> None:
    before = photographs(20)
    after = measured([p.filter(ImageFilter.GaussianBlur(1.5)) for p in before])["sharpness"]
    assert after.max() < measured(before)["sharpness"].min()


def test_a_block_grid_is_seen_wherever_it_begins() -> None:
    for shift in (0, 3):
        blocks = [compressed(p, 8).crop((shift, shift, 56, 56)) for p in photographs()]
        plain = [p.crop((shift, shift, 56, 56)) for p in photographs()]
        assert (measured(blocks)["blockiness"] > measured(plain)["blockiness"] + 0.5).all()


def test_grey_and_tiny_pictures_have_properties_too() -> None:
    for shape in ((2, 1, 28, 28), (2, 3, 2, 2), (2, 1, 1, 1)):
        found = measure_pixels(torch.rand(shape))
        assert found.shape == (2, len(SEEN))
        assert bool(found.isfinite().all())


def test_file(tmp_path: Path) -> None:
    picture = photographs(1)[0]
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = "Canon", "EOS 5D"
    picture.resize((80, 40)).save(tmp_path / "a.jpg", quality=30, exif=exif)
    picture.save(tmp_path / "b.png")
    (tmp_path / "c.jpg").write_bytes(b"no picture")
    numbers, camera = measure_file(tmp_path / "a.jpg")
    named = dict(zip(FILED, numbers, strict=True))
    assert (named["width"], named["height"], named["aspect"], named["exif"]) == (80, 40, 2.0, 1.0)
    assert named["bytes a pixel"] == pytest.approx((tmp_path / "a.jpg").stat().st_size / 3200)
    assert named["quantisation"] == pytest.approx(np.mean(Image.open(tmp_path / "a.jpg").quantization[0]))
    assert camera == "Canon EOS 5D"
    assert np.isnan(measure_file(tmp_path / "b.png")[0][4])
    assert all(np.isnan(measure_file(tmp_path / "c.jpg")[0]))


def test_what_sets_a_group_apart_is_named_and_nothing_else() -> None:
    n, members, others = 300, np.arange(60), np.arange(60, 300)
    numbers = {name: RNG.normal(size=n) for name in NAMES}
    numbers["sharpness"][members] -= 3
    numbers["dose"] = RNG.normal(size=n)
    numbers["dose"][members] += 2
    numbers["dose"][5] = np.nan
    scanner = ["B" if (i < 55 or i > 230) else "A" for i in range(n)]
    values = {"scanner": scanner, "patient": [f"p{i}" for i in range(n)], "sex": RNG.choice(["f", "m"], n).tolist()}
    traits = describe_group(members, others, numbers, values)
    assert {trait.name for trait in traits} == {"sharpness", "dose", "scanner"}
    by_name = {trait.name: trait for trait in traits}
    inside = np.isin(np.arange(n), members)
    assert by_name["sharpness"].auc == pytest.approx(roc_auc_score(inside, numbers["sharpness"]))
    assert by_name["sharpness"].text.startswith("more blurred than the rest of the class")
    assert by_name["scanner"].members == pytest.approx(55 / 60)
    assert by_name["scanner"].others == pytest.approx(69 / 240)
    assert by_name["scanner"].text == "92% have scanner = B, 29% of the rest of the class"


def test_groups_drawn_by_chance_have_no_traits() -> None:
    false = 0
    for _ in range(40):
        rows = RNG.permutation(120)
        numbers = {name: RNG.normal(size=120) for name in NAMES}
        values = {"site": RNG.choice(["a", "b", "c"], 120).tolist()}
        false += bool(describe_group(rows[:25], rows[25:], numbers, values))
    assert false <= 1


def test_rare_and_unknown_values_are_no_trouble() -> None:
    values = {"site": [None] * 20, "one": ["x"] * 20}
    numbers = {"brightness": np.full(20, np.nan), "contrast": np.ones(20)}
    assert describe_group(np.arange(8), np.arange(8, 20), numbers, values) == []
