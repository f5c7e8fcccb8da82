"""Experiments: statistics against enumeration, changes of pictures, every verdict, and models whose cue is known."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pfungst.cuts import fill_blur, fill_colour, fill_harmonic, fill_noise, frame_mask, paste
from pfungst.evidence import Evidence, Standard, Verdict, carries, compare, correct, judge, required
from pfungst.interventions import Case, examine, pictures_for_power
from pfungst.lrp import LRP
from pfungst.regions import Laboratory, Region, find_direction

SIDE = 24


@pytest.mark.parametrize("shift", [0.0, 0.4, 0.8, 3.0])
def test_effects_against_enumeration_and_a_slow_bootstrap(shift: float) -> None:
    rng = np.random.default_rng(1)
    control = rng.normal(size=(11, 2))
    treated = control + rng.normal(size=(11, 2)) + shift
    decisions = rng.random(11) < 0.7, rng.random(11) < 0.2
    evidence = compare("test", treated, control, decisions, seed=0)
    difference = [treated[i, 0] - control[i, 0] for i in range(11)]
    effect = sum(difference) / 11
    assert (evidence.test, evidence.n) == ("test", 11)
    assert evidence.effect == pytest.approx(effect)
    assert evidence.effect == pytest.approx(evidence.treated - evidence.control)
    assert evidence.probability == pytest.approx(np.mean([treated[i, 1] - control[i, 1] for i in range(11)]))
    assert (evidence.flips, evidence.control_flips) == (sum(decisions[0]) / 11, sum(decisions[1]) / 11)
    flips = itertools.product((1, -1), repeat=11)
    flipped = [abs(sum(s * d for s, d in zip(signs, difference, strict=True)) / 11) for signs in flips]
    exact = np.mean([value >= abs(effect) - 1e-12 for value in flipped])
    # p is drawn: four standard errors of 4999 draws, and the one that is counted in.
    assert abs(evidence.p - exact) < 4 * np.sqrt(exact * (1 - exact) / 4999) + 1 / 5000
    means = [np.mean(rng.choice(difference, 11)) for _ in range(10000)]
    width = np.std(means)
    # An end of an interval of 2000 draws has a standard error of 0.06 standard deviations.
    np.testing.assert_allclose(evidence.interval, np.quantile(means, [0.025, 0.975]), rtol=0, atol=0.27 * width)
    assert compare("test", treated, control, decisions, seed=0) == evidence


def _evidence(test: str, effect: float, half: float = 1.0, control: float = 0.0, p: float = 0.001) -> Evidence:
    return Evidence(test, 30, effect + control, control, effect, (effect - half, effect + half), p, 0.0, 0.0, 0.0)


def _verdict(*changed: Evidence, distance: float = 10.0) -> Verdict:
    """A finding whose cut and paste work, with some of the evidence changed or added."""
    tests = {
        "cut:noise": _evidence("cut:noise", 4.0),  # noise does not decide
        "cut:colour": _evidence("cut:colour", -5.0),
        "cut:exchange": _evidence("cut:exchange", -6.0),
        "paste:same place": _evidence("paste:same place", 5.0, control=0.5),
        "paste:ordinary evidence": _evidence("paste:ordinary evidence", 3.0),
    }
    tests |= {one.test: one for one in changed}
    return Verdict("open", 1.0, distance, Region("fixed", "pixels", 0.04), tuple(tests.values()), "")


def _pasted(same: float, other: float) -> list[Evidence]:
    """Pastes that bring 8.5, the same place of ordinary members ``same``, of other classes ``other``."""
    brought = {"paste:same place": same, "paste:other classes": other}
    return [_evidence(name, 8.5 - control, 0.9, control) for name, control in brought.items()]


@pytest.mark.parametrize("seed", range(20))
def test_correction_is_holms(seed: int) -> None:
    rng = np.random.default_rng(seed)
    m = int(rng.integers(1, 9))
    p = (rng.random(m) ** 3).round(2)
    verdicts = [replace(_verdict(), evidence=tuple(replace(e, p=q) for e in _verdict().evidence)) for q in p]
    corrected = np.array([verdict.p for verdict in correct(verdicts, [0.9] * m, Standard())])
    tries = rng.integers(1, 3, m)
    # Of each further cause that was tried, a test that fails: with p = 1.
    filled = [*verdicts, *[replace(_verdict(), evidence=(_evidence("cut:colour", 0.0, p=1.0),))] * int(sum(tries - 1))]
    more = [verdict.p for verdict in correct(filled, [0.9] * len(filled), Standard())][:m]
    assert [verdict.p for verdict in correct(verdicts, [0.9] * m, Standard(), tries.tolist())] == more
    for alpha in np.arange(0.003, 1, 0.01):
        # The textbook: go up from the least p, stop at the first above alpha / (tests left).
        rejected = set()
        for rank, i in enumerate(np.argsort(p, kind="stable")):
            if p[i] > alpha / (m - rank):
                break
            rejected.add(int(i))
        assert set(np.flatnonzero(corrected <= alpha).tolist()) == rejected


def test_what_is_hardly_apart_costs_the_others_nothing_but_pays_for_all() -> None:
    verdicts = [replace(_verdict(), evidence=tuple(replace(e, p=p) for e in _verdict().evidence)) for p in (0.02, 0.01)]
    among = [0.03, 0.4, 0.9, 0.2]
    others = [replace(_verdict(), evidence=(_evidence("cut:colour", 0.0, p=0.03),)) for _ in among]

    def corrected(suspicions: list[float], tries: list[int] | None = None) -> list[float]:
        found = correct([*verdicts, *others], [*suspicions, *among], Standard(), tries)
        return [round(verdict.p, 9) for verdict in found[:2]]

    assert corrected([0.8, 0.4]) == [0.06, 0.04]  # with two of the others, which are apart, too
    assert corrected([0.8, 0.4], [3, 1, 9, 1, 1, 9]) == [0.1, 0.06]  # their tries alone: 3 + 1 + 1 + 1
    assert corrected([0.8, 0.39]) == [0.06, 0.06]  # 3 x 0.02; the second is among all: 6 x 0.01
    assert correct(verdicts, [0.8, 0.39], Standard(separate=0.0))[0].p == 0.02


def test_the_greatest_p_of_the_required_tests_counts() -> None:
    weak = _evidence("cut:colour", -5.0, p=0.04)
    ignored = [_evidence("paste:ordinary evidence", 3.0, p=0.9), _evidence("borders:noise", -1.0, p=0.9)]
    assert correct([_verdict(weak, *ignored)], [0.9], Standard())[0].p == 0.04
    moving = _evidence("paste:same rule", 5.0, p=0.2)
    names = ["cut:colour", "cut:exchange", "paste:same place", "paste:same rule"]
    assert [e.test for e in required(_verdict(moving, *ignored))] == names
    assert correct([_verdict(moving)], [0.9], Standard())[0].p == 0.2
    assert correct([], [], Standard()) == []


@pytest.mark.parametrize(
    ("changed", "p", "suspicion", "verdict", "reason"),
    [
        ([], 0.01, 0.9, "confirmed", "cut and paste both work"),
        ([], 0.05, 0.4, "confirmed", r"corrected p = 0\.05"),
        ([], 0.051, 0.9, "open", r"^corrected p = 0\.051$"),
        ([], 0.01, 0.39, "open", r"hardly apart from its class \(suspicion 0\.39\)"),
        ([_evidence("cut:colour", 0.3)], 0.01, 0.9, "open", r"^pasted on .*\(cut:colour: at most \+0\.70 in fav"),
        ([_evidence("cut:colour", 0.3), _evidence("paste:same place", 1.5)], 0.01, 0.9, "refuted", "^cut:colour"),
        ([_evidence("cut:colour", 0.3), _evidence("paste:same rule", 1.5)], 0.01, 0.9, "refuted", "^cut:colour"),
        ([_evidence("cut:colour", 0.3), _evidence("paste:ordinary evidence", 0.5)], 0.01, 0.9, "refuted", "^cut:c"),
        ([_evidence("cut:exchange", 3.0)], 0.01, 0.9, "open", r"^pasted on .*\(cut:exchange: at most -2\.00 in favour"),
        ([_evidence("paste:same place", -0.5)], 0.01, 0.9, "refuted", r"^paste:same place: at most \+0\.50"),
        ([_evidence("cut:colour", -0.8)], 0.01, 0.9, "open", "too small to count in cut:colour"),
        ([_evidence("paste:ordinary evidence", -2)], 0.01, 0.79, "refuted", r"than its ordinary evidence \(-2\.00\)$"),
        (
            [_evidence("paste:ordinary evidence", -2)],
            0.01,
            0.8,
            "open",
            r"\(-2\.00\), but it raises scores .*\(\+5\.00\)",
        ),
        (
            [_evidence("paste:ordinary evidence", -2), _evidence("paste:same rule", 0.9)],
            0.01,
            0.8,
            "refuted",
            "-2.00.$",
        ),
        ([_evidence("paste:ordinary evidence", -0.5)], 0.01, 0.79, "open", "too small to count in paste:ordinary ev"),
        ([_evidence("paste:ordinary evidence", 0.9)], 0.01, 0.79, "open", "too small to count in paste:ordinary ev"),
        ([_evidence("paste:ordinary evidence", -0.5)], 0.01, 0.8, "confirmed", "cut and paste both work"),
        (_pasted(same=5.0, other=2.5), 0.01, 0.9, "confirmed", "beyond every control"),  # 3.5 of 6
        (_pasted(same=5.0, other=1.0), 0.01, 0.9, "open", r"same place \(share of its own\)"),  # 3.5 of 7.5
        (_pasted(same=6.5, other=2.5), 0.01, 0.9, "refuted", "ordinary members bring 67% of the effect"),  # 2 of 6
        (_pasted(same=5.0, other=7.9), 0.01, 0.9, "open", "too small to count in paste:other classes"),
        ([_evidence("paste:same place", 2.0, control=6.0)], 0.01, 0.9, "refuted", "members bring 75% of the effect"),
        ([_evidence("paste:same place", 4.0, control=5.0)], 0.01, 0.9, "open", r"same place \(share of its own\)"),
        ([_evidence("paste:same rule", 1.5, control=4.0)], 0.01, 0.9, "refuted", "^paste:same rule: ordinary members"),
        ([_evidence("paste:same rule", 0.8, 2.5)], 0.01, 0.9, "open", "too small to count in paste:same rule"),
        ([_evidence("paste:same rule", 5.0)], 0.01, 0.9, "confirmed", "beyond every control"),
        ([_evidence("cut:noise", -9.0), _evidence("borders:grey", 5.0)], 0.01, 0.9, "confirmed", "both work"),
    ],
)
def test_verdicts(changed: list[Evidence], p: float, suspicion: float, verdict: str, reason: str) -> None:
    result = judge(_verdict(*changed), Standard(), p, suspicion)
    assert result.verdict == verdict
    assert re.search(reason, result.reason)
    assert result.p == p
    assert result.evidence == _verdict(*changed).evidence


@pytest.mark.parametrize(
    ("undo", "apply", "verdict", "reason"),
    [
        (_evidence("undo", -4.0), _evidence("apply", 4.0), "confirmed", "undoing and applying it both work"),
        (_evidence("undo", 0.5), _evidence("apply", 4.0), "open", r"^applied .*\(\+4\.00\).*\(undo: at most \+0\.50"),
        (_evidence("undo", 0.5), _evidence("apply", 1.9), "refuted", r"^undo: at most \+0\.50"),  # may be 0.9
        (_evidence("undo", 0.5), _evidence("apply", 4.0, control=5.0), "refuted", "^undo"),  # mostly the control's
        (_evidence("undo", -4.0), _evidence("apply", -0.5), "refuted", r"^apply: at most \+0\.50"),
        (_evidence("undo", -0.8), _evidence("apply", 4.0), "open", "too small to count in undo"),
        (_evidence("undo", -4.0), _evidence("apply", 1.2, half=1.3), "open", "too small to count in apply"),
    ],
)
def test_a_property_that_works_where_it_is_put_is_not_refuted(
    undo: Evidence, apply: Evidence, verdict: str, reason: str
) -> None:
    """Members that keep their score without it have other evidence; that is no proof that the model ignores it."""
    whole = Verdict("open", 1.0, 10.0, Region("whole", "blockiness", 1.0), (undo, apply), "")
    result = judge(whole, Standard(), 0.01, 0.9)
    assert result.verdict == verdict
    assert re.search(reason, result.reason)


@pytest.mark.parametrize(
    ("changed", "p", "suspicion", "verdict"),
    [
        ([_evidence("undo", 0.5, p=0.6), _evidence("apply", 6.5)], 0.01, 0.9, "confirmed"),
        ([_evidence("undo", -0.8, p=0.6), _evidence("apply", 6.5)], 0.01, 0.9, "confirmed"),  # not certainly too little
        ([_evidence("undo", 0.5), _evidence("apply", 5.5)], 0.01, 0.9, "open"),  # perhaps 4.5 of 10
        ([_evidence("undo", 0.5), _evidence("apply", 6.5, control=7.0)], 0.01, 0.9, "refuted"),  # mostly the control's
        ([_evidence("undo", 0.5), _evidence("apply", 6.5)], 0.06, 0.9, "open"),
        ([_evidence("undo", 0.5), _evidence("apply", 6.5)], 0.01, 0.39, "open"),
        ([_evidence("cut:colour", 0.3), _evidence("paste:same place", 7.0)], 0.01, 0.9, "confirmed"),
        ([_evidence("cut:colour", 0.3), _evidence("paste:same place", 5.5)], 0.01, 0.9, "open"),
        ([_evidence("cut:colour", 0.3), _evidence("paste:same place", 7.0), _evidence("paste:ordinary evidence", 0.5)],
         0.01, 0.9, "refuted"),
        ([_evidence("cut:colour", 0.3), _evidence("paste:same place", 7.0), _evidence("paste:same rule", 4.0)],
         0.01, 0.9, "open"),
    ],
)  # fmt: skip
def test_what_carries_a_picture_to_the_class_by_itself_is_confirmed(
    changed: list[Evidence], p: float, suspicion: float, verdict: str
) -> None:
    """Members that keep their score have other evidence; the model uses the cue all the same."""
    whole = Verdict("open", 1.0, 10.0, Region("whole", "blockiness", 1.0), tuple(changed), "")
    tested = whole if changed[0].test == "undo" else _verdict(*changed)
    result = judge(tested, Standard(), p, suspicion)
    assert result.verdict == verdict
    if verdict == "confirmed":
        assert re.search(r"carries them \d\d% of the way to the members by itself", result.reason)
        assert "members keep their score" in result.reason
        # What the members did not lose need not be beyond chance.
        put = correct([replace(tested, evidence=tuple(replace(e, p=0.6) if "cut" in e.test or e.test == "undo" else e
                                                      for e in tested.evidence))], [0.9], Standard())  # fmt: skip
        assert put[0].p == 0.001
    assert not carries(replace(tested, distance=-1.0), Standard())  # there is no way to go


def test_without_pastes_a_finding_stays_open() -> None:
    cuts = replace(_verdict(), evidence=_verdict().evidence[:3])
    (result,) = correct([cuts], [0.9], Standard())
    assert result.verdict == "open"
    assert "no pictures of other classes" in result.reason


def test_the_standard_is_what_is_asked_for() -> None:
    assert judge(_verdict(), Standard(min_share=0.55), 0.01, 0.9).verdict == "open"
    assert judge(_verdict(), Standard(min_share=0.8), 0.01, 0.9).verdict == "refuted"
    assert judge(_verdict(), Standard(min_own=0.95), 0.01, 0.9).verdict == "open"
    assert judge(_verdict(), Standard(separate=0.95), 0.01, 0.9).verdict == "open"
    assert judge(_verdict(), Standard(alpha=0.001), 0.01, 0.9).verdict == "open"
    assert judge(_verdict(distance=-3.0), Standard(), 0.01, 0.9).verdict == "confirmed"


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
