"""Cues without a place: which property of whole pictures sets a group apart, and does the model answer to it?

A tint, a blur or a codec leaves no place in a heatmap.  So for every class (1) the tails of every property are compared
with those of the other classes, which is the right baseline: every class has its dark and blurred pictures; (2) what
sets such a tail apart is done to pictures of other classes, and the model is asked; (3) where it answers, the same is
undone in every picture of the class: the group is the pictures that lose by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfungst.alterations import CHANGES, COLOURS, KINDS, Alteration, find_alteration
from pfungst.domains.preprocessing import Preprocess
from pfungst.evidence import Verdict, compare, least_effect
from pfungst.findings import SAME, jaccard, repeats, valley_depth
from pfungst.interventions import Case, count_wanted, measure_changes
from pfungst.maps import Progress, Subject, make_laboratory
from pfungst.properties import SEEN
from pfungst.regions import Laboratory, Region
from pfungst.store import READ, Run
from pfungst.strategies import read_strategies

_PROBED = 48  # pictures of each role
_TRIED = 6  # tails of a class that are tried on the model
# Least suspicion of a group.  Properties vary without a gap, and models do use the blue of a sky: what is not clearly
# apart is a piece of one cloud, and there are many.
_SEPARATE = 0.5
_GAP = 0.9  # from which a property alone sets a group apart: the threshold and the discriminant were chosen by it
_APART = 0.2  # least depth of the valley before a tail that is tried
_MOST_UNDONE = 2000  # pictures of a class in which a change is undone; of more, as many are drawn


# ---- tails -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tail:
    """The samples of a class beyond a threshold.

    members  rows within the class, ascending
    scores   (n,) how far each sample of the class goes, high in the tail
    apart    depth of the valley before it, 0..1
    excess   log likelihood ratio of its share in the class to that in the other classes
    """

    members: np.ndarray
    scores: np.ndarray
    apart: float
    excess: float


def measure_excess(scores: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """(n,) by size of the tail (1 to n greatest ``scores``): log likelihood ratio of its share to that in ``baseline``.

    Binomial; its maximum over thresholds is a scan statistic (Kulldorff 1997).  0 where the tail is in no excess.
    """
    n, m = len(scores), len(baseline)
    ordered = np.sort(scores)[::-1]
    counts = np.arange(1, n + 1)
    beyond = m - np.searchsorted(np.sort(baseline), ordered, side="left")
    inside, outside = counts / n, (beyond + 1) / (m + 2)
    rest = np.where(counts < n, (n - counts) * np.log(np.maximum(1 - inside, 1e-300) / (1 - outside)), 0.0)
    ratio: np.ndarray = np.where(inside > outside, counts * np.log(inside / outside) + rest, 0.0)
    return ratio


def find_valley(scores: np.ndarray, least: int, most: int) -> int:
    """Size of the tail behind the deepest valley in the density of ``scores`` (n,); 0 if there is no valley.

    The density's width is half of Silverman's rule, as two modes are looked for.
    """
    n = len(scores)
    ordered = np.sort(scores)
    low, high = np.quantile(ordered, [0.25, 0.75])
    width = 0.45 * min(ordered.std(), max((high - low) / 1.349, 1e-9)) * n**-0.2
    if not width > 0:
        return 0
    points = np.linspace(ordered[0], ordered[-1], 256)
    density = np.exp(-0.5 * ((points[:, None] - ordered[None, :: max(1, n // 2000)]) / width) ** 2).sum(1)
    peak_left, peak_right = np.maximum.accumulate(density), np.maximum.accumulate(density[::-1])[::-1]
    depth = 1 - density / np.maximum(np.minimum(peak_left, peak_right), 1e-300)
    behind = n - np.searchsorted(ordered, points)
    depth = np.where((behind >= least) & (behind <= most), depth, 0)
    return int(behind[int(depth.argmax())]) if depth.max() > 0.1 else 0


def find_tails(inside: np.ndarray, outside: np.ndarray, min_size: int) -> list[Tail]:
    """Tails of a class's properties (n, p), those behind the deepest valleys first.

    Along each property, both ways, and along the discriminant of each tail so found.  Two thresholds are tried: the
    deepest valley, and the greatest excess over the other classes (m, p); over these as they are, and with their middle
    and spread moved to the class's, since classes differ in their middle by nature.
    """
    middle, spread = _robust(np.concatenate([inside, outside]))
    a, b = (inside - middle) / spread, (outside - middle) / spread
    own, its = _robust(a)
    other, width = _robust(b)
    baselines = b, (b - other) / width * its + own
    found = [
        tail
        for axis in range(a.shape[1])
        for sign in (1.0, -1.0)
        for tail in _follow(a, baselines, sign * np.eye(a.shape[1])[axis], min_size)
    ]
    found.sort(key=lambda tail: (-round(tail.apart, 2), -tail.excess))
    kept: list[Tail] = []
    for tail in found:
        if all(jaccard(tail.members, one.members) < SAME for one in kept):
            kept.append(tail)
    return kept


def _robust(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median and spread of each column, the spread like a standard deviation and never 0."""
    middle = np.median(rows, 0)
    low, high = np.quantile(rows, [0.25, 0.75], 0)
    spread = np.maximum((high - low) / 1.349, 0.25 * rows.std(0))
    return middle, np.where(spread > 0, spread, 1.0)


