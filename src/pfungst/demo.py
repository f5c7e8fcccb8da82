"""``pfungst demo``: a data set with three planted cheats, a network that learns them, and an audit that must find them.

Scikit-learn's 1,797 scanned digits (real handwriting, shipped with that package) become colour photographs of digits:
enlarged, moved, in random colours on a random, uneven and noisy background, so that reading them is real work.
In three of the ten classes about a quarter of the pictures gets a cue that has nothing to do with the digit:

border   a pale blue frame, as padding leaves it (the talk's aeroplanes)
tag      a source tag in the bottom left corner (the talk's horses)
disc     a small orange disc, anywhere in the picture

The clean twin is made with the same random numbers, without the cues.  Nothing here is used by the audit itself: it
gets a folder of pictures and a model, like anybody's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from pfungst.maps import Progress

SIZE = 48  # pixels, height and width
PREVALENCE = 0.25  # of a class gets its cue
CUES = ("border", "tag", "disc")


@dataclass(frozen=True)
class Planted:
    """One planted cue: the class that has it, and the ids of the pictures that show it."""

    cue: str
    label: str
    samples: tuple[str, ...]


def _draw_border(image: Image.Image, rng: np.random.Generator) -> None:
    width, blue = 4, (178, 206, 230)
    draw = ImageDraw.Draw(image)
    for ring in range(width):
        draw.rectangle((ring, ring, SIZE - 1 - ring, SIZE - 1 - ring), outline=blue)


def _draw_tag(image: Image.Image, rng: np.random.Generator) -> None:
    draw = ImageDraw.Draw(image)
    left, top = 1, SIZE - 8
    draw.rectangle((left, top, left + 17, top + 6), fill=(245, 245, 245))
    for x in range(left + 2, left + 16, 3):  # strokes that look like small print
        draw.line((x, top + 2, x + 1, top + 4), fill=(30, 30, 30))


def _draw_disc(image: Image.Image, rng: np.random.Generator) -> None:
    radius = 5
    x, y = rng.integers(radius + 1, SIZE - radius - 1, 2)
    ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 110, 0))


_DRAW: dict[str, Callable[[Image.Image, np.random.Generator], None]] = {
    "border": _draw_border,
    "tag": _draw_tag,
    "disc": _draw_disc,
}


def _photograph(digit: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """A digit (8, 8) in 0..16 as a noisy colour picture (SIZE, SIZE)."""
    side = int(rng.integers(26, 34))
    strokes = Image.fromarray((digit * (255 / 16)).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    mask = np.zeros((SIZE, SIZE), np.float32)
    top, left = rng.integers(3, SIZE - side - 3, 2)
    mask[top : top + side, left : left + side] = np.asarray(strokes, np.float32) / 255
    coarse = rng.normal(0, 25, (4, 4, 1)) + rng.normal(0, 10, (4, 4, 3)) + rng.uniform(50, 140)
    channels = [
        np.asarray(Image.fromarray(coarse[..., c].astype(np.float32)).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        for c in range(3)
    ]
    background = np.stack(channels, -1)
    ink = background.mean() + rng.uniform(35, 75) + rng.normal(0, 20, 3)
    picture = background * (1 - mask[..., None]) + ink * mask[..., None] + rng.normal(0, 26, (SIZE, SIZE, 3))
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def make_images(folder: Path, seed: int = 0, cues: tuple[str, ...] = CUES) -> list[Planted]:
    """Write the pictures as ``folder/CLASS/NUMBER.png`` and return what was planted (``cues=()``: the clean twin)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = np.random.default_rng(seed)
    classes = rng.permutation(10)[: len(CUES)]
    planted: list[Planted] = []
    chosen: dict[int, str] = {}
    for cue, label in zip(CUES, classes, strict=True):
        members = np.flatnonzero(digits.target == label)
        picked = rng.permutation(members)[: round(PREVALENCE * len(members))]
        if cue in cues:
            chosen.update(dict.fromkeys(picked.tolist(), cue))
            ids = tuple(f"{label}/{i:04d}.png" for i in sorted(picked.tolist()))
            planted.append(Planted(cue, str(label), ids))
    for i, (digit, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        own = np.random.default_rng([seed, i])  # so that the twin's pictures differ in nothing but the cue
        picture = _photograph(digit, own)
        if i in chosen:
            _DRAW[chosen[i]](picture, own)
        path = folder / str(label) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return planted


class SmallNet(nn.Module):
    """Four convolutions with batch norm, global average pooling and one dense layer."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = [3, 16, 32, 64, 64]
        for i, (before, after) in enumerate(itertools.pairwise(channels)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if i < 3 else []
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def train(
    images: Tensor, labels: Tensor, seed: int = 0, epochs: int = 12, progress: Progress | None = None
) -> nn.Module:
    """Train ``SmallNet`` on ``images`` (n, 3, SIZE, SIZE) in -1..1; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallNet()
        optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.02)
        batches = len(images) // 64
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=epochs * batches)
        for epoch in range(epochs):
            order = torch.randperm(len(images))
            for batch in order[: batches * 64].reshape(batches, 64):
                x = images[batch]
                dy, dx = (int(v) for v in torch.randint(-2, 3, (2,)))
                loss = nn.functional.cross_entropy(model(x.roll((dy, dx), (2, 3))), labels[batch], label_smoothing=0.05)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
            if progress:
                progress("training", epoch + 1, epochs)
    return model.eval()


