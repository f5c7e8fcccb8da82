"""Measures of maps, pfungst's beside Quantus': are the results equal, how long do they take, how much memory?

    PFUNGST_DATA=... python benchmarks/quality.py
    PFUNGST_DATA=... python benchmarks/quality.py --device cuda --pictures 64

Both judge the same maps (gradient times input) of the same pictures by the same network, with the same settings: one
replacement, the same regions or pixels in each step, one order.  They take turns, one measure each, so that a busy
machine slows both alike; each (measure, network, library) is a process of its own, whose peak memory above that after
loading is told.  ``difference`` is the greatest of any entry of the curves or scores.  Quantus is called with its
defaults but for what makes the two comparable (no normalisation, no absolute values, the same replacement), and with
the batch size that suits it (the whole batch).  Rows go to benchmarks/results/quality_HARDWARE.csv.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine import build, import_torchvision, table_path  # the scripts beside this one
from methods import NETWORKS, read_squeezenet
from torch import Tensor, nn

from pfungst.methods import make_method
from pfungst.quality.measures import MEASURES
from pfungst.quality.pixel_flipping import flip
from pfungst.quality.questions import Question

DRAWN = ("vgg16", "mobilenet_v3", "resnet50")  # of random weights, which cost what trained ones cost; regions only
RESULTS = Path(__file__).parent / "results"
FIELDS = (
    "measure",
    "network",
    "pictures",
    "library",
    "device",
    "threads",
    "seconds",
    "ratio",
    "memory_mib",
    "difference",
)
MEASURED = ("pixel flipping", "region perturbation", "localisation", "complexity", "max sensitivity")


def read_mnist(count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A LeNet of the usual size with drawn weights, 28 x 28 pictures of noise: for costs, not for sense."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(1, 10, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(10, 25, 5), nn.ReLU()]
    layers += [nn.MaxPool2d(2), nn.Conv2d(25, 100, 4), nn.ReLU(), nn.Flatten(), nn.Linear(100, 10)]
    return nn.Sequential(*layers).eval(), torch.randn(count, 1, 28, 28), torch.arange(count) % 10


def read_network(name: str, count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Model, inputs and targets."""
    if name == "lenet":
        return read_mnist(count)
    if name in DRAWN:
        model, _ = build(name, 1, "cpu")
        x = torch.randn(count, 3, 225, 225)
        with torch.no_grad():
            return model, x, model(x).argmax(1)
    model, x, *_ = read_squeezenet(count) if name == "squeezenet" else NETWORKS[name].read(count)
    if name == "squeezenet":
        x = x[:, :, 1:226, 1:226]  # 225 = 25 x 9: Quantus fills up what 9 does not divide
    with torch.no_grad():
        return model, x.contiguous(), model(x).argmax(1)


