"""Hadamard matrices and the fast transform: exactness by order, over every size that models have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import FormatError
from qcompile.quant.hadamard import (
    fast_hadamard,
    hadamard_factors,
    hadamard_matrix,
    is_exact,
    mixing_matrix,
    random_orthogonal,
    random_signs,
)

MODEL_SIZES = (
    64, 80, 96, 128, 256, 576, 768, 896, 960, 1152, 1280, 1536, 2048, 2304, 2560, 3072, 3584, 3840, 4096, 4608, 4864, 5120, 5504, 5632,
    6144, 6912, 7168, 8192, 8960, 9728, 10240, 11008, 12288, 13824, 14336, 16384, 17408, 18944, 20480, 24576, 25600, 27648, 28672, 29568,
    53248,
)  # fmt: skip


def dense(size: int, seed: int = 0) -> torch.Tensor:
    """The transform as a matrix: column j is the image of unit vector j."""
    return fast_hadamard(torch.eye(size, dtype=torch.float64), mixing_matrix(size, seed), size).T


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_sizes_of_real_models_have_an_exact_matrix(size: int) -> None:
    order, twos = hadamard_factors(size)
    assert order * 2**twos == size
    assert is_exact(size)
    matrix = hadamard_matrix(order)
    assert matrix is not None
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize(
    ("size", "order"),
    [(64, 1), (1536, 12), (576, 36), (3584, 28), (14336, 28), (53248, 52), (25600, 100), (11008, 344), (29568, 924), (144, 36), (6, 3)],
)
def test_the_dense_factor_is_as_small_as_a_construction_allows(size: int, order: int) -> None:
    # 36 = 2(17 + 1); 28 = 27 + 1 over a field of 3^3; 52 = 2(25 + 1) over 5^2; 344 = 343 + 1 over 7^3; 6 has none
    assert hadamard_factors(size)[0] == order


def test_orders_without_a_construction_have_no_matrix() -> None:
    assert [order for order in range(1, 300) if order % 4 == 0 and hadamard_matrix(order) is None] == [
        92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292,
    ]  # fmt: skip
    assert all(hadamard_matrix(order) is None for order in (3, 5, 6, 10, 18, 90))


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 36, 64, 72, 96, 112, 144, 576])
def test_the_fast_transform_is_a_hadamard_matrix(size: int) -> None:
    matrix = dense(size)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5), rtol=0, atol=1e-14)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [3, 6, 10, 23, 92, 92 * 4 + 2])
def test_other_sizes_are_orthogonal_and_follow_their_seed(size: int) -> None:
    first, second = dense(size, seed=1), dense(size, seed=2)
    assert not is_exact(size)
    assert torch.allclose(first @ first.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert not torch.allclose(first, second)
    assert torch.equal(first, dense(size, seed=1))


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 130), blocks=st.integers(1, 3), rows=st.integers(0, 3), seed=st.integers(0, 9))
def test_each_block_is_transformed_by_the_same_matrix(size: int, blocks: int, rows: int, seed: int) -> None:
    x = torch.randn(rows, blocks * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = (x.view(rows, blocks, size) @ dense(size, seed).T).reshape(x.shape)
    assert torch.allclose(fast_hadamard(x, mixing_matrix(size, seed), size), expected, rtol=0, atol=1e-12)


def test_an_outlier_is_spread_evenly() -> None:
    x = torch.zeros(576, dtype=torch.float64)
    x[17] = 24.0
    assert torch.allclose(fast_hadamard(x, mixing_matrix(576), 576).abs(), torch.ones(576, dtype=torch.float64), atol=1e-12)


def test_random_parts_are_what_they_say() -> None:
    signs = random_signs(1000, seed=3)
    assert bool((signs.abs() == 1).all())
    assert abs(signs.mean().item()) < 0.1  # three standard deviations of the mean of 1000 signs
    assert not torch.equal(signs, random_signs(1000, seed=4))
    q = random_orthogonal(30, seed=5)
    assert torch.allclose(q @ q.T, torch.eye(30, dtype=torch.float64), atol=1e-13)


def test_a_size_below_one_is_refused() -> None:
    with pytest.raises(FormatError, match="hadamard of size 0: expected at least 1 channel"):
        hadamard_factors(0)
