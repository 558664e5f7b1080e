"""Attention spelled out around a softmax becomes one `qcompile.attention`; a region is run beside it before it is replaced.

Recognised: `softmax(cap(q·kᵀ · scale) + bias) · v`, with a mask that is added or chosen by, scales on the scores or on q and k, heads that
are repeated, or grouped in five dimensions, and weights that are zeroed where a query sees nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.graph import Graph
from qcompile.passes.probing import Probe, UnknownValueError, symbols_of

aten = torch.ops.aten
attend = torch.ops.qcompile.attention.default

SOFTMAX = (aten.softmax.int, aten._softmax.default)
_CHOICES = (aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
_FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_VIEWS = (
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.permute.default, aten.transpose.int, aten.unsqueeze.default,
    aten.expand.default, aten.clone.default, aten.contiguous.default, aten.flatten.using_ints, aten.repeat_interleave.self_int,
)  # fmt: skip
_PRODUCTS = (aten.matmul.default, aten.bmm.default)
_CLOSE = 2e-5
"""Of the largest result, in float32."""


@dataclass
class Region:
    """What was found around a softmax.

    Attributes:
        softmax: its node.
        result: [B, H, S, D], what the attention replaces.
        scale: of the scores, without what q and k were scaled by.
        softcap: 0 for none.
        bias: what is added to scores.
        keep: which scores stay; others are `fill`.
        fill: the score of a key that is not seen, -inf where its weight is zeroed afterwards.
    """

    softmax: fx.Node
    result: fx.Node
    scores: fx.Node
    scale: float = 1.0
    softcap: float = 0.0
    bias: fx.Node | None = None
    keep: fx.Node | None = None
    fill: float = -math.inf
    operands: list[fx.Node] = field(default_factory=list)


def raise_attention(graph: Graph, softmax: fx.Node) -> fx.Node | None:
    """Replace the region around `softmax` by one attention, if it is one; the new node."""
    region = _region(graph, softmax)
    if region is None:
        return None
    sides = [list(_operands(graph, side, region.result)) for side in region.operands]
    for (q, by_q), (k, by_k), (v, by_v) in product(*sides):
        scale = region.scale * by_q * by_k
        if by_v != 1 or not _fit(region, q, k, v) or not _same(graph, region, (q, k, v), scale):
            continue
        bias = _bias(graph, region)
        made = graph.insert(region.result, attend, (q, k, v, None, bias, scale, False, 0, region.softcap), source=region.softmax)
        graph.replace(region.result, made)
        return made
    return None


def _region(graph: Graph, softmax: fx.Node) -> Region | None:
    value = softmax.meta["val"]
    if softmax.args[1] not in (-1, value.dim() - 1) or value.dim() not in (4, 5):
        return None
    below = _below(softmax)
    if below is None:
        return None
    product_node, result, zeroed = below
    region = Region(softmax, result, softmax.args[0])  # type: ignore[arg-type]
    region.operands = [product_node.args[1]]  # type: ignore[list-item]
    scores = _peeled(graph, region, softmax.args[0])
    if scores is None:
        return None
    region.operands = [scores.args[0], scores.args[1], *region.operands]  # type: ignore[list-item]
    if zeroed:
        region.fill = -math.inf
    return region


def _below(softmax: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
    """The product with values, the result of four dimensions, and whether weights of queries that see nothing are zeroed."""
    node, zeroed = softmax, False
    for _ in range(6):
        users = [user for user in node.users if user.target is not aten.isnan.default]
        if len(users) != 1:
            return None
        (user,) = users
        if user.target in _PRODUCTS and user.args[0] is node:
            result = _four(user)
            return None if result is None else (user, result, zeroed)
        if user.target in (*_CHOICES, *_FILLS):
            zeroed = True
        elif user.target not in (*_VIEWS, aten.dropout.default, aten.to.dtype):
            return None
        node = user
    return None


def _four(node: fx.Node) -> fx.Node | None:
    """The node itself, or the view behind it, of four dimensions."""
    if node.meta["val"].dim() == 4:
        return node
    (user, *others) = node.users
    return user if not others and user.target in _VIEWS and user.meta["val"].dim() == 4 else None


def _peeled(graph: Graph, region: Region, node: Any) -> fx.Node | None:
    """The product of queries and keys behind masks, caps and scales, which are noted from the outside in."""
    while isinstance(node, fx.Node) and node.target not in _PRODUCTS:
        inner = _unscaled(graph, region, node) or _unmasked(graph, region, node) or _uncapped(graph, region, node)
        if inner is None and node.target in (*_VIEWS, aten.to.dtype):
            inner = node.args[0]  # type: ignore[assignment]
        if inner is None:
            return None
        node = inner
    return node if isinstance(node, fx.Node) else None


def number(graph: Graph, value: Any) -> float | None:
    """A number, or a constant of one element."""
    if isinstance(value, int | float):
        return float(value)
    constant = graph.constant(value)
    if constant is None or math.prod(constant.shape) != 1 or not constant.is_bound:
        return None
    return float(constant.materialize().reshape(()))


def factor_of(graph: Graph, node: fx.Node) -> tuple[fx.Node, float] | None:
    """The x and the number of `x · number` or `x / number`."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar) or len(node.args) != 2:
        return None
    left, right = node.args
    divided = node.target in (aten.div.Tensor, aten.div.Scalar)
    for x, other in ((left, right),) if divided else ((left, right), (right, left)):
        found = number(graph, other)
        if found and isinstance(x, fx.Node) and graph.constant(x) is None:
            return x, 1 / found if divided else found
    return None


