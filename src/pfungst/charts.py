"""Small SVG charts of a report, as text: they scale, need no script, and take their colours from the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

_MOST_POINTS = 1500

# The colours of charts and pages on a light and on a dark ground: for marks (accent, rest), verdicts, and groups
# (g0 to g5, which a legend names too: no chart says anything by colour alone).  Groups were searched for so that the
# common kinds of colour blindness tell all six and the rest apart, and for a contrast of 4.5 with the ground.
COLOURS = {
    "light": {
        "accent": "#2a5d9f", "good": "#1f7a4d", "bad": "#b3261e", "open": "#8a6100", "rest": "#b9c0c7",
        "g0": "#e40084", "g1": "#0c6cfc", "g2": "#0c7860", "g3": "#9c540c", "g4": "#7824a8", "g5": "#183c60",
    },
    "dark": {
        "accent": "#7db3f0", "good": "#5cc692", "bad": "#ff8a80", "open": "#e2b84b", "rest": "#59626b",
        "g0": "#e46c3c", "g1": "#7890fc", "g2": "#84f0c0", "g3": "#fcb418", "g4": "#b484a8", "g5": "#ccb4fc",
    },
}  # fmt: skip
VERDICT_COLOURS = {"confirmed": "bad", "refuted": "good", "open": "open"}


def write_colours(ground: str) -> str:
    """The colours on a ``light`` or ``dark`` ground as CSS variables: ``--accent:#2a5d9f; ...``."""
    return " ".join(f"--{name}:{value};" for name, value in COLOURS[ground].items())


def draw_spectrum(eigenvalues: Sequence[float], clusters: int) -> str:
    """Eigenvalues as bars, those that speak for clusters in colour."""
    shown = list(eigenvalues)[:12]
    top = max([*shown, 1e-9])
    bars = []
    for i, value in enumerate(shown):
        height = max(1.5, 90 * value / top)
        kind = "bar-c" if i < clusters else "bar"
        bars.append(
            f'<rect class="{kind}" x="{30 + i * 22}" y="{100 - height:.1f}" width="15" height="{height:.1f}" rx="2">'
            f"<title>λ{i + 1} = {value:.4f}</title></rect>"
            f'<text x="{37.5 + i * 22}" y="113" text-anchor="middle">{i + 1}</text>'
        )
    axis = f'<text x="26" y="14" text-anchor="end">{top:.2f}</text><text x="26" y="103" text-anchor="end">0</text>'
    line = '<line class="axis" x1="28" x2="296" y1="100" y2="100"/>'
    label = f"Eigenvalues of the neighbour graph; the gap speaks for {clusters} cluster{'s' * (clusters != 1)}"
    return f'<svg viewBox="0 0 300 118" role="img" aria-label="{label}">{line}{axis}{"".join(bars)}</svg>'


def draw_map(x: Sequence[float], y: Sequence[float], groups: Sequence[int], names: Mapping[int, str]) -> str:
    """Scatter of samples; ``groups``: -1 for the rest (drawn first, grey), else the number of a colour."""
    points = np.column_stack([x, y]).astype(float)
    if len(points) == 0:
        return ""
    order = np.argsort(np.asarray(groups), kind="stable")
    if len(order) > _MOST_POINTS:
        rest = order[np.asarray(groups)[order] < 0]
        drop = np.random.default_rng(0).permutation(rest)[: len(order) - _MOST_POINTS]
        order = order[~np.isin(order, drop)]
    low, span = points.min(0), np.maximum(np.ptp(points, 0), 1e-9)
    places = 8 + (points - low) / span * (284, 184)
    dots = "".join(
        f'<circle class="g{groups[i] % 6 if groups[i] >= 0 else "r"}" cx="{places[i, 0]:.1f}" cy="{places[i, 1]:.1f}" '
        f'r="{2.6 if groups[i] >= 0 else 2}"/>'
        for i in order
    )
    said = ", ".join(names.values()) or "no finding"
    label = f"t-SNE map of the class, coloured: {escape(said)}"
    return f'<svg viewBox="0 0 300 200" role="img" aria-label="{label}">{dots}</svg>'


def draw_effects(evidence: Sequence[Mapping[str, Any]]) -> str:
    """One row a test: control (ring), treated (dot), and the effect's 95 % interval (bar) as seen from the ring.

    A bar that does not reach its ring is an effect beyond chance.
    """
    bars = [[e["control"] + end for end in e["interval"]] for e in evidence]
    values = [v for e, bar in zip(evidence, bars, strict=True) for v in (e["treated"], e["control"], *bar, 0.0)]
    low, high = min(values), max(values)
    pad = 0.06 * (high - low or 1)
    low, high = low - pad, high + pad

    def at(value: float) -> float:
        return 180 + 300 * (value - low) / (high - low)

    rows = []
    for i, e in enumerate(evidence):
        y = 18 + 24 * i
        ends = [at(v) for v in bars[i]]
        rows.append(
            f'<text x="168" y="{y + 4}" text-anchor="end">{escape(e["test"])}</text>'
            f'<line class="interval" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y}" y2="{y}"/>'
            f'<circle class="control" cx="{at(e["control"]):.1f}" cy="{y}" r="4.5"/>'
            f'<circle class="treated" cx="{at(e["treated"]):.1f}" cy="{y}" r="4.5"/>'
        )
    bottom = 18 + 24 * len(evidence)
    zero = f'<line class="axis" x1="{at(0):.1f}" x2="{at(0):.1f}" y1="6" y2="{bottom - 8}"/>'
    ticks = "".join(
        f'<text x="{at(v):.1f}" y="{bottom + 6}" text-anchor="middle">{v:+.1f}</text>'
        for v in (low + pad, high - pad)
        if abs(at(v) - at(0)) > 24
    )
    ticks += f'<text x="{at(0):.1f}" y="{bottom + 6}" text-anchor="middle">0</text>'
    label = "Change of the score by each test, with its control and the interval of the difference"
    return (
        f'<svg class="effects" viewBox="0 0 490 {bottom + 12}" role="img" aria-label="{label}">'
        f"{zero}{''.join(rows)}{ticks}</svg>"
    )


def draw_flipping(curves: Mapping[str, Any], shares: Any, top: float, title: str) -> str:
    """Mean curves of a method as its picture is flipped: by order, over the share replaced; 0 to ``top``."""
    kinds = {"most relevant first": "most", "least relevant first": "least", "random order": "chance"}
    span = float(shares[-1]) or 1.0
    lines, said = [], []
    for name, curve in curves.items():
        points = [
            f"{30 + 180 * float(share) / span:.1f},{108 - 96 * float(value) / (top or 1):.1f}"
            for share, value in zip(shares, curve, strict=True)
        ]
        lines.append(f'<polyline class="{kinds.get(name, "most")}" points="{" ".join(points)}"/>')
        area = float(np.trapezoid(np.asarray(curve, float), np.asarray(shares, float))) / span
        said.append(f"{name}: area {area:.3f}")
    axes = '<path class="axis" d="M30 12V108H210" fill="none"/>'
    ticks = (
        f'<text x="26" y="16" text-anchor="end">{top:.2g}</text><text x="26" y="110" text-anchor="end">0</text>'
        f'<text x="30" y="122">0</text><text x="210" y="122" text-anchor="end">{100 * span:.0f} % replaced</text>'
    )
    label = escape(f"{title}, probability as the picture is replaced; {'; '.join(said)}")
    return f'<svg viewBox="0 0 220 126" role="img" aria-label="{label}">{axes}{ticks}{"".join(lines)}</svg>'
