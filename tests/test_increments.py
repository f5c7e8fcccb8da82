"""Small changes followed through models, step by step, against whole passes in double precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pfungst import increments
from pfungst.increments import Answers, plan_increments


class Block(nn.Module):
    """A residual block with everything in place, as torchvision writes it."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.down = nn.Conv2d(channels, out, 1, stride, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.down(x)
        return self.relu(out)


class Body(nn.Module):
    """A model whose forward pass is a function of its layers and the input."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def head(channels: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def fire(m: Any, x: Tensor) -> Tensor:
    x = functional.relu(m.squeeze(x), inplace=True)
    return m.head(torch.cat([functional.relu(m.one(x)), m.three(x).relu_()], 1))


def dense(m: Any, x: Tensor) -> Tensor:
    parts = [m.first(x)]
    for layer in (m.second, m.third):
        parts.append(layer(torch.cat(parts, dim=1)))
    return m.head(torch.cat(parts, dim=-3))


def gated(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    gate = torch.sigmoid(m.gate(x.mean((2, 3), keepdim=True)))
    return m.head(m.second(x * gate + 0.1 * x))


def shuffled(m: Any, x: Tensor) -> Tensor:
    left, right = m.first(x).chunk(2, dim=1)
    both = torch.cat([left, m.second(right)], dim=1)
    n, c, h, w = both.shape
    return m.head(both.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


def normalised(m: Any, x: Tensor) -> Tensor:
    return m.head(1 - m.first((x - m.mean.weight.view(3, 1, 1)) / 2))


def leaves(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    return m.head(m.second(functional.pad(x, (1, 2, 0, 1))))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 5, 2, 3), nn.LeakyReLU(inplace=True), nn.Conv2d(6, 6, 3, padding="same", groups=3, dilation=2),
        nn.SiLU(), nn.Conv2d(6, 4, (1, 3), (2, 1), padding="valid"), nn.Hardswish(inplace=True), head(4)
    ),
    "pools": lambda: nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.MaxPool2d(3, 2, ceil_mode=True), nn.Conv2d(5, 5, 3, padding=1), nn.MaxPool2d(3, 1, 1),
        nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(2, 2, 1, count_include_pad=False), nn.ReLU6(), nn.MaxPool2d(2), head(5)
    ),
    "residual": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 7, 2, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1), Block(4, 4, 1),
        Block(4, 6, 2), head(6)
    ),
    "fire": lambda: Body(fire, squeeze=nn.Conv2d(3, 4, 1), one=nn.Conv2d(4, 3, 1), three=nn.Conv2d(4, 3, 3, padding=1),
                         head=head(6)),
    "dense": lambda: Body(dense, first=nn.Conv2d(3, 4, 3, padding=1), second=nn.Conv2d(4, 3, 3, padding=1),
                          third=nn.Sequential(nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 2, 3, padding=1)),
                          head=head(9)),
    "gated": lambda: Body(gated, first=nn.Conv2d(3, 4, 3), gate=nn.Conv2d(4, 4, 1), second=nn.Conv2d(4, 4, 3),
                          head=head(4)),
    "shuffled": lambda: Body(shuffled, first=nn.Conv2d(3, 6, 3), second=nn.Conv2d(3, 3, 3, padding=1), head=head(6)),
    "normalised": lambda: Body(normalised, first=nn.Conv2d(3, 4, 3), mean=nn.Linear(1, 3), head=head(4)),
    "padded": lambda: Body(leaves, first=nn.Conv2d(3, 4, 3), second=nn.Conv2d(4, 4, 3), head=head(4)),
    "dropout": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout2d(), nn.PReLU(4), nn.GroupNorm(2, 4), head(4)),
    "flat": lambda: nn.Sequential(nn.Conv2d(3, 2, 3, 2), nn.GELU(), nn.Flatten(), nn.Linear(2 * 18 * 20, 5)),
}  # fmt: skip


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("side", [(1, 1), (4, 3), (7, 9)])
@pytest.mark.parametrize("name", list(MODELS))
def test_each_step_says_what_a_whole_pass_says(name: str, side: tuple[int, int], monkeypatch: Any) -> None:
    monkeypatch.setattr(increments, "WORTH", 10)
    model = make(name)
    x = torch.randn(3, 3, 37, 41, dtype=torch.double)
    plan = plan_increments(model, x[:1], *side)
    assert plan is not None
    before = x.clone()
    answers = Answers(model, x, plan)
    torch.testing.assert_close(answers.outputs, model(x).detach(), rtol=1e-10, atol=1e-12)
    rng = np.random.default_rng(0)
    now = x.clone()
    for _ in range(25):
        tops, lefts = (rng.integers(0, size - s + 1, 3) for size, s in zip((37, 41), side, strict=True))
        patch = torch.randn(3, 3, *side, dtype=torch.double)
        for i in range(3):
            now[i, :, tops[i] : tops[i] + side[0], lefts[i] : lefts[i] + side[1]] = patch[i]
        found = answers.change(patch, tops, lefts)
        torch.testing.assert_close(found, model(now).detach(), rtol=1e-10, atol=1e-12)
    assert answers.lost == ""
    assert torch.equal(answers.pictures, now)
    assert torch.equal(x, before)


def test_a_part_of_the_work_is_done() -> None:
    """A 3 x 3 region of 37 x 41 pixels reaches 7 x 7 of them through two convolutions; the dense layer sees all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), head(8)).eval()
    plan = plan_increments(model, torch.randn(1, 3, 37, 41), 3, 3)
    assert plan is not None
    first, second, relu = (27 + 50) * 8, (72 + 50) * 8, 50 * 8
    tail = 50 * (8 + 8) + (8 + 50) * 5
    part = 25 * (first + relu) + 49 * second + tail
    assert plan.work == 37 * 41 * (first + relu + second) + tail
    assert plan.share == pytest.approx(part / plan.work)
    assert plan.pays(16)
    assert not plan.pays(1)  # too small a model: its calls would take longer than its work
    assert plan.kept == {0, 2, 3}  # the pictures, and what the second convolution and the head need around the change


