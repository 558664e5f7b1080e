"""Packed caches: kernels that attend over them against the reference operators in float64, on what the bytes stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcompile.codegen.triton import attention
from qcompile.ir import ops
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


def packed(values: Tensor, form: str, table: Tensor, positions: Tensor) -> Tensor:
    """Pages uint8 [P, L, R, W] of values [P, L, R, D], every number of which was never written is 255, a scale of which is no number."""
    pages = torch.full((*values.shape[:3], vector_format(form).width(values.shape[3])), 255, dtype=torch.uint8)
    for row, last in enumerate(positions.amax(1).tolist()):
        for token in range(last + 1):
            page, place = table[row, token // values.shape[2]], token % values.shape[2]
            pages[page, :, place] = vector_format(form).encode(values[page, :, place])
    return guarded(pages)


def run_attend(
    bucket: str,
    positions: Tensor,
    size: int = 64,
    k_form: str = specs.KV4,
    v_form: str = "",
    *,
    heads: tuple[int, int] = (3, 1),
    page_tokens: int = 16,
    dtype: str = "bf16",
    spread: float = 1.0,
    window: int = 0,
    softcap: float = 0.0,
    sinks: bool = False,
) -> None:
    """Attend from a view of a fused matrix over shuffled pages; compare with the numbers that the bytes stand for."""
    torch.manual_seed(0)
    kind, v_form = DTYPE_NAMES[dtype], v_form or k_form
    batch, sequence = positions.shape
    pages = -(-(int(positions.max()) + 1) // page_tokens)
    table = guarded(torch.randperm(batch * pages).view(batch, pages).to(torch.int32) + 1)
    # Channels differ in size and keys and values have a mean: no code, scale or least value is like its neighbour.
    shape = (batch * pages + 1, heads[1], page_tokens, size)
    k, v = ((torch.randn(shape) * torch.linspace(0.5, 1.5, size) + 0.7) * spread for _ in range(2))
    keys, values = packed(k, k_form, table, positions), packed(v, v_form, table, positions)
    query = guarded(torch.randn(batch, sequence, heads[0] + 2, size).to(kind))[:, :, 1 : heads[0] + 1].transpose(1, 2)
    out = result((batch, sequence, heads[0], size), kind).transpose(1, 2)
    operands = {"q": query, "keys": keys, "values": values, "page_table": table, "positions": guarded(positions), "out": out}
    extra = guarded(torch.randn(heads[0])) if sinks else None
    if extra is not None:
        operands["sinks"] = extra
    spec = specs.attend_packed(*heads, size, bucket, k_form, v_form, dtype, window=window, softcap=softcap, sinks="fp32" if sinks else None)
    sizes = {"batch": batch, "sequence": sequence, "rows": batch * sequence, "pages": pages, "page_tokens": page_tokens}
    run_kernel(spec, operands, sizes)
    parts = ((keys, k_form), (values, v_form))
    wide = [torch.nan_to_num(vector_format(form).decode(part, size, torch.float64)) for part, form in parts]
    expected = ops.cache_attend(
        query.double(), *wide, table, positions, size**-0.5, window, softcap, None if extra is None else extra.double()
    )
    assert_close(out, expected, tolerance=TOLERANCES[dtype])
    assert not bool(out.transpose(1, 2)[positions < 0].any()), "a padding query gives 0"


FORMS = [specs.KV8, specs.KVFP8, specs.KV4, "int4 g32 sym", "int8 g16 asym", "int2 g32 asym", "fp8"]


@pytest.mark.usefixtures("few_shares")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("bucket", "dtype"), [("m1", "bf16"), ("m1", "fp16"), ("m64", "bf16")])
def test_forms(bucket: str, dtype: str, form: str) -> None:
    run_attend(bucket, RAGGED if bucket == "m1" else CHUNK, 64, form, dtype=dtype)


@pytest.mark.usefixtures("few_shares")
@pytest.mark.parametrize("size", [32, 80, 96, 128])
@pytest.mark.parametrize("form", [specs.KV8, specs.KV4])
def test_decode_over_head_sizes(size: int, form: str) -> None:
    run_attend("m1", RAGGED, size, form)


@pytest.mark.usefixtures("few_shares")
@pytest.mark.parametrize(("size", "form"), [(33, "int8 sym"), (34, "int4 asym"), (33, "int4 sym"), (36, "int2 g12 asym")])
def test_scales_at_odd_addresses_and_bytes_that_are_not_full(size: int, form: str) -> None:
    run_attend("m1", RAGGED, size, form)


OPTIONS = [
    {},
    {"window": 20},
    {"softcap": 5.0},
    {"sinks": True},
    {"page_tokens": 71},
    {"page_tokens": 7, "window": 1, "sinks": True},
    {"v_form": specs.KV8},
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


def test_every_share_of_a_long_context() -> None:
    run_attend("m1", torch.tensor([[2300]]), 32, "int4 asym", page_tokens=256)
