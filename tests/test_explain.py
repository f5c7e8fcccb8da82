"""``explain``: which files it writes, what they hold, and what it says of bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NET, Console
from PIL import Image
from safetensors.numpy import load_file
from torch import nn

from pfungst import heatmaps
from pfungst.domains.image import Preprocess, load_batch, read_images
from pfungst.errors import DataError, ModelError, RelevanceError, RunError, SettingError
from pfungst.explain import Explanation, explain
from pfungst.lrp import LRP
from pfungst.models import LoadedModel
from pfungst.predictions import describe_outputs

CLASSES = ("tench, Tinca tinca", "tabby, tabby cat", "crane", "crane", "Egyptian cat")
PREPROCESS = Preprocess((16, 20), (0.5,) * 3, (0.25,) * 3, crop="squash", channels="BGR")


def build(seed: int = 0, classes: tuple[str, ...] | None = CLASSES, last: nn.Module | None = None) -> LoadedModel:
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(96, 5),
        last or nn.Identity(),
    ).eval()  # fmt: skip
    return LoadedModel(module, "small", PREPROCESS, classes, "0" * 64)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    folder = tmp_path / "in"
    folder.mkdir()
    paths = [folder / f"{name}.png" for name in ("one", "two", "three")]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(path)
    return paths


def record(out: Path) -> Any:
    return json.loads((out / "explanations.json").read_text("utf-8"))


def test_files_exist_and_decode(pictures: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = explain(build(), pictures, out, targets=["tabby", 0, "predicted"])
    assert [one.path for one in found] == pictures
    for one in found:
        assert one.sheet == f"{one.path.stem}.png"
        assert [t.prediction.index for t in one.targets][:2] == [1, 0]
        for file in [one.sheet, *(f for t in one.targets for f in (t.heatmap, t.overlay))]:
            with Image.open(out / file) as image:
                image.load()
                # 16 x 20 pixels are enlarged by a whole factor; a sheet holds input, overlays, list, colour bar.
                assert image.size == (240, 192) if file != one.sheet else image.width > 900
    names = {path.name for path in out.iterdir()}
    assert {"one_tabby_heatmap.png", "one_tabby_overlay.png", "one_tench_overlay.png"} <= names
    assert not [name for name in names if name.startswith(".") or name.endswith((".npy", ".part"))]


def test_pictures_show_the_relevance(pictures: list[Path], tmp_path: Path) -> None:
    model, data = build(), read_images(pictures[0])
    inputs, *_ = load_batch(data, [0], PREPROCESS)
    scores = heatmaps.pool_channels(LRP(model.module)(inputs, target=4).scores.numpy())[0]
    one = explain(model, pictures[:1], tmp_path, targets=4, quantile=1.0)[0].targets[0]
    assert one.scale == pytest.approx(np.abs(scores).max())
    heat = np.asarray(Image.open(tmp_path / one.heatmap))[::12, ::12]
    assert np.array_equal(heat, heatmaps.color(scores))
    pixels = np.asarray(Image.open(pictures[0]).resize((20, 16), Image.Resampling.BILINEAR)) / 255
    laid = np.asarray(Image.open(tmp_path / one.overlay))[::12, ::12].astype(int)
    assert np.abs(laid - heatmaps.overlay(pixels, scores)).max() <= 1


def test_saved_relevance_is_that_of_the_engine(pictures: list[Path], tmp_path: Path) -> None:
    model = build()
    data = read_images(pictures[0].parent)
    inputs, *_ = load_batch(data, range(3), PREPROCESS)
    for save in ("npy", "safetensors"):
        out = tmp_path / save
        found = explain(model, data.paths, out, targets="tabby, top2, Egyptian cat", save=save, preset="epsilon")
        for row, one in enumerate(found):
            for target in one.targets:
                result = LRP(model.module, "epsilon")(inputs, target=target.prediction.index)
                file = out / str(target.relevance)
                if save == "npy":
                    scores = np.load(file)
                else:
                    scores = load_file(file)[target.heatmap.removeprefix(f"{one.path.stem}_")[: -len("_heatmap.png")]]
                assert scores.dtype == np.float32
                assert np.array_equal(scores, result.scores[row].numpy())
                assert target.prediction.logit == float(result.output[row, target.prediction.index])
                share = float(result.absorbed[row]) / target.prediction.logit
                assert target.absorbed == pytest.approx(share, abs=1e-4)


def test_record(pictures: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    model = build()
    calls: list[tuple[int, int]] = []
    given = [pictures[0], broken, pictures[1], tmp_path / "missing.png"]
    found = explain(
        model, given, tmp_path / "out", topk=3, batch_size=2, save="npy", progress=lambda *at: calls.append(at)
    )
    assert [bool(one.skipped) for one in found] == [False, True, False, True]
    assert "does not exist" in found[3].skipped
    content = record(tmp_path / "out")
    assert content["model_digest"] == model.digest
    assert content["preset"] == "epsilon-plus"
    assert content["preprocess"]["channels"] == "BGR"
    first, second = content["images"][:2]
    assert second == {"path": str(broken), "skipped": found[1].skipped}
    inputs, *_ = load_batch(read_images(pictures[0]), [0], PREPROCESS)
    logits = model.module(inputs)[0].detach()
    order = logits.argsort(descending=True)
    assert [one["index"] for one in first["topk"]] == order[:3].tolist()
    assert [one["logit"] for one in first["topk"]] == pytest.approx(logits[order[:3]].tolist(), rel=1e-5)
    assert first["topk"][0]["probability"] == pytest.approx(float(logits.softmax(0).max()), rel=1e-5)
    target = first["targets"][0]
    assert (target["index"], target["name"]) == (int(order[0]), CLASSES[order[0]])
    assert target["absorbed"] == pytest.approx(1 - target["total"] / target["logit"])
    saved = np.load(tmp_path / "out" / target["relevance"])
    assert target["total"] == pytest.approx(saved.sum(dtype=np.float64))
    assert target["scale"] == pytest.approx(np.quantile(np.abs(saved.sum(0)), 0.995))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_files_that_are_not_there_are_an_error_though_the_others_are_explained(
    pictures: list[Path], tmp_path: Path, console: Console
) -> None:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "broken.jpg").write_bytes(b"no picture")
    shutil.copy(pictures[0], tmp_path / "folder" / f"good{pictures[0].suffix}")
    missing, flags = tmp_path / "missing.png", ("--size", "32", "--mean", "0", "--std", "1")

    def ask(*given: Path) -> tuple[int, str, str]:
        return console("explain", f"{tmp_path / 'net.py'}:build", *given, "--out", tmp_path / "out", *flags)

    code, out, error = ask(missing)
    assert (code, out.splitlines()[0]) == (1, f"0 pictures explained in {tmp_path / 'out'}")
    assert f"Error: 1 of the files given could not be explained, e.g. {missing}: the file does not exist" in error
    code, out, error = ask(pictures[0], missing)
    assert code == 1
    assert out.startswith("1 picture explained")
    assert f"skipped {missing}" in out
    assert str(missing) in error
    code, out, error = ask(tmp_path / "folder")
    assert (code, error.count("Error")) == (0, 0), "what a folder holds beside is reported"
    assert "skipped" in out
    (tmp_path / "folder" / f"good{pictures[0].suffix}").unlink()
    code, out, error = ask(tmp_path / "folder")
    assert code == 1
    assert "none of the pictures could be read" in error


def test_one_scale_for_the_set(pictures: list[Path], tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    own = explain(build(), pictures, tmp_path / "own", targets="top2", quantile=1.0)
    same = explain(
        build(), pictures, tmp_path / "same", targets="top2", quantile=1.0, same_scale=True,
        progress=lambda *at: calls.append(at),
    )  # fmt: skip
    scales = [{target.scale for target in one.targets} for one in own]
    assert all(len(one) == 1 for one in scales)
    assert len(set.union(*scales)) == 3
    assert {target.scale for one in same for target in one.targets} == {max(set.union(*scales))}
    assert calls == [(i + 1, 6) for i in range(6)]


def test_equal_names_do_not_overwrite_each_other(tmp_path: Path) -> None:
    # Two folders, two endings, two cases, and names that look like files of another picture's explanation.
    names = [
        "a/cat.png",
        "b/cat.png",
        "b/cat.bmp",
        "c/CAT.png",
        "d/dog.png",
        "d/dog_tabby_overlay.png",
        "d/ü .png",
    ]
    for i, name in enumerate(names):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (30 * i, 255 - 30 * i, 90)).save(path)
    given = [tmp_path / "in" / name for name in names]
    found = explain(build(), [*given, given[0]], tmp_path / "out", targets="tabby,top2", save="npy")
    assert [one.path for one in found] == given
    files = [f for one in found for t in one.targets for f in (t.heatmap, t.overlay, t.relevance)]
    files += [one.sheet for one in found]
    assert len({str(file).casefold() for file in files}) == len(files)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*files, "explanations.json"}


def test_classes_of_equal_name_get_their_index(pictures: list[Path], tmp_path: Path) -> None:
    found = explain(build(), pictures[:1], tmp_path, targets=[2, 3])
    assert [target.heatmap for target in found[0].targets] == ["one_crane_2_heatmap.png", "one_crane_3_heatmap.png"]


@pytest.mark.parametrize(
    ("targets", "indices"),
    [
        ("tench, Tinca tinca", [0]),
        ("TENCH,egyptian_cat", [0, 4]),
        (["tench", "Tinca tinca"], [0]),
        ("1, 3", [1, 3]),
        (4, [4]),
    ],
)
def test_targets(pictures: list[Path], tmp_path: Path, targets: Any, indices: list[int]) -> None:
    found = explain(build(), pictures[:1], tmp_path, targets=targets)
    assert [target.prediction.index for target in found[0].targets] == indices


def test_top_targets(pictures: list[Path], tmp_path: Path) -> None:
    one: Explanation = explain(build(), pictures[:1], tmp_path, targets=["predicted", "top99"])[0]
    assert [target.prediction for target in one.targets] == list(one.top)
    assert [p.logit for p in one.top] == sorted((p.logit for p in one.top), reverse=True)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ("taby", "close: tabby"),
        ("crane", "several classes: 2"),
        ("label", "no label"),
        ("5", "no output"),
        (-1, "no output"),
        ("top0", "none of the 5"),
        ([], "no targets"),
        (" , ", "no targets"),
    ],
)
def test_wrong_targets(pictures: list[Path], tmp_path: Path, targets: Any, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        explain(build(), pictures[:1], tmp_path / "out", targets=targets)


def test_models_without_names_or_of_one_output(pictures: list[Path], tmp_path: Path) -> None:
    found = explain(build(classes=None), pictures[:1], tmp_path / "a", targets=3)
    assert found[0].targets[0].prediction.name == "output 3"
    one = explain(build(classes=("height",), last=nn.Linear(5, 1)), pictures[:1], tmp_path / "b")
    assert [p.probability for p in one[0].top] == [None]


def test_probabilities_are_not_taken_for_logits() -> None:
    ready = torch.tensor([0.7, 0.1, 0.2])
    assert [one.probability for one in describe_outputs(ready, ("a", "b", "c"))] == ready.double().tolist()
    logits = torch.tensor([2.0, -1.0, 0.0])
    assert [one.probability for one in describe_outputs(logits, ("a", "b", "c"))] == logits.double().softmax(0).tolist()


class Faulty(nn.Module):
    """NaN for pictures that are black in a corner."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.where(x[:, :1] < -1.9, torch.nan, 0.0)


