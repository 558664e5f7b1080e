"""What each layer of a model keeps of a sequence, and in how many bytes: read from the plan, so that it is what engines allocate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from qcompile.ir import allowed as _allowed  # noqa: F401  registers every operator of a plan
from qcompile.ir.lowered import Buffer, Entry, Plan, Step
from qcompile.ir.memory import buffers_in
from qcompile.ir.size import evaluate
from qcompile.runtime.cache_layout import arguments_of, bytes_of, state_buffers

CONTEXT = 4096
"""Tokens of the sequence whose bits per number are counted."""
_PAGE_TABLE_ENTRY = 4
"""Bytes of an int32: a page of a sequence, for all layers at once."""
_PAGE = 64
"""Tokens of a page, where its share of the page table is counted."""
_TABLES = ("tables", "k_tables", "v_tables")
_TOKEN = {"pages": 1, "page_tokens": 1, "sequences": 0}
_SEQUENCE = {"pages": 0, "page_tokens": 0, "sequences": 1}


@dataclass(frozen=True)
class CacheLayer:
    """The cache of one attention.

    Attributes:
        layer: its number, counted from the first attention.
        keys: form of keys, such as `int4 t32 asym`, or the dtype of numbers; `values` likewise.
        sinks: first tokens that stay in 16 bits.
        window: last tokens that do, at least.
        numbers_per_token: of keys and values, as the model computes them.
        bytes_per_token: in pages.
        bytes_per_sequence: beside them, for tokens in 16 bits.
        table_bytes: of calibrated constants that all sequences share.
        kernel: what attends, `reference` where no kernel does.
    """

    layer: int
    keys: str
    values: str
    sinks: int
    window: int
    numbers_per_token: int
    bytes_per_token: int
    bytes_per_sequence: int
    table_bytes: int
    kernel: str

    @property
    def bits_per_number(self) -> float:
        """Of storage, everything but the page table counted, in a sequence of `CONTEXT` tokens."""
        return 8 * (self.bytes_per_token * CONTEXT + self.bytes_per_sequence + self.table_bytes) / (self.numbers_per_token * CONTEXT)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "bits_per_number": self.bits_per_number}


def cache_layers(plan: Plan) -> list[CacheLayer]:
    """One row per attention of a model with a cache, in order; empty for any other."""
    entry = plan.entries.get("decode")
    if entry is None:
        return []
    states = {state.name: state for state in state_buffers(entry)}
    readers = [step for step in entry.steps if "attend" in step.operator and states.keys() & set(buffers_in(list(step.args)))]
    return [_layer(index, step, entry, states) for index, step in enumerate(readers)]


def bits_per_number(layers: Sequence[CacheLayer]) -> float:
    """Of storage for each number of keys and values in a sequence of `CONTEXT` tokens: pages, rows of 16 bits, tables, page table."""
    numbers = sum(layer.numbers_per_token for layer in layers)
    stored = sum(layer.bits_per_number * layer.numbers_per_token for layer in layers)
    return (stored + 8 * _PAGE_TABLE_ENTRY / _PAGE) / numbers


def folded(layers: Sequence[CacheLayer]) -> Iterator[tuple[str, CacheLayer]]:
    """Neighbours that differ in nothing but their number as one: `0-11`, `12`, and the first of each."""
    start = 0
    for end in range(1, len(layers) + 1):
        if end < len(layers) and replace(layers[end], layer=layers[start].layer) == layers[start]:
            continue
        first, last = layers[start].layer, layers[end - 1].layer
        yield (str(first) if first == last else f"{first}-{last}"), layers[start]
        start = end


def _layer(index: int, step: Step, entry: Entry, states: dict[str, Buffer]) -> CacheLayer:
    given = arguments_of(step)
    mine = [state for name, state in states.items() if name.rpartition("_")[2] == _number(step, states)]
    tables = {name for key, value in given.items() if key in _TABLES for name in buffers_in(value)}
    return CacheLayer(
        index,
        _form(given, "keys", entry),
        _form(given, "values", entry),
        sinks=given.get("first", 0),
        window=given.get("recent", 0),
        numbers_per_token=_numbers(given, step, entry),
        bytes_per_token=bytes_of(mine, _TOKEN),
        bytes_per_sequence=bytes_of(mine, _SEQUENCE),
        table_bytes=bytes_of([entry.buffers[name] for name in sorted(tables)], {}),
        kernel=", ".join(dict.fromkeys(step.kernels.values())) or "reference",
    )


def _number(step: Step, states: dict[str, Buffer]) -> str:
    """The number in the names of the states that a step reads."""
    return next(name.rpartition("_")[2] for name in buffers_in(list(step.args)) if name in states)


def _form(given: dict[str, Any], key: str, entry: Entry) -> str:
    """How keys or values are stored; keys before rotary positions say so."""
    if "sources" in given:
        return f"made from {given['form']}"
    text: str = given.get(f"{key[0]}_form") or entry.buffers[given[key]["buffer"]].dtype
    turned_on_read = key == "keys" and given.get("inv_freq") is not None
    return f"{text}, before positions" if turned_on_read else text


def _numbers(given: dict[str, Any], step: Step, entry: Entry) -> int:
    """Of a token's keys and values."""
    if "sources" in given:
        return sum(_size(entry.buffers[given[name]["buffer"]].shape[0]) for name in ("k_weight", "v_weight"))
    query, result = entry.buffers[given["q"]["buffer"]], entry.buffers[step.outputs[0]]
    return _size(entry.buffers[given["keys"]["buffer"]].shape[1]) * (_size(query.shape[3]) + _size(result.shape[3]))


def _size(size: Any) -> int:
    return evaluate(size, {})
