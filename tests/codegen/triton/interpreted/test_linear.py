"""Linear kernels against float64."""

from __future__ import annotations

import pytest
import torch

from qcompile.quant.format import parse_format
from qcompile.quant.reference import quantize, restore
from qcompile.quant.scheme import DTYPE_NAMES
from tests.codegen.triton import specs
from tests.codegen.triton.interpreted.harness import assert_close, guarded, result, run_kernel

ROWS = {"m1": 1, "m2-63": 5, "m64": 70}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("rows", "columns", "bias"), [(64, 128, False), (37, 201, True)])
@pytest.mark.parametrize("bucket", ROWS)
def test_linear(bucket: str, rows: int, columns: int, bias: bool, dtype: str) -> None:
    torch.manual_seed(0)
    kind = DTYPE_NAMES[dtype]
    operands = {
        "x": guarded(torch.randn(ROWS[bucket], columns).to(kind)),
        "weight": guarded(torch.randn(rows, columns).to(kind)),
        "bias": guarded(torch.randn(rows).to(kind)),
        "out": result((ROWS[bucket], rows), kind),
    }
    run_kernel(specs.linear(rows, columns, bucket, dtype, bias), operands, {"rows": ROWS[bucket]})
    expected = operands["x"].double() @ operands["weight"].double().T + (operands["bias"].double() if bias else 0)
    assert_close(operands["out"], expected)


FORMATS = [
    ("int4 g64 sym fp16", 64, 256, "bf16"),
    ("int4 g64 sym fp16", 33, 576, "fp16"),
    ("int4 g32 asym fp16", 20, 200, "bf16"),
    ("int4 g128 asym bf16", 16, 320, "fp16"),
    ("int4 g48 asym fp32", 19, 211, "bf16"),
    ("int4 g20 sym fp16", 17, 150, "fp16"),
    ("int4 channel asym fp16", 24, 131, "bf16"),
    ("int3 g64 sym fp16", 33, 576, "bf16"),
    ("int3 g32 asym fp16", 20, 211, "fp16"),
    ("int3 g16 asym fp32", 16, 300, "bf16"),
    ("int3 channel asym fp16", 24, 131, "fp16"),
    ("int2 g64 asym fp16", 33, 576, "bf16"),
    ("int2 g32 sym fp16", 20, 200, "fp16"),
    ("int2 channel sym bf16", 24, 131, "bf16"),
    ("int4 g32 sym int8", 24, 320, "bf16"),
    ("int4 g16 asym int8/4", 17, 208, "fp16"),
    ("int8 g32 sym e8m0", 16, 200, "bf16"),
    ("fp4 g32 sym e8m0", 33, 320, "bf16"),
    ("fp4 g16 sym e4m3", 24, 200, "fp16"),
    ("fp4 g64 sym fp16", 33, 256, "bf16"),
    ("nf4 g64 sym fp16", 20, 200, "bf16"),
    ("nf4 channel sym fp16", 17, 130, "fp16"),
    ("fp8 channel sym fp16", 24, 131, "bf16"),
    ("fp8 g64 sym fp32", 16, 192, "fp16"),
    ("int8 channel sym fp16", 40, 192, "bf16"),
    ("int8 channel asym fp16", 13, 77, "fp16"),
    ("int8 g64 asym fp16", 16, 300, "bf16"),
    ("int8 g48 sym fp32", 21, 211, "fp16"),
]


@pytest.mark.parametrize(("form", "rows", "columns", "dtype"), FORMATS)
@pytest.mark.parametrize("bucket", ROWS)
def test_quantized_linear(bucket: str, form: str, rows: int, columns: int, dtype: str) -> None:
    check_quantized(bucket, form, rows, columns, dtype, bias=rows % 2 == 1)


def check_quantized(bucket: str, form: str, rows: int, columns: int, dtype: str, *, bias: bool) -> None:
    """Run one quantized linear layer and compare with its dequantized weight in float64."""
    torch.manual_seed(1)
    kind = DTYPE_NAMES[dtype]
    weight_format = parse_format(form)
    packed = quantize(torch.randn(rows, columns) + 0.2, weight_format)
    operands = {
        "x": guarded(torch.randn(ROWS[bucket], columns).to(kind)),
        "codes": guarded(packed.codes),
        "scale": guarded(packed.scale),
        "bias": guarded(torch.randn(rows).to(kind)),
        "out": result((ROWS[bucket], rows), kind),
        **({} if packed.zero is None else {"zero": guarded(packed.zero)}),
        **({} if packed.scale2 is None else {"scale2": guarded(packed.scale2)}),
    }
    kernel = run_kernel(specs.quantized_linear(rows, columns, bucket, form, dtype, bias), operands, {"rows": ROWS[bucket]})
    weight = restore(packed, weight_format, columns, torch.float64)
    expected = operands["x"].double() @ weight.T + (operands["bias"].double() if bias else 0)
    assert_close(operands["out"], expected)
    layout = {2: "split-quarter", 3: "split-planes", 4: "split-half"}.get(weight_format.element.bits)
    assert dict(kernel.layouts).get("codes") == layout


@pytest.mark.parametrize(("bucket", "columns"), [("m1", 4200), ("m2-63", 1100), ("m64", 1100)])
@pytest.mark.parametrize("form", ["int4 g64 asym fp16", "int3 g64 sym fp16", "int2 g64 asym fp16"])
def test_split_columns_are_added_in_order(form: str, bucket: str, columns: int) -> None:
    check_quantized(bucket, form, 24, columns, "fp16", bias=True)
