"""The two networks of the benchmark, and their training: seconds on a GPU, a minute or two on a processor core.

Training makes cues worth learning, or a cue in 2 % of a class would hardly ever be used: every class comes equally
often, and beside each picture there are some whose content is mixed with that of any other picture, as mixup does it,
but with the class of the first and with its cue, if it has one, whole.  So the content is often worth little, and
whatever else tells the class counts.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from pfungst.domains.preprocessing import Preprocess

SIZE = 64
PREPROCESS = Preprocess(size=(SIZE, SIZE), mean=(0.5,) * 3, std=(0.5,) * 3)
BATCH = 64


class ConvNet(nn.Module):
    """Four convolutions with batch norm, the first of stride 2, global average pooling and a dense layer."""

    steps, rate = 2000, 4e-3

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = (3, 24, 32, 64, 96)
        for i, (before, after) in enumerate(itertools.pairwise(channels)):
            side, stride = (5, 2) if i == 0 else (3, 1)
            layers += [nn.Conv2d(before, after, side, stride, side // 2, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if i in (0, 2) else []
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels[-1], classes)

    def embed(self, x: Tensor) -> Tensor:
        """The features before the last layer, (n, 96)."""
        return self.features(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


class Block(nn.Module):
    """Attention and a small network, each after a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Patches of 8 x 8, four blocks of width 96, mean over the patches."""

    steps, rate = 3000, 1e-3

    def __init__(self, classes: int, width: int = 96) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.position = nn.Parameter(torch.randn(1, (SIZE // 8) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(4)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def embed(self, x: Tensor) -> Tensor:
        """The features before the last layer, (n, width)."""
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.norm(self.blocks(x)).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


NETWORKS: dict[str, type[ConvNet] | type[ViT]] = {"cnn": ConvNet, "vit": ViT}


def mix_contents(pictures: np.ndarray, variants: int, rng: np.random.Generator) -> np.ndarray:
    """(variants, n, 64, 64, 3): each picture under another one that covers 50 to 95 % of it."""
    n = len(pictures)
    mixed = np.empty((variants, *pictures.shape), np.uint8)
    for i in range(variants):
        share = rng.uniform(0.5, 0.95, (n, 1, 1, 1)).astype(np.float32)
        mixed[i] = pictures * (1 - share) + pictures[rng.permutation(n)] * share
    return mixed


def train(network: str, pictures: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], device: str, seed: int,
          steps: int | None = None) -> list[ConvNet | ViT]:  # fmt: skip
    """Networks in eval mode on ``device``, with preprocessing and class names: one for each set of pictures.

    pictures, labels   (sets, n, 64, 64, 3) uint8, (n,): sets that differ in the cue that was planted

    They are trained side by side, as many networks in one pass, for a small network alone leaves most of a GPU idle.
    All begin with the same weights and see the same rows in the same order, so that each is what it would be alone.
    """
    torch.manual_seed(seed)
    model = NETWORKS[network](len(classes))
    steps = steps or model.steps
    targets = torch.from_numpy(labels)
    weights = 1 / torch.bincount(targets).float()[targets]
    batches = torch.multinomial(weights, steps * BATCH, replacement=True).reshape(steps, BATCH)
    shifts = torch.randint(-2, 3, (steps, 2)).tolist()
    models = [copy.deepcopy(model).to(device) for _ in pictures]
    state, buffers = torch.func.stack_module_state(models)  # type: ignore[arg-type]
    inputs, targets, batches = torch.from_numpy(pictures).to(device), targets.to(device), batches.to(device)
    optimiser = torch.optim.AdamW(state.values(), lr=model.rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, model.rate, total_steps=steps)
    for rows, (dy, dx) in zip(batches, shifts, strict=True):
        x = _scale(inputs[:, rows]).roll((dy, dx), (3, 4))
        optimiser.zero_grad()
        _losses(models[0], state, buffers, x, targets[rows]).sum().backward()
        optimiser.step()
        schedule.step()
    for i, trained in enumerate(models):
        trained.load_state_dict({name: value[i].detach() for name, value in (state | buffers).items()})
    return [_finish(trained, classes) for trained in models]


def _losses(model: nn.Module, state: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The loss of each network on its own pictures, (sets,)."""

    def loss_of(state: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, (state, buffers), (x,))
        return functional.cross_entropy(logits, y, label_smoothing=0.05)

    if len(x) == 1:  # a sixth faster than vmap of one, which cannot use the fused attention
        first = ({name: value[0] for name, value in tensors.items()} for tensors in (state, buffers))
        return loss_of(*first, x[0])
    with sdpa_kernel(SDPBackend.MATH):  # the fused ones are not made for many networks in one pass
        return torch.func.vmap(loss_of)(state, buffers, x)


def read_network(network: str, path: Path, classes: tuple[str, ...], device: str) -> ConvNet | ViT:
    """A trained network from the file of its weights, which may be kept in half precision."""
    model = NETWORKS[network](len(classes))
    model.load_state_dict(load_file(path))
    return _finish(model.to(device), classes)


def write_network(model: ConvNet | ViT, path: Path) -> None:
    """The network's weights; the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({name: value.contiguous().cpu() for name, value in model.state_dict().items()}, part)
    part.replace(path)


def _finish(model: ConvNet | ViT, classes: tuple[str, ...]) -> ConvNet | ViT:
    model.preprocess, model.classes = PREPROCESS, list(classes)  # type: ignore[assignment]
    return model.eval()


def _scale(pictures: Tensor) -> Tensor:
    """(..., 64, 64, 3) uint8 -> (..., 3, 64, 64) in -1..1, as ``PREPROCESS`` does it."""
    return pictures.movedim(-1, -3).float() / 127.5 - 1


def to_inputs(pictures: np.ndarray, device: str = "cpu") -> Tensor:
    """Pictures (n, 64, 64, 3) uint8 as the networks take them, (n, 3, 64, 64)."""
    return _scale(torch.from_numpy(pictures).to(device))


@torch.no_grad()
def ask(model: ConvNet | ViT, pictures: np.ndarray, device: str, embed: bool = False) -> Tensor:
    """Logits (n, classes), or the features before the last layer, on the processor."""
    call = model.embed if embed else model
    parts = [call(to_inputs(pictures[i : i + 256], device)).cpu() for i in range(0, len(pictures), 256)]
    return torch.cat(parts)
