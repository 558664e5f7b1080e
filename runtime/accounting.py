"""What a plan takes: cache bytes per token, elements of quantized matrices."""

from __future__ import annotations

import math

from qcompile.ir.lowered import Plan
from qcompile.ir.memory import dtype_of
from qcompile.ir.size import Size

_CODES_ARGUMENT = {
    "qcompile.quantized_linear.default": 1, "qcompile.integer_linear.default": 3, "qcompile.float8_linear.default": 2,
    "qcompile.quantized_embedding.default": 1, "qcompile.dequantize.default": 0,
}  # fmt: skip
"""Operator -> place of its weight's codes among the arguments."""


def cache_bytes_per_token(plan: Plan) -> int:
    """Bytes that one token of one sequence takes in the cache, over all layers; 0 without a cache."""
    entry = plan.entries.get("decode")
    if entry is None:
        return 0
    states = [buffer for buffer in entry.buffers.values() if buffer.kind == "state"]
    # State [P, L, R, D]: one row of a page holds L·D numbers.
    return sum(math.prod(map(_static, (state.shape[1], state.shape[3]))) * dtype_of(state.dtype).itemsize for state in states)


def _static(size: Size) -> int:
    assert isinstance(size, int)  # plan-memory makes only pages, batch and sequence symbolic
    return size


def elements_of_codes(plan: Plan) -> dict[str, int]:
    """For each buffer of codes [N, ceil(K·b/8)] the elements N·K of the matrix, K from the step that reads it."""
    entry = plan.entries["forward"]
    found: dict[str, int] = {}
    for step in entry.steps:
        if step.operator not in _CODES_ARGUMENT:
            continue
        name = step.args[_CODES_ARGUMENT[step.operator]]["buffer"]
        wide = step.args[0]["buffer"] if step.operator.endswith("_linear.default") else step.outputs[0]
        found[name] = _static(entry.buffers[name].shape[0]) * _static(entry.buffers[wide].shape[-1])
    return found
