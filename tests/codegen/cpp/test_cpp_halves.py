"""Kernels over values of 16 bits: what they give is the result of float32 arithmetic, rounded once where the operator ends.

Bounds are those of the float32 kernels plus half a unit of the stored type's last place; what is fused gives the bits of its parts.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from qcompile.ir import activation_ops as _activation_ops  # noqa: F401  registers operators of quantized activations
from qcompile.ir import hadamard_ops as _hadamard_ops  # noqa: F401  registers the rotation
from qcompile.ir.lowered import KernelSpec
from qcompile.ir.ops import ACTIVATIONS
from qcompile.quant.format import parse_format
from qcompile.quant.hadamard import hadamard_factors, mixing_matrix
from qcompile.quant.reference import dequantize, quantize
from tests.codegen.cpp.harness import RUNNABLE, Kernels, library_of, randn
from tests.codegen.triton import specs
from tests.codegen.triton.specs import spec

qcompile = torch.ops.qcompile
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
UNIT = 2.0**-24
COLUMNS = 37
LINEARS = [("plain", *shape) for shape in ((33, 100), (48, 128), (17, 71), (16, 300))]
LINEARS += [("int4 g32 asym fp16", 33, 100), ("int8 channel sym fp32", 17, 71)]
ROWS = (1, 3, 13, 70)
FORM = "int8 channel sym fp32"
PACKED = "int4 g10 asym"
each = pytest.mark.parametrize("instruction_set", RUNNABLE)
kinds = pytest.mark.parametrize("kind", DTYPES)


def half_unit(kind: str) -> float:
    """What rounding to the stored type moves a number by, beside its magnitude."""
    return float(torch.finfo(DTYPES[kind]).eps) / 2


def assert_rounded(made: Tensor, exact: Tensor, before: Tensor) -> None:
    """`made` is within `before` (the error in float32) of the exact result, and rounded once."""
    kind = next(name for name, dtype in DTYPES.items() if dtype == made.dtype)
    bound = before + half_unit(kind) * (exact.abs() + before) + float(torch.finfo(made.dtype).smallest_normal)
    excess = (made.double() - exact).abs() - bound
    assert bool((excess <= 0).all()), f"by {float(excess.max())}"


def _formats(kind: str, *operands: str, **others: str) -> dict[str, str | None]:
    return dict.fromkeys(operands, kind) | others


def _norm(kind: str, summed: bool) -> KernelSpec:
    return specs.rms_norm(COLUMNS, kind, residual=summed, offset=1.0)


def _layer_norm(kind: str) -> KernelSpec:
    return spec("layer_norm", sizes={"K": COLUMNS}, formats=_formats(kind, "x", "weight", "bias", "out"), eps=1e-5)


def _activation(kind: str) -> KernelSpec:
    return spec("activation", sizes={"K": COLUMNS}, formats=_formats(kind, "x", "out"), activation="gelu")


def _gated(kind: str) -> KernelSpec:
    return spec("gated_activation", sizes={"I": 96}, formats=_formats(kind, "gate", "up", "out"), activation="silu")


def _add(kind: str) -> KernelSpec:
    return spec("add", sizes={"K": COLUMNS}, formats=_formats(kind, "x", "y", "out"))


def _table(kind: str) -> KernelSpec:
    formats = _formats(kind, "out", "out1", positions="i64", inv_freq="fp32")
    return spec("rotary_table", sizes={"F": 10}, formats=formats, scaling=1.25)


def _rope(kind: str) -> KernelSpec:
    return spec("rope", sizes={"H": 3, "R": 20}, formats=_formats(kind, "x", "cos", "sin", "out"))


def _embedding(kind: str) -> KernelSpec:
    return spec("embedding", sizes={"N": 35, "K": 21}, formats=_formats(kind, "weight", "out", indices="i64"))


def _gather(kind: str) -> KernelSpec:
    return specs.gather_last(9, kind)


def _append(kind: str, stored: str) -> KernelSpec:
    formats = _formats(kind, "k", "v", keys=stored, values=stored, page_table="i32", positions="i64")
    return spec("cache_append_", sizes={"L": 2, "D": 20}, formats=formats)


def _attend(kind: str, stored: str) -> KernelSpec:
    formats = _formats(kind, "q", "sinks", "out", keys=stored, values=stored, page_table="i32", positions="i64")
    return spec("cache_attend", "m1", sizes={"H": 4, "L": 2, "D": 20}, formats=formats, scale=0.25)


def _append_packed(kind: str) -> KernelSpec:
    formats = _formats(kind, "k", "v", keys="uint8", values="uint8", page_table="i32", positions="i64")
    return spec("append_packed_", sizes={"L": 2, "D": 20}, formats=formats, k_form=PACKED, v_form=PACKED)


def _attend_packed(kind: str) -> KernelSpec:
    formats = _formats(kind, "q", "out", keys="uint8", values="uint8", page_table="i32", positions="i64")
    return spec("cache_attend_packed", "m1", sizes={"H": 4, "L": 2, "D": 20}, formats=formats, k_form=PACKED, v_form=PACKED, scale=0.25)


def _quantized(kind: str, producer: str) -> KernelSpec:
    sources = {"gated": ("gate", "up"), "add_norm": ("x", "residual", "weight"), "norm": ("x", "weight")}.get(producer, ("x",))
    order = hadamard_factors(48)[0]
    formats = _formats(kind, *sources) | ({"matrix": "fp32"} if producer else {})
    codes = ["i8", "fp32"] if producer else ["i8", "fp16"]
    formats |= {f"out{place or ''}": name for place, name in enumerate(([kind] if producer == "add_norm" else []) + codes)}
    options = {"eps": 1e-5, "offset": 0.0} if "norm" in producer else {"activation": "silu"} if producer == "gated" else {}
    options |= {"hadamard_size": 48} if producer else {}
    sizes = {"K": 96} | ({"M": order} if producer else {})
    name = f"{producer}_quantize" if producer else "quantize_activation"
    return spec(name, sizes=sizes, formats=formats, bits=8, group_size=-1 if producer else 36, **options)


def _hadamard(kind: str) -> KernelSpec:
    sizes = {"K": 96, "M": hadamard_factors(48)[0]}
    return spec("hadamard", sizes=sizes, formats=_formats(kind, "x", "out", matrix="fp32"), hadamard_size=48)


def _linear(kind: str, form: str, count: int, columns: int, rows: int) -> KernelSpec:
    bucket = "m1" if rows == 1 else "m2-63"
    if form == "plain":
        return specs.linear(count, columns, bucket, kind, bias=True)
    return specs.quantized_linear(count, columns, bucket, form, kind, bias=True)


def _integer(kind: str, rows: int) -> KernelSpec:
    formats = _formats(kind, "bias", "out", codes="i8", scale="fp32", w_codes=FORM, w_scale="fp32")
    return spec("integer_linear", "m1" if rows == 1 else "m2-63", sizes={"N": 33, "K": 71}, formats=formats, group_size=-1, static=False)


PRODUCERS = ("norm", "add_norm", "gated", "hadamard")


@cache
def library(instruction_set: str) -> Kernels:
    """The kernels of this file."""
    found = []
    for kind in DTYPES:
        found += [make(kind) for make in (_layer_norm, _activation, _gated, _add, _table, _rope, _embedding, _gather, _hadamard)]
        found += [_norm(kind, summed) for summed in (False, True)] + [_quantized(kind, name) for name in ("", *PRODUCERS)]
        found += [specs.rms_norm(96, kind), specs.rms_norm(96, kind, residual=True), _append_packed(kind), _attend_packed(kind)]
        found += [make(kind, stored) for stored in (kind, "fp32") for make in (_append, _attend)]
        found += [_linear(kind, *case, rows) for case in LINEARS for rows in ROWS] + [_integer(kind, rows) for rows in (1, 5)]
    return library_of(found, instruction_set, "-O0")


def half(kind: str, *shape: int, seed: int = 0) -> Tensor:
    """Normal numbers as they are stored."""
    return randn(*shape, seed=seed).to(DTYPES[kind])


def empty(kind: str, *shape: int) -> Tensor:
    """What a kernel is to fill."""
    return torch.full(shape, torch.nan, dtype=DTYPES[kind])


@each
@kinds
def test_norms(kind: str, instruction_set: str) -> None:
    x, residual, weight, bias = (half(kind, *shape, seed=seed) for seed, shape in enumerate(((2, 3, 37), (2, 3, 37), (37,), (37,))))
    out, out1 = empty(kind, 2, 3, 37), empty(kind, 2, 3, 37)
    run = library(instruction_set)
    for summed in (False, True):
        run(_norm(kind, summed), {"x": x, "residual": residual, "weight": weight, "out": out, "out1": out1})
        total = x + residual if summed else x
        assert not summed or torch.equal(out, total)
        exact = qcompile.rms_norm(total.double(), weight.double(), 1e-5, 1.0)
        assert_rounded(out1 if summed else out, exact, (37 / 4 + 12) * UNIT * exact.abs())
    run(_layer_norm(kind), {"x": x, "weight": weight, "bias": bias, "out": out})
    plain = torch.nn.functional.layer_norm(x.double(), (37,), eps=1e-5)
    exact = plain * weight.double() + bias.double()
    assert_rounded(out, exact, (37 + 12) * UNIT * ((plain.abs() + 1) * weight.double().abs() + bias.double().abs()))


@each
@kinds
def test_what_computes_each_number_by_itself(kind: str, instruction_set: str) -> None:
    x, y, out, run = 4 * half(kind, 2, 3, 37), half(kind, 2, 3, 37, seed=1), empty(kind, 2, 3, 37), library(instruction_set)
    run(_add(kind), {"x": x, "y": y, "out": out})
    assert torch.equal(out, x + y)
    run(_activation(kind), {"x": x, "out": out})
    assert_rounded(out, ACTIVATIONS["gelu"](x.double()), 8 * UNIT * x.double().abs())
    gate, up, gated = 4 * half(kind, 3, 96), half(kind, 3, 96, seed=1), empty(kind, 3, 96)
    run(_gated(kind), {"gate": gate, "up": up, "out": gated})
    assert_rounded(gated, ACTIVATIONS["silu"](gate.double()) * up.double(), 8 * UNIT * (gate.double() * up.double()).abs())


@each
@kinds
def test_rotary_positions_and_rows(kind: str, instruction_set: str) -> None:
    positions, frequencies, run = torch.tensor([[0, 1, 500], [7, -1, 3]]), 10000.0 ** -(torch.arange(10) / 10.0), library(instruction_set)
    cos, sin, x, out = empty(kind, 2, 3, 20), empty(kind, 2, 3, 20), half(kind, 2, 3, 3, 20).transpose(1, 2), empty(kind, 2, 3, 3, 20)
    run(_table(kind), {"positions": positions, "inv_freq": frequencies, "out": cos, "out1": sin})
    for made, exact in zip((cos, sin), qcompile.rotary_table(positions, frequencies, 1.25, torch.float32), strict=True):
        assert_rounded(made, exact.double(), torch.full_like(exact, 4 * UNIT))
    run(_rope(kind), {"x": x, "cos": cos, "sin": sin, "out": out})
    exact = qcompile.rope(x.double(), cos.double(), sin.double())
    assert_rounded(out, exact, torch.full_like(exact, 4 * UNIT * 1.25 * float(x.abs().max())))
    table, indices, rows = half(kind, 35, 21), torch.tensor([[0, 34, 16], [15, 3, 3]]), empty(kind, 2, 3, 21)
    run(_embedding(kind), {"weight": table, "indices": indices, "out": rows})
    assert torch.equal(rows, table[indices])
    tokens, last = half(kind, 2, 3, 9), empty(kind, 2, 1, 9)
    run(_gather(kind), {"x": tokens, "positions": positions, "out": last})
    assert torch.equal(last, qcompile.gather_last(tokens, positions))


@each
@kinds
@pytest.mark.parametrize("stored", ["same", "fp32"])
def test_the_cache(kind: str, stored: str, instruction_set: str) -> None:
    stored, run = kind if stored == "same" else stored, library(instruction_set)
    keys, values = (randn(6, 2, 16, 20, seed=seed).to(DTYPES.get(stored, torch.float32)) for seed in (5, 6))
    pages, positions = torch.tensor([[3, 1], [2, 5]], dtype=torch.int32), torch.tensor([[17, 18, 19], [-1, 3, 4]])
    k, v, q = (half(kind, 2, 3, heads, 20, seed=seed).transpose(1, 2) for heads, seed in ((2, 7), (2, 8), (4, 9)))
    expected = keys.clone(), values.clone()
    qcompile.cache_append_(*expected, k, v, pages, positions)
    places = {"keys": keys, "values": values, "page_table": pages, "positions": positions}
    run(_append(kind, stored), places | {"k": k, "v": v})
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])
    sinks, out = half(kind, 4, seed=10), empty(kind, 2, 4, 3, 20)
    run(_attend(kind, stored), places | {"q": q, "sinks": sinks, "out": out})
    exact = qcompile.cache_attend(q.double(), keys, values, pages, positions, 0.25, 0, 0.0, sinks.double())
    assert_rounded(out, exact, torch.full_like(exact, (12 * 20 / 4 + 40) * UNIT * float(values.abs().max())))


@each
@kinds
def test_the_packed_cache(kind: str, instruction_set: str) -> None:
    run, width = library(instruction_set), qcompile.pack_vectors(half(kind, 1, 1, 1, 20), PACKED).shape[-1]
    keys, values = (torch.zeros(6, 2, 16, width, dtype=torch.uint8) for _ in range(2))
    pages, positions = torch.tensor([[3, 1], [2, 5]], dtype=torch.int32), torch.arange(3).repeat(2, 1)
    k, v, q = (half(kind, 2, 3, heads, 20, seed=seed).transpose(1, 2) for heads, seed in ((2, 7), (2, 8), (4, 9)))
    expected = keys.clone(), values.clone()
    qcompile.append_packed_(*expected, k, v, pages, positions, PACKED, PACKED)
    places = {"keys": keys, "values": values, "page_table": pages, "positions": positions}
    run(_append_packed(kind), places | {"k": k, "v": v})
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])
    out = empty(kind, 2, 4, 3, 20)
    run(_attend_packed(kind), places | {"q": q, "out": out})
    exact = qcompile.cache_attend_packed(q.double(), keys, values, pages, positions, PACKED, PACKED, 0.25)
    assert_rounded(out, exact, torch.full_like(exact, (12 * 20 / 4 + 40) * UNIT * 16 * float(v.abs().max())))


@each
@kinds
def test_codes_are_the_definition_s(kind: str, instruction_set: str) -> None:
    x, codes, scale = half(kind, 5, 96), torch.empty(5, 96, dtype=torch.int8), torch.empty(5, 3, dtype=torch.float16)
    library(instruction_set)(_quantized(kind, ""), {"x": x, "out": codes, "out1": scale})
    expected = qcompile.quantize_activation(x, 8, 36)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scale, expected[1])


@each
@kinds
@pytest.mark.parametrize("producer", PRODUCERS)
def test_what_is_fused_gives_the_bits_of_its_parts(producer: str, kind: str, instruction_set: str) -> None:
    run, matrix = library(instruction_set), mixing_matrix(hadamard_factors(48)[0])
    given = {name: half(kind, 5, 96, seed=seed) for seed, name in enumerate(("x", "residual", "gate", "up"))}
    given |= {"weight": half(kind, 96, seed=9), "matrix": matrix}
    codes, scale, total = torch.empty(5, 96, dtype=torch.int8), torch.empty(5, 1), empty(kind, 5, 96)
    names = {"out": total, "out1": codes, "out2": scale} if producer == "add_norm" else {"out": codes, "out1": scale}
    run(_quantized(kind, producer), given | names)
    part, summed = empty(kind, 5, 96), empty(kind, 5, 96)
    if producer == "gated":
        run(_gated(kind), given | {"out": part})
    elif producer == "add_norm":
        run(specs.rms_norm(96, kind, residual=True), given | {"out": summed, "out1": part})
        assert torch.equal(total, summed)
    elif producer == "norm":
        run(specs.rms_norm(96, kind), given | {"out": part})
    else:
        part = given["x"]
    rotated = empty(kind, 5, 96)
    run(_hadamard(kind), {"x": part, "matrix": matrix, "out": rotated})
    expected = qcompile.quantize_activation(rotated, 8, -1)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scale, expected[1])


@each
@kinds
@pytest.mark.parametrize(("form", "count", "columns"), LINEARS)
def test_linear(form: str, count: int, columns: int, kind: str, instruction_set: str) -> None:
    stored, bias, run = half(kind, count, columns, seed=1), half(kind, count, seed=2), library(instruction_set)
    operands, weight, magnitude = {"weight": stored}, stored.double(), stored.double().abs()
    if form != "plain":
        parts = quantize(stored.float(), parse_format(form))
        operands = {"codes": parts.codes, "scale": parts.scale} | ({} if parts.zero is None else {"zero": parts.zero})
        bits, size = parse_format(form).element.bits, parse_format(form).granularity.group_size
        weight = dequantize(parts.codes, parts.scale, parts.zero, bits, size, columns, torch.float64)
        magnitude = weight.abs() + (1 << bits) * parts.scale.double().abs().max()  # codes and zero points are summed by themselves
    x, results = half(kind, max(ROWS), columns, seed=3), []
    for rows in ROWS:
        results.append(empty(kind, rows, count))
        run(_linear(kind, form, count, columns, rows), operands | {"x": x[:rows], "bias": bias, "out": results[-1]}, threads=rows % 3 + 1)
        exact = x[:rows].double() @ weight.t() + bias.double()
        # Each of the K products and sums rounds once, and so do scale and bias.
        before = (columns + 8) * UNIT * (x[:rows].double().abs() @ magnitude.t() + bias.double().abs())
        assert_rounded(results[-1], exact, before)
    assert all(torch.equal(results[-1][: len(result)], result) for result in results)


@each
@kinds
@pytest.mark.parametrize("rows", [1, 5])
def test_integer_products_are_rounded_once(rows: int, kind: str, instruction_set: str) -> None:
    parts, x, bias = quantize(randn(33, 71), parse_format(FORM)), half(kind, rows, 71, seed=1), half(kind, 33, seed=2)
    codes, scale = qcompile.quantize_activation(x, 8, -1)
    given = {"codes": codes, "scale": scale, "w_codes": parts.codes, "w_scale": parts.scale, "bias": bias, "out": empty(kind, rows, 33)}
    library(instruction_set)(_integer(kind, rows), given)
    expected = qcompile.integer_linear(codes, scale, None, parts.codes, parts.scale, None, bias, -1, 8, -1, DTYPES[kind])
    assert torch.equal(given["out"], expected)
