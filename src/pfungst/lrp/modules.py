"""The modules of a model: their paths, what they return during one forward pass, and compiled ones run as they are."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pfungst.lrp.targets import check_output, choose_output

_WRAPPER = "_orig_mod"  # what torch.compile calls the module in its wrapper


def unwrapped(model: Any) -> Any:
    """The module that ``torch.compile`` wrapped, or the model itself."""
    while isinstance(model, nn.Module) and _WRAPPER in model._modules:
        model = model._modules[_WRAPPER]
    return model


def plain_path(name: str) -> str:
    """A module's path without the wrappers of ``torch.compile``."""
    return ".".join(part for part in name.split(".") if part != _WRAPPER)


def module_paths(model: Any) -> dict[str, nn.Module]:
    """Every module by its path; of a compiled one the module inside."""
    if not isinstance(model, nn.Module):
        return {}
    return {plain_path(name): module for name, module in model.named_modules()}


def node_names(model: Any) -> dict[int, str]:
    """Module path of every parameter and buffer, by the tensor's id: "layer1.0.conv1" for its weight."""
    if not isinstance(model, nn.Module):
        return {}
    named = [*model.named_buffers(), *model.named_parameters()]
    return {id(tensor): plain_path(name.rpartition(".")[0] or name) for name, tensor in named}


Visit = Callable[[str, Any], Any]


@contextmanager
def visiting(model: Any, paths: Iterable[str], visit: Visit) -> Iterator[None]:
    """``visit(name, output)`` after each call of the named modules; what it returns, if anything, replaces the output.

    The name is the path for a module's first call, "path:2" for its second.  The forward hooks live on just these
    modules and just as long, and act in this thread only.
    """
    modules = module_paths(model)
    thread = threading.get_ident()
    calls: dict[str, int] = {}
    handles = []
    try:
        for path in dict.fromkeys(path.partition(":")[0] for path in paths):
            if path not in modules:
                continue

            def hook(module: nn.Module, inputs: Any, output: Any, path: str = path) -> Any:
                if threading.get_ident() != thread:
                    return None
                calls[path] = calls.get(path, 0) + 1
                return visit(path if calls[path] == 1 else f"{path}:{calls[path]}", output)

            handles.append(modules[path].register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output: Any) -> Tensor | None:
    """The tensor that a module returns, or the first of a tuple or dict."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)


def replace_first(output: Any, new: Tensor) -> Any:
    """The same structure with another first tensor."""
    if isinstance(output, Tensor):
        return new
    old = first_tensor(output)
    if isinstance(output, dict):
        copy = type(output)(output)
        copy.update({key: new for key, value in output.items() if value is old})
        return copy
    items = [new if value is old else value for value in output]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


class _Stance:
    """How many threads need compiled code to run as it is written; the first sets it, the last restores it."""

    def __init__(self) -> None:
        self.lock, self.users, self.held = threading.Lock(), 0, None

    def enter(self) -> None:
        with self.lock:
            if self.users == 0:
                stance: Any = torch.compiler.set_stance("force_eager")
                stance.__enter__()
                self.held = stance
            self.users += 1

    def leave(self) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0 and self.held is not None:
                self.held.__exit__(None, None, None)
                self.held = None


_STANCE = _Stance()


@contextmanager
def as_written() -> Iterator[None]:
    """Compiled modules and functions run as they are written, so that each of their torch functions is seen.

    Nothing is compiled while the engine looks on, and nothing that was compiled is lost.
    """
    # Without torch._dynamo in memory nothing can be compiled, and its import would take a second.
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        yield
        return
    _STANCE.enter()
    try:
        yield
    finally:
        _STANCE.leave()


def ask_model(model: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    """The model's scores for a batch, (n, ...), run as it is written.  RelevanceError where it returns no scores."""
    with as_written():
        return check_output(choose_output(model(x), len(x)), len(x))
