"""Whether the labelled pictures are recognised: the shares, the warnings, and the order of classes that would fit."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import Console, Small

import pfungst
from pfungst.errors import PfungstWarning
from pfungst.recognition import find_order, measure_recognition, read_recognition, tell_recognition
from pfungst.reports import write_report
from pfungst.store import Run
from pfungst.viewer.opened import OpenRun

CELLS = ("between", "nucleus", "platelet", "red", "tissue", "white")
TRUE_ORDER = ("red", "white", "platelet", "between", "nucleus", "tissue")


def draw(sizes: list[int], accuracy: float, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels of classes of these sizes, and predictions of which this share is right and the others are by lot."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    right = rng.random(len(labels)) < accuracy
    return labels, np.where(right, labels, rng.integers(0, classes, len(labels)))


def test_classes_in_another_order_are_named_and_put_right() -> None:
    meant, outputs = draw([100, 80, 60, 900, 40, 300], 0.95, 6)  # indices of CELLS, as label and as prediction
    outputs = np.array([TRUE_ORDER.index(name) for name in CELLS])[outputs]  # as the model numbers its outputs
    found = measure_recognition(meant, outputs, CELLS, own_names=False)
    assert found is not None
    assert found.accuracy == np.mean(meant == outputs) < 0.15
    assert "'between' is taken for 'red'" in found.warning
    assert "platelet' is taken" not in found.warning  # it is where it belongs
    assert "in alphabetical order" in found.warning
    assert found.warning.endswith("by these pictures: red, white, platelet, between, nucleus, tissue.")
    own = measure_recognition(meant, outputs, CELLS)
    assert own is not None
    assert "alphabetical" not in own.warning


def test_two_classes_changed_about_are_noticed_though_most_pictures_are_recognised() -> None:
    labels, predictions = draw([100] * 6, 0.97, 6)
    predictions = np.array([0, 1, 2, 3, 5, 4])[predictions]
    found = measure_recognition(labels, predictions, CELLS)
    assert found is not None
    assert found.accuracy > 0.6
    assert "'tissue' is taken for 'white', 'white' is taken for 'tissue':" in found.warning


@pytest.mark.parametrize(
    ("sizes", "accuracy", "classes"),
    [
        ([5] * 1000, 0.6, 1000),
        ([50] * 1000, 0.6, 1000),
        ([3] * 200, 0.7, 200),
        ([40, 40], 0.5, 2),  # and half of the other half by luck: 75 %
        ([990, 10], 0.96, 2),
        ([300], 0.8, 6),
        ([300, 2], 0.8, 6),
    ],
)
def test_usual_models_raise_no_alarm(sizes: list[int], accuracy: float, classes: int) -> None:
    for seed in range(5):
        labels, predictions = draw(sizes, accuracy, classes, seed)
        found = measure_recognition(labels, predictions, [str(i) for i in range(classes)])
        assert found is not None
        assert found.warning == ""


@pytest.mark.parametrize("sizes", [[3] * 300, [10] * 300, [60] * 6, [400, 30, 30]])
def test_a_model_that_knows_nothing_is_told_of_without_an_order(sizes: list[int]) -> None:
    for seed in range(5):
        labels, predictions = draw(sizes, 0.0, len(sizes), seed)
        found = measure_recognition(labels, predictions, [str(i) for i in range(len(sizes))])
        assert found is not None
        assert "--mean, --std, --size, --channels" in found.warning
        assert "is taken for" not in found.warning


def test_one_answer_to_everything_is_no_other_order() -> None:
    labels, _ = draw([30, 30, 400], 1.0, 3)
    found = measure_recognition(labels, np.zeros_like(labels), ["a", "b", "c"])
    assert found is not None
    assert "hardly more than by lot (3 classes)" in found.warning
    assert "is taken for" not in found.warning
    always = measure_recognition(labels, np.full_like(labels, 2), ["a", "b", "c"])  # 87 % of the pictures, none else
    assert always is not None
    assert always.accuracy > 0.8
    assert "hardly more than by lot" in always.warning


def test_no_labels_or_few_pictures_say_nothing() -> None:
    assert measure_recognition(np.full(100, -1), np.zeros(100), ["a", "b"]) is None
    few = measure_recognition(np.array([0, 1, -1]), np.array([1, 0, 1]), ["a", "b"])
    assert few is not None
    assert (few.labelled, few.right, few.warning) == (2, 0, "")
    assert find_order(np.array([0, 1]), np.array([1, 0])) == {}


def test_pictures_without_a_label_do_not_count() -> None:
    labels, predictions = draw([50, 50], 1.0, 2)
    both = np.concatenate([labels, np.full(70, -1)]), np.concatenate([predictions, np.zeros(70, int)])
    found = measure_recognition(*both, ["a", "b"])
    assert found is not None
    assert (found.labelled, found.right) == (100, 100)


# ---- told everywhere -------------------------------------------------------------------------------------------------


def test_an_audit_with_swapped_classes_says_so_early_and_everywhere(
    small: Small, tmp_path: Path, console: Console
) -> None:
    (tmp_path / "classes.txt").write_text("rose\nleaf\n")
    model = ["--weights", small.weights, "--size", "24", "--mean", "0", "--std", "1", "--max-findings", "1"]
    run = tmp_path / "run"
    command = ("audit", small.model, small.photos, "--out", run, *model, "--classes", tmp_path / "classes.txt")
    code, out, error = console(*command)
    assert code == 0
    for text in (out, error):
        flat = " ".join(text.split())
        assert "Warning: 0% of the labelled pictures are recognised as their label (0 of 80 pictures)" in flat
        assert "'leaf' is taken for 'rose'" in flat
        assert "by these pictures: leaf, rose" in flat
    assert "80 pictures of 80 took no part: 80 not recognised as its class" in " ".join(out.split())
    html = (run / "report.html").read_text()
    assert "<h1>Only 0% of the labelled pictures are recognised as their label. " in html
    assert "Look at this first." in html
    overview = OpenRun(run).overview()
    assert overview["headline"].startswith("Only 0%")
    assert "are the classes in another order?" in overview["recognition"]["warning"]
    code, out, error = console(*command, "--json")
    assert json.loads(out)["recognition"]["right"] == 0


def test_a_good_audit_tells_the_share_and_warns_of_nothing(finished: Path, small: Small, tmp_path: Path) -> None:
    found = read_recognition(Run(finished))
    assert found is not None
    assert (found.labelled, found.right, found.warning) == (80, 80, "")
    assert (
        "100% of the labelled pictures are recognised as their label (80 of 80 pictures)."
        in (finished / "report.html").read_text()
    )
    assert OpenRun(finished).overview()["recognition"]["accuracy"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", PfungstWarning)
        audit = pfungst.audit(
            small.model, small.photos, out=shutil.copytree(finished, tmp_path / "run"), **small.settings
        )
    assert audit.recognition == found


def test_a_run_of_before_has_its_report_still(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "recognition.json").unlink()
    assert read_recognition(Run(run)) is None
    assert "labelled pictures" not in write_report(Run(run)).read_text()


def test_a_low_share_says_what_to_check() -> None:
    for right, told in ((70, True), (80, False)):
        labels = np.arange(100) % 5
        found = measure_recognition(labels, np.where(np.arange(100) < right, labels, 5), list("abcdef"))
        assert found is not None
        assert found.warning == ""
        assert tell_recognition(found).startswith(f"{right}% of the labelled pictures are recognised as their label")
        assert ("check --mean, --std, --size and --channels" in tell_recognition(found)) == told
