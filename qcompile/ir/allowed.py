"""The operators a graph may contain: an allow-list, one by one, because a graph can come from an artifact somebody else made.

Everything here is functional arithmetic on tensors, shapes and numbers; nothing reads a file or runs a program.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from qcompile.ir import activation_ops as _activation_ops  # noqa: F401  registers operators of quantized activations
from qcompile.ir import append_ops as _append_ops  # noqa: F401  registers operators that pack and store at once
from qcompile.ir import cache_ops as _cache_ops  # noqa: F401  registers operators of packed caches
from qcompile.ir import detector_ops as _detector_ops  # noqa: F401  registers operators of detectors
from qcompile.ir import fused_activation_ops as _fused_activation_ops  # noqa: F401  registers producers of quantized activations
from qcompile.ir import fused_asymmetric_ops as _fused_asymmetric_ops  # noqa: F401  registers their asymmetric twins
from qcompile.ir import hadamard_ops as _hadamard_ops  # noqa: F401  registers qcompile::hadamard
from qcompile.ir import ops as _operators  # noqa: F401  registers the qcompile:: operators
from qcompile.ir import ranked_ops as _ranked_ops  # noqa: F401  registers operators of caches that attention ranks
from qcompile.ir import rematerialize_ops as _rematerialize_ops  # noqa: F401  registers operators of caches of sources
from qcompile.ir import retention_ops as _retention_ops  # noqa: F401  registers operators of caches that keep tokens as they came

_ATEN = """
__and__.Scalar __and__.Tensor __or__.Tensor _native_batch_norm_legit_no_training.default _to_copy.default abs.default acos.default
acosh.default adaptive_avg_pool1d.default adaptive_avg_pool2d.default add.Scalar add.Tensor addmm.default all.default all.dim
amax.default amin.default any.default any.dim arange.default arange.start arange.start_step argmax.default argmin.default
asin.default asinh.default atan.default atanh.default avg_pool1d.default avg_pool2d.default avg_pool3d.default baddbmm.default
batch_norm.default bitwise_and.Scalar bitwise_and.Tensor bitwise_left_shift.Tensor bitwise_not.default bitwise_or.Tensor
bitwise_right_shift.Tensor bitwise_right_shift.Tensor_Scalar bitwise_xor.Tensor bmm.default bucketize.Tensor cat.default
ceil.default chunk.default clamp.Tensor clamp.default clamp_max.default clamp_min.default clone.default constant_pad_nd.default
contiguous.default conv1d.default conv2d.default conv2d.padding conv3d.default conv_transpose1d.default conv_transpose2d.input
conv_transpose3d.input copy.default cos.default cosh.default cumprod.default cumsum.default detach.default detach_.default
diff.default div.Scalar div.Tensor div.Tensor_mode dropout.default einsum.default elu.default embedding.default empty.memory_format
empty_like.default eq.Scalar eq.Tensor erf.default exp.default expand.default expand_as.default expm1.default fill.Scalar
fill.Tensor flatten.using_ints flip.default floor.default floor_divide.default fmod.Scalar fmod.Tensor full.default
full_like.default gather.default ge.Scalar ge.Tensor gelu.default grid_sampler.default group_norm.default gt.Scalar gt.Tensor
hardsigmoid.default hardswish.default hardtanh.default index.Tensor index_add.default index_put.default index_select.default
instance_norm.default isinf.default isnan.default layer_norm.default le.Scalar le.Tensor leaky_relu.default lift_fresh_copy.default
linalg_det.default linear.default log.default log1p.default log2.default log_softmax.int logical_and.default logical_not.default
logical_or.default logsumexp.default lt.Scalar lt.Tensor masked_fill.Scalar masked_fill.Tensor matmul.default max.default max.dim
max.other max_pool1d.default max_pool2d.default max_pool3d.default maximum.default mean.default mean.dim min.default min.dim
min.other minimum.default mish.default movedim.int mul.Scalar mul.Tensor narrow.default ne.Scalar ne.Tensor neg.default
new_empty.default new_full.default new_ones.default new_zeros.default nonzero.default one_hot.default
ones.default ones_like.default pad.default
permute.default pixel_shuffle.default pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor prelu.default prod.dim_int reciprocal.default
relu.default relu6.default remainder.Scalar remainder.Scalar_Tensor remainder.Tensor repeat.default repeat_interleave.self_int
reshape.default rms_norm.default roll.default round.default rsqrt.default rsub.Scalar scalar_tensor.default
scaled_dot_product_attention.default scatter.src scatter.value scatter_add.default scatter_reduce.two select.int
select_scatter.default selu.default sigmoid.default sign.default silu.default sin.default sinh.default slice.Tensor
slice_scatter.default softmax.int softplus.default sort.default sort.stable split.Tensor split_with_sizes.default sqrt.default
square.default squeeze.default squeeze.dim squeeze.dims stack.default sub.Scalar sub.Tensor sum.default sum.dim_IntList sym_size.int
t.default tan.default tanh.default tensor_split.sections tile.default to.device to.dtype to.dtype_layout topk.default transpose.int
tril.default triu.default true_divide.Tensor type_as.default unbind.int unflatten.int unfold.default unsqueeze.default
unique_dim.default _unique2.default upsample_bilinear2d.vec upsample_nearest2d.vec
var.correction var.dim view.default view_as.default where.Scalar where.ScalarOther
where.ScalarSelf where.self zeros.default zeros_like.default
"""
_QCOMPILE = """
rms_norm add_rms_norm rotary_table rope gated_activation attention cache_append cache_append_ cache_attend dequantize quantized_linear
quantized_embedding moe_experts gather_last hadamard pack_vectors cache_attend_packed append_packed append_packed_ quantize_activation
quantize_activation_asym
quantize_static dequantize_activation integer_linear integer_conv2d float8_linear norm_quantize add_norm_quantize gated_quantize
hadamard_quantize norm_quantize_asym add_norm_quantize_asym gated_quantize_asym hadamard_quantize_asym with_recent settle settle_ retain
retain_ attend_settled attend_ranked attend_ranked_ cache_store cache_store_ attend_rematerialized
attend_settled_sources non_max_suppression roi_align
"""
_PYTHON = (
    operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg, operator.getitem, operator.pow,
    operator.truediv, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
)  # fmt: skip
_SYMBOLIC = ("sym_max", "sym_min", "sym_not", "sym_ite", "sym_float", "sym_int")


def _find(namespace: Any, name: str) -> Any | None:
    packet, _, overload = name.partition(".")
    return getattr(getattr(namespace, packet, None), overload or "default", None)


def _table() -> dict[str, Callable[..., Any]]:
    table: dict[str, Callable[..., Any]] = {}
    for name in _ATEN.split():
        overload = _find(torch.ops.aten, name)
        if overload is not None:
            table[f"aten.{name}"] = overload
    for name in _QCOMPILE.split():
        table[f"qcompile.{name}.default"] = getattr(torch.ops.qcompile, name).default
    table |= {f"operator.{function.__name__}": function for function in _PYTHON}
    table |= {f"torch.{name}": getattr(torch, name) for name in _SYMBOLIC}
    table |= {f"math.{function.__name__}": function for function in (math.ceil, math.floor, math.trunc)}
    return table


ALLOWED: dict[str, Callable[..., Any]] = _table()
"""Name in a stored graph -> operator."""

_NAMES: dict[Any, str] = {target: name for name, target in ALLOWED.items()}


def name_of(target: Any) -> str | None:
    """The stored name of an operator, or None if it is not allowed."""
    return _NAMES.get(target)
