"""The table: torch function -> what relevance does there.

One row a function, under its plain name; methods, operators, in-place forms and ``torch.ops.aten`` overloads of the
same name share the row (``plain_name``).  The engine carries c = R / activation backwards, so for many functions the
ordinary gradient already is the right answer (see the comments of each group); the others name a handler of
``nodes.Interception``.  A function that is not in the table is an error, never a guess.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One row.

    handler  name of the method of ``nodes.Interception`` that runs the call
    sign     of the result: ``keeps`` (non-negative if every input is), ``nonnegative`` (always), ``unknown``
    moves    it only moves, copies or drops values: relevance R goes through it as c does
    gate     its result weighs what it is multiplied with, as a sigmoid's
    """

    handler: str
    sign: str = "unknown"
    moves: bool = False
    gate: bool = False


def _rows(names: str, handler: str, sign: str = "unknown", moves: bool = False, gate: bool = False) -> dict[str, Entry]:
    return {name: Entry(handler, sign, moves, gate) for name in names.split()}


TABLE: dict[str, Entry] = {
    # Linear nodes: the preset's rule decides.
    **_rows("conv1d conv2d conv3d", "convolution"),
    **_rows("convolution", "any_convolution"),
    **_rows("conv_transpose1d conv_transpose2d conv_transpose3d", "transposed_convolution"),
    **_rows("linear matmul mm bmm mv einsum addmm baddbmm addbmm addmv tensordot inner bilinear rmatmul", "product"),
    **_rows("lstm gru rnn_tanh rnn_relu", "recurrent"),
    **_rows("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell", "recurrent_cell"),
    **_rows("batch_norm _native_batch_norm_legit_no_training", "batch_norm"),
    # Attention, and functions of Python that are opened: their own torch functions come here one by one.
    **_rows("scaled_dot_product_attention", "attention"),
    **_rows("multi_head_attention_forward normalize", "open"),
    # Normalisations by statistics of the sample itself.
    **_rows("layer_norm native_layer_norm group_norm native_group_norm rms_norm instance_norm", "norm"),
    **_rows("local_response_norm", "local_response_norm"),
    # Functions that only move values: each input's c is its outputs' c, exactly the gradient.
    **_rows(
        "flatten reshape view permute transpose t swapaxes swapdims movedim moveaxis squeeze "
        "unsqueeze contiguous clone expand broadcast_to flip roll narrow select getitem "
        "unflatten ravel T mT H split split_with_sizes chunk tensor_split unbind hsplit vsplit slice unfold "
        "pixel_shuffle pixel_unshuffle channel_shuffle rot90 fliplr flipud repeat tile "
        "repeat_interleave atleast_2d atleast_3d gather index take_along_dim masked_select diagonal diag_embed "
        "as_strided sort topk positive real meshgrid "
        "_pad_circular _reshape_alias reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
        "replication_pad2d replication_pad3d adjoint",
        "gradient",
        "keeps",
        moves=True,
    ),
    **_rows("index_select", "index_select", "keeps", moves=True),
    **_rows("native_channel_shuffle deepcopy", "instead", "keeps", moves=True),
    **_rows(
        "cat concat concatenate stack hstack vstack dstack column_stack row_stack", "gradient", "keeps", moves=True
    ),
    # Linear in several values together; constants among them absorb their part.
    **_rows(
        "where masked_fill masked_scatter scatter index_put index_copy index_fill index_add scatter_add "
        "slice_scatter select_scatter",
        "gradient",
        "keeps",
    ),
    **_rows("fill", "fill", "keeps"),
    **_rows("pad constant_pad_nd", "padding", "keeps", moves=True),
    **_rows("float double half bfloat16 cuda cpu", "gradient", "keeps", moves=True),
    **_rows("to type type_as view_as reshape_as expand_as", "first", "keeps", moves=True),
    **_rows("_pack_padded_sequence", "pack", "keeps", moves=True),
    **_rows("_pad_packed_sequence", "unpack", "keeps", moves=True),
    **_rows("pad_sequence", "pad_sequence", "keeps", moves=True),
    # Functions that take only the shape and type of a tensor.
    **_rows(
        "zeros_like ones_like full_like empty_like rand_like randn_like "
        "new_zeros new_ones new_full new_empty new_tensor",
        "constant",
    ),
    **_rows("detach data alias lift_fresh", "identity", "keeps", moves=True),
    **_rows(
        "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout",
        "dropout",
        "keeps",
        moves=True,
    ),
    # Linear with fixed positive weights: c of each summand is c of the sum, so that shares are proportional.
    **_rows(
        "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
        "mean sum nansum upsample_nearest upsample_bilinear upsample_nearest1d upsample_nearest2d upsample_nearest3d "
        "upsample_bilinear2d upsample_linear1d upsample_trilinear3d fold col2im im2col cumsum lp_pool1d lp_pool2d "
        "trace",
        "gradient",
        "keeps",
    ),
    # Homogeneous of degree 1: Euler's theorem says that the gradient keeps relevance.
    **_rows("norm linalg_vector_norm linalg_norm hypot", "gradient", "nonnegative"),
    **_rows("std", "gradient", "nonnegative"),
    # Degree 2: half the gradient.
    **_rows("var", "variance", "nonnegative"),
    # First-order (the gradient); what it does not carry is absorbed by the function itself.
    **_rows("softmax", "balanced", "nonnegative", gate=True),
    **_rows("softmin", "balanced", "nonnegative", gate=True),
    **_rows("log_softmax logsumexp prod", "balanced"),
    # Only the first argument carries relevance; the others say where to look.
    **_rows("grid_sample grid_sampler affine_grid", "first"),
    # Linear too, but bicubic weights can be negative.
    **_rows("interpolate upsample", "gradient"),
    # Winner takes all: the gradient routes c to the greatest entry.  For pooling the preset may say otherwise.
    **_rows(
        "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
        "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices",
        "max_pool",
        "keeps",
    ),
    **_rows(
        "fractional_max_pool2d amax amin median kthvalue max_unpool2d cummax",
        "gradient",
        "keeps",
    ),
    **_rows("max min maximum minimum fmax fmin", "extremum", "keeps"),
    # Piecewise linear through 0: f(x) = f'(x) x, so the gradient is f(x) / x.
    **_rows("relu", "relu", "nonnegative"),
    **_rows("leaky_relu prelu rrelu abs", "gradient"),
    # Sums: every summand gets the c of the sum (the proportional split); a constant summand absorbs its part.
    **_rows("add sub subtract rsub", "add", "keeps"),
    # Products and quotients with a constant are diagonal.
    **_rows("mul multiply div divide true_divide neg negative", "scale", "keeps"),
    **_rows("addcmul addcdiv lerp", "combination"),
    **_rows("glu", "glu"),
    **_rows("rdiv rpow", "elementwise"),
    # Elementwise functions: c_x = c_y f(x) / x.
    **_rows("relu6 softplus exp square exp2 sqrt rsqrt", "elementwise", "nonnegative"),
    **_rows("sigmoid hardsigmoid", "elementwise", "nonnegative", gate=True),
    **_rows(
        "pow reciprocal log log2 log10 log1p expm1 sin cos tan asin acos atan sinh cosh asinh acosh atanh erf erfc "
        "sinc nan_to_num softsign hardtanh clamp clamp_min clamp_max clip elu selu celu gelu silu mish hardswish tanh "
        "tanhshrink softshrink hardshrink threshold log_sigmoid",
        "elementwise",
    ),
    **_rows("setitem copy", "assign"),
}

