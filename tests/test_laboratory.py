"""Trying something in the viewer: regions cut and pasted, findings of one's own, and which model is asked."""

from __future__ import annotations

import base64
import io
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Console, Small
from PIL import Image

from pfungst.errors import RunError, SettingError
from pfungst.lrp import LRP
from pfungst.own_groups import list_own, read_own, write_own
from pfungst.runs import reopen
from pfungst.store import Run
from pfungst.viewer.calls import Refused
from pfungst.viewer.laboratory import Asked, read_region
from pfungst.viewer.opened import OpenRun
from pfungst.viewer.server import Viewer, make_app

testclient = pytest.importorskip("starlette.testclient")

CORNER = [0, 0, 5, 5]  # where 16 of the roses are yellow


def connect(path: Path, asked: Asked | None) -> Any:
    app = make_app(Viewer([OpenRun(path)], asked), "token")
    return testclient.TestClient(app, base_url="http://127.0.0.1", headers={"Authorization": "Bearer token"})


@pytest.fixture(scope="module")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("lab") / "run"))


@pytest.fixture(scope="module")
def page(run: Path) -> Any:
    return connect(run, Asked())


def rows_of(run: Path, label: str) -> dict[str, int]:
    """Rows of a class's pictures, by number."""
    ids = Run(run).read_json("run.json") and OpenRun(run).column("id").to_pylist()
    return {name.split("/")[1].removesuffix(".png"): row for row, name in enumerate(ids) if name.startswith(label)}


@pytest.fixture(scope="module")
def roses(run: Path) -> list[int]:
    return list(rows_of(run, "rose").values())


