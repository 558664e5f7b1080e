"""Packed caches: the error of a vector, its bytes, and attention over what was stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.ir.cache_ops import cache_attend_packed, pack_vectors, packed_width, unpack_vectors
from qcompile.ir.ops import cache_append, cache_attend

BITS = pytest.mark.parametrize("bits", [2, 4, 8])


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from([2, 4, 8]), size=st.integers(1, 33), seed=st.integers(0, 1000), spread=st.sampled_from([1e-6, 1.0, 300.0]))
def test_half_a_step_and_what_float16_adds(bits: int, size: int, seed: int, spread: float) -> None:
    x = spread * torch.randn(2, 3, 4, size, generator=torch.Generator().manual_seed(seed))
    packed = pack_vectors(x, bits)
    assert packed.shape == (2, 3, 4, packed_width(size, bits))
    step = (x.amax(-1) - x.amin(-1)) / ((1 << bits) - 1)
    half = x.abs().amax(-1) * 2**-10 + 7e-5  # rounding of the least value and of the step, and float16's least normal step
    assert ((unpack_vectors(packed, bits, size, torch.float32) - x).abs().amax(-1) <= 0.5 * step + half).all()


def test_four_bits_of_a_head_of_64_are_four_and_a_half() -> None:
    assert packed_width(64, 4) * 8 / 64 == 4.5


@BITS
def test_a_vector_of_one_value_is_exact(bits: int) -> None:
    x = torch.full((1, 1, 1, 8), 0.25)
    assert torch.equal(unpack_vectors(pack_vectors(x, bits), bits, 8, torch.float32), x)


@BITS
def test_attention_reads_what_was_stored(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 2, 5, 8, generator=generator) for _ in range(2))
    q = torch.randn(2, 4, 5, 8, generator=generator)
    table = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    positions = torch.tensor([[0, 1, 2, 3, 4], [-1, -1, 0, 1, 2]])
    stored = [pack_vectors(part, bits) for part in (k, v)]
    empty = [torch.zeros(4, 2, 3, packed_width(8, bits), dtype=torch.uint8) for _ in range(2)]
    keys, values = cache_append(*empty, *stored, table, positions)
    seen = [unpack_vectors(part, bits, 8, torch.float32) for part in stored]
    plain = cache_append(*(torch.zeros(4, 2, 3, 8) for _ in range(2)), *seen, table, positions)
    expected = cache_attend(q, *plain, table, positions, 0.35)
    assert torch.allclose(cache_attend_packed(q, keys, values, table, positions, bits, 0.35), expected, atol=1e-6, rtol=0)
