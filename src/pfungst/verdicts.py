"""Candidate groups -> findings with verdicts, in ``findings.json`` and one folder each, pictures included."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfungst import heatmaps
from pfungst.alterations import Alteration, restore_alteration
from pfungst.assignments import thin
from pfungst.cuts import fill_colour
from pfungst.evidence import (
    CLEARLY_APART,
    Evidence,
    Standard,
    Verdict,
    correct,
    describe_put,
    describe_verdict,
    fall_short,
    keeps_score,
    suffices,
)  # fmt: skip
from pfungst.heatmaps import encode_png
from pfungst.interventions import Case, Samples, examine, observe, put
from pfungst.maps import Progress, Subject, make_laboratory
from pfungst.neighbours import find_duplicates
from pfungst.portraits import describe_portrait, draw_portrait, explain_place, read_columns
from pfungst.probes import examine_alteration, seek_alteration
from pfungst.regions import Laboratory, Region, control_masks, find_direction
from pfungst.settings import Settings
from pfungst.store import READ, Run
from pfungst.strategies import Candidate, rank_candidates
from pfungst.vectors import unit_rows

_MOST_OF_IT = 0.3  # share of the picture from which a region may as well be the whole of it
_LEAST_DIFFERENT = 6  # pictures of a role below which near-duplicates are better than none


def make_standard(settings: Settings) -> Standard:
    """What the settings ask of the evidence."""
    return Standard(settings.min_share, settings.min_own, settings.separate, settings.alpha)


def make_case(run: Run, subject: Subject, candidate: Candidate) -> Case:
    """What the laboratory needs to know of a candidate."""
    members = thin(candidate.members)
    rows = np.sort(np.concatenate([members, thin(candidate.others)]))
    inside = np.isin(rows, members)
    directions = tuple(find_direction(layer, run.read_view(f"what:{layer}", rows), inside) for layer in subject.layers)
    index = candidate.class_index
    labels, prediction = subject.data.labels, run.read_array("prediction")
    foreign = np.flatnonzero((labels != index) & (prediction != index) & (run.read_array("status") == READ))
    roles = (_different(run, part) for part in (candidate.members, candidate.others, foreign))
    return Case(index, directions, candidate.shown_in, *roles)


def _different(run: Run, rows: np.ndarray) -> np.ndarray:
    """The rows without near-duplicates, as far as enough are left: a test takes its pictures for independent ones.

    Of many rows (``assignments.LARGE``) as many drawn by lot, which is more than any test takes.
    """
    rows = thin(rows)
    if len(rows) < _LEAST_DIFFERENT:
        return rows
    copies = [group[1:] for group in find_duplicates(unit_rows(run.read_view("where", rows)))]
    kept = np.delete(rows, np.concatenate(copies)) if copies else rows
    return kept if len(kept) >= _LEAST_DIFFERENT else rows


def prove_findings(run: Run, subject: Subject, progress: Progress) -> None:
    """Examine every candidate, one file each as soon as it is done; then Holm's correction and ``findings.json``."""
    candidates, untested = rank_candidates(run, subject)
    lab = make_laboratory(subject)
    settings = subject.settings
    verdicts, entries = [], []
    for rank, candidate in enumerate(candidates, 1):
        progress("interventions", rank - 1, len(candidates))
        name = f"f{rank:03d}"
        kept = run.read_json(f"findings/{name}/verdict.json")
        if kept is None:
            case = make_case(run, subject, candidate)
            verdict, alteration, before, tried = try_candidate(run, subject, lab, case, candidate)
            tested = _by(candidate, alteration)
            pictures = draw_finding(run, subject, lab, case, verdict, f"findings/{name}", tested)
            told = describe_verdict(verdict)  # but for what depends on the other findings
            kept = {"verdict": {key: told[key] for key in ("distance", "region", "evidence")}, **pictures}
            kept |= {"alteration": alteration, "before": before, "tries": tried}
            run.write_table(f"findings/{name}/interventions.parquet", _columns(verdict.evidence))
            run.write_json(f"findings/{name}/verdict.json", kept)
        verdicts.append(read_verdict(kept["verdict"]))
        entries.append((name, as_tested(candidate, kept), kept))
    progress("interventions", len(candidates), len(candidates))
    suspicions = [candidate.suspicion for candidate in candidates]
    tries = [kept.get("tries", 1) for _, _, kept in entries]
    final = correct(verdicts, suspicions, make_standard(settings), tries)
    columns = read_columns(run, subject)
    findings = [
        _finding(run, subject, name, rank, candidate, kept, verdict, draw_portrait(run, subject, candidate, columns))
        for rank, ((name, candidate, kept), verdict) in enumerate(zip(entries, final, strict=True), 1)
    ]
    run.write_json("findings.json", {"version": 1, "untested": untested, "findings": findings})


