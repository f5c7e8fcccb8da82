"""Continuity and robustness: what becomes of a map when its picture changes a little.

max_sensitivity   max over draws of ‖R(x + δ) - R(x)‖ / ‖R(x)‖, δ uniform within ± radius of the input's range: SENS_MAX
mean_sensitivity  the mean over the same draws (both: Yeh et al. 2019)
shift             correlation of R(x) with R of the picture moved by a few pixels, moved back, mean over directions, the
                  strip that came in left out; 1 for a map that moves with the picture (Montavon et al. 2018 translate)

A map that knows nothing of the picture is perfectly robust: see the control centre-gaussian.
"""

from __future__ import annotations

import torch

from pfungst.errors import SettingError
from pfungst.quality.questions import Question, Scores, correlate, seeded

_DIRECTIONS = ((0, 1), (1, 0), (0, -1), (-1, 0))


def score_robustness(question: Question, *, radius: float = 0.02, draws: int = 8, pixels: int | None = None) -> Scores:
    """All of the above.

    ``radius``: as a share of the input's range; 0.02 is about 5 of 255 steps of a pixel.  ``pixels``: of the shift, a
    56th of the side by default.  The target stays the class that was explained.
    """
    method, x, maps = question.method, question.x, question.maps
    if method is None:
        raise SettingError("robustness without the method", "give what makes maps, not just maps")
    low, high = (end.to(x) for end in question.ends)
    changes = []
    for draw in range(draws):
        noise = torch.stack([torch.rand(x.shape[1:], generator=g) for g in seeded(x, 1000 + draw)]).to(x)
        near = method(x + radius * (high - low) * (2 * noise - 1), question.target)
        difference = (near - maps).flatten(1).double().norm(dim=1)
        changes.append(difference / maps.flatten(1).double().norm(dim=1))
    change = torch.stack(changes)
    step = max(1, round(min(x.shape[2:]) / 56)) if pixels is None else pixels
    kept = (..., slice(step, x.shape[2] - step), slice(step, x.shape[3] - step))
    alike = []
    for down, right in _DIRECTIONS:
        by = (down * step, right * step)
        moved = method(_move(x, *by), question.target).roll((-by[0], -by[1]), (1, 2))
        alike.append(correlate(maps[kept], moved[kept]))
    figures = {"max_sensitivity": change.amax(0), "mean_sensitivity": change.mean(0)}
    return Scores({**figures, "shift": torch.stack(alike).mean(0)})


def _move(x: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """The pictures moved, the edge repeated where nothing came in."""
    height, width = x.shape[2:]
    rows = (torch.arange(height, device=x.device) - down).clamp(0, height - 1)
    columns = (torch.arange(width, device=x.device) - right).clamp(0, width - 1)
    return x[:, :, rows][:, :, :, columns]
