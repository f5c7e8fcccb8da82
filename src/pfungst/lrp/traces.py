"""One forward pass, from which relevance can start several times: for several targets, conditions, or layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pfungst.errors import RelevanceError, SettingError
from pfungst.lrp.inputs import Inputs
from pfungst.lrp.places import Condition, Place, mask_for, order
from pfungst.lrp.recurrent import Interception
from pfungst.lrp.results import Relevance
from pfungst.lrp.samples import Samples, per_sample
from pfungst.lrp.targets import Functional, Region, Start, Target, begin

Gradients = Sequence[Tensor | None]


@contextmanager
def normal_tensors() -> Iterator[None]:
    """Leave the caller's inference mode, whose tensors cannot be kept for the way back."""
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else ExitStack():
        yield


@dataclass
class Flow:
    """Relevance on its way back: the gradients put at some tensors, and how much relevance that is, (n,) float64."""

    tensors: list[Tensor]
    gradients: list[Tensor]
    amount: Tensor


class Trace:
    """One forward pass.  ``output`` is the model's; ``relevance`` explains it, as often as asked.

    Layers at which relevance is to be read, masked or started must have been named before, as ``layers``.
    """

    def __init__(
        self, inputs: Inputs, output: Tensor, run: Interception, places: dict[str, Place], layers: Sequence[str]
    ) -> None:
        self._inputs, self._start, self._run, self._places = inputs, output, run, places
        self.layers = tuple(layers)
        self.output = output.detach()

    @property
    def scores(self) -> Tensor:
        """The model's output where it is one row of scores a sample, (n, classes); otherwise an error."""
        if self.output.dim() != 2:
            raise RelevanceError(
                f"the model returns shape {tuple(self.output.shape)} for {len(self.output)} inputs, expected "
                f"({len(self.output)}, number of outputs)",
                "wrap the model so that it returns one row of scores a sample",
            )
        return self.output

    @property
    def steps(self) -> tuple[Any, ...]:
        return tuple(self._run.steps)

    @property
    def tokens(self) -> tuple[str, Tensor] | None:
        """Of a transformer traced for a plan: its last layer norm, and the norms of the tokens that entered it."""
        return self._run.tokens

    def relevance(
        self,
        target: Target = None,
        *,
        conditions: Condition | None = None,
        start: str | None = None,
        exclude_parallel: bool = True,
        last: bool = False,
    ) -> Relevance:
        """Relevance of the input for one number a sample (default: the greatest output).  See ``LRP.__call__``.

        ``last=True`` frees the forward pass as it goes back, which saves memory.
        """
        # Autocast is for the model's own calls; what comes back has the types that they left.
        with normal_tensors(), torch.autocast(self.output.device.type, enabled=False):
            begun, flow = self._begin(target, start)
            self._run.ledger = {} if begun.rest is None else {"target": begun.rest}
            found: dict[str, Tensor] = {}
            passed: dict[str, Tensor] = {}
            places = [self._places[name] for name in self.layers]
            with ExitStack() as hooks:
                if conditions is not None and exclude_parallel:
                    flow = self._through(flow, conditions, places, found)
                elif conditions is not None:
                    passed = self._mask(conditions, hooks)
                left = [place for place in places if place.name not in found]
                gradients = self._back(flow, left, list(self._inputs.sources.values()), found, last)
            found.update(passed)
            if conditions is None and all(g is None for g in gradients):
                raise RelevanceError(
                    "no relevance reaches the input: the graph is in pieces",
                    "look for .numpy(), .item(), torch.tensor(x) or a cache in the model's forward",
                )
            return self._result(begun, gradients, found)

    def reach(self, layer: str, seed: Tensor) -> Any:
        """Send ``seed`` (shape of the layer's output) back from a layer as it is; the structure is that of scores.

        With a preset whose even region ends at the layer it counts as relevance.
        """
        with normal_tensors():
            self._run.ledger = {}
            place = self._place(layer)
            leaves = self._inputs.sources
            self._run.scratch.once = False
            found = torch.autograd.grad(
                place.tensors[-1], list(leaves.values()), seed, retain_graph=True, allow_unused=True
            )
            return self._inputs.arrange(
                {k: torch.zeros_like(t) if g is None else g for (k, t), g in zip(leaves.items(), found, strict=True)}
            )

    def _begin(self, target: Target, start: str | None) -> tuple[Start, Flow]:
        """The explained number, and the relevance with which it starts."""
        if start is None:
            begun = begin(target, self.output)
            flow = Flow([self._start], [begun.c], begun.explained.double())
        else:
            place = self._place(start)
            if place.value.dim() > 2 and not isinstance(target, Functional) and not callable(target):
                target = Region(target)  # a channel, summed over its places
            begun = begin(target, place.value)
            flow = Flow([place.tensors[-1]], [place.start(begun.c)], begun.explained.double())
        if begun.rest is not None:
            flow.amount = flow.amount - begun.rest
        return begun, flow

    def _place(self, name: str) -> Place:
        if name not in self._places:
            raise SettingError(f"no layer {name!r} was kept in this forward pass", f"trace(x, layers=[{name!r}])")
        return self._places[name]

    def _back(
        self, flow: Flow, places: Sequence[Place], ends: Sequence[Tensor], found: dict[str, Tensor], last: bool
    ) -> Gradients:
        """Send relevance back; what arrives at ``places`` joins ``found``, the gradients at ``ends`` are returned."""
        wanted = [tensor for place in places for tensor in place.tensors]
        gradients: list[Tensor | None] = [None] * (len(ends) + len(wanted))
        self._run.scratch.once = last
        if gradients and flow.tensors:
            gradients = list(
                torch.autograd.grad(
                    flow.tensors, [*ends, *wanted], flow.gradients, retain_graph=not last, allow_unused=True
                )
            )
        rest = iter(gradients[len(ends) :])
        for place in places:
            found[place.name] = place.relevance([next(rest) for _ in place.tensors])
        return gradients[: len(ends)]

    def _mask(self, conditions: Condition, hooks: ExitStack) -> dict[str, Tensor]:
        """Masks on the way back, as long as ``hooks`` is open; what goes round a layer is not touched.

        Returns what the masks let through at each layer, to be filled on the way back.
        """
        passed = {}
        for name, part in conditions.items():
            place = self._place(name)
            mask, passed[name] = mask_for(part, place), torch.zeros_like(place.value)
            for tensor, raw in zip(place.tensors, place.raw, strict=True):
                hook = partial(
                    self._pass, name, mask, None if raw else tensor.detach(), passed[name], self._samples(tensor)
                )
                hooks.callback(tensor.register_hook(hook).remove)
        return passed

    def _pass(
        self, name: str, mask: Tensor, value: Tensor | None, passed: Tensor, samples: Samples, g: Tensor
    ) -> Tensor:
        """A gradient under a mask; what it holds back goes to the ledger.  ``value``: the activation, if g is c."""
        relevance = g if value is None else g * value
        self._run.absorb(f"condition:{name}", (1 - mask) * relevance, samples)
        passed += mask * relevance
        return mask * g

    def _through(self, flow: Flow, conditions: Condition, places: list[Place], found: dict[str, Tensor]) -> Flow:
        """Only what passes through the layers of the conditions: back to each in turn, and on from its masked part."""
        for group in order([self._place(name) for name in conditions]):
            between = [p for p in places if p.name not in found and any(p.depends_on(q) for q in group)]
            raw = {tensor: raw for place in group for tensor, raw in zip(place.tensors, place.raw, strict=True)}
            absorbed = self._absorbed()
            gradients = self._back(flow, between, list(raw), found, last=False)
            arrived = {t: g for t, g in zip(raw, gradients, strict=True) if g is not None}
            amount = self._amount(arrived, raw)
            beside = flow.amount - (self._absorbed() - absorbed) - amount
            self._run.ledger[f"beside:{'+'.join(place.name for place in group)}"] = beside
            for place in group:
                mask = mask_for(conditions[place.name], place)
                for tensor in place.tensors:
                    if tensor in arrived:
                        arrived[tensor] = arrived[tensor] * mask
                passed = self._amount(arrived, raw)
                self._run.ledger[f"condition:{place.name}"] = amount - passed
                amount = passed
            found.update({p.name: p.relevance([arrived.get(t) for t in p.tensors]) for p in group if p in places})
            flow = Flow(list(arrived), list(arrived.values()), amount)
        return flow

    def _amount(self, gradients: dict[Tensor, Tensor], raw: dict[Tensor, bool]) -> Tensor:
        """The relevance that gradients carry, (n,) float64."""
        total = torch.zeros(len(self.output), dtype=torch.float64, device=self.output.device)
        for tensor, g in gradients.items():
            relevance = g if raw[tensor] else g * tensor.detach()
            total = total + per_sample(relevance, self._samples(tensor), len(total))
        return total

    def _samples(self, tensor: Tensor) -> Samples:
        mark = self._run.marks.get(tensor)
        return None if mark is None else mark.samples

    def _absorbed(self) -> Tensor:
        total = torch.zeros(len(self.output), dtype=torch.float64, device=self.output.device)
        for part in self._run.ledger.values():
            total = total + part
        return total

    def _result(self, begun: Start, gradients: Gradients, found: dict[str, Tensor]) -> Relevance:
        sources = self._inputs.sources
        scores = {
            name: torch.zeros_like(leaf) if g is None else g.detach()
            for (name, leaf), g in zip(sources.items(), gradients, strict=True)
        }
        layers = {name: found[name] for name in self.layers}
        return Relevance(
            self._inputs.arrange(scores),
            self.output,
            begun.index,
            begun.explained,
            self._absorbed(),
            dict(self._run.ledger),
            layers,
        )
