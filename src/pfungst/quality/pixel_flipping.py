"""Pixel flipping and region perturbation: how fast the score falls as the most relevant regions are replaced.

Regions are squares of a fixed grid, ordered by the sum of the map over each.  A picture at step k is the picture with
every pixel of rank ≤ k replaced.  The steps of a batch are inputs of large forward passes; or, where a step is one
region, on a CPU, and the model lets it be followed, only what that region reaches is computed again (increments.py).

srg                  SRG = AUC(least important first) - AUC(most important first) of the probability, the whole picture
                     flipped in 28 steps; a random map gets 0 in expectation, whatever the replacement does to the
                     model.  Blücher et al. 2024 (TMLR), "Decoupling pixel flipping and occlusion strategy".
region-perturbation  AOPC = 1/(L+1) Σ_{k=0..L} (f(x_0) - f(x_k)), regions replaced by uniform noise, mean over draws;
                     ABPC = AOPC of most relevant first - AOPC of least relevant first.  Samek et al. 2017 (TNNLS 28):
                     regions of 9 x 9 pixels of 227 x 227, L = 100, 10 draws; other sizes in proportion.
pixel-flipping       the area under the curve of the probability, single pixels.  Bach et al. 2015.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pfungst.errors import SettingError
from pfungst.increments import Answers, Increments, plan_increments
from pfungst.quality.questions import Question, Scores, ask, choose_chunk, probabilities, seeded

FILLS = ("mean", "zero", "uniform", "blur", "low")
FOLLOWED = 32  # pictures that are followed at once
KEPT = 160 * 1024 * 1024  # values of layers that are kept at once where steps are followed: 640 MiB
ORDERS = ("most", "least", "random")


@dataclass(frozen=True)
class Curves:
    """Scores of the target as more is replaced, by order: probability and logit (n, steps + 1), means over draws.

    ``shares``: of the picture's regions replaced at each step, (steps + 1,), from 0 on.
    """

    probability: dict[str, Tensor]
    logit: dict[str, Tensor]
    shares: Tensor


def flip(
    question: Question,
    *,
    region: int,
    steps: int,
    most: float = 1.0,
    fill: str | float = "mean",
    orders: Sequence[str] = ("most", "least"),
    draws: int = 1,
    whole: bool = True,
) -> Curves:
    """The curves of a batch.

    region  side of the squares in pixels
    steps   number of steps; each replaces as many regions as any other, as nearly as whole numbers allow
    most    share of the regions that is replaced in the end, 0 to 1
    fill    ``mean`` of the picture by channel, ``zero`` (the mean colour of usual inputs), ``uniform`` noise between
            the ends of the input's range, ``blur`` of the picture, ``low`` end, or a number
    orders  of ``most`` relevant first, ``least`` relevant first, ``random``
    draws   of the noise and of the random order, over which is averaged
    whole   regions that the picture's right and lower edge cut off count; if not, what is left over stays as it is
    """
    x, maps = question.x, question.maps
    height, width = x.shape[2:]
    if not 1 <= region <= min(height, width) or steps < 1 or draws < 1 or not 0 < most <= 1:
        raise SettingError(
            f"region {region}, steps {steps}, draws {draws}, most {most} for {height} x {width}", "make them fit"
        )
    unknown = [order for order in orders if order not in ORDERS]
    if unknown or not orders:
        raise SettingError(f"orders {list(orders)}", f"give some of {', '.join(ORDERS)}")
    rows, columns = (math.ceil(s / region) if whole else s // region for s in (height, width))
    count = rows * columns
    sums = _region_sums(maps, region, rows, columns)
    # Regions replaced by each step; the same number at every step where it divides.
    ends = torch.linspace(0, most * count, steps + 1, dtype=torch.double).round().long()
    found: dict[str, list[tuple[Tensor, Tensor]]] = {order: [] for order in orders}
    before = question.outputs
    # On a GPU the calls cost more than following saves: VGG-16 took 3.2 s followed, 2.6 s in large batches (an H100).
    single = bool((ends[1:] - ends[:-1] == 1).all()) and x.device.type == "cpu"
    plan = plan_increments(question.model, x[:1], region, region) if single else None
    if plan is not None and not plan.pays(min(len(x), FOLLOWED)):
        plan = None
    repeated = draws if fill == "uniform" else 1
    for draw in range(draws):
        replacement = _replacement(question, fill, draw)
        for order in orders:
            if draw >= repeated and order != "random":
                continue
            places = _places(x, sums, order, draw)
            ranks = _spread(places, region, rows, columns, height, width, count)
            if plan is None:
                found[order].append(_ask_steps(question, replacement, ranks, ends[1:]))
            else:
                turn = places.argsort(1)[:, :steps]
                found[order].append(_follow_steps(question, replacement, ranks, turn, plan, region, columns))
    index = question.target[:, None]
    start = probabilities(before).gather(1, index), before.gather(1, index)
    curves = [
        {o: torch.cat([start[i], torch.stack([one[i] for one in each]).mean(0)], 1) for o, each in found.items()}
        for i in (0, 1)
    ]
    return Curves(curves[0], curves[1], (ends.double() / count).to(x.device))


def _region_sums(maps: Tensor, region: int, rows: int, columns: int) -> Tensor:
    """Sum of the map over each region, (n, rows * columns), in double precision: rounding must not order them."""
    height, width = maps.shape[1:]
    padded = functional.pad(maps.double(), (0, max(0, columns * region - width), 0, max(0, rows * region - height)))
    padded = padded[:, : rows * region, : columns * region]
    return padded.reshape(len(maps), rows, region, columns, region).sum((2, 4)).flatten(1)


def _places(x: Tensor, sums: Tensor, order: str, draw: int) -> Tensor:
    """The place of each region in the order, 0 first, (n, regions)."""
    if order == "random":
        keys = torch.stack([torch.rand(sums.shape[1], generator=g) for g in seeded(x, 2 * draw + 1)]).to(x.device)
        turn = keys.argsort(1)
    else:
        turn = sums.argsort(dim=1, descending=order == "most", stable=True)
    place = torch.arange(sums.shape[1], device=x.device).expand_as(turn)
    return torch.empty_like(turn).scatter_(1, turn, place)


def _spread(places: Tensor, region: int, rows: int, columns: int, height: int, width: int, never: int) -> Tensor:
    """The place of the region of each pixel, (n, H, W); ``never`` where no region is."""
    grid = places.reshape(-1, rows, columns).repeat_interleave(region, 1).repeat_interleave(region, 2)
    grid = grid[:, :height, :width]
    return functional.pad(grid, (0, width - grid.shape[2], 0, height - grid.shape[1]), value=never)


def _replacement(question: Question, fill: str | float, draw: int) -> Tensor:
    """What stands in place of a pixel, broadcastable to the inputs."""
    x = question.x
    if isinstance(fill, (int, float)):
        return x.new_full((1, 1, 1, 1), float(fill))
    if fill == "mean":
        return x.mean((2, 3), keepdim=True)
    if fill == "zero":
        return x.new_zeros(1, 1, 1, 1)
    if fill == "low":
        return question.ends[0][None].to(x)
    if fill == "uniform":
        noise = torch.stack([torch.rand(x.shape[1:], generator=g) for g in seeded(x, 2 * draw)]).to(x)
        low, high = (end[None].to(x) for end in question.ends)
        return low + (high - low) * noise
    if fill == "blur":
        side = max(3, min(x.shape[2:]) // 8 * 2 + 1)
        axis = torch.arange(side, device=x.device, dtype=x.dtype) - side // 2
        bell = torch.exp(-((axis / (side / 4)) ** 2) / 2)
        bell = (bell / bell.sum()).expand(x.shape[1], 1, 1, -1)
        padded = functional.pad(x, (side // 2,) * 4, mode="reflect")
        across = functional.conv2d(padded, bell, groups=x.shape[1])
        return functional.conv2d(across, bell.transpose(2, 3), groups=x.shape[1])
    raise SettingError(f"fill {fill!r}", f"give one of {', '.join(FILLS)}, or a number")


def _ask_steps(question: Question, replacement: Tensor, ranks: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Probability and logit of the target at each step, (n, steps) each."""
    x = question.x
    per = max(1, (question.chunk or choose_chunk(x)) // len(x))
    probability: list[Tensor] = []
    logit: list[Tensor] = []
    for part in ends.to(x.device).split(per):
        replaced = ranks[None, :, None] < part.view(-1, 1, 1, 1, 1)
        changed = torch.where(replaced, replacement.expand_as(x)[None], x[None]).flatten(0, 1)
        outputs = ask(question.model, changed.contiguous(memory_format=question.layout), question.chunk)
        index = question.target.repeat(len(part))[:, None]
        for values, kept in ((probabilities(outputs), probability), (outputs, logit)):
            kept.append(values.gather(1, index)[:, 0].view(len(part), len(x)))
    return torch.cat(probability).T, torch.cat(logit).T


def _follow_steps(
    question: Question, replacement: Tensor, ranks: Tensor, turn: Tensor, plan: Increments, region: int, across: int
) -> tuple[Tensor, Tensor]:
    """The same where each step replaces one region: ``turn`` (n, steps), its number in a grid ``across`` wide."""
    x, replacement = question.x, replacement.expand_as(question.x)
    inside = np.arange(region)
    parts = []
    for part in torch.arange(len(x)).split(max(1, min(FOLLOWED, KEPT // plan.floats))):
        answers = Answers(question.model, x[part], plan)
        outputs = []
        for step in range(turn.shape[1]):
            number = turn[part, step].numpy()
            # A region that the picture's edge cuts off: the box that ends there, with what else lies in it.
            tops = np.minimum(number // across * region, x.shape[2] - region)
            lefts = np.minimum(number % across * region, x.shape[3] - region)
            picture, rows = part[:, None, None], (tops[:, None] + inside)[:, :, None]
            columns = (lefts[:, None] + inside)[:, None]
            now = (ranks[picture, rows, columns] <= step)[..., None]
            patch = torch.where(now, replacement[picture, :, rows, columns], x[picture, :, rows, columns])
            outputs.append(answers.change(patch.permute(0, 3, 1, 2), tops, lefts))
        parts.append(torch.stack(outputs, 1))
    found = torch.cat(parts)
    index = question.target[:, None, None].expand(-1, turn.shape[1], 1)
    chances = probabilities(found.flatten(0, 1)).view_as(found)
    return chances.gather(2, index)[..., 0], found.gather(2, index)[..., 0]


def area(curve: Tensor, shares: Tensor) -> Tensor:
    """Area under each curve (n, steps + 1) by trapezoids, per unit of the share replaced, (n,)."""
    return torch.trapezoid(curve.double(), shares.double(), dim=1) / (shares[-1] - shares[0]).double()


def aopc(curve: Tensor) -> Tensor:
    """1/(L+1) Σ_{k=0..L} f(x_0) - f(x_k) of each curve (n, L + 1), (n,)."""
    return (curve[:, :1].double() - curve.double()).mean(1)


def score_srg(question: Question, *, steps: int = 28, fill: str | float = "mean", region: int | None = None) -> Scores:
    """SRG, with both areas beside it; regions are a 28th of the picture's side."""
    side = max(1, round(min(question.x.shape[2:]) / 28)) if region is None else region
    curves = flip(question, region=side, steps=steps, fill=fill)
    most, least = (area(curves.probability[order], curves.shares) for order in ("most", "least"))
    return Scores({"srg": least - most, "mif": most, "lif": least}, _named(curves.probability), curves.shares)


def score_region_perturbation(
    question: Question, *, region: int | None = None, steps: int = 100, draws: int = 10, fill: str | float = "uniform"
) -> Scores:
    """AOPC and ABPC of probability and logit, and AOPC of a random order."""
    smaller = min(question.x.shape[2:])
    side = max(1, round(smaller / 25)) if region is None else region
    count = math.prod(size // side for size in question.x.shape[2:])
    steps = min(steps, count)
    curves = flip(
        question, region=side, steps=steps, most=steps / count, fill=fill, orders=ORDERS, draws=draws, whole=False
    )
    most, least, chance = (aopc(curves.probability[order]) for order in ORDERS)
    logit = aopc(curves.logit["most"])
    figures = {"aopc": most, "abpc": most - least, "aopc_random": chance, "aopc_logit": logit,
               "abpc_logit": logit - aopc(curves.logit["least"])}  # fmt: skip
    return Scores(figures, _named(curves.probability), curves.shares)


def score_pixel_flipping(question: Question, *, steps: int = 100, fill: str | float = "mean") -> Scores:
    """Area under the curve of the probability as single pixels are replaced, most relevant first, all in the end."""
    curves = flip(question, region=1, steps=steps, fill=fill, orders=("most",))
    area_under = area(curves.probability["most"], curves.shares)
    return Scores({"flipping": area_under}, _named(curves.probability), curves.shares)


def _named(curves: dict[str, Tensor]) -> dict[str, Tensor]:
    titles = {"most": "most relevant first", "least": "least relevant first", "random": "random order"}
    return {titles[order]: curve for order, curve in curves.items()}
