"""Presets: ordered rows "kind of node, position, name pattern -> rule"; the first row that fits decides.

The names are those that users of zennit and iNNvestigate know.  ``preset("epsilon-plus")`` (``preset_files.py``) makes
one with its defaults; the functions below take parameters: ``epsilon_plus(epsilon=0.01)`` is the talk's hybrid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from pfungst.errors import SettingError
from pfungst.lrp.rules import AlphaBeta, Epsilon, Flat, Gamma, Recurrent, Rule, ZBox, ZPlus

KINDS = ("convolution", "dense", "batch_norm", "recurrent")
GATES = ("all", "half", "prop", "abs")
ATTENTION = ("attnlrp", "constant")
NORMS = ("detached", "identity")
PRE_ACTIVATION = ("switch", "threshold", "diagonal")
MAX_POOL = ("winner", "proportional")


@dataclass(frozen=True)
class Row:
    """One line of a preset.

    kind      ``convolution``, ``dense``, ``batch_norm`` (one that could not be merged), ``recurrent`` (the linear maps
              inside LSTM, GRU and RNN), or None for any of them
    position  ``input`` for linear nodes with no linear node before them, or None for anywhere
    name      shell-style pattern for the node's name, which is its module's path ("layer3.*"), or None
    """

    rule: Rule
    kind: str | None = None
    position: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in (None, *KINDS) or self.position not in (None, "input"):
            raise SettingError(
                f"preset row with kind={self.kind!r}, position={self.position!r}",
                f"kind is one of {', '.join(KINDS)} or None; position is 'input' or None",
            )

    def fits(self, kind: str, is_input: bool, name: str) -> bool:
        return (
            self.kind in (None, kind)
            and (self.position is None or is_input)
            and (self.name is None or fnmatchcase(name, self.name))
        )


@dataclass(frozen=True)
class Preset:
    """A named list of rows, and what happens where two values of the input meet or are normalised.

    ``describe()`` goes into a run, so that equal presets have equal descriptions.

    gates      product of a gate (a sigmoid's or softmax' result) and a signal: ``all`` to the signal, ``half`` each,
               ``prop`` or ``abs``: in proportion to their values or absolute values (Arras et al. 2019)
    attention  ``attnlrp``: relevance goes through the softmax too, a product of two activations gives half to each
               (Achtibat et al. 2024); ``constant``: attention weights are constants, all goes to the values (CP-LRP,
               Ali et al. 2022)
    norms      layer, group and root-mean-square norms: ``detached`` takes the deviation for a constant and all else
               for a linear map, ``identity`` hands relevance on unchanged
    pre_activation  batch norm, ReLU, linear node in this order, as in DenseNet: ``switch`` and ``threshold`` merge the
               norm into the node behind a ReLU with thresholds, which is the same function; what units that are off
               get is absorbed (``switch``) or passes (``threshold``); ``diagonal`` leaves it a node of its own
    automatic  it is ``auto``, which has no rows but chooses a preset when the model has run
    even       set by ``flat_until``: the layer down from which relevance is shared evenly, and the rule
    max_pool   ``winner``: the first of the greatest values of a window takes all (Bach et al. 2015); ``proportional``:
               all of the window, in proportion to their values (Montavon et al. 2018)
    """

    name: str
    rows: tuple[Row, ...]
    gates: str = "all"
    attention: str = "attnlrp"
    norms: str = "detached"
    pre_activation: str = "switch"
    max_pool: str = "winner"
    even: tuple[str, Rule] | None = None
    automatic: bool = False

    def __post_init__(self) -> None:
        choices = (
            (self.gates, GATES),
            (self.attention, ATTENTION),
            (self.norms, NORMS),
            (self.pre_activation, PRE_ACTIVATION),
            (self.max_pool, MAX_POOL),
        )
        for word, known in choices:
            if word not in known:
                raise SettingError(f"preset {self.name!r}: {word!r} is unknown", f"it is one of {', '.join(known)}")

    def rule_for(self, kind: str, is_input: bool, name: str) -> Rule:
        """The rule of the first row that fits; an error that names the node if none does."""
        for row in self.rows:
            if row.fits(kind, is_input, name):
                return row.rule
        raise SettingError(
            f"no row of preset {self.name!r} fits node {name!r} ({kind})",
            f"add a last row for it, for example Row(Epsilon(), kind={kind!r})",
        )

    def flat_until(self, layer: str, rule: Rule | None = None) -> Preset:
        """This preset above a layer, and Flat (or WSquare) at it and below: coarser maps of what the layer responds to.

        ``layer`` is a module's path; all calls up to the end of its first call count as below.  See ``even.py``.
        Source: Bach et al. 2016 (ICIP).
        """
        rule = Flat() if rule is None else rule
        if not rule.carries_relevance:
            raise SettingError(f"flat_until with rule {rule.label}", "give Flat() or WSquare()")
        return replace(self, name=f"{self.name}, flat until {layer}", even=(layer, rule))

    @property
    def needs_bounds(self) -> bool:
        return any(isinstance(row.rule, ZBox) for row in self.rows)

    def check_names(self, names: list[str]) -> None:
        """A name pattern that no node of the model matches is a mistake, not a wish."""
        for row in self.rows:
            if row.name is not None and not any(fnmatchcase(name, row.name) for name in names):
                raise SettingError(
                    f"preset {self.name!r}: no node of the model is named {row.name!r}",
                    f"the nodes are: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}",
                )

    def chosen(self, functions: Iterable[tuple[str, str]]) -> Preset:
        """``auto`` for a model that calls these (function, kind of node); every other preset is its own choice."""
        if not self.automatic:
            return self
        choice = cp_lrp_gamma() if any(_of_attention(*call) for call in functions) else epsilon_plus()
        return choice if self.even is None else choice.flat_until(*self.even)

    def describe(self) -> str:
        if self.automatic:
            return f"{self.name} [{_AUTO}]"
        rows = [f"{r.kind or 'any'}/{r.position or 'anywhere'}/{r.name or '*'}: {r.rule.label}" for r in self.rows]
        choices = f"gates={self.gates}, attention={self.attention}, norms={self.norms}"
        choices += f", pre_activation={self.pre_activation}, max_pool={self.max_pool}"
        if self.even is not None:
            choices += f"; {self.even[1].label} until {self.even[0]}"
        return f"{self.name} [{'; '.join(rows)}; {choices}]"


# A batch norm that no linear node precedes is a diagonal linear node: its scale shares nothing out, its bias absorbs.
def _rows(convolution: Rule, epsilon: float, *first: Row) -> tuple[Row, ...]:
    return (
        *first,
        Row(convolution, "convolution"),
        Row(Epsilon(epsilon), "dense"),
        Row(Epsilon(epsilon), "batch_norm"),
        Row(Epsilon(epsilon), "recurrent"),
    )


def epsilon(epsilon: float = 1e-6) -> Preset:
    """ε everywhere; with ε = 0 gradient times input (for ReLU networks)."""
    return Preset("epsilon", (Row(Epsilon(epsilon)),), pre_activation="diagonal")


def epsilon_plus(epsilon: float = 1e-6) -> Preset:
    """z+ (β = 0) for convolutions, ε for dense layers: the talk's hybrid with ε = 0.01."""
    return Preset("epsilon-plus", _rows(ZPlus(), epsilon))