def as_tested(candidate: Candidate, kept: dict[str, Any]) -> Candidate:
    """The candidate as it was tested in the end (``kept``: its ``verdict.json``): by a region, or by a property."""
    return _by(candidate, kept.get("alteration", candidate.alteration))


def _by(candidate: Candidate, alteration: dict[str, Any] | None) -> Candidate:
    view = f"property:{alteration['property']}" if alteration else ""
    views = candidate.views if not view or view in candidate.views else (*candidate.views, view)
    return replace(candidate, alteration=alteration, views=views)


def try_candidate(
    run: Run, subject: Subject, lab: Laboratory, case: Case, candidate: Candidate
) -> tuple[Verdict, dict[str, Any] | None, str | None, int]:
    """The experiments that fit the candidate: on a region, or on a property of whole pictures.

    First on what the group was found by.  A group found by its relevance that no region explains, or only one that is
    most of the picture, is tried by a property, if it is clearly apart: the relevance of tinted pictures is alike too;
    by its own, if it was found by one as well, and by what sets it apart.
    A group found by a property that does not explain it is tried by a region: a border is a property, too; and, if it
    is clearly apart, by what else sets it apart, and by the fine detail of a region.  What works both ways ends the
    search, else the first that is confirmed is kept; where none is, a property that suffices goes before a region that
    is refuted, or suffices, too.
    Returns the verdict, the alteration it is about (None: a region), what was said of a cause tried before it, if any,
    and how many were tried.
    """
    settings, standard, suspicion = subject.settings, make_standard(subject.settings), candidate.suspicion
    own = None if candidate.alteration is None else restore_alteration(candidate.alteration)
    by_property = own is not None and candidate.views[0].startswith("property:")
    how: dict[str, Any] = {"most": settings.samples, "min_share": settings.min_share, "seed": settings.seed}

    def alter(alteration: Alteration) -> tuple[Verdict, dict[str, Any]]:
        verdict, tested = examine_alteration(lab, subject.preprocess, case, alteration, **how)
        return verdict, asdict(tested)

    def region(part: str) -> Verdict:
        return examine(lab, case, part=part, **how)

    def causes() -> Iterator[tuple[Verdict, dict[str, Any] | None]]:
        if own is not None and by_property:
            yield alter(own)
        yield region("all"), None
        if own is not None and not by_property:
            yield alter(own)
        for cause in _seek(run, subject, lab, case, candidate):
            yield alter(cause)
        if suspicion >= CLEARLY_APART and len(case.outsiders):
            yield region("detail"), None

    def told(verdict: Verdict, tries: int = 1) -> Verdict:
        return correct([verdict], [suspicion], standard, [tries])[0]

    def settles(verdict: Verdict, tries: int) -> bool:
        if told(verdict, tries).verdict != "confirmed" or keeps_score(verdict, standard):
            return False
        return verdict.region.kind == "whole" or verdict.region.area < _MOST_OF_IT or by_property

    tried: list[tuple[Verdict, dict[str, Any] | None]] = []
    for one in causes():
        tried.append(one)
        if settles(one[0], len(tried)):
            chosen = one
            break
    else:
        chosen = _choose_cause(tried, [told(verdict, len(tried)) for verdict, _ in tried], standard)
    if chosen is tried[0]:
        return *chosen, None, len(tried)
    first = told(tried[0][0])
    what = "a property of the whole picture" if first.region.kind == "whole" else "a region"
    return *chosen, f"{what} ({first.reason})", len(tried)


