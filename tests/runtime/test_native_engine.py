"""The native engine, which targets of CPUs have by default, against the reference."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import qcompile
from qcompile.codegen.cpp import build
from qcompile.compiled import CompiledModel
from qcompile.errors import EngineError
from qcompile.ir.lowered import Engine
from qcompile.runtime.engines import make_engine
from qcompile.runtime.engines.native import NativeEngine
from qcompile.runtime.native.processor import best_library
from qcompile.target import parse_target
from tests.codegen.cpp.harness import RUNNABLE
from tests.models import example_inputs, tiny

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [11]]
SIZES = {"max_batch": 4, "max_context": 32}


@cache
def compiled(target: str, family: str = "llama") -> CompiledModel:
    """A tiny model with native kernels."""
    return qcompile.compile(tiny(family), target, recipe="nearest", **SIZES)


def engines(model: CompiledModel) -> tuple[NativeEngine, Engine]:
    """The native engine of a model, and the reference over the same contents."""
    native = make_engine(model.contents, name="native", **SIZES)
    assert isinstance(native, NativeEngine)
    return native, make_engine(model.contents, name="reference", **SIZES)


def generated(engine: Engine, count: int = 6) -> tuple[list[Tensor], list[list[int]]]:
    """Logits of a ragged batch and of each token after it, and the tokens, greedily."""
    logits, tokens = [engine.prefill(PROMPTS)], []
    for _ in range(count):
        tokens.append(logits[-1].argmax(-1).tolist())
        logits.append(engine.decode(tokens[-1]))
    return logits, tokens


def error(made: Tensor, exact: Tensor) -> float:
    """How far apart, beside the greatest."""
    return float((made - exact).abs().max() / exact.abs().max())


# With a cache in halves a key that lies between two of them may round either way: half a unit of its last place.
@pytest.mark.parametrize(("target", "bound"), [("cpu-int4", 1e-5), ("cpu-fp32", 1e-5), ("cpu-int8-kv16", 2.0**-11)])
def test_a_llama_runs_wholly_native(target: str, bound: float) -> None:
    native, reference = engines(compiled(target))
    assert {name: len(runs) for name, runs in native._runs.items()} == {"forward": 1, "prefill": 1, "decode": 1}
    ids = torch.randint(3, 100, (3, 9), generator=torch.Generator().manual_seed(0))
    assert error(*(engine.forward({"input_ids": ids})[0] for engine in (native, reference))) < bound
    (made, tokens), (exact, expected) = generated(native), generated(reference)
    assert max(map(error, made, exact)) < bound
    assert tokens == expected
    assert len(native._program("decode", 3, 1).calls) == 1


def test_layers_are_one_function() -> None:
    model = qcompile.compile(tiny("llama", num_hidden_layers=5), "cpu-int4", recipe="nearest", engine="native", **SIZES)
    source = model.contents.binaries["native.cpp"].decode()
    for name in ("prefill", "decode"):
        assert len(re.findall(rf"^    for .*layer < 4.*\n        {name}_0_layer\(team, t, t \+ \d+ \+ layer \* \d+\);", source, re.M)) == 1
    native, reference = engines(model)
    (made, tokens), (exact, expected) = generated(native), generated(reference)
    assert max(map(error, made, exact)) < 1e-5
    assert tokens == expected


@pytest.mark.parametrize(("family", "runs"), [("gpt2", 1), ("gemma2", 1), ("gpt_neox", 1), ("falcon", 1), ("mixtral", 3)])
def test_other_families(family: str, runs: int) -> None:
    """Those that torch serves between runs are the mixtures of two layers."""
    native, reference = engines(compiled("cpu-int4", family))
    assert {len(found) for found in native._runs.values()} == {runs}
    (made, tokens), (exact, expected) = generated(native), generated(reference)
    assert max(map(error, made, exact)) < 1e-5
    assert tokens == expected


def test_an_encoder_runs_wholly_native() -> None:
    inputs = example_inputs("bert")
    inputs["attention_mask"][1, 4:] = 0
    model = qcompile.compile(tiny("bert"), "cpu-fp32", engine="native", example_inputs=inputs)
    assert isinstance(model.engine, NativeEngine)
    assert len(model.engine._runs["forward"]) == 1
    assert error(model(**inputs)["last_hidden_state"], tiny("bert")(**inputs).last_hidden_state.detach()) < 1e-5


# A number passes some 16 operators from the embedding to the logits, and each of them rounds by half a unit of its last place; where
# activations are codes of 8 bits one of these may turn, a 256th of the greatest.
@pytest.mark.parametrize(
    ("target", "family", "compute", "bound"),
    [
        ("cpu-bf16", "llama", torch.bfloat16, 16 * 2.0**-9),
        ("cpu-bf16", "gpt2", torch.bfloat16, 16 * 2.0**-9),
        ("cpu-int4-kv8", "llama", torch.float16, 16 * 2.0**-12 + 2.0**-8),
        ("cpu-w8a8", "llama", torch.bfloat16, 16 * (2.0**-9 + 2.0**-8)),
    ],
)
def test_values_of_16_bits_run_wholly_native(target: str, family: str, compute: torch.dtype, bound: float) -> None:
    scheme = replace(parse_target(target).scheme, compute=compute)
    native, reference = engines(qcompile.compile(tiny(family), target, recipe="nearest", engine="native", scheme=scheme, **SIZES))
    assert {name: len(runs) for name, runs in native._runs.items()} == {"forward": 1, "prefill": 1, "decode": 1}
    made, exact = native.prefill(PROMPTS), reference.prefill(PROMPTS)
    for _ in range(4):
        assert made.dtype == compute
        assert error(made.float(), exact.float()) < bound
        tokens = exact.argmax(-1).tolist()
        made, exact = native.decode(tokens), reference.decode(tokens)


def test_neither_threads_nor_neighbours_change_a_bit() -> None:
    model, threads = compiled("cpu-int4"), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(torch.stack(generated(engines(model)[0])[0]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
    alone = engines(model)[0]
    assert torch.equal(alone.prefill(PROMPTS[1:2])[0], results[0][0][1])


def test_a_longer_prompt_than_a_chunk_and_pages_of_few_tokens() -> None:
    model = qcompile.compile(tiny("llama"), "cpu-int4", recipe="nearest", prefill_chunk=5, **SIZES)
    prompts = [list(range(3, 20)), [4, 5]]
    native, reference = (make_engine(model.contents, name=name, page_tokens=4, **SIZES) for name in ("native", "reference"))
    assert error(native.prefill(prompts), reference.prefill(prompts)) < 1e-5
    assert error(native.decode([7, 8]), reference.decode([7, 8])) < 1e-5


@pytest.fixture
def artifact(tmp_path: Path) -> Iterator[Path]:
    """One that was saved with its library."""
    compiled("cpu-int4").save(tmp_path / "artifact")
    yield tmp_path / "artifact"
    shutil.rmtree(tmp_path / "artifact")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="counts calls of glibc's allocator")
def test_a_decode_step_allocates_nothing(artifact: Path, tmp_path: Path) -> None:
    compiler, here = build.find_compiler(), Path(__file__).parent
    assert compiler is not None
    counter = str(tmp_path / "allocations.so")
    subprocess.run([compiler, "-x", "c", "-O1", "-shared", "-fPIC", str(here / "allocations.c"), "-o", counter], check=True)
    command = [sys.executable, str(here / "count_allocations.py"), str(artifact)]
    done = subprocess.run(command, env=os.environ | {"LD_PRELOAD": counter}, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    for threads in (1, 2):
        assert found[f"native, {threads} threads"][:2] == [0, 0]
        # The list of a sequence's tokens grows now and then; a few blocks of Python's are those of the counting itself.
        calls, _, blocks = found[f"decode, {threads} threads"]
        assert calls <= 1
        assert blocks < 16
        # The counter does count: logits in new memory are an allocation each, in 32 steps.
        assert found[f"new logits, {threads} threads"][0] >= 32


def test_logits_are_the_callers_or_where_it_wants_them() -> None:
    native = engines(compiled("cpu-int4"))[0]
    kept = native.prefill(PROMPTS)
    out = torch.empty_like(kept)
    first = native.decode([5, 6, 7], out=out)
    assert first is out
    copied, second = out.clone(), native.decode([5, 6, 7])
    assert torch.equal(out, copied)
    assert not torch.equal(second, copied)
    with pytest.raises(EngineError, match=r"decode: out: expected logits of 3 rows, got shape \[2, "):
        native.decode([5, 6, 7], out=out[:2])
    assert native.state == [len(prompt) + 2 for prompt in PROMPTS]


def test_a_target_of_a_gpu_has_no_native_engine() -> None:
    with pytest.raises(EngineError, match=r"expected a target cpu-\* or reference-\*, got sm90-int4"):
        qcompile.compile(tiny("llama"), "sm90-int4", engine="native")


def test_the_best_library_is_one_that_the_processor_runs() -> None:
    files = [f"native-{platform.machine()}-{name}.so" for name in ("portable", RUNNABLE[0])]
    assert best_library(files) == files[1]
    assert best_library(files[:1]) == files[0]
    assert best_library(["native-other-portable.so", "native.cpp"]) is None
