"""Graphs built node by node in float64: a thousand of them in the time one model is traced in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.ir.graph import Graph, Interface

aten, qcompile = torch.ops.aten, torch.ops.qcompile
BATCH, TOKENS = 2, 5


class Builder:
    """A graph of one input x [2, 5, width]; constants are drawn from a seed."""

    def __init__(self, width: int, seed: int = 0) -> None:
        self._random = torch.Generator().manual_seed(seed)
        example = self.random(BATCH, TOKENS, width)
        self.graph = Graph(fx.Graph(), {}, Interface({"leaf": 0}, {"tuple": []}, {"x": example}), FakeTensorMode())
        self.x = self.graph.fx.placeholder("x")
        self.x.meta["val"] = self.graph.mode.from_tensor(example)
        self._end = self.graph.fx.output(())

    def random(self, *shape: int) -> Tensor:
        """A standard normal tensor."""
        return torch.randn(shape, generator=self._random, dtype=torch.float64)

    def constant(self, *shape: int, positive: bool = False) -> fx.Node:
        """A random constant; matrices have rows of about unit length."""
        value = self.random(*shape) / (shape[-1] ** 0.5 if len(shape) > 1 else 1)
        return self.graph.add_constant("constant", value.abs() + 0.5 if positive else value)

    def call(self, operator: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """One more node."""
        return self.graph.insert(self._end, operator, args, kwargs)

    def linear(self, x: fx.Node, width: int, *, bias: bool = True) -> fx.Node:
        """A linear with random weights."""
        weight = self.constant(width, x.meta["val"].shape[-1])
        return self.call(aten.linear.default, x, weight, *([self.constant(width)] if bias else []))

    def heads(self, x: fx.Node, count: int) -> fx.Node:
        """[B, S, count·D] to [B, count, S, D]."""
        apart = self.call(aten.reshape.default, x, [BATCH, TOKENS, count, -1])
        return self.call(aten.transpose.int, apart, 1, 2)

    def attend(self, x: fx.Node, heads: int, groups: int, size: int, *, rotary: bool = False) -> fx.Node:
        """Attention of `heads` query heads over `groups` key/value heads of `size` channels: [B, S, heads·size]."""
        q, k, v = (self.heads(self.linear(x, count * size), count) for count in (heads, groups, groups))
        if rotary:
            positions = self.graph.add_constant("positions", torch.arange(TOKENS).repeat(BATCH, 1))
            table = self.call(qcompile.rotary_table.default, positions, self.constant(size // 2, positive=True), 1.0, torch.float64)
            cos, sin = (self.call(torch.ops.aten.mul.Scalar, self._item(table, part), 1.0) for part in (0, 1))
            q, k = (self.call(qcompile.rope.default, item, cos, sin) for item in (q, k))
        mixed = self.call(qcompile.attention.default, q, k, v, None, None, 0.5, True)
        back = self.call(aten.transpose.int, mixed, 1, 2)
        return self.call(aten.reshape.default, back, [BATCH, TOKENS, heads * size])

    def _item(self, node: fx.Node, place: int) -> fx.Node:
        import operator

        return self.call(operator.getitem, node, place)

    def finish(self, *outputs: fx.Node) -> Graph:
        """The graph with these outputs."""
        self._end.args = (tuple(outputs),)
        self.graph.interface.outputs = {"tuple": [{"leaf": place} for place in range(len(outputs))]}
        self.graph.remove_dead()
        self.graph.verify()
        return self.graph
