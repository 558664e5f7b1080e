"""Vectors like those of a cache: heads with mixed channels of unlike size, and a mean."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.quant.vector_format import VectorForm, vector_format


def cached(tokens: int = 512, heads: int = 2, size: int = 32, seed: int = 0, *, mixed: bool = True) -> Tensor:
    """Float32 [tokens, heads, size]; channels are correlated if mixed."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.linspace(-2, 1, size).exp()[torch.randperm(size, generator=generator)]
    x = torch.randn(tokens, heads, size, generator=generator) * sizes
    if mixed:
        x = torch.einsum("nld,lde->nle", x, torch.randn(heads, size, size, generator=generator) / size**0.5)
    return x + torch.randn(heads, size, generator=generator)


def as_rows(x: Tensor) -> Tensor:
    """[N, L, D] as [1, L, N, D]."""
    return x.transpose(0, 1).unsqueeze(0).contiguous()


def tables_of(form: VectorForm, x: Tensor) -> tuple[Tensor, ...]:
    """Calibrated on x [N, L, D], every error counting the same."""
    return form.calibrate(x, torch.ones(x.shape[1:])) if form.tables else ()


def there_and_back(form: VectorForm | str, x: Tensor, calibration: Tensor | None = None) -> Tensor:
    """X [N, L, D] after storage, as [1, L, N, D]; calibrated on itself by default."""
    form = vector_format(form) if isinstance(form, str) else form
    tables = tables_of(form, x if calibration is None else calibration)
    return form.decode(form.encode(as_rows(x), tables), x.shape[-1], tables=tables)


def error(form: VectorForm | str, x: Tensor, calibration: Tensor | None = None) -> float:
    """The root of the mean squared error."""
    return float((there_and_back(form, x, calibration) - as_rows(x)).square().mean().sqrt())
