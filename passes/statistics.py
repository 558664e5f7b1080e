"""Statistics of activations on demand: measured once per graph, kept on disk, and carried along when a basis changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from qcompile.errors import PassError
from qcompile.ir.constants import Constant, tensor_constant
from qcompile.ir.graph import Graph, fake_value
from qcompile.passes.calibration import Calibration, batches
from qcompile.passes.collectors import COLLECTORS, Collector, channels_last
from qcompile.passes.execution import Execution, Limits, Progress
from qcompile.passes.stream import real_rows
from qcompile.passes.work import WorkStore, content_key

_CONVOLUTIONS = (torch.ops.aten.conv1d.default, torch.ops.aten.conv2d.default, torch.ops.aten.conv3d.default)
_PARAMETERS = {"sample": 4096.0, "percentile": 0.999}


@dataclass(frozen=True)
class Request:
    """One statistic of one value.

    Attributes:
        node: name of the value.
        kind: `second_moment` [K, K] (XᵀX / tokens), `absmax` [K], `absmean` [K], `range` [2, K], `percentile` [K] (of magnitudes),
            `sample` [rows, K]; all float32, without padding tokens.
        parameter: rows of a sample (0: 4096), or the share of a percentile (0: 0.999).
        axis: of the channels; None is the last one, or 1 for values beside a convolution.
    """

    node: str
    kind: str
    parameter: float = 0.0
    axis: int | None = None

    def __str__(self) -> str:
        return f"{self.kind}({self.parameter:g}) of {self.node}{'' if self.axis is None else f' axis {self.axis}'}"


class Basis(Protocol):
    """A change of basis of `size` channels."""

    @property
    def size(self) -> int:
        """Channels."""

    def apply(self, tensor: Tensor, axis: int, *, contravariant: bool = False) -> Tensor:
        """T (or its inverse transpose) along an axis."""


class Measured(Mapping[Request, Tensor]):
    """Results by request, read from where they are kept when asked for."""

    def __init__(self, results: Mapping[Request, Constant]) -> None:
        """Hand out these."""
        self._results = results

    def __getitem__(self, request: Request) -> Tensor:
        return self._results[request].materialize()

    def __iter__(self) -> Iterator[Request]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)


class Statistics:
    """What has been measured, by graph fingerprint and request; kept in files of `work` if there is one, else in memory."""

    def __init__(self, work: WorkStore | None = None) -> None:
        """Start with nothing in memory."""
        self._work = work
        self._known: dict[str, dict[str, dict[Request, Constant]]] = {}
        """By the graph's fingerprint, then by the key of the data."""

    def measure(
        self, graph: Graph, calibration: Calibration, requests: Iterable[Request], *, limits: Limits | None = None,
        progress: Progress | None = None,
    ) -> Measured:  # fmt: skip
        """The statistics asked for, in one run over the data for all that are not known yet.

        Raises:
            PassError: for a value or a statistic that does not exist.
            SourceError: if the calibration data is not what the graph takes.
        """
        wanted = list(dict.fromkeys(requests))
        for request in wanted:
            if request.kind not in COLLECTORS:
                raise PassError(f"statistics: expected one of {', '.join(COLLECTORS)}, got {request.kind!r} for {request.node}")
        known = self._known.setdefault(graph.fingerprint(), {}).setdefault(calibration.key, {})
        missing = [request for request in wanted if request not in known]
        if missing:
            store = None if self._work is None else self._work.part(f"statistics {content_key(graph)} {calibration.key}")
            missing = [request for request in missing if not _recall(store, request, known)]
        if missing:
            _measure(graph, calibration, missing, known, store, limits, progress)
        return Measured({request: known[request] for request in wanted})

    def rebase(self, before: str, graph: Graph, values: Iterable[tuple[str, int, bool]], basis: Basis) -> None:
        """Carry what was measured on the graph of fingerprint `before` over to `graph`, which differs from it by a change of basis.

        Args:
            before: taken before the change.
            graph: after the change.
            values: name, axis and variance (True for the inverse transpose) of each value that is now in the new basis.
            basis: the map T; second moments become T·H·Tᵀ and samples X·Tᵀ, maxima and means of these values are forgotten.
        """
        axes = {name: (axis, contravariant) for name, axis, contravariant in values}
        after = self._known.setdefault(graph.fingerprint(), {})
        for key, results in list(self._known.get(before, {}).items()):
            moved = {}
            for request, result in results.items():
                if request.node not in axes:
                    moved[request] = result
                elif request.kind in ("second_moment", "sample") and _on_features(graph, request, axes[request.node][0], basis):
                    moved[request] = tensor_constant(_mapped(result.materialize(), request.kind, basis, axes[request.node][1]))
            after.setdefault(key, {}).update(moved)


