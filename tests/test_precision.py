"""Lower precision, autocast and memory formats: they work, and this is what each does to the numbers.

The bounds are what was measured with some room: cosine of the map with that of float64, and the ledger's gap.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import import_torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from pfungst.lrp import LRP

MODELS: dict[str, str] = {"resnet18": "epsilon-plus", "mobilenet_v3_small": "epsilon", "vit": "cp-lrp-gamma"}
KINDS = {
    # how: (type of model and input, type of autocast, channels last) -> least cosine, greatest gap of the ledger
    "float32": (torch.float32, None, False, 0.99999, 1e-5),
    "channels last": (torch.float32, None, True, 0.99999, 1e-5),
    "bfloat16": (torch.bfloat16, None, False, 0.98, 0.03),
    "float16": (torch.float16, None, False, 0.99, 0.03),
    "autocast to bfloat16": (torch.float32, torch.bfloat16, False, 0.98, 0.03),
    "autocast to float16": (torch.float32, torch.float16, False, 0.99, 0.03),
}


def built(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    models = import_torchvision().models
    x = torch.randn(2, 3, 64, 64)
    if name == "vit":
        model = models.VisionTransformer(64, 16, 2, 4, 48, 96, num_classes=5)
        nn.init.normal_(model.heads.head.weight)  # torchvision's start is zero
        return model.eval(), x
    model = getattr(models, name)(weights=None, num_classes=5)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.cat([x, x.flip(3) / 2]))
    return model.eval(), x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_numbers(name: str, kind: str) -> None:
    dtype, cast, last, cosine, gap = KINDS[kind]
    model, x = built(name)
    exact = LRP(model.double(), MODELS[name])(x.double())
    model = model.to(dtype)
    x = x.to(dtype)
    if last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)  # type: ignore
    inside: Callable[[], Any] = nullcontext if cast is None else lambda: torch.autocast("cpu", cast)
    with inside():
        result = LRP(model, MODELS[name])(x, exact.target)
        plain = model(x.clone().requires_grad_()).detach()  # without, torch fuses attention, which rounds otherwise
    tolerance = torch.finfo(cast or dtype).eps * 4
    torch.testing.assert_close(result.output, plain, rtol=tolerance, atol=tolerance)
    assert result.scores.dtype == dtype
    assert result.absorbed.dtype == torch.float64
    scores = result.scores.double().flatten(1)
    found = float(F.cosine_similarity(scores, exact.scores.flatten(1)).min())
    f = result.explained.double()
    scale = scores.abs().sum(1).maximum(f.abs())
    open_part = float(((f - scores.sum(1) - result.absorbed).abs() / scale).max())
    print(f"{name}, {kind}: cosine {found:.5f}, gap {open_part:.1e}")
    assert found > cosine
    assert open_part < gap


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", MODELS)
def test_cuda(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # else convolutions have ten bits
    model, x = built(name)
    exact = LRP(model, MODELS[name])(x, 1)
    result = LRP(model.cuda(), MODELS[name])(x.cuda(), 1)
    assert result.scores.is_cuda
    assert float(F.cosine_similarity(result.scores.cpu().flatten(1), exact.scores.flatten(1)).min()) > 0.9999
