"""Recurrent networks against the slow oracle, entry by entry in float64; the ledger; packed sequences; single cells."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles_recurrent as oracle
import pytest
import torch
from oracles_recurrent import Recipe, Stack
from test_engine import drawn, gap
from torch import Tensor, nn
from torch.nn.utils import rnn

from pfungst.errors import RelevanceError
from pfungst.lrp import LRP
from pfungst.lrp.cells import CELLS, Inputs, Rules, State, Unrolled
from pfungst.lrp.plan import Plan
from pfungst.lrp.presets import arras
from pfungst.lrp.recurrent import _by_layer
from pfungst.lrp.rules import Epsilon

GATES = ("all", "half", "prop", "abs")
FEATURES, UNITS, STEPS, SAMPLES = 4, 3, 5, 3
LENGTHS = (3, 5, 2)  # not sorted

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
}
GATED = [(kind, gates) for kind in KINDS for gates in GATES if gates == "all" or not kind.startswith("rnn")]
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "both ways": {"bidirectional": True},
    "stacked both ways": {"bidirectional": True, "num_layers": 2},
    "three layers, no bias": {"num_layers": 3, "bias": False},
    "time first": {"batch_first": False},
}


def network(kind: str, **more: Any) -> nn.RNNBase:
    torch.manual_seed(len(kind) + 7 * len(more))
    name, fixed = KINDS[kind]
    net = getattr(nn, name)(FEATURES, UNITS, **{"batch_first": True, **fixed, **more}).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.7)  # out of the nearly linear range
    return net  # type: ignore[no-any-return]


class Read(nn.Module):
    """A recurrent net, and a linear read-out of everything that it returns: outputs, last h, last c."""

    def __init__(self, net: nn.RNNBase, packed: bool = False, state: Any = None) -> None:
        super().__init__()
        self.net, self.packed, self.state = net, packed, state
        ways = 2 if net.bidirectional else 1
        size = ways * (net.proj_size or net.hidden_size)
        both = ways * net.num_layers * (size // ways + (net.hidden_size if net.mode == "LSTM" else 0))
        self.head = nn.Linear(STEPS * size + both, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            lengths = torch.tensor(LENGTHS)
            packed = rnn.pack_padded_sequence(x, lengths, self.net.batch_first, enforce_sorted=False)
            output, last = self.net(packed, self.state)
            output, _ = rnn.pad_packed_sequence(output, self.net.batch_first, total_length=STEPS)
        else:
            output, last = self.net(x, self.state)
        if not self.net.batch_first:
            output = output.transpose(0, 1)
        parts = [output, *(part.transpose(0, 1) for part in (last if isinstance(last, tuple) else (last,)))]
        return self.head(torch.cat([part.flatten(1) for part in parts], 1))


def arrays(net: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in net.state_dict().items()}


def expect(model: Read, kind: str, x: Tensor, recipe: Recipe, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Relevance of the input and, by sample, that of the first states; the oracle of ``Read``."""
    w, b = (p.detach().numpy() for p in (model.head.weight, model.head.bias))
    scores, first = np.zeros(x.shape), np.zeros(len(x))
    for n, sequence in enumerate(x.numpy()):
        steps = LENGTHS[n] if model.packed else STEPS
        state = None
        if model.state is not None:
            parts = model.state if isinstance(model.state, tuple) else (model.state,)
            state = [part[:, n].numpy() for part in parts]
        stack = Stack(kind, arrays(model.net), sequence[:steps], state)
        output = np.zeros((STEPS, stack.output.shape[1]))
        output[:steps] = stack.output
        parts = [output.ravel(), np.concatenate(stack.h), *([np.concatenate(stack.c)] if kind == "lstm" else [])]
        lower = np.concatenate(parts)
        z = w @ lower + b
        R = oracle.linear(w, b, lower, z, z * (np.arange(2) == target), recipe.eps, recipe.factor)
        R = np.where(lower == 0, 0, R)  # outside a net, what a dense layer gives to zero entries is in the ledger
        cuts = np.cumsum([len(part) for part in parts])[:-1]
        R_output, R_h, *R_c = np.split(R, cuts)
        R_x, h0, c0 = stack.backward(
            recipe,
            R_output.reshape(output.shape)[:steps],
            list(R_h.reshape(len(stack.h), -1)),
            list(R_c[0].reshape(len(stack.c), -1)) if R_c else None,
        )
        scores[n, :steps] = R_x
        first[n] = np.sum(h0) + np.sum(c0)
    return scores, first


