"""Bias (c): a kind of cell that was never a negative in training gets relevance for the class; shown, it does not.

    PFUNGST_DATA=... python benchmarks/microscopy/bias_subclass.py                  # about four minutes on one core
    PFUNGST_DATA=... python benchmarks/microscopy/bias_subclass.py --quick --out /tmp/subclass

The class is "white cell"; platelets are as violet as their nuclei, as necrosis is as dark as cancer in Hägele et al.
Planted: no training patch, of the class or not, has a platelet in it.  Repaired: half of the negatives have one.  Seen:
relevance pooled over each platelet of the held-out smears, in units of what a white cell has in the median; the test
is Wilcoxon's signed rank test over smears, on the mean of their platelets.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from network import STEPS, accuracy, probabilities, train
from outcomes import GROUPS, p_text, read_options, show, write_figure, write_rows, write_table
from patches import Picture, draw_patches, read_blood, split, with_cells, without_cells
from scipy.stats import wilcoxon
from sliding import make_maps

from pfungst.quality.cells import auc, pool_cells

PRESETS = ("epsilon-alpha2-beta1", "epsilon-plus")  # the first for figure and table
TRAINED = {"before": "platelets missing", "after": "platelets added"}
KINDS = ("platelet", "red", "white")


def pool(maps: list[np.ndarray], pictures: list[Picture]) -> dict[str, np.ndarray]:
    """By kind of cell: pooled relevance of each, (n, 2): score, picture."""
    found: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    for row, (heat, picture) in enumerate(zip(maps, pictures, strict=True)):
        scores, areas = pool_cells(heat, picture.cells, sign="positive")
        for kind in KINDS:
            mine = scores[(picture.kinds[: len(scores)] == kind) & (areas > 0)]
            found[kind].append(np.stack([mine, np.full(len(mine), row)], 1))
    return {kind: np.concatenate(parts) for kind, parts in found.items()}


def by_picture(cells: np.ndarray) -> np.ndarray:
    """Mean score of the cells of each picture."""
    return np.array([cells[cells[:, 1] == number, 0].mean() for number in np.unique(cells[:, 1])])


def draw(pictures: list[Picture], maps: dict[str, list[np.ndarray]], cells: dict[str, dict[str, np.ndarray]]) -> Any:
    """A smear with its maps, and the box plot."""
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.2), width_ratios=(1.15, 1.15, 1.15, 1.5))
    several = [(p.kinds == "platelet").sum() * ((p.kinds == "white").sum() == 1) for p in pictures]
    number = int(np.argmax(several))
    picture = pictures[number]
    show(axes[0], picture.pixels)
    axes[0].set_title("platelets (green)")
    for axis, (kind, name) in zip(axes[1:], TRAINED.items(), strict=False):
        show(axis, maps[kind][number])
        axis.set_title(name)
    for axis in axes[:3]:
        axis.contour(picture.mask("platelet"), [0.5], colors="#0b7a3b", linewidths=1.3)
    boxes = [cells[trained][kind][:, 0] for kind in KINDS for trained in TRAINED]
    drawn = axes[3].boxplot(boxes, positions=[0, 0.8, 2.2, 3, 4.4, 5.2], widths=0.6, patch_artist=True,
                            whis=(5, 95), showfliers=False, medianprops={"color": "black"})  # fmt: skip
    for number, box in enumerate(drawn["boxes"]):
        box.set_facecolor((GROUPS[1], GROUPS[0])[number % 2])
        box.set_alpha(0.55)
    axes[3].set_xticks([0.4, 2.6, 4.8], ["platelets", "red cells", "white cells"])
    axes[3].set_ylabel("positive relevance\n(a white cell's median is 1)")
    axes[3].legend(drawn["boxes"][:2], TRAINED.values(), frameon=False, fontsize=9, loc="upper right")
    figure.tight_layout()
    return figure


def main() -> None:
    options = read_options(__doc__)
    known, held = split(read_blood(limit=60 if options.quick else None))
    natural = without_cells(known, "white")
    groups = {
        "before": [with_cells(known, "white", without=("platelet",)), without_cells(known, "white", "platelet")],
        "after": [with_cells(known, "white"), with_cells(known, "platelet", 0, without=("white",)),
                  with_cells(known, "white"), natural],
    }  # fmt: skip
    tests = {
        "as_collected": [with_cells(held, "white", without=("platelet",)), without_cells(held, "white", "platelet")],
        "platelets": [with_cells(held, "platelet", 0, without=("white",))],
    }
    count = 200 if options.quick else 1000
    asked = {name: draw_patches(held, some, count, np.random.default_rng(6)) for name, some in tests.items()}
    if options.quick:
        held = held[:12]
    rows, kept = [], {}
    for preset in PRESETS:
        maps, cells = {}, {}
        for kind in TRAINED:
            chosen = groups[kind]
            model = train(lambda n, rng, chosen=chosen: draw_patches(known, chosen, n, rng)[:2], f"subclass_{kind}",
                          steps=40 if options.quick else STEPS, keep=options.keep)  # fmt: skip
            maps[kind] = make_maps(preset, model, held, options.keep)
            found = pool(maps[kind], held)
            unit = np.median(found["white"][:, 0])
            cells[kind] = {name: np.stack([part[:, 0] / unit, part[:, 1]], 1) for name, part in found.items()}
            patches, labels, _ = asked["as_collected"]
            scores = np.concatenate([found["white"][:, 0], found["platelet"][:, 0]])
            rows.append({
                "preset": preset, "trained": kind, "accuracy_as_collected": accuracy(model, patches, labels),
                "platelet_patches_taken_for_white": float((probabilities(model, asked["platelets"][0]) > 0.5).mean()),
                **{f"{name}_median": float(np.median(part[:, 0])) for name, part in cells[kind].items()},
                "auc_white_against_platelets": auc(scores, np.arange(len(scores)) < len(found["white"])),
                "platelets": len(found["platelet"]),
                "pictures_with_platelets": len(np.unique(found["platelet"][:, 1])),
            })  # fmt: skip
        pair = [by_picture(cells[kind]["platelet"]) for kind in TRAINED]
        for row in rows[-2:]:
            row["p_over_pictures"] = float(wilcoxon(*pair).pvalue)
            row["p_over_platelets"] = float(wilcoxon(*(cells[kind]["platelet"][:, 0] for kind in TRAINED)).pvalue)
        kept[preset] = (maps, cells)
    write_rows(options, "bias_subclass", rows)
    head = ["trained with", "accuracy, test without platelets", "patches with platelets taken for white cells",
            "relevance of a platelet, median", "of a red cell", "AUC, white cells against platelets"]  # fmt: skip
    table = [
        [TRAINED[row["trained"]], f"{row['accuracy_as_collected']:.1%}",
         f"{row['platelet_patches_taken_for_white']:.1%}", f"{row['platelet_median']:.2f}",
         f"{row['red_median']:.2f}", f"{row['auc_white_against_platelets']:.3f}"]
        for row in rows[:2]
    ]  # fmt: skip
    pictures, platelets = rows[0]["pictures_with_platelets"], rows[0]["platelets"]
    p = p_text(rows[0]["p_over_pictures"])
    table.append([f"p, Wilcoxon, {pictures} smears ({platelets} platelets)", "", "", p, "", ""])
    write_table(options, "bias_subclass", head, table)
    write_figure(options, "bias-subclass", draw(held, *kept[PRESETS[0]]))


if __name__ == "__main__":
    main()