def _follow(
    a: np.ndarray, baselines: tuple[np.ndarray, np.ndarray], direction: np.ndarray, least: int
) -> Iterator[Tail]:
    """The tails along a direction, and along the discriminant between each of them and all else."""
    for start in _tails_along(a, baselines, direction, least):
        yield start
        chosen = np.zeros(len(a), bool)
        chosen[start.members] = True
        rest = np.concatenate([a[~chosen], baselines[0]])
        covariance = np.cov(rest.T) + 0.1 * np.eye(a.shape[1])
        turned = np.linalg.solve(covariance, a[chosen].mean(0) - np.median(rest, 0))
        yield from _tails_along(a, baselines, turned, least)


def _tails_along(
    a: np.ndarray, baselines: tuple[np.ndarray, np.ndarray], direction: np.ndarray, least: int
) -> Iterator[Tail]:
    scores = a @ direction
    most = int(0.6 * len(a))
    excesses = [measure_excess(scores, baseline @ direction) for baseline in baselines]
    usable = slice(least - 1, most)
    counts = [int(excess[usable].argmax()) + least for excess in excesses] + [find_valley(scores, least, most)]
    order = np.argsort(-scores, kind="stable")
    for count in sorted(set(counts) - {0}):
        inside = np.zeros(len(a), bool)
        inside[order[:count]] = True
        excess = max(float(one[count - 1]) for one in excesses)
        if excess > 0:
            yield Tail(np.flatnonzero(inside), scores, valley_depth(scores, inside, ~inside), excess)


# ---- does the model answer? ------------------------------------------------------------------------------------------


def probe_properties(run: Run, subject: Subject, progress: Progress) -> None:
    """Look for groups by property in every class; each class goes into ``properties/NUMBER.json``."""
    entries = list(read_strategies(run))
    properties = run.read_array("properties").astype(np.float64)
    usable = (run.read_array("status") == READ) & np.isfinite(properties).all(1)
    target, prediction = run.read_array("target"), run.read_array("prediction")
    for done, entry in enumerate(entries):
        progress("properties", done, len(entries))
        name = f"properties/{entry['class_index']:04d}.json"
        if run.read_json(name) is not None:
            continue
        index = entry["class_index"]
        rows = np.array(entry["rows"], dtype=int)
        foreign = np.flatnonzero(usable & (target != index) & (prediction != index))
        groups: list[dict[str, Any]] = []
        if len(rows) >= 2 * subject.settings.min_size and len(foreign) >= subject.settings.min_size:
            tails = find_tails(properties[rows], properties[foreign], subject.settings.min_size)
            tails = [tail for tail in tails if tail.apart >= _APART][:_TRIED]
            groups = list(_try_tails(subject, index, rows, foreign, tails, properties))
        run.write_json(name, {"class": entry["class"], "class_index": index, "groups": groups})
    progress("properties", len(entries), len(entries))


def _try_tails(
    subject: Subject, index: int, rows: np.ndarray, foreign: np.ndarray, tails: list[Tail], properties: np.ndarray
) -> Iterator[dict[str, Any]]:
    """The groups, each with the alteration to which the model answers; a tail clearly apart also without.

    A plain border, or small print, is a property that no change of the whole picture brings about: such a group is
    tested by a region.
    """
    lab = make_laboratory(subject)
    least = max(_SEPARATE, subject.settings.separate)
    kept: list[np.ndarray] = []
    for tail in tails:
        inside, outside = rows[tail.members], np.delete(rows, tail.members)
        found = seek_alteration(subject, lab, index, (inside, outside, foreign), properties)
        if found is not None:
            alteration, others = found
            members, suspicion = _lose_by_undoing(subject, lab, index, rows, tail, alteration, others)
            named, record = alteration.property, {"alteration": asdict(alteration)}
        elif tail.apart >= max(_GAP, least):
            members, suspicion, record = inside, tail.apart, {}
            named = list(SEEN)[int(_lead(properties[inside], properties[outside]).argmax())]
        else:
            continue
        if suspicion < least or any(repeats(members, one) for one in kept):
            continue
        kept.append(members)
        head = {"rows": members.tolist(), "views": [f"property:{named}"], "suspicion": round(suspicion, 4)}
        yield {**head, **record}


