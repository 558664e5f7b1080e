"""Tiny models over packed caches in the native engine against the reference: chunks of a prompt, ragged batches, tokens that settle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qcompile
from qcompile.codegen.cpp import build
from qcompile.runtime.engines import make_engine
from qcompile.runtime.engines.native import NativeEngine
from qcompile.runtime.saved_sequence import SavedSequence
from qcompile.runtime.sequences import SequenceEngine
from tests.codegen.cpp.harness import RUNNABLE
from tests.models import tiny

SIZES = {"max_batch": 4, "max_context": 128}
PROMPTS = [[*range(3, 98)], [9, 8, 7, 6, 5, 4, 3], [11]]
HALF = 2.0**-11
"""What is kept as it came is rounded to halves: a number that lies between two of them may go either way."""


@pytest.fixture(autouse=True)
def quick_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """One instruction set and no optimization: the kernels' own tests have both."""
    monkeypatch.setattr(build, "instruction_sets", lambda: RUNNABLE[:1])
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O0"))


def tied(native: SequenceEngine, reference: SequenceEngine) -> list[int]:
    """Rows with a code of 8 bits so near the middle of two that the last bits of a float decide it: one or two of them, by one step."""
    rows = []
    for row in reference.rows:
        made, exact = native.cache.read(row), reference.cache.read(row)
        steps = torch.cat([(made[name].int() - exact[name].int()).abs().flatten() for name in exact])
        assert steps.max() <= 1
        assert steps.sum() <= 2
        rows += [row] * bool(steps.any())
    return rows


def again(engine: SequenceEngine, row: int, before: SavedSequence, token: int) -> Tensor:
    """The logits of a row that takes `token` behind a sequence, which takes its place."""
    engine.leave(row)
    assert engine.resume(before) == row
    return engine.step({row: token})[0]


@pytest.mark.parametrize(
    ("family", "target", "bound"),
    [
        ("llama", "cpu-int4-kv8", 1e-5), ("llama", "cpu-int4-kv4-token", HALF), ("llama", "cpu-int4-kv4", HALF),
        ("gemma2", "cpu-int4-kv4-kivi", HALF),
    ],
)  # fmt: skip
def test_packed_caches_run_native(family: str, target: str, bound: float) -> None:
    model = qcompile.compile(tiny(family), target, recipe="nearest", engine="native", prefill_chunk=40, **SIZES)
    native, reference = (make_engine(model.contents, name=name, page_tokens=64, **SIZES) for name in ("native", "reference"))
    assert isinstance(native, NativeEngine)
    over_cache = ("cache", "append", "attend", "pack", "settle", "retain", "recent")
    for entry in model.contents.plan.entries.values():
        assert all(step.kernels for step in entry.steps if any(word in step.operator for word in over_cache))
    if family == "llama":
        assert {name: len(runs) for name, runs in native._runs.items()} == {"forward": 1, "prefill": 1, "decode": 1}
    made, exact = (engine.prefill(PROMPTS) for engine in (native, reference))
    for _ in range(4):
        for row in tied(native, reference) if bound < HALF else ():
            # Compared over the same codes: those of the reference up to the last token, which both read again.
            stored, (*tokens, last) = reference.cache.read(row), reference.tokens_of(row)
            before = SavedSequence(len(tokens), tuple(tokens), {name: codes[:, : len(tokens)] for name, codes in stored.items()})
            made[row], exact[row] = (again(engine, row, before, last) for engine in (native, reference))
        assert float((made - exact).abs().max() / exact.abs().max()) < bound
        tokens = exact.argmax(-1).tolist()
        made, exact = (engine.decode(tokens) for engine in (native, reference))
