"""Linear layers over quantized activations: `integer_linear` and `float8_linear`."""

from __future__ import annotations

from qcompile.codegen.triton.code_matrix import code_matrix_body, code_steps
from qcompile.codegen.triton.code_vector import code_vector_body, run_length, step_items
from qcompile.codegen.triton.codes import Codes, code_layouts, code_operands, codes_of, refuses_codes
from qcompile.codegen.triton.contract import FLOAT8, HALVES, LARGEST_INDEX, Operator
from qcompile.codegen.triton.linear import assemble
from qcompile.codegen.triton.tiles import Architecture, Tile, matrix_tile, row_tile
from qcompile.ir.lowered import BUCKETS, Kernel, KernelSpec

INTEGER_CLASSES = {"mma": "imma", "wgmma": "igmma", "tcgen05": "imma"}
"""The 8-bit integer instruction of an architecture; triton multiplies integers by the warp on sm100."""


def refuses_code_linear(spec: KernelSpec) -> str | None:
    """Matrices that 32-bit offsets cannot reach into, and operands that cannot be multiplied."""
    if spec.size("N") * spec.size("K") >= LARGEST_INDEX:
        return f"N·K = {spec.size('N') * spec.size('K')}: expected less than 2^31 numbers in a matrix"
    return refuses_codes(spec)


def code_tile(spec: KernelSpec, codes: Codes, arch: Architecture) -> Tile:
    """As for 16-bit numbers; sums of asymmetric formats take registers, and so do float sums beside each group's integers."""
    count, columns = spec.size("N"), spec.size("K")
    if BUCKETS[spec.bucket][1] == 1:
        return row_tile(count, columns, arch)
    awkward = codes.zero or not codes.weight.symmetric or columns % 16 != 0
    tile = matrix_tile(count, columns, spec.bucket, awkward, arch)
    if codes.grouped and tile.tokens > 64:
        return Tile(tile.rows, 64, tile.splits, tile.num_warps, tile.num_stages)
    return tile


def emit_code_linear(spec: KernelSpec, arch: Architecture) -> Kernel:
    """A linear over codes: one row on the ordinary cores, more on tensor cores."""
    codes = codes_of(spec)
    single = BUCKETS[spec.bucket][1] == 1
    tile = code_tile(spec, codes, arch)
    numbers: dict[str, tuple[int | float, str]] = {
        "N": (spec.size("N"), "output rows"),
        "K": (spec.size("K"), "input columns"),
        "BLOCK_N": (tile.rows, "output rows of a program"),
    }
    body = (code_vector_body if single else code_matrix_body)(codes, tile, numbers)
    return assemble(spec, arch, tile, code_operands(spec, codes), body, code_layouts(codes), expected(codes, tile, single, arch))


def expected(codes: Codes, tile: Tile, single: bool, arch: Architecture) -> tuple[str, ...]:
    """Instruction classes: the product's own, and wide loads where rows are aligned and there is enough to load."""
    wide = codes.weight.row_items % 16 == 0
    if single:
        thread_bytes = tile.rows * step_items(codes) // (32 * tile.num_warps)
        return ("load128",) if wide and run_length(codes) % 16 == 0 and thread_bytes >= 16 else ()
    product = arch.float8 if codes.float8 else INTEGER_CLASSES[arch.matrix]
    return (product, "cp.async") if wide and code_steps(codes, tile) >= 2 else (product,)


_BUCKETS = tuple(BUCKETS)
_WEIGHT: dict[str, tuple[str, ...]] = {"w_codes": (), "w_scale": (), "bias": (*HALVES, "fp32"), "out": HALVES}

INTEGER_LINEAR = Operator(
    emit=emit_code_linear,
    operands={"codes": ("i8",), "scale": ("fp32", "fp16"), "zero": ("i32",), **_WEIGHT, "w_zero": ("uint8",)},
    optional=frozenset({"zero", "w_zero", "bias"}),
    sizes=("K", "N"),
    options=("group_size", "static"),
    required=("group_size",),
    buckets=_BUCKETS,
    refuses=refuses_code_linear,
)
FLOAT8_LINEAR = Operator(
    emit=emit_code_linear,
    operands={"codes": (FLOAT8,), "scale": ("fp32", "fp16"), **_WEIGHT},
    optional=frozenset({"bias"}),
    sizes=("K", "N"),
    options=("group_size", "static"),
    required=("group_size",),
    buckets=_BUCKETS,
    refuses=refuses_code_linear,
)
