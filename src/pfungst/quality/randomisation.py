"""Top-down randomisation: the map should change when the model forgets what it learned.  A smoke test only.

alike_head   Spearman correlation of |R| with the map of the model whose last layer has random weights
alike_whole  the same for the model whose weights are all random

1 means that the map does not depend on what was learned.  That is all it can say: which method is better than another
cannot be read from it (Adebayo et al. 2018 proposed it as a check; Binder et al. 2023, "Shortcomings of top-down
randomization-based sanity checks", show that maps without structure score best and that scales survive randomisation).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pfungst.errors import SettingError
from pfungst.quality.questions import Question, Scores, correlate, ranks


def score_randomisation(question: Question, *, seed: int = 0) -> Scores:
    """Both; the model itself is not changed, copies of it are."""
    method, model = question.method, question.model
    if method is None or method.make is None or not isinstance(model, nn.Module):
        raise SettingError("randomisation without a method for other models", "give a method by name and a module")
    layers = [name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    if not layers:
        raise SettingError("the model has no weights to randomise", "leave randomisation out")
    figures = {}
    for title, chosen in (("alike_head", layers[-1:]), ("alike_whole", layers)):
        other = method.of(randomise(model, chosen, seed))
        assert other is not None
        figures[title] = _alike(question, other)
    return Scores(figures)


def randomise(model: nn.Module, layers: list[str], seed: int) -> nn.Module:
    """A copy whose weights in these layers are drawn anew: the values of each tensor, shuffled.

    A shuffled tensor keeps the scale that later layers and norms expect, so that outputs stay finite.
    """
    fresh = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in layers:
            for parameter in fresh.get_submodule(name).parameters(recurse=False):
                turn = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
                parameter.copy_(parameter.flatten()[turn].view_as(parameter))
    return fresh


def _alike(question: Question, other: Callable[[Tensor, Any], Tensor]) -> Tensor:
    one, two = question.maps, other(question.x, question.target)
    return correlate(ranks(one.abs().flatten(1)), ranks(two.abs().flatten(1)))
