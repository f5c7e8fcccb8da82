"""The run folder: what is in it, that it goes on after every interruption, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from conftest import Small
from PIL import Image

import pfungst
from pfungst.errors import RunError
from pfungst.models import LoadedModel, load_model
from pfungst.pipeline import STAGES
from pfungst.properties import FILED, NAMES, SEEN
from pfungst.reports import write_report
from pfungst.store import Run, list_differences

QUICK = {"min_size": 100}  # too few pictures for groups, so that an audit is over at once


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run to be changed."""
    return shutil.copytree(finished, tmp_path / "run")


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def audit(small: Small, out: Path, **more: Any) -> pfungst.Audit:
    return pfungst.audit(small.model, small.photos, out=out, **{**small.settings, **more})


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and content of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# ---- what is in it ---------------------------------------------------------------------------------------------------


def test_run_json(finished: Path, small: Small) -> None:
    content = read(finished / "run.json")
    assert content["version"] == 1
    assert set(content) == {"version", "settings", "preset", "model", "data", "versions", "folder", "stages"}
    stages = ["relevance", "recognition", "strategies", "overall", "properties", "interventions", "samples"]
    assert list(content["stages"]) == stages
    assert content["settings"].items() >= small.settings.items()
    assert content["folder"] == str(Path.cwd())
    assert "workers" not in content["settings"]  # it changes nothing that comes out
    assert content["model"]["name"] == small.model
    assert content["model"]["layers"] == ["colours"]
    assert content["model"]["preprocess"]["size"] == [24, 24]
    assert len(content["model"]["digest"]) == len(content["data"]["digest"]) == 64
    assert (content["data"]["samples"], content["data"]["target"]) == (80, "label")
    assert content["data"]["classes"] == ["leaf", "rose"]
    assert content["versions"]["torch"] == torch.__version__


def test_samples(finished: Path, small: Small) -> None:
    table = pq.read_table(finished / "samples.parquet")
    assert table.column_names == [
        "id", "path", "label", "prediction", "probability", "class", "score", "absorbed",
        "cluster", "x", "y", "outlier", "finding", "findings", "set_aside", *NAMES,
    ]  # fmt: skip
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == [f"{name}/{i:02d}.png" for name in ("leaf", "rose") for i in range(40)]
    assert all(Path(row["path"]) == small.photos / row["id"] for row in rows)
    assert all(row["label"] == row["prediction"] == row["class"] == row["id"][:4] for row in rows)
    assert {row["set_aside"] for row in rows} == {""}
    assert all(np.isfinite([row["score"], row["absorbed"], row["x"], row["y"], row["outlier"]]).all() for row in rows)
    assert all(0.5 < row["probability"] <= 1 and row["cluster"] >= 0 for row in rows)
    members = {row["id"] for row in rows if row["finding"] == "f001"}
    findings = read(finished / "findings.json")["findings"]
    assert members == set(findings[0]["samples"])
    for one in findings:
        assert {row["id"] for row in rows if one["id"] in row["findings"]} == set(one["samples"])
    assert all(row["finding"] == next(iter(row["findings"]), None) for row in rows)


def test_the_reports_map_says_where_members_have_another_colour(finished: Path, tmp_path: Path) -> None:
    run = Run(Path(shutil.copytree(finished, tmp_path / "run")))
    content = run.read_json("findings.json")
    first = content["findings"][0]
    shutil.copytree(run.path / "findings/f001", run.path / "findings/f008")
    other = {**first, "id": "f008", "rank": 8, "verdict": "refuted", "samples": first["samples"][:5]}
    run.write_json("findings.json", {**content, "findings": [*content["findings"], other]})
    text = re.sub(r"<[^>]*>", "", write_report(run).read_text())
    assert "● f008 refuted (0 of 5 in this colour)" in text
    assert f"f001 {first['verdict']} " in text
    assert f"f001 {first['verdict']} (" not in text, "the first of the report has all of its members"


