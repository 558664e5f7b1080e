"""Packing the tokens whose time has come into their pages, once (`qcompile.ir.retention_ops.settle`).

Numbers that share a scale stand along the last axis of a tile, tokens of a channel or channels of a token: extremes are reductions over
it, and codes that share a byte stand side by side. Sorted channels are loaded in the order in which they are packed.
"""

from __future__ import annotations

from qcompile.codegen.triton.block_vectors import BlockVectors, order_line
from qcompile.codegen.triton.contract import HALVES, Operator, integer, kernel, pointer, stored
from qcompile.codegen.triton.pack import round_numbers
from qcompile.codegen.triton.packed_forms import PACKED, refuses_tables
from qcompile.codegen.triton.retained import POLICY, policy_constants, policy_of, refuses_policy, scan_constants, sequence_range, settled
from qcompile.codegen.triton.settled_form import SettledForm, refuses_form, settled_form
from qcompile.codegen.triton.source import Lines, constants, function, loop
from qcompile.codegen.triton.tiles import Architecture, power_of_two
from qcompile.ir.lowered import Kernel, KernelSpec, Launch, Parameter, item_operand

NUMBERS = 2048
"""Of a program's tile: sixteen for each thread."""
HALVES_AT = "(cell + BODY).to(tl.pointer_type(tl.float16))"
"""The scales, and least values, of the bytes at `cell`."""
ORDER = item_operand("tables", 0)
"""The table that the kernel takes: the order of channels."""
MOST_TOKENS = 32
"""Of a program: each is compared with the positions of the call."""


def form_of(spec: KernelSpec) -> SettledForm:
    """The format that tokens settle in."""
    return settled_form(spec.option("form"), spec.size("D"))


def per_channel(form: SettledForm) -> bool:
    """Whether tokens of one channel share a scale."""
    return form.form.tokens > 1


