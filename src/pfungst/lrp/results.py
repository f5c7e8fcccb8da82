"""What an explanation returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pfungst.errors import SettingError


@dataclass(frozen=True)
class Relevance:
    """The result of one explanation of n samples.

    scores     relevance of every input entry, in units of the output: a tensor of the input's shape; for a tuple of
               inputs a tuple (None for what gets no relevance), for a dict of inputs or several named ones a dict
    output     the model's output, (n, outputs), as without pfungst; of several the one that was explained
    target     the explained output of each sample, (n,), or the target if it is more than an index
    explained  the explained number f of each sample, (n,)
    absorbed   what biases and stabilisers took, (n,) float64: f = Σ scores + absorbed
    ledger     the same by node, each (n,) float64; "target", "condition:LAYER" and "beside:LAYER" are what a target
               that is not linear and conditions set aside
    layers     relevance at the outputs of the layers asked for
    """

    scores: Any
    output: Tensor
    target: Any
    explained: Tensor
    absorbed: Tensor
    ledger: dict[str, Tensor]
    layers: dict[str, Tensor] = field(default_factory=dict)
    _again: Callable[[str], Tensor] | None = field(default=None, repr=False, compare=False)

    def at(self, layer: str) -> Tensor:
        """Relevance at the output of a layer, by its module path ("layer3.0"); computed now if not asked for before.

        "layer3.0:2" is the second call of a module that runs more than once.
        """
        if layer in self.layers:
            return self.layers[layer]
        if self._again is None:
            raise SettingError(f"no relevance was kept at {layer!r}", f"LRP(...)(x, layers=[{layer!r}])")
        return self._again(layer)

    def _repr_html_(self) -> str:
        from pfungst.cards import show_relevance  # Pillow is for those who look

        return show_relevance(self)
