"""Ahead-of-time builds of the kernels of caches that keep some tokens as they came: resources and instructions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qcompile.codegen.triton import gates
from qcompile.codegen.triton.backend import TritonBackend
from qcompile.codegen.triton.build import build_kernels
from qcompile.codegen.triton.tiles import ARCHITECTURES
from tests.codegen.triton import settled_specs as specs

pytest.importorskip("triton")
KV2 = ("int2 t32 asym", "int2 g32 asym")


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
