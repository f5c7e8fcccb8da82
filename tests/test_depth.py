"""Relevance in the depth of a model: conditions, starts at inner layers, flat from a layer down.

The oracles are slow float64 ones, layer by layer; the stored maps are those of zennit-crp's own tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from conftest import import_torchvision
from test_engine import Net, drawn, out, plain
from test_targets import X, ledger_gap
from torch import Tensor, nn

from pfungst.errors import RelevanceError, SettingError
from pfungst.lrp import LRP, Channels, Preset, Region, Row, Several, Unit, Weights, preset
from pfungst.lrp.rules import Epsilon, Flat, Gamma, WSquare

# ---- conditions: a small network, message by message ------------------------------------------------------------


class Branches(nn.Module):
    """y = head(relu(b(relu(a(x))) + skip(x))): the skip goes round both a and b."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.skip, self.head = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(4, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.a(x))) + self.skip(x)))


EPSILON = 0.01


def by_messages(
    net: Branches, x: Tensor, target: int, keep: dict[str, list[int]], round_too: bool
) -> dict[str, Tensor]:
    """Relevance at x and the layers; ``keep``: the units that hand on; ``round_too``: with what goes round them."""

    def masked(name: str, R: Tensor) -> Tensor:
        if name not in keep:
            return R
        mask = torch.zeros(R.shape[1], dtype=R.dtype)
        mask[keep[name]] = 1
        return R * mask

    def share(layer: nn.Linear, x: Tensor, R: Tensor) -> Tensor:
        return oracles.epsilon(x, layer.weight, layer.bias, R, EPSILON)

    with torch.no_grad():
        h = net.a(x).relu()
        b, s = net.b(h), net.skip(x)
        top = (b + s).relu()
        R_y = torch.zeros(len(x), 3, dtype=x.dtype)
        R_y[:, target] = net.head(top)[:, target]
        R_top = share(net.head, top, R_y)
        R_b = oracles.share(torch.diag_embed(b), b + s, R_top)  # the sum: in proportion to the summands
        R_s = oracles.share(torch.diag_embed(s), b + s, R_top)
        R_b, R_s = masked("b", R_b), masked("skip", R_s)
        R_a = masked("a", share(net.b, h, R_b))
        R_x = share(net.a, x, R_a)
        through_skip = share(net.skip, x, R_s)
        if round_too or "skip" in keep:
            R_x = R_x + through_skip
        return {"x": R_x, "a": R_a, "b": R_b, "skip": R_s}


CONDITIONS: list[tuple[dict[str, Any], dict[str, list[int]]]] = [
    ({"b": 2}, {"b": [2]}),
    ({"a": [1, 4]}, {"a": [1, 4]}),
    ({"a": [0, 1, 2], "b": [1, 3]}, {"a": [0, 1, 2], "b": [1, 3]}),
    ({"b": [1, 3], "a": [0, 1, 2]}, {"a": [0, 1, 2], "b": [1, 3]}),  # in any order
    ({"b": [0], "skip": [2, 3]}, {"b": [0], "skip": [2, 3]}),
    ({"b": []}, {"b": []}),
    ({"a": Channels([5], axis=-1)}, {"a": [5]}),
    ({"b": torch.tensor([True, False, False, True, False])}, {"b": [0, 3]}),
]


