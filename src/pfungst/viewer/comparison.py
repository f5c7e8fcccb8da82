"""Two of the runs that are shown, beside each other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pfungst.comparisons import compare_runs
from pfungst.errors import RunError
from pfungst.viewer.calls import Call, Field, Refused
from pfungst.viewer.opened import OpenRun


class Comparison:
    """The calls."""

    def __init__(self, find: Callable[[int], OpenRun]) -> None:
        self.find = find
        self._compare = functools.lru_cache(16)(lambda left, right: compare_runs(find(left).run, find(right).run))

    def compare(self, left: int, right: int) -> dict[str, Any]:
        """Findings kept, lost and gained, and what else differs; see ``comparisons.compare_runs``."""
        found: dict[str, Any] = self._compare(left, right)
        return found

    def find_row(self, run: int, id: str) -> dict[str, Any]:
        """The row of the sample of this id."""
        opened = self.find(run)
        row = pc.index(opened.column("id"), pa.scalar(id)).as_py()
        if row < 0:
            raise RunError(f"{opened.run.path.name} has no sample {id!r}", "see samples.parquet")
        return opened.sample(row) | {"row": row}

    def find_rows(self, run: int, other: int, rows: str) -> dict[str, Any]:
        """The rows in ``other`` of these samples of ``run`` (numbers between commas); None for who is not there."""
        here, there = self.find(run), self.find(other)
        try:
            asked = [int(one) for one in rows.split(",")]
        except ValueError:
            raise Refused(422, "rows are to be numbers between commas") from None
        for row in asked:
            here.check(row)
        ids = here.column("id").take(pa.array(asked))
        found = pc.index_in(ids.combine_chunks(), value_set=there.column("id").combine_chunks())
        return {"rows": found.to_pylist()}

    def calls(self) -> list[Call]:
        """The table of calls."""
        asked = {"left": Field(int, 0, low=0), "right": Field(int, 1, low=0)}
        named = {"id": Field(str, low=1, high=4096)}
        run = {"run": Field(int, low=0)}
        return [
            Call("GET", "/api/compare", "Two runs beside each other", self.compare, query=asked),
            Call("GET", "/api/runs/{run:int}/rows", "The same samples in another run", self.find_rows, run,
                 {"other": Field(int, low=0), "rows": Field(str, low=1, high=8000)}),
            Call("GET", "/api/runs/{run:int}/row", "The sample of this id", self.find_row, run, named),
        ]  # fmt: skip
