"""Do relevance maps single out the right cells?  Cell-level ROC as in Hägele et al. 2020, by sliding windows.

    PFUNGST_DATA=... python benchmarks/microscopy/cells_roc.py                      # about half an hour on one core
    PFUNGST_DATA=... python benchmarks/microscopy/cells_roc.py --quick --out /tmp/cells

For each of three classes a patch classifier is trained that knows no places, only whether a patch of 48 x 48 pixels has
such a cell.  Maps of held-out pictures are pooled over every annotated cell (mean, signed): AUC of the class's cells
against all others, interval by pictures, AUC by size, and how coarse the maps are.

white     white cells (about 40 pixels wide) against red cells and platelets
platelet  platelets (8 pixels) against red and white cells
nucleus   nuclei (19 pixels) against discs of background of the same area and, as far as there are any, darkness
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from network import STEPS, accuracy, train
from outcomes import GROUPS, REST, read_options, short, show, write_figure, write_rows, write_table
from patches import (
    Picture,
    add_background,
    draw_patches,
    read_blood,
    read_tissue,
    split,
    typical_area,
    with_cells,
    without_cells,
)
from sliding import OWN_CONTROLS, detail, make_maps

from pfungst.methods import CONTROLS
from pfungst.quality.cells import CellROC, cell_roc, gather_cells

PRESETS = ("epsilon", "epsilon-plus", "epsilon-plus-flat", "epsilon-alpha2-beta1", "epsilon-alpha2-beta1-flat",
           "epsilon-gamma-box")  # fmt: skip
OTHERS = ("guided-backprop", "gradient", "gradient-x-input", "grad-cam", "occlusion", "probability")
METHODS = (*PRESETS, *OTHERS, *CONTROLS, *OWN_CONTROLS)
SHOWN = ("epsilon-plus", "guided-backprop", "grad-cam", "occlusion", "probability")
UNSIGNED = ("guided-backprop", "gradient", "grad-cam", "probability", *CONTROLS, *OWN_CONTROLS)
TASKS = ("white", "platelet", "nucleus")


@dataclass(frozen=True)
class Outcome:
    """One class: the held-out pictures, by method their maps and ROC, the patch accuracy, a typical cell's width."""

    pictures: list[Picture]
    maps: dict[str, list[np.ndarray]]
    rocs: dict[str, CellROC]
    accuracy: float
    width: float


def run(task: str, quick: bool, keep: Path | None) -> tuple[Outcome, list[dict[str, Any]]]:
    """Train, explain and measure for one class."""
    limit = 40 if quick else None
    pictures = read_tissue(limit=limit) if task == "nucleus" else read_blood(limit=limit)
    known, held = split(pictures)
    groups = [with_cells(known, task), without_cells(known, task)]
    model = train(lambda n, rng: draw_patches(known, groups, n, rng)[:2], f"cells_{task}",
                  steps=40 if quick else STEPS, keep=keep)  # fmt: skip
    asked = [with_cells(held, task), without_cells(held, task)]
    patches, labels, _ = draw_patches(held, asked, 200 if quick else 2000, np.random.default_rng(1))
    right = accuracy(model, patches, labels)
    if task == "nucleus":
        rng = np.random.default_rng(2)
        held = [add_background(picture, rng) for picture in held]
    if quick:
        held = held[:4]
    width = 2 * np.sqrt(typical_area(held, task) / np.pi)
    print(f"{task}: {len(known)} pictures to train on, {len(held)} held out, patch accuracy {right:.1%}", flush=True)
    maps, rocs, rows = {}, {}, []
    for method in METHODS:
        start = time.perf_counter()
        maps[method] = make_maps(method, model, held, keep)
        cells = gather_cells(maps[method], [p.cells for p in held], [p.kinds == task for p in held])
        roc = rocs[method] = cell_roc(cells, draws=100 if quick else 1000)
        coarse = detail(maps[method])
        seconds = time.perf_counter() - start
        print(f"  {method:28} AUC {roc.auc:.3f}  coarse {coarse:.1f} px  {seconds:.0f} s", flush=True)
        rows.append({
            "class": task, "method": method, "auc": roc.auc, "low": roc.interval[0], "high": roc.interval[1],
            **{f"auc_{name}": auc for name, auc in zip(("small", "middle", "large"), by_size(roc), strict=True)},
            "sensitivity_at_10_percent": roc.sensitivity(0.1), "coarseness_pixels": coarse, "cell_width_pixels": width,
            "cells_of_class": roc.positives, "other_cells": roc.others, "pictures": roc.pictures,
            "patch_accuracy": right,
        })  # fmt: skip
    return Outcome(held, maps, rocs, right, width), rows


def by_size(roc: CellROC) -> list[float]:
    """AUC of the small, middle and large cells; NaN where a picture or two have none of a size."""
    return [part.auc for part in roc.by_size] + [float("nan")] * (3 - len(roc.by_size))


