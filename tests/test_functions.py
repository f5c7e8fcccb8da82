"""Every row of the table, in every spelling that torch has of it.

A spelling (``torch.f``, ``Tensor.f``, an operator, ``Tensor.f_``, ``F.f``, ``inplace=True``, keywords, every
``torch.ops.aten`` overload) is tested with the arguments of ``function_cases.py`` if torch takes them without the
engine.  Each is put into a model between two dense layers.
"""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from function_cases import CASES, CENSUS, Case, const
from torch import Tensor, nn
from torch.nn import functional as F

from pfungst.lrp import LRP
from pfungst.lrp.functions import ALIASES, TABLE, plain_name

NAMESPACES = {
    "torch": torch, "Tensor": torch.Tensor, "functional": torch.functional, "F": F, "special": torch.special,
    "linalg": torch.linalg, "_nn": torch._C._nn,
}  # fmt: skip
FUNCTIONS = (
    types.FunctionType | types.BuiltinFunctionType | types.MethodDescriptorType | types.WrapperDescriptorType
    | types.GetSetDescriptorType
)  # fmt: skip


@lru_cache
def spellings() -> dict[str, dict[str, Callable[..., Any]]]:
    """Row -> label -> function, of all that torch calls by a name of the table."""
    found: dict[str, dict[str, Callable[..., Any]]] = {}

    def add(label: str, function: Any) -> None:
        row = plain_name(function.__get__ if isinstance(function, types.GetSetDescriptorType) else function)[0]
        if row in TABLE:
            found.setdefault(row, {})[label] = function

    for space, holder in NAMESPACES.items():
        for name in dir(holder):
            function = inspect.getattr_static(holder, name) if holder is torch.Tensor else getattr(holder, name)
            if isinstance(function, FUNCTIONS) and not isinstance(function, type):
                add(f"{space}.{name}", function)
    for name in sorted({s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("aten::")}):
        packet = getattr(torch.ops.aten, name.removeprefix("aten::"), None)
        for overload in packet.overloads() if packet is not None else ():
            function = getattr(packet, overload)
            kinds = [str(argument.type) for argument in function._schema.arguments if not argument.is_out]
            if len(kinds) == len(function._schema.arguments) and any("Tensor" in kind for kind in kinds):
                add(f"aten.{name.removeprefix('aten::')}.{overload}", function)
    return found


def calls(row: str) -> Iterator[tuple[str, Callable[..., Any], bool]]:
    """Label, ``call(args, kwargs)`` and whether it changes its first argument."""
    for label, function in spellings().get(row, {}).items():
        if isinstance(function, types.GetSetDescriptorType):
            yield label, lambda args, kwargs, f=function: f.__get__(args[0]), False
            continue
        yield label, lambda args, kwargs, f=function: f(*args, **kwargs), plain_name(function)[1]
        if not inspect.isfunction(function) or "__" in label:
            continue
        try:
            signature = inspect.signature(function)
        except ValueError:  # a wrapper of something built in
            continue
        if not any(p.kind == p.VAR_POSITIONAL for p in signature.parameters.values()):
            yield (
                f"{label} by keywords",
                lambda args, kwargs, f=function, s=signature: f(**s.bind(*args, **kwargs).arguments),
                False,
            )
        if "inplace" in signature.parameters:
            yield (
                f"{label} inplace=True",
                lambda args, kwargs, f=function: f(*args, **{**kwargs, "inplace": True}),
                True,
            )


class Between(nn.Module):
    """dense -> the function -> dense."""

    def __init__(self, case: Case, call: Callable[..., Any], in_place: bool) -> None:
        super().__init__()
        self.case, self.call, self.in_place = case, call, in_place
        size = torch.Size(case.shape).numel()
        self.first = nn.Linear(5, size).double()
        self.first.weight.data, self.first.bias.data = const(size, 5, seed=1) / 2, const(size, seed=2) / 2

    def middle(self, x: Tensor) -> Tensor:
        case = self.case
        h = case.before(self.first(x).reshape(len(x), *case.shape))
        args = case.args(h)
        result = self.call(args, case.kwargs)
        if self.in_place:
            result = args[0]
        result = case.after(result)
        if isinstance(result, list | tuple):
            parts = [part.reshape(len(x), -1) for part in result if part.is_floating_point()]
            result = torch.cat(parts, 1)
        return (h + result if case.beside else result).reshape(len(x), -1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.middle(x)
        return F.linear(h, const(3, h.shape[1], seed=6), const(3, seed=7))


X = const(2, 5, seed=8)


def plainly(model: Between) -> Tensor | None:
    """The model's output without the engine, None if torch does not take these arguments in this spelling."""
    x = X[: model.case.batch]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            if model.middle(x).dtype != torch.float64:
                return None
            torch.manual_seed(0)
            return model(x)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError, AssertionError, AttributeError):
        return None


