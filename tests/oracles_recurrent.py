"""Slow NumPy oracle of relevance in LSTM, GRU and RNN (facts: Arras et al. 2017, equations 1 to 3; 2019, section 3).

One sequence at a time, one unit at a time, in relevance R itself; the forward pass is spelled out too.  Nothing here
is shared with the engine or with torch.  Parameters are a dict of arrays under torch's names, gates in torch's order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray


@dataclass
class Recipe:
    """Parameters of the rules.  ``sums``: the accumulations are stabilised as linear maps are."""

    eps: float = 1e-3
    factor: float = 0.0
    gates: str = "all"
    sums: bool = True


def sign(z: float) -> float:
    return 1.0 if z >= 0 else -1.0


def linear(w: Array, b: Array, x: Array, z: Array, R: Array, eps: float, factor: float) -> Array:
    """R_i = Σ_k (x_i w_ki + δ (b_k + ε sign z_k) / N) / (z_k + ε sign z_k) R_k, for w (outputs, N)."""
    lower = np.zeros(len(x))
    for k in range(len(z)):
        denominator = z[k] + eps * sign(z[k])
        if denominator == 0:
            continue
        for_all = factor * (b[k] + eps * sign(z[k])) / len(x)
        lower += (w[k] * x + for_all) / denominator * R[k]
    return lower


def product(gate: Array, signal: Array, R: Array, rule: str) -> tuple[Array, Array]:
    """Relevance of gate and signal."""
    to_gate = np.zeros(len(R))
    for k in range(len(R)):
        g, s = gate[k], signal[k]
        if rule == "half":
            to_gate[k] = R[k] / 2
        elif rule == "prop":
            to_gate[k] = R[k] / 2 if g + s == 0 else g / (g + s) * R[k]
        elif rule == "abs":
            to_gate[k] = R[k] / 2 if g == s == 0 else abs(g) / (abs(g) + abs(s)) * R[k]
    return to_gate, R - to_gate


def summed(a: Array, b: Array, R: Array, recipe: Recipe) -> tuple[Array, Array]:
    """Relevance of the parts of c = a + b: a linear map with the weights (1, 1), and all parts of all units below."""
    one = np.eye(len(a))
    eps, factor = (recipe.eps, recipe.factor) if recipe.sums else (0.0, 0.0)
    lower = linear(np.hstack([one, one]), np.zeros(len(a)), np.concatenate([a, b]), a + b, R, eps, factor)
    return lower[: len(a)], lower[len(a) :]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def joint(p: dict[str, Array], rows: slice) -> tuple[Array, Array]:
    return np.hstack([p["weight_ih"], p["weight_hh"]])[rows], (p["bias_ih"] + p["bias_hh"])[rows]


@dataclass
class Run:
    """One layer in one direction on one sequence: every value that relevance needs, by step."""

    kind: str
    p: dict[str, Array]
    x: Array  # (steps, features), in the order in which the cell sees them
    h0: Array
    c0: Array
    values: list[dict[str, Any]] = field(default_factory=list)

    def forward(self) -> Run:
        h, c = self.h0, self.c0
        for x in self.x:
            v: dict[str, Any] = {"x": x, "h_before": h, "c_before": c}
            getattr(self, f"_{self.kind}")(v)
            h, c = v["h"], v.get("c", c)
            self.values.append(v)
        return self

    def _lstm(self, v: dict[str, Any]) -> None:
        w, b = joint(self.p, slice(None))
        v["lower"] = np.concatenate([v["x"], v["h_before"]])
        v["a"] = w @ v["lower"] + b
        i, f, g, o = np.split(v["a"], 4)
        v["i"], v["f"], v["g"], v["o"] = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
        v["c"] = v["f"] * v["c_before"] + v["i"] * v["g"]
        v["whole"] = v["o"] * np.tanh(v["c"])
        v["h"] = self.p["weight_hr"] @ v["whole"] if "weight_hr" in self.p else v["whole"]

    def _gru(self, v: dict[str, Any]) -> None:
        d = len(self.p["weight_hh"]) // 3
        w, b = joint(self.p, slice(0, 2 * d))
        v["lower"] = np.concatenate([v["x"], v["h_before"]])
        v["a"] = w @ v["lower"] + b
        v["r"], v["z"] = np.split(sigmoid(v["a"]), 2)
        v["m"] = self.p["weight_hh"][2 * d :] @ v["h_before"] + self.p["bias_hh"][2 * d :]
        v["rm"] = v["r"] * v["m"]
        v["a_n"] = self.p["weight_ih"][2 * d :] @ v["x"] + self.p["bias_ih"][2 * d :] + v["rm"]
        v["n"] = np.tanh(v["a_n"])
        v["h"] = (1 - v["z"]) * v["n"] + v["z"] * v["h_before"]

    def _rnn_tanh(self, v: dict[str, Any]) -> None:
        w, b = joint(self.p, slice(None))
        v["lower"] = np.concatenate([v["x"], v["h_before"]])
        v["a"] = w @ v["lower"] + b
        v["h"] = np.tanh(v["a"]) if self.kind == "rnn_tanh" else np.maximum(v["a"], 0)

    _rnn_relu = _rnn_tanh

    @property
    def output(self) -> Array:
        return np.array([v["h"] for v in self.values])

    def backward(self, R_output: Array, R_h: Array, R_c: Array, recipe: Recipe) -> tuple[Array, Array, Array]:
        """Relevance of x, h0 and c0 from that of the output at each step and of the last states."""
        R_x = np.zeros_like(self.x)
        for t in reversed(range(len(self.x))):
            way_back = getattr(self, f"_{self.kind}_back")
            R_x[t], R_h, R_c = way_back(self.values[t], R_h + R_output[t], R_c, recipe)
        return R_x, R_h, R_c

    def _lstm_back(self, v: dict[str, Any], R_h: Array, R_c: Array, recipe: Recipe) -> tuple[Array, Array, Array]:
        d, n = len(v["c"]), len(v["x"])
        if "weight_hr" in self.p:
            w = self.p["weight_hr"]
            R_h = linear(w, np.zeros(len(w)), v["whole"], v["h"], R_h, recipe.eps, recipe.factor)
        R_o, R_tanh = product(v["o"], np.tanh(v["c"]), R_h, recipe.gates)
        R_fc, R_ig = summed(v["f"] * v["c_before"], v["i"] * v["g"], R_c + R_tanh, recipe)
        R_f, R_c = product(v["f"], v["c_before"], R_fc, recipe.gates)
        R_i, R_g = product(v["i"], v["g"], R_ig, recipe.gates)
        R_a = np.concatenate([R_i, R_f, R_g, R_o])
        rows = slice(2 * d, 3 * d) if recipe.gates == "all" else slice(None)
        w, b = joint(self.p, rows)
        lower = linear(w, b, v["lower"], v["a"][rows], R_a[rows], recipe.eps, recipe.factor)
        return lower[:n], lower[n:], R_c

    def _gru_back(self, v: dict[str, Any], R_h: Array, R_c: Array, recipe: Recipe) -> tuple[Array, Array, Array]:
        d, n, e = len(v["h"]), len(v["x"]), recipe.eps
        R_new, R_old = summed((1 - v["z"]) * v["n"], v["z"] * v["h_before"], R_h, recipe)
        R_not_z, R_n = product(1 - v["z"], v["n"], R_new, recipe.gates)
        R_z, R_h = product(v["z"], v["h_before"], R_old, recipe.gates)
        w = np.hstack([self.p["weight_ih"][2 * d :], np.eye(d)])
        both = np.concatenate([v["x"], v["rm"]])
        lower = linear(w, self.p["bias_ih"][2 * d :], both, v["a_n"], R_n, e, recipe.factor)
        R_x = lower[:n]
        R_r, R_m = product(v["r"], v["m"], lower[n:], recipe.gates)
        w, b = self.p["weight_hh"][2 * d :], self.p["bias_hh"][2 * d :]
        R_h = R_h + linear(w, b, v["h_before"], v["m"], R_m, e, recipe.factor)
        w, b = joint(self.p, slice(0, 2 * d))
        lower = linear(w, b, v["lower"], v["a"], np.concatenate([R_r, R_z + R_not_z]), e, recipe.factor)
        return R_x + lower[:n], R_h + lower[n:], R_c

    def _rnn_tanh_back(self, v: dict[str, Any], R_h: Array, R_c: Array, recipe: Recipe) -> tuple[Array, Array, Array]:
        w, b = joint(self.p, slice(None))
        lower = linear(w, b, v["lower"], v["a"], R_h, recipe.eps, recipe.factor)
        return lower[: len(v["x"])], lower[len(v["x"]) :], R_c

    _rnn_relu_back = _rnn_tanh_back


class Stack:
    """Layers and directions on one sequence.

    ``params``: torch's state dict as arrays; ``state``: h0 and c0 by layer and direction, zeros if None.
    """

    def __init__(self, kind: str, params: dict[str, Array], x: Array, state: Any = None) -> None:
        self.runs: list[list[Run]] = []
        layer = 0
        while f"weight_ih_l{layer}" in params:
            runs = []
            for way in ("", "_reverse"):
                suffix = f"_l{layer}{way}"
                p = {k.removesuffix(suffix): v for k, v in params.items() if k.endswith(suffix)}
                if not p:
                    continue
                units = len(p["weight_hh"]) // {"lstm": 4, "gru": 3}.get(kind, 1)
                p.setdefault("bias_ih", np.zeros(len(p["weight_hh"])))
                p.setdefault("bias_hh", np.zeros(len(p["weight_hh"])))
                number = sum(len(done) for done in self.runs) + len(runs)
                h0 = np.zeros(p["weight_hh"].shape[1]) if state is None else state[0][number]
                c0 = np.zeros(units) if state is None or kind != "lstm" else state[1][number]
                runs.append(Run(kind, p, x[::-1] if way else x, h0, c0).forward())
            self.runs.append(runs)
            x = np.hstack([run.output[::-1] if way else run.output for way, run in enumerate(runs)])
            layer += 1
        self.output = x
        self.h = [run.output[-1] for runs in self.runs for run in runs]
        self.c = [run.values[-1].get("c", run.c0) for runs in self.runs for run in runs]

    def backward(
        self, recipe: Recipe, R_output: Array, R_h: list[Array] | None = None, R_c: list[Array] | None = None
    ) -> tuple[Array, list[Array], list[Array]]:
        """Relevance of the input, (steps, features), and of the first states, by layer and direction."""
        R_h = [np.zeros_like(h) for h in self.h] if R_h is None else R_h
        R_c = [np.zeros_like(c) for c in self.c] if R_c is None else R_c
        first_h, first_c = [], []
        number = len(self.h)
        for runs in reversed(self.runs):
            number -= len(runs)
            below, start = 0.0, 0
            ends = []
            for way, run in enumerate(runs):
                units = run.output.shape[1]
                mine = R_output[:, start : start + units]
                start += units
                mine = mine[::-1] if way else mine
                R_x, *end = run.backward(mine, R_h[number + way], R_c[number + way], recipe)
                below = below + (R_x[::-1] if way else R_x)
                ends.append(end)
            first_h = [end[0] for end in ends] + first_h
            first_c = [end[1] for end in ends] + first_c
            R_output = below
        return R_output, first_h, first_c
