"""Emitted sources and launches against goldens; `ACCEPT_GOLDEN=1` accepts what is emitted now."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qcompile.codegen.triton.backend import TritonBackend
from qcompile.ir import size
from qcompile.ir.lowered import Kernel, KernelSpec, Launch
from tests.codegen.triton import activation_specs, cache_specs, settled_specs, specs

GOLDEN = Path(__file__).parents[2] / "golden" / "triton"

BLOCKS = (cache_specs.SORTED, cache_specs.BLOCK)
CASES: dict[str, tuple[str, KernelSpec]] = {
    "linear_m1": ("sm90", specs.linear(576, 576, "m1")),
    "linear_m64_bias": ("sm80", specs.linear(1536, 576, "m64", bias=True)),
    "int4_m1": ("sm90", specs.quantized_linear(1536, 576, "m1")),
    "int4_m2-63_split": ("sm90", specs.quantized_linear(576, 1536, "m2-63")),
    "int4_m64_asymmetric": ("sm90", specs.quantized_linear(3072, 576, "m64", "int4 g32 asym fp16")),
    "int3_m1": ("sm90", specs.quantized_linear(1536, 576, "m1", "int3 g64 asym fp16")),
    "mxfp4_m64": ("sm90", specs.quantized_linear(3072, 576, "m64", "fp4 g32 sym e8m0")),
    "nf4_m2-63": ("sm90", specs.quantized_linear(1536, 576, "m2-63", "nf4 g64 sym int8")),
    "int8_m2-63": ("sm89", specs.quantized_linear(1536, 576, "m2-63", "int8 channel sym fp16", "fp16", bias=True)),
    "add_rms_norm": ("sm90", specs.rms_norm(576, residual=True)),
    "rotary_table": ("sm90", specs.rotary_table(32)),
    "rope": ("sm90", specs.rope(9, 64)),
    "gated_activation": ("sm90", specs.gated_activation(1536)),
    "append": ("sm90", specs.append(3, 64)),
    "decode": ("sm90", specs.attend(9, 3, 64, "m1")),
    "decode_packed": ("sm90", cache_specs.attend_packed(9, 3, 64, "m1")),
    "decode_block": ("sm90", cache_specs.attend_packed(9, 3, 64, "m1", cache_specs.SORTED, cache_specs.BLOCK)),
    "append_block": ("sm90", cache_specs.append_packed(3, 64, cache_specs.SORTED, cache_specs.BLOCK)),
    "append_packed": ("sm90", cache_specs.append_packed(3, 64, cache_specs.KV4, cache_specs.KVFP8, rotated=64)),
    "prefill_window_softcap_sinks": ("sm100", specs.attend(8, 4, 96, "m64", window=512, softcap=50.0, sinks="bf16")),
    "with_recent": ("sm90", settled_specs.with_recent(3, 64)),
    "retain": ("sm90", settled_specs.retain(3, 64)),
    "settle_per_channel": ("sm90", settled_specs.settle(3, 64, "int4 t32 asym")),
    "settle_per_token": ("sm90", settled_specs.settle(3, 64, "int2 g32 asym")),
    "settle_block": ("sm90", settled_specs.settle(3, 64, cache_specs.SORTED, settled_specs.SINKS)),
    "decode_settled": ("sm90", settled_specs.attend_settled(9, 3, 64, "m1")),
    "prefill_settled": ("sm90", settled_specs.attend_settled(9, 3, 64, "m64")),
    "decode_settled_block": (
        "sm90",
        settled_specs.attend_settled(9, 3, 64, "m1", BLOCKS, settled_specs.SINKS),
    ),
    "embedding": ("sm90", specs.embedding(49152, 576)),
    "quantized_embedding": ("sm90", specs.embedding(49152, 576, "int4 g64 asym fp16")),
    "gather_last": ("sm90", specs.gather_last(576)),
    "argmax": ("sm90", specs.argmax(49152)),
    "topk": ("sm90", specs.topk(49152, 50)),
    "hadamard": ("sm90", activation_specs.hadamard(576, 576)),
    "quantize_groups": ("sm90", activation_specs.quantize("quantize_activation", 576, bits=4, group=64)),
    "quantize_asymmetric": ("sm90", activation_specs.quantize("quantize_activation_asym", 576)),
    "quantize_static": ("sm90", activation_specs.quantize_static(576, zero=True)),
    "add_norm_quantize": ("sm90", activation_specs.quantize("add_norm_quantize", 576)),
    "norm_hadamard_quantize": ("sm90", activation_specs.quantize("norm_quantize", 576, 64, bits=4, group=64)),
    "norm_hadamard_quantize_asymmetric": ("sm90", activation_specs.quantize("add_norm_quantize_asym", 576, 64, bits=4, group=64)),
    "gated_hadamard_quantize": ("sm90", activation_specs.quantize("gated_quantize", 1536, 1536)),
    "w8a8_m1": ("sm90", activation_specs.code_linear(1536, 576, "m1")),
    "w8a8_m64": ("sm90", activation_specs.code_linear(1536, 576, "m64", bias=True)),
    "w4a8_m1": ("sm90", activation_specs.code_linear(1536, 576, "m1", "int4 g64 sym fp16")),
    "w4a8_m2-63_asymmetric": ("sm80", activation_specs.code_linear(576, 1536, "m2-63", "int4 g32 asym fp16", zero=True)),
    "w4a4_m64": ("sm90", activation_specs.code_linear(3072, 576, "m64", "int4 g64 sym fp16", group=64)),
    "float8_m64": ("sm90", activation_specs.code_linear(3072, 576, "m64", "fp8 channel sym fp32")),
}


def describe(launch: Launch) -> str:
    """A launch as text: grid, warps, stages, and every argument with its value and what is assumed of it."""
    grid = " x ".join(size.text(extent) for extent in launch.grid)
    arguments = ", ".join(
        f"{p.name}={size.text(p.value)}:{p.dtype}{f'%{p.divisible_by}' if p.divisible_by > 1 else ''}" for p in launch.parameters
    )
    return f"# launch {launch.function} over {grid}, {launch.num_warps} warps, {launch.num_stages} stages: {arguments}"


def render(kernel: Kernel) -> str:
    """Everything of a kernel that is stored: source, launches, workspaces, layouts, expectations."""
    spaces = [f"# workspace {space.name}: {size.text(space.bytes)} bytes" for space in kernel.workspaces]
    layouts = [f"# layout of {operand}: {layout}" for operand, layout in kernel.layouts]
    tail = [*map(describe, kernel.launches), *spaces, *layouts, f"# expects: {', '.join(kernel.expects) or 'nothing'}"]
    return "\n".join([kernel.source, *tail]) + "\n"


@pytest.mark.parametrize("name", CASES)
def test_emitted_source_is_the_golden(name: str) -> None:
    arch, spec = CASES[name]
    emitted = render(TritonBackend(arch).emit(spec))
    path = GOLDEN / f"{name}_{arch}.txt"
    if os.environ.get("ACCEPT_GOLDEN") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(emitted)
    assert path.read_text() == emitted, f"{path.name} differs: look at the change, then ACCEPT_GOLDEN=1"


def test_every_golden_has_its_case() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == {f"{name}_{arch}" for name, (arch, _) in CASES.items()}


def test_names_are_unique_for_specification_and_target() -> None:
    kernels = [TritonBackend(arch).emit(spec) for arch in ("sm89", "sm90") for _, spec in CASES.values()]
    assert len({kernel.name for kernel in kernels}) == len(kernels)
