"""Bias (a): labels taken from the cell in the middle of each patch make a network that looks at the middle.

    PFUNGST_DATA=... python benchmarks/microscopy/bias_centre.py                       # about three minutes on one core
    PFUNGST_DATA=... python benchmarks/microscopy/bias_centre.py --quick --out /tmp/centre

Planted: all training patches of tissue have nuclei, and a patch is "nucleus" if one lies in its very centre.  Repaired:
patches from the same pictures, labelled by whether there is a nucleus anywhere in them.  Seen: positive relevance on
the same held-out patches, which have a nucleus in the middle and others around it, so that both networks see their
class: how it is shared among nuclei by distance from the middle, and its centre of mass.  Tests compare pictures, not
patches.  (With patches from anywhere, many of them not of the first network's class, its positive relevance lay mostly
in two corners: a share of what there is says little where nothing speaks for the class.)
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from network import CLASS, STEPS, PatchNet, accuracy, to_inputs, train
from outcomes import GROUPS, p_text, read_options, show, write_figure, write_rows, write_table
from patches import SIZE, Group, by_centre, draw_patches, read_tissue, split, with_cells, without_cells
from scipy.stats import wilcoxon

from pfungst.methods import make_method

PRESETS = ("epsilon-alpha2-beta1", "epsilon-plus")  # the first for figure and table
KINDS = {"centre": "label of the centre", "whole": "label of the whole patch"}
DISTANCE = np.hypot(*(np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2))
RINGS = np.arange(0, 36, 4)


def positive_maps(model: PatchNet, preset: str, patches: np.ndarray) -> np.ndarray:
    """Positive relevance of each patch, which adds up to 1, (n, SIZE, SIZE); NaN where there is none."""
    method = make_method(preset, model)
    maps = [method(to_inputs(patches[i : i + 32]), CLASS).clamp(min=0).numpy() for i in range(0, len(patches), 32)]
    found = np.concatenate(maps).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return found / found.sum((1, 2), keepdims=True)


def measure(maps: np.ndarray, nuclei: np.ndarray) -> dict[str, np.ndarray]:
    """For each patch: distance of the centre of mass from the middle, share of relevance in the middle ninth.

    ``profile`` (n, rings): mean relevance of a nucleus's pixel at each distance over that of all nuclei in the patch.
    """
    rows, columns = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    away = np.hypot((maps * rows).sum((1, 2)), (maps * columns).sum((1, 2)))
    third = slice(SIZE // 3, 2 * SIZE // 3)
    on_nuclei = (maps * nuclei).sum((1, 2)) / nuclei.sum((1, 2))
    profile = []
    for low, high in itertools.pairwise(RINGS):
        ring = nuclei & (low <= DISTANCE) & (high > DISTANCE)
        with np.errstate(invalid="ignore", divide="ignore"):
            profile.append((maps * ring).sum((1, 2)) / ring.sum((1, 2)) / on_nuclei)
    return {"away": away, "middle": maps[:, third, third].sum((1, 2)), "profile": np.stack(profile, 1)}


def by_picture(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Mean over the patches of each picture."""
    return np.array([np.nanmean(values[numbers == number], 0) for number in np.unique(numbers)])


def draw(found: dict[str, dict[str, np.ndarray]], means: dict[str, np.ndarray]) -> Any:
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.3), width_ratios=(1, 1, 1.35, 1.35))
    for axis, name, heat in zip(axes, KINDS.values(), means.values(), strict=False):
        show(axis, heat, signed=False)
        axis.set_title(f"mean map:\n{name}")
    edges = np.arange(0, 18, 1)
    for (kind, name), colour in zip(KINDS.items(), (GROUPS[1], GROUPS[0]), strict=True):
        axes[2].hist(found[kind]["away"], edges, histtype="stepfilled", color=colour, alpha=0.45, label=name)
        axes[3].plot((RINGS[:-1] + RINGS[1:]) / 2, np.nanmean(found[kind]["profile"], 0), "o-", color=colour, lw=2)
    axes[2].set_xlabel("centre of mass, pixels from the middle")
    axes[2].set_ylabel("patches")
    axes[2].legend(frameon=False, fontsize=9)
    axes[3].axhline(1, color="#c8ccd0", zorder=0)
    axes[3].set_xlabel("distance from the middle, pixels")
    axes[3].set_ylabel("relevance of a nucleus's pixel")
    figure.tight_layout()
    return figure


