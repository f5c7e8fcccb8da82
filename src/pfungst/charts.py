"""Small charts of report, viewer and notebook, as text of SVG: they scale, need no script, and take the page's colours.

A page that shows one needs ``STYLE`` and the variables of ``write_colours``, --ink, --soft and --line.  All text that
is not of this module is escaped, so that a page may take a chart as it comes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

_MOST_POINTS = 1500
_MOST_BARS, _MOST_TICKS = 12, 7
_LONGEST = 28  # letters of a test's name that are written; the whole stands in the row's title

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


# A chart of effects is drawn twice, and the room that it gets says which is seen; on paper it is always the wide one.
# No rule is for a bare tag of the page around it, and no attribute is a style: what a content policy may forbid.
STYLE = """
.pfungst-chart { container-type: inline-size; max-width: 340px; margin: 4px 0; }
.pfungst-chart.effects { max-width: 700px; }
.pfungst-chart svg { display: block; width: 100%; height: auto; }
.pfungst-chart svg.narrow { display: none; }
.pfungst-chart text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.pfungst-chart text.needed { fill: var(--ink); font-weight: 600; }
.pfungst-chart .axis { stroke: var(--line); stroke-width: 1.3; }
.pfungst-chart .interval { stroke: var(--accent); stroke-width: 7; opacity: 0.3; stroke-linecap: round; }
.pfungst-chart .treated { fill: var(--accent); }
.pfungst-chart .control { fill: none; stroke: var(--soft); stroke-width: 1.6; }
.pfungst-chart .bar, .pfungst-chart .gr { fill: var(--rest); }
.pfungst-chart .bar.chosen { fill: var(--accent); }
.pfungst-chart .key { color: var(--soft); font-size: 0.86em; margin: 2px 0 8px; }
.pfungst-chart .key .mark { color: var(--accent); }
@container (max-width: 520px) {
  .pfungst-chart svg.narrow { display: block; }
  .pfungst-chart svg.wide { display: none; }
}
@media print {
  .pfungst-chart svg.wide { display: block !important; }
  .pfungst-chart svg.narrow { display: none !important; }
}
""" + "\n".join(f".pfungst-chart .g{i} {{ fill: var(--g{i}); }}" for i in range(6))


def draw_spectrum(eigenvalues: Sequence[float], clusters: int) -> str:
    """Eigenvalues as bars, those that speak for clusters in colour."""
    shown = list(eigenvalues)[:_MOST_BARS]
    top = max([*shown, 1e-9])
    bars = []
    for i, value in enumerate(shown):
        height = max(1.5, 90 * value / top)
        bars.append(
            f'<rect class="bar{" chosen" * (i < clusters)}" x="{30 + i * 22}" y="{100 - height:.1f}" width="15" '
            f'height="{height:.1f}" rx="2"><title>λ{i + 1} = {value:.4f}</title></rect>'
            f'<text x="{37.5 + i * 22}" y="113" text-anchor="middle">{i + 1}</text>'
        )
    axis = f'<text x="26" y="14" text-anchor="end">{top:.2f}</text><text x="26" y="103" text-anchor="end">0</text>'
    line = '<line class="axis" x1="28" x2="296" y1="100" y2="100"/>'
    label = f"Eigenvalues of the neighbour graph; the gap speaks for {clusters} cluster{'s' * (clusters != 1)}"
    return _frame("spectrum", f'<svg viewBox="0 0 300 118" {_label(label)}>{line}{axis}{"".join(bars)}</svg>')


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
    label = f"t-SNE map of the class, coloured: {said}"
    return _frame("map", f'<svg viewBox="0 0 300 200" {_label(label)}>{dots}</svg>')


@dataclass(frozen=True)
class _Form:
    """How a chart of effects is laid out, in its own pixels; ``left``: where its axis may begin."""

    name: str
    width: int
    left: int
    step: int  # from row to row
    above: bool  # names stand above their lines, not before them


_FORMS = (_Form("wide", 640, 178, 26, False), _Form("narrow", 360, 16, 40, True))


def draw_effects(evidence: Sequence[Mapping[str, Any]], needed: Collection[str] = ()) -> str:
    """One row a test: control (ring), treated (dot), and the effect's 95 % interval (bar) as seen from the ring.

    A bar that does not reach its ring is an effect beyond chance.  evidence: as ``evidence.describe_verdict`` has it;
    needed: the tests that decide, which are written bold.  Below is said how to read it.  "" where there is no test.
    """
    if not evidence:
        return ""
    told = (f"{e['test']}: {e['treated']:+.2f}, control {e['control']:+.2f}" for e in evidence)
    label = _label(f"Change of the class's score. {'; '.join(told)}")
    decide = " Bold tests decide." * any(e["test"] in needed for e in evidence)
    key = (
        '<p class="key">Change of the class\'s score: <span class="mark">●</span> treated, ○ its control. The bar is '
        "the 95 % interval of their difference, drawn from the control: where it does not reach the ring, the effect "
        f"is beyond chance.{decide}</p>"
    )
    return _frame("effects", "".join(_draw_form(form, evidence, needed, label) for form in _FORMS) + key)


def _draw_form(form: _Form, evidence: Sequence[Mapping[str, Any]], needed: Collection[str], label: str) -> str:
    ends = [[e["control"] + end for end in e["interval"]] for e in evidence]
    values = [v for e, pair in zip(evidence, ends, strict=True) for v in (e["treated"], e["control"], *pair)]
    values = list(filter(_is_drawable, values))
    low, high = min([*values, 0.0]), max([*values, 0.0])
    if low == high:
        low, high = -1.0, 1.0

    def at(value: float) -> str:
        return f"{form.left + (form.width - form.left - 24) * (value - low) / (high - low):.1f}"

    rows, bold = [], ' class="needed"'
    for i, (e, pair) in enumerate(zip(evidence, ends, strict=True)):
        y = form.step * (i + 1) - 10
        place = f'x="0" y="{y - 13}"' if form.above else f'x="{form.left - 10}" y="{y + 4}" text-anchor="end"'
        name = e["test"] if len(e["test"]) <= _LONGEST else f"{e['test'][: _LONGEST - 1]}…"
        effect = f"effect {e['effect']:+.2f} ({e['interval'][0]:+.2f} to {e['interval'][1]:+.2f})"
        marks = [f'<circle class="{one}" cx="{at(e[one])}" cy="{y}" r="4.5"/>'
                 for one in ("control", "treated") if _is_drawable(e[one])]  # fmt: skip
        if all(map(_is_drawable, pair)):
            marks.insert(0, f'<line class="interval" x1="{at(pair[0])}" x2="{at(pair[1])}" y1="{y}" y2="{y}"/>')
        rows.append(
            f"<g><title>{escape(e['test'])}: {effect}, p = {e['p']:.2g}, n = {e['n']}</title>"
            f'<rect x="0" y="{y - form.step + 13}" width="{form.width}" height="{form.step}" fill="none" '
            'pointer-events="all"/>'
            f"<text {place}{bold * (e['test'] in needed)}>{escape(name)}</text>{''.join(marks)}</g>"
        )
    bottom = form.step * len(evidence) + 4
    ticks = "".join(
        f'<line class="axis" x1="{at(v)}" x2="{at(v)}" y1="{bottom - 4 if v else 4}" y2="{bottom}"/>'
        f'<text x="{at(v)}" y="{bottom + 14}" text-anchor="middle">{text}</text>'
        for v, text in round_ticks(low, high, _MOST_TICKS)
    )
    return f'<svg class="{form.name}" viewBox="0 0 {form.width} {bottom + 20}" {label}>{ticks}{"".join(rows)}</svg>'


def _is_drawable(value: float) -> bool:
    """Neither infinite nor nan, and no span between two of them overflows."""
    return abs(value) < 1e100


def round_ticks(low: float, high: float, most: int) -> list[tuple[float, str]]:
    """Multiples of 1, 2 or 5 times a power of ten between the two, ``most`` at most, and how they are written.

    ``low`` < ``high``; zero is one of them if it is between the two.
    """
    least = (high - low) / (most - 1)
    power = math.floor(math.log10(least))
    step = next(scale for scale in (m * 10.0**power for m in (1, 2, 5, 10)) if scale >= least * (1 - 1e-9))
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [(i * step, f"{i * step:+.{digits}f}" if i else "0") for i in numbers]


def _frame(kind: str, content: str) -> str:
    return f'<div class="pfungst-chart {kind}">{content}</div>'


def _label(text: str) -> str:
    return f'role="img" aria-label="{escape(text)}"'


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
