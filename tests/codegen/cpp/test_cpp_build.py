"""What is emitted, refused and built; `ACCEPT_GOLDEN=1` accepts what is emitted now."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qcompile.codegen.cpp import build
from qcompile.codegen.cpp.backend import OPERATORS, CppBackend
from qcompile.codegen.cpp.build import build_libraries
from qcompile.codegen.cpp.entry import kernels_source
from qcompile.codegen.cpp.repeats import Item, Repeat, find_repeats
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
    # What it shares with others stands in headers, which come before it.
    path, source = GOLDEN / f"{name}.cpp", BACKEND.emit(spec).source
    source = source[source.index(f"// {name}") :] if name == "quantized_linear" else source
    if os.environ.get("ACCEPT_GOLDEN"):
        path.write_text(source, encoding="utf-8")
    assert source == path.read_text(encoding="utf-8")


def calls(*kinds: str, tensors: Callable[[int], int] = lambda place: place) -> list[Item]:
    """One for each kind, over a tensor of all and one that `tensors` says."""
    return [Item(kind, (0, tensors(place))) for place, kind in enumerate(kinds, 1)]


def test_layers_are_found_where_calls_repeat_over_other_tensors() -> None:
    begin, layer, end = ["embed"], ["norm", "q", "k", "k", "attend"], ["norm", "head"]
    items = calls(*begin, *layer * 6, *end)
    assert find_repeats(items) == [
        Repeat(0, 1), Repeat(1, 5, 6, 5, frozenset({2, 3, 4, 5, 6})), Repeat(31, 1), Repeat(32, 1)
    ]  # fmt: skip
    # Two kinds of layers in turn are one twice as long; a kind that differs once is by itself, as are layers too few to be worth it.
    assert [(part.length, part.count) for part in find_repeats(calls(*(["a", "b"] * 2 + ["c", "b"]) * 4))] == [(6, 4)]
    assert [(part.length, part.count) for part in find_repeats(calls(*"ab" * 5, *"xb", *"ab" * 6))] == [(2, 5), (1, 1), (2, 6), (1, 1)]
    assert {part.count for part in find_repeats(calls(*layer * 2))} == {1}


def test_calls_over_the_same_tensors_or_over_others_at_random_are_no_layers() -> None:
    assert {part.count for part in find_repeats(calls(*"ab" * 20, tensors=lambda place: 1))} == {1}
    assert {part.count for part in find_repeats(calls(*"ab" * 20, tensors=lambda place: place * place))} == {1}
    assert {part.count for part in find_repeats(calls(*"ab" * 20, tensors=lambda place: 99 - place))} == {1}
    # One call of the last layer that reads elsewhere ends the repetition before that layer.
    items = calls(*"abcd" * 8)
    items[30] = Item("c", (0, 77))
    assert find_repeats(items)[0] == Repeat(0, 4, 7, 4, frozenset({1, 2, 3, 4}))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (specs.with_format(specs.rms_norm(576, "bf16"), x="fp8e4nv"), "x is fp8e4nv: expected bf16 or fp16 or fp32"),
        (specs.quantized_linear(8, 1 << 16, "m1", "int4 g16 asym fp16", "fp32"), "K=65536: expected at most 32768 columns"),
        (specs.with_format(specs.quantized_linear(8, 64, "m1", dtype="fp32"), zero="uint8"), "zero is uint8: expected none"),
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
    assert source.count("static inline void fixed_product(") == 1
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
