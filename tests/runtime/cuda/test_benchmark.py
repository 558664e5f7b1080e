"""The GPU benchmark where there is no GPU: it imports, explains itself, and its arithmetic is right."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qcompile.runtime.cuda.program import Program
from tests.runtime.cuda.plans import buffer, context, entry, kernel, launch, pointer, step

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("decode_gpu")


def test_help_needs_no_gpu() -> None:
    found = subprocess.run(
        [sys.executable, str(BENCHMARKS / "decode_gpu.py"), "--help"], capture_output=True, text=True, check=True, cwd=BENCHMARKS.parent,
        env={"PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "the share of the copy bandwidth" in found.stdout


def test_without_a_gpu_it_says_so(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main(["somewhere"]) == 2
    assert "expected an NVIDIA GPU" in capsys.readouterr().out


def test_the_linears_of_a_program_are_found_by_shape(benchmark: ModuleType, driver: object) -> None:
    toy = kernel("toy", "quantized_linear", launch("toy", pointer("x"), pointer("codes", "u8"), pointer("out")))
    buffers = [buffer("x", "input", ("batch", "sequence", 64)), buffer("c", "constant", (8, 32), "uint8"), buffer("s", "constant", (8, 1))]
    outs = [buffer(name, "output", ("batch", "sequence", 8)) for name in ("z", "zz")]
    call = "qcompile.quantized_linear.default"
    steps = [step(call, "x", "c", "s", None, None, 4, 64, out=item.name, kernels={"": "toy"}, node=item.name) for item in outs]
    constants = {"c": torch.zeros(8, 32, dtype=torch.uint8), "s": torch.ones(8, 1)}
    made, _ = context(driver, {"toy": toy}, constants)  # type: ignore[arg-type]
    program = Program(made, entry([*buffers, *outs], steps, ("z", "zz")), {"batch": 1, "sequence": 1}, {})
    assert benchmark.quantized_linears(program) == {(8, 64, 64): program.actions[:1]}


def test_the_table_names_every_ratio(benchmark: ModuleType) -> None:
    text = benchmark.table(
        {
            "gpu": "a GPU", "target": "sm90-int4", "equal_to_reference": {"tokens": 4, "equal": 4, "max_relative_error": 0.01},
            "copy_bytes_per_second": 4e12, "weight_bytes_per_token": 7e7, "share_of_copy_bandwidth": 0.25,
            "decode": [{"batch": 1, "tokens_per_second": 100.0, "device_ms": 1.0}],
            "linears": [{"N": 8, "K": 64, "group_size": 64, "microseconds": {"qcompile": 2.0}, "ratio": {"gemlite": 1.5}}],
        }
    )  # fmt: skip
    assert "4 of 4 tokens" in text
    assert "share of the copy bandwidth 25.0%" in text
    assert "N=8 K=64 g64: 2.0 µs, 1.50x gemlite" in text
