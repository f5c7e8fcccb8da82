"""One cell of the grid: plant a cue, train a network, ask whether it uses the cue, audit, score, and ask the rivals."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cues import CUES
from networks import ConvNet, ViT, ask, mix_contents, read_network, train, write_network
from pictures import Pictures, read_pictures
from PIL import Image
from rivals import RIVALS, Answer, Question

import pfungst

FOUND = 0.5  # Jaccard index from which a group is the planted one
USED = 0.1  # least rise of the class's probability that the cue brings on foreign pictures, else the cell is void


@dataclass(frozen=True)
class Setting:
    """What a cell is about.  ``cue`` "none" and ``prevalence`` 0: a clean control; prevalence in % of a class."""

    data: str
    cue: str
    prevalence: float
    network: str
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.data}-{self.cue}-{self.prevalence:g}-{self.network}-{self.seed}"


@dataclass(frozen=True)
class Trial:
    """How a cell is computed.  ``share`` of the pictures and ``steps`` of training: less of them for a quick look."""

    device: str = "cpu"
    share: float = 1.0
    steps: int | None = None
    keep: Path | None = None  # where pictures and run folder stay; None: they are removed


def train_cells(settings: Sequence[Setting], trial: Trial, networks: Path) -> None:
    """Train the networks of cells that differ in cue and prevalence only, side by side, and keep their weights."""
    one = settings[0]
    pictures = read_pictures(one.data, trial.share)
    sets = [plant(setting, trial.share) for setting in settings]
    found = train(one.network, np.stack([training for _, _, training, _ in sets]), sets[0][3], pictures.classes,
                  trial.device, one.seed, trial.steps)  # fmt: skip
    for setting, model in zip(settings, found, strict=True):
        write_network(model, networks / f"{setting.name}.safetensors")


def run_cell(setting: Setting, trial: Trial, networks: Path) -> dict[str, Any]:
    """The cell's record, ready for JSON.  Its network is read from the folder ``networks``, or trained and kept."""
    start = time.perf_counter()
    pictures = read_pictures(setting.data, trial.share)
    images, planted, *_ = plant(setting, trial.share)
    weights = networks / f"{setting.name}.safetensors"
    if not weights.exists():
        train_cells([setting], trial, networks)
    model = read_network(setting.network, weights, pictures.classes, trial.device)
    trained = time.perf_counter()
    predicted = ask(model, images, trial.device).argmax(1).numpy()
    held = ask(model, pictures.held_images, trial.device).argmax(1).numpy()
    record: dict[str, Any] = {
        **dataclasses.asdict(setting),
        "planted": len(planted),
        "accuracy": round(float((predicted == pictures.labels).mean()), 4),
        "held_accuracy": round(float((held == pictures.held_labels).mean()), 4),
        "seconds_training": round(trained - start, 1),
        **measure_use(model, pictures, setting, trial.device),
    }
    if record["used"] or not len(planted):
        question = Question(model, images, pictures.labels, predicted, pictures.classes, pictures.planted,
                            len(planted), trial.device)  # fmt: skip
        record["methods"] = {"pfungst": audit(question, planted, setting, trial)}
        for name, rival in RIVALS.items():
            before = time.perf_counter()
            answer = rival(question)
            record["methods"][name] = score(answer, planted, time.perf_counter() - before)
    record["seconds"] = round(time.perf_counter() - start, 1)
    return record


