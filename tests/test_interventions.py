"""Experiments: changes of pictures, models whose cue is known, and how many pictures a test needs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pfungst.cuts import fill_blur, fill_colour, fill_harmonic, fill_noise, frame_mask, paste
from pfungst.evidence import Standard, Verdict, correct
from pfungst.interventions import Case, examine, pictures_for_power
from pfungst.lrp import LRP
from pfungst.regions import Laboratory, find_direction

SIDE = 24


# ---- changes of pictures ---------------------------------------------------------------------------------------------


def _pictures(seed: int = 0) -> Tensor:
    return 1 + torch.rand(3, 3, 32, 40, generator=torch.Generator().manual_seed(seed))


def _masks(kind: str) -> Tensor:
    masks = torch.rand(3, 32, 40, generator=torch.Generator().manual_seed(9)) < (0.4 if kind == "scattered" else 0)
    if kind == "corner":
        masks[:, :9, :14] = True
    elif kind == "frame":
        masks[:] = frame_mask(32, 40, 3, 0)
    elif kind == "half":
        masks[:, :, :20] = True
    return masks


@pytest.mark.parametrize("kind", ["corner", "frame", "half", "scattered", "none"])
def test_colour_fill_keeps_the_rest_and_invents_no_colours(kind: str) -> None:
    inputs, masks = _pictures(), _masks(kind)
    filled = fill_colour(inputs, masks)
    for picture, mask, before in zip(filled, masks, inputs, strict=True):
        for channel in range(3):
            seen = before[channel][~mask]
            assert torch.equal(picture[channel][~mask], seen)
            assert picture[channel].min() >= seen.min() - 1e-5
            assert picture[channel].max() <= seen.max() + 1e-5
    # What was under the mask has no part in it.
    torch.testing.assert_close(fill_colour(torch.where(masks[:, None], 77.0, inputs), masks), filled)


def test_colour_fill_takes_the_colours_beside_the_mask() -> None:
    inputs = torch.full((1, 2, 32, 32), 5.0)
    inputs[:, :, :, 16:] = 9
    masks = torch.zeros(1, 32, 32, dtype=torch.bool)
    masks[:, 10:16, 4:8] = masks[:, 10:16, 24:28] = True
    torch.testing.assert_close(fill_colour(inputs, masks), inputs, rtol=0, atol=0.05)


def test_noise_stays_in_the_range_of_each_channel() -> None:
    inputs, masks = _pictures(), _masks("half")
    low, high = torch.tensor([-2.0, 0.0, 3.0]), torch.tensor([-1.0, 5.0, 3.5])
    noisy = fill_noise(inputs, masks, low, high, seed=4)
    for channel in range(3):
        values = noisy[:, channel][masks]
        assert low[channel] <= values.min() < low[channel] + 0.05 * (high - low)[channel]
        assert high[channel] >= values.max() > high[channel] - 0.05 * (high - low)[channel]
        assert torch.equal(noisy[:, channel][~masks], inputs[:, channel][~masks])
    assert torch.equal(fill_noise(inputs, masks, low, high, seed=4), noisy)
    assert not torch.equal(fill_noise(inputs, masks, low, high, seed=5), noisy)


def test_paste_puts_the_masked_pixels_of_one_on_the_other() -> None:
    donors, receivers, masks = _pictures(), _pictures(seed=1), _masks("scattered")
    pasted = paste(donors, receivers, masks)
    for i, c, y, x in itertools.product(range(3), range(3), range(0, 32, 5), range(0, 40, 3)):
        assert pasted[i, c, y, x] == (donors if masks[i, y, x] else receivers)[i, c, y, x]


@pytest.mark.parametrize(("inner", "outer"), [(3, 0), (6, 3), (4, 4), (9, 2)])
def test_frames(inner: int, outer: int) -> None:
    mask = frame_mask(16, 23, inner, outer)
    for y, x in itertools.product(range(16), range(23)):
        assert bool(mask[y, x]) == (outer <= min(y, x, 15 - y, 22 - x) < inner)


# ---- models whose cue is known ---------------------------------------------------------------------------------------


class _Model(nn.Module):
    """Class 0: green, and ``weight`` times what is red in a place or (no place) anywhere, up to ``most``; 1: blue."""

    def __init__(self, weight: float, place: Tensor | None, most: float = float("inf")) -> None:
        super().__init__()
        self.most = most
        side = 5 if place is None else 1
        self.conv = nn.Conv2d(3, 3, side, padding=side // 2)
        self.fc = nn.Linear(3 * SIDE * SIDE, 2)
        share = torch.full((SIDE, SIDE), 1 / SIDE**2)
        red = weight * (share if place is None else place / place.sum())
        rows = torch.stack([red, 4 * share, 0 * share, 0 * share, 0 * share, 4 * share]).reshape(2, -1)
        box = torch.eye(3)[:, :, None, None].expand(3, 3, side, side) / side**2
        bias = torch.tensor([-0.3 if place is None else 0.0, 0, 0])  # only a spot is as red as 0.3
        self.conv.load_state_dict({"weight": box, "bias": bias})
        self.fc.load_state_dict({"weight": rows, "bias": torch.zeros(2)})

    def forward(self, x: Tensor) -> Tensor:
        scores = self.fc(torch.relu(self.conv(x)).flatten(1))
        return (
            scores
            if self.most == float("inf")
            else torch.cat([self.most * torch.tanh(scores[:, :1] / self.most), scores[:, 1:]], 1)
        )


class _Blind(Laboratory):
    """One whose heatmaps show nothing."""

    def explain(self, inputs: Tensor, target: int, layers: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        found = super().explain(inputs, target, layers)[1]
        return torch.rand(inputs[:, 0].shape, generator=torch.Generator().manual_seed(len(inputs))), found


def _places(cue: str, seed: int) -> Tensor:
    """(60, SIDE, SIDE) bool: where the group's pictures are red."""
    places = torch.zeros(60, SIDE, SIDE, dtype=torch.bool)
    if cue == "border":
        places[:] = frame_mask(SIDE, SIDE, 2, 0)
    for i, (y, x) in enumerate(np.random.default_rng(seed).integers(0, SIDE - 5, (60, 2))):
        if cue == "spot":
            places[i, y : y + 5, x : x + 5] = True
        elif cue == "corner":
            places[i, :5, :5] = True
    return places


