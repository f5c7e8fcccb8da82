"""Evidence -> verdicts: what one test says, and the rule by which all tests of a finding make it confirmed or refuted.

Effect = treated change minus control change of the class's logit (and probability, and decisions).  Each with a paired
bootstrap interval and a sign-flip permutation p; Holm's correction over the findings of a run that can be confirmed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pfungst.cards import show_verdict
from pfungst.regions import Region

# Noise is evidence of its own kind to a network, the more the greater the region: it is reported, it does not decide.
REQUIRED = ("cut:colour", "cut:exchange", "paste:same place")
WHOLE = ("undo", "apply")  # the tests that decide on a cue without a place, see probes.py
MATCHED = ("paste:same place", "paste:same rule")  # the second for moving regions only, and then required too
ORDINARY = "paste:ordinary evidence"  # what has to be surpassed, or equalled, by an interval; its p does not count
_COUNTED = (*REQUIRED, *MATCHED, *WHOLE)
DECIDE = (*_COUNTED, ORDINARY)
# What certainly carries a picture of another class so far of the way to the members' scores is used by the model even
# where members, who have other evidence too, keep their scores without it.
ALONE = 0.5
# Suspicion from which a group is no piece of one cloud.  In the planted benchmark regions of natural groups have less.
CLEARLY_APART = 0.8


@dataclass(frozen=True)
class Evidence:
    """One test.  Changes are means over its n pictures, in units of the logit unless said otherwise.

    treated, control   change of the class's logit by the treatment and by its control
    effect, interval   their difference and its 95 % bootstrap interval
    p                  two-sided sign-flip permutation p of the difference
    probability        difference of the change in the class's probability
    flips, control_flips  share of pictures whose decision changes: away from the class (cut), to it (paste)
    """

    test: str
    n: int
    treated: float
    control: float
    effect: float
    interval: tuple[float, float]
    p: float
    probability: float
    flips: float
    control_flips: float


@dataclass(frozen=True)
class Verdict:
    """What the experiments say: confirmed, refuted or open.

    p        greatest p of the tests that decide, after Holm's correction over the findings of the run
    distance mean logit of members less that of other classes: the way that evidence has to go
    reason   the rule that decided, in words
    """

    verdict: str
    p: float
    distance: float
    region: Region
    evidence: tuple[Evidence, ...]
    reason: str

    def _repr_html_(self) -> str:
        return show_verdict(describe_verdict(self), DECIDE)


def describe_verdict(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON has it; the region without its mask."""
    region = verdict.region
    return {
        "verdict": verdict.verdict,
        "p": verdict.p,
        "reason": verdict.reason,
        "distance": verdict.distance,
        "region": {"kind": region.kind, "source": region.source, "area": region.area, "part": region.part},
        "evidence": [{**asdict(one), "interval": list(one.interval)} for one in verdict.evidence],
    }


def compare(
    test: str, treated: np.ndarray, control: np.ndarray, decisions: tuple[np.ndarray, ...], seed: int
) -> Evidence:
    """Evidence from paired changes (n, 2): column 0 logit, column 1 probability; ``decisions``: flipped or not."""
    difference = (treated - control)[:, 0]
    n = len(difference)
    rng = np.random.default_rng(seed)
    means = difference[rng.integers(0, n, (2000, n))].mean(1)
    flipped = np.abs((rng.integers(0, 2, (4999, n)) * 2 - 1) @ difference) / n
    p = (1 + int((flipped >= abs(difference.mean()) - 1e-12).sum())) / 5000
    low, high = np.quantile(means, [0.025, 0.975])
    return Evidence(
        test=test,
        n=n,
        treated=float(treated[:, 0].mean()),
        control=float(control[:, 0].mean()),
        effect=float(difference.mean()),
        interval=(float(low), float(high)),
        p=float(p),
        probability=float((treated - control)[:, 1].mean()),
        flips=float(decisions[0].mean()),
        control_flips=float(decisions[1].mean()),
    )


@dataclass(frozen=True)
class Standard:
    """What evidence has to show; see the settings of the same names.

    min_share  least effect that counts, as a share of the way from other classes' scores to the members'
    min_own    least part of a paste's effect that the same place of ordinary members must lack, of that which goes
               beyond what the same place of any picture brings
    separate   least suspicion of the group: in experiments a piece of one cloud can work as well as a group apart
    alpha      chance of a false confirmation in the run
    """

    min_share: float = 0.1
    min_own: float = 0.5
    separate: float = 0.4
    alpha: float = 0.05


def least_effect(min_share: float, distance: float) -> float:
    """The least effect that counts: ``min_share`` of the way from other classes' scores to the members'."""
    return min_share * max(distance, 0.0)


def required(verdict: Verdict) -> list[Evidence]:
    """The tests whose effects and p count, those of them that were made."""
    return [evidence for evidence in verdict.evidence if evidence.test in _COUNTED]


def _required_puts(verdict: Verdict) -> list[Evidence]:
    """Those of them that put the cue on pictures of other classes."""
    return [evidence for evidence in required(verdict) if _sign(evidence) > 0]