def test_arrays(finished: Path) -> None:
    store = zarr.open_group(finished / "pooled.zarr", mode="r")
    shapes = {name: (array.shape, str(array.dtype)) for name, array in store.arrays()}
    number = ((80,), "float32")
    assert shapes == {
        "where": ((80, 20, 20), "float32"), "what:colours": ((80, 4), "float32"),
        "strongest:colours": ((80, 4), "float32"), "explained": number, "absorbed": ((80,), "float64"),
        "target": ((80,), "int32"), "prediction": ((80,), "int32"), "probability": number,
        "target_probability": number, "status": ((80,), "uint8"),
        "properties": ((80, len(SEEN)), "float32"), "file": ((80, len(FILED)), "float32"),
    }  # fmt: skip
    assert all(len(str(array.attrs["meaning"])) > 10 for _, array in store.arrays())
    values = {name: np.asarray(array[:]) for name, array in store.arrays()}
    assert (values["status"] == 1).all()
    sums = values["where"].sum((1, 2), dtype=np.float64)
    np.testing.assert_allclose(sums, values["explained"] - values["absorbed"], atol=1e-5)
    table = pq.read_table(finished / "samples.parquet")
    assert np.array_equal(table["score"].to_numpy(), values["explained"])
    assert not (finished / "relevance.zarr").exists()


def test_findings(finished: Path) -> None:
    content = read(finished / "findings.json")
    assert content["version"] == 1
    ids = set(pq.read_table(finished / "samples.parquet")["id"].to_pylist())
    for rank, finding in enumerate(content["findings"], 1):
        assert (finding["id"], finding["rank"]) == (f"f{rank:03d}", rank)
        assert finding["class"] == ["leaf", "rose"][finding["class_index"]]
        assert set(finding["samples"]) <= ids
        assert len(finding["samples"]) == finding["size"]
        assert finding["prevalence"] == pytest.approx(finding["size"] / 40)
        assert 0.15 <= finding["suspicion"] <= 1
        assert finding["verdict"] in ("confirmed", "refuted", "open")
        assert finding["class"] in finding["summary"]
        with Image.open(finished / finding["where"]["mask"]) as mask:
            assert (mask.mode, mask.size) == ("L", (24, 24))
        tests = [one["test"] for one in finding["evidence"]]
        if finding["where"]["kind"] == "whole":
            assert tests == ["undo", "apply"]
        else:
            needed = {"cut:noise", "cut:colour", "cut:exchange", "paste:same place", "paste:ordinary evidence"}
            assert needed <= set(tests)
        for one in finding["evidence"]:
            assert set(one) >= {"test", "n", "effect", "interval", "control", "p"}
            assert one["interval"][0] <= one["effect"] <= one["interval"][1]
            assert one["effect"] == pytest.approx(one["treated"] - one["control"], abs=1e-5)
            assert 0 < one["p"] <= 1
            assert one["n"] >= 4
        folder = finished / "findings" / finding["id"]
        table = pq.read_table(folder / "interventions.parquet")
        assert {"test", "n", "effect", "interval_low", "interval_high", "control", "p"} <= set(table.column_names)
        assert table["test"].to_pylist() == tests
        assert table["effect"].to_pylist() == [one["effect"] for one in finding["evidence"]]
        assert set(read(folder / "experiment.json")) == {
            "member", "cut", "cut_control", "foreign", "paste", "paste_control"}  # fmt: skip
        assert read(folder / "verdict.json")["box"] == finding["where"]["box"]
        pictures = [path for one in finding["exemplars"] for path in (one["input"], one["overlay"])]
        for name in [*pictures, *(f"findings/{finding['id']}/{key}.png" for key in ("mean", "member", "cut", "paste"))]:
            with Image.open(finished / name) as picture:
                picture.load()
    assert [f["suspicion"] for f in content["findings"]] == sorted(
        (f["suspicion"] for f in content["findings"]), reverse=True)  # fmt: skip


def test_the_cheat_is_found(finished: Path) -> None:
    first = read(finished / "findings.json")["findings"][0]
    assert (first["class"], first["verdict"]) == ("rose", "confirmed")
    assert first["where"]["box"] == [0, 0, 5, 5]
    assert first["samples"] == [f"rose/{i:02d}.png" for i in range(16)]


def test_metadata_of_a_manifest(small: Small, tmp_path: Path) -> None:
    ids = [f"{name}/{i:02d}.png" for name in ("rose", "leaf") for i in range(4)]
    lines = [f"{small.photos / name},{name[:4]},{i % 3},ward {i},{i}" for i, name in enumerate(ids)]
    (tmp_path / "m.csv").write_text("\n".join(["path,label,score,site,age", *lines]))
    result = pfungst.audit(small.model, tmp_path / "m.csv", out=tmp_path / "run", **small.settings, **QUICK)
    table = pq.read_table(result.run.path / "samples.parquet")
    assert table["site"].to_pylist() == [f"ward {i}" for i in range(8)]
    assert table["age"].to_pylist() == list(range(8))
    assert table["metadata:score"].to_pylist() == [i % 3 for i in range(8)]
    assert table["score"].to_numpy().dtype == np.float32
    assert table["label"].to_pylist() == ["rose"] * 4 + ["leaf"] * 4