@pytest.mark.parametrize("round_too", [False, True])
@pytest.mark.parametrize("number", range(len(CONDITIONS)))
def test_conditions_message_by_message(number: int, round_too: bool) -> None:
    given, keep = CONDITIONS[number]
    net, x = Branches(), drawn(4, 4)
    rules = Preset("test", (Row(Epsilon(EPSILON)),))
    result = LRP(net, rules)(x, 1, conditions=given, layers=["a", "b"], exclude_parallel=not round_too)
    expected = by_messages(net, x, 1, keep, round_too)
    torch.testing.assert_close(result.scores, expected["x"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result.layers["a"], expected["a"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result.layers["b"], expected["b"], rtol=1e-10, atol=1e-12)
    assert ledger_gap(result) < 1e-12
    kept_back = LRP(net, rules)(x, 1, layers=["a", "b"])
    if list(given) == ["b"]:
        for sum_, name in ((kept_back.layers["b"] - expected["b"], "condition:b"),):
            torch.testing.assert_close(result.ledger[name], sum_.sum(1), rtol=1e-9, atol=1e-12)
        if not round_too:
            beside = by_messages(net, x, 1, {}, True)["skip"].sum(1)
            torch.testing.assert_close(result.ledger["beside:b"], beside, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.at("skip"), LRP(net, rules)(
        x, 1, conditions=given, layers=["skip"], exclude_parallel=not round_too
    ).layers["skip"])  # fmt: skip


def test_parts_add_up_to_the_whole() -> None:
    """Over all channels of a layer that every path passes, the conditional maps add up to the map."""
    lrp = LRP(Net(plain))
    whole = lrp(X, 1)
    parts = lrp(X, 1, conditions=[{"first": c} for c in range(4)])
    torch.testing.assert_close(sum(part.scores for part in parts), whole.scores, rtol=1e-9, atol=1e-12)
    assert all(float(part.ledger["beside:first"].abs().max()) < 1e-12 for part in parts)
    crossed = lrp(X, 1, conditions=[{"first": i, "norm": j} for i in range(4) for j in range(4)])
    torch.testing.assert_close(sum(part.scores for part in crossed), whole.scores, rtol=1e-9, atol=1e-12)
    assert float(crossed[1].scores.abs().max()) > 1e-6


def test_masks_of_other_shapes() -> None:
    lrp = LRP(Net(plain))
    one, two = lrp(X, 1, conditions={"norm": 0}), lrp(X, 1, conditions={"norm": 3})
    each = torch.zeros(3, 4)
    each[:, 0], each[1, 0], each[1, 3] = 1, 0, 0.5
    mixed = lrp(X, 1, conditions={"norm": each}).scores
    torch.testing.assert_close(mixed[[0, 2]], one.scores[[0, 2]])
    torch.testing.assert_close(mixed[1], two.scores[1] / 2)
    entries = torch.zeros(4, 6, 6)
    entries[0] = 1
    torch.testing.assert_close(lrp(X, 1, conditions={"norm": entries}).scores, one.scores)
    for wrong in ([4], [-1], torch.ones(7), Channels(0, axis=0)):
        with pytest.raises(SettingError, match="norm"):
            lrp(X, 1, conditions={"norm": wrong})
    with pytest.raises(SettingError, match="no module"):
        lrp(X, 1, conditions={"third": 0})
    with pytest.raises(SettingError, match="several targets or several conditions"):
        lrp(X, Several([0, 1]), conditions=[{"norm": 0}, {"norm": 1}])


def test_a_condition_on_a_layer_changed_in_place_and_on_a_module_used_twice() -> None:
    in_place = lambda n, x: (h := n.first(x), h.relu_(), out(n, n.second(h)))[-1]  # noqa: E731
    pure = lambda n, x: out(n, n.second(n.first(x).relu()))  # noqa: E731
    for conditions in ({"first": [1]}, {"second": [0, 2]}):
        torch.testing.assert_close(
            LRP(Net(in_place))(X, 1, conditions=conditions).scores, LRP(Net(pure))(X, 1, conditions=conditions).scores
        )
    twice = Net(lambda n, x: out(n, n.second(n.second(n.first(x).relu()).relu()).relu()))
    first = LRP(twice)(X, 1, conditions=[{"second": c} for c in range(4)])
    second = LRP(twice)(X, 1, conditions=[{"second:2": c} for c in range(4)])
    assert float((first[0].scores - second[0].scores).abs().max()) > 1e-6
    for parts in (first, second):
        torch.testing.assert_close(sum(p.scores for p in parts), LRP(twice)(X, 1).scores, rtol=1e-9, atol=1e-12)


def test_a_module_that_holds_the_convolution_of_a_merged_norm() -> None:
    """The norm is merged into a convolution inside another module; that module's relevance is not lost."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = Net(plain)
            self.block, self.norm, self.head = nn.Sequential(inner.first), inner.norm, inner.head

        def forward(self, x: Tensor) -> Tensor:
            h = self.block(x)
            return self.head((self.norm(h).relu() + 0.5 * h).mean((2, 3)))  # and by a second way

    net = Wrapped().double().eval()
    result = LRP(net, "epsilon")(X, 1, layers=["block", "block.0"])
    assert torch.equal(result.layers["block"], result.layers["block.0"])
    total = result.layers["block"].sum((1, 2, 3)) + result.ledger["head"]
    merged = result.ledger["block.0"] + result.scores.sum((1, 2, 3))
    torch.testing.assert_close(result.layers["block"].sum((1, 2, 3)), merged, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(total, result.explained, rtol=1e-9, atol=1e-12)
    parts = LRP(net, "epsilon")(X, 1, conditions=[{"block": c} for c in range(4)])
    torch.testing.assert_close(sum(p.scores for p in parts), result.scores, rtol=1e-9, atol=1e-12)


# ---- stored maps of zennit-crp ----------------------------------------------------------------------------------


class Fashion(nn.Module):
    """The network of zennit-crp's tests."""

    def __init__(self) -> None:
        super().__init__()
        self.parallel = nn.Sequential(nn.Conv2d(1, 16, 5, stride=2, bias=False), nn.BatchNorm2d(16))
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, stride=2), nn.BatchNorm2d(16)
        self.linear1, self.linear2 = nn.Linear(576, 120), nn.Linear(120, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        h = torch.stack([self.parallel(x), h], -1).sum(-1)
        h = nn.functional.max_pool2d(torch.relu(h), 2).flatten(1)
        return self.linear2(torch.relu(self.linear1(h)))


@pytest.fixture(scope="module")
def fashion(data_root: Path) -> tuple[Fashion, Tensor, int, Path]:
    from safetensors.torch import load_file

    root = data_root / "fashionmnist-zennit-crp"
    model = Fashion().eval()
    model.load_state_dict(load_file(root / "fashion_cnn.safetensors"))
    data = np.load(root / "fashion_val.npz")
    return model.double(), torch.from_numpy(data["val_set"][:1])[:, None] / 255.0, int(data["targets"][0]), root


def _near(ours: Tensor, theirs: np.ndarray) -> None:
    """Within what zennit's stabilisers of 1e-6 in z+, sums and pooling do; measured, they make 2e-5 to 5e-5."""
    scale = np.abs(theirs).max()
    assert scale > 0
    assert float(np.abs(ours.numpy() - theirs).max() / scale) < 1e-4


@pytest.mark.data
def test_conditional_maps_of_zennit_crp(fashion: Any) -> None:
    model, x, target, root = fashion
    maps, layers = (np.load(root / f"{name}.npz")[name] for name in ("heatmaps", "conv1_relevances"))
    conditions = [{}, {"conv2": []}, {"conv2": [2]}, {"parallel.0": []}, {"parallel.0": [], "conv2": [3, 2, 1]}]
    lrp = LRP(model)
    results = lrp(x.double(), target, layers=["conv1"], conditions=conditions, exclude_parallel=False)
    for number, result in enumerate(results):
        _near(result.scores[0, 0], maps[number])
        if number == 1:  # nothing passes conv2
            assert not result.layers["conv1"].any()
            assert not layers[number].any()
        else:
            _near(result.layers["conv1"][0], layers[number])
        assert ledger_gap(result) < 1e-12
    through = lrp(x.double(), target, layers=["conv1"], conditions={"conv2": [3, 2, 1]})
    _near(through.scores[0, 0], maps[4])
    _near(through.layers["conv1"][0], layers[4])


@pytest.mark.data
def test_maps_of_every_channel_of_zennit_crp(fashion: Any) -> None:
    model, x, target, root = fashion
    maps = np.load(root / "gen_heatmaps.npz")["heatmaps"]
    layers = np.load(root / "gen_conv1_relevances.npz")["conv1_relevances"]
    results = LRP(model)(x.double(), target, layers=["conv1"], conditions=[{"conv2": c} for c in range(16)])
    _near(torch.stack([r.scores[0, 0] for r in results]), maps)
    _near(torch.stack([r.layers["conv1"][0] for r in results]), layers)


# ---- starts at inner layers --------------------------------------------------------------------------------------


def _until(layer: str) -> Any:
    """``plain`` cut off behind a layer: its output is explained by another way."""
    return {
        "first": lambda n, x: n.first(x),
        "second": lambda n, x: n.norm(n.second(n.first(x).relu())),  # with its norm
        "norm": lambda n, x: n.norm(n.second(n.first(x).relu())),
        "relu": lambda n, x: n.norm(n.second(n.first(x).relu())).relu(),
    }[layer]


@pytest.mark.parametrize("layer", ["first", "second", "norm", "relu"])
def test_starts_at_inner_layers(layer: str) -> None:
    lrp, cut = LRP(Net(plain)), LRP(Net(_until(layer)))
    direction, mask = drawn(4, 6, 6, seed=8), drawn(6, 6, seed=9) > 0
    for ours, other in (
        (2, Region(2)),
        (None, Region(None)),
        ([0, 3, 1], Region([0, 3, 1])),
        (Unit((1, 2, 3)), Unit((1, 2, 3))),
        (Weights(direction), Weights(direction)),
        (Region(1, mask), Region(1, mask)),
    ):
        result, expected = lrp(X, ours, start=layer), cut(X, other)
        torch.testing.assert_close(result.scores, expected.scores, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(result.explained, expected.explained)
        assert ledger_gap(result) < 1e-12
    at = lrp(X, 2, start="relu", layers=["first"], conditions={"first": [1]})
    every = [lrp(X, 2, start="relu", conditions={"first": [c]}).scores for c in range(4)]
    torch.testing.assert_close(sum(every), lrp(X, 2, start="relu").scores, rtol=1e-9, atol=1e-12)
    assert not at.layers["first"][:, [0, 2, 3]].any()


def test_layers_before_the_first_linear_node_hold_relevance_itself() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.net = nn.Identity(), Net(plain)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.scale((x - 0.3) / 2))

    result = LRP(Scaled())(X, 1, layers=["scale"])
    assert torch.equal(result.layers["scale"], result.scores)


# ---- flat from a layer down --------------------------------------------------------------------------------------


def _sequence() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.GELU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 3),
    ).double().eval()  # fmt: skip


