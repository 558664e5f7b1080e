"""Constants in the form that CPU matmuls want."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qcompile.ir.lowered import Plan, Step
from qcompile.ir.memory import dtype_of
from qcompile.quant.reference import dequantize
from qcompile.runtime.artifact import ArtifactContents
from qcompile.runtime.engines.program import Call, Operands

_QUANTIZED = "qcompile.quantized_linear.default"
_EMBED_CODES = "qcompile.quantized_embedding.default"
_OTHER_READERS = {_EMBED_CODES: 1, "qcompile.dequantize.default": 0}
"""Operators beside the linear that read codes -> the place of the codes among their arguments."""
_LINEAR = "aten.linear.default"
_EMBEDDING = "aten.embedding.default"


def float_weights(contents: ArtifactContents, *, transposed: bool) -> list[tuple[str, Tensor]]:
    """Every constant; codes of quantized linears become float weights [N, K] under the codes' name (see `by_float_weight`).

    With `transposed`, float32 weights that only linears read are stored [K, N] and given as their [N, K] view: one row of
    activations then streams through memory in order, which is up to 1.7 times as fast (49152 x 576: 4.1 against 7.1 ms).
    """
    readers = _readers(contents.plan)
    scales = {step.args[2]["buffer"] for step in readers.values()} | {step.args[3]["buffer"] for step in readers.values() if step.args[3]}
    linear_only = _linear_only(contents.plan)
    made = []
    for name, constant in contents.constants.items():
        if name in readers:
            tensor = _dequantized(contents, readers[name])
        elif name in scales:
            tensor = torch.empty(constant.shape, dtype=constant.dtype)  # folded into the weights, never read
        else:
            tensor = constant.materialize()
        if transposed and tensor.dtype == torch.float32 and (name in readers or name in linear_only):
            tensor = tensor.t().contiguous().t()
        made.append((name, tensor))
    return made


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
    x, codes, scale, zero, _, bits, group_size = step.args
    buffers = contents.plan.entries["forward"].buffers
    columns = buffers[x["buffer"]].shape[-1]
    assert isinstance(columns, int)
    parts = [None if part is None else contents.constants[part["buffer"]].materialize() for part in (codes, scale, zero)]
    packed, factor, offset = parts
    assert packed is not None
    assert factor is not None
    return dequantize(packed, factor, offset, bits, group_size, columns, dtype_of(buffers[x["buffer"]].dtype))


def _readers(plan: Plan) -> dict[str, Step]:
    """Codes -> a quantized linear that reads them."""
    return {step.args[1]["buffer"]: step for step in _steps(plan) if step.operator == _QUANTIZED}


def _linear_only(plan: Plan) -> set[str]:
    """Matrices that linears read as their weight, and nothing else but embeddings (a gather of few rows, strided or not)."""
    weights = {step.args[1]["buffer"] for step in _steps(plan) if step.operator == _LINEAR}
    others = {
        argument["buffer"]
        for step in _steps(plan)
        for place, argument in enumerate(step.args)
        if isinstance(argument, dict) and "buffer" in argument and (step.operator, place) not in ((_LINEAR, 1), (_EMBEDDING, 0))
    }
    return weights - others


def _steps(plan: Plan) -> Iterator[Step]:
    for entry in plan.entries.values():
        yield from entry.steps
