"""The viewer's page in a real browser: findings by keyboard and mouse, at two widths, in light and dark."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import list_barriers, needs_browser, serve, take, watch_errors

from pfungst.judgements import read_judgements, write_judgement
from pfungst.reports import write_report
from pfungst.store import Run
from pfungst.viewer.opened import OpenRun
from pfungst.viewer.server import Viewer, make_app

pytest.importorskip("playwright.sync_api")
pytestmark = needs_browser
TOKEN = "a-token-of-this-test"


@pytest.fixture(scope="module")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("viewed") / "roses"))


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    yield from serve(make_app(Viewer([OpenRun(run)]), TOKEN), TOKEN)


@pytest.fixture
def page(browser: Any, address: str, run: Path) -> Iterator[Any]:
    """A page at 1280 x 900, on which no script failed and nothing broke the content security policy."""
    (run / "judgements.jsonl").unlink(missing_ok=True)
    opened, wrong = open_page(browser, address, 1280, "light")
    yield opened
    opened.context.close()
    assert wrong == []


def open_page(browser: Any, address: str, width: int, scheme: str) -> tuple[Any, list[str]]:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened = context.new_page()
    wrong = watch_errors(opened)
    opened.goto(address)
    opened.wait_for_selector(".listed")
    opened.wait_for_selector("article .sides .frame")
    return opened, wrong


def current(page: Any) -> str:
    return str(page.text_content(".listed[aria-current] b"))


def said(run: Path) -> list[str]:
    return [one.answer for one in read_judgements(Run(run))[0]]


def wait_until(true: Any) -> None:
    end = time.monotonic() + 5
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_findings_are_walked_and_judged_by_keyboard(page: Any, run: Path) -> None:
    ids = page.locator(".listed b").all_text_contents()
    assert len(ids) > 1
    assert "token" not in page.url
    assert current(page) == ids[0]
    page.keyboard.press("j")
    assert current(page) == ids[1]
    assert ids[1] in page.text_content("article h2")
    page.keyboard.press("k")
    page.keyboard.press("k")
    assert current(page) == ids[0]
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Finding"
    for key, answer in (("c", "cheat"), ("l", "legitimate"), ("u", "unsure")):
        page.keyboard.press(key)
        page.wait_for_selector(f"article .chip.judged:has-text('{answer}')")
        assert said(run)[-1] == answer  # on disk before the page says so
    page.keyboard.press("z")
    page.wait_for_selector("article .chip.judged:has-text('legitimate')")
    page.keyboard.press("z")
    page.keyboard.press("z")
    page.wait_for_selector("article .chip.judged", state="detached")
    assert said(run) == ["cheat", "legitimate", "unsure", "legitimate", "cheat", "withdrawn"]
    page.keyboard.press("z")
    page.wait_for_selector("text=nothing to undo")


def test_a_note_is_written(page: Any, run: Path) -> None:
    page.keyboard.press("n")
    page.wait_for_selector("dialog textarea:focus")
    page.keyboard.type("cjk <b>&amp; a yellow corner")  # letters that are keys elsewhere, and markup
    page.select_option("dialog select", "cheat")
    take(page, "note")
    page.click("dialog >> text=Save")
    page.wait_for_selector(".said >> text=a yellow corner")
    (judgement,) = read_judgements(Run(run))[0]
    assert (judgement.answer, judgement.note) == ("cheat", "cjk <b>&amp; a yellow corner")
    assert page.locator(".said b", has_text="&").count() == 0


def test_two_tabs_stay_in_step(page: Any, browser: Any, address: str, run: Path) -> None:
    other, wrong = open_page(browser, address, 1280, "dark")
    page.click("article >> text=legitimate")
    other.wait_for_selector("article .chip.judged:has-text('legitimate')")
    write_judgement(Run(run), current(page), "unsure", note="from the command line", by="Ada")
    for tab in (page, other):
        tab.wait_for_selector(".said >> text=says Ada")
    other.context.close()
    assert wrong == []


def test_filters_and_links(page: Any, browser: Any, address: str) -> None:
    everything = page.locator(".listed").count()
    page.select_option("label:has-text('Verdict') select", "confirmed")
    assert set(page.locator(".listed .chip.confirmed").all_text_contents()) == {"confirmed"}
    assert 0 < page.locator(".listed").count() < everything
    page.keyboard.press("/")
    page.keyboard.type("no such words")
    page.wait_for_selector("text=No finding passes these filters")
    page.fill("input[type=search]", "")
    page.fill("input[type=number]", "1000")
    assert page.locator(".listed").count() == 0
    page.fill("input[type=number]", "")
    page.click("article >> text=relevance")
    page.select_option("label:has-text('Palette') select", "dark")
    page.click(".listed")
    link = page.url
    assert len(link) < 160
    second = page.context.new_page()
    second.goto(link)
    second.wait_for_selector("article .sides canvas")
    assert second.locator(".listed").count() == page.locator(".listed").count()
    assert second.locator("button[aria-pressed=true]:has-text('relevance')").count() == 1
    assert second.input_value("label:has-text('Palette') select") == "dark"
    assert current(second) == current(page)
    second.click(".back", force=True) if second.locator(".back").is_visible() else second.go_back()


def test_pictures_are_looked_at(page: Any) -> None:
    def colours() -> str:
        return str(page.evaluate("document.querySelector('article .sides canvas').toDataURL()"))

    page.wait_for_selector("article .sides canvas")
    faint = colours()
    page.locator("input[type=range]").fill("20")
    page.wait_for_function("before => document.querySelector('.sides canvas').toDataURL() != before", arg=faint)
    assert page.locator(".legend").text_content().count("one scale") == 1
    page.select_option("label:has-text('Scale') select", "own")
    assert "scale of its own" in page.text_content(".legend")
    page.click("article >> text=input")
    assert page.locator(".sides canvas").count() == 0
    page.locator(".sides .frame").first.dblclick()
    zoomed = page.evaluate("[...document.querySelectorAll('.sides .inside')].map((one) => one.style.transform)")
    assert set(zoomed) == {"scale(3)"}, "all pictures are zoomed alike"
    page.click("text=whole pictures")
    assert "scale(1)" in page.locator(".sides .inside").first.get_attribute("style")
    page.click("summary:has-text('All numbers')")
    rows = page.locator("tbody tr").count()
    assert rows == page.locator(".effects .wide .treated").count() > 3
    take(page, "finding")


def test_names_cannot_break_out_of_a_chart_or_a_fact(browser: Any, finished: Path, tmp_path: Path) -> None:
    evil = """<script>window.broken = 1</script>"'><img src=x onerror="window.broken = 1"><b class='evil'>"""
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    content = json.loads((folder / "findings.json").read_text())
    record = content["findings"][0]
    record["evidence"][0]["test"] = record["class"] = record["central"][0] = evil
    (folder / "findings.json").write_text(json.dumps(content))
    write_report(Run(folder))
    for address in serve(make_app(Viewer([OpenRun(folder)]), TOKEN), TOKEN):
        for page_address in (f"{address}#finding={record['id']}", (folder / "report.html").as_uri()):
            page = browser.new_page()
            wrong = watch_errors(page)
            page.goto(page_address)
            page.locator(".effects svg.wide").first.wait_for()
            titles = page.locator(".effects svg.wide title").all_text_contents()
            assert any(title.startswith(f"{evil}: effect") for title in titles), "the name is whole, as text"
            assert any(evil in str(text) for text in page.locator("dd").all_text_contents())
            assert page.locator(".evil").count() == 0
            assert page.evaluate("window.broken") is None
            assert wrong == []
            page.close()


