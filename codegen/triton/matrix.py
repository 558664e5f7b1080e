"""A weight times several tokens on tensor cores: out[tokens, rows] as the transpose of `weight · xᵀ`.

The weight stands on the M side of the instruction, so that few tokens (its N side) still fill it, and dequantized numbers go
from registers into the product without a way through shared memory.
"""

from __future__ import annotations

from collections.abc import Mapping

from qcompile.codegen.triton.contract import TRITON_TYPES, stored
from qcompile.codegen.triton.loads import (
    Part,
    explain_codes,
    first_column,
    float32_numbers,
    half_numbers,
    load_items,
    load_scales,
    parts,
    widen,
)
from qcompile.codegen.triton.source import Lines, constants, load, loop
from qcompile.codegen.triton.tiles import Tile
from qcompile.codegen.triton.weight_format import WeightFormat, weight_operands
from qcompile.ir.layouts import HALF
from qcompile.ir.lowered import KernelSpec


def matrix_steps(form: WeightFormat, tile: Tile) -> int:
    """Steps of a program over its share of the columns."""
    return -(-form.row_items // (form.span * tile.splits))


def matrix_body(spec: KernelSpec, form: WeightFormat, tile: Tile, numbers: Mapping[str, tuple[int | float, str]]) -> Lines:
    """Lines that leave `total` [tokens, BLOCK_N] for `token` and `row`."""
    mine = {
        "BLOCK_M": (tile.tokens, "tokens of a program"),
        "BLOCK": (form.span, "stored items of a step"),
        "STEPS": (matrix_steps(form, tile), "steps of a program"),
    }
    if form.grouped and form.run < form.span:
        mine |= {"RUN": (form.run, "columns that are sure to share a scale"), "RUNS": (form.span // form.run, "runs of a step")}
    source = weight_operands(spec)[0]
    half = not form.grouped or scales_sums(form, tile)
    step = [
        "block = split * STEPS + step",
        "item = block * BLOCK + tl.arange(0, BLOCK)",
        *load_items(form, source, "row[:, None]", "[None, :]", "inside[:, None]"),
        f"column = {first_column(form, 'item')}",
        *explain_codes(form, half),
        *([] if half and form.bits <= 4 else widen(form)),
        *(line for part in parts(form) for line in (*filter(None, [part.before]), *part_lines(spec, form, part, scales_sums(form, tile)))),
    ]
    return [
        *constants({**numbers, **mine}),
        "split = tl.program_id(2)",
        "first_token = tl.program_id(1).to(tl.int64) * BLOCK_M",
        "offset = tl.arange(0, BLOCK_M)",
        "token = first_token + offset",
        "x_tile = x + first_token * K + offset[None, :] * K",
        "row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)",
        "inside = row < N",
        "present = token < rows",
        *(load_scales(form, "row", "0", "inside", "row") if form.quantized and not form.grouped else []),
        "sums = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)",
        *loop("for step in range(STEPS)", step),
        f"total = tl.trans(sums{' * scale_row[:, None]' if form.quantized and not form.grouped else ''})",
    ]


def scales_sums(form: WeightFormat, tile: Tile) -> bool:
    """Whether scales multiply partial sums and not weights.

    That is exact (but for nf4, whose numbers 16 bits do not hold) and cheap for few tokens, and possible where a step's columns lie in
    one group.
    """
    return form.grouped and not form.gathers and tile.tokens < HALF and form.element != "nf4"


def part_lines(spec: KernelSpec, form: WeightFormat, part: Part, scale_sums: bool) -> Lines:
    """Multiply one part of the loaded items by its columns of x and add it to `sums`."""
    dtype = stored(spec, "x")
    name = part.name
    offset = f" + {part.offset}" if part.offset else ""
    lines = load(f"x_{name}", f"x_tile + column[:, None]{offset}", f"present[None, :] & (column < K{offset.replace('+', '-')})[:, None]")
    if not form.grouped:
        values = half_numbers(form, part, "zero_row[:, None]", dtype)
        return [*lines, f"sums = tl.dot({values}, x_{name}, sums)"]
    lines += step_scales(form, name, offset)
    if scale_sums:
        return [*lines, f"sums += tl.dot({half_numbers(form, part, f'zero_{name}', dtype)}, x_{name}) * scale_{name}"]
    # The product is rounded once, from float32: the weight is then exactly the one that `dequantize` defines.
    scale = f"(scale_{name} * {1 / part.factor})" if part.factor > 1 else f"scale_{name}"
    return [
        *lines,
        f"weight_{name} = (({float32_numbers(form, part, f'zero_{name}')}) * {scale}).to({TRITON_TYPES[dtype]})",
        f"sums = tl.dot(weight_{name}, x_{name}, sums)",
    ]


def step_scales(form: WeightFormat, name: str, offset: str) -> Lines:
    """`scale_NAME` and `zero_NAME` of a part's columns: [rows, 1] where they lie in one group, else spread over [rows, BLOCK].

    One scale is loaded for each run of columns that is sure to share it, and spread in registers: loading one for each
    column took 250 registers.
    """
    several = form.run < form.span
    first = f"block * {form.span * form.item_columns}{' + tl.arange(0, RUNS) * RUN' if several else ''}{offset}"
    group = f"group_{name}[None, :]" if several else f"group_{name}"
    lines = [
        f"group_{name} = ({first}) // GROUP",
        *load_scales(form, "row[:, None]", group, f"inside[:, None] & ({group} < GROUPS)", name),
    ]
    if several:
        for value in ["scale", *([] if form.symmetric else ["zero"])]:
            spread = f"tl.broadcast_to({value}_{name}[:, :, None], [BLOCK_N, RUNS, RUN])"
            lines.append(f"{value}_{name} = tl.reshape({spread}, [BLOCK_N, BLOCK])")
    return lines
