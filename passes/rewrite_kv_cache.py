"""Models are traced without a cache; this pass gives them one that the compiler owns."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from qcompile.errors import FormatError, UnsupportedModelError
from qcompile.ir.graph import CACHE_STATES, Graph, Interface
from qcompile.ir.ranked_ops import marks_width
from qcompile.ir.structure import template_of
from qcompile.ir.verify import where
from qcompile.passes.assign_kv_formats import assigned_forms
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.cache_tables import ATTEND_OPTIONS, CachedPair, make_tables, option
from qcompile.passes.rematerialize_kv import Rematerialized, plan_rematerialized
from qcompile.quant.cache_format import CacheFormat
from qcompile.quant.vector_format import vector_format
from qcompile.target import Target

qcompile = torch.ops.qcompile
_EXAMPLE_PAGE_TOKENS = 8
States = dict[str, fx.Node]
"""`keys`, `values` and so on -> what a layer's cache is after a step."""


@dataclass(frozen=True)
class RewriteKvCache(Pass):
    """Turn each causal attention of a language model into cache_append + cache_attend over a page-addressed cache.

    The graph then takes `input_ids`, `positions` [B, S] (-1 = padding, not stored, attends to nothing), `page_table`
    int32 [B, pages], and per layer `keys_i`, `values_i` [P, L, R, D] (uint8 [P, L, R, W] where the format packs them), and returns
    logits and the new keys and values. Where the format keeps tokens in 16 bits, with_recent, settle, retain and attend_settled take the
    place of both, with `slots` int32 [B] and per layer `recent_keys_i`, `recent_values_i` [C, L, N, D] (`qcompile/ir/retention_ops.py`);
    where it ranks tokens, attend_ranked packs them too (`qcompile/ir/ranked_ops.py`). `sources_i` [P, 1, R, W], and
    `recent_sources_i` [C, 1, N, K], stand for keys and values that are rematerialized (`passes/rematerialize_kv.py`).
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
        cache = ctx.target.scheme.cache
        _require_room(cache, ctx.max_context)
        pairs = [_stored_pair(node, index, cache) for index, node in enumerate(layers)]
        made = plan_rematerialized(graph, layers, ctx) if cache.rematerialized else [""] * len(layers)
        tables = make_tables(graph, pairs, ctx)  # before inputs change: the data is that of a model without a cache
        shared = _new_inputs(graph, ctx.target)
        states = [_Layer(graph, *layer, index, shared).rewrite(ctx) for index, layer in enumerate(zip(pairs, tables, made, strict=True))]
        _return_states(graph, states)
        _replace_positions(graph, shared.positions)
        _require_no_mask(graph)
        _new_interface(graph, states)
        graph.remove_dead()
        return True


def _require_room(cache: CacheFormat, tokens: int) -> None:
    """A cache that packs nothing would take more room than one of numbers."""
    policy = cache.retention
    if cache.is_packed and policy.settled(tokens) <= policy.first:
        raise FormatError(
            f"rewrite-kv-cache: cache {cache.name}: expected max_context of at least {policy.first + policy.recent + policy.group}, got "
            f"{tokens}, in which no token would be packed: the first {policy.first} and the last {policy.recent} stay in 16 bits, and "
            f"{policy.group} are packed at once; raise it, lower cache_sinks or cache_window, or choose kv16 or kv8"
        )


def _require_cacheable(node: fx.Node) -> None:
    if not option(node, 6, "causal", False):
        raise UnsupportedModelError(
            f"rewrite-kv-cache: {where(node)}: expected causal attention in a language model, got attention in both "
            "directions; compile the module with example_inputs instead"
        )
    if option(node, 4, "bias", None) is not None:
        raise UnsupportedModelError(
            f"rewrite-kv-cache: {where(node)}: expected causal, window and padding masks only, got an additive bias; such a "
            "cache is not served yet, use a target on the module with example_inputs"
        )


def _new_inputs(graph: Graph, target: Target) -> _Shared:
    """Placeholders for positions, the page table and, where tokens are kept as they came, sequences; symbols for the sizes of the cache."""
    names = {node.name: node for node in graph.placeholders}
    ids = names["input_ids"]
    names_of_sizes = ("pages", "pages_per_sequence", "page_tokens", *(("sequences",) if target.scheme.cache.retention.rows else ()))
    probe = torch.empty((5, 3, 7, 11)[: len(names_of_sizes)], device="meta")
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * len(names_of_sizes))
    from torch._dynamo.source import ConstantSource

    sizes = graph.mode.from_tensor(probe, symbolic_context=context, source=ConstantSource("cache")).shape
    symbols = dict(zip(names_of_sizes, sizes, strict=True))
    graph.interface.symbols |= {str(size): name for name, size in symbols.items()}
    value: Tensor = ids.meta["val"]
    with graph.mode:
        table = torch.empty((value.shape[0], symbols["pages_per_sequence"]), dtype=torch.int32)
        places = torch.empty_like(value)
        numbers = torch.empty(value.shape[0], dtype=torch.int32)
    positions, page_table = _placeholder(graph, "positions", places), _placeholder(graph, "page_table", table)
    slots = _placeholder(graph, "slots", numbers) if "sequences" in symbols else None
    return _Shared(positions, page_table, slots, symbols, target.scheme.cache, target.cache_dtype)


def _placeholder(graph: Graph, name: str, value: Tensor) -> fx.Node:
    last = graph.placeholders[-1]
    with graph.fx.inserting_after(last):
        node = graph.fx.placeholder(name)
    node.meta |= {"val": value, "source": "", "passes": (graph.current_pass,) if graph.current_pass else ()}
    return node


def _stored_pair(attention: fx.Node, index: int, cache: CacheFormat) -> CachedPair:
    """What a layer stores, and how.

    Raises:
        UnsupportedModelError: where keys cannot be kept before positions.
    """
    queries, keys, values = attention.args[:3]
    if cache.before_positions:
        keys = _turning(attention).args[0]
    assert isinstance(queries, fx.Node)
    assert isinstance(keys, fx.Node)
    assert isinstance(values, fx.Node)
    return CachedPair(attention, queries, keys, values, assigned_forms(attention) or cache.forms(index), cache.before_positions)


def _turning(attention: fx.Node) -> fx.Node:
    """The node that turns an attention's keys by their positions."""
    keys: Any = attention.args[1]
    table = keys.args[1].args[0] if keys.target is qcompile.rope.default else None
    if table is None or table.target is not qcompile.rotary_table.default:
        raise UnsupportedModelError(
            f"rewrite-kv-cache: {where(attention)}: expected rotary positions over whole heads for a cache of keys before positions, got "
            f"{attention.args[1]}; choose a cache of keys after positions, such as kv4-kivi, or cache_before_positions=False"
        )
    turning: fx.Node = keys
    return turning


