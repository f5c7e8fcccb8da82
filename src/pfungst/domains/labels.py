"""From the names of folders and labels to the classes of a model; some samples of each class."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from pfungst.errors import DataError

_LISTED = 8
_REMEDY = (
    "rename them after the model's classes or start them with the class index (as in 007_dog), point to the folder "
    "whose subfolders are the classes, or give the model's class names, in its order, with --classes"
)


def match_classes(names: Iterable[str], classes: Sequence[str]) -> dict[str, int]:
    """The index among ``classes`` that each name means.

    In this order: the name itself; without regard to case; one of the synonyms that a class name lists with commas
    (``_`` counts as a space); an index, if the name is digits or starts with them (``007``, ``007_dog``).

    Raises DataError that lists names that fit no class, fit several, or whose index and words disagree.
    """
    exact: dict[str, set[int]] = {}
    folded: dict[str, set[int]] = {}
    synonyms: dict[str, set[int]] = {}
    for index, name in enumerate(classes):
        exact.setdefault(name, set()).add(index)
        folded.setdefault(name.casefold(), set()).add(index)
        for synonym in [name, *name.split(",")]:
            synonyms.setdefault(_words(synonym), set()).add(index)

    def named(name: str) -> set[int]:
        return exact.get(name) or folded.get(name.casefold()) or synonyms.get(_words(name)) or set()

    found: dict[str, int] = {}
    unknown: list[str] = []
    doubtful: list[str] = []
    for name in sorted(set(names)):
        fits = named(name)
        if not fits and (numbered := re.fullmatch(r"(\d+)(?:[ _.-]+(.*))?", name)):
            index, rest = int(numbered[1]), numbered[2]
            by_words = named(rest) if rest else set()
            if index < len(classes) and by_words and index not in by_words:
                doubtful.append(f"{name!r} (class {index} is {classes[index]!r})")
                continue
            fits = {index} if index < len(classes) else set()
        if len(fits) > 1:
            doubtful.append(f"{name!r} (classes {', '.join(map(str, sorted(fits)))})")
        elif fits:
            found[name] = fits.pop()
        else:
            unknown.append(repr(name))
    if unknown:
        raise DataError(
            f"{len(unknown)} labels are not among the {len(classes)} classes: {shorten(unknown)}; "
            f"the classes are {shorten(repr(name) for name in classes)}",
            _REMEDY,
        )
    if doubtful:
        raise DataError(f"labels that do not name one class: {shorten(doubtful)}", "name them by the class index")
    return found


def shorten(items: Iterable[str]) -> str:
    """The first few of a list for a message, and how many more there are."""
    listed = list(items)
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more


def _words(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


def spread_rows(labels: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """``limit`` rows in their order, drawn at random, as evenly from the classes as these allow."""
    rng = np.random.default_rng(seed)
    turn = rng.permutation(len(labels))
    grouped = turn[np.argsort(labels[turn], kind="stable")]  # class after class, each in its turn
    _, starts, counts = np.unique(labels[grouped], return_index=True, return_counts=True)
    place = np.empty(len(labels), int)  # of a row among those of its class
    place[grouped] = np.arange(len(labels)) - np.repeat(starts, counts)
    chosen: np.ndarray = np.sort(turn[np.argsort(place[turn], kind="stable")][:limit])
    return chosen
