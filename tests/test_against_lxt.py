"""Relevance of transformers against LXT 2.1 (Achtibat et al.), which runs in a process of its own.

LXT's is gradient times input: ours with ε = 0.  Its activation functions divide by x + 1e-10, so last digits differ.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference_lxt import GAMMAS, TARGET, Pooling, images, tokens, vit
from test_against_others import relative
from torch import Tensor

from pfungst.lrp import LRP, Preset, Row
from pfungst.lrp.presets import attnlrp, cp_lrp
from pfungst.lrp.rules import Epsilon, Gamma

# LXT's recipe for vision transformers leaves the projections inside nn.MultiheadAttention, which are no modules that
# zennit sees, without γ.
CP_GAMMA = Preset(
    "cp-gamma of LXT",
    (
        Row(Epsilon(0.0), name="*self_attention"),
        Row(Epsilon(0.0), name="*self_attention.out_proj"),
        Row(Gamma(GAMMAS["convolution"]), "convolution"),
        Row(Gamma(GAMMAS["dense"]), "dense"),
    ),
    gates="all",
    attention="constant",
)


@pytest.fixture(scope="module")
def lxt(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    for name in ("lxt", "zennit", "torchvision"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install --no-deps -r requirements-compare.txt")
    out = tmp_path_factory.mktemp("lxt") / "relevance.npz"
    script = Path(__file__).with_name("reference_lxt.py")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, str(script), str(out)], check=True, env=env)
    with np.load(out) as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored}


@pytest.mark.parametrize(
    ("name", "which", "bound"),
    [("attnlrp", attnlrp(0.0), 1e-8), ("cp-lrp", cp_lrp(0.0), 1e-8), ("cp-lrp-gamma", CP_GAMMA, 1e-5)],
)
def test_vision_transformer(lxt: dict[str, Tensor], name: str, which: Any, bound: float) -> None:
    """zennit's stabilisers are 1e-6: the bound with its γ."""
    result = LRP(vit(), which)(images(), TARGET)
    torch.testing.assert_close(result.output, lxt["output"], rtol=1e-12, atol=1e-12)
    difference = relative(result.scores, lxt[name])
    print(f"\n{name}: {difference:.1e} of the map")
    assert difference < bound


def test_a_learnt_query(lxt: dict[str, Tensor]) -> None:
    """LXT halves what goes to q and k even where q is a constant and takes nothing: half of the keys' part is lost.

    Proposition 3.3 of AttnLRP halves for two factors that both carry relevance; a product with a constant is a linear
    layer, whose input gets all.  So ours for the keys is twice LXT's, and equal to attention in plain matrix products.
    """
    model, x = Pooling(), tokens()
    ours = LRP(model, attnlrp(0.0))(x, TARGET).scores

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v

    spelled = LRP(lambda x: model(x, plain), attnlrp(0.0))(x, TARGET).scores
    torch.testing.assert_close(ours, spelled, rtol=1e-9, atol=1e-12)
    values = 0.5 * LRP(model, cp_lrp(0.0))(x, TARGET).scores  # attention as a constant gives all to the values
    torch.testing.assert_close(lxt["pooling"] - values, (ours - values) / 2, rtol=1e-9, atol=1e-12)
    assert relative(ours, lxt["pooling"]) > 0.1
