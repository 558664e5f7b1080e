"""Tokens that are kept as they came (`quant/retention.py`): put before the new ones, and kept on; what else asks which those are.

A sequence's positions count on from what it holds, padding is -1 and may stand anywhere; they are read on the device.
"""

from __future__ import annotations

from qcompile.codegen.triton.contract import HALVES, TRITON_TYPES, Operator, integer, kernel, pointer, stored, strides
from qcompile.codegen.triton.source import Lines, constants, function, loop
from qcompile.codegen.triton.tiles import Architecture, power_of_two
from qcompile.ir.lowered import Kernel, KernelSpec, Launch
from qcompile.quant.retention import Retention

POLICY = ("first", "recent", "group")
"""The options that say which tokens settle."""
NUMBERS = 2048
"""Of a tile that is only moved: sixteen for each thread."""
POSITIONS = 64
"""Positions that are read at once."""


def policy_of(spec: KernelSpec) -> Retention:
    """Which tokens of the cache settle."""
    return Retention(*(int(spec.option(name)) for name in POLICY))


def refuses_policy(spec: KernelSpec) -> str | None:
    """A policy that keeps nothing (such caches have no rows), or no policy at all."""
    values = [spec.option(name) for name in POLICY]
    if not all(isinstance(value, int) and value >= least for value, least in zip(values, (0, 0, 1), strict=True)):
        return f"first, recent, group = {values}: expected whole numbers of tokens, a group of at least 1"
    return None if policy_of(spec).rows else "first, recent, group keep no token: expected an append to the pages"


def policy_constants(policy: Retention) -> dict[str, tuple[int | float, str]]:
    """The compile-time numbers that the lines of this file refer to."""
    return {
        "FIRST": (policy.first, "tokens at the start that never settle"),
        "RECENT": (policy.recent, "tokens at the end that have not settled yet, at least"),
        "GROUP": (policy.group, "tokens that settle at once"),
        "TURNING": (max(1, policy.turning), "rows that are written in turn"),
        "ROWS": (policy.rows, "rows of a sequence"),
    }


def settled(length: str) -> str:
    """Where settled tokens end in a sequence of `length`, an expression: the device's `Retention.settled`."""
    return f"(FIRST + tl.maximum({length} - (FIRST + RECENT), 0) // GROUP * GROUP)"


def row_of(position: str) -> str:
    """The row of a token that has not settled: the device's `Retention.row`."""
    return f"tl.where({position} < FIRST, {position}, FIRST + ({position} - FIRST) % TURNING)"


def sequence_range(*, early: bool = False) -> Lines:
    """`held` and `length`: tokens of the sequence `batch` before this call and after it; both 0 where it takes no part.

    With `early` also the number of new tokens up to the last one that never settles, padding among them counted.
    """
    step = [
        "at = begin + tl.arange(0, POSITIONS)",
        "seen = tl.load(positions + batch * sequence + at, mask=at < sequence, other=-1).to(tl.int32)",
        "held = tl.minimum(held, tl.min(tl.where(seen >= 0, seen, 2147483647), axis=0))",
        "length = tl.maximum(length, tl.max(seen, axis=0) + 1)",
        *(["early = tl.maximum(early, tl.max(tl.where((seen >= 0) & (seen < FIRST), at + 1, 0), axis=0))"] if early else []),
    ]
    return [
        "held = tl.full((), 2147483647, tl.int32)",
        "length = tl.zeros((), tl.int32)",
        *(["early = tl.zeros((), tl.int32)"] if early else []),
        *loop("for begin in range(0, sequence, POSITIONS)", step),
        "held = tl.minimum(held, length)",
    ]


def scan_constants() -> dict[str, tuple[int | float, str]]:
    """What `sequence_range` needs."""
    return {"POSITIONS": (POSITIONS, "positions read at once")}


