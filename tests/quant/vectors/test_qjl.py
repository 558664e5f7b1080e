"""QJL: inner products with what is stored are right in the mean, and their variance falls as one over the signs."""

from __future__ import annotations

import math

import pytest
import torch

from qcompile.quant.vector_format import vector_format
from qcompile.quant.vectors.qjl import sketch

SEEDS = 2000


@pytest.mark.parametrize(("signs", "size", "width"), [(256, 64, 34), (256, 8, 34), (128, 128, 18), (20, 64, 5)])
def test_width_is_that_of_the_signs_and_a_norm(signs: int, size: int, width: int) -> None:
    assert vector_format(f"qjl{signs}").width(size) == width


def products(signs: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Estimates of q · k over SEEDS sketches, which stand for heads, for three pairs at unlike angles; the truth; |q|² |k|²."""
    generator = torch.Generator().manual_seed(size)
    k = torch.randn(3, size, generator=generator)
    q = torch.randn(3, size, generator=generator)
    q[1:] = torch.tensor([[0.5], [1.0]]) * q[1:] + torch.tensor([[1.0], [-2.0]]) * k[1:]
    table = torch.cat([sketch(signs, size, seed) for seed in range(SEEDS)]).half()
    form = vector_format(f"qjl{signs}")
    stored = form.decode(form.encode(k.expand(SEEDS, 3, size), (table,)), size, tables=(table,))
    return (stored * q).sum(-1), (q * k).sum(-1), q.square().sum(-1) * k.square().sum(-1)


@pytest.mark.parametrize("size", [4, 16])
def test_inner_products_are_unbiased_and_their_variance_is_bounded(size: int) -> None:
    """In the mean over n sketches, within four standard errors; sqrt(D) in place of the rows' length would be off by 1/(4 D)."""
    estimates, truth, scale = products(64, size)
    variance = estimates.var(0)
    assert ((estimates.mean(0) - truth).abs() <= 4 * (variance / SEEDS).sqrt() + 2**-10 * scale.sqrt()).all()
    assert (variance <= 1.1 * math.pi / 2 * scale / 64).all()


def test_variance_falls_as_one_over_the_signs() -> None:
    few, many = (products(signs, 16)[0].var(0) for signs in (32, 128))
    assert ((few / many - 4).abs() < 0.6).all()  # a variance of 2000 samples is within 3 % or so, the ratio within 5 %, three times that


def test_directions_of_a_block_are_orthogonal_and_as_long_as_gaussian_ones() -> None:
    rows = sketch(40, 16)
    assert rows.shape == (1, 40, 16)
    length = torch.randn(100_000, 16, generator=torch.Generator().manual_seed(0)).norm(dim=1).mean()
    for block in rows[0].split(16):
        torch.testing.assert_close(block @ block.T, length**2 * torch.eye(len(block)), rtol=3e-3, atol=1e-4)


def test_norms_scale_what_is_stored() -> None:
    form = vector_format("qjl64")
    (table,) = form.calibrate(torch.zeros(1, 1, 16), torch.ones(1, 16))
    k = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    once, thrice = (form.decode(form.encode(factor * k, (table,)), 16, tables=(table,)) for factor in (1, 4))
    assert torch.equal(4 * once, thrice)


def test_scores_rank_keys() -> None:
    """What a query attends to: the key nearest to it among 200 keeps the highest score with 16 signs a number."""
    k = torch.randn(1, 200, 64, generator=torch.Generator().manual_seed(0))
    form = vector_format("qjl1024")
    (table,) = form.calibrate(k.transpose(0, 1), torch.ones(1, 64))
    stored = form.decode(form.encode(k, (table,)), 64, tables=(table,))
    assert torch.equal((stored[0] @ k[0].T).argmax(0), torch.arange(200))
