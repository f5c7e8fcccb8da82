"""Measures of maps: against slow oracles in float64, against Quantus where it follows the papers, by hand."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from pfungst import increments
from pfungst.errors import SettingError
from pfungst.methods import Method, make_method, wrap_method
from pfungst.quality import pixel_flipping
from pfungst.quality.localisation import area_under_roc
from pfungst.quality.measures import MEASURES, choose_measures
from pfungst.quality.pixel_flipping import aopc, area, flip
from pfungst.quality.questions import Question, correlate, probabilities, ranks, seeded
from pfungst.quality.randomisation import randomise


def network(dtype: torch.dtype = torch.float64, classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72, classes)).to(dtype).eval()


def ask_about(n: int = 3, side: int = 24, seed: int = 1, **more: Any) -> Question:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, side, side, generator=generator, dtype=torch.double)
    maps = torch.randn(n, side, side, generator=generator, dtype=torch.double)
    return Question(more.pop("model", network()), x, torch.tensor([0, 3, 1])[:n], maps, **more)


# ---- flipping --------------------------------------------------------------------------------------------------------


def slow_curve(q: Question, i: int, region: int, steps: int, replacement: Tensor, first: bool) -> list[float]:
    """The probability of picture i as region after region is replaced: as the paper reads."""
    height, width = q.maps.shape[1:]
    corners = [(top, left) for top in range(0, height, region) for left in range(0, width, region)]
    corners = [c for c in corners if c[0] + region <= height and c[1] + region <= width]
    total = {c: float(q.maps[i, c[0] : c[0] + region, c[1] : c[1] + region].sum()) for c in corners}
    x = q.x[i : i + 1].clone()
    found = [float(q.model(x).softmax(1)[0, q.target[i]])]
    for top, left in sorted(corners, key=lambda c: -total[c] if first else total[c])[:steps]:
        place = (slice(None), slice(None), slice(top, top + region), slice(left, left + region))
        x[place] = replacement.expand_as(x)[place]
        found.append(float(q.model(x).softmax(1)[0, q.target[i]]))
    return found


@pytest.fixture(params=["followed", "asked as wholes"])
def steps_are(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Steps of one region are followed through the model however little that saves, or never."""
    monkeypatch.setattr(increments, "WORTH", 10)
    monkeypatch.setattr(increments, "FOLLOWING", 0)
    if request.param != "followed":
        monkeypatch.setattr(pixel_flipping, "plan_increments", lambda *_: None)
    return str(request.param)


