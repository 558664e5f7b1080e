"""Trace a 70B-shaped llama from its configuration alone, run every pass on it, and print time and peak memory.

No weight exists: rounding is an entry in the log of a constant, so the whole pipeline is weightless.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import transformers

from qcompile.codegen.select import backend_for
from qcompile.frontend import load
from qcompile.passes.base import PassContext
from qcompile.passes.manager import run_pipeline
from qcompile.passes.pipelines import default_pipeline
from qcompile.target import parse_target

SHAPE = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip


def main() -> None:
    """Print one line."""
    config = transformers.LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"])
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        started = time.perf_counter()
        graph = load(Path(directory)).graph
        traced = time.perf_counter() - started
    target = parse_target("sm90-int4")
    records = run_pipeline(graph, default_pipeline(target), PassContext(target, backend_for(target)))
    seconds = time.perf_counter() - started
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    size = records[-1].constant_bytes
    print(
        f"{len(graph.nodes)} nodes, {size / 1e9:.1f} GB of constants: traced in {traced:.1f} s, all passes after "
        f"{seconds:.1f} s, peak {peak / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
