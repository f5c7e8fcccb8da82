"""Relevance by LXT, in a process of its own: LXT replaces methods of torch's classes for good.

    python reference_lxt.py OUT.npz

Only LXT's patches and rules are loaded, past its package's head, which imports language models that other versions of
transformers lack.  For nn.MultiheadAttention LXT itself ships attention as a constant; its AttnLRP wrapper for
attention functions is put around torch's here.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import import_torchvision
from torch import Tensor, nn
from torch.nn import functional as F

TARGET = 3
GAMMAS = {"convolution": 0.25, "dense": 0.05}


def vit() -> nn.Module:
    """A small vision transformer of torchvision with random weights, in float64."""
    import_torchvision()
    from torchvision.models.vision_transformer import VisionTransformer

    model = VisionTransformer(16, 4, num_layers=3, num_heads=2, hidden_dim=12, mlp_dim=20, num_classes=5)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        spread = 1.0 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
        values = spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = values + ("ln" in name and name.endswith("weight"))
    return model.double().eval()


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Pooling(nn.Module):
    """Attention pooling: a learnt query, keys and values from the input."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.query = nn.Parameter(torch.randn(1, 1, 1, 6, generator=generator, dtype=torch.float64))
        self.head = nn.Linear(6, 5, bias=False).double()
        self.head.weight.data = torch.randn(5, 6, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor, attend: Any = F.scaled_dot_product_attention) -> Tensor:
        """x (n, 1, tokens, 6)."""
        return self.head(attend(self.query.expand(len(x), 1, 1, 6), x, x).flatten(1))


def tokens() -> Tensor:
    return torch.randn(2, 1, 7, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def lxt_part(name: str) -> Any:
    """A module of LXT, without running the heads of the packages it lies in."""
    found = importlib.util.find_spec("lxt")
    assert found is not None
    assert found.submodule_search_locations
    root = Path(found.submodule_search_locations[0])
    for package in ("efficient", "efficient/models"):
        head = types.ModuleType("lxt." + package.replace("/", "."))
        head.__path__ = [str(root / package)]
        sys.modules.setdefault(head.__name__, head)
    return importlib.import_module(f"lxt.efficient.{name}")


def times_gradient(model: Any, x: Tensor) -> np.ndarray:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[:, TARGET].sum(), x)
    return (x * gradient).detach().numpy()


def main(out: str) -> None:
    results = {}
    import_torchvision()
    patches = lxt_part("patches")
    attend = patches.wrap_attention_forward(lambda module, q, k, v: F.scaled_dot_product_attention(q, k, v))
    results["pooling"] = times_gradient(lambda x: Pooling()(x, lambda *qkv: attend(None, *qkv)), tokens())
    from torchvision.models import vision_transformer

    model = vit()
    with torch.no_grad():
        results["output"] = model(images()).numpy()
    maps = lxt_part("models.vit_torch").cp_LRP
    for target, patch in maps.items():
        assert patch(target)
    results["cp-lrp"] = times_gradient(model, images())

    # With zennit's gamma rule for the layers that are modules, as in LXT's example of a vision transformer.
    from zennit.composites import LayerMapComposite
    from zennit.rules import Gamma

    lxt_part("zennit_patches").monkey_patch_zennit()
    layers = [(nn.Conv2d, Gamma(GAMMAS["convolution"])), (nn.Linear, Gamma(GAMMAS["dense"]))]
    composite = LayerMapComposite(layers)
    composite.register(model)
    results["cp-lrp-gamma"] = times_gradient(model, images())
    composite.remove()

    def attnlrp(self: Any, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, None]:
        n, length, width = query.shape
        qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(n, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = attend(None, q, k, v).transpose(1, 2).reshape(n, length, width)
        return F.linear(y, self.out_proj.weight, self.out_proj.bias), None

    vision_transformer.nn.MultiheadAttention.forward = attnlrp
    results["attnlrp"] = times_gradient(model, images())
    np.savez(out, **results)


if __name__ == "__main__":
    main(sys.argv[1])
