"""What a plan takes: bytes by purpose, cache bytes per token, elements of quantized matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping

from qcompile.ir.branches import is_branch
from qcompile.ir.constants import Constant
from qcompile.ir.lowered import Entry, Plan, Step
from qcompile.ir.records import MemoryPlan
from qcompile.ir.size import Size
from qcompile.runtime.cache_layout import CacheLayout, bytes_of, state_buffers

_CODES_ARGUMENT = {
    "qcompile.quantized_linear.default": 1, "qcompile.integer_linear.default": 3, "qcompile.float8_linear.default": 2,
    "qcompile.integer_conv2d.default": 3, "qcompile.quantized_embedding.default": 1, "qcompile.dequantize.default": 0,
}  # fmt: skip
"""Operator -> place of its weight's codes among the arguments."""


def memory_plan(weights: int, layout: CacheLayout | None, arena: int) -> MemoryPlan:
    """The bytes of an engine with this cache, if any."""
    cache = (0, 0, 0) if layout is None else (layout.page_bytes, layout.row_bytes, layout.table_bytes)
    return MemoryPlan(weights, *cache, arena)


def cache_bytes_per_token(plan: Plan) -> int:
    """Bytes that one token of one sequence takes in the cache, over all layers; 0 without a cache."""
    entry = plan.entries.get("decode")
    if entry is None:
        return 0
    return bytes_of(state_buffers(entry), {"pages": 1, "page_tokens": 1, "sequences": 0})


def cache_bytes_per_sequence(plan: Plan) -> int:
    """Bytes of a sequence beside its pages, over all layers: the tokens that are kept as they came; 0 where there are none."""
    entry = plan.entries.get("decode")
    return 0 if entry is None else bytes_of(state_buffers(entry), {"pages": 0, "page_tokens": 0, "sequences": 1})


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
        found[name] = _static(entry.buffers[name].shape[0]) * _columns(step, entry)
    return found


def bits_per_weight(constants: Mapping[str, Constant], plan: Plan) -> float | None:
    """Everything stored for the quantized matrices over their elements; None if nothing is quantized."""
    elements_of = elements_of_codes(plan)
    stored = elements = 0
    for name, constant in constants.items():
        if constant.format is None and not is_branch(name):
            continue
        stored += constant.nbytes * 8
        if name.endswith(".codes"):
            elements += elements_of[name]
    return stored / elements if elements else None


def _columns(step: Step, entry: Entry) -> int:
    """K of the matrix that a step reads as codes."""
    if step.operator == "qcompile.integer_conv2d.default":
        x, kernel, groups = entry.buffers[step.args[0]["buffer"]], step.args[6], step.args[10]
        return _static(x.shape[1]) // groups * math.prod(kernel)  # type: ignore[no-any-return]
    wide = step.args[0]["buffer"] if step.operator.endswith("_linear.default") else step.outputs[0]
    return _static(entry.buffers[wide].shape[-1])
