"""Linear kernels over quantized activations against the operators' references, whose sums are exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcompile.ir.activation_ops import float8_linear, integer_linear
from qcompile.quant.activations import quantize, quantize_asymmetric
from qcompile.quant.format import parse_format
from qcompile.quant.reference import quantize as quantize_weight
from qcompile.quant.scheme import DTYPE_NAMES
from tests.codegen.triton import activation_specs as specs
from tests.codegen.triton.interpreted.harness import assert_close, guarded, result, run_kernel
from tests.codegen.triton.specs import with_format

ROWS = {"m1": 1, "m2-63": 5, "m64": 70}


def activation(rows: int, columns: int, group: int, zero: bool, static: bool, element: str) -> dict[str, Tensor]:
    """Codes of normal numbers with their scales and zero points; one of each where `static`."""
    x = torch.randn(rows, columns) * 3 + 0.5
    if zero:
        codes, scale, offset = quantize_asymmetric(x, 8, group)
        found = {"codes": codes, "scale": scale, "zero": offset}
    else:
        codes, scale = quantize(x, 8, group, element)
        found = {"codes": codes, "scale": scale}
    if static:
        found |= {name: found[name].flatten()[:1].clone() for name in found if name != "codes"}
    return {name: guarded(value) for name, value in found.items()}


CASES = [
    ("int8 channel sym fp16", 64, 256, -1, False, False),
    ("int8 channel sym fp16", 33, 100, -1, False, True),
    ("int8 channel sym fp32", 20, 77, -1, True, False),
    ("int8 channel asym fp16", 20, 200, -1, True, True),
    ("int8 channel asym fp16", 24, 131, -1, False, False),
    ("int8 g64 sym fp16", 16, 320, -1, False, False),
    ("int8 channel sym fp16", 24, 256, 64, False, False),
    ("int8 g64 asym fp16", 16, 200, 32, True, False),
    ("int4 channel sym fp16", 33, 300, -1, False, False),
    ("int4 channel asym bf16", 33, 130, -1, True, False),
    ("int4 g64 sym fp16", 64, 576, -1, False, False),
    ("int4 g128 sym fp16", 24, 320, -1, False, True),
    ("int4 g32 asym fp16", 20, 200, -1, True, False),
    ("int4 g64 sym fp16", 24, 320, 64, False, False),
    ("int4 g128 asym fp16", 24, 384, 128, True, False),
]


@pytest.mark.parametrize(("form", "rows", "columns", "group", "zero", "static"), CASES)
@pytest.mark.parametrize("bucket", ROWS)
def test_integer_linear(bucket: str, form: str, rows: int, columns: int, group: int, zero: bool, static: bool) -> None:
    check_integer(bucket, form, rows, columns, group, zero=zero, static=static)


def check_integer(bucket: str, form: str, rows: int, columns: int, group: int, *, zero: bool, static: bool) -> None:
    """Run one integer linear layer and compare with its reference in float64."""
    torch.manual_seed(1)
    dtype = "fp16" if rows % 2 else "bf16"
    weight_format = parse_format(form)
    packed = quantize_weight(torch.randn(rows, columns) + 0.2, weight_format)
    operands = activation(ROWS[bucket], columns, group, zero, static, "int")
    operands |= {"w_codes": guarded(packed.codes), "w_scale": guarded(packed.scale)}
    if packed.zero is not None:
        operands["w_zero"] = guarded(packed.zero)
    if rows % 2:
        operands["bias"] = guarded(torch.randn(rows).to(DTYPE_NAMES[dtype]))
    operands["out"] = result((ROWS[bucket], rows), DTYPE_NAMES[dtype])
    spec = specs.code_linear(rows, columns, bucket, form, group=group, zero=zero, static=static, bias=rows % 2 == 1, dtype=dtype)
    run_kernel(spec, operands, {"rows": ROWS[bucket]})
    named = [operands.get(name) for name in ("codes", "scale", "zero", "w_codes", "w_scale", "w_zero", "bias")]
    bits, w_group = weight_format.element.bits, weight_format.granularity.group_size
    assert_close(operands["out"], integer_linear(*named, group, bits, w_group, torch.float64))  # type: ignore[arg-type]


@pytest.mark.parametrize(("bucket", "columns"), [("m1", 4200), ("m2-63", 1100), ("m64", 1100)])
@pytest.mark.parametrize("form", ["int8 channel sym fp16", "int4 g64 asym fp16"])
def test_split_columns(bucket: str, columns: int, form: str) -> None:
    check_integer(bucket, form, 25, columns, -1, zero=True, static=False)


@pytest.mark.parametrize(
    ("form", "rows", "columns", "group", "static"),
    [
        ("fp8 channel sym fp32", 32, 256, -1, False),
        ("fp8 channel sym fp16", 21, 77, -1, True),
        ("fp8 g64 sym fp16", 24, 192, -1, False),
        ("fp8 g128 sym fp32", 24, 256, 64, False),
    ],
)
@pytest.mark.parametrize("bucket", ROWS)
def test_float8_linear(bucket: str, form: str, rows: int, columns: int, group: int, static: bool) -> None:
    torch.manual_seed(1)
    element, granularity, _, kind = form.split()
    assert element == "fp8"
    w_group = -1 if granularity == "channel" else int(granularity[1:])
    w_codes, w_scale = quantize(torch.randn(rows, columns), 8, w_group, "fp8")
    w_scale = w_scale.to(DTYPE_NAMES[kind])
    operands = activation(ROWS[bucket], columns, group, False, static, "fp8")
    operands |= {"w_codes": guarded(w_codes.view(torch.uint8)), "w_scale": guarded(w_scale), "bias": guarded(torch.randn(rows))}
    operands["out"] = result((ROWS[bucket], rows), torch.bfloat16)
    spec = specs.code_linear(rows, columns, bucket, form, group=group, static=static, bias=True)
    spec = with_format(spec, bias="fp32")
    run_kernel(spec, operands, {"rows": ROWS[bucket]})
    named = [operands[name] for name in ("codes", "scale", "w_codes", "w_scale", "bias")]
    assert_close(operands["out"], float8_linear(*named, group, w_group, torch.float64))
