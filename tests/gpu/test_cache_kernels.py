"""On a real GPU: every format of the cache through the CUDA engine beside the reference on the CPU, and the kernels of settled caches."""

from __future__ import annotations

import pytest
import torch

from qcompile import frontend
from qcompile.codegen.select import backend_for, build
from qcompile.passes.base import PassContext
from qcompile.passes.manager import run_pipeline
from qcompile.passes.pipelines import default_pipeline
from qcompile.quant.cache_format import CACHES
from qcompile.quant.retention import Retention
from qcompile.runtime.artifact import ArtifactContents
from qcompile.runtime.engines.cuda import CudaEngine
from qcompile.runtime.engines.reference import ReferenceEngine
from qcompile.target import parse_target
from tests.codegen.triton.interpreted.settled_layer import Layer, chunk_positions
from tests.gpu.launching import run_from_cpu
from tests.models import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with a driver")]
FORMATS = sorted(name for name, cache in CACHES.items() if not any(form.tables for form in (cache.keys, cache.values) if form is not None))
"""Those that need no calibration."""
PROMPTS = [list(range(3, 75)), [40, 41, 42], [7]]
"""The first has settled in part when it has been read, the others settle while they are decoded."""
KIVI = {"kv4-kivi": ("int4 t32 asym", "int4 g32 asym"), "kv2-kivi": ("int2 t32 asym", "int2 g32 asym")}


def bound(contents: ArtifactContents) -> float:
    """How far logits may lie apart, relative to the largest: eight bfloat16 steps; more where a difference may move codes.

    That is what `test_cuda_engine.py` allows activations which are rounded again.
    """
    return 3e-2 if parse_target(contents.target).scheme.cache.keys is None else 0.15


@pytest.fixture(scope="module", params=FORMATS)
def contents(request: pytest.FixtureRequest) -> ArtifactContents:
    """A two-layer llama with heads of 64, compiled for the GPU at hand."""
    major, minor = torch.cuda.get_device_capability()
    goal = parse_target(f"sm{major}{minor}-bf16-{request.param}" if request.param != "kv" else f"sm{major}{minor}-bf16")
    model = tiny("llama", hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64, intermediate_size=192)
    loaded = frontend.load(model)
    ctx = PassContext(goal, backend_for(goal), max_batch=4, max_context=128, prefill_chunk=16)
    run_pipeline(loaded.graph, default_pipeline(goal), ctx)
    kernels, binaries = build(ctx.products["kernels"], goal)
    return ArtifactContents(loaded.graph, ctx.products["plan"], kernels, binaries, loaded.assets, str(goal), "")


def test_decoding_is_that_of_the_reference(contents: ArtifactContents) -> None:
    fast, slow = CudaEngine(contents, max_batch=4, max_context=128), ReferenceEngine(contents, max_batch=4, max_context=128)
    fast.prepare()
    assert fast.captured_buckets == [1, 2, 4], "a step is computed by its reference, which no CUDA graph holds"
    ours, theirs = fast.prefill(PROMPTS), slow.prefill(PROMPTS)
    for _ in range(50):
        assert float((ours.cpu() - theirs).float().abs().max() / theirs.float().abs().max()) <= bound(contents)
        tokens = theirs.argmax(-1).tolist()
        ours, theirs = fast.decode(tokens), slow.decode(tokens)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("name", KIVI)
def test_settled_caches_are_written_bit_for_bit_and_attended_to(name: str, size: int) -> None:
    torch.manual_seed(0)
    layer = Layer(Retention(4, 32, 32), KIVI[name], heads=2, size=size, batch=3, page_tokens=64, pages=40, kernels=True, run=run_from_cpu)
    layer.step(chunk_positions(layer.lengths, (2000, 100, 0)))
    layer.attend_in_chunks(8, ((70, 1, 33), (63, 0, 1), (1, 1, 1)))
    layer.attend(8, chunk_positions(layer.lengths, (90, 64, 10), 128, scattered=True), "m64", window=100, softcap=20.0, sinks=True)
