"""Whose libraries run: built here, allowed, built anew from the graph, or none; and what is told of it."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile
from qcompile.codegen.cpp import build
from qcompile.codegen.cpp.entry import kernels_source
from qcompile.compiled import CompiledModel
from qcompile.errors import ArtifactError, CoverageError, EngineError, KernelBuildError, UntrustedCodeError
from qcompile.ir.native import NATIVE_SOURCE
from qcompile.rebuild import build_artifact
from qcompile.runtime.artifact import load_artifact
from qcompile.runtime.engines import make_engine
from qcompile.runtime.engines.native import NativeEngine
from tests.codegen.cpp.harness import RUNNABLE
from tests.models import example_inputs, tiny
from tests.runtime.artifacts.tampering import reseal

OPTIONS = {"recipe": "nearest", "max_batch": 2, "max_context": 32}
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5]]
NO_COMPILER = r"there is no C\+\+ compiler.*; install g\+\+ \(Debian, Ubuntu: apt install g\+\+; .*name yours in \$CXX"
SERVED_BY_TORCH = {f"torch_cpu.{name}" for name in ("embedding", "quantized_linear", "cache_attend")}


@cache
def compiled() -> CompiledModel:
    """A tiny llama, as targets of CPUs are compiled by default."""
    return qcompile.compile(tiny("llama"), "cpu-int4", **OPTIONS)


@cache
def for_torch() -> CompiledModel:
    """The same without a library."""
    return qcompile.compile(tiny("llama"), "cpu-int4", engine="torch_cpu", **OPTIONS)


def small(**options: Any) -> CompiledModel:
    """One linear: quickly compiled."""
    torch.manual_seed(0)
    return qcompile.compile(torch.nn.Linear(24, 8), "cpu-int8", recipe="nearest", example_inputs=torch.ones(3, 24), **options)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """It, saved here."""
    compiled().save(tmp_path / "artifact")
    return tmp_path / "artifact"


@pytest.fixture
def stranger(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """It, on a machine that has built nothing yet."""
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "elsewhere"))
    return artifact


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose path has no compiler; what others built is built by now."""
    compiled()
    (tmp_path / "bin").mkdir()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.fixture
def silence() -> Iterator[None]:
    """Every warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def says(model: CompiledModel) -> list[list[int]]:
    """Tokens after the prompts."""
    tokens: list[list[int]] = model.generate(PROMPTS, max_new_tokens=5, ignore_eos=True)
    return tokens


def load(path: Path, **options: object) -> CompiledModel:
    """With room for all prompts."""
    return qcompile.load(path, max_batch=2, max_context=32, **options)  # type: ignore[arg-type]


def library(path: Path) -> Path:
    """The file that would be loaded."""
    (found,) = (path / "kernels").glob("*.so")
    return found


# --- what may run


@pytest.mark.usefixtures("silence")
def test_what_was_built_here_is_loaded_without_a_word(artifact: Path) -> None:
    model = load(artifact)
    assert (model.engine.name, model.contents.settings.engine) == ("native", "native")
    assert (artifact / "kernels" / NATIVE_SOURCE).read_text() == model.contents.binaries[NATIVE_SOURCE].decode()
    assert sorted(path.suffix for path in (artifact / "kernels").iterdir()).count(".cpp") == len(model.contents.kernels) + 1
    assert says(model) == says(compiled())
    assert says(load(artifact, engine="torch_cpu")) == says(load(artifact, engine="reference")) == says(model)


@pytest.mark.usefixtures("silence")
def test_the_caller_may_allow_what_was_built_elsewhere(stranger: Path) -> None:
    with pytest.raises(UntrustedCodeError, match="allow_native=True"):
        make_engine(load_artifact(stranger), name="native")
    model = load(stranger, allow_native=True)
    assert model.engine.name == "native"
    assert model.contents.binaries == compiled().contents.binaries
    assert load(stranger, engine="torch_cpu").engine.name == "torch_cpu", "nothing native runs, nothing is said"


def test_what_was_built_elsewhere_is_built_anew_from_the_graph(stranger: Path) -> None:
    with pytest.warns(UserWarning, match=rf"built anew .*: {library(stranger).name} was not built on this machine .*; `qcompile build"):
        model = load(stranger)
    assert model.engine.name == "native"
    assert [row.kernel for row in model.coverage] == [row.kernel for row in compiled().coverage]
    assert says(model) == says(compiled())


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_torch_serves_what_was_built_elsewhere(stranger: Path) -> None:
    with pytest.warns(UserWarning, match=rf"served by torch_cpu .* was not built on this machine .*, and {NO_COMPILER}"):
        model = load(stranger)
    assert model.engine.name == "torch_cpu"
    assert {row.kernel for row in model.coverage} == SERVED_BY_TORCH
    assert all("no C++ kernel: native-" in row.reason for row in model.coverage)
    assert says(model) == says(compiled())


def test_a_damaged_library_is_named(artifact: Path) -> None:
    code = bytearray(library(artifact).read_bytes())
    code[len(code) // 2] ^= 1
    library(artifact).write_bytes(code)
    for allow in (False, True):
        with pytest.raises(ArtifactError, match=rf"{library(artifact).name}: damaged: its contents do not have the SHA-256"):
            qcompile.load(artifact, allow_native=allow)


def forged(artifact: Path, code: bytes) -> Path:
    """Another library in place of the artifact's, and a manifest that agrees."""
    library(artifact).write_bytes(code)
    reseal(artifact, f"kernels/{library(artifact).name}")
    return artifact


