"""Maps of samples: those that the run keeps, and others that are computed when somebody asks, one at a time.

Nothing is written into the run: what is computed here is held in memory until there is too much of it.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pyarrow as pa
from threadpoolctl import threadpool_limits

from pfungst.assignments import draw_part
from pfungst.embeddings import embed
from pfungst.neighbours import join_neighbours, neighbour_count
from pfungst.spectra import decompose
from pfungst.vectors import unit_rows
from pfungst.viewer.calls import Refused
from pfungst.viewer.columns import Columns
from pfungst.viewer.jobs import Desk, Job, Stopped
from pfungst.viewer.lassos import Plane
from pfungst.viewer.opened import OpenRun

KINDS = ("tsne", "spectral", "umap")  # of one class, "KIND:CLASS"; besides "all" and "pair:COLUMN:COLUMN"
_KEPT_POINTS = 8_000_000  # of all maps that are held
_ASPECT = 1.6  # of the map of all classes, about that of a window
_MARGIN = 0.05  # of a class's cell in the map of all classes


class Layouts:
    """The maps of one run."""

    def __init__(self, number: int, opened: OpenRun, columns: Columns, desk: Desk) -> None:
        self.number, self.opened, self.columns, self.desk = number, opened, columns, desk
        self._lock = threading.Lock()
        self._planes: OrderedDict[str, Plane] = OrderedDict()

    # ---- what there is -----------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Classes with how many samples are on their maps, kinds of maps, and the cells of the map of all classes:
        their left upper corners, each of side 1."""
        names = self.opened.description["data"]["classes"]
        kinds = [kind for kind in KINDS if kind != "umap" or find_spec("umap")]
        classes = [
            {"class_index": index, "class": names[index], "size": size, "kept": self._embedding(index) is not None}
            for index, size in self._sizes.items()
        ]
        cells = [{"class": name, "x": x, "y": -y, "size": size} for name, (x, y), size in self._cells]
        return {"kinds": kinds, "classes": classes, "cells": cells}

    @functools.cached_property
    def _sizes(self) -> dict[int, int]:
        """Samples on the maps of a class, for those that were analysed."""
        seed = self.opened.description["settings"]["seed"]
        return {
            entry["class_index"]: len(draw_part(entry["size"], seed))
            for entry in self.opened.classes()
            if "note" not in entry
        }

    def _embedding(self, index: int) -> Any:
        path = self.opened.run.path / "embeddings" / f"{index:04d}.json"
        return path if path.is_file() else None

    @functools.cached_property
    def _cells(self) -> list[tuple[str, tuple[int, int], int]]:
        """Classes with samples on a map: name, column and row of their cell, counted from the top, and how many."""
        x = self.columns.numbers("x") if self._drawn() else np.empty(0)
        codes = self.columns.codes("class")[np.isfinite(x)] if len(x) else np.empty(0, int)
        names = self.columns.find("class").values
        counts = np.bincount(codes[codes < len(names)].astype(int), minlength=len(names))
        there = np.flatnonzero(counts)
        wide = max(1, int(np.ceil(np.sqrt(_ASPECT * len(there)))))
        return [(names[c], (i % wide, i // wide), int(counts[c])) for i, c in enumerate(there)]

    def _drawn(self) -> bool:
        return all(self.opened.schema.field(name).type != pa.null() for name in ("x", "y"))

    # ---- one map -----------------------------------------------------------------------------------------------------

    def status(self, name: str) -> dict[str, Any]:
        """Whether a map is ready, being computed, or has to be asked for."""
        if self._find(name) is not None:
            return {"state": "ready", "points": len(self.plane(name))}
        job = self._job(name)
        if job is None:
            return {"state": "absent"}
        state = "failed" if job.failure else "working"
        left = job.seconds_left()
        return {"state": state, "done": job.done, "total": job.total, "seconds_left": left, "failure": job.failure}

    def _job(self, name: str) -> Job | None:
        """The job of this map, if it is the last one that was begun and has not come to a good end."""
        job = self.desk.last
        mine = job is not None and job.key == (self.number, name) and bool(job.failure or not job.over)
        return job if mine else None

    def start(self, name: str) -> dict[str, Any]:
        """Begin to compute a map that is not there."""
        if self._find(name) is None:
            kind, index = self._parse(name)
            work = functools.partial(self._compute, name, kind, index)
            self.desk.start(Job((self.number, name)), work, share=True)
        return self.status(name)

    def stop(self, name: str) -> dict[str, Any]:
        """Give a map up that is being computed."""
        job = self._job(name)
        if job is not None:
            job.stopping = True
        return {"state": "stopping" if job is not None else "absent"}

    def plane(self, name: str) -> Plane:
        """A map.  Refused where it was not computed, or not kept."""
        found = self._find(name)
        if found is None:
            raise Refused(409, f"the map {name!r} has to be computed first")
        return found

    def _find(self, name: str) -> Plane | None:
        """A map that is held, or that can be had at once."""
        with self._lock:
            if name in self._planes:
                self._planes.move_to_end(name)
                return self._planes[name]
        if name == "all":
            return self._keep(name, self._side_by_side())
        if name.startswith("pair:"):
            return self._keep(name, self._by_columns(name))
        kind, index = self._parse(name)
        if kind == "tsne" and self._embedding(index) is not None:
            kept = self.opened.run.read_json(f"embeddings/{index:04d}.json")
            return self._keep(name, Plane(np.array(kept["rows"], int), np.column_stack([kept["x"], kept["y"]])))
        return None

    def _keep(self, name: str, plane: Plane) -> Plane:
        with self._lock:
            self._planes[name] = plane
            self._planes.move_to_end(name)
            while len(self._planes) > 1 and sum(map(len, self._planes.values())) > _KEPT_POINTS:
                self._planes.popitem(last=False)
        return plane

    def _parse(self, name: str) -> tuple[str, int]:
        kind, _, number = name.partition(":")
        known = kind in KINDS and number.isascii() and number.isdecimal() and len(number) < 8
        if not known or int(number) not in self._sizes:
            raise Refused(404, f"there is no map {name!r}")
        return kind, int(number)

    # ---- how they are made -------------------------------------------------------------------------------------------

    def _side_by_side(self) -> Plane:
        """Each class's map in a cell of its own, of side 1, rows of cells downwards."""
        cells = self._cells
        if not cells:
            return Plane(np.empty(0, int), np.empty((0, 2)))
        points = np.column_stack([self.columns.numbers("x"), self.columns.numbers("y")])
        codes, names = self.columns.codes("class"), self.columns.find("class").values
        order = np.argsort(codes, kind="stable")
        ends = np.searchsorted(codes[order], np.arange(len(names) + 1))
        for name, (column, row), _ in cells:
            code = names.index(name)
            own = order[ends[code] : ends[code + 1]]
            points[own] = _fit(points[own]) * (1 - 2 * _MARGIN) + [column + _MARGIN, _MARGIN - row - 1]
        points[order[ends[-1] :]] = np.nan
        rows = np.flatnonzero(np.isfinite(points).all(1))
        return Plane(rows, points[rows])

    def _by_columns(self, name: str) -> Plane:
        """Two columns of numbers against each other, each from 0 to 1."""
        names = self.columns.names()
        parts = name.split(":")[1:]
        known = len(parts) == 2 and all(part.isascii() and part.isdecimal() and len(part) < 8 for part in parts)
        if not known or any(int(part) >= len(names) for part in parts):
            raise Refused(404, f"there is no map {name!r}")
        points = np.column_stack([_spread(self.columns.numbers(names[int(part)])) for part in parts])
        rows = np.flatnonzero(np.isfinite(points).all(1))
        return Plane(rows, points[rows])

    def _compute(self, name: str, kind: str, index: int, job: Job) -> None:
        run, seed = self.opened.run, self.opened.description["settings"]["seed"]
        rows = np.array(run.read_json(f"classes/{index:04d}.json")["rows"], int)
        rows = rows[draw_part(len(rows), seed)]
        vectors = unit_rows(run.read_view("where", rows))

        def go_on(done: int, total: int) -> None:
            job.done, job.total = done, total
            if job.stopping:
                raise Stopped

        go_on(0, 1)
        with threadpool_limits(1):
            self._keep(name, Plane(rows, _MAKERS[kind](vectors, seed, go_on)))


def _fit(points: np.ndarray) -> np.ndarray:
    """Points moved and scaled, alike in both directions, to the middle of the unit square."""
    low, high = np.nanmin(points, axis=0), np.nanmax(points, axis=0)
    side = float((high - low).max()) or 1.0
    fitted: np.ndarray = (points - (low + high) / 2) / side + 0.5
    return fitted


def _spread(values: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    wide = np.where(known, values, np.nan).astype(np.float64)
    if not known.any():
        return wide
    low, high = np.nanmin(wide), np.nanmax(wide)
    spread: np.ndarray = (wide - low) / ((high - low) or 1.0)
    return spread


def _tsne(vectors: np.ndarray, seed: int, go_on: Callable[[int, int], None]) -> np.ndarray:
    return embed(vectors, seed, go_on)


def _spectral(vectors: np.ndarray, seed: int, go_on: Callable[[int, int], None]) -> np.ndarray:
    """The second and the third eigenvector of the class's neighbour graph."""
    graph = join_neighbours(vectors, neighbour_count(len(vectors)))
    go_on(1, 2)
    _, eigenvectors = decompose(graph, 3)
    found: np.ndarray = eigenvectors[:, 1:3]
    return found


def _umap(vectors: np.ndarray, seed: int, go_on: Callable[[int, int], None]) -> np.ndarray:
    import umap

    found: np.ndarray = umap.UMAP(random_state=seed).fit_transform(vectors)
    return found


_MAKERS: dict[str, Callable[[np.ndarray, int, Callable[[int, int], None]], np.ndarray]] = {
    "tsne": _tsne,
    "spectral": _spectral,
    "umap": _umap,
}
