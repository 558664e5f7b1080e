"""Repeated layers, as the names of modules and weights tell them: `model.layers.3.mlp.up_proj.weight`."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")


def layer_of(name: str) -> int | None:
    """The first number in a dotted name: 3 of `model.layers.3.mlp.up_proj.weight`; None where there is none."""
    found = _NUMBER.search(name)
    return int(found[0]) if found else None


def fold(name: str) -> str:
    """The name with its first number replaced, equal for all repetitions of a layer: `model.layers.*.mlp.up_proj.weight`."""
    return _NUMBER.sub("*", name, count=1)
