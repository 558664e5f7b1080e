"""What a program that holds a row starts from: a load, a normalization, a residual sum, or a gated activation, all in float32."""

from __future__ import annotations

from qcompile.codegen.triton.contract import TRITON_TYPES, integer, pointer, stored
from qcompile.codegen.triton.elementwise import activation_lines
from qcompile.codegen.triton.rotation import Source
from qcompile.codegen.triton.source import Lines, load
from qcompile.ir.lowered import KernelSpec, Parameter

_HALVES_OF_A_MATRIX = ("gate", "up")
_NARROW = ".to(tl.float32)"


def source_parameters(spec: KernelSpec) -> list[Parameter]:
    """Pointers to what `row_source` reads; halves of a fused matrix begin anywhere in its rows, so they are aligned as K is."""
    names = [name for name in ("x", "residual", "weight", "gate", "up", "matrix") if spec.format(name)]
    return [pointer(name, stored(spec, name), alignment(spec) if name in _HALVES_OF_A_MATRIX else 16) for name in names]


def stride_parameters(spec: KernelSpec) -> list[Parameter]:
    """The run-time row strides of the halves of a fused matrix."""
    names = [name for name in _HALVES_OF_A_MATRIX if spec.format(name)]
    return [integer(f"{name}_stride", f"stride:{name}:-2", alignment(spec)) for name in names]


def alignment(spec: KernelSpec) -> int:
    """What may be assumed of a place K numbers into a row."""
    return 16 if spec.size("K") % 16 == 0 else 1


def row_source(spec: KernelSpec) -> Source:
    """The source of a row of x, of `x + residual` (stored as `out`), or of `activation(gate) · up`; normalized if there is an `eps`."""
    if spec.format("gate"):
        return Source(
            [
                *load("left", "gate + row * gate_stride + column", "inside", suffix=_NARROW),
                *load("right", "up + row * up_stride + column", "inside", suffix=_NARROW),
                *activation_lines(str(spec.option("activation")), "left"),
                "wide = activated * right",
            ]
        )
    lines = load("wide", "x + row * K + column", "inside", suffix=_NARROW)
    store = []
    if spec.format("residual"):
        lines += load("other", "residual + row * K + column", "inside", suffix=_NARROW)
        lines += [f"summed = (wide + other).to({TRITON_TYPES[stored(spec, 'out')]})", "wide = summed.to(tl.float32)"]
        store = ["tl.store(out + row * K + column, summed, mask=inside)"]
    if spec.option("eps") is None:
        return Source(lines)
    factor = f"factor = tl.rsqrt(tl.sum(wide * wide, axis=0) / K + {float(spec.option('eps'))})"
    return Source(lines, [*store, factor], normalize(spec), ("x", *(("residual", "out") if store else ())))


def normalize(spec: KernelSpec) -> Lines:
    """Scale the row, and apply the gain where there is one."""
    if not spec.format("weight"):
        return ["wide *= factor"]
    offset = float(spec.option("offset", 0.0))
    gain = load("gain", "weight + column", "inside", suffix=_NARROW)
    return [*gain, f"wide *= factor * (gain + {offset})" if offset else "wide *= factor * gain"]
