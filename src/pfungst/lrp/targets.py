"""What is explained: one number f a sample, from the model's output y, and where relevance starts because of it.

Relevance at the output is R = c · y.  A target that is linear in y, f = Σ v y, has c = v and R adds up to f.  Any other
starts with its gradient, c = ∂f/∂y; what then is missing, f - Σ c y, goes to the ledger under "target".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pfungst.errors import RelevanceError, SettingError

Index = int | Sequence[int] | Tensor | None


class Start(NamedTuple):
    """Where relevance starts: ``c`` (shape of y), f (n,), and ``rest`` = f - Σ c y, (n,) float64, or None for 0.

    ``index`` is the explained output of each sample, (n,), or the target itself where it is more than an index.
    """

    c: Tensor
    explained: Tensor
    rest: Tensor | None
    index: Any


@dataclass(frozen=True, eq=False)
class Functional:
    """A number f a sample.  Subclasses say how it follows from the output; ``linear`` ones are explained wholly."""

    linear = True

    def value(self, output: Tensor) -> Tensor:
        """f of each sample, (n,), from the output (n, ...)."""
        raise NotImplementedError

    def start(self, output: Tensor) -> Start:
        return start_of(self.value, output, self, self.linear)


@dataclass(frozen=True, eq=False)
class Logit(Functional):
    """One output of each sample: f = y_k.  ``index`` is one number, one a sample, or None for the greatest."""

    index: Index = None

    def start(self, output: Tensor) -> Start:
        indices = target_indices(self.index, _scores(output, self))
        c = torch.zeros_like(output)
        c.view(len(c), -1).scatter_(1, indices[:, None], 1)  # R starts as the output itself, so c = R / output = 1
        return Start(c, _scores(output, self).gather(1, indices[:, None])[:, 0], None, indices)


@dataclass(frozen=True, eq=False)
class LogOdds(Functional):
    """Log-odds of the probability of a class, log p / (1 - p).

    ``of="softmax"``: f = y_k - log Σ_{j≠k} exp y_j.  ``of="sigmoid"``: each output is a log-odds already, f = y_k.
    A single output is always taken for a sigmoid's.  Not linear: the ledger's "target" takes the rest.
    """

    index: Index = None
    of: str = "softmax"

    def __post_init__(self) -> None:
        if self.of not in ("softmax", "sigmoid"):
            raise SettingError(f"LogOdds of {self.of!r}", "of is 'softmax' or 'sigmoid'")

    def start(self, output: Tensor) -> Start:
        scores = _scores(output, self)
        if self.of == "sigmoid" or scores.shape[1] == 1:
            return Logit(self.index).start(output)
        return start_of(self.value, output, self, linear=False)

    def value(self, output: Tensor) -> Tensor:
        scores, column = _column(output, self.index, self)
        others = scores.masked_fill(_one_hot(scores, column), -torch.inf)
        return scores.gather(1, column)[:, 0] - others.logsumexp(1)


@dataclass(frozen=True, eq=False)
class Margin(Functional):
    """By how much one output exceeds another: f = y_a - y_b.  ``b=None``: the greatest of the others."""

    a: Index = None
    b: Index = None

    def value(self, output: Tensor) -> Tensor:
        scores, a = _column(output, self.a, self, least=2)
        b = self.b
        if b is None:
            b = scores.detach().masked_fill(_one_hot(scores, a), -torch.inf).argmax(1)
        other = target_indices(b, scores)[:, None]
        return (scores.gather(1, a) - scores.gather(1, other))[:, 0]


@dataclass(frozen=True, eq=False)
class Contrast(Functional):
    """One output against the mean of the others: f = y_k - Σ_{j≠k} y_j / (K - 1)."""

    index: Index = None

    def value(self, output: Tensor) -> Tensor:
        scores, column = _column(output, self.index, self, least=2)
        others = scores.masked_fill(_one_hot(scores, column), 0).sum(1) / (scores.shape[1] - 1)
        return scores.gather(1, column)[:, 0] - others


@dataclass(frozen=True, eq=False)
class Weights(Functional):
    """Any direction in the output's space: f = Σ v y.  A set of labels is a vector of zeros and ones.

    ``weights``: (n, ...) of the output's shape, or the same without the leading axis.
    """

    weights: Tensor

    def value(self, output: Tensor) -> Tensor:
        v = _spread(self.weights, output, "Weights")
        return (output * v).flatten(1).sum(1)


@dataclass(frozen=True, eq=False)
class Similarity(Functional):
    """How alike the output, an embedding, is to a reference r: the cosine, or with ``cosine=False`` the dot product.

    The length of the output counts as a constant, c = r / (|y| |r|), so that relevance adds up to the cosine.  (The
    cosine's own gradient is at right angles to y: its relevance would add up to zero.)
    ``reference``: (d,) for all samples, or (n, d).
    """

    reference: Tensor
    cosine: bool = True

    def value(self, output: Tensor) -> Tensor:
        r = _spread(self.reference, output, "Similarity").flatten(1)
        y = output.flatten(1)
        if self.cosine:
            r = functional.normalize(r, dim=1) / y.detach().norm(dim=1, keepdim=True).clamp(min=1e-12)
        return (y * r).sum(1)


@dataclass(frozen=True, eq=False)
class Unit(Functional):
    """One entry of an output of any shape: ``Unit((2, 10, 12))`` is class 2 at row 10, column 12.

    ``index``: a tuple for all samples, or (n, axes) integers, one row a sample.  Negative numbers count from the end.
    """

    index: Sequence[int] | Tensor

    def value(self, output: Tensor) -> Tensor:
        places = torch.as_tensor(self.index, device=output.device)
        axes, n = output.dim() - 1, len(output)
        if places.is_floating_point() or places.shape not in ((axes,), (n, axes)):
            raise SettingError(
                f"Unit({self.index}) for an output of shape {tuple(output.shape)}",
                f"give {axes} integers, one for each axis but the first, or a row of them for each sample",
            )
        places = places.expand(n, axes)
        sizes = torch.tensor(output.shape[1:], device=output.device)
        if bool(((places >= sizes) | (places < -sizes)).any()):
            raise SettingError(f"Unit({self.index}) is outside an output of shape {tuple(output.shape)}")
        return output[(torch.arange(n, device=output.device), *places.unbind(1))]


@dataclass(frozen=True, eq=False)
class Region(Functional):
    """The score of a class summed over a region of a dense output (n, K, ...): f = Σ_{p in region} y_k(p).

    index  the class: one number, one a sample, or None for the greatest sum over the region
    where  None for everywhere; a tuple of slices or numbers, one a place axis; or a mask of the place axes' shape, with
           or without the leading axis, of bools or weights
    axis   that of the classes: 1, or -1 for (n, places, K)
    """

    index: Index = None
    where: Tensor | tuple[slice | int, ...] | None = None
    axis: int = 1

    def value(self, output: Tensor) -> Tensor:
        if output.dim() < 2:
            raise SettingError(f"Region of an output of shape {tuple(output.shape)}", "it needs (n, classes, ...)")
        y = output.movedim(self.axis, 1)
        places = y[:, 0]
        if self.where is None:
            mask = torch.ones_like(places[:1])
        elif isinstance(self.where, Tensor):
            mask = _spread(self.where, places, "the mask of Region")
        else:
            mask = torch.zeros_like(places[:1])
            try:
                mask[(slice(None), *self.where)] = 1
            except IndexError as error:
                raise SettingError(f"Region: {error}", f"the places are {tuple(places.shape[1:])}") from error
        sums = (y * mask[:, None]).flatten(2).sum(2) if y.dim() > 2 else y
        indices = target_indices(self.index, sums.detach())
        return sums.gather(1, indices[:, None])[:, 0]


@dataclass(frozen=True, eq=False)
class Several:
    """Several targets that share one forward pass: the result is a list, one ``Relevance`` for each."""

    targets: Sequence[Any]


Target = Index | Functional | Callable[[Tensor], Tensor]


def begin(target: Target, output: Tensor) -> Start:
    """Where relevance starts for ``target``; ``output`` (n, ...) is detached."""
    if isinstance(target, Several):
        raise SettingError("Several within another target", "give one flat list of targets")
    if isinstance(target, Functional):
        return target.start(output)
    if callable(target):
        return start_of(target, output, target, linear=False)
    if output.dim() > 2:
        raise RelevanceError(
            f"the model returns shape {tuple(output.shape)}, expected ({len(output)}, number of outputs) for a target "
            "that is an index",
            "say what of it to explain: Region(class, mask), Unit((class, row, column)), Weights(tensor) or a function",
        )
    return Logit(target).start(output)


def start_of(value: Callable[[Tensor], Tensor], output: Tensor, target: Any, linear: bool) -> Start:
    """The start for any function of the output that gives one number a sample, by its gradient."""
    with torch.enable_grad():
        y = output.detach().clone().requires_grad_()
        f = value(y)
        if not isinstance(f, Tensor) or f.shape != (len(y),):
            shape = tuple(f.shape) if isinstance(f, Tensor) else type(f).__name__
            raise SettingError(f"the target gives {shape} for {len(y)} samples", "give one number a sample, (n,)")
        if not f.requires_grad:
            raise SettingError("the target does not depend on the output", "compute it from its argument with torch")
        (c,) = torch.autograd.grad(f.sum(), y)
    rest = None
    if not linear:
        rest = f.detach().double() - (c.double() * output.double()).flatten(1).sum(1)
    return Start(c, f.detach(), rest, target)


# ---- the output ----------------------------------------------------------------------------------------------------

CHOOSE = (
    "choose one: LRP(model, output='logits'), a place in the tuple or a function; or wrap the model in a module whose "
    "forward returns the scores alone, e.g. `return self.model(x)[0]`"
)
Choice = str | int | Callable[[Any], Tensor] | None


def choose_output(output: Any, batch: int, choice: Choice = None) -> Any:
    """The tensor to explain among what the model returns: by key, attribute or place, by a function, or the only one.

    ``check_output`` says whether it can be explained.
    """
    if callable(choice):
        return choice(output)
    if choice is not None:
        return _entry(output, choice)
    if isinstance(output, Tensor):
        return output
    named = {k: v for k, v in _entries(output).items() if _fits(v, batch)}
    if len(named) != 1:
        raise RelevanceError(
            f"the model returns a {type(output).__name__} with {len(named)} tensors of scores"
            + (f": {', '.join(map(repr, named))}" if named else ""),
            CHOOSE,
        )
    return next(iter(named.values()))


def check_output(output: object, batch: int) -> Tensor:
    """The output if it is one floating-point tensor (n, ...); otherwise an error with the remedy."""
    if not isinstance(output, Tensor):
        raise RelevanceError(
            f"the model's output is a {type(output).__name__}, not one tensor of scores",
            CHOOSE,
        )
    if output.dim() == 0 or output.shape[0] != batch:
        raise RelevanceError(
            f"the model returns shape {tuple(output.shape)} for {batch} inputs, expected ({batch}, number of outputs)",
            "wrap the model so that it returns one row of scores a sample",
        )
    if not output.is_floating_point():
        raise RelevanceError(
            f"the model returns {output.dtype} values", "explain its scores, before argmax or rounding"
        )
    return output


def _fits(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0 and len(value) == batch


def _entries(output: Any) -> dict[Any, Any]:
    """What a tuple, dict or object with attributes holds, by place or name."""
    if isinstance(output, dict):
        return dict(output)
    if isinstance(output, list | tuple):
        return dict(enumerate(output))
    return dict(vars(output)) if hasattr(output, "__dict__") else {}


def _entry(output: Any, choice: str | int) -> Any:
    entries = _entries(output)
    if choice in entries:
        return entries[choice]
    if isinstance(choice, str) and hasattr(output, choice) and not isinstance(output, Tensor):
        return getattr(output, choice)  # a named tuple's field
    if isinstance(choice, int) and isinstance(output, list | tuple) and -len(output) <= choice < 0:
        return output[choice]
    known = ", ".join(map(repr, entries)) or f"it is a {type(output).__name__}"
    raise SettingError(f"the model returns no output {choice!r}", f"what it returns: {known}")


# ---- indices -------------------------------------------------------------------------------------------------------


def target_indices(target: Index, output: Tensor) -> Tensor:
    """One output index a sample, (n,) int64: given as one number, one number a sample, or None for the greatest."""
    n, outputs = output.shape
    if target is None:
        return output.detach().argmax(1)
    try:
        indices = torch.as_tensor(target, device=output.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingError(
            f"target {target!r} is none that can be explained",
            "give an index, one index an input, a target such as Margin(1, 2), or a function of the output",
        ) from error
    if indices.is_floating_point() or indices.dtype == torch.bool:
        raise SettingError(f"target has type {indices.dtype}", "give class indices as integers")
    indices = indices.long()
    if indices.dim() == 0:
        indices = indices.expand(n)
    if indices.shape != (n,):
        raise SettingError(
            f"target has shape {tuple(indices.shape)} for {n} inputs", "give one index, or one index an input"
        )
    if bool(((indices < 0) | (indices >= outputs)).any()):
        raise SettingError(
            f"target {int(indices.min())}..{int(indices.max())} is outside the model's {outputs} outputs",
            f"give indices from 0 to {outputs - 1}",
        )
    return indices


def _scores(output: Tensor, target: Functional) -> Tensor:
    """The output as (n, outputs); a regression's (n,) has one."""
    if output.dim() > 2:
        raise SettingError(
            f"{type(target).__name__} of an output of shape {tuple(output.shape)}",
            "use Region, Unit, Weights or a function for outputs with places",
        )
    return output[:, None] if output.dim() == 1 else output


def _column(output: Tensor, index: Index, target: Functional, least: int = 1) -> tuple[Tensor, Tensor]:
    scores = _scores(output, target)
    if scores.shape[1] < least:
        raise SettingError(f"{type(target).__name__} of a model with one output", "explain the output itself")
    return scores, target_indices(index, scores)[:, None]


def _one_hot(scores: Tensor, column: Tensor) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, column, True)


def _spread(values: Tensor, like: Tensor, what: str) -> Tensor:
    """``values`` of the shape of ``like``, or of that without the leading axis."""
    values = torch.as_tensor(values).to(like)
    if values.shape == like.shape[1:]:
        return values[None].expand(like.shape)
    if values.shape == like.shape:
        return values
    shape = tuple(like.shape)
    raise SettingError(f"{what} has shape {tuple(values.shape)}", f"it must be {shape[1:]} or {shape}")
