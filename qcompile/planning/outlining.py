"""Runs a pipeline over a model without weights or data, once for each way in which what only these decide may go."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qcompile.codegen.cpp import build as compiler
from qcompile.codegen.cpp.entry import library_source
from qcompile.errors import PipelineError
from qcompile.ir.graph import Graph
from qcompile.ir.lowered import Instrument, Kernel
from qcompile.ir.native import NATIVE_SOURCE
from qcompile.ir.records import Assets
from qcompile.ir.tensor_file import constants_bytes
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.manager import run_pipeline
from qcompile.passes.outline import Outline
from qcompile.passes.pipelines import pipeline_text
from qcompile.runtime.artifact import ArtifactContents
from qcompile.runtime.artifact_size import ArtifactSize, artifact_size

_BINARY_BYTES = 40_000
"""Of one launch's binary, the mean of some hundreds that were built; a plain one takes a tenth, attention over packed pages seven times."""
_LIBRARY_BYTES, _LIBRARY_SHARE = 60_000, 0.65
"""Of a library of C++ kernels: of any, and for each byte of its source, as of a model of 2 and one of 30 layers."""
_ONNX_NODE_BYTES = 200
"""Of a node of an ONNX file, names included."""


_LOWERING = ("lower-to-kernels", "plan-memory")
"""Passes that no constant depends on."""


@dataclass(frozen=True)
class Outlined:
    """What a pipeline makes of a model.

    Attributes:
        contents: as a compilation's, with constants that may be unbound.
        outline: what it had to go without, and what it left open.
        size: of the artifact.
        resident: bytes that the process held when the passes had run.
        alternatives: its sizes where open choices are made the other way; the program is taken to grow with its nodes.
    """

    contents: ArtifactContents
    outline: Outline
    size: ArtifactSize
    resident: int
    alternatives: tuple[ArtifactSize, ...] = ()


def outline_model(
    graph: Graph, assets: Assets, pipeline: Sequence[Pass], ctx: PassContext, instruments: Sequence[Instrument] = ()
) -> Outlined:
    """Run the pipeline without values, open choices made against a change; and, where there are any, once more for it.

    Raises:
        QCompileError: as the compilation would.
    """
    found = _outlined(graph.clone(), assets, pipeline, replace(ctx, outline=Outline()), instruments)
    if not found.outline.is_open:
        return found
    steps = [step for step in pipeline if step.name not in _LOWERING]
    run_pipeline(graph, steps, replace(ctx, outline=found.outline.bolder(), notes=[], coverage=[], products={}), instruments)
    weights = constants_bytes(graph.constants)
    onnx = found.size.onnx + weights - found.size.weights if ctx.target.is_onnx else 0
    program = found.size.program * len(graph.fx.nodes) // max(1, len(found.contents.graph.fx.nodes))
    return replace(found, alternatives=(replace(found.size, weights=weights, program=program, onnx=onnx),))


def _outlined(graph: Graph, assets: Assets, pipeline: Sequence[Pass], ctx: PassContext, instruments: Sequence[Instrument]) -> Outlined:
    ctx = replace(ctx, notes=[], coverage=[], products={})
    records = run_pipeline(graph, pipeline, ctx, instruments)
    if "plan" not in ctx.products:
        raise PipelineError(f"plan: expected a pipeline that ends in plan-memory, got {pipeline_text(pipeline)}; add it")
    kernels: dict[str, Kernel] = {name: kernel for name, kernel in ctx.products.get("kernels", {}).items() if kernel.source}
    lines = {node.name: str(node.meta.get("source", "")) for node in graph.nodes}
    native = bool(kernels) and not ctx.target.is_cuda
    source = library_source(ctx.products["plan"], kernels, f"Kernels for {ctx.target}.", lines).encode() if native else b""
    contents = ArtifactContents(
        graph=graph, plan=ctx.products["plan"], kernels=kernels, binaries={NATIVE_SOURCE: source} if native else {}, assets=assets,
        target=str(ctx.target),        pipeline=pipeline_text(pipeline), records=records, coverage=ctx.coverage,
    )  # fmt: skip
    assert ctx.outline is not None
    resident = resident_bytes()  # now: sizing and measuring take memory that a compilation does not
    size = artifact_size(contents)
    onnx = contents.weight_bytes + _ONNX_NODE_BYTES * len(graph.fx.nodes) if ctx.target.is_onnx else 0
    return Outlined(contents, ctx.outline, replace(size, binaries=_binary_bytes(contents, ctx), onnx=onnx), resident)


def _binary_bytes(contents: ArtifactContents, ctx: PassContext) -> int:
    """Of what will be built: a binary per launch for GPUs, a library per instruction set for CPUs."""
    if ctx.target.is_cuda:
        return _BINARY_BYTES * sum(len(kernel.launches) for kernel in contents.kernels.values())
    source = contents.binaries.get(NATIVE_SOURCE)
    return 0 if source is None else round(len(compiler.chosen_sets(None)) * (_LIBRARY_BYTES + _LIBRARY_SHARE * len(source)))


def resident_bytes() -> int:
    """What this process holds now; the most it ever held where the system does not say, 0 where it says neither."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize()
    except OSError:
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
    except ImportError:
        return 0
