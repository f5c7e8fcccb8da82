"""pfungst evaluate: tables against controls, resuming, files and tensors, the page and the command."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn

from pfungst import audit
from pfungst.cli import cli
from pfungst.domains.labels import spread_rows
from pfungst.errors import DataError, ModelError, RunError, SettingError
from pfungst.evaluations import evaluate
from pfungst.lrp import LRP
from pfungst.methods import make_method
from pfungst.sheets import describe_evaluation, write_evaluation, write_page
from pfungst.tables import tabulate, write_number
from pfungst.terminal import print_evaluation


class Corner(nn.Module):
    """Sees the upper left quarter alone: class 1 where it is bright, class 0 where it is dark."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(3, 2, 1)
        with torch.no_grad():
            self.look.weight.copy_(torch.tensor([[-1.0] * 3, [1.0] * 3])[..., None, None])
            self.look.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return 20 * torch.relu(self.look(x - 0.5))[:, :, :8, :8].mean((2, 3))


def pictures(n: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.rand(n, 3, 16, 16)
    labels = torch.arange(n) % 2
    x[:, :, :8, :8] = 0.5 + 0.4 * (labels * 2 - 1).view(-1, 1, 1, 1) * torch.rand(n, 1, 8, 8)
    masks = torch.zeros(n, 16, 16, dtype=torch.bool)
    masks[:, :8, :8] = True
    return x, labels, masks


@pytest.fixture
def model() -> nn.Module:
    return Corner().eval()


def judge(model: nn.Module, given: Any = None, **more: Any) -> Any:
    options = {"methods": ["epsilon", "gradient"], "measures": ["srg", "localisation"], "bounds": (0, 1), **more}
    return evaluate(model, pictures() if given is None else given, batch_size=6, **options)


def test_a_map_of_what_the_model_sees_beats_its_controls(model: nn.Module) -> None:
    found = judge(model)
    table = tabulate(found)
    assert table.methods[-3:] != table.methods[:3]
    assert [found.kinds[m] for m in table.methods] == ["preset", "baseline", "control", "control", "control"]
    cell = table.cells["epsilon"]
    assert cell["mass"].mean == pytest.approx(1)
    assert cell["pointing"].mean == 1
    for name in ("srg", "mass", "auc", "rank"):
        assert cell[name].worse_than == (), name
        assert cell[name].low <= cell[name].mean <= cell[name].high
    assert table.cells["random"]["srg"].worse_than is None
    assert abs(table.cells["random"]["auc"].mean - 0.5) < 0.1


def test_a_method_that_knows_nothing_is_marked(model: nn.Module) -> None:
    found = judge(model, methods={"guess": lambda x, target: x.mean(1).flip(2)})
    cell = tabulate(found).cells["guess"]
    assert "random" in (cell["srg"].worse_than or ())
    assert "does not beat" in write_page(found, tabulate(found))


def test_scores_are_those_of_the_measures_whatever_the_batches(model: nn.Module) -> None:
    one, other = (
        judge(model),
        evaluate(
            model,
            pictures(),
            methods=["epsilon"],
            measures=["srg", "localisation"],
            bounds=(0, 1),
            batch_size=20,
            chunk=3,
        ),
    )
    for name, values in other.values["epsilon"].items():
        np.testing.assert_allclose(one.values["epsilon"][name], values, rtol=1e-5, atol=1e-7)
    assert one.curves["epsilon"]["srg"]["most relevant first"].shape == (20, 29)


def test_a_loader_is_as_good_as_tensors(model: nn.Module) -> None:
    data = torch.utils.data.TensorDataset(*pictures())
    found = judge(model, torch.utils.data.DataLoader(data, batch_size=7))
    whole = judge(model)
    np.testing.assert_allclose(found.values["gradient"]["srg"], whole.values["gradient"]["srg"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.values["gradient"]["auc"], whole.values["gradient"]["auc"])
    assert found.ids == [str(i) for i in range(20)]
    noted = evaluate(
        model, torch.utils.data.DataLoader(data, batch_size=7), methods=["epsilon"], measures=["complexity"]
    )
    assert "first batch" in noted.notes[0]


def test_labels_and_predictions_are_two_targets(model: nn.Module) -> None:
    x, labels, masks = pictures()
    wrong = 1 - labels
    by_label = judge(model, (x, wrong, masks), target="label", measures=["conservation"])
    by_prediction = judge(model, (x, wrong, masks), measures=["conservation"])
    assert not np.allclose(by_label.values["epsilon"]["leak"], by_prediction.values["epsilon"]["leak"], equal_nan=True)


def test_it_goes_on_where_it_was_killed(model: nn.Module, tmp_path: Path, monkeypatch: Any) -> None:
    whole = judge(model)
    calls: list[int] = []
    plain = LRP.__call__

    def dies(self: LRP, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(LRP, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        judge(model, out=tmp_path / "q")
    done = list((tmp_path / "q" / "parts").rglob("*.npz"))
    assert done
    before = {path: path.stat().st_mtime_ns for path in done}
    again = judge(model, out=tmp_path / "q")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    for method, values in whole.values.items():
        for name, wanted in values.items():
            np.testing.assert_array_equal(again.values[method][name], wanted)


def test_more_methods_compute_what_is_new_alone(model: nn.Module, tmp_path: Path, monkeypatch: Any) -> None:
    judge(model, out=tmp_path / "q")
    monkeypatch.setattr(LRP, "__call__", lambda *args, **kwargs: pytest.fail("epsilon is done already"))
    small = pictures()
    found = evaluate(
        model, small, methods=["gradient-x-input"], measures=["srg", "localisation"], bounds=(0, 1), batch_size=6,
        out=tmp_path / "q",
    )  # fmt: skip
    assert set(found.values) == {"gradient-x-input", "random", "centre-gaussian", "edges"}
    with pytest.raises(
        RunError, match=r"another evaluation: data was '\w{16}.*, is now '\w{16}.*limit was None, is now 9"
    ):
        evaluate(model, (small[0] * 0.9, *small[1:]), methods=["gradient"], batch_size=6, limit=9, out=tmp_path / "q")
    with pytest.raises(RunError, match="another evaluation: data was"):
        evaluate(model, (small[0] * 0.9, *small[1:]), methods=["gradient"], batch_size=6, out=tmp_path / "q")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match="no evaluation"):
        judge(model, out=tmp_path / "other")


def test_other_masks_are_other_scores(model: nn.Module, tmp_path: Path) -> None:
    for label in range(2):
        (tmp_path / f"masks{label}").mkdir()
    (tmp_path / "images").mkdir()
    for i, one in enumerate(pictures(4)[0]):
        pixels = (one.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"p{i}.png")
        for label in range(2):
            mask = np.zeros((16, 16), np.uint8)
            mask[8 * label : 8 * label + 8, :8] = 1
            Image.fromarray(mask).save(tmp_path / f"masks{label}" / f"p{i}.png")
    how: dict[str, Any] = {"size": 16, "mean": (0, 0, 0), "std": (1, 1, 1), "out": tmp_path / "q"}
    mass = [
        evaluate(model, tmp_path / "images", methods=["epsilon"], measures=["localisation"], masks=tmp_path / m, **how)
        .values["epsilon"]["mass"].mean()
        for m in ("masks0", "masks1")
    ]  # fmt: skip
    assert mass[0] == pytest.approx(1, abs=0.05)
    assert mass[1] == pytest.approx(0, abs=0.05)


def test_a_torn_part_is_done_again(model: nn.Module, tmp_path: Path) -> None:
    whole = judge(model, out=tmp_path / "q")
    for path in (tmp_path / "q" / "parts" / "gradient").rglob("*.npz"):
        path.write_bytes(path.read_bytes()[:50])
    again = judge(model, out=tmp_path / "q")
    np.testing.assert_array_equal(again.values["gradient"]["srg"], whole.values["gradient"]["srg"])


def test_what_cannot_be_done_is_left_out_with_its_reason(model: nn.Module) -> None:
    x, labels, _ = pictures()
    plain = nn.Sequential(nn.Flatten(), nn.Linear(768, 2)).eval()
    found = judge(plain, (x, labels), methods=["guided-backprop", "epsilon"], measures=["srg", "localisation"])
    assert "calls no ReLU" in found.left_out["guided-backprop"]
    assert "masks" in found.left_out["localisation"]
    assert found.measures == ["srg"]
    assert "epsilon" in found.values
    own = judge(model, methods={"mine": lambda x, target: x}, measures=["randomisation", "complexity"])
    assert "not just maps" in own.left_out["mine: randomisation"]
    assert "entropy" in own.values["mine"]
    assert "alike_whole" not in own.values["mine"]


def test_maps_that_are_not_finite_have_no_score(model: nn.Module) -> None:
    def broken(x: Tensor, target: Tensor) -> Tensor:
        maps = x.mean(1).clone()
        maps[0, 0, 0] = torch.nan
        return maps

    found = judge(model, methods={"mine": broken}, measures=["complexity"])
    assert np.isnan(found.values["mine"]["entropy"]).tolist() == [i % 6 == 0 for i in range(20)]


def test_what_is_asked_wrongly_is_said(model: nn.Module) -> None:
    x, labels, masks = pictures()
    with pytest.raises(SettingError, match="srg has no option 'depth'"):
        judge(model, measures={"srg": {"depth": 3}})
    with pytest.raises(SettingError, match="target is 'top'"):
        judge(model, target="top")
    with pytest.raises(DataError, match="has no label"):
        judge(model, x, target="label", measures=["srg"])
    with pytest.raises(DataError, match="label 7 of 2 outputs"):
        judge(model, (x, labels + 6, masks), target="label")
    with pytest.raises(ModelError, match="NaN"):
        judge(model, (x * torch.nan, labels, masks))
    with pytest.raises(DataError, match="iterator"):
        judge(model, iter([pictures()]))
    with pytest.raises(SettingError, match="no method 'lime'"):
        judge(model, methods=["lime"])


def test_what_a_method_chose_is_told(model: nn.Module) -> None:
    found = judge(model, methods=["grad-cam"], measures=["complexity"])
    assert found.notes == ["grad-cam looks at layer look: 2 channels of 16 x 16"]


def test_the_preset_that_auto_chose_is_named(model: nn.Module, tmp_path: Path, capsys: Any) -> None:
    found = judge(model, methods=["auto", "epsilon"], out=tmp_path / "q")
    table = tabulate(found)
    assert found.chosen == {"auto": "epsilon-plus"}
    assert set(found.values) == {"auto", "epsilon", "random", "centre-gaussian", "edges"}, "its name stays"
    assert table.titles["auto"] == "auto: epsilon-plus"
    page = write_evaluation(found, tmp_path / "q").read_text()
    assert re.search(r'<th scope="row">auto: <span class="chosen">epsilon-plus</span>', page)
    assert "<h3>auto: epsilon-plus</h3>" in page
    assert "<figcaption>auto: epsilon-plus</figcaption>" in page
    print_evaluation(found, table, tmp_path / "page.html")
    assert "auto: epsilon-plus" in capsys.readouterr().out
    assert "auto: epsilon-plus" in repr(table)
    rows = json.loads((tmp_path / "q" / "evaluation.json").read_text())["table"]
    assert {row["method"]: row.get("chosen") for row in rows}["auto"] == "epsilon-plus"
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "q" / "parts").rglob("*.npz")}
    again = judge(model, methods=["auto", "epsilon"], out=tmp_path / "q")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "q" / "parts").rglob("*.npz")} == parts
    assert again.chosen == found.chosen, "and nothing is computed again to know it"


