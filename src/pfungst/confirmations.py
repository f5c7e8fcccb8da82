"""A finding's experiments repeated with other draws, more pictures or another model, beside the first verdict.

What comes out is kept as ``confirmed_SEED.json`` beside the finding's pictures (``findings/FINDING/``, or ``own/NAME/``
of a person's own), with the counter-evidence that was asked for; of another model, or another number of pictures, in a
file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from pfungst.alterations import restore_alteration
from pfungst.cards import show_verdict
from pfungst.counterevidence import (
    fit_directions,
    place_elsewhere,
    second_laboratory,
    try_preset,
)
from pfungst.errors import RunError, SettingError
from pfungst.evidence import DECIDE, Verdict, correct, describe_verdict
from pfungst.interventions import Case, set_scene, try_scene
from pfungst.maps import Subject, make_laboratory
from pfungst.models import LoadedModel
from pfungst.own_findings import make_candidate
from pfungst.own_groups import FOLDER, read_own
from pfungst.probes import examine_alteration
from pfungst.regions import Laboratory
from pfungst.store import Run
from pfungst.strategies import Candidate, rank_candidates
from pfungst.verdicts import as_tested, make_case, make_standard

_CLEAR = 0.5  # depth of the valley from which a picture's side of it is clear
_TOLERANCE = 0.01  # of a score, relative: devices differ by less, other pictures by more


@dataclass(frozen=True)
class Confirmation(Verdict):
    """The verdict of a repetition, and how it was come by.

    finding, seed, samples  what was repeated, and with which draws
    first         the first verdict, as ``findings.json`` has it
    model         name, digest, and whether it is the run's own (``same``)
    same_pictures whether the members score as in the run; None with another model, which cannot tell
    presets       by preset: is the region found again, and its verdict (``counterevidence.try_preset``)
    models        by model: what it says to the same changed pictures
    elsewhere     by folder: how often the cue is there (``counterevidence.place_elsewhere``)
    """

    finding: str
    seed: int
    samples: int
    first: dict[str, Any]
    model: dict[str, Any]
    same_pictures: bool | None
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    elsewhere: dict[str, dict[str, Any]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """What a person reads beside the table of evidence."""
        return tell(self.record())

    def _repr_html_(self) -> str:
        return show_verdict(self.record(), DECIDE, f"{self.finding} tested again, seed {self.seed}:", self.lines())

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        more = {one.name: getattr(self, one.name) for one in fields(self)[len(fields(Verdict)) :]}
        return {"version": 1, **more, **describe_verdict(self)}


def confirm(
    run: Run,
    subject: Subject,
    finding: Mapping[str, Any],
    *,
    seed: int | None = None,
    samples: int | None = None,
    presets: Sequence[str] = (),
    models: Sequence[LoadedModel] = (),
    folders: Sequence[str | Path] = (),
) -> Confirmation:
    """Repeat the interventions of a finding (see ``judgements.find_any``), and write down what comes out.

    seed      of the draws; by default one more than the run's, so that split, partners and noise are others
    samples   pictures of each role; the run's own number by default
    presets, models, folders  the same finding under these presets, by these models, in these folders of pictures

    Raises RunError where the run's groups are no longer those of the finding.
    """
    settings = subject.settings
    chosen = settings.seed + 1 if seed is None else seed
    most = settings.samples if samples is None else samples
    if chosen < 0 or most < 8:
        raise SettingError(f"seed {chosen}, samples {most}", "give a --seed of 0 or more and --samples of 8 or more")
    candidate = find_candidate(run, subject, finding)
    lab, standard = make_laboratory(subject), make_standard(settings)
    same = subject.model.digest == run.describe()["model"]["digest"]
    case = make_case(run, subject if same else replace(subject, layers=()), candidate)
    if not same and candidate.alteration is None:
        case = replace(case, directions=fit_directions(lab, case, subject.layers, 2 * most, chosen))
    suspicion = finding["suspicion"]
    asked = [(model, second_laboratory(subject, lab, model)) for model in models]
    seen: dict[str, dict[str, Any]] = {}
    how: dict[str, Any] = {"most": most, "min_share": settings.min_share, "seed": chosen}
    if candidate.alteration is None:
        scene = set_scene(lab, case, part=finding["where"].get("part", "all"), **how)
        raw = try_scene(lab, case.target, scene, chosen)
        others = [try_scene(second, case.target, scene, chosen) for _, second in asked]
        for preset in presets:
            seen[preset] = try_preset(subject, lab, case, scene, preset, suspicion, standard, chosen)
    else:
        if presets:
            raise SettingError(
                f"{finding['id']} is of a property of whole pictures, in which presets have no part",
                "leave --also-preset out",
            )
        alteration = restore_alteration(candidate.alteration)
        raw, *others = (
            examine_alteration(one, subject.preprocess, case, alteration, **how)[0]
            for one in (lab, *(second for _, second in asked))
        )
    verdict = correct([raw], [suspicion], standard)[0]
    confirmation = Confirmation(
        **{one.name: getattr(verdict, one.name) for one in fields(Verdict)},
        finding=finding["id"],
        seed=chosen,
        samples=most,
        first={key: finding[key] for key in ("verdict", "p", "reason", "distance", "where", "evidence")},
        model={"name": subject.model.name, "digest": subject.model.digest, "same": same},
        same_pictures=_same_pictures(run, lab, case) if same else None,
        presets=seen,
        models={
            model.name: {"digest": model.digest, **describe_verdict(correct([found], [suspicion], standard)[0])}
            for (model, _), found in zip(asked, others, strict=True)
        },
        elsewhere={str(folder): place_elsewhere(run, subject, candidate, folder, settings.seed) for folder in folders},
    )
    return _keep(run, confirmation, folder_of(finding))


def folder_of(finding: Mapping[str, Any]) -> str:
    """Where a finding's pictures and repetitions are, within the run folder."""
    return f"{FOLDER if finding.get('own') else 'findings'}/{finding['id']}"