def plant(setting: Setting, share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The pictures with the cue, the rows that have it, and the training pictures (contents mixed) with labels."""
    pictures = read_pictures(setting.data, share)
    order, mixed, state = _mix(setting.data, share, setting.seed)
    rng = np.random.default_rng()
    rng.bit_generator.state = state
    planted = np.sort(order[: round(setting.prevalence / 100 * len(order))])
    versions = mixed.copy()
    for images in versions:
        for row in planted:
            images[row] = CUES[setting.cue](images[row], rng)
    training = versions.reshape(-1, *pictures.images.shape[1:])
    return versions[0], planted, training, np.tile(pictures.labels, len(versions))


@functools.lru_cache(maxsize=2)
def _mix(data: str, share: float, seed: int) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """What all cues have in common: the order in which rows get the cue, all versions of the pictures, the draws."""
    pictures = read_pictures(data, share)
    rng = np.random.default_rng([seed, 1])
    order = rng.permutation(np.flatnonzero(pictures.labels == pictures.planted))
    versions = np.concatenate([pictures.images[None], mix_contents(pictures.images, 3, rng)])
    return order, versions, dict(rng.bit_generator.state)


def measure_use(model: ConvNet | ViT, pictures: Pictures, setting: Setting, device: str) -> dict[str, Any]:
    """Paste effect: what the cue does to held-out pictures of other classes; ``used``, or the cell is void."""
    if setting.cue == "none":
        return {"used": False, "paste": None, "flips": None}
    rng = np.random.default_rng([setting.seed, 2])
    foreign = pictures.held_images[pictures.held_labels != pictures.planted]
    pasted = np.stack([CUES[setting.cue](picture, rng) for picture in foreign])
    before, after = (ask(model, asked, device).softmax(1) for asked in (foreign, pasted))
    rise = (after - before)[:, pictures.planted]
    flips = (after.argmax(1) == pictures.planted).float() - (before.argmax(1) == pictures.planted).float()
    effect = float(rise.mean())
    error = float(rise.std() / len(rise) ** 0.5)
    return {
        "used": effect >= USED and effect > 2 * error,
        "paste": round(effect, 4),
        "flips": round(float(flips.mean()), 4),
    }


def audit(question: Question, planted: np.ndarray, setting: Setting, trial: Trial) -> dict[str, Any]:
    """pfungst by its public call, on a folder of pictures like anybody's."""
    scratch = Path(tempfile.mkdtemp(prefix=f"{setting.name}-"))
    folder = trial.keep / setting.name if trial.keep else scratch
    ids: dict[str, int] = {}
    for row, (picture, label) in enumerate(zip(question.images, question.labels, strict=True)):
        name = f"{question.classes[label]}/{row:05d}.png"
        ids[name] = row
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / "images" / name, compress_level=1)
    start = time.perf_counter()
    result = pfungst.audit(
        question.model,
        folder / "images",
        out=folder / "run",
        device=trial.device,
        batch_size=128,
        workers=0,
        seed=setting.seed,
    )
    seconds = time.perf_counter() - start
    shown = {"confirmed": 0, "open": 1, "refuted": 2}  # the report's order: what is confirmed first, then by suspicion
    findings = sorted((finding.record for finding in result.findings), key=lambda f: (shown[f["verdict"]], f["rank"]))
    groups = [np.array(sorted(ids[name] for name in finding["samples"])) for finding in findings]
    accused = [finding["verdict"] == "confirmed" for finding in findings]
    answer = Answer(groups, ranked=True, accused=accused)
    told = [
        {key: finding[key] for key in ("id", "class", "size", "suspicion", "verdict", "reason", "views")}
        | {"place": finding["where"]["place"], "jaccard": round(overlap(group, planted), 3)}
        for finding, group in zip(findings, groups, strict=True)
    ]
    shutil.rmtree(scratch)
    return {**score(answer, planted, seconds), "findings": told}


def overlap(group: np.ndarray, truth: np.ndarray) -> float:
    """Jaccard index of two sets of rows."""
    both = len(np.intersect1d(group, truth))
    return both / max(1, len(group) + len(truth) - both)


def score(answer: Answer, planted: np.ndarray, seconds: float) -> dict[str, Any]:
    """How well an answer's best group is the planted one; all else that it accuses is a false accusation.

    rank            of that group in the method's own order; None where the method has none
    precision       expected share of planted pictures among 10 members of that group (or the first 10 of a ranking)
    confirmed       whether the method itself says that this group is a cheat; None where it never says so
    others_accused  how many other groups it says that of; groups that are mostly planted pictures are not counted
    """
    overlaps = [overlap(group, planted) for group in answer.groups]
    best = int(np.argmax(overlaps)) if overlaps and max(overlaps) > 0 else None
    found = best is not None and overlaps[best] >= FOUND
    record: dict[str, Any] = {"jaccard": 0.0, "found": found, "rank": None, "precision": 0.0}
    if best is not None:
        top = answer.groups[best][:10] if answer.ordered else answer.groups[best]
        record |= {"jaccard": round(overlaps[best], 4), "precision": round(float(np.isin(top, planted).mean()), 4)}
        record["rank"] = best + 1 if found and answer.ranked else None
    accused = answer.accused
    record["confirmed"] = None if accused is None else bool(found and best is not None and accused[best])
    record["others_accused"] = None if accused is None else _others(answer.groups, accused, planted)
    return {**record, "groups": len(answer.groups), "seconds": round(seconds, 2)}


def _others(groups: Sequence[np.ndarray], accused: Sequence[bool], planted: np.ndarray) -> int:
    return sum(bool(a and np.isin(group, planted).mean() < 0.5) for group, a in zip(groups, accused, strict=True))


def start_worker() -> None:
    """One thread of torch in each process: the grid fills the cores."""
    torch.set_num_threads(1)
