"""Which way to explain is right?  All presets and what they are compared with, on trained networks; for the guide.

    PFUNGST_DATA=... python benchmarks/methods.py --out /tmp/methods              (hours on two cores: it goes on)
    PFUNGST_DATA=... python benchmarks/methods.py --out /tmp/methods --networks cifar --pictures 40

Networks with trained weights: SqueezeNet 1.1 (ImageNet sample pictures at 227 pixels), ResNet-20 and ResNet-56
(CIFAR-10 test pictures at 32 pixels).  The predicted class is explained.  Writes
benchmarks/results/methods_NETWORK.csv and the tables of docs/guides/methods.md.
"""

from __future__ import annotations

import argparse
import io
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from engine import hardware  # the scripts beside this one
from guides import replace_between
from PIL import Image
from torch import Tensor, nn
from trained import DATA, load_resnet, load_squeezenet

import pfungst
from pfungst.tables import Table, write_number

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "guides" / "methods.md"
PRESETS = (
    "epsilon-plus",
    "epsilon-plus-flat",
    "epsilon-alpha2-beta1",
    "epsilon-alpha2-beta1-flat",
    "epsilon-gamma-box",
)
OTHERS = (
    "gradient",
    "gradient-x-input",
    "guided-backprop",
    "grad-cam",
    "integrated-gradients",
    "smoothgrad",
    "occlusion",
)
MEASURES = ("srg", "class-sensitivity", "robustness", "complexity", "randomisation", "conservation")
COLUMNS = ("srg", "aopc", "abpc", "top_two", "shift", "max_sensitivity", "entropy", "alike_whole", "leak")


@dataclass(frozen=True)
class Network:
    """A trained network: ``read(count)`` gives (model, x, labels, low, high), pictures drawn over the classes."""

    title: str
    read: Callable[[int], tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]]
    pictures: int
    region_perturbation: dict[str, int] | None
    leave_out: tuple[str, ...] = ()  # measures that take too long


def read_squeezenet(count: int) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """SqueezeNet 1.1: short side 256, centre 227, BGR, less the mean colour."""
    pictures, labels = _unzip(DATA / "imagenet-sample-images" / "imagenet_1000x1_256.zip", count)
    mean = torch.tensor([104.0, 117.0, 123.0])[:, None, None]
    inputs = []
    for picture in pictures:
        left, top = (picture.width - 227) // 2, (picture.height - 227) // 2
        cut = picture.crop((left, top, left + 227, top + 227))
        inputs.append(torch.from_numpy(np.asarray(cut, np.float32)[:, :, ::-1].copy()).permute(2, 0, 1) - mean)
    return load_squeezenet(), torch.stack(inputs), torch.tensor([int(label) for label in labels]), -mean, 255 - mean


def read_cifar(depth: int) -> Callable[[int], tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]]:
    """A ResNet of CIFAR-10 of this depth."""

    def read(count: int) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
        pictures, names = _unzip(DATA / "cifar10" / "cifar10_test_jpg_200_per_class.zip", count)
        mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        x = torch.from_numpy(np.stack([np.asarray(picture, np.float32) for picture in pictures])).permute(0, 3, 1, 2)
        classes = {name: i for i, name in enumerate(sorted(set(names)))}
        return (
            load_resnet(depth),
            (x / 255 - mean) / std,
            torch.tensor([classes[n] for n in names]),
            -mean / std,
            (1 - mean) / std,
        )

    return read


def _unzip(path: Path, count: int) -> tuple[list[Image.Image], list[str]]:
    """Pictures of an archive at equal distances in its sorted order, and what their names begin with."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        chosen = [names[i] for i in np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int)]
        pictures = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in chosen]
    return pictures, [name.split("/")[-2] if name.count("/") > 1 else Path(name).name[:4] for name in chosen]


NETWORKS = {
    "cifar": Network("ResNet-20, CIFAR-10", read_cifar(20), 200, {"draws": 2}),
    "cifar56": Network("ResNet-56, CIFAR-10", read_cifar(56), 60, None),
    "squeezenet": Network("SqueezeNet 1.1, ImageNet", read_squeezenet, 24, None, ("robustness",)),
}


def write_tables(name: str, title: str, table: Table, seconds: dict[str, float], machine: str) -> None:
    """The network's CSV, and its table in the guide between its markers."""
    lines = ["method,kind of figure,mean,low,high,n,does not beat"]
    for method in table.methods:
        for figure, cell in table.cells[method].items():
            worse = " ".join(cell.worse_than or ())
            lines.append(f"{method},{figure},{cell.mean:.5g},{cell.low:.5g},{cell.high:.5g},{cell.n},{worse}")
    target = ROOT / "benchmarks" / "results" / f"methods_{name}.csv"
    target.write_text("\n".join(lines) + "\n")
    shown = [figure for figure in COLUMNS if figure in table.figures]
    marks = {"high": " ↑", "low": " ↓", "": ""}
    heads = [table.figures[figure].title + marks[table.figures[figure].better] for figure in shown]
    rows = [f"**{title}** ({machine})", ""]
    rows += ["| | " + " | ".join(heads) + " | s / map |", "|---|" + "---:|" * (len(heads) + 1)]
    for method in table.methods:
        cells = []
        for figure in shown:
            cell = table.cells[method].get(figure)
            half = "" if cell is None or not np.isfinite(cell.low) else f" ± {write_number((cell.high - cell.low) / 2)}"
            cells.append("" if cell is None else write_number(cell.mean) + half + (" †" if cell.worse_than else ""))
        time = write_number(seconds[method]) if method in seconds else ""
        rows.append(f"| {method} | " + " | ".join(cells) + f" | {time} |")
    GUIDE.write_text(replace_between(GUIDE.read_text(), name, "\n".join(rows)))


def main() -> None:
    """Evaluate the networks one after the other; what is finished of a network is kept below --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for what is finished")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--pictures", type=int, default=None, help="of each network")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    for name in arguments.networks:
        network = NETWORKS[name]
        count = arguments.pictures or network.pictures
        model, x, labels, low, high = network.read(count)
        measures: dict[str, dict[str, int]] = {m: {} for m in MEASURES if m not in network.leave_out}
        if network.region_perturbation is not None:
            measures["region-perturbation"] = network.region_perturbation
        found = pfungst.evaluate(
            model.to(arguments.device), (x, labels), methods=[*PRESETS, *OTHERS], measures=measures,
            bounds=(low.flatten(), high.flatten()), batch_size=20 if x.shape[2] < 64 else 4,
            device=arguments.device, out=arguments.out / f"{name}_{count}",
            progress=lambda stage, done, total, name=name: print(f"{name}: {done} of {total}", flush=True),
        )  # fmt: skip
        print(found.left_out or "", flush=True)
        found.write(arguments.out / f"{name}_{count}")
        write_tables(
            name, network.title, found.table(), found.seconds, f"{count} pictures; {hardware(arguments.device)}"
        )


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    main()
