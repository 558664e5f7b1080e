"""Tokens a second at most: a step takes no less than reading what it must read, and no less than its multiplications (the roofline)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qcompile.ir.constants import Constant
from qcompile.ir.layouts import apply_layout
from qcompile.ir.lowered import Entry, Kernel, Plan, Step
from qcompile.ir.memory import buffers_in, dtype_of
from qcompile.ir.native import segments
from qcompile.ir.size import evaluate
from qcompile.planning.hardware import Device
from qcompile.runtime.accounting import elements_of_codes
from qcompile.runtime.artifact import ArtifactContents
from qcompile.runtime.cache_layers import cache_layers
from qcompile.runtime.cache_layout import CacheLayout, arguments_of
from qcompile.runtime.engines.native import contents_between
from qcompile.runtime.engines.packed import INTEGER, PACKED_LINEARS, packed_weight

_LINEAR = "aten.linear.default"
_EMBEDDINGS = ("aten.embedding.default", "qcompile.quantized_embedding.default")
_EXPERTS = "qcompile.moe_experts.default"
_KINDS = {INTEGER: "int8", "qcompile.float8_linear.default": "fp8"}
"""Operators -> the operands that they multiply, where these are not in the computation dtype."""
PROMPT = 512
"""Tokens of the prompt that reading is predicted for."""


@dataclass(frozen=True)
class Phase:
    """One kind of step.

    Attributes:
        tokens_per_second: an upper bound, over all sequences.
        read_bytes: what a step must read: weights, and the cache of every sequence.
        operations: multiplications and additions of a step.
        bound: `bandwidth` or `compute`, whichever takes longer.
    """

    tokens_per_second: float
    read_bytes: int
    operations: int
    bound: str


@dataclass(frozen=True)
class Speed:
    """Upper bounds of a device at an efficiency of 1; not measured.

    Attributes:
        device: its name.
        source: where its limits come from.
        bandwidth: bytes a second.
        compute: operations a second.
        batch: sequences that run together.
        context: tokens of each in the cache while it decodes.
        prompt: tokens that prefill reads.
        prefill: reading a prompt.
        decode: one more token for each sequence.
    """

    device: str
    source: str
    bandwidth: float
    compute: float
    batch: int
    context: int
    prompt: int
    prefill: Phase
    decode: Phase

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def predict_speed(contents: ArtifactContents, layout: CacheLayout, device: Device, *, is_cuda: bool, prompt: int = PROMPT) -> Speed | None:
    """The bounds of a language model with a cache of this layout; None for any other model."""
    plan = contents.plan
    if "decode" not in plan.entries:
        return None
    batch, context = layout.max_batch, layout.capacity
    prompt = min(prompt, context)
    phases = []
    for name, tokens, seen in (("prefill", prompt, 0), ("decode", 1, context)):
        entry = plan.entries[name]
        packed = range(len(entry.steps)) if is_cuda else native_places(entry, contents.kernels)
        work = _Work(plan, entry, layout, tokens, seen, packed)
        phases.append(_phase(work, batch * tokens, device))
    return Speed(device.name, device.source, device.bandwidth, device.compute, batch, context, prompt, *phases)


def held_weight_bytes(contents: ArtifactContents, *, is_cuda: bool) -> int:
    """What an engine holds of the constants: as they are stored on a GPU, as C++ kernels read them on a CPU, and unpacked for torch."""
    if is_cuda:
        return contents.weight_bytes
    runs = {name: segments(entry, contents.kernels) for name, entry in contents.plan.entries.items()}
    read = {operand for found in runs.values() for run in found for operand in run.table if operand[0] in contents.constants}
    return sum(_laid_out(contents.constants[name], layout) for name, layout in read) + _for_torch(contents_between(contents, runs))


def _laid_out(constant: Constant, layout: str) -> int:
    """Bytes of a constant in the layout that a C++ kernel reads."""
    stored = torch.empty(constant.shape, dtype=constant.dtype, device="meta")
    return apply_layout(layout, stored).nbytes if layout else constant.nbytes


def _for_torch(contents: ArtifactContents) -> int:
    """Bytes of the constants that torch's operators read: packed weights as numbers that it multiplies."""
    entry, elements = contents.plan.entries["forward"], elements_of_codes(contents.plan)
    steps = [step for step in entry.steps if step.operator in PACKED_LINEARS]
    unpacked = dict(_unpacked(step, entry, elements) for step in steps)
    packed = {part for step in steps for part in packed_weight(step).parts}
    return sum(unpacked.values()) + sum(item.nbytes for name, item in contents.constants.items() if name not in packed)


def native_places(entry: Entry, kernels: Mapping[str, Kernel]) -> frozenset[int]:
    """The steps of an entry that C++ kernels make."""
    return frozenset(call.place for run in segments(entry, kernels) for call in run.calls)


def _unpacked(step: Step, entry: Entry, elements: Mapping[str, int]) -> tuple[str, int]:
    """The codes that a packed linear reads, and the bytes of what they become: signed bytes, or numbers as it computes in."""
    weight = packed_weight(step)
    codes = str(weight.parts[0])
    return codes, elements[codes] * (1 if weight.plain else dtype_of(entry.buffers[step.outputs[0]].dtype).itemsize)