@pytest.mark.parametrize("rule", [Flat(), WSquare()], ids=["flat", "w2"])
@pytest.mark.parametrize("layer", ["0", "1", "2", "3", "4", "5", "6"])
def test_flat_until_a_layer_node_by_node(rule: Any, layer: str) -> None:
    """The rest of the net explained on its own, and its relevance handed down by the oracles."""
    net, x = _sequence(), drawn(2, 2, 7, 7)
    values = [x]
    with torch.no_grad():
        for module in net:
            values.append(module(values[-1]))
    end = int(layer) + 1
    end = 2 if end == 1 else end  # the norm is merged into the convolution
    upper = Preset("upper", (Row(Gamma(0.25)),))
    R = LRP(nn.Sequential(*net[end:]), upper)(values[end], 2).scores.flatten(1)
    for number in reversed(range(end)):
        module, shape = net[number], values[number].shape[1:]
        if isinstance(module, nn.Conv2d):
            if rule == Flat():
                R = oracles.flat(values[number], oracles.reach(module, shape), R)
            else:  # with the norm that is merged into it
                node = nn.Sequential(module, net[1]) if number == 0 else module
                R = oracles.w_square(values[number], oracles.matrix(node, shape)[0], R)
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            mean = nn.AvgPool2d(2)
            J = (oracles.matrix(mean, tuple(shape))[0] != 0).double()
            R = oracles.flat(values[number], J, R)
    result = LRP(net, upper.flat_until(layer, rule))(x, 2)
    torch.testing.assert_close(result.scores.flatten(1), R, rtol=1e-9, atol=1e-12)
    assert ledger_gap(result) < 1e-12
    assert torch.equal(result.output, values[-1])


