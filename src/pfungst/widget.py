"""The map of a class's samples in a notebook, of which a lasso, a rectangle or keys select some.

Needs ``pip install 'pfungst[notebook]'`` (anywidget, which works in Jupyter, VS Code, Colab and marimo).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from pfungst.charts import COLOURS
from pfungst.errors import SettingError, need
from pfungst.store import Run, run_of
from pfungst.strategies import find_entry

__all__ = ["read_points", "sample_map"]

COLOUR_BY = ("finding", "cluster")
_STATIC = Path(__file__).parent / "static"
_GROUPS = 6  # colours and shapes


def sample_map(source: Any, class_name: str | None = None, colour_by: str = "finding") -> Any:
    """A widget with the t-SNE map of one class of an audit.  Distances in it prove nothing; verdicts do.

    source      an ``Audit``, a ``Run``, the path of a run folder, or a ``Finding`` (its class, itself selected)
    class_name  which class; of a finding its own
    colour_by   ``finding`` or ``cluster``; groups differ by shape as well

    ``.selected`` is the list of ids of the selected samples, in the order of the run; set it to select from Python, and
    ``.observe(function, "selected")`` to be told.  Drag to select, with Shift to add and with Alt to take away; a
    group's button selects it; arrow keys go from sample to sample, space selects, Escape clears.

    Raises RunError where the run has no map of the class, MissingExtra without anywidget.
    """
    chosen: list[str] = []
    if hasattr(source, "record") and hasattr(source, "_audit"):
        chosen, class_name, source = source.record["samples"], class_name or source.record["class"], source._audit
    points = read_points(run_of(source), class_name, colour_by)
    known = set(points["ids"])
    return _make_class()(points=points, selected=[name for name in chosen if name in known])


def read_points(run: Run, class_name: str | None, colour_by: str = "finding") -> dict[str, Any]:
    """What the widget shows: ``ids``, ``x``, ``y``, ``group`` (-1: none) of the class's samples that are on its map.

    A sample of several findings is drawn as one of the first of them.  ``groups`` have a name, a count, colours on a
    light and on a dark ground, and ``also``, the places of members that are drawn as another group's; ``rest`` is the
    colours of no group.
    """
    import pyarrow.parquet as pq

    if colour_by not in COLOUR_BY:
        raise SettingError(f"colour_by is {colour_by!r}", f"it is one of {', '.join(COLOUR_BY)}")
    entry = find_entry(run, class_name, "x", "map")
    table = pq.read_table(run.path / "samples.parquet", columns=["id", "finding"]).to_pydict()
    drawn = [i for i, x in enumerate(entry["x"]) if x is not None]
    rows = [entry["rows"][i] for i in drawn]
    also: dict[str, list[int]] = {}
    if colour_by == "finding":
        named = [table["finding"][row] for row in rows]
        labels = {}
        for record in sorted(run.read_findings()["findings"], key=lambda record: str(record["id"])):
            members = set(record["samples"])
            inside = [i for i, row in enumerate(rows) if table["id"][row] in members]
            if inside:
                labels[record["id"]] = f"{record['id']}, {record['verdict']}"
                also[record["id"]] = [i for i in inside if named[i] != record["id"]]
    else:
        named = [f"cluster {entry['cluster'][i]}" for i in drawn]
        labels = {name: name for name in sorted(set(named), key=lambda name: int(name.split()[1]))}
    number = {name: i for i, name in enumerate(labels)}
    return {
        "title": f"class {class_name}: {len(rows)} samples",
        "ids": [table["id"][row] for row in rows],
        "x": [entry["x"][i] for i in drawn],
        "y": [entry["y"][i] for i in drawn],
        "group": [-1 if name is None else number[name] for name in named],
        "groups": [
            {
                "name": label,
                "count": named.count(name) + len(also.get(name, [])),
                "also": also.get(name, []),
                "colours": _both(f"g{number[name] % _GROUPS}"),
            }
            for name, label in labels.items()
        ],
        "rest": _both("rest"),
    }


def _both(name: str) -> list[str]:
    return [COLOURS["light"][name], COLOURS["dark"][name]]


@lru_cache(maxsize=1)
def _make_class() -> Any:
    """The widget's class: made when it is needed, since its base is of anywidget."""
    base: Any = need("anywidget", "notebook", "anywidget is not installed").AnyWidget
    traitlets = need("traitlets", "notebook", "anywidget is not installed")

    class SampleMap(base):
        """See ``sample_map``."""

        _esm = _STATIC / "sample_map.js"
        _css = _STATIC / "sample_map.css"
        points = traitlets.Dict().tag(sync=True)
        selected = traitlets.List(traitlets.Unicode()).tag(sync=True)

        @traitlets.validate("selected")
        def _check(self, proposal: Any) -> list[str]:
            wanted = set(proposal["value"])
            unknown = sorted(wanted - set(self.points["ids"]))
            if unknown:
                some = ", ".join(unknown[:3])
                raise SettingError(f"no samples of this map: {some}", "give ids as samples.parquet has them")
            return [name for name in self.points["ids"] if name in wanted]

    return SampleMap
