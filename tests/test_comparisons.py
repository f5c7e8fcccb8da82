"""Two runs beside each other: which findings are the same, and which decisions changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Console

from pfungst.comparisons import compare_runs, compare_samples, match_findings
from pfungst.errors import RunError
from pfungst.store import Run


def group(name: str, samples: range, label: str = "rose") -> dict[str, Any]:
    return {"id": name, "class": label, "samples": [f"{label}/{i}" for i in samples]}


def test_findings_are_matched_by_class_and_members_the_most_alike_first() -> None:
    left = [group("a", range(10)), group("b", range(20, 30)), group("c", range(50, 60), "leaf")]
    right = [
        group("d", range(3, 12)),  # 7 of 12 with a: 0.58
        group("e", range(12)),  # 10 of 12 with a: 0.83
        group("f", range(22, 30)),  # 8 of 10 with b: 0.8
        group("g", range(50, 60)),  # of another class than c
    ]
    pairs = match_findings(left, right, ids(*left, *right))
    assert [(left[p.left]["id"], right[p.right]["id"], round(p.jaccard, 2)) for p in pairs] == [
        ("a", "e", 0.83),
        ("b", "f", 0.8),
    ]
    # One with one: the second best partner of a finding that is taken stays alone.
    rivals = [group("a", range(10)), group("b", range(9))]
    assert len(match_findings(rivals, [group("c", range(10))], ids(*rivals))) == 1


def test_only_samples_that_both_runs_have_are_counted() -> None:
    whole, part = [group("a", range(100))], [group("b", range(0, 90, 2))]  # the part has every second sample
    assert match_findings(whole, part, ids(*whole)) == []
    (pair,) = match_findings(whole, part, ids(group("", range(0, 100, 2))))
    assert pair.jaccard == 45 / 50
    (back,) = match_findings(part, whole, ids(group("", range(0, 100, 2))))
    assert back.jaccard == 45 / 50
    assert match_findings(whole, part, ids(group("", range(3)))) == [], "two samples may be the same by chance"
    assert match_findings(whole, part, set()) == []


def test_a_run_of_a_part_keeps_the_findings_of_the_whole(finished: Path, tmp_path: Path, console: Console) -> None:
    """Every second picture, as --limit draws them: half the members, but all of those that the run has."""
    run = Run(Path(shutil.copytree(finished, tmp_path / "half")))
    table = pq.read_table(run.path / "samples.parquet")
    half = table.take(pa.array(range(0, len(table), 2)))
    pq.write_table(half, run.path / "samples.parquet")
    content, known = run.read_json("findings.json"), set(half.column("id").to_pylist())
    sizes = {one["id"]: one["size"] for one in content["findings"]}
    for one in content["findings"]:
        one["samples"] = [name for name in one["samples"] if name in known]
        one["size"] = len(one["samples"])
    first = content["findings"][0]
    assert 4 <= first["size"] < 0.6 * sizes[first["id"]], "by all samples they would not be one"
    run.write_json("findings.json", content)
    found = compare_runs(Run(finished), run)
    assert (found["lost"], found["gained"]) == ([], [])
    assert [one["left"] for one in found["kept"]] == [one["right"] for one in found["kept"]] == list(sizes)
    kept = found["kept"][0]
    assert (kept["jaccard"], kept["shared"]) == (1.0, first["size"])
    assert kept["in_both"] == [first["size"]] * 2
    code, out, _ = console("compare", finished, run.path)
    assert code == 0
    assert "samples: 40 in both runs, of 80 and 40" in out
    assert f"pictures that both runs have: {first['size']} of {sizes['f001']} and {first['size']}" in out


def ids(*groups: dict[str, Any]) -> set[str]:
    return {name for one in groups for name in one["samples"]}


@pytest.fixture
def other(finished: Path, tmp_path: Path) -> Path:
    """The run once more: a finding fewer, one with another verdict, two decisions changed, a sample fewer."""
    path = Path(shutil.copytree(finished, tmp_path / "other"))
    run = Run(path)
    content = run.read_json("findings.json")
    first = content["findings"][0]
    first["verdict"] = "refuted"
    content["findings"] = [first, {**first, "id": "f009", "class": "leaf", "samples": ["leaf/00.png"], "size": 1}]
    run.write_json("findings.json", content)
    table = pq.read_table(path / "samples.parquet")
    predictions = table.column("prediction").to_pylist()
    for row in (0, 45):
        predictions[row] = "rose" if predictions[row] == "leaf" else "leaf"
    table = table.set_column(table.schema.get_field_index("prediction"), "prediction", pa.array(predictions))
    pq.write_table(table.slice(0, 79).take(pa.array([*range(78, -1, -1)])), path / "samples.parquet")
    description = run.describe()
    description["settings"]["seed"] = 5
    run.write_json("run.json", description)
    return path


def test_a_comparison_says_what_was_kept_lost_and_gained(finished: Path, other: Path) -> None:
    known = Run(finished).read_json("findings.json")["findings"]
    found = compare_runs(Run(finished), Run(other))
    (kept,) = found["kept"]
    assert (kept["left"], kept["right"], kept["jaccard"], kept["changed"]) == ("f001", "f001", 1.0, True)
    assert kept["verdicts"] == [known[0]["verdict"], "refuted"]
    assert kept["shared"] == known[0]["size"]
    assert [one["id"] for one in found["lost"]] == [one["id"] for one in known[1:]]
    assert [one["id"] for one in found["gained"]] == ["f009"]
    assert {one["name"]: (one["left"], one["right"]) for one in found["differences"]} == {"setting seed": (0, 5)}
    back = compare_runs(Run(other), Run(finished))
    assert [one["id"] for one in back["gained"]] == [one["id"] for one in known[1:]]
    assert len(back["kept"]) == 1


def test_decisions_are_compared_by_id(finished: Path, other: Path) -> None:
    found = compare_samples(Run(finished), Run(other))
    before = pq.read_table(finished / "samples.parquet").to_pylist()
    assert (found["common"], found["only"], found["changed"]) == (79, [1, 0], 2)
    assert [one["id"] for one in found["first"]] == [before[0]["id"], before[45]["id"]]
    assert [one["rows"] for one in found["first"]] == [[0, 78], [45, 33]]  # the other run lists them backwards
    right = sum(before[row]["prediction"] == before[row]["label"] for row in (0, 45))
    assert (found["broken"], found["repaired"]) == (right, 2 - right)
    accuracy = sum(one["prediction"] == one["label"] for one in before[:79]) / 79
    assert found["accuracy"] == pytest.approx([accuracy, accuracy + (2 - 2 * right) / 79])


def test_the_command_prints_it(finished: Path, other: Path, console: Console) -> None:
    code, out, _ = console("compare", finished, other)
    assert code == 0
    assert "kept: 1" in out
    assert "-> refuted" in out
    assert "setting seed: 0 | 5" in out
    code, out, _ = console("compare", finished, finished, "--json")
    same = json.loads(out)
    assert code == 0
    assert not same["lost"]
    assert not same["gained"]
    assert same["samples"]["changed"] == 0


def test_an_unfinished_run_is_refused(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError):
        compare_runs(Run(finished), Run(tmp_path / "empty"))
