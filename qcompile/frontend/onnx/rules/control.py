"""Branches and loops: an `If` whose condition is known takes its branch; everything else is refused by name."""

from __future__ import annotations

from typing import Any

from qcompile.frontend.onnx.node import Node
from qcompile.frontend.onnx.registry import rule
from qcompile.frontend.onnx.rules.numbers import _known
from qcompile.frontend.onnx.values import NeedsConstantError, RefusalError


@rule("If")
def branch(node: Node) -> tuple[Any, ...]:
    """The branch of a condition that is known while tracing; both branches see the values outside."""
    node.ignore("then_branch", "else_branch")
    try:
        condition = _known(node.number(0, "the condition"))
    except NeedsConstantError as error:
        raise NeedsConstantError(error.name, "the condition of a branch") from error
    if condition is None:
        raise RefusalError(f"expected a condition that does not depend on sizes that vary, got {node.number(0)}")
    return tuple(node.run_block(node.required("then_branch" if condition else "else_branch")))
