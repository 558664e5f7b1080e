"""The low-rank vector that keys and values share: exact where nothing is left out, and never worse than rounding would be."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.quant.latents import shared_latent
from qcompile.quant.vector_format import vector_format


def weights(keys: int, values: int, size: int, rank: int) -> tuple[Tensor, Tensor]:
    """Of this rank together; values are a hundredth of keys."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(rank, size, generator=generator)
    return torch.randn(keys, rank, generator=generator) @ shared, 0.01 * torch.randn(values, rank, generator=generator) @ shared


def test_a_shared_rank_is_found_and_loses_nothing() -> None:
    k, v = weights(32, 32, 96, 16)
    latent = shared_latent(k, v, None, vector_format("int8 g8 sym"))
    assert latent.down.shape == (16, 96)
    assert latent.lost < 1e-12
    torch.testing.assert_close(latent.keys @ latent.down, k, rtol=0, atol=1e-4)
    torch.testing.assert_close(latent.values @ latent.down, v, rtol=0, atol=1e-6)


def test_more_bits_keep_more_numbers_and_what_is_lost_is_what_is_left_out() -> None:
    k, v = weights(64, 64, 128, 128)
    fading = torch.diag(0.9 ** torch.arange(128))  # directions of x that are seldom taken
    latents = [shared_latent(k, v, fading, vector_format(f"int{bits} g8")) for bits in (2, 4, 8)]
    ranks = [len(latent.down) for latent in latents]
    assert ranks[0] < ranks[1] < ranks[2] <= 128
    x = fading.double().sqrt()  # its columns have the moment that was given
    for latent in latents:
        shares = []
        for weight, up in ((k, latent.keys), (v, latent.values)):
            whole = weight.double() @ x
            shares.append(float((whole - up.double() @ latent.down.double() @ x).square().sum() / whole.square().sum()))
        assert abs(sum(shares) / 2 - latent.lost) < 1e-6
        assert max(shares) < 4 * min(shares) + 1e-9  # values are small, not unimportant


def test_what_is_left_out_costs_at_most_what_rounding_costs() -> None:
    k, v = weights(64, 64, 128, 128)
    fading = torch.diag(0.9 ** torch.arange(128))
    form = vector_format("int3 g8")
    latent = shared_latent(k, v, fading, form)
    x = torch.randn(2000, 128, generator=torch.Generator().manual_seed(1)) * fading.diagonal().sqrt()
    exact = x @ latent.down.T
    stored = form.decode(form.encode(exact), exact.shape[1])
    rounding = sum(
        float(((stored - exact) @ up.T).square().sum() / (x @ weight.T).square().sum()) / 2
        for weight, up in ((k, latent.keys), (v, latent.values))
    )
    assert 0 < latent.lost < 1.2 * rounding  # 1.2: the budget is measured on other draws
