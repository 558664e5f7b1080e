"""Attention over the paged cache: flash-decode for one token a sequence, tiles of queries otherwise; one body serves both.

A line of a tile is one query head of one token; the heads that share keys stand together (line = token · heads + head), so a group of
heads reads its keys once, and the 16 lines that a matrix instruction wants are filled by heads first.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from qcompile.codegen.triton.cache_tiles import Sum, Tiles, plain_tiles
from qcompile.codegen.triton.contract import (
    FLOATS,
    HALVES,
    TRITON_TYPES,
    Operator,
    integer,
    kernel,
    pointer,
    same_storage,
    stored,
    strides,
)
from qcompile.codegen.triton.source import Lines, constants, function, loop
from qcompile.codegen.triton.tiles import Architecture, attention_keys, attention_warps, decode_splits, power_of_two
from qcompile.ir.lowered import BUCKETS, Kernel, KernelSpec, Launch, Parameter, Workspace

WIDEST_HEAD = 256
WARP_GROUP_LINES = 64
"""What a matrix instruction of a warp group takes; fewer lines are multiplied by each warp for itself."""
LOG2_E = math.log2(math.e)
"""Scores are kept in units of log 2: the hardware's exponential is 2^x."""


def refuses_heads(spec: KernelSpec) -> str | None:
    """Heads that do not share evenly or are too wide, and a window of less than a token."""
    if spec.size("H") % spec.size("L"):
        return f"H={spec.size('H')}: expected a multiple of the L={spec.size('L')} key/value heads"
    if spec.size("D") > WIDEST_HEAD:
        return f"D={spec.size('D')}: expected a head size of at most {WIDEST_HEAD}"
    window = spec.option("window", 0)
    if not isinstance(window, int) or window < 0:
        return f"window={window!r}: expected 0 (none) or a positive number of tokens"
    return None


def refuses_attend(spec: KernelSpec) -> str | None:
    """Also a cache of another type than the queries."""
    return refuses_heads(spec) or same_storage(spec, "q", "keys", "values", "out")