@dataclass(frozen=True)
class _Shared:
    """What all layers read."""

    positions: fx.Node
    page_table: fx.Node
    slots: fx.Node | None
    symbols: dict[str, Any]
    cache: CacheFormat
    dtype: torch.dtype


@dataclass(frozen=True)
class _Layer:
    """One attention, and the nodes that replace it."""

    graph: Graph
    pair: CachedPair
    tables: tuple[list[fx.Node], list[fx.Node]]
    made: Rematerialized | str
    """What is cached in place of keys and values, or why these are."""
    index: int
    shared: _Shared

    @property
    def node(self) -> fx.Node:
        """The attention."""
        return self.pair.attention

    def rewrite(self, ctx: PassContext) -> States:
        """Let the attention read the cache; what it is stored in, by name, as it is afterwards."""
        options = tuple(option(self.node, place, name, default) for place, name, default in ATTEND_OPTIONS)
        if isinstance(self.made, Rematerialized):
            (attend, args, states), on_read = self.sources(self.made), self.made.on_read()
        elif self.shared.cache.is_ranked:
            (attend, args, states), on_read = self.ranked(), self._on_read()
        else:
            (attend, args, states), on_read = self.kept() if self.shared.cache.retention.rows else self.stored(), self._on_read()
        attended = self._call(attend, *args, *options, **on_read)
        if isinstance(self.made, str) and self.made:
            ctx.note(RewriteKvCache.name, attended.name, self.made, chosen=True)
        if isinstance(self.made, Rematerialized) and ctx.target.scheme.weight is not None:
            ctx.note(RewriteKvCache.name, attended.name, "the weights of its keys and values are read as numbers, not codes")
        if attend is qcompile.attend_ranked.default:
            results = [self._call(operator.getitem, attended, place) for place in range(5)]
            states |= dict(zip(("keys", "values", "marks", "recent_saliency"), results[1:], strict=True))
            attended = results[0]
        self.graph.replace(self.node, attended)
        return states

    def sources(self, made: Rematerialized) -> tuple[Any, tuple[Any, ...], States]:
        """What keys and values are made from goes into the pages, as one head: as in `stored`, or as in `kept`."""
        places, form = (self.shared.page_table, self.shared.positions), self.pair.forms[0]
        x = self._call(torch.ops.aten.unsqueeze.default, made.stored, 1)
        if self.shared.cache.retention.rows:
            exact, states = self._keep("sources", x, form)
            args = (self.pair.queries, states["sources"], exact, *places, form, *self._policy, *made.weights)
            return qcompile.attend_settled_sources.default, args, states
        packed = self._call(qcompile.pack_vectors.default, x, form)
        pages = self._pages("sources", packed, packed.meta["val"].shape[3], torch.uint8)
        stored = self._call(qcompile.cache_store.default, pages, packed, *places)
        return qcompile.attend_rematerialized.default, (self.pair.queries, stored, *places, form, *made.weights), {"sources": stored}

    def ranked(self) -> tuple[Any, tuple[Any, ...], States]:
        """As `kept`, but the operator that attends is the one that packs, by what it sees; its new states are its results."""
        shared, options, heads = self.shared, self._policy, int(self.pair.keys.meta["val"].shape[1])
        exact, states, pages = [], {}, []
        for name, part, text in zip(("keys", "values"), (self.pair.keys, self.pair.values), self.pair.forms, strict=True):
            rows = self._rows(f"recent_{name}", part, shared.cache.retention.rows)
            exact.append(self._call(qcompile.with_recent.default, rows, part, shared.slots))
            pages.append(self._pages(name, part, vector_format(text).width(int(part.meta["val"].shape[3])), torch.uint8))
            retained = (rows, exact[-1], shared.slots, shared.positions, *options)
            states[f"recent_{name}"] = self._call(qcompile.retain.default, *retained)
        symbols = shared.symbols
        pages.append(self._state("marks", (symbols["pages"], 1, symbols["page_tokens"], marks_width(heads)), torch.uint8))
        pages.append(self._state("recent_saliency", (symbols["sequences"], heads, shared.cache.retention.rows, 1), torch.float32))
        places = (shared.slots, shared.page_table, shared.positions)
        return qcompile.attend_ranked.default, (self.pair.queries, *pages, *exact, *places, *self.pair.forms, *options), states

    def stored(self) -> tuple[Any, tuple[Any, ...], States]:
        """Every token goes into the pages as it comes, packed or not: the operator that attends, its first arguments, the new states."""
        k, v = self.pair.keys, self.pair.values
        forms = self.pair.forms
        if forms:
            k, v = (
                self._call(qcompile.pack_vectors.default, part, form, *_given(tables))
                for part, form, tables in zip((k, v), forms, self.tables, strict=True)
            )
        dtype = torch.uint8 if forms else self.shared.dtype
        pages = [self._pages(name, part, part.meta["val"].shape[3], dtype) for name, part in (("keys", k), ("values", v))]
        places = (self.shared.page_table, self.shared.positions)
        appended = self._call(qcompile.cache_append.default, *pages, k, v, *places)
        keys, values = (self._call(operator.getitem, appended, part) for part in (0, 1))
        attend = qcompile.cache_attend_packed.default if forms else qcompile.cache_attend.default
        return attend, (self.pair.queries, keys, values, *places, *forms), {"keys": keys, "values": values}

    def kept(self) -> tuple[Any, tuple[Any, ...], States]:
        """Tokens settle in the pages once their time has come, others are kept as they came."""
        states, exact, places = States(), [], (self.shared.page_table, self.shared.positions)
        parts = zip(("keys", "values"), (self.pair.keys, self.pair.values), self.pair.forms, self.tables, strict=True)
        for name, part, form, tables in parts:
            found, changed = self._keep(name, part, form, tables)
            exact.append(found)
            states |= changed
        args = (self.pair.queries, states["keys"], states["values"], *exact, *places, *self.pair.forms, *self._policy)
        return qcompile.attend_settled.default, args, states

    def _keep(self, name: str, part: Any, form: str, tables: Sequence[fx.Node] = ()) -> tuple[fx.Node, States]:
        """One kind of vector [B, L, S, D]: what `with_recent` gives, and its pages and rows as they are afterwards."""
        shared = self.shared
        rows = self._rows(f"recent_{name}", part, shared.cache.retention.rows)
        exact = self._call(qcompile.with_recent.default, rows, part, shared.slots)
        pages = self._pages(name, part, vector_format(form).width(int(part.meta["val"].shape[3])), torch.uint8)
        settled = (pages, exact, shared.page_table, shared.positions, form, *self._policy, *_given(tables))
        retained = (rows, exact, shared.slots, shared.positions, *self._policy)
        states = {name: self._call(qcompile.settle.default, *settled), f"recent_{name}": self._call(qcompile.retain.default, *retained)}
        return exact, states

    @property
    def _policy(self) -> tuple[int, int, int]:
        policy = self.shared.cache.retention
        return policy.first, policy.recent, policy.group

    def _on_read(self) -> dict[str, Any]:
        """What an operator that reads packed vectors needs besides."""
        given: dict[str, Any] = {name: tables for name, tables in zip(("k_tables", "v_tables"), self.tables, strict=True) if tables}
        if self.pair.before_positions:
            table: Any = _turning(self.node).args[1].args[0]  # type: ignore[union-attr]
            given |= {"inv_freq": table.args[1], "scaling": table.args[2]}
        return given

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.insert(self.node, target, args, kwargs, source=self.node)

    def _pages(self, name: str, part: Any, width: int, dtype: torch.dtype) -> fx.Node:
        symbols = self.shared.symbols
        return self._state(name, (symbols["pages"], part.meta["val"].shape[1], symbols["page_tokens"], width), dtype)

    def _rows(self, name: str, part: Any, rows: int) -> fx.Node:
        value = part.meta["val"]
        return self._state(name, (self.shared.symbols["sequences"], value.shape[1], rows, value.shape[3]), self.shared.dtype)

    def _state(self, name: str, shape: tuple[Any, ...], dtype: torch.dtype) -> fx.Node:
        with self.graph.mode:
            value = torch.empty(shape, dtype=dtype)
        return _placeholder(self.graph, f"{name}_{self.index}", value)


