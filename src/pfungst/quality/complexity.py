"""Complexity: how much a map has to say; a person reads a simple one faster.  Simple is not right: see the controls.

entropy     -Σ p ln p of p = |R| / Σ |R|, in nats, 0 to ln(pixels) (Bhatt et al. 2020); less is simpler
bits        size of the map, scaled to its greatest |value| in 255 steps and compressed losslessly (deflate with PNG's
            row differences), in bits a pixel (Samek et al. 2017 compare files of heatmaps); less is simpler
sparseness  Gini coefficient of |R|, 0 (all pixels alike) to 1 (one pixel has all) (Chalasani et al. 2020)
"""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor

from pfungst.quality.questions import Question, Scores


def score_complexity(question: Question) -> Scores:
    """All of the above."""
    size = question.maps.flatten(1).double().abs()
    share = size / size.sum(1, keepdim=True)
    entropy = -torch.xlogy(share, share).sum(1)
    ordered = size.sort(1).values
    count = size.shape[1]
    weight = 2 * torch.arange(1, count + 1, device=size.device) - count - 1
    gini = (ordered * weight).sum(1) / (count * ordered.sum(1))
    return Scores({"entropy": entropy, "bits": _bits(question.maps), "sparseness": gini})


def _bits(maps: Tensor) -> Tensor:
    found = []
    for one in maps.cpu():
        scale = float(one.abs().max()) or 1.0
        if not torch.isfinite(one).all():
            found.append(float("nan"))
            continue
        steps = (one / scale * 127 + 128).round().to(torch.uint8).numpy()
        file = io.BytesIO()
        Image.fromarray(steps).save(file, "PNG", optimize=True)
        found.append(8 * file.tell() / one.numel())
    return torch.tensor(found, dtype=torch.double, device=maps.device)
