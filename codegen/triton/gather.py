"""The last real token of each sequence: what a prompt's logits are computed from."""

from __future__ import annotations

from qcompile.codegen.triton.contract import FLOATS, Operator, integer, kernel, pointer, same_storage, stored
from qcompile.codegen.triton.source import constants, function, loop
from qcompile.codegen.triton.tiles import Architecture, power_of_two
from qcompile.ir.lowered import Kernel, KernelSpec, Launch

BLOCK = 1024
TOKENS = 128


def emit_gather_last(spec: KernelSpec, arch: Architecture) -> Kernel:
    """Copy the row of x [B, S, K] at the greatest position of each sequence, the first of equals."""
    size = spec.size("K")
    block = min(BLOCK, power_of_two(size))
    numbers: dict[str, tuple[int | float, str]] = {
        "K": (size, "columns"),
        "BLOCK": (block, "columns of a program"),
        "TOKENS": (TOKENS, "positions read at once"),
    }
    step = [
        "token = start + tl.arange(0, TOKENS)",
        "position = tl.load(positions + batch * sequence + token, mask=token < sequence, other=-2).to(tl.int32)",
        "top = tl.max(position, 0)",
        "at = start + tl.argmax(position, 0)",
        "last = tl.where(top > best, at, last)",
        "best = tl.maximum(top, best)",
    ]
    body = [
        *constants(numbers),
        "batch = tl.program_id(0).to(tl.int64)",
        "column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)",
        "best = tl.full((), -2, tl.int32)",
        "last = tl.zeros((), tl.int32)",
        *loop("for start in range(0, sequence, TOKENS)", step),
        "row = batch * sequence + last",
        "numbers = tl.load(x + row * K + column, mask=column < K)",
        "tl.store(out + batch * K + column, numbers, mask=column < K)",
    ]
    parameters = (*(pointer(name, stored(spec, name)) for name in ("x", "positions", "out")), integer("sequence"))
    launch = Launch(spec.operator, ("batch", -(-size // block), 1), parameters)
    doc = "One program finds a sequence's last real token and copies BLOCK of its columns."
    return kernel(spec, arch, [function(spec.operator, [p.name for p in parameters], doc, body)], [launch])


GATHER_LAST = Operator(
    emit=emit_gather_last,
    operands={"x": FLOATS, "positions": ("i64",), "out": FLOATS},
    sizes=("K",),
    refuses=lambda spec: same_storage(spec, "x", "out"),
)
