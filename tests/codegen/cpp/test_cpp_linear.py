"""Linear layers of every format and of odd sizes against their definition in float64, for every instruction set that runs here."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from qcompile.codegen.cpp.backend import CppBackend
from qcompile.codegen.cpp.tiles import RUN
from qcompile.ir.lowered import KernelSpec
from qcompile.quant.format import QuantFormat, parse_format
from qcompile.quant.levels import decode
from qcompile.quant.reference import Quantized, per_column, quantize, restore, unpack
from qcompile.quant.scales import effective
from tests.codegen.cpp.harness import RUNNABLE, Kernels, library_of, randn
from tests.codegen.triton import specs

FORMATS = (
    "int4 g64 sym fp16", "int4 g32 asym fp16", "int4 g36 asym bf16", "int4 channel sym fp32", "int8 g64 sym fp16", "int8 channel asym fp16",
    "int2 g16 asym fp16", "int3 g32 sym fp16", "int3 g20 asym fp16", "int5 g32 min fp16", "int6 g24 asym fp32", "int7 channel sym bf16",
    "int4 g32 min fp16", "int8 g100 min bf16", "int4 g16 sym int8/3", "int8 g32 sym e8m0", "fp4 g32 sym e8m0", "fp4 g16 sym e4m3",
    "nf4 g64 sym int8", "nf4 g20 sym fp16", "fp8 g32 sym e8m0", "fp8 channel sym fp32",
)  # fmt: skip
SHAPES = ((48, 128), (33, 100), (17, 71))
ROWS = (1, 3, 7, 13)
BIAS = (False, True)
CASES = [(form, *shape, rows) for form, shape, rows in product((*FORMATS, "fp32"), SHAPES, ROWS)]


def _spec(form: str, count: int, columns: int, rows: int, bias: bool) -> KernelSpec:
    bucket = "m1" if rows == 1 else "m2-63"
    if form == "fp32":
        return specs.linear(count, columns, bucket, "fp32", bias)
    made = specs.quantized_linear(count, columns, bucket, form, "fp32", bias)
    return specs.with_format(made, zero=form.split()[3]) if " min " in form else made


def _embedding(form: str, count: int, columns: int) -> KernelSpec:
    formats = dict(_spec(form, count, columns, 1, False).formats) | {"indices": "i64"}
    del formats["x"]
    return specs.spec("quantized_embedding", sizes={"N": count, "K": columns}, formats=formats)


OPTIMIZED = ("int4 g32 asym fp16", "fp32")
"""Formats that are also tried as users get them, on the best instruction set."""


@cache
def _library(instruction_set: str, optimized: bool = False) -> Kernels:
    cases = [case for case in CASES if not optimized or case[0] in OPTIMIZED]
    made = [_spec(*case, bias=len(case[0]) % 2 == 0) for case in cases]
    tables = [] if optimized else [_embedding(form, *shape) for form, shape in product(FORMATS, SHAPES)]
    plain = [] if optimized else [_spec(form, 48, 128, 3, False) for form in FORMATS]
    return library_of([*made, *tables, *plain], instruction_set, "-O3" if optimized else "-O0")


def _weight(form: str, count: int, columns: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Operands, the matrix they stand for, and the magnitudes that its sums are made of, [N, K] in float64."""
    weight = randn(count, columns, seed=1)
    if form == "fp32":
        return {"weight": weight}, weight.double(), weight.double().abs()
    stored = parse_format(form)
    packed = quantize(weight, stored)
    parts = {"codes": packed.codes, "scale": packed.scale, "zero": packed.zero, "scale2": packed.scale2}
    operands = {name: part for name, part in parts.items() if part is not None}
    exact = restore(packed, stored, columns, torch.float64)
    return operands, exact, _magnitudes(packed, stored, columns)


def _magnitudes(packed: Quantized, form: QuantFormat, columns: int) -> Tensor:
    """What is multiplied with x: a number, and the distance of its zero point from the middle code; a code, and the minimum."""
    element, size = form.element, form.granularity.size(columns)
    codes, groups = unpack(packed.codes, element.bits, columns), form.granularity.groups(columns)
    scale = per_column(effective(packed.scale, packed.scale2, torch.float64).abs(), size, columns)
    if packed.zero is None:
        return decode(codes, element, None, torch.float64).abs() * scale
    if form.minimum:
        return codes.double() * scale + per_column(packed.zero.double().abs(), size, columns)
    zero = per_column(unpack(packed.zero, element.bits, groups).double(), size, columns)
    return ((codes.double() + element.low).abs() + (zero + element.low).abs()) * scale


