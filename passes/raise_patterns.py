"""Traced arithmetic is raised to the operators it means: norms, rotary positions, gated activations, attention."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompile.ir.graph import Graph
from qcompile.ir.matcher import Bindings, Either, Pattern, Var, call, first_match
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.raise_attention import SOFTMAX, raise_attention

aten = torch.ops.aten
qcompile = torch.ops.qcompile
Build = Callable[[Graph, fx.Node, Bindings], fx.Node | None]


@dataclass(frozen=True)
class RaisePatterns(Pass):
    """Raise rms_norm, rope, rotary tables, gated activations, tanh-gelu and fused attention from the ATen calls that spell them."""

    name: ClassVar[str] = "raise-patterns"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Each rule over all nodes; a rule may decline a match whose shapes do not fit, and leaves the calls as they are."""
        changed = False
        for rule in RULES:
            for node in graph.calls(*rule.roots):
                bound = first_match(rule.pattern, node)
                if bound is None or not ctx.spend():
                    continue
                raised = rule.build(graph, node, bound)
                if raised is not None:
                    graph.replace(node, raised)
                    changed = True
        for node in graph.calls(*SOFTMAX):
            changed |= ctx.spend() and raise_attention(graph, node) is not None
        if changed:
            graph.remove_dead()
        return changed


@dataclass(frozen=True)
class Rule:
    """Where to look (`roots`), what to find, and what to build from it."""

    roots: tuple[Any, ...]
    pattern: Pattern
    build: Build


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _node(name: str) -> Var:
    return Var(name, _is_node)


_MUL, _ADD = aten.mul.Tensor, aten.add.Tensor
_SQUARE = Either((
    call(aten.pow.Tensor_Scalar, _node("x"), 2), call(aten.square.default, _node("x")), call(_MUL, _node("x"), _node("x")),
))  # fmt: skip
_VARIANCE = call(_ADD, call(aten.mean.dim, _SQUARE, [-1], True), Var("eps", _is_number))
_NORMED = call(
    _MUL, _node("x"), Either((call(aten.rsqrt.default, _VARIANCE), call(aten.pow.Tensor_Scalar, _VARIANCE, -0.5))), commutes=True
)
_GAIN = Either((call(_ADD, _node("weight"), Var("offset", _is_number)), _node("weight")))
"""Gemma's gain is (1 + weight)."""


def _rms_norm(graph: Graph, node: fx.Node, bound: Bindings) -> fx.Node | None:
    weight = bound.get("weight")
    width = bound["x"].meta["val"].shape[-1]
    if weight is not None and tuple(weight.meta["val"].shape) != (width,):
        return None
    return graph.insert(
        node, qcompile.rms_norm.default, (bound["x"], weight, float(bound["eps"]), float(bound.get("offset", 0.0))), source=node
    )


def _fused_rms_norm(graph: Graph, node: fx.Node, bound: Bindings) -> fx.Node | None:
    """Torch's own operator, such as `torch.nn.RMSNorm` calls; the front end has given it an epsilon."""
    x, axes, weight, eps = (*bound["node"].args, None, None)[:4]
    if len(axes) != 1 or eps is None:
        return None
    return graph.insert(node, qcompile.rms_norm.default, (x, weight, float(eps), 0.0), source=node)


_HALF_TURN = call(
    aten.cat.default,
    [
        call(aten.neg.default, call(aten.slice.Tensor, _node("x"), Var("dim"), Var("middle"), Var("end"))),
        call(aten.slice.Tensor, _node("x"), Var("dim"), 0, Var("middle")),
    ],
    -1,
)
_PARTS = call(aten.split_with_sizes.default, _node("x"), Var("sizes"), Var("dim"))
_PARTS_TURN = call(
    aten.cat.default, [call(aten.neg.default, call(operator.getitem, _PARTS, 1)), call(operator.getitem, _PARTS, 0)], -1
)  # fmt: skip
_ROPE = call(
    _ADD,
    call(_MUL, _node("x"), call(aten.unsqueeze.default, _node("cos"), 1), commutes=True),
    call(_MUL, Either((_HALF_TURN, _PARTS_TURN)), call(aten.unsqueeze.default, _node("sin"), 1), commutes=True),
    commutes=True,
)


