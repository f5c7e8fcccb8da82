"""Do tuned presets beat the named ones on pictures that the search has not seen?  Trained networks, real pictures.

    PFUNGST_DATA=... python benchmarks/tuning.py                 # all networks, 100 pictures each
    PFUNGST_DATA=... python benchmarks/tuning.py resnet20 --limit 40

Networks: ResNet-20 (CIFAR-10) and SqueezeNet 1.1 (ImageNet), see the data folder's SOURCES.md.  There are no masks for
their pictures, so that the score is of SRG and of telling classes apart.  ``mosaics`` has masks: 2 x 2 pictures of
ImageNet at half size, of which SqueezeNet sees one, whose quarter is the object.  ``benchmarks/results/tuning.csv``
has a row a preset and network: figures on the held-back half, and the tuned preset's gain over it with its 95 %
interval; docs/guides/tuning.md gets the table.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar_planted import PREPROCESS  # the scripts beside this one
from engine import import_torchvision
from guides import replace_between
from torch import Tensor
from torch.nn import functional
from trained import DATA, SQUEEZENET, load_resnet

from pfungst.domains.image import load_batch, read_images
from pfungst.models import LoadedModel, load_model
from pfungst.tuning import Tuning, tune
from pfungst.weights import digest_module

GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "tuning.md"
RESULTS = Path(__file__).parent / "results" / "tuning.csv"
HEAD = (
    "network", "pictures", "held_back", "seed", "preset", "written", "srg", "mass", "top_two_alike", "score",
    "search_score", "gain", "gain_low", "gain_high", "proven", "tried", "rules",
)  # fmt: skip


def open_resnet(folder: Path) -> tuple[LoadedModel, Path]:
    """ResNet-20 and the CIFAR-10 test pictures, one folder a class."""
    model = load_resnet(20)
    with zipfile.ZipFile(DATA / "cifar10" / "cifar10_test_jpg_200_per_class.zip") as archive:
        archive.extractall(folder)
    return LoadedModel(model, "ResNet-20", PREPROCESS, None, digest_module(model)), _pictures(folder)


def open_squeezenet(folder: Path) -> tuple[LoadedModel, Path]:
    """SqueezeNet 1.1 and one ImageNet picture a class: BGR, 0 to 255 less the mean, centre crop of 227."""
    import_torchvision()
    model = load_model(
        "torchvision:squeezenet1_1", weights=SQUEEZENET,
        size=227, mean=(104, 117, 123), std=(1.0, 1.0, 1.0), channels="BGR",
    )  # fmt: skip
    with zipfile.ZipFile(DATA / "imagenet-sample-images" / "imagenet_1000x1_256.zip") as archive:
        archive.extractall(folder)
    return model, _pictures(folder)


def open_mosaics(folder: Path) -> tuple[LoadedModel, tuple[Tensor, Tensor, Tensor]]:
    """Mosaics of pictures that SqueezeNet recognises (p > 0.5), and the quarter whose class it sees in the mosaic."""
    loaded, pictures = open_squeezenet(folder)
    assert loaded.preprocess is not None
    data = read_images(pictures)
    rows = np.random.default_rng(0).permutation(len(data))[:400]
    labels = np.array([int(Path(name).name.partition("_")[0]) for name in data.ids])
    kept, known = [], []
    for part in np.array_split(rows, 25):
        x, read, _ = load_batch(data, part.tolist(), loaded.preprocess)
        with torch.no_grad():
            sure = loaded.module(x).softmax(1)[torch.arange(len(x)), torch.from_numpy(labels[read])] > 0.5
        kept.append(functional.interpolate(x[sure], (114, 114), mode="bilinear", antialias=True))
        known += [labels[row] for row, right in zip(read, sure, strict=True) if right]
    small = torch.cat(kept)
    n = len(small)
    mosaics, masks = torch.zeros(n, 3, 228, 228), torch.zeros(n, 228, 228, dtype=torch.bool)
    kept_rows = []
    for i in range(n):
        for place in range(4):
            top, left = 114 * (place // 2), 114 * (place % 2)
            mosaics[i, :, top : top + 114, left : left + 114] = small[(i + place) % n]
        with torch.no_grad():
            seen = int(loaded.module(mosaics[i : i + 1]).argmax())
        places = [place for place in range(4) if known[(i + place) % n] == seen]
        if len(places) == 1:
            top, left = 114 * (places[0] // 2), 114 * (places[0] % 2)
            masks[i, top : top + 114, left : left + 114] = True
            kept_rows.append(i)
    silent = LoadedModel(loaded.module, "SqueezeNet 1.1", None, None, loaded.digest)
    return silent, (mosaics[kept_rows], torch.full((len(kept_rows),), -1), masks[kept_rows])


def _pictures(folder: Path) -> Path:
    """Down to where there is more than one entry."""
    inside = [path for path in sorted(folder.iterdir()) if not path.name.startswith(("_", "."))]
    return _pictures(inside[0]) if len(inside) == 1 and inside[0].is_dir() else folder


NETWORKS: dict[str, Callable[[Path], tuple[LoadedModel, Any]]] = {
    "resnet20": open_resnet,
    "squeezenet": open_squeezenet,
    "mosaics": open_mosaics,
}


def list_rows(network: str, found: Tuning, seed: int) -> list[dict[str, object]]:
    """A row for each preset on the held-back half."""
    search = {one.name: one.score for one in found.tried} | {
        found.found.name: max(one.score for one in found.tried)
    }  # fmt: skip
    rows: list[dict[str, object]] = []
    for one in found.held:
        gain = one.gains.get("score")
        rows.append({
            "network": network, "pictures": len(found.about["search"]) + len(found.about["held"]),
            "held_back": len(found.about["held"]), "seed": seed,
            "preset": "tuned" if found.improved and one is found.held[0] else one.name,
            "written": one.name == found.preset.name, "srg": f"{one.figures['srg']:.4f}",
            "mass": f"{one.figures['mass']:.4f}" if "mass" in one.figures else "",
            "top_two_alike": f"{one.figures['alike']:.4f}", "score": f"{one.score:.4f}",
            "search_score": f"{search[one.name]:.4f}",
            **{key: "" if gain is None else f"{value:+.4f}"
               for key, value in zip(("gain", "gain_low", "gain_high"), gain or (0, 0, 0), strict=True)},
            "proven": found.proven, "tried": len(found.tried),
            "rules": "; ".join(f"{k}: {v}" for k, v in found.rules.items()) if one is found.held[0] else "",
        })  # fmt: skip
    return rows


def write_table(rows: list[dict[str, Any]]) -> None:
    """The guide's table: a block a network, all on held-back pictures."""
    lines = [
        "| network | preset | SRG ↑ | mass ↑ | top two alike ↓ | score ↑ | gain of the tuned one (95 %) | score on the "
        "search half |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        gain = f"{row['gain']} ({row['gain_low']}, {row['gain_high']})" if row["gain"] else ""
        name = f"**{row['preset']}**" if str(row["written"]) == "True" else row["preset"]
        network = f"{row['network']}, {row['held_back']} pictures" if row["rules"] else ""
        figures = " | ".join(str(row[key]) or "-" for key in ("srg", "mass", "top_two_alike", "score"))
        lines.append(f"| {network} | {name} | {figures} | {gain} | {row['search_score']} |")
    rules = [f"- {row['network']}: {row['rules']}" for row in rows if row["rules"]]
    table = "\n".join([*lines, "", "Rules that the searches chose:", "", *rules])
    GUIDE.write_text(replace_between(GUIDE.read_text(encoding="utf-8"), "tuning", table), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help=f"some of {', '.join(NETWORKS)}")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--budget", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=None, help="where searches are kept, to go on after a kill")
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            done = set(args.networks)
            rows = [row for row in csv.DictReader(file) if row["network"] not in done or row["seed"] != str(args.seed)]
    torch.manual_seed(0)
    for network in args.networks:
        with tempfile.TemporaryDirectory() as folder:
            model, pictures = NETWORKS[network](Path(folder))
            out = None if args.work is None else args.work / f"{network}_{args.limit}_{args.seed}.json"

            def tell(stage: str, done: int, total: int) -> None:
                print(f"\r{stage} {done} of {total}   ", end="", flush=True)

            found = tune(
                model, pictures, out=out, limit=args.limit, budget=args.budget, seed=args.seed, progress=tell
            )  # fmt: skip
            rows += list_rows(network, found, args.seed)
        print("", network, *found.lines(), sep="\n")
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, HEAD, lineterminator="\n", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        write_table(rows)


if __name__ == "__main__":
    main()
