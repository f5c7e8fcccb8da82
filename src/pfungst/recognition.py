"""Whether a model recognises the labelled pictures at all, and what may be wrong where it does not.

An audit of a model whose outputs were given the wrong names, or whose pictures were prepared wrongly, finds nothing and
proves nothing; the shares below tell it before anything is made of the maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pfungst.domains.labels import shorten
from pfungst.store import READ, Run

RECOGNITION = "recognition.json"
_TOLD = 10  # pictures below which a share says nothing
_FEW = 8  # pictures a class needs to count as one
_LITTLE = 0.1  # part of the way from chance to all pictures up to which a model is hardly better than chance
_GAIN = 0.25  # what another order of the classes must bring, as mean over classes of the share recognised
_LOW = 0.75  # share recognised below which a look at the preprocessing is advised
_LISTED = 12  # classes up to which their whole order is named
_CELLS = 40_000_000  # of the table of labels by predictions, beyond which no other order is sought


@dataclass(frozen=True)
class Recognition:
    """How many pictures are recognised as their label.

    labelled  pictures that have a label and could be read
    right     those of them whose greatest output is that of their label
    warning   what is wrong, and what to mend, in sentences; "" where nothing is
    """

    labelled: int
    right: int
    warning: str = ""

    @property
    def accuracy(self) -> float:
        """Share of the labelled pictures that are recognised as their label."""
        return self.right / self.labelled

    def record(self) -> dict[str, Any]:
        """As ``recognition.json`` keeps it."""
        return {"accuracy": self.accuracy, **asdict(self)}


def measure_recognition(
    labels: np.ndarray, predictions: np.ndarray, names: Sequence[str], own_names: bool = True
) -> Recognition | None:
    """How well labels (n,) and predictions (n,), both indices of ``names``, agree; None where nothing is labelled.

    A label of -1 is none.  ``own_names``: whether the names are those of the model, not those of the labels, sorted.
    """
    known = labels >= 0
    labels, predictions = labels[known].astype(np.int64), predictions[known].astype(np.int64)
    if not len(labels):
        return None
    found = Recognition(len(labels), int((labels == predictions).sum()))
    return Recognition(found.labelled, found.right, _warn(found, labels, predictions, names, own_names))


def _warn(
    found: Recognition, labels: np.ndarray, predictions: np.ndarray, names: Sequence[str], own_names: bool
) -> str:
    if found.labelled < _TOLD:
        return ""
    numbers = np.bincount(labels)
    counted = np.flatnonzero(numbers >= _FEW)
    right = np.bincount(labels[labels == predictions], minlength=len(numbers))
    share = float(np.mean(right[counted] / numbers[counted])) if len(counted) else 0.0
    chance = 1 / max(1, len(counted))
    by_lot = len(counted) > 1 and share <= chance + _LITTLE * (1 - chance)
    order = find_order(labels, predictions)
    if found.accuracy >= 0.5 and not by_lot and not order:
        return ""
    told = tell_share(found)
    if by_lot:
        told += f", hardly more than by lot ({len(counted)} classes)"
    elif found.accuracy < 0.5:
        told += "; the others take no part in an audit that explains their own class"
    whose = "" if own_names else " (taken from the labels, in alphabetical order, since the model names none)"
    if not order:
        return (
            f"{told}. Does the model do better elsewhere? Then check that pictures are prepared as for its training "
            f"(--mean, --std, --size, --channels), and that the class names{whose} stand in the order of its outputs "
            "(--classes FILE)."
        )
    taken = [f"{names[label]!r} is taken for {names[output]!r}" for label, output in order.items() if label != output]
    outputs = {output: names[label] for label, output in order.items()}
    whole = ""
    if len(outputs) == len(names) <= _LISTED:
        whole = "; by these pictures: " + ", ".join(outputs[i] for i in range(len(names)))
    return (
        f"{told}. {shorten(taken)}: are the classes in another order? Class names{whose} must stand in the order of "
        f"the model's outputs: give --classes FILE, one name a line{whole}."
    )


def find_order(labels: np.ndarray, predictions: np.ndarray) -> dict[int, int]:
    """Label -> output, one to one, where the pictures say clearly that outputs stand for other labels; else empty.

    The best assignment of classes to outputs by the share of each class that an output gets (Kuhn 1955).  It is sought
    on every second picture of a class and judged on the others, and the other way round, so that many classes of few
    pictures do not find one by luck; and classes count alike, so that one great class does not either.
    """
    numbers = np.bincount(labels)
    rows = np.flatnonzero(numbers >= _FEW)
    columns = np.unique(np.concatenate([predictions, rows]))
    if len(rows) < 2 or len(rows) * len(columns) > _CELLS:
        return {}
    ranks = np.empty(len(labels), np.int64)  # of a picture among those of its class
    turn = np.argsort(labels, kind="stable")
    ranks[turn] = np.arange(len(labels)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
    halves = [_shares(labels, predictions, rows, columns, ranks % 2 == half) for half in (0, 1)]
    now = np.searchsorted(columns, rows)
    before = np.mean([half[np.arange(len(rows)), now].mean() for half in halves])
    after = np.mean([halves[1 - i][_assign(half)].mean() for i, half in enumerate(halves)])
    if after < 0.5 or after < before + _GAIN:
        return {}
    best = _assign(halves[0] + halves[1])
    return {int(rows[row]): int(columns[column]) for row, column in zip(*best, strict=True)}


def _shares(
    labels: np.ndarray, predictions: np.ndarray, rows: np.ndarray, columns: np.ndarray, wanted: np.ndarray
) -> np.ndarray:
    """Share of each class (``rows``) that each output (``columns``) gets, of the pictures that are ``wanted``."""
    wanted = wanted & np.isin(labels, rows)
    table = np.zeros((len(rows), len(columns)))
    np.add.at(table, (np.searchsorted(rows, labels[wanted]), np.searchsorted(columns, predictions[wanted])), 1)
    shares: np.ndarray = table / table.sum(1, keepdims=True)
    return shares


def _assign(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(shares, maximize=True)
    return rows, columns


def tell_share(found: Recognition) -> str:
    """The accuracy in words."""
    plural = "s" if found.labelled != 1 else ""
    return (
        f"{found.accuracy:.0%} of the labelled pictures are recognised as their label "
        f"({found.right} of {found.labelled} picture{plural})"
    )


def tell_recognition(found: Recognition) -> str:
    """All that is to be said of it, in sentences: the warning; else the share, and what to check where it is low."""
    if found.warning:
        return found.warning
    check = " Did the model do better in training? Then check --mean, --std, --size and --channels."
    return f"{tell_share(found)}.{check if found.accuracy < _LOW and found.labelled >= _TOLD else ''}"


def write_recognition(run: Run, labels: np.ndarray, names: Sequence[str], own_names: bool = True) -> Recognition | None:
    """``recognition.json`` from a run's predictions and the labels of its samples (n,); what it says."""
    read = run.read_array("status") == READ
    found = measure_recognition(labels[read], run.read_array("prediction")[read], names, own_names)
    run.write_json(RECOGNITION, found.record() if found else None)
    return found


def read_recognition(run: Run) -> Recognition | None:
    """What ``write_recognition`` kept; None where nothing is labelled, or the run is older than that file."""
    kept = run.read_json(RECOGNITION)
    return Recognition(kept["labelled"], kept["right"], kept["warning"]) if kept else None
