"""Products of codes on integer or float8 tensor cores: out[tokens, rows] as the transpose of `weight · xᵀ`, as in `matrix.py`.

With A = code - 2^(b-1) of the weight, Z its zero point alike, X the activation's code and z its zero point, a group's sum is
`Σ (A - Z)(X - z) = Σ A·X - Z·Σ(X - z) - z·Σ A`: the product of codes as they are, and two sums that only asymmetric formats need.
"""

from __future__ import annotations

from collections.abc import Mapping

from qcompile.codegen.triton.codes import Codes, activation_scales, code_constants, explain_codes, group_of, weight_scales
from qcompile.codegen.triton.loads import Part, first_column
from qcompile.codegen.triton.source import Lines, constants, load, loop
from qcompile.codegen.triton.tiles import Tile
from qcompile.ir.layouts import HALF

LONGEST_STEP = 128


def step_length(codes: Codes) -> int:
    """Stored items of a step."""
    return codes.together(HALF if codes.weight.bits == 4 else LONGEST_STEP)


def code_steps(codes: Codes, tile: Tile) -> int:
    """Steps of a program over its share of the columns."""
    return -(-codes.weight.row_items // (step_length(codes) * tile.splits))


def joined(codes: Codes) -> bool:
    """Whether both halves of a step's items lie in one group."""
    return codes.weight.bits == 4 and codes.together(2 * HALF) == 2 * HALF


def code_matrix_body(codes: Codes, tile: Tile, numbers: Mapping[str, tuple[int | float, str]]) -> Lines:
    """Lines that leave `total` [tokens, BLOCK_N] for `token` and `row`."""
    mine = {
        "BLOCK_M": (tile.tokens, "tokens of a program"),
        "BLOCK": (step_length(codes), "stored items of a step"),
        "STEPS": (code_steps(codes, tile), "steps of a program"),
    }
    form = codes.weight
    step = [
        "first_item = (split * STEPS + step) * BLOCK",
        "item = first_item + tl.arange(0, BLOCK)",
        *load("items", "w_codes + row[:, None] * ROW + item[None, :]", "inside[:, None] & (item < ROW)[None, :]", zero(codes)),
        *explain_codes(codes),
        f"column = {first_column(form, 'item')}",
        *([f"first = {first_column(form, 'first_item')}"] if codes.grouped else []),
        *(line for index, part in enumerate(codes.parts) for line in part_lines(codes, part, index)),
    ]
    return [
        *constants({**numbers, **code_constants(codes), **mine}),
        "split = tl.program_id(2)",
        "first_token = tl.program_id(1).to(tl.int64) * BLOCK_M",
        "offset = tl.arange(0, BLOCK_M)",
        "token = first_token + offset",
        "x_tile = codes + first_token * K + offset[None, :] * K",
        "row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)",
        "inside = row < N",
        "present = token < rows",
        *([] if form.grouped else weight_scales(codes, "row", "0", "inside", "row")),
        *([] if codes.x_grouped else activation_scales(codes, "token", "0", "present", "row", "[BLOCK_M]")),
        f"sums = tl.zeros([BLOCK_N, BLOCK_M], dtype={'tl.float32' if codes.grouped else codes.kind})",
        *([] if codes.grouped else start_sums(codes)),
        *loop("for step in range(STEPS)", step),
        *([] if codes.grouped else [*correct(codes, "sums", "row", "row"), "sums = sums.to(tl.float32)"]),
        f"total = tl.trans(sums{'' if form.grouped else ' * w_scale_row[:, None]'})",
        *([] if codes.x_grouped else ["total *= x_scale_row[:, None]"]),
    ]


def zero(codes: Codes) -> str:
    """What a masked load of codes gives."""
    return "0.0" if codes.float8 else "0"


def start_sums(codes: Codes) -> Lines:
    """The two sums of asymmetric formats: of activations [BLOCK_M], of weights [BLOCK_N]."""
    return [
        *([] if codes.weight.symmetric else ["x_sum = tl.zeros([BLOCK_M], dtype=tl.int32)"]),
        *(["w_sum = tl.zeros([BLOCK_N], dtype=tl.int32)"] if codes.zero else []),
    ]


def correct(codes: Codes, sums: str, weight: str, activation: str) -> Lines:
    """Subtract what zero points add; `weight` and `activation` name theirs."""
    return [
        *([] if codes.weight.symmetric else [f"{sums} -= w_zero_{weight}[:, None] * x_sum[None, :]"]),
        *([f"{sums} -= w_sum[:, None] * x_zero_{activation}[None, :]"] if codes.zero else []),
    ]


def part_lines(codes: Codes, part: Part, index: int) -> Lines:
    """Multiply one part of the loaded items by its columns of the activation and add it to `sums`."""
    name, shift = part.name, f" + {part.offset}" if part.offset else ""
    within = f"(column < K{shift.replace('+', '-')})[:, None]"
    begins = index == 0 or not joined(codes)
    ends = index == len(codes.parts) - 1 or not joined(codes)
    lines = [
        *load(f"x_{name}", f"x_tile + column[:, None]{shift}", f"present[None, :] & {within}", zero(codes)),
        f"weight_{name} = {part.codes}",
    ]
    if not codes.grouped:
        return [*lines, *add_sums(codes, name, within, "row"), f"sums = tl.dot(weight_{name}, x_{name}, sums{accumulate(codes)})"]
    if begins:
        lines += [*group_scales(codes, name, shift), *start_sums(codes)]
    group = codes.parts[0].name if joined(codes) else name
    lines += add_sums(codes, name, within, group if codes.x_grouped else "row")
    product = f"tl.dot(weight_{name}, x_{name}{'' if begins else ', product'}, out_dtype={codes.kind})"
    lines.append(f"product = {product}")
    if not ends:
        return lines
    scales = [f"w_scale_{group}[:, None]"] if codes.weight.grouped else []
    scales += [f"x_scale_{group}[None, :]"] if codes.x_grouped else []
    weight, activation = (group if grouped else "row" for grouped in (codes.weight.grouped, codes.x_grouped))
    return [*lines, *correct(codes, "product", weight, activation), f"sums += product.to(tl.float32) * {' * '.join(scales)}"]


def accumulate(codes: Codes) -> str:
    """Float8 products add up in fewer bits inside the instruction on sm90: each step's sum is moved to float32."""
    return ", max_num_imprecise_acc=BLOCK" if codes.float8 else f", out_dtype={codes.kind}"


def group_scales(codes: Codes, name: str, shift: str) -> Lines:
    """Scales and zero points of the groups that a part's columns lie in."""
    lines = []
    if codes.weight.grouped:
        lines += [f"group_{name} = {group_of(shift)} // GROUP"]
        lines += weight_scales(codes, "row", f"group_{name}", f"inside & (group_{name} < GROUPS)", name)
    if codes.x_grouped:
        lines += [f"x_group_{name} = {group_of(shift)} // X_GROUP"]
        lines += activation_scales(codes, "token", f"x_group_{name}", f"present & (x_group_{name} < X_GROUPS)", name, "[BLOCK_M]")
    return lines


def add_sums(codes: Codes, name: str, within: str, activation: str) -> Lines:
    """Add a part to the two sums of asymmetric formats."""
    lines = []
    if not codes.weight.symmetric:
        numbers = f"x_{name}.to(tl.int32)"
        if codes.zero:
            numbers = f"tl.where({within}, {numbers} - x_zero_{activation}[None, :], 0)"
        lines.append(f"x_sum += tl.sum({numbers}, axis=0)")
    if codes.zero:
        lines.append(f"w_sum += tl.sum(weight_{name}.to(tl.int32), axis=1)")
    return lines
