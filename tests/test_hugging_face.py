"""Vision models of Hugging Face's transformers, with small configurations and random weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import import_torchvision
from safetensors.torch import save_file
from test_engine import drawn, gap
from torch import Tensor, nn
from torch.nn import functional as F

from pfungst.domains.preprocessing import Preprocess, from_transformers
from pfungst.errors import MissingExtra, ModelError
from pfungst.lrp import LRP
from pfungst.lrp.presets import attnlrp, cp_lrp
from pfungst.models import load_model

COMMON = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "image_size": 16,
    "patch_size": 4,
}


@pytest.fixture(scope="module")
def transformers() -> Any:
    import_torchvision()  # transformers imports it where it is installed
    found = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'pfungst[hf]'")
    found.logging.set_verbosity_error()
    return found


def clip(library: Any) -> Any:
    text = {"vocab_size": 20, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    return library.CLIPConfig(text_config={**text, "intermediate_size": 20}, vision_config=COMMON, projection_dim=8)


def dinov2(library: Any, **more: Any) -> Any:
    kind = library.Dinov2WithRegistersConfig if "num_register_tokens" in more else library.Dinov2Config
    common = {name: value for name, value in COMMON.items() if name != "intermediate_size"}
    return kind(**common, mlp_ratio=2, num_labels=5, **more)


def swin(library: Any) -> Any:
    return library.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4, num_labels=5
    )


def convnext(library: Any) -> Any:
    return library.ConvNextConfig(num_stages=2, patch_size=4, hidden_sizes=[6, 8], depths=[1, 1], num_labels=5)


def resnet(library: Any) -> Any:
    return library.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)


def logits(model: Any, x: Tensor) -> Tensor:
    return model(x).logits


def pooled(model: Any, x: Tensor) -> Tensor:
    return model(x).pooler_output


# Class of the model, its configuration, and the scores among what it returns.
MODELS: dict[str, tuple[str, Callable[[Any], Any], Callable[[Any, Tensor], Tensor]]] = {
    "ViT": ("ViTModel", lambda t: t.ViTConfig(**COMMON), pooled),
    "ViT, all tokens": ("ViTModel", lambda t: t.ViTConfig(**COMMON), lambda m, x: m(x).last_hidden_state.mean(1)),
    "ViT classifier": ("ViTForImageClassification", lambda t: t.ViTConfig(**COMMON, num_labels=5), logits),
    "DeiT": ("DeiTForImageClassificationWithTeacher", lambda t: t.DeiTConfig(**COMMON, num_labels=5), logits),
    "CLIP vision": ("CLIPVisionModel", lambda t: t.CLIPVisionConfig(**COMMON), pooled),
    "CLIP projection": (
        "CLIPVisionModelWithProjection",
        lambda t: t.CLIPVisionConfig(**COMMON, projection_dim=8),
        lambda m, x: m(x).image_embeds,
    ),
    "CLIP image features": ("CLIPModel", clip, lambda m, x: image_features(m, x)),
    "DINOv2": ("Dinov2Model", dinov2, pooled),
    "DINOv2 classifier": ("Dinov2ForImageClassification", dinov2, logits),
    "DINOv2, gated": ("Dinov2ForImageClassification", lambda t: dinov2(t, use_swiglu_ffn=True), logits),
    "DINOv2, registers": (
        "Dinov2WithRegistersForImageClassification",
        lambda t: dinov2(t, num_register_tokens=3),
        logits,
    ),
    "SigLIP": ("SiglipVisionModel", lambda t: t.SiglipVisionConfig(**COMMON), pooled),
    "BEiT": (
        "BeitForImageClassification",
        lambda t: t.BeitConfig(**COMMON, use_relative_position_bias=True, num_labels=5),
        logits,
    ),
    "Swin": ("SwinForImageClassification", swin, logits),
    "ConvNeXt": ("ConvNextForImageClassification", convnext, logits),
    "ResNet": ("ResNetForImageClassification", resnet, logits),
}


def image_features(model: Any, x: Tensor) -> Tensor:
    """A tensor, or from version 5 on a record that has it as its pooled output."""
    features = model.get_image_features(pixel_values=x)
    return features if isinstance(features, Tensor) else features.pooler_output


class Scores(nn.Module):
    """A model of transformers returns a record; this returns one tensor of it."""

    def __init__(self, model: nn.Module, pick: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.pick = model, pick

    def forward(self, x: Tensor) -> Tensor:
        return self.pick(self.model, x)


def built(transformers: Any, name: str, attention: str) -> tuple[Scores, Tensor]:
    kind, configure, pick = MODELS[name]
    configuration = configure(transformers)
    try:
        configuration._attn_implementation = attention
        model = getattr(transformers, kind)(configuration)
    except ValueError as error:
        pytest.skip(str(error).splitlines()[0])
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():  # theirs are so small that all tokens are the same
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = values * (0.5 if parameter.dim() < 2 else parameter[0].numel() ** -0.5)
    size = 32 if name in ("Swin", "ConvNeXt", "ResNet") else 16
    return Scores(model.double().eval(), pick), drawn(3, 3, size, size)


@pytest.fixture
def in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes the softmax of its eager attention in float32, in a float64 model too: not here."""

    def softmax(input: Tensor, dim: int, _stacklevel: int = 3, dtype: Any = None) -> Tensor:
        return torch.softmax(input, dim)

    monkeypatch.setattr(F, "softmax", softmax)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_models(transformers: Any, in_double: None, name: str, attention: str) -> None:
    model, x = built(transformers, name, attention)
    with torch.no_grad():
        plain = model(x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    worst = 0.0
    for which in ("epsilon-plus", "attnlrp", "attnlrp-gamma", "cp-lrp", "cp-lrp-gamma"):
        result = LRP(model, which)(x, [1, 0, 3])
        assert torch.equal(result.output, plain)
        assert result.scores.shape == x.shape
        assert float(result.scores.abs().sum()) > 0
        worst = max(worst, gap(result))
    print(f"\n{name}, {attention}: ledger {worst:.0e}")
    assert worst < 1e-9
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("ConvNeXt", "ResNet")])
def test_both_spellings_of_attention_agree(transformers: Any, in_double: None, name: str) -> None:
    """The same weights with matrix products and with torch's fused function: one map."""
    for which in (attnlrp(0.0), cp_lrp(0.0)):
        maps = []
        for attention in ("eager", "sdpa"):
            model, x = built(transformers, name, attention)
            maps.append(LRP(model, which)(x, 1).scores)
        torch.testing.assert_close(maps[0], maps[1], rtol=1e-8, atol=1e-11 * float(maps[0].abs().max()))


