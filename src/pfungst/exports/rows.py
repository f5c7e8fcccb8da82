"""What every export is made of: the samples of a run with their findings, where they lie, and their maps in pieces."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from pfungst.domains.preprocessing import Preprocess, from_description
from pfungst.errors import DataError, SettingError
from pfungst.judgements import add_judgements, find_record, last_answer
from pfungst.store import READ, Run, writing

_COLUMNS = (
    *("id", "path", "label", "prediction", "probability", "class", "score", "outlier", "cluster", "x", "y"),
    "set_aside",
)
_BATCH = 20_000  # samples that are read at once
_SIDEWAYS = (5, 6, 7, 8)  # values of EXIF's orientation where width and height change places


@dataclass(frozen=True)
class Samples:
    """The samples that are exported.

    findings    entries of ``findings.json`` with their ``judgements``, those that were asked for
    rows        (m,) rows of the run's ``samples.parquet``, ascending
    table       one row a sample: columns of ``samples.parquet``, then ``findings``, ``verdicts`` and ``judgements``,
                lists of one text a finding of which the sample is a member (the latest judgement, "" for none)
    preprocess  from picture to input; None where the model has a callable of its own
    maps        name of the array of relevance: whole maps where the run kept them, else pooled ones
    """

    run: Run
    description: dict[str, Any]
    findings: list[dict[str, Any]]
    rows: np.ndarray
    table: pa.Table
    preprocess: Preprocess | None
    maps: str

    def members(self, finding: dict[str, Any]) -> np.ndarray:
        """Places in ``rows`` of the members of one of the findings, ascending."""
        wanted = pa.array(finding["samples"], pa.string())
        found = pc.is_in(self.table.column("id"), value_set=wanted)
        places: np.ndarray = np.flatnonzero(found.to_numpy())
        return places

    def read(self) -> np.ndarray:
        """(m,) bool: whether the picture could be read and explained."""
        status: np.ndarray = self.run.read_array("status", self.rows)
        return status == READ

    def stream_maps(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Places in ``rows`` and their relevance maps (k, h, w), block by block."""
        for places, values in self.run.stream_arrays([self.maps], self.rows):
            yield places, values[self.maps]


def select_samples(
    run: Run, findings: Sequence[str] = (), images: str | Path | None = None, whole_classes: bool = False
) -> Samples:
    """The samples of a finished run; with ``findings``, ids of some of its findings, only their members.

    images         the folder of the pictures, if they were moved
    whole_classes  with the members all samples that were explained as one of their class
    """
    description = run.describe()
    run.check_finished()
    content = run.read_findings()
    for name in findings:
        find_record(run, name)
    records = [one for one in content["findings"] if not findings or one["id"] in findings]
    records = add_judgements(run, records)
    table = pq.read_table(run.path / "samples.parquet", columns=list(_COLUMNS))
    ids = table.column("id").to_pylist()
    told = _by_sample(records)
    wanted = np.array([name in told or not findings for name in ids], dtype=bool)
    if whole_classes and findings:
        classes = pa.array(sorted({record["class"] for record in records}))
        wanted |= pc.is_in(table.column("class"), value_set=classes).to_numpy()
    rows = np.flatnonzero(wanted)
    table = table.take(pa.array(rows))
    table = _complete(table, told, images)
    preprocess = from_description(description["model"]["preprocess"])
    maps = "relevance" if description["settings"]["full_maps"] else "where"
    return Samples(run, description, records, rows, table, preprocess, maps)


def stream_samples(run: Run, rows: np.ndarray, images: str | Path | None = None) -> Iterator[pa.Table]:
    """The table of ``Samples`` of these rows, ascending, in pieces; never all of it is held."""
    told = _by_sample(add_judgements(run, run.read_findings()["findings"]))
    start, some = 0, False
    with pq.ParquetFile(run.path / "samples.parquet") as file:
        for batch in file.iter_batches(_BATCH, columns=list(_COLUMNS)):
            first, last = np.searchsorted(rows, [start, start + len(batch)])
            if first < last or not some:  # at least one piece, so that its columns are known
                part = pa.Table.from_batches([batch]).take(pa.array(rows[first:last] - start))
                yield _complete(part.select(_COLUMNS), told, images)
                some = True
            start += len(batch)


