"""Runs a pipeline: every pass verified, timed, recorded, and, where asked, checked against the graph before it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace

from qcompile.errors import BrokenPassError, QCompileError, VerifyError
from qcompile.ir.graph import Graph
from qcompile.ir.lowered import Instrument
from qcompile.ir.records import PassRecord
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.instruments import NumericCheck


def run_pipeline(
    graph: Graph, passes: Sequence[Pass], ctx: PassContext, instruments: Sequence[Instrument] = (), check: NumericCheck | None = None
) -> list[PassRecord]:
    """Run `passes` in order over `graph`, in place.

    Args:
        graph: rewritten in place.
        passes: the pipeline.
        ctx: what the compilation is for.
        instruments: hooks before and after each pass.
        check: if given, runs the graph before and after each pass and compares.

    Raises:
        PassError: if a pass fails, or its claim to have changed something (or nothing) is false.
        VerifyError: if a pass leaves an illegal graph.
    """
    records = []
    for index, step in enumerate(passes):
        for instrument in instruments:
            instrument.before(step.name, graph)
        record = _run_one(graph, step, ctx, index, check)
        records.append(record)
        for instrument in instruments:
            instrument.after(record, graph)
    return records


def _run_one(graph: Graph, step: Pass, ctx: PassContext, index: int, check: NumericCheck | None) -> PassRecord:
    given = replace(ctx)  # with the fuel that it had: the pass spends some
    before = graph.clone() if check is not None else None
    nodes = len(graph.fx.nodes)
    started = time.perf_counter()
    try:
        changed = run_pass(graph, step, ctx)
    except (BrokenPassError, VerifyError) as error:
        if check is None or before is None:
            raise
        raise type(error)(f"{error}{check.keep(before, step, given, str(error))}") from error
    seconds = time.perf_counter() - started
    effect = check.measure(before, graph, step, given) if check is not None and before is not None and changed else None
    size = sum(constant.nbytes for constant in graph.constants.values())
    measured = {} if effect is None else asdict(effect)
    return PassRecord(index, step.name, step.spec, changed, nodes, len(graph.fx.nodes), seconds, size, exact=step.is_exact(ctx), **measured)


def run_pass(graph: Graph, step: Pass, ctx: PassContext) -> bool:
    """Run one pass over `graph`, in place; whether it changed anything.

    Raises:
        BrokenPassError: if it crashes, or its claim to have changed something (or nothing) is false.
        VerifyError: if it leaves an illegal graph.
        QCompileError: whatever it raises because of what it was given.
    """
    fingerprint = graph.fingerprint()
    graph.current_pass = step.name
    try:
        changed = step.run(graph, ctx)
    except QCompileError:
        raise
    except Exception as error:
        text = f"{step.name}: failed with {type(error).__name__}: {error}; disable it with --disable-pass {step.name}"
        raise BrokenPassError(text) from error
    finally:
        graph.current_pass = ""
    if changed != (graph.fingerprint() != fingerprint):
        claim = "changed the graph" if changed else "left the graph alone"
        raise BrokenPassError(
            f"{step.name}: claims to have {claim}, expected the claim to be true, got {'the same' if changed else 'another'} "
            "graph; mend its return value"
        )
    graph.verify()
    return changed
