"""Attention without a cache, as encoders have it: each thread takes blocks of queries of one head."""

from __future__ import annotations

from qcompile.codegen.contract import FLOATS, same_storage
from qcompile.codegen.cpp.contract import Operator, kernel, type_of
from qcompile.codegen.cpp.loops import every_row
from qcompile.codegen.cpp.packed_forms import helpers, refuses_size
from qcompile.codegen.cpp.source import block, constants, number
from qcompile.ir.lowered import Kernel, KernelSpec


def emit_attention(spec: KernelSpec) -> Kernel:
    """Attention of q [B, H, S, D] over k, v [B, L, T, D]; padding [B, T] is 0 where there is no token."""
    real, window = type_of(spec, "q"), int(spec.option("window", 0))
    causal, padding = bool(spec.option("causal", False)), spec.format("padding")
    last = f"std::clamp<int64_t>(query + i + 1 + {'tokens - queries'}, 0, tokens)" if causal else "tokens"
    first = f"std::max<int64_t>(0, a.last[i] - {window})" if causal and window else "0"
    shown = f"start + key < tokens{' && *padding.at<int64_t>(batch, start + key) != 0' if padding else ''}"
    begin = [
        f"a.last[i] = {last};",
        f"a.first[i] = {first};",
        *(
            [f"a.peak[i] = get(sinks.at<{type_of(spec, 'sinks')}>(head));", "a.total[i] = 1.0f;"]
            if spec.format("sinks")
            else ["a.peak[i] = -INFINITY;", "a.total[i] = 0.0f;"]
        ),
    ]
    end = [
        f"{real}* to = out.at<{real}>(batch, head, query + i);",
        "const float share = a.total[i] > 0.0f ? 1.0f / a.total[i] : 0.0f;",
        "for (int64_t dim = 0; dim < dims; dim++) put(to + dim, a.mixed[i][dim] * share);",
    ]
    given = "a, q, k, v, batch, head, head / group, query, count, start, there"
    walk = [
        "bool there[KEYS];",
        f"for (int64_t key = 0; key < KEYS; key++) there[key] = {shown};",
        f"attend_block<dims, {real}>({given}, {number(spec.option('scale'))}, {number(spec.option('softcap', 0.0))});",
    ]
    sizes = {
        "heads": (spec.size("H"), "of queries"),
        "group": (spec.size("H") // spec.size("L"), "heads that share keys and values"),
        "dims": (spec.size("D"), "of a head"),
    }
    body = [
        *constants(sizes),
        "const int64_t queries = q.size[2], tokens = k.size[2], blocks = (queries + QUERIES - 1) / QUERIES;",
        "Gathered<dims> a;",
        *every_row(
            [
                "const int64_t batch = row / blocks / heads, head = row / blocks % heads, query = row % blocks * QUERIES;",
                "const int64_t count = std::min(QUERIES, queries - query);",
                "std::memset(&a, 0, sizeof a);",
                *block("for (int64_t i = 0; i < count; i++)", begin),
                "// No query of the block sees what comes after the last one's keys.",
                *block("for (int64_t start = 0; start < a.last[count - 1]; start += KEYS)", walk),
                *block("for (int64_t i = 0; i < count; i++)", end),
            ],
            "q.size[0] * heads * blocks",
        ),
    ]
    return kernel(spec, ATTENTION.present(spec), body, helpers("whole"))


def refuses_attention(spec: KernelSpec) -> str | None:
    """Heads that do not divide or do not fit on the stack."""
    if spec.size("H") % spec.size("L"):
        return f"H={spec.size('H')}, L={spec.size('L')}: expected whole groups of query heads"
    return refuses_size(spec.size("D")) or same_storage(spec, "q", "k", "v", "out")


ATTENTION = Operator(
    emit=emit_attention,
    operands={"q": FLOATS, "k": FLOATS, "v": FLOATS, "padding": ("i64",), "sinks": FLOATS, "out": FLOATS},
    optional=frozenset({"padding", "sinks"}),
    sizes=("H", "L", "D"),
    options=("scale", "causal", "window", "softcap", "cache"),
    required=("scale",),
    refuses=refuses_attention,
)
