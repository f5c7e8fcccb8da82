"""What the engine leaves as it was: compiled models, parameters, buffers, hooks, modes, random state, other threads."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from test_engine import Net, out, plain
from test_targets import X
from torch import Tensor, nn
from torch.nn import functional

from pfungst.errors import PfungstError, RelevanceError, SettingError, UnknownFunction
from pfungst.lrp import LRP, Margin, Region, Several, preset
from pfungst.lrp.rules import Flat

# ---- compiled models ---------------------------------------------------------------------------------------------


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Halves(nn.Module):
    """A model of which only a part is compiled."""

    def __init__(self, net: Net, compile: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.conv, self.rest = compile(net.first), nn.Sequential(nn.ReLU(), net.second, net.norm, nn.ReLU())
        self.head = net.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rest(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models(compiler: None, backend: str, warm: bool) -> None:
    plain_net = Net(plain).eval()
    expected = LRP(plain_net)(X, 1, layers=["second"])
    in_place = Net(plain).eval()
    in_place.compile(backend=backend)
    models: dict[str, Any] = {
        "wrapped": torch.compile(plain_net, backend=backend),
        "compiled in place": in_place,
        "in part": Halves(plain_net, lambda m: torch.compile(m, backend=backend)),
        "a function": torch.compile(lambda x: plain(plain_net, x), backend=backend),
    }
    stance = torch._dynamo.eval_frame._stance.stance
    for name, model in models.items():
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            if warm:
                model(X)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing of the engine is compiled: dynamo would warn
            result = LRP(model)(X, 1)
        torch.testing.assert_close(result.scores, expected.scores, rtol=1e-12, atol=1e-14)
        assert torch.equal(result.output, expected.output), name
        assert torch._dynamo.eval_frame._stance.stance == stance
    layers = LRP(models["wrapped"])(X, 1, layers=["second"])
    assert torch.equal(layers.layers["second"], expected.layers["second"])
    assert [s.name for s in LRP(models["wrapped"]).trace(X).steps if s.kind] == ["first", "second", "head"]
    assert [s.name for s in LRP(models["in part"]).trace(X).steps if s.kind] == ["conv", "rest.1", "head"]
    part = LRP(models["in part"], preset("epsilon-plus").flat_until("conv"))(X, 1, layers=["conv"])
    torch.testing.assert_close(part.layers["conv"], expected.at("first"))
    with torch.no_grad():
        assert torch.equal(models["wrapped"](X), expected.output)  # and it still runs


def test_an_error_leaves_the_compilers_stance(compiler: None) -> None:
    model = torch.compile(Net(lambda n, x: out(n, torch.frac(n.first(x)))), backend="eager")
    stance = torch._dynamo.eval_frame._stance.stance
    with pytest.raises(UnknownFunction):
        LRP(model)(X)
    assert torch._dynamo.eval_frame._stance.stance == stance


def test_compiled_models_in_threads(compiler: None) -> None:
    model = torch.compile(Net(plain).eval(), backend="eager")
    lrp = LRP(model)
    expected = [lrp(X, t).scores for t in range(4)]
    _in_threads(lambda t: torch.testing.assert_close(lrp(X, t).scores, expected[t], rtol=0, atol=0))
    assert torch._dynamo.eval_frame._stance.stance == "default"


# ---- everything is left as it was --------------------------------------------------------------------------------

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_state_dict_hooks", "_load_state_dict_pre_hooks",
)  # fmt: skip


def _state(model: nn.Module) -> list[Any]:
    """Everything that a pass could have left behind, by identity and by value."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    modules = list(model.modules())
    return [
        [(name, id(t), t._version, t.requires_grad, t.grad is None, t.data_ptr()) for name, t in tensors],
        [t.detach().clone().tolist() for _, t in tensors],
        [(id(m), type(m), m.training, id(m.__dict__), list(m.__dict__), list(m._modules)) for m in modules],
        [[(id(getattr(m, hooks)), dict(getattr(m, hooks))) for hooks in _HOOKS] for m in modules],
        [len(getattr(t, "_backward_hooks", None) or ()) for _, t in tensors],
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.overrides._get_current_function_mode_stack(),
        list(model.state_dict()),
    ]


