"""Does an audit keep a GPU busy?  ResNet-50 at 224 pixels: relevance by the audit's own stage, against the model alone.

    python benchmarks/keep_busy.py --pictures 3000

Pictures of 500 x 375 pixels are written as JPEG files.  First the relevance of one batch that lies on the device is
made again and again: what the device could do.  Then the files are only read: what the processor could do.  Then
``compute_relevance``, the stage of an audit, reads, decodes and prepares the files, makes relevance, pools it, writes
it.  Prints pictures a second of all three, and the ratio of the last to the first, for one number of reading processes
after the other; the rows go to benchmarks/results/keep_busy.csv.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from engine import build, hardware  # the script beside this one
from PIL import Image

from pfungst.domains.preprocessing import Preprocess
from pfungst.maps import explain_batch, open_subject
from pfungst.models import load_model
from pfungst.pipeline import compute_relevance, identity, make_settings
from pfungst.readers import read_ahead
from pfungst.store import Run


def write_pictures(folder: Path, count: int) -> None:
    """JPEG files with the detail of photographs: noise of falling spectrum; few are drawn, each is written often."""
    rng = np.random.default_rng(0)
    different = []
    for _ in range(16):
        layers = [rng.normal(0, 40 * 0.6**i, (4 * 2**i, 6 * 2**i, 3)) for i in range(7)]
        parts = [np.asarray(Image.fromarray((layer + 128).clip(0, 255).astype(np.uint8)).resize((500, 375)))
                 for layer in layers]  # fmt: skip
        file = io.BytesIO()
        picture = (np.sum(parts, 0) - 128.0 * (len(parts) - 1)).clip(0, 255).astype(np.uint8)
        Image.fromarray(picture).save(file, "JPEG", quality=90)
        different.append(file.getvalue())
    for i in range(count):
        target = folder / "pictures" / ("left", "right")[i % 2] / f"{i:05d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(different[i % len(different)])


def rate(step: Callable[[], int], seconds: float) -> float:
    """Pictures a second of a step that says how many it did, after one step to warm up."""
    step()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        done += step()
    return done / (time.perf_counter() - start)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--readers", type=int, nargs="+", default=[min(16, os.cpu_count() or 1)])
    parser.add_argument("--seconds", type=float, default=8.0, help="how long the model alone is measured")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "keep_busy.csv")
    arguments = parser.parse_args()
    model, _ = build("resnet50", 2, "cpu")
    model.preprocess = Preprocess(size=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # type: ignore[assignment]
    model.fc = torch.nn.Linear(2048, 2).eval()
    model.classes = ["left", "right"]  # type: ignore[assignment]
    model = model.to(arguments.device)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        write_pictures(Path(scratch), arguments.pictures)
        for readers in arguments.readers:
            settings = make_settings({"device": arguments.device, "batch_size": arguments.batch, "workers": readers})
            subject = open_subject(load_model(model, device=arguments.device), Path(scratch) / "pictures", settings)
            inputs = subject.load(list(range(min(arguments.batch, arguments.pictures))))
            labels = subject.data.labels[: len(inputs)]

            def explain() -> int:
                found = explain_batch(subject, inputs, np.arange(len(labels)))  # noqa: B023
                return len(found["where"].sum((1, 2)).cpu())

            alone = rate(explain, arguments.seconds)
            order = np.arange(arguments.pictures)
            batches = np.split(order, range(arguments.batch, arguments.pictures, arguments.batch))
            start = time.perf_counter()
            for batch in read_ahead(subject.data, subject.preprocess, batches, readers, arguments.device):
                assert not batch.bad
            read = arguments.pictures / (time.perf_counter() - start)
            run = Run(Path(scratch) / f"run{readers}")
            run.begin(identity(subject, lambda *_: None))
            start = time.perf_counter()
            compute_relevance(run, subject, lambda *_: None)
            staged = arguments.pictures / (time.perf_counter() - start)
            figures = [f"{alone:.1f}", f"{read:.1f}", f"{staged:.1f}", f"{staged / alone:.3f}"]
            rows.append([hardware(arguments.device), readers, arguments.batch, *figures])
            print(
                f"{readers} readers: {alone:.0f} pictures/s by the device alone, {read:.0f} only read, {staged:.0f} in "
                f"the stage, {staged / alone:.0%}"
            )
    with arguments.results.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(
            ["device", "readers", "batch", "alone_per_second", "read_per_second", "stage_per_second", "ratio"]
        )
        writer.writerows(rows)


if __name__ == "__main__":
    main()