def test_nan_names_the_picture_and_finished_work_stays(pictures: list[Path], tmp_path: Path) -> None:
    Image.new("RGB", (20, 16)).save(pictures[1])
    model = build()
    faulty = LoadedModel(nn.Sequential(Faulty(), model.module), "f", PREPROCESS, None, "")
    with pytest.raises(ModelError, match=r"two\.png"):
        explain(faulty, pictures, tmp_path / "out", batch_size=1)
    assert [one["path"] for one in record(tmp_path / "out")["images"]] == [str(pictures[0])]
    assert (tmp_path / "out" / "one.png").exists()


def test_models_and_settings_that_do_not_fit(pictures: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ModelError, match="background"):
        explain(build(classes=("background", *CLASSES)), pictures, out)
    with pytest.raises(ModelError, match="cannot take"):
        explain(
            LoadedModel(nn.Sequential(nn.Flatten(), nn.Linear(7, 2)).eval(), "m", PREPROCESS, None, ""), pictures, out
        )
    with pytest.raises(ModelError, match="how pictures are prepared"):
        explain(LoadedModel(build().module, "m", None, None, ""), pictures, out)
    for wrong in ({"topk": 0}, {"batch_size": 0}, {"quantile": 0}, {"save": "csv"}, {"preset": "no"}, {"size": 20}):
        with pytest.raises(SettingError):
            explain(build(), pictures, out, **wrong)  # type: ignore[arg-type]
    with pytest.raises(DataError):
        explain(build(), [], out)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        explain(build(), pictures, tmp_path / "file")


