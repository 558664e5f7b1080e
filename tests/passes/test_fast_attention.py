"""fast-attention: codes of a cache may meet 16 bits, which changes what kernels compute and nothing else."""

from __future__ import annotations

import pytest
import torch

import qcompile
from qcompile.passes.fast_attention import READERS
from tests.models import tiny

IDS = torch.arange(3, 23).view(2, 10)


@pytest.mark.parametrize(("cache", "operator"), [("kv4", "attend_settled"), ("kv8", "cache_attend_packed")])
def test_attention_over_codes_is_marked_where_matmuls_are_fast(cache: str, operator: str) -> None:
    fast, exact = (qcompile.compile(tiny("llama"), f"cpu-int4-{cache}", recipe="nearest", matmul=matmul) for matmul in ("fast", "exact"))
    marked, plain = (compiled.graph.calls(*READERS) for compiled in (fast, exact))
    assert [(operator in str(node.target), node.kwargs["products"]) for node in marked] == [(True, "fast")] * 2
    assert ["products" in node.kwargs for node in plain] == [False] * 2
    rows = {row.node: row.activation for row in fast.contents.coverage}
    assert {rows[node.name] for node in marked} == {"int16"}
    kernels = {name: dict(kernel.spec.options) for name, kernel in fast.contents.kernels.items()}
    assert {kernels[name]["products"] for node in marked for name in node.meta["kernels"].values()} == {"fast"}


def test_the_definition_stays() -> None:
    """The reference computes what it computes without the pass."""
    options = {"recipe": "nearest", "matmul": "fast", "engine": "reference"}
    fast, exact = (qcompile.compile(tiny("llama"), "cpu-int4-kv8", disable=disabled, **options) for disabled in ([], ["fast-attention"]))
    assert [len(compiled.graph.calls(*READERS)) for compiled in (fast, exact)] == [2, 2]
    assert torch.equal(fast(IDS)["logits"], exact(IDS)["logits"])


def test_caches_of_numbers_and_graphics_processors_are_left_alone() -> None:
    for target in ("cpu-int4-kv16", "sm90-int4-kv8"):
        graph = qcompile.compile(tiny("llama"), target, recipe="nearest", matmul="fast").graph
        assert not any("products" in node.kwargs for node in graph.nodes)
