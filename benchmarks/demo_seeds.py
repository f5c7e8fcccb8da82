"""The demo over several seeds: are the planted cues found and confirmed, and does the clean twin stay silent?

    python benchmarks/demo_seeds.py --seeds 0 1 2 3 4 --out /tmp/demo-seeds

One row a cue and one a clean twin, to the terminal and to benchmarks/results/demo_seeds.csv.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

from pfungst.demo import run_demo
from pfungst.strategies import read_strategies

FIELDS = ("seed", "cue", "class", "planted", "finding", "verdict", "jaccard", "suspicion", "seconds")


def rows_of(seed: int, out: Path) -> list[dict[str, object]]:
    """One row a cue, one for findings that were not planted, one for the twin."""
    start = time.perf_counter()
    result = run_demo(out / f"seed{seed}", seed=seed)
    seconds = round(time.perf_counter() - start)
    rows: list[dict[str, object]] = []
    for match in result.matches:
        found = match.finding
        rows.append(
            {
                "seed": seed,
                "cue": match.planted.cue,
                "class": match.planted.label,
                "planted": len(match.planted.samples),
                "finding": found.id if found else "missed",
                "verdict": found.verdict if found else "",
                "jaccard": round(match.jaccard, 3),
                "suspicion": found.suspicion if found else "",
                "seconds": seconds,
            }
        )
    matched = {match.finding.id for match in result.matches if match.finding}
    for finding in result.audit.findings:
        if finding.id not in matched:
            rows.append(
                {"seed": seed, "cue": "not planted", "class": finding.record["class"], "finding": finding.id,
                 "verdict": finding.verdict, "suspicion": finding.suspicion}
            )  # fmt: skip
    best = max(g["suspicion"] for entry in read_strategies(result.twin.run) for g in entry["groups"])
    confirmed = sum(f.verdict == "confirmed" for f in result.twin.findings)
    rows.append(
        {"seed": seed, "cue": "clean twin", "finding": f"{len(result.twin.findings)} tested",
         "verdict": f"{confirmed} confirmed", "suspicion": best}
    )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    table = Path(__file__).parent / "results" / "demo_seeds.csv"
    with table.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, FIELDS)
        writer.writeheader()
        for seed in arguments.seeds:
            for row in rows_of(seed, arguments.out):
                writer.writerow(row)
                handle.flush()
                print(*(f"{row.get(field, '')!s:>12}" for field in FIELDS), flush=True)


if __name__ == "__main__":
    main()