def epsilon_plus_flat(epsilon: float = 1e-6) -> Preset:
    """As epsilon-plus, and flat at the input layer."""
    return Preset("epsilon-plus-flat", _rows(ZPlus(), epsilon, Row(Flat(), position="input")))


def epsilon_alpha2_beta1(epsilon: float = 1e-6) -> Preset:
    """α = 2, β = 1 for convolutions, ε for dense layers."""
    return Preset("epsilon-alpha2-beta1", _rows(AlphaBeta(2, 1), epsilon))


def epsilon_alpha2_beta1_flat(epsilon: float = 1e-6) -> Preset:
    """As epsilon-alpha2-beta1, and flat at the input layer."""
    return Preset("epsilon-alpha2-beta1-flat", _rows(AlphaBeta(2, 1), epsilon, Row(Flat(), position="input")))


def epsilon_gamma_box(epsilon: float = 1e-6, gamma: float = 0.25) -> Preset:
    """γ for convolutions, ε for dense layers, z^B at the input layer (needs ``bounds``)."""
    return Preset("epsilon-gamma-box", _rows(Gamma(gamma), epsilon, Row(ZBox(), position="input")))


def attnlrp(epsilon: float = 1e-6, gates: str = "half") -> Preset:
    """ε everywhere; relevance goes through attention weights too.  Source: Achtibat et al. 2024 (AttnLRP)."""
    return Preset("attnlrp", (Row(Epsilon(epsilon)),), gates, "attnlrp", pre_activation="diagonal")


