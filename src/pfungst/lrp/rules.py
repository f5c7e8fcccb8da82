"""The rules: how one linear node shares its relevance out among its inputs.

Notation (Bach et al. 2015): inputs x, weights w, ``z = W x + b``, relevance R.  ``⁺`` and ``⁻`` are positive and
negative parts.  Between nodes the engine carries c = R / activation (see ``engine.py``), so a rule receives c at the
output, where R = c z, and returns c at the input, where R = c x.  Rules for the input layer return R itself
(``carries_relevance``), because they give relevance to inputs whose value is zero.

Every rule also returns ``absorbed``: the relevance that did not go to the inputs but to bias and stabiliser, or was
lost where nothing could take it.  It is computed from these, never as a difference of R before and after, so that the
ledger checks the rule.
Slow float64 oracles of the same names: ``tests/oracles.py``.

Speed: on a CPU each pass over a large tensor counts, a mask of booleans as five, new memory as two.  Hence the
in-place operations, on tensors made here only, and masks of floats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pfungst.errors import RelevanceError, SettingError
from pfungst.lrp.operators import LinearOperator, Scratch, quotient, row_dots, row_sums


class Shared(NamedTuple):
    """What a rule returns: ``input`` (shape of x) is c, or R for rules of the input layer.

    ``absorbed``: of any shape whose leading axis is the output's, such as (rows,); None for nothing.
    """

    input: Tensor
    absorbed: Tensor | None


@dataclass(frozen=True)
class LinearCall:
    """One linear call of the forward pass, as a rule sees it.

    ``known_nonnegative``: every entry of x is known to be >= 0, which halves the work of the signed rules.
    ``bounds``: smallest and greatest value of x (broadcast to its shape), only where the preset needs them.
    ``rectified``: y is the output's positive part, and c is 0 where y is 0.
    ``scratch``: memory for changed weights.
    """

    op: LinearOperator
    x: Tensor
    y: Tensor
    known_nonnegative: bool = False
    bounds: tuple[Tensor, Tensor] | None = None
    rectified: bool = False
    scratch: Scratch = field(default_factory=Scratch)
    _parts: dict[int, Tensor] = field(default_factory=dict)

    @cached_property
    def nonnegative(self) -> bool:
        """Every entry of x is >= 0: known, or seen by looking.

        A GPU would have to wait for the answer, and cannot within a graph that it records: there nobody looks.
        """
        return self.known_nonnegative or (self.x.is_cpu and bool(self.x.amin() >= 0))

    def relevance(self, c: Tensor, slot: str = "relevance") -> Tensor:
        """R = c y, in a slot of the scratch memory."""
        return torch.mul(c, self.y, out=self.scratch.take(slot, self.y))

    def weight(self, sign: int) -> Tensor:
        """Positive (1) or negative (-1) part of the weights."""
        if sign not in self._parts:
            self._parts[sign] = self.op.part(sign, self.scratch)
        return self._parts[sign]

    def favoured(self, sign: int, gamma: float) -> Tensor:
        """W + γW⁺, or W + γW⁻ for sign -1."""
        out = self.scratch.take(f"favoured {sign}", self.op.weight)
        return torch.add(self.op.effective(self.scratch), self.weight(sign), alpha=gamma, out=out)

    def bias(self, sign: int) -> Tensor | None:
        """Positive or negative part of the bias."""
        if self.op.bias is None:
            return None
        return self.op.bias.clamp(min=0) if sign > 0 else self.op.bias.clamp(max=0)

    def contributions(self, sign: int) -> Tensor:
        """z⁺ = W⁺x⁺ + W⁻x⁻ + b⁺: the sum of all positive contributions, that of the bias included; sign -1: z⁻.

        z⁻ is not z - z⁺: where it is small, only rounding errors would be left of it.
        """
        if self.nonnegative:
            return self.op.forward(self.x, self.weight(sign), self.bias(sign))
        above, below = self.x.clamp(min=0), self.x.clamp(max=0)
        if self.op.joins:
            weight = torch.cat((self.weight(sign), self.weight(-sign)), 1)
            return self.op.forward(torch.cat((above, below), 1), weight, self.bias(sign))
        z = self.op.forward(above, self.weight(sign), self.bias(sign))
        return z.add_(self.op.forward(below, self.weight(-sign)))

    def backward(self, s: Tensor, *, spent: bool = False) -> Tensor:
        """Send s back along all contributions: Wᵀs.  ``spent``: nobody needs s any more, it may be written over."""
        return self.op.transpose_effective(s, self.x, self.scratch, spent)

    def signed_backward(
        self, s_positive: Tensor, s_negative: Tensor | None, weight: Callable[[int], Tensor] | None = None
    ) -> Tensor:
        """Send s⁺ back along positive contributions x w > 0, and s⁻ along negative ones.

        ``weight(sign)``: the weights of such contributions where x >= 0; W⁺ and W⁻ by default.
        """
        weights = weight or self.weight
        streams = [(s_positive, 1)] if s_negative is None else [(s_positive, 1), (s_negative, -1)]

        def along(sign: int) -> Tensor:
            """What arrives where x has this sign."""
            arrived = [self.op.transpose(s, weights(sign * kind), self.x) for s, kind in streams]
            return arrived[0] if len(arrived) == 1 else arrived[0].add_(arrived[1])

        if self.nonnegative:
            return along(1)
        if not self.op.joins:
            return torch.where(self.x >= 0, along(1), along(-1))
        twice = torch.cat((self.x, self.x), 1)  # of which only the shape matters
        both = [
            self.op.transpose(s, torch.cat((weights(kind), weights(-kind)), 1), twice).chunk(2, 1)
            for s, kind in streams
        ]
        above, below = (sum(parts[1:], parts[0]) for parts in zip(*both, strict=True))
        return torch.where(self.x >= 0, above, below)

    def taken_by_bias(self, s: Tensor, sign: int = 0) -> Tensor | None:
        """Σ s b in each row (sign 0), or with the positive or negative part of b; None without a bias."""
        bias = self.bias(sign) if sign else self.op.bias
        return None if bias is None else self.op.dot_bias(s, bias)


def _sum(*parts: Tensor | None) -> Tensor | None:
    """The sum of the parts that there are."""
    total: Tensor | None = None
    for part in parts:
        total = part if total is None else total if part is None else total + part
    return total


def _stabilised(z: Tensor, epsilon: float) -> Tensor:
    """z + ε sign(z), where sign(0) = +1 (np.sign would leave a division by zero)."""
    return torch.where(z >= 0, z + epsilon, z - epsilon) if epsilon else z


def _divide_by_sum(relevance: Tensor, z: Tensor) -> tuple[Tensor, Tensor | None]:
    """relevance / z for sums z >= 0, written over ``relevance`` and ``z``; 0 where z is 0, or negative by rounding.

    Also the relevance lost there, (rows,).  On a GPU nothing waits for the values of z; on a CPU looking is cheaper.
    """
    tiny = torch.finfo(z.dtype).tiny
    if z.device.type == "cpu" and bool(z.amin() > tiny):
        return relevance.div_(z), None
    dead = torch.le(z, tiny, out=torch.empty_like(z))  # as 1.0 and 0.0
    lost = row_sums(dead * relevance)
    return relevance.div_(torch.threshold_(z, tiny, torch.inf)), lost


@dataclass(frozen=True)
class Rule:
    """Base of all rules.  Frozen: a rule is a value, two equal rules do the same."""

    carries_relevance = False  # True: ``share`` returns R instead of c; only for the input layer

    @property
    def reads_input(self) -> bool:
        """Values of x matter, and not its shape alone: then x is kept for the way back."""
        return True

    @property
    def label(self) -> str:
        """The rule with its parameters, as printed by ``plan`` and written into a run."""
        numbers = {k: v for k, v in vars(self).items() if isinstance(v, int | float)}
        # Digits enough to tell rules apart: labels go into the identity of a run.
        fields = ", ".join(f"{k}={v:g}" if float(f"{v:g}") == v else f"{k}={v!r}" for k, v in numbers.items())
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

    @property
    def reads_input(self) -> bool:
        return False

    def ratio(self, relevance: Tensor, z: Tensor) -> Tensor:
        """R / (z + ε sign z), 0 where that is 0 / 0."""
        return quotient(relevance, _stabilised(z, self.epsilon))

    def share(self, call: LinearCall, c: Tensor) -> Shared:
        if not self.epsilon:
            return Shared(call.backward(c), call.taken_by_bias(c))
        epsilon = max(self.epsilon, torch.finfo(c.dtype).tiny)  # |z| + ε is never 0
        if call.rectified:
            s = torch.add(call.y, epsilon, out=call.scratch.take("stabilised", call.y))
            torch.addcdiv(c, c, s, value=-epsilon, out=s)
            bias = s.new_full((1,), epsilon) if call.op.bias is None else call.op.bias + epsilon
            with_bias = call.op.dot_bias(s, bias)  # the stabiliser is one more bias
            return Shared(call.backward(s, spent=True), with_bias)
        # With t = c / (|z| + ε) the stabiliser absorbs ε z t, and |z| t = c - ε t goes back.
        t = torch.abs(call.y, out=call.scratch.take("stabilised", call.y)).add_(epsilon)
        torch.div(c, t, out=t)
        stabilised = row_dots(call.y, t).mul_(epsilon)
        s = torch.add(c, t, alpha=-epsilon, out=t)
        absorbed = _sum(stabilised, call.taken_by_bias(s))
        return Shared(call.backward(s, spent=True), absorbed)


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

    @property
    def reads_input(self) -> bool:
        return self.bias_factor > 0

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
        spread = quotient(s * self.bias_share(call.y, call.op.bias), call.op.forward(torch.ones_like(call.x[:1]), ones))
        # What falls on an input of zero cannot be carried as R / x.
        carried = (call.x.abs() > torch.finfo(call.x.dtype).tiny).to(call.x.dtype)
        extra = quotient(call.op.transpose(spread, ones, call.x), call.x)
        return Shared(shared.input + extra, _sum(shared.absorbed, -row_sums(spread * call.op.forward(carried, ones))))


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
        s_negative, lost_negative, bias_negative = None, None, None
        if self.beta:
            # -β R / z⁻ with both signs turned, so that the sum is >= 0.
            relevance = call.relevance(c, "relevance -").mul_(self.beta)
            s_negative, lost_negative = _divide_by_sum(relevance, call.contributions(-1).neg_())
            lost_negative = None if lost_negative is None else -lost_negative
            bias_negative = call.taken_by_bias(s_negative, -1)
        relevance = call.relevance(c)
        if self.alpha != 1:
            relevance.mul_(self.alpha)
        s_positive, lost_positive = _divide_by_sum(relevance, call.contributions(1))
        absorbed = _sum(lost_positive, lost_negative, call.taken_by_bias(s_positive, 1), bias_negative)
        return Shared(call.signed_backward(s_positive, s_negative), absorbed)


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
        z_positive = call.contributions(1)
        # z⁻ = y - z⁺ is good enough here: it is used where y < 0 only, where both terms are negative.
        below = self._side(c, -call.y, z_positive - call.y)
        above = self._side(c, call.y, z_positive)
        absorbed = [call.taken_by_bias(above), call.taken_by_bias(above * self.gamma, 1)]
        s_negative = None
        if below.numel() and any(bool(end != 0) for end in below.aminmax()):  # behind a ReLU, say, there is none
            s_negative = below
            absorbed += [call.taken_by_bias(below), call.taken_by_bias(below * self.gamma, -1)]
        c_input = call.signed_backward(above, s_negative, lambda sign: call.favoured(sign, self.gamma))
        return Shared(c_input, _sum(*absorbed))

    def _side(self, c: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """c y / (y + γz) where y > 0, else 0; ``z`` >= 0 there is written over."""
        live = torch.gt(y, 0, out=torch.empty_like(y))  # as 1.0 and 0.0
        share = live.mul_(c).mul_(y)
        return share.div_(y.clamp(min=torch.finfo(y.dtype).tiny).add_(z.clamp_(min=0), alpha=self.gamma))


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
        c_input = quotient(relevance, call.x)
        return Shared(c_input, row_sums(relevance.sub_(c_input * call.x)))


@dataclass(frozen=True)
class _Shares(Rule):
    """Rules whose shares do not depend on x: R_i = Σ_k v_ik / Σ_i v_ik · R_k for some weights v >= 0."""

    carries_relevance = True

    def _share(self, call: LinearCall, c: Tensor, change: Callable[[Tensor], Tensor]) -> Shared:
        weight = change(call.op.effective(call.scratch))
        total = call.op.forward(torch.ones_like(call.x[:1]), weight)
        s, lost = _divide_by_sum(c * call.y, total)
        return Shared(call.op.transpose(s, weight, call.x), lost)


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
        # Bounds that are the same for all samples need one sample's work.
        low_once, high_once = (bound[:1] if bound.stride(0) == 0 else bound for bound in call.bounds)
        relevance = c * call.y
        total = call.op.forward(call.x, call.op.effective(call.scratch))
        total -= call.op.forward(low_once, call.weight(1))
        total -= call.op.forward(high_once, call.weight(-1))
        s = quotient(relevance, total)
        shared = call.backward(s).mul_(call.x)
        shared -= call.op.transpose(s, call.weight(1), call.x).mul_(low)
        shared -= call.op.transpose(s, call.weight(-1), call.x).mul_(high)
        return Shared(shared, row_sums(relevance.sub_(total.mul_(s))))
