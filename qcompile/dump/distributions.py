"""What passes did to values: distributions of weights and activations before and after, for a bounded choice of sites."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, fx

from qcompile.dump.graph_log import base_name
from qcompile.dump.moments import MomentsRecorder
from qcompile.ir.constants import uncast
from qcompile.ir.graph import Graph
from qcompile.ir.layers import layer_of
from qcompile.passes.distributions import Distribution, weight_distribution
from qcompile.passes.execution import Inputs, call

aten = torch.ops.aten
_READERS = (aten.linear.default, aten.conv1d.default, aten.conv2d.default)
_MOST_SITES = 24
"""Of a model whose layers do not repeat: evenly spaced."""
_DIGITS = 6
_NOISE = 1e-4
"""Of the largest value: float32 sums over a few thousand channels differ by less, formats of 8 bits by more."""


class Site(NamedTuple):
    """An operator with a weight whose distributions are kept.

    Attributes:
        name: of the weight, without the name of a packed part.
        layer: which repeated layer it belongs to.
        reader: the operator.
    """

    name: str
    layer: int | None
    reader: fx.Node


class DistributionRecorder:
    """Measures weights around passes that changed them, activations around those that changed a basis or rounded them.

    A pass is recognised by its traces, whatever it is called: logs of constants, online transforms, quantizers of activations.
    """

    def __init__(self, inputs: Callable[[Graph], Inputs] | None = None) -> None:
        """Run the model on what `inputs` makes of a graph; by default on the graph's examples."""
        self._moments = MomentsRecorder(inputs)
        self._listing = ""
        self._weights: dict[str, dict[str, Any]] = {}
        self._activations: dict[str, dict[str, Any]] = {}

    def before(self, graph: Graph, listing: str) -> None:
        """Remember the graph that the next pass gets, and what its listing is called."""
        self._moments.before(graph)
        self._listing = listing

    def after(self, graph: Graph, listing: str, title: str) -> Table | None:
        """Measure what the pass changed; the table of spaces if it changed a basis."""
        before = self._moments.previous
        if before is None:
            return None
        self._compare_weights(before, graph, listing)
        rounded = _quantizers(graph) > _quantizers(before)
        keys, sites = _keys(before), chosen_sites(before)
        self._moments.watched = frozenset((*(site.reader.name for site in sites), *keys))
        table = self._moments.after(graph, title)
        if table is not None or rounded:
            # Rounding alone changes no outliers: half the model shows what it does, at half the time.
            half = sorted({site.layer for site in sites if site.layer is not None})[:2]
            only = None if table is not None else frozenset(site.reader.name for site in sites if site.layer in half or not half)
            old, new = self._moments.measure(before, only)[1], self._moments.measure(graph, only)[1]
            for site in _distinct(sites):
                self._add_activation(site.name, "input", site.layer, old.get(site.reader.name), new.get(site.reader.name), listing)
            for name, layer in keys.items():
                self._add_activation(name, "keys", layer, old.get(name), new.get(name), listing)
        return table

    def values(self) -> dict[str, Any]:
        """Everything measured, as JSON values."""
        return {"weights": list(self._weights.values()), "activations": list(self._activations.values())}

    def _compare_weights(self, before: Graph, graph: Graph, listing: str) -> None:
        old = {site.name: site for site in chosen_sites(before)}
        for site in chosen_sites(graph):
            known = old.get(site.name)
            if known is None or _weight_key(before, known) == _weight_key(graph, site):
                continue
            entry = self._weights.setdefault(site.name, {"name": site.name, "layer": site.layer, "stages": []})
            if not entry["stages"]:
                entry["stages"].append(_stage(self._listing, weight_distribution(_weight(before, known))))
            entry["stages"].append(_stage(listing, weight_distribution(_weight(graph, site))))

    def _add_activation(
        self, name: str, kind: str, layer: int | None, old: Distribution | None, new: Distribution | None, listing: str
    ) -> None:
        """Enter what a pass made of an activation, unless it left it as it was."""
        if old is None or new is None or _alike(old, new):
            return
        entry = self._activations.setdefault(name, {"name": name, "kind": kind, "layer": layer, "stages": []})
        if not entry["stages"]:
            entry["stages"].append(_stage(self._listing, old))
        entry["stages"].append(_stage(listing, new))


