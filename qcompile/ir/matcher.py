"""Patterns over nodes: predicates, alternatives, commuted operands, shared inner nodes, repeated variables.

`Call(mul, Var("x"), Call(rsqrt, ...), commutes=True)` matches either order; the same `Var` twice must be the same node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

Bindings = dict[str, Any]


class Pattern:
    """Something a node or an argument can match: `match` yields every set of bindings under which it does."""

    def match(self, value: Any, bound: Bindings) -> Iterator[Bindings]:
        """All extensions of `bound` under which `value` matches."""
        raise NotImplementedError


@dataclass(frozen=True)
class Var(Pattern):
    """Anything that `accept` accepts, bound to `name`; a second use must be the same value."""

    name: str
    accept: Callable[[Any], bool] = lambda _value: True

    def match(self, value: Any, bound: Bindings) -> Iterator[Bindings]:
        """Bind, or compare with what was bound."""
        if self.name in bound:
            same = bound[self.name] is value if isinstance(value, fx.Node) else bound[self.name] == value
            if same:
                yield bound
        elif self.accept(value):
            yield {**bound, self.name: value}


@dataclass(frozen=True)
class Call(Pattern):
    """A call of one of `targets` with positional patterns; with `commutes` its first two may be swapped.

    Arguments beyond those given must be absent unless `rest`; `name` binds the node itself.
    """

    targets: Any
    args: tuple[Any, ...] = ()
    commutes: bool = False
    rest: bool = False
    name: str = ""

    def match(self, value: Any, bound: Bindings) -> Iterator[Bindings]:
        """Match the target, then the arguments in every allowed order."""
        targets = self.targets if isinstance(self.targets, tuple) else (self.targets,)
        if not isinstance(value, fx.Node) or value.op != "call_function" or value.target not in targets:
            return
        given = (*value.args, *value.kwargs.values())
        if len(given) < len(self.args) or (len(given) > len(self.args) and not self.rest):
            return
        orders = [self.args]
        if self.commutes:
            orders.append((self.args[1], self.args[0], *self.args[2:]))
        start = {**bound, self.name: value} if self.name else bound
        for order in orders:
            yield from _match_all(order, given, start)


@dataclass(frozen=True)
class Either(Pattern):
    """Any one of several patterns, tried in order."""

    options: tuple[Pattern, ...]

    def match(self, value: Any, bound: Bindings) -> Iterator[Bindings]:
        """The matches of each option."""
        for option in self.options:
            yield from option.match(value, bound)


def _match_all(patterns: tuple[Any, ...], values: tuple[Any, ...], bound: Bindings) -> Iterator[Bindings]:
    if not patterns:
        yield bound
        return
    head, *tail = patterns
    for extended in _match_one(head, values[0], bound):
        yield from _match_all(tuple(tail), values[1:], extended)


def _match_one(pattern: Any, value: Any, bound: Bindings) -> Iterator[Bindings]:
    """A pattern, a list of patterns against a list of the same length, or a literal."""
    if isinstance(pattern, Pattern):
        yield from pattern.match(value, bound)
    elif isinstance(pattern, list):
        if isinstance(value, list | tuple) and len(value) == len(pattern):
            yield from _match_all(tuple(pattern), tuple(value), bound)
    elif not isinstance(value, fx.Node) and pattern == value:
        yield bound


def call(targets: Any, *args: Any, commutes: bool = False, rest: bool = False, name: str = "") -> Call:
    """Shorthand for `Call`."""
    return Call(targets, args, commutes, rest, name)


def first_match(pattern: Pattern, node: Any) -> Bindings | None:
    """The first set of bindings under which `node` matches, or None."""
    return next(pattern.match(node, {}), None)
