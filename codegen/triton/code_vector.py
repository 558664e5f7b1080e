"""Products of codes with one row of codes: integer (or float8) multiply-add on the ordinary cores, as in `vector.py`."""

from __future__ import annotations

from collections.abc import Mapping

from qcompile.codegen.triton.codes import Codes, activation_scales, code_constants, explain_codes, group_of, weight_scales
from qcompile.codegen.triton.loads import Part, first_column
from qcompile.codegen.triton.source import Lines, constants, load, loop
from qcompile.codegen.triton.tiles import Tile, power_of_two
from qcompile.codegen.triton.vector import STEP_ITEMS
from qcompile.ir.layouts import HALF


def run_length(codes: Codes) -> int:
    """Consecutive items that always share all scales."""
    return codes.together(HALF)


def step_items(codes: Codes) -> int:
    """Items of a row in a step: at least one run, no more than the row has."""
    return max(run_length(codes), min(STEP_ITEMS, power_of_two(codes.weight.row_items)))


def code_vector_body(codes: Codes, tile: Tile, numbers: Mapping[str, tuple[int | float, str]]) -> Lines:
    """Lines that leave `total` [1, BLOCK_N] for `token` [1] and `row` [BLOCK_N]."""
    form, run = codes.weight, run_length(codes)
    runs = step_items(codes) // run
    mine = {
        "RUN": (run, "items that share a scale"),
        "RUNS": (runs, "runs of a step"),
        "STEPS": (-(-form.row_items // (run * runs * tile.splits)), "steps of a program"),
    }
    other = "0.0" if codes.float8 else "0"
    step = [
        "run = (split * STEPS + step) * RUNS + tl.arange(0, RUNS)",
        "item = run[:, None] * RUN + tl.arange(0, RUN)[None, :]",
        *load("items", "w_codes + row[:, None, None] * ROW + item[None, :, :]", "inside[:, None, None] & (item < ROW)[None, :, :]", other),
        *explain_codes(codes),
        f"column = {first_column(form, 'item')}",
        *([f"first = {first_column(form, 'run * RUN')}"] if codes.grouped else []),
        *(line for part in codes.parts for line in part_lines(codes, part)),
    ]
    shape, kind = ("[BLOCK_N, RUNS]", "tl.float32") if codes.grouped else ("[BLOCK_N, RUNS, RUN]", codes.kind)
    kept = ["sums = tl.sum(tl.sum(sums, axis=2), axis=1).to(tl.float32)"] if not codes.grouped else ["sums = tl.sum(sums, axis=1)"]
    return [
        *constants({**numbers, **code_constants(codes), **mine}),
        "split = tl.program_id(2)",
        "token = tl.program_id(1).to(tl.int64) + tl.arange(0, 1)",
        "row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)",
        "inside = row < N",
        *([] if form.grouped else weight_scales(codes, "row", "0", "inside", "row")),
        *([] if codes.x_grouped else activation_scales(codes, "token", "0", "token < rows", "row", "[1]")),
        f"sums = tl.zeros({shape}, dtype={kind})",
        *loop("for step in range(STEPS)", step),
        *kept,
        f"total = sums{'' if form.grouped else ' * w_scale_row'}{'' if codes.x_grouped else ' * x_scale_row'}",
        "total = total[None, :]",
    ]


def part_lines(codes: Codes, part: Part) -> Lines:
    """Multiply one part of the loaded items by its columns of the activation and add it to `sums`."""
    name, shift = part.name, f" + {part.offset}" if part.offset else ""
    within = f"column{shift} < K"
    lines = [
        *group_scales(codes, name, shift),
        *load(f"x_{name}", f"codes + column{shift}", within, "0.0" if codes.float8 else "0", f".to({codes.kind})"),
    ]
    if codes.zero:
        middle = f"x_zero_{name}[:, None]" if codes.x_grouped else "x_zero_row"
        lines.append(f"x_{name} = tl.where({within}, x_{name} - {middle}, 0)")
    middle = "" if codes.weight.symmetric else f" - w_zero_{name}[:, :, None]" if codes.weight.grouped else " - w_zero_row[:, None, None]"
    lines.append(f"weight_{name} = {part.codes}.to({codes.kind}){middle}")
    product = f"weight_{name} * x_{name}[None, :, :]"
    if not codes.grouped:
        return [*lines, f"sums += {product}"]
    scales = [f"w_scale_{name}"] if codes.weight.grouped else []
    scales += [f"x_scale_{name}[None, :]"] if codes.x_grouped else []
    return [*lines, f"sums += tl.sum({product}, axis=2).to(tl.float32) * {' * '.join(scales)}"]


def group_scales(codes: Codes, name: str, shift: str) -> Lines:
    """Scales and zero points of the runs of a part: the weight's [BLOCK_N, RUNS], the activation's [RUNS]."""
    lines = []
    if codes.weight.grouped:
        group = f"group_{name}[None, :]"
        lines += [f"group_{name} = {group_of(shift)} // GROUP"]
        lines += weight_scales(codes, "row[:, None]", group, f"inside[:, None] & ({group} < GROUPS)", name)
    if codes.x_grouped:
        lines += [f"x_group_{name} = {group_of(shift)} // X_GROUP"]
        lines += activation_scales(codes, "token", f"x_group_{name}", f"x_group_{name} < X_GROUPS", name, "[RUNS]")
    return lines
