"""Weights that are to be rounded, and what they compute with once they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from qcompile.ir.constants import Constant, Reshape, uncast
from qcompile.ir.graph import Graph
from qcompile.passes.base import PassContext
from qcompile.quant.format import QuantFormat
from qcompile.quant.reference import Quantized, restore

Parts = dict[str, Constant]
"""The packed tensors of one weight, by the names of `QuantFormat.parts`; and the bias beside it under `BIAS`, where rounding moved it."""
BIAS = "bias"
"""Float32 [N], in place of the bias of the convolution that reads the weight."""
RESIDUAL = "residual"
"""`Quantized.residual`, where the method keeps it: for a method that starts from its result."""


@dataclass(frozen=True, eq=False)
class Site:
    """A weight to be rounded, once for all that read it.

    Attributes:
        weight: the constant's name.
        constant: its most precise values, as a matrix [N, K]: a convolution's filters are rows.
        form: what to round to.
        readers: the nodes whose operand it is, in order.
        shape: what readers expect.
        rounding: the method it is rounded by, where that is not the one asked for.
    """

    weight: str
    constant: Constant
    form: QuantFormat
    readers: tuple[fx.Node, ...]
    shape: tuple[int, ...]
    rounding: str = ""

    @property
    def moment_reader(self) -> fx.Node | None:
        """The first reader if it is a linear: the second moment of what it reads says what an error in each column costs."""
        return self.readers[0] if self.readers[0].target is torch.ops.aten.linear.default else None


def make_site(graph: Graph, name: str, form: QuantFormat, readers: Sequence[fx.Node]) -> Site:
    """The site of the constant called `name`; filters of a convolution [N, C, ...] are flattened."""
    constant = uncast(graph.constants[name])
    rows, *rest = constant.shape
    matrix = constant.then(Reshape((rows, torch.Size(rest).numel()))) if len(rest) > 1 else constant
    return Site(name, matrix, form, tuple(readers), constant.shape)


@dataclass(frozen=True, eq=False)
class RestoredSource:
    """The float weight that packed parts stand for, made when it is asked for."""

    parts: Parts
    form: QuantFormat
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Float32."""
        return torch.float32

    @property
    def key(self) -> str:
        """The keys of the parts."""
        return f"restore({', '.join(constant.key for constant in self.parts.values())})"

    def load(self) -> Tensor:
        """Dequantize."""
        tensors = {part: constant.materialize() for part, constant in self.parts.items()}
        packed = Quantized(tensors["codes"], tensors["scale"], tensors.get("zero"), tensors.get("scale2"))
        return restore(packed, self.form, self.shape[1])


def is_linears_alone(graph: Graph, site: Site) -> bool:
    """Whether linears read the weight and nothing else does, so that another constant can take its place."""
    users = {user for node in graph.fx.find_nodes(op="get_attr", target=site.weight) for user in node.users}
    return users == set(site.readers) and all(user.target is torch.ops.aten.linear.default for user in users)


def restored(site: Site, parts: Parts) -> Constant:
    """What the site's readers compute with once it is rounded, in the shape that they expect."""
    constant = Constant(RestoredSource(parts, site.form, site.constant.shape))
    return constant if site.shape == site.constant.shape else constant.then(Reshape(site.shape))


def marked(parts: Mapping[str, Constant], form: QuantFormat) -> Parts:
    """The parts with their format, which the printer and the count of bits go by."""
    return {part: replace(constant, format=form) if part in form.parts else constant for part, constant in parts.items()}


Method = Callable[[Graph, Sequence[Site], PassContext], dict[str, Parts]]
"""Rounds all sites of a graph, which it leaves as it is, and returns the parts of each weight."""
