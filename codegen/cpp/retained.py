"""Caches that keep some tokens as they came: putting these beside the new ones, packing what settles, keeping what does not."""

from __future__ import annotations

from qcompile.codegen.contract import FLOATS, same_storage
from qcompile.codegen.cpp.contract import Operator, kernel, type_of
from qcompile.codegen.cpp.loops import every_row
from qcompile.codegen.cpp.packed_forms import form_of, form_type, helpers, refuses_forms
from qcompile.codegen.cpp.source import Lines, block, constants
from qcompile.ir.lowered import Kernel, KernelSpec

POLICY = ("first", "recent", "group")
"""Options that say which tokens settle."""


def policy_type(spec: KernelSpec) -> str:
    """The declaration of the C++ type of a policy."""
    return f"typedef Retention<{', '.join(str(spec.option(name)) for name in POLICY)}> Policy;"


def refuses_policy(spec: KernelSpec, *options: str) -> str | None:
    """A policy that is none, and forms whose tokens do not settle together; their options are read already."""
    first, recent, group = (int(spec.option(name)) for name in POLICY)
    if first < 0 or recent < 0 or group < 1 or recent + group < 2:
        return f"first={first}, recent={recent}, group={group}: expected tokens that are kept, and groups of at least 1"
    torn = [form for form in (form_of(spec, option) for option in options) if group % form.tokens]
    return f"group={group}: expected a multiple of the {torn[0].tokens} tokens that are packed together" if torn else None


def emit_with_recent(spec: KernelSpec) -> Kernel:
    """Rows [C, L, N, D] of each sequence, then x [B, L, S, D]: out [B, L, N + S, D]; a thread takes rows of the result."""
    kind, given = type_of(spec, "out"), type_of(spec, "x")
    dims = "for (int64_t dim = 0; dim < dims; dim += LANES)"
    copied = [
        "const int64_t slot = *slots.at<int32_t>(batch);",
        f"std::memcpy(to, rows.at<{kind}>(slot, head, column), dims * sizeof({kind}));",
        "continue;",
    ]
    count = "const int64_t count = std::min<int64_t>(LANES, dims - dim);"
    sizes = {
        "heads": (spec.size("L"), "of keys or values"),
        "kept": (spec.size("N"), "rows of a sequence"),
        "dims": (spec.size("D"), "of a head"),
    }
    body = [
        *constants(sizes),
        "const int64_t columns = out.size[2];",
        *every_row(
            [
                "const int64_t batch = row / columns / heads, head = row / columns % heads, column = row % columns;",
                f"{kind}* to = out.at<{kind}>(batch, head, column);",
                *block("if (column < kept)", copied),
                f"const {given}* from = x.at<{given}>(batch, head, column - kept);",
                *block(dims, [count, "store(to + dim, load(from + dim, count), count);"]),
            ]
        ),
    ]
    return kernel(spec, WITH_RECENT.present(spec), body)


def _every_arrival(lines: Lines, count: str) -> Lines:
    """The lines for each `row` of `count`, the first axis of which are sequences: `batch`, and what `arrived` of it."""
    known = "if (arrived.batch != batch) arrived = arrivals_of(positions, batch);"
    return ["Arrivals arrived{-1, 0, 0, 0};", *every_row([lines[0], known, *lines[1:]], count)]