def test_relevance_that_is_not_finite_names_the_picture(
    pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pfungst.lrp import Trace

    true = Trace.relevance

    def spoiled(self: Trace, *args: Any, **options: Any) -> Any:
        result = true(self, *args, **options)
        result.scores[1, 0, 0, 0] = torch.nan
        return result

    monkeypatch.setattr(Trace, "relevance", spoiled)
    with pytest.raises(RelevanceError, match=r"two\.png"):
        explain(build(), pictures, tmp_path / "out")


def test_a_function_as_preprocessing(pictures: list[Path], tmp_path: Path) -> None:
    def own(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image.resize((20, 16))).copy()).permute(2, 0, 1).float() / 50 - 2

    preprocess = Preprocess((16, 20), (0.0,) * 3, (1.0,) * 3, custom=own)
    model = LoadedModel(build().module, "own", preprocess, CLASSES, "")
    found = explain(model, [pictures[0].parent], tmp_path / "out", preset="epsilon-gamma-box")
    assert sorted(one.path.name for one in found) == ["one.png", "three.png", "two.png"]
    assert all(one.targets for one in found)


@pytest.mark.data
def test_real_photographs(data_root: Path, torchvision: Any, tmp_path: Path) -> None:
    names = (data_root / "imagenet-models/imagenet_labels.txt").read_text().splitlines()[1:]
    photos = data_root / "open-licensed-images"
    found = explain(
        "torchvision:squeezenet1_1", [photos / "cat.png", photos / "parrot.jpg"], tmp_path,
        weights=data_root / "imagenet-models/squeezenet1_1_imagenet.safetensors", classes=names,
        size=227, mean=(104, 117, 123), std=(1, 1, 1), channels="BGR", targets="top2",
    )  # fmt: skip
    assert {"Egyptian cat", "tabby, tabby cat"} == {target.prediction.name for target in found[0].targets}
    assert found[1].top[0].name == "macaw"
    assert all(abs(target.absorbed or 1) < 0.05 for one in found for target in one.targets)