def find_candidate(run: Run, subject: Subject, finding: Mapping[str, Any]) -> Candidate:
    """The group that became this finding.  Raises RunError where it is no longer in the run folder."""
    if finding.get("own"):
        candidate = make_candidate(run, subject, read_own(run, finding["id"]))
        return as_tested(candidate, {"alteration": finding.get("alteration")})
    candidates, _ = rank_candidates(run, subject)
    rank = finding["rank"]
    if rank <= len(candidates):
        candidate = candidates[rank - 1]
        if [subject.data.ids[row] for row in candidate.members] == finding["samples"]:
            return as_tested(candidate, run.read_json(f"findings/{finding['id']}/verdict.json"))
    raise RunError(f"{run.path} no longer holds the group of {finding['id']}", "give --out another folder to an audit")


def tell(record: Mapping[str, Any]) -> list[str]:
    """A confirmation's record in sentences."""
    first = record["first"]
    lines = [f"first: {first['verdict']} ({first['reason']})", f"again: {record['verdict']} ({record['reason']})"]
    if not record["model"]["same"]:
        lines.append(f"Another model than the run's was asked: {record['model']['name']}.")
    if record["same_pictures"] is False:
        lines.append("The pictures are not those of the run: members score otherwise than they did.")
    for name, found in record["presets"].items():
        again = f"Jaccard index of the regions {found['jaccard']:.2f} ({found['chance']:.2f} by chance)"
        lines.append(f"preset {name}: {again}, {found['verdict']} ({found['reason']})")
    for name, found in record["models"].items():
        lines.append(f"model {name}: {found['verdict']} ({found['reason']})")
    # The same for every folder: told once, unless one is of another time when the run's pictures counted otherwise.
    own = dict.fromkeys(_tell_share(found["own"]) for found in record["elsewhere"].values())
    lines += [f"the run's own pictures: {share}" for share in own]
    for name, found in record["elsewhere"].items():
        lines.append(f"{name}: {_tell_share(found)}")
        if found["depth"] < _CLEAR:
            lines.append(f"  (the group is little apart in {found['view']}, so that these shares are rough)")
        if found["unreadable"]:
            lines.append(f"  ({found['unreadable']} pictures could not be read)")
    return lines


def read_confirmations(run: Run, folder: str) -> list[dict[str, Any]]:
    """The records of all repetitions of a finding, whose ``folder_of`` this is, by seed."""
    names = [f"{folder}/{path.name}" for path in (run.path / folder).glob("confirmed_*.json")]
    return sorted((run.read_json(name) for name in names), key=lambda record: record["seed"])


def _tell_share(found: Mapping[str, Any]) -> str:
    """With what was counted: where there are labels, all of the class, not only those recognised, as in a verdict."""
    low, high = found["interval"]
    of = "taken for the class" if found["accuracy"] is None else "labelled as the class, recognised or not"
    text = f"the cue is in {found['count']} of {found['n']} pictures {of} ({low:.0%} to {high:.0%})"
    if found["accuracy"] is None:
        return text
    told = [
        f"{share['share']:.0%} {name} it" for name, share in found["accuracy"].items() if share["share"] is not None
    ]
    return f"{text}; recognised rightly: {', '.join(told)}" if told else text


def _same_pictures(run: Run, lab: Laboratory, case: Case) -> bool:
    """Whether members score as they did in the run."""
    rows = case.members[:48]
    now = lab.ask(lab.load(rows.tolist()))[:, case.target].cpu().numpy()
    return bool(np.allclose(now, run.read_array("explained", rows), rtol=_TOLERANCE, atol=_TOLERANCE))


def _keep(run: Run, confirmation: Confirmation, folder: str) -> Confirmation:
    """Write it down; counter-evidence of the same repetition that was asked for before stays beside it."""
    model = "" if confirmation.model["same"] else f"_{confirmation.model['digest'][:8]}"
    count = "" if confirmation.samples == run.describe()["settings"]["samples"] else f"_{confirmation.samples}"
    name = f"{folder}/confirmed_{confirmation.seed}{model}{count}.json"
    before = run.read_json(name) or {}
    if all(before.get(key) == confirmation.record()[key] for key in ("samples", "model", "same_pictures", "evidence")):
        confirmation = replace(
            confirmation,
            presets={**before["presets"], **confirmation.presets},
            models={**before["models"], **confirmation.models},
            elsewhere={**before["elsewhere"], **confirmation.elsewhere},
        )
    run.write_json(name, confirmation.record())
    return confirmation
