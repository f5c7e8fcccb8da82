"""nn.MultiheadAttention and the layers made of it: relevance against slow oracles, entry by entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import oracles_attention as oracle
import pytest
import torch
from test_attention import ATTNLRP, BOTH, CP, HEADS, WIDTH, L, S, explained, same
from test_engine import drawn
from torch import Tensor, nn
from torch.nn import functional as F

from pfungst.lrp import LRP, Preset
from pfungst.lrp.presets import attnlrp, attnlrp_gamma, cp_lrp, cp_lrp_gamma

# ---- nn.MultiheadAttention ---------------------------------------------------------------------------------------

MHA: dict[str, tuple[dict[str, Any], bool]] = {
    # settings, and whether query, key and value are three tensors
    "self, batch first": ({"batch_first": True}, False),
    "self, batch second": ({"batch_first": False}, False),
    "without biases": ({"batch_first": True, "bias": False}, False),
    "cross, packed": ({"batch_first": True}, True),
    "cross, own widths": ({"batch_first": True, "kdim": 5, "vdim": 3}, True),
    "cross, batch second": ({"batch_first": False}, True),
    "bias_k, bias_v": ({"batch_first": True, "add_bias_kv": True}, True),
    "zero token": ({"batch_first": True, "add_zero_attn": True}, False),
    "both": ({"batch_first": False, "add_bias_kv": True, "add_zero_attn": True}, True),
}
MASKS = ("none", "padding", "float padding", "bool", "float", "float by head", "causal", "bool and padding")


class Attends(nn.Module):
    """An attention over tokens x (n, tokens, WIDTH), or of the first ones to the others."""

    def __init__(self, settings: dict[str, Any], cross: bool, masks: dict[str, Any], need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **settings).double().eval()
        generator = torch.Generator().manual_seed(4)
        for parameter in self.attention.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.7
        self.cross, self.masks, self.need_weights = cross, masks, need_weights
        self.first = bool(settings.get("batch_first"))

    def parts(self, x: Tensor) -> list[Tensor]:
        if not self.cross:
            return [x, x, x]
        a = self.attention
        return [x[:, :L], x[:, L : L + S, : a.kdim], x[:, L + S :, : a.vdim]]

    def forward(self, x: Tensor) -> Tensor:
        parts = [p if self.first else p.transpose(0, 1) for p in self.parts(x)]
        if not self.cross:
            parts = [parts[0]] * 3
        y, _ = self.attention(*parts, need_weights=self.need_weights, **self.masks)
        return y if self.first else y.transpose(0, 1)


def masks(name: str, n: int, queries: int, keys: int) -> tuple[dict[str, Any], Tensor]:
    """Arguments of the call, and what they add to the scores, (n, heads, queries, keys)."""
    total = torch.zeros(n, HEADS, queries, keys, dtype=torch.float64)
    given: dict[str, Any] = {}
    if "padding" in name:
        padded = torch.zeros(n, keys, dtype=torch.bool)
        padded[0, -1] = padded[1, 0] = True
        part = torch.zeros(n, keys, dtype=torch.float64).masked_fill(padded, -torch.inf)
        given["key_padding_mask"] = part if name.startswith("float") else padded
        total = total + part[:, None, None]
    if name.startswith("bool"):
        blocked = torch.zeros(queries, keys, dtype=torch.bool)
        blocked[0, 1] = blocked[2, 2] = True
        given["attn_mask"] = blocked
        total = total.masked_fill(blocked, -torch.inf)
    if name == "float":
        given["attn_mask"] = drawn(queries, keys, seed=8)
        total = total + given["attn_mask"]
    if name == "float by head":
        given["attn_mask"] = drawn(n * HEADS, queries, keys, seed=8)
        total = total + given["attn_mask"].reshape(n, HEADS, queries, keys)
    if name == "causal":
        later = ~torch.ones(queries, keys, dtype=torch.bool).tril()
        given |= {"attn_mask": later, "is_causal": True}
        total = total.masked_fill(later, -torch.inf)
    return given, total


def projections(a: nn.MultiheadAttention) -> oracle.Projections:
    def array(t: Tensor | None) -> Any:
        return None if t is None else t.detach().numpy()

    weights: Sequence[Any] = [a.q_proj_weight, a.k_proj_weight, a.v_proj_weight]
    if a.in_proj_weight is not None:
        weights = a.in_proj_weight.chunk(3)
    biases: Sequence[Any] = [None] * 3 if a.in_proj_bias is None else a.in_proj_bias.chunk(3)
    pairs = [(array(w), array(b)) for w, b in zip(weights, biases, strict=True)]
    extra_k, extra_v = (np.zeros((0, WIDTH)) if t is None else array(t).reshape(1, WIDTH) for t in (a.bias_k, a.bias_v))
    if a.add_zero_attn:
        extra_k, extra_v = (np.concatenate([t, np.zeros((1, WIDTH))]) for t in (extra_k, extra_v))
    out = array(a.out_proj.weight), array(a.out_proj.bias)
    return oracle.Projections(*pairs, out, a.num_heads, extra_k, extra_v)


def check_multi_head(settings: dict[str, Any], cross: bool, mask: str, need_weights: bool, which: Preset) -> None:
    n, keys = 3, S
    x = drawn(n, L + 2 * S if cross else S, WIDTH, seed=12)
    given, summed = masks(mask, n, L if cross else S, keys)
    model = Attends(settings, cross, given, need_weights)
    result, R = explained(model, x, which, fused=True)
    p = projections(model.attention)
    for i in range(n):
        mine = [part[i].numpy() for part in model.parts(x)]
        # With is_causal torch hides the added tokens too: they come after all others.
        extra = np.full((*summed.shape[1:3], len(p.extra_k)), -np.inf if mask == "causal" else 0.0)
        full = np.concatenate([summed[i].numpy(), extra], 2)
        values, relevance = oracle.multi_head(*mine, p, full, constant=which is CP)
        same(model(x)[i].detach(), values)
        shared = relevance(R[i])
        if not cross:
            same(result.scores[i], sum(shared))
            continue
        expected = np.zeros((L + 2 * S, WIDTH))
        for start, r in zip((0, L, L + S), shared, strict=True):
            expected[start : start + len(r), : r.shape[1]] = r
        same(result.scores[i], expected)


@BOTH
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("case", MHA.values(), ids=MHA)
def test_multi_head(case: tuple[dict[str, Any], bool], need_weights: bool, which: Preset) -> None:
    check_multi_head(*case, "none", need_weights, which)


@BOTH
@pytest.mark.parametrize("mask", MASKS[1:])
@pytest.mark.parametrize("name", ["self, batch first", "both"])
def test_multi_head_with_masks(name: str, mask: str, which: Preset) -> None:
    for need_weights in (True, False):
        if not (mask == "causal" and need_weights):  # torch wants no is_causal there
            check_multi_head(*MHA[name], mask, need_weights, which)


def test_attention_weights_as_output() -> None:
    """The model reads the averaged weights, not the values."""
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double().eval()
    result, _ = explained(lambda x: attention(x, x, x)[1], drawn(2, S, WIDTH), ATTNLRP, fused=True)
    assert float(result.scores.abs().max()) > 0


# ---- whole layers ------------------------------------------------------------------------------------------------


def encoder(norm_first: bool, activation: Any = "gelu") -> nn.TransformerEncoderLayer:
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 8, dropout=0.1, activation=activation, batch_first=True, norm_first=norm_first
    )
    generator = torch.Generator().manual_seed(6)
    for parameter in layer.parameters():
        parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape, generator=generator)
    return layer.double().eval()


def encoder_oracle(layer: nn.TransformerEncoderLayer, x: np.ndarray, R: np.ndarray, constant: bool) -> np.ndarray:
    """The two blocks of the layer backwards, token by token."""
    p = projections(layer.self_attn)
    zeros = np.zeros((HEADS, len(x), len(x)))

    def values(module: nn.Module, value: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(value)).numpy()

    def normed(which: nn.LayerNorm, value: np.ndarray, r: np.ndarray) -> np.ndarray:
        w, b = which.weight.detach().numpy(), which.bias.detach().numpy()
        rows = zip(value, r, strict=True)
        return np.stack([oracle.norm(v, w, b, which.eps, row, centred=True, identity=False) for v, row in rows])

    def attends(value: np.ndarray) -> tuple[np.ndarray, Any]:
        y, relevance = oracle.multi_head(value, value, value, p, zeros, constant=constant)
        return y, lambda r: sum(relevance(r))

    def feeds(value: np.ndarray) -> tuple[np.ndarray, Any]:
        hidden = values(layer.linear1, value)
        active = layer.activation(torch.from_numpy(hidden)).numpy()
        one, two = ((m.weight.detach().numpy(), m.bias.detach().numpy()) for m in (layer.linear1, layer.linear2))
        # Relevance passes the activation function unchanged.
        return values(layer.linear2, active), lambda r: oracle.linear(value, *one, oracle.linear(active, *two, r))

    backwards = []
    for norm, block in ((layer.norm1, attends), (layer.norm2, feeds)):
        before = x
        if layer.norm_first:
            inner = values(norm, x)
            y, relevance = block(inner)

            def back(r, before=before, y=y, relevance=relevance, norm=norm):  # type: ignore[no-untyped-def]
                skip, through = oracle.residual(before, y, r)
                return skip + normed(norm, before, relevance(through))

            x = before + y
        else:
            y, relevance = block(x)

            def back(r, before=before, y=y, relevance=relevance, norm=norm):  # type: ignore[no-untyped-def]
                skip, through = oracle.residual(before, y, normed(norm, before + y, r))
                return skip + relevance(through)

            x = values(norm, before + y)
        backwards.append(back)
    for back in reversed(backwards):
        R = back(R)
    return R


@BOTH
@pytest.mark.parametrize("norm_first", [True, False], ids=["norm first", "norm last"])
@pytest.mark.parametrize("activation", ["relu", "gelu", F.silu], ids=["relu", "gelu", "silu"])
def test_encoder_layer(activation: Any, norm_first: bool, which: Preset) -> None:
    layer = encoder(norm_first, activation)
    x = drawn(3, S, WIDTH, seed=2)
    result, R = explained(layer, x, which, fused=True)
    for n in range(3):
        same(result.scores[n], encoder_oracle(layer, x[n].numpy(), R[n], which is CP))


@pytest.mark.parametrize("norm_first", [True, False], ids=["norm first", "norm last"])
def test_the_fused_path_of_torch_changes_nothing(norm_first: bool) -> None:
    """Without gradients torch runs an encoder layer as one fused call; the engine opens it, whatever is switched on."""
    model = nn.Sequential(nn.TransformerEncoder(encoder(norm_first), 2, enable_nested_tensor=False), nn.Flatten())
    x = drawn(3, S, WIDTH, seed=2)
    expected = LRP(model, ATTNLRP)(x, 1)
    with torch.no_grad():
        fused = model(x)
        inside = LRP(model, ATTNLRP)(x, 1)
    with torch.inference_mode():
        within = LRP(model, ATTNLRP)(x, 1)
    for result in (inside, within):
        assert torch.equal(result.output, expected.output)
        assert torch.equal(result.scores, expected.scores)
    frozen = LRP(model.requires_grad_(False), ATTNLRP)(x, 1)  # torch's kernels for frozen weights round otherwise
    same(frozen.scores, expected.scores)
    for output in (fused, frozen.output):
        torch.testing.assert_close(output, expected.output, rtol=1e-12, atol=1e-13)


def test_decoder_layer_and_whole_transformer() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, HEADS, 1, 1, 8, batch_first=True).double().eval()
    for which in (ATTNLRP, CP, attnlrp(), cp_lrp()):
        explained(lambda x: model(x[:, :3], x[:, 2:]), drawn(3, 5, WIDTH), which, fused=True)


# ---- gamma -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("which", "plain"), [("attnlrp-gamma", ATTNLRP), ("cp-lrp-gamma", CP)])
def test_gamma_presets_differ_in_linear_nodes_only(which: str, plain: Preset) -> None:
    """With γ = 0 they are the presets without it; with γ the softmax and product rules are as they were."""
    layer = encoder(True)
    x = drawn(3, S, WIDTH, seed=2)
    make = attnlrp_gamma if which == "attnlrp-gamma" else cp_lrp_gamma

    def scores(of: Preset | str) -> Tensor:
        return explained(layer, x, of, fused=True)[0].scores

    same(scores(make(0.0, 0.0, 0.0)), scores(plain))
    assert not torch.allclose(scores(which), scores(plain))
