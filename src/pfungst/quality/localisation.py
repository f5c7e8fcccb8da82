"""Localisation: how much of the relevance lies on the object, where masks say where that is.

mass      Σ R⁺ inside / Σ R⁺: relevance mass accuracy (Arras et al. 2022, CLEVR-XAI), μ of Kohlbrenner et al. 2020
mass_w    mass · picture's area / mask's area: μ_w of Kohlbrenner et al. 2020; 1 for a map that does not look
rank      share of the K greatest values that lie inside, K = the mask's size: relevance rank accuracy (Arras 2022)
pointing  1 if the greatest value lies on the mask or within ``tolerance`` of it: pointing game (Zhang et al. 2018)
outside   mean R⁺ outside / mean R⁺ inside: the use of context μ of Lapuschkin et al. 2016 (CVPR); lower is better.
          The text that says whether R or R⁺ is meant was not to be had; signed relevance is ``outside_signed``
auc       area under the ROC curve of the map as a detector of the mask's pixels, ties counted half

Pictures whose mask is empty or full have none of these: NaN.  A map without positive values has mass NaN as well.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pfungst.errors import SettingError
from pfungst.quality.questions import Question, Scores, ranks


def score_localisation(question: Question, *, tolerance: int | None = None) -> Scores:
    """All of the above; ``tolerance`` in pixels, 15 for pictures of 224 (as in the pointing game) by default."""
    if question.masks is None:
        raise SettingError("localisation without masks", "give --masks: a folder, COCO, YOLO or VOC annotations")
    maps, masks = question.maps.double(), question.masks
    height, width = maps.shape[1:]
    reach = round(15 * min(height, width) / 224) if tolerance is None else tolerance
    inside = masks.flatten(1)
    size = inside.sum(1).double()
    usable = (size > 0) & (size < height * width)
    flat, positive = maps.flatten(1), maps.clamp(min=0).flatten(1)
    mass = relevance_mass(maps, masks)
    others = height * width - size
    outside = ((positive * ~inside).sum(1) / others) / ((positive * inside).sum(1) / size)
    signed = ((flat * ~inside).sum(1) / others) / ((flat * inside).sum(1) / size)
    figures = {
        "mass": mass,
        "mass_w": mass * height * width / size,
        "rank": _rank(flat, inside),
        "pointing": _pointing(maps, masks, reach),
        "outside": outside,
        "outside_signed": signed,
        "auc": area_under_roc(flat, inside),
    }
    return Scores({name: values.where(usable, torch.nan) for name, values in figures.items()})


def relevance_mass(maps: Tensor, masks: Tensor) -> Tensor:
    """``mass`` of maps (n, H, W) with masks (n, H, W), (n,) float64; NaN without positive relevance."""
    positive, inside = maps.double().clamp(min=0).flatten(1), masks.flatten(1)
    return (positive * inside).sum(1) / positive.sum(1)


def _rank(flat: Tensor, inside: Tensor) -> Tensor:
    order = flat.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(flat.shape[1], device=flat.device)[None] < inside.sum(1, keepdim=True)
    return (inside.gather(1, order) & first).sum(1).double() / inside.sum(1)


def _pointing(maps: Tensor, masks: Tensor, reach: int) -> Tensor:
    near = masks[:, None].float()
    if reach:
        axis = torch.arange(-reach, reach + 1, device=maps.device)
        disc = (axis[:, None] ** 2 + axis[None] ** 2 <= reach**2).to(near)
        near = functional.conv2d(near, disc[None, None], padding=reach)
    top = maps.flatten(1).argmax(1, keepdim=True)
    return (near[:, 0].flatten(1).gather(1, top)[:, 0] > 0.5).double()


def area_under_roc(values: Tensor, positive: Tensor) -> Tensor:
    """P(value of a positive > value of a negative) + half of P(equal), for each row of (n, m), by ranks."""
    count = positive.sum(1).double()
    total = (ranks(values) * positive).sum(1)
    return (total - count * (count - 1) / 2) / (count * (positive.shape[1] - count))
