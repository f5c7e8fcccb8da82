"""``LRP(model, preset)``: layer-wise relevance propagation for an unmodified PyTorch model.

The forward pass runs under a ``TorchFunctionMode`` (``interception.py``), so every torch function the model calls gets
the backward pass of the table (``functions.py``).  What flows backwards is c = R / activation (relevance over
activation), not R: then the ordinary gradient is right for most functions, a sum splits its relevance in proportion
to its summands without any division, and R = c · activation wherever it is asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pfungst.errors import RelevanceError, SettingError
from pfungst.lrp.marks import Mark
from pfungst.lrp.norms import Interception
from pfungst.lrp.plan import Plan
from pfungst.lrp.presets import Preset, preset
from pfungst.lrp.targets import Target, check_output, target_indices

Bounds = tuple[Any, Any]


@dataclass(frozen=True)
class Relevance:
    """The result of one explanation of n samples.

    scores    relevance of every input entry, shape of the input, in units of the output
    output    the model's output, (n, outputs), as without pfungst
    target    the explained output of each sample, (n,)
    absorbed  what biases and stabilisers took, (n,) float64: output[target] = Σ scores + absorbed
    ledger    the same by node, each (n,) float64
    layers    relevance at the outputs of the layers asked for
    """

    scores: Tensor
    output: Tensor
    target: Tensor
    absorbed: Tensor
    ledger: dict[str, Tensor]
    layers: dict[str, Tensor] = field(default_factory=dict)
    _again: Callable[[str], Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def explained(self) -> Tensor:
        """The explained output f of each sample, (n,)."""
        return self.output.gather(1, self.target[:, None])[:, 0]

    def at(self, layer: str) -> Tensor:
        """Relevance at the output of a layer, by its module path ("layer3.0"); computed now if not asked for before."""
        if layer in self.layers:
            return self.layers[layer]
        if self._again is None:
            raise SettingError(f"no relevance was kept at {layer!r}", f"LRP(...)(x, layers=[{layer!r}])")
        return self._again(layer)


class Trace:
    """One forward pass, from which relevance can start several times (for several targets)."""

    def __init__(self, source: Tensor, output: Tensor, run: Interception, layers: dict[str, Tensor]) -> None:
        self._source, self._start, self._run, self._layers = source, output, run, layers
        self.output = output.detach()

    @property
    def steps(self) -> tuple[Any, ...]:
        return tuple(self._run.steps)

    def relevance(self, target: Target = None, *, last: bool = False) -> Relevance:
        """Relevance of the input for one output of each sample (default: the greatest).

        ``last=True`` frees the forward pass as it goes back, which saves memory.
        """
        with _normal_tensors():
            return self._relevance(target, last)

    def _relevance(self, target: Target, last: bool) -> Relevance:
        indices = target_indices(target, self.output)
        c = torch.zeros_like(self.output)
        c.scatter_(1, indices[:, None], 1)  # R starts as the output itself, so c = R / output = 1
        self._run.ledger = {}
        names = list(self._layers)
        grads = torch.autograd.grad(
            self._start,
            [self._source, *(self._layers[name] for name in names)],
            grad_outputs=c,
            retain_graph=not last,
            allow_unused=True,
        )
        if grads[0] is None:
            raise RelevanceError(
                "no relevance reaches the input: the graph is in pieces",
                "look for .numpy(), .item(), torch.tensor(x) or a cache in the model's forward",
            )
        layers = {}
        for name, g in zip(names, grads[1:], strict=True):
            tensor = self._layers[name]
            layers[name] = torch.zeros_like(tensor) if g is None else (g * tensor).detach()
        ledger = dict(self._run.ledger)
        absorbed = torch.zeros(len(c), dtype=torch.float64, device=c.device)
        for part in ledger.values():
            absorbed = absorbed + part
        return Relevance(grads[0].detach(), self.output, indices, absorbed, ledger, layers)


class LRP:
    """Explains a model with a preset of rules.

    model       any ``nn.Module`` in eval mode (or a callable); it is never changed
    preset      a name (see ``presets.PRESETS``) or a ``Preset``
    bounds      (low, high): smallest and greatest input value, numbers or tensors that broadcast against the input;
                only presets with z^B need it
    on_unknown  ``"error"``, or ``"gradient"`` to take the plain gradient of functions without a rule (plan says where)
    """

    def __init__(
        self,
        model: nn.Module | Callable[[Tensor], Tensor],
        preset: str | Preset = "epsilon-plus",
        *,
        bounds: Bounds | None = None,
        on_unknown: str = "error",
    ) -> None:
        if on_unknown not in ("error", "gradient"):
            raise SettingError(f"on_unknown={on_unknown!r}", "it is 'error' or 'gradient'")
        self.model, self.preset, self.bounds, self.on_unknown = model, _preset(preset), bounds, on_unknown

    def __call__(self, x: Tensor, target: Target = None, *, layers: Sequence[str] = ()) -> Relevance:
        """Explain ``x`` (n, ...): one output of each sample, by default its greatest.  See ``Relevance``."""
        result = self.trace(x, layers=layers).relevance(target, last=True)

        def again(layer: str) -> Tensor:
            return self.trace(x, layers=[layer]).relevance(result.target, last=True).layers[layer]

        return replace(result, _again=again)

    def attribute(self, inputs: Tensor, target: Target = None) -> Tensor:
        """The relevance alone, as Captum's attribution objects return it."""
        return self(inputs, target).scores

    def trace(self, x: Tensor, *, layers: Sequence[str] = (), _locate: bool = False) -> Trace:
        """Run the model once; ``Trace.relevance`` then explains any of its outputs."""
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or len(x) == 0:
            raise SettingError(
                f"the input is {tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else f"the input is {type(x)}",
                "give a floating-point tensor (n, ...) with at least one sample",
            )
        with _normal_tensors():
            return self._trace(x, layers, _locate)

    def _trace(self, x: Tensor, layers: Sequence[str], locate: bool) -> Trace:
        run = Interception(self.preset, _node_names(self.model), self.on_unknown, len(x), locate)
        run.keep, run.device = frozenset(layers), x.device
        with torch.enable_grad():
            source = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        run.marks.put(source, Mark(raw=True, linear=False, bounds=self._bounds(source)))
        with _kept_modules(self.model, layers, run) as kept, run:
            output = self.model(source)
        if isinstance(output, Tensor):
            output = run.current(output)
        checked = run.output(check_output(output, len(x)))
        self.preset.check_names([step.name for step in run.steps if step.kind])
        tensors = {**kept, **run.outputs}
        run.marks.writes.clear()  # they keep the memory of what in-place functions changed
        missing = [name for name in layers if name not in tensors]
        if missing:
            known = [step.name for step in run.steps if step.kind]
            raise SettingError(
                f"layer {missing[0]!r} is no module of the model that ran and returned a tensor of the input's values",
                f"some that did: {', '.join(known[:10])}",
            )
        return Trace(source, checked, run, {name: tensors[name] for name in layers})

    def plan(self, x: Tensor) -> Plan:
        """Which rule every call gets, and what this preset does to ``x`` (n, ...): see ``Plan``."""
        trace = self.trace(x, _locate=True)
        top = trace.output.topk(min(2, trace.output.shape[1]), dim=1).indices
        first = trace.relevance(top[:, 0])
        absorbed = {k: float((v / first.explained.double()).mean()) for k, v in first.ledger.items()}
        cosine = None
        if top.shape[1] == 2:
            second = trace.relevance(top[:, 1], last=True)
            cosine = float(nn.functional.cosine_similarity(first.scores.flatten(1), second.scores.flatten(1)).mean())
        return Plan(self.preset.name, trace.steps, absorbed, cosine)

    def _bounds(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        if not self.preset.needs_bounds or self.bounds is None:
            return None
        try:
            low, high = (torch.as_tensor(b, dtype=x.dtype, device=x.device).expand(x.shape) for b in self.bounds)
        except (RuntimeError, TypeError, ValueError) as error:
            raise SettingError(
                f"bounds do not fit the input of shape {tuple(x.shape)}: {error}",
                "give (low, high): two numbers, or two tensors that broadcast, e.g. of shape (3, 1, 1) for images",
            ) from error
        if bool((low > high).any()):
            raise SettingError("bounds: low is greater than high", "give (low, high) in this order")
        return low, high


@contextmanager
def _normal_tensors() -> Iterator[None]:
    """Leave the caller's inference mode, whose tensors cannot be kept for the way back."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            yield
    else:
        yield


def _preset(which: str | Preset) -> Preset:
    return preset(which)


def _node_names(model: Any) -> dict[int, str]:
    """Module path of every parameter and buffer, by the tensor's id: "layer1.0.conv1" for its weight."""
    if not isinstance(model, nn.Module):
        return {}
    named = [*model.named_buffers(), *model.named_parameters()]
    return {id(tensor): name.rpartition(".")[0] or name for name, tensor in named}


@contextmanager
def _kept_modules(model: Any, layers: Sequence[str], run: Interception) -> Any:
    """Collect the outputs of the named modules during one forward pass.

    Forward hooks live on just these modules and just as long, and act in this thread only.
    """
    kept: dict[str, Tensor] = {}
    modules = dict(model.named_modules()) if layers and isinstance(model, nn.Module) else {}
    thread = threading.get_ident()
    handles = []
    for name in layers:
        if name not in modules:
            continue

        def keep(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            if threading.get_ident() == thread and isinstance(output, Tensor) and run.marks.get(output) is not None:
                kept[name] = run.current(output)  # now: an in-place function may change it further

        handles.append(modules[name].register_forward_hook(keep))
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
