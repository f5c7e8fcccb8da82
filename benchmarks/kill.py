"""Audits killed with SIGKILL at random moments of every stage, and gone on with: do they end the same?

    python benchmarks/kill.py --runs 50 --out /tmp/kill

The small audit of the tests with more pictures (two classes, 2 x 160, so two blocks) runs once undisturbed.  Then each
run is killed once or twice: in a stage, the stages by turns, after a random part of the time that it took undisturbed.
The second kill, of every other run, hits the audit that goes on.  Every file of results must be the same, byte by byte.

One row a run, to the terminal and to benchmarks/results/kill.csv; exit code 1 if one differs.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import pfungst
from pfungst import pipeline, store

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from conftest import NET, Small, _picture, _weights

STAGES = (*(name for name, _ in pipeline.STAGES), "report")
FIELDS = ("run", "stage", "after", "blocks", "classes", "verdicts", "second", "same", "findings", "samples")


def make_pictures(root: Path) -> Small:
    """Leaves and roses as in the tests, 160 each, and a network that sees them."""
    root.mkdir(parents=True)
    (root / "net.py").write_text(NET)
    torch.save(_weights(), root / "net.pt")
    rng = np.random.default_rng(0)
    for name, colour in (("leaf", (0.1, 0.8, 0.1)), ("rose", (0.85, 0.1, 0.1))):
        (root / "photos" / name).mkdir(parents=True)
        for i in range(160):
            _picture(rng, colour, name == "rose" and i < 40).save(root / "photos" / name / f"{i:03d}.png")
    return Small(root, root / "photos", root / "net.pt")


def start(small: Small, out: Path) -> int:
    """An audit in a process of its own, forked from this one, which has computed nothing; its id."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            pfungst.audit(small.model, small.photos, out=out, batch_size=16, **small.settings)
        except BaseException as error:
            print(f"{out}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def wait_for(ready: Callable[[], bool], child: int) -> bool:
    """Whether it came to be before the process ended."""
    while not ready():
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    return True


def began(out: Path, stage: str) -> bool:
    """Whether the stage before this one is recorded as done."""
    try:
        done = json.loads((out / "run.json").read_text())["stages"]
    except FileNotFoundError:
        return False
    before = STAGES[: STAGES.index(stage)]
    return not before or before[-1] in done


def kill_in(small: Small, out: Path, stage: str, after: float) -> bool:
    """Start or go on, and kill in that stage; False if it ended sooner."""
    child = start(small, out)
    if not wait_for(lambda: began(out, stage), child):
        return False
    end = time.monotonic() + after
    if not wait_for(lambda: time.monotonic() >= end, child):
        return False
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def finish(small: Small, out: Path) -> dict[str, bytes]:
    """Go on to the end; all results."""
    _, status = os.waitpid(start(small, out), 0)
    return Small.results(out) if status == 0 else {}


def time_stages(small: Small, out: Path) -> dict[str, float]:
    """Seconds of each stage of an undisturbed audit."""
    child, moments = start(small, out), []
    for stage in STAGES:
        if not wait_for(lambda stage=stage: began(out, stage), child):  # type: ignore[misc]
            raise SystemExit(f"the undisturbed audit ended before {stage}")
        moments.append(time.monotonic())
    os.waitpid(child, 0)
    moments.append(time.monotonic())
    return {stage: moments[i + 1] - moments[i] for i, stage in enumerate(STAGES)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    shutil.rmtree(arguments.out, ignore_errors=True)
    small = make_pictures(arguments.out / "small")
    seconds = time_stages(small, arguments.out / "undisturbed")
    expected = Small.results(arguments.out / "undisturbed")
    print({stage: round(value, 2) for stage, value in seconds.items()}, f"{len(expected)} files and arrays", flush=True)
    rng = np.random.default_rng(arguments.seed)
    wrong = 0
    with (Path(__file__).parent / "results" / "kill.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, FIELDS)
        writer.writeheader()
        for number in range(arguments.runs):
            stage, out = STAGES[number % len(STAGES)], arguments.out / f"run{number:03d}"
            after = float(rng.uniform(0, seconds[stage]))
            while not kill_in(small, out, stage, after):  # it was quicker this time
                shutil.rmtree(out)
                after *= 0.7
            at = {"blocks": len(store.Run(out).blocks_done()) if (out / "run.json").exists() else 0}
            at |= {"classes": len(list(out.glob("classes/*.json")))}
            at |= {"verdicts": len(list(out.glob("findings/*/verdict.json")))}
            second = STAGES[int(rng.integers(STAGES.index(stage), len(STAGES)))] if number % 2 else ""
            if second and not kill_in(small, out, second, float(rng.uniform(0, seconds[second]))):
                second = "ended first"
            found = finish(small, out)
            digests = {name: hashlib.sha256(found.get(file, b"")).hexdigest()[:12]
                       for name, file in (("findings", "findings.json"), ("samples", "samples.parquet"))}  # fmt: skip
            row = {"run": number, "stage": stage, "after": round(after, 3), **at, "second": second,
                   "same": found == expected, **digests}  # fmt: skip
            wrong += found != expected
            writer.writerow(row)
            handle.flush()
            print(*(f"{value!s:>13}" for value in row.values()), flush=True)
            if found == expected:
                shutil.rmtree(out)
    print(f"{arguments.runs - wrong} of {arguments.runs} the same")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
