"""What the model is called with, and which of its tensors get relevance.

A tensor is the model's one argument, a tuple its positional and a dict its keyword arguments.  Every floating-point
tensor among them that has one entry of its leading axis a sample gets relevance, or only those chosen by name.  A name
may also be the path of a module: relevance then ends at that module's output, such as the embeddings of tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pfungst.errors import SettingError
from pfungst.lrp.modules import module_paths

Chosen = str | Sequence[str] | None


@dataclass
class Inputs:
    """The arguments of one call, with a leaf tensor in the place of each that gets relevance.

    sources  the leaves by name; those of ``modules`` join when the forward pass comes by
    arrange  relevance by name -> the structure asked for: a tensor, or a tuple or dict of tensors
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: int
    sources: dict[str, Tensor]
    modules: frozenset[str]
    arrange: Callable[[Mapping[str, Tensor]], Any]

    def check_modules(self) -> None:
        """Every module whose output was to be explained has run."""
        missing = sorted(self.modules - self.sources.keys())
        if missing:
            raise SettingError(
                f"inputs: no module {missing[0]!r} ran and returned a floating-point tensor with "
                f"{self.batch} entries in its leading axis",
                "give the path of a module as in named_modules(), or the name of an argument of forward; "
                "'path:2' is a module's second call",
            )


def read_inputs(model: Any, x: Any, chosen: Chosen = None) -> Inputs:
    """Take the arguments apart; see the module's docstring.  The caller's tensors are not changed."""
    positional, named = _arguments(x)
    keys: dict[str, Any] = {}  # the name of an argument -> its value
    names = argument_names(model, len(positional))
    keys.update(zip(names, positional, strict=True))
    keys.update(named)
    asked = (chosen,) if isinstance(chosen, str) else None if chosen is None else tuple(chosen)
    tensors = {name: value for name, value in keys.items() if isinstance(value, Tensor)}
    modules = frozenset(name for name in asked or () if name not in keys and _is_module(model, name))
    unknown = [name for name in asked or () if name not in tensors and name not in modules]
    if unknown or asked == ():
        raise SettingError(
            f"inputs: there is no tensor and no module {unknown[0]!r}" if unknown else "inputs is empty",
            f"the tensors are {', '.join(map(repr, tensors)) or 'none'}; a module's path is one of named_modules()",
        )
    batch = _batch(x, tensors, asked, bool(modules))
    able = {name: t for name, t in tensors.items() if t.is_floating_point() and t.dim() and len(t) == batch}
    wrong = [name for name in asked or () if name in tensors and name not in able]
    if wrong:
        t = tensors[wrong[0]]
        raise SettingError(
            f"the input {wrong[0]!r} is {tuple(t.shape)} {t.dtype}",
            f"only floating-point tensors with {batch} entries in the leading axis can get relevance; for tokens name "
            "the module that embeds them, e.g. inputs='embedding'",
        )
    wanted = [name for name in able if asked is None or name in asked]
    sources = {name: leaf(able[name]) for name in wanted}
    values = {name: sources.get(name, _usable(value)) for name, value in keys.items()}
    args, kwargs = tuple(values[name] for name in names), {name: values[name] for name in named}
    return Inputs(args, kwargs, batch, sources, modules, _arranger(x, chosen, names))


def _arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(x, Tensor):
        return (x,), {}
    if isinstance(x, tuple) and x:
        return x, {}
    if isinstance(x, Mapping) and x:
        return (), dict(x)
    raise SettingError(
        f"the input is {type(x)}",
        "give a floating-point tensor (n, ...), a tuple (positional arguments) or a dict (keyword arguments)",
    )


def _batch(x: Any, tensors: dict[str, Tensor], asked: Sequence[str] | None, has_modules: bool) -> int:
    """The number of samples n: the leading axis of the first tensor that gets relevance, or else of the first."""
    if isinstance(x, Tensor) and not has_modules and (not x.is_floating_point() or x.dim() < 2 or len(x) == 0):
        raise SettingError(
            f"the input is {tuple(x.shape)} {x.dtype}",
            "give a floating-point tensor (n, ...) with at least one sample; for tokens name the module that embeds "
            "them, e.g. inputs='embedding'",
        )
    named = [t for name, t in tensors.items() if asked is None or name in asked]
    sized = [t for t in named if t.is_floating_point() and t.dim() and len(t)]
    if not sized and has_modules:
        sized = [t for t in tensors.values() if t.dim() and len(t)]
    if not sized:
        raise SettingError(
            "the input has no floating-point tensor (n, ...) with at least one sample",
            "for tokens name the module that embeds them, e.g. inputs='embedding'",
        )
    return len(sized[0])


def _arranger(x: Any, chosen: Chosen, names: Sequence[str]) -> Callable[[Mapping[str, Tensor]], Any]:
    if isinstance(chosen, str):
        return lambda found: found[chosen]
    if chosen is not None:
        order = tuple(chosen)
        return lambda found: {name: found[name] for name in order}
    if isinstance(x, Tensor):
        return lambda found: found[names[0]]
    if isinstance(x, tuple):
        return lambda found: tuple(found.get(name) for name in names)
    return dict


def argument_names(model: Any, count: int) -> list[str]:
    """What ``forward`` calls its first arguments; ``input:1`` and so on where it does not say."""
    try:
        signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except (TypeError, ValueError):
        return [f"input:{i}" for i in range(count)]
    usual = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in signature.parameters.values() if p.kind in usual]
    return [names[i] if i < len(names) else f"input:{i}" for i in range(count)]


def _is_module(model: Any, name: str) -> bool:
    path = name.partition(":")[0]
    return path != "" and path in module_paths(model)


def leaf(tensor: Tensor) -> Tensor:
    """The same values as the start of a graph of its own."""
    with torch.enable_grad():
        return (tensor.clone() if tensor.is_inference() else tensor.detach()).requires_grad_()


def _usable(value: Any) -> Any:
    """A constant argument; tensors made in inference mode could not be kept for the way back."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
