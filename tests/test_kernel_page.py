"""What docs/adding-a-kernel.md shows: both emitters of one operator are emitted as the page says, and compute what they should."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from qcompile.codegen.cpp.build import build_libraries
from qcompile.codegen.cpp.entry import kernels_source
from qcompile.codegen.triton.tiles import architecture
from qcompile.ir.lowered import Kernel
from qcompile.runtime.native.library import Library
from tests.codegen.cpp.harness import RUNNABLE, Kernels
from tests.test_docs import fences

PAGE = Path(__file__).resolve().parents[1] / "docs" / "adding-a-kernel.md"
INTERPRET = "from tests.test_kernel_page import run_triton; run_triton()"


def shown() -> ModuleType:
    """The page's code."""
    module = ModuleType("shown")
    for body in fences(PAGE, "python"):
        exec(compile(body, str(PAGE), "exec"), module.__dict__)
    return module


def triton_kernel() -> Kernel:
    """The page's second kernel."""
    page: Any = shown()
    spec = page.sum_spec(19, "bf16")
    assert page.TRITON_SUM.objection(spec) is None
    made: Kernel = page.TRITON_SUM.emit(spec, architecture("sm90"))
    return made


def run_triton() -> None:
    """Run it in Triton's interpreter; for a process of its own."""
    from tests.codegen.triton.interpreted.harness import guarded, load_source, result, run_launch
    from tests.codegen.triton.interpreted.interpreter import install

    install()
    made = triton_kernel()
    x, y = (guarded(torch.randn(70, 19, generator=torch.Generator().manual_seed(seed)).bfloat16()) for seed in (0, 1))
    out = result((70, 19), torch.bfloat16)
    run_launch(load_source(made), made.launches[0], {"x": x, "y": y, "out": out}, {"rows": 70})
    assert torch.equal(out, x + y)


def test_the_kernel_in_cpp() -> None:
    page: Any = shown()
    spec = page.sum_spec(19, "fp32")
    assert page.SUM.objection(spec) is None
    made = page.SUM.emit(spec)
    assert fences(PAGE, "cpp") == [made.source]
    ((name, code),) = build_libraries(kernels_source([made], "Shown."), RUNNABLE[:1], extra=("-O1",)).items()
    x, y, out = torch.randn(3, 19), torch.randn(3, 19), torch.full((3, 19), torch.nan)
    Kernels(Library(name, code), {spec: made})(spec, {"x": x, "y": y, "out": out}, threads=2)
    assert torch.equal(out, x + y)


def test_the_kernel_in_triton() -> None:
    pytest.importorskip("triton")
    made = triton_kernel()
    assert fences(PAGE, "python no-run") == [made.source]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRET], env=environment, cwd=PAGE.parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
