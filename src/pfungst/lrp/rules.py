"""The rules: how one linear node shares its relevance out among its inputs.

Notation (Bach et al. 2015): inputs x, weights w, ``z = W x + b``, relevance R.  ``⁺`` and ``⁻`` are positive and
negative parts.  Between nodes the engine carries c = R / activation (see ``engine.py``), so a rule receives c at the
output, where R = c z, and returns c at the input, where R = c x.  Rules for the input layer return R itself
(``carries_relevance``), because they give relevance to inputs whose value is zero.

Every rule also returns ``reached``: the part of the output's relevance R that its inputs received, entry by entry
of the output.  ``R - reached`` was absorbed by bias and stabiliser and goes to the ledger.
Slow float64 oracles of the same names: ``tests/oracles.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pfungst.errors import RelevanceError, SettingError
from pfungst.lrp.operators import LinearOperator


class Shared(NamedTuple):
    """What a rule returns: ``input`` (shape of x) is c, or R for rules of the input layer; ``reached`` see above."""

    input: Tensor
    reached: Tensor


@dataclass(frozen=True)
class LinearCall:
    """One linear call of the forward pass, as a rule sees it.

    ``nonnegative``: every entry of x is known to be >= 0, which halves the work of the signed rules.
    ``bounds``: smallest and greatest value of x (broadcast to its shape), only where the preset needs them.
    """

    op: LinearOperator
    x: Tensor
    y: Tensor
    nonnegative: bool
    bounds: tuple[Tensor, Tensor] | None = None

    def backward(self, s: Tensor, weight: Tensor) -> Tensor:
        return self.op.transpose(s, weight, self.x)

    def positive(self) -> Tensor:
        """z⁺ = W⁺x⁺ + W⁻x⁻ + b⁺: the sum of all positive contributions, the positive part of the bias included."""
        return self._part({"min": 0}, {"max": 0})

    def negative(self) -> Tensor:
        """z⁻ = W⁻x⁺ + W⁺x⁻ + b⁻.  Not z - z⁺: where z⁻ is small, only rounding errors would be left of it."""
        return self._part({"max": 0}, {"min": 0})

    def _part(self, sign: dict[str, int], opposite: dict[str, int]) -> Tensor:
        """Contributions of one sign: weights clamped to it where x >= 0, to the opposite one where x < 0."""
        w = self.op.weight
        if self.nonnegative:
            z = self.op.forward(self.x, w.clamp(**sign))
        else:
            z = self.op.forward(self.x.clamp(min=0), w.clamp(**sign))
            z = z + self.op.forward(self.x.clamp(max=0), w.clamp(**opposite))
        return z if self.op.bias is None else z + self.op.bias.clamp(**sign)

    def signed_backward(self, s_positive: Tensor, s_negative: Tensor | None) -> Tensor:
        """Send s⁺ back along positive contributions x w > 0, and s⁻ along negative ones."""
        w_positive, w_negative = self.op.weight.clamp(min=0), self.op.weight.clamp(max=0)
        c = self.backward(s_positive, w_positive)
        if s_negative is not None:
            c = c + self.backward(s_negative, w_negative)
        if self.nonnegative:
            return c
        below = self.backward(s_positive, w_negative)
        if s_negative is not None:
            below = below + self.backward(s_negative, w_positive)
        return torch.where(self.x >= 0, c, below)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and 0 where the denominator is 0 (or so small that the quotient would overflow)."""
    small = denominator.abs() <= torch.finfo(denominator.dtype).tiny
    return torch.where(small, 0, numerator / denominator.masked_fill(small, 1))


def _stabilised(z: Tensor, epsilon: float) -> Tensor:
    """z + ε sign(z), where sign(0) = +1 (np.sign would leave a division by zero)."""
    return torch.where(z >= 0, z + epsilon, z - epsilon) if epsilon else z


def _weighted(call: LinearCall, y: Tensor, s: Tensor) -> Tensor:
    """Σ over the inputs of x w s for each output: s (z - b)."""
    return s * y if call.op.bias is None else s * (y - call.op.bias)


@dataclass(frozen=True)
class Rule:
    """Base of all rules.  Frozen: a rule is a value, two equal rules do the same."""

    carries_relevance = False  # True: ``share`` returns R instead of c; only for the input layer

    @property
    def label(self) -> str:
        """The rule with its parameters, as printed by ``plan`` and written into a run."""
        fields = ", ".join(f"{k}={v:g}" for k, v in vars(self).items() if isinstance(v, int | float))
        return f"{type(self).__name__}({fields})"

    def share(self, call: LinearCall, c: Tensor) -> Shared:
        """Share out relevance.  ``c`` (shape of the output) is R / z."""
        raise NotImplementedError

    def check_place(self, raw: bool, node: str) -> None:
        """Refuse a rule that returns R where the node's input does not carry R (``marks.Mark.raw``)."""
        if self.carries_relevance and not raw:
            raise RelevanceError(
                f"rule {self.label} at node {node!r}: it gives relevance to inputs that are zero, "
                "which only the input layer can hand on",
                "use it at position 'input' only, and let the model do no arithmetic but normalisation before it",
            )


