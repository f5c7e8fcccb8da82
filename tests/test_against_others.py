"""Relevance of whole models against engines and references that others wrote.

"Relative" means: greatest difference of two entries over the greatest entry of the reference map.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import import_torchvision
from torch import Tensor, nn

from pfungst.lrp import LRP, Preset, Row
from pfungst.lrp.presets import epsilon_plus
from pfungst.lrp.rules import AlphaBeta, Epsilon, Flat, WSquare, ZBox, ZPlus


def randomised(model: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """Random weights; batch norms with the statistics of ``x``, disturbed, so that signals neither die nor explode."""
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def calibrate(norm: Any, inputs: Any) -> None:
        (y,) = inputs
        axes = [0, *range(2, y.dim())]

        def draw() -> Tensor:
            return torch.rand(norm.num_features, generator=generator, dtype=torch.float64)

        spread = y.var(axes, unbiased=False)
        norm.running_mean.copy_(y.mean(axes) + (draw() - 0.5) * spread.sqrt())
        # The mean over channels: two samples say little of one, and a tiny spread would make the model chaotic.
        norm.running_var.copy_(spread * (0.5 + draw()) + 0.3 * spread.mean())
        norm.weight.data.copy_(0.5 + draw())
        norm.bias.data.copy_(draw() - 0.3)

    handles = [norm.register_forward_pre_hook(calibrate) for norm in norms]
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return model


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def zennit_relevance(composite: Any, model: nn.Module, x: Tensor, target: int) -> Tensor:
    x = x.clone().requires_grad_()
    with composite.context(model) as modified:
        output = modified(x)
        seed = torch.zeros_like(output)
        seed[:, target] = output[:, target].detach()
        (R,) = torch.autograd.grad(output, x, seed)
    return R.detach()


@pytest.fixture(scope="module")
def zennit() -> Any:
    import_torchvision()
    return pytest.importorskip("zennit", reason="zennit is not installed")


def images(size: int, seed: int = 5) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def vgg() -> nn.Module:
    torch.manual_seed(0)
    model = import_torchvision().models.vgg16(weights=None, num_classes=10)
    model.classifier[0] = nn.Linear(512 * 49, 64)  # the widths of the dense layers matter to nobody here
    model.classifier[3], model.classifier[6] = nn.Linear(64, 64), nn.Linear(64, 10)
    return randomised(model, images(64))


def check(
    composite: Any,
    model: nn.Module,
    which: str | Preset,
    x: Tensor,
    help_zennit: Callable[[nn.Module], None] = lambda model: None,
    **settings: Any,
) -> None:
    with torch.no_grad():
        plain = model(x)
    result = LRP(model, which, **settings)(x, 3)
    assert torch.equal(result.output, plain)
    other = twin(model)
    help_zennit(other)
    with torch.no_grad():
        assert relative(other(x), plain) < 1e-12
    theirs = zennit_relevance(composite, other, x, 3)
    difference = relative(result.scores, theirs)
    large = theirs.abs() > 1e-3 * theirs.abs().max()
    by_entry = ((result.scores - theirs).abs() / theirs.abs())[large].max()
    name = getattr(which, "name", which)
    print(f"\n{type(model).__name__} {name}: {difference:.1e} of the map, {by_entry:.1e} of each entry")
    assert difference < 1e-3
    assert float(by_entry) < 1e-3


@pytest.mark.parametrize(
    ("composite", "which"),
    [
        ("EpsilonPlus", "epsilon-plus"),
        ("EpsilonPlusFlat", "epsilon-plus-flat"),
        ("EpsilonAlpha2Beta1", "epsilon-alpha2-beta1"),
        ("EpsilonAlpha2Beta1Flat", "epsilon-alpha2-beta1-flat"),
        ("EpsilonGammaBox", "epsilon-gamma-box"),
    ],
)
def test_vgg(zennit: Any, vgg: nn.Module, composite: str, which: str) -> None:
    from zennit import composites

    x = images(64)
    settings: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    if "Box" in composite:
        low, high = torch.full_like(x, -5), torch.full_like(x, 5)
        arguments, settings = {"low": low, "high": high}, {"bounds": (-5, 5)}
    # zennit's stabilisers are 1e-6 in every rule, ours only in epsilon: smaller ones show the rest of the difference
    check(getattr(composites, composite)(**arguments, stabilizer=1e-12), vgg, which, x, **settings)


class Modules:
    """Stands for ``torch.nn.functional`` in torchvision's code: zennit sees pooling only where it is a module."""

    def __init__(self, model: nn.Module, averages: int, adaptive: int) -> None:
        model.averages = nn.ModuleList(nn.AvgPool2d(3, 1, 1) for _ in range(averages))
        model.adaptive = nn.ModuleList(nn.AdaptiveAvgPool2d(1) for _ in range(adaptive))
        self.averages = iter(())
        self.model = model
        model.register_forward_pre_hook(self.start)

    def start(self, module: nn.Module, inputs: Any) -> None:
        self.averages, self.adaptives = iter(module.averages), iter(module.adaptive)  # type: ignore[arg-type]

    def avg_pool2d(self, x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
        assert (kernel_size, stride, padding) == (3, 1, 1)
        return next(self.averages)(x)

    def adaptive_avg_pool2d(self, x: Tensor, size: Any) -> Tensor:
        return next(self.adaptives)(x)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.nn.functional, name)