def seek_alteration(
    subject: Subject,
    lab: Laboratory,
    index: int,
    roles: tuple[np.ndarray, np.ndarray, np.ndarray],
    properties: np.ndarray,
    tried: str = "",
) -> tuple[Alteration, Tensor] | None:
    """The change that makes pictures of other classes like these members, if the model takes them for the class by it.

    roles       rows of the members, of the rest of their class (``index``) and of other classes
    properties  (n, p) of all samples
    tried       a property that is not it

    Returns the alteration and the pictures of the rest it was found on, pixels (m, C, H, W) in 0..1; None where no
    change of what sets the members apart brings as much as counts, beyond the same change the other way.
    """
    rng = np.random.default_rng([subject.settings.seed, index, len(roles[0])])
    drawn = [subject.load(rng.permutation(part)[:_PROBED]) for part in roles]
    group, others, strangers = (subject.preprocess.to_pixels(inputs) for inputs in drawn)
    before = lab.ask(subject.preprocess.from_pixels(strangers))
    distance = float(lab.ask(drawn[0])[:, index].mean() - before[:, index].mean())
    least = least_effect(subject.settings.min_share, distance)
    best: tuple[float, Alteration] | None = None
    for name in _suspects(properties[roles[0]], properties[roles[1]], tried):
        alteration = find_alteration(name, group, others)
        if alteration is None:
            continue
        treated, control = _ask_both(lab, subject.preprocess, alteration, strangers)
        gain = float((treated - control)[:, index].mean())
        if best is None or gain > best[0]:
            best = gain, alteration
    return None if best is None or best[0] < least else (best[1], others)


def _some(pictures: Tensor, count: int) -> Tensor:
    """So many of these pictures, over and over again if they are fewer."""
    return pictures[torch.arange(count, device=pictures.device) % len(pictures)]


