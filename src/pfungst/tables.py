"""An evaluation as a table: means with bootstrap intervals over pictures, and whether a method beats its controls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pfungst.quality.measures import MEASURES, Figure

DRAWS = 2000
FEW = 8  # pictures below which nothing is said of controls


@dataclass
class Scored:
    """Scores of every picture, by method and figure.

    ids       of the pictures, (n,)
    values    values[method][figure] is (n,) float64, NaN where not defined
    curves    curves[method][measure][title] is (n, steps); shares[measure] is (steps,)
    kinds     preset, baseline, control or own, by method
    seconds   for one map of each method, on this machine
    chosen    name of the preset that a method chose, for those that choose one (``auto``)
    left_out  methods and measures that could not be done, with the reason
    pictures  some pictures (k, H, W, 3) in 0 to 1, ``maps[method]`` (k, H, W) their maps, ``shown`` their names
    """

    ids: list[str] = field(default_factory=list)
    values: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    curves: dict[str, dict[str, dict[str, np.ndarray]]] = field(default_factory=dict)
    shares: dict[str, np.ndarray] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    measures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    pictures: np.ndarray = field(default_factory=lambda: np.zeros((0, 1, 1, 3)))
    maps: dict[str, np.ndarray] = field(default_factory=dict)
    shown: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Cell:
    """One figure of one method.

    ``mean`` over the ``n`` pictures that have it, with the ends of its bootstrap interval.
    ``worse_than``: the controls that it does not beat (paired bootstrap over pictures); None for controls themselves,
    for figures of which neither high nor low is better, and for fewer than 8 pictures.
    """

    mean: float
    low: float
    high: float
    n: int
    worse_than: tuple[str, ...] | None = None


@dataclass(frozen=True, repr=False)
class Table:
    """``cells[method][figure]``; ``figures`` in their order; methods sorted by the first figure, controls last.

    ``titles``: what people are told of a method: its name, and what it chose.
    """

    methods: tuple[str, ...]
    figures: dict[str, Figure]
    cells: dict[str, dict[str, Cell]]
    titles: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """The main figures as text, with † where controls are not beaten."""
        names = [name for name, figure in self.figures.items() if figure.main]
        rows = [["", *(self.figures[name].title for name in names)]]
        rows += [
            [self.titles.get(method, method), *(write_cell(self.cells[method].get(name)) for name in names)]
            for method in self.methods
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(names) + 1)]
        return "\n".join(
            "  ".join(
                text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


def tabulate(evaluation: Scored, level: float = 0.95, seed: int = 0) -> Table:
    """The table of an evaluation; the same seed gives the same intervals."""
    n = len(evaluation.ids)
    weights = draw_weights(n, seed)
    tails = [(1 - level) / 2, (1 + level) / 2]
    figures = {name: figure for one in evaluation.measures for name, figure in MEASURES[one].figures.items()}
    controls = [name for name, kind in evaluation.kinds.items() if kind == "control"]
    cells: dict[str, dict[str, Cell]] = {}
    for method, values in evaluation.values.items():
        cells[method] = {}
        for name, figure in figures.items():
            if name not in values:
                continue
            own = values[name]
            low, high = _interval(own, weights, tails)
            worse = None
            if figure.better and method not in controls and np.isfinite(own).sum() >= FEW:
                sign = 1 if figure.better == "high" else -1
                others = {c: evaluation.values[c][name] for c in controls if name in evaluation.values[c]}
                gains = {c: _interval(sign * (own - theirs), weights, tails)[0] for c, theirs in others.items()}
                worse = tuple(control for control, gain in gains.items() if not gain > 0)
            defined = np.isfinite(own)
            mean = float(own[defined].mean()) if defined.any() else float("nan")
            cells[method][name] = Cell(mean, low, high, int(defined.sum()), worse)
    titles = {m: f"{m}: {evaluation.chosen[m]}" if m in evaluation.chosen else m for m in cells}
    return Table(_sort(evaluation, figures, cells), figures, cells, titles)


def draw_weights(n: int, seed: Any) -> np.ndarray:
    """How often each of ``n`` pictures is drawn, by draw of the bootstrap: (DRAWS, n)."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(float)


def resample_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of (n,) values in each draw (draws, n), over the pictures that have one; NaN where a draw has none."""
    defined = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        means: np.ndarray = (weights @ np.where(defined, values, 0)) / (weights @ defined)
    return means


def _interval(values: np.ndarray, weights: np.ndarray, tails: list[float]) -> tuple[float, float]:
    """Ends of the bootstrap interval of the mean over the pictures that have a value."""
    if not np.isfinite(values).any():
        return float("nan"), float("nan")
    low, high = np.nanquantile(resample_mean(values, weights), tails)
    return float(low), float(high)


def _sort(evaluation: Scored, figures: dict[str, Figure], cells: dict[str, dict[str, Cell]]) -> tuple[str, ...]:
    first = next((name for name, figure in figures.items() if figure.better), None)

    def key(method: str) -> tuple[bool, float]:
        cell = cells[method].get(first) if first is not None else None
        mean = cell.mean if cell is not None and np.isfinite(cell.mean) else -np.inf
        return evaluation.kinds[method] == "control", -mean if first and figures[first].better == "high" else mean

    return tuple(sorted(cells, key=key))


def warn(found: Scored) -> list[str]:
    """What a reader of the figures should know: few pictures, masks that say nothing, maps that are not defined."""
    notes = []
    if len(found.ids) < 20:
        notes.append(f"{len(found.ids)} pictures are few: intervals over them are rough")
    masses = [values["mass"] for values in found.values.values() if "mass" in values]
    if masses and not any(np.isfinite(mass).any() for mass in masses):
        notes.append("localisation is not defined: no picture has a mask with an object that does not fill it")
    for method, values in found.values.items():
        broken = int(np.isnan(values["entropy"]).sum()) if "entropy" in values else 0
        if broken:
            notes.append(f"{method}: {broken} of {len(found.ids)} maps are empty, or not finite")
    return notes


def write_cell(cell: Cell | None, whole: int = 0) -> str:
    """A cell as short text: its mean, † where it does not beat its controls, n where that is less than ``whole``."""
    if cell is None:
        return ""
    few = f" (n = {cell.n})" if 0 < cell.n < whole else ""
    return write_number(cell.mean) + (" †" if cell.worse_than else "") + few


def write_number(value: float) -> str:
    """A mean as tables show it: three significant digits, "-" for what is not defined."""
    if not np.isfinite(value):
        return "-"
    if abs(value) >= 1e4 or 1e-12 < abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"
