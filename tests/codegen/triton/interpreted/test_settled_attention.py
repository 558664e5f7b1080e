"""Attention over what has settled and what is kept as it came, against the definition in float64, over pages that kernels have written."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qcompile.ir.retention_ops import attend_settled
from qcompile.quant.retention import Retention
from qcompile.quant.scheme import DTYPE_NAMES
from tests.codegen.triton import settled_specs
from tests.codegen.triton.interpreted.harness import assert_close, guarded, result, run_kernel
from tests.codegen.triton.interpreted.settled_layer import Layer, chunk_positions

KIVI = Retention(4, 8, 16)
"""The shape of `kv4-kivi`, smaller."""


def attend(layer: Layer, heads: int, positions: Tensor, bucket: str, *, window: int = 0, softcap: float = 0.0, sinks: bool = False) -> None:
    """One step of the layer, its queries a view of a fused matrix."""
    exact, at = layer.step(positions)
    batch, sequence = positions.shape
    kind = DTYPE_NAMES[layer.dtype]
    query = guarded(torch.randn(batch, sequence, heads + 2, layer.size).to(kind))[:, :, 1 : heads + 1].transpose(1, 2)
    out = result((batch, sequence, heads, layer.size), kind)
    stored = dict(zip(("keys", "values", "exact_keys", "exact_values"), (*layer.stored, *exact), strict=True))
    extra = {"sinks": guarded(torch.randn(heads))} if sinks else {}
    operands = {"q": query, **stored, "page_table": layer.table, "positions": at, "out": out.transpose(1, 2), **extra}
    spec = settled_specs.attend_settled(
        heads, layer.heads, layer.size, bucket, layer.forms, layer.policy,
        dtype=layer.dtype, rows=layer.rows_dtype, window=window, softcap=softcap, sinks="fp32" if sinks else None,
    )  # fmt: skip
    run_kernel(spec, operands, {**layer.sizes, "batch": batch, "sequence": sequence, "rows": batch * sequence})
    expected = attend_settled(
        query.double(), *stored.values(), layer.table, positions, *layer.forms, **settled_specs.policy_options(layer.policy),
        scale=layer.size**-0.5, window=window, softcap=softcap, sinks=extra["sinks"].double() if sinks else None,
    )  # fmt: skip
    assert_close(operands["out"], expected)
    assert not bool(out[positions < 0].any()), "a padding query gives 0"


def decode_and_prefill(layer: Layer, heads: int, counts: Sequence[Sequence[int]], **options: float) -> None:
    """Chunks of the sequences of a batch, one after the other, each attended to."""
    for count in counts:
        attend(layer, heads, chunk_positions(layer.lengths, count), "m1" if max(count) == 1 else "m2-63", **options)


FORMS = [
    ("int4 t16 asym", "int4 g32 asym"), ("int2 t16 asym", "int2 g16 asym"), ("int8 t16 sym", "int8 g32 sym"),
    ("int4 g16 asym", "int4 t16 sym"), ("fp8 g16", "int2 t4 asym"),
]  # fmt: skip


@pytest.mark.parametrize("forms", FORMS)
def test_formats_of_keys_and_values(forms: tuple[str, str]) -> None:
    torch.manual_seed(0)
    layer = Layer(KIVI, forms, heads=1, size=32, batch=2, page_tokens=32, pages=3, dtype="fp16")
    decode_and_prefill(layer, 2, ((70, 0), (12, 3), (1, 1)))


@pytest.mark.parametrize("options", [{"window": 20}, {"softcap": 5.0}, {"sinks": True}, {"window": 1}])
def test_options(options: dict[str, float]) -> None:
    torch.manual_seed(0)
    layer = Layer(KIVI, FORMS[0], heads=1, size=32, batch=2, page_tokens=16, pages=6)
    decode_and_prefill(layer, 3, ((80, 9), (1, 1)), **options)


@pytest.mark.parametrize("policy", [Retention(0, 0, 32), Retention(4, 0, 1), Retention(0, 40, 32), Retention(40, 1, 64)])
def test_policies(policy: Retention) -> None:
    torch.manual_seed(0)
    forms = ("int4 t32 asym" if policy.group > 1 else "int4 asym", "int4 g32 asym")
    layer = Layer(policy, forms, heads=1, size=32, batch=2, page_tokens=64, pages=2, rows_dtype="fp16")
    decode_and_prefill(layer, 3, ((60, 0), (50, 7), (1, 1)))


@pytest.mark.parametrize("size", [8, 80, 128])
def test_head_sizes(size: int) -> None:
    torch.manual_seed(0)
    layer = Layer(KIVI, ("int2 t16 asym", "int4 g16 asym"), heads=2, size=size, batch=1, page_tokens=48, pages=2)
    decode_and_prefill(layer, 4, ((50,), (1,)))


def test_groups_longer_than_a_step_and_more_settled_than_one_step_of_every_share() -> None:
    torch.manual_seed(0)
    layer = Layer(Retention(1, 0, 128), ("int4 t128 asym", "int8 t64 sym"), heads=1, size=32, batch=1, page_tokens=128, pages=20)
    layer.step(chunk_positions([0], [2500]))
    decode_and_prefill(layer, 1, ((1,),))


def test_padding_may_stand_anywhere() -> None:
    torch.manual_seed(0)
    layer = Layer(KIVI, FORMS[0], heads=1, size=32, batch=2, page_tokens=48, pages=4)
    for counts in ((60, 33), (50, 40)):
        attend(layer, 3, chunk_positions(layer.lengths, counts, 90, scattered=True), "m64")
