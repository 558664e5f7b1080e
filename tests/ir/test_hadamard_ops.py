"""The online rotation as an operator: precision, shapes, storage."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.ir.allowed import name_of
from qcompile.quant.hadamard import mixing_matrix

hadamard = torch.ops.qcompile.hadamard.default


@pytest.mark.parametrize(("size", "blocks"), [(64, 1), (64, 3), (576, 1), (12, 4)])
def test_it_keeps_lengths_and_products(size: int, blocks: int) -> None:
    x, y = torch.randn(2, 2, 5, blocks * size, dtype=torch.float64)
    matrix = mixing_matrix(size)
    a, b = hadamard(x, matrix, size), hadamard(y, matrix, size)
    assert torch.allclose((a * b).sum(-1), (x * y).sum(-1), rtol=0, atol=1e-11)
    assert torch.allclose(a.view(2, 5, blocks, size).norm(dim=-1), x.view(2, 5, blocks, size).norm(dim=-1), rtol=1e-12)


def test_sixteen_bits_are_rounded_once() -> None:
    x = torch.randn(4, 1536).bfloat16()
    matrix = mixing_matrix(1536)
    assert torch.equal(hadamard(x, matrix, 1536), hadamard(x.float(), matrix, 1536).bfloat16())


def test_the_fake_has_the_shape_and_strides_of_the_result() -> None:
    x = torch.randn(3, 5, 24).transpose(0, 1)
    matrix = mixing_matrix(12)
    real = hadamard(x, matrix, 12)
    with FakeTensorMode() as mode:
        fake = hadamard(mode.from_tensor(x), mode.from_tensor(matrix), 12)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_it_may_be_stored() -> None:
    assert name_of(hadamard) == "qcompile.hadamard.default"
