"""An evaluation on disk and on the page: evaluation.json, table.csv, pictures.csv, evaluation.html."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from pfungst import heatmaps
from pfungst.cards import embed_png, open_template
from pfungst.charts import draw_flipping, write_colours
from pfungst.quality.measures import MEASURES
from pfungst.store import Run
from pfungst.tables import Cell, Scored, Table, tabulate, write_number

_SIDE = 150  # of a picture in the grid of examples, in pixels
BETTER = {"high": "higher is better", "low": "lower is better", "": ""}


def write_evaluation(evaluation: Scored, out: str | Path, table: Table | None = None) -> Path:
    """Write all files into ``out`` and return the path of the page.  ``table``: the evaluation's, if there is one."""
    run, table = Run(out), table or tabulate(evaluation)
    Path(out).mkdir(parents=True, exist_ok=True)
    run.write_json("evaluation.json", describe_evaluation(evaluation, table))
    run.write_bytes("table.csv", _write_table(evaluation, table).encode())
    run.write_bytes("pictures.csv", _write_pictures(evaluation).encode())
    run.write_bytes("evaluation.html", write_page(evaluation, table).encode())
    return run.path / "evaluation.html"


def describe_evaluation(evaluation: Scored, table: Table) -> dict[str, Any]:
    """The table and what it is of, as JSON has it; what is not defined is null."""
    rows = []
    for method in table.methods:
        figures = {name: _describe_cell(cell) for name, cell in table.cells[method].items()}
        seconds = evaluation.seconds.get(method)
        chosen = {"chosen": evaluation.chosen[method]} if method in evaluation.chosen else {}
        rows.append(
            {"method": method, **chosen, "kind": evaluation.kinds[method], "seconds": seconds, "figures": figures}
        )
    titles = {n: {"title": f.title, "better": f.better} for n, f in table.figures.items()}
    return {
        "version": 1, **evaluation.about, "n": len(evaluation.ids), "measures": evaluation.measures, "figures": titles,
        "table": rows, "left_out": evaluation.left_out, "notes": evaluation.notes,
    }  # fmt: skip


def _describe_cell(cell: Cell) -> dict[str, Any]:
    numbers = {"mean": cell.mean, "low": cell.low, "high": cell.high}
    worse = None if cell.worse_than is None else list(cell.worse_than)
    return {**{k: v if math.isfinite(v) else None for k, v in numbers.items()}, "n": cell.n, "worse_than": worse}


def _write_table(evaluation: Scored, table: Table) -> str:
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["method", "kind", "seconds", "figure", "mean", "low", "high", "n", "does not beat", "chosen"])
    for method in table.methods:
        for name, cell in table.cells[method].items():
            numbers = (f"{v:.6g}" if math.isfinite(v) else "" for v in (cell.mean, cell.low, cell.high))
            seconds = f"{evaluation.seconds.get(method, math.nan):.4g}"
            worse = " ".join(cell.worse_than or ())
            chosen = evaluation.chosen.get(method, "")
            rows.writerow([method, evaluation.kinds[method], seconds, name, *numbers, cell.n, worse, chosen])
    return text.getvalue()


def _write_pictures(evaluation: Scored) -> str:
    """Every figure of every picture, a row for a picture and a method."""
    text = io.StringIO()
    rows = csv.writer(text)
    names = list(dict.fromkeys(name for values in evaluation.values.values() for name in values))
    rows.writerow(["picture", "method", *names])
    for i, picture in enumerate(evaluation.ids):
        for method, values in evaluation.values.items():
            numbers = (values[name][i] if name in values else math.nan for name in names)
            rows.writerow([picture, method, *(f"{v:.6g}" if math.isfinite(v) else "" for v in numbers)])
    return text.getvalue()


def write_page(evaluation: Scored, table: Table) -> str:
    """One self-contained page: the table, curves, examples."""
    return _render("evaluation.html", evaluation, table)


def write_fragment(evaluation: Scored) -> str:
    """The table alone, for notebooks."""
    return _render("evaluation_table.html", evaluation, tabulate(evaluation))


def _render(template: str, evaluation: Scored, table: Table) -> str:
    main = [name for name, figure in table.figures.items() if figure.main]
    return open_template(template).render(
        evaluation=evaluation, table=table, main=main, rest=[n for n in table.figures if n not in main],
        number=write_number, better=BETTER, measures=[MEASURES[name] for name in evaluation.measures],
        charts=_charts(evaluation, table) if template == "evaluation.html" else [],
        examples=_examples(evaluation, table) if template == "evaluation.html" else [], colours=write_colours,
        failed=[m for m in table.methods if any(c.worse_than for c in table.cells[m].values())],
    )  # fmt: skip


def _charts(evaluation: Scored, table: Table) -> list[dict[str, Any]]:
    """The flipping curves of every method, one small chart each, on one scale for a measure."""
    found = []
    for measure in evaluation.measures:
        drawn = [m for m in table.methods if measure in evaluation.curves.get(m, {})]
        means = {m: {t: np.nanmean(c, 0) for t, c in evaluation.curves[m][measure].items()} for m in drawn}
        if not drawn:
            continue
        top = max(float(curve.max()) for curves in means.values() for curve in curves.values())
        shares = evaluation.shares[measure]
        charts = [
            {"title": table.titles[m], "svg": draw_flipping(means[m], shares, top, table.titles[m])} for m in drawn
        ]
        orders = {order for curves in means.values() for order in curves}
        found.append({"measure": measure, "charts": charts, "orders": orders})
    return found


def _examples(evaluation: Scored, table: Table) -> list[dict[str, Any]]:
    """Rows of pictures: each with its map by every method, at its own scale."""
    rows = []
    for i, name in enumerate(evaluation.shown):
        picture = evaluation.pictures[i]
        cells = [{"title": name, "src": _small((picture * 255).round().astype(np.uint8))}]
        for method in table.methods:
            if method in evaluation.maps:
                scores = np.nan_to_num(evaluation.maps[method][i])
                scale = heatmaps.common_scale([scores], 0.995)
                cells.append({"title": table.titles[method], "src": _small(heatmaps.overlay(picture, scores, scale))})
        rows.append({"name": name, "cells": cells})
    return rows


def _small(pixels: np.ndarray) -> str:
    height, width = pixels.shape[:2]
    return embed_png(heatmaps.encode_png(heatmaps.enlarge(pixels, _SIDE / max(height, width))))
