"""A finished run as the viewer reads it: records of findings, columns of samples, pictures, relevance.

Nothing is held that grows with the pictures, and of the samples only the columns that were asked for.
"""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from pfungst.domains.decoding import UnreadableImage, open_image
from pfungst.domains.preprocessing import from_description
from pfungst.errors import DataError, RunError
from pfungst.facts import EXPERIMENT_TITLES, tell_finding, tell_head, tell_spectrum
from pfungst.judgements import add_judgements, find_record, read_judgements
from pfungst.recognition import read_recognition, tell_recognition
from pfungst.reports import VERDICT_ORDER, place_in_report, write_headline
from pfungst.store import JUDGEMENTS, Run
from pfungst.strategies import read_strategies

PICTURES = ("mean", "mask", "why", *EXPERIMENT_TITLES["region"])  # of a finding, by name; exemplars besides
SIDES = (48, 96, 224, 512, 1024)  # sizes in which pictures are sent; others go to the next greater one
_KEPT_PICTURES = 1024


class OpenRun:
    """One run folder; all methods may be called from several threads."""

    def __init__(self, path: str | Path, images: str | Path | None = None) -> None:
        """``images``: where the pictures are now, if they were moved.  RunError where the run is not finished."""
        self.run = Run(Path(path).absolute())  # a model that is being loaded may change the working folder for a moment
        self.description = self.run.describe()
        self.run.check_finished()
        self.images = None if images is None else Path(images).absolute()
        samples = self.run.path / "samples.parquet"
        try:
            self.schema: pa.Schema = pq.read_schema(samples)
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise RunError(f"{samples} is damaged: {error}", "give the audit another --out folder") from error
        self.size: int = self.description["data"]["samples"]
        self.preprocess = from_description(self.description["model"]["preprocess"])
        self._lock = threading.Lock()
        self._columns: dict[str, pa.ChunkedArray] = {}
        self.picture = functools.lru_cache(_KEPT_PICTURES)(self._picture)

    # ---- records -----------------------------------------------------------------------------------------------------

    def overview(self) -> dict[str, Any]:
        """What the run is of, for the head of the page."""
        content = self.run.read_findings()
        counts = dict.fromkeys(VERDICT_ORDER, 0)
        for finding in content["findings"]:
            counts[finding["verdict"]] += 1
        found = read_recognition(self.run)
        return {
            "name": self.run.path.name,
            "path": str(self.run.path),
            "model": self.description["model"]["name"],
            "images": self.description["data"]["root"],
            "samples": self.size,
            "classes": self.description["data"]["classes"],
            "target": self.description["data"]["target"],
            "preset": self.description["preset"],
            "counts": counts,
            "headline": write_headline(counts, found),
            "recognition": found.record() | {"text": tell_recognition(found)} if found else None,
            "untested": content["untested"],
        }

    def findings(self) -> list[dict[str, Any]]:
        """Entries of ``findings.json`` in the report's order, with judgements and rows, without what is long."""
        records = add_judgements(self.run, self.run.read_findings()["findings"])
        rows = self._rows()
        short = []
        for record in sorted(records, key=place_in_report):
            kept = {key: record[key] for key in _LISTED} | tell_head(record)
            kept["exemplars"] = [rows.get(one["sample"]) for one in record["exemplars"]]
            short.append(kept)
        return short

    def finding(self, name: str) -> dict[str, Any]:
        """All that is known of one finding.  RunError where there is none of this id."""
        (record,) = add_judgements(self.run, [find_record(self.run, name)])
        rows, entry = self._rows(), self.strategy(record["class_index"]) or {}
        return {
            **record,
            **tell_finding(self.run, record),
            "rows": self._locate(record["samples"]),
            "exemplars": [rows.get(one["sample"]) for one in record["exemplars"]],
            **{role: self._locate(record[role]) for role in ("central", "rim", "nearest")},
            "spectrum": {key: entry.get(key) for key in _SPECTRUM} | tell_spectrum(entry),
        }

    def list_members(self) -> list[list[int]]:
        """Rows of the members of each finding."""
        return list(self.members().values())

    @functools.lru_cache(1)  # noqa: B019  the run lives as long as the viewer
    def members(self) -> dict[str, list[int]]:
        """Rows of the members of each finding, by its id."""
        return {record["id"]: self._locate(record["samples"]) for record in self.run.read_findings()["findings"]}

    def _locate(self, names: Iterable[str]) -> list[int]:
        """Rows of samples that findings name, by id."""
        rows = self._rows()
        return [rows[one] for one in names if one in rows]

    def strategy(self, index: int) -> dict[str, Any] | None:
        """The analysis of a class; None where it was not analysed."""
        entry: dict[str, Any] | None = self.run.read_json(f"classes/{index:04d}.json")
        return entry

    def classes(self) -> list[dict[str, Any]]:
        """The classes that were analysed, without their rows."""
        left_out = ("rows", "cluster", "outlier", "x", "y", "groups", "eigenvalues")
        return [
            {
                **{key: value for key, value in entry.items() if key not in left_out},
                "size": len(entry["rows"]),
                "mapped": "x" in entry,
                "suspicion": max((group["suspicion"] for group in entry["groups"]), default=None),
            }
            for entry in read_strategies(self.run)
        ]

    def find_picture(self, finding: str, name: str) -> Path:
        """A picture file of a finding.  RunError where there is none: names are looked up, never joined."""
        find_record(self.run, finding)
        path = self.run.path / "findings" / finding / f"{name}.png"
        exemplar = name.startswith("exemplar_") and name.removeprefix("exemplar_")[:2].isdecimal()
        known = name in PICTURES or (exemplar and name[11:] in ("_input", "_overlay"))
        if not known or not is_own_file(path):
            raise RunError(f"{finding} has no picture {name!r}", "see its entry of findings.json")
        return path

    def version(self) -> str:
        """Changes whenever somebody judges, here or elsewhere."""
        try:
            known = (self.run.path / JUDGEMENTS).stat()
        except FileNotFoundError:
            return "0"
        return f"{known.st_size}-{known.st_mtime_ns}"

    def torn(self) -> int:
        """Lines of the file of judgements that cannot be read."""
        return read_judgements(self.run)[1]

    # ---- samples -----------------------------------------------------------------------------------------------------

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of ``samples.parquet``, kept from then on.  RunError where there is none of this name."""
        if name not in self.schema.names:
            raise RunError(f"the samples have no column {name!r}", f"they have {', '.join(self.schema.names)}")
        with self._lock:
            if name not in self._columns:
                table = pq.read_table(self.run.path / "samples.parquet", columns=[name])
                self._columns[name] = table.column(0)
            return self._columns[name]

    def sample(self, row: int) -> dict[str, Any]:
        """Everything that ``samples.parquet`` says of a sample."""
        self.check(row)
        return {name: self.column(name)[row].as_py() for name in self.schema.names}

    def relevance(self, row: int) -> np.ndarray:
        """(h, w) float32: the whole map where the run kept it, else the pooled one."""
        self.check(row)
        name = "relevance" if self.description["settings"]["full_maps"] else "where"
        found: np.ndarray = self.run.read_array(name, np.array([row]))[0].astype(np.float32)
        return found

    def _picture(self, row: int, side: int, as_input: bool) -> bytes:
        """A sample's picture as a JPEG file, the longer side at most ``side`` pixels.

        ``as_input``: only the part that the model gets, squeezed as the model gets it, so that a map fits on it.
        """
        self.check(row)
        path = Path(self.column("path")[row].as_py())
        if self.images is not None:
            path = self.images / self.column("id")[row].as_py()
        try:
            picture = open_image(path, None if as_input else side)
        except UnreadableImage as error:
            raise DataError(f"{path}: {error}", "give --images with the folder of the pictures, if moved") from error
        if as_input and self.preprocess is not None:
            top, left, bottom, right = self.preprocess.window(picture.height, picture.width)
            height, width = self.preprocess.size
            shrink = min(1.0, side / max(height, width))
            wanted = max(1, round(width * shrink)), max(1, round(height * shrink))
            picture = picture.transform(
                wanted,
                Image.Transform.EXTENT,
                (left, top, right, bottom),
                resample=Image.Resampling.BILINEAR,
                fillcolor=(128, 128, 128),
            )
        else:
            picture.thumbnail((side, side))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=90, subsampling=0)  # small pictures keep their colours
        return file.getvalue()

    def check(self, row: int) -> None:
        """RunError where there is no such sample."""
        if not 0 <= row < self.size:
            raise RunError(f"there is no sample {row}", f"the run has {self.size}")

    @functools.lru_cache(1)  # noqa: B019  the run lives as long as the viewer
    def _rows(self) -> dict[str, int]:
        """Row of every sample that a finding names, by id."""
        named = {
            sample
            for record in self.run.read_findings()["findings"]
            for sample in (*record["samples"], *record["central"], *record["rim"], *record["nearest"])
        }
        found = pc.index_in(pa.array(sorted(named), pa.string()), value_set=self.column("id").combine_chunks())
        return {name: row for name, row in zip(sorted(named), found.to_pylist(), strict=True) if row is not None}


def is_own_file(path: Path) -> bool:
    """Whether this is a file of the run folder itself, and no link that leads out of it."""
    return not path.is_symlink() and path.is_file()


_SPECTRUM = ("eigenvalues", "clusters", "gap", "p", "separability", "separability_p")
_LISTED = ("id", "rank", "class", "class_index", "size", "prevalence", "suspicion", "views", "where", "summary",
           "verdict", "p", "reason", "judgements")  # fmt: skip
