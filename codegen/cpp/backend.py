"""The C++ backend: which operators there are, and the `Backend` protocol over them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from qcompile.codegen.cpp import (
    attention,
    cache,
    code_linear,
    elementwise,
    embedding,
    exact_linear,
    float_linear,
    norm,
    pack,
    pointwise,
    quantize,
    retained,
    rotary,
    shaping,
    whole_attention,
)
from qcompile.codegen.cpp.contract import Operator
from qcompile.errors import CoverageError
from qcompile.ir.lowered import Kernel, KernelSpec

OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "linear": float_linear.LINEAR,
        "quantized_linear": exact_linear.QUANTIZED_LINEAR,
        "integer_linear": code_linear.INTEGER_LINEAR,
        **quantize.OPERATORS,
        "rms_norm": norm.RMS_NORM,
        "add_rms_norm": norm.ADD_RMS_NORM,
        "layer_norm": norm.LAYER_NORM,
        "rotary_table": rotary.ROTARY_TABLE,
        "rope": rotary.ROPE,
        "gated_activation": elementwise.GATED_ACTIVATION,
        "activation": elementwise.ACTIVATION,
        "add": elementwise.ADD,
        "cache_append_": cache.APPEND,
        "cache_attend": attention.ATTEND,
        "pack_vectors": pack.PACK,
        "append_packed_": pack.APPEND_PACKED,
        "cache_attend_packed": attention.ATTEND_PACKED,
        "with_recent": retained.WITH_RECENT,
        "settle_": retained.SETTLE,
        "retain_": retained.RETAIN,
        "attend_settled": attention.ATTEND_SETTLED,
        "embedding": embedding.EMBEDDING,
        "quantized_embedding": embedding.QUANTIZED_EMBEDDING,
        "gather_last": embedding.GATHER_LAST,
        "pointwise": pointwise.POINTWISE,
        "cat": shaping.CAT,
        "select_places": shaping.SELECT,
        "gather_places": shaping.GATHER,
        "softmax": shaping.SOFTMAX,
        "row_sum": shaping.SUM,
        "greatest": shaping.GREATEST,
        "attention": whole_attention.ATTENTION,
    }
)


class CppBackend:
    """Emits C++ functions; one source serves every instruction set, needs no compiler (only building does)."""

    name = "native"

    def refuses(self, spec: KernelSpec) -> str | None:
        """Why `spec` cannot be served, or None if it can."""
        operator = OPERATORS.get(spec.operator)
        if operator is None:
            return f"operator {spec.operator!r} has no C++ kernel: expected one of {', '.join(OPERATORS)}"
        return operator.objection(spec)

    def emit(self, spec: KernelSpec) -> Kernel:
        """The kernel for a specification that is not refused.

        Raises:
            CoverageError: if it is.
        """
        reason = self.refuses(spec)
        if reason is not None:
            raise CoverageError(f"{spec.operator} in C++: {reason}; ask refuses() before emit()")
        return OPERATORS[spec.operator].emit(spec)
