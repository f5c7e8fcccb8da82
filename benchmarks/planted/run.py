"""Planted cues in real pictures: which of them does an audit find, and which do others?

    PFUNGST_DATA=... python benchmarks/planted/run.py --out /tmp/planted --jobs 2
    PFUNGST_DATA=... python benchmarks/planted/run.py --out /tmp/planted --quick --cues tag tint --prevalences 10

A cell of the grid is a data set (``pictures.py``), a cue (``cues.py``, or none: a clean control), its prevalence in one
class, a network (``networks.py``) and a seed.  Every cell is one JSON file below ``--out``; a cell that is there is not
computed again, so the grid can be stopped and go on.  The networks are kept in ``--out``/networks: without the JSON
files, the same networks are audited again.  Tables are written from all the files that are there:

benchmarks/results/planted.csv          a row for each cell and method
benchmarks/results/planted_summary.csv  by prevalence and by cue: what share was found, was among the first three, was
                                        confirmed; void cells, in which the network did not use the cue, are counted and
                                        left out; "clean": accusations where nothing was planted
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # one thread in each process; before numpy is imported here and in workers

from cell import Setting, Trial, run_cell, start_worker, train_cells  # noqa: E402
from cues import CUES  # noqa: E402
from networks import NETWORKS  # noqa: E402

PREVALENCES = (5.0, 10.0, 2.0, 20.0, 1.0, 50.0, 0.5)  # in %; the most informative first
DATA = ("photos", "cells")
RESULTS = Path(__file__).parents[1] / "results"


def order_cells(arguments: argparse.Namespace) -> list[Setting]:
    """All cells, the most informative first: half the grid, data sets in turn; controls; the other half; the rest."""
    main = [p for p in arguments.prevalences if 2 <= p <= 20]
    rest = [p for p in arguments.prevalences if p not in main]
    cells: list[Setting] = []

    def add(networks: Iterable[str], prevalences: Sequence[float], half: int, seed: int) -> None:
        data = arguments.data
        for network in networks:
            for i, prevalence in enumerate(prevalences):
                for j, cue in enumerate(arguments.cues):
                    if len(data) == 1 or half < len(data):
                        name = data[(i + j + half) % len(data)]
                        cells.append(Setting(name, cue, prevalence, network, seed))

    def add_clean(networks: Iterable[str], seed: int) -> None:
        cells.extend(Setting(name, "none", 0, network, seed) for network in networks for name in arguments.data)

    first, others = arguments.networks[:1], arguments.networks[1:]
    for seed in range(arguments.seeds):
        add(first, main, 0, seed)
        add_clean(first, 2 * seed)
        add_clean(first, 2 * seed + 1)
        add(others, main, 0, seed)
        add_clean(others, seed)
        for half in range(1, len(arguments.data)):
            add(first, main, half, seed)
        for half in range(len(arguments.data)):
            add(first, rest, half, seed)
        for half in range(1, len(arguments.data)):
            add(others, main, half, seed)
        for half in range(len(arguments.data)):
            add(others, rest, half, seed)
    return list(dict.fromkeys(cells))


def train_together(cells: list[Setting], trial: Trial, out: Path, together: int) -> None:
    """Train all networks that are not there yet, ``together`` at a time of those that can be trained side by side."""
    alike: dict[tuple[str, str, int], list[Setting]] = {}
    for cell in cells:
        if not (out / "networks" / f"{cell.name}.safetensors").exists():
            alike.setdefault((cell.network, cell.data, cell.seed), []).append(cell)
    for settings in alike.values():
        for i in range(0, len(settings), together):
            start, part = time.perf_counter(), settings[i : i + together]
            train_cells(part, trial, out / "networks")
            seconds = time.perf_counter() - start
            print(f"{len(part)} x {part[0].network} on {part[0].data}: trained in {seconds:.0f} s", flush=True)


def work(cells: list[Setting], trial: Trial, out: Path, deadline: float, place: Any) -> None:
    """A worker: takes the next cell, writes its record, until none is left or time is up."""
    start_worker()
    while time.time() < deadline:
        with place.get_lock():
            index, place.value = place.value, place.value + 1
        if index >= len(cells):
            return
        target = out / f"{cells[index].name}.json"
        if target.exists():
            continue
        try:
            record = json.dumps(run_cell(cells[index], trial, out / "networks"))
        except Exception:  # one cell that fails must not end the grid; it is tried again by the next call
            target.with_suffix(".error.txt").write_text(traceback.format_exc())
            print(f"FAILED {cells[index].name}: see {target.with_suffix('.error.txt')}", flush=True)
            continue
        part = target.with_suffix(".part")
        part.write_text(record)
        part.replace(target)
        print(_line(json.loads(record)), flush=True)


def _line(record: dict[str, Any]) -> str:
    name = f"{record['data']} {record['cue']} {record['prevalence']:g} % {record['network']} seed {record['seed']}"
    if "methods" not in record:
        return f"{name}: void, the cue raises the class's probability by {record['paste']:.3f} only"
    ours = record["methods"]["pfungst"]
    rank = f", rank {ours['rank']}" if ours["rank"] else ""
    verdict = ", confirmed" if ours["confirmed"] else ""
    return (
        f"{name}: paste {record['paste']}, Jaccard {ours['jaccard']:.2f}{rank}{verdict}, others confirmed "
        f"{ours['others_accused']}; {record['seconds']:.0f} s (training {record['seconds_training']:.0f}, "
        f"audit {ours['seconds']:.0f})"
    )


# ---- tables ----------------------------------------------------------------------------------------------------------

COLUMNS = ("data", "cue", "prevalence", "network", "seed", "planted", "accuracy", "held_accuracy", "paste", "flips")
SCORES = ("found", "jaccard", "rank", "precision", "confirmed", "others_accused", "groups", "seconds")


def write_tables(out: Path, results: Path) -> list[list[Any]]:
    """Both tables, from all records; returns the rows of the summary."""
    records = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    rows = []
    for record in records:
        head = [record[key] for key in COLUMNS]
        if "methods" not in record:
            rows.append([*head, "void", *[""] * len(SCORES)])
        for method, scores in record.get("methods", {}).items():
            rows.append([*head, method, *("" if scores[key] is None else scores[key] for key in SCORES)])
    _write(results / "planted.csv", [*COLUMNS, "method", *SCORES], rows)
    summary = []
    for network in sorted({record["network"] for record in records}):
        of_network = [record for record in records if record["network"] == network]
        planted = [record for record in of_network if record["cue"] != "none"]
        for key in ("prevalence", "cue"):
            for value in sorted({record[key] for record in planted}):
                group = [record for record in planted if record[key] == value]
                summary += _summarise(network, f"{key} {value:g} %" if key == "prevalence" else f"cue {value}", group)
        summary += _summarise(network, "all", planted)
        summary += _summarise(network, "clean", [record for record in of_network if record["cue"] == "none"])
    heads = ["network", "cells", "method", "used", "void", "found", "first_three", "confirmed", "precision", "jaccard"]
    _write(results / "planted_summary.csv", [*heads, "others_accused", "seconds"], summary)
    return summary


def _summarise(network: str, name: str, records: list[dict[str, Any]]) -> list[list[Any]]:
    """One row for each method: shares of the cells that are not void; means."""
    used = [record for record in records if "methods" in record]
    rows = []
    for method in used[0]["methods"] if used else ():
        scores = [record["methods"][method] for record in used]

        def mean(key: str, scores: list[dict[str, Any]] = scores) -> Any:
            known = [one[key] for one in scores if one[key] is not None]
            return round(sum(known) / len(known), 3) if known else ""

        ranked = method in ("pfungst", "shortkit", "cleanlab")
        three = sum(one["rank"] is not None and one["rank"] <= 3 for one in scores) / len(scores)
        rows.append([network, name, method, len(used), len(records) - len(used), mean("found"),
                     round(three, 3) if ranked else "", mean("confirmed"), mean("precision"), mean("jaccard"),
                     mean("others_accused"), mean("seconds")])  # fmt: skip
        if name == "clean":  # nothing to be found: what is accused is all there is to say
            rows[-1][5:10] = [""] * 5
    return rows or [[network, name, "", 0, len(records), *[""] * 7]]


def _write(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="") as handle:
        csv.writer(handle).writerows([header, *rows])
    part.replace(path)


def main() -> None:
    """Read the flags, start the workers, write the tables as cells come in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--cues", nargs="*", choices=list(CUES), default=list(CUES))
    parser.add_argument("--prevalences", nargs="+", type=float, default=list(PREVALENCES), help="in %% of a class")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--seeds", type=int, default=1, help="how many times the grid, with other random draws")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one cell each")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, of training and audit")
    parser.add_argument("--together", type=int, help="networks that are trained at once; 32 on cuda, else 1")
    parser.add_argument("--train-only", action="store_true", help="train the networks, then stop: to audit elsewhere")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no cell is started")
    parser.add_argument("--quick", action="store_true", help="half of the pictures, little training: for a trial")
    parser.add_argument("--no-clean", action="store_true", help="leave out the clean controls")
    parser.add_argument("--keep", type=Path, help="folder where pictures and run folders stay")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    arguments = parser.parse_args()
    deadline = time.time() + arguments.budget
    arguments.out.mkdir(parents=True, exist_ok=True)
    trial = Trial(arguments.device, 0.5, 250, arguments.keep) if arguments.quick else Trial(arguments.device)
    if arguments.keep and not arguments.quick:
        trial = Trial(arguments.device, keep=arguments.keep)
    cells = [cell for cell in order_cells(arguments) if not (arguments.no_clean and cell.cue == "none")]
    together = arguments.together or (32 if arguments.device.startswith("cuda") else 1)
    if together > 1 or arguments.train_only:
        train_together(cells, trial, arguments.out, together)
    if arguments.train_only:
        return
    context = multiprocessing.get_context("spawn")
    place = context.Value("i", 0)
    workers = [
        context.Process(target=work, args=(cells, trial, arguments.out, deadline, place)) for _ in range(arguments.jobs)
    ]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        time.sleep(5)
        write_tables(arguments.out, arguments.results)  # again and again, so that they are there when this is stopped
    for row in write_tables(arguments.out, arguments.results):
        print(*row, sep="  ")
    done = sum((arguments.out / f"{cell.name}.json").exists() for cell in cells)
    print(f"{done} of {len(cells)} cells are done; tables in {arguments.results}")


if __name__ == "__main__":
    main()
