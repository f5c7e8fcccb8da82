"""Relevance maps -> one vector a sample, in several views, small enough to keep for a whole data set.

where      pixel relevance, summed over channels and pooled to a grid: sees cues with a fixed place
what       relevance by channel of some layers, summed over places: sees cues that move
strongest  the greatest relevance of each channel over places: sees small cues that move

A view is an (n, d) matrix; ``views`` of a class are compared by ``neighbours.py`` and ``findings.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pfungst.lrp.plan import Step


def area_matrix(pixels: int, cells: int, device: torch.device | None = None) -> Tensor:
    """(cells, pixels) share of each pixel that falls into each cell; columns sum to 1, so pooling keeps the sum."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * (pixels / cells)
    low = torch.maximum(edges[:-1, None], torch.arange(pixels, dtype=torch.float64))
    high = torch.minimum(edges[1:, None], torch.arange(1, pixels + 1, dtype=torch.float64))
    return (high - low).clamp(min=0).to(torch.float32).to(device)


def pool_maps(scores: Tensor, grid: int) -> Tensor:
    """Relevance (n, C, H, W) -> (n, grid * grid): summed over channels, then by area; signs and sums are kept."""
    maps = scores.sum(1)
    rows, columns = (area_matrix(size, grid, maps.device).to(maps.dtype) for size in maps.shape[1:])
    return torch.einsum("gh,nhw,kw->ngk", rows, maps, columns).flatten(1)


def pool_channels(relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance at a layer's output (n, C, ...) -> its sum and its greatest value over places, each (n, C)."""
    places = relevance.flatten(2) if relevance.dim() > 2 else relevance[..., None]
    return places.sum(2), places.amax(2)


def choose_layers(steps: Sequence[Step], count: int = 4) -> tuple[str, ...]:
    """Evenly spaced convolutions of a model, from the first to the last, as named in its plan."""
    names = [step.name for step in steps if step.kind == "convolution"]
    if len(names) <= count:
        return tuple(names)
    picked = np.linspace(0, len(names) - 1, count).round().astype(int)
    return tuple(names[i] for i in picked)


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Each row divided by its Euclidean norm, signs kept (dividing by the signed sum would flip some); 0 stays 0."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


def gate_maps(pooled: np.ndarray, explained: np.ndarray, absorbed: np.ndarray) -> list[str]:
    """Why a map must not be clustered, one string a sample, "" for a good one.

    Numerical blow-ups would otherwise form the most conspicuous clusters.
    """
    return gate_sums(*sum_maps(pooled), explained, absorbed)


def sum_maps(pooled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of pooled maps (n, d): sum of absolute values and sum, each (n,); all that ``gate_sums`` has to know of them."""
    return np.abs(pooled).sum(1), pooled.sum(1, dtype=np.float64)


def gate_sums(totals: np.ndarray, sums: np.ndarray, explained: np.ndarray, absorbed: np.ndarray) -> list[str]:
    """``gate_maps`` from what ``sum_maps`` gives, so that not all maps need be held at once."""
    reasons = []
    finite = totals[np.isfinite(totals) & (totals > 0)]
    limit = 1e3 * np.median(finite) if len(finite) else np.inf
    closing = np.abs(explained - sums - absorbed)
    for total, gap, f in zip(totals, closing, explained, strict=True):
        if not np.isfinite(total) or not np.isfinite(f):
            reasons.append("relevance is not finite")
        elif total == 0:
            reasons.append("relevance is zero everywhere")
        elif gap > 0.01 * max(abs(f), total):
            reasons.append("relevance does not add up to the output")
        elif total > limit:
            reasons.append("relevance is 1000 times stronger than usual")
        else:
            reasons.append("")
    return reasons
