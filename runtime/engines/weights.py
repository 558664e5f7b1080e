"""Constants in the form that CPU matmuls want."""

from __future__ import annotations

import enum
from collections.abc import Iterator

import torch
from torch import Tensor

from qcompile.ir.lowered import Plan, Step
from qcompile.ir.memory import buffers_in, dtype_of
from qcompile.quant.reference import dequantize
from qcompile.runtime.artifact import ArtifactContents
from qcompile.runtime.engines.program import Call, Operands

_QUANTIZED = "qcompile.quantized_linear.default"
_EMBED_CODES = "qcompile.quantized_embedding.default"
_OTHER_READERS = {_EMBED_CODES: 1, "qcompile.dequantize.default": 0}
"""Operators beside the linear that read codes -> the place of the codes among their arguments."""
_LINEAR = "aten.linear.default"
_DEFAULTS = ("int", None)
"""Element and second level of scales of a quantized linear that names neither."""


class Readers(enum.Enum):
    """Who reads a constant."""

    LINEARS = enum.auto()
    """Linears alone, as their weight [N, K]."""
    LINEARS_AND_OTHERS = enum.auto()
    """Linears as their weight, and something else as it is: a head tied to its embedding."""
    OTHERS = enum.auto()


def float_weights(contents: ArtifactContents) -> Iterator[tuple[str, Tensor, Readers]]:
    """Every constant, one after the other, and who reads it.

    Codes of quantized linears become the float weights they stand for, under the codes' name (see `by_float_weight`).
    """
    readers = _readers(contents.plan)
    scales = {part["buffer"] for step in readers.values() for part in (*step.args[2:4], *step.args[8:9]) if part}
    uses = _uses(contents.plan)
    for name, constant in contents.constants.items():
        if name in readers:
            tensor = _dequantized(contents, readers[name])
        elif name in scales:
            tensor = torch.empty(constant.shape, dtype=constant.dtype)  # folded into the weights, never read
        else:
            tensor = constant.materialize()
        yield name, tensor, uses.get(name, Readers.OTHERS)


def by_float_weight(step: Step, operands: Operands) -> Call | None:
    """How a step runs whose codes became a float weight because a linear reads them too (a head tied to its embedding); else None."""
    place = _OTHER_READERS.get(step.operator)
    if place is None or operands.args[place].dtype == torch.uint8:
        return None
    weight, out = operands.args[place], operands.out
    if step.operator == _EMBED_CODES:
        indices = operands.args[0]
        return lambda: out.copy_(weight[indices])
    return lambda: out.copy_(weight)


def _dequantized(contents: ArtifactContents, step: Step) -> Tensor:
    x, codes, scale, zero, _, bits, group_size, element, scale2 = (*step.args, *_DEFAULTS[len(step.args) - 7 :])
    buffers = contents.plan.entries["forward"].buffers
    columns = buffers[x["buffer"]].shape[-1]
    assert isinstance(columns, int)
    parts = [None if part is None else contents.constants[part["buffer"]].materialize() for part in (codes, scale, zero, scale2)]
    packed, factor, offset, second = parts
    assert packed is not None
    assert factor is not None
    return dequantize(packed, factor, offset, bits, group_size, columns, dtype_of(buffers[x["buffer"]].dtype), element, second)


def _readers(plan: Plan) -> dict[str, Step]:
    """Codes -> a quantized linear that reads them."""
    return {step.args[1]["buffer"]: step for step in _steps(plan) if step.operator == _QUANTIZED}


def _uses(plan: Plan) -> dict[str, Readers]:
    """Every matrix that a linear reads as its weight."""
    weights: set[str] = set()
    others: set[str] = set()
    for step in _steps(plan):
        for place, argument in enumerate(step.args):
            for name in buffers_in(argument):
                (weights if step.operator in (_LINEAR, _QUANTIZED) and place == 1 else others).add(name)
        others.update(buffers_in(list(step.kwargs.values())))
    return {name: Readers.LINEARS_AND_OTHERS if name in others else Readers.LINEARS for name in weights}


def _steps(plan: Plan) -> Iterator[Step]:
    for entry in plan.entries.values():
        yield from entry.steps
