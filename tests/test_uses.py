"""How the engine is used: several inputs and outputs, tokens, loaders, Captum, Quantus."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import import_torchvision
from test_engine import Net, drawn, out, plain
from test_targets import X, ledger_gap
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pfungst
from pfungst.errors import DataError, SettingError
from pfungst.lrp import LRP, Margin, Preset, Row, Unit, quantus_explain
from pfungst.lrp.rules import ZBox, ZPlus

# ---- several inputs ----------------------------------------------------------------------------------------------


class Two(nn.Module):
    """A picture and a vector, joined; ``gain`` is a constant."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.conv, self.side, self.head = nn.Conv2d(3, 4, 3), nn.Linear(7, 4), nn.Linear(8, 5)
        self.double().eval()

    def forward(self, pixels: Tensor, vector: Tensor, *, gain: Tensor | float = 1.0, flag: bool = True) -> Tensor:
        h = torch.cat([self.conv(pixels).relu().mean((2, 3)), self.side(vector).relu()], 1)
        return self.head(h * gain) if flag else h


class Joined(nn.Module):
    """The same as a model of one input, cut in two inside."""

    def __init__(self, two: Two) -> None:
        super().__init__()
        self.two = two

    def forward(self, x: Tensor) -> Tensor:
        return self.two(x[:, :108].reshape(-1, 3, 6, 6), x[:, 108:])


VECTOR = drawn(3, 7, seed=5)


def test_tuples_and_dicts_of_inputs() -> None:
    two = Two()
    joined = LRP(Joined(two))(torch.cat([X.flatten(1), VECTOR], 1), 1).scores
    pixels, vector = joined[:, :108].reshape(3, 3, 6, 6), joined[:, 108:]
    for x in ((X, VECTOR), {"pixels": X, "vector": VECTOR}, {"vector": VECTOR, "pixels": X, "flag": True}):
        result = LRP(two)(x, 1)
        found = result.scores if isinstance(x, tuple) else (result.scores["pixels"], result.scores["vector"])
        torch.testing.assert_close(found[0], pixels)
        torch.testing.assert_close(found[1], vector)
        assert ledger_gap(result, list(found)) < 1e-12
        with torch.no_grad():
            assert torch.equal(result.output, two(X, VECTOR))
        assert "absorbs" in str(LRP(two).plan(x))
        assert torch.equal(result.at("conv"), LRP(two)(x, 1, layers=["conv"]).layers["conv"])


def test_inputs_chosen_by_name() -> None:
    two = Two()
    both = LRP(two)((X, VECTOR), 1).scores
    for x in ((X, VECTOR), {"pixels": X, "vector": VECTOR}):
        one = LRP(two, inputs="vector")(x, 1)
        torch.testing.assert_close(one.scores, both[1])
        pair = LRP(two, inputs=("vector", "pixels"))(x, 1)
        assert list(pair.scores) == ["vector", "pixels"]
        torch.testing.assert_close(pair.scores["pixels"], both[0])
        assert ledger_gap(pair, list(pair.scores.values())) < 1e-12
        # What was not chosen is a constant, which absorbs its part: the ledger closes all the same.
        assert ledger_gap(one) < 1e-12
    for unknown in ("voxels", ("pixels", "voxels"), ()):
        with pytest.raises(SettingError, match=r"inputs(.|\n)*'pixels', 'vector'"):
            LRP(two, inputs=unknown)((X, VECTOR), 1)
    with pytest.raises(SettingError, match=r"'flag' is|no tensor and no module 'flag'"):
        LRP(two, inputs="flag")({"pixels": X, "vector": VECTOR, "flag": True}, 1)


def test_constants_among_the_inputs() -> None:
    """Integers, numbers and tensors without a row for each sample go through as they are."""
    two = Two()
    gain = torch.linspace(0.5, 2, 8, dtype=torch.float64)
    result = LRP(two)({"pixels": X, "vector": VECTOR, "gain": gain}, 1)
    assert sorted(result.scores) == ["pixels", "vector"]
    assert ledger_gap(result, list(result.scores.values())) < 1e-12
    with torch.no_grad():
        assert torch.equal(result.output, two(X, VECTOR, gain=gain))
    placed = Net(lambda n, x: out(n, n.first(x[0])[:, x[1]][:, [0, 1, 2, 0]]))
    placed.forward = lambda x, which: placed.body(placed, (x, which))  # type: ignore[method-assign]
    scores = LRP(placed)((X, torch.tensor([2, 0, 1])), 1).scores
    assert scores[1] is None
    assert bool(scores[0].any())


def test_bounds_for_each_input() -> None:
    rules = Preset("box", (Row(ZBox(), position="input"), Row(ZPlus())))
    two = Two()
    found = LRP(two, rules, bounds={"pixels": (-6, 6), "vector": (-4, 4)})((X, VECTOR), 1)
    same = LRP(Joined(two), rules, bounds=(
        torch.tensor([-6.0] * 108 + [-4.0] * 7), torch.tensor([6.0] * 108 + [4.0] * 7)
    ))(torch.cat([X.flatten(1), VECTOR], 1), 1).scores  # fmt: skip
    torch.testing.assert_close(torch.cat([s.flatten(1) for s in found.scores], 1), same)


