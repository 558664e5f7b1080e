"""Attention over what has settled and what is kept as it came, against the definition in float64, over pages that kernels have written."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from qcompile.ir.lowered import KernelSpec
from qcompile.quant.retention import Retention
from tests.codegen.triton.cache_specs import BLOCK, SORTED
from tests.codegen.triton.interpreted.harness import guarded, result, run_kernel
from tests.codegen.triton.interpreted.settled_layer import Layer, chunk_positions
from tests.codegen.triton.settled_specs import SINKS

KIVI = Retention(4, 8, 16)
"""The shape of `kv4-kivi`, smaller."""


FORMS = [
    ("int4 t16 asym", "int4 g32 asym"), ("int2 t16 asym", "int2 g16 asym"), ("int8 t16 sym", "int8 g32 sym"),
    ("int4 g16 asym", "int4 t16 sym"), ("fp8 t16", "int2 t4 asym"),
]  # fmt: skip


@pytest.mark.parametrize("forms", FORMS)
def test_formats_of_keys_and_values(forms: tuple[str, str]) -> None:
    torch.manual_seed(0)
    layer = Layer(KIVI, forms, heads=1, size=32, batch=2, page_tokens=32, pages=3, dtype="fp16")
    layer.attend_in_chunks(2, ((70, 0), (12, 3), (1, 1)))


BLOCKS = [
    (SORTED, SORTED), (BLOCK, BLOCK), ("bfp8 g8 sorted", "bfp2 g4"), ("bfp4", SORTED), (SORTED, "int4 g32 asym"), ("int4 g16 asym", SORTED),
    (BLOCK, "fp8 g32"),
]  # fmt: skip


@pytest.mark.parametrize("forms", BLOCKS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_blocks(forms: tuple[str, str], dtype: str) -> None:
    torch.manual_seed(0)
    layer = Layer(SINKS, forms, heads=2, size=64, batch=2, page_tokens=64, pages=2, dtype=dtype, rows_dtype="fp16")
    layer.attend_in_chunks(2, ((70, 2), (1, 1)))


@pytest.mark.parametrize("size", [8, 33, 80, 128])
def test_head_sizes_of_blocks(size: int) -> None:
    torch.manual_seed(0)
    layer = Layer(Retention(2, 7, 1), ("bfp4 sorted", "bfp4"), heads=2, size=size, batch=1, page_tokens=48, pages=3)
    layer.attend_in_chunks(4, ((50,), (1,)))


@pytest.mark.parametrize("options", [{"window": 20}, {"softcap": 5.0, "sinks": True}, {"window": 1}])
def test_options_of_blocks(options: dict[str, float]) -> None:
    torch.manual_seed(0)
    layer = Layer(Retention(4, 5, 1), (SORTED, SORTED), heads=1, size=32, batch=2, page_tokens=24, pages=6)
    layer.attend_in_chunks(3, ((80, 9), (1, 1)), **options)


@pytest.mark.parametrize("forms", [("int4 t16 asym", SORTED), (SORTED, "int2 t16 asym")])
def test_blocks_beside_tokens_that_are_packed_together(forms: tuple[str, str]) -> None:
    torch.manual_seed(0)
    layer = Layer(KIVI, forms, heads=1, size=32, batch=2, page_tokens=32, pages=3)
    layer.attend_in_chunks(3, ((70, 9), (12, 3), (1, 1)))


def test_more_blocks_than_one_step_of_every_share_and_padding_anywhere() -> None:
    torch.manual_seed(0)
    layer = Layer(SINKS, (SORTED, BLOCK), heads=1, size=32, batch=2, page_tokens=256, pages=20)
    layer.step(chunk_positions([0, 0], [4500, 2]))
    layer.attend_in_chunks(1, ((1, 1),))
    layer.attend(1, chunk_positions(layer.lengths, (30, 70), 90, scattered=True), "m64")


@pytest.mark.parametrize("options", [{"window": 20}, {"softcap": 5.0, "sinks": True}, {"window": 1}])
def test_options(options: dict[str, float]) -> None:
    torch.manual_seed(0)
    layer = Layer(KIVI, FORMS[0], heads=1, size=32, batch=2, page_tokens=16, pages=6)
    layer.attend_in_chunks(3, ((80, 9), (1, 1)), **options)


@pytest.mark.parametrize(
    ("policy", "page_tokens"), [(Retention(0, 0, 32), 64), (Retention(4, 0, 1), 64), (Retention(4, 9, 1), 24), (Retention(40, 1, 64), 64)]
)
def test_policies_and_pages(policy: Retention, page_tokens: int) -> None:
    torch.manual_seed(0)
    forms = ("int4 t32 asym" if policy.group > 1 else "int4 asym", "int4 g32 asym")
    layer = Layer(policy, forms, heads=1, size=32, batch=2, page_tokens=page_tokens, pages=128 // page_tokens, rows_dtype="fp16")
    layer.attend_in_chunks(3, ((60, 0), (50, 7), (1, 1)))


@pytest.mark.parametrize("size", [8, 80, 128])
def test_head_sizes(size: int) -> None:
    torch.manual_seed(0)
    layer = Layer(KIVI, ("int2 t16 asym", "int4 g16 asym"), heads=2, size=size, batch=1, page_tokens=48, pages=2)
    layer.attend_in_chunks(4, ((50,), (1,)))


def test_groups_longer_than_a_step_and_more_settled_than_one_step_of_every_share() -> None:
    torch.manual_seed(0)
    layer = Layer(Retention(1, 0, 128), ("int4 t128 asym", "int8 t64 sym"), heads=1, size=32, batch=1, page_tokens=128, pages=20)
    layer.step(chunk_positions([0], [2500]))
    layer.attend_in_chunks(1, ((1,),))


def test_padding_may_stand_anywhere() -> None:
    torch.manual_seed(0)
    layer = Layer(KIVI, FORMS[0], heads=1, size=32, batch=2, page_tokens=48, pages=4)
    for counts in ((60, 33), (50, 40)):
        layer.attend(3, chunk_positions(layer.lengths, counts, 90, scattered=True), "m64")


@pytest.mark.parametrize("form", [SORTED, "int4 g16 asym"])
def test_prefill_leaves_out_new_tokens_that_all_queries_of_a_program_see_packed(form: str) -> None:
    """What the first 64 queries may see as it came, no later one does; a number that is none spoils what reads it, whatever its weight."""
    torch.manual_seed(0)

    def run(spec: KernelSpec, operands: dict[str, Tensor], sizes: Mapping[str, int]) -> None:
        spoiled = operands["exact_values"].clone()
        spoiled[:, :, 64 if form == "int4 g16 asym" else 32 : 68] = torch.nan
        beside = {**operands, "exact_values": guarded(spoiled), "out": result((1, 200, 1, 32), torch.bfloat16).transpose(1, 2)}
        run_kernel(spec, beside, sizes)
        run_kernel(spec, operands, sizes)
        assert bool(beside["out"][:, :, :64].isnan().any())
        assert torch.equal(beside["out"][:, :, 128:], operands["out"][:, :, 128:])

    layer = Layer(SINKS, (form, form), heads=1, size=32, batch=1, page_tokens=256, pages=1, run=run)
    layer.attend(1, chunk_positions([0], [200]), "m64")
