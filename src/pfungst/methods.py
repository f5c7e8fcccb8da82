"""Ways to explain a picture, by name: every preset of LRP, what it is compared with, and controls.

``make_method("epsilon-plus", model)`` gives a function from inputs (n, C, H, W) and targets to maps (n, H, W), which
the measures of ``quality/`` judge.  Anything else that can be called so, zennit's and Captum's among it, can be judged
beside them: ``wrap_method``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pfungst import baselines
from pfungst.errors import RelevanceError, SettingError
from pfungst.lrp import LRP, PRESETS, Preset, preset
from pfungst.lrp.preset_files import is_preset_file
from pfungst.lrp.targets import Target

Explain = Callable[[Any, Tensor, Target], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How a method explains, and what it costs: ``passes`` through the model a picture (a backward pass is one).

    ``adds_up``: its map is meant to sum to the score.  ``about``: says of a model and inputs what it chose for itself.
    ``option``: name and type of what may follow the method's name and a colon.
    """

    explain: Explain
    passes: str
    adds_up: bool = False
    about: Callable[..., str] | None = None
    option: tuple[str, type] | None = None


BASELINES: dict[str, Recipe] = {
    "gradient": Recipe(baselines.gradient, "2"),
    "gradient-x-input": Recipe(baselines.gradient_x_input, "2", True),
    "guided-backprop": Recipe(baselines.guided_backprop, "2"),
    "deconvnet": Recipe(baselines.deconvnet, "2"),
    "grad-cam": Recipe(baselines.grad_cam, "2", about=baselines.tell_layer, option=("layer", str)),
    "integrated-gradients": Recipe(baselines.integrated_gradients, "100", True, option=("steps", int)),
    "smoothgrad": Recipe(baselines.smoothgrad, "50", option=("draws", int)),
    "occlusion": Recipe(baselines.occlusion, "170", option=("window", int)),
    "deeplift": Recipe(baselines.deeplift, "4", True),
}
CONTROLS: dict[str, Recipe] = {
    "random": Recipe(baselines.random_map, "0"),
    "centre-gaussian": Recipe(baselines.centre_gaussian, "0"),
    "edges": Recipe(baselines.edges, "0"),
}
METHODS = (*PRESETS, *BASELINES, *CONTROLS)


@dataclass(frozen=True)
class Method:
    """A way to explain one model.  Called with inputs (n, C, H, W) and targets it gives maps (n, H, W), float32.

    ``kind``: preset, baseline, control (a map that knows nothing of the model), or own.
    ``make``: the same method for another model, None where nobody can say (measures that need it leave it out).
    ``passes``: through the model for one picture, in words.
    ``stored``: reads the maps (n, H, W) of pictures by their names, for maps that were made before; ``explain`` then
    raises, and measures that need maps of other pictures, classes or models leave the method out.  ``token``: what
    tells them from other maps of that name.  ``adds_up``: the map is meant to sum to the score.
    ``about``: says of inputs what the method chose for itself, for people; None where it chooses nothing.
    ``settle``: of a preset that chooses another one (``auto``) the name of that for inputs, which is kept from then on.
    """

    name: str
    kind: str
    explain: Callable[[Tensor, Target], Tensor]
    passes: str = ""
    make: Callable[[Any], Callable[[Tensor, Target], Tensor]] | None = None
    stored: Callable[[Sequence[str]], Tensor] | None = None
    token: str = ""
    adds_up: bool = True
    about: Callable[[Tensor], str] | None = None
    settle: Callable[[Tensor], str] | None = None

    def __call__(self, x: Tensor, target: Target) -> Tensor:
        return check_maps(self.explain(x, target), x, self.name)

    def of(self, model: Any) -> Method | None:
        """This method for another model, for instance one with random weights."""
        return None if self.make is None else replace(self, explain=self.make(model))


