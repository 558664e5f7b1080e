"""Plans and kernels as JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qcompile.errors import ArtifactError
from qcompile.ir.codec import decode, encode
from qcompile.ir.lowered import Entry, Kernel, Plan, Step
from qcompile.ir.serialize import check_operator, dtype_of

BUFFER_KINDS = ("input", "constant", "state", "intermediate", "output")


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values."""
    result: dict[str, Any] = encode(plan)
    return result


def plan_from_json(data: Any) -> Plan:
    """The plan, with every operator on the allow-list and every buffer known.

    Raises:
        ArtifactError: naming the entry and step, what was expected and what came.
    """
    plan = decode(Plan, data, "plan.json")
    for name, entry in plan.entries.items():
        _check_entry(name, entry)
    return plan


def _check_entry(name: str, entry: Entry) -> None:
    where = f"plan.json: {name}"
    for buffer in entry.buffers.values():
        dtype_of(buffer.dtype, f"{where}: {buffer.name}")
        if buffer.kind not in BUFFER_KINDS:
            raise ArtifactError(f"{where}: {buffer.name}: expected a buffer of kind {', '.join(BUFFER_KINDS)}, got {buffer.kind!r}; compile again")
        if buffer.kind == "intermediate" and entry.limits and not buffer.alias and not 0 <= buffer.offset <= entry.arena_bytes:
            raise ArtifactError(f"{where}: {buffer.name}: expected an offset inside the arena of {entry.arena_bytes} bytes, got {buffer.offset}; compile again")
    known = set(entry.buffers)
    _check_known({*entry.inputs, *entry.outputs, *(item.alias for item in entry.buffers.values() if item.alias)}, known, where)
    for step in entry.steps:
        _check_step(step, known, f"{where}: step {step.node or step.operator}")


def _check_step(step: Step, known: set[str], where: str) -> None:
    check_operator(step.operator, where)
    _check_known({*step.outputs, *buffers_of(step.args), *buffers_of(step.kwargs)}, known, where)


def _check_known(names: set[str], known: set[str], where: str) -> None:
    unknown = sorted(names - known)
    if unknown:
        raise ArtifactError(f"{where}: expected buffers of the entry, got {unknown[0]!r}; compile again")


def buffers_of(value: Any) -> set[str]:
    """The buffers that an argument refers to."""
    if isinstance(value, Mapping):
        if "buffer" in value:
            return {value["buffer"]} if isinstance(value["buffer"], str) else {str(value["buffer"])}
        return set().union(*(buffers_of(item) for item in value.values())) if value else set()
    if isinstance(value, list | tuple):
        return set().union(*(buffers_of(item) for item in value)) if value else set()
    return set()


def kernels_to_json(kernels: Mapping[str, Kernel]) -> dict[str, Any]:
    """Everything of the kernels but their sources, which are files of their own."""
    return {name: encode(replace(kernel, source="")) for name, kernel in sorted(kernels.items())}


def kernels_from_json(data: Any, sources: Mapping[str, str]) -> dict[str, Kernel]:
    """Kernels with their sources put back.

    Raises:
        ArtifactError: for a malformed entry, naming it.
    """
    decoded: dict[str, Kernel] = decode(dict[str, Kernel], data, "kernels/kernels.json")
    return {name: replace(kernel, source=sources.get(name, "")) for name, kernel in decoded.items()}
