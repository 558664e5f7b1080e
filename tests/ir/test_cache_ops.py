"""Packed caches: attention over what was stored."""

from __future__ import annotations

import pytest
import torch

from qcompile.ir.cache_ops import cache_attend_packed, pack_vectors, unpack_vectors
from qcompile.ir.ops import cache_append, cache_attend
from qcompile.quant.vector_format import vector_format


@pytest.mark.parametrize(("k_form", "v_form"), [("int2 asym", "int2 asym"), ("int4 g4 asym", "int8 sym"), ("fp8", "int3 g8 sym")])
def test_attention_reads_what_was_stored(k_form: str, v_form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 2, 5, 8, generator=generator) for _ in range(2))
    q = torch.randn(2, 4, 5, 8, generator=generator)
    table = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    positions = torch.tensor([[0, 1, 2, 3, 4], [-1, -1, 0, 1, 2]])
    parts = ((k, k_form), (v, v_form))
    stored = [pack_vectors(part, form) for part, form in parts]
    empty = [torch.zeros(4, 2, 3, vector_format(form).width(8), dtype=torch.uint8) for _, form in parts]
    keys, values = cache_append(*empty, *stored, table, positions)
    seen = [unpack_vectors(part, form, 8, torch.float32) for part, (_, form) in zip(stored, parts, strict=True)]
    plain = cache_append(*(torch.zeros(4, 2, 3, 8) for _ in range(2)), *seen, table, positions)
    expected = cache_attend(q, *plain, table, positions, 0.35)
    assert torch.allclose(cache_attend_packed(q, keys, values, table, positions, k_form, v_form, 0.35), expected, atol=1e-6, rtol=0)
