"""Guards: a test file that stands alone, fails on a model that uses the cue, and passes on one that does not."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Console, Small
from PIL import Image

import pfungst
from pfungst.domains.preprocessing import Preprocess
from pfungst.guards import Guard, _render, write_guard

OWN_MODEL = """
def load_model():
    import importlib.util
    spec = importlib.util.spec_from_file_location("net", {net!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.build()
    model.load_state_dict(torch.load({weights!r}))
    return model.eval()
"""


def run_pytest(folder: Path) -> str:
    """What pytest says of a folder, in a process of its own."""
    source = str(Path(pfungst.__file__).parents[1])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA", str(folder)]
    environment = {**os.environ, "PYTHONPATH": source}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder, env=environment).stdout


@pytest.fixture(scope="module")
def written(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Guard, pfungst.Audit]:
    audit = pfungst.reopen(finished)
    out = tmp_path_factory.mktemp("guard") / "test_cue.py"
    return write_guard(audit.run, audit.subject, audit.findings[0].record, out), audit


def test_the_audited_model_fails_as_the_guard_foretold(written: tuple[Guard, pfungst.Audit]) -> None:
    guard, _ = written
    assert guard.fails
    output = run_pytest(guard.path.parent)
    assert "2 failed" in output
    turned = re.search(r"the cue turns (\d+)% of the pictures to class 1, the control (\d+)%", output)
    raised = re.search(r"the cue raises the logit of class 1 by (\S+), the control by (\S+)", output)
    assert turned
    assert raised
    assert int(turned[1]) - int(turned[2]) == pytest.approx(100 * guard.decisions, abs=1)
    assert float(raised[1]) - float(raised[2]) == pytest.approx(guard.logit, rel=0.01)


def test_an_honest_model_passes_without_pfungst(
    written: tuple[Guard, pfungst.Audit], small: Small, tmp_path: Path
) -> None:
    guard, _ = written
    weights = torch.load(small.weights)
    weights["scores.weight"][:, 3] = 0  # it sees yellow, and makes nothing of it
    torch.save(weights, tmp_path / "honest.pt")
    folder = tmp_path / "theirs"
    shutil.copytree(guard.path.parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "conftest.py").write_text("import sys\nsys.modules['pfungst'] = None\n")
    text = guard.path.read_text()
    own = OWN_MODEL.format(net=str(small.root / "net.py"), weights=str(tmp_path / "honest.pt"))
    edited = re.sub(r"\ndef load_model\(\):\n.*?(?=\n\n\ndef )", lambda _: own.rstrip(), text, flags=re.S)
    assert edited != text
    (folder / "test_honest.py").write_text(edited)
    output = run_pytest(folder)
    assert "PASSED test_honest.py::test_the_cue_does_not_decide" in output
    assert "PASSED test_honest.py::test_the_cue_does_not_raise_the_class" in output
    assert "ERROR test_cue.py::test_the_cue_does_not_decide" in output
    assert "edit load_model() in this file" in output


def test_it_needs_four_libraries_and_names_no_place_of_this_machine(
    written: tuple[Guard, pfungst.Audit], small: Small
) -> None:
    text = written[0].path.read_text()
    tree = ast.parse(text)
    imported = {(n.module if isinstance(n, ast.ImportFrom) else n.names[0].name).split(".")[0]
                for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)}  # fmt: skip
    assert imported == {"__future__", "pathlib", "numpy", "pytest", "torch", "PIL", "pfungst"}
    code = text.split('"""', 2)[2]
    assert str(small.root) not in code, "files are named from the guard's own folder"
    assert "test_cue_pictures" in code


def test_the_pictures_are_the_cue_and_its_control_only(written: tuple[Guard, pfungst.Audit], small: Small) -> None:
    guard, _ = written
    assert (guard.pictures, len(list(guard.folder.iterdir()))) == (16, 48)
    receivers = {Image.open(path).tobytes() for path in (small.photos / "leaf").iterdir()}
    donors = {name: np.stack([np.asarray(Image.open(path)) for path in (small.photos / "rose").iterdir()
                              if (int(path.stem) < 16) == (name == "cue")]) for name in ("cue", "control")}  # fmt: skip
    box = np.zeros((24, 24), dtype=bool)
    box[:5, :5] = True
    for i in range(16):
        assert Image.open(guard.folder / f"receiver_{i:02d}.png").tobytes() in receivers
        for name, own in donors.items():
            picture = np.asarray(Image.open(guard.folder / f"{name}_{i:02d}.png"))
            opaque = picture[..., 3] > 0
            assert set(np.unique(picture[..., 3])) == {0, 255}
            assert opaque[box].mean() > 0.8
            assert not opaque[~box].any()
            assert not picture[~opaque].any(), "nothing else of the picture goes out"
            assert (own[:, opaque] == picture[opaque][:, :3]).all((1, 2)).any(), "it is a piece of such a picture"


@pytest.mark.parametrize(
    ("verdict", "told"),
    [
        ("confirmed", ""),
        ("refuted", "Warning: the experiments refuted that the model uses f001 ("),
        ("open", "Warning: the experiments left open that the model uses f001 ("),
    ],
)
def test_a_finding_that_is_not_confirmed_is_warned_of(
    finished: Path, tmp_path: Path, console: Console, verdict: str, told: str
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    content = json.loads((run / "findings.json").read_text())
    content["findings"][0]["verdict"] = verdict
    (run / "findings.json").write_text(json.dumps(content))
    code, _, error = console("guard", run, "f001", "--out", tmp_path / "test_it.py", "--count", "4")
    assert code == 0
    assert (tmp_path / "test_it.py").exists()
    assert ("Warning" in error) == bool(told)
    assert told in " ".join(error.split())


def test_the_same_again_is_the_same_bytes(written: tuple[Guard, pfungst.Audit], finished: Path, tmp_path: Path,
                                          console: Console) -> None:  # fmt: skip
    guard, _ = written
    place = guard.path.parent.parent / "again"  # as far from the model's files
    code, output, error = console("guard", finished, "f001", "--out", place / "test_cue.py")
    assert (code, error) == (0, "")
    assert "The run's own model fails it" in output
    for path in [guard.path, *guard.folder.iterdir()]:
        assert (place / path.relative_to(guard.path.parent)).read_bytes() == path.read_bytes()
    code, _, error = console("guard", finished, "f001", "--out", place / "test_cue.py")
    assert code == 1
    assert "is there already" in error
    assert "is no name of a test file" in console("guard", finished, "f001", "--out", tmp_path / "cue.txt")[2]


def test_a_property_of_whole_pictures_has_a_guard_too(written: tuple[Guard, pfungst.Audit], tmp_path: Path) -> None:
    audit = written[1]
    record = audit.findings[1].record
    assert record["where"]["kind"] == "whole"
    guard = write_guard(audit.run, audit.subject, record, tmp_path / "test_whole.py", count=5)
    assert guard.pictures == 5
    cue, control, receiver = (
        np.asarray(Image.open(guard.folder / f"{n}_00.png")) for n in ("cue", "control", "receiver")
    )
    assert (cue[..., 3] == 255).all()
    assert np.abs(cue[..., :3] - receiver.astype(int)).mean() > 1
    assert np.abs(control[..., :3] - receiver.astype(int)).mean() > 1


@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess((24, 24), (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)),
        Preprocess((24, 24), (104.0, 117.0, 123.0), (1.0,) * 3, channels="BGR", scale=1.0),
        Preprocess((24, 24), (0.5,), (0.25,), channels="L"),
        Preprocess((24, 24), custom=lambda picture: torch.zeros(3, 24, 24)).measured((-1.0, 0.0, 2.0), (1.0, 3.0, 4.0)),
    ],
    ids=["RGB", "BGR", "grey", "function"],
)
def test_its_inputs_are_those_of_the_audit(preprocess: Preprocess, written: tuple[Guard, pfungst.Audit]) -> None:
    guard, audit = written
    text = _render(replace(audit.subject, preprocess=preprocess), audit.findings[0].record, guard, "fixed")
    names: dict[str, Any] = {"__file__": str(guard.path)}
    exec(compile(text, "guard", "exec"), names)
    pixels = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(names["prepare"](pixels), preprocess.from_pixels(pixels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ['a "quoted" rose', "back\\slash", 'triple """ end', "two\nlines", "{{ x }}", "rosé"])
def test_odd_class_names_do_no_harm(name: str, written: tuple[Guard, pfungst.Audit]) -> None:
    guard, audit = written
    record = {**audit.findings[0].record, "class": name, "summary": f"{name} are recognised by {name}"}
    ast.parse(_render(audit.subject, record, guard, "fixed"))
