"""Linear kernels against float64."""

from __future__ import annotations

import pytest
import torch

from qcompile.quant.element import element
from qcompile.quant.granularity import Granularity
from qcompile.quant.reference import dequantize, quantize
from qcompile.quant.scheme import DTYPE_NAMES, QuantFormat
from tests.codegen.triton import specs
from tests.codegen.triton.interpreted.harness import assert_close, guarded, result, run_kernel

ROWS = {"m1": 1, "m2-63": 5, "m64": 70}


def quant_format(text: str) -> QuantFormat:
    """Read back what `str(QuantFormat)` writes."""
    name, granularity, kind, scale = text.split()
    group = -1 if granularity == "channel" else int(granularity[1:])
    return QuantFormat(element(name), Granularity(group), kind == "sym", DTYPE_NAMES[scale])


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
    weight_format = quant_format(form)
    packed = quantize(torch.randn(rows, columns) + 0.2, weight_format)
    operands = {
        "x": guarded(torch.randn(ROWS[bucket], columns).to(kind)),
        "codes": guarded(packed.codes),
        "scale": guarded(packed.scale),
        "bias": guarded(torch.randn(rows).to(kind)),
        "out": result((ROWS[bucket], rows), kind),
        **({} if packed.zero is None else {"zero": guarded(packed.zero)}),
    }
    kernel = run_kernel(specs.quantized_linear(rows, columns, bucket, form, dtype, bias), operands, {"rows": ROWS[bucket]})
    bits, group = weight_format.element.bits, weight_format.granularity.group_size
    weight = dequantize(packed.codes, packed.scale, packed.zero, bits, group, columns, torch.float64)
    expected = operands["x"].double() @ weight.T + (operands["bias"].double() if bias else 0)
    assert_close(operands["out"], expected)
    assert dict(kernel.layouts) == ({"codes": "split-half"} if bits == 4 else {})


@pytest.mark.parametrize(("bucket", "columns"), [("m1", 4200), ("m2-63", 1100), ("m64", 1100)])
def test_split_columns_are_added_in_order(bucket: str, columns: int) -> None:
    check_quantized(bucket, "int4 g64 asym fp16", 24, columns, "fp16", bias=True)