def judge(verdict: Verdict, standard: Standard, p: float, suspicion: float) -> Verdict:
    """The verdict by rule: see ``reason`` of the result.  ``p``: the corrected p of the tests that decide."""
    both = _judge_both(verdict, standard, p, suspicion)
    if both.verdict == "confirmed":
        return both
    if p <= standard.alpha and suspicion >= standard.separate and carries(verdict, standard):
        put, how = describe_put(verdict)
        share = put.effect / verdict.distance
        reason = (
            f"{how} pictures of other classes, it carries them {share:.0%} of the way to the members by itself, "
            f"beyond every control (corrected p = {p:.2g}); the members keep their score without it, they have other "
            "evidence, too"
        )
        return replace(both, verdict="confirmed", reason=reason)
    if both.verdict == "refuted" and fall_short(verdict, standard) is not None and turns_decisions(verdict):
        put, how = describe_put(verdict)
        most = max(one.control_flips for one in _puts(verdict))
        turned = f"{how} pictures of other classes, it turns {put.flips:.0%} of them to the class, controls {most:.0%}"
        return replace(both, verdict="open", reason=f"{turned}, whatever the class's score says ({both.reason})")
    return both


def _judge_both(verdict: Verdict, standard: Standard, p: float, suspicion: float) -> Verdict:
    """The verdict where a cue is to be necessary and sufficient."""
    tests = {evidence.test: evidence for evidence in verdict.evidence}
    whole = verdict.region.kind == "whole"
    if any(name not in tests for name in (WHOLE if whole else REQUIRED)):
        return replace(verdict, verdict="open", p=p, reason="there are no pictures of other classes to paste on")
    least, short = least_effect(standard.min_share, verdict.distance), fall_short(verdict, standard)
    if short is not None:
        reason = f"{short.test}: at most {_in_favour(short):+.2f} in favour, {least:.2f} is the least that counts"
        if _sign(short) < 0 and suffices(verdict, standard):
            put, how = describe_put(verdict)
            reason = (
                f"{how} pictures of other classes, it raises the score ({put.effect:+.2f}); the members keep theirs "
                f"without it, they have other evidence, too ({reason})"
            )
            return replace(verdict, verdict="open", p=p, reason=reason)
        return replace(verdict, verdict="refuted", p=p, reason=reason)
    ordinary = tests["apply" if whole else ORDINARY]
    clear = suspicion >= CLEARLY_APART and not whole
    if ordinary.interval[1] < 0:
        reason = f"pasted, the region says less for the class than its ordinary evidence ({ordinary.effect:+.2f})"
        # That is what a piece of one cloud does.  What is apart and certainly raises scores is used, if little.
        if clear and all(one.interval[0] > 0 for one in _required_puts(verdict)):
            reason += f", but it raises scores beyond its control ({tests['paste:same place'].effect:+.2f})"
            return replace(verdict, verdict="open", p=p, reason=reason)
        return replace(verdict, verdict="refuted", p=p, reason=reason)
    needed = required(verdict)
    matched = _required_puts(verdict)
    gain = _gain(tests)
    for evidence in matched:
        if evidence.interval[1] < standard.min_own * gain:
            share = 1 - evidence.effect / gain
            source = "the opposite change brings" if whole else "ordinary members bring"
            reason = f"{evidence.test}: {source} {share:.0%} of the effect, so it is not the group's own"
            return replace(verdict, verdict="refuted", p=p, reason=reason)
    weak = [e.test for e in needed if _sign(e) * e.effect < least]
    # A piece of one cloud can have evidence of the class where others have none: it has to say more than all of theirs.
    surpassed = ordinary.interval[0] > 0 or clear
    weak += [] if surpassed else [ordinary.test]
    weak += ["paste:other classes"] if gain < least else []
    weak += [f"{e.test} (share of its own)" for e in matched if e.effect < standard.min_own * gain]
    tried = "undoing and applying it" if whole else "cut and paste"
    if p <= standard.alpha and not weak and suspicion < standard.separate:
        reason = f"{tried} work, but the group is hardly apart from its class (suspicion {suspicion:.2f})"
        return replace(verdict, verdict="open", p=p, reason=reason)
    if p <= standard.alpha and not weak:
        reason = f"{tried} both work, beyond every control (corrected p = {p:.2g})"
        return replace(verdict, verdict="confirmed", p=p, reason=reason)
    reason = f"corrected p = {p:.2g}" + (f"; effect too small to count in {', '.join(weak)}" if weak else "")
    return replace(verdict, verdict="open", p=p, reason=reason)


def describe_put(verdict: Verdict) -> tuple[Evidence, str]:
    """The test that puts the cue on pictures of other classes, and how it does, in words."""
    tests = {evidence.test: evidence for evidence in verdict.evidence}
    return (tests["apply"], "applied to") if "apply" in tests else (tests["paste:same place"], "pasted on")


def _sign(evidence: Evidence) -> int:
    """The way that the score has to go: down where the cue is taken away, up where it is put."""
    return -1 if evidence.test.startswith(("cut", "undo")) else 1


