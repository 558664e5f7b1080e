"""How a cache is cut into pages and rows, in tokens and in bytes, before anything is allocated."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from qcompile.errors import CapacityError
from qcompile.ir.allowed import ALLOWED
from qcompile.ir.lowered import Buffer, Entry, Step
from qcompile.ir.memory import buffers_in, dtype_of, root_of
from qcompile.ir.size import evaluate
from qcompile.quant.retention import Retention

POOL_PAGE_TOKENS = 128
"""Tokens of a page where sequences share the bytes and nobody said otherwise: half a page is lost per sequence, little of any context."""
INDEX_BYTES = 4
"""Bytes of an entry of the page tables, int32, and of the list of slots."""
_GROWING = ("recent_saliency_",)
"""What the names of buffers begin with whose rows every later token adds to."""
_FORMS = ("form", "k_form", "v_form")
_POLICY = ("first", "recent", "group")


def state_buffers(entry: Entry) -> list[Buffer]:
    """The cache buffers of an entry, in the order of its inputs: pages [P, L, R, D], and rows of sequences [C, L, N, D]."""
    return [entry.buffers[name] for name in entry.inputs if entry.buffers[name].kind == "state"]


def policies_of(entry: Entry) -> dict[str, Retention]:
    """Which tokens lie in which of an entry's cache buffers, by name; what no step settles, retains or ranks holds all as they come."""
    found = {state.name: Retention() for state in state_buffers(entry)}
    for step in entry.steps:
        given = arguments_of(step)
        if all(name in given for name in _POLICY):
            touched = {root_of(entry, name) for name in buffers_in(list(step.args))} & found.keys()
            found |= dict.fromkeys(touched, Retention(*(given[part] for part in _POLICY)))
    return found