def test_the_page_shows_what_there_is(model: nn.Module) -> None:
    found = judge(model, measures=["srg", "conservation"])
    page = write_page(found, tabulate(found))
    assert "</span>random order" not in page, "no curve of it is drawn"
    assert "</span>least relevant first" in page
    assert "- to -" not in page
    assert "n = 0" not in page
    assert 'title="not defined for maps of this method">-<' in page
    flipped = judge(model, measures=["pixel-flipping", "region-perturbation"])
    for measure, part in zip(flipped.measures, write_page(flipped, tabulate(flipped)).split("<h2>")[1:], strict=False):
        orders = {order for curves in flipped.curves.values() for order in curves[measure]}
        assert part.startswith(measure)
        for order in ("most relevant first", "least relevant first", "random order"):
            assert (f"</span>{order}" in part) == (order in orders), (measure, order)


def test_rows_are_drawn_from_all_classes() -> None:
    labels = np.repeat([0, 1, 2], [50, 5, 2])
    rows = spread_rows(labels, 9, seed=0)
    assert np.bincount(labels[rows]).tolist() == [4, 3, 2]
    assert np.array_equal(rows, spread_rows(labels, 9, seed=0))
    few = [labels[spread_rows(labels, 2, seed=seed)] for seed in range(40)]
    assert all(len(set(two)) == 2 for two in few)  # fewer than classes: of different ones, and any of them
    assert np.bincount(np.concatenate(few)).min() > 0