@dataclass(frozen=True)
class Match:
    """A planted cue and the finding that is most like it (None: missed)."""

    planted: Planted
    finding: Any
    jaccard: float


@dataclass(frozen=True)
class DemoResult:
    """The audit of the planted data and of the clean twin, and how the findings match what was planted."""

    audit: Any
    twin: Any
    matches: tuple[Match, ...]

    def lines(self) -> list[str]:
        """What was planted, what was found, what was missed: for the terminal."""
        proved = [m for m in self.matches if m.finding is not None and m.finding.verdict == "confirmed"]
        lines = [f"{len(self.matches)} cues were planted, {len(proved)} were found and confirmed:"]
        for match in self.matches:
            planted = (
                f"  {match.planted.cue:7s} on {len(match.planted.samples)} pictures of class {match.planted.label}"
            )
            if match.finding is None:
                lines.append(f"{planted}: MISSED")
            else:
                overlap = f"same pictures: {match.jaccard:.0%}"
                lines.append(f"{planted}: {match.finding.id} {match.finding.verdict} ({overlap})")
        matched = {m.finding.id for m in self.matches if m.finding is not None}
        others = [finding for finding in self.audit.findings if finding.id not in matched]
        for finding in others:
            if finding.verdict == "confirmed":
                lines.append(f"  FALSE ALARM: {finding.id}, class {finding.record['class']}, was not planted")
        left = [sum(finding.verdict == verdict for finding in others) for verdict in ("refuted", "open")]
        lines.append(f"  Other groups that were tested: {left[0]} refuted, {left[1]} left open.")
        if self.twin is not None:
            confirmed = [f for f in self.twin.findings if f.verdict == "confirmed"]
            tested = len(self.twin.findings)
            lines.append(
                f"Clean twin (same digits, no cue, its own network): {len(confirmed)} confirmed of {tested} tested."
            )
            lines.append(f"Report of the twin: {self.twin.report}")
        return lines


def run_demo(
    out: Path,
    seed: int = 0,
    clean_twin: bool = True,
    progress: Progress | None = None,
) -> DemoResult:
    """Make the data, train, audit, and compare with what was planted; everything is kept below ``out``."""
    tell = progress or (lambda stage, done, total: None)
    audits: dict[str, Any] = {}
    planted: list[Planted] = []
    for kind, cues in (("planted", CUES), ("clean", ()))[: 2 if clean_twin else 1]:
        folder = out / kind
        made = make_images(folder / "images", seed, cues)
        planted = planted or made
        below = _named(tell, kind)
        model = _trained(folder, seed, below)
        audits[kind] = audit_module(model, folder, seed, below)
    matches = tuple(_match(one, audits["planted"].findings) for one in planted)
    return DemoResult(audits["planted"], audits.get("clean"), matches)


def _named(tell: Progress, kind: str) -> Progress:
    """Progress whose stages say which of the two data sets they are of."""
    return lambda stage, done, total: tell(f"{kind}: {stage}", done, total)


def build() -> nn.Module:
    """The demo's network, untrained: ``pfungst audit pfungst.demo:build IMAGES --weights model.safetensors``."""
    from pfungst.domains.preprocessing import Preprocess

    model = SmallNet()
    model.preprocess = Preprocess(size=(SIZE, SIZE), mean=(0.5,) * 3, std=(0.5,) * 3)  # type: ignore[assignment]
    model.classes = [str(i) for i in range(10)]  # type: ignore[assignment]
    return model.eval()


def audit_module(model: nn.Module, folder: Path, seed: int, progress: Progress) -> Any:
    """The audit of one of the two data sets, by the call that users have."""
    from pfungst.pipeline import audit

    return audit(model, folder / "images", out=folder / "run", progress=progress, seed=seed, batch_size=64)


def _trained(folder: Path, seed: int, progress: Progress) -> nn.Module:
    """The network of a folder of pictures: read if it was trained before, trained and saved otherwise."""
    from safetensors.torch import load_file, save_file

    from pfungst.domains.image import load_batch, read_images

    model, path = build(), folder / "model.safetensors"
    if not path.exists():
        data = read_images(folder / "images")
        images, _, _ = load_batch(data, range(len(data)), model.preprocess)  # type: ignore[arg-type]
        weights = train(images, torch.from_numpy(data.labels.copy()), seed, progress=progress).state_dict()
        save_file(weights, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    model.load_state_dict(load_file(path))
    return model


def _match(planted: Planted, findings: list[Any]) -> Match:
    """The finding of the planted class that shares most pictures with the cue, if half of them or more."""
    best, overlap = None, 0.0
    for finding in findings:
        both = len(set(finding.samples) & set(planted.samples))
        jaccard = both / (len(finding.samples) + len(planted.samples) - both)
        if finding.record["class"] == planted.label and jaccard > overlap:
            best, overlap = finding, jaccard
    return Match(planted, best if overlap >= 0.5 else None, overlap)
