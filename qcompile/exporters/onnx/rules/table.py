"""The table of rules."""

from __future__ import annotations

from collections.abc import Callable

from qcompile.exporters.onnx.emitter import Rule
from qcompile.ir.allowed import ALLOWED

RULES: dict[object, Rule] = {}
"""Operator -> what writes its calls."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators by their stored names; those that this version of torch lacks are passed over."""

    def register(function: Rule) -> Rule:
        RULES.update({ALLOWED[name]: function for name in names if name in ALLOWED})
        return function

    return register
