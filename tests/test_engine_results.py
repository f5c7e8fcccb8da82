"""What a caller of the engine sees: results, targets, layers, plan, errors; and a model that is left as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_engine import Net, drawn, gap, out, plain
from torch import Tensor, nn
from torch.nn import functional as F

from pfungst.errors import PfungstError, RelevanceError, SettingError, UnknownFunction
from pfungst.lrp import LRP, Preset, Row, preset
from pfungst.lrp.rules import AlphaBeta, Epsilon, Flat, Gamma, ZBox, ZPlus

X = drawn(3, 3, 6, 6)


# ---- results -----------------------------------------------------------------------------------------------------


def test_targets() -> None:
    lrp = LRP(Net(plain))
    greatest = lrp(X)
    assert torch.equal(greatest.target, greatest.output.argmax(1))
    torch.testing.assert_close(greatest.explained, greatest.output.amax(1))
    one = lrp(X, 2).scores
    for same in ([2, 2, 2], torch.tensor([2, 2, 2]), torch.tensor(2), (2, 2, 2)):
        assert torch.equal(lrp(X, same).scores, one)
    mixed = lrp(X, [0, 2, 4]).scores
    for sample, target in enumerate((0, 2, 4)):
        torch.testing.assert_close(mixed[sample], lrp(X, target).scores[sample])
    assert torch.equal(lrp.attribute(X, 2), one)
    for bad in (5, -1, [0, 1], [0, 1, 9], 1.5, torch.tensor([True, False, True])):
        with pytest.raises(SettingError):
            lrp(X, bad)  # type: ignore[arg-type]


def test_several_targets_from_one_trace() -> None:
    lrp = LRP(Net(plain), "epsilon-alpha2-beta1")
    trace = lrp.trace(X)
    for target in (0, 3, 0):
        result = trace.relevance(target)
        single = lrp(X, target)
        assert torch.equal(result.scores, single.scores)
        assert torch.equal(result.absorbed, single.absorbed)


def test_a_map_does_not_depend_on_the_other_samples() -> None:
    lrp = LRP(Net(plain))
    together = lrp(X, 1)
    for i in range(len(X)):
        alone = lrp(X[i : i + 1], 1)
        torch.testing.assert_close(together.scores[i : i + 1], alone.scores, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(together.absorbed[i : i + 1], alone.absorbed, rtol=1e-10, atol=1e-13)
    other = LRP(Net(plain))(torch.cat([X[:1], 100 * X[1:]]), 1)
    torch.testing.assert_close(other.scores[:1], together.scores[:1], rtol=1e-10, atol=1e-13)


def _tail(net: Net, after: str) -> Callable[[Tensor], Tensor]:
    """The rest of ``plain`` behind a layer."""
    return {
        "first": lambda h: out(net, net.norm(net.second(h.relu())).relu()),
        "second": lambda h: out(net, h.relu()),  # the norm is merged: what is behind it
        "norm": lambda h: out(net, h.relu()),
        "relu": lambda h: out(net, h),
    }[after]


@pytest.mark.parametrize("layer", ["first", "second", "norm", "relu", "head"])
def test_relevance_at_layers(layer: str) -> None:
    net = Net(plain)
    with torch.no_grad():
        first = net.first(X)
        norm = net.norm(net.second(first.relu()))
    value = {"first": first, "second": norm, "norm": norm, "relu": norm.relu(), "head": None}[layer]
    result = LRP(net)(X, 1, layers=[layer])
    at = result.at(layer)
    if value is None:
        assert torch.equal(at[:, 1], result.explained)
        assert float(at.sum()) == float(result.explained.sum())
        return
    # Another way: relevance of the tail of the model, whose input is that layer's output.  Pass through ReLU.
    tail = Preset("tail", (Row(Epsilon(), "dense"), Row(ZPlus())))
    expected = LRP(_tail(net, layer), tail)(value, 1)
    torch.testing.assert_close(at, expected.scores, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(LRP(net)(X, 1).at(layer), at)
    torch.testing.assert_close(at.sum((1, 2, 3)).double() + expected.absorbed, result.explained)


def test_relevance_at_a_layer_that_is_changed_in_place_afterwards() -> None:
    body = lambda n, x: (h := n.first(x).relu(), g := n.second(h), g.__iadd__(h), out(n, g.relu_()))[-1]  # noqa: E731
    pure = lambda n, x: (h := n.first(x).relu(), out(n, (n.second(h) + h).relu()))[-1]  # noqa: E731
    ours, expected = LRP(Net(body))(X, 1).at("second"), LRP(Net(pure))(X, 1).at("second")
    torch.testing.assert_close(ours, expected)
    with pytest.raises(SettingError, match="no module"):
        LRP(Net(body))(X, layers=["third"])


def test_plan() -> None:
    net = Net(plain)
    net.relu = nn.ReLU()
    planned = LRP(net, "epsilon-plus").plan(X)
    text = str(planned)
    for part in (
        "preset epsilon-plus",
        "ZPlus() at the input",
        "merged with batch norm norm",
        "test_engine.py:",
    ):
        assert part in text
    assert [s.name for s in planned.steps if s.kind] == ["first", "second", "head"]
    first, second = planned_maps(net)
    cosine = float(F.cosine_similarity(first.flatten(1), second.flatten(1)).mean())
    assert planned.class_cosine == pytest.approx(cosine)
    result = LRP(net)(X)
    assert planned.total == pytest.approx(float((result.absorbed / result.explained).mean()))
    assert "hardly depend on the class" in str(LRP(lambda x: torch.cat([x, x * 1.1], 1)).plan(X[:, 0, 0, :1]))


def planned_maps(net: nn.Module) -> tuple[Tensor, Tensor]:
    lrp = LRP(net)
    top = lrp(X).output.topk(2, 1).indices
    return lrp(X, top[:, 0]).scores, lrp(X, top[:, 1]).scores


def test_presets_by_name_and_parameters() -> None:
    talk = preset("epsilon-plus")
    assert "ZPlus" in talk.describe()
    named = Preset("named", (Row(AlphaBeta(2, 1), name="second"), Row(ZPlus())))
    assert LRP(Net(plain), named).trace(X).steps[1].rule.startswith("AlphaBeta")
    with pytest.raises(SettingError, match="the presets are"):
        preset("epsilon_plus")
    with pytest.raises(SettingError, match=r"no node .* 'layer9\.\*'"):
        LRP(Net(plain), Preset("typo", (Row(Gamma(), name="layer9.*"), Row(ZPlus()))))(X)
    with pytest.raises(SettingError, match="no row"):
        LRP(Net(plain), Preset("short", (Row(ZPlus(), "convolution"),)))(X)


# ---- the model is left alone -------------------------------------------------------------------------------------


def _state(model: nn.Module) -> list[Any]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    modules = list(model.modules())
    return [
        [(name, id(t), t._version, t.requires_grad, t.grad, t.clone().tolist()) for name, t in tensors],
        list(model.state_dict()),
        [(id(m), m.training, type(m), sorted(vars(m)), id(m.forward.__func__)) for m in modules],  # type: ignore
        [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in modules],
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
    ]


def test_the_model_is_the_same_afterwards() -> None:
    net = Net(plain)
    net.head.weight.requires_grad_(False)
    x = X.clone()
    before = _state(net)
    LRP(net)(x, layers=["first"]).at("relu")
    LRP(net).plan(x)
    assert _state(net) == before
    net.body = lambda n, x: out(n, torch.frac(n.first(x)))
    before = _state(net)
    with pytest.raises(UnknownFunction):
        LRP(net)(x, layers=["first", "head"])
    net.body = lambda n, x: (n.first(x), 1 / 0)
    with pytest.raises(ZeroDivisionError):
        LRP(net)(x, layers=["first"])
    net.body = lambda n, x: out(n, torch.frac(n.first(x)))
    after = _state(net)
    assert after[0] == before[0]
    assert after[1:] == before[1:]
    assert torch.equal(x, X)
    assert x.grad is None
    assert not x.requires_grad


def test_the_callers_grad_mode_does_not_matter() -> None:
    lrp = LRP(Net(plain))
    expected = lrp(X, 1).scores
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode:
            assert torch.equal(lrp(X.clone(), 1).scores, expected)
    assert torch.equal(lrp(X.clone().requires_grad_(), 1).scores, expected)


def test_two_threads_at_once() -> None:
    net = Net(plain)
    lrp = LRP(net)
    with torch.no_grad():
        output = net(X)
    expected = [lrp(X, t).scores for t in range(4)]
    errors: list[Any] = []

    def work(target: int) -> None:
        try:
            for _ in range(10):
                assert torch.equal(lrp(X, target, layers=["first"]).scores, expected[target])
                with torch.no_grad():
                    assert torch.equal(net(X), output)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# ---- errors ------------------------------------------------------------------------------------------------------


def test_unknown_functions() -> None:
    net = Net(lambda n, x: out(n, torch.frac(n.first(x))))
    with pytest.raises(UnknownFunction, match=r"'frac'.*test_engine_results\.py:\d+") as caught:
        LRP(net)(X)
    assert "on_unknown='gradient'" in str(caught.value)
    lrp = LRP(net, on_unknown="gradient")
    assert bool(lrp(X).scores.isfinite().all())
    assert "UNKNOWN: plain gradient" in str(lrp.plan(X))
    with pytest.raises(SettingError):
        LRP(net, on_unknown="ignore")
    # Comparisons and positions carry no values: no error.
    LRP(Net(lambda n, x: plain(n, x * (x > 0)) if x.argmax() >= 0 and x.shape[0] else x))(X)


ERRORS: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "rounded division": (lambda n, x: out(n, torch.div(n.first(x), 2, rounding_mode="floor")), "rounds"),
    "a tuple": (lambda n, x: (plain(n, x), x), "tuple"),
    "a dict": (lambda n, x: {"logits": plain(n, x), "mean": x.mean((2, 3))}, "dict.*'logits', 'mean'"),
    "a map": (lambda n, x: n.first(x), "expected"),
    "class numbers": (lambda n, x: plain(n, x).argmax(1, keepdim=True), "int64"),
    "numpy": (lambda n, x: torch.from_numpy(plain(n, x).detach().numpy()), "in pieces"),
    "a constant": (lambda n, x: torch.zeros(len(x), 5), "in pieces"),
    "dropout": (lambda n, x: plain(n, F.dropout(x)), "training mode"),
    "a train-mode norm": (
        lambda n, x: out(n, F.batch_norm(n.first(x), None, None, training=True)),
        "statistics",
    ),
    "no sample axis": (lambda n, x: out(n, n.first(x[0])[None]).expand(3, -1), "sample"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_models_that_cannot_be_explained(case: str) -> None:
    body, message = ERRORS[case]
    with pytest.raises(RelevanceError, match=message) as caught:
        LRP(Net(body))(X)
    assert caught.value.remedy


def test_train_mode() -> None:
    model = Net(plain).train()
    before = model.norm.running_mean.clone()
    with pytest.raises(RelevanceError, match=r"statistics of the batch"):
        LRP(model)(X)
    assert torch.equal(model.norm.running_mean, before)
    with pytest.raises(RelevanceError, match=r"dropout would be random"):
        LRP(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(108, 5).double()))(X)


def test_inputs_and_settings() -> None:
    lrp = LRP(Net(plain))
    for bad in (torch.ones(1, 3, 6, 6, dtype=torch.uint8), torch.ones(3), torch.ones(0, 3, 6, 6), [[1.0]]):
        with pytest.raises(SettingError, match="the input is"):
            lrp(bad)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="bounds"):
        LRP(Net(plain), "epsilon-gamma-box")(X)
    with pytest.raises(SettingError, match="bounds"):
        LRP(Net(plain), "epsilon-gamma-box", bounds=(torch.zeros(5), torch.ones(5)))(X)
    with pytest.raises(SettingError, match="bounds"):
        LRP(Net(plain), "epsilon-gamma-box", bounds=(1, -1))(X)
    for rule in (Flat(), ZBox()):
        with pytest.raises(RelevanceError, match=r"'second'.*input layer"):
            LRP(Net(plain), Preset("deep", (Row(rule, name="second"), Row(ZPlus()))), bounds=(-5, 5))(X)


def test_samples_that_are_not_in_the_leading_axis() -> None:
    """A model that puts another axis first in between: the ledger still closes for each sample."""
    body = lambda n, x: n.head((n.first(x).flatten(2).permute(2, 0, 1)).relu()).permute(1, 2, 0).mean(2)  # noqa: E731
    assert gap(LRP(Net(body))(X)) < 1e-9


def test_every_error_is_one_of_ours() -> None:
    assert issubclass(UnknownFunction, PfungstError)
    assert issubclass(RelevanceError, PfungstError)