@pytest.mark.parametrize(("width", "shown"), [(1280, "wide"), (400, "narrow")])
def test_a_chart_takes_the_form_that_fits(browser: Any, address: str, run: Path, width: int, shown: str) -> None:
    opened, _ = open_page(browser, address, 1280, "light")
    opened.set_viewport_size({"width": width, "height": 900})
    for where in (f"{address}#finding=f001", (run / "report.html").as_uri()):
        opened.goto(where)
        opened.locator(f".effects svg.{shown}").first.wait_for()
        chart = opened.locator(".effects").first
        forms = {form: chart.locator(f"svg.{form}") for form in ("wide", "narrow")}
        assert [form for form, svg in forms.items() if svg.is_visible()] == [shown]
        name = forms[shown].locator("text.needed").first
        height = name.evaluate("e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a")
        assert height >= 9, "letters can be read"
        opened.emulate_media(media="print")
        assert [form for form, svg in forms.items() if svg.is_visible()] == ["wide"]
        opened.emulate_media(media="screen")
    opened.context.close()


def test_help_opens_and_closes(page: Any) -> None:
    page.keyboard.press("?")
    assert page.locator("dialog kbd").count() >= 6
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_accessible_and_fits(browser: Any, address: str, width: int, scheme: str) -> None:
    page, wrong = (open_page if width > 720 else open_narrow)(browser, address, width, scheme)
    take(page, f"{width}-{scheme}")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert wrong == []
    assert list_barriers(page) == []
    page.context.close()