def _choose_cause(
    tried: list[tuple[Verdict, dict[str, Any] | None]], told: list[Verdict], standard: Standard
) -> tuple[Verdict, dict[str, Any] | None]:
    """Of causes none of which works both ways (``told``: as they are judged): see ``try_candidate``."""
    for one, judged in zip(tried, told, strict=True):
        if judged.verdict == "confirmed":
            return one
    first = tried[0][0]
    if first.region.kind != "whole" and (told[0].verdict == "refuted" or fall_short(first, standard) is not None):
        return next((one for one in tried[1:] if suffices(one[0], standard)), tried[0])
    return tried[0]


def _seek(run: Run, subject: Subject, lab: Laboratory, case: Case, candidate: Candidate) -> Iterator[Alteration]:
    """What else of whole pictures a group that is clearly apart may be recognised by, if the model answers to it.

    The tail that it shares need not be that: tinted pictures are more colourful, too.  Clearly apart, for pictures with
    much sky are a little apart, and models do use the blue of a sky.
    """
    if candidate.suspicion >= CLEARLY_APART and len(case.outsiders):
        roles = (candidate.members, candidate.others, case.outsiders)
        properties = run.read_array("properties").astype(np.float64)
        own = "" if candidate.alteration is None else candidate.alteration["property"]
        found = seek_alteration(subject, lab, candidate.class_index, roles, properties, own)
        if found is not None:
            yield found[0]


def _columns(evidence: tuple[Evidence, ...]) -> dict[str, list[Any]]:
    records = [asdict(one) for one in evidence]
    columns = {key: [record[key] for record in records] for key in records[0] if key != "interval"}
    for i, end in enumerate(("interval_low", "interval_high")):
        columns[end] = [one.interval[i] for one in evidence]
    return columns


def read_verdict(record: dict[str, Any]) -> Verdict:
    """A verdict before its correction, from its record."""
    evidence = tuple(Evidence(**{**one, "interval": tuple(one["interval"])}) for one in record["evidence"])
    return Verdict("open", 1.0, record["distance"], Region(**record["region"]), evidence, "")


# ---- what a person reads ---------------------------------------------------------------------------------------------


def _finding(
    run: Run,
    subject: Subject,
    name: str,
    rank: int,
    candidate: Candidate,
    kept: dict[str, Any],
    verdict: Verdict,
    portrait: dict[str, Any],
) -> dict[str, Any]:
    """One entry of ``findings.json``."""
    size, share = len(candidate.members), len(candidate.members) / (len(candidate.members) + len(candidate.others))
    label = subject.classes[candidate.class_index]
    place = kept["place"]
    alone = keeps_score(verdict, make_standard(subject.settings))
    summary = _summary(verdict, label, size, size + len(candidate.others), place, alone)
    if kept.get("before") is not None:
        summary += f" Another cause was tried before: {kept['before']}."
    return {
        "id": name,
        "rank": rank,
        "class": label,
        "class_index": candidate.class_index,
        "size": size,
        "prevalence": round(share, 4),
        "suspicion": candidate.suspicion,
        "views": list(candidate.views),
        "where": {"kind": verdict.region.kind, "place": place, "box": kept["box"], "area": verdict.region.area,
                  "source": verdict.region.source, "part": verdict.region.part, "mask": f"findings/{name}/mask.png"},
        "summary": " ".join([summary, *describe_portrait(portrait, size)]),
        "verdict": verdict.verdict,
        "p": verdict.p,
        "reason": verdict.reason,
        "distance": verdict.distance,
        "evidence": describe_verdict(verdict)["evidence"],
        "exemplars": kept["exemplars"],
        "why": f"findings/{name}/why.png",
        **portrait,
        "samples": [subject.data.ids[row] for row in candidate.members],
    }  # fmt: skip


