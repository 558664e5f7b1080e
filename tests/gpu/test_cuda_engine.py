"""On a real GPU: a small model through the CUDA engine, against the same plan run by references on the same device."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qcompile.runtime.artifact import ArtifactContents
from qcompile.runtime.engines.cuda import CudaEngine
from tests.gpu.launching import architecture_at_hand, small_llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with a driver")]
SCHEMES = {"bf16": 3e-2, "int8": 3e-2, "int4": 3e-2, "int3": 3e-2, "nvfp4": 3e-2, "w8a8": 0.15, "w4a8": 0.15, "fp8": 0.4}
"""How far logits may lie apart, relative to the largest. Kernels and references round to bfloat16 at the same places but sum in another
order: eight bfloat16 steps. Where activations are rounded again, such a difference moves single codes by a whole step, which the weights
of an untrained model spread: keeping float32 inside normalizations and linears alone moved its logits by 0.06 (w8a8, w4a8), 0.19 (fp8)
and 0.7 (w4a4, which is therefore compared kernel by kernel only)."""
PROMPTS = [list(range(3, 24)), [40, 41, 42], [7]]


@pytest.fixture(scope="module", params=SCHEMES)
def contents(request: pytest.FixtureRequest) -> ArtifactContents:
    """A two-layer llama with heads of 64, compiled for the GPU at hand."""
    if request.param == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("8-bit floats need sm89")
    return small_llama(f"{architecture_at_hand()}-{request.param}", max_context=64)


def engines(contents: ArtifactContents) -> tuple[CudaEngine, CudaEngine]:
    """With kernels, and the same plan without."""
    plain = copy.copy(contents)
    steps = {name: tuple(replace(step, kernels={}) for step in entry.steps) for name, entry in contents.plan.entries.items()}
    plain.plan = replace(contents.plan, entries={name: replace(entry, steps=steps[name]) for name, entry in contents.plan.entries.items()})
    return CudaEngine(contents, max_batch=4, max_context=64), CudaEngine(plain, max_batch=4, max_context=64)


def test_kernels_and_references_agree(contents: ArtifactContents) -> None:
    fast, slow = engines(contents)
    fast.prepare()
    assert fast.captured_buckets == [1, 2, 4]
    with pytest.warns(RuntimeWarning, match="the CUDA graph is off"):
        slow.prepare()
    ours, theirs = fast.prefill(PROMPTS), slow.prefill(PROMPTS)
    for _ in range(8):
        assert float((ours - theirs).float().abs().max() / theirs.float().abs().max()) <= SCHEMES[contents.target.split("-", 1)[1]]
        tokens = theirs.argmax(-1).cpu()
        ours, theirs = fast.decode(tokens), slow.decode(tokens)


def test_a_sequence_does_not_depend_on_the_rows_beside_it(contents: ArtifactContents) -> None:
    fast, _ = engines(contents)
    together = [fast.prefill(PROMPTS), fast.decode([1, 2, 3]), fast.decode([4, -1, 6])]
    alone = [fast.prefill(PROMPTS[:1]), fast.decode([1]), fast.decode([4])]
    for both, one in zip(together, alone, strict=True):
        assert float((both[0] - one[0]).float().abs().max() / one.float().abs().max()) <= SCHEMES[contents.target.split("-", 1)[1]]


def test_sequences_come_and_go_in_shared_pages(contents: ArtifactContents, tmp_path: Path) -> None:
    """Pages of sixteen tokens; a fork, a row that leaves, one that takes its place, and one that comes back from a file."""
    engine = CudaEngine(contents, max_batch=4, max_context=64, page_tokens=16)
    told: dict[int, list[Tensor]] = {}
    told |= {row: [logits] for row, logits in zip(*engine.join_all(PROMPTS[:2]), strict=True)}
    told[engine.fork(0)] = list(told[0])
    for tokens in ({0: 1, 1: 2, 2: 1}, {2: 3, 0: 4}):
        for row, logits in zip(tokens, engine.step(tokens), strict=True):
            told[row].append(logits)
    engine.leave(1)
    assert engine.join(PROMPTS[2])[0] == 1
    engine.save(2, tmp_path / "sequence")
    engine.leave(2)
    engine.step({1: 5, 0: 6})
    row = engine.restore(tmp_path / "sequence")
    told[2].append(engine.step({row: 7})[0])
    for row, tokens in ((0, [1, 4]), (2, [1, 3, 7])):
        alone = torch.cat([engine.prefill(PROMPTS[:1]), *(engine.decode([token]) for token in tokens)])
        error = (torch.stack(told[row]) - alone).float().abs().max() / alone.float().abs().max()
        assert float(error) <= SCHEMES[contents.target.split("-", 1)[1]]


def test_replays_are_deterministic(contents: ArtifactContents) -> None:
    fast, _ = engines(contents)
    runs = []
    for _ in range(2):
        fast.prefill(PROMPTS)
        runs.append(torch.stack([fast.decode([token] * 3) for token in range(1, 6)]))
    assert torch.equal(runs[0], runs[1])
