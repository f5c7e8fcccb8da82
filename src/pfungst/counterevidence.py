"""One finding seen again: under other rules of relevance, by another model, in another folder of pictures.

Each answers one objection to a verdict.  "The region is an artefact of the rules": it is looked for again under a
second preset.  "Only this model does that": a second model is asked about the same cut and pasted pictures.  "Only
these pictures are like that": pictures of the class from elsewhere are placed along the finding's own discriminant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from pfungst.assignments import thin
from pfungst.domains.image import load_batch, read_images
from pfungst.domains.labels import shorten
from pfungst.domains.preprocessing import Preprocess
from pfungst.errors import DataError, ModelError, SettingError
from pfungst.evidence import Standard, correct, describe_verdict
from pfungst.findings import fit_discriminant
from pfungst.interventions import Case, Scene, set_scene, try_scene
from pfungst.lrp import LRP
from pfungst.maps import Subject, explain_batch, input_bounds
from pfungst.models import LoadedModel
from pfungst.regions import Direction, Laboratory, find_direction
from pfungst.store import READ, Run
from pfungst.strategies import Candidate
from pfungst.vectors import pool_channels, unit_rows

_AT_ONCE = 4096  # samples whose maps are read at once


# ---- another preset --------------------------------------------------------------------------------------------------


def fit_directions(lab: Laboratory, case: Case, layers: tuple[str, ...], most: int, seed: int) -> tuple[Direction, ...]:
    """What tells the group from the rest in the layers' channels, from relevance of ``most`` pictures of each."""
    rng = np.random.default_rng([seed, 4])
    drawn = [rng.permutation(rows)[:most] for rows in (case.members, case.others)]
    _, relevance = lab.explain(lab.load(np.concatenate(drawn).tolist()), case.target, layers)
    inside = np.arange(sum(map(len, drawn))) < len(drawn[0])
    sums = {layer: pool_channels(values)[0].cpu().numpy() for layer, values in relevance.items()}
    return tuple(find_direction(layer, sums[layer], inside) for layer in layers)


def try_preset(
    subject: Subject,
    lab: Laboratory,
    case: Case,
    scene: Scene,
    preset: str,
    suspicion: float,
    standard: Standard,
    seed: int,
) -> dict[str, Any]:
    """The region looked for under another preset, on the same pictures, and its verdict.

    ``jaccard``: of the two regions, mean over the members that both looked at; ``chance``: what two masks of these
    areas would share if they lay anywhere.
    """
    bounds = input_bounds(subject.preprocess, subject.settings.device)
    second = replace(lab, lrp=LRP(subject.model.module, preset, bounds=bounds), given=None)
    again = replace(case, directions=fit_directions(second, case, subject.layers, 2 * scene.first, seed))
    most, part = scene.first, scene.region.part
    found = set_scene(second, again, most=most, min_share=standard.min_share, part=part, seed=seed)
    masks = [one.region.masks(one.members.cues) for one in (scene, found)]
    both, either = (masks[0] & masks[1]).flatten(1).sum(1), (masks[0] | masks[1]).flatten(1).sum(1)
    shares = [float(mask.float().mean()) for mask in masks]
    meeting = shares[0] * shares[1]
    verdict = correct([try_scene(second, case.target, found, seed)], [suspicion], standard)[0]
    return {
        "preset": second.lrp.preset.describe(),
        "jaccard": float((both / either.clamp(min=1)).mean()),
        "chance": meeting / max(sum(shares) - meeting, 1e-12),
        **describe_verdict(verdict),
    }


# ---- another model ---------------------------------------------------------------------------------------------------


def second_laboratory(subject: Subject, lab: Laboratory, model: LoadedModel) -> Laboratory:
    """The laboratory in which another model is asked, and nothing else is changed.

    The pictures are the first model's inputs, resized and normalised as the second wants them; its outputs are put in
    the first model's order of classes by name.  Raises ModelError where they cannot be.
    """
    if model.preprocess is None:
        raise ModelError(f"{model.name} does not say how pictures are prepared", "give it a `preprocess`")
    translate = _translation(subject.preprocess, model.preprocess)
    order: list[int] | None = None
    if model.classes is not None and tuple(model.classes) != subject.classes:
        missing = [name for name in subject.classes if name not in model.classes]
        if missing:
            raise ModelError(
                f"{model.name} does not know the classes {shorten(missing)}", "compare models of the same classes"
            )
        order = [model.classes.index(name) for name in subject.classes]
        order += [i for i, name in enumerate(model.classes) if name not in subject.classes]

    def ask(inputs: Tensor) -> Tensor:
        outputs: Tensor = model.module(translate(inputs))
        if order is not None:
            return outputs[:, order]
        if outputs.shape[1] != len(subject.classes):
            raise ModelError(
                f"{model.name} has {outputs.shape[1]} outputs for {len(subject.classes)} classes, and names none",
                "give it a `classes` attribute with the names in the order of its outputs",
            )
        return outputs

    return replace(lab, lrp=LRP(ask, subject.lrp.preset))


def _translation(first: Preprocess, second: Preprocess) -> Callable[[Tensor], Tensor]:
    """From inputs of one model to inputs of another that show the same picture, all of it."""
    if first.describe() == second.describe():
        return lambda inputs: inputs

    def translate(inputs: Tensor) -> Tensor:
        pixels = first.to_pixels(inputs)
        if second.custom is not None:
            values = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
            return torch.stack([second(Image.fromarray(picture)) for picture in values]).to(inputs)
        pixels = functional.interpolate(pixels, second.size, mode="bilinear", align_corners=False, antialias=True)
        return second.from_pixels(pixels.clamp(0, 1))

    return translate


