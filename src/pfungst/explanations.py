"""What ``explain`` returns of every picture, and what it writes down in ``explanations.json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pfungst.filenames import printable
from pfungst.predictions import Prediction


@dataclass(frozen=True)
class TargetMap:
    """The explanation of one output of one picture, and its files (in ``out``).

    ``total``: Σ relevance, with windows the mean of their sums.
    ``absorbed``: the share of the output that biases and stabilisers took, 1 - Σ/f; None where f = 0.
    ``scale``: the |relevance| of a pixel, channels summed, from which on it has the end colour.
    ``relevance``: the file with the scores, float32 (C, H, W), channels in the order of the model's input; with windows
    (1, H, W), the picture's size.  ``pyramid``: the overlay as deep-zoom tiles, in the folder of pyramids.
    """

    prediction: Prediction
    total: float
    absorbed: float | None
    scale: float
    heatmap: str
    overlay: str
    relevance: str | None
    pyramid: str | None = None


@dataclass(frozen=True)
class Explanation:
    """One picture: its explained outputs, its greatest outputs, its sheet; or the reason why it was skipped.

    ``windows``: how many there were; outputs are their means then.  ``pyramid``: the picture as deep-zoom tiles.
    """

    path: Path
    targets: tuple[TargetMap, ...] = ()
    top: tuple[Prediction, ...] = ()
    sheet: str | None = None
    skipped: str = ""
    windows: int = 0
    pyramid: str | None = None


def describe_explanation(one: Explanation) -> dict[str, Any]:
    """An explanation as JSON has it."""
    path = {"path": printable(str(one.path))}
    if one.skipped:
        return {**path, "skipped": one.skipped}
    targets = [asdict(target) for target in one.targets]
    flat = [{**target.pop("prediction"), **target} for target in targets]
    for target in flat:
        if target["pyramid"] is None:
            del target["pyramid"]
    more = {key: value for key, value in (("windows", one.windows), ("pyramid", one.pyramid)) if value}
    top = [asdict(prediction) for prediction in one.top]
    return {**path, "sheet": one.sheet, **more, "targets": flat, "topk": top}
