"""A weight times one vector: multiply-add on the ordinary cores, bound by how fast the weight is read."""

from __future__ import annotations

from collections.abc import Mapping

from qcompile.codegen.triton.loads import Part, explain_codes, first_column, float32_numbers, load_items, load_scales, parts, widen
from qcompile.codegen.triton.source import Lines, constants, load, loop
from qcompile.codegen.triton.tiles import Tile, power_of_two
from qcompile.codegen.triton.weight_format import WeightFormat, weight_operands
from qcompile.ir.lowered import KernelSpec

STEP_ITEMS = 512
"""Items of a row in a step: with four rows and 128 threads, one 16-byte load of codes a thread."""


def step_items(form: WeightFormat) -> int:
    """Items of a row in a step: at least one run, no more than the row has."""
    return max(form.run, min(STEP_ITEMS, power_of_two(form.row_items)))


def vector_body(spec: KernelSpec, form: WeightFormat, tile: Tile, numbers: Mapping[str, tuple[int | float, str]]) -> Lines:
    """Lines that leave `total` [1, BLOCK_N] for `token` [1] and `row` [BLOCK_N]."""
    run = form.run
    runs = step_items(form) // run
    steps = -(-form.row_items // (run * runs * tile.splits))
    mine = {
        "RUN": (run, "items that share a scale"),
        "RUNS": (runs, "runs of a step"),
        "STEPS": (steps, "steps of a program"),
    }
    source = weight_operands(spec)[0]
    step = [
        "run = (split * STEPS + step) * RUNS + tl.arange(0, RUNS)",
        "item = run[:, None] * RUN + tl.arange(0, RUN)[None, :]",
        *load_items(form, source, "row[:, None, None]", "[None, :, :]", "inside[:, None, None]"),
        f"column = {first_column(form, 'item')}",
        *([f"first = {first_column(form, 'run * RUN')}"] if form.grouped else []),
        *explain_codes(form, half=False),
        *widen(form),
        *(line for part in parts(form) for line in (*filter(None, [part.before]), *part_lines(form, part))),
    ]
    shape = "[BLOCK_N, RUNS]" if form.grouped else "[BLOCK_N, RUNS, RUN]"
    return [
        *constants({**numbers, **mine}),
        "split = tl.program_id(2)",
        "token = tl.program_id(1).to(tl.int64) + tl.arange(0, 1)",
        "row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)",
        "inside = row < N",
        *row_scales(form),
        f"sums = tl.zeros({shape}, dtype=tl.float32)",
        *loop("for step in range(STEPS)", step),
        *([] if form.grouped else ["sums = tl.sum(sums, axis=2)"]),
        f"total = tl.sum(sums, axis=1){' * scale_row' if form.quantized and not form.grouped else ''}",
        "total = total[None, :]",
    ]


def row_scales(form: WeightFormat) -> Lines:
    """Scale and zero point of each row, where it has only one."""
    return load_scales(form, "row", "0", "inside", "row") if form.quantized and not form.grouped else []


def part_lines(form: WeightFormat, part: Part) -> Lines:
    """Multiply one part of the loaded items by its columns of x and add it to `sums`, scaled run by run if there are groups."""
    offset = f" + {part.offset}" if part.offset else ""
    # Numbers of high nibbles come out 16 times too large: the scale, or else x, takes that back exactly.
    factor = f" * {1 / part.factor}" if part.factor > 1 else ""
    lines = load(f"x_{part.name}", f"x + column{offset}", f"column{offset} < K", suffix=f".to(tl.float32){'' if form.grouped else factor}")
    if not form.grouped:
        product = f"({float32_numbers(form, part, 'zero_row[:, None, None]')}) * x_{part.name}[None, :, :]"
        return [*lines, f"sums += {product}"]
    zero = f"zero_{part.name}[:, :, None]"
    return [
        *lines,
        f"group_{part.name} = {f'(first{offset})' if offset else 'first'} // GROUP",
        *load_scales(
            form, "row[:, None]", f"group_{part.name}[None, :]", f"inside[:, None] & (group_{part.name} < GROUPS)[None, :]", part.name
        ),
        f"product = ({float32_numbers(form, part, zero)}) * x_{part.name}[None, :, :]",
        f"sums += tl.sum(product, axis=2) * {f'(scale_{part.name}{factor})' if factor else f'scale_{part.name}'}",
    ]
