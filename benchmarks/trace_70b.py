"""Trace a 70B-shaped llama from its configuration alone, and print how long it took and the greatest memory it stood in."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import transformers

from qcompile.frontend import load

_SHAPE = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip


def main() -> None:
    """Print one line."""
    config = transformers.LlamaConfig(**_SHAPE, architectures=["LlamaForCausalLM"])
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        started = time.perf_counter()
        graph = load(Path(directory)).graph
        seconds = time.perf_counter() - started
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    weights = sum(constant.nbytes for constant in graph.constants.values()) / 4
    print(f"{weights / 1e9:.1f} G parameters, {len(graph.nodes)} nodes: {seconds:.1f} s, peak {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