def _phase(work: _Work, tokens: int, device: Device) -> Phase:
    operations = work.operations()
    reading = (work.weight_bytes() + work.cache_bytes()) / device.bandwidth
    multiplying = sum(count / device.rate(kind) for kind, count in operations.items())
    bound = "bandwidth" if reading >= multiplying else "compute"
    seconds = max(reading, multiplying)
    return Phase(tokens / seconds, work.weight_bytes() + work.cache_bytes(), sum(operations.values()), bound)


class _Work:
    """What one call of an entry reads and multiplies: `tokens` new ones of each sequence, of which `seen` are in the cache already."""

    def __init__(self, plan: Plan, entry: Entry, layout: CacheLayout, tokens: int, seen: int, packed: Container[int]) -> None:
        """`packed` are the places of steps that read packed weights; others read what these become (`runtime/engines/weights.py`)."""
        self._plan, self._entry, self._layout = plan, entry, layout
        self._tokens, self._seen, self._packed = tokens, seen, packed
        self._elements = elements_of_codes(plan)
        self._sizes = {**layout.sizes, "batch": layout.max_batch, "sequence": tokens}

    def weight_bytes(self) -> int:
        """Of every constant the share that is read, by the step that reads most of it."""
        found: dict[str, float] = {}
        for place, step in enumerate(self._entry.steps):
            for name, size in self._read(step, packed=place in self._packed):
                found[name] = max(size, found.get(name, 0.0))
        return round(sum(found.values()))

    def cache_bytes(self) -> int:
        """Of all sequences; a sliding window reads no more than it spans."""
        attending = [step for step in self._entry.steps if _attends(step)]
        total = 0
        for layer, step in zip(cache_layers(self._plan), attending, strict=True):
            total += layer.bytes_per_token * _spanned(step, self._seen) + (layer.bytes_per_sequence if self._seen else 0)
        return total * self._layout.max_batch

    def operations(self) -> Counter[str]:
        """By the kind of operands."""
        counts: Counter[str] = Counter()
        for step in self._entry.steps:
            if step.operator in (_LINEAR, *PACKED_LINEARS):
                counts[_KINDS.get(step.operator, "")] += 2 * math.prod(self._shape(step.outputs[0])) * self._columns(step)
            elif step.operator == _EXPERTS:
                rows, _, gate_up, down = self._experts(step)
                counts[""] += 2 * rows * (math.prod(gate_up[1:]) + math.prod(down[1:]))
            elif _attends(step):
                counts[""] += self._attention(step)
        return counts

    def _read(self, step: Step, *, packed: bool) -> Iterator[tuple[str, float]]:
        names = [name for name in buffers_in([*step.args, *step.kwargs.values()]) if self._entry.buffers[name].kind == "constant"]
        if not packed and step.operator in PACKED_LINEARS:
            yield _unpacked(step, self._entry, self._elements)
            names = [name for name in names if name not in packed_weight(step).parts]
        for name in names:
            yield name, self._share(step, name) * math.prod(self._shape(name)) * dtype_of(self._entry.buffers[name].dtype).itemsize

    def _share(self, step: Step, name: str) -> float:
        shape = self._shape(name)
        if step.operator in _EMBEDDINGS and len(shape) == 2:
            return min(1.0, self._layout.max_batch * self._tokens / max(1, shape[0]))
        if step.operator == _EXPERTS and len(shape) == 3:
            rows, experts, _, _ = self._experts(step)
            return min(1.0, rows / experts)
        return 1.0

    def _experts(self, step: Step) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
        """Rows that go through an expert each, experts, and the shapes of their weights."""
        given = arguments_of(step)
        gate_up, down = (self._shape(given[name]["buffer"]) for name in ("gate_up", "down"))
        return math.prod(self._shape(given["indices"]["buffer"])), gate_up[0], gate_up, down

    def _columns(self, step: Step) -> int:
        """K of a linear."""
        if step.operator == _LINEAR:
            return self._shape(step.args[1]["buffer"])[1]
        codes = str(packed_weight(step).parts[0])
        return self._elements[codes] // self._shape(codes)[0]

    def _attention(self, step: Step) -> int:
        """Scores and weighted sums, of the tokens that each may see."""
        query, result = self._shape(arguments_of(step)["q"]["buffer"]), self._shape(step.outputs[0])
        pairs = _spanned(step, self._seen) * self._tokens + self._tokens * (self._tokens + 1) // 2
        return 2 * query[0] * query[1] * pairs * (query[3] + result[3])

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(evaluate(size, self._sizes) for size in self._entry.buffers[name].shape)


def _attends(step: Step) -> bool:
    """Whether it attends over the cache: so does one step for each row of `cache_layers`."""
    return "attend" in step.operator and any(name in arguments_of(step) for name in ("keys", "sources"))


def _spanned(step: Step, tokens: int) -> int:
    window = int(arguments_of(step).get("window", 0) or 0)
    return min(tokens, window) if window else tokens
