"""Ahead-of-time builds of the kernels of caches that keep some tokens as they came: resources and instructions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qcompile.codegen.triton import gates
from qcompile.codegen.triton.backend import TritonBackend
from qcompile.codegen.triton.build import build_kernels, kernel_cache
from qcompile.codegen.triton.tiles import ARCHITECTURES
from qcompile.quant.retention import Retention
from tests.codegen.triton import settled_specs as specs
from tests.codegen.triton.cache_specs import BLOCK, SORTED
from tests.codegen.triton.settled_specs import SINKS

pytest.importorskip("triton")
KV2 = ("int2 t32 asym", "int2 g32 asym")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_of_blocks_build_and_pass_the_gates(arch: str) -> None:
    emit = TritonBackend(arch).emit
    decode = emit(specs.attend_settled(32, 8, 128, "m1", (SORTED, SORTED), SINKS))
    # Tokens of 72 bytes allow copies of 8 that no register holds.
    decode = replace(decode, expects=("mma", "cp.async"))
    prefill = emit(specs.attend_settled(9, 3, 64, "m64", (SORTED, BLOCK), SINKS))
    beside = emit(specs.attend_settled(8, 4, 256, "m64", (SORTED, "int4 g64 asym"), Retention(4, 28, 1), dtype="fp16"))
    settling = [emit(specs.settle(8, 128, form, SINKS)) for form in (SORTED, "bfp8")]
    kernels, _ = build_kernels([decode, prefill, beside, *settling], arch, cache=kernel_cache())
    for launch in (launch for kernel in kernels for launch in kernel.launches):
        assert 0 < launch.registers <= gates.MOST_REGISTERS
        assert launch.shared_bytes <= ARCHITECTURES[arch].shared_bytes
    assert kernels[0].launches[0].num_warps == 4, "decode fits without more warps"


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_kernels_build_and_pass_the_gates(arch: str) -> None:
    emit = TritonBackend(arch).emit
    # Pages and rows are read ahead while others are multiplied, sixteen bytes at a time.
    decode = replace(emit(specs.attend_settled(9, 3, 64, "m1")), expects=("mma", "cp.async", "load128"))
    prefill = emit(specs.attend_settled(32, 8, 128, "m64", KV2))
    moving = [emit(spec) for spec in (specs.with_recent(3, 64), specs.retain(3, 64), specs.settle(3, 64, KV2[0]))]
    kernels, _ = build_kernels([decode, prefill, *moving], arch)
    assert prefill.expects == ("mma" if arch == "sm80" else "wgmma",)
    for launch in (launch for kernel in kernels for launch in kernel.launches):
        assert 0 < launch.registers <= gates.MOST_REGISTERS
        assert launch.shared_bytes <= ARCHITECTURES[arch].shared_bytes
    assert kernels[0].launches[0].num_warps == 4, "decode fits without more warps"
