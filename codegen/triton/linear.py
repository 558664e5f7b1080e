"""Linear layers over 16-bit, 8-bit and 4-bit weights: what the three kernels share; `vector.py` and `matrix.py` have their bodies."""

from __future__ import annotations

from collections.abc import Iterable

from qcompile.codegen.triton.contract import (
    HALVES,
    LARGEST_INDEX,
    TRITON_TYPES,
    Operator,
    integer,
    kernel,
    pointer,
    same_storage,
    stored,
)
from qcompile.codegen.triton.elements import AS_BYTES, TABLES, nf4_function, scale_pointer
from qcompile.codegen.triton.loads import format_constants
from qcompile.codegen.triton.matrix import matrix_body, matrix_steps
from qcompile.codegen.triton.source import Lines, constants, function, indent
from qcompile.codegen.triton.tiles import Architecture, Tile, matrix_tile, row_tile
from qcompile.codegen.triton.vector import step_items, vector_body
from qcompile.codegen.triton.weight_format import WeightFormat, refuses_format, weight_format, weight_operands
from qcompile.ir.lowered import BUCKETS, Kernel, KernelSpec, Launch, Parameter, Workspace

REDUCE_BLOCK = 512


def refuses_linear(spec: KernelSpec) -> str | None:
    """Mixed activation types, and matrices that 32-bit offsets cannot reach into."""
    if spec.size("N") * spec.size("K") >= LARGEST_INDEX:
        return f"N·K = {spec.size('N') * spec.size('K')}: expected less than 2^31 numbers in a matrix"
    if spec.operator == "quantized_linear":
        return same_storage(spec, "x", "out") or refuses_format(spec, tables=TABLES)
    return same_storage(spec, "x", "weight", "out")


def linear_constants(spec: KernelSpec, form: WeightFormat, tile: Tile) -> dict[str, tuple[int | float, str]]:
    """Compile-time numbers of every linear kernel."""
    return {
        "N": (spec.size("N"), "output rows"),
        "K": (spec.size("K"), "input columns"),
        **format_constants(form),
        "BLOCK_N": (tile.rows, "output rows of a program"),
    }


def add_bias(spec: KernelSpec, value: str, index: str, mask: str) -> Lines:
    """The epilogue: `bias` joins the float32 sum, before its only rounding."""
    if spec.format("bias") is None:
        return []
    return [f"{value} += tl.load(bias + {index}, mask={mask}, other=0.0).to(tl.float32)"]


def finish(spec: KernelSpec, tile: Tile) -> Lines:
    """Store `total` [tokens, rows] of `token`, `row`: rounded once into `out`, or as float32 into this split's share of `partial`."""
    mask = "wanted = (token < rows)[:, None] & (row < N)[None, :]"
    if tile.splits > 1:
        return [mask, "tl.store(partial + (split.to(tl.int64) * rows + token[:, None]) * N + row[None, :], total, mask=wanted)"]
    return [
        mask,
        *add_bias(spec, "total", "row[None, :]", "(row < N)[None, :]"),
        f"tl.store(out + token[:, None] * N + row[None, :], total.to({TRITON_TYPES[stored(spec, 'out')]}), mask=wanted)",
    ]


def reduce_function(spec: KernelSpec, tile: Tile) -> Lines:
    """Add the partial sums in the order of the splits, so that a result never depends on which program was first."""
    body = [
        *constants(
            {
                "N": (spec.size("N"), "output rows"),
                "SPLITS": (tile.splits, "shares of the columns"),
                "BLOCK_N": (REDUCE_BLOCK, "numbers of a program"),
            }
        ),
        "token = tl.program_id(0).to(tl.int64)",
        "row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)",
        "total = tl.zeros([BLOCK_N], dtype=tl.float32)",
        "for split in range(SPLITS):",
        *indent(["total += tl.load(partial + (split * rows + token) * N + row, mask=row < N, other=0.0)"]),
        *add_bias(spec, "total", "row", "row < N"),
        f"tl.store(out + token * N + row, total.to({TRITON_TYPES[stored(spec, 'out')]}), mask=row < N)",
    ]
    names = ["partial", *(["bias"] if spec.format("bias") else []), "out", "rows"]
    return function("add_partial_sums", names, "out = the sum of the partial sums of every split, plus the bias.", body)