def _gain(tests: Mapping[str, Evidence]) -> float:
    """What a property or a region brings where it is put; of a region, beyond what the same place of any picture does.

    A paste covers what is there, and that alone can raise the score: neither the group's nor the class's evidence.
    Runs that were made before that was measured have none to take off.
    """
    put = tests.get("paste:other classes")
    return put.effect if put is not None else tests["apply" if "apply" in tests else "paste:same place"].treated


def _in_favour(evidence: Evidence) -> float:
    """The most that speaks for the cue."""
    return max(_sign(evidence) * end for end in evidence.interval)


def fall_short(verdict: Verdict, standard: Standard) -> Evidence | None:
    """The first of the tests that decide whose effect is certainly less than the least that counts, if any."""
    least = least_effect(standard.min_share, verdict.distance)
    return next((evidence for evidence in required(verdict) if _in_favour(evidence) < least), None)


def suffices(verdict: Verdict, standard: Standard) -> bool:
    """Whether a region or a property certainly speaks for the class wherever it is put, beyond every control."""
    tests = {evidence.test: evidence for evidence in verdict.evidence}
    put = _required_puts(verdict)
    ordinary = tests.get(ORDINARY)
    if not put or (ordinary is not None and ordinary.interval[0] <= 0):
        return False
    least = max(least_effect(standard.min_share, verdict.distance), 1e-12)
    gain = _gain(tests)
    return gain >= least and all(o.interval[0] >= least and o.effect >= standard.min_own * gain for o in put)


def _puts(verdict: Verdict) -> list[Evidence]:
    """All tests that put something on pictures of other classes."""
    return [one for one in verdict.evidence if one.test.startswith(("paste", "apply"))]


def turns_decisions(verdict: Verdict) -> bool:
    """Whether it certainly turns more pictures of other classes into the class than each of its controls does.

    Decisions are between classes: a cue can turn them by what it does to the outputs of the others, too, which the
    output of the class does not show.  By the 95 % interval for two shares of Agresti and Caffo (2000).
    """

    def surely(one: Evidence) -> bool:
        cue, control = ((share * one.n + 1) / (one.n + 2) for share in (one.flips, one.control_flips))
        error = ((cue * (1 - cue) + control * (1 - control)) / (one.n + 2)) ** 0.5
        return cue - control > 1.96 * error

    puts = _puts(verdict)
    return bool(puts) and all(surely(one) for one in puts)


def carries(verdict: Verdict, standard: Standard) -> bool:
    """Whether it suffices, and by itself brings pictures of other classes a great part of the way: ``ALONE``."""
    far = ALONE * verdict.distance
    far_enough = all(one.interval[0] >= far for one in _required_puts(verdict))
    return verdict.distance > 0 and suffices(verdict, standard) and far_enough


def keeps_score(verdict: Verdict, standard: Standard) -> bool:
    """Whether taking the cue away from members costs them less than what counts, in one of the tests that decide."""
    least = least_effect(standard.min_share, verdict.distance)
    return any(_sign(one) < 0 and -one.effect < least for one in required(verdict))


def _deciding(verdict: Verdict, standard: Standard) -> list[Evidence]:
    """The tests whose p counts: all that are required; where members keep their scores, those of what is put."""
    alone = keeps_score(verdict, standard) and carries(verdict, standard)
    return _required_puts(verdict) if alone else required(verdict)


def correct(
    verdicts: Sequence[Verdict], suspicions: Sequence[float], standard: Standard, tries: Sequence[int] | None = None
) -> list[Verdict]:
    """The verdicts with Holm's correction: the chance of one false confirmation in a run is at most alpha.

    What is hardly apart from its class (``separate``) cannot be confirmed whatever its tests say, and suspicion was
    settled before they were made: so findings that are apart are corrected for each other, the rest for all.

    suspicions  of the findings, aligned with their verdicts
    tries       how many causes were tried of each, of which one was kept: so many tests more.  1 by default
    """
    raw = [max((one.p for one in _deciding(verdict, standard)), default=1.0) for verdict in verdicts]
    tests = list(tries) if tries else [1] * len(raw)
    apart = [i for i, suspicion in enumerate(suspicions) if suspicion >= standard.separate]
    corrected = _holm(raw, tests)
    for i, p in zip(apart, _holm([raw[i] for i in apart], [tests[i] for i in apart]), strict=True):
        corrected[i] = p
    return [judge(v, standard, p, suspicion) for v, p, suspicion in zip(verdicts, corrected, suspicions, strict=True)]


def _holm(raw: Sequence[float], tests: Sequence[int]) -> list[float]:
    """Holm's (1979) step-down correction; ``tests``: how many tests each p is the only one that is known of."""
    corrected, running, left = [1.0] * len(raw), 0.0, sum(tests)
    for rank, i in enumerate(sorted(range(len(raw)), key=lambda i: raw[i])):
        running = max(running, min(1.0, raw[i] * (left - rank)))
        corrected[i] = running
    return corrected
