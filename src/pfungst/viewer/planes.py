"""The calls of the map of samples: columns and layouts in binary, selections by their outline, what people keep."""

from __future__ import annotations

import base64
import threading
import zlib
from typing import Any, Protocol

import numpy as np
from starlette.responses import Response

from pfungst.viewer.calls import Call, Field, Refused
from pfungst.viewer.columns import Columns
from pfungst.viewer.downloads import FORMATS, send
from pfungst.viewer.jobs import Desk
from pfungst.viewer.layouts import Layouts
from pfungst.viewer.opened import OpenRun
from pfungst.viewer.selections import Selections

_FACTS = ("id", "label", "prediction", "probability", "class", "outlier", "cluster")  # of a card, and findings
_MOST_FACTS = 256
_BINARY = "application/octet-stream"


class Runs(Protocol):
    """What has the runs that are shown."""

    def find(self, run: int) -> OpenRun:
        """The run of this number.  Raises Refused."""


class Part:
    """What the map knows of one run."""

    def __init__(self, number: int, opened: OpenRun, desk: Desk) -> None:
        self.opened = opened
        self.columns = Columns(opened)
        self.layouts = Layouts(number, opened, self.columns, desk)
        self.selections = Selections(opened)


class Planes:
    """Answers of the map."""

    def __init__(self, viewer: Runs) -> None:
        self.viewer = viewer
        self._desk = Desk(lambda job: "another map is being computed; stop it, or wait for it")
        self._parts: dict[int, Part] = {}
        self._lock = threading.Lock()

    def find(self, run: int) -> Part:
        """The run of this number.  Raises Refused."""
        opened = self.viewer.find(run)
        with self._lock:
            if run not in self._parts:
                self._parts[run] = Part(run, opened, self._desk)
            return self._parts[run]

    def list_columns(self, run: int) -> dict[str, Any]:
        """What samples can be coloured and filtered by."""
        columns = self.find(run).columns
        return {"version": columns.version(), "samples": columns.opened.size, "columns": columns.describe()}

    def send_column(self, run: int, name: str, version: str) -> Response:
        """One column, a value a sample: little-endian float32 (nan: unknown), or uint32 (4294967295: unknown)."""
        columns = self.find(run).columns
        column = columns.find(name)
        if column.kind == "text":
            raise Refused(422, f"{name} is text")
        values = columns.numbers(name) if column.kind == "number" else columns.codes(name)
        return Response(values.tobytes(), media_type=_BINARY, headers=_keeping(version, columns))

    def send_members(self, run: int, name: str, version: str) -> Response:
        """Who has each value of a column of which a sample may have several, in the order of its values.

        Little-endian uint32: for each value the number of its samples, then their rows, ascending.
        """
        columns = self.find(run).columns
        parts = [part for rows in columns.members(name) for part in (np.array([len(rows)], "<u4"), rows)]
        content = b"".join(part.tobytes() for part in parts)
        return Response(content, media_type=_BINARY, headers=_keeping(version, columns))

    def list_layouts(self, run: int) -> dict[str, Any]:
        """What maps there are."""
        return self.find(run).layouts.describe()

    def show_layout(self, run: int, layout: str) -> dict[str, Any]:
        """How far a map is."""
        return self.find(run).layouts.status(layout)

    def start_layout(self, run: int, layout: str) -> dict[str, Any]:
        """Compute a map."""
        return self.find(run).layouts.start(layout)

    def stop_layout(self, run: int, layout: str) -> dict[str, Any]:
        """Give a map up."""
        return self.find(run).layouts.stop(layout)

    def send_points(self, run: int, layout: str, version: str) -> Response:
        """A map: x, y of each sample, little-endian float32; nan: it is not on the map."""
        part = self.find(run)
        points = part.layouts.plane(layout).interleave(part.opened.size)
        return Response(points.tobytes(), media_type=_BINARY, headers=_keeping(version, part.columns))

    def select(self, run: int, layout: str, polygon: list[float], box: list[float]) -> Response:
        """Rows in a polygon (x, y, x, y ...) or a box (x, y, x, y), ascending, little-endian uint32."""
        if bool(polygon) == bool(box):
            raise Refused(422, "give a polygon or a box")
        ends: np.ndarray = np.array(polygon or box, dtype=np.float64)
        if not (np.abs(ends) < 1e30).all():
            raise Refused(422, "a corner is not finite")
        plane = self.find(run).layouts.plane(layout)
        if box:
            if len(box) != 4:
                raise Refused(422, "a box has four numbers")
            rows = plane.in_box(*ends.tolist())
        else:
            if len(polygon) < 6 or len(polygon) % 2:
                raise Refused(422, "a polygon has three corners or more, two numbers each")
            rows = plane.in_polygon(ends.reshape(-1, 2))
        return Response(rows.astype("<u4").tobytes(), media_type=_BINARY)

    def show_facts(self, run: int, rows: list[int]) -> list[dict[str, Any]]:
        """What the cards of these samples say."""
        opened = self.find(run).opened
        wanted = _check_rows(rows, opened.size)
        columns = {name: opened.column(name).take(wanted).to_pylist() for name in _FACTS}
        inside = {name: np.isin(wanted, rows) for name, rows in opened.members().items()}
        order = [one["id"] for one in opened.findings()]
        columns["findings"] = [[name for name in order if inside[name][i]] for i in range(len(wanted))]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    # ---- what is kept, and what goes out -----------------------------------------------------------------------------

    def list_kept(self, run: int) -> dict[str, Any]:
        """Saved views and selections."""
        return self.find(run).selections.list_kept()

    def keep_view(self, run: int, name: str, state: str) -> dict[str, Any]:
        """Save a view."""
        return self.find(run).selections.keep_view(name, state)

    def forget_view(self, run: int, name: str) -> dict[str, Any]:
        """Delete a view."""
        return self.find(run).selections.forget_view(name)

    def keep_selection(self, run: int, rows: list[int], bits: str, name: str) -> dict[str, Any]:
        """Keep a selection; without a name, for links."""
        part = self.find(run)
        return part.selections.keep(_read_rows(rows, bits, part.opened.size), name)

    def send_selection(self, run: int, selection: str) -> Response:
        """Its rows, ascending, little-endian uint32."""
        rows, _ = self.find(run).selections.rows(selection)
        return Response(rows.astype("<u4").tobytes(), media_type=_BINARY)

    def forget_selection(self, run: int, selection: str) -> dict[str, Any]:
        """Delete a selection."""
        return self.find(run).selections.forget(selection)

    def export(self, run: int, rows: list[int], bits: str, format: str) -> Response:
        """Samples as a file."""
        opened = self.find(run).opened
        return send(opened, _read_rows(rows, bits, opened.size), format)

    def export_selection(self, run: int, selection: str, format: str) -> Response:
        """A selection as a file."""
        part = self.find(run)
        rows, name = part.selections.rows(selection)
        return send(part.opened, rows, format, name)

    def calls(self) -> list[Call]:
        """Their table."""
        run = {"run": Field(int, low=0)}
        here = "/api/runs/{run:int}"
        of_layout, layout = here + "/layouts/{layout}", {**run, "layout": Field(str, high=64)}
        of_selection, selection = here + "/selections/{selection}", {**run, "selection": Field(str, high=64)}
        version = {"version": Field(str, "", high=64)}
        column = {**run, "name": Field(str, high=1000)}
        outline = {"layout": Field(str, high=64), "polygon": Field(list, [], high=4000),
                   "box": Field(list, [], high=4)}  # fmt: skip
        chosen = {"rows": Field(list, [], high=10_000_000, items=int), "bits": Field(str, "", high=4_000_000)}
        form = {"format": Field(str, choices=tuple(FORMATS))}
        name = {"name": Field(str, low=1, high=80)}
        view = {**name, "state": Field(str, high=4000)}
        return [
            Call("GET", here + "/columns", "Columns of the samples", self.list_columns, run),
            Call("GET", here + "/columns/{name:path}", "One column", self.send_column, column, version,
                 returns=_BINARY),
            Call("GET", here + "/members/{name:path}", "Who has each value of a column", self.send_members, column,
                 version, returns=_BINARY),
            Call("GET", here + "/layouts", "Maps of samples", self.list_layouts, run),
            Call("GET", of_layout, "How far a map is", self.show_layout, layout),
            Call("POST", of_layout, "Compute a map", self.start_layout, layout),
            Call("DELETE", of_layout, "Stop computing a map", self.stop_layout, layout),
            Call("GET", of_layout + "/points", "A map", self.send_points, layout, version, returns=_BINARY),
            Call("POST", here + "/select", "Samples within an outline", self.select, run, body=outline,
                 returns=_BINARY),
            Call("POST", here + "/facts", "What is known of some samples", self.show_facts, run,
                 body={"rows": Field(list, low=1, high=_MOST_FACTS, items=int)}),
            Call("GET", here + "/views", "Saved views and selections", self.list_kept, run),
            Call("POST", here + "/views", "Save a view", self.keep_view, run, body=view),
            Call("DELETE", here + "/views/{name:path}", "Delete a view", self.forget_view,
                 {**run, "name": Field(str, high=80)}),
            Call("POST", here + "/selections", "Keep a selection", self.keep_selection, run,
                 body={**chosen, "name": Field(str, "", high=80)}),
            Call("GET", of_selection, "Samples of a selection", self.send_selection, selection, returns=_BINARY),
            Call("DELETE", of_selection, "Delete a selection", self.forget_selection, selection),
            Call("POST", here + "/export", "Samples as a file", self.export, run, body={**chosen, **form},
                 returns=_BINARY),
            Call("GET", of_selection + "/export", "A selection as a file", self.export_selection, selection, form,
                 returns=_BINARY),
        ]  # fmt: skip


