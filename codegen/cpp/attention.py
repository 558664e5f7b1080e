"""Attention over the cache: queries that read the same head of keys are taken together, so that these are loaded and unpacked once.

What a query sees and gathers is the same whichever queries are beside it (`attending.h`): results depend neither on threads nor on rows.
"""

from __future__ import annotations

from qcompile.codegen.contract import FLOATS, same_storage
from qcompile.codegen.cpp.contract import Operator, kernel, type_of
from qcompile.codegen.cpp.packed_forms import form_type, helpers, refuses_forms, refuses_size
from qcompile.codegen.cpp.retained import POLICY, policy_type, refuses_policy
from qcompile.codegen.cpp.source import Lines, block, constants, number
from qcompile.ir.lowered import BUCKETS, Kernel, KernelSpec

PAGES = ("packed", "attending", "packed_pages")
"""Headers that a walk over packed pages needs."""
MOST_TOGETHER = 4
"""Queries that are taken together: as many sums as there are registers for."""


def queries_together(spec: KernelSpec) -> int:
    """Those of one token, where they share keys, and do not take too many registers."""
    group = spec.size("H") // spec.size("L")
    return group if 1 < group <= MOST_TOGETHER else MOST_TOGETHER


def parts_of(spec: KernelSpec) -> dict[str, tuple[int, str]]:
    """The compile-time numbers of the kernel."""
    return {
        "heads": (spec.size("H"), "of queries"),
        "group": (spec.size("H") // spec.size("L"), "heads that share keys and values"),
        "dims": (spec.size("D"), "of a head"),
    }


def every_query(spec: KernelSpec) -> Lines:
    """Shares of the queries, in order of sequence, head of keys, token, head: neighbours are taken together where they read one head."""
    together = queries_together(spec)
    return [
        "const Range mine = team.share(q.size[0] * heads * tokens);",
        *block(
            "for (int64_t next = mine.first, count; next < mine.last; next += count)",
            [
                f"count = std::min({{int64_t({together}), mine.last - next, beside - next % beside}});",
                "if (count == 1) attend(std::integral_constant<int, 1>(), next, count);",
                f"else attend(std::integral_constant<int, {together}>(), next, count);",
            ],
        ),
    ]


def attend_function(spec: KernelSpec, before: Lines, ranges: Lines, walks: Lines) -> Lines:
    """`attend`, for `count` queries from number `next` on: `ranges` sets which keys query `i` sees of the pages by its `position`."""
    sinks = [f"a.peak[i] = get(sinks.at<{type_of(spec, 'sinks')}>(at_head));", "a.total[i] = 1.0f;"] if spec.format("sinks") else []
    begin = [
        "const int64_t pair = (next + i) % beside, token = pair / group, at_head = head * group + pair % group;",
        "const int64_t position = *positions.at<int64_t>(batch, token);",
        f"set_query<Keys>(a, i, q.at<{type_of(spec, 'q')}>(batch, at_head, token));",
        *sinks,
        *ranges,
    ]
    end = [
        "const int64_t pair = (next + i) % beside;",
        f"put_result(a, i, out.at<{type_of(spec, 'out')}>(batch, head * group + pair % group, pair / group), dims);",
    ]
    body = [
        "Attention<Keys, Values, decltype(most)::value> a;",
        "clear(a);",
        "const int64_t head = next / beside % (heads / group), batch = next / beside / (heads / group);",
        "const int32_t* table = page_table.at<int32_t>(batch);",
        *before,
        *block("for (int i = 0; i < count; i++)", begin),
        *walks,
        *block("for (int i = 0; i < count; i++)", end),
    ]
    return [*block("const auto attend = [&](auto most, int64_t next, int64_t count)", body)[:-1], "};"]


def _least(spec: KernelSpec) -> str:
    window = int(spec.option("window", 0))
    return f"std::max<int64_t>(0, position + 1 - {window})" if window else "0"


def _numbers(spec: KernelSpec) -> str:
    return f"{number(spec.option('scale'))}, {number(spec.option('softcap', 0.0))}"


def emit_attend_packed(spec: KernelSpec) -> Kernel:
    """Attention of q [B, H, S, D] over keys and values uint8 [P, L, R, W]; a thread takes queries, and each reads its keys in order."""
    ranges = [f"a.low[i] = {_least(spec)};", "a.high[i] = position + 1;"]
    walks = [f"attend_pages<Keys, Values>(a, keys, values, table, head, {_numbers(spec)});", "unfold<Values>(a);"]
    return _attention(spec, ATTEND_PACKED, _forms(spec), attend_function(spec, [], ranges, walks), PAGES)


def emit_attend_settled(spec: KernelSpec) -> Kernel:
    """The pages first, whose slots count from position `first` on, then what is kept as it came: first tokens, and late ones."""
    kept = type_of(spec, "exact_keys")
    before = [
        "int64_t places[decltype(most)::value], least[decltype(most)::value];",
        "if (row.batch != batch) row = arrivals_of(positions, batch);",
    ]
    ranges = [
        "places[i] = position;",
        f"least[i] = {_least(spec)};",
        "a.low[i] = std::max<int64_t>(0, least[i] - Policy::FIRST);",
        "a.high[i] = Policy::settled(position + 1) - Policy::FIRST;",
    ]
    walk = f"attend_kept<Policy, Keys, Values, {kept}>(a, exact_keys, exact_values, positions, row, head, {_numbers(spec)});"
    early = ["a.low[i] = least[i];", "a.high[i] = std::min(int64_t(Policy::FIRST), places[i] + 1);"]
    late = ["a.low[i] = std::max(least[i], Policy::settled(places[i] + 1));", "a.high[i] = places[i] + 1;"]
    walks = [
        f"attend_pages<Keys, Values>(a, keys, values, table, head, {_numbers(spec)});",
        "unfold<Values>(a);",
        *block("for (int i = 0; i < count; i++)", early),
        walk,
        *block("for (int i = 0; i < count; i++)", late),
        walk,
    ]
    types = [*_forms(spec), policy_type(spec), "Arrivals row{-1, 0, 0, 0};"]
    attend = attend_function(spec, before, ranges, walks)
    return _attention(spec, ATTEND_SETTLED, types, attend, (*PAGES, "settled", "numbers", "kept"))


def emit_attend(spec: KernelSpec) -> Kernel:
    """Attention of q [B, H, S, D] over keys and values [P, L, R, D] that are numbers."""
    ranges = [f"a.low[i] = {_least(spec)};", "a.high[i] = position + 1;"]
    walks = [f"attend_numbers<Keys, {type_of(spec, 'keys')}>(a, keys, values, table, head, {_numbers(spec)});"]
    types = [f"typedef Plain<{spec.size('D')}> Keys;", "typedef Keys Values;"]
    return _attention(spec, ATTEND, types, attend_function(spec, [], ranges, walks), ("packed", "attending", "numbers"))


def _forms(spec: KernelSpec) -> Lines:
    return [form_type(spec, "k_form", "Keys"), form_type(spec, "v_form", "Values")]


def _attention(spec: KernelSpec, operator: Operator, types: Lines, attend: Lines, files: tuple[str, ...]) -> Kernel:
    body = [
        *types,
        *constants(parts_of(spec)),
        "const int64_t tokens = q.size[2], beside = tokens * group;",
        *attend,
        *every_query(spec),
    ]
    alone = KernelSpec(spec.operator, spec.sizes, spec.formats, spec.options)  # one kernel serves every number of queries
    return kernel(alone, operator.present(spec), body, helpers(*files))


def refuses_heads(spec: KernelSpec) -> str | None:
    """Heads that do not divide."""
    divides = spec.size("H") % spec.size("L") == 0
    return None if divides else f"H={spec.size('H')}, L={spec.size('L')}: expected whole groups of query heads"


def refuses_attend_packed(spec: KernelSpec) -> str | None:
    """Heads that do not divide, and forms that are not read."""
    return refuses_heads(spec) or refuses_forms(spec, "k_form", "v_form", together=False)


def refuses_attend_settled(spec: KernelSpec) -> str | None:
    """The same; keys may share scales per channel, of tokens that settle together."""
    reason = refuses_heads(spec) or refuses_forms(spec, "k_form") or refuses_forms(spec, "v_form", together=False)
    reason = reason or refuses_policy(spec, "k_form")
    return reason or same_storage(spec, "exact_keys", "exact_values")


_BYTES = ("uint8",)
_PLACES = {"page_table": ("i32",), "positions": ("i64",), "sinks": FLOATS, "out": FLOATS}
ATTEND = Operator(
    emit=emit_attend,
    operands={"q": FLOATS, "keys": FLOATS, "values": FLOATS, **_PLACES},
    optional=frozenset({"sinks"}),
    sizes=("H", "L", "D"),
    options=("scale", "window", "softcap"),
    required=("scale",),
    buckets=tuple(BUCKETS),
    refuses=lambda spec: refuses_heads(spec) or refuses_size(spec.size("D")) or same_storage(spec, "keys", "values"),
)
ATTEND_PACKED = Operator(
    emit=emit_attend_packed,
    operands={"q": FLOATS, "keys": _BYTES, "values": _BYTES, **_PLACES},
    optional=frozenset({"sinks"}),
    sizes=("H", "L", "D"),
    options=("k_form", "v_form", "scale", "window", "softcap"),
    required=("k_form", "v_form", "scale"),
    buckets=tuple(BUCKETS),
    refuses=refuses_attend_packed,
)
ATTEND_SETTLED = Operator(
    emit=emit_attend_settled,
    operands={"q": FLOATS, "keys": _BYTES, "values": _BYTES, "exact_keys": FLOATS, "exact_values": FLOATS, **_PLACES},
    optional=frozenset({"sinks"}),
    sizes=("H", "L", "D"),
    options=("k_form", "v_form", *POLICY, "scale", "window", "softcap"),
    required=("k_form", "v_form", *POLICY, "scale"),
    buckets=tuple(BUCKETS),
    refuses=refuses_attend_settled,
)
