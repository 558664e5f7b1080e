"""Maps of a feature axis.

A map T takes a vector x of `size` channels to `T x`. What reads x holds vectors that transform contravariantly: `T⁻ᵀ w`, so that
`(T⁻ᵀ w) · (T x) = w · x`. Arithmetic is done in float64 and rounded once.
`qcompile.ir.change_basis` has the entry that such a map leaves in a constant's log.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import torch
from torch import Tensor

from qcompile.errors import PassError
from qcompile.quant.hadamard import fast_hadamard, mixing_matrix, random_signs

_CHUNK = 1 << 22
"""Elements that are held in float64 at a time: a large weight is mapped rows by rows."""
_ORTHOGONAL_TOLERANCE = 1e-10
"""Of `|Tᵀ T v - v|`: exact passes are checked at 1e-9."""


class Kind(Enum):
    """What maps a space admits."""

    PERMUTATION = "permutation"
    SIGN = "sign"
    DIAGONAL = "diagonal"
    ORTHOGONAL = "orthogonal"
    INVERTIBLE = "invertible"

    @property
    def is_own_dual(self) -> bool:
        """Whether `T⁻ᵀ = T` for each map of this kind: then it does not matter whether something reads or writes a space."""
        return self not in (Kind.DIAGONAL, Kind.INVERTIBLE)


class Basis(ABC):
    """An invertible map of `size` channels. Equal `str` means equal map."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Channels."""

    @property
    @abstractmethod
    def kinds(self) -> frozenset[Kind]:
        """The kinds of spaces that it may act on."""

    @abstractmethod
    def map(self, rows: Tensor, *, contravariant: bool = False) -> Tensor:
        """`T` (or `T⁻ᵀ`) on each of the rows, float64 [M, size]."""

    def apply(self, tensor: Tensor, axis: int, *, contravariant: bool = False) -> Tensor:
        """`T` (or `T⁻ᵀ`) along `axis`; the result has the tensor's dtype, but at least float32.

        Raises:
            PassError: if the axis has another size.
        """
        if tensor.shape[axis] != self.size:
            raise PassError(f"{self}: expected an axis of {self.size} channels, got {tensor.shape[axis]} (axis {axis})")
        moved = tensor.movedim(axis, -1)
        rows = moved.reshape(-1, self.size)
        result = torch.empty(rows.shape, dtype=torch.promote_types(tensor.dtype, torch.float32))
        step = max(1, _CHUNK // self.size)
        for start in range(0, rows.shape[0], step):
            result[start : start + step] = self.map(rows[start : start + step].double(), contravariant=contravariant)
        return result.view(moved.shape).movedim(-1, axis).contiguous()


@dataclass(frozen=True, eq=False)
class Permutation(Basis):
    """`(T x)[i] = x[order[i]]`."""

    order: Tensor

    def __post_init__(self) -> None:
        """Check that each channel comes once."""
        if not torch.equal(self.order.sort().values, torch.arange(self.order.numel())):
            raise PassError(f"permutation: expected each of 0…{self.order.numel() - 1} once, got {self.order.tolist()[:8]}…")

    @property
    def size(self) -> int:
        """Channels."""
        return self.order.numel()

    @property
    def kinds(self) -> frozenset[Kind]:
        """It is orthogonal too."""
        return frozenset((Kind.PERMUTATION, Kind.ORTHOGONAL, Kind.INVERTIBLE))

    def map(self, rows: Tensor, *, contravariant: bool = False) -> Tensor:
        """A permutation is its own dual."""
        del contravariant
        return rows[:, self.order]

    def __str__(self) -> str:
        return f"permutation({self.size}, {_digest(self.order)})"


@dataclass(frozen=True, eq=False)
class Signs(Basis):
    """`T x = signs · x`, each ±1."""

    signs: Tensor

    def __post_init__(self) -> None:
        """Check the entries."""
        if not bool((self.signs.abs() == 1).all()):
            raise PassError("signs: expected entries of 1 and -1; use Diagonal for others")

    @property
    def size(self) -> int:
        """Channels."""
        return self.signs.numel()

    @property
    def kinds(self) -> frozenset[Kind]:
        """Orthogonal too; a positive diagonal it is not."""
        return frozenset((Kind.SIGN, Kind.ORTHOGONAL, Kind.INVERTIBLE))

    def map(self, rows: Tensor, *, contravariant: bool = False) -> Tensor:
        """Signs are their own dual."""
        del contravariant
        return rows * self.signs.double()

    def __str__(self) -> str:
        return f"signs({self.size}, {_digest(self.signs.to(torch.int8))})"


@dataclass(frozen=True, eq=False)
class Diagonal(Basis):
    """`T x = scale · x`, each positive and finite."""

    scale: Tensor

    def __post_init__(self) -> None:
        """Check the entries."""
        if not bool((torch.isfinite(self.scale) & (self.scale > 0)).all()):
            raise PassError("diagonal: expected positive finite entries; use Signs for negative ones")

    @property
    def size(self) -> int:
        """Channels."""
        return self.scale.numel()

    @property
    def kinds(self) -> frozenset[Kind]:
        """Invertible too."""
        return frozenset((Kind.DIAGONAL, Kind.INVERTIBLE))

    def map(self, rows: Tensor, *, contravariant: bool = False) -> Tensor:
        """Times the scale, or divided by it."""
        return rows / self.scale.double() if contravariant else rows * self.scale.double()

    def __str__(self) -> str:
        return f"diagonal({self.size}, {_digest(self.scale.double())})"


@dataclass(frozen=True, eq=False)
class Orthogonal(Basis):
    """`T = matrix` [size, size] with orthonormal rows, float64: see `nearest` for a matrix that is so up to float32 only."""

    matrix: Tensor

    def __post_init__(self) -> None:
        """Check `Tᵀ T v = v` on one vector: a full product would cost as much as a change of basis."""
        _require_square(self.matrix, "orthogonal")
        wide = self.matrix.double()
        probe = torch.randn(self.size, generator=torch.Generator().manual_seed(self.size), dtype=torch.float64)
        error = float((wide.T @ (wide @ probe) - probe).abs().max())
        if not error <= _ORTHOGONAL_TOLERANCE * max(1.0, float(probe.abs().max())):
            raise PassError(f"orthogonal: expected TᵀT = 1 within {_ORTHOGONAL_TOLERANCE:g}, got {error:.2g}; use Orthogonal.nearest")

    @classmethod
    def nearest(cls, matrix: Tensor) -> Orthogonal:
        """The orthogonal matrix nearest to `matrix` (its polar factor): what learning in float32 leaves, made exact."""
        left, _, right = torch.linalg.svd(matrix.double())
        return cls(left @ right)

    @property
    def size(self) -> int:
        """Channels."""
        return self.matrix.shape[0]

    @property
    def kinds(self) -> frozenset[Kind]:
        """Invertible too."""
        return frozenset((Kind.ORTHOGONAL, Kind.INVERTIBLE))

    def map(self, rows: Tensor, *, contravariant: bool = False) -> Tensor:
        """An orthogonal matrix is its own dual."""
        del contravariant
        return rows @ self.matrix.double().T

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        """Read over and over, as part of the key of every constant."""
        return f"orthogonal({self.size}, {_digest(self.matrix.double())})"


@dataclass(frozen=True)
class Hadamard(Basis):
    """The Hadamard transform of `channels`, after random signs if there is a seed (QuaRot, arXiv:2404.00456).

    Where no Hadamard matrix of that size is known its odd factor is a seeded orthogonal matrix: see `qcompile.quant.hadamard`.
    """

    channels: int
    seed: int | None = None

    @property
    def size(self) -> int:
        """Channels."""
        return self.channels

    @property
    def kinds(self) -> frozenset[Kind]:
        """Invertible too."""
        return frozenset((Kind.ORTHOGONAL, Kind.INVERTIBLE))

    @cached_property
    def mixing(self) -> Tensor | None:
        """The factor [m, m] that is no power of two, float64, or None."""
        return mixing_matrix(self.channels, self.seed or 0)

    @cached_property
    def signs(self) -> Tensor | None:
        """What multiplies the channels first, float64 [size], or None."""
        return None if self.seed is None else random_signs(self.channels, self.seed)

    def map(self, rows: Tensor, *, contravariant: bool = False) -> Tensor:
        """An orthogonal map is its own dual; n·log(n) operations."""
        del contravariant
        signed = rows if self.signs is None else rows * self.signs
        return fast_hadamard(signed, self.mixing, self.channels)

    def __str__(self) -> str:
        return f"hadamard({self.channels}{'' if self.seed is None else f', seed={self.seed}'})"


@dataclass(frozen=True, eq=False)
class Invertible(Basis):
    """`T = matrix` [size, size], of full rank."""

    matrix: Tensor

    def __post_init__(self) -> None:
        """Check the rank by inverting."""
        _require_square(self.matrix, "invertible")
        if not bool(torch.isfinite(self.dual).all()):
            raise PassError(f"invertible: expected a matrix of rank {self.size}, got a singular one")

    @property
    def size(self) -> int:
        """Channels."""
        return self.matrix.shape[0]

    @property
    def kinds(self) -> frozenset[Kind]:
        """Nothing narrower."""
        return frozenset((Kind.INVERTIBLE,))

    @cached_property
    def dual(self) -> Tensor:
        """`T⁻ᵀ`, float64."""
        inverse, failed = torch.linalg.inv_ex(self.matrix.double())
        return torch.full_like(inverse, torch.inf) if int(failed) else inverse.T

    def map(self, rows: Tensor, *, contravariant: bool = False) -> Tensor:
        """By the matrix, or by its inverse transposed."""
        return rows @ (self.dual if contravariant else self.matrix.double()).T

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        """Read over and over, as part of the key of every constant."""
        return f"invertible({self.size}, {_digest(self.matrix.double())})"


@dataclass(frozen=True)
class Blocks(Basis):
    """Block diagonal: part i acts on the i-th run of channels."""

    parts: tuple[Basis, ...]

    @property
    def size(self) -> int:
        """Channels of all parts."""
        return sum(part.size for part in self.parts)

    @property
    def kinds(self) -> frozenset[Kind]:
        """What all parts are."""
        return frozenset.intersection(*(part.kinds for part in self.parts))

    def map(self, rows: Tensor, *, contravariant: bool = False) -> Tensor:
        """Each part on its own run."""
        runs = torch.split(rows, [part.size for part in self.parts], dim=-1)
        return torch.cat([part.map(run, contravariant=contravariant) for part, run in zip(self.parts, runs, strict=True)], dim=-1)

    def __str__(self) -> str:
        keys = [str(part) for part in self.parts]
        same = len(set(keys)) == 1
        return f"{len(keys)} x {keys[0]}" if same else f"blocks({', '.join(keys)})"


@dataclass(frozen=True)
class Chain(Basis):
    """One map after another, in order."""

    steps: tuple[Basis, ...]

    @property
    def size(self) -> int:
        """Channels of each."""
        return self.steps[0].size

    @property
    def kinds(self) -> frozenset[Kind]:
        """What all steps are."""
        return frozenset.intersection(*(step.kinds for step in self.steps))

    def map(self, rows: Tensor, *, contravariant: bool = False) -> Tensor:
        """`(A B)⁻ᵀ = A⁻ᵀ B⁻ᵀ`: the order stays."""
        for step in self.steps:
            rows = step.map(rows, contravariant=contravariant)
        return rows

    def __str__(self) -> str:
        return " > ".join(map(str, self.steps))


def compose(first: Basis, second: Basis) -> Basis:
    """`first`, then `second`, as one map: of the same class where the class is closed under products, else a chain."""
    match first, second:
        case Permutation(), Permutation():
            return Permutation(first.order[second.order])
        case Signs(), Signs():
            return Signs(first.signs * second.signs)
        case Diagonal(), Diagonal():
            return Diagonal(first.scale.double() * second.scale.double())
        case Orthogonal(), Orthogonal():
            return Orthogonal(second.matrix.double() @ first.matrix.double())
        case Invertible(), Invertible():
            return Invertible(second.matrix.double() @ first.matrix.double())
        case Blocks(), Blocks() if [part.size for part in first.parts] == [part.size for part in second.parts]:
            return Blocks(tuple(compose(one, other) for one, other in zip(first.parts, second.parts, strict=True)))
    steps = [step for item in (first, second) for step in (item.steps if isinstance(item, Chain) else (item,))]
    return Chain(tuple(steps))


def identity_matrix(basis: Basis) -> Tensor:
    """The matrix of a map, float64 [size, size]: column j is what becomes of channel j."""
    return basis.map(torch.eye(basis.size, dtype=torch.float64)).T


def _require_square(matrix: Tensor, what: str) -> None:
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise PassError(f"{what}: expected a square matrix, got {list(matrix.shape)}")


def _digest(tensor: Tensor) -> str:
    """Eight hex digits over the bytes."""
    return hashlib.sha256(tensor.detach().contiguous().cpu().numpy().tobytes()).hexdigest()[:8]
