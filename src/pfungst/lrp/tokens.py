"""Outlier tokens of vision transformers: patches of unusually great norm, on which relevance gathers.

Large models keep global information in a few patches of the background, whose norms are many times those of others
(Darcet et al. 2024, "Vision transformers need registers").  Maps point to them although nothing is to be seen there,
and clusters of maps would be clusters of such places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pfungst.errors import SettingError
from pfungst.lrp.modules import first_tensor, visiting
from pfungst.lrp.targets import Target

_GAUSS = 1.4826  # a Gaussian's deviation in units of its median absolute deviation


@dataclass(frozen=True)
class OutlierTokens:
    """Tokens of outlier norm among the patches of n pictures; class and register tokens are left out.

    norms      Euclidean norm of each token, (n, patches) float64
    threshold  above it a norm is an outlier, (n,)
    outliers   (n, patches) bool
    relevance  |relevance| of each token in units of the explained output, (n, patches) float64, if it was asked for
    """

    norms: Tensor
    threshold: Tensor
    outliers: Tensor
    relevance: Tensor | None = None

    @property
    def share(self) -> float:
        """Share of the tokens that are outliers, over all pictures."""
        return float(self.outliers.double().mean())

    @property
    def relevance_share(self) -> float | None:
        """Mean over the pictures of the share of |relevance| that lies on outliers; None if it was not asked for."""
        if self.relevance is None:
            return None
        total = self.relevance.sum(1)
        on = (self.relevance * self.outliers).sum(1)
        return float((on / total.masked_fill(total == 0, 1)).mean())

    def __str__(self) -> str:
        found = f"{self.share:.1%} of the tokens have outlier norms"
        share = self.relevance_share
        if share is None or not self.share:
            return found
        return f"{found} and {share:.1%} of the relevance ({share / self.share:.1f} times their part)"


def flag_tokens(
    norms: Tensor, relevance: Tensor | None = None, *, deviations: float = 6.0, ratio: float = 1.5
) -> OutlierTokens:
    """Flag the norms, (n, patches), that lie above median + ``deviations`` · 1.4826 · MAD of their own picture.

    ``ratio``: and above so many times the median: where all norms are nearly the same, small differences are none.
    ``relevance``: (n, patches), any sign.
    """
    if norms.dim() != 2 or norms.shape[1] == 0:
        raise SettingError(f"token norms have shape {tuple(norms.shape)}", "give one norm a token, (n, patches)")
    if relevance is not None and relevance.shape != norms.shape:
        raise SettingError(
            f"relevance has shape {tuple(relevance.shape)}, the norms have {tuple(norms.shape)}",
            "give the relevance of each token, summed over its channels",
        )
    norms = norms.detach().double()
    median = norms.quantile(0.5, dim=1)
    spread = _GAUSS * (norms - median[:, None]).abs().quantile(0.5, dim=1)
    threshold = torch.maximum(median + deviations * spread, ratio * median)
    amount = None if relevance is None else relevance.detach().double().abs()
    return OutlierTokens(norms, threshold, norms > threshold[:, None], amount)


def outlier_tokens(
    lrp: Any,
    x: Tensor,
    layer: str,
    *,
    target: Target = None,
    special: int = 1,
    **limits: float,
) -> OutlierTokens:
    """Run a model on pictures and flag the outlier tokens at the output of a layer, and their relevance there.

    lrp       ``LRP(model)``
    layer     path of a module that returns tokens (n, tokens, width): a late block, where outliers are if there are any
    special   how many tokens at the front are no patches: 1 for a class token, more with registers, 0 for none
    limits    ``deviations`` and ``ratio`` of ``flag_tokens``

    Source: Darcet et al. 2024, who cut by hand where the histogram of norms has its gap.
    """
    model, result = lrp.model, lrp(x, target, layers=[layer])
    found: list[Tensor] = []
    keep: Callable[[str, Any], None] = lambda _, output: found.append(first_tensor(output))  # type: ignore  # noqa: E731
    with torch.no_grad(), visiting(model, [layer], keep):
        model(x)
    tokens, relevance = found[0], result.at(layer)
    if tokens.dim() != 3 or len(tokens) != len(x) or tokens.shape[1] <= special:
        raise SettingError(
            f"layer {layer!r} returns {tuple(tokens.shape)} for {len(x)} pictures, and special is {special}",
            "name a layer that returns tokens (n, tokens, width), and give the number of other tokens as `special`",
        )
    norms = torch.linalg.vector_norm(tokens[:, special:].double(), dim=2)
    return flag_tokens(norms, relevance[:, special:].double().sum(2), **limits)
