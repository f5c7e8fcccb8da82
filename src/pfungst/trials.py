"""Presets on pictures in two halves: what each gets on each picture, kept as far as it is finished, and compared.

A search looks at one half only; what it found is judged on the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfungst.errors import DataError, ModelError, PfungstError, RelevanceError, SettingError, first_line
from pfungst.examples import Batch, Examples
from pfungst.journals import Journal
from pfungst.lrp import LRP, Preset, Several
from pfungst.models import LoadedModel
from pfungst.quality.localisation import relevance_mass
from pfungst.quality.pixel_flipping import score_srg
from pfungst.quality.questions import Question, ask, cosine
from pfungst.tables import draw_weights, resample_mean

Progress = Callable[[str, int, int], None]
SEARCH, HELD = "search", "held"
STEPS = 10  # of SRG on the search half, not 28
LEAST = 8  # pictures: four in each half


def plain(value: Any) -> Any:
    """Not defined becomes None: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


@dataclass
class Bench:
    """Pictures in two halves, and figures of presets on them, kept as far as they are finished.

    ``known[half][key]``: {"srg": [...], "alike": [...], "mass": [...], "batches": k} or {"refused": why}.
    """

    loaded: LoadedModel
    examples: Examples
    target: str
    seed: int
    batch_size: int
    chunk: int | None
    device: torch.device
    progress: Progress
    journal: Journal = field(default_factory=Journal)
    ids: list[str] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)  # by batch
    targets: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    shares: np.ndarray = field(default_factory=lambda: np.zeros(0))  # of the picture that is object, NaN unknown
    masks: Any = field(default_factory=hashlib.sha256)  # digest of all masks
    search: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    first: Tensor = field(default_factory=lambda: torch.zeros(0))
    known: dict[str, dict[str, Any]] = field(default_factory=dict)

    def look(self) -> None:
        """Ask the model once about all pictures, and divide them: alternately within what is explained, at random."""
        targets, shares = [], []
        total = self.examples.count
        for batch in self.examples.batches(self.batch_size):
            outputs = ask(self.loaded.module, batch.x.to(self.device), self.chunk)
            if not bool(torch.isfinite(outputs).all()):
                raise ModelError("the model returns NaN or infinity", "check the weights, and --mean and --std")
            chosen = outputs.argmax(1) if self.target == "predicted" else batch.labels.to(self.device)
            if bool((chosen < 0).any()) or int(chosen.max()) >= outputs.shape[1]:
                raise DataError("labels are missing, or no outputs", "give --target predicted, or --classes")
            masks = self.examples.masks(batch, chosen.cpu())
            share = torch.full((len(chosen),), torch.nan) if masks is None else masks.float().mean((1, 2))
            self.masks.update(b"" if masks is None else masks.cpu().numpy().tobytes())
            if not self.ids:
                self.first = batch.x[:2].to(self.device)
            self.ids += batch.ids
            self.outputs.append(outputs)
            targets.append(chosen.cpu().numpy())
            shares.append(share.where((share > 0) & (share < 1), torch.nan).double().numpy())
            self.progress("looking", len(self.ids), max(total or 0, len(self.ids)))
        if len(self.ids) < LEAST:
            raise DataError(f"{len(self.ids)} pictures", f"give at least {LEAST}, better 50 to 200")
        self.targets, self.shares = np.concatenate(targets), np.concatenate(shares)
        drawn = np.random.default_rng(self.seed).permutation(len(self.ids))
        order = drawn[np.argsort(self.targets[drawn], kind="stable")]
        self.search = np.zeros(len(self.ids), bool)
        self.search[order[::2]] = True

    def identify(self) -> dict[str, Any]:
        """What figures depend on besides the preset."""
        seen = hashlib.sha256(json.dumps([self.ids, self.targets.tolist()]).encode())
        for values in (*(out.cpu().numpy() for out in self.outputs), self.shares):
            seen.update(np.ascontiguousarray(values).tobytes())
        return {
            "model": self.loaded.name, "digest": self.loaded.digest, "pictures": self.examples.digest,
            "seen": seen.hexdigest(), "masks": self.masks.hexdigest(), "target": self.target,
            "seed": self.seed, "batch size": self.batch_size, "steps": STEPS,
            "device": self.device.type, "torch": torch.__version__,
        }  # fmt: skip

    def rows(self, half: str) -> np.ndarray:
        """Places of a half's pictures."""
        return np.flatnonzero(self.search if half == SEARCH else ~self.search)

    def ends(self) -> tuple[Tensor, Tensor]:
        """Least and greatest input, (1, C, 1, 1)."""
        return self.examples.low[None].to(self.device), self.examples.high[None].to(self.device)

    def score(self, presets: Sequence[Preset], half: str, tell: Callable[[int], None]) -> None:
        """All presets on all pictures of a half that are not done, batch by batch; a batch is prepared once."""
        known = self.known.setdefault(half, self.journal.read(half)[0])
        known.pop("array", None)
        keys = [key_of(one) for one in presets]
        start, done = 0, 0
        for number, batch in enumerate(self.examples.batches(self.batch_size)):
            here = np.arange(start, start + len(batch.ids))
            start += len(here)
            keep = np.flatnonzero((self.search if half == SEARCH else ~self.search)[here])
            question: Question | None = None
            for key, one in zip(keys, presets, strict=True):
                found = known.setdefault(key, {"batches": 0, "srg": [], "alike": [], "mass": []})
                if "refused" not in found and found["batches"] == number:
                    if len(keep):
                        question = question or self.ask(batch, number, here, keep)
                        try:
                            figures = self.measure(one, question, half)
                        except (PfungstError, RuntimeError, NotImplementedError) as error:
                            known[key] = {"refused": first_line(error)}
                            continue
                        for name, values in figures.items():
                            found[name] += plain(values)
                    found["batches"] = number + 1
                    self.journal.write(half, known)
                done += 1
                tell(done)
        self.journal.write(half, known, last=True)

    def ask(self, batch: Batch, number: int, here: np.ndarray, keep: np.ndarray) -> Question:
        """The pictures of a batch that are in a half, without maps."""
        x = batch.x[keep].to(self.device)
        target = torch.from_numpy(self.targets[here[keep]]).to(self.device)
        masks = self.examples.masks(batch, torch.from_numpy(self.targets[here]))
        low, high = self.ends()
        return Question(
            self.loaded.module, x, target, x[:, 0], None, None if masks is None else masks[keep].to(self.device),
            low[0], high[0], self.chunk, self.outputs[number][keep],
        )  # fmt: skip

    def measure(self, one: Preset, asked: Question, half: str) -> dict[str, list[float]]:
        """srg, alike and mass of each picture.  Raises RelevanceError for maps that are not finite."""
        several = asked.outputs.shape[1] > 1
        rival = asked.outputs.scatter(1, asked.target[:, None], -torch.inf).argmax(1)
        lrp = LRP(self.loaded.module, one, bounds=self.ends())
        results = lrp(asked.x, Several([asked.target, rival] if several else [asked.target]))
        if not all(isinstance(result.scores, Tensor) and result.scores.dim() == 4 for result in results):
            raise RelevanceError("the model's input is no picture (n, channels, height, width)", "use pfungst.LRP")
        maps = [result.scores.detach().sum(1).float() for result in results]
        if not all(bool(torch.isfinite(one).all()) for one in maps):
            raise RelevanceError("the map holds NaN or infinity", "try another rule")
        question = asked.about(maps[0])
        # Fewer steps cost less; larger regions would not, and favour noisy maps, whose sums they smooth.
        coarse = {"steps": STEPS} if half == SEARCH else {}
        none = torch.full((len(maps[0]),), torch.nan)
        # A map of nothing says nothing: the same for every class, relevance anywhere.
        alike = cosine(*maps).nan_to_num(1.0) if several else none
        mass = none if asked.masks is None else relevance_mass(maps[0], asked.masks)
        if asked.masks is not None:
            share = asked.masks.double().mean((1, 2))
            mass = mass.where(torch.isfinite(mass), share).where((share > 0) & (share < 1), torch.nan)
        scored = score_srg(question, **coarse).figures["srg"]
        return {"srg": scored.tolist(), "alike": alike.tolist(), "mass": mass.tolist()}

    def figures(self, one: Preset, half: str) -> dict[str, np.ndarray] | str:
        """What is known of a preset: (n,) a figure, NaN where not defined; or why it was refused."""
        found = self.known[half][key_of(one)]
        if "refused" in found:
            return str(found["refused"])
        values = {name: np.array(found[name], float) for name in ("srg", "alike", "mass")}
        return {**values, "share": np.where(np.isfinite(values["mass"]), self.shares[self.rows(half)], np.nan)}


