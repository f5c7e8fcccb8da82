"""Findings -> verdicts: change the pictures, ask the model again, beside a matched control.

cut      (necessity) the region of members goes to noise, to the colours around it, to a blur, to an inpainting, or is
         exchanged for the same place of members of the class outside the group.  Control: the same change in a region
         of the same size and shape where relevance is not.
paste    (sufficiency) the region of a member is put on pictures of other classes.  Controls, cut from ordinary
         members, which are those of the class outside the group: the same place; for a region that moves, the region
         that the same rule finds in them; and the core of their ordinary evidence: where their relevance is strongest,
         up to half of all their positive relevance or the region's own area.  A region that says no more for the class
         than that is no finding.  Another control is cut from pictures of other classes, the same place: what covering
         a part of a picture does by itself, which says nothing for the class, whoever is covered.
detail   of what shines through, a watermark say, a paste brings along what lies under it.  So the fine detail alone can
         be put, and exchanged, on the coarse structure and the colours that are there.
borders  (the talk's test, for regions along the border) to noise, to one constant colour, to a random colour each.
         Control: a frame as wide, further inside.

The region is chosen on one part of the members ("design"), the effects are measured on the others.  What a test says,
and what follows from all of them, is in ``evidence.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from pfungst.cuts import fill_blur, fill_colour, fill_harmonic, fill_noise, frame_mask, paste, paste_detail
from pfungst.evidence import ORDINARY, Evidence, Verdict, compare, least_effect
from pfungst.regions import (
    Direction,
    Laboratory,
    Region,
    control_masks,
    layer_cue_maps,
    mask_core,
    mask_strongest,
    pixel_cue_maps,
    smooth_maps,
    touches_border,
)

_MOST_OF = 0.35  # share of what exchanging any region takes from members that the chosen one has to take
_USUAL = 0.4  # regions up to this share of the picture are tried first
LEVEL, POWER = 0.005, 0.8  # of one test; the level allows for Holm's correction over ten findings
MOST_PICTURES = 10_000
AT_MOST = 4  # times as many pictures as were asked for, where power asks for more
AREAS = (0.02, 0.04, 0.08, 0.16, 0.32, 0.64)
FRAMES = (1 / 64, 1 / 32, 3 / 64, 1 / 16, 3 / 32, 1 / 8)  # widths, as shares of the shorter side


# ---- one finding ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """Some pictures of one role, with all that the tests need of them."""

    inputs: Tensor
    pixels: Tensor  # (m, H, W) relevance of the class
    cues: dict[str, Tensor]  # source -> (m, H, W) cue maps

    def take(self, rows: Sequence[int] | np.ndarray) -> Samples:
        index = torch.as_tensor(np.asarray(rows), dtype=torch.long)
        return Samples(self.inputs[index], self.pixels[index], {k: v[index] for k, v in self.cues.items()})

    def join(self, more: Samples) -> Samples:
        """These and ``more``."""
        cues = {key: torch.cat([value, more.cues[key]]) for key, value in self.cues.items()}
        return Samples(torch.cat([self.inputs, more.inputs]), torch.cat([self.pixels, more.pixels]), cues)


@dataclass(frozen=True)
class Case:
    """A finding in the laboratory.

    target      the class, as an index of the model's outputs
    directions  what tells the group apart, by layer
    view        the view in which the group is most separate
    members, others, outsiders  row numbers of the data set: the group; its class outside the group; other classes
    """

    target: int
    directions: tuple[Direction, ...]
    view: str
    members: np.ndarray
    others: np.ndarray
    outsiders: np.ndarray


@dataclass(frozen=True)
class Scene:
    """The pictures of one examination, and the region that some of them chose.

    region     what is cut and pasted
    design     members that chose the region;  group: members on which it is tested
    others     the rest of the class;  outsiders: inputs of other classes
    swapped    for each of the group, the one of ``others`` that it exchanges the region with
    rivals     for each outsider, the one of ``others`` that the control is cut from
    first      how many pictures of a role there are at most before power asks for more
    """

    region: Region
    design: Samples
    group: Samples
    others: Samples
    outsiders: Tensor
    swapped: np.ndarray
    rivals: np.ndarray
    first: int

    @property
    def members(self) -> Samples:
        """The members that were taken to begin with."""
        return self.design.join(
            self.group.take(np.arange(min(len(self.group.inputs), self.first - len(self.design.inputs))))
        )


def examine(
    lab: Laboratory, case: Case, *, most: int = 48, min_share: float = 0.1, part: str = "all", seed: int = 0
) -> Verdict:
    """All tests of one finding, with ``most`` pictures of each role to begin with: see ``set_scene``, ``try_scene``.

    The verdict stays open: it depends on the other findings of the run, see ``correct``.
    """
    scene = set_scene(lab, case, most=most, min_share=min_share, part=part, seed=seed)
    return try_scene(lab, case.target, scene, seed)


def set_scene(
    lab: Laboratory, case: Case, *, most: int = 48, min_share: float = 0.1, part: str = "all", seed: int = 0
) -> Scene:
    """Draw pictures, find the region, and pair the pictures.  ``part``: see ``Region``.

    Where the pictures that chose the region show that so few would miss the least effect that counts (see ``POWER``),
    up to ``AT_MOST`` times as many are taken, if there are as many.
    """
    rng = np.random.default_rng([seed, case.target, len(case.members)])
    picked = [rng.permutation(rows) for rows in (case.members, case.others, case.outsiders)]
    members, others = observe(lab, case, picked[0][:most], picked[1][:most])
    outsiders = lab.load(picked[2][:most].tolist())
    distance = _distance(lab, case.target, members, outsiders, others)
    first, test = np.array_split(np.arange(len(members.inputs)), [max(3, len(members.inputs) // 3)])
    design, group = members.take(first), members.take(test)
    least = least_effect(min_share, distance)
    region = _choose_region(lab, case.target, design, others, outsiders, part, least, rng)
    wanted = count_wanted(_effects_in_design(lab, case.target, design, others, outsiders, region), least, most)
    if len(more := picked[0][most : most + max(0, wanted - len(group.inputs))]):
        group = group.join(observe_like(lab, case, more, others))
    if len(more := picked[2][most:wanted]):
        outsiders = torch.cat([outsiders, lab.load(more.tolist())])
    swapped, rivals = (
        rng.permutation(np.resize(np.arange(len(others.inputs)), count))
        for count in (len(group.inputs), len(outsiders))
    )
    return Scene(region, design, group, others, outsiders, swapped, rivals, most)


def try_scene(lab: Laboratory, target: int, scene: Scene, seed: int = 0) -> Verdict:
    """All tests of a scene, whoever set it: the same pictures, cut and pasted in the same places.

    The verdict stays open: it depends on the other findings of the run, see ``correct``.
    """
    distance = _distance(lab, target, scene.members, scene.outsiders[: scene.first], scene.others)
    evidence = [*_test_cuts(lab, target, scene, seed)]
    if len(scene.outsiders):
        evidence += _test_pastes(lab, target, scene, seed)
    if scene.region.mask is not None and touches_border(scene.region.mask):
        evidence += _test_borders(lab, target, scene.group, scene.region, seed)
    return Verdict("open", 1.0, distance, scene.region, tuple(evidence), "")


def _distance(lab: Laboratory, target: int, members: Samples, outsiders: Tensor, others: Samples) -> float:
    """Mean logit of members less that of other classes (of the rest of the class where there are none)."""
    reference = outsiders if len(outsiders) else others.inputs
    return float(lab.ask(members.inputs)[:, target].mean() - lab.ask(reference)[:, target].mean())


def observe(lab: Laboratory, case: Case, members: np.ndarray, others: np.ndarray) -> tuple[Samples, Samples]:
    """Pictures and cue maps of the group and of the rest of its class."""
    rest = observe_like(lab, case, others)
    return observe_like(lab, case, members, rest), rest


def observe_like(lab: Laboratory, case: Case, rows: np.ndarray, others: Samples | None = None) -> Samples:
    """Pictures and their cue maps, which show what is more than in ``others``; than in themselves if there are none."""
    layers = [direction.layer for direction in case.directions]
    inputs = lab.load(rows.tolist())
    size = (int(inputs.shape[2]), int(inputs.shape[3]))
    relevance: dict[str, Tensor] = {}
    if lab.given is None:
        pixels, relevance = lab.explain(inputs, case.target, layers)
    else:
        pixels = lab.given(rows.tolist())
    cues = {"pixels": pixel_cue_maps(pixels, pixels if others is None else others.pixels)}
    for direction in case.directions:
        cues[direction.layer] = layer_cue_maps(relevance[direction.layer], direction, size)
    return Samples(inputs, pixels, cues)


def _effects_in_design(
    lab: Laboratory, target: int, design: Samples, others: Samples, outsiders: Tensor, region: Region
) -> list[Tensor]:
    """Effects of a cut and of a paste on the class's logit, one a picture, in the pictures that chose the region."""
    masks = region.masks(design.cues)
    pairs = [tuple(fill_colour(design.inputs, m) for m in (masks, control_masks(masks, design.pixels)))]
    if len(outsiders) > 1:
        rows = np.resize(np.arange(len(design.inputs)), len(outsiders))
        rivals = others.inputs[np.resize(np.arange(len(others.inputs)), len(outsiders))]
        donors = (design.inputs[rows], rivals)
        pairs.append(tuple(put(lab, region, given, outsiders, masks[rows]) for given in donors))
    return [lab.ask(treated)[:, target] - lab.ask(control)[:, target] for treated, control in pairs]


