"""Outlier tokens of vision transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference_lxt import images, vit
from torch import Tensor, nn

from pfungst.errors import SettingError
from pfungst.lrp import LRP
from pfungst.lrp.tokens import flag_tokens, outlier_tokens

LAYER = "encoder.layers.encoder_layer_1"
PLANTED = 6  # of 16 patches


def planted(size: float) -> nn.Module:
    """A vision transformer, one of whose patches has a large position embedding: a large norm in every layer."""
    model = vit()
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(12, generator=generator, dtype=torch.float64)
    model.encoder.pos_embedding.data[0, 1 + PLANTED] += size * direction / direction.norm()
    return model


def test_a_planted_token_is_flagged() -> None:
    model, x = planted(80.0), images()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = outlier_tokens(LRP(model, "cp-lrp"), x, LAYER, target=[1, 2])
    expected = torch.zeros(2, 16, dtype=torch.bool)
    expected[:, PLANTED] = True
    assert torch.equal(found.outliers, expected)
    assert found.share == 1 / 16
    # The share of relevance, from the map at that layer.
    R = LRP(model, "cp-lrp")(x, [1, 2], layers=[LAYER]).layers[LAYER][:, 1:].sum(2).abs()
    assert found.relevance_share == pytest.approx(float((R[:, PLANTED] / R.sum(1)).mean()), rel=1e-12)
    assert "6.2% of the tokens have outlier norms" in str(found)
    assert "times their part" in str(found)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_plan_says_so() -> None:
    assert "tokens entering 'encoder.ln': 6.2% of the tokens have outlier norms" in str(
        LRP(planted(80.0)).plan(images())
    )
    assert "outlier" not in str(LRP(planted(0.0)).plan(images()))


def test_nothing_is_flagged_without_it() -> None:
    found = outlier_tokens(LRP(planted(0.0)), images(), LAYER)
    assert not found.outliers.any()
    assert found.relevance_share == 0
    assert str(found) == "0.0% of the tokens have outlier norms"


def test_the_class_token_is_no_patch() -> None:
    """Its norm is another one; with ``special=0`` it counts."""
    model = planted(0.0)
    model.class_token.data *= 80
    assert not outlier_tokens(LRP(model), images(), LAYER).outliers.any()
    found = outlier_tokens(LRP(model), images(), LAYER, special=0)
    assert found.outliers[:, 0].all()
    assert found.outliers.sum() == 2


def test_the_cut_is_median_and_deviation() -> None:
    rng = np.random.default_rng(0)
    norms = rng.lognormal(0, 0.2, (20, 50))
    norms[3, 7] = norms[11, 2] = 9.0
    relevance = rng.normal(size=norms.shape)
    found = flag_tokens(torch.from_numpy(norms), torch.from_numpy(relevance), deviations=5.0)
    shares = []
    for row, R, outliers, threshold in zip(norms, relevance, found.outliers, found.threshold, strict=True):
        median = np.median(row)
        cut = max(median + 5 * 1.4826 * np.median(abs(row - median)), 1.5 * median)
        assert float(threshold) == pytest.approx(cut, rel=1e-12)
        assert outliers.tolist() == [value > cut for value in row]
        shares.append(sum(abs(r) for r, value in zip(R, row, strict=True) if value > cut) / sum(abs(R)))
    assert found.relevance_share == pytest.approx(float(np.mean(shares)), rel=1e-12)
    assert found.outliers[3, 7]
    assert found.outliers[11, 2]


def test_few_are_flagged_among_ordinary_norms() -> None:
    """Lengths of Gaussian vectors, and norms that are all the same but for rounding."""
    tokens = torch.randn(200, 196, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert not flag_tokens(tokens.norm(dim=2)).outliers.any()
    same: Tensor = 3 + 1e-12 * tokens[:, :, 0]
    assert not flag_tokens(same).outliers.any()


def test_errors_say_what_to_do() -> None:
    with pytest.raises(SettingError, match=r"\(n, tokens, width\)"):
        outlier_tokens(LRP(planted(0.0)), images(), "conv_proj")
    with pytest.raises(SettingError, match="no module"):
        outlier_tokens(LRP(planted(0.0)), images(), "nowhere")
    with pytest.raises(SettingError, match="one norm a token"):
        flag_tokens(torch.ones(3))
    with pytest.raises(SettingError, match="summed over its channels"):
        flag_tokens(torch.ones(3, 4), torch.ones(3, 4, 2))