def _given(tables: Sequence[fx.Node]) -> tuple[list[fx.Node], ...]:
    """As the last argument; none where there are no tables."""
    return (list(tables),) if tables else ()


def _replace_positions(graph: Graph, positions: fx.Node) -> None:
    """Rotary tables take -1 as it is; everything else (learned positions) sees padding at 0."""
    old = next((node for node in graph.placeholders if node.name == "position_ids"), None)
    if old is None:
        return
    others = [user for user in old.users if user.target is not qcompile.rotary_table.default]
    if others:
        last = graph.placeholders[-1]
        real = graph.insert(last.next, torch.ops.aten.clamp_min.default, (positions, 0), source=others[0])
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


def _return_states(graph: Graph, states: list[States]) -> None:
    """Logits, then part after part the cache of all layers; before anything looks for what nobody reads."""
    logits = graph.output.args[0][0]  # type: ignore[index]
    graph.output.args = ((logits, *(layer[part] for part in _parts(states) for layer in states if part in layer)),)


def _parts(states: list[States]) -> list[str]:
    """What the cache of any layer consists of."""
    return list(dict.fromkeys(part for layer in states for part in layer))


def _new_interface(graph: Graph, states: list[States]) -> None:
    for node in graph.placeholders:
        if node.name in ("attention_mask", "position_ids") and not node.users:
            graph.fx.erase_node(node)
    logits = graph.output.args[0][0]  # type: ignore[index]
    parts = {part: [index for index, layer in enumerate(states) if part in layer] for part in _parts(states)}
    leaf = {node.name: {"leaf": index} for index, node in enumerate(graph.placeholders)}
    inputs: dict[str, Any] = {name: leaf[name] for name in ("input_ids", "positions", "page_table", "slots") if name in leaf}
    inputs |= {part: {"list": [leaf[f"{part}_{index}"] for index in having]} for part, having in parts.items()}
    outputs, _ = template_of({"logits": logits, **{part: [states[index][part] for index in having] for part, having in parts.items()}})
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
        value = node.meta["val"]
        if node.name == "slots":
            examples[node.name] = torch.arange(batch, dtype=torch.int32)
        elif node.name.startswith("recent_"):
            examples[node.name] = torch.zeros(batch, *value.shape[1:], dtype=value.dtype)
        elif node.name.startswith(CACHE_STATES):
            examples[node.name] = torch.zeros(batch * pages, value.shape[1], _EXAMPLE_PAGE_TOKENS, value.shape[3], dtype=value.dtype)
    return examples
