"""The map of samples as a person uses it: in a browser, by mouse and by keyboard."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import needs_browser, serve
from PIL import Image
from test_viewer_map import N, make_run

from pfungst.viewer.opened import OpenRun
from pfungst.viewer.server import Viewer, make_app

pytest.importorskip("playwright.sync_api")
pytestmark = needs_browser


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of a small run, in a thread."""
    app = make_app(Viewer([OpenRun(make_run(tmp_path_factory.mktemp("viewer")))]), "t")
    yield from serve(app, "t")


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    found = browser.new_page(viewport={"width": 1200, "height": 800})
    found.set_default_timeout(8000)
    errors: list[str] = []
    found.on("pageerror", lambda error: errors.append(str(error)))
    yield found
    found.close()
    assert not errors


def show(page: Any, address: str, state: str = "") -> None:
    page.goto(f"{address}#view=map&{state}")
    page.locator(".plot > p", has_text="samples shown").wait_for()


def told(page: Any, pattern: str) -> int:
    """A number in the line under the map, as soon as it is there."""
    line = page.locator(".plot > p", has_text=re.compile(pattern))
    line.wait_for()
    return int(re.search(pattern, line.inner_text()).group(1).replace(",", ""))  # type: ignore[union-attr]


def drag(page: Any, corners: list[tuple[float, float]]) -> None:
    """The mouse along these corners, as shares of the canvas."""
    box = page.locator(".surface canvas").bounding_box()
    for step, (x, y) in enumerate(corners):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        if not step:
            page.mouse.down()
    page.mouse.up()


def marks(page: Any) -> int:
    """Pixels of the map that are not of its ground."""
    time.sleep(0.3)
    picture = np.asarray(Image.open(io.BytesIO(page.locator(".surface canvas").screenshot())).convert("RGB"))
    return int((np.abs(picture.astype(int) - 255).max(-1) > 60).sum())


SQUARE = [(0.01, 0.01), (0.99, 0.01), (0.99, 0.99), (0.01, 0.99)]
LEFT = [(0.01, 0.01), (0.5, 0.01), (0.5, 0.99), (0.01, 0.99)]


def test_lassos_add_up_and_a_short_link_brings_them_back(page: Any, address: str, browser: Any) -> None:
    show(page, address)
    assert told(page, r"([\d,]+) of 120") == 80
    drag(page, LEFT)
    left = told(page, r"([\d,]+) selected")
    assert 0 < left < 80
    page.keyboard.down("Shift")
    drag(page, SQUARE)
    page.keyboard.up("Shift")
    assert told(page, r"(80) selected") == 80
    page.keyboard.down("Alt")
    drag(page, LEFT)
    page.keyboard.up("Alt")
    assert told(page, rf"({80 - left}) selected") == 80 - left
    page.wait_for_url("**chosen=*")
    page.locator(".gallery figcaption").nth(min(80 - left, 24) - 1).wait_for()
    with page.expect_download() as download:
        page.locator(".gallery a", has_text="CSV").click()
    assert Path(download.value.path()).read_text().count("\n") == 81 - left
    time.sleep(0.5)
    assert len(page.url.split("#")[1]) < 80
    other = browser.new_page()
    show(other, address, page.url.split("#")[1])
    assert told(other, r"([\d,]+) selected") == 80 - left
    other.close()


def test_filtered_points_stay_grey_and_are_not_selected(page: Any, address: str) -> None:
    show(page, address, "colour=label")
    before = marks(page)
    page.get_by_label("only dog").click()
    assert told(page, r"(\d+) filtered out") == 40
    assert 0 < marks(page) < before
    page.get_by_role("checkbox", name="cat").check()
    page.get_by_role("checkbox", name="dog").uncheck()
    page.wait_for_url("**only=label%3A0*")
    page.get_by_role("checkbox", name="cat").click()  # the last one: all are shown again
    page.get_by_role("checkbox", name="cat").uncheck()
    page.wait_for_url("**only=label%3A%210*")  # all but one, however many there are
    assert told(page, r"(\d+) filtered out") == 40
    page.locator("button", has_text="box").click()
    drag(page, [SQUARE[0], SQUARE[2]])
    assert told(page, r"(\d+) selected") == 40
    page.locator("label", has_text="Colour").locator("select").select_option("probability")
    page.get_by_label("label not: cat ×: remove this filter").wait_for()
    page.locator(".range input").first.fill("0.5")
    page.locator(".range input").first.press("Enter")
    assert told(page, r"\b([123]?\d) of 120") < 40