class Words(nn.Module):
    """Tokens, embedded twice by one table, and a classifier over the mean."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embedding, self.hidden, self.head = nn.Embedding(20, 6), nn.Linear(6, 8), nn.Linear(8, 3)
        self.double().eval()

    def forward(self, tokens: Tensor, pair: Tensor | None = None) -> dict[str, Tensor]:
        h = self.tail(self.embedding(tokens))
        if pair is not None:
            h = h - self.tail(self.embedding(pair)) / 2
        return {"logits": h, "tokens": tokens}

    def tail(self, embedded: Tensor) -> Tensor:
        return self.head(self.hidden(embedded).relu().mean(1))


TOKENS = torch.tensor([[3, 5, 3, 19], [0, 1, 2, 7]])


def test_relevance_of_tokens_ends_at_their_embeddings() -> None:
    words = Words()
    with torch.no_grad():
        embedded = words.embedding(TOKENS)
    expected = LRP(words.tail, "epsilon-plus-flat")(embedded, 1)
    for x in (TOKENS, (TOKENS,), {"tokens": TOKENS}):
        result = LRP(words, "epsilon-plus-flat", inputs="embedding")(x, 1)
        torch.testing.assert_close(result.scores, expected.scores)
        assert result.scores.shape == (2, 4, 6)
        assert ledger_gap(result) < 1e-12
    planned = str(LRP(words, inputs="embedding").plan(TOKENS))
    assert "hidden" in planned
    with pytest.raises(SettingError, match="name the module that embeds"):
        LRP(words)(TOKENS)
    with pytest.raises(SettingError, match="name the module that embeds"):
        LRP(words)({"tokens": TOKENS})
    with pytest.raises(SettingError, match=r"the input is \(2, 4\)"):
        LRP(words, inputs="tokens")(TOKENS)
    with pytest.raises(SettingError, match="only floating-point tensors"):
        LRP(words, inputs=("tokens", "embedding"))({"tokens": TOKENS})
    with pytest.raises(SettingError, match="'embedding:2' ran"):
        LRP(words, inputs=("embedding", "embedding:2"))(TOKENS)


def test_a_module_that_embeds_twice() -> None:
    words, pair = Words(), TOKENS.flip(0)
    result = LRP(words, "epsilon", inputs=("embedding", "embedding:2"))((TOKENS, pair), 1)
    assert ledger_gap(result, list(result.scores.values())) < 1e-9
    with torch.no_grad():
        first, second = words.embedding(TOKENS), words.embedding(pair)
    whole = LRP(lambda a, b: words.tail(a) - words.tail(b) / 2, "epsilon")((first, second), 1)
    torch.testing.assert_close(result.scores["embedding"], whole.scores[0])
    torch.testing.assert_close(result.scores["embedding:2"], whole.scores[1])
    only = LRP(words, "epsilon", inputs="embedding")((TOKENS, pair), 1)
    torch.testing.assert_close(only.scores, whole.scores[0])


def test_relevance_that_ends_at_an_inner_layer_is_that_of_at() -> None:
    net = Net(plain)
    inner = LRP(net, inputs="first")(X, 1)
    whole = LRP(net)(X, 1)
    torch.testing.assert_close(inner.scores, whole.at("first"))
    assert ledger_gap(inner) < 1e-12


# ---- loaders -----------------------------------------------------------------------------------------------------

LABELS = torch.tensor([4, 0, 2, 2, 1, 3, 0])
MANY = drawn(7, 3, 6, 6, seed=11)


def test_a_loader_in_and_results_out() -> None:
    lrp = LRP(Net(plain))
    loader = DataLoader(TensorDataset(MANY, LABELS), batch_size=3)
    results = list(lrp.stream(loader, "label"))
    assert [len(r.scores) for r in results] == [3, 3, 1]
    torch.testing.assert_close(torch.cat([r.scores for r in results]), lrp(MANY, LABELS).scores)
    torch.testing.assert_close(
        torch.cat([r.scores for r in lrp.stream(MANY.split(4), Margin(1))]), lrp(MANY, Margin(1)).scores
    )
    first = next(iter(lrp.stream(loader, layers=["first"], conditions={"first": 0})))
    assert torch.equal(first.layers["first"], lrp(MANY[:3], layers=["first"], conditions={"first": 0}).layers["first"])
    own = lrp.stream([{"image": MANY, "y": LABELS}], "label", split=lambda batch: (batch["image"], batch["y"]))
    torch.testing.assert_close(next(own).scores, lrp(MANY, LABELS).scores)
    two = next(LRP(Two()).stream([[[X, VECTOR], torch.tensor([0, 1, 2])]], "label"))
    torch.testing.assert_close(two.scores[1], LRP(Two())((X, VECTOR), [0, 1, 2]).scores[1])
    with pytest.raises(SettingError, match="no labels"):
        next(lrp.stream([MANY], "label"))
    with pytest.raises(SettingError, match="'label'"):
        next(lrp.stream([MANY], "class"))
    with pytest.raises(DataError, match="split="):
        next(lrp.stream([(MANY, LABELS, LABELS)]))


def test_a_stream_reads_one_batch_ahead_of_nothing() -> None:
    read: list[int] = []

    def endless() -> Iterator[Tensor]:
        for number in range(10**9):
            read.append(number)
            yield X

    stream = LRP(Net(plain)).stream(endless())
    for number in range(3):
        next(stream)
        assert len(read) == number + 1


# ---- Captum and Quantus ------------------------------------------------------------------------------------------


def test_attribute_is_called_as_captums_is() -> None:
    lrp = LRP(Net(plain))
    result = lrp(X, 2)
    assert torch.equal(lrp.attribute(X, 2), result.scores)
    assert torch.equal(lrp.attribute(inputs=X, target=torch.tensor([2, 2, 2])), result.scores)
    (only,) = lrp.attribute((X,), target=2)
    assert torch.equal(only, result.scores)
    scores, delta = lrp.attribute(X, target=2, return_convergence_delta=True)
    torch.testing.assert_close(delta, scores.sum((1, 2, 3)) - result.explained)
    two = LRP(Two())
    both = two((X, VECTOR), 1).scores
    first, second = two.attribute((X, VECTOR), target=1)
    assert torch.equal(first, both[0])
    assert torch.equal(second, both[1])
    torch.testing.assert_close(two.attribute(X, target=1, additional_forward_args=VECTOR), both[0])
    (part,) = two.attribute((X,), target=1, additional_forward_args=(VECTOR,))
    torch.testing.assert_close(part, both[0])
    dense = LRP(Net(lambda n, x: n.first(x)))
    assert torch.equal(dense.attribute(X, target=(1, 2, 3)), dense(X, Unit((1, 2, 3))).scores)
    places = [(1, 2, 3), (0, 0, 0), (3, 5, 5)]
    assert torch.equal(dense.attribute(X, target=places), dense(X, Unit(torch.tensor(places))).scores)


def test_captum_takes_it_for_one_of_its_own() -> None:
    attr = pytest.importorskip("captum.attr", reason="captum is not installed")
    metrics = pytest.importorskip("captum.metrics")
    net = Net(plain)
    lrp = LRP(net, "epsilon")
    tunnel = attr.NoiseTunnel(lrp)
    smooth, delta = tunnel.attribute(X, nt_samples=3, stdevs=0.0, target=2, return_convergence_delta=True)
    torch.testing.assert_close(smooth, lrp(X, 2).scores)
    assert delta.shape == (9,)
    two = LRP(Two())
    both = attr.NoiseTunnel(two).attribute((X, VECTOR), nt_samples=2, stdevs=0.0, target=1)
    torch.testing.assert_close(both[1], two((X, VECTOR), 1).scores[1])
    assert metrics.sensitivity_max(lrp.attribute, X, target=2, n_perturb_samples=2).shape == (3,)

    def perturb(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(x, 1e-4), x - 1e-4

    # A linear model's relevance predicts every change exactly.
    linear = nn.Sequential(nn.Flatten(), nn.Linear(108, 4, bias=False)).double()
    scores = LRP(linear, Preset("zero", (Row(pfungst_zero()),))).attribute(X, target=1) / X
    error = metrics.infidelity(linear, perturb, X, scores, target=1)
    assert float(error.max()) < 1e-20


def pfungst_zero() -> Any:
    from pfungst.lrp.rules import Epsilon

    return Epsilon(0.0)


def test_quantus_takes_it_for_an_explainer() -> None:
    import_torchvision()
    quantus = pytest.importorskip("quantus", reason="quantus is not installed")
    net = Net(plain).float()
    x = X.float().numpy()
    y = np.array([2, 0, 1])
    settings = {"preset": "epsilon-alpha2-beta1"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flips = quantus.PixelFlipping(features_in_step=9, disable_warnings=True)
        shared: dict[str, Any] = {"model": net, "x_batch": x, "y_batch": y, "device": "cpu"}
        called = flips(**shared, explain_func=quantus_explain, explain_func_kwargs=dict(settings))
        given = flips(**shared, a_batch=LRP(net, **settings)(X.float(), torch.from_numpy(y)).scores.numpy())
        np.testing.assert_allclose(called, given)
        randomised = quantus.MPRT(disable_warnings=True)(
            **shared, explain_func=quantus_explain, explain_func_kwargs=dict(settings)
        )
    assert len(randomised) >= 3  # it explained its own copies of the model


def test_quantus_explain() -> None:
    net = Net(plain)
    scores = quantus_explain(net, X.numpy(), np.array([2, 0, 1]), preset="epsilon")
    assert isinstance(scores, np.ndarray)
    np.testing.assert_array_equal(scores, LRP(net, "epsilon")(X, [2, 0, 1]).scores.numpy())
    assert quantus_explain(net.float(), X.numpy(), [2, 0, 1]).dtype == np.float32
    with pytest.raises(TypeError, match="presett"):
        quantus_explain(net, X.numpy(), [2, 0, 1], presett="epsilon")
    assert pfungst.quantus_explain is quantus_explain
