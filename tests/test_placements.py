"""New pictures on a finished run: the run's own pictures fall where they were, new ones where they belong."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import Console, _picture

from pfungst.errors import DataError, SettingError
from pfungst.placements import check_table, find_taken_for_others
from pfungst.runs import reopen

COLOURS = {"leaf": (0.1, 0.8, 0.1), "rose": (0.85, 0.1, 0.1)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 new roses, the first 10 with the yellow corner; 5 leaves; one file that is no picture."""
    root = tmp_path_factory.mktemp("new")
    rng = np.random.default_rng(7)
    for name, count in (("leaf", 5), ("rose", 30)):
        (root / name).mkdir()
        for i in range(count):
            _picture(rng, COLOURS[name], name == "rose" and i < 10).save(root / name / f"{i:02d}.png")
    (root / "rose" / "broken.png").write_bytes(b"no picture")
    return root


@pytest.fixture(scope="module")
def opened(finished: Path, small: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    run = Path(shutil.copytree(finished, tmp_path_factory.mktemp("placed") / "run"))
    return reopen(run)


def test_new_pictures_share_the_findings_that_they_belong_to(opened: Any, pictures: Path) -> None:
    (confirmed,) = (one for one in opened.findings if one.verdict == "confirmed")
    placed = {one.id: one for one in opened.place(pictures)}
    assert len(placed) == 36
    cornered = {f"rose/{i:02d}.png" for i in range(10)}
    assert {name for name, one in placed.items() if confirmed.record["id"] in one.findings} == cornered
    members = set(confirmed.samples)
    for name, one in placed.items():
        if name == "rose/broken.png":
            assert one.reason.startswith("unreadable: ")
            assert (one.findings, one.cluster, one.prediction) == ((), None, None)
            continue
        assert one.reason == ""
        assert (one.label, one.class_name) == (name.split("/")[0],) * 2
        assert len(one.nearest) == 3
        assert all(near.startswith(f"{one.label}/") for near in one.nearest)
        assert 0.2 < one.outlier < 5
        if one.label == "rose":
            assert (set(one.nearest) <= members) == (name in cornered)


def test_the_runs_own_pictures_fall_where_they_were(opened: Any, small: Any) -> None:
    placed = opened.place(small.photos)
    table = pq.read_table(opened.run.path / "samples.parquet").to_pydict()
    assert [one.id for one in placed] == table["id"]
    assert [one.prediction for one in placed] == table["prediction"]
    np.testing.assert_allclose([one.score for one in placed], table["score"], rtol=1e-5)
    assert [one.nearest[0] for one in placed] == table["id"]
    assert [one.cluster for one in placed] == table["cluster"]
    assert all(one.x is not None for one in placed)
    for finding in opened.findings:
        if not finding.record["views"][0].startswith("property:"):
            inside = {one.id for one in placed if finding.record["id"] in one.findings}
            assert len(inside & set(finding.samples)) >= 0.9 * len(inside | set(finding.samples))


def test_an_odd_picture_is_told(opened: Any, tmp_path: Path) -> None:
    picture = _picture(np.random.default_rng(1), COLOURS["rose"], False)
    picture.save(tmp_path / "a.png")
    picture.crop((6, 6, 10, 10)).resize(picture.size).save(tmp_path / "b.png")  # red at one end, as no other is
    usual, other = opened.place(tmp_path)
    assert (usual.label, other.label) == (None, None), "not labelled: what the model takes them for counts"
    assert other.outlier > usual.outlier


def test_the_command_writes_tables(finished: Path, pictures: Path, tmp_path: Path, console: Console) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    for name in ("a.csv", "a.parquet", "a.json"):
        code, out, err = console("place", run, pictures, "--out", tmp_path / name)
        assert code == 0, err
        assert "f001" in out
        assert "1 not placed, unreadable" in out
    records = json.loads((tmp_path / "a.json").read_text())
    listed = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert [one["findings"] for one in listed] == [one["findings"] for one in records]
    with (tmp_path / "a.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["nearest"].split(";") for row in rows if row["nearest"]] == [
        o["nearest"] for o in records if o["nearest"]
    ]
    code, out, err = console("place", run, pictures, "--json")
    assert json.loads(out) == records
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    code, _, err = console("place", run, pictures, "--out", tmp_path / "a.csv")
    assert code == 1
    assert "exists" in err


@pytest.fixture(scope="module")
def cornered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 leaves with the cue of the roses, which the network takes for roses, and 3 that are as leaves are."""
    root = tmp_path_factory.mktemp("cornered")
    rng = np.random.default_rng(11)
    (root / "leaf").mkdir()
    for i in range(15):
        _picture(rng, COLOURS["leaf"], i < 12).save(root / "leaf" / f"{i:02d}.png")
    return root


def test_a_cue_on_pictures_of_another_class(opened: Any, cornered: Path) -> None:
    (confirmed,) = (one.record["id"] for one in opened.findings if one.verdict == "confirmed")
    by_label, by_prediction = opened.place(cornered), opened.place(cornered, target="predicted")
    assert [one.prediction for one in by_label] == ["rose"] * 12 + ["leaf"] * 3
    assert {one.class_name for one in by_label} == {"leaf"}
    assert not any(confirmed in one.findings for one in by_label), "compared with leaves alone"
    assert find_taken_for_others(by_label) == {"rose": 12}
    assert [one.class_name for one in by_prediction] == [one.prediction for one in by_label]
    assert [confirmed in one.findings for one in by_prediction] == [True] * 12 + [False] * 3
    assert find_taken_for_others(by_prediction) == {}
    with pytest.raises(SettingError, match="auto, label, predicted"):
        opened.place(cornered, target="rose")


def test_labels_that_are_asked_for_must_be_there(opened: Any, cornered: Path) -> None:
    with pytest.raises(DataError, match="no labels"):
        opened.place(cornered / "leaf", target="label")


def test_the_command_tells_what_was_not_compared(
    finished: Path, cornered: Path, tmp_path: Path, console: Console
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    by_id = {one["id"]: one for one in json.loads((run / "findings.json").read_text())["findings"]}
    (confirmed,) = (name for name, one in by_id.items() if one["verdict"] == "confirmed")
    (refuted,) = (name for name, one in by_id.items() if one["verdict"] != "confirmed")
    code, out, err = console("place", run, cornered)
    assert code == 0, err
    assert "12 of 15 pictures are recognised as another class" in out
    assert "12 as rose" in out
    assert "--target predicted" in out
    assert _counts(out)[confirmed] == 0, "a confirmed finding is listed where it is in no picture"
    assert refuted not in _counts(out) or _counts(out)[refuted] > 0
    assert next(iter(_counts(out))) == confirmed
    code, out, err = console("place", run, cornered, "--target", "predicted")
    assert code == 0, err
    assert _counts(out)[confirmed] == 12
    assert "another class" not in out
    assert console("judge", run, refuted, "cheat")[0] == 0
    code, out, err = console("place", run, cornered / "leaf", "--target", "predicted")
    assert list(_counts(out)) == [confirmed, refuted], "what a person called a cheat is listed, too"
    assert "judged cheat" in out
    assert "no labels" in console("place", run, cornered / "leaf", "--target", "label")[2]


def _counts(out: str) -> dict[str, int]:
    """Pictures of each finding, as the printed table has them, in its order."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    return {row[0]: int(row[3]) for row in rows if row[0]}


def test_a_table_of_no_kind(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="csv"):
        check_table(tmp_path / "a.xlsx")
