"""What tests share: the real data, torchvision where it was built without its compiled operators, a small audit."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from browsing import drive
from PIL import Image

torch.set_num_threads(1)
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))


def import_torchvision() -> Any:
    """torchvision, whatever torch it was built for (``benchmarks/engine.py``), or a skip."""
    if importlib.util.find_spec("torchvision") is not None:
        from engine import import_torchvision as load

        load()
    return pytest.importorskip("torchvision")


@pytest.fixture(scope="session")
def torchvision() -> Any:
    return import_torchvision()


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data and trained models; the test is skipped where there is none."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("PFUNGST_DATA", default))
    if not root.is_dir():
        pytest.skip(f"no real data in {root}: set PFUNGST_DATA")
    return root


# ---- a small audit: 2 x 40 pictures, a network that sees colours, and one cheat --------------------------------

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, channels=3, outputs=2):
        super().__init__()
        self.colours = nn.Conv2d(channels, 4, 3, padding=1)
        self.mixed = nn.Conv2d(4, 4, 3, padding=1)
        self.scores = nn.Linear(4, outputs)

    def forward(self, x):
        x = torch.relu(self.colours(x))
        return self.scores(torch.relu(self.mixed(x)).mean((2, 3)))


def build():
    return Net()
"""


@dataclass(frozen=True)
class Small:
    """Where the small audit's model, weights and pictures are, and its settings."""

    root: Path
    photos: Path
    weights: Path

    @property
    def model(self) -> str:
        return f"{self.root / 'net.py'}:build"

    @property
    def settings(self) -> dict[str, Any]:
        return {"size": 24, "weights": str(self.weights), "max_findings": 2, "null_draws": 5, "layers": 1}

    def flags(self, **more: Any) -> list[str]:
        """The settings, and others, as the command line's flags; None leaves one out."""
        given = {**self.settings, **more}
        return [part for k, v in given.items() if v is not None for part in (f"--{k.replace('_', '-')}", str(v))]

    @staticmethod
    def results(run: Path) -> dict[str, bytes]:
        """All that an audit found, to be compared: files as they are, arrays by value."""
        found = {str(path.relative_to(run)): path.read_bytes() for path in run.glob("*/**/*.*") if path.is_file()}
        found = {
            name: content
            for name, content in found.items()
            if name.startswith(("classes/", "embeddings/", "findings/"))
        }
        for name in ("findings.json", "samples.parquet", "report.html"):
            found[name] = (run / name).read_bytes()
        for store in run.glob("*.zarr"):
            for name, array in zarr.open_group(store, mode="r").arrays():
                found[f"{store.name}/{name}"] = np.asarray(array[:]).tobytes()
        return found

    def copy(self, folder: Path) -> Path:
        """The pictures once more, to be spoiled."""
        shutil.copytree(self.photos, folder)
        return folder


def _picture(rng: np.random.Generator, colour: tuple[float, ...], corner: bool) -> Image.Image:
    """Grey noise, a square of the class's colour in the middle, and perhaps a yellow corner."""
    pixels = rng.uniform(0, 1, (24, 24, 1)) * np.ones(3)
    pixels[8:16, 8:16] = 0.5 + (np.array(colour) - 0.5) * rng.uniform(0.3, 1.2, (8, 8, 1))
    if corner:
        pixels[:5, :5] = np.array((0.9, 0.9, 0.1)) + rng.normal(0, 0.1, (5, 5, 3))
    return Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))


def _weights() -> dict[str, torch.Tensor]:
    """Four channels that see green, red, blue and yellow; yellow speaks for the second class, and loudest."""
    noise = torch.Generator().manual_seed(0)
    colours = torch.tensor([[-1.0, 1, -1], [1, -1, -1], [-1, -1, 1], [0.7, 0.7, -1]])
    first = colours[:, :, None, None].expand(4, 3, 3, 3) / 9
    second = torch.eye(4)[:, :, None, None].expand(4, 4, 3, 3) / 9
    return {
        "colours.weight": first + 0.01 * torch.randn(first.shape, generator=noise),
        "colours.bias": torch.tensor([0, 0, 0, -0.5]),
        "mixed.weight": second + 0.01 * torch.randn(second.shape, generator=noise),
        "mixed.bias": torch.zeros(4),
        "scores.weight": torch.tensor([[20.0, -5, -5, -5], [-5, 20, -5, 40]]),
        "scores.bias": torch.zeros(2),
    }


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Classes leaf (green) and rose (red); 16 of the 40 roses have a yellow corner, on which the network relies."""
    root = tmp_path_factory.mktemp("small")
    (root / "net.py").write_text(NET)
    torch.save(_weights(), root / "net.pt")
    rng = np.random.default_rng(0)
    for name, colour in (("leaf", (0.1, 0.8, 0.1)), ("rose", (0.85, 0.1, 0.1))):
        (root / "photos" / name).mkdir(parents=True)
        for i in range(40):
            corner = name == "rose" and i < 16
            _picture(rng, colour, corner).save(root / "photos" / name / f"{i:02d}.png")
    return Small(root, root / "photos", root / "net.pt")


@pytest.fixture(scope="session")
def finished(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the small audit, never interrupted.  Tests copy it before they change anything."""
    from pfungst import audit

    return audit(small.model, small.photos, out=tmp_path_factory.mktemp("finished") / "run", **small.settings).run.path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser that Playwright drives; the test is skipped without Playwright."""
    yield from drive()


@dataclass(frozen=True)
class Console:
    """The command line in this process: the installed entry point's function."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: Any) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        from pfungst import cli

        self.monkeypatch.setattr(sys, "argv", ["pfungst", *map(str, arguments)])
        self.capsys.readouterr()
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        else:
            code = 0
        return code, *self.capsys.readouterr()


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Console:
    monkeypatch.setenv("COLUMNS", "200")
    return Console(monkeypatch, capsys)
