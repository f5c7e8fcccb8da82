"""The viewer's pages for trying something and for two runs, in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import needs_browser, serve, take

from pfungst.store import Run
from pfungst.viewer.laboratory import Asked
from pfungst.viewer.opened import OpenRun
from pfungst.viewer.server import Viewer, make_app

pytest.importorskip("playwright.sync_api")
pytestmark = needs_browser


@pytest.fixture(scope="module")
def runs(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The small audit, and once more without its last finding and with another verdict of the first."""
    root = tmp_path_factory.mktemp("page")
    before, after = (Path(shutil.copytree(finished, root / name)) for name in ("before", "after"))
    content = Run(after).read_json("findings.json")
    content["findings"] = [{**content["findings"][0], "verdict": "refuted"}]
    Run(after).write_json("findings.json", content)
    return [before, after]


@pytest.fixture(scope="module")
def address(runs: list[Path]) -> Iterator[str]:
    yield from serve(make_app(Viewer([OpenRun(path) for path in runs], Asked()), "token"), "token")


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(8000)
    yield page
    page.close()
    assert not errors


def drag(page: Any, board: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    """From one place of the board to another, in its pixels of 24 x 24."""
    frame = board.bounding_box()
    places = [(frame["x"] + frame["width"] * x / 24, frame["y"] + frame["height"] * y / 24) for x, y in (start, end)]
    page.mouse.move(*places[0])
    page.mouse.down()
    page.mouse.move(*places[1], steps=4)
    page.mouse.up()


def test_a_region_is_painted_cut_and_pasted(page: Any, address: str) -> None:
    page.goto(address + "#view=try")
    board = page.locator(".board canvas")
    board.wait_for()
    assert "the run's own model" in page.locator("main").inner_text()
    assert page.get_by_role("button", name="Cut", exact=True).is_disabled()  # nothing is painted
    page.get_by_role("button", name="rectangle").click()
    drag(page, board, (0.5, 0.5), (4.5, 4.5))
    page.get_by_role("button", name="Cut", exact=True).click()
    result = page.locator("section[aria-label=Result]")
    result.wait_for()
    told = result.inner_text()
    assert "the score of rose goes from" in told
    assert "4.3 % of the picture" in told  # 25 of 576
    assert "The same change where relevance is not" in told
    assert result.locator("canvas").count() == 2  # a map before and one after
    page.get_by_role("button", name="Paste", exact=True).click()
    result.get_by_role("heading", name="Pasted on sample").wait_for()
    assert "Taken for leaf before" in result.inner_text()
    assert "of the same class but of no finding of this one" in result.inner_text()
    take(page, "pasted")
    page.get_by_role("button", name="undo").click()
    assert page.get_by_role("button", name="Cut", exact=True).is_disabled()


_STROKES = r"""() => Object.fromEntries(["control", "halo", "bar", "bar.chosen"].map((name) => {
    const style = getComputedStyle(document.querySelector(`.scores .${name}`));
    const colour = name === "control" ? style.stroke : style.fill;
    return [name, colour.match(/[\d.]+/g).slice(0, 3).map(Number)];
}))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_controls_ring_is_seen_on_its_bar(page: Any, address: str, scheme: str) -> None:
    """The ring stands out from the ring of ground around it, and that from the bars; contrast as WCAG 2 has it."""
    page.emulate_media(color_scheme=scheme)
    page.goto(address + "#view=try")
    page.get_by_role("button", name="strongest part of the map").click()
    page.get_by_role("button", name="Cut", exact=True).click()
    page.locator(".scores .control").first.wait_for()
    colours = page.evaluate(_STROKES)
    assert _contrast(colours["control"], colours["halo"]) > 7
    assert _contrast(colours["halo"], colours["bar.chosen"]) > 3
    kinds = page.locator(".scores circle").evaluate_all("all => all.slice(0, 2).map((one) => one.className.baseVal)")
    assert kinds == ["halo", "control"], "the ring is drawn last"
    take(page, f"ring_{scheme}")


def _contrast(one: list[float], other: list[float]) -> float:
    def luminance(colour: list[float]) -> float:
        parts = [value / 255 for value in colour]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_region_is_painted_by_keyboard_alone(page: Any, address: str) -> None:
    page.goto(address + "#view=try&row=0")
    board = page.locator(".board canvas")
    painting = page.get_by_role("button", name="clear")
    page.get_by_role("button", name="polygon").press("Enter")
    board.focus()
    for key in ("Space", "Shift+ArrowRight", "Space", "Shift+ArrowDown", "Space", "Shift+ArrowLeft", "Space"):
        board.press(key)
    assert painting.is_disabled()  # four corners, not closed
    board.press("Escape")
    page.get_by_role("button", name="rectangle").press("Enter")
    board.press("Enter")
    board.press("Shift+ArrowUp")
    board.press("Enter")
    assert painting.is_enabled()
    page.get_by_role("button", name="Cut", exact=True).press("Enter")
    result = page.locator("section[aria-label=Result]")
    result.wait_for()
    assert "1.0 % of the picture" in result.inner_text()  # 6 of 576


def test_a_finding_of_ones_own_is_made_and_tested(page: Any, address: str, runs: list[Path]) -> None:
    page.goto(address + "#view=try")
    own = page.locator("section[aria-label='Findings of your own']")
    own.get_by_role("button", name="members of f001").click()
    own.get_by_label("Name").fill("mine")
    own.get_by_role("button", name="keep").click()
    card = page.locator("section[aria-label=mine]")
    card.get_by_role("button", name="test").click()
    card.locator(".chip").wait_for()
    first = Run(runs[0]).read_json("findings.json")["findings"][0]
    assert card.locator(".chip").inner_text() == first["verdict"]
    card.locator("summary").first.click()
    assert card.locator(".effects").is_visible()
    assert Run(runs[0]).read_json("own/mine.json")["samples"] == first["samples"]
    card.get_by_role("button", name="delete").click()
    card.wait_for(state="detached")


def test_two_runs_stand_side_by_side(page: Any, address: str, runs: list[Path]) -> None:
    page.goto(address + "#view=compare")
    page.get_by_role("button", name="f001 = f001").click()
    page.locator(".effects").nth(1).wait_for()
    chips = page.locator("section[aria-label=after] .chip").all_inner_texts()
    assert chips == ["refuted"]
    lost = Run(runs[0]).read_json("findings.json")["findings"][1:]
    assert page.locator("section[aria-label=Lost] li").count() == len(lost)
    page.get_by_role("combobox", name="Sample").fill("rose/03.png")
    page.get_by_role("button", name="show in both").click()
    page.locator(".sides.two canvas").nth(1).wait_for()
    page.locator(".sides.two .frame").first.dblclick()
    zooms = page.locator(".sides.two .inside").evaluate_all("all => all.map(one => one.style.transform)")
    assert zooms == ["scale(3)", "scale(3)"]  # both, by one double-click
    assert "sample=rose%2F03.png" in page.url


def test_one_run_has_nothing_to_compare_with_and_no_model_is_told(page: Any, runs: list[Path]) -> None:
    served = serve(make_app(Viewer([OpenRun(runs[0])]), "token"), "token")
    page.goto(next(served) + "#view=compare")
    page.locator("main").wait_for()
    assert page.locator("nav button").all_inner_texts() == ["Findings", "Map", "Try it"]
    page.get_by_role("button", name="Try it", exact=True).click()
    page.get_by_text("pfungst view RUN --model").wait_for()
    assert not page.locator(".board").count()
    next(served, None)