def test_a_forged_library_is_not_even_loaded(artifact: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    source = f'#include <cstdio>\n__attribute__((constructor)) static void ran() {{ std::fclose(std::fopen("{trace}", "w")); }}\n'
    (code,) = build.build_libraries(source, RUNNABLE[:1]).values()
    with pytest.warns(UserWarning, match="built anew .* was not built on this machine"):
        model = load(forged(artifact, code))
    assert says(model) == says(compiled())
    assert not trace.exists()
    with pytest.warns(UserWarning, match="built anew .*: expected a library made for the artifact's plan, got one of another"):
        load(artifact, allow_native=True)
    assert trace.exists(), "whoever allows it runs it"


def test_a_library_that_is_none_or_of_another_plan_is_built_anew_although_it_is_allowed(artifact: Path) -> None:
    with pytest.warns(UserWarning, match="built anew .*: expected a library that this system loads, got"):
        model = load(forged(artifact, b"no library"), allow_native=True)
    assert says(model) == says(compiled())
    with pytest.raises(EngineError, match="expected a library that this system loads, got"):
        make_engine(load_artifact(artifact, allow_native=True), name="native")
    (code,) = build.build_libraries(kernels_source([], "None."), RUNNABLE[:1]).values()
    with pytest.raises(EngineError, match="expected a library made for the artifact's plan, got one of another"):
        NativeEngine(load_artifact(forged(artifact, code), allow_native=True))


# --- what has no library


@pytest.mark.usefixtures("silence")
def test_torch_by_choice_stays_torch(tmp_path: Path) -> None:
    for_torch().save(tmp_path / "plain")
    model = load(tmp_path / "plain")
    assert (model.engine.name, model.contents.settings.engine) == ("torch_cpu", "torch_cpu")
    assert not model.contents.binaries
    native = load(tmp_path / "plain", engine="native")
    assert native.engine.name == "native"
    assert any(row.kernel.startswith("quantized_linear_m1_") for row in native.coverage)
    assert says(native) == says(model) == says(compiled())


def older(path: Path) -> Path:
    """An artifact as earlier versions wrote it: for torch, without a word on engines."""
    for_torch().save(path)
    reseal(path, change=lambda manifest: manifest["settings"].pop("engine"))
    return path


def test_an_older_artifact_gets_a_library_and_the_caller_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="built anew from the artifact's graph: the artifact has no library for this processor"):
        model = load(older(tmp_path / "older"))
    assert model.engine.name == "native"
    assert says(model) == says(compiled())


@pytest.mark.usefixtures("no_compiler")
def test_an_older_artifact_without_a_compiler_is_served_by_torch(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=f"served by torch_cpu .*: the artifact has no library for this processor, and {NO_COMPILER}"):
        model = load(older(tmp_path / "older"))
    assert says(model) == says(compiled())


@pytest.mark.usefixtures("silence")
def test_a_model_without_an_operator_that_has_a_kernel_is_no_library(tmp_path: Path) -> None:
    inputs = example_inputs("resnet")
    model = qcompile.compile(tiny("resnet"), "cpu-fp32", passes="canonicalize,plan-memory", example_inputs=inputs)
    model.save(tmp_path / "net")
    again = qcompile.load(tmp_path / "net")
    assert (model.engine.name, again.engine.name, again.contents.settings.engine) == ("torch_cpu", "torch_cpu", "native")
    assert torch.equal(model(**inputs)["pooler_output"], again(**inputs)["pooler_output"])


# --- no compiler, and C++ that does not compile


