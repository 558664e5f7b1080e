"""Programs without operators that write into their arguments, which is how training IR spells `x += y`."""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.export import ExportedProgram

_aten = torch.ops.aten
# What tracing leaves to check its own assumptions: no result of the model depends on them.
ASSERTIONS = (
    _aten._assert_tensor_metadata.default, _aten._assert_scalar.default, _aten._assert_async.msg,
    _aten.sym_constrain_range.default, _aten.sym_constrain_range_for_size.default,
)  # fmt: skip
# Operators that return their argument where nothing writes into it.
IDENTITIES = (_aten.alias.default, _aten.detach.default, _aten.detach_.default, _aten.lift_fresh.default, _aten.lift_fresh_copy.default)
# Composite operators say nothing about aliases in their schema; these always make a new tensor.
_FRESH = (
    _aten.linear.default, _aten.matmul.default, _aten.batch_norm.default, _aten.layer_norm.default, _aten.group_norm.default,
    _aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default,
)  # fmt: skip


def writes(node: fx.Node) -> bool:
    """Whether the node changes one of its arguments in a way that matters."""
    return (
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable and node.target not in (*ASSERTIONS, *IDENTITIES)
    )


def counterpart(node: fx.Node) -> torch._ops.OpOverload | None:
    """The functional operator for a write that nothing else can see: `add.Tensor` for an `add_.Tensor` on a new tensor; else None."""
    written = node.args[0] if node.args else None
    if (
        not isinstance(written, fx.Node)
        or not _is_fresh(written)
        or not all(_is_fresh(user) or not _before(user, node) for user in written.users)
    ):
        return None
    assert isinstance(node.target, torch._ops.OpOverload)
    name, _, overload = str(node.target).removeprefix("aten.").partition(".")
    found = getattr(getattr(_aten, name.removesuffix("_"), None), overload, None) if name.endswith("_") else None
    return found if isinstance(found, torch._ops.OpOverload) else None


def _is_fresh(node: fx.Node) -> bool:
    """Whether the result shares no memory with an argument."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return _is_fresh(node.args[0])
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if writes(node) or node.target in _FRESH:
        return True
    schema = node.target._schema
    name = f"{schema.name}.{schema.overload_name}".rstrip(".")
    composite: bool = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    return not composite and all(value.alias_info is None for value in schema.returns)


def _before(user: fx.Node, node: fx.Node) -> bool:
    return user is not node and user < node


def functional(program: ExportedProgram) -> ExportedProgram:
    """The program itself if each of its writes has a counterpart, else what torch's own functionalization makes of it (slower)."""
    if all(counterpart(node) is not None for node in program.graph.nodes if writes(node)):
        return program
    decomposed: ExportedProgram = program.run_decompositions({})
    return decomposed