def test_a_finding_is_counted_and_selected_with_all_its_members(page: Any, address: str) -> None:
    show(page, address, "colour=finding")
    rows = page.locator(".groups tbody tr")
    page.locator(".groups td", has_text="7").first.wait_for()
    assert [row.locator("td").first.inner_text() for row in rows.all()] == ["5", "7", "4", "70"]
    names = [row.locator("th label").inner_text().replace("\n", " ") for row in rows.all()]
    assert names == ["f001", "f002 5 coloured", "f003 0 coloured", "none"]
    page.get_by_label("select: select f003").click()
    assert told(page, r"(\d+) selected") == 4
    page.get_by_label("select f002").click()
    assert told(page, r"(\d+) selected") == 7
    page.get_by_label("only f003").click()
    assert told(page, r"(\d+) filtered out") == 76
    assert names[2] not in rows.nth(2).inner_text(), "those that only f003 lets through have its colour"
    page.get_by_role("checkbox", name="f002").check()
    assert told(page, r"(\d+) filtered out") == 73


def test_a_map_is_computed_on_request(page: Any, address: str) -> None:
    page.goto(f"{address}#view=map&layout=tsne:2&colour=label")
    page.locator("button", has_text="compute this map").click()
    assert told(page, r"(\d+) of 120 samples shown") == 40
    assert marks(page) > 100


def test_the_keyboard_does_all_of_it(page: Any, address: str) -> None:
    show(page, address, "colour=finding")
    page.locator(".surface canvas").focus()
    page.keyboard.press("a")
    assert told(page, r"(\d+) selected") == 80
    for _ in range(6):
        page.keyboard.press("+")
    page.keyboard.press("ArrowLeft")
    page.wait_for_url("**at=*")
    page.keyboard.press("a")
    assert told(page, r"\b([1-7]?\d) selected") < 80
    page.keyboard.press("Escape")
    page.locator(".gallery").wait_for(state="detached")
    page.keyboard.press("0")
    page.get_by_label("select f001").press("Enter")
    assert told(page, r"(\d+) selected") == 5


def test_views_are_saved_and_taken_up_again(page: Any, address: str) -> None:
    show(page, address, "colour=outlier&only=label:0")
    page.get_by_label("Name").fill("cats")
    page.locator("button", has_text="save view").click()
    link = page.locator(".saved a", has_text="cats")
    link.wait_for()
    page.goto(f"{address}#view=map")
    link.click()
    page.wait_for_url("**only=label%3A0*")
    page.get_by_label("delete view cats").click()
    link.wait_for(state="detached")


def test_points_come_back_after_the_graphics_card_was_lost(page: Any, address: str) -> None:
    show(page, address)
    before = marks(page)
    page.evaluate(
        "() => { const lost = document.querySelector('canvas').getContext('webgl2').getExtension('WEBGL_lose_context');"
        "lost.loseContext(); setTimeout(() => lost.restoreContext(), 200); }"
    )
    time.sleep(0.5)
    assert abs(marks(page) - before) <= 0.02 * before


def test_it_fits_a_telephone_and_shows_what_is_under_the_pointer(page: Any, address: str) -> None:
    page.set_viewport_size({"width": 400, "height": 800})
    show(page, address, "layout=pair:4:6")
    assert told(page, r"(\d+) of 120") == N
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    box = page.locator(".surface canvas").bounding_box()
    for step in range(40):
        place = box["x"] + box["width"] * (0.3 + 0.01 * step), box["y"] + box["height"] * 0.5
        page.mouse.move(*place)
        page.wait_for_timeout(160)
        if page.locator(".card b").count():
            break
    page.locator(".card b", has_text="png").wait_for()