def _lead(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """How far the medians of properties (n, p) lie apart, (p,), in spreads of the second."""
    _, spread = _robust(outside)
    apart: np.ndarray = np.abs(np.median(inside, 0) - np.median(outside, 0)) / spread
    return apart


def _suspects(inside: np.ndarray, outside: np.ndarray, tried: str) -> list[str]:
    """The two kinds of change, but for the one ``tried``, that would explain most of what sets the group apart."""
    names: list[str] = []
    for column in np.argsort(-_lead(inside, outside), kind="stable"):
        name = list(SEEN)[column]
        kind = "colour" if name in COLOURS else name
        if kind not in (*names, tried) and kind in (*KINDS, *CHANGES):
            names.append(kind)
    return names[:2]


def _ask_both(lab: Laboratory, preprocess: Preprocess, alteration: Alteration, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs for the altered pictures, and for those altered as much the other way."""
    altered = alteration.apply(pixels), alteration.apply_opposite(pixels)
    treated, control = (lab.ask(preprocess.from_pixels(one)) for one in altered)
    return treated, control


def _lose_by_undoing(
    subject: Subject,
    lab: Laboratory,
    index: int,
    rows: np.ndarray,
    tail: Tail,
    alteration: Alteration,
    ordinary: Tensor,
) -> tuple[np.ndarray, float]:
    """The pictures of the class whose score falls most when the change is undone, and how far apart they are.

    Two groups by score lost and property together (a mixture of two Gaussians), or the tail as it is, whichever is
    separated by the deeper valleys; a group is as far apart as by both, or as by a property that leaves a gap: where
    every picture of the class loses a little, the loss tells nobody apart.
    """
    from sklearn.mixture import GaussianMixture

    rng = np.random.default_rng([subject.settings.seed, index])
    drawn = np.sort(rng.permutation(len(rows))[:_MOST_UNDONE])
    lost = np.empty(len(drawn))
    for start in range(0, len(drawn), subject.settings.batch_size):
        part = slice(start, start + subject.settings.batch_size)
        pixels = subject.preprocess.to_pixels(subject.load(rows[drawn[part]]))
        undone = alteration.undo(pixels, _some(ordinary, len(pixels)))
        both = lab.ask(subject.preprocess.from_pixels(torch.cat([pixels, undone])))[:, index]
        before, after = both.chunk(2)
        lost[part] = (before - after).cpu().numpy()
    features = np.stack([lost, tail.scores[drawn]], 1)
    middle, spread = _robust(features)
    features = (features - middle) / spread
    tailed = np.isin(drawn, tail.members)
    choices = [tailed]
    mixture = GaussianMixture(2, reg_covar=1e-3, n_init=3, random_state=subject.settings.seed).fit(features)
    choices.append(mixture.predict(features) == int(mixture.means_[:, 0].argmax()))
    choices.append(choices[1] & (features[:, 1] > 0))
    scored = []
    for inside in choices:
        if min(inside.sum(), (~inside).sum()) < subject.settings.min_size or inside.mean() > 0.6:
            continue
        depths = [valley_depth(features[:, axis], inside, ~inside) for axis in (0, 1)]
        scored.append((float(np.mean(depths)), rows[drawn[inside]], float(depths[1])))
    if not scored:
        return rows[:0], 0.0
    suspicion, members, by_property = max(scored, key=lambda one: one[0])
    return members, max(suspicion, by_property if by_property >= _GAP else 0.0)


# ---- proof -----------------------------------------------------------------------------------------------------------


def examine_alteration(
    lab: Laboratory,
    preprocess: Preprocess,
    case: Case,
    alteration: Alteration,
    *,
    most: int = 48,
    min_share: float = 0.1,
    seed: int = 0,
) -> tuple[Verdict, Alteration]:
    """The tests of a finding without a place, and the change as it was tested.

    The verdict stays open, see ``evidence.correct``.

    undo   (necessity) members are made like the rest of their class.  Control: they are changed as much the other way;
           where detail is exchanged for that of ordinary members, the same with the property put back.
    apply  (sufficiency) pictures of other classes are made like members.  Control: they are changed as much the other
           way.

    A control that moves the score against the effect counts as none.  The change, and of several ways to undo it the
    first that takes three quarters of the most that any takes, are found on a third of the members and tested on the
    others; on more than ``most`` where power asks for it, as for a region.
    """
    rng = np.random.default_rng([seed, case.target, len(case.members)])
    picked = [rng.permutation(rows) for rows in (case.members, case.others, case.outsiders)]

    def load(role: int, part: slice) -> Tensor:
        return preprocess.to_pixels(lab.load(picked[role][part].tolist()))

    members, rest, strangers = (load(role, slice(most)) for role in range(3))
    count = max(3, len(members) // 3)
    found = find_alteration(alteration.property, members[:count], rest[: len(rest) // 3 or 1])
    alteration = alteration if found is None else found
    design, group, rest = members[:count], members[count:], rest[len(rest) // 3 or 1 :]
    reference = strangers if len(strangers) else rest
    scores = (lab.ask(preprocess.from_pixels(one))[:, case.target].mean() for one in (group, reference))
    distance = float(next(scores) - next(scores))
    ways = alteration.ways_back()
    undone = [_undo(lab, preprocess, case.target, way, design, rest) for way in ways]
    effects = np.array([float((treated - control)[:, 0].mean()) for treated, control, _ in undone])
    chosen = int((effects <= effects.min() + 0.25 * abs(effects.min())).argmax())
    alteration, trials = ways[chosen], [undone[chosen]]
    if len(strangers) > 1:
        trials.append(_apply(lab, preprocess, case.target, alteration, strangers))
    known = [torch.from_numpy((treated - control)[:, 0]) for treated, control, _ in trials]
    wanted = count_wanted(known, least_effect(min_share, distance), most)
    group = torch.cat([group, load(0, slice(most, most + max(0, wanted - len(group))))])
    strangers = torch.cat([strangers, load(2, slice(most, wanted))])
    evidence = [compare("undo", *_undo(lab, preprocess, case.target, alteration, group, rest), seed)]
    if len(strangers):
        evidence.append(compare("apply", *_apply(lab, preprocess, case.target, alteration, strangers), seed))
    region = Region("whole", alteration.property, 1.0)
    return Verdict("open", 1.0, distance, region, tuple(evidence), ""), alteration


# Changes (m, 2) by the treatment and by its control, and what each flips, as ``compare`` takes them.
_Changes = tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]


def _undo(
    lab: Laboratory, preprocess: Preprocess, target: int, alteration: Alteration, pixels: Tensor, rest: Tensor
) -> _Changes:
    ordinary = _some(rest, len(pixels))
    before = lab.ask(preprocess.from_pixels(pixels))
    was = before.argmax(1).cpu().numpy() == target
    after = (
        lab.ask(preprocess.from_pixels(changed))
        for changed in (alteration.undo(pixels, ordinary), alteration.undo_control(pixels, ordinary))
    )
    (treated, decided), (control, otherwise) = (measure_changes(before, one, target) for one in after)
    # More of the cue raises the score, as it should; that is no merit of the way back.
    return treated, np.minimum(control, 0), (was & (decided != target), was & (otherwise != target))


def _apply(lab: Laboratory, preprocess: Preprocess, target: int, alteration: Alteration, pixels: Tensor) -> _Changes:
    before = lab.ask(preprocess.from_pixels(pixels))
    was = before.argmax(1).cpu().numpy() == target
    both = _ask_both(lab, preprocess, alteration, pixels)
    (treated, decided), (control, otherwise) = (measure_changes(before, one, target) for one in both)
    return treated, np.maximum(control, 0), (~was & (decided == target), ~was & (otherwise == target))
