"""What stands in for weights and data where a compilation is only planned: the same nodes, shapes and formats, without values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from qcompile.ir.constants import Constant, UnboundSource
from qcompile.quant.format import QuantFormat


@dataclass(frozen=True)
class OpenChoice:
    """Something that only weights or data decide.

    Attributes:
        step: the pass that asks.
        what: is decided.
        assumed: for now.
        changes_structure: whether nodes, shapes or formats differ with the answer: such a choice has two outlines, timid and bold.
    """

    step: str
    what: str
    assumed: str
    changes_structure: bool


@dataclass
class Outline:
    """Makes a pipeline run without values (`PassContext.outline`): passes insert what they would and leave constants unbound.

    Attributes:
        bold: how open choices are made: for the change that a pass may make, or against it.
        asked: names of the passes that had a choice when it went against a change; None where nothing was outlined before.
        valueless: names of the passes that would have read weights or data.
        choices: what was left open, each once.
    """

    bold: bool = False
    asked: frozenset[str] | None = None
    valueless: list[str] = field(default_factory=list)
    choices: list[OpenChoice] = field(default_factory=list)

    @property
    def is_open(self) -> bool:
        """Whether another answer would give another structure."""
        return any(choice.changes_structure for choice in self.choices)

    def bolder(self) -> Outline:
        """The outline that makes the same choices for a change."""
        return Outline(bold=True, asked=frozenset(choice.step for choice in self.choices if choice.changes_structure))

    def choose(self, step: str, what: str, against: str, for_it: str) -> bool:
        """Decide, in the name of a pass, what is open; `against` and `for_it` say in words what each answer assumes."""
        self._note(OpenChoice(step, what, for_it if self.bold else against, changes_structure=True))
        return self.bold

    def assume(self, step: str, what: str, assumed: str) -> None:
        """Note, in the name of a pass, what was assumed where either answer gives the same sizes, or nearly."""
        self._note(OpenChoice(step, what, assumed, changes_structure=False))

    def _note(self, choice: OpenChoice) -> None:
        if choice not in self.choices:
            self.choices.append(choice)


def unknown(name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32, form: QuantFormat | None = None) -> Constant:
    """A constant whose value only a compilation knows; `form` where it is a part of a quantized weight."""
    return Constant(UnboundSource(name, tuple(int(size) for size in shape), dtype), format=form)
