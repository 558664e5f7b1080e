"""What a cache that keeps some tokens as they came writes: bit for bit what the reference operators write."""

from __future__ import annotations

import pytest
import torch

from qcompile.quant.retention import Retention
from tests.codegen.triton.interpreted.settled_layer import Layer, chunk_positions
from tests.codegen.triton.settled_specs import SINKS

KIVI = Retention(4, 8, 16)
"""The shape of `kv4-kivi`, smaller."""
PER_TOKEN = [
    ("int2 g32 asym", Retention(0, 0, 16)), ("int4 g16 sym", Retention(4, 8, 1)), ("int8 g64 asym", Retention(1, 0, 4)),
    ("fp8 g32", Retention(2, 3, 1)),
]  # fmt: skip


@pytest.mark.parametrize("keys", ["int2 t16 asym", "int4 t16 sym", "int8 t8 asym"])
def test_a_prompt_in_chunks_and_tokens_one_by_one(keys: str) -> None:
    torch.manual_seed(0)
    layer = Layer(KIVI, (keys, "int4 g8 asym"), heads=2, size=16, batch=3, page_tokens=32, pages=3, kernels=True)
    for counts in ((40, 5, 0), (30, 0, 1), (1, 1, 70)):
        layer.step(chunk_positions(layer.lengths, counts))
    assert layer.lengths == [71, 6, 71]
    assert bool((layer.stored[0] != 255).any())


@pytest.mark.parametrize(("values", "policy"), PER_TOKEN)
def test_formats_per_token(values: str, policy: Retention) -> None:
    torch.manual_seed(0)
    layer = Layer(policy, ("int8 g64 sym", values), heads=1, size=64, batch=2, page_tokens=7, pages=10, rows_dtype="fp16", kernels=True)
    for counts in ((37, 3), (1, 14), (2, 1)):
        layer.step(chunk_positions(layer.lengths, counts))


WAITING = Retention(2, 3, 4)
"""Groups that settle at once."""
BLOCKS = [
    ("bfp4 g16 sorted", 64, SINKS), ("bfp4 g16 sorted", 64, WAITING), ("bfp4 g16", 64, SINKS), ("bfp8 g8 sorted", 80, WAITING),
    ("bfp2 g4", 16, WAITING), ("bfp4", 80, SINKS), ("bfp4 sorted", 33, WAITING), ("bfp4 g64 sorted", 256, WAITING),
]  # fmt: skip


@pytest.mark.parametrize(("form", "size", "policy"), BLOCKS)
def test_blocks(form: str, size: int, policy: Retention) -> None:
    """The channels of each head in an order of their own, and keys in another than values."""
    torch.manual_seed(0)
    layer = Layer(policy, (form, form), heads=2, size=size, batch=2, page_tokens=7, pages=10, rows_dtype="fp16", kernels=True)
    for counts in ((37, 3), (1, 14), (2, 1)):
        layer.step(chunk_positions(layer.lengths, counts))


@pytest.mark.parametrize(("spread", "centre"), [(0.0, 1.0), (1e-39, 0.0), (1e37, 0.0)])
def test_powers_of_every_float(spread: float, centre: float) -> None:
    """Tokens that are all alike, numbers below the least normal one, where a power stays what it is, and the largest."""
    torch.manual_seed(0)
    layer = Layer(SINKS, ("bfp4 g16 sorted", "bfp2 g4"), heads=1, size=32, batch=1, page_tokens=32, pages=1, kernels=True)
    layer.step(chunk_positions([0], [20]), spread, centre)


@pytest.mark.parametrize("size", [8, 80, 128])
def test_head_sizes(size: int) -> None:
    torch.manual_seed(0)
    forms = ("int2 t16 asym", "int2 g16 asym")
    layer = Layer(KIVI, forms, heads=1, size=size, batch=1, page_tokens=16, pages=4, dtype="fp16", kernels=True)
    layer.step(chunk_positions([0], [33]))
    layer.step(chunk_positions([33], [12]))


def test_one_wide_vector_a_token() -> None:
    """What keys and values are made from, in `kv4-xquant`."""
    torch.manual_seed(0)
    forms = ("int4 g64 asym", "int4 t4 asym")
    layer = Layer(Retention(4, 0, 4), forms, heads=1, size=576, batch=2, page_tokens=16, pages=3, kernels=True)
    for counts in ((20, 3), (1, 1)):
        layer.step(chunk_positions(layer.lengths, counts))


def test_padding_may_stand_anywhere() -> None:
    torch.manual_seed(0)
    layer = Layer(KIVI, ("int4 t16 asym", "int4 g32 asym"), heads=2, size=32, batch=2, page_tokens=48, pages=3, kernels=True)
    for counts in ((60, 33), (50, 70)):
        layer.step(chunk_positions(layer.lengths, counts, 100, scattered=True))


def test_numbers_that_are_all_equal_and_groups_of_long_tails() -> None:
    torch.manual_seed(0)
    layer = Layer(KIVI, ("int4 t16 asym", "int2 g32 asym"), heads=1, size=32, batch=1, page_tokens=32, pages=2, kernels=True)
    layer.step(chunk_positions([0], [30]), spread=0.0)  # a scale of its own for every channel, none larger than the least
    layer.step(chunk_positions([30], [30]), spread=300.0)
