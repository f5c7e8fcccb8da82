"""Columns of the samples as the page colours and filters by them: numbers, or codes of a few values, in binary."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pfungst.judgements import ANSWERS, last_answer
from pfungst.viewer.calls import Refused
from pfungst.viewer.opened import OpenRun

UNKNOWN = 0xFFFFFFFF  # the code of a sample without a value
MOST_VALUES = 4096  # of a category; a column of more different texts is text, which is shown but not drawn
_FEW = 64  # different whole numbers up to which they are names rather than amounts
_KEPT = 12  # arrays of codes
_TEXTS = ("id", "path")
_DERIVED = ("correct", "verdict", "judged")
_SEVERAL = "finding"  # the column of which a sample may have several values


@dataclass(frozen=True)
class Column:
    """``kind``: number, category (of ``values``, by code) or text.

    A sample can have several values of a category: then there are ``Columns.members`` of it, and the codes are of the
    first value of each.
    """

    name: str
    kind: str
    values: tuple[str, ...] = ()


class Columns:
    """The columns of one run; what is read is kept as codes, not as text."""

    def __init__(self, opened: OpenRun) -> None:
        self.opened = opened
        self._path = opened.run.path / "samples.parquet"
        self._lock = threading.RLock()
        self._known: dict[str, Column] = {}
        self._codes: OrderedDict[str, np.ndarray] = OrderedDict()

    def names(self) -> list[str]:
        """All columns, those derived from others last."""
        derived = [name for name in _DERIVED if name not in self.opened.schema.names]
        return [*self.opened.schema.names, *derived]

    def version(self) -> str:
        """Changes with the file and with what people judged: what a browser may keep goes by it."""
        known = self._path.stat()
        text = f"{self._path.absolute()} {known.st_size} {known.st_mtime_ns} {self.opened.version()}"
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]

    def describe(self) -> list[dict[str, Any]]:
        """Name, kind and values of every column."""
        return [
            {"name": one.name, "kind": one.kind, "values": list(one.values), "several": one.name == _SEVERAL}
            for one in map(self.find, self.names())
        ]

    def members(self, name: str) -> list[np.ndarray]:
        """Rows (m,) uint32 of the samples that have each value of the column, several or not, ascending."""
        if name != _SEVERAL:
            raise Refused(422, f"a sample has one value of {name} at most")
        found = self.opened.members()
        return [np.unique(np.array(found.get(value, []), "<u4")) for value in self.find(name).values]

    def find(self, name: str) -> Column:
        """The column of this name.  Raises Refused."""
        if name not in self.names():
            raise Refused(404, f"the samples have no column {name!r}")
        with self._lock:
            if name not in self._known:
                self._read(name)
            return self._known[name]

    def numbers(self, name: str) -> np.ndarray:
        """(n,) float32, nan where unknown.  Raises Refused for what is no number."""
        if self.find(name).kind != "number":
            raise Refused(422, f"{name} is no number")
        column = pq.read_table(self._path, columns=[name]).column(0)
        found: np.ndarray = column.cast(pa.float32(), safe=False).to_numpy().astype("<f4")
        return found

    def codes(self, name: str) -> np.ndarray:
        """(n,) uint32: places in the column's ``values``, ``UNKNOWN`` where there is none."""
        if self.find(name).kind != "category":
            raise Refused(422, f"{name} is not of a few values")
        if name in ("verdict", "judged") and name in _DERIVED and name not in self.opened.schema.names:
            return self._of_findings(name)  # people judge while this is shown
        with self._lock:
            if name not in self._codes:
                self._read(name)
            self._codes.move_to_end(name)
            return self._codes[name]

    def _read(self, name: str) -> None:
        if name not in self.opened.schema.names:
            self._derive(name)
            return
        kind = self.opened.schema.field(name).type
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)
        if name in _TEXTS or not (text or _is_number(kind) or pa.types.is_boolean(kind)):
            self._known[name] = Column(name, "text")
        elif text:
            column = pq.read_table(self._path, columns=[name], read_dictionary=[name]).column(0)
            self._keep_category(name, column, sorted)
        elif pa.types.is_boolean(kind) or pa.types.is_integer(kind):
            column = pq.read_table(self._path, columns=[name]).column(0)
            if len(column.unique()) <= _FEW:
                self._keep_category(name, column.cast(pa.string()), _by_size)
            else:
                self._known[name] = Column(name, "number")
        else:
            self._known[name] = Column(name, "number")

    def _keep_category(self, name: str, column: pa.ChunkedArray, order: Any) -> None:
        if not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode()
        whole = column.unify_dictionaries().combine_chunks()
        whole = whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole
        there = whole.dictionary.to_pylist() if len(whole.dictionary) <= MOST_VALUES else None
        if there is None:
            self._known[name] = Column(name, "text")
            return
        classes = self.opened.description["data"]["classes"]
        named = [value for value in there if value]  # an empty text says nothing
        values = [one for one in dict.fromkeys(classes) if one in set(named)]
        if name == _SEVERAL:  # those, too, whose members are all of another one first
            values = sorted({*named, *self.opened.members()})
        elif len(values) < len(named):
            values = order(named)
        place = {value: code for code, value in enumerate(values)}
        table: np.ndarray = np.array([*(place.get(value, UNKNOWN) for value in there), UNKNOWN], "<u4")
        indices = whole.indices.fill_null(len(there)).to_numpy(zero_copy_only=False)
        self._hold(Column(name, "category", tuple(values)), table[indices])

    def _hold(self, column: Column, codes: np.ndarray) -> None:
        self._known[column.name] = column
        self._codes[column.name] = codes
        while len(self._codes) > _KEPT:
            self._codes.popitem(last=False)

    def _derive(self, name: str) -> None:
        if name == "judged":
            self._known[name] = Column(name, "category", ANSWERS)
        elif name == "verdict":
            self._known[name] = Column(name, "category", ("confirmed", "open", "refuted"))
        else:
            label, prediction = (self._texts(of) for of in ("label", "prediction"))
            (codes, values), (others, theirs) = label, prediction
            same = {value: code for code, value in enumerate(values)}
            table: np.ndarray = np.array([*(same.get(one, len(values)) for one in theirs), UNKNOWN], "<u4")
            predicted = table[np.minimum(others, len(theirs))]
            known = (codes != UNKNOWN) & (predicted != UNKNOWN)
            wrong = (codes != predicted).astype("<u4")
            self._hold(Column(name, "category", ("right", "wrong")), np.where(known, wrong, UNKNOWN).astype("<u4"))

    def _texts(self, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
        column = self.find(name)
        if column.kind != "category":
            return np.full(self.opened.size, UNKNOWN, "<u4"), ()
        return self.codes(name), column.values

    def _of_findings(self, name: str) -> np.ndarray:
        """Codes by what is known of the findings whose member a sample is: of the first that has a value."""
        values, members = self.find(name).values, self.opened.members()
        found: np.ndarray = np.full(self.opened.size, UNKNOWN, "<u4")
        for one in reversed(self.opened.findings()):  # the first of the report last
            told = last_answer(one) if name == "judged" else one["verdict"]
            if told in values:
                found[members[one["id"]]] = values.index(told)
        return found


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _by_size(values: list[str]) -> list[str]:
    return sorted(values, key=lambda value: (int(value) if value.lstrip("-").isdecimal() else 0, value))
