"""Runs a recorded pipeline again on the model it was run on, with what rounding gave taken from the compiled model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qcompile.errors import SourceError
from qcompile.ir.constants import Constant
from qcompile.ir.graph import Graph
from qcompile.ir.layers import layer_of
from qcompile.ir.serialize import graph_to_json
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.lower_to_kernels import LowerToKernels
from qcompile.passes.manager import run_pipeline
from qcompile.passes.plan_memory import PlanMemory
from qcompile.passes.quantize_weights import QuantizeWeights
from qcompile.passes.switches import Switch, biases_beside, cache_switches, new_switches
from qcompile.quant.reference import Quantized, restore

qcompile = torch.ops.qcompile
ALTERED = "altered"
"""In place of a pass, for constants of a compiled model that are not what its passes make."""
_SAME = 1e-2
"""Relative difference of a constant up to which it is the same: casts to bfloat16 make 2e-3."""
_ALIKE = 0.5
"""Cosine between a weight and what it was rounded to, above which both are of one model: two bits leave 0.9."""
_LOOKED_AT = 8
"""Weights that are compared so."""
_BINDS_NOTHING = (LowerToKernels, PlanMemory)
"""Passes that rewrite nothing, and are not run again."""


@dataclass(frozen=True)
class Stage:
    """The graph as a pass that changed it left it; `switches` are the quantizers that it put there, `is_exact` its own claim."""

    name: str
    graph: Graph
    is_exact: bool
    switches: tuple[Switch, ...] = ()
    bypassed: tuple[Switch, ...] = ()
    """Caches that hold keys and values in the computation dtype: nothing to switch, and never to be run in another dtype."""


def run_again(graph: Graph, pipeline: Sequence[Pass], ctx: PassContext, compiled: Graph) -> list[Stage]:
    """The stages of a pipeline, the first being `graph` as it comes; codes, scales and tables are those of `compiled`.

    So no weight is rounded again: what passes before rounding measured or learned is read from the cache of finished work, or done anew.

    Raises:
        SourceError: where what comes out is not built like `compiled`, naming the first difference, or is of another model.
    """
    stages = [Stage("", graph.clone(), is_exact=True)]
    made = set(graph.constants)
    for step in pipeline:
        if isinstance(step, _BINDS_NOTHING):
            continue
        (record,) = run_pipeline(graph, [_quickly(step)], ctx)
        if not record.changed:
            continue
        exact = step.is_exact(ctx)
        if not exact:
            _bind_recorded(graph, made, compiled.constants)
        made |= set(graph.constants)
        stages.append(_stage(step.name, stages[-1].graph, graph.clone(), is_exact=exact))
    _require_same_structure(graph, compiled)
    return _with_altered(stages, compiled)


def _quickly(step: Pass) -> Pass:
    """Rounding to nearest happens when somebody asks for it, and nobody will."""
    return replace(step, rounding="nearest") if isinstance(step, QuantizeWeights) else step


def _stage(name: str, before: Graph, after: Graph, *, is_exact: bool) -> Stage:
    if not is_exact:
        return Stage(name, after, is_exact, tuple(new_switches(before, after, name)))
    return Stage(name, after, is_exact, bypassed=tuple(cache_switches(before, after, name)))


def _bind_recorded(graph: Graph, known: set[str], recorded: Mapping[str, Constant]) -> None:
    """Constants that are new get the values that they have in the compiled model, and biases of convolutions with new filters."""
    new = {name for name in graph.constants if name not in known}
    for node in graph.calls(qcompile.dequantize.default):
        if str(node.args[0].target) in new:  # type: ignore[union-attr]
            new |= {str(bias.target) for value in (node, *node.users) for bias in biases_beside(value)}
    for name in new:
        constant, other = graph.constants[name], recorded.get(name)
        if other is not None and (other.shape, other.dtype) == (constant.shape, constant.dtype):
            graph.bind(name, other)


def _require_same_structure(made: Graph, compiled: Graph) -> None:
    found, wanted = (_structure(graph) for graph in (made, compiled))
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        if found.get(name) != wanted.get(name):
            raise SourceError(
                f"reference: expected the model that was compiled, on which its passes make {_shown(name, wanted)}, got "
                f"{_shown(name, found)}; pass that model, to the version of qcompile that compiled it"
            )


def _structure(graph: Graph) -> dict[str, Any]:
    """Of each node what it computes from which others, of each constant shape and dtype; without the history of either."""
    stored = graph_to_json(graph)
    nodes = {node.pop("name"): node for node in stored["nodes"]}
    for node in nodes.values():
        for key in set(node) - {"op", "target", "args", "kwargs", "type"}:
            del node[key]
    return nodes | {f"constant {name}": constant for name, constant in stored["constants"].items()}


def _shown(name: str, structure: Mapping[str, Any]) -> str:
    if name not in structure:
        return f"no {name}"
    item = structure[name]
    what = item["dtype"] if "dtype" in item else item.get("target", item["op"])
    details = item["shape"] if "shape" in item else item.get("args", "")
    return f"{name} = {what} {str(details)[:120]}"


def _with_altered(stages: list[Stage], compiled: Graph) -> list[Stage]:
    """With a last stage for float constants that differ from what the passes make, as switches of their own.

    Raises:
        SourceError: if most do.
    """
    final = stages[-1].graph
    pairs = [(name, constant, compiled.constants[name]) for name, constant in final.constants.items() if name in compiled.constants]
    floats = [pair for pair in pairs if pair[1].format is None and pair[1].dtype.is_floating_point]
    altered = [(name, constant) for name, constant, other in floats if _difference(constant, other) > _SAME]
    if 2 * len(altered) > len(floats):
        raise _another_model(f"{len(altered)} of {len(floats)} unquantized weights", altered[0][0])
    _require_alike(stages)
    if not altered:
        return stages
    last = next(stage for stage in reversed(stages) if stage.switches or stage is stages[0])
    program = last.graph.clone()
    switches = []
    for name, constant in altered:
        if name in program.constants:
            program.bind(name, compiled.constants[name])
            nodes = [node.name for node in program.fx.find_nodes(op="get_attr", target=name)]
            switches.append(Switch("weights", ALTERED, layer_of(name), name, name, tuple((node, constant) for node in nodes)))
    return [*stages, Stage(ALTERED, program, is_exact=False, switches=tuple(switches))]


def _difference(a: Constant, b: Constant) -> float:
    if a.key == b.key:
        return 0.0
    first, second = a.materialize().double(), b.materialize().double()
    return float((first - second).norm() / second.norm().clamp(min=1e-300))


def _require_alike(stages: Sequence[Stage]) -> None:
    """Weights must look like what they were rounded to."""
    graphs = {switch: stage.graph for stage in stages for switch in stage.switches if switch.kind == "weights"}
    chosen = list(graphs)[:: max(1, len(graphs) // _LOOKED_AT)]
    cosines = [_cosine(graphs[switch], switch) for switch in chosen]
    if cosines and torch.tensor(cosines).median() < _ALIKE:
        raise _another_model(f"a median cosine of {float(torch.tensor(cosines).median()):.2g} between weights and codes", chosen[0].node)


def _cosine(graph: Graph, switch: Switch) -> float:
    exact = switch.pairs[0][1]
    assert isinstance(exact, Constant)
    parts = {part: graph.constants.get(f"{switch.node}.{part}") for part in ("codes", "scale", "zero", "scale2")}
    form = parts["codes"].format if parts["codes"] is not None else None
    if form is None:
        return 1.0
    tensors: dict[str, Any] = {part: None if constant is None else constant.materialize() for part, constant in parts.items()}
    weight = exact.materialize().float().flatten(1)
    rounded = restore(Quantized(tensors["codes"], tensors["scale"], tensors["zero"], tensors["scale2"]), form, weight.shape[1])
    return float(torch.nn.functional.cosine_similarity(weight.flatten(), rounded.flatten(), dim=0))


def _another_model(what: str, name: str) -> SourceError:
    return SourceError(
        f"reference: expected the model that was compiled, got one with other weights: {what}, first {name}; pass the checkpoint that the "
        "artifact was made from"
    )
