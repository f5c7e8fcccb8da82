"""The house: stages import earlier stages only, files and functions stay short, importing does no work."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "pfungst"
FILES = sorted(SOURCE.rglob("*.py"))

# Each module may import from lines above its own, and from its own folder as ``INSIDE`` says.
ORDER = """
errors
processes
store
journals
heatmaps charts
cards
lrp
settings
domains weights
hub
models
recognition predictions windows pyramids filenames
boxes
increments
baselines
methods
annotations
examples
quality
tables
sheets
trials
explanations
vectors
imports
neighbours properties clusters
alterations
spectra embeddings
findings regions
cuts assignments
evidence
own_groups
interventions judgements
readers
maps
engines strategies
overall
probes portraits
verdicts
counterevidence
own_findings
confirmations
guards
facts
reports exports
comparisons
placements
pipeline explain
runs
evaluations
tuning
plot widget viewer
demo
terminal flags
cli
__main__
""".strip().splitlines()

# The same inside folders, from what knows least to what knows most.
INSIDE = {
    "lrp": "operators targets | modules | tokens | plan functions calls marks | samples rules | unbiased | gradients"
    " presets pools | preset_files cells | interception | handlers | even | products | nodes | norms | recurrent"
    " | results places | inputs streams | traces | engine | concepts adapters layer_groups",
    "viewer": "access calls opened lassos | jobs columns selections downloads laboratory comparison | layouts own"
    " | planes | server",
    "quality": "questions | pixel_flipping localisation complexity robustness class_sensitivity conservation"
    " randomisation cells | measures",
    "exports": "rows | tables coco fiftyone virelay",
    "domains": "decoding labels preprocessing | manifests large | image",
}


def modules(path: Path) -> Iterator[str]:
    """The modules of pfungst that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("pfungst."))
        elif isinstance(node, ast.ImportFrom) and node.module == "pfungst":
            yield from (f"pfungst.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pfungst."):
            yield node.module


def place(lines: list[str], name: str) -> int:
    found = [number for number, line in enumerate(lines) if name in line.replace("|", " ").split()]
    assert found, f"{name} has no place in the order of tests/test_layout.py"
    return found[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_stages_import_earlier_stages_only(path: Path) -> None:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    if path.name == "__init__.py":
        return
    for module in modules(path):
        theirs = module.split(".")[1:]
        if theirs[0] != parts[0]:
            assert place(ORDER, theirs[0]) < place(ORDER, parts[0]), f"{path.name} imports {module}"
        elif len(parts) > 1 and len(theirs) > 1:
            inside = INSIDE[parts[0]].split("|")
            assert place(inside, theirs[1]) < place(inside, parts[1]), f"{path.name} imports {module}"


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "tests").glob("*.py"))], ids=lambda path: path.name)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 500, f"{path.name} has {len(text.splitlines())} lines: split it by ideas"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= 80, f"{path.name}: {node.name} has {length} lines"


def test_there_is_no_drawer() -> None:
    assert not [path for path in FILES if path.stem in ("utils", "util", "helpers", "misc", "common")]


def test_importing_does_no_work() -> None:
    code = (
        "import sys, pfungst; heavy = {'torch', 'numpy', 'torchvision', 'timm', 'sklearn', 'PIL'} & set(sys.modules);"
        "assert not heavy, heavy; assert pfungst.__all__ and dir(pfungst)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_optional_libraries_are_not_imported_with_the_product() -> None:
    code = "import sys, pfungst; pfungst.LRP, pfungst.audit; assert not {'torchvision', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_modules_and_public_names_say_what_they_are() -> None:
    missing = []
    for path in FILES:
        tree = ast.parse(path.read_text())
        if tree.body and not ast.get_docstring(tree):
            missing.append(path.name)
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node) and path.name != "cli.py":
                missing.append(f"{path.name}: {node.name}")
    assert not missing


def test_documents_name_files_that_exist() -> None:
    import re

    for name in ("README.md", "CONTRIBUTING.md", "docs/concepts/architecture.md"):
        text = (ROOT / name).read_text()
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / name).parent.joinpath(link).exists() or (ROOT / link).exists(), f"{name}: {link}"
        for file in re.findall(r"`((?:src|tests|benchmarks|docs)/[\w/.]+)`", text):
            assert (ROOT / file).exists(), f"{name}: {file}"
