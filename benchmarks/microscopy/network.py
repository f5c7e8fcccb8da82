"""The patch classifier: a small convolutional network with batch norm, trained from scratch in minutes on one core.

The last layer is dense over the 6 x 6 places of the last convolution, so that the network can know where in the patch
something is, as the one with a bias to the centre must.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from patches import SIZE
from torch import Tensor, nn
from torch.nn import functional

from pfungst.domains.preprocessing import Preprocess

MEAN, STD = (0.75, 0.65, 0.77), (0.2, 0.2, 0.2)
PREPROCESS = Preprocess(size=(SIZE, SIZE), mean=MEAN, std=STD)
BATCH = 48
STEPS = 500
RATE = 3e-3
CLASS = 1  # the output that is explained: the class is there

Draw = Callable[[int, np.random.Generator], tuple[np.ndarray, np.ndarray]]


class PatchNet(nn.Module):
    """Seven convolutions with batch norm and three max pools: 48 x 48 pixels, 6 x 6 places, two classes."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = (3, 16, 16, 24, 32, 32, 48, 48)
        for i, (before, after) in enumerate(itertools.pairwise(channels)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if i in (1, 3, 5) else []
        self.features = nn.Sequential(*layers)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(channels[-1] * (SIZE // 8) ** 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.features(x).flatten(1)))


def to_inputs(patches: np.ndarray) -> Tensor:
    """Patches (n, H, W, 3) uint8 as ``PREPROCESS`` makes them, (n, 3, H, W)."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (torch.from_numpy(np.array(patches)).permute(0, 3, 1, 2).float() / 255 - mean) / std


def input_bounds() -> tuple[Tensor, Tensor]:
    """Smallest and greatest input, each (3, 1, 1)."""
    return to_inputs(np.zeros((1, 1, 1, 3), np.uint8))[0], to_inputs(np.full((1, 1, 1, 3), 255, np.uint8))[0]


def train(draw: Draw, name: str, seed: int = 0, steps: int = STEPS, keep: Path | None = None,
          jitter: bool = True) -> PatchNet:  # fmt: skip
    """A trained network in eval mode.

    draw    gives a batch: how many and a generator -> patches (n, SIZE, SIZE, 3) uint8, labels (n,)
    name    of what is trained; with the seed and the number of steps it is the name of the file in ``keep``
    keep    a folder: a network that is there is read instead of trained, one that is not is written
    jitter  flips, quarter turns and changes of colour
    """
    torch.set_num_threads(1)  # the same sums, however many cores there are
    code = hashlib.sha256(Path(__file__).read_bytes() + Path(__file__).with_name("patches.py").read_bytes())
    file = None if keep is None else keep / f"{name}_{seed}_{steps}_{code.hexdigest()[:8]}.pt"
    torch.manual_seed(seed)
    model = PatchNet()
    if file is not None and file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    rng = np.random.default_rng([seed, 1])
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    for _ in range(steps):
        patches, labels = draw(BATCH, rng)
        x = to_inputs(patches)
        x = _vary(x, rng) if jitter else x
        loss = functional.cross_entropy(model(x), torch.from_numpy(labels), label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)
    return model.eval()


def _vary(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Each patch mirrored and turned at random, its channels scaled and shifted a little."""
    turned = [torch.rot90(one if rng.random() < 0.5 else one.flip(2), int(rng.integers(4)), (1, 2)) for one in x]
    gain = torch.from_numpy(rng.uniform(0.85, 1.15, (len(x), 3, 1, 1))).float()
    shift = torch.from_numpy(rng.normal(0, 0.15, (len(x), 3, 1, 1))).float()
    return torch.stack(turned) * gain + shift


@torch.no_grad()
def probabilities(model: nn.Module, patches: np.ndarray) -> np.ndarray:
    """The class's probability for each patch, (n,)."""
    parts = [model(to_inputs(patches[i : i + 128])).softmax(1)[:, CLASS] for i in range(0, len(patches), 128)]
    return torch.cat(parts).numpy()


def accuracy(model: nn.Module, patches: np.ndarray, labels: np.ndarray) -> float:
    """Share of patches whose class is recognised."""
    return float(((probabilities(model, patches) > 0.5) == labels).mean())
