"""Kernels that rotate rows and turn them into codes, against the operators' references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.ir import activation_ops, fused_activation_ops, fused_asymmetric_ops, ops
from qcompile.ir.hadamard_ops import hadamard
from qcompile.quant.activations import HALF_LEAST, HALF_MAX, dequantize, scale_dtype
from qcompile.quant.hadamard import mixing_matrix
from qcompile.quant.scheme import DTYPE_NAMES
from tests.codegen.triton import activation_specs as specs
from tests.codegen.triton.interpreted.harness import assert_close, guarded, result, run_kernel

ROWS = 3
ROTATIONS = [(64, 64), (96, 32), (192, 64), (36, 36), (60, 20), (240, 80), (288, 288), (140, 140)]
"""Columns and block: powers of two, matrices of order 12 to 140, several blocks with and without padding between them."""


def rows(columns: int, dtype: str = "bf16") -> Tensor:
    """Normal numbers, each row of another magnitude."""
    return guarded((torch.randn(ROWS, columns) * torch.tensor([1e-3, 1.0, 50.0]).unsqueeze(1)).to(DTYPE_NAMES[dtype]))


def with_matrix(operands: dict[str, Tensor], size: int) -> tuple[dict[str, Tensor], Tensor | None]:
    """The operands with the rotation's matrix, and that matrix."""
    matrix = mixing_matrix(size) if size else None
    if matrix is None:
        return operands, None
    operands["matrix"] = guarded(matrix.float())
    return operands, operands["matrix"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("columns", "size"), ROTATIONS)
def test_hadamard(columns: int, size: int, dtype: str) -> None:
    torch.manual_seed(0)
    operands, matrix = with_matrix({"x": rows(columns, dtype), "out": result((ROWS, columns), DTYPE_NAMES[dtype])}, size)
    run_kernel(specs.hadamard(columns, size, dtype), operands, {"rows": ROWS})
    expected = hadamard(operands["x"].double(), None if matrix is None else matrix.double(), size)
    for got, want in zip(operands["out"], expected, strict=True):
        assert_close(got, want)


def assert_near(codes: Tensor, scale: Tensor, group: int, exact: Tensor, expected_scale: Tensor, highest: int) -> None:
    """Numbers within half a step (a 16th of themselves for float8, which has no `highest` code), and like scales.

    Beyond that only what a row's roundings to 16 bits change, 2^-7 of its largest. The sign of a scale may differ: it is that of the
    larger of two extremes, which a rounding may exchange.
    """
    assert scale.dtype == expected_scale.dtype
    assert torch.allclose(scale.abs(), expected_scale.abs(), rtol=2**-6, atol=0)
    size = exact.shape[-1] if group == -1 else group
    step = scale.double().abs().repeat_interleave(size, dim=-1)[:, : exact.shape[-1]]
    half = step * 0.5 if highest else exact.abs() / 16 + step / 1024
    numbers = dequantize(codes, scale, None, group, torch.float64)
    # The extreme of the other sign has one level less than its magnitude may need.
    error = (numbers - exact).abs() - half * (1 + (codes.float() == highest) * bool(highest)) - exact.abs().amax(-1, keepdim=True) * 2**-7
    assert float(error.max()) <= 0


def outputs(columns: int, group: int, element: str = "int") -> tuple[Tensor, Tensor]:
    """Places for codes and scales."""
    codes = result((ROWS, columns), torch.float8_e4m3fn if element == "fp8" else torch.int8)
    return codes, result((ROWS, groups_in(columns, group)), scale_dtype(torch.float32, group))


CASES = [
    (64, 8, -1, "int", 1.0), (100, 8, -1, "int", 0.9), (576, 4, 64, "int", 1.0), (200, 4, 64, "int", 1.0), (90, 4, -1, "int", 1.0),
    (128, 8, -1, "fp8", 1.0), (96, 8, 32, "fp8", 1.0), (48, 8, 128, "int", 1.0),
]  # fmt: skip


