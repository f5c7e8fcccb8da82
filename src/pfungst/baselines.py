"""What relevance is compared with: gradients and their relatives, Grad-CAM, occlusion, and controls without content.

Each is a function of (model, x, target) with x (n, C, H, W) and gives one map a picture, (n, H, W); ``methods.py`` has
them by name.  None of them changes the model: guided backpropagation replaces the backward pass of ReLUs wherever they
are called, in modules or in functional code, and Grad-CAM looks at a layer for the time of one forward pass.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pfungst.errors import RelevanceError, SettingError, need
from pfungst.lrp.modules import ask_model, first_tensor, module_paths, visiting
from pfungst.lrp.targets import Target, begin

Model = Callable[[Tensor], Any]


def score(model: Model, x: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """(Σ c y, f), both (n,): the first has the gradient of the target, the second is its value."""
    output = ask_model(model, x)
    start = begin(target, output.detach())
    return (start.c * output).flatten(1).sum(1), start.explained


def raw_gradient(model: Model, x: Tensor, target: Target) -> Tensor:
    """∂f/∂x, (n, C, H, W)."""
    with torch.enable_grad():
        asked = x.detach().clone().requires_grad_()
        value, _ = score(model, asked, target)
        if not value.requires_grad:
            raise RelevanceError("the output does not depend on the input by torch functions", "remove no_grad, detach")
        (gradient,) = torch.autograd.grad(value.sum(), asked)
    return gradient


def gradient(model: Model, x: Tensor, target: Target) -> Tensor:
    """Sensitivity: max over channels of |∂f/∂x|.  Source: Simonyan et al. 2014."""
    return raw_gradient(model, x, target).abs().amax(1)


def gradient_x_input(model: Model, x: Tensor, target: Target) -> Tensor:
    """Σ over channels of x ∂f/∂x.  Source: Shrikumar et al. 2016."""
    return (x * raw_gradient(model, x, target)).sum(1)


def integrated_gradients(model: Model, x: Tensor, target: Target, steps: int = 50) -> Tensor:
    """Σ over channels of x times the mean gradient on the way from 0 to x; 0 is the mean colour of usual inputs.

    The integral is Gauss-Legendre's with ``steps`` places.  Source: Sundararajan et al. 2017.
    """
    places, weights = np.polynomial.legendre.leggauss(steps)
    total = torch.zeros_like(x)
    for place, weight in zip((1 + places) / 2, weights / 2, strict=True):
        total += raw_gradient(model, float(place) * x, target) * float(weight)
    return (x * total).sum(1)


def smoothgrad(model: Model, x: Tensor, target: Target, draws: int = 25, noise: float = 0.15) -> Tensor:
    """Max over channels of |the mean gradient of ``draws`` noisy copies|; drawn from the picture's own content.

    ``noise``: the standard deviation as a share of the picture's range.  Source: Smilkov et al. 2017.
    """
    spread = noise * (x.flatten(1).amax(1) - x.flatten(1).amin(1)).view(-1, 1, 1, 1)
    total = torch.zeros_like(x)
    for draw in range(draws):
        total += raw_gradient(model, x + spread * draw_noise(x, draw), target)
    return (total / draws).abs().amax(1)


def guided_backprop(model: Model, x: Tensor, target: Target) -> Tensor:
    """L2 norm over channels of the gradient whose ReLUs hand on positive gradients only.

    Source: Springenberg et al. 2015.  Raises RelevanceError for models that call no ReLU.
    """
    return _through_relus(model, x, target, guided=True).norm(dim=1)


def deconvnet(model: Model, x: Tensor, target: Target) -> Tensor:
    """As guided backpropagation, with ReLUs that look at the gradient alone.  Source: Zeiler and Fergus 2014."""
    return _through_relus(model, x, target, guided=False).norm(dim=1)


def _through_relus(model: Model, x: Tensor, target: Target, guided: bool) -> Tensor:
    mode = _Relus(guided)
    with mode:
        result = raw_gradient(model, x, target)
    if not mode.seen:
        raise RelevanceError("the model calls no ReLU", "take gradient or a preset: this is defined for ReLU")
    return result


_PLAIN = {torch.relu, functional.relu, Tensor.relu, functional.relu6}
_IN_PLACE = {torch.relu_, functional.relu_, Tensor.relu_}


class _Relus(TorchFunctionMode):
    """Replaces the backward pass of every ReLU that is called, by modules or not; the forward pass is the same."""

    def __init__(self, guided: bool) -> None:
        super().__init__()
        self.guided, self.seen = guided, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _PLAIN and func not in _IN_PLACE:
            return func(*args, **kwargs)
        self.seen += 1
        (x,) = args[:1] or (kwargs["input"],)
        most = 6.0 if func is functional.relu6 else None
        y: Tensor = _Relu.apply(x, self.guided, most)
        in_place = func in _IN_PLACE or kwargs.get("inplace") or (len(args) > 1 and args[1] is True)
        return x.copy_(y) if in_place else y


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, guided: bool, most: float | None) -> Tensor:
        y = x.clamp(0, most)
        ctx.save_for_backward((y == x) & (x > 0) if guided else None)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        positive = grads[0].clamp(min=0)
        return (positive if mask is None else positive * mask), None, None


def grad_cam(model: nn.Module, x: Tensor, target: Target, layer: str | None = None) -> Tensor:
    """ReLU of Σ_k α_k A_k over the channels of a layer, α_k its mean gradient; bilinearly enlarged to the input's size.

    ``layer``: path of a module that returns (n, channels, height, width); by default the last that does, of more than
    one place and before any pooling.  Source: Selvaraju et al. 2017.
    """
    name, activation, value = _watch(model, x, target, layer)
    (slope,) = torch.autograd.grad(value.sum(), activation, allow_unused=True)
    if slope is None:
        raise RelevanceError(f"the output does not depend on layer {name}", "name another one with layer=")
    cam = (slope.mean((2, 3), keepdim=True) * activation.detach()).sum(1, keepdim=True).clamp(min=0)
    return functional.interpolate(cam, x.shape[2:], mode="bilinear", align_corners=False)[:, 0]


def tell_layer(model: nn.Module, x: Tensor, layer: str | None = None) -> str:
    """What Grad-CAM looks at in this model, in words."""
    name, activation, _ = _watch(model, x[:1], None, layer)
    channels, height, width = activation.shape[1:]
    return f"grad-cam looks at layer {name}: {channels} channels of {height} x {width}"


def _watch(model: nn.Module, x: Tensor, target: Target, layer: str | None) -> tuple[str, Tensor, Tensor]:
    """Name and activation of the layer, and the scores (n,), with what autograd needs to know."""
    paths = module_paths(model)
    if layer is not None and layer not in paths:
        raise SettingError(f"the model has no layer {layer!r}", f"some of them: {', '.join(list(paths)[-6:])}")
    kept: dict[str, Tensor] = {}
    pooled: list[Tensor] = []

    def visit(name: str, output: Any) -> None:
        tensor = first_tensor(output)
        if layer is None and tensor is not None and "pool" in type(paths[name.partition(":")[0]]).__name__.lower():
            pooled.append(tensor)
        if any(tensor is one for one in pooled):  # what a module with a pooling at its end returns, too
            return
        if tensor is not None and tensor.dim() == 4 and tensor.requires_grad and (layer or tensor[0, 0].numel() > 1):
            kept.clear()
            kept[name] = tensor

    with torch.enable_grad():
        asked = x.detach().clone().requires_grad_()
        with visiting(model, [layer] if layer is not None else list(paths), visit):
            value, _ = score(model, asked, target)
    if not kept:
        raise RelevanceError(
            f"no layer{'' if layer is None else f' {layer}'} returns (n, channels, height, width)",
            "Grad-CAM needs one: name it with layer=, or take another method",
        )
    ((name, activation),) = kept.items()
    return name, activation, value


def occlusion(model: Model, x: Tensor, target: Target, window: int | None = None) -> Tensor:
    """How much f falls where a window is set to 0 (the mean colour), mean over the windows over a pixel.

    ``window``: its side in pixels, a seventh of the picture's by default; it moves by half of that.
    Source: Zeiler and Fergus 2014.
    """
    height, width = x.shape[2:]
    side = max(2, round(min(height, width) / 7)) if window is None else window
    step = max(1, side // 2)
    tops, lefts = (sorted({*range(0, max(1, size - side), step), max(0, size - side)}) for size in (height, width))
    total, count = x.new_zeros(len(x), height, width), x.new_zeros(height, width)
    with torch.no_grad():
        _, before = score(model, x, target)
        for top in tops:
            for left in lefts:
                place = (slice(top, top + side), slice(left, left + side))
                hidden = x.clone()
                hidden[(slice(None), slice(None), *place)] = 0
                _, after = score(model, hidden, target)
                total[(slice(None), *place)] += (before - after)[:, None, None]
                count[place] += 1
    return total / count


def deeplift(model: nn.Module, x: Tensor, target: Target) -> Tensor:
    """Captum's DeepLIFT (rescale rule) against the input 0, summed over channels.  Source: Shrikumar et al. 2017.

    Raises MissingExtra without captum, and RelevanceError where the sum misses f(x) - f(0) by more than 5 % of the
    greatest difference: activations that are no modules are unseen by it.
    """
    attr = need("captum.attr", "methods", "DeepLIFT comes from captum, which is not installed")
    with torch.no_grad():
        output = ask_model(model, x)
    index = begin(target, output).index
    if not isinstance(index, Tensor):
        raise SettingError("DeepLIFT explains one output of each sample", "give indices as the target")
    asked = x.detach().clone().requires_grad_()
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Captum says that it hooks the activations for a moment
        scores, delta = attr.DeepLift(model).attribute(asked, target=index, return_convergence_delta=True)
    scale = float(output.gather(1, index[:, None]).abs().max())
    if float(delta.abs().max()) > 0.05 * max(scale, 1e-6):
        raise RelevanceError(
            f"Captum's DeepLIFT misses the output by {float(delta.abs().max()):.3g} of {scale:.3g}",
            "its activations are no modules, are used twice or work in place: take another method",
        )
    return scores.detach().sum(1)


# ---- controls: maps that know nothing of the model -----------------------------------------------------------------


def sum_content(one: Tensor) -> int:
    """A checksum of a picture's values, from which its random draws come, 32 bits."""
    return zlib.crc32(np.ascontiguousarray(one.detach().float().cpu().numpy()).tobytes())