def test_the_same_layer_is_kept_up_to_date_at_every_step() -> None:
    """Whether a layer needs more than the change of another depends on the place; what it then finds is of now."""
    model = make("residual")
    x = torch.randn(1, 3, 96, 96, dtype=torch.double)
    plan = plan_increments(model, x, 9, 9)
    assert plan is not None
    answers, now = Answers(model, x, plan), x.clone()
    for top, left in [(43, 43), (0, 0), (87, 0), (1, 2), (86, 87), (43, 44)]:
        now[:, :, top : top + 9, left : left + 9] = -3
        found = answers.change(now.new_full((1, 3, 9, 9), -3), np.array([top]), np.array([left]))
        torch.testing.assert_close(found, model(now).detach(), rtol=1e-10, atol=1e-12)


def test_what_is_needed_later_than_planned_is_kept_from_then_on() -> None:
    model = make("residual")
    x = torch.randn(3, 3, 96, 96, dtype=torch.double)
    plan = plan_increments(model, x[:1], 9, 9)
    assert plan is not None
    answers, now = Answers(model, x, replace(plan, kept=frozenset())), x.clone()
    for top in range(0, 80, 8):
        now[:, :, top : top + 9, 3:12] = -3
        found = answers.change(now.new_full((3, 3, 9, 9), -3), np.full(3, top), np.full(3, 3))
        torch.testing.assert_close(found, model(now).detach(), rtol=1e-10, atol=1e-12)
    assert answers.lost == ""
    assert answers.plan is not None
    assert 3 < len(answers.plan.kept) <= len(plan.kept)


def writes(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    x[:, 0] = 0
    return m.head(x)


def views(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    x.view(len(x), -1).mul_(2)
    return m.head(x)


def branches(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    return m.head(x.relu() if x.mean().item() > m.limit.eps else x.sigmoid().neg())


@pytest.mark.parametrize("forward", [writes, views], ids=lambda one: one.__name__)
def test_what_cannot_be_followed_is_noticed_before(forward: Any) -> None:
    torch.manual_seed(0)
    model = Body(forward, first=nn.Conv2d(3, 4, 3), head=head(4)).eval()
    assert plan_increments(model, torch.randn(1, 3, 32, 32), 2, 2) is None


def test_a_model_that_takes_another_way_is_asked_as_a_whole() -> None:
    torch.manual_seed(0)
    model = Body(branches, first=nn.Conv2d(3, 4, 3), limit=nn.BatchNorm2d(4), head=head(4)).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.double)
    with torch.no_grad():
        model.limit.eps = float(model.first(x).mean()) - 0.05
    plan = plan_increments(model, x[:1], 8, 8)
    assert plan is not None
    answers, now = Answers(model, x, plan), x.clone()
    for step in range(4):
        now[:, :, :8, 8 * step : 8 * step + 8] = 3 * (-3) ** step
        patch = now[:, :, :8, 8 * step : 8 * step + 8].clone()
        found = answers.change(patch, np.zeros(2, int), np.full(2, 8 * step))
        torch.testing.assert_close(found, model(now).detach(), rtol=1e-10, atol=1e-12)
    assert "call" in answers.lost


def test_a_transformer_and_a_region_that_reaches_all_are_not_worth_it() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = Body(lambda m, x: m.head(m.layer(m.first(x).flatten(2).transpose(1, 2)).mean(1)),
                 first=nn.Conv2d(3, 8, 4, 4), layer=layer, head=nn.Linear(8, 3)).eval()  # fmt: skip
    assert plan_increments(model, torch.randn(1, 3, 32, 32), 4, 4) is None
    deep = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(12)), head(3)).eval()
    assert plan_increments(deep, torch.randn(1, 3, 24, 24), 12, 12) is None
    assert plan_increments(deep, torch.randn(1, 3, 24, 24), 25, 1) is None
