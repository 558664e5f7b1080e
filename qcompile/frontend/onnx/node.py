"""One node as its rule sees it: inputs as tensors or numbers, attributes by type, and a record of what was looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qcompile.frontend.onnx.kinds import KINDS, kind_of
from qcompile.frontend.onnx.values import MOST_NUMBERS, Held, NeedsConstantError, Numbers, RefusalError, Value, known_numbers

RunBlock = Callable[[Any], Sequence[Value]]


@dataclass
class Node:
    """What a rule reads. An attribute or input that no rule looked at is refused: it could mean anything.

    Attributes:
        operator: its name.
        opset: version of the standard operators.
        inputs: values, None for one that is left out.
        names: their ONNX names.
        kinds: their element types where the file says them.
        attributes: as Python values.
        outputs: names of the results, empty for one that nobody wants.
        run_block: runs a branch that is in an attribute.
        made: element type of the result, where a rule sets it: torch has no 2- and 4-bit integers.
    """

    operator: str
    opset: int
    inputs: list[Value]
    names: Sequence[str]
    kinds: Sequence[int | None]
    attributes: dict[str, Any]
    outputs: Sequence[str]
    run_block: RunBlock
    read: set[str | int] = field(default_factory=set)
    made: int | None = None

    def has(self, index: int) -> bool:
        """Whether an optional input is given."""
        self.read.add(index)
        return index < len(self.inputs) and self.inputs[index] is not None

    def wants(self, index: int) -> bool:
        """Whether anybody reads a result."""
        return index < len(self.outputs) and bool(self.outputs[index])

    def value(self, index: int) -> Value:
        """An input as it is."""
        if not self.has(index):
            raise RefusalError(f"expected input {index}, got none")
        return self.inputs[index]

    def tensor(self, index: int) -> Tensor:
        """An input as a tensor."""
        value = self.value(index)
        if isinstance(value, Held):
            return value.tensor
        if isinstance(value, Numbers):
            return value.tensor()
        if not isinstance(value, Tensor):
            raise RefusalError(f"expected input {index} to be a tensor, got a sequence")
        return value

    def tensors(self) -> list[Tensor]:
        """All inputs as tensors."""
        return [self.tensor(index) for index in range(len(self.inputs))]

    def optional(self, index: int) -> Tensor | None:
        """An input as a tensor, or None if it is left out."""
        return self.tensor(index) if self.has(index) else None

    def numbers(self, index: int, what: str = "") -> Numbers:
        """An input whose elements must be known while tracing.

        Raises:
            NeedsConstantError: if they are computed at run time.
        """
        value = self.value(index)
        if isinstance(value, Numbers):
            return value
        if isinstance(value, Held) and value.weight.numel <= MOST_NUMBERS:
            return known_numbers(value.weight)
        raise NeedsConstantError(self.names[index], what or f"input {index}")

    def elements(self, index: int, what: str = "") -> list[Any]:
        """The elements of such an input."""
        return self.numbers(index, what).flat

    def number(self, index: int, what: str = "") -> Any:
        """The one element of such an input."""
        found = self.elements(index, what)
        if len(found) != 1:
            raise RefusalError(f"expected one number as {what or f'input {index}'}, got {len(found)}")
        return found[0]

    def kind(self, index: int) -> int:
        """ONNX's element type of an input."""
        value = self.value(index)
        if isinstance(value, Held):
            return value.weight.kind
        told = self.kinds[index]
        return told if told is not None else kind_of(value.dtype if isinstance(value, Numbers) else self.tensor(index).dtype)

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute as it is."""
        self.read.add(name)
        return self.attributes.get(name, default)

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        return int(self.attribute(name, default))

    def flag(self, name: str, default: bool = False) -> bool:
        """An integer attribute that means yes or no."""
        return bool(self.attribute(name, default))

    def real(self, name: str, default: float) -> float:
        """A float attribute: stored in float32, read as the shortest number that is the same there."""
        from qcompile.frontend.onnx.values import rounded

        return float(rounded(self.attribute(name, default), torch.float32))

    def text(self, name: str, default: str) -> str:
        """A text attribute."""
        return str(self.attribute(name, default))

    def integers(self, name: str) -> list[int] | None:
        """A list of integers, or None if there is none."""
        found = self.attribute(name)
        return None if found is None else [int(item) for item in found]

    def required(self, name: str) -> Any:
        """An attribute that must be there."""
        found = self.attribute(name)
        if found is None:
            raise RefusalError(f"expected the attribute {name}, got none")
        return found

    def axes(self, index: int = 1) -> list[int] | None:
        """Axes, which were an attribute and became an input, or None where they are left out."""
        found = self.integers("axes")
        if found is None and self.has(index):
            found = [int(item) for item in self.elements(index, "axes")]
        return found

    def ignore(self, *names: str) -> None:
        """Attributes that change nothing here."""
        self.read.update(names)

    def unread(self) -> list[str]:
        """What was given and not looked at."""
        inputs = [f"input {index}" for index, value in enumerate(self.inputs) if value is not None and index not in self.read]
        return [*(f"attribute {name}" for name in self.attributes if name not in self.read), *inputs]


def dtype_of(kind: int) -> torch.dtype:
    """The dtype that holds an element type.

    Raises:
        RefusalError: for texts, complex numbers and such.
    """
    from qcompile.frontend.onnx.kinds import kind_name

    if kind not in KINDS:
        raise RefusalError(f"expected numbers, got {kind_name(kind)}")
    return KINDS[kind]
