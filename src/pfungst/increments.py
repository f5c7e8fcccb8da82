"""Answers to pictures that change by one small region at a time: only what the change reaches is computed again.

Convolutions, poolings and whatever works element by element pass a change of a region on as a change of a region.  The
layers' values are kept for each picture; at every step each layer computes its values inside the region that the
change reaches, from what is kept around it, and keeps them.  A function that needs the whole picture (a dense layer, an
attention, any that is not listed here) gets it, always up to date.  So every number is computed by the model's own
functions from the same inputs, and differs from that of a whole forward pass by rounding alone; ``plan_increments``
makes sure of it before anything is followed.

Source of the idea: Nakandala, Kumar and Papakonstantinou 2019 (SIGMOD), "Incremental and approximate inference for
faster occlusion-based deep CNN explanations"; here for any model, its code unchanged, and region after region.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pfungst.boxes import Box, Window, list_places
from pfungst.lrp.calls import as_tuple, bound, out_of_place
from pfungst.lrp.functions import plain_name
from pfungst.lrp.marks import map_tensors
from pfungst.lrp.modules import as_written, ask_model
from pfungst.lrp.targets import check_output, choose_output

WORTH = 0.6  # share of the work of a whole pass up to which steps are followed
AT_ONCE = 4  # pictures of the first pass
TRIED = 16  # places at which a change is followed before any is
WRITING = 50  # multiplications in whose time one value is written, on a CPU
FOLLOWING = 4_500_000  # multiplications in whose time a call is followed
SAME = 1e-4  # how far outputs may be from those of a whole pass, of the largest: they differ by rounding

# Functions of each value; of two; what a model asks of a tensor that is no value.
_EACH = {
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "silu", "gelu", "mish", "sigmoid", "hardsigmoid", "hardswish",
    "hardtanh", "tanh", "softplus", "logsigmoid", "clamp", "clip", "abs", "neg", "exp", "square", "sqrt", "dropout",
    "alpha_dropout", "feature_dropout", "dropout2d", "clone", "contiguous", "detach", "float", "to", "prelu",
}  # fmt: skip
_TWO = {
    "add", "sub", "mul", "div", "true_divide", "maximum", "minimum", "iadd", "isub", "imul", "itruediv", "rsub",
}  # fmt: skip
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_ASKS = frozenset(
    (
        *(Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__),
        *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "is_cuda", "layout")),
        *(getattr(Tensor, name).__get__ for name in ("requires_grad", "is_sparse", "is_quantized", "is_mkldnn")),
    )
)


class _Lost(Exception):
    """The model does what cannot be followed; the whole pictures are asked instead."""


class _Missing(Exception):
    """The output of this call is needed and was not kept; from now on it is."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@dataclass(frozen=True)
class Increments:
    """What was found out about a model: which layers' values are needed later, and what it costs.

    kept    numbers of the calls whose outputs have to be kept
    calls   names of all calls, in order
    work    of a whole pass of one picture: multiplications, and values written in units of these
    share   of that work that a step takes
    floats  values to be kept for each picture
    """

    kept: frozenset[int]
    calls: tuple[str, ...]
    work: int
    share: float
    floats: int

    def pays(self, count: int) -> bool:
        """Whether what is saved with so many pictures at once is more than following the calls takes."""
        return count * (1 - self.share) * self.work > FOLLOWING * len(self.calls)


