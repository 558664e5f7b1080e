"""Libraries for CPUs: built where a model is compiled, and again from an artifact's own graph where it is loaded.

Of what came with an artifact nothing but the graph and the weights, which are checked, is trusted here.
"""

from __future__ import annotations

import copy
import os
import platform
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qcompile.codegen.cpp import build as compiler
from qcompile.codegen.cpp.backend import CppBackend
from qcompile.codegen.select import build, instead_of_native, without_native
from qcompile.errors import ArtifactError, EngineError, KernelBuildError
from qcompile.ir.graph import Graph
from qcompile.ir.lowered import Kernel
from qcompile.ir.native import NATIVE_SOURCE, library_name, library_parts, plan_digest
from qcompile.ir.records import CoverageRow
from qcompile.passes.base import PassContext
from qcompile.passes.lower_to_kernels import LowerToKernels
from qcompile.passes.plan_memory import PlanMemory
from qcompile.runtime.artifact import ArtifactContents, load_artifact, save_artifact
from qcompile.runtime.engines.native import objection
from qcompile.runtime.native.processor import runs_here
from qcompile.runtime.trust import trust
from qcompile.target import parse_target

HERE = "here"
"""In place of instruction sets: the best one that this processor has."""
_WITHOUT = "no C++ kernel: "
_OUTDATED = (_WITHOUT, "refused by ")
"""How reasons begin that hold until libraries are built."""
Built = tuple[dict[str, Kernel], dict[str, bytes]]
"""Kernels by name, and what was built of them by file."""


