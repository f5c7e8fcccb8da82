"""Where the outcomes go: rows to benchmarks/results, figures to docs/images, tables into the guide, between markers."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from pfungst import heatmaps

sys.path.append(str(Path(__file__).resolve().parents[1]))
from guides import replace_between

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guides" / "microscopy.md"
GROUPS = ("#0c6cfc", "#e40084", "#0c7860", "#9c540c", "#7824a8", "#183c60")  # pfungst.charts: apart for all eyes
REST = "#8a939b"

plt.rcParams.update({
    "figure.dpi": 110, "savefig.dpi": 110, "savefig.facecolor": "white", "font.size": 11, "axes.titlesize": 11,
    "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "pfungst",
})  # fmt: skip


def read_options(about: str | None) -> argparse.Namespace:
    """``--quick``, ``--keep`` and ``--out`` of every script here."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few pictures and steps: does it run?  Needs --out")
    parser.add_argument("--keep", type=Path, help="a folder for trained networks and maps, which are used again")
    parser.add_argument("--out", type=Path, help="write there instead of into docs and benchmarks/results")
    options = parser.parse_args()
    if options.quick and options.out is None:
        parser.error("--quick is not for publication: give --out FOLDER")
    return options


def write_rows(options: argparse.Namespace, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """A CSV with one row each, numbers to four digits."""
    folder = options.out or ROOT / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"microscopy_{name}.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: short(value) for key, value in row.items()} for row in rows)


def write_figure(options: argparse.Namespace, name: str, figure: Any) -> None:
    folder = options.out or ROOT / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"microscopy-{name}.png", bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def write_table(options: argparse.Namespace, name: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table of the guide: what stands between ``<!-- name -->`` and ``<!-- /name -->`` is replaced."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]
    table = "\n".join(lines)
    print(table + "\n")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"microscopy_{name}.md").write_text(table + "\n")
        return
    GUIDE.write_text(replace_between(GUIDE.read_text(), name, table))


def short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float | np.floating) else value


def p_text(p: float) -> str:
    """A p value as it is written in tables."""
    return f"{p:.2f}" if p >= 0.01 else f"{p:.0e}".replace("e-0", "e-")


def show(axis: Any, picture: np.ndarray, signed: bool = True, top: float | None = None) -> None:
    """A picture (H, W, 3), or a map (H, W): red speaks for the class, blue against it, white is 0.

    ``top``: the end of a map's scale; by default one in a hundred pixels lies beyond it.
    """
    if picture.ndim == 2:
        top = top or float(np.quantile(np.abs(picture), 0.99)) or 1.0
        picture = heatmaps.color(picture, top, "diverging" if signed else "sequential")
    axis.imshow(picture, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(True)
        spine.set_color("#c8ccd0")
