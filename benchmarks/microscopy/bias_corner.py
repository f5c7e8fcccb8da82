"""Bias (b): a corruption of 5 x 5 pixels that comes with one class, seen in a single example, unseen by test labels.

    PFUNGST_DATA=... python benchmarks/microscopy/bias_corner.py                       # about five minutes on one core
    PFUNGST_DATA=... python benchmarks/microscopy/bias_corner.py --quick --out /tmp/corner

The class is "platelet" (blood smears).  Planted: a grey square of 5 x 5 pixels, 1.1 % of the patch, in the corner of
every patch of the class, in training and test alike, as a scanner or a preparation would leave it.  Seen: the share of
positive relevance on the square, in the first test patch and over all.  Test labels say nothing: accuracy on test
patches as they were collected is only better.  Repaired in two ways: the square is removed (training on clean patches),
or put on half of all patches of both classes.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from network import CLASS, STEPS, PatchNet, accuracy, to_inputs, train
from outcomes import GROUPS, p_text, read_options, show, write_figure, write_rows, write_table
from patches import SIZE, draw_patches, read_blood, split, with_cells, without_cells
from scipy.stats import wilcoxon

from pfungst.methods import make_method

PRESETS = ("epsilon-alpha2-beta1", "epsilon-plus")  # the first for figure and table
CORNER = (slice(1, 6), slice(1, 6))
AREA = 25 / SIZE**2
GREY = 128
# What was trained on: for either class (not platelet, platelet) the share of patches with the square.
TRAINED = {
    "planted": ("square on the class", (0.0, 1.0)),
    "removed": ("square removed", (0.0, 0.0)),
    "everywhere": ("square on half of both classes", (0.5, 0.5)),
}
ASKED = {"collected": (0.0, 1.0), "clean": (0.0, 0.0), "others": (1.0, 0.0)}


def corrupt(
    patches: np.ndarray, labels: np.ndarray, shares: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """Copies, with the square on that share of the patches of either label."""
    changed = patches.copy()
    chosen = rng.random(len(labels)) < np.array(shares)[labels]
    changed[(chosen, *CORNER)] = GREY
    return changed


def share_on_square(model: PatchNet, preset: str, patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maps of patches, and the share (n,) of positive relevance that lies on the square."""
    method = make_method(preset, model)
    maps = np.concatenate(
        [method(to_inputs(patches[i : i + 32]), CLASS).numpy() for i in range(0, len(patches), 32)]
    ).astype(np.float64)
    positive = maps.clip(0)
    total = np.maximum(positive.sum((1, 2)), 1e-12)  # where nothing speaks for the class, nothing of the square does
    return maps, positive[(slice(None), *CORNER)].sum((1, 2)) / total


def draw(example: np.ndarray, maps: dict[str, np.ndarray], shares: dict[str, np.ndarray]) -> Any:
    """One example and its maps, and the shares of all."""
    figure, axes = plt.subplots(1, 5, figsize=(13.5, 2.9), width_ratios=(1, 1, 1, 1, 1.7))
    show(axes[0], example)
    axes[0].set_title("the first test patch\nof the class")
    colours = dict(zip(TRAINED, (GROUPS[1], GROUPS[0], GROUPS[2]), strict=True))
    for axis, (kind, (name, _)) in zip(axes[1:], TRAINED.items(), strict=False):
        show(axis, maps[kind][0])
        words = name.replace(" on half", "\non half")
        axis.set_title(f"{words}\n{shares[kind][0]:.0%} on it", color=colours[kind])
    for axis in axes[:4]:
        axis.add_patch(plt.Rectangle((-0.5, -0.5), 7.5, 7.5, fill=False, color="#0b7a3b", lw=1.2))
    edges = np.linspace(0, 1, 41)
    for kind, (name, _) in TRAINED.items():
        axes[4].hist(shares[kind], edges, histtype="stepfilled", alpha=0.5, color=colours[kind], label=name)
    axes[4].axvline(AREA, color="black", lw=1, ls=":")
    axes[4].set_xlabel("positive relevance on the square\n(dotted: its share of the patch)")
    axes[4].set_ylabel("patches")
    axes[4].set_yscale("log")
    axes[4].set_ylim(top=6 * len(shares["planted"]) ** 1.3)  # room for the legend
    axes[4].legend(frameon=False, fontsize=9, loc="upper center")
    figure.tight_layout()
    return figure


def main() -> None:
    options = read_options(__doc__)
    known, held = split(read_blood(limit=60 if options.quick else None))
    groups = [with_cells(known, "platelet"), without_cells(known, "platelet")]
    asked = [with_cells(held, "platelet"), without_cells(held, "platelet")]
    patches, labels, origins = draw_patches(held, asked, 200 if options.quick else 1600, np.random.default_rng(5))
    none = np.random.default_rng(0)  # shares of 0 and 1 need no chance
    mine = labels == CLASS
    with_square, numbers = corrupt(patches, labels, ASKED["collected"], none)[mine], origins[mine, 0]
    rows, figures = [], {}
    for kind, (name, shares) in TRAINED.items():

        def give(n: int, rng: np.random.Generator, shares: tuple[float, float] = shares) -> Any:
            x, y, _ = draw_patches(known, groups, n, rng)
            return corrupt(x, y, shares, rng), y

        model = train(give, f"corner_{kind}", steps=40 if options.quick else STEPS, keep=options.keep)
        right = {test: accuracy(model, corrupt(patches, labels, on, none), labels) for test, on in ASKED.items()}
        for preset in PRESETS:
            maps, share = share_on_square(model, preset, with_square)
            figures[preset, kind] = (maps, share)
            rows.append({
                "preset": preset, "trained": kind, **{f"accuracy_{test}": value for test, value in right.items()},
                "share_first_example": share[0], "share_median": float(np.median(share)),
                "examples_above_10_times_area": float((share > 10 * AREA).mean()), "area": AREA,
                "patches": len(share), "pictures": len(np.unique(numbers)), "what": name,
            })  # fmt: skip
    for row in rows:
        means = [
            np.array([share[numbers == number].mean() for number in np.unique(numbers)])
            for _, share in (figures[row["preset"], "planted"], figures[row["preset"], row["trained"]])
        ]
        row["p_against_planted"] = "" if row["trained"] == "planted" else float(wilcoxon(*means).pvalue)
    write_rows(options, "bias_corner", rows)
    head = ["trained with", "accuracy, test as collected", "test without squares", "squares on the other class",
            "relevance on the square, first example", "median", "examples with over ten times its area",
            "p against planted"]  # fmt: skip
    write_table(options, "bias_corner", head, [
        [row["what"], *(f"{row[f'accuracy_{test}']:.1%}" for test in ASKED), f"{row['share_first_example']:.0%}",
         f"{row['share_median']:.1%}", f"{row['examples_above_10_times_area']:.0%}",
         row["p_against_planted"] and p_text(row["p_against_planted"])]
        for row in rows if row["preset"] == PRESETS[0]
    ])  # fmt: skip
    maps, shares = ({kind: figures[PRESETS[0], kind][i] for kind in TRAINED} for i in (0, 1))
    write_figure(options, "bias-corner", draw(with_square[0], maps, shares))


if __name__ == "__main__":
    main()
