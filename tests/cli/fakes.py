"""A compiled model that only remembers what it was asked; it speaks the public interface of the real one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.exporters.onnx import OnnxFile
from qcompile.ir.graph import Graph
from qcompile.ir.lowered import Plan
from qcompile.ir.records import Assets, CoverageRow, PassRecord
from qcompile.runtime.artifact import ArtifactContents
from qcompile.runtime.cache_layers import CacheLayer
from qcompile.target import Target, parse_target

RECORDS = [
    PassRecord(0, "canonicalize", "canonicalize", True, 20, 12, 0.5, 4_000_000),
    PassRecord(1, "idle", "idle", False, 12, 12, 0.1, 4_000_000),
]
COVERAGE = [CoverageRow("linear_1", "linear", "q.weight", "int4 g64 sym fp16", "torch_cpu.linear", "", "m.py:1")]
CACHE = [CacheLayer(index, "int4 t32 asym", "int4 g32 asym", 4, 32, 384, 240, 51456, 0, "torch_cpu.attend_settled") for index in range(3)]


def _no_graph() -> Graph:
    raise AssertionError("nothing that is faked looks at a graph")


@dataclass
class FakeEngine:
    """Counts what it was given; every token follows every other."""

    max_context: int = 64
    prompts: list[int] = field(default_factory=list)
    decoded: int = 0

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        self.prompts += [len(prompt) for prompt in prompts]
        return torch.zeros(len(prompts), 5)

    def decode(self, tokens: list[int]) -> Tensor:
        self.decoded += 1
        return torch.zeros(len(tokens), 5)


@dataclass
class FakeModel:
    """Logits of a fixed bigram table; generates the words of `says`."""

    says: tuple[str, ...] = ("Par", "is")
    asked: dict[str, Any] = field(default_factory=dict)
    target: Target = field(default_factory=lambda: parse_target("cpu-int4"))
    assets: Assets = field(default_factory=lambda: Assets(vocab_size=5, name="fake"))
    records: list[PassRecord] = field(default_factory=lambda: RECORDS)
    coverage: list[CoverageRow] = field(default_factory=lambda: COVERAGE)
    cache_layers: list[CacheLayer] = field(default_factory=lambda: CACHE)
    weight_bytes: int = 1_000_000
    bits_per_weight: float = 4.25
    matmul: str = "exact (float32 activations)"
    kv_bytes_per_token: int = 720
    kv_bytes_per_sequence: int = 154_368
    contents: ArtifactContents = field(
        default_factory=lambda: ArtifactContents(_no_graph, Plan({}), {}, {}, Assets(), "", "", constants={})
    )
    scale: float = 1.0
    is_causal_lm: bool = True
    engine: FakeEngine = field(default_factory=FakeEngine)

    def __call__(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.scale * torch.eye(5)[input_ids]}

    def generate(self, prompt: Any, **options: Any) -> Iterator[str]:
        self.asked |= {"prompt": prompt, **options}
        yield from self.says

    def export_onnx(self, path: Path, **options: Any) -> OnnxFile:
        self.asked = {"arguments": (path,), **options}
        return OnnxFile(path, (path,), 1_002_000, 23, options["profile"], 4e-6)

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        path.mkdir(exist_ok=overwrite)
        (path / "manifest.json").write_text("{}")