def _summary(verdict: Verdict, label: str, size: int, total: int, place: str, alone: bool) -> str:
    """In a sentence.  ``alone``: the members keep their score without it."""
    tests = {one.test: one for one in verdict.evidence}
    group = f"{size} of the {total} pictures recognised as {label!r}"
    if verdict.verdict == "confirmed" and alone:
        put, how = describe_put(verdict)
        return (
            f"{group} share {place}, which the model takes for {label!r} by itself: {how} pictures of other classes, "
            f"it turns {put.flips:.0%} of them into {label!r} ({put.control_flips:.0%} with the control); the members "
            "have other evidence, too, and keep their score without it."
        )
    if verdict.verdict == "confirmed" and "apply" in tests:
        applied = tests["apply"]
        return (
            f"{group} are recognised by {place}: undone, the score of {label!r} falls by {-tests['undo'].treated:.1f}; "
            f"applied to pictures of other classes, it turns {applied.flips:.0%} of them into {label!r} "
            f"({applied.control_flips:.0%} with as great a change the other way)."
        )
    if verdict.verdict == "confirmed":
        pasted = tests["paste:same place"]
        return (
            f"{group} are recognised by {place}: cut out, the score of {label!r} falls by "
            f"{-tests['cut:colour'].treated:.1f}; pasted on pictures of other classes, it turns "
            f"{pasted.flips:.0%} of them into {label!r} ({pasted.control_flips:.0%} with the control)."
        )
    if verdict.verdict == "refuted":
        return f"{group} are alike in their relevance; that it is by {place} is refuted: {verdict.reason}."
    return f"{group} are alike in their relevance; whether by {place} is open: {verdict.reason}."


def describe_place(mask: np.ndarray, kind: str) -> str:
    """Where a mask (H, W) lies, in words."""
    if kind == "moving":
        return f"a detail that moves from picture to picture ({mask.mean():.0%} of the picture)"
    if not mask.any():
        return "no region (nothing sets the members' relevance apart)"
    height, width = mask.shape
    area = f"({mask.mean():.0%} of the picture)"
    rim = max(1, round(0.08 * min(height, width)))
    sides = {"top": mask[:rim], "bottom": mask[-rim:], "left": mask[:, :rim], "right": mask[:, -rim:]}
    inner = mask[height // 4 : height - height // 4, width // 4 : width - width // 4].mean()
    covered = [name for name, side in sides.items() if side.mean() > 0.5]
    if covered and inner < 0.2:
        return f"the border {area}" if len(covered) >= 3 else f"the {' and '.join(covered)} border {area}"
    rows, columns = np.nonzero(mask)
    y, x = rows.mean() / height, columns.mean() / width
    vertical = "top" if y < 0.38 else "bottom" if y > 0.62 else ""
    horizontal = "left" if x < 0.38 else "right" if x > 0.62 else ""
    name = " ".join(filter(None, (vertical, horizontal)))
    return f"a region at the {name or 'centre'} {area}"


# ---- pictures ------------------------------------------------------------------------------------------------------


def _pixels(subject: Subject, inputs: Tensor) -> np.ndarray:
    """(m, H, W, 3) in 0..1 for display."""
    return subject.preprocess.to_pixels(inputs.cpu()).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def draw_finding(
    run: Run, subject: Subject, lab: Laboratory, case: Case, verdict: Verdict, folder: str, candidate: Candidate
) -> dict[str, Any]:
    """Write the finding's pictures into a folder of the run; return what the finding says of them."""
    why = heatmaps.color(explain_place(run, candidate))
    run.write_bytes(f"{folder}/why.png", encode_png(heatmaps.enlarge(why, size=224)))
    members, others = typical_samples(run, subject, case)
    group, rest = observe(lab, case, members, others)
    region = verdict.region
    masks = region.masks(group.cues)  # all the same for a fixed region, so their mean is the region itself
    run.write_bytes(f"{folder}/mask.png", encode_png((masks.float().mean(0).cpu().numpy() * 255).astype(np.uint8)))
    pixels = group.pixels.cpu().numpy()
    run.write_bytes(f"{folder}/mean.png", encode_png(heatmaps.enlarge(heatmaps.color(pixels.mean(0)), size=224)))
    pictures = _pixels(subject, group.inputs)
    exemplars = []
    for i, row in enumerate(members[: subject.settings.exemplars]):
        files = {"input": f"{folder}/exemplar_{i:02d}_input.png", "overlay": f"{folder}/exemplar_{i:02d}_overlay.png"}
        run.write_bytes(files["input"], encode_png(heatmaps.enlarge((pictures[i] * 255).astype(np.uint8), size=224)))
        run.write_bytes(
            files["overlay"], encode_png(heatmaps.enlarge(heatmaps.overlay(pictures[i], pixels[i]), size=224))
        )
        exemplars.append({"sample": subject.data.ids[row], **files})
    if candidate.alteration is not None:
        alteration = restore_alteration(candidate.alteration)
        _draw_experiment(run, subject, lab, case, folder, _altered(subject, case, group, rest, alteration))
        return {"exemplars": exemplars, "place": alteration.describe(), "box": None}
    _draw_experiment(run, subject, lab, case, folder, _cut_and_pasted(subject, lab, case, group, rest, region))
    first = masks[0].cpu().numpy()
    rows, columns = np.nonzero(first)
    box = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1] if len(rows) else []
    place = ("the fine detail of " if region.part == "detail" else "") + describe_place(first, region.kind)
    return {"exemplars": exemplars, "place": place, "box": box if region.kind == "fixed" else None}


