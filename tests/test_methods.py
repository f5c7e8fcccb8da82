"""Methods by name: baselines against Captum entry by entry, on modules and on functional code; controls; errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pfungst import baselines
from pfungst.errors import MissingExtra, RelevanceError, SettingError
from pfungst.lrp import LRP, LogOdds
from pfungst.methods import CONTROLS, METHODS, make_method, wrap_method


class Modules(nn.Module):
    """A small network of modules, so that Captum sees all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(6, 8, 3))
        self.act = nn.ReLU()
        self.head = nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.features(x)).flatten(1))


class Functions(Modules):
    """The same in functional code, with ReLUs that work in place; nothing of it can be hooked."""

    def forward(self, x: Tensor) -> Tensor:
        first, _, _, second = self.features
        h = functional.avg_pool2d(functional.relu(first(x), inplace=True), 2)
        h = second(h)
        h.relu_()
        return self.head(h.flatten(1))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Modules().double().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.double)


TARGET = torch.tensor([0, 3, 1])


def captum(name: str, model: nn.Module, x: Tensor) -> Tensor:
    attr = pytest.importorskip("captum.attr")
    asked = x.clone().requires_grad_()
    if name == "gradient":
        return attr.Saliency(model).attribute(asked, TARGET, abs=True).amax(1)
    if name == "gradient-x-input":
        return attr.InputXGradient(model).attribute(asked, TARGET).sum(1)
    if name == "guided-backprop":
        return attr.GuidedBackprop(model).attribute(asked, TARGET).norm(dim=1)
    if name == "deconvnet":
        return attr.Deconvolution(model).attribute(asked, TARGET).norm(dim=1)
    if name == "integrated-gradients":
        return attr.IntegratedGradients(model).attribute(asked, target=TARGET, n_steps=50).sum(1)
    if name == "grad-cam":
        cam = attr.LayerGradCam(model, model.act).attribute(asked, TARGET, relu_attributions=True)
        return functional.interpolate(cam, x.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    assert name == "occlusion"
    return attr.Occlusion(model).attribute(x, (3, 4, 4), (3, 2, 2), target=TARGET).mean(1)


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
@pytest.mark.parametrize("written", [Modules, Functions])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gradient", {}),
        ("gradient-x-input", {}),
        ("guided-backprop", {}),
        ("deconvnet", {}),
        ("integrated-gradients", {}),
        ("grad-cam", {}),
        ("occlusion", {"window": 4}),
    ],
)
def test_baselines_are_captums(model: nn.Module, x: Tensor, name: str, options: Any, written: Any) -> None:
    if written is Functions and name == "grad-cam":
        options = {"layer": "features.3"}  # in place: the tensor of the convolution is the activation
    asked = model if written is Modules else _same(model, Functions())
    maps = make_method(name, asked, **options).explain(x, TARGET)
    # Captum's occlusion is float32, and so are the weights of its integral; all else is double.
    close = {"rtol": 1e-5, "atol": 1e-6} if name in ("occlusion", "integrated-gradients") else {"rtol": 1e-9, "atol": 0}
    torch.testing.assert_close(maps, captum(name, model, x).double(), **close)


def _same(model: nn.Module, other: nn.Module) -> nn.Module:
    other = other.double().eval()
    other.load_state_dict(model.state_dict())
    return other


def test_presets_are_lrp_summed_over_channels(model: nn.Module, x: Tensor) -> None:
    maps = make_method("epsilon-plus", model)(x, TARGET)
    torch.testing.assert_close(maps, LRP(model, "epsilon-plus")(x, TARGET).scores.sum(1).float())


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("grad-cam:features.0", {"layer": "features.0"}),
        ("occlusion:3", {"window": 3}),
        ("integrated-gradients:7", {"steps": 7}),
        ("smoothgrad:3", {"draws": 3}),
    ],
)
def test_an_option_may_be_part_of_the_name(model: nn.Module, x: Tensor, name: str, option: dict[str, Any]) -> None:
    method, plain = make_method(name, model), make_method(name.partition(":")[0], model, **option)
    assert (method.name, method.kind) == (name, "baseline")
    assert torch.equal(method(x, TARGET), plain(x, TARGET))
    other: Any = method.of(model)
    assert torch.equal(other(x, TARGET), method(x, TARGET))


@pytest.mark.parametrize("name", ["occlusion:big", "occlusion:", "gradient:3", "random:1", "nothing:1", "auto:3"])
def test_names_with_wrong_options_are_refused(model: nn.Module, name: str) -> None:
    with pytest.raises(SettingError):
        make_method(name, model)