def plan_increments(model: Callable[[Tensor], Any], x: Tensor, height: int, width: int) -> Increments | None:
    """Whether changes of regions of this size can be followed through the model, and are worth it; None if not.

    ``x`` (1, C, H, W): the picture on which it is tried: in the middle, three corners and other places, five times
    against a whole pass.
    """
    rows, columns = x.shape[2:]
    if height > rows or width > columns:
        return None
    patch = x.amin().expand(1, x.shape[1], height, width)
    last = rows - height, columns - width
    places = [(last[0] // 2, last[1] // 2), (0, 0), (last[0], 0), last]
    rng = np.random.default_rng(0)  # what a layer needs depends on the place: strides meet it here or there
    places += [tuple(rng.integers(0, np.array(last) + 1).tolist()) for _ in range(TRIED - len(places))]
    changed = x.clone()
    try:
        answers = Answers(model, x, None)
        for number, (top, left) in enumerate(places, 1):
            changed[:, :, top : top + height, left : left + width] = patch
            found = answers.change(patch, np.array([top]), np.array([left]))
            share = answers.done / max(1, answers.of * number)
            if answers.lost or share > 1.2 * WORTH:
                return None
            if number <= 4 or number == TRIED:
                with torch.inference_mode():
                    expected = ask_model(model, changed)
                if not torch.allclose(found, expected, rtol=0, atol=SAME * max(1e-6, float(expected.abs().max()))):
                    return None
    except Exception:  # of whatever kind: the model is then asked as a whole, and says itself what is wrong with it
        return None
    if share > WORTH:
        return None
    floats = sum(answers.states[number].numel() for number in answers.needed)
    return Increments(frozenset(answers.needed), tuple(answers.calls), answers.of, share, floats)


class Answers:
    """A model's outputs for pictures that change step by step.

    ``x`` (n, C, H, W): the pictures as they are; they are not written to.  ``plan``: of ``plan_increments`` for
    pictures and regions of this size; None: to find one out.
    """

    def __init__(self, model: Callable[[Tensor], Any], x: Tensor, plan: Increments | None) -> None:
        self.model, self.plan = model, plan
        self.states: dict[int, Tensor] = {}  # number of the call -> (n, H, W, C); 0: the pictures
        self.weights: dict[int, tuple[Tensor, Tensor]] = {}  # by its id: as it is, and as channels-last inputs meet it
        self.needed: set[int] = set()
        self.calls: list[str] = []
        self.number, self.done, self.of = 0, 0, 0
        self.lost = ""  # why the model cannot be followed; then whole pictures are asked
        self.outputs = self._begin(_rows_of(x).clone())

    @torch.inference_mode()
    def _begin(self, rows: Tensor) -> Tensor:
        """Whole passes of a few pictures at a time: what they hold for a moment is as much as what is kept."""
        self.states, self.first = {0: rows}, True
        outputs = []
        for start in range(0, len(rows), AT_ONCE):
            self.part = slice(start, start + AT_ONCE)
            outputs.append(self._run(self.pictures[self.part]))
        self.first = False
        return torch.cat(outputs)

    @torch.inference_mode()
    def change(self, patch: Tensor, tops: np.ndarray, lefts: np.ndarray) -> Tensor:
        """Outputs (n, classes) once ``patch`` (n, C, h, w) stands at these rows and columns, (n,) each; it stays."""
        box = Box(tops, lefts, *patch.shape[2:])
        x = Followed.make(self, patch.new_empty(()).expand(self.pictures.shape), 0, patch=patch, box=box)
        self.write(0, patch, box)
        return self._run(x)

    @property
    def pictures(self) -> Tensor:
        """The pictures as they are now, (n, C, H, W)."""
        return self.states[0].permute(0, 3, 1, 2)

    def _run(self, x: Tensor) -> Tensor:
        """One pass, of what is followed or of whole pictures that are to be."""
        self.number = 0
        whole = self.pictures if isinstance(x, Followed) else x
        if not self.lost:
            followed = x if isinstance(x, Followed) else Followed.make(self, x, 0, full=x)
            try:
                with as_written():
                    output = choose_output(self.model(followed), len(x))
                if not isinstance(output, Followed):  # a scripted model, or one that computes in numpy
                    raise _Lost("the output does not come from the input by torch functions")
                return check_output(self.whole(output), len(x))
            except _Missing as error:
                assert self.plan is not None
                self.plan = replace(self.plan, kept=self.plan.kept | {error.number})
                return self._begin(self.states[0])
            except _Lost as error:
                self.lost = str(error)
        return ask_model(self.model, whole)

    # ---- what is kept ------------------------------------------------------------------------------------------

    def count(self, name: str) -> int:
        """The number of this call of the model; it has to make the same calls at each step."""
        self.number += 1
        if self.first and self.plan is None:
            self.calls.append(name)
        calls = self.calls if self.plan is None else self.plan.calls
        if self.number > len(calls) or calls[self.number - 1] != name:
            raise _Lost(f"call {self.number} is {name}")
        return self.number

    def keep(self, number: int, full: Tensor) -> None:
        """Keeps a layer's output, if it may be needed and is one of pictures."""
        if not self.first:
            if number in self.states:
                self.states[number].copy_(full.permute(0, 2, 3, 1))
            return
        count = len(self.states[0][self.part])
        if full.dim() == 4 and len(full) == count and (self.plan is None or number in self.plan.kept):
            rows = full.permute(0, 2, 3, 1)
            if number not in self.states:
                self.states[number] = rows.new_empty(len(self.states[0]), *rows.shape[1:])
            self.states[number][self.part].copy_(rows)

    def laid_out(self, weight: Tensor) -> Tensor:
        """A convolution's weight in the order of channels-last inputs, into which it is else copied at every step."""
        if not isinstance(weight, nn.Parameter):  # made anew at every pass
            return weight
        if id(weight) not in self.weights:
            self.weights[id(weight)] = (weight, weight.contiguous(memory_format=torch.channels_last))
        return self.weights[id(weight)][1]

    def whole(self, x: Any) -> Any:
        """All values of what is followed, up to date; anything else as it is."""
        if not isinstance(x, Followed):
            return x
        if x.full is None:
            state = self.state(x)
            x.full = state.permute(0, 3, 1, 2)
        return x.full

    def state(self, x: Followed) -> Tensor:
        """What is kept of a layer, (n, H, W, C)."""
        if x.number not in self.states:
            if self.plan is None:  # all was kept that are pictures
                raise _Lost(f"the output of call {x.number} is no picture")
            raise _Missing(x.number)
        self.needed.add(x.number)
        return self.states[x.number]

    def write(self, number: int, patch: Tensor, box: Box) -> None:
        """A change of a layer's output, into what is kept of it.  At every step: a later one may need it."""
        state = self.states.get(number)
        if state is not None:
            _, height, width, channels = state.shape
            index, _ = list_places(box, height, width)
            state.view(-1, channels).index_copy_(0, index.to(state.device), _rows_of(patch).reshape(-1, channels))

    def crop(self, x: Followed, box: Box, outside: float = 0.0) -> Tensor:
        """The values of a layer in a box, (n, C, h, w), ``outside`` where it reaches beyond the picture."""
        assert x.box is not None
        assert x.patch is not None
        if (box.height, box.width) == (x.box.height, x.box.width) and box.holds(x.box):
            return x.patch
        state = self.state(x)
        n, height, width, channels = state.shape
        index, beyond = list_places(box, height, width)
        found = state.view(-1, channels).index_select(0, index.to(state.device))
        if beyond is not None:
            found[beyond.to(state.device)] = outside
        return found.view(n, box.height, box.width, channels).permute(0, 3, 1, 2)


def _rows_of(x: Tensor) -> Tensor:
    """(n, C, h, w) as (n, h, w, C), in one piece."""
    return x.permute(0, 2, 3, 1).contiguous()


class Followed(Tensor):
    """A layer's output, of which is known where it differs from the step before: all of it, or a box."""

    answers: Answers
    number: int
    full: Tensor | None
    patch: Tensor | None
    box: Box | None

    @staticmethod
    def make(
        answers: Answers,
        like: Tensor,
        number: int,
        full: Tensor | None = None,
        patch: Tensor | None = None,
        box: Box | None = None,
    ) -> Followed:
        """``like``: a tensor of its shape, type and device; ``full`` or else ``patch`` and ``box`` are its values."""
        made: Followed = torch.Tensor._make_subclass(Followed, like)
        made.answers, made.number = answers, number
        made.full, made.patch, made.box = full, patch, box
        return made

    def adopt(self, other: Followed) -> None:
        """Becomes what the other is: what a function does that works in place."""
        self.number, self.full, self.patch, self.box = other.number, other.full, other.patch, other.box

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _ASKS:
                return func(*args, **kwargs)
            return _Call(func, args, kwargs).answer()


@dataclass
class _Call:
    """One call of the model."""

    func: Any
    args: Any
    kwargs: Any

    def answer(self) -> Any:
        """What the call returns, with the values inside the box computed, or all of them."""
        func = self.func
        self.followed: list[Followed] = []
        map_tensors((self.args, self.kwargs), self._note)
        self.answers = answers = self.followed[0].answers
        name, in_place = plain_name(func)
        number = answers.count(name)
        target = self.args[0] if self.args else self.kwargs.get("input")
        if name == "setitem" or self.kwargs.get("out") is not None:
            raise _Lost(f"{name} writes into a part of a tensor")
        func, self.args, self.kwargs, asked = out_of_place(func, name, in_place, self.args, self.kwargs)
        self.func, in_place = func, in_place or asked
        if in_place and not isinstance(target, Followed):
            raise _Lost(f"{name} writes what is followed into another tensor")
        found = None
        if all(one.dim() == 4 for one in self.followed) and any(one.box for one in self.followed):
            found = self._local(name, number)
        result = found if found is not None else self._whole(name, number)
        if in_place:
            if not isinstance(result, Followed):
                raise _Lost(f"{name} in place returns {type(result).__name__}")
            target.adopt(result)
            return target
        return result

    def _note(self, one: Tensor) -> None:
        if isinstance(one, Followed):
            self.followed.append(one)

    def _whole(self, name: str, number: int) -> Any:
        """Everything is computed."""
        answers = self.answers
        args, kwargs = map_tensors(self.args, answers.whole), map_tensors(self.kwargs, answers.whole)
        result = self.func(*args, **kwargs)
        weight = kwargs.get("weight", args[1] if len(args) > 1 else None) if name in ("conv2d", "linear") else None
        self._count(result, weight)
        kept = {state.untyped_storage().data_ptr() for state in answers.states.values()}

        def follow(one: Tensor) -> Followed:
            if one.untyped_storage().data_ptr() in kept:  # a view of what is kept; what the model does to it is not
                one = one.clone()
            answers.keep(number, one)
            return Followed.make(answers, one, number, full=one)

        return map_tensors(result, follow)

    def _count(self, result: Any, weight: Any = None) -> None:
        """Adds up what the call costs: multiplications of convolutions and dense layers, and values written."""
        answers = self.answers
        if answers.plan is not None or not isinstance(result, Tensor):
            return
        each = weight.numel() // weight.shape[0] if isinstance(weight, Tensor) else 0
        cost = (each + WRITING) * result.numel()
        if answers.first:
            answers.of += cost
        else:
            answers.done += cost

    def _local(self, name: str, number: int) -> Followed | None:
        """Only the values in the box that the change reaches are computed; None where that is no box."""
        if name == "conv2d":
            return self._convolve(number)
        if name in ("max_pool2d", "avg_pool2d"):
            return self._pool(name, number)
        if name == "batch_norm":
            given = bound(self.func, self.args, self.kwargs)
            known = given.get("running_mean") is not None and not given.get("training", False)
            return self._map(number, list(self.followed)) if known else None
        if name in _EACH and len(self.followed) == 1:
            return self._map(number, self.followed)
        if name in _TWO:
            others = [v for v in (*self.args, *self.kwargs.values()) if not isinstance(v, Followed)]
            flat = all(not isinstance(v, Tensor) or v.dim() == 0 or v.shape[-2:] == (1, 1) for v in others)
            return self._map(number, self.followed) if flat else None
        if name in ("cat", "concat", "concatenate"):
            given = {**dict(zip(("tensors", "dim"), self.args, strict=False)), **self.kwargs}
            along = given.get("dim", given.get("axis", 0)) in (1, -3)
            ours = all(isinstance(one, Followed) for one in given.get("tensors", (None,)))
            return self._map(number, self.followed) if along and ours else None
        return None

    def _map(self, number: int, followed: list[Followed]) -> Followed | None:
        """A function of each pixel, of one argument or several, whose boxes are made one."""
        size = followed[0].shape
        boxes = [one.box for one in followed if one.box is not None]
        if len(boxes) < len(followed) or any(one.shape[2:] != size[2:] for one in followed):
            return None
        box = max(boxes, key=lambda one: one.height * one.width)
        if not all(box.holds(one) for one in boxes):
            for one in boxes:
                box = box.around(one)
            moved = box.within(*size[2:])
            if moved is None:
                return None
            box = moved
        patches = {id(one): self.answers.crop(one, box) for one in followed}

        def crop(one: Tensor) -> Tensor:
            return patches[id(one)] if isinstance(one, Followed) else one

        patch = self.func(*map_tensors(self.args, crop), **map_tensors(self.kwargs, crop))
        return self._made(number, patch, box, (size[0], patch.shape[1], *size[2:]))

    def _convolve(self, number: int) -> Followed | None:
        given = bound(self.func, self.args, self.kwargs, _CONV)
        x, weight, bias = given["input"], given["weight"], given.get("bias")
        if not isinstance(x, Followed) or isinstance(weight, Followed) or isinstance(bias, Followed):
            return None
        stride, dilation = (as_tuple(given.get(key, 1), 2) for key in ("stride", "dilation"))
        padding = given.get("padding", 0)
        if isinstance(padding, str):
            reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            if padding == "same" and any(r % 2 for r in reach):
                return None
            padding = 0 if padding == "valid" else [r // 2 for r in reach]
        window = Window(tuple(weight.shape[2:]), stride, as_tuple(padding, 2), dilation)
        size = window.output(x.shape[2], x.shape[3])
        box = window.reach(x.box, *size)
        if box is None:
            return None
        crop = self.answers.crop(x, window.needs(box))
        weight = self.answers.laid_out(weight)
        patch = self.func(crop, weight, bias, stride, 0, dilation, given.get("groups", 1))
        return self._made(number, patch, box, (x.shape[0], weight.shape[0], *size), weight)

    def _pool(self, name: str, number: int) -> Followed | None:
        average = name == "avg_pool2d"
        fields = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        if not average:
            fields = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        given = {**dict(zip(fields, self.args, strict=False)), **self.kwargs}
        x, kernel = given["input"], as_tuple(given["kernel_size"], 2)
        stride = as_tuple(given.get("stride") or kernel, 2)
        padding, dilation = as_tuple(given.get("padding", 0), 2), as_tuple(given.get("dilation", 1), 2)
        ceil = bool(given.get("ceil_mode", False))
        if given.get("return_indices") or (
            average and (ceil or (any(padding) and not given.get("count_include_pad", 1)))
        ):
            return None  # the mean of an incomplete window has a divisor of its own
        window = Window(kernel, stride, padding, dilation)
        size = window.output(x.shape[2], x.shape[3], ceil)
        box = window.reach(x.box, *size)
        if box is None:
            return None
        crop = self.answers.crop(x, window.needs(box), 0.0 if average else -math.inf)
        more = {"divisor_override": given.get("divisor_override")} if average else {"dilation": dilation}
        patch = getattr(torch.nn.functional, name)(crop, kernel, stride, 0, **more)
        return self._made(number, patch, box, (x.shape[0], x.shape[1], *size))

    def _made(
        self, number: int, patch: Tensor, box: Box, size: tuple[int, ...], weight: Tensor | None = None
    ) -> Followed:
        self._count(patch, weight)
        self.answers.write(number, patch, box)
        like = patch.new_empty(()).expand(size)
        return Followed.make(self.answers, like, number, patch=patch, box=box)
