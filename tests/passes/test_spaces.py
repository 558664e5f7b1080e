"""The analysis of spaces on whole models: what it admits changes nothing, what it refuses would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qcompile.errors import PassError
from qcompile.ir.basis import Basis, Blocks, Diagonal, Hadamard, Kind, Orthogonal, Permutation, Signs
from qcompile.ir.graph import Graph
from qcompile.passes.instruments import outputs, relative_error
from qcompile.passes.space_text import spaces_text
from qcompile.passes.spaces import Space, apply_basis_change, apply_online_change, find_spaces
from qcompile.quant.hadamard import random_orthogonal
from tests.passes.helpers import Gated, assert_same_function, capture
from tests.passes.space_cases import EXACT, FAMILIES, canonical, changed, error_if_forced, family_graph, family_outputs, random_change

aten = torch.ops.aten


@pytest.mark.parametrize("family", FAMILIES)
def test_every_admitted_change_keeps_the_function(family: str) -> None:
    graph = family_graph(family)
    for kind in Kind:
        clone, spaces = changed(graph, kind)
        assert relative_error(outputs(clone, wide=True), family_outputs(family)) <= EXACT, f"{kind}: {spaces}"


@pytest.mark.parametrize("family", ["gemma3", "qwen3", "opt", "mixtral", "vit", "resnet"])
def test_every_refused_change_would_not(family: str) -> None:
    """One layer's worth: later layers block for the same reasons."""
    graph, seen = family_graph(family), set()
    for kind in Kind:
        for space in find_spaces(graph, kind, blocked=True):
            what = (kind, space.blocks, space.block_size, space.blockers and space.blockers[0][1], len(space.members))
            if space.blocked is not None and what not in seen:
                seen.add(what)
                assert error_if_forced(graph, space, family_outputs(family)) > 1e-7, space
    assert seen


def _shapes(graph: Graph, kind: Kind) -> list[tuple[int, int]]:
    return sorted({(space.blocks, space.block_size) for space in find_spaces(graph, kind)})


@pytest.mark.parametrize(("family", "kind", "shapes"), [
    ("llama", Kind.PERMUTATION, [(1, 4), (1, 32), (1, 48), (2, 8)]),  # planes, stream, hidden, values of two heads
    ("llama", Kind.DIAGONAL, [(1, 32), (1, 48), (2, 4), (2, 8)]),  # norm results, up -> down, planes per head, values
    ("llama", Kind.ORTHOGONAL, [(2, 8)]),  # the stream waits for fold-norms
    ("phi3", Kind.PERMUTATION, [(1, 4), (1, 32), (1, 48), (2, 8)]),  # fused weights change nothing
    ("gpt_neox", Kind.ORTHOGONAL, [(4, 4), (4, 8)]),  # the half of each head without positions, and the values
    ("falcon", Kind.INVERTIBLE, [(1, 8)]),  # one key/value head
    ("mixtral", Kind.PERMUTATION, [(1, 4), (1, 32), (2, 8), (4, 48)]),  # four experts with an order each
    ("opt", Kind.DIAGONAL, [(1, 32), (1, 64), (4, 8)]),  # ReLU passes scales
    ("resnet", Kind.DIAGONAL, [(1, 16), (1, 32)]),
    ("bert", Kind.PERMUTATION, [(1, 64), (4, 8)]),  # its stream is an output
])  # fmt: skip
def test_what_families_admit(family: str, kind: Kind, shapes: list[tuple[int, int]]) -> None:
    assert _shapes(family_graph(family), kind) == shapes


def test_a_tied_table_gives_its_scale_to_the_last_norm() -> None:
    """As a table it is written, as a head it reads: the gain between takes the inverse, and blocks nothing by itself."""
    spaces = find_spaces(family_graph("qwen2"), Kind.DIAGONAL, blocked=True)
    (stream,) = (space for space in spaces if any(node.name == "embedding" for node in space.writers) and space.size == 32)
    variance = {member.name: member.contravariant for member in stream.members}
    assert variance["model.embed_tokens.weight"] is False
    assert variance["model.norm.weight"] is True


def test_queries_and_keys_are_dual() -> None:
    space = next(space for space in find_spaces(family_graph("llama"), Kind.DIAGONAL) if space.block_size == 4)
    variance = {member.name.split(".")[-2]: member.contravariant for member in space.members}
    assert variance == {"q_proj": False, "k_proj": True}
    (query,) = (member for member in space.members if "q_proj" in member.name)
    assert [(place.start, place.block) for place in query.places] == [
        (0, 0), (4, 0), (8, 0), (12, 0), (16, 1), (20, 1), (24, 1), (28, 1),
    ]  # fmt: skip


