"""Changing the basis of a space: entries in constants' logs, and an online transform only where a boundary needs one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from qcompile.errors import PassError
from qcompile.ir.basis import Basis, Blocks, Diagonal, Hadamard, Permutation, Signs, compose, identity_matrix
from qcompile.ir.change_basis import ChangeBasis, carrier_name, change_basis
from qcompile.ir.constants import Cast, tensor_constant
from qcompile.ir.graph import Graph, operator_name
from qcompile.ir.verify import where
from qcompile.passes.base import PassContext
from qcompile.passes.space_types import Space, Value

aten = torch.ops.aten

_ONLINE = "online"
"""Key in a node's meta: the map that an online transform applies, so that the next one composes with it."""


def apply_basis_change(graph: Graph, space: Space, basis: Basis, ctx: PassContext | None = None) -> None:
    """Change the basis of a space: every constant that borders on it absorbs the map, weight by weight and lazily.

    Args:
        graph: the graph that the space was found in; its constants may have changed since, its nodes not.
        space: a free space.
        basis: a map of `space.size` channels, or `Blocks` of one map per block where it has several.
        ctx: if given, second moments that were measured follow the change.

    Raises:
        PassError: if the space is blocked, or admits no map of that size or kind.
    """
    require_admitted(space, basis)
    before = graph.fingerprint() if ctx is not None else ""
    for member in space.members:
        whole = _is_whole(graph.constants[member.name].shape[member.axis], member.places, space)
        change = ChangeBasis(
            member.axis,
            basis,
            contravariant=whole and member.contravariant,
            places=() if whole else member.places,
            offset=member.offset,
        )
        graph.bind(member.name, change_basis(graph.constants[member.name], change))
    if ctx is not None:
        values = [(value.node.name, value.axis, value.places[0].contravariant) for value in space.values]
        ctx.taken.rebase(before, graph, values, basis if all(_is_simple(value, space) for value in space.values) else _Unmapped())


class _Unmapped:
    """Stands for a change that no single map of a whole axis describes: what was measured there is forgotten."""

    size = -1

    def apply(self, tensor: Tensor, axis: int, *, contravariant: bool = False) -> Tensor:
        """Never asked for: no axis has this size."""
        raise PassError(f"statistics: expected no value of {list(tensor.shape)} along axis {axis} (dual: {contravariant}) to be mapped")


def require_admitted(space: Space, basis: Basis) -> None:
    """Check that a space admits a map.

    Raises:
        PassError: saying what it admits.
    """
    what = f"space of {space.size} {space.kind.value} channels at {_place(space)}"
    if space.blocked is not None:
        raise PassError(f"{what}: expected no change, got {basis}; {space.blocked[0]} is in the way ({space.blocked[1]})")
    if space.kind not in basis.kinds:
        known = ", ".join(sorted(kind.value for kind in basis.kinds))
        raise PassError(f"{what}: expected a map of kind {space.kind.value}, got {basis}, which is {known}; find spaces of that kind")
    sizes = [part.size for part in basis.parts] if isinstance(basis, Blocks) and space.blocks > 1 else [basis.size]
    if sizes != [space.block_size] * space.blocks:
        wanted = f"Blocks of {space.blocks} maps of {space.block_size}" if space.blocks > 1 else f"a map of {space.size}"
        raise PassError(f"{what}: expected {wanted}, got {basis}")


def apply_online_change(graph: Graph, readers: Sequence[fx.Node], basis: Basis) -> fx.Node:
    """Transform what `readers` read while the graph runs, and give their weights the inverse: exact, whatever makes the value.

    Consecutive online changes become one. A weight that others read too gets a copy of its own.

    Args:
        graph: the graph.
        readers: linears of one and the same value, with constant weights.
        basis: a map of their input channels.

    Returns:
        The node of the transformed value.

    Raises:
        PassError: for a reader that is no linear of that value, or a map of another size.
    """
    x = readers[0].args[0]
    assert isinstance(x, fx.Node)
    for reader in readers:
        _require_linear(graph, reader, x, basis)
    for reader in readers:
        _absorb(graph, reader, basis)
    if _ONLINE in x.meta and set(x.users) <= set(readers):
        basis, x = compose(x.meta[_ONLINE][0], basis), x.meta[_ONLINE][1]
    changed = _transform(graph, x, basis, min(readers, key=graph.nodes.index))
    changed.meta[_ONLINE] = (basis, x)
    for reader in readers:
        reader.args = (changed, *reader.args[1:])
    graph.remove_dead()
    return changed