def _examine(
    cue: str, weight: float, seed: int, shared: bool = False, size: int = 60, layers: bool = True,
    most: float = float("inf"), blind: bool = False,
) -> tuple[Verdict, Tensor]:  # fmt: skip
    """The corrected verdict on 60 pictures with the cue, 60 others of class 0 (``shared``: with it too), 60 of 1.

    ``size``: of the group that is examined; ``layers``: whether channels of a layer are looked at; ``blind``: with
    heatmaps that show nothing.
    """
    places = _places(cue, seed)
    inputs = 0.3 * torch.rand(180, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    inputs[:120, 1] += 0.4  # green
    inputs[120:, 2] += 0.4  # blue
    if cue == "border":  # where noise is red, each picture's own reddest pixels do better than a fixed place
        inputs[:60, 0] = 0.15
    inputs[:60, 0] += 0.6 * places
    if shared:
        inputs[60:120, 0] += 0.6 * places
        inputs[:60, 0, -6:, -6:] += 0.6  # what makes the group a group, and does not matter to the model
    lrp = LRP(_Model(weight, None if cue == "spot" else places[0].float(), most).eval())
    lab = (_Blind if blind else Laboratory)(lrp, lambda rows: inputs[list(rows)], torch.zeros(3), torch.ones(3))
    sums = lab.explain(inputs[:120], 0, ["conv"])[1]["conv"].sum((2, 3)).numpy()
    rows = np.split(np.arange(180), 3)
    directions = (find_direction("conv", sums, np.arange(120) < 60),) if layers and not blind else ()
    case = Case(0, directions, "where", rows[0][:size], *rows[1:])
    verdict = examine(lab, case, seed=seed)
    assert verdict.verdict == "open"  # until it is corrected
    assert examine(lab, case, seed=seed).evidence == verdict.evidence
    return correct([verdict], [0.8], Standard())[0], places[0]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("cue", "weight"), [("corner", 3.0), ("border", 3.0), ("spot", 300.0)])
def test_a_cue_that_the_model_uses_is_confirmed(cue: str, weight: float, seed: int) -> None:
    verdict, place = _examine(cue, weight, seed)
    tests = {evidence.test: evidence for evidence in verdict.evidence}
    assert verdict.verdict == "confirmed"
    assert verdict.region.kind == ("moving" if cue == "spot" else "fixed")
    assert ("paste:same rule" in tests) == (cue == "spot")
    assert ("borders:noise" in tests) == (cue == "border")
    other = tests["paste:other classes"]
    if cue != "spot":  # a linear model, and each picture gives its region and gets another one: nothing is won
        assert other.control == pytest.approx(0, abs=1e-5)
        assert other.effect == pytest.approx(tests["paste:same place"].treated, abs=1e-5)
    if verdict.region.mask is not None:
        assert verdict.region.mask[place].float().mean() > 0.7
        assert verdict.region.mask[~place].float().mean() < 0.2
    # 48 members at most, a third of which chose the region; the rest are cut, and pasted on 48 pictures.
    assert (tests["cut:colour"].n, tests["paste:same place"].n) == (32, 48)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("cue", "shared"), [("corner", False), ("border", False), ("spot", False), ("corner", True)])