def make_method(which: str | Path | Preset, model: Any, *, bounds: Any = None, **options: Any) -> Method:
    """The method of that name (``METHODS``), or of a preset or preset file, for this model.

    ``bounds``: (low, high) of the inputs, for presets with z^B.  ``options``: of the method, such as ``layer`` of
    grad-cam, ``window`` of occlusion, ``steps`` of integrated-gradients, ``draws`` of smoothgrad, or those of ``LRP``.
    One of these four may be part of the name: "grad-cam:layer3", "occlusion:16".
    Raises SettingError for a name or an option that there is not.
    """
    if isinstance(which, Preset) or is_preset_file(which) or which in PRESETS:
        chosen = preset(which)
        name, kind, passes = chosen.name, "preset", "3 to 5"
        adds_up, about = True, None

        def make(model: Any) -> Callable[[Tensor, Target], Tensor]:
            return _Relevance(LRP(model, chosen, bounds=bounds, **options))

    else:
        name, known = str(which), {**BASELINES, **CONTROLS}
        plain, colon, value = name.partition(":")
        if plain not in known:
            raise SettingError(f"there is no method {which!r}", f"the methods are {', '.join(METHODS)}")
        recipe = known[plain]
        if colon:
            options = {**options, **_read_option(name, recipe, value)}
        passes, adds_up = recipe.passes, recipe.adds_up
        kind = "control" if plain in CONTROLS else "baseline"
        about = None if recipe.about is None else functools.partial(recipe.about, model, **options)

        def make(model: Any) -> Callable[[Tensor, Target], Tensor]:
            return functools.partial(recipe.explain, model, **options)

    explain = make(model)
    settle = explain.settle if isinstance(explain, _Relevance) and explain.lrp.preset.automatic else None
    return Method(name, kind, explain, passes, make, adds_up=adds_up, about=about, settle=settle)


def _read_option(name: str, recipe: Recipe, value: str) -> dict[str, Any]:
    if recipe.option is None:
        raise SettingError(f"{name!r}: this method takes nothing after a colon", "give its name alone")
    word, kind = recipe.option
    if not value or (kind is int and not value.isdecimal()):
        raise SettingError(f"{name!r}: {word} is {value!r}", f"give {'a number' if kind is int else 'a module'}")
    return {word: kind(value)}


@dataclass(frozen=True)
class _Relevance:
    """LRP's maps, summed over channels."""

    lrp: LRP

    def __call__(self, x: Tensor, target: Target) -> Tensor:
        scores: Any = self.lrp(x, target).scores
        if not isinstance(scores, Tensor) or scores.dim() != 4:
            raise RelevanceError("the model's input is no picture (n, channels, height, width)", "use pfungst.LRP")
        return scores.detach().sum(1)

    def settle(self, x: Tensor) -> str:
        """The preset that it takes for these inputs."""
        self.lrp.trace(x[:1])  # what the model calls is known after it ran
        return self.lrp.preset.name


def wrap_method(name: str, explain: Callable[[Tensor, Any], Any]) -> Method:
    """Anything that makes maps (n, H, W) or (n, C, H, W) of inputs and targets; channels are summed."""

    def explain_tensor(x: Tensor, target: Target) -> Tensor:
        return torch.as_tensor(explain(x, target))

    return Method(name, "own", explain_tensor, "unknown")


def stored_method(name: str, read: Callable[[Sequence[str]], Tensor], token: str = "") -> Method:
    """Maps that were made before, read by the names of their pictures."""

    def explain(x: Tensor, target: Target) -> Tensor:
        raise SettingError(f"{name} is maps of certain pictures", "give a method for other ones")

    return Method(name, "own", explain, "0", stored=read, token=token)


def check_maps(maps: Tensor, x: Tensor, name: str) -> Tensor:
    """Maps (n, H, W), float32, on the device of the inputs x; channels, if there are any, summed.

    Raises RelevanceError for another shape.  NaN and infinity stay: what is judged is told so.
    """
    maps = maps.detach()
    if maps.dim() == 4:
        maps = maps.sum(1)
    if maps.shape != (len(x), *x.shape[2:]):
        raise RelevanceError(
            f"{name} gives maps of shape {tuple(maps.shape)} for inputs of {tuple(x.shape)}",
            "give (n, height, width) or (n, channels, height, width)",
        )
    return maps.to(device=x.device, dtype=torch.float32)