@pytest.mark.parametrize("side", [24, 26])
def test_curves_are_the_slow_ones(side: int, steps_are: str) -> None:
    q = ask_about(side=side, chunk=7)
    steps, count = 9, (side // 5) ** 2
    curves = flip(q, region=5, steps=steps, most=steps / count, fill="zero", whole=False)
    for order, first in (("most", True), ("least", False)):
        slow = [slow_curve(q, i, 5, steps, torch.zeros(1).double(), first) for i in range(3)]
        torch.testing.assert_close(
            curves.probability[order], torch.tensor(slow, dtype=torch.double), rtol=1e-12, atol=1e-14
        )
    torch.testing.assert_close(curves.shares, torch.arange(10).double() / count)


@pytest.mark.parametrize("fill", ["mean", "blur", "uniform"])
def test_followed_steps_are_those_of_whole_pictures(fill: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the picture's edge cuts regions off."""
    monkeypatch.setattr(increments, "WORTH", 10)
    monkeypatch.setattr(increments, "FOLLOWING", 0)
    monkeypatch.setattr(pixel_flipping, "KEPT", 2 * 15_000)  # two pictures at a time
    settings: dict[str, Any] = {"region": 5, "steps": 36, "fill": fill, "draws": 2, "orders": pixel_flipping.ORDERS}
    curves = flip(ask_about(side=26), **settings)
    monkeypatch.setattr(pixel_flipping, "plan_increments", lambda *_: None)
    whole = flip(ask_about(side=26), **settings)
    for order in pixel_flipping.ORDERS:
        torch.testing.assert_close(curves.logit[order], whole.logit[order], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(curves.probability[order], whole.probability[order], rtol=1e-10, atol=1e-12)


def test_a_flipped_picture_is_all_replaced_and_orders_meet_there() -> None:
    q = ask_about(side=26)
    curves = flip(q, region=5, steps=4, fill="mean")
    whole = q.model(q.x.mean((2, 3), keepdim=True).expand_as(q.x)).softmax(1).gather(1, q.target[:, None])[:, 0]
    for order in ("most", "least"):
        torch.testing.assert_close(curves.probability[order][:, -1], whole)
        torch.testing.assert_close(curves.probability[order][:, 0], probabilities(q.outputs)[torch.arange(3), q.target])


class Viewing(nn.Module):
    """Cannot take inputs whose channels lie last."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.view(-1).view(x.shape))


def test_the_layout_in_memory_changes_no_score() -> None:
    q, viewing = ask_about(), ask_about(model=Viewing().eval())
    assert q.layout == torch.channels_last
    assert viewing.layout == torch.contiguous_format
    viewing = Question(Viewing().eval(), q.x, q.target, q.maps)
    one, two = (flip(asked, region=5, steps=4, fill="zero").probability["most"] for asked in (q, viewing))
    torch.testing.assert_close(one, two, rtol=1e-10, atol=0)


def test_aopc_and_areas_by_hand() -> None:
    curve = torch.tensor([[1.0, 0.5, 0.0]])
    assert float(aopc(curve)) == pytest.approx((0 + 0.5 + 1) / 3)
    assert float(area(curve, torch.tensor([0, 0.5, 1.0]))) == pytest.approx(0.5)
    assert float(area(torch.tensor([[1.0, 1.0]]), torch.tensor([0.0, 0.4]))) == pytest.approx(1.0)


def test_region_perturbation_averages_draws_of_noise() -> None:
    q = ask_about(low=torch.full((3, 1, 1), -2.0).double(), high=torch.full((3, 1, 1), 2.0).double())
    scores = MEASURES["region-perturbation"](q, region=6, steps=5, draws=3)
    slow = []
    for draw in range(3):
        noise = pixel_flipping._replacement(q, "uniform", draw)
        assert float(noise.min()) >= -2
        assert float(noise.max()) <= 2
        slow.append([[slow_curve(q, i, 6, 5, noise[i : i + 1], first) for first in (True, False)] for i in range(3)])
    mean = torch.tensor(slow, dtype=torch.double).mean(0)
    torch.testing.assert_close(scores.figures["aopc"], aopc(mean[:, 0]))
    torch.testing.assert_close(scores.figures["abpc"], aopc(mean[:, 0]) - aopc(mean[:, 1]))


def test_srg_of_random_maps_is_nought_and_of_the_reversed_map_its_opposite() -> None:
    torch.manual_seed(3)
    model = network()
    x = torch.randn(64, 3, 24, 24, dtype=torch.double)
    target = model(x).argmax(1)
    random = MEASURES["srg"](Question(model, x, target, torch.randn(64, 24, 24)), region=4, steps=9).figures["srg"]
    assert abs(float(random.mean())) < 3 * float(random.std()) / 8
    maps = make_method("gradient-x-input", model)(x, target)
    good = MEASURES["srg"](Question(model, x, target, maps), region=4, steps=9).figures["srg"]
    bad = MEASURES["srg"](Question(model, x, target, -maps), region=4, steps=9).figures["srg"]
    torch.testing.assert_close(good, -bad)
    assert float(good.mean()) > 5 * float(random.abs().mean()) / 8


@pytest.mark.parametrize("fill", ["mean", "zero", "uniform", "blur", "low", 0.3])
def test_no_batch_changes_a_score(fill: Any) -> None:
    ends = {"low": torch.full((3, 1, 1), -4.0).double(), "high": torch.full((3, 1, 1), 4.0).double()}
    q = ask_about(**ends)
    alone = [Question(q.model, q.x[i : i + 1], q.target[i : i + 1], q.maps[i : i + 1], **ends) for i in range(3)]
    whole = flip(q, region=4, steps=5, fill=fill, orders=("most", "random"), draws=2)
    for order in ("most", "random"):
        parts = torch.cat([flip(a, region=4, steps=5, fill=fill, orders=("most", "random"), draws=2).probability[order]
                           for a in alone])  # fmt: skip
        torch.testing.assert_close(whole.probability[order], parts)


def quantus_scores(name: str, q: Question, masks: bool = False, **settings: Any) -> np.ndarray:
    quantus = pytest.importorskip("quantus")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = getattr(quantus, name)(
            abs=False, normalise=False, disable_warnings=True, return_aggregate=False, **settings
        )
        given = {"s_batch": q.masks[:, None].numpy()} if masks and q.masks is not None else {}
        scores = metric(
            model=q.model, x_batch=q.x.numpy(), y_batch=q.target.numpy(), a_batch=q.maps[:, None].numpy(), **given
        )
    return np.asarray(scores, float)


@pytest.fixture
def single(torchvision: Any) -> Question:
    q = ask_about(model=network(torch.float32))
    return Question(q.model, q.x.float(), q.target, q.maps.float(), masks=q.maps.roll(3, 1) > 0.7)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", ["most", "least"])
def test_region_perturbation_is_quantus(single: Question, order: str) -> None:
    names = {"most": "morf", "least": "lerf"}
    theirs = quantus_scores("RegionPerturbation", single, patch_size=6, regions_evaluation=10, order=names[order],
                            perturb_baseline=0.25)  # fmt: skip
    curve = flip(single, region=6, steps=10, most=10 / 16, fill=0.25, orders=(order,)).probability[order]
    np.testing.assert_allclose((curve[:, :1] - curve[:, 1:]).numpy(), theirs, atol=2e-7)


@pytest.mark.filterwarnings("ignore")
def test_pixel_flipping_is_quantus(single: Question) -> None:
    theirs = quantus_scores("PixelFlipping", single, features_in_step=3 * 16, perturb_baseline=0.0)
    curve = flip(single, region=1, steps=24 * 24 // 16, fill="zero", orders=("most",)).probability["most"]
    np.testing.assert_allclose(curve[:, 1:].numpy(), theirs, atol=2e-7)


@pytest.mark.filterwarnings("ignore")
def test_localisation_is_quantus(single: Question) -> None:
    ours = MEASURES["localisation"](single, tolerance=0).figures
    positive = Question(single.model, single.x, single.target, single.maps.clamp(min=0), masks=single.masks)
    for name, metric, asked in (
        ("mass", "RelevanceMassAccuracy", positive),
        ("mass", "AttributionLocalisation", positive),
        ("rank", "RelevanceRankAccuracy", single),
        ("pointing", "PointingGame", single),
    ):
        np.testing.assert_allclose(ours[name].numpy(), quantus_scores(metric, asked, masks=True), rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_complexity_is_quantus(single: Question) -> None:
    size = Question(single.model, single.x, single.target, single.maps.abs())
    ours = MEASURES["complexity"](single).figures
    np.testing.assert_allclose(ours["entropy"].numpy(), quantus_scores("Complexity", size), rtol=1e-5)
    np.testing.assert_allclose(ours["sparseness"].numpy(), quantus_scores("Sparseness", size), rtol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_max_sensitivity_is_quantus_with_the_same_noise(torchvision: Any) -> None:
    q = ask_about(model=network(torch.float32))
    method = make_method("gradient-x-input", q.model)
    x = q.x.float()
    q = Question(q.model, x, q.target, method(x, q.target), method)
    ours = MEASURES["robustness"](q, radius=0.0, draws=1).figures
    assert float(ours["max_sensitivity"].max()) < 1e-6
    generator = torch.Generator().manual_seed(5)
    noise = 0.05 * torch.randn(x.shape, generator=generator)

    def explain(model: Any, inputs: Any, targets: Any, **_: Any) -> np.ndarray:
        return method(torch.as_tensor(inputs).float(), torch.as_tensor(targets))[:, None].numpy()

    quantus = pytest.importorskip("quantus")
    metric = quantus.MaxSensitivity(
        nr_samples=1, perturb_func=lambda arr, **_: arr + noise.flatten(1).numpy(), abs=False, normalise=False,
        disable_warnings=True, return_aggregate=False, return_nan_when_prediction_changes=False)  # fmt: skip
    theirs = metric(q.model, x.numpy(), q.target.numpy(), None, explain_func=explain)
    change = (method(x + noise, q.target) - q.maps).flatten(1).norm(dim=1)
    # Quantus divides by the norm of the picture's own map, as Yeh et al. do.
    np.testing.assert_allclose((change / q.maps.flatten(1).norm(dim=1)).numpy(), theirs, rtol=1e-4)


# ---- localisation ----------------------------------------------------------------------------------------------------


def test_localisation_by_hand() -> None:
    maps = torch.zeros(3, 4, 4)
    maps[0, 1, 1], maps[0, 3, 3], maps[0, 0, 0] = 3, 1, -5
    maps[1, 3, 3] = 1
    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[:2, :2, :2] = True
    q = Question(network(), torch.zeros(3, 3, 4, 4), torch.zeros(3).long(), maps, masks=masks)
    found = MEASURES["localisation"](q, tolerance=0).figures
    assert found["mass"][:2].tolist() == [0.75, 0]
    assert found["mass_w"][0] == 3
    assert found["pointing"][:2].tolist() == [1, 0]
    assert found["outside"][0] == pytest.approx((1 / 12) / (3 / 4))
    assert found["outside_signed"][0] == pytest.approx((1 / 12) / (-2 / 4))
    assert all(torch.isnan(values[2]) for values in found.values())  # no object: no score
    near = MEASURES["localisation"](q, tolerance=3).figures["pointing"]
    assert near[1] == 1  # (3, 3) is within 3 of (1, 1)


def test_auc_is_scikit_learns_with_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 9, (4, 200), generator=generator).double()
    positive = torch.rand(4, 200, generator=generator) < 0.3
    wanted = [roc_auc_score(p.numpy(), v.numpy()) for p, v in zip(positive, values, strict=True)]
    np.testing.assert_allclose(area_under_roc(values, positive).numpy(), wanted)


def test_every_draw_is_another_one() -> None:
    x = torch.randn(2, 3, 8, 8)
    drawn = [torch.rand(5, generator=g) for salt in (0, 1, 2) for g in seeded(x, salt)]
    assert len({tuple(one.tolist()) for one in drawn}) == 6
    q = ask_about()
    method = make_method("gradient", q.model)
    found = MEASURES["robustness"](Question(q.model, q.x, q.target, method(q.x, q.target), method)).figures
    assert bool((found["max_sensitivity"] > found["mean_sensitivity"]).all())


def test_ranks_and_correlation() -> None:
    assert ranks(torch.tensor([[3.0, 1.0, 3.0, 2.0]])).tolist() == [[2.5, 0.0, 2.5, 1.0]]
    a, b = torch.randn(2, 50), torch.randn(2, 50)
    wanted = [np.corrcoef(a[i], b[i])[0, 1] for i in range(2)]
    np.testing.assert_allclose(correlate(a, b).numpy(), wanted, rtol=1e-6)


# ---- the others ------------------------------------------------------------------------------------------------------


def test_complexity_knows_its_ends() -> None:
    maps = torch.ones(2, 8, 8)
    maps[1] = 0
    maps[1, 2, 2] = 1
    found = MEASURES["complexity"](Question(network(), torch.zeros(2, 3, 8, 8), torch.zeros(2).long(), maps)).figures
    np.testing.assert_allclose(found["entropy"].numpy(), [np.log(64), 0], atol=1e-12)
    np.testing.assert_allclose(found["sparseness"].numpy(), [0, 63 / 64], atol=1e-12)
    assert found["bits"][0] <= found["bits"][1]


def method_of(function: Any) -> Method:
    return wrap_method("mine", function)


def test_class_sensitivity_asks_for_the_rival() -> None:
    q = ask_about()
    rival = q.outputs.scatter(1, q.target[:, None], -torch.inf).argmax(1)
    asked: list[Tensor] = []

    def explain(x: Tensor, target: Tensor) -> Tensor:
        asked.append(target)
        return x[:, 0] * (1 if len(asked) == 1 else -1)

    q = Question(q.model, q.x, q.target, q.x[:, 0], method_of(explain))
    found = MEASURES["class-sensitivity"](q).figures
    assert torch.equal(asked[0], rival)
    assert not bool((asked[1] == q.target).any())
    np.testing.assert_allclose(found["top_two"].numpy(), 1)
    np.testing.assert_allclose(found["any_two"].numpy(), -1)


def test_a_map_that_moves_with_the_picture_moves_along() -> None:
    q = ask_about()
    follows = Question(q.model, q.x, q.target, q.x[:, 0], method_of(lambda x, target: x[:, 0]))
    stays = Question(q.model, q.x, q.target, q.maps, method_of(lambda x, target: q.maps))
    np.testing.assert_allclose(MEASURES["robustness"](follows, draws=2).figures["shift"].numpy(), 1)
    found = MEASURES["robustness"](stays, draws=2).figures
    assert float(found["max_sensitivity"].max()) < 1e-6
    assert float(found["shift"].abs().max()) < 0.2


def test_randomisation_changes_a_copy() -> None:
    q = ask_about()
    before = {name: value.clone() for name, value in q.model.state_dict().items()}
    fresh = randomise(q.model, ["7"], 0)
    assert not torch.equal(fresh[7].weight, q.model[7].weight)
    torch.testing.assert_close(fresh[7].weight.flatten().sort().values, q.model[7].weight.flatten().sort().values)
    assert torch.equal(fresh[0].weight, q.model[0].weight)
    for name, wanted in (("edges", 1.0), ("gradient", None)):
        method = make_method(name, q.model)
        asked = Question(q.model, q.x, q.target, method(q.x, q.target), method)
        found = MEASURES["randomisation"](asked).figures["alike_whole"]
        if wanted is not None:
            np.testing.assert_allclose(found.numpy(), wanted)
        else:
            assert float(found.max()) < 0.6
    assert all(torch.equal(before[name], value) for name, value in q.model.state_dict().items())


def test_conservation_of_lrp_and_of_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3, bias=False))
    model = model.double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    target = torch.tensor([0, 2])
    method = make_method("gradient-x-input", model)
    maps = method(x, target)
    assert float(MEASURES["conservation"](Question(model, x, target, maps, method)).figures["leak"].max()) < 1e-6
    half = MEASURES["conservation"](Question(model, x, target, maps / 2)).figures
    np.testing.assert_allclose(half["leak"].numpy(), 0.5, rtol=1e-6)
    control = make_method("centre-gaussian", model)
    none = MEASURES["conservation"](Question(model, x, target, control(x, target), control)).figures
    assert all(bool(values.isnan().all()) for values in none.values())


def test_figures_are_in_the_table_and_nothing_else() -> None:
    q = ask_about()
    method = make_method("gradient", q.model)
    q = Question(q.model, q.x, q.target, method(q.x, q.target), method, masks=q.maps > 1)
    for measure in MEASURES.values():
        small = {"draws": 1, "steps": 4} if measure.name == "region-perturbation" else {}
        scores = measure(q, **small)
        assert list(scores.figures) == list(measure.figures), measure.name
        assert all(values.shape == (3,) for values in scores.figures.values())
        assert all(curve.shape == (3, len(scores.shares)) for curve in scores.curves.values())


def test_what_cannot_be_measured_is_said() -> None:
    q = ask_about()
    with pytest.raises(SettingError, match="localisation without masks"):
        MEASURES["localisation"](q)
    for name in ("robustness", "class-sensitivity", "randomisation"):
        with pytest.raises(SettingError, match="method"):
            MEASURES[name](q)
    with pytest.raises(SettingError, match="fill 'grey'"):
        flip(q, region=4, steps=2, fill="grey")
    with pytest.raises(SettingError, match="region 40"):
        flip(q, region=40, steps=2)
    with pytest.raises(SettingError, match="the measures are"):
        choose_measures(["srg", "aopc"])
    with pytest.raises(SettingError, match="inputs, maps and targets"):
        Question(q.model, q.x, q.target, q.maps[:2])