@dataclass(frozen=True)
class Epsilon(Rule):
    """Share relevance in proportion to each input's contribution; a small term absorbs the rest.

    R_i = Σ_k x_i w_ik / (z_k + ε sign z_k) · R_k.   ε = 0 is LRP-0 (the gradient times the input).

    Source: Bach et al. 2015, equation 58.
    """

    epsilon: float = 1e-6  # in units of z, >= 0; large values smooth the map and absorb more

    def __post_init__(self) -> None:
        if not self.epsilon >= 0:
            raise SettingError(f"epsilon is {self.epsilon}, it must be >= 0", "give 1e-6, or 0.01 as in the talk")

    def ratio(self, relevance: Tensor, z: Tensor) -> Tensor:
        """R / (z + ε sign z), 0 where that is 0 / 0."""
        return _divide(relevance, _stabilised(z, self.epsilon))

    def share(self, call: LinearCall, c: Tensor) -> Shared:
        s = _divide(c * call.y, _stabilised(call.y, self.epsilon)) if self.epsilon else c
        return Shared(call.backward(s, call.op.weight), _weighted(call, call.y, s))


@dataclass(frozen=True)
class Recurrent(Epsilon):
    """As epsilon, for LSTM, GRU and RNN: their accumulations are stabilised too, and the bias may be shared out.

    R_i = Σ_k (x_i w_ik + δ (b_k + ε sign z_k) / N) / (z_k + ε sign z_k) · R_k, with N inputs i in reach of k.
    In the sums f·c + i·g of a cell all 2d summands of its d units count as in reach.

    Source: Arras et al. 2017, equation 1 (whose δ is 0 in all experiments but the test of conservation).
    """

    epsilon: float = 1e-3
    bias_factor: float = 0.0  # δ, 0 to 1: share of bias and stabiliser that the inputs get, evenly, zeros too

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.bias_factor <= 1:
            raise SettingError(f"bias_factor is {self.bias_factor}, it must lie between 0 and 1", "give 0 (or 1)")

    def bias_share(self, z: Tensor, bias: Tensor | None) -> Tensor:
        """δ (b + ε sign z)."""
        stabiliser = torch.full_like(z, self.epsilon).copysign(torch.where(z >= 0, 1, -1))
        return self.bias_factor * (stabiliser if bias is None else bias + stabiliser)

    def share(self, call: LinearCall, c: Tensor) -> Shared:
        shared = super().share(call, c)
        if not self.bias_factor:
            return shared
        s = self.ratio(c * call.y, call.y)
        ones = torch.ones_like(call.op.weight)
        spread = _divide(s * self.bias_share(call.y, call.op.bias), call.op.forward(torch.ones_like(call.x[:1]), ones))
        # What falls on an input of zero cannot be carried as R / x.
        carried = (call.x.abs() > torch.finfo(call.x.dtype).tiny).to(call.x.dtype)
        extra = _divide(call.backward(spread, ones), call.x)
        return Shared(shared.input + extra, shared.reached + spread * call.op.forward(carried, ones))


@dataclass(frozen=True)
class AlphaBeta(Rule):
    """Share positive and negative contributions apart, weighted α and -β, with α - β = 1.

    R_i = Σ_k (α (x_i w_ik)⁺ / z_k⁺ - β (x_i w_ik)⁻ / z_k⁻) R_k.   b⁺ counts to z⁺, b⁻ to z⁻.
    α = 1, β = 0 is z+, also known as Deep Taylor for ReLU inputs, and excitation backpropagation.

    Source: Bach et al. 2015, equation 60 (whose β has the other sign); the talk's β is ours.
    """

    alpha: float = 2.0  # >= 1
    beta: float = 1.0  # >= 0, α - 1

    def __post_init__(self) -> None:
        if not (self.beta >= 0 and abs(self.alpha - self.beta - 1) < 1e-9):
            raise SettingError(
                f"alpha={self.alpha}, beta={self.beta}: alpha - beta must be 1 and beta >= 0",
                "give for example alpha=2, beta=1",
            )

    def share(self, call: LinearCall, c: Tensor) -> Shared:
        relevance = c * call.y
        z_positive = call.positive()
        s_positive = _divide(self.alpha * relevance, z_positive)
        s_negative = None
        reached = s_positive * z_positive
        if self.beta:
            z_negative = call.negative()
            s_negative = -_divide(self.beta * relevance, z_negative)
            reached = reached + s_negative * z_negative
        if call.op.bias is not None:
            reached = reached - s_positive * call.op.bias.clamp(min=0)
            if s_negative is not None:
                reached = reached - s_negative * call.op.bias.clamp(max=0)
        return Shared(call.signed_backward(s_positive, s_negative), reached)


