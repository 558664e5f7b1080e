"""Rotary positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qcompile.exporters.onnx.emitter import Call, Emitter, Value
from qcompile.exporters.onnx.rules.table import rule

_ROTARY_OPSET = 23
"""Since which RotaryEmbedding is a standard operator."""


@dataclass(frozen=True)
class Half:
    """Cosines or sines [B, S, F] of which the graph has every number twice: [B, S, 2F]."""

    value: Value

    def plain(self, e: Emitter) -> Value:
        """Both halves."""
        return e.op("Concat", self.value, self.value, axis=-1)


@rule("qcompile.rotary_table.default")
def rotary_table(e: Emitter, node: Call) -> tuple[Half, Half]:
    """Of positions [B, S] times frequencies [F]."""
    positions, frequencies, scaling, dtype = node.args
    cos, sin = table(e, e.value(positions), e.value(frequencies), e.dtype(frequencies), float(scaling), dtype)
    return Half(cos), Half(sin)


def table(e: Emitter, positions: Value, frequencies: Value, given: torch.dtype, scaling: float, dtype: Any) -> tuple[Value, Value]:
    """Half of the cosines and sines [B, S, F] of integer positions [B, S]; `given` is the type of the frequencies."""
    work = torch.promote_types(given, torch.float32)
    wide = frequencies if given == work else e.cast(frequencies, work)
    angle = e.op("Mul", e.op("Unsqueeze", e.cast(positions, work), e.ints([-1])), wide)
    parts = [e.op(name, angle) for name in ("Cos", "Sin")]
    if scaling != 1:
        parts = [e.op("Mul", part, e.constant(scaling, work)) for part in parts]
    cos, sin = parts if dtype == work else [e.cast(part, dtype) for part in parts]
    return cos, sin


@rule("qcompile.rope.default")
def rope(e: Emitter, node: Call) -> Value:
    """The halves of x [B, H, S, R] turned."""
    x, cos, sin = node.args
    halves: list[Any] = [e.results.get(item) for item in (cos, sin)]
    size = int(e.shape(x)[-1])
    if all(isinstance(half, Half) for half in halves):
        return turned(e, e.value(x), halves[0].value, halves[1].value, size)
    wide = [e.op("Unsqueeze", e.value(item, e.dtype(x)), e.ints([1])) for item in (cos, sin)]
    return _by_halves(e, e.value(x), wide[0], wide[1], size)


def turned(e: Emitter, x: Value, cos: Value, sin: Value, size: int) -> Value:
    """X [B, H, S, R] by half tables [B, S, R/2]; one row of tables serves every row of x."""
    if e.opset >= _ROTARY_OPSET:
        return e.op("RotaryEmbedding", x, cos, sin, interleaved=0)
    both = [e.op("Unsqueeze", e.op("Concat", part, part, axis=-1), e.ints([1])) for part in (cos, sin)]
    return _by_halves(e, x, both[0], both[1], size)


def _by_halves(e: Emitter, x: Value, cos: Value, sin: Value, size: int) -> Value:
    """`x·cos + cat(-high, low)·sin`."""
    low, high = e.ops("Split", x, e.ints([size // 2, size // 2]), count=2, axis=-1)
    return e.op("Add", e.op("Mul", x, cos), e.op("Mul", e.op("Concat", e.op("Neg", high), low, axis=-1), sin))
