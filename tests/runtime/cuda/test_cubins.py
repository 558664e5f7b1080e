"""The packing against what real cubins say of themselves: offsets and sizes of parameters, the hidden pointers, threads of a block."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcompile.ir.lowered import KernelSpec, Launch
from qcompile.runtime.cuda.launch import HIDDEN_POINTERS, WARP, parameter_offsets

pytest.importorskip("triton", reason="needs Triton's compiler to build cubins")

SPECS = (
    KernelSpec("rope", (("H", 4), ("R", 64)), (("cos", "bf16"), ("out", "bf16"), ("sin", "bf16"), ("x", "bf16"))),
    KernelSpec("linear", (("K", 256), ("N", 128)), (("out", "bf16"), ("weight", "bf16"), ("x", "bf16")), (), "m1"),
    KernelSpec(
        "cache_append_", (("D", 64), ("L", 2)),
        (("k", "bf16"), ("keys", "bf16"), ("page_table", "i32"), ("positions", "i64"), ("v", "bf16"), ("values", "bf16")),
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def built() -> tuple[list[Launch], dict[str, bytes]]:
    """The launches of a few kernels, and their cubins."""
    from qcompile.codegen.triton.backend import TritonBackend
    from qcompile.codegen.triton.build import build_kernels

    backend = TritonBackend("sm90")
    kernels, binaries = build_kernels([backend.emit(spec) for spec in SPECS], "sm90", workers=1)
    return [launch for kernel in kernels for launch in kernel.launches], binaries


def described(binary: bytes, folder: Path) -> str:
    """The cubin's attributes as cuobjdump prints them."""
    from qcompile.codegen.triton.gates import triton_folder

    path = folder / "kernel.cubin"
    path.write_bytes(binary)
    tool = next(triton_folder().rglob("cuobjdump"))
    return subprocess.run([str(tool), "-elf", str(path)], capture_output=True, text=True, check=True).stdout


def parameters_of(text: str) -> Iterator[tuple[int, int, int]]:
    """Ordinal, offset and size of each parameter."""
    for found in re.findall(r"Ordinal : (\S+)\s+Offset  : (\S+)\s+Size    : (\S+)", text):
        ordinal, offset, size = (int(number, 16) for number in found)
        yield ordinal, offset, size


def test_parameters_lie_where_the_binary_reads_them(built: tuple[list[Launch], dict[str, bytes]], tmp_path: Path) -> None:
    launches, binaries = built
    assert len(launches) >= len(SPECS)
    for launch in launches:
        found = sorted(parameters_of(described(binaries[launch.binary], tmp_path)))
        offsets, total = parameter_offsets(launch.parameters)
        widths = [8 if parameter.kind == "pointer" else 4 for parameter in launch.parameters]
        hidden = [total - 8 * left for left in range(HIDDEN_POINTERS, 0, -1)]
        assert found == list(enumerate_pairs([*offsets, *hidden], [*widths, *[8] * HIDDEN_POINTERS])), launch.function


def enumerate_pairs(offsets: list[int], widths: list[int]) -> Iterator[tuple[int, int, int]]:
    """Ordinal, offset, size."""
    for ordinal, (offset, width) in enumerate(zip(offsets, widths, strict=True)):
        yield ordinal, offset, width


def test_the_block_is_what_the_binary_requires(built: tuple[list[Launch], dict[str, bytes]], tmp_path: Path) -> None:
    launches, binaries = built
    for launch in launches:
        required = re.search(r"EIATTR_REQNTID.*?Value:\s*(\S+) (\S+) (\S+)", described(binaries[launch.binary], tmp_path), re.DOTALL)
        assert required is not None
        assert [int(number, 16) for number in required.groups()] == [WARP * launch.num_warps, 1, 1]
