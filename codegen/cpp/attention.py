"""Attention over the cache: queries that read the same head of keys are taken together, so that these are loaded and unpacked once.

What a query sees and gathers is the same whichever queries are beside it (`attending.h`), and is put together part by part of its sequence
(`sharing.h`): results depend neither on threads nor on rows.
"""

from __future__ import annotations

from qcompile.codegen.contract import FLOATS, same_storage
from qcompile.codegen.cpp.contract import Operator, kernel, type_of
from qcompile.codegen.cpp.packed_forms import TABLES, form_type, helpers, refuses_forms, refuses_size
from qcompile.codegen.cpp.retained import POLICY, policy_type, refuses_policy
from qcompile.codegen.cpp.source import Lines, block, constants, number
from qcompile.ir.lowered import BUCKETS, Kernel, KernelSpec

READING = ("packed", "codes", "digits", "ahead", "code_sums", "attending", "stretches", "sharing")
"""Headers that attention needs."""
MOST_ROWS, MANY_ROWS = 4, 6
"""Queries whose products are computed at once, of a token and of a prompt: as many sums as there are registers for."""
BLOCK, BLOCK_NUMBERS = 48, 6144
"""Queries of a prompt that are taken together, and numbers of them."""


def together(spec: KernelSpec) -> tuple[int, int]:
    """How many of the queries of a token that share keys are computed at once, and how many of these there are."""
    group = spec.size("H") // spec.size("L")
    times = -(-group // MOST_ROWS)
    return -(-group // times), times


def parts_of(spec: KernelSpec) -> dict[str, tuple[int, str]]:
    """The compile-time numbers of the kernel."""
    return {
        "heads": (spec.size("L"), "of keys and values"),
        "group": (spec.size("H") // spec.size("L"), "heads of queries for each of them"),
    }


def attention_types(spec: KernelSpec) -> Lines:
    """The queries of a token, and many of a prompt."""
    rows, times = together(spec)
    many = max(1, min(BLOCK, BLOCK_NUMBERS // spec.size("D")) // MANY_ROWS) * MANY_ROWS
    return [
        f"typedef Attention<Keys, Values, {min(rows * times, many)}, {rows}> Few;",
        f"typedef Attention<Keys, Values, {many}, {MANY_ROWS}> Many;",
    ]


def every_query(spec: KernelSpec, ranges: Lines, parts: Lines, walk: Lines) -> Lines:
    """All queries: `ranges` sets which keys of the pages query `i` sees, `parts` which parts there are, `walk` goes through one."""

    def scales(table: str) -> str:
        return f", {table}.at<fp16>(block.head)" if spec.format(table) else ""

    sinks = []
    if spec.format("sinks"):
        sinks = [f"whole.peak[i] = load(sinks.at<{type_of(spec, 'sinks')}>(at_head), 1)[0] * LOG2E;", "whole.total[i] = 1.0f;"]
    look = [
        "a.count = block.count;",
        "for (int64_t i = 0; i < a.count; i++) a.position[i] = *positions.at<int64_t>(block.batch, (block.first + i) / group);",
        "see_pages(a);",
        *parts,
    ]
    read = [
        "const int64_t token = (block.first + i) / group, at_head = block.head * group + (block.first + i) % group;",
        f"set_query(a, i, q.at<{type_of(spec, 'q')}>(block.batch, at_head, token), {number(spec.option('scale'))}{scales('k_tables_0')});",
        *sinks,
    ]
    put = [
        "const int64_t token = (block.first + i) / group, at_head = block.head * group + (block.first + i) % group;",
        f"put_result<Values>(whole, i, out.at<{type_of(spec, 'out')}>(block.batch, at_head, token){scales('v_tables_0')});",
    ]
    given = "team, q.size[0], heads, beside, look, read, walk, put"
    return [
        "const int64_t beside = q.size[2] * group;",
        *_lambda("see_pages = [&](auto& a)", block("for (int64_t i = 0; i < a.count; i++)", ranges)),
        *_lambda("look = [&](auto& a, const Block& block)", look),
        *_lambda(
            "read = [&](auto& a, const Block& block, auto& whole)",
            ["clear(whole, block.count);", *block("for (int64_t i = 0; i < block.count; i++)", read), "set_rest(a);"],
        ),
        *_lambda("walk = [&](auto& a, const Block& block, int64_t part, Range parts)", ["see_pages(a);", *walk]),
        *_lambda("put = [&](const auto& whole, const Block& block)", block("for (int64_t i = 0; i < block.count; i++)", put)),
        f"if (beside <= Few::Q) attend<Few>({given});",
        f"else attend<Many>({given});",
    ]


def _lambda(head: str, body: Lines) -> Lines:
    return [*block(f"const auto {head}", body)[:-1], "};"]


def _least(spec: KernelSpec) -> str:
    window = int(spec.option("window", 0))
    return f"std::max<int64_t>(0, a.position[i] + 1 - {window})" if window else "0"


def _softcap(spec: KernelSpec) -> str:
    return number(spec.option("softcap", 0.0))


def _pages(spec: KernelSpec) -> Lines:
    """Through the pages of a part."""
    return [
        "const int64_t last = only_part(a, part);",
        "const int32_t* table = page_table.at<int32_t>(block.batch);",
        f"attend_pages<Keys, Values>(a, keys, values, table, block.head, last, {_softcap(spec)});",
    ]


def emit_attend_packed(spec: KernelSpec) -> Kernel:
    """Attention of q [B, H, S, D] over keys and values uint8 [P, L, R, W]."""
    return _attend_pages(spec, ATTEND_PACKED, _forms(spec))


def emit_attend(spec: KernelSpec) -> Kernel:
    """Attention of q [B, H, S, D] over keys and values [P, L, R, D] that are numbers."""
    return _attend_pages(spec, ATTEND, [f"typedef Numbers<{spec.size('D')}, {type_of(spec, 'keys')}> Keys;", "typedef Keys Values;"])


def _attend_pages(spec: KernelSpec, operator: Operator, types: Lines) -> Kernel:
    ranges = [f"a.low[i] = {_least(spec)};", "a.high[i] = a.position[i] + 1;"]
    return _attention(spec, operator, types, every_query(spec, ranges, ["return parts_of(a);"], _pages(spec)), READING)


def emit_attend_settled(spec: KernelSpec) -> Kernel:
    """The pages first, whose slots count from position `first` on; then, as one part, what is kept as it came: first and late tokens."""
    kept, least = type_of(spec, "exact_keys"), _least(spec)
    ranges = [
        f"a.low[i] = std::max<int64_t>(0, {least} - Policy::FIRST);",
        "a.high[i] = Policy::settled(a.position[i] + 1) - Policy::FIRST;",
    ]
    parts = ["const Range parts = parts_of(a);", "return Range{parts.first, parts.last + 1};"]
    walk = f"attend_kept<Policy, Kept>(a, exact_keys, exact_values, positions, row, block.head, {_softcap(spec)});"
    early = [f"a.low[i] = {least};", "a.high[i] = std::min<int64_t>(Policy::FIRST, a.position[i] + 1);"]
    late = [f"a.low[i] = std::max<int64_t>({least}, Policy::settled(a.position[i] + 1));", "a.high[i] = a.position[i] + 1;"]
    every = "for (int64_t i = 0; i < a.count; i++)"
    walks = [
        *block("if (part + 1 < parts.last)", [*_pages(spec), "return;"]),
        "if (row.batch != block.batch) row = arrivals_of(positions, block.batch);",
        *block(every, early),
        walk,
        *block(every, late),
        walk,
    ]
    types = [*_forms(spec), f"typedef Numbers<{spec.size('D')}, {kept}> Kept;", policy_type(spec), "Arrivals row{-1, 0, 0, 0};"]
    return _attention(spec, ATTEND_SETTLED, types, every_query(spec, ranges, parts, walks), (*READING, "settled", "kept"))


def _forms(spec: KernelSpec) -> Lines:
    return [form_type(spec, "k_form", "Keys"), form_type(spec, "v_form", "Values")]


def _attention(spec: KernelSpec, operator: Operator, types: Lines, queries: Lines, files: tuple[str, ...]) -> Kernel:
    body = [*types, *attention_types(spec), *constants(parts_of(spec)), *queries]
    alone = KernelSpec(spec.operator, spec.sizes, spec.formats, spec.options)  # one kernel serves every number of queries
    return kernel(alone, operator.present(spec), body, helpers(*files))


def refuses_heads(spec: KernelSpec) -> str | None:
    """Heads that do not divide."""
    divides = spec.size("H") % spec.size("L") == 0
    return None if divides else f"H={spec.size('H')}, L={spec.size('L')}: expected whole groups of query heads"


def _refuses_products(spec: KernelSpec) -> str | None:
    given = spec.option("products", "fast")
    return None if given == "fast" else f"products={given!r}: expected 'fast', or no such option"


def refuses_attend_packed(spec: KernelSpec) -> str | None:
    """Heads that do not divide, and forms that are not read."""
    return refuses_heads(spec) or _refuses_products(spec) or refuses_forms(spec, "k_form", "v_form", together=False, tables=True)


def refuses_attend_settled(spec: KernelSpec) -> str | None:
    """The same; keys may share scales per channel, of tokens that settle together."""
    reason = refuses_heads(spec) or refuses_forms(spec, "k_form") or refuses_forms(spec, "v_form", together=False)
    reason = reason or _refuses_products(spec) or refuses_policy(spec, "k_form")
    return reason or same_storage(spec, "exact_keys", "exact_values")


_BYTES = ("uint8",)
_PLACES = {"page_table": ("i32",), "positions": ("i64",), "sinks": FLOATS}
ATTEND = Operator(
    emit=emit_attend,
    operands={"q": FLOATS, "keys": FLOATS, "values": FLOATS, **_PLACES, "out": FLOATS},
    optional=frozenset({"sinks"}),
    sizes=("H", "L", "D"),
    options=("scale", "window", "softcap"),
    required=("scale",),
    buckets=tuple(BUCKETS),
    refuses=lambda spec: refuses_heads(spec) or refuses_size(spec.size("D")) or same_storage(spec, "keys", "values"),
)
ATTEND_PACKED = Operator(
    emit=emit_attend_packed,
    operands={"q": FLOATS, "keys": _BYTES, "values": _BYTES, **_PLACES, **TABLES, "out": FLOATS},
    optional=frozenset({"sinks", *TABLES}),
    sizes=("H", "L", "D"),
    options=("k_form", "v_form", "scale", "window", "softcap", "products"),
    required=("k_form", "v_form", "scale"),
    buckets=tuple(BUCKETS),
    refuses=refuses_attend_packed,
)
ATTEND_SETTLED = Operator(
    emit=emit_attend_settled,
    operands={"q": FLOATS, "keys": _BYTES, "values": _BYTES, "exact_keys": FLOATS, "exact_values": FLOATS, **_PLACES, "out": FLOATS},
    optional=frozenset({"sinks"}),
    sizes=("H", "L", "D"),
    options=("k_form", "v_form", *POLICY, "scale", "window", "softcap", "products"),
    required=("k_form", "v_form", *POLICY, "scale"),
    buckets=tuple(BUCKETS),
    refuses=refuses_attend_settled,
)