def emit_settle(spec: KernelSpec) -> Kernel:
    """Pack tokens of exact [B, L, N + S, D] that settle into pages [P, L, R, W]; a thread takes what is packed together of a head."""
    kind, together = type_of(spec, "exact"), form_of(spec, "form").tokens
    read = [
        f"const {kind}* from = exact.at<{kind}>(batch, head, column_of<Policy>(positions, arrived, position + token));",
        "for (int64_t dim = 0; dim < dims; dim += LANES)",
        "    store(numbers + token * Form::PLAIN + dim, load(from + dim, std::min<int64_t>(LANES, dims - dim)));",
    ]
    pack = "encode_channels<Form>(numbers, cell);" if together > 1 else "encode_token<Form>(numbers, cell);"
    body = [
        form_type(spec, "form", "Form"),
        policy_type(spec),
        *constants({"heads": (spec.size("L"), "of keys or values"), "dims": (spec.size("D"), "of a head")}),
        "const int64_t page_tokens = pages.size[2];",
        "// So many tokens settle in a call at most, whatever the sequence held before.",
        "const int64_t most = (positions.size[1] + Policy::GROUP - 1) / Policy::GROUP * Policy::GROUP / Form::TOKENS;",
        *_every_arrival(
            [
                "const int64_t batch = row / most / heads, head = row / most % heads;",
                "const int64_t position = Policy::settled(arrived.start) + row % most * Form::TOKENS;",
                "if (position >= Policy::settled(arrived.end)) continue;",
                "const int64_t slot = position - Policy::FIRST;",
                "if (slot / page_tokens >= page_table.size[1]) continue;",
                "float numbers[Form::TOKENS * Form::PLAIN];",
                *block("for (int64_t token = 0; token < Form::TOKENS; token++)", read),
                "const int64_t page = *page_table.at<int32_t>(batch, slot / page_tokens);",
                "uint8_t* cell = pages.at<uint8_t>(page, head, slot % page_tokens);",
                pack,
            ],
            "positions.size[0] * heads * most",
        ),
    ]
    return kernel(spec, SETTLE.present(spec), body, helpers("packed", "settled"))


def emit_retain(spec: KernelSpec) -> Kernel:
    """Keep new tokens of exact [B, L, N + S, D] that do not settle in rows [C, L, N, D]; a thread takes heads of tokens."""
    kind = type_of(spec, "rows")
    body = [
        policy_type(spec),
        *constants({"heads": (spec.size("L"), "of keys or values"), "dims": (spec.size("D"), "of a head")}),
        "const int64_t tokens = positions.size[1];",
        *_every_arrival(
            [
                "const int64_t batch = row / tokens / heads, head = row / tokens % heads, token = row % tokens;",
                "const int64_t position = *positions.at<int64_t>(batch, token);",
                "if (position < 0 || (position >= Policy::FIRST && position < Policy::settled(arrived.end))) continue;",
                f"{kind}* to = rows.at<{kind}>(*slots.at<int32_t>(batch), head, Policy::row(position));",
                f"std::memcpy(to, exact.at<{kind}>(batch, head, Policy::ROWS + token), dims * sizeof({kind}));",
            ],
            "positions.size[0] * heads * tokens",
        ),
    ]
    return kernel(spec, RETAIN.present(spec), body, helpers("settled"))


def refuses_settle(spec: KernelSpec) -> str | None:
    """Forms that are not written, and policies that do not go with them."""
    return refuses_forms(spec, "form") or refuses_policy(spec, "form")


WITH_RECENT = Operator(
    emit=emit_with_recent,
    operands={"rows": FLOATS, "x": FLOATS, "slots": ("i32",), "out": FLOATS},
    sizes=("L", "N", "D"),
    refuses=lambda spec: same_storage(spec, "rows", "out"),
)
SETTLE = Operator(
    emit=emit_settle,
    operands={"pages": ("uint8",), "exact": FLOATS, "page_table": ("i32",), "positions": ("i64",)},
    sizes=("L", "D"),
    options=("form", *POLICY),
    required=("form", *POLICY),
    refuses=refuses_settle,
)
RETAIN = Operator(
    emit=emit_retain,
    operands={"rows": FLOATS, "exact": FLOATS, "slots": ("i32",), "positions": ("i64",)},
    sizes=("L", "D"),
    options=POLICY,
    required=POLICY,
    refuses=lambda spec: refuses_policy(spec) or same_storage(spec, "rows", "exact"),
)