def _shared(x: Tensor, size: int) -> Tensor:
    """The largest magnitude among the numbers of x [M, K] that share an exponent, for each of them."""
    largest = torch.empty_like(x)
    for group in range(0, x.shape[1], size):
        last = min(group + size, x.shape[1])
        for first in range(group, last, RUN):
            run = slice(first, min(first + RUN, last))
            largest[:, run] = x[:, run].abs().amax(1, keepdim=True)
    return largest


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
    assert bool(((out - exact).abs() <= _bound(form, x, magnitude, bias)).all())


def _bound(form: str, x: Tensor, magnitude: Tensor, bias: Tensor | None) -> Tensor:
    """Each of K products and sums rounds once, and so do scale and bias (N. Higham, Accuracy and Stability, 3.1).

    For codes that are integers numbers of x move by half a unit, 2^-22.9 of the largest of their run at most; sums of integers are exact.
    """
    columns = x.shape[1]
    bound = (columns + 8) * 2.0**-24 * (x.double().abs() @ magnitude.t() + (0 if bias is None else bias.double().abs()))
    if form.startswith(("fp32", "nf4", "fp8")):
        return bound
    stored = parse_format(form)
    groups = stored.granularity.groups(columns)
    moved = 2.0**-22.9 * (_shared(x, stored.granularity.size(columns)).double() @ magnitude.t())
    return bound * (groups + 8 + columns // RUN) / (columns + 8) + moved


@pytest.mark.parametrize("instruction_set", RUNNABLE)
@pytest.mark.parametrize("form", FORMATS)
def test_an_embedding_has_the_bits_of_its_definition(form: str, instruction_set: str) -> None:
    for count, columns in SHAPES:
        operands, _, _ = _weight(form, count, columns)
        indices, out = torch.tensor([[0, count - 1, 3], [count // 2, 1, 1]]), torch.full((2, 3, columns), torch.nan)
        _library(instruction_set)(_embedding(form, count, columns), operands | {"indices": indices, "out": out})
        stored = parse_format(form)
        table = restore(quantize(randn(count, columns, seed=1), stored), stored, columns)
        assert torch.equal(out, table[indices])


@pytest.mark.parametrize("instruction_set", RUNNABLE)
@pytest.mark.parametrize("form", ["int4 g32 asym fp16", "int4 g32 min fp16", "fp4 g32 sym e8m0", "nf4 g20 sym fp16"])
def test_what_is_no_number_stays_none(form: str, instruction_set: str) -> None:
    operands, _, _ = _weight(form, 48, 128)
    for value in (torch.nan, torch.inf):
        x, out = randn(3, 128, seed=3), torch.zeros(3, 48)
        x[1, 40] = value
        _library(instruction_set)(_spec(form, 48, 128, 3, False), operands | {"x": x, "out": out})
        assert not bool(torch.isfinite(out[1]).any()) or form.startswith("nf4")
        assert bool(torch.isfinite(out[::2]).all())


@pytest.mark.parametrize("instruction_set", RUNNABLE)
@pytest.mark.parametrize("scale", [2.0**-120, 2.0**-20, 2.0**100, 1.9999999])
def test_activations_of_any_size(scale: float, instruction_set: str) -> None:
    operands, weight, magnitude = _weight("int4 g64 sym fp16", 48, 128)
    x, out = (randn(3, 128, seed=3).clamp(-1, 1) * scale).float(), torch.zeros(3, 48)
    x[2] = 0
    _library(instruction_set)(_spec("int4 g64 sym fp16", 48, 128, 3, False), operands | {"x": x, "out": out})
    # Below 2^-103 integers are multiples of 2^-125, the least normal number but one.
    bound = _bound("int4 g64 sym fp16", x, magnitude, None) + 2.0**-126 * magnitude.sum(1)
    assert bool(((out - x.double() @ weight.t()).abs() <= bound).all())


def test_a_row_that_does_not_fit_is_refused() -> None:
    assert "K=40000: expected at most 32768" in str(CppBackend().refuses(_spec("int4 g32 min fp16", 16, 40000, 1, False)))
    mixed = specs.with_format(_spec("int4 g32 min fp16", 16, 64, 1, False), zero="uint8")
    assert "zero is uint8: expected fp16" in str(CppBackend().refuses(mixed))


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
    """Then they give the bits of rows that do not, which `test_linear_is_its_definition` judges."""
    operands = _weight("fp32", 33, 100)[0] | {"bias": torch.zeros(33)}
    x = randn(4, 7, 120, seed=4)[:, 2:5, :100]
    apart, together = torch.empty(4, 3, 33), torch.empty(4, 3, 33)
    for given, out in ((x, apart), (x.contiguous(), together)):
        _library(RUNNABLE[0])(_spec("fp32", 33, 100, 12, True), operands | {"x": given, "out": out})
    assert torch.equal(apart, together)
