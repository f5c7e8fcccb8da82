"""Names of folders and labels against the classes of a model."""

from __future__ import annotations

import pytest

from pfungst.domains.labels import match_classes
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
