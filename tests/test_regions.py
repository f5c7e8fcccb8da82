"""Masks and cue maps: what they cover, what their controls cover, and a spot that moves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pfungst.regions import (
    Direction,
    Region,
    control_masks,
    find_direction,
    layer_cue_maps,
    mask_core,
    mask_strongest,
    pixel_cue_maps,
    smooth_maps,
    touches_border,
)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _smooth_slowly(image: np.ndarray, sigma: float) -> np.ndarray:
    """Weighted mean of the pixels around each pixel; beyond the edge the nearest pixel goes on."""
    radius = max(1, round(2.5 * sigma))
    height, width = image.shape
    out = np.zeros_like(image)
    weights = [[math.exp(-(dy * dy + dx * dx) / (2 * sigma * sigma)) for dx in range(-radius, radius + 1)]
               for dy in range(-radius, radius + 1)]  # fmt: skip
    total = sum(map(sum, weights))
    for y in range(height):
        for x in range(width):
            for i, dy in enumerate(range(-radius, radius + 1)):
                for j, dx in enumerate(range(-radius, radius + 1)):
                    pixel = image[min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)]
                    out[y, x] += weights[i][j] / total * pixel
    return out


@pytest.mark.parametrize("sigma", [0.3, 1.1, 2.4])
def test_smoothing_equals_a_slow_loop(sigma: float) -> None:
    maps = _random(2, 9, 13)
    for smooth, image in zip(smooth_maps(maps, sigma), maps, strict=True):
        np.testing.assert_allclose(smooth, _smooth_slowly(image.numpy(), sigma), atol=1e-12)


@pytest.mark.parametrize("sigma", [0.5, 3.0, 40.0])
def test_smoothing_keeps_constants(sigma: float) -> None:
    maps = torch.tensor([2.5, -1.0])[:, None, None].expand(2, 10, 7)
    torch.testing.assert_close(smooth_maps(maps, sigma), maps, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("area", [0.0001, 0.02, 0.08, 0.32, 1.0])
def test_strongest_pixels_have_the_asked_area(area: float) -> None:
    maps = _random(3, 20, 30).abs() + 1e-3
    masks = mask_strongest(maps, area)
    assert masks.flatten(1).sum(1).tolist() == [max(1, round(area * 600))] * 3
    for mask, image in zip(masks, maps, strict=True):
        assert mask.all() or image[mask].min() > image[~mask].max()


def test_strongest_pixels_are_positive() -> None:
    maps = -_random(2, 10, 10).abs()
    maps[0, 3, 4] = 0.5
    maps[0, 7, 1] = 0.1
    masks = mask_strongest(maps, 0.2)
    assert masks[0].nonzero().tolist() == [[3, 4], [7, 1]]
    assert not masks[1].any()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("area", [0.03, 0.2, 1.0])
def test_core_is_the_fewest_pixels_that_hold_the_share(share: float, area: float) -> None:
    maps = _random(4, 12, 10, seed=1)
    for mask, image in zip(mask_core(maps, area, share), maps, strict=True):
        ordered = sorted((value for value in image.flatten().tolist() if value > 0), reverse=True)
        count, held = 0, 0.0
        while held < share * sum(ordered):
            held += ordered[count]
            count += 1
        assert int(mask.sum()) == min(count, round(area * 120))
        assert image[mask].min() > image[~mask].max()
    assert not mask_core(-maps.abs(), 0.5).any()


def _scene(kind: str) -> tuple[Tensor, Tensor]:
    """Masks of the strongest relevance, and the relevance: two bright spots on a dim ground."""
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    maps = []
    for i in range(4):
        centres = [(8 + 5 * i, 10.0), (30.0, 36 - 4 * i)]
        spots = sum(torch.exp(-((y - a) ** 2 + (x - b) ** 2) / 20) for a, b in centres)
        maps.append(spots + 0.02 * _random(48, 48, seed=i).float().abs())
    relevance = torch.stack(maps)
    if kind == "frame":
        masks = torch.ones(4, 48, 48, dtype=torch.bool)
        masks[:, 5:-5, 5:-5] = False
        return masks, relevance * 0.1 + masks.float()
    return mask_strongest(smooth_maps(relevance, 1.2), {"small": 0.02, "large": 0.16}[kind]), relevance


@pytest.mark.parametrize("kind", ["small", "large", "frame"])
def test_controls_are_as_large_elsewhere_and_less_relevant(kind: str) -> None:
    masks, relevance = _scene(kind)
    controls = control_masks(masks, relevance)
    assert controls.dtype == torch.bool
    for mask, control, image in zip(masks, controls, relevance, strict=True):
        assert int(control.sum()) == int(mask.sum())
        assert float((mask & control).sum() / mask.sum()) <= 0.1 + 1e-6
        assert image[control].sum() < 0.5 * image[mask].sum()
        # No more than an even share of the picture's relevance.
        assert image[control].mean() < image.mean()


@pytest.mark.parametrize(("height", "width"), [(48, 48), (40, 62), (9, 31)])
def test_a_control_is_the_best_of_all_moves(height: int, width: int) -> None:
    """One move after the other, one picture after the other."""
    masks = torch.zeros(5, height, width, dtype=torch.bool)
    relevance = torch.from_numpy(np.random.default_rng(0).normal(size=(5, height, width)) ** 3)
    for i in range(5):
        masks[i, i : i + height // 3, 2 * i : 2 * i + width // 4] = True
    weight = smooth_maps(relevance.clamp(min=0), max(height, width) / 40)
    for mask, control, image in zip(
        masks, control_masks(masks, relevance), weight / weight.sum((1, 2), True), strict=True
    ):
        moves = [mask.roll((y * height // 12, x * width // 12), (0, 1)) for y in range(12) for x in range(12)]
        costs = [
            float(image[move].sum()) + 2 * max(0.0, float((move & mask).sum() / mask.sum()) - 0.1) for move in moves
        ]
        assert torch.equal(control, moves[int(np.argmin(costs))])


def test_a_control_keeps_the_shape_where_it_can() -> None:
    masks, relevance = _scene("large")
    for mask, control in zip(masks, control_masks(masks, relevance), strict=True):
        assert any(
            torch.equal(control, mask.roll((dy, dx), (0, 1))) for dy in range(0, 48, 4) for dx in range(0, 48, 4)
        )


def test_a_control_does_not_cover_its_mask_even_where_that_is_least_relevant() -> None:
    masks, _ = _scene("frame")
    controls = control_masks(masks, 0.01 + (~masks).float())
    assert controls.flatten(1).sum(1).tolist() == masks.flatten(1).sum(1).tolist()
    assert not (controls & masks).any()


def test_control_of_an_empty_mask_is_empty() -> None:
    assert not control_masks(torch.zeros(2, 12, 12, dtype=torch.bool), torch.rand(2, 12, 12)).any()
    masks, _ = _scene("small")
    controls = control_masks(masks, torch.zeros(4, 48, 48))  # no relevance at all
    assert controls.flatten(1).sum(1).tolist() == masks.flatten(1).sum(1).tolist()
    assert not (controls & masks).any(0).all()


@pytest.mark.parametrize(("height", "width"), [(24, 24), (24, 60), (50, 30), (6, 6)])
def test_share_of_the_rim_that_a_mask_covers(height: int, width: int) -> None:
    thick = max(1, round(min(height, width) / 12))
    rim = [(y, x) for y in range(height) for x in range(width) if min(y, x, height - 1 - y, width - 1 - x) < thick]
    for seed in range(5):
        mask = _random(height, width, seed=seed) > 0.2
        share = sum(bool(mask[y, x]) for y, x in rim) / len(rim)
        assert touches_border(mask, share - 1e-6)
        assert not touches_border(mask, share + 1e-6)


def test_a_frame_touches_the_border_and_a_corner_does_not() -> None:
    frame = torch.ones(24, 24, dtype=torch.bool)
    frame[3:-3, 3:-3] = False
    corner = torch.zeros_like(frame)
    corner[:8, :8] = True
    assert touches_border(frame)
    assert not touches_border(corner)
    assert not touches_border(~frame)


def test_direction_points_to_the_channels_of_the_group() -> None:
    rng = np.random.default_rng(0)
    sums = rng.normal(size=(120, 16)) + 3
    inside = np.arange(120) < 30
    sums[inside, 5] += 6
    sums[inside, 9] -= 6
    direction = find_direction("layer", sums.astype(np.float32), inside)
    assert direction.layer == "layer"
    assert direction.weights.argmax() == 5
    assert direction.weights.argmin() == 9
    scores = sums / np.linalg.norm(sums, axis=1, keepdims=True) @ direction.weights
    assert scores[inside].min() > scores[~inside].max()
    opposite = find_direction("layer", sums.astype(np.float32), ~inside)
    np.testing.assert_allclose(opposite.weights, -direction.weights, rtol=1e-8, atol=1e-10)


def test_direction_is_fishers() -> None:
    rng = np.random.default_rng(1)
    sums = rng.normal(size=(50, 4))
    inside = rng.random(50) < 0.4
    rows = [row / math.sqrt(sum(v * v for v in row)) for row in sums]
    means = [np.mean([row for row, i in zip(rows, inside, strict=True) if i == side], axis=0) for side in (True, False)]
    within = np.zeros((4, 4))
    for row, i in zip(rows, inside, strict=True):
        off = row - means[0 if i else 1]
        within += np.outer(off, off) / 50
    within += 0.1 * np.trace(within) / 4 * np.eye(4)
    slow = np.linalg.inv(within) @ (means[0] - means[1])
    np.testing.assert_allclose(find_direction("layer", sums, inside).weights, slow, rtol=1e-9)


def test_layer_maps_find_a_spot_that_moves() -> None:
    relevance = 0.2 * _random(6, 5, 8, 8).abs().float()
    places = [(1, 6), (6, 1), (4, 4), (0, 0), (7, 7), (2, 3)]
    for i, (y, x) in enumerate(places):
        relevance[i, 3, y, x] += 4  # the group's channel
        relevance[i, 0, y - 4, x - 4] += 6  # stronger, and not the group's
    direction = Direction("layer", np.array([-0.3, 0, 0, 1.0, 0]))
    maps = layer_cue_maps(relevance, direction, (32, 32))
    assert maps.shape == (6, 32, 32)
    masks = Region("moving", "layer", 0.02).masks({"layer": maps})
    for mask, image, (y, x) in zip(masks, maps, places, strict=True):
        assert divmod(int(image.argmax()), 32)[0] // 4 == y
        assert divmod(int(image.argmax()), 32)[1] // 4 == x
        centre = mask.nonzero().float().mean(0)
        assert abs(centre[0] - (4 * y + 1.5)) <= 2
        assert abs(centre[1] - (4 * x + 1.5)) <= 2
    torch.testing.assert_close(layer_cue_maps(50 * relevance, direction, (32, 32)), maps)  # strength does not count


def test_pixel_maps_show_what_the_class_does_not() -> None:
    common = torch.zeros(24, 24)
    common[14:20, 14:20] = 3
    outside = common.expand(10, -1, -1) + 0.1 * _random(10, 24, 24).float()
    pixels = common.expand(5, -1, -1) + 0.1 * _random(5, 24, 24, seed=1).float()
    pixels[:, 2:6, 3:7] += 2
    maps = pixel_cue_maps(pixels, outside)
    masks = mask_strongest(maps, 16 / 576)
    assert masks[:, 2:6, 3:7].float().mean() > 0.8
    assert not masks[:, 14:20, 14:20].any()


def test_a_fixed_region_is_the_same_mask_everywhere() -> None:
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[1, 2] = True
    cues = {"pixels": _random(3, 6, 6), "layer": _random(3, 6, 6, seed=1)}
    assert torch.equal(Region("fixed", "pixels", 1 / 36, mask).masks(cues), mask.expand(3, 6, 6))
    assert torch.equal(Region("moving", "layer", 0.25).masks(cues), mask_strongest(cues["layer"], 0.25))
