"""Programs of torch.export, as they are and decomposed into core ATen, are explained as the model itself is."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from test_against_others import randomised
from torch import Tensor, nn
from torch.nn import functional as F

from pfungst.lrp import LRP


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Gated(nn.Module):
    """A residual block with batch norms and a squeeze-and-excitation gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.second, self.short = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 1)
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x), inplace=True)
        y = self.norm2(self.second(F.relu(self.norm1(self.first(x)), inplace=True)))
        y = y * torch.sigmoid(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        y += self.norm3(self.short(x))
        return self.head(F.adaptive_avg_pool2d(F.relu_(y), 1).flatten(1))


class Windows(nn.Module):
    """Attention in shifted windows, as in Swin: roll, cut, attend with a position bias and a mask, put back."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.stem, self.norm = nn.Conv2d(3, 8, 2, stride=2), nn.LayerNorm(8)
        self.qkv, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 5)
        self.bias = nn.Parameter(torch.zeros(2, 4, 4))
        self.register_buffer("mask", torch.where(torch.arange(16).reshape(4, 4) % 5 == 3, -100.0, 0.0).double())

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).permute(0, 2, 3, 1)
        n, height, width, channels = h.shape
        y = torch.roll(self.norm(h), (-1, -1), (1, 2))
        y = y.view(n, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, channels)
        q, k, v = self.qkv(y).reshape(len(y), 4, 3, 2, channels // 2).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias + self.mask)
        else:
            scores = (q * (channels // 2) ** -0.5) @ k.transpose(-2, -1) + self.bias + self.mask
            y = scores.softmax(-1) @ v
        y = self.out(y.transpose(1, 2).reshape(-1, 4, channels))
        y = y.view(n, height // 2, width // 2, 2, 2, channels).permute(0, 1, 3, 2, 4, 5).reshape(h.shape)
        return self.head((h + torch.roll(y, (1, 1), (1, 2))).mean((1, 2)))


class Encoder(nn.Module):
    """Patches, a class token, one transformer encoder layer."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 8, 4, stride=4), nn.Parameter(torch.ones(1, 1, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu", norm_first=before)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.layer(torch.cat([self.token.expand(len(h), -1, -1), h], 1))[:, 0])


class PreActivated(nn.Module):
    """Batch norm, ReLU, convolution in this order, and concatenation, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grow = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.mix, self.head = nn.Conv2d(10, 6, 1), nn.Linear(6, 5)
        self.norm1, self.norm2, self.last = nn.BatchNorm2d(6), nn.BatchNorm2d(10), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.grow(self.norm1(x).relu_())], 1)
        x = F.avg_pool2d(self.mix(F.relu(self.norm2(x))), 2)
        return self.head(F.relu(self.last(x)).mean((2, 3)))


MODELS = {
    "residual block with a gate": Gated,
    "encoder layer, norm first": lambda: Encoder(True),
    "encoder layer, norm last": lambda: Encoder(False),
    "windows": lambda: Windows(False),
    "windows, fused attention": lambda: Windows(True),
    "pre-activation": PreActivated,
}
PRESETS = ("epsilon", "epsilon-plus", "epsilon-gamma-box", "attnlrp", "cp-lrp-gamma")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("decomposed", [False, True], ids=["exported", "decomposed"])
def test_exported_programs_are_explained_as_the_model(name: str, decomposed: bool) -> None:
    make: Any = MODELS[name]
    torch.manual_seed(0)
    x = drawn(2, 3, 8, 8)
    model = randomised(make(), x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (x,))
        program = program.run_decompositions() if decomposed else program
    for which in PRESETS:
        plain = LRP(model, which, bounds=(-6, 6))(x, 3)
        exported = LRP(program.module(), which, bounds=(-6, 6))(x, 3)
        torch.testing.assert_close(
            exported.scores, plain.scores, rtol=1e-9, atol=1e-12, msg=lambda t, w=which: f"{w}: {t}"
        )
        torch.testing.assert_close(exported.absorbed, plain.absorbed, rtol=1e-9, atol=1e-11)
        gap = plain.explained - plain.scores.flatten(1).sum(1) - plain.absorbed
        assert float(gap.abs().max()) < 1e-9 * float(plain.scores.abs().sum())


def test_a_vector_added_to_a_product_is_its_bias() -> None:
    linear = nn.Linear(6, 4).double()
    w, b = linear.weight.detach(), linear.bias.detach()
    v, x = drawn(4, 3, seed=2), drawn(2, 5, 6)
    forms = {
        "x @ w + b": lambda x: x @ w.T + b,
        "b + x @ w": lambda x: b + torch.einsum("nij,kj->nik", x, w),
        "+=": lambda x: torch.matmul(x, w.T).add_(b),
        "of a product that is used twice": lambda x: (z := x @ w.T, (z + b) + (z - z))[1],
    }
    for which in ("epsilon", "cp-lrp-gamma"):
        expected = LRP(lambda x: linear(x).mean(1).relu() @ v, which)(x, 1)
        for name, form in forms.items():
            ours = LRP(lambda x, f=form: f(x).mean(1).relu() @ v, which)(x, 1)
            torch.testing.assert_close(ours.scores, expected.scores, rtol=1e-9, atol=1e-12, msg=f"{which}: {name}")
            torch.testing.assert_close(ours.absorbed, expected.absorbed, rtol=1e-9, atol=1e-12)
