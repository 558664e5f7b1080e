"""Attention: as a standard operator, as onnxruntime's, or by its parts; with a cache it reads and makes past and present."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qcompile.exporters.onnx.cache import Cached, CacheInputs, New, PastState
from qcompile.exporters.onnx.emitter import MICROSOFT, Call, Emitter, Value, argument
from qcompile.exporters.onnx.rules.table import rule

_LEAST = -1e30
"""What is added to the score of a key that a query may not see: a weight of 0, and no NaN where it may see none."""


@dataclass(frozen=True)
class Scores:
    """What decides the weights: `keep` bool and `bias` float broadcast to [B, H, S, T]; `sinks` [H] as in `qcompile::attention`."""

    scale: float
    softcap: float = 0.0
    keep: Value | None = None
    bias: Value | None = None
    sinks: Value | None = None


def by_parts(e: Emitter, q: Value, k: Value, v: Value, heads: tuple[int, int], scores: Scores) -> Value:
    """Attention of q [B, H, S, D] over k, v [B, L, T, D] in float32; a query that may see nothing gives 0. Result [B, H, S, Dv]."""
    count, groups = heads[1], heads[0] // heads[1]
    if groups > 1:  # queries of one key head side by side
        q = e.op("Reshape", q, e.op("Concat", e.ints([0, count, groups]), e.op("Shape", q, start=2), axis=0))
        k, v = (e.op("Unsqueeze", part, e.ints([2])) for part in (k, v))
    turned = e.swap_last(k, 5 if groups > 1 else 4)
    made = e.op("Mul", e.op("MatMul", q, turned), e.constant(scores.scale, torch.float32))
    if scores.softcap:
        cap = e.constant(scores.softcap, torch.float32)
        made = e.op("Mul", e.op("Tanh", e.op("Div", made, cap)), cap)
    if groups > 1:
        made = e.op("Reshape", made, e.op("Concat", e.ints([0, heads[0]]), e.op("Shape", made, start=3), axis=0))
    if scores.bias is not None:
        made = e.op("Add", made, scores.bias)
    weights = _weights(e, made, scores)
    if groups > 1:
        weights = e.op("Reshape", weights, e.op("Concat", e.ints([0, count, groups]), e.op("Shape", weights, start=2), axis=0))
    mixed = e.op("MatMul", weights, v)
    if groups > 1:
        mixed = e.op("Reshape", mixed, e.op("Concat", e.ints([0, heads[0]]), e.op("Shape", mixed, start=3), axis=0))
    return mixed


def _weights(e: Emitter, made: Value, scores: Scores) -> Value:
    if scores.keep is not None:
        made = e.op("Where", scores.keep, made, e.constant(_LEAST, torch.float32))
    if scores.sinks is not None:
        column = e.op("Concat", e.op("Shape", made, start=0, end=3), e.ints([1]), axis=0)
        made = e.op("Concat", made, e.op("Expand", e.reshape(scores.sinks, [1, -1, 1, 1]), column), axis=-1)
    weights = e.op("Softmax", made, axis=-1)
    if scores.sinks is not None:
        weights = e.slice(weights, 3, 0, -1)
    return weights if scores.keep is None else e.op("Where", scores.keep, weights, e.constant(0.0, torch.float32))


@rule("qcompile.attention.default")
def attention(e: Emitter, node: Call) -> Value:
    """Without a cache."""
    q, k, v, padding, bias, scale, causal = node.args[:7]
    window, softcap = int(argument(node, 7, "window", 0)), float(argument(node, 8, "softcap", 0.0))
    keep = _causal(e, e.value(q), e.value(k), window) if causal else None
    if padding is not None:
        real = e.op("Unsqueeze", e.value(padding, torch.bool), e.ints([1, 2]))
        keep = real if keep is None else e.op("And", keep, real)
    sinks = e.optional(argument(node, 9, "sinks", None), torch.float32)
    scores = Scores(float(scale), softcap, keep, e.optional(bias, torch.float32), sinks)
    parts = [e.value(part, torch.float32) for part in (q, k, v)]
    dtype = e.dtype(node)
    made = by_parts(e, parts[0], parts[1], parts[2], (int(e.shape(q)[1]), int(e.shape(k)[1])), scores)
    return made if dtype == torch.float32 else e.cast(made, dtype)


def _causal(e: Emitter, q: Value, k: Value, window: int) -> Value:
    """Bool [S, T]: query i, aligned to the end, sees keys up to itself, the last `window` of them if that is not 0."""
    queries, keys = (e.op("Squeeze", e.size_of(value, 2), e.ints([0])) for value in (q, k))
    nought, one = e.constant(0, torch.int64), e.constant(1, torch.int64)
    row = e.op("Unsqueeze", e.op("Range", e.op("Sub", keys, queries), keys, one), e.ints([1]))
    column = e.op("Range", nought, keys, one)
    keep = e.op("LessOrEqual", column, row)
    return e.op("And", keep, e.op("Greater", column, e.op("Sub", row, e.constant(window, torch.int64)))) if window else keep


@rule("aten.scaled_dot_product_attention.default")
def dot_product(e: Emitter, node: Call) -> Value:
    """As torch means it: a mask of truth values or of numbers, or causal from the first key."""
    q, k, v = node.args[:3]
    mask, causal = argument(node, 3, "attn_mask", None), bool(argument(node, 5, "is_causal", False))
    if float(argument(node, 4, "dropout_p", 0.0)):
        raise e.refusal("expected inference, got dropout")
    rank, shape = len(e.shape(q)), e.shape(q)
    if rank != 4:
        raise e.refusal(f"expected queries [B, H, S, D], got {rank} axes")
    scale = argument(node, 6, "scale", None)
    factor = float(shape[-1]) ** -0.5 if scale is None else float(scale)
    keep = bias = None
    if mask is not None:
        keep, bias = (e.value(mask), None) if e.dtype(mask) == torch.bool else (None, e.value(mask, torch.float32))
    if causal:
        keep = _from_first(e, e.value(q), e.value(k))
    parts = [e.value(part, torch.float32) for part in (q, k, v)]
    made = by_parts(e, parts[0], parts[1], parts[2], (int(shape[1]), int(e.shape(k)[1])), Scores(factor, 0.0, keep, bias))
    return made if e.dtype(node) == torch.float32 else e.cast(made, e.dtype(node))


def _from_first(e: Emitter, q: Value, k: Value) -> Value:
    """Bool [S, T]: query i sees keys 0 to i."""
    queries, keys = (e.op("Squeeze", e.size_of(value, 2), e.ints([0])) for value in (q, k))
    nought, one = e.constant(0, torch.int64), e.constant(1, torch.int64)
    row = e.op("Unsqueeze", e.op("Range", nought, queries, one), e.ints([1]))
    return e.op("LessOrEqual", e.op("Range", nought, keys, one), row)


# With a cache


@rule("qcompile.pack_vectors.default")
def pack_vectors(e: Emitter, node: Call) -> New:
    """New keys or values in a form, which the cache applies as it stores them."""
    x, form = node.args[:2]
    return New(e.value(x, torch.float32), e.shape(x), str(form), argument(node, 2, "tables", None))


@rule("qcompile.cache_append.default")
def cache_append(e: Emitter, node: Call) -> tuple[Cached, Cached]:
    """What was there before, and what comes."""
    past = [e.results[state] for state in node.args[:2]]
    made = []
    for state, new in zip(past, node.args[2:4], strict=True):
        assert isinstance(state, PastState)
        stored = e.results.get(new)
        made.append(Cached(state, stored if isinstance(stored, New) else New(e.value(new), e.shape(new), dtype=e.dtype(new))))
    return made[0], made[1]


@rule("qcompile.cache_attend.default", "qcompile.cache_attend_packed.default")
def cache_attend(e: Emitter, node: Call) -> Value:
    """Attention over all that is there and all that comes."""
    packed = "packed" in str(node.target)
    q: Any = node.args[0]
    keys, values = (e.results[item] for item in node.args[1:3])
    first = 7 if packed else 5
    scale = float(node.args[first])
    window, softcap = int(argument(node, first + 1, "window", 0)), float(argument(node, first + 2, "softcap", 0.0))
    sinks = argument(node, first + 3, "sinks", None)
    if argument(node, first + 6, "inv_freq", None) is not None:
        raise e.refusal("expected keys as they are after positions; compile with cache_before_positions=False")
    inputs: CacheInputs = e.shared["cache"]
    heads = (int(e.shape(q)[1]), int(keys.new.shape[1]))
    if e.is_ort and inputs.serves_grouped(keys, values, e.dtype(q)):
        return _grouped_query(e, q, keys, values, heads, scale, window, softcap, sinks)
    stored = inputs.standard_attention(e, keys, values) and not softcap and sinks is None and e.dtype(q) == torch.float32
    if stored:
        return _standard(e, e.value(q), keys, values, scale, inputs.additive(e, window))
    k, v = (inputs.numbers(e, item) for item in (keys, values))
    scores = Scores(scale, softcap, inputs.keep(e, window), None, e.optional(sinks, torch.float32))
    made = by_parts(e, e.value(q, torch.float32), k, v, heads, scores)
    return made if e.dtype(node) == torch.float32 else e.cast(made, e.dtype(node))


def _standard(e: Emitter, q: Value, keys: Cached, values: Cached, scale: float, mask: Value) -> Value:
    """The standard operator, which puts past and new together itself."""
    made, *present = e.ops(
        "Attention", q, keys.new.value, values.new.value, mask, keys.state.values[0], values.state.values[0], count=3, scale=scale,
    )  # fmt: skip
    for item, value in zip((keys, values), present, strict=True):
        item.state.present = [value]
    return made


def _grouped_query(
    e: Emitter, q: Any, keys: Cached, values: Cached, heads: tuple[int, int], scale: float, window: int, softcap: float, sinks: Any
) -> Value:
    """By GroupQueryAttention of onnxruntime, over flat heads [B, S, H·D]."""
    inputs: CacheInputs = e.shared["cache"]
    dtype = e.dtype(q)
    flat = [_flat(e, value) for value in (e.value(q), e.cast_to(keys.new, dtype), e.cast_to(values.new, dtype))]
    scales, options = inputs.scales(e, keys, values)
    made, *present = e.ops(
        "GroupQueryAttention", *flat, keys.state.values[0], values.state.values[0], *inputs.lengths(e), None, None, None, None,
        e.optional(sinks, dtype), *scales, domain=MICROSOFT, count=3, num_heads=heads[0], kv_num_heads=heads[1], scale=scale,
        softcap=softcap or None, local_window_size=window or None, **options,
    )  # fmt: skip
    for item, value in zip((keys, values), present, strict=True):
        item.state.present = [value]
    split = e.reshape(made, [0, 0, heads[0], int(values.new.shape[-1])])
    e.shared["split", split] = made
    return e.transpose(split, [0, 2, 1, 3])


def _flat(e: Emitter, value: Value) -> Value:
    """[B, H, S, D] as [B, S, H·D]."""
    heads = e.transpose(value, [0, 2, 1, 3])
    joined: Value | None = e.shared.get(("split", heads))
    return e.reshape(heads, [0, 0, -1]) if joined is None else joined
