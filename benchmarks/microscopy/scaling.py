"""Which network copes with pictures of another scale?  Judged from maps at 100, 80 and 60 %, without a label.

    PFUNGST_DATA=... python benchmarks/microscopy/scaling.py                       # about twelve minutes on one core
    PFUNGST_DATA=... python benchmarks/microscopy/scaling.py --quick --out /tmp/scaling

The class is "platelet" (blood smears).  One network is trained on patches of one scale, the other on patches scaled to
between 60 and 120 %, three times each.  Statistic: the correlation of a smear's map at 100 % with its map at 80 (60) %,
brought back to the same size; a network that copes sees the same cells.  Proof: accuracy with labels on patches at
these scales.  The test compares smears, each network's correlations averaged over its three trainings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from network import STEPS, accuracy, train
from outcomes import GROUPS, p_text, read_options, show, write_figure, write_rows, write_table
from patches import SIZE, Group, Picture, count_pixels, draw_patches, read_blood, split, typical_area
from PIL import Image
from scipy.stats import wilcoxon
from sliding import make_maps

PRESET = "epsilon-alpha2-beta1"
CLASS_NAME = "platelet"
SCALES = (1.0, 0.8, 0.6)
SIDES = (40, 48, 56, 64, 72, 80)  # of patches that are scaled to SIZE: 120 to 60 %
TRAINED = {"fixed": "one scale", "varied": "scales of 60 to 120 %"}


def groups_of(pictures: Sequence[Picture], side: int) -> list[Group]:
    """With and without the class, for patches of this side."""
    least = typical_area(pictures, CLASS_NAME) / 2
    counts = [count_pixels(picture.mask(CLASS_NAME), side) for picture in pictures]
    there, not_there = ([np.argwhere(rule(c)) for c in counts] for rule in (lambda c: c >= least, lambda c: c == 0))
    return [Group(1, tuple(there)), Group(0, tuple(not_there))]


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixels (H, W, 3) uint8, or a map (H, W), in another size (height, width)."""
    kept = pixels if pixels.ndim == 3 else pixels.astype(np.float32)
    return np.asarray(Image.fromarray(kept).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def scaled(pictures: Sequence[Picture], scale: float) -> list[Picture]:
    """The pictures at another scale; their cells are not needed and stay as they are."""
    if scale == 1:
        return list(pictures)
    size = tuple(round(scale * side) for side in pictures[0].pixels.shape[:2])
    return [replace(p, pixels=resize(p.pixels, (size[0], size[1]))) for p in pictures]


def agree(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> np.ndarray:
    """Correlation of the maps of each picture, (n,), the second ones brought to the size of the first."""
    pairs = [(one, resize(other, (one.shape[0], one.shape[1]))) for one, other in zip(first, second, strict=True)]
    return np.array([np.corrcoef(one.ravel(), other.ravel())[0, 1] for one, other in pairs])


def draw(picture: Picture, maps: dict[tuple[str, float], np.ndarray], agreement: dict[str, np.ndarray],
         rows: list[dict[str, Any]]) -> Any:  # fmt: skip
    figure, axes = plt.subplots(2, 5, figsize=(14, 4.4), width_ratios=(1, 1, 1, 1.1, 1.1))
    colours = dict(zip(TRAINED, (GROUPS[1], GROUPS[0]), strict=True))
    for line, (kind, name) in zip(axes, TRAINED.items(), strict=True):
        for axis, scale in zip(line, SCALES, strict=False):
            show(axis, maps[kind, scale])
            cells = picture.mask(CLASS_NAME)
            axis.contour(resize(cells.astype(float), maps[kind, scale].shape), [0.5], colors="#0b7a3b", linewidths=1.1)
            axis.set_title(f"map at {scale:.0%}" if kind == "fixed" else "")
        line[0].set_ylabel(f"trained on\n{name}", color=colours[kind])
    for axis in axes[:, 3:].ravel():
        axis.remove()
    left, right = (figure.add_subplot(axes[0, 0].get_gridspec()[:, column]) for column in (3, 4))
    boxes = [agreement[kind][:, i] for i in range(len(SCALES) - 1) for kind in TRAINED]
    drawn = left.boxplot(boxes, positions=[0, 0.8, 2.2, 3], widths=0.6, patch_artist=True,
                         flierprops={"markersize": 2, "markeredgecolor": "#8a939b"},
                         medianprops={"color": "black"})  # fmt: skip
    for number, box in enumerate(drawn["boxes"]):
        box.set_facecolor(list(colours.values())[number % 2])
        box.set_alpha(0.55)
    left.set_xticks([0.4, 2.6], ["80 %", "60 %"])
    left.set_title("no labels: agreement\nwith the map at 100 %")
    for kind, colour in colours.items():
        mine = [row for row in rows if row["trained"] == kind]
        for row in mine:
            values = [row[f"accuracy_{round(100 * scale)}"] for scale in SCALES]
            right.plot(range(len(SCALES)), values, "o-", color=colour, lw=1.2, ms=4,
                       label=TRAINED[kind] if row is mine[0] else None)  # fmt: skip
    right.set_xticks(range(len(SCALES)), [f"{scale:.0%}" for scale in SCALES])
    right.set_title("with labels: accuracy")
    right.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    return figure


def main() -> None:
    options = read_options(__doc__)
    known, held = split(read_blood(limit=60 if options.quick else None))
    places = {side: groups_of(known, side) for side in SIDES}

    def give(n: int, rng: np.random.Generator, sides: Sequence[int] = SIDES) -> Any:
        side = int(rng.choice(sides))
        patches, labels, _ = draw_patches(known, places[side], n, rng, side)
        return np.stack([resize(patch, (SIZE, SIZE)) for patch in patches]), labels

    asked = {}
    for scale in SCALES:
        side = round(SIZE / scale)
        count = 200 if options.quick else 1500
        patches, labels, _ = draw_patches(held, groups_of(held, side), count, np.random.default_rng(7), side)
        asked[scale] = (np.stack([resize(patch, (SIZE, SIZE)) for patch in patches]), labels)
    shown = [picture for picture in held if picture.mask(CLASS_NAME).any()][: 8 if options.quick else 60]
    rows, agreements, examples = [], {}, {}
    for kind in TRAINED:
        sides = (SIZE,) if kind == "fixed" else SIDES
        several = []
        for seed in range(1 if options.quick else 3):
            model = train(lambda n, rng, sides=sides: give(n, rng, sides), f"scaling_{kind}", seed,
                          40 if options.quick else STEPS, options.keep)  # fmt: skip
            maps = {scale: make_maps(PRESET, model, scaled(shown, scale), options.keep) for scale in SCALES}
            several.append(np.stack([agree(maps[1.0], maps[scale]) for scale in SCALES[1:]], 1))
            rows.append({
                "trained": kind, "seed": seed,
                **{f"agreement_{round(100 * scale)}": float(np.nanmedian(several[-1][:, i]))
                   for i, scale in enumerate(SCALES[1:])},
                **{f"accuracy_{round(100 * scale)}": accuracy(model, *asked[scale]) for scale in SCALES},
                "pictures": len(shown), "patches": len(asked[1.0][1]),
            })  # fmt: skip
            print(rows[-1], flush=True)
            if seed == 0:
                examples |= {(kind, scale): maps[scale] for scale in SCALES}
        agreements[kind] = np.nan_to_num(np.mean(several, 0))
    ps = [float(wilcoxon(*(agreements[kind][:, i] for kind in TRAINED)).pvalue) for i in range(len(SCALES) - 1)]
    for row in rows:
        row |= {"p_80": ps[0], "p_60": ps[1]}
    write_rows(options, "scaling", rows)

    def span(kind: str, name: str, form: str) -> str:
        """Mean of the trainings, and the least and greatest."""
        values = [row[name] for row in rows if row["trained"] == kind]
        return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"

    head = ["trained on", "agreement of maps at 80 %", "at 60 %", "accuracy at 100 %", "at 80 %", "at 60 %"]
    table = [
        [name, span(kind, "agreement_80", ".2f"), span(kind, "agreement_60", ".2f"),
         *(span(kind, f"accuracy_{round(100 * scale)}", ".1%") for scale in SCALES)]
        for kind, name in TRAINED.items()
    ]  # fmt: skip
    table.append([f"p, Wilcoxon, {len(shown)} smears", p_text(ps[0]), p_text(ps[1]), "", "", ""])
    write_table(options, "scaling", head, table)
    crowded = int(np.argmax([(picture.kinds == CLASS_NAME).sum() for picture in shown]))
    example = {key: maps[crowded] for key, maps in examples.items()}
    write_figure(options, "scaling", draw(shown[crowded], example, agreements, rows))


if __name__ == "__main__":
    main()