def groups_in(columns: int, group: int) -> int:
    """Scales of a row."""
    return 1 if group == -1 else -(-columns // group)


@pytest.mark.parametrize(("columns", "bits", "group", "element", "clip"), CASES)
def test_quantize_activation(columns: int, bits: int, group: int, element: str, clip: float) -> None:
    torch.manual_seed(0)
    x = rows(columns)
    x[1] = 0
    codes, scale = outputs(columns, group, element)
    spec = specs.quantize("quantize_activation", columns, bits=bits, group=group, element=element, clip=clip)
    run_kernel(spec, {"x": x, "out": codes, "out1": scale}, {"rows": ROWS})
    expected = activation_ops.quantize_activation(x, bits, group, element, clip)
    assert torch.equal(codes.float(), expected[0].float())
    assert torch.equal(scale, expected[1])
    assert not bool(codes[1].float().any())
    assert bool((scale[1] == 1).all())


@pytest.mark.parametrize("operator", ["quantize_activation", "quantize_activation_asym"])
def test_scales_of_groups_stay_within_float16(operator: str) -> None:
    """A magnitude beyond it takes the last one on either side; below the least normal number 10 bits of mantissa shrink to none."""
    x = rows(96)
    x[0, :32], x[0, 32:64], x[0, 64:] = 3e38, 1e-20, -1e-20
    x[1, :32], x[1, 32:64] = 2.0**-21 * 1.3, -(2.0**-21) * 0.7
    names = ("out", "out1", *(["out2"] if operator.endswith("asym") else []))
    made = [*outputs(96, 32), result((ROWS, 3), torch.int32)][: len(names)]
    run_kernel(specs.quantize(operator, 96, bits=4, group=32), {"x": x, **dict(zip(names, made, strict=True))}, {"rows": ROWS})
    expected = getattr(activation_ops, operator)(x, 4, 32)
    assert all(torch.equal(got, want) for got, want in zip(made, expected, strict=True))
    assert made[1].abs()[0].tolist() == [HALF_MAX, HALF_LEAST, HALF_LEAST]


@pytest.mark.parametrize(("columns", "bits", "group"), [(64, 8, -1), (100, 4, 32), (70, 4, -1)])
def test_quantize_activation_asymmetrically(columns: int, bits: int, group: int) -> None:
    torch.manual_seed(0)
    x = guarded((rows(columns) + torch.tensor([[0.01], [-2.0], [400.0]])).bfloat16())
    codes, scale = outputs(columns, group)
    zero = result(tuple(scale.shape), torch.int32)
    spec = specs.quantize("quantize_activation_asym", columns, bits=bits, group=group)
    run_kernel(spec, {"x": x, "out": codes, "out1": scale, "out2": zero}, {"rows": ROWS})
    expected = activation_ops.quantize_activation_asym(x, bits, group)
    assert all(torch.equal(got, want) for got, want in zip((codes, scale, zero), expected, strict=True))


@pytest.mark.parametrize(("element", "zero"), [("int", False), ("int", True), ("fp8", False)])
def test_quantize_static(element: str, zero: bool) -> None:
    torch.manual_seed(0)
    x = rows(90)
    operands = {"x": x, "scale": guarded(torch.tensor([0.05])), "out": outputs(90, -1, element)[0]}
    if zero:
        operands["zero"] = guarded(torch.tensor([-17], dtype=torch.int32))
    run_kernel(specs.quantize_static(90, zero=zero, element=element), operands, {"rows": ROWS})
    expected = activation_ops.quantize_static(x, operands["scale"], operands.get("zero"), 8, element)
    assert torch.equal(operands["out"].float(), expected.float())


FUSED = [
    (72, 0, 8, -1, "int"),
    (64, 64, 8, -1, "int"),
    (192, 64, 4, 32, "int"),
    (36, 36, 8, -1, "int"),
    (240, 80, 4, 16, "int"),
    (96, 96, 8, -1, "fp8"),
]


def sources(operator: str, columns: int) -> tuple[dict[str, Tensor], tuple[Any, ...]]:
    """The operands that a fused operator reads, and the first arguments of its reference."""
    x, weight = rows(columns), guarded(torch.randn(columns).bfloat16())
    if operator == "hadamard_quantize":
        return {"x": x}, (x,)
    if operator == "gated_quantize":
        fused = guarded(torch.randn(ROWS, 2 * columns).bfloat16())
        gate, up = fused[:, :columns], fused[:, columns:]
        return {"gate": gate, "up": up}, (gate, up, "silu")
    if operator == "norm_quantize":
        return {"x": x, "weight": weight}, (x, weight, 1e-5, 0.0)
    residual = rows(columns)
    return {"x": x, "residual": residual, "weight": weight}, (x, residual, weight, 1e-5, 0.0)


def wide(operator: str, arguments: tuple[Any, ...]) -> Tensor:
    """What is rotated and quantized, in float64."""
    numbers = [value.double() if isinstance(value, Tensor) else value for value in arguments]
    if operator == "hadamard_quantize":
        return numbers[0]
    if operator == "gated_quantize":
        return ops.gated_activation(*numbers)
    if operator == "norm_quantize":
        return ops.rms_norm(*numbers)
    return ops.rms_norm((arguments[0] + arguments[1]).double(), *numbers[2:])


@pytest.mark.parametrize(("columns", "size", "bits", "group", "element"), FUSED)
@pytest.mark.parametrize("operator", ["norm_quantize", "add_norm_quantize", "gated_quantize", "hadamard_quantize"])
def test_fused(operator: str, columns: int, size: int, bits: int, group: int, element: str) -> None:
    torch.manual_seed(0)
    operands, arguments = sources(operator, columns)
    operands, matrix = with_matrix(operands, size)
    results = list(outputs(columns, group, element))
    if operator == "add_norm_quantize":
        results.insert(0, result((ROWS, columns), torch.bfloat16))
    operands |= {f"out{place or ''}": value for place, value in enumerate(results)}
    run_kernel(specs.quantize(operator, columns, size, bits=bits, group=group, element=element), operands, {"rows": ROWS})
    reference = getattr(fused_activation_ops, operator)(*arguments, matrix, size, bits, group, element)
    if operator == "add_norm_quantize":
        assert torch.equal(results[0], reference[0])
    exact = wide(operator, arguments)
    exact = hadamard(exact, None if matrix is None else matrix.double(), size) if size else exact
    assert_near(results[-2], results[-1], group, exact, reference[-1], 0 if element == "fp8" else (1 << (bits - 1)) - 1)


@pytest.mark.parametrize(("columns", "size", "bits", "group"), [case[:4] for case in FUSED if case[4] == "int"])
@pytest.mark.parametrize("operator", ["norm_quantize", "add_norm_quantize", "gated_quantize", "hadamard_quantize"])
def test_fused_asymmetrically(operator: str, columns: int, size: int, bits: int, group: int) -> None:
    """Within a step of what is exact: half a step of rounding, as much again at the end that the zero point's rounding cuts."""
    torch.manual_seed(0)
    operands, arguments = sources(operator, columns)
    operands, matrix = with_matrix(operands, size)
    codes, scale = outputs(columns, group)
    results = [codes, scale, result(tuple(scale.shape), torch.int32)]
    if operator == "add_norm_quantize":
        results.insert(0, result((ROWS, columns), torch.bfloat16))
    operands |= {f"out{place or ''}": value for place, value in enumerate(results)}
    run_kernel(specs.quantize(f"{operator}_asym", columns, size, bits=bits, group=group), operands, {"rows": ROWS})
    reference = getattr(fused_asymmetric_ops, f"{operator}_asym")(*arguments, matrix, size, bits, group)
    if operator == "add_norm_quantize":
        assert torch.equal(results[0], reference[0])
    assert torch.allclose(scale.double(), reference[-2].double(), rtol=2**-6, atol=0)
    exact = wide(operator, arguments)
    exact = hadamard(exact, None if matrix is None else matrix.double(), size) if size else exact
    step = scale.double().repeat_interleave(columns if group == -1 else group, dim=-1)[:, :columns]
    error = (dequantize(codes, scale, results[-1], group, torch.float64) - exact).abs()
    assert float((error - step - exact.abs().amax(-1, keepdim=True) * 2**-7).max()) <= 0
    assert float((error / step).median()) <= 0.3
    assert int(codes.max()) - int(codes.min()) >= (1 << bits) - 2
