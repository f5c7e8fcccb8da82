"""Tuning: a planted better rule is found, chance is not taken for proof, and a search goes on where it was killed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn

from pfungst.cli import cli
from pfungst.errors import DataError, RunError, SettingError
from pfungst.lrp import LRP, preset, read_preset
from pfungst.lrp.layer_groups import Alike, FlatUntil, assemble, find_groups, read_choices
from pfungst.lrp.rules import AlphaBeta, Epsilon, Flat, Gamma
from pfungst.quality.measures import MEASURES
from pfungst.quality.questions import Question
from pfungst.trials import compare, find_terms, weigh
from pfungst.tuning import tune


def planted() -> nn.Module:
    """Channel 0 marks the object: evidence +2 and -1.9 for the class, which cancel under ε; channel 1: evidence +0.5.

    Under z+ in the dense layer the object gets 2 / 2.5 of the relevance, under ε (all named presets) 0.1 / 0.6.
    """
    first, second, head = nn.Conv2d(2, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False), nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 0], [1, 0], [0, 1]])[:, :, None, None])
        second.weight.copy_(torch.eye(3)[:, :, None, None])
        head.weight.copy_(torch.tensor([[2, -1.9, 0.5], [0.1, 0.1, 0.1]]))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()


def marked(n: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures with one pixel of each channel lit at random places, labels, and masks of the objects."""
    generator = torch.Generator().manual_seed(4)
    x, masks = torch.zeros(n, 2, 6, 6), torch.zeros(n, 6, 6, dtype=torch.bool)
    for i in range(n):
        a, b = torch.randperm(36, generator=generator)[:2].tolist()
        x[i, 0, a // 6, a % 6] = x[i, 1, b // 6, b % 6] = 1 + float(torch.rand(1, generator=generator))
        masks[i, a // 6, a % 6] = True
    return x, torch.zeros(n, dtype=torch.long), masks


PLACE = {"localisation": 1.0}


def test_a_planted_better_rule_is_found_and_proven_on_the_other_half() -> None:
    model, (x, labels, masks) = planted(), marked()
    found = tune(model, (x, labels, masks), objective=PLACE, budget=60)
    assert found.proven
    assert found.preset == found.found
    assert found.rules["dense"] == "ZPlus()"
    steps = {step.name: step.rule for step in LRP(model, found.preset, bounds=(0, 2)).plan(x).steps if step.kind}
    assert steps["6"] == "ZPlus()"
    assert found.held[0].figures["mass"] == pytest.approx(0.8, abs=1e-3)
    for one in found.held[1:]:
        assert one.figures["mass"] == pytest.approx(0.1 / 0.6, abs=1e-3)
        assert one.gains["mass"][0] == pytest.approx(0.8 - 0.1 / 0.6, abs=2e-3)
        assert one.gains["score"][1] > 0
    # (mean mass - a) / (1 - a), by hand: a is 1 of 36 pixels.
    assert found.held[0].score == pytest.approx((0.8 - 1 / 36) / (1 - 1 / 36), abs=1e-3)
    assert "beats every named one" in found.lines()[0]


def test_halves_share_no_picture_and_no_figure_of_the_search_is_called_proof() -> None:
    model, (x, labels, masks) = planted(), marked()
    found = tune(model, (x, labels, masks), objective=PLACE, budget=30)
    search, held = found.about["search"], found.about["held"]
    assert not set(search) & set(held)
    assert sorted(map(int, search + held)) == list(range(24))
    # Objects of the held-back half turned over: what the search finds there is worthless, and is said to be.
    turned = masks.clone()
    rows = [int(i) for i in held]
    turned[rows] = (x[rows, 1] > 0) & ~masks[rows]
    lost = tune(model, (x, labels, turned), objective=PLACE, budget=30)
    assert lost.improved
    assert not lost.proven
    assert lost.rules["dense"] == "ZPlus()"
    assert lost.preset == preset(lost.preset.name)
    assert lost.preset.name in [one.name for one in lost.held[1:]]
    assert "does not beat" in lost.lines()[0]


def test_where_named_presets_are_best_one_is_written(tmp_path: Path) -> None:
    model, (x, labels, _) = planted(), marked()
    # The other pixel is the object: ε gives it 0.5 / 0.6, no rule that is tried more.
    found = tune(model, (x, labels, x[:, 1] > 0), objective=PLACE, out=tmp_path / "rules.json")
    assert not found.improved
    assert not found.proven
    assert read_preset(tmp_path / "rules.json") == found.preset == preset(found.preset.name)
    assert "nothing better" in found.lines()[0]
    assert all(not one.gains for one in found.held)
    assert read_preset(tmp_path / "rules.tuning" / "found.json") == found.found
    assert any("are few" in note for note in found.notes)


def test_other_masks_are_another_search(tmp_path: Path) -> None:
    model, (x, labels, masks) = planted(), marked(8)
    tune(model, (x, labels, masks), out=tmp_path / "rules.json", budget=4)
    with pytest.raises(RunError, match="of another search"):
        tune(model, (x, labels, masks.flip(1)), out=tmp_path / "rules.json", budget=4)


def network() -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4)).eval()


