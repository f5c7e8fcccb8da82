"""Time and memory of discovery: from kept maps to ranked groups, for a thousand to a million maps.

    python benchmarks/discovery.py --sizes 1000 10000 20000 100000 1000000 --classes one thousand --out /tmp/discovery

Made-up maps with structure are written by the real ``Run`` as the arrays of an audit (where: 20 x 20, what and
strongest: three layers of 64, 128 and 256 channels), in an order that mixes all classes, the worst one for reading.  A
planted group, 0.5 % of its class but at least 30 samples, has a spot in a corner and two channels of its own.  Then the
real stage ``find_strategies`` runs in a process of its own; ``peak_gb`` is the most that it and its helpers held
together, looked at five times a second (resident memory; pages that they share count in each).

One row a cell, to the terminal and to benchmarks/results/discovery.csv, where cells that are not asked for stay.
``seconds`` is the whole stage, ``tsne`` the part of it that maps of samples took, ``cpu_seconds`` what all processes
used, which a busy machine hardly changes; ``growth`` the power of n by which they grew from the next smaller size,
empty where that one's classes are too small to be analysed (under 16 samples); ``jaccard`` compares the most suspicious
group of all with the planted one.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from pfungst.settings import Settings
from pfungst.store import BLOCK, Run

LAYERS = {"layer1": 64, "layer2": 128, "layer3": 256}
_WHOSE = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
CLASSES = {"one": 1, "thousand": 1000}
FIELDS = (
    "samples",
    "classes",
    "seconds",
    "tsne",
    "cpu_seconds",
    "peak_gb",
    "disk_gb",
    "suspicion",
    "jaccard",
    "growth",
    "cpus",
)


def planted_rows(target: np.ndarray, seed: int = 1) -> np.ndarray:
    """The planted group: rows of class 0."""
    rows = np.flatnonzero(target == 0)
    return np.sort(np.random.default_rng(seed).permutation(rows)[: max(30, len(rows) // 200)])


def write_maps(run: Run, count: int, classes: int) -> None:
    """Arrays of an audit of ``count`` samples, block by block."""
    rng = np.random.default_rng(0)
    target = rng.permutation(np.arange(count) % classes).astype(np.int32)
    planted = np.zeros(count, bool)
    planted[planted_rows(target)] = True
    y, x = np.mgrid[:20, :20]
    centres = rng.uniform(7, 13, (classes, 2))
    blobs = np.exp(-((y - centres[:, 0, None, None]) ** 2 + (x - centres[:, 1, None, None]) ** 2) / 18)
    waves = np.stack([np.cos(np.pi * (a * y + b * x) / 20) for a in range(4) for b in range(4)])
    usual = {name: rng.gamma(0.5, size=(classes, width)) for name, width in LAYERS.items()}
    run.begin({"benchmark": "discovery", "samples": count, "classes": classes})
    for block in range((count + BLOCK - 1) // BLOCK):
        rows = np.arange(block * BLOCK, min(count, (block + 1) * BLOCK))
        rng = np.random.default_rng([2, block])
        kind, odd = target[rows], planted[rows]
        weights = rng.normal(size=(len(rows), len(waves))) * 0.15
        where = blobs[kind] * (1 + np.tensordot(weights, waves, 1)) + 0.05 * rng.normal(size=(len(rows), 20, 20))
        where[odd, :4, :4] += 0.8
        arrays: dict[str, np.ndarray] = {"where": where.astype(np.float32)}
        for name, width in LAYERS.items():
            what = usual[name][kind] * rng.gamma(4, 0.25, size=(len(rows), width))
            what[odd, :2] += 3
            arrays[f"what:{name}"] = what.astype(np.float32)
            arrays[f"strongest:{name}"] = (what * rng.gamma(8, 0.02, size=what.shape)).astype(np.float32)
        sums = arrays["where"].sum((1, 2), dtype=np.float64)
        arrays |= {"explained": (sums + 0.1).astype(np.float32), "absorbed": np.full(len(rows), 0.1)}
        arrays |= {"target": kind, "prediction": kind, "status": np.ones(len(rows), np.uint8)}
        run.create_arrays(count, {name: (tuple(a.shape[1:]), str(a.dtype)) for name, a in arrays.items()})
        run.write_block(block, arrays)


def measure(folder: Path, classes: int) -> dict[str, Any]:
    """Run the stage on a folder that ``write_maps`` made, in this process."""
    from pfungst import strategies

    run = Run(folder)
    names = tuple(f"class {i}" for i in range(classes))
    subject: Any = SimpleNamespace(settings=Settings(layers=3), classes=names, layers=tuple(LAYERS), only=None)
    moments: dict[str, float] = {}

    def progress(stage: str, done: int, total: int) -> None:
        moments.setdefault(stage, time.perf_counter())

    start = time.perf_counter()
    strategies.find_strategies(run, subject, progress)
    end = time.perf_counter()
    groups = [(g["suspicion"], g["rows"]) for e in strategies.read_strategies(run) for g in e["groups"]]
    suspicion, members = max(groups, default=(0.0, []), key=lambda pair: pair[0])
    planted = planted_rows(run.read_array("target"))
    both = len(np.intersect1d(members, planted))
    used = sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, _WHOSE))
    return {
        "cpu_seconds": round(used, 1),
        "seconds": round(end - start, 1),
        "tsne": round(end - moments.get("maps", end), 1),
        "suspicion": suspicion,
        "jaccard": round(both / max(1, len(members) + len(planted) - both), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 20_000, 100_000, 1_000_000])
    parser.add_argument("--classes", nargs="+", choices=tuple(CLASSES), default=list(CLASSES))
    parser.add_argument("--out", type=Path, required=True, help="scratch folder; a million maps take 5 GB")
    parser.add_argument("--keep", action="store_true", help="keep the maps and take those that are there")
    parser.add_argument("--cell", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(measure(arguments.out, arguments.cell[1])))
        return
    for word in arguments.classes:
        for size in arguments.sizes:
            row = cell(arguments.out / f"{word}_{size}", size, CLASSES[word], arguments.keep)
            print(*(f"{name} {value}" for name, value in keep(row).items()), sep="  ", flush=True)


def keep(row: dict[str, Any]) -> dict[str, Any]:
    """Put a row into the table in place of an older one; with its growth."""
    table = Path(__file__).parent / "results" / "discovery.csv"
    rows = list(csv.DictReader(table.open())) if table.exists() else []
    place = (int(row["classes"]), int(row["samples"]))
    cells = {(int(one["classes"]), int(one["samples"])): one for one in rows} | {place: row}
    ordered = [cells[key] for key in sorted(cells)]
    for before, after in itertools.pairwise(ordered):
        after["growth"] = ""
        analysed = int(before["samples"]) >= 2 * Settings().min_size * int(before["classes"])
        if int(before["classes"]) == int(after["classes"]) and analysed:
            (few, less), (many, more) = ([float(one[k]) for k in ("samples", "cpu_seconds")] for one in (before, after))
            after["growth"] = round(float(np.log(more / less) / np.log(many / few)), 2)
    with table.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, FIELDS)
        writer.writeheader()
        writer.writerows(ordered)
    return row


def resident_memory(first: int) -> int:
    """Bytes that a process and all that come from it hold now."""
    parents, held = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            fields = path.read_text().rpartition(")")[2].split()  # after its name, which may hold anything
            number = int(path.parent.name)
            parents[number], held[number] = int(fields[1]), int(fields[21]) * resource.getpagesize()
    family = [first]
    for one in family:
        family += [child for child, parent in parents.items() if parent == one]
    return sum(held.get(one, 0) for one in family)


def cell(folder: Path, count: int, classes: int, keep: bool) -> dict[str, Any]:
    """One row of the table."""
    run = Run(folder)
    blocks = (count + BLOCK - 1) // BLOCK
    if not (keep and (folder / "run.json").exists() and len(run.blocks_done()) == blocks):
        shutil.rmtree(folder, ignore_errors=True)
        write_maps(run, count, classes)
    for name in ("classes", "embeddings"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "set_aside.json").unlink(missing_ok=True)
    asked = [sys.executable, __file__, "--out", str(folder), "--cell", str(count), str(classes)]
    with subprocess.Popen(asked, stdout=subprocess.PIPE) as process:
        held = 0
        while process.poll() is None:
            held = max(held, resident_memory(process.pid))
            time.sleep(0.2)
        told, _ = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, asked)
    result = json.loads(told) | {"peak_gb": round(held / 2**30, 2)}
    disk = sum(file.stat().st_size for file in (folder / "pooled.zarr").rglob("*") if file.is_file())
    row = {"samples": count, "classes": classes, **result, "disk_gb": round(disk / 1e9, 2), "cpus": os.cpu_count()}
    if not keep:
        shutil.rmtree(folder)
    return row


if __name__ == "__main__":
    main()