def shape_constants(spec: KernelSpec) -> dict[str, tuple[int | float, str]]:
    """The compile-time numbers of every function of this file."""
    heads, key_heads, size = spec.size("H"), spec.size("L"), spec.size("D")
    return {
        "H": (heads, "query heads"),
        "L": (key_heads, "key/value heads"),
        "SHARED": (heads // key_heads, "query heads that share keys"),
        "D": (size, "numbers of a head"),
        "BLOCK_D": (max(16, power_of_two(size)), "numbers of a head, padded"),
    }


def scored(spec: KernelSpec) -> Lines:
    """Scale and soft-cap of `score`, in units of log 2."""
    scale = float(spec.option("scale"))
    softcap = float(spec.option("softcap", 0.0))
    if not softcap:
        return [f"score *= {scale * LOG2_E}  # scale · log2(e)"]
    # tanh(y) = 1 - 2 / (exp(2y) + 1), with exp(2y) = exp2(2y · log2(e)): no library call, no overflow.
    return [
        f"capped = 1.0 - 2.0 / (tl.exp2(score * {2 * scale / softcap * LOG2_E}) + 1.0)",
        f"score = capped * {softcap * LOG2_E}  # softcap · log2(e)",
    ]


def page_lines(place: str) -> Lines:
    """`slot`, the number of the place in all pages of the token at `place` of its sequence's pages, where `present`."""
    return [
        f"page = tl.load(page_table + batch * pages + {place} // page_tokens, mask=present, other=0).to(tl.int64)",
        f"slot = (page * L + head) * page_tokens + {place} % page_tokens",
    ]


def key_step(spec: KernelSpec, tiles: Tiles) -> Lines:
    """One step over BLOCK_T keys of the pages."""
    return [
        "key = start + tl.arange(0, BLOCK_T)",
        "present = key < last",
        *page_lines("key"),
        *mix_tile(spec, tiles, "present[None, :] & (key[None, :] <= position[:, None])"),
    ]


def mix_tile(spec: KernelSpec, tiles: Tiles, visible: str) -> Lines:
    """Scores of a tile, the running maximum (online softmax, arXiv:2205.14135), and the mix of values.

    `slot` and `present` say where the tokens are, `key` which positions they have, `visible` what each line sees of them but for a window.
    """
    window = int(spec.option("window", 0))
    return [
        *tiles.keys.score,
        *scored(spec),
        f"visible = {visible}",
        *(["visible = visible & (key[None, :] > position[:, None] - WINDOW)"] if window else []),
        'score = tl.where(visible, score, float("-inf"))',
        "higher = tl.maximum(peak, tl.max(score, axis=1))",
        # A line that has seen nothing has a peak of minus infinity, and -inf - -inf is no number.
        'base = tl.where(higher == float("-inf"), 0.0, higher)',
        "weight = tl.exp2(score - base[:, None])",
        "decay = tl.exp2(peak - base)",
        "total = total * decay + tl.sum(weight, axis=1)",
        *tiles.values.mix,
        "peak = higher",
    ]


def key_range(spec: KernelSpec, split: bool, aligned: Lines) -> Lines:
    """`first` and `last` key of this program: what its lines can see, or its share of that; `aligned` changes what is shared."""
    window = int(spec.option("window", 0))
    seen = [
        # Positions are read on the device, so that one recorded graph serves every length.
        "last = tl.minimum(tl.max(position, axis=0) + 1, pages * page_tokens)",
        *(["first = tl.maximum(tl.min(tl.where(position >= 0, position, last), axis=0) - WINDOW + 1, 0)"] if window else ["first = 0"]),
    ]
    if not split:
        return [*seen, *aligned]
    return [
        *seen,
        *aligned,
        "share = (last - first + SPLITS * BLOCK_T - 1) // (SPLITS * BLOCK_T) * BLOCK_T",
        "first = first + tl.program_id(0) * share",
        "last = tl.minimum(first + share, last)",
    ]


def page_walk(spec: KernelSpec, tiles: Tiles, split: bool) -> tuple[Lines, Lines]:
    """Every key that the lines see, or this program's share of them, from the pages: what to prepare, and the loop."""
    return key_range(spec, split, []), loop("for start in range(first, last, BLOCK_T)", key_step(spec, tiles))


Walk = Callable[[KernelSpec, Tiles, bool], tuple[Lines, Lines]]
"""Specification, tiles, whether programs share the length -> what to prepare, and the loops over all keys."""


def attend_body(spec: KernelSpec, tiles: Tiles, numbers: dict[str, tuple[int | float, str]], split: bool, walk: Walk) -> Lines:
    """Lines that leave the sums of values (not yet divided), `peak` and `total` of each line of the tile."""
    first_line = "" if split else "tl.program_id(0) * BLOCK_M + "
    prepare, loops = walk(spec, tiles, split)
    return [
        *constants(numbers),
        "head = tl.program_id(1)",
        "batch = tl.program_id(2).to(tl.int64)",
        f"line = {first_line}tl.arange(0, BLOCK_M)",
        "token = line // SHARED",
        "query_head = head * SHARED + line % SHARED",
        "inside = token < sequence",
        *tiles.channels,
        "position = tl.load(positions + batch * sequence + token, mask=inside, other=-1).to(tl.int32)",
        "query_at = q + batch * q_stride_0 + query_head[:, None].to(tl.int64) * q_stride_1",
        "query_at += token[:, None].to(tl.int64) * q_stride_2",
        *tiles.keys.query,
        *prepare,
        'peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)',
        "total = tl.zeros([BLOCK_M], dtype=tl.float32)",
        *tiles.values.zeros,
        *loops,
        *tiles.values.finish,
    ]


def add_sinks(spec: KernelSpec, peak: str, index: str) -> Lines:
    """`sink` weight of an extra logit that takes weight and gives nothing, and `peak` raised to it (arXiv:2309.17453)."""
    if spec.format("sinks") is None:
        return []
    return [f"sink = tl.load(sinks + {index}).to(tl.float32) * {LOG2_E}  # log2(e)", f"{peak} = tl.maximum({peak}, sink)"]


def store_lines(spec: KernelSpec, sums: tuple[Sum, ...]) -> Lines:
    """Divide what was mixed by the total weight and store it; a line that saw nothing has no weight and gives 0."""
    lines = []
    if spec.format("sinks") is not None:
        lines = [
            "before = peak",
            *add_sinks(spec, "peak", "query_head"),
            *(f"{mixed.name} = {mixed.name} * tl.exp2(before - peak)[:, None]" for mixed in sums),
            "total = total * tl.exp2(before - peak) + tl.exp2(sink - peak)",
        ]
    return [
        *lines,
        *(f"{mixed.name} = {mixed.name} / tl.where(total > 0.0, total, 1.0)[:, None]" for mixed in sums),
        "out_at = out + batch * out_stride_0 + query_head[:, None].to(tl.int64) * out_stride_1",
        "out_at += token[:, None].to(tl.int64) * out_stride_2",
        *store_sums("out_at", sums, f".to({TRITON_TYPES[stored(spec, 'out')]})"),
    ]


def store_sums(rows: str, sums: tuple[Sum, ...], suffix: str = "") -> Lines:
    """Store each sum in the rows [BLOCK_M, 1] that begin at the pointers `rows`."""
    return [f"tl.store({rows} + {mixed.columns}, {mixed.name}{suffix}, mask={mixed.mask('inside')})" for mixed in sums]


def emit_prefill(spec: KernelSpec, arch: Architecture, tiles: Tiles, walk: Walk = page_walk) -> Kernel:
    """One launch: each program takes a tile of lines of one key/value head and everything they can see."""
    numbers = {**shape_constants(spec), **step_constants(spec, tiles, tiles.lines)}
    pointers = [*inputs(spec), *sink_pointer(spec), *output(spec)]
    parameters = [*pointers, *run_time(spec, tiles), *strides("out", (0, 1, 2), "out", alignment(spec))]
    doc = "One program: BLOCK_M lines (query heads of consecutive tokens) of one key/value head over every key they can see."
    lines = ("ceildiv", ("mul", "sequence", spec.size("H") // spec.size("L")), tiles.lines)
    warps = attention_warps(spec.size("D"), arch)
    launch = Launch(spec.operator, (lines, spec.size("L"), "batch"), tuple(parameters), (), warps, stages(spec, arch))
    body = [*attend_body(spec, tiles, numbers, False, walk), *store_lines(spec, tiles.values.sums)]
    main = function(spec.operator, [p.name for p in parameters], doc, body)
    return kernel(spec, arch, [main], [launch], expects=(arch.matrix if tiles.lines >= WARP_GROUP_LINES else "mma",))


def emit_decode(spec: KernelSpec, arch: Architecture, tiles: Tiles, walk: Walk = page_walk) -> Kernel:
    """Two launches over a fixed grid: every program mixes its share of the length, then the shares are put together in order."""
    splits = decode_splits(spec.size("L"), arch)
    heads, size = spec.size("H"), spec.size("D")
    lines = max(16, power_of_two(heads // spec.size("L")))
    numbers = {**shape_constants(spec), **step_constants(spec, tiles, lines), "SPLITS": (splits, "shares of the length")}
    store = [
        "share_at = (batch * H + query_head) * SPLITS + tl.program_id(0)",
        "tl.store(peaks + share_at, peak, mask=inside)",
        "tl.store(totals + share_at, total, mask=inside)",
        *store_sums("partial + share_at[:, None] * D", tiles.values.sums),
    ]
    work = [pointer(name, "fp32") for name in ("partial", "peaks", "totals")]
    parameters = [*inputs(spec), *work, *run_time(spec, tiles)]
    doc = "One program: the heads of one key/value head of one sequence over its share of the length, read from positions."
    main = function(spec.operator, [p.name for p in parameters], doc, [*attend_body(spec, tiles, numbers, True, walk), *store])
    merge = [*work, *sink_pointer(spec), *output(spec), *strides("out", (0, 1), "out", alignment(spec))]
    shares = ("mul", "batch", heads * splits * 4)
    return kernel(
        spec,
        arch,
        [main, merge_function(spec, splits, [p.name for p in merge])],
        [
            Launch(spec.operator, (splits, spec.size("L"), "batch"), tuple(parameters), (), 8 if lines >= 64 else 4, stages(spec, arch)),
            Launch("merge_shares", (heads, "batch", 1), tuple(merge)),
        ],
        [Workspace("partial", ("mul", shares, size)), Workspace("peaks", shares), Workspace("totals", shares)],
        expects=(arch.matrix if lines >= WARP_GROUP_LINES else "mma",),
    )


def merge_function(spec: KernelSpec, splits: int, names: list[str]) -> Lines:
    """The shares of one head, weighted by their peaks; a head that saw nothing gives 0."""
    shapes = shape_constants(spec)
    body = [
        *constants({**{name: shapes[name] for name in ("H", "D", "BLOCK_D")}, "SPLITS": (splits, "shares of the length")}),
        "head = tl.program_id(0)",
        "batch = tl.program_id(1).to(tl.int64)",
        "dim = tl.arange(0, BLOCK_D)",
        "share = (batch * H + head) * SPLITS + tl.arange(0, SPLITS)",
        "peak = tl.load(peaks + share)",
        "highest = tl.max(peak, axis=0)",
        *add_sinks(spec, "highest", "head"),
        'base = tl.where(highest == float("-inf"), 0.0, highest)',
        "weight = tl.exp2(peak - base)",
        f"total = tl.sum(weight * tl.load(totals + share), axis=0){' + tl.exp2(sink - base)' if spec.format('sinks') else ''}",
        "mixed = tl.load(partial + share[:, None] * D + dim[None, :], mask=(dim < D)[None, :], other=0.0)",
        "result = tl.sum(mixed * weight[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)",
        f"tl.store(out + batch * out_stride_0 + head * out_stride_1 + dim, result.to({TRITON_TYPES[stored(spec, 'out')]}), mask=dim < D)",
    ]
    return function("merge_shares", names, "One program puts the shares of one query head together.", body)


def step_constants(spec: KernelSpec, tiles: Tiles, lines: int) -> dict[str, tuple[int | float, str]]:
    """The tile of the loop over keys."""
    window = int(spec.option("window", 0))
    return {
        "BLOCK_M": (lines, "lines of a program"),
        "BLOCK_T": (tiles.step, "keys of a step"),
        **({"WINDOW": (window, "latest keys that a query sees")} if window else {}),
    }


def stages(spec: KernelSpec, arch: Architecture) -> int:
    """Keys and values in flight: three steps, two where a wide head would fill shared memory."""
    return 2 if power_of_two(spec.size("D")) > 128 or arch.name == "sm89" else 3


def alignment(spec: KernelSpec) -> int:
    """What may be assumed of strides and of views of a fused matrix: all are multiples of the head size."""
    return 16 if spec.size("D") % 16 == 0 else 1


CACHED = ("keys", "values", "k_tables_0", "v_tables_0", "exact_keys", "exact_values")
"""What keys and values are read from and by, where it is there."""


def inputs(spec: KernelSpec) -> list[Parameter]:
    """Queries, cache, page table and positions."""
    return [
        pointer("q", stored(spec, "q"), alignment(spec)),
        *(pointer(name, stored(spec, name)) for name in CACHED if spec.format(name)),
        pointer("page_table", "i32"),
        pointer("positions", "i64"),
    ]


def sink_pointer(spec: KernelSpec) -> list[Parameter]:
    """The extra logits, where there are any."""
    kind = spec.format("sinks")
    return [] if kind is None else [pointer("sinks", kind)]


def output(spec: KernelSpec) -> list[Parameter]:
    """The result, with strides of its own: its memory is [B, S, H, D]."""
    return [pointer("out", stored(spec, "out"), alignment(spec))]


def run_time(spec: KernelSpec, tiles: Tiles) -> list[Parameter]:
    """Sizes and strides known at the launch."""
    page_tokens = integer("page_tokens", divisible_by=tiles.together)
    return [integer("sequence"), integer("pages"), page_tokens, *strides("q", (0, 1, 2), "q", alignment(spec))]


def emit_attend(spec: KernelSpec, arch: Architecture) -> Kernel:
    """The kernel of the bucket: `m1` is one token of each sequence."""
    tiles = plain_tiles(TRITON_TYPES[stored(spec, "q")], attention_keys(spec.size("D"), arch))
    return emit_decode(spec, arch, tiles) if spec.bucket == "m1" else emit_prefill(spec, arch, tiles)


ATTEND = Operator(
    emit=emit_attend,
    operands={"q": HALVES, "keys": HALVES, "values": HALVES, "page_table": ("i32",), "positions": ("i64",), "sinks": FLOATS, "out": HALVES},
    optional=frozenset({"sinks"}),
    sizes=("D", "H", "L"),
    options=("scale", "window", "softcap"),
    required=("scale",),
    buckets=("", *BUCKETS),
    refuses=refuses_attend,
)