def chosen_sites(graph: Graph) -> list[Site]:
    """Linears and convolutions of the first, middle and last layer; of a model without layers, evenly spaced ones."""
    found = [site for node in graph.calls(*_READERS) if (site := _site(graph, node)) is not None]
    layers = sorted({site.layer for site in found if site.layer is not None})
    if not layers:
        return found[:: -(-len(found) // _MOST_SITES)] if found else []
    wanted = {layers[0], layers[len(layers) // 2], layers[-1]}
    return [site for site in found if site.layer in wanted]


def _site(graph: Graph, reader: fx.Node) -> Site | None:
    constants = _constants_behind(reader.args[1])
    if not constants or not all(graph.constants[name].is_bound for name in constants):
        return None
    name = base_name(constants[0])
    return Site(name, layer_of(name), reader)


def _constants_behind(node: object) -> list[str]:
    """The constants that a weight is computed from, empty if it is computed from anything else too."""
    names: list[str] = []
    pending = [node]
    while pending:
        current = pending.pop(0)
        if not isinstance(current, fx.Node) or current.op not in ("get_attr", "call_function"):
            return []
        if current.op == "get_attr":
            names.append(str(current.target))
        elif not current.all_input_nodes:
            return []
        pending += current.all_input_nodes
    return names


def _distinct(sites: list[Site]) -> list[Site]:
    """One site for each value that is read: what queries, keys and values read is one thing."""
    return list({site.reader.args[0]: site for site in reversed(sites)}.values())[::-1]


def _keys(graph: Graph) -> dict[str, int]:
    """The first, middle and last attention, by name, with their numbers."""
    nodes = graph.calls(torch.ops.qcompile.attention.default)
    places = sorted({0, len(nodes) // 2, len(nodes) - 1}) if nodes else []
    return {nodes[place].name: place for place in places}


def _quantizers(graph: Graph) -> int:
    return len(graph.calls(torch.ops.qcompile.dequantize_activation.default))


def _weight_key(graph: Graph, site: Site) -> str:
    return _key(graph, site.reader.args[1])


def _key(graph: Graph, value: Any) -> str:
    """Equal for equal values, whatever they are cast to."""
    if not isinstance(value, fx.Node):
        return str(value)
    if value.op == "get_attr":
        return uncast(graph.constants[str(value.target)]).key
    if value.target is aten.to.dtype:
        return _key(graph, value.args[0])
    return f"{value.target}({', '.join(_key(graph, argument) for argument in (*value.args, *value.kwargs.values()))})"


def _weight(graph: Graph, site: Site) -> Tensor:
    """The weight as the reader gets it; one is held at a time."""
    tensor: Tensor = _value(graph, site.reader.args[1])
    return tensor


def _value(graph: Graph, node: Any) -> Any:
    if node.op == "get_attr":
        return graph.constants[str(node.target)].materialize()
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: _value(graph, used))
    return call(node, args, kwargs)


def _alike(a: Distribution, b: Distribution) -> bool:
    """Whether two distributions are one but for the order in which floats were added."""
    numbers = [(item.low, item.high, item.moments.peak, item.moments.kurtosis, *item.channel_max) for item in (a, b)]
    largest = max(map(abs, numbers[0][:2]), default=0.0)
    return len(numbers[0]) == len(numbers[1]) and all(
        math.isclose(x, y, rel_tol=_NOISE, abs_tol=_NOISE * largest) for x, y in zip(*numbers, strict=True)
    )


def _stage(listing: str, found: Distribution) -> dict[str, Any]:
    return {
        "listing": listing,
        "histogram": {"low": _short(found.low), "high": _short(found.high), "counts": list(found.counts)},
        "channel_max": [_short(value) for value in found.channel_max],
        "max_over_rms": _short(found.moments.peak),
        "kurtosis": _short(found.moments.kurtosis),
    }


def _short(value: float) -> float | None:
    """Six significant digits; null for what is not finite."""
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
