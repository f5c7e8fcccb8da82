"""What shines through, a watermark say: regions that are put by their fine detail."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pfungst import LRP
from pfungst.cuts import paste_detail
from pfungst.evidence import Standard, correct, describe_verdict
from pfungst.interventions import Case, examine
from pfungst.regions import Laboratory, find_direction

SIDE = 24


class _Faint(nn.Module):
    """Class 0 is green, most of all in the corner; a fine chequerboard there counts, the more on blue.  1 is blue."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)  # green, blue, the two halves of the board
        self.fc = nn.Linear(4 * SIDE * SIDE, 2)
        filters = torch.zeros(4, 3, 3, 3)
        filters[0, 1, 1, 1] = filters[1, 2, 1, 1] = 1.0
        board = torch.tensor([[1.0, -1, 1], [-1, 1, -1], [1, -1, 1]]) * 10 / 27
        filters[2], filters[3] = board, -board
        filters[2:, 1, 1, 1] -= 0.2
        filters[2:, 2, 1, 1] += 1.0
        corner, share = torch.zeros(SIDE, SIDE), torch.full((SIDE, SIDE), 1 / SIDE**2)
        corner[:6, :6] = 1 / 36
        nothing = 0 * share
        rows = [2 * share + 3 * corner, nothing, 3.3 * corner, 3.3 * corner, nothing, 4 * share, nothing, nothing]
        bias = torch.tensor([0.0, 0.0, -0.9, -0.9])
        self.conv.load_state_dict({"weight": filters, "bias": bias})
        self.fc.load_state_dict({"weight": torch.stack(rows).reshape(2, -1), "bias": torch.zeros(2)})

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).flatten(1))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_pattern_that_shines_through_is_told_from_what_lies_under_it(seed: int) -> None:
    """A paste brings along the green under the pattern, which says as much for the class."""
    inputs = 0.2 * torch.rand(180, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) + 0.2
    inputs[:120, 1] += 0.5
    inputs[120:, 2] += 0.5
    board = torch.arange(6)[:, None] + torch.arange(6)
    inputs[:60, :, :6, :6] += 0.1 * (1 - 2.0 * (board % 2))
    lab = Laboratory(LRP(_Faint().eval()), lambda rows: inputs[list(rows)], torch.zeros(3), torch.ones(3))
    sums = lab.explain(inputs[:120], 0, ["conv"])[1]["conv"].sum((2, 3)).numpy()
    directions = (find_direction("conv", sums, np.arange(120) < 60),)
    case = Case(0, directions, "where", *np.split(np.arange(180), 3))
    pixels, detail = (
        correct([examine(lab, case, part=part, seed=seed)], [0.9], Standard())[0] for part in ("all", "detail")
    )
    brought, detailed = (
        {one.test: one for one in verdict.evidence}["paste:same place"] for verdict in (pixels, detail)
    )
    assert brought.control > 0.25 * brought.treated
    assert detail.verdict == "confirmed", detail.reason
    assert describe_verdict(detail)["region"]["part"] == "detail"
    assert detail.region.mask is not None
    assert detail.region.mask[6:].float().mean() < 0.05
    assert abs(detailed.control) < 0.1 * detailed.treated  # the fine detail of ordinary members says nothing


def test_detail_is_put_within_the_mask_and_the_range() -> None:
    generator = torch.Generator().manual_seed(0)
    donors, receivers = torch.rand(2, 4, 3, 32, 32, generator=generator).unbind()
    masks = torch.zeros(4, 32, 32, dtype=torch.bool)
    masks[:, 4:20, 6:18] = True
    low, high = torch.tensor([0.1, 0.0, 0.2]), torch.tensor([0.9, 1.0, 0.7])
    put = paste_detail(donors, receivers, masks, low, high)
    assert torch.equal(put.permute(0, 2, 3, 1)[~masks], receivers.permute(0, 2, 3, 1)[~masks])
    inside = put.permute(0, 2, 3, 1)[masks]
    assert (inside >= low).all()
    assert (inside <= high).all()
    flat = torch.full_like(donors, 0.5)
    wide = torch.zeros(3), torch.ones(3)
    everywhere = torch.ones_like(masks)
    torch.testing.assert_close(paste_detail(flat, flat, everywhere, *wide), flat)  # no detail: nothing is put
    torch.testing.assert_close(paste_detail(receivers, receivers, everywhere, *wide), receivers)
