"""Packing and storing at once is what the operators one after the other do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcompile.ir.append_ops import append_packed
from qcompile.ir.cache_ops import pack_vectors
from qcompile.ir.hadamard_ops import hadamard
from qcompile.ir.ops import cache_append
from qcompile.quant.hadamard import mixing_matrix
from qcompile.quant.vector_format import vector_format

TABLE = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
POSITIONS = torch.tensor([[0, 1, 2, 3, 4], [-1, -1, 0, 1, 2]])


def operands(size: int, k_form: str, v_form: str) -> tuple[list[Tensor], list[Tensor]]:
    """Pages full of old bytes, and new keys and values."""
    generator = torch.Generator().manual_seed(0)
    pages = [torch.full((4, 2, 3, vector_format(form).width(size)), 170, dtype=torch.uint8) for form in (k_form, v_form)]
    return pages, [torch.randn(2, 2, 5, size, generator=generator).bfloat16() for _ in range(2)]


def test_tables_go_to_the_forms_that_have_them() -> None:
    forms = ("bfp4 g4 sorted", "int8 sym")
    pages, (k, v) = operands(8, *forms)
    order = [torch.tensor([[5, 2, 7, 0, 1, 3, 4, 6], [0, 3, 1, 2, 6, 5, 4, 7]], dtype=torch.uint8)]
    expected = cache_append(*pages, pack_vectors(k, forms[0], order), pack_vectors(v, forms[1]), TABLE, POSITIONS)
    got = append_packed(*pages, k, v, TABLE, POSITIONS, *forms, k_tables=order)
    assert all(map(torch.equal, got, expected))
    torch.ops.qcompile.append_packed_(*pages, k, v, TABLE, POSITIONS, *forms, k_tables=order)
    assert all(map(torch.equal, pages, expected))


@pytest.mark.parametrize(("size", "rotated"), [(8, 0), (8, 8), (8, 4), (12, 12)])
def test_it_is_rotating_packing_and_appending(size: int, rotated: int) -> None:
    k_form, v_form = "int4 g4 asym", "fp8"
    pages, (k, v) = operands(size, k_form, v_form)
    matrix = mixing_matrix(rotated) if rotated else None
    turned = hadamard(k, matrix, rotated) if rotated else k
    expected = cache_append(*pages, pack_vectors(turned, k_form), pack_vectors(v, v_form), TABLE, POSITIONS)
    before = [page.clone() for page in pages]
    got = append_packed(*pages, k, v, TABLE, POSITIONS, k_form, v_form, matrix, rotated)
    assert all(map(torch.equal, got, expected))
    assert all(map(torch.equal, pages, before)), "the operator is functional"
    torch.ops.qcompile.append_packed_(*pages, k, v, TABLE, POSITIONS, k_form, v_form, matrix, rotated)
    assert all(map(torch.equal, pages, expected))
