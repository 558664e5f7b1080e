"""The paged cache in floats: tokens stored, and attention over them."""

from __future__ import annotations

from qcompile.codegen.contract import same_storage
from qcompile.codegen.cpp.contract import Operator, kernel, type_of
from qcompile.codegen.cpp.norm import every_row
from qcompile.codegen.cpp.source import Lines, block, constants, number
from qcompile.ir.lowered import BUCKETS, Kernel, KernelSpec

STRETCH = 64
"""Keys whose scores are computed before they are weighed: their sums of weights and values join what came before."""


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


def _scores(spec: KernelSpec) -> Lines:
    """`scores` of a stretch of keys, those behind its end minus infinity, and `peak`, the greatest so far."""
    softcap = float(spec.option("softcap", 0.0))
    score = f"sum(products) * {number(spec.option('scale'))}"
    capped = f"{number(softcap)} * std::tanh({score} / {number(softcap)})" if softcap else score
    kind = type_of(spec, "keys")
    return [
        "float scores[stretch];",
        "std::fill(scores, scores + stretch, -INFINITY);",
        *block(
            "for (int64_t place = 0; place < count; place++)",
            [
                "const int64_t at = first + place;",
                "const int64_t page = *page_table.at<int32_t>(batch, at / page_tokens);",
                f"const {kind}* key = keys.at<{kind}>(page, head / group, at % page_tokens);",
                "Floats products{};",
                *_dims(["products = fma(load(query + dim), load(key + dim, size), products);"]),
                f"scores[place] = {capped};",
            ],
        ),
        "Floats highest = load(scores);",
        "for (int64_t place = LANES; place < stretch; place += LANES) highest = largest(highest, load(scores + place));",
        "const float next = std::max(peak, largest(highest));",
    ]


def _dims(lines: Lines) -> Lines:
    """The lines for every vector of a head: `dim` is where it begins, `size` how much of it there is."""
    return block("for (int64_t dim = 0; dim < dims; dim += LANES)", ["const int64_t size = std::min<int64_t>(LANES, dims - dim);", *lines])


def _weigh(spec: KernelSpec) -> Lines:
    """The stretch's values join `mixed` by their weights, these join `total`; what was there shrinks as the peak grows."""
    kind = type_of(spec, "values")
    return [
        "const float shrink = std::exp(peak - next);",
        "peak = next;",
        "total *= shrink;",
        "for (int64_t part = 0; part < vectors; part++) mixed[part] *= shrink;",
        *block(
            "for (int64_t place = 0; place < stretch; place += LANES)",
            ["store(scores + place, exp(load(scores + place) - splat(peak)));", "total += sum(load(scores + place));"],
        ),
        *block(
            "for (int64_t place = 0; place < count; place++)",
            [
                "const int64_t at = first + place;",
                "const int64_t page = *page_table.at<int32_t>(batch, at / page_tokens);",
                f"const {kind}* value = values.at<{kind}>(page, head / group, at % page_tokens);",
                *_dims(["mixed[dim / LANES] = fma(splat(scores[place]), load(value + dim, size), mixed[dim / LANES]);"]),
            ],
        ),
    ]


def emit_attend(spec: KernelSpec) -> Kernel:
    """Attention of q [B, H, S, D] over what is stored; a thread takes heads of tokens, and each reads its keys in order."""
    window = int(spec.option("window", 0))
    least = f"std::max<int64_t>(0, position + 1 - {window})" if window else "0"
    sinks = spec.format("sinks") is not None
    # With an extra logit its weight of 1 is there before any key's.
    start = ["float peak = *sinks.at<float>(head), total = 1.0f;"] if sinks else ["float peak = -INFINITY, total = 0.0f;"]
    body = [
        *constants(
            {
                "heads": (spec.size("H"), "of queries"),
                "group": (spec.size("H") // spec.size("L"), "heads that share keys and values"),
                "dims": (spec.size("D"), "of a head"),
                "stretch": (STRETCH, "keys that are weighed at once"),
            }
        ),
        "constexpr int64_t vectors = (dims + LANES - 1) / LANES;",
        "const int64_t tokens = q.size[2], page_tokens = keys.size[2];",
        *every_row(
            [
                "const int64_t batch = row / heads / tokens, head = row / tokens % heads, token = row % tokens;",
                "const int64_t position = *positions.at<int64_t>(batch, token);",
                "float query[vectors * LANES] = {};",
                "std::memcpy(query, q.at<float>(batch, head, token), dims * sizeof(float));",
                "Floats mixed[vectors] = {};",
                *start,
                *block(
                    f"for (int64_t first = {least}; first <= position; first += stretch)",
                    ["const int64_t count = std::min(stretch, position + 1 - first);", *_scores(spec), *_weigh(spec)],
                ),
                "float* to = out.at<float>(batch, head, token);",
                "const Floats share = splat(total > 0.0f ? 1.0f / total : 0.0f);",
                *_dims(["store(to + dim, mixed[dim / LANES] * share, size);"]),
            ],
            "q.size[0] * heads * tokens",
        ),
    ]
    return kernel(_any_bucket(spec), ATTEND.present(spec), body)


def _any_bucket(spec: KernelSpec) -> KernelSpec:
    """One kernel serves every number of queries."""
    return KernelSpec(spec.operator, spec.sizes, spec.formats, spec.options)


def refuses_cache(spec: KernelSpec) -> str | None:
    """Keys and values of different types, heads that do not divide, bytes that do not come as bytes."""
    if spec.operator == "cache_attend" and spec.size("H") % spec.size("L"):
        return f"H={spec.size('H')}, L={spec.size('L')}: expected whole groups of query heads"
    wanted = "uint8" if _is_packed(spec) else "fp32"
    wrong = [name for name in ("k", "v") if spec.operator == "cache_append_" and spec.format(name) != wanted]
    if wrong:
        return f"{wrong[0]} is {spec.format(wrong[0])}: expected {wanted} for keys of {spec.format('keys')}"
    return same_storage(spec, "keys", "values")


def _is_packed(spec: KernelSpec) -> bool:
    return spec.format("keys") == "uint8"


_FLOAT, _STORED = ("fp32",), ("fp32", "fp16", "bf16")
APPEND = Operator(
    emit=emit_append,
    operands={
        "keys": (*_STORED, "uint8"), "values": (*_STORED, "uint8"), "k": (*_FLOAT, "uint8"), "v": (*_FLOAT, "uint8"),
        "page_table": ("i32",), "positions": ("i64",),
    },
    sizes=("L", "D"),
    refuses=refuses_cache,
)  # fmt: skip
ATTEND = Operator(
    emit=emit_attend,
    operands={
        "q": _FLOAT, "keys": _STORED, "values": _STORED, "page_table": ("i32",), "positions": ("i64",), "sinks": _FLOAT, "out": _FLOAT,
    },
    optional=frozenset({"sinks"}),
    sizes=("H", "L", "D"),
    options=("scale", "window", "softcap"),
    required=("scale",),
    buckets=tuple(BUCKETS),
    refuses=refuses_cache,
)  # fmt: skip
