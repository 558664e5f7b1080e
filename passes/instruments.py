"""What watches passes from inside the pipeline: the numeric check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qcompile.errors import PassError
from qcompile.ir.graph import Graph
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.convert_dtype import convert

EXACT_TOLERANCE = 1e-9
"""Of the largest magnitude, in float64: only rounding may differ."""


@dataclass(frozen=True)
class NumericCheck:
    """Runs the graph before and after a pass on the graph's example inputs and compares the outputs.

    Exact passes are compared in float64, so that nothing but their own arithmetic can differ; others in the graph's own dtype.
    """

    tolerance: float = EXACT_TOLERANCE
    _last: dict[tuple[str, bool], list[Tensor]] = field(default_factory=dict, repr=False)
    _constants: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def measure(self, before: Graph, after: Graph, step: Pass, ctx: PassContext) -> float:
        """The relative error max|a-b| / max|b|.

        Raises:
            PassError: if an exact pass exceeds the tolerance or produces NaN where there was none.
        """
        exact = step.is_exact(ctx)
        error = relative_error(self._outputs(after, wide=exact), self._outputs(before, wide=exact))
        if exact and not error <= self.tolerance:
            raise PassError(
                f"{step.name}: expected the same function within {self.tolerance:g} (float64, relative to the largest output), "
                f"got {error:.3g}; the pass is wrong on this graph, disable it with --disable-pass {step.name}"
            )
        return error

    def _outputs(self, graph: Graph, *, wide: bool) -> list[Tensor]:
        """What a pass leaves is what the next one starts from: the last two graphs' outputs are kept."""
        key = (graph.fingerprint(), wide)
        if key not in self._last:
            while len(self._last) >= 2:
                del self._last[next(iter(self._last))]
            self._last[key] = outputs(graph, wide=wide, memo=self._constants)
        return self._last[key]


def outputs(graph: Graph, *, wide: bool, memo: dict[str, Tensor] | None = None) -> list[Tensor]:
    """The outputs on the example inputs, computed in float64 if `wide`.

    `memo` (key of a constant -> its tensor) carries what one call has read to the next and forgets what that does not need.
    """
    program = graph.clone() if wide else graph
    if wide:
        convert(program, torch.float64, values=False)
    known = {} if memo is None else memo
    constants = {name: known[constant.key] for name, constant in program.constants.items() if constant.key in known}
    result = program.run([program.interface.examples[node.name] for node in program.placeholders], constants)
    real = real_tokens(program.interface.examples)
    if real is not None:
        result[0] = result[0] * real.unsqueeze(-1)  # logits of padding mean nothing, with a cache or without
    known.clear()
    known.update({program.constants[name].key: tensor for name, tensor in constants.items()})
    return result


def real_tokens(examples: dict[str, Tensor]) -> Tensor | None:
    """Which example tokens [B, S] of a language model are no padding; None for other models."""
    if "positions" in examples and "page_table" in examples:
        return examples["positions"] >= 0
    return examples["attention_mask"] != 0 if "position_ids" in examples else None


def relative_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """max|a-b| / max|b| over the outputs that both have (a cache adds outputs behind the logits); NaN counts as infinite."""
    worst = 0.0
    for a, b in zip(got, expected, strict=False):
        if a.shape != b.shape:
            return float("inf")
        difference = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
        scale = b.double().abs().max().item() if b.numel() else 1.0
        error = difference / scale if scale else difference
        worst = max(worst, error if error == error else float("inf"))
    return worst
