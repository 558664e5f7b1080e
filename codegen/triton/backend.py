"""The Triton backend: which operators there are, and the `Backend` protocol over them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from qcompile.codegen.triton import (
    attention,
    cache,
    code_linear,
    elementwise,
    embedding,
    gather,
    linear,
    norm,
    packed_append,
    packed_attention,
    quantize,
    retained,
    rotary,
    sampling,
    settle,
    settled_attention,
)
from qcompile.codegen.triton.contract import Operator, lacks_float8
from qcompile.codegen.triton.tiles import architecture
from qcompile.errors import CoverageError
from qcompile.ir.lowered import Kernel, KernelSpec

OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "linear": linear.LINEAR,
        "quantized_linear": linear.QUANTIZED_LINEAR,
        "rms_norm": norm.RMS_NORM,
        "add_rms_norm": norm.ADD_RMS_NORM,
        "layer_norm": norm.LAYER_NORM,
        "rotary_table": rotary.ROTARY_TABLE,
        "rope": rotary.ROPE,
        "gated_activation": elementwise.GATED_ACTIVATION,
        "activation": elementwise.ACTIVATION,
        "add": elementwise.ADD,
        "cache_append_": cache.APPEND,
        "append_packed_": packed_append.APPEND_PACKED,
        "cache_attend": attention.ATTEND,
        "cache_attend_packed": packed_attention.ATTEND_PACKED,
        "with_recent": retained.WITH_RECENT,
        "settle_": settle.SETTLE,
        "retain_": retained.RETAIN,
        "attend_settled": settled_attention.ATTEND_SETTLED,
        "embedding": embedding.EMBEDDING,
        "quantized_embedding": embedding.QUANTIZED_EMBEDDING,
        "gather_last": gather.GATHER_LAST,
        "argmax": sampling.ARGMAX,
        "topk": sampling.TOPK,
        "integer_linear": code_linear.INTEGER_LINEAR,
        "float8_linear": code_linear.FLOAT8_LINEAR,
        "hadamard": quantize.HADAMARD,
        "quantize_activation": quantize.QUANTIZE_ACTIVATION,
        "quantize_activation_asym": quantize.QUANTIZE_ACTIVATION_ASYM,
        "quantize_static": quantize.QUANTIZE_STATIC,
        "hadamard_quantize": quantize.HADAMARD_QUANTIZE,
        "norm_quantize": quantize.NORM_QUANTIZE,
        "add_norm_quantize": quantize.ADD_NORM_QUANTIZE,
        "gated_quantize": quantize.GATED_QUANTIZE,
        "hadamard_quantize_asym": quantize.HADAMARD_QUANTIZE_ASYM,
        "norm_quantize_asym": quantize.NORM_QUANTIZE_ASYM,
        "add_norm_quantize_asym": quantize.ADD_NORM_QUANTIZE_ASYM,
        "gated_quantize_asym": quantize.GATED_QUANTIZE_ASYM,
    }
)


class TritonBackend:
    """Emits complete Triton sources for one architecture; needs no Triton (only building does)."""

    name = "triton"

    def __init__(self, arch: str) -> None:
        self.arch = architecture(arch)

    def refuses(self, spec: KernelSpec) -> str | None:
        """Why `spec` cannot be served, or None if it can."""
        operator = OPERATORS.get(spec.operator)
        if operator is None:
            return f"operator {spec.operator!r} has no Triton kernel: expected one of {', '.join(OPERATORS)}"
        return operator.objection(spec) or lacks_float8(spec, self.arch)

    def emit(self, spec: KernelSpec) -> Kernel:
        """The kernel for a specification that is not refused.

        Raises:
            CoverageError: if it is.
        """
        reason = self.refuses(spec)
        if reason is not None:
            raise CoverageError(f"{spec.operator} on {self.arch.name}: {reason}; ask refuses() before emit()")
        return OPERATORS[spec.operator].emit(spec, self.arch)