def _check_state(model: nn.Module, act: Callable[[], Any]) -> None:
    before = _state(model)
    act()
    assert _state(model) == before


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "enable_grad": torch.enable_grad,
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_the_state_is_the_same_after_every_use(mode: str) -> None:
    net = Net(plain)
    net.head.weight.requires_grad_(False)
    net.first.register_forward_hook(lambda *_: None)
    x = X.clone()
    expected = LRP(net)(X, 1)
    uses: list[Callable[[LRP], Any]] = [
        lambda lrp: lrp(x, 1).at("second"),
        lambda lrp: lrp(x, Several([1, Margin(1, 2)]), layers=["first", "relu"]),
        lambda lrp: lrp(x, 1, conditions=[{"first": 0}, {"second": 1}], exclude_parallel=False),
        lambda lrp: lrp(x, 1, conditions={"first": 0, "norm": [1, 2]}),
        lambda lrp: lrp(x, Region(0), start="first"),
        lambda lrp: lrp.attribute((x,), target=1),
        lambda lrp: list(lrp.stream([x, x])),
        lambda lrp: LRP(net, inputs="first")(x, 1),
        lambda lrp: LRP(net, preset("epsilon").flat_until("second"))(x, 1),
        lambda lrp: lrp.plan(x),
    ]
    with MODES[mode]():
        for use in uses:
            _check_state(net, lambda use=use: use(LRP(net)))
        assert torch.equal(LRP(net)(x, 1).scores, expected.scores)
        y = x.clone()
        assert torch.equal(LRP(net)(y.requires_grad_() if mode != "inference_mode" else y, 1).scores, expected.scores)
    assert torch.equal(x, X)
    assert x.grad is None
    assert not expected.scores.requires_grad
    assert not LRP(net)(x, 1, layers=["first"]).layers["first"].requires_grad


