"""What kernel parameters point to: memory described by tensors, under the names that an operator's schema gives its arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, dtype

from qcompile.ir.lowered import item_operand
from qcompile.ir.operands import bind_arguments as bind_arguments
from qcompile.ir.operands import output_name as output_name

_LEADING = ("logits", "gate", "x", "codes")
"""Operands over rows of features: the axes before the last count the rows."""

_BATCHED = {
    "qcompile.rope.default": "x",
    "qcompile.cache_append_.default": "k",
    "qcompile.cache_append.default": "k",
    "qcompile.cache_attend.default": "q",
    "qcompile.append_packed_.default": "k",
    "qcompile.append_packed.default": "k",
    "qcompile.cache_attend_packed.default": "q",
    "qcompile.with_recent.default": "x",
    "qcompile.attend_settled.default": "q",
}
"""Operators over [B, heads, S, D] -> the operand that has these axes."""

_PLACED = ("qcompile.settle_.default", "qcompile.retain_.default")
"""Operators whose `positions` [B, S] say how many tokens come."""

_ATTENDING = ("qcompile.cache_attend.default", "qcompile.cache_attend_packed.default", "qcompile.attend_settled.default")

_INDEXED = {
    "aten.embedding.default": "indices",
    "qcompile.quantized_embedding.default": "indices",
    "qcompile.rotary_table.default": "positions",
}
"""Operators over [B, S] integers -> that operand."""


@dataclass(frozen=True)
class Operand:
    """Memory a parameter may point to; `strides` are in elements, `dtype` is None for a workspace's raw bytes.

    `owner` is what keeps the memory alive: whoever holds the operand holds it too.
    """

    address: int
    dtype: dtype | None
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    owner: object = None

    @classmethod
    def of(cls, tensor: Tensor) -> Operand:
        """The memory of a tensor."""
        return cls(tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), tensor)

    @classmethod
    def workspace(cls, tensor: Tensor) -> Operand:
        """Raw bytes: whatever type the kernel reads in them."""
        return cls(tensor.data_ptr(), None, tuple(tensor.shape), tuple(tensor.stride()), tensor)


def named_tensors(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among arguments by the names of operands: those of a list are `k_tables_0`, `k_tables_1` and so on."""
    lists = {name: value for name, value in arguments.items() if isinstance(value, list | tuple)}
    items = {item_operand(name, place): item for name, value in lists.items() for place, item in enumerate(value)}
    return {name: value for name, value in {**arguments, **items}.items() if isinstance(value, Tensor)}


def local_sizes(name: str, operands: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, int]:
    """The entry's sizes with `batch`, `sequence` and `rows` as this one call has them, and the cache's `pages` and `page_tokens`.

    A head that is applied to the last token only has fewer rows than the entry; its own operand says how many.
    """
    local = dict(sizes)
    if name in _BATCHED:
        lead = operands[_BATCHED[name]]
        local |= {"batch": lead.shape[0], "sequence": lead.shape[2], "rows": lead.shape[0] * lead.shape[2]}
    elif name == "qcompile.gather_last.default":
        batch, sequence = operands["positions"].shape
        local |= {"batch": batch, "sequence": sequence, "rows": batch}
    elif name in _PLACED:
        batch, sequence = operands["positions"].shape
        local |= {"batch": batch, "sequence": sequence, "rows": batch * sequence}
    elif name in _INDEXED:
        local["rows"] = operands[_INDEXED[name]].numel()
    elif (lead := next((operands[key] for key in _LEADING if isinstance(operands.get(key), Tensor)), None)) is not None:
        local["rows"] = lead.numel() // max(1, lead.shape[-1])
    if isinstance(table := operands.get("page_table"), Tensor):
        local["pages"] = table.shape[1]
    if isinstance(keys := operands.get("keys", operands.get("pages")), Tensor):
        local["page_tokens"] = keys.shape[2]
    return local


def bucket_count(name: str, local: Mapping[str, int]) -> int:
    """What `BUCKETS` counts for an operator: tokens of each sequence for attention over the cache, else rows."""
    return local["sequence" if name in _ATTENDING else "rows"]


def is_dense(shape: Sequence[int], strides: Sequence[int], covered: frozenset[int]) -> bool:
    """Whether every axis whose stride no parameter carries lies where a kernel that was not told assumes it.

    The last such axis has stride 1, each other one the stride of the axis to its right times that one's size: so [B, S, K] with
    the stride of axis 1 carried may be walked as B·S rows.
    """
    expected = 1
    for axis in reversed(range(len(shape))):
        if axis in covered:
            expected = strides[axis] * shape[axis]
        elif shape[axis] != 1:
            if strides[axis] != expected:
                return False
            expected *= shape[axis]
    return True
