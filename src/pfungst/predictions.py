"""A model's outputs in words: their classes, which of them are to be explained, and how great they are."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pfungst.errors import ModelError, SettingError
from pfungst.models import LoadedModel

_TARGETS = "give predicted, top3, a class name or an index"


@dataclass(frozen=True)
class Prediction:
    """One output of the model for one picture.

    ``logit``: the output as the model returns it.  ``probability``: its softmax, or the output itself where the model's
    outputs are probabilities already; None where the model has a single output.
    """

    index: int
    name: str
    logit: float
    probability: float | None


def name_classes(loaded: LoadedModel, outputs: int) -> tuple[str, ...]:
    """A name for every output.  Raises ModelError where the model has more class names than outputs."""
    names = loaded.classes or ()
    if len(names) > outputs:
        surplus = "; the first is 'background', remove that line" if names[0].casefold() == "background" else ""
        raise ModelError(
            f"there are {len(names)} class names, but the model has {outputs} outputs{surplus}",
            "give --classes FILE with one name an output, in their order",
        )
    return (*names, *(f"output {index}" for index in range(len(names), outputs)))


def read_targets(targets: Any, classes: tuple[str, ...]) -> list[tuple[str, int]]:
    """("top", k) for the k greatest outputs, ("class", index) for one of them."""
    parts = [targets] if isinstance(targets, (str, int)) else list(targets)
    wanted: list[tuple[str, int]] = []
    for part in parts:
        # Many class names have commas themselves ("tench, Tinca tinca"): the whole is tried before its parts.
        pieces = part.split(",") if isinstance(part, str) and not _matches(part, classes) else [part]
        wanted += [_read_target(one, classes) for one in pieces if str(one).strip()]
    if not wanted:
        raise SettingError("no targets", _TARGETS)
    return wanted


def _read_target(target: Any, classes: tuple[str, ...]) -> tuple[str, int]:
    text = str(target).strip()
    if isinstance(target, str) and (found := _matches(text, classes)):
        if len(found) > 1:
            fits = ", ".join(f"{index} ({classes[index]})" for index in found)
            raise SettingError(f"the target {text!r} fits several classes: {fits}", "give one of the indices")
        return "class", found[0]
    if text == "predicted":
        return "top", 1
    if text == "label":
        raise SettingError("loose pictures have no label", _TARGETS)
    if (top := re.fullmatch(r"top(\d+)", text)) and int(top[1]) > 0:
        return "top", min(int(top[1]), len(classes))
    if re.fullmatch(r"-?\d+", text):
        if not 0 <= int(text) < len(classes):
            raise SettingError(f"the target {text} is no output", f"the outputs are 0 to {len(classes) - 1}")
        return "class", int(text)
    words = {_words(part): part.strip() for name in classes for part in (*name.split(","), name)}
    close = ", ".join(words[key] for key in difflib.get_close_matches(_words(text), words, n=3))
    near = f"; close: {close}" if close else ""
    raise SettingError(f"the target {text!r} is none of the {len(classes)} classes{near}", _TARGETS)


def _matches(text: str, classes: tuple[str, ...]) -> list[int]:
    """Classes of that name; else those that list it among their synonyms, without regard to case."""
    exact = [index for index, name in enumerate(classes) if name == text.strip()]
    wanted = _words(text)
    return exact or [
        index for index, name in enumerate(classes) if wanted in {_words(name), *map(_words, name.split(","))}
    ]


def choose_outputs(wanted: list[tuple[str, int]], output: Tensor) -> list[int]:
    """The outputs of one picture that are explained, each once."""
    order = output.argsort(descending=True, stable=True).tolist()
    chosen: list[int] = []
    for kind, value in wanted:
        chosen += order[:value] if kind == "top" else [value]
    return list(dict.fromkeys(chosen))


def describe_outputs(output: Tensor, classes: tuple[str, ...]) -> list[Prediction]:
    """All outputs (outputs,) of one picture, in their order."""
    values = output.double()
    probabilities: list[float] | list[None] = [None]
    if len(values) > 1:
        # A model that ends in a softmax returns probabilities: a second softmax would flatten them.
        ready = bool((values >= 0).all()) and abs(float(values.sum()) - 1) < 1e-3
        probabilities = (values if ready else values.softmax(0)).tolist()
    return [Prediction(i, *row) for i, row in enumerate(zip(classes, values.tolist(), probabilities, strict=True))]


def _words(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


def tell_output(one: Prediction) -> str:
    """An output in words: its probability and the value itself."""
    if one.probability is None:
        return f"output {one.logit:.3g}"
    percent = f"{one.probability:.1%}" if one.probability >= 0.001 else "under 0.1%"
    return f"{percent}, output {one.logit:.3g}"
