"""`klt`: bytes, bits dealt out by variance, and errors that fall with them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from qcompile.errors import FormatError
from qcompile.quant.vector_format import vector_format

HEADS, SIZE = 2, 16


def correlated(count: int, seed: int = 0) -> Tensor:
    """Vectors [N, L, D] whose channels follow a few directions, about a mean, with tokens of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(HEADS, SIZE, SIZE, generator=torch.Generator().manual_seed(9)) * torch.logspace(0, -2, SIZE).unsqueeze(-1)
    size = torch.rand(count, HEADS, 1, generator=generator) * 3 + 0.2
    return torch.einsum("nld,lde->nle", torch.randn(count, HEADS, SIZE, generator=generator) * size, mixing) + 0.5


def restored(text: str, x: Tensor, importance: Tensor | None = None) -> Tensor:
    form = vector_format(text)
    tables = form.calibrate(correlated(4000), torch.ones(HEADS, SIZE) if importance is None else importance)
    stored = x.transpose(0, 1)
    return form.decode(form.encode(stored, tables), SIZE, torch.float32, tables).transpose(0, 1)


def error(text: str, importance: Tensor | None = None) -> float:
    x = correlated(300, seed=1)
    return float((restored(text, x, importance) - x).square().mean())


def test_bytes_are_the_bits_and_a_gain() -> None:
    assert [vector_format(text).width(64) for text in ("klt2", "klt2.25", "klt4")] == [17, 19, 33]
    assert str(vector_format("klt2.25")) == "klt2.25"


def test_every_bit_halves_the_error_at_least() -> None:
    errors = [error(f"klt{bits}") for bits in (1, 2, 3, 4)]
    assert all(fewer > 2 * more for fewer, more in pairwise(errors))


def test_directions_are_worth_two_bits_a_number() -> None:
    assert error("klt2") < error("int4 g16 asym")


def test_an_outlier_is_held_by_its_gain() -> None:
    x = correlated(50, seed=2) * 30
    assert (restored("klt4", x) - x).norm() < 0.2 * x.norm()


def test_what_counts_is_kept_better() -> None:
    importance = torch.ones(HEADS, SIZE)
    importance[:, 3] = 1e4
    x = correlated(300, seed=1)
    plain, weighted = ((restored("klt2", x, given) - x)[..., 3].square().mean() for given in (None, importance))
    assert weighted < plain / 4


def test_how_tokens_are_cut_changes_no_byte() -> None:
    form = vector_format("klt2")
    tables = form.calibrate(correlated(500), torch.ones(HEADS, SIZE))
    x = correlated(40).transpose(0, 1)
    whole = form.encode(x, tables)
    assert torch.equal(whole, torch.cat([form.encode(part, tables) for part in x.split(7, dim=1)], dim=1))
    assert torch.equal(whole, form.encode(x.transpose(1, 2).contiguous().transpose(1, 2), tables))
    assert torch.equal(form.encode(x.expand(3, *x.shape), tables)[2], whole)


def test_more_than_eight_bits_are_refused() -> None:
    with pytest.raises(FormatError, match="at most 8 bits"):
        vector_format("klt8.5")
