"""Kernels of caches packed token by token: they build, pass the gates, and contain the instructions that were meant."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qcompile.codegen.triton.backend import TritonBackend
from qcompile.codegen.triton.build import build_kernels, kernel_cache
from qcompile.codegen.triton.tiles import ARCHITECTURES
from qcompile.ir.lowered import KernelSpec
from tests.codegen.triton import cache_specs as specs

pytest.importorskip("triton")

DECODE_BLOCKS = specs.attend_packed(32, 8, 128, "m1", specs.SORTED)
CASES: dict[str, tuple[KernelSpec, ...]] = {
    "sm80": (
        specs.attend_packed(32, 8, 128, "m1"),
        specs.append_packed(8, 128, specs.KVFP8, specs.KV4, rotated=128),
        specs.attend_packed(9, 3, 64, "m1", specs.BLOCK, dtype="fp16"),
    ),
    "sm89": (
        specs.attend_packed(9, 3, 64, "m1", specs.KV8),
        specs.attend_packed(9, 3, 64, "m64", specs.KVFP8),
        specs.attend_packed(8, 4, 256, "m64", specs.KV4, specs.SORTED),
    ),
    "sm90": (
        specs.attend_packed(9, 3, 64, "m1", window=512, sinks="bf16"),
        specs.attend_packed(32, 8, 128, "m64", specs.KV8),
        DECODE_BLOCKS,
        specs.attend_packed(9, 3, 64, "m64", specs.SORTED),
        specs.append_packed(3, 64, specs.SORTED),
    ),
    "sm100": (specs.attend_packed(9, 3, 64, "m64", specs.KV8, softcap=30.0), specs.append_packed(3, 64, rotated=64)),
}


@pytest.mark.parametrize("arch", CASES)
def test_kernels_build_without_spills(arch: str) -> None:
    backend = TritonBackend(arch)
    kernels, binaries = build_kernels([backend.emit(spec) for spec in CASES[arch]], arch, cache=kernel_cache())
    for kernel in kernels:
        assert all(binaries[launch.binary][:4] == b"\x7fELF" for launch in kernel.launches)
        assert all(launch.shared_bytes <= ARCHITECTURES[arch].shared_bytes for launch in kernel.launches)


@pytest.mark.parametrize("spec", [CASES["sm90"][0], DECODE_BLOCKS])
def test_codes_are_on_their_way_while_the_step_before_is_computed(spec: KernelSpec) -> None:
    """Tokens of 36 or 72 bytes allow copies of 4 or 8 bytes that no register holds."""
    emitted = TritonBackend("sm90").emit(spec)
    kernel = build_kernels([replace(emitted, expects=(*emitted.expects, "cp.async"))], "sm90", cache=kernel_cache())[0][0]
    assert kernel.launches[0].num_stages == 3
