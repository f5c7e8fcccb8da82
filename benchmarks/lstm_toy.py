"""The toy sums of Arras et al. 2019: does relevance in an LSTM go to the numbers that count?

    python benchmarks/lstm_toy.py

An LSTM of one unit reads 4 to 10 numbers of 0.5 to 1, either sign, of which two count, and learns n_a + n_b or
n_a - n_b.  Printed: correlation (%) of the relevance of step a with n_a, and of step b with n_b, over test sequences,
mean and standard deviation over trainings, also to benchmarks/results/lstm_toy.csv.  The published figures are quoted
from memory, without their text at hand; how the distractors were coded there is our reading.  The stabiliser is shown
in two sizes: states of such a net are small, and 0.001 takes a share that grows with the way back to the number.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from pfungst.errors import RelevanceError
from pfungst.lrp import LRP
from pfungst.lrp.presets import arras

TASKS = ("addition", "subtraction")
SHORTEST, LONGEST = 4, 10
# Recalled: correlation of the relevance at a and at b.
PUBLISHED = {
    ("addition", "gradient x input"): (99.960, 99.954),
    ("addition", "all"): (99.995, 99.995),
    ("addition", "prop"): (0.785, 10.1),
    ("subtraction", "gradient x input"): (97.9, -98.8),
    ("subtraction", "all"): (98.5, -99.3),
    ("subtraction", "prop"): (3.1, -8.4),
}
METHODS = ("gradient x input", "all", "half", "abs", "prop")


@dataclass(frozen=True)
class Sums:
    """Sequences of a task: x (n, steps, 2 or 3), their lengths, the places a < b of the numbers that count, and those.

    The first feature holds distractors, the others the two numbers: one feature for both, or, where their order
    matters, one each.
    """

    x: Tensor
    lengths: Tensor
    places: Tensor  # (n, 2)
    numbers: Tensor  # (n, 2)
    answer: Tensor


def draw(task: str, n: int, generator: torch.Generator) -> Sums:
    """Sequences of a task, drawn."""
    lengths = torch.randint(SHORTEST, LONGEST + 1, (n,), generator=generator)
    sign = torch.randint(0, 2, (n, LONGEST), generator=generator) * 2.0 - 1
    numbers = (0.5 + torch.rand(n, LONGEST, generator=generator) / 2) * sign
    outside = torch.arange(LONGEST) >= lengths[:, None]
    places = torch.rand(n, LONGEST, generator=generator).masked_fill(outside, 2).argsort(1)[:, :2].sort(1).values
    counting = numbers.gather(1, places)
    x = torch.zeros(n, LONGEST, 2 if task == "addition" else 3)
    x[..., 0] = numbers.masked_fill(outside, 0).scatter(1, places, 0)
    rows = torch.arange(n)
    x[rows, places[:, 0], 1] = counting[:, 0]
    x[rows, places[:, 1], x.shape[2] - 1] = counting[:, 1]
    answer = counting[:, 0] + counting[:, 1] * (1 if task == "addition" else -1)
    return Sums(x, lengths, places, counting, answer)


class OneUnit(nn.Module):
    """An LSTM of one unit, read at the end of each sequence through one weight."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, 1, batch_first=True)
        self.out = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            self.lstm.bias_ih_l0[1] = 2  # of the forget gate: remember

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.out(self.lstm(packed)[1][0][-1])


def train(task: str, seed: int, n: int = 1000, good: float = 1e-3) -> tuple[OneUnit, Sums, float]:
    """A trained net, fresh sequences, and its mean squared error on them.  Starts again where training gets stuck."""
    generator = torch.Generator().manual_seed(seed)
    taught, fresh = draw(task, n, generator), draw(task, n, generator)
    with torch.random.fork_rng():
        for start in range(10):
            torch.manual_seed(100 * seed + start)
            net = OneUnit(taught.x.shape[2])
            optimiser = torch.optim.LBFGS(
                net.parameters(), max_iter=300, history_size=20, line_search_fn="strong_wolfe"
            )

            def loss(net: OneUnit = net, optimiser: torch.optim.LBFGS = optimiser) -> Tensor:
                optimiser.zero_grad()
                error = (net(taught.x, taught.lengths)[:, 0] - taught.answer).square().mean()
                # The penalty keeps the unit from tiny states read through a huge weight.
                total = error + 1e-6 * net.out.weight.square().sum()
                total.backward()
                return total

            optimiser.step(loss)
            with torch.no_grad():
                error = float((net(fresh.x, fresh.lengths)[:, 0] - fresh.answer).square().mean())
            if error < good:
                return net.double().eval(), fresh, error
    raise RelevanceError(f"{task}, seed {seed}: no start of ten learnt the task", "try another seed")


def relevance(net: OneUnit, sums: Sums, method: str, epsilon: float) -> Tensor:
    """Relevance of every input entry, by a gate rule or the gradient times the input."""
    x = sums.x.double()
    if method == "gradient x input":
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(net(x, sums.lengths).sum(), x)
        return (gradient * x).detach()
    return LRP(lambda v: net(v, sums.lengths), arras(epsilon, gates=method))(x, 0).scores


def correlations(scores: Tensor, sums: Sums) -> tuple[float, float]:
    """In per cent: relevance of step a with n_a, and of step b with n_b."""
    by_step = scores.sum(2).gather(1, sums.places)
    pairs = [torch.stack([by_step[:, i], sums.numbers[:, i].double()]) for i in (0, 1)]
    at_a, at_b = (100 * float(torch.corrcoef(pair)[0, 1]) for pair in pairs)
    return at_a, at_b


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="trainings of each task")
    arguments = parser.parse_args()
    table = Path(__file__).parent / "results" / "lstm_toy.csv"
    with table.open("w", newline="") as handle:
        fields = ("task", "method", "epsilon", "a", "a_sd", "b", "b_sd", "published_a_recalled", "published_b_recalled")
        writer = csv.writer(handle)
        writer.writerow(fields)
        for task in TASKS:
            trained = [train(task, seed) for seed in range(arguments.seeds)]
            print(f"{task}: mean squared error {max(error for *_, error in trained):.1e} or less")
            for method in METHODS:
                for epsilon in (0.0,) if method == METHODS[0] else (1e-3, 1e-6):
                    both = [correlations(relevance(net, s, method, epsilon), s) for net, s, _ in trained]
                    mean, deviation = torch.tensor(both).mean(0), torch.tensor(both).std(0)
                    figures = [f"{float(v):.3f}" for pair in zip(mean, deviation, strict=True) for v in pair]
                    row = [task, method, f"{epsilon:g}", *figures, *PUBLISHED.get((task, method), ("", ""))]
                    writer.writerow(row)
                    print(*(f"{value!s:>18}" for value in row), flush=True)


if __name__ == "__main__":
    main()