def _wrong(model: Between, which: str, expected: Tensor, known: list[tuple[Tensor, Tensor]]) -> str:
    """What is wrong with the relevance of a model; ``known``: outputs and relevance of the same function so far."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = LRP(model, which)(X[: model.case.batch], 1)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    if not torch.equal(result.output, expected):
        return "output changed"
    if not bool(result.scores.isfinite().all()):
        return "not finite"
    gap = result.explained - result.scores.sum(1) - result.absorbed
    scale = torch.maximum(result.explained.abs(), result.scores.abs().sum(1))
    if float((gap.abs() / scale).max()) > model.case.digits:
        return f"ledger open by {gap.tolist()}"
    same = [scores for output, scores in known if torch.equal(output, expected)]
    if same and not torch.allclose(result.scores, same[0], rtol=1e-9, atol=1e-12):
        return f"relevance differs from the other spellings': {(result.scores - same[0]).abs().max():.1e}"
    known.append((expected, result.scores))
    return ""


# Spellings that are not called with values of the input, or that say themselves that they have no rule.
LEFT_OUT = {
    "F.boolean_dispatch": "it makes functions", "functional.boolean_dispatch": "it makes functions",
    "Tensor.index": "of named dimensions", "aten.requires_grad_.default": "not part of programs",
    "aten.einsum.sublist": "torch refuses it", "aten.view.dtype": "another reading of the bits: refused",
    "aten.where.Scalar": "of constants only", "aten.where.default": "gives positions",
    "aten.repeat_interleave.Tensor": "gives positions", "aten.rand_like.generator": "of a generator",
    "aten.randn_like.generator": "of a generator", "aten.copy_.float": "of a number", "aten.copy_.int": "of a number",
    "aten.__getitem__.Dict_Tensor": "of a dict", "aten.copy.Dict_Tensor": "of a dict",
    "aten.index.list_Tensor": "of a list", "aten.sort.Tensor": "of a list",
}  # fmt: skip
LEFT_OUT_ENDINGS = (".dtype", "_mode", ".reduce", ".value_reduce")  # refused; of CUDA; no derivative in torch
TWO_VALUED = {row for row, entry in TABLE.items() if entry.handler in ("product", "scale", "attention", "combination")}


# Recurrent functions and packed sequences have tests of their own: test_recurrent.py.
HERE = [row for row in TABLE if not {"lstm", "gru", "rnn", "packed", "sequence"} & set(row.split("_"))]


@pytest.mark.parametrize(
    ("row", "which"), [(row, "epsilon") for row in HERE] + [(row, "cp-lrp") for row in HERE if row in TWO_VALUED]
)
def test_every_spelling_of_every_row(row: str, which: str) -> None:
    if row == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert row in CASES, f"no arguments for {row!r} in function_cases.py"
    tested, wrong = set(), []
    for number, case in enumerate(CASES[row]):
        known: list[tuple[Tensor, Tensor]] = []
        for label, call, in_place in calls(row):
            model = Between(case, call, in_place)
            expected = None if label in LEFT_OUT else plainly(model)
            if expected is None:
                continue
            tested.add(label.split(" ")[0])
            problem = _wrong(model, which, expected, known)
            if problem:
                wrong.append(f"case {number}, {label}: {problem}")
    assert not wrong, "\n".join(wrong)
    assert tested, f"torch has no spelling of {row!r} that takes the arguments: a dead row?"
    left = {label for label in set(spellings()[row]) - tested if not label.endswith(LEFT_OUT_ENDINGS)}
    assert left <= set(LEFT_OUT), f"no arguments for {sorted(left - set(LEFT_OUT))}"


def test_every_alias_is_the_name_of_a_function() -> None:
    functions = [function for found in spellings().values() for function in found.values()]
    names = {getattr(f, "overloadpacket", f).__name__ for f in functions}
    names |= {name.removeprefix("special_") for name in names} | {name[:-1] for name in names if name[-2:] != "__"}
    assert not sorted(set(ALIASES) - names - set(dir(Tensor)))
    assert plain_name(F.max_pool2d) == ("max_pool2d", False)
    assert plain_name(torch.special.expit) == ("sigmoid", False)
    assert plain_name(torch.Tensor.__itruediv__) == ("div", True)


@pytest.mark.parametrize("function", CENSUS)
def test_functions_that_torchvision_and_timm_call(function: str) -> None:
    """Each is among the spellings tested above."""
    space, _, name = function.rpartition(".")
    label = f"{ {'nn.functional': 'F', '': 'torch'}.get(space, space) }.{name}"
    assert [row for row, found in spellings().items() if label in found and label not in LEFT_OUT]
