"""Two compilations side by side: what differs, and what of it is a regression."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qcompile.dump.facts import Facts
from qcompile.dump.tables import format_bytes
from qcompile.errors import SourceError
from qcompile.ir.records import CoverageRow
from qcompile.passes.instruments import EXACT_TOLERANCE

Change = tuple[Any, Any]
"""Before and after."""

_PASS_KEYS = ("spec", "changed", "nodes_after", "bytes", "max_error", "sqnr_db", "kl")
_HEADING = ("model", "target", "pipeline")
_CONTEXT_LINES = 1


@dataclass(frozen=True)
class Limits:
    """From when on a difference is a regression; `inf` never.

    Attributes:
        size: growth of any size in bytes, or of the bits of a weight, as a share of what it was.
        error: growth of the error of a pass or of the KL of the result, as a share of what it was.
        speed: loss of tokens per second as a share of what they were.
        kl: the KL of the result, whatever it was before.
        left_alone: operators that are newly left alone and not by choice.
    """

    size: float = 0.02
    error: float = 0.1
    speed: float = 0.1
    kl: float = math.inf
    left_alone: float = 0


@dataclass(frozen=True)
class Comparison:
    """What differs between two compilations; everything equal is left out.

    Attributes:
        heading: model, target and pipeline -> before and after.
        passes: one row per pass of either that differs: its name, `only` ("before", "after" or ""), and key -> before and after.
        formats: (operator, format and kernel before, and after, why it is left alone now) -> operators it holds for.
        sizes: name -> before and after.
        figures: what was measured of the results: name -> before and after.
        cache: layer -> key -> before and after.
        kernels: one row per kernel that differs: what it implements, `only`, launches before and after, and a diff of the source.
        regressions: one line for each limit that was passed.
    """

    heading: Mapping[str, Change]
    passes: Sequence[dict[str, Any]]
    formats: Sequence[dict[str, Any]]
    sizes: Mapping[str, Change]
    figures: Mapping[str, Change]
    cache: Mapping[str, Mapping[str, Change]]
    kernels: Sequence[dict[str, Any]]
    regressions: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "heading": _json(self.heading),
            "passes": [{**row, "changes": _json(row["changes"])} for row in self.passes],
            "formats": list(self.formats),
            "sizes": _json(self.sizes),
            "figures": _json(self.figures),
            "cache": {layer: _json(changes) for layer, changes in self.cache.items()},
            "kernels": list(self.kernels),
            "regressions": list(self.regressions),
        }

    @property
    def is_empty(self) -> bool:
        """Whether nothing differs."""
        return not any((self.heading, self.passes, self.formats, self.sizes, self.figures, self.cache, self.kernels))


def compare(before: Facts, after: Facts, limits: Limits | None = None) -> Comparison:
    """What differs between two compilations.

    Raises:
        SourceError: if one of them is a dump that was interrupted.
    """
    for facts in (before, after):
        if facts.interruption:
            raise SourceError(f"{facts.path}: diff: expected a complete dump, got one that was interrupted {facts.interruption}")
    passes = _passes(before.passes, after.passes)
    sizes, figures = _changes(before.sizes, after.sizes, exclude=("target",)), _changes(before.figures, after.figures)
    return Comparison(
        _changes(*({key: getattr(facts, key) for key in _HEADING} for facts in (before, after))), passes,
        _formats(before.coverage, after.coverage), sizes, figures, _cache(before, after), _kernels(before, after),
        _regressions(before, after, limits or Limits()),
    )  # fmt: skip


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], exclude: Iterable[str] = ()) -> dict[str, Change]:
    """Keys with different values; None where one side has none."""
    keys = [key for key in dict.fromkeys((*before, *after)) if key not in exclude]
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def _json(changes: Mapping[str, Change]) -> dict[str, dict[str, Any]]:
    return {key: {"before": old, "after": new} for key, (old, new) in changes.items()}


def pair_passes(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]
) -> list[tuple[dict[str, Any] | None, dict[str, Any] | None]]:
    """Passes of two pipelines that stand for each other, in order, by name; None beside one that the other does not have."""
    matcher = difflib.SequenceMatcher(None, [row["name"] for row in before], [row["name"] for row in after], autojunk=False)
    pairs: list[tuple[dict[str, Any] | None, dict[str, Any] | None]] = []
    for kind, start, stop, first, last in matcher.get_opcodes():
        if kind == "equal":
            pairs += zip(before[start:stop], after[first:last], strict=True)
        else:
            pairs += [(row, None) for row in before[start:stop]] + [(None, row) for row in after[first:last]]
    return pairs


def _passes(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    carried: dict[str, float] = {}
    for old, new in pair_passes(before, after):
        picked = [{key: row.get(key) for key in _PASS_KEYS} if row is not None else {} for row in (old, new)]
        changes = _own(_changes(*picked), carried) if old is not None and new is not None else _changes(*picked)
        if changes:
            only = "before" if new is None else "after" if old is None else ""
            rows.append({"name": str((old or new or {})["name"]), "only": only, "changes": changes})
    return rows


def _own(changes: dict[str, Change], carried: dict[str, float]) -> dict[str, Change]:
    """Without counts that differ by what they differed by after the pass before; `carried` is brought up to this one."""
    own = dict(changes)
    for key in ("nodes_after", "bytes"):
        old, new = changes.get(key, (0, 0))
        if new - old == carried.get(key, 0):
            own.pop(key, None)
        carried[key] = new - old
    return own


def _formats(before: Sequence[CoverageRow], after: Sequence[CoverageRow]) -> list[dict[str, Any]]:
    """Operators that are treated differently, alike ones on one line; matched by weight, or by node where there is none."""
    old, new = _by_operator(before), _by_operator(after)
    groups: dict[tuple[str, str, str], list[str]] = {}
    for key in dict.fromkeys((*old, *new)):
        how = [_treatment(side.get(key)) for side in (old, new)]
        if how[0] != how[1]:
            row = new.get(key) or old[key]
            groups.setdefault((row.operator, *how), []).append(row.weight or row.node)  # type: ignore[arg-type]
    return [
        {"operator": operator, "before": was, "after": now, "count": len(names), "names": names}
        for (operator, was, now), names in groups.items()
    ]


def _by_operator(rows: Sequence[CoverageRow]) -> dict[tuple[str, str, int], CoverageRow]:
    """Rows by what they cover: the weight and which of its readers, or the kind of operator and which of these."""
    seen: Counter[tuple[str, str]] = Counter()
    found = {}
    for row in rows:
        key = (row.weight, "" if row.weight else row.operator)
        found[*key, seen[key]] = row
        seen[key] += 1
    return found


def _treatment(row: CoverageRow | None) -> str:
    """Format and kind of kernel, or why not: `int4 g64 sym fp16 x int8 by quantized_linear`."""
    if row is None:
        return "absent"
    form = f"{row.format} x {row.activation}" if row.activation else row.format
    return f"{form} by {row.operator}" + (f" ({row.reason})" if row.reason else "")


def _cache(before: Facts, after: Facts) -> dict[str, dict[str, Change]]:
    old, new = ({str(layer.layer): layer.to_dict() for layer in facts.cache} for facts in (before, after))
    found = {layer: _changes(old.get(layer, {}), new.get(layer, {})) for layer in dict.fromkeys((*old, *new))}
    return {layer: changes for layer, changes in found.items() if changes}


def _kernels(before: Facts, after: Facts) -> list[dict[str, Any]]:
    """Kernels with a source that differ, matched by what they implement: names end in a hash of that."""
    old, new = ({row["spec"]: row for row in facts.kernels if row["file"]} for facts in (before, after))
    rows = []
    for spec in dict.fromkeys((*old, *new)):
        was, now = old.get(spec), new.get(spec)
        sources = [facts.sources.get(row["name"], "") if row else "" for facts, row in ((before, was), (after, now))]
        launches = [row["launches"] if row else [] for row in (was, now)]
        if was is None or now is None or sources[0] != sources[1] or launches[0] != launches[1]:
            only = "before" if now is None else "after" if was is None else ""
            diff = "" if only else source_diff(sources[0], sources[1])
            rows.append({"spec": spec, "only": only, "before": launches[0], "after": launches[1], "diff": diff})
    return rows


def source_diff(before: str, after: str) -> str:
    """A unified diff of two sources."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), "before", "after", lineterm="", n=_CONTEXT_LINES)
    return "\n".join(lines)


