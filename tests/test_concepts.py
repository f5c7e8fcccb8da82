"""Relevance maximisation: planted detectors are found, and crops are what reaches the unit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_engine import drawn
from torch import Tensor, nn

from pfungst.errors import SettingError
from pfungst.lrp import LRP, Channels, relevance_maximisation
from pfungst.lrp.concepts import bounding_box, receptive_fields
from pfungst.lrp.even import Reach


class Detectors(nn.Module):
    """Two planted detectors: channel 0 a bright 2 x 2 square, channel 1 a bright row of three; class 1 needs both."""

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Conv2d(1, 2, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(2, 2)
        kernels = torch.full((2, 1, 3, 3), -1.0)
        kernels[0, 0, :2, :2] = 1
        kernels[1, 0, 1] = 4 / 3
        with torch.no_grad():
            self.see.weight.copy_(kernels)
            self.see.bias.fill_(-3)
            self.head.weight.copy_(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.see(x).relu()).amax((2, 3)))


def _planted() -> tuple[Tensor, dict[int, list[tuple[int, int, int]]]]:
    """40 pictures 12 x 12; the square in 6 of them and the row in 5, each brighter than the one before."""
    x = 0.05 * torch.rand(40, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    where: dict[int, list[tuple[int, int, int]]] = {0: [], 1: []}
    for k, sample in enumerate((3, 8, 15, 16, 30, 39)):
        i, j = 2 + k, 9 - k
        x[sample, 0, i : i + 2, j : j + 2] = 1 + 0.1 * k
        where[0].append((sample, i, j))
    for k, sample in enumerate((1, 12, 22, 33, 35)):
        i, j = 9 - k, 1 + k
        x[sample, 0, i, j : j + 3] = 1 + 0.1 * k
        where[1].append((sample, i, j))
    return x, where


@pytest.mark.parametrize("by", ["sum", "max"])
def test_relevance_maximisation_finds_what_was_planted(by: str) -> None:
    x, where = _planted()
    model = Detectors().eval()
    alive = []

    def batches() -> Any:
        for part in x.split(7):
            alive.append(len(part))
            yield part, torch.ones(len(part), dtype=torch.long)

    found = relevance_maximisation(LRP(model), batches(), "see", target="label", k=4, by=by, normalise=False)
    assert sorted(found) == [0, 1]
    for channel, planted in where.items():
        brightest = planted[::-1][:4]
        assert [one.sample for one in found[channel]] == [sample for sample, _, _ in brightest]
        direct = LRP(model)(x, 1, layers=["see"]).layers["see"][:, channel]
        for one, (sample, i, j) in zip(found[channel], brightest, strict=True):
            relevance = direct[sample].sum() if by == "sum" else direct[sample].max()
            assert one.score == pytest.approx(float(relevance), rel=1e-5)
            centre = (i + 1, j + 1) if channel == 0 else (i, j + 1)
            assert one.place == centre
            assert one.box == tuple(slice(max(0, c - 1), min(12, c + 2)) for c in centre)
            assert torch.equal(one.crop, x[sample][(slice(None), *one.box)])


def test_relevance_maximisation_as_a_share() -> None:
    """Normalised, a sample counts by how much of its relevance a channel holds, not by how great its output is."""
    x, _ = _planted()
    lrp = LRP(Detectors().eval())
    layer = lrp(x, 1, layers=["see"]).layers["see"]
    share = (layer.sum((2, 3)) / layer.abs().sum((1, 2, 3)).clamp(min=1e-30)[:, None])[:, 1]
    found = relevance_maximisation(lrp, x.split(16), "see", [1], target=1, k=5)
    assert list(found) == [1]
    torch.testing.assert_close(torch.tensor([one.score for one in found[1]]), share.sort(descending=True).values[:5])
    for wrong in ({"by": "mean"}, {"k": 0}, {"target": "label"}, {"channels": [2]}):
        with pytest.raises(SettingError):
            relevance_maximisation(lrp, x.split(16), "see", **wrong)
    with pytest.raises(SettingError, match="no batches"):
        relevance_maximisation(lrp, [], "see")


def _reached_by_perturbation(net: nn.Module, shape: tuple[int, ...], place: tuple[int, ...]) -> Tensor:
    """(H, W) bools: the pixels whose NaN makes the unit NaN.  In float64, where convolutions are plain sums."""
    height, width = shape[-2:]
    found = torch.zeros(height, width, dtype=torch.bool)
    for i, j in itertools.product(range(height), range(width)):
        x = torch.ones(1, *shape, dtype=torch.float64)
        x[..., i, j] = torch.nan
        with torch.no_grad():
            found[i, j] = bool(net(x)[(0, *place)].isnan())
    return found


@pytest.mark.parametrize("dead", [False, True])
def test_receptive_fields_are_those_of_a_perturbation(dead: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(3, 3, 3, padding=2, dilation=2, groups=3), nn.ReLU6(), nn.AvgPool2d(2, 1), nn.Conv2d(3, 2, 1),
    ).double().eval()  # fmt: skip
    if dead:
        with torch.no_grad():
            net[0].bias.fill_(-50)  # no unit is active: gradients would say that nothing is in reach
    model = nn.Sequential(*net, nn.Flatten(), nn.LazyLinear(3)).double()
    x = drawn(2, 2, 20, 22)
    with torch.no_grad():
        shape = net(x).shape
        model(x)
    for place in ((0, 0, 0), (1, 2, 1), (0, shape[2] - 1, shape[3] - 1)):
        seed = torch.zeros(shape, dtype=torch.float64)
        seed[(slice(None), *place)] = 1
        (field,) = receptive_fields(LRP(model.eval()), x, "7", [seed])
        expected = _reached_by_perturbation(net, (2, 20, 22), place)
        assert 4 < int(expected.sum()) < expected.numel()
        for sample in field:
            assert torch.equal(sample.any(0), expected)
            box = bounding_box(sample.any(0))
            assert bool(expected[box].any(0).all())
            assert int(expected[box].sum()) == int(expected.sum())
    assert Reach().label == "Reach()"


class Sideways(nn.Module):
    """A model whose layer ``mid`` has the samples on its second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mid, self.head = nn.Linear(5, 4), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mid(self.first(x).relu().transpose(0, 1))
        return self.head(h.relu().mean(0))


@pytest.mark.parametrize("exclude_parallel", [True, False])
def test_conditions_where_samples_lie_on_another_axis(exclude_parallel: bool) -> None:
    """What a condition holds back is booked to the sample that it comes from."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5).double()
    lrp = LRP(Sideways().double().eval(), "epsilon")
    condition = {"mid": Channels([0, 2], axis=-1)}
    for one in (lrp(x, 1, conditions=condition, exclude_parallel=exclude_parallel), lrp(x, 1)):
        total = one.scores.flatten(1).sum(1) + one.absorbed
        torch.testing.assert_close(total, one.explained, rtol=1e-12, atol=1e-14)
    assert float(one.explained.abs().min()) > 0.01
