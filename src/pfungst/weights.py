"""Parameters from a file into a model, and the digest that names a model.

Only tensors are read: a pickle that would run code is refused.
"""

from __future__ import annotations

import hashlib
import inspect
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pfungst.errors import ModelError, first_line

_WRAPPERS = ("state_dict", "model_state_dict", "model")
# What data-parallel training and torch.compile put before every name.
_PREFIXES = ("module.", "_orig_mod.")
_LISTED = 5


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of a .pt or .pth file that holds nothing but tensors.

    Raises ModelError: no such file, another kind of file, damaged, or a pickle that is more than tensors.
    """
    path = Path(path).expanduser()
    kinds = "give a .safetensors file, or a .pt or .pth file with a state dict"
    if not path.is_file():
        raise ModelError(f"the weights file {path} does not exist", kinds)
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as error:  # The reader raises its own kind and several others.
            raise ModelError(f"{path} is not a readable safetensors file: {error}", kinds) from error
    if suffix not in (".pt", ".pth"):
        raise ModelError(f"weights of the kind {suffix or path.name!r} are not supported", kinds)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        why = first_line(error)
        raise ModelError(
            f"{path} is refused: it is a pickle that holds more than tensors (or is damaged), and loading one runs "
            f"whatever code is in it ({why})",
            "save the parameters alone, where the file comes from: torch.save(model.state_dict(), 'weights.pt'), "
            "or safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')",
        ) from error
    except Exception as error:
        why = first_line(error)
        raise ModelError(f"{path} cannot be read as a state dict: {why}", kinds) from error
    return _unwrap(content, path)


def _unwrap(content: Any, path: Path) -> dict[str, torch.Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not content:
        raise ModelError(f"{path} holds {type(content).__name__}, not a state dict", "save model.state_dict()")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ModelError(f"{path} holds no tensors under names", "save model.state_dict()")
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def put_weights(module: nn.Module, weights: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Load ``weights`` into ``module``; every parameter must be given, and nothing else.

    Raises ModelError that lists the first of what is missing, unexpected, or of another shape.
    """
    own = module.state_dict()
    # One tensor under two names is stored once in some files; loading one of them fills both.
    loaded = {own[key].data_ptr() for key in weights if key in own and own[key].numel()}
    missing = [
        key
        for key, value in own.items()
        if key not in weights and not key.endswith("num_batches_tracked") and value.data_ptr() not in loaded
    ]
    unexpected = [key for key in weights if key not in own]
    shapes = [
        f"{key} (file {tuple(value.shape)}, model {tuple(own[key].shape)})"
        for key, value in weights.items()
        if key in own and value.shape != own[key].shape
    ]
    wrong = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if any(wrong.values()):
        what = "; ".join(f"{len(keys)} {kind}: {_first(keys)}" for kind, keys in wrong.items() if keys)
        raise ModelError(
            f"the weights {source} do not fit the model: {what}",
            "give weights that were saved from this very architecture, or the architecture they came from",
        )
    try:
        module.load_state_dict(dict(weights), strict=False)
    except RuntimeError as error:
        raise ModelError(f"the weights {source} do not fit the model: {error}") from error


def digest_module(module: nn.Module) -> str:
    """sha256 (hex) over structure, code of the model's own classes, and all parameters and buffers.

    The same on every device and on every start; the code of torch itself is left out.
    """
    total = hashlib.sha256(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(module)).encode())
    for kind in sorted({type(part) for part in module.modules()}, key=lambda kind: kind.__qualname__):
        total.update(f"\n{kind.__module__.split('.')[0]}:{kind.__qualname__}\n".encode())
        if not kind.__module__.startswith("torch.") and not hasattr(module, "graph"):
            total.update(_source(kind.forward).encode())
    if hasattr(module, "graph"):
        total.update(str(getattr(module, "code", module.graph)).encode())
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        total.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def _source(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:_LISTED]) + (f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else "")
