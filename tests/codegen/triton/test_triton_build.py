"""Ahead-of-time builds on a machine without a GPU: gates, instruction classes, cache, reproducibility."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qcompile.codegen.triton import gates
from qcompile.codegen.triton.backend import TritonBackend
from qcompile.codegen.triton.build import build_kernels, kernel_cache
from qcompile.codegen.triton.tiles import ARCHITECTURES
from qcompile.errors import KernelBuildError
from qcompile.ir.lowered import Kernel, KernelSpec
from tests.codegen.triton import specs

pytest.importorskip("triton")

SUBSET: list[KernelSpec] = [
    *specs.small_llama()[:6],
    *(specs.quantized_linear(3072, 576, bucket, "int4 g32 asym fp16", "fp16", bias=True) for bucket in ("m2-63", "m64")),
    *(specs.quantized_linear(333, 571, bucket, "int8 g48 asym fp32") for bucket in ("m1", "m2-63", "m64")),
    specs.quantized_linear(333, 571, "m64", "int4 g20 sym fp16"),
    specs.quantized_linear(576, 1536, "m64", "int8 channel sym fp16"),
    *(specs.linear(576, 576, bucket) for bucket in ("m1", "m2-63", "m64")),
    specs.rotary_table(32),
    specs.rope(9, 64),
    specs.append(3, 64),
    specs.gated_activation(1536, "gelu"),
    *(specs.attend(9, 3, 64, bucket) for bucket in ("m1", "m64")),
    *(specs.attend(32, 8, 128, bucket) for bucket in ("m1", "m64")),
    *(specs.attend(8, 4, 256, bucket, softcap=50.0, window=4096) for bucket in ("m1", "m64")),
    specs.attend(8, 8, 80, "m64", sinks="bf16"),
    specs.attend(4, 2, 8, "m1"),
    *(specs.quantized_linear(16, 32, bucket, "int8 channel sym fp16") for bucket in ("m1", "m2-63", "m64")),
    specs.embedding(49152, 576, "int4 g64 asym fp16"),
    specs.gather_last(576),
    specs.argmax(49152),
    specs.topk(152064, 64),
]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds of this session only."""
    return tmp_path_factory.mktemp("kernels")


def build(spec: KernelSpec, cache: Path | None, arch: str = "sm90", **changes: object) -> Kernel:
    """Build one specification, some fields of its kernel changed."""
    kernel = replace(TritonBackend(arch).emit(spec), **changes)  # type: ignore[arg-type]
    return build_kernels([kernel], arch, cache=cache)[0][0]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_build_and_pass_the_gates(arch: str, cache: Path) -> None:
    backend = TritonBackend(arch)
    kernels, binaries = build_kernels([backend.emit(spec) for spec in SUBSET], arch, cache=cache)
    for launch in (launch for kernel in kernels for launch in kernel.launches):
        assert binaries[launch.binary][:4] == b"\x7fELF"
        assert launch.symbol == launch.function
        assert 0 < launch.registers <= gates.MOST_REGISTERS
        assert launch.shared_bytes <= ARCHITECTURES[arch].shared_bytes
    meant = {name for kernel in kernels for name in kernel.expects}
    assert {"load128", "cp.async", ARCHITECTURES[arch].matrix} <= meant


def test_few_tokens_already_use_the_warp_group_instruction(cache: Path) -> None:
    kernel = build(specs.quantized_linear(576, 1536, "m2-63"), cache)
    assert kernel.expects == ("wgmma", "cp.async")


def test_binaries_are_the_same_byte_for_byte_wherever_they_are_built() -> None:
    kernel = TritonBackend("sm90").emit(specs.quantized_linear(576, 1536, "m2-63"))
    assert build_kernels([kernel], "sm90") == build_kernels([kernel], "sm90", workers=1)


def test_a_second_build_compiles_nothing_unless_the_cache_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(specs.gated_activation(1536), tmp_path)

    def never(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr("qcompile.codegen.triton.build.run_worker", never)
    assert build(specs.gated_activation(1536), tmp_path) == first
    for damaged in tmp_path.glob("*.cubin"):
        damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(AssertionError, match="compiled again"):
        build(specs.gated_activation(1536), tmp_path)


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path))
    assert kernel_cache() == tmp_path / "kernels"


def test_an_oversized_tile_is_refused_loudly() -> None:
    kernel = TritonBackend("sm89").emit(specs.linear(4096, 4096, "m64"))
    large = replace(kernel, source=kernel.source.replace("BLOCK_M: tl.constexpr = 64", "BLOCK_M: tl.constexpr = 1024"))
    assert large.source != kernel.source
    with pytest.raises(KernelBuildError, match=rf"{kernel.name}\.linear: needs \d+ bytes of shared memory, sm89 has 101376"):
        build_kernels([large], "sm89")


def test_a_launch_that_does_not_fit_is_built_with_fewer_stages() -> None:
    kernel = TritonBackend("sm89").emit(specs.linear(4096, 4096, "m64"))
    deep = replace(kernel, launches=(replace(kernel.launches[0], num_stages=9),))
    assert build_kernels([deep], "sm89")[0][0].launches[0].num_stages == 2


def test_spills_are_refused_loudly() -> None:
    with pytest.raises(KernelBuildError, match=r"rotary_table_\w+\.rotary_table: spills \d+ bytes a thread"):
        build(specs.rotary_table(32), None, expects=())


def test_a_missing_instruction_class_is_refused_loudly(cache: Path) -> None:
    with pytest.raises(KernelBuildError, match=r"argmax_\w+: expected wgmma instructions, found load128"):
        build(specs.argmax(49152), cache, expects=("wgmma",))


def test_an_unknown_instruction_class_lists_the_known_ones(cache: Path) -> None:
    with pytest.raises(KernelBuildError, match="instruction class 'dpx' is unknown; expected one of mma, wgmma"):
        build(specs.argmax(49152), cache, expects=("dpx",))


def test_a_source_that_does_not_compile_names_its_launch() -> None:
    kernel = TritonBackend("sm90").emit(specs.argmax(64))
    with pytest.raises(KernelBuildError, match=r"argmax_\w+\.search_chunk: does not compile: CompilationError"):
        build_kernels([replace(kernel, source=kernel.source.replace("tl.program_id(0)", "tl.program_identity(0)"))], "sm90")


def test_a_missing_triton_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(KernelBuildError, match=r"pip install qcompile\[triton\]"):
        build_kernels([TritonBackend("sm90").emit(specs.argmax(64))], "sm90")