def test_smoothgrad_without_noise_is_the_gradient(model: nn.Module, x: Tensor) -> None:
    calm = make_method("smoothgrad", model, noise=0.0, draws=2)(x, TARGET)
    torch.testing.assert_close(calm, make_method("gradient", model)(x, TARGET))


@pytest.mark.parametrize("name", ["smoothgrad", "random", "edges", "centre-gaussian", "occlusion", "grad-cam"])
def test_no_batch_changes_a_map(model: nn.Module, x: Tensor, name: str) -> None:
    method = make_method(name, model)
    whole = method(x, TARGET)
    alone = torch.cat([method(x[i : i + 1], TARGET[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(whole, alone)


def test_targets_other_than_indices(model: nn.Module, x: Tensor) -> None:
    asked = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(LogOdds(TARGET).value(model(asked)).sum(), asked)
    torch.testing.assert_close(make_method("gradient", model).explain(x, LogOdds(TARGET)), wanted.abs().amax(1))


def test_the_model_and_the_picture_stay_as_they_were(model: nn.Module, x: Tensor) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copy = x.clone()
    for name in METHODS:
        if name not in ("arras", "deeplift"):
            make_method(name, model, **({"bounds": (-5, 5)} if name == "epsilon-gamma-box" else {}))(x, TARGET)
    assert torch.equal(x, copy)
    assert not x.requires_grad
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_deeplift_sums_to_the_difference_or_says_that_it_does_not(model: nn.Module, x: Tensor) -> None:
    pytest.importorskip("captum.attr")
    maps = make_method("deeplift", model).explain(x, TARGET)
    rows = torch.arange(3)
    difference = model(x)[rows, TARGET] - model(torch.zeros_like(x))[rows, TARGET]
    torch.testing.assert_close(maps.sum((1, 2)), difference)
    with pytest.raises(RelevanceError, match="misses the output"):
        make_method("deeplift", _same(model, Functions())).explain(x, TARGET)


def test_deeplift_without_captum_names_the_installation(model: nn.Module, x: Tensor, monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "captum.attr", None)
    with pytest.raises(MissingExtra, match=r"pfungst\[methods\]"):
        make_method("deeplift", model)(x, TARGET)


def test_what_cannot_be_done_is_said(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(SettingError, match="no method 'gradcam'"):
        make_method("gradcam", model)
    with pytest.raises(SettingError, match="no layer 'nowhere'"):
        make_method("grad-cam", model, layer="nowhere")(x, TARGET)
    with pytest.raises(RelevanceError, match="calls no ReLU"):
        make_method("guided-backprop", nn.Sequential(nn.Flatten(), nn.Linear(768, 4)).double())(x, TARGET)
    with pytest.raises(RelevanceError, match="no layer returns"):
        make_method("grad-cam", nn.Sequential(nn.Flatten(), nn.Linear(768, 4)).double())(x, TARGET)
    with pytest.raises(RelevanceError, match="gives maps of shape"):
        wrap_method("mine", lambda x, target: x[:, 0, 0])(x, TARGET)


def test_grad_cam_looks_before_the_pooling(x: Tensor) -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4)]
    pooling = nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Linear(64, 4)).double().eval()
    told = make_method("grad-cam", pooling).about
    assert told is not None
    assert told(x) == "grad-cam looks at layer 0.1: 4 channels of 14 x 14"


def test_own_methods_are_summed_over_channels(x: Tensor) -> None:
    method = wrap_method("mine", lambda x, target: (2 * x).numpy())
    torch.testing.assert_close(method(x, TARGET), 2 * x.sum(1).float())
    assert method.of(None) is None


def test_controls_know_nothing_of_the_model(x: Tensor) -> None:
    for name in CONTROLS:
        one = make_method(name, None)(x, TARGET)
        assert torch.equal(one, make_method(name, None)(x, TARGET.flip(0)))
    centre = make_method("centre-gaussian", None)(x, TARGET)
    assert np.isclose(float(centre[0, 0, 8] / centre[0, 8, 8]), np.exp(-2 + (2 / 15) ** 2 / 2), rtol=1e-4)
    ramp = torch.arange(16.0).expand(1, 3, 16, 16)
    torch.testing.assert_close(baselines.edges(None, ramp, None)[:, :, 1:-1], torch.full((1, 16, 14), 8.0))