def key_of(one: Preset) -> str:
    """A preset by what it does, without its name."""
    return hashlib.sha256(replace(one, name="auto" if one.automatic else "").describe().encode()).hexdigest()[:16]


def find_terms(figures: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The terms of the score by picture, (n,); those that are defined nowhere are left out.

    The mean of ``localisation`` over its pictures is (mean mass - a) / (1 - a).
    """
    terms = {"srg": figures["srg"], "class": (1 - figures["alike"]) / 2}
    known = np.isfinite(figures["share"])
    if known.any():
        terms["localisation"] = (figures["mass"] - figures["share"]) / (1 - figures["share"][known].mean())
    return {name: values for name, values in terms.items() if np.isfinite(values).any()}


def weigh(means: Mapping[str, Any], weights: Mapping[str, float]) -> Any:
    """The score of means of the terms: their weighted geometric mean; a term below 0 counts as 0."""
    total = sum(weights[name] for name in means)
    if not total:
        raise SettingError("the objective weighs only what is not known here", "give masks, or another objective")
    return np.prod([np.maximum(mean, 0) ** (weights[name] / total) for name, mean in means.items()], axis=0)


def compare(
    found: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], weights: Mapping[str, float], seed: int
) -> dict[str, tuple[float, float, float]]:
    """Mean and 95 % bootstrap interval of the paired difference of each figure and of the score."""
    n = len(found["srg"])
    drawn = np.concatenate([np.ones((1, n)), draw_weights(n, [seed, 2])])  # the pictures themselves first

    def means(values: np.ndarray) -> np.ndarray:
        return resample_mean(values, drawn)

    differences = {name: means(found[name] - other[name]) for name in ("srg", "mass", "alike")}
    # The same pictures are drawn for both.
    scores = [
        weigh({name: means(values) for name, values in find_terms(one).items()}, weights) for one in (found, other)
    ]
    differences["score"] = scores[0] - scores[1]
    result = {}
    for name, values in differences.items():
        if np.isfinite(values[0]):
            low, high = np.nanquantile(values[1:], [0.025, 0.975])
            result[name] = (float(values[0]), float(low), float(high))
    return result
