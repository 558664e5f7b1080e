"""Layouts as an artifact's library makes them, against their definitions in torch, and what is done with the memory around them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qcompile.codegen.build_cache import kernel_cache
from qcompile.codegen.cpp.build import build_libraries
from qcompile.codegen.cpp.entry import kernels_source
from qcompile.ir.constants import Constant, tensor_constant
from qcompile.ir.layouts import WORDS, apply_layout, tiles
from qcompile.ir.tensor_file import write_constants
from qcompile.quant.packing import pack, unpack
from qcompile.runtime.huge_pages import ALIGNMENT
from qcompile.runtime.native.constants import packed_constants
from qcompile.runtime.native.library import Library
from qcompile.runtime.weights import ArtifactSource, WeightsFile, chunk_hashes
from tests.codegen.cpp.harness import RUNNABLE

SHAPES = [(1, 1), (5, 3), (16, 64), (33, 67), (48, 130)]


_TYPES = {"tiles-pairs": (torch.float16, torch.bfloat16)}


@cache
def library(instruction_set: str) -> Library:
    """One without kernels."""
    source = kernels_source([], "Layouts alone.")
    ((name, code),) = build_libraries(source, [instruction_set], kept_in=kernel_cache(), extra=("-O1",)).items()
    return Library(name, code)


def stored(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Any bits."""
    bits = torch.randint(0, 256, (rows, columns * dtype.itemsize), dtype=torch.uint8, generator=torch.Generator().manual_seed(rows))
    return bits.view(dtype)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("instruction_set", RUNNABLE)
def test_a_library_packs_as_the_definitions_say(instruction_set: str, threads: int) -> None:
    constants, wanted = dict[str, Constant](), []
    for layout, words in WORDS.items():
        for dtype in _TYPES.get(layout, (torch.uint8,) if words.size else (torch.uint8, torch.float16, torch.float32, torch.int64)):
            for rows, columns in SHAPES:
                name = f"{layout} {dtype} {rows} {columns}"
                constants[name] = tensor_constant(stored(rows, columns, dtype))
                wanted.append((name, layout))
    packed = packed_constants(library(instruction_set), constants, wanted, threads)
    for name, layout in wanted:
        made, expected = packed[name, layout], apply_layout(layout, constants[name].materialize())
        assert made.data_ptr() % ALIGNMENT == 0
        assert made.dtype == expected.dtype
        assert torch.equal(made.view(torch.uint8), expected.view(torch.uint8)), name


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_are_dealt_to_the_bytes_of_a_word(bits: int) -> None:
    per_word, rows, columns = 32 // bits, 18, 160
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    from_rows = pack(codes, bits)
    # Byte i of a word gets codes i, i + 4, i + 8 …: in its order they are the columns of one row, so packing that order says the same.
    dealt = codes.view(rows, -1, per_word // 4, 4).transpose(2, 3).reshape(rows, columns)
    expected = tiles(pack(dealt, bits).view(torch.int32))
    assert torch.equal(unpack(pack(dealt, bits), bits, columns), dealt)
    made = torch.zeros_like(expected)
    row = [from_rows.data_ptr(), made.data_ptr(), rows, from_rows.shape[1], 4, 0, bits]
    library(RUNNABLE[0]).pack(torch.tensor([row]), 1)
    assert torch.equal(made, expected)


def test_what_torch_makes_and_what_stays_as_it_is() -> None:
    zero, plain = stored(20, 6, torch.uint8), stored(4, 4, torch.float32)
    constants = {"zero": tensor_constant(zero), "plain": tensor_constant(plain)}
    packed = packed_constants(library(RUNNABLE[0]), constants, [("zero", "tiles-zero4"), ("plain", ""), ("zero", "tiles")], 1)
    assert torch.equal(packed["zero", "tiles-zero4"], apply_layout("tiles-zero4", zero))
    assert torch.equal(packed["zero", "tiles"], apply_layout("tiles", zero))
    assert packed["plain", ""].data_ptr() == plain.data_ptr()


def test_the_stored_form_of_what_is_packed_is_let_go(tmp_path: Path) -> None:
    weight = torch.randn(1024, 1024)
    write_constants(tmp_path / "weights.safetensors", {"weight": tensor_constant(weight)})
    file = WeightsFile(tmp_path / "weights.safetensors", chunk_hashes(tmp_path / "weights.safetensors"))
    constants = {"weight": Constant(ArtifactSource(file, "weight"))}
    packed = packed_constants(library(RUNNABLE[0]), constants, [("weight", "tiles")], 2)
    address = constants["weight"].materialize().data_ptr()
    # Of the mapping only what the header's page and the last page hold may still be there.
    assert _resident(address) < weight.nbytes // 8
    assert torch.equal(packed["weight", "tiles"], tiles(weight))
    assert torch.equal(constants["weight"].materialize(), weight)


def _resident(address: int) -> int:
    """Bytes in memory of the mapping that `address` lies in, as Linux tells."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(part, 16) for part in head.split("-"))
            inside = first <= address < last
        elif inside and head == "Rss:":
            return int(line.split()[1]) * 1024
    raise AssertionError("no such mapping")