def _regressions(before: Facts, after: Facts, limits: Limits) -> list[str]:
    return [
        *_growth(before.sizes, after.sizes, limits.size),
        *_errors(before, after, limits.error),
        *_accuracy(before, after, limits),
        *_slower(before.figures, after.figures, limits.speed),
        *_unserved(before.coverage, after.coverage, limits.left_alone),
    ]


def _growth(before: Mapping[str, Any], after: Mapping[str, Any], limit: float) -> Iterable[str]:
    for key in before:
        old, new = before[key], after.get(key)
        if key == "binary_bytes" and not old:
            continue  # made for an engine without native code: another engine is no growth
        if isinstance(old, int | float) and isinstance(new, int | float) and exceeds(old, new, limit):
            shown = [format_bytes(int(value)) if "bytes" in key else f"{value:.4g}" for value in (old, new)]
            yield f"{key.replace('_', ' ')}: {shown[0]} -> {shown[1]} ({_percent(old, new)}), allowed {100 * limit:+.3g} %"


def _errors(before: Facts, after: Facts, limit: float) -> Iterable[str]:
    """Errors that grew; what is within the tolerance of exact passes is arithmetic and no error."""
    for old, new in pair_passes(before.passes, after.passes):
        for key, measure in _MEASURES.items():
            was, now = (None if row is None else row.get(key) for row in (old, new))
            if new is not None and was is not None and now is not None:
                first, last = (max(measure(value), EXACT_TOLERANCE) for value in (was, now))
                if exceeds(first, last, limit):
                    yield f"{new['name']}: {key} {was:.4g} -> {now:.4g} (error {_percent(first, last)}), allowed {100 * limit:+.3g} %"


