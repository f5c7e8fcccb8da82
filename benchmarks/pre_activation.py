"""Batch norm, ReLU, convolution in this order: which way of taking them gives the better maps of a trained DenseNet?

    PFUNGST_DATA=... python benchmarks/pre_activation.py

A small DenseNet (torchvision's, 14 dense layers of growth 12) learns the photographs, and the cells, of the planted
benchmark; half of one class has a magenta disc somewhere, so that there it is known what the network looks at.  The
three forms of ``Preset.pre_activation`` are then compared on the same pictures, float32:

step      correlation of the maps of a picture and of the same with a little noise (0.01 of a range of 2)
on disc   share of the relevance for the class that lies on the disc (2 % of the picture); pictures with the disc
srg       SRG on these, and on pictures of the other classes
sum       of the map over the output, median; the rest is in the ledger
classes   correlation of the maps of the predicted class and of the next one; pictures of other classes

Ten minutes on two cores, nearly all of it training.  Rows go to benchmarks/results/pre_activation.csv, the table into
docs/guides/noise.md.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from engine import import_torchvision
from guides import replace_between
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent / "planted"))
import networks
from cues import CUES
from pictures import Pictures, read_pictures

from pfungst.lrp import LRP, preset
from pfungst.quality.pixel_flipping import score_srg
from pfungst.quality.questions import Question, correlate

RESULTS = Path(__file__).parent / "results" / "pre_activation.csv"
GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "noise.md"
FORMS = ("switch", "threshold", "diagonal")
PRESETS = ("epsilon-plus", "epsilon-alpha2-beta1", "epsilon-gamma-box")
FIELDS = ("data", "preset", "form", "step", "on_disc", "srg_disc", "srg_other", "sum", "classes")
TITLES = ("step", "on disc", "SRG, disc", "SRG, others", "sum", "classes")
COUNT = 32


def train(pictures: Pictures) -> tuple[nn.Module, np.ndarray, np.ndarray, np.ndarray]:
    """The network; all pictures, those with the disc, and where the disc is, (n, h, w) bool."""

    class DenseNet(import_torchvision().models.DenseNet):  # type: ignore[name-defined,misc]
        steps, rate = 700, 3e-3

        def __init__(self, classes: int) -> None:
            super().__init__(growth_rate=12, block_config=(4, 6, 4), num_init_features=24, num_classes=classes)
            self.features.conv0.stride = (1, 1)

    rng = np.random.default_rng(0)
    images, masks = pictures.images.copy(), np.zeros(pictures.images.shape[:3], bool)
    members = np.flatnonzero(pictures.labels == pictures.planted)
    marked = rng.permutation(members)[: len(members) // 2]
    for row in marked:
        changed = CUES["disc"](images[row], rng)
        masks[row], images[row] = (changed != images[row]).any(-1), changed
    networks.NETWORKS["densenet"] = DenseNet
    model = networks.train("densenet", images, pictures.labels, pictures.classes, "cpu", 0)
    held = networks.ask(model, pictures.held_images, "cpu").argmax(1).numpy()
    print(f"{(held == pictures.held_labels).mean():.0%} of held-out pictures recognised", flush=True)
    return model, images, marked, masks


def measure(
    pictures: Pictures, model: nn.Module, images: np.ndarray, marked: np.ndarray, masks: np.ndarray
) -> list[list[str]]:
    """Figures by preset and form."""
    with_disc, target = networks.to_inputs(images[marked[:COUNT]]), torch.full((COUNT,), pictures.planted)
    where = torch.from_numpy(masks[marked[:COUNT]])
    foreign = np.random.default_rng(3).permutation(np.flatnonzero(pictures.labels != pictures.planted))[:COUNT]
    others = networks.to_inputs(images[foreign])
    nearby = with_disc + 0.01 * torch.randn(with_disc.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output, predicted = model(with_disc), model(others).argmax(1)
    rows = []
    for name in PRESETS:
        for form in FORMS:
            lrp = LRP(model, replace(preset(name), pre_activation=form), bounds=(-1.0, 1.0))

            def explain(x: Tensor, index: Tensor, lrp: LRP = lrp) -> Tensor:
                return lrp(x, index).scores.sum(1)

            maps, again, theirs = explain(with_disc, target), explain(nearby, target), explain(others, predicted)
            following = explain(others, (predicted + 1) % len(pictures.classes))
            positive = maps.clamp(min=0)
            figures = (
                correlate(maps, again).mean(),
                ((positive * where).sum((1, 2)) / positive.sum((1, 2))).mean(),
                score_srg(Question(model, with_disc, target, maps)).figures["srg"].mean(),
                score_srg(Question(model, others, predicted, theirs)).figures["srg"].mean(),
                (maps.sum((1, 2)) / output[:, pictures.planted]).median(),
                correlate(theirs, following).mean(),
            )
            rows.append([name, form, *(f"{float(figure):.3f}" for figure in figures)])
            print(*rows[-1], flush=True)
    return rows


def write_table(rows: list[list[str]]) -> str:
    """The table of the guide."""
    lines = [
        f"| pictures | preset | `pre_activation` | {' | '.join(TITLES)} |",
        f"|---|---|---|{'---:|' * len(TITLES)}",
    ]
    lines += [f"| {row[0]} | {row[1]} | {row[2]} | {' | '.join(f'{float(v):.2f}' for v in row[3:])} |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    """Train, measure, and write the table."""
    torch.set_num_threads(1)
    rows = []
    for name in ("photos", "cells"):
        pictures = read_pictures(name)
        rows += [[name, *row] for row in measure(pictures, *train(pictures))]
    with RESULTS.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([FIELDS, *rows])
    GUIDE.write_text(replace_between(GUIDE.read_text(), "table of benchmarks/pre_activation.py", write_table(rows)))


if __name__ == "__main__":
    main()
