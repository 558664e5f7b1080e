"""Plans and kernels as JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qcompile.errors import ArtifactError
from qcompile.ir.codec import decode, encode
from qcompile.ir.constants import Constant
from qcompile.ir.lowered import Buffer, Entry, Kernel, Plan, Step
from qcompile.ir.memory import dtype_of, size_names, undecided_sizes
from qcompile.ir.serialize import check_operator
from qcompile.ir.size import OPERATORS

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
    undecided = undecided_sizes(entry) if entry.limits else set()
    for buffer in entry.buffers.values():
        dtype_of(buffer.dtype, f"{where}: {buffer.name}")
        if buffer.kind not in BUFFER_KINDS:
            raise ArtifactError(
                f"{where}: {buffer.name}: expected a buffer of kind {', '.join(BUFFER_KINDS)}, got {buffer.kind!r}; compile again"
            )
        planned = buffer.kind == "intermediate" and entry.limits and not buffer.alias and not undecided & size_names(buffer)
        if planned and not 0 <= buffer.offset <= entry.arena_bytes:
            raise ArtifactError(
                f"{where}: {buffer.name}: expected an offset inside the arena of {entry.arena_bytes} bytes, got "
                f"{buffer.offset}; compile again"
            )
    known = set(entry.buffers)
    _check_known({*entry.inputs, *entry.outputs, *(item.alias for item in entry.buffers.values() if item.alias)}, known, where)
    _check_names(entry, where)
    for step in entry.steps:
        _check_step(step, known, f"{where}: step {step.node or step.operator}")


def _check_names(entry: Entry, where: str) -> None:
    """Every buffer under its own name, every intermediate written by a step, no view of itself through others."""
    written = {name for step in entry.steps for name in step.outputs}
    for name, buffer in entry.buffers.items():
        if buffer.name != name:
            raise ArtifactError(f"{where}: {name}: expected a buffer of that name, got {buffer.name!r}; compile again")
        if buffer.kind == "intermediate" and name not in written:
            raise ArtifactError(f"{where}: {name}: expected a step that writes it, got none; compile again")
        seen = {name}
        while entry.buffers[name].alias:
            name = entry.buffers[name].alias
            if name in seen:
                raise ArtifactError(f"{where}: {buffer.name}: expected a view of other memory, got one of itself; compile again")
            seen.add(name)


def _check_step(step: Step, known: set[str], where: str) -> None:
    check_operator(step.operator, where)
    for value in (*step.args, *step.kwargs.values()):
        _check_argument(value, where)
    _check_known({*step.outputs, *buffers_of(step.args), *buffers_of(step.kwargs)}, known, where)


def _check_argument(value: Any, where: str) -> None:
    if isinstance(value, list | tuple):
        for item in value:
            _check_argument(item, where)
    if not isinstance(value, Mapping):
        return
    kind, content = next(iter(value.items()), (None, None))
    valid = {
        "buffer": isinstance(content, str),
        "size": _is_size(content),
        "dtype": isinstance(content, str),
        "float": content in ("inf", "-inf", "nan"),
    }
    if len(value) != 1 or not valid.get(str(kind), False):
        raise ArtifactError(f"{where}: expected an argument of {', '.join(valid)}, got {str(value)[:60]!r}; compile again")
    if kind == "dtype":
        dtype_of(content, where)


def _is_size(value: Any) -> bool:
    if isinstance(value, tuple):
        return len(value) == 3 and isinstance(value[0], str) and value[0] in OPERATORS and all(map(_is_size, value[1:]))
    return isinstance(value, int | str)


def check_constants(plan: Plan, constants: Mapping[str, Constant]) -> None:
    """Refuse a plan that means other constants than there are: native code trusts the shapes it gives.

    Raises:
        ArtifactError: naming the entry and the constant.
    """
    for name, entry in plan.entries.items():
        for buffer in entry.buffers.values():
            if buffer.kind == "constant":
                _check_constant(buffer, constants.get(buffer.name), f"plan.json: {name}: {buffer.name}")


def _check_constant(buffer: Buffer, constant: Constant | None, where: str) -> None:
    if constant is None:
        raise ArtifactError(f"{where}: expected a constant of weights.safetensors, got none of that name; compile again")
    if buffer.shape != constant.shape or dtype_of(buffer.dtype, where) != constant.dtype:
        raise ArtifactError(
            f"{where}: expected {buffer.dtype} {list(buffer.shape)}, got {constant.dtype} {list(constant.shape)} in weights.safetensors; "
            "compile again"
        )


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
