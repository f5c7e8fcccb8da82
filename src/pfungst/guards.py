"""A confirmed finding -> a pytest file that fails as long as a model uses the cue: for the project the model is from.

The file stands alone (torch, numpy, Pillow, pytest), with a folder of pictures beside it: receivers of other classes,
and for each of them the cue and a control as pictures with alpha.  Its margins are the audit's own least effect that
counts, so that a model passes when the cue no longer matters to it.
"""

from __future__ import annotations

import os
import textwrap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfungst.alterations import restore_alteration
from pfungst.confirmations import find_candidate
from pfungst.errors import DataError, PfungstWarning, RunError, SettingError
from pfungst.evidence import least_effect
from pfungst.heatmaps import encode_png
from pfungst.interventions import Case, put, set_scene
from pfungst.maps import Subject, make_laboratory
from pfungst.regions import Laboratory
from pfungst.store import Run, writing
from pfungst.strategies import Candidate
from pfungst.verdicts import make_case

DECISIONS_MARGIN = 0.1
_CONTROLS = {
    "fixed": "the same place of other pictures of the class",
    "moving": "what the same rule of relevance finds in other pictures of the class",
    "whole": "as great a change the other way",
}


@dataclass(frozen=True)
class Guard:
    """What was written, and what it says of the run's own model: more decisions and logit than with the control.

    fails   whether the model fails it, as it should while it uses the cue
    """

    path: Path
    folder: Path
    pictures: int
    decisions: float
    logit: float
    logit_margin: float

    @property
    def fails(self) -> bool:
        return self.decisions > DECISIONS_MARGIN or self.logit > self.logit_margin


def write_guard(
    run: Run, subject: Subject, finding: Mapping[str, Any], out: str | Path, *, count: int = 16, seed: int | None = None
) -> Guard:
    """Write the test file ``out`` and the folder of its pictures beside it, ``count`` of each role at the most.

    ``seed``: of the choice of pictures; the run's own by default.  A PfungstWarning where the finding is not confirmed.

    Raises RunError where either is there already, or the model is not the run's; DataError where there are no pictures
    of other classes; SettingError where ``out`` is no .py file or the model's input is no picture of 1 or 3 channels.
    """
    out = Path(out)
    folder = out.with_name(f"{out.stem}_pictures")
    _check(run, subject, out, folder)
    if "evidence" not in finding:
        raise RunError(f"{finding['id']} has not been tested yet", f"run pfungst confirm RUN {finding['id']} first")
    if finding["verdict"] != "confirmed":
        warnings.warn(_doubt(finding), PfungstWarning, stacklevel=2)
    candidate = find_candidate(run, subject, finding)
    lab, case = make_laboratory(subject), make_case(run, subject, candidate)
    if not len(case.outsiders):
        raise DataError("the run has no pictures of other classes to put the cue on", "audit pictures of more classes")
    drawn = subject.settings.seed if seed is None else seed
    part = finding["where"].get("part", "all")
    receivers, cues, controls, kind = _pictures(subject, lab, case, candidate, min(count, 99), part, drawn)
    decisions, logit = _measure(subject, lab, case.target, receivers, cues, controls)
    least = least_effect(subject.settings.min_share, float(finding["distance"]))
    guard = Guard(out, folder, len(receivers), decisions, logit, least)
    text = _render(subject, finding, guard, kind)
    with writing(out.parent):
        folder.mkdir(parents=True)
        for role, pictures in (("receiver", receivers), ("cue", cues), ("control", controls)):
            for i, picture in enumerate(pictures):
                (folder / f"{role}_{i:02d}.png").write_bytes(encode_png(picture))
        out.write_text(text, encoding="utf-8")
    return guard


def _doubt(finding: Mapping[str, Any]) -> str:
    """What is to be said of a guard of a finding that is not confirmed."""
    name = finding["id"]
    told = f"the experiments {'refuted' if finding['verdict'] == 'refuted' else 'left open'} that the model uses {name}"
    return (
        f"{told} ({finding['reason']}). The guard only puts the cue on other pictures, beside one control, so that a "
        f"model may fail it that does not depend on the cue. Write guards of confirmed findings, or test {name} again "
        f"first: pfungst confirm RUN {name}"
    )


def _check(run: Run, subject: Subject, out: Path, folder: Path) -> None:
    if out.suffix != ".py" or not out.stem.isidentifier():
        raise SettingError(f"{out} is no name of a test file", "give --out test_cue.py, or the like")
    for path in (out, folder):
        if path.exists():
            raise RunError(f"{path} is there already", "remove it, or give --out another name")
    if subject.model.digest != run.describe()["model"]["digest"]:
        raise RunError("the guard is to be made with the run's own model", "leave --model out; edit the guard later")
    if len(subject.preprocess.mean) not in (1, 3):
        raise SettingError(
            f"the model's input has {len(subject.preprocess.mean)} channels", "guards are for 1 or 3 channels"
        )


