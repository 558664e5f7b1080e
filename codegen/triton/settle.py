"""Packing the tokens whose time has come into their pages, once (`qcompile.ir.retention_ops.settle`).

Numbers that share a scale stand along the last two axes of a tile [shares, bytes, codes in a byte], so that extremes are reductions and
a byte is a sum over the last axis: tokens of a channel, or channels of a token.
"""

from __future__ import annotations

from qcompile.codegen.triton.contract import HALVES, Operator, integer, kernel, pointer, stored
from qcompile.codegen.triton.quantize import round_lines
from qcompile.codegen.triton.retained import POLICY, policy_constants, policy_of, refuses_policy, scan_constants, sequence_range, settled
from qcompile.codegen.triton.settled_form import Packed, packed, refuses_form
from qcompile.codegen.triton.source import Lines, constants, function, loop
from qcompile.codegen.triton.tiles import Architecture, power_of_two
from qcompile.ir.lowered import Kernel, KernelSpec, Launch, Parameter

NUMBERS = 2048
"""Of a program's tile: sixteen for each thread."""
MOST_TOKENS = 32
"""Of a program: each is compared with the positions of the call."""
HALF_TINY = 2.0**-14
"""The least normal float16: no scale is smaller."""


def form_of(spec: KernelSpec) -> Packed:
    """The format that tokens settle in."""
    return packed(spec.option("form"), spec.size("D"))