def tile_constants(spec: KernelSpec) -> dict[str, tuple[int | float, str]]:
    """The tile of a kernel that moves tokens of one head."""
    size = spec.size("D")
    return {
        "L": (spec.size("L"), "key/value heads"),
        "D": (size, "numbers of a head"),
        "BLOCK_D": (power_of_two(size), "numbers, padded"),
        "BLOCK_T": (max(1, NUMBERS // power_of_two(size)), "tokens of a program"),
    }


def aligned(spec: KernelSpec) -> int:
    """What may be assumed of addresses and strides that are multiples of a head."""
    return 16 if spec.size("D") % 16 == 0 else 1


def emit_with_recent(spec: KernelSpec, arch: Architecture) -> Kernel:
    """Copy rows [C, L, N, D] of the sequences, then x [B, L, S, D], into out [B, L, N + S, D]."""
    numbers = {**tile_constants(spec), "ROWS": (spec.size("N"), "rows of a sequence")}
    kind = TRITON_TYPES[stored(spec, "out")]
    body = [
        *constants(numbers),
        "head = tl.program_id(1)",
        "batch = tl.program_id(2).to(tl.int64)",
        "token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]",
        "dim = tl.arange(0, BLOCK_D)[None, :]",
        "new = token - ROWS",
        "kept = (token < ROWS) & (dim < D)",
        "came = (new >= 0) & (new < sequence) & (dim < D)",
        "slot = tl.load(slots + batch).to(tl.int64)",
        "old = tl.load(rows + ((slot * L + head) * ROWS + token) * D + dim, mask=kept, other=0.0)",
        "x_at = x + batch * x_stride_0 + head.to(tl.int64) * x_stride_1 + new.to(tl.int64) * x_stride_2",
        f"fresh = tl.load(x_at + dim, mask=came, other=0.0).to({kind})",
        "place = ((batch * L + head) * (ROWS + sequence) + token) * D + dim",
        "tl.store(out + place, tl.where(kept, old, fresh), mask=kept | came)",
    ]
    parameters = (
        pointer("rows", stored(spec, "rows")),
        pointer("x", stored(spec, "x"), aligned(spec)),
        pointer("slots", "i32"),
        pointer("out", stored(spec, "out")),
        integer("sequence"),
        *strides("x", (0, 1, 2), "x", aligned(spec)),
    )
    grid = (("ceildiv", ("add", "sequence", spec.size("N")), numbers["BLOCK_T"][0]), spec.size("L"), "batch")
    doc = "One program copies BLOCK_T tokens of one head: those that wait in the sequence's rows first, then the new ones."
    functions = [function(spec.operator, [p.name for p in parameters], doc, body)]
    return kernel(spec, arch, functions, [Launch(spec.operator, grid, parameters)])


def emit_retain(spec: KernelSpec, arch: Architecture) -> Kernel:
    """Copy the new tokens that go on waiting from exact [B, L, N + S, D] to rows [C, L, N, D]."""
    numbers = {**tile_constants(spec), **policy_constants(policy_of(spec)), **scan_constants()}
    body = [
        *constants(numbers),
        "head = tl.program_id(1)",
        "batch = tl.program_id(2).to(tl.int64)",
        *sequence_range(),
        "token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)",
        "dim = tl.arange(0, BLOCK_D)[None, :]",
        "position = tl.load(positions + batch * sequence + token, mask=token < sequence, other=-1).to(tl.int32)",
        f"waits = (position >= 0) & ((position < FIRST) | (position >= {settled('length')}))",
        f"row = {row_of('position')}",
        "present = waits[:, None] & (dim < D)",
        "source = exact + ((batch * L + head) * (ROWS + sequence) + ROWS + token[:, None]) * D + dim",
        "numbers = tl.load(source, mask=present, other=0.0)",
        "slot = tl.load(slots + batch).to(tl.int64)",
        "tl.store(rows + ((slot * L + head) * ROWS + row[:, None]) * D + dim, numbers, mask=present)",
    ]
    parameters = (
        pointer("rows", stored(spec, "rows")),
        pointer("exact", stored(spec, "exact")),
        pointer("slots", "i32"),
        pointer("positions", "i64"),
        integer("sequence"),
    )
    grid = (("ceildiv", "sequence", numbers["BLOCK_T"][0]), spec.size("L"), "batch")
    doc = "One program keeps those of BLOCK_T new tokens of one head that have not settled by the end of the call."
    functions = [function(spec.operator, [p.name for p in parameters], doc, body)]
    return kernel(spec, arch, functions, [Launch(spec.operator, grid, parameters)])


def refuses_rows(spec: KernelSpec) -> str | None:
    """Rows of two types, heads too wide for a program, and rows that are not those of the policy."""
    kinds = {spec.format(name) for name in ("rows", "exact", "out") if spec.format(name)}
    if len(kinds) > 1:
        return f"rows and tokens are {' and '.join(sorted(map(str, kinds)))}: expected one type"
    if power_of_two(spec.size("D")) > NUMBERS:
        return f"D={spec.size('D')}: expected a head size of at most {NUMBERS}"
    return refuses_policy(spec) if spec.operator == "retain_" else None


WITH_RECENT = Operator(
    emit=emit_with_recent,
    operands={"rows": HALVES, "x": HALVES, "slots": ("i32",), "out": HALVES},
    sizes=("D", "L", "N"),
    refuses=refuses_rows,
)
RETAIN = Operator(
    emit=emit_retain,
    operands={"rows": HALVES, "exact": HALVES, "slots": ("i32",), "positions": ("i64",)},
    sizes=("D", "L"),
    options=POLICY,
    required=POLICY,
    refuses=refuses_rows,
)
