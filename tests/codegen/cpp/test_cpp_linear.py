"""Linear layers of every format and of odd sizes against their definition in float64, for every instruction set that runs here."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from qcompile.ir.lowered import KernelSpec
from qcompile.quant.format import parse_format
from qcompile.quant.reference import dequantize, quantize, unpack
from tests.codegen.cpp.harness import RUNNABLE, Kernels, library_of, randn
from tests.codegen.triton import specs

FORMATS = (
    "int4 g64 sym fp16", "int4 g32 asym fp16", "int4 g36 asym bf16", "int4 channel sym fp32", "int8 g64 sym fp16", "int8 channel asym fp16",
    "int2 g16 asym fp16",
)  # fmt: skip
SHAPES = ((48, 128), (33, 100), (17, 71), (1, 64))
ROWS = (1, 2, 3, 7, 13)
BIAS = (False, True)
CASES = [(form, *shape, rows) for form, shape, rows in product((*FORMATS, "fp32"), SHAPES, ROWS)]


def _spec(form: str, count: int, columns: int, rows: int, bias: bool) -> KernelSpec:
    bucket = "m1" if rows == 1 else "m2-63"
    if form == "fp32":
        return specs.linear(count, columns, bucket, "fp32", bias)
    return specs.quantized_linear(count, columns, bucket, form, "fp32", bias)


OPTIMIZED = ("int4 g32 asym fp16", "fp32")
"""Formats that are also tried as users get them, on the best instruction set."""


@cache
def _library(instruction_set: str, optimized: bool = False) -> Kernels:
    cases = [case for case in CASES if not optimized or case[0] in OPTIMIZED]
    return library_of((_spec(*case, bias=len(case[0]) % 2 == 0) for case in cases), instruction_set, "-O3" if optimized else "-O0")


def _weight(form: str, count: int, columns: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Operands, the matrix they stand for, and the magnitudes that its sums are made of, [N, K] in float64."""
    weight = randn(count, columns, seed=1)
    if form == "fp32":
        return {"weight": weight}, weight.double(), weight.double().abs()
    stored = parse_format(form)
    packed = quantize(weight, stored)
    bits, size = stored.element.bits, stored.granularity.group_size
    operands = {"codes": packed.codes, "scale": packed.scale} | ({} if packed.zero is None else {"zero": packed.zero})
    exact = dequantize(packed.codes, packed.scale, packed.zero, bits, size, columns, torch.float64)
    # Codes are summed as distances from the middle code, and so are zero points.
    middle = 1 << (bits - 1)
    distance = (unpack(packed.codes, bits, columns).double() - middle).abs() + (0 if packed.zero is None else middle)
    scales = packed.scale.double().abs().repeat_interleave(stored.granularity.size(columns), dim=1)[:, :columns]
    return operands, exact, distance * scales


@pytest.mark.parametrize("instruction_set", RUNNABLE)
@pytest.mark.parametrize(("form", "count", "columns", "rows"), CASES)
def test_linear_is_its_definition(form: str, count: int, columns: int, rows: int, instruction_set: str) -> None:
    operands, weight, magnitude = _weight(form, count, columns)
    bias = randn(count, seed=2) if len(form) % 2 == 0 else None
    x, out = randn(rows, columns, seed=3), torch.full((rows, count), torch.nan)
    spec = _spec(form, count, columns, rows, bias is not None)
    given = operands | {"x": x, "out": out} | ({} if bias is None else {"bias": bias})
    _library(instruction_set, form in OPTIMIZED and instruction_set == RUNNABLE[0])(spec, given)
    exact = x.double() @ weight.t() + (0 if bias is None else bias.double())
    # Each of the K products and sums rounds once, and so do scale and bias (N. Higham, Accuracy and Stability, 3.1).
    bound = (columns + 8) * 2.0**-24 * (x.double().abs() @ magnitude.t() + (0 if bias is None else bias.double().abs()))
    assert bool(((out - exact).abs() <= bound).all())


@pytest.mark.parametrize("instruction_set", RUNNABLE)
@pytest.mark.parametrize("form", ["int4 g32 asym fp16", "fp32"])
def test_a_row_knows_neither_its_neighbours_nor_the_threads(form: str, instruction_set: str) -> None:
    operands, _, _ = _weight(form, 48, 128)
    x, bias = randn(13, 128, seed=3), {"bias": randn(48, seed=2)} if len(form) % 2 == 0 else {}
    library, results = _library(instruction_set, instruction_set == RUNNABLE[0]), []
    for rows, threads in ((13, 1), (13, 2), (3, 2)):
        out = torch.empty(rows, 48)
        library(_spec(form, 48, 128, rows, bool(bias)), operands | bias | {"x": x[:rows], "out": out}, threads)
        results.append(out)
    single = torch.empty(1, 48)
    library(_spec(form, 48, 128, 1, bool(bias)), operands | bias | {"x": x[:1], "out": single})
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0][:3], results[2])
    assert torch.equal(results[0][:1], single)


def test_rows_may_lie_apart() -> None:
    operands, weight, _ = _weight("fp32", 33, 100)
    wide = randn(4, 7, 120, seed=4)
    x, out = wide[:, 2:5, :100], torch.empty(4, 3, 33)
    _library(RUNNABLE[0])(_spec("fp32", 33, 100, 12, True), operands | {"x": x, "out": out, "bias": torch.zeros(33)})
    torch.testing.assert_close(out, (x.double() @ weight.t()).float(), rtol=0, atol=1e-4)