def test_numbers_are_short() -> None:
    assert [write_number(v) for v in (0.12345, 12.345, 0.0, 1e-7, 123456.0, float("nan"))] == [
        "0.123", "12.3", "0.000", "1.0e-07", "1.2e+05", "-"]  # fmt: skip


def test_files_say_what_the_table_says(model: nn.Module, tmp_path: Path) -> None:
    found = judge(model, out=tmp_path / "q")
    page = write_evaluation(found, tmp_path / "q")
    table = tabulate(found)
    content = json.loads((tmp_path / "q" / "evaluation.json").read_text())
    assert content == json.loads(json.dumps(describe_evaluation(found, table)))
    rows = {(row["method"], row["figure"]): row for row in csv.DictReader((tmp_path / "q" / "table.csv").open())}
    assert float(rows["epsilon", "srg"]["mean"]) == pytest.approx(table.cells["epsilon"]["srg"].mean, rel=1e-5)
    each = list(csv.DictReader((tmp_path / "q" / "pictures.csv").open()))
    assert len(each) == 20 * 5
    html = page.read_text()
    assert "<script" not in html
    assert html.count("<img") == 6 * (1 + 5)
    assert html.count("<svg") == 5


def test_names_cannot_break_out_of_the_page(model: nn.Module) -> None:
    found = judge(model, methods={"<script>alert(1)</script>": make_method("gradient", model).explain})
    assert "<script" not in write_page(found, tabulate(found))
    assert "<script" not in found._repr_html_()


