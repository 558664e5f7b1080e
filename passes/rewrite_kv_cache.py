"""Models are traced without a cache; this pass gives them one that the compiler owns."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from qcompile.errors import UnsupportedModelError
from qcompile.ir.graph import Graph, Interface
from qcompile.ir.structure import template_of
from qcompile.ir.verify import where
from qcompile.passes.base import Pass, PassContext

qcompile = torch.ops.qcompile
_EXAMPLE_PAGE_TOKENS = 8


@dataclass(frozen=True)
class RewriteKvCache(Pass):
    """Turn each causal attention of a language model into cache_append + cache_attend over a page-addressed cache.

    The graph then takes `input_ids`, `positions` [B, S] (-1 = padding, not stored, attends to nothing), `page_table`
    int32 [B, pages], and per layer `keys_i`, `values_i` [P, L, R, D] (uint8 [P, L, R, W] where the format packs them), and returns
    logits and the new keys and values.
    """

    name: ClassVar[str] = "rewrite-kv-cache"

    def is_exact(self, ctx: PassContext) -> bool:
        """Exact iff keys and values are stored in the dtype they are computed in."""
        return not ctx.target.scheme.cache.is_packed and ctx.target.cache_dtype == ctx.target.compute

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """All layers or none: a cache that only some layers use would be a wrong program."""
        layers = graph.calls(qcompile.attention.default)
        if graph.interface.kind != "causal_lm" or not layers:
            return False
        for node in layers:
            _require_cacheable(node)
        positions, page_table, symbols = _new_inputs(graph)
        states = [_rewrite_layer(graph, node, index, positions, page_table, symbols, ctx) for index, node in enumerate(layers)]
        _replace_positions(graph, positions)
        _require_no_mask(graph)
        _new_interface(graph, states)
        graph.remove_dead()
        return True


def _option(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _require_cacheable(node: fx.Node) -> None:
    if not _option(node, 6, "causal", False):
        raise UnsupportedModelError(
            f"rewrite-kv-cache: {where(node)}: expected causal attention in a language model, got attention in both "
            "directions; compile the module with example_inputs instead"
        )
    if _option(node, 4, "bias", None) is not None:
        raise UnsupportedModelError(
            f"rewrite-kv-cache: {where(node)}: expected causal, window and padding masks only, got an additive bias; such a "
            "cache is not served yet, use a target on the module with example_inputs"
        )


def _new_inputs(graph: Graph) -> tuple[fx.Node, fx.Node, dict[str, Any]]:
    """Placeholders for positions and the page table, and symbols for pages, pages per sequence, and tokens per page."""
    names = {node.name: node for node in graph.placeholders}
    ids = names["input_ids"]
    probe = torch.empty(5, 3, 7, device="meta")
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 3)
    from torch._dynamo.source import ConstantSource

    sizes = graph.mode.from_tensor(probe, symbolic_context=context, source=ConstantSource("cache")).shape
    symbols = dict(zip(("pages", "pages_per_sequence", "page_tokens"), sizes, strict=True))
    graph.interface.symbols |= {str(size): name for name, size in symbols.items()}
    value: Tensor = ids.meta["val"]
    with graph.mode:
        table = torch.empty((value.shape[0], symbols["pages_per_sequence"]), dtype=torch.int32)
        places = torch.empty_like(value)
    positions = _placeholder(graph, "positions", places)
    return positions, _placeholder(graph, "page_table", table), symbols


def _placeholder(graph: Graph, name: str, value: Tensor) -> fx.Node:
    last = graph.placeholders[-1]
    with graph.fx.inserting_after(last):
        node = graph.fx.placeholder(name)
    node.meta |= {"val": value, "source": "", "passes": (graph.current_pass,) if graph.current_pass else ()}
    return node


def _rewrite_layer(
    graph: Graph, node: fx.Node, index: int, positions: fx.Node, page_table: fx.Node, symbols: dict[str, Any], ctx: PassContext
) -> tuple[fx.Node, fx.Node]:
    q, k, v = node.args[:3]
    forms = ctx.target.scheme.cache.forms
    if forms:
        k, v = (
            graph.insert(node, qcompile.pack_vectors.default, (part, form), source=node) for part, form in zip((k, v), forms, strict=True)
        )
    states = []
    for name, part in (("keys", k), ("values", v)):
        _, heads, _, size = part.meta["val"].shape  # type: ignore[union-attr]
        with graph.mode:
            dtype = torch.uint8 if forms else ctx.target.cache_dtype
            value = torch.empty((symbols["pages"], heads, symbols["page_tokens"], size), dtype=dtype)
        states.append(_placeholder(graph, f"{name}_{index}", value))
    appended = graph.insert(node, qcompile.cache_append.default, (*states, k, v, page_table, positions), source=node)
    keys, values = (graph.insert(node, operator.getitem, (appended, part), source=node) for part in (0, 1))
    options = tuple(_option(node, place, name, default) for place, name, default in _ATTEND_OPTIONS)
    attend = qcompile.cache_attend.default
    if forms:
        attend, options = qcompile.cache_attend_packed.default, (*forms, *options)
    attended = graph.insert(node, attend, (q, keys, values, page_table, positions, *options), source=node)
    graph.replace(node, attended)
    return keys, values


_ATTEND_OPTIONS = ((5, "scale", 1.0), (7, "window", 0), (8, "softcap", 0.0), (9, "sinks", None))


def _replace_positions(graph: Graph, positions: fx.Node) -> None:
    """Rotary tables take -1 as it is; everything else (learned positions) sees padding at 0."""
    old = next((node for node in graph.placeholders if node.name == "position_ids"), None)
    if old is None:
        return
    others = [user for user in old.users if user.target is not qcompile.rotary_table.default]
    if others:
        last = graph.placeholders[-1]
        real = graph.insert(last.next, torch.ops.aten.clamp_min.default, (positions, 0), source=old)
        for user in others:
            user.replace_input_with(old, real)
    old.replace_all_uses_with(positions)


def _require_no_mask(graph: Graph) -> None:
    """Whatever still reads the mask would see padding that the cache knows nothing of."""
    graph.remove_dead()
    mask = next((node for node in graph.placeholders if node.name == "attention_mask"), None)
    ids = next(node for node in graph.placeholders if node.name == "input_ids")
    if mask is None:
        return
    for user in list(mask.users):
        if user.target is torch.ops.aten.sym_size.int:  # the same batch and sequence as the token ids
            user.replace_input_with(mask, ids)
    if mask.users:
        user = next(iter(mask.users))
        raise UnsupportedModelError(
            f"rewrite-kv-cache: {where(user)}: expected attention_mask to be read by attention only, got {user.target}; "
            "this model cannot be given a cache"
        )


def _new_interface(graph: Graph, states: list[tuple[fx.Node, fx.Node]]) -> None:
    for node in graph.placeholders:
        if node.name in ("attention_mask", "position_ids") and not node.users:
            graph.fx.erase_node(node)
    logits = graph.output.args[0][0]  # type: ignore[index]
    graph.output.args = ((logits, *(keys for keys, _ in states), *(values for _, values in states)),)
    names = [node.name for node in graph.placeholders]
    layers = range(len(states))
    leaf = {name: {"leaf": index} for index, name in enumerate(names)}
    inputs: dict[str, Any] = {"input_ids": leaf["input_ids"], "positions": leaf["positions"], "page_table": leaf["page_table"]}
    inputs |= {part: {"list": [leaf[f"{part}_{index}"] for index in layers]} for part in ("keys", "values")}
    outputs, _ = template_of({"logits": logits, "keys": [keys for keys, _ in states], "values": [values for _, values in states]})
    examples = _examples(graph)
    template = {"tuple": [{"tuple": []}, {"dict": inputs}]}
    graph.interface = Interface(template, outputs, examples, graph.interface.symbols, "cached_lm")


def _examples(graph: Graph) -> dict[str, Tensor]:
    """The old example tokens before an empty cache; padding is at position -1."""
    ids, mask = graph.interface.examples["input_ids"], graph.interface.examples["attention_mask"]
    batch, length = ids.shape
    pages = -(-length // _EXAMPLE_PAGE_TOKENS)
    examples = {
        "input_ids": ids,
        "positions": (mask.cumsum(-1) - 1).masked_fill(mask == 0, -1),
        "page_table": torch.arange(batch * pages, dtype=torch.int32).view(batch, pages),
    }
    for node in graph.placeholders:
        if node.name.startswith(("keys_", "values_")):
            value = node.meta["val"]
            examples[node.name] = torch.zeros(batch * pages, value.shape[1], _EXAMPLE_PAGE_TOKENS, value.shape[3], dtype=value.dtype)
    return examples
