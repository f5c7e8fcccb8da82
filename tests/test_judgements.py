"""What people say of findings: kept whatever happens, recognised in the next audit, shown."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import Console, Small

import pfungst
from pfungst.errors import RunError, SettingError
from pfungst.judgements import Judgement, match_judgements, read_judgements, write_judgement
from pfungst.store import JUDGEMENTS, Run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Run:
    """A finished run to be judged."""
    return Run(shutil.copytree(finished, tmp_path / "run"))


def test_the_command_writes_a_line_and_the_report_shows_it(run: Run, console: Console) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    code, output, error = console("judge", run.path, "f001", "cheat", "--note", "a <yellow> corner", "--by", "Änne")
    assert (code, error) == (0, "")
    assert output.startswith("f001, class rose: cheat, says Änne (")
    (line,) = (run.path / JUDGEMENTS).read_text("utf-8").splitlines()
    entry = json.loads(line)
    description = run.describe()
    assert entry["model"] == description["model"]["digest"]
    assert entry["data"] == description["data"]["digest"]
    assert entry["samples"] == [f"rose/{i:02d}.png" for i in range(16)]
    at = datetime.fromisoformat(entry["at"])
    assert before <= at <= datetime.now(UTC)
    assert at.utcoffset() is not None
    report = (run.path / "report.html").read_text("utf-8")
    assert "judged: cheat" in report
    assert "People say: 1 cheat." in report
    assert "a &lt;yellow&gt; corner" in report
    assert "another model" not in report
    assert read_judgements(run)[0][0].note == "a <yellow> corner"


def test_refusals(run: Run, console: Console) -> None:
    code, _, error = console("judge", run.path, "f009", "cheat")
    assert code == 1
    assert re.search(r"has no finding 'f009'\n  Remedy: its findings are: f001", error)
    assert console("judge", run.path, "f001", "evil")[0] == 2
    with pytest.raises(SettingError, match="'evil' is no judgement"):
        write_judgement(run, "f001", "evil")
    with pytest.raises(RunError, match="is no run folder"):
        write_judgement(Run(run.path.parent), "f001", "cheat")
    (run.path / "findings.json").unlink()
    with pytest.raises(RunError, match="is not finished"):
        write_judgement(run, "f001", "cheat")
    assert not (run.path / JUDGEMENTS).exists()


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_a_torn_last_line_is_passed_over_and_joined_with_nothing(run: Run, cut: int) -> None:
    write_judgement(run, "f001", "unsure", by="a")
    write_judgement(run, "f001", "cheat", by="b")
    path = run.path / JUDGEMENTS
    first, second = path.read_bytes().splitlines(keepends=True)
    torn = first + second[: cut if cut > 0 else -2]
    path.write_bytes(torn)
    found, lost = read_judgements(run)
    assert ([j.by for j in found], lost) == (["a"], 1)
    write_judgement(run, "f001", "legitimate", by="c")
    assert path.read_bytes().startswith(torn), "the file only grows"
    found, lost = read_judgements(run)
    assert ([j.by for j in found], lost) == (["a", "c"], 1)
    path.write_bytes(first + second[:-1])  # only the end of the line was lost
    assert [j.by for j in read_judgements(run)[0]] == ["a", "b"]


def _write_many(path: Path, name: str) -> None:
    for _ in range(20):
        write_judgement(Run(path), "f001", "cheat", by=name)


def test_two_people_at_once_lose_nothing(run: Run) -> None:
    context = multiprocessing.get_context("fork")
    people = [context.Process(target=_write_many, args=(run.path, name)) for name in "ab"]
    for one in people:
        one.start()
    for one in people:
        one.join()
    found, lost = read_judgements(run)
    assert sorted(j.by for j in found) == ["a"] * 20 + ["b"] * 20
    assert lost == 0


def _judgement(**changed: Any) -> Judgement:
    samples = tuple(f"{i:02d}" for i in range(10))
    return replace(
        Judgement("cheat", "", "a", "2026-01-01T00:00:00+00:00", "f007", "rose", samples, "m", "d"), **changed
    )


@pytest.mark.parametrize(
    ("members", "class_name", "known"),
    [
        (range(10), "rose", True),
        (range(6), "rose", True),  # 6 of 10: Jaccard index 0.6
        (range(5), "rose", False),
        (range(2, 12), "rose", True),  # 8 of 12
        (range(3, 13), "rose", False),  # 7 of 13
        (range(10), "leaf", False),
    ],
)
def test_a_finding_is_recognised_by_class_and_members(members: range, class_name: str, known: bool) -> None:
    record = {"id": "f001", "class": class_name, "samples": [f"{i:02d}" for i in members]}
    assert bool(match_judgements([record], [_judgement()])["f001"]) == known


def test_of_two_findings_the_nearer_one_was_judged() -> None:
    near, far = (
        {"id": i, "class": "rose", "samples": [f"{k:02d}" for k in range(n)]} for i, n in (("f1", 9), ("f2", 7))
    )
    for records in ([near, far], [far, near]):
        found = match_judgements(records, [_judgement(), _judgement(answer="unsure")])
        assert [j.answer for j in found["f1"]] == ["cheat", "unsure"]
        assert found["f2"] == []
    assert match_judgements([], [_judgement()]) == {}


def _again_in_the_same_folder(run: Run, small: Small) -> dict[str, Any]:
    return {}


def _again_from_the_beginning(run: Run, small: Small) -> dict[str, Any]:
    for path in [*run.path.iterdir()]:
        if path.name != JUDGEMENTS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return {"seed": 5}


@pytest.mark.parametrize("change", [_again_in_the_same_folder, _again_from_the_beginning])
def test_judgements_survive_the_audit_made_again(
    change: Callable[[Run, Small], dict[str, Any]], run: Run, small: Small
) -> None:
    write_judgement(run, "f001", "cheat", by="a")
    line = (run.path / JUDGEMENTS).read_bytes()
    more = change(run, small)
    result = pfungst.audit(small.model, small.photos, out=run.path, **{**small.settings, **more})
    assert (run.path / JUDGEMENTS).read_bytes() == line
    judged = [finding for finding in result.findings if finding.judgements]
    assert [finding.record["class"] for finding in judged] == ["rose"]
    assert set(judged[0].samples) >= {f"rose/{i:02d}.png" for i in range(16)}
    assert judged[0].judgements[0]["answer"] == "cheat"
    assert judged[0].judgements[0]["about"] == ""
    assert "judged: cheat" in result.report.read_text()
    judged[0].judge("legitimate", "after all", by="b")
    assert (run.path / JUDGEMENTS).read_bytes().startswith(line)
    assert [one["answer"] for one in result.findings[judged[0].rank - 1].judgements] == ["cheat", "legitimate"]
    assert "judged: legitimate" in result.report.read_text()


def test_a_judgement_on_another_model_or_other_data_says_so(run: Run) -> None:
    write_judgement(run, "f001", "cheat", by="a")
    (judgement,) = read_judgements(run)[0]
    description = run.describe()
    assert judgement.about(description) == ""
    assert replace(judgement, model="x").about(description) == "made on another model"
    assert replace(judgement, data="x").about(description) == "made on other data"
    assert replace(judgement, model="x", data="x").about(description) == "made on another model and other data"
    description["model"]["digest"] = "0" * 64
    run.write_json("run.json", description)
    pfungst.pipeline.write_report(run)
    assert "made on another model" in (run.path / "report.html").read_text()