_MEASURES: dict[str, Callable[[float], float]] = {"max_error": float, "kl": float, "sqnr_db": lambda decibel: 10 ** (-decibel / 20)}
"""What a check records of a pass -> the error that it stands for."""


def _accuracy(before: Facts, after: Facts, limits: Limits) -> Iterable[str]:
    new = after.figures.get("kl", after.figures.get("checked_kl"))
    if new is None and math.isfinite(limits.kl):
        raise SourceError(
            f"{after.path}: --max-kl: expected the KL of the result, got none; compile with --check, or write what "
            "`qcompile eval --json` prints to eval.json in it"
        )
    if new is not None and new > limits.kl:
        yield f"kl: {new:.4g}, allowed {limits.kl:.4g}"
    for key in ("kl", "checked_kl"):
        was, now = before.figures.get(key), after.figures.get(key)
        if was is not None and now is not None and exceeds(max(was, EXACT_TOLERANCE), max(now, EXACT_TOLERANCE), limits.error):
            yield f"{key.replace('_', ' ')}: {was:.4g} -> {now:.4g} ({_percent(was, now)}), allowed {100 * limits.error:+.3g} %"


def _slower(before: Mapping[str, float], after: Mapping[str, float], limit: float) -> Iterable[str]:
    for key in before:
        if key.endswith("_per_second") and key in after and after[key] < before[key] * (1 - limit):
            change = _percent(before[key], after[key])
            yield f"{key.replace('_', ' ')}: {before[key]:.4g} -> {after[key]:.4g} ({change}), allowed {-100 * limit:+.3g} %"


def _unserved(before: Sequence[CoverageRow], after: Sequence[CoverageRow], limit: float) -> Iterable[str]:
    old = _by_operator(before)
    left = [row for key, row in _by_operator(after).items() if row.reason and not row.chosen and not (key in old and old[key].reason)]
    if len(left) > limit:
        first = left[0]
        yield f"newly left alone: {len(left)}, such as {first.weight or first.node}: {first.reason}; allowed {limit:g}"


def exceeds(before: float, after: float, limit: float) -> bool:
    """Whether a quantity grew by more than a share of what it was; growth from 0 is beyond any share."""
    return after > before * (1 + limit) if math.isfinite(limit) else False


def _percent(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %" if before else "from nothing"
