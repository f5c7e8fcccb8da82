"""What a finding says of itself: metadata and properties that go with it, whom it shows, what makes it a cluster."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import Small
from PIL import Image

import pfungst
from pfungst.neighbours import find_duplicates
from pfungst.portraits import describe_portrait
from pfungst.strategies import rank_candidates
from pfungst.verdicts import make_case


@pytest.fixture(scope="module")
def told(small: Small, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The small audit with a manifest: pictures with the corner come from scanner B, as do a few others."""
    folder = tmp_path_factory.mktemp("told")
    with (folder / "photos.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["path", "label", "scanner", "dose", "patient"])
        for name in ("leaf", "rose"):
            for i in range(40):
                cued = name == "rose" and i < 16
                row = [small.photos / name / f"{i:02d}.png", name, "B" if cued or i > 36 else "A"]
                writer.writerow([*row, 2.5 + i / 100 if cued else 1 + i / 100, f"{name}{i}"])
    settings = {**small.settings, "classes": None}
    run = pfungst.audit(small.model, folder / "photos.csv", out=folder / "run", **settings).run.path
    findings = json.loads((run / "findings.json").read_text())["findings"]
    return run, next(f for f in findings if f["class"] == "rose" and f["verdict"] == "confirmed")


def test_metadata_and_properties_that_go_with_it(told: tuple[Path, dict[str, Any]]) -> None:
    _, finding = told
    traits = {trait["name"]: trait for trait in finding["traits"]}
    inside = {Path(name).name for name in finding["samples"]}
    cued = {f"{i:02d}.png" for i in range(16)}
    assert inside == cued
    assert (traits["scanner"]["value"], traits["scanner"]["members"]) == ("B", 1.0)
    assert traits["scanner"]["others"] == pytest.approx(3 / 24)
    assert traits["dose"]["auc"] == 1.0
    assert "patient" not in traits
    assert "100% have scanner = B, 12% of the rest of the class" in finding["summary"]
    assert traits["blue over yellow"]["auc"] == 0.0  # the corner is yellow
    assert "yellower" in traits["blue over yellow"]["text"]


def test_whom_it_shows(told: tuple[Path, dict[str, Any]]) -> None:
    _, finding = told
    members = set(finding["samples"])
    assert set(finding["central"]) <= members
    assert set(finding["rim"]) <= members
    assert not set(finding["nearest"]) & members
    assert finding["central"][0] != finding["rim"][0]
    assert finding["accuracy"] == {"members": 1.0, "others": 1.0}
    assert finding["distinct"] == finding["size"] == 16
    assert finding["duplicates"] == []
    assert 0 < finding["probability"]["members"] <= 1


def test_what_makes_it_a_cluster(told: tuple[Path, dict[str, Any]]) -> None:
    run, finding = told
    best = max(finding["channels"], key=lambda one: one["share"])
    assert (best["layer"], best["channel"]) == ("colours", 3)  # the one that sees yellow
    why = np.asarray(Image.open(run / finding["why"]).convert("RGB")).astype(int)
    red = why[..., 0] - why[..., 2]
    y, x = np.unravel_index(red.argmax(), red.shape)
    assert max(y, x) < 0.25 * len(why), "the corner speaks for it"


def test_properties_are_in_the_table_of_samples(told: tuple[Path, dict[str, Any]]) -> None:
    run, _ = told
    rows = pq.read_table(run / "samples.parquet").to_pylist()
    assert {row["width"] for row in rows} == {24}
    assert all(0 < row["brightness"] < 1 for row in rows)
    assert {row["quantisation"] for row in rows} == {None}  # PNG has none
    assert rows[0]["scanner"] in ("A", "B")


def test_near_duplicates() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 20))
    rows[40:] = rows[0] + rng.normal(0, 1e-4, (20, 20))  # more of them than anyone has neighbours
    rows[30] = rows[31]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    groups = [set(group.tolist()) for group in find_duplicates(rows)]
    assert sorted(groups, key=len) == [{30, 31}, {0, *range(40, 60)}]
    assert find_duplicates(rows[:1]) == []


def test_sentences_name_what_matters() -> None:
    portrait = {
        "distinct": 5,
        "accuracy": {"members": 0.5, "others": 0.9},
        "traits": [{"name": "sharpness", "value": None, "text": "more blurred than the rest"}],
    }
    assert describe_portrait(portrait, 20) == [
        "Only 5 of them are no near-duplicates.",
        "The model is right on 50% of them, on 90% of the others.",
        "They are more blurred than the rest.",
    ]
    quiet = {"distinct": 20, "accuracy": {"members": None, "others": None}, "traits": []}
    assert describe_portrait(quiet, 20) == []


def test_copies_of_a_picture_count_once_in_experiments(small: Small, tmp_path: Path) -> None:
    """Half of the members twice: the tests have no more pictures than without the copies."""
    folder = small.copy(tmp_path / "photos")
    for i in range(8):
        shutil.copy(folder / "rose" / f"{i:02d}.png", folder / "rose" / f"{i:02d}_again.png")
    audit = pfungst.audit(small.model, folder, out=tmp_path / "run", **small.settings)
    best = max(audit.findings, key=lambda f: sum(int(s[5:7]) < 16 for s in f.samples) / len(f.samples))
    assert best.size == 24
    assert best.record["distinct"] == 16
    assert ["rose/00.png", "rose/00_again.png"] in [sorted(group) for group in best.record["duplicates"]]
    case = make_case(audit.run, audit.subject, rank_candidates(audit.run, audit.subject)[0][best.rank - 1])
    assert len(case.members) == 16
