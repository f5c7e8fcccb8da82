"""A finding tested again from its run folder, and the counter-evidence: other rules, another model, other pictures."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NET, Console, Small
from PIL import Image
from scipy.stats import binomtest

import pfungst
from pfungst.counterevidence import second_laboratory, wilson
from pfungst.domains.preprocessing import Preprocess
from pfungst.errors import DataError, ModelError, RunError, SettingError
from pfungst.findings import fit_discriminant, principal_coordinates, valley_of
from pfungst.interventions import set_scene, try_scene
from pfungst.maps import make_laboratory
from pfungst.models import LoadedModel, load_model
from pfungst.portraits import read_columns
from pfungst.properties import SEEN
from pfungst.store import Run
from pfungst.strategies import rank_candidates
from pfungst.terminal import print_confirmation
from pfungst.verdicts import make_case


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def weights_of(small: Small, path: Path, **changed: Any) -> Path:
    """The small network's weights with some columns of its last layer set."""
    weights = torch.load(small.weights)
    for channel, value in changed.items():
        weights["scores.weight"][:, int(channel[1:])] = value
    torch.save(weights, path)
    return path


@pytest.fixture
def honest(small: Small, tmp_path: Path) -> Path:
    """Weights of a network that sees yellow (channel 3) and makes nothing of it."""
    return weights_of(small, tmp_path / "honest.pt", c3=0.0)


# ---- repeated --------------------------------------------------------------------------------------------------------


def test_the_command_repeats_a_finding_and_keeps_it(run: Path, console: Console) -> None:
    first = json.loads((run / "findings.json").read_text())["findings"][0]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, output, error = console("confirm", run, "f001")
    assert (code, error) == (0, "")
    assert "again: confirmed" in output
    assert f"first: confirmed ({first['reason']})" in output
    kept = run / "findings/f001/confirmed_1.json"
    entry = json.loads(kept.read_text())
    assert (entry["verdict"], entry["seed"], entry["samples"]) == ("confirmed", 1, 48)
    assert (entry["model"]["same"], entry["same_pictures"]) == (True, True)
    assert entry["first"]["evidence"] == first["evidence"]
    again = {one["test"]: one["effect"] for one in entry["evidence"]}
    for one in first["evidence"]:
        assert again[one["test"]] != one["effect"], "other draws"
        assert f"{one['effect']:+.2f}" in output
    assert again["cut:colour"] == pytest.approx(first["evidence"][1]["effect"], rel=0.2)
    changed = {path.name for path in before if path.read_bytes() != before[path]}
    assert changed == {"report.html"}, "nothing else is changed"
    assert "Tested again, seed 1" in (run / "report.html").read_text()
    code, output, error = console("confirm", run, "f001", "--json")
    assert json.loads(output) == entry
    with_first_seed = json.loads(console("confirm", run, "f001", "--seed", "0", "--json")[1])
    assert with_first_seed["evidence"] == first["evidence"], "the run's own draws give the run's own figures"
    assert kept.exists()


