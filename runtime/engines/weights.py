"""Constants in the form that CPU matmuls want."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qcompile.ir.lowered import Plan, Step
from qcompile.ir.memory import buffers_in, dtype_of
from qcompile.quant.activations import signed_weight
from qcompile.quant.reference import dequantize
from qcompile.runtime.artifact import ArtifactContents
from qcompile.runtime.engines.packed import PACKED_LINEARS, packed_weight
from qcompile.runtime.engines.program import Call, Operands

_EMBED_CODES = "qcompile.quantized_embedding.default"
_OTHER_READERS = {_EMBED_CODES: 1, "qcompile.dequantize.default": 0}
"""Operators beside the linear that read codes -> the place of the codes among their arguments."""
_WEIGHTS = {**PACKED_LINEARS, "aten.linear.default": 1}
"""Linears -> the place of their weight among their arguments."""
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Readers(enum.Enum):
    """Who reads a constant."""

    LINEARS = enum.auto()
    """Linears alone, as their weight [N, K]."""
    LINEARS_AND_OTHERS = enum.auto()
    """Linears as their weight, and something else as it is: a head tied to its embedding."""
    OTHERS = enum.auto()


class Form(enum.Enum):
    """What a packed weight is at hand as."""

    PACKED = enum.auto()
    """As it is stored."""
    FLOATS = enum.auto()
    """The floats [N, K] that it stands for (see `by_float_weight`)."""
    INTEGERS = enum.auto()
    """Signed codes [N, K]: int8, or int16 with the zero point taken off."""


def prepared_weights(contents: ArtifactContents, wanted: Callable[[Step, bool], Form]) -> Iterator[tuple[str, Tensor, Readers]]:
    """Every constant, one after the other, and who reads it.

    Args:
        contents: an artifact's.
        wanted: the form a step wants its packed weight in, told whether something beside linears reads it. Where steps differ, it
            stays packed.
    """
    readers, uses = _readers(contents.plan), _uses(contents.plan)
    forms: dict[str, Form] = {}
    for name, steps in readers.items():
        asked = {wanted(step, uses[name] is not Readers.LINEARS) for step in steps}
        forms[name] = asked.pop() if len(asked) == 1 else Form.PACKED
    floats = [step for name, steps in readers.items() if forms[name] is Form.FLOATS for step in steps]
    folded = {part for step in floats for part in packed_weight(step).parts[1:]}
    for name, constant in contents.constants.items():
        form = forms.get(name, Form.PACKED)
        if form is Form.INTEGERS:
            tensor = _integers(contents, readers[name][0])
        elif form is Form.FLOATS:
            tensor = _dequantized(contents, readers[name][0])
        elif name in folded:
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


def _integers(contents: ArtifactContents, step: Step) -> Tensor:
    weight, columns = packed_weight(step), _columns(contents, step)
    codes, _, zero, _ = _parts(contents, step)
    assert codes is not None
    return signed_weight(codes, zero, weight.bits, weight.group_size, columns)


def _dequantized(contents: ArtifactContents, step: Step) -> Tensor:
    weight, columns = packed_weight(step), _columns(contents, step)
    codes, scale, zero, scale2 = _parts(contents, step)
    assert codes is not None
    assert scale is not None
    dtype = dtype_of(contents.plan.entries["forward"].buffers[weight.x].dtype)
    dtype = dtype if dtype in _FLOATS else torch.float32
    return dequantize(codes, scale, zero, weight.bits, weight.group_size, columns, dtype, weight.element, scale2)


def _columns(contents: ArtifactContents, step: Step) -> int:
    columns = contents.plan.entries["forward"].buffers[packed_weight(step).x].shape[-1]
    assert isinstance(columns, int)
    return columns


def _parts(contents: ArtifactContents, step: Step) -> list[Tensor | None]:
    return [None if name is None else contents.constants[name].materialize() for name in packed_weight(step).parts]


def _readers(plan: Plan) -> dict[str, list[Step]]:
    """Codes -> the packed linears of the forward entry that read them."""
    found: dict[str, list[Step]] = {}
    for step in plan.entries["forward"].steps:
        if step.operator in PACKED_LINEARS:
            found.setdefault(step.args[PACKED_LINEARS[step.operator]]["buffer"], []).append(step)
    return found


def _uses(plan: Plan) -> dict[str, Readers]:
    """Every matrix that a linear reads as its weight."""
    weights: set[str] = set()
    others: set[str] = set()
    for step in _steps(plan):
        for place, argument in enumerate(step.args):
            for name in buffers_in(argument):
                (weights if place == _WEIGHTS.get(step.operator) else others).add(name)
        others.update(buffers_in(list(step.kwargs.values())))
    return {name: Readers.LINEARS_AND_OTHERS if name in others else Readers.LINEARS for name in weights}


def _steps(plan: Plan) -> Iterator[Step]:
    for entry in plan.entries.values():
        yield from entry.steps