def _keeping(version: str, columns: Columns) -> dict[str, str]:
    """A browser may keep what was asked for with the version that it has."""
    same = version == columns.version()
    return {"Cache-Control": "private, max-age=86400, immutable"} if same else {}


def _check_rows(rows: list[int], size: int) -> np.ndarray:
    if rows and not (min(rows) >= 0 and max(rows) < size):
        raise Refused(422, f"a row is out of range: the run has {size} samples")
    found: np.ndarray = np.array(rows, dtype=np.int64)
    return found


def _read_rows(rows: list[int], bits: str, size: int) -> np.ndarray:
    """Rows, ascending, from a list of them, or from one bit a sample (first one lowest), zlib, base64."""
    if bool(rows) == bool(bits):
        raise Refused(422, "give rows or bits, of at least one sample")
    if rows:
        return np.unique(_check_rows(rows, size))
    try:
        unpacker = zlib.decompressobj()
        packed = unpacker.decompress(base64.b64decode(bits, validate=True), -(-size // 8))
    except (ValueError, zlib.error):
        raise Refused(422, "the bits are not zlib in base64") from None
    if len(packed) != -(-size // 8):
        raise Refused(422, f"the bits are not those of {size} samples")
    found = np.flatnonzero(np.unpackbits(np.frombuffer(packed, np.uint8), count=size, bitorder="little"))
    if len(found) == 0:
        raise Refused(422, "no sample is chosen")
    return found