def feature_axis(node: fx.Node) -> int:
    """The axis of the channels: 1 for what a convolution reads or makes, else the last one."""
    beside = any(other.target in _CONVOLUTIONS for other in (node, *node.users))
    behind = fake_value_dims(node) >= 3 and any(used.target in _CONVOLUTIONS for used in node.all_input_nodes)
    return 1 if beside or behind else -1


def fake_value_dims(node: fx.Node) -> int:
    """Dimensions of the node's value; 0 where it is no tensor."""
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else 0


def _recall(store: WorkStore | None, request: Request, known: dict[Request, Constant]) -> bool:
    found = None if store is None else store.get(str(request))
    if found is not None:
        known[request] = found["result"]
    return found is not None


def _measure(
    graph: Graph, calibration: Calibration, requests: Sequence[Request], known: dict[Request, Constant], store: WorkStore | None,
    limits: Limits | None, progress: Progress | None,
) -> None:  # fmt: skip
    nodes = {node.name: node for node in graph.nodes}
    observers: dict[str, _Observer] = {}
    for request in requests:
        if request.node not in nodes:
            raise PassError(f"statistics: expected a value of the graph, got {request.node!r}; name a node as the listing shows it")
        axis = feature_axis(nodes[request.node]) if request.axis is None else request.axis
        size = fake_value(nodes[request.node]).shape[axis]
        collector = COLLECTORS[request.kind](int(size), request.parameter or _PARAMETERS.get(request.kind, 0.0))
        observers.setdefault(request.node, _Observer(known, store)).collect(request, collector, axis)
    with Execution(graph, batches(calibration, graph), [], observers=observers, limits=limits, progress=progress, narrow=True) as execution:
        execution.observe()


class _Observer:
    """Feeds the collectors of one value and keeps their results."""

    def __init__(self, known: dict[Request, Constant], store: WorkStore | None) -> None:
        self.cost = 0
        self._known, self._store = known, store
        self._collectors: list[tuple[Request, Collector, int]] = []

    def collect(self, request: Request, collector: Collector, axis: int) -> None:
        self._collectors.append((request, collector, axis))
        self.cost += collector.bytes()

    def add(self, value: Any, real: Tensor | None) -> None:
        for _, collector, axis in self._collectors:
            collector.add(real_rows(channels_last(value, axis), real))

    def finish(self) -> None:
        for request, collector, _ in self._collectors:
            result = collector.result()
            kept = None if self._store is None else self._store.put(str(request), {"result": result})
            self._known[request] = tensor_constant(result) if kept is None else kept["result"]
        self._collectors.clear()


def _on_features(graph: Graph, request: Request, axis: int, basis: Basis) -> bool:
    """Whether the change was on the axis that was measured, and on all of it."""
    node = next((node for node in graph.nodes if node.name == request.node), None)
    if node is None:
        return False
    dims = fake_value_dims(node)
    measured = feature_axis(node) if request.axis is None else request.axis
    return dims > 0 and measured % dims == axis % dims and fake_value(node).shape[measured] == basis.size


def _mapped(result: Tensor, kind: str, basis: Basis, contravariant: bool) -> Tensor:
    """In float64: a moment's largest entry would drown the others in a rounding error of float32."""
    wide = basis.apply(result.double(), 1, contravariant=contravariant)
    if kind == "second_moment":
        wide = basis.apply(wide, 0, contravariant=contravariant)
    return wide.float()
