"""The whole story: planted cheats are found and confirmed, the clean twin stays silent, and the report shows it."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from browsing import browse, needs_browser
from PIL import Image

from pfungst.demo import DemoResult, run_demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    return run_demo(tmp_path_factory.mktemp("demo"), seed=3)


def test_every_planted_cue_is_found_and_confirmed(demo: DemoResult) -> None:
    assert [match.planted.cue for match in demo.matches] == ["border", "tag", "disc"]
    for match in demo.matches:
        assert match.finding is not None, f"{match.planted.cue} was missed"
        assert match.finding.verdict == "confirmed", f"{match.planted.cue}: {match.finding.record['reason']}"
        assert match.jaccard >= 0.8


def test_nothing_else_is_confirmed(demo: DemoResult) -> None:
    matched = {match.finding.id for match in demo.matches}
    assert [f.summary for f in demo.audit.findings if f.verdict == "confirmed" and f.id not in matched] == []


def test_the_clean_twin_is_silent(demo: DemoResult) -> None:
    assert demo.twin is not None
    assert [f.summary for f in demo.twin.findings if f.verdict == "confirmed"] == []
    assert "Nothing" in demo.twin.report.read_text()


def test_findings_say_where_the_cue_is(demo: DemoResult) -> None:
    where = {match.planted.cue: match.finding.where for match in demo.matches}
    assert "border" in where["border"]["place"]
    assert where["tag"]["place"].startswith("a region at the bottom left")
    assert where["disc"]["kind"] == "moving"
    left, _, right, bottom = where["tag"]["box"]
    assert left <= 4
    assert bottom >= 44
    assert right - left < 34


def test_the_planted_cue_beats_its_controls(demo: DemoResult) -> None:
    for match in demo.matches:
        tests = {one["test"]: one for one in match.finding.evidence}
        assert tests["cut:colour"]["interval"][1] < 0
        assert tests["cut:exchange"]["interval"][1] < 0
        assert tests["paste:same place"]["interval"][0] > 0
        assert tests["paste:same place"]["flips"] > tests["paste:same place"]["control_flips"] + 0.1


def test_the_lines_say_honestly_what_was_planted_and_missed(demo: DemoResult) -> None:
    text = "\n".join(demo.lines())
    assert "3 cues were planted, 3 were found and confirmed" in text
    assert "FALSE ALARM" not in text
    assert "0 confirmed of" in text
    missed = type(demo)(demo.audit, None, (type(demo.matches[0])(demo.matches[0].planted, None, 0.0),))
    assert "MISSED" in "\n".join(missed.lines())


def test_a_finding_can_be_confirmed_again(demo: DemoResult) -> None:
    match = demo.matches[0]
    again = match.finding.confirm()
    assert again.verdict == "confirmed"
    first = {one["test"]: one["effect"] for one in match.finding.evidence}["cut:colour"]
    second = {one.test: one.effect for one in again.evidence}["cut:colour"]
    assert second < 0
    assert second != first, "other draws give another figure"


def test_samples_tell_of_every_picture(demo: DemoResult) -> None:
    table = pq.read_table(demo.audit.run.path / "samples.parquet").to_pylist()
    assert len(table) == 1797
    disc = next(match for match in demo.matches if match.planted.cue == "disc")
    named = {row["id"] for row in table if row["finding"] == disc.finding.id}
    assert named == set(disc.finding.samples)
    recognised = [row for row in table if not row["set_aside"]]
    assert all(row["label"] == row["prediction"] == row["class"] for row in recognised)
    assert all(row["x"] is not None and row["outlier"] > 0 for row in recognised)
    assert all(row["set_aside"] == "not recognised as its class" for row in table if row["label"] != row["prediction"])


def test_the_report_is_one_file_without_network_or_script(demo: DemoResult) -> None:
    text = demo.audit.report.read_text()
    assert "<script" not in text
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", text)
    assert not re.search(r"url\((?!data:)", text)
    assert "default-src 'none'" in text
    assert all(re.search(r'alt="[^"]+"', image) for image in re.findall(r"<img [^>]*>", text))
    assert demo.audit.report.stat().st_size / len(demo.audit.findings) * 20 < 5_000_000  # 5 MB at most for 20 findings
    for finding in demo.audit.findings:
        assert html.escape(finding.summary, quote=False).replace("'", "&#39;") in text
    assert demo.audit.run.describe()["model"]["digest"] in text


@needs_browser
@pytest.mark.parametrize("width", [400, 1280])
def test_the_report_fits_its_window(demo: DemoResult, tmp_path: Path, width: int) -> None:
    text = re.sub(r"<meta http-equiv[^>]*>", "", demo.audit.report.read_text()).replace("<details", "<details open")
    page = tmp_path / "frame.html"
    measure = (
        "const d = document.getElementById('f').contentDocument.documentElement;"
        "document.body.dataset.size = JSON.stringify([d.scrollWidth, d.clientWidth, d.scrollHeight])"
    )
    page.write_text(
        f'<body><iframe id="f" style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(text)}" '
        f'onload="{measure}"></iframe></body>'
    )
    dom = browse(tmp_path, "--window-size=1400,1000", "--dump-dom", page.as_uri())
    found = re.search(r'data-size="([^"]+)"', dom)
    assert found, dom[-300:]
    scroll, client, height = json.loads(found[1])
    assert client == width
    assert scroll <= width, "the page scrolls sideways"
    assert height > 2000


@needs_browser
@pytest.mark.parametrize(("scheme", "bright"), [("1", True), ("0", False)])
def test_the_report_is_light_or_dark(demo: DemoResult, tmp_path: Path, scheme: str, bright: bool) -> None:
    shot = tmp_path / "shot.png"
    settings = f"--blink-settings=preferredColorScheme={scheme}"
    browse(tmp_path, settings, "--window-size=1280,1600", f"--screenshot={shot}", demo.audit.report.as_uri())
    pixels = np.asarray(Image.open(shot).convert("L"))
    assert pixels.shape == (1600, 1280)
    assert (np.median(pixels) > 200) == bright
    assert pixels.std() > 15, "the page is not blank"


def test_the_command_line_tells_the_same(demo: DemoResult) -> None:
    folder = demo.audit.run.path
    environment = {**os.environ, "COLUMNS": "100"}
    command: dict[str, Any] = {"capture_output": True, "text": True, "env": environment, "timeout": 300}
    arguments = ["pfungst.demo:build", str(folder.parent / "images"), "--out", str(folder), "--seed", "3"]
    arguments += ["--batch-size", "64", "--weights", str(folder.parent / "model.safetensors"), "--json"]
    program = Path(sys.executable).parent / "pfungst"
    again = subprocess.run([program, "audit", *arguments], check=False, **command)
    assert again.returncode == 1, "the run began with a module and no --weights"
    assert "belongs to another audit" in again.stderr
    assert "weights" in again.stderr
    assert "Traceback" not in again.stderr
    written = subprocess.run([program, "report", str(folder)], check=True, **command)
    assert "report.html" in written.stdout
