"""How each operator of a graph is written in ONNX: operator -> rule, one file for each kind."""

from __future__ import annotations

from qcompile.exporters.onnx.rules import (
    attention,
    convolution,
    detection,
    elementwise,
    experts,
    indexing,
    linear,
    normalization,
    quantized,
    reductions,
    rotary,
    shapes,
)
from qcompile.exporters.onnx.rules.table import RULES, rule

__all__ = [
    "RULES", "attention", "convolution", "detection", "elementwise", "experts", "indexing", "linear", "normalization", "quantized",
    "reductions", "rotary", "rule", "shapes",
]  # fmt: skip