def typical_samples(run: Run, subject: Subject, case: Case, count: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """The members most unlike the rest of their class, and as many random ones of the rest; the most unlike first."""
    members, others = thin(case.members), thin(case.others)
    inside, outside = (unit_rows(run.read_view(case.view, rows)) for rows in (members, others))
    direction = inside.mean(0) - outside.mean(0)
    order = np.argsort(-inside @ direction, kind="stable")
    drawn = np.random.default_rng([subject.settings.seed, 1]).permutation(len(others))[:count]
    drawn = drawn[np.argsort(outside[drawn] @ direction, kind="stable")]
    return members[order[:count]], others[drawn]


def _cut_and_pasted(
    subject: Subject, lab: Laboratory, case: Case, group: Samples, rest: Samples, region: Region
) -> dict[str, Tensor]:
    """A member with the region cut and with the control cut; a foreign picture with both pastes."""
    first = group.take([0])
    masks = region.masks(first.cues)
    steps = {
        "member": first.inputs,
        "cut": fill_colour(first.inputs, masks),
        "cut_control": fill_colour(first.inputs, control_masks(masks, first.pixels)),
    }
    foreign = _foreign(subject, case)
    if foreign is None:
        return steps
    pasted = {
        "paste": put(lab, region, first.inputs, foreign, masks),
        "paste_control": put(lab, region, rest.inputs[:1], foreign, masks),
    }
    return {**steps, "foreign": foreign, **pasted}


def _altered(subject: Subject, case: Case, group: Samples, rest: Samples, alteration: Alteration) -> dict[str, Tensor]:
    """A member with the property undone, and changed the other way; a foreign picture with it applied, and likewise."""
    to, back = subject.preprocess.to_pixels, subject.preprocess.from_pixels
    members, ordinary = to(group.inputs[:2]), to(rest.inputs[:2])
    steps = {
        "member": group.inputs[:1],
        "cut": back(alteration.undo(members, ordinary)[:1]),
        "cut_control": back(alteration.undo_control(members, ordinary)[:1]),
    }
    foreign = _foreign(subject, case)
    if foreign is None:
        return steps
    pixels = to(foreign)
    both = {"paste": alteration.apply(pixels), "paste_control": alteration.apply_opposite(pixels)}
    return {**steps, "foreign": foreign, **{key: back(value) for key, value in both.items()}}


def _foreign(subject: Subject, case: Case) -> Tensor | None:
    """A picture of another class, always the same."""
    if not len(case.outsiders):
        return None
    rng = np.random.default_rng([subject.settings.seed, 2])
    return subject.load([int(rng.permutation(case.outsiders)[0])])


def _draw_experiment(
    run: Run, subject: Subject, lab: Laboratory, case: Case, folder: str, steps: dict[str, Tensor]
) -> None:
    """The pictures of one experiment, before and after, with what the model says to each."""
    asked = torch.cat(list(steps.values()))
    scores = lab.ask(asked)
    notes = {}
    for key, picture, score in zip(steps, _pixels(subject, asked), scores, strict=True):
        run.write_bytes(f"{folder}/{key}.png", encode_png(heatmaps.enlarge((picture * 255).astype(np.uint8), size=224)))
        notes[key] = {"score": float(score[case.target]), "decision": subject.classes[int(score.argmax())]}
    run.write_json(f"{folder}/experiment.json", notes)