def _require_linear(graph: Graph, reader: fx.Node, x: fx.Node, basis: Basis) -> None:
    if reader.target is not aten.linear.default or graph.constant(reader.args[1]) is None:
        raise PassError(f"{where(reader)}: expected a linear with a constant weight to absorb {basis}, got {operator_name(reader.target)}")
    if reader.args[0] is not x:
        raise PassError(f"{where(reader)}: expected it to read {x.name} like the other readers, got {reader.args[0]}")
    if x.meta["val"].shape[-1] != basis.size:
        raise PassError(f"{where(reader)}: expected a map of {x.meta['val'].shape[-1]} channels, got {basis}")


def _absorb(graph: Graph, reader: fx.Node, basis: Basis) -> None:
    """The inverse goes into the weight, or into a copy if anything else reads it."""
    weight = reader.args[1]
    assert isinstance(weight, fx.Node)
    name = str(weight.target)
    changed = change_basis(graph.constants[name], ChangeBasis(1, basis, contravariant=True))
    others = [user for node in graph.fx.find_nodes(op="get_attr", target=name) for user in node.users if user is not reader]
    if others:
        own = graph.add_constant(f"{name}.online", changed, source=weight)
        reader.args = (reader.args[0], own, *reader.args[2:])
    else:
        graph.bind(name, changed)


def _transform(graph: Graph, x: fx.Node, basis: Basis, before: fx.Node) -> fx.Node:
    """The map as operators on the last axis of x: a fast one where there is one, else a product with its matrix."""
    parts = basis.parts if isinstance(basis, Blocks) else (basis,)
    first = parts[0]
    if isinstance(first, Hadamard) and len({str(part) for part in parts}) == 1:
        if first.signs is not None:
            signs = _stored(graph, f"{x.name}.signs", first.signs.repeat(len(parts)), x, before)
            x = graph.insert(before, aten.mul.Tensor, (x, signs), source=before)
        mixing = first.mixing
        matrix = mixing_constant(graph, f"{x.name}.hadamard", mixing, before) if mixing is not None else None
        return graph.insert(before, torch.ops.qcompile.hadamard.default, (x, matrix, first.size), source=before)
    if isinstance(basis, Diagonal | Signs):
        vector = basis.scale if isinstance(basis, Diagonal) else basis.signs
        return graph.insert(before, aten.mul.Tensor, (x, _stored(graph, f"{x.name}.scale", vector, x, before)), source=before)
    if isinstance(basis, Permutation):
        order = graph.add_constant(f"{x.name}.order", basis.order, source=before)
        return graph.insert(before, aten.index_select.default, (x, -1, order), source=before)
    matrix = _stored(graph, carrier_name(x.name), identity_matrix(basis), x, before)
    return graph.insert(before, aten.linear.default, (x, matrix), source=before)


def mixing_constant(graph: Graph, name: str, mixing: Tensor, before: fx.Node) -> fx.Node:
    """The matrix that `qcompile::hadamard` reads: float32 whatever the graph computes in, or it would not be orthogonal."""
    return graph.add_constant(name, tensor_constant(mixing.double()).then(Cast(torch.float32)), source=before)


def _stored(graph: Graph, name: str, tensor: Tensor, x: fx.Node, before: fx.Node) -> fx.Node:
    """A constant in the dtype of x; its source stays float64, so that a check in float64 does not see it rounded."""
    return graph.add_constant(name, tensor_constant(tensor.double()).then(Cast(x.meta["val"].dtype)), source=before)


def _is_whole(size: int, places: Sequence[object], space: Space) -> bool:
    """Whether the one block of a space is all of an axis, for every index of the others."""
    return space.blocks == 1 and len(places) == 1 and size == space.block_size


def _is_simple(value: Value, space: Space) -> bool:
    """Whether the map acts on the axis as a whole, block after block."""
    size = value.node.meta["val"].shape[value.axis]
    starts = [place.start for place in value.places]
    whole = size == space.size and starts == [block * space.block_size for block in range(space.blocks)]
    alike = len({(place.index, place.contravariant) for place in value.places}) == 1
    return whole and alike and [place.block for place in value.places] == list(range(space.blocks))


def _place(space: Space) -> str:
    """A name for a space: its first value, or its first constant."""
    return space.values[0].node.name if space.values else space.members[0].name
