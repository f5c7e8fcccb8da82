"""How noisy are maps of relevance?  Gradient times input beside the presets, over networks of several shapes.

    PFUNGST_DATA=... python benchmarks/shattering.py          (under ten minutes on one core)

Of each map, summed over channels: do neighbouring pixels agree, how rough is it, does it stay itself when the picture
changes a little?  Trained: SqueezeNet 1.1 (ImageNet) and ResNet-20, 32, 56 (CIFAR-10).  VGG-16, Inception v3, ResNet-50
and DenseNet-121 have random weights, for no others were to be had, at fewer pixels than usual; their batch norms are
calibrated by one pass over real pictures.  Beside them three maps that know nothing of a network.  Writes
benchmarks/results/shattering.csv, the tables of docs/guides/noise.md and its pictures.
"""

from __future__ import annotations

import argparse
import csv
import io
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from cifar_planted import ResNet  # the scripts beside this one
from engine import hardware, import_torchvision
from guides import replace_between
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from trained import DATA, load_resnet, load_squeezenet

from pfungst import heatmaps
from pfungst.lrp import LRP, preset

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "shattering.csv"
GUIDE = ROOT / "docs" / "guides" / "noise.md"
GRID = ROOT / "docs" / "images" / "noise.jpg"
STEPS, PART = 5, 1 / 64  # points of a line in small steps, and how far each goes towards another picture
POINTS, LINES = 33, 8  # points of a whole line from picture to picture, and how many lines
LAGS = (1, 2, 4)

# ---- measures: of maps as numpy arrays, nan where they are not defined -----------------------------------------------