def test_the_command(tmp_path: Path) -> None:
    for label in ("dark", "light"):
        (tmp_path / "images" / label).mkdir(parents=True)
    x, labels, _ = pictures(8)
    for i, (one, label) in enumerate(zip(x, labels, strict=True)):
        pixels = (one.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / ("dark", "light")[int(label)] / f"p{i}.png")
    (tmp_path / "masks").mkdir()
    for i in range(8):
        mask = np.zeros((16, 16), np.uint8)
        mask[:8, :8] = 1
        Image.fromarray(mask).save(tmp_path / "masks" / f"p{i}.png")
    source = Path(__file__).read_text()
    body = source[source.index("class Corner") : source.index("def pictures")]
    (tmp_path / "net.py").write_text(f"import torch\nfrom torch import Tensor, nn\n\n\n{body}\n\nbuild = Corner\n")
    options = ["--size", "16", "--mean", "0,0,0", "--std", "1,1,1", "--methods", "auto,grad-cam"]
    folders = ["--masks", f"{tmp_path}/masks", "--out", f"{tmp_path}/q"]
    arguments = ["evaluate", f"{tmp_path}/net.py:build", f"{tmp_path}/images", *options, *folders]
    torch.save(Corner().state_dict(), tmp_path / "weights.pt")
    result = CliRunner().invoke(cli, [*arguments, "--weights", f"{tmp_path}/weights.pt"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "auto" in result.output
    assert "evaluation.html" in result.output
    shown = CliRunner().invoke(
        cli, [*arguments, "--weights", f"{tmp_path}/weights.pt", "--json"], catch_exceptions=False
    )
    content = json.loads(shown.stdout)
    assert content["n"] == 8
    assert content["table"][0]["figures"]["mass"]["mean"] > 0.9
    assert set(content["measures"]) >= {"srg", "localisation"}


def test_maps_made_elsewhere_are_judged_beside(tmp_path: Path, model: nn.Module) -> None:
    x, _, _ = pictures(8)
    (tmp_path / "images").mkdir()
    for i, one in enumerate(x):
        pixels = (one.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"p{i}.png")
    stored = torch.as_tensor(np.stack([np.asarray(Image.open(tmp_path / "images" / f"p{i}.png")) for i in range(8)]))
    shown = stored.permute(0, 3, 1, 2).float() / 255
    maps = make_method("gradient-x-input", model)(shown, model(shown).argmax(1))
    np.savez(tmp_path / "captum.npz", maps=maps.numpy())
    found = evaluate(
        model, tmp_path / "images", methods=["gradient-x-input"], measures=["srg", "class-sensitivity"],
        relevance=[tmp_path / "captum.npz"], size=16, mean=(0, 0, 0), std=(1, 1, 1),
    )  # fmt: skip
    np.testing.assert_allclose(found.values["captum"]["srg"], found.values["gradient-x-input"]["srg"], atol=1e-6)
    assert "not just maps" in found.left_out["captum: class-sensitivity"]


def test_a_finished_run_brings_its_pictures_preset_and_maps(finished: Path, small: Any, tmp_path: Path) -> None:
    found = evaluate(finished, methods=["gradient"], measures=["complexity", "conservation"])
    assert len(found.ids) == 80
    assert found.about["target"] == "label"
    run = audit(small.model, small.photos, out=tmp_path / "run", **small.settings, full_maps=True, limit=16).run.path
    kept = evaluate(run, measures=["complexity", "conservation", "robustness"], methods=["auto"])
    assert len(kept.ids) == 16
    assert kept.kinds["run"] == "own"
    np.testing.assert_allclose(kept.values["run"]["entropy"], kept.values["auto"]["entropy"], rtol=1e-4)
    assert "not just maps" in kept.left_out["run: robustness"]
    few = evaluate(run, measures=["complexity"], methods=["auto"], limit=5, seed=3)
    np.testing.assert_allclose(few.values["run"]["entropy"], few.values["auto"]["entropy"], rtol=1e-4)
    with pytest.raises(SettingError, match="no images"):
        evaluate(small.model)


def test_what_pytorch_users_hand_over_is_taken(model: nn.Module) -> None:
    x, labels, masks = pictures()
    wanted = judge(model).values["epsilon"]["mass"]
    numpy = (x.numpy(), labels.numpy(), masks[:, None].numpy())
    for given in (numpy, [x, labels, masks], torch.utils.data.TensorDataset(x, labels, masks)):
        np.testing.assert_array_equal(judge(model, given).values["epsilon"]["mass"], wanted)
    both = judge(model, methods={"mine": lambda x, target: x, "theirs": "epsilon"})
    np.testing.assert_array_equal(both.values["theirs"]["mass"], wanted)
    assert set(judge(model, methods="epsilon", measures="complexity").values) > {"epsilon"}


def test_tensors_that_do_not_fit_are_named(model: nn.Module) -> None:
    x, labels, masks = pictures()
    for given, cause in (
        ((x, labels[:3], masks), "20 pictures, 3 labels"),
        ((x, labels, masks[:5]), "20 pictures, 5 masks"),
        ((x, labels, masks[:, :4]), "masks of shape"),
        (((x * 255).byte(), labels), "torch.uint8 values"),
    ):
        with pytest.raises(DataError, match=cause):
            judge(model, given)
    with pytest.raises(SettingError, match="no argument 'method'"):
        judge(model, method=["epsilon"])
    with pytest.raises(SettingError, match="there is no measure 'localization'"):
        judge(model, measures=["localization"])
    with pytest.raises(SettingError, match="limit is 0"):
        judge(model, limit=0)
    with pytest.raises(SettingError, match="nothing could be measured: localisation: needs masks"):
        judge(model, (x, labels), measures=["localisation"])


def test_an_explainer_that_fails_is_left_out_by_name(model: nn.Module) -> None:
    found = judge(model, methods={"mine": lambda x, target: 1 / 0, "auto": "auto"})
    assert found.left_out == {"mine": "ZeroDivisionError: division by zero"}
    assert "auto" in found.values


def test_few_pictures_and_masks_that_say_nothing_are_noted(model: nn.Module) -> None:
    x, labels, masks = pictures()
    few = judge(model, (x[:5], labels[:5], masks[:5]))
    assert "5 pictures are few" in few.notes[0]
    assert all(cell.worse_than is None for cells in few.table().cells.values() for cell in cells.values())
    empty = judge(model, (x, labels, torch.zeros_like(masks)))
    assert "localisation is not defined" in empty.notes[0]
    assert empty.table().cells["epsilon"]["mass"].worse_than is None
    nothing = judge(model, methods={"mine": lambda x, target: 0 * x}, measures=["complexity"])
    assert "mine: 20 of 20 maps are empty" in nothing.notes[0]


def test_an_evaluation_prints_as_a_small_table(model: nn.Module) -> None:
    text = repr(judge(model))
    assert text.splitlines()[0] == "Evaluation of Corner on 20 pictures"
    assert len(text) < 1500
    assert "epsilon" in text


@pytest.mark.parametrize("width", [50, 80, 200])
def test_no_number_is_cut_on_a_narrow_terminal(model: nn.Module, width: int, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    found = judge(model, measures=["srg", "localisation", "complexity", "class-sensitivity", "conservation"])
    print_evaluation(found, found.table(), Path("page.html"))
    shown = capsys.readouterr().out
    for name, cell in found.table().cells["epsilon"].items():
        if found.table().figures[name].main:
            assert write_number(cell.mean) in shown, name
    assert max(map(len, shown.splitlines())) <= max(width, 97)
