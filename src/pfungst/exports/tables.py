"""A run as one table: CSV, Parquet, and what Spotlight shows (its data frame, its issues, and a script)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pfungst.exports.rows import Samples, join_lists, new_file, new_folder
from pfungst.judgements import last_answer
from pfungst.vectors import unit_rows

_SEVERITY = {"confirmed": "high", "open": "medium", "refuted": "low"}

_SCRIPT = '''"""Open this folder in Spotlight:  pip install renumics-spotlight  &&  python show.py"""

import json
from pathlib import Path

import pandas as pd
from renumics import spotlight
from renumics.spotlight.analysis.typing import DataIssue

folder = Path(__file__).resolve().parent
samples = pd.read_parquet(folder / "samples.parquet")
issues = [DataIssue(**issue) for issue in json.loads((folder / "issues.json").read_text(encoding="utf-8"))]
dtype = {"path": spotlight.Image, "relevance": spotlight.Embedding}

if __name__ == "__main__":
    # analyze=False: the issues are the audit's findings, Spotlight looks for no others.
    spotlight.show(samples, dtype=dtype, issues=issues, analyze=False, wait="forever")
'''


def write_csv(samples: Samples, out: str | Path) -> None:
    """One row a sample; findings, verdicts and judgements of a sample are joined by ";"."""
    from pyarrow import csv

    with new_file(out) as path:
        csv.write_csv(join_lists(samples.table), path)


def write_parquet(samples: Samples, out: str | Path) -> None:
    """One row a sample; findings, verdicts and judgements of a sample are lists."""
    with new_file(out) as path:
        pq.write_table(samples.table, path)


def write_spotlight(samples: Samples, out: str | Path) -> None:
    """A folder with ``samples.parquet`` (with the pooled relevance of each sample, unit norm), ``issues.json``, one
    issue a finding, and ``show.py``, which opens both in Spotlight."""
    with new_folder(out) as folder:
        _write_samples(samples, folder / "samples.parquet")
        issues = [_describe_issue(samples, record) for record in samples.findings]
        (folder / "issues.json").write_text(json.dumps(issues, indent=1, ensure_ascii=False), encoding="utf-8")
        (folder / "show.py").write_text(_SCRIPT, encoding="utf-8")


def _write_samples(samples: Samples, path: Path) -> None:
    table, readable = join_lists(samples.table), samples.read()
    width = int(np.prod(samples.run.shape("where")[1:]))
    kind = pa.list_(pa.float32())
    schema = table.schema.append(pa.field("relevance", kind))
    with pq.ParquetWriter(path, schema) as writer:
        for places, values in samples.run.stream_arrays(["where"], samples.rows):
            vectors = unit_rows(values["where"].reshape(len(places), width))
            column = pa.array([vectors[i] if readable[row] else None for i, row in enumerate(places)], kind)
            writer.write_table(table.take(pa.array(places)).append_column("relevance", column).cast(schema))


def _describe_issue(samples: Samples, record: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of Spotlight's ``DataIssue``; rows are those of ``samples.parquet`` beside it."""
    said = last_answer(record)
    judged = f" Judged: {said}." if said else ""
    return {
        "title": f"{record['id']} {record['class']}: {record['where']['place']} ({record['verdict']})",
        "rows": samples.members(record).tolist(),
        "severity": _SEVERITY[record["verdict"]],
        "columns": ["path", "relevance"],
        "description": record["summary"] + judged,
    }