def test_flat_until_a_layer_of_a_net_with_branches() -> None:
    """Half of a sum's relevance to each summand, and nothing of it lost."""
    body = lambda n, x: (h := n.first(x).relu(), out(n, n.relu(n.norm(n.second(h)) + h)))[-1]  # noqa: E731
    net = Net(body)
    result = LRP(net, preset("epsilon").flat_until("relu"))(X, 1, layers=["first", "second", "relu"])
    R = result.layers["relu"]
    torch.testing.assert_close(result.layers["second"], R / 2)
    module = nn.Conv2d(4, 4, 3, padding=1).double()
    flat = oracles.flat(torch.zeros(3, 4, 6, 6), oracles.reach(module, (4, 6, 6)), (R / 2).flatten(1)).reshape(
        3, 4, 6, 6
    )
    torch.testing.assert_close(result.layers["first"], flat + R / 2, rtol=1e-9, atol=1e-12)
    assert ledger_gap(result) < 1e-12


@pytest.mark.parametrize(("name", "layer"), [("resnet18", "layer2"), ("densenet121", "features.denseblock1")])
def test_flat_until_in_real_models(name: str, layer: str) -> None:
    torch.manual_seed(0)
    model = getattr(import_torchvision().models, name)(weights=None, num_classes=10).double().eval()
    x = drawn(1, 3, 48, 48)
    with torch.no_grad():
        y = model(x)
    result = LRP(model, preset("epsilon-plus").flat_until(layer))(x, 1, layers=[layer])
    assert torch.equal(result.output, y)
    assert ledger_gap(result) < 1e-12
    # Nothing is absorbed in the region: no biases, and padding gets none.
    torch.testing.assert_close(result.layers[layer].sum((1, 2, 3)), result.scores.sum((1, 2, 3)), rtol=1e-9, atol=0)
    whole = LRP(model, "epsilon-plus")(x, 1, layers=[layer])
    torch.testing.assert_close(result.layers[layer], whole.layers[layer], rtol=1e-9, atol=1e-15)


def test_flat_until_where_it_cannot_be() -> None:
    with pytest.raises(SettingError, match="'third': no layer"):
        LRP(Net(plain), preset("epsilon").flat_until("third"))(X)
    pooled = Net(lambda n, x: out(n, n.second(n.first(x).amax(3, keepdim=True).expand(-1, -1, -1, 6))))
    with pytest.raises(RelevanceError, match="'amax', after node 'first' has no even share"):
        LRP(pooled, preset("epsilon").flat_until("second"))(X)
    with pytest.raises(SettingError, match=r"Flat\(\) or WSquare"):
        preset("epsilon").flat_until("second", Gamma())
    assert preset("epsilon").flat_until("a").describe() != preset("epsilon").flat_until("b").describe()
