"""What every further form owes: its text, its bytes, and the same bytes for a vector whatever stands beside it."""

from __future__ import annotations

import pytest
import torch

from qcompile.errors import FormatError
from qcompile.quant.vector_format import vector_format
from qcompile.quant.vectors import FAMILIES
from tests.quant.vectors.samples import as_rows, cached, tables_of

RANKED = "int4 g64 asym over int2 g64 asym top 16 of 32"
"""Takes marks in place of tables: `tests/quant/vectors/test_ranked.py`."""
FORMS = [
    *sorted(FAMILIES.keys() - {RANKED}),
    "int4 static", "bfp4", "bfp3 g8", "bfp8 g16 sorted", "pca5 int3 asym", "pca1/2 int4 t8 asym", "pca1 fp8 sym",
    "gear8 int2 asym", "gear16 r1 int3 g8 sym", "gear32 s2 int4 t8 asym", "qjl20", "nuq2 token", "nuq4 token s2", "nuq3 static", "klt3.5",
]  # fmt: skip


@pytest.mark.parametrize("text", FORMS)
def test_text_round_trips(text: str) -> None:
    assert str(vector_format(text)) == text


@pytest.mark.parametrize("size", [8, 20, 32])
@pytest.mark.parametrize("text", FORMS)
def test_bytes_are_those_of_the_formula_and_do_not_depend_on_company(text: str, size: int) -> None:
    form = vector_format(text)
    x = cached(3 * form.tokens if form.tokens > 1 else 40, 2, size)
    tables = tables_of(form, x)
    rows = torch.cat((as_rows(x), as_rows(x.flip(0) + 0.5)))
    packed = form.encode(rows, tables)
    assert packed.shape == (*rows.shape[:-1], form.width(size))
    assert packed.dtype == torch.uint8
    unpacked = form.decode(packed, size, tables=tables)
    assert unpacked.shape == rows.shape
    step = form.tokens if form.tokens > 1 else 3
    parts = [form.encode(rows[1:, :, start : start + step], tables) for start in range(0, rows.shape[2], step)]
    assert torch.equal(torch.cat(parts, dim=2), packed[1:])
    assert torch.equal(form.encode(rows.transpose(1, 2).contiguous().transpose(1, 2), tables), packed)
    assert torch.equal(form.encode(rows[0], tables), packed[0])
    read = [form.decode(packed[1, :, start : start + step], size, tables=tables) for start in range(0, rows.shape[2], step)]
    assert torch.equal(torch.cat(read, dim=1), unpacked[1])
    assert form.decode(packed, size, torch.float16, tables).dtype == torch.float16


@pytest.mark.parametrize("text", FORMS)
def test_vectors_of_zeros_come_back(text: str) -> None:
    form = vector_format(text)
    x = torch.zeros(max(form.tokens, 4), 2, 32)
    tables = tables_of(form, x)
    assert form.decode(form.encode(as_rows(x), tables), 32, tables=tables).abs().max() < 1e-3


@pytest.mark.parametrize("text", FORMS)
def test_tables_have_a_name_each_and_lead_with_heads(text: str) -> None:
    form = vector_format(text)
    tables = tables_of(form, cached(64, 3))
    assert len(tables) == len(form.tables)
    assert all(table.shape[0] in (1, 3) and table.dtype in (torch.float16, torch.uint8, torch.int8) for table in tables)


@pytest.mark.parametrize(
    ("text", "size", "message"),
    [
        ("bfp4 g16 sorted", 320, r"bfp4 g16 sorted: expected a head size of at most 256.*got 320; choose"),
        ("nuq3 token s1", 320, r"nuq3 token s1: expected a head size of at most 256.*got 320; choose"),
        ("nuq3 static s9", 8, r"nuq3 static s9: expected fewer outliers than the head size 8, got s9; choose fewer"),
        ("gear32 r2 s8 int4 t32", 8, r"expected fewer outliers than the head size 8, got s8"),
        ("gear32 r9 int4 t32", 8, r"expected a rank of at most the tokens and the head size, got 9 of 32 x 8; choose a smaller one"),
        ("pca48 int4 g48 sym", 32, r"expected a rank of at most the head size, got 48 of 32; .* such as 'pca3/4 int4 g48 sym'"),
    ],
)
def test_sizes_that_cannot_be_stored_are_refused(text: str, size: int, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        vector_format(text).width(size)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bfp9 g16", "expected int2 to int8 or fp8.* or .*bfp4 g16 sorted"),
        ("nuq3 channel", "expected int2 to int8 or fp8.* or .*nuq3 static s1"),
        ("pca48", "expected int2 to int8 or fp8.* or .*pca3/4 int4 g16 sym"),
        ("pca48 qjl256", "'qjl256': expected int2 to int8 or fp8"),
        ("pca3/2 int4", "expected a rank, or a share of the head size below 1, got 3/2"),
        ("gear48 r2 int4 t32 asym", "expected a multiple of the 32 tokens of int4 t32 asym, got gear48"),
    ],
)
def test_other_text_says_what_is_expected(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        vector_format(text)
