"""Attention over what keys and values are made from, against projecting first and caching both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qcompile.ir.cache_ops import pack_vectors, turned, unpack_vectors
from qcompile.ir.ops import cache_append, cache_attend
from qcompile.ir.rematerialize_ops import attend_rematerialized, cache_store, cache_store_

HEADS, SHARED, SIZE, VALUES, INPUTS, PAGE = 4, 2, 8, 6, 20, 4
FORM = "int6 g4"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


K_WEIGHT, V_WEIGHT = random(SHARED * SIZE, INPUTS), random(SHARED * VALUES, INPUTS, seed=1)
K_BIAS, V_BIAS = random(SHARED * SIZE, seed=2), random(SHARED * VALUES, seed=3)
FREQUENCIES = torch.tensor([1.0, 0.3, 0.1, 0.02])


def expected(q: Tensor, x: Tensor, table: Tensor, positions: Tensor, inv_freq: Tensor | None, **options: float) -> Tensor:
    """Over a plain cache of the keys and values of what a cache of x gives back."""
    read = unpack_vectors(pack_vectors(x.unsqueeze(1), FORM), FORM, INPUTS, torch.float64)[:, 0]
    k, v = (
        functional.linear(read, weight, bias).unflatten(2, (SHARED, -1)).transpose(1, 2)
        for weight, bias in ((K_WEIGHT, K_BIAS), (V_WEIGHT, V_BIAS))
    )
    pages = [torch.zeros(8, SHARED, PAGE, size).double() for size in (SIZE, VALUES)]
    return cache_attend(
        q, *cache_append(*pages, turned(k, inv_freq, 1.0), v, table, torch.arange(x.shape[1]).expand(x.shape[:2])), table, positions, 0.3,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"softcap": 2.0}])
@pytest.mark.parametrize("inv_freq", [None, FREQUENCIES])
def test_keys_and_values_are_those_of_what_is_stored(inv_freq: Tensor | None, options: dict[str, float]) -> None:
    q, x = random(2, HEADS, 11, SIZE, seed=4), random(2, 11, INPUTS, seed=5)
    table, positions = torch.randperm(8, generator=torch.Generator().manual_seed(0)).view(2, 4).int(), torch.arange(11).repeat(2, 1)
    pages = torch.zeros(8, 1, PAGE, pack_vectors(x, FORM).shape[-1], dtype=torch.uint8)
    on_read = {"k_bias": K_BIAS, "v_bias": V_BIAS, "inv_freq": inv_freq, **options}
    parts = []
    for part in (slice(0, 5), slice(5, 6), slice(6, 11)):
        pages = cache_store(pages, pack_vectors(x[:, part].unsqueeze(1), FORM), table, positions[:, part])
        given = (q[:, :, part], pages, table, positions[:, part], FORM, K_WEIGHT, V_WEIGHT, 0.3)
        parts.append(attend_rematerialized(*given, **on_read))  # type: ignore[arg-type]
    torch.testing.assert_close(torch.cat(parts, dim=2), expected(q, x, table, positions, inv_freq, **options), rtol=0, atol=1e-12)


def test_padding_is_not_stored_and_gives_nothing() -> None:
    q, x = random(2, HEADS, 5, SIZE, seed=4), random(2, 5, INPUTS, seed=5)
    table, positions = torch.tensor([[1, 0], [3, 2]]).int(), torch.tensor([[-1, 0, 1, -1, 2], [-1] * 5])
    packed = pack_vectors(x.unsqueeze(1), FORM)
    pages = torch.zeros(4, 1, PAGE, packed.shape[-1], dtype=torch.uint8)
    stored = cache_store(pages, packed, table, positions)
    cache_store_(pages, packed, table, positions)
    assert torch.equal(stored, pages)
    assert not pages[[0, 2, 3]].any()
    found = attend_rematerialized(q, pages, table, positions, FORM, K_WEIGHT, V_WEIGHT, 0.3, k_bias=K_BIAS, v_bias=V_BIAS)
    real = [1, 2, 4]
    alone = expected(q[:1, :, real], x[:1, real], table[:1], torch.arange(3).unsqueeze(0), None)
    torch.testing.assert_close(found[0, :, real], alone[0], rtol=0, atol=1e-12)
    assert not found[0, :, [0, 3]].any()
    assert not found[1].any()
