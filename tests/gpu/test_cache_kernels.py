"""On a real GPU: every format of the cache through the CUDA engine beside the reference on the CPU, and the kernels of settled caches."""

from __future__ import annotations

import pytest
import torch

from qcompile.quant.cache_format import CACHES
from qcompile.runtime.engines.cuda import CudaEngine
from qcompile.runtime.engines.reference import ReferenceEngine
from tests.codegen.triton.interpreted.settled_layer import Layer, chunk_positions
from tests.gpu.launching import architecture_at_hand, run_from_cpu, small_llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with a driver")]
CALIBRATED = ("kv4-block",)
FORMATS = ["kv", "kv16", "kv8", "kvfp8", "kv4", "kv4-token", "kv4-kivi", "kv2-kivi", *CALIBRATED]
"""Those that kernels serve."""
PROMPTS = [list(range(3, 75)), [40, 41, 42], [7]]
"""The first has settled in part when it has been read, the others settle while they are decoded."""
SETTLED = ["kv4-kivi", "kv2-kivi", "kv4-block"]


@pytest.mark.parametrize("name", FORMATS)
def test_decoding_is_that_of_the_reference(name: str) -> None:
    """As near to the reference as that is to itself in float32: an untrained model spreads the rounding of single codes over its logits."""
    scheme = "" if name == "kv" else f"-{name}"
    contents, exact = (small_llama(f"{target}{scheme}", 128) for target in (f"{architecture_at_hand()}-bf16", "reference-fp32"))
    engines = [
        CudaEngine(contents, max_batch=4, max_context=128),
        *(ReferenceEngine(c, max_batch=4, max_context=128) for c in (contents, exact)),
    ]
    engines[0].prepare()
    assert engines[0].captured_buckets == [1, 2, 4], "a step is computed by its reference, which no CUDA graph holds"
    logits = [[engine.prefill(PROMPTS).float().cpu()] for engine in engines]
    for _ in range(50):
        tokens = logits[1][-1].argmax(-1).tolist()
        for engine, found in zip(engines, logits, strict=True):
            found.append(engine.decode(tokens).float().cpu())
    ours, theirs, wide = map(torch.stack, logits)
    assert float((ours - theirs).square().mean()) <= float((theirs - wide).square().mean())


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("name", SETTLED)
def test_settled_caches_are_written_bit_for_bit_and_attended_to(name: str, size: int) -> None:
    torch.manual_seed(0)
    cache = CACHES[name]
    keys, values = cache.forms()
    layer = Layer(cache.retention, (keys, values), heads=2, size=size, batch=3, page_tokens=64, pages=40, kernels=True, run=run_from_cpu)
    layer.step(chunk_positions(layer.lengths, (2000, 100, 0)))
    layer.attend_in_chunks(8, ((70, 1, 33), (63, 0, 1), (1, 1, 1)))
    layer.attend(8, chunk_positions(layer.lengths, (90, 64, 10), 128, scattered=True), "m64", window=100, softcap=20.0, sinks=True)
