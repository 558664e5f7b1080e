"""Graphs and random maps for the tests of spaces."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qcompile.frontend import load
from qcompile.ir.basis import Basis, Blocks, Diagonal, Invertible, Orthogonal, Permutation, Signs
from qcompile.ir.graph import Graph
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.fold_constants import FoldConstants
from qcompile.passes.instruments import outputs, relative_error
from qcompile.passes.manager import run_pipeline
from qcompile.passes.raise_patterns import RaisePatterns
from qcompile.passes.remove_dead_code import RemoveDeadCode
from qcompile.passes.spaces import Kind, Space, apply_basis_change, find_spaces
from qcompile.quant.hadamard import random_orthogonal, random_signs
from tests.models import CAUSAL_FAMILIES, OTHER_FAMILIES, example_inputs, tiny
from tests.passes.helpers import context

EXACT = 1e-9
FAMILIES = (*CAUSAL_FAMILIES, *OTHER_FAMILIES)


@cache
def family_graph(family: str) -> Graph:
    """The canonical graph of `tiny(family)`; change a clone only."""
    model = tiny(family)
    graph = load(model).graph if family in CAUSAL_FAMILIES else load(model, example_inputs=example_inputs(family)).graph
    return canonical(graph)


def canonical(graph: Graph) -> Graph:
    """The graph after the passes that come before a change of basis."""
    run_pipeline(graph, [Canonicalize(), RaisePatterns(), FoldConstants(), RemoveDeadCode()], context())
    return graph


@cache
def family_outputs(family: str) -> list[Tensor]:
    """What it computes, in float64."""
    return outputs(family_graph(family), wide=True)


def random_map(kind: Kind, size: int, seed: int) -> Basis:
    """A map of `kind` that is far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[Kind, Any] = {
        Kind.PERMUTATION: lambda: Permutation(torch.randperm(size, generator=generator)),
        Kind.SIGN: lambda: Signs(random_signs(size, seed)),
        Kind.DIAGONAL: lambda: Diagonal(0.5 + 2 * torch.rand(size, generator=generator, dtype=torch.float64)),
        Kind.ORTHOGONAL: lambda: Orthogonal(random_orthogonal(size, seed)),
        Kind.INVERTIBLE: lambda: Invertible(random_orthogonal(size, seed) * (1 + torch.rand(size, generator=generator))),
    }
    basis: Basis = made[kind]()
    return basis


def random_change(space: Space, seed: int) -> Basis:
    """A random map of what a space admits, one per block."""
    parts = tuple(random_map(space.kind, space.block_size, 100 * seed + block) for block in range(space.blocks))
    return parts[0] if len(parts) == 1 else Blocks(parts)


def changed(graph: Graph, kind: Kind, seed: int = 1) -> tuple[Graph, list[Space]]:
    """A clone with a random change of every free space of `kind`, and those spaces."""
    clone, spaces = graph.clone(), find_spaces(graph, kind)
    for number, space in enumerate(spaces):
        apply_basis_change(clone, space, random_change(space, seed + number))
    return clone, spaces


def error_if_forced(graph: Graph, space: Space, expected: list[Tensor]) -> float:
    """How far the function moves if a blocked space is changed all the same: the largest of three tries."""
    worst = 0.0
    for seed in (1, 2, 3):
        clone = graph.clone()
        apply_basis_change(clone, replace(space, blockers=()), random_change(space, seed))
        worst = max(worst, relative_error(outputs(clone, wide=True), expected))
    return worst