def test_readers_writers_and_blockers() -> None:
    spaces = find_spaces(family_graph("llama"), Kind.ORTHOGONAL, blocked=True)
    stream = next(space for space in spaces if "embedding" in str(space.writers))
    assert [node.name for node in stream.writers] == ["embedding", "linear_3", "linear_6", "linear_10", "linear_13"]
    assert stream.readers == ()
    assert [node for node, _ in stream.blockers] == ["rms_norm", "rms_norm_1", "rms_norm_2", "rms_norm_3", "rms_norm_4"]
    assert "fold it into what reads the norm" in stream.blockers[0][1]
    hidden = next(space for space in spaces if [node.name for node in space.readers] == ["linear_6"])
    assert hidden.blocked == ("gated_activation", "a product of two branches is taken channel by channel")


def test_the_table_of_a_tiny_llama(root: Path) -> None:
    assert spaces_text(family_graph("llama")) == (root / "tests" / "golden" / "spaces_llama.txt").read_text()


class OnnxShaped(nn.Module):
    """As exporters write it: `x @ W[K, N] + b`, `addmm`, and attention spelled out with transposed products."""

    def __init__(self) -> None:
        super().__init__()
        shapes = dict.fromkeys(("inlet", "query", "key", "value", "out"), (16, 16)) | {"up": (16, 24), "down": (24, 16)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / 4))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(shape[1])))
        self.head = nn.Parameter(torch.randn(7, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.inlet + self.inlet_bias
        q, k, v = ((x @ getattr(self, name)).reshape(x.shape[0], -1, 4, 4).transpose(1, 2) for name in ("query", "key", "value"))
        weights = torch.softmax(q @ k.transpose(-1, -2) * 0.5, dim=-1)
        x = x + (weights @ v).transpose(1, 2).reshape(x.shape) @ self.out
        hidden = torch.addmm(self.up_bias, x.reshape(-1, 16), self.up).relu()
        return ((hidden @ self.down + self.down_bias).reshape(x.shape) + x) @ self.head.t()


@pytest.mark.parametrize("raw", [True, False])
def test_an_onnx_shaped_graph(raw: bool) -> None:
    """Products stand as they were traced, or as linears after canonicalization: the same spaces."""
    graph = capture(OnnxShaped(), torch.randn(2, 5, 16))
    if not raw:
        canonical(graph)
    assert _shapes(graph, Kind.ORTHOGONAL) == [(1, 16), (4, 4)]
    assert _shapes(graph, Kind.PERMUTATION) == [(1, 16), (1, 24), (4, 4)]
    for kind in Kind:
        clone, spaces = changed(graph, kind)
        assert spaces or kind is Kind.SIGN
        assert_same_function(graph, clone)


class Strange(nn.Module):
    """What no library has: a cube, a sorted branch, channels taken by a list, halves swapped, a mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(8, 5)
        self.scale = nn.Parameter(torch.rand(16) + 0.5)
        self.register_buffer("order", torch.tensor([3, 1, 2, 0, 7, 6, 5, 4]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * self.scale
        low, high = self.second(x + self.second(x)).chunk(2, dim=-1)
        branch = torch.sort(low, dim=-1).values
        mixed = torch.cat((high[..., self.order], low), dim=-1)[..., :8]
        return self.third(mixed - mixed.mean(1, keepdim=True)) + self.third(branch) ** 3


def test_a_custom_module_with_unknown_operators() -> None:
    graph = canonical(capture(Strange(), torch.randn(2, 5, 12)))
    blocked = [space.blocked for space in find_spaces(graph, Kind.PERMUTATION, blocked=True) if space.blocked is not None]
    assert any(reason == "operator aten.sort is unknown to the rules" for _, reason in blocked)
    for kind in Kind:
        assert_same_function(graph, changed(graph, kind)[0])


def test_admitted_is_required() -> None:
    graph = family_graph("llama").clone()
    stream = next(space for space in find_spaces(graph, Kind.PERMUTATION) if space.size == 32)
    heads = next(space for space in find_spaces(graph, Kind.ORTHOGONAL) if space.blocks == 2)
    stopped = next(space for space in find_spaces(graph, Kind.ORTHOGONAL, blocked=True) if "embedding" in str(space.writers))
    identity = torch.arange(32)
    cases: list[tuple[Space, Basis, str]] = [
        (stream, Hadamard(32), "map of kind permutation, got hadamard.32., which is invertible, orthogonal"),
        (stream, Permutation(identity[:16]), "expected a map of 32, got permutation.16"),
        (heads, Hadamard(16), "expected Blocks of 2 maps of 8, got hadamard.16"),
        (heads, Blocks((Hadamard(8),)), "expected Blocks of 2 maps of 8"),
        (heads, Blocks((Hadamard(8), Diagonal(torch.ones(8)))), "map of kind orthogonal"),
        (stopped, Hadamard(32), r"rms_norm is in the way \(its gain does not commute"),
    ]
    for space, basis, message in cases:
        with pytest.raises(PassError, match=message):
            apply_basis_change(graph, space, basis)
    assert graph.fingerprint() == family_graph("llama").fingerprint(), "a refused change leaves nothing behind"


def test_changes_are_lazy_and_compose() -> None:
    """Nothing is computed when a basis changes, and the second change of a space joins the first in the log."""
    graph = family_graph("llama").clone()
    space = next(space for space in find_spaces(graph, Kind.DIAGONAL) if space.size == 48)
    for seed in (1, 2):
        apply_basis_change(graph, space, random_change(space, seed))
    logs = [graph.constants[member.name].transforms for member in space.members]
    assert [len(log) for log in logs] == [1, 1]
    assert graph.fingerprint() != family_graph("llama").fingerprint()
    assert_same_function(family_graph("llama"), graph)


ONLINE: list[Callable[[int], Basis]] = [
    lambda size: Hadamard(size), lambda size: Hadamard(size, seed=3), lambda size: Blocks((Hadamard(size // 4, seed=1),) * 4),
    lambda size: Orthogonal(random_orthogonal(size)), lambda size: Diagonal(torch.linspace(1, 2, size)),
    lambda size: Signs(torch.tensor([1.0, -1.0]).repeat(size // 2)), lambda size: Permutation(torch.arange(size).flip(0)),
]  # fmt: skip


@pytest.mark.parametrize("make", ONLINE)
def test_an_online_change_is_exact(make: Callable[[int], Basis]) -> None:
    graph = canonical(capture(Gated(), torch.randn(2, 5, 32)))
    before, down = graph.clone(), graph.calls(aten.linear.default)[2]
    changed_value = apply_online_change(graph, [down], make(48))
    assert down.args[0] is changed_value
    graph.verify()
    assert_same_function(before, graph)


def test_online_changes_compose_and_are_shared() -> None:
    graph = canonical(capture(Gated(), torch.randn(2, 5, 32)))
    before, (gate, up, down) = graph.clone(), graph.calls(aten.linear.default)
    count = len(graph.fx.nodes)
    apply_online_change(graph, [gate, up], Diagonal(torch.linspace(1, 2, 32)))
    assert gate.args[0] is up.args[0]
    apply_online_change(graph, [gate, up], Diagonal(torch.linspace(3, 4, 32)))
    assert len(graph.fx.nodes) == count + 2, "one product with one vector"
    assert len(graph.constants[str(gate.args[1].target)].transforms) == 1  # type: ignore[union-attr]
    assert_same_function(before, graph)
    with pytest.raises(PassError, match="expected it to read"):
        apply_online_change(graph, [gate, down], Hadamard(32))
    with pytest.raises(PassError, match=r"linear.* expected a map of 48 channels, got hadamard\(32\)"):
        apply_online_change(graph, [down], Hadamard(32))


def test_an_online_change_before_a_tied_head_leaves_the_table_alone() -> None:
    graph = family_graph("qwen2").clone()
    head = graph.calls(aten.linear.default)[-1]
    apply_online_change(graph, [head], Hadamard(32, seed=0))
    assert str(head.args[1].target) == "model.embed_tokens.weight.online"  # type: ignore[union-attr]
    assert_same_function(family_graph("qwen2"), graph)


def test_an_online_change_needs_a_linear() -> None:
    graph = family_graph("mixtral").clone()
    (experts, *_) = graph.calls(torch.ops.qcompile.moe_experts.default)
    with pytest.raises(PassError, match=r"linear with a constant weight to absorb hadamard\(32\), got moe_experts"):
        apply_online_change(graph, [experts], Hadamard(32))
