"""A table (.csv or .parquet) that lists pictures: columns path, label (optional), and any others as metadata."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pfungst.domains.labels import match_classes, shorten
from pfungst.errors import DataError

# Labels that are plain numbers index the classes; a greater one is an identifier of something else.
_MAX_INDEX = 100_000


@dataclass(frozen=True, eq=False)
class Manifest:
    """What a manifest says: ``ids`` (its path column), ``labels`` (n,) int64, -1 = none, and the rest as metadata."""

    ids: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    metadata: pa.Table | None
    notes: tuple[str, ...]


def read_manifest(path: Path, classes: Sequence[str] | None) -> Manifest:
    """Read a manifest; paths in it are relative to its folder.

    A label is a class name, or a whole number that indexes the classes; nothing or -1 means that there is none.
    Without ``classes``, whole numbers n give the classes "0" ... "max n", names are sorted.

    Raises DataError: no table, no path column, a path missing or twice, a label that is not among the classes.
    """
    table = _read_table(path)
    columns = Counter(table.column_names)
    twice = [name for name in ("path", "label") if columns[name] > 1]
    if twice:
        raise DataError(f"{path} has the column {twice[0]} more than once", "keep one of them")
    if not columns["path"]:
        raise DataError(
            f"{path} has no column path; it has {shorten(map(repr, table.column_names)) or 'none'}",
            "name the column with the image files path, separate columns by commas",
        )
    if not table.num_rows:
        raise DataError(f"{path} lists no images", "give a manifest with one row an image")
    ids = ["" if value is None else str(value) for value in table.column("path").to_pylist()]
    if "" in ids:
        raise DataError(f"{path}: row {ids.index('') + 1} has no path", "fill it in or remove the row")
    repeated = [name for name, count in Counter(ids).items() if count > 1]
    if repeated:
        raise DataError(f"{path} lists images more than once: {shorten(repeated)}", "keep one row an image")
    raw = table.column("label").to_pylist() if columns["label"] else [None] * len(ids)
    labels, names = _read_labels([_as_text(value) for value in raw], classes, path)
    others = [name for name in table.column_names if name not in ("path", "label")]
    counts = np.bincount(labels[labels >= 0], minlength=len(names))
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    return Manifest(
        ids=tuple(ids),
        labels=labels,
        classes=names,
        metadata=table.select(others) if others else None,
        notes=(f"empty class: no image of {shorten(empty)}",) if empty and classes is None else (),
    )


def _read_table(path: Path) -> pa.Table:
    try:
        if path.suffix.lower() == ".parquet":
            from pyarrow import parquet

            # By handle: a path would let pyarrow guess partitions from the names of folders above.
            with path.open("rb") as file:
                return parquet.read_table(file)
        from pyarrow import csv

        # As text, so that 007 keeps its zeros.
        text = csv.ConvertOptions(column_types={"path": pa.string(), "label": pa.string()})
        return csv.read_csv(path, convert_options=text)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read as a manifest: {error}",
            "give a .csv with a header line, commas and UTF-8, or a .parquet file",
        ) from error


def _as_text(value: Any) -> str:
    """A label as text; pandas turns whole numbers with gaps into floats, so 3.0 is 3."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    return "" if text == "-1" else text


def _read_labels(texts: list[str], classes: Sequence[str] | None, path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    given = sorted({text for text in texts if text})
    if classes is not None:
        index_of, names = match_classes(given, classes), tuple(classes)
    elif given and all(re.fullmatch(r"\d+", text) for text in given):
        greatest = max(map(int, given))
        if greatest > _MAX_INDEX:
            raise DataError(
                f"{path}: the label {greatest} is too great for a class index",
                "write class names, or indices from 0 on, or give the class names with --classes",
            )
        index_of = {text: int(text) for text in given}
        names = tuple(str(index) for index in range(greatest + 1))
    else:
        index_of, names = {name: index for index, name in enumerate(given)}, tuple(given)
    return np.asarray([index_of[text] if text else -1 for text in texts], dtype=np.int64), names
