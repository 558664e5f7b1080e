"""The patched interpreter itself: bfloat16 and float8 as torch and the GPU have them."""

from __future__ import annotations

import torch

from tests.codegen.triton.interpreted.interpreter import narrow, narrow_float8, widen, widen_float8


def test_bfloat16_rounds_to_nearest_even_as_torch_does() -> None:
    torch.manual_seed(0)
    edges = torch.tensor([0.0, -0.0, 1.00390625, 1.01171875, 3.4e38, 1e-40, torch.inf, -torch.inf])
    numbers = torch.cat((torch.randn(4096) * 10.0 ** torch.randint(-30, 30, (4096,)), edges))
    expected = numbers.to(torch.bfloat16)
    bits = torch.from_numpy(narrow(numbers.numpy()).view("int16"))
    assert torch.equal(bits, expected.view(torch.int16))
    assert torch.equal(torch.from_numpy(widen(bits.numpy().view("uint16"))), expected.float())
    assert torch.isnan(torch.from_numpy(widen(narrow(torch.tensor([torch.nan]).numpy()))))


def test_float8_rounds_to_nearest_even_with_carry_and_saturates() -> None:
    """15.75 rounds up into the next power of two: the carry that the unpatched interpreter loses."""
    torch.manual_seed(0)
    edges = torch.tensor([0.0, -0.0, 15.75, -15.75, 17.0, 19.0, 2.0**-9, 2.0**-10, 1.5 * 2.0**-9, 448.0, 463.9, 500.0, -1e9, torch.inf])
    numbers = torch.cat((torch.randn(4096) * 10.0 ** torch.randint(-4, 3, (4096,)), edges))
    bits = torch.from_numpy(narrow_float8(numbers.numpy()))
    assert torch.equal(bits, numbers.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
    decoded = torch.from_numpy(widen_float8(bits.numpy()))
    assert decoded[-14:].tolist() == [0.0, -0.0, 16.0, -16.0, 16.0, 20.0, 2.0**-9, 0.0, 2.0**-8, 448.0, 448.0, 448.0, -448.0, 448.0]
    bounded = numbers.clamp(-448, 448)
    assert bool(((decoded - bounded).abs() <= bounded.abs() / 16 + 2.0**-10).all())
    assert torch.isnan(torch.from_numpy(widen_float8(narrow_float8(torch.tensor([torch.nan]).numpy()))))