def noise(n: int = 12) -> Tensor:
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(2))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.json")) if p.is_file()}


def test_killed_it_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("pfungst.journals._EVERY", 0.0)
    model, x, how = network(), noise(), {"budget": 14, "batch_size": 4}
    whole = tune(model, x, out=tmp_path / "a" / "rules.json", **how)
    stopped = []

    def stop(stage: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        if (stage, done) == ("searching", 26) and not stopped:
            stopped.append(stage)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(model, x, out=tmp_path / "b" / "rules.json", progress=stop, **how)
    assert not (tmp_path / "b" / "rules.json").exists()
    explained: list[int] = []
    explain = LRP.__call__
    monkeypatch.setattr(LRP, "__call__", lambda self, *a, **k: (explained.append(1), explain(self, *a, **k))[1])
    again = tune(model, x, out=tmp_path / "b" / "rules.json", **how)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert again.record() == whole.record()
    count = len(explained)
    explained.clear()
    assert tune(model, x, out=tmp_path / "b" / "rules.json", **how).record() == whole.record()
    assert not explained  # all of it is known
    tune(model, x, **how)
    assert count < len(explained) - 10  # what was done before the kill was not done again


def test_the_seed_decides_the_halves_and_the_budget_the_number_of_trials() -> None:
    model, x = network(), noise()
    first, same, other = (tune(model, x, budget=9, seed=seed) for seed in (0, 0, 1))
    assert first.record() == same.record()
    assert first.about["search"] != other.about["search"]
    assert len(first.tried) == 9
    assert all(np.isfinite(one.score) for one in first.tried)
    assert set(first.weights) == {"srg", "class"}  # no masks


def test_scores_of_trials_are_those_of_the_measures() -> None:
    model, x = network(), noise()
    found = tune(model, x, budget=4, objective={"srg": 2, "class": 1})
    rows = [int(i) for i in found.about["held"]]
    for one in found.held:
        lrp = LRP(model, preset(one.name), bounds=(x.amin((0, 2, 3))[:, None, None], x.amax((0, 2, 3))[:, None, None]))
        target = model(x[rows]).argmax(1)

        def explain(x: Tensor, target: Tensor, lrp: LRP = lrp) -> Tensor:
            return lrp(x, target).scores.sum(1)

        question = Question(model, x[rows], target, explain(x[rows], target), explain)  # type: ignore[arg-type]
        srg = float(MEASURES["srg"](question).figures["srg"].mean())
        alike = float(MEASURES["class-sensitivity"](question).figures["top_two"].mean())
        assert one.figures["srg"] == pytest.approx(srg, abs=1e-6)
        assert one.figures["alike"] == pytest.approx(alike, abs=1e-5)
        assert one.score == pytest.approx((max(srg, 0) ** 2 * (1 - alike) / 2) ** (1 / 3), abs=1e-5)


def test_noise_gets_nothing_and_units_do_not_matter() -> None:
    weights = {"srg": 1.0, "class": 0.5}
    assert weigh({"srg": -0.01, "class": 0.5}, weights) == 0  # a random map: cos = 0
    assert weigh({"srg": 0.04, "class": 0.25}, weights) == pytest.approx(0.04 ** (2 / 3) * 0.25 ** (1 / 3))
    a, b = ({"srg": 0.3, "class": 0.1}, {"srg": 0.2, "class": 0.2})
    ratio = weigh(a, weights) / weigh(b, weights)
    scaled = [{"srg": 7 * one["srg"], "class": one["class"] / 3} for one in (a, b)]
    assert weigh(scaled[0], weights) / weigh(scaled[1], weights) == pytest.approx(ratio)


def test_gains_are_paired() -> None:
    rng = np.random.default_rng(0)
    hard = 1 + rng.normal(size=200)  # the same for both: only a paired comparison sees past it
    better = {
        "srg": hard + 0.1,
        "alike": np.full(200, 0.5),
        "mass": np.full(200, np.nan),
        "share": np.full(200, np.nan),
    }
    worse = {**better, "srg": hard + 0.05 * rng.random(200)}
    gains = compare(better, worse, {"srg": 1, "class": 1, "localisation": 1}, 0)
    assert gains["srg"][0] == pytest.approx(0.075, abs=0.005)
    assert 0.06 < gains["srg"][1] < gains["srg"][0] < gains["srg"][2] < 0.09
    wanted = 0.25**0.5 * (better["srg"].mean() ** 0.5 - worse["srg"].mean() ** 0.5)
    assert gains["score"][0] == pytest.approx(wanted)
    assert 0 < gains["score"][1] < gains["score"][0] < gains["score"][2] < 2 * wanted
    assert "mass" not in gains
    assert set(find_terms(better)) == {"srg", "class"}
    with pytest.raises(SettingError, match="only what is not known"):
        weigh({"srg": 0.1}, {"srg": 0.0})


class Deep(nn.Module):
    """Eight convolutions, one called twice, and two dense layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(5))
        self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for layer in (*self.body, self.body[0]):
            x = layer(x).relu()
        return self.head(x.mean((2, 3)))


def test_groups_and_the_rule_of_every_node() -> None:
    model, x = Deep().eval(), noise(2)
    groups = find_groups(LRP(model, "epsilon-plus").trace(x).steps)
    assert {group.name: group.nodes for group in groups} == {
        "input": ("stem",),
        "convolution low": ("body.0", "body.1"),
        "convolution middle": ("body.2", "body.3"),
        "convolution high": ("body.4", "body.0:2"),
        "dense": ("head.0", "head.2"),
    }
    base = preset("epsilon-plus")
    choices = read_choices(base, groups)
    assert choices["input"] == Alike("convolution low")
    mixed = {
        **choices, "convolution low": Gamma(0.1), "convolution high": AlphaBeta(2, 1), "dense": Epsilon(0.25)
    }  # fmt: skip
    plan = LRP(model, assemble(base, groups, mixed, "mixed")).plan(x)
    assert {step.name: step.rule for step in plan.steps if step.kind} == {
        "stem": "Gamma(gamma=0.1) at the input", "body.0": "Gamma(gamma=0.1)", "body.1": "Gamma(gamma=0.1)",
        "body.2": "ZPlus()", "body.3": "ZPlus()", "body.4": "AlphaBeta(alpha=2, beta=1)",
        "body.0:2": "AlphaBeta(alpha=2, beta=1)", "head.0": "Epsilon(epsilon=0.25)", "head.2": "Epsilon(epsilon=0.25)",
    }  # fmt: skip
    same = assemble(base, groups, choices, "same")
    assert torch.equal(LRP(model, same)(x).scores, LRP(model, base)(x).scores)
    flat = assemble(base, groups, {**choices, "input": FlatUntil("body.1")}, "flat")
    assert torch.equal(LRP(model, flat)(x).scores, LRP(model, base.flat_until("body.1"))(x).scores)
    even = assemble(base, groups, {**choices, "input": Flat()}, "even")
    assert torch.equal(LRP(model, even)(x).scores, LRP(model, "epsilon-plus-flat")(x).scores)
    assert len(find_groups(LRP(model, base).trace(x).steps, 9)) == 8
    assert [g.name for g in find_groups(LRP(nn.Linear(432, 3), "epsilon").trace(x.flatten(1)).steps)] == ["input"]


def test_transformers_divide_their_dense_layers() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.patch, self.layer, self.head = nn.Conv2d(3, 8, 4, 4), layer, nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(self.patch(x).flatten(2).transpose(1, 2)).mean(1))

    found = tune(Small().eval(), noise(8), budget=12)
    assert [name for name in found.groups if name != "input"] == ["dense low", "dense middle", "dense high"]
    assert {one.name for one in found.tried} > {"cp-lrp-gamma", "attnlrp-gamma"}
    assert "auto is cp-lrp-gamma for this model" in found.notes


def test_what_cannot_be_tuned_is_said(tmp_path: Path) -> None:
    model, x = network(), noise()
    with pytest.raises(DataError, match="4 pictures"):
        tune(model, x[:4])
    with pytest.raises(SettingError, match="budget 0"):
        tune(model, x, budget=0)
    with pytest.raises(SettingError, match="objective"):
        tune(model, x, objective={"beauty": 1})
    with pytest.raises(SettingError, match="localisation alone"):
        tune(model, x, objective=PLACE, budget=1)
    with pytest.raises(SettingError, match=r"NAME\.json"):
        tune(model, x, out=tmp_path / "rules.txt")
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(RunError, match="of another search"):
        tune(model, x, out=tmp_path / "mine.json")
    (tmp_path / "other.tuning").mkdir()
    (tmp_path / "other.tuning" / "thesis.txt").write_text("all of it")
    with pytest.raises(RunError, match="in the way"):
        tune(model, x, out=tmp_path / "other.json")
    assert (tmp_path / "other.tuning" / "thesis.txt").exists()


def test_command_line_and_back_into_the_other_commands(tmp_path: Path, monkeypatch: Any) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    (tmp_path / "made.py").write_text(
        "import torch\nfrom torch import nn\n\ndef build():\n    torch.manual_seed(0)\n    return nn.Sequential("
        "nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    common = ["made.py:build", "photos", "--size", "12", "--mean", "0.5", "--std", "0.25"]

    def call(*arguments: str) -> str:
        done = CliRunner().invoke(cli, list(arguments), catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    told = call("tune", *common, "--out", "rules.json", "--budget", "12", "--objective", "srg=1,class=0.5")
    assert "held-back pictures" in told
    assert "--preset rules.json" in told
    record = json.loads(call("tune", *common, "--out", "rules.json", "--budget", "12", "--json"))
    assert record["weights"] == {"srg": 1, "class": 1}
    written = json.loads(Path("rules.json").read_text())
    assert written["notes"]["tuned"]["outcome"] == record["outcome"]
    written["name"] = "mine"
    Path("mine.json").write_text(json.dumps(written))
    call("explain", *common, "--out", "maps", "--preset", "mine.json")
    assert json.loads(Path("maps/explanations.json").read_text())["preset"] == "mine"
    how = ["--out", "quality", "--methods", "epsilon,mine.json", "--measures", "complexity", "--json"]
    assert "mine" in call("evaluate", *common, *how)
    assert replace(read_preset("mine.json"), name="") == replace(read_preset("rules.json"), name="")
