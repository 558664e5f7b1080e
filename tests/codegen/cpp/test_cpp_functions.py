"""Functions that kernels share, by themselves, in each instruction set: how far they are off."""

from __future__ import annotations

import pytest
import torch

from qcompile.codegen.cpp.build import build_libraries
from qcompile.codegen.cpp.entry import kernels_source
from qcompile.runtime.native.library import Library
from qcompile.runtime.native.program import table_of
from tests.codegen.cpp.harness import RUNNABLE

POWERS = """
extern "C" void powers(const Tensor* tensors, int64_t) {
    for (int64_t at = 0; at < tensors[0].count(); at += LANES)
        store(tensors[1].at<float>() + at, exp2_inside(load(tensors[0].at<float>() + at)));
}
"""


@pytest.mark.parametrize("instruction_set", RUNNABLE)
def test_powers_of_2_are_within_two_and_a_half_units(instruction_set: str) -> None:
    ((name, code),) = build_libraries(kernels_source([], "Powers.") + POWERS, [instruction_set]).items()
    exponents = torch.cat([torch.linspace(-126, 0, 1 << 20), torch.tensor([-126.0, -1.5, -0.5, -0.49991, -0.0, 127.0] + [0.0] * 10)])
    made = torch.empty_like(exponents)
    table = table_of([exponents, made])
    Library(name, code).entry("powers")(table.data_ptr(), 1)
    exact = torch.exp2(exponents.double())
    unit = torch.exp2(exact.log2().floor() - 23)
    assert ((made.double() - exact).abs() / unit).max() < 2.5
    whole = exponents == exponents.round()
    assert torch.equal(made[whole].double(), exact[whole])