def tabulate(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Method by class: AUC with its interval; the smallest third; how coarse."""
    table = []
    for method in METHODS:
        line = [f"`{method}`" if method in PRESETS else method]
        for task in TASKS:
            row = next(row for row in rows if row["class"] == task and row["method"] == method)
            line.append(f"{row['auc']:.3f} ({row['low']:.3f} to {row['high']:.3f})")
            line.append(f"{row['auc_small']:.2f} {row['auc_middle']:.2f} {row['auc_large']:.2f}")
            line.append(f"{row['coarseness_pixels']:.1f}")
        table.append(line)
    return table


def choose(task: str, pictures: Sequence[Picture]) -> tuple[int, tuple[slice, slice]]:
    """A picture that shows the matter, and what of it is shown: 96 x 96 pixels, crowded, with cells of the class."""
    best, found = -1.0, (0, (slice(0, 96), slice(0, 96)))
    for number, picture in enumerate(pictures):
        mine = np.flatnonzero(picture.kinds == task) + 1
        for top in range(0, picture.cells.shape[0] - 95, 16):
            for left in range(0, picture.cells.shape[1] - 95, 16):
                part = (slice(top, top + 96), slice(left, left + 96))
                there = np.unique(picture.cells[part])
                count = len(np.intersect1d(there, mine))
                merit = min(count, 12 if task == "nucleus" else 3) + 0.05 * len(there)
                if merit > best:
                    best, found = merit, (number, part)
    return found


def draw_maps(outcomes: dict[str, Outcome]) -> Any:
    """One row a class: picture with outlines, then the maps."""
    figure, axes = plt.subplots(len(outcomes), 1 + len(SHOWN), figsize=(12.5, 2.25 * len(outcomes)))
    for line, (task, outcome) in zip(np.atleast_2d(axes), outcomes.items(), strict=True):
        number, part = choose(task, outcome.pictures)
        picture = outcome.pictures[number]
        show(line[0], picture.pixels[part])
        line[0].contour(picture.mask(task)[part], [0.5], colors="#0b7a3b", linewidths=1.3)
        line[0].set_ylabel(task, fontsize=13)
        for axis, method in zip(line[1:], SHOWN, strict=True):
            show(axis, outcome.maps[method][number][part], method not in UNSIGNED)
            axis.contour(picture.mask(task)[part], [0.5], colors="#333333", linewidths=0.6)
            name = "LRP epsilon-plus" if method in PRESETS else method
            axis.set_title(f"{name}\nAUC {outcome.rocs[method].auc:.2f}" if line is axes[0] else
                           f"AUC {outcome.rocs[method].auc:.2f}", fontsize=11)  # fmt: skip
    figure.subplots_adjust(wspace=0.06, hspace=0.18)
    return figure


def draw_curves(outcomes: dict[str, Outcome]) -> Any:
    """ROC curves, and AUC by size."""
    figure, axes = plt.subplots(2, len(outcomes), figsize=(12, 7.4))
    lines = (*SHOWN, "edges")
    colours = dict(zip(lines, (*GROUPS[:5], REST), strict=True))
    for (above, below), (task, outcome) in zip(axes.T, outcomes.items(), strict=True):
        for method, style in zip(lines, ("-", "-", "--", "-.", ":", "-"), strict=True):
            roc = outcome.rocs[method]
            name = "LRP epsilon-plus" if method in PRESETS else method
            above.plot(roc.false_positive_rate, roc.true_positive_rate, style, color=colours[method], lw=2, label=name)
            below.plot(range(3), by_size(roc), style, color=colours[method], lw=2, marker="o")
        above.set_title(f"{task}: {outcome.rocs['edges'].positives} cells, {outcome.rocs['edges'].others} others")
        above.set_xlabel("other cells taken for it")
        sizes = outcome.rocs["edges"].by_size
        below.set_xticks(range(len(sizes)), [f"{part.low} to {part.high}" for part in sizes])
        below.set_xlabel("area in pixels, terciles")
        below.set_ylim(0.25, 1.02)
    axes[0, 0].set_ylabel("cells of the class found")
    axes[1, 0].set_ylabel("AUC")
    axes[0, -1].legend(frameon=False, fontsize=10)
    figure.tight_layout()
    return figure


def main() -> None:
    options = read_options(__doc__)
    outcomes, rows = {}, []
    for task in TASKS:
        outcomes[task], some = run(task, options.quick, options.keep)
        rows += some
    write_rows(options, "cells_roc", rows)
    head = ["method", *(f"{task}{what}" for task in TASKS for what in (" AUC", ", by size", ", coarse"))]
    write_table(options, "cells_roc", head, tabulate(rows))
    facts = [
        [task, short(outcome.width), f"{outcome.accuracy:.1%}", outcome.rocs["edges"].positives,
         outcome.rocs["edges"].others, outcome.rocs["edges"].pictures]
        for task, outcome in outcomes.items()
    ]  # fmt: skip
    head = ["class", "width, pixels", "patch accuracy", "cells", "others", "pictures"]
    write_table(options, "cells_tasks", head, facts)
    write_figure(options, "maps", draw_maps(outcomes))
    write_figure(options, "roc", draw_curves(outcomes))


if __name__ == "__main__":
    main()