def ask(page: Any, **body: Any) -> dict[str, Any]:
    response = page.post("/api/runs/0/try", json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def pixels(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def relevance(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4").reshape(24, 24)


# ---- regions ---------------------------------------------------------------------------------------------------------


def test_runs_and_boxes_mark_the_same_pixels() -> None:
    by_box = read_region([], [1, 2, 4, 3], (4, 5))
    assert np.argwhere(by_box).tolist() == [[2, 1], [2, 2], [2, 3]]
    assert (read_region([11, 3, 6], [], (4, 5)) == by_box).all()
    assert read_region([0, 20], [], (4, 5)).all()


@pytest.mark.parametrize(
    ("region", "box"),
    [([], []), ([20], []), ([3, 4], []), ([0, 21], []), ([-1, 21], []), ([0, 20], [0, 0, 1, 1]), ([], [0, 0, 6, 1]),
     ([], [2, 0, 2, 1]), ([], [0, 0, 1])],
)  # fmt: skip
def test_what_is_no_region_is_refused(region: list[int], box: list[int]) -> None:
    with pytest.raises(Refused):
        read_region(region, box, (4, 5))


# ---- changes ---------------------------------------------------------------------------------------------------------


def test_a_cut_changes_only_the_region_and_scores_are_the_models_own(page: Any, run: Path, roses: list[int]) -> None:
    found = ask(page, row=roses[0], change="cut:colour", box=CORNER)
    before, after = pixels(found["before"]), pixels(found["after"])
    outside = np.ones((24, 24), dtype=bool)
    outside[:5, :5] = False
    assert (before[outside] == after[outside]).all()
    assert (before[~outside] != after[~outside]).any()
    # The picture on disk is 24 x 24 and is not resized, so the model can be asked by hand.
    subject = reopen(run).subject
    original = np.asarray(Image.open(subject.data.paths[roses[0]]).convert("RGB"))
    assert np.abs(original.astype(int) - before).max() <= 1
    with torch.no_grad():
        scores = subject.model.module(subject.load([roses[0]]))[0].double()
    told = {one["class"]: one for one in found["scores"]}
    assert found["scores"][0]["class"] == "rose"
    assert found["decisions"][0] == "rose"
    for index, name in enumerate(("leaf", "rose")):
        assert told[name]["scores"][0] == pytest.approx(float(scores[index]), abs=1e-5)
        assert told[name]["probabilities"][0] == pytest.approx(float(scores.softmax(0)[index]), abs=1e-5)
    # Yellow speaks for the rose, loudest, and the control is cut where there is none.
    fall, control = (told["rose"]["scores"][i] - told["rose"]["scores"][0] for i in (1, 2))
    assert fall < -0.5
    assert abs(control) < abs(fall) / 2
    assert found["area"] == pytest.approx(25 / 576)


def test_maps_are_those_of_the_engine_on_the_changed_picture(page: Any, run: Path, roses: list[int]) -> None:
    found = ask(page, row=roses[0], onto=0, change="paste", region=[0, 24 * 24])  # all of it: the donor itself
    subject = reopen(run).subject
    inputs = subject.load([0, roses[0]])
    expected = LRP(subject.model.module, subject.settings.preset)(inputs, 1).scores.sum(1).detach().numpy()
    for told, known in zip(found["maps"], expected, strict=True):
        np.testing.assert_allclose(relevance(told), known, atol=1e-5)
    assert (pixels(found["after"]) == pixels(ask(page, row=roses[0], change="cut:blur", box=CORNER)["before"])).all()
    assert found["decisions"] == ["leaf", "rose", "rose"]  # before, after, and all of another rose


def test_a_corner_pasted_on_a_leaf_speaks_for_the_rose(page: Any, roses: list[int]) -> None:
    """The control is the same corner of a rose that is in no finding of this one."""
    yellow, plain = (ask(page, row=row, onto=0, change="paste", box=CORNER) for row in (roses[0], roses[-1]))
    (before, after, control), (_, of_plain, of_yellow) = (one["scores"][0]["scores"] for one in (yellow, plain))
    assert after - before > 0.5 > max(abs(of_plain - before), abs(control - before))
    assert of_yellow - before > 0.5
    assert yellow["ordinary"] in roses[16:]
    assert plain["ordinary"] in roses[:16]
    again = ask(page, row=yellow["ordinary"], onto=0, change="paste", box=CORNER)
    assert again["after"] == yellow["control"]
    assert ask(page, row=roses[0], change="cut:blur", box=CORNER)["ordinary"] is None


@pytest.mark.parametrize("change", ["cut:noise", "cut:blur", "cut:inpaint"])
def test_every_cut_is_repeatable(page: Any, roses: list[int], change: str) -> None:
    first, again = (ask(page, row=roses[3], change=change, box=CORNER) for _ in range(2))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"row": 80, "change": "cut:blur", "box": CORNER}, 404),
        ({"row": 1, "change": "paste", "box": CORNER}, 404),  # onto what?
        ({"row": 1, "change": "cut:all", "box": CORNER}, 422),
        ({"row": 1, "change": "cut:blur", "box": CORNER, "target": 2}, 422),
        ({"row": 1, "change": "cut:blur", "box": [0, 0, 99, 99]}, 422),
        ({"row": 1, "change": "cut:blur", "region": [1.5, 2.5]}, 422),
    ],
)
def test_what_cannot_be_tried_is_refused(page: Any, body: dict[str, Any], status: int) -> None:
    response = page.post("/api/runs/0/try", json=body)
    assert response.status_code == status
    assert response.json()["error"]


def test_pictures_to_paste_on_are_of_other_classes(page: Any, roses: list[int]) -> None:
    found = page.get(f"/api/runs/0/samples/{roses[0]}/others?count=9").json()
    assert found["class"] == "rose"
    assert len(found["others"]) == 9
    assert {one["class"] for one in found["others"]} == {"leaf"}
    assert not {o["row"] for o in found["others"]} & {*roses}


# ---- which model -----------------------------------------------------------------------------------------------------


def test_no_model_is_loaded_unless_it_is_asked_for(run: Path) -> None:
    page = connect(run, None)
    assert page.get("/api/runs/0/model").json()["state"] == "off"
    for path, body in (("try", {"row": 0, "change": "cut:blur", "box": CORNER}), ("model", {})):
        answer = page.post(f"/api/runs/0/{path}", json=body)
        assert answer.status_code == 409
        assert "--model" in answer.json()["error"]


