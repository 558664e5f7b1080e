"""Where buffers lie in an arena: offsets such that no two that live at once overlap (greedy by size, arXiv:2001.03288)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from qcompile.errors import ArtifactError
from qcompile.ir.allowed import ALLOWED
from qcompile.ir.lowered import Buffer, Entry, Plan, Step
from qcompile.ir.size import evaluate, names_in
from qcompile.quant.scheme import DTYPE_NAMES

ALIGNMENT = 64
"""A cache line, and more than any vector load wants."""


@dataclass(frozen=True)
class Lifetime:
    """Bytes that a buffer needs and the steps or phases, both inclusive, between which it must keep them."""

    size: int
    first: int
    last: int

    def overlaps(self, other: Lifetime) -> bool:
        """Whether both are alive at some step."""
        return self.first <= other.last and other.first <= self.last


def assign_offsets(lifetimes: Mapping[str, Lifetime]) -> tuple[dict[str, int], int]:
    """An offset in bytes for each buffer, and the arena's size.

    The largest are placed first, each into the smallest gap between those placed already that live at the same time.
    """
    placed: list[tuple[int, int, Lifetime]] = []
    offsets: dict[str, int] = {}
    for name, life in sorted(lifetimes.items(), key=lambda item: (-item[1].size, item[0])):
        size = -(-life.size // ALIGNMENT) * ALIGNMENT
        offset = _best_gap([(start, end) for start, end, other in placed if other.overlaps(life)], size)
        offsets[name] = offset
        placed.append((offset, offset + size, life))
        placed.sort(key=lambda item: item[:2])
    return offsets, max((end for _, end, _ in placed), default=0)


def _best_gap(taken: list[tuple[int, int]], size: int) -> int:
    best, best_size, cursor = -1, 0, 0
    for start, end in taken:
        gap = start - cursor
        if gap >= size and (best < 0 or gap < best_size):
            best, best_size = cursor, gap
        cursor = max(cursor, end)
    return best if best >= 0 else cursor


def plan_entry(entry: Entry, limits: dict[str, int]) -> Entry:
    """The entry with its intermediates laid out in one arena at `limits`; unplanned if a size depends on something else."""
    lifetimes = _lifetimes(entry, limits)
    if not limits or lifetimes is None:
        unplanned = {name: replace(buffer, offset=-1) for name, buffer in entry.buffers.items()}
        return replace(entry, buffers=unplanned, limits={}, arena_bytes=0)
    offsets, total = assign_offsets(lifetimes)
    buffers = {name: replace(buffer, offset=offsets.get(name, -1)) for name, buffer in entry.buffers.items()}
    return replace(entry, buffers=buffers, limits=limits, arena_bytes=total)


def with_batch(plan: Plan, max_batch: int) -> Plan:
    """The plan laid out anew for batches of `max_batch` sequences."""
    entries = {
        name: plan_entry(entry, entry.limits | {"batch": max_batch}) if entry.limits else entry for name, entry in plan.entries.items()
    }
    return replace(plan, entries=entries)


def root_of(entry: Entry, name: str) -> str:
    """The buffer whose memory `name` is a view of, through any number of views."""
    while entry.buffers[name].alias:
        name = entry.buffers[name].alias
    return name


def buffers_in(value: Any) -> Iterator[str]:
    """The names of all buffers that a step's argument refers to."""
    if isinstance(value, dict):
        if "buffer" in value:
            yield value["buffer"]
    elif isinstance(value, list | tuple):
        for item in value:
            yield from buffers_in(item)


def phases(entry: Entry) -> list[int]:
    """For each step the number of its phase, from 0 on: no step reads or writes what another of its phase writes.

    Steps keep their order, so that a phase is a run of steps which threads may share out without waiting in between: the projections of
    a layer that read the same rows, the rotations of queries and keys. A view needs no call, and is in the phase of what stands before
    it. What is read in a phase keeps its memory to the end of it, so none of its steps writes where another still reads.
    """
    found, number = list[int](), 0
    read, written = set[str](), set[str]()
    for step in entry.steps:
        reads, writes = _roots(entry, step)
        if reads & written or writes & (read | written):
            number += 1
            read, written = set(), set()
        read |= reads
        written |= writes
        found.append(number)
    return found


def _roots(entry: Entry, step: Step) -> tuple[set[str], set[str]]:
    """The memory that a step reads, and that it writes; a view does neither."""
    if step.outputs and all(entry.buffers[name].alias for name in step.outputs):
        return set(), set()
    changed = _changed(step.operator)
    reads, writes = set[str](), {root_of(entry, name) for name in step.outputs}
    for key, argument in [*enumerate(step.args), *step.kwargs.items()]:
        (writes if key in changed else reads).update(root_of(entry, name) for name in buffers_in(argument))
    return reads, writes


@cache
def _changed(operator: str) -> frozenset[int | str]:
    """The arguments that an operator writes in place, by position and by name."""
    schema = getattr(ALLOWED[operator], "_schema", None)
    arguments = enumerate(schema.arguments if schema is not None else ())
    return frozenset(key for place, item in arguments if item.alias_info and item.alias_info.is_write for key in (place, item.name))


def undecided_sizes(entry: Entry) -> set[str]:
    """Names in the shapes of results that no input, state or constant has: values decide them while the entry runs."""
    given, made = set[str](), set[str]()
    for buffer in entry.buffers.values():
        (given if buffer.kind in ("input", "state", "constant") else made).update(size_names(buffer))
    return made - given


def size_names(buffer: Buffer) -> set[str]:
    """The names in a buffer's shape."""
    return {name for size in buffer.shape if not isinstance(size, int) for name in names_in(size)}


def _lifetimes(entry: Entry, limits: Mapping[str, int]) -> dict[str, Lifetime] | None:
    """From the phase that writes an intermediate to the last that touches it or a view of it; those of undecided size have none."""
    undecided = undecided_sizes(entry)
    places: dict[str, list[int]] = {}
    for phase, step in zip(phases(entry), entry.steps, strict=True):
        for name in _touched(step):
            places.setdefault(root_of(entry, name), []).append(phase)
    lifetimes = {}
    for name, buffer in entry.buffers.items():
        if buffer.kind == "intermediate" and not buffer.alias and not undecided & size_names(buffer):
            size = _bytes(buffer, limits)
            if size is None:
                return None
            lifetimes[name] = Lifetime(size, min(places[name]), max(places[name]))
    return lifetimes


def _touched(step: Step) -> Iterator[str]:
    yield from step.outputs
    yield from buffers_in([*step.args, *step.kwargs.values()])


def _bytes(buffer: Buffer, limits: Mapping[str, int]) -> int | None:
    try:
        count = math.prod(evaluate(size, limits) for size in buffer.shape)
    except ArtifactError:
        return None
    return count * dtype_of(buffer.dtype).itemsize


def dtype_of(name: Any, where: str = "dtype") -> torch.dtype:
    """The dtype called `fp32`, `bf16` … or by torch's own name.

    Raises:
        ArtifactError: for any other name.
    """
    found = DTYPE_NAMES.get(name) or getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise ArtifactError(f"{where}: expected a dtype, got {name!r}; compile again")
    return found
