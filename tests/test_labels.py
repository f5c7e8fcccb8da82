"""Names of folders and labels against the classes of a model."""

from __future__ import annotations

import numpy as np
import pytest

from pfungst.domains.labels import match_classes, spread_rows
from pfungst.errors import DataError


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("dog", 7),
        ("DOG", 7),
        ("hound", 7),
        ("007", 7),
        ("7", 7),
        ("007_dog", 7),
        ("007_unheard", 7),
        ("great_white_shark", 1),
        ("carcharodon carcharias", 1),
        ("8", 8),
        ("2", 2),
        ("two", 2),
    ],
)
def test_class_names(name: str, index: int) -> None:
    classes = ["a", "great white shark, Carcharodon carcharias", "two", "d", "e", "f", "g", "dog, hound", "8"]
    assert match_classes([name], classes) == {name: index}


@pytest.mark.parametrize("name", ["3d_printer", "99", "9_x", "", "c"])
def test_unknown_class_names(name: str) -> None:
    with pytest.raises(DataError, match="not among the 4 classes"):
        match_classes([name], ["a", "b", "x", "y"])


def test_doubtful_class_names() -> None:
    with pytest.raises(DataError, match=r"'crane'.*classes 0, 2"):
        match_classes(["crane"], ["crane", "b", "crane"])
    with pytest.raises(DataError, match=r"'1_dog'.*class 1 is 'cat'"):
        match_classes(["1_dog"], ["dog", "cat"])


@pytest.mark.parametrize(
    ("count", "classes", "limit"), [(0, 1, 3), (1, 1, 3), (90, 7, 20), (400, 150, 64), (50, 3, 80)]
)
@pytest.mark.parametrize("seed", range(3))
def test_rows_are_spread_as_a_slow_loop_spreads_them(count: int, classes: int, limit: int, seed: int) -> None:
    labels = np.random.default_rng(seed).integers(-1, classes, count)
    turn = np.random.default_rng(seed).permutation(count).tolist()
    place = {row: sum(labels[other] == labels[row] for other in turn[:i]) for i, row in enumerate(turn)}
    expected = sorted(sorted(turn, key=lambda row: place[row])[:limit])  # sorted() keeps the turn of equals
    assert spread_rows(labels, limit, seed).tolist() == expected