def twin(model: nn.Module) -> nn.Module:
    """The same function with the ε of each batch norm moved into its variance.

    zennit's merged norms go on dividing by sqrt(1 + ε): 5e-6 each, which over 53 norms shows in the maps.
    """
    copied = copy.deepcopy(model)
    for part in copied.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            assert part.running_var is not None
            part.running_var.add_(part.eps)
            part.eps = 0.0
    return copied


def test_resnet(zennit: Any) -> None:
    from zennit.composites import EpsilonPlus
    from zennit.torchvision import ResNetCanonizer

    torch.manual_seed(0)
    x = images(64)
    model = randomised(import_torchvision().models.resnet50(weights=None, num_classes=10), x)
    # ResNetCanonizer holds a SequentialMergeBatchNorm itself
    check(EpsilonPlus(canonizers=[ResNetCanonizer()], stabilizer=1e-12), model, "epsilon-plus", x)


def test_inception(zennit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.composites import EpsilonPlus

    torch.manual_seed(0)
    x = images(80)
    models = import_torchvision().models
    model = models.inception_v3(weights=None, num_classes=10, aux_logits=False, init_weights=False)
    model = randomised(model, x)

    def as_modules(model: nn.Module) -> None:
        monkeypatch.setattr(models.inception, "F", Modules(model, averages=9, adaptive=0))

    composite = EpsilonPlus(canonizers=[SequentialMergeBatchNorm()], stabilizer=1e-12)
    check(composite, model, "epsilon-plus", x, help_zennit=as_modules)


def test_densenet(zennit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from zennit.canonizers import MergeBatchNorm
    from zennit.composites import EpsilonPlus
    from zennit.rules import Epsilon as ZennitEpsilon
    from zennit.types import BatchNorm

    class MergeAdjacent(MergeBatchNorm):
        """Only the norms that directly follow a convolution; the others stand before a ReLU."""

        def apply(self, root: nn.Module) -> list[Any]:
            pairs = [(root.features.conv0, root.features.norm0)]  # type: ignore[union-attr]
            pairs += [(m.conv1, m.norm2) for m in root.modules() if hasattr(m, "norm2")]
            merges = []
            for convolution, norm in pairs:
                merges.append(MergeAdjacent())
                merges[-1].register((convolution,), norm)
            return merges

        def copy(self) -> Any:
            return MergeAdjacent()

    torch.manual_seed(0)
    x = images(64)
    models = import_torchvision().models
    model = randomised(models.densenet121(weights=None, num_classes=10), x)

    def as_modules(model: nn.Module) -> None:
        monkeypatch.setattr(models.densenet, "F", Modules(model, averages=0, adaptive=1))

    # zennit's epsilon also acts on the merged norms, which compute the identity: 3e-6 of the map at ε = 1e-6.
    composite = EpsilonPlus(
        canonizers=[MergeAdjacent()],
        epsilon=1e-9,
        stabilizer=1e-12,
        layer_map=[(BatchNorm, ZennitEpsilon(epsilon=1e-9))],
    )
    # zennit leaves the other norms where they are: so do we here.
    preset = replace(epsilon_plus(1e-9), pre_activation="diagonal")
    check(composite, model, preset, x, help_zennit=as_modules)


class LeNet(nn.Module):
    """The LRP Toolbox's LeNet-5.  Its sum pooling follows the rules too, so it is a convolution with ones here."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        rows = path.read_text().splitlines()
        layers: list[nn.Module] = []
        while rows:
            kind, *numbers = rows.pop(0).split()
            if kind == "Convolution":
                height, width, inputs, outputs, stride, _ = map(int, numbers)
                layer = nn.Conv2d(inputs, outputs, (height, width), stride).double()
                weight = np.array(rows.pop(0).split(), np.float64).reshape(height, width, inputs, outputs)
                layer.weight.data = torch.from_numpy(weight).permute(3, 2, 0, 1).contiguous()
                layer.bias.data = torch.from_numpy(np.array(rows.pop(0).split(), np.float64))  # type: ignore[union-attr]
                layers.append(layer)
                channels = outputs
            elif kind == "Rect":
                layers.append(nn.ReLU(inplace=True))
            elif kind == "SumPool":
                pool = nn.Conv2d(channels, channels, 2, 2, groups=channels, bias=False).double()
                pool.weight.data.fill_(0.5)  # the toolbox divides by the root of the window's size
                layers.append(pool)
        self.layers = nn.Sequential(*layers, nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _toolbox_rows(first: Row | None, rule: Any) -> tuple[Row, ...]:
    rows = (first,) if first else ()
    if isinstance(rule, Epsilon):  # the toolbox adds ε to sums that it has not yet divided
        rows += tuple(Row(Epsilon(rule.epsilon / 2), name=f"layers.{pool}") for pool in (2, 5, 8))
    return (*rows, Row(rule))


@pytest.mark.data
@pytest.mark.parametrize(
    ("reference", "rows"),
    [
        ("R_simple", _toolbox_rows(None, Epsilon(0.0))),
        ("R_epsilon_0.01", _toolbox_rows(None, Epsilon(0.01))),
        ("R_epsilon_1", _toolbox_rows(None, Epsilon(1.0))),
        ("R_alpha1beta0", _toolbox_rows(None, ZPlus())),
        ("R_alpha2beta-1", _toolbox_rows(None, AlphaBeta(2, 1))),
        ("R_epsilon_0.01_first_flat", _toolbox_rows(Row(Flat(), position="input"), Epsilon(0.01))),
        ("R_epsilon_0.01_first_ww", _toolbox_rows(Row(WSquare(), position="input"), Epsilon(0.01))),
    ],
)
def test_lrp_toolbox(data_root: Path, reference: str, rows: tuple[Row, ...]) -> None:
    """A trained LeNet-5 on digits: signed inputs, biases in the denominators."""
    scipy_io = pytest.importorskip("scipy.io")
    folder = data_root / "mnist-lrp-toolbox"
    stored = np.load(folder / "lenet5_lrp_toolbox_reference.npz")
    digits = scipy_io.loadmat(folder / "test_images.mat")["data"][:20].reshape(20, 1, 28, 28)
    x = torch.nn.functional.pad(torch.from_numpy(digits / 127.5 - 1), (2, 2, 2, 2), value=-1.0)
    result = LRP(LeNet(folder / "LeNet-5.txt"), Preset("toolbox", rows))(x, torch.from_numpy(stored["target"]))
    assert relative(result.output, torch.from_numpy(stored["logits"])) < 1e-12
    assert relative(result.scores[:, 0], torch.from_numpy(stored[reference])[..., 0]) < 1e-8


class LastAxis(nn.Module):
    """A layer on (n, C, H, W) whose result is flattened in the order (H, W, C), as innvestigate stores it."""

    def __init__(self, layer: nn.Module, dense: bool, relu: bool) -> None:
        super().__init__()
        self.layer, self.dense, self.relu = layer, dense, relu

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x.permute(0, 2, 3, 1)) if self.dense else self.layer(x).permute(0, 2, 3, 1)
        return (y.relu() if self.relu else y).flatten(1)


def _keras_layer(name: str, group: Any) -> nn.Module:
    kind = name.removesuffix("_relu")
    if "Pooling" in kind:
        pool = nn.MaxPool2d(2) if kind == "MaxPooling2D" else nn.AvgPool2d(2)
        return LastAxis(pool, False, False)
    weight, bias = (torch.from_numpy(group["weights"][k][()]).double() for k in "01")
    layer: nn.Module = nn.Linear(3, 5) if kind == "Dense" else nn.Conv2d(3, 5, 3)
    layer.weight.data = (weight.T if kind == "Dense" else weight.permute(3, 2, 0, 1)).contiguous()  # type: ignore
    layer.bias.data = bias  # type: ignore[assignment]
    return LastAxis(layer, kind == "Dense", name.endswith("_relu"))


@pytest.mark.data
@pytest.mark.parametrize(
    ("analyser", "rule"),
    [
        ("LRPZ", Epsilon(0.0)),
        ("LRPZIgnoreBias", Epsilon(0.0)),
        ("LRPEpsilon", Epsilon(1e-7)),
        ("LRPEpsilonIgnoreBias", Epsilon(1e-7)),
        ("LRPWSquare", WSquare()),
        ("LRPFlat", Flat()),
        ("LRPAlpha2Beta1", AlphaBeta(2, 1)),
        ("LRPAlpha2Beta1IgnoreBias", AlphaBeta(2, 1)),
        ("LRPAlpha1Beta0", ZPlus()),
        ("LRPAlpha1Beta0IgnoreBias", ZPlus()),
        ("LRPZPlus", ZPlus()),
        ("LRPZPlusFast", ZPlus()),
        ("LRPZ_boxed_input_layer_rule", ZBox()),
        ("LRPZ_Flat_input_layer_rule", Flat()),
        ("InputTimesGradient", Epsilon(0.0)),
    ],
)
def test_innvestigate(data_root: Path, analyser: str, rule: Any) -> None:
    """Single layers of Keras; the references are of float32, 1e-5 of the map is their rounding."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(data_root / "innvestigate-layer-references" / f"{analyser}.hdf5") as file:
        x = torch.from_numpy(file["input"][()]).permute(0, 3, 1, 2)
        names = [name for name in file if name != "input"]
        for name in names:
            model = _keras_layer(name, file[name]).double()
            result = LRP(model, Preset("innvestigate", (Row(rule),)), bounds=(-10, 10))(x)
            assert relative(result.output, torch.from_numpy(file[name]["output"][()]).double()) < 1e-6
            theirs = torch.from_numpy(file[name]["attribution"][()]).double().permute(0, 3, 1, 2)
            difference = relative(result.scores, theirs)
            print(f"\n{analyser} {name}: {difference:.1e}")
            assert difference < 1e-5, (analyser, name)
