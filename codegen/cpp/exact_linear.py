"""Linear layers over float activations and packed weights of every format, which lie in tiles of 16 rows: no sum crosses lanes.

Codes that are integers meet activations as integers of 24 bits, a run of which shares an exponent, and sums are exact (`fixed.h`); codes
that stand for floats are looked up and multiplied as such (`tables.h`). One row and many are summed alike, so a row's bits are its own.
"""

from __future__ import annotations

from dataclasses import replace

from qcompile.codegen.contract import FLOATS, same_storage
from qcompile.codegen.cpp.contract import Operator, kernel, type_of
from qcompile.codegen.cpp.packed_forms import helpers
from qcompile.codegen.cpp.source import Lines, constants
from qcompile.codegen.cpp.tiles import FIXED, MOST_COLUMNS, TABLES, fixed_sizes, looked_up, refuses_tiles, tile_layouts, tile_weight
from qcompile.ir.lowered import BUCKETS, Kernel, KernelSpec

_MANY = 4
"""Rows of x beside each other at most (`FIXED_MANY`)."""


def emit_quantized_linear(spec: KernelSpec) -> Kernel:
    """`x Wᵀ + b`: one row by itself, or blocks of rows over tiles that stay near."""
    single = BUCKETS[spec.bucket][1] == 1
    if not single:
        spec = replace(spec, bucket="m2-63")  # one kernel for any number of rows but one
    real, table = type_of(spec, "x"), looked_up(spec)
    bias = f"bias.at<{real}>()" if spec.format("bias") else f"static_cast<const {real}*>(nullptr)"
    called = f"{'table' if table else 'fixed'}_{'single' if single else 'many'}<Kind, {real}>"
    body = [
        *constants({"rows": (spec.size("N"), "of the weight"), "columns": (spec.size("K"), "of the weight and of x")}),
        *tile_weight(spec),
        *(_float_room(real, single) if table else _fixed_room(spec, single)),
        f"{called}(team.share((rows + TILE - 1) / TILE), x, weight, {bias}, out, room);",
    ]
    return kernel(spec, QUANTIZED_LINEAR.present(spec), body, helpers(*(TABLES if table else FIXED)), tile_layouts(spec))


def _fixed_room(spec: KernelSpec, single: bool) -> Lines:
    words, runs = fixed_sizes(spec)
    most = 1 if single else _MANY
    return [
        *constants({"held": (words, "words of a row of x"), "runs": (runs, "of its columns"), "most": (most, "rows of x at once")}),
        "alignas(64) int32_t words[held * most];",
        "int32_t begin[4 * runs * most];",
        "float unit[runs * most], sum[runs * most];",
        "const FixedRows room{words, begin, unit, sum, held, runs};",
    ]


def _float_room(real: str, single: bool) -> Lines:
    return ["float* room = nullptr;"] if real == "float" else [f"float room[{'1' if single else 'MANY'} * columns];"]


def refuses_quantized_linear(spec: KernelSpec) -> str | None:
    """Rows that do not fit on the stack, mixed storages, and operands that the format of the codes does not have."""
    if spec.size("K") > MOST_COLUMNS:
        return f"K={spec.size('K')}: expected at most {MOST_COLUMNS} columns, rows of x stand on the stack"
    return same_storage(spec, "x", "bias", "out") or refuses_tiles(spec)


QUANTIZED_LINEAR = Operator(
    emit=emit_quantized_linear,
    operands={"x": FLOATS, "codes": (), "scale": (), "zero": (), "scale2": (), "bias": FLOATS, "out": FLOATS},
    optional=frozenset({"bias", "zero", "scale2"}),
    sizes=("K", "N"),
    buckets=tuple(BUCKETS),
    refuses=refuses_quantized_linear,
)