def _unscaled(graph: Graph, region: Region, node: fx.Node) -> fx.Node | None:
    found = factor_of(graph, node)
    if found is None or found[0].target is aten.tanh.default:
        return None
    region.scale *= found[1]
    return found[0]


def _unmasked(graph: Graph, region: Region, node: fx.Node) -> fx.Node | None:
    if region.bias is not None or region.keep is not None or region.scale != 1 or region.softcap:
        return None
    if node.target is aten.add.Tensor and len(node.args) == 2 and not node.kwargs:
        for scores, bias in (node.args, node.args[::-1]):
            if isinstance(scores, fx.Node) and isinstance(bias, fx.Node) and _is_scores(graph, scores):
                region.bias = bias
                return scores
    if node.target in _CHOICES:
        keep, scores, fill = node.args
        low = number(graph, fill)
        if isinstance(scores, fx.Node) and low is not None and low < -1e4 and isinstance(keep, fx.Node):
            region.keep, region.fill = keep, low
            return scores
    return None


def _is_scores(graph: Graph, node: fx.Node) -> bool:
    """Whether a product lies behind scales and caps."""
    for _ in range(8):
        if node.target in _PRODUCTS:
            return True
        found = factor_of(graph, node)
        if found is not None:
            node = found[0]
        elif node.target in (*_VIEWS, aten.tanh.default, aten.to.dtype):
            node = node.args[0]  # type: ignore[assignment]
        else:
            return False
    return False


def _uncapped(graph: Graph, region: Region, node: fx.Node) -> fx.Node | None:
    """The x of `cap · tanh(x / cap)`."""
    found = factor_of(graph, node)
    if found is None or found[0].target is not aten.tanh.default or region.scale != 1:
        return None
    region.softcap = found[1]
    region.scale = region.softcap  # the division inside is met next
    return found[0].args[0]  # type: ignore[return-value]


def _operands(graph: Graph, node: Any, result: fx.Node) -> Iterator[tuple[fx.Node, float]]:
    """Values of four dimensions behind views and scales of one side, the farthest first, each with the scale on the way."""
    found, scale = [], 1.0
    while isinstance(node, fx.Node):
        if node.meta["val"].dim() == 4 and str(node.meta["val"].shape[0]) == str(result.meta["val"].shape[0]):
            found.append((node, scale))
        scaled = factor_of(graph, node)
        if scaled is not None:
            node, scale = scaled[0], scale * scaled[1]
        elif node.target in _VIEWS:
            node = node.args[0]
        else:
            break
    return iter(found[::-1])


