"""Packed caches: kernels that attend over them against the reference operators in float64, on what the bytes stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcompile.codegen.triton import attention
from qcompile.ir import append_ops, ops
from qcompile.ir.lowered import item_operand
from qcompile.quant.scheme import DTYPE_NAMES
from qcompile.quant.vector_format import vector_format
from tests.codegen.triton import cache_specs as specs
from tests.codegen.triton.interpreted.harness import assert_close, guarded, result, run_kernel

TOLERANCES = {"bf16": 1.5 * 2**-8, "fp16": 1.5 * 2**-11}
"""Of the largest magnitude: half a unit in the last place of the result, and half as much for a weight times a scale, rounded to as many
bits: a query that sees one token averages nothing."""
RAGGED = torch.tensor([[140], [3], [-1]])
CHUNK = torch.stack((torch.arange(10, 34), torch.cat((torch.full((9,), -1), torch.arange(15)))))


@pytest.fixture
def few_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four shares of the length where a GPU gets 32: a step each, and a program that has nothing to do."""
    monkeypatch.setattr(attention, "decode_splits", lambda *_: 4)


def tables_of(form: str, key_heads: int, size: int) -> list[Tensor]:
    """The tables of a form: where channels are sorted, an order for each head."""
    orders = torch.stack([torch.randperm(size) for _ in range(key_heads)]).to(torch.uint8)
    return [guarded(orders)] if vector_format(form).tables else []


def as_operands(tables: tuple[list[Tensor], ...]) -> dict[str, Tensor]:
    """Tables by the names that kernels have for them."""
    return {item_operand(name, 0): part[0] for name, part in zip(("k_tables", "v_tables"), tables, strict=True) if part}


