"""Chosen samples as a file: CSV, Parquet, JSON, or an archive of the pictures, sent while it is made."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv
from starlette.responses import StreamingResponse

from pfungst.exports.rows import join_lists, select_samples
from pfungst.filenames import make_slug
from pfungst.viewer.opened import OpenRun

FORMATS = {"csv": "text/csv", "parquet": "application/vnd.apache.parquet", "json": "application/json",
           "zip": "application/zip"}  # fmt: skip
_BATCH = 10_000  # samples that are written at once
_PIECE = 1 << 20  # bytes of a picture that are read at once


class _Sink(io.RawIOBase):
    """Takes what is written and hands it out; never more than was written since it was last asked."""

    def __init__(self) -> None:
        self._written: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, content: object) -> int:
        kept = bytes(content)  # type: ignore[call-overload]
        self._written.append(kept)
        return len(kept)

    def take(self) -> bytes:
        """What has come in since."""
        found, self._written = b"".join(self._written), []
        return found


def send(opened: OpenRun, rows: np.ndarray, form: str, name: str = "") -> StreamingResponse:
    """The samples of these rows, ascending, in one of ``FORMATS``; columns are those of ``pfungst export``."""
    table = select_samples(opened.run, images=opened.images, rows=rows).table
    writers: dict[str, Callable[[pa.Table], Iterator[bytes]]] = {
        "csv": _csv,
        "parquet": _parquet,
        "json": _json,
        "zip": _zip,
    }
    slug = make_slug(f"{opened.run.path.absolute().name}_{name or len(rows)}", 80)
    safe = slug.encode("ascii", "ignore").decode() or "samples"
    headers = {"Content-Disposition": f'attachment; filename="{safe}.{form}"'}
    return StreamingResponse(writers[form](table), media_type=FORMATS[form], headers=headers)


def _csv(table: pa.Table) -> Iterator[bytes]:
    sink = _Sink()
    for start in range(0, max(1, len(table)), _BATCH):
        part = join_lists(table.slice(start, _BATCH))
        csv.write_csv(part, sink, csv.WriteOptions(include_header=start == 0))
        yield sink.take()


def _parquet(table: pa.Table) -> Iterator[bytes]:
    sink = _Sink()
    with pq.ParquetWriter(pa.PythonFile(sink, mode="w"), table.schema) as writer:
        for start in range(0, len(table), 10 * _BATCH):
            writer.write_table(table.slice(start, 10 * _BATCH))
            yield sink.take()
    yield sink.take()


def _json(table: pa.Table) -> Iterator[bytes]:
    yield b"["
    for start in range(0, len(table), _BATCH):
        lines = [json.dumps(_finite(row), ensure_ascii=False) for row in table.slice(start, _BATCH).to_pylist()]
        yield ((",\n" if start else "\n") + ",\n".join(lines)).encode("utf-8", "replace")
    yield b"\n]\n"


def _finite(row: dict[str, object]) -> dict[str, object]:
    """JSON knows no nan."""
    return {key: None if isinstance(value, float) and value != value else value for key, value in row.items()}


def _zip(table: pa.Table) -> Iterator[bytes]:
    """The pictures as they are, in folders as their ids say, and ``samples.csv`` with the ``file`` of each; pictures
    that are not there have none."""
    sink = _Sink()
    files: list[str | None] = []
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        taken: set[str] = set()
        for row, (name, path) in enumerate(zip(*(table.column(of).to_pylist() for of in ("id", "path")), strict=True)):
            file = _place(name, row, taken)
            try:
                picture = Path(path).open("rb")  # noqa: SIM115  closed below, in pieces
            except (OSError, ValueError):
                files.append(None)
                continue
            with picture, archive.open(zipfile.ZipInfo(file), "w", force_zip64=True) as entry:
                while piece := picture.read(_PIECE):
                    entry.write(piece)
                    yield sink.take()
            files.append(file)
            yield sink.take()
        listed = join_lists(table).append_column("file", pa.array(files, pa.string()))
        with archive.open(zipfile.ZipInfo("samples.csv"), "w", force_zip64=True) as entry:
            for part in _csv(listed):
                entry.write(part)
                yield sink.take()
    yield sink.take()


def _place(name: str, row: int, taken: set[str]) -> str:
    """Where a picture goes in the archive: its id, made safe to unpack anywhere."""
    parts = [make_slug(part, 100) for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", "..")]
    file = "/".join(["pictures", *parts]) if parts else f"pictures/{row}"
    if file.casefold() in taken:
        file = f"pictures/{row}_{parts[-1] if parts else ''}"
    taken.add(file.casefold())
    return file
