"""How a compiled model multiplies with its quantized weights, in a line: what the manifest, `inspect` and reports say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from qcompile.ir.records import CoverageRow
from qcompile.target import parse_target

_EXACT, _FAST = "quantized_linear", ("integer_linear", "float8_linear")


def matmul_text(rows: Sequence[CoverageRow], target: str) -> str | None:
    """`exact (float32 activations)` or `fast (int8 activations per group of 32)`; None where no linear has a quantized weight.

    Of several kinds each comes with its count of linears, the most frequent first. Which is whose, coverage says.
    """
    kinds: Counter[str] = Counter()
    for row in rows:
        if row.operator == _EXACT:
            kinds[f"exact ({str(parse_target(target).compute).removeprefix('torch.')} activations)"] += 1
        elif row.operator in _FAST:
            kinds[f"fast ({_words(row.activation)})"] += 1
    if len(kinds) < 2:
        return next(iter(kinds), None)
    return ", ".join(f"{kind} in {count} of {kinds.total()} linears" for kind, count in kinds.most_common())


def _words(activation: str) -> str:
    """`int8 g32 sym dynamic` as `int8 activations per group of 32`."""
    element, shared, *_ = (*activation.split(), "", "")
    where = f"group of {shared[1:]}" if shared[:1] == "g" and shared[1:].isdecimal() else shared
    return f"{element} activations per {where}" if element else "quantized activations"