def packed(values: Tensor, form: str, table: Tensor, positions: Tensor, tables: list[Tensor]) -> Tensor:
    """Pages uint8 [P, L, R, W] of values [P, L, R, D], every number of which was never written is 255, a scale of which is no number."""
    pages = torch.full((*values.shape[:3], vector_format(form).width(values.shape[3])), 255, dtype=torch.uint8)
    for row, last in enumerate(positions.amax(1).tolist()):
        for token in range(last + 1):
            page, place = table[row, token // values.shape[2]], token % values.shape[2]
            pages[page, :, place : place + 1] = vector_format(form).encode(values[page, :, place : place + 1], tables)
    return guarded(pages)


def run_attend(
    bucket: str,
    positions: Tensor,
    size: int = 64,
    k_form: str = specs.KV4,
    v_form: str = "",
    *,
    heads: tuple[int, int] = (3, 1),
    page_tokens: int = 128,
    dtype: str = "bf16",
    spread: float = 1.0,
    largest: float = torch.inf,
    window: int = 0,
    softcap: float = 0.0,
    sinks: bool = False,
    arch: str = "sm90",
) -> None:
    """Attend from a view of a fused matrix over shuffled pages; compare with the numbers that the bytes stand for."""
    torch.manual_seed(0)
    kind, v_form = DTYPE_NAMES[dtype], v_form or k_form
    batch, sequence = positions.shape
    pages = -(-(int(positions.max()) + 1) // page_tokens)
    table = guarded(torch.randperm(batch * pages).view(batch, pages).to(torch.int32) + 1)
    # Channels differ in size and keys and values have a mean: no code, scale or least value is like its neighbour.
    shape = (batch * pages + 1, heads[1], page_tokens, size)
    k, v = (((torch.randn(shape) * torch.linspace(0.5, 1.5, size) + 0.7) * spread).clamp(-largest, largest) for _ in range(2))
    tables = tables_of(k_form, heads[1], size), tables_of(v_form, heads[1], size)
    keys, values = packed(k, k_form, table, positions, tables[0]), packed(v, v_form, table, positions, tables[1])
    query = guarded(torch.randn(batch, sequence, heads[0] + 2, size).to(kind))[:, :, 1 : heads[0] + 1].transpose(1, 2)
    out = result((batch, sequence, heads[0], size), kind).transpose(1, 2)
    operands = {"q": query, "keys": keys, "values": values, "page_table": table, "positions": guarded(positions), "out": out}
    operands |= as_operands(tables)
    extra = guarded(torch.randn(heads[0])) if sinks else None
    if extra is not None:
        operands["sinks"] = extra
    spec = specs.attend_packed(*heads, size, bucket, k_form, v_form, dtype, window=window, softcap=softcap, sinks="fp32" if sinks else None)
    sizes = {"batch": batch, "sequence": sequence, "rows": batch * sequence, "pages": pages, "page_tokens": page_tokens}
    run_kernel(spec, operands, sizes, arch)
    parts = ((keys, k_form, tables[0]), (values, v_form, tables[1]))
    wide = [torch.nan_to_num(vector_format(form).decode(part, size, torch.float64, tables)) for part, form, tables in parts]
    expected = ops.cache_attend(
        query.double(), *wide, table, positions, size**-0.5, window, softcap, None if extra is None else extra.double()
    )
    assert_close(out, expected, tolerance=TOLERANCES[dtype])
    assert not bool(out.transpose(1, 2)[positions < 0].any()), "a padding query gives 0"


SERVED = [specs.KV8, specs.KVFP8, specs.KV4, specs.SORTED]
FORMS = [*SERVED, "int4 g32 sym", "int8 g16 asym", "int2 g32 asym", "fp8", specs.BLOCK, "bfp8 g8 sorted", "bfp2 g4", "bfp4 g2", "bfp4"]


@pytest.mark.usefixtures("few_shares")
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str) -> None:
    run_attend("m1", RAGGED, 64, form)


@pytest.mark.usefixtures("few_shares")
@pytest.mark.parametrize("form", SERVED)
@pytest.mark.parametrize(("bucket", "dtype"), [("m1", "fp16"), ("m64", "bf16")])
def test_served_forms(bucket: str, dtype: str, form: str) -> None:
    run_attend(bucket, RAGGED if bucket == "m1" else CHUNK, 64, form, dtype=dtype)


@pytest.mark.usefixtures("few_shares")
@pytest.mark.parametrize(
    ("size", "form"),
    [*((size, specs.KV4) for size in (32, 80, 96, 128)), *((size, form) for size in (80, 128) for form in (specs.KV8, specs.SORTED))],
)
def test_decode_over_head_sizes(size: int, form: str) -> None:
    run_attend("m1", RAGGED, size, form)


@pytest.mark.usefixtures("few_shares")
@pytest.mark.parametrize(("size", "form"), [(33, "int8 sym"), (34, "int4 asym"), (33, "int4 sym"), (36, "int2 g12 asym"), (33, "bfp4")])
def test_scales_at_odd_addresses_and_bytes_that_are_not_full(size: int, form: str) -> None:
    run_attend("m1", RAGGED, size, form)


# Steps of 64 or 128 tokens: pages of 128 hold whole ones, 141 is one page of a sequence, and a step of the others has tokens of several.
OPTIONS = [
    {"window": 20},
    {"softcap": 5.0, "page_tokens": 16},
    {"sinks": True, "page_tokens": 141},
    {"page_tokens": 71, "window": 100},
    {"page_tokens": 7, "window": 1, "sinks": True},
    {"v_form": specs.KV8},
    {"k_form": specs.SORTED, "heads": (9, 3), "window": 20},
    {"heads": (9, 3)},
]


@pytest.mark.usefixtures("few_shares")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bucket", ["m1", "m64"])
def test_options(bucket: str, options: dict[str, object]) -> None:
    run_attend(bucket, RAGGED if bucket == "m1" else CHUNK, **options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("few_shares")
@pytest.mark.parametrize("spread", [3e-3, 300.0])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_small_and_large_values(dtype: str, spread: float) -> None:
    """Scales down to float16's least: weights times scales keep their digits. Queries that meet large keys would see one of them only."""
    run_attend("m1", RAGGED, 64, specs.KV8, dtype=dtype, spread=spread, softcap=2.0)


def test_wide_heads_where_a_program_has_fewer_lines() -> None:
    run_attend("m64", CHUNK, 256, specs.KV4, specs.SORTED, arch="sm80")


def test_a_float16_ends_before_what_a_block_may_hold() -> None:
    """The lowest code times the greatest power is -2^16, which float16 has not; it stands for a number that float16 has."""
    run_attend("m1", RAGGED, 64, specs.BLOCK, dtype="fp16", spread=1e5, largest=65504.0, softcap=2.0)


def test_every_share_of_a_long_context() -> None:
    run_attend("m1", torch.tensor([[2300]]), 32, "int4 asym", page_tokens=384)


MAGNITUDES = (1e-6, 1e-3, 1.0, 300.0)


def run_append(
    size: int, k_form: str, v_form: str = "", *, dtype: str = "bf16", rotated: int = 0, magnitudes: tuple[float, ...] = MAGNITUDES
) -> tuple[list[Tensor], list[Tensor]]:
    """Append a ragged batch through a view of a fused matrix; the pages, and what the reference makes of them."""
    torch.manual_seed(0)
    kind, v_form, key_heads, page_tokens = DTYPE_NAMES[dtype], v_form or k_form, 3, 5
    positions = torch.tensor([[-1, -1, 0, 1], [9, 10, 11, -1], [15, 2, 3, 4]])  # 15 lies beyond the table
    table = guarded(torch.randperm(9).view(3, 3).to(torch.int32) + 1)
    fill = 0 if rotated else 255
    widths = [vector_format(form).width(size) for form in (k_form, v_form)]
    pages = [guarded(torch.full((10, key_heads, page_tokens, width), fill, dtype=torch.uint8)) for width in widths]
    fused = torch.randn(3, 4, 2 * key_heads, size) * torch.tensor(magnitudes).view(1, 4, 1, 1)
    fused[1, 1] = 0
    fused = guarded(fused.to(kind))
    k, v = fused[:, :, :key_heads].transpose(1, 2), fused[:, :, key_heads:].transpose(1, 2)
    tables = tables_of(k_form, key_heads, size), tables_of(v_form, key_heads, size)
    stored = positions.where(positions < 15, -1)
    expected = append_ops.append_packed(*pages, k, v, table, stored, k_form, v_form, None, rotated, *tables)
    operands = {"keys": pages[0], "values": pages[1], "k": k, "v": v, "page_table": table, "positions": guarded(positions)}
    operands |= as_operands(tables)
    sizes = {"batch": 3, "sequence": 4, "pages": 3, "page_tokens": page_tokens}
    run_kernel(specs.append_packed(key_heads, size, k_form, v_form, dtype, rotated=rotated), operands, sizes)
    return pages, list(expected)


APPENDED = [
    *((64, form) for form in FORMS),
    *((size, form) for size in (32, 80, 96, 128) for form in (specs.KV4, specs.KV8)),
    (96, "int4 g32 asym"), (96, "fp8 g32 sym"), (33, "int8 sym"), (34, "int4 asym"), (33, "int4 sym"), (33, "int2 asym"),
    (80, specs.SORTED), (96, "bfp8"), (33, "bfp4"),
]  # fmt: skip


@pytest.mark.parametrize(("size", "form"), APPENDED)
def test_append_packs_the_bytes_of_the_reference(size: int, form: str) -> None:
    for got, want in zip(*run_append(size, form, dtype="fp16" if size == 80 else "bf16"), strict=True):
        assert torch.equal(got, want)


def test_append_finds_the_power_of_every_float() -> None:
    """From numbers below the least normal one, where a power stays what it is, to the largest."""
    got, want = run_append(64, specs.SORTED, "bfp2 g4", magnitudes=(1e-39, 1e-37, 1e30, 5e37))
    assert all(map(torch.equal, got, want))
    assert int(want[0][..., 32:][want[0][..., 32:] != 255].min()) == 1, "the least power"


@pytest.mark.parametrize(("size", "rotated"), [(64, 64), (128, 32), (96, 32)])
@pytest.mark.parametrize(("k_form", "v_form", "levels"), [(specs.KV4, specs.KV8, 15), ("int8 g32 sym", "fp8", 127)])
def test_append_rotates_keys_first(size: int, rotated: int, k_form: str, v_form: str, levels: int) -> None:
    """Sums in another order round to the next number of 16 bits now and then, and that to the next code: values are the reference's."""
    (keys, values), (k_expected, v_expected) = run_append(size, k_form, v_form, rotated=rotated)
    assert torch.equal(values, v_expected)
    got, want = (vector_format(k_form).decode(part, size) for part in (keys, k_expected))
    largest = want.abs().amax(-1, keepdim=True)
    assert bool(((got - want).abs() <= largest * (2 / levels + 2**-7)).all())
    assert float((got != want).float().mean()) < 0.02
    assert float(largest.max()) > 100
