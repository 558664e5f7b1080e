"""Ahead-of-time builds of the kernels of quantized activations and of further weight formats: gates and instructions, per architecture.

Binaries are kept in the usual cache of kernels, by content: a second run builds only what has changed.
"""

from __future__ import annotations

import pytest

from qcompile.codegen.triton import gates
from qcompile.codegen.triton.backend import TritonBackend
from qcompile.codegen.triton.build import build_kernels, kernel_cache
from qcompile.codegen.triton.tiles import ARCHITECTURES
from qcompile.ir.lowered import KernelSpec
from tests.codegen.triton import activation_specs as specs
from tests.codegen.triton.specs import quantized_linear

pytest.importorskip("triton")

EVERYWHERE: list[KernelSpec] = [
    specs.code_linear(1536, 576, "m1", "int4 g64 sym fp16"),
    specs.code_linear(576, 1536, "m2-63", "int4 g64 sym fp16"),
    specs.code_linear(3072, 576, "m64"),
    specs.quantize("gated_quantize", 8960, 8960),
    specs.quantize("norm_quantize", 576, 64, bits=4, group=64),
    specs.quantize("add_norm_quantize_asym", 576, 64, bits=4, group=64),
]
FLOAT8 = [
    specs.code_linear(4096, 4096, "m2-63", "fp8 g128 sym fp32", group=128),
    specs.code_linear(4096, 4096, "m64", "fp8 channel sym fp32"),
    specs.quantize("add_norm_quantize", 4096, element="fp8"),
]
THOROUGH = [
    specs.code_linear(4096, 4096, "m1"),
    specs.code_linear(4096, 4096, "m2-63", zero=True),
    specs.code_linear(333, 570, "m64", "int8 g64 asym fp16", zero=True, bias=True),
    specs.code_linear(4096, 4096, "m64", "int4 g64 sym fp16", group=64),
    specs.code_linear(4096, 4096, "m64", "int4 channel sym fp16", static=True),
    specs.code_linear(4096, 4096, "m1", "fp8 g128 sym fp32", group=128),
    specs.hadamard(576, 576),
    specs.hadamard(32768, 32768),
    specs.quantize("quantize_activation", 4096, bits=4, group=128),
    specs.quantize("quantize_activation_asym", 4096),
    specs.quantize("add_norm_quantize", 8960, 8960, bits=4, group=128),
    specs.quantize("gated_quantize", 14336, 14336),
    specs.quantize("gated_quantize_asym", 14336, 14336),
    specs.quantize("add_norm_quantize_asym", 8960, 8960, bits=4, group=128),
    specs.quantize_static(576, zero=True),
]
"""What takes the most registers: asymmetric on both sides, groups on both sides, orders that need padding, the longest rows."""

WEIGHTS = [
    quantized_linear(4096, 4096, "m1", "int3 g64 sym fp16"),
    quantized_linear(4096, 4096, "m2-63", "int2 g64 asym fp16"),
    quantized_linear(4096, 4096, "m64", "nf4 g64 sym fp16"),
    quantized_linear(4096, 4096, "m64", "int4 g64 sym int8"),
    quantized_linear(4096, 4096, "m2-63", "fp4 g16 sym e4m3"),
    quantized_linear(4096, 4096, "m1", "fp8 channel sym fp16"),
]
"""Codes of 2 and 3 bits, tables, small floats, and scales that are not floats: on every architecture alike."""

BUILT = {
    "sm80": [*EVERYWHERE, *WEIGHTS],
    "sm89": [*EVERYWHERE, *FLOAT8],
    "sm90": [*EVERYWHERE, *FLOAT8, *THOROUGH, *WEIGHTS],
    "sm100": [*EVERYWHERE, *FLOAT8],
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_build_and_pass_the_gates(arch: str) -> None:
    backend = TritonBackend(arch)
    kernels, _ = build_kernels([backend.emit(spec) for spec in BUILT[arch]], arch, cache=kernel_cache())
    for launch in (launch for kernel in kernels for launch in kernel.launches):
        assert 0 < launch.registers <= gates.MOST_REGISTERS
        assert launch.shared_bytes <= ARCHITECTURES[arch].shared_bytes


MEANT = {
    "sm80": {"int": "imma"},
    "sm89": {"int": "imma", "fp8": "qmma"},
    "sm90": {"int": "igmma", "fp8": "qgmma"},
    "sm100": {"int": "imma", "fp8": "utcqmma"},
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_codes_are_multiplied_by_the_units_meant_for_them(arch: str) -> None:
    """`expects` is what the build checks the binary for: from two tokens on, 4-bit weights too."""
    for kind, spec in (("int", EVERYWHERE[1]), ("int", EVERYWHERE[2]), ("fp8", FLOAT8[0]), ("fp8", FLOAT8[1])):
        if kind in MEANT[arch]:
            assert TritonBackend(arch).emit(spec).expects == (MEANT[arch][kind], "cp.async")
    assert TritonBackend(arch).emit(EVERYWHERE[0]).expects == ("load128",)
