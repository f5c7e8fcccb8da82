"""Do relevance maps single out the right cells?  Cell-level ROC as in Hägele et al. 2020, by sliding windows.

    PFUNGST_DATA=... python benchmarks/microscopy/cells_roc.py                      # about half an hour on one core
    PFUNGST_DATA=... python benchmarks/microscopy/cells_roc.py --quick --out /tmp/cells

For each of three classes a patch classifier is trained that knows no places, only whether a patch of 48 x 48 pixels has
such a cell.  Maps of held-out pictures are pooled over every annotated cell (mean, signed): AUC of the class's cells
against all others, interval by pictures, AUC by size; the share of positive relevance inside the cells' outlines, and
how coarse the maps are (lag at which their autocorrelation falls to a half).

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
        coarse, inside = detail(maps[method]), mass_inside(maps[method], held, task)
        seconds = time.perf_counter() - start
        print(f"  {method:28} AUC {roc.auc:.3f}  coarse {coarse:.1f} px  {seconds:.0f} s", flush=True)
        rows.append({
            "class": task, "method": method, "auc": roc.auc, "low": roc.interval[0], "high": roc.interval[1],
            **{f"auc_{name}": auc for name, auc in zip(("small", "middle", "large"), by_size(roc), strict=True)},
            "sensitivity_at_10_percent": roc.sensitivity(0.1), "inside": inside, "coarseness_pixels": coarse,
            "cell_width_pixels": width,
            "cells_of_class": roc.positives, "other_cells": roc.others, "pictures": roc.pictures,
            "patch_accuracy": right,
        })  # fmt: skip
    return Outcome(held, maps, rocs, right, width), rows


def by_size(roc: CellROC) -> list[float]:
    """AUC of the small, middle and large cells; NaN where a picture or two have none of a size."""
    return [part.auc for part in roc.by_size] + [float("nan")] * (3 - len(roc.by_size))


def mass_inside(maps: Sequence[np.ndarray], pictures: Sequence[Picture], task: str) -> float:
    """Share of positive relevance inside the outlines of the class's cells, median over the pictures that have some."""
    masks = [picture.mask(task) for picture in pictures]
    return float(np.median([
        heat[mask].clip(0).sum() / max(heat.clip(0).sum(), 1e-12)
        for heat, mask in zip(maps, masks, strict=True) if mask.any()
    ]))  # fmt: skip


def tabulate(rows: Sequence[dict[str, Any]]) -> tuple[list[list[str]], list[list[str]]]:
    """Method by class: AUC with its interval, relevance inside; how coarse; and AUC by size."""
    table, sizes = [], []
    for method in METHODS:
        name = f"`{method}`" if method in PRESETS else method
        mine = [next(row for row in rows if row["class"] == task and row["method"] == method) for task in TASKS]
        cells = [(f"{row['auc']:.3f} ({row['low']:.3f} to {row['high']:.3f})", f"{row['inside']:.0%}") for row in mine]
        table.append([name, *(cell for pair in cells for cell in pair), f"{mine[-1]['coarseness_pixels']:.1f}"])
        sizes.append([name, *(f"{row[f'auc_{size}']:.2f}" for row in mine for size in ("small", "middle", "large"))])
    return table, sizes


def choose(task: str, pictures: Sequence[Picture]) -> tuple[int, tuple[slice, slice]]:
    """A picture that shows the matter, and what of it is shown: 96 x 96 pixels, crowded, with cells of the class."""
    best, found = -1.0, (0, (slice(0, 96), slice(0, 96)))
    for number, picture in enumerate(pictures):
        mine = np.flatnonzero(picture.kinds == task) + 1
        areas = np.bincount(picture.cells.ravel(), minlength=len(picture.kinds) + 1)
        for top in range(0, picture.cells.shape[0] - 95, 16):
            for left in range(0, picture.cells.shape[1] - 95, 16):
                part = (slice(top, top + 96), slice(left, left + 96))
                inside = np.bincount(picture.cells[part].ravel(), minlength=len(picture.kinds) + 1)
                count = int((inside[mine] > 0.95 * areas[mine]).sum())  # whole ones
                merit = min(count, 12 if task == "nucleus" else 3) + 0.05 * int((inside > 0).sum())
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
            above = f"{name}\n" if task == next(iter(outcomes)) else ""
            axis.set_title(f"{above}AUC {outcome.rocs[method].auc:.2f}", fontsize=11)
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
        below.set_xticks(range(len(sizes)), [f"{part.low} to\n{part.high}" for part in sizes])
        below.set_xlabel("area in pixels, terciles")
        below.set_ylim(0.25, 1.02)
    axes[0, 0].set_ylabel("cells of the class found")
    axes[1, 0].set_ylabel("AUC")
    axes[0, 1].legend(frameon=False, fontsize=10, loc="lower right")
    figure.tight_layout()
    return figure


def main() -> None:
    options = read_options(__doc__)
    outcomes, rows = {}, []
    for task in TASKS:
        outcomes[task], some = run(task, options.quick, options.keep)
        rows += some
    write_rows(options, "cells_roc", rows)
    table, sizes = tabulate(rows)
    head = [part for task in TASKS for part in (f"{task}: AUC", "inside")]
    write_table(options, "cells_roc", ["method", *head, "coarse, pixels (nucleus)"], table)
    head = [f"{task}, {size}" for task in TASKS for size in ("small", "middle", "large")]
    write_table(options, "cells_size", ["method", *head], sizes)
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
