"""What an audit costs beside the model: ResNet-50, 224 pixels, real photographs, one process.

    PFUNGST_DATA=... python benchmarks/overhead.py --pictures 240

The 1,000 ImageNet pictures of the data, in two folders by lot, are audited with a ResNet-50 of random weights (costs do
not depend on them).  Counted as the model's: forward passes, relevance (its backward pass), and the questions that the
experiments ask.  All else is overhead: reading and preparing pictures, pooling, graphs, spectra, groups, properties,
statistics, drawing, writing.  Prints the share of each stage; the result goes to benchmarks/results/overhead.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine import build, hardware  # the script beside this one

import pfungst
from pfungst.domains.preprocessing import Preprocess
from pfungst.lrp import LRP
from pfungst.lrp.traces import Trace

DATA = Path(os.environ.get("PFUNGST_DATA", Path(__file__).parents[2] / "shared" / "data"))


class Clock:
    """Seconds within functions of the model, by stage; calls within such a call count once."""

    def __init__(self) -> None:
        self.stage, self.depth = "preparing", 0
        self.model: dict[str, float] = defaultdict(float)
        self.whole: dict[str, float] = defaultdict(float)
        self.last = time.perf_counter()

    def progress(self, stage: str, done: int, total: int) -> None:
        """A stage begins, or goes on."""
        now = time.perf_counter()
        self.whole[self.stage] += now - self.last
        self.stage, self.last = stage, now

    def time(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.model[self.stage] += time.perf_counter() - start

        return timed


def main() -> None:
    """Audit, and say where the time went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=240)
    parser.add_argument("--findings", type=int, default=1, help="groups that are tested")
    arguments = parser.parse_args()
    model, _ = build("resnet50", 2, "cpu")
    model.preprocess = Preprocess(size=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # type: ignore[assignment]
    model.fc = torch.nn.Linear(2048, 2).eval()
    model.classes = ["left", "right"]  # type: ignore[assignment]
    clock = Clock()
    Trace.relevance = clock.time(Trace.relevance)  # type: ignore[method-assign]
    LRP.trace = clock.time(LRP.trace)  # type: ignore[method-assign]
    model.forward = clock.time(model.forward)
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures"
        archive = next((DATA / "imagenet-sample-images").glob("*.zip"))
        with zipfile.ZipFile(archive) as packed:
            names = [name for name in packed.namelist() if name.lower().endswith((".jpg", ".jpeg"))]
            drawn = np.random.default_rng(0).permutation(len(names))[: arguments.pictures]
            for i in drawn:
                target = pictures / Path(names[i]).name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(packed.read(names[i]))
        pfungst.audit(
            model, pictures, out=Path(folder) / "run", target="predicted", max_findings=arguments.findings,
            suspicion=0.0, progress=clock.progress,
        )  # fmt: skip
        clock.progress("end", 0, 0)
    rows = []
    for stage in clock.whole:
        whole, mine = clock.whole[stage], clock.whole[stage] - clock.model[stage]
        rows.append([hardware("cpu"), arguments.pictures, stage, f"{whole:.1f}", f"{mine:.1f}", f"{mine / whole:.3f}"])
    whole, mine = sum(clock.whole.values()), sum(clock.whole.values()) - sum(clock.model.values())
    rows.append([hardware("cpu"), arguments.pictures, "all", f"{whole:.1f}", f"{mine:.1f}", f"{mine / whole:.3f}"])
    for row in rows:
        print(*row[2:], sep="\t")
    with (Path(__file__).parent / "results" / "overhead.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["device", "pictures", "stage", "seconds", "beside_the_model", "share"])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