def _rope(graph: Graph, node: fx.Node, bound: Bindings) -> fx.Node | None:
    size = bound["x"].meta["val"].shape[-1]
    split = "sizes" in bound
    halves = list(bound["sizes"]) == [size // 2] * 2 if split else bound["middle"] * 2 == size and bound["end"] >= size
    whole = bound["dim"] in (-1, bound["x"].meta["val"].dim() - 1) and halves
    three = bound["cos"].meta["val"].dim() == 3 and bound["sin"].meta["val"].dim() == 3 and bound["cos"].meta["val"].shape[-1] == size
    if not whole or not three or bound["x"].meta["val"].dim() != 4:
        return None
    return graph.insert(node, qcompile.rope.default, (bound["x"], bound["cos"], bound["sin"]), source=node)


_VIEWS = (aten.unsqueeze.default, aten.expand.default, aten.slice.Tensor, aten.to.dtype, aten.reshape.default)
_ANGLE = Either((
    call(aten.transpose.int, call((aten.matmul.default, aten.bmm.default), _node("frequency"), _node("position")), 1, 2),
    call(_MUL, _node("position"), _node("frequency"), commutes=True),
))  # fmt: skip
_FIRST_HALF = call(aten.slice.Tensor, _node("table"), Var("dim"), 0, Var("middle"))
_TWICE = call(aten.cat.default, [Var("angle", _is_node), Var("angle", _is_node)], -1)


def _table_pattern(function: Any) -> Pattern:
    wave = call(function, _TWICE)
    return Either((call(_MUL, wave, Var("scaling", _is_number)), wave))


def _rotary_table(index: int) -> Build:
    def build(graph: Graph, node: fx.Node, bound: Bindings) -> fx.Node | None:
        found = (_angle_parts(graph, inner) for inner in _ANGLE.match(bound["angle"], {}))
        parts = next((pair for pair in found if pair is not None), None)
        if parts is None:
            return None
        position, frequency = parts
        table = _shared_table(graph, position, frequency, float(bound.get("scaling", 1.0)), bound["angle"])
        return graph.insert(node, operator.getitem, (table, index), source=node)

    return build


def _half_table(graph: Graph, node: fx.Node, bound: Bindings) -> fx.Node | None:
    """The same number twice of one cosine or sine per frequency."""
    for index, function in enumerate((aten.cos.default, aten.sin.default)):
        wave = call(function, _node("angle"))
        found = first_match(Either((call(_MUL, wave, Var("scaling", _is_number)), wave)), bound["half"])
        if found is not None:
            return _rotary_table(index)(graph, node, found)
    return None


def _whole_table(graph: Graph, node: fx.Node, bound: Bindings) -> fx.Node | None:
    """A table whose first half is there twice is the table: its halves are the same."""
    del graph
    table = bound["table"]
    is_table = table.target is operator.getitem and table.args[0].target is qcompile.rotary_table.default
    return table if is_table and bound["middle"] * 2 == table.meta["val"].shape[-1] and bound["dim"] in (-1, 2) else None


def _angle_parts(graph: Graph, inner: Bindings) -> tuple[fx.Node, fx.Node] | None:
    """Integer positions [B, S] and constant frequencies [F] behind an outer product, or None if it is something else."""
    position, frequency = _through_views(inner["position"]), _through_views(inner["frequency"])
    constant, value = graph.constant(frequency), position.meta["val"]
    if constant is None or len(constant.shape) != 1 or value.dim() != 2 or value.dtype.is_floating_point:
        return None
    batch, length = map(str, value.shape)
    column, row = [batch, "1", length], [batch, length, "1"]  # in a matmul, in a broadcast product
    shape = [str(size) for size in inner["position"].meta["val"].shape]
    return (position, frequency) if shape in (column, row) else None


def _through_views(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and node.target in _VIEWS:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _shared_table(graph: Graph, position: fx.Node, frequency: fx.Node, scaling: float, angle: fx.Node) -> fx.Node:
    """One table per (positions, frequencies, scaling): the cosine and the sine find the same call."""
    wanted = (position, frequency, scaling, angle.meta["val"].dtype)
    for found in graph.calls(qcompile.rotary_table.default):
        if found.args == wanted:
            return found
    after = next(iter(angle.users))
    return graph.insert(after, qcompile.rotary_table.default, wanted, source=angle)


_ACTIVATION_NAMES: dict[Any, str] = {aten.silu.default: "silu", aten.relu.default: "relu", aten.gelu.default: "gelu"}
_GATE = call(_MUL, call(tuple(_ACTIVATION_NAMES), _node("gate"), rest=True, name="activation"), _node("up"), commutes=True)


def activation_name(node: fx.Node) -> str | None:
    """The name in `ops.ACTIVATIONS` of an activation call, or None."""
    target: Any = node.target
    name = _ACTIVATION_NAMES.get(target)
    if name == "gelu":
        approximate = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
        return "gelu_tanh" if approximate == "tanh" else "gelu"
    return name


def _gated(graph: Graph, node: fx.Node, bound: Bindings) -> fx.Node | None:
    gate, up = bound["gate"].meta["val"], bound["up"].meta["val"]
    if [str(size) for size in gate.shape] != [str(size) for size in up.shape] or len(bound["activation"].users) > 1:
        return None
    return graph.insert(
        node, qcompile.gated_activation.default, (bound["gate"], bound["up"], activation_name(bound["activation"])), source=node
    )


_CUBE = call(aten.pow.Tensor_Scalar, _node("x"), 3.0)
_TANH = call(
    aten.tanh.default,
    call(_MUL, call(_ADD, _node("x"), call(_MUL, _CUBE, Var("cubic", _is_number)), commutes=True), Var("root", _is_number)),
)
_GELU = call(_MUL, call(_MUL, _node("x"), 0.5), call(_ADD, _TANH, 1.0), commutes=True)


def _tanh_gelu(graph: Graph, node: fx.Node, bound: Bindings) -> fx.Node | None:
    if abs(bound["cubic"] - 0.044715) > 1e-9 or abs(bound["root"] - (2 / torch.pi) ** 0.5) > 1e-9:
        return None
    return graph.insert(node, aten.gelu.default, (bound["x"],), {"approximate": "tanh"}, source=node)


def _attention(graph: Graph, node: fx.Node, bound: Bindings) -> fx.Node | None:
    """A fused attention call; a boolean mask becomes the bias 0 or -inf, dropout must be off."""
    del bound
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    options: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    q, k, v, mask = options["query"], options["key"], options["value"], options.get("attn_mask")
    values = [item.meta["val"] for item in (q, k, v)]
    if options.get("dropout_p") or any(value.dim() != 4 for value in values) or not isinstance(values[0].shape[-1], int):
        return None
    if mask is not None:
        mask = _additive(graph, node, mask)
    scale = options.get("scale")
    scale = float(scale) if scale is not None else float(values[0].shape[-1]) ** -0.5
    return graph.insert(node, qcompile.attention.default, (q, k, v, None, mask, scale, bool(options.get("is_causal", False))), source=node)


def _additive(graph: Graph, node: fx.Node, mask: fx.Node) -> fx.Node:
    value: Tensor = mask.meta["val"]
    if value.dtype != torch.bool:
        return mask
    zeros = graph.insert(node, aten.zeros_like.default, (mask,), {"dtype": torch.float32}, source=node)
    blocked = graph.insert(node, aten.logical_not.default, (mask,), source=node)
    return graph.insert(node, aten.masked_fill.Scalar, (zeros, blocked, float("-inf")), source=node)


RULES: tuple[Rule, ...] = (
    # With a gain before without: the bare norm is inside the other.
    Rule((_MUL,), call(_MUL, _NORMED, _GAIN, commutes=True), _rms_norm),
    Rule((_MUL,), _NORMED, _rms_norm),
    Rule((aten.rms_norm.default,), Var("node"), _fused_rms_norm),
    Rule((_ADD,), _ROPE, _rope),
    Rule((_MUL,), _table_pattern(aten.cos.default), _rotary_table(0)),
    Rule((_MUL,), _table_pattern(aten.sin.default), _rotary_table(1)),
    Rule((aten.cos.default,), call(aten.cos.default, _TWICE), _rotary_table(0)),
    Rule((aten.sin.default,), call(aten.sin.default, _TWICE), _rotary_table(1)),
    Rule((aten.cat.default,), call(aten.cat.default, [Var("half", _is_node), Var("half", _is_node)], -1), _half_table),
    Rule((aten.cat.default,), call(aten.cat.default, [_FIRST_HALF, _FIRST_HALF], -1), _whole_table),
    Rule((_MUL,), _GELU, _tanh_gelu),
    Rule((_MUL,), _GATE, _gated),
    Rule((aten.scaled_dot_product_attention.default,), Var("node"), _attention),
)
