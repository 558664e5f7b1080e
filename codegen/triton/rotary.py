"""Rotary positions: the table of cosines and sines, and the rotation."""

from __future__ import annotations

from qcompile.codegen.triton.contract import FLOATS, HALVES, TRITON_TYPES, Operator, integer, kernel, pointer, same_storage, stored, strides
from qcompile.codegen.triton.source import constants, function
from qcompile.codegen.triton.tiles import Architecture, power_of_two
from qcompile.ir.lowered import Kernel, KernelSpec, Launch

HEADS_PER_PROGRAM = 8


def emit_table(spec: KernelSpec, arch: Architecture) -> Kernel:
    """Cosines and sines [rows, 2F] of `positions` [rows] times `inv_freq` [F], twice side by side."""
    size = spec.size("F")
    kind = TRITON_TYPES[stored(spec, "out")]
    scaling = float(spec.option("scaling", 1.0))
    body = [
        *constants({"F": (size, "frequencies"), "BLOCK": (power_of_two(size), "frequencies of a program")}),
        "row = tl.program_id(0).to(tl.int64)",
        "place = tl.arange(0, BLOCK)",
        "inside = place < F",
        "angle = tl.load(positions + row).to(tl.float32) * tl.load(inv_freq + place, mask=inside, other=0.0)",
        f"cosine = (tl.cos(angle) * {scaling}).to({kind})",
        f"sine = (tl.sin(angle) * {scaling}).to({kind})",
        "tl.store(out + row * 2 * F + place, cosine, mask=inside)",
        "tl.store(out + row * 2 * F + F + place, cosine, mask=inside)",
        "tl.store(out1 + row * 2 * F + place, sine, mask=inside)",
        "tl.store(out1 + row * 2 * F + F + place, sine, mask=inside)",
    ]
    parameters = tuple(pointer(name, stored(spec, name)) for name in ("positions", "inv_freq", "out", "out1"))
    launch = Launch(spec.operator, ("rows", 1, 1), parameters, (), num_warps=1)
    doc = "One program computes the angles of one position; the angle is a float32 product, as the definition has it."
    # Reducing an angle beyond 105,615 (position 105,615 of the fastest plane) takes a table in local memory: meant, not spilled.
    functions = [function(spec.operator, [p.name for p in parameters], doc, body)]
    return kernel(spec, arch, functions, [launch], expects=("local",))


def emit_rope(spec: KernelSpec, arch: Architecture) -> Kernel:
    """Rotate the halves of x [B, H, S, R], which may have any strides but a contiguous last axis."""
    heads, size = spec.size("H"), spec.size("R")
    block = min(HEADS_PER_PROGRAM, power_of_two(heads))
    kind = TRITON_TYPES[stored(spec, "out")]
    body = [
        *constants(
            {
                "H": (heads, "heads"),
                "R": (size, "rotated numbers of a head"),
                "HALF": (size // 2, "planes of a head"),
                "BLOCK_H": (block, "heads of a program"),
                "BLOCK": (power_of_two(size // 2), "planes of a program"),
            }
        ),
        "token = tl.program_id(0)",
        "batch = tl.program_id(1).to(tl.int64)",
        "head = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)",
        "plane = tl.arange(0, BLOCK)",
        "inside = plane < HALF",
        "present = (head < H)[:, None] & inside[None, :]",
        "at = x + batch * x_stride_0 + token.to(tl.int64) * x_stride_2 + head[:, None] * x_stride_1 + plane[None, :]",
        "low = tl.load(at, mask=present, other=0.0).to(tl.float32)",
        "high = tl.load(at + HALF, mask=present, other=0.0).to(tl.float32)",
        "angle = batch * table_stride + token * R + plane",
        *(
            f"{name}_{half} = tl.load({name} + angle{offset}, mask=inside, other=0.0).to(tl.float32)[None, :]"
            for name in ("cos", "sin")
            for half, offset in (("low", ""), ("high", " + HALF"))
        ),
        "to = out + ((batch * H + head[:, None]) * sequence + token) * R + plane[None, :]",
        f"tl.store(to, (low * cos_low - high * sin_low).to({kind}), mask=present)",
        f"tl.store(to + HALF, (high * cos_high + low * sin_high).to({kind}), mask=present)",
    ]
    aligned = 16 if size % 16 == 0 else 1
    parameters = (
        pointer("x", stored(spec, "x"), aligned),
        *(pointer(name, stored(spec, name)) for name in ("cos", "sin", "out")),
        integer("sequence"),
        *strides("x", (0, 1, 2), "x", aligned),
        integer("table_stride", "broadcast:cos:0", aligned),
    )
    launch = Launch(spec.operator, ("sequence", "batch", -(-heads // block)), parameters, (), num_warps=4)
    doc = "One program rotates BLOCK_H heads of one token, in float32 with one rounding."
    return kernel(spec, arch, [function(spec.operator, [p.name for p in parameters], doc, body)], [launch])


def refuses_rope(spec: KernelSpec) -> str | None:
    """Odd head sizes and mixed types."""
    if spec.size("R") % 2:
        return f"R={spec.size('R')}: expected an even number, halves are rotated against each other"
    return same_storage(spec, "x", "out") or same_storage(spec, "cos", "sin")


ROTARY_TABLE = Operator(
    emit=emit_table,
    operands={"positions": ("i64",), "inv_freq": ("fp32",), "out": FLOATS, "out1": FLOATS},
    sizes=("F",),
    options=("scaling",),
    refuses=lambda spec: same_storage(spec, "out", "out1"),
)
ROPE = Operator(
    emit=emit_rope,
    operands={"x": HALVES, "cos": FLOATS, "sin": FLOATS, "out": HALVES},
    sizes=("H", "R"),
    refuses=refuses_rope,
)
