"""Rows of a table, in 16 or 32 bits or quantized; an index outside the table gives zeros and is never read."""

from __future__ import annotations

from qcompile.codegen.triton.contract import FLOATS, TRITON_TYPES, Operator, kernel, pointer, stored
from qcompile.codegen.triton.loads import WHOLE, float32_numbers, load_scales, widen
from qcompile.codegen.triton.source import Lines, constants, function
from qcompile.codegen.triton.tiles import Architecture, power_of_two
from qcompile.codegen.triton.weight_format import WeightFormat, refuses_format, weight_format, weight_operands
from qcompile.ir.lowered import Kernel, KernelSpec, Launch

BLOCK = 1024


def embedding_numbers(spec: KernelSpec, form: WeightFormat) -> Lines:
    """`numbers`: the columns of the row in float32. The table keeps the artifact's packing: byte j holds columns 2j and 2j + 1."""
    if not form.quantized:
        return ["numbers = tl.load(weight + index * K + column, mask=inside & known, other=0.0)"]
    if form.bits == 4:
        codes = "tl.load(codes + index * ROW + column // 2, mask=inside & known, other=0)"
        load = f"items = ({codes} >> (column % 2 * 4).to(tl.uint8)) & 15"
    else:
        load = "items = tl.load(codes + index * ROW + column, mask=inside & known, other=0)"
    group = "column // GROUP" if form.grouped else "(column * 0)"
    return [
        load,
        *widen(form),
        f"group = {group}",
        *load_scales(form, "index", "group", "inside & known", "row"),
        f"numbers = ({float32_numbers(form, WHOLE, 'zero_row')}) * scale_row",
    ]


def emit_embedding(spec: KernelSpec, arch: Architecture) -> Kernel:
    """Copy, or dequantize, one row of the table per index."""
    form = weight_format(spec)
    size = spec.size("K")
    block = min(BLOCK, power_of_two(size))
    numbers: dict[str, tuple[int | float, str]] = {"N": (spec.size("N"), "rows of the table"), "K": (size, "columns")}
    if form.quantized:
        numbers["ROW"] = (-(-size * form.bits // 8), "bytes in a stored row")
        numbers["GROUPS"] = (form.groups, "scales in a row")
        if form.grouped:
            numbers["GROUP"] = (form.group, "columns that share a scale")
        if not form.symmetric:
            numbers["ZERO_ROW"] = (form.zero_row, "bytes of zero points in a row")
    body = [
        *constants({**numbers, "BLOCK": (block, "columns of a program")}),
        "row = tl.program_id(0).to(tl.int64)",
        "column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)",
        "inside = column < K",
        "index = tl.load(indices + row)",
        "known = (index >= 0) & (index < N)",
        *embedding_numbers(spec, form),
        f"tl.store(out + row * K + column, numbers.to({TRITON_TYPES[stored(spec, 'out')]}), mask=inside)",
    ]
    names = ("indices", *weight_operands(spec), "out")
    parameters = tuple(pointer(name, "u8" if name == "codes" else stored(spec, name)) for name in names)
    launch = Launch(spec.operator, ("rows", -(-size // block), 1), parameters)
    doc = "One program writes BLOCK columns of one row; an index outside the table gives zeros."
    return kernel(spec, arch, [function(spec.operator, names, doc, body)], [launch])


EMBEDDING = Operator(
    emit=emit_embedding,
    operands={"indices": ("i64",), "weight": FLOATS, "out": FLOATS},
    sizes=("K", "N"),
)
QUANTIZED_EMBEDDING = Operator(
    emit=emit_embedding,
    operands={"indices": ("i64",), "codes": (), "scale": (), "zero": ("uint8",), "out": FLOATS},
    optional=frozenset({"zero"}),
    sizes=("K", "N"),
    refuses=lambda spec: refuses_format(spec, (4, 8)),
)