@pytest.mark.usefixtures("no_compiler")
def test_compiling_without_a_compiler(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = qcompile.compile(tiny("llama"), "cpu-int4", **OPTIONS)
    (warning,) = told
    assert str(warning.message).startswith(
        "cpu-int4: served by torch_cpu in place of native kernels: there is no C++ compiler; install g++"
    )
    assert warning.filename == __file__
    assert model.engine.name == "torch_cpu"
    assert {row.reason.rpartition("; ")[2] for row in model.coverage} == {"no C++ kernel: there is no C++ compiler"}
    assert says(model) == says(compiled())
    with pytest.raises(CoverageError, match=r"no C\+\+ kernel: there is no C\+\+ compiler"), pytest.warns(UserWarning, match="served by"):
        small(strict=True)
    with pytest.raises(KernelBuildError, match=rf"expected a C\+\+ compiler, got none: {NO_COMPILER}"):
        build.build_libraries("")


def test_libraries_are_built_later_of_what_was_compiled_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("CXX", str(tmp_path / "none"))
        with pytest.warns(UserWarning, match=r"no C\+\+ compiler \(\$CXX is '.*none', which is no program"):
            made = small()
    made.save(tmp_path / "artifact")
    build_artifact(tmp_path / "artifact")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = qcompile.load(tmp_path / "artifact")
    assert (made.engine.name, model.engine.name) == ("torch_cpu", "native")
    assert [(row.kernel.partition("_m1")[0], row.reason) for row in model.coverage] == [("quantized_linear", "")]
    x = torch.randn(3, 24)
    assert torch.allclose(model(x), made(x), atol=1e-6)


@pytest.fixture
def broken_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes every flag and compiles nothing but an empty file; what others built is built by now."""
    compiled()
    script = tmp_path / "broken++"
    script.write_text(f'#!/bin/sh\ncase "$*" in *{os.devnull}*|*--version*) exit 0;; esac\necho "native.cpp:1: error: no" >&2; exit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))


@pytest.mark.usefixtures("broken_compiler")
def test_emitted_code_that_does_not_compile(tmp_path: Path) -> None:
    fault = (
        r"served by torch_cpu .* expected a source that broken\+\+ compiles, got errors; .*a fault of qcompile: report it .*/dump/failed/"
    )
    with pytest.warns(UserWarning, match=fault):
        model = small(dump=tmp_path / "dump")
    assert [path.suffix for path in sorted((tmp_path / "dump" / "failed").iterdir())] == [".cpp", ".log"]
    assert model.engine.name == "torch_cpu"
    assert not model.contents.binaries
    (row,) = model.coverage
    assert row.kernel == "torch_cpu.quantized_linear"
    assert "no C++ kernel: native kernels: expected a source that broken++ compiles" in row.reason
    assert "torch_cpu.quantized_linear" in (tmp_path / "dump" / "coverage.json").read_text()
    x = torch.randn(3, 24)
    assert torch.equal(model(x), small(engine="torch_cpu")(x))
    with pytest.raises(KernelBuildError, match="a fault of qcompile"):
        small(strict=True)


@pytest.mark.usefixtures("broken_compiler")
def test_an_artifact_whose_code_does_not_compile_here(stranger: Path) -> None:
    with pytest.warns(UserWarning, match=r"served by torch_cpu .* was not built on this machine .*, and native kernels: expected a source"):
        assert load(stranger).engine.name == "torch_cpu"
    before = {path: path.read_bytes() for path in stranger.rglob("*") if path.is_file()}
    with pytest.raises(KernelBuildError, match="a fault of qcompile"):
        build_artifact(stranger)
    assert {path: path.read_bytes() for path in stranger.rglob("*") if path.is_file()} == before


# --- build_artifact


@pytest.mark.usefixtures("silence")
def test_building_an_artifact_where_it_is_to_run(stranger: Path, tmp_path: Path) -> None:
    shutil.copytree(stranger, tmp_path / "other")
    other = tmp_path / "other" / "kernels" / "native-vax-portable.so"
    other.write_bytes(b"for another machine")
    reseal(tmp_path / "other", f"kernels/{other.name}")
    made = build_artifact(tmp_path / "other")
    assert made.untrusted == (other.name,)
    assert other.read_bytes() == b"for another machine"
    model = load(tmp_path / "other")
    assert model.engine.name == "native"
    assert says(model) == says(compiled())
    digest = load_artifact(tmp_path / "other").digest
    build_artifact(tmp_path / "other")
    assert load_artifact(tmp_path / "other").digest == digest, "there is nothing to do"
    with pytest.raises(ArtifactError, match="expected a path that does not exist"):
        build_artifact(stranger, tmp_path / "other")
    build_artifact(stranger, tmp_path / "third", instruction_sets="portable")
    assert library(tmp_path / "third").name.endswith("-portable.so")


def test_what_cannot_be_built(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qcompile.compile(torch.nn.Linear(8, 8), "onnx-fp32", example_inputs=torch.ones(1, 8)).save(tmp_path / "onnx")
    with pytest.raises(EngineError, match=r"expected an artifact for cpu-\* or reference-\*, got onnx-fp32"):
        build_artifact(tmp_path / "onnx")
    qcompile.compile(torch.nn.Conv2d(1, 1, 3), "cpu-fp32", example_inputs=torch.ones(1, 1, 4, 4)).save(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match=r"expected operators that have C\+\+ kernels, got none"):
        build_artifact(tmp_path / "nothing")
    monkeypatch.setenv("CXX", "none")
    with pytest.raises(KernelBuildError, match=r"expected a C\+\+ compiler, got none: .*\$CXX is 'none'"):
        build_artifact(artifact, tmp_path / "out")
    assert not (tmp_path / "out").exists()
