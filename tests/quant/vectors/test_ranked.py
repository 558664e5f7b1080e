"""Two forms in one cache format: bytes, order, refusals."""

from __future__ import annotations

import pytest
import torch

from qcompile.errors import FormatError
from qcompile.quant.cache_format import CACHES
from qcompile.quant.vector_format import vector_format

TEXT = "int4 g64 asym over int2 g64 asym top 8 of 32"


def test_each_vector_is_stored_in_the_form_it_is_marked_for() -> None:
    form, generator = vector_format(TEXT), torch.Generator().manual_seed(0)
    x = torch.randn(3, 64, 64, generator=generator)
    marks = torch.zeros(3, 64, dtype=torch.bool)
    for head in range(3):
        for group in (0, 32):
            marks[head, group + torch.randperm(32, generator=generator)[:8]] = True
    packed = form.encode(x, (marks,))
    assert packed.shape == (3, 64, form.width(64))
    found = form.decode(packed, 64, torch.float32, (marks,))
    for text, mine in (("int4 g64 asym", marks), ("int2 g64 asym", ~marks)):
        own = vector_format(text)
        assert torch.equal(found[mine], own.decode(own.encode(x[mine]), 64))


def test_bytes_are_the_share_of_both_forms() -> None:
    assert vector_format(TEXT).width(64) == (8 * 36 + 24 * 20) // 32
    assert CACHES["kv4-zip"].keys is not None
    assert CACHES["kv4-zip"].keys.width(128) == (72 + 56) // 2
    assert str(vector_format(TEXT)) == TEXT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int4 t32 over int2 top 1 of 2", "expected two forms per token without tables"),
        ("int8 static over int2 top 1 of 2", "expected two forms per token without tables"),
        ("int4 over int2 top 4 of 4", "expected fewer fine tokens than 4; with all of them fine, choose int4 asym"),
        ("int4 over int9 top 1 of 4", "'int9': expected int2 to int8"),
    ],
)
def test_forms_that_make_no_pair_are_refused(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        vector_format(text)


def test_bytes_that_do_not_divide_evenly_are_rounded_up() -> None:
    form, marks = vector_format("int4 over int2 top 1 of 4"), torch.tensor([[False, False, True, False]])
    assert form.width(10) == -(-((5 + 4) + 3 * (3 + 4)) // 4)
    x = torch.randn(1, 4, 10, generator=torch.Generator().manual_seed(0))
    found = form.decode(form.encode(x, (marks,)), 10, torch.float32, (marks,))
    for text, mine in (("int4", marks), ("int2", ~marks)):
        assert torch.equal(found[mine], vector_format(text).decode(vector_format(text).encode(x[mine]), 10))


def test_marks_are_needed() -> None:
    with pytest.raises(FormatError, match="expected the marks of fine tokens, got 0 tables; attend_ranked alone"):
        vector_format(TEXT).encode(torch.zeros(1, 32, 64))


@pytest.mark.parametrize("options", [{"cache_window": 0}, {"cache_keys": "int4 g64"}, {"cache_values": TEXT.replace("8 of 32", "8 of 16")}])
def test_a_cache_ranks_keys_and_values_alike_and_by_attention(options: dict[str, str | int]) -> None:
    with pytest.raises(FormatError, match=r"cache kv4-zip: expected keys and values that are both ranked among as many tokens.*kv4-zip"):
        CACHES["kv4-zip"].with_options(options)


@pytest.mark.parametrize("options", [{"cache_keys": TEXT, "cache_values": TEXT, "cache_window": 3}, {"cache_values": "int8 static"}])
def test_a_cache_of_sources_has_no_tables_and_ranks_nothing(options: dict[str, str | int]) -> None:
    with pytest.raises(
        FormatError, match=r"cache kv4-xquant: expected forms without tables, and none that are ranked, .*; choose int4 g64"
    ):
        CACHES["kv4-xquant"].with_options(options)