def tokens_of(spec: KernelSpec) -> int:
    """Tokens of a program: those that are packed together, or as many as fit."""
    form = form_of(spec)
    return form.form.tokens if form.per_channel else max(1, min(MOST_TOKENS, NUMBERS // power_of_two(form.group)))


def channels_of(spec: KernelSpec) -> int:
    """Channels of a program, padded: a group of a token's, or as many whole columns of tokens as fit."""
    form = form_of(spec)
    return min(power_of_two(form.size), max(1, NUMBERS // form.group)) if form.per_channel else power_of_two(form.group)


def parts_of(spec: KernelSpec) -> int:
    """Programs that a head's channels are dealt to."""
    form = form_of(spec)
    return -(-form.size // channels_of(spec)) if form.per_channel else form.groups


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


def numbers_lines(form: Packed) -> Lines:
    """`numbers` [shares, bytes, codes in a byte] float32 and which of them are `present`."""
    cut = ("BLOCK_T // PER", "PER") if form.per_channel else ("BLOCK_C // PER", "PER")
    along = f"tl.reshape({{0}}, [1, {cut[0]}, {cut[1]}])"
    lines = ["channel = part * CHANNELS + tl.arange(0, BLOCK_C)", "inside = (tl.arange(0, BLOCK_C) < CHANNELS) & (channel < D)"]
    if form.per_channel:
        lines += [f"token = {along.format('place')}", "dim = channel[:, None, None]", "present = inside[:, None, None]"]
    else:
        lines += [
            "token = place[:, None, None]",
            f"dim = {along.format('channel')}",
            f"present = (slot < stop)[:, None, None] & ({along.format('channel')} < (part + 1) * CHANNELS)",
        ]
    return [
        *lines,
        "source = exact + ((batch * L + head) * (ROWS + sequence) + token) * D + dim",
        "numbers = tl.load(source, mask=present, other=0.0).to(tl.float32)",
    ]


def encode_lines(form: Packed) -> Lines:
    """`items` uint8 [shares, bytes] and `scale`, `least` float16 [shares], as `VectorFormat.encode` rounds them."""
    element = form.form.element
    if form.form.symmetric:
        scale = f"tl.div_rn(tl.max(tl.max(tl.abs(numbers), axis=2), axis=1), {float(element.high)})"
        ends, scaled, low, high, zero = [], "numbers", element.low, element.high, f" + {-element.low}"
    else:
        ends = [
            'greatest = tl.max(tl.max(tl.where(present, numbers, float("-inf")), axis=2), axis=1)',
            'least = tl.min(tl.min(tl.where(present, numbers, float("inf")), axis=2), axis=1).to(tl.float16)',
        ]
        scale = f"tl.div_rn(greatest - least.to(tl.float32), {float(element.levels - 1)})"
        scaled, low, high, zero = "numbers - least.to(tl.float32)[:, None, None]", 0, element.levels - 1, ""
    return [
        *ends,
        f"scale = tl.maximum({scale}, {HALF_TINY!r}).to(tl.float16)",
        *round_lines("codes", f"tl.div_rn({scaled}, scale.to(tl.float32)[:, None, None])", low, high),
        f"codes = tl.where(present, codes{zero}, 0)",
        "items = tl.sum(codes << (tl.arange(0, PER) * BITS)[None, None, :], axis=2).to(tl.uint8)",
    ]


def store_lines(form: Packed) -> Lines:
    """Codes, scales and least values into the page of each token (one page for tokens that lie together)."""
    if form.per_channel:
        lines = [
            "first_slot = begin_slot",
            "real = first_slot // page_tokens < pages",
            "page = tl.load(page_table + batch * pages + first_slot // page_tokens, mask=real, other=0).to(tl.int64)",
            "cell = cells + ((page * L + head) * page_tokens + first_slot % page_tokens) * BYTES",
            "byte = tl.arange(0, BLOCK_T // PER)[None, :]",
            "tl.store(cell + channel[:, None] * (BLOCK_T // PER) + byte, items, mask=inside[:, None] & real)",
            "half = (cell + BODY).to(tl.pointer_type(tl.float16)) + channel",
            "written = inside & real",
        ]
    else:
        lines = [
            "real = (slot < stop) & (slot // page_tokens < pages)",
            "page = tl.load(page_table + batch * pages + slot // page_tokens, mask=real, other=0).to(tl.int64)",
            "cell = cells + ((page * L + head) * page_tokens + slot % page_tokens) * BYTES",
            "byte = tl.arange(0, BLOCK_C // PER)[None, :]",
            "first_byte = part * (CHANNELS // PER)",
            "tl.store(cell[:, None] + first_byte + byte, items, mask=real[:, None] & (byte < CHANNELS // PER))",
            "half = (cell + BODY).to(tl.pointer_type(tl.float16)) + part",
            "written = real",
        ]
    least = [] if form.form.symmetric else ["tl.store(half + GROUPS, least, mask=written)"]
    return [*lines, "tl.store(half, scale, mask=written)", *least]


def settle_constants(spec: KernelSpec) -> dict[str, tuple[int | float, str]]:
    """The compile-time numbers of the kernel."""
    form = form_of(spec)
    return {
        "L": (spec.size("L"), "key/value heads"),
        "D": (spec.size("D"), "numbers of a head"),
        "PARTS": (parts_of(spec), "programs that share a head's channels"),
        "CHANNELS": (form.group if not form.per_channel else channels_of(spec), "channels of a program"),
        "BLOCK_C": (channels_of(spec), "channels, padded"),
        "BLOCK_T": (tokens_of(spec), "tokens of a program"),
        **form.constants(),
        **policy_constants(policy_of(spec)),
        **scan_constants(),
    }


def emit_settle(spec: KernelSpec, arch: Architecture) -> Kernel:
    """Pack tokens of exact [B, L, N + S, D] that settle in this call into pages [P, L, R, W]."""
    form, policy = form_of(spec), policy_of(spec)
    pack = [
        "slot = begin_slot + tl.arange(0, BLOCK_T)",
        *place_lines(),
        *numbers_lines(form),
        *encode_lines(form),
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
        pointer("page_table", "i32"),
        pointer("positions", "i64"),
        integer("sequence"),
        integer("pages"),
        integer("page_tokens", divisible_by=form_of(spec).form.tokens),
    )


def refuses_settle(spec: KernelSpec) -> str | None:
    """A format or a policy that the kernel does not know, and groups of tokens that do not settle together."""
    reason = refuses_form("form", spec.option("form"), spec.size("D")) or refuses_policy(spec)
    if reason is None and policy_of(spec).group % form_of(spec).form.tokens:
        return f"group={spec.option('group')}: expected a multiple of the {form_of(spec).form.tokens} tokens that are packed together"
    return reason


SETTLE = Operator(
    emit=emit_settle,
    operands={"pages": ("uint8",), "exact": HALVES, "page_table": ("i32",), "positions": ("i64",)},
    sizes=("D", "L"),
    options=("form", *POLICY),
    required=("form", *POLICY),
    refuses=refuses_settle,
)
