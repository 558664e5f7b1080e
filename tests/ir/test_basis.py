"""Maps of a feature axis and their entry in a constant's log."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcompile.errors import PassError
from qcompile.ir.basis import (
    Basis,
    Blocks,
    Chain,
    Diagonal,
    Hadamard,
    Invertible,
    Kind,
    Orthogonal,
    Permutation,
    Signs,
    compose,
    identity_matrix,
)  # fmt: skip
from qcompile.ir.change_basis import ChangeBasis, Place, change_basis
from qcompile.ir.constants import Cast, Permute, tensor_constant, widened
from qcompile.quant.hadamard import random_orthogonal

SIZE = 12
MAPS: list[Basis] = [
    Permutation(torch.randperm(SIZE, generator=torch.Generator().manual_seed(0))),
    Signs(torch.tensor([1.0, -1.0] * 6)),
    Diagonal(torch.linspace(0.5, 3.0, SIZE)),
    Orthogonal(random_orthogonal(SIZE)),
    Hadamard(SIZE), Hadamard(SIZE, seed=3),
    Invertible(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)),
    Blocks((Hadamard(4, seed=1), Diagonal(torch.linspace(1, 2, 8)))),
    Chain((Diagonal(torch.linspace(0.5, 3.0, SIZE)), Hadamard(SIZE))),
]  # fmt: skip


@pytest.mark.parametrize("basis", MAPS, ids=str)
def test_contravariant_is_the_inverse_transposed(basis: Basis) -> None:
    x, w = torch.randn(5, SIZE, dtype=torch.float64), torch.randn(7, SIZE, dtype=torch.float64)
    before = x @ w.T
    after = basis.apply(x, 1) @ basis.apply(w, 1, contravariant=True).T
    torch.testing.assert_close(after, before, atol=1e-11, rtol=0)
    torch.testing.assert_close(basis.apply(x, 1), x @ identity_matrix(basis).T, atol=1e-12, rtol=0)


@pytest.mark.parametrize("basis", MAPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_axis_and_at_least_float32(basis: Basis, dtype: torch.dtype) -> None:
    tensor = torch.randn(3, SIZE, 2).to(dtype)
    got = basis.apply(tensor, 1)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert got.is_contiguous()
    expected = basis.apply(tensor.double().movedim(1, -1), 2).movedim(-1, 1)
    assert torch.equal(got, expected.to(got.dtype)), "rounded once, from float64"


@pytest.mark.parametrize("first", MAPS[:7], ids=str)
@pytest.mark.parametrize("second", MAPS[:7], ids=str)
def test_composition_is_the_product(first: Basis, second: Basis) -> None:
    both = compose(first, second)
    torch.testing.assert_close(identity_matrix(both), identity_matrix(second) @ identity_matrix(first), atol=1e-11, rtol=0)
    assert both.size == SIZE
    assert both.kinds >= first.kinds & second.kinds


def test_kinds_are_those_a_map_belongs_to() -> None:
    for basis in MAPS:
        matrix = identity_matrix(basis)
        belongs = {
            Kind.PERMUTATION: bool(((matrix == 0) | (matrix == 1)).all()),
            Kind.SIGN: bool((matrix.abs() == torch.eye(SIZE)).all()),
            Kind.DIAGONAL: bool((matrix * (1 - torch.eye(SIZE)) == 0).all() and (matrix.diagonal() > 0).all()),
            Kind.ORTHOGONAL: bool(((matrix.T @ matrix - torch.eye(SIZE)).abs() < 1e-12).all()),
            Kind.INVERTIBLE: True,
        }
        assert basis.kinds <= {kind for kind, holds in belongs.items() if holds}, str(basis)
        assert Kind.INVERTIBLE in basis.kinds


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Permutation(torch.tensor([0, 0, 1])), r"expected each of 0…2 once"),
    (lambda: Signs(torch.tensor([1.0, 0.5])), r"entries of 1 and -1"),
    (lambda: Diagonal(torch.tensor([1.0, 0.0])), r"positive finite"),
    (lambda: Diagonal(torch.tensor([1.0, torch.nan])), r"positive finite"),
    (lambda: Orthogonal(torch.eye(3) * 1.001), r"within 1e-10, got .*use Orthogonal.nearest"),
    (lambda: Orthogonal(torch.ones(2, 3)), r"square matrix, got \[2, 3\]"),
    (lambda: Invertible(torch.ones(3, 3)), r"rank 3, got a singular"),
    (lambda: Hadamard(8).apply(torch.ones(2, 6), 1), r"axis of 8 channels, got 6 \(axis 1\)"),
])  # fmt: skip
def test_what_is_no_such_map_is_refused(make: object, message: str) -> None:
    with pytest.raises(PassError, match=message):
        make()  # type: ignore[operator]


def test_nearest_makes_float32_orthogonal_matrices_exact() -> None:
    rough = random_orthogonal(64).float()
    with pytest.raises(PassError):
        Orthogonal(rough)
    assert (Orthogonal.nearest(rough).matrix - rough).abs().max() < 1e-6


def test_equal_text_is_equal_map() -> None:
    keys = [str(basis) for basis in MAPS]
    assert len(set(keys)) == len(keys)
    assert str(Permutation(torch.tensor([1, 0]))) == str(Permutation(torch.tensor([1, 0])))
    assert str(Permutation(torch.tensor([1, 0]))) != str(Permutation(torch.tensor([0, 1])))
    assert str(Blocks((Hadamard(4), Hadamard(4)))) == "2 x hadamard(4)"


def test_rows_are_mapped_in_chunks_alike() -> None:
    tall = torch.randn(3, 1 << 11, 1 << 10)  # more elements than are held in float64 at a time
    scale = torch.linspace(1, 2, 1 << 10)
    torch.testing.assert_close(Diagonal(scale).apply(tall, 2), tall * scale)


def test_a_change_goes_before_casts_and_keeps_the_dtype() -> None:
    source = tensor_constant(torch.randn(4, SIZE, dtype=torch.bfloat16))
    change = ChangeBasis(1, Hadamard(SIZE))
    changed = change_basis(source.then(Cast(torch.float32)), change)
    assert [str(item) for item in changed.transforms] == ["basis(axis=1, hadamard(12))"]
    assert changed.dtype == torch.float32
    narrow = change_basis(source.then(Permute((1, 0))), ChangeBasis(0, Hadamard(SIZE)))
    assert [str(item) for item in narrow.transforms] == ["permute(1, 0)", "basis(axis=0, hadamard(12))", "cast(bf16)"]
    assert narrow.materialize().dtype == torch.bfloat16


def test_consecutive_changes_are_one_entry() -> None:
    weight = torch.randn(4, SIZE, dtype=torch.float64)
    constant = tensor_constant(weight)
    first, second = MAPS[2], Diagonal(torch.linspace(3.0, 4.0, SIZE))
    for basis in (first, second):
        constant = change_basis(constant, ChangeBasis(1, basis, contravariant=True))
    assert len(constant.transforms) == 1
    torch.testing.assert_close(constant.materialize(), weight / first.scale.double() / second.scale.double())  # type: ignore[attr-defined]
    longer = change_basis(constant, ChangeBasis(0, Hadamard(4)))
    assert len(longer.transforms) == 2, "another axis is another change"
    assert constant.key != longer.key


def test_places_hold_their_own_blocks() -> None:
    """Two experts with maps of their own, the second read contravariantly."""
    weight = torch.randn(2, 3, 5, dtype=torch.float64)
    blocks = Blocks((Diagonal(torch.tensor([2.0, 4.0])), Hadamard(2)))
    places = (Place((0, None, None), 1, 0), Place((1, None, None), 3, 0, contravariant=True), Place((1, None, None), 0, 1))
    got = tensor_constant(weight).then(ChangeBasis(2, blocks, places=places)).materialize()
    expected = weight.clone()
    expected[0, :, 1:3] *= torch.tensor([2.0, 4.0])
    expected[1, :, 3:5] /= torch.tensor([2.0, 4.0])
    expected[1, :, 0:2] = expected[1, :, 0:2] @ (torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_a_gain_with_an_offset_changes_as_a_gain() -> None:
    weight: Tensor = torch.randn(4)
    scale = torch.tensor([1.0, 2.0, 4.0, 8.0])
    got = tensor_constant(weight).then(ChangeBasis(0, Diagonal(scale), offset=1.0)).materialize()
    torch.testing.assert_close(got, (1 + weight) * scale - 1)
    assert got.dtype == torch.float32


def test_float64_starts_at_the_source() -> None:
    weight = torch.randn(4, SIZE)
    changed = change_basis(tensor_constant(weight), ChangeBasis(1, Hadamard(SIZE)))
    assert torch.equal(widened(changed).materialize(), Hadamard(SIZE).apply(weight.double(), 1))
    assert not torch.equal(changed.then(Cast(torch.float64)).materialize(), widened(changed).materialize())
