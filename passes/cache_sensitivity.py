"""What it costs the model's output to store one layer's keys and values in fewer bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.errors import SourceError
from qcompile.ir.graph import Graph
from qcompile.passes.cache_tables import ATTEND_OPTIONS, option
from qcompile.passes.calibration import Calibration, batches
from qcompile.quant.cache_format import CacheFormat, Pair
from qcompile.quant.vector_format import vector_format

aten = torch.ops.aten
qcompile = torch.ops.qcompile
_LOGITS_AT_ONCE = 1 << 27
"""Numbers: half a GiB."""


def losses(
    graph: Graph, layers: Sequence[fx.Node], pairs: Sequence[Pair], cache: CacheFormat, calibration: Calibration, tokens: int
) -> Tensor:  # fmt: skip
    """KL(float ‖ stored) of the next token in nats per token, where one layer is stored in one pair of forms: float64 [layers, pairs].

    The cheapest pair (the first) is put into one layer after the other and the divergence measured, over the first `tokens` tokens of
    the calibration data; others are to it as the squared errors they make in the layer's attention (KVTuner, arXiv:2502.04420, goes by
    these alone): a small error moves the output's divergence by its square. No window is kept, for in a long text most has settled.

    Raises:
        SourceError: if the text is too short for a group of tokens to settle.
    """
    cache = replace(cache, window=0)
    leaves = _first_window(graph, calibration, tokens)
    needed = cache.sinks + cache.retention.group
    if leaves[0].shape[-1] < needed:
        raise SourceError(
            f"assign-kv-formats: expected calibration windows of at least {needed} tokens, in which a group settles, got "
            f"{leaves[0].shape[-1]}; pass longer ones, or a max_seq_length that is not less"
        )
    parts = [[node.args[place] for place in (0, 1, 2)] for node in layers]
    seen = iter(_run_to(graph, [part for three in parts for part in three], leaves))
    errors, energy = [], torch.zeros(len(layers), len(pairs), dtype=torch.float64)
    for layer, node in enumerate(layers):
        q, k, v = next(seen), next(seen), next(seen)
        exact = _attend(node, q, k, v, cache, None, graph)
        made = [_attend(node, q, k, v, cache, pair, graph) - exact for pair in pairs]
        energy[layer] = torch.tensor([float(error.double().square().sum()) for error in made])
        errors.append(made[0])
    return _divergences(graph, layers, errors, leaves).unsqueeze(1) * energy / energy[:, :1].clamp(min=1e-300)


def _first_window(graph: Graph, calibration: Calibration, tokens: int) -> list[Tensor]:
    """The graph's inputs: one row of text."""
    inputs = batches(calibration.first(tokens), graph)
    return [inputs.tensor(node.name, 0)[:1, :tokens] for node in graph.placeholders]


def _run_to(graph: Graph, wanted: Sequence[Any], leaves: Sequence[Tensor]) -> list[Tensor]:
    program = graph.clone()
    named = {node.name: node for node in program.nodes}
    program.output.args = (tuple(named[node.name] for node in wanted),)
    program.remove_dead()
    return program.run(leaves)


def _attend(node: fx.Node, q: Tensor, k: Tensor, v: Tensor, cache: CacheFormat, pair: Pair | None, graph: Graph) -> Tensor:
    """What the attention gives over a cache whose tokens have settled in these forms; without forms, exactly."""
    scale, window, softcap, sinks = (option(node, place, name, default) for place, name, default in ATTEND_OPTIONS)
    constant = graph.constant(sinks)
    options = (scale, window, softcap, None if constant is None else constant.materialize())
    if pair is None:
        return qcompile.attention(q, k, v, None, None, scale, True, *options[1:])  # type: ignore[no-any-return]
    count = q.shape[2]
    places = (torch.zeros(1, 1, dtype=torch.int32), torch.arange(count).unsqueeze(0))
    policy = cache.retention
    parts = (policy.first, policy.recent, policy.group)
    if not policy.rows:
        stored = [qcompile.pack_vectors(x, form) for x, form in zip((k, v), pair, strict=True)]
        return qcompile.cache_attend_packed(q, *stored, *places, *pair, *options)  # type: ignore[no-any-return]
    exact, stored = [], []
    for x, form in zip((k, v), pair, strict=True):
        rows = x.new_zeros(1, x.shape[1], policy.rows, x.shape[3], dtype=cache.dtype)
        exact.append(qcompile.with_recent(rows, x, torch.zeros(1, dtype=torch.int32)))
        pages = x.new_zeros(1, x.shape[1], count, vector_format(form).width(x.shape[3]), dtype=torch.uint8)
        stored.append(qcompile.settle(pages, exact[-1], *places, form, *parts))
    return qcompile.attend_settled(q, *stored, *exact, *places, *pair, *parts, *options)  # type: ignore[no-any-return]


def _divergences(graph: Graph, layers: Sequence[fx.Node], errors: Sequence[Tensor], leaves: Sequence[Tensor]) -> Tensor:
    """The output's divergence for each layer whose attention is off by its error [1, H, S, D]: float64 [layers].

    Rows of a batch are the same text with an error in another layer each; the first has none.
    """
    logits = graph.output.args[0][0].meta["val"]  # type: ignore[index, union-attr]
    rows = max(2, _LOGITS_AT_ONCE // (leaves[0].shape[-1] * int(logits.shape[-1])))
    found: list[Tensor] = []
    for start in range(0, len(layers), rows - 1):
        part = range(start, min(start + rows - 1, len(layers)))
        program = graph.clone()
        program.output.args = ((program.output.args[0][0],),)  # type: ignore[index]
        named = {node.name: node for node in program.nodes}
        for row, layer in enumerate(part):
            _disturb(program, named[layers[layer].name], errors[layer], row + 1, len(part) + 1)
        (results,) = program.run([leaf.expand(len(part) + 1, *leaf.shape[1:]).contiguous() for leaf in leaves])
        exact = results[0].double().log_softmax(-1)
        found += [(exact.exp() * (exact - other.double().log_softmax(-1))).sum(-1).mean().clamp(min=0) for other in results[1:]]
    return torch.stack(found)


def _disturb(program: Graph, node: fx.Node, error: Tensor, row: int, rows: int) -> None:
    """Add `error` to one row of an attention's result."""
    only = torch.zeros(rows, 1, 1, 1)
    only[row] = 1
    after = node.next
    readers = list(node.users)
    factors = [program.add_constant(f"{node.name}.{name}", tensor) for name, tensor in (("error", error), ("row", only))]
    shape: Tensor = node.meta["val"]  # what is inserted keeps the sizes of the graph, which the constants would fix
    scaled = program.insert(after, aten.mul.Tensor, factors, value=shape)
    total = program.insert(after, aten.add.Tensor, (node, scaled), value=shape)
    for reader in readers:
        reader.replace_input_with(node, total)
