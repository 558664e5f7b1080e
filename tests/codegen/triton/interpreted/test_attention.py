"""The paged cache: appending and attending against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcompile.ir import ops
from qcompile.quant.scheme import DTYPE_NAMES
from tests.codegen.triton import specs
from tests.codegen.triton.interpreted.harness import assert_close, guarded, result, run_kernel


def cache(batch: int, key_heads: int, size: int, capacity: int, page_tokens: int, kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values [P, L, R, D] and a page table [B, pages] that shuffles pages; one page belongs to nobody and is NaN."""
    pages = -(-capacity // page_tokens)
    table = torch.randperm(batch * pages).view(batch, pages).to(torch.int32) + 1
    keys, values = (torch.randn(batch * pages + 1, key_heads, page_tokens, size).to(kind) for _ in range(2))
    keys[0], values[0] = torch.nan, torch.nan
    return guarded(keys), guarded(values), guarded(table)


def run_attend(
    bucket: str,
    heads: int,
    key_heads: int,
    size: int,
    positions: Tensor,
    *,
    page_tokens: int = 16,
    dtype: str = "bf16",
    window: int = 0,
    softcap: float = 0.0,
    sinks: bool = False,
    arch: str = "sm90",
) -> None:
    """Attend from a view of a fused matrix, compare with the definition in float64."""
    torch.manual_seed(0)
    kind = DTYPE_NAMES[dtype]
    batch, sequence = positions.shape
    keys, values, table = cache(batch, key_heads, size, int(positions.max()) + 1, page_tokens, kind)
    # What lies beyond the longest position of a sequence was never written.
    for row in range(batch):
        for token in range(int(positions[row].max()) + 1, table.shape[1] * page_tokens):
            keys[table[row, token // page_tokens], :, token % page_tokens] = torch.nan
            values[table[row, token // page_tokens], :, token % page_tokens] = torch.nan
    query = guarded(torch.randn(batch, sequence, heads + 2, size).to(kind))[:, :, 1 : heads + 1].transpose(1, 2)
    out = result((batch, sequence, heads, size), kind)
    extra = guarded(torch.randn(heads)) if sinks else None
    operands = {
        "q": query,
        "keys": keys,
        "values": values,
        "page_table": table,
        "positions": guarded(positions),
        "out": out.transpose(1, 2),
    }
    if extra is not None:
        operands["sinks"] = extra
    spec = specs.attend(heads, key_heads, size, bucket, dtype, window=window, softcap=softcap, sinks="fp32" if sinks else None)
    sizes = {"batch": batch, "sequence": sequence, "rows": batch * sequence, "pages": table.shape[1], "page_tokens": page_tokens}
    run_kernel(spec, operands, sizes, arch)
    wide = [torch.nan_to_num(tensor).double() for tensor in (query, keys, values)]
    expected = ops.cache_attend(*wide, table, positions, size**-0.5, window, softcap, None if extra is None else extra.double())
    assert_close(operands["out"], expected)
    assert not bool(operands["out"].transpose(1, 2)[positions < 0].any()), "a padding query gives 0"


RAGGED = torch.tensor([[70], [3], [-1]])


@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_decode_over_head_sizes(size: int) -> None:
    run_attend("m1", 6, 2, size, RAGGED, dtype="fp16")


@pytest.mark.parametrize(
    "options", [{}, {"window": 20}, {"softcap": 5.0}, {"sinks": True}, {"page_tokens": 71}, {"page_tokens": 7, "window": 1}]
)
def test_decode_options(options: dict[str, int]) -> None:
    run_attend("m1", 9, 3, 64, RAGGED, **options)


def test_decode_of_a_length_beyond_one_step_of_every_share() -> None:
    run_attend("m1", 4, 4, 64, torch.tensor([[2300]]), page_tokens=256)


CHUNK = torch.stack((torch.arange(10, 50), torch.cat((torch.full((17,), -1), torch.arange(23)))))


@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_prefill_over_head_sizes(size: int) -> None:
    run_attend("m64", 4, 2, size, CHUNK, dtype="fp16")


@pytest.mark.parametrize(
    "options", [{}, {"window": 12}, {"softcap": 5.0}, {"sinks": True}, {"page_tokens": 64}, {"page_tokens": 5, "window": 3, "sinks": True}]
)
def test_prefill_options(options: dict[str, int]) -> None:
    run_attend("m64", 9, 3, 64, CHUNK, **options)


@pytest.mark.parametrize(("key_heads", "size", "page_tokens", "dtype"), [(3, 64, 8, "bf16"), (2, 80, 5, "fp16"), (1, 20, 64, "fp16")])
def test_append(key_heads: int, size: int, page_tokens: int, dtype: str) -> None:
    torch.manual_seed(0)
    kind = DTYPE_NAMES[dtype]
    positions = torch.tensor([[-1, -1, 0, 1], [9, 10, 11, -1]])
    keys, values, table = cache(2, key_heads, size, 12, page_tokens, kind)
    before = keys.clone(), values.clone()
    fused = guarded(torch.randn(2, 4, 2 * key_heads, size).to(kind))
    k, v = fused[:, :, :key_heads].transpose(1, 2), fused[:, :, key_heads:].transpose(1, 2)
    operands = {"keys": keys, "values": values, "k": k, "v": v, "page_table": table, "positions": guarded(positions)}
    sizes = {"batch": 2, "sequence": 4, "pages": table.shape[1], "page_tokens": page_tokens}
    run_kernel(specs.append(key_heads, size, dtype), operands, sizes)
    expected = ops.cache_append(*before, k, v, table, positions)
    for got, want in zip((keys, values), expected, strict=True):
        assert torch.equal(torch.nan_to_num(got), torch.nan_to_num(want))


def test_append_leaves_other_pages_alone_when_a_position_is_beyond_the_table() -> None:
    keys, values, table = cache(1, 1, 16, 8, 4, torch.float16)
    before = keys.clone()
    token = guarded(torch.ones(1, 1, 1, 16).half())
    operands = {"keys": keys, "values": values, "k": token, "v": token, "page_table": table, "positions": guarded(torch.tensor([[8]]))}
    run_kernel(specs.append(1, 16, "fp16"), operands, {"batch": 1, "sequence": 1, "pages": 2, "page_tokens": 4})
    assert torch.equal(torch.nan_to_num(keys), torch.nan_to_num(before))