# Operators and other spellings of a row.
ALIASES = {
    "__add__": "add", "__iadd__": "add", "__radd__": "add",
    "__sub__": "sub", "__isub__": "sub", "__rsub__": "rsub",
    "__mul__": "mul", "__imul__": "mul", "__rmul__": "mul",
    "__truediv__": "div", "__itruediv__": "div", "__idiv__": "div", "__div__": "div",
    "__neg__": "neg", "__matmul__": "matmul", "__rmatmul__": "rmatmul", "__abs__": "abs",
    "__rtruediv__": "rdiv", "__rdiv__": "rdiv", "__pow__": "pow", "__ipow__": "pow", "__rpow__": "rpow",
    "__pos__": "positive",
    "__getitem__": "getitem", "__setitem__": "setitem", "__deepcopy__": "deepcopy",
    "_max_pool1d": "max_pool1d", "_max_pool2d": "max_pool2d", "_max_pool3d": "max_pool3d",
    "boolean_dispatch": "max_pool2d", "_to_copy": "to", "_unsafe_view": "view",
    "_softmax": "softmax", "_log_softmax": "log_softmax", "zero": "fill", "_unsafe_index": "index",
    "_scaled_dot_product_flash_attention_for_cpu": "scaled_dot_product_attention", "_fused_rms_norm": "rms_norm",
    "expit": "sigmoid",
    "_adaptive_avg_pool2d": "adaptive_avg_pool2d",
    "_adaptive_avg_pool3d": "adaptive_avg_pool3d",
}  # fmt: skip

# Functions whose name ends in "_" change their argument; these do so too.
IN_PLACE_OPERATORS = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__setitem__"}


def plain_name(function: Callable[..., Any]) -> tuple[str, bool]:
    """The row's name for a torch function as the engine sees it, and whether it works in place.

    ``torch.Tensor.relu_`` -> ("relu", True); ``torch.ops.aten.add.Tensor`` -> ("add", False);
    the getter of ``Tensor.T`` -> ("T", False).
    """
    name = getattr(function, "__name__", str(function))
    packet = getattr(function, "overloadpacket", None)
    if packet is not None:  # torch.ops.aten.add.Tensor
        name = packet.__name__
    elif name == "__get__":
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    if name == "requires_grad_":  # a leaf for the model's own derivatives, which no relevance needs
        return "detach", True
    name = name.removeprefix("special_")  # torch.special.expit
    in_place = name in IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
    if in_place and name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return ALIASES.get(name, name), in_place