def _by_sample(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The findings of each sample, by its id."""
    told: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        for name in record["samples"]:
            told.setdefault(name, []).append(record)
    return told


def _complete(table: pa.Table, told: dict[str, list[dict[str, Any]]], images: str | Path | None) -> pa.Table:
    """The table with the paths of moved pictures, and with what is told of the findings of each sample."""
    ids = table.column("id").to_pylist()
    if images is not None:
        paths = [str(Path(images) / name) for name in ids]
        table = table.set_column(table.schema.get_field_index("path"), "path", pa.array(paths, pa.string()))
    own = [told.get(name, []) for name in ids]
    for name, text in (("findings", _id), ("verdicts", _verdict), ("judgements", last_answer)):
        column = pa.array([[text(record) for record in one] for one in own], pa.list_(pa.string()))
        table = table.append_column(name, column)
    return table


def _id(record: dict[str, Any]) -> str:
    return str(record["id"])


def _verdict(record: dict[str, Any]) -> str:
    return str(record["verdict"])


def join_lists(table: pa.Table) -> pa.Table:
    """The table with lists of texts joined by ";", for formats that have no lists."""
    for index, field in enumerate(table.schema):
        if pa.types.is_list(field.type) and pa.types.is_string(field.type.value_type):
            joined = [";".join(value) for value in table.column(index).to_pylist()]
            table = table.set_column(index, field.name, pa.array(joined, pa.string()))
    return table


def write_entries(file: IO[str], entries: Iterable[dict[str, Any]]) -> None:
    """The entries of a JSON list, one a line, as they come; its brackets are the caller's."""
    for number, entry in enumerate(entries):
        file.write((",\n" if number else "\n") + json.dumps(entry, ensure_ascii=False, allow_nan=False))


# ---- from the model's input back to the picture ----------------------------------------------------------------------


def measure_picture(path: str | Path) -> tuple[int, int]:
    """Height and width of an upright picture; only its header is read.  Raises DataError where that cannot be."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            try:
                sideways = image.getexif().get(0x0112) in _SIDEWAYS
            except Exception:  # Damaged EXIF data: the audit took such a picture as it is stored, too.
                sideways = False
    except Exception as error:  # Pillow raises almost anything on damaged files.
        raise DataError(f"{path} cannot be read: {error}", "give --images with the folder of the pictures") from error
    return (width, height) if sideways else (height, width)


def put_on_picture(
    values: np.ndarray, preprocess: Preprocess, picture: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """A map of the model's input, (h, w), as it lies on the whole picture, (height, width) ``size``; 0 beside it.

    picture  height and width of the picture
    size     of the result, which covers the picture: ``picture`` itself for one value a pixel
    """
    top, left, bottom, right = preprocess.window(*picture)
    places, inside = [], []
    for have, want, whole, low, high in zip(values.shape, size, picture, (top, left), (bottom, right), strict=True):
        centres = (np.arange(want) + 0.5) * (whole / want)
        index = np.floor((centres - low) / (high - low) * have).astype(int)
        inside.append((index >= 0) & (index < have))
        places.append(index.clip(0, have - 1))
    result: np.ndarray = np.where(np.logical_and.outer(*inside), values[np.ix_(*places)], values.dtype.type(0))
    return result


# ---- where an export goes --------------------------------------------------------------------------------------------


@contextmanager
def new_file(out: str | Path) -> Iterator[Path]:
    """A path to write to, which becomes ``out``, whole or not at all.  Raises SettingError where ``out`` exists."""
    out = Path(out).absolute()
    if out.exists() or out.is_symlink():
        raise SettingError(f"{out} exists", "give --out another file, or remove it")
    part = out.with_name(f".{out.name}.part")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            _sync(part)
            part.replace(out)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``out``, whole or not at all.

    Raises SettingError where ``out`` is anything but a folder without files.
    """
    out = Path(out).absolute()
    if out.is_symlink() or (out.exists() and not out.is_dir()) or (out.is_dir() and any(out.iterdir())):
        raise SettingError(f"{out} is not an empty folder", "give --out a folder that is empty or does not exist")
    part = out.with_name(f".{out.name}.part")
    with writing(out):
        shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
        part.mkdir(parents=True)
        try:
            yield part
            for path in part.rglob("*"):
                if path.is_file():
                    _sync(path)
            part.replace(out)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _sync(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