def emit_linear(spec: KernelSpec, arch: Architecture) -> Kernel:
    """A linear over 16-bit activations."""
    form = weight_format(spec)
    count, columns = spec.size("N"), spec.size("K")
    single = BUCKETS[spec.bucket][1] == 1
    awkward = form.gathers or columns % 8 != 0
    tile = row_tile(count, columns, arch) if single else matrix_tile(count, columns, spec.bucket, awkward, arch)
    numbers = linear_constants(spec, form, tile)
    body = (vector_body if single else matrix_body)(spec, form, tile, numbers)
    kinds = {"codes": "u8", **({"scale": scale_pointer(form.scale_dtype)} if form.quantized else {})}
    inputs = [pointer(name, kinds.get(name) or stored(spec, name)) for name in ("x", *weight_operands(spec))]
    layouts = [("codes", form.layout)] if form.layout else []
    layouts += [("scale", "bytes")] if form.scale_dtype in AS_BYTES else []
    helpers = [nf4_function()] if form.element == "nf4" else []
    return assemble(spec, arch, tile, inputs, body, layouts, expected(form, tile, single, arch), helpers)


def assemble(
    spec: KernelSpec,
    arch: Architecture,
    tile: Tile,
    inputs: list[Parameter],
    body: Lines,
    layouts: list[tuple[str, str]],
    expects: tuple[str, ...],
    helpers: Iterable[Lines] = (),
) -> Kernel:
    """One function for the product, and one that adds partial sums where the columns are split.

    `body` leaves `total` [tokens, rows] of `token` and `row`, and `split`; `inputs` are the pointers and `helpers` the functions it uses.
    """
    count = spec.size("N")
    bias = [pointer("bias", stored(spec, "bias"))] if spec.format("bias") else []
    last = [*bias, pointer("out", stored(spec, "out")), integer("rows")]
    parameters = [*inputs, *([pointer("partial", "fp32"), integer("rows")] if tile.splits > 1 else last)]
    doc = "One program: BLOCK_N rows of the weight, its share of the columns, and every token of its tile."
    functions = [*helpers, function(spec.operator, [parameter.name for parameter in parameters], doc, [*body, *finish(spec, tile)])]
    tokens = 1 if BUCKETS[spec.bucket][1] == 1 else ("ceildiv", "rows", tile.tokens)
    launches = [
        Launch(spec.operator, (-(-count // tile.rows), tokens, tile.splits), tuple(parameters), (), tile.num_warps, tile.num_stages)
    ]
    workspaces = []
    if tile.splits > 1:
        functions.append(reduce_function(spec, tile))
        launches.append(Launch("add_partial_sums", ("rows", -(-count // REDUCE_BLOCK), 1), (pointer("partial", "fp32"), *last)))
        workspaces.append(Workspace("partial", ("mul", ("mul", tile.splits * 4, count), "rows")))
    return kernel(spec, arch, functions, launches, workspaces, layouts, expects)


def expected(form: WeightFormat, tile: Tile, single: bool, arch: Architecture) -> tuple[str, ...]:
    """Instruction classes: a matrix instruction for more than one token, and wide loads where there is enough to load.

    A row must be aligned to 16 bytes; a vector kernel's step must give each thread 16 of them, a matrix kernel must have steps
    enough (two) for a pipeline.
    """
    wide = form.row_items * form.item_bytes % 16 == 0
    if single:
        thread_bytes = tile.rows * step_items(form) * form.item_bytes // (32 * tile.num_warps)
        return ("load128",) if wide and form.run * form.item_bytes % 16 == 0 and thread_bytes >= 16 else ()
    return (arch.matrix, "cp.async") if wide and matrix_steps(form, tile) >= 2 else (arch.matrix,)


_BUCKETS = tuple(BUCKETS)

LINEAR = Operator(
    emit=emit_linear,
    operands={"x": HALVES, "weight": HALVES, "bias": HALVES, "out": HALVES},
    optional=frozenset({"bias"}),
    sizes=("K", "N"),
    buckets=_BUCKETS,
    refuses=refuses_linear,
)
QUANTIZED_LINEAR = Operator(
    emit=emit_linear,
    operands={"x": HALVES, "codes": (), "scale": (), "scale2": (), "zero": ("uint8",), "bias": (*HALVES, "fp32"), "out": HALVES},
    optional=frozenset({"bias", "scale2", "zero"}),
    sizes=("K", "N"),
    buckets=_BUCKETS,
    refuses=refuses_linear,
)
