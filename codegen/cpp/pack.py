"""Packing vectors of a cache as their form defines them, bit for bit, with or without storing them."""

from __future__ import annotations

from qcompile.codegen.contract import FLOATS, same_storage
from qcompile.codegen.cpp.contract import Operator, kernel, type_of
from qcompile.codegen.cpp.loops import every_row
from qcompile.codegen.cpp.packed_forms import TABLES, form_type, helpers, refuses_forms
from qcompile.codegen.cpp.source import constants
from qcompile.ir.lowered import Kernel, KernelSpec

HELPERS = ("packed",)


def emit_pack(spec: KernelSpec) -> Kernel:
    """Pack x [..., D] into out uint8 [..., W], x [B, L, S, D] where a table has scales of each head; a thread takes vectors."""
    numbers, place = f"x.row<{type_of(spec, 'x')}>(row)", "out.row<uint8_t>(row)"
    by_table = f"encode_static<Form>({numbers}, tables_0.at<fp16>(row / x.size[2] % x.size[1]), {place});"
    pack = by_table if spec.format("tables_0") else f"encode_token<Form>({numbers}, {place});"
    return kernel(spec, PACK.present(spec), [form_type(spec, "form", "Form"), *every_row([pack])], helpers(*HELPERS))


def emit_append_packed(spec: KernelSpec) -> Kernel:
    """Store k, v [B, L, S, D], packed, at `positions` [B, S] of keys, values uint8 [P, L, R, W]; a thread takes heads of tokens."""
    body = [
        form_type(spec, "k_form", "Keys"),
        form_type(spec, "v_form", "Values"),
        *constants({"heads": (spec.size("L"), "of keys and values")}),
        "const int64_t tokens = positions.size[1], page_tokens = keys.size[2];",
        *every_row(
            [
                "const int64_t batch = row / heads / tokens, token = row / heads % tokens, head = row % heads;",
                "const int64_t position = *positions.at<int64_t>(batch, token);",
                "// -1 is padding; a place beyond the table would be another sequence's page.",
                "if (position < 0 || position / page_tokens >= page_table.size[1]) continue;",
                "const int64_t page = *page_table.at<int32_t>(batch, position / page_tokens), cell = position % page_tokens;",
                _encode(spec, "Keys", "k", "keys"),
                _encode(spec, "Values", "v", "values"),
            ],
            "k.size[0] * heads * tokens",
        ),
    ]
    return kernel(spec, APPEND_PACKED.present(spec), body, helpers(*HELPERS))


def _encode(spec: KernelSpec, form: str, given: str, pages: str) -> str:
    """Pack a head of a token into its place, by a table of scales if there is one."""
    numbers, place, table = (
        f"{given}.at<{type_of(spec, given)}>(batch, head, token)",
        f"{pages}.at<uint8_t>(page, head, cell)",
        f"{given}_tables_0",
    )
    if spec.format(table):
        return f"encode_static<{form}>({numbers}, {table}.at<fp16>(head), {place});"
    return f"encode_token<{form}>({numbers}, {place});"


def refuses_append_packed(spec: KernelSpec) -> str | None:
    """Forms that are not written, and rotations: here a step of their own comes before."""
    if int(spec.option("hadamard_size", 0)):
        return f"hadamard_size={spec.option('hadamard_size')}: expected keys that are rotated before"
    return refuses_forms(spec, "k_form", "v_form", together=False, tables=True) or same_storage(spec, "keys", "values")


_BYTES = ("uint8",)
PACK = Operator(
    emit=emit_pack,
    operands={"x": FLOATS, "tables_0": ("fp16",), "out": _BYTES},
    optional=frozenset({"tables_0"}),
    sizes=("D",),
    options=("form",),
    required=("form",),
    refuses=lambda spec: refuses_forms(spec, "form", together=False, tables=True),
)
APPEND_PACKED = Operator(
    emit=emit_append_packed,
    operands={"keys": _BYTES, "values": _BYTES, "k": FLOATS, "v": FLOATS, "page_table": ("i32",), "positions": ("i64",), **TABLES},
    optional=frozenset(TABLES),
    sizes=("L", "D"),
    options=("k_form", "v_form", "hadamard_size"),
    required=("k_form", "v_form"),
    refuses=refuses_append_packed,
)