def test_a_model_that_cannot_be_loaded_is_told_and_another_one_is_named(
    run: Path, small: Small, tmp_path: Path
) -> None:
    page = connect(run, Asked("nothing.py:build"))
    answer = page.post("/api/runs/0/try", json={"row": 0, "change": "cut:blur", "box": CORNER})
    assert answer.status_code == 409
    assert "nothing.py" in answer.json()["error"]
    assert page.get("/api/runs/0/model").json()["state"] == "failed"
    weights = torch.load(small.weights)
    torch.save({**weights, "scores.bias": weights["scores.bias"] + 1}, tmp_path / "other.pt")
    page = connect(run, Asked(small.model, str(tmp_path / "other.pt")))
    found = ask(page, row=0, change="cut:blur", box=CORNER)
    assert page.get("/api/runs/0/model").json()["same"] is False
    picture = page.get("/api/runs/0/samples/0/input")
    assert picture.content == base64.b64decode(found["before"])


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        ([], None),
        (["--model"], Asked()),
        (["--weights", "w.pt", "--device", "cpu"], Asked(None, "w.pt", "cpu")),
        (["--model", "net.py:build", "--weights", "w.pt"], Asked("net.py:build", "w.pt")),
    ],
)
def test_the_command_says_which_model(
    run: Path, console: Console, monkeypatch: pytest.MonkeyPatch, flags: list[str], asked: Asked | None
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("pfungst.viewer.server.serve", lambda runs, **how: given.update(how))
    assert console("view", run, *flags)[0] == 0
    assert given["model"] == asked
    code, _, error = console("view", run, "--model", run)  # the value of --model was meant to be another run
    assert code == 1
    assert "after the RUNs" in error


# ---- findings of one's own -------------------------------------------------------------------------------------------


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def wait(page: Any) -> dict[str, Any]:
    for _ in range(600):
        found = page.get("/api/runs/0/own").json()
        if not found["job"]["running"]:
            return dict(found)
        time.sleep(0.05)
    raise AssertionError("the job does not end")


def test_a_group_of_ones_own_is_tested_as_a_finding_is(copied: Path, roses: list[int]) -> None:
    page = connect(copied, Asked())
    for name, rows in (("yellow", roses[:16]), ("plain", roses[18:32])):
        made = page.post("/api/runs/0/own", json={"name": name, "rows": rows, "class": "rose", "note": "as I think"})
        assert made.status_code == 200
        assert made.json()["rows"] == rows
        assert made.json()["result"] is None
    assert page.post("/api/runs/0/own/yellow/confirm", json={}).status_code == 200
    busy = page.post("/api/runs/0/own/plain/confirm", json={})
    assert busy.status_code == 409
    assert "yellow" in busy.json()["error"]
    assert page.delete("/api/runs/0/own/yellow").status_code == 409  # while it is tested
    wait(page)
    page.post("/api/runs/0/own/plain/confirm", json={})
    found = {one["name"]: one for one in wait(page)["own"]}
    yellow, plain = found["yellow"]["result"], found["plain"]["result"]
    assert yellow["verdict"] == "confirmed"
    assert yellow["where"]["kind"] == "fixed"
    assert yellow["tries"] == 1
    assert yellow["where"]["box"][:2] == [0, 0]
    assert max(yellow["where"]["box"]) <= 8
    assert plain["verdict"] != "confirmed"
    assert plain["suspicion"] < yellow["suspicion"]
    assert {one["test"] for one in yellow["evidence"]} >= {"cut:colour", "cut:exchange", "paste:same place"}
    assert yellow["model"]["same"]
    assert set(yellow["exemplars"]) <= set(roses[:16])
    picture = page.get("/api/runs/0/own/yellow/pictures/mask")
    assert picture.headers["content-type"] == "image/png"
    assert np.asarray(Image.open(io.BytesIO(picture.content)))[:3, :3].all()
    assert page.get("/api/runs/0/own/yellow/pictures/..%2Fyellow").status_code == 404
    assert page.delete("/api/runs/0/own/yellow").json()["own"][0]["name"] == "plain"
    assert not (copied / "own" / "yellow").exists()
    assert not (copied / "own" / "yellow.json").exists()


def test_what_cannot_be_tested_says_why(copied: Path, roses: list[int]) -> None:
    page = connect(copied, Asked())
    told = page.post("/api/runs/0/own", json={"name": "few", "rows": roses[:3]})
    assert told.status_code == 422
    assert "too few" in told.json()["error"]
    page.post("/api/runs/0/own", json={"name": "many", "rows": roses[:37]})  # hardly any are left to compare with
    page.post("/api/runs/0/own/many/confirm", json={})
    assert "too few" in wait(page)["job"]["failure"]
    assert page.post("/api/runs/0/own/none/confirm", json={}).status_code == 404


def test_commands_know_a_finding_of_ones_own(copied: Path, roses: list[int], console: Console, tmp_path: Path) -> None:
    """Tested again, elsewhere too, judged and guarded; the page shows what came of it."""
    write_own(Run(copied), "yellow", roses[:16], note="a corner")
    code, _, error = console("guard", copied, "yellow", "--out", tmp_path / "test_cue.py")
    assert code == 1
    assert "yellow has not been tested yet" in error
    code, output, error = console("confirm", copied, "yellow", "--where", Run(copied).describe()["data"]["root"])
    assert (code, error) == (0, "")
    assert "again: confirmed" in output
    assert "the cue is in 16 of 40 pictures labelled as the class" in output
    record = read_own(Run(copied), "yellow")
    assert record["result"]["verdict"] == "confirmed"  # tested first, then again
    assert (copied / "own" / "yellow" / "confirmed_1.json").exists()
    assert console("judge", copied, "yellow", "cheat", "--note", "the corner", "--by", "me")[0] == 0
    code, output, error = console("guard", copied, "yellow", "--out", tmp_path / "test_cue.py")
    assert (code, error) == (0, "")
    assert "16 pictures of rose that a person picked: a corner" in (tmp_path / "test_cue.py").read_text()
    (one,) = connect(copied, None).get("/api/runs/0/own").json()["own"]
    assert [(said["answer"], said["note"], said["by"]) for said in one["judgements"]] == [("cheat", "the corner", "me")]
    assert [again["verdict"] for again in one["again"]] == ["confirmed"]
    assert "f001" in console("confirm", copied, "blue")[2]
    assert "of your own: yellow" in console("confirm", copied, "blue")[2]


def test_a_finding_of_ones_own_is_judged_on_the_page(copied: Path, roses: list[int]) -> None:
    page = connect(copied, None)
    write_own(Run(copied), "yellow", roses[:16])
    said = page.post("/api/runs/0/own/yellow/judgements", json={"answer": "cheat", "note": "seen"})
    assert [one["answer"] for one in said.json()["judgements"]] == ["cheat"]
    taken = page.post("/api/runs/0/own/yellow/judgements", json={"answer": "withdrawn"})
    assert [one["answer"] for one in taken.json()["judgements"]] == ["cheat", "withdrawn"]
    assert page.post("/api/runs/0/own/yellow/judgements", json={"answer": "nice"}).status_code == 422
    assert page.post("/api/runs/0/own/none/judgements", json={"answer": "cheat"}).status_code == 404
    with pytest.raises(SettingError, match="audit calls its own"):
        write_own(Run(copied), "f002", roses[:16])


@pytest.mark.parametrize("name", ["", "../f001", "a/b", ".hidden", "a b", "ä", "x" * 65, "a\n", "-"])
def test_names_that_are_none_are_refused(copied: Path, roses: list[int], name: str) -> None:
    with pytest.raises(SettingError):
        write_own(Run(copied), name, roses[:8])
    with pytest.raises((SettingError, RunError)):
        read_own(Run(copied), name)
    assert not list_own(Run(copied))


def test_rows_that_make_no_group_are_refused(copied: Path, roses: list[int]) -> None:
    run = Run(copied)
    for rows, told in (
        ([], "no rows are given"),
        ([-1], "no rows -1: its 80 samples are 0 to 79"),
        ([*roses[:8], 99, 80], "no rows 80, 99: its 80 samples are 0 to 79"),
        ([0, roses[0]], "too few"),
    ):
        with pytest.raises(SettingError, match=told):
            write_own(run, "mine", rows)
    with pytest.raises(SettingError, match="leaf"):
        write_own(run, "mine", roses[:8], "leaf")
    assert write_own(run, "mine", [*roses[:8], roses[0]])["class"] == "rose"
    with pytest.raises(SettingError, match="already"):
        write_own(run, "mine", roses[:9])
    assert read_own(run, "mine")["rows"] == roses[:8]
