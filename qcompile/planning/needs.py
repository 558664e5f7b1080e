"""What a compilation holds in memory and writes to disk, told from what it is going to do.

Copies of a weight or a moment in flight were measured: peak resident memory over that of a float32 copy, of matrices of 4096 x 2048.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from qcompile.ir.constants import Cast, Constant
from qcompile.ir.lowered import Plan
from qcompile.kept import LIMIT_BYTES
from qcompile.passes.execution import Limits
from qcompile.passes.learn_rotation import MOMENT_BYTES
from qcompile.passes.learn_rounding import LEARNING_BYTES, Learning
from qcompile.planning.outlining import Outlined
from qcompile.runtime.accounting import elements_of_codes
from qcompile.runtime.engines.packed import PACKED_LINEARS, packed_weight

_ROUND_COPIES = 4
"""Float32 copies of a weight while it is rounded alone."""
_BASIS_COPIES = 6
"""The same of one that a change of basis comes before: two of them in float64."""
_GPTQ_COPIES, _MOMENT_COPIES = 8, 6
"""The same of a weight while its columns are rounded one after the other, and of the second moment of its inputs."""
_MICRO_BATCH = 1024
"""Tokens that run through the graph at once."""
_IN_FLIGHT = 6
"""Values as wide as the widest that a layer has at once."""
_BASIS_CHANGES = ("fold-norms", "learn-rotation", "smooth-activations", "rotate-hadamard", "scale-keys", "scale-salient-weights")


@dataclass
class Needs:
    """Bytes by what they are for.

    Attributes:
        program: resident before any weight is read: libraries, the graph, and a model that was in memory already.
        phases: what each phase holds beside that; they do not coincide.
        disk: what is written: the artifact, intermediate results that a later compilation finds again, and values that leave memory.
    """

    program: int
    phases: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)

    @property
    def peak_memory(self) -> int:
        """Of the process, in its largest phase."""
        return self.program + max(self.phases.values(), default=0)

    @property
    def disk_bytes(self) -> int:
        """Of all files."""
        return sum(self.disk.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "peak_memory_bytes": self.peak_memory, "program_bytes": self.program, "phases": dict(self.phases),
            "disk_bytes": self.disk_bytes, "disk": dict(self.disk),
        }  # fmt: skip


def predict_needs(outlined: Outlined, tokens: int) -> Needs:
    """The needs of the compilation that was outlined, with `tokens` of calibration data where it takes any."""
    model = _Model(outlined)
    phases = {"writing one weight after the other": model.writing()}
    disk = {"artifact, built beside its place and renamed": outlined.size.total}
    if model.reads_data:
        phases["running the model on calibration data"] = model.running(tokens)
        spilled = max(0, model.values(tokens) - Limits().values)
        disk["values beyond the limit in memory (temporary)"] = spilled
        disk["work cache"] = min(LIMIT_BYTES, model.kept())
    if model.turns_stream:
        phases["second moments for a rotation"] = model.moments()
    if model.rounding in ("gptq", "learned"):
        phases["rounding weights on calibration data"] = model.rounding_sequentially(tokens)
    if model.learns:
        phases["learning roundings"] = model.learning(tokens)
    if outlined.size.onnx:
        disk["ONNX file before it is copied (temporary)"] = outlined.size.onnx
    return Needs(outlined.resident, phases, {name: size for name, size in disk.items() if size})


class _Model:
    """Sizes of an outlined model that its needs follow from."""

    def __init__(self, outlined: Outlined) -> None:
        contents = outlined.contents
        self._constants, self._outlined = contents.constants, outlined
        self._elements = elements_of_codes(contents.plan)
        self._groups = list(_stacked(contents.plan, self._elements))
        names = [record.name for record in contents.records]
        self._changes_bases = any(name in _BASIS_CHANGES for name in names)
        specs = [record.spec for record in contents.records if record.name == "quantize-weights"]
        self.rounding = next((spec.partition("rounding=")[2].rstrip("}").split(",")[0] for spec in specs if "rounding=" in spec), "nearest")
        self.reads_data = bool(outlined.outline.valueless)
        self.turns_stream = any(choice.step == "learn-rotation" for choice in outlined.outline.choices)
        self.learns = self.rounding == "learned" and 0 < sum(self._elements.values()) <= Learning().most_elements

    def writing(self) -> int:
        """The largest constant as it is made; rounded before, it only has to be copied."""
        factor = _BASIS_COPIES if self._changes_bases else _ROUND_COPIES
        done = self.rounding in ("gptq", "learned")
        coded = max((4 * count * (1 if done else factor) for count in self._elements.values()), default=0)
        plain = (_in_flight(item) for item in self._constants.values() if item.format is None)
        return max(coded, max(plain, default=0))

    def values(self, tokens: int) -> int:
        """Of the values that wait for all batches: the stream, and the widest that a linear reads, in float32."""
        return 4 * tokens * (max((columns for _, columns in self._groups), default=0) + self._stream)

    @property
    def _stream(self) -> int:
        """Width of what most linears read."""
        widths = [columns for _, columns in self._groups]
        return max(set(widths), key=widths.count, default=0)

    def running(self, tokens: int) -> int:
        """Values up to their limit, constants up to theirs and one more, and a micro-batch in flight."""
        widest = max((columns for _, columns in self._groups), default=0)
        largest = max((4 * self._count(name) for name in self._constants if name not in self._elements), default=0)
        weights = 4 * sum(self._elements.values()) + sum(4 * self._count(name) for name in self._constants if name not in self._elements)
        held = min(weights, Limits().constants + largest)
        return min(Limits().values, self.values(tokens)) + held + 4 * _IN_FLIGHT * min(tokens, _MICRO_BATCH) * widest

    def moments(self) -> int:
        """Of the values that a stream's readers see, as many as are looked at, and as much again of their weights."""
        width = self._stream
        return min(MOMENT_BYTES, 8 * width**2 * len(self._groups)) + 4 * _MOMENT_COPIES * width**2

    def rounding_sequentially(self, tokens: int) -> int:
        """The largest stack of weights that read one value, its second moment, and the values that wait."""
        stacks = (4 * (_GPTQ_COPIES * rows * columns + _MOMENT_COPIES * columns**2) for rows, columns in self._groups)
        return max(stacks, default=0) + self.running(tokens)

    def learning(self, tokens: int) -> int:
        """Every weight's own, other constants in float32 (of two graphs), and the float results that are aimed at."""
        rest = sum(4 * self._count(name) for name, item in self._constants.items() if item.format is None)
        return LEARNING_BYTES * sum(self._elements.values()) + 2 * rest + self.values(tokens) // 2

    def kept(self) -> int:
        """Rounded weights, with how far each lay from its level; learned ones besides; second moments."""
        coded = sum(item.nbytes for item in self._constants.values() if item.format is not None)
        kept = coded + sum(self._elements.values()) if self.rounding in ("gptq", "learned") else 0
        moments = self.moments() // 2 if self.turns_stream else 0
        return kept + (coded if self.learns else 0) + moments

    def _count(self, name: str) -> int:
        item = self._constants[name]
        return item.nbytes // item.dtype.itemsize


def _in_flight(constant: Constant) -> int:
    """Of a float weight as it is made: what a cast reads beside what it makes; a change of basis works in float64."""
    count = constant.nbytes // constant.dtype.itemsize
    if not all(isinstance(step, Cast) for step in constant.transforms):
        return 4 * count * _BASIS_COPIES
    widths = [constant.source.dtype.itemsize, *(step.to.itemsize for step in constant.transforms if isinstance(step, Cast))]
    return count * max((before + after for before, after in pairwise(widths)), default=widths[0])


def _stacked(plan: Plan, elements: dict[str, int]) -> Iterator[tuple[int, int]]:
    """[N, K] of the weights that read the same value, one above the other."""
    stacks: dict[str, dict[str, tuple[int, int]]] = {}
    for step in plan.entries["forward"].steps:
        if step.operator in PACKED_LINEARS:
            weight = packed_weight(step)
            codes = str(weight.parts[0])
            rows = int(plan.entries["forward"].buffers[codes].shape[0])  # type: ignore[arg-type]
            stacks.setdefault(weight.x, {})[codes] = rows, elements[codes] // rows
    for stack in stacks.values():
        yield sum(rows for rows, _ in stack.values()), next(iter(stack.values()))[1]