def main() -> None:
    options = read_options(__doc__)
    known, held = split(read_tissue(limit=24 if options.quick else None))
    steps = 40 if options.quick else STEPS

    def groups(kind: str, pictures: Any) -> list[Group]:
        if kind == "centre":
            return list(by_centre(pictures, "nucleus"))
        return [with_cells(pictures, "nucleus"), without_cells(pictures, "nucleus")]

    rng = np.random.default_rng(3)
    inside, _ = by_centre(held, "nucleus")
    patches, _, origins = draw_patches(held, [inside], 200 if options.quick else 1000, rng)
    nuclei = np.stack([held[n].mask("nucleus")[y : y + SIZE, x : x + SIZE] for n, y, x in origins])
    models, right = {}, {}
    for kind in KINDS:
        chosen = groups(kind, known)
        models[kind] = train(lambda n, rng, chosen=chosen: draw_patches(known, chosen, n, rng)[:2], f"centre_{kind}",
                             steps=steps, keep=options.keep)  # fmt: skip
        asked, labels, _ = draw_patches(held, groups(kind, held), 1000, np.random.default_rng(4))
        right[kind] = accuracy(models[kind], asked, labels)
    flat = measure(nuclei / nuclei.sum((1, 2), keepdims=True), nuclei)
    rows = []
    for preset in PRESETS:
        maps = {kind: positive_maps(models[kind], preset, patches) for kind in KINDS}
        found = {kind: measure(maps[kind], nuclei) for kind in KINDS}
        rows += compare(found, flat, origins[:, 0], right, preset)
        if preset == PRESETS[0]:
            figure = draw(found, {kind: np.nanmean(maps[kind], 0) for kind in KINDS})
    write_rows(options, "bias_centre", rows)
    head = ["trained on", "accuracy by its own labels", "relevance in the middle ninth",
            "of a pixel of nuclei: within 8 pixels of the middle", "16 to 24 away",
            "centre of mass, pixels from the middle"]  # fmt: skip
    table = [
        [KINDS.get(row["labels"], "nuclei, all pixels alike"), row["accuracy"] and f"{row['accuracy']:.1%}",
         f"{row['middle_ninth']:.1%}", f"{row['near']:.2f}", f"{row['far']:.2f}", f"{row['centre_of_mass']:.1f}"]
        for row in rows[:3]
    ]  # fmt: skip
    tests = [p_text(rows[0][f"p_{what}"]) for what in ("middle_ninth", "near", "far", "centre_of_mass")]
    write_table(options, "bias_centre", head, [*table, [f"p, Wilcoxon, {rows[0]['pictures']} pictures", "", *tests]])
    write_figure(options, "bias-centre", figure)


def compare(found: dict[str, dict[str, np.ndarray]], flat: dict[str, np.ndarray], numbers: np.ndarray,
            right: dict[str, float], preset: str) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each kind of labels, and for maps that give all pixels of nuclei the same; p of the two kinds."""

    def numbers_of(one: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """(pictures,) of each measure."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a patch may have no nucleus in a ring
            near, far = (np.nanmean(one["profile"][:, part], 1) for part in (slice(0, 2), slice(4, 6)))
            named = {"middle_ninth": one["middle"], "near": near, "far": far, "centre_of_mass": one["away"]}
            return {what: by_picture(values, numbers) for what, values in named.items()}

    measured = {kind: numbers_of(one) for kind, one in {**found, "flat": flat}.items()}
    tests = {f"p_{what}": test(measured["centre"][what], measured["whole"][what]) for what in measured["flat"]}
    return [
        {"preset": preset, "labels": kind, "accuracy": right.get(kind, ""), "patches": len(numbers),
         "pictures": len(np.unique(numbers)), **{what: float(np.nanmean(values)) for what, values in one.items()},
         **tests}
        for kind, one in measured.items()
    ]  # fmt: skip


def test(first: np.ndarray, second: np.ndarray) -> float:
    """p of Wilcoxon's signed rank test of pictures in which both could be measured."""
    both = np.isfinite(first) & np.isfinite(second)
    return float(wilcoxon(first[both], second[both]).pvalue)


if __name__ == "__main__":
    main()