def arguments_of(step: Step) -> dict[str, Any]:
    """Argument -> value by the names of the operator's schema."""
    schema = getattr(ALLOWED[step.operator], "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    return dict(zip(names, step.args, strict=False)) | step.kwargs


def describe(entry: Entry) -> str:
    """How an entry's cache stores tokens, in words, with a hash that tells layouts apart which these words do not."""
    states, policies = state_buffers(entry), policies_of(entry)
    given = [arguments_of(step) for step in entry.steps]
    forms = [str(options[name]) for options in given for name in _FORMS if name in options]
    kept = [policy for policy in policies.values() if policy.rows]
    exact = {state.dtype for state in states if not is_paged(state)}
    words = ", ".join(dict.fromkeys(forms or [state.dtype for state in states]))
    words += "".join(
        f", {policy.first} first and {policy.recent} recent tokens in {'/'.join(sorted(exact))}" for policy in dict.fromkeys(kept)
    )
    details = repr(([(state.name, state.dtype, state.shape, policies[state.name]) for state in states], forms))
    return f"{words} ({hashlib.sha256(details.encode()).hexdigest()[:6]})"


def is_paged(state: Buffer) -> bool:
    """Whether it holds pages; else it holds rows of each sequence."""
    return state.shape[0] == "pages"


def bytes_of(states: Iterable[Buffer], sizes: Mapping[str, int]) -> int:
    """Bytes of cache buffers where the names in their shapes stand for `sizes`."""
    return sum(math.prod(evaluate(size, sizes) for size in state.shape) * dtype_of(state.dtype).itemsize for state in states)


@dataclass(frozen=True)
class CacheLayout:
    """The sizes of a cache.

    Attributes:
        states: its buffers (`state_buffers`).
        policies: buffer name -> which tokens lie in it (`policies_of`); a buffer that is not named holds them all.
        max_batch: rows.
        capacity: the most tokens of a row.
        page_tokens: R.
        pages: P, shared by all rows.
    """

    states: tuple[Buffer, ...]
    policies: Mapping[str, Retention] = field(default_factory=dict)
    max_batch: int = 1
    capacity: int = 0
    page_tokens: int = 1
    pages: int = 0

    def policy(self, state: Buffer) -> Retention:
        """Which tokens lie in a buffer."""
        return self.policies.get(state.name, Retention())

    @cached_property
    def _paged(self) -> frozenset[Retention]:
        return frozenset(self.policy(state) for state in self.states if is_paged(state)) or frozenset([Retention()])

    @property
    def group(self) -> int:
        """Tokens that go into a page at once: a page holds a multiple of it."""
        return math.lcm(*(policy.group for policy in self._paged))

    def slots(self, length: int) -> int:
        """Slots of its pages that a sequence of `length` tokens has filled, in the buffer that fills most."""
        return max(policy.page_slot(policy.settled(length)) for policy in self._paged)

    def next_slot(self, length: int) -> int:
        """The first slot that a sequence of `length` tokens may still write, in the buffer that is furthest behind."""
        return min(policy.page_slot(policy.settled(length)) for policy in self._paged)

    def pages_for(self, length: int) -> int:
        """Pages of a sequence of `length` tokens."""
        return -(-self.slots(length) // self.page_tokens)

    def whole_pages(self, length: int) -> int:
        """Pages of a sequence of `length` tokens that are never written again."""
        return self.next_slot(length) // self.page_tokens

    def keeps(self, length: int, earlier: int) -> bool:
        """Whether a sequence of `length` tokens still holds all that it held when it had `earlier` ones."""
        if any(state.name.startswith(_GROWING) for state in self.states):
            return earlier == length
        policies = map(self.policy, self.states)
        return all(policy.settled(earlier) >= min(earlier, policy.settled(length)) for policy in policies)

    @property
    def waiting(self) -> int:
        """Tokens of a sequence that lie in no page however long it is."""
        return min(policy.rows for policy in self._paged)

    @property
    def pages_per_sequence(self) -> int:
        """Entries of a page table: the pages of a full row, at least one."""
        return max(1, self.pages_for(self.capacity))

    @property
    def has_rows(self) -> bool:
        """Whether some tokens are kept in rows of their sequence."""
        return not all(map(is_paged, self.states))

    @property
    def sizes(self) -> dict[str, int]:
        """The names that shapes of the plan use for the cache."""
        paged = {"pages": self.pages, "pages_per_sequence": self.pages_per_sequence, "page_tokens": self.page_tokens}
        return {**paged, "sequences": self.max_batch} if self.has_rows else paged

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in the pages of all layers."""
        return bytes_of(self.states, {"pages": 1, "page_tokens": 1, "sequences": 0})

    @property
    def bytes_per_sequence(self) -> int:
        """Bytes of one sequence beside its pages: the tokens that are kept as they came."""
        return bytes_of(self.states, {"pages": 0, "page_tokens": 0, "sequences": 1})

    @property
    def page_bytes(self) -> int:
        """Bytes of all pages."""
        return self.pages * self.page_tokens * self.bytes_per_token

    @property
    def row_bytes(self) -> int:
        """Bytes of all rows."""
        return self.max_batch * self.bytes_per_sequence

    @property
    def table_bytes(self) -> int:
        """Bytes of the page tables, and of the list of slots where there are rows."""
        return self.max_batch * (self.pages_per_sequence + self.has_rows) * INDEX_BYTES

    @property
    def nbytes(self) -> int:
        """Bytes of everything."""
        return self.page_bytes + self.row_bytes + self.table_bytes


def layout_of(
    entry: Entry | None, *, max_batch: int, max_context: int, page_tokens: int | None = None, kv_bytes: int | None = None
) -> CacheLayout:  # fmt: skip
    """`plan_layout` for the cache of an entry; without one, for a model that has no cache."""
    states, policies = ([], {}) if entry is None else (state_buffers(entry), policies_of(entry))
    return plan_layout(states, policies, max_batch=max_batch, max_context=max_context, page_tokens=page_tokens, kv_bytes=kv_bytes)


def plan_layout(
    states: Sequence[Buffer], policies: Mapping[str, Retention] | None = None, *, max_batch: int, max_context: int,
    page_tokens: int | None = None, kv_bytes: int | None = None,
) -> CacheLayout:  # fmt: skip
    """The layout for `max_batch` rows of `max_context` tokens, or for what fits into `kv_bytes`.

    Without `page_tokens` each row is one page, except that rows which share `kv_bytes` do so in pages of `POOL_PAGE_TOKENS` or fewer.
    Pages are made longer where they would cut a group of tokens.

    Raises:
        CapacityError: for sizes below 1, and where there is no room for a page for each row.
    """
    for name, value in (("max_batch", max_batch), ("max_context", max_context), ("page_tokens", page_tokens)):
        if value is not None and value < 1:
            raise CapacityError(f"cache: {name}={value}: expected at least 1; give more, or leave it out")
    bare = CacheLayout(tuple(states), policies or {}, max_batch)
    if not states:
        return replace(bare, capacity=max_context, page_tokens=max_context)
    wanted = page_tokens or max_context
    most = -(-wanted // bare.group) * bare.group
    if kv_bytes is None:
        return _whole(replace(bare, page_tokens=most), max_context)
    if page_tokens is None:
        most = _affordable(bare, most, kv_bytes)
    return _within(replace(bare, page_tokens=most), max_context, kv_bytes)


def _whole(bare: CacheLayout, max_context: int) -> CacheLayout:
    """Every row holds its whole context at once."""
    return replace(bare, capacity=max_context, pages=bare.max_batch * max(1, bare.pages_for(max_context)))


def _affordable(bare: CacheLayout, most: int, kv_bytes: int) -> int:
    """Tokens of a page where each row gets at least one: all that there are for one row, at most `POOL_PAGE_TOKENS` for several."""
    least = replace(bare, pages=bare.max_batch, page_tokens=bare.group, capacity=bare.max_batch * bare.group + bare.waiting)
    fair = (kv_bytes - least.row_bytes - least.table_bytes) // (bare.max_batch * max(1, bare.bytes_per_token))
    if bare.max_batch > 1:
        most = min(most, -(-POOL_PAGE_TOKENS // bare.group) * bare.group)
    return max(bare.group, min(most, fair // bare.group * bare.group))


def _within(bare: CacheLayout, max_context: int, kv_bytes: int) -> CacheLayout:
    """As many pages as fit into `kv_bytes`, their tables included; a row may take all of them."""
    spare = bare.waiting

    def layout(pages: int) -> CacheLayout:
        return replace(bare, pages=pages, capacity=min(max_context, pages * bare.page_tokens + spare))

    wanted = bare.max_batch * max(1, bare.pages_for(max_context))
    pages = bisect_right(range(wanted + 1), kv_bytes, key=lambda count: layout(count).nbytes) - 1
    if pages < bare.max_batch:
        raise CapacityError(
            f"cache: expected kv_bytes of at least {layout(bare.max_batch).nbytes} (a page of {bare.page_tokens} tokens for each of "
            f"{bare.max_batch} sequences), got {kv_bytes}; raise it, or lower max_batch or page_tokens"
        )
    return layout(pages)