def _pictures(
    subject: Subject, lab: Laboratory, case: Case, candidate: Candidate, count: int, part: str, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Receivers (n, H, W, 3), cues and controls (n, H, W, 4), uint8; and the kind of region."""
    to_pixels = subject.preprocess.to_pixels
    if candidate.alteration is not None:
        rows = np.random.default_rng([seed, 5]).permutation(case.outsiders)[:count]
        pixels = to_pixels(lab.load(rows.tolist()))
        alteration = restore_alteration(candidate.alteration)
        everywhere = torch.ones_like(pixels[:, 0], dtype=torch.bool)
        changed = [_cut_out(one, everywhere) for one in (alteration.apply(pixels), alteration.apply_opposite(pixels))]
        return _bytes(pixels), changed[0], changed[1], "whole"
    settings = subject.settings
    scene = set_scene(lab, case, most=settings.samples, min_share=settings.min_share, part=part, seed=seed)
    receivers = scene.outsiders[:count]
    donors = np.resize(np.arange(len(scene.group.inputs)), len(receivers))
    rivals = scene.rivals[: len(receivers)]
    masks = scene.region.masks(scene.group.cues)[donors]
    moving = scene.region.kind == "moving"
    control = scene.region.masks(scene.others.cues)[rivals] if moving else masks
    members, others = scene.group.inputs[donors], scene.others.inputs[rivals]
    cues, controls = (
        _cut_out(to_pixels(put(lab, scene.region, source, receivers, where)), where)
        for source, where in ((members, masks), (others, control))
    )
    return _bytes(to_pixels(receivers)), cues, controls, scene.region.kind


def _bytes(pixels: Tensor) -> np.ndarray:
    """Pixels (n, C, H, W) in 0..1 as (n, H, W, C) uint8."""
    values: np.ndarray = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return values


def _cut_out(pixels: Tensor, masks: Tensor) -> np.ndarray:
    """Only what is under the masks, the rest transparent (and black: no more of a picture goes out than is needed)."""
    opaque = masks[:, None].to(pixels.dtype)
    return _bytes(torch.cat([pixels * opaque, opaque], 1))


def _measure(
    subject: Subject, lab: Laboratory, target: int, receivers: np.ndarray, cues: np.ndarray, controls: np.ndarray
) -> tuple[float, float]:
    """What the guard's tests measure, of the run's own model."""
    before, cue, control = (
        lab.ask(subject.preprocess.from_pixels(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255).to(
            subject.settings.device
        ))
        for pixels in (
            receivers,
            *(np.where(donors[..., 3:] > 0, donors[..., :3], receivers) for donors in (cues, controls)),
        )
    )  # fmt: skip
    already = before.argmax(1) == target
    turned = [((after.argmax(1) == target) & ~already).double().mean() for after in (cue, control)]
    return float(turned[0] - turned[1]), float((cue - control)[:, target].mean())


def _render(subject: Subject, finding: Mapping[str, Any], guard: Guard, kind: str) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pfungst"), undefined=jinja2.StrictUndefined, trim_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["pyrepr"] = repr
    preprocess = subject.preprocess
    zero, one = (preprocess.from_pixels(torch.full((3, 1, 1), float(v))).flatten() for v in (0, 1))
    spec, weights, options = _call(subject, guard.path.resolve().parent)
    return environment.get_template("guard.py.jinja").render(
        class_name=_plain(finding["class"]), class_index=finding["class_index"],
        summary=textwrap.fill(_plain(finding["summary"]), 100),
        finding=finding["id"], model=_plain(subject.model.name), control=_CONTROLS[kind],
        folder=guard.folder.name, spec=spec, weights=weights, options=options, channels=len(preprocess.mean),
        height=preprocess.size[0], width=preprocess.size[1], bgr=preprocess.channels == "BGR",
        gain=[float(v) for v in one - zero], offset=[float(v) for v in zero],
        decisions_margin=DECISIONS_MARGIN, logit_margin=float(f"{guard.logit_margin:.4g}"),
        decisions_now=f"{guard.decisions:+.2f}", logit_now=f"{guard.logit:+.3g}",
    )  # fmt: skip


def _plain(text: str) -> str:
    """Text that can stand in a comment or a docstring, whatever a class or folder is called."""
    return "".join(c if c.isprintable() and c not in '\\"' else "'" if c == '"' else " " for c in text)


def _call(subject: Subject, here: Path) -> tuple[str, str, str]:
    """How the run's model is loaded, as code: spec ("" for a module passed), weights, further arguments.

    Files are named from the guard's own folder, so that both can be checked out elsewhere.
    """

    def beside(path: str) -> str:
        return f"str(HERE / {os.path.relpath(Path(path).expanduser().resolve(), here)!r})"

    settings, name = subject.settings, subject.model.name
    place, colon, function = name.rpartition(":")
    if name.endswith(".pt2"):
        spec = beside(name)
    elif place.endswith(".py"):
        spec = f"{beside(place)} + {':' + function!r}"
    elif place == "hf" and Path(function).expanduser().is_dir():
        spec = f"'hf:' + {beside(function)}"
    else:
        spec = repr(name) if colon else ""
    weights = "None" if settings.weights is None else beside(settings.weights)
    given = {key: getattr(settings, key) for key in ("size", "mean", "std", "channels")}
    return spec, weights, "".join(f", {key}={value!r}" for key, value in given.items() if value is not None)