def draw_noise(x: Tensor, draw: int = 0) -> Tensor:
    """Standard normal numbers of the shape of x, for each picture from its own content: no batch changes them."""
    drawn = []
    for one in x:
        seed = sum_content(one) + draw
        drawn.append(torch.randn(one.shape, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(drawn).to(x)


def random_map(model: Any, x: Tensor, target: Target) -> Tensor:
    """Control: independent normal numbers."""
    return draw_noise(x[:, :1])[:, 0]


def centre_gaussian(model: Any, x: Tensor, target: Target) -> Tensor:
    """Control: a Gaussian in the middle, its standard deviation a quarter of the side; the same for every picture."""
    axes = [torch.linspace(-2, 2, size, device=x.device, dtype=x.dtype) for size in x.shape[2:]]
    bump = torch.exp(-(axes[0][:, None] ** 2 + axes[1][None] ** 2) / 2)
    return bump.expand(len(x), *bump.shape).clone()


def edges(model: Any, x: Tensor, target: Target) -> Tensor:
    """Control: the length of the picture's Sobel gradient, of the mean over its channels."""
    kernel = x.new_tensor([[1, 2, 1], [0, 0, 0], [-1, -2, -1]])
    grey = functional.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    slopes = functional.conv2d(grey, torch.stack([kernel, kernel.T])[:, None])
    return slopes.norm(dim=1)
