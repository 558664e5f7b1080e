"""What a packed weight is, told in the metadata of the node that makes numbers of it or multiplies by it.

Nodes say what they compute and not why: a table of numbers, scales of scales and bits in words come back from a file as arithmetic. Whoever
reads the entries finds which initializers are codes, scales and zero points, and the format; `qcompile.frontend.onnx.described` does, and
believes them where the nodes compute the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcompile.exporters.onnx.emitter import Emitter, Value
from qcompile.quant.described import PREFIX
from qcompile.quant.element import element_of
from qcompile.quant.format import QuantFormat
from qcompile.quant.granularity import Granularity

if TYPE_CHECKING:
    from qcompile.exporters.onnx.weights import Weight


def describe(e: Emitter, made: Value, weight: Weight, layout: str, parts: dict[str, Value | None]) -> Value:
    """Tell what `made`, which reads the initializers `parts`, is made from; returns it."""
    node = made.producer()
    assert node is not None
    told = {"format": str(format_of(e, weight)), "columns": str(weight.columns), "layout": layout}
    told |= {part: str(value.name) for part, value in parts.items() if value is not None}
    node.metadata_props.update({f"{PREFIX}{key}": text for key, text in told.items()})
    return made


def format_of(e: Emitter, weight: Weight) -> QuantFormat:
    """As the graph has it, or as the operands say."""
    known = e.graph.constants[str(weight.codes.target)].format
    if known is not None:
        return known
    runs = 1 if weight.scale2 is None else int(e.shape(weight.scale2)[1])
    element = element_of(weight.element, weight.bits)
    above = -1 if runs == 1 else -(-weight.groups // runs)
    return QuantFormat(element, Granularity(weight.group_size), weight.zero is None, e.dtype(weight.scale), above, weight.minimum)
