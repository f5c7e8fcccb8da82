"""How torch functions are called: arguments by name, in-place forms, and the place in the model's code."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def is_nonnegative(value: Any) -> bool:
    """A constant operand whose entries are all >= 0."""
    if isinstance(value, Tensor):
        return bool((value >= 0).all())
    return isinstance(value, int | float) and value >= 0


def other_operand(x: Tensor, args: Any, kwargs: Any, default: float) -> Any:
    """What ``x`` is added to or multiplied with in a call of two operands."""
    return next((v for v in (*args, kwargs.get("other")) if v is not x and v is not None), default)


def as_function_of(x: Tensor, func: Callable[..., Any], args: Any, kwargs: Any) -> Callable[[Tensor], Tensor]:
    """The call with another tensor in the place of ``x``, all else the same."""

    here = [i for i, v in enumerate(args) if v is x]
    words = [k for k, v in kwargs.items() if v is x]
    # Not ``x`` itself: what is kept for the way back would keep it, and the graph behind it, alive.
    others, named = [None if v is x else v for v in args], {k: v for k, v in kwargs.items() if v is not x}

    def compute(value: Tensor) -> Tensor:
        positional = [value if i in here else v for i, v in enumerate(others)]
        result: Tensor = func(*positional, **named, **dict.fromkeys(words, value))
        return result

    return compute


def as_list(result: Any) -> list[Any]:
    """What a function returns, one tensor or several, as a list."""
    return [result] if isinstance(result, Tensor) else list(result)


def padding_of(func: Callable[..., Any], name: str, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments of ``F.pad`` and ``aten.constant_pad_nd``, which are built in, by name."""
    fields = ("input", "pad", "value") if name == "constant_pad_nd" else ("input", "pad", "mode", "value")
    return bound(func, args, kwargs, fields)


def as_tuple(value: Any, dims: int) -> tuple[int, ...]:
    """One number for all of ``dims`` axes, or a number for each."""
    values = tuple(value) if isinstance(value, list | tuple | torch.Size) else (value,)
    return tuple(int(v) for v in (values * dims if len(values) == 1 else values))


@lru_cache(maxsize=512)
def _signature(func: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(func)
    except (TypeError, ValueError):  # built in
        return None


def overload(func: Callable[..., Any]) -> bool:
    """``torch.ops.aten.add.Tensor`` and the like, of which the programs of torch.export consist."""
    return hasattr(func, "overloadpacket")


def bound(func: Callable[..., Any], args: Any, kwargs: Any, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """Arguments by name: from the function's own signature, or from ``names`` where it is built in."""
    if overload(func):
        names = tuple(argument.name for argument in func._schema.arguments)  # type: ignore[attr-defined]
    elif not names:
        signature = _signature(func)
        if signature is None:
            return dict(kwargs)
        return dict(signature.bind(*args, **kwargs).arguments)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def out_of_place(
    func: Callable[..., Any], name: str, in_place: bool, args: Any, kwargs: Any
) -> tuple[Callable[..., Any], Any, Any, bool]:
    """The same call without its in-place effect, and whether it had one."""
    if in_place:
        if overload(func):
            plain = _out_of_place_overload(func)
        else:
            owners = [o for o in (torch.Tensor, functional, torch) if hasattr(o, name)]
            plain = getattr(owners[0], name)
        return plain, args, kwargs, True
    signature = None if overload(func) else _signature(func)
    if signature is None or "inplace" not in signature.parameters:
        return func, args, kwargs, False
    arguments = signature.bind(*args, **kwargs)
    asked = bool(arguments.arguments.get("inplace", False))
    arguments.arguments["inplace"] = False
    return func, arguments.args, arguments.kwargs, asked


def _out_of_place_overload(func: Any) -> Callable[..., Any]:
    """``aten.relu.default`` of ``aten.relu_.default``; the two overloads can have different names."""
    packet = getattr(torch.ops.aten, func.overloadpacket.__name__.removesuffix("_"))
    kinds = [str(argument.type) for argument in func._schema.arguments]
    fitting = {
        overload: getattr(packet, overload)
        for overload in packet.overloads()
        if [str(argument.type) for argument in getattr(packet, overload)._schema.arguments] == kinds
    }
    plain: Callable[..., Any] = fitting.get(func._overloadname) or next(iter(fitting.values()))
    return plain


def where() -> str:
    """File and line of the model's own code that made the present call."""
    frame = sys._getframe(1)
    here, library = (f.rsplit("/", 1)[0] + "/" for f in (__file__, torch.__file__))
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((here, library, "<")):
            return f"{file.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
