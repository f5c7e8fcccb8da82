"""Changes of whole pictures: do they move their property as far as asked, and is the way back the way back?"""

from __future__ import annotations

import io
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from pfungst.alterations import (
    CHANGES,
    Alteration,
    Padding,
    Recolouring,
    Scaling,
    blur,
    calibrate,
    exchange_colour,
    exchange_detail,
    find_alteration,
    restore_alteration,
)  # fmt: skip
from pfungst.domains.preprocessing import Preprocess
from pfungst.properties import SEEN, measure_pixels


def pictures(count: int, seed: int = 0, size: int = 48) -> Tensor:
    """Smooth coloured patches with an edge and fine noise, (count, 3, size, size) in 0..1, no channel clipped."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    x = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    x[:, :, : size // 3] = 1 - x[:, :, : size // 3]
    return (0.15 + 0.6 * x + 0.02 * torch.randn(x.shape, generator=generator)).clamp(0.05, 0.85)


def measured(pixels: Tensor, name: str) -> float:
    return float(measure_pixels(pixels)[:, list(SEEN).index(name)].median())


def pillow_blur(pixels: Tensor, sigma: float) -> Tensor:
    out = []
    for picture in pixels:
        image = Image.fromarray((picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
        out.append(np.asarray(image.filter(ImageFilter.GaussianBlur(sigma)), np.float32) / 255)
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)


def pillow_jpeg(pixels: Tensor, quality: int) -> Tensor:
    out = []
    for picture in pixels:
        buffer = io.BytesIO()
        image = Image.fromarray((picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
        image.save(buffer, "JPEG", quality=quality)
        out.append(np.asarray(Image.open(buffer), np.float32) / 255)
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)


def test_blur_is_gaussian() -> None:
    x = torch.zeros(1, 1, 41, 41, dtype=torch.float64)
    x[..., 20, 20] = 1
    y = blur(x, 2.0)[0, 0]
    assert float(y.sum()) == pytest.approx(1, abs=1e-9)
    distance = (torch.arange(41, dtype=torch.float64) - 20) ** 2
    assert float((y.sum(0) * distance).sum()) == pytest.approx(4.0, rel=0.02)  # its variance
    flat = torch.full((1, 3, 4, 4), 0.3)
    torch.testing.assert_close(blur(flat, 3.0), flat)  # wider than the picture


@pytest.mark.parametrize("name", CHANGES)
def test_strength_raises_its_property(name: str) -> None:
    x = pictures(6)
    change, _ = CHANGES[name]
    strengths = (-0.8, 0.0, 0.8) if name != "blockiness" else (0.0, 1.0, 2.5)
    values = [measured(change(x, strength), name) for strength in strengths]
    assert values == sorted(values)
    assert values[0] < values[-1]
    torch.testing.assert_close(change(x, 0.0), x, atol=0.02, rtol=0)


@pytest.mark.parametrize(("name", "treat"), [
    ("sharpness", lambda x: pillow_blur(x, 1.2)),
    ("blockiness", lambda x: pillow_jpeg(x, 10)),
    ("noise", lambda x: (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))).clamp(0, 1)),
    ("saturation", lambda x: (x.mean(1, keepdim=True) + 1.6 * (x - x.mean(1, keepdim=True))).clamp(0, 1)),
])  # fmt: skip
def test_found_by_what_another_tool_did(name: str, treat: object) -> None:
    """Ordinary pictures, altered, get the property of pictures that Pillow or plain arithmetic changed."""
    group, others = treat(pictures(16, seed=1)), pictures(16, seed=2)  # type: ignore[operator]
    alteration = find_alteration(name, group, others)
    assert alteration is not None
    before, wanted, got = (measured(p, name) for p in (others, group, alteration.apply(others)))
    assert abs(got - wanted) <= 0.25 * abs(before - wanted)
    undone = measured(alteration.undo(group, others), name)
    assert abs(undone - before) < abs(wanted - before) / 2


def test_tint_is_found_and_undone() -> None:
    gain, offset = torch.tensor([1.15, 1.0, 0.7])[:, None, None], torch.tensor([0.0, 0.03, 0.05])[:, None, None]
    original = pictures(200, seed=1, size=16)
    group = gain * original + offset
    alteration = find_alteration("colour", group, pictures(200, seed=2, size=16))
    assert alteration is not None
    assert alteration.gain == pytest.approx((1.15, 1.0, 0.7), abs=0.04)
    assert alteration.offset == pytest.approx((0.0, 0.03, 0.05), abs=0.02)
    torch.testing.assert_close(alteration.undo(group, original), original, atol=0.03, rtol=0)
    torch.testing.assert_close(alteration.apply(original), group, atol=0.03, rtol=0)
    assert "less blue" in alteration.describe()
    # The control goes the other way, as far.
    forth, away = alteration.apply(original) - original, alteration.apply_opposite(original) - original
    torch.testing.assert_close(forth, -away, atol=0.03, rtol=0)  # but where it would leave 0..1


@pytest.mark.parametrize("name", CHANGES)
def test_control_alters_as_much(name: str) -> None:
    x = pictures(8)
    alteration = Scaling(name, towards=0.7, back=-0.7)
    for treated, control in (
        (alteration.apply(x), alteration.apply_opposite(x)),
        (alteration.undo(x, x), alteration.undo_control(x, x)),
    ):
        size, other = (float((y - x).square().mean().sqrt()) for y in (treated, control))
        # Some changes cannot go so far, and a codec has no qualities between.
        assert other == pytest.approx(size, rel=0.25 if name == "blockiness" else 0.1) or other < size


def padded(pixels: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    """By Pillow and numpy: smaller, the edge repeated."""
    out = []
    for picture in pixels:
        image = Image.fromarray((picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
        inner = image.resize((image.width - left - right, image.height - top - bottom), Image.Resampling.BILINEAR)
        out.append(np.pad(np.asarray(inner), ((top, bottom), (left, right), (0, 0)), mode="edge"))
    return torch.from_numpy(np.stack(out).astype(np.float32) / 255).permute(0, 3, 1, 2)


@pytest.mark.parametrize("edges", [(6, 12, 3, 0), (0, 0, 8, 8)])
def test_padding_is_found_cut_away_and_put_back(edges: tuple[int, int, int, int]) -> None:
    original, others = pictures(16, seed=1), pictures(16, seed=2)
    group = padded(original, *edges)
    alteration = find_alteration("edge padding", group, others)
    assert alteration is not None
    assert alteration.margins == pytest.approx([edge / 48 for edge in edges])
    torch.testing.assert_close(alteration.apply(original), group, atol=0.01, rtol=0)  # rounded to bytes
    undone = alteration.undo(group, others)
    assert float((undone - original).abs().mean()) < 0.03  # it was made smaller and larger again
    assert measured(undone, "edge padding") < measured(group, "edge padding") - 0.8
    assert float((alteration.undo_control(group, others) - group).abs().mean()) < 0.015
    assert "edges" in alteration.describe()
    top, bottom, left, right = edges
    expected = torch.nn.functional.interpolate(
        others[:, :, top : 48 - bottom, left : 48 - right], (48, 48), mode="bilinear", antialias=True
    )
    torch.testing.assert_close(alteration.apply_opposite(others), expected)
    assert find_alteration("edge padding", others, original) is None
    assert find_alteration("edge padding", torch.full_like(group, 0.5), others) is None  # nothing is inside


def test_nothing_to_find() -> None:
    x = pictures(300, size=16)
    assert find_alteration("colour", x[:150], x[:150]) is None
    assert find_alteration("saturation", x, x) is None
    assert calibrate("sharpness", pillow_blur(pictures(8), 4.0), 9.0) is None


def test_detail_is_exchanged() -> None:
    soft, sharp = pillow_blur(pictures(8, seed=1), 2.0), pictures(8, seed=2)
    mixed = exchange_detail(soft, sharp)
    assert measured(mixed, "sharpness") > measured(soft, "sharpness") + 0.5 * (
        measured(sharp, "sharpness") - measured(soft, "sharpness")
    )
    torch.testing.assert_close(blur(mixed, 6.0), blur(soft, 6.0), atol=0.05, rtol=0)
    # A wide blur is made of smaller pictures: nearly the same, but mirrored at the middle of a wider pixel.
    difference = (exchange_detail(soft, sharp, 0.25) - (sharp + blur(soft, 12.0) - blur(sharp, 12.0))).abs()
    assert float(difference.mean()) < 0.01
    assert float(difference.max()) < 0.05
    torch.testing.assert_close(exchange_detail(soft, soft, 0.25), soft)


@pytest.mark.parametrize(("name", "treat"), [
    ("sharpness", lambda x: pillow_blur(x, 2.0)),
    ("blockiness", lambda x: pillow_jpeg(x, 2)),  # nearly the worst that there is
    ("saturation", lambda x: (0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]).expand(-1, 3, -1, -1)),
])  # fmt: skip
def test_what_was_lost_comes_from_others_and_the_control_puts_the_property_back(name: str, treat: object) -> None:
    group, others = treat(pictures(16, seed=1)), pictures(16, seed=2)  # type: ignore[operator]
    alteration = find_alteration(name, group, others)
    assert alteration is not None
    assert alteration.back is None
    undone, control = alteration.undo(group, others), alteration.undo_control(group, others)
    ordinary, own = measured(others, name), measured(group, name)
    assert abs(measured(undone, name) - ordinary) < 0.3 * abs(own - ordinary)
    assert abs(measured(control, name) - own) < 0.3 * abs(own - ordinary)
    torch.testing.assert_close(control, alteration.apply(undone))
    # The ways back go from the one that leaves most of the picture to the one that leaves least.
    ways = alteration.ways_back()
    changed = [float((way.undo(group, others) - group).square().mean()) for way in ways]
    assert ways[0] == alteration
    assert changed == sorted(changed)
    assert len(set(changed)) == len(ways) == (1 if name == "saturation" else 3)


def test_greys_stay_where_colours_are_exchanged() -> None:
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    own, donors = 0.3 + 0.3 * pictures(4, seed=1), 0.3 + 0.3 * pictures(4, seed=2)  # nothing is clipped
    mixed = exchange_colour(own, donors)
    torch.testing.assert_close((mixed * weights).sum(1), (own * weights).sum(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed - mixed.mean(1, keepdim=True), donors - donors.mean(1, keepdim=True),
                               atol=1e-5, rtol=0)  # fmt: skip


@pytest.mark.parametrize("channels", ["RGB", "BGR", "L"])
def test_pixels_and_inputs(channels: str) -> None:
    count = 1 if channels == "L" else 3
    preprocess = Preprocess(size=(8, 8), mean=(0.4, 0.5, 0.6)[:count], std=(0.2, 0.25, 0.3)[:count], channels=channels)
    x = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, count, 8, 8)).astype(np.float32))
    x = preprocess.from_pixels(preprocess.to_pixels(x))
    torch.testing.assert_close(preprocess.from_pixels(preprocess.to_pixels(x)), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("made", [Scaling("sharpness", -2.0), Scaling("blockiness", 0.5, coarse=0.25),
                                  Recolouring(gain=(0.9, 1.0, 1.1)), Padding(margins=(0.1, 0, 0, 0.2))])  # fmt: skip
def test_an_alteration_comes_back_from_its_record(made: Alteration) -> None:
    """From JSON, and from that of older runs, which had the numbers of every kind."""
    record = json.loads(json.dumps(asdict(made)))
    assert restore_alteration(record) == made
    every = {"towards": 1.0, "back": None, "gain": [1.0] * 3, "offset": [0.0] * 3, "margins": [0.0] * 4}
    assert restore_alteration(every | record) == made
