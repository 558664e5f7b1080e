"""The patched interpreter itself: bfloat16 as torch has it."""

from __future__ import annotations

import torch

from tests.codegen.triton.interpreted.interpreter import narrow, widen


def test_bfloat16_rounds_to_nearest_even_as_torch_does() -> None:
    torch.manual_seed(0)
    edges = torch.tensor([0.0, -0.0, 1.00390625, 1.01171875, 3.4e38, 1e-40, torch.inf, -torch.inf])
    numbers = torch.cat((torch.randn(4096) * 10.0 ** torch.randint(-30, 30, (4096,)), edges))
    expected = numbers.to(torch.bfloat16)
    bits = torch.from_numpy(narrow(numbers.numpy()).view("int16"))
    assert torch.equal(bits, expected.view(torch.int16))
    assert torch.equal(torch.from_numpy(widen(bits.numpy().view("uint16"))), expected.float())
    assert torch.isnan(torch.from_numpy(widen(narrow(torch.tensor([torch.nan]).numpy()))))
