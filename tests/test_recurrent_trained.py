"""Trained recurrent networks: two published LSTMs against the slow oracle, and the toy sums of Arras et al. 2019."""

from __future__ import annotations

import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import oracles_recurrent as oracle
import pytest
import torch
from oracles_recurrent import Recipe, Stack
from test_engine import gap
from torch import Tensor, nn
from torch.nn.utils import rnn

from pfungst.lrp import LRP
from pfungst.lrp.presets import arras

EPS = 1e-3
GATES = ("all", "half", "prop", "abs")


def close(ours: Tensor, expected: np.ndarray, sharp: float = 1e-9) -> None:
    np.testing.assert_allclose(ours.numpy(), expected, rtol=sharp, atol=sharp * np.abs(expected).max())


# ---- the sentiment net of Arras et al. 2017 (weights of Li et al. 2016), word vectors drawn -----------------------


class Sentiment(nn.Module):
    """A bidirectional LSTM whose last states give five scores."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        w = np.load(folder / "bilstm_weights.npz")
        self.lstm = nn.LSTM(60, 60, batch_first=True, bidirectional=True).double()
        self.scores = nn.Linear(120, 5, bias=False).double()

        def gates(blocks: np.ndarray) -> Tensor:  # stored i, g, f, o; torch has i, f, g, o
            i, g, f, o = np.split(blocks, 4)
            return torch.from_numpy(np.concatenate([i, f, g, o]))

        with torch.no_grad():
            for way, suffix in (("Left", ""), ("Right", "_reverse")):
                for theirs, ours in (
                    ("Wxh", "weight_ih"),
                    ("Whh", "weight_hh"),
                    ("bxh", "bias_ih"),
                    ("bhh", "bias_hh"),
                ):
                    getattr(self.lstm, f"{ours}_l0{suffix}").copy_(gates(w[f"{theirs}_{way}"]))
            self.scores.weight.copy_(torch.from_numpy(np.hstack([w["Why_Left"], w["Why_Right"]])))

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        packed = rnn.pack_padded_sequence(words, lengths, batch_first=True, enforce_sorted=False)
        return self.scores(self.lstm(packed)[1][0].transpose(0, 1).flatten(1))


def sentences(folder: Path, rows: list[int]) -> tuple[Tensor, Tensor]:
    """Real sentences in drawn word vectors, padded, and their lengths."""
    lines = (folder / "sequence_test.txt").read_text().splitlines()
    words = [lines[row].split("\t")[1].split() for row in rows]
    vocabulary = {word: number for number, word in enumerate(sorted({word for words in words for word in words}))}
    vectors = torch.randn(len(vocabulary), 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = [vectors[[vocabulary[word] for word in sentence]] for sentence in words]
    return rnn.pad_sequence(parts, batch_first=True), torch.tensor([len(part) for part in parts])


@pytest.mark.data
@pytest.mark.parametrize("factor", [0, 1])
@pytest.mark.parametrize("gates", GATES)
def test_sentiment_lstm(data_root: Path, gates: str, factor: int) -> None:
    """Sentences of unequal length in one batch; with bias factor 1 relevance is conserved."""
    folder = data_root / "sst-bilstm-arras"
    model = Sentiment(folder)
    x, lengths = sentences(folder, [1000, 3, 2000, 1500])
    assert len(set(lengths.tolist())) == 4
    result = LRP(lambda v: model(v, lengths), arras(EPS, factor, gates))(x)
    with torch.no_grad():
        assert torch.equal(result.output, model(x, lengths))
    w = model.scores.weight.detach().numpy()
    params = {name: value.numpy() for name, value in model.lstm.state_dict().items()}
    for n, steps in enumerate(lengths.tolist()):
        target = int(result.target[n])
        net = Stack("lstm", params, x[n, :steps].numpy())
        lower = np.concatenate(net.h)
        z = w @ lower
        R = oracle.linear(w, np.zeros(5), lower, z, z * (np.arange(5) == target), EPS, factor)
        silent = np.zeros_like(net.output)
        expected, h0, c0 = net.backward(Recipe(EPS, factor, gates), silent, [R[:60], R[60:]])
        close(result.scores[n, :steps], expected)
        assert (result.scores[n, steps:] == 0).all()
        if factor:
            first = np.sum(h0) + np.sum(c0)
            rounding = 1e-12 * np.abs(expected).sum()
            assert abs(expected.sum() + first - z[target]) < rounding
            assert abs(float(result.absorbed[n]) - first) < max(rounding, 1e-9)
    assert gap(result) < 1e-9


# ---- rows of digits -----------------------------------------------------------------------------------------------


class Rows(nn.Module):
    """28 rows of 28 pixels -> LSTM(20) -> all its states -> ten scores."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        w = np.load(folder / "lstm_mnist_float.npz")
        self.rows, self.scores = nn.LSTM(28, 20, batch_first=True), nn.Linear(560, 10)

        def gates(name: str) -> Tensor:
            return torch.from_numpy(np.concatenate([w[f"{name}_{gate}"] for gate in "ifco"]))

        with torch.no_grad():
            self.rows.weight_ih_l0.copy_(gates("W"))
            self.rows.weight_hh_l0.copy_(gates("U"))
            self.rows.bias_ih_l0.copy_(gates("b"))
            self.rows.bias_hh_l0.zero_()
            self.scores.weight.copy_(torch.from_numpy(w["W_out"]))
            self.scores.bias.copy_(torch.from_numpy(w["b_out"]))

    def forward(self, digits: Tensor) -> Tensor:
        return self.scores(self.rows(digits)[0].flatten(1))