def correlate(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's r of the values of two maps; nan where one of them is constant."""
    a, b = (one.astype(np.float64).ravel() - one.mean(dtype=np.float64) for one in (first, second))
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 1e-12 * max(first.size, 1) * _square(first, second) else float("nan")


def _square(*maps: np.ndarray) -> float:
    return float(np.prod([np.abs(one).max(initial=0) for one in maps]))


def correlate_neighbours(scores: np.ndarray) -> float:
    """Mean of r(m[i, j], m[i, j+1]) and r(m[i, j], m[i+1, j]) over a map (h, w): 0 for white noise, 1 is smooth."""
    return (correlate(scores[:, :-1], scores[:, 1:]) + correlate(scores[:-1], scores[1:])) / 2


def total_variation(scores: np.ndarray) -> float:
    """Σ |m[i, j+1] - m[i, j]| + Σ |m[i+1, j] - m[i, j]| of a map (h, w) with Σ |m| = 1; nan where it is all zero."""
    whole = np.abs(scores).sum(dtype=np.float64)
    steps = sum(np.abs(np.diff(scores.astype(np.float64), axis=axis)).sum() for axis in (0, 1))
    return float(steps / whole) if whole else float("nan")


def relative_variation(scores: np.ndarray) -> float:
    """Total variation over what it is on average if the same values are shuffled: 1 for white noise, 0 is smooth.

    That average is exact: the number of neighbours times the mean difference of two values drawn without replacement,
    2 / (n (n - 1)) Σ_k (2 k - n - 1) m_(k), with m_(k) the k-th smallest (Gini).  nan for a constant map.
    """
    n, (height, width) = scores.size, scores.shape
    values = np.sort(scores.astype(np.float64), axis=None)
    whole = np.abs(values).sum()
    gini = 2 / (n * (n - 1)) * ((2 * np.arange(1, n + 1) - n - 1) @ values)
    shuffled = gini * (height * (width - 1) + width * (height - 1))
    return total_variation(scores) * whole / shuffled if shuffled > 1e-12 * whole else float("nan")


def agree_at_lag(line: np.ndarray, lag: int) -> float:
    """Mean r(m_t, m_{t+lag}) over the maps (T, h, w) of inputs at equal steps on a line: 0 if nothing stays, 1 if all.

    Unlike ``autocorrelate`` it counts what does not change along the line, which is what a map should be of.
    """
    return float(np.mean([correlate(line[t], line[t + lag]) for t in range(len(line) - lag)]))


def autocorrelate(line: np.ndarray, lag: int) -> float:
    """Autocorrelation at a lag of maps (T, h, w) on a line, as Balduzzi et al. 2017 have it of gradients.

    With c_t = m_t less the mean over the line, of each pixel: (Σ_t c_t c_{t+lag} / (T - lag)) / (Σ_t c_t² / T), both
    summed over pixels.  White noise: -1 / (T - 1), for the mean is taken away; Brownian motion falls slowly.
    """
    centred = line.reshape(len(line), -1).astype(np.float64)
    centred = centred - centred.mean(0)
    together = (centred[: len(line) - lag] * centred[lag:]).sum() / (len(line) - lag)
    whole = (centred**2).sum() / len(line)
    return float(together / whole) if whole else float("nan")


def agree_when_shifted(scores: np.ndarray, shifted: np.ndarray) -> float:
    """r of a map with that of the picture moved one pixel to the left, where both show the same."""
    return correlate(scores[:, 1:], shifted[:, :-1])


def bootstrap(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean over pictures, and the 95 % percentile interval of 2,000 resamples; pictures without a value left out."""
    values = values[np.isfinite(values)]
    if not len(values):
        return (float("nan"),) * 3
    means = values[np.random.default_rng(seed).integers(0, len(values), (2000, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


# ---- networks --------------------------------------------------------------------------------------------------------


@dataclass
class Network:
    """A model and how it wants its pictures: ``prepare`` turns (n, 3, h, w) in 0..1 into its input."""

    name: str
    model: nn.Module
    size: int
    trained: bool
    prepare: Callable[[Tensor], Tensor]
    cifar: bool = False
    pre_activation: str = "switch"  # how the presets take batch norm, ReLU, convolution in this order

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        ends = torch.stack([self.prepare(torch.full((1, 3, 1, 1), value))[0] for value in (0.0, 1.0)])
        return ends.amin(0), ends.amax(0)


def _normalise(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (x - mean) / std


def _as_caffe(x: Tensor) -> Tensor:
    return 255 * x.flip(1) - torch.tensor([104.0, 117.0, 123.0]).view(1, 3, 1, 1)


def make_networks(pictures: Callable[[int], Tensor]) -> Iterator[Network]:
    """One after the other; ``pictures``: real ones of that side, for the batch norms of those with random weights."""
    models = import_torchvision().models
    yield Network("SqueezeNet 1.1", load_squeezenet(), 227, True, _as_caffe)
    for depth in (20, 32, 56):
        torch.manual_seed(0)
        fresh = ResNet((depth - 2) // 6)
        yield Network(f"ResNet-{depth}", load_resnet(depth), 32, True, _normalise, cifar=True)
        if depth != 32:
            yield Network(
                f"ResNet-{depth}, untrained", calibrate(fresh, _normalise(pictures(32))), 32, False, _normalise, True
            )
    more = {"inception_v3": {"init_weights": False}}
    for name, function, size in (
        ("VGG-16", "vgg16", 128), ("Inception v3", "inception_v3", 128),
        ("ResNet-50", "resnet50", 128), ("DenseNet-121", "densenet121", 128),
    ):  # fmt: skip
        torch.manual_seed(0)
        model = calibrate(getattr(models, function)(weights=None, **more.get(function, {})), _normalise(pictures(size)))
        yield Network(name, model, size, False, _normalise)
    for form in ("threshold", "diagonal"):
        yield Network(f"{name}, {form}", model, size, False, _normalise, pre_activation=form)


def calibrate(model: nn.Module, x: Tensor) -> nn.Module:
    """The model with means and variances of ``x`` in its batch norms, as one pass in training mode has them."""
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        model(x)
    return model.eval()


def read_pictures(side: int, count: int, cifar: bool = False) -> Tensor:
    """(count, 3, side, side) in 0..1, drawn by lot: ImageNet's, or CIFAR-10's test pictures."""
    folder, name = (
        ("cifar10", "cifar10_test_jpg_200_per_class") if cifar else ("imagenet-sample-images", "imagenet_1000x1_256")
    )
    with zipfile.ZipFile(DATA / folder / f"{name}.zip") as archive:
        names = sorted(n for n in archive.namelist() if n.lower().endswith((".jpg", ".jpeg")))
        chosen = np.random.default_rng(0).choice(len(names), count, replace=False)
        return torch.stack([fit(Image.open(io.BytesIO(archive.read(names[i]))), side) for i in chosen])


def fit(picture: Image.Image, side: int) -> Tensor:
    """The centre of a picture as (3, side, side) in 0..1; a larger one is made 256/227 times as long first."""
    picture = picture.convert("RGB")
    short = side if min(picture.size) <= side else round(side * 256 / 227)
    scale = short / min(picture.size)
    picture = picture.resize([max(side, round(length * scale)) for length in picture.size], Image.Resampling.BICUBIC)
    left, top = ((length - side) // 2 for length in picture.size)
    values = np.asarray(picture.crop((left, top, left + side, top + side)), np.float32) / 255
    return torch.from_numpy(values).permute(2, 0, 1)


# ---- methods ---------------------------------------------------------------------------------------------------------

PRESETS = ("epsilon", "epsilon-plus", "epsilon-alpha2-beta1", "epsilon-gamma-box")
METHODS = ("gradient", "gradient × input", *PRESETS)
CONTROLS = ("shuffled", "centre Gaussian", "blurred noise")


def explain(network: Network, x: Tensor, target: Tensor, batch: int) -> dict[str, np.ndarray]:
    """Maps (n, h, w) of the score of each ``target`` by each method, channels summed."""
    presets = {}
    for name in PRESETS:
        rules = preset(name) if name == "epsilon" else replace(preset(name), pre_activation=network.pre_activation)
        presets[name] = LRP(network.model, rules, bounds=network.bounds if "box" in name else None)
    maps: dict[str, list[Tensor]] = {name: [] for name in METHODS}
    for part, wanted in zip(x.split(batch), target.split(batch), strict=True):
        source = part.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(network.model(source).gather(1, wanted[:, None]).sum(), source)
        maps["gradient"].append(gradient.sum(1))
        maps["gradient × input"].append((gradient * part).sum(1))
        for name, lrp in presets.items():
            maps[name].append(lrp(part, wanted).scores.sum(1))
    return {name: torch.cat(parts).numpy() for name, parts in maps.items()}


def make_controls(like: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Maps (n, h, w) that know nothing of the network: the values of ``like`` shuffled; the centre; blurred noise."""
    from scipy.ndimage import gaussian_filter

    n, height, width = like.shape
    y, x = (np.arange(side) - (side - 1) / 2 for side in (height, width))
    centre = np.exp(-(y[:, None] ** 2 + x**2) / (2 * (height / 4) ** 2))
    noise = rng.standard_normal(like.shape)
    return {
        "shuffled": rng.permuted(like.reshape(n, -1), axis=1).reshape(like.shape),
        "centre Gaussian": np.broadcast_to(centre, like.shape),
        "blurred noise": np.stack([gaussian_filter(one, height / 32) for one in noise]),
    }


# ---- measuring -------------------------------------------------------------------------------------------------------

Row = dict[str, object]


def measure(network: Network, count: int, batch: int) -> list[Row]:
    """Small steps towards another picture, and one pixel to the side; over ``count`` pictures."""
    x = network.prepare(read_pictures(network.size, count, network.cifar))
    shares = PART * torch.arange(STEPS).view(1, -1, 1, 1, 1)
    line = x[:, None] + shares * (x.roll(1, 0) - x)[:, None]
    shifted = torch.cat([x[..., 1:], x[..., -1:]], -1)
    everything = torch.cat([line, shifted[:, None]], 1)
    with torch.no_grad():
        scores = torch.cat([network.model(part) for part in line.flatten(0, 1).split(batch)]).view(count, STEPS, -1)
    target = scores[:, 0].argmax(1)
    change = scores.gather(2, target.view(-1, 1, 1).expand(-1, STEPS, 1))[..., 0].diff(dim=1).abs().mean(1)
    spread = scores[:, 0].std(1)
    maps = explain(network, everything.flatten(0, 1), target.repeat_interleave(STEPS + 1), batch)
    same = [LRP(network.model, name)(x[:1], target[:1]).scores for name in ("auto", "epsilon-plus")]
    if not torch.equal(*same):
        raise SystemExit(f"{network.name}: preset auto is no longer epsilon-plus; give it a row of its own")
    maps |= make_controls(maps["epsilon-plus"], np.random.default_rng(0))
    rows = [_row(network, "score", "change by a step", (change / spread).numpy())]
    for method, values in maps.items():
        values = values.reshape(count, STEPS + 1, *values.shape[1:])
        whole = values[:, :STEPS]
        rows += [
            _row(network, method, "neighbours", np.array([correlate_neighbours(one[0]) for one in values])),
            _row(network, method, "variation", np.array([relative_variation(one[0]) for one in values])),
            *(
                _row(network, method, f"step {lag}", np.array([agree_at_lag(one, lag) for one in whole]))
                for lag in LAGS
            ),
            _row(network, method, "shift", np.array([agree_when_shifted(one[0], one[-1]) for one in values])),
        ]
    return rows


def measure_lines(network: Network, batch: int) -> list[Row]:
    """The whole way from a picture to another, as Balduzzi et al. walk it."""
    ends = network.prepare(read_pictures(network.size, 2 * LINES, network.cifar)).view(LINES, 2, 3, network.size, -1)
    shares = torch.linspace(0, 1, POINTS).view(1, -1, 1, 1, 1)
    line = ends[:, :1] + shares * (ends[:, 1:] - ends[:, :1])
    with torch.no_grad():
        target = network.model(ends[:, 0]).argmax(1)
    maps = explain(network, line.flatten(0, 1), target.repeat_interleave(POINTS), batch)
    maps["shuffled"] = make_controls(maps["epsilon-plus"], np.random.default_rng(0))["shuffled"]
    rows = []
    for method, values in maps.items():
        lines = values.reshape(LINES, POINTS, *values.shape[1:])
        rows += [
            _row(network, method, f"line {lag}", np.array([autocorrelate(one, lag) for one in lines])) for lag in LAGS
        ]
    return rows


def _row(network: Network, method: str, measure: str, values: np.ndarray) -> Row:
    mean, low, high = bootstrap(values)
    return {
        "network": network.name, "weights": "trained" if network.trained else "random", "pixels": network.size,
        "method": method, "measure": measure, "mean": f"{mean:.4f}", "low": f"{low:.4f}", "high": f"{high:.4f}",
        "pictures": int(np.isfinite(values).sum()),
    }  # fmt: skip


# ---- telling ---------------------------------------------------------------------------------------------------------

TITLES = {
    "neighbours": "Correlation of neighbouring pixels (white noise 0, smooth 1)",
    "variation": "Total variation over that of the same values shuffled (white noise 1, smooth 0)",
    "step 1": "Correlation of the maps before and after a step of 1/64 of the way to another picture",
    "shift": "Correlation with the map of the picture moved by one pixel, moved back",
    "line 1": "Autocorrelation along the whole way to another picture at a lag of 1/32 of it, after Balduzzi et al.",
}


def write_tables(rows: list[dict[str, str]]) -> str:
    """The tables of the guide: a measure each, methods by networks, mean ± half the 95 % interval."""
    found = {(row["measure"], row["method"], row["network"]): row for row in rows}
    tables = []
    for measure_, title in TITLES.items():
        names = list(dict.fromkeys(row["network"] for row in rows if row["measure"] == measure_))
        if measure_ != "line 1":
            names = [name for name in names if not name.endswith("untrained")]
        methods = [one for one in (*METHODS, *CONTROLS) if (measure_, one, names[0]) in found]
        lines = [f"**{title}**", "", f"| | {' | '.join(names)} |", f"|---{'|---:' * len(names)}|"]
        for method in methods:
            cells = [_cell(found[measure_, method, name]) for name in names]
            lines.append(f"| {method}{' (`auto`)' * (method == 'epsilon-plus')} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _cell(row: dict[str, str]) -> str:
    mean, half = float(row["mean"]), (float(row["high"]) - float(row["low"])) / 2
    return f"{round(mean, 2) + 0.0:.2f} ± {half:.2f}"  # + 0.0: no "-0.00"


# Networks and pictures of the grid: of open-licensed-images, CC BY 2.0, named in the guide.
SHOWN = {
    "SqueezeNet 1.1": ("cat.png", "parrot.jpg"), "ResNet-56": ("cat.png",), "VGG-16": ("cat.png",),
    "Inception v3": ("cat.png",), "ResNet-50": ("cat.png",), "DenseNet-121": ("cat.png",),
    "DenseNet-121, threshold": ("cat.png",), "DenseNet-121, diagonal": ("cat.png",),
}  # fmt: skip


def draw_strips(network: Network) -> list[tuple[str, list[np.ndarray]]]:
    """Rows of the grid: what it is of, and the picture and its maps as colours, each map with its own scale."""
    strips = []
    for name in SHOWN.get(network.name, ()):
        picture = fit(Image.open(DATA / "open-licensed-images" / name), network.size)
        x = network.prepare(picture[None])
        with torch.no_grad():
            target = network.model(x).argmax(1)
        maps = explain(network, x, target, 1)
        shown = [(255 * picture.permute(1, 2, 0)).round().to(torch.uint8).numpy()]
        shown += [
            heatmaps.color(maps[m][0], heatmaps.common_scale([maps[m][0]], 0.995)) for m in METHODS if m != "epsilon"
        ]
        strips.append(
            (f"{network.name.replace(', ', chr(10))}\n{'trained' if network.trained else 'random weights'}", shown)
        )
    return strips


def draw_grid(strips: list[tuple[str, list[np.ndarray]]], side: int = 128) -> Image.Image:
    """The rows below each other, with titles."""
    titles = ["picture", *(m for m in METHODS if m != "epsilon")]
    left, top, gap = 118, 40, 6
    size = left + (side + gap) * len(titles), top + (side + gap) * len(strips)
    page = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=13)
    for j, title in enumerate(titles):
        words = (
            title.replace("×", "x")
            .replace("epsilon-alpha2-beta1", "epsilon-\nalpha2-beta1")
            .replace("epsilon-gamma", "epsilon-\ngamma")
        )
        pen.multiline_text((left + (side + gap) * j, 4), words, "black", font, spacing=1)
    for i, (label, shown) in enumerate(strips):
        y = top + (side + gap) * i
        pen.multiline_text((4, y + side // 2 - 16), label, "black", font)
        for j, picture in enumerate(shown):
            resample = Image.Resampling.NEAREST if len(picture) < side else Image.Resampling.LANCZOS
            page.paste(Image.fromarray(picture).resize((side, side), resample), (left + (side + gap) * j, y))
    return page


def main() -> None:
    """Measure, and write results, tables and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16, help="inputs at once")
    parser.add_argument("--only", nargs="*", help="networks, by name; the rows of others are kept")
    parser.add_argument("--tables", action="store_true", help="write the tables of the stored results, measure nothing")
    arguments = parser.parse_args()
    if not arguments.tables:
        torch.set_num_threads(1)
        start, rows, strips = time.perf_counter(), [], []
        before = list(csv.DictReader(RESULTS.open(newline=""))) if arguments.only else []
        for network in make_networks(lambda side: read_pictures(side, 16, side == 32)):
            strips += draw_strips(network)
            if arguments.only and network.name not in arguments.only:
                rows += [row for row in before if row["network"] == network.name]
                continue
            if not network.name.endswith("untrained"):
                rows += measure(network, arguments.pictures, arguments.batch)
            if network.cifar:
                rows += measure_lines(network, arguments.batch)
            print(f"{network.name}: {time.perf_counter() - start:.0f} s on {hardware('cpu')}", flush=True)
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        draw_grid(strips).save(GRID, quality=88, subsampling=0, optimize=True)
    with RESULTS.open(newline="") as file:
        tables = write_tables(list(csv.DictReader(file)))
    GUIDE.write_text(replace_between(GUIDE.read_text(), "tables of benchmarks/shattering.py", tables))


if __name__ == "__main__":
    main()
