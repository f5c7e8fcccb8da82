"""Conservation: whether the map accounts for the score, as layer-wise relevance propagation promises.

leak     |f - Σ R| / |f|: what biases, stabilisers and norms absorbed
blow_up  Σ |R| / |f|: 1 if nothing speaks against the class; large values mean that opposite shares cancel each other

Neither says that a map is right.  Methods that promise no sum (gradients, Grad-CAM, controls) have none: NaN.
"""

from __future__ import annotations

import torch

from pfungst.quality.questions import Question, Scores


def score_conservation(question: Question) -> Scores:
    """Both, for the model's output as it is."""
    f = question.outputs.gather(1, question.target[:, None])[:, 0].double()
    maps = question.maps.flatten(1).double()
    if question.method is not None and not question.method.adds_up:
        f = f * torch.nan
    return Scores({"leak": (f - maps.sum(1)).abs() / f.abs(), "blow_up": maps.abs().sum(1) / f.abs()})
