"""Principal directions: the best of their rank, better the more there are, exact with all of them."""

from __future__ import annotations

import pytest
import torch

from qcompile.quant.vector_format import vector_format
from tests.quant.vectors.samples import as_rows, cached, error, tables_of


@pytest.mark.parametrize(
    ("text", "size", "width"),
    [("pca48 int4 g48 sym", 64, 26), ("pca3/4 int4 g16 sym", 64, 30), ("pca3/4 int4 g16 sym", 8, 5), ("pca2/3 int8 sym", 16, 13)],
)
def test_width_is_that_of_the_coordinates(text: str, size: int, width: int) -> None:
    assert vector_format(text).width(size) == width


def test_error_falls_with_the_rank() -> None:
    x = cached()
    errors = [error(f"pca{rank} int8 sym", x) for rank in (1, 4, 8, 16, 24, 30)]
    assert errors == sorted(errors, reverse=True)


def test_all_directions_with_fine_coordinates_are_near_exact() -> None:
    x = cached()
    # Half a step of int8 over a vector of norm n is at most n / 254; the basis adds float16's rounding, per direction.
    lost = (vector_format("pca32 int8 sym"), x)
    spread = float((x - x.mean(0)).square().mean().sqrt())
    assert error(*lost) < 0.02 * spread


@pytest.mark.parametrize("rank", [4, 16, 24])
def test_no_basis_of_the_rank_fits_the_calibration_data_better(rank: int) -> None:
    x = cached(heads=1)
    basis, mean = (table.double() for table in tables_of(vector_format(f"pca{rank} int8 sym"), x))
    centred = x[:, 0].double() - mean

    def left(directions: torch.Tensor) -> float:
        return float((centred - centred @ directions @ directions.T).square().sum())

    spectrum = torch.linalg.svdvals(x[:, 0].double() - x[:, 0].double().mean(0)).square()
    torch.testing.assert_close(left(basis[0]), float(spectrum[rank:].sum()), rtol=2e-3, atol=0)
    for seed in range(20):
        noise = torch.randn(32, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert left(basis[0]) < left(torch.linalg.qr(noise).Q)
        assert left(basis[0]) < left(torch.linalg.qr(basis[0] + 0.05 * noise).Q)


def test_the_basis_is_orthonormal_to_float16() -> None:
    basis, _ = tables_of(vector_format("pca12 int4 sym"), cached())
    torch.testing.assert_close(basis.float().mT @ basis.float(), torch.eye(12).expand(2, 12, 12), rtol=0, atol=2**-10)


def test_vectors_in_the_span_come_back_within_a_step() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.einsum("nlr,lrd->nld", torch.randn(300, 2, 3, generator=generator), torch.randn(2, 3, 32, generator=generator)) + 5
    form = vector_format("pca3 int8 sym")
    tables = tables_of(form, x)
    lost = form.decode(form.encode(as_rows(x), tables), 32, tables=tables) - as_rows(x)
    norms = (as_rows(x) - tables[1].float().unsqueeze(-2)).norm(dim=-1)
    assert (lost.norm(dim=-1) <= norms * (3**0.5 * 0.5 / 127 + 2**-9)).all()