@dataclass(frozen=True)
class ZPlus(AlphaBeta):
    """Share relevance among the positive contributions only: α = 1, β = 0.

    Bounded and smooth, but blind to evidence against; through many layers its maps forget the class
    (Sixt et al. 2020), so ``plan`` measures that.  Source: Montavon et al. 2017.
    """

    alpha: float = 1.0
    beta: float = 0.0

    @property
    def label(self) -> str:
        return "ZPlus()"


@dataclass(frozen=True)
class Gamma(Rule):
    """As epsilon, with positive weights made (1 + γ) times as strong.

    Where z_k > 0: contributions x_i w_ik + γ (x_i w_ik)⁺, the bias b + γ b⁺; where z_k < 0 the mirror image
    with negative parts, so that signed inputs and outputs are right too.  γ = 0 is LRP-0, γ → ∞ is z+.

    Source: Montavon et al. 2019, section 10.2.1; the signed form: Andéol et al. 2021.
    """

    gamma: float = 0.25  # >= 0

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise SettingError(f"gamma is {self.gamma}, it must be >= 0", "give for example 0.25")

    def share(self, call: LinearCall, c: Tensor) -> Shared:
        y, g = call.y, self.gamma
        z_positive = call.positive()
        z_negative = y - z_positive  # used where y < 0 only, where both terms are negative and no digit is lost
        relevance = c * y
        zero = torch.zeros((), dtype=y.dtype, device=y.device)
        above = torch.where(y > 0, _divide(relevance, y + g * z_positive), zero)
        below = torch.where(y < 0, _divide(relevance, y + g * z_negative), zero)
        s = above + below
        c_input = call.backward(s, call.op.weight) + g * call.signed_backward(above, below)
        reached = _weighted(call, y, s) + g * (above * z_positive + below * z_negative)
        if call.op.bias is not None:
            bias = call.op.bias
            reached = reached - g * (above * bias.clamp(min=0) + below * bias.clamp(max=0))
        return Shared(c_input, reached)


@dataclass(frozen=True)
class Pass(Rule):
    """Hand relevance on unchanged; input and output must have one shape."""

    def share(self, call: LinearCall, c: Tensor) -> Shared:
        if call.x.shape != call.y.shape:
            raise RelevanceError(
                f"rule Pass: input {tuple(call.x.shape)} and output {tuple(call.y.shape)} differ in shape",
                "give this node another rule",
            )
        relevance = c * call.y
        # Where x is 0 nothing can be carried as R / x; the ledger says how much that is.
        c_input = _divide(relevance, call.x)
        return Shared(c_input, c_input * call.x)


@dataclass(frozen=True)
class _Shares(Rule):
    """Rules whose shares do not depend on x: R_i = Σ_k v_ik / Σ_i v_ik · R_k for some weights v >= 0."""

    carries_relevance = True

    def _share(self, call: LinearCall, c: Tensor, change: Callable[[Tensor], Tensor]) -> Shared:
        weight = change(call.op.weight)
        relevance = c * call.y
        total = call.op.forward(torch.ones_like(call.x[:1]), weight)
        s = _divide(relevance, total)
        return Shared(call.backward(s, weight), s * total)


@dataclass(frozen=True)
class Flat(_Shares):
    """Share relevance evenly over the inputs in reach (padding gets none).  Source: Bach et al. 2016 (ICIP)."""

    def share(self, call: LinearCall, c: Tensor) -> Shared:
        return self._share(call, c, torch.ones_like)


@dataclass(frozen=True)
class WSquare(_Shares):
    """Share relevance in proportion to the squared weights; the bias takes none.

    Source: Montavon et al. 2017, for inputs that are any real number.
    """

    def share(self, call: LinearCall, c: Tensor) -> Shared:
        return self._share(call, c, torch.square)


@dataclass(frozen=True)
class ZBox(Rule):
    """z^B: for inputs that lie between known bounds l <= x <= h, such as pixels.

    R_i = Σ_k (x_i w_ik - l_i w_ik⁺ - h_i w_ik⁻) / Σ_i (same) · R_k;  the bias takes none.
    The bounds are those of the node's own input, ``LRP(..., bounds=(low, high))`` gives them.

    Source: Montavon et al. 2017.
    """

    carries_relevance = True

    def share(self, call: LinearCall, c: Tensor) -> Shared:
        if call.bounds is None:
            raise SettingError(
                "rule z^B needs the smallest and greatest input value",
                "LRP(model, preset, bounds=(low, high)): numbers, or tensors that broadcast against the input",
            )
        low, high = call.bounds
        w = call.op.weight
        w_positive, w_negative = w.clamp(min=0), w.clamp(max=0)
        total = call.op.forward(call.x, w)
        total = total - call.op.forward(low, w_positive) - call.op.forward(high, w_negative)
        s = _divide(c * call.y, total)
        shared = call.x * call.backward(s, w)
        shared = shared - low * call.backward(s, w_positive) - high * call.backward(s, w_negative)
        return Shared(shared, s * total)