FAILURES: dict[str, tuple[Callable[[Any, Tensor], Any], Callable[[LRP], Any], type[BaseException]]] = {
    "in the model": (lambda n, x: 1 / 0, lambda lrp: lrp(X, layers=["first"]), ZeroDivisionError),
    "behind kept layers": (
        lambda n, x: (n.first(x), 1 / 0),
        lambda lrp: lrp(X, layers=["first"], conditions={"first": 0}),
        ZeroDivisionError,
    ),
    "an unknown function": (lambda n, x: out(n, n.first(x).frac()), lambda lrp: lrp(X), UnknownFunction),
    "an interrupt": (
        lambda n, x: (n.first(x), (_ for _ in ()).throw(KeyboardInterrupt())),
        lambda lrp: lrp(X, layers=["first"]),
        KeyboardInterrupt,
    ),
    "a wrong layer": (plain, lambda lrp: lrp(X, layers=["nothing"]), SettingError),
    "a wrong condition": (plain, lambda lrp: lrp(X, conditions={"first": 9}, exclude_parallel=False), SettingError),
    "a wrong target": (plain, lambda lrp: lrp(X, lambda y: y.sum()), SettingError),
    "a target that fails": (plain, lambda lrp: lrp(X, lambda y: 1 / 0), ZeroDivisionError),
    "no output": (lambda n, x: None, lambda lrp: lrp(X), RelevanceError),
    "a hook that fails": (
        plain,
        lambda lrp: lrp(X, conditions=[{"first": 0}, {"first": "a"}], exclude_parallel=False),
        (PfungstError, ValueError, TypeError),
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_the_state_is_the_same_after_a_failure(case: str) -> None:
    body, use, error = FAILURES[case]
    net = Net(body)

    def act() -> None:
        with pytest.raises(error):
            use(LRP(net))

    _check_state(net, act)
    net.body = plain
    assert torch.equal(LRP(net)(X, 1).scores, LRP(Net(plain))(X, 1).scores)


def test_parameters_that_need_gradients_get_none() -> None:
    net = Net(plain)
    assert all(p.requires_grad for p in net.parameters())
    loss = net(X).sum()
    loss.backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters()}
    LRP(net)(X, 1, conditions={"first": 0})
    assert all(torch.equal(p.grad, grads[name]) for name, p in net.named_parameters())
    assert bool(LRP(net)(X, 1).scores.any())


def _in_threads(work: Callable[[int], Any], count: int = 4, times: int = 8) -> None:
    errors: list[BaseException] = []
    start = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            start.wait()
            for _ in range(times):
                work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def test_every_use_at_once_in_threads() -> None:
    """One model, used in four ways by four threads, and by none of them seen from the others."""
    net = Net(plain)
    lrp = LRP(net)
    uses: list[Callable[[], Any]] = [
        lambda: lrp(X, 1, layers=["first"]).layers["first"],
        lambda: lrp(X, 1, conditions={"first": [0], "second": [1, 2]}).scores,
        lambda: lrp(X, 1, conditions={"first": [0]}, exclude_parallel=False).scores,
        lambda: LRP(net, inputs="first")(X, 2).scores,
    ]
    expected = [use() for use in uses]
    before = _state(net)
    _in_threads(lambda number: torch.testing.assert_close(uses[number](), expected[number], rtol=0, atol=0))
    assert _state(net) == before


def test_one_result_is_not_changed_by_the_next() -> None:
    """A model used twice: results are the same, and the first is left alone."""
    lrp = LRP(Net(plain), preset("epsilon-plus-flat"))
    first = lrp(X, 1, layers=["first"])
    kept = first.scores.clone(), first.layers["first"].clone(), dict(first.ledger)
    second = lrp(X, 1, layers=["first"])
    lrp(-X, 3, layers=["first"])
    assert torch.equal(first.scores, kept[0])
    assert torch.equal(first.layers["first"], kept[1])
    assert all(torch.equal(first.ledger[k], v) for k, v in kept[2].items())
    assert torch.equal(first.scores, second.scores)
    assert first.ledger.keys() == second.ledger.keys()
    assert Flat().label in lrp.trace(X).steps[0].rule


class InPlace(nn.Module):
    """In-place functions of every kind, on values that are used again and on views of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.hardswish(self.first(x), inplace=True)
        y = self.second(x)
        y[:, :2].sigmoid_()
        y[:, 2:] += x[:, 2:]
        y = functional.silu(y, inplace=True).add_(x).clamp_(-5, 5)
        y = y.unsqueeze_(1).squeeze_(1).permute(0, 2, 3, 1)
        return self.head(torch.tanh_(self.norm(y)).mean((1, 2)))


class Steps(nn.Module):
    """A recurrent layer over the rows of a picture, both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(18, 4, 2, batch_first=True, bidirectional=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.transpose(1, 2).flatten(2))[0].mean(1))


@pytest.mark.parametrize("preset", ["epsilon", "epsilon-plus", "attnlrp", "arras"])
def test_explanations_leave_nothing_behind(preset: str) -> None:
    """Not even until the garbage collector comes, which on a GPU would be too late."""
    model = InPlace().eval() if preset != "arras" else Steps().eval()
    lrp, x = LRP(model, preset), torch.randn(2, 3, 6, 6)
    layers = ["second"] if preset != "arras" else ["rnn"]

    def alive() -> int:
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    lrp(x, layers=layers)
    gc.collect()
    gc.disable()
    try:
        before = alive()
        for _ in range(3):
            lrp(x, layers=layers)
        assert alive() == before
    finally:
        gc.enable()