def compare(model: Read, kind: str, recipe: Recipe, x: Tensor | None = None, sharp: float = 1e-9) -> Any:
    x = drawn(SAMPLES, STEPS, FEATURES) if x is None else x
    given = x if model.net.batch_first else x.transpose(0, 1)

    def run(value: Tensor) -> Tensor:
        return model(value if model.net.batch_first else value.transpose(0, 1))

    result = LRP(run, arras(recipe.eps, recipe.factor, recipe.gates))(x, 1)
    with torch.no_grad():
        assert torch.equal(result.output, model(given))
    expected, first = expect(model, kind, x, recipe, 1)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(result.scores.numpy(), expected, rtol=sharp, atol=sharp * scale)
    assert gap(result) < sharp
    return result, expected, first


@pytest.mark.parametrize("factor", [0, 1])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kind", "gates"), GATED)
def test_all_kinds_and_forms(kind: str, form: str, gates: str, factor: int) -> None:
    compare(Read(network(kind, **FORMS[form])), kind, Recipe(1e-3, factor, gates))


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("more", [{}, {"bidirectional": True, "num_layers": 2}], ids=["one layer", "two both ways"])
@pytest.mark.parametrize("factor", [0, 1])
def test_projections(gates: str, more: dict[str, Any], factor: int) -> None:
    compare(Read(network("lstm", proj_size=2, **more)), "lstm", Recipe(1e-3, factor, gates))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("factor", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(kind: str, factor: int, batch_first: bool) -> None:
    """Of unequal length, not sorted: each sample's relevance, and its own entry in the ledger."""
    net = network(kind, bidirectional=True, num_layers=2, batch_first=batch_first)
    result, expected, _ = compare(Read(net, packed=True), kind, Recipe(1e-3, factor, "all"))
    assert np.all(result.scores.numpy()[2, LENGTHS[2] :] == 0)
    assert np.all(np.abs(expected[2, : LENGTHS[2]]) > 0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("kind", "gates"), GATED)
def test_given_first_states_absorb_what_reaches_them(kind: str, gates: str, packed: bool) -> None:
    """With all biases shared out the ledger holds just that, and what padding and dead units of the read-out got."""
    net = network(kind, bidirectional=True)
    h, c = drawn(2, SAMPLES, UNITS, seed=3), drawn(2, SAMPLES, UNITS, seed=4)
    model = Read(net, packed, (h, c) if kind == "lstm" else h)
    result, _, first = compare(model, kind, Recipe(1e-3, 1, gates))
    ledger = result.ledger
    name = next(key for key in ledger if key.startswith(kind))
    np.testing.assert_allclose(ledger[name].numpy(), first, rtol=1e-8, atol=1e-8)
    assert np.abs(first).min() > 1e-4


@pytest.mark.parametrize(("kind", "gates"), [pair for pair in GATED if pair[0] != "rnn_relu"])
def test_conservation(kind: str, gates: str) -> None:
    """Bias factor 1: f = Σ R of inputs and first states, the test of Arras et al. 2017."""
    net = network(kind, bidirectional=True, num_layers=2)
    model = Read(net)
    x = drawn(SAMPLES, STEPS, FEATURES)
    x[:, ::2, 1] = 0  # zeros get their share of the bias
    result, expected, first = compare(model, kind, Recipe(1e-3, 1, gates), x)
    rounding = 1e-12 * np.abs(expected).sum()  # prop divides by gate + signal, which may be small: R of 10^7
    np.testing.assert_allclose(expected.sum((1, 2)) + first, result.explained.numpy(), rtol=0, atol=rounding)
    np.testing.assert_allclose(result.absorbed.numpy(), first, rtol=1e-9, atol=rounding)
    assert (result.scores[:, ::2, 1] != 0).all()


def test_zero_inputs_behind_other_layers_leave_their_share_to_the_ledger() -> None:
    net = network("lstm")
    model = Read(net)
    x = drawn(SAMPLES, STEPS, FEATURES)
    result = LRP(lambda v: model(torch.relu(v)), arras(1e-3, 1))(x, 1)
    bent = torch.relu(x)
    expected, _ = expect(model, "lstm", bent, Recipe(1e-3, 1, "all"), 1)
    np.testing.assert_allclose(result.scores.numpy(), np.where(bent.numpy() == 0, 0, expected), rtol=1e-9, atol=1e-12)
    assert gap(result) < 1e-9


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("kind", "form"), [*[(k, f) for k in KINDS for f in FORMS], ("lstm", "projected")])
def test_opened_cells_compute_what_the_native_function_does(kind: str, form: str, packed: bool) -> None:
    more = {"proj_size": 2, "num_layers": 2} if form == "projected" else FORMS[form]
    net = network(kind, **more)
    x = drawn(STEPS, SAMPLES, FEATURES) * 2
    sequence: Any = rnn.pack_padded_sequence(x, torch.tensor(sorted(LENGTHS)[::-1])) if packed else None
    with torch.no_grad():
        output, last = net(sequence if packed else (x.transpose(0, 1) if net.batch_first else x))
    sizes = sequence.batch_sizes.tolist() if packed else [SAMPLES] * STEPS
    rows = sequence.data if packed else x.flatten(0, 1)
    expected = output.data if packed else (output.transpose(0, 1) if net.batch_first else output).flatten(0, 1)
    layers, ways = net.num_layers, 2 if net.bidirectional else 1
    weights = _by_layer([p.detach() for p in net._flat_weights], layers, ways, net.bias)
    rules = Rules(Epsilon(), Epsilon(), "all")
    first = State(
        torch.zeros(layers * ways, SAMPLES, net.proj_size or UNITS).double(),
        torch.zeros(layers * ways, SAMPLES, UNITS).double() if kind == "lstm" else None,
    )
    opened = Unrolled([[CELLS[kind](w, rules) for w in both] for both in weights], sizes, Inputs(rows), first)
    torch.testing.assert_close(opened.output, expected, rtol=1e-12, atol=1e-13)
    for ours, theirs in zip(opened.state, last if kind == "lstm" else (last, None), strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


# ---- single cells, and nets that feed nets -------------------------------------------------------------------------


class Looped(nn.Module):
    """The same net as ``Read``, step by step with torch's single cells."""

    def __init__(self, model: Read, kind: str) -> None:
        super().__init__()
        name, fixed = KINDS[kind]
        self.head, self.kind = model.head, kind
        self.cell = getattr(nn, f"{name}Cell")(FEATURES, UNITS, **fixed).double()
        for parameter in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(self.cell, parameter, getattr(model.net, f"{parameter}_l0"))

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            outputs.append(state[0] if self.kind == "lstm" else state)
        parts = [torch.stack(outputs, 1), *(state if self.kind == "lstm" else (state,))]  # type: ignore[misc]
        return self.head(torch.cat([part.flatten(1) for part in parts], 1))


# Between two calls dead units of rnn_relu cannot carry their share of the bias.
@pytest.mark.parametrize(
    ("kind", "gates", "factor"), [(*p, f) for p in GATED for f in (0, 1) if not f or p[0] != "rnn_relu"]
)
def test_single_cells_in_a_loop(kind: str, gates: str, factor: int) -> None:
    model = Read(network(kind))
    x = drawn(SAMPLES, STEPS, FEATURES)
    recipe = Recipe(1e-3, factor, gates)
    result = LRP(Looped(model, kind), arras(1e-3, factor, gates))(x, 1)
    expected, _ = expect(model, kind, x, recipe, 1)
    np.testing.assert_allclose(result.scores.numpy(), expected, rtol=1e-8, atol=1e-9 * np.abs(expected).max())
    assert gap(result) < 1e-9
    assert [step.name for step in LRP(Looped(model, kind), "arras").trace(x).steps if step.kind][:2] == [
        "cell",
        "cell:2",
    ]


@pytest.mark.parametrize("gates", GATES)
def test_first_states_that_depend_on_the_input(gates: str) -> None:
    """An encoder whose last states start a decoder, which reads constants: relevance flows through the states alone."""
    encoder, decoder = network("lstm"), network("lstm", bias=True)
    tokens = drawn(SAMPLES, 2, FEATURES, seed=9)
    x = drawn(SAMPLES, STEPS, FEATURES)

    def model(v: Tensor) -> Tensor:
        return decoder(tokens, encoder(v)[1])[0][:, -1]

    recipe = Recipe(1e-3, 1, gates)
    result = LRP(model, arras(1e-3, 1, gates))(x, 1)
    constants = np.zeros(SAMPLES)
    for n in range(SAMPLES):
        first = Stack("lstm", arrays(encoder), x[n].numpy())
        second = Stack("lstm", arrays(decoder), tokens[n].numpy(), (first.h, first.c))
        R = np.zeros_like(second.output)
        R[-1, 1] = second.output[-1, 1]
        R_tokens, R_h, R_c = second.backward(recipe, R)
        expected, h0, c0 = first.backward(recipe, np.zeros_like(first.output), R_h, R_c)
        np.testing.assert_allclose(result.scores[n].numpy(), expected, rtol=1e-8, atol=1e-10)
        constants[n] = R_tokens.sum() + np.sum(h0) + np.sum(c0)
    np.testing.assert_allclose(result.absorbed.numpy(), constants, rtol=1e-8, atol=1e-10)
    assert gap(result) < 1e-9


# ---- the ledger by sample ------------------------------------------------------------------------------------------


def test_sequences_of_one_sample_count_to_that_sample() -> None:
    """Several sequences a sample, as in a net over sentences of a document."""
    net, head = network("gru"), nn.Linear(UNITS, 2).double()
    x = drawn(SAMPLES, 2, STEPS, FEATURES)

    def model(v: Tensor) -> Tensor:
        return head(net(v.flatten(0, 1))[0][:, -1].unflatten(0, (-1, 2)).sum(1))

    assert gap(LRP(model, "arras")(x)) < 1e-9


@pytest.mark.parametrize("value", [0.0, 0.7, float("-inf")])
def test_padding_of_packed_outputs(value: float) -> None:
    """Padded values are constants; before a maximum they may be infinite."""
    net, head = network("lstm"), nn.Linear(UNITS, 2).double()
    x = drawn(SAMPLES, STEPS, FEATURES)

    def model(v: Tensor) -> Tensor:
        packed = rnn.pack_padded_sequence(v, torch.tensor(LENGTHS), True, enforce_sorted=False)
        padded, _ = rnn.pad_packed_sequence(net(packed)[0], True, padding_value=value)
        return head(padded.amax(1) if value < 0 else padded.sum(1))

    result = LRP(model, "arras")(x, 0)
    assert gap(result) < 1e-9
    padding = [absorbed for name, absorbed in result.ledger.items() if "pad" in name]
    assert len(padding) == (value != 0)
    if value > 0:
        missing = STEPS - torch.tensor(LENGTHS)
        assert ((padding[0] != 0) == (missing > 0)).all()


def test_raw_values_through_packing() -> None:
    """Packing and padding only move raw values: R itself goes through, and what falls on padding is in the ledger."""
    x = drawn(SAMPLES, STEPS, FEATURES)
    layer = nn.Linear(STEPS * FEATURES, 2).double()

    def model(v: Tensor) -> Tensor:
        packed = rnn.pack_padded_sequence(v, torch.tensor(LENGTHS), True, enforce_sorted=False)
        return layer(rnn.pad_packed_sequence(packed, True)[0].flatten(1))

    def cut(v: Tensor) -> Tensor:
        kept = torch.arange(STEPS) < torch.tensor(LENGTHS)[:, None]
        return layer((v * kept[:, :, None]).flatten(1))

    for which in ("epsilon", "epsilon-plus-flat"):
        ours, plain = LRP(model, which)(x, 1), LRP(cut, which)(x, 1)
        kept = (torch.arange(STEPS) < torch.tensor(LENGTHS)[:, None])[:, :, None]
        torch.testing.assert_close(ours.scores, plain.scores * kept, rtol=1e-10, atol=1e-12)
        assert gap(ours) < 1e-9


def test_raw_values_that_the_model_pads() -> None:
    x = drawn(SAMPLES, STEPS, FEATURES)
    layer = nn.Linear(STEPS * FEATURES, 2).double()

    def model(v: Tensor) -> Tensor:
        return layer(rnn.pad_sequence([v[n, :steps] for n, steps in enumerate(LENGTHS)], True).flatten(1))

    for which in ("epsilon", "epsilon-plus-flat"):
        result = LRP(model, which)(x, 1)
        assert gap(result) < 1e-9
    fallen = result.ledger["pad_sequence"] / result.explained  # flat: the same for every entry
    missing = (STEPS - torch.tensor(LENGTHS)).double() / STEPS
    torch.testing.assert_close(fallen, missing, rtol=1e-10, atol=1e-12)


# ---- the rest ------------------------------------------------------------------------------------------------------


def test_dropout_between_layers_is_an_error_in_training_mode() -> None:
    torch.manual_seed(0)
    net = nn.LSTM(FEATURES, UNITS, 2, dropout=0.5, batch_first=True).double()
    model = lambda v: net(v)[0][:, -1]  # noqa: E731
    x = drawn(SAMPLES, STEPS, FEATURES)
    with pytest.raises(RelevanceError, match="training mode"):
        LRP(model, "arras")(x)
    net.eval()
    assert gap(LRP(model, "arras")(x)) < 1e-9


def test_plan_and_layers_name_the_module() -> None:
    model = Read(network("lstm", num_layers=2))
    x = drawn(SAMPLES, STEPS, FEATURES)
    plan = LRP(model, "arras").plan(x)
    assert isinstance(plan, Plan)
    (line,) = [row for row in str(plan).splitlines() if row.startswith("net ")]
    assert "Recurrent(epsilon=0.001, bias_factor=0) at the input" in line
    assert "gates=all" in line
    result = LRP(model, "epsilon")(x, 0)
    assert result.at("net").shape == (SAMPLES, STEPS, UNITS)


@pytest.mark.parametrize("kind", KINDS)
def test_other_precisions(kind: str) -> None:
    model = Read(network(kind, num_layers=2, bidirectional=True))
    x = drawn(SAMPLES, STEPS, FEATURES)
    exact = LRP(model, "arras")(x, 1)
    for dtype, sharp in ((torch.float32, 1e-3), (torch.bfloat16, 0.2)):
        low = model.to(dtype)
        result = LRP(low, "arras")(x.to(dtype), 1)
        with torch.no_grad():
            assert torch.equal(result.output, low(x.to(dtype)))
        assert result.scores.dtype == dtype
        error = (result.scores.double() - exact.scores).abs().max() / exact.scores.abs().max()
        assert error < sharp, (dtype, float(error))


@pytest.mark.parametrize("kind", KINDS)
def test_exported_programs(kind: str) -> None:
    model = Read(network(kind, bidirectional=True))
    x = drawn(SAMPLES, STEPS, FEATURES)
    exported = torch.export.export(model, (x,)).module()
    ours, theirs = LRP(exported, "arras")(x, 1), LRP(model, "arras")(x, 1)
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-10, atol=1e-12)
    assert gap(ours) < 1e-9


def test_several_targets_share_one_forward_pass() -> None:
    model = Read(network("lstm", num_layers=2))
    x = drawn(SAMPLES, STEPS, FEATURES)
    trace = LRP(model, "arras").trace(x)
    for target in (0, 1, 0):
        again = LRP(model, "arras")(x, target)
        assert torch.equal(trace.relevance(target).scores, again.scores)
