"""Operators, by family; importing this registers all rules."""

from qcompile.frontend.onnx.rules import (
    attention,
    cache,
    control,
    convolution,
    detection,
    elementwise,
    fused_attention,
    indexing,
    linear,
    microsoft,
    normalization,
    number_shapes,
    numbers,
    packed,
    pooling,
    quantization,
    quantized_operators,
    recurrent,
    reduction,
    resize,
    scatter,
    sequences,
    shaping,
)

__all__ = [
    "attention", "cache", "control", "convolution", "detection", "elementwise", "fused_attention", "indexing", "linear",
    "microsoft", "normalization", "number_shapes", "numbers", "packed", "pooling", "quantization", "quantized_operators",
    "recurrent", "reduction", "resize", "scatter", "sequences", "shaping",
]  # fmt: skip