def test_a_softmax_in_single_precision(transformers: Any) -> None:
    """As transformers has it: output unchanged, and the ledger closes to the precision of that softmax."""
    for name in ("ViT classifier", "CLIP vision"):
        model, x = built(transformers, name, "eager")
        result = LRP(model, "attnlrp")(x, 1)
        with torch.no_grad():
            assert torch.equal(result.output, model(x))
        assert gap(result) < 10 * torch.finfo(torch.float32).eps


# ---- by name -----------------------------------------------------------------------------------------------------


def saved(transformers: Any, folder: Path, **more: Any) -> Any:
    """A small classifier in a folder, as save_pretrained writes it."""
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**COMMON, **more)).eval()
    model.save_pretrained(folder, safe_serialization=True)
    assert (folder / "model.safetensors").is_file()
    return model


VIT = {"do_resize": True, "size": {"height": 16, "width": 16}, "resample": 3, "do_rescale": True, "do_normalize": True,
       "rescale_factor": 1 / 255, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}  # fmt: skip


def test_a_model_by_its_folder(transformers: Any, tmp_path: Path) -> None:
    names = {0: "leaf", 1: "rose", 2: "moss"}
    model = saved(transformers, tmp_path, id2label=names, label2id={v: k for k, v in names.items()})
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(VIT))
    loaded = load_model(f"hf:{tmp_path}")
    assert loaded.classes == ("leaf", "rose", "moss")
    assert loaded.preprocess == Preprocess(
        (16, 16), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), resize=(16, 16), crop="squash", interpolation="bicubic"
    )
    x = drawn(2, 3, 16, 16).float()
    with torch.no_grad():
        expected = model(x).logits
        assert torch.equal(loaded.module(x), expected)
    result = LRP(loaded.module, "cp-lrp-gamma")(x)
    assert torch.equal(result.output, expected)
    assert gap(result) < 1e-4


def test_a_model_without_names_and_preprocessing_and_with_other_weights(transformers: Any, tmp_path: Path) -> None:
    saved(transformers, tmp_path / "one", num_labels=4)
    loaded = load_model(f"hf:{tmp_path / 'one'}", size=16, mean=0.5, std=0.5)
    assert loaded.classes is None
    assert loaded.preprocess is not None
    torch.manual_seed(9)
    other = transformers.ViTForImageClassification(transformers.ViTConfig(**COMMON, num_labels=4)).eval()
    save_file({k: v.contiguous() for k, v in other.state_dict().items()}, tmp_path / "other.safetensors")
    again = load_model(f"hf:{tmp_path / 'one'}", weights=tmp_path / "other.safetensors", size=16)
    x = drawn(2, 3, 16, 16).float()
    with torch.no_grad():
        assert torch.equal(again.module(x), other(x).logits)
    assert again.digest != loaded.digest


def test_pickles_and_other_folders_are_refused(transformers: Any, tmp_path: Path) -> None:
    model = saved(transformers, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_model(f"hf:{tmp_path}", size=16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(f"hf:{tmp_path / 'empty'}", size=16)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match="hf"):
        load_model("hf:google/vit-base-patch16-224")


CLIP = {**VIT, "size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": {"height": 16, "width": 16}}


@pytest.mark.parametrize(
    ("settings", "resize", "crop", "size"),
    [
        (VIT, (16, 16), "squash", (16, 16)),
        ({**VIT, "size": 16}, (16, 16), "squash", (16, 16)),
        (CLIP, 20, "center", (16, 16)),
        ({**CLIP, "crop_size": 12}, 20, "center", (12, 12)),
        ({**CLIP, "do_resize": False}, None, "center", (16, 16)),
        ({**VIT, "size": {"shortest_edge": 28}, "crop_pct": 0.875}, 32, "center", (28, 28)),
        ({**VIT, "size": {"shortest_edge": 384}, "crop_pct": 0.875}, (384, 384), "squash", (384, 384)),
    ],
)
def test_preprocessing_of_image_processors(settings: Any, resize: Any, crop: str, size: tuple[int, int]) -> None:
    expected = Preprocess(size, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), resize=resize, crop=crop, interpolation="bicubic")
    assert from_transformers(settings) == expected


def test_what_an_image_processor_does_besides_is_not_guessed() -> None:
    for more in ({"size": {"longest_edge": 16}}, {"resample": 4}, {"do_pad": True}, {"size": {"shortest_edge": 16}}):
        assert from_transformers({**VIT, **more}) is None
    plain = from_transformers({**VIT, "do_normalize": False, "do_rescale": False})
    assert plain is not None
    assert (plain.mean, plain.std, plain.scale) == ((0.0,) * 3, (1.0,) * 3, 1.0)