def _fit(region: Region, q: fx.Node, k: fx.Node, v: fx.Node) -> bool:
    """Shapes as the operator wants them: [B, H, S, D], [B, L, T, D], [B, L, T, D]."""
    (a, b, c), made = ([str(size) for size in node.meta["val"].shape] for node in (q, k, v)), region.result.meta["val"].shape
    keys = str(region.softmax.meta["val"].shape[-1])
    heads = q.meta["val"].shape[1], k.meta["val"].shape[1]
    return (
        all(isinstance(count, int) for count in heads) and heads[0] % heads[1] == 0 and b[1:3] == c[1:3] and a[3] == b[3] and b[2] == keys
        and [a[0], a[1], a[2], c[3]] == [str(size) for size in made] and a[0] == b[0] == c[0] and a[3].isdigit()
    )  # fmt: skip


def _same(graph: Graph, region: Region, operands: tuple[fx.Node, fx.Node, fx.Node], scale: float) -> bool:
    """Whether the region gives what the operator gives, on normal numbers and a mask of any kind."""
    sizes = {symbol: 3 + 2 * index for index, symbol in enumerate(sorted(set().union(*map(symbols_of, (region.softmax, *operands)))))}
    generator = torch.Generator().manual_seed(0)
    probe = Probe(graph, sizes, {})
    try:
        given: dict[fx.Node, Tensor] = {}
        for node in operands:
            if node not in given:
                given[node] = torch.randn(probe.shape(node), generator=generator)
        bias = None
        if region.bias is not None:
            bias = given[region.bias] = torch.randn(probe.shape(region.bias), generator=generator)
        if region.keep is not None:
            keep = given[region.keep] = torch.rand(probe.shape(region.keep), generator=generator) < 0.7
            keep[..., 0] = True
            bias = torch.zeros(keep.shape).masked_fill(~keep, region.fill)
        found = Probe(graph, sizes, given).value(region.result)
    except UnknownValueError:
        return False
    q, k, v = (given[node] for node in operands)
    wanted = attend(q, k, v, None, bias, scale, False, 0, region.softcap)
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= _CLOSE * wanted.abs().max())


def _bias(graph: Graph, region: Region) -> fx.Node | None:
    """The mask as numbers to add; one choice serves all layers that make the same."""
    if region.keep is None:
        return region.bias
    keep = region.keep
    for user in keep.users:
        if user.target is aten.where.Scalar and user.args == (keep, 0.0, region.fill):
            return user
    made = graph.insert(keep.next, aten.where.Scalar, (keep, 0.0, region.fill), source=keep)
    if made.meta["val"].dtype != torch.float32:
        return graph.insert(made.next, aten.to.dtype, (made, torch.float32), source=keep)
    return made


def raise_attentions(graph: Graph) -> int:
    """Every attention around a softmax, all of them; returns how many."""
    made = [raise_attention(graph, node) for node in graph.calls(*SOFTMAX)]
    graph.remove_dead()
    return sum(node is not None for node in made)


def group_heads(graph: Graph, node: fx.Node) -> bool:
    """Let an attention read queries, keys and values as they are before views that come to nothing, and before heads are repeated."""
    q, k, v = (_least(graph, node, operand) for operand in node.args[:3])
    if k.meta["val"].shape[1] != v.meta["val"].shape[1] or q.meta["val"].shape[1] != node.meta["val"].shape[1]:
        return False
    changed = (q, k, v) != node.args[:3]
    node.args = (q, k, v, *node.args[3:])
    return changed


def _least(graph: Graph, node: fx.Node, operand: Any) -> fx.Node:
    """The farthest value behind views that holds the same heads."""
    found = (before for before, scale in _operands(graph, operand, node) if scale == 1 and _repeats(graph, before, operand))
    return next(found, operand)


def _repeats(graph: Graph, before: fx.Node, after: fx.Node) -> bool:
    """Whether one is the other with each head several times in a row."""
    sizes = {symbol: 3 + 2 * index for index, symbol in enumerate(sorted(symbols_of(before) | symbols_of(after)))}
    if before is after:
        return True
    try:
        probe = Probe(graph, sizes, {})
        given = torch.randn(probe.shape(before), generator=torch.Generator().manual_seed(0))
        found = Probe(graph, sizes, {before: given}).value(after)
    except UnknownValueError:
        return False
    times, rest = divmod(int(found.shape[1]), int(given.shape[1]))
    return times > 0 and rest == 0 and torch.equal(found, given.repeat_interleave(times, 1))
