"""Native kernels for an artifact from its own graph: nothing that came with it but the graph and the weights is trusted."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace

from qcompile.codegen.cpp.build import find_compiler, no_compiler
from qcompile.errors import EngineError
from qcompile.ir.native import NATIVE_SOURCE
from qcompile.ir.records import CoverageRow
from qcompile.runtime.artifact import ArtifactContents
from qcompile.runtime.native.processor import best_library
from qcompile.runtime.trust import trust
from qcompile.target import parse_target


def native_or_torch(contents: ArtifactContents) -> tuple[ArtifactContents, str]:
    """The contents with a library that may run here, and the engine that serves them; whoever gets another than asked for is told.

    The artifact's own library where it was built here or the caller allows it; else one that is built from the graph; without a
    compiler `torch_cpu`.

    Raises:
        EngineError: for an artifact that was compiled for something other than a CPU.
        KernelBuildError: if what is emitted does not compile.
    """
    target = parse_target(contents.target)
    if target.arch not in ("cpu", "reference"):
        raise EngineError(f"engine native: expected an artifact for cpu-* or reference-*, got {target}; leave engine out")
    name = best_library(contents.binaries)
    if name is not None and contents.native_allowed:
        return contents, "native"
    reason = f"{name} was not built on this machine (allow_native=True runs it)" if name else ""
    if find_compiler() is None:
        reason = reason or "the artifact has no library for this processor"
        warnings.warn(f"{contents.path}: served by torch_cpu in place of native kernels: {reason}, and {no_compiler()}", stacklevel=3)
        return contents, "torch_cpu"
    if reason:
        warnings.warn(f"{contents.path}: native kernels are built anew from the artifact's graph: {reason}", stacklevel=3)
    return with_native_kernels(contents), "native"


def with_native_kernels(contents: ArtifactContents) -> ArtifactContents:
    """The contents lowered again, for C++ kernels, with a library that was built now."""
    # What compiles is imported where something is compiled: an artifact with its library loads without it.
    from qcompile.codegen.cpp.backend import CppBackend
    from qcompile.codegen.select import build
    from qcompile.passes.base import PassContext
    from qcompile.passes.lower_to_kernels import LowerToKernels
    from qcompile.passes.plan_memory import PlanMemory

    target, graph = parse_target(contents.target), contents.graph
    entry = contents.plan.entries.get("prefill", contents.plan.entries["forward"])
    batch, tokens = (entry.limits.get(name, 1) for name in ("batch", "sequence"))
    ctx = PassContext(target, CppBackend(), batch, tokens, tokens)
    LowerToKernels().run(graph, ctx)
    PlanMemory().run(graph, ctx)
    made = copy.copy(contents)
    made.plan = ctx.products["plan"]
    lines = {node.name: str(node.meta.get("source", "")) for node in graph.nodes}
    made.kernels, made.binaries = build(ctx.products["kernels"], target, made.plan, lines)
    made.untrusted, made.coverage = (), renewed(contents.coverage, ctx.coverage)
    trust(code for name, code in made.binaries.items() if name != NATIVE_SOURCE)
    return made


def renewed(rows: Sequence[CoverageRow], found: Sequence[CoverageRow]) -> list[CoverageRow]:
    """The rows with the kernels of `found`; why passes left something alone is known from the first compilation only."""
    known = {row.node: row for row in found}
    result = []
    for row in rows:
        new = known.get(row.node, row)
        reasons = [part for part in (row.reason, new.reason) if part]
        result.append(replace(row, kernel=new.kernel, reason="; ".join(dict.fromkeys(reasons))))
    return result
