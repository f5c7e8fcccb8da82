"""Arguments for each torch function of the table, and the functions that torchvision and timm call.

``CASES[row]`` lists cases; a case's ``args`` are those of the function for the values h (n, *shape) in the middle of a
small model.  Every spelling of the function that takes these arguments is tested (``test_functions.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pfungst.lrp.functions import ALIASES


@dataclass(frozen=True)
class Case:
    """One way to call a function.

    args    positional arguments, made of h
    shape   of h without its sample axis
    before  what makes h positive or puts it into an interval, where the function asks for it
    after   result -> values with the sample axis first (a list of results is joined otherwise)
    beside  the result has nothing of h: it is added to h
    digits  relative tolerance of the ledger
    """

    args: Callable[[Tensor], tuple[Any, ...]]
    kwargs: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = (4, 6)
    before: Callable[[Tensor], Tensor] = lambda h: h
    after: Callable[[Any], Any] = lambda result: result
    beside: bool = False
    batch: int = 2
    digits: float = 1e-9


def const(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(h: Tensor) -> Tensor:
    return h.abs() + 0.1


def unit(h: Tensor) -> Tensor:
    return torch.tanh(h) * 0.9


PICTURE, VOLUME = (4, 4, 6), (2, 4, 4, 4)
ROW = (6,)
IDS = torch.tensor([2, 0])
# Along the last axis, other places for each sample and channel.
PLACES = torch.randint(0, 6, (2, 4, 3), generator=torch.Generator().manual_seed(4))
MASK = torch.arange(2 * 4 * 6).reshape(2, 4, 6) % 3 == 0
CASES: dict[str, list[Case]] = {}


def case(names: str, args: Callable[[Tensor], tuple[Any, ...]], **more: Any) -> None:
    for name in names.split():
        CASES.setdefault(ALIASES.get(name, name), []).append(Case(args, **more))


# ---- linear nodes ------------------------------------------------------------------------------------------------
for dims, shape in ((1, (4, 6)), (2, PICTURE), (3, VOLUME)):
    inputs, kernel = shape[0], [3] * dims
    case(f"conv{dims}d", lambda h, i=inputs, k=kernel: (h, const(3, i, *k), const(3)), shape=shape)
    case(f"conv{dims}d", lambda h, i=inputs, k=kernel: (h, const(3, i, *k), None, 1, "same"), shape=shape)
    case(
        f"conv_transpose{dims}d",
        lambda h, i=inputs, k=kernel, d=dims: (h, const(i, 3, *k), const(3), [2] * d, [1] * d, [1] * d),
        shape=shape,
    )
    case(f"conv_transpose{dims}d", lambda h, i=inputs, k=kernel: (h, const(i, 3, *k), const(3), 2, 1, 1), shape=shape)
case("convolution", lambda h: (h, const(3, 4, 3), const(3), [1], [1], [1], False, [0], 1))
case("convolution", lambda h: (h, const(4, 3, 3), None, [2], [1], [1], True, [1], 1))
case("linear", lambda h: (h, const(3, 6), const(3)))
case("linear", lambda h: (h, const(3, 6)))
case("matmul", lambda h: (h, const(6, 3)))
case("matmul", lambda h: (const(5, 4), h))
case("matmul bmm", lambda h: (h, h.transpose(1, 2)))
case("bmm", lambda h: (h, const(2, 6, 3)))
case("rmatmul", lambda h: (h, const(5, 4)))
case("matmul mm", lambda h: (h, const(6, 3)), shape=ROW)
case("mv matmul", lambda h: (h, const(6)), shape=ROW)
case("einsum", lambda h: ("nij,jk->nik", h, const(6, 3)))
case("einsum", lambda h: ("nij,jk->nik", [h, const(6, 3)]))
case("einsum", lambda h: ("nij,nkj->nik", h, h * 0.5))
case("addmm", lambda h: (const(3), h, const(6, 3)), shape=ROW)
case("addmm", lambda h: (const(3), h, const(6, 3)), kwargs={"beta": 0.5, "alpha": 2}, shape=ROW)
case("addmm", lambda h: (h, h * 2, const(6, 6)), shape=ROW)
case("baddbmm", lambda h: (const(2, 4, 3), h, const(2, 6, 3)))
case("baddbmm", lambda h: (const(2, 4, 4), h, h.transpose(1, 2)))
case("addbmm", lambda h: (const(2, 3), h.transpose(0, 1), const(4, 6, 3)))
case("addmv", lambda h: (const(2), h, const(6)), shape=ROW)
case("tensordot", lambda h: (h, const(6, 3), 1))
case("tensordot", lambda h: (h, const(6, 3), [[2], [0]]))
case("tensordot", lambda h: (h, const(6, 3), [2], [0]))
case("tensordot", lambda h: (h, const(6, 3)), kwargs={"dims": ([2], [0])})
case("inner", lambda h: (h, const(3, 6)))
case("bilinear", lambda h: (h, h * 2, const(3, 6, 6), const(3)))
case("bilinear", lambda h: (h, const(2, 4, 5), const(3, 6, 5), const(3)))
NORM = const(4), const(4).abs() + 0.3, const(4, seed=5), const(4, seed=6)
case("batch_norm", lambda h: (h, *NORM))
case("batch_norm", lambda h: (h, NORM[2], NORM[3], NORM[0], NORM[1], False, 0.1, 1e-5, False))
case("_native_batch_norm_legit_no_training", lambda h: (h, NORM[2], NORM[3], NORM[0], NORM[1], 0.1, 1e-5))
case("scaled_dot_product_attention", lambda h: (h, h * 0.5, h.flip(2)))
case("scaled_dot_product_attention", lambda h: (h, h * 0.5, h.flip(2)), shape=(2, 4, 6))
case(
    "multi_head_attention_forward",
    lambda h: (
        *[h.transpose(0, 1)] * 3, 6, 2, const(18, 6), const(18), None, None, False, 0.0, const(6, 6), const(6), False,
    ),
    after=lambda result: result[0].transpose(0, 1),
)  # fmt: skip
case("normalize", lambda h: (h,))
case("layer_norm", lambda h: (h, (6,), const(6), const(6, seed=4)))
case("layer_norm", lambda h: (h, (4, 6)))
case("native_layer_norm", lambda h: (h, [6], const(6), const(6, seed=4), 1e-5))
case("group_norm", lambda h: (h, 2, const(4), const(4, seed=4)))
case("native_group_norm", lambda h: (h, const(4), const(4, seed=4), 2, 4, 6, 2, 1e-5))
case("rms_norm", lambda h: (h, (6,), const(6)))
case("rms_norm", lambda h: (h, [6], const(6), 1e-5))
case("instance_norm", lambda h: (h,))
case("instance_norm", lambda h: (h, None, None, const(4), const(4, seed=4)))
case("instance_norm", lambda h: (h, *NORM, False))
case("instance_norm", lambda h: (h, const(4), const(4, seed=4), None, None, True, 0.1, 1e-5, False))
case("local_response_norm", lambda h: (h, 3))

# ---- functions that move values ----------------------------------------------------------------------------------
case("flatten", lambda h: (h, 1))
case("reshape view", lambda h: (h, (-1, 24)))
case("reshape view", lambda h: (h, 2, 24))
case("_unsafe_view _reshape_alias", lambda h: (h, [2, 24]))
case("_reshape_alias", lambda h: (h, [2, 24], [24, 1]))
case("permute", lambda h: (h, (0, 2, 1)))
case("permute", lambda h: (h, 2, 0, 1), after=lambda r: r.movedim(1, 0))
case("transpose swapaxes swapdims movedim moveaxis", lambda h: (h, 1, 2))
case("movedim moveaxis", lambda h: (h, [1, 2], [2, 1]))
case(
    "transpose swapaxes swapdims movedim moveaxis",
    lambda h: (h, 0, 1),
    after=lambda r: (r + const(4, 1, 6)).transpose(0, 1),
)
case("t T H", lambda h: (h,), shape=ROW, after=lambda r: (r + const(6, 1)).t())
case("mT adjoint", lambda h: (h,))
case("squeeze", lambda h: (h, 2), shape=(4, 1, 6))
case("squeeze", lambda h: (h,), shape=(4, 1, 6))
case("squeeze", lambda h: (h, (1, 3)), shape=(1, 4, 1, 6))
case("unsqueeze", lambda h: (h, 1))
case("contiguous", lambda h: (h.transpose(1, 2),))
case("contiguous clone positive real ravel", lambda h: (h,))
case("expand broadcast_to", lambda h: (h, (2, 4, 3, 6)), shape=(4, 1, 6))
case("expand", lambda h: (h, -1, 4, 3, 6), shape=(4, 1, 6))
case("flip", lambda h: (h, (1, 2)))
case("flip", lambda h: (h, (0,)), after=lambda r: (r + const(2, 4, 1)).flip(0))
case("roll", lambda h: (h, 1, 2))
case("roll", lambda h: (h, (1, 2), (1, 2)))
case("narrow", lambda h: (h, 1, 1, 2))
case("narrow", lambda h: (h, 1, torch.tensor(1), 2))
case("select", lambda h: (h, 1, 2))
case("index_select", lambda h: (h, 1, torch.tensor([2, 0, 2])))
case("index_select", lambda h: (h, 0, torch.tensor([1, 0])), after=lambda r: (r + const(2, 4, 1)).flip(0))
case("getitem", lambda h: (h, (slice(None), [0, 2])))
case("getitem", lambda h: (h, (..., None, slice(1, 5, 2))))
case("getitem", lambda h: (h, [1, 0]), after=lambda r: (r + const(2, 4, 1)).flip(0))
case("index", lambda h: (h, [None, IDS]))
case("index", lambda h: (h, [torch.arange(2)[:, None], IDS]))
case("unflatten", lambda h: (h, 2, (2, 3)))
case("split tensor_split chunk", lambda h: (h, 2, 1))
case("tensor_split", lambda h: (h, torch.tensor([1, 3]), 1))
case("split split_with_sizes tensor_split", lambda h: (h, [1, 3], 1))
case("unbind", lambda h: (h, 1))
case("unbind", lambda h: (h,), after=lambda r: torch.stack([r[0] + 0.1, r[1] * 1.5]))
case("hsplit", lambda h: (h, 2))
case("hsplit", lambda h: (h, [1, 3]))
case("vsplit", lambda h: (h, [1]), after=lambda r: torch.cat([r[0] + 0.1, r[1] * 1.5]))
case("vsplit", lambda h: (h, 2), after=lambda r: torch.cat([r[0] + 0.1, r[1] * 1.5]))
case("slice", lambda h: (h, 1, 1, 4, 2))
case("unfold", lambda h: (h, 2, 3, 1))
case("unfold", lambda h: (h, 2), shape=PICTURE)
case("pixel_shuffle", lambda h: (h, 2), shape=PICTURE)
case("pixel_unshuffle", lambda h: (h, 2), shape=PICTURE)
case("channel_shuffle native_channel_shuffle", lambda h: (h, 2), shape=PICTURE)
case("rot90", lambda h: (h, 1, (1, 2)))
case("fliplr atleast_2d atleast_3d", lambda h: (h,))
case("atleast_2d atleast_3d", lambda h: ([h, h * 2],))
case("deepcopy", lambda h: (h, {}))
case("flipud", lambda h: (h,), after=lambda r: (r + const(2, 4, 1)).flip(0))
case("repeat tile", lambda h: (h, (1, 2, 1)))
case("repeat", lambda h: (h, 2, 1, 1), after=lambda r: torch.add(*(r + const(4, 4, 1)).chunk(2)))
case("tile", lambda h: (h, (2, 1, 1)), after=lambda r: torch.add(*(r + const(4, 4, 1)).chunk(2)))
case("repeat_interleave", lambda h: (h, 2, 1))
case("repeat_interleave", lambda h: (h, torch.tensor([1, 2, 0, 1]), 1))
case("gather", lambda h: (h, 2, PLACES))
case("take_along_dim", lambda h: (h, PLACES, 2))
case("masked_select", lambda h: (h, MASK))
case("diagonal", lambda h: (h, 0, 1, 2))
case("diag_embed", lambda h: (h,))
case("as_strided", lambda h: (h, (2, 3, 6), (24, 6, 1)))
case("sort", lambda h: (h, 2))
case("sort", lambda h: (h,), kwargs={"stable": True, "dim": 2})
case("topk", lambda h: (h, 3, 2))
case("meshgrid", lambda h: ([h[0], h[1]],), shape=ROW, after=lambda r: torch.stack([r[0][:, 0], r[1][0]]))
case(
    "meshgrid",
    lambda h: ([h[0], h[1]],),
    kwargs={"indexing": "xy"},
    shape=ROW,
    after=lambda r: torch.stack([r[0][0], r[1][:, 0]]),
)
case("meshgrid", lambda h: (h[0], h[1]), shape=ROW, after=lambda r: torch.stack([r[0][:, 0], r[1][0]]))
case("_pad_circular", lambda h: (h, (1, 1)))
case("reflection_pad1d replication_pad1d", lambda h: (h, (1, 2)))
case("reflection_pad2d replication_pad2d", lambda h: (h, (1, 2, 0, 1)), shape=PICTURE)
case("reflection_pad3d replication_pad3d", lambda h: (h, (1, 2, 0, 1, 1, 0)), shape=VOLUME)
case("cat concat concatenate stack", lambda h: ([h, h * 0.5], 1))
case("cat", lambda h: ([h, const(2, 2, 6)], 1))
case(
    "cat concat concatenate",
    lambda h: ([h, h * 0.5],),
    after=lambda r: torch.add(*(r + const(4, 4, 1)).chunk(2)),
)
case("vstack row_stack", lambda h: ([h, h * 0.5],), after=lambda r: torch.add(*(r + const(4, 4, 1)).chunk(2)))
case("hstack dstack column_stack", lambda h: ([h, h * 0.5],))
case("pad constant_pad_nd", lambda h: (h, (1, 1)))
case("constant_pad_nd", lambda h: (h, (1, 1), 0.5))
case("pad", lambda h: (h, (1, 1), "constant", 0.5))
case("pad", lambda h: (h, (1, 2), "circular"))
case("pad", lambda h: (h, (1, 2), "reflect"))
case("double cpu", lambda h: (h,))
for cast, kind in (("float", torch.float32), ("half", torch.float16), ("bfloat16", torch.bfloat16)):
    case(cast, lambda h: (h,), after=lambda r: r.double(), digits=4 * torch.finfo(kind).eps)
case("cuda", lambda h: (h,), after=lambda r: r.cpu())
case("to", lambda h: (h, torch.float64))
case("to", lambda h: (h, const(1)))
case("to", lambda h: (h, "cpu", torch.float64))
case("to", lambda h: (h,), kwargs={"dtype": torch.float64, "copy": True})
case("_to_copy to", lambda h: (h,), kwargs={"dtype": torch.float64})
case("type", lambda h: (h, torch.float64))
case("type_as", lambda h: (h, const(1)))
case("view_as reshape_as", lambda h: (h, const(2, 24)))
case("expand_as", lambda h: (h, const(2, 4, 3, 6)), shape=(4, 1, 6))
case("detach data alias lift_fresh", lambda h: (h * 1,))
case("dropout alpha_dropout feature_dropout feature_alpha_dropout", lambda h: (h, 0.5, False))
case("dropout1d", lambda h: (h, 0.5, False))
case("dropout2d", lambda h: (h, 0.5, False), shape=PICTURE)
case("dropout3d", lambda h: (h, 0.5, False), shape=VOLUME)

# ---- several values, some of them constants ----------------------------------------------------------------------
case("where", lambda h: (MASK, h, h * 0.5))
case("where", lambda h: (MASK, h, const(2, 4, 6)))
case("where", lambda h: (h > 0, h, 0.5))
case("where", lambda h: (h > 0, 0.5, h))
case("where", lambda h: (h, MASK, h * 0.5))
case("masked_fill", lambda h: (h, MASK, 0.7))
case("masked_fill", lambda h: (h, MASK, torch.tensor(0.7).double()))
case("masked_scatter", lambda h: (h, MASK, const(2, 4, 6)))
case("masked_scatter", lambda h: (h, MASK, (h * 0.5)[MASK]))
case("scatter", lambda h: (h, 2, IDS.expand(2, 4, 2), const(2, 4, 2)))
case("scatter", lambda h: (h, 2, IDS.expand(2, 4, 2), h[:, :, :2] * 0.5))
case("scatter", lambda h: (h, 2, IDS.expand(2, 4, 2), 0.7))
case("scatter_add", lambda h: (h, 2, IDS.expand(2, 4, 2), const(2, 4, 2)))
case("scatter_add", lambda h: (h, 2, IDS.expand(2, 4, 2), h[:, :, :2] * 0.5))
case("index_put", lambda h: (h, (torch.tensor([0, 1]), IDS), const(2, 6)))
case("index_put", lambda h: (h, (torch.tensor([0, 1]), IDS), h[:, 1] * 0.5, True))
case("index_copy index_add", lambda h: (h, 1, IDS, const(2, 2, 6)))
case("index_copy index_add", lambda h: (h, 1, IDS, h[:, 2:] * 0.5))
case("index_fill", lambda h: (h, 1, IDS, 0.7))
case("index_fill", lambda h: (h, 1, IDS, torch.tensor(0.7).double()))
case("slice_scatter", lambda h: (h, const(2, 2, 6), 1, 1, 3))
case("slice_scatter", lambda h: (h, h[:, 2:] * 0.5, 1, 1, 3))
case("select_scatter", lambda h: (h, h[:, 2] * 0.5, 1, 0))
case("select_scatter", lambda h: (h, const(2, 6), 1, 0))
case("fill", lambda h: (h * 1, 0.5), beside=True)
case("fill", lambda h: (h * 1, torch.tensor(0.5).double()), beside=True)
case("fill", lambda h: (h * 1,), beside=True)  # zero_
case("setitem", lambda h: (h, (slice(None), 1), 0.5))
case("setitem", lambda h: (h, (slice(None), [0, 2]), h[:, :2] * 0.5))
case("copy", lambda h: (h * 1, h.flip(2) * 0.5))
case("copy", lambda h: (h * 1, const(6)), beside=True)
case("copy", lambda h: (torch.zeros(2, 4, 6).double(), h))
case("zeros_like ones_like rand_like randn_like", lambda h: (h,), beside=True)
case("full_like", lambda h: (h, 0.7), beside=True)
case("new_zeros new_ones", lambda h: (h, (2, 4, 6)), beside=True)
case("new_full", lambda h: (h, (2, 4, 6), 0.7), beside=True)
case("new_tensor", lambda h: (h, [0.5]), beside=True)
case("empty_like", lambda h: (h,), after=lambda r: r.fill_(0.3), beside=True)
case("new_empty", lambda h: (h, (2, 4, 6)), after=lambda r: r.fill_(0.3), beside=True)

# ---- sums, means, maxima -----------------------------------------------------------------------------------------
case("avg_pool1d max_pool1d max_pool1d_with_indices", lambda h: (h, 2))
case("avg_pool1d", lambda h: (h, [2], [2]))
case("avg_pool2d max_pool2d max_pool2d_with_indices", lambda h: (h, [2, 2]), shape=PICTURE)
case("avg_pool3d max_pool3d max_pool3d_with_indices", lambda h: (h, [2, 2, 2]), shape=VOLUME)
case("adaptive_avg_pool1d adaptive_max_pool1d", lambda h: (h, [4]))
case("adaptive_avg_pool2d adaptive_max_pool2d", lambda h: (h, [3, 2]), shape=PICTURE)
case("adaptive_avg_pool3d adaptive_max_pool3d", lambda h: (h, [3, 2, 1]), shape=VOLUME)
case("fractional_max_pool2d", lambda h: (h, 2, (2, 3), None, False, torch.full((2, 4, 2), 0.3).double()), shape=PICTURE)
case("fractional_max_pool2d", lambda h: (h, [2, 2], [2, 3], torch.full((2, 4, 2), 0.3).double()), shape=PICTURE)
case(
    "max_unpool2d", lambda h: (h, torch.arange(0, 96, 4).reshape(1, 1, 4, 6).expand(2, 4, 4, 6), (8, 12)), shape=PICTURE
)
case("max_unpool2d", lambda h: (h, torch.arange(0, 96, 4).reshape(1, 1, 4, 6).expand(2, 4, 4, 6), 2), shape=PICTURE)
case("mean sum nansum amax amin logsumexp", lambda h: (h, 2))
case("mean sum nansum amax amin logsumexp", lambda h: (h, [1, 2]))
case("mean sum", lambda h: (h, (1, 2), True))
case("prod median kthvalue max min cummax cumsum", lambda h: (h, 2))
case("kthvalue", lambda h: (h, 2, 2))
case("std var", lambda h: (h, 2))
case("std var", lambda h: (h, [1, 2]), kwargs={"correction": 0})
case("norm linalg_norm linalg_vector_norm", lambda h: (h, 2, 2))
case("norm linalg_norm linalg_vector_norm", lambda h: (h, 2, [2]))
case("norm", lambda h: (h,), kwargs={"dim": 2, "keepdim": True})
case("hypot", lambda h: (h, h.flip(2)))
case("maximum minimum fmax fmin max min", lambda h: (h, h.flip(2)))
case("maximum minimum fmax fmin max min", lambda h: (h, const(6)))
case("upsample_nearest1d", lambda h: (h, [12]))
case("upsample_linear1d", lambda h: (h, [12], False))
case("upsample_nearest2d upsample_nearest", lambda h: (h, [8, 12]), shape=PICTURE)
case("upsample_bilinear upsample_bilinear2d", lambda h: (h, [8, 12]), shape=PICTURE)
case("upsample_bilinear2d upsample_bicubic2d", lambda h: (h, [8, 12], True), shape=PICTURE)
case("upsample_nearest3d", lambda h: (h, [8, 8, 8]), shape=VOLUME)
case("upsample_nearest1d", lambda h: (h, [12], None))
case("upsample_linear1d", lambda h: (h, [12], True, None))
case("upsample_nearest3d", lambda h: (h, None, [2.0, 2.0, 2.0]), shape=VOLUME)
case("upsample_trilinear3d", lambda h: (h, None, True, [2.0, 2.0, 2.0]), shape=VOLUME)
case("upsample_trilinear3d", lambda h: (h, [8, 8, 8], False), shape=VOLUME)
case("upsample_bilinear2d upsample_nearest2d", lambda h: (h, [8, 12], False, None), shape=PICTURE)
case("upsample_nearest1d upsample_nearest2d", lambda h: (h, None, [2.0, 2.0]), shape=PICTURE)
case("interpolate upsample", lambda h: (h, None, 2), shape=PICTURE)
for mode in ("bilinear", "bicubic", "area"):
    case("interpolate", lambda h, mode=mode: (h, (7, 5), None, mode), shape=PICTURE)
case("fold", lambda h: (h, (3, 4), 2))
case("col2im", lambda h: (h, [3, 4], [2, 2], [1, 1], [0, 0], [1, 1]))
case("im2col", lambda h: (h, [2, 2], [1, 1], [0, 0], [1, 1]), shape=PICTURE)
case("lp_pool1d", lambda h: (h, 2, 2))
case("lp_pool2d", lambda h: (h, 2, 2), shape=PICTURE)
case("lp_pool1d", lambda h: (h, 3, 2), before=positive)
# Over the samples too: for one sample.
case(
    "mean sum nansum amax amin prod median max min std var norm linalg_norm linalg_vector_norm", lambda h: (h,), batch=1
)
case("norm", lambda h: (h, 2), batch=1)
case("norm", lambda h: (h, 2, [2], False), kwargs={"dtype": torch.float64})
case("norm", lambda h: (h, 2), kwargs={"dtype": torch.float64}, batch=1)
case("linalg_norm", lambda h: (h, "fro"), shape=(4,), batch=1)
case("trace", lambda h: (h[0],), shape=(4, 4), after=lambda r: torch.stack([r, r * 0]))
case("softmax log_softmax softmin", lambda h: (h, 2))
case("softmax log_softmax", lambda h: (h, 2, False))
GRID = torch.rand(2, 3, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
case("grid_sample", lambda h: (h, GRID), shape=PICTURE)
case("grid_sample", lambda h: (h, torch.tanh(h[:, :2, :3, :3]).movedim(1, -1)), shape=PICTURE)
case("grid_sampler", lambda h: (h, GRID, 0, 0, False), shape=PICTURE)
case("affine_grid", lambda h: (h, (2, 1, 3, 3), False), shape=(2, 3))

# ---- elementwise -------------------------------------------------------------------------------------------------
case(
    "relu abs relu6 softplus exp square exp2 sigmoid hardsigmoid expm1 sin cos tan atan sinh cosh asinh erf erfc sinc "
    "nan_to_num softsign hardtanh elu selu celu gelu silu mish hardswish tanh tanhshrink softshrink hardshrink "
    "log_sigmoid neg negative leaky_relu rrelu",
    lambda h: (h,),
)
case("sqrt rsqrt log log2 log10 log1p reciprocal", lambda h: (h,), before=positive)
case("acosh", lambda h: (h,), before=lambda h: h.abs() + 1.1)
case("asin acos atanh", lambda h: (h,), before=unit)
case("leaky_relu", lambda h: (h, 0.2))
case("rrelu", lambda h: (h, 0.1, 0.3, False))
case("prelu", lambda h: (h, const(4)))
case("clamp clip hardtanh", lambda h: (h, -0.5, 0.4))
case("clamp_min clamp_max clamp", lambda h: (h, 0.2))
case("clamp clip", lambda h: (h, None, const(6)))
case("clamp_min clamp_max", lambda h: (h, const(6)))
case("threshold", lambda h: (h, 0.1, 0.3))
case("pow", lambda h: (h, 2))
case("pow", lambda h: (h, 1.5), before=positive)
case("rpow", lambda h: (h, 2.0))
case("pow", lambda h: (2.0, h))
case("pow", lambda h: (h, const(6)), before=positive)
case("gelu", lambda h: (h,), kwargs={"approximate": "tanh"})

# ---- sums and products of two ------------------------------------------------------------------------------------
case("add sub subtract rsub mul multiply", lambda h: (h, h.flip(2)))
case("add sub subtract rsub mul multiply div divide true_divide", lambda h: (h, 0.7))
case("add sub subtract rsub mul multiply div divide true_divide", lambda h: (h, const(6)))
case("add sub subtract rsub", lambda h: (h, h.flip(2)), kwargs={"alpha": 0.5})
case("add sub subtract rsub", lambda h: (h, const(4, 1)), kwargs={"alpha": -2})
case("add sub mul div", lambda h: (const(2, 4, 6), h))
case("mul", lambda h: (h, torch.sigmoid(h.mean(2, keepdim=True))))
case("div divide true_divide", lambda h: (h, positive(h)))
case("rdiv", lambda h: (h, 2.0), before=positive)
case("addcmul", lambda h: (h, h.flip(2), const(6)))
case("addcmul", lambda h: (const(2, 4, 6), h, h.flip(2)), kwargs={"value": 0.5})
case("addcdiv", lambda h: (h, h.flip(2), positive(const(6))))
case("addcdiv", lambda h: (h, h.flip(2), positive(h)), kwargs={"value": 0.5})
case("lerp", lambda h: (h, h.flip(2), 0.3))
case("lerp", lambda h: (h, const(2, 4, 6), const(2, 4, 6).sigmoid()))
case("lerp", lambda h: (h, h.flip(2), torch.sigmoid(h)))
case("glu", lambda h: (h, 1))

# Every function that 255 models of torchvision and timm call (torch 2.13), as a form of the rows above.
CENSUS = [
    "nn.functional.conv2d", "nn.functional.linear", "nn.functional.dropout", "Tensor.add", "Tensor.flatten",
    "nn.functional.adaptive_avg_pool2d", "nn.functional.batch_norm", "Tensor.mul", "nn.functional.relu",
    "Tensor.reshape", "Tensor.permute", "nn.functional.gelu", "Tensor.transpose", "cat", "nn.functional.layer_norm",
    "Tensor.mean", "Tensor.__getitem__", "Tensor.view", "nn.functional.max_pool2d", "Tensor.unbind",
    "nn.functional.scaled_dot_product_attention", "Tensor.matmul", "Tensor.contiguous", "Tensor.add_",
    "Tensor.softmax", "flatten", "Tensor.unsqueeze", "Tensor.expand", "nn.functional.pad",
    "nn.functional.avg_pool2d", "sigmoid", "nn.functional.silu", "Tensor.chunk", "functional.split",
    "Tensor.sigmoid", "Tensor.sub", "nn.functional.interpolate", "stack", "Tensor.div", "Tensor.to",
    "nn.functional.hardswish", "nn.functional.hardsigmoid", "nn.functional.softmax", "nn.functional.normalize",
    "roll", "permute", "Tensor.sum", "Tensor.sin", "Tensor.cos", "clamp", "Tensor.float", "Tensor.split",
    "Tensor.exp", "nn.functional.group_norm", "Tensor.new_zeros", "Tensor.masked_fill", "Tensor.__pow__",
    "Tensor.neg", "functional.einsum", "nn.functional.hardtanh", "nn.functional.multi_head_attention_forward",
    "Tensor.reshape_as", "transpose", "nn.functional.conv1d", "Tensor.repeat", "Tensor.repeat_interleave", "mean",
    "nn.functional.leaky_relu", "Tensor.amax", "functional.meshgrid", "nn.functional.rms_norm", "Tensor.type_as",
    "div", "Tensor.__rpow__", "sum", "nn.functional.unfold", "Tensor.clone", "Tensor.zero_", "Tensor.unfold",
    "square", "Tensor.squeeze", "Tensor.__rsub__", "Tensor.div_", "Tensor.norm", "addcmul", "Tensor.cumsum", "mul",
    "Tensor.tile", "unbind", "nn.functional.conv_transpose2d", "Tensor.pow", "rsqrt", "nn.functional.avg_pool1d",
    "softmax", "nn.functional.fold", "Tensor.max", "chunk", "swapaxes", "tanh",
]  # fmt: skip
