"""Every space that admits it is rotated by a Hadamard matrix: each channel becomes a signed mean of all, and outliers are gone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qcompile.errors import PipelineError
from qcompile.ir.basis import Blocks, Hadamard, Signs
from qcompile.ir.graph import Graph, fake_value
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.basis_changes import mixing_constant
from qcompile.passes.scale_readers import is_rounded
from qcompile.passes.space_channels import block_map, covers, space_name
from qcompile.passes.spaces import Kind, Space, apply_basis_change, apply_online_change, find_spaces
from qcompile.quant.hadamard import mixing_matrix, random_signs

aten = torch.ops.aten
qcompile = torch.ops.qcompile
PLACES = ("linears", "keys")


@dataclass(frozen=True)
class RotateHadamard(Pass):
    """Randomised Hadamard rotations (QuaRot, arXiv:2404.00456) of the residual stream and of each head's values, absorbed by weights.

    `heads=false` leaves spaces of several blocks (heads) alone, `stream=false` those of one block (the residual stream): `online=linears`
    then rotates behind each norm, whose gain can bring every channel to the size that suits its own linears first
    (`smooth-activations{measure=absmean}`). `online` names what is rotated while the model runs, because no weight absorbs it: `linears`,
    what linears that the scheme rounds read from spaces that were not rotated (a feed-forward layer's hidden channels always);
    `keys`, queries and keys after positions (before `rewrite-kv-cache`, so that rotated keys are stored).
    """

    name: ClassVar[str] = "rotate-hadamard"
    seed: int = 0
    heads: bool = True
    stream: bool = True
    online: tuple[str, ...] = ()

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Free spaces first, then what is left."""
        unknown = sorted(set(self.online) - set(PLACES))
        if unknown:
            raise PipelineError(f"pass {self.name}: option online: expected {' and '.join(PLACES)}, got {unknown[0]!r}")
        changed, rotated = False, set[fx.Node]()
        for space in find_spaces(graph, Kind.ORTHOGONAL, blocked=True):
            reason = self._obstacle(space)
            if reason is not None and space.readers:
                ctx.note(self.name, f"space {space_name(space)}", reason, chosen=True)
            elif reason is None and ctx.spend():
                apply_basis_change(graph, space, self._rotation(space), ctx)
                rotated |= {value.node for value in space.values if covers(value, space)}
                changed = True
        if "linears" in self.online:
            changed |= self._rotate_inputs(graph, ctx, rotated)
        if "keys" in self.online:
            changed |= self._rotate_keys(graph, ctx, rotated)
        return changed

    def _obstacle(self, space: Space) -> str | None:
        if space.blocked is not None:
            return f"{space.blocked[0]}: {space.blocked[1]}"
        if space.blocks > 1:
            return None if self.heads else "heads=false"
        return None if self.stream else "stream=false"

    def _rotation(self, space: Space) -> Hadamard | Blocks:
        rotation = Hadamard(space.block_size, self.seed)
        return rotation if space.blocks == 1 else Blocks((rotation,) * space.blocks)

    def _rotate_inputs(self, graph: Graph, ctx: PassContext, rotated: set[fx.Node]) -> bool:
        """Where a space takes random signs into its weights, they cost nothing while the model runs."""
        signed = {value.node: space for space in find_spaces(graph, Kind.SIGN) for value in space.values}
        done = set[Space]()
        changed = False
        for value, readers in _unrotated(graph, rotated, ctx).items():
            if not ctx.spend():
                break
            space = signed.get(value)
            if space is not None and space not in done:
                apply_basis_change(graph, space, block_map(space, Signs, random_signs(space.size, self.seed)), ctx)
                done.add(space)
            channels = int(fake_value(value).shape[-1])
            apply_online_change(graph, readers, Hadamard(channels, None if space is not None else self.seed))
            changed = True
        return changed

    def _rotate_keys(self, graph: Graph, ctx: PassContext, rotated: set[fx.Node]) -> bool:
        """The same rotation of both leaves their products what they were."""
        changed = False
        for node in graph.calls(qcompile.attention.default):
            if node.args[1] not in rotated and ctx.spend():
                for place in (0, 1):
                    node.update_arg(place, _rotate_online(graph, node, node.args[place]))
                changed = True
        return changed


def _unrotated(graph: Graph, rotated: set[fx.Node], ctx: PassContext) -> dict[fx.Node, list[fx.Node]]:
    """What linears with constant weights that the scheme may round read and no space has rotated -> those linears."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.calls(aten.linear.default):
        value = node.args[0]
        if not (is_rounded(graph, node, ctx) and isinstance(value, fx.Node)) or value in rotated:
            continue
        if isinstance(fake_value(value).shape[-1], int):
            found.setdefault(value, []).append(node)
    return found


def _rotate_online(graph: Graph, before: fx.Node, value: object) -> fx.Node:
    """`value` [B, H, S, D] with each head rotated. Keys keep their signs: positions bind those of a plane together."""
    assert isinstance(value, fx.Node)
    size = int(fake_value(value).shape[-1])
    mixing = mixing_matrix(size)
    matrix = None if mixing is None else mixing_constant(graph, f"{value.name}.hadamard", mixing, before)
    return graph.insert(before, qcompile.hadamard.default, (value, matrix, size), source=before)
