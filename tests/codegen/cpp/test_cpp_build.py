"""What is emitted, refused and built; `ACCEPT_GOLDEN=1` accepts what is emitted now."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from qcompile.codegen.cpp import build
from qcompile.codegen.cpp.backend import OPERATORS, CppBackend
from qcompile.codegen.cpp.build import build_libraries
from qcompile.codegen.cpp.entry import kernels_source
from qcompile.errors import CoverageError, KernelBuildError, OptionError
from qcompile.ir.lowered import KernelSpec
from tests.codegen.cpp.harness import RUNNABLE
from tests.codegen.triton import specs

GOLDEN = Path(__file__).parents[2] / "golden" / "native"
BACKEND = CppBackend()


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("add_rms_norm", specs.rms_norm(576, "fp32", residual=True)),
        ("quantized_linear", specs.quantized_linear(1536, 576, "m2-63", "int4 g32 asym fp16", "fp32")),
    ],
)
def test_golden(name: str, spec: KernelSpec) -> None:
    path, source = GOLDEN / f"{name}.cpp", BACKEND.emit(spec).source
    if os.environ.get("ACCEPT_GOLDEN"):
        path.write_text(source, encoding="utf-8")
    assert source == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (specs.with_format(specs.rms_norm(576, "bf16"), x="fp8e4nv"), "x is fp8e4nv: expected bf16 or fp16 or fp32"),
        (specs.quantized_linear(8, 64, "m1", "int3 g32 sym fp16", "fp32"), "codes are int3: expected int2 or int4 or int8"),
        (specs.quantized_linear(8, 64, "m1", "nf4 g32 sym fp16", "fp32"), "codes are nf4: expected int2 or int4 or int8"),
        (specs.quantized_linear(8, 1 << 16, "m1", "int4 g16 asym fp16", "fp32"), "4096 groups with zero points: expected at most 1024"),
        (specs.with_format(specs.quantized_linear(8, 64, "m1", dtype="fp32"), scale="fp32"), "scale is fp32: expected fp16"),
        (specs.with_option(specs.rms_norm(576, "fp32"), other=1), "option 'other': expected one of eps, offset"),
        (specs.spec("attend_ranked", sizes={}, formats={}), "operator 'attend_ranked' has no C++ kernel: expected one of linear"),
        (specs.spec("rope", sizes={"H": 1, "R": 7}, formats=dict.fromkeys(("x", "cos", "sin", "out"), "fp32")), "R=7: expected an even"),
    ],
)
def test_refusals(spec: KernelSpec, reason: str) -> None:
    assert str(BACKEND.refuses(spec)).startswith(reason)
    with pytest.raises(CoverageError, match=r"ask refuses\(\) before emit\(\)"):
        BACKEND.emit(spec)


def test_one_kernel_serves_all_numbers_of_rows_but_one() -> None:
    kernels = [BACKEND.emit(specs.quantized_linear(64, 64, bucket, dtype="fp32")) for bucket in ("m1", "m2-63", "m64")]
    assert kernels[1] == kernels[2]
    assert kernels[0].name != kernels[1].name


def test_functions_that_kernels_share_stand_once() -> None:
    kernels = [BACKEND.emit(specs.quantized_linear(count, 64, "m1", dtype="fp32")) for count in (32, 64)]
    source = kernels_source(kernels, "Two kernels.")
    assert source.count("static inline void int4_channel_fp16_product(") == 1
    assert all(source.count(f"static void {kernel.name}(") == 1 for kernel in kernels)


def test_operands_end_with_the_results() -> None:
    for name, operator in OPERATORS.items():
        results = [operand.startswith("out") for operand in operator.operands]
        assert results == sorted(results), name


def test_a_source_that_does_not_compile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path))
    with pytest.raises(KernelBuildError, match=r"fault of qcompile: report it to .* with .*/failed/native-portable-\w+\.cpp and") as caught:
        build_libraries("int nothing(", ["portable"])
    (path,) = (tmp_path / "failed").glob("*.cpp")
    assert path.read_text() == "int nothing("
    ran, said = path.with_suffix(".log").read_text().split("\n", 1)
    assert f"{path} -o native.so" in ran
    assert ran in str(caught.value)
    assert f"{path}:1:13: error: " in said
    assert f"{path}:1:13: error: " in str(caught.value)
    with pytest.raises(KernelBuildError, match=str(tmp_path / "dump" / "native-portable-")):
        build_libraries("int nothing(", ["portable"], failed_in=tmp_path / "dump")


def test_instruction_sets_that_a_compiler_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    known = build.instruction_sets()
    with pytest.raises(OptionError, match=rf"instruction_sets: expected some of {', '.join(known)}, .* got sse; leave it out"):
        build_libraries("", ["sse"])
    with pytest.raises(OptionError, match="got none"):
        build_libraries("", [])
    monkeypatch.setattr(build, "takes", lambda _, *flags: "-mavx512bf16" not in flags)
    assert build.instruction_sets() == tuple(name for name in known if name != "avx512")


def test_builds_are_kept_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = 'extern "C" int answer() { return 42; }\n'
    first = build_libraries(source, RUNNABLE[:1], kept_in=tmp_path)
    assert first == build_libraries(source, RUNNABLE[:1])
    (kept,) = tmp_path.glob("*.so")
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build_libraries(source, RUNNABLE[:1], kept_in=tmp_path) == first
    kept.write_bytes(b"damaged")
    monkeypatch.setattr(build, "_compile", lambda *_: b"anew")
    assert list(build_libraries(source, RUNNABLE[:1], kept_in=tmp_path).values()) == [b"anew"]


def test_a_compiler_without_openmp_still_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "has_threads", lambda _: False)
    kernel = BACKEND.emit(replace(specs.gather_last(8, "fp32")))
    assert len(build_libraries(kernels_source([kernel], "One."), RUNNABLE[:1], extra=("-O1",))) == 1