def open_narrow(browser: Any, address: str, width: int, scheme: str) -> tuple[Any, list[str]]:
    """On a narrow screen the list comes first, and a finding in its place."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    wrong = watch_errors(page)
    page.goto(address)
    page.wait_for_selector(".listed")
    assert not page.locator("article").is_visible()
    take(page, f"{width}-{scheme}-list")
    page.click(".listed")
    page.wait_for_selector("article .sides .frame")
    assert not page.locator(".listed").first.is_visible()
    return page, wrong


def test_a_selection_becomes_a_finding_of_ones_own(browser: Any, address: str, run: Path) -> None:
    page, wrong = open_page(browser, address, 1280, "light")
    page.goto(page.url.split("#")[0] + "#view=map&layout=tsne:1")  # of the roses
    page.wait_for_selector("text=40 of 80 samples shown")
    page.wait_for_selector("canvas[data-drawn]")
    take(page, "map")
    page.focus(".surface canvas")
    page.keyboard.press("a")
    page.wait_for_selector("text=40 selected")
    page.fill("[aria-label='Name of a finding of your own']", "all-roses")
    page.click("text=make it a finding of your own")
    page.wait_for_selector("[aria-label='Findings of your own'] >> text=all-roses")
    kept = json.loads((run / "own" / "all-roses.json").read_text())
    assert (kept["class"], len(kept["rows"])) == ("rose", 40)
    page.click("[aria-label='Your judgement of all-roses'] >> text=unsure")
    page.wait_for_selector("[aria-label='all-roses'] >> text=judged: unsure")
    take(page, "own")
    page.click("[aria-label='Your judgement of all-roses'] >> text=unsure")  # taken back
    page.wait_for_selector("[aria-label='all-roses'] >> text=judged: unsure", state="detached")
    assert said(run)[-2:] == ["unsure", "withdrawn"]
    assert wrong == []
    page.context.close()


def test_what_is_in_view_is_selected_the_moment_the_map_is_there(browser: Any, address: str) -> None:
    """On a slow machine what a page does after it is drawn comes late: here a second late."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.add_init_script(
        "const [later, next] = [window.setTimeout, window.requestAnimationFrame];"
        "window.setTimeout = (call, wait, ...rest) => later(call, Math.max(wait || 0, 1000), ...rest);"
        "window.requestAnimationFrame = (call) => later(() => next(call), 1000);"
    )
    page = context.new_page()
    wrong = watch_errors(page)
    page.goto(address + "#view=map&layout=tsne:1")
    page.wait_for_selector("text=40 of 80 samples shown")
    page.keyboard.press("a")
    page.wait_for_selector("text=40 selected")
    assert wrong == []
    context.close()


@pytest.mark.parametrize("view", ["map", "try"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_other_views_are_accessible_too(browser: Any, address: str, view: str, scheme: str) -> None:
    page, wrong = open_page(browser, address, 1280, scheme)
    page.goto(page.url.split("#")[0] + f"#view={view}")
    page.wait_for_selector("text=samples shown" if view == "map" else "text=Findings of your own")
    page.wait_for_timeout(300)
    assert list_barriers(page) == []
    assert wrong == []
    page.context.close()