def count_wanted(effects: Sequence[Tensor], least: float, most: int) -> int:
    """How many pictures show ``least`` in all of these tests, of each of which some effects are known; see ``POWER``.

    At most ``AT_MOST`` times ``most``.
    """
    spread = max(float(one.std(correction=1)) for one in effects)
    return min(pictures_for_power(spread, least), AT_MOST * most)


def pictures_for_power(spread: float, least: float) -> int:
    """Pictures with which a paired test at level ``LEVEL`` finds a mean of ``least`` with the chance ``POWER``.

    ``spread``: standard deviation of the differences.  Normal approximation (Cohen 1988, 2.4).
    """
    if not least > 0:
        return MOST_PICTURES
    z = NormalDist().inv_cdf(1 - LEVEL / 2) + NormalDist().inv_cdf(POWER)
    return min(MOST_PICTURES, math.ceil((z * spread / least) ** 2))


def put(lab: Laboratory, region: Region, donors: Tensor, receivers: Tensor, masks: Tensor) -> Tensor:
    """The region of the donors, or what of it is to be put, on the receivers, all (m, C, H, W)."""
    if region.part == "detail":
        return paste_detail(donors, receivers, masks, lab.low, lab.high)
    return paste(donors, receivers, masks)


def _choose_region(
    lab: Laboratory,
    target: int,
    design: Samples,
    others: Samples,
    outsiders: Tensor,
    part: str,
    least: float,
    rng: np.random.Generator,
) -> Region:
    """The smallest region that brings three quarters of the greatest gain; a fixed one where it does nearly as well.

    Gain of a region: what its paste brings to pictures of other classes beyond its control, plus what members lose when
    it is exchanged for the same place of ordinary members.  Each alone misleads: half a cue is often enough to paste,
    and only the whole of it is enough to cut.  Where the region so chosen takes little of what members can lose (beyond
    what ordinary members lose by the same exchange), a part of a cue does as well as all of it when pasted, and the sum
    misleads too: then both count as shares of their greatest, and greater regions are tried.  Without pictures of other
    classes the paste goes on the rest of the group's own class.  Frames count where one gains ``least`` more than any
    other region, and not where relevance was made elsewhere, which is to be tested by what it shows.
    """
    shown = _list_shown(design, part)
    regions = shown + ([] if lab.given is not None else _list_frames(design, part))
    if not len(outsiders):
        outsiders = others.inputs
    pairs = min(24, len(outsiders))
    donors = design.take(np.resize(np.arange(len(design.inputs)), pairs))
    rivals = others.take(rng.integers(0, len(others.inputs), pairs))
    receivers = outsiders[:pairs]
    neighbours = rivals.inputs.roll(1, 0)
    before, usual = (lab.ask(inputs)[:, target] for inputs in (donors.inputs, rivals.inputs))
    found = []
    for region in regions:
        masks = region.masks(donors.cues)
        control = region.masks(rivals.cues)  # of a fixed region, the same place
        given = (donors.inputs, rivals.inputs, rivals.inputs, neighbours)
        taken = (receivers, receivers, donors.inputs, rivals.inputs)
        where = (masks, control, masks, control)
        changed = [put(lab, region, *one) for one in zip(given, taken, where, strict=True)]
        own, same, exchanged, damaged = (part[:, target].double() for part in lab.ask(torch.cat(changed)).split(pairs))
        lost, damage = float((before - exchanged).mean()), float((usual - damaged).mean())
        found.append((float((own - same).mean()), lost, lost - damage))
    gains, small = np.array(found).T, np.array([region.area <= _USUAL for region in regions])
    is_frame = np.arange(len(regions)) >= len(shown)
    best = [np.max(gains[0] + gains[1], where=small & kind, initial=-np.inf) for kind in (is_frame, ~is_frame)]
    if best[0] < best[1] + least:
        regions, gains, small = shown, gains[:, ~is_frame], small[~is_frame]
    pasted, lost, own_loss = gains
    chosen = _smallest(regions, np.where(small, pasted + lost, -np.inf))
    if own_loss[chosen] >= _MOST_OF * own_loss.max():
        return regions[chosen]
    shares = sum((gains / max(gains.max(), 1e-9)).clip(-1) for gains in (pasted, own_loss))
    return regions[_smallest(regions, np.asarray(shares))]


