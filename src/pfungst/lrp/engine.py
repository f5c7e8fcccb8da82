"""``LRP(model, preset)``: layer-wise relevance propagation for an unmodified PyTorch model.

The forward pass runs under a ``TorchFunctionMode`` (``interception.py``), so every torch function the model calls gets
the backward pass of the table (``functions.py``).  What flows backwards is c = R / activation (relevance over
activation), not R: then the ordinary gradient is right for most functions, a sum splits its relevance in proportion
to its summands without any division, and R = c · activation wherever it is asked for.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from pfungst.errors import SettingError
from pfungst.lrp.inputs import Chosen, Inputs, argument_names, leaf, read_inputs
from pfungst.lrp.marks import Mark
from pfungst.lrp.modules import as_written, first_tensor, node_names, replace_first, unwrapped, visiting
from pfungst.lrp.places import Condition, Place
from pfungst.lrp.plan import Plan
from pfungst.lrp.preset_files import preset as named
from pfungst.lrp.presets import Preset
from pfungst.lrp.recurrent import Interception
from pfungst.lrp.results import Relevance
from pfungst.lrp.streams import Split, batches, device_of
from pfungst.lrp.targets import Choice, Several, Target, Unit, check_output, choose_output
from pfungst.lrp.tokens import flag_tokens
from pfungst.lrp.traces import Trace, normal_tensors

Method = TypeVar("Method", bound=Callable[..., Any])


def wrapped(method: Method) -> Method:
    """The method once more, with the plain one as ``__wrapped__``: Captum's NoiseTunnel calls that."""

    @functools.wraps(method)
    def outer(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return cast(Method, outer)


Bounds = tuple[Any, Any] | Mapping[str, tuple[Any, Any]]


class LRP:
    """Explains a model with a preset of rules.

    model       any ``nn.Module`` in eval mode (or a callable); it is never changed
    preset      a name (see ``presets.PRESETS``), a preset file (``"tuned.json"``) or a ``Preset``
    bounds      (low, high): smallest and greatest input value, numbers or tensors that broadcast against the input;
                or a dict of them by input; only presets with z^B need it
    output      which of several outputs to explain: a key, attribute or place, or a function of what the model
                returns; not needed where just one is a floating-point tensor (n, ...)
    inputs      which of several inputs get relevance, by the names of ``forward``'s arguments; or paths of modules, at
                whose outputs relevance ends (``"embedding"``).  Default: every floating-point tensor (n, ...)
    on_unknown  ``"error"``, or ``"gradient"`` to take the plain gradient of functions without a rule (plan says where)
    """

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        preset: str | Path | Preset = "auto",
        *,
        bounds: Bounds | None = None,
        output: Choice = None,
        inputs: Chosen = None,
        on_unknown: str = "error",
    ) -> None:
        if on_unknown not in ("error", "gradient"):
            raise SettingError(f"on_unknown={on_unknown!r}", "it is 'error' or 'gradient'")
        self.model, self.preset, self.bounds, self.on_unknown = model, named(preset), bounds, on_unknown
        self.output, self.inputs = output, inputs

    @overload
    def __call__(
        self,
        x: Any,
        target: Several,
        *,
        layers: Sequence[str] = (),
        conditions: Condition | None = None,
        start: str | None = None,
        exclude_parallel: bool = True,
    ) -> list[Relevance]: ...

    @overload
    def __call__(
        self,
        x: Any,
        target: Target = None,
        *,
        layers: Sequence[str] = (),
        conditions: Sequence[Condition],
        start: str | None = None,
        exclude_parallel: bool = True,
    ) -> list[Relevance]: ...

    @overload
    def __call__(
        self,
        x: Any,
        target: Target = None,
        *,
        layers: Sequence[str] = (),
        conditions: Condition | None = None,
        start: str | None = None,
        exclude_parallel: bool = True,
    ) -> Relevance: ...

    def __call__(
        self,
        x: Any,
        target: Any = None,
        *,
        layers: Sequence[str] = (),
        conditions: Any = None,
        start: str | None = None,
        exclude_parallel: bool = True,
    ) -> Any:
        """Explain n samples: one number f of each, by default its greatest output.  See ``Relevance``.

        x                 a tensor (n, ...); a tuple is taken for positional, a dict for keyword arguments
        target            an index, one a sample, a target of ``targets.py``, or a function (n, ...) -> (n,) of the
                          output; ``Several([...])`` gives a list of results from one forward pass
        layers            where to keep relevance, by module path, for ``Relevance.layers``
        conditions        relevance on condition: ``{"layer3": [5, 7]}`` lets only these channels of the layer hand
                          relevance on (see ``places.mask_for``; Achtibat et al. 2023); a list of them gives a list of
                          results from one forward pass
        start             the layer at which relevance starts instead of the output; an index is then a channel of it,
                          summed over its places
        exclude_parallel  what goes round the layers of ``conditions`` (a skip connection) is set aside too; False lets
                          it reach the input
        """
        several = isinstance(target, Several) or isinstance(conditions, list | tuple)
        targets = list(target.targets) if isinstance(target, Several) else [target]
        wanted = list(conditions) if isinstance(conditions, list | tuple) else [conditions]
        if not targets or not wanted or (len(targets) > 1 and len(wanted) > 1):
            raise SettingError(
                f"{len(targets)} targets and {len(wanted)} conditions in one call",
                "give several targets or several conditions, at least one of each",
            )
        asked = [(t, c) for t in targets for c in wanted]
        keep = [*layers, *(name for c in wanted for name in c or ()), *([start] if start else [])]
        trace = self._traced(x, tuple(layers), tuple(dict.fromkeys(keep)))
        options: dict[str, Any] = {"start": start, "exclude_parallel": exclude_parallel}
        results = []
        for number, (one, condition) in enumerate(asked, 1):
            found = trace.relevance(one, conditions=condition, last=number == len(asked), **options)

            def again(layer: str, index: Any = found.target, condition: Any = condition) -> Tensor:
                once: Relevance = self(x, index, layers=[layer], conditions=condition, **options)
                return once.layers[layer]

            results.append(replace(found, _again=again))
        return results if several else results[0]

    # What Captum's classes ask of an attribution object, so that NoiseTunnel and the metrics work on this one.
    multiplies_by_inputs = True

    @property
    def forward_func(self) -> Callable[..., Any]:
        """The model, under Captum's name for it."""
        return self.model

    def has_convergence_delta(self) -> bool:
        """``attribute`` knows ``return_convergence_delta``."""
        return True

    @wrapped
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        return_convergence_delta: bool = False,
    ) -> Any:
        """The relevance alone, called as Captum's attribution objects are and returned as they do.

        inputs                    a tensor, or a tuple of tensors; all get relevance
        target                    besides what ``LRP.__call__`` takes, a tuple such as (class, row, column), or a list
                                  of them, for outputs of more axes
        additional_forward_args   further positional arguments, which get none
        return_convergence_delta  also Σ scores - f of each sample, (n,): what the ledger holds, with the other sign
        """
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        more = () if additional_forward_args is None else additional_forward_args
        arguments = (*given, *(more if isinstance(more, tuple) else (more,)))
        if isinstance(target, tuple) or (isinstance(target, list) and target and isinstance(target[0], tuple)):
            target = Unit(target)
        lrp = copy.copy(self)
        if lrp.inputs is None:
            lrp.inputs = argument_names(unwrapped(self.model), len(arguments))[: len(given)]
        found = lrp(arguments, target)
        scores = tuple(found.scores.values()) if isinstance(found.scores, dict) else (found.scores,)
        scores = scores if isinstance(inputs, tuple) else scores[0]
        return (scores, -found.absorbed.to(found.explained)) if return_convergence_delta else scores

    def stream(
        self,
        loader: Iterable[Any],
        target: Any = None,
        *,
        split: Split | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> Iterator[Relevance]:
        """Explain a whole ``DataLoader`` (or any iterable of batches), one ``Relevance`` a batch, one batch in memory.

        target   as in ``__call__``, for every batch; ``"label"`` takes the labels of the batch
        split    a function from a batch to (x, labels); by default a pair (x, labels), as torch's data sets give it,
                 or x alone
        device   where batches go; default: where the model's parameters are
        options  further arguments of ``__call__``
        """
        for x, labels in batches(loader, split, device or device_of(self.model)):
            if isinstance(target, str) and target != "label":
                raise SettingError(f"target={target!r}", "the only word for a target is 'label'")
            if isinstance(target, str) and labels is None:
                raise SettingError("target='label', but the batches have no labels", "give split=, or another target")
            yield self(x, labels if isinstance(target, str) else target, **options)

    def trace(self, x: Any, *, layers: Sequence[str] = (), _locate: bool = False) -> Trace:
        """Run the model once; ``Trace.relevance`` then explains any of its outputs."""
        return self._traced(x, tuple(layers), tuple(layers), _locate)

    def _traced(self, x: Any, layers: tuple[str, ...], keep: tuple[str, ...], locate: bool = False) -> Trace:
        """``keep``: where relevance is to be read, masked or started; ``layers``: those that results hold."""
        if self.preset.automatic:  # what the model calls is known after it ran
            looked = copy.copy(self)
            looked.preset = self.preset.chosen(())
            trace = looked._traced(x, layers, keep, locate)
            self.preset = self.preset.chosen((step.function, step.kind) for step in trace.steps)
            if self.preset == looked.preset:
                return trace
        model = unwrapped(self.model)
        with normal_tensors(), as_written():
            inputs = read_inputs(model, x, self.inputs)
            run = Interception(self.preset, node_names(model), self.on_unknown, inputs.batch, locate)
            run.keep = frozenset(keep)
            border, rule = self.preset.even or (None, None)
            run.begin_region(border, rule)
            for name, source in inputs.sources.items():
                run.marks.put(source, Mark(raw=True, linear=False, bounds=self._bounds(source, name)))
            kept: dict[str, Tensor] = {}
            visit = self._visit(inputs, run, kept, keep)
            with visiting(model, [*keep, *inputs.modules, *([border] if border else [])], visit), run:
                output = model(*inputs.args, **inputs.kwargs)
            inputs.check_modules()
            run.check_region()
            chosen = choose_output(output, inputs.batch, self.output)
            if isinstance(chosen, Tensor):
                chosen = run.current(chosen)
            chosen = run.output(check_output(chosen, inputs.batch))
            run.device = chosen.device
            self.preset.check_names([step.name for step in run.steps if step.kind])
            places = _places(run, kept, keep)
            run.settle()
            return Trace(inputs, chosen, run, places, layers)

    def _visit(self, inputs: Inputs, run: Interception, kept: dict[str, Tensor], keep: Sequence[str]) -> Any:
        """What happens at the named modules: their outputs are kept, or become sources of their own."""

        def visit(name: str, output: Any) -> Any:
            run.end_region(name)
            tensor = first_tensor(output)
            if tensor is None or not tensor.is_floating_point():
                return None
            with torch._C.DisableTorchFunction():
                tensor = run.current(tensor)  # now: an in-place function may change it further
                if name in inputs.modules and tensor.dim() and len(tensor) == inputs.batch:
                    tensor = inputs.sources[name] = leaf(tensor)
                    run.marks.put(tensor, Mark(raw=True, linear=False, bounds=self._bounds(tensor, name)))
                    output = replace_first(output, tensor)
                if name in keep and run.marks.get(tensor) is not None:
                    kept[name] = tensor
                    run.hold(tensor)
            return output if name in inputs.modules else None

        return visit

    def plan(self, x: Any, target: Target = None) -> Plan:
        """Which rule every call gets, and what this preset does to ``x``: see ``Plan``."""
        trace = self._traced(x, (), (), locate=True)
        output = trace.output
        second = None
        if target is None and output.dim() == 2 and output.shape[1] > 1:
            top = output.topk(2, dim=1).indices
            target, second = top[:, 0], top[:, 1]
        first = trace.relevance(target, last=second is None)
        absorbed = {k: float((v / first.explained.double()).mean()) for k, v in first.ledger.items()}
        cosine = None
        if second is not None:
            other = trace.relevance(second, last=True)
            one, two = [torch.cat([t.flatten(1).double() for t in _tensors(r.scores)], 1) for r in (first, other)]
            cosine = float(nn.functional.cosine_similarity(one, two).mean())
        tokens = trace.tokens
        flagged = None
        if tokens is not None and tokens[1].shape[1] > 1:
            flagged = tokens[0], flag_tokens(tokens[1][:, 1:])  # the first may be a class token
        return Plan(self.preset.name, trace.steps, absorbed, cosine, flagged)

    def _bounds(self, x: Tensor, name: str) -> tuple[Tensor, Tensor] | None:
        if not self.preset.needs_bounds or self.bounds is None:
            return None
        given = self.bounds.get(name) if isinstance(self.bounds, Mapping) else self.bounds
        if given is None:
            return None
        try:
            low, high = (torch.as_tensor(b, dtype=x.dtype, device=x.device).expand(x.shape) for b in given)
        except (RuntimeError, TypeError, ValueError) as error:
            raise SettingError(
                f"bounds do not fit the input of shape {tuple(x.shape)}: {error}",
                "give (low, high): two numbers, or two tensors that broadcast, e.g. of shape (3, 1, 1) for images",
            ) from error
        if bool((low > high).any()):
            raise SettingError("bounds: low is greater than high", "give (low, high) in this order")
        return low, high


def _places(run: Interception, kept: dict[str, Tensor], keep: Sequence[str]) -> dict[str, Place]:
    """The layers asked for, with what batch norms made of them; an error for one that did not run."""
    places = {}
    for name in keep:
        tensors = [t for t in (kept.get(name), run.outputs.get(name)) if t is not None]
        tensors += [run.merged[t] for t in tensors if t in run.merged]
        if not tensors:
            known = [step.name for step in run.steps if step.kind]
            raise SettingError(
                f"layer {name!r} is no module of the model that ran and returned a tensor of the input's values",
                f"some that did: {', '.join(known[:10])}",
            )
        distinct = tuple({id(t): t for t in tensors}.values())
        places[name] = Place(name, distinct, tuple(_is_raw(run, t) for t in distinct))
    return places


def _is_raw(run: Interception, tensor: Tensor) -> bool:
    mark = run.marks.get(tensor)
    return mark is not None and mark.raw


def _tensors(scores: Any) -> list[Tensor]:
    values = scores.values() if isinstance(scores, dict) else scores if isinstance(scores, tuple) else (scores,)
    return [value for value in values if isinstance(value, Tensor)]
