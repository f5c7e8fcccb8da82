"""What tests of pages share: Chromium, the viewer served by a thread, the errors of a page, missing libraries."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=4000",
]
# WebGL without a graphics card.
_DRIVEN = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
_AXE = importlib.util.find_spec("axe_playwright_python")

needs_browser = pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed: apt-get install chromium")


def take(page: Any, name: str) -> None:
    """A screenshot into the folder that PFUNGST_SCREENSHOTS names, to be looked at; nowhere by default."""
    folder = os.environ.get("PFUNGST_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def browse(folder: Path, *arguments: str) -> str:
    """What Chromium prints, called once."""
    assert BROWSER is not None
    profile = folder / "profile"
    command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def drive() -> Iterator[Any]:
    """A browser that Playwright drives; for a fixture."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=_DRIVEN)
        yield browser
        browser.close()


def serve(app: Any, token: str) -> Iterator[str]:
    """The address of the viewer's page, served by a thread; for a fixture."""
    uvicorn = pytest.importorskip("uvicorn")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/?token={token}"
    server.should_exit = True
    thread.join(10)


def watch_errors(page: Any) -> list[str]:
    """What goes wrong on a page from now on: scripts that fail, and what the console calls an error."""
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    return wrong


def list_barriers(page: Any) -> list[Any]:
    """What axe-core finds on the page that is serious for people with disabilities."""
    if _AXE is None or _AXE.origin is None:
        pytest.skip("axe-playwright-python, which brings axe-core, is not installed")
    page.evaluate((Path(_AXE.origin).parent / "axe.min.js").read_text())
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [
        (one["id"], [node["html"] for node in one["nodes"]][:3])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


def check_missing(module: str, extra: str, call: str) -> None:
    """Without this module the call (code, after ``import pfungst, numpy``) names the command that installs it."""
    code = (
        f"import sys; sys.modules[{module!r}] = None; import pfungst, numpy\n"
        f"try: {call}\n"
        f"except pfungst.PfungstError as error: assert \"pip install 'pfungst[{extra}]'\" in str(error), error\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
