"""Rotating keys, packing keys and values, and storing them is one step over a token: nothing in between goes through memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qcompile.ir.graph import Graph
from qcompile.passes.base import Pass, PassContext

qcompile = torch.ops.qcompile


@dataclass(frozen=True)
class FuseCacheAppend(Pass):
    """`cache_append` of two `pack_vectors`, and the `hadamard` of the keys before, become append_packed.

    What something else reads too stays, and so does a rotation with a matrix (heads of 80 or 96): one program has the butterflies only. So
    does one before a form with tables, which may be an order that channels are read in.
    """

    name: ClassVar[str] = "fuse-cache-append"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Each layer by itself; after everything that looks for appends, rotations and packed vectors."""
        changed = False
        for append in graph.calls(qcompile.cache_append.default):
            packed = append.args[2:4]
            reason = _objection(append, packed)
            if reason:
                ctx.note(self.name, append.name, reason)
            if reason is None and ctx.spend():
                _fuse(graph, append, *packed)  # type: ignore[arg-type]
                changed = True
        return changed


def _objection(append: fx.Node, packed: tuple[object, ...]) -> str | None:
    """None where it can be fused; else why not, or nothing where it stores numbers and there is nothing to say."""
    if not all(isinstance(part, fx.Node) and part.target is qcompile.pack_vectors.default for part in packed):
        return ""
    for part in packed:
        assert isinstance(part, fx.Node)
        if set(part.users) != {append}:
            return f"{part.name} is read by {next(user.name for user in part.users if user is not append)} too"
    return None


def _fuse(graph: Graph, append: fx.Node, keys: fx.Node, values: fx.Node) -> None:
    tables = {name: _tables(part) for name, part in (("k_tables", keys), ("v_tables", values)) if _tables(part)}
    k, size = (keys.args[0], 0) if "k_tables" in tables else _before_rotation(keys)
    args = (*append.args[:2], k, values.args[0], *append.args[4:6], keys.args[1], values.args[1])
    rotation = (None, size) if size else ()
    graph.replace(append, graph.insert(append, qcompile.append_packed.default, (*args, *rotation), tables, source=append))
    graph.remove_dead()


def _tables(packed: fx.Node) -> object:
    """The tables of a form, None or empty for most."""
    return packed.args[2] if len(packed.args) > 2 else packed.kwargs.get("tables")


def _before_rotation(packed: fx.Node) -> tuple[fx.Node, int]:
    """What is packed, or what is rotated for that alone, with the size of the rotation."""
    rotated = packed.args[0]
    assert isinstance(rotated, fx.Node)
    if rotated.target is not qcompile.hadamard.default or len(rotated.users) > 1:
        return rotated, 0
    x, matrix, size = rotated.args
    return (x, size) if matrix is None else (rotated, 0)  # type: ignore[return-value]
