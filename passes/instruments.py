"""What watches passes from inside the pipeline: the numeric check."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from qcompile.errors import NumericError
from qcompile.ir.graph import Graph
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.effects import Effect, divergence_per_token, lost_numbers, relative_error, sqnr
from qcompile.passes.example_run import CONSTANT_BYTES, ExampleRun, real_tokens
from qcompile.passes.locate import Place, locate, worst_rounding
from qcompile.passes.reproducer import keep

EXACT_TOLERANCE = 1e-9
"""Of the largest magnitude, in float64: only rounding may differ."""
_LANGUAGE_MODELS = ("causal_lm", "cached_lm")


@dataclass
class NumericCheck:
    """Runs the graph before and after a pass on the graph's example inputs and compares the outputs.

    Exact passes are compared in float64, so that nothing but their own arithmetic can differ; others in the graph's own dtype: what they
    cost is recorded, and they may neither lose numbers (NaN, infinity) nor round a weight so that zero would have been closer to it.

    Attributes:
        tolerance: for exact passes, of the largest output.
        reproducers: directory for a file that repeats what went wrong; None keeps none.
        limit: bytes of constants in memory, beside those of one operator (`qcompile.passes.example_run`).
        locating: whether to look for the first value that is wrong, which runs both graphs once more.
    """

    tolerance: float = EXACT_TOLERANCE
    reproducers: Path | None = None
    limit: int = CONSTANT_BYTES
    locating: bool = True
    _runner: ExampleRun = field(init=False, repr=False)
    _last: dict[tuple[str, bool], list[Tensor]] = field(default_factory=dict, init=False, repr=False)
    _first: list[Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Make what runs graphs."""
        self._runner = ExampleRun(self.limit)

    def measure(self, before: Graph, after: Graph, step: Pass, ctx: PassContext) -> Effect:
        """What the pass changed at the outputs. Of a language model these are the logits of tokens that are no padding.

        Raises:
            NumericError: if an exact pass exceeds the tolerance, any pass loses numbers, or a lossy one a weight; it names the first
                value that is wrong, and the reproducer.
        """
        exact = step.is_exact(ctx)
        expected = self._outputs(before, wide=exact)
        if self._first is None:
            self._first = expected
        got = self._outputs(after, wide=exact)
        error = relative_error(got, expected)
        if exact and not error <= self.tolerance:
            wanted = f"the same function within {self.tolerance:g} (float64, relative to the largest output)"
            place = self._place(before, after, self.tolerance, wide=True)
            self._refuse(wanted, f"{error:.3g}", place, before, step, ctx)
        if not exact:
            self._require_numbers(got, expected, (before, after), step, ctx)
        return self._effect(error, got, expected, after, exact=exact)

    def _require_numbers(
        self, got: list[Tensor], expected: list[Tensor], graphs: tuple[Graph, Graph], step: Pass, ctx: PassContext
    ) -> None:
        """What holds for lossy passes too."""
        before, after = graphs
        if lost_numbers(got, expected):
            place = self._place(before, after, sys.float_info.max, wide=False)
            self._refuse("numbers where there were numbers", "NaN or infinity", place, before, step, ctx)
        worst = worst_rounding(before, after, self._runner)
        if worst is not None and worst.error > 1:
            found = f"an SQNR of {-10 * math.log10(worst.error):.1f} dB"
            self._refuse("weights nearer to what they were than zero is", found, worst, before, step, ctx)

    def _place(self, before: Graph, after: Graph, tolerance: float, *, wide: bool) -> Place | None:
        return locate(before, after, self._runner, tolerance=tolerance, wide=wide) if self.locating else None

    def _effect(self, error: float, got: list[Tensor], expected: list[Tensor], after: Graph, *, exact: bool) -> Effect:
        assert self._first is not None
        text = after.interface.kind in _LANGUAGE_MODELS
        if text:
            got, expected = got[:1], expected[:1]  # the others are a cache
        first = self._first[: len(got)]
        real = real_tokens(after.interface.examples)
        alike = text and got[0].shape == first[0].shape == expected[0].shape
        return Effect(
            error,
            None if exact else sqnr(got, expected),
            None if exact or not alike else divergence_per_token(got[0], expected[0], real),
            sqnr(got, first),
            divergence_per_token(got[0], first[0], real) if alike else None,
        )

    def keep(self, before: Graph, step: Pass, ctx: PassContext, error: str) -> str:
        """Write a reproducer if there is a directory for one, and say in a message how to use it; "" else."""
        return _repeat(self._written(before, step, ctx, error))

    def _written(self, before: Graph, step: Pass, ctx: PassContext, error: str) -> Path | None:
        return None if self.reproducers is None else keep(self.reproducers, before, step, ctx, self.tolerance, error)

    def _refuse(self, wanted: str, found: str, place: Place | None, before: Graph, step: Pass, ctx: PassContext) -> NoReturn:
        message = f"{step.name}: expected {wanted}, got {found}{'' if place is None else f'; {place}'}"
        path = self._written(before, step, ctx, message)
        remedy = f"; the pass is wrong on this graph, disable it with --disable-pass {step.name}"
        raise NumericError(f"{message}{_repeat(path)}{remedy}", place, "" if path is None else str(path))

    def _outputs(self, graph: Graph, *, wide: bool) -> list[Tensor]:
        """What a pass leaves is what the next one starts from: the outputs of the two graphs that were asked for last are kept."""
        key = (graph.fingerprint(), wide)
        found = self._last.pop(key, None)
        while len(self._last) >= 2:
            del self._last[next(iter(self._last))]
        self._last[key] = self._runner.run(graph, wide=wide) if found is None else found
        return self._last[key]


def outputs(graph: Graph, *, wide: bool) -> list[Tensor]:
    """The outputs on the example inputs, computed in float64 if `wide`; logits of padding tokens are zero."""
    return ExampleRun().run(graph, wide=wide)


def _repeat(path: Path | None) -> str:
    return "" if path is None else f"; repeat it with `qcompile replay {path}` ({path.stat().st_size / 1e6:.3g} MB)"
