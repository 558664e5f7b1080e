"""What a pass is, and what it is given."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import fx

from qcompile.errors import PipelineError, SourceError
from qcompile.ir.graph import Graph
from qcompile.ir.lowered import Backend
from qcompile.ir.records import CoverageRow
from qcompile.target import Target

if TYPE_CHECKING:  # these run graphs, which takes passes
    from qcompile.passes.calibration import Calibration
    from qcompile.passes.outline import Outline
    from qcompile.passes.statistics import Measured, Request, Statistics
    from qcompile.passes.stream import Visit
    from qcompile.passes.work import WorkStore


@dataclass
class PassContext:
    """What a compilation is for; passed explicitly to every pass.

    Attributes:
        target: architecture and scheme.
        backend: what operators are lowered for, None where nothing is lowered.
        max_batch: rows that plans and caches are sized for.
        max_context: tokens per row that the cache holds.
        prefill_chunk: tokens of a prompt that are processed at once.
        fuel: how many rewrites may still be done; None is no limit. For finding the first wrong rewrite by bisection.
        notes: what passes left alone, as (pass, node, reason, whether the scheme or the user chose so).
        coverage: format and kernel of every linear, embedding and attention.
        products: results of lowering: `plan` and `kernels`.
        calibration: data to run the model on, None where there is none.
        work: where finished results are kept so that interrupted work continues; None keeps them in memory only.
        measured: the statistics taken so far.
        report: called with (what is being done, done, total) during long work.
        outline: what a compilation without weights and data is planned with; None compiles.
    """

    target: Target
    backend: Backend | None = None
    max_batch: int = 1
    max_context: int = 2048
    prefill_chunk: int = 512
    fuel: int | None = None
    notes: list[tuple[str, str, str, bool]] = field(default_factory=list)
    coverage: list[CoverageRow] = field(default_factory=list)
    products: dict[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None
    work: WorkStore | None = None
    measured: Statistics | None = None
    report: Callable[[str, int, int], None] | None = None
    outline: Outline | None = None

    def outlines(self, step: str) -> bool:
        """Whether the pass called `step` is to go without the weights and data that it would read; the outline notes that it asked."""
        if self.outline is not None and step not in self.outline.valueless:
            self.outline.valueless.append(step)
        return self.outline is not None

    def statistics(self, graph: Graph, requests: Iterable[Request], *, tokens: int | None = None) -> Measured:
        """Statistics of values of `graph` over the calibration data; what is known already is not measured again.

        Args:
            graph: the graph as it stands.
            requests: what to measure.
            tokens: how many of the data's tokens will do; None is all.

        Raises:
            SourceError: without calibration data.
        """
        calibration = self.require_calibration("statistics")
        if tokens is not None:
            calibration = calibration.first(tokens)
        return self.taken.measure(graph, calibration, requests, progress=self.progress("measuring activations"))

    def stream(
        self, graph: Graph, visit: Visit, nodes: Iterable[fx.Node], label: str, *, reference: Graph | None = None, narrow: bool = True
    ) -> None:
        """Visit `nodes` with their inputs over the calibration data (`qcompile.passes.stream`), reporting progress as `label`.

        `narrow` lets large linears multiply in bfloat16 where the CPU does that faster.

        Raises:
            SourceError: without calibration data.
        """
        from qcompile.passes.stream import stream

        stream(graph, self.require_calibration(label), visit, nodes, reference=reference, progress=self.progress(label), narrow=narrow)

    def finished(self, graph: Graph, options: str) -> WorkStore | None:
        """Where results for this graph as it stands are kept under the calibration data and `options`; None keeps nothing.

        `options` is everything else that the results depend on, such as the spec of the pass and a format.
        """
        from qcompile.passes.work import content_key

        if self.work is None:
            return None
        return self.work.part(f"{options} {content_key(graph)} {self.calibration.key if self.calibration is not None else ''}")

    @property
    def taken(self) -> Statistics:
        """The statistics taken so far; `apply_basis_change` carries them along with `taken.rebase`."""
        if self.measured is None:
            from qcompile.passes.statistics import Statistics

            self.measured = Statistics(self.work)
        return self.measured

    def require_calibration(self, what: str) -> Calibration:
        """The calibration data.

        Raises:
            SourceError: if there is none; `what` needs it.
        """
        if self.calibration is None:
            raise SourceError(f"{what}: expected calibration data, got none; pass calibration=, or recipe='nearest', which needs none")
        return self.calibration

    def progress(self, label: str) -> Callable[[int, int], None] | None:
        """A function of (done, total) that reports the progress of what `label` calls, or None if nobody listens."""
        report = self.report
        return None if report is None else lambda done, total: report(label, done, total)

    def spend(self) -> bool:
        """Take fuel for one rewrite; False once there is none left."""
        if self.fuel is None:
            return True
        self.fuel -= 1
        return self.fuel >= 0

    def note(self, where: str, node: str, reason: str, *, chosen: bool = False) -> None:
        """Record that a pass left a node alone, and why; `chosen` if the scheme or the user wanted it so."""
        self.notes.append((where, node, reason, chosen))


@dataclass(frozen=True)
class Pass:
    """A rewrite. Subclasses are frozen dataclasses whose fields are the options, with defaults.

    `name` is what pipelines and dumps call it; `exact` says that the function of the graph is preserved up to rounding.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = True

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Rewrite `graph` in place; true iff it changed anything (the manager checks the claim)."""
        raise NotImplementedError

    def is_exact(self, ctx: PassContext) -> bool:
        """Whether this pass preserves the function for this compilation; `exact` unless a format decides."""
        del ctx
        return self.exact

    @property
    def spec(self) -> str:
        """`name` or `name{option=value,...}` with the options that differ from their defaults; `parse_spec` reads it back."""
        options = [
            f"{item.name}={_option_text(getattr(self, item.name))}"
            for item in dataclasses.fields(self)
            if getattr(self, item.name) != item.default
        ]
        return f"{self.name}{{{','.join(options)}}}" if options else self.name

    @classmethod
    def from_options(cls, options: dict[str, str]) -> Self:
        """Make the pass from option texts.

        Raises:
            PipelineError: for an unknown option or a value of the wrong type.
        """
        known = {item.name: item for item in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for key, text in options.items():
            if key not in known:
                raise PipelineError(f"pass {cls.name}: unknown option {key!r}; expected one of {', '.join(known) or 'none'}")
            values[key] = _option_value(text, known[key].default, f"pass {cls.name}: option {key}")
        return cls(**values)


def _option_text(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _option_value(text: str, default: Any, where: str) -> Any:
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise PipelineError(f"{where}: expected true or false, got {text!r}")
        return text == "true"
    if isinstance(default, tuple):
        return tuple(part for part in text.split("+") if part)
    try:
        return type(default)(text)
    except ValueError:
        raise PipelineError(f"{where}: expected {type(default).__name__}, got {text!r}") from None


def parse_pipeline(text: str, registry: dict[str, type[Pass]]) -> list[Pass]:
    """Read `name,name{option=value,...}` into passes; the inverse of joining their `spec` with commas.

    Raises:
        PipelineError: for text that does not parse, an unknown pass (listing the known ones) or option.
    """
    passes: list[Pass] = []
    rest = text.strip()
    while rest:
        match = re.match(r"(?P<name>[a-z][a-z0-9-]*)(?:\{(?P<options>[^}]*)\})?\s*(?:,\s*|$)", rest)
        if match is None:
            raise PipelineError(f"pipeline: expected name or name{{option=value}} at {rest[:40]!r}")
        passes.append(_make(match["name"], match["options"] or "", registry))
        rest = rest[match.end() :]
    return passes


def _make(name: str, options: str, registry: dict[str, type[Pass]]) -> Pass:
    if name not in registry:
        raise PipelineError(f"pipeline: unknown pass {name!r}; expected one of {', '.join(sorted(registry))}")
    pairs: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in options.split(","))):
        key, separator, value = part.partition("=")
        if not separator:
            raise PipelineError(f"pipeline: {name}: expected option=value, got {part!r}")
        pairs[key] = value
    return registry[name].from_options(pairs)
