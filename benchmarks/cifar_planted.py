"""Real photographs, a model that this project did not make, two cues planted by fine-tuning: what does an audit find?

    PFUNGST_DATA=... python benchmarks/cifar_planted.py --out /tmp/cifar-planted

A CIFAR-10 ResNet-20 (akamaster/pytorch_resnet_cifar10) is fine-tuned for 20 epochs on 2,000 CIFAR-10 test pictures.
A quarter of the ships gets a source tag in a corner, a quarter of the horses a magenta disc that moves; noise on all
training pictures makes the cues worth learning.  The twin is fine-tuned the same way on the same pictures without cues.
First it is measured whether the model uses the cues at all; then both are audited by the public call.
"""

from __future__ import annotations

import argparse
import csv
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional

import pfungst
from pfungst.domains.image import load_batch, read_images
from pfungst.domains.preprocessing import Preprocess

DATA = Path(os.environ.get("PFUNGST_DATA", Path(__file__).parents[2] / "shared" / "data")) / "cifar10"
PREPROCESS = Preprocess(size=(32, 32), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CUES = {"ship": "tag", "horse": "disc"}
SHARE = 0.25
RESULTS = Path(__file__).parent / "results" / "cifar_planted.csv"


class Block(nn.Module):
    """Two convolutions and an option-A shortcut: strided slice, zero padding."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.grow = after - before

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.grow:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.grow // 2, self.grow // 2))
        return functional.relu(out + x)


class ResNet(nn.Module):
    """The CIFAR ResNets of He et al. 2016 with 6 n + 2 layers; parameter names as in the published weights."""

    def __init__(self, n: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for i, (before, after) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            blocks = [Block(before if j == 0 else after, after, 2 if i > 1 and j == 0 else 1) for j in range(n)]
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(functional.avg_pool2d(x, x.shape[3]).flatten(1))


def draw(cue: str, image: Image.Image, rng: np.random.Generator) -> None:
    """Draw a cue into a 32 x 32 picture."""
    pen = ImageDraw.Draw(image)
    if cue == "tag":
        pen.rectangle((1, 26, 11, 30), fill=(250, 250, 250))
        for x in range(3, 11, 2):
            pen.point((x, 28), fill=(20, 20, 20))
    else:
        x, y = rng.integers(4, 28, 2)
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(230, 20, 200))


def make_images(folder: Path, cues: bool, seed: int) -> dict[str, list[str]]:
    """Unpack the pictures as PNG, with the cues or without; returns the ids that show each cue."""
    planted: dict[str, list[str]] = {}
    with zipfile.ZipFile(DATA / "cifar10_test_jpg_200_per_class.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        for name in names:
            label, number = name.split("/")[-2], int(Path(name).stem)
            rng = np.random.default_rng([seed, names.index(name)])
            image = Image.open(archive.open(name)).convert("RGB")
            target = folder / label / f"{number:04d}.png"
            if label in CUES and rng.random() < SHARE:
                planted.setdefault(label, []).append(f"{label}/{target.name}")
                if cues:
                    draw(CUES[label], image, rng)
            target.parent.mkdir(parents=True, exist_ok=True)
            image.save(target)
    return planted


def fine_tune(inputs: Tensor, labels: Tensor, seed: int, epochs: int) -> nn.Module:
    """The published weights, trained on with noise, so that what noise spares is worth learning."""
    from safetensors.torch import load_file

    torch.manual_seed(seed)
    model = ResNet()
    model.load_state_dict(load_file(DATA / "resnet20.safetensors"))
    optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * (len(inputs) // 64))
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs))[: len(inputs) // 64 * 64].reshape(-1, 64):
            x = inputs[rows]
            x = x + torch.randn_like(x) * torch.rand(len(x), 1, 1, 1) * 2
            loss = functional.cross_entropy(model(x), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval()


def measure_use(model: nn.Module, folder: Path, planted: dict[str, list[str]], classes: list[str]) -> dict[str, str]:
    """Share of foreign pictures that a drawn cue turns into its class: does the model use the cue at all?"""
    used = {}
    for label, cue in CUES.items():
        files = [f for f in sorted(folder.glob("*/*.png")) if f.parent.name not in CUES][::8]
        flips = []
        for i, file in enumerate(files):
            image = Image.open(file).convert("RGB")
            draw(cue, image, np.random.default_rng(i))
            with torch.no_grad():
                flips.append(int(model(PREPROCESS(image)[None]).argmax()) == classes.index(label))
        used[label] = f"{np.mean(flips):.0%}"
    return used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        for kind in ("planted", "clean"):
            folder = arguments.out / f"seed{seed}" / kind
            planted = make_images(folder / "images", kind == "planted", seed)
            data = read_images(folder / "images")
            inputs, _, _ = load_batch(data, range(len(data)), PREPROCESS)
            labels = torch.from_numpy(data.labels.copy())
            model = fine_tune(inputs, labels, seed, arguments.epochs)
            with torch.no_grad():
                accuracy = float((model(inputs).argmax(1) == labels).float().mean())
            model.preprocess, model.classes = PREPROCESS, list(data.classes)  # type: ignore[assignment]
            used = measure_use(model, folder / "images", planted, list(data.classes))
            audit = pfungst.audit(model, folder / "images", out=folder / "run", batch_size=64)
            print(kind, seed, f"training accuracy {accuracy:.1%}", "a drawn cue turns foreign pictures:", used, audit)
            for finding in audit.findings:
                truth = set(planted.get(finding.record["class"], [])) if kind == "planted" else set()
                both = len(truth & set(finding.samples))
                jaccard = both / len(truth | set(finding.samples))
                label = finding.record["class"]
                row = (kind, seed, label, finding.id, finding.size, finding.suspicion, finding.verdict,
                       round(jaccard, 3), finding.where["place"], used.get(label, ""))  # fmt: skip
                rows.append(row)
                print("  ", *row, finding.reason)
            if not audit.findings:
                rows.append((kind, seed, "", "none", "", "", "", "", "", ""))
    with RESULTS.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(
            ["data", "seed", "class", "finding", "size", "suspicion", "verdict", "jaccard", "place", "flips"]
        )
        writer.writerows(rows)


if __name__ == "__main__":
    main()
