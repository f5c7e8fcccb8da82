"""Presets as files: exact round trips, errors that name the place, and that they are taken wherever names are."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pfungst.errors import RunError, SettingError
from pfungst.lrp import LRP, PRESETS, Preset, Row, preset, read_preset, write_preset
from pfungst.lrp.preset_files import read_notes
from pfungst.lrp.rules import AlphaBeta, Epsilon, Flat, Gamma, Pass, Recurrent, Rule, WSquare, ZBox, ZPlus
from pfungst.methods import make_method
from pfungst.pipeline import audit, make_settings
from pfungst.runs import reopen
from pfungst.settings import Settings

EVERY = Preset(
    "every rule",
    (
        Row(ZBox(), "convolution", "input", "stem.*"),
        Row(AlphaBeta(3.5, 2.5), name="a[[]0].b:2"),
        Row(Recurrent(0.1, 0.3), "recurrent"),
        Row(Gamma(1 / 3), "dense", None, "ünï"),
        *(Row(rule) for rule in (Pass(), Flat(), WSquare(), ZPlus(), Epsilon(1e-320))),
    ),
    "prop", "constant", "identity", "diagonal", "proportional", ("layer1.0", WSquare()),
)  # fmt: skip


@pytest.mark.parametrize("one", [*(make() for make in PRESETS.values()), EVERY], ids=lambda one: one.name)
@pytest.mark.parametrize("flat", [False, True])
def test_round_trips_are_exact(tmp_path: Path, one: Preset, flat: bool) -> None:
    one = one.flat_until("layer2", Flat()) if flat else one
    write_preset(one, tmp_path / "a" / "p.json", {"model": "mine", "scores": {"srg": 0.25}})
    assert read_preset(tmp_path / "a" / "p.json") == one == preset(str(tmp_path / "a" / "p.json"))
    assert read_notes(tmp_path / "a" / "p.json") == {"model": "mine", "scores": {"srg": 0.25}}
    again = tmp_path / "q.json"
    write_preset(read_preset(tmp_path / "a" / "p.json"), again, read_notes(tmp_path / "a" / "p.json"))
    assert again.read_bytes() == (tmp_path / "a" / "p.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "q.json"]


def test_a_row_is_a_line(tmp_path: Path) -> None:
    write_preset(EVERY, tmp_path / "p.json")
    lines = (tmp_path / "p.json").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith('  {"') for line in lines) == len(EVERY.rows)
    assert '  {"kind": "convolution", "position": "input", "name": "stem.*", "rule": "ZBox"},' in lines


WHOLE = {
    "format": "pfungst preset", "version": 1, "name": "mine",
    "rows": [{"kind": "convolution", "rule": "Gamma", "gamma": 0.1}, {"rule": "Epsilon"}],
}  # fmt: skip


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps(WHOLE))
    assert preset(tmp_path / "p.json") == Preset("mine", (Row(Gamma(0.1), "convolution"), Row(Epsilon())))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "zennit"}, "is no preset file"),
        ({"version": 2}, "version 2"),
        ({"name": ""}, "name is ''"),
        ({"name": "a\nb"}, "name is"),
        ({"rows": []}, "0 rows"),
        ({"rows": "all"}, "rows, automatic or notes are damaged"),
        ({"rows": ["ZPlus"]}, "row 1 is 'ZPlus'"),
        ({"rows": [{"rule": "Zplus"}]}, "row 1: rule 'Zplus' is unknown"),
        ({"rows": [{"rule": "Epsilon"}, {"kind": "dense"}]}, "row 2: rule None is unknown"),
        ({"rows": [{"rule": "Epsilon", "gamma": 1}]}, "row 1: there is no 'gamma'"),
        ({"rows": [{"rule": "Epsilon", "epsilon": -1}]}, "row 1: epsilon is -1, it must be >= 0"),
        ({"rows": [{"rule": "Epsilon", "epsilon": "1"}]}, "row 1: epsilon is '1'"),
        ({"rows": [{"rule": "Epsilon", "epsilon": True}]}, "row 1: epsilon is True"),
        ({"rows": [{"rule": "Gamma", "gamma": float("nan")}]}, "row 1: gamma is nan"),
        ({"rows": [{"rule": "AlphaBeta", "alpha": 2, "beta": 2}]}, "row 1: alpha=2, beta=2"),
        ({"rows": [{"rule": "Recurrent", "bias_factor": 2}]}, "row 1: bias_factor is 2"),
        ({"rows": [{"rule": "Flat", "kind": "pool"}]}, "row 1: preset row with kind='pool'"),
        ({"rows": [{"rule": "Flat", "kind": ["dense"]}]}, "row 1: kind"),
        ({"rows": [{"rule": "Flat", "name": 3}]}, "row 1: name is 3"),
        ({"gates": "some"}, "'some' is unknown"),
        ({"gate": "all"}, "there is no 'gate'"),
        ({"even": {"layer": "a", "rule": "ZPlus"}}, "even: rule ZPlus"),
        ({"even": {"rule": "Flat"}}, "even is"),
        ({"automatic": True}, "automatic True"),
        ({"automatic": 1}, "damaged"),
        ({"notes": []}, "damaged"),
    ],
)
def test_errors_name_the_place_and_the_remedy(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({**WHOLE, **change}))
    with pytest.raises(SettingError) as error:
        preset(path)
    assert said in str(error.value).replace(str(path), "")
    assert error.value.remedy
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"format": "pfungst preset"}'])
def test_damaged_files_are_errors(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "p.json").write_bytes(text)
    with pytest.raises(SettingError, match=r"p\.json"):
        preset(tmp_path / "p.json")


def test_what_cannot_be_read_or_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"there is no preset file nowhere\.json"):
        preset("nowhere.json")
    with pytest.raises(SettingError, match="there is no preset 'epsilonplus'"):
        preset("epsilonplus")
    (tmp_path / "d.json").mkdir()
    with pytest.raises(SettingError, match="cannot be read"):
        preset(tmp_path / "d.json")
    with pytest.raises(SettingError, match="cannot hold that"):
        write_preset(Preset("x", (Row(Gamma(float("inf"))),)), tmp_path / "x.json")

    @dataclass(frozen=True)
    class Own(Rule):
        pass

    with pytest.raises(SettingError, match="is not one of pfungst's"):
        write_preset(Preset("x", (Row(Own()),)), tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)]
    return nn.Sequential(*layers).eval()


def test_every_node_gets_the_rule_of_the_file(tmp_path: Path) -> None:
    mine = Preset("mine", (Row(Flat(), position="input"), Row(Gamma(0.123456789), name="2"), Row(Epsilon(0.25))))
    write_preset(mine, tmp_path / "mine.json")
    model, x = network(), torch.randn(2, 3, 8, 8)
    plan = LRP(model, str(tmp_path / "mine.json")).plan(x)
    assert {step.name: step.rule for step in plan.steps if step.kind} == {
        "0": "Flat() at the input", "2": "Gamma(gamma=0.123456789)", "5": "Epsilon(epsilon=0.25)"
    }  # fmt: skip
    wanted = LRP(model, mine)(x).scores
    assert torch.equal(LRP(model, tmp_path / "mine.json")(x).scores, wanted)
    method = make_method(str(tmp_path / "mine.json"), model)
    assert (method.name, method.kind) == ("mine", "preset")
    torch.testing.assert_close(method(x, torch.tensor([0, 1])), make_method(mine, model)(x, torch.tensor([0, 1])))


def test_a_run_depends_on_what_the_file_says(tmp_path: Path) -> None:
    mine = Preset("mine", (Row(Gamma(0.1234567)),))
    for name, one in (("a", mine), ("b", mine), ("c", replace(mine, rows=(Row(Gamma(0.1234568)),)))):
        write_preset(one, tmp_path / f"{name}.json", {"from": name})
    records = [Settings(preset=str(tmp_path / f"{name}.json")).record() for name in "abc"]
    assert records[0] == records[1] != records[2]
    assert read_preset(tmp_path / "a.json").describe() != read_preset(tmp_path / "c.json").describe()
    for file in tmp_path.iterdir():
        file.unlink()  # a run never needs the file again
    assert make_settings(json.loads(json.dumps(records[0]))).preset == mine
    assert Settings(preset="epsilon").record()["preset"] == "epsilon"
    with pytest.raises(SettingError, match="or a preset file"):
        Settings(preset="nothing")
    with pytest.raises(SettingError, match="there is no preset file"):
        Settings(preset="nothing.json")


def test_an_audit_by_a_file_is_taken_up_again_without_it(small: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    write_preset(Preset("mine", (Row(Gamma(0.1), "convolution"), Row(Epsilon(0.01)))), file)
    run = tmp_path / "run"
    audit(small.model, small.photos, out=run, preset=str(file), **small.settings)
    assert json.loads((run / "run.json").read_text())["preset"].startswith("mine [convolution/anywhere/*: Gamma")
    moved = file.rename(tmp_path / "moved.json")
    audit(small.model, small.photos, out=run, preset=moved, **small.settings)  # the same preset: the same run
    assert reopen(run).subject.lrp.preset == read_preset(moved)
    write_preset(Preset("mine", (Row(Gamma(0.2), "convolution"), Row(Epsilon(0.01)))), moved)
    with pytest.raises(RunError, match="belongs to another audit"):
        audit(small.model, small.photos, out=run, preset=str(moved), **small.settings)
    assert reopen(run).subject.lrp.preset != read_preset(moved)
