"""Evidence and verdicts: statistics against enumeration, Holm's correction, every verdict with its reason."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest

from pfungst.evidence import Evidence, Standard, Verdict, carries, compare, correct, judge, required
from pfungst.regions import Region


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


@pytest.mark.parametrize(
    ("flips", "control", "verdict"),
    [(0.21, 0.02, "open"), (0.21, 0.19, "refuted"), (0.1, 0.0, "refuted"), (1, 0, "open")],
)
@pytest.mark.parametrize("place", [True, False])
def test_what_turns_decisions_for_certain_is_not_refuted(
    flips: float, control: float, verdict: str, place: bool
) -> None:
    """A cue can turn decisions by what it does to the outputs of other classes, with no change of its own class's."""
    kept = {"flips": flips, "control_flips": control, "n": 48}
    names = ("paste:same place", "paste:ordinary evidence", "paste:other classes") if place else ("apply",)
    puts = [replace(_evidence(name, 0.1, 0.2), **kept) for name in names]
    cuts = [_evidence(name, -0.1, 0.2) for name in (("cut:colour", "cut:exchange") if place else ("undo",))]
    region = Region("fixed", "pixels", 0.04) if place else Region("whole", "blur", 1.0)
    (found,) = correct([Verdict("open", 1.0, 10.0, region, (*cuts, *puts), "")], [0.5], Standard())
    assert found.verdict == verdict
    told = f"it turns {flips:.0%} of them to the class, controls {control:.0%}, whatever the class's score says ("
    assert (told in found.reason) == (verdict == "open")
    assert "at most +0.30 in favour, 1.00 is the least that counts" in found.reason
    if place:  # one control that turns as many is enough
        equal = replace(puts[2], control_flips=flips)
        both = Verdict("open", 1.0, 10.0, region, (*cuts, *puts[:2], equal), "")
        assert correct([both], [0.5], Standard())[0].verdict == "refuted"
        shared = [replace(one, flips=1.0, n=48) for one in _pasted(same=6.5, other=2.5)]  # refuted for another reason
        assert correct([_verdict(*shared)], [0.9], Standard())[0].verdict == "refuted"


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