@pytest.fixture(scope="module")
def digits(data_root: Path) -> tuple[Any, Tensor, Tensor]:
    """The net, 10,000 digits of 0 to 1, and what they are."""
    scipy_io = pytest.importorskip("scipy.io")
    folder = data_root / "mnist-lrp-toolbox"
    images = scipy_io.loadmat(folder / "test_images.mat")["data"].reshape(-1, 28, 28)
    labels = scipy_io.loadmat(folder / "test_labels.mat")["data"].ravel()
    return Rows(data_root / "lstm-mnist-coral").eval(), torch.from_numpy(images).float() / 255, torch.from_numpy(labels)


@pytest.mark.data
def test_the_digit_lstm_is_rebuilt_as_it_was(digits: Any) -> None:
    model, images, labels = digits
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).double().mean()
    assert abs(float(right) - 0.979) < 0.001


@pytest.mark.data
@pytest.mark.parametrize("factor", [0, 1])
@pytest.mark.parametrize("gates", GATES)
def test_digit_lstm(digits: Any, gates: str, factor: int) -> None:
    """Entry by entry in float64; with bias factor 1 black pixels get their share too, and relevance is conserved."""
    model, images, _ = digits
    model, x = model.double(), images[:3].double()
    result = LRP(model, arras(EPS, factor, gates))(x)
    with torch.no_grad():
        assert torch.equal(result.output, model(x))
    w, b = model.scores.weight.detach().numpy(), model.scores.bias.detach().numpy()
    params = {name: value.numpy() for name, value in model.rows.state_dict().items()}
    model.float()
    for n, digit in enumerate(x.numpy()):
        net = Stack("lstm", params, digit)
        lower = net.output.ravel()
        z = w @ lower + b
        target = int(z.argmax())
        R = oracle.linear(w, b, lower, z, z * (np.arange(10) == target), EPS, factor)
        expected, h0, c0 = net.backward(Recipe(EPS, factor, gates), R.reshape(28, 20))
        close(result.scores[n], expected, 1e-8)
        black = digit == 0
        assert np.all((expected[black] != 0) == bool(factor))
        if factor:
            rounding = 1e-12 * np.abs(expected).sum()
            assert abs(expected.sum() + np.sum(h0) + np.sum(c0) - z[target]) < max(rounding, 1e-10)
    assert gap(result) < 1e-9


@pytest.mark.data
def test_digit_lstm_in_single_precision_and_batches(digits: Any) -> None:
    """As users run it: 64 digits at once; the ledger closes and the numbers are those of double precision."""
    model, images, _ = digits
    x = images[:64]
    single = LRP(model.float(), "arras")(x)
    with torch.no_grad():
        assert torch.equal(single.output, model(x))
    double = LRP(model.double(), "arras")(x.double(), single.target)
    model.float()
    assert gap(single) < 1e-4
    worst = (single.scores.double() - double.scores).abs().amax((1, 2)) / double.scores.abs().amax((1, 2))
    assert float(worst.max()) < 1e-3
    assert float(worst.median()) < 1e-5


# ---- the toy sums -------------------------------------------------------------------------------------------------


def benchmark(name: str) -> ModuleType:
    """A script of the folder benchmarks, as a module."""
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@lru_cache
def trained(task: str, seed: int) -> Any:
    return benchmark("lstm_toy").train(task, seed)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("task", ["addition", "subtraction"])
def test_toy_sums(task: str, seed: int) -> None:
    """Relevance of the numbers that count follows them under signal-take-all, and does not under prop.

    With ε = 0.001, which is not small beside the states of one unit, the stabiliser takes a part.
    """
    toy = benchmark("lstm_toy")
    net, sums, error = trained(task, seed)
    assert error < 1e-3  # of answers of variance 1.17

    def found(gates: str, epsilon: float) -> list[float]:
        correlation = toy.correlations(toy.relevance(net, sums, gates, epsilon), sums)
        return [correlation[0] / 100, correlation[1] / (100 if task == "addition" else -100)]

    assert min(found("all", 1e-6)) > 0.999
    assert min(found("all", 1e-3)) > 0.95
    assert max(map(abs, found("prop", 1e-6))) < 0.5
    assert max(map(abs, found("abs", 1e-6))) < 0.5
    assert max(found("half", 1e-6)) < 0.95
    assert min(found("gradient x input", 0)) > 0.999


@pytest.mark.parametrize("gates", GATES)
def test_toy_net_against_the_oracle(gates: str) -> None:
    toy = benchmark("lstm_toy")
    net, sums, _ = trained("subtraction", 1)
    scores = toy.relevance(net, sums, gates, 1e-3)
    params = {name: value.numpy() for name, value in net.lstm.state_dict().items()}
    w = net.out.weight.detach().numpy()
    for n in range(5):
        steps = int(sums.lengths[n])
        stack = Stack("lstm", params, sums.x[n, :steps].double().numpy())
        z = w @ stack.h[0]
        R = oracle.linear(w, np.zeros(1), stack.h[0], z, z, 1e-3, 0)
        expected, *_ = stack.backward(Recipe(1e-3, 0, gates), np.zeros_like(stack.output), [R])
        close(scores[n, :steps], expected, 1e-8)
