"""On a real GPU: kernels of quantized activations, built and launched as the engine does, against the operators' references."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from qcompile.ir import activation_ops, fused_activation_ops, fused_asymmetric_ops
from qcompile.ir.lowered import KernelSpec
from qcompile.quant import activations
from qcompile.quant.format import parse_format
from qcompile.quant.hadamard import mixing_matrix
from qcompile.quant.reference import quantize as quantize_weight
from tests.codegen.triton import activation_specs as specs
from tests.gpu.launching import run_on_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with a driver")]
ROWS = {"m1": 1, "m2-63": 17, "m64": 200}


def run(spec: KernelSpec, operands: Mapping[str, Tensor], rows: int) -> None:
    """Launch an operator over `rows` rows; results are written into `operands`."""
    run_on_gpu(spec, operands, {"rows": rows})


@pytest.mark.parametrize("bucket", ROWS)
@pytest.mark.parametrize(
    ("form", "group", "zero"),
    [
        ("int8 channel sym fp16", -1, False),
        ("int8 channel asym fp16", -1, True),
        ("int4 g64 sym fp16", -1, False),
        ("int4 g32 asym fp16", -1, True),
        ("int4 g64 sym fp16", 64, False),
    ],
)
def test_integer_linear(bucket: str, form: str, group: int, zero: bool) -> None:
    """Integer sums are exact: what is left is the rounding of the result, and of a few float sums of groups."""
    torch.manual_seed(0)
    rows, columns = 576, 1536
    weight_format = parse_format(form)
    packed = quantize_weight(torch.randn(rows, columns), weight_format)
    x = torch.randn(ROWS[bucket], columns)
    names = ("codes", "scale", "zero")
    found = activations.quantize_asymmetric(x, 8, group) if zero else activations.quantize(x, 8, group)
    operands = dict(zip(names, found, strict=False)) | {"w_codes": packed.codes, "w_scale": packed.scale}
    if packed.zero is not None:
        operands["w_zero"] = packed.zero
    named = [operands.get(name) for name in ("codes", "scale", "zero", "w_codes", "w_scale", "w_zero")]
    bits, w_group = weight_format.element.bits, weight_format.granularity.group_size
    expected = activation_ops.integer_linear(*named, None, group, bits, w_group, torch.float64)  # type: ignore[arg-type]
    device = {name: value.cuda() for name, value in operands.items()}
    device["out"] = torch.full((ROWS[bucket], rows), torch.nan, dtype=torch.bfloat16, device="cuda")
    run(specs.code_linear(rows, columns, bucket, form, group=group, zero=zero), device, ROWS[bucket])
    assert float((device["out"].cpu().double() - expected).abs().max() / expected.abs().max()) <= 1.25 * 2**-8


@pytest.mark.parametrize("bucket", ROWS)
@pytest.mark.parametrize(("form", "group"), [("fp8 channel sym fp32", -1), ("fp8 g128 sym fp32", 128)])
def test_float8_linear(bucket: str, form: str, group: int) -> None:
    """Products add up in at least 14 bits inside the instruction and in float32 between steps."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("8-bit floats need sm89")
    torch.manual_seed(0)
    rows, columns = 576, 1536
    w_codes, w_scale = activations.quantize(torch.randn(rows, columns), 8, group, "fp8")
    w_scale = w_scale.float()
    codes, scale = activations.quantize(torch.randn(ROWS[bucket], columns), 8, group, "fp8")
    expected = activation_ops.float8_linear(codes, scale, w_codes, w_scale, None, group, group, torch.float64)
    operands = {"codes": codes, "scale": scale, "w_codes": w_codes.view(torch.uint8), "w_scale": w_scale}
    device = {name: value.cuda() for name, value in operands.items()}
    device["out"] = torch.full((ROWS[bucket], rows), torch.nan, dtype=torch.bfloat16, device="cuda")
    run(specs.code_linear(rows, columns, bucket, form, group=group), device, ROWS[bucket])
    assert float((device["out"].cpu().double() - expected).abs().max() / expected.abs().max()) <= 2**-6