def test_full_maps(small: Small, tmp_path: Path) -> None:
    run = audit(small, tmp_path / "run", full_maps=True, **QUICK).run.path
    maps = np.asarray(zarr.open_group(run / "relevance.zarr", mode="r")["relevance"][:])  # type: ignore[index]
    assert (maps.shape, maps.dtype) == ((80, 24, 24), np.float32)
    store = {name: np.asarray(array[:]) for name, array in zarr.open_group(run / "pooled.zarr", mode="r").arrays()}
    expected = store["explained"] - store["absorbed"]
    np.testing.assert_allclose(maps.sum((1, 2), dtype=np.float64), expected, atol=1e-5)
    assert np.abs(expected).min() > 0.05
    assert (maps[40:56, :5, :5].sum((1, 2)) > 0.2 * expected[40:56]).all()  # roses with the corner


# ---- interruptions ---------------------------------------------------------------------------------------------------

MOMENTS = ["pooled.zarr/where/zarr.json", "blocks.json", "classes/*.json", "findings/*/verdict.json"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_gone_on(moment: str, small: Small, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    asked = [sys.executable, "-m", "pfungst.cli", "audit", small.model, str(small.photos), "--out", str(out)]
    process = subprocess.Popen([*asked, *small.flags()], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + 100
    while not list(out.glob(moment)) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL  # it had not finished
    assert not (out / "samples.parquet").exists()
    done = {path: path.stat().st_mtime_ns for path in out.glob(moment)}
    kept = [path for path in done if path.name != "zarr.json"]
    audit(small, out)
    assert all(path.stat().st_mtime_ns == done[path] for path in kept)
    assert small.results(out) == small.results(finished)
    assert read(out / "run.json") == read(finished / "run.json")


def test_finished_work_is_not_done_again(
    run: Path, small: Small, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(run)
    for name in ("maps.explain_batch", "strategies.find_groups", "verdicts.examine"):
        monkeypatch.setattr(f"pfungst.{name}", lambda *a, **k: pytest.fail("done again"))
    result = audit(small, run, workers=0)  # speed is no part of a run's identity
    assert len(result.findings) == 2
    after = state(run)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} <= {"report.html"}
    assert after["report.html"][1] == before["report.html"][1]


def test_killed_command_releases_its_run(run: Path, small: Small) -> None:
    """Two processes at once: the second is refused while the first lives, whatever ends it."""
    code = (
        "import sys, time, pfungst.store as s\nwith s.Run(sys.argv[1]).locked(): print(1, flush=True); time.sleep(99)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, run], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        before = state(run)
        with pytest.raises(RunError, match="another process works on") as raised:
            audit(small, run)
        assert "wait for it" in raised.value.remedy
        assert state(run) == before
    finally:
        process.kill()
        process.communicate()
    assert len(audit(small, run).findings) == 2


def stop(path: Path, *made: str) -> None:
    """Work on a run that is stopped once these files are there."""
    with Run(path).locked():
        for name in made:
            (path / name).touch()
        raise KeyboardInterrupt


def test_a_run_that_fails_at_once_leaves_only_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "mine" / "kept").mkdir(parents=True)
    for path in (tmp_path / "there", tmp_path / "new/deep/run", tmp_path / "mine/run"):
        with pytest.raises(KeyboardInterrupt):
            stop(path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "mine", "mine/kept", "there", "there/.lock",
    ]  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        stop(tmp_path / "used", "run.json")
    assert (tmp_path / "used" / "run.json").exists()


# ---- refusals --------------------------------------------------------------------------------------------------------


def other_model(small: Small, folder: Path) -> dict[str, Any]:
    weights = torch.load(small.weights)
    weights["scores.bias"] += 1e-3
    torch.save(weights, folder / "other.pt")
    module = load_model(small.model, weights=folder / "other.pt", size=24)
    return {"model": replace(module, name=small.model)}


def other_data(small: Small, folder: Path) -> dict[str, Any]:
    photos = small.copy(folder / "photos")
    shutil.copy(photos / "rose" / "00.png", photos / "rose" / "01.png")
    return {"images": photos}


@pytest.mark.parametrize(
    ("difference", "change"),
    [
        ("model.digest was '", other_model),
        ("data.digest was '", other_data),
        ("settings.seed was 0, is now 1", lambda small, folder: {"seed": 1}),
        ("settings.grid was 20, is now 16", lambda small, folder: {"grid": 16}),
        ("settings.preset was 'auto', is now 'epsilon'", lambda small, folder: {"preset": "epsilon"}),
        ("data.samples was 80, is now 40", lambda small, folder: {"limit": 40}),
    ],
)
def test_other_audits_are_refused(
    difference: str, change: Callable[[Small, Path], dict[str, Any]], run: Path, small: Small, tmp_path: Path
) -> None:
    before = state(run)
    given = {"model": small.model, "images": small.photos, **small.settings, **change(small, tmp_path)}
    with pytest.raises(RunError) as raised:
        pfungst.audit(given.pop("model"), given.pop("images"), out=run, **given)
    assert "belongs to another audit: " in str(raised.value)
    assert difference in str(raised.value)
    assert "the settings that this run began with" in raised.value.remedy
    assert state(run) == before


def test_folder_of_something_else_is_refused(small: Small, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear")
    with pytest.raises(RunError, match="is not empty and no run of pfungst"):
        audit(small, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    (tmp_path / "run.json").write_text('{"distance": "10 km"}')
    with pytest.raises(RunError, match=r"run\.json is damaged, or not of pfungst"):
        audit(small, tmp_path)
    with pytest.raises(RunError, match="is no run folder"):
        Run(tmp_path / "nothing").describe()


# ---- damage ----------------------------------------------------------------------------------------------------------


def undo(run: Path, *stages: str) -> None:
    """As if the run had been stopped after these stages."""
    content = read(run / "run.json")
    content["stages"] = {name: {} for name in stages}
    (run / "run.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["run.json", "findings.json", "classes/0001.json", "findings/f001/verdict.json"])
def test_damaged_json(name: str, run: Path, small: Small) -> None:
    undo(run, "relevance", "strategies", *(["interventions", "samples"] if name == "findings.json" else []))
    content = (run / name).read_bytes()
    for spoiled in (content[: len(content) // 2], b"", b"\xff\xfe" + content):
        (run / name).write_bytes(spoiled)
        with pytest.raises(RunError, match=f"{name} is damaged: ") as raised:
            audit(small, run)
        assert raised.value.remedy == "give --out another folder"


CHUNK = "where/c/0/0/0"
SPOILED: list[tuple[Callable[[bytes], bytes] | None, str]] = [
    (lambda b: b[: len(b) // 2], "where is damaged: Stored and computed checksum do not match"),
    (lambda b: b[:1000] + bytes([b[1000] ^ 1]) + b[1001:], "where is damaged: Stored and computed checksum"),
    (lambda b: b"", "where is damaged: "),
    (None, "where is damaged: the chunk of samples 0 to 256 is missing"),
]


def spoil(path: Path, how: Callable[[bytes], bytes] | None) -> None:
    if how is None:
        path.unlink()
    else:
        path.write_bytes(how(path.read_bytes()))


ALL = tuple(name for name, _ in STAGES)


@pytest.mark.parametrize(("how", "words", "stages"), [*((*one, ALL[:1]) for one in SPOILED), (*SPOILED[1], ALL)])
def test_damaged_chunks_are_computed_anew(
    how: Callable[[bytes], bytes] | None, words: str, stages: tuple[str, ...], run: Path, small: Small, finished: Path
) -> None:
    undo(run, *stages)
    if len(stages) == 1:
        shutil.rmtree(run / "classes")
    spoil(run / "pooled.zarr" / CHUNK, how)
    with pytest.raises(RunError, match=words) as raised:
        Run(run).read_array("where")
    assert raised.value.remedy == "give the same `pfungst audit` command again: it computes these samples anew"
    assert Run(run).find_damage() == [0]
    with pytest.warns(UserWarning, match="1 damaged blocks of"):
        audit(small, run)
    assert Run(run).find_damage() == []
    assert small.results(run) == small.results(finished)
    assert read(run / "run.json") == read(finished / "run.json")


def test_only_the_damaged_block_is_computed_anew(tmp_path: Path) -> None:
    """Three blocks of two arrays, the last one not full."""
    run = Run(tmp_path / "run")
    run.begin({})
    values = {"where": np.arange(600 * 4.0).reshape(600, 2, 2).astype(np.float32), "what:a.b": np.ones((600, 3))}
    run.create_arrays(600, {name: (a.shape[1:], str(a.dtype)) for name, a in values.items()})
    for block in range(3):
        run.write_block(block, {name: a[block * 256 : (block + 1) * 256] for name, a in values.items()})
    run.finish("relevance")
    run.finish("strategies")
    assert run.find_damage() == []
    kept = state(tmp_path / "run" / "pooled.zarr")
    spoil(tmp_path / "run" / "pooled.zarr" / "what:a.b" / "c/2/0", lambda b: b[:-1] + bytes([b[-1] ^ 1]))
    assert run.find_damage() == [2]
    assert np.array_equal(run.read_array("what:a.b", np.array([511, 3])), np.ones((2, 3)))  # of the sound blocks
    with pytest.raises(RunError, match="damaged"):
        run.read_array("what:a.b", np.array([512]))
    run.forget_blocks([2])
    assert run.blocks_done() == [0, 1]
    assert set(run.describe()["stages"]) == {"strategies"}
    run.write_block(2, {name: a[512:] for name, a in values.items()})
    assert run.find_damage() == []
    assert all(np.array_equal(run.read_array(name), a) for name, a in values.items())
    now = state(tmp_path / "run" / "pooled.zarr")
    assert {name for name in now if now[name] != kept[name]} == {"what:a.b/c/2/0", "where/c/2/0/0"}
    rows = np.array([599, 0, 300, 0, 255, 256])
    assert np.array_equal(run.read_array("where", rows), values["where"][rows])
    assert run.read_array("where", rows[:0]).shape == (0, 2, 2)


@pytest.mark.parametrize(
    ("name", "how", "words"),
    [
        ("where/zarr.json", lambda b: b[: len(b) // 2], "where is damaged: "),
        ("where/zarr.json", None, "holds no 'where'"),
        ("zarr.json", lambda b: b[:20], "status is damaged: "),
    ],
)
def test_damaged_arrays(name: str, how: Callable[[bytes], bytes] | None, words: str, run: Path, small: Small) -> None:
    undo(run, "relevance")
    (run / "set_aside.json").unlink(missing_ok=True)
    spoil(run / "pooled.zarr" / name, how)
    with pytest.raises(RunError, match=words) as raised:
        audit(small, run)
    assert raised.value.remedy == "give --out another folder"


# ---- what an audit leaves alone --------------------------------------------------------------------------------------


def torch_state() -> list[Any]:
    return [
        torch.get_rng_state().tolist(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
        torch.get_num_threads(), torch.get_default_dtype(), torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(), np.geterr(),
        np.random.get_state()[1].tolist(), Image.MAX_IMAGE_PIXELS, zarr.config.get("array.write_empty_chunks"),
        os.getcwd(), list(sys.path), dict(os.environ),
    ]  # fmt: skip


def module_state(module: torch.nn.Module) -> list[Any]:
    parts = [(name, part.training, len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks),
              sorted(vars(part))) for name, part in module.named_modules()]  # fmt: skip
    values = [(name, p.detach().clone().tolist(), p.requires_grad, p.grad) for name, p in module.named_parameters()]
    return [parts, values]


@pytest.mark.parametrize("grad", [True, False])
def test_model_images_and_global_state_are_unchanged(grad: bool, small: Small, tmp_path: Path) -> None:
    loaded: LoadedModel = load_model(small.model, weights=small.weights, size=24)
    settings = {**small.settings, "weights": None, "max_findings": 1}
    with torch.set_grad_enabled(grad):
        before = torch_state(), module_state(loaded.module), state(small.root)
        result = pfungst.audit(loaded.module, small.photos, out=tmp_path / "run", **settings)
        assert [finding.verdict for finding in result.findings] == ["confirmed"]
        assert (torch_state(), module_state(loaded.module), state(small.root)) == before


def test_what_differs_in_long_settings_is_told() -> None:
    rows = "epsilon-plus [convolution/anywhere/*: ZPlus(); dense/anywhere/*: Epsilon(epsilon=1e-06); "
    known, now = ({"preset": f"{rows}pre_activation={form}, max_pool=winner]"} for form in ("threshold", "switch"))
    (told,) = list_differences(known, now)
    before, after = told.removeprefix("preset was ").split(", is now ")
    assert "pre_activation=threshold" in before
    assert "pre_activation=switch" in after
    assert len(told) < 120
    assert list(list_differences({"seed": 0, "a": {"b": "x" * 60}}, {"seed": 1, "a": {"b": "y"}})) == [
        "seed was 0, is now 1",
        f"a.b was '{'x' * 39}..., is now 'y'",
    ]