def tokens_of(spec: KernelSpec) -> int:
    """Tokens of a program: those that are packed together, or as many as fit."""
    form = form_of(spec)
    return form.form.tokens if per_channel(form) else max(1, min(MOST_TOKENS, NUMBERS // power_of_two(form.share)))


def channels_of(spec: KernelSpec) -> int:
    """Channels of a program, padded: a group of a token's, or as many whole columns of tokens as fit."""
    form = form_of(spec)
    return min(power_of_two(form.size), max(1, NUMBERS // form.share)) if per_channel(form) else power_of_two(form.share)


def parts_of(spec: KernelSpec) -> int:
    """Programs that a head's channels are dealt to."""
    form = form_of(spec)
    return -(-form.size // (channels_of(spec) if per_channel(form) else form.share))


def place_lines() -> Lines:
    """`place`: where each of the tokens `slot` [BLOCK_T] stands in `exact`: among the rows, or behind them at its own position."""
    step = [
        "at = begin + tl.arange(0, POSITIONS)",
        "seen = tl.load(positions + batch * sequence + at, mask=at < sequence, other=-1).to(tl.int32)",
        "place += tl.sum(tl.where(seen[None, :] == (slot + FIRST)[:, None], ROWS + at[None, :], 0), axis=1)",
    ]
    return [
        "place = tl.where(slot + FIRST < held, FIRST + slot % TURNING, 0)",
        *loop("for begin in range(0, sequence, POSITIONS)", step),
    ]


def grouped_lines(form: SettledForm) -> Lines:
    """`grouped` float32 [BLOCK_C, BLOCK_T] per channel, [BLOCK_T, BLOCK_C] per token, and which of them are `inside`."""
    channel, token = ("[:, None]", "[None, :]") if per_channel(form) else ("[None, :]", "[:, None]")
    ordered = bool(form.form.tables)
    place = "source_channel" if ordered else "channel"
    return [
        "channel = part * CHANNELS + tl.arange(0, BLOCK_C)",
        "there = (tl.arange(0, BLOCK_C) < CHANNELS) & (channel < D)",
        *([order_line(place, ORDER, "channel", "there")] if ordered else []),
        f"inside = there{channel} & (slot < stop){token}",
        f"source = exact + ((batch * L + head) * (ROWS + sequence) + place{token}) * D + {place}{channel}",
        "grouped = tl.load(source, mask=inside, other=0.0).to(tl.float32)",
    ]


def item_lines(form: SettledForm) -> Lines:
    """`items` uint8: codes of tokens of a channel, or of channels of a token, as many as a byte takes."""
    if form.per_byte == 1:
        return ["items = codes.to(tl.uint8)"]
    rows, columns = ("BLOCK_C", "BLOCK_T") if per_channel(form) else ("BLOCK_T", "BLOCK_C")
    return [
        "shift = tl.arange(0, PER) * BITS",
        f"codes = tl.reshape(codes, [{rows}, {columns} // PER, PER])",
        "items = tl.sum(codes << shift[None, None, :], axis=2).to(tl.uint8)",
    ]


def store_lines(form: SettledForm) -> Lines:
    """Codes, and what gives them their size, into the page of each token (one page for tokens that lie together)."""
    if isinstance(form, BlockVectors):
        return [*token_stores(), "tl.store(cell + BODY + part, exponent.to(tl.uint8), mask=real)"]
    least = [] if form.form.symmetric else ["tl.store(half + GROUPS, least, mask=written)"]
    places = channel_stores() if form.per_channel else [*token_stores(), f"half = {HALVES_AT} + part", "written = real"]
    return [*places, "tl.store(half, scale, mask=written)", *least]


def channel_stores() -> Lines:
    """Codes of tokens of a channel; `half`, the pointers to the scales of channels, and which are `written`."""
    return [
        "real = begin_slot // page_tokens < pages",
        "page = tl.load(page_table + batch * pages + begin_slot // page_tokens, mask=real, other=0).to(tl.int64)",
        "cell = cells + ((page * L + head) * page_tokens + begin_slot % page_tokens) * BYTES",
        "byte = tl.arange(0, BLOCK_T // PER)[None, :]",
        "tl.store(cell + channel[:, None] * (BLOCK_T // PER) + byte, items, mask=there[:, None] & real)",
        f"half = {HALVES_AT} + channel",
        "written = there & real",
    ]


def token_stores() -> Lines:
    """Codes of channels of a token; `cell`, the pointers to the tokens' bytes, and which tokens are `real`."""
    return [
        "real = (slot < stop) & (slot // page_tokens < pages)",
        "page = tl.load(page_table + batch * pages + slot // page_tokens, mask=real, other=0).to(tl.int64)",
        "cell = cells + ((page * L + head) * page_tokens + slot % page_tokens) * BYTES",
        "byte = tl.arange(0, BLOCK_C // PER)[None, :]",
        "first_byte = part * (CHANNELS // PER)",
        "tl.store(cell[:, None] + first_byte + byte, items, mask=real[:, None] & (byte < (CHANNELS + PER - 1) // PER))",
    ]


def form_constants(form: SettledForm) -> dict[str, tuple[int | float, str]]:
    """Those of a vector's bytes."""
    if isinstance(form, BlockVectors):
        return {"BYTES": (form.width, "bytes of a packed token"), "BODY": (form.body, "bytes of codes before the powers")}
    return form.constants()


def settle_constants(spec: KernelSpec) -> dict[str, tuple[int | float, str]]:
    """The compile-time numbers of the kernel."""
    form = form_of(spec)
    return {
        "L": (spec.size("L"), "key/value heads"),
        "D": (spec.size("D"), "numbers of a head"),
        "PARTS": (parts_of(spec), "programs that share a head's channels"),
        "CHANNELS": (channels_of(spec) if per_channel(form) else form.share, "channels of a program"),
        "BLOCK_C": (channels_of(spec), "channels, padded"),
        "BLOCK_T": (tokens_of(spec), "tokens of a program"),
        **form_constants(form),
        "BITS": (form.bits, "bits of a code"),
        "PER": (form.per_byte, "codes in a byte"),
        **policy_constants(policy_of(spec)),
        **scan_constants(),
    }


def emit_settle(spec: KernelSpec, arch: Architecture) -> Kernel:
    """Pack tokens of exact [B, L, N + S, D] that settle in this call into pages [P, L, R, W]."""
    form, policy = form_of(spec), policy_of(spec)
    pack = [
        "slot = begin_slot + tl.arange(0, BLOCK_T)",
        *place_lines(),
        *grouped_lines(form),
        *round_numbers(form.form),
        *item_lines(form),
        *store_lines(form),
    ]
    body = [
        *constants(settle_constants(spec)),
        "head = tl.program_id(1) // PARTS",
        "part = tl.program_id(1) % PARTS",
        "batch = tl.program_id(2).to(tl.int64)",
        *sequence_range(),
        "# Slots are counted over a sequence's pages: the token at position FIRST has the first one.",
        f"begin_slot = {settled('held')} - FIRST + tl.program_id(0) * BLOCK_T",
        f"stop = {settled('length')} - FIRST",
        *loop("if begin_slot < stop", pack),
    ]
    parameters = settle_parameters(spec)
    # So many tokens settle at most, whatever the sequence held before.
    most = ("mul", ("ceildiv", "sequence", policy.group), policy.group)
    grid = (("ceildiv", most, tokens_of(spec)), spec.size("L") * parts_of(spec), "batch")
    doc = "One program packs BLOCK_T tokens of one head, some of their channels, if so many settle by the end of the call."
    functions = [function(spec.operator, [p.name for p in parameters], doc, body)]
    return kernel(spec, arch, functions, [Launch(spec.operator, grid, parameters)])


def settle_parameters(spec: KernelSpec) -> tuple[Parameter, ...]:
    """Pages, tokens, where they are; a page holds whole groups of tokens."""
    return (
        pointer("cells", "u8", value="pages"),
        pointer("exact", stored(spec, "exact")),
        *([pointer(ORDER, "u8")] if spec.format(ORDER) else []),
        pointer("page_table", "i32"),
        pointer("positions", "i64"),
        integer("sequence"),
        integer("pages"),
        integer("page_tokens", divisible_by=form_of(spec).form.tokens),
    )


def refuses_settle(spec: KernelSpec) -> str | None:
    """A format or a policy that the kernel does not know, and groups of tokens that do not settle together."""
    reason = refuses_form("form", spec.option("form"), spec.size("D")) or refuses_policy(spec)
    reason = reason or refuses_tables(spec, [(ORDER, form_of(spec))])
    if reason is None and policy_of(spec).group % form_of(spec).form.tokens:
        return f"group={spec.option('group')}: expected a multiple of the {form_of(spec).form.tokens} tokens that are packed together"
    return reason


SETTLE = Operator(
    emit=emit_settle,
    operands={"pages": PACKED, "exact": HALVES, ORDER: PACKED, "page_table": ("i32",), "positions": ("i64",)},
    optional=frozenset({ORDER}),
    sizes=("D", "L"),
    options=("form", *POLICY),
    required=("form", *POLICY),
    refuses=refuses_settle,
)
