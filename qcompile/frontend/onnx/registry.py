"""Which rule interprets which operator; the rules register themselves when their modules are imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qcompile.frontend.onnx.node import Node

Rule = Callable[[Node], Any]

STANDARD, MICROSOFT, OWN = "", "com.microsoft", "qcompile"
DOMAINS = (STANDARD, MICROSOFT)
RULES: dict[tuple[str, str], Rule] = {}
"""(domain, operator) -> rule on tensors; numbers among the inputs become tensors, or Python numbers, as the rule asks for them.

What idioms are fused to is in a domain of its own.
"""
NUMBER_RULES: dict[str, Rule] = {}
"""Standard operator -> rule for inputs that are all numbers; tried first."""


def domain_of(domain: str) -> str:
    """The standard domain goes by two names."""
    return STANDARD if domain == "ai.onnx" else domain


def rule(*operators: str, domain: str = STANDARD) -> Callable[[Rule], Rule]:
    """Register a function of a node for operators of a domain."""

    def register(function: Rule) -> Rule:
        RULES.update({(domain, operator): function for operator in operators})
        return function

    return register


def number_rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a function of a node whose inputs are all numbers; it may raise NotNumbersError."""

    def register(function: Rule) -> Rule:
        NUMBER_RULES.update(dict.fromkeys(operators, function))
        return function

    return register