def ours(measure: str, q: Question, steps: int) -> np.ndarray:
    """The measure by pfungst."""
    if measure == "pixel flipping":
        pixels = q.x[0, 0].numel()
        curve = flip(q, region=1, steps=steps, most=1.0, fill="zero", orders=("most",)).probability["most"]
        assert pixels % steps == 0
        return curve[:, 1:].cpu().numpy()
    if measure == "region perturbation":
        side, count = (9, 625) if q.x.shape[2] == 225 else (2, (q.x.shape[2] // 2) ** 2)
        curve = flip(q, region=side, steps=steps, most=steps / count, fill="zero", orders=("most",)).probability["most"]
        return (curve[:, :1] - curve[:, 1:]).cpu().numpy()
    if measure == "localisation":
        figures = MEASURES["localisation"](q, tolerance=0).figures
        return np.stack([figures[name].cpu().numpy() for name in ("mass", "rank", "pointing")])
    if measure == "complexity":
        figures = MEASURES["complexity"](q).figures
        return np.stack([figures[name].cpu().numpy() for name in ("entropy", "sparseness")])
    assert measure == "max sensitivity"
    return MEASURES["robustness"](q, draws=8).figures["max_sensitivity"].cpu().numpy()


def theirs(measure: str, q: Question, steps: int) -> np.ndarray:
    """The same by Quantus."""
    import quantus

    shared = {"abs": False, "normalise": False, "disable_warnings": True, "return_aggregate": False}
    x, y, maps = q.x.cpu().numpy(), q.target.cpu().numpy(), q.maps[:, None].cpu().numpy()
    device = str(q.x.device)

    def score(name: str, a: np.ndarray = maps, masks: bool = False, **settings: Any) -> np.ndarray:
        given = {"s_batch": q.masks[:, None].cpu().numpy()} if masks and q.masks is not None else {}
        metric = getattr(quantus, name)(**shared, **settings)
        explain = settings.pop("explain", None)
        more = {} if explain is None else {"explain_func": explain}
        return np.asarray(metric(q.model, x, y, a.copy(), device=device, batch_size=len(x), **given, **more), float)

    if measure == "pixel flipping":
        per = x[0].size // steps
        return score("PixelFlipping", features_in_step=per, perturb_baseline=0.0)
    if measure == "region perturbation":
        side = 9 if x.shape[2] == 225 else 2
        return score("RegionPerturbation", patch_size=side, regions_evaluation=steps, perturb_baseline=0.0)
    positive = maps.clip(0)
    if measure == "localisation":
        return np.stack([score("RelevanceMassAccuracy", positive, True), score("RelevanceRankAccuracy", maps, True),
                         score("PointingGame", maps, True)])  # fmt: skip
    if measure == "complexity":
        return np.stack([score("Complexity", np.abs(maps)), score("Sparseness", np.abs(maps))])
    method = make_method("gradient-x-input", q.model)

    def explain(model: Any, inputs: Any, targets: Any, **_: Any) -> np.ndarray:
        given = torch.as_tensor(np.asarray(inputs), dtype=torch.float32, device=device)
        return method(given, torch.as_tensor(np.asarray(targets), device=device))[:, None].cpu().numpy()

    radius = 0.02 * float(q.x.max() - q.x.min())
    # Twelve, as many maps as ours makes: eight with noise, and four of moved pictures.
    metric = quantus.MaxSensitivity(nr_samples=12, lower_bound=radius, **shared)
    return np.asarray(metric(q.model, x, y, maps.copy(), explain_func=explain, device=device, batch_size=len(x)), float)


def serve(measure: str, network: str, library: str, pictures: int, steps: int, device: str) -> None:
    """A process: answers each line with the seconds that the measure took, then its values and peak memory."""
    import resource

    warnings.simplefilter("ignore")
    torch.backends.cudnn.allow_tf32 = False  # whose rounding differs from batch size to batch size, by up to 0.003
    if library == "quantus":
        import_torchvision()  # which Quantus imports, whatever torch it was built for
        import quantus  # noqa: F401  (before the level that memory is measured from)
    torch.manual_seed(0)
    model, x, target = read_network(network, pictures)
    model, x, target = model.to(device), x.to(device), target.to(device)
    maps = make_method("gradient-x-input", model)(x, target)
    masks = torch.zeros_like(maps, dtype=torch.bool)
    masks[:, : maps.shape[1] // 2, : maps.shape[2] // 3] = True
    method = make_method("gradient-x-input", model)
    gc.collect()
    level = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    values = np.zeros(0)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        question = Question(model, x, target, maps, method, masks)
        start = time.perf_counter()
        values = (ours if library == "pfungst" else theirs)(measure, question, steps)
        print(json.dumps(time.perf_counter() - start), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"memory": (peak - level) / 1024, "values": values.tolist()}), flush=True)


def compare(measure: str, network: str, pictures: int, steps: int, repeats: int, device: str) -> list[dict[str, Any]]:
    """Both libraries in turns; the first turn warms up."""
    processes = {}
    for library in ("quantus", "pfungst"):
        arguments = [measure, network, library, str(pictures), str(steps), device]
        command = [sys.executable, __file__, "--serve", *arguments]
        processes[library] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    times: dict[str, list[float]] = {library: [] for library in processes}
    for turn in range(repeats + 1):
        for library, process in processes.items():
            seconds = float(json.loads(_ask(process, "go")))
            if turn:
                times[library].append(seconds)
    ends = {library: json.loads(_ask(process, "end")) for library, process in processes.items()}
    ratio = statistics.median(a / b for a, b in zip(times["quantus"], times["pfungst"], strict=True))
    difference = float(np.nanmax(np.abs(np.array(ends["quantus"]["values"]) - np.array(ends["pfungst"]["values"]))))
    same = measure != "max sensitivity"  # drawn noise: the two draw their own
    return [
        {"measure": measure, "network": network, "pictures": pictures, "library": library, "device": device,
         "threads": torch.get_num_threads(), "seconds": round(statistics.median(times[library]), 4),
         "ratio": round(ratio, 2) if library == "pfungst" else 1, "memory_mib": round(ends[library]["memory"], 1),
         "difference": f"{difference:.1e}" if same and library == "pfungst" else ""}
        for library in processes
    ]  # fmt: skip


def _ask(process: Any, word: str) -> str:
    process.stdin.write(word + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    while line and line[0] not in "{0123456789":  # what libraries print on their own
        line = process.stdout.readline()
    if not line:
        raise RuntimeError("a process ended: see its message above")
    return str(line)


# network -> pictures, then steps of pixel flipping and of region perturbation.  Of pictures with three channels Quantus
# flips no whole pixels: it asks for steps that divide height times width, and counts channels in them.
SIZES: dict[str, tuple[int, int, int]] = {
    "lenet": (64, 784, 100),
    "cifar": (64, 0, 100),
    "squeezenet": (16, 0, 100),
    "vgg16": (8, 0, 100),
    "mobilenet_v3": (16, 0, 50),
    "resnet50": (16, 0, 50),
}


def main() -> None:
    """All measures on all networks, or those asked for; rows of others in the file are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--measures", nargs="+", choices=MEASURED, default=list(MEASURED))
    parser.add_argument("--pictures", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--serve", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        measure, network, library, pictures, steps, device = arguments.serve
        serve(measure, network, library, int(pictures), int(steps), device)
        return
    path = RESULTS / table_path(arguments.device).name.replace("engine_", "quality_")
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    for network in arguments.networks:
        count, flipping, regions = SIZES[network]
        for measure in arguments.measures:
            if (measure == "pixel flipping" and not flipping) or (
                network in DRAWN and measure != "region perturbation"
            ):
                continue
            steps = flipping if measure == "pixel flipping" else regions
            found = compare(measure, network, arguments.pictures or count, steps, arguments.repeats, arguments.device)
            print(*found, sep="\n", flush=True)
            done = {(str(r["measure"]), str(r["network"]), str(r["device"])) for r in found}
            rows = [r for r in rows if (r["measure"], r["network"], r["device"]) not in done] + found
            with path.open("w", newline="") as file:
                table = csv.DictWriter(file, FIELDS)
                table.writeheader()
                table.writerows(rows)


def _quiet(function: Callable[[], None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function()


if __name__ == "__main__":
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    _quiet(main)
