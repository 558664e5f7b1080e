"""What the emitter of C++ and the engine that calls it agree on: instruction sets, runs of native steps, and their tables of tensors."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qcompile.ir.allowed import ALLOWED
from qcompile.ir.lowered import BUCKETS, Entry, Kernel, Plan, Step, item_operand
from qcompile.ir.memory import buffers_in, root_of, undecided_sizes
from qcompile.ir.operands import bind_arguments, output_name

INSTRUCTION_SETS: dict[str, frozenset[str]] = {
    "avx512": frozenset(
        {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16", "avx2", "fma", "f16c"}
    ),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "portable": frozenset(),
}  # fmt: skip
"""Instruction set -> what a processor must have for it, as Linux calls it; the best first."""

ATTENDING = ("qcompile.cache_attend.default", "qcompile.cache_attend_packed.default", "qcompile.attend_settled.default")
"""Operators whose buckets count the tokens of each sequence, not rows."""
NATIVE_SOURCE = "native.cpp"
"""The file of an artifact with the source of its libraries."""
RANK = 5
"""Axes of a tensor in the table."""
TENSOR_WORDS = 2 + 2 * RANK
"""Integers of 64 bits of a tensor: its address, rank, sizes and strides."""


def library_name(machine: str, instruction_set: str) -> str:
    """The file of an artifact's library: `native-x86_64-avx512.so`."""
    return f"native-{machine}-{instruction_set}.so"


def library_parts(name: str) -> tuple[str, str]:
    """Machine and instruction set of a library's file; ("", "") for any other file."""
    match = re.fullmatch(r"native-(.+)-([a-z0-9]+)\.so", name)
    return (match[1], match[2]) if match else ("", "")


@dataclass(frozen=True)
class NativeCall:
    """A step of a run: its place in the entry, kernels by row bucket ("" is every number), and the tensors they are called with.

    `counted` is the tensor whose rows choose among the buckets, and the axis that holds them (-1: all but the last).
    """

    place: int
    kernels: dict[str, str]
    tensors: tuple[int, ...]
    counted: tuple[int, int] = (0, -1)


@dataclass(frozen=True)
class Segment:
    """Steps of an entry that one function of the library makes, views between them included, which need no call.

    Attributes:
        function: its name in the library.
        calls: in order.
        table: what the tensors of the calls are: buffer and layout ("" is as it is stored), by number.
    """

    function: str
    calls: tuple[NativeCall, ...]
    table: tuple[tuple[str, str], ...]

    @property
    def places(self) -> range:
        """From the first to the last of its steps."""
        return range(self.calls[0].place, self.calls[-1].place + 1)


def segments(entry: Entry, kernels: Mapping[str, Kernel]) -> list[Segment]:
    """The longest runs of steps that have C++ kernels; none in an entry with sizes that values decide, which is bound as it runs."""
    if undecided_sizes(entry):
        return []
    found: list[Segment] = []
    calls: list[NativeCall] = []
    table: dict[tuple[str, str], int] = {}
    for place, step in enumerate([*entry.steps, None]):
        if step is not None and _is_view(entry, step):
            continue
        operands = None if step is None else native_operands(entry, step, kernels)
        if step is not None and operands is not None:
            numbers = tuple(table.setdefault(operand, len(table)) for operand in operands.values())
            calls.append(NativeCall(place, step.kernels, numbers, _counted(step, list(operands))))
        elif calls:
            found.append(Segment(f"qcompile_{entry.name}_{len(found)}", tuple(calls), tuple(table)))
            calls, table = [], {}
    return found


def _is_view(entry: Entry, step: Step) -> bool:
    return bool(step.outputs) and all(entry.buffers[name].alias for name in step.outputs)


def native_operands(entry: Entry, step: Step, kernels: Mapping[str, Kernel]) -> dict[str, tuple[str, str]] | None:
    """Operand -> buffer and layout, in the order of the kernel's parameters; None if the step has no C++ kernel.

    A layout is applied once, at load: a step whose weight is computed has none.
    """
    chosen = [kernels[name] for name in step.kernels.values() if name in kernels]
    if not chosen or len(chosen) < len(step.kernels) or any(kernel.suffix != ".cpp" for kernel in chosen):
        return None
    given = bind_arguments(step.operator, ALLOWED[step.operator], step.args, step.kwargs)
    lists = {key: value for key, value in given.items() if isinstance(value, list | tuple)}
    given |= {item_operand(key, place): item for key, listed in lists.items() for place, item in enumerate(listed)}
    given |= {output_name(place): {"buffer": name} for place, name in enumerate(step.outputs)}
    layouts = dict(chosen[0].layouts)
    operands = {}
    for parameter in chosen[0].launches[0].parameters:
        buffer = next(buffers_in(given.get(str(parameter.value))), "")
        layout = layouts.get(str(parameter.value), "")
        if not buffer or (layout and entry.buffers[buffer].kind != "constant"):
            return None
        operands[str(parameter.value)] = (buffer, layout)
    return operands


def _counted(step: Step, operands: list[str]) -> tuple[int, int]:
    """Which of the operands chooses among buckets, and by which axis."""
    if step.operator in ATTENDING:
        return operands.index("q"), 2
    return next((place for place, name in enumerate(operands) if name in ("x", "codes")), 0), -1


def plan_digest(plan: Plan, kernels: Mapping[str, Kernel], runs: Mapping[str, list[Segment]] | None = None) -> str:
    """What a library was made for: every run of native steps, the tensors in its table, and the kernels.

    Steps between the runs and where buffers lie are not part of it. `runs` are the `segments` of each entry, if they are at hand.
    """
    found = {name: segments(entry, kernels) for name, entry in plan.entries.items()} if runs is None else runs
    made = [[name, *_described(plan.entries[name], run)] for name in sorted(found) for run in found[name]]
    calls = [[name, kernel.spec, kernel.launches, kernel.layouts] for name, kernel in native_kernels(kernels)]
    return hashlib.sha256(json.dumps([made, calls], default=vars, sort_keys=True).encode()).hexdigest()


def _described(entry: Entry, run: Segment) -> list[object]:
    """A run for its digest: its calls, and of each tensor what memory it lies in and its type, shape and order."""
    calls = [[call.place, call.kernels, call.tensors, call.counted] for call in run.calls]
    buffers = ((entry.buffers[name], root_of(entry, name), layout) for name, layout in run.table)
    table = [[item.name, root, layout, item.kind, item.dtype, item.shape, item.order] for item, root, layout in buffers]
    return [run.function, calls, table]


def native_kernels(kernels: Mapping[str, Kernel]) -> Iterator[tuple[str, Kernel]]:
    """The kernels in C++, by name in order."""
    return ((name, kernel) for name, kernel in sorted(kernels.items()) if kernel.suffix == ".cpp")


def bucket_conditions(names: Mapping[str, str]) -> list[tuple[int, str]]:
    """The kernels of a call as (most rows, kernel), least first; neighbours that are one kernel are one."""
    if "" in names:
        return [(1 << 30, names[""])]
    ordered = sorted((BUCKETS[bucket][1], name) for bucket, name in names.items())
    return [item for item, following in zip(ordered, [*ordered[1:], (0, "")], strict=True) if item[1] != following[1]]
