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

from pfungst.errors import SettingError
from pfungst.placements import check_table
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


def test_a_table_of_no_kind(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="csv"):
        check_table(tmp_path / "a.xlsx")