def _list_shown(design: Samples, part: str) -> list[Region]:
    """The regions in which relevance sets the group apart."""
    regions = []
    for area in AREAS:
        for source, cue in design.cues.items():
            regions.append(Region("fixed", source, area, mask_strongest(cue.mean(0, keepdim=True), area)[0], part))
            if source != "pixels":  # each picture's own strongest relevance: a digit's strokes, and no cue
                regions.append(Region("moving", source, area, part=part))
    return regions


def _list_frames(design: Samples, part: str) -> list[Region]:
    """Frames: borders are what many data sets have in common, and relevance need not show all of one."""
    height, width = design.pixels.shape[1:]
    regions = []
    for thickness in sorted({max(1, round(share * min(height, width))) for share in FRAMES}):
        mask = frame_mask(height, width, thickness, 0).to(design.pixels.device)
        regions.append(Region("fixed", "border", round(float(mask.float().mean()), 4), mask, part))
    return regions


def _smallest(regions: Sequence[Region], gains: np.ndarray) -> int:
    """The smallest region with three quarters of the greatest gain; a fixed one where it does nearly as well."""
    enough = 0.75 * gains.max()
    area = min((region.area for region, gain in zip(regions, gains, strict=True) if gain >= enough), default=AREAS[-1])
    ranked = sorted((i for i, region in enumerate(regions) if region.area == area), key=lambda i: -gains[i])
    fixed = next(i for i in ranked if regions[i].kind == "fixed")
    return fixed if gains[fixed] >= 0.9 * gains[ranked[0]] else ranked[0]


