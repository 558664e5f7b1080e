"""Layers with forms of their own: the integer program, what is measured, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
import torch
from torch import Tensor

import qcompile
from qcompile.errors import FormatError, SourceError
from qcompile.frontend import load
from qcompile.ir.records import Assets
from qcompile.passes.assign_kv_formats import cheapest
from qcompile.passes.cache_sensitivity import losses
from qcompile.passes.calibration import make_calibration
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.fold_constants import FoldConstants
from qcompile.passes.manager import run_pipeline
from qcompile.passes.raise_patterns import RaisePatterns
from qcompile.quant.cache_format import MIXED_FORMS
from qcompile.target import parse_target
from tests.models import tiny
from tests.passes.helpers import context

CALIBRATION = torch.randint(0, 100, (4, 96), generator=torch.Generator().manual_seed(1))


def test_the_choice_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        cost = torch.rand(4, 3, generator=generator, dtype=torch.float64) ** 4 * 1e-6
        size = torch.randint(1, 9, (4, 3), generator=generator).tolist()
        chosen = cheapest(cost, size, 8.0, 18)
        fitting = [picks for picks in product(range(3), repeat=4) if sum(size[i][pick] for i, pick in enumerate(picks)) <= 18]
        best = min(float(sum(cost[i, pick] for i, pick in enumerate(picks))) for picks in fitting)
        assert sum(size[layer][pick] for layer, pick in enumerate(chosen)) <= 18
        assert float(sum(cost[layer, pick] for layer, pick in enumerate(chosen))) == pytest.approx(best, rel=1e-9)


def test_a_budget_below_the_smallest_forms_is_refused() -> None:
    with pytest.raises(FormatError, match=r"cache_bits=1: expected at least 2, .*; give more"):
        cheapest(torch.ones(2, 2), [[4, 8], [4, 8]], 1.0, 32)


def measured(factors: Sequence[float]) -> Tensor:
    """Losses of a tiny llama whose layers reach the output `factors` times as strongly as they did."""
    torch.manual_seed(0)
    model = tiny("llama")
    with torch.no_grad():
        for layer, factor in zip(model.model.layers, factors, strict=True):
            layer.self_attn.o_proj.weight *= factor
    graph = load(model).graph
    run_pipeline(graph, [Canonicalize(), RaisePatterns(), FoldConstants()], context())
    cache = parse_target("cpu-fp32-kv-mixed").scheme.with_options(cache_window=4).cache
    layers = graph.calls(torch.ops.qcompile.attention.default)
    return losses(graph, layers, MIXED_FORMS, cache, make_calibration(CALIBRATION, Assets()), 96)


def test_what_reaches_the_output_costs_more_and_finer_forms_cost_less() -> None:
    plain, quiet = measured((1, 1)), measured((1, 0.25))
    assert (plain > 0).all()
    assert (quiet[1] < plain[1] / 4).all()
    coarse, fine = MIXED_FORMS.index(("int2 t32 asym", "int2 g32 asym")), MIXED_FORMS.index(("int8 t32 sym", "int8 g64 sym"))
    assert (plain[:, fine] < plain[:, coarse] / 100).all()


def test_the_estimate_is_near_what_both_layers_lose_together() -> None:
    torch.manual_seed(0)
    model = tiny("llama")
    options = {"calibration": CALIBRATION, "max_context": 128, "cache_window": 4, "disable": ["rotate-hadamard"]}
    coarse = qcompile.compile(model, "cpu-fp32-kv2-kivi", **options, engine="torch_cpu")
    exact = qcompile.compile(model, "cpu-fp32", max_context=128, engine="torch_cpu")
    wanted, found = (part(input_ids=CALIBRATION[:1])["logits"][0].log_softmax(-1) for part in (exact, coarse))
    lost = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert float(measured((1, 1))[:, 0].sum()) == pytest.approx(lost, rel=0.35)


def test_each_layer_says_its_forms_and_the_budget_holds() -> None:
    compiled = qcompile.compile(
        tiny("llama"), "cpu-fp32-kv-mixed", calibration=CALIBRATION, max_context=64, cache_bits=7.0, cache_window=4, engine="torch_cpu"
    )
    forms = [(layer.keys, layer.values) for layer in compiled.cache_layers]
    assert all(pair in MIXED_FORMS for pair in forms)
    numbers = sum(layer.numbers_per_token for layer in compiled.cache_layers)
    assert 4.5 * numbers < 8 * compiled.kv_bytes_per_token <= 7.0 * numbers


def test_text_in_which_nothing_settles_is_refused() -> None:
    with pytest.raises(SourceError, match=r"windows of at least 36 tokens, in which a group settles, got 20"):
        qcompile.compile(
            tiny("llama"), "cpu-fp32-kv-mixed", calibration=CALIBRATION[:, :20], max_context=128, cache_bits=7.0, engine="torch_cpu"
        )
