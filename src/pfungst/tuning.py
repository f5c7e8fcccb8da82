"""Rules searched for a model, layer group by layer group: ``tune`` -> ``Tuning``, and a preset file.

What a preset is worth on some pictures is the geometric mean of up to three terms, with weights w:

    score = Π F ^ (w / Σ w),    F = SRG,  (mass - a) / (1 - a),  (1 - cos) / 2

SRG   symmetric relevance gain (``quality/pixel_flipping.py``): a random map gets 0
mass  share of positive relevance on the object, a: the object's share of the picture, means over pictures with a mask
cos   cosine between the maps of the explained class and its strongest rival: 1 for a map that does not say which class

each a mean over pictures, from 0 to 1.  A product, not a sum: noise tells classes apart too (cos = 0), so that a sum
lets maps win whose SRG is that of a random map (ε on SqueezeNet: 0.01, epsilon-plus: 0.23); and a product ranks
the same in any units, where the ranges of the terms differ.

The search is a coordinate descent over the groups of ``lrp/layer_groups.py`` from the best named preset, on half of the
pictures, with SRG in 10 steps instead of 28.  Its scores, the best of many, are too good: what counts is the other
half, looked at once, with the whole SRG, for the chosen preset and the named ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pfungst.errors import RelevanceError, RunError, SettingError
from pfungst.evaluations import TARGETS
from pfungst.examples import open_pictures
from pfungst.journals import Journal
from pfungst.lrp import LRP, PRESETS, Preset, preset, write_preset
from pfungst.lrp.layer_groups import INPUT, Alike, Choice, FlatUntil, Group, assemble, find_groups, neighbour
from pfungst.lrp.layer_groups import read_choices as choices_of
from pfungst.lrp.preset_files import read_notes
from pfungst.lrp.rules import AlphaBeta, Epsilon, Flat, Gamma, Rule, ZBox, ZPlus
from pfungst.models import LoadedModel
from pfungst.store import Run
from pfungst.trials import HELD, LEAST, SEARCH, Bench, Progress, compare, find_terms, key_of, plain, weigh

NAMED = ("epsilon-plus", "epsilon-gamma-box", "epsilon", "epsilon-alpha2-beta1", "auto")
ATTENTION = ("cp-lrp", "attnlrp-gamma")  # besides, where ``auto`` takes the model for a transformer
RULES: tuple[Rule, ...] = (
    Gamma(0.1), Gamma(0.25), Gamma(1.0), ZPlus(), Epsilon(1e-6), Epsilon(0.01), Epsilon(0.25), AlphaBeta(2, 1)
)  # fmt: skip
FEW = 50  # pictures
WEIGHTS = {"srg": 1.0, "localisation": 1.0, "class": 1.0}


@dataclass(frozen=True)
class Trial:
    """A preset that was tried: rules by group, and what it got on the search half; ``refused`` says why it could not.

    ``figures``: means of srg, alike (the cosine) and, where there are masks, mass and share (a).
    """

    name: str
    rules: dict[str, str]
    figures: dict[str, float]
    score: float
    refused: str = ""


@dataclass(frozen=True)
class Held:
    """A preset on the held-back half.  ``gains``: of the search's preset over it, (mean, low, high), 95 % intervals
    of the paired difference (bootstrap over pictures), by figure, and ``score``; empty for the search's own."""

    name: str
    figures: dict[str, float]
    score: float
    gains: dict[str, tuple[float, float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Tuning:
    """What a search found and what the held-back half says of it.

    preset   the one to use: the found one if it is ``proven``, else the best named one
    found    the best of the search
    proven   on the held-back half it beats every named preset: all 95 % intervals of the score's gain lie above 0
    groups   names of the nodes, by group; ``rules``: what the found preset gives each
    improved  the found preset is none of the named ones
    tried    everything tried on the search half, in order; ``held``: the found preset first, then the named ones
    weights  of the terms of the score
    about    model, pictures, halves (ids), seed
    """

    preset: Preset
    found: Preset
    proven: bool
    improved: bool
    groups: dict[str, tuple[str, ...]]
    rules: dict[str, str]
    tried: tuple[Trial, ...]
    held: tuple[Held, ...]
    weights: dict[str, float]
    about: dict[str, Any]
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The outcome in words."""
        count = len(self.about["held"])
        if not self.improved:
            return [
                "The search found nothing better than the named presets: "
                f"{self.preset.name}, the best of them on {count} held-back pictures, is written."
            ]
        beside = max(self.held[1:], key=lambda one: one.score)
        if "score" not in beside.gains:
            return [f"The tuned preset cannot be used on the held-back pictures: {beside.name} is written."]
        mean, low, high = beside.gains["score"]
        told = f"on {count} held-back pictures its score less that of {beside.name} is {mean:+.3f} "
        told += f"({low:+.3f} to {high:+.3f})"
        if self.proven:
            return [f"The tuned preset beats every named one: {told}, the best of them."]
        return [
            f"The tuned preset does not beat every named one for certain: {told}.",
            f"The named preset {self.preset.name} is written. (The search half promised more, because it chose.)",
            "More pictures (--limit) make the intervals narrower; the tuned preset is kept beside, as found.json.",
        ]

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "version": 1, "outcome": self.lines(), "written": self.preset.name, "proven": self.proven,
            "improved": self.improved, "weights": self.weights,
            "groups": {name: list(nodes) for name, nodes in self.groups.items()}, "rules": self.rules,
            "held": [plain(vars(one)) for one in self.held],
            "tried": [plain(vars(one)) for one in self.tried],
            "about": self.about, "notes": list(self.notes),
        }  # fmt: skip


def tune(
    model: str | Path | nn.Module | LoadedModel,
    images: Any,
    *,
    out: str | Path | None = None,
    masks: str | Path | None = None,
    objects: Sequence[str] | None = None,
    objective: Mapping[str, float] | None = None,
    groups: int = 3,
    rules: Sequence[Rule] = RULES,
    budget: int = 80,
    limit: int = 100,
    target: str = "predicted",
    seed: int = 0,
    batch_size: int = 16,
    chunk: int | None = None,
    workers: int = 0,
    device: str = "cpu",
    bounds: tuple[Any, Any] | None = None,
    progress: Progress | None = None,
    **model_options: Any,
) -> Tuning:
    """Search rules for a model on pictures; 50 to 200 are enough.

    images     as of ``evaluate``: a folder, a manifest, tensors x, (x, labels) or (x, labels, masks), or a loader
    out        the preset file to write, NAME.json; what is finished lies in NAME.tuning beside it, where the same call
               goes on after a kill, with all that was tried (tuning.json) and the search's own preset (found.json)
    objective  weights of srg, localisation (left out without masks) and class; by default 1 each
    groups     parts of the convolutions (of the dense layers, where there are more of them)
    rules      tried for each group; at the input also flat, z^B, and flat until some of the first layers
    budget     at most so many presets are tried, named ones included
    target     whose score is explained: ``predicted`` or ``label``

    Raises SettingError, DataError, ModelError or RunError.
    """
    if target not in TARGETS:
        raise SettingError(f"target is {target!r}", f"it is one of {', '.join(TARGETS)}")
    if budget < 1 or limit < LEAST:
        raise SettingError(f"budget {budget}, limit {limit}", f"give at least 1, and at least {LEAST} pictures")
    weights = _weights(objective)
    path = None if out is None else Path(out)
    if path is not None and path.suffix.lower() != ".json":
        raise SettingError(f"--out {out} is no .json file", "give a file NAME.json")
    lasting = isinstance(images, str | Path | Tensor | tuple)  # the length of a loader is its owner's business
    loaded, examples = open_pictures(
        model, images, masks=masks, objects=objects, limit=limit if lasting else None, workers=workers, device=device,
        seed=seed, bounds=bounds, **model_options,
    )  # fmt: skip
    tell = progress or (lambda stage, done, total: None)
    bench = Bench(loaded, examples, target, seed, batch_size, chunk, torch.device(device), tell)
    bench.look()
    if not (weights["srg"] or weights["class"] or np.isfinite(bench.shares).any()):
        raise SettingError("the objective weighs localisation alone, and no object is known", "give masks")
    identity = bench.identify()
    if path is not None:
        bench.journal = _open_journal(path, identity)
    tuning = _Search(bench, weights, groups, tuple(rules), budget, _name(path)).do()
    if path is not None:
        held = {one.name: {"score": one.score, **one.figures} for one in tuning.held}
        told = {
            "identity": identity,
            "outcome": tuning.lines(),
            "weights": weights,
            "held back": plain(held),
        }
        write_preset(tuning.preset, path, {"tuned": told})
        Run(_work_folder(path)).write_json("tuning.json", tuning.record())
        write_preset(tuning.found, _work_folder(path) / "found.json", {"tuned": told})
    return tuning


def parse_objective(text: str) -> dict[str, float]:
    """Weights from ``"srg=1,localisation=0.5"``; what is not named has weight 0."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise SettingError(f"objective {text!r}", f"give weights such as srg=1, of {', '.join(WEIGHTS)}") from None
    return _weights(found)


def _weights(objective: Mapping[str, float] | None) -> dict[str, float]:
    weights = dict(WEIGHTS) if objective is None else {name: float(objective.get(name, 0)) for name in WEIGHTS}
    unknown = [name for name in objective or {} if name not in WEIGHTS]
    if unknown or not all(np.isfinite(w) and w >= 0 for w in weights.values()) or not any(weights.values()):
        raise SettingError(f"objective {dict(objective or {})}", f"give weights >= 0 of {', '.join(WEIGHTS)}")
    return weights


def _name(out: Path | None) -> str:
    name = "tuned" if out is None else "".join(char for char in out.stem if char.isprintable())
    return f"tuned-{name}" if name in PRESETS else name


def _work_folder(out: Path) -> Path:
    return out.with_name(f"{out.stem}.tuning")


def _open_journal(out: Path, identity: Mapping[str, Any]) -> Journal:
    """What is finished of this search.  Raises where a file or folder is in the way that is not of one."""
    if out.exists():
        try:
            known = read_notes(out)["tuned"]["identity"]
        except (SettingError, LookupError, TypeError):
            known = None
        if known != json.loads(json.dumps(identity)):
            raise RunError(
                f"{out} exists and is of another search (model, pictures, masks, seed ...)", "give --out another file"
            )
    folder = _work_folder(out)
    if folder.exists() and any(folder.iterdir()) and not (folder / "state.json").exists():
        raise RunError(f"{folder} is in the way: it is not empty and no search", "give --out another file")
    return Journal(folder, json.loads(json.dumps(identity)))


@dataclass
class _Search:
    """Named presets first, then the descent, then the other half."""

    bench: Bench
    weights: dict[str, float]
    parts: int
    rules: tuple[Rule, ...]
    budget: int
    name: str
    tried: dict[str, tuple[Preset, dict[str, Choice]]] = field(default_factory=dict)  # by key, in order

    def do(self) -> Tuning:
        named, notes = self.find_named()
        for one in named:
            self.tried[key_of(one)] = (one, {})
        self.score(named)
        usable = [one for one in named if self.terms(one, SEARCH)]
        if not usable:
            raise RelevanceError(
                f"no named preset can be used: {self.bench.figures(named[0], SEARCH)}", "see `pfungst explain`"
            )
        start = max(usable, key=lambda one: round(self.score_of(one, SEARCH), 6))  # of equal ones the first
        groups = find_groups(self.trace(start), self.parts)
        for one in named:
            self.tried[key_of(one)] = (one, choices_of(one, groups))
        found, choices = self.descend(start, groups)
        improved = all(key_of(found) != key_of(one) for one in named)
        held = self.hold(found, usable, improved)
        best = max(usable, key=lambda one: round(self.score_of(one, HELD), 6))
        gains = [one.gains.get("score", (0.0, -1.0, 0.0)) for one in held[1:]]
        proven = improved and all(low > 0 for _, low, _ in gains)
        rows = {half: [self.bench.ids[row] for row in self.bench.rows(half)] for half in (SEARCH, HELD)}
        about = {
            "model": self.bench.loaded.name, "digest": self.bench.loaded.digest,
            "pictures": self.bench.examples.digest, "seed": self.bench.seed, "target": self.bench.target,
            "start": start.name, **rows,
        }  # fmt: skip
        if len(self.bench.ids) < FEW:
            notes.append(f"{len(self.bench.ids)} pictures are few: intervals are wide, give 100 or 200")
        skipped = [f"not read: {name}: {why}" for name, why in self.bench.examples.skipped.items()]
        return Tuning(
            found if proven else best, found, proven, improved, {group.name: group.nodes for group in groups},
            {name: choice.label for name, choice in choices.items()}, self.list_trials(), held,
            {name: self.weights[name] for name in self.terms(found, SEARCH)}, about,
            (*notes, *self.bench.examples.notes, *skipped),
        )  # fmt: skip

    def find_named(self) -> tuple[list[Preset], list[str]]:
        """The named presets, each once, and what ``auto`` is."""
        auto = LRP(self.bench.loaded.module, "auto", bounds=self.bench.ends())
        auto.trace(self.bench.first)
        names = (*NAMED, *(ATTENTION if auto.preset.name == "cp-lrp-gamma" else ()))
        found = {key_of(one): one for one in (auto.preset if name == "auto" else preset(name) for name in names)}
        return list(found.values()), [f"auto is {auto.preset.name} for this model"]

    def trace(self, one: Preset) -> tuple[Any, ...]:
        return LRP(self.bench.loaded.module, one, bounds=self.bench.ends()).trace(self.bench.first).steps

    def descend(self, start: Preset, groups: tuple[Group, ...]) -> tuple[Preset, dict[str, Choice]]:
        """From the output to the input, again and again: the best choice of each group, all others as they are."""
        found, state = start, choices_of(start, groups)
        best, changed = self.score_of(start, SEARCH), True
        while changed:
            changed = False
            for group in reversed(groups):
                others = [one for one in self.options(group, groups) if one != state[group.name]]
                fresh: dict[str, tuple[Preset, dict[str, Choice]]] = {}
                for choice in others:
                    choices = {**state, group.name: choice}
                    one = assemble(start, groups, choices, self.name)
                    if key_of(one) not in self.tried and len(self.tried) + len(fresh) < self.budget:
                        fresh[key_of(one)] = (one, choices)
                self.tried.update(fresh)
                self.score([one for one, _ in fresh.values()])
                for one, choices in fresh.values():
                    score = self.score_of(one, SEARCH)
                    if score > best + 1e-6:
                        best, found, state, changed = score, one, choices, True
        total = self.budget * len(self.bench.outputs)
        self.bench.progress("searching", total, total)
        return found, state

    def options(self, group: Group, groups: tuple[Group, ...]) -> list[Choice]:
        if not group.name.startswith(INPUT):
            return list(self.rules)
        beside = neighbour(group, groups)
        if beside is None:
            return [*self.rules, Flat(), ZBox()]
        modules = {name for name, _ in self.bench.loaded.module.named_modules()}
        ends = {max(1, len(beside.nodes) * part // 3) for part in (1, 2, 3)}
        layers = [beside.nodes[end - 1] for end in sorted(ends) if beside.nodes[end - 1] in modules]
        return [Alike(beside.name), Flat(), ZBox(), *(FlatUntil(layer) for layer in layers)]

    def score(self, presets: Sequence[Preset]) -> None:
        count = len(self.bench.outputs)
        before = (len(self.tried) - len(presets)) * count
        total = max(self.budget, len(self.tried)) * count
        self.bench.score(presets, SEARCH, lambda done: self.bench.progress("searching", before + done, total))

    def terms(self, one: Preset, half: str) -> dict[str, float]:
        figures = self.bench.figures(one, half)
        return {} if isinstance(figures, str) else {k: float(np.nanmean(v)) for k, v in find_terms(figures).items()}

    def score_of(self, one: Preset, half: str) -> float:
        terms = self.terms(one, half)
        return float(weigh(terms, self.weights)) if terms else -np.inf

    def means(self, one: Preset, half: str) -> dict[str, float]:
        figures = self.bench.figures(one, half)
        if isinstance(figures, str):
            return {}
        return {name: float(np.nanmean(v)) for name, v in figures.items() if np.isfinite(v).any()}

    def list_trials(self) -> tuple[Trial, ...]:
        trials = []
        for one, choices in self.tried.values():
            figures = self.bench.figures(one, SEARCH)
            refused = figures if isinstance(figures, str) else ""
            rules = {name: choice.label for name, choice in choices.items()}
            trials.append(Trial(one.name, rules, self.means(one, SEARCH), self.score_of(one, SEARCH), refused))
        return tuple(trials)

    def hold(self, found: Preset, named: list[Preset], improved: bool) -> tuple[Held, ...]:
        """All of them on the held-back half, by the whole measure."""
        presets = [found, *named] if improved else sorted(named, key=lambda one: one is not found)
        total = len(presets) * len(self.bench.outputs)
        self.bench.score(presets, HELD, lambda done: self.bench.progress("checking", done, total))
        own = self.bench.figures(found, HELD)
        held = []
        for one in presets:
            theirs = self.bench.figures(one, HELD)
            both = improved and one is not found and not isinstance(own, str) and not isinstance(theirs, str)
            gains = {}
            if both:
                assert not isinstance(own, str)
                assert not isinstance(theirs, str)
                gains = compare(own, theirs, self.weights, self.bench.seed)
            held.append(Held(one.name, self.means(one, HELD), self.score_of(one, HELD), gains))
        return tuple(held)
