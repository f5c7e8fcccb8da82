"""Chosen samples as a file: CSV, Parquet, JSON, or an archive of the pictures, sent while it is made."""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv
from starlette.responses import StreamingResponse

from pfungst.exports.rows import join_lists, stream_samples
from pfungst.filenames import make_slug
from pfungst.viewer.opened import OpenRun

FORMATS = {"csv": "text/csv", "parquet": "application/vnd.apache.parquet", "json": "application/json",
           "zip": "application/zip"}  # fmt: skip
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
    parts = stream_samples(opened.run, rows, opened.images)
    writers: dict[str, Callable[[Iterator[pa.Table]], Iterator[bytes]]] = {
        "csv": _csv,
        "parquet": _parquet,
        "json": _json,
        "zip": _zip,
    }
    slug = make_slug(f"{opened.run.path.absolute().name}_{name or len(rows)}", 80)
    safe = slug.encode("ascii", "ignore").decode() or "samples"
    headers = {"Content-Disposition": f'attachment; filename="{safe}.{form}"'}
    return StreamingResponse(writers[form](parts), media_type=FORMATS[form], headers=headers)


def _csv(parts: Iterator[pa.Table]) -> Iterator[bytes]:
    sink = _Sink()
    for number, part in enumerate(parts):
        csv.write_csv(join_lists(part), sink, csv.WriteOptions(include_header=number == 0))
        yield sink.take()


def _parquet(parts: Iterator[pa.Table]) -> Iterator[bytes]:
    sink = _Sink()
    first = next(parts)
    with pq.ParquetWriter(pa.PythonFile(sink, mode="w"), first.schema) as writer:
        for part in chain([first], parts):
            writer.write_table(part)
            yield sink.take()
    yield sink.take()


def _json(parts: Iterator[pa.Table]) -> Iterator[bytes]:
    mark = "["
    for part in parts:
        for row in part.to_pylist():
            yield f"{mark}\n{json.dumps(_finite(row), ensure_ascii=False)}".encode("utf-8", "replace")
            mark = ","
    yield b"\n]\n"


def _finite(row: dict[str, object]) -> dict[str, object]:
    """JSON knows no nan."""
    return {key: None if isinstance(value, float) and value != value else value for key, value in row.items()}


def _zip(parts: Iterator[pa.Table]) -> Iterator[bytes]:
    """The pictures as they are, in folders as their ids say, and ``samples.csv`` with the ``file`` of each; pictures
    that are not there have none."""
    sink = _Sink()
    taken: set[str] = set()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive, tempfile.TemporaryFile() as listed:
        for number, part in enumerate(parts):
            files: list[str | None] = []
            for name, path in zip(*(part.column(of).to_pylist() for of in ("id", "path")), strict=True):
                file = _place(name, taken)
                try:
                    picture = Path(path).open("rb")  # noqa: SIM115  closed below, in pieces
                except (OSError, ValueError):
                    files.append(None)
                    continue
                files.append(file)
                with picture:
                    yield from _add(archive, sink, file, picture)
            table = join_lists(part).append_column("file", pa.array(files, pa.string()))
            csv.write_csv(table, listed, csv.WriteOptions(include_header=number == 0))
        listed.seek(0)
        yield from _add(archive, sink, "samples.csv", listed)
    yield sink.take()


def _add(archive: zipfile.ZipFile, sink: _Sink, name: str, content: IO[bytes]) -> Iterator[bytes]:
    with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as entry:
        while piece := content.read(_PIECE):
            entry.write(piece)
            yield sink.take()
    yield sink.take()


def _place(name: str, taken: set[str]) -> str:
    """Where a picture goes in the archive: its id, made safe to unpack anywhere; ``taken``: names that are there."""
    parts = [make_slug(part, 100) for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", "..")]
    file = "/".join(["pictures", *(parts or ["_"])])
    if file.casefold() in taken:
        file = f"pictures/{len(taken)}_{(parts or ['_'])[-1]}"
    taken.add(file.casefold())
    return file
