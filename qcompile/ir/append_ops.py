"""Rotating, packing and storing the vectors of a token in one operator; shape letters as in `cache_ops.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompile.ir.cache_ops import pack_vectors
from qcompile.ir.hadamard_ops import hadamard
from qcompile.ir.ops import cache_append, cache_append_, define

_OPERANDS = (
    "Tensor k, Tensor v, Tensor page_table, Tensor positions, str k_form, str v_form, Tensor? matrix=None, int size=0, "
    "Tensor[]? k_tables=None, Tensor[]? v_tables=None"
)
Tables = Sequence[Tensor] | None


def _fake_append_packed(keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(keys), torch.empty_like(values)


@define(f"append_packed(Tensor keys, Tensor values, {_OPERANDS}) -> (Tensor, Tensor)", _fake_append_packed)
def append_packed(
    keys: Tensor, values: Tensor, k: Tensor, v: Tensor, page_table: Tensor, positions: Tensor,
    k_form: str, v_form: str, matrix: Tensor | None = None, size: int = 0, k_tables: Tables = None, v_tables: Tables = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`cache_append` of k, v [B, L, S, D] packed to `k_form`, `v_form` into keys, values uint8 [P, L, R, W].

    Keys are rotated first, by `hadamard(k, matrix, size)`, unless size is 0. `k_tables`, `v_tables` are the forms' (`pack_vectors`).
    """
    k = hadamard(k, matrix, size) if size else k
    return cache_append(keys, values, pack_vectors(k, k_form, k_tables), pack_vectors(v, v_form, v_tables), page_table, positions)


@define(f"append_packed_(Tensor(a!) keys, Tensor(b!) values, {_OPERANDS}) -> ()", lambda *_, **__: None)
def append_packed_(
    keys: Tensor, values: Tensor, k: Tensor, v: Tensor, page_table: Tensor, positions: Tensor,
    k_form: str, v_form: str, matrix: Tensor | None = None, size: int = 0, k_tables: Tables = None, v_tables: Tables = None,
) -> None:  # fmt: skip
    """`append_packed` in place."""
    k = hadamard(k, matrix, size) if size else k
    cache_append_(keys, values, pack_vectors(k, k_form, k_tables), pack_vectors(v, v_form, v_tables), page_table, positions)
