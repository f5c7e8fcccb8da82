"""File names for pictures and classes: readable, unique, and safe on every file system."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path


def name_pictures(paths: Sequence[Path]) -> list[str]:
    """A file name for each picture: its stem, with as many of its folders as tell it from the others."""
    found: dict[int, str] = {}
    absolute = [path.absolute() for path in paths]
    waiting = list(range(len(paths)))
    for depth in range(1, max(len(path.parts) for path in absolute) + 1):
        names = {i: make_slug("_".join([*absolute[i].parts[-depth:-1], absolute[i].stem]), 120) for i in waiting}
        folded = [name.casefold() for name in names.values()]
        found |= {i: name for i, name in names.items() if folded.count(name.casefold()) == 1}
        waiting = [i for i in waiting if i not in found]
    # Left: cat.png beside cat.jpg, and what claim() then tells apart by numbers.
    return [found.get(i) or make_slug(absolute[i].name.replace(".", "_"), 120) for i in range(len(paths))]


def slug_classes(indices: Sequence[int], classes: tuple[str, ...]) -> tuple[str, ...]:
    """A file name for each class: its first synonym; with the indices where two are alike."""
    slugs = [make_slug(classes[index].split(",")[0], 60) for index in indices]
    if len({slug.casefold() for slug in slugs}) < len(slugs):
        slugs = [f"{slug}_{index}" for slug, index in zip(slugs, indices, strict=True)]
    return tuple(slugs)


def make_slug(text: str, most: int) -> str:
    """Letters, digits, dots and dashes of a text; at most ``most`` bytes, as file systems count."""
    kept = re.sub(r"[^\w.-]+", "_", printable(text)).strip("._") or "_"
    return kept.encode()[:most].decode(errors="ignore")


def printable(text: str) -> str:
    """Odd bytes of a file name written out, so that files and pages can hold it."""
    return text.encode("utf-8", "backslashreplace").decode()
