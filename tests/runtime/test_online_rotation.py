"""Rotations that run: both CPU engines compute what the model without them computes."""

from __future__ import annotations

import pytest

import qcompile
from qcompile.compiled import CompiledModel
from qcompile.passes.fold_norms import FoldNorms
from qcompile.passes.pipelines import default_pipeline, insert
from qcompile.passes.rotate_hadamard import RotateHadamard
from qcompile.runtime.engines.base import PlanEngine
from qcompile.runtime.engines.reference import ReferenceEngine
from qcompile.runtime.engines.torch_cpu import TorchCpuEngine
from qcompile.target import parse_target
from tests.models import tiny

PROMPTS = [[5, 9, 14, 77, 3], [8, 21]]
CONTEXT = 16


@pytest.fixture(scope="module")
def models() -> tuple[CompiledModel, CompiledModel]:
    """A tiny llama (12 x 4 hidden channels: a mixing matrix and a power of two), plain and rotated."""
    model, plain = tiny("llama"), default_pipeline(parse_target("cpu-fp32"))
    rotated = plain
    for step in (FoldNorms(), RotateHadamard(online=("linears", "keys"))):
        rotated = insert(rotated, step, before="rewrite-kv-cache")
    options = {"max_batch": len(PROMPTS), "max_context": CONTEXT}
    return tuple(qcompile.compile(model, "cpu-fp32", passes=passes, **options, engine="torch_cpu") for passes in (plain, rotated))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", [ReferenceEngine, TorchCpuEngine])
def test_prompts_and_steps_give_the_same_logits(kind: type[PlanEngine], models: tuple[CompiledModel, CompiledModel]) -> None:
    expected, got = (kind(model.contents, max_batch=len(PROMPTS), max_context=CONTEXT) for model in models)
    assert "qcompile.hadamard.default" in {step.operator for step in got.contents.plan.entries["decode"].steps}
    pairs = [(expected.prefill(PROMPTS).clone(), got.prefill(PROMPTS).clone())]
    pairs += [(expected.decode(tokens).clone(), got.decode(tokens).clone()) for tokens in ([6, 7], [8, 9])]
    for one, other in pairs:
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()


def test_tokens_are_the_same(models: tuple[CompiledModel, CompiledModel]) -> None:
    plain, rotated = (model.generate(PROMPTS, max_new_tokens=6, ignore_eos=True) for model in models)
    assert plain == rotated