def test_a_pattern_that_the_model_ignores_is_not_confirmed(cue: str, shared: bool, seed: int) -> None:
    verdict, _ = _examine(cue, 3.0 if shared else 0.0, seed, shared)
    assert verdict.verdict == "refuted"
    pasted = next(evidence for evidence in verdict.evidence if evidence.test == "paste:same place")
    assert pasted.control > 0.8 * pasted.treated > 0.1  # ordinary members bring as much


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_region_is_all_of_a_cue_of_which_a_part_is_enough(seed: int) -> None:
    """An eighth of the border decides: pasted, a small part does as well as all; cut, only all of it does."""
    verdict, place = _examine("border", 24.0, seed, most=4.0)
    assert verdict.region.mask is not None
    assert verdict.region.mask[place].float().mean() > 0.9
    assert verdict.verdict == "confirmed", verdict.reason


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_border_is_found_though_heatmaps_do_not_show_it(seed: int) -> None:
    verdict, place = _examine("border", 3.0, seed, blind=True)
    assert verdict.region.source == "border"
    assert verdict.region.mask is not None
    assert torch.equal(verdict.region.mask, place)
    assert verdict.verdict == "confirmed", verdict.reason


@pytest.mark.parametrize("layers", [True, False])
def test_the_smallest_group_can_be_examined_and_so_can_a_model_without_channels(layers: bool) -> None:
    verdict, _ = _examine("corner", 3.0, 0, size=6, layers=layers)
    tests = {evidence.test: evidence for evidence in verdict.evidence}
    assert tests["cut:colour"].n == 3
    assert tests["cut:colour"].effect < 0 < tests["paste:same place"].effect
    assert verdict.region.kind == "fixed"


def test_inpainting_solves_laplace() -> None:
    """Against a dense solution; a linear ramp comes back whole."""
    rows, columns = torch.meshgrid(torch.arange(20.0), torch.arange(24.0), indexing="ij")
    ramp = (0.02 * rows - 0.01 * columns).expand(1, 2, 20, 24)
    mask = torch.zeros(1, 20, 24, dtype=torch.bool)
    mask[0, 5:14, 6:18] = True
    torch.testing.assert_close(fill_harmonic(ramp, mask), ramp, atol=2e-3, rtol=0)
    picture = torch.rand(1, 2, 20, 24, generator=torch.Generator().manual_seed(0))
    inside = [(int(y), int(x)) for y, x in mask[0].nonzero()]
    number = {place: i for i, place in enumerate(inside)}
    system, known = torch.zeros(len(inside), len(inside)), torch.zeros(len(inside), 2)
    for (y, x), i in number.items():
        system[i, i] = 4
        for place in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if place in number:
                system[i, number[place]] = -1
            else:
                known[i] += picture[0, :, place[0], place[1]]
    exact = torch.linalg.solve(system, known)
    filled = fill_harmonic(picture, mask)[0].permute(1, 2, 0)[mask[0]]
    torch.testing.assert_close(filled, exact, atol=0.02, rtol=0)
    assert torch.equal(fill_harmonic(picture, mask)[:, :, ~mask[0]], picture[:, :, ~mask[0]])


def test_blur_keeps_the_rest_and_flattens_the_masked() -> None:
    picture = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[:, 8:24, 8:24] = True
    blurred = fill_blur(picture, mask)
    assert torch.equal(blurred[:, :, ~mask[0]], picture[:, :, ~mask[0]])
    assert float(blurred[:, :, mask[0]].std()) < 0.4 * float(picture[:, :, mask[0]].std())


@pytest.mark.parametrize(("spread", "least"), [(1.0, 0.4), (2.0, 0.5)])
def test_power_is_what_it_says(spread: float, least: float) -> None:
    n = pictures_for_power(spread, least)
    rng = np.random.default_rng(0)
    means = rng.normal(least, spread, (4000, n)).mean(1)
    found = np.abs(means) / (spread / n**0.5) > 2.807  # two-sided 0.005
    assert found.mean() == pytest.approx(0.8, abs=0.03)
    assert pictures_for_power(spread, 0.0) == pictures_for_power(spread, -1.0) > 1000