def attnlrp_gamma(convolution: float = 0.25, dense: float = 0.05, epsilon: float = 1e-6) -> Preset:
    """As attnlrp with γ for convolutions and dense layers, the values of its authors for vision transformers.

    Theirs leaves the projections inside ``nn.MultiheadAttention`` at ε; here all dense layers get γ.
    """
    return Preset("attnlrp-gamma", _gammas(convolution, dense, epsilon), "half", "attnlrp")


def cp_lrp(epsilon: float = 1e-6) -> Preset:
    """ε everywhere; attention weights and gates are constants.  Source: Ali et al. 2022 (conservative propagation)."""
    return Preset("cp-lrp", (Row(Epsilon(epsilon)),), "all", "constant", pre_activation="diagonal")


def cp_lrp_gamma(convolution: float = 0.25, dense: float = 0.05, epsilon: float = 1e-6) -> Preset:
    """As cp-lrp with γ for convolutions and dense layers: smoother maps, the choice of ``auto`` for attention."""
    return Preset("cp-lrp-gamma", _gammas(convolution, dense, epsilon), "all", "constant")


def _gammas(convolution: float, dense: float, epsilon: float) -> tuple[Row, ...]:
    return Row(Gamma(convolution), "convolution"), Row(Gamma(dense), "dense"), Row(Epsilon(epsilon))


def arras(epsilon: float = 1e-3, bias_factor: float = 0.0, gates: str = "all") -> Preset:
    """The recipe for LSTMs of Arras et al. 2017: ε everywhere, in the cell's sums too; the signal takes all."""
    return Preset("arras", (Row(Recurrent(epsilon, bias_factor)),), gates=gates)


_AUTO = "epsilon-plus, or cp-lrp-gamma for models that call attention, layer norms or products of two activations"


def auto() -> Preset:
    """epsilon-plus, or cp-lrp-gamma for models that call attention, layer norms or products of two activations."""
    return Preset("auto", (), automatic=True)


def _of_attention(function: str, kind: str) -> bool:
    if function in ("matmul", "bmm", "baddbmm", "einsum"):
        return kind == ""  # a product of two activations; with a constant it is a dense node
    return function in ("scaled_dot_product_attention", "layer_norm", "native_layer_norm", "rms_norm")


PRESETS: dict[str, Callable[..., Preset]] = {
    "auto": auto,
    "epsilon": epsilon,
    "epsilon-plus": epsilon_plus,
    "epsilon-plus-flat": epsilon_plus_flat,
    "epsilon-alpha2-beta1": epsilon_alpha2_beta1,
    "epsilon-alpha2-beta1-flat": epsilon_alpha2_beta1_flat,
    "epsilon-gamma-box": epsilon_gamma_box,
    "attnlrp": attnlrp,
    "attnlrp-gamma": attnlrp_gamma,
    "cp-lrp": cp_lrp,
    "cp-lrp-gamma": cp_lrp_gamma,
    "arras": arras,
}