# ---- other pictures --------------------------------------------------------------------------------------------------


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); (0, 1) of nothing."""
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low, high = float(middle - half), float(middle + half)
    return low if successes else 0.0, high if successes < n else 1.0  # exactly so, but for rounding


def place_elsewhere(run: Run, subject: Subject, candidate: Candidate, folder: str | Path, seed: int) -> dict[str, Any]:
    """How often the cue is in another folder's pictures of the class, and how well they are recognised with it.

    A picture has the cue if its score along the finding's discriminant, in its clearest view, lies beyond the valley
    that sets the group apart.  Pictures of the class are those labelled so, or, where nothing is labelled, those that
    the model takes for it.  ``own``: the same count in the run's own pictures, their scores held out.
    """
    if subject.given is not None and candidate.alteration is None:
        raise SettingError(
            "the run's relevance was made elsewhere, so there is none of other pictures", "leave --where out"
        )
    prepare = _view_of(run, candidate)
    members, others = thin(candidate.members), thin(candidate.others)
    rows, inside = np.concatenate([members, others]), np.arange(len(members) + len(others)) < len(members)
    discriminant, held_out = fit_discriminant(prepare(run.read_view(_array_of(candidate), rows)), inside, seed)
    own_rows, labelled = _own_rows(run, subject, candidate)
    scores = np.empty(len(own_rows))
    known = dict(zip(rows.tolist(), held_out.tolist(), strict=True))
    new = ~np.isin(own_rows, rows)
    scores[~new] = [known[row] for row in own_rows[~new].tolist()]
    for places in np.array_split(np.flatnonzero(new), 1 + int(new.sum()) // _AT_ONCE):
        if len(places):
            scores[places] = discriminant.score(prepare(run.read_view(_array_of(candidate), own_rows[places])))
    right = run.read_array("prediction", own_rows) == candidate.class_index
    own = _count(scores > discriminant.valley, right if labelled else None)
    vectors, right, unread, labelled = _look(subject, candidate, folder)
    scores = discriminant.score(prepare(vectors)) if len(vectors) else np.empty(0)
    return {
        "view": candidate.views[0],
        "depth": discriminant.depth,
        "unreadable": unread,
        **_count(scores > discriminant.valley, right if labelled else None),
        "own": own,
    }


def _array_of(candidate: Candidate) -> str:
    """The run's array in which the group is seen."""
    return "properties" if candidate.by_property else candidate.views[0]


def _view_of(run: Run, candidate: Candidate) -> Callable[[np.ndarray], np.ndarray]:
    """How rows of that array become vectors: relevance by its length, properties by their spread in the class."""
    if not candidate.by_property:
        return lambda rows: unit_rows(rows.astype(np.float64))
    spread = run.read_view("properties", np.concatenate([thin(candidate.members), thin(candidate.others)])).std(0)
    return lambda rows: rows[:, : len(spread)] / np.where(spread > 0, spread, 1.0)  # an older run has fewer


def _own_rows(run: Run, subject: Subject, candidate: Candidate) -> tuple[np.ndarray, bool]:
    """The run's own pictures of the class, and whether labels say so."""
    labels = subject.data.labels
    of_class = (labels == candidate.class_index) & (run.read_array("status") == READ)
    explained = run.read_array("target") == candidate.class_index
    if (labels >= 0).any():
        return np.flatnonzero(of_class & explained), True
    return np.sort(np.concatenate([candidate.members, candidate.others])), False


def _look(subject: Subject, candidate: Candidate, folder: str | Path) -> tuple[np.ndarray, np.ndarray, int, bool]:
    """Rows of the group's array for a folder's pictures of the class, which of them are recognised, how many not read.

    The last says whether the folder has labels.
    """
    index = candidate.class_index
    data = read_images(folder, subject.classes)
    labelled = bool((data.labels >= 0).any())
    there = replace(subject, data=data, mode="label" if labelled else "predicted", given=None)
    chosen = np.flatnonzero(data.labels == index) if labelled else np.arange(len(data))
    if not len(chosen):
        raise DataError(f"{folder} has no pictures of {subject.classes[index]!r}", "give a folder that has some")
    vectors: list[np.ndarray] = []
    right: list[np.ndarray] = []
    unread = 0
    for start in range(0, len(chosen), subject.settings.batch_size):
        batch = chosen[start : start + subject.settings.batch_size].tolist()
        inputs, ok, bad = load_batch(data, batch, subject.preprocess, subject.settings.workers)
        unread += len(bad)
        if not ok:
            continue
        if not labelled:
            with torch.no_grad():
                taken = subject.lrp.model(inputs.to(subject.settings.device)).argmax(1).cpu() == index
            inputs, ok = inputs[taken], np.asarray(ok)[taken.numpy()].tolist()
            if not ok:
                continue
        found = explain_batch(there, inputs, np.asarray(ok))
        vectors.append(found[_array_of(candidate)].flatten(1).double().cpu().numpy())
        right.append((found["prediction"] == index).cpu().numpy())
    if not vectors:
        return np.empty((0, 0)), np.empty(0, dtype=bool), unread, labelled
    return np.concatenate(vectors), np.concatenate(right), unread, labelled


def _count(with_cue: np.ndarray, right: np.ndarray | None) -> dict[str, Any]:
    """Share with the cue, and accuracy with and without it where labels are known."""
    counted: dict[str, Any] = {**_share(with_cue), "accuracy": None}
    if right is not None:
        counted["accuracy"] = {"with": _share(right[with_cue]), "without": _share(right[~with_cue])}
    return counted


def _share(true: np.ndarray) -> dict[str, Any]:
    count, n = int(true.sum()), len(true)
    return {"count": count, "n": n, "share": count / n if n else None, "interval": list(wilson(count, n))}
