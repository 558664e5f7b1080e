"""Which pass broke it, and which of its rewrites: a predicate on graphs is tried after each pass, then after fewer and fewer rewrites."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from qcompile.errors import NumericError, PipelineError, QCompileError
from qcompile.ir.graph import Graph
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.effects import divergence_per_token, relative_error
from qcompile.passes.example_run import ExampleRun, real_tokens
from qcompile.passes.instruments import NumericCheck
from qcompile.passes.manager import run_pass

_PLENTY = 1 << 30
"""More rewrites than any pass does."""

Predicate = Callable[[Graph], bool]
"""Whether a graph is good. It is a program after every pass: `graph.run(inputs)` computes its outputs."""


class Judge(Protocol):
    """A predicate that also wants to know what a graph was made from."""

    error: str
    """What it has to say about the first graph that was not good."""

    def after(self, before: Graph, graph: Graph, step: Pass, ctx: PassContext) -> bool:
        """Whether what the pass made of `before` is good."""


@dataclass(frozen=True)
class Change:
    """A node that a rewrite made (`before` is ""), changed, or removed (`after` is "")."""

    node: str
    source: str
    before: str
    after: str


@dataclass(frozen=True)
class Rewrite:
    """One rewrite of a pass.

    Attributes:
        number: which of them, from 1.
        of: how many the pass does.
        changes: what it did to the graph, in order.
    """

    number: int
    of: int
    changes: tuple[Change, ...]

    @property
    def node(self) -> str:
        """The first node that it made or changed."""
        return next((change.node for change in self.changes if change.after), self.changes[0].node if self.changes else "")


@dataclass(frozen=True)
class Culprit:
    """The first pass after which the predicate fails.

    Attributes:
        index: of the pass in the pipeline.
        name: of the pass.
        spec: of the pass.
        error: what it raised, or what the judge has to say; "" where the predicate is just false.
        rewrite: the first rewrite after which the predicate fails; None for a pass that spends no fuel, or is wrong before its first.
        before: the graph that the pass was given.
    """

    index: int
    name: str
    spec: str
    error: str
    rewrite: Rewrite | None
    before: Graph

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        rewrite = None
        if self.rewrite is not None:
            listed = [vars(change) for change in self.rewrite.changes]
            rewrite = {"number": self.rewrite.number, "of": self.rewrite.of, "node": self.rewrite.node, "changes": listed}
        return {"index": self.index, "pass": self.name, "spec": self.spec, "error": self.error, "rewrite": rewrite}


def first_failing_pass(graph: Graph, passes: Sequence[Pass], ctx: PassContext, predicate: Predicate | Judge) -> Culprit | None:
    """The first pass after which `predicate` is false, or that fails itself, and the first such rewrite within it.

    Passes run one after the other, and none after the culprit; the predicate is asked once after each that changed something. Within the
    pass it is asked about log2(rewrites) times, so that a pass whose rewrites compensate each other may have more than one answer.

    Args:
        graph: as it comes from the front end; left as it is.
        passes: the pipeline.
        ctx: what the compilation is for; left as it is.
        predicate: true for good graphs.

    Raises:
        PipelineError: if the predicate is false for `graph` itself.
    """
    good = _judging(predicate)
    if not good(graph, graph, None, ctx):
        raise PipelineError("bisect: expected a predicate that holds before the first pass, got one that is false there; mend it")
    current, given = graph.clone(), _own(ctx)
    for index, step in enumerate(passes):
        before, start = current.clone(), _own(given)
        error = _attempt(current, step, given, before, good)
        if error is not None:
            error = error or getattr(predicate, "error", "")
            return Culprit(index, step.name, step.spec, error, first_failing_rewrite(before, step, start, predicate), before)
    return None


def first_failing_rewrite(graph: Graph, step: Pass, ctx: PassContext, predicate: Predicate | Judge) -> Rewrite | None:
    """The first of the rewrites of a pass after which `predicate` is false or the pass fails, by halving its fuel.

    None if the pass spends no fuel, does nothing wrong with all of it, or something wrong without any.

    Args:
        graph: what the pass is given; left as it is.
        step: the pass.
        ctx: what the compilation is for; left as it is.
        predicate: true for good graphs.
    """
    good = _judging(predicate)

    def attempt(fuel: int) -> tuple[Graph, int, bool]:
        result, given = graph.clone(), replace(_own(ctx), fuel=fuel)
        error = _attempt(result, step, given, graph, good)
        return result, fuel - max(0, given.fuel or 0), error is None

    _, total, fine = attempt(_PLENTY if ctx.fuel is None else ctx.fuel)
    low, high = 0, total
    if fine or not total or not attempt(0)[2]:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if attempt(middle)[2] else (low, middle)
    return Rewrite(high, total, changes(attempt(low)[0], attempt(high)[0]))


_Good = Callable[[Graph, Graph, Pass | None, PassContext], bool]


def _judging(predicate: Predicate | Judge) -> _Good:
    def good(before: Graph, graph: Graph, step: Pass | None, ctx: PassContext) -> bool:
        if not hasattr(predicate, "after"):
            return bool(predicate(graph))
        return step is None or predicate.after(before, graph, step, ctx)

    return good


def _own(ctx: PassContext) -> PassContext:
    """A copy whose lists are its own; statistics are taken anew, or come from the store."""
    return replace(ctx, notes=list(ctx.notes), coverage=list(ctx.coverage), products=dict(ctx.products), measured=None)


def _attempt(graph: Graph, step: Pass, ctx: PassContext, before: Graph, good: _Good) -> str | None:
    """Run a pass over `graph` in place: None if it is good, "" if the predicate is false, or what the pass raised."""
    given = replace(ctx)
    try:
        changed = run_pass(graph, step, ctx)
    except QCompileError as error:
        return str(error)
    return None if not changed or good(before, graph, step, given) else ""


def changes(old: Graph, new: Graph) -> tuple[Change, ...]:
    """The nodes in which two graphs differ: calls of `new` in order, then constants and what else it lists, then what is gone."""
    before, after = _lines(old), _lines(new)
    nothing = _Line("", "", "", is_call=False)
    made = [name for name, line in after.items() if before.get(name, nothing) != line]
    gone = [name for name in before if name not in after]
    ordered = [*sorted(made, key=lambda name: not after[name].is_call), *gone]
    return tuple(
        Change(name, after.get(name, before.get(name, nothing)).source, before.get(name, nothing).text, after.get(name, nothing).text)
        for name in ordered
    )


@dataclass(frozen=True)
class _Line:
    text: str
    key: str
    source: str
    is_call: bool


def _lines(graph: Graph) -> dict[str, _Line]:
    """Name of a node -> its line in the listing."""
    keys = [graph.constants[str(node.target)].key if node.op == "get_attr" else "" for node in graph.nodes]
    texts = [re.sub(r" {2,}", "  ", line) for line in graph.text().splitlines()]
    return {
        node.name: _Line(text, key, str(node.meta.get("source", "")), is_call=node.op == "call_function")
        for node, key, text in zip(graph.nodes, keys, texts, strict=True)
    }


class DivergenceAbove:
    """Good while the next-token distribution is within `limit` nats per token of the first graph's, on the example inputs."""

    def __init__(self, limit: float) -> None:
        """Compare with the first graph that is asked about."""
        self._limit, self._runner = limit, ExampleRun()
        self._first: Any = None

    def __call__(self, graph: Graph) -> bool:
        """Whether it is near enough.

        Raises:
            PipelineError: for a graph that is no language model.
        """
        if graph.interface.kind not in ("causal_lm", "cached_lm"):
            raise PipelineError(f"--kl-above: expected a causal language model, got a {graph.interface.kind}; use --error-above")
        logits = self._runner.run(graph, wide=False)[0]
        if self._first is None:
            self._first = logits
        found = divergence_per_token(logits, self._first, real_tokens(graph.interface.examples))
        return found is not None and found <= self._limit


class ErrorAbove:
    """Good while max|a-b| / max|b| of the outputs against the first graph's is at most `limit`, on the example inputs."""

    def __init__(self, limit: float) -> None:
        """Compare with the first graph that is asked about."""
        self._limit, self._runner = limit, ExampleRun()
        self._first: Any = None

    def __call__(self, graph: Graph) -> bool:
        """Whether it is near enough."""
        found = self._runner.run(graph, wide=False)
        if self._first is None:
            self._first = found
        return relative_error(found, self._first) <= self._limit


class FailsCheck:
    """Good if the pass holds what `check=True` asks of it: exact to 1e-9, no numbers lost, no weight rounded beyond recognition."""

    def __init__(self) -> None:
        """Check without reproducers."""
        self.error = ""
        self._check = NumericCheck()

    def after(self, before: Graph, graph: Graph, step: Pass, ctx: PassContext) -> bool:
        """Whether the check has nothing to say."""
        try:
            self._check.measure(before, graph, step, ctx)
        except NumericError as error:
            self.error = self.error or str(error)
            self._check.locating = False  # the place in the whole pass is known, and fewer rewrites are told by the rewrite
            return False
        return True
