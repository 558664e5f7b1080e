"""Tokens stored in the paged cache as they come: floats, or vectors that are packed already."""

from __future__ import annotations

from qcompile.codegen.contract import FLOATS, same_storage
from qcompile.codegen.cpp.contract import Operator, kernel, type_of
from qcompile.codegen.cpp.loops import every_row
from qcompile.codegen.cpp.source import block, constants
from qcompile.ir.lowered import Kernel, KernelSpec

_FLOAT_COPY = block(
    "for (int64_t dim = 0; dim < dims; dim += LANES)",
    [
        "const int64_t count = std::min<int64_t>(LANES, dims - dim);",
        "store(key_place + dim, load(key + dim, count), count);",
        "store(value_place + dim, load(value + dim, count), count);",
    ],
)
_PACKED_COPY = ["std::copy_n(key, k.size[3], key_place);", "std::copy_n(value, v.size[3], value_place);"]
"""Vectors that are packed already, keys and values each as wide as they are."""


def emit_append(spec: KernelSpec) -> Kernel:
    """Store k, v [B, L, S, D] at `positions` [B, S] of keys, values [P, L, R, D]; a thread takes heads of tokens."""
    kind, given = type_of(spec, "keys"), type_of(spec, "k")
    body = [
        *constants({"heads": (spec.size("L"), "of keys and values"), "dims": (spec.size("D"), "of a head")}),
        "const int64_t tokens = positions.size[1], page_tokens = keys.size[2];",
        *every_row(
            [
                "const int64_t batch = row / heads / tokens, token = row / heads % tokens, head = row % heads;",
                "const int64_t position = *positions.at<int64_t>(batch, token);",
                "// -1 is padding; a place beyond the table would be another sequence's page.",
                "if (position < 0 || position / page_tokens >= page_table.size[1]) continue;",
                "const int64_t page = *page_table.at<int32_t>(batch, position / page_tokens);",
                f"const {given} *key = k.at<{given}>(batch, head, token), *value = v.at<{given}>(batch, head, token);",
                f"{kind}* key_place = keys.at<{kind}>(page, head, position % page_tokens);",
                f"{kind}* value_place = values.at<{kind}>(page, head, position % page_tokens);",
                *(_PACKED_COPY if kind == "uint8_t" else _FLOAT_COPY),
            ],
            "k.size[0] * heads * tokens",
        ),
    ]
    return kernel(spec, APPEND.present(spec), body)


def refuses_append(spec: KernelSpec) -> str | None:
    """Keys and values of different types, bytes that do not come as bytes."""
    wanted = ("uint8",) if _is_packed(spec) else FLOATS
    wrong = [name for name in ("k", "v") if spec.format(name) not in wanted]
    if wrong:
        return f"{wrong[0]} is {spec.format(wrong[0])}: expected {' or '.join(wanted)} for keys of {spec.format('keys')}"
    return same_storage(spec, "keys", "values") or same_storage(spec, "k", "v")


def _is_packed(spec: KernelSpec) -> bool:
    return spec.format("keys") == "uint8"


_EITHER = (*FLOATS, "uint8")
APPEND = Operator(
    emit=emit_append,
    operands={
        "keys": _EITHER, "values": _EITHER, "k": _EITHER, "v": _EITHER, "page_table": ("i32",), "positions": ("i64",),
    },
    sizes=("L", "D"),
    refuses=refuses_append,
)  # fmt: skip