def test_the_table_can_be_read_in_80_columns(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    first = json.loads((finished / "findings.json").read_text())["findings"][0]
    evidence = [{**one, "effect": -12.34, "interval": [-23.45, -10.67], "flips": 1.0, "control_flips": 1.0}
                for one in first["evidence"]]  # fmt: skip
    for one in first["evidence"]:
        one["effect"] = -11.22
    seen = SimpleNamespace(
        finding="f001", seed=1, first=first, evidence=[SimpleNamespace(**one) for one in evidence], lines=list
    )
    print_confirmation(seen)
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    for one in evidence:
        (line,) = [line for line in shown.splitlines() if line.strip().startswith(f"{one['test']} ")]
        assert line.split()[-7:-3] == ["-11.22", "-12.34", "-23.45", "-10.67"]
        assert line.rstrip().endswith("100% (100%)")


def test_python_and_command_line_agree_and_more_pictures_can_be_asked_for(run: Path, console: Console) -> None:
    said = json.loads(console("confirm", run, "f001", "--seed", "3", "--samples", "8", "--json")[1])
    finding = pfungst.reopen(run).findings[0]
    assert finding.confirm(seed=3, samples=8).record() == said
    counts = {one["test"]: one["n"] for one in said["evidence"]}
    more = {one.test: one.n for one in finding.confirm(seed=3, samples=40).evidence}
    assert more["paste:same place"] == 40 > counts["paste:same place"]
    with pytest.raises(SettingError, match="samples 7"):
        finding.confirm(samples=7)


def test_a_model_that_changed_is_refused_and_another_one_is_named(
    run: Path, small: Small, honest: Path, console: Console
) -> None:
    code, _, error = console("confirm", run, "f001", "--weights", honest)
    assert code == 1
    assert "its digest differs" in error
    code, output, _ = console("confirm", run, "f001", "--model", small.model, "--weights", honest, "--json")
    entry = json.loads(output)
    assert code == 0
    assert (entry["model"]["same"], entry["same_pictures"]) == (False, None)
    assert entry["verdict"] == "refuted", "a network that makes nothing of yellow does not need the corner"
    shown = console("confirm", run, "f001", "--model", small.model, "--weights", honest)[1]
    assert f"Another model than the run's was asked: {small.model}." in shown


def test_a_run_of_a_module_needs_its_model_named(small: Small, tmp_path: Path, console: Console) -> None:
    loaded = load_model(small.model, weights=small.weights, size=24)
    settings = {**small.settings, "weights": None, "max_findings": 1}
    result = pfungst.audit(loaded.module, small.photos, out=tmp_path / "run", **settings)
    assert result.findings[0].confirm().verdict == "confirmed"
    code, _, error = console("confirm", tmp_path / "run", "f001")
    assert code == 1
    assert "was passed from Python (Net)" in error
    named = ["--model", small.model, "--weights", small.weights]
    entry = json.loads(console("confirm", tmp_path / "run", "f001", *named, "--json")[1])
    assert entry["model"]["same"], "told by its digest, not by its name"
    assert entry["verdict"] == "confirmed"


BESIDE = """

def beside():  # reads its weights as a user's own code does: from the working folder
    model = Net()
    model.load_state_dict(torch.load("net.pt", weights_only=True))
    return model
"""


def begun_in(folder: Path | None, run: Path, name: str, digest: str, **settings: Any) -> None:
    """Make a run one that was begun there with these relative names."""
    description = json.loads((run / "run.json").read_text())
    description["model"] |= {"name": name, "digest": digest}
    description |= {"folder": folder and str(folder), "settings": {**description["settings"], **settings}}
    (run / "run.json").write_text(json.dumps(description))


def test_a_run_is_taken_up_from_any_folder(
    run: Path, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    for folder in (home, away):
        folder.mkdir()
    (home / "net.py").write_text(NET + BESIDE)
    shutil.copy(small.weights, home / "net.pt")
    (home / "names.txt").write_text("leaf\nrose\n")
    digest = load_model(f"{home / 'net.py'}:build", weights=small.weights, size=24).digest
    monkeypatch.chdir(away)
    begun_in(home, run, "net.py:beside", digest, weights=None, classes="names.txt")
    code, _, error = console("confirm", "../run", "f001", "--samples", "8")
    assert (code, error) == (0, "")
    assert Path.cwd() == away
    begun_in(home, run, "net.py:build", digest, weights="net.pt", classes=None)
    subject = pfungst.reopen(run).subject
    assert subject.model.name == f"{home / 'net.py'}:build"
    assert subject.settings.weights == str(home / "net.pt")
    shutil.copy(small.weights, away / "here.pt")
    assert pfungst.reopen(run, weights="here.pt").subject.settings.weights == "here.pt", (
        "what is given now is from here"
    )
    # A run that does not say where it was begun, as older ones do not, and one whose folder has gone.
    for folder in (None, tmp_path / "gone"):
        begun_in(folder, run, "net.py:build", digest, weights=str(home / "net.pt"))
        code, _, error = console("confirm", "../run", "f001")
        assert code == 1
        assert f"the run's model net.py:build is not in {away}" in error
        assert "--model PLACE/net.py:build" in error
        monkeypatch.chdir(home)
        assert pfungst.reopen(run).subject.model.name == "net.py:build"
        monkeypatch.chdir(away)


def test_pictures_may_have_moved_or_changed(run: Path, small: Small, tmp_path: Path) -> None:
    photos = small.copy(tmp_path / "moved")
    first = pfungst.reopen(run).findings[0].confirm()
    moved = pfungst.reopen(run, images=photos).findings[0].confirm()
    assert moved.same_pictures
    assert moved.evidence == first.evidence
    for path in (photos / "rose").iterdir():
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).point(lambda v: v // 2).save(path)
    changed = pfungst.reopen(run, images=photos).findings[0].confirm()
    assert changed.same_pictures is False
    assert any("not those of the run" in line for line in changed.lines())
    with pytest.raises(DataError, match="the pictures of the run are not there"):
        pfungst.reopen(run, images=tmp_path / "nowhere")


def test_a_manifest_and_a_limit_need_not_be_known_again(small: Small, tmp_path: Path) -> None:
    ids = [f"{name}/{i:02d}.png" for name in ("rose", "leaf") for i in range(40)]
    (tmp_path / "m.csv").write_text("\n".join(["path,label", *(f"{small.photos / name},{name[:4]}" for name in ids)]))
    given = {**small.settings, "limit": 76, "max_findings": 1}
    made = pfungst.audit(small.model, tmp_path / "m.csv", out=tmp_path / "run", **given)
    again = pfungst.reopen(tmp_path / "run")
    assert again.subject.data.ids == made.subject.data.ids
    assert again.subject.data.labels.tolist() == made.subject.data.labels.tolist()
    assert again.findings[0].confirm(seed=0).evidence == made.findings[0].confirm(seed=0).evidence


def test_refusals(run: Path, console: Console, small: Small) -> None:
    assert "has no finding 'f009'" in console("confirm", run, "f009")[2]
    assert "there is no preset 'epsilom'" in console("confirm", run, "f001", "--also-preset", "epsilom")[2]
    assert "give one for each" in console("confirm", run, "f001", "--also-weights", small.weights)[2]
    assert "presets have no part" in console("confirm", run, "f002", "--also-preset", "epsilon")[2]
    description = json.loads((run / "run.json").read_text())
    del description["stages"]["samples"]
    (run / "run.json").write_text(json.dumps(description))
    with pytest.raises(RunError, match="is not finished"):
        pfungst.reopen(run)


# ---- another preset, another model -----------------------------------------------------------------------------------


def test_other_rules_find_the_same_region(run: Path) -> None:
    result = pfungst.reopen(run).findings[0].confirm(presets=["epsilon", "epsilon-plus-flat"])
    assert set(result.presets) == {"epsilon", "epsilon-plus-flat"}
    for found in result.presets.values():
        assert found["verdict"] == "confirmed"
        assert found["jaccard"] > 0.7 > 10 * found["chance"]
    assert result.presets["epsilon"]["evidence"] != result.presets["epsilon-plus-flat"]["evidence"]


def test_another_model_is_asked_about_the_same_pictures(
    run: Path, small: Small, honest: Path, console: Console
) -> None:
    both = ["--also", small.model, "--also-weights", small.weights, "--also", small.model, "--also-weights", honest]
    entry = json.loads(console("confirm", run, "f001", *both, "--json")[1])
    same, other = (entry["models"][f"{small.model} with {path}"] for path in (small.weights, honest))
    assert same["evidence"] == entry["evidence"]
    assert other["verdict"] == "refuted"
    assert abs({one["test"]: one for one in other["evidence"]}["paste:same place"]["effect"]) < 0.02
    later = json.loads(console("confirm", run, "f001", "--also-preset", "epsilon", "--json")[1])
    assert later["models"] == entry["models"], "what was found before stays beside it"
    assert set(later["presets"]) == {"epsilon"}


def _permuted(small: Small) -> LoadedModel:
    """The same network, its outputs in another order and with one class more."""
    loaded = load_model(small.model, weights=small.weights, size=24)

    class Wrapped(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            leaf, rose = loaded.module(x).unbind(1)
            return torch.stack([rose, torch.full_like(rose, -50.0), leaf], 1)

    return replace(loaded, module=Wrapped().eval(), classes=("rose", "tulip", "leaf"))


def _rescaled(small: Small) -> LoadedModel:
    """The same network behind another preprocessing: twice as large, from -1 to 1, in the order BGR."""
    loaded = load_model(small.model, weights=small.weights, size=24)

    class Wrapped(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return loaded.module((torch.nn.functional.avg_pool2d(x, 2).flip(1) + 1) / 2)

    other = Preprocess((48, 48), (0.5,) * 3, (0.5,) * 3, channels="BGR")
    return replace(loaded, module=Wrapped().eval(), preprocess=other)


def _with_a_function(small: Small) -> LoadedModel:
    """The same network with a preprocessing of its own."""
    loaded = load_model(small.model, weights=small.weights, size=24)

    def custom(picture: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1)

    return replace(loaded, preprocess=Preprocess((24, 24), custom=custom))


@pytest.mark.parametrize(("change", "close"), [(_permuted, 1e-6), (_rescaled, 0.15), (_with_a_function, 1e-3)])
def test_a_second_model_gets_the_picture_as_it_wants_it(change: Any, close: float, run: Path, small: Small) -> None:
    opened = pfungst.reopen(run)
    subject, store = opened.subject, Run(run)
    lab = make_laboratory(subject)
    second = second_laboratory(subject, lab, change(small))
    inputs = subject.load(range(30, 50))
    expected = lab.ask(inputs)
    assert float((second.ask(inputs)[:, :2] - expected).abs().max()) < close * float(expected.std())
    case = make_case(store, subject, rank_candidates(store, subject)[0][0])
    scene = set_scene(lab, case, seed=0)
    own, others = (try_scene(one, case.target, scene, 0) for one in (lab, second))
    for one, two in zip(own.evidence, others.evidence, strict=True):
        assert two.effect == pytest.approx(one.effect, abs=close)


def test_a_second_model_of_other_classes_is_refused(run: Path, small: Small) -> None:
    opened = pfungst.reopen(run)
    lab = make_laboratory(opened.subject)
    with pytest.raises(ModelError, match="does not know the classes leaf"):
        second_laboratory(opened.subject, lab, replace(opened.subject.model, classes=("rose", "oak")))
    three = replace(_permuted(small), classes=None)
    with pytest.raises(ModelError, match="3 outputs for 2 classes"):
        second_laboratory(opened.subject, lab, three).ask(opened.subject.load([0]))


# ---- other pictures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("successes", "n"), [(0, 5), (5, 5), (1, 1), (3, 17), (50, 100), (999, 1000)])
def test_the_interval_is_wilsons(successes: int, n: int) -> None:
    known = binomtest(successes, n).proportion_ci(method="wilson")
    np.testing.assert_allclose(wilson(successes, n), (known.low, known.high), atol=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("dimensions", [5, 30])
def test_new_samples_score_as_the_formula_says(dimensions: int) -> None:
    rng = np.random.default_rng(0)
    vectors, new = rng.normal(size=(50, dimensions)) + 3, rng.normal(size=(7, dimensions)) + 3
    inside = np.arange(50) < 15
    vectors[inside, 0] += 6
    discriminant, held_out = fit_discriminant(vectors, inside)
    a, b = vectors[inside].mean(0), vectors[~inside].mean(0)
    covariance = np.cov(vectors.T, bias=True)
    covariance = 0.8 * covariance + 0.2 * np.trace(covariance) / dimensions * np.eye(dimensions)
    direction = np.linalg.solve(covariance, a - b)
    expected = (new - (a + b) / 2) @ direction / ((a - b) @ direction)
    np.testing.assert_allclose(discriminant.score(new), expected, atol=1e-9)
    depth, place = valley_of(held_out, inside, ~inside)
    assert (discriminant.depth, discriminant.valley) == (depth, place)
    assert depth > 0.5
    assert (held_out[inside] > place).mean() > 0.9 > 0.1 > (held_out[~inside] > place).mean()


def test_more_dimensions_than_samples_lose_nothing_of_their_own() -> None:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(40, 200))
    inside = np.arange(40) < 12
    vectors[inside, :20] += 2
    discriminant, _ = fit_discriminant(vectors, inside)
    assert np.isfinite(discriminant.direction).all()
    scores = discriminant.score(vectors)
    assert scores[inside].mean() == pytest.approx(0.5)
    assert scores[~inside].mean() == pytest.approx(-0.5)
    assert principal_coordinates(vectors, 60).shape == (40, 39)


def _elsewhere(small: Small, folder: Path, labelled: bool) -> Path:
    """Ten roses with the corner, ten without, five that look like leaves, one broken file."""
    wanted = [f"rose/{i:02d}.png" for i in (*range(10), *range(20, 30))] + [f"leaf/{i:02d}.png" for i in range(5)]
    place = folder / "rose" if labelled else folder
    place.mkdir(parents=True)
    for number, name in enumerate(wanted):
        shutil.copy(small.photos / name, place / f"{number:02d}.png")
    (place / "broken.png").write_bytes(b"none")
    return folder


@pytest.mark.parametrize("labelled", [True, False])
def test_how_often_the_cue_is_elsewhere(labelled: bool, run: Path, small: Small, tmp_path: Path) -> None:
    folder = _elsewhere(small, tmp_path / "elsewhere", labelled)
    finding = pfungst.reopen(run).findings[0]
    result = finding.confirm(folders=[folder])
    found = result.elsewhere[str(folder)]
    assert found["unreadable"] == 1
    assert (found["count"], found["n"]) == (10, 25 if labelled else 20)
    assert found["interval"] == list(wilson(10, found["n"]))
    assert (found["own"]["count"], found["own"]["n"]) == (16, 40)
    if labelled:
        with_cue, without = found["accuracy"]["with"], found["accuracy"]["without"]
        assert (with_cue["count"], with_cue["n"]) == (10, 10)
        assert (without["count"], without["n"]) == (10, 15), "roses that look like leaves are not recognised"
    else:
        assert found["accuracy"] is None
    of = "25 pictures labelled as the class, recognised or not" if labelled else "20 pictures taken for the class"
    assert sum(f"the cue is in 10 of {of}" in line for line in result.lines()) == 1


def test_the_runs_own_share_is_told_once_for_all_folders(run: Path, small: Small, tmp_path: Path) -> None:
    folders = [_elsewhere(small, tmp_path / name, True) for name in ("first", "second")]
    lines = pfungst.reopen(run).findings[0].confirm(folders=folders).lines()
    own = [line for line in lines if line.startswith("the run's own pictures: ")]
    assert len(own) == 1
    assert "16 of 40 pictures labelled as the class" in own[0]
    assert [line.split(": ")[0] for line in lines[lines.index(own[0]) + 1 :]][::2] == [str(one) for one in folders]
    report = (run / "report.html").read_text()
    assert report.count("the run&#39;s own pictures: ") == 1


def test_a_folder_without_the_class_is_refused(run: Path, small: Small, tmp_path: Path) -> None:
    shutil.copytree(small.photos / "leaf", tmp_path / "only" / "leaf")
    with pytest.raises(DataError, match="has no pictures of 'rose'"):
        pfungst.reopen(run).findings[0].confirm(folders=[tmp_path / "only"])


def test_a_property_of_whole_pictures_is_counted_elsewhere_too(run: Path, small: Small) -> None:
    finding = pfungst.reopen(run).findings[1]
    assert finding.where["kind"] == "whole"
    found = finding.confirm(folders=[small.photos]).elsewhere[str(small.photos)]
    assert (found["count"], found["n"]) == (finding.size, 40)


def test_a_run_of_before_a_property_was_measured_is_still_of_use(
    run: Path, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = {name: getattr(Run, name) for name in ("read_array", "read_view")}
    for name, read in now.items():

        def fewer(self: Run, array: str, *rows: Any, read: Any = read) -> np.ndarray:
            values: np.ndarray = read(self, array, *rows)
            return values[:, :-1] if array == "properties" and self.path == run else values

        monkeypatch.setattr(Run, name, fewer)
    opened = pfungst.reopen(run)
    found = opened.findings[1].confirm(folders=[small.photos]).elsewhere[str(small.photos)]
    assert found["count"] == opened.findings[1].size
    assert len(opened.place(small.photos)) == len(opened.subject.data)
    assert list(SEEN)[-1] not in read_columns(opened.run, opened.subject).numbers
    assert list(SEEN)[-2] in read_columns(opened.run, opened.subject).numbers