@pytest.mark.parametrize(("size", "bits", "group"), [(0, 8, -1), (64, 4, 64), (576, 8, -1)])
def test_norm_quantize(size: int, bits: int, group: int) -> None:
    """The kernel keeps float32 between the parts: at most one code beside the reference, for few of them."""
    torch.manual_seed(0)
    x, weight = torch.randn(33, 576).bfloat16(), torch.randn(576).bfloat16()
    matrix = mixing_matrix(size) if size else None
    expected = fused_activation_ops.norm_quantize(
        x.float(), weight.float(), 1e-5, 0.0, None if matrix is None else matrix.float(), size, bits, group
    )
    device = {"x": x.cuda(), "weight": weight.cuda(), **({} if matrix is None else {"matrix": matrix.float().cuda()})}
    device["out"] = torch.zeros(33, 576, dtype=torch.int8, device="cuda")
    device["out1"] = torch.zeros_like(expected[1], device="cuda")
    run(specs.quantize("norm_quantize", 576, size, bits=bits, group=group), device, 33)
    numbers = activations.dequantize(device["out"].cpu(), device["out1"].cpu(), None, group, torch.float32)
    wanted = activations.dequantize(expected[0], expected[1], None, group, torch.float32)
    step = expected[1].float().abs().repeat_interleave(576 // expected[1].shape[1], dim=-1)
    assert float(((numbers - wanted).abs() / step).max()) <= 1.0 + 2.0 ** (bits - 7)


@pytest.mark.parametrize(("size", "bits", "group"), [(0, 8, -1), (64, 4, 64), (576, 8, -1)])
def test_norm_quantize_asym(size: int, bits: int, group: int) -> None:
    """As `norm_quantize`; a zero point that rounds the other way moves codes, not what they stand for."""
    torch.manual_seed(0)
    x, weight = torch.randn(33, 576).bfloat16(), torch.randn(576).bfloat16()
    matrix = mixing_matrix(size) if size else None
    mixing = None if matrix is None else matrix.float()
    expected = fused_asymmetric_ops.norm_quantize_asym(x.float(), weight.float(), 1e-5, 0.0, mixing, size, bits, group)
    device = {"x": x.cuda(), "weight": weight.cuda(), **({} if mixing is None else {"matrix": mixing.cuda()})}
    device |= {f"out{place or ''}": torch.zeros_like(value, device="cuda") for place, value in enumerate(expected)}
    run(specs.quantize("norm_quantize_asym", 576, size, bits=bits, group=group), device, 33)
    made = [device[name].cpu() for name in ("out", "out1", "out2")]
    numbers, wanted = (activations.dequantize(*parts, group, torch.float32) for parts in (made, expected))
    step = expected[1].float().repeat_interleave(576 // expected[1].shape[1], dim=-1)
    assert float(((numbers - wanted).abs() / step).max()) <= 1.0 + 2.0 ** (bits - 7)


@pytest.mark.parametrize("operator", ["quantize_activation", "quantize_activation_asym"])
def test_quantize_in_groups_gives_the_reference_bit_for_bit(operator: str) -> None:
    """Float16 scales too, from beyond their range down to the smallest of them."""
    x = (torch.randn(65, 4096) * torch.logspace(-12, 8, 65).unsqueeze(1)).bfloat16()
    expected = getattr(activation_ops, operator)(x, 4, 64)
    device = {"x": x.cuda()} | {f"out{place or ''}": torch.zeros_like(value, device="cuda") for place, value in enumerate(expected)}
    run(specs.quantize(operator, 4096, bits=4, group=64), device, 65)
    assert all(torch.equal(device[f"out{place or ''}"].cpu(), value) for place, value in enumerate(expected))


def test_quantize_activation_gives_the_reference_bit_for_bit() -> None:
    x = (torch.randn(65, 4096) * torch.logspace(-3, 3, 65).unsqueeze(1)).bfloat16()
    expected = activation_ops.quantize_activation(x, 8, -1)
    device = {"x": x.cuda(), "out": torch.zeros(65, 4096, dtype=torch.int8, device="cuda"), "out1": torch.zeros(65, 1, device="cuda")}
    run(specs.quantize("quantize_activation", 4096), device, 65)
    assert torch.equal(device["out"].cpu(), expected[0])
    assert torch.equal(device["out1"].cpu(), expected[1])
