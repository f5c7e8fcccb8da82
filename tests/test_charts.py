"""Charts: marks stand where the numbers say, ticks are round, and no name breaks out of the text of SVG."""

from __future__ import annotations

import math
from typing import Any
from xml.etree import ElementTree

import pytest

from pfungst.charts import draw_effects, draw_map, draw_spectrum, round_ticks

EVIL = """</title></svg><script>alert('x')</script>" onload="alert(1)" '&amp;<"""


def row(test: str, treated: float, control: float, **more: Any) -> dict[str, Any]:
    effect = treated - control
    return {"test": test, "treated": treated, "control": control, "effect": effect, "p": 0.0002, "n": 30,
            "interval": [effect - 0.5, effect + 0.25], **more}  # fmt: skip


def parse(chart: str) -> ElementTree.Element:
    """The chart as XML, which is stricter than HTML; without the marks of its legend no tag but those of SVG."""
    root = ElementTree.fromstring(chart)
    assert {one.tag for one in root.iter()} <= {
        "div",
        "p",
        "span",
        "svg",
        "g",
        "title",
        "text",
        "line",
        "rect",
        "circle",
    }
    return root


@pytest.mark.parametrize("form", ["wide", "narrow"])
def test_marks_stand_where_the_axis_says(form: str) -> None:
    evidence = [row("cut:noise", -3.5, -2.0), row("cut:colour", -1.0, 0.1), row("paste:same place", 4.0, 1.5)]
    svg = parse(draw_effects(evidence, ["cut:colour"])).find(f"svg[@class='{form}']")
    assert svg is not None
    ticks = {float(str(one.text)): float(one.get("x", "")) for one in svg.findall("text")}
    scale = (ticks[2] - ticks[0]) / 2

    def value(place: str | None) -> float:
        return (float(str(place)) - ticks[0]) / scale

    for group, e in zip(svg.findall("g"), evidence, strict=True):
        for one in ("control", "treated"):
            circle = group.find(f"circle[@class='{one}']")
            assert circle is not None
            assert value(circle.get("cx")) == pytest.approx(e[one], abs=0.02)
        line = group.find("line")
        assert line is not None
        assert value(line.get("x1")) == pytest.approx(e["control"] + e["interval"][0], abs=0.02)
        assert value(line.get("x2")) == pytest.approx(e["control"] + e["interval"][1], abs=0.02)
    bold = [one.text for one in svg.iter("text") if one.get("class") == "needed"]
    assert bold == ["cut:colour"]
    assert "paste:same place: +4.00, control +1.50" in str(svg.get("aria-label"))
    width = float(str(svg.get("viewBox")).split()[2])
    assert all(0 <= float(one.get("cx", "")) <= width for one in svg.iter("circle"))


def test_the_legend_speaks_of_bold_tests_where_there_are_some() -> None:
    evidence = [row("cut:colour", -1.0, 0.1)]
    assert "Bold" in draw_effects(evidence, ["cut:colour"])
    assert "Bold" not in draw_effects(evidence)
    assert draw_effects([]) == ""


def test_names_do_not_break_out() -> None:
    root = parse(draw_effects([row(EVIL, 1.0, 0.0), row("x" * 500, 1.0, 0.0)], [EVIL]))
    titles = [str(one.text) for one in root.iter("title")]
    assert titles[0].startswith(EVIL), "the whole name, as text"
    assert all(EVIL in str(svg.get("aria-label")) for svg in root.iter("svg"))
    assert max(len(str(one.text)) for one in root.iter("text")) <= 28
    svg = parse(draw_map([0, 1], [0, 1], [0, -1], {0: EVIL})).find("svg")
    assert svg is not None
    assert EVIL in str(svg.get("aria-label"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e308])
def test_numbers_that_cannot_be_drawn_are_left_out(bad: float) -> None:
    root = parse(draw_effects([row("cut:colour", bad, -1.0), row("paste:same place", 1.0, -bad)]))
    for one in root.iter("circle"):
        assert math.isfinite(float(one.get("cx", "")))
    parse(draw_effects([row("nothing", 0.0, 0.0, interval=[0.0, 0.0])]))


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (-3.8, 4.9, ["-2", "0", "+2", "+4"]),
        (0, 1, ["0", "+0.2", "+0.4", "+0.6", "+0.8", "+1.0"]),
        (-6, 0, ["-6", "-5", "-4", "-3", "-2", "-1", "0"]),
        (-0.01, 0.02, ["-0.010", "-0.005", "0", "+0.005", "+0.010", "+0.015", "+0.020"]),
        (0, 1e6, ["0", "+200000", "+400000", "+600000", "+800000", "+1000000"]),
    ],
)
def test_ticks_are_round(low: float, high: float, told: list[str]) -> None:
    assert [text for _, text in round_ticks(low, high, 7)] == told


def test_bars_are_as_high_as_their_eigenvalues() -> None:
    root = parse(draw_spectrum([0.0, 0.25, 0.5] + [1.0] * 20, 2))
    bars = root.findall(".//rect")
    assert [float(one.get("height", "")) for one in bars[:4]] == [1.5, 22.5, 45, 90]
    assert len(bars) == 12
    assert [one.get("class") for one in bars[:3]] == ["bar chosen", "bar chosen", "bar"]
