"""What is emitted, built under AddressSanitizer and UndefinedBehaviorSanitizer: faults are found, and the grid has none.

Here a part of the grid runs, on the best instruction set; `make sanitize` runs all of it.
"""

from __future__ import annotations

import os
import re
import tempfile
from functools import cache

import pytest
import torch

from qcompile.codegen.cpp.build import build_libraries
from qcompile.codegen.cpp.contract import kernel
from qcompile.codegen.cpp.entry import kernels_source
from qcompile.codegen.cpp.source import Lines
from qcompile.runtime.native.library import Library
from tests.codegen.cpp import sanitized
from tests.codegen.cpp.harness import RUNNABLE, Kernels
from tests.codegen.triton.specs import spec

inside = pytest.mark.skipif(not sanitized.ACTIVE, reason="needs the sanitizers in its process: test_a_part_of_the_grid starts one")
outside = pytest.mark.skipif(sanitized.ACTIVE, reason="this is the process that it starts")
GUARD, POISON = "SEGV on unknown address", "use-after-poison"
READ = "out.at<float>()[0] = x.at<float>()[{}];"
MASKED = "out.at<float>()[0] = _mm512_reduce_add_ps(_mm512_maskz_loadu_ps({}, x.at<float>() + {}));"
FAULTS: dict[str, tuple[Lines, str]] = {
    "nothing": ([READ.format(18)], ""),
    "a read behind a row": ([READ.format(19)], POISON),
    "a read before a row": ([READ.format(-1)], GUARD),
    "a write behind a row": (["out.at<float>()[19] = 1.0f;"], POISON),
    "a write before a row": (["out.at<float>()[-1] = 1.0f;"], GUARD),
    "a vector that is too long": (["store(out.at<float>(), load(x.at<float>() + 19 - LANES + 1));"], "unknown-crash"),
    "a count that is too great": (["store(out.at<float>() + 16, load(x.at<float>() + 16, 3), 4);"], POISON),
    "scratch that is too small": (["float scratch[4] = {};", "out.at<float>()[0] = scratch[x.size[0]];"], "index 19 out of bounds"),
    "a sum that overflows": (["*out.at<float>() = 0x7fffffff + int32_t(x.size[0]);"], "signed integer overflow"),
    "a shift that is too far": (["out.at<float>()[0] = 1 << (x.size[0] + 13);"], "shift exponent 32 is too large"),
    "an address that is not aligned": (["*out.at<float>() = *reinterpret_cast<float*>(x.at<char>() + 2);"], "misaligned address"),
}  # fmt: skip
"""What a kernel over rows of 19 numbers does -> its lines, and the report of it."""
if "avx512" in RUNNABLE:
    # Instructions that no compiler watches: the guard does.
    FAULTS["a masked vector within a row"] = [MASKED.format("0x7", 16)], ""
    FAULTS["a masked vector behind a row"] = [MASKED.format("0xf", 16)], GUARD


@cache
def _kernels() -> Kernels:
    made = {}
    for number, (lines, _) in enumerate(FAULTS.values()):
        wanted = spec("fault", sizes={"K": 19, "F": number}, formats={"x": "fp32", "out": "fp32"})
        made[wanted] = kernel(wanted, ["x", "out"], lines)
    ((name, code),) = build_libraries(kernels_source(made.values(), "Faults."), RUNNABLE[:1]).items()
    return Kernels(Library(name, code), made)


@inside
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_reported(name: str) -> None:
    kernels = _kernels()
    wanted = list(kernels.kernels)[list(FAULTS).index(name)]
    with tempfile.TemporaryFile() as errors:
        child = os.fork()
        if not child:
            os.dup2(errors.fileno(), 2)
            kernels(wanted, {"x": torch.zeros(19), "out": torch.zeros(19)})
            os._exit(0)
        _, status = os.waitpid(child, 0)
        errors.seek(0)
        report = errors.read().decode(errors="replace")
    expected = FAULTS[name][1]
    assert (status != 0) == bool(expected), report
    assert expected in report
    assert not expected or "native.cpp" in report, "the report names no line"


@outside
@pytest.mark.skipif(not sanitized.runtimes(), reason="no g++ with libasan and libubsan")
def test_a_part_of_the_grid() -> None:
    done = sanitized.sanitized([*sanitized.GRID, "-k", f"{RUNNABLE[0]} or fault"], part=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"(\d+) kernels .* in (\d+) cases", done.stdout)
    assert found is not None, done.stdout
    assert int(found[1]) >= 30, done.stdout
    assert int(found[2]) >= 40, done.stdout