def measure_changes(before: Tensor, after: Tensor, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Changes (m, 2) of logit and probability between two outputs (m, classes), and the decisions after (m,)."""
    logit = after[:, target] - before[:, target]
    probability = after.softmax(1)[:, target] - before.softmax(1)[:, target]
    return torch.stack([logit, probability], 1).cpu().numpy(), after.argmax(1).cpu().numpy()


def _test_masks(
    lab: Laboratory,
    target: int,
    inputs: Tensor,
    tests: Mapping[str, Callable[[Tensor], Tensor]],
    masks: tuple[Tensor, Tensor],
    seed: int,
) -> Iterable[Evidence]:
    """Each change of the masked pixels, treated (first masks) against control (second)."""
    before = lab.ask(inputs)
    was = before.argmax(1).cpu().numpy() == target
    for name, change in tests.items():
        (treated, after), (control, after_control) = (
            measure_changes(before, lab.ask(change(m)), target) for m in masks
        )
        flips = was & (after != target), was & (after_control != target)
        yield compare(name, treated, control, flips, seed)


def _test_cuts(lab: Laboratory, target: int, scene: Scene, seed: int) -> Iterable[Evidence]:
    group = scene.group
    masks = scene.region.masks(group.cues)
    rivals = scene.others.inputs[torch.as_tensor(scene.swapped)]
    tests = {
        "cut:noise": lambda m: fill_noise(group.inputs, m, lab.low, lab.high, seed),
        "cut:colour": lambda m: fill_colour(group.inputs, m),
        "cut:blur": lambda m: fill_blur(group.inputs, m),
        "cut:inpaint": lambda m: fill_harmonic(group.inputs, m),
        "cut:exchange": lambda m: put(lab, scene.region, rivals, group.inputs, m),
    }
    return _test_masks(lab, target, group.inputs, tests, (masks, control_masks(masks, group.pixels)), seed)


def _test_borders(lab: Laboratory, target: int, group: Samples, region: Region, seed: int) -> Iterable[Evidence]:
    height, width = group.inputs.shape[2:]
    thickness = max(1, round(min(height, width) * (1 - (1 - min(region.area, 0.5)) ** 0.5) / 2))
    frames = tuple(
        frame_mask(height, width, inner, outer).to(group.inputs.device).expand(len(group.inputs), -1, -1)
        for inner, outer in ((thickness, 0), (2 * thickness, thickness))
    )
    generator = torch.Generator().manual_seed(seed)
    each = torch.rand((len(group.inputs), len(lab.low), 1, 1), generator=generator).to(group.inputs)
    span = (lab.high - lab.low)[:, None, None]

    def constant(colour: Tensor, masks: Tensor) -> Tensor:
        return torch.where(
            masks[:, None], (lab.low[:, None, None] + colour * span).expand_as(group.inputs), group.inputs
        )

    tests = {
        "borders:noise": lambda m: fill_noise(group.inputs, m, lab.low, lab.high, seed),
        "borders:grey": lambda m: constant(torch.full_like(each, 0.5), m),
        "borders:random colour": lambda m: constant(each, m),
    }
    return _test_masks(lab, target, group.inputs, tests, (frames[0], frames[1]), seed)


def _test_pastes(lab: Laboratory, target: int, scene: Scene, seed: int) -> Iterable[Evidence]:
    group, others, region, receivers, rivals = scene.group, scene.others, scene.region, scene.outsiders, scene.rivals
    before = lab.ask(receivers)
    donors = np.resize(np.arange(len(group.inputs)), len(receivers))
    masks = region.masks(group.cues)[donors]
    treated, after = measure_changes(before, lab.ask(put(lab, region, group.inputs[donors], receivers, masks)), target)
    strongest = mask_core(smooth_maps(others.pixels, max(others.pixels.shape[1:]) / 40), region.area)
    was = before.argmax(1).cpu().numpy() == target
    ordinary = others.inputs[rivals]
    controls = {"paste:same place": (ordinary, masks), ORDINARY: (ordinary, strongest[rivals])}
    if region.kind == "moving":
        controls["paste:same rule"] = (ordinary, region.masks(others.cues)[rivals])
    controls["paste:other classes"] = (receivers.roll(1, 0), masks)
    for name, (source, chosen) in controls.items():
        how = replace(region, part="all") if name == ORDINARY else region
        control, after_control = measure_changes(before, lab.ask(put(lab, how, source, receivers, chosen)), target)
        flips = ~was & (after == target), ~was & (after_control == target)
        yield compare(name, treated, control, flips, seed)
