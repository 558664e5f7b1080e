"""What the Triton backend refuses of quantized activations, and that it says why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qcompile.codegen.triton.backend import TritonBackend
from qcompile.errors import CoverageError
from qcompile.ir.lowered import KernelSpec
from tests.codegen.triton import activation_specs as specs
from tests.codegen.triton.specs import with_format

REFUSED: dict[str, tuple[str, KernelSpec]] = {
    "K=28672: expected at most 16384 numbers .with padding, 32768.": ("sm90", specs.quantize("gated_quantize", 28672, 28672)),
    "K=40000: expected at most 32768 numbers": ("sm90", specs.quantize("norm_quantize", 40000)),
    "M=344: expected a matrix of order 256 at most": ("sm90", specs.hadamard(11008, 11008)),
    "hadamard_size=48: expected a divisor of K=64": ("sm90", specs.hadamard(64, 48)),
    "hadamard_size=24: expected M=1 times a power of two": ("sm90", replace(specs.hadamard(48, 24), sizes=(("K", 48),))),
    "matrix is None: expected one for M=12": ("sm90", replace(specs.hadamard(48, 24), formats=(("out", "bf16"), ("x", "bf16")))),
    "group_size=96: expected a power of two, or -1": ("sm90", specs.quantize("quantize_activation", 576, group=96)),
    "group_size=64: expected a divisor of hadamard_size=80": ("sm90", specs.quantize("hadamard_quantize", 160, 80, group=64)),
    "codes are int of 6 bits: expected int of 4 or 8, or fp8": ("sm90", specs.quantize("quantize_activation", 64, bits=6)),
    "out is i8: expected fp8e4nv for fp8 codes": ("sm90", with_format(specs.quantize("quantize_activation", 64, element="fp8"), out="i8")),
    "x is fp32: expected bf16 or fp16": ("sm90", with_format(specs.hadamard(64, 64), x="fp32")),
    "8-bit floats: expected sm89 or later, sm80 has no instructions": ("sm80", specs.code_linear(64, 64, "m1", "fp8 channel sym fp32")),
    "8-bit floats: expected sm89 or later": ("sm80", specs.quantize("norm_quantize", 64, element="fp8")),
    "groups of 48 weights: expected a multiple of 32": ("sm90", specs.code_linear(64, 96, "m1", "int8 g48 sym fp16")),
    "groups of 16 activations: expected a multiple of 32": ("sm90", specs.code_linear(64, 96, "m1", group=16)),
    "w_codes are int3: expected int4 or int8": ("sm90", specs.code_linear(64, 96, "m1", "int3 g32 sym fp16")),
    "w_codes are nf4: expected int4 or int8": ("sm90", specs.code_linear(64, 96, "m1", "nf4 g64 sym fp16")),
    "K=63: expected an even number of columns for 4-bit": ("sm90", specs.code_linear(64, 63, "m1", "int4 channel sym fp16")),
    "K=140000: expected less than 131072 columns, whose sums fit": ("sm90", specs.code_linear(64, 140000, "m1")),
    "one scale for groups of 32 activations: expected one scale a group": ("sm90", specs.code_linear(64, 64, "m1", group=32, static=True)),
    "w_zero is None: expected uint8 for asymmetric": (
        "sm90", with_format(specs.code_linear(64, 64, "m1"), w_codes="int8 channel asym fp16"),
    ),
    "w_scale is fp32: expected fp16 as the codes' format says": ("sm90", with_format(specs.code_linear(64, 64, "m1"), w_scale="fp32")),
    "w_codes are 'fp8 channel sym fp16': expected integers": (
        "sm90", with_format(specs.code_linear(64, 64, "m1"), w_codes="fp8 channel sym fp16"),
    ),
    r"N·K = 4294967296: expected less than 2\^31": ("sm90", specs.code_linear(1 << 16, 1 << 16, "m1")),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_a_refusal_says_why(reason: str) -> None:
    arch, spec = REFUSED[reason]
    with pytest.raises(CoverageError, match=reason):
        TritonBackend(arch).emit(spec)
