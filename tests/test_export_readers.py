"""Exports opened by the tools they are for, each in a Python of its own: their pins, and ViRelAy's licence, keep them
out of ours.

    PFUNGST_VIRELAY    a Python with virelay==0.6.1
    PFUNGST_FIFTYONE   a Python with fiftyone and mongomock
    PFUNGST_SPOTLIGHT  a Python with renumics-spotlight
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pfungst.exports import export
from pfungst.store import Run


@pytest.fixture(scope="module")
def run(finished: Path) -> Run:
    return Run(finished)


def read(tool: str, *arguments: str | Path) -> Any:
    """What the reader of this name prints."""
    python = os.environ.get(f"PFUNGST_{tool.upper()}")
    if not python:
        pytest.skip(f"PFUNGST_{tool.upper()} does not name a Python that has {tool}")
    script = Path(__file__).parent / "readers" / f"open_in_{tool}.py"
    done = subprocess.run([python, script, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_virelay_opens_its_project(run: Run, tmp_path: Path) -> None:
    export(run, "virelay", tmp_path / "project")
    told = read("virelay", tmp_path / "project" / "project.yaml", "class00000,class00001", "0,41")
    (method,) = told["project"]["analysisMethods"]
    assert [one["humanReadableName"] for one in method["categories"]] == ["leaf", "rose"]
    assert (method["clusterings"], method["embeddings"]) == (["findings", "spectral"], ["spectral", "tsne"])
    entry = {**run.read_json("classes/0001.json"), **run.read_json("embeddings/0001.json")}
    seen = told["analyses"]["class00001/findings/tsne"]["embedding"]
    assert [one["attributionIndex"] for one in seen] == entry["rows"]
    assert np.allclose([one["value"] for one in seen], np.column_stack([entry["x"], entry["y"]]), atol=1e-4)
    assert [one["cluster"] for one in seen][:16] == [1] * 16
    spectral = told["analyses"]["class00001/spectral/spectral"]
    assert np.allclose(spectral["eigenvalues"], entry["eigenvalues"], atol=1e-6)
    assert [one["cluster"] for one in spectral["embedding"]] == entry["cluster"]
    for index, name in (("0", "leaf"), ("41", "rose")):
        sample, *sizes = told["samples"][index]
        assert [label["name"] for label in sample["labels"]] == [name]
        assert all(sizes)
        assert np.isclose(np.sum(told["relevance"][index]), _enlarged_sum(run, int(index)), rtol=1e-5)
        assert np.argmax(told["prediction"][index]) == run.read_array("prediction")[int(index)]


def _enlarged_sum(run: Run, row: int) -> float:
    cells = np.floor((np.arange(24) + 0.5) * 20 / 24).astype(int)
    return float(run.read_array("where")[row][np.ix_(cells, cells)].sum())


def test_fiftyone_imports_its_dataset(run: Run, tmp_path: Path) -> None:
    export(run, "fiftyone", tmp_path / "dataset")
    told = read("fiftyone", tmp_path / "dataset")
    kept = pq.read_table(run.path / "samples.parquet").to_pydict()
    records = run.read_json("findings.json")["findings"]
    assert told["findings"] == {record["id"]: record["size"] for record in records}
    assert {name: count for name, count in told["tags"].items() if name in told["findings"]} == told["findings"]
    assert told["filepath"] == kept["path"]
    assert (told["ground_truth.label"], told["prediction.label"]) == (kept["label"], kept["prediction"])
    for name, column in (
        ("score", "score"),
        ("x", "x"),
        ("cluster", "cluster"),
        ("prediction.confidence", "probability"),
    ):
        assert told[name] == kept[column]
    assert np.allclose(told["sums"], run.read_array("where").sum((1, 2)), rtol=1e-4)
    assert told["shapes"] == [[20, 20]] * len(kept["id"])
    assert all(low == -high for low, high in told["relevance.range"])
    assert told["info"]["findings"]["f001"].startswith("confirmed: ")


def test_spotlight_serves_its_folder(run: Run, tmp_path: Path) -> None:
    export(run, "spotlight", tmp_path / "folder")
    told = read("spotlight", tmp_path / "folder")
    columns = {column["name"]: column for column in told["table"]["columns"]}
    kept = pq.read_table(run.path / "samples.parquet").to_pydict()
    assert columns["id"]["values"] == kept["id"]
    assert np.allclose(columns["x"]["values"], kept["x"])
    assert (columns["path"]["dtype"]["name"], columns["relevance"]["dtype"]["name"]) == ("Image", "Embedding")
    assert [issue["rows"] for issue in told["issues"]] == [
        [kept["id"].index(name) for name in record["samples"]] for record in run.read_json("findings.json")["findings"]
    ]