def named_sets(asked: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Instruction sets from names, a text with commas between them, or `here`; None is all that can be built.

    Raises:
        OptionError: for a name that this machine's compiler does not know.
    """
    if asked is None or compiler.find_compiler() is None:
        return None
    names = asked.replace(" ", "").split(",") if isinstance(asked, str) else list(asked)
    if names == [HERE]:
        return tuple(name for name in compiler.instruction_sets() if runs_here(name))[:1]
    return compiler.chosen_sets(names)


def tell_of_missing(ctx: PassContext) -> None:
    """Write into the coverage why a context's backend serves in place of C++ kernels; whoever compiles is told once."""
    reason = "" if ctx.backend is None else instead_of_native(ctx.backend)
    if ctx.backend is not None and reason:
        ctx.coverage[:] = told(ctx.coverage, reason)
        warnings.warn(f"{ctx.target}: served by {ctx.backend.name} in place of native kernels: {reason}", stacklevel=3)


def built_or_torch(
    graph: Graph, ctx: PassContext, names: Sequence[str] | None, *, strict: bool, failed_in: str | os.PathLike[str] | None
) -> Built:
    """Build what the context's backend emitted; where C++ does not compile, lower the graph again for what serves in its place.

    Args:
        graph: as the passes left it.
        ctx: with the plan and kernels of the lowered graph, and its coverage; those of a second lowering take their place.
        names: of instruction sets.
        strict: raise in place of that.
        failed_in: directory of a dump, which keeps a source that does not compile.

    Raises:
        KernelBuildError: for a kernel that does not build, if `strict` or for a GPU.
    """
    lines = {node.name: str(node.meta.get("source", "")) for node in graph.nodes}
    kept = None if failed_in is None else Path(failed_in) / "failed"
    try:
        return build(ctx.products.get("kernels", {}), ctx.target, ctx.products["plan"], lines, instruction_sets=names, failed_in=kept)
    except KernelBuildError as error:
        if strict or ctx.target.is_cuda:
            raise
        backend = without_native(ctx.target, str(error).splitlines()[0])
        warnings.warn(f"{ctx.target}: served by {backend.name} in place of native kernels: {error}", stacklevel=3)
    ctx.backend = backend
    ctx.coverage.clear()
    LowerToKernels().run(graph, ctx)
    PlanMemory().run(graph, ctx)
    ctx.coverage[:] = told(ctx.coverage, backend.instead)
    return build(ctx.products["kernels"], ctx.target, ctx.products["plan"])


def told(rows: Sequence[CoverageRow], reason: str, served: str = "") -> list[CoverageRow]:
    """The rows with why another engine (`served`, or the one that they name) runs them in place of C++ kernels."""
    short = f"{_WITHOUT}{reason.splitlines()[0].partition('; ')[0]}"
    return [
        replace(
            row, reason="; ".join(part for part in (row.reason, short) if part),
            kernel=f"{served}.{row.operator.removeprefix('aten.')}" if served else row.kernel,
        )
        for row in rows
    ]  # fmt: skip


def native_or_torch(contents: ArtifactContents, reason: str, *, asked: bool = False) -> tuple[ArtifactContents, str]:
    """The contents with a library that is built now, and the engine that serves them; without a compiler that is `torch_cpu`.

    Args:
        contents: of an artifact for CPUs.
        reason: why no library that came with it may serve; whoever loads it is told.
        asked: whether the caller named the engine; of an artifact that came without libraries nothing needs to be told then.

    Raises:
        EngineError: for an artifact that was compiled for something other than a CPU.
    """
    _require_cpu(contents)
    came = NATIVE_SOURCE in contents.binaries
    if compiler.find_compiler() is None:
        return _served_by_torch(contents, f"{reason}, and {compiler.no_compiler()}")
    try:
        made = with_native_kernels(contents, named_sets(HERE))
    except KernelBuildError as error:
        return _served_by_torch(contents, f"{reason}, and {error}")
    if NATIVE_SOURCE not in made.binaries:
        return _served_by_torch(contents, "none of the operators has a C++ kernel") if asked else (contents, "torch_cpu")
    if came or not asked:
        keep = f"`qcompile build {contents.path}` keeps what is built"
        warnings.warn(f"{contents.path}: native kernels are built anew from the artifact's graph: {reason}; {keep}", stacklevel=4)
    return made, "native"


def _require_cpu(contents: ArtifactContents) -> None:
    target = parse_target(contents.target)
    if target.arch not in ("cpu", "reference"):
        raise EngineError(f"engine native: expected an artifact for cpu-* or reference-*, got {target}; leave engine out")


def _served_by_torch(contents: ArtifactContents, reason: str) -> tuple[ArtifactContents, str]:
    """The contents for torch_cpu, with the reason in their coverage; told by `load`, three frames up."""
    warnings.warn(f"{contents.path}: served by torch_cpu in place of native kernels: {reason}", stacklevel=5)
    made = copy.copy(contents)
    made.coverage = told(contents.coverage, reason.splitlines()[0], "torch_cpu")
    return made, "torch_cpu"


def with_native_kernels(contents: ArtifactContents, names: Sequence[str] | None = None) -> ArtifactContents:
    """The contents lowered again, for C++ kernels, with libraries that were built now; those for other machines stay beside them.

    Args:
        contents: of an artifact.
        names: of instruction sets; by default all that can be built here.

    Raises:
        KernelBuildError: without a compiler, or if what is emitted does not compile.
    """
    target, graph = parse_target(contents.target), contents.graph
    entry = contents.plan.entries.get("prefill", contents.plan.entries["forward"])
    batch, tokens = (entry.limits.get(name, 1) for name in ("batch", "sequence"))
    ctx = PassContext(target, CppBackend(), batch, tokens, tokens)
    LowerToKernels().run(graph, ctx)
    PlanMemory().run(graph, ctx)
    made = copy.copy(contents)
    made.plan = ctx.products["plan"]
    lines = {node.name: str(node.meta.get("source", "")) for node in graph.nodes}
    made.kernels, new = build(ctx.products["kernels"], target, made.plan, lines, instruction_sets=names)
    trust(code for name, code in new.items() if name != NATIVE_SOURCE)
    made.binaries = _others(contents, made) | new
    made.untrusted = tuple(name for name in contents.untrusted if name in made.binaries and name not in new)
    made.coverage = renewed(contents.coverage, ctx.coverage)
    made.settings = replace(contents.settings, engine="native")
    return made


def _others(contents: ArtifactContents, made: ArtifactContents) -> dict[str, bytes]:
    """Libraries for other machines, if they were made for this very plan."""
    if plan_digest(contents.plan, contents.kernels) != plan_digest(made.plan, made.kernels):
        return {}
    return {name: code for name, code in contents.binaries.items() if library_parts(name)[0] not in ("", platform.machine())}


def build_artifact(
    path: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, *, instruction_sets: str | Sequence[str] | None = None,
    overwrite: bool = False,
) -> ArtifactContents:  # fmt: skip
    """Build the libraries of an artifact for CPUs on this machine, from its graph, and write them into it.

    Args:
        path: the artifact. It is written anew beside its place and renamed, so there must be room for it twice.
        out: another place for the result.
        instruction_sets: as `qcompile.compile` takes them.
        overwrite: replace an artifact that is at `out`.

    Returns:
        What the artifact holds now. One that has all these libraries, built here, is left as it is.

    Raises:
        ArtifactError: for a damaged artifact, or one in which no operator has a C++ kernel.
        EngineError: for an artifact that was compiled for something other than a CPU.
        KernelBuildError: without a compiler, or if what is emitted does not compile.
    """
    contents = load_artifact(path)
    _require_cpu(contents)
    names = named_sets(instruction_sets)
    wanted = {library_name(platform.machine(), name) for name in compiler.chosen_sets(names)}
    have = wanted <= set(contents.binaries) and not wanted & set(contents.untrusted) and not objection(contents)
    if have and out is None:
        return contents
    made = with_native_kernels(contents, names)
    if NATIVE_SOURCE not in made.binaries:
        raise ArtifactError(f"{path}: expected operators that have C++ kernels, got none; `qcompile inspect` says why; torch_cpu serves it")
    save_artifact(path if out is None else out, made, overwrite=out is None or overwrite)
    return made


def renewed(rows: Sequence[CoverageRow], found: Sequence[CoverageRow]) -> list[CoverageRow]:
    """The rows with the kernels of `found`; why passes left something alone is known from the first compilation only."""
    known = {row.node: row for row in found}
    result = []
    for row in rows:
        new = known.get(row.node, row)
        before = (part for part in row.reason.split("; ") if not part.startswith(_OUTDATED))
        reasons = [part for part in (*before, *new.reason.split("; ")) if part]
        result.append(replace(row, kernel=new.kernel, reason="; ".join(dict.fromkeys(reasons))))
    return result
