"""Class sensitivity: whether the map says anything about the class that is explained.

top_two   cosine of the maps of the two greatest outputs (of the explained class and the greatest other one)
any_two   cosine of the maps of the explained class and of a class drawn at random

1 means the same map for every class: it shows what is in the picture, not why this class (Sixt et al. 2020, "When
explanations lie": rules that only hand on positive relevance converge to that).  Lower is better.
"""

from __future__ import annotations

import torch

from pfungst.errors import SettingError
from pfungst.quality.questions import Question, Scores, cosine, seeded


def score_class_sensitivity(question: Question) -> Scores:
    """Both; NaN where the model has one output."""
    method, outputs, target = question.method, question.outputs, question.target
    if method is None:
        raise SettingError("class sensitivity without the method", "give what makes maps, not just maps")
    if outputs.shape[1] < 2:
        nothing = torch.full((len(outputs),), torch.nan, dtype=torch.double, device=outputs.device)
        return Scores({"top_two": nothing, "any_two": nothing})
    rival = outputs.scatter(1, target[:, None], -torch.inf).argmax(1)
    steps = [int(torch.randint(1, outputs.shape[1], (1,), generator=g)) for g in seeded(question.x, 77)]
    other = (target + torch.tensor(steps, device=target.device)) % outputs.shape[1]
    top = cosine(question.maps, method(question.x, rival))
    return Scores({"top_two": top, "any_two": cosine(question.maps, method(question.x, other))})
